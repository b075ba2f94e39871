// Which guest memory is still free while a kernel and what belongs to it are placed. Internal to vmm/loader/.
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include <asm/bootparam.h>

namespace umbra {

/// Nothing is placed below by choice: the real-mode interrupt vectors and the BIOS data area are there.
inline constexpr GuestPhys first_placed_byte{0x500};

/// Where something may be placed: in [begin, end), at a multiple of `alignment`, a power of two.
struct PlacementWindow {
    GuestPhys begin;
    GuestPhys end;
    std::uint64_t alignment = page_size; ///< bytes
};

/// Ranges of guest memory, from which pieces are taken.
class FreeMemory {
  public:
    /// Behind all that there is.
    void add(GuestPhys begin, GuestPhys end);
    /// Takes [begin, end) away, as far as it is there.
    void remove(GuestPhys begin, GuestPhys end);

    [[nodiscard]] bool covers(GuestPhys begin, GuestPhys end) const;
    /// The lowest or highest place for `size` bytes; nothing if there is none.
    [[nodiscard]] std::optional<GuestPhys> lowest(std::uint64_t size, const PlacementWindow& window) const;
    [[nodiscard]] std::optional<GuestPhys> highest(std::uint64_t size, const PlacementWindow& window) const;

  private:
    struct Range {
        GuestPhys begin, end;
    };
    std::vector<Range> ranges_; ///< sorted; none is empty, none touch
};

/// What has not been claimed of RAM. A kernel gets of all of it what it asks for, also where a PC's firmware
/// keeps its data; by choice things are placed in usable RAM, which is what the memory map calls so
/// (e820_map).
class MemoryPlan {
  public:
    /// Throws StartupError(bad_usage) unless `memory`, which must outlive this, has minimum_memory from 0.
    explicit MemoryPlan(const GuestMemory& memory);

    [[nodiscard]] const GuestMemory& memory() const { return memory_; }
    /// As the kernel is told: e820_map(), less what has been reserved.
    [[nodiscard]] const std::vector<boot_e820_entry>& memory_map() const { return map_; }

    /// Whether [start, start + size) is unclaimed: in usable RAM; in any RAM.
    [[nodiscard]] bool is_free(GuestPhys start, std::uint64_t size) const;
    [[nodiscard]] bool is_unclaimed(GuestPhys start, std::uint64_t size) const;
    /// Takes [start, start + size). Throws StartupError(bad_usage), calling it `what`, if it is not free; if
    /// that is for want of memory, the message says how much is needed.
    void claim(GuestPhys start, std::uint64_t size, std::string_view what);

    /// The lowest or highest free place for `size` bytes in usable RAM; nothing if there is none. It is not
    /// claimed.
    [[nodiscard]] std::optional<GuestPhys> lowest(std::uint64_t size, const PlacementWindow& window) const {
        return usable_.lowest(size, window);
    }
    [[nodiscard]] std::optional<GuestPhys> highest(std::uint64_t size, const PlacementWindow& window) const {
        return usable_.highest(size, window);
    }
    /// Likewise in any RAM: for what firmware leaves where the memory map is not usable.
    [[nodiscard]] std::optional<GuestPhys> lowest_of_all(std::uint64_t size,
                                                         const PlacementWindow& window) const {
        return ram_.lowest(size, window);
    }
    /// Claims whole pages for `size` bytes as high in low memory as they can be had, and takes them out of
    /// the memory map. Throws StartupError(bad_usage), calling them `what`, if there are none.
    GuestPhys reserve(std::uint64_t size, std::string_view what);

    /// Claims the lowest free place in the window and copies `bytes` there. Throws StartupError(bad_usage),
    /// calling them `what`, if there is none.
    GuestPhys store(std::span<const std::byte> bytes, const PlacementWindow& window, std::string_view what);

  private:
    const GuestMemory& memory_;
    FreeMemory ram_;    ///< all but the VGA's memory
    FreeMemory usable_; ///< that part of it
    std::vector<boot_e820_entry> map_;
};

} // namespace umbra
