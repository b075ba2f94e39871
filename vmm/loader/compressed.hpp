// Compressed kernel files, and the compressed kernel inside of a bzImage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace umbra {

/// How a file or a bzImage's payload is compressed: all that Linux's build offers for the latter.
enum class Compression { none, gzip, xz, zstd, bzip2, lzma, lzo, lz4 };

/// As the format is called: "gzip".
[[nodiscard]] std::string_view name(Compression compression);

/// Tells by the magic number at the start; `none` if there is none that is known.
[[nodiscard]] Compression compression_of(std::span<const std::byte> file);

/// Whether unpack() takes it: gzip, xz, zstd and lz4.
[[nodiscard]] bool can_unpack(Compression compression);

/// Enough for every kernel, little enough for every host: what unpack() is to be bounded by.
inline constexpr std::uint64_t unpacked_kernel_limit = std::uint64_t{1} << 30;

/// Unpacks a gzip (RFC 1952), xz (".xz file format"), zstd (RFC 8878) or lz4 file (legacy frames only, which
/// is what Linux uses): all of its members, streams or frames, one after the other, with the padding that the
/// format allows behind them (zeros for gzip as gzip itself takes them; multiples of 4 zeros for xz;
/// skippable frames for zstd). lz4's legacy frames have no end mark and no check sum: what is cut between two
/// blocks is taken for whole. Throws StartupError(bad_usage) if the file is damaged, truncated, followed by
/// something else or compressed in another way, if it unpacks to more than `limit` bytes, or if its decoder
/// would take more than 256 MiB for itself.
[[nodiscard]] std::vector<std::byte> unpack(std::span<const std::byte> file, std::uint64_t limit);

/// The payload of a bzImage of boot protocol 2.08 or later: setup_header.payload_offset and payload_length
/// (Documentation/arch/x86/boot.rst). Throws StartupError(bad_usage) if there is none in the file.
[[nodiscard]] std::span<const std::byte> bzimage_payload(std::span<const std::byte> file);

/// What a bzimage_payload() unpacks to: the ELF file vmlinux without symbols, for most configurations
/// followed by its relocations. The payload's last 4 bytes are the unpacked size
/// (arch/x86/boot/compressed/mkpiggy.c: those of gzip are its own trailer, other formats have them appended).
/// Throws as unpack() does, and if that size is wrong or the result no ELF.
[[nodiscard]] std::vector<std::byte> unpack_payload(std::span<const std::byte> payload, std::uint64_t limit);

} // namespace umbra
