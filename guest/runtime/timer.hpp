// The PC's old interrupt controller and timer: two 8259 PICs and channel 0 of the 8254 PIT.
#pragma once

#include <cstdint>

namespace umbra::guest {

/// Hardware interrupt lines 0..15 arrive at vectors 32..47.
inline constexpr unsigned irq_base = 32;

/// Moves the interrupt lines away from the exceptions' vectors and masks all but those set in
/// `enabled_lines`.
void init_pic(std::uint16_t enabled_lines);

/// Tells the PICs that the interrupt of `line` (0..15) is served; the line may interrupt again.
void end_of_interrupt(unsigned line);

/// The lines 0..7 whose interrupts have come in and are not yet served, one bit each.
[[nodiscard]] std::uint8_t pending_interrupts();

/// Lets line 0 interrupt `hz` times a second (19 .. 1193182).
void start_pit(std::uint32_t hz);

} // namespace umbra::guest
