// Unit tests of shadow/tlb_sanitizer.hpp: what a CPU may still hold, and what of it is worth a report.
#include "shadow/tlb_sanitizer.hpp"

#include <functional>
#include <random>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using Harm = StaleUse::Harm;

constexpr std::uint64_t present = entry_bit::present, writable = entry_bit::writable, user = entry_bit::user;
constexpr std::uint64_t rw = present | writable;
constexpr GuestVirt page{0xffff'8000'1234'5000};
constexpr Access read{}, write{.write = true}, fetch{.fetch = true};

/// One CPU whose every access is a miss, and its tables.
class TlbSanitizerTest : public testing::Test {
  public:
    static constexpr std::uint64_t size = 4U << 20;

    TlbSanitizerTest() { paging.root = new_frame(); }

    [[nodiscard]] GuestFrame new_frame() { return next_ = next_ + 1; }
    [[nodiscard]] GuestEntry get(GuestPhys slot) const {
        return GuestEntry(*memory.read<std::uint64_t>(slot));
    }
    /// As the guest writes an entry, without the sanitizer seeing it.
    void set_unseen(GuestPhys slot, GuestEntry entry) { ASSERT_TRUE(memory.write(slot, entry.raw())); }
    void set(GuestPhys slot, GuestEntry entry) {
        const GuestEntry before = get(slot);
        set_unseen(slot, entry);
        ++writes;
        sanitizer.written(slot, before, entry,
                          {.rip = GuestVirt(0x1000 + writes), .time = writes, .traps = writes});
    }
    void set(GuestPhys slot, GuestFrame frame, std::uint64_t bits) { set(slot, GuestEntry(frame, bits)); }

    [[nodiscard]] GuestPhys slot(GuestVirt at, unsigned level = 1) const {
        return slot(paging.root, at, level);
    }
    [[nodiscard]] GuestPhys slot(GuestFrame root, GuestVirt at, unsigned level = 1) const {
        GuestFrame table = root;
        for (const Level& upper : paging.format->levels) {
            const GuestPhys here = table.base() + std::uint64_t{upper.index(at)} * sizeof(GuestEntry);
            if (upper.number == level)
                return here;
            table = get(here).table();
        }
        return {};
    }
    /// Maps by an entry of `level`, making the tables above it, with all rights.
    void map(GuestVirt at, GuestFrame frame, std::uint64_t bits, unsigned level = 1) {
        for (unsigned number = 4; number > level; --number) {
            if (!get(slot(at, number)).present())
                set(slot(at, number), new_frame(), rw | user);
        }
        set(slot(at, level), frame, bits | (level > 1 ? entry_bit::page_size : 0));
    }

    /// One access, as the Mmu is to do it.
    std::optional<StaleUse> access(GuestVirt at, Access how) {
        const auto fresh = walk_guest(memory, paging, at, how);
        auto stale = sanitizer.check(at, how, fresh, paging);
        if (fresh.fault)
            sanitizer.faulted(at, paging);
        else
            sanitizer.used(at, translate(memory, paging, at, how), paging);
        return stale;
    }
    void load_cr3(GuestFrame root) {
        paging.root = root;
        sanitizer.flush_context(paging.pcid);
    }

    std::vector<std::byte> bytes{size};
    GuestMemory memory{{{GuestPhys(0), bytes}}};
    GuestPaging paging;
    TlbSanitizer sanitizer{memory};
    std::uint64_t writes = 0;

  private:
    GuestFrame next_{1};
};

TEST_F(TlbSanitizerTest, ReportsAnUnmappedPageThatIsUsed) {
    const GuestFrame frame = new_frame();
    map(page, frame, rw);
    EXPECT_FALSE(access(page + 8, write));
    set(slot(page), GuestEntry());
    const std::uint64_t culprit = writes;
    const auto stale = access(page + 0x123, read);
    ASSERT_TRUE(stale);
    EXPECT_EQ(stale->address, page + 0x123);
    EXPECT_EQ(stale->harm, Harm::fault_missed);
    EXPECT_EQ(stale->before.address, frame.base() + 0x123);
    EXPECT_FALSE(stale->before.fault);
    EXPECT_TRUE(stale->now.fault);
    EXPECT_FALSE(stale->through_structure_cache);
    EXPECT_EQ(stale->times, 1U);
    ASSERT_TRUE(stale->change);
    EXPECT_EQ(stale->change->level->number, 1U);
    EXPECT_EQ(stale->change->slot, slot(page));
    EXPECT_EQ(stale->change->before, GuestEntry(frame, rw | entry_bit::accessed | entry_bit::dirty));
    EXPECT_EQ(stale->change->now, GuestEntry());
    ASSERT_TRUE(stale->change->written);
    EXPECT_EQ(stale->change->written->time, culprit);
    EXPECT_EQ(stale->change->written->rip, GuestVirt(0x1000 + culprit));
    EXPECT_EQ(sanitizer.uses(), 1U);
    EXPECT_EQ(sanitizer.reported(), 1U);
}

TEST_F(TlbSanitizerTest, ReportsLostRightsOnlyWhereTheyAreMissed) {
    map(page, new_frame(), rw | user);
    EXPECT_FALSE(access(page, {.write = true, .user = true}));
    set(slot(page), GuestEntry(get(slot(page)).raw() & ~writable));
    EXPECT_FALSE(access(page, {.user = true})) << "both let it be read";
    EXPECT_FALSE(access(page, fetch));
    const auto stale = access(page, {.write = true, .user = true});
    ASSERT_TRUE(stale);
    EXPECT_EQ(stale->harm, Harm::fault_missed);
    EXPECT_FALSE(access(page, {.write = true, .user = true})) << "the page fault made the CPU forget";
}

TEST_F(TlbSanitizerTest, ReportsLossOfEachRight) {
    const struct {
        std::uint64_t take, give;
        Access how;
    } cases[] = {{user, 0, {.user = true}},
                 {writable, 0, write},
                 {0, entry_bit::no_execute, fetch},
                 {present, 0, read},
                 {0, std::uint64_t{1} << 50, read}}; // reserved
    for (unsigned level = 1; level <= 4; ++level) {
        for (const auto& test : cases) {
            sanitizer.flush_everything();
            map(page, new_frame(), rw | user);
            for (const bool as_user : {false, true}) {
                EXPECT_FALSE(access(page, {.write = true, .user = as_user}));
                EXPECT_FALSE(access(page, {.fetch = true, .user = as_user}));
            }
            const GuestEntry old = get(slot(page, level));
            const GuestPhys where = slot(page, level);
            set(where, GuestEntry((old.raw() & ~test.take) | test.give));
            const auto stale = access(page, test.how);
            ASSERT_TRUE(stale) << "level " << level;
            EXPECT_EQ(stale->harm, Harm::fault_missed);
            ASSERT_TRUE(stale->change);
            EXPECT_EQ(stale->change->level->number, level);
            EXPECT_EQ(stale->change->slot, where);
            set(where, GuestEntry());
        }
    }
}

TEST_F(TlbSanitizerTest, ReportsAnotherFrame) {
    const GuestFrame first = new_frame(), second = new_frame();
    map(page, first, rw);
    EXPECT_FALSE(access(page, read));
    set(slot(page), second, rw);
    const auto stale = access(page + 0x10, read);
    ASSERT_TRUE(stale);
    EXPECT_EQ(stale->harm, Harm::other_page);
    EXPECT_EQ(stale->before.address, first.base() + 0x10);
    EXPECT_EQ(stale->now.address, second.base() + 0x10);
}

TEST_F(TlbSanitizerTest, AWriteByACleanEntryWalksAgain) {
    map(page, new_frame(), rw);
    EXPECT_FALSE(access(page, read));
    set(slot(page), new_frame(), rw);
    EXPECT_FALSE(access(page, write)) << "to set dirty, the CPU reads the entry, and finds the new one";
}

TEST_F(TlbSanitizerTest, ReportsADirtyBitThatStaysClear) {
    map(page, new_frame(), rw);
    EXPECT_FALSE(access(page, write));
    set(slot(page), GuestEntry(get(slot(page)).raw() & ~entry_bit::dirty));
    EXPECT_FALSE(access(page, read));
    const auto stale = access(page, write);
    ASSERT_TRUE(stale);
    EXPECT_EQ(stale->harm, Harm::dirty_missed);
    ASSERT_TRUE(stale->change && stale->change->written);
    EXPECT_EQ(stale->change->written->time, writes);
    EXPECT_TRUE(stale->change->before.dirty());
    EXPECT_FALSE(stale->change->now.dirty());
}

TEST_F(TlbSanitizerTest, ACleanedPageThatIsOnlyReadIsNone) {
    map(page, new_frame(), rw);
    EXPECT_FALSE(access(page, write));
    set(slot(page), GuestEntry(get(slot(page)).raw() & ~(entry_bit::dirty | entry_bit::accessed)));
    EXPECT_FALSE(access(page, read));
}

TEST_F(TlbSanitizerTest, SaysNothingOfWhatNeedsNoFlush) {
    map(page, new_frame(), present);
    EXPECT_FALSE(access(page, read));
    set(slot(page), GuestEntry(get(slot(page)).raw() | writable | user));
    EXPECT_FALSE(access(page, write)) << "more rights";
    EXPECT_FALSE(access(page, {.write = true, .user = true}));

    const GuestVirt other = page + page_size;
    map(other, GuestFrame(), 0);
    EXPECT_TRUE(walk_guest(memory, paging, other, read).fault);
    EXPECT_FALSE(access(other, read));
    set(slot(other), new_frame(), rw);
    EXPECT_FALSE(access(other, read)) << "not present to present";

    set(slot(page), GuestEntry(get(slot(page)).raw() & ~entry_bit::accessed));
    EXPECT_FALSE(access(page, write)) << "a cleared accessed bit";
    EXPECT_TRUE(get(slot(page)).accessed());

    set(slot(page), GuestEntry(get(slot(page)).raw() | 0x7U << 9));
    EXPECT_FALSE(access(page, write)) << "bits for software";

    const GuestEntry kept = get(slot(page));
    set(slot(page), GuestEntry());
    set(slot(page), kept);
    EXPECT_FALSE(access(page, write)) << "written back";

    set(slot(other), new_frame(), rw);
    const GuestVirt unused = other + page_size;
    map(unused, new_frame(), rw);
    set(slot(unused), new_frame(), rw);
    EXPECT_FALSE(access(unused, write)) << "never used";
    EXPECT_EQ(sanitizer.uses(), 0U);
}

TEST_F(TlbSanitizerTest, APageFaultMakesTheCpuForget) {
    map(page, new_frame(), present);
    EXPECT_FALSE(access(page, read));
    EXPECT_FALSE(access(page, write)) << "copy on write: a fault, a new frame, and no INVLPG";
    set(slot(page), new_frame(), rw);
    EXPECT_FALSE(access(page, write));
    EXPECT_FALSE(access(page, read));
}

TEST_F(TlbSanitizerTest, EachInvalidationThatCoversThePageSilences) {
    const std::vector<std::function<void()>> ways{
        [&] { sanitizer.invalidate(page + 0xfff, paging); },
        [&] { sanitizer.invalidate_in(0, page, paging); },
        [&] { sanitizer.flush_context(0); },
        [&] { sanitizer.flush_all_contexts(); },
        [&] { sanitizer.flush_everything(); },
    };
    for (const auto& flush : ways) {
        map(page, new_frame(), rw);
        sanitizer.flush_everything();
        EXPECT_FALSE(access(page, write));
        set(slot(page), new_frame(), rw);
        flush();
        EXPECT_FALSE(access(page, write));
        set(slot(page), new_frame(), rw);
        EXPECT_TRUE(access(page, write)) << "used again, so held again";
    }
}

TEST_F(TlbSanitizerTest, OthersDoNot) {
    paging.pcid = 5;
    map(page, new_frame(), rw);
    EXPECT_FALSE(access(page, write));
    set(slot(page), new_frame(), rw);
    sanitizer.invalidate(page + page_size, paging);
    sanitizer.invalidate_in(6, page, paging);
    sanitizer.flush_context(6);
    const auto stale = access(page, write);
    ASSERT_TRUE(stale);
    EXPECT_EQ(stale->pcid, 5U);
    EXPECT_EQ(stale->spared.pages, 2U);
    EXPECT_EQ(stale->spared.last_page, page);
    EXPECT_EQ(stale->spared.contexts, 1U);
}

TEST_F(TlbSanitizerTest, CountsInvalidationsSinceTheWrite) {
    map(page, new_frame(), rw | entry_bit::global);
    paging.global_pages = true;
    EXPECT_FALSE(access(page, write));
    sanitizer.flush_context(0);
    sanitizer.invalidate(page + page_size, paging);
    set(slot(page), new_frame(), rw | entry_bit::global);
    sanitizer.flush_context(0);
    sanitizer.flush_all_contexts();
    const auto stale = access(page, write);
    ASSERT_TRUE(stale);
    EXPECT_EQ(stale->spared.contexts, 2U);
    EXPECT_EQ(stale->spared.pages, 0U);
}

TEST_F(TlbSanitizerTest, GlobalPagesSurviveFlushesOfContexts) {
    const std::vector<std::function<void()>> spare{
        [&] { load_cr3(paging.root); }, [&] { sanitizer.flush_all_contexts(); },
        [&] { sanitizer.invalidate_in(0, page, paging); },
        [&] { paging.pcid = 9; }, // a global entry serves every PCID
    };
    const std::vector<std::function<void()>> drop{
        [&] { sanitizer.invalidate(page, paging); },
        [&] { sanitizer.flush_everything(); },
    };
    paging.global_pages = true;
    const auto changed = [&] {
        sanitizer.flush_everything();
        map(page, new_frame(), rw | entry_bit::global);
        EXPECT_FALSE(access(page, write));
        set(slot(page), new_frame(), rw | entry_bit::global);
    };
    for (const auto& flush : spare) {
        changed();
        flush();
        const auto stale = access(page, write);
        ASSERT_TRUE(stale);
        EXPECT_TRUE(stale->before.global);
    }
    for (const auto& flush : drop) {
        changed();
        flush();
        EXPECT_FALSE(access(page, write));
    }
    paging.global_pages = false; // then G means nothing
    changed();
    load_cr3(paging.root);
    EXPECT_FALSE(access(page, write));
}

TEST_F(TlbSanitizerTest, AGlobalPageOfAnotherAddressSpaceHasNoCulprit) {
    paging.global_pages = true;
    map(page, new_frame(), rw | entry_bit::global);
    EXPECT_FALSE(access(page, write));
    const GuestFrame first = paging.root;
    load_cr3(new_frame());
    map(page, new_frame(), rw);
    const auto stale = access(page, read);
    ASSERT_TRUE(stale);
    EXPECT_EQ(stale->harm, Harm::other_page);
    EXPECT_FALSE(stale->change);
    EXPECT_EQ(stale->before.steps[0].slot.frame(), first);
    EXPECT_EQ(stale->now.steps[0].slot.frame(), paging.root);
    EXPECT_EQ(stale->spared.contexts, 1U) << "counted since the last use, as no write is to blame";
}

TEST_F(TlbSanitizerTest, AGlobalPageOfSharedTablesHasOne) {
    paging.global_pages = true;
    map(page, new_frame(), rw | entry_bit::global);
    EXPECT_FALSE(access(page, write));
    const GuestPhys shared = slot(page, 4);
    set(slot(page), new_frame(), rw | entry_bit::global);
    const GuestFrame other = new_frame();
    set(other.base() + shared.page_offset(), get(shared));
    load_cr3(other);
    const auto stale = access(page, read);
    ASSERT_TRUE(stale);
    ASSERT_TRUE(stale->change);
    EXPECT_EQ(stale->change->slot, slot(page));
    EXPECT_TRUE(stale->change->written);
}

TEST_F(TlbSanitizerTest, TranslationsArePrivateToTheirPcid) {
    paging.pcid = 1;
    map(page, new_frame(), rw);
    EXPECT_FALSE(access(page, write));
    const GuestFrame first = paging.root;
    paging.pcid = 2; // MOV CR3 with bit 63: nothing is flushed
    paging.root = new_frame();
    map(page, new_frame(), rw);
    EXPECT_FALSE(access(page, write));
    paging.pcid = 1;
    EXPECT_TRUE(access(page, write)) << "a PCID used for another address space, unflushed";
    paging.root = first;
    sanitizer.flush_context(1);
    EXPECT_FALSE(access(page, write));
}

TEST_F(TlbSanitizerTest, LargePagesAreOneTranslation) {
    for (const unsigned level : {2U, 3U}) {
        const std::uint64_t span = paging_4_level.level(level).span();
        const GuestVirt base(page.value() & ~(span - 1));
        set(slot(base, 4), GuestEntry());
        sanitizer.flush_everything();
        map(base, GuestFrame(span >> page_shift), rw, level);
        EXPECT_FALSE(access(base + 5 * page_size, read));
        set(slot(base, level), GuestEntry());
        const auto stale = access(base + span - 8, read);
        ASSERT_TRUE(stale) << "one use is one of the whole page";
        EXPECT_EQ(stale->before.address, GuestPhys(2 * span - 8));

        sanitizer.flush_everything();
        map(base, GuestFrame(span >> page_shift), rw, level);
        EXPECT_FALSE(access(base + 5 * page_size, read));
        set(slot(base, level), GuestEntry());
        sanitizer.invalidate(base + span / 2, paging);
        EXPECT_FALSE(access(base + 5 * page_size, read)) << "INVLPG anywhere in it drops it";
    }
}

TEST_F(TlbSanitizerTest, ASplitThatChangesNothingIsNone) {
    const std::uint64_t span = paging_4_level.level(2).span();
    const GuestVirt base(page.value() & ~(span - 1));
    map(base, GuestFrame(0), rw, 2);
    EXPECT_FALSE(access(base + 3 * page_size, write));
    const GuestFrame table = new_frame();
    for (unsigned i = 0; i < entries_per_table; ++i)
        set(table.base() + i * sizeof(GuestEntry), GuestFrame(i), rw | entry_bit::dirty);
    set(slot(base, 2), table, rw);
    EXPECT_FALSE(access(base + 3 * page_size, write));
    set(slot(base + 3 * page_size), GuestFrame(3), present | entry_bit::dirty);
    EXPECT_TRUE(access(base + 3 * page_size, write)) << "the large page's translation still allows it";
}

TEST_F(TlbSanitizerTest, AnUpperEntryChangedAndOnlyOnePageInvalidated) {
    const GuestVirt other = page + page_size;
    map(page, new_frame(), rw);
    map(other, new_frame(), rw);
    EXPECT_FALSE(access(page, read));
    EXPECT_FALSE(access(other, read));
    set(slot(page, 2), GuestEntry());
    sanitizer.invalidate(page, paging);
    EXPECT_FALSE(access(page, read));
    const auto stale = access(other, read);
    ASSERT_TRUE(stale);
    ASSERT_TRUE(stale->change && stale->change->written);
    EXPECT_EQ(stale->change->level->number, 2U);
    EXPECT_FALSE(stale->through_structure_cache);
    EXPECT_EQ(stale->spared.pages, 1U);
    EXPECT_EQ(stale->spared.last_page, page);
}

TEST_F(TlbSanitizerTest, AnUpperEntryMayBeCachedWithoutThePage) {
    const GuestVirt never_used = page + page_size;
    const GuestFrame frame = new_frame();
    for (unsigned level = 2; level <= 4; ++level) {
        sanitizer.flush_everything();
        set(slot(page, 4), GuestEntry());
        map(page, new_frame(), rw);
        map(never_used, frame, rw);
        EXPECT_FALSE(access(page, read));
        const GuestEntry old = get(slot(page, level));
        set(slot(page, level), GuestEntry());
        const auto stale = access(never_used + 0x18, write);
        ASSERT_TRUE(stale) << level;
        EXPECT_TRUE(stale->through_structure_cache);
        EXPECT_EQ(stale->before.depth, 4U);
        EXPECT_EQ(stale->before.address, frame.base() + 0x18);
        ASSERT_TRUE(stale->change);
        EXPECT_EQ(stale->change->level->number, level);
        EXPECT_EQ(stale->change->before, old);

        sanitizer.flush_everything();
        set(slot(page, level), old);
        EXPECT_FALSE(access(page, read));
        set(slot(page, level), GuestEntry());
        sanitizer.invalidate(page + 77 * page_size, paging); // all structure caches go
        EXPECT_FALSE(access(never_used, write)) << level;
    }
}

TEST_F(TlbSanitizerTest, WhatACachedUpperEntryAllowsIsAllOfItsPath) {
    const GuestVirt never_used = page + page_size;
    map(page, new_frame(), rw);
    map(never_used, new_frame(), rw);
    set(slot(page, 3), GuestEntry(get(slot(page, 3)).raw() & ~writable));
    EXPECT_FALSE(access(page, read));
    set(slot(page, 2), new_frame(), rw);
    EXPECT_FALSE(access(never_used, write)) << "the old path is read-only: a CPU that keeps it only faults";
    sanitizer.flush_everything();
    set(slot(page, 3), GuestEntry(get(slot(page, 3)).raw() | entry_bit::no_execute));
    map(page, new_frame(), rw);
    map(never_used, new_frame(), rw);
    EXPECT_FALSE(access(page, read));
    set(slot(page, 2), GuestEntry());
    EXPECT_FALSE(access(never_used, fetch));
}

TEST_F(TlbSanitizerTest, InvpcidOfAnAddressSparesStructureCachesOfOthers) {
    const GuestVirt far = page + 8 * paging_4_level.level(2).span();
    map(page, new_frame(), rw);
    map(page + page_size, new_frame(), rw);
    map(far, new_frame(), rw);
    EXPECT_FALSE(access(page, read));
    EXPECT_FALSE(access(far, read));
    set(slot(page, 2), GuestEntry());
    sanitizer.invalidate_in(0, far, paging);
    EXPECT_TRUE(access(page + page_size, read));

    sanitizer.flush_everything();
    map(page, new_frame(), rw);
    map(page + page_size, new_frame(), rw);
    EXPECT_FALSE(access(page, read));
    set(slot(page, 2), GuestEntry());
    sanitizer.invalidate_in(0, page + page_size, paging);
    EXPECT_FALSE(access(page + page_size, read));
}

TEST_F(TlbSanitizerTest, RightsAreJudgedByTheControlBitsOfTheAccess) {
    map(page, new_frame(), present | user);
    paging.write_protect = false;
    EXPECT_FALSE(access(page, write)); // dirty now
    set(slot(page), GuestEntry());
    paging.write_protect = true;
    EXPECT_FALSE(access(page, write)) << "WP keeps even the old translation from being written to";

    paging.smap = paging.smep = true;
    const struct {
        Access how;
        bool stale;
    } cases[] = {{read, false}, {{.ac = true}, true}, {fetch, false}, {{.user = true}, true}};
    for (const auto& test : cases) {
        sanitizer.flush_everything();
        set(slot(page), new_frame(), rw | user);
        EXPECT_FALSE(access(page, {.user = true}));
        set(slot(page), GuestEntry());
        EXPECT_EQ(access(page, test.how).has_value(), test.stale);
    }
}

TEST_F(TlbSanitizerTest, ProtectionKeysKeepAccessesFromOldTranslations) {
    paging.protection_keys = true;
    const std::uint64_t key_3 = std::uint64_t{3} << entry_bit::key_shift;
    const struct {
        std::uint32_t pkru;
        Access how;
        bool stale;
    } cases[] = {{0, read, true},
                 {1U << 6, read, false},
                 {1U << 6, fetch, true},
                 {2U << 6, read, true},
                 {2U << 6, {.write = true, .user = true}, false},
                 {1U << 4, read, true}};
    for (const auto& test : cases) {
        sanitizer.flush_everything();
        paging.pkru = 0;
        map(page, new_frame(), rw | user | key_3);
        EXPECT_FALSE(access(page, {.write = true, .user = true}));
        set(slot(page), GuestEntry());
        paging.pkru = test.pkru;
        EXPECT_EQ(access(page, test.how).has_value(), test.stale);
    }
}

TEST_F(TlbSanitizerTest, ReportsOnceAndCountsTheRest) {
    const GuestFrame first = new_frame(), second = new_frame();
    map(page, first, rw);
    EXPECT_FALSE(access(page, write));
    set(slot(page), second, rw);
    for (std::uint64_t times = 1; times <= 3; ++times) {
        const auto stale = access(page + 8 * times, read);
        ASSERT_TRUE(stale);
        EXPECT_EQ(stale->times, times);
    }
    EXPECT_EQ(sanitizer.uses(), 3U);
    EXPECT_EQ(sanitizer.reported(), 1U);
    set(slot(page), new_frame(), rw);
    const auto another = access(page, read);
    ASSERT_TRUE(another);
    EXPECT_EQ(another->times, 1U) << "another change of the entry";
    EXPECT_EQ(sanitizer.reported(), 2U);
}

TEST_F(TlbSanitizerTest, TheCulpritIsTheWriteThatTookTheOldValueAway) {
    const GuestFrame frame = new_frame();
    map(page, frame, rw);
    EXPECT_FALSE(access(page, read));
    set(slot(page), GuestEntry());
    const std::uint64_t culprit = writes;
    set(slot(page), new_frame(), rw);
    set(slot(page), new_frame(), rw);
    auto stale = access(page, read);
    ASSERT_TRUE(stale && stale->change && stale->change->written);
    EXPECT_EQ(stale->change->written->time, culprit);

    sanitizer.invalidate(page, paging);
    set(slot(page), frame, rw);
    EXPECT_FALSE(access(page, read));
    set_unseen(slot(page), GuestEntry());
    stale = access(page, read);
    ASSERT_TRUE(stale && stale->change);
    EXPECT_FALSE(stale->change->written) << "the write that was seen lies before the last use";
}

TEST_F(TlbSanitizerTest, ChangesThatTakeNothingAwayAreNotBlamed) {
    for (const std::uint64_t given : {writable, std::uint64_t{1} << 9}) {
        for (const bool cleaned : {false, true}) {
            sanitizer.flush_everything();
            map(page, new_frame(), rw);
            set(slot(page, 2), GuestEntry(get(slot(page, 2)).raw() & ~given));
            paging.write_protect = false;
            EXPECT_FALSE(access(page, write));
            set(slot(page, 2), GuestEntry(get(slot(page, 2)).raw() | given));
            set(slot(page), GuestEntry(cleaned ? get(slot(page)).raw() & ~entry_bit::dirty : 0));
            const auto stale = access(page, write);
            ASSERT_TRUE(stale && stale->change);
            EXPECT_EQ(stale->harm, cleaned ? Harm::dirty_missed : Harm::fault_missed);
            EXPECT_EQ(stale->change->slot, slot(page));
        }
    }
}

TEST_F(TlbSanitizerTest, OtherPagingModes) {
    // 32-bit paging: a 4 MB page, by entries of 4 bytes.
    paging.format = &paging_32_bit_pse;
    const GuestVirt low(0x80'1234);
    const GuestPhys pde = paging.root.base() + 2 * 4;
    const auto put = [&](std::uint32_t value) {
        const std::uint32_t before = *memory.read<std::uint32_t>(pde);
        ASSERT_TRUE(memory.write(pde, value));
        sanitizer.written(pde, GuestEntry(before), GuestEntry(value), {});
    };
    put(0x40'0083);
    EXPECT_FALSE(access(low, write));
    put(0);
    auto stale = access(low + 0x10'0000, read);
    ASSERT_TRUE(stale && stale->change && stale->change->written);
    EXPECT_EQ(stale->before.address, GuestPhys(0x50'1234));
    sanitizer.flush_everything();

    // PAE: the PDPTEs are registers, and CR3 is what changes them.
    paging.format = &paging_pae;
    const GuestFrame directory = new_frame(), table = new_frame(), frame = new_frame();
    paging.pdptes[0] = GuestEntry(directory, present).raw();
    set(directory.base() + 4 * 8, table, rw);
    set(table.base() + 1 * 8, frame, rw);
    EXPECT_FALSE(access(low, write));
    set(directory.base() + 4 * 8, new_frame(), rw);
    stale = access(low, read);
    ASSERT_TRUE(stale && stale->change);
    EXPECT_EQ(stale->change->level->number, 2U);
    EXPECT_EQ(stale->before.address, frame.base() + 0x234);

    paging.format = &paging_off;
    sanitizer.flush_everything();
    EXPECT_FALSE(access(low, write));
}

TEST_F(TlbSanitizerTest, MemoryIsBounded) {
    TlbSanitizer small(memory, 8);
    const auto use = [&](GuestVirt at) {
        const auto walk = translate(memory, paging, at, read);
        ASSERT_FALSE(walk.fault);
        small.used(at, walk, paging);
    };
    const auto stale = [&](GuestVirt at) {
        return small.check(at, read, walk_guest(memory, paging, at, read), paging).has_value();
    };
    constexpr unsigned count = 12;
    for (unsigned i = 0; i < count; ++i)
        map(page + i * page_size, new_frame(), rw);
    for (unsigned i = 0; i < count; ++i)
        use(page + i * page_size);
    for (unsigned i = 0; i < count; ++i)
        set(slot(page + i * page_size), new_frame(), rw);
    EXPECT_FALSE(stale(page)) << "the oldest are forgotten";
    EXPECT_TRUE(stale(page + (count - 1) * page_size));
    EXPECT_TRUE(stale(page + (count - 4) * page_size)) << "the others may be upper entries";
    EXPECT_FALSE(stale(page + (count - 9) * page_size));
}

/// A kernel that changes its tables at random, and always invalidates as the manual asks for, is never
/// reported; one that forgets it now and then is, and only for pages that it changed.
TEST_F(TlbSanitizerTest, RandomProgramsThatFlushAreSilent) {
    std::mt19937_64 random(7);
    const auto below = [&](std::uint64_t bound) { return random() % bound; };
    paging.global_pages = true;
    std::vector<GuestFrame> frames(8);
    for (GuestFrame& frame : frames)
        frame = new_frame();
    const auto somewhere = [&] {
        return page + below(2) * paging_4_level.level(2).span() + below(6) * page_size;
    };
    const GuestFrame first = paging.root;
    for (unsigned i = 0; i < 6; ++i) { // all tables exist
        for (const unsigned region : {0U, 1U})
            map(page + region * paging_4_level.level(2).span() + i * page_size, frames[i], rw | user);
    }
    const GuestFrame tables[] = {get(slot(page, 2)).table(),
                                 get(slot(page + paging_4_level.level(2).span(), 2)).table()};
    const GuestFrame second = new_frame();
    set(slot(second, page, 4), get(slot(first, page, 4)));

    std::uint64_t forgotten = 0, found = 0;
    for (const bool forgetful : {false, true}) {
        for (unsigned round = 0; round < 20000; ++round) {
            const GuestVirt at = somewhere();
            const bool upper = below(8) == 0;
            const std::uint64_t bits =
                (below(4) != 0 ? present : 0) | (below(2) != 0 ? writable : 0) | (below(2) != 0 ? user : 0) |
                (below(4) == 0 ? entry_bit::no_execute : 0) | (below(2) != 0 ? entry_bit::global : 0);
            if (upper)
                set(slot(at, 2), tables[below(2)], bits & ~entry_bit::global);
            else
                set(slot(at), frames[below(frames.size())], bits);
            if (forgetful && below(4) == 0) {
                ++forgotten;
            } else if (upper || below(4) == 0) {
                sanitizer.flush_everything(); // the pages under it may be global, and have aliases
            } else {
                // The table may serve two regions.
                for (const unsigned region : {0U, 1U})
                    sanitizer.invalidate(page + region * paging_4_level.level(2).span() +
                                             paging_4_level.level(1).index(at) * page_size -
                                             paging_4_level.level(1).index(page) * page_size,
                                         paging);
            }
            for (unsigned i = 0; i < 4; ++i) {
                const auto stale =
                    access(somewhere(), {.write = below(2) != 0, .fetch = false, .user = below(2) != 0});
                found += stale ? 1 : 0;
                ASSERT_TRUE(forgetful || !stale) << "round " << round;
            }
            if (below(8) == 0) {
                sanitizer.flush_everything(); // both spaces share all tables, but CR3 spares global pages
                load_cr3(below(2) != 0 ? first : second);
            }
        }
    }
    EXPECT_GT(forgotten, 1000U);
    EXPECT_GT(found, forgotten / 50);
}

TEST(RecentLogTest, KeepsTheLastRecordsByKey) {
    RecentLog<int, int> log(3);
    std::vector<int> seen;
    const auto all = [&](int key, std::size_t limit = 10) {
        seen.clear();
        EXPECT_EQ(log.find(key, limit,
                           [&](int value) {
                               seen.push_back(value);
                               return false;
                           }),
                  nullptr);
        return seen;
    };
    log.add(1, 10);
    log.add(2, 20);
    log.add(1, 11);
    EXPECT_EQ(all(1), (std::vector{11, 10}));
    EXPECT_EQ(all(1, 1), (std::vector{11}));
    log.add(1, 12); // takes the place of the oldest
    EXPECT_EQ(all(1), (std::vector{12, 11}));
    EXPECT_EQ(all(2), (std::vector{20}));
    log.add(3, 30);
    EXPECT_EQ(all(2), (std::vector<int>{}));
    EXPECT_EQ(all(1), (std::vector{12, 11}));
    log.add(3, 31);
    log.add(3, 32);
    EXPECT_EQ(all(1), (std::vector<int>{}));
    EXPECT_EQ(all(3), (std::vector{32, 31, 30}));
    EXPECT_EQ(*log.find(3, 10, [](int value) { return value == 31; }), 31);
    EXPECT_EQ(log.size(), 3U);
}

} // namespace
} // namespace umbra
