// What an instruction does to memory, and what must be known to step over it: watchpoints, gdb's and the
// guest's own, are exact to the byte because the instruction that met a guarded page is asked which bytes it
// means.
#pragma once

#include "shadow/address.hpp"
#include "vmm/cpu.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace umbra {

/// The size of addresses and operands that code runs with (Intel SDM vol. 3A, 2.2).
enum class CodeMode : std::uint8_t { bits_16, bits_32, bits_64 };

[[nodiscard]] CodeMode code_mode(const VirtualCpu& cpu);

/// Bytes that an instruction reads, writes or both.
struct MemoryAccess {
    GuestVirt at; ///< linear address
    std::uint64_t size = 0;
    bool read = false;
    bool write = false;

    bool operator==(const MemoryAccess&) const = default;
};

/// All data accesses of the instruction at RIP, whose bytes begin `code`, with the registers of `cpu` before
/// it; of a repeated string instruction those of the next iteration. Descriptor tables and the frames that
/// interrupts push are no operands. Nothing if that cannot be told: code that cannot be decoded, gathers,
/// moves under a mask, XSAVE and its kin, whose size is the CPU's, ENTER into an inner procedure, and IRET
/// outside 64-bit mode.
[[nodiscard]] std::optional<std::vector<MemoryAccess>> memory_accesses(const VirtualCpu& cpu,
                                                                       std::span<const std::byte> code);

/// Instructions that are not stepped over by EFLAGS.TF alone.
enum class StepKind : std::uint8_t {
    plain,
    pushes_flags, ///< PUSHF: the flag that umbra has set is in what was pushed
    pops_flags,   ///< POPF: the flag is what was popped
    by_iopl,      ///< CLI, STI, IN, OUT: the machine leaves them to umbra if it is not given IOPL for them
    string_io,    ///< INS, OUTS: the same
    int1,         ///< its #DB is none of a step
};
[[nodiscard]] StepKind step_kind(std::span<const std::byte> code, CodeMode mode);

} // namespace umbra
