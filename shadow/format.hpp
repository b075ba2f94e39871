// Paging-structure formats: the bits of an entry and, for each paging mode, one table of per-level data.
//
// Everything that shifts and masks an address to walk a table is in this file and in walker.hpp.
// Intel SDM vol. 3A chapter 4 (tables 4-3 to 4-20), AMD APM vol. 2 chapter 5.
#pragma once

#include "shadow/address.hpp"

#include <array>
#include <span>

namespace umbra {

/// Of the shadow's tables, and of guest tables but those of 32-bit paging (1024) and PAE's PDPT (4).
inline constexpr unsigned entries_per_table = 512;

/// Bits that every level of every format shares; those above bit 31 exist in 8-byte entries only.
namespace entry_bit {
inline constexpr std::uint64_t present = 1U << 0;
inline constexpr std::uint64_t writable = 1U << 1;
inline constexpr std::uint64_t user = 1U << 2;
inline constexpr std::uint64_t write_through = 1U << 3;
inline constexpr std::uint64_t cache_disable = 1U << 4;
inline constexpr std::uint64_t accessed = 1U << 5;
inline constexpr std::uint64_t dirty = 1U << 6; ///< leaves only
inline constexpr std::uint64_t page_size =
    1U << 7; ///< levels 2 and up: the entry is a leaf (at level 1 this is PAT)
inline constexpr std::uint64_t global = 1U << 8; ///< leaves only
inline constexpr unsigned key_shift = 59; ///< bits [62:59]: protection key; leaves of 4- and 5-level paging
inline constexpr std::uint64_t no_execute = std::uint64_t{1} << 63;
inline constexpr std::uint64_t frame_mask = 0x000f'ffff'ffff'f000;
} // namespace entry_bit

/// One level of a paging mode: all that a walk has to know about its tables and entries.
struct Level {
    unsigned number;      ///< 1 maps 4 KB pages; the root is the highest
    unsigned shift;       ///< lowest address bit that indexes this level; also log2 of what one entry maps
    unsigned index_bits;  ///< log2 of the number of entries in a table
    unsigned entry_bytes; ///< 8, or 4 in 32-bit paging
    bool may_be_leaf;     ///< level 1 always; above by the PS bit, which is ignored or reserved where this is
                          ///< false
    bool in_registers;    ///< PAE's PDPTEs: loaded by MOV CR3; no access rights, no accessed bit (4.4.1)
    bool pse_36;          ///< a leaf's bits [20:13] are its address bits [39:32] (table 4-4)
    std::uint64_t reserved; ///< must be zero in every present entry, on any CPU
    const char* name;       ///< as the manuals abbreviate it

    [[nodiscard]] constexpr std::uint64_t span() const { return std::uint64_t{1} << shift; }
    [[nodiscard]] constexpr unsigned entries() const { return 1U << index_bits; }
    [[nodiscard]] constexpr unsigned index(GuestVirt at) const {
        return static_cast<unsigned>(at.value() >> shift) & (entries() - 1);
    }
};

/// A paging mode.
struct PagingFormat {
    std::span<const Level> levels; ///< root first; none where every address is its own translation

    [[nodiscard]] constexpr const Level& root() const { return levels.front(); }
    /// `number` in [1, root().number].
    [[nodiscard]] constexpr const Level& level(unsigned number) const {
        return levels[levels.size() - number];
    }
    /// The number of significant address bits: 32, 48 or 57.
    [[nodiscard]] constexpr unsigned address_bits() const {
        return levels.empty() ? 32 : root().shift + root().index_bits;
    }
    /// IA-32e paging, the only one with canonical addresses and protection keys.
    [[nodiscard]] constexpr bool long_mode() const { return address_bits() > 32; }
    /// Whether `at` is an address of this mode: bits [address_bits - 1, 63] are all equal (Intel SDM vol. 1,
    /// 3.3.7.1); in 32-bit modes, bits [32, 63] are zero.
    [[nodiscard]] constexpr bool canonical(GuestVirt at) const { return sign_extend(at.value()) == at; }
    /// The address with these low bits: the upper ones as `canonical` asks for them.
    [[nodiscard]] constexpr GuestVirt sign_extend(std::uint64_t bits) const {
        const unsigned unused = 64 - address_bits();
        if (!long_mode())
            return GuestVirt(bits << unused >> unused);
        return GuestVirt(static_cast<std::uint64_t>(static_cast<std::int64_t>(bits << unused) >> unused));
    }
};

namespace levels {
inline constexpr std::uint64_t pae_high = 0x7ff0'0000'0000'0000; ///< bits [62:52]: tables 4-9 to 4-11
/// Bits [2:1], [8:5] and [63:52]: table 4-8.
inline constexpr std::uint64_t pae_pdpte = entry_bit::no_execute | pae_high | 0x1e6;

inline constexpr std::array long_mode{
    Level{5, 48, 9, 8, false, false, false, entry_bit::page_size, "PML5E"},
    Level{4, 39, 9, 8, false, false, false, entry_bit::page_size, "PML4E"},
    Level{3, 30, 9, 8, true, false, false, 0, "PDPTE"},
    Level{2, 21, 9, 8, true, false, false, 0, "PDE"},
    Level{1, 12, 9, 8, true, false, false, 0, "PTE"},
};
inline constexpr std::array pae{
    Level{3, 30, 2, 8, false, true, false, pae_pdpte, "PDPTE"},
    Level{2, 21, 9, 8, true, false, false, pae_high, "PDE"},
    Level{1, 12, 9, 8, true, false, false, pae_high, "PTE"},
};
inline constexpr std::array legacy{
    Level{2, 22, 10, 4, false, false, false, 0, "PDE"},
    Level{1, 12, 10, 4, true, false, false, 0, "PTE"},
};
inline constexpr std::array legacy_pse{
    Level{2, 22, 10, 4, true, false, true, 0, "PDE"},
    Level{1, 12, 10, 4, true, false, false, 0, "PTE"},
};
} // namespace levels

inline constexpr PagingFormat paging_5_level{levels::long_mode};
inline constexpr PagingFormat paging_4_level{std::span(levels::long_mode).subspan<1>()};
inline constexpr PagingFormat paging_pae{levels::pae};
inline constexpr PagingFormat paging_32_bit{levels::legacy};         ///< CR4.PSE = 0
inline constexpr PagingFormat paging_32_bit_pse{levels::legacy_pse}; ///< CR4.PSE = 1, with PSE-36
inline constexpr PagingFormat paging_off{};                          ///< CR0.PG = 0

/// A paging-structure entry that refers to frames of `Space`; one of 4 bytes is held zero-extended. Guest
/// entries and shadow entries are distinct types.
template<class Space>
class Entry {
  public:
    constexpr Entry() = default;
    explicit constexpr Entry(std::uint64_t raw) : raw_(raw) {}
    constexpr Entry(Frame<Space> frame, std::uint64_t bits) : raw_(frame.base().value() | bits) {}

    [[nodiscard]] constexpr std::uint64_t raw() const { return raw_; }
    [[nodiscard]] constexpr bool has(std::uint64_t bits) const { return (raw_ & bits) == bits; }
    [[nodiscard]] constexpr bool present() const { return has(entry_bit::present); }
    [[nodiscard]] constexpr bool writable() const { return has(entry_bit::writable); }
    [[nodiscard]] constexpr bool user() const { return has(entry_bit::user); }
    [[nodiscard]] constexpr bool accessed() const { return has(entry_bit::accessed); }
    [[nodiscard]] constexpr bool dirty() const { return has(entry_bit::dirty); }
    [[nodiscard]] constexpr bool no_execute() const { return has(entry_bit::no_execute); }
    [[nodiscard]] constexpr Entry with(std::uint64_t bits) const { return Entry(raw_ | bits); }

    /// Whether this entry, found present at `level`, maps a page rather than refers to a table.
    [[nodiscard]] constexpr bool leaf(const Level& level) const {
        return level.number == 1 || (level.may_be_leaf && has(entry_bit::page_size));
    }
    /// The table that a non-leaf entry refers to.
    [[nodiscard]] constexpr Frame<Space> table() const {
        return Address<Space>(raw_ & entry_bit::frame_mask).frame();
    }
    /// The first frame of the page that a leaf at `level` maps: its low bits, below the page's size, are not
    /// address.
    [[nodiscard]] constexpr Frame<Space> page(const Level& level) const {
        const std::uint64_t high = level.pse_36 ? (raw_ >> 13 & 0xff) << 32 : 0;
        return Address<Space>((raw_ & entry_bit::frame_mask & ~(level.span() - 1)) | high).frame();
    }
    /// A leaf's protection key (4- and 5-level paging).
    [[nodiscard]] constexpr std::uint8_t key() const {
        return static_cast<std::uint8_t>(raw_ >> entry_bit::key_shift & 0xf);
    }

    constexpr bool operator==(const Entry&) const = default;

  private:
    std::uint64_t raw_ = 0;
};

using GuestEntry = Entry<GuestPhysSpace>;
using ShadowEntry = Entry<MachinePhysSpace>;
static_assert(sizeof(GuestEntry) == 8 && !std::is_convertible_v<GuestEntry, ShadowEntry>);

} // namespace umbra
