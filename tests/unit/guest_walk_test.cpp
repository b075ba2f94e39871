// Unit tests of shadow/guest_walk.hpp: every combination of permission bits, accesses and control bits
// against an oracle, reserved bits one by one, accessed and dirty bits, and tables that lie nowhere.
#include "shadow/guest_walk.hpp"

#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

constexpr std::uint64_t table_bits = entry_bit::present | entry_bit::writable | entry_bit::user;

constexpr std::array all_accesses{
    Access{.write = false, .fetch = false, .user = false},
    Access{.write = true, .fetch = false, .user = false},
    Access{.write = false, .fetch = true, .user = false},
    Access{.write = false, .fetch = false, .user = true},
    Access{.write = true, .fetch = false, .user = true},
    Access{.write = false, .fetch = true, .user = true},
};

std::string text(Access access) {
    return fmt::format("{} by {}",
                       access.write   ? "write"
                       : access.fetch ? "fetch"
                                      : "read",
                       access.user ? "user" : "supervisor");
}

/// RAM with one chain of tables for one address: the root in frame 0, each next table in the next frame, and
/// the page that the leaf maps far behind. Entries are set one by one.
class Chain {
  public:
    static constexpr std::uint64_t ram_size = std::uint64_t{16} << page_shift;
    static constexpr GuestPhys page{std::uint64_t{5}
                                    << 30}; ///< 1 GB aligned; not RAM, which a walk does not care for
    static constexpr GuestVirt at{0x1234'5678'9abc};

    explicit Chain(const PagingFormat& format = paging_4_level, unsigned leaf = 1) : leaf_(leaf) {
        paging.format = &format;
        for (const Level& level : format.levels) {
            if (level.number >= leaf)
                set(level.number, table_bits);
        }
    }

    [[nodiscard]] const Level& level(unsigned number) const { return paging.format->level(number); }
    [[nodiscard]] GuestFrame table(unsigned number) const {
        return GuestFrame(paging.format->levels.size() - number);
    }
    [[nodiscard]] GuestPhys slot(unsigned number) const {
        return table(number).base() + level(number).index(at) * sizeof(GuestEntry);
    }
    /// Gives the entry of level `number` these bits, its frame and, for a large leaf, PS.
    void set(unsigned number, std::uint64_t bits) {
        const bool leaf = number == leaf_;
        put(number, GuestEntry(leaf ? page.frame() : table(number - 1),
                               bits | (leaf && number > 1 ? entry_bit::page_size : 0)));
    }
    void put(unsigned number, GuestEntry entry) { ASSERT_TRUE(memory.write(slot(number), entry.raw())); }
    [[nodiscard]] GuestEntry get(unsigned number) const {
        return GuestEntry(memory.read<std::uint64_t>(slot(number)).value());
    }
    [[nodiscard]] GuestWalk walk(Access access = {}) const { return walk_guest(memory, paging, at, access); }
    /// The error code of an access's fault; nothing if it succeeds.
    [[nodiscard]] std::optional<std::uint32_t> error(Access access = {}) const {
        const GuestWalk result = walk(access);
        return result.fault ? std::optional(result.fault->error_code) : std::nullopt;
    }
    [[nodiscard]] std::vector<std::byte> contents() const { return ram_; }
    [[nodiscard]] unsigned leaf() const { return leaf_; }

    GuestPaging paging;

  private:
    std::vector<std::byte> ram_ = std::vector<std::byte>(ram_size);
    unsigned leaf_;

  public:
    GuestMemory memory{{{GuestPhys(0), ram_}}};
};

// ---- permission bits

/// P, R/W, U/S and XD of one entry, as a number below 16.
struct Bits {
    unsigned code;
    [[nodiscard]] bool p() const { return (code & 1) != 0; }
    [[nodiscard]] bool rw() const { return (code & 2) != 0; }
    [[nodiscard]] bool us() const { return (code & 4) != 0; }
    [[nodiscard]] bool xd() const { return (code & 8) != 0; }
    [[nodiscard]] std::uint64_t raw() const {
        return (p() ? entry_bit::present : 0) | (rw() ? entry_bit::writable : 0) |
               (us() ? entry_bit::user : 0) | (xd() ? entry_bit::no_execute : 0);
    }
};

/// What Intel SDM vol. 3A, 4.6.1 and 4.7 say of an access through entries with these bits, root first, in the
/// manual's words and order: the error code of the page fault, or nothing.
std::optional<std::uint32_t> oracle(std::span<const Bits> entries, Access access, const GuestPaging& paging) {
    // 4.7: "W/R", "U/S"; "I/D … 1 if the access was an instruction fetch and CR4.SMEP = 1, or CR4.PAE = 1 and
    // IA32_EFER.NXE = 1".
    std::uint32_t code = 0;
    if (access.write)
        code |= 0x2;
    if (access.user)
        code |= 0x4;
    if (access.fetch && (paging.smep || paging.no_execute))
        code |= 0x10;

    // 4.7: no translation "because a paging-structure entry's P flag is 0" or "reserved bits": the walk ends
    // at the first. XD is reserved while IA32_EFER.NXE = 0 (table 4-15 and on).
    for (const Bits& entry : entries) {
        if (!entry.p())
            return code;
        if (entry.xd() && !paging.no_execute)
            return code | 0x8 | 0x1;
    }
    code |= 0x1;

    bool user_address = true; // 4.6: "U/S flag 1 in every entry: a user-mode address"
    bool writable = true;     // "R/W flag 1 in every entry"
    bool executable = true;   // "XD flag 0 in every entry"
    for (const Bits& entry : entries) {
        user_address = user_address && entry.us();
        writable = writable && entry.rw();
        executable = executable && !entry.xd();
    }
    bool allowed = false;
    if (!access.user) {
        if (access.write) // "CR0.WP = 0: to any address; CR0.WP = 1: with a translation for which R/W is 1"
            allowed = !paging.write_protect || writable;
        else if (access.fetch &&
                 user_address) // "CR4.SMEP = 1: may not be fetched from any user-mode address"
            allowed = !paging.smep && executable;
        else if (access.fetch) // "NXE = 1: from a translation with XD 0 in every entry"
            allowed = executable;
        else // SMAP is not offered
            allowed = true;
    } else if (user_address) { // "not to any supervisor-mode address"
        allowed = access.write ? writable : access.fetch ? executable : true;
    }
    return allowed ? std::nullopt : std::optional(code);
}

/// Compares walk and oracle for all accesses and control bits; `entries` are of levels root to leaf.
void check_all_accesses(Chain& chain, std::span<const Bits> entries) {
    unsigned number = chain.paging.format->root().number;
    for (const Bits& entry : entries)
        chain.set(number--, entry.raw());
    for (unsigned control = 0; control < 8; ++control) {
        chain.paging.write_protect = (control & 1) != 0;
        chain.paging.no_execute = (control & 2) != 0;
        chain.paging.smep = (control & 4) != 0;
        for (const Access access : all_accesses) {
            const auto expected = oracle(entries, access, chain.paging);
            const GuestWalk walk = chain.walk(access);
            const bool same = expected ? walk.fault && walk.fault->error_code == *expected &&
                                             walk.fault->address == Chain::at
                                       : !walk.fault && walk.depth == entries.size();
            if (same)
                continue;
            std::string bits;
            for (const Bits& entry : entries)
                bits += fmt::format(" {}{}{}{}", entry.p() ? 'P' : '-', entry.rw() ? 'W' : '-',
                                    entry.us() ? 'U' : '-', entry.xd() ? 'X' : '-');
            FAIL() << text(access) << ", entries" << bits << ", WP " << chain.paging.write_protect << " NXE "
                   << chain.paging.no_execute << " SMEP " << chain.paging.smep << ": expected "
                   << (expected ? fmt::format("error {:#x}", *expected) : "success") << ", got "
                   << (walk.fault ? fmt::format("error {:#x}", walk.fault->error_code) : "success");
        }
    }
}

class Permissions : public ::testing::TestWithParam<unsigned> {};

TEST_P(Permissions, AllCombinationsOfFourLevels) {
    Chain chain(paging_4_level, GetParam());
    const unsigned depth = 5 - GetParam();
    std::array<Bits, 4> entries{};
    for (unsigned combination = 0; combination < 1U << (4 * depth); ++combination) {
        for (unsigned i = 0; i < depth; ++i)
            entries.at(i) = Bits{combination >> (4 * i) & 0xf};
        check_all_accesses(chain, std::span(entries).first(depth));
        if (HasFatalFailure())
            return;
    }
}

TEST_P(Permissions, AnyTwoOfFiveLevels) {
    Chain chain(paging_5_level, GetParam());
    const unsigned depth = 6 - GetParam();
    for (unsigned a = 0; a < depth; ++a) {
        for (unsigned b = 0; b < depth; ++b) {
            for (unsigned combination = 0; combination < 256; ++combination) {
                std::array<Bits, 5> entries{};
                entries.fill(Bits{7});
                entries.at(a) = Bits{combination & 0xf};
                entries.at(b) = Bits{combination >> 4};
                check_all_accesses(chain, std::span(entries).first(depth));
                if (HasFatalFailure())
                    return;
            }
        }
    }
}

INSTANTIATE_TEST_SUITE_P(LeafAtLevel, Permissions, ::testing::Values(1U, 2U, 3U));

// ---- the record of a walk

TEST(GuestWalk, TranslatesToTheByte) {
    for (const PagingFormat* format : {&paging_4_level, &paging_5_level}) {
        for (const unsigned leaf : {1U, 2U, 3U}) {
            const Chain chain(*format, leaf);
            const GuestWalk walk = chain.walk();
            EXPECT_FALSE(walk.fault);
            EXPECT_EQ(walk.address, Chain::page + (Chain::at.value() & (chain.level(leaf).span() - 1)));
            ASSERT_EQ(walk.depth, format->root().number - leaf + 1);
            for (unsigned i = 0; i < walk.depth; ++i) {
                const unsigned number = format->root().number - i;
                EXPECT_EQ(walk.visited()[i].level, &chain.level(number));
                EXPECT_EQ(walk.visited()[i].slot, chain.slot(number));
                EXPECT_EQ(walk.visited()[i].entry, chain.get(number));
            }
            EXPECT_EQ(walk.leaf().level->number, leaf);
        }
    }
}

TEST(GuestWalk, RightsAreThoseOfAllEntries) {
    for (const unsigned number : {1U, 2U, 3U, 4U}) {
        Chain chain;
        EXPECT_TRUE(chain.walk().user);
        EXPECT_TRUE(chain.walk().writable);
        EXPECT_FALSE(chain.walk().no_execute);
        chain.set(number, entry_bit::present | entry_bit::no_execute);
        EXPECT_FALSE(chain.walk().user);
        EXPECT_FALSE(chain.walk().writable);
        EXPECT_TRUE(chain.walk().no_execute);
    }
}

TEST(GuestWalk, EndsAtTheFirstAbsentEntry) {
    for (const unsigned number : {1U, 2U, 3U, 4U}) {
        Chain chain;
        chain.put(number, GuestEntry(~entry_bit::present)); // all its other bits mean nothing
        const GuestWalk walk = chain.walk();
        EXPECT_EQ(chain.error(), 0U);
        EXPECT_EQ(walk.depth, 5 - number);
        EXPECT_EQ(walk.leaf().level->number, number);
    }
}

TEST(GuestWalk, FirstAndLastAddress) {
    Chain chain;
    const GuestVirt last(~std::uint64_t{0});
    for (const GuestVirt at : {GuestVirt(0), last}) {
        for (const Level& level : paging_4_level.levels) {
            const GuestFrame next = level.number == 1 ? Chain::page.frame() : chain.table(level.number - 1);
            ASSERT_TRUE(
                chain.memory.write(chain.table(level.number).base() + level.index(at) * sizeof(GuestEntry),
                                   GuestEntry(next, table_bits).raw()));
        }
        const GuestWalk walk = walk_guest(chain.memory, chain.paging, at, {});
        EXPECT_FALSE(walk.fault);
        EXPECT_EQ(walk.address, Chain::page + at.page_offset());
    }
}

// ---- reserved bits

constexpr std::uint32_t reserved_fault = PageFault::present | PageFault::reserved;

/// Expects bit by bit that exactly `reserved` of bits [1, 63] fault in the entry of `number`, beside what the
/// entry needs.
void check_reserved(Chain& chain, unsigned number, std::uint64_t reserved) {
    const GuestEntry plain = chain.get(number);
    for (unsigned bit = 1; bit < 64; ++bit) {
        const std::uint64_t mask = std::uint64_t{1} << bit;
        // Another frame, another kind of entry, or fewer rights: not what this is about.
        const bool leads_elsewhere =
            number != chain.leaf() && bit >= page_shift && bit < chain.paging.physical_bits;
        if (plain.has(mask) || leads_elsewhere)
            continue;
        chain.put(number, plain.with(mask));
        const auto expected = (reserved & mask) != 0 ? std::optional(reserved_fault) : std::nullopt;
        const bool elsewhere = number == 2 || number == 3; // PS without being the leaf: checked on its own
        if (bit == 7 && number != chain.leaf() && elsewhere)
            continue;
        EXPECT_EQ(chain.error(), expected) << "bit " << bit << " of level " << number;
        if (expected) {
            EXPECT_EQ(chain.walk().leaf().level->number, number);
            EXPECT_EQ(chain.error({.write = true, .fetch = false, .user = true}),
                      reserved_fault | PageFault::write | PageFault::user);
        }
    }
    chain.put(number, plain);
}

constexpr std::uint64_t bits(unsigned high, unsigned low) {
    return (~std::uint64_t{0} >> (63 - high)) & ~((std::uint64_t{1} << low) - 1);
}

TEST(ReservedBits, ExactlyThoseOfTheManual) {
    for (const unsigned physical_bits : {36U, 40U, 48U, 52U}) {
        for (const PagingFormat* format : {&paging_4_level, &paging_5_level}) {
            for (const unsigned leaf : {1U, 2U, 3U}) {
                for (const bool no_execute : {false, true}) {
                    Chain chain(*format, leaf);
                    chain.paging.physical_bits = physical_bits;
                    chain.paging.no_execute = no_execute;
                    const std::uint64_t everywhere =
                        (physical_bits < 52 ? bits(51, physical_bits) : 0) | (no_execute ? 0 : bits(63, 63));
                    for (unsigned number = format->root().number; number >= leaf; --number) {
                        std::uint64_t reserved = everywhere;
                        if (number >= 4)
                            reserved |= bits(7, 7); // PS must be 0 in PML5E and PML4E
                        if (number == leaf && leaf == 3)
                            reserved |= bits(29, 13); // a 1 GB page's address; bit 12 is PAT
                        if (number == leaf && leaf == 2)
                            reserved |= bits(20, 13);
                        check_reserved(chain, number, reserved);
                    }
                }
            }
        }
    }
}

TEST(ReservedBits, PageSizeWithoutGigabytePages) {
    Chain chain(paging_4_level, 3);
    EXPECT_EQ(chain.error(), std::nullopt);
    chain.paging.gigabyte_pages = false;
    EXPECT_EQ(chain.error(), reserved_fault);
}

TEST(ReservedBits, AboveAnAbsentEntryCountFirst) {
    Chain chain;
    chain.paging.physical_bits = 40;
    chain.put(1, GuestEntry());
    chain.put(2, chain.get(2).with(std::uint64_t{1} << 45));
    EXPECT_EQ(chain.error(), reserved_fault);
    chain.put(3, GuestEntry());
    EXPECT_EQ(chain.error(), 0U);
}

TEST(ReservedBits, CountBeforeRights) {
    Chain chain;
    chain.paging.physical_bits = 40;
    chain.put(4, GuestEntry(chain.table(3), entry_bit::present)); // not for users
    chain.put(1, chain.get(1).with(std::uint64_t{1} << 45));
    EXPECT_EQ(chain.error({.write = false, .fetch = false, .user = true}), reserved_fault | PageFault::user);
}

// ---- tables outside RAM

TEST(TablesOutsideRam, ReadAsAllOnes) {
    for (const unsigned number : {1U, 2U, 3U, 4U}) {
        for (const std::uint64_t where : {Chain::ram_size, std::uint64_t{1} << 46, bits(47, 12)}) {
            Chain chain;
            if (number == 4)
                chain.paging.root = GuestPhys(where).frame();
            else
                chain.put(number + 1, GuestEntry(GuestPhys(where).frame(), table_bits));
            const GuestWalk walk = chain.walk();
            EXPECT_EQ(walk.leaf().entry.raw(), ~std::uint64_t{0});
            EXPECT_EQ(walk.leaf().level->number, number);
            EXPECT_EQ(chain.error(), reserved_fault) << "address bits above MAXPHYADDR are set";
        }
    }
}

TEST(TablesOutsideRam, NeverGetAccessedBits) {
    // With 52 physical bits an entry of all ones is a valid PTE: the walk succeeds, there is nothing to set.
    Chain chain;
    chain.paging.physical_bits = 52;
    chain.put(2, GuestEntry(GuestFrame(0x100'0000), table_bits | entry_bit::accessed));
    const auto before = chain.contents();
    const GuestWalk walk =
        translate(chain.memory, chain.paging, Chain::at, {.write = true, .fetch = false, .user = false});
    EXPECT_FALSE(walk.fault);
    EXPECT_EQ(walk.address, GuestPhys(bits(51, 12)) + Chain::at.page_offset());
    EXPECT_TRUE(chain.get(4).accessed() && chain.get(3).accessed()) << "those in RAM do";
    EXPECT_NE(chain.contents(), before);
}

// ---- accessed and dirty

TEST(AccessedDirty, SetByASuccessfulAccess) {
    for (const unsigned leaf : {1U, 2U, 3U}) {
        for (const Access access : all_accesses) {
            Chain chain(paging_4_level, leaf);
            const GuestWalk walk = translate(chain.memory, chain.paging, Chain::at, access);
            ASSERT_FALSE(walk.fault);
            for (unsigned number = 4; number >= leaf; --number) {
                const GuestEntry now = chain.get(number);
                EXPECT_TRUE(now.accessed()) << text(access) << ", level " << number;
                EXPECT_EQ(now.dirty(), access.write && number == leaf)
                    << text(access) << ", level " << number;
                EXPECT_EQ(walk.visited()[4 - number].entry, now) << "the record is what memory holds";
                EXPECT_EQ(now.raw() & ~(entry_bit::accessed | entry_bit::dirty),
                          Chain(paging_4_level, leaf).get(number).raw())
                    << "and no other bit changes";
            }
        }
    }
}

TEST(AccessedDirty, NotSetByAFault) {
    for (const Access access : all_accesses) {
        Chain chain;
        chain.set(1, entry_bit::present | entry_bit::no_execute); // read by the kernel only
        const auto before = chain.contents();
        const GuestWalk walk = translate(chain.memory, chain.paging, Chain::at, access);
        EXPECT_EQ(walk.fault.has_value(), access.user || access.write || access.fetch) << text(access);
        EXPECT_EQ(chain.contents() == before, walk.fault.has_value()) << text(access);
    }
}

TEST(AccessedDirty, NotSetByAWalk) {
    const Chain chain;
    const auto before = chain.contents();
    for (const Access access : all_accesses)
        EXPECT_FALSE(chain.walk(access).fault);
    EXPECT_EQ(chain.contents(), before);
}

TEST(AccessedDirty, RefusesAnEntryThatChanged) {
    for (const unsigned number : {1U, 2U, 3U, 4U}) {
        Chain chain;
        GuestWalk walk = chain.walk();
        const GuestEntry changed = chain.get(number).with(std::uint64_t{1} << 9);
        chain.put(number, changed);
        EXPECT_FALSE(set_accessed_dirty(chain.memory, walk, true));
        EXPECT_EQ(chain.get(number), changed) << "what another CPU wrote stays";
        walk = chain.walk();
        EXPECT_TRUE(set_accessed_dirty(chain.memory, walk, true));
    }
}

TEST(AccessedDirty, AlreadySetNeedsNoWrite) {
    Chain chain;
    (void)translate(chain.memory, chain.paging, Chain::at, {.write = true, .fetch = false, .user = false});
    GuestWalk walk = chain.walk();
    chain.put(1, GuestEntry()); // would be noticed if it had to be written
    EXPECT_TRUE(set_accessed_dirty(chain.memory, walk, true));
    EXPECT_EQ(chain.get(1), GuestEntry());
}

} // namespace
} // namespace umbra
