// The ACPI tables of umbra's PC (ACPI specification 6.5, chapter 5): root pointer (RSDP, revision 2), and
// behind one another, each 16-byte aligned, FACS, DSDT, FADT (revision 5), MADT, RSDT and XSDT.
#pragma once

#include "shadow/address.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace umbra {

struct AcpiConfig {
    unsigned cpus = 1; ///< 1-255: local APICs with the IDs from 0
};

struct AcpiTables {
    std::vector<std::byte> root_pointer;
    std::vector<std::byte> tables;
};

inline constexpr std::uint64_t acpi_root_pointer_alignment = 16, acpi_tables_alignment = 64; ///< bytes

/// The tables as they are to lie at `at`, aligned and below 4 GB; the root pointer may lie anywhere. Their
/// size is the same for every place.
[[nodiscard]] AcpiTables make_acpi_tables(GuestPhys at, const AcpiConfig& config);

} // namespace umbra
