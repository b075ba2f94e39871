// Takes kernels apart and puts them into guest memory.
#include "vmm/loader/kernel_parts.hpp"

#include "vmm/loader/boot_params.hpp"
#include "vmm/loader/file_bytes.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/loader/reject.hpp"

#include <algorithm>
#include <iterator>

#include <elf.h>

namespace umbra {

KernelParts parts_of(const ElfFile& elf, std::span<const std::byte> file) {
    KernelParts parts;
    for (const ElfSegment& segment : elf.segments) {
        if (segment.type != PT_LOAD || segment.memory_size == 0)
            continue;
        if (segment.physical_address + (segment.memory_size - 1) < segment.physical_address)
            reject("damaged ELF: the segment at {} wraps around the address space", segment.physical_address);
        parts.push_back({.start = segment.physical_address,
                         .size = segment.memory_size,
                         .contents = file.subspan(segment.offset, segment.file_size),
                         .linked = segment.virtual_address});
    }
    std::ranges::sort(parts, {}, &KernelPart::start);
    const auto overlap =
        std::ranges::adjacent_find(parts, [](const KernelPart& left, const KernelPart& right) {
            return right.start - left.start < left.size;
        });
    if (overlap != parts.end())
        reject("damaged ELF: the segments at {} and {} overlap", overlap->start, std::next(overlap)->start);
    return parts;
}

KernelParts parts_of(const MultibootPlacement& placement, std::span<const std::byte> file) {
    return {{.start = placement.load,
             .size = placement.bss_end - placement.load,
             .contents = file.subspan(placement.file_offset, placement.file_size),
             .linked = GuestVirt{placement.load.value()}}};
}

void load_parts(const KernelParts& parts, MemoryPlan& plan) {
    // The last one first: if memory is too small, the message is to tell how much all of them need.
    std::for_each(parts.rbegin(), parts.rend(), [&plan](const KernelPart& part) {
        plan.claim(part.start, part.size, "the kernel's part");
        std::ranges::copy(part.contents, plan.memory().range(part.start, part.size).begin());
    });
}

GuestPhys begin_of(const KernelParts& parts) {
    return parts.front().start;
}

GuestPhys end_of(const KernelParts& parts) {
    GuestPhys end{0};
    for (const KernelPart& part : parts) {
        if (part.start < low_memory_end)
            end = std::max(end, part.end());
    }
    return end;
}

void check_entry(const KernelParts& parts, GuestPhys entry) {
    if (entry >= identity_map_end)
        reject("the kernel's entry point {:#x} is not below 4 GB: it must be a physical address, as the "
               "kernel is entered identity-mapped or without paging",
               entry.value());
    const bool inside = std::ranges::any_of(parts, [entry](const KernelPart& part) {
        return entry >= part.start && entry - part.start < part.contents.size();
    });
    if (!inside)
        reject("the kernel's entry point {:#x} is not the physical address of anything that is loaded from "
               "the file",
               entry.value());
}

GuestPhys translated_entry(const KernelParts& parts, std::uint64_t entry) {
    const auto found = std::ranges::find_if(parts, [at = GuestVirt{entry}](const KernelPart& part) {
        return at >= part.linked && at - part.linked < part.contents.size();
    });
    return found == parts.end() ? GuestPhys{entry} : found->start + (GuestVirt{entry} - found->linked);
}

namespace {

template<class Header>
void load_tables(std::span<const std::byte> file, SectionTable& table, MemoryPlan& plan,
                 const PlacementWindow& window) {
    for (std::size_t at = 0; at + sizeof(Header) <= table.headers.size(); at += sizeof(Header)) {
        Header header{};
        std::memcpy(&header, table.headers.data() + at, sizeof header);
        const bool is_table = header.sh_type == SHT_SYMTAB || header.sh_type == SHT_STRTAB;
        const auto contents = range_of(file, header.sh_offset, header.sh_size);
        if (!is_table || (header.sh_flags & SHF_ALLOC) != 0 || !contents || contents->empty())
            continue;
        header.sh_addr = static_cast<decltype(header.sh_addr)>(
            plan.store(*contents, window, "the kernel's symbol or string table").value());
        std::memcpy(table.headers.data() + at, &header, sizeof header);
    }
}

} // namespace

SectionTable load_sections(const ElfFile& elf, std::span<const std::byte> file, MemoryPlan& plan,
                           GuestPhys kernel_end) {
    constexpr std::uint64_t alignment = 16; // more than tables of symbols need
    const PlacementWindow window{kernel_end, low_memory_end, alignment};
    SectionTable table;
    table.entry_size = elf.is_64_bit ? sizeof(Elf64_Shdr) : sizeof(Elf32_Shdr);
    table.headers.assign(elf.section_headers.begin(), elf.section_headers.end());
    table.count = static_cast<std::uint32_t>(table.headers.size() / table.entry_size);
    table.names_index = elf.section_of_names;
    if (elf.is_64_bit)
        load_tables<Elf64_Shdr>(file, table, plan, window);
    else
        load_tables<Elf32_Shdr>(file, table, plan, window);
    return table;
}

} // namespace umbra
