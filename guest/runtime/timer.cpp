// PIC and PIT. Intel 8259A and 8254 data sheets.
#include "guest/runtime/timer.hpp"

#include "guest/runtime/cpu.hpp"

namespace umbra::guest {
namespace {

constexpr std::uint16_t master_command = 0x20;
constexpr std::uint16_t master_data = 0x21;
constexpr std::uint16_t slave_command = 0xa0;
constexpr std::uint16_t slave_data = 0xa1;
constexpr std::uint8_t icw1_cascade_needs_icw4 = 0x11;
constexpr std::uint8_t icw4_8086_mode = 0x01;
constexpr std::uint8_t ocw2_end_of_interrupt = 0x20;
constexpr std::uint8_t ocw3_read_request_register = 0x0a;
constexpr unsigned slave_line = 2; // of the master

constexpr std::uint16_t pit_channel_0 = 0x40;
constexpr std::uint16_t pit_command = 0x43;
constexpr std::uint8_t pit_channel_0_rate_generator = 0x34;
constexpr std::uint32_t pit_hz = 1'193'182;

} // namespace

void init_pic(std::uint16_t enabled_lines) {
    out8(master_command, icw1_cascade_needs_icw4);
    out8(slave_command, icw1_cascade_needs_icw4);
    out8(master_data, irq_base);
    out8(slave_data, irq_base + 8);
    out8(master_data, 1 << slave_line);
    out8(slave_data, slave_line);
    out8(master_data, icw4_8086_mode);
    out8(slave_data, icw4_8086_mode);
    out8(master_data, static_cast<std::uint8_t>(~enabled_lines));
    out8(slave_data, static_cast<std::uint8_t>(~enabled_lines >> 8));
}

void end_of_interrupt(unsigned line) {
    if (line >= 8)
        out8(slave_command, ocw2_end_of_interrupt);
    out8(master_command, ocw2_end_of_interrupt);
}

std::uint8_t pending_interrupts() {
    out8(master_command, ocw3_read_request_register);
    return in8(master_command);
}

void start_pit(std::uint32_t hz) {
    const std::uint32_t divisor = pit_hz / hz;
    out8(pit_command, pit_channel_0_rate_generator);
    out8(pit_channel_0, static_cast<std::uint8_t>(divisor));
    out8(pit_channel_0, static_cast<std::uint8_t>(divisor >> 8));
}

} // namespace umbra::guest
