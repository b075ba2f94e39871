#include "vmm/native_engine.hpp"

namespace umbra {

Verdict NativeEngine::run(RunControl& control) {
    Vcpu& vcpu = machine_.vcpu();
    vcpu.store(cpu_);
    control.attach(vcpu);
    std::optional<Verdict> verdict;
    while (!verdict)
        verdict = handle(vcpu.run(), control);
    control.detach();
    vcpu.load(cpu_);
    return *verdict;
}

std::optional<Verdict> NativeEngine::handle(ExitReason reason, RunControl& control) {
    Vcpu& vcpu = machine_.vcpu();
    const std::uint64_t start = timestamp();
    trap_rip_ = GuestVirt(vcpu.rip());
    trap_cpl_ = vcpu.selector(SegmentName::cs) & 3;
    switch (reason) {
    case ExitReason::port: {
        const PortExit exit = vcpu.port_exit();
        machine_.complete_port_exit();
        record(start, exit.write ? TrapReason::port_write : TrapReason::port_read, TrapAction::device,
               exit.port);
        if (auto verdict = machine_.guest_verdict())
            return verdict;
        break;
    }
    case ExitReason::mmio: {
        const bool write = vcpu.mmio_exit().write;
        machine_.complete_mmio_exit();
        record(start, write ? TrapReason::mmio_write : TrapReason::mmio_read, TrapAction::device);
        break;
    }
    case ExitReason::interrupted:
        record(start, TrapReason::signal, TrapAction::attend);
        break;
    case ExitReason::shutdown:
        return Verdict{Verdict::Kind::triple_fault, 0, {}};
    case ExitReason::halt:
    case ExitReason::internal_error:
    case ExitReason::other:
        return Verdict{Verdict::Kind::host_failed, 0, vcpu.describe_exit()};
    }
    return control.pending() || reason == ExitReason::interrupted ? attend(control) : std::nullopt;
}

} // namespace umbra
