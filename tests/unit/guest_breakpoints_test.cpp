// Unit tests of what the guest's debug registers ask for (vmm/guest_breakpoints.hpp).
#include "vmm/guest_breakpoints.hpp"

#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

namespace umbra::test {
namespace {

constexpr std::uint64_t execution = 0, write = 1, port = 2, access = 3; // R/W in DR7
constexpr std::uint64_t one = 0, two = 1, eight = 2, four = 3;          // LEN

constexpr std::uint64_t global(unsigned number, std::uint64_t on, std::uint64_t length) {
    return std::uint64_t{2} << (2 * number) | (on | length << 2) << (16 + 4 * number);
}
constexpr std::uint64_t local(unsigned number, std::uint64_t on, std::uint64_t length) {
    return std::uint64_t{1} << (2 * number) | (on | length << 2) << (16 + 4 * number);
}

class GuestBreakpointsTest : public ::testing::Test {
  public:
    GuestBreakpointsTest() {
        cpu.efer = efer::lme | efer::lma;
        cpu.cs.long_mode = true;
    }
    void set(unsigned number, std::uint64_t at, std::uint64_t control) {
        cpu.dr[number] = at;
        cpu.dr7 |= control;
    }
    std::uint64_t read(std::uint64_t at, std::uint64_t size = 1) {
        breakpoints.accessed(GuestVirt(at), size, false);
        return breakpoints.take();
    }
    std::uint64_t written(std::uint64_t at, std::uint64_t size = 1) {
        breakpoints.accessed(GuestVirt(at), size, true);
        return breakpoints.take();
    }
    std::uint64_t port_used(std::uint16_t at, std::uint64_t size = 1) {
        breakpoints.accessed_port(at, size);
        return breakpoints.take();
    }
    std::uint64_t at_instruction(std::uint64_t rip) {
        cpu.rip = rip;
        return breakpoints.at_instruction();
    }
    [[nodiscard]] Guard guard(std::uint64_t page) const {
        const Guards guards = breakpoints.guards();
        const auto found = guards.pages.find(GuestVirt(page));
        return found == guards.pages.end() ? Guard{} : found->second;
    }

    VirtualCpu cpu;
    GuestBreakpoints breakpoints{cpu};
};

TEST_F(GuestBreakpointsTest, AsItStartsNothing) {
    cpu.dr7 |= 1U << 13 | 3U << 8; // general detection, LE and GE
    EXPECT_FALSE(breakpoints.enabled());
    EXPECT_FALSE(breakpoints.wants_step());
    EXPECT_EQ(breakpoints.guards(), Guards{});
    EXPECT_EQ(at_instruction(0), 0U);
    EXPECT_EQ(written(0, 4096), 0U);
}

TEST_F(GuestBreakpointsTest, LocalAndGlobalOnesCount) {
    set(0, 0x1000, local(0, write, one));
    set(3, 0x1000, global(3, write, one));
    set(1, 0x1000, global(1, write, one) & ~std::uint64_t{0xff}); // neither
    EXPECT_TRUE(breakpoints.enabled());
    EXPECT_EQ(written(0x1000), 9U);
}

TEST_F(GuestBreakpointsTest, LengthsAndAlignment) {
    set(0, 0x1007, global(0, access, eight)); // its low bits are not looked at
    set(1, 0x1006, global(1, access, four));
    set(2, 0x1003, global(2, access, two));
    set(3, 0x1001, global(3, access, one));
    const std::vector<std::uint64_t> met{1, 9, 5, 5, 3, 3, 3, 3};
    for (std::uint64_t i = 0; i < met.size(); ++i)
        EXPECT_EQ(read(0x1000 + i), met[i]) << i;
    EXPECT_EQ(read(0xfff), 0U);
    EXPECT_EQ(read(0x1008), 0U);
    EXPECT_EQ(read(0xffe, 3), 1U); // accesses of several bytes by any of them
    EXPECT_EQ(read(0xff8, 64), 15U);
    EXPECT_EQ(read(~std::uint64_t{3}, 4), 0U); // up to the address space's end
}

TEST_F(GuestBreakpointsTest, KindsOfAccess) {
    set(0, 0x1000, global(0, write, one));
    set(1, 0x1000, global(1, access, one));
    set(2, 0x1000, global(2, execution, one));
    set(3, 0x1000, global(3, port, one));
    EXPECT_EQ(read(0x1000), 2U);
    EXPECT_EQ(written(0x1000), 3U);
    EXPECT_EQ(at_instruction(0x1000), 4U);
    EXPECT_EQ(port_used(0x1000), 0U); // without CR4.DE
    cpu.cr4 |= cr4::de;
    EXPECT_EQ(port_used(0x1000), 8U);
    breakpoints.accessed(
        std::vector<MemoryAccess>{{GuestVirt(0x2000), 4, true, false}, {GuestVirt(0xffd), 4, false, true}});
    EXPECT_EQ(breakpoints.take(), 3U);
}

TEST_F(GuestBreakpointsTest, InstructionsAtTheirFirstByte) {
    set(0, 0x1001, global(0, execution, four)); // which has no meaning here
    EXPECT_EQ(at_instruction(0x1001), 1U);
    EXPECT_EQ(at_instruction(0x1000), 0U);
    EXPECT_EQ(at_instruction(0x1002), 0U);
    cpu.rflags |= rflags::resume;
    EXPECT_EQ(at_instruction(0x1001), 0U);
}

TEST_F(GuestBreakpointsTest, LinearAddressesCount) {
    cpu.efer = 0;
    cpu.cs.long_mode = false;
    cpu.cs.base = 0xffff'f000;
    set(0, 0x1234, global(0, execution, one));
    EXPECT_EQ(at_instruction(0x2234), 1U);
    EXPECT_EQ(at_instruction(0x1234), 0U);
}

TEST_F(GuestBreakpointsTest, GuardsOnPages) {
    constexpr std::uint64_t non_canonical = std::uint64_t{1} << 47;
    set(0, 0x1ff8, global(0, execution, one));
    set(1, 0x1ff8, global(1, write, eight));
    set(2, 0x4000, global(2, access, one));
    EXPECT_EQ(guard(0x1000), (Guard{.read = false, .write = true, .fetch = true}));
    EXPECT_EQ(guard(0x4000), (Guard{.read = true, .write = true, .fetch = false}));
    EXPECT_EQ(breakpoints.guards().pages.size(), 2U);
    cpu.dr7 = 0;
    set(0, non_canonical, global(0, write, one));
    cpu.cr4 |= cr4::de;
    set(1, 0x21, global(1, port, one));
    EXPECT_EQ(breakpoints.guards(), Guards{});
}

TEST_F(GuestBreakpointsTest, WatchedPortsTakeSteps) {
    set(0, 0x21, global(0, port, one));
    EXPECT_FALSE(breakpoints.wants_step());
    cpu.cr4 |= cr4::de;
    EXPECT_TRUE(breakpoints.wants_step());
    cpu.cpl = 3; // its accesses trap
    EXPECT_FALSE(breakpoints.wants_step());
    cpu.rflags |= rflags::iopl;
    EXPECT_TRUE(breakpoints.wants_step());
}

TEST_F(GuestBreakpointsTest, WhatIsNotDoneIsNotTold) {
    set(0, 0x1000, global(0, write, one));
    breakpoints.accessed(GuestVirt(0x1000), 1, true);
    breakpoints.abandon();
    EXPECT_EQ(breakpoints.take(), 0U);
}

TEST_F(GuestBreakpointsTest, HeldBackForOneInstruction) {
    set(0, 0x1000, global(0, access, two));
    set(1, 0x2000, global(1, execution, one));
    set(2, 0x3000, global(2, write, one));
    breakpoints.accessed(GuestVirt(0x1000), 2, false);
    breakpoints.hold_back();
    EXPECT_TRUE(breakpoints.wants_step());
    EXPECT_EQ(at_instruction(0x2000), 0U); // not behind MOV to SS
    breakpoints.accessed(GuestVirt(0x3000), 1, true);
    breakpoints.abandon(); // a fault of that one: what was before it stays
    EXPECT_EQ(breakpoints.take(), 1U);
    EXPECT_FALSE(breakpoints.wants_step());
    EXPECT_EQ(at_instruction(0x2000), 2U);
}

TEST_F(GuestBreakpointsTest, FramesOfDebugExceptionsWait) {
    set(0, 0x1000, global(0, write, eight));
    breakpoints.accessed(GuestVirt(0x1000), 8, true);
    breakpoints.delay();
    EXPECT_TRUE(breakpoints.wants_step());
    breakpoints.abandon();
    EXPECT_EQ(breakpoints.take(), 1U);
}

} // namespace
} // namespace umbra::test
