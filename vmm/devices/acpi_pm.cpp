// The PM1 registers byte by byte, and the timer from the host's clock.
#include "vmm/devices/acpi_pm.hpp"

namespace umbra {
namespace {

constexpr unsigned enable_offset = 2; // behind the status register, which is always 0
constexpr unsigned control_offset = acpi_control_port - acpi_event_port;
constexpr unsigned timer_offset = acpi_timer_port - acpi_event_port;

// PM1 control (4.8.3.2.1)
constexpr std::uint16_t control_sci_enable = 1U << 0; // ACPI mode
constexpr std::uint16_t control_bus_master_reload = 1U << 1;
constexpr std::uint16_t control_sleep_type = 7U << 10;

std::uint8_t byte_of(std::uint32_t value, unsigned index) {
    return static_cast<std::uint8_t>(value >> (8 * index));
}

void set_byte(std::uint16_t& value, unsigned index, std::uint32_t byte) {
    const unsigned shift = 8 * index;
    value = static_cast<std::uint16_t>((value & ~(0xffU << shift)) | (byte & 0xff) << shift);
}

} // namespace

std::uint32_t AcpiPm::read(unsigned offset, unsigned size) const {
    // In whole seconds and the rest: the product of all nanoseconds would overflow after minutes.
    const auto passed = clock_() - start_;
    const auto seconds = std::chrono::floor<std::chrono::seconds>(passed);
    const auto rest = std::chrono::nanoseconds(passed - seconds);
    const std::uint64_t ticks = static_cast<std::uint64_t>(seconds.count()) * acpi_timer_hz +
                                static_cast<std::uint64_t>(rest.count()) * acpi_timer_hz / 1'000'000'000;
    std::uint32_t value = 0;
    for (unsigned i = 0; i < size; ++i) // the timer's bytes are of one moment
        value |= std::uint32_t{read_byte(offset + i, static_cast<std::uint32_t>(ticks))} << (8 * i);
    return value;
}

std::uint8_t AcpiPm::read_byte(unsigned offset, std::uint32_t timer) const {
    if (offset >= timer_offset + acpi_timer_bytes)
        return 0;
    if (offset >= timer_offset)
        return byte_of(timer, offset - timer_offset);
    if (offset >= control_offset)
        return byte_of(std::uint32_t{control_} | control_sci_enable, offset - control_offset);
    return offset >= enable_offset ? byte_of(enable_, offset - enable_offset) : std::uint8_t{0};
}

void AcpiPm::write(unsigned offset, unsigned size, std::uint32_t value) {
    std::uint16_t control = control_;
    for (unsigned i = 0; i < size; ++i, value >>= 8) {
        const unsigned at = offset + i;
        if (at >= enable_offset && at < control_offset)
            set_byte(enable_, at - enable_offset, value);
        else if (at >= control_offset && at < control_offset + acpi_control_bytes)
            set_byte(control, at - control_offset, value);
    }
    if (const auto type = acpi_sleep_type(control)) // SLP_EN is write-only
        sleep_requested_ = type;
    control_ = control & (control_bus_master_reload | control_sleep_type);
}

} // namespace umbra
