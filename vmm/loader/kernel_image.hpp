// What the loaders of single file formats give to load_kernel(). Internal to vmm/loader/.
#pragma once

#include "vmm/loader/loader.hpp"

#include <cstddef>
#include <cstdint>
#include <span>

namespace umbra {

// Fields of Linux's setup header that are the same in every file and every boot_params.
inline constexpr std::uint16_t boot_sector_magic = 0xaa55;
inline constexpr std::uint32_t setup_header_magic = 0x53726448; // "HdrS"
inline constexpr std::uint16_t first_64_bit_version =
    0x020c; // 2.12: the first boot protocol with a 64-bit entry

/// A kernel whose bytes are in guest RAM, before boot data and initrd are.
struct KernelImage {
    BootProtocol protocol{};
    GuestVirt entry;
    GuestPhys end;                        ///< the first byte behind what the kernel occupies in low memory
    setup_header header{};                ///< goes to boot_params
    std::uint64_t command_line_limit = 0; ///< bytes without the NUL
    GuestPhys initrd_limit;               ///< the initrd must end here or below
};

/// Copies the PT_LOAD segments of a 64-bit ELF executable to their physical addresses (System V ABI, "Program
/// Loading", and its AMD64 supplement). Throws StartupError(bad_usage) if it cannot be loaded.
[[nodiscard]] KernelImage load_elf(std::span<const std::byte> file, const GuestMemory& memory);
[[nodiscard]] bool is_elf(std::span<const std::byte> file);

/// Copies the protected-mode part of a bzImage to the address it prefers (Documentation/arch/x86/boot.rst).
/// Throws StartupError(bad_usage) if it cannot be loaded.
[[nodiscard]] KernelImage load_bzimage(std::span<const std::byte> file, const GuestMemory& memory);
[[nodiscard]] bool is_bzimage(std::span<const std::byte> file);

} // namespace umbra
