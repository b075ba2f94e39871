// Makes the ACPI tables, structure by structure.
#include "vmm/loader/acpi_tables.hpp"

#include "vmm/devices/acpi_pm.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace umbra {
namespace {

constexpr std::uint8_t sci_irq = 9;
constexpr std::uint8_t timer_irq = 0, timer_pin = 2; // of the I/O APIC: Vm::create_interrupt_controllers
constexpr std::uint32_t local_apic_base = 0xfee0'0000;
constexpr std::uint32_t io_apic_base = 0xfec0'0000;
constexpr std::uint16_t reset_port = 0xcf9;
constexpr std::uint8_t reset_value = 6;
constexpr std::uint8_t century_register = 0x32; // of CMOS

// --- The tables' layout

struct [[gnu::packed]] RootPointer { // RSDP, 5.2.5.3
    std::array<char, 8> signature;
    std::uint8_t checksum; ///< of the first 20 bytes
    std::array<char, 6> oem_id;
    std::uint8_t revision;
    std::uint32_t rsdt;
    std::uint32_t length;
    std::uint64_t xsdt;
    std::uint8_t extended_checksum; ///< of all
    std::array<std::uint8_t, 3> reserved;
};
static_assert(sizeof(RootPointer) == 36);

struct [[gnu::packed]] Header { // 5.2.6
    std::array<char, 4> signature;
    std::uint32_t length;
    std::uint8_t revision;
    std::uint8_t checksum;
    std::array<char, 6> oem_id;
    std::array<char, 8> oem_table_id;
    std::uint32_t oem_revision;
    std::array<char, 4> creator_id;
    std::uint32_t creator_revision;
};
static_assert(sizeof(Header) == 36);

struct [[gnu::packed]] GenericAddress { // 5.2.3.2
    std::uint8_t space;
    std::uint8_t bits;
    std::uint8_t bit_offset;
    std::uint8_t access_size;
    std::uint64_t address;
};
static_assert(sizeof(GenericAddress) == 12);

struct [[gnu::packed]] Fadt { // 5.2.9, as of revision 5
    Header header;
    std::uint32_t facs;
    std::uint32_t dsdt;
    std::uint8_t reserved_model;
    std::uint8_t preferred_profile;
    std::uint16_t sci_interrupt;
    std::uint32_t smi_command;
    std::uint8_t acpi_enable, acpi_disable, s4_bios_request, pstate_control;
    std::uint32_t pm1a_event, pm1b_event, pm1a_control, pm1b_control, pm2_control, pm_timer, gpe0, gpe1;
    std::uint8_t pm1_event_length, pm1_control_length, pm2_control_length, pm_timer_length;
    std::uint8_t gpe0_length, gpe1_length, gpe1_base, cstate_control;
    std::uint16_t c2_latency, c3_latency, flush_size, flush_stride;
    std::uint8_t duty_offset, duty_width, day_alarm, month_alarm, century;
    std::uint16_t boot_architecture;
    std::uint8_t reserved;
    std::uint32_t flags;
    GenericAddress reset_register;
    std::uint8_t reset_value;
    std::uint16_t arm_boot_architecture;
    std::uint8_t minor_version;
    std::uint64_t x_facs, x_dsdt;
    GenericAddress x_pm1a_event, x_pm1b_event, x_pm1a_control, x_pm1b_control, x_pm2_control, x_pm_timer,
        x_gpe0, x_gpe1, sleep_control, sleep_status;
};
static_assert(sizeof(Fadt) == 268);

struct [[gnu::packed]] Facs { // 5.2.10
    std::array<char, 4> signature;
    std::uint32_t length, hardware_signature, waking_vector, global_lock, flags;
    std::uint64_t x_waking_vector;
    std::uint8_t version;
    std::array<std::uint8_t, 31> reserved;
};
static_assert(sizeof(Facs) == 64);

struct [[gnu::packed]] MadtStart { // 5.2.12
    Header header;
    std::uint32_t local_apic;
    std::uint32_t flags;
};
static_assert(sizeof(MadtStart) == 44);

struct [[gnu::packed]] LocalApic { // 5.2.12.2
    std::uint8_t type = 0, length = 8, processor = 0, apic = 0;
    std::uint32_t flags = 0;
};

struct [[gnu::packed]] IoApic { // 5.2.12.3
    std::uint8_t type = 1, length = 12, id = 0, reserved = 0;
    std::uint32_t address = 0, first_interrupt = 0;
};

struct [[gnu::packed]] SourceOverride { // 5.2.12.5
    std::uint8_t type = 2, length = 10, bus = 0, source = 0;
    std::uint32_t global_interrupt = 0;
    std::uint16_t flags = 0;
};

struct [[gnu::packed]] LocalApicNmi { // 5.2.12.7
    std::uint8_t type = 4, length = 6, processor = 0;
    std::uint16_t flags = 0;
    std::uint8_t pin = 0;
};

constexpr std::uint8_t system_io = 1;             // GenericAddress::space
constexpr std::uint8_t apic_enabled = 1;          // LocalApic::flags
constexpr std::uint8_t every_processor = 0xff;    // LocalApicNmi::processor
constexpr std::uint8_t madt_pcat_compatible = 1;  // MadtStart::flags: there are 8259s as well
constexpr std::uint16_t conforming = 0;           // SourceOverride::flags: as the bus has it
constexpr std::uint16_t active_high_level = 0x0d; // likewise: polarity 01, trigger 11

// Fadt::boot_architecture
constexpr std::uint16_t legacy_devices = 1U << 0;
constexpr std::uint16_t keyboard_controller = 1U << 1;

// Fadt::flags
constexpr std::uint32_t wbinvd_works = 1U << 0;
constexpr std::uint32_t c1_works = 1U << 2;
constexpr std::uint32_t no_fixed_power_button = 1U << 4;
constexpr std::uint32_t no_fixed_sleep_button = 1U << 5;
constexpr std::uint32_t no_fixed_rtc_wake = 1U << 6;
constexpr std::uint32_t timer_has_32_bits = 1U << 8;
constexpr std::uint32_t reset_register_supported = 1U << 10;

// --- The DSDT's code (ACPI specification, chapter 20), assembled by hand

// clang-format off
constexpr auto dsdt_code = std::to_array<std::uint8_t>({
    // Name (\_S5, Package () { 5, 5, Zero, Zero }): SLP_TYP of PM1a, of PM1b
    0x08, '_', 'S', '5', '_', 0x12, 0x08, 0x04, 0x0a, acpi_soft_off, 0x0a, acpi_soft_off, 0x00, 0x00,

    // Scope (\_SB)
    0x10, 0x47, 0x0e, '_', 'S', 'B', '_',

    // Device (RTC)
    0x5b, 0x82, 0x25, 'R', 'T', 'C', '_',
    // Name (_HID, EisaId ("PNP0B00"))
    0x08, '_', 'H', 'I', 'D', 0x0c, 0x41, 0xd0, 0x0b, 0x00,
    // Name (_CRS, ResourceTemplate () { IO (Decode16, 0x70, 0x70, 1, 2) IRQNoFlags () { 8 } })
    0x08, '_', 'C', 'R', 'S', 0x11, 0x10, 0x0a, 0x0d, 0x47, 0x01, 0x70, 0x00, 0x70, 0x00, 0x01,
    0x02, 0x22, 0x00, 0x01, 0x79, 0x00,

    // Device (KBD)
    0x5b, 0x82, 0x2d, 'K', 'B', 'D', '_',
    // Name (_HID, EisaId ("PNP0303"))
    0x08, '_', 'H', 'I', 'D', 0x0c, 0x41, 0xd0, 0x03, 0x03,
    // Name (_CRS, ResourceTemplate () { IO (Decode16, 0x60, 0x60, 1, 1) IO (Decode16, 0x64, 0x64, 1, 1)
    //                                   IRQNoFlags () { 1 } })
    0x08, '_', 'C', 'R', 'S', 0x11, 0x18, 0x0a, 0x15, 0x47, 0x01, 0x60, 0x00, 0x60, 0x00, 0x01,
    0x01, 0x47, 0x01, 0x64, 0x00, 0x64, 0x00, 0x01, 0x01, 0x22, 0x02, 0x00, 0x79, 0x00,

    // Device (COM1)
    0x5b, 0x82, 0x2b, 'C', 'O', 'M', '1',
    // Name (_HID, EisaId ("PNP0501"))
    0x08, '_', 'H', 'I', 'D', 0x0c, 0x41, 0xd0, 0x05, 0x01,
    // Name (_UID, 1)
    0x08, '_', 'U', 'I', 'D', 0x01,
    // Name (_CRS, ResourceTemplate () { IO (Decode16, 0x3f8, 0x3f8, 1, 8) IRQNoFlags () { 4 } })
    0x08, '_', 'C', 'R', 'S', 0x11, 0x10, 0x0a, 0x0d, 0x47, 0x01, 0xf8, 0x03, 0xf8, 0x03, 0x01,
    0x08, 0x22, 0x10, 0x00, 0x79, 0x00,

    // Device (COM2)
    0x5b, 0x82, 0x2c, 'C', 'O', 'M', '2',
    // Name (_HID, EisaId ("PNP0501"))
    0x08, '_', 'H', 'I', 'D', 0x0c, 0x41, 0xd0, 0x05, 0x01,
    // Name (_UID, 2)
    0x08, '_', 'U', 'I', 'D', 0x0a, 0x02,
    // Name (_CRS, ResourceTemplate () { IO (Decode16, 0x2f8, 0x2f8, 1, 8) IRQNoFlags () { 3 } })
    0x08, '_', 'C', 'R', 'S', 0x11, 0x10, 0x0a, 0x0d, 0x47, 0x01, 0xf8, 0x02, 0xf8, 0x02, 0x01,
    0x08, 0x22, 0x08, 0x00, 0x79, 0x00,

    // Device (FWCF)
    0x5b, 0x82, 0x2e, 'F', 'W', 'C', 'F',
    // Name (_HID, "QEMU0002")
    0x08, '_', 'H', 'I', 'D', 0x0d, 'Q', 'E', 'M', 'U', '0', '0', '0', '2', 0x00,
    // Name (_STA, 0x0B)
    0x08, '_', 'S', 'T', 'A', 0x0a, 0x0b,
    // Name (_CRS, ResourceTemplate () { IO (Decode16, 0x510, 0x510, 1, 12) })
    0x08, '_', 'C', 'R', 'S', 0x11, 0x0d, 0x0a, 0x0a, 0x47, 0x01, 0x10, 0x05, 0x10, 0x05, 0x01,
    0x0c, 0x79, 0x00,
});
// clang-format on

// --- Writing

template<std::size_t Size>
std::array<char, Size> text(std::string_view value) {
    std::array<char, Size> padded{};
    padded.fill(' ');
    std::copy(value.begin(), value.end(), padded.begin());
    return padded;
}

/// What makes the sum of `bytes` 0, where its place in them is still 0.
std::uint8_t checksum(std::span<const std::byte> bytes) {
    const unsigned sum = std::accumulate(bytes.begin(), bytes.end(), 0U, [](unsigned total, std::byte byte) {
        return total + std::to_integer<unsigned>(byte);
    });
    return static_cast<std::uint8_t>(0U - sum);
}

Header header(std::string_view signature, std::uint8_t revision) {
    return {.signature = text<4>(signature),
            .length = 0,
            .revision = revision,
            .checksum = 0,
            .oem_id = text<6>("UMBRA"),
            .oem_table_id = text<8>("UMBRAPC"),
            .oem_revision = 1,
            .creator_id = text<4>("UMBR"),
            .creator_revision = 1};
}

/// Tables one after the other.
class Writer {
  public:
    explicit Writer(GuestPhys at) : begin_(at) {}

    /// Completes the table's header, whose length and checksum are still 0, and adds the table.
    std::uint32_t add(std::vector<std::byte> table) {
        const auto length = static_cast<std::uint32_t>(table.size());
        std::memcpy(table.data() + offsetof(Header, length), &length, sizeof(length));
        table.at(offsetof(Header, checksum)) = std::byte{checksum(table)};
        return put(table);
    }

    /// Where it will lie.
    std::uint32_t put(std::span<const std::byte> bytes) {
        constexpr std::size_t alignment = 16;
        bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment);
        const GuestPhys at = begin_ + bytes_.size();
        bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
        return static_cast<std::uint32_t>(at.value());
    }

    [[nodiscard]] std::vector<std::byte> take() && { return std::move(bytes_); }

  private:
    GuestPhys begin_;
    std::vector<std::byte> bytes_;
};

template<class T>
void append(std::vector<std::byte>& table, const T& part) {
    const auto bytes = std::as_bytes(std::span(&part, 1));
    table.insert(table.end(), bytes.begin(), bytes.end());
}

template<class... Parts>
std::vector<std::byte> table_of(const Parts&... parts) {
    std::vector<std::byte> table;
    (append(table, parts), ...);
    return table;
}

GenericAddress ports(std::uint16_t first, unsigned bytes) {
    const auto access_size = static_cast<std::uint8_t>(bytes == 4 ? 3 : bytes); // 1 byte, 2 word, 3 dword
    return {system_io, static_cast<std::uint8_t>(8 * bytes), 0, access_size, first};
}

Fadt make_fadt(std::uint32_t facs, std::uint32_t dsdt) {
    constexpr std::uint16_t no_such_state = 0xfff; // a latency above the largest that a C state may have
    Fadt fadt{};
    fadt.header = header("FACP", 5);
    fadt.facs = facs;
    fadt.dsdt = dsdt;
    fadt.sci_interrupt = sci_irq; // smi_command stays 0: there is no legacy mode to leave
    fadt.pm1a_event = acpi_event_port;
    fadt.pm1a_control = acpi_control_port;
    fadt.pm_timer = acpi_timer_port;
    fadt.pm1_event_length = acpi_event_bytes;
    fadt.pm1_control_length = acpi_control_bytes;
    fadt.pm_timer_length = acpi_timer_bytes;
    fadt.c2_latency = fadt.c3_latency = no_such_state;
    fadt.century = century_register;
    fadt.boot_architecture = legacy_devices | keyboard_controller;
    fadt.flags = wbinvd_works | c1_works | no_fixed_power_button | no_fixed_sleep_button | no_fixed_rtc_wake |
                 timer_has_32_bits | reset_register_supported;
    fadt.reset_register = ports(reset_port, 1);
    fadt.reset_value = reset_value;
    fadt.x_dsdt = dsdt; // x_facs stays 0: only one of the two may be given
    fadt.x_pm1a_event = ports(acpi_event_port, acpi_event_bytes);
    fadt.x_pm1a_event.access_size = 2; // two registers of a word each
    fadt.x_pm1a_control = ports(acpi_control_port, acpi_control_bytes);
    fadt.x_pm_timer = ports(acpi_timer_port, acpi_timer_bytes);
    return fadt;
}

std::vector<std::byte> make_madt(const AcpiConfig& config) {
    std::vector<std::byte> madt =
        table_of(MadtStart{header("APIC", 3), local_apic_base, madt_pcat_compatible});
    for (unsigned cpu = 0; cpu < config.cpus; ++cpu) {
        const auto id = static_cast<std::uint8_t>(cpu);
        append(madt, LocalApic{.processor = id, .apic = id, .flags = apic_enabled});
    }
    append(madt, IoApic{.address = io_apic_base});
    append(madt, SourceOverride{.source = timer_irq, .global_interrupt = timer_pin, .flags = conforming});
    append(madt, SourceOverride{.source = sci_irq, .global_interrupt = sci_irq, .flags = active_high_level});
    append(madt, LocalApicNmi{.processor = every_processor, .flags = conforming, .pin = 1});
    return madt;
}

} // namespace

AcpiTables make_acpi_tables(GuestPhys at, const AcpiConfig& config) {
    Writer writer(at);

    // The first, because it is aligned to 64 bytes.
    Facs facs{};
    facs.signature = text<4>("FACS");
    facs.length = sizeof(Facs);
    facs.version = 2;
    const std::uint32_t facs_at = writer.put(std::as_bytes(std::span(&facs, 1)));
    const std::uint32_t dsdt_at = writer.add(table_of(header("DSDT", 2), dsdt_code));
    const std::uint32_t fadt_at = writer.add(table_of(make_fadt(facs_at, dsdt_at)));
    const std::uint32_t madt_at = writer.add(make_madt(config));
    const std::uint32_t rsdt_at = writer.add(table_of(header("RSDT", 1), fadt_at, madt_at));
    const std::uint32_t xsdt_at =
        writer.add(table_of(header("XSDT", 1), std::uint64_t{fadt_at}, std::uint64_t{madt_at}));

    RootPointer root{};
    root.signature = text<8>("RSD PTR ");
    root.oem_id = text<6>("UMBRA");
    root.revision = 2;
    root.rsdt = rsdt_at;
    root.length = sizeof(RootPointer);
    root.xsdt = xsdt_at;
    const auto bytes = std::as_bytes(std::span(&root, 1));
    root.checksum = checksum(bytes.first(offsetof(RootPointer, length)));
    root.extended_checksum = checksum(bytes);
    return {table_of(root), std::move(writer).take()};
}

} // namespace umbra
