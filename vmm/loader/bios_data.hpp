// The BIOS data area, which a PC's BIOS leaves at 0x400 (IBM Personal System/2 and Personal Computer BIOS
// Interface Technical Reference, "BIOS Data Area"): where kernels look for serial ports, the end of base
// memory, and the text screen. And the screen itself, cleared.
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"

namespace umbra {

inline constexpr GuestPhys bios_data_begin{0x400};
inline constexpr GuestPhys bios_data_end{0x500};

/// Writes the area: umbra's serial ports, the screen in mode 3, an extended BIOS data area of 1 KB at
/// 0x9fc00, empty but for its length; and blanks, light grey on black, to that screen. `memory` must have RAM
/// from 0 to 1 MB.
void write_bios_data(const GuestMemory& memory);

} // namespace umbra
