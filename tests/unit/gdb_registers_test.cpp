// Unit tests of vmm/debug/registers.hpp.
#include "vmm/debug/registers.hpp"

#include "vmm/debug/packet.hpp"

#include <charconv>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include <gtest/gtest.h>

namespace umbra {
namespace {

constexpr std::uint64_t all_cr4 = cr4_offered(~0U, ~0U, ~0U);

/// What a client knows of a register: from target.xml alone.
struct Described {
    std::string name, feature, type, group;
    std::size_t number = 0, digits = 0;
    bool saved = true;
};

std::string attribute(std::string_view tag, std::string_view name) {
    const std::string key = fmt::format(" {}=\"", name);
    const std::size_t found = tag.find(key);
    if (found == std::string_view::npos)
        return {};
    const std::size_t at = found + key.size();
    return std::string(tag.substr(at, tag.find('"', at) - at));
}

std::size_t number_in(std::string_view text) {
    std::size_t number = ~std::size_t{0};
    EXPECT_EQ(std::from_chars(text.begin(), text.end(), number).ptr, text.end()) << text;
    return number;
}

/// All tags of a kind, each up to its '>'.
std::vector<std::pair<std::size_t, std::string_view>> tags(std::string_view xml, std::string_view name) {
    std::vector<std::pair<std::size_t, std::string_view>> found;
    const std::string start = fmt::format("<{} ", name);
    for (std::size_t at = xml.find(start); at != std::string_view::npos; at = xml.find(start, at + 1))
        found.emplace_back(at, xml.substr(at, xml.find('>', at) - at));
    return found;
}

std::vector<Described> described(const RegisterSet& registers) {
    const std::string xml = registers.target_xml();
    const auto features = tags(xml, "feature");
    std::vector<Described> all;
    for (const auto& [at, tag] : tags(xml, "reg")) {
        Described one;
        one.name = attribute(tag, "name");
        one.type = attribute(tag, "type");
        one.group = attribute(tag, "group");
        one.number = number_in(attribute(tag, "regnum"));
        one.digits = number_in(attribute(tag, "bitsize")) / 4;
        one.saved = attribute(tag, "save-restore") != "no";
        for (const auto& [feature_at, feature] : features) {
            if (feature_at < at)
                one.feature = attribute(feature, "name");
        }
        all.push_back(std::move(one));
    }
    return all;
}

/// A guest in long mode, or in protected mode with 32-bit paging, whose registers all hold something else.
struct Guest {
    explicit Guest(TargetWidth width) {
        const bool wide = width == TargetWidth::bits_64;
        const std::uint64_t high = wide ? 0xffff'8000'0000'0000 : 0x8000'0000;
        for (std::size_t i = 0; i < cpu.gpr.size(); ++i)
            cpu.gpr.at(i) = (wide ? 0x0123'4567'89ab'cd00 : 0x89ab'cd00) + i;
        cpu.rip = high + 0x1234;
        cpu.rflags = rflags::fixed | rflags::interrupt | rflags::iopl | 0x55;
        std::uint16_t selector = 0x10;
        for (Segment* segment : {&cpu.cs, &cpu.ss, &cpu.ds, &cpu.es, &cpu.fs, &cpu.gs, &cpu.ldtr, &cpu.tr}) {
            segment->selector = selector;
            selector = static_cast<std::uint16_t>(selector + 8);
        }
        cpu.cs.long_mode = wide;
        cpu.cs.default_32 = !wide;
        cpu.cpl = 2;
        cpu.fs.base = high + 0xf000;
        cpu.gs.base = high + 0x6000;
        cpu.kernel_gs_base = high + 0x7000;
        cpu.gdtr = {GuestVirt(high + 0x8000), 0x7f};
        cpu.idtr = {GuestVirt(high + 0x9000), 0xfff};
        cpu.cr0 = cr0::pg | cr0::wp | cr0::ne | cr0::et | cr0::mp | cr0::pe;
        cpu.cr2 = 0xdead'beef;
        cpu.cr3 = 0x1234'5018;
        cpu.cr4 = wide ? cr4::pae | cr4::pge | cr4::osfxsr : cr4::pse;
        cpu.cr8 = 5;
        cpu.efer = wide ? efer::lme | efer::lma | efer::nxe | efer::sce : 0;
        for (std::size_t i = 0; i < cpu.dr.size(); ++i)
            cpu.dr.at(i) = 0x4000 + i;
        for (std::size_t i = 0; i < 8; ++i)
            extended.st.at(i).fill(static_cast<std::byte>(0x10 + i));
        for (std::size_t i = 0; i < 16; ++i) {
            extended.xmm.at(i).fill(static_cast<std::byte>(0x20 + i));
            extended.ymm_high.at(i).fill(static_cast<std::byte>(0x30 + i));
            extended.xmm.at(i)[0] = std::byte{0xfe};
        }
        extended.fctrl = 0x27f;
        extended.fstat = 0x3800;
        extended.ftag = 0x1234;
        extended.fop = 0x123;
        extended.fioff = 0x1111'2222;
        extended.fooff = 0x3333'4444;
        extended.fiseg = 0x5555;
        extended.foseg = 0x6666;
        extended.mxcsr = 0x1fa0;
    }

    [[nodiscard]] CpuView view() const { return {cpu, extended}; }
    [[nodiscard]] CpuEdit edit() { return {cpu, extended, all_cr4, 36}; }

    VirtualCpu cpu;
    ExtendedState extended;
};

/// As the protocol has it: least significant byte first.
std::string digits_of(std::uint64_t value, std::size_t digits) {
    std::string text;
    for (std::size_t i = 0; i < digits / 2; ++i, value = i < 8 ? value >> 8 : 0)
        text += fmt::format("{:02x}", value & 0xff);
    return text;
}

/// A set, and finding its registers by name.
class Named {
  public:
    explicit Named(TargetWidth width, bool avx = true) : guest(width), registers_(width, avx) {
        for (const Described& one : described(registers_))
            by_name_.emplace(one.name, one);
    }

    [[nodiscard]] const RegisterSet& set() const { return registers_; }
    [[nodiscard]] const Described& of(const std::string& name) const { return by_name_.at(name); }
    [[nodiscard]] bool has(const std::string& name) const { return by_name_.contains(name); }
    [[nodiscard]] std::string read(const std::string& name) const {
        return registers_.read(of(name).number, guest.view());
    }
    [[nodiscard]] bool write(const std::string& name, const std::string& hex) {
        return registers_.write(of(name).number, hex, guest.edit());
    }
    [[nodiscard]] bool write(const std::string& name, std::uint64_t value) {
        return write(name, digits_of(value, of(name).digits));
    }
    /// It was not written, and nothing else was.
    void refuses(const std::string& name, std::uint64_t value) {
        const std::string before = registers_.read_all(guest.view());
        const std::uint64_t rflags = guest.cpu.rflags;
        EXPECT_FALSE(write(name, value)) << fmt::format("{} {:#x}", name, value);
        EXPECT_EQ(registers_.read_all(guest.view()), before) << name;
        EXPECT_EQ(guest.cpu.rflags, rflags);
    }
    void takes(const std::string& name, std::uint64_t value) {
        EXPECT_TRUE(write(name, value)) << fmt::format("{} {:#x}", name, value);
        EXPECT_EQ(read(name), digits_of(value, of(name).digits)) << name;
    }

    Guest guest;

  private:
    RegisterSet registers_;
    std::map<std::string, Described> by_name_;
};

class GdbRegisters : public testing::TestWithParam<TargetWidth> {
  protected:
    [[nodiscard]] static bool wide() { return GetParam() == TargetWidth::bits_64; }
};
INSTANTIATE_TEST_SUITE_P(Widths, GdbRegisters, testing::Values(TargetWidth::bits_32, TargetWidth::bits_64),
                         [](const auto& width) {
                             return width.param == TargetWidth::bits_64 ? "Wide" : "Narrow";
                         });

// --- The description

TEST_P(GdbRegisters, DescriptionAgreesWithContents) {
    const Guest guest(GetParam());
    for (const bool avx : {false, true}) {
        const RegisterSet registers(GetParam(), avx);
        EXPECT_EQ(registers.width(), GetParam());
        const auto all = described(registers);
        ASSERT_EQ(all.size(), registers.count());
        std::string contents;
        std::set<std::string> names;
        for (std::size_t i = 0; i < all.size(); ++i) {
            EXPECT_EQ(all[i].number, i) << all[i].name;
            EXPECT_TRUE(names.insert(all[i].name).second) << all[i].name;
            const std::string one = registers.read(i, guest.view());
            EXPECT_EQ(one.size(), all[i].digits) << all[i].name;
            EXPECT_EQ(one.find_first_not_of("0123456789abcdef"), std::string::npos) << one;
            contents += one;
        }
        EXPECT_EQ(registers.read_all(guest.view()), contents);
        EXPECT_EQ(names.contains("ymm0h"), avx);
        EXPECT_EQ(names.contains(wide() ? "ymm15h" : "ymm7h"), avx);
        EXPECT_FALSE(names.contains(wide() ? "ymm16h" : "ymm8h"));
        EXPECT_EQ(registers.read(all.size(), guest.view()), "");
        EXPECT_EQ(registers.read(~std::size_t{0}, guest.view()), "");
    }
}

TEST_P(GdbRegisters, DescriptionIsWellFormed) {
    const RegisterSet registers(GetParam(), true);
    const std::string xml = registers.target_xml();
    EXPECT_TRUE(xml.starts_with("<?xml version=\"1.0\"?>\n<!DOCTYPE target SYSTEM \"gdb-target.dtd\">"));
    EXPECT_NE(xml.find(wide() ? "<architecture>i386:x86-64<" : "<architecture>i386<"), std::string::npos);
    // gdb takes what it is told also with a file of the other kind.
    EXPECT_NE(xml.find(wide() ? "<compatible>i386<" : "<compatible>i386:x86-64<"), std::string::npos);
    // Elements are closed in the order in which they were opened.
    std::vector<std::string> open;
    std::set<std::string> types{"int",      "int32", "int64", "uint128",     "data_ptr",   "code_ptr",
                                "i387_ext", "int8",  "int16", "ieee_single", "ieee_double"};
    for (std::size_t at = xml.find('<', 5); at != std::string::npos; at = xml.find('<', at + 1)) {
        const std::string tag = xml.substr(at + 1, xml.find('>', at) - at - 1);
        if (tag.starts_with('!') || tag.ends_with('/')) {
            if (const std::string id = attribute(tag, "id"); !id.empty())
                types.insert(id);
            if (const std::string type = attribute(tag, "type"); !type.empty()) {
                EXPECT_TRUE(types.contains(type)) << tag; // declared before it is used
            }
        } else if (tag.starts_with('/')) {
            ASSERT_FALSE(open.empty()) << tag;
            EXPECT_EQ(tag.substr(1), open.back());
            open.pop_back();
        } else {
            open.push_back(tag.substr(0, tag.find(' ')));
            if (const std::string id = attribute(tag, "id"); !id.empty())
                types.insert(id);
        }
    }
    EXPECT_TRUE(open.empty());
    // Each feature once.
    std::set<std::string> features;
    for (const auto& [at, tag] : tags(xml, "feature"))
        EXPECT_TRUE(features.insert(attribute(tag, "name")).second) << tag;
    EXPECT_TRUE(features.contains("org.gnu.gdb.i386.core"));
    EXPECT_TRUE(features.contains("org.gnu.gdb.i386.sse"));
    EXPECT_TRUE(features.contains("org.gnu.gdb.i386.avx"));
    EXPECT_EQ(features.contains("org.gnu.gdb.i386.segments"), wide());
}

/// What the features of gdb's manual must hold ("i386 Features"), and the numbers gdb and LLDB know.
TEST_P(GdbRegisters, NamesAndOrder) {
    const Named named(GetParam());
    const std::vector<std::string> first =
        wide() ? std::vector<std::string>{"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8",
                                          "r9",  "r10", "r11", "r12", "r13", "r14", "r15", "rip", "eflags",
                                          "cs",  "ss",  "ds",  "es",  "fs",  "gs",  "st0"}
               : std::vector<std::string>{"eax",    "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip",
                                          "eflags", "cs",  "ss",  "ds",  "es",  "fs",  "gs",  "st0"};
    for (std::size_t i = 0; i < first.size(); ++i) {
        EXPECT_EQ(named.of(first[i]).number, i) << first[i];
        EXPECT_EQ(named.of(first[i]).feature, "org.gnu.gdb.i386.core");
    }
    std::size_t next = named.of("st0").number;
    for (const char* name : {"st0", "st1", "st2", "st3", "st4", "st5", "st6", "st7", "fctrl", "fstat", "ftag",
                             "fiseg", "fioff", "foseg", "fooff", "fop"}) {
        EXPECT_EQ(named.of(name).number, next++) << name;
        EXPECT_EQ(named.of(name).feature, "org.gnu.gdb.i386.core");
    }
    for (const int i : {0, wide() ? 15 : 7})
        EXPECT_EQ(named.of(fmt::format("xmm{}", i)).feature, "org.gnu.gdb.i386.sse");
    EXPECT_EQ(named.of("mxcsr").feature, "org.gnu.gdb.i386.sse");
    EXPECT_EQ(named.has("xmm8"), wide());
    EXPECT_EQ(named.of("ymm0h").feature, "org.gnu.gdb.i386.avx");
    const std::string segments = wide() ? "org.gnu.gdb.i386.segments" : "org.umbra.system";
    EXPECT_EQ(named.of("fs_base").feature, segments);
    EXPECT_EQ(named.of("gs_base").feature, segments);
    EXPECT_EQ(named.has("k_gs_base"), wide());
    for (const char* name :
         {"cr0", "cr2", "cr3", "cr4", "cr8", "efer", "ldtr", "tr", "gdtr_base", "gdtr_limit", "idtr_base",
          "idtr_limit", "dr0", "dr3", "dr6", "dr7", "code_bits", "cpl"}) {
        EXPECT_EQ(named.of(name).feature, "org.umbra.system") << name;
        EXPECT_EQ(named.of(name).group, "system") << name;
        EXPECT_FALSE(named.of(name).saved) << name; // gdb does not set it around calls of functions
    }
    EXPECT_TRUE(named.of("eflags").saved);
}

// --- Reading

TEST_P(GdbRegisters, Values) {
    const Named named(GetParam());
    const Guest& guest = named.guest;
    const std::size_t word = wide() ? 16 : 8;
    const auto is = [&](const std::string& name, std::uint64_t value, std::size_t digits) {
        EXPECT_EQ(named.read(name), digits_of(value, digits)) << name;
    };
    const std::string prefix = wide() ? "r" : "e";
    const std::map<std::string, Gpr> general{{"ax", Gpr::rax}, {"bx", Gpr::rbx}, {"cx", Gpr::rcx},
                                             {"dx", Gpr::rdx}, {"si", Gpr::rsi}, {"di", Gpr::rdi},
                                             {"bp", Gpr::rbp}, {"sp", Gpr::rsp}};
    for (const auto& [name, reg] : general)
        is(prefix + name, guest.cpu[reg], word);
    for (std::size_t i = 8; wide() && i < 16; ++i)
        is(fmt::format("r{}", i), guest.cpu.gpr.at(i), word);
    is(prefix + "ip", guest.cpu.rip, word);
    is("eflags", guest.cpu.rflags, 8);
    std::uint64_t selector = 0x10;
    for (const char* name : {"cs", "ss", "ds", "es", "fs", "gs", "ldtr", "tr"}) {
        is(name, selector, 8);
        selector += 8;
    }
    is("fs_base", guest.cpu.fs.base, word);
    is("gs_base", guest.cpu.gs.base, word);
    if (wide())
        is("k_gs_base", guest.cpu.kernel_gs_base, 16);
    is("cr0", guest.cpu.cr0, word);
    is("cr2", guest.cpu.cr2, word);
    is("cr3", guest.cpu.cr3, word);
    is("cr4", guest.cpu.cr4, word);
    is("cr8", guest.cpu.cr8, word);
    is("efer", guest.cpu.efer, 16);
    is("gdtr_base", guest.cpu.gdtr.base.value(), word);
    is("gdtr_limit", 0x7f, 8);
    is("idtr_base", guest.cpu.idtr.base.value(), word);
    is("idtr_limit", 0xfff, 8);
    is("dr3", 0x4003, word);
    is("dr6", 0xffff'0ff0, word);
    is("dr7", 0x400, word);
    is("code_bits", wide() ? 64 : 32, 8);
    is("cpl", 2, 8);
    is("fctrl", 0x27f, 8);
    is("fstat", 0x3800, 8);
    is("ftag", 0x1234, 8);
    is("fiseg", 0x5555, 8);
    is("fioff", 0x1111'2222, 8);
    is("foseg", 0x6666, 8);
    is("fooff", 0x3333'4444, 8);
    is("fop", 0x123, 8);
    is("mxcsr", 0x1fa0, 8);
    EXPECT_EQ(named.read("st0"), "10101010101010101010");
    EXPECT_EQ(named.read("st7"), "17171717171717171717");
    EXPECT_EQ(named.read("xmm1"), "fe212121212121212121212121212121"); // the lowest byte first
    EXPECT_EQ(named.read("ymm7h"), "37373737373737373737373737373737");
}

TEST_P(GdbRegisters, Expedited) {
    const Named named(GetParam());
    const std::string text = named.set().expedited(named.guest.cpu);
    const std::string prefix = wide() ? "r" : "e";
    std::string expected;
    for (const char* name : {"bp", "sp", "ip"}) {
        const std::string full = prefix + name;
        expected += fmt::format("{:02x}:{};", named.of(full).number, named.read(full));
    }
    EXPECT_EQ(text, expected);
    EXPECT_TRUE(text.starts_with(wide() ? "06:" : "05:")) << text;
}

// --- Writing

TEST_P(GdbRegisters, WhatWasReadCanBeWritten) {
    for (const bool avx : {false, true}) {
        Guest guest(GetParam());
        const RegisterSet registers(GetParam(), avx);
        const std::string before = registers.read_all(guest.view());
        EXPECT_TRUE(registers.write_all(before, guest.edit()));
        EXPECT_EQ(registers.read_all(guest.view()), before);
        for (std::size_t i = 0; i < registers.count(); ++i) // read-only ones too
            EXPECT_TRUE(registers.write(i, registers.read(i, guest.view()), guest.edit())) << i;
        EXPECT_EQ(registers.read_all(guest.view()), before);
        EXPECT_EQ(guest.extended, Guest(GetParam()).extended);
        EXPECT_EQ(guest.cpu.gpr, Guest(GetParam()).cpu.gpr);
    }
}

/// A register written alone changes nothing else, and comes back.
TEST_P(GdbRegisters, EachRegisterIsWrittenAlone) {
    const std::set<std::string> read_only{
        "cs",        "ss",         "ds",  "es",  "fs",  "gs",  "ldtr", "tr",  "gdtr_base", "gdtr_limit",
        "idtr_base", "idtr_limit", "dr0", "dr1", "dr2", "dr3", "dr6",  "dr7", "code_bits", "cpl"};
    // What differs from the value that the guest has, where not every change is allowed.
    const std::map<std::string, std::uint64_t> others{
        {"cr0", cr0::pg | cr0::ne | cr0::et | cr0::ts | cr0::pe},
        {"cr4", wide() ? cr4::pae | cr4::smep | cr4::osfxsr : cr4::pse | cr4::tsd},
        {"cr8", 9},
        {"efer", wide() ? efer::lme | efer::lma : efer::nxe},
        {"eflags", rflags::fixed | rflags::trap | rflags::direction | 0x15},
        {"mxcsr", 0xffff},
        {"fop", 0x7ff},
        {"cr3", 0xf'0000'0000 >> (wide() ? 0 : 4)}};
    const auto all = described(RegisterSet(GetParam(), true));
    for (const Described& one : all) {
        Named named(GetParam());
        const auto& set = named.set();
        const std::string before = set.read_all(named.guest.view());
        const auto known = others.find(one.name);
        // The lowest byte is not what any register has; what is above is small enough for every one.
        const std::string value =
            known == others.end() ? digits_of(0x4a69, one.digits) : digits_of(known->second, one.digits);
        ASSERT_NE(named.read(one.name), value) << one.name;
        EXPECT_EQ(named.write(one.name, value), !read_only.contains(one.name)) << one.name;
        std::string expected = before;
        if (!read_only.contains(one.name)) {
            std::size_t at = 0;
            for (std::size_t i = 0; i < one.number; ++i)
                at += all[i].digits;
            expected.replace(at, one.digits, value);
        }
        EXPECT_EQ(set.read_all(named.guest.view()), expected) << one.name;
        // The same change as one packet for all.
        Guest other(GetParam());
        EXPECT_TRUE(set.write_all(expected, other.edit())) << one.name;
        EXPECT_EQ(set.read_all(other.view()), expected) << one.name;
    }
}

TEST_P(GdbRegisters, WholeVectorsAndStackRegisters) {
    Named named(GetParam());
    EXPECT_TRUE(named.write("st2", std::string("00010203040506070809")));
    EXPECT_EQ(named.guest.extended.st[2][9], std::byte{9});
    EXPECT_TRUE(named.write("xmm7", std::string("000102030405060708090a0b0c0d0e0F")));
    EXPECT_EQ(named.guest.extended.xmm[7][15], std::byte{15});
    EXPECT_EQ(named.read("xmm7"), "000102030405060708090a0b0c0d0e0f");
    EXPECT_TRUE(named.write("ymm7h", std::string("f00102030405060708090a0b0c0d0e0f")));
    EXPECT_EQ(named.guest.extended.ymm_high[7][0], std::byte{0xf0});
}

TEST_P(GdbRegisters, DamagedDigitsAreRefused) {
    Named named(GetParam());
    const auto& set = named.set();
    const std::string before = set.read_all(named.guest.view());
    for (const auto& one : described(set)) {
        const std::string good = named.read(one.name);
        for (const std::string& bad :
             {std::string(), good.substr(2), good.substr(1), good + "00", good + "0", "x" + good.substr(1),
              good.substr(0, good.size() - 1) + "g", " " + good.substr(1), std::string(good.size(), 'x')})
            EXPECT_FALSE(named.write(one.name, bad)) << one.name << ' ' << bad;
    }
    EXPECT_FALSE(set.write(set.count(), "00000000", named.guest.edit()));
    EXPECT_FALSE(set.write(~std::size_t{0}, "00000000", named.guest.edit()));
    for (const std::string& bad :
         {std::string(), before.substr(2), before.substr(0, before.size() - 2), before + "00",
          before.substr(0, before.size() - 1) + "g", "zz" + before.substr(2), before + " "})
        EXPECT_FALSE(set.write_all(bad, named.guest.edit())) << bad.size();
    EXPECT_EQ(set.read_all(named.guest.view()), before);
}

/// If one value is refused none is taken.
TEST_P(GdbRegisters, AllOrNothing) {
    Named named(GetParam());
    const auto& set = named.set();
    const std::string before = set.read_all(named.guest.view());
    std::string changed = before;
    changed.replace(0, 2, "77");                  // the first general register
    changed.replace(changed.size() - 8, 2, "03"); // the last register: CPL
    EXPECT_FALSE(set.write_all(changed, named.guest.edit()));
    EXPECT_EQ(set.read_all(named.guest.view()), before);
    EXPECT_EQ(named.guest.extended, Guest(GetParam()).extended);
}

TEST_P(GdbRegisters, Flags) {
    Named named(GetParam());
    EXPECT_TRUE(named.write("eflags", 0)); // bit 1 is always one
    EXPECT_EQ(named.guest.cpu.rflags, rflags::fixed);
    EXPECT_TRUE(named.write("eflags", 0xffff'ffff & ~rflags::virtual_8086)); // those that are defined
    EXPECT_EQ(named.guest.cpu.rflags, 0x3d'7fd7U);
    named.refuses("eflags", 0x202 | rflags::virtual_8086);
    named.guest.cpu.rflags = 0x202 | rflags::virtual_8086;
    named.refuses("eflags", 0x202);
    EXPECT_TRUE(named.write("eflags", 0x203 | rflags::virtual_8086));
    EXPECT_EQ(named.guest.cpu.rflags, 0x203 | rflags::virtual_8086);
}

TEST_P(GdbRegisters, ControlRegisters) {
    Named named(GetParam());
    const std::uint64_t cr0_now = named.guest.cpu.cr0, cr4_now = named.guest.cpu.cr4;
    for (const unsigned bit : {6U, 7U, 15U, 17U, 19U, 28U}) // reserved
        named.refuses("cr0", cr0_now | 1U << bit);
    named.refuses("cr0", cr0_now & ~cr0::pg);
    named.refuses("cr0", cr0_now & ~cr0::pe);
    named.refuses("cr0", cr0_now & ~(cr0::pe | cr0::pg));
    named.refuses("cr0", cr0_now | cr0::nw); // not without CD
    EXPECT_TRUE(named.write("cr0", cr0_now | cr0::nw | cr0::cd));
    EXPECT_TRUE(named.write("cr0", cr0_now & ~cr0::et)); // which is always one
    EXPECT_EQ(named.guest.cpu.cr0, cr0_now);
    named.takes("cr0", cr0_now ^ cr0::wp);

    for (const unsigned bit : {13U, 14U, 15U, 19U, 23U, 31U})
        named.refuses("cr4", cr4_now | 1U << bit);
    named.refuses("cr4", cr4_now ^ cr4::pae);
    named.refuses("cr4", cr4_now | cr4::la57);
    named.takes("cr4", cr4_now | cr4::smap | cr4::smep | cr4::umip | cr4::fsgsbase);
    named.takes("cr4", cr4_now);
    // What the guest's CPU does not have is reserved.
    const CpuEdit poor{named.guest.cpu, named.guest.extended, cr4_offered(0, 0, 0), 36};
    EXPECT_FALSE(named.set().write(named.of("cr4").number,
                                   digits_of(cr4_now | cr4::smep, named.of("cr4").digits), poor));
    EXPECT_TRUE(named.set().write(named.of("cr4").number,
                                  digits_of(cr4_now | cr4::tsd, named.of("cr4").digits), poor));

    named.takes("cr8", 15);
    named.refuses("cr8", 16);
    named.takes("cr2", 0x8000'0000);

    const std::uint64_t efer_now = named.guest.cpu.efer;
    named.takes("efer", efer_now ^ efer::nxe);
    named.takes("efer", efer_now ^ efer::sce);
    named.takes("efer", efer_now);
    for (const std::uint64_t flag : {efer::lme, efer::lma, efer::lme | efer::lma})
        named.refuses("efer", efer_now ^ flag);
    for (const unsigned bit : {1U, 7U, 9U, 12U, 15U, 63U})
        named.refuses("efer", efer_now | std::uint64_t{1} << bit);
}

TEST_P(GdbRegisters, Cr3) {
    Named named(GetParam());
    named.takes("cr3", 0x1000);
    named.takes("cr3", wide() ? 0xf'ffff'f000 : 0xffff'f000);
    if (!wide())
        return;
    for (const unsigned bit : {36U, 51U, 52U, 62U, 63U})
        named.refuses("cr3", std::uint64_t{1} << bit);
    const CpuEdit larger{named.guest.cpu, named.guest.extended, all_cr4, 52};
    EXPECT_TRUE(named.set().write(named.of("cr3").number, digits_of(0xf'ffff'ffff'f000, 16), larger));
    EXPECT_FALSE(named.set().write(named.of("cr3").number, digits_of(0x10'0000'0000'0000, 16), larger));
}

/// Intel SDM vol. 3A, 4.10.1: CR4.PCIDE is set in long mode only, and while CR3's lowest bits are zero.
TEST_P(GdbRegisters, ProcessContexts) {
    Named named(GetParam());
    const std::uint64_t with = named.guest.cpu.cr4 | cr4::pcide;
    named.refuses("cr4", with); // CR3 has PWT and PCD
    named.takes("cr3", 0x1000);
    if (!wide()) {
        named.refuses("cr4", with);
        return;
    }
    named.takes("cr4", with);
    named.takes("cr3", 0x1fff);
    named.takes("cr4", with | cr4::smep); // it was on before
    named.takes("cr4", with & ~cr4::pcide);
}

TEST(GdbRegistersWide, AddressesAreCanonical) {
    Named named(TargetWidth::bits_64);
    for (const std::string name : {"rip", "fs_base", "gs_base", "k_gs_base"}) {
        named.takes(name, 0x7fff'ffff'ffff);
        named.takes(name, 0xffff'8000'0000'0000);
        named.takes(name, ~std::uint64_t{0});
        named.takes(name, 0);
        named.refuses(name, 0x8000'0000'0000);
        named.refuses(name, 0xffff'7fff'ffff'ffff);
        named.refuses(name, 0x8000'0000'0000'0000);
    }
    named.guest.cpu.cr4 |= cr4::la57;
    named.takes("rip", 0xff'ffff'ffff'ffff);
    named.refuses("rip", 0x100'0000'0000'0000);
    // What is no address to the CPU may be anything.
    named.takes("cr2", 0x8000'0000'0000'0000);
    named.takes("rsp", 0x8000'0000'0000'0000);
    // A guest that has left long mode since has 32 bits.
    named.guest.cpu.efer = 0;
    named.refuses("rip", 0x1'0000'0000);
    named.takes("rip", 0xffff'fffe);
}

TEST(GdbRegistersNarrow, HighHalvesOfALongModeGuest) {
    // The client came before the guest was in long mode. What it does not write stays whole.
    Named named(TargetWidth::bits_32);
    named.guest = Guest(TargetWidth::bits_64);
    const std::string all = named.set().read_all(named.guest.view());
    EXPECT_TRUE(named.set().write_all(all, named.guest.edit()));
    EXPECT_EQ(named.guest.cpu.gpr, Guest(TargetWidth::bits_64).cpu.gpr);
    EXPECT_EQ(named.guest.cpu.rip, Guest(TargetWidth::bits_64).cpu.rip);
    EXPECT_TRUE(named.write("eax", 0x1234)); // as MOV to EAX does
    EXPECT_EQ(named.guest.cpu[Gpr::rax], 0x1234U);
}

/// A 64-bit kernel before it is in long mode, and 32-bit code under it.
TEST(GdbRegistersWide, ThirtyTwoBitCode) {
    for (const bool compatibility : {false, true}) {
        Named named(TargetWidth::bits_64);
        VirtualCpu& cpu = named.guest.cpu;
        cpu.cs.long_mode = false;
        cpu.cs.default_32 = true;
        if (!compatibility)
            cpu.efer = 0;
        EXPECT_EQ(named.read("code_bits"), "20000000");
        EXPECT_EQ(named.read("rax"), digits_of(0x89ab'cd00, 16));
        EXPECT_EQ(named.read("rdi"), digits_of(0x89ab'cd00 + static_cast<unsigned>(Gpr::rdi), 16));
        EXPECT_EQ(named.read("r8"), digits_of(0x0123'4567'89ab'cd08, 16));
        EXPECT_EQ(named.set().value(named.of("rax").number, cpu), 0x89ab'cd00U);
        const auto before = cpu.gpr;
        EXPECT_TRUE(named.write("rax", named.read("rax"))); // whole, as it is not written
        EXPECT_EQ(cpu.gpr, before);
        EXPECT_TRUE(named.write("rax", 0x1'0000'0007)); // as MOV to EAX does
        EXPECT_EQ(cpu[Gpr::rax], 7U);
        cpu.cs.default_32 = false;
        EXPECT_EQ(named.read("code_bits"), "10000000");
    }
}

TEST_P(GdbRegisters, ValuesOfExpressions) {
    const Named named(GetParam());
    const auto value = [&](const std::string& name) {
        return named.set().value(named.of(name).number, named.guest.cpu);
    };
    EXPECT_EQ(value(wide() ? "rcx" : "ecx"), named.guest.cpu[Gpr::rcx]); // not of the same number
    EXPECT_EQ(value(wide() ? "rip" : "eip"), named.guest.cpu.rip);
    EXPECT_EQ(value("eflags"), named.guest.cpu.rflags);
    EXPECT_EQ(value("cr3"), named.guest.cpu.cr3);
    for (const char* name : {"st0", "fctrl", "xmm0", "mxcsr", "ymm0h"})
        EXPECT_EQ(value(name), std::nullopt) << name;
    EXPECT_EQ(named.set().value(named.set().count(), named.guest.cpu), std::nullopt);
}

TEST_P(GdbRegisters, Selectors) {
    Named named(GetParam());
    for (const char* name : {"cs", "ss", "ds", "es", "fs", "gs", "ldtr", "tr"}) {
        named.refuses(name, 0);
        named.refuses(name, 0x0b);
        named.refuses(name, 0x1'0010); // the selector that CS has, and more
        EXPECT_TRUE(named.write(name, named.read(name))) << name;
    }
    named.guest.cpu.fs.selector = 0xffff;
    EXPECT_EQ(named.read("fs"), "ffff0000");
}

TEST_P(GdbRegisters, FpuFieldsAreSixteenBits) {
    Named named(GetParam());
    for (const char* name : {"fctrl", "fstat", "ftag", "fiseg", "foseg"}) {
        named.takes(name, 0xffff);
        named.refuses(name, 0x1'0000);
        named.refuses(name, 0x8000'0000);
    }
    named.takes("fioff", 0xffff'ffff);
    named.takes("fooff", 0xffff'ffff);
    named.takes("fop", 0x7ff); // eleven bits (Intel SDM vol. 1, 8.1.9)
    named.refuses("fop", 0x800);
    named.takes("mxcsr", 0xffff); // the rest is reserved (Intel SDM vol. 1, 10.2.3)
    named.refuses("mxcsr", 0x1'0000);
    named.refuses("mxcsr", 0x8000'1f80);
}

} // namespace
} // namespace umbra
