// cr3: loads CR3 with the address of memory that does not exist. No instruction can be fetched from there on,
// and no handler either. Proves that a kernel which loses itself so stops, and nothing else does. Intel SDM
// vol. 3A ch. 4.5. Outcome: triple-fault.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"

using namespace umbra::guest;

extern "C" int kernel_main(const BootParams&) {
    install_descriptors();
    print("cr3: leaving\n");
    write_cr3(std::uint64_t{1} << (physical_address_bits() - 1));
    print("cr3: still here\n");
    return 1;
}
