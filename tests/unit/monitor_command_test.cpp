// Unit tests of vmm/debug/monitor_command.hpp: each command by its name, by its beginnings and in the help;
// what is none; addresses.
#include "vmm/debug/monitor_command.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <elf.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

using Words = std::vector<std::string>;

constexpr std::array<std::pair<std::string_view, MonitorCommand>, 19> all{{
    {"help", MonitorCommand::help},
    {"pt", MonitorCommand::pt},
    {"maps", MonitorCommand::maps},
    {"vtop", MonitorCommand::vtop},
    {"ptov", MonitorCommand::ptov},
    {"traps", MonitorCommand::traps},
    {"regs", MonitorCommand::regs},
    {"stats", MonitorCommand::stats},
    {"trace", MonitorCommand::trace},
    {"watch", MonitorCommand::watch},
    {"unwatch", MonitorCommand::unwatch},
    {"hidden-breakpoints", MonitorCommand::hidden_breakpoints},
    {"catch", MonitorCommand::catch_event},
    {"uncatch", MonitorCommand::uncatch},
    {"step-interrupts", MonitorCommand::step_interrupts},
    {"bind", MonitorCommand::bind},
    {"core", MonitorCommand::core},
    {"reset", MonitorCommand::reset},
    {"quit", MonitorCommand::quit},
}};
static_assert(all.size() == static_cast<std::size_t>(MonitorCommand::quit) + 1);

/// Nothing if it is none, whatever is said then.
std::optional<MonitorCommand> command_of(std::string_view line) {
    const auto parsed = parse_monitor_command(line);
    const auto* command = std::get_if<ParsedCommand>(&parsed);
    return command == nullptr ? std::nullopt : std::optional(command->command);
}
Words words_of(std::string_view line) {
    const auto parsed = parse_monitor_command(line);
    const auto* command = std::get_if<ParsedCommand>(&parsed);
    return command == nullptr ? Words{"no command"} : command->words;
}
/// What is said of a line that is no command.
std::string refusal(std::string_view line) {
    const auto parsed = parse_monitor_command(line);
    const auto* text = std::get_if<std::string>(&parsed);
    return text == nullptr ? "a command" : *text;
}
std::string help(const Words& words) {
    return monitor_help(words);
}

// ---- Names

TEST(MonitorCommands, EachByItsName) {
    for (const auto& [name, command] : all) {
        EXPECT_EQ(command_of(name), command) << name;
        EXPECT_EQ(words_of(name), Words{}) << name;
        EXPECT_EQ(monitor_command_info(command).name, name);
        EXPECT_EQ(monitor_command_info(command).command, command);
    }
}

TEST(MonitorCommands, EachByEveryBeginningThatNoOtherHas) {
    for (const auto& [name, command] : all) {
        for (std::size_t length = 1; length < name.size(); ++length) {
            const std::string_view beginning = name.substr(0, length);
            const auto others = std::ranges::count_if(
                all, [beginning](const auto& other) { return other.first.starts_with(beginning); });
            const bool is_name =
                std::ranges::any_of(all, [beginning](const auto& other) { return other.first == beginning; });
            if (!is_name) {
                EXPECT_EQ(command_of(beginning), others == 1 ? std::optional(command) : std::nullopt)
                    << beginning;
            }
        }
    }
}

TEST(MonitorCommands, NameThatBeginsAnother) {
    EXPECT_EQ(command_of("pt"), MonitorCommand::pt);
    EXPECT_EQ(command_of("pto"), MonitorCommand::ptov);
    EXPECT_EQ(refusal("p"), "'p' could be pt, ptov\n");
}

TEST(MonitorCommands, WordsAreWhatFollowsTheName) {
    EXPECT_EQ(words_of("watch phys 0x1000 8 w"), (Words{"phys", "0x1000", "8", "w"}));
    EXPECT_EQ(words_of("  \t watch\tphys   0x1000\r\n"), (Words{"phys", "0x1000"}));
    EXPECT_EQ(words_of("hid on"), Words{"on"});
    EXPECT_EQ(words_of("trace on /tmp/Some-File"), (Words{"on", "/tmp/Some-File"}));
}

TEST(MonitorCommands, EmptyLineIsHelp) {
    for (const std::string_view line : {"", " ", "\t\r\n "}) {
        EXPECT_EQ(command_of(line), MonitorCommand::help);
        EXPECT_EQ(words_of(line), Words{});
    }
}

TEST(MonitorCommands, AmbiguousNamesAllThatItCouldBe) {
    EXPECT_EQ(refusal("t 5"), "'t' could be traps, trace\n");
    EXPECT_EQ(refusal("st"), "'st' could be stats, step-interrupts\n");
    EXPECT_EQ(refusal("un all"), "'un' could be unwatch, uncatch\n");
    EXPECT_EQ(refusal("re"), "'re' could be regs, reset\n");
    EXPECT_EQ(refusal("c"), "'c' could be catch, core\n");
}

TEST(MonitorCommands, UnknownNamesTheNearest) {
    EXPECT_EQ(refusal("cach pf"), "'cach' is no command of umbra's; did you mean catch?\n");
    EXPECT_EQ(refusal("wacht"), "'wacht' is no command of umbra's; did you mean watch?\n");
    EXPECT_EQ(refusal("mpas"), "'mpas' is no command of umbra's; did you mean maps?\n");
    EXPECT_EQ(refusal("statsx"), "'statsx' is no command of umbra's; did you mean stats?\n");
    EXPECT_EQ(refusal("hidden_breakpoints on"),
              "'hidden_breakpoints' is no command of umbra's; did you mean hidden-breakpoints?\n");
    EXPECT_EQ(refusal("PT"), "'PT' is no command of umbra's: see monitor help\n");
}

TEST(MonitorCommands, UnknownThatIsNearNothing) {
    for (const std::string name : {"info", "x", "xy", "frobnicate", "-", "\x01\xff"})
        EXPECT_EQ(refusal(name), "'" + name + "' is no command of umbra's: see monitor help\n");
    EXPECT_EQ(command_of(std::string(100'000, 'c')), std::nullopt);
    EXPECT_EQ(command_of(std::string_view("pt\0", 3)), std::nullopt);
}

// ---- Help

TEST(MonitorCommands, HelpListsEachOnce) {
    const std::string text = help({});
    for (const auto& [name, command] : all) {
        const MonitorCommandInfo& info = monitor_command_info(command);
        const std::string begin = std::string(name) + " " + std::string(info.arguments);
        const std::size_t found = ("\n" + text).find("\n" + begin);
        ASSERT_NE(found, std::string::npos) << name;
        const std::string line = text.substr(found, text.find('\n', found) - found);
        EXPECT_TRUE(line.ends_with(info.summary)) << line;
        EXPECT_GT(line.size(), begin.size() + info.summary.size()) << "a gap between them: " << line;
    }
    EXPECT_EQ(static_cast<std::size_t>(std::ranges::count(text, '\n')), all.size() + 1);
}

TEST(MonitorCommands, HelpOfEach) {
    for (const auto& [name, command] : all) {
        const MonitorCommandInfo& info = monitor_command_info(command);
        const std::string text = help({std::string(name)});
        const std::string head = "monitor " + std::string(name) + (info.arguments.empty() ? "" : " ") +
                                 std::string(info.arguments) + ": " + std::string(info.summary) + "\n";
        EXPECT_EQ(text, head + std::string(info.detail));
        EXPECT_TRUE(text.ends_with('\n')) << name;
        EXPECT_FALSE(info.summary.empty()) << name;
        EXPECT_TRUE(std::ranges::all_of(text, [](char c) { return c == '\n' || (c >= ' ' && c <= '~'); }));
    }
}

TEST(MonitorCommands, HelpByABeginning) {
    EXPECT_EQ(help({"hid"}), help({"hidden-breakpoints"}));
    EXPECT_EQ(help({"pt", "more"}), help({"pt"}));
}

TEST(MonitorCommands, HelpOfWhatIsNone) {
    EXPECT_EQ(help({"cach"}), "'cach' is no command of umbra's; did you mean catch?\n");
    EXPECT_EQ(help({"frobnicate"}), "'frobnicate' is no command of umbra's: see monitor help\n");
    EXPECT_EQ(help({"t"}), "'t' could be traps, trace\n");
}

// ---- Addresses

/// With "main" at 0x1000 and "operator+" at 0x2000.
Symbols symbols() {
    struct Image {
        Elf64_Ehdr header{};
        std::array<Elf64_Shdr, 4> sections{}; // null, text, symbols, strings
        std::array<Elf64_Sym, 3> table{};
        std::array<char, 24> strings{"\0main\0operator+"};
    } image;
    std::memcpy(image.header.e_ident, ELFMAG, SELFMAG);
    image.header.e_ident[EI_CLASS] = ELFCLASS64;
    image.header.e_ident[EI_DATA] = ELFDATA2LSB;
    image.header.e_shoff = offsetof(Image, sections);
    image.header.e_shentsize = sizeof(Elf64_Shdr);
    image.header.e_shnum = 4;
    image.sections[1].sh_type = SHT_PROGBITS;
    image.sections[1].sh_flags = SHF_ALLOC | SHF_EXECINSTR;
    image.sections[1].sh_addr = 0x1000;
    image.sections[1].sh_size = 0x2000;
    image.sections[2].sh_type = SHT_SYMTAB;
    image.sections[2].sh_link = 3;
    image.sections[2].sh_entsize = sizeof(Elf64_Sym);
    image.sections[2].sh_offset = offsetof(Image, table);
    image.sections[2].sh_size = sizeof(image.table);
    image.sections[3].sh_type = SHT_STRTAB;
    image.sections[3].sh_offset = offsetof(Image, strings);
    image.sections[3].sh_size = sizeof(image.strings);
    constexpr auto function = static_cast<unsigned char>(STB_GLOBAL << 4 | STT_FUNC);
    image.table[1] = {1, function, 0, 1, 0x1000, 0x100};
    image.table[2] = {6, function, 0, 1, 0x2000, 0x100};
    std::vector<std::byte> bytes(sizeof(image));
    std::memcpy(bytes.data(), &image, sizeof(image));
    return Symbols::from_elf(bytes);
}

TEST(MonitorNumbers, DecimalAndHexadecimal) {
    const Symbols none;
    EXPECT_EQ(parse_number("0", none), 0U);
    EXPECT_EQ(parse_number("4096", none), 4096U);
    EXPECT_EQ(parse_number("010", none), 10U) << "no octal";
    EXPECT_EQ(parse_number("0x1000", none), 0x1000U);
    EXPECT_EQ(parse_number("0Xffff8000DEADbeef", none), 0xffff'8000'dead'beefU);
    EXPECT_EQ(parse_number("0xffffffffffffffff", none), ~std::uint64_t{0});
    EXPECT_EQ(parse_number("18446744073709551615", none), ~std::uint64_t{0});
}

TEST(MonitorNumbers, WhatIsNone) {
    const Symbols none;
    for (const std::string_view text :
         {"", "0x", "x", "-1", "+", "+1", "1+", "0x1g", "12a", " 1", "1 ", "1++1", "18446744073709551616",
          "0x10000000000000000", "main", "main+1", "0x-1"})
        EXPECT_EQ(parse_number(text, none), std::nullopt) << text;
}

TEST(MonitorNumbers, Functions) {
    const Symbols names = symbols();
    EXPECT_EQ(parse_number("main", names), 0x1000U);
    EXPECT_EQ(parse_number("operator+", names), 0x2000U);
    EXPECT_EQ(parse_number("mai", names), std::nullopt);
    EXPECT_EQ(parse_number("Main", names), std::nullopt);
}

TEST(MonitorNumbers, Sums) {
    const Symbols names = symbols();
    EXPECT_EQ(parse_number("1+2", names), 3U);
    EXPECT_EQ(parse_number("main+16", names), 0x1010U);
    EXPECT_EQ(parse_number("main+0x10", names), 0x1010U);
    EXPECT_EQ(parse_number("0x10+main", names), 0x1010U);
    EXPECT_EQ(parse_number("operator++4", names), 0x2004U);
    EXPECT_EQ(parse_number("0xffffffffffffffff+0", names), ~std::uint64_t{0});
    EXPECT_EQ(parse_number("0xffffffffffffffff+1", names), std::nullopt) << "beyond 64 bits";
    EXPECT_EQ(parse_number("1+2+3", names), std::nullopt) << "of two";
    std::string long_sum = "1";
    for (int i = 0; i < 100'000; ++i)
        long_sum += "+1";
    EXPECT_EQ(parse_number(long_sum, names), std::nullopt);
}

} // namespace
} // namespace umbra
