// Where guests run: on this computer's KVM or, where that cannot be had, in an emulated machine that has one.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace umbra {

inline constexpr const char* host_variable = "UMBRA_HOST"; ///< a choice of host, for those who give no option

/// An emulated host that is to be started.
struct EmulatedHost {
    bool nested_paging = true; ///< kind A, otherwise kind B
    std::string because;       ///< why, if the user did not ask for it
};

/// What umbra is to run guests on; nothing: itself, on this computer's KVM or on the emulated host that it is
/// on. `choice`: auto, kvm, emulated, emulated:A, emulated:B, or empty: what the environment says.
/// StartupError(bad_usage) if it is none of them.
[[nodiscard]] std::optional<EmulatedHost> choose_host(const std::string& choice);

/// What an emulated host is started for.
struct Errand {
    std::vector<std::string> command; ///< and its arguments; a relative name is one of the current folder
    bool input = true;                ///< it reads standard input
    std::uint64_t memory_bytes = 0;   ///< what it needs, beside the machine's own
    unsigned processors = 1;
    bool counted = false; ///< see emulated::MachineConfig
    /// Where debuggers connect (GdbAddress::parse); empty: nowhere. The command takes them from the
    /// descriptor that its environment names: inherited_listener().
    std::string debuggers{};
    /// Called when they can; `end` interrupts the command.
    std::function<void(const std::string& address, std::function<void()> end)> debugger_ready{};
};

/// Runs the command there as it would run here: in this folder, with these files, this environment, standard
/// input, output and error; signals are passed on. A line on standard error says why, unless the user asked
/// for it. Returns the command's exit code, or 128 + n if signal n ended it; ExitCode::guest_panicked, and a
/// message, if the machine went down under it. StartupError if it did not come up.
[[nodiscard]] int run_on_emulated_host(const EmulatedHost& host, const Errand& errand);

} // namespace umbra
