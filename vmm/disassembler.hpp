// Text of instructions, for reports.
#pragma once

#include "shadow/address.hpp"

#include <cstddef>
#include <span>
#include <string>

namespace umbra {

/// The first instruction in `code`, which lies at `at`, on one line in Intel syntax; "(bad)" if it is none,
/// "(no code)" if `code` is empty or ends inside it. `mode64`: 64-bit code, otherwise 32-bit.
[[nodiscard]] std::string disassemble(std::span<const std::byte> code, GuestVirt at, bool mode64);

/// The same, and how many bytes it takes: 0 if it is none. `bits`: 64, 32 or 16.
struct Disassembled {
    std::string text;
    std::size_t length = 0;
};
[[nodiscard]] Disassembled disassemble_next(std::span<const std::byte> code, GuestVirt at, unsigned bits);

} // namespace umbra
