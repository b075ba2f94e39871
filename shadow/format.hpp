// Paging-structure formats: the bits of an entry and, for each paging mode, one table of per-level data.
//
// Everything that shifts and masks an address to walk a table is in this file and in walker.hpp.
// Intel SDM vol. 3A chapter 4 (tables 4-14 to 4-20), AMD APM vol. 2 chapter 5.
#pragma once

#include "shadow/address.hpp"

#include <array>
#include <span>

namespace umbra {

inline constexpr unsigned entries_per_table = 512;

/// Bits that every level of every 64-bit format shares.
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
inline constexpr std::uint64_t no_execute = std::uint64_t{1} << 63;
inline constexpr std::uint64_t frame_mask = 0x000f'ffff'ffff'f000;
} // namespace entry_bit

/// One level of a paging mode.
struct Level {
    unsigned number;  ///< 1 maps 4 KB pages; the root is the highest
    unsigned shift;   ///< lowest address bit that indexes this level; also log2 of what one entry maps
    bool may_be_leaf; ///< level 1 always; levels 2 and 3 by the PS bit
    const char* name; ///< as the manuals abbreviate it

    [[nodiscard]] constexpr std::uint64_t span() const { return std::uint64_t{1} << shift; }
    [[nodiscard]] constexpr unsigned index(GuestVirt at) const {
        return static_cast<unsigned>(at.value() >> shift) & (entries_per_table - 1);
    }
};

/// A paging mode whose tables hold 512 entries of 8 bytes.
struct PagingFormat {
    std::span<const Level> levels; ///< root first

    [[nodiscard]] constexpr const Level& root() const { return levels.front(); }
    /// `number` in [1, root().number].
    [[nodiscard]] constexpr const Level& level(unsigned number) const {
        return levels[levels.size() - number];
    }
    /// The number of significant address bits: 48 or 57.
    [[nodiscard]] constexpr unsigned address_bits() const { return root().shift + 9; }
    /// Bits [address_bits - 1, 63] are all equal (Intel SDM vol. 1, 3.3.7.1).
    [[nodiscard]] constexpr bool canonical(GuestVirt at) const {
        const auto top = static_cast<std::int64_t>(at.value()) >> (address_bits() - 1);
        return top == 0 || top == -1;
    }
    [[nodiscard]] constexpr GuestVirt sign_extend(std::uint64_t bits) const {
        const unsigned unused = 64 - address_bits();
        return GuestVirt(static_cast<std::uint64_t>(static_cast<std::int64_t>(bits << unused) >> unused));
    }
};

inline constexpr std::array five_levels{
    Level{5, 48, false, "PML5E"}, Level{4, 39, false, "PML4E"}, Level{3, 30, true, "PDPTE"},
    Level{2, 21, true, "PDE"},    Level{1, 12, true, "PTE"},
};
inline constexpr PagingFormat paging_5_level{five_levels};
inline constexpr PagingFormat paging_4_level{std::span(five_levels).subspan<1>()};

/// A paging-structure entry that refers to frames of `Space`. Guest entries and shadow entries are distinct
/// types.
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
        return Address<Space>(raw_ & entry_bit::frame_mask & ~(level.span() - 1)).frame();
    }

    constexpr bool operator==(const Entry&) const = default;

  private:
    std::uint64_t raw_ = 0;
};

using GuestEntry = Entry<GuestPhysSpace>;
using ShadowEntry = Entry<MachinePhysSpace>;
static_assert(sizeof(GuestEntry) == 8 && !std::is_convertible_v<GuestEntry, ShadowEntry>);

} // namespace umbra
