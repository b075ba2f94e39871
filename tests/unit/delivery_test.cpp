// Unit tests of vmm/delivery: gates, stacks, frames, error codes, and faults on the way.
#include "vmm/delivery.hpp"

#include "tests/unit/test_guest.hpp"

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace test;

constexpr std::uint8_t interrupt_gate = 0x8e, trap_gate = 0x8f, user_gate = 0x60;
constexpr std::uint64_t flags = rflags::fixed | rflags::interrupt | 1; // and CF

class DeliveryTest : public ::testing::Test {
  protected:
    DeliveryTest() {
        for (unsigned vector = 0; vector < 256; ++vector)
            gate(static_cast<std::uint8_t>(vector), interrupt_gate);
        cpu.rflags = flags;
    }

    static std::uint64_t handler(std::uint8_t vector) {
        return 0xffff'8000'0000'0000 + TestGuest::handlers + std::uint64_t{vector} * 16;
    }
    void gate(std::uint8_t vector, std::uint8_t access, std::uint16_t selector = sel::kernel_code,
              unsigned ist = 0) {
        const std::uint64_t offset = handler(vector);
        const std::uint64_t low = (offset & 0xffff) | std::uint64_t{selector} << 16 |
                                  std::uint64_t{ist} << 32 | std::uint64_t{access} << 40 |
                                  (offset >> 16 & 0xffff) << 48;
        guest.put(TestGuest::idt + std::uint64_t{vector} * 16, std::array{low, offset >> 32});
    }
    Delivery send(const Event& event) { return deliver(cpu, guest.space(), event); }

    /// Delivers, and says by which vector's handler and with which error code on its stack (-2: not
    /// delivered).
    Fault arrives(const Event& event, bool with_code = true) {
        last = send(event);
        if (last.outcome != Delivery::delivered)
            return no_fault;
        const auto vector = static_cast<Vector>((cpu.rip - handler(0)) / 16);
        return {vector, with_code ? std::int64_t{guest.get<std::uint32_t>(cpu[Gpr::rsp])} : -1};
    }
    std::uint64_t pushed(unsigned index) const {
        return guest.get<std::uint64_t>(cpu[Gpr::rsp] + std::uint64_t{index} * 8);
    }

    TestGuest guest;
    VirtualCpu& cpu = guest.cpu;
    Delivery last;
};

constexpr std::uint32_t idt_code(unsigned vector, unsigned ext) {
    return vector * 8 + 2 + ext;
}
constexpr Exception divide{Vector::divide_error, std::nullopt, {}};

TEST_F(DeliveryTest, FaultFromUser) {
    guest.enter_user();
    cpu.rflags = flags | rflags::trap | rflags::nested_task;
    cpu.halted = true;
    const Delivery delivery = send(Event::of(Exception::general_protection(0x1234)));
    ASSERT_EQ(delivery.outcome, Delivery::delivered);
    EXPECT_TRUE(delivery.nested().empty());
    EXPECT_EQ(cpu.rip, handler(13));
    EXPECT_EQ(cpu.cpl, 0);
    EXPECT_EQ(cpu.cs.selector, sel::kernel_code);
    EXPECT_TRUE(cpu.cs.long_mode);
    EXPECT_EQ(cpu.ss.selector, 0);
    EXPECT_FALSE(cpu.ss.present);
    EXPECT_EQ(cpu.rflags, rflags::fixed | 1);
    EXPECT_FALSE(cpu.halted);
    ASSERT_EQ(cpu[Gpr::rsp], TestGuest::kernel_stack - 48);
    EXPECT_EQ(pushed(0), 0x1234U);
    EXPECT_EQ(pushed(1), TestGuest::user_code);
    EXPECT_EQ(pushed(2), sel::user_code);
    EXPECT_EQ(pushed(3), flags | rflags::trap | rflags::nested_task | rflags::resume);
    EXPECT_EQ(pushed(4), TestGuest::user_stack);
    EXPECT_EQ(pushed(5), sel::user_data);
    EXPECT_EQ(guest.access_of(sel::kernel_code), 0x9b); // marked accessed
}

TEST_F(DeliveryTest, InterruptAtTheSameLevelAlignsTheStack) {
    cpu[Gpr::rsp] = TestGuest::kernel_stack - 0x105;
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.rip, handler(0x20));
    ASSERT_EQ(cpu[Gpr::rsp], TestGuest::kernel_stack - 0x110 - 40);
    EXPECT_EQ(pushed(0), TestGuest::code);
    EXPECT_EQ(pushed(1), sel::kernel_code);
    EXPECT_EQ(pushed(2), flags); // no RF for an interrupt
    EXPECT_EQ(pushed(3), TestGuest::kernel_stack - 0x105);
    EXPECT_EQ(pushed(4), sel::kernel_data);
    EXPECT_EQ(cpu.ss.selector, sel::kernel_data);
    EXPECT_FALSE(cpu.interrupts_enabled());
}

TEST_F(DeliveryTest, OnlyNmisBlockNmis) {
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_FALSE(guest.cpu.nmi_blocked);
    ASSERT_EQ(send(Event::nmi()).outcome, Delivery::delivered);
    EXPECT_TRUE(guest.cpu.nmi_blocked);
}

TEST_F(DeliveryTest, TrapGateLeavesInterruptsOn) {
    gate(0x20, trap_gate);
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_TRUE(cpu.interrupts_enabled());
}

TEST_F(DeliveryTest, ResumeFlagIsSavedForFaultsOnly) {
    const auto saved = [this](const Event& event, unsigned index) {
        guest.enter_kernel();
        cpu.rflags = flags;
        EXPECT_EQ(send(event).outcome, Delivery::delivered);
        EXPECT_EQ(cpu.rflags & rflags::resume, 0U);
        return pushed(index) & rflags::resume;
    };
    EXPECT_NE(saved(Event::of(divide), 2), 0U);
    EXPECT_NE(saved(Event::of(Exception::invalid_opcode()), 2), 0U);
    EXPECT_NE(saved(Event::of({Vector::page_fault, 0, {}}), 3), 0U);
    EXPECT_NE(saved(Event::of({Vector::simd, std::nullopt, {}}), 2), 0U);
    EXPECT_EQ(saved(Event::of({Vector::debug, std::nullopt, {}}), 2), 0U);
    EXPECT_EQ(saved(Event::of({Vector::machine_check, std::nullopt, {}}), 2), 0U);
    EXPECT_EQ(saved(Event::external(13), 2), 0U);
    EXPECT_EQ(saved(Event::software(13, 2), 2), 0U);
}

TEST_F(DeliveryTest, PageFaultSetsCr2) {
    const Exception fault{Vector::page_fault, 7, GuestVirt(0xdead'b000)};
    EXPECT_EQ(arrives(Event::of(fault)), pf(7));
    EXPECT_EQ(cpu.cr2, 0xdead'b000U);
}

TEST_F(DeliveryTest, InterruptOnVector14IsNoPageFault) {
    cpu.cr2 = 5;
    ASSERT_EQ(send(Event::external(14)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.cr2, 5U);
    EXPECT_EQ(pushed(0), TestGuest::code); // and no error code
}

TEST_F(DeliveryTest, DebugExceptionClearsGeneralDetect) {
    cpu.dr7 |= 1U << 13;
    ASSERT_EQ(send(Event::external(1)).outcome, Delivery::delivered);
    EXPECT_NE(cpu.dr7 & 1U << 13, 0U);
    ASSERT_EQ(send(Event::of({Vector::debug, std::nullopt, {}})).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.dr7 & 1U << 13, 0U);
}

TEST_F(DeliveryTest, InterruptStackTable) {
    gate(0x20, interrupt_gate, sel::kernel_code, 1);
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu[Gpr::rsp], TestGuest::interrupt_stack - 40);
    EXPECT_EQ(pushed(3), TestGuest::kernel_stack);
    EXPECT_EQ(cpu.ss.selector, sel::kernel_data); // the level did not change

    guest.enter_user();
    gate(0x20, interrupt_gate, sel::kernel_code, 7);
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu[Gpr::rsp], TestGuest::interrupt_stack - 16 - 40); // IST7 was not aligned
    EXPECT_EQ(cpu.ss.selector, 0);
    EXPECT_EQ(pushed(4), sel::user_data);
}

TEST_F(DeliveryTest, ConformingHandlerRunsAtTheInterruptedLevel) {
    guest.enter_user();
    gate(0x20, interrupt_gate, sel::conforming_code);
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu.cs.selector, sel::conforming_code | 3);
    EXPECT_EQ(cpu[Gpr::rsp], TestGuest::user_stack - 40);
    EXPECT_EQ(cpu.ss.selector, sel::user_data);
}

TEST_F(DeliveryTest, FromCompatibilityMode) {
    guest.enter_user(false);
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(pushed(1), sel::user_code_32);
    EXPECT_TRUE(cpu.cs.long_mode);
}

TEST_F(DeliveryTest, GateBeyondTheTable) {
    cpu.idtr.limit = 0x20 * 16 + 14;
    EXPECT_EQ(arrives(Event::external(0x20)), gp(idt_code(0x20, 1)));
    cpu.idtr.limit = 0x20 * 16 + 15;
    EXPECT_EQ(send(Event::external(0x20)).nested().size(), 0U);
}

TEST_F(DeliveryTest, GateTypes) {
    for (unsigned type = 0; type < 32; ++type) {
        guest.enter_kernel();
        gate(0x20, static_cast<std::uint8_t>(0x80 | type));
        const bool valid = type == 0xe || type == 0xf;
        EXPECT_EQ(send(Event::external(0x20)).nested().empty(), valid) << type;
        if (!valid) {
            EXPECT_EQ(pushed(0), idt_code(0x20, 1));
        }
    }
}

TEST_F(DeliveryTest, GatePrivilegeIsForSoftwareOnly) {
    guest.enter_user();
    EXPECT_EQ(arrives(Event::external(0x80), false), (Fault{static_cast<Vector>(0x80), -1}));

    guest.enter_user();
    cpu.rip = TestGuest::user_code + 2;
    EXPECT_EQ(arrives(Event::software(0x80, 2)), gp(idt_code(0x80, 0)));
    EXPECT_EQ(pushed(1), TestGuest::user_code); // a fault of the INT: back at it

    guest.enter_user();
    gate(0x80, interrupt_gate | user_gate);
    cpu.rip = TestGuest::user_code + 2;
    EXPECT_EQ(arrives(Event::software(0x80, 2), false), (Fault{static_cast<Vector>(0x80), -1}));
    EXPECT_EQ(pushed(0), TestGuest::user_code + 2);

    guest.enter_user();
    Event breakpoint = Event::software(3, 1);
    breakpoint.kind = EventKind::software_exception;
    EXPECT_EQ(arrives(breakpoint), gp(idt_code(3, 0)));
}

TEST_F(DeliveryTest, GateNotPresent) {
    gate(0x20, interrupt_gate & ~0x80);
    EXPECT_EQ(arrives(Event::external(0x20)), np(idt_code(0x20, 1)));
    EXPECT_EQ(arrives(Event::software(0x20, 2)), np(idt_code(0x20, 0)));
}

TEST_F(DeliveryTest, HandlerCodeSegmentChecks) {
    const auto with = [this](std::uint16_t selector) {
        guest.enter_kernel();
        gate(0x20, interrupt_gate, selector);
        return arrives(Event::external(0x20));
    };
    EXPECT_EQ(with(0), gp(1));
    EXPECT_EQ(with(sel::beyond), gp(sel::beyond + 1));
    EXPECT_EQ(with(sel::kernel_data), gp(sel::kernel_data + 1));
    EXPECT_EQ(with(sel::tss), gp(sel::tss + 1));
    EXPECT_EQ(with(sel::user_code), gp((sel::user_code & ~3) + 1)); // DPL > CPL
    EXPECT_EQ(with(sel::absent_code), np(sel::absent_code + 1));
    EXPECT_EQ(with(sel::kernel_code_32), gp(sel::kernel_code_32 + 1));
    EXPECT_EQ(with(sel::long_and_default_code), gp(sel::long_and_default_code + 1));
}

TEST_F(DeliveryTest, NonCanonicalHandler) {
    gate(0x20, interrupt_gate);
    guest.put<std::uint64_t>(TestGuest::idt + 0x208, 0x8000);
    EXPECT_EQ(arrives(Event::external(0x20)), gp(1));
}

TEST_F(DeliveryTest, StackOutsideTheTss) {
    guest.enter_user();
    gate(10, interrupt_gate, sel::conforming_code); // so that #TS itself needs no stack switch
    cpu.tr.limit = 4 + 6;
    EXPECT_EQ(arrives(Event::external(0x20)), ts(sel::tss + 1));
    guest.enter_kernel();
    gate(0x20, interrupt_gate, sel::kernel_code, 2);
    cpu.tr.limit = 36 + 8 + 6;
    EXPECT_EQ(arrives(Event::external(0x20)), ts(sel::tss + 1));
    cpu.tr.limit = TestGuest::tss_limit;
    cpu.tr.present = false;
    EXPECT_EQ(arrives(Event::external(0x20)), ts(sel::tss + 1));
}

TEST_F(DeliveryTest, NonCanonicalStack) {
    guest.put<std::uint64_t>(TestGuest::tss + 44, TestGuest::non_canonical + 0x1000);
    gate(0x20, interrupt_gate, sel::kernel_code, 2);
    EXPECT_EQ(arrives(Event::external(0x20)), ss(1));
    EXPECT_EQ(arrives(Event::software(0x20, 2)), ss(0));
    // The stack pointer is canonical (it is where the stack would grow up from), the frame is not.
    guest.put<std::uint64_t>(TestGuest::tss + 44, 0xffff'8000'0000'0000);
    EXPECT_EQ(arrives(Event::external(0x20)), ss(1));
}

TEST_F(DeliveryTest, PushesAreSupervisorWrites) {
    guest.enter_user();
    EXPECT_EQ(arrives(Event::of(Exception::general_protection())), gp(0)); // to a kernel page
    guest.enter_user();
    guest.map(TestGuest::interrupt_stack - 0x1000, entry_bit::present);
    gate(13, interrupt_gate, sel::kernel_code, 1);
    EXPECT_EQ(arrives(Event::of(Exception::general_protection())), pf(PageFault::present | PageFault::write));
    EXPECT_EQ(cpu.cr2, TestGuest::interrupt_stack - 8); // the first push
}

TEST_F(DeliveryTest, FrameAcrossTwoPagesFaultsAtTheUpperOneFirst) {
    gate(14, interrupt_gate, sel::kernel_code, 1);
    cpu[Gpr::rsp] = TestGuest::kernel_stack - 0x1000 + 16;
    guest.map(TestGuest::kernel_stack - 0x1000, 0);
    guest.map(TestGuest::kernel_stack - 0x2000, 0);
    EXPECT_EQ(arrives(Event::external(0x20)), pf(PageFault::write));
    EXPECT_EQ(cpu.cr2, TestGuest::kernel_stack - 0x1000 + 8);

    guest.map(TestGuest::kernel_stack - 0x1000, TestGuest::kernel_rights);
    guest.map(TestGuest::kernel_stack - 0x2000, TestGuest::kernel_rights);
    cpu[Gpr::rsp] = TestGuest::kernel_stack - 0x1000 + 16;
    ASSERT_EQ(send(Event::external(0x20)).nested().size(), 0U);
    EXPECT_EQ(pushed(4), sel::kernel_data);
    EXPECT_EQ(pushed(0), handler(14));
}

TEST_F(DeliveryTest, UnreadableTables) {
    gate(14, interrupt_gate, sel::kernel_code);
    cpu.idtr.base = GuestVirt(TestGuest::non_canonical);
    EXPECT_EQ(send(Event::external(0x20)).outcome, Delivery::triple_fault);
    cpu.idtr.base = GuestVirt(TestGuest::idt);
    guest.map(TestGuest::tss, 0);
    guest.enter_user();
    gate(14, interrupt_gate, sel::conforming_code);
    EXPECT_EQ(arrives(Event::external(0x20)), pf(0));
    EXPECT_EQ(cpu.cr2, TestGuest::tss + 4);
}

TEST_F(DeliveryTest, BenignThenFaultIsSerial) {
    gate(6, 0);
    EXPECT_EQ(arrives(Event::of(Exception::invalid_opcode())), gp(idt_code(6, 1)));
    ASSERT_EQ(last.nested().size(), 1U);
    EXPECT_EQ(fault_of(last.nested()[0]), gp(idt_code(6, 1)));
    EXPECT_EQ(pushed(1), TestGuest::code);
}

TEST_F(DeliveryTest, ContributoryThenPageFaultIsSerial) {
    guest.map(TestGuest::interrupt_stack - 0x1000, 0);
    gate(0, interrupt_gate, sel::kernel_code, 1);
    EXPECT_EQ(arrives(Event::of(divide)), pf(PageFault::write));
}

TEST_F(DeliveryTest, DoubleFaults) {
    const Fault df{Vector::double_fault, 0};
    gate(0, 0);
    EXPECT_EQ(arrives(Event::of(divide)), df); // contributory, contributory
    EXPECT_EQ(last.nested().size(), 1U);
    gate(14, 0);
    EXPECT_EQ(arrives(Event::of({Vector::page_fault, 2, {}})), df); // page fault, contributory
    guest.map(TestGuest::interrupt_stack - 0x1000, 0);
    gate(14, interrupt_gate, sel::kernel_code, 1);
    EXPECT_EQ(arrives(Event::of({Vector::page_fault, 2, GuestVirt(1)})), df); // page fault, page fault
    EXPECT_EQ(cpu.cr2, TestGuest::interrupt_stack - 8);                       // the first push
    gate(13, 0);
    EXPECT_EQ(arrives(Event::software(0, 2)), df); // benign, contributory, contributory
    EXPECT_EQ(last.nested().size(), 2U);
}

TEST_F(DeliveryTest, TripleFaultLeavesTheState) {
    cpu.idtr.limit = 0;
    guest.enter_user();
    const Delivery delivery = send(Event::of(Exception::general_protection()));
    EXPECT_EQ(delivery.outcome, Delivery::triple_fault);
    ASSERT_EQ(delivery.nested().size(), 2U);
    EXPECT_EQ(fault_of(delivery.nested()[0]), gp(idt_code(13, 1)));
    EXPECT_EQ(fault_of(delivery.nested()[1]), gp(idt_code(8, 1)));
    EXPECT_EQ(cpu.rip, TestGuest::user_code);
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu[Gpr::rsp], TestGuest::user_stack);
}

TEST_F(DeliveryTest, LongestChain) {
    // INT n, then #GP, then #PF, then #PF again makes #DF, and its gate is missing.
    guest.map(TestGuest::interrupt_stack - 0x1000, 0);
    gate(0x80, 0);
    gate(13, interrupt_gate, sel::kernel_code, 1);
    gate(14, interrupt_gate, sel::kernel_code, 1);
    gate(8, 0);
    const Delivery delivery = send(Event::software(0x80, 2));
    EXPECT_EQ(delivery.outcome, Delivery::triple_fault);
    ASSERT_EQ(delivery.nested().size(), 4U);
    EXPECT_EQ(fault_of(delivery.nested()[3]), gp(idt_code(8, 1)));
}

TEST_F(DeliveryTest, OutsideLongModeIsUnsupported) {
    cpu.efer = 0;
    EXPECT_EQ(send(Event::external(0x20)).outcome, Delivery::unsupported);
    EXPECT_EQ(cpu.rip, TestGuest::code);
}

} // namespace
} // namespace umbra
