// Finds and reads the headers of a kernel file.
#include "vmm/loader/kernel_file.hpp"

#include "vmm/loader/file_bytes.hpp"
#include "vmm/loader/reject.hpp"
#include "vmm/loader/setup_header.hpp"

#include <algorithm>
#include <bit>
#include <concepts>
#include <utility>

#include <elf.h>

namespace umbra {

namespace {

using Bytes = std::span<const std::byte>;

constexpr std::uint64_t address_limit_32 = std::uint64_t{1} << 32;

std::uint64_t align_up(std::uint64_t value, std::uint64_t alignment) {
    return (value + alignment - 1) / alignment * alignment;
}

/// Text up to its NUL or the limit, without what no terminal should be given.
std::string printable(Bytes bytes, std::size_t limit) {
    std::string text;
    for (const std::byte byte : bytes.first(std::min(bytes.size(), limit))) {
        const char c = std::to_integer<char>(byte);
        if (c == '\0')
            break;
        text += c >= ' ' && c <= '~' ? c : '?';
    }
    return text;
}

// --- ELF

struct Elf32 {
    using Header = Elf32_Ehdr;
    using Program = Elf32_Phdr;
    using Section = Elf32_Shdr;
};

struct Elf64 {
    using Header = Elf64_Ehdr;
    using Program = Elf64_Phdr;
    using Section = Elf64_Shdr;
};

/// A table of `count` headers of the size that they must have.
template<class T>
std::vector<T> read_table(Bytes file, std::uint64_t offset, std::uint64_t count, std::uint64_t entry_size,
                          std::string_view what) {
    if (count == 0)
        return {};
    if (entry_size != sizeof(T))
        reject("damaged ELF: {} headers of {} bytes, not {}", what, entry_size, sizeof(T));
    const auto bytes = range_of(file, offset, count * sizeof(T));
    if (!bytes)
        reject("truncated ELF: its {} headers lie outside the file", what);
    std::vector<T> table(count);
    std::memcpy(table.data(), bytes->data(), bytes->size());
    return table;
}

template<class Class>
void read_segments(Bytes file, const typename Class::Header& header, ElfFile& elf) {
    using Program = typename Class::Program;
    if (header.e_phnum == PN_XNUM)
        reject("not supported: an ELF with more than {} program headers", PN_XNUM - 1);
    const auto table =
        read_table<Program>(file, header.e_phoff, header.e_phnum, header.e_phentsize, "program");
    for (const Program& program : table) {
        elf.segments.push_back({.type = program.p_type,
                                .flags = program.p_flags,
                                .offset = program.p_offset,
                                .virtual_address = GuestVirt{program.p_vaddr},
                                .physical_address = GuestPhys{program.p_paddr},
                                .file_size = program.p_filesz,
                                .memory_size = program.p_memsz});
        if (program.p_type != PT_LOAD)
            continue;
        if (program.p_filesz > program.p_memsz)
            reject("damaged ELF: the segment at {:#x} has more bytes in the file than in memory",
                   program.p_paddr);
        if (!range_of(file, program.p_offset, program.p_filesz))
            reject("truncated ELF: the segment at {:#x} lies outside the file", program.p_paddr);
        elf.end = std::max<std::uint64_t>(elf.end, program.p_offset + program.p_filesz);
    }
    if (!table.empty())
        elf.end = std::max<std::uint64_t>(elf.end, header.e_phoff + table.size() * sizeof(Program));
}

template<class Class>
void read_sections(Bytes file, const typename Class::Header& header, ElfFile& elf) {
    using Section = typename Class::Section;
    constexpr std::size_t name_limit = 64;
    if (header.e_shoff == 0)
        return;
    if (header.e_shnum == 0)
        reject("not supported: an ELF with more than {} sections", SHN_LORESERVE - 1);
    const auto table =
        read_table<Section>(file, header.e_shoff, header.e_shnum, header.e_shentsize, "section");
    Bytes names;
    if (header.e_shstrndx != SHN_UNDEF) {
        if (header.e_shstrndx >= table.size())
            reject("damaged ELF: the section of names is none of its {} sections", table.size());
        const Section& section = table[header.e_shstrndx];
        const auto range = range_of(file, section.sh_offset, section.sh_size);
        if (!range)
            reject("truncated ELF: the names of its sections lie outside the file");
        names = *range;
    }
    std::vector<ElfSection> sections;
    std::uint64_t end = header.e_shoff + table.size() * sizeof(Section);
    for (const Section& section : table) {
        if (section.sh_type == SHT_NULL)
            continue;
        if (section.sh_type != SHT_NOBITS) {
            if (!range_of(file, section.sh_offset, section.sh_size))
                reject("truncated ELF: a section at {:#x} lies outside the file", section.sh_offset);
            end = std::max<std::uint64_t>(end, section.sh_offset + section.sh_size);
        }
        sections.push_back(
            {.name =
                 printable(names.subspan(std::min<std::size_t>(section.sh_name, names.size())), name_limit),
             .type = section.sh_type,
             .flags = section.sh_flags,
             .address = GuestVirt{section.sh_addr},
             .offset = section.sh_offset,
             .size = section.sh_size});
    }
    elf.sections = std::move(sections);
    elf.section_headers = file.subspan(header.e_shoff, table.size() * sizeof(Section));
    elf.section_of_names = header.e_shstrndx;
    elf.end = std::max(elf.end, end);
}

/// The notes of one segment or section. Of those with 8-byte alignment, names and contents have it too.
void read_notes(Bytes notes, std::uint64_t alignment, ElfFile& elf) {
    constexpr std::size_t most = 1024; // segments may lie over one another, and so name the same bytes often
    alignment = alignment == 8 ? 8 : 4;
    for (std::uint64_t at = 0; at < notes.size();) {
        const auto header = read_object<Elf64_Nhdr>(notes, at); // that of 32-bit ELF is the same
        if (!header)
            reject("damaged ELF: a note ends within its header");
        const std::uint64_t name_at = at + sizeof *header;
        const std::uint64_t contents_at = align_up(name_at + header->n_namesz, alignment);
        const auto name = range_of(notes, name_at, header->n_namesz);
        const auto contents = range_of(notes, contents_at, header->n_descsz);
        if (!name || !contents)
            reject("damaged ELF: a note reaches beyond the notes");
        if (elf.notes.size() == most)
            reject("damaged ELF: more than {} notes", most);
        std::string_view text(reinterpret_cast<const char*>(name->data()), name->size());
        elf.notes.push_back({text.substr(0, text.find('\0')), header->n_type, *contents});
        at = align_up(contents_at + header->n_descsz, alignment);
    }
}

/// As Xen and QEMU look for notes: in segments, and in sections only of a file that has no such segment.
template<class Class>
void read_all_notes(Bytes file, const typename Class::Header& header, ElfFile& elf) {
    bool in_segments = false;
    for (const auto& program : read_table<typename Class::Program>(file, header.e_phoff, header.e_phnum,
                                                                   header.e_phentsize, "program")) {
        if (program.p_type != PT_NOTE)
            continue;
        const auto notes = range_of(file, program.p_offset, program.p_filesz);
        if (!notes)
            reject("truncated ELF: its notes lie outside the file");
        read_notes(*notes, program.p_align, elf);
        in_segments = true;
    }
    if (in_segments)
        return;
    for (const ElfSection& section : elf.sections) {
        if (section.type == SHT_NOTE)
            read_notes(file.subspan(section.offset, section.size), 4, elf);
    }
}

/// Reads what loaders need; `problems` takes what is wrong with the rest.
template<class Class>
ElfFile read_elf(Bytes file, std::vector<KernelFile::Problem>& problems) {
    const auto header = read_object<typename Class::Header>(file, 0);
    if (!header)
        reject("truncated ELF: {} bytes are no ELF header", file.size());
    if (header->e_ident[EI_DATA] != ELFDATA2LSB)
        reject("not supported: an ELF that is not little-endian");
    if (header->e_ident[EI_VERSION] != EV_CURRENT || header->e_version != EV_CURRENT)
        reject("damaged ELF: unknown ELF version");
    ElfFile elf;
    elf.is_64_bit = std::same_as<Class, Elf64>;
    elf.type = header->e_type;
    elf.machine = header->e_machine;
    elf.entry = header->e_entry;
    elf.end = sizeof *header;
    read_segments<Class>(file, *header, elf);
    const auto tell = [&](std::optional<KernelProtocol> protocol, auto read) {
        try {
            read(file, *header, elf);
        } catch (const StartupError& error) {
            problems.push_back({protocol, error.what()});
        }
    };
    tell(std::nullopt, read_sections<Class>);
    tell(KernelProtocol::pvh, read_all_notes<Class>);
    return elf;
}

ElfFile read_elf(Bytes file, std::vector<KernelFile::Problem>& problems) {
    const unsigned file_class = read_object<std::uint8_t>(file, EI_CLASS).value_or(ELFCLASSNONE);
    if (file_class == ELFCLASS32)
        return read_elf<Elf32>(file, problems);
    if (file_class == ELFCLASS64)
        return read_elf<Elf64>(file, problems);
    reject("damaged ELF: class {} is neither 32-bit nor 64-bit", file_class);
}

/// Refuses an ELF that no protocol can load.
void check_executable(const ElfFile& elf) {
    const std::uint16_t machine = elf.is_64_bit ? EM_X86_64 : EM_386;
    if (elf.machine != machine)
        reject("not supported: a {}-bit ELF for machine type {}, not {} ({})", elf.is_64_bit ? 64 : 32,
               elf.machine, elf.is_64_bit ? "x86-64" : "i386", machine);
    if (elf.type == ET_REL)
        reject("not supported: a relocatable object; link it into an executable first");
    if (elf.type == ET_DYN)
        reject("not supported: a shared object or position-independent executable; link it with -static "
               "-no-pie");
    if (elf.type != ET_EXEC)
        reject("not supported: an ELF of type {}, not an executable ({})", elf.type, ET_EXEC);
    const auto has_contents = [](const ElfSegment& segment) {
        return segment.type == PT_LOAD && segment.memory_size != 0;
    };
    if (std::none_of(elf.segments.begin(), elf.segments.end(), has_contents))
        reject("the ELF has no PT_LOAD segment: nothing to load");
}

// --- notes

const ElfNote* find_note(const ElfFile& elf, std::string_view name, std::uint32_t type) {
    const auto found = std::ranges::find_if(
        elf.notes, [&](const ElfNote& note) { return note.name == name && note.type == type; });
    return found == elf.notes.end() ? nullptr : &*found;
}

std::optional<GuestPhys> read_pvh(const ElfFile& elf) {
    constexpr std::uint32_t phys32_entry = 18; // Xen, public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY
    const ElfNote* const note = find_note(elf, "Xen", phys32_entry);
    if (note == nullptr)
        return std::nullopt;
    std::optional<std::uint64_t> entry;
    if (note->contents.size() == sizeof(std::uint64_t))
        entry = read_object<std::uint64_t>(note->contents, 0);
    else if (note->contents.size() == sizeof(std::uint32_t))
        entry = read_object<std::uint32_t>(note->contents, 0);
    if (!entry)
        reject("damaged PVH note: an entry of {} bytes, not 4 or 8", note->contents.size());
    if (*entry >= address_limit_32)
        reject("damaged PVH note: the 32-bit entry {:#x} is not below 4 GB", *entry);
    check_executable(elf);
    return GuestPhys{*entry};
}

/// Linux's own notes (include/linux/elfnote.h) are in every vmlinux since 5.1 that has a build salt or
/// release note; older ones with support for Xen name the system.
bool is_linux(const ElfFile& elf) {
    constexpr std::uint32_t guest_os = 6; // XEN_ELFNOTE_GUEST_OS
    if (!elf.is_64_bit)
        return false;
    const bool named =
        std::ranges::find(elf.notes, std::string_view("Linux"), &ElfNote::name) != elf.notes.end();
    const ElfNote* const system = find_note(elf, "Xen", guest_os);
    return named || (system != nullptr && printable(system->contents, system->contents.size()) == "linux");
}

// --- multiboot

/// The first header with a right check sum, at a multiple of `Alignment` bytes; its magic number is followed
/// by `words - 1` more of 32 bits, with which it sums up to 0.
struct HeaderSearch {
    std::uint32_t magic;
    std::uint64_t alignment;
    std::uint64_t words;
};

std::optional<std::uint64_t> find_header(Bytes area, const HeaderSearch& search, std::string_view what) {
    std::optional<std::uint64_t> damaged;
    const std::uint64_t size = search.words * sizeof(std::uint32_t);
    for (std::uint64_t at = 0; range_of(area, at, size); at += search.alignment) {
        if (read_object<std::uint32_t>(area, at) != search.magic)
            continue;
        std::uint32_t sum = 0;
        for (std::uint64_t word = 0; word < search.words; ++word)
            sum += read_object<std::uint32_t>(area, at + word * sizeof(std::uint32_t)).value_or(0);
        if (sum == 0)
            return at;
        if (!damaged)
            damaged = at;
    }
    if (damaged)
        reject("damaged {} header at {:#x}: its check sum is wrong", what, *damaged);
    return std::nullopt;
}

Bytes beginning(Bytes file, std::size_t size) {
    return file.first(std::min(file.size(), size));
}

struct PlacementFields {
    std::uint32_t header_address, load_address, load_end, bss_end;
};

MultibootPlacement read_placement(Bytes file, std::uint64_t header_offset, const PlacementFields& fields,
                                  std::uint32_t entry) {
    if (fields.load_address > fields.header_address)
        reject("damaged multiboot header: its own address {:#x} is below the load address {:#x}",
               fields.header_address, fields.load_address);
    const std::uint64_t before = fields.header_address - fields.load_address;
    if (before > header_offset)
        reject(
            "damaged multiboot header: {:#x} bytes from the load address to the header, but only {:#x} are "
            "in the file",
            before, header_offset);
    const std::uint64_t offset = header_offset - before;
    std::uint64_t size = file.size() - offset;
    if (fields.load_end != 0) {
        if (fields.load_end <= fields.header_address)
            reject("damaged multiboot header: it lies behind the end {:#x} of what is loaded",
                   fields.load_end);
        if (fields.load_end - fields.load_address > size)
            reject("truncated file: the multiboot header tells of {:#x} bytes to load, the file has {:#x}",
                   fields.load_end - fields.load_address, size);
        size = fields.load_end - fields.load_address;
    }
    const GuestPhys load{fields.load_address};
    const GuestPhys end = load + size;
    const GuestPhys bss_end = fields.bss_end == 0 ? end : GuestPhys{fields.bss_end};
    if (end.value() > address_limit_32)
        reject("damaged multiboot header: what is loaded at {:#x} does not end below 4 GB", load.value());
    if (bss_end < end)
        reject("damaged multiboot header: the bss ends at {:#x}, before what is loaded does at {:#x}",
               bss_end.value(), end.value());
    if (entry < fields.load_address || entry - fields.load_address >= size)
        reject("damaged multiboot header: the entry {:#x} is not in what is loaded at {:#x}-{:#x}", entry,
               load.value(), end.value());
    return {offset, size, load, bss_end, GuestPhys{entry}};
}

/// Without addresses in the header it is the ELF's segments that are loaded.
void check_loadable(const std::optional<ElfFile>& elf) {
    if (!elf)
        reject("the multiboot header tells no addresses, and the file is no ELF that could");
    check_executable(*elf);
}

std::optional<MultibootHeader> read_multiboot1(Bytes file, const std::optional<ElfFile>& elf) {
    constexpr std::uint64_t flags_at = 4, addresses_at = 12, entry_at = 28, video_at = 32;
    constexpr std::uint32_t required = 0xffff; // "flags": the lower half must be understood
    constexpr std::uint32_t understood = MultibootHeader::page_aligned_modules |
                                         MultibootHeader::wants_memory_map | MultibootHeader::wants_video;
    const Bytes area = beginning(file, 8192);
    const auto offset = find_header(area, {MultibootHeader::magic, 4, 3}, "multiboot");
    if (!offset)
        return std::nullopt;
    MultibootHeader header;
    header.offset = *offset;
    header.flags = read_object<std::uint32_t>(area, *offset + flags_at).value_or(0);
    if (const std::uint32_t unknown = header.flags & required & ~understood; unknown != 0)
        reject("not supported: the multiboot header requires unknown features (flags {:#x})", unknown);
    if ((header.flags & MultibootHeader::has_addresses) != 0) {
        const auto fields = read_object<PlacementFields>(area, *offset + addresses_at);
        const auto entry = read_object<std::uint32_t>(area, *offset + entry_at);
        if (!fields || !entry)
            reject("truncated multiboot header: its addresses are not in the file's first 8192 bytes");
        header.placement = read_placement(file, *offset, *fields, *entry);
    } else {
        check_loadable(elf);
    }
    if ((header.flags & MultibootHeader::wants_video) != 0) {
        header.video = read_object<MultibootHeader::Video>(area, *offset + video_at);
        if (!header.video)
            reject("truncated multiboot header: its video mode is not in the file's first 8192 bytes");
    }
    return header;
}

// Multiboot2, 3.1.3 to 3.1.13: tags in headers of OS images.
enum class HeaderTag : std::uint16_t {
    end = 0,
    information_request,
    address,
    entry_address,
    console_flags,
    framebuffer,
    module_alignment,
    efi_boot_services,
    efi_i386_entry,
    efi_amd64_entry,
    relocatable,
};

constexpr std::uint64_t tag_header_size = 8;

/// The tag's contents, behind its own header, as a T.
template<class T>
T tag_contents(Bytes tag, std::uint32_t type) {
    const auto contents = read_object<T>(tag, tag_header_size);
    if (!contents)
        reject("damaged multiboot2 header: {} bytes are too few for a tag of type {}", tag.size(), type);
    return *contents;
}

Multiboot2Header::Relocation read_relocation(Bytes bytes, std::uint32_t type) {
    struct Fields {
        std::uint32_t lowest, highest, alignment, preference;
    };
    const auto fields = tag_contents<Fields>(bytes, type);
    if (fields.lowest > fields.highest || !std::has_single_bit(fields.alignment))
        reject("damaged multiboot2 header: it cannot be relocated to {:#x}-{:#x} with alignment {:#x}",
               fields.lowest, fields.highest, fields.alignment);
    return {GuestPhys{fields.lowest}, GuestPhys{fields.highest}, fields.alignment, fields.preference};
}

/// What a header's tags say of where it is loaded, until all are read.
struct Multiboot2Addresses {
    std::optional<PlacementFields> load;
    std::optional<std::uint32_t> entry;
};

void read_tag(Bytes bytes, const Multiboot2Header::Tag& tag, Multiboot2Header& header,
              Multiboot2Addresses& addresses) {
    switch (HeaderTag{tag.type}) {
    case HeaderTag::information_request:
        for (std::uint64_t at = tag_header_size; at < bytes.size(); at += sizeof(std::uint32_t)) {
            const auto type = read_object<std::uint32_t>(bytes, at);
            if (!type)
                reject("damaged multiboot2 header: {} bytes are no list of information requests",
                       bytes.size());
            header.requests.push_back({*type, tag.optional});
        }
        return;
    case HeaderTag::address:
        addresses.load = tag_contents<PlacementFields>(bytes, tag.type);
        return;
    case HeaderTag::entry_address:
        addresses.entry = tag_contents<std::uint32_t>(bytes, tag.type);
        header.entry = GuestPhys{*addresses.entry};
        return;
    case HeaderTag::console_flags:
        header.console_flags = tag_contents<std::uint32_t>(bytes, tag.type);
        return;
    case HeaderTag::framebuffer: {
        const auto mode = tag_contents<std::array<std::uint32_t, 3>>(bytes, tag.type);
        header.framebuffer = {mode[0], mode[1], mode[2], tag.optional};
        return;
    }
    case HeaderTag::module_alignment:
        header.page_aligned_modules = true;
        return;
    case HeaderTag::relocatable:
        header.relocation = read_relocation(bytes, tag.type);
        return;
    case HeaderTag::end:
    case HeaderTag::efi_boot_services: // these three are for EFI, which umbra's machines are without
    case HeaderTag::efi_i386_entry:
    case HeaderTag::efi_amd64_entry:
        return;
    }
    if (!tag.optional)
        reject("not supported: the multiboot2 header requires a feature of the unknown type {}", tag.type);
}

void read_tags(Bytes tags, Multiboot2Header& header, Multiboot2Addresses& addresses) {
    struct TagHeader {
        std::uint16_t type, flags;
        std::uint32_t size;
    };
    for (std::uint64_t at = 0;;) {
        const auto found = read_object<TagHeader>(tags, at);
        if (!found)
            reject("damaged multiboot2 header: its tags do not end within its {} bytes", header.length);
        if (HeaderTag{found->type} == HeaderTag::end)
            return;
        const auto bytes = range_of(tags, at, found->size);
        if (found->size < tag_header_size || !bytes)
            reject("damaged multiboot2 header: a tag of type {} has {} bytes", found->type, found->size);
        const Multiboot2Header::Tag tag{found->type, (found->flags & 1) != 0, found->size};
        header.tags.push_back(tag);
        read_tag(*bytes, tag, header, addresses);
        at = align_up(at + found->size, tag_header_size);
    }
}

std::optional<Multiboot2Header> read_multiboot2(Bytes file, const std::optional<ElfFile>& elf) {
    struct Start {
        std::uint32_t magic, architecture, length, checksum;
    };
    constexpr std::uint32_t load_from_start = ~std::uint32_t{0};
    const Bytes area = beginning(file, 32768);
    const auto offset = find_header(area, {Multiboot2Header::magic, 8, 4}, "multiboot2");
    if (!offset)
        return std::nullopt;
    const auto start = read_object<Start>(area, *offset).value_or(Start{});
    if (start.architecture != 0)
        reject("not supported: a multiboot2 header for architecture {}, not i386 (0)", start.architecture);
    const auto bytes = range_of(area, *offset, start.length);
    if (start.length < sizeof(Start) || !bytes)
        reject("damaged multiboot2 header: its {} bytes are not in the file's first 32768", start.length);
    Multiboot2Header header;
    header.offset = *offset;
    header.architecture = start.architecture;
    header.length = start.length;
    Multiboot2Addresses addresses;
    read_tags(bytes->subspan(sizeof(Start)), header, addresses);
    if (addresses.load) {
        if (!addresses.entry)
            reject("damaged multiboot2 header: it tells where to load, but not where to enter");
        PlacementFields& load = *addresses.load;
        if (load.load_address == load_from_start) {
            if (load.header_address < *offset)
                reject("damaged multiboot2 header: loaded to {:#x}, the file would begin below 0",
                       load.header_address);
            load.load_address = load.header_address - static_cast<std::uint32_t>(*offset);
        }
        header.placement = read_placement(file, *offset, load, *addresses.entry);
    } else {
        check_loadable(elf);
    }
    return header;
}

// --- Linux

std::string version_text(Bytes file, const setup_header& header) {
    constexpr std::uint64_t counted_from = 0x200;
    constexpr std::size_t limit = 128;
    const std::uint64_t at = counted_from + header.kernel_version;
    if (header.kernel_version == 0 ||
        at >= std::min<std::uint64_t>(protected_mode_offset(header), file.size()))
        return {};
    return printable(file.subspan(at), limit);
}

constexpr std::uint64_t paragraph = 16; // the unit of syssize

/// As the header tells; before boot protocol 2.04, which made its number wide enough, all that is in the
/// file.
std::uint64_t code_size(Bytes file, const setup_header& header) {
    const std::uint64_t offset = protected_mode_offset(header);
    return header.version < first_version_with_wide_size && offset < file.size() ? file.size() - offset
                                                                                 : header.syssize * paragraph;
}

/// Whether nothing but the real-mode set-up code knows how to start what is behind it: a kernel tells how
/// long it is, and at least one of its 64-bit entry, its payload and where its 32-bit code starts, which is 1
/// MB.
bool needs_setup_code(const setup_header& header) {
    if (header.version >= first_64_bit_version && (header.xloadflags & XLF_KERNEL_64) != 0)
        return false;
    return header.syssize == 0 || (header.code32_start == 0 && header.payload_length == 0);
}

LinuxImage read_bzimage(Bytes file, std::vector<KernelFile::Problem>& problems) {
    constexpr std::uint16_t first_version_with_command_line = 0x0202; // by a 32-bit pointer
    LinuxImage image;
    image.is_bzimage = true;
    image.header = read_setup_header(file);
    const setup_header& header = image.header;
    if (header.version < first_version_with_command_line)
        reject("not supported: boot protocol {}.{:02}; 2.02 or later is needed", header.version >> 8,
               header.version & 0xff);
    if ((header.loadflags & LOADED_HIGH) == 0)
        reject("not supported: a zImage, which is loaded below 1 MB");
    image.version = version_text(file, header);
    if (needs_setup_code(header))
        reject("not supported: it is like iPXE and memdisk ({}): only its real-mode code can start it, and "
               "that needs "
               "a BIOS; give umbra the kernel that it would load, or run it in QEMU",
               image.version.empty() ? "a boot loader" : image.version);
    image.has_64_bit_entry =
        header.version >= first_64_bit_version && (header.xloadflags & XLF_KERNEL_64) != 0;
    if (!image.has_64_bit_entry)
        problems.push_back({KernelProtocol::linux64, "a bzImage without a 64-bit entry (a 32-bit kernel)"});
    image.code_offset = protected_mode_offset(header);
    image.code_size = code_size(file, header);
    if (image.code_size <= (image.has_64_bit_entry ? long_mode_entry : 0))
        reject("damaged bzImage: {} bytes of code do not reach its entry", image.code_size);
    // The last paragraph need not be complete.
    if (image.code_offset >= file.size() ||
        image.code_size > file.size() - image.code_offset + (paragraph - 1))
        reject("truncated bzImage: its header tells of {} bytes, the file has {}",
               image.code_offset + image.code_size, file.size());
    image.code_size = std::min(image.code_size, file.size() - image.code_offset);
    if (header.payload_length == 0)
        return image;
    try {
        image.payload = bzimage_payload(file);
        image.compression = compression_of(image.payload);
    } catch (const StartupError& error) {
        problems.push_back({std::nullopt, error.what()}); // the kernel can still unpack itself
    }
    return image;
}

// --- protocols

struct ProtocolName {
    KernelProtocol protocol;
    std::string_view name;
};

constexpr std::array<ProtocolName, kernel_protocols.size()> protocol_names{
    {{KernelProtocol::linux64, "linux"},
     {KernelProtocol::linux32, "linux32"},
     {KernelProtocol::pvh, "pvh"},
     {KernelProtocol::multiboot1, "multiboot1"},
     {KernelProtocol::multiboot2, "multiboot2"},
     {KernelProtocol::elf64, "elf64"},
     {KernelProtocol::elf32, "elf32"},
     {KernelProtocol::flat, "flat"},
     {KernelProtocol::flat32, "flat32"}}};

} // namespace

std::string_view name(KernelProtocol protocol) {
    return std::ranges::find(protocol_names, protocol, &ProtocolName::protocol)->name;
}

std::optional<KernelProtocol> kernel_protocol(std::string_view name) {
    const auto* const found = std::ranges::find(protocol_names, name, &ProtocolName::name);
    return found == protocol_names.end() ? std::nullopt : std::optional(found->protocol);
}

std::string_view KernelFile::problem(KernelProtocol protocol) const {
    const auto found = std::ranges::find(problems, std::optional(protocol), &Problem::protocol);
    return found == problems.end() ? std::string_view() : found->what;
}

bool KernelFile::offers(KernelProtocol protocol) const {
    if (!problem(protocol).empty())
        return false;
    switch (protocol) {
    case KernelProtocol::linux64:
        return linux_image && linux_image->has_64_bit_entry;
    case KernelProtocol::linux32:
        return linux_image && linux_image->is_bzimage;
    case KernelProtocol::multiboot1:
        return multiboot1.has_value();
    case KernelProtocol::pvh:
        return pvh_entry.has_value();
    case KernelProtocol::multiboot2:
        return multiboot2.has_value();
    case KernelProtocol::elf64:
        return elf && elf->is_64_bit;
    case KernelProtocol::elf32:
        return elf && !elf->is_64_bit;
    case KernelProtocol::flat:
    case KernelProtocol::flat32:
        return true;
    }
    return false;
}

std::vector<KernelProtocol> KernelFile::protocols() const {
    std::vector<KernelProtocol> offered;
    std::ranges::copy_if(kernel_protocols, std::back_inserter(offered),
                         [this](KernelProtocol protocol) { return offers(protocol); });
    return offered;
}

KernelFile read_kernel_file(std::span<const std::byte> file) {
    KernelFile kernel;
    kernel.size = file.size();
    const auto attempt = [&](KernelProtocol protocol, auto read) {
        try {
            read();
        } catch (const StartupError& error) {
            kernel.problems.push_back({protocol, error.what()});
        }
    };
    if (is_elf(file)) {
        const bool is_32_bit = read_object<std::uint8_t>(file, EI_CLASS) == ELFCLASS32;
        attempt(is_32_bit ? KernelProtocol::elf32 : KernelProtocol::elf64, [&] {
            kernel.elf = read_elf(file, kernel.problems);
            check_executable(*kernel.elf);
            if (is_linux(*kernel.elf))
                kernel.linux_image.emplace().has_64_bit_entry = true;
        });
    } else if (is_bzimage(file)) {
        attempt(KernelProtocol::linux64, [&] { kernel.linux_image = read_bzimage(file, kernel.problems); });
    }
    if (kernel.elf)
        attempt(KernelProtocol::pvh, [&] { kernel.pvh_entry = read_pvh(*kernel.elf); });
    attempt(KernelProtocol::multiboot1, [&] { kernel.multiboot1 = read_multiboot1(file, kernel.elf); });
    attempt(KernelProtocol::multiboot2, [&] { kernel.multiboot2 = read_multiboot2(file, kernel.elf); });
    return kernel;
}

} // namespace umbra
