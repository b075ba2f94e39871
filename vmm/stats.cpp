#include "vmm/stats.hpp"

#include <algorithm>
#include <array>
#include <string_view>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

/// A number of `Owner` as it is called, and explained to people.
template<class Owner>
struct Counter {
    std::uint64_t Owner::*value;
    std::string_view name;
    std::string_view meaning;
};

constexpr std::array<Counter<MmuCounters>, 17> mmu_counters{{
    {&MmuCounters::fills, "fills", "hidden page faults"},
    {&MmuCounters::upgrades, "upgrades", "entries given more rights, mostly for a clean page's first write"},
    {&MmuCounters::prefetched, "prefetched", "entries filled beside the one that was asked for"},
    {&MmuCounters::guest_faults, "guest_faults", "page faults that the guest's own tables ask for"},
    {&MmuCounters::flushes, "flushes", "CR3 loads and the like"},
    {&MmuCounters::invalidations, "invalidations", "INVLPG: single pages"},
    {&MmuCounters::tables_compared, "tables_compared", "guest tables looked through after a flush"},
    {&MmuCounters::tables_changed, "tables_changed", "of these: found changed"},
    {&MmuCounters::tables_protected, "tables_protected", "tables write-protected instead of compared"},
    {&MmuCounters::table_writes, "table_writes", "traps of writes to these"},
    {&MmuCounters::entries_dropped, "entries_dropped", "shadow entries that had to go for a change"},
    {&MmuCounters::tables_built, "tables_built", "shadow tables made"},
    {&MmuCounters::tables_reused, "tables_reused", "times that a table needed was there already"},
    {&MmuCounters::tables_recycled, "tables_recycled", "tables given up because the pool was full"},
    {&MmuCounters::splits, "splits", "large pages taken to pieces for a write-protected table in them"},
    {&MmuCounters::merges, "merges", "and put together again"},
    {&MmuCounters::slot_moves, "slot_moves", "moves of umbra's top-level slot out of the guest's way"},
}};
static_assert(sizeof(MmuCounters) == mmu_counters.size() * sizeof(std::uint64_t));

constexpr std::array<Counter<UnclaimedAccesses>, 4> unclaimed_counters{{
    {&UnclaimedAccesses::port_reads, "port_reads", ""},
    {&UnclaimedAccesses::port_writes, "port_writes", ""},
    {&UnclaimedAccesses::mmio_reads, "mmio_reads", ""},
    {&UnclaimedAccesses::mmio_writes, "mmio_writes", ""},
}};
static_assert(sizeof(UnclaimedAccesses) == unclaimed_counters.size() * sizeof(std::uint64_t));

Stats::Traps total(const Stats& stats) {
    Stats::Traps sum;
    for (const Stats::Traps& traps : stats.traps) {
        sum.count += traps.count;
        sum.microseconds += traps.microseconds;
    }
    return sum;
}

double percent(double part, double whole) {
    return whole > 0 ? 100 * part / whole : 0;
}

} // namespace

Stats gather_stats(const TrapLog& log, const Mmu* mmu, const UnclaimedAccesses& unclaimed,
                   std::uint64_t exits, double wall_seconds, double ticks_per_us) {
    Stats stats;
    stats.wall_seconds = wall_seconds;
    stats.exits = exits;
    stats.unclaimed = unclaimed;
    for (std::size_t reason = 0; reason < static_cast<std::size_t>(TrapReason::count_); ++reason) {
        for (std::size_t action = 0; action < static_cast<std::size_t>(TrapAction::count_); ++action) {
            Stats::Traps traps{static_cast<TrapReason>(reason), static_cast<TrapAction>(action)};
            const TrapLog::Total& sum = log.total(traps.reason, traps.action);
            if (sum.count == 0)
                continue;
            traps.count = sum.count;
            traps.microseconds = static_cast<double>(sum.cycles) / ticks_per_us;
            stats.traps.push_back(traps);
        }
    }
    std::ranges::stable_sort(stats.traps, std::ranges::greater(), &Stats::Traps::microseconds);
    stats.ahead = log.ahead();
    stats.instructions.assign(log.instructions().begin(), log.instructions().end());
    std::ranges::stable_sort(stats.instructions, std::ranges::greater(), &TrapLog::Instruction::count);
    if (mmu != nullptr)
        stats.shadow = {mmu->counters(), mmu->pool().in_use(), mmu->pool().high_water(),
                        mmu->pool().capacity()};
    return stats;
}

std::string stats_text(const Stats& stats) {
    std::string text;
    const auto line = [&text]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
        text += fmt::format(format, std::forward<Args>(args)...);
        text += '\n';
    };
    const Stats::Traps sum = total(stats);
    line("run: {:.3f} s, of which {:.3f} s in umbra for {} traps ({:.1f} %); {} exits", stats.wall_seconds,
         sum.microseconds / 1e6, sum.count, percent(sum.microseconds / 1e6, stats.wall_seconds), stats.exits);
    if (!stats.traps.empty())
        line("\n{:12}{:8}{:>12}{:>8}{:>12}{:>12}{:>8}", "trap", "action", "count", "share", "mean us",
             "total ms", "share");
    for (const Stats::Traps& traps : stats.traps)
        line("{:12}{:8}{:12}{:6.1f} %{:12.2f}{:12.3f}{:6.1f} %", name(traps.reason), name(traps.action),
             traps.count, percent(static_cast<double>(traps.count), static_cast<double>(sum.count)),
             traps.microseconds / static_cast<double>(traps.count), traps.microseconds / 1e3,
             percent(traps.microseconds, sum.microseconds));
    if (!stats.instructions.empty())
        line("\n{:20}{:>12}", "instruction", "count");
    for (const TrapLog::Instruction& instruction : stats.instructions)
        line("{:20}{:12}", instruction.mnemonic, instruction.count);
    if (stats.ahead != 0)
        line("{:20}{:12}  more, emulated behind these before they could trap", "", stats.ahead);
    if (stats.shadow) {
        line("\n{:20}{:>12}", "shadow MMU", "count");
        for (const auto& counter : mmu_counters)
            line("{:20}{:12}  {}", counter.name, stats.shadow->counters.*counter.value, counter.meaning);
        const auto kb = [](std::size_t pages) { return pages * page_size / 1024; };
        line("\nshadow tables: {} KB in use, {} KB at most, of {} KB", kb(stats.shadow->pages_in_use),
             kb(stats.shadow->pages_high_water), kb(stats.shadow->pages_capacity));
    }
    line("\naccesses that no device answered: {} port reads, {} port writes, {} memory reads, {} memory "
         "writes",
         stats.unclaimed.port_reads, stats.unclaimed.port_writes, stats.unclaimed.mmio_reads,
         stats.unclaimed.mmio_writes);
    return text;
}

std::string stats_json(const Stats& stats) {
    using Json = nlohmann::ordered_json;
    const Stats::Traps sum = total(stats);
    Json by_reason = Json::array();
    for (const Stats::Traps& traps : stats.traps)
        by_reason.push_back({{"reason", name(traps.reason)},
                             {"action", name(traps.action)},
                             {"count", traps.count},
                             {"microseconds", traps.microseconds}});
    Json json{
        {"wall_seconds", stats.wall_seconds},
        {"exits", stats.exits},
        {"traps", {{"count", sum.count}, {"microseconds", sum.microseconds}, {"by_reason", by_reason}}}};
    Json& instructions = json["instructions"] = Json::object();
    for (const TrapLog::Instruction& instruction : stats.instructions)
        instructions[instruction.mnemonic] = instruction.count;
    json["instructions_ahead"] = stats.ahead;
    if (stats.shadow) {
        Json& shadow = json["shadow"];
        for (const auto& counter : mmu_counters)
            shadow[std::string(counter.name)] = stats.shadow->counters.*counter.value;
        shadow["table_pages"] = {{"in_use", stats.shadow->pages_in_use},
                                 {"high_water", stats.shadow->pages_high_water},
                                 {"capacity", stats.shadow->pages_capacity}};
    }
    Json& unclaimed = json["unclaimed_accesses"];
    for (const auto& counter : unclaimed_counters)
        unclaimed[std::string(counter.name)] = stats.unclaimed.*counter.value;
    return json.dump(2) + "\n";
}

} // namespace umbra
