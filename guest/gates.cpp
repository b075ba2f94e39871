// gates: a guest that has no local descriptor table, but memory at address 0, where a CPU that has been reset
// believes one to be. Proves that what lies there is no table: data segments, code segments and call gates
// with any target, in whatever way they are used, all fault with their selector. To a hypervisor that runs
// this kernel at CPL 3, such a call gate would be a way into its own ring 0. Intel SDM vol. 3A ch. 3.5.1
// and 5.8.3. Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/process.hpp"
#include "guest/runtime/traps.hpp"

#include <cstdint>
#include <initializer_list>

using namespace umbra::guest;

namespace {

constexpr std::uint64_t local = 4;                            // TI, in a selector
constexpr std::uint64_t slot = 0x40;                          // of the table that is none: two words
constexpr std::uint64_t data_segment = 0x00cf'f300'0000'ffff; // for all levels
constexpr std::uint64_t code_segment = 0x00af'fb00'0000'ffff; // of level 3
constexpr std::uint64_t kernel_code_segment = 0x00af'9b00'0000'ffff;

struct [[gnu::packed]] FarPointer {
    std::uint64_t offset;
    std::uint16_t selector;
};

void (*const landing)() = [] {
    print("gates: a far transfer has arrived\n");
    exit_guest(exit_check_failed);
};

/// In assembly, as to the compiler the page at address 0 holds nothing.
void put(std::uint64_t low, std::uint64_t high = 0) {
    asm volatile("mov %1, (%0)\n mov %2, 8(%0)" : : "r"(slot), "r"(low), "r"(high) : "memory");
}

/// Every use of the selector of `slot`, with this privilege level asked for, faults.
void expect_nothing(std::uint64_t rpl) {
    const std::uint64_t selector = slot | local | rpl;
    const std::uint64_t error = slot | local;
    const FarPointer pointer{.offset = reinterpret_cast<std::uint64_t>(landing),
                             .selector = static_cast<std::uint16_t>(selector)};
    CHECK(PROBE("mov %0, %%ds", : : "r"(selector)).is_fault(vector_gp, error));
    CHECK(PROBE("mov %0, %%fs", : : "r"(selector)).is_fault(vector_gp, error));
    CHECK(PROBE("mov %0, %%ss", : : "r"(selector)).is_fault(vector_gp, error));
    CHECK(PROBE(".byte 0x48\n lcall *%0", : : "m"(pointer) : "memory").is_fault(vector_gp, error));
    CHECK(PROBE(".byte 0x48\n ljmp *%0", : : "m"(pointer) : "memory").is_fault(vector_gp, error));
    const Trap far_return =
        PROBE_SEQUENCE("mov %%rsp, %%rbx\n push %0\n push %1", "lretq", "mov %%rbx, %%rsp",
                       :
                       : "r"(selector), "r"(pointer.offset)
                       : "rbx", "memory");
    CHECK(far_return.is_fault(vector_gp, error));
    const Trap interrupt_return = PROBE_SEQUENCE(
        "mov %%rsp, %%rbx\n push $0\n push %%rbx\n pushfq\n push %0\n push %1", "iretq", "mov %%rbx, %%rsp",
        :
        : "r"(selector), "r"(pointer.offset)
        : "rbx", "memory");
    CHECK(interrupt_return.is_fault(vector_gp, error));
}

/// A call gate that programs may use, to the landing in the code segment that `target` selects.
void put_call_gate(std::uint64_t target) {
    constexpr std::uint64_t gate = 0x0000'ec00'0000'0000; // present, DPL 3, 64-bit call gate
    const auto offset = reinterpret_cast<std::uint64_t>(landing);
    put(gate | target << 16 | (offset & 0xffff) | (offset >> 16 & 0xffff) << 48, offset >> 32);
}

} // namespace

extern "C" int kernel_main(const BootParams& boot) {
    install_descriptors();
    init_memory(boot);
    for (std::uint64_t rpl = 0; rpl < 4; rpl += 3) {
        for (const std::uint64_t descriptor : {data_segment, code_segment, kernel_code_segment}) {
            put(descriptor);
            expect_nothing(rpl);
        }
    }
    print("gates: segments\n");

    // A hypervisor's own code segment may be anywhere in a table that this kernel cannot see.
    constexpr std::uint64_t last_selector = 0x1ff8;
    for (std::uint64_t target = 8; target <= last_selector; target += 8) {
        put_call_gate(target);
        const FarPointer pointer{.offset = 0, .selector = slot | local | 3};
        CHECK(PROBE(".byte 0x48\n lcall *%0", : : "m"(pointer) : "memory").is_fault(vector_gp, slot | local));
    }
    put_call_gate(kernel_code);
    expect_nothing(0);
    expect_nothing(3);
    print("gates: call gates\n");
    print("gates: passed\n");
    return 0;
}
