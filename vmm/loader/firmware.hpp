// What a PC's firmware leaves in memory for every kernel: BIOS data, the ACPI and MultiProcessor tables, and
// a clear screen. Internal to vmm/loader/.
//
//   0x400, 0x9fc00      BIOS data area, extended BIOS data area
//   0xf0000, 0xf0040    ACPI's root pointer and tables
//   0xf8000             MultiProcessor floating pointer and table
//
// A kernel that wants this memory for itself has it. What it lies over goes elsewhere, if it can to where
// kernels look for it.
#pragma once

#include "shadow/address.hpp"
#include "vmm/loader/memory_plan.hpp"

namespace umbra {

/// Writes it all to memory that the kernel has left, which is claimed, and returns the ACPI root pointer's
/// address.
///
/// The root pointer lies where ACPI has kernels look for it (specification 6.5, 5.2.5.1: 0xe0000-0xfffff and
/// the extended BIOS data area's first KB) unless the kernel covers all of that; boot protocols can tell of
/// any place. The BIOS data area, and the MultiProcessor tables, of whose place no protocol tells
/// (specification 1.4, chapter 4: 0xf0000-0xfffff or the extended BIOS data area), are left out if the kernel
/// covers theirs. Throws StartupError(bad_usage) if there is no room for ACPI's tables.
[[nodiscard]] GuestPhys place_firmware(MemoryPlan& plan);

} // namespace umbra
