// What gdb's `monitor` commands do: those that only look are vmm/debug/inspect.hpp's.
#include "vmm/debug/core_file.hpp"
#include "vmm/debug/inspect.hpp"
#include "vmm/debug/monitor_command.hpp"
#include "vmm/debug/session.hpp"
#include "vmm/machine.hpp"
#include "vmm/stats.hpp"

#include <algorithm>
#include <charconv>

#include <fmt/core.h>

namespace umbra {
namespace {

using Words = std::span<const std::string>;

/// The exceptions by their mnemonics (Intel SDM vol. 3A, table 6-1).
struct ExceptionName {
    std::string_view name;
    Vector vector;
};
constexpr ExceptionName exception_names[] = {
    {"de", Vector::divide_error},
    {"db", Vector::debug},
    {"nmi", Vector::nmi},
    {"bp", Vector::breakpoint},
    {"of", Vector::overflow},
    {"br", Vector::bound},
    {"ud", Vector::invalid_opcode},
    {"nm", Vector::device_not_available},
    {"df", Vector::double_fault},
    {"ts", Vector::invalid_tss},
    {"np", Vector::segment_not_present},
    {"ss", Vector::stack_fault},
    {"gp", Vector::general_protection},
    {"pf", Vector::page_fault},
    {"mf", Vector::x87},
    {"ac", Vector::alignment_check},
    {"mc", Vector::machine_check},
    {"xm", Vector::simd},
};

/// The number that a word is, if it is there.
std::optional<std::uint64_t> number_at(Words words, std::size_t index, const Symbols& symbols) {
    if (index >= words.size())
        return std::nullopt;
    return parse_number(words[index], symbols);
}

std::string missing(std::string_view what, MonitorCommand command) {
    return fmt::format("{}: see monitor help {}\n", what, monitor_command_info(command).name);
}

/// "on" or "off".
std::optional<bool> parse_switch(Words words) {
    if (words.size() != 1 || (words[0] != "on" && words[0] != "off"))
        return std::nullopt;
    return words[0] == "on";
}

std::string describe(const Catches& catches) {
    std::string text;
    for (const std::uint8_t vector : catches.vectors) {
        const auto* known =
            std::ranges::find(exception_names, static_cast<Vector>(vector), &ExceptionName::vector);
        text += known != std::end(exception_names) ? fmt::format(" {}", known->name)
                                                   : fmt::format(" vector={}", vector);
    }
    if (catches.cr3)
        text += " cr3";
    if (catches.any_msr)
        text += " msr";
    for (const std::uint32_t index : catches.msrs)
        text += fmt::format(" msr={:#x}", index);
    return fmt::format("caught:{}\n",
                       text.empty() ? " nothing (a guest that cannot go on always stays)" : text);
}

/// Adds or takes away the event of this name; false if there is none.
bool change(Catches& catches, std::string_view name, bool add, const Symbols& symbols) {
    const auto* known = std::ranges::find(exception_names, name, &ExceptionName::name);
    std::optional<std::uint64_t> number;
    if (const auto equals = name.find('='); equals != std::string_view::npos)
        number = parse_number(name.substr(equals + 1), symbols);
    if (known != std::end(exception_names) || (name.starts_with("vector=") && number && *number < 256)) {
        const auto vector =
            number ? static_cast<std::uint8_t>(*number) : static_cast<std::uint8_t>(known->vector);
        add ? void(catches.vectors.insert(vector)) : void(catches.vectors.erase(vector));
        return true;
    }
    if (name.starts_with("msr=") && number && *number <= 0xffff'ffff) {
        const auto index = static_cast<std::uint32_t>(*number);
        add ? void(catches.msrs.insert(index)) : void(catches.msrs.erase(index));
        return true;
    }
    if (name == "msr") {
        catches.any_msr = add;
        if (!add)
            catches.msrs.clear();
        return true;
    }
    if (name == "cr3")
        catches.cr3 = add;
    return name == "cr3" || name == "triple";
}

std::optional<WatchKind> parse_watch_kind(std::string_view text) {
    if (text == "w")
        return WatchKind::write;
    if (text == "r")
        return WatchKind::read;
    if (text == "a")
        return WatchKind::access;
    return std::nullopt;
}

} // namespace

/// The answer to a `monitor` command: lines.
std::string GdbSession::command(std::string_view line) {
    const auto parsed = parse_monitor_command(line);
    if (const auto* problem = std::get_if<std::string>(&parsed))
        return *problem;
    const auto& [command, all_words] = std::get<ParsedCommand>(parsed);
    const Words words(all_words);
    const GuestPaging paging = engine_->paging();
    const InspectInput subject{.cpu = debugger_->cpu(),
                               .memory = debugger_->memory(),
                               .paging = paging,
                               .log = engine_->log(),
                               .symbols = symbols_,
                               .mmu = debugger_->mmu(),
                               .ticks_per_us = ticks_per_microsecond()};
    switch (command) {
    case MonitorCommand::help:
        return monitor_help(words);
    case MonitorCommand::pt:
        if (const auto at = number_at(words, 0, symbols_))
            return inspect_translation(subject, GuestVirt(*at));
        return missing("an address is wanted", command);
    case MonitorCommand::maps:
        if (words.empty() || words[0] == "guest")
            return inspect_maps(subject, MapsOf::guest);
        if (words[0] == "shadow")
            return inspect_maps(subject, MapsOf::shadow);
        return missing("guest or shadow is wanted", command);
    case MonitorCommand::vtop:
        if (const auto at = number_at(words, 0, symbols_))
            return inspect_vtop(subject, GuestVirt(*at));
        return missing("an address is wanted", command);
    case MonitorCommand::ptov:
        if (const auto at = number_at(words, 0, symbols_))
            return inspect_ptov(subject, GuestPhys(*at));
        return missing("a physical address is wanted", command);
    case MonitorCommand::traps: {
        constexpr std::uint64_t usual = 16;
        if (words.empty())
            return inspect_traps(subject, usual);
        const auto count = number_at(words, 0, symbols_);
        return count ? inspect_traps(subject, *count) : missing("a number is wanted", command);
    }
    case MonitorCommand::regs:
        return inspect_registers(subject);
    case MonitorCommand::stats: {
        const std::chrono::duration<double> since = std::chrono::steady_clock::now() - begun_;
        return stats_text(gather_stats(engine_->log(), &debugger_->mmu(), machine_->platform().unclaimed(),
                                       machine_->vcpu().exits(), since.count(), ticks_per_microsecond()));
    }
    case MonitorCommand::trace:
        return trace(words);
    case MonitorCommand::watch:
    case MonitorCommand::unwatch:
        return watch_physical(command, words);
    case MonitorCommand::hidden_breakpoints:
    case MonitorCommand::step_interrupts: {
        const auto on = parse_switch(words);
        if (!on)
            return missing("on or off is wanted", command);
        command == MonitorCommand::hidden_breakpoints ? debugger_->hide_breakpoints(*on)
                                                      : debugger_->step_into_interrupts(*on);
        return fmt::format("{}: {}\n", monitor_command_info(command).name, words[0]);
    }
    case MonitorCommand::catch_event:
    case MonitorCommand::uncatch: {
        Catches catches = debugger_->catches();
        const bool add = command == MonitorCommand::catch_event;
        for (const std::string& word : words) {
            if (!add && word == "all")
                catches = {};
            else if (!change(catches, word, add, symbols_))
                return missing(fmt::format("'{}' is no event", word), command);
        }
        debugger_->catches() = catches;
        return describe(catches);
    }
    case MonitorCommand::bind:
        return bind(words);
    case MonitorCommand::core: {
        if (words.size() != 1)
            return missing("a file is wanted", command);
        const ExtendedState state = extended();
        const auto problem = write_core(words[0], debugger_->cpu(), &state, debugger_->memory(), paging);
        return problem ? fmt::format("no core was written to '{}': {}\n", words[0], *problem)
                       : fmt::format("core written to '{}'\n", words[0]);
    }
    case MonitorCommand::reset:
        reset_asked_ = true;
        return "the guest starts anew\n";
    case MonitorCommand::quit:
        quit_asked_ = true;
        return "the run ends\n";
    }
    __builtin_unreachable();
}

/// trace on FILE | off
std::string GdbSession::trace(Words words) {
    TrapLog& log = engine_->log();
    if (words.size() == 1 && words[0] == "off")
        return log.finish_trace() ? "trace: off\n" : "trace: off, and incomplete: it could not be written\n";
    if (words.size() != 2 || words[0] != "on")
        return missing("on FILE or off is wanted", MonitorCommand::trace);
    (void)log.finish_trace();
    try {
        log.trace_to(words[1]);
    } catch (const StartupError& error) {
        return fmt::format("{}\n", error.what());
    }
    return fmt::format("trace: to '{}'\n", words[1]);
}

/// watch [phys ADDRESS LENGTH [w|r|a]], unwatch all | phys ADDRESS LENGTH [w|r|a]
std::string GdbSession::watch_physical(MonitorCommand command, Words words) {
    const bool add = command == MonitorCommand::watch;
    const auto list = [this] {
        std::string text;
        for (const Debugger::PhysicalWatch& watch : debugger_->physical_watches())
            text += fmt::format("  {} {} bytes, {}\n", watch.at, watch.size,
                                watch.kind == WatchKind::write  ? "writes"
                                : watch.kind == WatchKind::read ? "reads"
                                                                : "accesses");
        return text.empty() ? "no physical watchpoints\n" : "physical watchpoints:\n" + text;
    };
    if (words.empty() && add)
        return list();
    if (!add && words.size() == 1 && words[0] == "all") {
        for (const Debugger::PhysicalWatch& watch : debugger_->physical_watches())
            debugger_->unwatch(watch.kind, watch.at, watch.size);
        return list();
    }
    const auto at = number_at(words, 1, symbols_);
    const auto size = number_at(words, 2, symbols_);
    const auto kind = words.size() > 3 ? parse_watch_kind(words[3]) : WatchKind::write;
    if (words.empty() || words[0] != "phys" || !at || !size || !kind || words.size() > 4)
        return missing("phys ADDRESS LENGTH [w|r|a] is wanted", command);
    if (!add)
        debugger_->unwatch(*kind, GuestPhys(*at), *size);
    else if (!debugger_->watch(*kind, GuestPhys(*at), *size))
        return fmt::format("at most {} MB can be watched\n", Debugger::watch_limit >> 20);
    return list();
}

/// bind ADDRESS [current | CR3 | any]
std::string GdbSession::bind(Words words) {
    const auto at = number_at(words, 0, symbols_);
    const std::string space = words.size() > 1 ? words[1] : "current";
    const auto root = parse_number(space, symbols_);
    if (!at || words.size() > 2 || (space != "current" && space != "any" && !root))
        return missing("ADDRESS [current|CR3|any] is wanted", MonitorCommand::bind);
    if (space == "any") {
        debugger_->bind(GuestVirt(*at), std::nullopt);
        return fmt::format("{}: in all address spaces\n", GuestVirt(*at));
    }
    const GuestFrame frame = space == "current" ? engine_->paging().root : GuestPhys(*root).frame();
    debugger_->bind(GuestVirt(*at), frame);
    return fmt::format("{}: in the address space of CR3 {} only\n", GuestVirt(*at), frame.base());
}

} // namespace umbra
