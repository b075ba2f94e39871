// The platform: every port and device window of the PC that umbra answers for itself, and the ways in which a
// guest ends its own run.
//
//   0x60 0x64          8042 keyboard controller, IRQ 1     0x3c0-0x3df   VGA
//   0x70 0x71          RTC and CMOS, IRQ 8                 0x3f8-0x3ff   16550A serial port, IRQ 4
//   0x80               POST code: dropped                  0x510-0x51b   fw_cfg
//   0x92               system control port A               0x600-0x60b   ACPI: events, power-off, timer
//   0xe9               debug console                       0xb004        ACPI power-off of older PCs
//   0xf4 0x501-0x502   isa-debug-exit, where QEMU's is     0xcf8-0xcff   PCI configuration: no device;
//                      told to be, and where by default                  0xcf9 is the reset control
//   0x2f8-0x2ff        16550A serial port, IRQ 3
//
// The interrupt controllers and the timer are KVM's: kvm_owns() names their ports.
#pragma once

#include "shadow/address.hpp"
#include "vmm/devices/acpi_pm.hpp"
#include "vmm/devices/fw_cfg.hpp"
#include "vmm/devices/keyboard_controller.hpp"
#include "vmm/devices/output.hpp"
#include "vmm/devices/rtc.hpp"
#include "vmm/devices/serial.hpp"
#include "vmm/devices/test_device.hpp"
#include "vmm/devices/vga.hpp"

#include <compare>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace umbra {

/// An x86 I/O port number (Intel SDM vol. 1 ch. 19).
enum class Port : std::uint16_t {};

/// How a guest asked to end its run.
struct GuestExit {
    enum class Kind {
        debug_exit, ///< wrote `value` to isa-debug-exit; by convention 0 = passed
        reset,      ///< keyboard controller, port 0x92, or reset control register
        power_off,  ///< ACPI
        sleep,      ///< ACPI, a sleep type that is not power-off, of which there are none here
    };
    Kind kind;
    std::uint32_t value = 0; ///< of debug_exit; the type (SLP_TYP) of sleep; 0 otherwise

    bool operator==(const GuestExit&) const = default;
};

struct PlatformConfig {
    OutputSink serial_output;
    OutputSink debug_output;        ///< port 0xe9
    InterruptLine serial_interrupt; ///< IRQ 4
    WallClock clock = std::chrono::system_clock::now;
    std::uint64_t low_memory = 0;  ///< bytes of guest RAM below 4 GB, for CMOS
    std::uint64_t high_memory = 0; ///< bytes of guest RAM from 4 GB up, for CMOS
    OutputSink second_serial_output{};
    InterruptLine second_serial_interrupt{};               ///< IRQ 3
    InterruptLine keyboard_interrupt{};                    ///< IRQ 1
    InterruptLine rtc_interrupt{};                         ///< IRQ 8; from RtcTimer's thread, too
    MonotonicClock timer = std::chrono::steady_clock::now; ///< of ACPI
    FwCfgConfig fw_cfg{};
    bool type_input = false;      ///< receive() is the keyboard's, not the serial port's
    InterruptLines test_device{}; ///< the interrupt lines of a TestDevice; empty: there is none
};

/// Accesses that no device answered. They read all-ones, as a bus does that nobody drives.
struct UnclaimedAccesses {
    std::uint64_t port_reads = 0;
    std::uint64_t port_writes = 0;
    std::uint64_t mmio_reads = 0;
    std::uint64_t mmio_writes = 0;

    bool operator==(const UnclaimedAccesses&) const = default;
};

/// Not thread-safe: the thread that runs the vCPU calls everything here, and the configured callbacks run on
/// it.
class Platform {
  public:
    explicit Platform(PlatformConfig config);

    /// Whether KVM's in-kernel irqchip or PIT answers this port.
    [[nodiscard]] static bool kvm_owns(Port port);

    /// `size` is 1, 2 or 4 bytes; the value is in the low `size` bytes, the rest is 0.
    [[nodiscard]] std::uint32_t port_read(Port port, unsigned size);
    /// Bits of `value` above `size` (1, 2 or 4) bytes are ignored.
    void port_write(Port port, unsigned size, std::uint32_t value);

    /// Accesses to guest-physical addresses that are not RAM.
    void mmio_read(GuestPhys at, std::span<std::byte> data);
    void mmio_write(GuestPhys at, std::span<const std::byte> data);

    /// Set from the moment at which the guest ends its run; the first way it chooses counts.
    [[nodiscard]] const std::optional<GuestExit>& exit() const { return exit_; }

    /// Input for the first serial port, or text that is typed on the keyboard, as configured; returns how
    /// many bytes it took (Serial::receive, Keyboard::receive).
    [[nodiscard]] std::size_t receive(std::span<const char> input) {
        return type_input_ ? keyboard_.receive(input) : serial_.receive(input);
    }

    /// `observer` hears of what devices write to RAM, on the thread that runs the vCPU; an empty one ends
    /// that.
    void observe_dma(DmaObserver observer) { fw_cfg_.observe(std::move(observer)); }

    [[nodiscard]] Rtc& rtc() { return rtc_; }

    /// For vga_screen(). Any thread.
    [[nodiscard]] VgaTextState vga_text_state() const { return vga_.text_state(); }

    /// Passes on output that has not ended its line. The run loop calls this when the guest idles, from time
    /// to time, and at the end.
    void flush();
    /// Whether flush() would pass on anything.
    [[nodiscard]] bool output_waits() const {
        return serial_.output_waits() || second_serial_.output_waits() || debug_console_.waits();
    }

    [[nodiscard]] const UnclaimedAccesses& unclaimed() const { return unclaimed_; }

  private:
    struct Range;
    static const Range* find(Port port);

    std::uint32_t read_keyboard(Port port, unsigned size);
    void write_keyboard(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_rtc(Port port, unsigned size);
    void write_rtc(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_post_code(Port port, unsigned size);
    void write_post_code(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_control_a(Port port, unsigned size);
    void write_control_a(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_debug_console(Port port, unsigned size);
    void write_debug_console(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_debug_exit(Port port, unsigned size);
    void write_debug_exit(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_serial(Port port, unsigned size);
    void write_serial(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_vga(Port port, unsigned size);
    void write_vga(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_fw_cfg(Port port, unsigned size);
    void write_fw_cfg(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_acpi(Port port, unsigned size);
    void write_acpi(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_power(Port port, unsigned size);
    void write_power(Port port, unsigned size, std::uint32_t value);
    std::uint32_t read_pci(Port port, unsigned size);
    void write_pci(Port port, unsigned size, std::uint32_t value);

    [[nodiscard]] std::span<std::byte> device_memory(GuestPhys at, std::size_t size);
    void sleep(std::uint8_t type);
    void end_run(GuestExit how);
    [[nodiscard]] Serial& serial(Port port);

    Serial serial_;
    Serial second_serial_;
    OutputBuffer debug_console_;
    KeyboardController keyboard_;
    Rtc rtc_;
    Vga vga_;
    FwCfg fw_cfg_;
    AcpiPm acpi_;
    std::optional<TestDevice> test_device_;
    bool type_input_;
    std::uint8_t control_a_ = 0x02; ///< port 0x92: A20 open
    std::uint8_t reset_control_ = 0;
    std::uint32_t pci_address_ = 0;
    std::optional<GuestExit> exit_;
    UnclaimedAccesses unclaimed_;
};

} // namespace umbra
