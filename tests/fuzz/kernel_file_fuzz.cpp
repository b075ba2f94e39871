// Fuzzes the reading of kernel files (vmm/loader/kernel_file.hpp), what unpacks them
// (vmm/loader/compressed.hpp) and what loads them by each protocol (vmm/loader/loader.hpp). Whatever a file
// says, what is offered must lie in it, what is loaded must lie in memory beside what it is told, and nothing
// may leave but StartupError.
//
// The first byte says how the rest is made a file: as it is; or, because hardly any random bytes sum up to a
// header, with the magic numbers and check sums of headers put in.
#include "tests/fuzz/harness.hpp"
#include "vmm/error.hpp"
#include "vmm/loader/kernel_file.hpp"
#include "vmm/loader/loader.hpp"
#include "vmm/loader/lz4.hpp"
#include "vmm/loader/memory_size.hpp"

#include <cstring>
#include <string>

#include <elf.h>

namespace umbra::fuzz {
namespace {

using Bytes = std::span<const std::byte>;

void put(std::vector<std::byte>& file, std::size_t at, const void* from, std::size_t size) {
    if (at <= file.size() && size <= file.size() - at)
        std::memcpy(file.data() + at, from, size);
}

void put_word(std::vector<std::byte>& file, std::size_t at, std::uint32_t word) {
    put(file, at, &word, sizeof word);
}

std::uint32_t word(Bytes file, std::size_t at) {
    std::uint32_t value = 0;
    if (at <= file.size() && sizeof value <= file.size() - at)
        std::memcpy(&value, file.data() + at, sizeof value);
    return value;
}

void make_elf(std::vector<std::byte>& file, unsigned char file_class) {
    const std::array<unsigned char, 7> identity{ELFMAG0,
                                                static_cast<unsigned char>(ELFMAG1),
                                                static_cast<unsigned char>(ELFMAG2),
                                                static_cast<unsigned char>(ELFMAG3),
                                                file_class,
                                                ELFDATA2LSB,
                                                EV_CURRENT};
    put(file, 0, identity.data(), identity.size());
    const std::uint16_t type = ET_EXEC;
    const std::uint16_t machine = file_class == ELFCLASS64 ? EM_X86_64 : EM_386;
    put(file, offsetof(Elf64_Ehdr, e_type), &type, sizeof type);
    put(file, offsetof(Elf64_Ehdr, e_machine), &machine, sizeof machine);
    put_word(file, offsetof(Elf64_Ehdr, e_version), EV_CURRENT);
    // Small enough to lie in the file; the rest of the headers is the input's.
    if (file_class == ELFCLASS64) {
        const Elf64_Off table = word(file, offsetof(Elf64_Ehdr, e_phoff)) & 0xff;
        const std::uint16_t size = sizeof(Elf64_Phdr);
        put(file, offsetof(Elf64_Ehdr, e_phoff), &table, sizeof table);
        put(file, offsetof(Elf64_Ehdr, e_phentsize), &size, sizeof size);
    } else {
        const Elf32_Off table = word(file, offsetof(Elf32_Ehdr, e_phoff)) & 0xff;
        const std::uint16_t size = sizeof(Elf32_Phdr);
        put(file, offsetof(Elf32_Ehdr, e_phoff), &table, sizeof table);
        put(file, offsetof(Elf32_Ehdr, e_phentsize), &size, sizeof size);
    }
}

void make_bzimage(std::vector<std::byte>& file) {
    constexpr std::uint16_t boot_flag = 0xaa55;
    constexpr std::uint32_t magic = 0x53726448; // "HdrS"
    put(file, 0x1fe, &boot_flag, sizeof boot_flag);
    put_word(file, 0x202, magic);
}

void make_multiboot1(std::vector<std::byte>& file, std::size_t at) {
    put_word(file, at, MultibootHeader::magic);
    put_word(file, at + 8, 0 - MultibootHeader::magic - word(file, at + 4));
}

void make_multiboot2(std::vector<std::byte>& file, std::size_t at) {
    const std::uint32_t length = word(file, at + 8) & 0x3ff;
    put_word(file, at, Multiboot2Header::magic);
    put_word(file, at + 4, 0);
    put_word(file, at + 8, length);
    put_word(file, at + 12, 0 - Multiboot2Header::magic - length);
}

std::vector<std::byte> make_file(Input& input, Bytes rest) {
    const auto kind = input.take<std::uint8_t>();
    std::vector<std::byte> file(rest.begin(), rest.end());
    switch (kind & 3) {
    case 1:
        make_elf(file, ELFCLASS32);
        break;
    case 2:
        make_elf(file, ELFCLASS64);
        break;
    case 3:
        make_bzimage(file);
        break;
    default:
        break;
    }
    constexpr std::size_t behind_elf_header = 64, behind_that = 128;
    if ((kind & 4) != 0)
        make_multiboot1(file, behind_elf_header);
    if ((kind & 8) != 0)
        make_multiboot2(file, behind_that);
    return file;
}

void check_inside(Bytes file, std::uint64_t offset, std::uint64_t size) {
    check(offset <= file.size() && size <= file.size() - offset, "{:#x} bytes at {:#x} are in the file", size,
          offset);
}

/// Of a view that points into the file.
void check_bytes(Bytes file, Bytes part) {
    if (part.empty())
        return;
    check(part.data() >= file.data() && part.data() + part.size() <= file.data() + file.size(),
          "{} bytes are in the file", part.size());
}

void check_placement(Bytes file, const std::optional<MultibootPlacement>& placement) {
    if (!placement)
        return;
    check_inside(file, placement->file_offset, placement->file_size);
    const GuestPhys end = placement->load + placement->file_size;
    check(placement->bss_end >= end, "the bss is behind what is loaded");
    check(placement->entry >= placement->load && placement->entry < end, "the entry is in what is loaded");
}

void check_elf(Bytes file, const ElfFile& elf) {
    for (const ElfSegment& segment : elf.segments) {
        if (segment.type != PT_LOAD)
            continue;
        check_inside(file, segment.offset, segment.file_size);
        check(segment.memory_size >= segment.file_size, "a segment's contents fit into it");
    }
    for (const ElfSection& section : elf.sections) {
        if (section.type != SHT_NOBITS)
            check_inside(file, section.offset, section.size);
    }
    for (const ElfNote& note : elf.notes) {
        check_bytes(file, note.contents);
        check_bytes(file, std::as_bytes(std::span(note.name)));
    }
    check(elf.end <= file.size(), "the ELF ends in the file");
}

void check_text(std::string_view text) {
    for (const char c : text)
        check(c == '\n' || (c >= ' ' && c <= '~'), "byte {:#x} is for no terminal",
              static_cast<unsigned char>(c));
}

void check_kernel(Bytes file) {
    const KernelFile kernel = read_kernel_file(file);
    const auto protocols = kernel.protocols();
    check(protocols.size() >= 2 && protocols.back() == KernelProtocol::flat32, "each file is flat");
    for (const KernelProtocol protocol : protocols)
        check(kernel.problem(protocol).empty(), "what is offered has no problem");
    for (const KernelFile::Problem& problem : kernel.problems)
        check(!problem.what.empty() && problem.what.find('\n') == std::string::npos,
              "problems are told in a line");
    if (kernel.elf)
        check_elf(file, *kernel.elf);
    if (kernel.multiboot1)
        check_placement(file, kernel.multiboot1->placement);
    if (kernel.multiboot2)
        check_placement(file, kernel.multiboot2->placement);
    if (kernel.linux_image) {
        check_inside(file, kernel.linux_image->code_offset, kernel.linux_image->code_size);
        check_bytes(file, kernel.linux_image->payload);
        check_text(kernel.linux_image->version);
    }
}

void check_compressed(Bytes file) {
    constexpr std::uint64_t limit = std::uint64_t{1} << 20;
    try {
        check(unpack(file, limit).size() <= limit, "the limit holds");
    } catch (const StartupError&) { // damaged
    }
    try {
        check(unpack_payload(file, limit).size() <= limit, "the limit holds");
    } catch (const StartupError&) {
    }
    std::array<std::byte, 512> block{};
    const auto size = unpack_lz4_block(file, block);
    check(!size || *size <= block.size(), "a block fits into its room");
}

// --- Loading

/// What may be left of an earlier file is not looked at.
const GuestMemory& guest_memory() {
    static std::vector<std::byte> bytes(2 * minimum_memory);
    static const GuestMemory memory({{GuestPhys{0}, bytes}});
    return memory;
}

void check_loaded(const GuestMemory& memory, const LoadedKernel& kernel) {
    check(memory.contains(GuestPhys{kernel.entry.value()}, 1), "the entry {} is in memory", kernel.entry);
    const auto entries = boot_gdt_entries(kernel.mode, kernel.code_selector);
    for (std::size_t i = 0; i < entries.size(); ++i)
        check(memory.read<std::uint64_t>(kernel.gdt + i * descriptor_size) == entries[i],
              "the GDT is written over");
    check(memory.contains(GuestPhys{kernel.stack_top.value() - 1}, 1), "the stack is in memory");
    if (kernel.rbx != 0)
        check(memory.contains(GuestPhys{kernel.rbx}, 8), "the information is in memory");
    if (kernel.rsi != 0)
        check(memory.contains(GuestPhys{kernel.rsi}, sizeof(boot_params)), "boot_params is in memory");
    if (kernel.mode == StartMode::long_mode)
        check(memory.read<std::uint64_t>(kernel.page_table_root) == kernel.page_table_root.value() + 0x1003,
              "the page tables are written over");
}

void check_loading(Bytes file, GuestPhys load_address) {
    if (can_unpack(compression_of(file)))
        return; // what is in it is a file of its own
    constexpr std::array<std::byte, 100> module{};
    const std::array modules{BootModule{module, "module"}};
    for (const KernelProtocol protocol : kernel_protocols) {
        const bool flat = protocol == KernelProtocol::flat || protocol == KernelProtocol::flat32;
        LoadRequest request{.command_line = "a", .initrd = module, .name = "kernel", .protocol = protocol};
        if (takes_modules(protocol))
            request.modules = modules;
        if (flat)
            request.load_address = load_address;
        try {
            check_loaded(guest_memory(), load_kernel(file, request, guest_memory()));
        } catch (const StartupError&) { // not offered, or without room
        }
    }
}

} // namespace
} // namespace umbra::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace umbra;
    fuzz::Input input(data, size);
    const auto rest = std::as_bytes(std::span(data, size)).subspan(size == 0 ? 0 : 1);
    const std::vector<std::byte> file = fuzz::make_file(input, rest);
    fuzz::check_kernel(file);
    fuzz::check_compressed(file);
    constexpr std::uint64_t around = 0xf'ffff;
    fuzz::check_loading(file, GuestPhys{fuzz::word(file, 0) & around});
    try {
        fuzz::check_text(inspect_kernel_file(file));
    } catch (const StartupError&) { // compressed and damaged
    }
    return 0;
}
