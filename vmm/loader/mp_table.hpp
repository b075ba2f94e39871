// The MultiProcessor tables (Intel MultiProcessor Specification 1.4, chapter 4), for kernels that look for
// interrupt controllers and CPUs there and not in ACPI's.
//
//   0xf8000   floating pointer
//   0xf8010   configuration table
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"

namespace umbra {

/// The tables lie in [mp_table_begin, mp_table_end). The memory map has it reserved.
inline constexpr GuestPhys mp_table_begin{0xf8000};
inline constexpr GuestPhys mp_table_end{0x100000};

struct MpConfig {
    unsigned cpus = 1; ///< 1-255: local APICs with the IDs from 0
    /// The I/O APIC's pin of IRQ 0: 0 by the routing that KVM starts with, 2 on most PCs.
    unsigned timer_pin = 0;
};

/// Writes both and returns the floating pointer's address, mp_table_begin. `memory` must have RAM there.
[[nodiscard]] GuestPhys write_mp_table(const GuestMemory& memory, const MpConfig& config);

} // namespace umbra
