// A 32-bit kernel's machine: its descriptor tables, traps, programs of ring 3, and the timer. Intel SDM vol.
// 3A ch. 3, 5, 6 and 7; Intel 8259A and 8254 data sheets.
#pragma once

#include "guest/legacy/runtime.hpp"

namespace umbra::legacy {

inline constexpr uint16_t kernel_code = 0x08, kernel_data = 0x10, user_code = 0x1b, user_data = 0x23,
                          task_state = 0x28, kernel_code64 = 0x30, absent_segment = 0x38;

inline constexpr uint32_t vector_de = 0, vector_bp = 3, vector_of = 4, vector_ud = 6, vector_np = 11,
                          vector_gp = 13, vector_pf = 14, vector_timer = 0x20, vector_leave = 0x80,
                          vector_double = 0x81;

/// The machine as a trap found it.
struct Trap {
    uint32_t es, ds;
    uint32_t edi, esi, ebp, unused, ebx, edx, ecx, eax;
    uint32_t vector, error; ///< error: 0 for a vector that has none
    uint32_t eip, cs, eflags;
    uint32_t user_esp, user_ss; ///< there only if it came from ring 3

    [[nodiscard]] bool from_user() const { return (cs & 3) == 3; }
};

/// Loads the GDT, all segment registers, the task register and the IDT.
void init_descriptors();

/// Of the last trap that was no interrupt.
struct LastTrap {
    static constexpr uint32_t none = ~0U;

    uint32_t vector = none, error = 0, eip = 0, cr2 = 0;
    uint32_t eax = 0, edx = 0;
    bool from_user = false;
};
extern LastTrap last_trap;
extern volatile uint32_t ticks; ///< of the timer

/// Where the kernel goes on after its next trap; the trap resets it. For EXPECTING_TRAP.
extern "C" volatile uint32_t resume_address;

/// Executes an instruction, in the syntax of extended asm, which may trap: last_trap tells.
#define EXPECTING_TRAP(instruction, ...)                                                                     \
    do {                                                                                                     \
        ::umbra::legacy::last_trap = {};                                                                     \
        asm volatile("movl $1f, resume_address\n\t" instruction "\n1:\n\t"                                   \
                     "movl $0, resume_address" __VA_ARGS__);                                                 \
    } while (false)

/// Runs a program of ring 3 (traps.S) until it traps, or, with interrupts, until the timer's tick `deadline`.
void run_user(const char* program, uint32_t ecx, uint32_t deadline = 0);

extern "C" const char user_read[], user_write[], user_fetch[], user_call[], user_hlt[], user_cli[],
    user_cr0[], user_out[], user_int[], user_segment[], user_far[], user_loop[];
/// Pages that programs of ring 3 must be able to use (kernel.ld).
extern "C" const char user_begin[], user_end[];

/// Makes the timer interrupt so many times a second; at least 19.
void start_timer(uint32_t hz);
/// Waits until it has ticked so often, in hlt.
void wait_ticks(uint32_t count);
void stop_timer();

} // namespace umbra::legacy
