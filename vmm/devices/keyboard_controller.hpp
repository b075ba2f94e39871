// The 8042 keyboard controller (IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary
// Device Controller"): enough for a guest to reset the machine, to find a keyboard on which nobody types, and
// to find no mouse. It raises no interrupts.
#pragma once

#include <cstdint>
#include <deque>

namespace umbra {

class KeyboardController {
  public:
    [[nodiscard]] std::uint8_t read_data();
    [[nodiscard]] std::uint8_t read_status() const;
    void write_data(std::uint8_t value);
    void write_command(std::uint8_t value);

    /// Whether the guest has pulled the machine's reset line, which is a bit of this controller's output
    /// port.
    [[nodiscard]] bool reset_requested() const { return reset_requested_; }

  private:
    /// Where the next byte written to the data port goes.
    enum class Destination { keyboard, keyboard_parameter, command_byte, output_port, output_buffer, mouse };

    void reply(std::uint8_t value);
    void set_output_port(std::uint8_t value);
    void keyboard_command(std::uint8_t value);

    std::deque<std::uint8_t> output_; ///< the controller's output buffer and what waits behind it; bounded
    std::uint8_t command_byte_ = 0x45;
    std::uint8_t output_port_ = 0x03;
    Destination destination_ = Destination::keyboard;
    bool last_write_was_command_ = false;
    bool reset_requested_ = false;
};

} // namespace umbra
