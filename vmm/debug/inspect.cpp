#include "vmm/debug/inspect.hpp"

#include "vmm/debug/mapped_ranges.hpp"
#include "vmm/report.hpp"

#include <algorithm>
#include <array>
#include <optional>

#include <fmt/core.h>

namespace umbra {
namespace {

constexpr Access looking{.ac = true};
constexpr std::size_t most_pages = 16'384; ///< looked up in the shadow for one answer

std::string size_text(std::uint64_t bytes) {
    constexpr std::uint64_t kb = 1 << 10, mb = 1 << 20, gb = 1 << 30;
    if (bytes % gb == 0)
        return fmt::format("{} GB", bytes / gb);
    if (bytes % mb == 0)
        return fmt::format("{} MB", bytes / mb);
    return fmt::format("{} KB", bytes / kb);
}

std::string rights_of(const MappedRange& range) {
    return fmt::format("{}{}{}{}", range.user ? 'U' : '-', range.writable ? 'W' : '-',
                       range.executable ? 'X' : '-', range.global ? 'G' : '-');
}

/// What the machine's tables make of an address now.
struct ShadowPage {
    std::uint64_t size = page_size; ///< that one entry maps, or does not
    bool present = false;
    bool writable = true;
    bool executable = true;
    MachinePhys target; ///< of the page

    bool operator==(const ShadowPage&) const = default;
};

ShadowPage shadow_page(Mmu& mmu, GuestVirt at, bool user) {
    ShadowPage page;
    for (const auto& step : mmu.shadow_walk(at, user)) {
        page.size = step.level->span();
        page.writable &= step.entry.writable();
        page.executable &= !step.entry.no_execute();
        if (step.entry.present() && step.entry.leaf(*step.level)) {
            page.present = true;
            page.target = step.entry.page(*step.level).base();
        }
    }
    return page;
}

/// How many 4 KB pages of the range the shadow holds, for the guest's kernel or its programs. Nothing if
/// `budget`, in look-ups, runs out.
std::optional<std::uint64_t> held_pages(Mmu& mmu, const MappedRange& range, std::size_t& budget) {
    std::uint64_t held = 0;
    for (std::uint64_t done = 0; done < range.size;) {
        if (budget-- == 0) {
            budget = 0;
            return std::nullopt;
        }
        const GuestVirt here = range.start + done;
        const ShadowPage page = shadow_page(mmu, here, range.user);
        const std::uint64_t rest = page.size - (here.value() & (page.size - 1));
        const std::uint64_t length = std::min(rest, range.size - done);
        if (page.present)
            held += length >> page_shift;
        done += length;
    }
    return held;
}

std::string guest_maps(const InspectInput& input) {
    const MappedRanges mapped = guest_ranges(input.memory, input.paging);
    std::string text = fmt::format("{:>18} {:>18}  {:>8}  {:4} {:>6}  {:18} {}\n", "from", "to", "size",
                                   "UWXG", "pages", "physical", "in the shadow");
    std::size_t budget = most_pages;
    for (const MappedRange& range : mapped.ranges) {
        const auto held = held_pages(input.mmu, range, budget);
        const std::uint64_t pages = range.size >> page_shift;
        text += fmt::format("{:#018x} {:#018x}  {:>8}  {} {:>6}  {:#018x} {}\n", range.start.value(),
                            (range.start + (range.size - 1)).value(), size_text(range.size), rights_of(range),
                            size_text(range.page_bytes), range.physical.value(),
                            !held            ? "not looked up"
                            : *held == pages ? "all"
                            : *held == 0     ? "nothing yet"
                                             : fmt::format("{} of {} pages", *held, pages));
    }
    if (mapped.ranges.empty())
        text += "nothing is mapped\n";
    if (mapped.truncated)
        text += "... and more: the tables map more than is listed\n";
    return text;
}

/// What the machine's tables map of what the guest's do.
std::string shadow_maps(const InspectInput& input) {
    const MappedRanges mapped = guest_ranges(input.memory, input.paging);
    std::string text;
    std::size_t budget = most_pages;
    for (const bool user : {false, true}) {
        text += fmt::format("for the guest's {}:\n", user ? "programs" : "kernel");
        text += fmt::format("  {:>18} {:>18}  {:>8}  {:2}  {}\n", "from", "to", "size", "WX", "physical");
        struct Run {
            GuestVirt start;
            std::uint64_t size = 0;
            ShadowPage page;
        };
        std::optional<Run> run;
        const auto tell = [&] {
            if (run)
                text += fmt::format("  {:#018x} {:#018x}  {:>8}  {}{}  {:#018x}\n", run->start.value(),
                                    (run->start + (run->size - 1)).value(), size_text(run->size),
                                    run->page.writable ? 'W' : '-', run->page.executable ? 'X' : '-',
                                    run->page.target.value());
            run.reset();
        };
        for (const MappedRange& range : mapped.ranges) {
            for (std::uint64_t done = 0; done < range.size && budget != 0; --budget) {
                const GuestVirt here = range.start + done;
                ShadowPage page = shadow_page(input.mmu, here, user);
                const std::uint64_t inside = here.value() & (page.size - 1);
                const std::uint64_t length = std::min(page.size - inside, range.size - done);
                page.target = page.target + inside;
                done += length;
                const bool goes_on = run && page.present && here - run->start == run->size &&
                                     page.target - run->page.target == run->size &&
                                     page.writable == run->page.writable &&
                                     page.executable == run->page.executable;
                if (goes_on) {
                    run->size += length;
                    continue;
                }
                tell();
                if (page.present)
                    run = Run{here, length, page};
            }
        }
        tell();
    }
    if (budget == 0 || mapped.truncated)
        text += "... and more: not everything was looked up\n";
    return text;
}

/// Why the shadow's leaf is not what the guest's is.
std::string difference(const InspectInput& input, const GuestWalk& walk, const ShadowPage& shadow) {
    if (walk.fault)
        return shadow.present ? "the shadow still has what the guest has not invalidated\n" : "";
    if (!shadow.present)
        return "not in the shadow: the guest has not used it since the last change there, or it is guarded\n";
    const std::uint64_t offset = walk.address.value() & (shadow.size - 1);
    std::string text;
    if (input.memory.contains(walk.address, 1) && shadow.target.value() + offset != walk.address.value())
        text += "the shadow still leads where the guest's entry led before\n";
    const bool writable = walk.writable || !input.paging.write_protect;
    if (writable && !shadow.writable)
        text += walk.depth != 0 && !walk.leaf().entry.has(entry_bit::dirty)
                    ? "read-only in the shadow: the page is clean, and its first write sets the dirty bit\n"
                    : "read-only in the shadow: a page table is in it, or a guard on it\n";
    if (!walk.no_execute && !shadow.executable)
        text += "not executable in the shadow: the page is the guest's programs', or guarded\n";
    if (walk.depth != 0 && shadow.size < walk.leaf().level->span())
        text += "a large page, in pieces in the shadow\n";
    return text;
}

} // namespace

std::string inspect_translation(const InspectInput& input, GuestVirt at) {
    if (!input.paging.format->canonical(at))
        return fmt::format("{} is not canonical: no translation, but #GP or #SS\n", at);
    const bool user = input.cpu.cpl == 3;
    const GuestWalk walk = walk_guest(input.memory, input.paging, at, looking);
    const auto shadow = input.mmu.shadow_walk(at, user);
    std::string text = fmt::format("{:6} {:34}  {:34}\n", "", "guest",
                                   fmt::format("shadow, for the guest's {}", user ? "programs" : "kernel"));
    for (unsigned level = 5; level > 0; --level) {
        const auto guest_steps = walk.visited();
        const auto guest_step = std::ranges::find_if(
            guest_steps, [level](const GuestWalk::Step& step) { return step.level->number == level; });
        const auto shadow_step = std::ranges::find_if(
            shadow, [level](const WalkStep<MachinePhysSpace>& step) { return step.level->number == level; });
        const bool in_guest = guest_step != guest_steps.end(), in_shadow = shadow_step != shadow.end();
        if (!in_guest && !in_shadow)
            continue;
        const auto side = [](const auto& entry, const Level& its_level) {
            return fmt::format("{:016x}  {:16}", entry.raw(), entry_flags(entry, its_level));
        };
        std::string line = fmt::format(
            "{:6} {:34}  {:34}", in_guest ? guest_step->level->name : shadow_step->level->name,
            in_guest ? side(guest_step->entry, *guest_step->level) : std::string(walk.depth == 0 ? "" : "-"),
            in_shadow ? side(shadow_step->entry, *shadow_step->level) : std::string("-"));
        if (in_guest)
            line += fmt::format("  at {}", guest_step->slot);
        text += line + "\n";
    }
    if (walk.depth == 0)
        text += "paging is off: the address is physical\n";
    if (walk.fault)
        text += fmt::format("not mapped: {}\n", why_faulted(input.memory, input.paging, walk, looking));
    else
        text += fmt::format("{} -> {}, {}{}\n", at, walk.address,
                            input.memory.contains(walk.address, 1) ? "RAM" : "not RAM",
                            walk.depth == 0 ? "" : "; " + rights(walk, input.paging));
    return text + difference(input, walk, shadow_page(input.mmu, at, user));
}

std::string inspect_maps(const InspectInput& input, MapsOf what) {
    return what == MapsOf::guest ? guest_maps(input) : shadow_maps(input);
}

std::string inspect_vtop(const InspectInput& input, GuestVirt at) {
    if (!input.paging.format->canonical(at))
        return fmt::format("{} is not canonical\n", at);
    const GuestWalk walk = walk_guest(input.memory, input.paging, at, looking);
    if (walk.fault)
        return fmt::format("{} is not mapped: {}\n", at,
                           why_faulted(input.memory, input.paging, walk, looking));
    if (walk.depth == 0)
        return fmt::format("{} -> {} (paging is off)\n", at, walk.address);
    return fmt::format("{} -> {}{}, in a page of {}; {}\n", at, walk.address,
                       input.memory.contains(walk.address, 1) ? "" : ", which is not RAM",
                       size_text(walk.leaf().level->span()), rights(walk, input.paging));
}

std::string inspect_ptov(const InspectInput& input, GuestPhys at) {
    const MappedRanges mapped = guest_ranges(input.memory, input.paging);
    std::string text;
    for (const MappedRange& range : mapped.ranges) {
        if (at - range.physical < range.size)
            text += fmt::format("{} <- {}  {}\n", at, range.start + (at - range.physical), rights_of(range));
    }
    if (text.empty())
        text = fmt::format("{} is not mapped in this address space\n", at);
    if (mapped.truncated)
        text += "... or elsewhere: the tables map more than was looked at\n";
    return text;
}

namespace {

ReportInput report_input(const InspectInput& input) {
    return {.why = {},
            .cpu = input.cpu,
            .memory = input.memory,
            .paging = input.paging,
            .log = input.log,
            .symbols = input.symbols,
            .shadow = {},
            .ticks_per_us = input.ticks_per_us};
}

} // namespace

std::string inspect_traps(const InspectInput& input, std::size_t count) {
    const std::string text = report_traps(report_input(input), count);
    return text.empty() ? "no traps yet\n" : text.substr(text.find_first_not_of('\n'));
}

std::string inspect_registers(const InspectInput& input) {
    const std::string text = report_registers(report_input(input));
    return text.substr(text.find_first_not_of('\n'));
}

} // namespace umbra
