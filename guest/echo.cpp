// echo: repeats each line that is typed on the serial port, and ends when one says "quit". Proves that input
// reaches a guest, by the port's interrupts (IRQ 4) and without loss. Outcome: none of its own, unless
// somebody types.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/timer.hpp"
#include "guest/runtime/traps.hpp"

#include <cstddef>
#include <cstdint>

using namespace umbra::guest;

namespace {

constexpr unsigned serial_line = 4;
constexpr std::uint16_t uart = 0x3f8;
constexpr std::uint16_t uart_interrupt_enable = uart + 1;
constexpr std::uint16_t uart_modem_control = uart + 4;
constexpr std::uint16_t uart_line_status = uart + 5;
constexpr std::uint8_t interrupt_when_received = 0x01;
constexpr std::uint8_t dtr_rts_out2 = 0x0b; // OUT2 lets the port's interrupts through
constexpr std::uint8_t data_ready = 0x01;

constexpr std::size_t longest = 120;
char line[longest + 1];
std::size_t length = 0;
bool quit = false;

bool says_quit() {
    return line[0] == 'q' && line[1] == 'u' && line[2] == 'i' && line[3] == 't' && line[4] == '\0';
}

/// Lines end by either character that an Enter key may send, or where they are full.
void take(char c) {
    const bool ended = c == '\n' || c == '\r';
    if (!ended)
        line[length++] = c;
    if (!ended && length < longest)
        return;
    line[length] = '\0';
    print("echo: [%s]\n", line);
    quit = quit || says_quit();
    length = 0;
}

void on_input(TrapFrame&) {
    while ((in8(uart_line_status) & data_ready) != 0)
        take(static_cast<char>(in8(uart)));
    end_of_interrupt(serial_line);
}

} // namespace

extern "C" int kernel_main(const BootParams&) {
    install_descriptors();
    init_pic(1U << serial_line);
    set_handler(irq_base + serial_line, on_input);
    print("echo: ready\n");
    out8(uart_modem_control, dtr_rts_out2);
    out8(uart_interrupt_enable, interrupt_when_received);
    while (!quit) {
        wait_for_interrupt();
        disable_interrupts();
    }
    print("echo: passed\n");
    return 0;
}
