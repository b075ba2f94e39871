// Exceptions, interrupts and system calls: one frame for all of them, handlers that may read and change it,
// and a way to run a single instruction and see how it trapped. Intel SDM vol. 3A ch. 6.
#pragma once

#include <cstdint>

namespace umbra::guest {

inline constexpr unsigned vector_de = 0;
inline constexpr unsigned vector_db = 1;
inline constexpr unsigned vector_bp = 3;
inline constexpr unsigned vector_ud = 6;
inline constexpr unsigned vector_df = 8;
inline constexpr unsigned vector_np = 11;
inline constexpr unsigned vector_ss = 12;
inline constexpr unsigned vector_gp = 13;
inline constexpr unsigned vector_pf = 14;
inline constexpr unsigned vector_syscall = 256; ///< no vector of the CPU: how `syscall` appears in a frame
inline constexpr unsigned vector_none = 257;    ///< nothing trapped

// Error code of a page fault
inline constexpr std::uint64_t pf_present = 1;
inline constexpr std::uint64_t pf_write = 2;
inline constexpr std::uint64_t pf_user = 4;
inline constexpr std::uint64_t pf_reserved = 8;
inline constexpr std::uint64_t pf_fetch = 16;

/// The CPU's state when it trapped, in the order in which the stubs (traps.S) and the CPU push it. What a
/// handler writes here is what the interrupted code continues with.
struct TrapFrame {
    std::uint64_t r15 = 0, r14 = 0, r13 = 0, r12 = 0, r11 = 0, r10 = 0, r9 = 0, r8 = 0;
    std::uint64_t rbp = 0, rdi = 0, rsi = 0, rdx = 0, rcx = 0, rbx = 0, rax = 0;
    std::uint64_t vector = 0; ///< 0..255, or `vector_syscall`
    std::uint64_t error = 0;  ///< 0 where the CPU pushes none
    std::uint64_t rip = 0, cs = 0, rflags = 0, rsp = 0, ss = 0;

    [[nodiscard]] bool from_user() const { return (cs & 3) == 3; }
};

using TrapHandler = void (*)(TrapFrame& frame);

/// From now on `handler` gets `vector` (0..255); null restores the default: a trap that no PROBE awaits ends
/// the run.
void set_handler(unsigned vector, TrapHandler handler);

/// What became of a PROBE.
struct Trap {
    TrapFrame frame{.vector = vector_none}; ///< `vector_none`: the instruction completed
    std::uint64_t cr2 = 0;                  ///< of a page fault
    std::uint64_t start = 0;                ///< where the probed instruction begins
    std::uint64_t end = 0;                  ///< where it ends

    [[nodiscard]] bool none() const { return frame.vector == vector_none; }
    /// A fault: reported at the instruction, which has done nothing.
    [[nodiscard]] bool is_fault(unsigned vector, std::uint64_t error = 0) const {
        return frame.vector == vector && frame.error == error && frame.rip == start;
    }
    /// A trap: reported behind the instruction, which is done.
    [[nodiscard]] bool is_trap(unsigned vector) const {
        return frame.vector == vector && frame.error == 0 && frame.rip == end;
    }
    [[nodiscard]] bool is_page_fault(std::uint64_t error, std::uint64_t address) const {
        return is_fault(vector_pf, error) && cr2 == address;
    }
};

/// Ends a PROBE; returns how it went. For the macro only.
Trap take_trap();

/// Runs `instruction`; a trap in it is recorded and skips what is left of it. The rest is as in an extended
/// asm statement: `PROBE("mov (%0), %%rax", : : "r"(address) : "rax")`.
#define PROBE(instruction, ...) PROBE_SEQUENCE("", instruction, "", __VA_ARGS__)

/// As PROBE, with instructions before and after that run unprobed and in any case.
#define PROBE_SEQUENCE(before, instruction, after, ...)                                                      \
    [&] {                                                                                                    \
        asm volatile("" : : : "memory");                                                                     \
        asm volatile("movq $770f, probe_start\n"                                                             \
                     "movq $771f, probe_end\n" before "\n"                                                   \
                     "770: " instruction "\n"                                                                \
                     "771: " after "\n" __VA_ARGS__);                                                        \
        asm volatile("" : : : "memory");                                                                     \
        return ::umbra::guest::take_trap();                                                                  \
    }()

/// Single accesses, probed. A fetch calls the code at `address`; a trap there has its RIP equal to `address`.
Trap probe_read(std::uint64_t address);
Trap probe_write(std::uint64_t address, std::uint64_t value);
Trap probe_fetch(std::uint64_t address);

/// Prints a frame: for traps that nobody expected.
void print_frame(const TrapFrame& frame);

/// The 256 entry points, 16 bytes each (traps.S).
struct alignas(16) TrapStub {
    std::uint8_t code[16];
};
extern "C" const TrapStub trap_stubs[256];

} // namespace umbra::guest
