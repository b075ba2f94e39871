// Unit tests of vmm/loader/kernel_file: each header whole, with each of its fields damaged, and cut at every
// length.
#include "vmm/loader/kernel_file.hpp"

#include "vmm/error.hpp"
#include "vmm/loader/setup_header.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <elf.h>
#include <gtest/gtest.h>
#include <zlib.h>

namespace umbra {
namespace {

using Bytes = std::vector<std::byte>;
using Words = std::vector<std::uint32_t>;
using Protocol = KernelProtocol;
using Protocols = std::vector<KernelProtocol>;

Bytes bytes_of(std::string_view text) {
    const auto* const begin = reinterpret_cast<const std::byte*>(text.data());
    return {begin, begin + text.size()};
}

template<class T>
void put(Bytes& file, std::size_t offset, const T& value) {
    ASSERT_LE(offset + sizeof value, file.size());
    std::memcpy(file.data() + offset, &value, sizeof value);
}

void put_words(Bytes& file, std::size_t offset, const Words& words) {
    for (std::size_t i = 0; i < words.size(); ++i)
        put(file, offset + i * sizeof(std::uint32_t), words[i]);
}

Bytes first(const Bytes& bytes, std::size_t count) {
    return {bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(count)};
}

/// A file without meaning, to put headers into.
Bytes plain_file(std::size_t size = 0x10000) {
    return Bytes(size, std::byte{0x90});
}

void expect_problem(const Bytes& file, Protocol protocol, std::string_view part) {
    const KernelFile kernel = read_kernel_file(file);
    EXPECT_FALSE(kernel.offers(protocol)) << part;
    EXPECT_NE(kernel.problem(protocol).find(part), std::string_view::npos)
        << "expected: " << part << "\ngot: " << kernel.problem(protocol);
}

bool contains(const std::string& text, std::string_view part) {
    return text.find(part) != std::string::npos;
}

// --- protocols

TEST(KernelProtocolTest, HasANameThatUsersWrite) {
    for (const Protocol protocol : kernel_protocols)
        EXPECT_EQ(kernel_protocol(name(protocol)), protocol);
    EXPECT_EQ(name(Protocol::linux64), "linux");
    EXPECT_EQ(name(Protocol::flat), "flat");
    EXPECT_EQ(name(Protocol::flat32), "flat32");
    EXPECT_EQ(kernel_protocol("linux32"), Protocol::linux32);
    EXPECT_EQ(kernel_protocol("multiboot1"), Protocol::multiboot1);
    EXPECT_EQ(kernel_protocol("multiboot2"), Protocol::multiboot2);
    EXPECT_EQ(kernel_protocol("pvh"), Protocol::pvh);
    EXPECT_EQ(kernel_protocol("elf32"), Protocol::elf32);
    EXPECT_EQ(kernel_protocol("elf64"), Protocol::elf64);
    EXPECT_EQ(kernel_protocol("elf"), std::nullopt);
    EXPECT_EQ(kernel_protocol(""), std::nullopt);
}

TEST(KernelFileTest, AnyFileIsFlat) {
    for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{0x10000}}) {
        const Bytes file = plain_file(size);
        const KernelFile kernel = read_kernel_file(file);
        EXPECT_EQ(kernel.size, size);
        EXPECT_EQ(kernel.protocols(), (Protocols{Protocol::flat, Protocol::flat32}));
        EXPECT_TRUE(kernel.problems.empty());
        EXPECT_FALSE(kernel.elf || kernel.linux_image || kernel.multiboot1 || kernel.multiboot2 ||
                     kernel.pvh_entry);
    }
}

// --- multiboot 1

constexpr std::size_t header_at = 0x40;
constexpr std::uint32_t load_at = 0x100000;

/// A multiboot header with addresses and a video mode: the file is loaded from 0x20 on.
struct Multiboot1File {
    std::uint32_t magic = 0x1badb002;
    std::uint32_t flags = 0x1'0007;
    std::uint32_t sum_error = 0;
    std::uint32_t header = load_at + 0x20, load = load_at, load_end = load_at + 0x1000,
                  bss_end = load_at + 0x3000, entry = load_at + 0x80;
    Words video{1, 80, 25, 0};
    std::size_t offset = header_at;
    Bytes around = plain_file();

    [[nodiscard]] Bytes bytes() const {
        Bytes file = around;
        put_words(file, offset,
                  {magic, flags, 0 - magic - flags + sum_error, header, load, load_end, bss_end, entry});
        put_words(file, offset + 32, video);
        return file;
    }
};

TEST(Multiboot1Test, EachFieldIsRead) {
    const Bytes file = Multiboot1File().bytes();
    const KernelFile kernel = read_kernel_file(file);
    EXPECT_EQ(kernel.protocols(), (Protocols{Protocol::multiboot1, Protocol::flat, Protocol::flat32}));
    ASSERT_TRUE(kernel.multiboot1);
    EXPECT_EQ(kernel.multiboot1->offset, header_at);
    EXPECT_EQ(kernel.multiboot1->flags, 0x1'0007U);
    ASSERT_TRUE(kernel.multiboot1->placement);
    const MultibootPlacement& placement = *kernel.multiboot1->placement;
    EXPECT_EQ(placement.file_offset, 0x20U);
    EXPECT_EQ(placement.file_size, 0x1000U);
    EXPECT_EQ(placement.load, GuestPhys{load_at});
    EXPECT_EQ(placement.bss_end, GuestPhys{load_at + 0x3000});
    EXPECT_EQ(placement.entry, GuestPhys{load_at + 0x80});
    ASSERT_TRUE(kernel.multiboot1->video);
    EXPECT_EQ(kernel.multiboot1->video->mode_type, 1U);
    EXPECT_EQ(kernel.multiboot1->video->width, 80U);
    EXPECT_EQ(kernel.multiboot1->video->height, 25U);
    EXPECT_EQ(kernel.multiboot1->video->depth, 0U);
}

TEST(Multiboot1Test, ZeroMeansTheEndOfTheFileAndNoBss) {
    Multiboot1File source;
    source.load_end = source.bss_end = 0;
    source.flags = 0x1'0000;
    const Bytes file = source.bytes();
    const KernelFile kernel = read_kernel_file(file);
    ASSERT_TRUE(kernel.multiboot1 && kernel.multiboot1->placement);
    EXPECT_EQ(kernel.multiboot1->placement->file_size, file.size() - 0x20);
    EXPECT_EQ(kernel.multiboot1->placement->bss_end, GuestPhys{load_at + file.size() - 0x20});
    EXPECT_FALSE(kernel.multiboot1->video);
}

TEST(Multiboot1Test, IsFoundWhereItMayBe) {
    Multiboot1File source;
    source.video.clear();
    source.flags = 0x1'0003;
    const auto found = [&source](std::size_t offset) {
        source.offset = offset;
        source.header = static_cast<std::uint32_t>(load_at + offset);
        const Bytes file = source.bytes();
        const KernelFile kernel = read_kernel_file(file);
        return kernel.offers(Protocol::multiboot1) && kernel.multiboot1->offset == offset;
    };
    source.entry = load_at;
    source.load_end = load_at + 0x8000;
    source.bss_end = 0;
    EXPECT_TRUE(found(0));
    EXPECT_TRUE(found(4));
    EXPECT_FALSE(found(6)) << "not aligned";
    EXPECT_TRUE(found(8192 - 32));
    EXPECT_FALSE(found(8192 - 28)) << "its entry is outside";
    EXPECT_FALSE(found(8192));
}

TEST(Multiboot1Test, EachDamagedFieldHasItsMessage) {
    struct Case {
        std::string_view message; ///< part of it
        std::function<void(Multiboot1File&)> damage;
    };
    const std::vector<Case> cases{
        {"check sum", [](Multiboot1File& file) { file.sum_error = 1; }},
        {"features (flags 0x8)", [](Multiboot1File& file) { file.flags |= 8; }},
        {"features (flags 0x8000)", [](Multiboot1File& file) { file.flags |= 0x8000; }},
        {"no ELF", [](Multiboot1File& file) { file.flags &= 0xffff; }},
        {"below the load address", [](Multiboot1File& file) { file.header = load_at - 4; }},
        {"only 0x40 are in the file", [](Multiboot1File& file) { file.header = load_at + 0x44; }},
        {"behind the end", [](Multiboot1File& file) { file.load_end = load_at + 0x20; }},
        {"behind the end", [](Multiboot1File& file) { file.load_end = load_at - 1; }},
        {"truncated", [](Multiboot1File& file) { file.load_end = load_at + 0xffe1; }},
        {"before what is loaded", [](Multiboot1File& file) { file.bss_end = load_at + 0xfff; }},
        {"entry", [](Multiboot1File& file) { file.entry = load_at - 1; }},
        {"entry", [](Multiboot1File& file) { file.entry = load_at + 0x1000; }},
        {"below 4 GB",
         [](Multiboot1File& file) {
             file.load = 0xffff'ff00;
             file.header = file.load + 0x20;
             file.load_end = 0;
         }},
    };
    for (const Case& c : cases) {
        Multiboot1File file;
        c.damage(file);
        expect_problem(file.bytes(), Protocol::multiboot1, c.message);
    }
}

TEST(Multiboot1Test, EveryTruncationIsRefused) {
    const Bytes file = Multiboot1File().bytes();
    for (std::size_t size = 0; size < 0x1020; ++size)
        EXPECT_FALSE(read_kernel_file(first(file, size)).offers(Protocol::multiboot1)) << size;
    EXPECT_TRUE(read_kernel_file(first(file, 0x1020)).offers(Protocol::multiboot1));
}

TEST(Multiboot1Test, AWrongCheckSumDoesNotHideTheHeaderBehindIt) {
    Multiboot1File source;
    Bytes file = source.bytes();
    put_words(file, 0, {0x1badb002, 0, 0});
    EXPECT_TRUE(read_kernel_file(file).offers(Protocol::multiboot1));
}

// --- multiboot 2

struct Tag {
    std::uint16_t type, flags;
    Words contents;
    std::uint32_t size_error = 0;
};

enum TagIndex {
    request_tag,
    address_tag,
    entry_tag,
    console_tag,
    framebuffer_tag,
    module_tag,
    efi_tag,
    relocatable_tag
};

struct Multiboot2File {
    std::uint32_t magic = 0xe85250d6, architecture = 0, length_error = 0, sum_error = 0;
    std::vector<Tag> tags{{1, 0, {1, 3, 6}},
                          {2, 0, {load_at + 0x20, load_at, load_at + 0x1000, load_at + 0x3000}},
                          {3, 0, {load_at + 0x80}},
                          {4, 0, {3}},
                          {5, 1, {1024, 768, 32}},
                          {6, 0, {}},
                          {7, 0, {}},
                          {10, 0, {0x100000, 0xfff'ffff, 0x1000, 2}}};
    bool has_end = true;
    std::size_t offset = header_at;
    Bytes around = plain_file();

    [[nodiscard]] Bytes bytes() const {
        Bytes file = around;
        std::size_t at = offset + 16;
        for (const Tag& tag : tags) {
            const auto size = static_cast<std::uint32_t>(8 + tag.contents.size() * 4);
            put(file, at, tag.type);
            put(file, at + 2, tag.flags);
            put(file, at + 4, size + tag.size_error);
            put_words(file, at + 8, tag.contents);
            at = (at + size + 7) / 8 * 8;
        }
        if (has_end) {
            put_words(file, at, {0, 8});
            at += 8;
        }
        const auto length = static_cast<std::uint32_t>(at - offset) + length_error;
        put_words(file, offset, {magic, architecture, length, 0 - magic - architecture - length + sum_error});
        return file;
    }
};

TEST(Multiboot2Test, EachTagIsRead) {
    const Bytes file = Multiboot2File().bytes();
    const KernelFile kernel = read_kernel_file(file);
    EXPECT_EQ(kernel.protocols(), (Protocols{Protocol::multiboot2, Protocol::flat, Protocol::flat32}))
        << kernel.problem(Protocol::multiboot2);
    ASSERT_TRUE(kernel.multiboot2);
    const Multiboot2Header& header = *kernel.multiboot2;
    EXPECT_EQ(header.offset, header_at);
    EXPECT_EQ(header.architecture, 0U);
    EXPECT_EQ(header.length, 16U + 24 + 24 + 16 + 16 + 24 + 8 + 8 + 24 + 8);
    ASSERT_EQ(header.tags.size(), 8U);
    EXPECT_EQ(header.tags[framebuffer_tag].type, 5);
    EXPECT_EQ(header.tags[framebuffer_tag].size, 20U);
    EXPECT_TRUE(header.tags[framebuffer_tag].optional);
    EXPECT_FALSE(header.tags[request_tag].optional);
    ASSERT_EQ(header.requests.size(), 3U);
    EXPECT_EQ(header.requests[0].type, 1U);
    EXPECT_EQ(header.requests[2].type, 6U);
    EXPECT_FALSE(header.requests[2].optional);
    ASSERT_TRUE(header.placement);
    EXPECT_EQ(header.placement->file_offset, 0x20U);
    EXPECT_EQ(header.placement->file_size, 0x1000U);
    EXPECT_EQ(header.placement->load, GuestPhys{load_at});
    EXPECT_EQ(header.placement->bss_end, GuestPhys{load_at + 0x3000});
    EXPECT_EQ(header.placement->entry, GuestPhys{load_at + 0x80});
    EXPECT_EQ(header.entry, GuestPhys{load_at + 0x80});
    EXPECT_EQ(header.console_flags, 3U);
    ASSERT_TRUE(header.framebuffer);
    EXPECT_EQ(header.framebuffer->width, 1024U);
    EXPECT_EQ(header.framebuffer->height, 768U);
    EXPECT_EQ(header.framebuffer->depth, 32U);
    EXPECT_TRUE(header.framebuffer->optional);
    EXPECT_TRUE(header.page_aligned_modules);
    ASSERT_TRUE(header.relocation);
    EXPECT_EQ(header.relocation->lowest, GuestPhys{0x100000});
    EXPECT_EQ(header.relocation->highest, GuestPhys{0xfff'ffff});
    EXPECT_EQ(header.relocation->alignment, 0x1000U);
    EXPECT_EQ(header.relocation->preference, 2U);
}

TEST(Multiboot2Test, CanBeLoadedFromTheFilesStart) {
    Multiboot2File source;
    source.tags[address_tag].contents[1] = 0xffff'ffff;
    source.tags[address_tag].contents[0] = load_at + header_at;
    const Bytes file = source.bytes();
    const KernelFile kernel = read_kernel_file(file);
    ASSERT_TRUE(kernel.multiboot2 && kernel.multiboot2->placement) << kernel.problem(Protocol::multiboot2);
    EXPECT_EQ(kernel.multiboot2->placement->file_offset, 0U);
    EXPECT_EQ(kernel.multiboot2->placement->load, GuestPhys{load_at});
}

TEST(Multiboot2Test, IsFoundWhereItMayBe) {
    Multiboot2File source;
    std::erase_if(source.tags, [](const Tag& tag) { return tag.type != 2 && tag.type != 3; });
    constexpr std::size_t length = 16 + 24 + 16 + 8;
    const auto found = [&source](std::size_t offset) {
        source.offset = offset;
        source.tags[0].contents = {static_cast<std::uint32_t>(load_at + offset), load_at, 0, 0};
        const Bytes file = source.bytes();
        const KernelFile kernel = read_kernel_file(file);
        return kernel.offers(Protocol::multiboot2) && kernel.multiboot2->offset == offset;
    };
    EXPECT_TRUE(found(0));
    EXPECT_TRUE(found(8));
    EXPECT_FALSE(found(12)) << "not aligned";
    EXPECT_TRUE(found(32768 - length));
    EXPECT_FALSE(found(32768 - length + 8)) << "its end is outside";
    EXPECT_FALSE(found(32768));
}

TEST(Multiboot2Test, EachDamagedFieldHasItsMessage) {
    struct Case {
        std::string_view message; ///< part of it
        std::function<void(Multiboot2File&)> damage;
    };
    const std::vector<Case> cases{
        {"check sum", [](Multiboot2File& file) { file.sum_error = 1; }},
        {"architecture 4", [](Multiboot2File& file) { file.architecture = 4; }},
        {"first 32768", [](Multiboot2File& file) { file.length_error = 0x8000; }},
        {"do not end", [](Multiboot2File& file) { file.length_error = 0U - 8; }},
        {"do not end", [](Multiboot2File& file) { file.has_end = false; }},
        {"first 32768", [](Multiboot2File& file) { file.length_error = 0U - 152 - 1 - 8; }},
        {"unknown type 11",
         [](Multiboot2File& file) {
             file.tags.push_back({11, 0, {}});
         }},
        {"of type 6 has 7 bytes", [](Multiboot2File& file) { file.tags[module_tag].size_error = 0U - 1; }},
        {"of type 7 has", [](Multiboot2File& file) { file.tags[efi_tag].size_error = 0x7fff'ff00; }},
        {"list of information requests", [](Multiboot2File& file) { file.tags[request_tag].size_error = 1; }},
        {"too few for a tag of type 2",
         [](Multiboot2File& file) { file.tags[address_tag].contents.pop_back(); }},
        {"too few for a tag of type 3", [](Multiboot2File& file) { file.tags[entry_tag].contents.clear(); }},
        {"too few for a tag of type 4",
         [](Multiboot2File& file) { file.tags[console_tag].contents.clear(); }},
        {"too few for a tag of type 5",
         [](Multiboot2File& file) { file.tags[framebuffer_tag].contents.pop_back(); }},
        {"too few for a tag of type 10",
         [](Multiboot2File& file) { file.tags[relocatable_tag].contents.pop_back(); }},
        {"cannot be relocated",
         [](Multiboot2File& file) { file.tags[relocatable_tag].contents[0] = 0x1000'0000; }},
        {"alignment 0x3", [](Multiboot2File& file) { file.tags[relocatable_tag].contents[2] = 3; }},
        {"alignment 0x0", [](Multiboot2File& file) { file.tags[relocatable_tag].contents[2] = 0; }},
        {"not where to enter", [](Multiboot2File& file) { file.tags.erase(file.tags.begin() + entry_tag); }},
        {"no ELF", [](Multiboot2File& file) { file.tags.erase(file.tags.begin() + address_tag); }},
        {"below the load address",
         [](Multiboot2File& file) { file.tags[address_tag].contents[0] = load_at - 1; }},
        {"begin below 0",
         [](Multiboot2File& file) {
             file.tags[address_tag].contents = {header_at - 1, 0xffff'ffff, 0, 0};
         }},
        {"truncated", [](Multiboot2File& file) { file.tags[address_tag].contents[2] = load_at + 0xffe1; }},
        {"bss ends", [](Multiboot2File& file) { file.tags[address_tag].contents[3] = load_at; }},
        {"entry", [](Multiboot2File& file) { file.tags[entry_tag].contents[0] = load_at + 0x1000; }},
    };
    for (const Case& c : cases) {
        Multiboot2File file;
        c.damage(file);
        expect_problem(file.bytes(), Protocol::multiboot2, c.message);
    }
}

TEST(Multiboot2Test, OptionalTagsNeedNotBeKnown) {
    Multiboot2File source;
    source.tags.push_back({11, 1, {1, 2, 3}});
    source.tags.push_back({0xffff, 1, {}});
    const Bytes file = source.bytes();
    EXPECT_TRUE(read_kernel_file(file).offers(Protocol::multiboot2));
}

TEST(Multiboot2Test, EveryTruncationIsRefused) {
    const Bytes file = Multiboot2File().bytes();
    for (std::size_t size = 0; size < 0x1020; ++size)
        EXPECT_FALSE(read_kernel_file(first(file, size)).offers(Protocol::multiboot2)) << size;
    EXPECT_TRUE(read_kernel_file(first(file, 0x1020)).offers(Protocol::multiboot2));
}

// --- ELF

struct Elf32Types {
    using Header = Elf32_Ehdr;
    using Program = Elf32_Phdr;
    using Section = Elf32_Shdr;
    static constexpr unsigned char file_class = ELFCLASS32;
    static constexpr Elf32_Half machine = EM_386;
    static constexpr Protocol protocol = Protocol::elf32;
    static constexpr std::uint32_t virtual_base = 0xc000'0000;
};

struct Elf64Types {
    using Header = Elf64_Ehdr;
    using Program = Elf64_Phdr;
    using Section = Elf64_Shdr;
    static constexpr unsigned char file_class = ELFCLASS64;
    static constexpr Elf64_Half machine = EM_X86_64;
    static constexpr Protocol protocol = Protocol::elf64;
    static constexpr std::uint64_t virtual_base = 0xffff'ffff'8000'0000;
};

struct Note {
    std::string name;
    std::uint32_t type = 0;
    Bytes contents;
    std::uint32_t name_error = 0, contents_error = 0;
};

template<class T>
Bytes raw(const T& value) {
    Bytes bytes(sizeof value);
    std::memcpy(bytes.data(), &value, sizeof value);
    return bytes;
}

Note pvh_note(const Bytes& contents) {
    return {"Xen", 18, contents};
}

Bytes note_bytes(const std::vector<Note>& notes, std::size_t alignment) {
    Bytes bytes;
    const auto append = [&](const Bytes& part) {
        bytes.insert(bytes.end(), part.begin(), part.end());
        return bytes.size();
    };
    const auto pad = [&] { bytes.resize((bytes.size() + alignment - 1) / alignment * alignment); };
    for (const Note& note : notes) {
        append(raw(static_cast<std::uint32_t>(note.name.size() + 1 + note.name_error)));
        append(raw(static_cast<std::uint32_t>(note.contents.size() + note.contents_error)));
        append(raw(note.type));
        append(bytes_of(note.name + '\0'));
        pad();
        append(note.contents);
        pad();
    }
    return bytes;
}

constexpr std::size_t code_segment = 0, data_segment = 1, note_segment = 2;
constexpr std::size_t text_section = 1, bss_section = 2, names_section = 3;

/// An executable: code at 1 MB, data with bss at 2 MB, notes, and sections at the end of the file.
template<class Types>
struct ElfSource {
    typename Types::Header header{};
    std::vector<typename Types::Program> segments{3};
    std::vector<typename Types::Section> sections{4};
    std::vector<Note> notes{{"GNU", 3, bytes_of("build id")}};
    std::size_t note_alignment = 4;
    std::string code = "code: the kernel", data = "data: of the kernel";
    std::string names = std::string("\0.text\0.bss\0.shstrtab\0", 22);

    ElfSource() {
        std::memcpy(header.e_ident, ELFMAG, SELFMAG);
        header.e_ident[EI_CLASS] = Types::file_class;
        header.e_ident[EI_DATA] = ELFDATA2LSB;
        header.e_ident[EI_VERSION] = EV_CURRENT;
        header.e_type = ET_EXEC;
        header.e_machine = Types::machine;
        header.e_version = EV_CURRENT;
        header.e_entry = 0x100004;
        header.e_ehsize = sizeof header;
        header.e_phentsize = sizeof(typename Types::Program);
        header.e_shentsize = sizeof(typename Types::Section);
        header.e_shstrndx = names_section;
        segments[code_segment].p_type = segments[data_segment].p_type = PT_LOAD;
        segments[code_segment].p_flags = PF_R | PF_X;
        segments[data_segment].p_flags = PF_R | PF_W;
        segments[code_segment].p_paddr = 0x100000;
        segments[data_segment].p_paddr = 0x200000;
        segments[note_segment].p_type = PT_NOTE;
        sections[text_section].sh_name = 1;
        sections[text_section].sh_type = SHT_PROGBITS;
        sections[text_section].sh_flags = SHF_ALLOC | SHF_EXECINSTR;
        sections[bss_section].sh_name = 7;
        sections[bss_section].sh_type = SHT_NOBITS;
        sections[bss_section].sh_size = 0x2000;
        sections[names_section].sh_name = 12;
        sections[names_section].sh_type = SHT_STRTAB;
        place();
    }

    /// Computes offsets, sizes and counts; damage is done after this.
    ElfSource& place() {
        using Header = typename Types::Header;
        using Program = typename Types::Program;
        std::size_t at = sizeof(Header) + segments.size() * sizeof(Program);
        const auto lay = [&at](auto& offset, auto& size, std::size_t count) {
            offset = static_cast<std::remove_reference_t<decltype(offset)>>(at);
            size = static_cast<std::remove_reference_t<decltype(size)>>(count);
            at += count;
        };
        header.e_phoff = sizeof(Header);
        header.e_phnum = static_cast<Elf64_Half>(segments.size());
        header.e_shnum = static_cast<Elf64_Half>(sections.size());
        auto& text = segments[code_segment];
        lay(text.p_offset, text.p_filesz, code.size());
        sections[text_section].sh_offset = text.p_offset;
        sections[text_section].sh_size = text.p_memsz = text.p_filesz;
        text.p_vaddr = Types::virtual_base + text.p_paddr;
        sections[text_section].sh_addr = text.p_vaddr;
        auto& other = segments[data_segment];
        lay(other.p_offset, other.p_filesz, data.size());
        other.p_memsz = 0x3000;
        auto& note = segments[note_segment];
        note.p_align = static_cast<std::remove_reference_t<decltype(note.p_align)>>(note_alignment);
        at = (at + 7) / 8 * 8;
        lay(note.p_offset, note.p_filesz, note_bytes(notes, note_alignment).size());
        lay(sections[names_section].sh_offset, sections[names_section].sh_size, names.size());
        header.e_shoff = static_cast<decltype(header.e_shoff)>(at);
        return *this;
    }

    [[nodiscard]] Bytes bytes() const {
        using Header = typename Types::Header;
        using Program = typename Types::Program;
        Bytes file;
        const auto append = [&file](const void* from, std::size_t size) {
            const auto* const begin = static_cast<const std::byte*>(from);
            file.insert(file.end(), begin, begin + size);
        };
        append(&header, sizeof(Header));
        append(segments.data(), segments.size() * sizeof(Program));
        append(code.data(), code.size());
        append(data.data(), data.size());
        file.resize((file.size() + 7) / 8 * 8);
        const Bytes packed_notes = note_bytes(notes, note_alignment);
        append(packed_notes.data(), packed_notes.size());
        append(names.data(), names.size());
        append(sections.data(), sections.size() * sizeof(typename Types::Section));
        return file;
    }
};

template<class T>
class ElfTest : public testing::Test {};

using ElfClasses = testing::Types<Elf32Types, Elf64Types>;
TYPED_TEST_SUITE(ElfTest, ElfClasses, );

TYPED_TEST(ElfTest, EachFieldIsRead) {
    const ElfSource<TypeParam> source;
    const Bytes file = source.bytes();
    const KernelFile kernel = read_kernel_file(file);
    EXPECT_EQ(kernel.protocols(), (Protocols{TypeParam::protocol, Protocol::flat, Protocol::flat32}));
    EXPECT_TRUE(kernel.problems.empty());
    EXPECT_FALSE(kernel.linux_image);
    ASSERT_TRUE(kernel.elf);
    const ElfFile& elf = *kernel.elf;
    EXPECT_EQ(elf.is_64_bit, (TypeParam::protocol == Protocol::elf64));
    EXPECT_EQ(elf.type, ET_EXEC);
    EXPECT_EQ(elf.machine, TypeParam::machine);
    EXPECT_EQ(elf.entry, 0x100004U);
    EXPECT_EQ(elf.end, file.size());
    ASSERT_EQ(elf.segments.size(), 3U);
    const ElfSegment& code = elf.segments[code_segment];
    EXPECT_EQ(code.type, PT_LOAD);
    EXPECT_EQ(code.flags, PF_R | PF_X);
    EXPECT_EQ(code.offset, source.segments[code_segment].p_offset);
    EXPECT_EQ(code.virtual_address, GuestVirt{TypeParam::virtual_base + 0x100000});
    EXPECT_EQ(code.physical_address, GuestPhys{0x100000});
    EXPECT_EQ(code.file_size, source.code.size());
    EXPECT_EQ(elf.segments[data_segment].file_size, source.data.size());
    EXPECT_EQ(elf.segments[data_segment].memory_size, 0x3000U);
    ASSERT_EQ(elf.sections.size(), 3U);
    EXPECT_EQ(elf.sections[0].name, ".text");
    EXPECT_EQ(elf.sections[0].type, SHT_PROGBITS);
    EXPECT_EQ(elf.sections[0].flags, SHF_ALLOC | SHF_EXECINSTR);
    EXPECT_EQ(elf.sections[0].address, code.virtual_address);
    EXPECT_EQ(elf.sections[0].offset, code.offset);
    EXPECT_EQ(elf.sections[0].size, source.code.size());
    EXPECT_EQ(elf.sections[1].name, ".bss");
    EXPECT_EQ(elf.sections[2].name, ".shstrtab");
    ASSERT_EQ(elf.notes.size(), 1U);
    EXPECT_EQ(elf.notes[0].name, "GNU");
    EXPECT_EQ(elf.notes[0].type, 3U);
    EXPECT_EQ(Bytes(elf.notes[0].contents.begin(), elf.notes[0].contents.end()), bytes_of("build id"));
}

TYPED_TEST(ElfTest, EachDamagedFieldHasItsMessage) {
    using Source = ElfSource<TypeParam>;
    struct Case {
        std::string_view message; ///< part of it
        std::function<void(Source&)> damage;
    };
    using Offset = decltype(Source().header.e_phoff);
    constexpr auto huge = static_cast<Offset>(~Offset{0});
    const std::vector<Case> cases{
        {"little-endian", [](Source& elf) { elf.header.e_ident[EI_DATA] = ELFDATA2MSB; }},
        {"unknown ELF version", [](Source& elf) { elf.header.e_ident[EI_VERSION] = 2; }},
        {"unknown ELF version", [](Source& elf) { elf.header.e_version = 0; }},
        {"machine type 183", [](Source& elf) { elf.header.e_machine = EM_AARCH64; }},
        {"relocatable object", [](Source& elf) { elf.header.e_type = ET_REL; }},
        {"-no-pie", [](Source& elf) { elf.header.e_type = ET_DYN; }},
        {"of type 4", [](Source& elf) { elf.header.e_type = ET_CORE; }},
        {"nothing to load", [](Source& elf) { elf.header.e_phnum = 0; }},
        {"more than 65534", [](Source& elf) { elf.header.e_phnum = PN_XNUM; }},
        {"program headers lie outside", [](Source& elf) { elf.header.e_phnum = 0xfffe; }},
        {"program headers of 33 bytes", [](Source& elf) { elf.header.e_phentsize = 33; }},
        {"program headers lie outside", [](Source& elf) { elf.header.e_phoff = huge; }},
        {"more bytes in the file", [](Source& elf) { elf.segments[data_segment].p_memsz = 4; }},
        {"lies outside the file", [](Source& elf) { elf.segments[data_segment].p_offset = huge; }},
        {"lies outside the file", [](Source& elf) { elf.segments[data_segment].p_filesz = 0x2000; }},
        {"nothing to load",
         [](Source& elf) {
             elf.segments[code_segment].p_type = elf.segments[data_segment].p_type = PT_NULL;
         }},
    };
    for (const Case& c : cases) {
        Source elf;
        c.damage(elf);
        expect_problem(elf.bytes(), TypeParam::protocol, c.message);
    }
    Source elf;
    elf.header.e_ident[EI_CLASS] = 9;
    expect_problem(elf.bytes(), Protocol::elf64, "class 9");
}

TYPED_TEST(ElfTest, DamagedSectionsAreToldAndLeftOut) {
    using Source = ElfSource<TypeParam>;
    struct Case {
        std::string_view message; ///< part of it
        std::function<void(Source&)> damage;
    };
    const std::vector<Case> cases{
        {"section headers of 33 bytes", [](Source& elf) { elf.header.e_shentsize = 33; }},
        {"section headers lie outside", [](Source& elf) { ++elf.header.e_shnum; }},
        {"section headers lie outside", [](Source& elf) { elf.header.e_shoff += 1; }},
        {"more than 65279 sections", [](Source& elf) { elf.header.e_shnum = 0; }},
        {"none of its 4 sections", [](Source& elf) { elf.header.e_shstrndx = 4; }},
        {"names of its sections", [](Source& elf) { elf.sections[names_section].sh_size = 0x10000; }},
        {"a section at", [](Source& elf) { elf.sections[text_section].sh_size = 0x10000; }},
    };
    for (const Case& c : cases) {
        Source elf;
        c.damage(elf);
        const Bytes file = elf.bytes();
        const KernelFile kernel = read_kernel_file(file);
        EXPECT_TRUE(kernel.offers(TypeParam::protocol)) << c.message;
        EXPECT_TRUE(kernel.elf && kernel.elf->sections.empty()) << c.message;
        ASSERT_EQ(kernel.problems.size(), 1U) << c.message;
        EXPECT_EQ(kernel.problems[0].protocol, std::nullopt);
        EXPECT_TRUE(contains(kernel.problems[0].what, c.message)) << kernel.problems[0].what;
    }
}

TYPED_TEST(ElfTest, NamesOfSectionsAreBoundedAndPrintable) {
    ElfSource<TypeParam> source;
    source.names += "a\n\x1b[31m" + std::string(1000, 'x');
    source.sections[text_section].sh_name = 22;
    source.sections[bss_section].sh_name = 0xffff'ffff;
    const Bytes file = source.place().bytes();
    const KernelFile kernel = read_kernel_file(file);
    ASSERT_TRUE(kernel.elf);
    ASSERT_EQ(kernel.elf->sections.size(), 3U);
    EXPECT_EQ(kernel.elf->sections[0].name, "a??[31m" + std::string(57, 'x'));
    EXPECT_EQ(kernel.elf->sections[1].name, "");
}

TYPED_TEST(ElfTest, WithoutSectionsEveryTruncationIsRefused) {
    ElfSource<TypeParam> source;
    source.notes.clear();
    source.place();
    source.header.e_shoff = 0;
    const Bytes file = source.bytes();
    const std::size_t end = source.segments[data_segment].p_offset + source.data.size();
    EXPECT_TRUE(read_kernel_file(first(file, (end + 7) / 8 * 8)).offers(TypeParam::protocol));
    for (std::size_t size = 0; size < end; ++size)
        EXPECT_FALSE(read_kernel_file(first(file, size)).offers(TypeParam::protocol)) << size;
}

TYPED_TEST(ElfTest, BytesBehindItAreTold) {
    Bytes file = ElfSource<TypeParam>().bytes();
    const std::size_t end = file.size();
    file.resize(end + 100);
    const KernelFile kernel = read_kernel_file(file);
    ASSERT_TRUE(kernel.elf);
    EXPECT_EQ(kernel.elf->end, end);
}

TYPED_TEST(ElfTest, ATableWithoutEntriesHasNoPlace) {
    ElfSource<TypeParam> source;
    source.header.e_phnum = 0;
    source.header.e_phoff = 0x7fff'ffff;
    const Bytes file = source.bytes();
    const KernelFile kernel = read_kernel_file(file);
    ASSERT_TRUE(kernel.elf);
    EXPECT_EQ(kernel.elf->end, file.size());
}

// --- notes

TYPED_TEST(ElfTest, PvhNoteOffersItsEntry) {
    for (const Bytes& contents : {raw(std::uint32_t{0x100008}), raw(std::uint64_t{0x100008})}) {
        for (const std::size_t alignment : {4U, 8U}) {
            ElfSource<TypeParam> source;
            source.notes = {{"odd", 1, bytes_of("12345")}, pvh_note(contents)};
            source.note_alignment = alignment;
            const Bytes file = source.place().bytes();
            const KernelFile kernel = read_kernel_file(file);
            EXPECT_EQ(kernel.protocols(),
                      (Protocols{Protocol::pvh, TypeParam::protocol, Protocol::flat, Protocol::flat32}));
            EXPECT_EQ(kernel.pvh_entry, GuestPhys{0x100008});
            ASSERT_EQ(kernel.elf->notes.size(), 2U);
        }
    }
}

TYPED_TEST(ElfTest, NotesOfSectionsCountWithoutASegmentOfThem) {
    ElfSource<TypeParam> source;
    source.notes = {pvh_note(raw(std::uint32_t{0x100008}))};
    source.place();
    source.segments[note_segment].p_type = PT_NULL;
    source.sections[text_section].sh_type = SHT_NOTE;
    source.sections[text_section].sh_offset = source.segments[note_segment].p_offset;
    source.sections[text_section].sh_size = source.segments[note_segment].p_filesz;
    Bytes file = source.bytes();
    EXPECT_EQ(read_kernel_file(file).pvh_entry, GuestPhys{0x100008});

    source.segments[note_segment].p_type = PT_NOTE;
    source.segments[note_segment].p_filesz = 0;
    file = source.bytes();
    EXPECT_EQ(read_kernel_file(file).pvh_entry, std::nullopt);
}

TYPED_TEST(ElfTest, DamagedNotesOfferNoPvh) {
    using Source = ElfSource<TypeParam>;
    struct Case {
        std::string_view message; ///< part of it
        std::vector<Note> notes;
        std::function<void(Source&)> damage;
    };
    const std::uint32_t entry = 0x100008;
    const auto nothing = [](Source&) {};
    Note long_name = pvh_note(raw(entry)), long_contents = pvh_note(raw(entry)),
         huge_name = pvh_note(raw(entry));
    long_name.name_error = 5;
    long_contents.contents_error = 5;
    huge_name.name_error = 0xffff'fff0;
    const std::vector<Case> cases{
        {"an entry of 0 bytes", {pvh_note({})}, nothing},
        {"an entry of 3 bytes", {pvh_note(bytes_of("abc"))}, nothing},
        {"an entry of 9 bytes", {pvh_note(bytes_of("123456789"))}, nothing},
        {"not below 4 GB", {pvh_note(raw(std::uint64_t{1} << 32))}, nothing},
        {"beyond the notes", {long_name}, nothing},
        {"beyond the notes", {long_contents}, nothing},
        {"beyond the notes", {huge_name}, nothing},
        {"within its header",
         {pvh_note(raw(entry))},
         [](Source& elf) { elf.segments[note_segment].p_filesz = 11; }},
        {"notes lie outside",
         {pvh_note(raw(entry))},
         [](Source& elf) { elf.segments[note_segment].p_filesz = 0x10000; }},
        {"more than 1024 notes", std::vector<Note>(1025, Note{"a", 1, {}}), nothing},
    };
    for (const Case& c : cases) {
        Source elf;
        elf.notes = c.notes;
        elf.place();
        c.damage(elf);
        expect_problem(elf.bytes(), Protocol::pvh, c.message);
        const Bytes file = elf.bytes();
        EXPECT_TRUE(read_kernel_file(file).offers(TypeParam::protocol)) << "needs no notes";
    }
    Source elf;
    elf.notes = {pvh_note(raw(entry))};
    elf.place().header.e_type = ET_DYN;
    expect_problem(elf.bytes(), Protocol::pvh, "-no-pie");
}

TEST(LinuxElfTest, IsToldByItsNotes) {
    const auto protocols = [](const std::vector<Note>& notes) {
        ElfSource<Elf64Types> source;
        source.notes = notes;
        const Bytes file = source.place().bytes();
        return read_kernel_file(file).protocols();
    };
    const Note entry = pvh_note(raw(std::uint64_t{0x100008}));
    EXPECT_EQ(
        protocols({{"Linux", 0x100, bytes_of("salt")}, entry}),
        (Protocols{Protocol::linux64, Protocol::pvh, Protocol::elf64, Protocol::flat, Protocol::flat32}));
    EXPECT_EQ(protocols({{"Xen", 6, bytes_of(std::string("linux\0", 6))}}),
              (Protocols{Protocol::linux64, Protocol::elf64, Protocol::flat, Protocol::flat32}));
    EXPECT_EQ(protocols({{"Xen", 6, bytes_of("NetBSD")}}),
              (Protocols{Protocol::elf64, Protocol::flat, Protocol::flat32}));

    ElfSource<Elf32Types> source;
    source.notes = {{"Linux", 0x100, bytes_of("salt")}};
    const Bytes file = source.place().bytes();
    EXPECT_EQ(read_kernel_file(file).protocols(),
              (Protocols{Protocol::elf32, Protocol::flat, Protocol::flat32}));
}

// --- ELF with multiboot headers

TYPED_TEST(ElfTest, OffersMultibootWithoutAddresses) {
    ElfSource<TypeParam> source;
    source.code = std::string(0x200, '\x90');
    source.notes = {pvh_note(raw(std::uint32_t{0x100008}))};
    source.place();
    const std::size_t code = (source.segments[code_segment].p_offset + 7) / 8 * 8;

    Multiboot2File second;
    second.tags = {{3, 0, {0x100010}}};
    second.offset = code + 0x100;
    second.around = source.bytes();
    Multiboot1File both;
    both.flags = 3;
    both.header = both.load = both.load_end = both.bss_end = both.entry = ~std::uint32_t{0};
    both.video.clear();
    both.offset = code;
    both.around = second.bytes();
    Bytes file = both.bytes();
    KernelFile kernel = read_kernel_file(file);
    EXPECT_EQ(kernel.protocols(), (Protocols{Protocol::pvh, Protocol::multiboot1, Protocol::multiboot2,
                                             TypeParam::protocol, Protocol::flat, Protocol::flat32}))
        << "PVH first, which needs no BIOS";
    ASSERT_TRUE(kernel.multiboot1 && kernel.multiboot2);
    EXPECT_FALSE(kernel.multiboot1->placement);
    EXPECT_FALSE(kernel.multiboot2->placement);
    EXPECT_EQ(kernel.multiboot2->entry, GuestPhys{0x100010});

    put(file, offsetof(typename TypeParam::Header, e_machine), Elf64_Half{EM_AARCH64});
    kernel = read_kernel_file(file);
    EXPECT_EQ(kernel.protocols(), (Protocols{Protocol::flat, Protocol::flat32}));
    for (const Protocol protocol :
         {Protocol::multiboot1, Protocol::multiboot2, Protocol::pvh, TypeParam::protocol})
        EXPECT_NE(kernel.problem(protocol).find("machine type 183"), std::string_view::npos);
}

// --- bzImage

constexpr std::size_t setup_size = 1024, code_size = 0x410;

Bytes gzip(const Bytes& data) {
    z_stream stream{};
    EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY), Z_OK);
    Bytes packed(deflateBound(&stream, data.size())), input = data;
    stream.next_in = reinterpret_cast<Bytef*>(input.data());
    stream.avail_in = static_cast<uInt>(input.size());
    stream.next_out = reinterpret_cast<Bytef*>(packed.data());
    stream.avail_out = static_cast<uInt>(packed.size());
    EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
    packed.resize(stream.total_out);
    deflateEnd(&stream);
    return packed;
}

struct BzImage {
    setup_header header{};
    std::string version = "6.1.0-test (someone)";
    std::size_t payload_at = 0x210;
    Bytes payload;

    BzImage() {
        ElfSource<Elf64Types> vmlinux;
        vmlinux.notes = {{"Linux", 0x100, bytes_of("salt")}};
        payload = gzip(vmlinux.place().bytes());
        header.setup_sects = 1;
        header.syssize = (code_size + 15) / 16;
        header.boot_flag = 0xaa55;
        header.jump = 0x6aeb; // over the header, which ends at 0x26c
        header.header = 0x53726448;
        header.version = 0x020f;
        header.kernel_version = 0x100; // from 0x200
        header.loadflags = LOADED_HIGH;
        header.initrd_addr_max = 0x7fff'ffff;
        header.kernel_alignment = 0x200000;
        header.relocatable_kernel = 1;
        header.xloadflags = XLF_KERNEL_64;
        header.cmdline_size = 2047;
        header.pref_address = 0x1000000;
        header.init_size = 0x345000;
        header.payload_offset = static_cast<std::uint32_t>(payload_at);
        header.payload_length = static_cast<std::uint32_t>(payload.size());
    }
    [[nodiscard]] Bytes bytes() const {
        Bytes file(setup_size + code_size);
        std::memcpy(file.data() + 0x1f1, &header, sizeof header);
        std::memcpy(file.data() + 0x300, version.data(), version.size());
        EXPECT_LE(payload_at + payload.size(), code_size);
        std::ranges::copy(payload, file.data() + setup_size + payload_at);
        return file;
    }
};

TEST(BzImageTest, EachFieldIsRead) {
    const BzImage source;
    const Bytes file = source.bytes();
    const KernelFile kernel = read_kernel_file(file);
    EXPECT_EQ(kernel.protocols(),
              (Protocols{Protocol::linux64, Protocol::linux32, Protocol::flat, Protocol::flat32}));
    EXPECT_TRUE(kernel.problems.empty());
    ASSERT_TRUE(kernel.linux_image);
    const LinuxImage& image = *kernel.linux_image;
    EXPECT_TRUE(image.is_bzimage);
    EXPECT_TRUE(image.has_64_bit_entry);
    EXPECT_EQ(std::memcmp(&image.header, &source.header, 0x26c - 0x1f1), 0);
    EXPECT_EQ(image.version, "6.1.0-test (someone)");
    EXPECT_EQ(image.code_offset, setup_size);
    EXPECT_EQ(image.code_size, code_size);
    EXPECT_EQ(Bytes(image.payload.begin(), image.payload.end()), source.payload);
    EXPECT_EQ(image.compression, Compression::gzip);
}

TEST(BzImageTest, WithoutA64BitEntryOffersThe32BitOne) {
    BzImage source;
    source.header.xloadflags = 0;
    Bytes file = source.bytes();
    EXPECT_EQ(read_kernel_file(file).protocols(),
              (Protocols{Protocol::linux32, Protocol::flat, Protocol::flat32}));
    expect_problem(file, Protocol::linux64, "32-bit kernel");

    source.header.xloadflags = XLF_KERNEL_64; // means something since 2.12 only
    source.header.version = 0x020b;
    file = source.bytes();
    EXPECT_EQ(read_kernel_file(file).protocols(),
              (Protocols{Protocol::linux32, Protocol::flat, Protocol::flat32}));
}

TEST(BzImageTest, EachDamagedFieldHasItsMessage) {
    struct Case {
        std::string_view message; ///< part of it
        std::function<void(BzImage&)> damage;
    };
    const std::vector<Case> cases{
        {"protocol 2.01", [](BzImage& image) { image.header.version = 0x0201; }},
        {"zImage", [](BzImage& image) { image.header.loadflags = 0; }},
        {"do not reach its entry", [](BzImage& image) { image.header.syssize = 0x200 / 16; }},
        {"do not reach its entry", [](BzImage& image) { image.header.syssize = 0; }},
        {"truncated bzImage", [](BzImage& image) { image.header.syssize += 1; }},
        {"truncated bzImage", [](BzImage& image) { image.header.syssize = 0xffff'ffff; }},
        {"truncated bzImage", [](BzImage& image) { image.header.setup_sects = 0; }},
        {"truncated bzImage", [](BzImage& image) { image.header.setup_sects = 0xff; }},
    };
    for (const Case& c : cases) {
        BzImage image;
        c.damage(image);
        expect_problem(image.bytes(), Protocol::linux64, c.message);
        const Bytes file = image.bytes();
        EXPECT_FALSE(read_kernel_file(file).offers(Protocol::linux32));
    }
    Bytes file = BzImage().bytes();
    file.resize(0x268);
    expect_problem(file, Protocol::linux64, "setup header ends at 0x26c");
}

/// As iPXE's header is: 2.07, where later versions have fields there are text and code, and no 32-bit entry.
TEST(BzImageTest, WhatOnlyItsSetupCodeCanStartIsToldWhatItIs) {
    BzImage ipxe;
    ipxe.header.version = 0x0207;
    ipxe.header.code32_start = 0;
    ipxe.version = "1.0.0+git";
    BzImage memdisk = ipxe;
    memdisk.header.version = 0x0203;
    memdisk.header.code32_start = 0x100000;
    memdisk.header.syssize = 0x5a5a'0000; // of 16 bits
    memdisk.version = "MEMDISK 6.04";
    for (const BzImage& image : {ipxe, memdisk}) {
        const Bytes file = image.bytes();
        const KernelFile kernel = read_kernel_file(file);
        EXPECT_EQ(kernel.protocols(), (Protocols{Protocol::flat, Protocol::flat32}));
        EXPECT_EQ(kernel.problems.size(), 1U);
        expect_problem(file, Protocol::linux64,
                       "like iPXE and memdisk (" + image.version + "): only its real-mode code");
    }
    // Kernels of the time say where their 32-bit code starts.
    ipxe.header.code32_start = 0x100000;
    EXPECT_TRUE(read_kernel_file(ipxe.bytes()).offers(Protocol::linux32));
    memdisk.header.syssize = 0x5a5a'0001;
    const Bytes file = memdisk.bytes();
    const KernelFile kernel = read_kernel_file(file);
    ASSERT_TRUE(kernel.offers(Protocol::linux32));
    EXPECT_EQ(kernel.linux_image->code_size, code_size) << "all of the file";
}

/// All of a header's bytes are set, and each field's last byte; Documentation/arch/x86/boot.rst has the
/// versions.
TEST(BzImageTest, FieldsThatCameLaterAreNotThere) {
    struct Field {
        std::uint16_t since;
        std::size_t offset, size;
    };
    constexpr std::array fields{Field{0x0201, 0x224, 2}, Field{0x0202, 0x226, 6}, Field{0x0205, 0x230, 5},
                                Field{0x020a, 0x235, 1}, Field{0x020c, 0x236, 2}, Field{0x0207, 0x23c, 12},
                                Field{0x0208, 0x248, 8}, Field{0x0209, 0x250, 8}, Field{0x020a, 0x258, 12},
                                Field{0x020b, 0x264, 4}, Field{0x020f, 0x268, 4}};
    BzImage source;
    std::memset(&source.header.heap_end_ptr, 0xa5, 0x26c - 0x224);
    source.header.code32_start = 0x100000;
    for (std::uint16_t version = 0x0202; version <= 0x0210; ++version) {
        source.header.version = version;
        const Bytes file = source.bytes();
        const setup_header header = read_setup_header(file);
        const auto* const bytes = reinterpret_cast<const unsigned char*>(&header);
        for (const Field& field : fields)
            for (std::size_t at = field.offset; at < field.offset + field.size; ++at)
                EXPECT_EQ(bytes[at - 0x1f1], version < field.since ? 0 : 0xa5)
                    << std::hex << version << ' ' << at;
        EXPECT_EQ(+header.initrd_addr_max, version < 0x0203 ? 0x37ff'ffffU : 0xa5a5'a5a5U) << version;
        EXPECT_EQ(+header.cmdline_size, version < 0x0206 ? 255U : 0xa5a5'a5a5U) << version;
    }
}

TEST(BzImageTest, ItsLastParagraphNeedNotBeComplete) {
    Bytes file = BzImage().bytes();
    file.resize(file.size() - 15);
    const KernelFile kernel = read_kernel_file(file);
    ASSERT_TRUE(kernel.linux_image);
    EXPECT_EQ(kernel.linux_image->code_size, code_size - 15);
    EXPECT_FALSE(read_kernel_file(first(file, file.size() - 1)).offers(Protocol::linux64));
}

TEST(BzImageTest, WithoutPayloadItIsStillAKernel) {
    BzImage source;
    source.header.payload_length = 0;
    Bytes file = source.bytes();
    KernelFile kernel = read_kernel_file(file);
    EXPECT_TRUE(kernel.offers(Protocol::linux64));
    EXPECT_TRUE(kernel.problems.empty());
    EXPECT_TRUE(kernel.linux_image->payload.empty());

    source.header.payload_length = code_size;
    file = source.bytes();
    kernel = read_kernel_file(file);
    EXPECT_TRUE(kernel.offers(Protocol::linux64));
    ASSERT_EQ(kernel.problems.size(), 1U);
    EXPECT_TRUE(contains(kernel.problems[0].what, "outside the file"));
}

TEST(BzImageTest, VersionIsInTheSetupCodeAndPrintable) {
    const auto version = [](const BzImage& source) {
        const Bytes file = source.bytes();
        return read_kernel_file(file).linux_image->version;
    };
    BzImage source;
    source.version = "6.1\n\x1b[31m";
    EXPECT_EQ(version(source), "6.1??[31m");
    source.version = std::string(200, 'x');
    EXPECT_EQ(version(source), std::string(128, 'x'));
    source.header.kernel_version = 0x200; // behind the setup code
    EXPECT_EQ(version(source), "");
    source.header.kernel_version = 0xffff;
    EXPECT_EQ(version(source), "");
    source.header.kernel_version = 0;
    EXPECT_EQ(version(source), "");
}

// --- umbra inspect

TEST(InspectTest, ShowsWhatABzImageContains) {
    const std::string text = inspect_kernel_file(BzImage().bytes());
    EXPECT_TRUE(text.starts_with("size        2064 bytes\nprotocols   linux, linux32, flat, flat32\n"))
        << text;
    EXPECT_TRUE(contains(text, "\nLinux       bzImage of boot protocol 2.15: 6.1.0-test (someone)\n"))
        << text;
    EXPECT_TRUE(contains(text,
                         "prefers address 0x1000000, takes 0x345000 bytes there; can be loaded elsewhere, "
                         "alignment 0x200000\n"))
        << text;
    EXPECT_TRUE(contains(text, "command line of at most 2047 bytes, initrd up to address 0x7fffffff\n"))
        << text;
    EXPECT_TRUE(contains(text, "\npayload     ")) << text;
    EXPECT_TRUE(contains(text, " bytes at 0x610, gzip\n")) << text;
    EXPECT_TRUE(contains(text, "\n  protocols   linux, elf64, flat, flat32\n")) << text;
    EXPECT_TRUE(contains(text, "\n  ELF         64-bit, type 2, machine 62, entry 0x100004\n")) << text;
    EXPECT_TRUE(contains(text, " LOAD     r-x ")) << text;
    EXPECT_TRUE(contains(text, " .text ")) << text;
    EXPECT_TRUE(contains(text, "\n  notes       Linux 0x100, 4 bytes: 73 61 6c 74\n")) << text;
}

TEST(InspectTest, TellsOfOldKernelsWhatTheyHave) {
    BzImage source;
    source.header.version = 0x0207;
    source.header.code32_start = 0x100000;
    source.header.pref_address = 0x3634'6136'332e'3532; // text, in iPXE
    source.header.init_size = 0x352d'3538;
    const std::string text = inspect_kernel_file(source.bytes());
    EXPECT_TRUE(contains(text, " is loaded to 0x100000; can be loaded elsewhere, alignment 0x200000\n"))
        << text;
    EXPECT_FALSE(contains(text, "payload")) << text;
    source.header.version = 0x0202;
    source.header.cmdline_size = source.header.initrd_addr_max = 0;
    EXPECT_TRUE(contains(inspect_kernel_file(source.bytes()),
                         "is loaded to 0x100000\n            command line of at most 255 bytes, initrd up to "
                         "address 0x37ffffff\n"))
        << inspect_kernel_file(source.bytes());
}

TEST(InspectTest, UnpacksCompressedFiles) {
    const Bytes plain = ElfSource<Elf32Types>().bytes();
    const Bytes packed = gzip(plain);
    EXPECT_EQ(inspect_kernel_file(packed), "compressed  " + std::to_string(packed.size()) +
                                               " bytes, gzip; unpacked:\n" + inspect_kernel_file(plain));
    EXPECT_THROW((void)inspect_kernel_file(first(packed, packed.size() - 1)), StartupError);
}

TEST(InspectTest, TellsProblems) {
    BzImage damaged;
    damaged.payload[10] ^= std::byte{0xff};
    EXPECT_TRUE(contains(inspect_kernel_file(damaged.bytes()), "damaged file: its gzip data"))
        << "and goes on";

    Multiboot1File source;
    source.sum_error = 1;
    EXPECT_EQ(inspect_kernel_file(source.bytes()),
              "size        65536 bytes\nprotocols   flat, flat32\n"
              "problems    multiboot1: damaged multiboot header at 0x40: its check sum is wrong\n");
}

TEST(InspectTest, ShowsMultibootHeaders) {
    EXPECT_EQ(inspect_kernel_file(Multiboot1File().bytes()),
              "size        65536 bytes\nprotocols   multiboot1, flat, flat32\n"
              "multiboot1  header at 0x40, flags 0x10007, modules on page boundaries, wants memory map\n"
              "            loaded to 0x100000: 0x1000 bytes from 0x20 in the file, zeros up to 0x103000; "
              "entry 0x100080\n"
              "            wants video mode of type 1: 80x25, depth 0\n");
    const std::string text = inspect_kernel_file(Multiboot2File().bytes());
    EXPECT_TRUE(contains(text, "\nmultiboot2  header at 0x40, 168 bytes, architecture 0\n")) << text;
    EXPECT_TRUE(contains(text, "asks for information of type 6\n")) << text;
    EXPECT_TRUE(contains(text, "asks for a framebuffer of 1024x768, depth 32 (optional)\n")) << text;
    EXPECT_TRUE(contains(text, "can be loaded anywhere in 0x100000-0xfffffff, alignment 0x1000\n")) << text;
}

TEST(InspectTest, LongTablesAreCut) {
    ElfSource<Elf64Types> source;
    source.notes.assign(100, {"an evil \x1b name", 1, Bytes(100)});
    const std::string text = inspect_kernel_file(source.place().bytes());
    EXPECT_TRUE(contains(text, "(36 more)\n")) << text;
    EXPECT_TRUE(contains(text, "an evil ? name 0x1, 100 bytes: 00")) << text;
    for (const char c : text)
        EXPECT_TRUE(c == '\n' || (c >= ' ' && c <= '~'));
}

} // namespace
} // namespace umbra
