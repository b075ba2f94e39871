// Unit tests of vmm/debug/operands.hpp.
#include "vmm/debug/operands.hpp"

#include "vmm/debug/packet.hpp"

#include <array>
#include <ostream>
#include <string>
#include <string_view>

#include <gtest/gtest.h>

namespace umbra {

/// For GoogleTest's messages.
static void PrintTo(const MemoryAccess& access, std::ostream* out) { // NOLINT(readability-identifier-naming)
    *out << fmt::format("{} {} bytes{}{}", access.at, access.size, access.read ? " read" : "",
                        access.write ? " written" : "");
}

namespace {

using Accesses = std::vector<MemoryAccess>;

constexpr std::uint64_t rip = 0x40'0000;
constexpr std::uint64_t fs_base = 0xf500'0000, gs_base = 0x6500'0000, es_base = 0xe500'0000,
                        cs_base = 0xc500'0000, ss_base = 0x5500'0000, ds_base = 0xd500'0000;

/// Every general register holds another value: above bit 31, and in whole 64 KB.
constexpr std::uint64_t low_half_of(Gpr reg) {
    return (std::uint64_t{static_cast<std::uint8_t>(reg)} + 1) << 16;
}
constexpr std::uint64_t value_of(Gpr reg) {
    return low_half_of(reg) << 16 | low_half_of(reg);
}
constexpr std::uint64_t rcx = value_of(Gpr::rcx), rbx = value_of(Gpr::rbx), rsp = value_of(Gpr::rsp),
                        rbp = value_of(Gpr::rbp), rsi = value_of(Gpr::rsi), rdi = value_of(Gpr::rdi),
                        r13 = value_of(Gpr::r13), r14 = value_of(Gpr::r14);
constexpr std::uint64_t ebx = low_half_of(Gpr::rbx), esp = low_half_of(Gpr::rsp), ebp = low_half_of(Gpr::rbp),
                        esi = low_half_of(Gpr::rsi), edi = low_half_of(Gpr::rdi);

VirtualCpu cpu_of(CodeMode mode) {
    VirtualCpu cpu;
    for (std::size_t i = 0; i < cpu.gpr.size(); ++i)
        cpu.gpr.at(i) = mode == CodeMode::bits_64 ? value_of(Gpr(i)) : low_half_of(Gpr(i));
    cpu.rip = rip;
    cpu.fs.base = fs_base;
    cpu.gs.base = gs_base;
    cpu.es.base = es_base;
    cpu.cs.base = cs_base;
    cpu.ss.base = ss_base;
    cpu.ds.base = ds_base;
    if (mode == CodeMode::bits_64) {
        cpu.efer = efer::lme | efer::lma;
        cpu.cs.long_mode = true;
    }
    cpu.cs.default_32 = cpu.ss.default_32 = mode == CodeMode::bits_32;
    return cpu;
}

std::vector<std::byte> bytes_of(std::string_view hex) {
    return from_hex(hex).value();
}

std::optional<Accesses> accesses(const VirtualCpu& cpu, std::string_view hex) {
    return memory_accesses(cpu, bytes_of(hex));
}
std::optional<Accesses> in_64(std::string_view hex) {
    return accesses(cpu_of(CodeMode::bits_64), hex);
}
std::optional<Accesses> in_32(std::string_view hex) {
    return accesses(cpu_of(CodeMode::bits_32), hex);
}
std::optional<Accesses> in_16(std::string_view hex) {
    return accesses(cpu_of(CodeMode::bits_16), hex);
}

MemoryAccess read(std::uint64_t at, std::uint64_t size) {
    return {GuestVirt(at), size, true, false};
}
MemoryAccess written(std::uint64_t at, std::uint64_t size) {
    return {GuestVirt(at), size, false, true};
}
MemoryAccess changed(std::uint64_t at, std::uint64_t size) {
    return {GuestVirt(at), size, true, true};
}

/// One instruction in machine code, what it is, and what is expected of it.
struct Case {
    const char* hex;
    const char* text;
    Accesses expected;
};
template<class Decode>
void check(Decode decode, std::initializer_list<Case> cases) {
    for (const Case& one : cases)
        EXPECT_EQ(decode(one.hex), one.expected) << one.hex << ' ' << one.text;
}

TEST(DebugOperands, ModeOfTheCode) {
    for (const CodeMode mode : {CodeMode::bits_16, CodeMode::bits_32, CodeMode::bits_64})
        EXPECT_EQ(code_mode(cpu_of(mode)), mode);
    VirtualCpu compatibility = cpu_of(CodeMode::bits_32);
    compatibility.efer = efer::lme | efer::lma;
    EXPECT_EQ(code_mode(compatibility), CodeMode::bits_32);
    compatibility.efer = 0;
    compatibility.cs.long_mode = true; // available to software outside long mode
    EXPECT_EQ(code_mode(compatibility), CodeMode::bits_32);
}

TEST(DebugOperands, Addresses) {
    check(in_64, {
                     {"488b07", "mov rax, [rdi]", {read(rdi, 8)}},
                     {"894708", "mov [rdi+8], eax", {written(rdi + 8, 4)}},
                     {"c6448bf007", "mov byte [rbx+rcx*4-0x10], 7", {written(rbx + rcx * 4 - 0x10, 1)}},
                     {"66438b44f500", "mov ax, [r13+r14*8]", {read(r13 + r14 * 8, 2)}},
                     {"8a0510000000", "mov al, [rip+0x10]", {read(rip + 6 + 0x10, 1)}},
                     {"c605f0ffffff01", "mov byte [rip-0x10], 1", {written(rip + 7 - 0x10, 1)}},
                     {"678a0510000000", "mov al, [eip+0x10]", {read(rip + 7 + 0x10, 1)}},
                     {"67488907", "mov [edi], rax", {written(edi, 8)}},
                     {"67488b442404", "mov rax, [esp+4]", {read(esp + 4, 8)}},
                     {"a08877665544332211", "mov al, [moffs64]", {read(0x1122'3344'5566'7788, 1)}},
                     {"8b0425f0ffffff", "mov eax, [-0x10]", {read(~std::uint64_t{0} - 0xf, 4)}},
                     {"d7", "xlatb", {read(rbx, 1)}},
                 });
    VirtualCpu cpu = cpu_of(CodeMode::bits_64);
    cpu.rip = 0x1'0000'0000;
    EXPECT_EQ(accesses(cpu, "678a0510000000"), Accesses{read(0x17, 1)}); // EIP is the low half of RIP
    cpu[Gpr::rax] += 0x80;
    EXPECT_EQ(accesses(cpu, "d7"), Accesses{read(rbx + 0x80, 1)});
    cpu[Gpr::rdi] = ~std::uint64_t{0};
    EXPECT_EQ(accesses(cpu, "894708"), Accesses{written(7, 4)});
    cpu[Gpr::rdi] = 0xffff'ffff;
    EXPECT_EQ(accesses(cpu, "67894708"), Accesses{written(7, 4)});
}

TEST(DebugOperands, Segments) {
    check(in_64, {
                     {"64488b042528000000", "mov rax, fs:[0x28]", {read(fs_base + 0x28, 8)}},
                     {"65488b07", "mov rax, gs:[rdi]", {read(gs_base + rdi, 8)}},
                     {"6567488b07", "mov rax, gs:[edi]", {read(gs_base + edi, 8)}},
                     {"368b07", "mov eax, ss:[rdi]: no base", {read(rdi, 4)}},
                     {"8b4500", "mov eax, [rbp]", {read(rbp, 4)}},
                 });
    check(in_32, {
                     {"8b4710", "mov eax, [edi+0x10]", {read(ds_base + edi + 0x10, 4)}},
                     {"8845fc", "mov [ebp-4], al", {written(ss_base + ebp - 4, 1)}},
                     {"8b0424", "mov eax, [esp]", {read(ss_base + esp, 4)}},
                     {"64a100000000", "mov eax, fs:[0]", {read(fs_base, 4)}},
                     {"658b07", "mov eax, gs:[edi]", {read(gs_base + edi, 4)}},
                     {"268b07", "mov eax, es:[edi]", {read(es_base + edi, 4)}},
                     {"2e8b07", "mov eax, cs:[edi]", {read(cs_base + edi, 4)}},
                     {"d7", "xlatb", {read(ds_base + ebx, 1)}},
                 });
    VirtualCpu cpu = cpu_of(CodeMode::bits_64);
    cpu.gs.base = 0xffff'8880'0000'0000;
    EXPECT_EQ(accesses(cpu, "658a042510000000"), Accesses{read(0xffff'8880'0000'0010, 1)});
    cpu.gs.base = ~std::uint64_t{0} - 0xf;
    EXPECT_EQ(accesses(cpu, "658a042520000000"), Accesses{read(0x10, 1)}); // around the end of the space
}

TEST(DebugOperands, LinearAddressesWrapAround) {
    VirtualCpu cpu = cpu_of(CodeMode::bits_32);
    cpu.ds.base = 0xffff'f000;
    cpu[Gpr::rdi] = 0x2000;
    EXPECT_EQ(accesses(cpu, "8b07"), Accesses{read(0x1000, 4)});
    cpu.ds.base = 0;
    cpu[Gpr::rdi] = 0xffff'fffc;
    EXPECT_EQ(accesses(cpu, "8b4708"), Accesses{read(4, 4)}); // the offset has 32 bits
    cpu.ds.base = 0x1000;
    EXPECT_EQ(accesses(cpu, "8b4708"), Accesses{read(0x1004, 4)});
    cpu[Gpr::rbx] = 0xffff;
    cpu[Gpr::rsi] = 0x3'0002;
    EXPECT_EQ(accesses(cpu, "678b00"), Accesses{read(0x1001, 4)}); // mov eax, [bx+si]: 16 bits

    VirtualCpu old = cpu_of(CodeMode::bits_16);
    old[Gpr::rsp] = 0xabcd'0000;
    EXPECT_EQ(accesses(old, "50"), Accesses{written(ss_base + 0xfffe, 2)}); // SP wraps
    old[Gpr::rbx] = 0xfff0;
    EXPECT_EQ(accesses(old, "8b4720"), Accesses{read(ds_base + 0x10, 2)}); // mov ax, [bx+0x20]
}

TEST(DebugOperands, ReadingAndWriting) {
    check(in_64, {
                     {"480106", "add [rsi], rax", {changed(rsi, 8)}},
                     {"f0ff07", "lock inc dword [rdi]", {changed(rdi, 4)}},
                     {"f00007", "lock add [rdi], al", {changed(rdi, 1)}},
                     {"8707", "xchg [rdi], eax", {changed(rdi, 4)}},
                     {"66f00fc10f", "lock xadd [rdi], cx", {changed(rdi, 2)}},
                     {"f0480fb10f", "lock cmpxchg [rdi], rcx", {changed(rdi, 8)}},
                     {"f00fc70f", "lock cmpxchg8b [rdi]", {changed(rdi, 8)}},
                     {"480fc70f", "cmpxchg16b [rdi]", {changed(rdi, 16)}},
                     {"3807", "cmp [rdi], al", {read(rdi, 1)}},
                     {"850f", "test [rdi], ecx", {read(rdi, 4)}},
                     {"0f9407", "sete [rdi]", {written(rdi, 1)}},
                     {"0f4407", "cmovz eax, [rdi]: read in any case", {read(rdi, 4)}},
                     {"0f38f007", "movbe eax, [rdi]", {read(rdi, 4)}},
                     {"480f38f10f", "movbe [rdi], rcx", {written(rdi, 8)}},
                     {"660f38f00f", "movbe cx, [rdi]", {read(rdi, 2)}},
                     {"0fc307", "movnti [rdi], eax", {written(rdi, 4)}},
                     {"0f0117", "lgdt [rdi]", {read(rdi, 10)}},
                     {"0f010f", "sidt [rdi]", {written(rdi, 10)}},
                 });
    check(in_32, {
                     {"6207", "bound eax, [edi]", {read(ds_base + edi, 8)}},
                     {"c507", "lds eax, [edi]", {read(ds_base + edi, 6)}},
                     {"0f0117", "lgdt [edi]", {read(ds_base + edi, 6)}},
                 });
}

TEST(DebugOperands, VectorsAndFpu) {
    check(in_64, {
                     {"f30f6f07", "movdqu xmm0, [rdi]", {read(rdi, 16)}},
                     {"0f290f", "movaps [rdi], xmm1", {written(rdi, 16)}},
                     {"f30f1007", "movss xmm0, [rdi]", {read(rdi, 4)}},
                     {"660fd607", "movq [rdi], xmm0", {written(rdi, 8)}},
                     {"c5fe6f07", "vmovdqu ymm0, [rdi]", {read(rdi, 32)}},
                     {"c5fe7f17", "vmovdqu [rdi], ymm2", {written(rdi, 32)}},
                     {"62f17c481007", "vmovups zmm0, [rdi]", {read(rdi, 64)}},
                     {"db2f", "fld tbyte [rdi]", {read(rdi, 10)}},
                     {"df1f", "fistp word [rdi]", {written(rdi, 2)}},
                     {"dd37", "fnsave [rdi]", {written(rdi, 108)}},
                     {"66d927", "fldenv [rdi], 16 bits", {read(rdi, 14)}},
                     {"0fae17", "ldmxcsr [rdi]", {read(rdi, 4)}},
                     {"0fae07", "fxsave [rdi]", {written(rdi, 512)}},
                     {"480fae0f", "fxrstor64 [rdi]", {read(rdi, 512)}},
                 });
}

TEST(DebugOperands, Stack) {
    check(in_64, {
                     {"50", "push rax", {written(rsp - 8, 8)}},
                     {"6650", "push ax", {written(rsp - 2, 2)}},
                     {"6a01", "push 1", {written(rsp - 8, 8)}},
                     {"0fa0", "push fs", {written(rsp - 8, 8)}},
                     {"9c", "pushfq", {written(rsp - 8, 8)}},
                     {"669c", "pushfw", {written(rsp - 2, 2)}},
                     {"6750", "push rax, 32-bit addresses", {written(rsp - 8, 8)}},
                     {"58", "pop rax", {read(rsp, 8)}},
                     {"6658", "pop ax", {read(rsp, 2)}},
                     {"5c", "pop rsp", {read(rsp, 8)}},
                     {"9d", "popfq", {read(rsp, 8)}},
                     {"e800000000", "call +0", {written(rsp - 8, 8)}},
                     {"ffd0", "call rax", {written(rsp - 8, 8)}},
                     {"c3", "ret", {read(rsp, 8)}},
                     {"c20800", "ret 8", {read(rsp, 8)}},
                     {"48cb", "retfq", {read(rsp, 16)}},
                     {"48cf", "iretq", {read(rsp, 40)}},
                     {"c9", "leave", {read(rbp, 8)}},
                     {"66c9", "leave, 16-bit operand", {read(rbp, 2)}},
                     {"67c9", "leave, 32-bit addresses", {read(rbp, 8)}},
                     {"c8200000", "enter 0x20, 0", {written(rsp - 8, 8)}},
                     {"67c8200000", "enter 0x20, 0, 32-bit addresses", {written(rsp - 8, 8)}},
                     {"c8200020", "enter 0x20, 32: its level is modulo 32", {written(rsp - 8, 8)}},
                 });
    check(in_32, {
                     {"50", "push eax", {written(ss_base + esp - 4, 4)}},
                     {"60", "pushad", {written(ss_base + esp - 32, 32)}},
                     {"6660", "pusha", {written(ss_base + esp - 16, 16)}},
                     {"61", "popad", {read(ss_base + esp, 32)}},
                     {"669c", "pushf", {written(ss_base + esp - 2, 2)}},
                     {"9a001000001000", "call 0x10:0x1000", {written(ss_base + esp - 8, 8)}},
                     {"c3", "ret", {read(ss_base + esp, 4)}},
                     {"c9", "leave", {read(ss_base + ebp, 4)}},
                     {"c8080000", "enter 8, 0", {written(ss_base + esp - 4, 4)}},
                 });
    // The stack pointer's width is SS', not the code's.
    VirtualCpu cpu = cpu_of(CodeMode::bits_16);
    cpu.ss.default_32 = true;
    EXPECT_EQ(accesses(cpu, "50"), Accesses{written(ss_base + esp - 2, 2)});
    EXPECT_EQ(accesses(cpu, "c9"), Accesses{read(ss_base + ebp, 2)});
    cpu = cpu_of(CodeMode::bits_32);
    cpu.ss.default_32 = false;
    EXPECT_EQ(accesses(cpu, "50"), Accesses{written(ss_base + 0xfffc, 4)});
}

TEST(DebugOperands, MemoryAndStackInOne) {
    const auto either_order = [](std::string_view hex, const MemoryAccess& one, const MemoryAccess& other) {
        const auto found = in_64(hex);
        EXPECT_TRUE(found == Accesses({one, other}) || found == Accesses({other, one}))
            << hex << ' ' << testing::PrintToString(found);
    };
    either_order("66ff37", read(rdi, 2), written(rsp - 2, 2));               // push word [rdi]
    either_order("ff742408", read(rsp + 8, 8), written(rsp - 8, 8));         // push qword [rsp+8]: RSP before
    either_order("8f442408", read(rsp, 8), written(rsp + 8 + 8, 8));         // pop qword [rsp+8]: RSP after
    either_order("668f442408", read(rsp, 2), written(rsp + 2 + 8, 2));       // pop word [rsp+8]
    either_order("678f442408", read(rsp, 8), written(esp + 8 + 8, 8));       // pop qword [esp+8]
    either_order("8f07", read(rsp, 8), written(rdi, 8));                     // pop qword [rdi]
    either_order("ff17", read(rdi, 8), written(rsp - 8, 8));                 // call [rdi]
    either_order("ff542408", read(rsp + 8, 8), written(rsp - 8, 8));         // call [rsp+8]
    either_order("48ff1f", read(rdi, 10), written(rsp - 16, 16));            // call far [rdi]
    EXPECT_EQ(in_64("ff27"), Accesses{read(rdi, 8)});                        // jmp [rdi]
    EXPECT_EQ(in_64("65ff2425a0000000"), Accesses{read(gs_base + 0xa0, 8)}); // jmp gs:[0xa0]
}

TEST(DebugOperands, Strings) {
    const auto both = [](const VirtualCpu& cpu, std::string_view hex, const MemoryAccess& one,
                         const MemoryAccess& other) {
        const auto found = accesses(cpu, hex);
        EXPECT_TRUE(found == Accesses({one, other}) || found == Accesses({other, one}))
            << hex << ' ' << testing::PrintToString(found);
    };
    VirtualCpu cpu = cpu_of(CodeMode::bits_64);
    for (const std::uint64_t direction : {std::uint64_t{0}, rflags::direction}) { // the first element's place
        cpu.rflags = rflags::fixed | direction;
        both(cpu, "a4", read(rsi, 1), written(rdi, 1));
        both(cpu, "48a5", read(rsi, 8), written(rdi, 8));
        both(cpu, "f3a5", read(rsi, 4), written(rdi, 4));
        both(cpu, "65a4", read(gs_base + rsi, 1), written(rdi, 1)); // the source's segment
        both(cpu, "67a4", read(esi, 1), written(edi, 1));
        both(cpu, "a6", read(rsi, 1), read(rdi, 1));
        both(cpu, "f3a7", read(rsi, 4), read(rdi, 4));
        check([&](std::string_view hex) { return accesses(cpu, hex); },
              {
                  {"66ab", "stosw", {written(rdi, 2)}},
                  {"f348ab", "rep stosq", {written(rdi, 8)}},
                  {"67f3ab", "rep stosd, 32-bit addresses", {written(edi, 4)}},
                  {"ad", "lodsd", {read(rsi, 4)}},
                  {"ae", "scasb", {read(rdi, 1)}},
                  {"f248af", "repne scasq", {read(rdi, 8)}},
                  {"6c", "insb", {written(rdi, 1)}},
                  {"6f", "outsd", {read(rsi, 4)}},
                  {"f36e", "rep outsb", {read(rsi, 1)}},
              });
    }
    both(cpu_of(CodeMode::bits_32), "f3a4", read(ds_base + esi, 1), written(es_base + edi, 1));
    both(cpu_of(CodeMode::bits_32), "64a4", read(fs_base + esi, 1), written(es_base + edi, 1));
}

TEST(DebugOperands, StringsWhoseCountIsUsedUp) {
    VirtualCpu cpu = cpu_of(CodeMode::bits_64);
    constexpr std::array repeated{"f3a4", "f348a5", "f3aa", "f3a6", "f2a7", "f3ac", "f2ae",
                                  "f36c", "f36f",   "f2a4", "f2aa", "f2ac", "f26e"}; // F2 repeats them all
    for (const char* hex : repeated) {
        cpu[Gpr::rcx] = 1;
        EXPECT_FALSE(accesses(cpu, hex).value().empty()) << hex;
        cpu[Gpr::rcx] = 0;
        EXPECT_EQ(accesses(cpu, hex), Accesses()) << hex;
    }
    EXPECT_EQ(accesses(cpu, "aa"), Accesses{written(rdi, 1)}); // not repeated: RCX counts nothing
    // The counter has the addresses' width.
    cpu[Gpr::rcx] = 0x1'0000'0000;
    EXPECT_EQ(accesses(cpu, "f3aa"), Accesses{written(rdi, 1)});
    EXPECT_EQ(accesses(cpu, "67f3aa"), Accesses());
    VirtualCpu narrow = cpu_of(CodeMode::bits_32);
    narrow[Gpr::rcx] = 0x1'0000;
    EXPECT_EQ(accesses(narrow, "f3aa"), Accesses{written(es_base + edi, 1)});
    EXPECT_EQ(accesses(narrow, "67f3aa"), Accesses());
}

/// Intel SDM vol. 2A, BT: a register's bit offset reaches beyond the operand, an immediate one does not.
TEST(DebugOperands, BitStrings) {
    VirtualCpu cpu = cpu_of(CodeMode::bits_64);
    const auto at = [&](std::string_view hex, std::uint64_t offset) {
        cpu[Gpr::rax] = cpu[Gpr::rcx] = offset;
        return accesses(cpu, hex);
    };
    constexpr auto minus = [](std::uint64_t bits) { return ~bits + 1; };
    EXPECT_EQ(at("0fa307", 31), Accesses{read(rdi, 4)}); // bt [rdi], eax
    EXPECT_EQ(at("0fa307", 32), Accesses{read(rdi + 4, 4)});
    EXPECT_EQ(at("0fa307", 100), Accesses{read(rdi + 12, 4)});
    EXPECT_EQ(at("0fa307", minus(1)), Accesses{read(rdi - 4, 4)});
    EXPECT_EQ(at("0fa307", minus(33)), Accesses{read(rdi - 8, 4)});
    EXPECT_EQ(at("0fa307", 0x7f'0000'0040), Accesses{read(rdi + 8, 4)}); // EAX only
    EXPECT_EQ(at("0fa307", 0x8000'0000), Accesses{read(rdi - 0x1000'0000, 4)});
    EXPECT_EQ(at("480fab07", 63), Accesses{changed(rdi, 8)}); // bts [rdi], rax
    EXPECT_EQ(at("480fab07", 64), Accesses{changed(rdi + 8, 8)});
    EXPECT_EQ(at("480fab07", 0x80'0000'0000), Accesses{changed(rdi + 0x10'0000'0000, 8)});
    EXPECT_EQ(at("480fab07", minus(0x80'0000'0000)), Accesses{changed(rdi - 0x10'0000'0000, 8)});
    EXPECT_EQ(at("660fb307", 16), Accesses{changed(rdi + 2, 2)}); // btr [rdi], ax
    EXPECT_EQ(at("660fb307", 0x1'ffff), Accesses{changed(rdi - 2, 2)});
    EXPECT_EQ(at("67f00fbb0f", minus(64)), Accesses{changed(edi - 8, 4)}); // lock btc [edi], ecx
    EXPECT_EQ(at("0fba2725", 0), Accesses{read(rdi, 4)});                  // bt dword [rdi], 37
    EXPECT_EQ(at("0fa3c8", 100), Accesses());                              // bt eax, ecx

    VirtualCpu narrow = cpu_of(CodeMode::bits_32);
    narrow.ds.base = 0;
    narrow[Gpr::rdi] = 0;
    narrow[Gpr::rax] = 0xffff'ffff;
    EXPECT_EQ(accesses(narrow, "0fab07"), Accesses{changed(0xffff'fffc, 4)});
}

TEST(DebugOperands, NoDataIsAccessed) {
    constexpr std::array none{
        "90",       "f390",   "89c3",   "488d4708", "678d442404", "0f1f00", "660f1f00", "0f1f8000000000",
        "f30f1efa", "0f180f", "0f1807", "0f0d0f",   "0f0d17",     "0fae3f", "660fae3f", "660fae37",
        "0f1c07",   "0f013f", "0f01c8", "cc",       "cd80",       "0f05",   "0fa2",     "0f0b"};
    for (const char* hex : none)
        EXPECT_EQ(in_64(hex), Accesses()) << hex;
    for (const char* hex : {"8d4708", "cc", "ce", "cd80", "0f34"})
        EXPECT_EQ(in_32(hex), Accesses()) << hex;
}

TEST(DebugOperands, WhatCannotBeToldIsNothing) {
    for (const char* hex : {"", "48", "488b", "8b8710", "0f0bff0f", "06", "ffff", "f00fa307", "c4e2"}) {
        if (std::string_view(hex) == "0f0bff0f") // what follows an instruction does not matter
            EXPECT_EQ(in_64(hex), Accesses());
        else
            EXPECT_EQ(in_64(hex), std::nullopt) << hex;
    }
    // Longer than any instruction may be.
    EXPECT_EQ(in_64("66666666666666666666666666666666488b07"), std::nullopt);
    constexpr std::array untold{
        "c4e26d90048f", "c4e2e99304cf", "62f27d49a0048f",                       // gathers and a scatter
        "0fae27",       "480fae27",     "0fae37",         "0fae2f",             // xsave, xsaveopt, xrstor
        "0fc727",       "0fc72f",       "0fc71f",                               // xsavec, xsaves, xrstors
        "62f17c491007", "c4e2758e17",   "c4e26d2c0f",     "660ff7c1", "0ff7c1", // with masks
        "0f01fc",                                                               // clzero
        "c8200003",                                                             // enter 0x20, 3
    };
    for (const char* hex : untold)
        EXPECT_EQ(in_64(hex), std::nullopt) << hex;
    EXPECT_EQ(in_32("cf"), std::nullopt); // iretd: three values or five
    EXPECT_EQ(in_16("cf"), std::nullopt);
}

TEST(DebugOperands, StepKinds) {
    constexpr std::array modes{CodeMode::bits_16, CodeMode::bits_32, CodeMode::bits_64};
    for (const CodeMode mode : modes) {
        for (const std::string prefix : {"", "66", "67", "f3", "f2", "2e", "6667", "6665"}) {
            EXPECT_EQ(step_kind(bytes_of(prefix + "9c"), mode), StepKind::pushes_flags) << prefix;
            EXPECT_EQ(step_kind(bytes_of(prefix + "9d"), mode), StepKind::pops_flags) << prefix;
            EXPECT_EQ(step_kind(bytes_of(prefix + "9e"), mode), StepKind::plain) << prefix; // sahf
        }
        for (const std::string hex : {"fa", "fb", "e421", "e521", "66e721", "ec", "ed", "ee", "ef"})
            EXPECT_EQ(step_kind(bytes_of(hex), mode), StepKind::by_iopl) << hex;
        for (const std::string hex : {"6c", "6d", "6e", "6f", "f36c", "666d", "f36e"})
            EXPECT_EQ(step_kind(bytes_of(hex), mode), StepKind::string_io) << hex;
        for (const std::string hex : {"f1", "2e2ef1"})
            EXPECT_EQ(step_kind(bytes_of(hex), mode), StepKind::int1) << hex;
        // push eax, iret, int3, and code that ends too early or is none
        for (const char* hex : {"50", "cf", "cc", "90", "", "66", "0f", "f09c", "f09d", "909c"})
            EXPECT_EQ(step_kind(bytes_of(hex), mode), StepKind::plain) << hex;
    }
    for (const std::string prefix : {"48", "4f", "40", "6648"}) {
        EXPECT_EQ(step_kind(bytes_of(prefix + "9c"), CodeMode::bits_64), StepKind::pushes_flags) << prefix;
        EXPECT_EQ(step_kind(bytes_of(prefix + "9d"), CodeMode::bits_64), StepKind::pops_flags) << prefix;
    }
    EXPECT_EQ(step_kind(bytes_of("489c"), CodeMode::bits_32), StepKind::plain); // dec eax
}

} // namespace
} // namespace umbra
