// Segment descriptors: loading segment registers, LDTR and TR from the guest's tables with the CPU's checks.
//
// Long mode (64-bit code and compatibility mode) and legacy protected mode (Intel SDM vol. 3A, 3.4, 3.5, 5.2
// to 5.8 and chapter 8).
#pragma once

#include "vmm/cpu.hpp"
#include "vmm/guest_space.hpp"

#include <string_view>

namespace umbra {

/// Segment registers by their encoding in instructions (Intel SDM vol. 2, table B-8).
enum class SegmentRegister : std::uint8_t { es, cs, ss, ds, fs, gs };

[[nodiscard]] Segment& segment(VirtualCpu& cpu, SegmentRegister reg);

/// A segment selector (Intel SDM vol. 3A, 3.4.2).
namespace selector {
inline constexpr std::uint16_t rpl_mask = 3;
inline constexpr std::uint16_t local = 1U << 2; ///< TI: refers to the LDT
[[nodiscard]] constexpr std::uint8_t rpl(std::uint16_t selector) {
    return selector & rpl_mask;
}
[[nodiscard]] constexpr bool null(std::uint16_t selector) {
    return (selector & ~rpl_mask) == 0;
}
/// As it appears in an error code, without the EXT bit.
[[nodiscard]] constexpr std::uint16_t error_code(std::uint16_t selector) {
    return static_cast<std::uint16_t>(selector & ~rpl_mask);
}
} // namespace selector

/// Descriptor types: of system descriptors (Intel SDM vol. 3A, table 3-2; those with 16 in the name and the
/// task gate do not exist in long mode), and the bits of segment types (table 3-1).
namespace descriptor_type {
inline constexpr std::uint8_t tss_16_available = 0x1, ldt = 0x2, tss_16_busy = 0x3, call_gate_16 = 0x4,
                              task_gate = 0x5, interrupt_gate_16 = 0x6, trap_gate_16 = 0x7,
                              tss_available = 0x9, tss_busy = 0xb, call_gate = 0xc, interrupt_gate = 0xe,
                              trap_gate = 0xf;
inline constexpr std::uint8_t accessed = 1, writable = 2, readable = 2, expand_down = 4, conforming = 4,
                              code = 8;
} // namespace descriptor_type

[[nodiscard]] inline bool is_code(const Segment& segment) {
    return !segment.system && (segment.type & descriptor_type::code) != 0;
}
[[nodiscard]] inline bool is_conforming(const Segment& segment) {
    return is_code(segment) && (segment.type & descriptor_type::conforming) != 0;
}
[[nodiscard]] inline bool is_writable_data(const Segment& segment) {
    return !segment.system && !is_code(segment) && (segment.type & descriptor_type::writable) != 0;
}

/// Whether the CPU is in 64-bit or compatibility mode: EFER.LMA.
[[nodiscard]] inline bool in_long_mode(const VirtualCpu& cpu) {
    return (cpu.efer & efer::lma) != 0;
}
/// Why neither events nor instructions are emulated in the CPU's mode, if they are not: real mode,
/// virtual-8086 mode, or a 64-bit code segment outside long mode, which no load leaves behind. Static text.
[[nodiscard]] std::optional<std::string_view> unsupported_mode(const VirtualCpu& cpu);
/// A linear address: of 32 bits outside long mode.
[[nodiscard]] inline GuestVirt linear(const VirtualCpu& cpu, std::uint64_t at) {
    return GuestVirt(in_long_mode(cpu) ? at : static_cast<std::uint32_t>(at));
}

/// The linear address of the instruction at RIP.
[[nodiscard]] inline GuestVirt linear_rip(const VirtualCpu& cpu) {
    return cpu.cs.long_mode ? GuestVirt(cpu.rip) : linear(cpu, cpu.cs.base + cpu.rip);
}

/// The linear address of the `size` bytes at `offset` of a segment, for all code but 64-bit code; nothing if
/// the segment is null, too short, or not to be read or written (Intel SDM vol. 3A, 5.3 and 5.5).
[[nodiscard]] std::optional<GuestVirt> address_in_segment(const Segment& segment, std::uint64_t offset,
                                                          std::size_t size, bool write);

/// Reads the 8-byte descriptor that `selector` names in the GDT or LDT, as an implicit supervisor access.
/// `into.present` is the descriptor's P bit. A null selector is #GP(ext); one outside its table, or at a
/// non-canonical address, #GP(selector | ext). Outside long mode the L bit is ignored. `ext` is 1 if an event
/// outside the program caused the access (Intel SDM vol. 3A, 6.13).
[[nodiscard]] std::optional<Exception> read_descriptor(const VirtualCpu& cpu, const GuestSpace& space,
                                                       std::uint16_t selector, Segment& into,
                                                       std::uint32_t ext = 0);

/// What LAR, LSL, VERR and VERW find by `selector` (Intel SDM vol. 2A, LAR): its descriptor, or nothing if it
/// names none that exists, or that the CPU's level and the selector's RPL may know of. Gates, and system
/// segments of 16 bits in long mode, are for the caller to refuse. A page fault in the table is one of the
/// instruction.
struct VisibleDescriptor {
    std::optional<std::uint64_t> raw; ///< its first eight bytes
    Segment segment;                  ///< the same, taken apart
};
[[nodiscard]] std::optional<Exception> find_visible_descriptor(const VirtualCpu& cpu, const GuestSpace& space,
                                                               std::uint16_t selector,
                                                               VisibleDescriptor& into);

/// Sets the accessed bit of the descriptor that `segment` was read from, in memory and in `segment`.
[[nodiscard]] std::optional<Exception> mark_accessed(const VirtualCpu& cpu, const GuestSpace& space,
                                                     Segment& segment);

/// MOV, POP, LSS … to `reg`, which is not CS. Nothing is changed when an exception is returned. The interrupt
/// shadow of a load of SS is the caller's affair.
[[nodiscard]] std::optional<Exception> load_segment(VirtualCpu& cpu, const GuestSpace& space,
                                                    SegmentRegister reg, std::uint16_t selector);

/// The checks of a return (IRET, far RET) to `selector` at the privilege level of its RPL: `into` becomes the
/// new CS. The caller checks the instruction pointer and loads the register.
[[nodiscard]] std::optional<Exception> check_return_code_segment(const VirtualCpu& cpu,
                                                                 const GuestSpace& space,
                                                                 std::uint16_t selector, Segment& into);

/// The checks on SS that a return makes: `new_cpl` is the RPL of the returned-to CS, `to_64_bit` its L bit.
[[nodiscard]] std::optional<Exception>
check_return_stack_segment(const VirtualCpu& cpu, const GuestSpace& space, std::uint16_t selector,
                           std::uint8_t new_cpl, bool to_64_bit, Segment& into);

/// The checks of a far JMP or CALL to code at the same privilege level. `into` becomes the new CS; its
/// `system` bit is set instead when the selector names a call gate or, outside long mode, a task gate or an
/// available TSS, which nothing here follows.
[[nodiscard]] std::optional<Exception> check_jump_code_segment(const VirtualCpu& cpu, const GuestSpace& space,
                                                               std::uint16_t selector, Segment& into);

/// A return to an outer level takes away DS, ES, FS and GS that the new level may not use: the selector
/// becomes null (Intel SDM vol. 3A, 5.8.6). Bases stay. To be called with the new cpu.cpl.
void drop_inner_data_segments(VirtualCpu& cpu);

/// LLDT and LTR: #GP or #NP with the selector; a null selector empties LDTR and is #GP(0) for TR. LTR marks
/// the TSS busy in the GDT. The descriptor has 16 bytes in long mode, 8 in legacy mode, where the TSS may be
/// one of 16 bits.
[[nodiscard]] std::optional<Exception> load_ldtr(VirtualCpu& cpu, const GuestSpace& space,
                                                 std::uint16_t selector);
[[nodiscard]] std::optional<Exception> load_tr(VirtualCpu& cpu, const GuestSpace& space,
                                               std::uint16_t selector);

/// What SYSCALL and SYSRET put into CS and SS without looking at a table (Intel SDM vol. 2B, SYSCALL).
[[nodiscard]] Segment flat_code_segment(std::uint16_t selector, std::uint8_t dpl, bool long_mode);
[[nodiscard]] Segment flat_stack_segment(std::uint16_t selector, std::uint8_t dpl);

} // namespace umbra
