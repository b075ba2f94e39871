#include "vmm/engine.hpp"

namespace umbra {

std::optional<Verdict> Engine::attend(RunControl& control) {
    RunControl::Requests requests = control.take();
    if (!requests.input.empty())
        machine_.input(requests.input);
    if (requests.met)
        return Verdict{Verdict::Kind::passed, 0, "the console printed what was expected"};
    if (requests.interrupted)
        return Verdict{Verdict::Kind::interrupted, 0, {}};
    if (requests.timed_out)
        return Verdict{Verdict::Kind::timed_out, 0, {}};
    machine_.platform().flush();
    return std::nullopt;
}

void Engine::record(std::uint64_t start, TrapReason reason, TrapAction action, std::uint32_t detail,
                    std::uint8_t vector, GuestVirt address) {
    log_.add({.start = start,
              .end = timestamp(),
              .reason = reason,
              .action = action,
              .vcpu = 0,
              .cpl = trap_cpl_,
              .vector = vector,
              .detail = detail,
              .rip = trap_rip_,
              .address = address});
}

} // namespace umbra
