// debug: something for a debugger to look at. Functions that call each other, data that is written in a known
// order, a table that is read, address spaces that share a kernel, a timer that interrupts all of it, and
// code that checks that nobody has changed it. Words of the command line choose what it does besides:
//
//   ticks      the timer interrupts 1000 times a second
//   wait       spins with interrupts disabled until `released` is not 0, which only a debugger sets
//   sleep      halts for ever with interrupts disabled
//   panic      ends in a triple fault
//   int3       executes int3, and counts that its own handler gets it
//
// Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/timer.hpp"
#include "guest/runtime/traps.hpp"

#include <cstdint>

using namespace umbra::guest;

// What scripts name is C: no mangling, and never inlined.
extern "C" {

volatile std::uint64_t released = 0;
volatile std::uint64_t counter = 0;
volatile std::uint64_t ticks = 0;
volatile std::uint64_t breakpoints = 0;
volatile std::uint8_t buffer[64];
volatile std::uint64_t table[8] = {1, 1, 2, 3, 5, 8, 13, 21};
alignas(4096) volatile std::uint64_t late_page[512];

[[gnu::noinline]] std::uint64_t depth(std::uint64_t levels) {
    if (levels == 0) {
        counter = counter + 1;
        return 1;
    }
    return depth(levels - 1) + 1;
}

[[gnu::noinline]] void fill(std::uint8_t value) {
    for (unsigned i = 0; i < sizeof(buffer); ++i)
        buffer[i] = static_cast<std::uint8_t>(value + i);
}

[[gnu::noinline]] std::uint64_t sum() {
    std::uint64_t total = 0;
    for (const volatile std::uint64_t& entry : table)
        total += entry;
    return total;
}

[[gnu::noinline]] void work(std::uint64_t round) {
    fill(static_cast<std::uint8_t>(round));
    CHECK_EQ(sum(), 54U);
    CHECK_EQ(depth(5), 6U);
}

/// As a loader or an integrity check reads code.
[[gnu::noinline]] std::uint64_t checksum(const void* code, std::uint64_t size) {
    std::uint64_t result = 0;
    for (std::uint64_t i = 0; i < size; ++i)
        result = result * 31 + static_cast<const volatile std::uint8_t*>(code)[i];
    return result;
}

[[gnu::noinline]] void finished() {
    asm volatile("" ::: "memory");
}
}

namespace {

constexpr std::uint64_t checked_bytes = 16;
constexpr std::uint64_t remapped = slot_base(3); ///< a page that each address space maps elsewhere

void on_tick(TrapFrame&) {
    ticks = ticks + 1;
    end_of_interrupt(0);
}

void on_breakpoint(TrapFrame&) {
    breakpoints = breakpoints + 1;
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    set_handler(3, on_breakpoint);
    if (boot.has_option("ticks")) {
        constexpr std::uint32_t hz = 1000;
        init_pic(1);
        set_handler(irq_base, on_tick);
        start_pit(hz);
        asm volatile("sti");
    }
    const std::uint64_t before = checksum(reinterpret_cast<const void*>(&depth), checked_bytes);
    if (boot.has_option("wait")) {
        print("debug: waiting\n");
        asm volatile("cli");
        while (released == 0) {
        }
    }
    if (boot.has_option("sleep")) {
        print("debug: asleep\n");
        asm volatile("cli\n 1: hlt\n jmp 1b");
    }

    const AddressSpace first = AddressSpace::create(), second = AddressSpace::create();
    first.map(remapped, allocate_frame(), pte_kernel_rw);
    second.map(remapped, allocate_frame(), pte_kernel_rw);
    constexpr std::uint64_t rounds = 10;
    for (std::uint64_t round = 0; round < rounds; ++round) {
        (round % 2 == 0 ? first : second).load();
        word(remapped) = round;
        late_page[round] = round;
        work(round);
    }
    if (boot.has_option("int3")) {
        asm volatile("int3");
        CHECK_EQ(breakpoints, 1U);
    }
    if (checksum(reinterpret_cast<const void*>(&depth), checked_bytes) != before)
        print("debug: the code has changed\n");
    finished();
    if (boot.has_option("panic")) {
        constexpr struct [[gnu::packed]] {
            std::uint16_t limit = 0;
            std::uint64_t base = 0;
        } no_idt;
        asm volatile("lidt %0\n ud2" : : "m"(no_idt));
    }
    print("debug: passed\n");
    return 0;
}
