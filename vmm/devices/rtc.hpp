// The real-time clock and its CMOS memory (Motorola MC146818A data sheet; the memory-size bytes as PC BIOSes
// keep them).
//
// The time is the host's, in UTC: a guest that sets the clock is not believed. Status C tells of what has
// happened since it was last read: updates, periods and alarms. No interrupt is raised for them.
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
    [[nodiscard]] std::uint8_t read();
    void write(std::uint8_t value);

  private:
    using Moment = std::chrono::sys_time<std::chrono::microseconds>;

    [[nodiscard]] Moment now() const { return std::chrono::floor<std::chrono::microseconds>(clock_()); }
    [[nodiscard]] std::uint8_t take_flags();
    [[nodiscard]] std::uint64_t periods_until(Moment when) const;
    [[nodiscard]] bool alarm_in(std::chrono::sys_seconds after, std::chrono::sys_seconds until) const;
    [[nodiscard]] std::uint8_t encode(unsigned value) const;
    [[nodiscard]] std::uint8_t encode_hours(unsigned hours) const;

    WallClock clock_;
    std::array<std::uint8_t, 128> memory_{};
    std::uint8_t index_ = 0;
    Moment flags_since_; ///< status C was read
};

} // namespace umbra
