// The descriptor tables of a guest kernel: GDT, TSS and IDT. Intel SDM vol. 3A ch. 3.4 (segments), 6.10-6.14
// (gates, interrupt stack table) and 7.7 (64-bit TSS).
#pragma once

#include <cstdint>

namespace umbra::guest {

// Selectors. The order serves SYSCALL (SS = CS + 8) and SYSRET (SS = base + 8, CS = base + 16). Programs get
// selectors that no host uses for its own: where the host's GDT is in force, 0x23, 0x2b and 0x33 could be
// loaded without a trap.
inline constexpr std::uint16_t kernel_code = 0x08;
inline constexpr std::uint16_t kernel_data = 0x10;
inline constexpr std::uint16_t task_state = 0x18; ///< two slots wide
inline constexpr std::uint16_t sysret_base = 0x38 | 3;
inline constexpr std::uint16_t user_data = 0x40 | 3;
inline constexpr std::uint16_t user_code = 0x48 | 3;
inline constexpr std::uint16_t absent_data =
    0x50; ///< a data segment marked not present, for tests of #NP and #SS
inline constexpr unsigned gdt_slots = 11;

/// One descriptor of the IDT, before it is packed.
struct Gate {
    enum class Type : std::uint8_t {
        interrupt = 0xe,
        trap = 0xf
    }; ///< an interrupt gate clears IF, a trap gate does not

    Type type = Type::interrupt;
    std::uint8_t privilege = 0; ///< the DPL: 3 lets programs use `int n`
    std::uint8_t stack = 0;     ///< 1..7: always enter on this stack of the interrupt stack table
    bool present = true;
    std::uint16_t selector = kernel_code;
};

/// The stack of the interrupt stack table that double faults use; `spare_stack` is for tests.
inline constexpr std::uint8_t double_fault_stack = 1;
inline constexpr std::uint8_t spare_stack = 2;

/// What LGDT and LIDT take, and SGDT and SIDT give.
struct [[gnu::packed]] TableRegister {
    std::uint16_t limit; ///< bytes, less one
    std::uint64_t base;
};

/// Loads GDT, TSS and IDT, and reloads every segment register. All 256 gates lead to dispatch_trap()
/// (traps.hpp).
void install_descriptors();

/// Changes the gate of `vector`, 0..255.
void set_gate(unsigned vector, const Gate& gate);

/// The stack for traps that arrive in user mode: TSS.RSP0.
void set_trap_stack(std::uint64_t top);

/// The top of stack 1..7 of the interrupt stack table, and its size in bytes (0 where there is none).
[[nodiscard]] std::uint64_t interrupt_stack_top(std::uint8_t stack);
inline constexpr std::uint64_t interrupt_stack_size = 8192;

[[nodiscard]] TableRegister gdt_register();
[[nodiscard]] TableRegister idt_register();

inline void load_idt(const TableRegister& table) {
    asm volatile("lidt %0" : : "m"(table));
}
inline void load_gdt(const TableRegister& table) {
    asm volatile("lgdt %0" : : "m"(table));
}

} // namespace umbra::guest
