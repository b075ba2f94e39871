// Unit tests of load_kernel() by each protocol: what is in memory and in the registers, against the
// protocol's specification. Kernels are made in memory.
#include "vmm/loader/loader.hpp"

#include "tests/unit/loader_fixture.hpp"
#include "vmm/machine.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <elf.h>
#include <gtest/gtest.h>
#include <zlib.h>

namespace umbra {
namespace {

using Protocol = KernelProtocol;
using Words = std::vector<std::uint32_t>;

// --- Kernels made in memory

struct Elf32 {
    using Header = Elf32_Ehdr;
    using Program = Elf32_Phdr;
    using Section = Elf32_Shdr;
    static constexpr unsigned char file_class = ELFCLASS32;
    static constexpr std::uint16_t machine = EM_386;
};

struct Elf64 {
    using Header = Elf64_Ehdr;
    using Program = Elf64_Phdr;
    using Section = Elf64_Shdr;
    static constexpr unsigned char file_class = ELFCLASS64;
    static constexpr std::uint16_t machine = EM_X86_64;
};

constexpr std::uint32_t text_address = 0x100000, bss_size = 0x1800;
constexpr std::size_t header_room = 0x1000; // for the ELF's headers, in front of the text

/// One executable segment, which begins with `text` and is followed by bss; PVH's note, if `pvh_entry` is
/// told; a symbol table and names of sections.
template<class Class>
struct SmallKernel {
    std::uint32_t address = text_address;
    std::uint32_t linked_above = 0; ///< virtual less physical address
    std::uint32_t flags = PF_R | PF_W | PF_X;
    std::uint32_t entry = text_address + 0x80;
    std::optional<std::uint32_t> pvh_entry;
    Bytes text = Bytes(0x400, std::byte{0x90});
    bool with_sections = false;

    [[nodiscard]] Bytes file() const {
        typename Class::Header header{};
        std::memcpy(header.e_ident, ELFMAG, SELFMAG);
        header.e_ident[EI_CLASS] = Class::file_class;
        header.e_ident[EI_DATA] = ELFDATA2LSB;
        header.e_ident[EI_VERSION] = EV_CURRENT;
        header.e_type = ET_EXEC;
        header.e_machine = Class::machine;
        header.e_version = EV_CURRENT;
        header.e_entry = entry;
        header.e_phoff = sizeof header;
        header.e_phentsize = sizeof(typename Class::Program);
        header.e_phnum = pvh_entry ? 2 : 1;

        Bytes bytes(header_room);
        bytes.insert(bytes.end(), text.begin(), text.end());
        typename Class::Program program{};
        program.p_type = PT_LOAD;
        program.p_flags = flags;
        program.p_offset = header_room;
        program.p_vaddr = address + linked_above;
        program.p_paddr = address;
        program.p_filesz = static_cast<std::uint32_t>(text.size());
        program.p_memsz = program.p_filesz + bss_size;
        put(bytes, sizeof header, program);
        if (pvh_entry) {
            const std::array<std::uint32_t, 5> note{4, 4, 18, 0x006e'6558, *pvh_entry}; // "Xen"
            program = {};
            program.p_type = PT_NOTE;
            program.p_offset = static_cast<std::uint32_t>(bytes.size());
            program.p_filesz = sizeof note;
            put(bytes, sizeof header + sizeof program, program);
            bytes.resize(bytes.size() + sizeof note);
            put(bytes, bytes.size() - sizeof note, note);
        }
        if (with_sections)
            add_sections(bytes, header);
        put(bytes, 0, header);
        return bytes;
    }

    static constexpr std::string_view names{"\0.text\0.symtab\0.shstrtab\0", 25};

  private:
    void add_sections(Bytes& bytes, typename Class::Header& header) const {
        std::array<typename Class::Section, 4> sections{};
        sections[1].sh_name = 1;
        sections[1].sh_type = SHT_PROGBITS;
        sections[1].sh_flags = SHF_ALLOC | SHF_EXECINSTR;
        sections[1].sh_addr = address;
        sections[1].sh_offset = header_room;
        sections[1].sh_size = static_cast<std::uint32_t>(text.size());
        sections[2].sh_name = 7;
        sections[2].sh_type = SHT_SYMTAB;
        sections[2].sh_offset = static_cast<std::uint32_t>(bytes.size());
        sections[2].sh_size = 48;
        bytes.insert(bytes.end(), 48, std::byte{0x5a});
        sections[3].sh_name = 15;
        sections[3].sh_type = SHT_STRTAB;
        sections[3].sh_offset = static_cast<std::uint32_t>(bytes.size());
        sections[3].sh_size = names.size();
        const Bytes text_of_names = bytes_of(names);
        bytes.insert(bytes.end(), text_of_names.begin(), text_of_names.end());
        header.e_shoff = static_cast<std::uint32_t>(bytes.size());
        header.e_shentsize = sizeof sections[0];
        header.e_shnum = sections.size();
        header.e_shstrndx = 3;
        bytes.resize(bytes.size() + sizeof sections);
        put(bytes, header.e_shoff, sections);
    }
};

void put_words(Bytes& bytes, std::size_t at, const Words& words) {
    for (std::size_t i = 0; i < words.size(); ++i)
        put(bytes, at + 4 * i, words[i]);
}

void put_multiboot1(Bytes& bytes, std::size_t at, std::uint32_t flags, const Words& rest = {}) {
    put_words(bytes, at, {MultibootHeader::magic, flags, 0 - MultibootHeader::magic - flags});
    put_words(bytes, at + 12, rest);
}

/// `tags` with their padding, but without the terminating one.
void put_multiboot2(Bytes& bytes, std::size_t at, const Words& tags = {}) {
    const auto length = static_cast<std::uint32_t>(16 + 4 * tags.size() + 8);
    put_words(bytes, at, {Multiboot2Header::magic, 0, length, 0 - Multiboot2Header::magic - length});
    put_words(bytes, at + 16, tags);
    put_words(bytes, at + 16 + 4 * tags.size(), {0, 8});
}

template<class Class>
SmallKernel<Class> multiboot1_kernel(std::uint32_t flags = 0) {
    SmallKernel<Class> kernel;
    put_multiboot1(kernel.text, 0, flags);
    return kernel;
}

template<class Class>
SmallKernel<Class> multiboot2_kernel(const Words& tags = {}) {
    SmallKernel<Class> kernel;
    put_multiboot2(kernel.text, 0, tags);
    return kernel;
}

// --- What is found in memory

/// A run of the loader whose results are looked at.
class Loaded {
  public:
    explicit Loaded(const Bytes& file, const LoadRequest& request = {}, std::uint64_t memory_size = 16 * mib)
        : ram(memory_size), kernel(load_kernel(file, request, ram.memory())), cpu(boot_cpu(kernel)) {}

    [[nodiscard]] std::uint32_t word(std::uint64_t address) const {
        return ram.at<std::uint32_t>(GuestPhys{address});
    }
    [[nodiscard]] std::uint64_t quad(std::uint64_t address) const {
        return ram.at<std::uint64_t>(GuestPhys{address});
    }
    /// The string at an address.
    [[nodiscard]] std::string string(std::uint64_t address) const {
        std::string text;
        while (const char c = ram.at<char>(GuestPhys{address + text.size()}))
            text += c;
        return text;
    }

    TestRam ram;
    LoadedKernel kernel;
    VirtualCpu cpu;
};

/// As all protocols with a 32-bit entry have it: flat segments, no paging, no interrupts.
void expect_protected_mode(const Loaded& loaded, Protocol protocol, std::uint16_t code_selector) {
    const VirtualCpu& cpu = loaded.cpu;
    EXPECT_EQ(loaded.kernel.protocol, protocol);
    EXPECT_EQ(cpu.cr0, cr0::pe | cr0::et);
    EXPECT_EQ(cpu.cr3, 0U);
    EXPECT_EQ(cpu.cr4, 0U);
    EXPECT_EQ(cpu.efer, 0U);
    EXPECT_EQ(cpu.cpl, 0);
    EXPECT_EQ(cpu.rflags, rflags::fixed);
    EXPECT_EQ(cpu.cs.selector, code_selector);
    EXPECT_EQ(cpu.cs.type, 0xb);
    EXPECT_TRUE(cpu.cs.default_32);
    EXPECT_FALSE(cpu.cs.long_mode);
    for (const Segment* segment : {&cpu.ds, &cpu.es, &cpu.fs, &cpu.gs, &cpu.ss}) {
        EXPECT_EQ(segment->selector, code_selector + 8);
        EXPECT_EQ(segment->type, 0x3);
        EXPECT_TRUE(segment->default_32);
    }
    for (const Segment* segment : {&cpu.cs, &cpu.ds, &cpu.ss}) {
        EXPECT_EQ(segment->base, 0U);
        EXPECT_EQ(segment->limit, 0xffff'ffffU);
        EXPECT_TRUE(segment->present && segment->granularity && !segment->system);
    }
    EXPECT_EQ(cpu.tr.type, 0xb);
    EXPECT_EQ(cpu.gdtr.limit, code_selector + 15);
    EXPECT_EQ(loaded.quad(cpu.gdtr.base.value() + code_selector), 0x00cf'9b00'0000'ffffU);
    EXPECT_EQ(loaded.quad(cpu.gdtr.base.value() + code_selector + 8), 0x00cf'9300'0000'ffffU);
}

/// Blocks that must not overlap, nor leave RAM.
class Blocks {
  public:
    void add(std::uint64_t begin, std::uint64_t size) {
        for (const auto& [other, other_size] : blocks_)
            EXPECT_TRUE(begin + size <= other || other + other_size <= begin)
                << std::hex << begin << " overlaps " << other;
        blocks_[begin] = size;
    }

  private:
    std::map<std::uint64_t, std::uint64_t> blocks_;
};

const Bytes first_module = bytes_of("the first module"), second_module = Bytes(0x2345, std::byte{7});

// --- Multiboot 1

template<class Class>
class MultibootTest : public ::testing::Test {};
using Classes = ::testing::Types<Elf32, Elf64>;
TYPED_TEST_SUITE(MultibootTest, Classes, );

TYPED_TEST(MultibootTest, FirstVersionTellsEverything) {
    auto source = multiboot1_kernel<TypeParam>(MultibootHeader::wants_memory_map);
    const Bytes file = source.file();
    const std::array modules{BootModule{first_module, "first one"}, BootModule{second_module, {}}};
    const Loaded loaded(file, {.command_line = "a=b c", .modules = modules, .name = "dir/kernel"}, 64 * mib);
    expect_protected_mode(loaded, Protocol::multiboot1, 0x08);
    EXPECT_EQ(loaded.cpu.rip, source.entry);
    EXPECT_EQ(loaded.cpu[Gpr::rax], 0x2bad'b002U);
    EXPECT_EQ(loaded.ram.text(GuestPhys{text_address}, 4), std::string("\x02\xb0\xad\x1b"));

    const std::uint64_t info = loaded.cpu[Gpr::rbx];
    EXPECT_EQ(loaded.word(info), 0x24dU) << "memory, command line, modules, map, loader's name";
    EXPECT_EQ(loaded.word(info + 4), 639U);
    EXPECT_EQ(loaded.word(info + 8), 63U * 1024);
    EXPECT_EQ(loaded.string(loaded.word(info + 16)), "dir/kernel a=b c");
    EXPECT_EQ(loaded.string(loaded.word(info + 64)), "umbra");

    const std::uint64_t list = loaded.word(info + 24);
    EXPECT_EQ(loaded.word(info + 20), 2U);
    const std::uint64_t kernel_end = text_address + source.text.size() + bss_size;
    EXPECT_EQ(loaded.word(list), 0x102000U) << "the first page behind the kernel";
    EXPECT_GE(loaded.word(list), kernel_end);
    EXPECT_EQ(loaded.word(list + 4), 0x102000U + first_module.size());
    EXPECT_EQ(loaded.string(loaded.word(list + 8)), "first one");
    EXPECT_EQ(loaded.word(list + 12), 0U);
    EXPECT_EQ(loaded.word(list + 16), 0x103000U);
    EXPECT_EQ(loaded.word(list + 20), 0x103000U + second_module.size());
    EXPECT_EQ(loaded.string(loaded.word(list + 24)), "");
    EXPECT_EQ(loaded.ram.text(GuestPhys{0x102000}, first_module.size()), "the first module");
    EXPECT_EQ(loaded.ram.text(GuestPhys{0x103000}, second_module.size()), std::string(0x2345, '\7'));

    const auto e820 = e820_map(loaded.ram.memory());
    const std::uint64_t map = loaded.word(info + 48);
    ASSERT_EQ(loaded.word(info + 44), 24 * e820.size());
    for (std::size_t i = 0; i < e820.size(); ++i) {
        EXPECT_EQ(loaded.word(map + 24 * i), 20U) << "bytes of the rest";
        EXPECT_EQ(loaded.quad(map + 24 * i + 4), +e820[i].addr);
        EXPECT_EQ(loaded.quad(map + 24 * i + 12), +e820[i].size);
        EXPECT_EQ(loaded.word(map + 24 * i + 20), +e820[i].type);
    }

    Blocks blocks;
    blocks.add(text_address, kernel_end - text_address);
    blocks.add(info, 116);
    blocks.add(list, 32);
    blocks.add(map, 24 * e820.size());
    blocks.add(loaded.word(info + 16), 17);
    blocks.add(loaded.word(info + 64), 6);
    blocks.add(loaded.word(list + 8), 10);
    blocks.add(loaded.word(list + 24), 1);
    blocks.add(loaded.cpu.gdtr.base.value(), 24);
    blocks.add(loaded.cpu[Gpr::rsp] - page_size, page_size);
}

TYPED_TEST(MultibootTest, FirstVersionHasSectionsAndTextScreen) {
    auto source = multiboot1_kernel<TypeParam>(MultibootHeader::wants_video);
    put_words(source.text, 32, {0, 1024, 768, 32});
    source.with_sections = true;
    const Loaded loaded(source.file());
    const std::uint64_t info = loaded.cpu[Gpr::rbx];
    EXPECT_EQ(loaded.word(info), 0x126dU);
    EXPECT_EQ(loaded.quad(info + 88), 0xb8000U);
    EXPECT_EQ(loaded.word(info + 96), 160U);
    EXPECT_EQ(loaded.word(info + 100), 80U);
    EXPECT_EQ(loaded.word(info + 104), 25U);
    EXPECT_EQ(loaded.ram.template at<std::uint8_t>(GuestPhys{info + 108}), 16);
    EXPECT_EQ(loaded.ram.template at<std::uint8_t>(GuestPhys{info + 109}), 2) << "EGA text";

    using Section = typename TypeParam::Section;
    EXPECT_EQ(loaded.word(info + 28), 4U);
    EXPECT_EQ(loaded.word(info + 32), sizeof(Section));
    EXPECT_EQ(loaded.word(info + 40), 3U);
    const auto sections = loaded.ram.template at<std::array<Section, 4>>(GuestPhys{loaded.word(info + 36)});
    EXPECT_EQ(sections[1].sh_addr, text_address);
    EXPECT_EQ(sections[2].sh_type, static_cast<unsigned>(SHT_SYMTAB));
    EXPECT_EQ(loaded.ram.text(GuestPhys{sections[2].sh_addr}, 48), std::string(48, '\x5a'));
    EXPECT_EQ(loaded.ram.text(GuestPhys{sections[3].sh_addr}, source.names.size()), source.names);
}

TYPED_TEST(MultibootTest, FirstVersionTranslatesAVirtualEntry) {
    auto source = multiboot1_kernel<TypeParam>();
    source.linked_above = 0xc000'0000;
    source.entry = text_address + 0xc000'0080;
    EXPECT_EQ(Loaded(source.file()).cpu.rip, text_address + 0x80);
    source.entry = text_address + 0xc000'0000 + 0x400; // in the bss
    EXPECT_NE(failure(source.file()).find("entry point"), std::string::npos);
}

TYPED_TEST(MultibootTest, InitrdIsTheFirstModule) {
    const Bytes file = multiboot1_kernel<TypeParam>().file();
    const std::array modules{BootModule{second_module, "x"}};
    const Loaded loaded(file, {.initrd = first_module, .modules = modules});
    const std::uint64_t info = loaded.cpu[Gpr::rbx];
    EXPECT_EQ(loaded.word(info + 20), 2U);
    EXPECT_EQ(loaded.ram.text(GuestPhys{loaded.word(loaded.word(info + 24))}, 5), "the f");
}

/// A file without format, loaded to 0x10000: the header's own address, load address, end of what is loaded,
/// end of the bss, entry.
Bytes kludge_kernel() {
    Bytes file(0x2000, std::byte{0x90});
    put_multiboot1(file, 0x40, MultibootHeader::has_addresses, {0x10040, 0x10000, 0x11800, 0x20000, 0x10100});
    return file;
}

TEST(MultibootKludgeTest, LoadsByTheHeadersAddresses) {
    const Bytes file = kludge_kernel();
    const Loaded loaded(file, {.command_line = {}, .initrd = first_module});
    expect_protected_mode(loaded, Protocol::multiboot1, 0x08);
    EXPECT_EQ(loaded.cpu.rip, 0x10100U);
    EXPECT_EQ(loaded.ram.text(GuestPhys{0x10040}, 4), "\x02\xb0\xad\x1b");
    EXPECT_EQ(loaded.ram.at<std::uint8_t>(GuestPhys{0x117ff}), 0x90);
    EXPECT_EQ(loaded.ram.text(GuestPhys{0x11800}, 0xe800), std::string(0xe800, '\0')) << "bss";
    const std::uint64_t info = loaded.cpu[Gpr::rbx];
    EXPECT_GE(info, 0x20000U);
    EXPECT_GE(loaded.cpu.gdtr.base.value(), 0x20000U);
    EXPECT_EQ(loaded.string(loaded.word(info + 16)), "");
    EXPECT_GE(loaded.word(loaded.word(info + 24)), 0x100000U) << "modules are not below 1 MB";
}

TEST(MultibootKludgeTest, AKernelInAllOfLowMemoryHasItsInformationAbove) {
    Bytes file(0x2000, std::byte{0x90});
    put_multiboot1(file, 0x40, MultibootHeader::has_addresses, {0x540, 0x500, 0, 0x9fc00, 0x600});
    const Loaded loaded(file);
    EXPECT_GE(loaded.cpu[Gpr::rbx], 0x100000U);
    EXPECT_GE(loaded.cpu.gdtr.base.value(), 0x100000U);
    EXPECT_EQ(loaded.ram.text(GuestPhys{0x2500}, 0x9d700), std::string(0x9d700, '\0'));
}

TEST(MultibootKludgeTest, OutsideOfMemory) {
    Bytes file = kludge_kernel();
    put_multiboot1(file, 0x40, MultibootHeader::has_addresses, {0x10040, 0x10000, 0, 0x100000, 0x10100});
    EXPECT_NE(failure(file).find("usable memory"), std::string::npos) << "VGA memory is in the way";
    put_multiboot1(file, 0x40, MultibootHeader::has_addresses,
                   {0x200'0040, 0x200'0000, 0, 0x300'0000, 0x200'0100});
    EXPECT_NE(failure(file).find("at least 48 MiB"), std::string::npos);
}

TEST(MultibootModulesTest, MayBeEmpty) {
    const Bytes none;
    const std::array modules{BootModule{none, "nothing"}, BootModule{first_module, "something"}};
    const Bytes file = multiboot1_kernel<Elf32>().file();
    const Loaded loaded(file, {.modules = modules});
    const std::uint64_t info = loaded.cpu[Gpr::rbx], list = loaded.word(info + 24);
    EXPECT_EQ(loaded.word(info + 20), 2U);
    EXPECT_EQ(loaded.word(list), loaded.word(list + 4));
    EXPECT_EQ(loaded.string(loaded.word(list + 8)), "nothing");
    EXPECT_EQ(loaded.ram.text(GuestPhys{loaded.word(list + 16)}, first_module.size()), "the first module");
    SmallKernel<Elf64> pvh;
    pvh.pvh_entry = text_address;
    const Bytes pvh_file = pvh.file();
    const Loaded by_pvh(pvh_file, {.modules = modules});
    EXPECT_EQ(by_pvh.word(by_pvh.cpu[Gpr::rbx] + 12), 2U);
    EXPECT_EQ(by_pvh.quad(by_pvh.quad(by_pvh.cpu[Gpr::rbx] + 16) + 8), 0U);
}

TEST(MultibootModulesTest, TooLarge) {
    const Bytes file = multiboot1_kernel<Elf32>().file();
    const Bytes large(15 * mib);
    EXPECT_EQ(failure(file, {.initrd = large}, 32 * mib), "");
    EXPECT_NE(failure(file, {.initrd = large}).find("module"), std::string::npos);
    const std::array modules{BootModule{large, "one"}, BootModule{large, "two"}};
    EXPECT_NE(failure(file, {.modules = modules}, 24 * mib).find("the module 'two' of 15728640 bytes"),
              std::string::npos);
}

// --- Multiboot 2

/// The boot information's tags by type; the last of each.
std::map<std::uint32_t, std::uint64_t> tags_of(const Loaded& loaded) {
    const std::uint64_t info = loaded.cpu[Gpr::rbx];
    EXPECT_EQ(info % 8, 0U);
    EXPECT_EQ(loaded.word(info + 4), 0U);
    const std::uint64_t end = info + loaded.word(info);
    std::map<std::uint32_t, std::uint64_t> tags;
    std::uint64_t at = info + 8;
    for (;;) {
        const std::uint32_t type = loaded.word(at), size = loaded.word(at + 4);
        if (size < 8 || at + size > end) {
            ADD_FAILURE() << "a tag of type " << type << " has " << size << " bytes";
            return tags;
        }
        tags[type] = at;
        at += (std::uint64_t{size} + 7) / 8 * 8;
        if (type == 0)
            break;
    }
    EXPECT_EQ(at, end) << "the total size is that of all tags";
    return tags;
}

TYPED_TEST(MultibootTest, SecondVersionTellsEverything) {
    auto source = multiboot2_kernel<TypeParam>();
    source.with_sections = true;
    const Bytes file = source.file();
    const std::array modules{BootModule{first_module, "first one"}};
    const Loaded loaded(file, {.command_line = "a=b", .modules = modules, .name = "not told"}, 64 * mib);
    expect_protected_mode(loaded, Protocol::multiboot2, 0x08);
    EXPECT_EQ(loaded.cpu.rip, source.entry);
    EXPECT_EQ(loaded.cpu[Gpr::rax], 0x36d7'6289U);

    auto tags = tags_of(loaded);
    EXPECT_EQ(loaded.string(tags.at(1) + 8), "a=b");
    EXPECT_EQ(loaded.word(tags.at(1) + 4), 12U);
    EXPECT_EQ(loaded.string(tags.at(2) + 8), "umbra");
    EXPECT_EQ(loaded.string(tags.at(3) + 16), "first one");
    const std::uint32_t module = loaded.word(tags.at(3) + 8);
    EXPECT_EQ(module % page_size, 0U);
    EXPECT_EQ(loaded.word(tags.at(3) + 12), module + first_module.size());
    EXPECT_EQ(loaded.ram.text(GuestPhys{module}, first_module.size()), "the first module");
    EXPECT_EQ(loaded.word(tags.at(4) + 8), 639U);
    EXPECT_EQ(loaded.word(tags.at(4) + 12), 63U * 1024);

    const auto e820 = e820_map(loaded.ram.memory());
    EXPECT_EQ(loaded.word(tags.at(6) + 4), 16 + 24 * e820.size());
    EXPECT_EQ(loaded.word(tags.at(6) + 8), 24U);
    EXPECT_EQ(loaded.word(tags.at(6) + 12), 0U);
    for (std::size_t i = 0; i < e820.size(); ++i) {
        const std::uint64_t entry = tags.at(6) + 16 + 24 * i;
        EXPECT_EQ(loaded.quad(entry), +e820[i].addr);
        EXPECT_EQ(loaded.quad(entry + 8), +e820[i].size);
        EXPECT_EQ(loaded.word(entry + 16), +e820[i].type);
        EXPECT_EQ(loaded.word(entry + 20), 0U);
    }

    EXPECT_EQ(loaded.word(tags.at(8) + 4), 32U);
    EXPECT_EQ(loaded.quad(tags.at(8) + 8), 0xb8000U);
    EXPECT_EQ(loaded.word(tags.at(8) + 16), 160U);
    EXPECT_EQ(loaded.word(tags.at(8) + 20), 80U);
    EXPECT_EQ(loaded.word(tags.at(8) + 24), 25U);
    EXPECT_EQ(loaded.word(tags.at(8) + 28), 0x0210U) << "16 bits each, EGA text";

    using Section = typename TypeParam::Section;
    EXPECT_EQ(loaded.word(tags.at(9) + 4), 20 + 4 * sizeof(Section));
    EXPECT_EQ(loaded.word(tags.at(9) + 8), 4U);
    EXPECT_EQ(loaded.word(tags.at(9) + 12), sizeof(Section));
    EXPECT_EQ(loaded.word(tags.at(9) + 16), 3U);
    const auto sections = loaded.ram.template at<std::array<Section, 4>>(GuestPhys{tags.at(9) + 20});
    EXPECT_EQ(loaded.ram.text(GuestPhys{sections[3].sh_addr}, source.names.size()), source.names);

    EXPECT_EQ(loaded.ram.text(GuestPhys{tags.at(14) + 8}, 8), "RSD PTR ");
    EXPECT_EQ(loaded.word(tags.at(14) + 4), 28U);
    EXPECT_EQ(loaded.word(tags.at(15) + 4), 8 + 36U);
    EXPECT_EQ(loaded.ram.text(GuestPhys{tags.at(15) + 8}, 36), loaded.ram.text(GuestPhys{0xf0000}, 36));
    EXPECT_FALSE(tags.contains(21)) << "it was not relocated";
}

TYPED_TEST(MultibootTest, SecondVersionIsEnteredByItsTag) {
    auto source = multiboot2_kernel<TypeParam>({3, 12, text_address + 0x44, 0});
    EXPECT_EQ(Loaded(source.file()).cpu.rip, text_address + 0x44);
    source = multiboot2_kernel<TypeParam>({3, 12, text_address - 1, 0});
    EXPECT_NE(failure(source.file()).find("entry point"), std::string::npos);
}

TEST(Multiboot2Test, LoadsByTheAddressTag) {
    Bytes file(0x2000, std::byte{0x90});
    put_multiboot2(file, 0x40, {2, 24, 0x7c40, 0x7c00, 0, 0xa000, 3, 12, 0x7c80, 0});
    const Loaded loaded(file);
    expect_protected_mode(loaded, Protocol::multiboot2, 0x08);
    EXPECT_EQ(loaded.cpu.rip, 0x7c80U);
    EXPECT_EQ(loaded.word(0x7c40), Multiboot2Header::magic);
    EXPECT_FALSE(tags_of(loaded).contains(9));
}

TEST(Multiboot2Test, RelocatesAsTheHeaderWishes) {
    struct Case {
        std::uint32_t lowest, highest, alignment, preference, base;
    };
    const std::uint32_t size = 0x400 + bss_size;
    for (const Case& c :
         {Case{0, 0xffff'ffff, 0x1000, 0, text_address}, Case{0x20'0000, 0xffff'ffff, 0x1000, 0, 0x20'0000},
          Case{0x20'0001, 0xffff'ffff, 0x20'0000, 0, 0x40'0000},
          Case{0x20'0001, 0xffff'ffff, 0x1000, 1, 0x20'1000},
          Case{0, 0xffff'ffff, 0x1000, 2, 16 * mib - 0x2000}, Case{0, 0x7f'ffff, 0x1000, 2, 8 * mib - 0x2000},
          Case{0x20'0000, 0x20'0000 + size - 1, 0x1000, 1, 0x20'0000}}) {
        const auto source =
            multiboot2_kernel<Elf64>({10, 24, c.lowest, c.highest, c.alignment, c.preference});
        const Loaded loaded(source.file());
        EXPECT_EQ(loaded.cpu.rip, c.base + 0x80);
        EXPECT_EQ(loaded.word(c.base), Multiboot2Header::magic);
        EXPECT_EQ(loaded.word(tags_of(loaded).at(21) + 8), c.base);
    }
    const auto without_room = multiboot2_kernel<Elf64>({10, 24, 0x20'0000, 0x20'0000 + size - 2, 0x1000, 0});
    EXPECT_NE(failure(without_room.file()).find("can be relocated"), std::string::npos);
    const auto above = multiboot2_kernel<Elf64>({10, 24, 0x8000'0000, 0xffff'ffff, 0x1000, 0});
    EXPECT_NE(failure(above.file()).find("can be relocated"), std::string::npos);
}

TEST(Multiboot2Test, RequestsForTheUnknownFailUnlessOptional) {
    EXPECT_NE(failure(multiboot2_kernel<Elf64>({1, 12, 77, 0}).file()).find("unknown type 77"),
              std::string::npos);
    EXPECT_EQ(failure(multiboot2_kernel<Elf64>({0x1'0001, 12, 77, 0}).file()), "");
    EXPECT_EQ(failure(multiboot2_kernel<Elf64>({1, 16, 6, 14}).file()), "");
}

// --- PVH

TYPED_TEST(MultibootTest, PvhTellsEverything) {
    SmallKernel<TypeParam> source;
    source.pvh_entry = text_address + 0x20;
    const Bytes file = source.file();
    const std::array modules{BootModule{first_module, "first one"}, BootModule{second_module, {}}};
    const Loaded loaded(file, {.command_line = "a=b", .modules = modules}, 64 * mib);
    expect_protected_mode(loaded, Protocol::pvh, 0x08);
    EXPECT_EQ(loaded.cpu.rip, text_address + 0x20);

    const std::uint64_t info = loaded.cpu[Gpr::rbx];
    EXPECT_EQ(loaded.word(info), 0x336e'c578U);
    EXPECT_EQ(loaded.word(info + 4), 1U) << "version";
    EXPECT_EQ(loaded.word(info + 8), 0U) << "flags";
    EXPECT_EQ(loaded.word(info + 12), 2U);
    const std::uint64_t list = loaded.quad(info + 16);
    EXPECT_EQ(loaded.string(loaded.quad(info + 24)), "a=b");
    EXPECT_EQ(loaded.quad(info + 32), 0xf0000U);
    const std::uint64_t map = loaded.quad(info + 40);
    const auto e820 = e820_map(loaded.ram.memory());
    EXPECT_EQ(loaded.word(info + 48), e820.size());
    EXPECT_EQ(loaded.word(info + 52), 0U);

    EXPECT_EQ(loaded.quad(list) % page_size, 0U);
    EXPECT_EQ(loaded.quad(list + 8), first_module.size());
    EXPECT_EQ(loaded.string(loaded.quad(list + 16)), "first one");
    EXPECT_EQ(loaded.quad(list + 24), 0U);
    EXPECT_EQ(loaded.ram.text(GuestPhys{loaded.quad(list)}, first_module.size()), "the first module");
    EXPECT_EQ(loaded.quad(list + 40), second_module.size());
    for (std::size_t i = 0; i < e820.size(); ++i) {
        EXPECT_EQ(loaded.quad(map + 24 * i), +e820[i].addr);
        EXPECT_EQ(loaded.quad(map + 24 * i + 8), +e820[i].size);
        EXPECT_EQ(loaded.word(map + 24 * i + 16), +e820[i].type);
        EXPECT_EQ(loaded.word(map + 24 * i + 20), 0U);
    }
}

TEST(PvhTest, EntryMustBeInTheFile) {
    SmallKernel<Elf64> source;
    source.pvh_entry = text_address + 0x400;
    EXPECT_NE(failure(source.file()).find("entry point"), std::string::npos);
}

TYPED_TEST(MultibootTest, AcpiTablesMakeWayAndAreToldOf) {
    auto source = multiboot2_kernel<TypeParam>();
    source.address = 0xf0000;
    source.entry = source.address + 0x80;
    source.pvh_entry = source.entry;
    const Bytes file = source.file();
    const Loaded second(file, {.protocol = Protocol::multiboot2});
    EXPECT_EQ(second.word(0xf0000), Multiboot2Header::magic);
    EXPECT_EQ(second.ram.text(GuestPhys{tags_of(second).at(15) + 8}, 8), "RSD PTR ");
    const Loaded pvh(file, {.protocol = Protocol::pvh});
    const std::uint64_t rsdp = pvh.quad(pvh.cpu[Gpr::rbx] + 32);
    EXPECT_GE(rsdp, 0xf0400U + bss_size);
    EXPECT_LT(rsdp, 0x100000U);
    EXPECT_EQ(pvh.ram.text(GuestPhys{rsdp}, 8), "RSD PTR ");
}

TEST(PvhTest, WithoutModules) {
    SmallKernel<Elf64> source;
    source.pvh_entry = text_address;
    const Loaded loaded(source.file());
    EXPECT_EQ(loaded.word(loaded.cpu[Gpr::rbx] + 12), 0U);
    EXPECT_EQ(loaded.quad(loaded.cpu[Gpr::rbx] + 16), 0U);
}

// --- umbra's own

TEST(PlainTest, Elf64) {
    const SmallKernel<Elf64> source;
    const Loaded loaded(source.file());
    EXPECT_EQ(loaded.kernel.protocol, Protocol::elf64);
    EXPECT_EQ(loaded.cpu.rip, source.entry);
    EXPECT_EQ(loaded.cpu[Gpr::rdi], 0x7000U);
    EXPECT_EQ(loaded.cpu[Gpr::rsi], 0x7000U);
    EXPECT_EQ(loaded.cpu[Gpr::rsp], 0x7000U);
    EXPECT_EQ(loaded.cpu.efer, efer::lme | efer::lma | efer::nxe);
    EXPECT_NE(loaded.cpu.cr0 & cr0::pg, 0U);
    EXPECT_TRUE(loaded.cpu.cs.long_mode && !loaded.cpu.cs.default_32);
}

TEST(PlainTest, Elf32) {
    const SmallKernel<Elf32> source;
    const Bytes file = source.file();
    const Loaded loaded(file, {.command_line = "x=y", .initrd = first_module});
    expect_protected_mode(loaded, Protocol::elf32, 0x10);
    EXPECT_EQ(loaded.cpu.rip, source.entry);
    EXPECT_EQ(loaded.cpu[Gpr::rdi], 0x7000U);
    EXPECT_EQ(loaded.cpu[Gpr::rsi], 0x7000U);
    const auto params = loaded.ram.at<boot_params>(GuestPhys{0x7000});
    EXPECT_EQ(loaded.string(params.hdr.cmd_line_ptr), "x=y");
    EXPECT_EQ(+params.hdr.ramdisk_size, first_module.size());
}

TEST(PlainTest, EntryIsPhysical) {
    SmallKernel<Elf32> source;
    source.linked_above = 0xc000'0000;
    source.entry = text_address + 0xc000'0080;
    EXPECT_NE(failure(source.file()).find("entry point"), std::string::npos);
}

TEST(PlainTest, FlatBinaries) {
    const Bytes file(512, std::byte{0x90});
    const Loaded loaded(file, {.load_address = GuestPhys{0x7c00}});
    EXPECT_EQ(loaded.kernel.protocol, Protocol::flat);
    EXPECT_EQ(loaded.cpu.rip, 0x7c00U);
    EXPECT_TRUE(loaded.cpu.cs.long_mode);
    EXPECT_EQ(loaded.ram.text(GuestPhys{0x7c00}, 513), std::string(512, '\x90') + '\0');
    EXPECT_EQ(loaded.cpu[Gpr::rsi], 0x37000U) << "out of the binary's way";

    const Loaded legacy(
        file,
        {.protocol = Protocol::flat32, .load_address = GuestPhys{0x20'0000}, .entry = GuestPhys{0x20'0010}});
    expect_protected_mode(legacy, Protocol::flat32, 0x10);
    EXPECT_EQ(legacy.cpu.rip, 0x20'0010U);
    EXPECT_EQ(legacy.cpu[Gpr::rsi], 0x7000U);
}

TEST(PlainTest, FlatBinariesThatCannotBeLoaded) {
    const Bytes file(512, std::byte{0x90});
    EXPECT_NE(failure(file).find("not a kernel"), std::string::npos);
    EXPECT_EQ(failure(file, {.protocol = Protocol::flat}), "a flat binary needs a load address");
    const auto at = [&file](std::uint64_t load, std::uint64_t entry) {
        return failure(file, {.load_address = GuestPhys{load}, .entry = GuestPhys{entry}});
    };
    EXPECT_EQ(at(0x8000, 0x81ff), "");
    EXPECT_NE(at(0x8000, 0x8200).find("entry point"), std::string::npos);
    EXPECT_NE(at(0x8000, 0x7fff).find("entry point"), std::string::npos);
    EXPECT_EQ(at(0x9fb00, 0x9fb00), "") << "also where the extended BIOS data area would be";
    EXPECT_NE(at(0x9ff00, 0x9ff00).find("usable memory"), std::string::npos);
    EXPECT_NE(at(16 * mib, 16 * mib).find("at least 17 MiB"), std::string::npos);
    EXPECT_NE(at(~std::uint64_t{0}, ~std::uint64_t{0}), "");
}

// --- Linux

constexpr std::size_t setup_size = 1024;

/// A bzImage of one setup sector around `payload`, which begins 0x100 bytes behind the code's start.
Bytes bzimage(const Bytes& payload, std::uint16_t version = 0x020f, std::uint16_t flags = XLF_KERNEL_64) {
    constexpr std::uint32_t payload_offset = 0x300;
    setup_header header{};
    const std::size_t code = (payload_offset + payload.size() + 15) / 16 * 16;
    header.setup_sects = 1;
    header.syssize = static_cast<std::uint32_t>(code / 16);
    header.boot_flag = 0xaa55;
    header.header = 0x5372'6448;
    header.version = version;
    header.loadflags = LOADED_HIGH;
    header.code32_start = 0x100000;
    header.initrd_addr_max = 0x7fff'ffff;
    header.xloadflags = flags;
    header.cmdline_size = 255;
    header.payload_offset = payload_offset;
    header.payload_length = static_cast<std::uint32_t>(payload.size());
    header.pref_address = 0x20'0000;
    header.init_size = 0x10'0000;
    Bytes file(setup_size + code, std::byte{0x90});
    std::memcpy(file.data() + 0x1f1, &header, sizeof header);
    file[0x200] = std::byte{0xeb};
    file[0x201] = static_cast<std::byte>(0x1f1 + sizeof header - 0x202);
    std::ranges::copy(payload, file.data() + setup_size + payload_offset);
    return file;
}

Bytes gzip(const Bytes& data) {
    z_stream stream{};
    EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY), Z_OK);
    Bytes packed(deflateBound(&stream, data.size())), input = data;
    stream.next_in = reinterpret_cast<Bytef*>(input.data());
    stream.avail_in = static_cast<uInt>(input.size());
    stream.next_out = reinterpret_cast<Bytef*>(packed.data());
    stream.avail_out = static_cast<uInt>(packed.size());
    EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
    packed.resize(packed.size() - stream.avail_out);
    deflateEnd(&stream);
    return packed;
}

Bytes vmlinux() {
    SmallKernel<Elf64> source;
    source.address = 0x20'0000;
    source.entry = 0x20'0000;
    source.linked_above = 0x8000'0000; // as Linux has it, though not with all bits of the sign
    return source.file();
}

TEST(LinuxTest, PayloadIsUnpackedAndEnteredDirectly) {
    const Bytes file = bzimage(gzip(vmlinux()));
    const Loaded loaded(file, {.command_line = "quiet", .initrd = first_module});
    EXPECT_EQ(loaded.kernel.protocol, Protocol::linux64);
    EXPECT_EQ(loaded.cpu.rip, 0x20'0000U);
    EXPECT_EQ(loaded.cpu[Gpr::rsi], 0x7000U);
    EXPECT_TRUE(loaded.cpu.cs.long_mode);
    EXPECT_EQ(loaded.cpu.cs.selector, 0x10);
    EXPECT_EQ(loaded.ram.text(GuestPhys{0x20'0000}, 0x401), std::string(0x400, '\x90') + '\0');
    const auto params = loaded.ram.at<boot_params>(GuestPhys{0x7000});
    EXPECT_EQ(+params.hdr.version, 0x020f);
    EXPECT_EQ(loaded.string(params.hdr.cmd_line_ptr), "quiet");
    EXPECT_EQ(+params.hdr.ramdisk_image, 16 * mib - page_size);
    EXPECT_EQ(+params.hdr.loadflags & KASLR_FLAG, 0) << "a kernel that is where it was linked to";
}

TEST(LinuxTest, GuestDecompressEntersTheBzImage) {
    const Bytes payload = gzip(vmlinux()), file = bzimage(payload);
    const Loaded loaded(file, {.guest_decompress = true});
    EXPECT_EQ(loaded.cpu.rip, 0x20'0200U);
    EXPECT_EQ(loaded.ram.text(GuestPhys{0x20'0300}, 3), "\x1f\x8b\x08");
}

TEST(LinuxTest, PayloadThatCannotBeUnpackedHereIsUnpackedInTheGuest) {
    Bytes payload = bytes_of("BZh9 is bzip2");
    EXPECT_EQ(Loaded(bzimage(payload)).cpu.rip, 0x20'0200U);
    payload = gzip(vmlinux());
    payload[payload.size() / 2] ^= std::byte{1};
    EXPECT_NE(failure(bzimage(payload)), "") << "damaged";
    EXPECT_EQ(failure(bzimage(payload), {.guest_decompress = true}), "");
    EXPECT_NE(failure(bzimage(gzip(SmallKernel<Elf32>().file()))).find("no 64-bit kernel"),
              std::string::npos);
}

TEST(LinuxTest, ThirtyTwoBitEntry) {
    const Bytes file = bzimage(gzip(vmlinux()));
    const Loaded loaded(file, {.command_line = "quiet", .protocol = Protocol::linux32});
    expect_protected_mode(loaded, Protocol::linux32, 0x10);
    EXPECT_EQ(loaded.cpu.rip, 0x20'0000U);
    EXPECT_EQ(loaded.cpu[Gpr::rsi], 0x7000U);
    EXPECT_EQ(loaded.cpu[Gpr::rbp] | loaded.cpu[Gpr::rdi] | loaded.cpu[Gpr::rbx], 0U);
    EXPECT_EQ(+loaded.ram.at<boot_params>(GuestPhys{0x7000}).hdr.code32_start, 0x20'0000U);
}

TEST(LinuxTest, ThirtyTwoBitKernelIsChosenByItself) {
    const Loaded loaded(bzimage({}, 0x020f, 0));
    expect_protected_mode(loaded, Protocol::linux32, 0x10);
    EXPECT_EQ(
        failure(bzimage({}, 0x020f, 0), {.protocol = Protocol::linux64}),
        "it cannot be loaded by the protocol linux: a bzImage without a 64-bit entry (a 32-bit kernel); it "
        "offers linux32, flat, flat32");
}

TEST(LinuxTest, AskedForByNameADamagedOneIsToldOf) {
    Bytes file = bzimage({}, 0x0207, 0);
    put(file, 0x214, std::uint32_t{0}); // code32_start
    const std::string message = failure(file, {.protocol = Protocol::linux32});
    EXPECT_EQ(message.find("it cannot be loaded by the protocol linux32: not supported: it is like iPXE"), 0U)
        << message;
    EXPECT_EQ(failure(file).find("not supported: it is like iPXE"), 0U);
}

TEST(LinuxTest, OldBootProtocols) {
    const Bytes file = bzimage({}, 0x0202, 0);
    const Loaded loaded(file, {.command_line = std::string(255, 'x'), .initrd = first_module});
    EXPECT_EQ(loaded.cpu.rip, 0x100000U) << "2.02 knows no preferred address";
    EXPECT_EQ(+loaded.ram.at<boot_params>(GuestPhys{0x7000}).hdr.ramdisk_image, 16 * mib - page_size);
    EXPECT_EQ(failure(file, {.command_line = std::string(256, 'x')}),
              "the command line has 256 bytes; this kernel takes at most 255");
}

// --- The choice

TEST(ChoiceTest, CompressedFilesAreUnpacked) {
    const Loaded loaded(gzip(SmallKernel<Elf64>().file()));
    EXPECT_EQ(loaded.kernel.protocol, Protocol::elf64);
    EXPECT_EQ(loaded.ram.at<std::uint8_t>(GuestPhys{text_address}), 0x90);
    Bytes cut = gzip(SmallKernel<Elf64>().file());
    cut.resize(cut.size() / 2);
    EXPECT_NE(failure(cut).find("truncated"), std::string::npos);
    EXPECT_EQ(unpack_kernel_file(gzip(bytes_of("x"))), bytes_of("x"));
    EXPECT_EQ(unpack_kernel_file(bytes_of("x")), bytes_of("x"));
}

/// NOVA's kernel has none but readable and writable segments; no other loader asks.
TYPED_TEST(MultibootTest, SegmentsNeedNotBeExecutable) {
    SmallKernel<TypeParam> source;
    source.flags = PF_R | PF_W;
    source.pvh_entry = source.entry;
    put_multiboot1(source.text, 0, 0);
    put_multiboot2(source.text, 0x40);
    const Bytes file = source.file();
    for (const Protocol protocol : read_kernel_file(file).protocols()) {
        if (protocol != Protocol::flat && protocol != Protocol::flat32) {
            EXPECT_EQ(Loaded(file, {.protocol = protocol}).cpu.rip, source.entry) << name(protocol);
        }
    }
    source.linked_above = 0xc000'0000;
    source.entry += source.linked_above;
    EXPECT_EQ(Loaded(source.file(), {.protocol = Protocol::multiboot1}).cpu.rip, text_address + 0x80);
}

TEST(ChoiceTest, FirstOfferedUnlessAskedFor) {
    SmallKernel<Elf64> source;
    source.pvh_entry = text_address;
    put_multiboot1(source.text, 0, 0);
    put_multiboot2(source.text, 0x40);
    const Bytes file = source.file();
    EXPECT_EQ(Loaded(file).kernel.protocol, Protocol::pvh);
    source.pvh_entry.reset();
    EXPECT_EQ(Loaded(source.file()).kernel.protocol, Protocol::multiboot1);
    for (const Protocol protocol :
         {Protocol::multiboot1, Protocol::multiboot2, Protocol::pvh, Protocol::elf64})
        EXPECT_EQ(Loaded(file, {.protocol = protocol}).kernel.protocol, protocol);
    EXPECT_NE(failure(file, {.protocol = Protocol::elf32}).find("by the protocol elf32; it offers"),
              std::string::npos);
}

TEST(ChoiceTest, WhyNot) {
    auto source = multiboot1_kernel<Elf64>();
    put_words(source.text, 8, {1});
    EXPECT_NE(
        failure(source.file(), {.protocol = Protocol::multiboot1})
            .find("multiboot1: damaged multiboot header at 0x1000: its check sum is wrong; it offers elf64"),
        std::string::npos);
    const Bytes elf = SmallKernel<Elf64>().file();
    const std::array modules{BootModule{first_module, {}}};
    EXPECT_EQ(failure(elf, {.modules = modules}),
              "the protocol elf64 knows of no modules; an initrd can be passed");
    EXPECT_NE(failure(elf, {.load_address = GuestPhys{0x100000}}).find("only a flat binary"),
              std::string::npos);
    EXPECT_NE(failure(elf, {.entry = GuestPhys{0x100000}}).find("only a flat binary"), std::string::npos);
}

TEST(ChoiceTest, EveryTruncationIsRefusedOrLoads) {
    SmallKernel<Elf32> source;
    put_multiboot1(source.text, 0, 0);
    put_multiboot2(source.text, 0x40);
    source.with_sections = true;
    const Bytes whole = source.file();
    for (const Protocol protocol : {Protocol::multiboot1, Protocol::multiboot2, Protocol::elf32}) {
        ASSERT_EQ(failure(whole, {.protocol = protocol}), "");
        for (std::size_t size = 0; size < header_room + source.text.size(); ++size)
            ASSERT_NE(failure({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)},
                              {.protocol = protocol}),
                      "")
                << size;
    }
}

} // namespace
} // namespace umbra
