// Unit tests of shadow/format.hpp and shadow/walker.hpp: tables in a map, walked over ranges.
#include "shadow/walker.hpp"

#include <map>
#include <string>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

constexpr std::uint64_t table_bits = entry_bit::present | entry_bit::writable | entry_bit::user;
constexpr std::uint64_t kb4 = page_size;
constexpr std::uint64_t mb2 = std::uint64_t{1} << 21;
constexpr std::uint64_t gb1 = std::uint64_t{1} << 30;

/// Tables of which only the entries that were set exist; all others read as zero.
class Tables {
  public:
    explicit Tables(const PagingFormat& of) : format(of) {}

    /// Maps the page of `level` at `at`; tables on the way to it are made as needed.
    void map(GuestVirt at, unsigned level, GuestFrame frame) {
        GuestFrame table = root;
        for (const Level& here : format.levels) {
            const GuestPhys slot = table.base() + std::uint64_t{here.index(at)} * here.entry_bytes;
            if (here.number == level) {
                entries[slot] = GuestEntry(frame, table_bits | (level > 1 ? entry_bit::page_size : 0));
                return;
            }
            const auto [found, made] = entries.try_emplace(slot, GuestFrame(next_table), table_bits);
            if (made)
                ++next_table;
            table = found->second.table();
        }
    }

    /// Walks, and writes each visit as "LEVEL[index]@address"; `next` decides how to go on.
    template<class Next>
    bool walk(GuestVirt first, GuestVirt last, Next&& next) {
        visits.clear();
        reads = 0;
        return umbra::walk(
            format, root, first, last,
            [this](const Level& level, GuestPhys slot) {
                ++reads;
                EXPECT_EQ(slot.value() % level.entry_bytes, 0U);
                const auto found = entries.find(slot);
                return found == entries.end() ? GuestEntry() : found->second;
            },
            [&](const WalkStep<GuestPhysSpace>& step) {
                visits.push_back(fmt::format("{}[{}]@{:#x}", step.level->name,
                                             step.slot.page_offset() / step.level->entry_bytes,
                                             step.address.value()));
                return next(step);
            });
    }
    bool walk(GuestVirt first, GuestVirt last) {
        return walk(first, last, [](const auto&) { return WalkNext::descend; });
    }

    const PagingFormat& format;
    GuestFrame root{1};
    std::uint64_t next_table = 2;
    std::map<GuestPhys, GuestEntry> entries;
    std::vector<std::string> visits;
    std::size_t reads = 0;
};

using Visits = std::vector<std::string>;

TEST(Format, IndexesAreNineBitsEach) {
    const GuestVirt at(std::uint64_t{0x1ab} << 48 | std::uint64_t{0x0cd} << 39 | std::uint64_t{0x1ef} << 30 |
                       std::uint64_t{0x012} << 21 | std::uint64_t{0x134} << 12 | 0x567);
    EXPECT_EQ(paging_5_level.level(5).index(at), 0x1abU);
    EXPECT_EQ(paging_5_level.level(4).index(at), 0x0cdU);
    EXPECT_EQ(paging_4_level.level(4).index(at), 0x0cdU);
    EXPECT_EQ(paging_4_level.level(3).index(at), 0x1efU);
    EXPECT_EQ(paging_4_level.level(2).index(at), 0x012U);
    EXPECT_EQ(paging_4_level.level(1).index(at), 0x134U);
    for (const Level& level : paging_5_level.levels)
        EXPECT_EQ(&paging_5_level.level(level.number), &level);
}

TEST(Format, IndexesOf32BitModes) {
    const GuestVirt at(0xdead'beef); // 11'0111 1010'1 101 1011'1110
    EXPECT_EQ(paging_pae.level(3).index(at), 3U);
    EXPECT_EQ(paging_pae.level(2).index(at), 0xf5U);
    EXPECT_EQ(paging_pae.level(1).index(at), 0xdbU);
    for (const PagingFormat& format : {paging_32_bit, paging_32_bit_pse}) {
        EXPECT_EQ(format.level(2).index(at), 0x37aU);
        EXPECT_EQ(format.level(1).index(at), 0x2dbU);
        EXPECT_EQ(format.level(1).index(GuestVirt(0xffff'ffff)), 1023U);
    }
}

TEST(Format, EntryCountsFillTheirTables) {
    for (const PagingFormat& format :
         {paging_5_level, paging_4_level, paging_pae, paging_32_bit, paging_32_bit_pse}) {
        for (const Level& level : format.levels) {
            const bool pdpt_of_pae = level.in_registers;
            EXPECT_EQ(std::size_t{level.entries()} * level.entry_bytes, pdpt_of_pae ? 32 : page_size);
            if (level.number > 1) {
                const Level& below = format.level(level.number - 1);
                EXPECT_EQ(level.shift, below.shift + below.index_bits);
            }
        }
        EXPECT_EQ(format.level(1).shift, page_shift);
    }
}

TEST(Format, CanonicalAddresses) {
    EXPECT_EQ(paging_4_level.address_bits(), 48U);
    EXPECT_EQ(paging_5_level.address_bits(), 57U);
    for (const PagingFormat& format : {paging_4_level, paging_5_level}) {
        const std::uint64_t half = std::uint64_t{1} << (format.address_bits() - 1);
        EXPECT_TRUE(format.canonical(GuestVirt(0)));
        EXPECT_TRUE(format.canonical(GuestVirt(half - 1)));
        EXPECT_FALSE(format.canonical(GuestVirt(half)));
        EXPECT_FALSE(format.canonical(GuestVirt(0 - half - 1)));
        EXPECT_TRUE(format.canonical(GuestVirt(0 - half)));
        EXPECT_TRUE(format.canonical(GuestVirt(~std::uint64_t{0})));
        EXPECT_EQ(format.sign_extend(half), GuestVirt(0 - half));
        EXPECT_EQ(format.sign_extend(half - 1), GuestVirt(half - 1));
    }
    EXPECT_TRUE(paging_5_level.canonical(GuestVirt(std::uint64_t{1} << 47)));
}

TEST(Format, AddressesOf32BitModes) {
    constexpr std::uint64_t gb4 = std::uint64_t{1} << 32;
    for (const PagingFormat& format : {paging_pae, paging_32_bit, paging_32_bit_pse, paging_off}) {
        EXPECT_EQ(format.address_bits(), 32U);
        EXPECT_FALSE(format.long_mode());
        EXPECT_TRUE(format.canonical(GuestVirt(0)));
        EXPECT_TRUE(format.canonical(GuestVirt(0x8000'0000)));
        EXPECT_TRUE(format.canonical(GuestVirt(gb4 - 1)));
        EXPECT_FALSE(format.canonical(GuestVirt(gb4)));
        EXPECT_FALSE(format.canonical(GuestVirt(~std::uint64_t{0})));
        EXPECT_EQ(format.sign_extend(0x8000'0000), GuestVirt(0x8000'0000));
        EXPECT_EQ(format.sign_extend(gb4 + 5), GuestVirt(5));
    }
    EXPECT_TRUE(paging_4_level.long_mode() && paging_5_level.long_mode());
}

TEST(Format, LeavesOf32BitModes) {
    const GuestEntry large(0x8000'0000 | 0x5a << 13 | table_bits | entry_bit::page_size);
    EXPECT_FALSE(large.leaf(paging_32_bit.level(2))) << "PS is ignored while CR4.PSE is 0";
    EXPECT_TRUE(large.leaf(paging_32_bit_pse.level(2)));
    EXPECT_EQ(large.page(paging_32_bit_pse.level(2)).base(), GuestPhys(0x5a'8000'0000)) << "PSE-36";
    EXPECT_EQ(large.table().base(), GuestPhys(0x800b'4000));
    EXPECT_TRUE(GuestEntry(table_bits).leaf(paging_32_bit.level(1)));
    EXPECT_EQ(GuestEntry(0xffff'f007).page(paging_32_bit.level(1)).base(), GuestPhys(0xffff'f000));
    EXPECT_FALSE(large.leaf(paging_pae.level(3)));
    EXPECT_TRUE(large.leaf(paging_pae.level(2)));
    EXPECT_EQ(large.page(paging_pae.level(2)).base(), GuestPhys(0x8000'0000));
}

TEST(Format, ProtectionKey) {
    EXPECT_EQ(GuestEntry(std::uint64_t{0xb} << 59 | table_bits).key(), 0xbU);
    EXPECT_EQ(GuestEntry(~(std::uint64_t{0xf} << 59)).key(), 0U);
}

TEST(Format, LeafAndFrame) {
    const GuestEntry entry(GuestPhys(0x000a'bcde'f765'4000).frame(),
                           table_bits | entry_bit::page_size | entry_bit::no_execute);
    EXPECT_TRUE(entry.leaf(paging_5_level.level(1)));
    EXPECT_TRUE(entry.leaf(paging_5_level.level(2)));
    EXPECT_TRUE(entry.leaf(paging_5_level.level(3)));
    EXPECT_FALSE(entry.leaf(paging_5_level.level(4)));
    EXPECT_FALSE(entry.leaf(paging_5_level.level(5)));
    EXPECT_EQ(entry.table().base(), GuestPhys(0x000a'bcde'f765'4000));
    EXPECT_EQ(entry.page(paging_5_level.level(1)).base(), GuestPhys(0x000a'bcde'f765'4000));
    EXPECT_EQ(entry.page(paging_5_level.level(2)).base(), GuestPhys(0x000a'bcde'f760'0000));
    EXPECT_EQ(entry.page(paging_5_level.level(3)).base(), GuestPhys(0x000a'bcde'c000'0000));
    EXPECT_TRUE(GuestEntry(table_bits).leaf(paging_4_level.level(1)));
    EXPECT_FALSE(GuestEntry(table_bits).leaf(paging_4_level.level(2)));
}

TEST(Walker, OneAddressMeetsOneEntryPerLevel) {
    const GuestVirt at(0x1234'5678'9abc);
    Tables four(paging_4_level);
    four.map(at, 1, GuestFrame(0x777));
    EXPECT_TRUE(four.walk(at, at));
    EXPECT_EQ(four.visits, (Visits{"PML4E[36]@0x123456789abc", "PDPTE[209]@0x123456789abc",
                                   "PDE[179]@0x123456789abc", "PTE[393]@0x123456789abc"}));
    EXPECT_EQ(four.reads, 4U);

    Tables five(paging_5_level);
    five.map(at, 1, GuestFrame(0x777));
    EXPECT_TRUE(five.walk(at, at));
    ASSERT_EQ(five.visits.size(), 5U);
    EXPECT_EQ(five.visits[0], "PML5E[0]@0x123456789abc");
    EXPECT_EQ(five.visits[4], "PTE[393]@0x123456789abc");
}

TEST(Walker, OneAddressIn32BitModes) {
    const GuestVirt at(0xdead'beef);
    Tables pae(paging_pae);
    pae.map(at, 1, GuestFrame(0x777));
    EXPECT_TRUE(pae.walk(at, at));
    EXPECT_EQ(pae.visits, (Visits{"PDPTE[3]@0xdeadbeef", "PDE[245]@0xdeadbeef", "PTE[219]@0xdeadbeef"}));
    for (const PagingFormat& format : {paging_32_bit, paging_32_bit_pse}) {
        Tables legacy(format);
        legacy.map(at, 1, GuestFrame(0x777));
        EXPECT_TRUE(legacy.walk(at, at));
        EXPECT_EQ(legacy.visits, (Visits{"PDE[890]@0xdeadbeef", "PTE[731]@0xdeadbeef"}));
        EXPECT_TRUE(legacy.entries.contains(GuestPhys(0x1000 + 890 * 4))) << "entries of 4 bytes";
    }
}

TEST(Walker, PageSizeBitOf32BitPaging) {
    Tables tables(paging_32_bit_pse);
    tables.map(GuestVirt(0x40'0000), 2, GuestFrame(0));
    EXPECT_TRUE(tables.walk(GuestVirt(0x40'5000), GuestVirt(0x40'5000)));
    EXPECT_EQ(tables.visits, (Visits{"PDE[1]@0x405000"}));
    Tables without(paging_32_bit);
    without.entries = tables.entries;
    EXPECT_TRUE(without.walk(GuestVirt(0x40'5000), GuestVirt(0x40'5000)));
    EXPECT_EQ(without.visits, (Visits{"PDE[1]@0x405000", "PTE[5]@0x405000"}));
}

TEST(Walker, AllOfA32BitSpace) {
    for (const PagingFormat& format : {paging_pae, paging_32_bit, paging_32_bit_pse}) {
        Tables tables(format);
        tables.map(GuestVirt(0), 1, GuestFrame(1));
        tables.map(GuestVirt(0xffff'ffff), 1, GuestFrame(2));
        std::size_t visits = format.root().entries();
        for (const Level& level : format.levels.subspan(1))
            visits += 2U * level.entries();
        EXPECT_TRUE(tables.walk(GuestVirt(0), GuestVirt(0xffff'ffff)));
        EXPECT_EQ(tables.visits.size(), visits) << "no address is met twice, none beyond the last";
        EXPECT_EQ(tables.visits.back(), fmt::format("PTE[{}]@0xfffff000", format.level(1).entries() - 1));
    }
}

TEST(Walker, NothingToVisitWithPagingOff) {
    Tables tables(paging_off);
    EXPECT_TRUE(tables.walk(GuestVirt(0), GuestVirt(0xffff'ffff)));
    EXPECT_TRUE(tables.visits.empty());
    EXPECT_EQ(tables.reads, 0U);
}

TEST(Walker, GoesThroughTheTableThatTheEntryNames) {
    Tables tables(paging_4_level);
    tables.map(GuestVirt(0), 1, GuestFrame(0x777));
    std::vector<GuestPhys> slots;
    GuestFrame mapped;
    EXPECT_TRUE(tables.walk(GuestVirt(0x10), GuestVirt(0x10), [&](const auto& step) {
        slots.push_back(step.slot);
        if (step.level->number == 1)
            mapped = step.entry.page(*step.level);
        return WalkNext::descend;
    }));
    EXPECT_EQ(slots,
              (std::vector{GuestPhys(0x1000), GuestPhys(0x2000), GuestPhys(0x3000), GuestPhys(0x4000)}));
    EXPECT_EQ(mapped, GuestFrame(0x777));
}

TEST(Walker, EndsWhereNothingIsPresent) {
    Tables tables(paging_4_level);
    tables.map(GuestVirt(0), 1, GuestFrame(0x777));
    EXPECT_TRUE(tables.walk(GuestVirt(gb1), GuestVirt(gb1)));
    EXPECT_EQ(tables.visits, (Visits{"PML4E[0]@0x40000000", "PDPTE[1]@0x40000000"}));
}

TEST(Walker, LargePagesAreLeaves) {
    Tables tables(paging_4_level);
    tables.map(GuestVirt(0), 3, GuestFrame(0));
    tables.map(GuestVirt(gb1), 2, GuestFrame(0));
    EXPECT_TRUE(tables.walk(GuestVirt(0x5000), GuestVirt(0x5000)));
    EXPECT_EQ(tables.visits, (Visits{"PML4E[0]@0x5000", "PDPTE[0]@0x5000"}));
    EXPECT_TRUE(tables.walk(GuestVirt(gb1 + 0x5000), GuestVirt(gb1 + 0x5000)));
    EXPECT_EQ(tables.visits, (Visits{"PML4E[0]@0x40005000", "PDPTE[1]@0x40005000", "PDE[0]@0x40005000"}));
}

TEST(Walker, RangeCrossesTableBorders) {
    // The last page below 1 GB and the first two above: two tables at each of the lower levels.
    Tables tables(paging_4_level);
    for (const std::uint64_t at : {gb1 - kb4, gb1, gb1 + kb4})
        tables.map(GuestVirt(at), 1, GuestFrame(at >> page_shift));
    EXPECT_TRUE(tables.walk(GuestVirt(gb1 - kb4 + 8), GuestVirt(gb1 + kb4)));
    EXPECT_EQ(tables.visits, (Visits{"PML4E[0]@0x3ffff008", "PDPTE[0]@0x3ffff008", "PDE[511]@0x3ffff008",
                                     "PTE[511]@0x3ffff008", "PDPTE[1]@0x40000000", "PDE[0]@0x40000000",
                                     "PTE[0]@0x40000000", "PTE[1]@0x40001000"}));
    EXPECT_EQ(tables.reads, tables.visits.size()) << "each entry is read once";
}

TEST(Walker, RangeEndsAtItsLastAddress) {
    Tables tables(paging_4_level);
    tables.map(GuestVirt(0), 1, GuestFrame(0));
    EXPECT_TRUE(tables.walk(GuestVirt(0), GuestVirt(kb4 - 1)));
    EXPECT_EQ(tables.visits.size(), 4U);
    EXPECT_TRUE(tables.walk(GuestVirt(0), GuestVirt(kb4)));
    EXPECT_EQ(tables.visits.size(), 5U);
    EXPECT_TRUE(tables.walk(GuestVirt(0), GuestVirt(mb2 - 1)));
    EXPECT_EQ(tables.visits.size(), 3U + 512U);
    EXPECT_TRUE(tables.walk(GuestVirt(0), GuestVirt(mb2)));
    EXPECT_EQ(tables.visits.size(), 3U + 512U + 1U) << "the next PDE, which is not present";
}

TEST(Walker, SkipStaysAbove) {
    Tables tables(paging_4_level);
    tables.map(GuestVirt(0), 1, GuestFrame(0));
    tables.map(GuestVirt(mb2), 1, GuestFrame(1));
    EXPECT_TRUE(tables.walk(GuestVirt(0), GuestVirt(mb2), [](const auto& step) {
        return step.level->number == 2 && step.address == GuestVirt(0) ? WalkNext::skip : WalkNext::descend;
    }));
    EXPECT_EQ(tables.visits,
              (Visits{"PML4E[0]@0x0", "PDPTE[0]@0x0", "PDE[0]@0x0", "PDE[1]@0x200000", "PTE[0]@0x200000"}));
}

TEST(Walker, StopEndsEverything) {
    Tables tables(paging_4_level);
    tables.map(GuestVirt(0), 1, GuestFrame(0));
    tables.map(GuestVirt(mb2), 1, GuestFrame(1));
    for (const unsigned level : {1U, 2U, 3U, 4U}) {
        EXPECT_FALSE(tables.walk(GuestVirt(0), GuestVirt(gb1), [level](const auto& step) {
            return step.level->number == level ? WalkNext::stop : WalkNext::descend;
        }));
        EXPECT_EQ(tables.visits.size(), 5U - level);
    }
}

TEST(Walker, HalvesOfTheCanonicalSpace) {
    for (const PagingFormat& format : {paging_4_level, paging_5_level}) {
        SCOPED_TRACE(format.levels.size());
        const std::uint64_t half = std::uint64_t{1} << (format.address_bits() - 1);
        Tables tables(format);
        tables.map(GuestVirt(half - 1), 1, GuestFrame(1));
        tables.map(GuestVirt(~std::uint64_t{0}), 1, GuestFrame(2));
        const std::size_t below_root = (format.levels.size() - 1) * 512;

        // The upper half ends with the last address that there is: the walk must not wrap around.
        EXPECT_TRUE(tables.walk(GuestVirt(0 - half), GuestVirt(~std::uint64_t{0})));
        EXPECT_EQ(tables.visits.size(), 256 + below_root);
        EXPECT_EQ(tables.visits.front(),
                  fmt::format("{}[256]@{:#x}", format.root().name, std::uint64_t{0} - half));
        EXPECT_EQ(tables.visits.back(), "PTE[511]@0xfffffffffffff000");

        EXPECT_TRUE(tables.walk(GuestVirt(0), GuestVirt(half - 1)));
        EXPECT_EQ(tables.visits.size(), 256 + below_root);
        EXPECT_EQ(tables.visits.back(), fmt::format("PTE[511]@{:#x}", half - kb4));

        EXPECT_TRUE(tables.walk(GuestVirt(~std::uint64_t{0}), GuestVirt(~std::uint64_t{0})));
        EXPECT_EQ(tables.visits.size(), format.levels.size());
    }
}

TEST(Walker, BeginsAtAnyDepth) {
    Tables tables(paging_4_level);
    tables.map(GuestVirt(0), 1, GuestFrame(0x777));
    Visits visits;
    EXPECT_TRUE(walk(
        paging_4_level, GuestFrame(3), GuestVirt(0), GuestVirt(0),
        [&tables](const Level&, GuestPhys slot) { return tables.entries.at(slot); },
        [&visits](const WalkStep<GuestPhysSpace>& step) {
            visits.emplace_back(step.level->name);
            return WalkNext::descend;
        },
        2));
    EXPECT_EQ(visits, (Visits{"PDE", "PTE"}));
}

} // namespace
} // namespace umbra
