// 64-bit ELF executables.
#include "vmm/loader/kernel_image.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/loader/reject.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include <elf.h>

namespace umbra {

namespace {

struct Segment {
    GuestPhys start;
    std::uint64_t memory_size; ///< bytes, at least contents.size()
    std::span<const std::byte> contents;
    bool executable;

    [[nodiscard]] GuestPhys end() const { return start + memory_size; }
};

void check_identity(const Elf64_Ehdr& header) {
    if (header.e_ident[EI_CLASS] == ELFCLASS32)
        reject("not supported yet: a 32-bit ELF");
    if (header.e_ident[EI_CLASS] != ELFCLASS64)
        reject("damaged ELF: class {} is neither 32-bit nor 64-bit", header.e_ident[EI_CLASS]);
    if (header.e_ident[EI_DATA] != ELFDATA2LSB)
        reject("not supported: an ELF that is not little-endian");
    if (header.e_ident[EI_VERSION] != EV_CURRENT || header.e_version != EV_CURRENT)
        reject("damaged ELF: unknown ELF version");
    if (header.e_machine != EM_X86_64)
        reject("not supported: an ELF for machine type {}, not x86-64 ({})", header.e_machine, EM_X86_64);
    if (header.e_type == ET_REL)
        reject("not supported: a relocatable object; link it into an executable first");
    if (header.e_type == ET_DYN)
        reject("not supported: a shared object or position-independent executable; link it with -static "
               "-no-pie");
    if (header.e_type != ET_EXEC)
        reject("not supported: an ELF of type {}, not an executable ({})", header.e_type, ET_EXEC);
}

/// The program header table's offset and size, checked to lie in the file.
std::span<const std::byte> program_headers(std::span<const std::byte> file, const Elf64_Ehdr& header) {
    if (header.e_phnum == 0)
        reject("the ELF has no program headers: nothing to load");
    if (header.e_phnum == PN_XNUM)
        reject("not supported: an ELF with more than {} program headers", PN_XNUM - 1);
    if (header.e_phentsize != sizeof(Elf64_Phdr))
        reject("damaged ELF: program headers of {} bytes, not {}", header.e_phentsize, sizeof(Elf64_Phdr));
    const std::uint64_t size = std::uint64_t{header.e_phnum} * sizeof(Elf64_Phdr);
    if (header.e_phoff > file.size() || size > file.size() - header.e_phoff)
        reject("truncated ELF: its program headers lie outside the file");
    return file.subspan(header.e_phoff, size);
}

void check_placement(const Segment& segment, const GuestMemory& memory) {
    const GuestPhys last = segment.start + (segment.memory_size - 1);
    if (last < segment.start)
        reject("damaged ELF: the segment at {} wraps around the address space", segment.start);
    if (segment.start < boot_data_end && last >= boot_data_begin)
        reject("the ELF's segment at {} overlaps the boot data at {:#x}-{:#x}", segment.start,
               boot_data_begin.value(), boot_data_end.value());
    if (is_usable_ram(memory, segment.start, segment.memory_size))
        return;
    if (last < low_memory_end && !memory.contains(segment.start, segment.memory_size))
        reject("the ELF's segment at {} ends outside guest memory: it needs at least {} MiB", segment.start,
               mebibytes_up_to(segment.end()));
    reject("the ELF's segment at {}, {:#x} bytes, does not lie in usable memory", segment.start,
           segment.memory_size);
}

std::vector<Segment> read_segments(std::span<const std::byte> file, const Elf64_Ehdr& header,
                                   const GuestMemory& memory) {
    std::vector<Segment> segments;
    const auto table = program_headers(file, header);
    for (std::size_t offset = 0; offset < table.size(); offset += sizeof(Elf64_Phdr)) {
        Elf64_Phdr program{};
        std::memcpy(&program, table.data() + offset, sizeof program);
        if (program.p_type != PT_LOAD)
            continue;
        const GuestPhys start{program.p_paddr};
        if (program.p_filesz > program.p_memsz)
            reject("damaged ELF: the segment at {} has more bytes in the file than in memory", start);
        if (program.p_offset > file.size() || program.p_filesz > file.size() - program.p_offset)
            reject("truncated ELF: the segment at {} lies outside the file", start);
        if (program.p_memsz == 0)
            continue;
        segments.push_back({start, program.p_memsz, file.subspan(program.p_offset, program.p_filesz),
                            (program.p_flags & PF_X) != 0});
        check_placement(segments.back(), memory);
    }
    if (segments.empty())
        reject("the ELF has no PT_LOAD segment: nothing to load");

    std::sort(segments.begin(), segments.end(),
              [](const Segment& left, const Segment& right) { return left.start < right.start; });
    const auto overlap =
        std::adjacent_find(segments.begin(), segments.end(), [](const Segment& left, const Segment& right) {
            return left.end() > right.start;
        });
    if (overlap != segments.end())
        reject("damaged ELF: the segments at {} and {} overlap", overlap->start, std::next(overlap)->start);
    return segments;
}

void check_entry(GuestPhys entry, const std::vector<Segment>& segments) {
    if (entry >= identity_map_end)
        reject(
            "the ELF's entry point {:#x} is not below 4 GB: it must be a physical address, as the kernel is "
            "entered identity-mapped",
            entry.value());
    // Only bytes from the file: to enter zeroed memory is never meant.
    const bool inside = std::any_of(segments.begin(), segments.end(), [entry](const Segment& segment) {
        return segment.executable && entry >= segment.start &&
               entry - segment.start < segment.contents.size();
    });
    if (!inside)
        reject("the ELF's entry point {:#x} is not the physical address of code in an executable segment",
               entry.value());
}

/// ELF kernels read the same boot_params as Linux: what a bzImage would have said of itself.
setup_header header_for_elf() {
    setup_header header{};
    header.boot_flag = boot_sector_magic;
    header.header = setup_header_magic;
    header.version = first_64_bit_version;
    header.loadflags = LOADED_HIGH;
    header.cmdline_size = static_cast<std::uint32_t>(command_line_limit);
    return header;
}

} // namespace

bool is_elf(std::span<const std::byte> file) {
    return file.size() >= SELFMAG && std::memcmp(file.data(), ELFMAG, SELFMAG) == 0;
}

KernelImage load_elf(std::span<const std::byte> file, const GuestMemory& memory) {
    Elf64_Ehdr header{};
    if (file.size() < sizeof header)
        reject("truncated ELF: {} bytes are no ELF header", file.size());
    std::memcpy(&header, file.data(), sizeof header);
    check_identity(header);
    const std::vector<Segment> segments = read_segments(file, header, memory);
    check_entry(GuestPhys{header.e_entry}, segments);

    GuestPhys end{0};
    for (const Segment& segment : segments) {
        const auto target = memory.range(segment.start, segment.memory_size);
        std::copy(segment.contents.begin(), segment.contents.end(), target.begin());
        if (segment.start < low_memory_end)
            end = std::max(end, segment.end());
    }
    return {.protocol = BootProtocol::elf64,
            .entry = GuestVirt{header.e_entry},
            .end = end,
            .header = header_for_elf(),
            .command_line_limit = command_line_limit,
            .initrd_limit = low_memory_end};
}

} // namespace umbra
