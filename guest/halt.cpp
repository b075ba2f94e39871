// halt: waits for an interrupt with interrupts off. Proves that a CPU which will never wake is idle until the
// time limit, unless `umbra run --end-stuck` ends it. Outcome: none of its own.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"

extern "C" int kernel_main(const umbra::guest::BootParams&) {
    umbra::guest::print("halt: halting\n");
    for (;;)
        asm volatile("cli\n hlt");
}
