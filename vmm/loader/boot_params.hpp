// What umbra leaves in guest RAM for a kernel to start from: boot_params, command line, page tables, GDT.
//
//   0x500           GDT: null, null, 0x10 64-bit code, 0x18 data
//   below 0x7000    the first stack
//   0x7000          struct boot_params, Linux's "zero page" (Documentation/arch/x86/boot.rst)
//   0x9000-0xefff   page tables: PML4, PDPT and four PDs map the first 4 GB to themselves by 2 MB pages
//   0x20000         command line, NUL-terminated
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include <asm/bootparam.h>

namespace umbra {

/// No segment of a kernel may lie in [boot_data_begin, boot_data_end).
inline constexpr GuestPhys boot_data_begin{0x500};
inline constexpr GuestPhys boot_data_end{0x30000};

inline constexpr GuestPhys boot_gdt{0x500};
inline constexpr GuestPhys boot_params_address{0x7000};
inline constexpr GuestPhys boot_page_tables{0x9000};
inline constexpr GuestPhys boot_command_line{0x20000};
inline constexpr GuestVirt boot_stack_top{0x7000};
/// What the identity map covers: the first 4 GB.
inline constexpr GuestPhys identity_map_end{std::uint64_t{4} << 30};

/// The longest command line, in bytes without its NUL.
inline constexpr std::uint64_t command_line_limit = boot_data_end - boot_command_line - 1;

/// Selectors of the boot GDT and its entries (Intel SDM vol. 3A §3.4.5): code is 64-bit, DPL 0; data is flat,
/// writable, DPL 0; both accessed, as on a CPU that has loaded them.
inline constexpr std::uint16_t boot_code_selector = 0x10;
inline constexpr std::uint16_t boot_data_selector = 0x18;
inline constexpr std::array<std::uint64_t, 4> boot_gdt_entries{0, 0, 0x00af'9b00'0000'ffff,
                                                               0x00cf'9300'0000'ffff};

/// A block of guest-physical memory; `size` 0 means none.
struct MemoryBlock {
    GuestPhys base;
    std::uint64_t size = 0; ///< bytes
};

/// The memory map as a PC BIOS would report it: RAM without the legacy areas below 1 MB.
[[nodiscard]] std::vector<boot_e820_entry> e820_map(const GuestMemory& memory);

/// Whether all of [start, start + size) is RAM that the memory map lets a kernel use.
[[nodiscard]] bool is_usable_ram(const GuestMemory& memory, GuestPhys start, std::uint64_t size);

/// Writes everything named at the top. `header` is the setup header of a bzImage or an empty one; the fields
/// that a boot loader fills are filled here. `memory` must have RAM from 0 to 1 MB at least, the command line
/// fit command_line_limit.
void write_boot_data(const GuestMemory& memory, const setup_header& header, std::string_view command_line,
                     MemoryBlock initrd);

} // namespace umbra
