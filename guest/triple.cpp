// triple: faults with an IDT in which nothing can be found, so that neither the fault nor the double fault
// after it can be delivered. Proves that the CPU's shutdown ends the run. Intel SDM vol. 3A ch. 6.15,
// interrupt 8. Outcome: triple-fault.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/descriptors.hpp"

using namespace umbra::guest;

extern "C" int kernel_main(const BootParams&) {
    print("triple: faulting without an IDT\n");
    load_idt({.limit = 0, .base = 0});
    asm volatile("ud2");
    return 1;
}
