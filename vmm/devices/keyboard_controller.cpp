// The 8042's commands, its output buffer, and the interrupt.
#include "vmm/devices/keyboard_controller.hpp"

namespace umbra {

namespace {

constexpr std::uint8_t status_output_full = 0x01;
constexpr std::uint8_t status_self_test_passed = 0x04;
constexpr std::uint8_t status_last_was_command = 0x08;
constexpr std::uint8_t status_not_locked = 0x10;
constexpr std::uint8_t status_mouse = 0x20; // the output is the mouse's
constexpr std::uint8_t status_timeout = 0x40;

constexpr std::uint8_t output_port_not_reset = 0x01; // the reset line is active low
constexpr std::uint8_t output_port_a20 = 0x02;

constexpr std::uint8_t command_translate = 0x40;
constexpr std::uint8_t command_mouse_disabled = 0x20;
constexpr std::uint8_t command_keyboard_disabled = 0x10;
constexpr std::uint8_t command_interrupt = 0x01;

constexpr std::uint8_t controller_self_test_passed = 0x55;
constexpr std::uint8_t interface_test_passed = 0x00;
constexpr std::uint8_t nobody_answers = 0xfe;
constexpr std::uint8_t interface_clock_stuck_low = 0x01; // what a controller finds where no mouse is

// No sequence of commands that a driver waits through leaves more answers than this unread.
constexpr std::size_t output_limit = 16;

} // namespace

std::uint8_t KeyboardController::read_data() {
    if (output_.empty())
        return last_output_;
    last_output_ = output_.front().value;
    output_.pop_front();
    set_interrupt(false); // each byte is an edge
    update();
    return last_output_;
}

std::size_t KeyboardController::receive(std::span<const char> text) {
    const std::size_t taken = keyboard_.receive(text);
    update();
    return taken;
}

std::uint8_t KeyboardController::read_status() const {
    unsigned status = status_self_test_passed | status_not_locked;
    if (!output_.empty())
        status |= status_output_full | (output_.front().no_mouse ? status_mouse | status_timeout : 0U);
    status |= last_write_was_command_ ? status_last_was_command : 0U;
    return static_cast<std::uint8_t>(status);
}

void KeyboardController::write_data(std::uint8_t value) {
    last_write_was_command_ = false;
    const Destination destination = destination_;
    destination_ = Destination::keyboard;
    switch (destination) {
    case Destination::keyboard:
        for (const std::uint8_t byte : keyboard_.command(value, translates()))
            reply(byte);
        break;
    case Destination::command_byte:
        command_byte_ = value;
        break;
    case Destination::output_port:
        set_output_port(value);
        break;
    case Destination::output_buffer:
        reply(value);
        break;
    case Destination::mouse: // what a controller says that has waited in vain; at once, as nobody will answer
        put({nobody_answers, true});
        break;
    }
    update();
}

void KeyboardController::write_command(std::uint8_t value) {
    last_write_was_command_ = true;
    destination_ = Destination::keyboard;
    if (value >= 0xf0) { // pulse the output port's bits 0-3 that are 0 here
        if ((value & output_port_not_reset) == 0)
            reset_requested_ = true;
        return;
    }
    switch (value) {
    case 0x20: // read the command byte
        reply(command_byte_);
        break;
    case 0x60: // write the command byte
        destination_ = Destination::command_byte;
        break;
    case 0xa7:
        command_byte_ |= command_mouse_disabled;
        break;
    case 0xa8:
        command_byte_ &= static_cast<std::uint8_t>(~command_mouse_disabled);
        break;
    case 0xa9: // test the mouse's interface
        reply(interface_clock_stuck_low);
        break;
    case 0xaa: // self-test
        output_.clear();
        reply(controller_self_test_passed);
        break;
    case 0xab: // test the keyboard's interface
        reply(interface_test_passed);
        break;
    case 0xad:
        command_byte_ |= command_keyboard_disabled;
        break;
    case 0xae:
        command_byte_ &= static_cast<std::uint8_t>(~command_keyboard_disabled);
        break;
    case 0xc0: // read the input port: all lines idle
        reply(0xff);
        break;
    case 0xd0:
        reply(output_port_);
        break;
    case 0xd1:
        destination_ = Destination::output_port;
        break;
    case 0xd2: // the next data byte comes back as if the keyboard had sent it
        destination_ = Destination::output_buffer;
        break;
    case 0xd3: // the same for the mouse
    case 0xd4: // the next data byte goes to the mouse
        destination_ = Destination::mouse;
        break;
    case 0xdd: // A20 off and on, without a data byte
        set_output_port(static_cast<std::uint8_t>(output_port_ & ~output_port_a20));
        break;
    case 0xdf:
        set_output_port(output_port_ | output_port_a20);
        break;
    default: // controllers ignore what they do not know
        break;
    }
    update();
}

void KeyboardController::put(Byte byte) {
    if (output_.size() < output_limit)
        output_.push_back(byte);
}

void KeyboardController::set_output_port(std::uint8_t value) {
    output_port_ = value;
    if ((value & output_port_not_reset) == 0)
        reset_requested_ = true;
}

bool KeyboardController::translates() const {
    return (command_byte_ & command_translate) != 0;
}

/// Fetches what was typed once there is room for it, and brings the interrupt in line.
void KeyboardController::update() {
    if (output_.empty() && (command_byte_ & command_keyboard_disabled) == 0)
        for (const std::uint8_t byte : keyboard_.next_event(translates()))
            output_.push_back({byte});
    set_interrupt(!output_.empty() && !output_.front().no_mouse && (command_byte_ & command_interrupt) != 0);
}

void KeyboardController::set_interrupt(bool level) {
    if (level == interrupt_level_)
        return;
    interrupt_level_ = level;
    if (interrupt_)
        interrupt_(level);
}

} // namespace umbra
