// The text of `umbra inspect`.
#include "vmm/loader/kernel_file.hpp"

#include "vmm/error.hpp"
#include "vmm/loader/setup_header.hpp"

#include <algorithm>
#include <utility>

#include <elf.h>
#include <fmt/core.h>

namespace umbra {

namespace {

// Files of thousands of segments, sections or notes are legal; a screen of each tells enough.
constexpr std::size_t most_rows = 64;

/// Lines with a label in front, all of them indented alike.
class Text {
  public:
    template<class... Args>
    void line(std::string_view label, fmt::format_string<Args...> format, Args&&... args) {
        text_ += fmt::format("{:{}}{:<12}", "", indent_, label);
        text_ += fmt::format(format, std::forward<Args>(args)...);
        text_ += '\n';
    }
    /// What a bzImage contains stands below it.
    void indent() { indent_ += 2; }
    [[nodiscard]] std::string take() { return std::move(text_); }

    /// A row for each element, with the label in front of the first.
    template<class Range, class Row>
    void rows(std::string_view label, const Range& range, Row row) {
        std::size_t count = 0;
        for (const auto& element : range) {
            if (count == most_rows)
                return line("", "({} more)", range.size() - most_rows);
            line(count == 0 ? label : "", "{}", row(element));
            ++count;
        }
    }

  private:
    std::size_t indent_ = 0;
    std::string text_;
};

std::string printable(std::string_view bytes) {
    constexpr std::size_t limit = 64;
    std::string text;
    for (const char c : bytes.substr(0, limit))
        text += c >= ' ' && c <= '~' ? c : '?';
    return text;
}

// --- ELF

std::string segment_type(std::uint32_t type) {
    switch (type) {
    case PT_NULL:
        return "NULL";
    case PT_LOAD:
        return "LOAD";
    case PT_DYNAMIC:
        return "DYNAMIC";
    case PT_INTERP:
        return "INTERP";
    case PT_NOTE:
        return "NOTE";
    case PT_PHDR:
        return "PHDR";
    case PT_TLS:
        return "TLS";
    case PT_GNU_EH_FRAME:
        return "EH_FRAME";
    case PT_GNU_STACK:
        return "STACK";
    case PT_GNU_RELRO:
        return "RELRO";
    case PT_GNU_PROPERTY:
        return "PROPERTY";
    }
    return fmt::format("{:#x}", type);
}

std::string segment_row(const ElfSegment& segment) {
    return fmt::format("{:<8} {}{}{} {:#10x} {:#18x} {:#10x} {:#10x} {:#10x}", segment_type(segment.type),
                       (segment.flags & PF_R) != 0 ? 'r' : '-', (segment.flags & PF_W) != 0 ? 'w' : '-',
                       (segment.flags & PF_X) != 0 ? 'x' : '-', segment.offset,
                       segment.virtual_address.value(), segment.physical_address.value(), segment.file_size,
                       segment.memory_size);
}

std::string section_row(const ElfSection& section) {
    return fmt::format(
        "{:<24} {}{}{} {:#10x} {:#18x} {:#10x}{}", section.name, (section.flags & SHF_ALLOC) != 0 ? 'a' : '-',
        (section.flags & SHF_WRITE) != 0 ? 'w' : '-', (section.flags & SHF_EXECINSTR) != 0 ? 'x' : '-',
        section.offset, section.address.value(), section.size, section.type == SHT_NOBITS ? " zeroed" : "");
}

std::string note_row(const ElfNote& note) {
    constexpr std::size_t most_bytes = 24;
    std::string bytes;
    for (const std::byte byte : note.contents.first(std::min(note.contents.size(), most_bytes)))
        bytes += fmt::format(" {:02x}", byte);
    return fmt::format("{} {:#x}, {} bytes:{}{}", printable(note.name), note.type, note.contents.size(),
                       bytes, note.contents.size() > most_bytes ? " ..." : "");
}

void write_elf(Text& text, const ElfFile& elf, std::uint64_t file_size) {
    text.line("ELF", "{}-bit, type {}, machine {}, entry {:#x}", elf.is_64_bit ? 64 : 32, elf.type,
              elf.machine, elf.entry);
    if (elf.end < file_size)
        text.line("", "{} bytes follow it at {:#x}", file_size - elf.end, elf.end);
    if (!elf.segments.empty())
        text.line("segments", "{:<8} {} {:>10} {:>18} {:>10} {:>10} {:>10}", "type", "   ", "offset",
                  "virtual", "physical", "in file", "in memory");
    text.rows("", elf.segments, segment_row);
    if (!elf.sections.empty())
        text.line("sections", "{:<24} {} {:>10} {:>18} {:>10}", "name", "   ", "offset", "address", "size");
    text.rows("", elf.sections, section_row);
    text.rows("notes", elf.notes, note_row);
}

// --- multiboot

void write_placement(Text& text, const std::optional<MultibootPlacement>& placement) {
    if (!placement)
        return text.line("", "loaded as ELF");
    text.line("", "loaded to {:#x}: {:#x} bytes from {:#x} in the file, zeros up to {:#x}; entry {:#x}",
              placement->load.value(), placement->file_size, placement->file_offset,
              placement->bss_end.value(), placement->entry.value());
}

void write_multiboot1(Text& text, const MultibootHeader& header) {
    text.line("multiboot1", "header at {:#x}, flags {:#x}{}{}", header.offset, header.flags,
              (header.flags & MultibootHeader::page_aligned_modules) != 0 ? ", modules on page boundaries"
                                                                          : "",
              (header.flags & MultibootHeader::wants_memory_map) != 0 ? ", wants memory map" : "");
    write_placement(text, header.placement);
    if (header.video)
        text.line("", "wants video mode of type {}: {}x{}, depth {}", header.video->mode_type,
                  header.video->width, header.video->height, header.video->depth);
}

void write_multiboot2(Text& text, const Multiboot2Header& header) {
    text.line("multiboot2", "header at {:#x}, {} bytes, architecture {}", header.offset, header.length,
              header.architecture);
    write_placement(text, header.placement);
    if (!header.placement && header.entry)
        text.line("", "entry {:#x}", header.entry->value());
    text.rows("", header.requests, [](const Multiboot2Header::Request& request) {
        return fmt::format("asks for information of type {}{}", request.type,
                           request.optional ? " (optional)" : "");
    });
    if (header.console_flags)
        text.line("", "console flags {:#x}", *header.console_flags);
    if (header.framebuffer)
        text.line("", "asks for a framebuffer of {}x{}, depth {}{}", header.framebuffer->width,
                  header.framebuffer->height, header.framebuffer->depth,
                  header.framebuffer->optional ? " (optional)" : "");
    if (header.page_aligned_modules)
        text.line("", "modules on page boundaries");
    if (header.relocation)
        text.line("", "can be loaded anywhere in {:#x}-{:#x}, alignment {:#x}",
                  header.relocation->lowest.value(), header.relocation->highest.value(),
                  header.relocation->alignment);
}

// --- Linux

void write_kernel(Text& text, const KernelFile& kernel, std::span<const std::byte> file);

void write_payload(Text& text, const LinuxImage& image, std::span<const std::byte> file) {
    text.line("payload", "{} bytes at {:#x}, {}", image.payload.size(), image.payload.data() - file.data(),
              name(image.compression));
    try {
        const std::vector<std::byte> unpacked = unpack_payload(image.payload, unpacked_kernel_limit);
        text.indent();
        write_kernel(text, read_kernel_file(unpacked), unpacked);
    } catch (const StartupError& error) {
        text.line("", "{}", error.what());
    }
}

void write_bzimage(Text& text, const LinuxImage& image) {
    const setup_header& header = image.header;
    text.line("Linux", "bzImage of boot protocol {}.{:02}{}{}", header.version >> 8, header.version & 0xff,
              image.version.empty() ? "" : ": ", image.version);
    text.line("", "code: {:#x} bytes at {:#x}", image.code_size, image.code_offset);
    if (image.has_64_bit_entry)
        text.line("", "64-bit entry {:#x} bytes behind its start, 32-bit entry at its start",
                  long_mode_entry);
    else
        text.line("", "32-bit entry at its start");
    // Copies, because the header is packed.
    const std::string elsewhere = header.relocatable_kernel != 0
                                      ? fmt::format("; can be loaded elsewhere, alignment {:#x}",
                                                    std::uint32_t{header.kernel_alignment})
                                      : "";
    if (header.version >= first_version_with_preferred_address)
        text.line("", "prefers address {:#x}, takes {:#x} bytes there{}", std::uint64_t{header.pref_address},
                  std::uint32_t{header.init_size}, elsewhere);
    else
        text.line("", "is loaded to {:#x}{}", std::uint32_t{header.code32_start}, elsewhere);
    text.line("", "command line of at most {} bytes, initrd up to address {:#x}",
              std::uint32_t{header.cmdline_size}, std::uint32_t{header.initrd_addr_max});
}

// --- all of it

void write_kernel(Text& text, const KernelFile& kernel, std::span<const std::byte> file) {
    std::string protocols;
    for (const KernelProtocol protocol : kernel.protocols())
        protocols += fmt::format("{}{}", protocols.empty() ? "" : ", ", name(protocol));
    text.line("size", "{} bytes", kernel.size);
    text.line("protocols", "{}", protocols);
    text.rows("problems", kernel.problems, [](const KernelFile::Problem& problem) {
        return problem.protocol ? fmt::format("{}: {}", name(*problem.protocol), problem.what) : problem.what;
    });
    if (kernel.multiboot1)
        write_multiboot1(text, *kernel.multiboot1);
    if (kernel.multiboot2)
        write_multiboot2(text, *kernel.multiboot2);
    if (kernel.pvh_entry)
        text.line("PVH", "32-bit entry {:#x}", kernel.pvh_entry->value());
    if (kernel.elf)
        write_elf(text, *kernel.elf, kernel.size);
    if (!kernel.linux_image || !kernel.linux_image->is_bzimage)
        return;
    write_bzimage(text, *kernel.linux_image);
    if (!kernel.linux_image->payload.empty())
        write_payload(text, *kernel.linux_image, file);
}

} // namespace

std::string inspect_kernel_file(std::span<const std::byte> file) {
    Text text;
    const Compression compression = compression_of(file);
    if (!can_unpack(compression)) {
        write_kernel(text, read_kernel_file(file), file);
        return text.take();
    }
    const std::vector<std::byte> unpacked = unpack(file, unpacked_kernel_limit);
    text.line("compressed", "{} bytes, {}; unpacked:", file.size(), name(compression));
    write_kernel(text, read_kernel_file(unpacked), unpacked);
    return text.take();
}

} // namespace umbra
