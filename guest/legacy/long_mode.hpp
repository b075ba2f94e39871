// Long mode, entered by a kernel's own means from 32-bit protected mode, and left again. Intel SDM vol. 3A
// §9.8.5.
#pragma once

#include "guest/legacy/machine.hpp"

namespace umbra::legacy {

/// To be called once: what walk_through_64_bit_code() needs.
void init_long_mode();

/// Enters long mode, in compatibility mode, on the tables of four levels at this address.
void turn_long_mode_on(uint32_t root);
/// Back to protected mode without paging, with CR4.PAE.
void turn_long_mode_off();

/// See long_mode.S.
extern "C" uint32_t walk_through_64_bit_code(uint32_t value);

} // namespace umbra::legacy
