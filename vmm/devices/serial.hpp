// The serial port: a 16550A UART (National Semiconductor PC16550D data sheet), with the line and its clock
// left out.
//
// A byte written is transmitted at once, so the transmitter is always empty again when the guest looks.
// A byte received below the FIFO's trigger level is reported as "character timeout" at once, instead of four
// character times later. The divisor and the word format are kept for reading back and have no other effect.
// On a PC, OUT2 connects the interrupt pin to its IRQ; here, as in QEMU, it always is: kernels were written
// that leave OUT2 alone. Parity, framing and break errors cannot happen on a line that does not exist;
// overruns can, in loopback mode.
#pragma once

#include "vmm/devices/interrupt_line.hpp"
#include "vmm/devices/output.hpp"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>

namespace umbra {

/// One UART of eight byte-wide registers. Not thread-safe: the thread that runs the vCPU calls everything
/// here, and both callbacks run on it.
class Serial {
  public:
    static constexpr unsigned register_count = 8;
    static constexpr std::size_t fifo_size = 16;
    /// How much input waits behind the FIFO for the guest to read on.
    static constexpr std::size_t input_limit = 4096;

    Serial(OutputSink output, InterruptLine interrupt);

    /// `offset` is the register's number, 0-7; its upper bits are ignored, as no address line carries them.
    [[nodiscard]] std::uint8_t read(unsigned offset);
    void write(unsigned offset, std::uint8_t value);

    /// Input typed at the guest. Takes what fits in FIFO and queue and returns how many bytes that was; the
    /// caller offers the rest again later.
    [[nodiscard]] std::size_t receive(std::span<const char> input);

    /// Passes on output that has not ended its line.
    void flush() { output_.flush(); }
    [[nodiscard]] bool output_waits() const { return output_.waits(); }

  private:
    void set_fifo_control(std::uint8_t value);
    void set_modem_control(std::uint8_t value);
    void set_modem_lines(std::uint8_t lines);
    void transmit(std::uint8_t value);
    void push_received(std::uint8_t value);
    void refill_from_queue();
    [[nodiscard]] std::uint8_t read_receiver();
    [[nodiscard]] std::uint8_t line_status() const;
    [[nodiscard]] std::uint8_t interrupt_cause() const;
    [[nodiscard]] std::uint8_t read_interrupt_identification();
    [[nodiscard]] bool divisor_selected() const;
    [[nodiscard]] bool loopback() const;
    [[nodiscard]] std::size_t receiver_capacity() const { return fifo_enabled_ ? fifo_size : 1; }
    void update_interrupt();

    OutputBuffer output_;
    InterruptLine interrupt_;
    bool interrupt_level_ = false;

    std::deque<std::uint8_t> receiver_; ///< the receive FIFO, or the single buffer register
    std::deque<std::uint8_t> queue_;    ///< input not yet in the receiver
    std::size_t trigger_level_ = 1;
    bool fifo_enabled_ = false;
    bool overrun_ = false;
    bool transmitter_interrupt_ = false; ///< THR became empty since IIR last told

    std::uint8_t interrupt_enable_ = 0;
    std::uint8_t line_control_ = 0;
    std::uint8_t modem_control_ = 0;
    std::uint8_t modem_lines_; ///< MSR bits 4-7
    std::uint8_t modem_deltas_ = 0;
    std::uint8_t scratch_ = 0;
    std::uint8_t divisor_low_;
    std::uint8_t divisor_high_ = 0;
};

} // namespace umbra
