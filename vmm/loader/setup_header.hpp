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

/// The setup header as far as this kernel's version of it reaches; what is behind that is 0. Throws
/// StartupError(bad_usage) if the file, which is_bzimage() must have taken for one, ends before the header
/// does, or if that is too short for its version.
[[nodiscard]] setup_header read_setup_header(std::span<const std::byte> file);

/// Where in the file the protected-mode code begins, in bytes.
[[nodiscard]] std::uint64_t protected_mode_offset(const setup_header& header);

} // namespace umbra
