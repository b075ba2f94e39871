// spin: goes round in a loop that never traps. Proves that a guest which gives no occasion to look at the
// clock still runs into its time limit, and that `umbra run --end-stuck` tells a loop that nothing can end
// from others. Words: "pause", the same with other instructions that do nothing; "counting", a loop that does
// something; "enabled", one with interrupts on; "nmi", one that an NMI could end. Outcome: none of its own.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/timer.hpp"

#include <cstdint>

/// Lets the I/O APIC send an NMI when input 5 is raised, which nobody does (Intel 82093AA, 3.2.4).
static void expect_nmi() {
    constexpr std::uint32_t input = 5, entries = 0x10, edge_nmi = 4 << 8;
    auto* const io_apic = reinterpret_cast<volatile std::uint32_t*>(0xfec0'0000);
    io_apic[0] = entries + 2 * input; // IOREGSEL
    io_apic[4] = edge_nmi;            // IOWIN: the lower half
}

extern "C" int kernel_main(const umbra::guest::BootParams& boot) {
    umbra::guest::print("spin: going round\n");
    if (boot.has_option("pause"))
        asm volatile("1: pause\n nop\n jmp 1b");
    if (boot.has_option("counting"))
        asm volatile("1: inc %%rax\n jmp 1b" : : : "rax");
    if (boot.has_option("enabled")) {
        umbra::guest::init_pic(0);
        asm volatile("sti");
    }
    if (boot.has_option("nmi"))
        expect_nmi();
    for (;;)
        asm volatile("");
}
