// The ACPI tables of umbra's PC (ACPI specification 6.5, chapter 5), in the BIOS area, where a kernel finds
// them by the legacy scan or by the address that its boot protocol passes.
//
//   0xf0000   RSDP, revision 2
//   0xf0040   FACS
//   0xf0080   DSDT, FADT (revision 5), MADT, RSDT, XSDT, each 16-byte aligned
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"

namespace umbra {

/// The tables lie in [acpi_tables_begin, acpi_tables_end). The memory map has it reserved.
inline constexpr GuestPhys acpi_tables_begin{0xf0000};
inline constexpr GuestPhys acpi_tables_end{0xf8000};

struct AcpiConfig {
    unsigned cpus = 1; ///< 1-255: local APICs with the IDs from 0
    /// The I/O APIC's pin of IRQ 0: 0 by the routing that KVM starts with, 2 on most PCs.
    unsigned timer_pin = 0;
};

/// Writes the tables and returns the RSDP's address, acpi_tables_begin. `memory` must have RAM there.
[[nodiscard]] GuestPhys write_acpi_tables(const GuestMemory& memory, const AcpiConfig& config);

} // namespace umbra
