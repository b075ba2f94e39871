// long_way: started in 32-bit protected mode, as by multiboot, a kernel goes its own way into long mode:
// CR4.PAE, EFER.LME, CR0.PG, a far jump; back to compatibility mode, out of long mode by clearing CR0.PG, and
// in again. Outcome: passed.
#include "guest/legacy/long_mode.hpp"

using namespace umbra::legacy;

namespace {

constexpr uint64_t present = 1, writable = 2, large = 0x80;

alignas(4096) uint64_t level4[512], level3[512], level2[512];

/// The first GB is mapped to itself.
void build_tables() {
    level4[0] = reinterpret_cast<uint32_t>(level3) | present | writable;
    level3[0] = reinterpret_cast<uint32_t>(level2) | present | writable;
    for (uint64_t i = 0; i < 512; ++i)
        level2[i] = i << 21 | present | writable | large;
}

void check_entry_without_pae() {
    write_efer(read_efer() | efer_lme);
    write_cr3(reinterpret_cast<uint32_t>(level4));
    EXPECTING_TRAP("movl %0, %%cr0", : : "r"(read_cr0() | cr0_pg) : "memory");
    CHECK_EQ(last_trap.vector, vector_gp);
    CHECK_EQ(last_trap.error, 0);
    CHECK_EQ(read_cr0() & cr0_pg, 0);
    CHECK_EQ(read_efer() & efer_lma, 0);
    write_efer(read_efer() & ~efer_lme);
    print("not without PAE\n");
}

} // namespace

extern "C" int kernel_main(uint32_t /*eax*/, uint32_t ebx) {
    CHECK(cpu_has_long_mode());
    init_descriptors();
    init_long_mode();
    build_tables();

    if (!on_qemu(ebx)) // which ignores the write
        check_entry_without_pae();
    for (uint32_t i = 1; i <= 3; ++i) {
        turn_long_mode_on(reinterpret_cast<uint32_t>(level4));
        CHECK_EQ(walk_through_64_bit_code(i), 3 * i + 1);
        CHECK_EQ(walk_through_64_bit_code(100 * i), 300 * i + 1);
        turn_long_mode_off();
        EXPECTING_TRAP("ud2", : : : "memory"); // through a 32-bit gate again
        CHECK_EQ(last_trap.vector, vector_ud);
        print("long mode, %u\n", i);
    }
    print("%s: passed\n", LEGACY_NAME);
    return 0;
}
