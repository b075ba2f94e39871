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

namespace umbra {

/// Nothing is placed below by choice: the real-mode interrupt vectors and the BIOS data area are there.
inline constexpr GuestPhys first_placed_byte{0x500};

/// Where something may be placed: in [begin, end), at a multiple of `alignment`, a power of two.
struct PlacementWindow {
    GuestPhys begin;
    GuestPhys end;
    std::uint64_t alignment = page_size; ///< bytes
};

/// The RAM that the memory map lets a kernel use (e820_map), less what has been claimed.
class MemoryPlan {
  public:
    /// Throws StartupError(bad_usage) unless `memory`, which must outlive this, has minimum_memory from 0.
    explicit MemoryPlan(const GuestMemory& memory);

    [[nodiscard]] const GuestMemory& memory() const { return memory_; }
    [[nodiscard]] bool is_free(GuestPhys start, std::uint64_t size) const;
    /// Takes [start, start + size). Throws StartupError(bad_usage), calling it `what`, if it is not free; if
    /// that is for want of memory, the message says how much is needed.
    void claim(GuestPhys start, std::uint64_t size, std::string_view what);

    /// The lowest or highest free place for `size` bytes; nothing if there is none. It is not claimed.
    [[nodiscard]] std::optional<GuestPhys> lowest(std::uint64_t size, const PlacementWindow& window) const;
    [[nodiscard]] std::optional<GuestPhys> highest(std::uint64_t size, const PlacementWindow& window) const;

    /// Claims the lowest free place in the window and copies `bytes` there. Throws StartupError(bad_usage),
    /// calling them `what`, if there is none.
    GuestPhys store(std::span<const std::byte> bytes, const PlacementWindow& window, std::string_view what);

  private:
    struct Range {
        GuestPhys begin, end;
    };

    const GuestMemory& memory_;
    std::vector<Range> free_; ///< sorted; none is empty
};

} // namespace umbra
