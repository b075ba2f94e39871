// Writes the boot data, field by field.
#include "vmm/loader/boot_params.hpp"

#include "vmm/loader/reject.hpp"

#include <algorithm>

namespace umbra {

namespace {

constexpr std::uint64_t table_entries = 512;
constexpr std::uint64_t large_page_size = std::uint64_t{2} << 20;
// Present and writable; supervisor and executable by the other bits' being 0 (Intel SDM vol. 3A §4.5).
constexpr std::uint64_t table_entry_flags = 0x3;
constexpr std::uint64_t large_page_flags = 0x83;

constexpr std::uint8_t unknown_boot_loader =
    0xff; // hdr.type_of_loader of a loader without a registered number

template<class T>
void put(const GuestMemory& memory, GuestPhys at, const T& object) {
    if (!memory.write(at, object))
        reject("guest memory is too small for the boot data at {}", at);
}

void write_page_tables(const GuestMemory& memory, GuestPhys root_address) {
    using Table = std::array<std::uint64_t, table_entries>;
    constexpr std::uint64_t directories = identity_map_end.value() / (table_entries * large_page_size);
    const GuestPhys directory_pointers = root_address + page_size;
    const GuestPhys first_directory = directory_pointers + page_size;

    Table root{};
    root[0] = directory_pointers.value() | table_entry_flags;
    put(memory, root_address, root);

    Table pointers{};
    for (std::uint64_t i = 0; i < directories; ++i) {
        const GuestPhys directory = first_directory + i * page_size;
        pointers.at(i) = directory.value() | table_entry_flags;
        Table entries{};
        for (std::uint64_t j = 0; j < table_entries; ++j)
            entries.at(j) = (i * table_entries + j) * large_page_size | large_page_flags;
        put(memory, directory, entries);
    }
    put(memory, directory_pointers, pointers);
}

screen_info vga_text_screen() {
    screen_info screen{};
    screen.orig_video_mode = 3; // 80x25 text with 16 colours, at 0xb8000
    screen.orig_video_cols = 80;
    screen.orig_video_lines = 25;
    screen.orig_video_isVGA = 1;
    screen.orig_video_points = 16;
    return screen;
}

} // namespace

std::vector<boot_e820_entry> e820_map(const GuestMemory& memory) {
    std::vector<boot_e820_entry> map;
    const auto add = [&map](GuestPhys start, GuestPhys end, std::uint32_t type) {
        map.push_back({start.value(), end - start, type});
    };
    for (const GuestMemory::Region& region : memory.regions()) {
        const GuestPhys end = region.base + region.bytes.size();
        if (region.base != GuestPhys{0} || end <= extended_memory) {
            add(region.base, end, e820_ram);
            continue;
        }
        add(region.base, extended_bios_data, e820_ram);
        add(extended_bios_data, vga_memory_begin, e820_reserved);
        add(bios, extended_memory, e820_reserved);
        add(extended_memory, end, e820_ram);
    }
    return map;
}

std::vector<std::uint64_t> boot_gdt_entries(StartMode mode, std::uint16_t code_selector) {
    constexpr std::uint64_t code_64 = 0x00af'9b00'0000'ffff, code_32 = 0x00cf'9b00'0000'ffff;
    constexpr std::uint64_t data = 0x00cf'9300'0000'ffff;
    std::vector<std::uint64_t> entries(code_selector / descriptor_size);
    entries.push_back(mode == StartMode::long_mode ? code_64 : code_32);
    entries.push_back(data);
    return entries;
}

void write_boot_data(const GuestMemory& memory, const BootArea& area, const BootData& data) {
    write_page_tables(memory, area.page_tables());

    const std::string_view line = data.command_line;
    const auto text = memory.range(area.command_line(), line.size() + 1);
    if (text.empty() || line.size() > command_line_limit)
        reject("the command line has {} bytes; there is room for {}", line.size(), command_line_limit);
    std::ranges::copy(std::as_bytes(std::span(line)), text.begin());
    text.back() = std::byte{0};

    boot_params params{};
    params.screen_info = vga_text_screen();
    params.acpi_rsdp_addr = data.rsdp.value();
    params.hdr = data.header;
    params.hdr.type_of_loader = unknown_boot_loader;
    params.hdr.cmd_line_ptr = static_cast<std::uint32_t>(area.command_line().value());
    params.hdr.ramdisk_image = static_cast<std::uint32_t>(data.initrd.base.value());
    params.hdr.ramdisk_size = static_cast<std::uint32_t>(data.initrd.size);
    params.ext_ramdisk_image = static_cast<std::uint32_t>(data.initrd.base.value() >> 32);
    params.ext_ramdisk_size = static_cast<std::uint32_t>(data.initrd.size >> 32);

    const auto map = data.memory_map;
    if (map.size() > E820_MAX_ENTRIES_ZEROPAGE)
        reject("guest memory has too many regions for the memory map");
    std::copy(map.begin(), map.end(), params.e820_table);
    params.e820_entries = static_cast<std::uint8_t>(map.size());
    put(memory, area.boot_params(), params);
}

} // namespace umbra
