#include "vmm/verdict.hpp"

#include <fmt/core.h>

namespace umbra {

ExitCode exit_code(const Verdict& verdict) {
    switch (verdict.kind) {
    case Verdict::Kind::passed:
        return ExitCode::passed;
    case Verdict::Kind::failed:
        return ExitCode::guest_failed;
    case Verdict::Kind::reset:
    case Verdict::Kind::triple_fault:
    case Verdict::Kind::stopped:
    case Verdict::Kind::no_progress:
        return ExitCode::guest_panicked;
    case Verdict::Kind::timed_out:
        return ExitCode::timed_out;
    case Verdict::Kind::interrupted:
    case Verdict::Kind::restart:
        return ExitCode::interrupted;
    case Verdict::Kind::host_failed:
        return ExitCode::host_cannot;
    }
    __builtin_unreachable();
}

std::string describe(const Verdict& verdict) {
    const auto with_reason = [&](const char* what) {
        return verdict.reason.empty() ? std::string(what) : fmt::format("{}: {}", what, verdict.reason);
    };
    switch (verdict.kind) {
    case Verdict::Kind::passed:
        return with_reason("passed");
    case Verdict::Kind::failed:
        if (!verdict.reason.empty())
            return with_reason("failed");
        return fmt::format("failed with code {} ({:#x})", verdict.code, verdict.code);
    case Verdict::Kind::reset:
        return with_reason(
            "the guest reset the machine, which kernels do that panic; a power-off would have passed");
    case Verdict::Kind::triple_fault:
        return with_reason("triple fault");
    case Verdict::Kind::stopped:
        return with_reason("stopped");
    case Verdict::Kind::no_progress:
        return with_reason("no progress");
    case Verdict::Kind::timed_out:
        return with_reason("timed out");
    case Verdict::Kind::interrupted:
        return with_reason("interrupted");
    case Verdict::Kind::host_failed:
        return with_reason("this host could not go on");
    case Verdict::Kind::restart:
        return with_reason("to be started again");
    }
    __builtin_unreachable();
}

} // namespace umbra
