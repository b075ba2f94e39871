// Unit tests of vmm/report.hpp. Set UMBRA_EXAMPLE_REPORT to a path to get an example report there.
#include "vmm/report.hpp"

#include "shadow/mmu.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>
#include <string_view>

#include <elf.h>
#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

constexpr std::uint64_t table_bits = entry_bit::present | entry_bit::writable | entry_bit::accessed;
constexpr std::uint64_t code_address = 0xffff'8000'0010'0000;
constexpr std::uint64_t stack_page = 0xffff'8000'0020'0000;
constexpr std::uint64_t user_page = 0x40'0000;
constexpr std::uint64_t read_only_page = 0x40'1000;
constexpr std::uint64_t unmapped_page = 0x7f00'0000'0000;

// Guest-physical, where the IDT register leads to.
constexpr std::uint64_t idt = 0x9200;
constexpr std::uint64_t page_fault_gate = idt + 0xe0;
constexpr std::uint64_t double_fault_gate = idt + 0x80;

/// A symbol table of functions of 0x40 bytes each, from code_address on.
Symbols make_symbols(std::initializer_list<const char*> names) {
    Elf64_Ehdr header{};
    std::memcpy(header.e_ident, ELFMAG, SELFMAG);
    header.e_ident[EI_CLASS] = ELFCLASS64;
    header.e_ident[EI_DATA] = ELFDATA2LSB;
    header.e_shoff = sizeof header;
    header.e_shentsize = sizeof(Elf64_Shdr);
    std::array<Elf64_Shdr, 3> sections{};
    header.e_shnum = sections.size();
    std::vector<Elf64_Sym> symbols;
    std::string strings(1, '\0');
    for (const char* name : names) {
        Elf64_Sym symbol{};
        symbol.st_name = static_cast<Elf64_Word>(strings.size());
        symbol.st_info = STB_GLOBAL << 4 | STT_FUNC;
        symbol.st_value = code_address + 0x40 * symbols.size();
        symbol.st_size = 0x40;
        symbols.push_back(symbol);
        strings += name;
        strings += '\0';
    }
    sections[0].sh_flags = SHF_EXECINSTR;
    sections[0].sh_addr = code_address;
    sections[0].sh_size = page_size;
    sections[1].sh_type = SHT_SYMTAB;
    sections[1].sh_link = 2;
    sections[1].sh_entsize = sizeof(Elf64_Sym);
    sections[1].sh_offset = sizeof header + sizeof sections;
    sections[1].sh_size = symbols.size() * sizeof(Elf64_Sym);
    sections[2].sh_offset = sections[1].sh_offset + sections[1].sh_size;
    sections[2].sh_size = strings.size();
    std::vector<std::byte> file(sections[2].sh_offset + sections[2].sh_size);
    std::memcpy(file.data(), &header, sizeof header);
    std::memcpy(file.data() + sizeof header, sections.data(), sizeof sections);
    std::memcpy(file.data() + sections[1].sh_offset, symbols.data(), sections[1].sh_size);
    std::memcpy(file.data() + sections[2].sh_offset, strings.data(), strings.size());
    return Symbols::from_elf(file);
}

/// A guest kernel that has just read from an address that it did not map.
class ReportTest : public ::testing::Test {
  public:
    ReportTest() {
        map(code_address, 0x8000, 0);
        map(stack_page, 0x9000, entry_bit::writable | entry_bit::no_execute | entry_bit::dirty);
        map(user_page, 0xa000, entry_bit::writable | entry_bit::user);
        map(read_only_page, 0xb000, entry_bit::user);

        // panic: push rbp; mov rbp, rsp; mov rax, cr2; mov rdi, [rax]; ud2; hlt; jmp
        constexpr std::array<unsigned char, 17> code{0x55, 0x48, 0x89, 0xe5, 0x0f, 0x20, 0xd0, 0x48, 0x8b,
                                                     0x38, 0x0f, 0x0b, 0xf4, 0xeb, 0xfd, 0x90, 0x90};
        std::memcpy(ram.data() + 0x8040, code.data(), code.size());
        put(0x9ff0, code_address + 0x12);
        put(0x9fe8, 0x1122'3344'5566'7788);

        cpu.rip = code_address + 0x47;
        cpu.rflags = rflags::fixed | rflags::resume | 1U << 2 | 1U << 6;
        for (std::size_t i = 0; i < cpu.gpr.size(); ++i)
            cpu.gpr.at(i) = 0x1111'1111'1111'1111 * i;
        cpu[Gpr::rsp] = stack_page + 0xfe0;
        cpu[Gpr::rax] = unmapped_page;
        cpu.cr0 = cr0::pe | cr0::mp | cr0::et | cr0::ne | cr0::wp | cr0::pg;
        cpu.cr2 = unmapped_page;
        cpu.cr3 = 0x1000;
        cpu.cr4 = cr4::pae | cr4::pge | cr4::osfxsr | cr4::osxmmexcpt | cr4::smep;
        cpu.efer = efer::sce | efer::lme | efer::lma | efer::nxe;
        cpu.cs = {.selector = 8, .limit = 0xffff'ffff, .type = 0xb, .present = true, .long_mode = true};
        cpu.ss = {.selector = 0x10, .limit = 0xffff'ffff, .type = 3, .present = true, .default_32 = true};
        cpu.ds = cpu.es = cpu.ss;
        cpu.gs.base = stack_page;
        cpu.tr = {.selector = 0x28,
                  .base = stack_page,
                  .limit = 0x67,
                  .type = 0xb,
                  .present = true,
                  .system = true};
        cpu.gdtr = {GuestVirt(stack_page + 0x100), 0x37};
        cpu.idtr = {GuestVirt(stack_page + 0x200), 0xfff};
        cpu.lstar = code_address + 0x80;
        set_paging();
    }

    void set_paging() { paging = guest_paging(cpu, 48, true); }

    void put(std::uint64_t at, std::uint64_t value) { ASSERT_TRUE(memory.write(GuestPhys(at), value)); }

    /// Maps one page; tables are taken from frame 2 on.
    void map(std::uint64_t at, std::uint64_t frame_base, std::uint64_t rights) {
        GuestPhys table(0x1000);
        for (const Level& level : paging_4_level.levels) {
            const GuestPhys slot = table + level.index(GuestVirt(at)) * sizeof(GuestEntry);
            if (level.number == 1) {
                put(slot.value(), frame_base | rights | entry_bit::present | entry_bit::accessed);
                return;
            }
            GuestEntry entry(memory.read<std::uint64_t>(slot).value());
            if (!entry.present()) {
                entry = GuestEntry(GuestFrame(next_table++), table_bits | entry_bit::user);
                put(slot.value(), entry.raw());
            }
            table = entry.table().base();
        }
    }

    TrapRecord trap(TrapReason reason, TrapAction action, std::uint64_t rip,
                    std::uint64_t microseconds) const {
        TrapRecord record;
        record.start = microseconds * 1000;
        record.end = record.start + 1500;
        record.reason = reason;
        record.action = action;
        record.cpl = cpu.cpl;
        record.rip = GuestVirt(rip);
        return record;
    }
    void add(TrapReason reason, TrapAction action, std::uint64_t rip, std::uint64_t microseconds) {
        log.add(trap(reason, action, rip, microseconds));
    }
    void add_fault(TrapAction action, std::uint64_t address, std::uint32_t error,
                   std::uint64_t microseconds) {
        TrapRecord record = trap(TrapReason::page_fault, action, cpu.rip, microseconds);
        record.vector = 14;
        record.detail = error;
        record.address = GuestVirt(address);
        log.add(record);
    }

    [[nodiscard]] std::string report(std::vector<WalkStep<MachinePhysSpace>> shadow = {},
                                     std::string_view why = "triple fault") const {
        return umbra::report({.why = why,
                              .cpu = cpu,
                              .memory = memory,
                              .paging = paging,
                              .log = log,
                              .symbols = symbols,
                              .shadow = std::move(shadow),
                              .ticks_per_us = 1000});
    }

    std::vector<std::byte> ram = std::vector<std::byte>(0x20'000);
    GuestMemory memory{{{GuestPhys(0), ram}}};
    std::uint64_t next_table = 0xc;
    VirtualCpu cpu;
    GuestPaging paging;
    TrapLog log;
    Symbols symbols = make_symbols({"main", "panic", "_ZN6kernel13syscall_entryERNS_5FrameE"});
};

/// The lines between the one that begins with `title` and the next empty one.
std::string section(const std::string& report, std::string_view title) {
    const auto begin = report.find(fmt::format("\n{}", title));
    if (begin == std::string::npos)
        return {};
    return report.substr(begin + 1, report.find("\n\n", begin + 1) - begin);
}

::testing::AssertionResult has(const std::string& text, std::string_view part) {
    if (text.find(part) != std::string::npos)
        return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << '"' << part << "\" is not in:\n" << text;
}

// ---- flags of entries

std::string flags(std::uint64_t raw, unsigned level) {
    std::string guest = entry_flags(GuestEntry(raw), paging_4_level.level(level));
    EXPECT_EQ(guest, entry_flags(ShadowEntry(raw), paging_4_level.level(level)));
    return guest;
}

TEST(EntryFlags, EachInItsColumn) {
    EXPECT_EQ(flags(0, 1), "- - - - - - -");
    EXPECT_EQ(flags(entry_bit::present, 1), "P - - - - - -");
    EXPECT_EQ(flags(entry_bit::writable, 1), "- W - - - - -");
    EXPECT_EQ(flags(entry_bit::user, 1), "- - U - - - -");
    EXPECT_EQ(flags(entry_bit::accessed, 1), "- - - A - - -");
    EXPECT_EQ(flags(entry_bit::dirty, 1), "- - - - D - -");
    EXPECT_EQ(flags(entry_bit::global, 1), "- - - - - G -");
    EXPECT_EQ(flags(entry_bit::no_execute, 1), "- - - - - - NX");
    EXPECT_EQ(flags(0x8000'0000'0000'017f, 1), "P W U A D G NX PWT PCD");
}

TEST(EntryFlags, OnlyWhatHasAMeaningAtTheLevel) {
    constexpr std::uint64_t all = ~std::uint64_t{0};
    EXPECT_EQ(flags(all, 1), "P W U A D G NX PWT PCD PAT");
    EXPECT_EQ(flags(all, 2), "P W U A D G NX PWT PCD PAT");
    EXPECT_EQ(flags(all, 4), "P W U A - - NX PWT PCD") << "level 4 has no leaves";
    EXPECT_EQ(flags(all & ~entry_bit::page_size, 2), "P W U A - - NX PWT PCD") << "refers to a table";
    EXPECT_EQ(flags(0x81, 1), "P - - - - - - PAT");
    EXPECT_EQ(flags(0x81, 2), "P - - - - - -");
}

// ---- the subject

TEST_F(ReportTest, SubjectIsTheLastFaultThatTheGuestSaw) {
    add_fault(TrapAction::deliver, 0x1000, 0, 1);
    add_fault(TrapAction::deliver, unmapped_page, PageFault::write | PageFault::user, 2);
    add_fault(TrapAction::fill, 0x3000, 0, 3);
    add(TrapReason::instruction, TrapAction::emulate, cpu.rip, 4);
    const ReportSubject subject = report_subject(cpu, log);
    EXPECT_TRUE(subject.page_fault);
    EXPECT_EQ(subject.address, GuestVirt(unmapped_page));
    EXPECT_EQ(subject.traps_since, 2U);
    EXPECT_TRUE(subject.access.write);
    EXPECT_FALSE(subject.access.fetch);
    EXPECT_FALSE(subject.access.user) << "the machine's U/S is always 1: the virtual CPL counts";
}

TEST_F(ReportTest, SubjectMayBeTheFaultOfAnEmulatedInstruction) {
    TrapRecord record = trap(TrapReason::instruction, TrapAction::stop, cpu.rip, 1);
    record.vector = 14;
    record.detail = PageFault::fetch;
    record.address = GuestVirt(0x1234);
    record.cpl = 3;
    log.add(record);
    const ReportSubject subject = report_subject(cpu, log);
    EXPECT_TRUE(subject.page_fault);
    EXPECT_EQ(subject.address, GuestVirt(0x1234));
    EXPECT_TRUE(subject.access.fetch);
    EXPECT_TRUE(subject.access.user);
    EXPECT_EQ(subject.traps_since, 0U);
}

TEST_F(ReportTest, SubjectIsOtherwiseTheFetchAtRip) {
    add_fault(TrapAction::fill, unmapped_page, 0, 1);
    cpu.cpl = 3;
    const ReportSubject subject = report_subject(cpu, log);
    EXPECT_FALSE(subject.page_fault);
    EXPECT_EQ(subject.address, GuestVirt(cpu.rip));
    EXPECT_TRUE(subject.access.fetch);
    EXPECT_TRUE(subject.access.user);
}

// ---- sections

TEST_F(ReportTest, BeginsWithWhy) {
    EXPECT_TRUE(report({}, "the reason").starts_with("Guest report: the reason\n\nRegisters"));
}

TEST_F(ReportTest, Registers) {
    const std::string text = section(report(), "Registers");
    EXPECT_TRUE(has(text, "(CPL 0):"));
    EXPECT_TRUE(has(text, "rip    ffff800000100047  <panic+0x7>\n"));
    EXPECT_TRUE(has(text, "rflags 0000000000010046  PF ZF RF IOPL=0\n"));
    EXPECT_TRUE(has(
        text, "  rax 00007f0000000000  rbx 3333333333333333  rcx 1111111111111111  rdx 2222222222222222\n"));
    EXPECT_TRUE(has(
        text, "  rsi 6666666666666666  rdi 7777777777777777  rbp 5555555555555555  rsp ffff800000200fe0\n"));
    EXPECT_TRUE(has(
        text, "  r8  8888888888888888  r9  9999999999999999  r10 aaaaaaaaaaaaaaaa  r11 bbbbbbbbbbbbbbbb\n"));
    EXPECT_TRUE(has(
        text, "  r12 cccccccccccccccc  r13 dddddddddddddddd  r14 eeeeeeeeeeeeeeee  r15 ffffffffffffffff\n"));
}

TEST_F(ReportTest, RegistersOfAHaltedProgram) {
    cpu.cpl = 3;
    cpu.halted = true;
    cpu.rflags = rflags::fixed | rflags::interrupt | rflags::iopl | std::uint64_t{1} << 40;
    const std::string text = section(report(), "Registers");
    EXPECT_TRUE(has(text, "(CPL 3, halted):"));
    EXPECT_TRUE(has(text, "IF +0x10000000000 IOPL=3\n"));
}

TEST_F(ReportTest, ControlRegistersInWords) {
    cpu.cr4 |= std::uint64_t{1} << 23;
    const std::string text = section(report(), "Control registers");
    EXPECT_TRUE(has(text, "cr0  0000000080010033  PE MP ET NE WP PG\n"));
    EXPECT_TRUE(has(text, "cr2  00007f0000000000\n"));
    EXPECT_TRUE(has(text, "cr3  0000000000001000  root gpa:0x1000, 4-level tables\n"));
    EXPECT_TRUE(has(text, "cr4  00000000009006a0  PAE PGE OSFXSR OSXMMEXCPT SMEP +0x800000\n"));
    EXPECT_TRUE(has(text, "cr8  0000000000000000\n"));
    EXPECT_TRUE(has(text, "efer 0000000000000d01  SCE LME LMA NXE\n"));
    EXPECT_TRUE(has(text, "lstar          ffff800000100080  <kernel::syscall_entry+0x0>\n"));
}

TEST_F(ReportTest, Segments) {
    cpu.ldtr = {.selector = 0x30, .type = 2, .present = true, .system = true};
    cpu.fs = {.selector = 0x1b, .base = 0x1234, .type = 0x9, .dpl = 3, .present = true};
    cpu.es = {.selector = 0x23, .type = 0x4, .dpl = 3, .present = true};
    const std::string text = section(report(), "Segments");
    EXPECT_TRUE(
        has(text, "cs    0008  base 0000000000000000  limit ffffffff  dpl 0  64-bit code, readable\n"));
    EXPECT_TRUE(has(text, "ss    0010  base 0000000000000000  limit ffffffff  dpl 0  data, writable\n"));
    EXPECT_TRUE(has(
        text, "es    0023  base 0000000000000000  limit 00000000  dpl 3  data, read-only, expand-down\n"));
    EXPECT_TRUE(
        has(text, "fs    001b  base 0000000000001234  limit 00000000  dpl 3  16-bit code, execute-only\n"));
    EXPECT_TRUE(has(text, "gs    0000  base ffff800000200000  limit 00000000  dpl 0  null\n"));
    EXPECT_TRUE(has(text, "ldtr  0030  base 0000000000000000  limit 00000000  dpl 0  LDT\n"));
    EXPECT_TRUE(has(text, "tr    0028  base ffff800000200000  limit 00000067  dpl 0  TSS, busy\n"));
    EXPECT_TRUE(has(text, "gdtr        base ffff800000200100  limit 00000037\n"));
    EXPECT_TRUE(has(text, "idtr        base ffff800000200200  limit 00000fff\n"));
}

TEST_F(ReportTest, CodeAroundRip) {
    EXPECT_EQ(section(report(), "Code"), "Code  <panic+0x7>:\n"
                                         "     ffff800000100040  55                push rbp\n"
                                         "     ffff800000100041  4889e5            mov rbp, rsp\n"
                                         "     ffff800000100044  0f20d0            mov rax, cr2\n"
                                         "  => ffff800000100047  488b38            mov rdi, [rax]\n"
                                         "     ffff80000010004a  0f0b              ud2\n"
                                         "     ffff80000010004c  f4                hlt\n"
                                         "     ffff80000010004d  ebfd              jmp 0xFFFF80000010004C\n"
                                         "     ffff80000010004f  90                nop\n"
                                         "     ffff800000100050  90                nop\n");
}

TEST_F(ReportTest, CodeBeforeRipOnlyIfItLeadsThere) {
    cpu.rip += 1; // inside an instruction
    EXPECT_TRUE(section(report(), "Code").starts_with("Code  <panic+0x8>:\n  => ffff800000100048  8b38"));
    symbols = Symbols();
    cpu.rip -= 1;
    EXPECT_TRUE(section(report(), "Code").starts_with("Code:\n  => ffff800000100047  488b38"));
}

TEST_F(ReportTest, CodeThatIsNoCode) {
    ram[0x8047] = std::byte{0x06}; // no instruction in 64-bit mode
    EXPECT_TRUE(has(section(report(), "Code"), "  => ffff800000100047  06                (bad)\n"));
}

TEST_F(ReportTest, CodeAtTheEndOfTheMappedMemory) {
    cpu.rip = code_address + 0xfff;
    ram[0x8fff] = std::byte{0x90};
    EXPECT_EQ(section(report(), "Code"), "Code:\n  => ffff800000100fff  90                nop\n");
    ram[0x8fff] = std::byte{0x48}; // the instruction goes on where nothing is
    EXPECT_EQ(section(report(), "Code"), "Code:\n  => ffff800000100fff  48                (no code)\n");
}

TEST_F(ReportTest, CodeThatCannotBeFetched) {
    cpu.rip = unmapped_page;
    EXPECT_TRUE(has(section(report(), "Code"),
                    "  => 00007f0000000000  cannot be fetched: the PML4E is not present\n"));
    cpu.rip = stack_page;
    EXPECT_TRUE(has(section(report(), "Code"), "the PTE forbids execution (NX is 1)\n"));
    cpu.rip = user_page;
    EXPECT_TRUE(has(section(report(), "Code"), "the page is the user's, and CR4.SMEP forbids the kernel"));
    cpu.rip = code_address;
    cpu.cpl = 3;
    EXPECT_TRUE(has(section(report(), "Code"), "the PTE is the kernel's only (U/S is 0)\n"));
    cpu.rip = 0x8000'0000'0000;
    EXPECT_TRUE(has(section(report(), "Code"), "cannot be fetched: the address is not canonical\n"));
    map(0x5000'0000, 0x4000'0000, entry_bit::user);
    cpu.rip = 0x5000'0010;
    EXPECT_TRUE(has(section(report(), "Code"), "it leads to gpa:0x40000010, which is not RAM\n"));
}

TEST_F(ReportTest, CompatibilityModeAddsTheSegmentBase) {
    cpu.cs.long_mode = false;
    cpu.cs.base = 0x1000;
    cpu.ss.base = 0x100;
    cpu.rip = 0xffff'ffff'003f'f000;
    cpu.cpl = 3;
    cpu[Gpr::rsp] = user_page;
    ram[0xa000] = std::byte{0x40}; // inc eax there, a prefix in 64-bit code
    EXPECT_TRUE(has(section(report(), "Code"), "  => 0000000000400000  40                inc eax\n"));
    EXPECT_TRUE(has(section(report(), "Stack"), "  0000000000400100  0000000000000000\n"));
}

TEST_F(ReportTest, Stack) {
    EXPECT_EQ(section(report(), "Stack"), "Stack:\n"
                                          "  ffff800000200fe0  0000000000000000\n"
                                          "  ffff800000200fe8  1122334455667788\n"
                                          "  ffff800000200ff0  ffff800000100012  <main+0x12>\n"
                                          "  ffff800000200ff8  0000000000000000\n"
                                          "  ffff800000201000  cannot be read: the PTE is not present\n");
}

TEST_F(ReportTest, StackAcrossPagesThatAreNotAligned) {
    map(stack_page + page_size, 0xb000, entry_bit::no_execute);
    cpu[Gpr::rsp] = stack_page + 0xffc;
    put(0x9ff8, 0x5555'6666'0000'0000);
    put(0xb000, 0x7777'8888);
    const std::string text = section(report(), "Stack");
    EXPECT_TRUE(has(text, "  ffff800000200ffc  7777888855556666\n"));
    EXPECT_EQ(std::ranges::count(text, '\n'), 9);
}

TEST_F(ReportTest, StackThatCannotBeRead) {
    cpu[Gpr::rsp] = 0xdead'0000'0000'0000;
    EXPECT_EQ(section(report(), "Stack"),
              "Stack:\n  dead000000000000  cannot be read: the address is not canonical\n");
}

TEST_F(ReportTest, WalkOfAnUnmappedAddress) {
    add_fault(TrapAction::deliver, unmapped_page, 0, 1);
    const std::string text = section(report(), "Translation");
    EXPECT_TRUE(has(
        text, "Translation of 0x00007f0000000000 for a read by the kernel (the last trap, a page fault):\n"));
    EXPECT_TRUE(has(text, "  PML4E  gpa:0x17f0              0000000000000000  - - - - - - -   -> nothing\n"));
    EXPECT_TRUE(has(text, "  page fault, error code 0x0: the PML4E is not present\n"));
}

TEST_F(ReportTest, WalkOfAForbiddenWrite) {
    cpu.cpl = 3;
    add_fault(TrapAction::deliver, read_only_page, PageFault::write | PageFault::user | PageFault::present,
              1);
    add(TrapReason::exception, TrapAction::stop, cpu.rip, 2);
    const std::string text = section(report(), "Translation");
    EXPECT_TRUE(has(text, "for a write by user code (the last page fault, 1 trap before the last):\n"));
    EXPECT_TRUE(has(text, "-> table gpa:0x"));
    EXPECT_TRUE(
        has(text,
            "  PTE    gpa:0x12008             000000000000b025  P - U A - - -   -> 4 KB page gpa:0xb000\n"));
    EXPECT_TRUE(has(text, "  page fault, error code 0x7: the PTE is read-only (R/W is 0)\n"));
}

TEST_F(ReportTest, WalkThatMeetsReservedBits) {
    put(0x1000 + 8 * paging_4_level.root().index(GuestVirt(unmapped_page)),
        std::uint64_t{1} << 50 | table_bits);
    add_fault(TrapAction::deliver, unmapped_page, 0, 1);
    EXPECT_TRUE(has(section(report(), "Translation"), "error code 0x9: the PML4E has a reserved bit set\n"));
    cpu.efer &= ~efer::nxe;
    set_paging();
    add_fault(TrapAction::deliver, stack_page, 0, 1);
    EXPECT_TRUE(has(section(report(), "Translation"),
                    "error code 0x9: the PTE has NX set, which is reserved while EFER.NXE is 0\n"));
}

TEST_F(ReportTest, WalkThatSmapForbids) {
    cpu.cr4 |= cr4::smap;
    set_paging();
    add_fault(TrapAction::deliver, user_page, PageFault::present, 1);
    EXPECT_TRUE(
        has(section(report(), "Translation"),
            "error code 0x1: the page is the user's, and CR4.SMAP forbids the kernel to access it while "
            "EFLAGS.AC is 0\n"));
    add_fault(TrapAction::deliver, user_page, PageFault::present | PageFault::fetch, 1);
    EXPECT_TRUE(has(section(report(), "Translation"), "CR4.SMEP forbids the kernel to execute it\n"));
    cpu.cpl = 3;
    add_fault(TrapAction::deliver, user_page, PageFault::user, 1);
    EXPECT_TRUE(
        has(section(report(), "Translation"), "kernel rw- (data only with EFLAGS.AC set), user rwx\n"));
}

TEST_F(ReportTest, WalksOf32BitModes) {
    cpu.efer = 0;
    cpu.cr4 = cr4::pse;
    cpu.cr3 = 0xc000;
    const GuestVirt at(0x1234'5678);
    ASSERT_TRUE(memory.write(GuestPhys(0xc000 + 4 * 0x48), std::uint32_t{0x1240'00a3})); // a page of 4 MB
    set_paging();
    add_fault(TrapAction::deliver, at.value(), 0, 1);
    EXPECT_TRUE(has(section(report(), "Translation"), "-> 4 MB page gpa:0x12400000\n"));
    EXPECT_TRUE(has(section(report(), "Translation"), "gpa:0x12745678, not RAM"));
    cpu.cr4 = cr4::pae; // its registers were never loaded: all are zero
    set_paging();
    const std::string text = section(report(), "Translation");
    EXPECT_TRUE(has(text, "  PDPTE  gpa:0xc000 "));
    EXPECT_TRUE(has(text, "error code 0x0: the PDPTE is not present\n"));
}

TEST_F(ReportTest, WalkOfAWildCr3) {
    cpu.cr3 = 0x1234'5000'0000;
    set_paging();
    const std::string text = section(report(), "Translation");
    EXPECT_TRUE(has(text, "for a fetch by the kernel (RIP):\n"));
    EXPECT_TRUE(has(text, "  PML4E  gpa:0x123450000800      ffffffffffffffff"));
    EXPECT_TRUE(has(text, "the table of this PML4E is not in RAM, and reads as all-ones\n"));
}

TEST_F(ReportTest, WalkThatSucceedsTellsTheRights) {
    const auto rights = [this](std::uint64_t at) {
        add_fault(TrapAction::deliver, at, 0, 1);
        return section(report(), "Translation");
    };
    EXPECT_TRUE(has(rights(code_address + 0x123), "  gpa:0x8123, RAM; allowed: kernel r-x, user ---\n"));
    EXPECT_TRUE(has(rights(stack_page), "  gpa:0x9000, RAM; allowed: kernel rw-, user ---\n"));
    EXPECT_TRUE(has(rights(user_page), "  gpa:0xa000, RAM; allowed: kernel rw-, user rwx\n")) << "SMEP";
    EXPECT_TRUE(has(rights(read_only_page), "  gpa:0xb000, RAM; allowed: kernel r--, user r-x\n"));
    cpu.cr0 &= ~cr0::wp;
    cpu.cr4 &= ~cr4::smep;
    set_paging();
    EXPECT_TRUE(has(rights(read_only_page), "  gpa:0xb000, RAM; allowed: kernel rwx, user r-x\n"));
    map(0x5000'0000, 0x4000'0000, 0);
    EXPECT_TRUE(has(rights(0x5000'0000), "  gpa:0x40000000, not RAM; allowed"));
}

TEST_F(ReportTest, WalkOfWhatIsNotTranslated) {
    add_fault(TrapAction::deliver, 0x8000'0000'0000, 0, 1);
    EXPECT_TRUE(has(section(report(), "Translation"), "  not canonical: no translation, but #GP or #SS\n"));
    cpu.cr0 &= ~cr0::pg;
    EXPECT_TRUE(has(section(report(), "Translation"), "  paging is off\n"));
}

TEST_F(ReportTest, WalkInTheShadowTables) {
    EXPECT_FALSE(has(report(), "shadow"));
    const WalkStep<MachinePhysSpace> step{&paging_4_level.level(2), MachinePhys(0x7000'0000'1008),
                                          ShadowEntry(0x20'00a7), GuestVirt()};
    const std::string text = section(report({step}), "Translation");
    EXPECT_TRUE(has(
        text,
        "  in the machine's (shadow) tables:\n"
        "  PDE    mpa:0x700000001008      00000000002000a7  P W U A - - -   -> 2 MB page mpa:0x200000\n"));
}

TEST_F(ReportTest, GatesOfAnEventThatCouldNotBeDelivered) {
    put(page_fault_gate, 0x0010'8e03'0008'0040);
    put(page_fault_gate + 8, 0xffff'8000);
    put(double_fault_gate, 0x1234'6f00'0010'5678);
    add_fault(TrapAction::deliver, unmapped_page, 0, 1);
    EXPECT_EQ(section(report(), "IDT gates"), "");
    add_fault(TrapAction::stop, unmapped_page, 0, 2);
    EXPECT_EQ(section(report(), "IDT gates"),
              "IDT gates of the last event, and of the double fault:\n"
              "  #DF         0000000012345678  cs 0010  ist 0  dpl 3  not present\n"
              "  #PF         ffff800000100040  cs 0008  ist 3  dpl 0  interrupt gate  <panic+0x0>\n");
    put(double_fault_gate, 0x1234'ef00'0010'5678);
    EXPECT_TRUE(has(section(report(), "IDT gates"), "dpl 3  trap gate\n"));
    put(double_fault_gate, 0x1234'e500'0010'5678);
    EXPECT_TRUE(has(section(report(), "IDT gates"), "dpl 3  not a gate of long mode\n"));
    cpu.idtr.limit = 14 * 16 + 14;
    EXPECT_TRUE(has(section(report(), "IDT gates"), "  #PF         lies beyond the IDT's limit\n"));
    cpu.idtr = {GuestVirt(unmapped_page), 0xfff};
    EXPECT_TRUE(
        has(section(report(), "IDT gates"), "  #DF         cannot be read: the PML4E is not present\n"));
}

TEST_F(ReportTest, TrapsRelativeToTheLast) {
    EXPECT_EQ(section(report(), "Last"), "");
    add_fault(TrapAction::fill, user_page, 2, 100);
    TrapRecord exception = trap(TrapReason::exception, TrapAction::deliver, code_address + 0x12, 1100);
    exception.vector = 13;
    exception.detail = 0x18;
    log.add(exception);
    exception.vector = 0;
    exception.detail = 0;
    log.add(exception);
    TrapRecord interrupt = trap(TrapReason::interrupt, TrapAction::deliver, user_page, 1101);
    interrupt.vector = 0xec;
    interrupt.cpl = 3;
    log.add(interrupt);
    TrapRecord port = trap(TrapReason::port_write, TrapAction::device, code_address, 1102);
    port.detail = 0x3f8;
    log.add(port);
    EXPECT_EQ(
        section(report(), "Last"),
        "Last 5 of 5 traps (us before the last one):\n"
        "            us cpl reason      action  rip               detail\n"
        "     -1002.000  0  page_fault  fill    ffff800000100047  0000000000400000 error 0x2  <panic+0x7>\n"
        "        -2.000  0  exception   deliver ffff800000100012  #GP error 0x18              <main+0x12>\n"
        "        -2.000  0  exception   deliver ffff800000100012  #DE                         <main+0x12>\n"
        "        -1.000  3  interrupt   deliver 0000000000400000  vector 0xec\n"
        "         0.000  0  port_write  device  ffff800000100000  port 0x3f8                  <main+0x0>\n");
}

TEST_F(ReportTest, AtMost32Traps) {
    for (std::uint64_t i = 0; i < 100; ++i)
        add(TrapReason::syscall, TrapAction::enter, i, i);
    const std::string text = section(report(), "Last");
    EXPECT_TRUE(text.starts_with("Last 32 of 100 traps"));
    EXPECT_EQ(std::ranges::count(text, '\n'), 34);
    EXPECT_TRUE(has(text, " 0000000000000063\n"));
}

// ---- the whole

TEST_F(ReportTest, ChangesNothingInTheGuest) {
    add_fault(TrapAction::deliver, user_page, 0, 1);
    const auto before = ram;
    (void)report();
    EXPECT_EQ(ram, before);
}

/// Every register and trap as wide as it gets.
TEST_F(ReportTest, IsNarrowPlainAscii) {
    symbols =
        make_symbols({"_ZN6kernel6memory18demand_pager_stateL24fault_around_and_aheadERNS_5FrameEm", "b"});
    cpu.rip = code_address + 0x20;
    cpu.lstar = ~std::uint64_t{0};
    cpu.cr0 = cpu.efer = 0xffff'ffff;
    cpu.cr4 = 0x7f'ffff & ~cr4::la57;
    cpu.rflags = ~std::uint64_t{0};
    for (Segment* segment : {&cpu.cs, &cpu.ss, &cpu.ds, &cpu.es, &cpu.fs, &cpu.gs, &cpu.ldtr, &cpu.tr})
        *segment = {.selector = 0xffff,
                    .base = ~std::uint64_t{0},
                    .limit = ~0U,
                    .type = 0xf,
                    .dpl = 3,
                    .present = true,
                    .long_mode = true};
    for (std::uint64_t i = 0; i < 32; ++i)
        add_fault(TrapAction::deliver, ~std::uint64_t{0}, 0x1f, 1'000'000 * i);
    std::istringstream lines(report());
    for (std::string line; std::getline(lines, line);) {
        // Long symbols, which are last in their lines, and all flags of CR4 at once may reach farther.
        const bool may = line.find('<') != std::string::npos || line.find("cr4") != std::string::npos;
        EXPECT_LE(line.size(), may ? 145U : 110U) << line;
        EXPECT_TRUE(std::ranges::all_of(line, [](char c) { return c >= ' ' && c <= '~'; })) << line;
        EXPECT_FALSE(line.ends_with(' ')) << line;
    }
}

/// A hostile guest's registers and tables are random: a report is made of them all the same.
TEST_F(ReportTest, OfRandomStates) {
    std::uint64_t state = 1;
    const auto random = [&state] { // splitmix64
        std::uint64_t z = state += 0x9e37'79b9'7f4a'7c15;
        z = (z ^ (z >> 30)) * 0xbf58'476d'1ce4'e5b9;
        z = (z ^ (z >> 27)) * 0x94d0'49bb'1331'11eb;
        return z ^ (z >> 31);
    };
    for (int i = 0; i < 300; ++i) {
        for (std::size_t at = 0; at < ram.size(); at += 8)
            put(at, random() % 4 == 0 ? random() : random() & 0x8000'0000'0001'ffff);
        for (std::uint64_t& reg : cpu.gpr)
            reg = random();
        cpu.rip = i % 2 == 0 ? random() : random() & 0xffff'ffff;
        cpu.cr0 = random() | cr0::pg;
        cpu.cr3 = random() & 0x1'ffff;
        cpu.cr4 = random();
        cpu.efer = random();
        cpu.rflags = random();
        cpu.cpl = static_cast<std::uint8_t>(random() % 4);
        cpu.cs.long_mode = random() % 2 == 0;
        cpu.cs.base = random();
        set_paging();
        TrapRecord record = trap(static_cast<TrapReason>(random() % 10),
                                 static_cast<TrapAction>(random() % 9), random(), random() % 1000);
        record.vector = static_cast<std::uint8_t>(random());
        record.detail = static_cast<std::uint32_t>(random());
        record.address = GuestVirt(random());
        log.add(record);
        const std::string text = report();
        for (const std::string_view title :
             {"Registers", "Code", "Stack", "Translation", "Control registers", "Segments", "Last"})
            EXPECT_FALSE(section(text, title).empty()) << title;
    }
}

TEST_F(ReportTest, Example) {
    // Filled by the real shadow MMU: the stack is mapped there, the faulting address is not.
    constexpr std::size_t pool_size = 64 * page_size;
    const std::unique_ptr<void, decltype(&std::free)> pages(std::aligned_alloc(page_size, pool_size),
                                                            &std::free);
    std::memset(pages.get(), 0, pool_size);
    TablePool pool(MachineFrame(0x8'0000'0000), {static_cast<std::byte*>(pages.get()), pool_size});
    ShadowTables tables(memory, pool, {}, ShadowEntry());
    Mmu mmu(tables);
    mmu.set_paging(paging);
    mmu.enter(false).debt.paid();
    std::uint64_t time = 100;
    for (const std::uint64_t at : {code_address, stack_page, user_page}) {
        EXPECT_EQ(mmu.fault(GuestVirt(at), {}).outcome, Miss::filled);
        add_fault(TrapAction::fill, at, at == stack_page ? PageFault::write : 0, time += 41);
    }
    TrapRecord port = trap(TrapReason::port_write, TrapAction::device, code_address + 0x31, time += 100);
    port.detail = 0x3f8;
    log.add(port);
    add(TrapReason::instruction, TrapAction::emulate, code_address + 0x44, time += 33);
    add_fault(TrapAction::stop, read_only_page + 8, PageFault::write | PageFault::user | PageFault::present,
              time + 27);
    put(page_fault_gate, 0x0010'8e00'0008'0040);
    put(page_fault_gate + 8, 0xffff'8000);
    const ReportSubject subject = report_subject(cpu, log);
    const std::string text = report(mmu.shadow_walk(subject.address, subject.access.user),
                                    "triple fault: while vector 14 was delivered");
    EXPECT_TRUE(has(text, "shadow"));
    if (const char* path = std::getenv("UMBRA_EXAMPLE_REPORT"))
        std::ofstream(path) << text;
}

} // namespace
} // namespace umbra
