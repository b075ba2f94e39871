// How much RAM a guest gets and where it lies.
#pragma once

#include "shadow/address.hpp"

#include <cstdint>
#include <string_view>
#include <vector>

namespace umbra {

inline constexpr std::uint64_t minimum_memory = std::uint64_t{2} << 20;
inline constexpr std::uint64_t maximum_memory = std::uint64_t{64} << 30;

/// RAM that does not fit below this address continues from `high_memory_base`; between them PC devices have
/// their windows.
inline constexpr GuestPhys low_memory_end{std::uint64_t{3} << 30};
inline constexpr GuestPhys high_memory_base{std::uint64_t{4} << 30};

/// A size as users write it, in bytes: decimal digits and K, M or G (either case; powers of 1024); a bare
/// number is MiB, as for QEMU. Throws StartupError(bad_usage) unless it is a multiple of the page size
/// between minimum_memory and `most`, by default a guest's.
[[nodiscard]] std::uint64_t parse_memory_size(std::string_view text, std::uint64_t most = maximum_memory);

struct RamRange {
    GuestPhys base;
    std::uint64_t size = 0; ///< bytes

    bool operator==(const RamRange&) const = default;
};

/// Where `bytes` of guest RAM lie: one range from 0, and the rest, if any, from high_memory_base.
[[nodiscard]] std::vector<RamRange> ram_ranges(std::uint64_t bytes);

} // namespace umbra
