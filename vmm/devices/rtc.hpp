// The real-time clock and its CMOS memory (Motorola MC146818A data sheet; the memory-size bytes as PC BIOSes
// keep them).
//
// The time is the host's, in UTC: a guest that sets the clock is not believed. Status C tells of what has
// happened since it was last read: updates, periods and alarms. As long as it tells of one that is enabled,
// the interrupt line is up; who keeps the time (RtcTimer) says when it may be time to look.
#pragma once

#include "vmm/devices/interrupt_line.hpp"

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>

namespace umbra {

/// The time of day; injected so that tests choose it.
using WallClock = std::function<std::chrono::system_clock::time_point()>;

/// Thread-safe.
class Rtc {
  public:
    /// `low_memory` and `high_memory`: bytes of guest RAM below 4 GB (counted from address 0) and from 4 GB
    /// up. `interrupt` (IRQ 8) may be called on any thread that calls this.
    Rtc(WallClock clock, InterruptLine interrupt, std::uint64_t low_memory, std::uint64_t high_memory);

    /// Port 0x70: which register port 0x71 means. Bit 7, the NMI mask, is ignored: umbra raises no NMIs.
    void select(std::uint8_t index);
    /// Port 0x71.
    [[nodiscard]] std::uint8_t read();
    void write(std::uint8_t value);

    /// Raises the interrupt line if something has happened that does so. Returns after which time to ask
    /// again; nothing if there is no need before the guest has made an access.
    std::optional<std::chrono::microseconds> update();
    /// `observer` hears of the guest's accesses after which update() may have something else to say.
    void observe(std::function<void()> observer);

  private:
    using Moment = std::chrono::sys_time<std::chrono::microseconds>;

    [[nodiscard]] Moment now() const { return std::chrono::floor<std::chrono::microseconds>(clock_()); }
    [[nodiscard]] std::uint8_t read_register();
    void write_register(std::uint8_t value);
    [[nodiscard]] std::uint8_t take_flags();
    [[nodiscard]] unsigned flags_until(Moment until) const;
    [[nodiscard]] unsigned period_shift() const;
    void set_line(bool level);
    void changed() const;
    [[nodiscard]] std::uint64_t periods_until(Moment when) const;
    [[nodiscard]] bool alarm_in(std::chrono::sys_seconds after, std::chrono::sys_seconds until) const;
    [[nodiscard]] std::uint8_t encode(unsigned value) const;
    [[nodiscard]] std::uint8_t encode_hours(unsigned hours) const;

    std::mutex mutex_; ///< of all but observer_, which is set before there are other threads
    WallClock clock_;
    InterruptLine interrupt_;
    bool line_ = false;
    std::function<void()> observer_;
    std::array<std::uint8_t, 128> memory_{};
    std::uint8_t index_ = 0;
    Moment flags_since_; ///< status C was read
};

} // namespace umbra
