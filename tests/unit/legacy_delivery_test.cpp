// Unit tests of vmm/delivery in legacy protected mode: gates, privilege, stacks, frames, error codes, and
// faults on the way.
#include "vmm/delivery.hpp"

#include "tests/unit/legacy_guest.hpp"

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace test;

constexpr std::uint8_t interrupt_gate = 0x8e, trap_gate = 0x8f, interrupt_gate_16 = 0x86, trap_gate_16 = 0x87,
                       task_gate = 0x85, user_gate = 0x60, present = 0x80;
constexpr std::uint64_t flags = rflags::fixed | rflags::interrupt | 1; // and CF
constexpr Exception divide{Vector::divide_error, std::nullopt, {}};

constexpr std::uint32_t idt_code(unsigned vector, unsigned ext) {
    return vector * 8 + 2 + ext;
}

class LegacyDeliveryTest : public ::testing::Test {
  protected:
    LegacyDeliveryTest() {
        for (unsigned vector = 0; vector < 256; ++vector)
            gate(static_cast<std::uint8_t>(vector), interrupt_gate);
        cpu.rflags = flags;
    }

    static std::uint32_t handler(std::uint8_t vector) {
        return static_cast<std::uint32_t>(TestGuest::handlers) + vector * 16U;
    }
    void gate(std::uint8_t vector, std::uint8_t access, std::uint16_t selector = sel::kernel_code_32,
              std::optional<std::uint32_t> offset = std::nullopt) {
        const std::uint64_t target = offset.value_or(handler(vector));
        guest.put(TestGuest::idt + std::uint64_t{vector} * 8,
                  (target & 0xffff) | std::uint64_t{selector} << 16 | std::uint64_t{access} << 40 |
                      (target >> 16) << 48);
    }
    Delivery send(const Event& event) { return deliver(cpu, guest.space(), event); }
    /// Delivers, and says by which vector's handler and with which error code on its stack (-2: not
    /// delivered).
    Fault arrives(const Event& event, bool with_code = true) {
        last = send(event);
        if (last.outcome != Delivery::delivered)
            return no_fault;
        const auto vector = static_cast<Vector>((cpu.rip - handler(0)) / 16);
        return {vector, with_code ? std::int64_t{guest.get<std::uint32_t>(cpu.ss.base + cpu[Gpr::rsp])} : -1};
    }
    std::uint32_t pushed(unsigned index) const {
        return guest.get<std::uint32_t>(cpu.ss.base + cpu[Gpr::rsp] + std::uint64_t{index} * 4);
    }
    std::uint16_t pushed_16(unsigned index) const {
        return guest.get<std::uint16_t>(cpu.ss.base + cpu[Gpr::rsp] + std::uint64_t{index} * 2);
    }
    void set_stack(std::uint16_t selector, std::uint32_t pointer) {
        guest.put(TestGuest::tss + 4, pointer);
        guest.put(TestGuest::tss + 8, selector);
    }

    LegacyGuest guest;
    VirtualCpu& cpu = guest.cpu;
    Delivery last;
};

// --- Frames

TEST_F(LegacyDeliveryTest, FaultFromUser) {
    guest.enter_user();
    cpu.rflags = flags | rflags::trap | rflags::nested_task;
    cpu.halted = true;
    const Delivery delivery = send(Event::of(Exception::general_protection(0x1234)));
    ASSERT_EQ(delivery.outcome, Delivery::delivered);
    EXPECT_TRUE(delivery.nested().empty());
    EXPECT_EQ(cpu.rip, handler(13));
    EXPECT_EQ(cpu.cpl, 0);
    EXPECT_EQ(cpu.cs.selector, sel::kernel_code_32);
    EXPECT_TRUE(cpu.cs.default_32);
    EXPECT_FALSE(cpu.cs.long_mode);
    EXPECT_EQ(cpu.ss.selector, sel::kernel_data);
    EXPECT_TRUE(cpu.ss.present);
    EXPECT_EQ(cpu.ss.dpl, 0);
    EXPECT_EQ(cpu.rflags, rflags::fixed | 1);
    EXPECT_FALSE(cpu.halted);
    ASSERT_EQ(cpu[Gpr::rsp], TestGuest::kernel_stack - 24);
    EXPECT_EQ(pushed(0), 0x1234U);
    EXPECT_EQ(pushed(1), TestGuest::user_code);
    EXPECT_EQ(pushed(2), sel::user_code_32);
    EXPECT_EQ(pushed(3), flags | rflags::trap | rflags::nested_task | rflags::resume);
    EXPECT_EQ(pushed(4), TestGuest::user_stack);
    EXPECT_EQ(pushed(5), sel::user_data);
    EXPECT_EQ(guest.access_of(sel::kernel_code_32), 0x9b); // both marked accessed
    EXPECT_EQ(guest.access_of(sel::kernel_data), 0x93);
}

TEST_F(LegacyDeliveryTest, InterruptAtTheSameLevelKeepsTheStack) {
    cpu[Gpr::rsp] =
        0xdead'beef'0000'0000 | (TestGuest::kernel_stack - 0x105); // no register has an upper half
    guest.put(TestGuest::kernel_stack - 0x105, std::uint32_t{0x5555'5555});
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.rip, handler(0x20));
    ASSERT_EQ(cpu[Gpr::rsp], TestGuest::kernel_stack - 0x105 - 12); // not aligned
    EXPECT_EQ(pushed(0), TestGuest::code);
    EXPECT_EQ(pushed(1), sel::kernel_code_32);
    EXPECT_EQ(pushed(2), flags); // no RF for an interrupt
    EXPECT_EQ(pushed(3), 0x5555'5555U);
    EXPECT_EQ(cpu.ss.selector, sel::kernel_data);
    EXPECT_FALSE(cpu.interrupts_enabled());
}

TEST_F(LegacyDeliveryTest, TrapGatesLeaveInterruptsOn) {
    gate(0x20, trap_gate);
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_TRUE(cpu.interrupts_enabled());
    gate(0x20, trap_gate_16, sel::code_16, 0x4000);
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_TRUE(cpu.interrupts_enabled());
}

TEST_F(LegacyDeliveryTest, SixteenBitGate) {
    gate(13, interrupt_gate_16, sel::code_16, 0xdead'4000); // the upper half of the offset does not count
    cpu.rip = 0x1'2345;
    ASSERT_EQ(send(Event::of(Exception::general_protection(0x28))).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.rip, 0x4000U);
    EXPECT_FALSE(cpu.cs.default_32);
    EXPECT_FALSE(cpu.interrupts_enabled());
    ASSERT_EQ(cpu[Gpr::rsp], TestGuest::kernel_stack - 8);
    EXPECT_EQ(pushed_16(0), 0x28);
    EXPECT_EQ(pushed_16(1), 0x2345);
    EXPECT_EQ(pushed_16(2), sel::kernel_code_32);
    EXPECT_EQ(pushed_16(3), flags);

    guest.enter_user();
    ASSERT_EQ(send(Event::of(Exception::general_protection(0x30))).outcome, Delivery::delivered);
    ASSERT_EQ(cpu[Gpr::rsp], TestGuest::kernel_stack - 12);
    EXPECT_EQ(pushed_16(0), 0x30);
    EXPECT_EQ(pushed_16(4), TestGuest::user_stack & 0xffff);
    EXPECT_EQ(pushed_16(5), sel::user_data);
}

TEST_F(LegacyDeliveryTest, SixteenBitTss) {
    guest.use_16_bit_tss(sel::kernel_data, 0x8000);
    guest.enter_user();
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.ss.selector, sel::kernel_data);
    ASSERT_EQ(cpu[Gpr::rsp], 0x8000U - 20);
    EXPECT_EQ(pushed(0), TestGuest::user_code);
    EXPECT_EQ(pushed(4), sel::user_data);
}

TEST_F(LegacyDeliveryTest, HandlerAtLevel1) {
    gate(0x20, interrupt_gate, sel::level_1_code);
    guest.enter_user();
    const Segment tss = cpu.tr;
    guest.use_16_bit_tss(sel::kernel_data, 0x8000);
    guest.put<std::uint16_t>(TestGuest::tss + 6, 0x7000); // SP1 and SS1
    guest.put<std::uint16_t>(TestGuest::tss + 8, sel::level_1_data);
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.ss.selector, sel::level_1_data);
    EXPECT_EQ(cpu[Gpr::rsp], 0x7000U - 20);
    cpu.tr = tss;
    guest.enter_user();
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.cpl, 1);
    EXPECT_EQ(cpu.cs.selector, sel::level_1_code);
    EXPECT_EQ(cpu.ss.selector, sel::level_1_data);
    EXPECT_EQ(cpu[Gpr::rsp], TestGuest::interrupt_stack - 20);
}

TEST_F(LegacyDeliveryTest, ConformingHandlerRunsAtTheInterruptedLevel) {
    guest.enter_user();
    gate(0x20, interrupt_gate, sel::conforming_code_32);
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu.cs.selector, sel::conforming_code_32 | 3);
    EXPECT_EQ(cpu[Gpr::rsp], TestGuest::user_stack - 12);
    EXPECT_EQ(cpu.ss.selector, sel::user_data);
}

TEST_F(LegacyDeliveryTest, ResumeFlagIsSavedForFaultsOnly) {
    const auto saved = [this](const Event& event, unsigned index) {
        guest.enter_kernel();
        cpu.rflags = flags;
        EXPECT_EQ(send(event).outcome, Delivery::delivered);
        EXPECT_EQ(cpu.rflags & rflags::resume, 0U);
        return pushed(index) & rflags::resume;
    };
    EXPECT_NE(saved(Event::of(divide), 2), 0U);
    EXPECT_NE(saved(Event::of({Vector::page_fault, 0, {}}), 3), 0U);
    EXPECT_EQ(saved(Event::of({Vector::debug, std::nullopt, {}}), 2), 0U);
    EXPECT_EQ(saved(Event::external(13), 2), 0U);
    EXPECT_EQ(saved(Event::software(13, 2), 2), 0U);
}

TEST_F(LegacyDeliveryTest, DebugExceptionClearsGeneralDetect) {
    cpu.dr7 |= 1U << 13;
    ASSERT_EQ(send(Event::external(1)).outcome, Delivery::delivered);
    EXPECT_NE(cpu.dr7 & 1U << 13, 0U);
    ASSERT_EQ(send(Event::of({Vector::debug, std::nullopt, {}})).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.dr7 & 1U << 13, 0U);
}

TEST_F(LegacyDeliveryTest, LongBitOfTheCodeSegmentIsIgnored) {
    gate(0x20, interrupt_gate, sel::kernel_code); // L set, D clear
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_TRUE(last.nested().empty());
    EXPECT_FALSE(cpu.cs.long_mode);
    EXPECT_FALSE(cpu.cs.default_32);
}

// --- Gates

TEST_F(LegacyDeliveryTest, GateBeyondTheTable) {
    cpu.idtr.limit = 0x20 * 8 + 6;
    EXPECT_EQ(arrives(Event::external(0x20)), gp(idt_code(0x20, 1)));
    cpu.idtr.limit = 0x20 * 8 + 7;
    EXPECT_EQ(send(Event::external(0x20)).nested().size(), 0U);
}

TEST_F(LegacyDeliveryTest, TableBaseHas32Bits) {
    cpu.idtr.base = GuestVirt(0xffff'ffff'0000'0000 | TestGuest::idt);
    EXPECT_EQ(arrives(Event::external(0x20), false), (Fault{static_cast<Vector>(0x20), -1}));
}

TEST_F(LegacyDeliveryTest, GateTypes) {
    for (unsigned type = 0; type < 32; ++type) {
        guest.enter_kernel();
        gate(0x20, static_cast<std::uint8_t>(present | type), sel::kernel_code_32, 0x9000);
        const Delivery delivery = send(Event::external(0x20));
        if (type == 5) {
            EXPECT_EQ(delivery.outcome, Delivery::unsupported);
            continue;
        }
        ASSERT_EQ(delivery.outcome, Delivery::delivered);
        const bool valid = type == 6 || type == 7 || type == 0xe || type == 0xf;
        EXPECT_EQ(delivery.nested().empty(), valid) << type;
        if (!valid) {
            EXPECT_EQ(pushed(0), idt_code(0x20, 1));
        }
    }
}

TEST_F(LegacyDeliveryTest, TaskGate) {
    gate(8, task_gate, sel::tss);
    const Delivery delivery = send(Event::of({Vector::double_fault, 0, {}}));
    EXPECT_EQ(delivery.outcome, Delivery::unsupported);
    EXPECT_NE(delivery.what.find("task gate"), std::string_view::npos);
    EXPECT_EQ(cpu.rip, TestGuest::code);
    EXPECT_EQ(cpu[Gpr::rsp], TestGuest::kernel_stack);
    EXPECT_EQ(cpu.rflags, flags);
    // Its own checks come first.
    guest.enter_user();
    EXPECT_EQ(arrives(Event::software(8, 2)), gp(idt_code(8, 0)));
    gate(8, task_gate - present, sel::tss);
    guest.enter_kernel();
    EXPECT_EQ(arrives(Event::external(8)), np(idt_code(8, 1)));
}

TEST_F(LegacyDeliveryTest, TaskGateForAFaultOnTheWay) {
    gate(0x20, 0);
    gate(13, task_gate, sel::tss);
    const Delivery delivery = send(Event::external(0x20));
    EXPECT_EQ(delivery.outcome, Delivery::unsupported);
    ASSERT_EQ(delivery.nested().size(), 1U);
    EXPECT_EQ(fault_of(delivery.nested()[0]), gp(idt_code(0x20, 1)));
}

TEST_F(LegacyDeliveryTest, GatePrivilegeIsForSoftwareOnly) {
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

TEST_F(LegacyDeliveryTest, GateNotPresent) {
    gate(0x20, interrupt_gate - present);
    EXPECT_EQ(arrives(Event::external(0x20)), np(idt_code(0x20, 1)));
    EXPECT_EQ(arrives(Event::software(0x20, 2)), np(idt_code(0x20, 0)));
}

// --- The handler's code segment

TEST_F(LegacyDeliveryTest, CodeSegmentChecks) {
    const auto with = [this](std::uint16_t selector) {
        guest.enter_kernel();
        gate(0x20, interrupt_gate, selector);
        return arrives(Event::external(0x20));
    };
    EXPECT_EQ(with(0), gp(1));
    EXPECT_EQ(with(3), gp(1)); // null, too
    EXPECT_EQ(with(sel::beyond), gp(sel::beyond + 1));
    EXPECT_EQ(with(sel::local_data), gp(sel::local_data + 1)); // there is no LDT
    EXPECT_EQ(with(sel::kernel_data), gp(sel::kernel_data + 1));
    EXPECT_EQ(with(sel::tss), gp(sel::tss + 1));
    EXPECT_EQ(with(sel::user_code_32), gp((sel::user_code_32 & ~3) + 1)); // DPL > CPL
    EXPECT_EQ(with(sel::user_conforming_code_32), gp((sel::user_conforming_code_32 & ~3) + 1));
    EXPECT_EQ(with(sel::absent_code_32), np(sel::absent_code_32 + 1));
}

TEST_F(LegacyDeliveryTest, HandlerBeyondItsSegment) {
    gate(0x20, interrupt_gate, sel::based_code, LegacyGuest::segment_limit + 1);
    EXPECT_EQ(arrives(Event::external(0x20)), gp(1));
    EXPECT_EQ(arrives(Event::software(0x20, 2)), gp(0));
    gate(0x20, interrupt_gate, sel::based_code, LegacyGuest::segment_limit);
    guest.enter_kernel();
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_EQ(cpu.rip, LegacyGuest::segment_limit);
    EXPECT_EQ(cpu.cs.base, LegacyGuest::segment_base);
}

// --- The handler's stack

TEST_F(LegacyDeliveryTest, StackOutsideTheTss) {
    gate(10, interrupt_gate, sel::conforming_code_32); // so that #TS itself needs no stack switch
    guest.enter_user();
    cpu.tr.limit = 4 + 4;
    EXPECT_EQ(arrives(Event::external(0x20)), ts(sel::tss + 1));
    guest.enter_user();
    cpu.tr.limit = 4 + 5;
    EXPECT_EQ(arrives(Event::external(0x20), false), (Fault{static_cast<Vector>(0x20), -1}));
    guest.enter_user();
    cpu.tr.present = false;
    EXPECT_EQ(arrives(Event::external(0x20)), ts(sel::tss + 1));
    cpu.tr.present = true;

    guest.use_16_bit_tss(sel::kernel_data, 0x8000);
    guest.enter_user();
    cpu.tr.limit = 2 + 2;
    EXPECT_EQ(arrives(Event::external(0x20)), ts(sel::busy_tss_16 + 1));
    guest.enter_user();
    cpu.tr.limit = 2 + 3;
    EXPECT_EQ(arrives(Event::external(0x20), false), (Fault{static_cast<Vector>(0x20), -1}));
}

TEST_F(LegacyDeliveryTest, StackSegmentChecks) {
    gate(0x80, interrupt_gate | user_gate);
    gate(10, interrupt_gate, sel::conforming_code_32);
    gate(12, interrupt_gate, sel::conforming_code_32);
    const auto with = [this](std::uint16_t selector, const Event& event) {
        guest.enter_user();
        set_stack(selector, TestGuest::kernel_stack);
        const Fault fault = arrives(event);
        EXPECT_EQ(cpu.cpl, 3);
        return fault;
    };
    const Event interrupt = Event::external(0x20);
    EXPECT_EQ(with(0, interrupt), ts(1));
    EXPECT_EQ(with(sel::beyond, interrupt), ts(sel::beyond + 1));
    EXPECT_EQ(with(sel::local_data, interrupt), ts(sel::local_data + 1));
    EXPECT_EQ(with(sel::kernel_data | 3, interrupt), ts(sel::kernel_data + 1));     // RPL
    EXPECT_EQ(with(sel::user_data & ~3, interrupt), ts((sel::user_data & ~3) + 1)); // DPL
    EXPECT_EQ(with(sel::read_only_data, interrupt), ts(sel::read_only_data + 1));
    EXPECT_EQ(with(sel::kernel_code_32, interrupt), ts(sel::kernel_code_32 + 1));
    EXPECT_EQ(with(sel::tss, interrupt), ts(sel::tss + 1));
    EXPECT_EQ(with(sel::absent_data, interrupt), ss(sel::absent_data + 1));
    // Without EXT for the program's own instruction.
    EXPECT_EQ(with(sel::read_only_data, Event::software(0x80, 2)), ts(sel::read_only_data));
    EXPECT_EQ(with(sel::absent_data, Event::software(0x80, 2)), ss(sel::absent_data));
}

TEST_F(LegacyDeliveryTest, RoomOnTheCurrentStack) {
    const Event interrupt = Event::external(0x20);
    cpu[Gpr::rsp] = 12;
    EXPECT_TRUE(send(interrupt).nested().empty());
    EXPECT_EQ(cpu[Gpr::rsp], 0U);
    // The last slot would lie across the end of the address space, and so would those of #SS and #DF.
    guest.enter_kernel();
    cpu[Gpr::rsp] = 11;
    const Delivery delivery = send(interrupt);
    EXPECT_EQ(delivery.outcome, Delivery::triple_fault);
    ASSERT_EQ(delivery.nested().size(), 3U);
    EXPECT_EQ(fault_of(delivery.nested()[0]), ss(1));
    EXPECT_EQ(fault_of(send(Event::software(0x20, 2)).faults[0]), ss(0));
    EXPECT_EQ(cpu[Gpr::rsp], 11U);
}

TEST_F(LegacyDeliveryTest, RoomOnTheNewStack) {
    const Fault arrived{static_cast<Vector>(0x20), -1};
    gate(12, interrupt_gate, sel::conforming_code_32); // so that #SS itself needs no stack switch
    const auto with = [this](std::uint16_t selector, std::uint32_t pointer, const Event& event, bool code) {
        guest.enter_user();
        set_stack(selector, pointer);
        return arrives(event, code);
    };
    const Event interrupt = Event::external(0x20);
    constexpr std::uint32_t limit = LegacyGuest::segment_limit, bottom = 0x4'1000;
    EXPECT_EQ(with(sel::based_data, limit + 1, interrupt, false), arrived);
    EXPECT_EQ(cpu[Gpr::rsp], limit + 1 - 20);
    EXPECT_EQ(guest.get<std::uint32_t>(LegacyGuest::segment_base + limit + 1 - 4), sel::user_data);
    EXPECT_EQ(with(sel::based_data, limit + 2, interrupt, true), ss(sel::based_data + 1));
    // With an error code 24 bytes are needed, and 20 without.
    EXPECT_EQ(with(sel::expand_down_data, bottom + 20, interrupt, false), arrived);
    EXPECT_EQ(with(sel::expand_down_data, bottom + 19, interrupt, true), ss(sel::expand_down_data + 1));
    const Event fault = Event::of(Exception::general_protection(8));
    EXPECT_EQ(with(sel::expand_down_data, bottom + 24, fault, true), gp(8));
    gate(8, interrupt_gate, sel::conforming_code_32);
    EXPECT_EQ(with(sel::expand_down_data, bottom + 23, fault, true), (Fault{Vector::double_fault, 0}));
    EXPECT_EQ(fault_of(last.nested()[0]), ss(sel::expand_down_data + 1));
    // And 10 through a 16-bit gate.
    gate(0x20, interrupt_gate_16, sel::kernel_code_32, 0x9000);
    (void)with(sel::expand_down_data, bottom + 10, interrupt, false);
    EXPECT_EQ(cpu.rip, 0x9000U);
    EXPECT_EQ(with(sel::expand_down_data, bottom + 9, interrupt, true), ss(sel::expand_down_data + 1));
}

TEST_F(LegacyDeliveryTest, SixteenBitStackPointerWraps) {
    cpu.ss = TestGuest::segment(sel::stack_16, 0x3, 0, false);
    cpu.ss.default_32 = false;
    cpu.ss.base = LegacyGuest::segment_base;
    cpu.ss.limit = 0xffff;
    cpu[Gpr::rsp] = 0xabcd'0004;
    ASSERT_EQ(send(Event::external(0x20)).outcome, Delivery::delivered);
    EXPECT_TRUE(last.nested().empty());
    EXPECT_EQ(cpu[Gpr::rsp], 0xabcd'fff8U); // the upper half stays
    EXPECT_EQ(guest.get<std::uint32_t>(LegacyGuest::segment_base), flags);
    EXPECT_EQ(guest.get<std::uint32_t>(LegacyGuest::segment_base + 0xfffc), sel::kernel_code_32);
    EXPECT_EQ(guest.get<std::uint32_t>(LegacyGuest::segment_base + 0xfff8), TestGuest::code);
}

// --- Faults on the way

TEST_F(LegacyDeliveryTest, PageFaultSetsCr2) {
    const Exception fault{Vector::page_fault, 7, GuestVirt(0xdead'b000)};
    EXPECT_EQ(arrives(Event::of(fault)), pf(7));
    EXPECT_EQ(cpu.cr2, 0xdead'b000U);
}

TEST_F(LegacyDeliveryTest, PushesAreSupervisorWrites) {
    guest.enable_paging();
    guest.enter_user();
    EXPECT_EQ(arrives(Event::of(Exception::general_protection())), gp(0)); // to a kernel page

    guest.map_32(TestGuest::kernel_stack - 0x1000, entry_bit::present);
    gate(14, interrupt_gate, sel::level_1_code); // whose stack can be written to
    guest.map_32(TestGuest::interrupt_stack - 0x1000, TestGuest::all_rights);
    guest.enter_user();
    EXPECT_EQ(arrives(Event::external(0x20)), pf(PageFault::present | PageFault::write));
    EXPECT_EQ(cpu.cr2, TestGuest::kernel_stack - 4); // the first push
    EXPECT_EQ(cpu.cpl, 1);
}

TEST_F(LegacyDeliveryTest, FrameAcrossTwoPagesFaultsAtTheUpperOneFirst) {
    guest.enable_paging();
    cpu[Gpr::rsp] = TestGuest::kernel_stack - 0x1000 + 8;
    guest.map_32(TestGuest::kernel_stack - 0x1000, 0);
    const Delivery delivery = send(Event::external(0x20)); // nor can #PF and #DF be
    EXPECT_EQ(delivery.outcome, Delivery::triple_fault);
    ASSERT_EQ(delivery.nested().size(), 3U);
    EXPECT_EQ(fault_of(delivery.nested()[0]), pf(PageFault::write));
    EXPECT_EQ(delivery.nested()[0].address, GuestVirt(TestGuest::kernel_stack - 0x1000 + 4));
}

TEST_F(LegacyDeliveryTest, UnreadableTables) {
    guest.enable_paging();
    gate(14, interrupt_gate, sel::conforming_code_32);
    guest.map_32(TestGuest::tss, 0);
    guest.enter_user();
    EXPECT_EQ(arrives(Event::external(0x20)), pf(0));
    EXPECT_EQ(cpu.cr2, TestGuest::tss + 4);
    guest.map_32(TestGuest::idt, 0);
    guest.enter_user();
    const Delivery delivery = send(Event::external(0x20));
    EXPECT_EQ(delivery.outcome, Delivery::triple_fault);
    EXPECT_EQ(fault_of(delivery.nested()[0]), pf(0));
    EXPECT_EQ(delivery.nested()[0].address, GuestVirt(TestGuest::idt + 0x100));
}

TEST_F(LegacyDeliveryTest, BenignThenFaultIsSerial) {
    gate(6, 0);
    EXPECT_EQ(arrives(Event::of(Exception::invalid_opcode())), gp(idt_code(6, 1)));
    ASSERT_EQ(last.nested().size(), 1U);
    EXPECT_EQ(fault_of(last.nested()[0]), gp(idt_code(6, 1)));
    EXPECT_EQ(pushed(1), TestGuest::code);
}

TEST_F(LegacyDeliveryTest, DoubleFaults) {
    const Fault df{Vector::double_fault, 0};
    gate(0, 0);
    EXPECT_EQ(arrives(Event::of(divide)), df); // contributory, contributory
    EXPECT_EQ(last.nested().size(), 1U);
    gate(14, 0);
    EXPECT_EQ(arrives(Event::of({Vector::page_fault, 2, {}})), df); // page fault, contributory
    gate(8, interrupt_gate, sel::conforming_code_32);
    set_stack(sel::read_only_data, TestGuest::kernel_stack); // #TS, and then #TS again
    guest.enter_user();
    EXPECT_EQ(arrives(Event::external(0x20)), df);
    ASSERT_EQ(last.nested().size(), 2U);
    EXPECT_EQ(fault_of(last.nested()[1]), ts(sel::read_only_data + 1));
}

TEST_F(LegacyDeliveryTest, TripleFaultLeavesTheState) {
    cpu.idtr.limit = 0;
    guest.enter_user();
    const Delivery delivery = send(Event::of(Exception::general_protection()));
    EXPECT_EQ(delivery.outcome, Delivery::triple_fault);
    ASSERT_EQ(delivery.nested().size(), 2U);
    EXPECT_EQ(fault_of(delivery.nested()[0]), gp(idt_code(13, 1)));
    EXPECT_EQ(fault_of(delivery.nested()[1]), gp(idt_code(8, 1)));
    EXPECT_EQ(cpu.rip, TestGuest::user_code);
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_EQ(cpu.ss.selector, sel::user_data);
    EXPECT_EQ(cpu[Gpr::rsp], TestGuest::user_stack);
}

// --- Modes

TEST_F(LegacyDeliveryTest, OtherModesAreUnsupported) {
    cpu.rflags |= rflags::virtual_8086;
    EXPECT_EQ(send(Event::external(0x20)).outcome, Delivery::unsupported);
    EXPECT_EQ(send(Event::external(0x20)).what, "virtual-8086 mode");
    cpu.cr0 &= ~cr0::pe;
    EXPECT_EQ(send(Event::external(0x20)).outcome, Delivery::unsupported);
    EXPECT_EQ(send(Event::external(0x20)).what, "real mode");
    EXPECT_EQ(cpu.rip, TestGuest::code);
}

} // namespace
} // namespace umbra
