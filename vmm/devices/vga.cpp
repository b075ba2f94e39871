// The VGA's registers, and the text screen's reader.
#include "vmm/devices/vga.hpp"

#include <cstring>
#include <span>

namespace umbra {
namespace {

// Ports. Those of the CRTC and status are the colour ones.
constexpr std::uint16_t attribute_port = 0x3c0;
constexpr std::uint16_t attribute_data_port = 0x3c1;
constexpr std::uint16_t miscellaneous_port = 0x3c2; // to write; to read, input status 0
constexpr std::uint16_t enable_port = 0x3c3;
constexpr std::uint16_t sequencer_port = 0x3c4;
constexpr std::uint16_t sequencer_data_port = 0x3c5;
constexpr std::uint16_t palette_mask_port = 0x3c6;
constexpr std::uint16_t palette_read_port = 0x3c7;
constexpr std::uint16_t palette_write_port = 0x3c8;
constexpr std::uint16_t palette_data_port = 0x3c9;
constexpr std::uint16_t feature_read_port = 0x3ca;
constexpr std::uint16_t miscellaneous_read_port = 0x3cc;
constexpr std::uint16_t graphics_port = 0x3ce;
constexpr std::uint16_t graphics_data_port = 0x3cf;
constexpr std::uint16_t crtc_port = 0x3d4;
constexpr std::uint16_t crtc_data_port = 0x3d5;
constexpr std::uint16_t status_port = 0x3da; // to read; to write, feature control

// CRTC registers.
constexpr std::size_t cursor_start = 0x0a; // bit 5: not shown
constexpr std::size_t start_high = 0x0c;
constexpr std::size_t start_low = 0x0d;
constexpr std::size_t cursor_high = 0x0e;
constexpr std::size_t cursor_low = 0x0f;
constexpr std::size_t vertical_sync_end = 0x11; // bit 7: registers 0-7 are write-protected
constexpr std::uint8_t cursor_hidden = 0x20;
constexpr std::uint8_t protect = 0x80;
constexpr std::size_t protected_registers = 8;
constexpr std::size_t overflow = 0x07; // its bit 4 is not protected
constexpr std::uint8_t overflow_unprotected = 0x10;

// Input status 1.
constexpr std::uint8_t status_not_drawing = 0x01; // in a blank, horizontal or vertical
constexpr std::uint8_t status_vertical_retrace = 0x08;

constexpr std::uint8_t attribute_index_mask = 0x1f;
constexpr std::uint8_t attribute_screen_on = 0x20; // bit 5 of the attribute index
constexpr std::uint8_t palette_state_read = 3;     // 0 when the last index was for writing
constexpr std::size_t components = 3;

// Mode 3 (the reference's tables of what the BIOS sets).
constexpr std::array<std::uint8_t, 5> mode_3_sequencer{0x03, 0x00, 0x03, 0x00, 0x02};
constexpr std::array<std::uint8_t, 9> mode_3_graphics{0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x0e, 0x00, 0xff};
constexpr std::array<std::uint8_t, 25> mode_3_crtc{0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00,
                                                   0x4f, 0x0d, 0x0e, 0x00, 0x00, 0x00, 0x00, 0x9c, 0x8e,
                                                   0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff};
constexpr std::array<std::uint8_t, 21> mode_3_attribute{0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x14,
                                                        0x07, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d,
                                                        0x3e, 0x3f, 0x0c, 0x00, 0x0f, 0x08, 0x00};

/// Text memory is 32 KB; addresses in it wrap.
constexpr std::uint16_t text_memory_cells = 0x4000;

constexpr std::array<char16_t, 32> code_page_437_low{
    0x0020, 0x263a, 0x263b, 0x2665, 0x2666, 0x2663, 0x2660, 0x2022, 0x25d8, 0x25cb, 0x25d9,
    0x2642, 0x2640, 0x266a, 0x266b, 0x263c, 0x25ba, 0x25c4, 0x2195, 0x203c, 0x00b6, 0x00a7,
    0x25ac, 0x21a8, 0x2191, 0x2193, 0x2192, 0x2190, 0x221f, 0x2194, 0x25b2, 0x25bc,
};
constexpr std::array<char16_t, 128> code_page_437_high{
    0x00c7, 0x00fc, 0x00e9, 0x00e2, 0x00e4, 0x00e0, 0x00e5, 0x00e7, 0x00ea, 0x00eb, 0x00e8, 0x00ef, 0x00ee,
    0x00ec, 0x00c4, 0x00c5, 0x00c9, 0x00e6, 0x00c6, 0x00f4, 0x00f6, 0x00f2, 0x00fb, 0x00f9, 0x00ff, 0x00d6,
    0x00dc, 0x00a2, 0x00a3, 0x00a5, 0x20a7, 0x0192, 0x00e1, 0x00ed, 0x00f3, 0x00fa, 0x00f1, 0x00d1, 0x00aa,
    0x00ba, 0x00bf, 0x2310, 0x00ac, 0x00bd, 0x00bc, 0x00a1, 0x00ab, 0x00bb, 0x2591, 0x2592, 0x2593, 0x2502,
    0x2524, 0x2561, 0x2562, 0x2556, 0x2555, 0x2563, 0x2551, 0x2557, 0x255d, 0x255c, 0x255b, 0x2510, 0x2514,
    0x2534, 0x252c, 0x251c, 0x2500, 0x253c, 0x255e, 0x255f, 0x255a, 0x2554, 0x2569, 0x2566, 0x2560, 0x2550,
    0x256c, 0x2567, 0x2568, 0x2564, 0x2565, 0x2559, 0x2558, 0x2552, 0x2553, 0x256b, 0x256a, 0x2518, 0x250c,
    0x2588, 0x2584, 0x258c, 0x2590, 0x2580, 0x03b1, 0x00df, 0x0393, 0x03c0, 0x03a3, 0x03c3, 0x00b5, 0x03c4,
    0x03a6, 0x0398, 0x03a9, 0x03b4, 0x221e, 0x03c6, 0x03b5, 0x2229, 0x2261, 0x00b1, 0x2265, 0x2264, 0x2320,
    0x2321, 0x00f7, 0x2248, 0x00b0, 0x2219, 0x00b7, 0x221a, 0x207f, 0x00b2, 0x25a0, 0x00a0,
};
constexpr char16_t code_page_437_delete = 0x2302;

char16_t unicode(std::uint8_t code) {
    if (code < code_page_437_low.size())
        return code_page_437_low.at(code);
    if (code >= code_page_437_high.size())
        return code_page_437_high.at(code - code_page_437_high.size());
    return code == 0x7f ? code_page_437_delete : static_cast<char16_t>(code);
}

} // namespace

// --- Registers

Vga::Vga() {
    sequencer_.registers = mode_3_sequencer;
    graphics_.registers = mode_3_graphics;
    crtc_.registers = mode_3_crtc;
    attribute_.registers = mode_3_attribute;
    attribute_.index = attribute_screen_on;
    text_state_ = std::uint64_t{1} << 32;
}

std::uint8_t Vga::read(std::uint16_t port) {
    switch (port) {
    case attribute_port:
        return attribute_.index;
    case attribute_data_port: {
        const auto index = static_cast<std::uint8_t>(attribute_.index & attribute_index_mask);
        return index < attribute_.registers.size() ? attribute_.registers.at(index) : 0xff;
    }
    case miscellaneous_port:
        return 0; // no monitor is sensed, no interrupt waits
    case enable_port:
        return enabled_;
    case sequencer_port:
        return sequencer_.index;
    case sequencer_data_port:
        return sequencer_.read();
    case palette_mask_port:
        return palette_mask_;
    case palette_read_port:
        return palette_reads_ ? palette_state_read : 0;
    case palette_write_port:
        return static_cast<std::uint8_t>(palette_write_ / components);
    case palette_data_port:
        return read_palette();
    case feature_read_port:
        return feature_control_;
    case miscellaneous_read_port:
        return miscellaneous_;
    case graphics_port:
        return graphics_.index;
    case graphics_data_port:
        return graphics_.read();
    case crtc_port:
        return crtc_.index;
    case crtc_data_port:
        return crtc_.read();
    case status_port:
        return read_status();
    default:
        return 0xff;
    }
}

void Vga::write(std::uint16_t port, std::uint8_t value) {
    switch (port) {
    case attribute_port:
        write_attribute(value);
        break;
    case miscellaneous_port:
        miscellaneous_ = value;
        break;
    case enable_port:
        enabled_ = value;
        break;
    case sequencer_port:
        sequencer_.index = value;
        break;
    case sequencer_data_port:
        sequencer_.write(value);
        break;
    case palette_mask_port:
        palette_mask_ = value;
        break;
    case palette_read_port:
        palette_read_ = value * components;
        palette_reads_ = true;
        break;
    case palette_write_port:
        palette_write_ = value * components;
        palette_reads_ = false;
        break;
    case palette_data_port:
        write_palette(value);
        break;
    case graphics_port:
        graphics_.index = value;
        break;
    case graphics_data_port:
        graphics_.write(value);
        break;
    case crtc_port:
        crtc_.index = value;
        break;
    case crtc_data_port:
        write_crtc(value);
        break;
    case status_port:
        feature_control_ = value;
        break;
    default: // read-only, or no register
        break;
    }
}

std::uint8_t Vga::read_status() {
    attribute_takes_data_ = false;
    // Who waits for a retrace to begin or to end gets on with each read.
    status_ ^= status_not_drawing | status_vertical_retrace;
    return status_;
}

std::uint8_t Vga::read_palette() {
    const std::uint8_t value = palette_.at(palette_read_);
    palette_read_ = (palette_read_ + 1) % palette_.size();
    return value;
}

void Vga::write_palette(std::uint8_t value) {
    constexpr std::uint8_t intensity = 0x3f; // six bits of each component
    palette_.at(palette_write_) = value & intensity;
    palette_write_ = (palette_write_ + 1) % palette_.size();
}

void Vga::write_attribute(std::uint8_t value) {
    if (attribute_takes_data_) {
        const auto index = static_cast<std::uint8_t>(attribute_.index & attribute_index_mask);
        if (index < attribute_.registers.size())
            attribute_.registers.at(index) = value;
    } else {
        attribute_.index = value & (attribute_index_mask | attribute_screen_on);
    }
    attribute_takes_data_ = !attribute_takes_data_;
}

void Vga::write_crtc(std::uint8_t value) {
    auto& registers = crtc_.registers;
    if (crtc_.index < protected_registers && (registers[vertical_sync_end] & protect) != 0) {
        if (crtc_.index == overflow)
            registers[overflow] = static_cast<std::uint8_t>((registers[overflow] & ~overflow_unprotected) |
                                                            (value & overflow_unprotected));
        return;
    }
    crtc_.write(value);
    const auto pair = [&registers](std::size_t high, std::size_t low) {
        return std::uint64_t{registers.at(high)} << 8 | registers.at(low);
    };
    const bool shown = (registers[cursor_start] & cursor_hidden) == 0;
    text_state_.store(pair(start_high, start_low) | pair(cursor_high, cursor_low) << 16 |
                          std::uint64_t{shown} << 32,
                      std::memory_order_relaxed);
}

VgaTextState Vga::text_state() const {
    const std::uint64_t packed = text_state_.load(std::memory_order_relaxed);
    return {static_cast<std::uint16_t>(packed), static_cast<std::uint16_t>(packed >> 16), packed >> 32 != 0};
}

// --- The screen

VgaScreen vga_screen(const GuestMemory& memory, VgaTextState state) {
    VgaScreen screen;
    constexpr VgaCell blank{' ', 0x07};
    screen.cells.fill(blank);
    const auto bytes = memory.range(vga_text_memory, std::uint64_t{text_memory_cells} * sizeof(VgaCell));
    for (std::size_t i = 0; !bytes.empty() && i < screen.cells.size(); ++i) {
        const std::size_t at = (state.start + i) % text_memory_cells;
        std::memcpy(&screen.cells.at(i), bytes.data() + at * sizeof(VgaCell), sizeof(VgaCell));
    }
    const unsigned cursor = (state.cursor - unsigned{state.start}) % text_memory_cells;
    if (state.cursor_shown && cursor < screen.cells.size())
        screen.cursor = cursor;
    return screen;
}

std::string vga_character(std::uint8_t code) {
    const unsigned point = unicode(code);
    const auto tail = [point](unsigned shift) { return static_cast<char>(0x80 | (point >> shift & 0x3f)); };
    if (point < 0x80)
        return {static_cast<char>(point)};
    if (point < 0x800)
        return {static_cast<char>(0xc0 | point >> 6), tail(0)};
    return {static_cast<char>(0xe0 | point >> 12), tail(6), tail(0)};
}

std::string vga_text(const VgaScreen& screen) {
    std::string text;
    for (std::size_t row = 0; row < vga_rows; ++row) {
        std::string line;
        for (const VgaCell& cell : std::span(screen.cells).subspan(row * vga_columns, vga_columns))
            line += vga_character(cell.character);
        line.resize(line.find_last_not_of(' ') + 1); // npos + 1 is 0
        text += line + '\n';
    }
    return text;
}

} // namespace umbra
