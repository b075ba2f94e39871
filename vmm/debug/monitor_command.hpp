// The commands that gdb passes on with `monitor`: their names, what they take, and their help. What they do
// is the session's (vmm/debug/session_commands.cpp).
#pragma once

#include "vmm/symbols.hpp"

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace umbra {

enum class MonitorCommand : std::uint8_t {
    help,
    pt,
    maps,
    vtop,
    ptov,
    traps,
    regs,
    stats,
    trace,
    watch,
    unwatch,
    hidden_breakpoints,
    catch_event,
    uncatch,
    step_interrupts,
    bind,
    core,
    reset,
    quit,
};

struct MonitorCommandInfo {
    MonitorCommand command{};
    std::string_view name;
    std::string_view arguments; ///< as in a manual page; empty: none
    std::string_view summary;   ///< half a line
    std::string_view detail;    ///< lines; may be empty
};
[[nodiscard]] const MonitorCommandInfo& monitor_command_info(MonitorCommand command);

struct ParsedCommand {
    MonitorCommand command{};
    std::vector<std::string> words; ///< what follows the name
};
/// By the name or a beginning that no other name has. Otherwise a line that says what could have been meant.
[[nodiscard]] std::variant<ParsedCommand, std::string> parse_monitor_command(std::string_view line);

/// All commands, or, if `words` names one, that one in detail. What does not name one: as above.
[[nodiscard]] std::string monitor_help(std::span<const std::string> words);

/// A number, decimal or after 0x hexadecimal, or the address of a function of the kernel, or the sum of two
/// of these: "0x1000", "main+16". Nothing if it is none, or beyond 64 bits.
[[nodiscard]] std::optional<std::uint64_t> parse_number(std::string_view text, const Symbols& symbols);

} // namespace umbra
