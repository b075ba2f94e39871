// Unit tests of vmm/symbols.hpp: symbol tables made in memory, damaged in every field, cut at every length,
// and mutated.
#include "vmm/symbols.hpp"

#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <elf.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::uint16_t text_section = 1;
constexpr std::uint16_t data_section = 2;
constexpr std::uint64_t text_address = 0xffff'ffff'8100'0000;
constexpr std::uint64_t text_size = 0x1000;

/// An ELF file that has only what names need.
struct ElfFile {
    Elf64_Ehdr header{};
    std::vector<Elf64_Shdr> sections = std::vector<Elf64_Shdr>(5); // null, text, data, symbols, strings
    std::vector<Elf64_Sym> symbols = std::vector<Elf64_Sym>(1);    // the first is null
    std::string strings = std::string(1, '\0');

    ElfFile() {
        std::memcpy(header.e_ident, ELFMAG, SELFMAG);
        header.e_ident[EI_CLASS] = ELFCLASS64;
        header.e_ident[EI_DATA] = ELFDATA2LSB;
        header.e_shoff = sizeof header;
        header.e_shentsize = sizeof(Elf64_Shdr);
        header.e_shnum = static_cast<Elf64_Half>(sections.size());
        sections[text_section].sh_type = SHT_PROGBITS;
        sections[text_section].sh_flags = SHF_ALLOC | SHF_EXECINSTR;
        sections[text_section].sh_addr = text_address;
        sections[text_section].sh_size = text_size;
        sections[data_section].sh_type = SHT_PROGBITS;
        sections[data_section].sh_flags = SHF_ALLOC | SHF_WRITE;
        sections[data_section].sh_addr = text_address + text_size;
        sections[data_section].sh_size = text_size;
        sections[3].sh_type = SHT_SYMTAB;
        sections[3].sh_link = 4;
        sections[3].sh_entsize = sizeof(Elf64_Sym);
        sections[4].sh_type = SHT_STRTAB;
    }

    /// `offset` into the code. Returns *this for chaining.
    ElfFile& add(const std::string& name, std::uint64_t offset, std::uint64_t size,
                 unsigned char type = STT_FUNC, unsigned char bind = STB_GLOBAL,
                 std::uint16_t section = text_section) {
        Elf64_Sym symbol{};
        symbol.st_name = static_cast<Elf64_Word>(strings.size());
        symbol.st_info = static_cast<unsigned char>(bind << 4 | type);
        symbol.st_shndx = section;
        symbol.st_value = text_address + offset;
        symbol.st_size = size;
        symbols.push_back(symbol);
        strings += name;
        strings += '\0';
        return *this;
    }

    /// Lays out symbols and strings behind the section headers.
    ElfFile& place() {
        sections[3].sh_offset = sizeof header + sections.size() * sizeof(Elf64_Shdr);
        sections[3].sh_size = symbols.size() * sizeof(Elf64_Sym);
        sections[4].sh_offset = sections[3].sh_offset + sections[3].sh_size;
        sections[4].sh_size = strings.size();
        return *this;
    }

    [[nodiscard]] Bytes bytes() const {
        Bytes file;
        const auto append = [&file](const void* data, std::size_t size) {
            const auto* const begin = static_cast<const std::byte*>(data);
            file.insert(file.end(), begin, begin + size);
        };
        append(&header, sizeof header);
        append(sections.data(), sections.size() * sizeof(Elf64_Shdr));
        append(symbols.data(), symbols.size() * sizeof(Elf64_Sym));
        append(strings.data(), strings.size());
        return file;
    }
    [[nodiscard]] Symbols load() { return Symbols::from_elf(place().bytes()); }
};

GuestVirt code(std::uint64_t offset) {
    return GuestVirt(text_address + offset);
}

ElfFile two_functions() {
    return ElfFile().add("main", 0x100, 0x20).add("panic", 0x200, 0x10);
}

TEST(Symbols, NamesAFunctionFromItsFirstToItsLastByte) {
    const Symbols symbols = two_functions().load();
    EXPECT_EQ(symbols.size(), 2U);
    EXPECT_EQ(symbols.name(code(0x0ff)), "");
    EXPECT_EQ(symbols.name(code(0x100)), "main+0x0");
    EXPECT_EQ(symbols.name(code(0x112)), "main+0x12");
    EXPECT_EQ(symbols.name(code(0x11f)), "main+0x1f");
    EXPECT_EQ(symbols.name(code(0x120)), "") << "padding between functions";
    EXPECT_EQ(symbols.name(code(0x20f)), "panic+0xf");
    EXPECT_EQ(symbols.name(code(0x210)), "");
    EXPECT_EQ(symbols.name(GuestVirt(0)), "");
    EXPECT_EQ(symbols.name(GuestVirt(~std::uint64_t{0})), "");
    const auto place = symbols.find(code(0x112));
    ASSERT_TRUE(place);
    EXPECT_EQ(place->name, "main");
    EXPECT_EQ(place->offset, 0x12U);
}

TEST(Symbols, OrderInTheFileDoesNotMatter) {
    const Symbols symbols = ElfFile().add("c", 0x300, 1).add("a", 0x100, 1).add("b", 0x200, 1).load();
    EXPECT_EQ(symbols.name(code(0x100)), "a+0x0");
    EXPECT_EQ(symbols.name(code(0x200)), "b+0x0");
    EXPECT_EQ(symbols.name(code(0x300)), "c+0x0");
}

TEST(Symbols, OutliveTheFile) {
    Symbols symbols;
    {
        Bytes file = two_functions().place().bytes();
        symbols = Symbols::from_elf(file);
        std::fill(file.begin(), file.end(), std::byte{0xff});
    }
    EXPECT_EQ(symbols.name(code(0x100)), "main+0x0");
}

TEST(Symbols, OnlyCode) {
    const Symbols symbols = ElfFile()
                                .add("object", 0x100, 0x10, STT_OBJECT)
                                .add("section", 0x100, 0, STT_SECTION)
                                .add("file.c", 0x100, 0, STT_FILE, STB_LOCAL, SHN_ABS)
                                .add("undefined", 0x100, 0x10, STT_NOTYPE, STB_GLOBAL, SHN_UNDEF)
                                .add("absolute", 0x100, 0x10, STT_NOTYPE, STB_GLOBAL, SHN_ABS)
                                .add("in_data", text_size + 0x100, 0x10, STT_FUNC, STB_GLOBAL, data_section)
                                .add("beyond", text_size, 0x10)
                                .add("below", static_cast<std::uint64_t>(-16), 0x10)
                                .add("", 0x100, 0x10)
                                .load();
    EXPECT_EQ(symbols.size(), 0U);
}

TEST(Symbols, LabelsReachToTheNextSymbolOrTheEndOfTheSection) {
    const Symbols symbols = ElfFile()
                                .add("_start", 0x10, 0, STT_NOTYPE)
                                .add("main", 0x100, 0x20)
                                .add("traps", 0x800, 0, STT_NOTYPE, STB_LOCAL)
                                .load();
    EXPECT_EQ(symbols.name(code(0xff)), "_start+0xef");
    EXPECT_EQ(symbols.name(code(0x100)), "main+0x0");
    EXPECT_EQ(symbols.name(code(text_size - 1)), "traps+0x7ff");
    EXPECT_EQ(symbols.name(code(text_size)), "");
}

TEST(Symbols, LabelsInsideAFunctionAreNotItsEnd) {
    const Symbols symbols =
        ElfFile().add("main", 0x100, 0x40).add("loop", 0x110, 0, STT_NOTYPE, STB_LOCAL).load();
    EXPECT_EQ(symbols.name(code(0x120)), "main+0x20");
    EXPECT_EQ(symbols.size(), 1U);
}

TEST(Symbols, BestOfSeveralNames) {
    const Symbols symbols = ElfFile()
                                .add("label", 0x100, 0, STT_NOTYPE)
                                .add("local_alias", 0x100, 0x20, STT_FUNC, STB_LOCAL)
                                .add("no_size", 0x100, 0)
                                .add("memcpy", 0x100, 0x20)
                                .add("weak_alias", 0x100, 0x20, STT_FUNC, STB_WEAK)
                                .load();
    EXPECT_EQ(symbols.name(code(0x101)), "memcpy+0x1");
    EXPECT_EQ(symbols.size(), 1U);
}

TEST(Symbols, ReadableNames) {
    const auto name = [](const std::string& in_file) {
        return ElfFile().add(in_file, 0, 1).load().name(code(0));
    };
    EXPECT_EQ(name("_ZN5guest4mainEv"), "guest::main+0x0");
    EXPECT_EQ(name("_ZN5guest6handleERNS_5FrameE"), "guest::handle+0x0");
    EXPECT_EQ(name("_ZN12_GLOBAL__N_14helpEPFiiE"), "(anonymous namespace)::help+0x0");
    EXPECT_EQ(name("_ZNK5guest5FrameclEi"), "guest::Frame::operator()+0x0");
    EXPECT_EQ(name("_Znot a mangled name"), "_Znot a mangled name+0x0");
    EXPECT_EQ(name("plain(name"), "plain(name+0x0");
    EXPECT_EQ(name("bad\x1b[2J\xff"), "bad?[2J?+0x0") << "terminals are not to be trusted with it";
    const std::string cut = name(std::string(1000, 'x'));
    EXPECT_LE(cut.size(), 60U);
    EXPECT_NE(cut.find("xxx...+0x0"), std::string::npos);
    EXPECT_LE(name("_Z" + std::string(100'000, 'x')).size(), 60U);
}

TEST(Symbols, NamesThatWouldExplodeAreNotUnfolded) {
    // f(A<int, int>, A<S0, S0>, A<S1, S1> ...): each parameter is twice as long as the one before.
    std::string mangled = "_Z1f1AIiiE";
    for (const char digit : std::string("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
        mangled += std::string("S_IS") + digit + "_S" + digit + "_E";
    EXPECT_EQ(ElfFile().add(mangled, 0, 1).load().name(code(0)), mangled.substr(0, 45) + "...+0x0");
    EXPECT_EQ(ElfFile().add(mangled.substr(0, 120), 0, 1).load().name(code(0)), "f+0x0") << "short ones are";
}

// ---- damage

TEST(DamagedSymbols, NoneFromWhatIsNoElf) {
    EXPECT_EQ(Symbols::from_elf({}).size(), 0U);
    EXPECT_EQ(Symbols::from_elf(Bytes(1000)).size(), 0U);
    ElfFile file = two_functions();
    file.header.e_ident[EI_CLASS] = ELFCLASS32;
    EXPECT_EQ(file.load().size(), 0U);
    file = two_functions();
    file.header.e_ident[EI_DATA] = ELFDATA2MSB;
    EXPECT_EQ(file.load().size(), 0U);
    file = two_functions();
    file.header.e_shentsize = 32;
    EXPECT_EQ(file.load().size(), 0U);
    file = two_functions();
    file.header.e_shnum = 0;
    EXPECT_EQ(file.load().size(), 0U);
    file = two_functions();
    file.sections[3].sh_type = SHT_DYNSYM;
    EXPECT_EQ(file.load().size(), 0U);
}

TEST(DamagedSymbols, TablesThatDoNotLieInTheFile) {
    const std::uint64_t size = two_functions().place().bytes().size();
    constexpr std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
    for (const std::uint64_t value : {size, size + 1, std::uint64_t{1} << 40, most, most - 23}) {
        ElfFile file = two_functions().place();
        file.header.e_shoff = value;
        EXPECT_EQ(Symbols::from_elf(file.bytes()).size(), 0U) << value;
        for (const std::size_t section : {3U, 4U}) {
            file = two_functions().place();
            file.sections[section].sh_size = value;
            EXPECT_EQ(Symbols::from_elf(file.bytes()).size(), 0U) << section << ' ' << value;
            file = two_functions().place();
            file.sections[section].sh_offset = value;
            EXPECT_EQ(Symbols::from_elf(file.bytes()).size(), 0U) << section << ' ' << value;
        }
    }
}

TEST(DamagedSymbols, TableHeaders) {
    for (const Elf64_Word link : {5U, 0xffff'ffffU}) {
        ElfFile file = two_functions();
        file.sections[3].sh_link = link;
        EXPECT_EQ(file.load().size(), 0U);
    }
    for (const Elf64_Xword size : {0U, 1U, 16U, 25U}) {
        ElfFile file = two_functions();
        file.sections[3].sh_entsize = size;
        EXPECT_EQ(file.load().size(), 0U);
    }
    ElfFile file = two_functions();
    file.strings.back() = 'c';
    EXPECT_EQ(file.load().size(), 0U) << "the last name has no end";
}

TEST(DamagedSymbols, OneBadSymbolCostsOnlyItself) {
    ElfFile file = two_functions();
    file.symbols[1].st_name = 0xffff'ffff;
    EXPECT_EQ(file.load().size(), 1U);
    file = two_functions();
    file.symbols[1].st_shndx = 77;
    EXPECT_EQ(file.load().size(), 1U);
    file = two_functions();
    file.symbols[1].st_size = std::numeric_limits<std::uint64_t>::max();
    const Symbols symbols = file.load();
    EXPECT_EQ(symbols.name(code(0x200)), "panic+0x0");
    EXPECT_EQ(symbols.name(code(0xff)), "");
}

TEST(DamagedSymbols, CutAtEveryLength) {
    const Bytes file = two_functions().place().bytes();
    for (std::size_t size = 0; size < file.size(); ++size) {
        const Bytes cut(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size)); // for the sanitizer
        EXPECT_EQ(Symbols::from_elf(cut).size(), 0U) << size;
    }
    EXPECT_EQ(Symbols::from_elf(file).size(), 2U);
}

TEST(DamagedSymbols, RandomMutations) {
    const Bytes original = two_functions().add("_ZN5guest4mainEv", 0x300, 0).place().bytes();
    std::mt19937_64 random(1);
    for (int i = 0; i < 20'000; ++i) {
        Bytes file = original;
        for (std::uint64_t k = random() % 8; k-- > 0;)
            file[random() % file.size()] = static_cast<std::byte>(random());
        const Symbols symbols = Symbols::from_elf(file);
        EXPECT_LE(symbols.size(), 3U);
        for (const std::uint64_t offset : {0x100U, 0x110U, 0x200U, 0x300U, 0xfffU})
            EXPECT_LE(symbols.name(code(offset)).size(), 80U);
    }
}

TEST(Symbols, ManySymbolsWithOneLongNameTakeNoLongerThanTheirNumber) {
    // Were each name measured or copied, this would be 10^10 bytes.
    ElfFile file;
    file.add(std::string(100'000, 'x'), 0, 1);
    const Elf64_Sym symbol = file.symbols.back();
    for (std::uint64_t i = 1; i < 100'000; ++i) {
        file.symbols.push_back(symbol);
        file.symbols.back().st_value += i % text_size;
    }
    EXPECT_EQ(file.load().size(), text_size);
}

} // namespace
} // namespace umbra
