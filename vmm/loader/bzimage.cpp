// Linux bzImages, by the 64-bit boot protocol (Documentation/arch/x86/boot.rst).
#include "vmm/loader/kernel_image.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/loader/reject.hpp"

#include <algorithm>
#include <cstring>

namespace umbra {

namespace {

constexpr std::size_t header_offset = 0x1f1;
constexpr std::size_t header_length_offset =
    0x201; // the operand of a short jump over the header, from here + 1
constexpr std::size_t boot_flag_offset = 0x1fe;
constexpr std::size_t magic_offset = 0x202;
constexpr std::size_t minimum_header_end = 0x264; // behind init_size, the last field that is used here

constexpr std::uint64_t sector_size = 512;
constexpr unsigned default_setup_sectors = 4;
constexpr std::uint64_t paragraph_size = 16; // the unit of syssize
constexpr std::uint64_t long_mode_entry_offset = 0x200;
constexpr GuestPhys high_load_address{0x100000};

template<class T>
T read_at(std::span<const std::byte> file, std::size_t offset) {
    T value{};
    std::memcpy(&value, file.subspan(offset, sizeof value).data(), sizeof value);
    return value;
}

/// The setup header as long as this kernel's version of it is; the rest stays 0.
setup_header read_header(std::span<const std::byte> file) {
    const std::size_t end = header_length_offset + 1 + read_at<std::uint8_t>(file, header_length_offset);
    if (end < minimum_header_end)
        reject("not supported: the bzImage's setup header ends at {:#x}, too short for a 64-bit kernel", end);
    if (end > file.size())
        reject("truncated bzImage: its setup header ends at {:#x}, behind the file's {:#x} bytes", end,
               file.size());
    setup_header header{};
    std::memcpy(&header, file.data() + header_offset, std::min(end - header_offset, sizeof header));
    return header;
}

void check_kind(const setup_header& header) {
    if (header.version < first_64_bit_version)
        reject("not supported: boot protocol {}.{:02}; a 64-bit entry needs 2.12 or later",
               header.version >> 8, header.version & 0xff);
    if ((header.loadflags & LOADED_HIGH) == 0)
        reject("not supported: a zImage, which is loaded below 1 MB");
    if ((header.xloadflags & XLF_KERNEL_64) == 0)
        reject("not supported: a bzImage without a 64-bit entry (a 32-bit kernel)");
}

/// What is loaded: the file behind the real-mode code, as far as the header says that it reaches. Signatures
/// follow.
std::span<const std::byte> protected_mode_part(std::span<const std::byte> file, const setup_header& header) {
    const unsigned sectors = header.setup_sects == 0 ? default_setup_sectors : header.setup_sects;
    const std::uint64_t start = (1 + std::uint64_t{sectors}) * sector_size;
    const std::uint64_t size = header.syssize * paragraph_size;
    if (size <= long_mode_entry_offset)
        reject("damaged bzImage: {} bytes of code do not reach its 64-bit entry", size);
    // The last paragraph need not be complete.
    if (start >= file.size() || size > file.size() - start + (paragraph_size - 1))
        reject("truncated bzImage: its header tells of {} bytes, the file has {}", start + size, file.size());
    return file.subspan(start, std::min<std::uint64_t>(size, file.size() - start));
}

} // namespace

bool is_bzimage(std::span<const std::byte> file) {
    return file.size() >= minimum_header_end &&
           read_at<std::uint16_t>(file, boot_flag_offset) == boot_sector_magic &&
           read_at<std::uint32_t>(file, magic_offset) == setup_header_magic;
}

KernelImage load_bzimage(std::span<const std::byte> file, const GuestMemory& memory) {
    setup_header header = read_header(file);
    check_kind(header);
    const auto code = protected_mode_part(file, header);

    // Relocatable kernels are loaded there as well: Linux does not unpack itself below its preferred address,
    // so a lower one would save no memory.
    const GuestPhys load = header.pref_address == 0 ? high_load_address : GuestPhys{header.pref_address};
    const std::uint64_t size = std::max<std::uint64_t>(header.init_size, code.size());
    if (load < high_load_address || load >= low_memory_end || size > low_memory_end - load)
        reject("not supported: a bzImage that wants {:#x} bytes at {}; it must lie between {} and {}", size,
               load, high_load_address, low_memory_end);
    if (!is_usable_ram(memory, load, size))
        reject("the kernel does not fit into guest memory: it needs at least {} MiB",
               mebibytes_up_to(load + size));
    const auto target = memory.range(load, size);
    std::copy(code.begin(), code.end(), target.begin());

    header.code32_start = static_cast<std::uint32_t>(load.value());
    return {.protocol = BootProtocol::linux64,
            .entry = GuestVirt{load.value() + long_mode_entry_offset},
            .end = load + size,
            .header = header,
            .command_line_limit = std::min<std::uint64_t>(header.cmdline_size, command_line_limit),
            .initrd_limit = GuestPhys{std::uint64_t{header.initrd_addr_max} + 1}};
}

} // namespace umbra
