// Multiboot 1: the boot information (Multiboot Specification version 0.6.96, 3.3).
#include "vmm/loader/protocols.hpp"

#include <array>

namespace umbra {

namespace {

struct [[gnu::packed]] Information {
    std::uint32_t flags = 0;
    std::uint32_t memory_lower = 0, memory_upper = 0; ///< KiB
    std::uint32_t boot_device = 0;
    std::uint32_t command_line = 0; ///< address, as are all below without a unit
    std::uint32_t module_count = 0, modules = 0;
    std::uint32_t section_count = 0, section_size = 0, sections = 0, section_names_index = 0;
    std::uint32_t memory_map_length = 0, memory_map = 0; ///< bytes; address
    std::uint32_t drives_length = 0, drives = 0;
    std::uint32_t configuration_table = 0;
    std::uint32_t boot_loader_name = 0;
    std::uint32_t apm_table = 0;
    std::uint32_t vbe_control = 0, vbe_mode_info = 0;
    std::uint16_t vbe_mode = 0, vbe_segment = 0, vbe_offset = 0, vbe_length = 0;
    std::uint64_t framebuffer = 0;
    std::uint32_t framebuffer_pitch = 0; ///< bytes
    std::uint32_t framebuffer_width = 0, framebuffer_height = 0;
    std::uint8_t framebuffer_bits = 0;
    std::uint8_t framebuffer_type = 0;
    std::array<std::uint8_t, 6> color_info{};
};
static_assert(sizeof(Information) == 116);

// Which fields are there.
constexpr std::uint32_t has_memory = 1U << 0, has_command_line = 1U << 2, has_modules = 1U << 3,
                        has_elf_sections = 1U << 5, has_memory_map = 1U << 6, has_boot_loader_name = 1U << 9,
                        has_framebuffer = 1U << 12;

struct Module {
    std::uint32_t begin = 0, end = 0;
    std::uint32_t arguments = 0; ///< address
    std::uint32_t reserved = 0;
};

struct [[gnu::packed]] MemoryMapEntry {
    std::uint32_t size = 0; ///< bytes of the rest
    std::uint64_t address = 0, length = 0;
    std::uint32_t type = 0;
};
static_assert(sizeof(MemoryMapEntry) == 24);

/// Everything that is passed lies below low_memory_end.
std::uint32_t word(GuestPhys address) {
    return static_cast<std::uint32_t>(address.value());
}

std::uint32_t word(std::size_t count) {
    return static_cast<std::uint32_t>(count);
}

void describe_sections(const LoadContext& context, GuestPhys kernel_end, Information& info) {
    if (!context.kernel.elf || context.kernel.elf->section_headers.empty())
        return;
    const SectionTable table = load_sections(*context.kernel.elf, context.file, context.plan, kernel_end);
    info.section_count = table.count;
    info.section_size = table.entry_size;
    info.sections = word(store_objects(context.plan, table.headers));
    info.section_names_index = table.names_index;
    info.flags |= has_elf_sections;
}

/// A text screen is what the machine has, whatever was wished for.
void describe_screen(Information& info) {
    info.framebuffer = text_screen.address.value();
    info.framebuffer_pitch = text_screen.pitch;
    info.framebuffer_width = text_screen.columns;
    info.framebuffer_height = text_screen.lines;
    info.framebuffer_bits = text_screen.bits;
    info.framebuffer_type = multiboot_ega_text;
    info.flags |= has_framebuffer;
}

std::string command_line(const LoadRequest& request) {
    std::string line(request.name);
    if (!line.empty() && !request.command_line.empty())
        line += ' ';
    return line += request.command_line;
}

} // namespace

LoadedKernel load_multiboot1(const LoadContext& context) {
    MemoryPlan& plan = context.plan;
    const MultibootHeader& header = *context.kernel.multiboot1;
    const KernelParts parts = header.placement ? parts_of(*header.placement, context.file)
                                               : parts_of(*context.kernel.elf, context.file);
    const GuestPhys entry =
        header.placement ? header.placement->entry : translated_entry(parts, context.kernel.elf->entry);
    check_entry(parts, entry);
    const GuestPhys kernel_end = place_kernel(parts, plan).end;

    Information info;
    info.flags = has_memory | has_command_line | has_modules | has_memory_map | has_boot_loader_name;
    if (!header.placement)
        describe_sections(context, kernel_end, info);
    std::vector<Module> modules;
    for (const PlacedModule& module : place_modules(context, kernel_end))
        modules.push_back(
            {word(module.begin), word(module.end), word(store_text(plan, module.arguments)), 0});
    info.module_count = word(modules.size());
    if (!modules.empty())
        info.modules = word(store_objects(plan, modules));

    const BasicMemory memory = basic_memory(plan);
    info.memory_lower = memory.lower;
    info.memory_upper = memory.upper;
    std::vector<MemoryMapEntry> map;
    for (const boot_e820_entry& range : plan.memory_map())
        map.push_back({sizeof(MemoryMapEntry) - sizeof(std::uint32_t), range.addr, range.size, range.type});
    info.memory_map = word(store_objects(plan, map));
    info.memory_map_length = word(map.size() * sizeof(MemoryMapEntry));
    info.command_line = word(store_text(plan, command_line(context.request)));
    info.boot_loader_name = word(store_text(plan, boot_loader_name));
    if ((header.flags & MultibootHeader::wants_video) != 0)
        describe_screen(info);

    constexpr std::uint32_t magic = 0x2bad'b002;
    LoadedKernel kernel = start_in_protected_mode(context, entry);
    kernel.rax = magic;
    kernel.rbx = store_objects(plan, std::vector{info}).value();
    return kernel;
}

} // namespace umbra
