// Makes the MultiProcessor tables.
#include "vmm/loader/mp_table.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

namespace umbra {
namespace {

constexpr std::uint32_t local_apic_base = 0xfee0'0000;
constexpr std::uint32_t io_apic_base = 0xfec0'0000;
constexpr std::uint8_t apic_version = 0x14; // of KVM's local APICs
constexpr std::uint8_t io_apic_version = 0x11;
constexpr std::uint8_t specification_revision = 4; // 1.4

struct [[gnu::packed]] FloatingPointer { // 4.1
    std::array<char, 4> signature;
    std::uint32_t table;
    std::uint8_t length; ///< in 16 bytes
    std::uint8_t revision;
    std::uint8_t checksum;
    std::array<std::uint8_t, 5> features; ///< 0: there is a table; virtual wire mode
};
static_assert(sizeof(FloatingPointer) == 16);

struct [[gnu::packed]] Header { // 4.2
    std::array<char, 4> signature;
    std::uint16_t length;
    std::uint8_t revision;
    std::uint8_t checksum;
    std::array<char, 8> oem_id;
    std::array<char, 12> product_id;
    std::uint32_t oem_table;
    std::uint16_t oem_table_size;
    std::uint16_t entries;
    std::uint32_t local_apic;
    std::uint16_t extended_length;
    std::uint8_t extended_checksum, reserved;
};
static_assert(sizeof(Header) == 44);

struct [[gnu::packed]] Processor { // 4.3.1
    std::uint8_t type = 0, apic = 0, version = apic_version, flags = 0;
    std::uint32_t signature = 0, features = 0;
    std::array<std::uint32_t, 2> reserved{};
};
static_assert(sizeof(Processor) == 20);

struct [[gnu::packed]] Bus { // 4.3.2
    std::uint8_t type = 1, id = 0;
    std::array<char, 6> name{};
};

struct [[gnu::packed]] IoApic { // 4.3.3
    std::uint8_t type = 2, id = 0, version = io_apic_version, flags = 0;
    std::uint32_t address = 0;
};

struct [[gnu::packed]] Interrupt { // 4.3.4; with type 4 a local interrupt, 4.3.5
    std::uint8_t type, kind;
    std::uint16_t flags;
    std::uint8_t bus, irq, apic, pin;
};
static_assert(sizeof(Bus) == 8 && sizeof(IoApic) == 8 && sizeof(Interrupt) == 8);

constexpr std::uint8_t processor_enabled = 1, processor_boots = 2; // Processor::flags
constexpr std::uint8_t io_apic_enabled = 1;                        // IoApic::flags
constexpr std::uint8_t io_interrupt = 3, local_interrupt = 4;      // Interrupt::type
constexpr std::uint8_t kind_vectored = 0, kind_nmi = 1, kind_external = 3;
constexpr std::uint16_t active_high_level = 0x0d; // Interrupt::flags; 0: as the bus has it
constexpr std::uint8_t every_apic = 0xff;

constexpr std::uint8_t timer_pin = 2; // of the I/O APIC: Vm::create_interrupt_controllers
constexpr std::uint8_t timer_irq = 0, cascade_irq = 2, sci_irq = 9, isa_irqs = 16;

// What each processor is, for kernels without CPUID: a family 6 with an FPU and a local APIC.
constexpr std::uint32_t processor_signature = 0x600;
constexpr std::uint32_t processor_features = 0x201;

/// What makes the sum of `bytes` 0, where its place in them is still 0.
std::uint8_t checksum(std::span<const std::byte> bytes) {
    const unsigned sum = std::accumulate(bytes.begin(), bytes.end(), 0U, [](unsigned total, std::byte byte) {
        return total + std::to_integer<unsigned>(byte);
    });
    return static_cast<std::uint8_t>(0U - sum);
}

/// The configuration table, entry by entry.
class Table {
  public:
    Table() : bytes_(sizeof(Header)) {}

    template<class Entry>
    void add(const Entry& entry) {
        const auto bytes = std::as_bytes(std::span(&entry, 1));
        bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
        ++entries_;
    }

    [[nodiscard]] std::vector<std::byte> finish() && {
        const Header header{.signature = {'P', 'C', 'M', 'P'},
                            .length = static_cast<std::uint16_t>(bytes_.size()),
                            .revision = specification_revision,
                            .checksum = 0,
                            .oem_id = {'U', 'M', 'B', 'R', 'A', ' ', ' ', ' '},
                            .product_id = {'U', 'M', 'B', 'R', 'A', 'P', 'C', ' ', ' ', ' ', ' ', ' '},
                            .oem_table = 0,
                            .oem_table_size = 0,
                            .entries = entries_,
                            .local_apic = local_apic_base,
                            .extended_length = 0,
                            .extended_checksum = 0,
                            .reserved = 0};
        std::memcpy(bytes_.data(), &header, sizeof(header));
        bytes_.at(offsetof(Header, checksum)) = std::byte{checksum(bytes_)};
        return std::move(bytes_);
    }

  private:
    std::vector<std::byte> bytes_;
    std::uint16_t entries_ = 0;
};

} // namespace

std::vector<std::byte> make_mp_table(GuestPhys at, const MpConfig& config) {
    Table table;
    for (unsigned cpu = 0; cpu < config.cpus; ++cpu)
        table.add(Processor{
            .apic = static_cast<std::uint8_t>(cpu),
            .flags = static_cast<std::uint8_t>(processor_enabled | (cpu == 0 ? processor_boots : 0U)),
            .signature = processor_signature,
            .features = processor_features,
            .reserved = {}});
    constexpr std::uint8_t isa = 0;
    constexpr std::uint8_t io_apic = 0;
    table.add(Bus{.id = isa, .name = {'I', 'S', 'A', ' ', ' ', ' '}});
    table.add(IoApic{.id = io_apic, .flags = io_apic_enabled, .address = io_apic_base});
    for (std::uint8_t irq = 0; irq < isa_irqs; ++irq) {
        if (irq == cascade_irq) // it interrupts nobody but the other 8259
            continue;
        const auto pin = static_cast<std::uint8_t>(irq == timer_irq ? timer_pin : irq);
        const std::uint16_t flags = irq == sci_irq ? active_high_level : 0;
        table.add(Interrupt{io_interrupt, kind_vectored, flags, isa, irq, io_apic, pin});
    }
    table.add(Interrupt{local_interrupt, kind_external, 0, isa, 0, every_apic, 0});
    table.add(Interrupt{local_interrupt, kind_nmi, 0, isa, 0, every_apic, 1});

    const GuestPhys table_at = at + sizeof(FloatingPointer);
    FloatingPointer pointer{.signature = {'_', 'M', 'P', '_'},
                            .table = static_cast<std::uint32_t>(table_at.value()),
                            .length = 1,
                            .revision = specification_revision,
                            .checksum = 0,
                            .features = {}};
    const auto bytes = std::as_bytes(std::span(&pointer, 1));
    pointer.checksum = checksum(bytes);
    std::vector<std::byte> both(bytes.begin(), bytes.end());
    const std::vector<std::byte> rest = std::move(table).finish();
    both.insert(both.end(), rest.begin(), rest.end());
    return both;
}

} // namespace umbra
