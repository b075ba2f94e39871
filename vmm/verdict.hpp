// How a run ended.
#pragma once

#include "vmm/error.hpp"

#include <cstdint>
#include <string>

namespace umbra {

struct Verdict {
    enum class Kind : std::uint8_t {
        passed,       ///< the guest said so: debug exit 0 or power-off, or printed what was expected
        failed,       ///< the guest said so: debug exit with another code
        reset,        ///< the guest reset the machine, as kernels do that panic
        triple_fault, ///< a fault in the delivery of a double fault
        stopped,      ///< the guest needs something that umbra does not do
        timed_out,
        no_progress, ///< it would never do anything again (MonitorOptions::end_stuck)
        interrupted, ///< by the user
        host_failed, ///< KVM or umbra could not go on
        restart,     ///< by the debugger's client: the run begins anew, and has no verdict yet
    };
    Kind kind = Kind::passed;
    std::uint32_t code = 0; ///< of the debug exit
    std::string reason;     ///< one line, for the kinds that want an explanation
};

/// The exit code for users; README.md documents them.
[[nodiscard]] ExitCode exit_code(const Verdict& verdict);
/// One line: "passed", "failed with code 7", "triple fault" …
[[nodiscard]] std::string describe(const Verdict& verdict);

} // namespace umbra
