// legacy_spin: jumps to itself with interrupts off, in 32-bit code, where some hosts let CLI pass without a
// trap. Outcome: none of its own.
#include "guest/legacy/runtime.hpp"

using namespace umbra::legacy;

extern "C" int kernel_main(uint32_t /*eax*/, uint32_t /*ebx*/) {
    print("legacy_spin: going round\n");
    disable_interrupts();
    for (;;)
        asm volatile("");
}
