// The MultiProcessor tables (Intel MultiProcessor Specification 1.4, chapter 4), for kernels that look for
// interrupt controllers and CPUs there and not in ACPI's: the floating pointer, and behind it the
// configuration table.
#pragma once

#include "shadow/address.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace umbra {

struct MpConfig {
    unsigned cpus = 1; ///< 1-255: local APICs with the IDs from 0
};

inline constexpr std::uint64_t mp_table_alignment = 16; ///< bytes

/// Both as they are to lie at `at`, aligned and below 4 GB. Their size is the same for every place.
[[nodiscard]] std::vector<std::byte> make_mp_table(GuestPhys at, const MpConfig& config);

} // namespace umbra
