// Reads the setup header of a bzImage.
#include "vmm/loader/setup_header.hpp"

#include "vmm/loader/file_bytes.hpp"
#include "vmm/loader/reject.hpp"

#include <algorithm>

namespace umbra {

namespace {

constexpr std::uint64_t header_begin = 0x1f1;
// A short jump over the header is at 0x200; its operand, counted from behind it, tells where the header ends.
constexpr std::uint64_t jump_operand = 0x201;
constexpr std::uint64_t sector_size = 512;
constexpr std::uint64_t default_setup_sectors = 4;

} // namespace

setup_header read_setup_header(std::span<const std::byte> file) {
    const std::uint64_t end = jump_operand + 1 + read_object<std::uint8_t>(file, jump_operand).value_or(0);
    const auto bytes = range_of(file, header_begin, end - header_begin);
    if (!bytes)
        reject("truncated bzImage: its setup header ends at {:#x}, behind the file's {:#x} bytes", end,
               file.size());
    setup_header header{};
    std::memcpy(&header, bytes->data(), std::min(bytes->size(), sizeof header));
    return header;
}

std::uint64_t protected_mode_offset(const setup_header& header) {
    const std::uint64_t sectors = header.setup_sects == 0 ? default_setup_sectors : header.setup_sects;
    return (1 + sectors) * sector_size;
}

} // namespace umbra
