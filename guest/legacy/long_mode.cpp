// Into long mode, and out of it.
#include "guest/legacy/long_mode.hpp"

namespace umbra::legacy {

namespace {

struct LongGate {
    uint64_t low, high; ///< Intel SDM vol. 3A §6.14.1
};
extern "C" LongGate long_gates[];
extern "C" const char long_trap[];

} // namespace

void init_long_mode() {
    const auto handler = reinterpret_cast<uint32_t>(long_trap);
    constexpr uint64_t interrupt_gate = 0x8e;
    long_gates[vector_ud] = {(handler & 0xffff) | uint64_t{kernel_code64} << 16 | interrupt_gate << 40 |
                                 uint64_t{handler >> 16} << 48,
                             0};
}

void turn_long_mode_on(uint32_t root) {
    write_cr4(read_cr4() | cr4_pae);
    write_efer(read_efer() | efer_lme);
    CHECK_EQ(read_efer() & efer_lma, 0);
    write_cr3(root);
    write_cr0(read_cr0() | cr0_pg);
    CHECK_EQ(read_efer() & (efer_lme | efer_lma), efer_lme | efer_lma);
}

void turn_long_mode_off() {
    write_cr0(read_cr0() & ~cr0_pg);
    CHECK_EQ(read_efer() & (efer_lme | efer_lma), efer_lme);
    write_efer(read_efer() & ~efer_lme);
}

} // namespace umbra::legacy
