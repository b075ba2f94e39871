// The descriptor tables and how they are loaded.
#include "guest/runtime/descriptors.hpp"

#include "guest/runtime/traps.hpp"

namespace umbra::guest {
namespace {

struct [[gnu::packed]] TaskState {
    std::uint32_t reserved0 = 0;
    std::uint64_t privileged_stack[3] = {};
    std::uint64_t reserved1 = 0;
    std::uint64_t interrupt_stack[7] = {};
    std::uint64_t reserved2 = 0;
    std::uint16_t reserved3 = 0;
    std::uint16_t io_map = sizeof(TaskState); // beyond the limit: no port is open to programs
};
static_assert(sizeof(TaskState) == 104);

struct PackedGate {
    std::uint64_t low = 0;
    std::uint64_t high = 0;
};

// In long mode only type, privilege, presence and the L bit of a code segment count. "Accessed" is set so
// that loading a selector never writes to the table.
constexpr std::uint64_t code_segment = 0x0020'9b00'0000'0000;
constexpr std::uint64_t data_segment = 0x00c0'9300'0000'0000;
constexpr std::uint64_t compatibility_segment = 0x00cf'9b00'0000'ffff;
constexpr std::uint64_t privilege_3 = std::uint64_t{3} << 45;
constexpr std::uint64_t segment_present = std::uint64_t{1} << 47;
constexpr std::uint64_t task_state_segment = 0x0000'8900'0000'0000;

TaskState tss;
alignas(16) std::uint64_t gdt[gdt_slots];
alignas(16) PackedGate idt[256];
alignas(16) std::uint8_t interrupt_stacks[2][interrupt_stack_size];

void fill_gdt() {
    const auto base = reinterpret_cast<std::uint64_t>(&tss);
    gdt[kernel_code / 8] = code_segment;
    gdt[kernel_data / 8] = data_segment;
    gdt[task_state / 8] = task_state_segment | (sizeof(TaskState) - 1) | ((base & 0xff'ffff) << 16) |
                          ((base >> 24 & 0xff) << 56);
    gdt[task_state / 8 + 1] = base >> 32;
    gdt[absent_data / 8] = data_segment & ~segment_present;
    gdt[sysret_base / 8] = compatibility_segment | privilege_3;
    gdt[user_data / 8] = data_segment | privilege_3;
    gdt[user_code / 8] = code_segment | privilege_3;
}

void reload_segments() {
    asm volatile("pushq %[code]\n"
                 "lea 1f(%%rip), %%rax\n"
                 "push %%rax\n"
                 "lretq\n"
                 "1: mov %[data], %%ds\n"
                 "mov %[data], %%es\n"
                 "mov %[data], %%ss\n"
                 "mov %[null], %%fs\n"
                 "mov %[null], %%gs\n"
                 "lldt %w[null]\n"
                 "ltr %w[task]\n"
                 :
                 : [code] "i"(kernel_code), [data] "r"(std::uint32_t{kernel_data}), [null] "r"(0),
                   [task] "r"(task_state)
                 : "rax", "memory");
}

} // namespace

void install_descriptors() {
    fill_gdt();
    for (std::uint8_t stack = 1; stack <= 2; ++stack)
        tss.interrupt_stack[stack - 1] = interrupt_stack_top(stack);
    for (unsigned vector = 0; vector < 256; ++vector)
        set_gate(vector, {});
    set_gate(vector_df, {.stack = double_fault_stack});

    load_gdt(gdt_register());
    reload_segments();
    load_idt(idt_register());
}

void set_gate(unsigned vector, const Gate& gate) {
    const auto target = reinterpret_cast<std::uint64_t>(&trap_stubs[vector]);
    const auto attributes = static_cast<std::uint64_t>(gate.type) | std::uint64_t{gate.privilege} << 5 |
                            std::uint64_t{gate.present} << 7;
    idt[vector].low = (target & 0xffff) | std::uint64_t{gate.selector} << 16 |
                      std::uint64_t{gate.stack} << 32 | attributes << 40 | (target >> 16 & 0xffff) << 48;
    idt[vector].high = target >> 32;
    asm volatile("" : : : "memory"); // the next trap reads it
}

void set_trap_stack(std::uint64_t top) {
    tss.privileged_stack[0] = top;
}

std::uint64_t interrupt_stack_top(std::uint8_t stack) {
    return reinterpret_cast<std::uint64_t>(interrupt_stacks[stack - 1]) + interrupt_stack_size;
}

TableRegister gdt_register() {
    return {.limit = sizeof(gdt) - 1, .base = reinterpret_cast<std::uint64_t>(gdt)};
}
TableRegister idt_register() {
    return {.limit = sizeof(idt) - 1, .base = reinterpret_cast<std::uint64_t>(idt)};
}

} // namespace umbra::guest
