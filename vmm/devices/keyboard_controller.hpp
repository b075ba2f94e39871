// The 8042 keyboard controller (IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary
// Device Controller") with a keyboard and no mouse.
#pragma once

#include "vmm/devices/interrupt_line.hpp"
#include "vmm/devices/keyboard.hpp"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <utility>

namespace umbra {

class KeyboardController {
  public:
    /// `interrupt` is IRQ 1.
    explicit KeyboardController(InterruptLine interrupt) : interrupt_(std::move(interrupt)) {}

    [[nodiscard]] std::uint8_t read_data();
    [[nodiscard]] std::uint8_t read_status() const;
    void write_data(std::uint8_t value);
    void write_command(std::uint8_t value);

    /// Text that is typed on the keyboard; returns how many characters it took (Keyboard::receive).
    [[nodiscard]] std::size_t receive(std::span<const char> text);

    /// Whether the guest has pulled the machine's reset line, which is a bit of this controller's output
    /// port.
    [[nodiscard]] bool reset_requested() const { return reset_requested_; }

  private:
    /// Where the next byte written to the data port goes.
    enum class Destination { keyboard, command_byte, output_port, output_buffer, mouse };

    struct Byte {
        std::uint8_t value = 0;
        bool no_mouse = false; ///< the controller's, in place of the mouse's answer
    };

    void reply(std::uint8_t value) { put({value}); }
    void put(Byte byte);
    void set_output_port(std::uint8_t value);
    [[nodiscard]] bool translates() const;
    void update();
    void set_interrupt(bool level);

    InterruptLine interrupt_;
    bool interrupt_level_ = false;
    Keyboard keyboard_;
    std::deque<Byte> output_;      ///< the controller's output buffer and what waits behind it; bounded
    std::uint8_t last_output_ = 0; ///< what the data port reads as when there is nothing new
    std::uint8_t command_byte_ = 0x45;
    std::uint8_t output_port_ = 0x03;
    Destination destination_ = Destination::keyboard;
    bool last_write_was_command_ = false;
    bool reset_requested_ = false;
};

} // namespace umbra
