// The VGA as a text screen: its registers (IBM Personal System/2 Hardware Technical Reference, "Video
// Subsystem"), as far as kernels use them in mode 3, 80x25 characters at 0xb8000. Registers keep what is
// written; those that move the screen or the cursor have an effect. The characters are guest memory.
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace umbra {

inline constexpr GuestPhys vga_text_memory{0xb8000};
inline constexpr unsigned vga_columns = 80;
inline constexpr unsigned vga_rows = 25;

/// Where in text memory the screen begins and the cursor is, counted in characters from vga_text_memory.
struct VgaTextState {
    std::uint16_t start = 0;
    std::uint16_t cursor = 0;
    bool cursor_shown = true;

    bool operator==(const VgaTextState&) const = default;
};

struct VgaCell {
    std::uint8_t character = 0; ///< of code page 437
    std::uint8_t attribute = 0; ///< bits 0-3: colour, 4-6: background's, 7: blinks

    bool operator==(const VgaCell&) const = default;
};

/// A copy of the screen at one moment.
struct VgaScreen {
    std::array<VgaCell, std::size_t{vga_columns} * vga_rows> cells{};
    std::optional<unsigned> cursor; ///< index into `cells`; none if it is hidden or elsewhere

    bool operator==(const VgaScreen&) const = default;
};

/// The screen as it is in guest memory; blank where there is none. Any thread: a guest that draws at the same
/// time may be seen half-way.
[[nodiscard]] VgaScreen vga_screen(const GuestMemory& memory, VgaTextState state);

/// The character that code page 437 has at `code`, in UTF-8; a space for 0.
[[nodiscard]] std::string vga_character(std::uint8_t code);

/// The screen's 25 lines in UTF-8, each ended by a newline and without the spaces at its end.
[[nodiscard]] std::string vga_text(const VgaScreen& screen);

/// The registers. Not thread-safe but for text_state().
class Vga {
  public:
    static constexpr std::uint16_t first_port = 0x3c0;
    static constexpr std::uint16_t last_port = 0x3df;

    /// As the BIOS leaves it: in mode 3.
    Vga();

    /// `port` is one of first_port to last_port. Ports without a register read all-ones.
    [[nodiscard]] std::uint8_t read(std::uint16_t port);
    void write(std::uint16_t port, std::uint8_t value);

    /// Any thread.
    [[nodiscard]] VgaTextState text_state() const;

  private:
    /// Registers behind an index port and a data port.
    template<std::size_t Count>
    struct Bank {
        std::uint8_t index = 0;
        std::array<std::uint8_t, Count> registers{};

        [[nodiscard]] std::uint8_t read() const { return index < Count ? registers.at(index) : 0xff; }
        void write(std::uint8_t value) {
            if (index < Count)
                registers.at(index) = value;
        }
    };

    [[nodiscard]] std::uint8_t read_status();
    [[nodiscard]] std::uint8_t read_palette();
    void write_attribute(std::uint8_t value);
    void write_palette(std::uint8_t value);
    void write_crtc(std::uint8_t value);

    Bank<5> sequencer_;
    Bank<9> graphics_;
    Bank<25> crtc_;
    Bank<21> attribute_;
    bool attribute_takes_data_ = false; ///< the flip-flop of port 0x3c0
    std::uint8_t miscellaneous_ = 0x67; ///< colour ports, 28 MHz clock, 400 lines
    std::uint8_t feature_control_ = 0;
    std::uint8_t enabled_ = 1;
    std::uint8_t palette_mask_ = 0xff;
    std::array<std::uint8_t, 768> palette_{}; ///< red, green, blue of each colour
    std::size_t palette_read_ = 0;            ///< the component that is read next
    std::size_t palette_write_ = 0;
    bool palette_reads_ = false; ///< which of the two was set last
    std::uint8_t status_ = 0;
    /// start, cursor << 16, shown << 32: all that the screen's readers want, of one moment.
    std::atomic<std::uint64_t> text_state_;
};

} // namespace umbra
