// The few instructions that the tests' own kernels are made of. They are entered in 64-bit mode.
#pragma once

#include <cstdint>
#include <vector>

namespace umbra::machine_code {

using Code = std::vector<std::uint8_t>;

[[nodiscard]] inline Code operator+(Code left, const Code& right) {
    left.insert(left.end(), right.begin(), right.end());
    return left;
}

[[nodiscard]] inline Code mov_eax(std::uint32_t value) {
    Code code{0xb8};
    for (unsigned shift = 0; shift < 32; shift += 8)
        code.push_back(static_cast<std::uint8_t>(value >> shift));
    return code;
}
[[nodiscard]] inline Code mov_dx(std::uint16_t value) {
    return {0x66, 0xba, static_cast<std::uint8_t>(value), static_cast<std::uint8_t>(value >> 8)};
}
inline const Code out_dx_al{0xee};
inline const Code out_dx_ax{0x66, 0xef};
inline const Code out_dx_eax{0xef};
inline const Code ud2{0x0f, 0x0b};
inline const Code spin{0xeb, 0xfe};                      // 1: jmp 1b
inline const Code halt{0xfb, 0xf4, 0xeb, 0xfc};          // 1: sti; hlt; jmp 1b
inline const Code halt_for_ever{0xfa, 0xf4, 0xeb, 0xfc}; // 1: cli; hlt; jmp 1b

/// Writes one byte to a port.
[[nodiscard]] inline Code write_port(std::uint16_t port, std::uint8_t value) {
    return mov_dx(port) + mov_eax(value) + out_dx_al;
}
/// Prints one character on the serial port.
[[nodiscard]] inline Code print(char character) {
    return write_port(0x3f8, static_cast<std::uint8_t>(character));
}
/// Ends the run by isa-debug-exit.
[[nodiscard]] inline Code exit(std::uint32_t value) {
    return mov_dx(0xf4) + mov_eax(value) + out_dx_eax + spin;
}
/// Runs `body` so many times. It leaves ECX alone.
[[nodiscard]] inline Code repeat(std::uint8_t times, const Code& body) {
    const auto back = static_cast<std::uint8_t>(-(static_cast<int>(body.size()) + 4));
    return Code{0xb9, times, 0, 0, 0} + body + Code{0xff, 0xc9, 0x75, back}; // mov ecx; body; dec ecx; jnz
}
/// Runs `body` again and again.
[[nodiscard]] inline Code for_ever(const Code& body) {
    return body + Code{0xeb, static_cast<std::uint8_t>(-(static_cast<int>(body.size()) + 2))}; // jmp
}

} // namespace umbra::machine_code
