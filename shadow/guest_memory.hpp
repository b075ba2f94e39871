// The one gateway to guest RAM: every access by guest-physical address is bounds-checked here, overflow
// included.
#pragma once

#include "shadow/address.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

namespace umbra {

/// Guest RAM: a few regions of guest-physical space, each backed by host memory that outlives this object.
/// Guest vCPUs write to it at any time: what is read once must be checked and used from that copy.
class GuestMemory {
  public:
    struct Region {
        GuestPhys base;             ///< page aligned
        std::span<std::byte> bytes; ///< a whole number of pages
    };

    GuestMemory() = default;
    /// `regions` must be sorted by base and must not overlap.
    explicit GuestMemory(std::vector<Region> regions) : regions_(std::move(regions)) {}

    [[nodiscard]] const std::vector<Region>& regions() const { return regions_; }

    /// The host bytes of [start, start + size), or an empty span if any of it is not RAM of one region.
    [[nodiscard]] std::span<std::byte> range(GuestPhys start, std::uint64_t size) const {
        for (const Region& region : regions_) {
            const std::uint64_t offset =
                start - region.base; // wraps when start is below: then >= size of any region
            if (offset < region.bytes.size() && size <= region.bytes.size() - offset)
                return region.bytes.subspan(offset, size);
        }
        return {};
    }

    [[nodiscard]] bool contains(GuestPhys start, std::uint64_t size) const {
        return !range(start, size).empty();
    }

    /// A copy of the object at `at`; nothing if it does not lie in RAM.
    template<class T>
    [[nodiscard]] std::optional<T> read(GuestPhys at) const {
        static_assert(std::is_trivially_copyable_v<T>);
        const auto bytes = range(at, sizeof(T));
        if (bytes.empty())
            return std::nullopt;
        T value{};
        std::memcpy(&value, bytes.data(), sizeof(T));
        return value;
    }

    /// False if `at` does not lie in RAM; nothing is written then.
    template<class T>
    [[nodiscard]] bool write(GuestPhys at, const T& value) const {
        static_assert(std::is_trivially_copyable_v<T>);
        const auto bytes = range(at, sizeof(T));
        if (bytes.empty())
            return false;
        std::memcpy(bytes.data(), &value, sizeof(T));
        return true;
    }

  private:
    std::vector<Region> regions_;
};

} // namespace umbra
