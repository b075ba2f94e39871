// The real-time clock and its CMOS memory (Motorola MC146818A data sheet; the memory-size bytes as PC BIOSes
// keep them).
//
// The time is the host's, in UTC: a guest that sets the clock is not believed. Alarms are kept as plain bytes
// and no interrupt is ever raised, so status C stays 0.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>

namespace umbra {

/// The time of day; injected so that tests choose it.
using WallClock = std::function<std::chrono::system_clock::time_point()>;

class Rtc {
  public:
    /// `low_memory` and `high_memory`: bytes of guest RAM below 4 GB (counted from address 0) and from 4 GB
    /// up.
    Rtc(WallClock clock, std::uint64_t low_memory, std::uint64_t high_memory);

    /// Port 0x70: which register port 0x71 means. Bit 7, the NMI mask, is ignored: umbra raises no NMIs.
    void select(std::uint8_t index) { index_ = index & 0x7f; }
    /// Port 0x71.
    [[nodiscard]] std::uint8_t read() const;
    void write(std::uint8_t value);

  private:
    [[nodiscard]] std::uint8_t encode(unsigned value) const;
    [[nodiscard]] std::uint8_t encode_hours(unsigned hours) const;

    WallClock clock_;
    std::array<std::uint8_t, 128> memory_{};
    std::uint8_t index_ = 0;
};

} // namespace umbra
