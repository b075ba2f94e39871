// Dispatch of port and device-window accesses, and the devices that are too small for a file of their own.
#include "vmm/devices/platform.hpp"

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

namespace umbra {

namespace {

constexpr std::uint16_t number(Port port) {
    return static_cast<std::uint16_t>(port);
}

constexpr std::uint32_t all_ones(unsigned size) {
    return size >= 4 ? ~0U : (1U << (8 * size)) - 1;
}

constexpr std::uint16_t keyboard_data_port = 0x60;
constexpr std::uint16_t rtc_index_port = 0x70;
constexpr std::uint16_t serial_base = 0x3f8;
constexpr std::uint16_t second_serial_base = 0x2f8;
constexpr std::uint16_t reset_control_port = 0xcf9;
constexpr std::uint16_t pci_address_port = 0xcf8;

// Ports that the in-kernel irqchip (two PICs with their edge/level registers) and PIT answer; 0x61 is the
// PIT's speaker gate. The trailing number is the last port, inclusive.
struct PortSpan {
    std::uint16_t first;
    std::uint16_t last;
};
constexpr std::array<PortSpan, 5> kvm_ports{
    {{0x20, 0x21}, {0x40, 0x43}, {0x61, 0x61}, {0xa0, 0xa1}, {0x4d0, 0x4d1}}};

constexpr std::uint8_t control_a_reset = 0x01;
constexpr std::uint8_t reset_control_reset = 0x04;

} // namespace

/// A run of ports and who answers them.
struct Platform::Range {
    /// An access wider than a byte to byte-wide registers reaches consecutive ports, byte by byte, as on the
    /// ISA bus.
    enum class Width { bytes, any };

    std::uint16_t first;
    std::uint16_t last; ///< inclusive
    Width width;
    std::uint32_t (Platform::*read)(Port, unsigned);
    void (Platform::*write)(Port, unsigned, std::uint32_t);
};

const Platform::Range* Platform::find(Port port) {
    using enum Range::Width;
    static constexpr std::array<Range, 16> ranges{{
        {serial_base, serial_base + Serial::register_count - 1, bytes, &Platform::read_serial,
         &Platform::write_serial},
        {second_serial_base, second_serial_base + Serial::register_count - 1, bytes, &Platform::read_serial,
         &Platform::write_serial},
        {Vga::first_port, Vga::last_port, bytes, &Platform::read_vga, &Platform::write_vga},
        {FwCfg::base_port, FwCfg::base_port + FwCfg::port_count - 1, any, &Platform::read_fw_cfg,
         &Platform::write_fw_cfg},
        {0x60, 0x60, bytes, &Platform::read_keyboard, &Platform::write_keyboard},
        {0x64, 0x64, bytes, &Platform::read_keyboard, &Platform::write_keyboard},
        {0x70, 0x71, bytes, &Platform::read_rtc, &Platform::write_rtc},
        {0x80, 0x80, any, &Platform::read_post_code, &Platform::write_post_code},
        {0x92, 0x92, bytes, &Platform::read_control_a, &Platform::write_control_a},
        {0xe9, 0xe9, bytes, &Platform::read_debug_console, &Platform::write_debug_console},
        {0xf4, 0xf4, any, &Platform::read_debug_exit, &Platform::write_debug_exit},
        {0x501, 0x502, any, &Platform::read_debug_exit, &Platform::write_debug_exit},
        {acpi_event_port, acpi_timer_port + acpi_timer_bytes - 1, any, &Platform::read_acpi,
         &Platform::write_acpi},
        {0xb004, 0xb005, any, &Platform::read_power, &Platform::write_power},
        {0xcf8, 0xcfb, any, &Platform::read_pci, &Platform::write_pci},
        {0xcfc, 0xcff, any, &Platform::read_pci, &Platform::write_pci},
    }};
    for (const Range& range : ranges)
        if (range.first <= number(port) && number(port) <= range.last)
            return &range;
    return nullptr;
}

Platform::Platform(PlatformConfig config)
    : serial_(std::move(config.serial_output), std::move(config.serial_interrupt)),
      second_serial_(std::move(config.second_serial_output), std::move(config.second_serial_interrupt)),
      debug_console_(std::move(config.debug_output)), keyboard_(std::move(config.keyboard_interrupt)),
      rtc_(std::move(config.clock), std::move(config.rtc_interrupt), config.low_memory, config.high_memory),
      fw_cfg_(std::move(config.fw_cfg)), acpi_(std::move(config.timer)), type_input_(config.type_input) {
    if (config.test_device)
        test_device_.emplace(std::move(config.test_device));
}

bool Platform::kvm_owns(Port port) {
    return std::any_of(kvm_ports.begin(), kvm_ports.end(), [port](const PortSpan& span) {
        return span.first <= number(port) && number(port) <= span.last;
    });
}

std::uint32_t Platform::port_read(Port port, unsigned size) {
    if (test_device_ && TestDevice::has(number(port)))
        return test_device_->read(number(port), size);
    const Range* const range = find(port);
    if (range == nullptr) {
        ++unclaimed_.port_reads;
        return all_ones(size);
    }
    if (size == 1 || range->width == Range::Width::any)
        return (this->*range->read)(port, size) & all_ones(size);
    std::uint32_t value = 0;
    for (unsigned i = 0; i < size; ++i)
        value |= port_read(Port{static_cast<std::uint16_t>(number(port) + i)}, 1) << (8 * i);
    return value;
}

void Platform::port_write(Port port, unsigned size, std::uint32_t value) {
    if (test_device_ && TestDevice::has(number(port))) {
        test_device_->write(number(port), size, value);
        return;
    }
    const Range* const range = find(port);
    if (range == nullptr) {
        ++unclaimed_.port_writes;
        return;
    }
    if (size == 1 || range->width == Range::Width::any) {
        (this->*range->write)(port, size, value & all_ones(size));
        return;
    }
    for (unsigned i = 0; i < size; ++i)
        port_write(Port{static_cast<std::uint16_t>(number(port) + i)}, 1, value >> (8 * i));
}

std::span<std::byte> Platform::device_memory(GuestPhys at, std::size_t size) {
    return test_device_ ? test_device_->memory(at, size) : std::span<std::byte>();
}

void Platform::mmio_read(GuestPhys at, std::span<std::byte> data) {
    if (const auto memory = device_memory(at, data.size()); !memory.empty()) {
        std::ranges::copy(memory, data.begin());
        return;
    }
    ++unclaimed_.mmio_reads;
    std::fill(data.begin(), data.end(), std::byte{0xff});
}

void Platform::mmio_write(GuestPhys at, std::span<const std::byte> data) {
    if (const auto memory = device_memory(at, data.size()); !memory.empty())
        std::ranges::copy(data, memory.begin());
    else
        ++unclaimed_.mmio_writes;
}

void Platform::flush() {
    serial_.flush();
    second_serial_.flush();
    debug_console_.flush();
}

Serial& Platform::serial(Port port) {
    return number(port) >= serial_base ? serial_ : second_serial_;
}

// Both ports begin at a multiple of their registers' number.
std::uint32_t Platform::read_serial(Port port, unsigned /*size*/) {
    return serial(port).read(number(port) % Serial::register_count);
}

void Platform::write_serial(Port port, unsigned /*size*/, std::uint32_t value) {
    serial(port).write(number(port) % Serial::register_count, static_cast<std::uint8_t>(value));
}

std::uint32_t Platform::read_keyboard(Port port, unsigned /*size*/) {
    return number(port) == keyboard_data_port ? keyboard_.read_data() : keyboard_.read_status();
}

void Platform::write_keyboard(Port port, unsigned /*size*/, std::uint32_t value) {
    if (number(port) == keyboard_data_port)
        keyboard_.write_data(static_cast<std::uint8_t>(value));
    else
        keyboard_.write_command(static_cast<std::uint8_t>(value));
    if (keyboard_.reset_requested())
        end_run({GuestExit::Kind::reset});
}

std::uint32_t Platform::read_rtc(Port port, unsigned /*size*/) {
    return number(port) == rtc_index_port ? 0xff : rtc_.read(); // the index port is write-only
}

void Platform::write_rtc(Port port, unsigned /*size*/, std::uint32_t value) {
    if (number(port) == rtc_index_port)
        rtc_.select(static_cast<std::uint8_t>(value));
    else
        rtc_.write(static_cast<std::uint8_t>(value));
}

// Kernels write to the POST port only to let time pass; on a real machine a diagnostic card shows the value.
std::uint32_t Platform::read_post_code(Port /*port*/, unsigned /*size*/) {
    return ~0U;
}

void Platform::write_post_code(Port /*port*/, unsigned /*size*/, std::uint32_t /*value*/) {}

std::uint32_t Platform::read_control_a(Port /*port*/, unsigned /*size*/) {
    return control_a_;
}

void Platform::write_control_a(Port /*port*/, unsigned /*size*/, std::uint32_t value) {
    control_a_ = static_cast<std::uint8_t>(value & ~std::uint32_t{control_a_reset});
    if ((value & control_a_reset) != 0)
        end_run({GuestExit::Kind::reset});
}

std::uint32_t Platform::read_debug_console(Port /*port*/, unsigned /*size*/) {
    return 0xe9; // how a guest finds that the console is there
}

void Platform::write_debug_console(Port /*port*/, unsigned /*size*/, std::uint32_t value) {
    debug_console_.put(static_cast<char>(value));
}

std::uint32_t Platform::read_debug_exit(Port /*port*/, unsigned /*size*/) {
    return 0;
}

void Platform::write_debug_exit(Port /*port*/, unsigned /*size*/, std::uint32_t value) {
    end_run({GuestExit::Kind::debug_exit, value});
}

std::uint32_t Platform::read_vga(Port port, unsigned /*size*/) {
    return vga_.read(number(port));
}

void Platform::write_vga(Port port, unsigned /*size*/, std::uint32_t value) {
    vga_.write(number(port), static_cast<std::uint8_t>(value));
}

std::uint32_t Platform::read_fw_cfg(Port port, unsigned size) {
    return fw_cfg_.read(number(port) - unsigned{FwCfg::base_port}, size);
}

void Platform::write_fw_cfg(Port port, unsigned size, std::uint32_t value) {
    fw_cfg_.write(number(port) - unsigned{FwCfg::base_port}, size, value);
}

std::uint32_t Platform::read_acpi(Port port, unsigned size) {
    return acpi_.read(number(port) - unsigned{acpi_event_port}, size);
}

void Platform::write_acpi(Port port, unsigned size, std::uint32_t value) {
    acpi_.write(number(port) - unsigned{acpi_event_port}, size, value);
    if (const auto type = acpi_.sleep_requested())
        sleep(*type);
}

std::uint32_t Platform::read_power(Port /*port*/, unsigned /*size*/) {
    return 0;
}

void Platform::write_power(Port port, unsigned /*size*/, std::uint32_t value) {
    const unsigned byte = number(port) % 2;
    if (const auto type = acpi_sleep_type(static_cast<std::uint16_t>(value << (8 * byte))))
        sleep(*type);
}

std::uint32_t Platform::read_pci(Port port, unsigned size) {
    // The address register answers 32-bit accesses only; a byte inside it is the reset control register.
    if (number(port) == pci_address_port && size == 4)
        return pci_address_;
    if (number(port) == reset_control_port && size == 1)
        return reset_control_;
    return ~0U;
}

void Platform::write_pci(Port port, unsigned size, std::uint32_t value) {
    if (number(port) == pci_address_port && size == 4)
        pci_address_ = value & ~0x7f00'0003U; // reserved bits read 0 (PCI Local Bus Specification §3.2.2.3.2)
    if (number(port) == reset_control_port && size == 1) {
        reset_control_ = static_cast<std::uint8_t>(value & ~std::uint32_t{reset_control_reset});
        if ((value & reset_control_reset) != 0)
            end_run({GuestExit::Kind::reset});
    }
}

void Platform::sleep(std::uint8_t type) {
    if (type == acpi_soft_off || type == acpi_soft_off_qemu)
        end_run({GuestExit::Kind::power_off});
    else
        end_run({GuestExit::Kind::sleep, type});
}

void Platform::end_run(GuestExit how) {
    if (!exit_)
        exit_ = how;
}

} // namespace umbra
