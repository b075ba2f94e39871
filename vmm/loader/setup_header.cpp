// Reads the setup header of a bzImage.
#include "vmm/loader/setup_header.hpp"

#include "vmm/loader/file_bytes.hpp"
#include "vmm/loader/reject.hpp"

#include <algorithm>
#include <array>

namespace umbra {

namespace {

constexpr std::uint64_t header_begin = 0x1f1;
// A short jump over the header is at 0x200; its operand, counted from behind it, tells where the header ends.
constexpr std::uint64_t jump_operand = 0x201;
constexpr std::uint64_t boot_flag_offset = 0x1fe;
constexpr std::uint64_t magic_offset = 0x202;
constexpr std::uint64_t sector_size = 512;
constexpr std::uint64_t default_setup_sectors = 4;

/// Where the fields end that a boot protocol has ("The Real-Mode Kernel Header"), if it has more than those
/// before.
struct Growth {
    std::uint16_t version;
    std::uint64_t end;
};
constexpr std::array growths{Growth{0x0200, 0x224}, Growth{0x0201, 0x226}, Growth{0x0202, 0x22c},
                             Growth{0x0203, 0x230}, Growth{0x0205, 0x235}, Growth{0x0206, 0x23c},
                             Growth{0x0207, 0x248}, Growth{0x0208, 0x250}, Growth{0x0209, 0x258},
                             Growth{0x020a, 0x264}, Growth{0x020b, 0x268}, Growth{0x020f, 0x26c}};

constexpr std::uint16_t with_initrd_limit = 0x0203, with_command_line_size = 0x0206,
                        with_minimum_alignment = first_version_with_preferred_address;

/// Takes away what is in the place of fields that came later, and says what kernels without them stand for.
void keep_to_version(setup_header& header) {
    std::uint64_t end = growths.front().end;
    for (const Growth& growth : growths)
        if (growth.version <= header.version)
            end = growth.end;
    const auto bytes = std::as_writable_bytes(std::span(&header, 1));
    std::ranges::fill(bytes.subspan(std::min<std::size_t>(end - header_begin, bytes.size())), std::byte{0});
    // These were put into gaps.
    if (header.version < with_minimum_alignment)
        header.min_alignment = 0;
    if (header.version < first_64_bit_version)
        header.xloadflags = 0;
    if (header.version < first_version_with_wide_size)
        header.syssize &= 0xffff;
    if (header.version < with_initrd_limit)
        header.initrd_addr_max = 0x37ff'ffff;
    if (header.version < with_command_line_size)
        header.cmdline_size = 255;
}

/// Where the fields end that a boot protocol has and umbra reads.
std::uint64_t least_end(std::uint16_t version) {
    if (version >= first_version_with_preferred_address)
        return 0x264;
    if (version >= first_version_with_payload)
        return 0x250;
    return version >= with_command_line_size ? 0x23c : 0x22c;
}

} // namespace

bool is_bzimage(std::span<const std::byte> file) {
    return read_object<std::uint16_t>(file, boot_flag_offset) == boot_sector_magic &&
           read_object<std::uint32_t>(file, magic_offset) == setup_header_magic;
}

setup_header read_setup_header(std::span<const std::byte> file) {
    const std::uint64_t end = jump_operand + 1 + read_object<std::uint8_t>(file, jump_operand).value_or(0);
    const auto bytes = range_of(file, header_begin, end - header_begin);
    if (!bytes)
        reject("truncated bzImage: its setup header ends at {:#x}, behind the file's {:#x} bytes", end,
               file.size());
    setup_header header{};
    std::memcpy(&header, bytes->data(), std::min(bytes->size(), sizeof header));
    if (end < least_end(header.version))
        reject("damaged bzImage: its setup header ends at {:#x}, too short for boot protocol {}.{:02}", end,
               header.version >> 8, header.version & 0xff);
    keep_to_version(header);
    return header;
}

std::uint64_t protected_mode_offset(const setup_header& header) {
    const std::uint64_t sectors = header.setup_sects == 0 ? default_setup_sectors : header.setup_sects;
    return (1 + sectors) * sector_size;
}

} // namespace umbra
