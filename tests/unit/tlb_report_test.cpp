// Unit tests of vmm/tlb_report.hpp: every kind of stale use, in words.
#include "vmm/tlb_report.hpp"

#include <algorithm>
#include <sstream>

#include <gtest/gtest.h>

namespace umbra {
namespace {

constexpr std::uint64_t table_bits = entry_bit::present | entry_bit::writable | entry_bit::accessed;

/// A page that was moved by remap(), and is used by touch() 2.5 us and 3 traps later.
class TlbReportTest : public testing::Test {
  public:
    TlbReportTest() {
        for (unsigned i = 0; i < 4; ++i) {
            const GuestPhys slot(0x1000 * (i + 1) + 8 * i);
            const GuestEntry entry(GuestFrame(i + 2), table_bits | (i == 3 ? entry_bit::dirty : 0));
            stale.before.steps[i] = {&paging_4_level.levels[i], slot, entry};
        }
        stale.before.depth = 4;
        stale.now = stale.before;
        stale.now.steps[3].entry = GuestEntry(GuestFrame(0x77), table_bits);
        stale.before.address = GuestPhys(0x5123);
        stale.now.address = GuestPhys(0x7'7123);
        stale.address = GuestVirt(0xffff'8000'0000'0123);
        stale.harm = StaleUse::Harm::other_page;
        stale.change = {.level = stale.before.leaf().level,
                        .slot = stale.before.leaf().slot,
                        .before = stale.before.leaf().entry,
                        .now = stale.now.leaf().entry,
                        .written = Origin{.rip = GuestVirt(0x101010), .time = 5000, .traps = 7}};
    }

    [[nodiscard]] std::string text() const {
        const auto symbol = [](GuestVirt at) -> std::string {
            return at == GuestVirt(0x101010) ? "remap+0x10" : at == GuestVirt(0x102000) ? "touch" : "";
        };
        return tlb_report({.stale = stale, .used = used, .symbol = symbol, .ticks_per_us = 1000});
    }
    [[nodiscard]] bool says(const std::string& words) const {
        return text().find(words) != std::string::npos;
    }

    StaleUse stale;
    Origin used{.rip = GuestVirt(0x102000), .time = 7500, .traps = 10};
};

TEST_F(TlbReportTest, TellsAllThatIsKnown) {
    stale.access.write = true;
    EXPECT_EQ(
        text(),
        "Stale translation used: write of 0xffff800000000123 by the kernel\n"
        "  used at     0000000000102000  <touch>\n"
        "  written at  0000000000101010  <remap+0x10>, 2.500 us and 3 traps before\n"
        "  PTE    gpa:0x4018              was  0000000000005063  P W - A D - -   -> 4 KB page gpa:0x5000\n"
        "  PTE    gpa:0x4018              is   0000000000077023  P W - A - - -   -> 4 KB page gpa:0x77000\n"
        "  by the tables: gpa:0x77123; a CPU may still reach gpa:0x5123\n"
        "  missing since: INVLPG or INVPCID of this page, or a CR3 load\n");
}

TEST_F(TlbReportTest, NamesTheAccess) {
    EXPECT_TRUE(says(": read of 0xffff800000000123 by the kernel\n"));
    stale.access = {.fetch = true, .user = true};
    EXPECT_TRUE(says(": fetch of 0xffff800000000123 by user code\n"));
}

TEST_F(TlbReportTest, NamesTheHarm) {
    stale.harm = StaleUse::Harm::fault_missed;
    stale.now.fault = PageFault{stale.address, 2};
    stale.change->now = GuestEntry();
    EXPECT_TRUE(says("by the tables: page fault, error code 0x2; a CPU may still reach gpa:0x5123\n"));
    EXPECT_TRUE(says("is   0000000000000000  - - - - - - -   -> nothing\n"));
    stale.harm = StaleUse::Harm::dirty_missed;
    EXPECT_TRUE(says("the page is clean; a CPU may write to gpa:0x5123, and not set dirty again\n"));
}

TEST_F(TlbReportTest, AnUpperEntry) {
    stale.change->level = &paging_4_level.level(2);
    stale.change->slot = GuestPhys(0x3010);
    stale.change->now = GuestEntry(GuestFrame(0x200), table_bits | entry_bit::page_size);
    stale.through_structure_cache = true;
    EXPECT_TRUE(says(
        "  PDE    gpa:0x3010              was  0000000000005063  P W - A - - -   -> table gpa:0x5000\n"));
    EXPECT_TRUE(says("-> 2 MB page gpa:0x200000\n"));
    EXPECT_TRUE(
        says("missing since: any INVLPG, CR3 load or INVPCID: the entry may be cached without the page"));
}

TEST_F(TlbReportTest, AnUnseenWrite) {
    stale.change->written.reset();
    EXPECT_TRUE(says("written at  a place that was not seen"));
}

TEST_F(TlbReportTest, OneTrapIsSingular) {
    used.traps = 8;
    EXPECT_TRUE(says("us and 1 trap before\n"));
}

TEST_F(TlbReportTest, AGlobalPageOfAnotherAddressSpace) {
    stale.change.reset();
    stale.before.global = true;
    stale.now.steps[0].slot = GuestPhys(0x9000);
    stale.spared.contexts = 1;
    EXPECT_TRUE(says("of another address space: root gpa:0x1000 when it was cached, gpa:0x9000 now\n"));
    EXPECT_TRUE(says("missing since: INVLPG of this page, or a change of CR4.PGE: the page is global\n"));
    EXPECT_TRUE(says("in vain since: 1 CR3 load or the like, which global pages survive\n"));
    stale.now.steps[0].slot = stale.before.steps[0].slot;
    EXPECT_TRUE(says("no entry has changed, but what its bits mean"));
}

TEST_F(TlbReportTest, InvalidationsThatDidNotHelp) {
    stale.pcid = 5;
    stale.spared = {.pages = 2, .contexts = 3, .last_page = GuestVirt(0x40'0000)};
    EXPECT_TRUE(says("missing since: INVLPG or INVPCID of this page, or a CR3 load of PCID 0x5\n"));
    EXPECT_TRUE(says("in vain since: 3 CR3 loads or the like, of another PCID\n"));
    EXPECT_TRUE(says("in vain since: 2 INVLPGs, the last of 0x0000000000400000\n"));
    stale.spared.pages = 1;
    EXPECT_TRUE(says("in vain since: 1 INVLPG, of 0x0000000000400000\n"));
}

TEST_F(TlbReportTest, IsPlainAndNarrow) {
    stale.address = GuestVirt(~std::uint64_t{0});
    stale.change->slot = GuestPhys(0xf'ffff'ffff'fff8);
    stale.change->before = stale.change->now = GuestEntry(~std::uint64_t{0});
    stale.spared = {.pages = 12345, .contexts = 12345, .last_page = stale.address};
    stale.through_structure_cache = true;
    std::istringstream lines(text());
    for (std::string line; std::getline(lines, line);) {
        EXPECT_LE(line.size(), 120U) << line;
        EXPECT_TRUE(std::ranges::all_of(line, [](char c) { return c >= ' ' && c <= '~'; })) << line;
    }
}

} // namespace
} // namespace umbra
