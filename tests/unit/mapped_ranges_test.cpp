// Unit tests of vmm/debug/mapped_ranges.hpp: page tables of each paging mode, listed; tables that map
// themselves, damaged ones, and the limits.
#include "vmm/debug/mapped_ranges.hpp"

#include <cstring>
#include <ostream>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra {

// NOLINTNEXTLINE(readability-identifier-naming): GoogleTest's name
void PrintTo(const MappedRange& range, std::ostream* out) {
    *out << fmt::format("{} + {:#x} -> {} {}{}{}{} by {:#x}", range.start, range.size, range.physical,
                        range.user ? 'U' : '-', range.writable ? 'W' : '-', range.executable ? 'X' : '-',
                        range.global ? 'G' : '-', range.page_bytes);
}

namespace {

using Ranges = std::vector<MappedRange>;

constexpr std::uint64_t p = entry_bit::present, rw = entry_bit::writable, us = entry_bit::user,
                        ps = entry_bit::page_size, xd = entry_bit::no_execute, g = entry_bit::global;
constexpr std::uint64_t kernel_bits = p | rw, user_bits = p | rw | us;
constexpr std::uint64_t mb = 1 << 20, gb = 1 << 30;

/// Page tables of one paging mode in RAM of 2 MB, from frame 1 up.
class Tables {
  public:
    explicit Tables(const PagingFormat& format) {
        paging.format = &format;
        paging.root = GuestFrame(1);
        paging.no_execute = true;
        paging.global_pages = true;
    }

    /// Maps by an entry of `level`; tables that are missing are made with `above` as their rights.
    void map(GuestVirt at, GuestPhys to, std::uint64_t bits = user_bits, unsigned level = 1,
             std::uint64_t above = user_bits) {
        GuestFrame table = paging.root;
        for (unsigned number = paging.format->root().number; number > level; --number) {
            GuestEntry entry = get(table, number, at);
            if (!entry.present()) {
                const bool in_registers = paging.format->level(number).in_registers;
                entry = GuestEntry(new_table(), in_registers ? p : above);
                set(table, number, at, entry.raw());
            }
            table = entry.table();
        }
        set(table, level, at, to.value() | bits | (level > 1 ? ps : 0));
    }
    [[nodiscard]] GuestEntry get(GuestFrame table, unsigned level, GuestVirt at) const {
        const Level& data = paging.format->level(level);
        if (data.in_registers)
            return GuestEntry(paging.pdptes.at(data.index(at)));
        std::uint64_t raw = 0;
        std::memcpy(&raw, slot(table, data, at), data.entry_bytes);
        return GuestEntry(raw);
    }
    void set(GuestFrame table, unsigned level, GuestVirt at, std::uint64_t raw) {
        const Level& data = paging.format->level(level);
        if (data.in_registers)
            paging.pdptes.at(data.index(at)) = raw;
        else
            std::memcpy(slot(table, data, at), &raw, data.entry_bytes);
    }
    [[nodiscard]] GuestFrame new_table() { return GuestFrame(++last_table_); }
    [[nodiscard]] GuestMemory memory() { return GuestMemory({{GuestPhys(0), ram_}}); }
    [[nodiscard]] MappedRanges list(RangeLimits limits = {}) {
        return guest_ranges(memory(), paging, limits);
    }
    /// The list, which must be whole.
    [[nodiscard]] Ranges all() {
        const MappedRanges listed = list();
        EXPECT_FALSE(listed.truncated);
        return listed.ranges;
    }

    GuestPaging paging;

  private:
    std::byte* slot(GuestFrame table, const Level& level, GuestVirt at) const {
        return ram_.data() + table.base().value() + std::size_t{level.index(at)} * level.entry_bytes;
    }

    mutable std::vector<std::byte> ram_ = std::vector<std::byte>(2 * mb);
    std::uint64_t last_table_ = 1;
};

MappedRange range(GuestVirt at, std::uint64_t size, GuestPhys to, const char* rights = "UWX",
                  std::uint64_t page_bytes = page_size) {
    const std::string_view text = rights;
    const auto has = [text](char c) { return text.find(c) != std::string_view::npos; };
    return {at, size, to, has('U'), has('W'), has('X'), has('G'), page_bytes};
}

constexpr GuestVirt at{0x40'0000};
constexpr GuestPhys to{0x1234'5000};

// ---- Merging

TEST(MappedRanges, OfEmptyTables) {
    for (const PagingFormat* format :
         {&paging_5_level, &paging_4_level, &paging_pae, &paging_32_bit, &paging_32_bit_pse}) {
        Tables tables(*format);
        EXPECT_EQ(tables.all(), Ranges{});
    }
}

TEST(MappedRanges, NeighboursAreOneRange) {
    Tables tables(paging_4_level);
    for (std::uint64_t i = 0; i < 700; ++i) // across tables
        tables.map(at + i * page_size, to + i * page_size);
    EXPECT_EQ(tables.all(), Ranges{range(at, 700 * page_size, to)});
}

TEST(MappedRanges, HoleParts) {
    Tables tables(paging_4_level);
    tables.map(at, to);
    tables.map(at + 2 * page_size, to + 2 * page_size);
    EXPECT_EQ(tables.all(),
              (Ranges{range(at, page_size, to), range(at + 2 * page_size, page_size, to + 2 * page_size)}));
}

TEST(MappedRanges, OtherMemoryParts) {
    Tables tables(paging_4_level);
    tables.map(at, to);
    tables.map(at + page_size, to);
    tables.map(at + 2 * page_size, to - page_size);
    EXPECT_EQ(tables.all(), (Ranges{range(at, page_size, to), range(at + page_size, page_size, to),
                                    range(at + 2 * page_size, page_size, to - page_size)}));
}

TEST(MappedRanges, EachRightParts) {
    for (const auto& [bits, rights] :
         {std::pair{p | rw, "WX"}, {p | us, "UX"}, {user_bits | xd, "UW"}, {user_bits | g, "UWXG"}}) {
        Tables tables(paging_4_level);
        tables.map(at, to);
        tables.map(at + page_size, to + page_size, bits);
        tables.map(at + 2 * page_size, to + 2 * page_size);
        EXPECT_EQ(tables.all(),
                  (Ranges{range(at, page_size, to), range(at + page_size, page_size, to + page_size, rights),
                          range(at + 2 * page_size, page_size, to + 2 * page_size)}));
    }
}

TEST(MappedRanges, OtherBitsDoNotPart) {
    Tables tables(paging_4_level);
    tables.map(at, to);
    tables.map(at + page_size, to + page_size, user_bits | entry_bit::accessed | entry_bit::dirty | 0xe18);
    EXPECT_EQ(tables.all(), Ranges{range(at, 2 * page_size, to)});
}

TEST(MappedRanges, PageSizeParts) {
    Tables tables(paging_4_level);
    const GuestPhys block(6 * mb);
    tables.map(at, block, user_bits, 2);
    tables.map(at + 2 * mb, block + 2 * mb, user_bits, 2);
    tables.map(at + 4 * mb, block + 4 * mb);
    tables.map(GuestVirt(3 * gb), GuestPhys(5 * gb), user_bits, 3);
    EXPECT_EQ(tables.all(),
              (Ranges{range(at, 4 * mb, block, "UWX", 2 * mb), range(at + 4 * mb, page_size, block + 4 * mb),
                      range(GuestVirt(3 * gb), gb, GuestPhys(5 * gb), "UWX", gb)}));
}

TEST(MappedRanges, RightsAreThoseOfAllLevels) {
    for (const auto& [above, rights] : {std::pair{p | rw, "WX"}, {p | us, "UX"}, {user_bits | xd, "UW"}}) {
        Tables tables(paging_4_level);
        tables.map(at, to, user_bits, 1, above);
        EXPECT_EQ(tables.all(), Ranges{range(at, page_size, to, rights)});
    }
    Tables tables(paging_4_level); // what one branch lacks the next one has
    tables.map(at, to, user_bits, 1, p);
    tables.map(at + 2 * mb, to + 2 * mb);
    const GuestFrame upper = tables.get(tables.get(tables.paging.root, 4, at).table(), 3, at).table();
    EXPECT_EQ(tables.all(),
              (Ranges{range(at, page_size, to, "X"), range(at + 2 * mb, page_size, to + 2 * mb, "X")}));
    tables.set(tables.paging.root, 4, at, tables.get(tables.paging.root, 4, at).raw() | rw | us);
    const GuestFrame third = tables.get(tables.paging.root, 4, at).table();
    tables.set(third, 3, at, tables.get(third, 3, at).raw() | rw | us);
    EXPECT_EQ(tables.get(upper, 2, at).raw() & (rw | us), 0U);
    EXPECT_EQ(tables.all(),
              (Ranges{range(at, page_size, to, "X"), range(at + 2 * mb, page_size, to + 2 * mb)}));
}

TEST(MappedRanges, GlobalOnlyIfTheCpuHeedsIt) {
    Tables tables(paging_4_level);
    tables.map(at, to, user_bits | g);
    EXPECT_EQ(tables.all(), Ranges{range(at, page_size, to, "UWXG")});
    tables.paging.global_pages = false;
    EXPECT_EQ(tables.all(), Ranges{range(at, page_size, to)});
}

// ---- Modes

TEST(MappedRanges, OnBothSidesOfTheCanonicalHole) {
    for (const PagingFormat* format : {&paging_4_level, &paging_5_level}) {
        Tables tables(*format);
        const std::uint64_t half = std::uint64_t{1} << (format->address_bits() - 1);
        const GuestVirt below(half - page_size), above = format->sign_extend(half), first(0),
                                                 last(0 - page_size);
        ASSERT_TRUE(format->canonical(below) && format->canonical(above));
        tables.map(first, to - page_size);
        tables.map(below, to);
        tables.map(above, to + page_size);
        tables.map(last, to + 2 * page_size);
        EXPECT_EQ(tables.all(), (Ranges{range(first, page_size, to - page_size), range(below, page_size, to),
                                        range(above, page_size, to + page_size),
                                        range(last, page_size, to + 2 * page_size)}));
    }
}

TEST(MappedRanges, Pae) {
    Tables tables(paging_pae);
    const GuestVirt last(4 * gb - page_size);
    tables.map(at, GuestPhys(0x8'1234'5000));
    tables.map(GuestVirt(gb), GuestPhys(2 * mb), kernel_bits | xd, 2);
    tables.map(last, to, p);
    EXPECT_EQ(tables.all(), (Ranges{range(at, page_size, GuestPhys(0x8'1234'5000)),
                                    range(GuestVirt(gb), 2 * mb, GuestPhys(2 * mb), "W", 2 * mb),
                                    range(last, page_size, to, "X")}));
    tables.paging.pdptes[3] = 0;
    EXPECT_EQ(tables.all().size(), 2U) << "the registers count";
}

TEST(MappedRanges, Bits32) {
    for (const PagingFormat* format : {&paging_32_bit, &paging_32_bit_pse}) {
        Tables tables(*format);
        const GuestVirt last(4 * gb - page_size);
        for (std::uint64_t i = 0; i < 1500; ++i) // a table has 1024
            tables.map(at + i * page_size, to + i * page_size);
        tables.map(last, to, kernel_bits);
        EXPECT_EQ(tables.all(), (Ranges{range(at, 1500 * page_size, to), range(last, page_size, to, "WX")}));
    }
}

TEST(MappedRanges, Bits32LargePages) {
    Tables tables(paging_32_bit_pse);
    tables.map(at, GuestPhys(8 * mb), user_bits, 2);
    tables.map(at + 4 * mb, GuestPhys(12 * mb), user_bits, 2);
    tables.set(tables.paging.root, 2, at + 16 * mb, 8 * mb | user_bits | ps | 1 << 13); // PSE-36: bit 32
    EXPECT_EQ(tables.all(), (Ranges{range(at, 8 * mb, GuestPhys(8 * mb), "UWX", 4 * mb),
                                    range(at + 16 * mb, 4 * mb, GuestPhys(4 * gb + 8 * mb), "UWX", 4 * mb)}));
}

TEST(MappedRanges, WithoutPagingRamIsItsOwnTranslation) {
    std::vector<std::byte> low(3 * page_size), end(4 * page_size), high(2 * page_size);
    const GuestPhys last(4 * gb - 2 * page_size);
    const GuestMemory memory({{GuestPhys(0), low}, {last, end}, {GuestPhys(8 * gb), high}});
    GuestPaging paging;
    paging.format = &paging_off;
    const MappedRanges listed = guest_ranges(memory, paging);
    EXPECT_FALSE(listed.truncated);
    EXPECT_EQ(listed.ranges, (Ranges{range(GuestVirt(0), 3 * page_size, GuestPhys(0)),
                                     range(GuestVirt(last.value()), 2 * page_size, last)}));
}

// ---- Damaged tables

TEST(MappedRanges, ReservedBitsMapNothing) {
    Tables tables(paging_4_level);
    tables.map(at, to, user_bits | std::uint64_t{1} << 50);
    tables.map(at + page_size, to + page_size);
    tables.map(at + 2 * mb, GuestPhys(2 * mb) + 2 * page_size, user_bits, 2); // not aligned
    EXPECT_EQ(tables.all(), Ranges{range(at + page_size, page_size, to + page_size)});
    tables.set(tables.paging.root, 4, at, tables.get(tables.paging.root, 4, at).raw() | ps);
    EXPECT_EQ(tables.all(), Ranges{}) << "nor does what lies below them";
}

TEST(MappedRanges, NoExecuteIsReservedWithoutNxe) {
    Tables tables(paging_4_level);
    tables.map(at, to, user_bits | xd);
    tables.paging.no_execute = false;
    EXPECT_EQ(tables.all(), Ranges{});
}

TEST(MappedRanges, TablesOutsideRam) {
    for (const PagingFormat* format : {&paging_5_level, &paging_4_level, &paging_pae}) {
        Tables tables(*format);
        tables.map(at, to);
        tables.map(at + 8 * mb, to);
        const unsigned level = 2;
        GuestFrame table = tables.paging.root;
        for (unsigned number = format->root().number; number > level; --number)
            table = tables.get(table, number, at).table();
        tables.set(table, level, at, (4 * gb) | user_bits);
        EXPECT_EQ(tables.all(), Ranges{range(at + 8 * mb, page_size, to)}) << "all-ones has reserved bits";
    }
    Tables tables(paging_4_level);
    tables.paging.root = GuestFrame(4 * gb >> page_shift);
    EXPECT_EQ(tables.all(), Ranges{});
}

TEST(MappedRanges, Bits32TablesOutsideRamReadAsOnes) {
    Tables tables(paging_32_bit);
    tables.set(tables.paging.root, 2, at, 1 * gb | user_bits);
    const Ranges all = tables.all();
    ASSERT_EQ(all.size(), 1024U);
    EXPECT_EQ(all.front(), range(at, page_size, GuestPhys(0xffff'f000), "UWXG"));
}

// ---- Limits

TEST(MappedRanges, TableThatMapsItself) {
    Tables tables(paging_4_level);
    const GuestVirt self(0xffff'ff7f'bfdf'e000); // entry 510 at each level
    tables.set(tables.paging.root, 4, self, tables.paging.root.base().value() | user_bits | xd);
    tables.map(at, to);
    // The window on the tables: each one that exists, at its place.
    const Ranges all = tables.all();
    EXPECT_EQ(all.size(), 1U + 4U);
    EXPECT_EQ(all.front(), range(at, page_size, to));
    EXPECT_EQ(all.back(), range(self, page_size, tables.paging.root.base(), "UW"));
}

TEST(MappedRanges, TablesThatMapMoreThanCanBeListed) {
    for (const PagingFormat* format :
         {&paging_5_level, &paging_4_level, &paging_pae, &paging_32_bit, &paging_32_bit_pse}) {
        SCOPED_TRACE(format->levels.size());
        Tables tables(*format);
        const Level& level = format->level(2);
        for (unsigned i = 0; i < level.entries(); ++i) // every entry leads back to the table
            tables.set(tables.paging.root, 2, GuestVirt(std::uint64_t{i} << level.shift),
                       tables.paging.root.base().value() | user_bits);
        tables.paging.pdptes.fill(tables.paging.root.base().value() | p);
        const MappedRanges listed = tables.list();
        EXPECT_TRUE(listed.truncated);
        EXPECT_EQ(listed.ranges.size(), RangeLimits{}.ranges);
        for (const MappedRange& each : listed.ranges)
            ASSERT_EQ(each.physical, tables.paging.root.base());
    }
}

TEST(MappedRanges, TablesThatMapNothingAreReadNoFurtherThanTheLimit) {
    Tables tables(paging_5_level);
    // Each level's table has the one below it in all entries, and the lowest is empty: nothing is listed.
    for (unsigned level = 5; level > 1; --level) {
        const GuestFrame table(6 - level), next(7 - level);
        for (unsigned i = 0; i < entries_per_table; ++i)
            tables.set(table, level, GuestVirt(std::uint64_t{i} << paging_5_level.level(level).shift),
                       next.base().value() | user_bits);
    }
    const MappedRanges listed = tables.list();
    EXPECT_TRUE(listed.truncated);
    EXPECT_EQ(listed.ranges, Ranges{});
    EXPECT_TRUE(tables.list({.entries = 1}).truncated);
}

TEST(MappedRanges, LimitsAreExact) {
    Tables tables(paging_4_level);
    for (std::uint64_t i = 0; i < 5; ++i)
        tables.map(at + 2 * i * page_size, to);
    const MappedRanges five = tables.list({.ranges = 5}), four = tables.list({.ranges = 4}),
                       none = tables.list({.ranges = 0});
    EXPECT_FALSE(five.truncated);
    EXPECT_EQ(five.ranges.size(), 5U);
    EXPECT_TRUE(four.truncated);
    EXPECT_TRUE(std::equal(four.ranges.begin(), four.ranges.end(), five.ranges.begin()));
    EXPECT_EQ(four.ranges.size(), 4U);
    EXPECT_TRUE(none.truncated);
    EXPECT_EQ(none.ranges, Ranges{});
    // One table of each of the four levels.
    EXPECT_FALSE(tables.list({.entries = std::size_t{4} * entries_per_table}).truncated);
    EXPECT_TRUE(tables.list({.entries = std::size_t{4} * entries_per_table - 1}).truncated);
}

TEST(MappedRanges, RangeThatGrowsNeedsNoRoom) {
    Tables tables(paging_4_level);
    for (std::uint64_t i = 0; i < 100; ++i)
        tables.map(at + i * page_size, to + i * page_size);
    const MappedRanges listed = tables.list({.ranges = 1});
    EXPECT_FALSE(listed.truncated);
    EXPECT_EQ(listed.ranges, Ranges{range(at, 100 * page_size, to)});
}

} // namespace
} // namespace umbra
