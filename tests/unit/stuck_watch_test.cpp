// Unit tests of vmm/stuck_watch.hpp.
#include "vmm/stuck_watch.hpp"

#include "tests/unit/legacy_guest.hpp"

#include <cstdint>
#include <initializer_list>
#include <vector>

#include <gtest/gtest.h>

namespace umbra::test {
namespace {

using Code = std::vector<std::uint8_t>;

const Code jump{0xeb, 0xfe};                                   // jmp .
const Code long_jump{0xe9, 0xfb, 0xff, 0xff, 0xff};            // the same, with 32 bits
const Code pause_jump{0xf3, 0x90, 0xeb, 0xfc};                 // pause; jmp back
const Code two_fillers{0xf3, 0x90, 0x90, 0xeb, 0xfb};          // pause; nop; jmp back
const Code long_nop{0x0f, 0x1f, 0x44, 0x00, 0x00, 0xeb, 0xf9}; // nop 0(%rax,%rax,1); jmp back
const Code three_fillers{0xf3, 0x90, 0x90, 0x90, 0xeb, 0xfa};  // pause; nop; nop; jmp back
const Code two_jumps{0xeb, 0x00, 0xeb, 0xfc};                  // jmp on; jmp back
const Code increment{0xff, 0xc0, 0xeb, 0xfc};                  // inc %eax; jmp back
const Code conditional{0x74, 0xfe};                            // je .
const Code loop{0xe2, 0xfe};                                   // loop .
const Code indirect{0xff, 0xe0};                               // jmp *%rax
const Code prefixed{0x66, 0xeb, 0xfd};                         // with an operand-size prefix
const Code forward{0xeb, 0x10};                                // jmp elsewhere, to zeros
const Code halt_loop{0xf4, 0xeb, 0xfd};                        // hlt; jmp back
const Code unlock_wait{0x8a, 0x00, 0xeb, 0xfc};                // mov (%rax),%al; jmp back

template<class Guest>
bool stuck(Guest& guest, const Code& code, std::uint64_t offset = 0) {
    for (std::size_t i = 0; i < code.size(); ++i)
        guest.put(Guest::code + i, code[i]);
    guest.cpu.rip = Guest::code + offset;
    return jumps_to_itself(guest.cpu, guest.space());
}

template<class Guest>
class StuckWatchModes : public testing::Test {};
using Guests = testing::Types<TestGuest, LegacyGuest>;
TYPED_TEST_SUITE(StuckWatchModes, Guests);

TYPED_TEST(StuckWatchModes, KnowsJumpsThatDoNothing) {
    for (const Code& code : {jump, long_jump, pause_jump, two_fillers, long_nop}) {
        TypeParam guest;
        EXPECT_TRUE(stuck(guest, code)) << testing::PrintToString(code);
    }
}

TYPED_TEST(StuckWatchModes, WhereverItIsInTheLoop) {
    TypeParam guest;
    EXPECT_TRUE(stuck(guest, two_fillers, 2));
    EXPECT_TRUE(stuck(guest, two_fillers, 3));
    EXPECT_FALSE(stuck(guest, two_fillers, 4)) << "in the midst of the jump";
}

TYPED_TEST(StuckWatchModes, AnythingElseMayEnd) {
    for (const Code& code : {three_fillers, two_jumps, increment, conditional, loop, indirect, prefixed,
                             forward, halt_loop, unlock_wait, Code{}}) {
        TypeParam guest;
        EXPECT_FALSE(stuck(guest, code)) << testing::PrintToString(code);
    }
}

TYPED_TEST(StuckWatchModes, OnlyWithoutInterruptsAndTraps) {
    for (const std::uint64_t flag : {rflags::interrupt, rflags::trap}) {
        TypeParam guest;
        guest.cpu.rflags |= flag;
        EXPECT_FALSE(stuck(guest, jump));
    }
    TypeParam guest;
    guest.cpu.dr7 |= 1;
    EXPECT_FALSE(stuck(guest, jump)) << "a breakpoint may be there";
}

TYPED_TEST(StuckWatchModes, ProgramsToo) {
    TypeParam guest;
    guest.enter_user();
    for (std::size_t i = 0; i < jump.size(); ++i)
        guest.put(TypeParam::user_code + i, jump[i]);
    guest.cpu.rip = TypeParam::user_code;
    guest.cpu.rflags &= ~rflags::interrupt;
    EXPECT_TRUE(jumps_to_itself(guest.cpu, guest.space()));
}

TEST(StuckWatch, ANextPageThatCannotBeFetchedWouldFault) {
    TestGuest guest;
    const std::uint64_t page = TestGuest::code + page_size;
    const Code code{0x90, 0xeb, 0xfd}; // nop at the end of a page; jmp back
    for (std::size_t i = 0; i < code.size(); ++i)
        guest.put(page - 1 + i, code[i]);
    guest.cpu.rip = page;
    EXPECT_TRUE(jumps_to_itself(guest.cpu, guest.space()));
    constexpr std::uint64_t no_execute = std::uint64_t{1} << 63;
    guest.map(TestGuest::code, TestGuest::kernel_rights | no_execute);
    EXPECT_FALSE(jumps_to_itself(guest.cpu, guest.space()));
    guest.map(TestGuest::code, 0);
    EXPECT_FALSE(jumps_to_itself(guest.cpu, guest.space()));
}

TEST(StuckWatch, CodeSegmentsHaveLimits) {
    LegacyGuest guest;
    ASSERT_TRUE(stuck(guest, jump));
    guest.cpu.cs.limit = LegacyGuest::code; // its second byte lies outside
    EXPECT_FALSE(stuck(guest, jump));
    guest.cpu.cs.limit = LegacyGuest::code + 1;
    EXPECT_TRUE(stuck(guest, jump));
    guest.cpu.cs.default_32 = false; // 16-bit code
    EXPECT_FALSE(stuck(guest, jump));
}

TEST(StuckWatch, AJumpIsBelievedAtTheSecondLook) {
    TestGuest guest;
    ASSERT_TRUE(stuck(guest, jump));
    StuckWatch watch;
    EXPECT_FALSE(watch.look(guest.cpu, guest.space(), 10));
    EXPECT_FALSE(watch.look(guest.cpu, guest.space(), 12)) << "something was in between";
    const auto verdict = watch.look(guest.cpu, guest.space(), 13);
    ASSERT_TRUE(verdict);
    EXPECT_EQ(verdict->kind, Verdict::Kind::no_progress);
    EXPECT_EQ(verdict->reason, "the guest jumps to itself at 0x20000 with interrupts off");
}

TEST(StuckWatch, ALookAtSomethingElseBeginsAnew) {
    TestGuest guest;
    ASSERT_TRUE(stuck(guest, jump));
    StuckWatch watch;
    EXPECT_FALSE(watch.look(guest.cpu, guest.space(), 1));
    guest.cpu.rflags |= rflags::interrupt;
    EXPECT_FALSE(watch.look(guest.cpu, guest.space(), 2));
    guest.cpu.rflags &= ~rflags::interrupt;
    EXPECT_FALSE(watch.look(guest.cpu, guest.space(), 3));
    EXPECT_TRUE(watch.look(guest.cpu, guest.space(), 4));
}

TEST(StuckWatch, AHaltedCpuWakesIfInterruptsAreOn) {
    TestGuest guest;
    guest.cpu.halted = true;
    EXPECT_TRUE(StuckWatch().look(guest.cpu, guest.space(), 1));
    guest.cpu.rflags |= rflags::interrupt;
    EXPECT_FALSE(StuckWatch().look(guest.cpu, guest.space(), 1));
}

} // namespace
} // namespace umbra::test
