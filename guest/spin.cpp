// spin: never ends, and never traps. Proves that a guest which gives no occasion to look at the clock still
// runs into its time limit. Outcome: timeout.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"

extern "C" int kernel_main(const umbra::guest::BootParams&) {
    umbra::guest::print("spin: going round\n");
    for (;;)
        asm volatile("");
}
