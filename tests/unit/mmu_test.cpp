// Unit tests of shadow/mmu.hpp on a machine in plain memory: filling, rights, keeping up with the guest, the
// switcher's slot, the pool's limits, debts, and each rule of the audit.
#include "tests/unit/mmu_machine.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace umbra::test {
namespace {

// ---- Filling

TEST(MmuFill, IsOnDemand) {
    Machine m;
    const GuestFrame page = m.map_new(at);
    const GuestFrame next = m.map_new(neighbour);
    EXPECT_EQ(m.read(at + 0x123), mapped(page, 0x123));
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_EQ(m.mmu.counters().fills, 1U);
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.read(neighbour), mapped(next));
    EXPECT_EQ(m.misses(), 1U) << "nobody asked for it before";
    EXPECT_EQ(m.mmu.counters().tables_built, 4U);
}

TEST(MmuFill, NotPresentIsTheGuestsFault) {
    Machine m;
    EXPECT_EQ(m.read(at), fault(0));
    EXPECT_EQ(m.write(at), fault(write));
    EXPECT_EQ(m.fetch(at), fault(fetch));
    EXPECT_EQ(m.mmu.counters().guest_faults, 3U);
    const GuestFrame page = m.map_new(at);
    EXPECT_EQ(m.read(at), mapped(page)) << "not present to present needs no flush";
}

TEST(MmuFill, CleanPageIsReadOnlyUntilItsFirstWrite) {
    Machine m;
    const GuestFrame page = m.map_new(at);
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_FALSE(m.shadow(at).writable());
    EXPECT_FALSE(m.entry(at).dirty());
    EXPECT_EQ(m.write(at), mapped(page));
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_TRUE(m.entry(at).dirty());
    EXPECT_EQ(m.mmu.counters().upgrades, 1U);
    EXPECT_EQ(m.write(at), mapped(page));
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.flushes_paid + m.tables_paid, 0U) << "more rights owe nothing";
}

TEST(MmuFill, PageThatTheGuestMadeDirtyIsWritableAtOnce) {
    Machine m;
    const GuestFrame page = m.map_new(at, user_bits | d);
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_EQ(m.write(at), mapped(page));
    EXPECT_EQ(m.misses(), 0U);
}

TEST(MmuFill, AccessedIsSetAtEachLevelAndDirtyInTheLeaf) {
    for (const unsigned leaf : {1U, 2U, 3U}) {
        SCOPED_TRACE(leaf);
        Machine m;
        m.map(giant, GuestFrame(FakeMachine::high >> page_shift), user_bits, leaf);
        m.read(giant);
        for (unsigned level = leaf; level <= 4; ++level) {
            EXPECT_TRUE(m.entry(giant, level).accessed()) << level;
            EXPECT_FALSE(m.entry(giant, level).dirty()) << level;
        }
        m.write(giant);
        for (unsigned level = leaf; level <= 4; ++level)
            EXPECT_EQ(m.entry(giant, level).dirty(), level == leaf) << level;
    }
}

TEST(MmuFill, FaultingAccessMarksNothing) {
    Machine m;
    m.map_new(at, p);
    EXPECT_EQ(m.write(at), fault(present | write));
    for (unsigned level = 1; level <= 4; ++level)
        EXPECT_FALSE(m.entry(at, level).has(a)) << level;
}

TEST(MmuFill, MoreRightsNeedNoFlush) {
    Machine m;
    const GuestFrame page = m.map_new(at, p | xd);
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_EQ(m.fetch(at), fault(present | fetch));
    EXPECT_EQ(m.write(at), fault(present | write));
    m.change(at, rw | xd, rw);
    EXPECT_EQ(m.fetch(at), mapped(page));
    EXPECT_EQ(m.write(at), mapped(page));
    EXPECT_EQ(m.flushes_paid + m.tables_paid, 0U);
    m.change(at, 0, us);
    m.set_user(true);
    EXPECT_EQ(m.read(at), mapped(page));
}

// ---- Prefetch

/// `at` lies in the middle of a group of 16, which begins here.
constexpr GuestVirt group = at - 8 * page_size;
static_assert(paging_4_level.level(1).index(group) % 16 == 0);

TEST(MmuPrefetch, FillsWhatTheGuestHasAccessedBefore) {
    Machine m({.prefetch = 16});
    const GuestFrame page = m.map_new(at), clean = m.map_new(group, user_bits | a),
                     dirty = m.map_new(neighbour, user_bits | a | d),
                     last = m.map_new(group + 15 * page_size, user_bits | a | d);
    const GuestFrame fresh = m.map_new(at + 2 * page_size), strange = m.new_frame();
    m.map(at + 3 * page_size, strange, user_bits | a | (std::uint64_t{1} << 50)); // reserved
    m.map(at + 4 * page_size, strange, (user_bits & ~p) | a | d);
    const GuestFrame before = m.map_new(group - page_size, user_bits | a),
                     behind = m.map_new(group + 16 * page_size, user_bits | a);
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_EQ(m.mmu.counters().fills, 1U);
    EXPECT_EQ(m.mmu.counters().prefetched, 3U);

    EXPECT_EQ(m.write(neighbour), mapped(dirty));
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.write(group + 15 * page_size), mapped(last));
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.read(group), mapped(clean));
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.write(group), mapped(clean)) << "the first write must set dirty";
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_TRUE(m.entry(group).dirty());
    EXPECT_FALSE(m.entry(at + 2 * page_size).accessed());
    EXPECT_EQ(m.read(at + 2 * page_size), mapped(fresh));
    EXPECT_EQ(m.misses(), 1U) << "its use must set accessed";
    EXPECT_EQ(m.read(at + 3 * page_size), fault(present | reserved));
    EXPECT_EQ(m.read(at + 4 * page_size), fault(0));
    EXPECT_EQ(m.read(group - page_size), mapped(before));
    EXPECT_EQ(m.misses(), 1U) << "outside the group";
    EXPECT_EQ(m.read(group + 16 * page_size), mapped(behind));
    EXPECT_EQ(m.misses(), 1U) << "outside the group";
}

TEST(MmuPrefetch, ChangesNothingInTheGuestsTables) {
    Machine m({.prefetch = 512});
    const GuestVirt first = large;
    for (std::uint64_t i = 0; i < entries_per_table; ++i)
        m.map(first + i * page_size, m.new_frame(),
              (i % 2 != 0 ? user_bits : user_bits | a) | (i % 3 != 0 ? 0 : d));
    std::vector<GuestEntry> before;
    for (std::uint64_t i = 0; i < entries_per_table; ++i)
        before.push_back(m.entry(first + i * page_size));
    m.read(first + 10 * page_size); // is marked
    EXPECT_EQ(m.mmu.counters().prefetched, 255U);
    for (std::uint64_t i = 0; i < entries_per_table; ++i)
        EXPECT_EQ(m.entry(first + i * page_size), before[i]) << i;
}

TEST(MmuPrefetch, StaysInTheTable) {
    Machine m({.prefetch = 512});
    m.map_new(large - page_size, user_bits | a);
    m.map_new(large, user_bits | a);
    m.map_new(large + 511 * page_size, user_bits | a);
    m.map_new(large + 512 * page_size, user_bits | a);
    m.map_new(at);
    m.read(at);
    EXPECT_EQ(m.mmu.counters().prefetched, 2U);
    for (const GuestVirt inside : {large, large + 511 * page_size}) {
        m.read(inside);
        EXPECT_EQ(m.misses(), 0U);
    }
    for (const GuestVirt outside : {large - page_size, large + 512 * page_size}) {
        m.read(outside);
        EXPECT_EQ(m.misses(), 1U);
    }
}

TEST(MmuPrefetch, OneMeansNone) {
    Machine m({.prefetch = 1});
    m.map_new(at);
    m.map_new(neighbour, user_bits | a);
    m.read(at);
    EXPECT_EQ(m.mmu.counters().prefetched, 0U);
}

TEST(MmuPrefetch, GivesEachPageItsOwnRights) {
    Machine m({.prefetch = 16});
    m.map_new(at);
    const GuestFrame constant = m.map_new(neighbour, p | us | a | d),
                     data = m.map_new(group, user_bits | a | d | xd);
    m.read(at);
    EXPECT_EQ(m.mmu.counters().prefetched, 2U);
    EXPECT_EQ(m.read(neighbour), mapped(constant));
    EXPECT_EQ(m.write(neighbour), fault(present | write));
    EXPECT_EQ(m.write(group), mapped(data));
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.fetch(group), fault(present | fetch));
}

TEST(MmuPrefetch, HeedsWhoMayUseThePage) {
    const auto filled = [](bool as_user, bool smep, bool smap, bool by_fetch) {
        Machine m({.prefetch = 16});
        m.paging.smep = smep;
        m.paging.smap = smap;
        m.set_control();
        m.map_new(at, as_user ? user_bits : kernel_bits);
        m.map_new(neighbour, user_bits | a | d);
        m.map_new(group, kernel_bits | a | d);
        m.set_user(as_user);
        by_fetch ? m.fetch(at) : m.read(at);
        const auto there = [&](GuestVirt address, Access access) {
            return m.lookup(address, access).has_value();
        };
        return std::vector<bool>{there(neighbour, {}), there(neighbour, {.fetch = true}), there(group, {}),
                                 there(group, {.fetch = true})};
    };
    EXPECT_EQ(filled(false, false, false, false), (std::vector{true, true, true, true}));
    EXPECT_EQ(filled(true, false, false, false), (std::vector{true, true, false, false}));
    EXPECT_EQ(filled(true, true, true, false), (std::vector{true, true, false, false}));
    EXPECT_EQ(filled(false, true, false, false), (std::vector{true, false, true, true}));
    EXPECT_EQ(filled(false, false, true, false), (std::vector{false, false, true, true}));
    EXPECT_EQ(filled(false, true, true, true), (std::vector{false, false, true, true}));
}

TEST(MmuPrefetch, PathOfThePageDecidesToo) {
    for (const bool smap : {false, true}) {
        Machine m({.prefetch = 16});
        m.paging.smep = true;
        m.paging.smap = smap;
        m.set_control();
        m.map_new(at);
        const GuestFrame page = m.map_new(neighbour, user_bits | a);
        m.change(at, us, 0, 3); // all of it is the kernel's
        m.read(at);
        EXPECT_EQ(m.fetch(neighbour), mapped(page));
        EXPECT_EQ(m.misses(), 0U);
    }
}

TEST(MmuPrefetch, FillsWhatTheEntryIsAtThatTime) {
    // The entry changes between the making of its table and the prefetch, and then back.
    Machine m({.prefetch = 16});
    m.map_new(at);
    const GuestFrame first = m.map_new(neighbour); // not accessed: not prefetched
    m.read(at);
    const GuestFrame second = m.map_new(neighbour, user_bits | a);
    m.map_new(group);
    m.read(group);
    EXPECT_EQ(m.read(neighbour), mapped(second));
    EXPECT_EQ(m.misses(), 0U);
    m.map(neighbour, first);
    m.invlpg(neighbour);
    EXPECT_EQ(m.read(neighbour), mapped(first));
}

TEST(MmuPrefetch, TablesOfTheGuestStayProtected) {
    Machine m({.sync = Sync::protect, .prefetch = 16});
    m.map_new(at);
    m.read(at);
    m.load_cr3(m.root);
    ASSERT_EQ(m.mmu.counters().tables_protected, 4U);
    const GuestFrame table = m.entry(at, 2).table();
    m.map_new(kernel_at);
    m.map(kernel_at + page_size, table, kernel_bits | a | d);
    m.read(kernel_at);
    EXPECT_EQ(m.read(kernel_at + page_size), mapped(table));
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.lookup(kernel_at + page_size, {.write = true}), std::nullopt);
}

TEST(MmuPrefetch, IsNotDoneWhereEachUseIsToBeSeen) {
    Machine m({.sync = Sync::trap, .prefetch = 16});
    m.map_new(at);
    m.map_new(neighbour, user_bits | a | d);
    m.read(at);
    m.read(neighbour);
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_EQ(m.mmu.counters().prefetched, 0U);
}

TEST(MmuPrefetch, FramesOutsideTheGuestLeadNowhere) {
    Machine m({.prefetch = 16});
    m.paging.physical_bits = 52;
    m.set_control();
    m.map_new(at);
    m.map(neighbour, GuestFrame(FakeMachine::pool_first.number()), user_bits | a | d);
    m.read(at);
    EXPECT_EQ(m.write(neighbour), leads_nowhere());
    EXPECT_EQ(m.misses(), 0U);
}

// ---- Large pages

TEST(MmuLarge, TwoMegabytesOverRamAreOneEntry) {
    Machine m;
    m.map(large, GuestFrame(4 * mb >> page_shift), user_bits | d, 2);
    EXPECT_EQ(m.write(large + 0x12'3456), mapped(GuestFrame(4 * mb >> page_shift), 0x12'3456));
    EXPECT_TRUE(m.shadow(large, 2).has(ps | rw));
    m.read(large + mb);
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.mmu.counters().fills, 1U);
}

TEST(MmuLarge, OneGigabyteIsAsLargeAsTheMachineCan) {
    for (const bool can : {true, false}) {
        SCOPED_TRACE(can);
        Machine m({.gigabyte_pages = can});
        const GuestFrame page{FakeMachine::high >> page_shift};
        m.map(giant, page, user_bits | d, 3);
        EXPECT_EQ(m.read(giant + 0x1234'5678), mapped(page, 0x1234'5678));
        EXPECT_EQ(m.shadow(giant + 0x1234'5678, can ? 3 : 2).has(ps), true);
        EXPECT_EQ(m.write(giant + 0x3fff'ffff), mapped(page, 0x3fff'ffff));
        EXPECT_EQ(m.misses(), can ? 0U : 1U);
    }
}

TEST(MmuLarge, PageSizeBitIsReservedWhereTheGuestsCpuHasNoSuchPages) {
    Machine m;
    m.map(giant, GuestFrame(FakeMachine::high >> page_shift), user_bits, 3);
    m.paging.gigabyte_pages = false;
    m.set_control();
    EXPECT_EQ(m.read(giant), fault(present | reserved));
    m.map(far, GuestFrame(0), user_bits);
    m.change(far, ps, ps, 4);
    EXPECT_EQ(m.read(far), fault(present | reserved));
}

TEST(MmuLarge, IsSplinteredOverHolesAndWindows) {
    for (const unsigned level : {2U, 3U}) {
        SCOPED_TRACE(level);
        Machine m;
        m.map(giant, GuestFrame(0), user_bits, level);
        EXPECT_EQ(m.read(giant + 0x5123), mapped(GuestFrame(5), 0x123));
        EXPECT_EQ(m.read(giant + FakeMachine::hole + 0x10),
                  mapped(GuestFrame(FakeMachine::hole >> page_shift), 0x10));
        EXPECT_EQ(m.read(giant + FakeMachine::window.base().value() + 8), mapped(FakeMachine::window, 8));
        EXPECT_EQ(m.read(giant + FakeMachine::behind_window.base().value()),
                  mapped(FakeMachine::behind_window));
        EXPECT_EQ(m.read(giant + mb), mapped(GuestFrame(mb >> page_shift)));
        // The first write to any piece makes the whole page dirty, and so writable.
        EXPECT_EQ(m.write(giant + 0x7000), mapped(GuestFrame(7)));
        EXPECT_TRUE(m.entry(giant, level).dirty());
        EXPECT_EQ(m.write(giant + 0x5000), mapped(GuestFrame(5)));
        EXPECT_EQ(m.misses(), 0U);
        if (level == 3) {
            EXPECT_EQ(m.read(giant + 3 * mb), mapped(GuestFrame(3 * mb >> page_shift)));
            EXPECT_TRUE(m.shadow(giant + 3 * mb, 2).has(ps)) << "a piece of it lies in RAM";
            EXPECT_EQ(m.read(giant + FakeMachine::low_end),
                      mapped(GuestFrame(FakeMachine::low_end >> page_shift)));
        }
    }
}

TEST(MmuLarge, PiecesObeyTheRightsOfThePage) {
    Machine m;
    m.map(large, GuestFrame(0), p | xd, 2);
    EXPECT_EQ(m.read(large + 0x5000), mapped(GuestFrame(5)));
    EXPECT_EQ(m.write(large + 0x5000), fault(present | write));
    EXPECT_EQ(m.fetch(large + 0x5000), fault(present | fetch));
    // The pieces are shared with another mapping of the same page, with other rights.
    m.map(large + 2 * mb, GuestFrame(0), user_bits | d, 2);
    EXPECT_EQ(m.write(large + 2 * mb + 0x5000), mapped(GuestFrame(5)));
    EXPECT_EQ(m.fetch(large + 2 * mb + 0x5000), mapped(GuestFrame(5)));
    EXPECT_EQ(m.write(large + 0x5000), fault(present | write));
    EXPECT_EQ(m.table(large, 1), m.table(large + 2 * mb, 1));
}

TEST(MmuLarge, InvlpgOfAnyPieceDropsAllOfIt) {
    Machine m;
    const GuestFrame other{6 * mb >> page_shift};
    for (const GuestFrame first : {GuestFrame(0), GuestFrame(4 * mb >> page_shift)}) {
        SCOPED_TRACE(first.number());
        m.map(large, first, user_bits, 2);
        m.invlpg(large);
        m.read(large + 0x5000);
        m.read(large + 0x6000);
        m.map(large, other, user_bits, 2);
        EXPECT_EQ(m.read(large + 0x5000), mapped(first, 0x5000)) << "not flushed yet";
        m.invlpg(large + 0x6123);
        EXPECT_EQ(m.read(large + 0x5000), mapped(other, 0x5000));
    }
}

TEST(MmuLarge, GivesWayToATableAndBack) {
    Machine m;
    const GuestFrame page{4 * mb >> page_shift};
    m.map(large, page, user_bits, 2);
    m.read(large + 0x5000);
    const GuestFrame table = m.new_frame(), small = m.new_frame();
    m.put(FakeMachine::slot_of(table, 5), GuestEntry(small, user_bits));
    m.set_entry(large, table.base().value() | user_bits, 2);
    m.invlpg(large + 0x5000);
    EXPECT_EQ(m.read(large + 0x5000), mapped(small));
    EXPECT_EQ(m.read(large + 0x6000), fault(0));
    m.map(large, page, user_bits, 2);
    m.load_cr3(m.root);
    EXPECT_EQ(m.read(large + 0x5000), mapped(page, 0x5000));
}

// ---- The isolation boundary

/// Where no memory is, an access tells the guest's own address, up to where the machine's own memory begins.
Outcome at_most_nowhere(GuestFrame frame) {
    return frame.number() < FakeMachine::nothing.number() ? mapped(frame) : leads_nowhere();
}

TEST(MmuIsolation, NoFrameButTheGuestsIsEverMapped) {
    Machine m;
    m.paging.physical_bits = 52;
    m.set_control();
    const std::vector<GuestFrame> wild{
        GuestFrame(FakeMachine::hole >> page_shift),
        GuestFrame(FakeMachine::window.number() - 1),
        FakeMachine::behind_window,
        GuestFrame(FakeMachine::low_end >> page_shift),
        GuestFrame(FakeMachine::high_end >> page_shift),
        GuestFrame(FakeMachine::nothing.number() - 1),
        GuestFrame(FakeMachine::nothing.number()),
        GuestFrame(FakeMachine::nothing.number() + 1),
        GuestFrame(FakeMachine::pool_first.number()),
        GuestFrame(FakeMachine::pool_first.number() + 1),
        GuestFrame(FakeMachine::switcher.table().number()),
        GuestFrame((std::uint64_t{1} << 40) - 1),
    };
    for (const GuestFrame frame : wild) {
        m.map(at, frame, user_bits);
        m.invlpg(at);
        EXPECT_EQ(m.write(at), at_most_nowhere(frame)) << frame.number();
    }
    // By large pages too.
    for (const GuestFrame frame :
         {GuestFrame(FakeMachine::pool_first.number()), GuestFrame(FakeMachine::low_end >> page_shift)}) {
        for (const unsigned level : {2U, 3U}) {
            const GuestFrame first = GuestEntry(frame, 0).page(paging_4_level.level(level));
            m.map(giant + 8 * gb, first, user_bits, level);
            m.load_cr3(m.root);
            const std::uint64_t offset = (frame - first) << page_shift;
            EXPECT_EQ(m.write(giant + 8 * gb + offset), at_most_nowhere(frame)) << frame.number();
            m.set_entry(giant + 8 * gb, 0, 3);
        }
    }
}

TEST(MmuIsolation, TablesOutsideRamReadAsAllOnes) {
    Machine m;
    m.map_new(at);
    m.read(at);
    for (unsigned level = 4; level > 1; --level) {
        SCOPED_TRACE(level);
        const GuestEntry good = m.entry(at, level);
        for (const std::uint64_t nowhere : {std::uint64_t{FakeMachine::hole}, FakeMachine::low_end,
                                            FakeMachine::pool_first.base().value() & 0xffff'ffff'ffff}) {
            m.set_entry(at, nowhere | user_bits, level);
            m.invlpg(at);
            EXPECT_EQ(m.read(at), fault(present | reserved));
        }
        m.set_entry(at, good.raw(), level);
        EXPECT_NE(m.read(at).address, std::nullopt);
    }
}

TEST(MmuIsolation, WildRootsOnlyFault) {
    Machine m({.pool_pages = 16});
    const GuestFrame page = m.map_new(at);
    m.read(at);
    for (std::uint64_t i = 0; i < 64; ++i) {
        m.load_cr3(GuestFrame(FakeMachine::pool_first.number() + i));
        EXPECT_EQ(m.read(at), fault(present | reserved));
        m.load_cr3(GuestFrame((FakeMachine::hole >> page_shift) + i % 8));
        EXPECT_EQ(m.read(at), fault(present | reserved));
        // RAM, but not tables.
        m.load_cr3(GuestFrame((FakeMachine::high >> page_shift) + i));
        EXPECT_EQ(m.read(at), fault(0));
    }
    m.load_cr3(m.root);
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_LE(m.pool.high_water(), 16U);
}

// ---- Roles

TEST(MmuRole, KernelPagesAreForTheKernelRootOnly) {
    Machine m;
    const GuestFrame page = m.map_new(at, kernel_bits);
    EXPECT_EQ(m.write(at), mapped(page));
    EXPECT_TRUE(m.shadow(at).user()) << "the guest's kernel runs at CPL 3";
    m.set_user(true);
    EXPECT_FALSE(m.shadow(at, 1, true).present());
    EXPECT_EQ(m.read(at), fault(present | user));
    EXPECT_EQ(m.write(at), fault(present | user | write));
    EXPECT_EQ(m.fetch(at), fault(present | user | fetch));
    EXPECT_FALSE(m.shadow(at, 1, true).present());
    m.set_user(false);
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_EQ(m.misses(), 0U);
}

TEST(MmuRole, SupervisorEntryAtAnyLevelMakesItAKernelPage) {
    for (unsigned level = 1; level <= 4; ++level) {
        SCOPED_TRACE(level);
        Machine m;
        const GuestFrame page = m.map_new(at);
        m.set_user(true);
        EXPECT_EQ(m.read(at), mapped(page));
        m.change(at, us, 0, level);
        m.invlpg(at);
        EXPECT_EQ(m.read(at), fault(present | user));
        m.set_user(false);
        EXPECT_EQ(m.read(at), mapped(page));
    }
}

TEST(MmuRole, UserPagesAreForBoth) {
    Machine m;
    const GuestFrame page = m.map_new(at);
    EXPECT_EQ(m.write(at), mapped(page));
    m.set_user(true);
    EXPECT_EQ(m.write(at), mapped(page));
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_EQ(m.fetch(at), mapped(page));
    EXPECT_EQ(m.misses(), 0U);
}

TEST(MmuRole, DirtySetByOneRootSurvivesInTheOther) {
    Machine m;
    const GuestFrame page = m.map_new(at);
    m.set_user(true);
    m.read(at);
    m.set_user(false);
    m.write(at);
    m.load_cr3(m.root);
    m.set_user(true);
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_EQ(m.misses(), 0U) << "marks are no change";
    EXPECT_EQ(m.write(at), mapped(page));
    EXPECT_EQ(m.misses(), 1U);
}

TEST(MmuRole, WriteProtectOffLetsTheKernelWriteReadOnlyPages) {
    for (const unsigned level : {1U, 2U, 3U, 4U}) {
        SCOPED_TRACE(level);
        Machine m;
        const GuestFrame page = m.map_new(at);
        m.change(at, rw, 0, level);
        EXPECT_EQ(m.write(at), fault(present | write));
        m.paging.write_protect = false;
        m.set_control();
        EXPECT_EQ(m.read(at), mapped(page));
        EXPECT_FALSE(m.entry(at).dirty());
        EXPECT_EQ(m.write(at), mapped(page));
        EXPECT_TRUE(m.entry(at).dirty());
        m.set_user(true);
        EXPECT_EQ(m.read(at), mapped(page));
        EXPECT_EQ(m.write(at), fault(present | write | user)) << "WP is nothing to programs";
        m.set_user(false);
        m.paging.write_protect = true;
        m.set_control();
        EXPECT_EQ(m.write(at), fault(present | write));
    }
}

TEST(MmuRole, ReadOnlyHoldsAtAnyLevel) {
    for (const unsigned level : {1U, 2U, 3U, 4U}) {
        SCOPED_TRACE(level);
        Machine m;
        const GuestFrame page = m.map_new(at, user_bits | d);
        m.change(at, rw, 0, level);
        for (const bool as_user : {false, true}) {
            m.set_user(as_user);
            EXPECT_EQ(m.read(at), mapped(page));
            EXPECT_EQ(m.write(at), fault(present | write | (as_user ? user : 0)));
        }
    }
}

TEST(MmuRole, ExecuteDisableHoldsAtAnyLevel) {
    for (const unsigned level : {1U, 2U, 3U, 4U}) {
        SCOPED_TRACE(level);
        Machine m;
        const GuestFrame page = m.map_new(at);
        m.change(at, xd, xd, level);
        EXPECT_EQ(m.read(at), mapped(page));
        EXPECT_EQ(m.fetch(at), fault(present | fetch));
        m.set_user(true);
        EXPECT_EQ(m.fetch(at), fault(present | fetch | user));
        EXPECT_EQ(m.read(at), mapped(page));
    }
}

TEST(MmuRole, ExecuteDisableIsReservedWithoutNxe) {
    Machine m;
    m.map_new(at, user_bits | xd);
    const GuestFrame plain = m.map_new(neighbour);
    m.read(at);
    m.paging.no_execute = false;
    m.set_control();
    EXPECT_EQ(m.read(at), fault(present | reserved));
    EXPECT_EQ(m.fetch(at), fault(present | reserved));
    EXPECT_EQ(m.fetch(neighbour), mapped(plain));
    EXPECT_EQ(m.fetch(far), fault(0)) << "I/D is not reported without NXE and SMEP";
}

TEST(MmuRole, SmepKeepsTheKernelFromUserCode) {
    Machine m;
    const GuestFrame program = m.map_new(at), kernel = m.map_new(neighbour, kernel_bits);
    EXPECT_EQ(m.fetch(at), mapped(program));
    m.paging.smep = true;
    m.set_control();
    EXPECT_EQ(m.read(at), mapped(program));
    EXPECT_EQ(m.fetch(at), fault(present | fetch));
    EXPECT_EQ(m.write(at), mapped(program));
    EXPECT_EQ(m.fetch(at), fault(present | fetch)) << "after an upgrade too";
    EXPECT_EQ(m.fetch(neighbour), mapped(kernel));
    m.set_user(true);
    EXPECT_EQ(m.fetch(at), mapped(program));
}

TEST(MmuRole, SmepIsAboutAllLevelsTogether) {
    // The same last table, through a path for programs and through one for the kernel.
    Machine m;
    const GuestFrame page = m.map_new(at);
    const GuestVirt alias = at + 2 * mb;
    m.set_entry(alias, m.entry(at, 2).raw() & ~us, 2);
    m.paging.smep = true;
    m.set_control();
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_EQ(m.read(alias), mapped(page));
    EXPECT_EQ(m.fetch(at), fault(present | fetch));
    EXPECT_EQ(m.fetch(alias), mapped(page));
    m.change(alias, us, us, 2);
    m.invlpg(alias);
    EXPECT_EQ(m.fetch(alias), fault(present | fetch));
}

TEST(MmuRole, SmepReachesThePiecesOfALargePage) {
    Machine m;
    m.map(large, GuestFrame(0), user_bits | d, 2);
    m.map(large + 2 * mb, GuestFrame(0), kernel_bits | d, 2);
    m.paging.smep = true;
    m.set_control();
    EXPECT_EQ(m.write(large + 0x5000), mapped(GuestFrame(5)));
    EXPECT_EQ(m.fetch(large + 0x5000), fault(present | fetch));
    EXPECT_EQ(m.fetch(large + 2 * mb + 0x5000), mapped(GuestFrame(5)));
}

TEST(MmuRole, KernelFetchOfUserCodeCanBeMadeToTrap) {
    Machine m;
    const GuestFrame program = m.map_new(at), kernel = m.map_new(neighbour, kernel_bits);
    EXPECT_EQ(m.fetch(at), mapped(program));
    m.mmu.set_trap_user_fetch(true);
    m.enter();
    EXPECT_EQ(m.read(at), mapped(program));
    Outcome trapped = fault(present | fetch);
    trapped.trapped_user_fetch = true;
    EXPECT_EQ(m.fetch(at), trapped);
    EXPECT_EQ(m.mmu.counters().guest_faults, 0U) << "it is not the guest's";
    EXPECT_EQ(m.fetch(neighbour), mapped(kernel));
    m.change(at, xd, xd);
    EXPECT_EQ(m.fetch(at), fault(present | fetch)) << "the guest's tables come first";
    m.set_user(true);
    m.change(at, xd, 0);
    EXPECT_EQ(m.fetch(at), mapped(program));
    m.set_user(false);
    m.mmu.set_trap_user_fetch(false);
    m.enter();
    EXPECT_EQ(m.fetch(at), mapped(program));
}

/// What the kernel's instructions run with.
void set_ac(Machine& m, bool ac) {
    m.mmu.set_alignment_check(ac);
    m.enter();
}

TEST(MmuRole, SmapKeepsTheKernelFromUserData) {
    Machine m;
    const GuestFrame program = m.map_new(at), kernel = m.map_new(neighbour, kernel_bits);
    EXPECT_EQ(m.write(at), mapped(program));
    m.paging.smap = true;
    m.set_control();
    EXPECT_EQ(m.read(at), fault(present));
    EXPECT_EQ(m.write(at), fault(present | write));
    EXPECT_EQ(m.write(neighbour), mapped(kernel));
    set_ac(m, true);
    EXPECT_EQ(m.access(at, {.ac = true}), mapped(program));
    EXPECT_EQ(m.access(at, {.write = true, .ac = true}), mapped(program));
    EXPECT_EQ(m.access(neighbour, {.ac = true}), mapped(kernel));
    set_ac(m, false);
    EXPECT_EQ(m.read(at), fault(present)) << "what AC let through is not for later";
    m.set_user(true);
    EXPECT_EQ(m.write(at), mapped(program)) << "SMAP is nothing to programs";
    m.set_user(false);
    m.paging.smap = false;
    m.set_control();
    EXPECT_EQ(m.read(at), mapped(program));
}

TEST(MmuRole, SmapIsAboutAllLevelsTogether) {
    for (unsigned level = 1; level <= 4; ++level) {
        SCOPED_TRACE(level);
        Machine m;
        m.paging.smap = true;
        m.set_control();
        const GuestFrame page = m.map_new(at);
        EXPECT_EQ(m.read(at), fault(present));
        m.change(at, us, 0, level);
        m.invlpg(at);
        EXPECT_EQ(m.read(at), mapped(page));
        m.change(at, us, us, level);
        m.invlpg(at);
        EXPECT_EQ(m.read(at), fault(present));
    }
}

TEST(MmuRole, SmapLetsTheKernelFetchUserCodeUnlessSmepForbidsIt) {
    for (const bool smep : {false, true}) {
        SCOPED_TRACE(smep);
        Machine m;
        const GuestFrame page = m.map_new(at);
        m.paging.smap = true;
        m.paging.smep = smep;
        m.set_control();
        EXPECT_EQ(m.fetch(at), smep ? fault(present | fetch) : mapped(page));
        m.enter();
        EXPECT_EQ(m.read(at), fault(present)) << "fetched or not";
        set_ac(m, true);
        EXPECT_EQ(m.access(at, {.ac = true}), mapped(page));
        EXPECT_EQ(m.fetch(at), smep ? fault(present | fetch) : mapped(page));
    }
}

TEST(MmuRole, SmapKeepsWritesFromWhatTheKernelFetches) {
    Machine m;
    const GuestFrame page = m.map_new(at, user_bits | a | d);
    m.map(large + 2 * mb, GuestFrame(0), user_bits | a | d, 2);
    m.paging.smap = true;
    m.set_control();
    EXPECT_EQ(m.fetch(at), mapped(page));
    EXPECT_TRUE(m.shadow(at).present()) << "until the next trap";
    EXPECT_EQ(m.write(at), fault(present | write));
    EXPECT_EQ(m.fetch(large + 2 * mb + 0x5000), mapped(GuestFrame(5)));
    EXPECT_EQ(m.write(large + 2 * mb + 0x5000), fault(present | write));
    set_ac(m, true);
    EXPECT_EQ(m.access(at, {.write = true, .ac = true}), mapped(page));
}

TEST(MmuRole, SmapReachesThePiecesOfALargePage) {
    Machine m;
    m.map(large, GuestFrame(0), user_bits | d, 2);
    m.map(large + 2 * mb, GuestFrame(0), kernel_bits | d, 2);
    m.paging.smap = true;
    m.set_control();
    EXPECT_EQ(m.write(large + 2 * mb + 0x5000), mapped(GuestFrame(5)));
    EXPECT_EQ(m.read(large + 0x5000), fault(present));
    EXPECT_EQ(m.fetch(large + 0x5000), mapped(GuestFrame(5)));
    m.enter();
    EXPECT_EQ(m.read(large + 0x5000), fault(present));
    EXPECT_EQ(m.write(large + 2 * mb + 0x5000), mapped(GuestFrame(5)));
    EXPECT_EQ(m.misses(), 0U) << "its pieces are still there";
}

// ---- Address spaces

TEST(MmuSpaces, ReturnToAKnownSpaceFindsItFilled) {
    Machine m;
    const GuestFrame page = m.map_new(at), second = m.new_frame();
    const GuestFrame space = m.new_space();
    m.map(space, at, second, user_bits);
    m.read(at);
    m.load_cr3(space);
    EXPECT_EQ(m.read(at), mapped(second));
    const MmuCounters before = m.mmu.counters();
    for (int i = 0; i < 3; ++i) {
        m.load_cr3(m.root);
        EXPECT_EQ(m.read(at), mapped(page));
        EXPECT_EQ(m.misses(), 0U);
        m.load_cr3(space);
        EXPECT_EQ(m.read(at), mapped(second));
        EXPECT_EQ(m.misses(), 0U);
    }
    EXPECT_EQ(m.mmu.counters().tables_built, before.tables_built);
    EXPECT_EQ(m.mmu.counters().tables_reused, before.tables_reused + 6);
    EXPECT_EQ(m.mmu.counters().fills, before.fills);
    EXPECT_EQ(m.flushes_paid + m.tables_paid, 0U);
}

TEST(MmuSpaces, KernelTablesAreShared) {
    Machine m;
    const GuestFrame page = m.map_new(kernel_at, kernel_bits | d);
    m.read(kernel_at);
    const std::size_t alone = m.pool.in_use();
    constexpr unsigned spaces = 20;
    for (unsigned i = 0; i < spaces; ++i) {
        m.load_cr3(m.new_space());
        EXPECT_EQ(m.read(kernel_at), mapped(page));
    }
    EXPECT_EQ(m.pool.in_use(), alone + spaces) << "a root each, and no more";
}

TEST(MmuSpaces, KernelChangeTouchesOneTable) {
    Machine m;
    m.map_new(kernel_at, kernel_bits);
    std::vector<GuestFrame> spaces{m.root};
    m.read(kernel_at);
    for (int i = 0; i < 10; ++i) {
        spaces.push_back(m.new_space());
        m.load_cr3(spaces.back());
        m.read(kernel_at);
    }
    const GuestFrame changed = m.new_frame();
    const MmuCounters before = m.mmu.counters();
    m.map(m.root, kernel_at, changed, kernel_bits);
    m.invlpg(kernel_at);
    for (const GuestFrame space : spaces) {
        m.load_cr3(space);
        EXPECT_EQ(m.read(kernel_at), mapped(changed));
    }
    EXPECT_EQ(m.mmu.counters().entries_dropped, before.entries_dropped + 1);
    EXPECT_EQ(m.mmu.counters().fills, before.fills + 1);
    EXPECT_EQ(m.mmu.counters().tables_built, before.tables_built);
    EXPECT_EQ(m.tables_paid, 1U);
}

TEST(MmuSpaces, ChangeWhileAwayIsSeenOnReturn) {
    Machine m;
    m.map_new(at);
    m.map_new(kernel_at);
    m.read(at);
    m.read(kernel_at);
    const GuestFrame space = m.new_space();
    m.load_cr3(space);
    EXPECT_EQ(m.read(at), fault(0));
    const GuestFrame changed = m.new_frame();
    m.map(at, changed, user_bits);
    m.change(kernel_at, p, 0);
    m.load_cr3(m.root);
    EXPECT_EQ(m.read(at), mapped(changed));
    EXPECT_EQ(m.read(kernel_at), fault(0));
}

// ---- Keeping up with the guest

TEST(MmuFlush, OldTranslationStaysUntilInvlpgOfItsAddress) {
    Machine m;
    const GuestFrame old = m.map_new(at), old_neighbour = m.map_new(neighbour);
    m.read(at);
    m.read(neighbour);
    const GuestFrame changed = m.map_new(at);
    m.map_new(neighbour);
    EXPECT_EQ(m.read(at), mapped(old));
    m.invlpg(at + 0xfff);
    EXPECT_EQ(m.read(at), mapped(changed));
    EXPECT_EQ(m.read(neighbour), mapped(old_neighbour));
    EXPECT_EQ(m.mmu.counters().entries_dropped, 1U);
}

TEST(MmuFlush, UnchangedEntriesSurvive) {
    Machine m;
    const GuestFrame page = m.map_new(at, user_bits | d);
    m.map_new(neighbour);
    m.read(at);
    m.read(neighbour);
    m.map_new(neighbour);
    m.load_cr3(m.root);
    m.invlpg(at);
    EXPECT_EQ(m.write(at), mapped(page));
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(m.mmu.counters().tables_changed, 1U);
    EXPECT_EQ(m.mmu.counters().entries_dropped, 1U);
}

TEST(MmuFlush, AnyChangeAtAnyLevelIsSeenAfterwards) {
    struct Change {
        std::uint64_t mask, bits;
        Outcome (*wanted)(GuestFrame);
        Access access;
    };
    const std::vector<Change> changes{
        {p, 0, [](GuestFrame) { return fault(write | user); }, {.write = true}},
        {rw, 0, [](GuestFrame) { return fault(present | write | user); }, {.write = true}},
        {us, 0, [](GuestFrame) { return fault(present | write | user); }, {.write = true}},
        {xd, xd, [](GuestFrame) { return fault(present | fetch | user); }, {.fetch = true}},
        {std::uint64_t{1} << 51,
         std::uint64_t{1} << 51,
         [](GuestFrame) { return fault(present | reserved | user); },
         {}},
    };
    for (const bool by_invlpg : {true, false}) {
        for (unsigned level = 1; level <= 4; ++level) {
            for (const Change& change : changes) {
                SCOPED_TRACE(
                    fmt::format("{} level {} mask {:#x}", by_invlpg ? "invlpg" : "cr3", level, change.mask));
                Machine m;
                const GuestFrame page = m.map_new(at);
                m.set_user(true);
                m.write(at);
                m.change(at, change.mask, change.bits, level);
                EXPECT_EQ(m.access(at, change.access), mapped(page)) << "not flushed yet";
                by_invlpg ? m.invlpg(at) : m.load_cr3(m.root);
                EXPECT_EQ(m.access(at, change.access), change.wanted(page));
            }
        }
    }
}

TEST(MmuFlush, OtherTableAtAnyLevelIsSeenAfterwards) {
    for (const bool by_invlpg : {true, false}) {
        for (unsigned level = 2; level <= 4; ++level) {
            SCOPED_TRACE(level);
            Machine m;
            const GuestFrame old = m.map_new(at);
            EXPECT_EQ(m.read(at), mapped(old));
            m.set_entry(at, 0, level);
            const GuestFrame changed = m.map_new(at);
            EXPECT_EQ(m.read(at), mapped(old));
            by_invlpg ? m.invlpg(at) : m.load_cr3(m.root);
            EXPECT_EQ(m.read(at), mapped(changed));
        }
    }
}

TEST(MmuFlush, MissUsesWhatTheTablesSayNow) {
    for (unsigned level = 2; level <= 4; ++level) {
        SCOPED_TRACE(level);
        Machine m;
        m.map_new(at);
        m.read(at);
        m.set_entry(at, 0, level);
        const GuestFrame page = m.map_new(neighbour); // in another table, and no flush
        EXPECT_EQ(m.read(neighbour), mapped(page));
    }
}

TEST(MmuFlush, ClearedMarksAreSetAgain) {
    for (const bool by_invlpg : {true, false}) {
        for (unsigned level = 1; level <= 4; ++level) {
            SCOPED_TRACE(level);
            Machine m;
            m.map_new(at);
            m.write(at);
            m.change(at, a, 0, level);
            m.change(at, d, 0);
            by_invlpg ? m.invlpg(at) : m.load_cr3(m.root);
            m.read(at);
            EXPECT_TRUE(m.entry(at, level).accessed());
            EXPECT_FALSE(m.entry(at).dirty());
            m.write(at);
            EXPECT_TRUE(m.entry(at).dirty());
        }
    }
}

TEST(MmuFlush, ReachesBothRoots) {
    Machine m;
    m.map_new(at);
    m.read(at);
    m.set_user(true);
    m.read(at);
    const GuestFrame changed = m.map_new(at);
    m.invlpg(at);
    EXPECT_EQ(m.read(at), mapped(changed));
    m.set_user(false);
    EXPECT_EQ(m.read(at), mapped(changed));
}

TEST(MmuFlush, ReachesTheRootsOfOtherControlBits) {
    Machine m;
    m.map_new(at);
    m.read(at);
    m.paging.write_protect = false;
    m.set_control();
    const GuestFrame changed = m.map_new(at);
    m.invlpg(at);
    m.paging.write_protect = true;
    m.set_control();
    EXPECT_EQ(m.read(at), mapped(changed));
}

TEST(MmuFlush, ReachesTablesBelowOneThatComesBack) {
    // A whole tree is unlinked; while it is, an entry in it changes; then it is linked again.
    for (const unsigned level : {2U, 3U, 4U}) {
        SCOPED_TRACE(level);
        Machine m;
        const GuestVirt sibling = level == 2 ? neighbour : at + 2 * mb;
        m.map_new(at);
        m.map_new(sibling);
        m.read(at);
        m.read(sibling);
        const GuestEntry link = m.entry(at, level);
        const GuestPhys sibling_slot = m.slot(m.root, sibling);
        m.set_entry(at, 0, level);
        m.load_cr3(m.root);
        EXPECT_EQ(m.read(sibling), fault(0));
        const GuestFrame changed = m.new_frame();
        m.put(sibling_slot, GuestEntry(changed, user_bits));
        m.load_cr3(m.root);
        m.set_entry(at, link.raw(), level);
        m.read(at);
        EXPECT_EQ(m.read(sibling), mapped(changed));
    }
}

TEST(MmuFlush, InvlpgReachesATableThatIsNotLinkedAtTheTime) {
    Machine m;
    m.map_new(at);
    m.map_new(neighbour);
    m.read(at);
    m.read(neighbour);
    const GuestEntry link = m.entry(at, 2);
    const GuestPhys slot = m.slot(m.root, neighbour);
    m.set_entry(at, 0, 2);
    m.invlpg(at);
    const GuestFrame changed = m.new_frame();
    m.put(slot, GuestEntry(changed, user_bits));
    m.invlpg(neighbour);
    m.set_entry(at, link.raw(), 2);
    m.read(at);
    EXPECT_EQ(m.read(neighbour), mapped(changed));
}

TEST(MmuFlush, InvlpgOfNonCanonicalAndSwitcherAddressesDoesNothing) {
    Machine m;
    const GuestFrame page = m.map_new(at);
    m.read(at);
    m.invlpg(GuestVirt(0x8000'0000'0000));
    m.invlpg(paging_4_level.sign_extend(std::uint64_t{m.mmu.reserved_slot()} << 39));
    EXPECT_EQ(m.read(at), mapped(page));
    EXPECT_EQ(m.misses(), 0U);
}

TEST(MmuFlush, InvlpgForgetsTheUpperEntriesOfAllAddresses) {
    // An upper entry for `at` is changed, and INVLPG is of another address. What is written below the old
    // table after that is nothing that `at` could have been translated by: an old upper entry is gone from
    // the paging-structure caches, and the new one leads elsewhere.
    for (unsigned level = 2; level <= 4; ++level) {
        SCOPED_TRACE(level);
        Machine m;
        const GuestFrame old = m.map_new(at);
        m.read(at);
        // The same tables below another address.
        const GuestVirt alias = kernel_at + (at.value() & (paging_4_level.level(level).span() - 1));
        m.map_new(alias + 4 * gb); // makes the tables above
        const GuestVirt other = alias + 4 * gb;
        const std::uint64_t link = m.entry(at, level).raw();
        for (unsigned above = 4; above > level; --above) {
            if (!m.entry(alias, above).present())
                m.set_entry(alias, m.new_frame().base().value() | user_bits, above);
        }
        m.set_entry(alias, link, level);
        EXPECT_EQ(m.read(alias), mapped(old));
        m.read(other);

        m.set_entry(at, 0, level);
        const GuestFrame changed = m.map_new(at);
        m.invlpg(other);
        EXPECT_NE(m.read(at).address, std::nullopt) << "the old or the new one";
        const GuestFrame latest = m.map_new(alias + page_size);
        EXPECT_EQ(m.read(alias + page_size), mapped(latest));
        EXPECT_EQ(m.read(neighbour), fault(0)) << "not through what `at` had before";
        m.invlpg(at);
        EXPECT_EQ(m.read(at), mapped(changed));
    }
}

TEST(MmuFlush, NewLinkGivesNoOlderEntries) {
    // No CPU has an entry below a link that is older than the link itself.
    for (unsigned level = 2; level <= 4; ++level) {
        SCOPED_TRACE(level);
        Machine m;
        const GuestVirt sibling = at + page_size;
        m.map_new(at);
        const GuestFrame old = m.map_new(sibling);
        m.read(at);
        m.read(sibling);
        const GuestFrame changed = m.map_new(sibling); // not flushed
        EXPECT_EQ(m.read(sibling), mapped(old));
        const GuestVirt alias = paging_4_level.sign_extend(at.value() + paging_4_level.level(level).span());
        m.set_entry(alias, m.entry(at, level).raw(), level);
        m.read(alias);
        EXPECT_EQ(m.read(alias + page_size), mapped(changed));
    }
}

// ---- Guest tables in odd places

TEST(MmuTables, FrameReusedAsData) {
    Machine m;
    m.map_new(at);
    m.read(at);
    const GuestFrame table = m.entry(at, 2).table();
    m.set_entry(at, 0, 2);
    m.load_cr3(m.root);
    m.map(far, table, user_bits);
    for (std::uint64_t i = 0; i < entries_per_table; ++i)
        m.put(FakeMachine::slot_of(table, i), GuestEntry(~i));
    EXPECT_EQ(m.write(far), mapped(table));
    EXPECT_EQ(m.read(at), fault(0));
    // And as a table again, with what it holds now.
    m.put(FakeMachine::slot_of(table, paging_4_level.level(1).index(at)),
          GuestEntry(GuestFrame(5), user_bits));
    m.set_entry(at, table.base().value() | user_bits, 2);
    EXPECT_EQ(m.read(at), mapped(GuestFrame(5)));
}

TEST(MmuTables, OneFrameAsTablesOfAllLevels) {
    Machine m;
    const GuestFrame frame = m.new_frame(), page = m.new_frame();
    for (unsigned i = 0; i < 4; ++i)
        m.put(FakeMachine::slot_of(frame, i), GuestEntry(i == 3 ? page : frame, user_bits));
    m.load_cr3(frame);
    // Three entries refer to the frame itself, one to a page that holds zeroes.
    EXPECT_EQ(m.read(GuestVirt(0)), mapped(frame));
    EXPECT_EQ(m.read(GuestVirt(3 * page_size)), mapped(page));
    EXPECT_EQ(m.read(GuestVirt(gb + 2 * mb + 3 * page_size)), mapped(page));
    EXPECT_EQ(m.read(GuestVirt(6 * mb)), fault(0)) << "the page as a table";
    const GuestFrame changed = m.new_frame();
    m.put(FakeMachine::slot_of(frame, 3), GuestEntry(changed, user_bits));
    m.invlpg(GuestVirt(3 * page_size));
    EXPECT_EQ(m.read(GuestVirt(3 * page_size)), mapped(changed));
}

TEST(MmuTables, SelfReference) {
    Machine m;
    constexpr std::uint64_t self = 511;
    m.put(FakeMachine::slot_of(m.root, self), GuestEntry(m.root, kernel_bits));
    const GuestFrame page = m.map_new(at);
    EXPECT_EQ(m.read(at), mapped(page));
    const auto view = [](std::uint64_t pml4, std::uint64_t pdpt, std::uint64_t pd, std::uint64_t pt) {
        return paging_4_level.sign_extend(pml4 << 39 | pdpt << 30 | pd << 21 | pt << 12);
    };
    const auto index = [](unsigned level) { return std::uint64_t{paging_4_level.level(level).index(at)}; };
    EXPECT_EQ(m.write(view(self, self, self, self)), mapped(m.root));
    EXPECT_EQ(m.write(view(self, self, self, index(4))), mapped(m.entry(at, 4).table()));
    EXPECT_EQ(m.write(view(self, self, index(4), index(3))), mapped(m.entry(at, 3).table()));
    const GuestVirt table = view(self, index(4), index(3), index(2));
    EXPECT_EQ(m.write(table), mapped(m.entry(at, 2).table()));
    // The guest changes the mapping through this view.
    const GuestFrame changed = m.new_frame();
    const auto slot = m.write(table + index(1) * 8).address.value();
    m.put(GuestPhys(slot.value()), GuestEntry(changed, user_bits));
    m.invlpg(at);
    EXPECT_EQ(m.read(at), mapped(changed));
    // Unlinking the last table changes the view as well.
    m.set_entry(at, 0, 2);
    m.invlpg(table);
    EXPECT_EQ(m.read(table), fault(0));
}

// ---- The switcher's slot

GuestVirt top_level(unsigned slot) {
    return paging_4_level.sign_extend(std::uint64_t{slot} << 39);
}

TEST(MmuSlot, IsCarriedByEveryRootAndClosedToTheGuest) {
    Machine m;
    const GuestVirt reserved_at = top_level(m.mmu.reserved_slot());
    EXPECT_EQ(m.read(reserved_at), fault(0)) << "the guest has nothing there";
    m.set_user(true);
    EXPECT_EQ(m.read(reserved_at), fault(user));
    EXPECT_EQ(m.mmu.counters().slot_moves, 0U);
    for (const bool as_user : {false, true})
        EXPECT_EQ(m.shadow(reserved_at, 4, as_user), FakeMachine::switcher);
}

TEST(MmuSlot, MovesWhenTheGuestUsesIt) {
    Machine m;
    m.map_new(at);
    m.read(at);
    m.set_user(true);
    m.read(at);
    const unsigned before = m.mmu.reserved_slot();
    const GuestFrame page = m.map_new(top_level(before) + 0x5000);
    EXPECT_EQ(m.read(top_level(before) + 0x5000), mapped(page));
    EXPECT_NE(m.mmu.reserved_slot(), before);
    EXPECT_EQ(m.mmu.counters().slot_moves, 1U);
    EXPECT_GE(m.tables_paid, 2U) << "in the loaded roots a present entry has changed";
    for (const bool as_user : {false, true})
        EXPECT_EQ(m.shadow(top_level(m.mmu.reserved_slot()), 4, as_user), FakeMachine::switcher);
    m.set_user(false);
    EXPECT_EQ(m.read(top_level(before) + 0x5000), mapped(page));
}

TEST(MmuSlot, AvoidsWhatTheMachineCannotUseThere) {
    FakeMachine::Options options;
    MmuConfig config = FakeMachine::config(options);
    config.usable_slots.assign(entries_per_table, false);
    config.usable_slots[300] = config.usable_slots[77] = true;
    FakeMachine m(options);
    ShadowTables tables(m.memory, m.pool, config, FakeMachine::switcher);
    Mmu mmu(tables);
    GuestPaging paging;
    paging.root = m.new_frame();
    m.map(paging.root, top_level(300), m.new_frame(), user_bits);
    m.map(paging.root, top_level(77), m.new_frame(), user_bits);
    mmu.set_paging(paging);
    mmu.flush();
    EXPECT_EQ(mmu.fault(top_level(300), {}).outcome, Miss::no_slot);
    m.put(m.slot(paging.root, top_level(77), 4), GuestEntry());
    EXPECT_EQ(mmu.fault(top_level(300), {}).outcome, Miss::filled);
    EXPECT_EQ(mmu.reserved_slot(), 77U);
}

TEST(MmuSlot, TheLastFreeSlotIsFound) {
    Machine m;
    const GuestFrame page = m.map_new(top_level(0));
    const std::uint64_t link = m.get(m.root.base()).raw();
    constexpr unsigned last = 123;
    for (unsigned slot = 0; slot < entries_per_table; ++slot) {
        if (slot != last)
            m.put(FakeMachine::slot_of(m.root, slot), GuestEntry(link));
    }
    for (unsigned slot = 0; slot < entries_per_table; ++slot) {
        if (slot != last) {
            EXPECT_EQ(m.read(top_level(slot)), mapped(page)) << slot;
        }
    }
    EXPECT_EQ(m.mmu.reserved_slot(), last);
    EXPECT_EQ(m.mmu.counters().slot_moves, 1U);

    m.put(FakeMachine::slot_of(m.root, last), GuestEntry(link));
    Outcome full;
    full.no_slot = true;
    EXPECT_EQ(m.read(top_level(last)), full);
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
    EXPECT_EQ(m.read(top_level(5)), mapped(page)) << "only that access has failed";
}

TEST(MmuSlot, SpacesNeedNoCommonFreeSlot) {
    Machine m;
    const GuestFrame page = m.map_new(top_level(0));
    const std::uint64_t link = m.get(m.root.base()).raw();
    const GuestFrame space = m.new_frame();
    for (unsigned slot = 0; slot < entries_per_table; ++slot)
        m.put(FakeMachine::slot_of(slot < 256 ? m.root : space, slot), GuestEntry(link));
    for (int i = 0; i < 2; ++i) {
        m.load_cr3(m.root);
        for (unsigned slot = 0; slot < 256; ++slot)
            EXPECT_EQ(m.read(top_level(slot)), mapped(page)) << slot;
        m.load_cr3(space);
        for (unsigned slot = 256; slot < 512; ++slot)
            EXPECT_EQ(m.read(top_level(slot)), mapped(page)) << slot;
    }
}

TEST(MmuSlot, ModesBelow4GbTakeOnlyTheFirst) {
    // Whatever lies in the page of CR3: its entries are not those of the top level.
    for (const PagingFormat* format : {&paging_off, &paging_32_bit_pse, &paging_pae}) {
        SCOPED_TRACE(format->levels.size());
        Machine m({.first_slot = 0});
        const GuestFrame cr3 = m.new_frame();
        const std::uint64_t page = 4 * mb | user_bits | ps;
        for (unsigned i = 0; i < entries_per_table; ++i) // two entries of 4 bytes, or one of 8
            m.put(FakeMachine::slot_of(cr3, i), GuestEntry(format == &paging_pae ? page : page | page << 32));
        m.paging.format = format;
        for (std::uint64_t& pdpte : m.paging.pdptes)
            pdpte = cr3.base().value() | p;
        m.load_cr3(cr3);
        EXPECT_EQ(m.read(GuestVirt(4 * mb + 0x5000)), mapped(GuestFrame((4 * mb >> page_shift) + 5)));
        EXPECT_NE(m.mmu.reserved_slot(), 0U);
    }
}

// ---- The pool's limits

TEST(MmuPool, IdleTablesAreRecycled) {
    Machine m({.pool_pages = 16});
    std::vector<std::pair<GuestFrame, GuestFrame>> spaces;
    for (int i = 0; i < 40; ++i) {
        const GuestFrame space = m.new_frame(), page = m.new_frame();
        m.map(space, at, page, user_bits);
        spaces.emplace_back(space, page);
    }
    for (int round = 0; round < 3; ++round) {
        for (const auto& [space, page] : spaces) {
            m.load_cr3(space);
            EXPECT_EQ(m.read(at), mapped(page));
            m.set_user(true);
            EXPECT_EQ(m.write(at), mapped(page));
            m.set_user(false);
        }
    }
    EXPECT_GT(m.mmu.counters().tables_recycled, 100U);
    EXPECT_LE(m.pool.high_water(), 16U);
}

TEST(MmuPool, LeastRecentlyUsedGoesFirst) {
    Machine m({.pool_pages = 16});
    std::vector<GuestFrame> spaces;
    for (int i = 0; i < 12; ++i) {
        spaces.push_back(m.new_frame());
        m.map(spaces.back(), at, m.new_frame(), user_bits);
    }
    // The first space is visited between any two others: it stays, and they go.
    m.load_cr3(spaces[0]);
    m.read(at);
    for (std::size_t i = 1; i < spaces.size(); ++i) {
        m.load_cr3(spaces[i]);
        m.read(at);
        m.load_cr3(spaces[0]);
        m.read(at);
        EXPECT_EQ(m.misses(), 0U);
    }
    EXPECT_GT(m.mmu.counters().tables_recycled, 0U);
}

TEST(MmuPool, OneSpaceLargerThanThePoolStartsOver) {
    for (const std::size_t pages : {16U, 32U, 48U}) {
        SCOPED_TRACE(pages);
        Machine m({.pool_pages = pages});
        std::vector<GuestFrame> frames;
        for (std::uint64_t i = 0; i < 64; ++i)
            frames.push_back(m.map_new(at + i * 2 * mb));
        for (int round = 0; round < 2; ++round) {
            for (std::uint64_t i = 0; i < frames.size(); ++i) {
                EXPECT_EQ(m.write(at + i * 2 * mb), mapped(frames[i]));
                EXPECT_LE(m.misses(), 1U);
                EXPECT_EQ(m.read(at + i * 2 * mb), mapped(frames[i]));
                EXPECT_EQ(m.misses(), 0U);
            }
        }
        EXPECT_LE(m.pool.high_water(), pages);
    }
}

TEST(MmuPool, SplinteringSurvivesExhaustion) {
    Machine m({.pool_pages = 16});
    m.map(giant, GuestFrame(0), user_bits, 3);
    for (std::uint64_t i = 0; i < 64; ++i) {
        EXPECT_EQ(m.write(giant + i * 2 * mb + 0xb'8000), mapped(GuestFrame(i * 512 + 0xb8)));
    }
    EXPECT_EQ(m.read(giant), mapped(GuestFrame(0)));
}

// ---- Debts

/// Runs on the Mmu without a machine that pays.
class MmuDebt : public ::testing::Test {
  public:
    void fill(GuestVirt address, bool for_write = false) {
        ASSERT_EQ(m.mmu.fault(address, {.write = for_write}).outcome, Miss::filled);
    }
    std::multiset<TableIndex> owed() {
        (void)m.mmu.shadow_walk(at, false); // needs the root
        return {m.mmu.debt().tables.begin(), m.mmu.debt().tables.end()};
    }
    Machine m;
};

TEST_F(MmuDebt, MakingEntriesPresentOwesNothing) {
    m.map_new(at);
    fill(at);
    EXPECT_TRUE(m.mmu.debt().none());
    fill(at, true);
    EXPECT_EQ(m.mmu.counters().upgrades, 1U);
    EXPECT_TRUE(m.mmu.debt().none());
    m.map(large + 8 * mb, GuestFrame(0), user_bits, 2);
    fill(large + 8 * mb);
    EXPECT_TRUE(m.mmu.debt().none());
    EXPECT_FALSE(m.mmu.debt().root_gone);
}

TEST_F(MmuDebt, EachChangedTableIsOwedOnceUntilPaid) {
    const GuestVirt other = at + 2 * mb;
    for (const GuestVirt address : {at, neighbour, other}) {
        m.map_new(address);
        fill(address);
    }
    const TableIndex first = m.table(at, 1), second = m.table(other, 1);
    for (const GuestVirt address : {at, neighbour, other})
        m.change(address, p, 0);
    m.mmu.invalidate(at);
    m.mmu.invalidate(neighbour);
    EXPECT_EQ(owed(), (std::multiset{first}));
    m.mmu.invalidate(other);
    EXPECT_EQ(owed(), (std::multiset{first, second}));
    EXPECT_TRUE(m.mmu.debt().flush);
    EXPECT_FALSE(m.mmu.debt().root_gone);
    m.enter();
    EXPECT_TRUE(m.mmu.debt().none());

    m.change(at, p, p);
    fill(at);
    EXPECT_TRUE(m.mmu.debt().none());
    m.change(at, p, 0);
    m.mmu.flush();
    EXPECT_EQ(owed(), (std::multiset{first})) << "again, after it was paid";
}

TEST_F(MmuDebt, ReplacedLeafIsOwed) {
    m.map_new(at);
    fill(at);
    m.map_new(at); // not flushed: the fault comes because the page is clean
    fill(at, true);
    EXPECT_EQ(owed(), (std::multiset{m.table(at, 1)}));
}

TEST_F(MmuDebt, FewerRightsAreOwedThoughOthersAreGained) {
    m.map_new(at);
    fill(at);
    m.change(at, xd, xd); // not flushed
    fill(at, true);
    EXPECT_EQ(owed(), (std::multiset{m.table(at, 1)}));
}

TEST_F(MmuDebt, UnlinkedTreeIsOwedAtTheLinkOnly) {
    m.map_new(at);
    fill(at);
    const TableIndex directory = m.table(at, 3);
    m.set_entry(at, 0, 3);
    m.mmu.flush();
    EXPECT_EQ(owed(), (std::multiset{directory}));
}

TEST_F(MmuDebt, RecycledTablesAreOwed) {
    Machine tiny({.pool_pages = 16});
    for (int i = 0; i < 4; ++i) {
        const GuestFrame space = tiny.new_frame();
        tiny.map(space, at, tiny.new_frame(), user_bits);
        tiny.paging.root = space;
        tiny.mmu.set_paging(tiny.paging);
        tiny.mmu.flush();
        ASSERT_EQ(tiny.mmu.fault(at, {}).outcome, Miss::filled);
    }
    EXPECT_EQ(tiny.mmu.debt().tables.size(), tiny.mmu.counters().tables_recycled);
    EXPECT_TRUE(tiny.mmu.debt().root_gone);
}

TEST_F(MmuDebt, WhereStoresAreSeenOnlyTheFlushIsOwed) {
    Machine seeing({.stores_seen = true});
    seeing.map_new(at);
    ASSERT_EQ(seeing.mmu.fault(at, {}).outcome, Miss::filled);
    EXPECT_TRUE(seeing.mmu.debt().none());
    seeing.change(at, p, 0);
    seeing.mmu.invalidate(at);
    EXPECT_TRUE(seeing.mmu.debt().tables.empty());
    EXPECT_TRUE(seeing.mmu.debt().flush);
    seeing.enter();
    EXPECT_TRUE(seeing.mmu.debt().none());
}

TEST_F(MmuDebt, ResetTakesTheRootsAway) {
    const GuestFrame page = m.map_new(at);
    fill(at);
    m.mmu.reset();
    EXPECT_TRUE(m.mmu.debt().root_gone);
    EXPECT_TRUE(m.mmu.debt().flush);
    EXPECT_EQ(m.mmu.debt().tables.size(), 4U);
    EXPECT_EQ(m.pool.in_use(), 0U);
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
    m.enter();
    EXPECT_FALSE(m.mmu.debt().root_gone);
    EXPECT_EQ(m.read(at), mapped(page));
}

// ---- The audit: each rule broken once, through the tables' memory

class MmuAudit : public ::testing::Test {
  public:
    MmuAudit() {
        m.map_new(at);
        m.map(large + 8 * mb, GuestFrame(4 * mb >> page_shift), user_bits | d, 2);
        m.read(at);
        m.read(large + 8 * mb);
    }
    void expect_broken(const std::string& words) {
        const auto rule = m.mmu.audit();
        ASSERT_NE(rule, std::nullopt);
        EXPECT_NE(rule->find(words), std::string::npos) << *rule;
    }
    Machine m;
};

TEST_F(MmuAudit, NothingIsBroken) {
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
}

TEST_F(MmuAudit, RootWithoutSwitcher) {
    m.pool.entries(m.table(at, 4))[m.mmu.reserved_slot()] = ShadowEntry();
    expect_broken("does not carry the switcher in slot 300");
}

TEST_F(MmuAudit, SupervisorEntry) {
    ShadowEntry& entry = m.shadow_slot(at);
    entry = ShadowEntry(entry.raw() & ~us);
    expect_broken("is not accessible at CPL 3");
}

TEST_F(MmuAudit, LeafOutsideTheGuest) {
    for (const MachineFrame frame : {FakeMachine::pool_first, FakeMachine::switcher.table()}) {
        m.shadow_slot(at) = ShadowEntry(frame, user_bits);
        expect_broken("which is not the guest's");
    }
}

TEST_F(MmuAudit, LargeLeafOutsideTheGuest) {
    // Part of the first leads to RAM, part to no memory: an entry of this size must not.
    for (const MachineFrame frame : {MachineFrame(0), FakeMachine::pool_first, FakeMachine::nothing}) {
        m.shadow_slot(large + 8 * mb, 2) = ShadowEntry(frame, user_bits | ps);
        expect_broken("which is not the guest's");
    }
}

TEST_F(MmuAudit, LinkToNoTable) {
    for (const MachineFrame frame : {FakeMachine::pool_first + 500, MachineFrame(5)}) {
        m.shadow_slot(at, 3) = ShadowEntry(frame, user_bits);
        expect_broken("refers to no live table");
    }
}

TEST_F(MmuAudit, LinkToATableOfAnotherLevel) {
    m.shadow_slot(at, 3) = ShadowEntry(m.pool.frame(m.table(at, 1)), user_bits);
    expect_broken("refers to a table of level 1 instead of 2");
}

TEST_F(MmuAudit, LinkToATableThatIsNotInStep) {
    const ShadowEntry link = m.shadow_slot(at, 2);
    m.set_entry(at, 0, 2);
    m.invlpg(at);
    m.load_cr3(m.root);
    m.shadow_slot(at, 2) = link;
    expect_broken("a table at or below table");
}

TEST_F(MmuAudit, UncountedReference) {
    m.shadow_slot(large + 8 * mb, 2) = m.shadow_slot(at, 2);
    expect_broken("counts 1 uses but 2 entries refer to it");
}

TEST_F(MmuAudit, LostReference) {
    m.shadow_slot(at, 2) = ShadowEntry();
    expect_broken("counts 1 uses but 0 entries refer to it");
}

TEST_F(MmuAudit, PageThatNobodyOwns) {
    ASSERT_TRUE(m.pool.allocate());
    expect_broken("4 tables live, 5 pages in use, 4 keys known");
}

} // namespace
} // namespace umbra::test
