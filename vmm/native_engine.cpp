#include "vmm/native_engine.hpp"

namespace umbra {

Verdict NativeEngine::run(RunControl& control) {
    Vcpu& vcpu = machine_.vcpu();
    vcpu.store(cpu_);
    control.attach(vcpu);
    control.look_regularly(stuck_watch_.has_value());
    std::optional<Verdict> verdict;
    while (!verdict)
        verdict = handle(vcpu.run(), control);
    control.detach();
    vcpu.load(cpu_);
    return *verdict;
}

std::optional<Verdict> NativeEngine::handle(ExitReason reason, RunControl& control) {
    Vcpu& vcpu = machine_.vcpu();
    cpu_.rip = vcpu.rip();
    cpu_.cpl = vcpu.selector(SegmentName::cs) & 3;
    begin_trap();
    if (vcpu.was_reset()) {
        Verdict verdict = stop_at_init();
        end_trap();
        return verdict;
    }
    std::optional<Verdict> verdict;
    switch (reason) {
    case ExitReason::port:
        verdict = handle_port_exit();
        break;
    case ExitReason::mmio:
        handle_mmio_exit();
        break;
    case ExitReason::interrupted:
        trap_.reason = TrapReason::signal;
        trap_.action = TrapAction::attend;
        break;
    case ExitReason::shutdown:
        trap_.reason = TrapReason::exception;
        verdict = stop(Verdict::Kind::triple_fault, {});
        break;
    case ExitReason::not_emulated:
        trap_.reason = TrapReason::instruction;
        verdict = stop(Verdict::Kind::stopped, vcpu.describe_exit());
        break;
    case ExitReason::halt:
    case ExitReason::internal_error:
    case ExitReason::other:
        trap_.reason = TrapReason::signal;
        verdict = stop(Verdict::Kind::host_failed, vcpu.describe_exit());
        break;
    }
    end_trap();
    if (!verdict)
        verdict = finish_exit(reason, control);
    if (!verdict && stuck_watch_ && reason == ExitReason::interrupted) {
        vcpu.load(cpu_);
        cpu_.halted = vcpu.halted();
        verdict = look_for_progress({machine_.memory(), paging()});
    }
    return verdict;
}

} // namespace umbra
