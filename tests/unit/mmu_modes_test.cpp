// Unit tests of shadow/mmu.hpp: tagged contexts, the paging modes below 4-level paging, and changes between
// them.
#include "tests/unit/mmu_machine.hpp"

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace umbra::test {
namespace {

// ---- Contexts (PCID)

/// Three address spaces with tags, and a page at `at` in each; the second one is current.
class MmuContexts : public ::testing::Test {
  public:
    explicit MmuContexts(Sync sync = Sync::compare) : m({.sync = sync}) {
        for (std::uint16_t pcid = 0; pcid < 3; ++pcid) {
            spaces.push_back(pcid == 0 ? m.root : m.new_frame());
            pages.push_back(change(pcid));
            m.load_cr3(spaces[pcid], pcid);
            m.read(at);
        }
        m.switch_to(spaces[1], 1);
    }
    /// The space gets another page.
    GuestFrame change(std::uint16_t pcid) {
        const GuestFrame page = m.new_frame();
        m.map(spaces[pcid], at, page, user_bits);
        return page;
    }
    Outcome read_in(std::uint16_t pcid) {
        m.switch_to(spaces[pcid], pcid);
        return m.read(at);
    }
    Machine m;
    std::vector<GuestFrame> spaces, pages;
};

TEST_F(MmuContexts, SwitchWithoutAFlushFindsWhatWasThere) {
    for (const std::uint16_t pcid : {std::uint16_t{0}, std::uint16_t{2}, std::uint16_t{1}}) {
        EXPECT_EQ(read_in(pcid), mapped(pages[pcid]));
        EXPECT_EQ(m.misses(), 0U);
    }
    EXPECT_EQ(m.flushes_paid + m.tables_paid, 0U);
}

class MmuProtectedContexts : public MmuContexts {
  public:
    MmuProtectedContexts() : MmuContexts(Sync::protect) {
        for (int i = 0; i < 3; ++i) {
            for (std::uint16_t pcid = 0; pcid < 3; ++pcid)
                m.load_cr3(spaces[pcid], pcid);
        }
    }
};

TEST_F(MmuProtectedContexts, SwitchesCompareNothing) {
    const MmuCounters before = m.mmu.counters();
    for (int i = 0; i < 20; ++i) {
        for (std::uint16_t pcid = 0; pcid < 3; ++pcid) {
            EXPECT_EQ(read_in(pcid), mapped(pages[pcid]));
            EXPECT_EQ(m.misses(), 0U);
        }
    }
    EXPECT_EQ(m.mmu.counters().tables_compared, before.tables_compared);
    EXPECT_EQ(m.mmu.counters().tables_built, before.tables_built);
    EXPECT_EQ(m.mmu.counters().fills, before.fills);
}

TEST_F(MmuContexts, FlushOfTheCurrentContextIsSeenAtOnce) {
    const GuestFrame changed = change(1);
    EXPECT_EQ(m.read(at), mapped(pages[1])) << "not flushed yet";
    m.mmu.flush({.pcid = 1});
    m.enter();
    EXPECT_EQ(m.read(at), mapped(changed));
}

TEST_F(MmuContexts, FlushOfAnotherContextLeavesTheCurrentOne) {
    const GuestFrame other = change(0);
    const GuestFrame current = change(1);
    const std::uint64_t before = m.mmu.counters().tables_compared;
    m.mmu.flush({.pcid = 0});
    m.enter();
    EXPECT_EQ(m.mmu.counters().tables_compared, before);
    EXPECT_EQ(m.read(at), mapped(pages[1])) << "kept";
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(read_in(0), mapped(other));
    m.load_cr3(spaces[1], 1);
    EXPECT_EQ(m.read(at), mapped(current));
}

TEST_F(MmuContexts, FlushOfAllReachesAll) {
    for (const bool globals : {false, true}) {
        std::vector<GuestFrame> changed;
        for (std::uint16_t pcid = 0; pcid < 3; ++pcid)
            changed.push_back(change(pcid));
        m.mmu.flush({.all_contexts = true, .globals = globals});
        m.enter();
        for (const std::uint16_t pcid :
             {std::uint16_t{1}, std::uint16_t{2}, std::uint16_t{0}, std::uint16_t{1}})
            EXPECT_EQ(read_in(pcid), mapped(changed[pcid])) << pcid;
    }
}

TEST_F(MmuContexts, AddressCanBeInvalidatedInAnother) {
    const GuestFrame other = change(2);
    change(1);
    m.mmu.invalidate(at, 2, false);
    m.enter();
    EXPECT_EQ(m.read(at), mapped(pages[1])) << "the current one keeps its own";
    EXPECT_EQ(m.misses(), 0U);
    EXPECT_EQ(read_in(2), mapped(other));
}

TEST_F(MmuContexts, AddressCanBeInvalidatedInTheCurrentOne) {
    const GuestFrame changed = change(1);
    m.mmu.invalidate(at, 1, false);
    m.enter();
    EXPECT_EQ(m.read(at), mapped(changed));
}

TEST_F(MmuContexts, InvlpgReachesGlobalPagesOfTheOthers) {
    m.paging.global_pages = true;
    const GuestFrame changed = change(0);
    m.invlpg(at);
    EXPECT_EQ(read_in(0), mapped(changed));
}

TEST_F(MmuContexts, SharedTablesServeEachContextWithWhatItMayHave) {
    // The last table is shared by two spaces. The one that is away has used nothing of what the other one
    // fills, so an entry that is replaced meanwhile must not reach it.
    const GuestPhys slot = m.slot(spaces[1], neighbour);
    const GuestEntry link = m.get(m.slot(spaces[1], at, 2));
    m.put(m.slot(spaces[0], at, 2), link);
    m.load_cr3(spaces[0], 0);
    EXPECT_EQ(m.read(at), mapped(pages[1]));
    m.switch_to(spaces[1], 1);
    const GuestFrame first = m.new_frame(), second = m.new_frame();
    m.put(slot, GuestEntry(first, user_bits));
    EXPECT_EQ(m.read(neighbour), mapped(first));
    m.put(slot, GuestEntry(second, user_bits));
    EXPECT_EQ(m.read(neighbour), mapped(first)) << "this one may";
    m.switch_to(spaces[0], 0);
    EXPECT_EQ(m.read(neighbour), mapped(second));
}

// ---- PAE

/// A guest with PAE paging: the PDPT lies at `pdpt`, and the four page directories behind it.
class MmuPae : public ::testing::Test {
  public:
    static constexpr std::uint64_t offset = 0x1240; ///< the PDPT's, in its page: a multiple of 32
    MmuPae() {
        m.paging.format = &paging_pae;
        pdpt = new_pdpt();
        load(pdpt);
    }
    GuestPhys new_pdpt() {
        const GuestPhys at_ = m.new_frame().base() + (offset & 0xfff);
        for (unsigned i = 0; i < 4; ++i)
            m.put(at_ + i * 8, GuestEntry(m.new_frame(), p));
        return at_;
    }
    [[nodiscard]] GuestFrame directory(GuestPhys of, GuestVirt address) const {
        return m.get(of + (address.value() >> 30) * 8).table();
    }
    /// MOV to CR3.
    void load(GuestPhys at_) {
        const auto registers = load_pdptes(m.memory, at_.value(), m.paging.physical_bits);
        ASSERT_TRUE(registers);
        m.paging.pdptes = *registers;
        m.paging.pdpt = at_;
        m.load_cr3(at_.frame());
    }
    GuestPhys pde(GuestPhys of, GuestVirt address) const {
        return FakeMachine::slot_of(directory(of, address), paging_pae.level(2).index(address));
    }
    GuestPhys pte(GuestPhys of, GuestVirt address) {
        const GuestPhys above = pde(of, address);
        if (!m.get(above).present())
            m.put(above, GuestEntry(m.new_frame(), user_bits));
        return FakeMachine::slot_of(m.get(above).table(), paging_pae.level(1).index(address));
    }
    GuestFrame map_new(GuestPhys of, GuestVirt address, std::uint64_t bits = user_bits) {
        const GuestFrame page = m.new_frame();
        m.put(pte(of, address), GuestEntry(page, bits));
        return page;
    }
    static constexpr std::array addresses{GuestVirt(0x0012'3000), GuestVirt(0x4567'8000),
                                          GuestVirt(0xbfff'f000), GuestVirt(0xffff'f000)};
    Machine m;
    GuestPhys pdpt;
};

TEST_F(MmuPae, TranslatesInEachQuarter) {
    for (const GuestVirt address : addresses) {
        const GuestFrame page = map_new(pdpt, address);
        EXPECT_EQ(m.write(address + 0x123), mapped(page, 0x123));
        EXPECT_EQ(m.misses(), 1U);
        EXPECT_TRUE(m.get(pte(pdpt, address)).has(a | d));
        EXPECT_TRUE(m.get(pde(pdpt, address)).has(a));
        EXPECT_EQ(m.get(pdpt + (address.value() >> 30) * 8).raw() & a, 0U) << "no such bit there";
        m.set_user(true);
        EXPECT_EQ(m.read(address), mapped(page)) << "the PDPTE has no rights to withhold";
        m.set_user(false);
        const GuestFrame changed = map_new(pdpt, address);
        m.invlpg(address);
        EXPECT_EQ(m.read(address), mapped(changed));
    }
}

TEST_F(MmuPae, LargePagesAndExecuteDisable) {
    const GuestVirt address{0x8040'0000};
    const GuestFrame page{(FakeMachine::high + 6 * mb) >> page_shift};
    m.put(pde(pdpt, address), GuestEntry(page, p | us | ps | xd));
    EXPECT_EQ(m.read(address + 0x1f'1234), mapped(page, 0x1f'1234));
    EXPECT_TRUE(m.shadow(address, 2).has(ps));
    EXPECT_EQ(m.write(address), fault(present | write));
    EXPECT_EQ(m.fetch(address), fault(present | fetch));
    m.paging.no_execute = false;
    m.set_control();
    EXPECT_EQ(m.read(address), fault(present | reserved));
}

TEST_F(MmuPae, PdptesAreReadWhenCr3IsLoadedOnly) {
    for (const GuestVirt address : addresses) {
        SCOPED_TRACE(address.value());
        const GuestPhys slot = pdpt + (address.value() >> 30) * 8;
        const GuestEntry old = m.get(slot);
        const GuestFrame page = map_new(pdpt, address);
        EXPECT_EQ(m.read(address), mapped(page));
        for (const std::uint64_t raw : {std::uint64_t{0}, m.new_frame().base().value() | p}) {
            m.put(slot, GuestEntry(raw));
            m.invlpg(address);
            EXPECT_EQ(m.read(address), mapped(page)) << "INVLPG does not load them";
            load(pdpt);
            EXPECT_EQ(m.read(address), fault(0));
            EXPECT_EQ(m.write(address), fault(write));
            m.put(slot, old);
            EXPECT_EQ(m.read(address), fault(0));
            load(pdpt);
            EXPECT_EQ(m.read(address), mapped(page));
        }
    }
}

TEST_F(MmuPae, OtherRegistersAreAnotherSpaceThoughNothingIsFlushed) {
    const GuestPhys second = new_pdpt();
    for (const GuestVirt address : addresses) {
        SCOPED_TRACE(address.value());
        const GuestFrame page = map_new(pdpt, address), seconds = map_new(second, address);
        for (const auto& [of, wanted] : {std::pair(pdpt, page), std::pair(second, seconds)}) {
            for (unsigned i = 0; i < 4; ++i)
                m.paging.pdptes.at(i) = m.get(of + i * 8).raw();
            for (const bool as_user : {false, true}) {
                m.set_control();
                m.set_user(as_user);
                EXPECT_EQ(m.read(address), mapped(wanted)) << as_user;
            }
            m.set_user(false);
        }
        // One register alone.
        m.paging.pdptes.at(address.value() >> 30) = 0;
        m.set_control();
        EXPECT_EQ(m.read(address), fault(0));
    }
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
}

TEST_F(MmuPae, SpacesWithADirectoryInCommon) {
    const GuestFrame shared = map_new(pdpt, addresses[3]), own = map_new(pdpt, addresses[0]);
    const GuestPhys second = new_pdpt();
    m.put(second + 24, m.get(pdpt + 24));
    const GuestFrame seconds_own = map_new(second, addresses[0]);
    m.read(addresses[3]);
    m.read(addresses[0]);
    load(second);
    EXPECT_EQ(m.read(addresses[3]), mapped(shared));
    EXPECT_EQ(m.misses(), 0U) << "the tables below it are shared";
    EXPECT_EQ(m.read(addresses[0]), mapped(seconds_own));
    const std::uint64_t built = m.mmu.counters().tables_built;
    for (int i = 0; i < 3; ++i) {
        load(pdpt);
        EXPECT_EQ(m.read(addresses[0]), mapped(own));
        load(second);
        EXPECT_EQ(m.read(addresses[0]), mapped(seconds_own));
    }
    EXPECT_EQ(m.mmu.counters().tables_built, built);
    // A change while the other one is current.
    const GuestFrame changed = map_new(pdpt, addresses[0]);
    load(pdpt);
    EXPECT_EQ(m.read(addresses[0]), mapped(changed));
}

TEST_F(MmuPae, OneDirectoryForTwoQuarters) {
    m.put(pdpt + 8, m.get(pdpt));
    load(pdpt);
    const GuestFrame page = map_new(pdpt, GuestVirt(0x5000));
    EXPECT_EQ(m.read(GuestVirt(0x5000)), mapped(page));
    EXPECT_EQ(m.read(GuestVirt(0x4000'5000)), mapped(page));
    const GuestFrame changed = map_new(pdpt, GuestVirt(0x5000));
    m.load_cr3(m.paging.root);
    for (const std::uint64_t address : {0x5000U, 0x4000'5000U})
        EXPECT_EQ(m.read(GuestVirt(address)), mapped(changed));
}

// ---- 32-bit paging

class Mmu32 : public ::testing::Test {
  public:
    explicit Mmu32() : directory(m.new_frame()) {
        m.paging.format = &paging_32_bit_pse;
        m.load_cr3(directory);
    }
    static constexpr std::uint64_t pde_index(GuestVirt address) { return address.value() >> 22; }
    static constexpr std::uint64_t pte_index(GuestVirt address) { return address.value() >> 12 & 0x3ff; }
    [[nodiscard]] std::uint64_t pde(GuestVirt address) const {
        return m.memory.read<std::uint32_t>(directory.base() + pde_index(address) * 4).value();
    }
    [[nodiscard]] std::uint64_t pte(GuestVirt address) const {
        return m.memory.read<std::uint32_t>(GuestPhys((pde(address) & 0xffff'f000) + pte_index(address) * 4))
            .value();
    }
    void set_pde(GuestVirt address, std::uint64_t raw) { m.store32(directory, pde_index(address), raw); }
    void map(GuestVirt address, GuestFrame page, std::uint64_t bits = user_bits) {
        if ((pde(address) & p) == 0)
            set_pde(address, m.new_frame().base().value() | user_bits);
        m.store32(GuestPhys(pde(address)).frame(), pte_index(address), page.base().value() | bits);
    }
    GuestFrame map_new(GuestVirt address, std::uint64_t bits = user_bits) {
        const GuestFrame page = m.new_frame();
        map(address, page, bits);
        return page;
    }
    Machine m;
    GuestFrame directory;
};

TEST_F(Mmu32, TranslatesInEachQuarterAndHalf) {
    // The page directory falls into four tables of the shadow, a page table into two.
    std::vector<std::pair<GuestVirt, GuestFrame>> pages;
    for (std::uint64_t quarter = 0; quarter < 4; ++quarter) {
        for (const std::uint64_t within : {0x0000'5000U, 0x0020'5000U, 0x3fdf'f000U, 0x3fff'f000U}) {
            const GuestVirt address(quarter << 30 | within);
            pages.emplace_back(address, map_new(address));
        }
    }
    for (const auto& [address, page] : pages) {
        EXPECT_EQ(m.read(address + 0x21), mapped(page, 0x21)) << address.value();
        EXPECT_EQ(m.misses(), 1U);
        EXPECT_TRUE((pte(address) & (a | d)) == a && (pde(address) & a) != 0);
        EXPECT_EQ(m.write(address), mapped(page));
        EXPECT_NE(pte(address) & d, 0U);
    }
    // A change of one is a change of that one only.
    for (auto& [address, page] : pages) {
        page = map_new(address);
        m.load_cr3(directory);
        for (const auto& [other, others_page] : pages) {
            EXPECT_EQ(m.read(other), mapped(others_page));
            EXPECT_EQ(m.misses(), other == address ? 1U : 0U);
        }
    }
}

TEST_F(Mmu32, InvlpgReachesTheRightHalf) {
    for (const std::uint64_t raw : {0x8040'5000U, 0x8060'5000U}) {
        const GuestVirt address(raw), other(raw ^ 0x20'0000);
        map_new(address);
        const GuestFrame kept = map_new(other);
        m.load_cr3(directory);
        m.read(address);
        m.read(other);
        const GuestFrame changed = map_new(address);
        map_new(other);
        m.invlpg(address);
        EXPECT_EQ(m.read(address), mapped(changed));
        EXPECT_EQ(m.read(other), mapped(kept));
    }
}

TEST_F(Mmu32, DirectoryEntryIsBothHalves) {
    const GuestVirt low{0x0040'5000}, high{0x0060'5000};
    map_new(low);
    map_new(high);
    m.read(low);
    m.read(high);
    const std::uint64_t link = pde(low);
    EXPECT_EQ(m.pool.in_use(), 1 /* the machine's first root */ + 5U);
    set_pde(low, 0);
    const GuestFrame new_low = map_new(low), new_high = map_new(high);
    m.load_cr3(directory);
    EXPECT_EQ(m.read(low), mapped(new_low));
    EXPECT_EQ(m.read(high), mapped(new_high));
    // And if only one half is used in between.
    set_pde(low, link);
    m.invlpg(low);
    m.read(low);
    set_pde(low, 0);
    m.load_cr3(directory);
    EXPECT_EQ(m.read(high), fault(0));
    EXPECT_EQ(m.read(low), fault(0));
}

TEST_F(Mmu32, TablesAreSharedByDirectoryEntries) {
    const GuestFrame page = map_new(GuestVirt(0x0060'5000));
    m.read(GuestVirt(0x0060'5000));
    const std::size_t before = m.pool.in_use();
    set_pde(GuestVirt(0x00e0'5000), pde(GuestVirt(0x0060'5000)));
    EXPECT_EQ(m.read(GuestVirt(0x00e0'5000)), mapped(page));
    EXPECT_EQ(m.pool.in_use(), before);
}

TEST_F(Mmu32, PagesOf4MbAreTwoEntries) {
    const GuestVirt address{0xc040'0000};
    const GuestFrame page{8 * mb >> page_shift};
    set_pde(address, page.base().value() | user_bits | ps);
    EXPECT_EQ(m.read(address + 0x12'3456), mapped(page, 0x12'3456));
    EXPECT_EQ(m.read(address + 0x32'3456), mapped(page, 0x32'3456));
    EXPECT_EQ(m.misses(), 1U);
    EXPECT_TRUE(m.shadow(address, 2).has(ps) && m.shadow(address + 2 * mb, 2).has(ps));
    EXPECT_EQ(pde(address) & (a | d), a);
    EXPECT_EQ(m.write(address + 0x3f'ffff), mapped(page, 0x3f'ffff));
    EXPECT_NE(pde(address) & d, 0U);
    // INVLPG of either half drops both.
    const GuestFrame changed{12 * mb >> page_shift};
    for (const std::uint64_t at_ : {0x1'2345U, 0x3f'ffffU}) {
        const GuestFrame next = pde(address) >> 22 == page.base().value() >> 22 ? changed : page;
        set_pde(address, next.base().value() | user_bits | ps);
        m.invlpg(address + at_);
        EXPECT_EQ(m.read(address), mapped(next));
        EXPECT_EQ(m.read(address + 2 * mb), mapped(next, 2 * mb));
    }
}

TEST_F(Mmu32, ReplacedPageOf4MbIsNotMixedWithTheOldOne) {
    // No flush: each half is the old or the new page. After the flush both are the new one, whichever half
    // was used in between.
    const GuestVirt address{0xc040'0000};
    const GuestFrame page{8 * mb >> page_shift}, changed{12 * mb >> page_shift};
    for (const std::uint64_t used : {std::uint64_t{0}, 2 * mb}) {
        set_pde(address, page.base().value() | user_bits | ps);
        m.load_cr3(directory);
        m.read(address);
        m.read(address + 2 * mb);
        set_pde(address, changed.base().value() | user_bits | ps);
        m.write(address + used); // clean: a miss, and the new entry
        m.load_cr3(directory);
        EXPECT_EQ(m.read(address), mapped(changed));
        EXPECT_EQ(m.read(address + 2 * mb), mapped(changed, 2 * mb));
    }
}

TEST_F(Mmu32, Pse36ReachesBeyond4Gb) {
    const GuestVirt address{0x0080'0000};
    m.paging.physical_bits = 40;
    m.set_control();
    set_pde(address, (FakeMachine::high >> 32) << 13 | (8 * mb) | user_bits | ps);
    const GuestFrame page{(FakeMachine::high + 8 * mb) >> page_shift};
    EXPECT_EQ(m.write(address + 0x3a'bcde), mapped(page, 0x3a'bcde));
    EXPECT_EQ(m.write(address + 0x0a'bcde), mapped(page, 0x0a'bcde));
    set_pde(address, std::uint64_t{1} << 21 | user_bits | ps);
    m.invlpg(address);
    EXPECT_EQ(m.read(address), fault(present | reserved));
}

TEST_F(Mmu32, WithoutPseThePageSizeBitMeansNothing) {
    const GuestVirt address{0x0080'5000};
    const GuestFrame page = map_new(address);
    set_pde(address, pde(address) | ps);
    EXPECT_NE(m.read(address), mapped(page)) << "with PSE it is a page";
    m.paging.format = &paging_32_bit;
    m.load_cr3(directory);
    EXPECT_EQ(m.read(address), mapped(page));
    m.paging.format = &paging_32_bit_pse;
    m.load_cr3(directory);
    EXPECT_NE(m.read(address), mapped(page));
}

TEST_F(Mmu32, RightsAndErrorCodes) {
    const GuestVirt address{0x0080'5000};
    const GuestFrame page = map_new(address, p);
    EXPECT_EQ(m.fetch(GuestVirt(0x9000'0000)), fault(0)) << "no execute-disable, no I/D";
    EXPECT_EQ(m.write(address), fault(present | write));
    EXPECT_EQ(m.fetch(address), mapped(page));
    m.set_user(true);
    EXPECT_EQ(m.read(address), fault(present | user));
    map(address, page, p | us);
    EXPECT_EQ(m.fetch(address), mapped(page));
    EXPECT_EQ(m.write(address), fault(present | write | user));
    m.set_user(false);
    m.paging.write_protect = false;
    m.set_control();
    EXPECT_EQ(m.write(address), mapped(page));
    m.paging.smep = true;
    m.set_control();
    EXPECT_EQ(m.fetch(address), fault(present | fetch));
}

TEST_F(Mmu32, PrefetchStaysInItsHalf) {
    Machine one({.prefetch = 512});
    const GuestFrame top = one.new_frame(), table = one.new_frame();
    one.store32(top, 1, table.base().value() | user_bits);
    for (const unsigned index : {0U, 5U, 511U, 512U, 1023U})
        one.store32(table, index, one.new_frame().base().value() | user_bits | a);
    one.paging.format = &paging_32_bit;
    one.load_cr3(top);
    one.read(GuestVirt(0x0040'5000));
    EXPECT_EQ(one.mmu.counters().prefetched, 2U);
    one.read(GuestVirt(0x0060'0000));
    EXPECT_EQ(one.misses(), 1U);
    EXPECT_EQ(one.mmu.counters().prefetched, 3U);
    EXPECT_EQ(one.read(GuestVirt(0x007f'f000)),
              mapped(GuestPhys(one.memory.read<std::uint32_t>(table.base() + 1023 * 4).value()).frame()));
    EXPECT_EQ(one.misses(), 0U);
}

// ---- Without paging, and between the modes

TEST(MmuModes, WithoutPagingEveryAddressIsItself) {
    Machine m;
    m.paging.format = &paging_off;
    m.load_cr3(GuestFrame(0));
    for (const Access access : {Access{}, Access{.write = true}, Access{.fetch = true}}) {
        EXPECT_EQ(m.access(GuestVirt(0x1234), access), mapped(GuestFrame(1), 0x234));
        EXPECT_EQ(m.access(GuestVirt(FakeMachine::hole + 8), access),
                  mapped(GuestFrame(FakeMachine::hole >> page_shift), 8));
        EXPECT_EQ(m.access(GuestVirt(FakeMachine::window.base().value() + 4), access),
                  mapped(FakeMachine::window, 4));
        EXPECT_EQ(m.access(GuestVirt(FakeMachine::behind_window.base().value()), access),
                  mapped(FakeMachine::behind_window));
        EXPECT_EQ(m.access(GuestVirt(5 * mb), access), mapped(GuestFrame(5 * mb >> page_shift)));
        EXPECT_EQ(m.access(GuestVirt(FakeMachine::low_end), access),
                  mapped(GuestFrame(FakeMachine::low_end >> page_shift)));
        EXPECT_EQ(m.access(GuestVirt(0xffff'f000), access), mapped(GuestFrame(0xffff'f)));
    }
    EXPECT_TRUE(m.shadow(GuestVirt(5 * mb), 2).has(ps | rw));
    EXPECT_EQ(m.mmu.counters().guest_faults, 0U);
    m.mmu.set_trap_user_fetch(true);
    m.enter();
    const GuestVirt fresh(9 * mb);
    EXPECT_EQ(m.fetch(fresh), mapped(GuestFrame(fresh.value() >> page_shift))) << "no page is a program's";
    EXPECT_EQ(m.misses(), 1U);
}

TEST(MmuModes, AccessedBitOfA32BitEntryIsAnAddressBitOfA64BitOne) {
    for (const Sync sync : {Sync::compare, Sync::protect, Sync::adaptive, Sync::trap}) {
        Machine m({.sync = sync});
        m.paging.physical_bits = 37;
        const GuestFrame no_memory(std::uint64_t{7} << 20);
        m.map(at, no_memory, user_bits | a | d); // as 4-byte entries: both present
        const GuestPhys slot = m.slot(m.root, at);
        const auto load = [&](const PagingFormat& format, GuestFrame cr3) {
            m.paging.format = &format;
            m.load_cr3(cr3);
        };
        const GuestFrame directory = m.new_frame();
        m.store32(directory, 1, slot.frame().base().value() | user_bits);
        for (int i = 0; i < 40; ++i) { // until its table has no snapshot
            load(paging_4_level, m.root);
            EXPECT_EQ(m.read(at), mapped(no_memory));
        }
        load(paging_32_bit, directory);
        const std::uint64_t index = slot.page_offset() / 4 + 1;
        EXPECT_EQ(m.read(GuestVirt(std::uint64_t{1} << 22 | index << page_shift)), mapped(GuestFrame(0)));
        load(paging_4_level, m.root);
        EXPECT_EQ(m.read(at), fault(present | reserved)) << static_cast<int>(sync);
    }
}

TEST(MmuModes, EachHasItsOwnTablesAndFindsThemAgain) {
    // PAE's page directory is 4-level paging's PDPT as well, and its own page directory.
    Machine m;
    const GuestFrame legacy = m.new_frame(), pdpt = m.new_frame(), pml4 = m.new_frame();
    const GuestFrame directory = m.new_frame(), table = m.new_frame(), page = m.new_frame();
    const GuestFrame four{8 * mb >> page_shift};
    const GuestVirt address{0x40'1000};
    m.store32(legacy, 1, four.base().value() | user_bits | ps);
    m.put(FakeMachine::slot_of(pdpt, 0), GuestEntry(directory, p));
    m.put(FakeMachine::slot_of(pml4, 0), GuestEntry(directory, user_bits));
    m.put(FakeMachine::slot_of(directory, 0), GuestEntry(directory, user_bits));
    m.put(FakeMachine::slot_of(directory, 2), GuestEntry(table, user_bits));
    m.put(FakeMachine::slot_of(table, 1), GuestEntry(page, user_bits));

    const auto enter_mode = [&](const PagingFormat& format, GuestFrame cr3) {
        m.paging.format = &format;
        m.paging.pdptes = load_pdptes(m.memory, cr3.base().value(), m.paging.physical_bits)
                              .value_or(std::array<std::uint64_t, 4>{});
        m.load_cr3(cr3);
    };
    const auto all = [&] {
        enter_mode(paging_off, GuestFrame(0));
        EXPECT_EQ(m.read(address), mapped(GuestFrame(0x401)));
        enter_mode(paging_32_bit_pse, legacy);
        EXPECT_EQ(m.read(address), mapped(four, 0x1000));
        enter_mode(paging_32_bit, legacy);
        EXPECT_EQ(m.read(address), fault(0)) << "the page, as a table, is empty";
        enter_mode(paging_pae, pdpt);
        EXPECT_EQ(m.read(address), mapped(page));
        enter_mode(paging_4_level, pml4);
        EXPECT_EQ(m.read(address), mapped(page));
    };
    all();
    const MmuCounters before = m.mmu.counters();
    for (int i = 0; i < 3; ++i)
        all();
    EXPECT_EQ(m.mmu.counters().tables_built, before.tables_built);
    EXPECT_EQ(m.mmu.counters().fills, before.fills);
    EXPECT_EQ(m.mmu.audit(), std::nullopt);
}

} // namespace
} // namespace umbra::test
