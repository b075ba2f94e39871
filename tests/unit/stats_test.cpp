// Unit tests of vmm/stats.hpp.
#include "vmm/stats.hpp"

#include <algorithm>
#include <sstream>
#include <string_view>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

using nlohmann::json;

void add(TrapLog& log, TrapReason reason, TrapAction action, std::uint64_t count, std::uint64_t cycles) {
    TrapRecord record;
    record.start = 5000;
    record.end = 5000 + cycles;
    record.reason = reason;
    record.action = action;
    for (std::uint64_t i = 0; i < count; ++i)
        log.add(record);
}

TrapLog some_traps() {
    TrapLog log;
    add(log, TrapReason::page_fault, TrapAction::fill, 30, 2000);
    add(log, TrapReason::exception, TrapAction::deliver, 10, 1000);
    add(log, TrapReason::port_write, TrapAction::device, 1, 930'000);
    return log;
}

constexpr double rate = 1000; // ticks in a microsecond

Stats shadow_stats() {
    Stats stats = gather_stats(some_traps(), nullptr, {1, 22, 333, 4444}, 43, 2.0, rate);
    Stats::Shadow shadow;
    shadow.counters.fills = 1001;
    shadow.counters.upgrades = 1002;
    shadow.counters.guest_faults = 1003;
    shadow.counters.flushes = 1004;
    shadow.counters.invalidations = 1005;
    shadow.counters.tables_compared = 1006;
    shadow.counters.tables_changed = 1007;
    shadow.counters.entries_dropped = 1008;
    shadow.counters.tables_built = 1009;
    shadow.counters.tables_reused = 1010;
    shadow.counters.tables_recycled = 1011;
    shadow.counters.slot_moves = 1012;
    shadow.counters.prefetched = 1013;
    shadow.counters.tables_protected = 1014;
    shadow.counters.table_writes = 1015;
    shadow.counters.splits = 1016;
    shadow.counters.merges = 1017;
    shadow.pages_in_use = 10;
    shadow.pages_high_water = 20;
    shadow.pages_capacity = 512;
    stats.shadow = shadow;
    return stats;
}

/// The line of `text` that begins with `begin`, its words one space apart.
std::string line_of(const std::string& text, std::string_view begin) {
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::string joined;
        for (std::string word; words >> word;)
            joined += joined.empty() ? word : ' ' + word;
        if (joined.starts_with(begin))
            return joined;
    }
    return {};
}

TEST(Stats, GathersWhatHappenedMostTimeFirst) {
    const Stats stats = gather_stats(some_traps(), nullptr, {1, 2, 3, 4}, 43, 2.0, rate);
    EXPECT_EQ(stats.wall_seconds, 2.0);
    EXPECT_EQ(stats.exits, 43U);
    EXPECT_EQ(stats.unclaimed, (UnclaimedAccesses{1, 2, 3, 4}));
    EXPECT_FALSE(stats.shadow);
    ASSERT_EQ(stats.traps.size(), 3U);
    EXPECT_EQ(stats.traps[0].reason, TrapReason::port_write);
    EXPECT_EQ(stats.traps[0].action, TrapAction::device);
    EXPECT_EQ(stats.traps[0].count, 1U);
    EXPECT_DOUBLE_EQ(stats.traps[0].microseconds, 930);
    EXPECT_EQ(stats.traps[1].reason, TrapReason::page_fault);
    EXPECT_EQ(stats.traps[1].count, 30U);
    EXPECT_DOUBLE_EQ(stats.traps[1].microseconds, 60);
    EXPECT_EQ(stats.traps[2].reason, TrapReason::exception);
    EXPECT_DOUBLE_EQ(stats.traps[2].microseconds, 10);
}

TEST(Stats, TakesTheShadowMmusNumbers) {
    std::vector<std::byte> ram(16 * page_size);
    const GuestMemory memory({{GuestPhys(0), ram}});
    std::vector<std::uint64_t> tables(64 * entries_per_table + entries_per_table);
    void* start = tables.data();
    std::size_t space = tables.size() * sizeof(std::uint64_t);
    ASSERT_NE(std::align(page_size, 64 * page_size, start, space), nullptr);
    TablePool pool(MachineFrame(0x1000), {static_cast<std::byte*>(start), 64 * page_size});
    ShadowTables shadows(memory, pool, {}, ShadowEntry());
    Mmu mmu(shadows);
    GuestPaging paging;
    paging.root = GuestFrame(1); // empty tables: every access is the guest's fault
    mmu.set_paging(paging);
    mmu.enter(false).debt.paid();
    (void)mmu.fault(GuestVirt(0x1234), {});
    mmu.flush();

    const Stats stats = gather_stats({}, &mmu, {}, 0, 1.0, rate);
    ASSERT_TRUE(stats.shadow);
    EXPECT_EQ(stats.shadow->counters.guest_faults, 1U);
    EXPECT_EQ(stats.shadow->counters.flushes, 1U);
    EXPECT_EQ(stats.shadow->pages_capacity, 64U);
    EXPECT_EQ(stats.shadow->pages_in_use, pool.in_use());
    EXPECT_GE(stats.shadow->pages_high_water, 1U);
}

TEST(StatsText, TableOfTraps) {
    const std::string text = stats_text(shadow_stats());
    EXPECT_EQ(line_of(text, "run:"),
              "run: 2.000 s, of which 0.001 s in umbra for 41 traps (0.1 %); 43 exits");
    EXPECT_EQ(line_of(text, "port_write"), "port_write device 1 2.4 % 930.00 0.930 93.0 %");
    EXPECT_EQ(line_of(text, "page_fault"), "page_fault fill 30 73.2 % 2.00 0.060 6.0 %");
    EXPECT_EQ(line_of(text, "exception"), "exception deliver 10 24.4 % 1.00 0.010 1.0 %");
    EXPECT_EQ(line_of(text, "syscall"), "") << "what did not happen is not told";
}

TEST(StatsText, ShadowAndUnclaimed) {
    const std::string text = stats_text(shadow_stats());
    EXPECT_TRUE(line_of(text, "fills").starts_with("fills 1001 "));
    EXPECT_TRUE(line_of(text, "slot_moves").starts_with("slot_moves 1012 "));
    EXPECT_EQ(line_of(text, "shadow tables:"), "shadow tables: 40 KB in use, 80 KB at most, of 2048 KB");
    EXPECT_EQ(line_of(text, "accesses"),
              "accesses that no device answered: 1 port reads, 22 port writes, 333 "
              "memory reads, 4444 memory writes");
}

TEST(StatsText, IsNarrowPlainAscii) {
    std::istringstream lines(stats_text(shadow_stats()));
    for (std::string line; std::getline(lines, line);) {
        EXPECT_LE(line.size(), 100U) << line;
        EXPECT_TRUE(std::ranges::all_of(line, [](char c) { return c >= ' ' && c <= '~'; })) << line;
        EXPECT_FALSE(line.ends_with(' ')) << line;
    }
}

TEST(StatsText, WithoutShadowTables) {
    const std::string text = stats_text(gather_stats(some_traps(), nullptr, {}, 0, 1.0, rate));
    EXPECT_EQ(text.find("shadow"), std::string::npos);
    EXPECT_NE(text.find("port_write"), std::string::npos);
}

TEST(StatsText, OfARunWithoutAnything) {
    const std::string text = stats_text({});
    EXPECT_EQ(line_of(text, "run:"), "run: 0.000 s, of which 0.000 s in umbra for 0 traps (0.0 %); 0 exits");
    EXPECT_EQ(text.find("nan"), std::string::npos);
}

TEST(StatsJson, HasTheDocumentedKeys) {
    const json parsed = json::parse(stats_json(shadow_stats()));
    EXPECT_EQ(parsed.at("wall_seconds"), 2.0);
    EXPECT_EQ(parsed.at("exits"), 43);
    EXPECT_EQ(parsed.at("traps").at("count"), 41);
    EXPECT_DOUBLE_EQ(parsed.at("traps").at("microseconds").get<double>(), 1000);
    EXPECT_EQ(parsed.at("traps").at("by_reason").at(1),
              (json{{"reason", "page_fault"}, {"action", "fill"}, {"count", 30}, {"microseconds", 60.0}}));
    EXPECT_EQ(parsed.at("shadow"),
              (json{{"fills", 1001},
                    {"upgrades", 1002},
                    {"guest_faults", 1003},
                    {"flushes", 1004},
                    {"invalidations", 1005},
                    {"tables_compared", 1006},
                    {"tables_changed", 1007},
                    {"entries_dropped", 1008},
                    {"tables_built", 1009},
                    {"tables_reused", 1010},
                    {"tables_recycled", 1011},
                    {"slot_moves", 1012},
                    {"prefetched", 1013},
                    {"tables_protected", 1014},
                    {"table_writes", 1015},
                    {"splits", 1016},
                    {"merges", 1017},
                    {"table_pages", {{"in_use", 10}, {"high_water", 20}, {"capacity", 512}}}}));
    EXPECT_EQ(parsed.at("unclaimed_accesses"),
              (json{{"port_reads", 1}, {"port_writes", 22}, {"mmio_reads", 333}, {"mmio_writes", 4444}}));
    EXPECT_EQ(parsed.at("instructions"), json::object());
    EXPECT_EQ(parsed.at("instructions_ahead"), 0);
    EXPECT_EQ(parsed.size(), 7U);
}

TEST(StatsInstructions, AreCountedByName) {
    static constexpr const char* cli = "cli";
    static constexpr const char* hlt = "hlt";
    TrapLog log;
    for (const char* mnemonic : {hlt, cli, cli}) {
        TrapRecord record;
        record.reason = TrapReason::instruction;
        record.instruction = mnemonic;
        log.add(record);
        log.count_ahead();
    }
    const Stats stats = gather_stats(log, nullptr, {}, 0, 1, 1);
    EXPECT_EQ(json::parse(stats_json(stats)).at("instructions_ahead"), 3);
    EXPECT_EQ(json::parse(stats_json(stats)).at("instructions"), (json{{"cli", 2}, {"hlt", 1}}));
    const std::string text = stats_text(stats);
    EXPECT_LT(text.find("cli"), text.find("hlt")); // the most frequent first
    EXPECT_NE(text.find("hlt"), std::string::npos);
}

TEST(StatsJson, WithoutShadowTablesOrTraps) {
    const json parsed = json::parse(stats_json({}));
    EXPECT_FALSE(parsed.contains("shadow"));
    EXPECT_EQ(parsed.at("traps").at("by_reason"), json::array());
    EXPECT_EQ(parsed.at("traps").at("count"), 0);
}

} // namespace
} // namespace umbra
