#include "vmm/engine.hpp"

namespace umbra {

std::optional<Verdict> Engine::finish_exit(ExitReason reason, RunControl& control) {
    if (control.pending() || reason == ExitReason::interrupted)
        return attend(control);
    control.output_waits(machine_.platform().output_waits());
    return std::nullopt;
}

std::optional<Verdict> Engine::attend(RunControl& control) {
    RunControl::Requests requests = control.take();
    if (!requests.input.empty())
        machine_.input(requests.input);
    debugger_calls_ |= requests.debugger;
    if (requests.met)
        return Verdict{Verdict::Kind::passed, 0, "the console printed what was expected"};
    if (requests.interrupted)
        return Verdict{Verdict::Kind::interrupted, 0, {}};
    if (requests.timed_out)
        return Verdict{Verdict::Kind::timed_out, 0, {}};
    machine_.platform().flush();
    control.output_waits(false);
    return std::nullopt;
}

std::optional<Verdict> Engine::handle_port_exit() {
    const PortExit exit = machine_.vcpu().port_exit();
    trap_.reason = exit.write ? TrapReason::port_write : TrapReason::port_read;
    trap_.action = TrapAction::device;
    trap_.detail = exit.port;
    machine_.complete_port_exit();
    return machine_.guest_verdict();
}

void Engine::handle_mmio_exit() {
    const MmioExit exit = machine_.vcpu().mmio_exit();
    trap_.reason = exit.write ? TrapReason::mmio_write : TrapReason::mmio_read;
    trap_.action = TrapAction::device;
    trap_.device = GuestPhys(exit.address.value());
    machine_.complete_mmio_exit();
}

} // namespace umbra
