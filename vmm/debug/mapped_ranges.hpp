// What the guest's page tables map, as a list: for the debugger's `maps` and the program headers of a core
// file.
#pragma once

#include "shadow/guest_memory.hpp"
#include "shadow/guest_walk.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace umbra {

/// A run of pages that are contiguous in both spaces, of one size and with equal rights. The rights are those
/// of all entries of the walk together (Intel SDM vol. 3A, 4.6): what WP, SMEP and SMAP deny or permit is not
/// in them.
struct MappedRange {
    GuestVirt start;
    std::uint64_t size = 0; ///< bytes, a multiple of page_bytes
    GuestPhys physical;     ///< of `start`; need not be RAM
    bool user = false;
    bool writable = false;
    bool executable = false;
    bool global = false;
    std::uint64_t page_bytes = page_size; ///< 4 KB to 1 GB; 4 KB with paging off

    bool operator==(const MappedRange&) const = default;
};

/// How far to look. Tables may map themselves, and then map more than anybody can list.
struct RangeLimits {
    std::size_t entries = std::size_t{1} << 22; ///< read at most; the default was measured at 20 to 30 ms
    std::size_t ranges = 60'000;                ///< listed at most
};

struct MappedRanges {
    std::vector<MappedRange> ranges; ///< by ascending unsigned address
    bool truncated = false; ///< a limit was met: what is listed is right, but more is mapped, or may be
};

/// Walks all that the guest's tables map, in any paging mode. Entries with reserved bits set map nothing;
/// tables outside RAM read as all-ones. With paging off, RAM below 4 GB as its own translation. Changes
/// nothing.
[[nodiscard]] MappedRanges guest_ranges(const GuestMemory& memory, const GuestPaging& paging,
                                        RangeLimits limits = {});

} // namespace umbra
