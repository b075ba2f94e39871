// The virtual CPU: the state that the guest believes its processor is in.
#pragma once

#include "shadow/guest_walk.hpp"

#include <array>
#include <cstdint>
#include <optional>

namespace umbra {

/// General-purpose registers by their encoding in instructions (Intel SDM vol. 2A, table 3-1).
enum class Gpr : std::uint8_t {
    rax,
    rcx,
    rdx,
    rbx,
    rsp,
    rbp,
    rsi,
    rdi,
    r8,
    r9,
    r10,
    r11,
    r12,
    r13,
    r14,
    r15
};

namespace rflags {
inline constexpr std::uint64_t fixed = 1U << 1; ///< always one
inline constexpr std::uint64_t trap = 1U << 8;
inline constexpr std::uint64_t interrupt = 1U << 9;
inline constexpr std::uint64_t direction = 1U << 10;
inline constexpr std::uint64_t iopl = 3U << 12;
inline constexpr unsigned iopl_shift = 12;
inline constexpr std::uint64_t nested_task = 1U << 14;
inline constexpr std::uint64_t resume = 1U << 16;
inline constexpr std::uint64_t virtual_8086 = 1U << 17;
inline constexpr std::uint64_t alignment_check = 1U << 18;
} // namespace rflags

namespace cr0 {
inline constexpr std::uint64_t pe = 1U << 0, mp = 1U << 1, em = 1U << 2, ts = 1U << 3, et = 1U << 4,
                               ne = 1U << 5;
inline constexpr std::uint64_t wp = 1U << 16, am = 1U << 18, nw = 1U << 29, cd = 1U << 30, pg = 1U << 31;
} // namespace cr0

namespace cr4 {
inline constexpr std::uint64_t vme = 1U << 0, pvi = 1U << 1, tsd = 1U << 2, de = 1U << 3, pse = 1U << 4,
                               pae = 1U << 5;
inline constexpr std::uint64_t mce = 1U << 6, pge = 1U << 7, pce = 1U << 8, osfxsr = 1U << 9,
                               osxmmexcpt = 1U << 10;
inline constexpr std::uint64_t umip = 1U << 11, la57 = 1U << 12, fsgsbase = 1U << 16, pcide = 1U << 17;
inline constexpr std::uint64_t osxsave = 1U << 18, smep = 1U << 20, smap = 1U << 21, pke = 1U << 22;
} // namespace cr4

namespace efer {
inline constexpr std::uint64_t sce = 1U << 0, lme = 1U << 8, lma = 1U << 10, nxe = 1U << 11;
} // namespace efer

/// A segment register with its hidden part (Intel SDM vol. 3A, 3.4.3).
struct Segment {
    std::uint16_t selector = 0;
    std::uint64_t base = 0;
    std::uint32_t limit = 0; ///< in bytes, granularity applied
    std::uint8_t type = 0;   ///< the descriptor's four type bits
    std::uint8_t dpl = 0;
    bool present = false;     ///< false: the register holds a null selector
    bool system = false;      ///< descriptor bit S is 0
    bool long_mode = false;   ///< L: 64-bit code
    bool default_32 = false;  ///< D/B
    bool granularity = false; ///< G
    bool available = false;   ///< AVL

    bool operator==(const Segment&) const = default;
};

struct DescriptorTable {
    GuestVirt base;
    std::uint16_t limit = 0; ///< offset of the last byte
};

/// Exception vectors (Intel SDM vol. 3A, table 6-1).
enum class Vector : std::uint8_t {
    divide_error = 0,
    debug = 1,
    nmi = 2,
    breakpoint = 3,
    overflow = 4,
    bound = 5,
    invalid_opcode = 6,
    device_not_available = 7,
    double_fault = 8,
    invalid_tss = 10,
    segment_not_present = 11,
    stack_fault = 12,
    general_protection = 13,
    page_fault = 14,
    x87 = 16,
    alignment_check = 17,
    machine_check = 18,
    simd = 19,
};

/// An exception to be delivered to the guest.
struct Exception {
    Vector vector{};
    std::optional<std::uint32_t> error_code;
    GuestVirt address; ///< becomes CR2; page faults only

    static Exception general_protection(std::uint32_t code = 0) {
        return {Vector::general_protection, code, {}};
    }
    static Exception invalid_opcode() { return {Vector::invalid_opcode, std::nullopt, {}}; }
    static Exception page_fault(const PageFault& fault) {
        return {Vector::page_fault, fault.error_code, fault.address};
    }
};

/// All architectural state but FPU/SSE/AVX, which stays in the machine's vCPU.
struct VirtualCpu {
    std::array<std::uint64_t, 16> gpr{};
    std::uint64_t rip = 0;
    std::uint64_t rflags = rflags::fixed; ///< as the guest believes: virtual IF and IOPL
    std::uint8_t cpl = 0;                 ///< virtual privilege level

    Segment es, cs, ss, ds, fs, gs, ldtr, tr;
    DescriptorTable gdtr, idtr;

    std::uint64_t cr0 = 0, cr2 = 0, cr3 = 0, cr4 = 0, cr8 = 0, efer = 0;
    std::array<std::uint64_t, 4> pdptes{}; ///< PAE paging: loaded with CR3 by load_pdptes
    std::array<std::uint64_t, 4> dr{};
    std::uint64_t dr6 = 0xffff0ff0, dr7 = 0x400;

    // Model-specific registers that the monitor keeps.
    std::uint64_t star = 0, lstar = 0, cstar = 0, fmask = 0, kernel_gs_base = 0, tsc_aux = 0;
    std::uint64_t sysenter_cs = 0, sysenter_esp = 0, sysenter_eip = 0;
    std::uint64_t pat = 0x0007040600070406;

    bool halted = false;      ///< in HLT, waiting for an interrupt
    bool nmi_blocked = false; ///< from the delivery of an NMI to the next IRET (Intel SDM vol. 3A, 6.7.1)

    [[nodiscard]] std::uint64_t& operator[](Gpr reg) { return gpr[static_cast<std::size_t>(reg)]; }
    [[nodiscard]] std::uint64_t operator[](Gpr reg) const { return gpr[static_cast<std::size_t>(reg)]; }
    [[nodiscard]] bool interrupts_enabled() const { return (rflags & rflags::interrupt) != 0; }
    [[nodiscard]] unsigned iopl() const {
        return static_cast<unsigned>((rflags & rflags::iopl) >> rflags::iopl_shift);
    }
};

/// The CR4 bits that a CPU with these feature words has, of those that umbra knows (Intel SDM vol. 3A, 2.5).
[[nodiscard]] constexpr std::uint64_t cr4_offered(std::uint32_t leaf1_ecx, std::uint32_t leaf7_ebx,
                                                  std::uint32_t leaf7_ecx) {
    const auto with = [](std::uint32_t word, unsigned bit, std::uint64_t flag) {
        return (word >> bit & 1) != 0 ? flag : 0;
    };
    return cr4::tsd | cr4::de | cr4::pse | cr4::pae | cr4::mce | cr4::pge | cr4::pce | cr4::osfxsr |
           cr4::osxmmexcpt | with(leaf1_ecx, 17, cr4::pcide) | with(leaf1_ecx, 26, cr4::osxsave) |
           with(leaf7_ebx, 0, cr4::fsgsbase) | with(leaf7_ebx, 7, cr4::smep) |
           with(leaf7_ebx, 20, cr4::smap) | with(leaf7_ecx, 2, cr4::umip);
}

/// The paging mode that the control registers select (Intel SDM vol. 3A, 4.1.1).
[[nodiscard]] constexpr const PagingFormat& paging_format(const VirtualCpu& cpu) {
    if ((cpu.cr0 & cr0::pg) == 0)
        return paging_off;
    if ((cpu.cr4 & cr4::pae) == 0)
        return (cpu.cr4 & cr4::pse) != 0 ? paging_32_bit_pse : paging_32_bit;
    if ((cpu.efer & efer::lma) == 0)
        return paging_pae;
    return (cpu.cr4 & cr4::la57) != 0 ? paging_5_level : paging_4_level;
}

/// The part of the CPU's state that decides how its page tables are read. `physical_bits`, `gigabyte_pages`:
/// what its CPUID offers. PKRU is not among VirtualCpu's registers: protection keys are not offered.
[[nodiscard]] inline GuestPaging guest_paging(const VirtualCpu& cpu, unsigned physical_bits,
                                              bool gigabyte_pages) {
    constexpr std::uint64_t low_half = 0xffff'ffff, pdpt_mask = 0xffff'ffe0, pcid_mask = 0xfff;
    GuestPaging paging;
    paging.format = &paging_format(cpu);
    const std::uint64_t cr3 = paging.format->long_mode() ? cpu.cr3 : cpu.cr3 & low_half;
    paging.root = GuestPhys(cr3 & entry_bit::frame_mask).frame();
    paging.write_protect = (cpu.cr0 & cr0::wp) != 0;
    paging.no_execute = (cpu.efer & efer::nxe) != 0;
    paging.smep = (cpu.cr4 & cr4::smep) != 0;
    paging.smap = (cpu.cr4 & cr4::smap) != 0;
    paging.gigabyte_pages = gigabyte_pages;
    paging.physical_bits = physical_bits;
    paging.global_pages = (cpu.cr4 & cr4::pge) != 0;
    if ((cpu.cr4 & cr4::pcide) != 0)
        paging.pcid = static_cast<std::uint16_t>(cpu.cr3 & pcid_mask);
    if (paging.format == &paging_pae) {
        paging.pdptes = cpu.pdptes;
        paging.pdpt = GuestPhys(cr3 & pdpt_mask);
    }
    return paging;
}

} // namespace umbra
