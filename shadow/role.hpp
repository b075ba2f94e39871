// What a shadow table is built for, and what it is built from.
//
// A shadow table is always a table of 4-level paging. TableShape says which of the guest's entries stand
// behind its 512 slots, for every paging mode of the guest: the one place that knows how 32-bit tables of
// 1024 entries fall into pieces (KVM's mmu.rst calls such a piece a quadrant).
#pragma once

#include "shadow/guest_walk.hpp"

#include <cstddef>
#include <cstdint>

namespace umbra {

/// How the guest's tables are to be read, as far as a table's content depends on it. 5-level paging is not
/// shadowed: the machine's tables have four levels, and addresses beyond 48 bits never reach them.
enum class GuestMode : std::uint8_t { off, bits_32, pae, bits_64 };

[[nodiscard]] constexpr GuestMode guest_mode(const PagingFormat& format) {
    switch (format.levels.size()) {
    case 0:
        return GuestMode::off;
    case 2:
        return GuestMode::bits_32;
    case 3:
        return GuestMode::pae;
    default:
        return GuestMode::bits_64;
    }
}

/// The conditions that a shadow table was built for: a table serves only guests' accesses under these.
struct Role {
    GuestMode mode = GuestMode::bits_64;
    bool user = false;         ///< maps what virtual CPL 3 may use; otherwise what virtual CPL 0 to 2 may
    bool write_protect = true; ///< CR0.WP; always true for user tables
    bool no_execute = true;    ///< EFER.NXE: decides which entries are valid
    bool large_pages = true;   ///< an entry's PS bit means something: not so in 32-bit paging without CR4.PSE
    bool user_pages_nx = false; ///< kernel tables: user pages cannot be fetched from (CR4.SMEP)
    /// Kernel tables: user pages are not for data (CR4.SMAP with EFLAGS.AC clear). Where SMEP does not forbid
    /// it, a fetch fills the page all the same, until the next trap; x86 has no execute-only pages.
    bool user_pages_hidden = false;
    bool user_path = true; ///< every guest entry above this table has U/S set
    bool direct = false;   ///< a piece of a large guest page: no guest table lies behind it
    /// What it translates has a guarded page in it (Guards): not shared with places that have none.
    bool guarded = false;

    bool operator==(const Role&) const = default;
};

/// What identifies a shadow table. `origin`: the first of the guest's entries behind it; for a direct table,
/// the first address that it maps; for the two upper levels of a PAE guest's tables, the number of the vCPU.
struct TableKey {
    GuestPhys origin;
    unsigned level = 0;
    Role role;

    bool operator==(const TableKey&) const = default;
};

/// The guest's entries behind a shadow table. Slot s is made from entry s / slots_per_entry.
struct TableShape {
    unsigned entry_bytes = 0;
    unsigned entries = 0; ///< in guest memory, from the key's origin on; 0: the table is made of none
    unsigned slots_per_entry = 1;

    [[nodiscard]] constexpr std::size_t bytes() const { return std::size_t{entry_bytes} * entries; }
};

[[nodiscard]] constexpr TableShape shape_of(const TableKey& key) {
    if (key.role.direct)
        return {};
    switch (key.role.mode) {
    case GuestMode::off:
        return {};
    case GuestMode::bits_32: // the two upper levels only hold the pieces of the guest's page directory
        if (key.level == 2)
            return {.entry_bytes = 4, .entries = 256, .slots_per_entry = 2};
        return key.level == 1 ? TableShape{.entry_bytes = 4, .entries = 512} : TableShape{};
    case GuestMode::pae: // the third level is made from the PDPTE registers
        return key.level <= 2 ? TableShape{.entry_bytes = 8, .entries = 512} : TableShape{};
    case GuestMode::bits_64:
        return {.entry_bytes = 8, .entries = 512};
    }
    return {};
}

/// Where the entries lie from which the table is made that `entry`, found at guest level `level`, refers to,
/// as far as they translate `at`.
[[nodiscard]] constexpr GuestPhys child_origin(GuestMode mode, GuestEntry entry, unsigned level,
                                               GuestVirt at) {
    const bool second_half = mode == GuestMode::bits_32 && level == 2 && (at.value() >> 21 & 1) != 0;
    return entry.table().base() + (second_half ? page_size / 2 : 0);
}

} // namespace umbra
