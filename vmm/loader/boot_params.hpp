// What umbra leaves in guest RAM for a kernel to start from: boot_params, command line, page tables, GDT.
//
// All of it lies in one area, at the same offsets from its base. The base is 0 unless the kernel wants that
// memory for itself.
//
//   0x500           GDT
//   below 0x7000    the first stack
//   0x7000          struct boot_params, Linux's "zero page" (Documentation/arch/x86/boot.rst)
//   0x9000-0xefff   page tables: PML4, PDPT and four PDs map the first 4 GB to themselves by 2 MB pages
//   0x20000         command line, NUL-terminated
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include <asm/bootparam.h>

namespace umbra {

struct BootArea {
    static constexpr std::uint64_t begin = 0x500, size = 0x30000; ///< bytes from the base

    GuestPhys base; ///< page aligned

    [[nodiscard]] constexpr GuestPhys gdt() const { return base + begin; }
    [[nodiscard]] constexpr GuestVirt stack_top() const { return GuestVirt{base.value() + 0x7000}; }
    [[nodiscard]] constexpr GuestPhys boot_params() const { return base + 0x7000; }
    [[nodiscard]] constexpr GuestPhys page_tables() const { return base + 0x9000; }
    [[nodiscard]] constexpr GuestPhys command_line() const { return base + 0x20000; }
    [[nodiscard]] constexpr GuestPhys end() const { return base + size; }
};

// A PC's areas below 1 MB: the extended BIOS data area ends base memory; then the VGA's memory, and firmware.
// All but the VGA's is RAM.
inline constexpr GuestPhys extended_bios_data{0x9fc00};
inline constexpr GuestPhys vga_memory_begin{0xa0000};
inline constexpr GuestPhys vga_memory_end{0xc0000};
inline constexpr GuestPhys bios{0xf0000};
inline constexpr GuestPhys extended_memory{0x100000};

/// What the identity map covers: the first 4 GB.
inline constexpr GuestPhys identity_map_end{std::uint64_t{4} << 30};

/// The longest command line, in bytes without its NUL.
inline constexpr std::uint64_t command_line_limit = BootArea{}.end() - BootArea{}.command_line() - 1;

/// How the first vCPU is set up: 64-bit mode on the identity map, or 32-bit protected mode without paging.
enum class StartMode { long_mode, protected_mode };

/// The code selectors of boot GDTs: what Linux's boot protocol asks for, and what QEMU gives to kernels whose
/// protocol leaves it open. The data descriptor is the next one.
inline constexpr std::uint16_t linux_code_selector = 0x10;
inline constexpr std::uint16_t multiboot_code_selector = 0x08;
inline constexpr std::uint16_t descriptor_size = 8;

/// The boot GDT (Intel SDM vol. 3A §3.4.5): code of the mode's size, and behind it data that is writable;
/// both flat, DPL 0, and accessed, as on a CPU that has loaded them. All other descriptors are null.
[[nodiscard]] std::vector<std::uint64_t> boot_gdt_entries(StartMode mode, std::uint16_t code_selector);

/// A block of guest-physical memory; `size` 0 means none.
struct MemoryBlock {
    GuestPhys base;
    std::uint64_t size = 0; ///< bytes
};

// Memory types of the memory map (ACPI specification, "Query System Address Map").
inline constexpr std::uint32_t e820_ram = 1;
inline constexpr std::uint32_t e820_reserved = 2;

/// The memory map as a PC BIOS would report it: RAM without the legacy areas below 1 MB.
[[nodiscard]] std::vector<boot_e820_entry> e820_map(const GuestMemory& memory);

/// What the kernel is told in boot_params.
struct BootData {
    setup_header header{}; ///< of the bzImage, or an empty one; what a boot loader fills is filled here
    std::string_view command_line; ///< at most command_line_limit bytes
    MemoryBlock initrd;
    GuestPhys rsdp; ///< the ACPI root pointer
    std::span<const boot_e820_entry> memory_map;
};

/// Writes boot_params, command line and page tables to `area`, which must lie in RAM, as must all below 1 MB.
void write_boot_data(const GuestMemory& memory, const BootArea& area, const BootData& data);

} // namespace umbra
