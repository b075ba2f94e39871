// QEMU's pc-testdev, as far as programs that test hypervisors use it: a register of four bytes at ports 0xe0
// and again at 0xe8, which is byte-wide there; interrupt lines that ports from 0x2000 on set; and 64 KB of
// memory at 0xff000000 that is a device's, so that each access to it is emulated.
#pragma once

#include "shadow/address.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace umbra {

/// Sets an interrupt line: its number, 0 to 23, and level.
using InterruptLines = std::function<void(unsigned line, bool level)>;

class TestDevice {
  public:
    explicit TestDevice(InterruptLines lines) : lines_(std::move(lines)) {}

    [[nodiscard]] static bool has(std::uint16_t port);
    /// For a port that it has; `size` is 1, 2 or 4. Bytes beyond the register are 0.
    [[nodiscard]] std::uint32_t read(std::uint16_t port, unsigned size) const;
    void write(std::uint16_t port, unsigned size, std::uint32_t value);

    /// The bytes of its memory from `at` on; none if not all of them are.
    [[nodiscard]] std::span<std::byte> memory(GuestPhys at, std::size_t size);

  private:
    static constexpr std::size_t memory_bytes = 0x10000;

    InterruptLines lines_;
    std::array<std::uint8_t, 4> register_{};
    std::vector<std::byte> memory_ = std::vector<std::byte>(memory_bytes);
};

} // namespace umbra
