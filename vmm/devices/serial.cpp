// The 16550A's registers, FIFO and interrupts.
#include "vmm/devices/serial.hpp"

#include <algorithm>
#include <array>
#include <utility>

namespace umbra {

namespace {

// Register numbers. 0 and 1 are the divisor's halves while LCR.DLAB is set; 2 is IIR to read and FCR to
// write.
constexpr unsigned data_register = 0;
constexpr unsigned interrupt_enable_register = 1;
constexpr unsigned interrupt_identification_register = 2;
constexpr unsigned line_control_register = 3;
constexpr unsigned modem_control_register = 4;
constexpr unsigned line_status_register = 5;
constexpr unsigned modem_status_register = 6;
constexpr unsigned scratch_register = 7;

constexpr std::uint8_t enable_received = 0x01;
constexpr std::uint8_t enable_transmitter_empty = 0x02;
constexpr std::uint8_t enable_line_status = 0x04;
constexpr std::uint8_t enable_modem_status = 0x08;
constexpr std::uint8_t enable_mask = 0x0f;

// IIR bits 0-3, by falling priority.
constexpr std::uint8_t cause_line_status = 0x06;
constexpr std::uint8_t cause_received = 0x04;
constexpr std::uint8_t cause_timeout = 0x0c;
constexpr std::uint8_t cause_transmitter_empty = 0x02;
constexpr std::uint8_t cause_modem_status = 0x00;
constexpr std::uint8_t cause_none = 0x01;
constexpr std::uint8_t identification_fifos = 0xc0;

constexpr std::uint8_t fifo_enable = 0x01;
constexpr std::uint8_t fifo_clear_receiver = 0x02;
constexpr unsigned fifo_trigger_shift = 6;
constexpr std::array<std::size_t, 4> trigger_levels{1, 4, 8, 14};

constexpr std::uint8_t line_control_dlab = 0x80;

constexpr std::uint8_t modem_control_dtr = 0x01;
constexpr std::uint8_t modem_control_rts = 0x02;
constexpr std::uint8_t modem_control_out1 = 0x04;
constexpr std::uint8_t modem_control_out2 = 0x08;
constexpr std::uint8_t modem_control_loopback = 0x10;
constexpr std::uint8_t modem_control_mask = 0x1f;

constexpr std::uint8_t line_data_ready = 0x01;
constexpr std::uint8_t line_overrun = 0x02;
constexpr std::uint8_t line_transmitter_empty = 0x60; // THRE and TEMT

constexpr std::uint8_t modem_cts = 0x10;
constexpr std::uint8_t modem_dsr = 0x20;
constexpr std::uint8_t modem_ring = 0x40;
constexpr std::uint8_t modem_dcd = 0x80;
constexpr std::uint8_t delta_ring_ended = 0x04;
constexpr unsigned delta_shift = 4; // a line's delta bit is this much below the line's own bit
// A terminal that is always there and always ready.
constexpr std::uint8_t modem_connected = modem_cts | modem_dsr | modem_dcd;

constexpr std::uint8_t divisor_of_9600_baud = 12;

} // namespace

Serial::Serial(OutputSink output, InterruptLine interrupt)
    : output_(std::move(output)), interrupt_(std::move(interrupt)), modem_lines_(modem_connected),
      divisor_low_(divisor_of_9600_baud) {}

std::uint8_t Serial::read(unsigned offset) {
    switch (offset % register_count) {
    case data_register:
        return divisor_selected() ? divisor_low_ : read_receiver();
    case interrupt_enable_register:
        return divisor_selected() ? divisor_high_ : interrupt_enable_;
    case interrupt_identification_register:
        return read_interrupt_identification();
    case line_control_register:
        return line_control_;
    case modem_control_register:
        return modem_control_;
    case line_status_register: {
        const std::uint8_t status = line_status();
        overrun_ = false; // reading clears the error bits
        update_interrupt();
        return status;
    }
    case modem_status_register: {
        const auto status = static_cast<std::uint8_t>(modem_lines_ | modem_deltas_);
        modem_deltas_ = 0;
        update_interrupt();
        return status;
    }
    default: // scratch_register, the last
        return scratch_;
    }
}

void Serial::write(unsigned offset, std::uint8_t value) {
    switch (offset % register_count) {
    case data_register:
        if (divisor_selected())
            divisor_low_ = value;
        else
            transmit(value);
        break;
    case interrupt_enable_register:
        if (divisor_selected()) {
            divisor_high_ = value;
            break;
        }
        // Enabling the interrupt of a transmitter that is already empty raises it; drivers start sending by
        // that.
        if ((value & ~interrupt_enable_ & enable_transmitter_empty) != 0)
            transmitter_interrupt_ = true;
        interrupt_enable_ = value & enable_mask;
        break;
    case interrupt_identification_register:
        set_fifo_control(value);
        break;
    case line_control_register:
        line_control_ = value;
        break;
    case modem_control_register:
        set_modem_control(value);
        break;
    case scratch_register:
        scratch_ = value;
        break;
    default: // the two status registers are read-only
        break;
    }
    update_interrupt();
}

std::size_t Serial::receive(std::span<const char> input) {
    const std::size_t taken = std::min(input.size(), input_limit - queue_.size());
    for (const char character : input.first(taken))
        queue_.push_back(static_cast<std::uint8_t>(character));
    refill_from_queue();
    update_interrupt();
    return taken;
}

void Serial::set_fifo_control(std::uint8_t value) {
    const bool enable = (value & fifo_enable) != 0;
    // Switching between FIFO and single-buffer mode empties the FIFOs; the other bits count only with bit 0
    // set.
    if (enable != fifo_enabled_ || (enable && (value & fifo_clear_receiver) != 0))
        receiver_.clear();
    fifo_enabled_ = enable;
    if (enable)
        trigger_level_ = trigger_levels.at(value >> fifo_trigger_shift);
    refill_from_queue();
}

void Serial::set_modem_control(std::uint8_t value) {
    modem_control_ = value & modem_control_mask;
    if (!loopback()) {
        set_modem_lines(modem_connected);
        refill_from_queue(); // what arrived during loopback
        return;
    }
    // Loopback ties the modem outputs to the modem inputs.
    unsigned lines = 0;
    lines |= (modem_control_ & modem_control_rts) != 0 ? modem_cts : 0U;
    lines |= (modem_control_ & modem_control_dtr) != 0 ? modem_dsr : 0U;
    lines |= (modem_control_ & modem_control_out1) != 0 ? modem_ring : 0U;
    lines |= (modem_control_ & modem_control_out2) != 0 ? modem_dcd : 0U;
    set_modem_lines(static_cast<std::uint8_t>(lines));
}

void Serial::set_modem_lines(std::uint8_t lines) {
    unsigned deltas = static_cast<unsigned>(modem_lines_ ^ lines) >> delta_shift;
    if ((lines & modem_ring) != 0)
        deltas &= ~static_cast<unsigned>(delta_ring_ended); // only the end of a ring is told
    modem_deltas_ = static_cast<std::uint8_t>(modem_deltas_ | deltas);
    modem_lines_ = lines;
}

void Serial::transmit(std::uint8_t value) {
    // The line falls and rises again: the interrupt controller may see only edges.
    transmitter_interrupt_ = false;
    update_interrupt();
    if (loopback())
        push_received(value);
    else
        output_.put(static_cast<char>(value));
    transmitter_interrupt_ = true;
}

void Serial::push_received(std::uint8_t value) {
    if (receiver_.size() >= receiver_capacity()) {
        overrun_ = true;
        if (fifo_enabled_)
            return; // a full FIFO loses the new byte, a full buffer register the old one
        receiver_.clear();
    }
    receiver_.push_back(value);
}

void Serial::refill_from_queue() {
    while (!loopback() && !queue_.empty() && receiver_.size() < receiver_capacity()) {
        receiver_.push_back(queue_.front());
        queue_.pop_front();
    }
}

std::uint8_t Serial::read_receiver() {
    if (receiver_.empty())
        return 0;
    const std::uint8_t value = receiver_.front();
    receiver_.pop_front();
    refill_from_queue();
    update_interrupt();
    return value;
}

std::uint8_t Serial::line_status() const {
    unsigned status = line_transmitter_empty;
    status |= receiver_.empty() ? 0U : line_data_ready;
    status |= overrun_ ? line_overrun : 0U;
    return static_cast<std::uint8_t>(status);
}

std::uint8_t Serial::interrupt_cause() const {
    if ((interrupt_enable_ & enable_line_status) != 0 && overrun_)
        return cause_line_status;
    if ((interrupt_enable_ & enable_received) != 0 && !receiver_.empty())
        return !fifo_enabled_ || receiver_.size() >= trigger_level_ ? cause_received : cause_timeout;
    if ((interrupt_enable_ & enable_transmitter_empty) != 0 && transmitter_interrupt_)
        return cause_transmitter_empty;
    if ((interrupt_enable_ & enable_modem_status) != 0 && modem_deltas_ != 0)
        return cause_modem_status;
    return cause_none;
}

std::uint8_t Serial::read_interrupt_identification() {
    const std::uint8_t cause = interrupt_cause();
    if (cause == cause_transmitter_empty) {
        transmitter_interrupt_ = false; // told once
        update_interrupt();
    }
    return static_cast<std::uint8_t>(cause | (fifo_enabled_ ? identification_fifos : 0U));
}

bool Serial::divisor_selected() const {
    return (line_control_ & line_control_dlab) != 0;
}

bool Serial::loopback() const {
    return (modem_control_ & modem_control_loopback) != 0;
}

void Serial::update_interrupt() {
    const bool level = interrupt_cause() != cause_none;
    if (level == interrupt_level_)
        return;
    interrupt_level_ = level;
    if (interrupt_)
        interrupt_(level);
}

} // namespace umbra
