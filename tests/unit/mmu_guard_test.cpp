// Unit tests of the shadow MMU's guards (shadow/shadow_tables.hpp) on a machine in plain memory: what they
// catch and what they leave alone, by frame and by address, and how one access is let through.
#include "tests/unit/mmu_machine.hpp"

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace umbra::test {
namespace {

inline constexpr Outcome guarded{.address = {}, .error_code = {}, .guarded = true};
inline constexpr Guard no_reads{.read = true}, no_writes{.write = true}, no_fetches{.fetch = true};
/// Guards, of which only some kinds are given.
struct Wanted {
    std::map<GuestFrame, Guard> frames = {};
    std::map<GuestVirt, Guard> pages = {};
    std::set<std::pair<GuestVirt, GuestFrame>> executable = {};

    operator Guards() const { return {frames, pages, executable}; }
};
/// Translated by another table of level 1, by the entry of the same number.
inline constexpr GuestVirt same_slot = at + 2 * mb;
static_assert(paging_4_level.level(1).index(same_slot) == paging_4_level.level(1).index(at));

/// The rules are audited at each entry (FakeMachine::enter).
class MmuGuard : public ::testing::TestWithParam<bool> {
  public:
    void set(const Wanted& guards) {
        m.mmu.set_guards(guards);
        m.enter();
    }
    void open() {
        m.mmu.begin_guarded_access();
        m.enter();
    }
    void finish() {
        m.mmu.finish_guarded_access();
        m.enter();
    }
    /// What read, write and fetch meet there.
    void expect(GuestVirt address, const Outcome& read, const Outcome& write, const Outcome& fetch) {
        SCOPED_TRACE(fmt::format("{}", address));
        EXPECT_EQ(m.read(address), read) << "read";
        EXPECT_EQ(m.write(address), write) << "write";
        EXPECT_EQ(m.fetch(address), fetch) << "fetch";
    }
    void expect_all(GuestVirt address, const Outcome& outcome) { expect(address, outcome, outcome, outcome); }

    /// What is not guarded may be taken for guarded where tables are shared, and then is let through.
    void expect_let_through(GuestVirt address, const Outcome& outcome) {
        SCOPED_TRACE(fmt::format("{}", address));
        for (const Access access : {Access{}, Access{.write = true}, Access{.fetch = true}}) {
            if (const Outcome first = m.access(address, access); first != guarded) {
                EXPECT_EQ(first, outcome);
                continue;
            }
            open();
            EXPECT_EQ(m.access(address, access), outcome);
            finish();
        }
    }

    Machine m{{.stores_seen = GetParam()}};
};
INSTANTIATE_TEST_SUITE_P(Hosts, MmuGuard, ::testing::Bool(), [](const auto& host) {
    return std::string(host.param ? "StoresSeen" : "StoresNotSeen");
});

// ---- Frames

TEST_P(MmuGuard, OnAFrameHoldsByWhateverAddress) {
    const GuestFrame frame = m.map_new(at), other = m.map_new(neighbour);
    m.map(far, frame);
    expect_all(at, mapped(frame));
    expect_all(far, mapped(frame));
    set({.frames = {{frame, no_reads}}});
    expect_all(at, guarded);
    expect_all(far, guarded);
    expect_all(neighbour, mapped(other));
}

TEST_P(MmuGuard, OnAFrameHoldsWhereItIsMappedLater) {
    const GuestFrame frame = m.new_frame(), other = m.map_new(at);
    set({.frames = {{frame, no_writes}}});
    expect_all(at, mapped(other));
    m.map(at, frame);
    m.invlpg(at);
    expect(at, mapped(frame), guarded, mapped(frame));
    m.map(at, other);
    m.invlpg(at);
    expect_all(at, mapped(other));
}

TEST_P(MmuGuard, OnAFrameTellsWhichByteIsAccessed) {
    const GuestFrame frame = m.map_new(at);
    set({.frames = {{frame, no_reads}}});
    m.mmu.left();
    const MissResult miss = m.mmu.fault(at + 0x123, {});
    EXPECT_EQ(miss.outcome, Miss::guarded);
    EXPECT_EQ(miss.address, frame.base() + 0x123);
}

// ---- Pages

TEST_P(MmuGuard, OnAPageHoldsInEveryAddressSpaceAndForEveryFrame) {
    const GuestFrame frame = m.map_new(at), space = m.new_space(), its_frame = m.new_frame();
    m.map(far, frame); // by this address it is not guarded
    m.FakeMachine::map(space, at, its_frame, user_bits);
    set({.pages = {{at, no_writes}}});
    expect(at, mapped(frame), guarded, mapped(frame));
    expect_all(far, mapped(frame));
    m.load_cr3(space);
    expect(at, mapped(its_frame), guarded, mapped(its_frame));
    const GuestFrame new_one = m.new_frame();
    m.FakeMachine::map(space, at, new_one, user_bits);
    m.invlpg(at);
    expect(at, mapped(new_one), guarded, mapped(new_one));
}

TEST_P(MmuGuard, OnAPageHoldsForKernelAndPrograms) {
    const GuestFrame frame = m.map_new(at);
    set({.pages = {{at, no_reads}}});
    expect_all(at, guarded);
    m.set_user(true);
    expect_all(at, guarded);
    set({.pages = {{at, no_writes}}});
    expect(at, mapped(frame), guarded, mapped(frame));
}

TEST_P(MmuGuard, WhereNothingIsMappedIsTheGuestsFault) {
    set({.pages = {{at, no_reads}, {neighbour, no_writes}}});
    EXPECT_EQ(m.read(at), fault(0));
    m.map_new(at);
    EXPECT_EQ(m.read(at), guarded);
    const GuestFrame read_only = m.map_new(neighbour, p);
    EXPECT_EQ(m.write(neighbour), fault(present | write)) << "before the guard";
    EXPECT_EQ(m.read(neighbour), mapped(read_only));
}

TEST_P(MmuGuard, HoldsBeforePagingIsOn) {
    const GuestVirt here(2 * mb + 5 * page_size);
    const GuestFrame frame(here.value() >> page_shift);
    m.paging.format = &paging_off;
    m.set_control();
    expect_all(here, mapped(frame));
    set({.pages = {{here, no_writes}}});
    expect(here, mapped(frame), guarded, mapped(frame));
    expect_all(here + page_size, mapped(frame + 1));
    set({.frames = {{frame + 1, no_reads}}});
    expect_all(here, mapped(frame));
    expect_all(here + page_size, guarded);
}

// ---- Kinds

TEST_P(MmuGuard, OfReadsTrapsEverything) {
    const GuestFrame frame = m.map_new(at);
    for (const Wanted& guards : {Wanted{.frames = {{frame, no_reads}}}, Wanted{.pages = {{at, no_reads}}}}) {
        set(guards);
        expect_all(at, guarded);
    }
}

TEST_P(MmuGuard, OfWritesLeavesReadsAndFetches) {
    const GuestFrame frame = m.map_new(at, user_bits | d); // dirty: filled writable but for the guard
    for (const Wanted& guards :
         {Wanted{.frames = {{frame, no_writes}}}, Wanted{.pages = {{at, no_writes}}}}) {
        set(guards);
        expect(at, mapped(frame), guarded, mapped(frame));
    }
}

TEST_P(MmuGuard, OfFetchesLeavesData) {
    const GuestFrame frame = m.map_new(at);
    for (const Wanted& guards :
         {Wanted{.frames = {{frame, no_fetches}}}, Wanted{.pages = {{at, no_fetches}}}}) {
        set(guards);
        expect(at, mapped(frame), mapped(frame), guarded);
    }
}

TEST_P(MmuGuard, OfAFrameAndOfAPageAddUp) {
    const GuestFrame frame = m.map_new(at);
    m.map(far, frame);
    set({.frames = {{frame, no_writes}}, .pages = {{at, no_fetches}}});
    expect(at, mapped(frame), guarded, guarded);
    expect(far, mapped(frame), guarded, mapped(frame));
}

TEST_P(MmuGuard, LeavesTheGuestsAccessedAndDirtyBitsRight) {
    m.map_new(at);
    set({.pages = {{at, no_writes}}});
    m.read(at);
    EXPECT_TRUE(m.entry(at).accessed());
    EXPECT_FALSE(m.entry(at).dirty());
}

// ---- What is not guarded

TEST_P(MmuGuard, LeavesTheOtherPagesOfGuardedTables) {
    m.map_new(at);
    m.map_new(same_slot + page_size);
    const GuestFrame next = m.map_new(neighbour + page_size), beside = m.map_new(same_slot);
    set({.pages = {{at, no_reads}, {same_slot + page_size, no_reads}}});
    expect_all(at, guarded);
    expect_all(same_slot + page_size, guarded);
    expect_all(neighbour + page_size, mapped(next));
    expect_let_through(same_slot, mapped(beside));
}

// ---- Large pages

TEST_P(MmuGuard, SplitsALargePageWhereItIsGuardedOnly) {
    const GuestFrame first(4 * mb >> page_shift), second(8 * mb >> page_shift);
    m.map(large, first, user_bits | d, 2);
    m.map(large + 2 * mb, second, user_bits | d, 2);
    for (const Wanted& guards : {Wanted{.frames = {{first + 5, no_writes}}},
                                 Wanted{.pages = {{large + 5 * page_size, no_writes}}}}) {
        set(guards);
        expect(large + 5 * page_size, mapped(first + 5), guarded, mapped(first + 5));
        expect_all(large + 6 * page_size, mapped(first + 6));
        expect_all(large + 2 * mb + 5 * page_size, mapped(second + 5));
        EXPECT_FALSE(m.shadow(large, 2).leaf(paging_4_level.level(2)));
        EXPECT_TRUE(m.shadow(large + 2 * mb, 2).leaf(paging_4_level.level(2)));
    }
}

TEST_P(MmuGuard, SplitsAHugePageIntoLargeOnes) {
    const GuestFrame first(FakeMachine::high >> page_shift);
    m.map(giant, first, user_bits | d, 3);
    const GuestVirt here = giant + 6 * mb + 7 * page_size;
    const GuestFrame frame = first + ((6 * mb >> page_shift) + 7);
    for (const Wanted& guards :
         {Wanted{.frames = {{frame, no_reads}}}, Wanted{.pages = {{here, no_reads}}}}) {
        set(guards);
        expect_all(here, guarded);
        expect_all(here + page_size, mapped(frame + 1));
        expect_all(here + 2 * mb, mapped(frame + (2 * mb >> page_shift)));
        EXPECT_FALSE(m.shadow(here, 3).leaf(paging_4_level.level(3)));
        EXPECT_FALSE(m.shadow(here, 2).leaf(paging_4_level.level(2)));
        EXPECT_TRUE(m.shadow(here + 2 * mb, 2).leaf(paging_4_level.level(2)));
    }
}

TEST_P(MmuGuard, OnAPageLeavesTheLargePageAtAnotherAddress) {
    const GuestFrame first(4 * mb >> page_shift);
    const GuestVirt alias = large + 16 * mb;
    m.map(large, first, user_bits | d, 2);
    m.map(alias, first, user_bits | d, 2);
    set({.pages = {{large + 5 * page_size, no_writes}}});
    expect(large + 5 * page_size, mapped(first + 5), guarded, mapped(first + 5));
    expect_all(alias + 5 * page_size, mapped(first + 5));
    EXPECT_TRUE(m.shadow(alias, 2).leaf(paging_4_level.level(2)));
}

// ---- Prefetch

TEST(MmuGuardPrefetch, FillsNothingThatIsGuarded) {
    Machine m({.prefetch = 16});
    const GuestVirt group = at - 8 * page_size;
    std::vector<GuestFrame> frames;
    for (std::uint64_t i = 0; i < 16; ++i)
        frames.push_back(m.map_new(group + i * page_size, user_bits | a | d));
    m.mmu.set_guards(
        Wanted{.frames = {{frames[1], no_reads}, {frames[2], no_writes}, {frames[3], no_fetches}},
               .pages = {{group + 4 * page_size, no_reads},
                         {group + 5 * page_size, no_writes},
                         {group + 6 * page_size, no_fetches}}});
    m.enter();
    EXPECT_EQ(m.read(group), mapped(frames[0]));
    for (const unsigned i : {1U, 4U})
        EXPECT_FALSE(m.shadow(group + i * page_size).present()) << i;
    for (const unsigned i : {2U, 5U})
        EXPECT_FALSE(m.shadow(group + i * page_size).writable()) << i;
    for (const unsigned i : {3U, 6U})
        EXPECT_TRUE(m.shadow(group + i * page_size).no_execute()) << i;
    for (const unsigned i : {7U, 15U})
        EXPECT_TRUE(m.shadow(group + i * page_size).writable()) << i;
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
}

// ---- One access let through

TEST_P(MmuGuard, OpenedLetsTheAccessThroughAndIsInForceAgain) {
    const GuestFrame frame = m.map_new(at);
    for (const Wanted& guards : {Wanted{.frames = {{frame, no_reads}}}, Wanted{.pages = {{at, no_reads}}}}) {
        set(guards);
        for (int round = 0; round < 3; ++round) {
            EXPECT_EQ(m.write(at), guarded);
            open();
            EXPECT_EQ(m.write(at), mapped(frame));
            EXPECT_EQ(m.read(at + 8), mapped(frame, 8)) << "an instruction may read and write";
            finish();
            expect_all(at, guarded);
        }
    }
}

TEST_P(MmuGuard, OpenedLetsNoOtherPageThrough) {
    const GuestFrame frame = m.map_new(at), next = m.map_new(neighbour), beside = m.map_new(same_slot);
    set({.frames = {{frame, no_reads}, {next, no_reads}, {beside, no_reads}}});
    EXPECT_EQ(m.read(at), guarded);
    open();
    EXPECT_EQ(m.read(at), mapped(frame));
    expect_all(neighbour, guarded);
    expect_all(same_slot, guarded);
    finish();
    set({.pages = {{at, no_reads}, {neighbour, no_reads}, {same_slot, no_reads}}});
    EXPECT_EQ(m.read(at), guarded);
    open();
    EXPECT_EQ(m.read(at), mapped(frame));
    expect_all(neighbour, guarded);
    expect_all(same_slot, guarded);
    finish();
    expect_all(at, guarded);
}

TEST_P(MmuGuard, OpenedForSeveralPagesOneAfterTheOther) {
    const GuestFrame frame = m.map_new(at), next = m.map_new(neighbour);
    set({.pages = {{at, no_reads}, {neighbour, no_writes}}});
    EXPECT_EQ(m.read(at), guarded);
    open();
    EXPECT_EQ(m.read(at), mapped(frame));
    EXPECT_EQ(m.write(neighbour), guarded);
    open();
    EXPECT_EQ(m.read(at), mapped(frame)) << "the instruction begins anew";
    EXPECT_EQ(m.write(neighbour), mapped(next));
    finish();
    expect_all(at, guarded);
    expect(neighbour, mapped(next), guarded, mapped(next));
}

TEST_P(MmuGuard, OpenedFrameStaysGuardedByOtherAddresses) {
    const GuestFrame frame = m.map_new(at);
    m.map(far, frame);
    set({.frames = {{frame, no_reads}}});
    EXPECT_EQ(m.read(at), guarded);
    open();
    EXPECT_EQ(m.read(at), mapped(frame));
    EXPECT_EQ(m.read(far), guarded) << "the instruction may have two operands";
    finish();
}

TEST(MmuGuardOwners, EachHasItsOwn) {
    Machine m;
    const GuestFrame frame = m.map_new(at, user_bits | a | d);
    const Guards none = Wanted{};
    m.mmu.set_guards(Wanted{.pages = {{at, no_writes}}}, GuardOwner::guest);
    m.mmu.set_guards(Wanted{.pages = {{at, no_fetches}}, .executable = {{at, frame}}}, GuardOwner::debugger);
    m.enter();
    EXPECT_EQ(m.write(at), guarded);
    EXPECT_EQ(m.fetch(at), mapped(frame));
    m.mmu.set_guards(Wanted{.pages = {{at, no_fetches}}},
                     GuardOwner::guest); // whatever the other lets through
    m.enter();
    EXPECT_EQ(m.write(at), mapped(frame));
    EXPECT_EQ(m.fetch(at), guarded);
    m.mmu.set_guards(none, GuardOwner::debugger);
    m.enter();
    EXPECT_EQ(m.fetch(at), guarded);
    m.mmu.set_guards(none, GuardOwner::guest);
    m.enter();
    EXPECT_EQ(m.fetch(at), mapped(frame));
}

TEST(MmuGuardPrefetch, OpenedPageIsNotPrefetchedInAnotherTable) {
    Machine m({.prefetch = 16});
    m.map_new(same_slot, user_bits | a | d);
    const GuestFrame frame = m.map_new(at, user_bits | a | d),
                     next = m.map_new(same_slot + page_size, user_bits | a | d);
    m.mmu.set_guards(Wanted{.pages = {{at, no_reads}, {same_slot, no_reads}}});
    m.enter();
    EXPECT_EQ(m.read(at), guarded);
    m.mmu.begin_guarded_access();
    m.enter();
    EXPECT_EQ(m.read(at), mapped(frame));
    EXPECT_EQ(m.read(same_slot + page_size), mapped(next));
    EXPECT_EQ(m.read(same_slot), guarded);
    m.mmu.finish_guarded_access();
    m.enter();
    EXPECT_EQ(m.read(at), guarded);
}

TEST(MmuGuardPrefetch, OpenedFrameIsNotPrefetchedAtAnotherAddress) {
    Machine m({.prefetch = 16});
    const GuestFrame frame = m.map_new(at, user_bits | a | d),
                     next = m.map_new(neighbour + page_size, user_bits | a | d);
    m.map(neighbour, frame, user_bits | a | d);
    m.mmu.set_guards(Wanted{.frames = {{frame, no_reads}}});
    m.enter();
    EXPECT_EQ(m.read(at), guarded);
    m.mmu.begin_guarded_access();
    m.enter();
    EXPECT_EQ(m.read(at), mapped(frame));
    EXPECT_EQ(m.read(neighbour + page_size), mapped(next));
    EXPECT_EQ(m.read(neighbour), guarded);
    m.mmu.finish_guarded_access();
    m.enter();
    EXPECT_EQ(m.read(at), guarded);
}

TEST_P(MmuGuard, OpenedInALargePageIsInForceInOthersThatAreSplit) {
    const GuestFrame first(4 * mb >> page_shift), second(8 * mb >> page_shift);
    const GuestVirt here = large + 5 * page_size, there = here + 2 * mb;
    m.map(large, first, user_bits | d, 2);
    m.map(large + 2 * mb, second, user_bits | d, 2);
    set({.pages = {{here, no_reads}, {there, no_reads}}});
    EXPECT_EQ(m.read(here), guarded);
    open();
    EXPECT_EQ(m.read(here), mapped(first + 5));
    EXPECT_EQ(m.read(there + page_size), mapped(second + 6));
    EXPECT_EQ(m.read(there), guarded);
    finish();
    expect_all(here, guarded);
    expect_all(there, guarded);
}

TEST_P(MmuGuard, OpenedWhereNoMemoryIs) {
    const GuestFrame no_memory(2 * FakeMachine::high_end >> page_shift);
    m.map(at, no_memory);
    for (const Wanted& guards :
         {Wanted{.frames = {{no_memory, no_reads}}}, Wanted{.pages = {{at, no_reads}}}}) {
        set(guards);
        EXPECT_EQ(m.read(at), guarded);
        open();
        EXPECT_EQ(m.read(at), mapped(no_memory));
        finish();
        expect_all(at, guarded);
    }
}

TEST_P(MmuGuard, WithoutAGuardedAccessNothingIsOpened) {
    m.map_new(at);
    set({.pages = {{at, no_reads}}});
    open();
    expect_all(at, guarded);
    finish(); // of nothing
    EXPECT_EQ(m.read(at), guarded);
    open();
    finish();
    open(); // that access is over
    EXPECT_EQ(m.read(at), guarded);
    finish();
}

TEST_P(MmuGuard, NewGuardsWhileOneIsOpen) {
    const GuestFrame frame = m.map_new(at), next = m.map_new(neighbour);
    set({.pages = {{at, no_reads}}});
    EXPECT_EQ(m.read(at), guarded);
    open();
    EXPECT_EQ(m.read(at), mapped(frame));
    set({.pages = {{at, no_reads}, {neighbour, no_writes}}});
    expect(neighbour, mapped(next), guarded, mapped(next));
    finish();
    expect_all(at, guarded);
}

TEST_P(MmuGuard, OpenedIsInForceAgainAfterAReset) {
    const GuestFrame frame = m.map_new(at);
    set({.frames = {{frame, no_writes}}});
    EXPECT_EQ(m.write(at), guarded);
    open();
    EXPECT_EQ(m.write(at), mapped(frame));
    m.mmu.reset();
    m.enter();
    EXPECT_EQ(m.write(at), mapped(frame)) << "the instruction is not done";
    finish();
    expect(at, mapped(frame), guarded, mapped(frame));
}

// ---- Frames that may be executed

TEST_P(MmuGuard, ExecutableFrameMayBeFetchedFromAtThatAddressOnly) {
    const GuestFrame frame = m.map_new(at), other = m.map_new(neighbour);
    m.map(far, frame);
    set({.pages = {{at, no_fetches}, {neighbour, no_fetches}, {far, no_fetches}},
         .executable = {{at, frame}}});
    expect_all(at, mapped(frame));
    expect(far, mapped(frame), mapped(frame), guarded);
    expect(neighbour, mapped(other), mapped(other), guarded);
}

TEST_P(MmuGuard, ExecutableIsNotWhatIsMappedThereInstead) {
    const GuestFrame frame = m.map_new(at), space = m.new_space(), its_frame = m.new_frame(),
                     new_one = m.new_frame();
    m.FakeMachine::map(space, at, its_frame, user_bits);
    set({.pages = {{at, no_fetches}}, .executable = {{at, frame}}});
    expect_all(at, mapped(frame));
    m.map(at, new_one);
    m.invlpg(at);
    expect(at, mapped(new_one), mapped(new_one), guarded);
    m.load_cr3(space);
    expect(at, mapped(its_frame), mapped(its_frame), guarded);
    m.FakeMachine::map(space, at, frame, user_bits);
    m.invlpg(at);
    expect_all(at, mapped(frame));
}

TEST_P(MmuGuard, ExecutableLeavesOtherGuards) {
    const GuestFrame frame = m.map_new(at);
    set({.pages = {{at, {.write = true, .fetch = true}}}, .executable = {{at, frame}}});
    expect(at, mapped(frame), guarded, mapped(frame));
    set({.frames = {{frame, no_fetches}}, .pages = {{at, no_fetches}}, .executable = {{at, frame}}});
    expect(at, mapped(frame), mapped(frame), guarded);
}

TEST_P(MmuGuard, ExecutableInAnotherTableOfTheSameSlot) {
    const GuestFrame frame = m.map_new(at), beside = m.map_new(same_slot);
    set({.pages = {{at, no_fetches}, {same_slot, no_fetches}}, .executable = {{at, frame}}});
    expect_let_through(at, mapped(frame));
    expect(same_slot, mapped(beside), mapped(beside), guarded);
    set({.pages = {{at, no_fetches}, {same_slot, no_fetches}},
         .executable = {{at, frame}, {same_slot, beside}}});
    expect_let_through(at, mapped(frame));
    expect_let_through(same_slot, mapped(beside));
}

// ---- Tables that several places share

TEST_P(MmuGuard, OnAPageLeavesAnotherPlaceOfTheSameTable) {
    const GuestFrame frame = m.map_new(at), next = m.map_new(neighbour);
    const GuestVirt alias = at + 32 * mb; // the same level-1 table of the guest
    m.set_entry(alias, m.entry(at, 2).raw(), 2);
    expect_all(at, mapped(frame));
    expect_all(alias, mapped(frame));
    EXPECT_EQ(m.table(at, 1), m.table(alias, 1));
    set({.pages = {{at, no_reads}}});
    expect_all(at, guarded);
    expect_all(alias, mapped(frame));
    expect_all(neighbour, mapped(next));
    EXPECT_NE(m.table(at, 1), m.table(alias, 1)) << "one is for places with guards";
    set({});
    expect_all(at, mapped(frame));
    expect_all(alias, mapped(frame));
    EXPECT_EQ(m.table(at, 1), m.table(alias, 1));
}

TEST_P(MmuGuard, OnPagesOfTwoPlacesOfTheSameTable) {
    const GuestFrame frame = m.map_new(at), next = m.map_new(neighbour);
    const GuestVirt alias = at + 32 * mb, alias_neighbour = alias + page_size;
    m.set_entry(alias, m.entry(at, 2).raw(), 2);
    set({.pages = {{at, no_reads}, {alias_neighbour, no_writes}}});
    expect_all(at, guarded);
    expect(alias_neighbour, mapped(next), guarded, mapped(next));
    expect_let_through(neighbour, mapped(next));
    expect_let_through(alias, mapped(frame));
}

TEST_P(MmuGuard, OnAPageOfASharedKernelTable) {
    const GuestFrame frame = m.map_new(kernel_at, kernel_bits),
                     next = m.map_new(kernel_at + page_size, kernel_bits);
    const GuestFrame space = m.new_space();
    set({.pages = {{kernel_at, no_writes}}});
    for (const GuestFrame root : {m.root, space, m.root}) {
        m.load_cr3(root);
        expect(kernel_at, mapped(frame), guarded, mapped(frame));
        expect_all(kernel_at + page_size, mapped(next));
    }
}

// ---- Their end

TEST_P(MmuGuard, WithoutGuardsAllIsAsBefore) {
    const GuestFrame frame = m.map_new(at), first(4 * mb >> page_shift);
    const GuestVirt block = large + 8 * mb;
    m.map(block, first, user_bits | d, 2);
    set({.frames = {{frame, no_reads}, {first + 5, no_writes}},
         .pages = {{block + 6 * page_size, no_fetches}},
         .executable = {{block + 6 * page_size, first}}});
    expect_all(at, guarded);
    expect(block + 5 * page_size, mapped(first + 5), guarded, mapped(first + 5));
    expect(block + 6 * page_size, mapped(first + 6), mapped(first + 6), guarded);
    set({});
    expect_all(at, mapped(frame));
    expect_all(block + 5 * page_size, mapped(first + 5));
    expect_all(block + 6 * page_size, mapped(first + 6));
    EXPECT_TRUE(m.shadow(block, 2).leaf(paging_4_level.level(2)));
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
}

TEST_P(MmuGuard, TheSameGuardsForgetNothing) {
    const GuestFrame frame = m.map_new(at);
    set({.pages = {{at, no_writes}}});
    EXPECT_EQ(m.read(at), mapped(frame));
    set({.pages = {{at, no_writes}}});
    EXPECT_EQ(m.read(at), mapped(frame));
    EXPECT_EQ(m.misses(), 0U);
    set({.pages = {{at, no_fetches}}});
    EXPECT_EQ(m.read(at), mapped(frame));
    EXPECT_EQ(m.misses(), 1U) << "a change forgets every table";
}

TEST_P(MmuGuard, OfAnotherVcpuHoldsForAll) {
    const GuestFrame frame = m.map_new(at);
    EXPECT_EQ(m.write(at), mapped(frame));
    m.mmu.left(); // set_guards waits for that
    Mmu other(m.tables, 1);
    other.set_guards(Wanted{.pages = {{at, no_writes}}});
    m.enter();
    expect(at, mapped(frame), guarded, mapped(frame));
}

// ---- Beside write protection

TEST(MmuGuardSync, OfATableOfTheGuestBesideItsProtection) {
    for (const Sync sync : {Sync::protect, Sync::adaptive}) {
        Machine m({.sync = sync});
        m.map_new(at);
        const GuestFrame table = m.entry(at, 2).table(), frame = m.new_frame();
        m.map(far, table);
        m.mmu.set_guards(Wanted{.frames = {{table, no_writes}}});
        m.enter();
        for (int flush = 0; flush < 8; ++flush) {
            m.read(at);
            m.load_cr3(m.root);
        }
        const GuestVirt entry = far + paging_4_level.level(1).index(at) * sizeof(GuestEntry);
        EXPECT_EQ(m.write(entry), guarded);
        m.mmu.begin_guarded_access();
        m.enter();
        m.store_at(entry, GuestEntry(frame, user_bits).raw());
        m.mmu.finish_guarded_access();
        m.enter();
        EXPECT_EQ(m.write(entry), guarded);
        m.invlpg(at);
        EXPECT_EQ(m.read(at), mapped(frame)) << "the write has been seen";
    }
}

// ---- The audit

class MmuGuardAudit : public ::testing::Test {
  public:
    void set(const Wanted& guards) {
        m.mmu.set_guards(guards);
        m.enter();
        m.read(neighbour);
        m.read(large + 8 * mb + 6 * page_size);
        ASSERT_EQ(m.mmu.audit(), std::nullopt);
    }
    void expect_broken() {
        const auto rule = m.mmu.audit();
        ASSERT_NE(rule, std::nullopt);
        EXPECT_NE(rule->find("lets the guest use a guarded page unseen"), std::string::npos) << *rule;
    }
    Machine m;
    GuestFrame frame = m.map_new(at, user_bits | d), next = m.map_new(neighbour, user_bits | d);
    GuestFrame block = GuestFrame(4 * mb >> page_shift);
};

TEST_F(MmuGuardAudit, PageThatIsThere) {
    for (const Wanted& guards : {Wanted{.frames = {{frame, no_reads}}}, Wanted{.pages = {{at, no_reads}}}}) {
        set(guards);
        m.shadow_slot(at) = ShadowEntry(MachineFrame(frame.number()), p | us);
        expect_broken();
        m.shadow_slot(at) = ShadowEntry();
    }
}

TEST_F(MmuGuardAudit, PageThatIsWritable) {
    for (const Wanted& guards :
         {Wanted{.frames = {{frame, no_writes}}}, Wanted{.pages = {{at, no_writes}}}}) {
        set(guards);
        m.read(at);
        ASSERT_EQ(m.mmu.audit(), std::nullopt);
        ShadowEntry& entry = m.shadow_slot(at);
        entry = ShadowEntry(entry.raw() | rw);
        expect_broken();
    }
}

TEST_F(MmuGuardAudit, PageThatIsExecutable) {
    for (const Wanted& guards : {Wanted{.frames = {{frame, no_fetches}}}, Wanted{.pages = {{at, no_fetches}}},
                                 Wanted{.pages = {{at, no_fetches}}, .executable = {{at, next}}}}) {
        set(guards);
        m.read(at);
        ASSERT_EQ(m.mmu.audit(), std::nullopt);
        ShadowEntry& entry = m.shadow_slot(at);
        entry = ShadowEntry(entry.raw() & ~xd);
        expect_broken();
    }
}

TEST_F(MmuGuardAudit, LargePageThatIsWhole) {
    m.map(large + 8 * mb, block, user_bits | d, 2);
    for (const Wanted& guards : {Wanted{.pages = {{large + 8 * mb + 5 * page_size, no_writes}}},
                                 Wanted{.pages = {{large + 8 * mb + 5 * page_size, no_reads}}}}) {
        set(guards);
        m.shadow_slot(large + 8 * mb, 2) = ShadowEntry(MachineFrame(block.number()), p | us | ps);
        expect_broken();
        m.mmu.reset();
    }
}

} // namespace
} // namespace umbra::test
