// LZ4 blocks in legacy frames: what Linux compresses its kernel with when it is configured for LZ4, as
// Debian's cloud kernel is (doc/lz4_Block_format.md and doc/lz4_Frame_format.md of LZ4, "Legacy frame").
// Internal to vmm/loader/. The format is small enough to be read here rather than by one more library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace umbra {

inline constexpr std::uint32_t lz4_legacy_magic = 0x184c2102;
/// What a block of a legacy frame unpacks to at most, in bytes.
inline constexpr std::size_t lz4_legacy_block = std::size_t{8} << 20;

/// Unpacks a block into `out`; how many bytes it became. Nothing if the block is damaged: if it ends within a
/// sequence, refers to what is before its output, or does not fit into `out`.
[[nodiscard]] std::optional<std::size_t> unpack_lz4_block(std::span<const std::byte> block,
                                                          std::span<std::byte> out);

} // namespace umbra
