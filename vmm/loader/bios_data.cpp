// Writes the BIOS data area, word by word.
#include "vmm/loader/bios_data.hpp"

#include "vmm/devices/vga.hpp"
#include "vmm/loader/boot_params.hpp"
#include "vmm/loader/reject.hpp"

#include <array>
#include <cstddef>
#include <cstdint>

namespace umbra {
namespace {

template<class T>
void put(const GuestMemory& memory, GuestPhys at, const T& value) {
    if (!memory.write(at, value))
        reject("guest memory is too small for the BIOS data at {}", at);
}

} // namespace

void write_bios_data(const GuestMemory& memory, bool has_extended) {
    const auto byte = [&memory](std::uint64_t offset, unsigned value) {
        put(memory, bios_data_begin + offset, static_cast<std::uint8_t>(value));
    };
    const auto word = [&memory](std::uint64_t offset, std::uint64_t value) {
        put(memory, bios_data_begin + offset, static_cast<std::uint16_t>(value));
    };
    word(0x00, 0x3f8); // the serial ports
    word(0x02, 0x2f8);
    if (has_extended)
        word(0x0e, extended_bios_data.value() >> 4); // its segment
    word(0x10, 0x0422);                              // equipment: FPU, 80x25 in colour, two serial ports
    word(0x13, extended_bios_data.value() >> 10);    // KB of base memory
    byte(0x49, 3);                                   // video mode
    word(0x4a, vga_columns);
    word(0x4c, std::uint64_t{vga_columns} * vga_rows * sizeof(VgaCell)); // bytes of the screen
    word(0x60, 0x0d0e);                                                  // the cursor's last and first line
    word(0x63, 0x3d4);                                                   // the CRTC's port
    byte(0x84, vga_rows - 1);
    word(0x85, 16); // lines of a character
    if (has_extended)
        put(memory, extended_bios_data, extended_bios_data_kib);
}

void clear_screen(const GuestMemory& memory) {
    std::array<VgaCell, std::size_t{vga_columns} * vga_rows> blanks{};
    blanks.fill({' ', 0x07});
    put(memory, vga_text_memory, blanks);
}

} // namespace umbra
