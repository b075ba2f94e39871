// ACPI's fixed hardware (ACPI specification 6.5, section 4.8): the PM1 event and control registers and the
// power management timer. ACPI mode is always on, no fixed event ever happens, and S5 is the only sleep.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>

namespace umbra {

/// Where the FADT says that the registers are: the ports of QEMU's PC.
inline constexpr std::uint16_t acpi_event_port = 0x600;   ///< PM1a_EVT_BLK: status, then enable
inline constexpr std::uint16_t acpi_control_port = 0x604; ///< PM1a_CNT_BLK
inline constexpr std::uint16_t acpi_timer_port = 0x608;   ///< PM_TMR_BLK
inline constexpr unsigned acpi_event_bytes = 4;
inline constexpr unsigned acpi_control_bytes = 2;
inline constexpr unsigned acpi_timer_bytes = 4; ///< all 32 bits count: FADT.TMR_VAL_EXT

/// SLP_TYP of S5 as the DSDT's \_S5 tells it, and as QEMU's does: kernels that do not read the DSDT write
/// what works there.
inline constexpr std::uint8_t acpi_soft_off = 5, acpi_soft_off_qemu = 0;

/// The sleep type that a value of PM1 control asks for, if it sets SLP_EN (4.8.3.2.1).
[[nodiscard]] constexpr std::optional<std::uint8_t> acpi_sleep_type(std::uint16_t control) {
    constexpr unsigned enable = 1U << 13, type_shift = 10, type_mask = 7;
    if ((control & enable) == 0)
        return std::nullopt;
    return static_cast<std::uint8_t>(control >> type_shift & type_mask);
}

inline constexpr std::uint64_t acpi_timer_hz = 3'579'545;

/// A clock that only advances; injected so that tests choose it.
using MonotonicClock = std::function<std::chrono::steady_clock::time_point()>;

class AcpiPm {
  public:
    explicit AcpiPm(MonotonicClock clock) : clock_(std::move(clock)), start_(clock_()) {}

    /// `offset` counts bytes from acpi_event_port, below 12; `size` is 1, 2 or 4. What lies beyond a register
    /// is 0.
    [[nodiscard]] std::uint32_t read(unsigned offset, unsigned size) const;
    void write(unsigned offset, unsigned size, std::uint32_t value);

    /// The SLP_TYP with which the guest has set SLP_EN, once it has.
    [[nodiscard]] std::optional<std::uint8_t> sleep_requested() const { return sleep_requested_; }

  private:
    [[nodiscard]] std::uint8_t read_byte(unsigned offset, std::uint32_t timer) const;

    MonotonicClock clock_;
    std::chrono::steady_clock::time_point start_;
    std::uint16_t enable_ = 0;
    std::uint16_t control_ = 0;
    std::optional<std::uint8_t> sleep_requested_;
};

} // namespace umbra
