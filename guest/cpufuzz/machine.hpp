// What programs of cpufuzz run on: an arena of pages with holes between them, descriptor tables of their own,
// and the way into a program and back.
#pragma once

#include "guest/runtime/paging.hpp"

#include <cstdint>

namespace umbra::guest::cpufuzz {

// ---- the arena: below 4 GB, for code of 32 bits; what is not named is not mapped

inline constexpr std::uint64_t arena = 0x7000'0000;
inline constexpr std::uint64_t code_page = arena + 0x1000;      ///< of the program, for both levels
inline constexpr std::uint64_t data_page = arena + 0x3000;      ///< for both levels
inline constexpr std::uint64_t read_only_page = arena + 0x5000; ///< for both levels
inline constexpr std::uint64_t supervisor_page =
    arena + 0x6000; ///< from here on for level 0 only, but for ...
inline constexpr std::uint64_t user_stack_page = arena + 0x8000; ///< ... this one
inline constexpr std::uint64_t kernel_stack_page = arena + 0xa000;
inline constexpr std::uint64_t trap_stack_page = arena + 0xc000;      ///< TSS.RSP0
inline constexpr std::uint64_t fault_stack_page = arena + 0xe000;     ///< IST1, of #DF
inline constexpr std::uint64_t special_stack_page = arena + 0x1'0000; ///< IST2 and others
inline constexpr std::uint64_t gdt_page = arena + 0x1'2000;
inline constexpr std::uint64_t ldt_page = arena + 0x1'4000;
inline constexpr std::uint64_t tss_page = arena + 0x1'6000;
inline constexpr std::uint64_t idt_page = arena + 0x1'8000;
inline constexpr std::uint64_t unmapped = arena + 0x9800; ///< in one of the holes
inline constexpr std::uint64_t not_canonical = std::uint64_t{0x8000} << 32;

// ---- descriptor tables. What the GDT's limit admits goes on in a page that is not there.

inline constexpr unsigned gdt_slots = 64, gdt_slots_admitted = 2 * gdt_slots, ldt_slots = 16;
inline constexpr std::uint64_t gdt_base = gdt_page + page_4k - gdt_slots * 8;
inline constexpr std::uint64_t ldt_base = ldt_page + page_4k - ldt_slots * 8;

// Selectors that every program finds. The order serves SYSCALL and SYSRET. Code of 16 bits and its data have
// their base at the arena.
inline constexpr std::uint16_t kernel_code_64 = 0x08, kernel_data = 0x10, task = 0x18, local_table = 0x28,
                               user_code_32 = 0x38 | 3, user_data = 0x40 | 3, user_code_64 = 0x48 | 3,
                               kernel_code_32 = 0x50, kernel_code_16 = 0x58, user_code_16 = 0x60 | 3,
                               kernel_data_16 = 0x68, user_data_16 = 0x70 | 3;
inline constexpr unsigned first_random_slot = 15;

/// A vector whose gate is always good, of DPL 3: the last instruction of each program.
inline constexpr unsigned vector_end = 0x7f;
/// The vector of the interrupt that is pending when some programs begin.
inline constexpr unsigned vector_pending = 0x60;
/// `int n` from here on finds gates of all kinds.
inline constexpr unsigned first_random_gate = 0x80, random_gates = 16;

/// How the kernel was entered otherwise than by a vector (entry.S).
enum Entry : unsigned { syscall_64 = 256, syscall_32 = 257, sysenter = 258, call_gate = 259 };

/// What a program may have changed besides memory and the CPU's registers: put back after it, and part of its
/// result.
enum Changed : std::uint32_t {
    changed_gdtr = 1,
    changed_idtr = 2,
    changed_ldtr = 4,
    changed_tr = 8,
    changed_control = 16, ///< CR0, CR4
    changed_cr8 = 1024,
    changed_cr3 = 32,
    changed_fs = 64,  ///< its base
    changed_gs = 512, ///< its base
    changed_msrs = 128,
    changed_debug = 256,
};

/// The state in which a program begins.
struct Start {
    std::uint64_t rip = 0, cs = 0, rflags = 0, rsp = 0, ss = 0;
    std::uint16_t data = 0; ///< DS and ES
    bool interrupt = false; ///< one is pending
};

/// One entry of the kernel.
struct Happened {
    std::uint64_t vector = 0; ///< or an Entry
    std::uint64_t error = 0, rip = 0, cs = 0, rflags = 0, rsp = 0, ss = 0;
    std::uint64_t has_error = 0;
    std::uint64_t address = 0;        ///< CR2 of #PF, DR6 of #DB
    std::uint64_t data[4] = {};       ///< DS, ES, FS, GS
    std::uint64_t registers[16] = {}; ///< by their numbers; RSP is the kernel's
};
inline constexpr unsigned max_happened = 12;

/// How a program went.
struct Outcome {
    Happened happened[max_happened];
    unsigned count = 0;
    std::uint64_t system[12] = {}; ///< registers that it may have changed; 0 if it cannot have
    std::uint64_t memory = 0;      ///< a checksum of what it may have written
};

/// The host's CPU is QEMU's emulation: what that does wrong is put right or left out (cpufuzz.cpp).
struct Peculiarities {
    bool native = false; ///< the guest runs on it as its kernel
    bool any = false;    ///< some of the guest's instructions run on it
};

/// Makes the arena and loads the tables. To be called once.
void set_up(const Peculiarities& peculiarities);
/// Puts memory and tables back as every program finds them, but for what is random.
void restore_memory();
/// Puts back what `changed` names.
void restore_registers(std::uint32_t changed);
/// Runs a program of `registers` (by number, without RSP).
void run(const Start& start, const std::uint64_t (&registers)[16], std::uint32_t changed, Outcome& outcome);

/// CR3 of the arena.
std::uint64_t usual_cr3();
/// Entry points for gates.
std::uint64_t stub_of(unsigned vector);
std::uint64_t call_gate_entry();

/// Writes a gate of the IDT. `type` with DPL and P, as in the descriptor.
void write_gate(unsigned vector, std::uint64_t selector, std::uint64_t type, std::uint64_t stack);

} // namespace umbra::guest::cpufuzz
