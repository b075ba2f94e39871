// Unit tests of vmm/emulator in legacy protected mode, and of the ways into long mode and out of it.
#include "vmm/emulator.hpp"

#include "tests/unit/legacy_guest.hpp"
#include "vmm/segmentation.hpp"

#include <algorithm>
#include <random>
#include <utility>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace test;
using emulated::Done;
using emulated::Halted;
using emulated::NotSensitive;
using emulated::PortAccess;
using emulated::Raised;
using emulated::SoftwareEvent;
using emulated::Unsupported;

/// An environment that records what it is asked for.
class LegacyEnvironment : public CpuEnvironment {
  public:
    struct PortWrite {
        std::uint16_t port;
        unsigned size;
        std::uint32_t value;
        bool operator==(const PortWrite&) const = default;
    };

    explicit LegacyEnvironment(const GuestMemory& memory) : memory_(&memory) {}

    std::uint32_t port_read(std::uint16_t, unsigned) override { return next_read++; }
    void port_write(std::uint16_t port, unsigned size, std::uint32_t value) override {
        writes.push_back({port, size, value});
    }
    bool kernel_owns(std::uint16_t port) override { return port == 0x20; }
    std::optional<std::uint64_t> read_msr(std::uint32_t) override { return std::nullopt; }
    bool write_msr(std::uint32_t, std::uint64_t) override { return false; }
    bool write_xcr0(std::uint64_t) override { return false; }
    std::uint64_t read_tsc() override { return 0x1234'5678'9abc'def0; }
    void paging_changed(const PagingChange& change) override { changes.push_back(change); }
    std::optional<std::array<std::uint64_t, 4>> pdptes(std::uint64_t cr3) override {
        return load_pdptes(*memory_, cr3, physical_bits());
    }
    CpuidResult cpuid(std::uint32_t leaf, std::uint32_t) override {
        return leaf == 0x8000'0001 ? CpuidResult{0, 0, 0, 1U << 20} : CpuidResult{};
    }
    unsigned physical_bits() override { return 40; }
    std::uint64_t cr4_allowed() override {
        return cr4::pae | cr4::pge | cr4::pse | cr4::de | cr4::tsd | cr4::pcide | cr4::smep;
    }

    std::vector<PortWrite> writes;
    std::vector<PagingChange> changes;
    std::uint32_t next_read = 0x8182'8384;

  private:
    const GuestMemory* memory_;
};

class LegacyEmulatorTest : public ::testing::Test {
  protected:
    using Bytes = std::initializer_list<unsigned>;
    static constexpr std::uint32_t data = static_cast<std::uint32_t>(TestGuest::data);
    static constexpr std::uint32_t pdpt = 0x7000; ///< of a PAE identity map
    static constexpr std::uint64_t garbage =
        0xdead'beef'0000'0000; ///< above what 32-bit code sees of a register

    LegacyEmulatorTest() {
        cpu.rflags = rflags::fixed | rflags::resume;
        guest.put<std::uint64_t>(pdpt, 0x3000 | entry_bit::present);
    }

    /// Emulates `bytes` at RIP.
    Emulation run(Bytes bytes) {
        std::uint64_t at = cpu.cs.base + cpu.rip;
        for (const unsigned byte : bytes)
            guest.put(at++, static_cast<std::uint8_t>(byte));
        start = cpu.rip;
        return emulate(cpu, guest.space(), environment);
    }
    /// The fault of an instruction, which must have left RIP where it was; no_fault if it was done.
    Fault fault(Bytes bytes) {
        const Emulation result = run(bytes);
        if (const auto* raised = std::get_if<Raised>(&result)) {
            EXPECT_EQ(cpu.rip, start);
            return fault_of(raised->exception);
        }
        EXPECT_TRUE(std::holds_alternative<Done>(result)) << "outcome " << result.index();
        return no_fault;
    }
    /// Runs an instruction that must be done, moving RIP by its length and clearing RF.
    void expect_done(Bytes bytes) {
        cpu.rflags |= rflags::resume;
        EXPECT_EQ(fault(bytes), no_fault);
        EXPECT_EQ(cpu.rip, start + bytes.size());
        EXPECT_EQ(cpu.rflags & rflags::resume, 0U);
        cpu.rip = start;
    }
    template<class T>
    T result_of(Bytes bytes) {
        const Emulation result = run(bytes);
        EXPECT_TRUE(std::holds_alternative<T>(result)) << "outcome " << result.index();
        return std::holds_alternative<T>(result) ? std::get<T>(result) : T{};
    }
    std::uint64_t& reg(Gpr which) { return cpu[which]; }
    std::vector<PagingChange> changes() { return std::exchange(environment.changes, {}); }
    static PagingChange change(PagingChange::Kind kind, bool globals = false) {
        return {kind, globals, 0, GuestVirt(0)};
    }
    /// A frame of 4-byte items, to which ESP points.
    void frame(std::initializer_list<std::uint64_t> items) {
        reg(Gpr::rsp) = (cpu.cpl == 3 ? TestGuest::user_stack : TestGuest::kernel_stack) - 0x100;
        std::uint64_t at = reg(Gpr::rsp);
        for (const std::uint64_t item : items) {
            guest.put(at, static_cast<std::uint32_t>(item));
            at += 4;
        }
    }
    /// A pseudo-descriptor or far pointer at `data`, to which EBX points.
    void operand(std::uint16_t first, std::uint32_t second) {
        guest.put(data, first);
        guest.put(data + 2, second);
        reg(Gpr::rbx) = data;
    }
    void far_pointer(std::uint32_t offset, std::uint16_t selector) {
        guest.put(data, offset);
        guest.put(data + 4, selector);
        reg(Gpr::rbx) = data;
    }
    Fault write_cr(Bytes bytes, std::uint64_t value) {
        reg(Gpr::rax) = garbage | value;
        return fault(bytes);
    }
    Fault write_cr0(std::uint64_t value) { return write_cr({0x0f, 0x22, 0xc0}, value); }
    Fault write_cr3(std::uint64_t value) { return write_cr({0x0f, 0x22, 0xd8}, value); }
    Fault write_cr4(std::uint64_t value) { return write_cr({0x0f, 0x22, 0xe0}, value); }
    Fault write_efer(std::uint64_t value) {
        reg(Gpr::rcx) = 0xc000'0080;
        reg(Gpr::rdx) = 0;
        reg(Gpr::rax) = value;
        return fault({0x0f, 0x30});
    }

    LegacyGuest guest;
    VirtualCpu& cpu = guest.cpu;
    LegacyEnvironment environment{guest.memory()};
    std::uint64_t start = 0;
};

// --- Fetching and decoding

TEST_F(LegacyEmulatorTest, OrdinaryInstructionsAreNotSensitive) {
    for (const auto bytes :
         {Bytes{0x90},       // nop
          Bytes{0x40},       // inc eax
          Bytes{0x8c, 0xd0}, // mov eax, ss
          Bytes{0x9c},       // pushf and popf run natively
          Bytes{0x9d}, Bytes{0x06}, Bytes{0xe8, 0, 0, 0, 0}, Bytes{0xc3}, Bytes{0xff, 0xe0}})
        (void)result_of<NotSensitive>(bytes);
    EXPECT_EQ(cpu.rip, TestGuest::code);
}

TEST_F(LegacyEmulatorTest, OtherModesAreUnsupported) {
    cpu.rflags |= rflags::virtual_8086;
    EXPECT_EQ(result_of<Unsupported>({0xfa}).what, "virtual-8086 mode");
    cpu.cr0 &= ~cr0::pe;
    EXPECT_EQ(result_of<Unsupported>({0xfa}).what, "real mode");
}

TEST_F(LegacyEmulatorTest, CodeSegmentBaseAndLimit) {
    cpu.cs.base = 0x1000;
    cpu.rip = 0x1'f000;
    expect_done({0x0f, 0x22, 0xd0}); // mov cr2, eax
    cpu.cs.limit = 0x1'f002;
    expect_done({0x0f, 0x22, 0xd0});
    cpu.cs.limit = 0x1'f001;
    EXPECT_EQ(fault({0x0f, 0x22, 0xd0}), gp()); // its last byte is beyond
    cpu.cs.limit = 0x1'efff;
    EXPECT_EQ(fault({0xfa}), gp());
    cpu.cs.base = 0xffff'f000; // wraps at 4 GB
    cpu.cs.limit = 0xffff'ffff;
    cpu.rip = TestGuest::code + 0x1000;
    guest.put<std::uint16_t>(TestGuest::code, 0x80cd);
    const Emulation result = emulate(cpu, guest.space(), environment);
    ASSERT_TRUE(std::holds_alternative<SoftwareEvent>(result));
    EXPECT_EQ(std::get<SoftwareEvent>(result).event.vector, 0x80);
}

TEST_F(LegacyEmulatorTest, SixteenBitCode) {
    cpu.cs.default_32 = false;
    reg(Gpr::rbx) = data - 0x2'0000;
    reg(Gpr::rsi) = 0x10;
    cpu.ds.base = 0x2'0000;
    guest.put<std::uint16_t>(data + 0x10, 0x1ff);
    guest.put<std::uint32_t>(data + 0x12, 0x1234'5678);
    expect_done({0x0f, 0x01, 0x10}); // lgdt [bx+si]
    EXPECT_EQ(cpu.gdtr.base, GuestVirt(0x34'5678));
    expect_done({0x66, 0x0f, 0x01, 0x10});
    EXPECT_EQ(cpu.gdtr.base, GuestVirt(0x1234'5678));
}

// --- Operands

TEST_F(LegacyEmulatorTest, OperandsGoThroughTheirSegment) {
    cpu.ds.base = 0x1000;
    reg(Gpr::rbx) = garbage | (data - 0x1000);
    expect_done({0x0f, 0x01, 0x0b}); // sidt [ebx]: six bytes
    EXPECT_EQ(guest.get<std::uint64_t>(data), TestGuest::idt << 16 | cpu.idtr.limit);
    cpu.ds.limit = data - 0x1000 + 4;
    EXPECT_EQ(fault({0x0f, 0x01, 0x0b}), gp());
    expect_done({0x26, 0x0f, 0x01, 0x0b}); // through ES, whose base is 0
    cpu.ds.limit += 1;
    expect_done({0x0f, 0x01, 0x0b});
    cpu.ds.type = 1; // read-only
    EXPECT_EQ(fault({0x0f, 0x01, 0x0b}), gp());
    expect_done({0x0f, 0x01, 0x1b}); // lidt reads
    cpu.ds.present = false;
    EXPECT_EQ(fault({0x0f, 0x01, 0x1b}), gp());
    cpu.ss.limit = 0xff;
    reg(Gpr::rbp) = data;
    EXPECT_EQ(fault({0x0f, 0x01, 0x5d, 0x00}), ss()); // lidt [ebp]
    cpu.ss.base = data - 0x50;
    reg(Gpr::rbp) = 0x50;
    expect_done({0x0f, 0x01, 0x5d, 0x00});
}

TEST_F(LegacyEmulatorTest, AddressesWrapAt32Bits) {
    cpu.ds.base = 0xffff'f000;
    reg(Gpr::rbx) = data + 0x1000;
    guest.put<std::uint16_t>(data, 0x123);
    expect_done({0x0f, 0x01, 0x1b});
    EXPECT_EQ(cpu.idtr.limit, 0x123);
}

// --- Interrupt flag, HLT, ports

TEST_F(LegacyEmulatorTest, InterruptFlagAndHalt) {
    EXPECT_TRUE(result_of<Done>({0xfb}).interrupt_shadow);
    EXPECT_TRUE(cpu.interrupts_enabled());
    expect_done({0xfa});
    EXPECT_FALSE(cpu.interrupts_enabled());
    (void)result_of<Halted>({0xfb, 0xf4});
    EXPECT_EQ(cpu.rip, start + 2);
    EXPECT_TRUE(cpu.halted && cpu.interrupts_enabled());
    (void)result_of<Halted>({0xf4});
    guest.enter_user();
    cpu.rflags = rflags::fixed;
    EXPECT_EQ(fault({0xfa}), gp());
    EXPECT_EQ(fault({0xfb}), gp());
    EXPECT_EQ(fault({0xf4}), gp());
}

TEST_F(LegacyEmulatorTest, Ports) {
    reg(Gpr::rdx) = garbage | 0x3f8;
    reg(Gpr::rax) = 0x1122'3344;
    expect_done({0xef}); // out dx, eax
    expect_done({0x66, 0xef});
    expect_done({0xe6, 0x80}); // out 0x80, al
    const std::vector<LegacyEnvironment::PortWrite> written{
        {0x3f8, 4, 0x1122'3344}, {0x3f8, 2, 0x3344}, {0x80, 1, 0x44}};
    EXPECT_EQ(environment.writes, written);
    expect_done({0xec}); // in al, dx
    EXPECT_EQ(reg(Gpr::rax), 0x1122'3384U);
    EXPECT_EQ(result_of<PortAccess>({0xe4, 0x20}).port, 0x20);
}

TEST_F(LegacyEmulatorTest, PortPermissionsAreInThe32BitTss) {
    guest.enter_user();
    cpu.rflags = rflags::fixed;
    reg(Gpr::rdx) = 0x3f8;
    EXPECT_EQ(fault({0xec}), gp());
    guest.put<std::uint8_t>(TestGuest::tss + 0x68 + 0x3f8 / 8, 0xfe);
    expect_done({0xec});
    EXPECT_EQ(fault({0x66, 0xed}), gp()); // two ports
    // A 16-bit TSS has no map, whatever its limit.
    cpu.tr.type = descriptor_type::tss_16_busy;
    EXPECT_EQ(fault({0xec}), gp());
}

TEST_F(LegacyEmulatorTest, StringsGoThroughTheirSegments) {
    cpu.es.base = 0x1000;
    reg(Gpr::rdi) = garbage | (data - 0x1000);
    reg(Gpr::rcx) = garbage | 2;
    reg(Gpr::rdx) = 0x1f0;
    expect_done({0xf3, 0x6d}); // rep insd
    EXPECT_EQ(guest.get<std::uint64_t>(data), 0x8182'8385'8182'8384U);
    EXPECT_EQ(reg(Gpr::rdi), data - 0x1000 + 8U);
    EXPECT_EQ(reg(Gpr::rcx), 0U);
    // Up to the limit, and no element more.
    cpu.es.limit = data - 0x1000 + 11;
    reg(Gpr::rcx) = 2;
    EXPECT_EQ(fault({0xf3, 0x6d}), gp());
    EXPECT_EQ(reg(Gpr::rcx), 1U);
    cpu.es.limit = 0xffff'ffff;
    cpu.es.type = 1;
    EXPECT_EQ(fault({0x6c}), gp()); // insb to a read-only segment

    cpu.gs = cpu.ds;
    cpu.gs.base = 0x2000;
    reg(Gpr::rsi) = data - 0x2000;
    expect_done({0x65, 0x6e}); // outsb gs:[esi]
    EXPECT_EQ(environment.writes.back(), (LegacyEnvironment::PortWrite{0x1f0, 1, 0x84}));
    cpu.ds.base = 0x2'0000;
    reg(Gpr::rsi) = 0xffff'0000 | (data - 0x2'0000); // of which a 16-bit address uses the lower half
    expect_done({0x67, 0x6e});
    EXPECT_EQ(environment.writes.back(), (LegacyEnvironment::PortWrite{0x1f0, 1, 0x84}));
    EXPECT_EQ(reg(Gpr::rsi), (0xffff'0000 | (data - 0x2'0000)) + 1U);
}

// --- Segment registers

TEST_F(LegacyEmulatorTest, MoveToSegmentRegisters) {
    reg(Gpr::rax) = sel::based_data;
    EXPECT_FALSE(result_of<Done>({0x8e, 0xd8}).interrupt_shadow); // mov ds, ax
    EXPECT_EQ(cpu.ds.selector, sel::based_data);
    EXPECT_EQ(cpu.ds.base, LegacyGuest::segment_base);
    EXPECT_EQ(cpu.ds.limit, LegacyGuest::segment_limit);
    EXPECT_EQ(guest.access_of(sel::based_data), 0x93);
    cpu.ds = cpu.es;
    reg(Gpr::rax) = sel::kernel_data;
    EXPECT_TRUE(result_of<Done>({0x8e, 0xd0}).interrupt_shadow); // mov ss, ax
    EXPECT_EQ(cpu.ss.limit, 0xffff'ffffU);                       // page granularity
    const auto load = [this](std::uint16_t selector, unsigned modrm) {
        reg(Gpr::rax) = selector;
        return fault({0x8e, modrm});
    };
    constexpr unsigned ds_ax = 0xd8, ss_ax = 0xd0;
    EXPECT_EQ(load(0, ds_ax), no_fault);
    EXPECT_FALSE(cpu.ds.present);
    EXPECT_EQ(load(0, ss_ax), gp());
    EXPECT_EQ(load(sel::absent_data, ds_ax), np(sel::absent_data));
    EXPECT_EQ(load(sel::absent_data, ss_ax), ss(sel::absent_data));
    EXPECT_EQ(load(sel::read_only_data, ss_ax), gp(sel::read_only_data));
    EXPECT_EQ(load(sel::user_data, ss_ax), gp(sel::user_data & ~3));
    EXPECT_EQ(load(sel::execute_only_code_32, ds_ax), gp(sel::execute_only_code_32));
    EXPECT_EQ(load(sel::beyond, ds_ax), gp(sel::beyond));
    EXPECT_EQ(load(sel::tss, ds_ax), gp(sel::tss));
    EXPECT_EQ(load(sel::kernel_data, 0xc8), ud()); // mov cs, ax
}

TEST_F(LegacyEmulatorTest, DescriptorTableBaseHas32Bits) {
    cpu.gdtr.base = GuestVirt(garbage | TestGuest::gdt);
    reg(Gpr::rax) = sel::kernel_data;
    expect_done({0x8e, 0xd8});
    EXPECT_EQ(guest.access_of(sel::kernel_data), 0x93);
}

TEST_F(LegacyEmulatorTest, PopSegmentRegisters) {
    frame({0xffff'0000 | sel::based_data, sel::stack_16});
    const std::uint64_t top = reg(Gpr::rsp);
    expect_done({0x1f}); // pop ds
    EXPECT_EQ(cpu.ds.selector, sel::based_data);
    EXPECT_EQ(reg(Gpr::rsp), top + 4);
    EXPECT_TRUE(result_of<Done>({0x17}).interrupt_shadow); // pop ss, which makes the stack a 16-bit one
    EXPECT_EQ(cpu.ss.base, LegacyGuest::segment_base);
    EXPECT_EQ(reg(Gpr::rsp), top + 8);
    // From now on SP counts.
    reg(Gpr::rsp) = 0xabcd'fffe;
    guest.put<std::uint16_t>(LegacyGuest::segment_base + 0xfffe, sel::kernel_data);
    EXPECT_EQ(fault({0x07}), ss()); // pop es, of four bytes
    expect_done({0x66, 0x07});      // of two
    EXPECT_EQ(cpu.es.selector, sel::kernel_data);
    EXPECT_EQ(reg(Gpr::rsp), 0xabcd'0000U);
}

TEST_F(LegacyEmulatorTest, LoadFarPointers) {
    far_pointer(0x8765'4321, sel::based_data);
    reg(Gpr::rax) = garbage;
    expect_done({0xc4, 0x03}); // les eax, [ebx]
    EXPECT_EQ(reg(Gpr::rax), 0x8765'4321U);
    EXPECT_EQ(cpu.es.base, LegacyGuest::segment_base);
    expect_done({0x0f, 0xb2, 0x03}); // lss
    EXPECT_EQ(cpu.ss.limit, LegacyGuest::segment_limit);
    expect_done({0x0f, 0xb5, 0x03}); // lgs
    EXPECT_EQ(cpu.gs.selector, sel::based_data);
    reg(Gpr::rax) = 0x1111'1111;
    guest.put<std::uint16_t>(data + 2, sel::kernel_data);
    expect_done({0x66, 0xc5, 0x03}); // lds ax, [ebx]
    EXPECT_EQ(reg(Gpr::rax), 0x1111'4321U);
    EXPECT_EQ(cpu.ds.selector, sel::kernel_data);
    cpu.ds.limit = data + 4;
    EXPECT_EQ(fault({0xc4, 0x03}), gp());
}

// --- Descriptor tables and system segments

TEST_F(LegacyEmulatorTest, LoadDescriptorTables) {
    operand(0x123, 0x8765'4321);
    guest.put<std::uint32_t>(data + 6, 0xffff'ffff); // no part of the operand
    expect_done({0x0f, 0x01, 0x13});                 // lgdt [ebx]
    EXPECT_EQ(cpu.gdtr.limit, 0x123);
    EXPECT_EQ(cpu.gdtr.base, GuestVirt(0x8765'4321));
    expect_done({0x66, 0x0f, 0x01, 0x1b}); // lidt, operand size 16
    EXPECT_EQ(cpu.idtr.limit, 0x123);
    EXPECT_EQ(cpu.idtr.base, GuestVirt(0x65'4321));
    cpu.ds.limit = data + 4;
    EXPECT_EQ(fault({0x0f, 0x01, 0x13}), gp());
    guest.enter_user();
    EXPECT_EQ(fault({0x0f, 0x01, 0x13}), gp());
}

TEST_F(LegacyEmulatorTest, SystemSegmentsHaveShortDescriptors) {
    // What follows would be the upper half in long mode.
    guest.put<std::uint64_t>(TestGuest::gdt + sel::tss + 8, ~std::uint64_t{0});
    guest.put<std::uint64_t>(TestGuest::gdt + sel::ldt + 8, ~std::uint64_t{0});
    reg(Gpr::rax) = sel::tss;
    expect_done({0x0f, 0x00, 0xd8}); // ltr ax
    EXPECT_EQ(cpu.tr.base, TestGuest::tss);
    EXPECT_EQ(cpu.tr.type, descriptor_type::tss_busy);
    EXPECT_EQ(guest.access_of(sel::tss), 0x8b);
    EXPECT_EQ(fault({0x0f, 0x00, 0xd8}), gp(sel::tss)); // busy now
    reg(Gpr::rax) = sel::tss_16;
    expect_done({0x0f, 0x00, 0xd8});
    EXPECT_EQ(cpu.tr.type, descriptor_type::tss_16_busy);
    EXPECT_EQ(guest.access_of(sel::tss_16), 0x83);
    reg(Gpr::rax) = sel::ldt;
    expect_done({0x0f, 0x00, 0xd0}); // lldt ax
    EXPECT_EQ(cpu.ldtr.base, TestGuest::ldt);
    reg(Gpr::rax) = sel::local_data;
    expect_done({0x8e, 0xd8});
    // The last slot of the table is enough.
    cpu.gdtr.limit = sel::ldt + 7;
    reg(Gpr::rax) = sel::ldt;
    expect_done({0x0f, 0x00, 0xd0});
    cpu.gdtr.limit = sel::ldt + 6;
    EXPECT_EQ(fault({0x0f, 0x00, 0xd0}), gp(sel::ldt));
}

TEST_F(LegacyEmulatorTest, LongModeKnowsNo16BitTss) {
    cpu.efer = efer::lme | efer::lma;
    cpu.cr0 |= cr0::pg;
    cpu.cr4 = cr4::pae;
    cpu.cr3 = 0x1000;
    reg(Gpr::rax) = sel::tss_16;
    EXPECT_EQ(fault({0x0f, 0x00, 0xd8}), gp(sel::tss_16));
}

// --- Far transfers

TEST_F(LegacyEmulatorTest, FarJump) {
    EXPECT_EQ(fault({0xea, 0x00, 0x10, 0x02, 0x00, sel::based_code, 0}), no_fault); // jmp ptr16:32
    EXPECT_EQ(cpu.rip, 0x2'1000U);
    EXPECT_EQ(cpu.cs.selector, sel::based_code);
    EXPECT_EQ(cpu.cs.base, LegacyGuest::segment_base);
    EXPECT_EQ(cpu.cs.limit, LegacyGuest::segment_limit);
    EXPECT_TRUE(cpu.cs.default_32);
    EXPECT_EQ(cpu.rflags & rflags::resume, 0U);
    EXPECT_EQ(guest.access_of(sel::based_code), 0x9b);

    guest.enter_kernel();
    EXPECT_EQ(fault({0x66, 0xea, 0x34, 0x12, sel::code_16, 0}), no_fault); // jmp ptr16:16
    EXPECT_EQ(cpu.rip, 0x1234U);
    EXPECT_FALSE(cpu.cs.default_32);

    guest.enter_kernel();
    far_pointer(0x2'2000, sel::conforming_code_32 | 3);
    EXPECT_EQ(fault({0xff, 0x2b}), no_fault); // jmp m16:32
    EXPECT_EQ(cpu.cs.selector, sel::conforming_code_32);
}

TEST_F(LegacyEmulatorTest, FarJumpChecks) {
    const auto jump = [this](std::uint16_t selector, std::uint32_t target = 0x2'1000) {
        guest.enter_kernel();
        far_pointer(target, selector);
        return fault({0xff, 0x2b});
    };
    EXPECT_EQ(jump(0), gp());
    EXPECT_EQ(jump(sel::beyond), gp(sel::beyond));
    EXPECT_EQ(jump(sel::kernel_data), gp(sel::kernel_data));
    EXPECT_EQ(jump(sel::user_code_32), gp(sel::user_code_32 & ~3));
    EXPECT_EQ(jump(sel::kernel_code_32 | 1), gp(sel::kernel_code_32)); // RPL > CPL
    EXPECT_EQ(jump(sel::absent_code_32), np(sel::absent_code_32));
    EXPECT_EQ(jump(sel::based_code, LegacyGuest::segment_limit + 1), gp());
    EXPECT_EQ(jump(sel::based_code, LegacyGuest::segment_limit), no_fault);
    EXPECT_EQ(jump(sel::busy_tss_16), gp(sel::busy_tss_16));
    // L means nothing outside long mode.
    EXPECT_EQ(jump(sel::kernel_code), no_fault);
    EXPECT_FALSE(cpu.cs.long_mode);
    for (const std::uint16_t gate : {sel::call_gate, sel::call_gate_16}) {
        guest.enter_kernel();
        far_pointer(0, gate);
        EXPECT_NE(result_of<Unsupported>({0xff, 0x2b}).what.find("call gate"), std::string_view::npos);
    }
    for (const std::uint16_t task : {sel::task_gate, sel::tss, sel::tss_16}) {
        far_pointer(0, task);
        EXPECT_EQ(result_of<Unsupported>({0xff, 0x2b}).what, "a task switch");
    }
    EXPECT_EQ(cpu.rip, start);
}

TEST_F(LegacyEmulatorTest, FarCallAndReturn) {
    EXPECT_EQ(fault({0x9a, 0x00, 0x10, 0x02, 0x00, sel::based_code, 0}), no_fault); // call ptr16:32
    EXPECT_EQ(cpu.rip, 0x2'1000U);
    ASSERT_EQ(reg(Gpr::rsp), TestGuest::kernel_stack - 8);
    EXPECT_EQ(guest.get<std::uint32_t>(reg(Gpr::rsp)), TestGuest::code + 7);
    EXPECT_EQ(guest.get<std::uint32_t>(reg(Gpr::rsp) + 4), sel::kernel_code_32);
    EXPECT_EQ(fault({0xcb}), no_fault); // retf
    EXPECT_EQ(cpu.rip, TestGuest::code + 7);
    EXPECT_EQ(cpu.cs.selector, sel::kernel_code_32);
    EXPECT_EQ(cpu.cs.base, 0U);
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::kernel_stack);

    guest.enter_kernel();
    cpu.ss.limit = TestGuest::kernel_stack - 2;
    EXPECT_EQ(fault({0x9a, 0x00, 0x10, 0x02, 0x00, sel::based_code, 0}), ss());
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::kernel_stack);
    frame({LegacyGuest::segment_limit + 1, sel::based_code});
    EXPECT_EQ(fault({0xcb}), gp());
    frame({TestGuest::code, sel::level_1_code & ~3});
    EXPECT_EQ(fault({0xcb}), gp(sel::level_1_code & ~3)); // RPL and DPL differ
}

TEST_F(LegacyEmulatorTest, FarReturnToUser) {
    frame({TestGuest::user_code, sel::user_code_32, 0, 0, TestGuest::user_stack, sel::user_data});
    cpu.es = TestGuest::segment(sel::user_data, 3, 3, false);
    EXPECT_EQ(fault({0xca, 0x08, 0x00}), no_fault); // retf 8
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu.cs.selector, sel::user_code_32);
    EXPECT_EQ(cpu.ss.selector, sel::user_data);
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::user_stack + 8);
    EXPECT_FALSE(cpu.ds.present);
    EXPECT_EQ(cpu.es.selector, sel::user_data);
    guest.enter_kernel();
    frame({TestGuest::user_code, sel::user_code_32, TestGuest::user_stack, 0});
    EXPECT_EQ(fault({0xcb}), gp());
}

// --- IRET

constexpr std::uint64_t user_flags = rflags::fixed | rflags::interrupt | 1;

TEST_F(LegacyEmulatorTest, InterruptReturnToTheSameLevel) {
    frame({0x2'1000, sel::kernel_code_32, user_flags | rflags::resume, 0, 0});
    const std::uint64_t top = reg(Gpr::rsp);
    EXPECT_EQ(fault({0xcf}), no_fault);
    EXPECT_EQ(cpu.rip, 0x2'1000U);
    EXPECT_EQ(cpu.cpl, 0);
    EXPECT_EQ(reg(Gpr::rsp), top + 12); // SS:ESP is not popped
    EXPECT_EQ(cpu.ss.selector, sel::kernel_data);
    EXPECT_EQ(cpu.rflags, user_flags | rflags::resume);
}

TEST_F(LegacyEmulatorTest, InterruptReturnToUser) {
    cpu.es = TestGuest::segment(sel::user_data, 3, 3, false);
    frame({TestGuest::user_code + 5, sel::user_code_32, user_flags | rflags::iopl, TestGuest::user_stack - 8,
           sel::user_data});
    EXPECT_EQ(fault({0xcf}), no_fault);
    EXPECT_EQ(cpu.rip, TestGuest::user_code + 5);
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu.cs.selector, sel::user_code_32);
    EXPECT_EQ(cpu.ss.selector, sel::user_data);
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::user_stack - 8);
    EXPECT_EQ(cpu.rflags, user_flags | rflags::iopl);
    EXPECT_EQ(cpu.ds.selector, 0);
    EXPECT_EQ(cpu.es.selector, sel::user_data);
    EXPECT_EQ(guest.access_of(sel::user_code_32), 0xfb);
    EXPECT_EQ(guest.access_of(sel::user_data), 0xf3);
}

TEST_F(LegacyEmulatorTest, InterruptReturnOf16BitItems) {
    cpu.rflags = rflags::fixed | rflags::alignment_check;
    frame({std::uint64_t{sel::code_16} << 16 | 0x1234, user_flags});
    const std::uint64_t top = reg(Gpr::rsp);
    EXPECT_EQ(fault({0x66, 0xcf}), no_fault);
    EXPECT_EQ(cpu.rip, 0x1234U);
    EXPECT_EQ(cpu.cs.selector, sel::code_16);
    EXPECT_EQ(cpu.rflags, user_flags | rflags::alignment_check); // the upper half stays
    EXPECT_EQ(reg(Gpr::rsp), top + 6);
}

TEST_F(LegacyEmulatorTest, InterruptReturnChecks) {
    const auto returns = [this](std::initializer_list<std::uint64_t> items) {
        guest.enter_kernel();
        frame(items);
        return fault({0xcf});
    };
    const std::uint64_t user = TestGuest::user_code, stack = TestGuest::user_stack;
    EXPECT_EQ(returns({user, 0, user_flags}), gp());
    EXPECT_EQ(returns({user, sel::kernel_data, user_flags}), gp(sel::kernel_data));
    EXPECT_EQ(returns({user, sel::absent_code_32, user_flags}), np(sel::absent_code_32));
    EXPECT_EQ(returns({user, sel::user_code_32 & ~3, user_flags}), gp(sel::user_code_32 & ~3));
    EXPECT_EQ(returns({LegacyGuest::segment_limit + 1, sel::based_code, user_flags}), gp());
    EXPECT_EQ(returns({user, sel::user_code_32, user_flags, stack, 0}), gp());
    EXPECT_EQ(returns({user, sel::user_code_32, user_flags, stack, sel::kernel_data}), gp(sel::kernel_data));
    EXPECT_EQ(returns({user, sel::user_code_32, user_flags, stack, sel::absent_user_data}),
              ss(sel::absent_user_data & ~3));
    EXPECT_EQ(cpu.cpl, 0);
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::kernel_stack - 0x100);
    // The frame must be in the stack segment, SS:ESP only where it is popped.
    guest.enter_kernel();
    frame({user, sel::user_code_32, user_flags, stack, sel::user_data});
    cpu.ss.limit = static_cast<std::uint32_t>(reg(Gpr::rsp)) + 18;
    EXPECT_EQ(fault({0xcf}), ss());
    cpu.ss.limit = static_cast<std::uint32_t>(reg(Gpr::rsp)) + 11;
    guest.put<std::uint32_t>(reg(Gpr::rsp) + 4, sel::kernel_code_32);
    EXPECT_EQ(fault({0xcf}), no_fault);
    guest.enter_user();
    cpu.rflags = rflags::fixed;
    frame({TestGuest::code, sel::kernel_code_32, user_flags});
    EXPECT_EQ(fault({0xcf}), gp(sel::kernel_code_32)); // to an inner level
}

TEST_F(LegacyEmulatorTest, InterruptReturnsThatAreUnsupported) {
    frame({TestGuest::code, sel::kernel_code_32, user_flags | rflags::virtual_8086});
    EXPECT_EQ(result_of<Unsupported>({0xcf}).what, "a return to virtual-8086 mode");
    frame({TestGuest::code, sel::kernel_code_32, user_flags});
    cpu.rflags |= rflags::nested_task;
    EXPECT_EQ(result_of<Unsupported>({0xcf}).what, "a return from a nested task");
    EXPECT_EQ(cpu.rip, start);
    // A program's VM bit is not looked at.
    guest.enter_user();
    cpu.rflags = rflags::fixed;
    frame({TestGuest::user_code, sel::user_code_32, user_flags | rflags::virtual_8086 | rflags::iopl});
    EXPECT_EQ(fault({0xcf}), no_fault);
    EXPECT_EQ(cpu.rflags, rflags::fixed | 1); // neither are IF and IOPL its own
}

// --- Control registers

TEST_F(LegacyEmulatorTest, MoveFromControlAndDebugRegisters) {
    cpu.cr3 = garbage | 0x5000;
    expect_done({0x0f, 0x20, 0xd8}); // mov eax, cr3
    EXPECT_EQ(reg(Gpr::rax), 0x5000U);
    EXPECT_EQ(write_cr({0x0f, 0x23, 0xf8}, 0x455), no_fault); // mov dr7, eax: 32 bits
    EXPECT_EQ(cpu.dr7, 0x455U);
    reg(Gpr::rbx) = garbage;
    expect_done({0x0f, 0x21, 0xfb}); // mov ebx, dr7
    EXPECT_EQ(reg(Gpr::rbx), 0x455U);
    guest.enter_user();
    EXPECT_EQ(fault({0x0f, 0x20, 0xd8}), gp());
}

TEST_F(LegacyEmulatorTest, PagingOnAndOff) {
    guest.enable_paging();
    cpu.cr0 &= ~(cr0::pg | cr0::wp);
    const std::uint64_t before = cpu.cr0;
    EXPECT_EQ(write_cr0(before | cr0::pg), no_fault);
    EXPECT_EQ(cpu.cr0, before | cr0::pg);
    EXPECT_EQ(cpu.efer, 0U);
    EXPECT_EQ(&paging_format(cpu), &paging_32_bit);
    EXPECT_EQ(changes(), (std::vector{change(PagingChange::everything, true)}));
    EXPECT_EQ(write_cr0(before | cr0::pg | cr0::wp), no_fault);
    EXPECT_EQ(changes(), (std::vector{change(PagingChange::mode)}));
    EXPECT_EQ(write_cr4(cr4::pse), no_fault);
    EXPECT_EQ(changes(), (std::vector{change(PagingChange::everything, true)}));
    EXPECT_EQ(&paging_format(cpu), &paging_32_bit_pse);
    EXPECT_EQ(write_cr3(LegacyGuest::page_directory), no_fault);
    EXPECT_EQ(changes(), (std::vector{change(PagingChange::cr3_load)}));
    EXPECT_EQ(write_cr0(before), no_fault);
    EXPECT_EQ(&paging_format(cpu), &paging_off);
    EXPECT_EQ(changes(), (std::vector{change(PagingChange::everything, true)}));
}

TEST_F(LegacyEmulatorTest, WriteCr0Checks) {
    const std::uint64_t before = cpu.cr0;
    EXPECT_EQ(write_cr0((before | cr0::pg) & ~cr0::pe), gp());
    EXPECT_EQ(write_cr0(before | cr0::nw), gp());
    reg(Gpr::rax) = before & ~cr0::pe;
    EXPECT_EQ(result_of<Unsupported>({0x0f, 0x22, 0xc0}).what, "a return to real mode");
    EXPECT_EQ(cpu.cr0, before);
    EXPECT_TRUE(changes().empty());
}

TEST_F(LegacyEmulatorTest, PaePagingLoadsThePdptes) {
    EXPECT_EQ(write_cr4(cr4::pae), no_fault);
    EXPECT_EQ(write_cr3(0x2000), no_fault); // nothing is loaded yet
    const std::uint64_t before = cpu.cr0;
    EXPECT_EQ(write_cr0(before | cr0::pg), gp()); // a PDPTE has reserved bits set
    EXPECT_EQ(cpu.cr0, before);
    changes();
    EXPECT_EQ(write_cr3(pdpt), no_fault);
    EXPECT_EQ(write_cr0(before | cr0::pg), no_fault);
    EXPECT_EQ(&paging_format(cpu), &paging_pae);
    EXPECT_EQ(cpu.efer, 0U);
    EXPECT_EQ(cpu.pdptes[0], 0x3000 | entry_bit::present);
    // The CPU's own copies are used until a reload.
    guest.put<std::uint64_t>(pdpt + 8, 0x3000 | entry_bit::present);
    EXPECT_EQ(cpu.pdptes[1], 0U);
    EXPECT_EQ(write_cr4(cr4::pae | cr4::pge), no_fault);
    EXPECT_EQ(cpu.pdptes[1], 0x3000 | entry_bit::present);
    EXPECT_EQ(write_cr3(0x2000), gp());
    EXPECT_EQ(cpu.cr3, pdpt);
    guest.put<std::uint64_t>(pdpt + 8, 0x3000 | entry_bit::present | entry_bit::writable);
    EXPECT_EQ(write_cr4(cr4::pae), gp());
    EXPECT_EQ(cpu.cr4, cr4::pae | cr4::pge);
    EXPECT_EQ(cpu.pdptes[1], 0x3000 | entry_bit::present);
    guest.put<std::uint64_t>(pdpt + 8, 0);
    EXPECT_EQ(write_cr3(pdpt), no_fault);
    EXPECT_EQ(cpu.pdptes[1], 0U);
}

TEST_F(LegacyEmulatorTest, PcidsNeedLongMode) {
    EXPECT_EQ(write_cr4(cr4::pae | cr4::pcide), gp());
    EXPECT_EQ(write_cr4(cr4::pae), no_fault);
    EXPECT_EQ(write_cr4(0), no_fault); // outside long mode PAE may go
}

TEST_F(LegacyEmulatorTest, IntoLongMode) {
    EXPECT_EQ(write_cr4(cr4::pae), no_fault);
    EXPECT_EQ(write_cr3(0x1000), no_fault);
    EXPECT_EQ(write_efer(efer::lme | efer::nxe), no_fault);
    EXPECT_EQ(cpu.efer, efer::lme | efer::nxe);
    EXPECT_EQ(write_cr0(cpu.cr0 | cr0::pg), no_fault);
    EXPECT_EQ(cpu.efer, efer::lme | efer::lma | efer::nxe);
    EXPECT_EQ(changes().back(), change(PagingChange::everything, true));
    EXPECT_EQ(&paging_format(cpu), &paging_4_level);
    // Compatibility mode, until CS.L is loaded.
    EXPECT_FALSE(cpu.cs.long_mode);
    EXPECT_EQ(write_efer(0), gp()); // LME stays while paging is on
    EXPECT_EQ(write_cr4(0), gp());
    operand(TestGuest::gdt_limit, static_cast<std::uint32_t>(TestGuest::gdt));
    expect_done({0x0f, 0x01, 0x13}); // lgdt
    EXPECT_EQ(fault({0xea, 0x00, 0x10, 0x02, 0x00, sel::kernel_code, 0}), no_fault);
    EXPECT_TRUE(cpu.cs.long_mode);
    EXPECT_EQ(cpu.rip, 0x2'1000U);
    EXPECT_EQ(cpu.cpl, 0);
    EXPECT_EQ(write_cr0(cr0::pe | cr0::et), gp()); // 64-bit code cannot turn paging off
}

TEST_F(LegacyEmulatorTest, IntoLongModeChecks) {
    EXPECT_EQ(write_cr3(0x1000), no_fault);
    EXPECT_EQ(write_efer(efer::lme), no_fault);
    const std::uint64_t before = cpu.cr0;
    EXPECT_EQ(write_cr0(before | cr0::pg), gp()); // without PAE
    EXPECT_EQ(write_cr4(cr4::pae), no_fault);
    cpu.tr.type = descriptor_type::tss_16_busy;
    EXPECT_EQ(write_cr0(before | cr0::pg), gp());
    EXPECT_EQ(cpu.cr0, before);
    EXPECT_EQ(cpu.efer, efer::lme);
    cpu.tr.type = descriptor_type::tss_busy;
    EXPECT_EQ(write_cr0(before | cr0::pg), no_fault);
}

TEST_F(LegacyEmulatorTest, OutOfLongMode) {
    const std::uint64_t before = cpu.cr0;
    cpu.cr4 = cr4::pae;
    cpu.cr3 = 0x1000;
    EXPECT_EQ(write_efer(efer::lme), no_fault);
    EXPECT_EQ(write_cr0(before | cr0::pg), no_fault);
    EXPECT_EQ(write_cr4(cr4::pae | cr4::pcide), no_fault);
    EXPECT_EQ(write_cr0(before), gp()); // with PCIDs
    EXPECT_EQ(write_cr4(cr4::pae), no_fault);
    EXPECT_EQ(write_cr0(before), no_fault);
    EXPECT_EQ(cpu.efer, efer::lme);
    EXPECT_EQ(cpu.cr0, before);
    EXPECT_EQ(changes().back(), change(PagingChange::everything, true));
    EXPECT_EQ(write_efer(0), no_fault);
}

// --- Others

TEST_F(LegacyEmulatorTest, ModelSpecificRegistersTakeLongModeAddresses) {
    const auto write = [this](std::uint64_t value) {
        reg(Gpr::rcx) = 0xc000'0082; // LSTAR
        reg(Gpr::rdx) = garbage | value >> 32;
        reg(Gpr::rax) = garbage | static_cast<std::uint32_t>(value);
        return fault({0x0f, 0x30});
    };
    EXPECT_EQ(write(0xffff'ffff'8100'0000), no_fault);
    EXPECT_EQ(cpu.lstar, 0xffff'ffff'8100'0000U);
    EXPECT_EQ(write(TestGuest::non_canonical), gp());
}

TEST_F(LegacyEmulatorTest, SystemCallInstructionsAreInvalid) {
    cpu.efer = efer::sce;
    EXPECT_EQ(fault({0x0f, 0x05}), ud());
    EXPECT_EQ(fault({0x0f, 0x07}), ud());
}

TEST_F(LegacyEmulatorTest, Sysenter) {
    EXPECT_EQ(fault({0x0f, 0x34}), gp()); // its MSR is zero
    cpu.sysenter_cs = 0x60;
    cpu.sysenter_eip = garbage | 0xc010'0000;
    cpu.sysenter_esp = garbage | 0xc020'0000;
    EXPECT_EQ(fault({0x0f, 0x34}), no_fault);
    EXPECT_EQ(cpu.cpl, 0);
    EXPECT_EQ(cpu.cs.selector, 0x60);
    EXPECT_FALSE(cpu.cs.long_mode);
    EXPECT_TRUE(cpu.cs.default_32);
    EXPECT_EQ(cpu.ss.selector, 0x68);
    EXPECT_EQ(cpu.rip, 0xc010'0000U);
    EXPECT_EQ(reg(Gpr::rsp), 0xc020'0000U);
}

TEST_F(LegacyEmulatorTest, SoftwareInterrupts) {
    const Event event = result_of<SoftwareEvent>({0xcd, 0x80}).event;
    EXPECT_EQ(event.vector, 0x80);
    EXPECT_EQ(event.instruction_length, 2);
    EXPECT_EQ(cpu.rip, start + 2);
    cpu.rflags |= 1U << 11;
    EXPECT_EQ(result_of<SoftwareEvent>({0xce}).event.vector, 4); // into
}

TEST_F(LegacyEmulatorTest, AnyBytesAtAnyState) {
    std::mt19937_64 random(1); // the same bytes in every run
    constexpr std::array<std::uint8_t, 16> likely{0x0f, 0x01, 0x00, 0x9a, 0x66, 0x67, 0xcf, 0xcb,
                                                  0xff, 0x8e, 0x22, 0x07, 0xf3, 0x6c, 0x6f, 0xea};
    guest.enable_paging();
    const VirtualCpu initial = cpu;
    for (unsigned round = 0; round < 50'000; ++round) {
        const std::uint64_t choice = random();
        cpu = initial;
        if (choice % 2 == 0)
            guest.enter_user();
        if (choice % 3 == 0)
            cpu.cr0 &= ~cr0::pg;
        cpu.cs.default_32 = choice % 5 != 0;
        cpu.ss.default_32 = choice % 7 != 0;
        for (std::uint64_t i = 0; i < 15; ++i) {
            const std::uint64_t byte = random();
            guest.put(cpu.rip + i,
                      (byte & 0x100) != 0 ? likely[byte % likely.size()] : static_cast<std::uint8_t>(byte));
        }
        for (auto& value : cpu.gpr)
            value = random() >> (random() % 64);
        start = cpu.rip;
        const std::uint8_t level = cpu.cpl;
        const Emulation result = emulate(cpu, guest.space(), environment);
        environment.changes.clear();
        environment.writes.clear();
        if (std::holds_alternative<Raised>(result) || std::holds_alternative<Unsupported>(result) ||
            std::holds_alternative<NotSensitive>(result)) {
            ASSERT_EQ(cpu.rip, start);
            ASSERT_EQ(cpu.cpl, level);
        }
        ASSERT_GE(cpu.cpl, level); // no instruction leads inwards
        ASSERT_TRUE(in_long_mode(cpu) || (!cpu.cs.long_mode && cpu.rip <= 0xffff'ffff));
    }
}

} // namespace
} // namespace umbra
