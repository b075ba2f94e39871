// Unit tests of shadow/guest_walk.hpp: the record of a walk, what is special to each paging mode, SMAP and
// protection keys, reserved bits one by one, accessed and dirty bits, and tables that lie nowhere. Every
// combination of entry and control bits: tests/model.
#include "shadow/guest_walk.hpp"

#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include <fmt/core.h>
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
    explicit Chain(const PagingFormat& format = paging_4_level, unsigned leaf = 1)
        : at(format.long_mode() ? 0x1234'5678'9abc : 0x5678'9abc),
          page((format.root().entry_bytes == 8 ? std::uint64_t{5} : 3) << 30), leaf_(leaf) {
        paging.format = &format;
        paging.pdpt = GuestPhys(0x20); // in frame 0, but not at its start
        for (const Level& level : format.levels) {
            if (level.number >= leaf)
                set(level.number, level.in_registers ? entry_bit::present : table_bits);
        }
    }

    [[nodiscard]] const Level& level(unsigned number) const { return paging.format->level(number); }
    [[nodiscard]] GuestFrame table(unsigned number) const {
        return GuestFrame(paging.format->levels.size() - number);
    }
    [[nodiscard]] GuestPhys slot(unsigned number) const {
        const Level& here = level(number);
        const GuestPhys start = here.in_registers ? paging.pdpt : table(number).base();
        return start + std::uint64_t{here.index(at)} * here.entry_bytes;
    }
    /// Gives the entry of level `number` these bits, its frame and, for a large leaf, PS.
    void set(unsigned number, std::uint64_t bits) {
        const bool leaf = number == leaf_;
        put(number, GuestEntry(leaf ? page.frame() : table(number - 1),
                               bits | (leaf && number > 1 ? entry_bit::page_size : 0)));
    }
    void put(unsigned number, GuestEntry entry) {
        if (level(number).in_registers)
            paging.pdptes.at(level(number).index(at)) = entry.raw();
        else if (level(number).entry_bytes == sizeof(std::uint32_t))
            ASSERT_TRUE(memory.write(slot(number), static_cast<std::uint32_t>(entry.raw())));
        else
            ASSERT_TRUE(memory.write(slot(number), entry.raw()));
    }
    [[nodiscard]] GuestEntry get(unsigned number) const {
        if (level(number).in_registers)
            return GuestEntry(paging.pdptes.at(level(number).index(at)));
        if (level(number).entry_bytes == sizeof(std::uint32_t))
            return GuestEntry(memory.read<std::uint32_t>(slot(number)).value());
        return GuestEntry(memory.read<std::uint64_t>(slot(number)).value());
    }
    /// The levels that a complete walk meets, without PAE's PDPTE, which has no rights and no marks.
    [[nodiscard]] std::vector<unsigned> marked_levels() const {
        std::vector<unsigned> numbers;
        for (const Level& here : paging.format->levels) {
            if (here.number >= leaf_ && !here.in_registers)
                numbers.push_back(here.number);
        }
        return numbers;
    }
    [[nodiscard]] GuestWalk walk(Access access = {}) const { return walk_guest(memory, paging, at, access); }
    /// The error code of an access's fault; nothing if it succeeds.
    [[nodiscard]] std::optional<std::uint32_t> error(Access access = {}) const {
        const GuestWalk result = walk(access);
        return result.fault ? std::optional(result.fault->error_code) : std::nullopt;
    }
    [[nodiscard]] std::vector<std::byte> contents() const { return ram_; }
    [[nodiscard]] unsigned leaf() const { return leaf_; }

    GuestVirt at;
    GuestPhys page; ///< 1 GB aligned; not RAM, which a walk does not care for
    GuestPaging paging;

  private:
    std::vector<std::byte> ram_ = std::vector<std::byte>(ram_size);
    unsigned leaf_;

  public:
    GuestMemory memory{{{GuestPhys(0), ram_}}};
};

// ---- the record of a walk

constexpr std::array all_formats{&paging_5_level, &paging_4_level, &paging_pae, &paging_32_bit,
                                 &paging_32_bit_pse};

TEST(GuestWalk, TranslatesToTheByte) {
    for (const PagingFormat* format : all_formats) {
        for (const unsigned leaf : {1U, 2U, 3U}) {
            if (leaf > format->root().number || !format->level(leaf).may_be_leaf)
                continue;
            const Chain chain(*format, leaf);
            const GuestWalk walk = chain.walk();
            EXPECT_FALSE(walk.fault);
            EXPECT_EQ(walk.address, chain.page + (chain.at.value() & (chain.level(leaf).span() - 1)));
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
    for (const PagingFormat* format : all_formats) {
        for (const unsigned number : Chain(*format).marked_levels()) {
            Chain chain(*format);
            EXPECT_TRUE(chain.walk().user);
            EXPECT_TRUE(chain.walk().writable);
            EXPECT_FALSE(chain.walk().no_execute);
            chain.set(number, entry_bit::present | entry_bit::no_execute);
            EXPECT_FALSE(chain.walk().user);
            EXPECT_FALSE(chain.walk().writable);
            EXPECT_EQ(chain.walk().no_execute, format->root().entry_bytes == 8);
        }
    }
}

TEST(GuestWalk, EndsAtTheFirstAbsentEntry) {
    for (const PagingFormat* format : all_formats) {
        for (const Level& level : format->levels) {
            Chain chain(*format);
            chain.put(level.number, GuestEntry(~entry_bit::present)); // all its other bits mean nothing
            const GuestWalk walk = chain.walk();
            EXPECT_EQ(chain.error(), 0U);
            EXPECT_EQ(walk.depth, format->root().number - level.number + 1);
            EXPECT_EQ(walk.leaf().level->number, level.number);
        }
    }
}

TEST(GuestWalk, PagingOffIsTheIdentity) {
    Chain chain;
    chain.paging.format = &paging_off;
    const auto before = chain.contents();
    for (const Access access : all_accesses) {
        const GuestWalk walk = translate(chain.memory, chain.paging, GuestVirt(0x8765'4321), access);
        EXPECT_FALSE(walk.fault);
        EXPECT_EQ(walk.depth, 0U);
        EXPECT_EQ(walk.address, GuestPhys(0x8765'4321));
        EXPECT_TRUE(walk.user && walk.writable && !walk.no_execute && !walk.global);
    }
    EXPECT_EQ(chain.contents(), before);
}

TEST(GuestWalk, GlobalIsTheLeafsWhileCr4PgeHeedsIt) {
    for (const PagingFormat* format : all_formats) {
        Chain chain(*format);
        for (const unsigned number : chain.marked_levels()) {
            chain.put(number, chain.get(number).with(entry_bit::global));
            chain.paging.global_pages = true;
            EXPECT_EQ(chain.walk().global, number == 1) << "G means nothing above the leaf";
            chain.paging.global_pages = false;
            EXPECT_FALSE(chain.walk().global);
        }
    }
}

// ---- PAE: the PDPTE registers

TEST(Pae, TheRegistersCountNotTheMemory) {
    Chain chain(paging_pae);
    ASSERT_TRUE(chain.memory.write(chain.slot(3), std::uint64_t{0}));
    const GuestWalk walk = chain.walk({.write = true, .fetch = false, .user = true});
    EXPECT_FALSE(walk.fault) << "a PDPTE without R/W and U/S restricts nothing";
    EXPECT_EQ(walk.visited()[0].slot, GuestPhys(0x20 + 8 * 1)) << "where the register was loaded from";
    EXPECT_EQ(walk.visited()[0].entry, chain.get(3));
    chain.put(3, GuestEntry());
    EXPECT_EQ(chain.error(), 0U);
}

TEST(Pae, AccessedIsNotSetInRegisters) {
    Chain chain(paging_pae);
    const GuestEntry pdpte = chain.get(3);
    ASSERT_TRUE(chain.memory.write(chain.slot(3), pdpte.raw()));
    EXPECT_FALSE(translate(chain.memory, chain.paging, chain.at, {.write = true}).fault);
    EXPECT_EQ(chain.get(3), pdpte);
    EXPECT_EQ(chain.memory.read<std::uint64_t>(chain.slot(3)), pdpte.raw());
    EXPECT_TRUE(chain.get(2).accessed() && chain.get(1).accessed() && chain.get(1).dirty());
}

TEST(Pae, LoadPdptes) {
    Chain chain(paging_pae);
    const std::array<std::uint64_t, 4> values{0x1001, 0xffff'ffff'ffff'fffe, 0x0f00'2e19 & ~0x1e6U, 0};
    ASSERT_TRUE(chain.memory.write(GuestPhys(0x20), values)); // the second is not present: anything goes
    EXPECT_EQ(load_pdptes(chain.memory, 0x20, 48), values);
    EXPECT_EQ(load_pdptes(chain.memory, 0xabcd'0000'0000'003f, 48), values) << "CR3 bits [31:5] count";
    EXPECT_NE(load_pdptes(chain.memory, 0x40, 48), values);
    EXPECT_EQ(load_pdptes(chain.memory, Chain::ram_size, 48), std::nullopt) << "all ones";
    for (const unsigned physical_bits : {36U, 52U}) {
        for (unsigned bit = 1; bit < 64; ++bit) {
            const bool reserved = bit <= 2 || (bit >= 5 && bit <= 8) || bit >= physical_bits;
            ASSERT_TRUE(chain.memory.write(GuestPhys(0x38), std::uint64_t{1} << bit | 1));
            EXPECT_EQ(load_pdptes(chain.memory, 0x20, physical_bits).has_value(), !reserved) << bit;
        }
    }
}

// ---- 32-bit paging

TEST(ThirtyTwoBit, EntriesAreFourBytes) {
    Chain chain(paging_32_bit);
    for (const unsigned number : {2U, 1U}) { // neighbours that must neither be read nor written
        ASSERT_TRUE(chain.memory.write(chain.slot(number) + 4, ~std::uint32_t{0}));
        ASSERT_TRUE(chain.memory.write(chain.slot(number) - 4, ~std::uint32_t{0}));
    }
    auto expected = chain.contents();
    EXPECT_FALSE(translate(chain.memory, chain.paging, chain.at, {.write = true}).fault);
    expected.at(chain.slot(2).value()) |= std::byte{entry_bit::accessed};
    expected.at(chain.slot(1).value()) |= std::byte{entry_bit::accessed | entry_bit::dirty};
    EXPECT_EQ(chain.contents(), expected);
}

TEST(ThirtyTwoBit, PageSizeIsIgnoredWithoutPse) {
    Chain chain(paging_32_bit);
    chain.put(2, chain.get(2).with(entry_bit::page_size));
    EXPECT_EQ(chain.walk().address, chain.page + chain.at.page_offset());
}

TEST(ThirtyTwoBit, Pse36AddressesAndReservedBits) {
    Chain chain(paging_32_bit_pse, 2);
    for (const unsigned physical_bits : {32U, 36U, 39U, 40U, 52U}) {
        chain.paging.physical_bits = physical_bits;
        const GuestEntry plain = chain.get(2);
        for (unsigned bit = 12; bit <= 21; ++bit) {
            chain.put(2, plain.with(std::uint64_t{1} << bit));
            const unsigned address_bit = bit - 13 + 32; // bit 12 is PAT
            if (bit == 21 || (bit > 12 && address_bit >= physical_bits)) {
                EXPECT_EQ(chain.error(), PageFault::present | PageFault::reserved) << bit;
                continue;
            }
            const std::uint64_t high = bit == 12 ? 0 : std::uint64_t{1} << address_bit;
            EXPECT_EQ(chain.walk().address, chain.page + high + (chain.at.value() & 0x3f'ffff)) << bit;
        }
        chain.put(2, plain);
    }
}

TEST(ThirtyTwoBit, FetchIsToldOnlyWithSmep) {
    for (const PagingFormat* format : all_formats) {
        Chain chain(*format);
        chain.put(1, GuestEntry());
        for (const bool no_execute : {false, true}) {
            chain.paging.no_execute = no_execute;
            for (const bool smep : {false, true}) {
                chain.paging.smep = smep;
                const bool told = smep || (no_execute && format->root().entry_bytes == 8);
                EXPECT_EQ(chain.error({.fetch = true}), told ? PageFault::fetch : 0U);
            }
        }
    }
}

// ---- SMAP and protection keys

TEST(Smap, KeepsTheKernelFromUserPages) {
    constexpr std::uint32_t denied = PageFault::present;
    for (const PagingFormat* format : all_formats) {
        Chain chain(*format);
        chain.paging.smap = true;
        EXPECT_EQ(chain.error({}), denied);
        EXPECT_EQ(chain.error({.write = true}), denied | PageFault::write);
        EXPECT_EQ(chain.error({.ac = true}), std::nullopt);
        EXPECT_EQ(chain.error({.write = true, .ac = true}), std::nullopt);
        EXPECT_EQ(chain.error({.fetch = true}), std::nullopt) << "SMEP's affair";
        EXPECT_EQ(chain.error({.user = true}), std::nullopt);
        chain.paging.write_protect = false;
        EXPECT_EQ(chain.error({.write = true}), denied | PageFault::write);
        chain.set(1, entry_bit::present | entry_bit::writable);
        EXPECT_EQ(chain.error({.write = true}), std::nullopt) << "a page of the kernel's";
        chain.paging.write_protect = true;
        chain.set(1, entry_bit::present | entry_bit::user);
        EXPECT_EQ(chain.error({.write = true, .ac = true}), denied | PageFault::write) << "AC is no right";
    }
}

TEST(ProtectionKeys, AccessDisableAndWriteDisable) {
    constexpr std::uint32_t denied = PageFault::present | PageFault::protection_key;
    constexpr unsigned key = 11;
    for (const PagingFormat* format : {&paging_4_level, &paging_5_level}) {
        Chain chain(*format);
        chain.put(1, chain.get(1).with(std::uint64_t{key} << entry_bit::key_shift));
        chain.paging.pkru = 3U << 2 * key;
        EXPECT_EQ(chain.error({.write = true}), std::nullopt) << "CR4.PKE is 0";
        EXPECT_EQ(chain.walk().key, 0U);
        chain.paging.protection_keys = true;
        EXPECT_EQ(chain.walk({.fetch = true}).key, key);
        EXPECT_EQ(chain.error({.fetch = true, .user = true}), std::nullopt) << "keys are for data";
        EXPECT_EQ(chain.error({.user = true}), denied | PageFault::user);
        EXPECT_EQ(chain.error({}), denied);
        chain.paging.pkru = 2U << 2 * key;
        EXPECT_EQ(chain.error({}), std::nullopt);
        EXPECT_EQ(chain.error({.write = true}), denied | PageFault::write);
        EXPECT_EQ(chain.error({.write = true, .user = true}), denied | PageFault::write | PageFault::user);
        chain.paging.write_protect = false;
        EXPECT_EQ(chain.error({.write = true}), std::nullopt);
        EXPECT_EQ(chain.error({.write = true, .user = true}), denied | PageFault::write | PageFault::user);
        chain.paging.pkru = ~(3U << 2 * key);
        EXPECT_EQ(chain.error({.write = true, .user = true}), std::nullopt) << "another key's bits";
    }
}

TEST(ProtectionKeys, OnlyUserAddressesHaveThem) {
    Chain chain;
    chain.paging.protection_keys = true;
    chain.paging.pkru = ~0U;
    chain.set(1, entry_bit::present | entry_bit::writable);
    EXPECT_EQ(chain.error({.write = true}), std::nullopt);
    EXPECT_EQ(chain.error({.user = true}), PageFault::present | PageFault::user) << "PK is not told";
    chain.set(1, entry_bit::present | entry_bit::user);
    EXPECT_EQ(chain.error({.write = true, .user = true}),
              PageFault::present | PageFault::write | PageFault::user | PageFault::protection_key)
        << "told beside another reason";
    chain.put(1, GuestEntry());
    EXPECT_EQ(chain.error({.user = true}), PageFault::user);
}

TEST(ProtectionKeys, NotOutsideLongMode) {
    for (const PagingFormat* format : {&paging_pae, &paging_32_bit, &paging_32_bit_pse}) {
        Chain chain(*format);
        chain.paging.protection_keys = true;
        chain.paging.pkru = ~0U;
        EXPECT_EQ(chain.error({.write = true, .user = true}), std::nullopt);
    }
}

TEST(GuestWalk, FirstAndLastAddress) {
    Chain chain;
    const GuestVirt last(~std::uint64_t{0});
    for (const GuestVirt at : {GuestVirt(0), last}) {
        for (const Level& level : paging_4_level.levels) {
            const GuestFrame next = level.number == 1 ? chain.page.frame() : chain.table(level.number - 1);
            ASSERT_TRUE(
                chain.memory.write(chain.table(level.number).base() + level.index(at) * sizeof(GuestEntry),
                                   GuestEntry(next, table_bits).raw()));
        }
        const GuestWalk walk = walk_guest(chain.memory, chain.paging, at, {});
        EXPECT_FALSE(walk.fault);
        EXPECT_EQ(walk.address, chain.page + at.page_offset());
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
        if (plain.has(mask) || leads_elsewhere || bit >= 8 * chain.level(number).entry_bytes)
            continue;
        chain.put(number, plain.with(mask));
        const auto expected = (reserved & mask) != 0 ? std::optional(reserved_fault) : std::nullopt;
        // PS where it makes another leaf: checked on its own.
        if (bit == 7 && number != chain.leaf() && chain.level(number).may_be_leaf)
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

TEST(ReservedBits, ExactlyThoseOfTheManualIn32BitModes) {
    for (const unsigned physical_bits : {36U, 40U, 52U}) {
        for (const bool no_execute : {false, true}) {
            for (const unsigned leaf : {1U, 2U}) {
                Chain chain(paging_pae, leaf);
                chain.paging.physical_bits = physical_bits;
                chain.paging.no_execute = no_execute;
                const std::uint64_t high = bits(62, physical_bits) | (no_execute ? 0 : bits(63, 63));
                check_reserved(chain, 3, bits(2, 1) | bits(8, 5) | bits(63, physical_bits));
                if (leaf == 1)
                    check_reserved(chain, 1, high);
                check_reserved(chain, 2, high | (leaf == 2 ? bits(20, 13) : 0));
            }
            for (const PagingFormat* format : {&paging_32_bit, &paging_32_bit_pse}) {
                Chain chain(*format);
                chain.paging.physical_bits = physical_bits;
                chain.paging.no_execute = no_execute;
                check_reserved(chain, 2, 0);
                check_reserved(chain, 1, 0);
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
        translate(chain.memory, chain.paging, chain.at, {.write = true, .fetch = false, .user = false});
    EXPECT_FALSE(walk.fault);
    EXPECT_EQ(walk.address, GuestPhys(bits(51, 12)) + chain.at.page_offset());
    EXPECT_TRUE(chain.get(4).accessed() && chain.get(3).accessed()) << "those in RAM do";
    EXPECT_NE(chain.contents(), before);
}

// ---- accessed and dirty

TEST(AccessedDirty, SetByASuccessfulAccess) {
    for (const unsigned leaf : {1U, 2U, 3U}) {
        for (const Access access : all_accesses) {
            Chain chain(paging_4_level, leaf);
            const GuestWalk walk = translate(chain.memory, chain.paging, chain.at, access);
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
        const GuestWalk walk = translate(chain.memory, chain.paging, chain.at, access);
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
    (void)translate(chain.memory, chain.paging, chain.at, {.write = true, .fetch = false, .user = false});
    GuestWalk walk = chain.walk();
    chain.put(1, GuestEntry()); // would be noticed if it had to be written
    EXPECT_TRUE(set_accessed_dirty(chain.memory, walk, true));
    EXPECT_EQ(chain.get(1), GuestEntry());
}

} // namespace
} // namespace umbra
