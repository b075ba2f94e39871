// Unit tests of shadow/shadow_tables.hpp: how tables keep up with the guest's writes (Sync), write
// protection, what goes when memory is short, and tables that several vCPUs share.
#include "tests/unit/mmu_machine.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <ostream>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace umbra::test {
namespace {

/// Where tests map a table of the guest for its kernel to write to.
constexpr GuestVirt view = kernel_at;
/// Frames for tables of the guest: in 2 MB and in 1 GB of RAM without a hole.
constexpr GuestFrame in_2mb{(4 * mb >> page_shift) + 7}, in_1gb{(FakeMachine::high >> page_shift) + 1234};
constexpr unsigned index_of_at = paging_4_level.level(1).index(at);

void flush(Machine& m, unsigned times = 1) {
    for (unsigned i = 0; i < times; ++i)
        m.load_cr3(m.root);
}

/// A TableWrite that can be compared and printed.
struct Shown {
    GuestPhys slot;
    unsigned level = 0;
    GuestEntry before, after;

    bool operator==(const Shown&) const = default;
    friend std::ostream& operator<<(std::ostream& out, const Shown& each) {
        return out << fmt::format("{} level {}: {:#x} -> {:#x}", each.slot, each.level, each.before.raw(),
                                  each.after.raw());
    }
};
std::vector<Shown> shown(const std::vector<TableWrite>& writes) {
    std::vector<Shown> result;
    for (const TableWrite& each : writes)
        result.push_back({each.slot, each.level, each.before, each.after});
    return result;
}

/// Flushes, after which a table that has been protected has no snapshot any more.
constexpr unsigned long_after = 6;

/// Maps `at`, lets its table lie in `table`, and maps that at `view`.
class Watched : public Machine {
  public:
    explicit Watched(const Options& options, GuestFrame table = in_2mb)
        : Machine(options), table_frame(table) {
        page = map_new(at);
        move_table(at, table);
        map(view, table, kernel_bits | d);
        read(at);
        read(view);
    }
    /// As the guest's kernel changes it.
    std::vector<TableWrite> change_mapping(GuestFrame to) {
        page = to;
        return store_at(view + std::uint64_t{index_of_at} * 8, GuestEntry(to, user_bits).raw());
    }
    /// Flushes until any more of the guest's tables are protected; how many it took.
    unsigned flushes_until_protected() {
        const std::uint64_t before = mmu.counters().tables_protected;
        for (unsigned count = 1; count < 5000; ++count) {
            flush(*this);
            if (mmu.counters().tables_protected != before)
                return count;
        }
        ADD_FAILURE() << "never";
        return 0;
    }
    GuestFrame page, table_frame;
};

// ---- When a table is protected

TEST(Sync, CompareProtectsNothing) {
    Watched m({.sync = Sync::compare});
    const std::uint64_t before = m.mmu.counters().tables_compared;
    flush(m, 300);
    EXPECT_EQ(m.mmu.counters().tables_protected, 0U);
    EXPECT_EQ(m.mmu.counters().tables_compared, before + 300 * 7) << "each table once for each flush";
}

TEST(Sync, EachTableIsComparedOnceForAFlushHoweverManyParentsItHas) {
    Machine m({.sync = Sync::compare});
    m.map_new(at);
    m.read(at);
    for (unsigned i = 1; i < 6; ++i) {
        m.set_entry(at + i * 2 * mb, m.entry(at, 2).raw(), 2);
        m.read(at + i * 2 * mb);
    }
    const std::uint64_t before = m.mmu.counters().tables_compared;
    flush(m);
    EXPECT_EQ(m.mmu.counters().tables_compared, before + 4);
}

TEST(Sync, ProtectWaitsForOneQuietComparison) {
    Watched m({.sync = Sync::protect});
    EXPECT_EQ(m.mmu.counters().tables_protected, 0U);
    m.map_new(neighbour); // changes one of the seven
    flush(m);
    EXPECT_EQ(m.mmu.counters().tables_protected, 6U);
    flush(m);
    EXPECT_EQ(m.mmu.counters().tables_protected, 7U);
}

TEST(Sync, TrapProtectsFromTheFirstUseOn) {
    Machine m({.sync = Sync::trap});
    m.map_new(at);
    m.read(at);
    EXPECT_EQ(m.mmu.counters().tables_protected, 4U);
}

TEST(Sync, AdaptiveProtectsWhenComparingHasCostAsMuchAsATrap) {
    for (const unsigned trap_cost : {1U, 10U, 57U}) {
        SCOPED_TRACE(trap_cost);
        Watched m({.sync = Sync::adaptive, .trap_cost = trap_cost});
        ASSERT_EQ(m.pool.in_use(), 7U);
        // The first time, all tables have to be looked through for mappings of those. That is put off until
        // comparing them has cost four comparisons of each table in use.
        EXPECT_EQ(m.flushes_until_protected(), trap_cost + 3);
        EXPECT_EQ(m.mmu.counters().tables_protected, 7U);
    }
}

TEST(Sync, ChangeStartsTheCountAgain) {
    // Before it has been quiet for long enough, and when it has and waits for its protection.
    for (const unsigned quiet : {9U, 12U}) {
        SCOPED_TRACE(quiet);
        Watched m({.sync = Sync::adaptive, .trap_cost = 10});
        flush(m, quiet);
        ASSERT_EQ(m.mmu.counters().tables_protected, 0U);
        m.change_mapping(m.new_frame());
        flush(m); // finds it
        EXPECT_EQ(quiet + 1 + m.flushes_until_protected(), 14U);
        EXPECT_EQ(m.mmu.counters().tables_protected, 6U);
        // Quiet for ten more; and, alone, 28 to pay for the search.
        EXPECT_EQ(14U + m.flushes_until_protected(), quiet + 1 + 10 + 27);
        EXPECT_EQ(m.mmu.counters().tables_protected, 7U);
    }
}

TEST(Sync, WriteUnprotectsAndDoublesThePatience) {
    Watched m({.sync = Sync::adaptive, .trap_cost = 10});
    m.flushes_until_protected();
    unsigned patience = 1;
    for (unsigned writes = 1; writes <= 8; ++writes) {
        SCOPED_TRACE(writes);
        EXPECT_TRUE(m.change_mapping(m.new_frame()).empty()) << "told to the caller with Sync::trap only";
        EXPECT_EQ(m.mmu.counters().table_writes, writes);
        EXPECT_EQ(m.misses(), 1U);
        m.change_mapping(m.new_frame());
        EXPECT_EQ(m.misses(), 0U) << "not protected any more";
        patience = std::min(patience * 2, 64U);
        EXPECT_EQ(m.flushes_until_protected(), 1 + 10 * patience) << "the first one finds the change";
    }
}

TEST(Sync, WriteThatChangesNothingIsAWriteToo) {
    Watched m({.sync = Sync::adaptive, .trap_cost = 10});
    m.flushes_until_protected();
    m.change_mapping(m.page); // but for the accessed bit, which is cleared
    m.flushes_until_protected();
    m.store_at(view, 0); // as it was
    EXPECT_EQ(m.mmu.counters().table_writes, 2U);
    EXPECT_EQ(m.flushes_until_protected(), 40U);
}

TEST(Sync, LongPeaceHalvesThePatience) {
    for (const bool long_peace : {false, true}) {
        SCOPED_TRACE(long_peace);
        Watched m({.sync = Sync::adaptive, .trap_cost = 10});
        m.flushes_until_protected();
        for (int i = 0; i < 2; ++i) {
            m.change_mapping(m.new_frame());
            m.flushes_until_protected();
        }
        // Patience is 4: protected after 40, so the peace is long after more than 160.
        flush(m, long_peace ? 161 : 160);
        m.change_mapping(m.new_frame());
        EXPECT_EQ(m.flushes_until_protected(), 1 + 10 * (long_peace ? 2U : 8U));
    }
    // Never less than once.
    Watched m({.sync = Sync::adaptive, .trap_cost = 10});
    m.flushes_until_protected();
    for (int i = 0; i < 2; ++i) {
        flush(m, 500);
        m.change_mapping(m.new_frame());
        EXPECT_EQ(m.flushes_until_protected(), 11U);
    }
}

// ---- What protection means

TEST(Protection, ProtectedTablesAreNotCompared) {
    for (const Sync sync : {Sync::protect, Sync::adaptive, Sync::trap}) {
        Watched m({.sync = sync});
        flush(m, 100);
        ASSERT_EQ(m.mmu.counters().tables_protected, 7U);
        const MmuCounters before = m.mmu.counters();
        flush(m, 50);
        m.invlpg(at);
        EXPECT_EQ(m.mmu.counters().tables_compared, before.tables_compared);
        EXPECT_EQ(m.read(at), mapped(m.page));
        EXPECT_EQ(m.misses(), 0U);
    }
}

TEST(Protection, OnlyTheTableThatIsWrittenToIsComparedAgain) {
    Watched m({.sync = Sync::adaptive, .trap_cost = 100});
    m.flushes_until_protected();
    m.change_mapping(m.new_frame());
    const std::uint64_t before = m.mmu.counters().tables_compared;
    flush(m, 10);
    EXPECT_EQ(m.mmu.counters().tables_compared, before + 10);
}

TEST(Protection, ChangesAreSeenAtTheNextFlush) {
    for (const Sync sync : {Sync::protect, Sync::adaptive, Sync::trap}) {
        for (const bool by_invlpg : {true, false}) {
            Watched m({.sync = sync});
            for (int i = 0; i < 5; ++i) {
                flush(m, 60);
                m.read(at);
                m.change_mapping(m.new_frame());
                by_invlpg ? m.invlpg(at) : flush(m);
                EXPECT_EQ(m.read(at), mapped(m.page));
                EXPECT_EQ(m.misses(), 1U);
                m.change_mapping(m.new_frame()); // with the table unprotected or just protected
                by_invlpg ? m.invlpg(at) : flush(m);
                EXPECT_EQ(m.read(at), mapped(m.page));
            }
        }
    }
}

TEST(Protection, OldTranslationStaysUntilTheFlush) {
    Watched m({.sync = Sync::protect});
    flush(m);
    const GuestFrame old = m.page;
    m.change_mapping(m.new_frame());
    EXPECT_EQ(m.read(at), mapped(old));
    EXPECT_EQ(m.misses(), 0U);
}

TEST(Protection, MarksByTheCpuAreNoWrites) {
    Watched m({.sync = Sync::protect});
    m.map_new(neighbour);
    flush(m, 2);
    ASSERT_EQ(m.mmu.counters().tables_protected, 7U);
    m.write(at);
    m.read(neighbour);
    EXPECT_TRUE(m.entry(at).dirty());
    EXPECT_TRUE(m.entry(neighbour).accessed());
    EXPECT_EQ(m.mmu.counters().table_writes, 0U);
    const std::uint64_t before = m.mmu.counters().tables_compared;
    flush(m);
    EXPECT_EQ(m.mmu.counters().tables_compared, before);
    // Marks that the guest clears are a change.
    m.store_at(view + std::uint64_t{index_of_at} * 8, m.entry(at).raw() & ~(a | d));
    EXPECT_EQ(m.mmu.counters().table_writes, 1U);
    flush(m);
    EXPECT_EQ(m.write(at), mapped(m.page));
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_TRUE(m.entry(at).has(a | d));
}

/// All that maps the frame: for the kernel, for programs, in a page of 2 MB and in one of 1 GB.
class Aliases : public ::testing::Test {
  public:
    static constexpr GuestVirt kernel = view, program = view + page_size, in_large = view + 8 * mb,
                               in_giant = view + 4 * gb;
    static constexpr std::uint64_t within_giant = (in_1gb.number() << page_shift) & (gb - 1),
                                   within_large = within_giant & (2 * mb - 1);

    static void map_aliases(Machine& m) {
        const GuestFrame gigabyte{FakeMachine::high >> page_shift};
        m.map(kernel, in_1gb, kernel_bits | d);
        m.map(program, in_1gb, user_bits | d);
        m.map(in_large, gigabyte + ((within_giant - within_large) >> page_shift), user_bits | d, 2);
        m.map(in_giant, gigabyte, user_bits | d, 3);
    }
    static void write_all(Machine& m) {
        for (const GuestVirt address : {kernel, program, in_large + within_large, in_giant + within_giant}) {
            EXPECT_EQ(m.write(address), mapped(in_1gb));
            m.finish_write();
        }
        m.set_user(true);
        EXPECT_EQ(m.write(program), mapped(in_1gb));
        m.finish_write();
        m.set_user(false);
    }
    static void expect_read_only(Machine& m) {
        for (const bool as_user : {false, true}) {
            m.set_user(as_user);
            for (const GuestVirt address :
                 {kernel, program, in_large + within_large, in_giant + within_giant}) {
                if (!as_user || address != kernel) {
                    EXPECT_EQ(m.read(address), mapped(in_1gb));
                }
                EXPECT_EQ(m.lookup(address, {.write = true}), std::nullopt) << address.value();
            }
        }
        m.set_user(false);
        const std::vector<ShadowSlot> slots = m.tables.mappings(in_1gb);
        EXPECT_GE(slots.size(), 4U);
        for (const ShadowSlot place : slots)
            EXPECT_FALSE(m.pool.entries(place.table)[place.slot].writable());
    }
};

TEST_F(Aliases, LoseTheRightToWriteWhenTheTableIsProtected) {
    Machine m({.sync = Sync::protect});
    map_aliases(m);
    m.map_new(at);
    m.move_table(at, in_1gb);
    m.read(at);
    write_all(m);
    write_all(m);
    ASSERT_EQ(m.misses(), 0U);
    ASSERT_EQ(m.mmu.counters().table_writes, 0U);
    flush(m, 2);
    EXPECT_EQ(m.mmu.counters().splits, 2U);
    expect_read_only(m);
    // The neighbours of a large page keep theirs.
    EXPECT_EQ(m.write(in_large + within_large + page_size), mapped(in_1gb + 1));
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.write(in_giant + within_giant + page_size), mapped(in_1gb + 1));
    EXPECT_LE(m.misses(), 1U);
    EXPECT_EQ(m.mmu.counters().table_writes, 0U);
    // One trap, by any of them, and all may write.
    EXPECT_EQ(m.write(in_giant + within_giant), mapped(in_1gb));
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_EQ(m.mmu.counters().table_writes, 1U);
    write_all(m);
    EXPECT_EQ(m.mmu.counters().table_writes, 1U);
}

TEST_F(Aliases, AreFilledReadOnlyWhileTheTableIsProtected) {
    for (const Sync sync : {Sync::protect, Sync::trap}) {
        Machine m({.sync = sync});
        m.map_new(at);
        m.move_table(at, in_1gb);
        m.read(at);
        flush(m, 3);
        map_aliases(m);
        const std::uint64_t before = m.mmu.counters().table_writes;
        expect_read_only(m);
        EXPECT_FALSE(m.shadow(in_large + within_large, 2).has(ps));
        EXPECT_FALSE(m.shadow(in_giant + within_giant, 3).has(ps));
        EXPECT_FALSE(m.shadow(in_giant + within_giant, 2).has(ps));
        EXPECT_EQ(m.mmu.counters().table_writes, before);
        EXPECT_EQ(m.write(in_large + within_large + page_size), mapped(in_1gb + 1));
        EXPECT_LE(m.misses(), 1U);
        EXPECT_EQ(m.mmu.counters().table_writes, before);
    }
}

TEST_F(Aliases, OfAPageThatBecomesATableLoseTheRightToWrite) {
    Machine m({.sync = Sync::trap});
    map_aliases(m);
    write_all(m);
    ASSERT_EQ(m.mmu.counters().table_writes, 0U);
    m.map_new(at);
    m.move_table(at, in_1gb);
    m.read(at);
    expect_read_only(m);
    write_all(m);
    EXPECT_EQ(m.mmu.counters().table_writes, 5U) << "each is shown";
    expect_read_only(m);
}

TEST(Protection, LargePageIsDroppedWhereTheresNoMemoryToSplitIt) {
    Watched m({.pool_pages = 16, .sync = Sync::protect});
    const GuestFrame first{4 * mb >> page_shift};
    m.map(view + 8 * mb, first, user_bits | d, 2);
    m.write(view + 8 * mb);
    for (unsigned i = 0; m.pool.in_use() < m.pool.capacity(); ++i) {
        m.map_new(view + 16 * mb + i * 2 * mb);
        m.read(view + 16 * mb + i * 2 * mb);
    }
    ASSERT_TRUE(m.shadow(view + 8 * mb, 2).has(ps));
    flush(m, 2);
    EXPECT_EQ(m.mmu.counters().splits, 1U);
    EXPECT_FALSE(m.shadow(view + 8 * mb, 2).present());
    EXPECT_EQ(m.mmu.counters().tables_recycled, 0U);
    EXPECT_EQ(m.write(view + 8 * mb), mapped(first));
    EXPECT_EQ(m.lookup(view + 8 * mb + 7 * page_size, {.write = true}), std::nullopt);
}

TEST(Protection, PiecesAreMergedAfterALongTimeWithoutAProtectedTable) {
    for (const bool executable : {true, false}) {
        Watched m({.sync = Sync::adaptive, .trap_cost = 400});
        const GuestFrame first{4 * mb >> page_shift};
        const GuestVirt address = view + 8 * mb;
        m.map(address, first, user_bits | d | (executable ? 0 : xd), 2);
        m.write(address);
        flush(m, 500);
        ASSERT_EQ(m.mmu.counters().splits, 1U);
        ASSERT_FALSE(m.shadow(address, 2).has(ps));
        m.change_mapping(m.new_frame());
        flush(m, 255);
        EXPECT_EQ(m.mmu.counters().merges, 0U);
        EXPECT_FALSE(m.shadow(address, 2).has(ps));
        flush(m);
        EXPECT_EQ(m.mmu.counters().merges, 1U);
        EXPECT_TRUE(m.shadow(address, 2).has(ps | rw));
        EXPECT_EQ(m.write(address + 0x12'3456), mapped(first, 0x12'3456));
        EXPECT_EQ(m.misses(), 0U);
        EXPECT_EQ(m.fetch(address), executable ? mapped(first) : fault(present | fetch));
        // Until the next time.
        flush(m, 1000);
        EXPECT_EQ(m.mmu.counters().splits, 2U);
        EXPECT_EQ(m.lookup(address + 7 * page_size, {.write = true}), std::nullopt);
    }
}

TEST(Protection, PiecesAreNotMergedOverAnotherProtectedTable) {
    Watched m({.sync = Sync::adaptive, .trap_cost = 400});
    const GuestFrame first{4 * mb >> page_shift};
    const GuestVirt address = view + 8 * mb;
    m.map(address, first, user_bits | d, 2);
    m.map_new(far);
    m.move_table(far, in_2mb + 1); // the same 2 MB
    m.read(far);
    m.write(address);
    flush(m, 600);
    ASSERT_EQ(m.mmu.counters().splits, 1U);
    m.change_mapping(m.new_frame());
    flush(m, 300);
    EXPECT_EQ(m.mmu.counters().merges, 0U);
    EXPECT_EQ(m.lookup(address + 8 * page_size, {.write = true}), std::nullopt);
    EXPECT_EQ(m.write(address + 7 * page_size), mapped(in_2mb));
}

TEST(Protection, PiecesAreNotMergedIfTheTableIsProtectedAgain) {
    Watched m({.sync = Sync::adaptive, .trap_cost = 100});
    const GuestVirt address = view + 8 * mb;
    m.map(address, GuestFrame(4 * mb >> page_shift), user_bits | d, 2);
    m.write(address);
    m.flushes_until_protected();
    ASSERT_EQ(m.mmu.counters().splits, 1U);
    m.change_mapping(m.new_frame());
    ASSERT_LT(m.flushes_until_protected(), 256U);
    flush(m, 300);
    EXPECT_EQ(m.mmu.counters().merges, 0U);
    EXPECT_EQ(m.lookup(address + 7 * page_size, {.write = true}), std::nullopt);
}

// ---- umbra's own writes

TEST(Wrote, UnprotectsWhereTheGuestsWriteWould) {
    Watched m({.sync = Sync::adaptive, .trap_cost = 10});
    m.flushes_until_protected();
    const GuestFrame changed = m.new_frame();
    const GuestPhys slot = m.slot(m.root, at);
    EXPECT_TRUE(m.tables.wrote(m.page.base(), page_size).empty()) << "no table";
    EXPECT_TRUE(m.tables.wrote(slot, 0).empty());
    EXPECT_EQ(m.mmu.counters().table_writes, 0U);
    ASSERT_TRUE(m.memory.write(slot, GuestEntry(changed, user_bits).raw()));
    EXPECT_TRUE(m.tables.wrote(slot, 8).empty());
    EXPECT_EQ(m.mmu.counters().table_writes, 1U);
    EXPECT_EQ(m.read(at), mapped(m.page));
    m.invlpg(at);
    EXPECT_EQ(m.read(at), mapped(changed));
}

TEST(Wrote, DropsWhatWasMadeFromTheEntriesAndNothingElse) {
    Watched m({.sync = Sync::protect});
    const GuestFrame beside = m.map_new(neighbour);
    m.read(neighbour);
    flush(m, long_after);
    ASSERT_TRUE(m.shadow(at).present());
    const GuestFrame changed = m.new_frame();
    m.store_by_umbra(m.slot(m.root, at), GuestEntry(changed, user_bits).raw());
    EXPECT_FALSE(m.shadow(at).present()) << "no snapshot tells what it was made from";
    flush(m);
    EXPECT_EQ(m.read(neighbour), mapped(beside));
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.read(at), mapped(changed));
    EXPECT_EQ(m.misses(), 1U);
    // From the middle of one entry to the middle of the next, one level up.
    flush(m, long_after);
    const GuestPhys slot = m.slot(m.root, at, 2);
    ASSERT_TRUE(m.shadow(at, 2).present());
    EXPECT_TRUE(m.tables.wrote(slot - 4, 4).empty());
    EXPECT_TRUE(m.shadow(at, 2).present());
    flush(m, long_after);
    EXPECT_TRUE(m.tables.wrote(slot - 4, 5).empty());
    EXPECT_FALSE(m.shadow(at, 2).present());
}

TEST(Wrote, SaysWhatHasChangedWhereWritesTrap) {
    Watched m({.sync = Sync::trap});
    const GuestFrame changed = m.new_frame();
    const GuestPhys slot = m.slot(m.root, at);
    const GuestEntry before = m.entry(at), after(changed, user_bits);
    EXPECT_TRUE(m.tables.wrote(slot, 8).empty()) << "nothing has changed";
    ASSERT_TRUE(m.memory.write(slot, after.raw()));
    EXPECT_TRUE(m.tables.wrote(slot, 0).empty());
    EXPECT_EQ(shown(m.tables.wrote(slot + 3, 1)), (std::vector<Shown>{{slot, 1, before, after}}));
    EXPECT_TRUE(m.tables.wrote(slot, 8).empty()) << "said already";
    m.enter();
    EXPECT_EQ(m.read(at), mapped(changed)) << "what was made from the old one is gone";
    EXPECT_EQ(m.lookup(view, {.write = true}), std::nullopt) << "still protected";
}

TEST(Wrote, ReachesEachFrameOfARange) {
    Machine m({.sync = Sync::trap});
    m.map_new(at);
    m.move_table(at, in_2mb);
    m.map_new(far);
    m.move_table(far, in_2mb + 1);
    m.read(at);
    m.read(far);
    const GuestPhys last = FakeMachine::slot_of(in_2mb, 511), first = FakeMachine::slot_of(in_2mb + 1, 0);
    ASSERT_TRUE(m.memory.write(last, std::uint64_t{0x1234'5067}));
    ASSERT_TRUE(m.memory.write(first, std::uint64_t{0x1234'6067}));
    const std::vector<Shown> wanted{{last, 1, GuestEntry(), GuestEntry(0x1234'5067)},
                                    {first, 1, GuestEntry(), GuestEntry(0x1234'6067)}};
    EXPECT_EQ(shown(m.tables.wrote(last + 4, 8)), wanted);
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
    ASSERT_TRUE(m.memory.write(first, std::uint64_t{0}));
    EXPECT_TRUE(m.tables.wrote(last, 8).empty()) << "up to the last byte, and not beyond";
    EXPECT_EQ(m.tables.wrote(last + 4, 5).size(), 1U);
}

// ---- Writes that are shown one by one

class Trapped : public ::testing::Test {
  public:
    Trapped() : m({.sync = Sync::trap}) {}
    static GuestVirt slot_view(unsigned index) { return view + std::uint64_t{index} * 8; }
    Watched m;
};

TEST_F(Trapped, WriteIsShownWithItsValues) {
    const GuestEntry before = m.entry(at);
    const GuestFrame changed = m.new_frame();
    const std::uint64_t traps = m.mmu.counters().table_writes;
    EXPECT_EQ(shown(m.change_mapping(changed)),
              (std::vector<Shown>{{m.slot(m.root, at), 1, before, GuestEntry(changed, user_bits)}}));
    EXPECT_EQ(m.mmu.counters().table_writes, traps + 1);
    EXPECT_EQ(m.read(at), mapped(changed)) << "dropped at once";
    EXPECT_EQ(m.change_mapping(m.new_frame()).size(), 1U) << "and the next one is shown too";
    EXPECT_FALSE(m.mmu.table_write_begun());
}

TEST_F(Trapped, MissSaysWhereTheWriteGoes) {
    m.mmu.left();
    const MissResult miss = m.mmu.fault(view + 0x123, {.write = true});
    EXPECT_EQ(miss.outcome, Miss::table_write);
    EXPECT_EQ(miss.address, in_2mb.base() + 0x123);
    EXPECT_EQ(m.lookup(view + 0x123, {.write = true}), std::nullopt) << "until it is begun";
    EXPECT_EQ(m.mmu.fault(view + 0x123, {}).outcome, Miss::filled) << "reading is no write";
}

TEST_F(Trapped, WriteThatChangesNothingIsShownAsNone) {
    EXPECT_TRUE(m.store_at(slot_view(index_of_at), m.entry(at).raw()).empty());
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_EQ(m.read(at), mapped(m.page));
    EXPECT_EQ(m.misses(), 0U);
}

TEST_F(Trapped, MarksThatAreSetAreNoChangeAndThoseThatAreClearedAre) {
    const GuestEntry before = m.entry(at);
    ASSERT_TRUE(before.accessed());
    EXPECT_TRUE(m.store_at(slot_view(index_of_at), before.raw() | d).empty());
    const std::vector<TableWrite> writes = m.store_at(slot_view(index_of_at), before.raw() & ~a);
    ASSERT_EQ(writes.size(), 1U);
    EXPECT_EQ(writes[0].before, before.with(d));
    EXPECT_FALSE(writes[0].after.has(a));
}

TEST_F(Trapped, AllThatOneInstructionChangesIsShown) {
    ASSERT_EQ(m.write(view), mapped(in_2mb));
    ASSERT_TRUE(m.mmu.table_write_begun());
    for (const unsigned index : {0U, 7U, 511U})
        ASSERT_TRUE(m.memory.write(FakeMachine::slot_of(in_2mb, index), std::uint64_t{index} << 12 | p));
    const std::vector<TableWrite> writes = m.finish_write();
    ASSERT_EQ(writes.size(), 3U);
    EXPECT_EQ(writes[0].slot, FakeMachine::slot_of(in_2mb, 0));
    EXPECT_EQ(writes[1].slot, FakeMachine::slot_of(in_2mb, 7));
    EXPECT_EQ(writes[2].slot, FakeMachine::slot_of(in_2mb, 511));
    EXPECT_TRUE(m.mmu.finish_table_write().empty()) << "it is over";
}

TEST_F(Trapped, TableOfSeveralRolesIsShownOnce) {
    m.set_user(true);
    m.read(at);
    m.set_user(false);
    m.paging.write_protect = false;
    m.set_control();
    m.read(at);
    const GuestFrame changed = m.new_frame();
    EXPECT_EQ(m.change_mapping(changed).size(), 1U);
    for (const bool as_user : {false, true}) {
        m.set_user(as_user);
        EXPECT_EQ(m.read(at), mapped(changed)) << "dropped in each";
    }
}

TEST_F(Trapped, TwoTablesMayBeOpenAtOnce) {
    // An unaligned store across two tables that are mapped side by side.
    m.map_new(far);
    m.move_table(far, in_2mb + 1);
    m.map(view + page_size, in_2mb + 1, kernel_bits | d);
    m.read(far);
    EXPECT_EQ(m.write(view + page_size - 4), mapped(in_2mb, page_size - 4));
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_EQ(m.write(view + page_size), mapped(in_2mb + 1));
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_EQ(m.write(view + page_size - 4), mapped(in_2mb, page_size - 4));
    EXPECT_EQ(m.misses(), 0U) << "both are let through now";
    ASSERT_TRUE(m.memory.write(FakeMachine::slot_of(in_2mb, 511), std::uint64_t{0x1'0000'0001}));
    ASSERT_TRUE(m.memory.write(FakeMachine::slot_of(in_2mb + 1, 0), std::uint64_t{0x1001}));
    const std::vector<Shown> wanted{
        {FakeMachine::slot_of(in_2mb, 511), 1, GuestEntry(), GuestEntry(0x1'0000'0001)},
        {FakeMachine::slot_of(in_2mb + 1, 0), 1, GuestEntry(), GuestEntry(0x1001)}};
    EXPECT_EQ(shown(m.finish_write()), wanted);
    EXPECT_EQ(m.lookup(view, {.write = true}), std::nullopt);
    EXPECT_EQ(m.lookup(view + page_size, {.write = true}), std::nullopt);
}

TEST_F(Trapped, TableThatIsNotInUseAnyMoreIsGivenUp) {
    const GuestVirt address = view + 8 * mb;
    m.map(address, GuestFrame(4 * mb >> page_shift), user_bits | d, 2);
    const std::uint64_t link = m.entry(at, 2).raw();
    for (const bool changed : {true, false, true}) {
        m.set_entry(at, 0, 2);
        flush(m);
        const MmuCounters before = m.mmu.counters();
        EXPECT_TRUE(m.change_mapping(changed ? m.new_frame() : m.page).empty()) << "a page like any other";
        EXPECT_EQ(m.misses(), 1U);
        EXPECT_TRUE(m.change_mapping(m.page).empty());
        EXPECT_EQ(m.misses(), 0U);
        EXPECT_EQ(m.mmu.counters().table_writes, before.table_writes + 1);
        flush(m, 256);
        m.read(address);
        EXPECT_TRUE(m.shadow(address, 2).has(ps | rw)) << "no protected table lies in it";
        // And as a table again.
        m.set_entry(at, link, 2);
        const std::uint64_t protections = m.mmu.counters().tables_protected;
        EXPECT_EQ(m.read(at), mapped(m.page));
        flush(m, 2);
        EXPECT_EQ(m.mmu.counters().tables_protected, protections + 1);
        EXPECT_EQ(m.lookup(address + 7 * page_size, {.write = true}), std::nullopt);
        EXPECT_EQ(m.change_mapping(m.new_frame()).size(), 1U);
        EXPECT_EQ(m.read(at), mapped(m.page));
    }
}

TEST_F(Trapped, EntriesOf32BitTablesAreShownWithTheirSlots) {
    const GuestFrame directory = m.new_frame(), table = m.new_frame(), page = m.new_frame();
    const GuestVirt high{0xc060'5000}, table_view{0x5000};
    m.store32(directory, high.value() >> 22, table.base().value() | user_bits);
    m.store32(directory, 0, table.base().value() | user_bits);
    m.store32(table, 0x205, page.base().value() | user_bits); // second half
    m.store32(table, 5, table.base().value() | kernel_bits | d);
    m.paging.format = &paging_32_bit_pse;
    m.load_cr3(directory);
    EXPECT_EQ(m.read(high), mapped(page));
    EXPECT_EQ(m.write(table_view + 0x205 * 4), mapped(table, 0x205 * 4));
    ASSERT_TRUE(m.mmu.table_write_begun());
    ASSERT_TRUE(m.memory.write(table.base() + 0x205 * 4, std::uint32_t{0}));
    const std::vector<TableWrite> writes = m.finish_write();
    ASSERT_EQ(writes.size(), 1U);
    EXPECT_EQ(writes[0].slot, table.base() + 0x205 * 4);
    EXPECT_EQ(writes[0].before.raw(), page.base().value() | user_bits | a);
    EXPECT_EQ(writes[0].after.raw(), 0U);
    EXPECT_EQ(m.read(high), fault(0));
}

// ---- Views

TEST(Views, SwitchBetweenKnownSpacesComparesNothingWhateverTheirSize) {
    for (const unsigned size : {1U, 16U, 150U}) {
        SCOPED_TRACE(size);
        Machine m({.sync = Sync::protect});
        const GuestFrame space = m.new_frame();
        for (const GuestFrame root : {m.root, space}) {
            m.load_cr3(root);
            for (unsigned i = 0; i < size; ++i) {
                m.map(root, at + i * 2 * mb, m.new_frame(), user_bits);
                m.read(at + i * 2 * mb);
            }
        }
        for (int i = 0; i < 2; ++i) {
            m.load_cr3(m.root);
            m.load_cr3(space);
        }
        EXPECT_GE(m.mmu.counters().tables_protected, 2 * (size + 3));
        const MmuCounters before = m.mmu.counters();
        for (int i = 0; i < 10; ++i) {
            m.load_cr3(m.root);
            m.load_cr3(space);
        }
        EXPECT_EQ(m.mmu.counters().tables_compared, before.tables_compared);
        EXPECT_EQ(m.mmu.counters().tables_reused, before.tables_reused + 20);
        EXPECT_EQ(m.mmu.counters().tables_built, before.tables_built);
        EXPECT_EQ(m.mmu.counters().entries_dropped, 0U);
    }
}

TEST(Views, TablesLinkedAndUnlinkedAreNoticed) {
    Machine m({.sync = Sync::compare});
    m.map_new(at);
    m.read(at);
    flush(m, 2);
    // A new table below the root: from now on it is compared.
    m.map_new(far);
    m.read(far);
    std::uint64_t before = m.mmu.counters().tables_compared;
    flush(m);
    EXPECT_EQ(m.mmu.counters().tables_compared, before + 6);
    const GuestFrame changed = m.map_new(far);
    flush(m);
    EXPECT_EQ(m.read(far), mapped(changed));
    // And not any more, once it is unlinked.
    m.set_entry(far, 0, 2);
    flush(m);
    before = m.mmu.counters().tables_compared;
    flush(m);
    EXPECT_EQ(m.mmu.counters().tables_compared, before + 5);
}

TEST(Views, TablesThatAreUnprotectedAreNoticed) {
    Watched m({.sync = Sync::adaptive, .trap_cost = 10});
    m.flushes_until_protected();
    flush(m, 3); // nothing to compare
    m.change_mapping(m.new_frame());
    flush(m);
    EXPECT_EQ(m.read(at), mapped(m.page));
}

// ---- The reverse map

std::set<std::pair<TableIndex, unsigned>> places(const std::vector<ShadowSlot>& slots) {
    std::set<std::pair<TableIndex, unsigned>> result;
    for (const ShadowSlot place : slots)
        result.emplace(place.table, place.slot);
    EXPECT_EQ(result.size(), slots.size()) << "twice the same";
    return result;
}

TEST(Mappings, OfAnyFrameAndSize) {
    Machine m;
    const GuestFrame gigabyte{FakeMachine::high >> page_shift};
    const std::uint64_t within = (in_1gb - gigabyte) << page_shift;
    EXPECT_TRUE(m.tables.mappings(in_1gb).empty());
    m.map(at, in_1gb, kernel_bits);
    m.map(far, in_1gb);
    m.map(neighbour, in_1gb + 1);
    m.map(view, gigabyte + 1024, user_bits, 2);
    m.map(view + 4 * gb, gigabyte, user_bits, 3);
    EXPECT_TRUE(m.tables.mappings(in_1gb).empty()) << "none is filled";
    m.read(at);
    m.read(neighbour);
    m.read(view);
    m.read(view + 4 * gb);
    m.set_user(true);
    m.read(far);
    const TableIndex user_table = m.table(far, 1);
    m.set_user(false);
    const auto slot = [](GuestVirt address, unsigned level) {
        return paging_4_level.level(level).index(address);
    };
    const std::set<std::pair<TableIndex, unsigned>> wanted{
        {m.table(at, 1), slot(at, 1)},
        {user_table, slot(far, 1)},
        {m.table(view, 2), slot(view, 2)},
        {m.table(view + 4 * gb, 3), slot(view + 4 * gb, 3)}};
    EXPECT_EQ(places(m.tables.mappings(in_1gb)), wanted);
    EXPECT_EQ(m.tables.mappings(in_1gb + 512).size(), 1U) << "in the gigabyte only";
    EXPECT_EQ(m.tables.mappings(in_1gb + 1).size(), 3U);
    // What goes is forgotten.
    m.change(at, p, 0);
    m.change(view, p, 0, 2);
    m.change(view + 4 * gb, p, 0, 3);
    flush(m);
    EXPECT_EQ(places(m.tables.mappings(in_1gb)),
              (std::set<std::pair<TableIndex, unsigned>>{{user_table, slot(far, 1)}}));
    EXPECT_EQ(m.read(view + within), fault(0));
}

TEST(Mappings, OfAProtectedTable) {
    Machine m({.sync = Sync::trap});
    m.map(far, in_1gb); // before it is a table
    m.read(far);
    m.map_new(at);
    m.move_table(at, in_1gb);
    m.read(at);
    m.map(view, in_1gb); // after it
    m.map(view + 4 * gb, GuestFrame(FakeMachine::high >> page_shift), user_bits, 3);
    m.read(view);
    m.read(view + 4 * gb + ((in_1gb.number() << page_shift) & (gb - 1)));
    EXPECT_EQ(places(m.tables.mappings(in_1gb)).size(), 3U);
    m.change(far, p, 0);
    EXPECT_EQ(places(m.tables.mappings(in_1gb)).size(), 2U);
    m.map_new(view); // another page in its place
    m.read(view);
    EXPECT_EQ(places(m.tables.mappings(in_1gb)).size(), 1U);
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
}

TEST(Mappings, OfTablesThatAreRecycledAreForgotten) {
    Watched m({.pool_pages = 16, .sync = Sync::trap});
    const GuestFrame page{8 * mb >> page_shift}, space = m.new_frame();
    m.map(space, at, in_2mb, kernel_bits); // a table of the first space
    m.map(space, large + 2 * mb, page, kernel_bits, 2);
    m.load_cr3(space);
    m.read(at);
    m.read(large + 2 * mb);
    ASSERT_EQ(m.tables.mappings(in_2mb).size(), 2U);
    ASSERT_EQ(m.tables.mappings(page).size(), 1U);
    while (m.mmu.counters().tables_recycled < 4) {
        m.load_cr3(m.root);
        m.read(at);
        const GuestFrame other = m.new_frame();
        m.map(other, at, m.new_frame(), kernel_bits);
        m.load_cr3(other);
        m.read(at);
    }
    m.load_cr3(m.root);
    EXPECT_EQ(m.read(at), mapped(m.page));
    EXPECT_EQ(m.misses(), 0U) << "the first space was never left for long";
    EXPECT_EQ(m.tables.mappings(in_2mb).size(), 1U);
    EXPECT_TRUE(m.tables.mappings(page).empty());
}

// ---- When memory is short

/// A space with `tables` last tables, in a pool of 32 pages.
class Eviction : public ::testing::Test {
  public:
    static constexpr unsigned pages = 32, upper = 3, fitting = pages - upper;
    Eviction() : m({.pool_pages = pages}) {
        for (unsigned i = 0; i < 2 * fitting; ++i) {
            frames.push_back(m.map_new(address(i)));
            m.map_new(address(i) + page_size);
        }
    }
    static GuestVirt address(unsigned table) { return large + table * 2 * mb; }
    [[nodiscard]] bool linked(unsigned table) { return m.shadow(address(table), 2).present(); }
    /// A reset would give tables back that are not counted as recycled.
    void expect_no_reset() {
        const MmuCounters& counters = m.mmu.counters();
        EXPECT_EQ(counters.tables_built - counters.tables_recycled, m.pool.in_use());
    }
    Machine m;
    std::vector<GuestFrame> frames;
};

TEST_F(Eviction, TakesThoseThatNoFillWentThroughForTheLongestTime) {
    for (unsigned i = 0; i < fitting; ++i)
        m.read(address(i));
    ASSERT_EQ(m.pool.in_use(), pages);
    m.read(address(0) + page_size); // is young now
    ASSERT_EQ(m.misses(), 1U);
    EXPECT_EQ(m.mmu.counters().tables_recycled, 0U);
    EXPECT_EQ(m.read(address(fitting)), mapped(frames[fitting]));
    // An eighth of the last tables.
    for (unsigned i = 0; i <= fitting; ++i)
        EXPECT_EQ(linked(i), i == 0 || i > 4) << i;
    EXPECT_EQ(m.mmu.counters().tables_recycled, 1U);
    EXPECT_EQ(m.mmu.counters().tables_built, pages + 1);
    // Those are recycled, before any other is taken.
    for (unsigned i = 1; i < 4; ++i)
        m.read(address(fitting + i));
    EXPECT_EQ(m.mmu.counters().tables_recycled, 4U);
    for (unsigned i = 5; i < fitting + 4; ++i)
        EXPECT_TRUE(linked(i)) << i;
    expect_no_reset();
}

TEST_F(Eviction, WhatIsTakenAndNeededAgainIsFoundAsItWas) {
    for (unsigned i = 0; i <= fitting; ++i)
        m.read(address(i));
    // Four were taken from their parent, and one of them is recycled.
    const MmuCounters before = m.mmu.counters();
    for (unsigned i = 1; i < 4; ++i) {
        ASSERT_FALSE(linked(i));
        EXPECT_EQ(m.read(address(i)), mapped(frames[i]));
    }
    EXPECT_EQ(m.mmu.counters().tables_built, before.tables_built);
    EXPECT_EQ(m.mmu.counters().tables_reused, before.tables_reused + 3);
    EXPECT_FALSE(linked(0));
    EXPECT_EQ(m.read(address(0)), mapped(frames[0]));
    EXPECT_EQ(m.mmu.counters().tables_built, before.tables_built + 1);
    expect_no_reset();
}

TEST_F(Eviction, PathInUseStays) {
    for (unsigned round = 0; round < 3; ++round) {
        for (unsigned i = 0; i < frames.size(); ++i) {
            EXPECT_EQ(m.read(address(i)), mapped(frames[i]));
            EXPECT_EQ(m.misses(), 1U);
            EXPECT_EQ(m.read(address(i)), mapped(frames[i]));
            EXPECT_EQ(m.misses(), 0U);
        }
    }
    EXPECT_GE(m.mmu.counters().tables_recycled, 2 * frames.size());
    EXPECT_LE(m.pool.high_water(), pages);
    expect_no_reset();
}

TEST_F(Eviction, SpaceLargerThanThePoolKeepsUpWithTheGuest) {
    for (const Sync sync : {Sync::compare, Sync::protect, Sync::adaptive, Sync::trap}) {
        Machine tight({.pool_pages = pages, .sync = sync, .trap_cost = 1});
        std::vector<GuestFrame> now;
        for (unsigned i = 0; i < 2 * fitting; ++i)
            now.push_back(tight.map_new(address(i)));
        for (unsigned round = 0; round < 4; ++round) {
            for (unsigned i = 0; i < now.size(); ++i) {
                EXPECT_EQ(tight.read(address(i)), mapped(now[i]));
                const unsigned changed = i * 7 % static_cast<unsigned>(now.size());
                now[changed] = tight.map_new(address(changed));
                i % 3 == 0 ? flush(tight) : tight.invlpg(address(changed));
                EXPECT_EQ(tight.read(address(changed)), mapped(now[changed]));
            }
        }
        EXPECT_GT(tight.mmu.counters().tables_recycled, now.size());
    }
}

TEST(Reset, IsTheLastResortOfAFill) {
    // Roots of other vCPUs take all but two pages, and are not to be recycled.
    Machine m({.pool_pages = 16});
    std::vector<std::unique_ptr<Mmu>> others;
    for (unsigned i = 0; i < 13; ++i) {
        others.push_back(std::make_unique<Mmu>(m.tables, i + 1));
        GuestPaging paging = m.paging;
        paging.root = m.new_frame();
        others.back()->set_paging(paging);
        others.back()->enter(false).debt.paid();
        others.back()->left();
    }
    const GuestFrame page = m.map_new(at);
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_EQ(m.mmu.counters().tables_recycled, 0U);
    EXPECT_EQ(m.pool.in_use(), 4U) << "all started over";
    m.mmu.left();
    for (const auto& other : others) {
        EXPECT_TRUE(other->debt().root_gone);
        EXPECT_TRUE(other->debt().flush);
        MachineState state = other->enter(false);
        EXPECT_EQ(m.pool.entries(m.pool.page_of(state.root).value())[state.reserved_slot],
                  FakeMachine::switcher);
        state.debt.paid();
        other->left();
    }
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
}

TEST(Reset, IsTheLastResortOfAnEntry) {
    Machine m({.pool_pages = 16});
    std::vector<std::unique_ptr<Mmu>> others;
    m.mmu.left();
    for (unsigned i = 0; i < 16; ++i) {
        others.push_back(std::make_unique<Mmu>(m.tables, i + 1));
        GuestPaging paging = m.paging;
        paging.root = m.new_frame();
        others.back()->set_paging(paging);
        others.back()->enter(false).debt.paid();
        others.back()->left();
        EXPECT_EQ(m.pool.in_use(), i < 15 ? i + 2 : 1);
    }
    EXPECT_EQ(m.mmu.counters().tables_recycled, 0U);
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
}

// ---- Several vCPUs

/// Two vCPUs in one address space; the second one without a machine that pays.
class TwoMmus : public ::testing::Test {
  public:
    TwoMmus() : second(m.tables, 1) {
        second.set_paging(m.paging);
        second.flush();
        page = m.map_new(at);
        m.read(at);
        pay();
    }
    void pay() {
        MachineState state = second.enter(false);
        root = state.root;
        state.debt.paid();
        second.left();
    }
    Machine m;
    Mmu second;
    GuestFrame page;
    MachineFrame root;
};

TEST_F(TwoMmus, ShareTheirTables) {
    EXPECT_EQ(m.pool.in_use(), 4U);
    EXPECT_EQ(root, m.pool.frame(m.table(at, 4)));
    EXPECT_EQ(second.shadow_walk(at, false).size(), 4U) << "filled by the first";
}

TEST_F(TwoMmus, WhatOneDropsBothOweAndEachPaysItsOwn) {
    const TableIndex table = m.table(at, 1);
    m.change(at, p, 0);
    m.mmu.invalidate(at);
    EXPECT_TRUE(second.debt().flush);
    EXPECT_EQ(second.debt().tables, (std::vector{table}));
    EXPECT_EQ(m.mmu.debt().tables, (std::vector{table}));
    m.enter();
    EXPECT_TRUE(m.mmu.debt().none());
    EXPECT_EQ(second.debt().tables, (std::vector{table})) << "not paid by the first";
    EXPECT_FALSE(second.debt().root_gone);
    pay();
    EXPECT_TRUE(second.debt().none());
    // The other way round, and again after it was paid.
    m.map_new(at);
    m.read(at);
    m.change(at, p, 0);
    second.invalidate(at);
    EXPECT_EQ(m.mmu.debt().tables, (std::vector{table}));
    pay();
    EXPECT_EQ(m.mmu.debt().tables, (std::vector{table}));
    m.enter();
    EXPECT_EQ(m.read(at), fault(0));
}

TEST_F(TwoMmus, FlushOfOneDoesNotFlushTheOther) {
    const GuestFrame changed = m.map_new(neighbour);
    m.read(neighbour);
    const std::uint64_t before = m.mmu.counters().tables_compared;
    second.flush();
    m.enter();
    EXPECT_EQ(m.mmu.counters().tables_compared, before);
    pay();
    EXPECT_GT(m.mmu.counters().tables_compared, before);
    EXPECT_EQ(m.read(neighbour), mapped(changed));
}

TEST_F(TwoMmus, EachHasItsOwnRootAndRole) {
    GuestPaging other = m.paging;
    other.root = m.new_frame();
    const GuestFrame elsewhere = m.new_frame();
    m.map(other.root, at, elsewhere, user_bits);
    second.set_paging(other);
    second.flush();
    ASSERT_EQ(second.fault(at, {}).outcome, Miss::filled);
    EXPECT_EQ(second.shadow_walk(at, false).back().entry.table(), mapped(elsewhere).address->frame());
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_EQ(m.misses(), 0U);
    pay();
    EXPECT_NE(root, m.pool.frame(m.table(at, 4)));
}

TEST_F(TwoMmus, RootOfAnotherIsNotRecycled) {
    Machine tight({.pool_pages = 16});
    Mmu other(tight.tables, 1);
    other.set_paging(tight.paging);
    MachineState state = other.enter(false);
    state.debt.paid();
    other.left();
    // The first goes through many spaces.
    for (int i = 0; i < 30; ++i) {
        const GuestFrame space = tight.new_frame();
        tight.map(space, at, tight.new_frame(), user_bits);
        tight.load_cr3(space);
        tight.read(at);
    }
    EXPECT_GT(tight.mmu.counters().tables_recycled, 50U);
    MachineState later = other.enter(false);
    EXPECT_EQ(later.root, state.root);
    EXPECT_EQ(tight.pool.entries(tight.pool.page_of(state.root).value())[later.reserved_slot],
              FakeMachine::switcher);
    later.debt.paid();
    other.left();
}

TEST_F(TwoMmus, OneThatIsGoneOwesAndPinsNothing) {
    Machine tight({.pool_pages = 16});
    const std::size_t before = tight.pool.in_use();
    {
        Mmu other(tight.tables, 1);
        GuestPaging paging = tight.paging;
        paging.root = tight.new_frame();
        other.set_paging(paging);
        other.enter(false).debt.paid();
        EXPECT_EQ(tight.pool.in_use(), before + 1);
        tight.map(paging.root, at, tight.new_frame(), user_bits);
        ASSERT_EQ(other.fault(at, {}).outcome, Miss::filled);
        tight.change(at, 0, 0);
        tight.mmu.reset();
        EXPECT_FALSE(other.debt().none());
    }
    tight.enter();
    for (int i = 0; i < 30; ++i) {
        const GuestFrame space = tight.new_frame();
        tight.map(space, at, tight.new_frame(), user_bits);
        tight.load_cr3(space);
        EXPECT_NE(tight.read(at).address, std::nullopt);
    }
    EXPECT_EQ(tight.mmu.audit(), std::nullopt);
}

/// Tables of their own, with someone to ask the other vCPUs to leave.
class Kicked : public ::testing::Test {
  public:
    Kicked() : m({.pool_pages = 16}) {
        MmuConfig config = FakeMachine::config({.pool_pages = 16});
        config.kick = [this] {
            ++kicks;
            if (on_kick)
                on_kick();
        };
        tables = std::make_unique<ShadowTables>(m.memory, m.pool, config, FakeMachine::switcher);
        first = std::make_unique<Mmu>(*tables, 0);
        second = std::make_unique<Mmu>(*tables, 1);
        second->set_paging(space());
    }
    GuestPaging space() {
        GuestPaging paging;
        paging.root = m.new_frame();
        m.map(paging.root, at, m.new_frame(), user_bits);
        return paging;
    }
    /// The first vCPU goes to a space that it has not seen.
    void fill_new_space() {
        first->set_paging(space());
        first->flush();
        ASSERT_EQ(first->fault(at, {}).outcome, Miss::filled);
        first->enter(false).debt.paid();
    }
    FakeMachine m;
    std::function<void()> on_kick;
    std::unique_ptr<ShadowTables> tables;
    std::unique_ptr<Mmu> first, second;
    unsigned kicks = 0;
};

TEST_F(Kicked, PagesAreReusedOnlyWhenNobodyIsInTheGuest) {
    on_kick = [this] { second->left(); };
    second->enter(false).debt.paid();
    while (tables->counters().tables_recycled == 0)
        fill_new_space();
    EXPECT_EQ(kicks, 1U);
    EXPECT_FALSE(second->debt().none());
    for (int i = 0; i < 5; ++i)
        fill_new_space();
    EXPECT_EQ(kicks, 1U) << "it has left, and none asks again";
    second->enter(false).debt.paid();
    fill_new_space();
    EXPECT_EQ(kicks, 2U);
}

TEST_F(Kicked, ReuseWaitsUntilTheOtherHasLeft) {
    std::atomic<bool> asked = false, has_left = false;
    on_kick = [&] {
        asked = true;
        asked.notify_all();
    };
    second->enter(false).debt.paid();
    std::thread other([&] {
        asked.wait(false);
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        has_left = true;
        second->left();
    });
    while (tables->counters().tables_recycled == 0)
        fill_new_space();
    EXPECT_TRUE(has_left);
    other.join();
}

TEST_F(Kicked, ProtectionStopsTheOthersToo) {
    MmuConfig config = FakeMachine::config({});
    config.sync = Sync::trap;
    Mmu* in_guest = nullptr;
    unsigned asked = 0;
    config.kick = [&] {
        ++asked;
        in_guest->left();
    };
    FakeMachine machine;
    ShadowTables trapping(machine.memory, machine.pool, config, FakeMachine::switcher);
    Mmu one(trapping, 0), other(trapping, 1);
    in_guest = &other;
    GuestPaging paging;
    paging.root = machine.new_frame();
    machine.map(paging.root, at, machine.new_frame(), user_bits);
    one.set_paging(paging);
    other.set_paging(paging);
    other.enter(false).debt.paid();
    ASSERT_EQ(one.fault(at, {}).outcome, Miss::filled);
    EXPECT_EQ(asked, 1U) << "it might be writing to the table at this very moment";
    one.left();
}

// ---- Debts

TEST(Debt, IsMovedNotCopied) {
    Debt debt({TableIndex{3}});
    debt.root_gone = true;
    EXPECT_TRUE(debt.flush);
    EXPECT_FALSE(debt.none());
    Debt heir(std::move(debt));
    EXPECT_TRUE(debt.none() && debt.tables.empty() && !debt.root_gone); // NOLINT(bugprone-use-after-move)
    EXPECT_EQ(heir.tables, (std::vector{TableIndex{3}}));
    EXPECT_TRUE(heir.flush && heir.root_gone);
    Debt last;
    EXPECT_TRUE(last.none());
    last = std::move(heir);
    EXPECT_TRUE(heir.none() && heir.tables.empty() && !heir.root_gone); // NOLINT(bugprone-use-after-move)
    EXPECT_EQ(last.tables, (std::vector{TableIndex{3}}));
    EXPECT_TRUE(last.flush && last.root_gone);
    last.paid();
    EXPECT_TRUE(last.none() && last.tables.empty() && !last.flush && !last.root_gone);
    static_assert(!std::is_copy_constructible_v<Debt> && !std::is_copy_assignable_v<Debt>);
}

TEST(Debt, IsOneIfOnlyTheFlushIsOwed) {
    Debt debt;
    debt.flush = true;
    EXPECT_FALSE(debt.none());
    debt.paid();
    EXPECT_TRUE(debt.none());
}

#ifdef UMBRA_AUDIT
TEST(DebtDeathTest, UnpaidEndsTheProcess) {
    EXPECT_DEATH({ const Debt debt({TableIndex{3}}); }, "");
    EXPECT_DEATH(
        {
            Debt debt({TableIndex{3}});
            debt = Debt();
        },
        "");
}
#endif

// ---- The audit: what write protection adds to its rules

class ProtectionAudit : public ::testing::Test {
  public:
    ProtectionAudit() : m({.sync = Sync::trap}) {}
    void expect_broken(const std::string& words) {
        const auto rule = m.mmu.audit();
        ASSERT_NE(rule, std::nullopt);
        EXPECT_NE(rule->find(words), std::string::npos) << *rule;
    }
    Watched m;
};

TEST_F(ProtectionAudit, WritableProtectedTable) {
    ShadowEntry& entry = m.shadow_slot(view);
    EXPECT_FALSE(entry.writable());
    entry = entry.with(rw);
    expect_broken("makes a protected table of the guest writable");
}

TEST_F(ProtectionAudit, WritableLargePageOverAProtectedTable) {
    m.map(view + 8 * mb, GuestFrame(4 * mb >> page_shift), user_bits | d, 2);
    m.read(view + 8 * mb);
    m.shadow_slot(view + 8 * mb, 2) = ShadowEntry(MachineFrame(4 * mb >> page_shift), user_bits | ps);
    expect_broken("makes a protected table of the guest writable");
}

TEST_F(ProtectionAudit, MappingOfATableThatTheReverseMapDoesNotKnow) {
    m.shadow_slot(at) = ShadowEntry(MachineFrame(in_2mb.number()), p | us);
    expect_broken("the reverse map does not know entry");
}

TEST_F(ProtectionAudit, LargePageThatTheReverseMapDoesNotKnow) {
    m.map(view + 8 * mb, GuestFrame(8 * mb >> page_shift), user_bits | d, 2);
    m.read(view + 8 * mb);
    m.shadow_slot(view + 8 * mb, 2) = ShadowEntry(MachineFrame(10 * mb >> page_shift), user_bits | ps);
    expect_broken("the reverse map does not know entry");
}

TEST_F(ProtectionAudit, ProtectedTableThatHasChangedUnseen) {
    ASSERT_TRUE(m.memory.write(FakeMachine::slot_of(in_2mb, 3), std::uint64_t{p}));
    expect_broken("entry 3 of the guest's table behind table");
    expect_broken("changed under protection");
    EXPECT_EQ(m.tables.wrote(FakeMachine::slot_of(in_2mb, 3), 8).size(), 1U);
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
    // What a CPU may do by itself is no change.
    ASSERT_TRUE(m.memory.write(m.slot(m.root, at), m.entry(at).with(a | d).raw()));
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
}

TEST(ProtectionAuditOfQuietTables, TableThatHasChangedUnseen) {
    for (const Sync sync : {Sync::protect, Sync::adaptive}) {
        Watched m({.sync = sync});
        m.flushes_until_protected();
        const GuestPhys slot = FakeMachine::slot_of(in_2mb, 3);
        ASSERT_TRUE(m.memory.write(slot, std::uint64_t{p}));
        EXPECT_EQ(m.mmu.audit().value_or("").find("entry 3 of the guest's table behind table"), 0U)
            << "there is a snapshot yet";
        ASSERT_TRUE(m.memory.write(slot, std::uint64_t{0}));
        flush(m, long_after);
        ASSERT_EQ(m.mmu.audit(), std::nullopt);
        ASSERT_TRUE(m.memory.write(slot, std::uint64_t{p}));
        EXPECT_EQ(m.mmu.audit(),
                  fmt::format("the guest's table in frame {:#x} changed under protection", in_2mb.number()));
        ASSERT_TRUE(m.memory.write(slot, std::uint64_t{a | d | (a | d) << 32}));
        EXPECT_EQ(m.mmu.audit(), std::nullopt) << "a CPU may set these";
        ASSERT_TRUE(m.memory.write(slot, std::uint64_t{p}));
        (void)m.tables.wrote(slot, 8);
        EXPECT_EQ(m.mmu.audit(), std::nullopt) << "and umbra may say so";
    }
}

TEST_F(ProtectionAudit, MiscountedLinks) {
    // A link moves to another table of its level: as many uses as before, but not the same links.
    ShadowEntry& from = m.shadow_slot(at, 2);
    ShadowEntry& to = m.pool.entries(m.table(view, 2))[77];
    ASSERT_FALSE(to.present());
    std::swap(from, to);
    expect_broken("counts 1 links but has ");
}

} // namespace
} // namespace umbra::test
