#include "vmm/debug/monitor_command.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

#include <fmt/core.h>
#include <fmt/ranges.h>

namespace umbra {
namespace {

constexpr std::array commands{
    MonitorCommandInfo{MonitorCommand::help, "help", "[COMMAND]", "this list, or a command in detail", ""},
    MonitorCommandInfo{MonitorCommand::pt, "pt", "ADDRESS", "how an address is translated, level by level",
                       "The guest's own page tables and, beside them, umbra's shadow of them.\n"},
    MonitorCommandInfo{
        MonitorCommand::maps, "maps", "[guest|shadow]", "what is mapped, in ranges",
        "guest: by the guest's tables, and how much of it the shadow holds; shadow: what the machine's\n"
        "tables map now, for the guest's kernel and for its programs.\n"},
    MonitorCommandInfo{MonitorCommand::vtop, "vtop", "ADDRESS", "the physical address behind a virtual one",
                       ""},
    MonitorCommandInfo{MonitorCommand::ptov, "ptov", "ADDRESS",
                       "the virtual addresses, in this address space, of a physical one", ""},
    MonitorCommandInfo{MonitorCommand::traps, "traps", "[N]",
                       "the last traps: why the machine left the guest", ""},
    MonitorCommandInfo{MonitorCommand::regs, "regs", "", "all registers, with their flags in words", ""},
    MonitorCommandInfo{MonitorCommand::stats, "stats", "", "what the run has cost so far", ""},
    MonitorCommandInfo{MonitorCommand::trace, "trace", "on FILE|off", "write every trap to a file", ""},
    MonitorCommandInfo{
        MonitorCommand::watch, "watch", "[phys ADDRESS LENGTH [w|r|a]]",
        "watch physical memory, or list what is watched",
        "Stops after the instruction that writes to (w, the default), reads from (r) or accesses (a) any\n"
        "of the bytes, by whatever address. For virtual addresses: gdb's own watch, rwatch, awatch.\n"},
    MonitorCommandInfo{MonitorCommand::unwatch, "unwatch", "all|phys ADDRESS LENGTH [w|r|a]",
                       "no longer watch physical memory", ""},
    MonitorCommandInfo{
        MonitorCommand::hidden_breakpoints, "hidden-breakpoints", "on|off",
        "breakpoints that leave the guest's code as it is",
        "For code that reads itself. Each instruction on the pages of breakpoints traps then.\n"},
    MonitorCommandInfo{
        MonitorCommand::catch_event, "catch", "[EVENT...]",
        "stop at an event before the guest sees it, or list",
        "EVENT: an exception (de db nmi bp of br ud nm df ts np ss gp pf mf ac mc xm), vector=N for any\n"
        "exception or interrupt, cr3 (loads of it), msr or msr=INDEX (RDMSR, WRMSR), triple. `continue`\n"
        "lets the guest have the event; `signal 0` takes an exception away and tries the instruction\n"
        "again. A guest that cannot go on stays whether triple is caught or not.\n"},
    MonitorCommandInfo{MonitorCommand::uncatch, "uncatch", "all|EVENT...", "no longer stop at events", ""},
    MonitorCommandInfo{MonitorCommand::step_interrupts, "step-interrupts", "on|off",
                       "whether a step may end in an interrupt's handler",
                       "Off at first: handlers run between two steps, unseen.\n"},
    MonitorCommandInfo{
        MonitorCommand::bind, "bind", "ADDRESS [current|CR3|any]",
        "breakpoints and watchpoints of one address space",
        "What is set at this address, now or later, stops the guest in that address space only.\n"},
    MonitorCommandInfo{MonitorCommand::core, "core", "FILE", "write memory and registers to a file for gdb",
                       ""},
    MonitorCommandInfo{MonitorCommand::reset, "reset", "",
                       "load the kernel and start it anew, stopped at its first instruction", ""},
    MonitorCommandInfo{MonitorCommand::quit, "quit", "", "end the run", ""},
};

std::vector<std::string> words_of(std::string_view line) {
    constexpr std::string_view blanks = " \t\r\n";
    std::vector<std::string> words;
    for (std::size_t at = line.find_first_not_of(blanks); at != std::string_view::npos;) {
        const std::size_t end = std::min(line.find_first_of(blanks, at), line.size());
        words.emplace_back(line.substr(at, end - at));
        at = line.find_first_not_of(blanks, end);
    }
    return words;
}

/// The command of this name, or those that begin so.
std::vector<const MonitorCommandInfo*> candidates(std::string_view name) {
    std::vector<const MonitorCommandInfo*> found;
    for (const MonitorCommandInfo& info : commands) {
        if (info.name == name)
            return {&info};
        if (info.name.starts_with(name))
            found.push_back(&info);
    }
    return found;
}

/// How many letters must be changed, added or left out (Levenshtein).
std::size_t distance(std::string_view from, std::string_view to) {
    std::vector<std::size_t> row(to.size() + 1);
    for (std::size_t i = 0; i < row.size(); ++i)
        row[i] = i;
    for (std::size_t i = 0; i < from.size(); ++i) {
        std::size_t diagonal = std::exchange(row[0], i + 1);
        for (std::size_t j = 0; j < to.size(); ++j) {
            const std::size_t changed = diagonal + (from[i] == to[j] ? 0 : 1);
            diagonal = row[j + 1];
            row[j + 1] = std::min({changed, row[j] + 1, diagonal + 1});
        }
    }
    return row.back();
}

/// What to say of a name that has none, or several, of `candidates`.
std::string not_one(std::string_view name, std::span<const MonitorCommandInfo* const> found) {
    if (!found.empty()) {
        std::vector<std::string_view> names;
        for (const MonitorCommandInfo* info : found)
            names.push_back(info->name);
        return fmt::format("'{}' could be {}\n", name, fmt::join(names, ", "));
    }
    constexpr std::size_t near = 2;
    const auto away = [name](const MonitorCommandInfo& info) { return distance(name, info.name); };
    const MonitorCommandInfo& nearest = *std::ranges::min_element(commands, {}, away);
    if (away(nearest) <= near && away(nearest) < std::min(name.size(), nearest.name.size()))
        return fmt::format("'{}' is no command of umbra's; did you mean {}?\n", name, nearest.name);
    return fmt::format("'{}' is no command of umbra's: see monitor help\n", name);
}

/// A number, or the address of a function.
std::optional<std::uint64_t> parse_term(std::string_view text, const Symbols& symbols) {
    const bool hexadecimal = text.starts_with("0x") || text.starts_with("0X");
    const std::string_view digits = hexadecimal ? text.substr(2) : text;
    std::uint64_t value = 0;
    const auto parsed =
        std::from_chars(digits.data(), digits.data() + digits.size(), value, hexadecimal ? 16 : 10);
    if (parsed.ec == std::errc() && parsed.ptr == digits.data() + digits.size())
        return value;
    if (const auto function = symbols.function(text))
        return function->start.value();
    return std::nullopt;
}

} // namespace

const MonitorCommandInfo& monitor_command_info(MonitorCommand command) {
    return *std::ranges::find(commands, command, &MonitorCommandInfo::command);
}

std::variant<ParsedCommand, std::string> parse_monitor_command(std::string_view line) {
    std::vector<std::string> words = words_of(line);
    if (words.empty())
        return ParsedCommand{MonitorCommand::help, {}};
    const auto found = candidates(words[0]);
    if (found.size() != 1)
        return not_one(words[0], found);
    words.erase(words.begin());
    return ParsedCommand{found.front()->command, std::move(words)};
}

std::string monitor_help(std::span<const std::string> words) {
    if (!words.empty()) {
        const auto found = candidates(words[0]);
        if (found.size() != 1)
            return not_one(words[0], found);
        const MonitorCommandInfo& info = *found.front();
        return fmt::format("monitor {}{}{}: {}\n{}", info.name, info.arguments.empty() ? "" : " ",
                           info.arguments, info.summary, info.detail);
    }
    std::string text;
    for (const MonitorCommandInfo& info : commands)
        text += fmt::format("{:<50} {}\n", fmt::format("{} {}", info.name, info.arguments), info.summary);
    return text +
           "Addresses: 0x1000, 4096, main, main+16. A command's beginning will do if no other begins so.\n";
}

std::optional<std::uint64_t> parse_number(std::string_view text, const Symbols& symbols) {
    if (const auto term = parse_term(text, symbols))
        return term; // also a name that has a plus in it
    const std::size_t plus = text.rfind('+');
    if (plus == std::string_view::npos)
        return std::nullopt;
    const auto left = parse_term(text.substr(0, plus), symbols);
    const auto right = parse_term(text.substr(plus + 1), symbols);
    if (!left || !right || *left + *right < *left)
        return std::nullopt;
    return *left + *right;
}

} // namespace umbra
