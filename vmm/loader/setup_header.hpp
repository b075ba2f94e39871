// The setup header of a Linux bzImage (Documentation/arch/x86/boot.rst). Internal to vmm/loader/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include <asm/bootparam.h>

namespace umbra {

// Fields that are the same in every file and every boot_params.
inline constexpr std::uint16_t boot_sector_magic = 0xaa55;
inline constexpr std::uint32_t setup_header_magic = 0x53726448; // "HdrS"

/// The first boot protocol with a 64-bit entry, 2.12.
inline constexpr std::uint16_t first_64_bit_version = 0x020c;
/// The first boot protocol whose setup header tells of its payload.
inline constexpr std::uint16_t first_version_with_payload = 0x0208;
/// Of the 64-bit entry from the start of the protected-mode code ("64-bit Boot Protocol"); bytes.
inline constexpr std::uint64_t long_mode_entry = 0x200;

[[nodiscard]] bool is_bzimage(std::span<const std::byte> file);

/// The first boot protocol whose syssize is wide enough for every kernel.
inline constexpr std::uint16_t first_version_with_wide_size = 0x0204;
/// The first boot protocol that tells of an address to prefer and of the memory that the kernel takes there.
inline constexpr std::uint16_t first_version_with_preferred_address = 0x020a;

/// The setup header with the fields that its boot protocol has, as far as it reaches. Whatever a file has in
/// the place of others is none of it: they are what kernels without them stand for (a command line of 255
/// bytes, an initrd up to 0x37ffffff), otherwise 0. Throws StartupError(bad_usage) if the file, which
/// is_bzimage() must have taken for one, ends before the header does, or if that is too short for its
/// version.
[[nodiscard]] setup_header read_setup_header(std::span<const std::byte> file);

/// Where in the file the protected-mode code begins, in bytes.
[[nodiscard]] std::uint64_t protected_mode_offset(const setup_header& header);

} // namespace umbra
