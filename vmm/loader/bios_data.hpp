// The BIOS data area, which a PC's BIOS leaves at 0x400 (IBM Personal System/2 and Personal Computer BIOS
// Interface Technical Reference, "BIOS Data Area"): where kernels look for serial ports, the end of base
// memory, and the text screen.
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"

#include <cstdint>

namespace umbra {

inline constexpr GuestPhys bios_data_begin{0x400};
inline constexpr GuestPhys bios_data_end{0x500};

/// The extended BIOS data area's length, in its first byte.
inline constexpr std::uint8_t extended_bios_data_kib = 1;

/// Writes the area: umbra's serial ports, the end of base memory at extended_bios_data, the screen in mode 3;
/// and if it has that extended area, where it is, and its length into it. `memory` must have RAM up to 1 MB.
void write_bios_data(const GuestMemory& memory, bool has_extended);

/// Fills the text screen with blanks, light grey on black. `memory` must have RAM there.
void clear_screen(const GuestMemory& memory);

} // namespace umbra
