// User mode as a function call: run_user() goes to CPL 3 and returns when the program traps.
#pragma once

#include "guest/runtime/descriptors.hpp"
#include "guest/runtime/paging.hpp"
#include "guest/runtime/traps.hpp"

#include <cstdint>

namespace umbra::guest {

/// What SWAPGS brings into reach of a trap from user mode. traps.S knows the layout.
struct PerCpu {
    std::uint64_t kernel_stack = 0;
    std::uint64_t user_stack = 0; ///< scratch of the system call entry
    std::uint64_t syscall_cs = user_code;
    std::uint64_t syscall_ss = user_data;
};

/// Sets STAR, LSTAR, FMASK, EFER.SCE, TSS.RSP0 and both GS bases (the program's is 0). To be called once,
/// after install_descriptors().
void enable_user_mode();

/// Where the stack of traps and system calls from user mode begins.
[[nodiscard]] std::uint64_t trap_stack_top();

/// Defines a program for user mode: a function of nothing but position-independent assembly, for
/// map_programs() to copy.
#define USER_PROGRAM(name, text)                                                                             \
    [[gnu::naked, gnu::used, gnu::section(".text.user")]] void name() {                                      \
        asm(text);                                                                                           \
    }                                                                                                        \
    static_assert(true)

/// Copies all programs into fresh pages, executable and read-only, that `space` maps from `base` (page
/// aligned) on.
void map_programs(const AddressSpace& space, std::uint64_t base);

/// Where a copied program begins.
[[nodiscard]] std::uint64_t program_address(void (*program)());

/// The frame of a program that begins at `rip` with interrupts off; its other registers are 0.
[[nodiscard]] TrapFrame user_frame(std::uint64_t rip, std::uint64_t rsp);

enum class EnterUserBy : std::uint8_t { iret, sysret };

/// Runs the program from `frame` until it traps with no handler set, or makes a system call; `frame` then
/// holds its state. SYSRET takes RIP from RCX and RFLAGS from R11, as the instruction does, so these two
/// change.
void run_user(TrapFrame& frame, EnterUserBy by = EnterUserBy::iret);

/// Returns from run_user() with `frame`. For dispatch_trap() only.
[[noreturn]] void end_user(const TrapFrame& frame);

} // namespace umbra::guest
