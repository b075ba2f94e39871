// Unit tests of vmm/emulator and vmm/disassembler: the effects and the faults of every instruction.
#include "vmm/emulator.hpp"

#include "tests/unit/test_guest.hpp"
#include "vmm/disassembler.hpp"
#include "vmm/segmentation.hpp"

#include <map>
#include <random>
#include <string>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace test;
using emulated::Done;
using emulated::Halted;
using emulated::NotSensitive;
using emulated::PortAccess;
using emulated::Raised;
using emulated::SingleStep;
using emulated::SoftwareEvent;
using emulated::Unsupported;

/// An environment that records what it is asked for.
class FakeEnvironment : public CpuEnvironment {
  public:
    struct PortWrite {
        std::uint16_t port;
        unsigned size;
        std::uint32_t value;
        bool operator==(const PortWrite&) const = default;
    };

    std::uint32_t port_read(std::uint16_t port, unsigned size) override {
        reads.emplace_back(port, size);
        return next_read++;
    }
    void port_write(std::uint16_t port, unsigned size, std::uint32_t value) override {
        writes.push_back({port, size, value});
    }
    bool kernel_owns(std::uint16_t port) override { return port == 0x20; }
    std::optional<std::uint64_t> read_msr(std::uint32_t index) override {
        const auto found = msrs.find(index);
        return found == msrs.end() ? std::nullopt : std::optional(found->second);
    }
    bool write_msr(std::uint32_t index, std::uint64_t value) override {
        if (!msrs.contains(index))
            return false;
        msrs[index] = value;
        return true;
    }
    bool write_xcr0(std::uint64_t value) override {
        xcr0 = value;
        return (value & 1) != 0;
    }
    bool steps() override { return stepping; }
    std::uint64_t read_tsc() override { return 0x1234'5678'9abc'def0; }
    void paging_changed(const PagingChange& change) override { changes.push_back(change); }
    CpuidResult cpuid(std::uint32_t leaf, std::uint32_t subleaf) override {
        if (leaf == 7)
            return {0, invpcid_offered ? 1U << 10 : 0, 0, 0};
        if (leaf == 0x8000'0001)
            return {0, 0, 0, nx_offered ? 1U << 20 : 0};
        return {leaf + 1, leaf + 2, subleaf, 4};
    }
    bool amd() override { return is_amd; }
    unsigned physical_bits() override { return 40; }
    std::uint64_t cr4_allowed() override { return allowed; }

    std::vector<std::pair<std::uint16_t, unsigned>> reads;
    std::vector<PortWrite> writes;
    std::vector<PagingChange> changes;
    bool is_amd = false;
    std::map<std::uint32_t, std::uint64_t> msrs{{0x1b, 0xfee0'0900}};
    std::uint64_t xcr0 = 0;
    std::uint64_t allowed = cr4::pae | cr4::pge | cr4::pse | cr4::de | cr4::tsd | cr4::pcide | cr4::smep |
                            cr4::umip | cr4::osxsave | cr4::osfxsr;
    std::uint32_t next_read = 0x8182'8384;
    bool invpcid_offered = true, nx_offered = true, stepping = false;
};

using Changes = std::vector<PagingChange>;

PagingChange change(PagingChange::Kind kind, bool globals, std::uint16_t pcid = 0,
                    std::uint64_t address = 0) {
    return {kind, globals, pcid, GuestVirt(address)};
}

class EmulatorTest : public ::testing::Test {
  protected:
    using Bytes = std::initializer_list<unsigned>;

    EmulatorTest() { cpu.rflags = rflags::fixed | rflags::resume; }

    /// Emulates `bytes` at RIP.
    Emulation run(Bytes bytes) {
        guest.instruction(bytes);
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
    void user(unsigned iopl = 0) {
        guest.enter_user();
        cpu.rflags = rflags::fixed | std::uint64_t{iopl} << rflags::iopl_shift;
    }
    std::uint64_t& reg(Gpr which) { return cpu[which]; }
    template<class T>
    T result_of(Bytes bytes) {
        const Emulation result = run(bytes);
        EXPECT_TRUE(std::holds_alternative<T>(result)) << "outcome " << result.index();
        return std::holds_alternative<T>(result) ? std::get<T>(result) : T{};
    }
    /// What the MMU was told of since it was last asked for.
    std::vector<PagingChange> changes() { return std::exchange(environment.changes, {}); }
    /// A frame as IRETQ and far returns pop it; RSP points to it.
    void frame(std::initializer_list<std::uint64_t> items) {
        reg(Gpr::rsp) = (cpu.cpl == 3 ? TestGuest::user_stack : TestGuest::kernel_stack) - 0x100;
        std::uint64_t at = reg(Gpr::rsp);
        for (const std::uint64_t item : items) {
            guest.put(at, item);
            at += sizeof(item);
        }
    }

    TestGuest guest;
    VirtualCpu& cpu = guest.cpu;
    FakeEnvironment environment;
    std::uint64_t start = 0;
};

// --- Fetching and decoding

TEST_F(EmulatorTest, OrdinaryInstructionsAreNotSensitive) {
    const VirtualCpu before = cpu;
    for (const auto bytes : {Bytes{0x90},                   // nop
                             Bytes{0x48, 0x89, 0xc3},       // mov rbx, rax
                             Bytes{0x8c, 0xd0},             // mov eax, ss
                             Bytes{0x0f, 0x0b},             // ud2
                             Bytes{0xff, 0xe0},             // jmp rax
                             Bytes{0xff, 0xd0},             // call rax
                             Bytes{0xc3},                   // ret
                             Bytes{0x58},                   // pop rax
                             Bytes{0x9c},                   // pushf
                             Bytes{0xf0, 0x48, 0x01, 0x03}, // lock add [rbx], rax
                             Bytes{0x06}})                  // none in 64-bit mode
        (void)result_of<NotSensitive>(bytes);
    EXPECT_EQ(cpu.rip, before.rip);
    EXPECT_EQ(cpu.rflags, before.rflags);
}

TEST_F(EmulatorTest, LockPrefixIsInvalid) {
    EXPECT_EQ(fault({0xf0, 0xfa}), ud());
    EXPECT_EQ(fault({0xf0, 0x0f, 0x22, 0xc0}), ud());
    EXPECT_EQ(fault({0xf0, 0x0f, 0x01, 0x38}), ud());
}

TEST_F(EmulatorTest, FetchFaults) {
    cpu.rip = TestGuest::non_canonical;
    EXPECT_EQ(fault_of(std::get<Raised>(emulate(cpu, guest.space(), environment)).exception), gp(0));
    guest.enter_user();
    cpu.rip = TestGuest::code; // a kernel page
    EXPECT_EQ(fault({0xfa}), pf(PageFault::present | PageFault::user | PageFault::fetch));
}

TEST_F(EmulatorTest, NextPageIsFetchedOnlyIfNeeded) {
    guest.map(TestGuest::code + 0x1000, 0);
    cpu.rip = TestGuest::code + 0xffd;
    expect_done({0x0f, 0x22, 0xd0}); // all in the first page
    cpu.rip = TestGuest::code + 0xffe;
    const Emulation result = run({0x0f, 0x22, 0xd0});
    const auto* raised = std::get_if<Raised>(&result);
    ASSERT_NE(raised, nullptr);
    EXPECT_EQ(fault_of(raised->exception), pf(PageFault::fetch));
    EXPECT_EQ(raised->exception.address, GuestVirt(TestGuest::code + 0x1000));
    guest.map(TestGuest::code + 0x1000, TestGuest::kernel_rights);
    expect_done({0x0f, 0x22, 0xd0});
}

TEST_F(EmulatorTest, OutsideLongModeIsUnsupported) {
    cpu.efer = 0;
    (void)result_of<Unsupported>({0xfa});
}

TEST_F(EmulatorTest, UnknownPrivilegedInstructionIsUnsupported) {
    EXPECT_EQ(result_of<Unsupported>({0x0f, 0xc7, 0x28}).what, "xsaves");
    user();
    EXPECT_EQ(fault({0x0f, 0xc7, 0x28}), gp());
}

// --- Interrupt flag, HLT

TEST_F(EmulatorTest, ClearAndSetInterruptFlag) {
    cpu.rflags |= rflags::interrupt;
    expect_done({0xfa});
    EXPECT_FALSE(cpu.interrupts_enabled());
    EXPECT_TRUE(result_of<Done>({0xfb, 0x90}).interrupt_shadow);
    EXPECT_TRUE(cpu.interrupts_enabled());
    EXPECT_EQ(cpu.rip, start + 1);
    EXPECT_FALSE(result_of<Done>({0xfb, 0xf4}).interrupt_shadow); // it was set already
    EXPECT_FALSE(cpu.halted);
}

TEST_F(EmulatorTest, InterruptFlagNeedsIopl) {
    user(2);
    EXPECT_EQ(fault({0xfa}), gp());
    EXPECT_EQ(fault({0xfb}), gp());
    user(3);
    EXPECT_EQ(fault({0xfa}), no_fault);
    EXPECT_EQ(fault({0xfb, 0x90}), no_fault);
}

TEST_F(EmulatorTest, Halt) {
    (void)result_of<Halted>({0xf4});
    EXPECT_TRUE(cpu.halted);
    EXPECT_EQ(cpu.rip, start + 1);
    user(3);
    EXPECT_EQ(fault({0xf4}), gp());
}

TEST_F(EmulatorTest, StiHltIsOneStep) {
    (void)result_of<Halted>({0xfb, 0xf4});
    EXPECT_TRUE(cpu.halted && cpu.interrupts_enabled());
    EXPECT_EQ(cpu.rip, start + 2);
    cpu.halted = false;
    cpu.rflags = rflags::fixed | rflags::trap; // a single step must see the HLT by itself
    EXPECT_TRUE(result_of<Done>({0xfb, 0xf4}).interrupt_shadow);
    cpu.rflags = rflags::fixed;
    environment.stepping = true; // so must a debugger's
    EXPECT_TRUE(result_of<Done>({0xfb, 0xf4}).interrupt_shadow);
    environment.stepping = false;
    user(3); // where HLT is #GP
    EXPECT_TRUE(result_of<Done>({0xfb, 0xf4}).interrupt_shadow);
}

// --- Port I/O

TEST_F(EmulatorTest, In) {
    constexpr std::uint64_t rax = 0x1111'2222'3333'4444;
    reg(Gpr::rdx) = 0xffff'0000'0000'03f8;
    const auto in = [&](Bytes bytes) {
        reg(Gpr::rax) = rax;
        environment.next_read = 0x8182'8384;
        expect_done(bytes);
        return reg(Gpr::rax);
    };
    EXPECT_EQ(in({0xec}), 0x1111'2222'3333'4484U);
    EXPECT_EQ(in({0x66, 0xed}), 0x1111'2222'3333'8384U);
    EXPECT_EQ(in({0xed}), 0x8182'8384U);
    EXPECT_EQ(in({0x48, 0xed}), 0x8182'8384U); // REX.W means nothing
    EXPECT_EQ(in({0xe4, 0x80}), 0x1111'2222'3333'4484U);
    EXPECT_EQ(in({0xe5, 0x81}), 0x8182'8384U);
    using Reads = decltype(environment.reads);
    EXPECT_EQ(environment.reads,
              (Reads{{0x3f8, 1}, {0x3f8, 2}, {0x3f8, 4}, {0x3f8, 4}, {0x80, 1}, {0x81, 4}}));
}

TEST_F(EmulatorTest, Out) {
    reg(Gpr::rax) = 0x1111'2222'3333'4455;
    reg(Gpr::rdx) = 0xffff'03f8;
    expect_done({0xee});
    expect_done({0x66, 0xef});
    expect_done({0xef});
    expect_done({0xe6, 0xff});
    expect_done({0x66, 0xe7, 0xfe});
    using Writes = decltype(environment.writes);
    EXPECT_EQ(environment.writes, (Writes{{0x3f8, 1, 0x55},
                                          {0x3f8, 2, 0x4455},
                                          {0x3f8, 4, 0x3333'4455},
                                          {0xff, 1, 0x55},
                                          {0xfe, 2, 0x4455}}));
}

TEST_F(EmulatorTest, PortsOfInKernelDevices) {
    reg(Gpr::rdx) = 0x20;
    auto port = result_of<PortAccess>({0xec});
    EXPECT_EQ(cpu.rip, start + 1);
    EXPECT_TRUE(port.port == 0x20 && port.size == 1 && !port.write);
    port = result_of<PortAccess>({0x66, 0xe7, 0x20});
    EXPECT_EQ(cpu.rip, start + 3);
    EXPECT_TRUE(port.port == 0x20 && port.size == 2 && port.write);
    EXPECT_NE(result_of<Unsupported>({0x6c}).what.find("string"), std::string_view::npos);
    EXPECT_TRUE(environment.reads.empty() && environment.writes.empty());
}

TEST_F(EmulatorTest, PortPermissionBitmap) {
    user();
    const auto in = [this](std::uint16_t port, unsigned size) {
        reg(Gpr::rdx) = port;
        return size == 1 ? fault({0xec}) : size == 2 ? fault({0x66, 0xed}) : fault({0xed});
    };
    const auto allow = [this](std::uint16_t port) {
        const std::uint64_t at = TestGuest::tss + 0x68 + port / 8U;
        guest.put(at, static_cast<std::uint8_t>(guest.get<std::uint8_t>(at) & ~(1U << port % 8U)));
    };
    EXPECT_EQ(in(0x37, 1), gp());
    allow(0x37);
    EXPECT_EQ(in(0x37, 1), no_fault);
    EXPECT_EQ(in(0x37, 2), gp()); // the second port is in the next byte
    allow(0x38);
    EXPECT_EQ(in(0x37, 2), no_fault);
    EXPECT_EQ(in(0x37, 4), gp());
    EXPECT_EQ(in(0x38, 1), no_fault);

    allow(0x1ff0);
    EXPECT_EQ(in(0x1ff0, 1), no_fault);
    EXPECT_EQ(in(0x1ff8, 1), gp()); // its byte is the last one of the TSS: a second one cannot be read
    EXPECT_EQ(in(0xffff, 1), gp());
    cpu.tr.limit = 0x66;
    EXPECT_EQ(in(0x37, 1), gp());
    cpu.tr.limit = TestGuest::tss_limit;
    cpu.tr.present = false;
    EXPECT_EQ(in(0x37, 1), gp());
    cpu.tr.present = true;
    guest.map(TestGuest::tss, 0);
    EXPECT_EQ(in(0x37, 1), pf(0)); // a supervisor access
    user(3);
    EXPECT_EQ(in(0x3000, 4), no_fault);
}

TEST_F(EmulatorTest, StringInput) {
    reg(Gpr::rdx) = 0x1f0;
    reg(Gpr::rdi) = TestGuest::data;
    reg(Gpr::rcx) = 9;
    expect_done({0x66, 0x6d}); // insw
    EXPECT_EQ(guest.get<std::uint16_t>(TestGuest::data), 0x8384);
    EXPECT_EQ(reg(Gpr::rdi), TestGuest::data + 2);
    EXPECT_EQ(reg(Gpr::rcx), 9U);

    reg(Gpr::rcx) = 3;
    environment.next_read = 0x11;
    expect_done({0xf3, 0x6c}); // rep insb
    EXPECT_EQ(guest.get<std::uint32_t>(TestGuest::data + 2), 0x131211U);
    EXPECT_EQ(reg(Gpr::rcx), 0U);
    EXPECT_EQ(reg(Gpr::rdi), TestGuest::data + 5);
    expect_done({0xf3, 0x6d}); // nothing left to do
    EXPECT_EQ(reg(Gpr::rdi), TestGuest::data + 5);

    cpu.rflags |= rflags::direction;
    reg(Gpr::rcx) = 2;
    reg(Gpr::rdi) = TestGuest::data + 12;
    environment.next_read = 0x21;
    expect_done({0xf2, 0x6d}); // REPNE repeats as well
    EXPECT_EQ(guest.get<std::uint32_t>(TestGuest::data + 12), 0x21U);
    EXPECT_EQ(guest.get<std::uint32_t>(TestGuest::data + 8), 0x22U);
    EXPECT_EQ(reg(Gpr::rdi), TestGuest::data + 4);
}

TEST_F(EmulatorTest, StringOutput) {
    guest.put<std::uint64_t>(TestGuest::data, 0x8877'6655'4433'2211);
    reg(Gpr::rdx) = 0x3f8;
    reg(Gpr::rsi) = TestGuest::data;
    reg(Gpr::rcx) = 2;
    expect_done({0xf3, 0x6f});
    using Writes = decltype(environment.writes);
    EXPECT_EQ(environment.writes, (Writes{{0x3f8, 4, 0x4433'2211}, {0x3f8, 4, 0x8877'6655}}));
    environment.writes.clear();
    // FS override and 32-bit registers.
    cpu.fs.base = TestGuest::data;
    reg(Gpr::rsi) = 0xffff'ffff'0000'0001;
    reg(Gpr::rcx) = 0xffff'ffff'0000'0001;
    expect_done({0x64, 0x67, 0xf3, 0x6e});
    EXPECT_EQ(environment.writes, (Writes{{0x3f8, 1, 0x22}}));
    EXPECT_EQ(reg(Gpr::rsi), 2U);
    EXPECT_EQ(reg(Gpr::rcx), 0U);
}

TEST_F(EmulatorTest, LongStringIsDoneInChunks) {
    reg(Gpr::rdx) = 0x1f0;
    reg(Gpr::rdi) = TestGuest::data;
    reg(Gpr::rcx) = ~std::uint64_t{0};
    EXPECT_EQ(fault({0xf3, 0x6c}), no_fault);
    EXPECT_EQ(cpu.rip, start); // to be resumed
    const std::uint64_t done = reg(Gpr::rdi) - TestGuest::data;
    EXPECT_GT(done, 0U);
    EXPECT_LE(done, 4096U);
    EXPECT_EQ(reg(Gpr::rcx), ~std::uint64_t{0} - done);
}

TEST_F(EmulatorTest, StringFaultKeepsWhatIsDone) {
    guest.map(TestGuest::data + 0x1000, entry_bit::present); // not writable
    reg(Gpr::rdx) = 0x1f0;
    reg(Gpr::rdi) = TestGuest::data + 0xffe;
    reg(Gpr::rcx) = 5;
    EXPECT_EQ(fault({0xf3, 0x6c}), pf(PageFault::present | PageFault::write));
    EXPECT_EQ(reg(Gpr::rcx), 3U);
    EXPECT_EQ(reg(Gpr::rdi), TestGuest::data + 0x1000);
    EXPECT_EQ(environment.reads.size(), 2U); // the device was not read for the element that cannot be stored
    user();
    EXPECT_EQ(fault({0x6c}), gp()); // no permission
}

// --- Control registers

TEST_F(EmulatorTest, ReadControlRegisters) {
    cpu.cr2 = 0x22;
    cpu.cr8 = 8;
    expect_done({0x0f, 0x20, 0xc3}); // mov rbx, cr0
    EXPECT_EQ(reg(Gpr::rbx), cpu.cr0);
    expect_done({0x41, 0x0f, 0x20, 0xd7}); // mov r15, cr2
    EXPECT_EQ(reg(Gpr::r15), 0x22U);
    expect_done({0x0f, 0x20, 0xd8});
    EXPECT_EQ(reg(Gpr::rax), cpu.cr3);
    expect_done({0x0f, 0x20, 0xe0});
    EXPECT_EQ(reg(Gpr::rax), cpu.cr4);
    expect_done({0x44, 0x0f, 0x20, 0xc0});
    EXPECT_EQ(reg(Gpr::rax), 8U);
    user(3);
    EXPECT_EQ(fault({0x0f, 0x20, 0xc0}), gp());
}

TEST_F(EmulatorTest, WriteCr0) {
    const std::uint64_t cr0 = cpu.cr0;
    const auto write = [this](std::uint64_t value) {
        reg(Gpr::rax) = value;
        return fault({0x0f, 0x22, 0xc0});
    };
    EXPECT_EQ(write((cr0 | cr0::ts) & ~cr0::et), no_fault);
    EXPECT_EQ(cpu.cr0, cr0 | cr0::ts); // ET is fixed
    EXPECT_TRUE(environment.changes.empty());
    EXPECT_EQ(write(cr0 & ~cr0::wp), no_fault);
    EXPECT_EQ(changes(), Changes{change(PagingChange::mode, false)});
    EXPECT_EQ(write(cr0 | cr0::cd | cr0::nw), no_fault);
    EXPECT_EQ(changes(), Changes{change(PagingChange::mode, false)}); // WP again
    const std::uint64_t before = cpu.cr0;
    EXPECT_EQ(write(cr0 | cr0::nw), gp());  // without CD
    EXPECT_EQ(write(cr0 & ~cr0::pg), gp()); // in 64-bit mode
    EXPECT_EQ(write(cr0 & ~(cr0::pg | cr0::pe)), gp());
    EXPECT_EQ(write(cr0 | std::uint64_t{1} << 32), gp());
    EXPECT_EQ(cpu.cr0, before);
    EXPECT_TRUE(environment.changes.empty());
    user(3);
    EXPECT_EQ(write(cr0), gp());
}

TEST_F(EmulatorTest, WriteCr2AndCr8) {
    reg(Gpr::rax) = TestGuest::non_canonical;
    expect_done({0x0f, 0x22, 0xd0});
    EXPECT_EQ(cpu.cr2, TestGuest::non_canonical);
    reg(Gpr::rax) = 0xf;
    expect_done({0x44, 0x0f, 0x22, 0xc0});
    EXPECT_EQ(cpu.cr8, 0xfU);
    reg(Gpr::rax) = 0x10;
    EXPECT_EQ(fault({0x44, 0x0f, 0x22, 0xc0}), gp());
    EXPECT_EQ(cpu.cr8, 0xfU);
}

TEST_F(EmulatorTest, WriteCr3) {
    reg(Gpr::rax) = 0x12'3018;
    expect_done({0x0f, 0x22, 0xd8});
    EXPECT_EQ(cpu.cr3, 0x12'3018U); // its low bits are no PCID
    EXPECT_EQ(changes(), Changes{change(PagingChange::cr3_load, false)});
    cpu.cr3 = 0x1000;
    reg(Gpr::rax) = std::uint64_t{1} << 40; // beyond MAXPHYADDR
    EXPECT_EQ(fault({0x0f, 0x22, 0xd8}), gp());
    reg(Gpr::rax) = std::uint64_t{1} << 63;
    EXPECT_EQ(fault({0x0f, 0x22, 0xd8}), gp()); // without PCIDs
    EXPECT_EQ(cpu.cr3, 0x1000U);
    EXPECT_TRUE(environment.changes.empty());
}

TEST_F(EmulatorTest, WriteCr3WithPcid) {
    cpu.cr4 |= cr4::pcide;
    reg(Gpr::rax) = std::uint64_t{1} << 63 | 0x1007;
    expect_done({0x0f, 0x22, 0xd8});
    EXPECT_EQ(cpu.cr3, 0x1007U); // bit 63 is not kept
    EXPECT_EQ(changes(), Changes{change(PagingChange::cr3_load_no_flush, false, 7)});
    reg(Gpr::rax) = 0x1fff;
    expect_done({0x0f, 0x22, 0xd8});
    EXPECT_EQ(cpu.cr3, 0x1fffU);
    EXPECT_EQ(changes(), Changes{change(PagingChange::cr3_load, false, 0xfff)}); // the new one's are gone
    for (const unsigned reserved : {40U, 61U, 62U}) {
        reg(Gpr::rax) = std::uint64_t{1} << 63 | std::uint64_t{1} << reserved | 0x1007;
        EXPECT_EQ(fault({0x0f, 0x22, 0xd8}), gp()) << reserved;
    }
    EXPECT_EQ(cpu.cr3, 0x1fffU);
    EXPECT_EQ(changes(), Changes{});
}

TEST_F(EmulatorTest, WriteCr4) {
    const std::uint64_t cr4 = cpu.cr4;
    const auto write = [this](std::uint64_t value) {
        reg(Gpr::rax) = value;
        return fault({0x0f, 0x22, 0xe0});
    };
    EXPECT_EQ(write(cr4 | cr4::umip), no_fault);
    EXPECT_EQ(cpu.cr4, cr4 | cr4::umip);
    EXPECT_TRUE(environment.changes.empty());
    const PagingChange everything = change(PagingChange::everything, true);
    const PagingChange mode = change(PagingChange::mode, false);
    EXPECT_EQ(write(cr4 & ~cr4::pge), no_fault);
    EXPECT_EQ(changes(), Changes{everything});
    EXPECT_EQ(write(cr4), no_fault);
    EXPECT_EQ(changes(), Changes{everything});
    EXPECT_EQ(write(cr4 | cr4::smep), no_fault); // being set, it flushes; being cleared, not
    EXPECT_EQ(changes(), (Changes{mode, change(PagingChange::context, true)}));
    EXPECT_EQ(write(cr4), no_fault);
    EXPECT_EQ(changes(), Changes{mode});
    EXPECT_EQ(write((cr4 | cr4::smep) & ~cr4::pge), no_fault);
    EXPECT_EQ(changes(), (Changes{mode, everything}));
    EXPECT_EQ(write(cr4), no_fault);
    EXPECT_EQ(changes(), (Changes{mode, everything}));
    EXPECT_EQ(write(cr4 | cr4::smap), gp()); // not offered
    environment.allowed |= cr4::smap;
    EXPECT_EQ(write(cr4 | cr4::smap), no_fault);
    EXPECT_EQ(changes(), Changes{mode});
    EXPECT_EQ(write(cr4), no_fault);
    EXPECT_EQ(changes(), Changes{mode});
    cpu.cr3 |= 1;
    EXPECT_EQ(write(cr4 | cr4::pcide), gp()); // CR3 holds a PCID already
    EXPECT_EQ(write(cr4 & ~cr4::pae), gp());
    EXPECT_EQ(write(cr4 | cr4::pke), gp()); // not offered
    EXPECT_EQ(write(cr4 | std::uint64_t{1} << 40), gp());
    environment.allowed |= cr4::la57;
    EXPECT_EQ(write(cr4 | cr4::la57), gp()); // not in long mode
    EXPECT_EQ(cpu.cr4, cr4);
    EXPECT_TRUE(environment.changes.empty());
}

TEST_F(EmulatorTest, MachineStatusWord) {
    cpu.cr0 |= cr0::ts;
    expect_done({0x0f, 0x06}); // clts
    EXPECT_EQ(cpu.cr0 & cr0::ts, 0U);
    reg(Gpr::rax) = 0xfff0 | cr0::ts | cr0::mp;
    const std::uint64_t before = cpu.cr0;
    expect_done({0x0f, 0x01, 0xf0}); // lmsw ax: PE stays
    EXPECT_EQ(cpu.cr0, before | cr0::ts | cr0::mp);
    guest.put<std::uint16_t>(TestGuest::data, 1);
    reg(Gpr::rax) = TestGuest::data;
    expect_done({0x0f, 0x01, 0x30}); // lmsw [rax]
    EXPECT_EQ(cpu.cr0, before);

    reg(Gpr::rax) = ~std::uint64_t{0};
    expect_done({0x66, 0x0f, 0x01, 0xe0}); // smsw ax
    EXPECT_EQ(reg(Gpr::rax), 0xffff'ffff'ffff'0000 | (cpu.cr0 & 0xffff));
    expect_done({0x0f, 0x01, 0xe0}); // smsw eax
    EXPECT_EQ(reg(Gpr::rax), cpu.cr0);
    reg(Gpr::rax) = TestGuest::data;
    guest.put<std::uint32_t>(TestGuest::data, 0xffff'ffff);
    expect_done({0x48, 0x0f, 0x01, 0x20}); // smsw [rax]: 16 bits
    EXPECT_EQ(guest.get<std::uint32_t>(TestGuest::data), 0xffff'0000 | (cpu.cr0 & 0xffff));
    user(3);
    EXPECT_EQ(fault({0x0f, 0x06}), gp());
    EXPECT_EQ(fault({0x0f, 0x01, 0xf0}), gp());
}

// --- Debug registers

TEST_F(EmulatorTest, DebugRegisters) {
    reg(Gpr::rax) = 0x1234'5678'9abc;
    expect_done({0x0f, 0x23, 0xd8}); // mov dr3, rax
    EXPECT_EQ(cpu.dr[3], 0x1234'5678'9abcU);
    expect_done({0x0f, 0x21, 0xdb}); // mov rbx, dr3
    EXPECT_EQ(reg(Gpr::rbx), 0x1234'5678'9abcU);
    reg(Gpr::rax) = 0x4001;
    expect_done({0x0f, 0x23, 0xf0}); // dr6
    EXPECT_EQ(cpu.dr6, 0xffff'4ff1U);
    reg(Gpr::rax) = 0xffff'dbff;
    expect_done({0x0f, 0x23, 0xf8}); // dr7; bits 11, 12, 14, 15 stay zero
    EXPECT_EQ(cpu.dr7, 0xffff'07ffU);
    reg(Gpr::rax) = std::uint64_t{1} << 32;
    EXPECT_EQ(fault({0x0f, 0x23, 0xf0}), gp());
    EXPECT_EQ(fault({0x0f, 0x23, 0xf8}), gp());
    user(3);
    EXPECT_EQ(fault({0x0f, 0x21, 0xc0}), gp());
}

TEST_F(EmulatorTest, DebugRegisterAliases) {
    expect_done({0x0f, 0x21, 0xe0}); // mov rax, dr4
    EXPECT_EQ(reg(Gpr::rax), cpu.dr6);
    expect_done({0x0f, 0x21, 0xe8});
    EXPECT_EQ(reg(Gpr::rax), cpu.dr7);
    cpu.cr4 |= cr4::de;
    EXPECT_EQ(fault({0x0f, 0x21, 0xe0}), ud());
    EXPECT_EQ(fault({0x0f, 0x23, 0xe8}), ud());
}

TEST_F(EmulatorTest, GeneralDetect) {
    cpu.dr7 |= 1U << 13;
    EXPECT_EQ(fault({0x0f, 0x21, 0xc0}), (Fault{Vector::debug, -1}));
    EXPECT_NE(cpu.dr6 & 1U << 13, 0U);
    EXPECT_NE(cpu.rflags & rflags::resume, 0U);
}

// --- Descriptor tables and system segments

TEST_F(EmulatorTest, LoadAndStoreDescriptorTables) {
    reg(Gpr::rbx) = TestGuest::data;
    guest.put<std::uint16_t>(TestGuest::data, 0x1237);
    guest.put<std::uint64_t>(TestGuest::data + 2, 0xffff'8000'0012'3000);
    expect_done({0x0f, 0x01, 0x1b}); // lidt [rbx]
    EXPECT_EQ(cpu.idtr.limit, 0x1237);
    EXPECT_EQ(cpu.idtr.base, GuestVirt(0xffff'8000'0012'3000));
    expect_done({0x66, 0x0f, 0x01, 0x13}); // lgdt: the prefix means nothing
    EXPECT_EQ(cpu.gdtr.limit, 0x1237);
    EXPECT_EQ(cpu.gdtr.base, GuestVirt(0xffff'8000'0012'3000));

    cpu.gdtr = {GuestVirt(0x5678'0000), 0x77};
    expect_done({0x0f, 0x01, 0x43, 0x20}); // sgdt [rbx+0x20]
    EXPECT_EQ(guest.get<std::uint16_t>(TestGuest::data + 0x20), 0x77);
    EXPECT_EQ(guest.get<std::uint64_t>(TestGuest::data + 0x22), 0x5678'0000U);
    expect_done({0x0f, 0x01, 0x4b, 0x40}); // sidt [rbx+0x40]
    EXPECT_EQ(guest.get<std::uint16_t>(TestGuest::data + 0x40), 0x1237);

    guest.put<std::uint64_t>(TestGuest::data + 2, TestGuest::non_canonical);
    EXPECT_EQ(fault({0x0f, 0x01, 0x13}), gp());
    EXPECT_EQ(cpu.gdtr.limit, 0x77);
    guest.map(TestGuest::data, 0);
    EXPECT_EQ(fault({0x0f, 0x01, 0x13}), pf(0));
    EXPECT_EQ(fault({0x0f, 0x01, 0x03}), pf(PageFault::write));
    user(3);
    EXPECT_EQ(fault({0x0f, 0x01, 0x13}), gp());
    EXPECT_EQ(fault({0x0f, 0x01, 0x1b}), gp());
}

TEST_F(EmulatorTest, SystemSegments) {
    reg(Gpr::rax) = sel::ldt;
    expect_done({0x0f, 0x00, 0xd0}); // lldt ax
    EXPECT_EQ(cpu.ldtr.base, TestGuest::ldt);
    guest.put<std::uint16_t>(TestGuest::data, sel::tss);
    reg(Gpr::rbx) = TestGuest::data;
    cpu.tr = Segment{};
    expect_done({0x0f, 0x00, 0x1b}); // ltr [rbx]
    EXPECT_EQ(cpu.tr.base, TestGuest::tss);
    EXPECT_EQ(fault({0x0f, 0x00, 0x1b}), gp(sel::tss)); // busy
    EXPECT_EQ(fault({0x0f, 0x00, 0x13}), gp(sel::tss)); // lldt [rbx]

    reg(Gpr::rax) = ~std::uint64_t{0};
    expect_done({0x66, 0x0f, 0x00, 0xc0}); // sldt ax
    EXPECT_EQ(reg(Gpr::rax), 0xffff'ffff'ffff'0000 | sel::ldt);
    expect_done({0x0f, 0x00, 0xc8}); // str eax
    EXPECT_EQ(reg(Gpr::rax), sel::tss);
    guest.put<std::uint32_t>(TestGuest::data, 0xffff'ffff);
    expect_done({0x48, 0x0f, 0x00, 0x03}); // sldt [rbx]
    EXPECT_EQ(guest.get<std::uint32_t>(TestGuest::data), 0xffff'0000U | sel::ldt);
    user(3);
    EXPECT_EQ(fault({0x0f, 0x00, 0xd0}), gp());
    EXPECT_EQ(fault({0x0f, 0x00, 0xd8}), gp());
}

TEST_F(EmulatorTest, UserModeInstructionPrevention) {
    const std::array all{Bytes{0x0f, 0x01, 0x03}, Bytes{0x0f, 0x01, 0x0b}, Bytes{0x0f, 0x00, 0xc0},
                         Bytes{0x0f, 0x00, 0xc8}, Bytes{0x0f, 0x01, 0xe0}};
    user();
    reg(Gpr::rbx) = TestGuest::user_data;
    for (const Bytes& bytes : all)
        EXPECT_EQ(fault(bytes), no_fault);
    EXPECT_EQ(guest.get<std::uint16_t>(TestGuest::user_data), 0xfff); // SIDT was the last to write there
    user();
    reg(Gpr::rbx) = TestGuest::data; // a kernel page
    EXPECT_EQ(fault({0x0f, 0x01, 0x03}), pf(PageFault::present | PageFault::write | PageFault::user));
    cpu.cr4 |= cr4::umip;
    for (const Bytes& bytes : all)
        EXPECT_EQ(fault(bytes), gp());
    guest.enter_kernel();
    for (const Bytes& bytes : all)
        EXPECT_EQ(fault(bytes), no_fault);
}

// --- Memory operands

TEST_F(EmulatorTest, EffectiveAddresses) {
    const auto stored = [this](Bytes bytes) -> std::uint64_t {
        cpu.idtr = {GuestVirt(0), 0x4242};
        environment.changes.clear();
        expect_done(bytes); // invlpg tells the address
        return environment.changes.empty() ? 0 : environment.changes[0].address.value();
    };
    reg(Gpr::rax) = 0x1000;
    reg(Gpr::rcx) = 0x30;
    reg(Gpr::r12) = 0x7'0000;
    reg(Gpr::rbp) = 0xffff'8000'0000'0000;
    cpu.fs.base = 0x1'0000'0000;
    cpu.gs.base = 0x2'0000'0000;
    cpu.ds.base = 0x3'0000'0000;
    EXPECT_EQ(stored({0x0f, 0x01, 0x38}), 0x1000U);
    EXPECT_EQ(stored({0x0f, 0x01, 0x7c, 0x88, 0x05}), 0x10c5U);                         // [rax+rcx*4+5]
    EXPECT_EQ(stored({0x41, 0x0f, 0x01, 0x7c, 0x24, 0xff}), 0x6'ffffU);                 // [r12-1]
    EXPECT_EQ(stored({0x0f, 0x01, 0x7d, 0x08}), 0xffff'8000'0000'0008U);                // [rbp+8]
    EXPECT_EQ(stored({0x0f, 0x01, 0x3d, 0xf9, 0xff, 0xff, 0xff}), cpu.rip);             // [rip-7]
    EXPECT_EQ(stored({0x64, 0x0f, 0x01, 0x38}), 0x1'0000'1000U);                        // fs:
    EXPECT_EQ(stored({0x65, 0x0f, 0x01, 0x38}), 0x2'0000'1000U);                        // gs:
    EXPECT_EQ(stored({0x2e, 0x0f, 0x01, 0x38}), 0x1000U);                               // cs: means nothing
    EXPECT_EQ(stored({0x0f, 0x01, 0x3c, 0x25, 0, 0, 0, 0x80}), 0xffff'ffff'8000'0000U); // [disp32]
    reg(Gpr::rax) = 0xffff'ffff'ffff'ffff;
    EXPECT_EQ(stored({0x67, 0x0f, 0x01, 0x78, 0x02}), 1U); // [eax+2]
    EXPECT_EQ(stored({0x64, 0x67, 0x0f, 0x01, 0x78, 0x02}), 0x1'0000'0001U);
}

TEST_F(EmulatorTest, NonCanonicalOperands) {
    reg(Gpr::rax) = reg(Gpr::rbp) = TestGuest::non_canonical;
    EXPECT_EQ(fault({0x0f, 0x01, 0x00}), gp());       // sgdt [rax]
    EXPECT_EQ(fault({0x0f, 0x01, 0x45, 0x00}), ss()); // sgdt [rbp]
    reg(Gpr::rax) = TestGuest::non_canonical - 4;     // its end
    EXPECT_EQ(fault({0x0f, 0x01, 0x00}), gp());
    reg(Gpr::rsp) = TestGuest::non_canonical;
    EXPECT_EQ(fault({0x48, 0xcf}), ss());
    EXPECT_EQ(fault({0x0f, 0xa1}), ss()); // pop fs
}

TEST_F(EmulatorTest, CompatibilityModeOperands) {
    guest.enter_user(false);
    cpu.ds.base = 0x1000;
    reg(Gpr::rbx) = 0xffff'ffff'0000'0000 | (TestGuest::user_data - 0x1000);
    EXPECT_EQ(fault({0x0f, 0x01, 0x0b}), no_fault); // sidt [ebx]: six bytes
    EXPECT_EQ(guest.get<std::uint64_t>(TestGuest::user_data), TestGuest::idt << 16 | 0xfff);
    cpu.rip = start;
    cpu.ds.limit = static_cast<std::uint32_t>(reg(Gpr::rbx)) + 4;
    EXPECT_EQ(fault({0x0f, 0x01, 0x0b}), gp());
    cpu.ds.limit += 1;
    EXPECT_EQ(fault({0x0f, 0x01, 0x0b}), no_fault);
    cpu.ds.type = 1; // read-only
    EXPECT_EQ(fault({0x0f, 0x01, 0x0b}), gp());
    cpu.ds.type = 7; // expand-down: only above the limit
    EXPECT_EQ(fault({0x0f, 0x01, 0x0b}), gp());
    cpu.ds.limit = 0xff;
    EXPECT_EQ(fault({0x0f, 0x01, 0x0b}), no_fault);
    cpu.ds.present = false;
    EXPECT_EQ(fault({0x0f, 0x01, 0x0b}), gp());
    cpu.ss.limit = 0xff;
    reg(Gpr::rbp) = TestGuest::user_data;
    EXPECT_EQ(fault({0x0f, 0x01, 0x4d, 0x00}), ss()); // sidt [ebp]
}

TEST_F(EmulatorTest, CompatibilityModeCodeBase) {
    guest.enter_user(false);
    cpu.cs.base = 0x1000;
    guest.put<std::uint16_t>(TestGuest::user_code + 0x1000, 0x80cd);
    const Emulation result = emulate(cpu, guest.space(), environment);
    ASSERT_TRUE(std::holds_alternative<SoftwareEvent>(result));
    EXPECT_EQ(std::get<SoftwareEvent>(result).event.vector, 0x80);
}

// --- Segment registers

TEST_F(EmulatorTest, MoveToSegmentRegisters) {
    reg(Gpr::rax) = sel::kernel_data;
    EXPECT_FALSE(result_of<Done>({0x8e, 0xd8}).interrupt_shadow); // mov ds, ax
    EXPECT_EQ(cpu.rip, start + 2);
    EXPECT_EQ(cpu.ds.selector, sel::kernel_data);
    EXPECT_TRUE(result_of<Done>({0x8e, 0xd0}).interrupt_shadow); // mov ss, ax
    reg(Gpr::rbx) = TestGuest::data;
    guest.put<std::uint16_t>(TestGuest::data, sel::absent_data);
    EXPECT_EQ(fault({0x8e, 0x23}), np(sel::absent_data)); // mov fs, [rbx]
    EXPECT_EQ(fault({0x8e, 0x13}), ss(sel::absent_data));
    guest.put<std::uint16_t>(TestGuest::data, 0);
    EXPECT_EQ(fault({0x41, 0x8e, 0xe0}), no_fault); // mov fs, r8w
    (void)result_of<Raised>({0x8e, 0xc8});          // mov cs: #UD
}

TEST_F(EmulatorTest, PopSegmentRegisters) {
    frame({0xffff'0000 | sel::kernel_data});
    const std::uint64_t top = reg(Gpr::rsp);
    expect_done({0x0f, 0xa1}); // pop fs
    EXPECT_EQ(cpu.fs.selector, sel::kernel_data);
    EXPECT_EQ(reg(Gpr::rsp), top + 8);
    frame({sel::kernel_data});
    expect_done({0x66, 0x0f, 0xa9}); // pop gs, 16 bits
    EXPECT_EQ(cpu.gs.selector, sel::kernel_data);
    EXPECT_EQ(reg(Gpr::rsp), top + 2);
    frame({sel::beyond});
    EXPECT_EQ(fault({0x0f, 0xa1}), gp(sel::beyond));
    EXPECT_EQ(reg(Gpr::rsp), top);

    guest.enter_user(false);
    frame({sel::user_data_16});
    const std::uint64_t user_top = reg(Gpr::rsp);
    EXPECT_TRUE(result_of<Done>({0x17}).interrupt_shadow); // pop ss, which makes the stack a 16-bit one
    EXPECT_EQ(cpu.ss.selector, sel::user_data_16);
    EXPECT_EQ(reg(Gpr::rsp), user_top + 4);
}

TEST_F(EmulatorTest, LoadFarPointers) {
    reg(Gpr::rbx) = TestGuest::data;
    guest.put<std::uint32_t>(TestGuest::data, 0x8765'4321);
    guest.put<std::uint16_t>(TestGuest::data + 4, sel::kernel_data);
    reg(Gpr::rax) = ~std::uint64_t{0};
    expect_done({0x0f, 0xb2, 0x03}); // lss eax, [rbx]
    EXPECT_EQ(reg(Gpr::rax), 0x8765'4321U);
    EXPECT_EQ(cpu.ss.selector, sel::kernel_data);
    guest.put<std::uint16_t>(TestGuest::data + 8, sel::read_only_data);
    expect_done({0x4c, 0x0f, 0xb4, 0x03}); // lfs r8, [rbx]
    EXPECT_EQ(reg(Gpr::r8), guest.get<std::uint64_t>(TestGuest::data));
    EXPECT_EQ(cpu.fs.selector, sel::read_only_data);
    guest.put<std::uint16_t>(TestGuest::data + 2, sel::beyond);
    reg(Gpr::rax) = 5;
    EXPECT_EQ(fault({0x66, 0x0f, 0xb5, 0x03}), gp(sel::beyond)); // lgs ax, [rbx]
    EXPECT_EQ(reg(Gpr::rax), 5U);
}

// --- Far transfers

TEST_F(EmulatorTest, DescriptorsAreExamined) {
    constexpr std::uint64_t untouched = 0x1122'3344'5566'7788;
    const auto lar = [&](std::uint16_t selector) -> std::optional<std::uint64_t> {
        reg(Gpr::rcx) = selector;
        reg(Gpr::rax) = untouched;
        expect_done({0x0f, 0x02, 0xc1}); // lar eax, ecx
        if ((cpu.rflags & 0x40) != 0)
            return reg(Gpr::rax);
        EXPECT_EQ(reg(Gpr::rax), untouched);
        return std::nullopt;
    };
    const auto lsl = [&](std::uint16_t selector) -> std::optional<std::uint64_t> {
        reg(Gpr::rcx) = selector;
        reg(Gpr::rax) = untouched;
        expect_done({0x0f, 0x03, 0xc1}); // lsl eax, ecx
        return (cpu.rflags & 0x40) != 0 ? std::optional(reg(Gpr::rax)) : std::nullopt;
    };
    const auto verify = [&](std::uint16_t selector) { // as "rw"
        reg(Gpr::rcx) = selector;
        std::string rights;
        expect_done({0x0f, 0x00, 0xe1}); // verr cx
        rights += (cpu.rflags & 0x40) != 0 ? 'r' : '-';
        expect_done({0x0f, 0x00, 0xe9}); // verw cx
        return rights + ((cpu.rflags & 0x40) != 0 ? 'w' : '-');
    };
    EXPECT_EQ(lar(sel::kernel_code), 0xa0'9a00U);
    EXPECT_EQ(lar(sel::kernel_data), 0xc0'9200U);
    EXPECT_EQ(lar(sel::kernel_data | 3), std::nullopt); // RPL > DPL
    EXPECT_EQ(lar(sel::conforming_code | 3), 0xa0'9e00U);
    EXPECT_EQ(lar(sel::absent_data), 0xc0'1200U);
    EXPECT_EQ(lar(sel::tss), 0x8900U);
    EXPECT_EQ(lar(sel::ldt), 0x8200U);
    EXPECT_EQ(lar(sel::call_gate), 0x8c00U);
    EXPECT_EQ(lar(0), std::nullopt);
    EXPECT_EQ(lar(3), std::nullopt);
    EXPECT_EQ(lar(sel::beyond), std::nullopt);
    EXPECT_EQ(lar(sel::local_data), std::nullopt); // without an LDT
    reg(Gpr::rcx) = sel::kernel_code;
    reg(Gpr::rax) = untouched;
    expect_done({0x66, 0x0f, 0x02, 0xc1}); // lar ax, cx
    EXPECT_EQ(reg(Gpr::rax), (untouched & ~std::uint64_t{0xffff}) | 0x9a00);
    guest.put<std::uint16_t>(TestGuest::data, sel::kernel_data);
    reg(Gpr::rbx) = TestGuest::data;
    expect_done({0x4c, 0x0f, 0x02, 0x03}); // lar r8, [rbx]
    EXPECT_EQ(reg(Gpr::r8), 0xc0'9200U);

    EXPECT_EQ(lsl(sel::kernel_data), 0xffff'ffffU);
    EXPECT_EQ(lsl(sel::user_data_16), 0xffffU);
    EXPECT_EQ(lsl(sel::tss), TestGuest::tss_limit);
    EXPECT_EQ(lsl(sel::call_gate), std::nullopt);

    EXPECT_EQ(verify(sel::kernel_data), "rw");
    EXPECT_EQ(verify(sel::read_only_data), "r-");
    EXPECT_EQ(verify(sel::kernel_code), "r-");
    EXPECT_EQ(verify(sel::execute_only_code), "--");
    EXPECT_EQ(verify(sel::tss), "--");
    EXPECT_EQ(verify(0), "--");

    user(3);
    EXPECT_EQ(lar(sel::kernel_code), std::nullopt);
    EXPECT_EQ(lar(sel::conforming_code), 0xa0'9e00U);
    EXPECT_EQ(lar(sel::user_data), 0xc0'f200U);
    EXPECT_EQ(lar(sel::user_data & ~3), 0xc0'f200U);
    EXPECT_EQ(lsl(sel::tss), std::nullopt);
    EXPECT_EQ(verify(sel::user_data), "rw");
    EXPECT_EQ(verify(sel::kernel_data), "--");
    EXPECT_EQ(verify(sel::conforming_code), "r-");
    guest.map(TestGuest::gdt, 0);
    reg(Gpr::rcx) = sel::user_data;
    EXPECT_EQ(fault({0x0f, 0x02, 0xc1}), pf(0)); // as the supervisor
}

TEST_F(EmulatorTest, FarJump) {
    reg(Gpr::rbx) = TestGuest::data;
    guest.put<std::uint32_t>(TestGuest::data, 0x2'1000);
    guest.put<std::uint16_t>(TestGuest::data + 4, sel::conforming_code | 3);
    EXPECT_EQ(fault({0xff, 0x2b}), no_fault); // jmp m16:32
    EXPECT_EQ(cpu.rip, 0x2'1000U);
    EXPECT_EQ(cpu.cs.selector, sel::conforming_code); // RPL becomes CPL
    EXPECT_EQ(cpu.rflags & rflags::resume, 0U);
    EXPECT_EQ(guest.access_of(sel::conforming_code), 0x9f);

    const auto jump = [this](std::uint64_t target, std::uint16_t selector) {
        guest.enter_kernel();
        guest.put(TestGuest::data, target);
        guest.put(TestGuest::data + 8, selector);
        return run({0x48, 0xff, 0x2b}); // jmp m16:64
    };
    EXPECT_TRUE(std::holds_alternative<Done>(jump(0xffff'8000'0000'0000, sel::kernel_code)));
    EXPECT_EQ(cpu.rip, 0xffff'8000'0000'0000U);
    EXPECT_EQ(fault_of(std::get<Raised>(jump(TestGuest::non_canonical, sel::kernel_code)).exception), gp());
    EXPECT_EQ(fault_of(std::get<Raised>(jump(0, sel::absent_code)).exception), np(sel::absent_code));
    EXPECT_NE(std::get<Unsupported>(jump(0, sel::call_gate)).what.find("call gate"), std::string_view::npos);
    EXPECT_EQ(cpu.rip, start);
    EXPECT_TRUE(std::holds_alternative<Done>(jump(0x2'1000, sel::kernel_code_32)));
    EXPECT_FALSE(cpu.cs.long_mode);
    EXPECT_EQ(cpu.cpl, 0);
    EXPECT_EQ(cpu.rip, 0x2'1000U);
}

TEST_F(EmulatorTest, FarCall) {
    reg(Gpr::rbx) = TestGuest::data;
    guest.put<std::uint64_t>(TestGuest::data, 0x2'1000);
    guest.put<std::uint16_t>(TestGuest::data + 8, sel::kernel_code);
    EXPECT_EQ(fault({0x48, 0xff, 0x1b}), no_fault);
    EXPECT_EQ(cpu.rip, 0x2'1000U);
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::kernel_stack - 16);
    EXPECT_EQ(guest.get<std::uint64_t>(reg(Gpr::rsp)), start + 3);
    EXPECT_EQ(guest.get<std::uint64_t>(reg(Gpr::rsp) + 8), sel::kernel_code);
    guest.enter_kernel();
    guest.map(TestGuest::kernel_stack - 0x1000, 0);
    EXPECT_EQ(fault({0x48, 0xff, 0x1b}), pf(PageFault::write));
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::kernel_stack);
    // CS is pushed first, so it is its address that faults.
    EXPECT_EQ(std::get<Raised>(run({0x48, 0xff, 0x1b})).exception.address,
              GuestVirt(TestGuest::kernel_stack - 8));
}

TEST_F(EmulatorTest, FarReturnToTheSameLevel) {
    frame({0x2'1000, sel::kernel_code});
    const std::uint64_t top = reg(Gpr::rsp);
    EXPECT_EQ(fault({0x48, 0xcb}), no_fault); // retfq
    EXPECT_EQ(cpu.rip, 0x2'1000U);
    EXPECT_EQ(reg(Gpr::rsp), top + 16);
    frame({std::uint64_t{sel::kernel_code} << 32 | 0x2'0000});
    EXPECT_EQ(fault({0xca, 0x20, 0x00}), no_fault); // retf 0x20, of 32-bit items
    EXPECT_EQ(cpu.rip, TestGuest::code);
    EXPECT_EQ(reg(Gpr::rsp), top + 8 + 0x20);
    frame({TestGuest::non_canonical, sel::kernel_code});
    EXPECT_EQ(fault({0x48, 0xcb}), gp());
    EXPECT_EQ(reg(Gpr::rsp), top);
    frame({0x2'1000, sel::kernel_code_32});
    EXPECT_EQ(fault({0x48, 0xcb}), no_fault);
    EXPECT_FALSE(cpu.cs.long_mode);
    EXPECT_EQ(reg(Gpr::rsp), top + 16);
}

TEST_F(EmulatorTest, FarReturnToUser) {
    cpu.ds = TestGuest::segment(sel::kernel_data, 3, 0, false);
    frame({TestGuest::user_code, sel::user_code, 0, 0, TestGuest::user_stack, sel::user_data});
    EXPECT_EQ(fault({0x48, 0xca, 0x10, 0x00}), no_fault);
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu.cs.selector, sel::user_code);
    EXPECT_EQ(cpu.ss.selector, sel::user_data);
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::user_stack + 0x10);
    EXPECT_FALSE(cpu.ds.present);
    guest.enter_kernel();
    frame({TestGuest::user_code, sel::user_code, TestGuest::user_stack, 0});
    EXPECT_EQ(fault({0x48, 0xcb}), gp()); // null SS at level 3
}

// --- IRET

constexpr std::uint64_t user_flags = rflags::fixed | rflags::interrupt | 1;

TEST_F(EmulatorTest, InterruptReturnToUser) {
    cpu.ds = TestGuest::segment(sel::kernel_data, 3, 0, false);
    cpu.es = TestGuest::segment(sel::user_data, 3, 3, false);
    frame({TestGuest::user_code + 5, sel::user_code, user_flags | rflags::trap | rflags::resume,
           TestGuest::user_stack - 8, sel::user_data});
    EXPECT_EQ(fault({0x48, 0xcf}), no_fault);
    EXPECT_EQ(cpu.rip, TestGuest::user_code + 5);
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu.cs.selector, sel::user_code);
    EXPECT_EQ(cpu.ss.selector, sel::user_data);
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::user_stack - 8);
    EXPECT_EQ(cpu.rflags, user_flags | rflags::trap | rflags::resume);
    EXPECT_EQ(cpu.ds.selector, 0);
    EXPECT_EQ(cpu.es.selector, sel::user_data);
    EXPECT_EQ(guest.access_of(sel::user_code), 0xfb);
    EXPECT_EQ(guest.access_of(sel::user_data), 0xf3);
}

TEST_F(EmulatorTest, InterruptReturnToTheSameLevelPopsTheStackToo) {
    frame({0x2'1000, sel::kernel_code, rflags::fixed, 0x4'1230, 0});
    EXPECT_EQ(fault({0x48, 0xcf}), no_fault);
    EXPECT_EQ(cpu.rip, 0x2'1000U);
    EXPECT_EQ(cpu.cpl, 0);
    EXPECT_EQ(reg(Gpr::rsp), 0x4'1230U);
    EXPECT_FALSE(cpu.ss.present);
}

TEST_F(EmulatorTest, InterruptReturnWith32BitItems) {
    frame({std::uint64_t{sel::user_code} << 32 | TestGuest::user_code,
           std::uint64_t{TestGuest::user_stack} << 32 | user_flags, sel::user_data});
    EXPECT_EQ(fault({0xcf}), no_fault);
    EXPECT_EQ(cpu.rip, TestGuest::user_code);
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::user_stack);
    EXPECT_EQ(cpu.rflags, user_flags);
}

TEST_F(EmulatorTest, InterruptReturnToCompatibilityMode) {
    frame({TestGuest::user_code, sel::user_code_32, user_flags, 0xffff'0000'0000 | TestGuest::user_stack,
           sel::user_data});
    EXPECT_EQ(fault({0x48, 0xcf}), no_fault);
    EXPECT_FALSE(cpu.cs.long_mode);
    EXPECT_EQ(reg(Gpr::rsp), TestGuest::user_stack);
    guest.enter_kernel();
    frame({std::uint64_t{1} << 32, sel::user_code_32, user_flags, TestGuest::user_stack, sel::user_data});
    EXPECT_EQ(fault({0x48, 0xcf}), gp()); // beyond the limit of CS
    frame({0x1000, sel::kernel_code_32, rflags::fixed, TestGuest::kernel_stack, sel::kernel_data});
    EXPECT_EQ(fault({0x48, 0xcf}), no_fault);
    EXPECT_FALSE(cpu.cs.long_mode);
    EXPECT_EQ(cpu.cpl, 0);
    guest.enter_kernel();
    // A 16-bit stack segment takes the low half of SP only.
    frame({TestGuest::user_code, sel::user_code_32, user_flags, 0x1234, sel::user_data_16});
    const std::uint64_t before = reg(Gpr::rsp);
    EXPECT_EQ(fault({0x48, 0xcf}), no_fault);
    EXPECT_EQ(reg(Gpr::rsp), (before & ~std::uint64_t{0xffff}) | 0x1234);
}

TEST_F(EmulatorTest, InterruptReturnFromCompatibilityMode) {
    guest.enter_user(false);
    frame({std::uint64_t{sel::user_code} << 32 | (TestGuest::user_code + 9), user_flags});
    const std::uint64_t top = reg(Gpr::rsp);
    EXPECT_EQ(fault({0xcf}), no_fault);
    EXPECT_TRUE(cpu.cs.long_mode);
    EXPECT_EQ(cpu.rip, TestGuest::user_code + 9);
    EXPECT_EQ(reg(Gpr::rsp), top + 12);
}

TEST_F(EmulatorTest, InterruptReturnFlags) {
    const std::uint64_t all = 0x003f'7fd7;
    const auto flags_after = [&](std::uint64_t before, std::uint64_t popped, Bytes bytes) {
        cpu.rflags = before;
        if (cpu.cpl == 0)
            frame({TestGuest::code, sel::kernel_code, popped, TestGuest::kernel_stack, sel::kernel_data});
        else
            frame({TestGuest::user_code, sel::user_code, popped, TestGuest::user_stack, sel::user_data});
        EXPECT_EQ(fault(bytes), no_fault);
        return cpu.rflags;
    };
    // VM cannot be set in long mode.
    EXPECT_EQ(flags_after(rflags::fixed, all, {0x48, 0xcf}), all & ~rflags::virtual_8086);
    EXPECT_EQ(flags_after(all & ~rflags::nested_task, 0, {0x48, 0xcf}), rflags::fixed | rflags::virtual_8086);
    guest.enter_user();
    constexpr std::uint64_t vif_vip = 3U << 19;
    EXPECT_EQ(flags_after(rflags::fixed, all, {0x48, 0xcf}),
              all & ~(rflags::virtual_8086 | rflags::iopl | rflags::interrupt | vif_vip));
    EXPECT_EQ(flags_after(rflags::fixed | rflags::interrupt, 0, {0x48, 0xcf}),
              rflags::fixed | rflags::interrupt);
    EXPECT_EQ(flags_after(rflags::fixed | rflags::iopl, rflags::interrupt, {0x48, 0xcf}),
              rflags::fixed | rflags::iopl | rflags::interrupt);
}

TEST_F(EmulatorTest, InterruptReturnFaults) {
    const auto iret = [this](std::uint64_t rip, std::uint64_t cs, std::uint64_t stack) {
        guest.enter_kernel();
        frame({rip, cs, user_flags, TestGuest::user_stack, stack});
        const Fault result = fault({0x48, 0xcf});
        EXPECT_EQ(reg(Gpr::rsp), TestGuest::kernel_stack - 0x100);
        EXPECT_EQ(cpu.cpl, 0);
        return result;
    };
    EXPECT_EQ(iret(0, 0, sel::user_data), gp(0));
    EXPECT_EQ(iret(0, sel::beyond, sel::user_data), gp(sel::beyond));
    EXPECT_EQ(iret(0, sel::absent_user_code, sel::user_data), np(sel::absent_user_code & ~3));
    EXPECT_EQ(iret(0, sel::user_code, 0), gp(0));
    EXPECT_EQ(iret(0, sel::user_code, 3), gp(0));
    EXPECT_EQ(iret(0, sel::user_code, sel::kernel_data), gp(sel::kernel_data));
    EXPECT_EQ(iret(0, sel::user_code, sel::absent_user_data), ss(sel::absent_user_data & ~3));
    EXPECT_EQ(iret(TestGuest::non_canonical, sel::user_code, sel::user_data), gp(0));
    EXPECT_EQ(iret(TestGuest::non_canonical, sel::kernel_code, sel::kernel_data), gp(0));
    cpu.rflags |= rflags::nested_task;
    EXPECT_EQ(fault({0x48, 0xcf}), gp(0));
    cpu.rflags = rflags::fixed;
    guest.map(TestGuest::kernel_stack - 0x1000, 0);
    EXPECT_EQ(fault({0x48, 0xcf}), pf(0));
    guest.enter_user();
    frame({TestGuest::code, sel::kernel_code, user_flags, TestGuest::kernel_stack, sel::kernel_data});
    EXPECT_EQ(fault({0x48, 0xcf}), gp(sel::kernel_code)); // never to an inner level
}

// --- SYSCALL, SYSRET

constexpr std::uint64_t star = std::uint64_t{sel::user_code_32} << 48 | std::uint64_t{sel::kernel_code} << 32;

TEST_F(EmulatorTest, Syscall) {
    guest.enter_user();
    cpu.star = star;
    cpu.lstar = 0xffff'8000'0000'1000;
    cpu.cstar = 0xffff'8000'0000'2000;
    cpu.fmask = rflags::interrupt | rflags::trap;
    cpu.rflags = user_flags | rflags::trap | rflags::resume;
    ASSERT_FALSE(emulate_syscall(cpu, GuestVirt(TestGuest::user_code + 2)));
    EXPECT_EQ(cpu.rip, cpu.lstar);
    EXPECT_EQ(cpu.cpl, 0);
    EXPECT_EQ(reg(Gpr::rcx), TestGuest::user_code + 2);
    EXPECT_EQ(reg(Gpr::r11), user_flags | rflags::trap);
    EXPECT_EQ(cpu.rflags, rflags::fixed | 1);
    EXPECT_EQ(cpu.cs.selector, sel::kernel_code);
    EXPECT_TRUE(cpu.cs.long_mode && cpu.cs.present && is_code(cpu.cs));
    EXPECT_EQ(cpu.ss.selector, sel::kernel_code + 8);
    EXPECT_TRUE(is_writable_data(cpu.ss));
    EXPECT_EQ(cpu.cs.dpl + cpu.ss.dpl, 0);

    guest.enter_user(false);
    ASSERT_FALSE(emulate_syscall(cpu, GuestVirt(TestGuest::user_code + 2)));
    EXPECT_EQ(cpu.rip, cpu.cstar);
    guest.enter_user();
    cpu.efer &= ~efer::sce;
    EXPECT_EQ(fault_of(emulate_syscall(cpu, GuestVirt(TestGuest::user_code + 2))), ud());
    EXPECT_EQ(cpu.rip, TestGuest::user_code);
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(fault({0x0f, 0x05}), ud());
    cpu.efer |= efer::sce;
    EXPECT_EQ(fault({0x0f, 0x05}), no_fault);
    EXPECT_EQ(reg(Gpr::rcx), start + 2);
}

TEST_F(EmulatorTest, Sysret) {
    cpu.star = star;
    reg(Gpr::rcx) = 0x7'0003'0000;
    reg(Gpr::r11) = user_flags | rflags::resume | rflags::virtual_8086 | std::uint64_t{1} << 40;
    EXPECT_EQ(fault({0x48, 0x0f, 0x07}), no_fault);
    EXPECT_EQ(cpu.rip, 0x7'0003'0000U);
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu.rflags, user_flags); // RF and VM are not loaded
    EXPECT_EQ(cpu.cs.selector, sel::user_code);
    EXPECT_TRUE(cpu.cs.long_mode);
    EXPECT_EQ(cpu.ss.selector, sel::user_data);
    EXPECT_EQ(cpu.cs.dpl & cpu.ss.dpl, 3);

    guest.enter_kernel();
    EXPECT_EQ(fault({0x0f, 0x07}), no_fault); // sysretl
    EXPECT_EQ(cpu.rip, 0x3'0000U);
    EXPECT_EQ(cpu.cs.selector, sel::user_code_32);
    EXPECT_TRUE(!cpu.cs.long_mode && cpu.cs.default_32);

    guest.enter_kernel();
    reg(Gpr::rcx) = TestGuest::non_canonical;
    EXPECT_EQ(fault({0x48, 0x0f, 0x07}), gp());
    EXPECT_EQ(cpu.cpl, 0);
    cpu.efer &= ~efer::sce;
    EXPECT_EQ(fault({0x48, 0x0f, 0x07}), ud());
    cpu.efer |= efer::sce;
    guest.enter_user();
    EXPECT_EQ(fault({0x48, 0x0f, 0x07}), gp());
}

// --- Software interrupts

TEST_F(EmulatorTest, SoftwareInterrupts) {
    guest.enter_user();
    Event event = result_of<SoftwareEvent>({0xcd, 0x80}).event;
    EXPECT_EQ(cpu.rip, start + 2);
    EXPECT_EQ(event.vector, 0x80);
    EXPECT_EQ(event.kind, EventKind::software_interrupt);
    EXPECT_EQ(event.instruction_length, 2);
    EXPECT_FALSE(event.error_code);
    event = result_of<SoftwareEvent>({0xcc}).event;
    EXPECT_EQ(cpu.rip, start + 1);
    EXPECT_EQ(event.vector, 3);
    EXPECT_EQ(event.kind, EventKind::software_exception);
    EXPECT_EQ(event.instruction_length, 1);
    event = result_of<SoftwareEvent>({0xf1}).event;
    EXPECT_EQ(event.vector, 1);
    EXPECT_EQ(event.kind, EventKind::exception);

    guest.enter_user(false);
    event = result_of<SoftwareEvent>({0xcd, 0x80}).event;
    EXPECT_EQ(event.vector, 0x80);
    EXPECT_EQ(fault({0xce}), no_fault); // into, without OF
    cpu.rflags |= 1U << 11;
    event = result_of<SoftwareEvent>({0xce}).event;
    EXPECT_EQ(event.vector, 4);
    EXPECT_EQ(event.kind, EventKind::software_exception);
}

// --- Translation caches

TEST_F(EmulatorTest, WriteCr4WithPcid) {
    const std::uint64_t cr4 = cpu.cr4;
    const auto write = [this](std::uint64_t value) {
        reg(Gpr::rax) = value;
        return fault({0x0f, 0x22, 0xe0});
    };
    cpu.cr3 |= 0x1000 | 0xfff;
    EXPECT_EQ(write(cr4 | cr4::pcide), gp());
    cpu.cr3 &= ~std::uint64_t{0xfff};
    EXPECT_EQ(write(cr4 | cr4::pcide), no_fault);
    EXPECT_EQ(changes(), Changes{}); // all that was translated so far belongs to PCID 0
    cpu.cr3 |= 9;
    EXPECT_EQ(write(cr4 | cr4::pcide | cr4::smep), no_fault); // CR3 may hold one now
    EXPECT_EQ(changes(),
              (Changes{change(PagingChange::mode, false, 9), change(PagingChange::context, true, 9)}));
    EXPECT_EQ(write(cr4 | cr4::smep), no_fault); // turned off under a PCID: everything goes
    EXPECT_EQ(changes(), Changes{change(PagingChange::everything, true)});
    EXPECT_EQ(cpu.cr3 & 0xfff, 9U);
    environment.allowed &= ~cr4::pcide;
    cpu.cr3 &= ~std::uint64_t{0xfff};
    EXPECT_EQ(write(cpu.cr4 | cr4::pcide), gp()); // not offered
}

TEST_F(EmulatorTest, InvalidatePage) {
    cpu.cr4 |= cr4::pcide;
    cpu.cr3 |= 5;
    reg(Gpr::rax) = 0xffff'8000'0000'1234;
    expect_done({0x0f, 0x01, 0x38});
    EXPECT_EQ(changes(), Changes{change(PagingChange::page, true, 5, 0xffff'8000'0000'1234)});
    cpu.cr4 &= ~cr4::pcide;
    expect_done({0x0f, 0x01, 0x38});
    EXPECT_EQ(changes(), Changes{change(PagingChange::page, true, 0, 0xffff'8000'0000'1234)});
    reg(Gpr::rax) = TestGuest::non_canonical;
    expect_done({0x0f, 0x01, 0x38}); // nothing happens
    EXPECT_TRUE(environment.changes.empty());
    user(3);
    EXPECT_EQ(fault({0x0f, 0x01, 0x38}), gp());
}

TEST_F(EmulatorTest, InvalidatePcid) {
    const auto invalidate = [this](std::uint64_t type, std::uint64_t pcid, std::uint64_t address) {
        guest.put(TestGuest::data, pcid);
        guest.put(TestGuest::data + 8, address);
        reg(Gpr::rbx) = TestGuest::data;
        reg(Gpr::rcx) = type;
        return fault({0x66, 0x0f, 0x38, 0x82, 0x0b}); // invpcid rcx, [rbx]
    };
    cpu.cr4 |= cr4::pcide;
    cpu.cr3 |= 5;
    EXPECT_EQ(invalidate(0, 9, 0x5000), no_fault);
    EXPECT_EQ(changes(), Changes{change(PagingChange::page, false, 9, 0x5000)}); // unlike INVLPG
    EXPECT_EQ(invalidate(1, 0xfff, TestGuest::non_canonical), no_fault);
    EXPECT_EQ(changes(), Changes{change(PagingChange::context, false, 0xfff)});
    EXPECT_EQ(invalidate(2, 9, TestGuest::non_canonical), no_fault);
    EXPECT_EQ(changes(), Changes{change(PagingChange::everything, true, 5)});
    EXPECT_EQ(invalidate(3, 9, TestGuest::non_canonical), no_fault);
    EXPECT_EQ(changes(), Changes{change(PagingChange::all_contexts, false, 5)});
    EXPECT_EQ(invalidate(4, 0, 0), gp());
    EXPECT_EQ(invalidate(~std::uint64_t{0}, 0, 0), gp());
    EXPECT_EQ(invalidate(std::uint64_t{1} << 32, 0, 0), gp()); // all 64 bits count
    for (const std::uint64_t type : {0U, 1U, 2U, 3U}) {
        EXPECT_EQ(invalidate(type, 0x1000, 0), gp()); // reserved bits
        EXPECT_EQ(invalidate(type, std::uint64_t{1} << 63, 0), gp());
    }
    EXPECT_EQ(invalidate(0, 0, TestGuest::non_canonical), gp());
    EXPECT_EQ(changes(), Changes{});
    guest.map(TestGuest::data, 0);
    EXPECT_EQ(invalidate(2, 0, 0), pf(0)); // the descriptor is read for every type
    EXPECT_EQ(invalidate(4, 0, 0), gp());
    guest.map(TestGuest::data, TestGuest::kernel_rights);
    reg(Gpr::rcx) = 2;
    reg(Gpr::rbx) = TestGuest::non_canonical;
    EXPECT_EQ(fault({0x66, 0x0f, 0x38, 0x82, 0x0b}), gp());
    cpu.cr4 &= ~cr4::pcide;
    EXPECT_EQ(invalidate(0, 9, 0), gp()); // without PCIDs there is only 0
    EXPECT_EQ(invalidate(1, 9, 0), gp());
    EXPECT_EQ(changes(), Changes{});
    EXPECT_EQ(invalidate(0, 0, 0x5000), no_fault);
    EXPECT_EQ(invalidate(1, 0, 0), no_fault);
    EXPECT_EQ(invalidate(2, 9, 0), no_fault); // which do not use it
    EXPECT_EQ(invalidate(3, 9, 0), no_fault);
    EXPECT_EQ(changes(),
              (Changes{change(PagingChange::page, false, 0, 0x5000), change(PagingChange::context, false),
                       change(PagingChange::everything, true), change(PagingChange::all_contexts, false)}));
    environment.invpcid_offered = false;
    EXPECT_EQ(invalidate(2, 0, 0), ud());
    environment.invpcid_offered = true;
    user(3);
    EXPECT_EQ(invalidate(2, 0, 0), gp());
}

TEST_F(EmulatorTest, CacheControl) {
    expect_done({0x0f, 0x08});
    expect_done({0x0f, 0x09});
    expect_done({0xf3, 0x0f, 0x09});
    user(3);
    EXPECT_EQ(fault({0x0f, 0x08}), gp());
    EXPECT_EQ(fault({0x0f, 0x09}), gp());
}

// --- Model-specific registers

class MsrTest : public EmulatorTest {
  protected:
    Fault write(std::uint32_t index, std::uint64_t value) {
        reg(Gpr::rcx) = 0xffff'ffff'0000'0000 | index;
        reg(Gpr::rax) = 0xffff'ffff'0000'0000 | (value & 0xffff'ffff);
        reg(Gpr::rdx) = 0xffff'ffff'0000'0000 | value >> 32;
        return fault({0x0f, 0x30});
    }
    std::uint64_t read(std::uint32_t index) {
        reg(Gpr::rcx) = index;
        reg(Gpr::rax) = reg(Gpr::rdx) = ~std::uint64_t{0};
        EXPECT_EQ(fault({0x0f, 0x32}), no_fault);
        return reg(Gpr::rdx) << 32 | reg(Gpr::rax);
    }
};

TEST_F(MsrTest, RegistersOfTheCpu) {
    struct Case {
        std::uint32_t index;
        std::uint64_t* held;
        bool address, narrow;
    };
    for (const Case& c :
         {Case{0x174, &cpu.sysenter_cs, false, false}, Case{0x175, &cpu.sysenter_esp, true, false},
          Case{0x176, &cpu.sysenter_eip, true, false}, Case{0xc000'0081, &cpu.star, false, false},
          Case{0xc000'0082, &cpu.lstar, true, false}, Case{0xc000'0083, &cpu.cstar, true, false},
          Case{0xc000'0084, &cpu.fmask, false, true}, Case{0xc000'0100, &cpu.fs.base, true, false},
          Case{0xc000'0101, &cpu.gs.base, true, false}, Case{0xc000'0102, &cpu.kernel_gs_base, true, false},
          Case{0xc000'0103, &cpu.tsc_aux, false, true}}) {
        const std::uint64_t value = c.narrow ? 0x8765'4321 : 0xffff'8765'0000'0008;
        EXPECT_EQ(write(c.index, value), no_fault) << c.index;
        EXPECT_EQ(*c.held, value) << c.index;
        EXPECT_EQ(read(c.index), value) << c.index;
        EXPECT_EQ(write(c.index, TestGuest::non_canonical), c.address || c.narrow ? gp() : no_fault)
            << c.index;
        EXPECT_EQ(*c.held, c.address || c.narrow ? value : TestGuest::non_canonical) << c.index;
    }
}

TEST_F(MsrTest, PageAttributeTable) {
    EXPECT_EQ(read(0x277), 0x0007'0406'0007'0406U);
    EXPECT_EQ(write(0x277, 0x0706'0504'0100'0607), no_fault);
    EXPECT_EQ(cpu.pat, 0x0706'0504'0100'0607U);
    for (const std::uint64_t type : std::array<std::uint64_t, 4>{2, 3, 8, 0xff})
        EXPECT_EQ(write(0x277, type << 40), gp());
}

TEST_F(MsrTest, Efer) {
    const std::uint64_t before = cpu.efer;
    EXPECT_EQ(read(0xc000'0080), before);
    EXPECT_EQ(write(0xc000'0080, before & ~efer::sce), no_fault);
    EXPECT_EQ(cpu.efer, before & ~efer::sce);
    EXPECT_TRUE(environment.changes.empty());
    EXPECT_EQ(write(0xc000'0080, before & ~(efer::nxe | efer::lma)), no_fault);
    EXPECT_EQ(cpu.efer, before & ~efer::nxe); // LMA is not written
    EXPECT_EQ(changes(), Changes{change(PagingChange::mode, false)});
    EXPECT_EQ(write(0xc000'0080, before & ~efer::lme), gp()); // with paging on
    EXPECT_EQ(write(0xc000'0080, before | 1U << 12), gp());   // SVME
    environment.nx_offered = false;
    EXPECT_EQ(write(0xc000'0080, before), gp());
    EXPECT_EQ(cpu.efer, before & ~efer::nxe);
}

TEST_F(MsrTest, RegistersOfTheEnvironment) {
    EXPECT_EQ(read(0x1b), 0xfee0'0900U);
    EXPECT_EQ(write(0x1b, 0x1'0000'0002), no_fault);
    EXPECT_EQ(environment.msrs[0x1b], 0x1'0000'0002U);
    EXPECT_EQ(write(0x1c, 0), gp());
    reg(Gpr::rcx) = 0x1c;
    EXPECT_EQ(fault({0x0f, 0x32}), gp());
    user(3);
    EXPECT_EQ(fault({0x0f, 0x32}), gp());
    EXPECT_EQ(fault({0x0f, 0x30}), gp());
}

TEST_F(EmulatorTest, SwapGs) {
    cpu.gs.base = 1;
    cpu.kernel_gs_base = 2;
    expect_done({0x0f, 0x01, 0xf8});
    EXPECT_EQ(cpu.gs.base, 2U);
    EXPECT_EQ(cpu.kernel_gs_base, 1U);
    user(3);
    EXPECT_EQ(fault({0x0f, 0x01, 0xf8}), gp());
}

// --- What else traps

TEST_F(EmulatorTest, TimeStampCounter) {
    expect_done({0x0f, 0x31});
    EXPECT_EQ(reg(Gpr::rax), 0x9abc'def0U);
    EXPECT_EQ(reg(Gpr::rdx), 0x1234'5678U);
    cpu.tsc_aux = 77;
    expect_done({0x0f, 0x01, 0xf9});
    EXPECT_EQ(reg(Gpr::rcx), 77U);
    cpu.cr4 |= cr4::tsd;
    expect_done({0x0f, 0x31});
    user(3);
    EXPECT_EQ(fault({0x0f, 0x31}), gp());
    EXPECT_EQ(fault({0x0f, 0x01, 0xf9}), gp());
    cpu.cr4 &= ~cr4::tsd;
    EXPECT_EQ(fault({0x0f, 0x31}), no_fault);
}

TEST_F(EmulatorTest, Cpuid) {
    user();
    reg(Gpr::rax) = 0xffff'ffff'0000'0010;
    reg(Gpr::rcx) = 0xffff'ffff'0000'0003;
    expect_done({0x0f, 0xa2});
    EXPECT_EQ(reg(Gpr::rax), 0x11U);
    EXPECT_EQ(reg(Gpr::rbx), 0x12U);
    EXPECT_EQ(reg(Gpr::rcx), 3U);
    EXPECT_EQ(reg(Gpr::rdx), 4U);
}

TEST_F(EmulatorTest, ExtendedControlRegister) {
    reg(Gpr::rax) = 7;
    EXPECT_EQ(fault({0x0f, 0x01, 0xd1}), ud()); // without OSXSAVE
    cpu.cr4 |= cr4::osxsave;
    expect_done({0x0f, 0x01, 0xd1});
    EXPECT_EQ(environment.xcr0, 7U);
    reg(Gpr::rax) = 6; // the environment refuses it
    EXPECT_EQ(fault({0x0f, 0x01, 0xd1}), gp());
    reg(Gpr::rax) = 7;
    reg(Gpr::rcx) = 1;
    EXPECT_EQ(fault({0x0f, 0x01, 0xd1}), gp());
    reg(Gpr::rcx) = 0;
    user(3);
    reg(Gpr::rax) = 3;
    EXPECT_EQ(fault({0x0f, 0x01, 0xd1}), gp());
    EXPECT_EQ(environment.xcr0, 6U);
}

TEST_F(EmulatorTest, AccessFlag) {
    EXPECT_EQ(fault({0x0f, 0x01, 0xcb}), ud()); // SMAP is not offered
    environment.allowed |= cr4::smap;
    expect_done({0x0f, 0x01, 0xcb});
    EXPECT_NE(cpu.rflags & rflags::alignment_check, 0U);
    expect_done({0x0f, 0x01, 0xca});
    EXPECT_EQ(cpu.rflags & rflags::alignment_check, 0U);
    EXPECT_EQ(fault({0xf0, 0x0f, 0x01, 0xcb}), ud()); // with LOCK
    user(3);
    EXPECT_EQ(fault({0x0f, 0x01, 0xcb}), ud());
    EXPECT_EQ(fault({0x0f, 0x01, 0xca}), ud());
}

// --- What SMAP lets the kernel's instructions do

class SupervisorAccessTest : public EmulatorTest {
  protected:
    SupervisorAccessTest() {
        environment.allowed |= cr4::smap;
        cpu.cr4 |= cr4::smap;
        reg(Gpr::rbx) = TestGuest::user_data;
        reg(Gpr::rcx) = 3;
    }
    void set_ac() { cpu.rflags |= rflags::alignment_check; }

    static inline const Fault read_fault = pf(PageFault::present);
    static inline const Fault write_fault = pf(PageFault::present | PageFault::write);
};

TEST_F(SupervisorAccessTest, ExplicitAccessesNeedAc) {
    const std::uint64_t idt = cpu.idtr.base.value();
    guest.put<std::uint16_t>(TestGuest::user_data, 0); // null, for the far pointer and the load of FS
    EXPECT_EQ(fault({0x66, 0x0f, 0x38, 0x82, 0x0b}), read_fault); // invpcid rcx, [rbx]
    EXPECT_EQ(fault({0x0f, 0x01, 0x1b}), read_fault);             // lidt [rbx]
    EXPECT_EQ(fault({0x8e, 0x23}), read_fault);                   // mov fs, [rbx]
    EXPECT_EQ(fault({0x0f, 0x01, 0x03}), write_fault);            // sgdt [rbx]
    EXPECT_EQ(fault({0x0f, 0x00, 0x03}), write_fault);            // sldt [rbx]
    reg(Gpr::rdx) = 0x3f8;
    reg(Gpr::rsi) = reg(Gpr::rdi) = TestGuest::user_data;
    EXPECT_EQ(fault({0x6e}), read_fault);  // outsb
    EXPECT_EQ(fault({0x6c}), write_fault); // insb
    EXPECT_TRUE(environment.reads.empty() && environment.writes.empty());
    reg(Gpr::rsp) = TestGuest::user_data;
    EXPECT_EQ(fault({0x48, 0xcf}), read_fault); // iretq, from a stack in user memory
    EXPECT_EQ(fault({0x0f, 0xa1}), read_fault); // pop fs
    EXPECT_EQ(cpu.idtr.base, GuestVirt(idt));

    set_ac();
    EXPECT_EQ(fault({0x66, 0x0f, 0x38, 0x82, 0x0b}), no_fault);
    EXPECT_EQ(fault({0x8e, 0x23}), no_fault);
    EXPECT_EQ(fault({0x0f, 0x01, 0x03}), no_fault);
    EXPECT_EQ(fault({0x0f, 0x00, 0x03}), no_fault);
    EXPECT_EQ(fault({0x6e}), no_fault);
    EXPECT_EQ(fault({0x6c}), no_fault);
    guest.put<std::uint64_t>(TestGuest::user_data, 0);
    reg(Gpr::rsp) = TestGuest::user_data;
    EXPECT_EQ(fault({0x0f, 0xa1}), no_fault);
    EXPECT_EQ(fault({0x48, 0xcf}), gp()); // the null CS that it finds there
}

TEST_F(SupervisorAccessTest, ImplicitAccessesAreNotHelpedByAc) {
    for (const bool with_ac : {false, true}) {
        guest.enter_kernel();
        cpu.rflags = rflags::fixed | (with_ac ? rflags::alignment_check : 0);
        guest.map(TestGuest::gdt, TestGuest::all_rights);
        reg(Gpr::rax) = sel::user_data;
        EXPECT_EQ(fault({0x8e, 0xe0}), read_fault) << with_ac; // mov fs, eax
        guest.map(TestGuest::gdt, TestGuest::kernel_rights);
        EXPECT_EQ(fault({0x8e, 0xe0}), no_fault);
        // A program's: the port permission bitmap, and a descriptor.
        user();
        cpu.rflags |= with_ac ? rflags::alignment_check : 0;
        reg(Gpr::rdx) = 0x3f8;
        guest.map(TestGuest::tss, TestGuest::all_rights);
        EXPECT_EQ(fault({0xec}), read_fault) << with_ac;
        guest.map(TestGuest::tss, TestGuest::kernel_rights);
        EXPECT_EQ(fault({0xec}), gp());
        guest.map(TestGuest::gdt, TestGuest::all_rights);
        reg(Gpr::rax) = sel::user_data;
        EXPECT_EQ(fault({0x8e, 0xe0}), read_fault) << with_ac;
        guest.map(TestGuest::gdt, TestGuest::kernel_rights);
    }
}

TEST_F(SupervisorAccessTest, ProgramsAndFetchesAreNotConcerned) {
    guest.map(TestGuest::code, TestGuest::all_rights);
    EXPECT_EQ(fault({0xfa}), no_fault); // cli: SMEP is off
    user(3);
    reg(Gpr::rbx) = TestGuest::user_data;
    EXPECT_EQ(fault({0x0f, 0x01, 0x03}), no_fault); // sgdt [rbx]
}

TEST_F(SupervisorAccessTest, SystemCallTakesAcAwayAndReturnBringsItBack) {
    user();
    set_ac();
    cpu.star = std::uint64_t{sel::kernel_code} << 32;
    cpu.lstar = TestGuest::code;
    cpu.fmask = rflags::alignment_check;
    EXPECT_FALSE(emulate_syscall(cpu, GuestVirt(TestGuest::user_code + 2)).has_value());
    EXPECT_EQ(cpu.rflags & rflags::alignment_check, 0U);
    EXPECT_NE(reg(Gpr::r11) & rflags::alignment_check, 0U);
    cpu.star = std::uint64_t{sel::user_code_32} << 48;
    EXPECT_EQ(fault({0x48, 0x0f, 0x07}), no_fault);
    EXPECT_NE(cpu.rflags & rflags::alignment_check, 0U);
}

TEST_F(EmulatorTest, NotOffered) {
    for (const unsigned level : {0U, 3U}) {
        if (level == 3)
            user(3);
        EXPECT_EQ(fault({0x0f, 0x33}), gp());             // rdpmc, of no AMD CPU
        EXPECT_EQ(fault({0x0f, 0x01, 0xc8}), ud());       // monitor
        EXPECT_EQ(fault({0x0f, 0x01, 0xc9}), ud());       // mwait
        EXPECT_EQ(fault({0x0f, 0x34}), gp());             // sysenter, while its MSR is zero
        EXPECT_EQ(fault({0x0f, 0x35}), gp());             // sysexit
        EXPECT_EQ(fault({0x0f, 0xaa}), ud());             // rsm
        EXPECT_EQ(fault({0x0f, 0x01, 0xd8}), ud());       // vmrun
        EXPECT_EQ(fault({0x0f, 0xc7, 0x30}), ud());       // vmptrld
        EXPECT_EQ(fault({0xf3, 0x0f, 0xc7, 0x30}), ud()); // vmxon
    }
}

TEST_F(EmulatorTest, WhatDecidesAboutASingleStep) {
    EXPECT_EQ(result_of<Done>({0xfa}).step, SingleStep::flags_before); // cli
    reg(Gpr::rax) = sel::kernel_data;
    EXPECT_EQ(result_of<Done>({0x8e, 0xd0}).step, SingleStep::held);         // mov ss, ax
    EXPECT_EQ(result_of<Done>({0x8e, 0xd8}).step, SingleStep::flags_before); // mov ds, ax
    cpu.star = std::uint64_t{sel::user_code_32} << 48;
    reg(Gpr::rcx) = TestGuest::user_code;
    EXPECT_EQ(result_of<Done>({0x48, 0x0f, 0x07}).step, SingleStep::flags_after); // sysretq

    // Of a repeated output each element is a step.
    guest.enter_kernel();
    cpu.rflags |= rflags::trap;
    reg(Gpr::rdx) = 0x3f8;
    reg(Gpr::rsi) = TestGuest::data;
    reg(Gpr::rcx) = 3;
    (void)result_of<Done>({0xf3, 0x6e}); // rep outsb
    EXPECT_EQ(reg(Gpr::rcx), 2U);
    EXPECT_EQ(environment.writes.size(), 1U);
}

TEST_F(EmulatorTest, InterruptReturnLetsNmisIn) {
    cpu.nmi_blocked = true;
    frame({TestGuest::code, sel::kernel_code, rflags::fixed, TestGuest::kernel_stack, sel::kernel_data});
    EXPECT_EQ(fault({0x48, 0xcf}), no_fault); // iretq
    EXPECT_FALSE(cpu.nmi_blocked);
}

TEST_F(EmulatorTest, CountersAreTheMsrs) {
    environment.msrs[0xc001'0006] = 0x1122'3344'5566;
    reg(Gpr::rcx) = 2;
    expect_done({0x0f, 0x33}); // rdpmc
    EXPECT_EQ(reg(Gpr::rax), 0x3344'5566U);
    EXPECT_EQ(reg(Gpr::rdx), 0x1122U);
    user(3);
    EXPECT_EQ(fault({0x0f, 0x33}), gp());
    cpu.cr4 |= cr4::pce;
    EXPECT_EQ(fault({0x0f, 0x33}), no_fault);
    environment.msrs[0xc001'0008] = 0;
    reg(Gpr::rcx) = 4;
    EXPECT_EQ(fault({0x0f, 0x33}), gp());
}

TEST_F(EmulatorTest, Sysenter) {
    for (const unsigned level : {0U, 3U}) {
        if (level == 3)
            user(3);
        cpu.sysenter_cs = sel::kernel_code | 3; // the low bits do not count
        cpu.sysenter_eip = 0xffff'8000'0000'1000;
        cpu.sysenter_esp = 0xffff'8000'0000'2000;
        cpu.rflags |= rflags::interrupt;
        EXPECT_EQ(fault({0x0f, 0x34}), no_fault);
        EXPECT_EQ(cpu.cpl, 0);
        EXPECT_EQ(cpu.cs.selector, sel::kernel_code & ~3);
        EXPECT_EQ(cpu.ss.selector, (sel::kernel_code & ~3) + 8);
        EXPECT_TRUE(cpu.cs.long_mode);
        EXPECT_EQ(cpu.rip, cpu.sysenter_eip);
        EXPECT_EQ(reg(Gpr::rsp), cpu.sysenter_esp);
        EXPECT_FALSE(cpu.interrupts_enabled());
    }
}

/// AMD APM vol. 3, SYSENTER and SYSEXIT: not in long mode, at any level.
TEST_F(EmulatorTest, AmdHasNoSysenterInLongMode) {
    environment.is_amd = true;
    cpu.sysenter_cs = sel::kernel_code;
    for (const unsigned level : {0U, 3U}) {
        if (level == 3)
            user(3);
        for (const bool code_64 : {true, false}) {
            cpu.cs.long_mode = code_64;
            cpu.cs.default_32 = !code_64;
            EXPECT_EQ(fault({0x0f, 0x34}), ud()) << level << code_64;
            EXPECT_EQ(fault({0x0f, 0x35}), ud()) << level << code_64;
        }
    }
}

/// AMD APM vol. 3, SYSRET, and Intel SDM vol. 2B, where it is #UD there.
TEST_F(EmulatorTest, SysretOutside64BitCode) {
    cpu.cs.long_mode = false;
    cpu.cs.default_32 = true;
    cpu.star = std::uint64_t{sel::user_code_32} << 48;
    reg(Gpr::rcx) = 0x1234'0000'0000 | TestGuest::user_code;
    reg(Gpr::r11) = 0;
    EXPECT_EQ(fault({0x0f, 0x07}), ud());
    environment.is_amd = true;
    cpu.rflags = rflags::fixed | 1;
    EXPECT_EQ(fault({0x0f, 0x07}), no_fault);
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu.cs.selector, sel::user_code_32 | 3);
    EXPECT_FALSE(cpu.cs.long_mode);
    EXPECT_EQ(cpu.rip, TestGuest::user_code);
    EXPECT_EQ(cpu.rflags, rflags::fixed | rflags::interrupt | 1) << "not by R11";
}

TEST_F(EmulatorTest, Sysexit) {
    cpu.sysenter_cs = 0x10;
    reg(Gpr::rdx) = 0x1'0000'1000;
    reg(Gpr::rcx) = 0x1'0000'2000;
    const VirtualCpu before = cpu;
    EXPECT_EQ(fault({0x0f, 0x35}), no_fault); // to 32-bit code
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu.cs.selector, 0x23);
    EXPECT_EQ(cpu.ss.selector, 0x2b);
    EXPECT_FALSE(cpu.cs.long_mode);
    EXPECT_EQ(cpu.rip, 0x1000U);
    EXPECT_EQ(reg(Gpr::rsp), 0x2000U);
    cpu = before;
    EXPECT_EQ(fault({0x48, 0x0f, 0x35}), no_fault); // to 64-bit code
    EXPECT_EQ(cpu.cs.selector, 0x33);
    EXPECT_EQ(cpu.ss.selector, 0x3b);
    EXPECT_TRUE(cpu.cs.long_mode);
    EXPECT_EQ(cpu.rip, 0x1'0000'1000U);
    EXPECT_EQ(reg(Gpr::rsp), 0x1'0000'2000U);
    cpu = before;
    reg(Gpr::rdx) = std::uint64_t{1} << 63; // not canonical
    EXPECT_EQ(fault({0x48, 0x0f, 0x35}), gp());
    EXPECT_EQ(cpu.cpl, 0);
    user(3);
    EXPECT_EQ(fault({0x0f, 0x35}), gp());
}

// --- Whatever the guest does

TEST_F(EmulatorTest, AnyBytesAtAnyState) {
    std::mt19937_64 random(1); // the same bytes in every run
    constexpr std::array<std::uint8_t, 16> likely{0x0f, 0x01, 0x00, 0x48, 0x66, 0x67, 0xcf, 0xcb,
                                                  0xff, 0x8e, 0x22, 0x07, 0xf3, 0x6c, 0x6f, 0x64};
    for (unsigned round = 0; round < 50'000; ++round) {
        const std::uint64_t choice = random();
        if (choice % 3 == 0)
            guest.enter_kernel();
        else
            guest.enter_user(choice % 3 == 1);
        for (std::uint64_t i = 0; i < 15; ++i) {
            const std::uint64_t byte = random();
            guest.put(cpu.rip + i,
                      (byte & 0x100) != 0 ? likely[byte % likely.size()] : static_cast<std::uint8_t>(byte));
        }
        for (auto& value : cpu.gpr)
            value = random() >> (random() % 64);
        cpu.efer |= efer::lma;
        start = cpu.rip;
        const std::uint8_t level = cpu.cpl;
        const Emulation result = emulate(cpu, guest.space(), environment);
        environment.changes.clear();
        environment.reads.clear();
        environment.writes.clear();
        if (std::holds_alternative<Raised>(result) || std::holds_alternative<Unsupported>(result) ||
            std::holds_alternative<NotSensitive>(result)) {
            ASSERT_EQ(cpu.rip, start);
            ASSERT_EQ(cpu.cpl, level);
        }
        ASSERT_TRUE(cpu.cpl <= 3 && (cpu.cs.long_mode || cpu.cpl == 3));
        // What would only make all later rounds alike.
        cpu.cr3 = 0x1000;
        cpu.cr0 |= cr0::wp;
        cpu.cr4 = cr4::pae | cr4::pge;
        cpu.gdtr = {GuestVirt(TestGuest::gdt), TestGuest::gdt_limit};
    }
}

// --- Disassembler

TEST(DisassemblerTest, OneLine) {
    const auto text = [](std::initializer_list<unsigned> bytes, bool mode64 = true) {
        std::vector<std::byte> code;
        for (const unsigned byte : bytes)
            code.push_back(static_cast<std::byte>(byte));
        return disassemble(code, GuestVirt(0x1000), mode64);
    };
    EXPECT_EQ(text({0x0f, 0x22, 0xd8, 0x90}), "mov cr3, rax");
    EXPECT_EQ(text({0xeb, 0xfe}), "jmp 0x0000000000001000");
    EXPECT_EQ(text({0x40}, false), "inc eax");
    EXPECT_EQ(text({0x06}), "(bad)");
    EXPECT_EQ(text({0x0f}), "(no code)");
    EXPECT_EQ(text({}), "(no code)");
}

} // namespace
} // namespace umbra
