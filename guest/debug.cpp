// debug: something for a debugger to look at. Functions that call each other, data that is written in a known
// order, a table that is read, address spaces that share a kernel, a timer that interrupts all of it, and
// code that checks that nobody has changed it. Words of the command line choose what it does besides:
//
//   ticks      the timer interrupts 1000 times a second
//   slow-ticks 20 times a second: a host of any speed can bear it, where a watchpoint makes each access to
//   the
//              stack's page a few traps, and the handler's own among them
//   wait       spins with interrupts disabled until `released` is not 0, which only a debugger sets
//   idle       calls idle() again and again until then, and halts in between if the timer ticks
//   sleep      halts for ever with interrupts disabled
//   panic      ends in a triple fault
//   shadows    calls shadows()
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

struct Place {
    std::int64_t x, y;
    const char* name;
};
volatile Place place = {3, -4, "a place"};

volatile std::uint64_t released = 0;
volatile std::uint64_t counter = 0;
volatile std::uint64_t ticks = 0;
volatile std::uint64_t breakpoints = 0;
volatile std::uint8_t buffer[64];
volatile std::uint64_t table[8] = {1, 1, 2, 3, 5, 8, 13, 21};
alignas(4096) volatile std::uint64_t late_page[512];
alignas(4096) volatile std::uint8_t two_pages[2 * 4096];

/// A recursion that stays one.
[[gnu::noinline]] std::uint64_t depth(std::uint64_t levels) {
    if (levels == 0) {
        counter = counter + 1;
        return 1;
    }
    const std::uint64_t below = depth(levels - 1);
    asm volatile("");
    return below + 1;
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

/// One write of 8 bytes, half of them in each page.
[[gnu::noinline]] void cross(std::uint64_t value) {
    asm volatile("mov %0, two_pages + 4092" : : "r"(value) : "memory");
}

/// What a watchpoint on the stack sees: 0, 1, 3, 6.
[[gnu::noinline]] std::uint64_t triangle() {
    volatile std::uint64_t total = 0;
    for (std::uint64_t i = 1; i <= 3; ++i)
        total = total + i;
    return total;
}

/// RFLAGS as PUSHF stores it, next to instructions that a debugger must take care of. Leaves interrupts
/// disabled.
[[gnu::naked, gnu::noinline]] std::uint64_t pushed_flags() {
    asm("pushfq\n pop %rax\n cli\n push %rax\n popfq\n cli\n ret");
}

/// Instructions behind which a CPU takes no interrupt before the next one is done.
[[gnu::naked, gnu::noinline]] void shadows() {
    asm("cli\n sti\n nop\n mov %ss, %eax\n mov %eax, %ss\n nop\n cli\n ret");
}

[[gnu::noinline]] void work(std::uint64_t round) {
    fill(static_cast<std::uint8_t>(round));
    CHECK_EQ(sum(), 54U);
    CHECK_EQ(depth(5), 6U);
    CHECK_EQ(triangle(), 6U);
    cross(round);
}

[[gnu::noinline]] void idle() {
    asm volatile("");
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
constexpr std::uint64_t remapped = slot_base(3);  ///< a page that each address space maps elsewhere
constexpr std::uint64_t function = remapped + 16; ///< and in it a function that returns the space's number

void on_tick(TrapFrame&) {
    ticks = ticks + 1;
    end_of_interrupt(0);
}

void on_breakpoint(TrapFrame&) {
    breakpoints = breakpoints + 1;
}

/// A new address space with that page.
AddressSpace make_space(std::uint8_t number) {
    const AddressSpace space = AddressSpace::create();
    const std::uint64_t frame = allocate_frame();
    const std::uint8_t code[] = {0xb8, number, 0, 0, 0, 0xc3}; // mov $number, %eax; ret
    for (std::size_t i = 0; i < sizeof(code); ++i)
        reinterpret_cast<volatile std::uint8_t*>(frame + function - remapped)[i] = code[i];
    space.map(remapped, frame, pte_kernel_rw);
    return space;
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    set_handler(3, on_breakpoint);
    const std::uint32_t hz = boot.has_option("ticks") ? 1000 : boot.has_option("slow-ticks") ? 20 : 0;
    const bool ticking = hz != 0;
    if (ticking) {
        init_pic(1);
        set_handler(irq_base, on_tick);
        start_pit(hz);
        enable_interrupts();
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

    if (boot.has_option("idle")) {
        print("debug: idle\n");
        while (released == 0) {
            idle();
            if (ticking)
                asm volatile("hlt");
        }
    }

    const AddressSpace first = make_space(1), second = make_space(2);
    constexpr std::uint64_t rounds = 10;
    for (std::uint64_t round = 0; round < rounds; ++round) {
        const bool even = round % 2 == 0;
        (even ? first : second).load();
        word(remapped) = round;
        late_page[round] = round;
        CHECK_EQ(reinterpret_cast<std::uint32_t (*)()>(function)(), even ? 1 : 2);
        CHECK_EQ(pushed_flags() & rflags_tf, 0U);
        if (ticking)
            enable_interrupts();
        work(round);
    }
    CHECK_EQ(place.x + place.y, -1);
    if (boot.has_option("shadows"))
        shadows();
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
