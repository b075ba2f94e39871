// The privileged instructions that guests use, one function each, and the bits they deal in.
// Intel SDM vol. 3A ch. 2 (control registers), vol. 4 (MSRs).
//
// There is no function that saves and restores the interrupt flag by pushf and popf: some hosts cannot trap
// these two. Guests of umbra say sti and cli.
#pragma once

#include <cstddef>
#include <cstdint>

namespace umbra::guest {

// Ports

inline void out8(std::uint16_t port, std::uint8_t value) {
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}
inline void out32(std::uint16_t port, std::uint32_t value) {
    asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}
inline std::uint8_t in8(std::uint16_t port) {
    std::uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
inline std::uint16_t in16(std::uint16_t port) {
    std::uint16_t value;
    asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
inline std::uint32_t in32(std::uint16_t port) {
    std::uint32_t value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
inline void out8_string(std::uint16_t port, const void* bytes, std::size_t count) {
    asm volatile("rep outsb" : "+S"(bytes), "+c"(count) : "d"(port) : "memory");
}

// Control registers

inline constexpr std::uint64_t cr0_wp = std::uint64_t{1} << 16;
inline constexpr std::uint64_t cr0_am = std::uint64_t{1} << 18;
inline constexpr std::uint64_t cr3_pcid = 0xfff;                      ///< with CR4.PCIDE
inline constexpr std::uint64_t cr3_no_flush = std::uint64_t{1} << 63; ///< with CR4.PCIDE; reads as 0
inline constexpr std::uint64_t cr4_pge = std::uint64_t{1} << 7;
inline constexpr std::uint64_t cr4_pcide = std::uint64_t{1} << 17;
inline constexpr std::uint64_t cr4_smap = std::uint64_t{1} << 21;

#define UMBRA_GUEST_CONTROL_REGISTER(name)                                                                   \
    inline std::uint64_t read_##name() {                                                                     \
        std::uint64_t value;                                                                                 \
        asm volatile("mov %%" #name ", %0" : "=r"(value) : : "memory");                                      \
        return value;                                                                                        \
    }                                                                                                        \
    inline void write_##name(std::uint64_t value) {                                                          \
        asm volatile("mov %0, %%" #name : : "r"(value) : "memory");                                          \
    }
UMBRA_GUEST_CONTROL_REGISTER(cr0)
UMBRA_GUEST_CONTROL_REGISTER(cr2)
UMBRA_GUEST_CONTROL_REGISTER(cr3)
UMBRA_GUEST_CONTROL_REGISTER(cr4)
UMBRA_GUEST_CONTROL_REGISTER(dr6)
#undef UMBRA_GUEST_CONTROL_REGISTER

inline void invlpg(std::uint64_t address) {
    asm volatile("invlpg (%0)" : : "r"(address) : "memory");
}

/// What INVPCID drops (Intel SDM vol. 2A).
enum class InvpcidType : std::uint64_t { address = 0, context = 1, all_and_global = 2, all = 3 };

inline void invpcid(InvpcidType type, std::uint64_t pcid = 0, std::uint64_t address = 0) {
    const std::uint64_t descriptor[2] = {pcid, address};
    asm volatile("invpcid %0, %1" : : "m"(descriptor), "r"(type) : "memory");
}

// Flags and waiting

inline constexpr std::uint64_t rflags_fixed = 0x2; ///< bit 1 always reads 1
inline constexpr std::uint64_t rflags_tf = std::uint64_t{1} << 8;
inline constexpr std::uint64_t rflags_if = std::uint64_t{1} << 9;
inline constexpr std::uint64_t rflags_ac = std::uint64_t{1} << 18;

inline void enable_interrupts() {
    asm volatile("sti" : : : "memory");
}
inline void disable_interrupts() {
    asm volatile("cli" : : : "memory");
}
/// With SMAP the kernel reaches user pages between these two: they set and clear RFLAGS.AC.
inline void stac() {
    asm volatile("stac" : : : "memory", "cc");
}
inline void clac() {
    asm volatile("clac" : : : "memory", "cc");
}
/// Waits for the next interrupt, also one that is already pending: `sti` holds it back until `hlt` is
/// reached.
inline void wait_for_interrupt() {
    asm volatile("sti\n hlt" : : : "memory");
}

// Model-specific registers

inline constexpr std::uint32_t msr_apic_base = 0x1b;
inline constexpr std::uint32_t msr_efer = 0xc000'0080;
inline constexpr std::uint32_t msr_star = 0xc000'0081;
inline constexpr std::uint32_t msr_lstar = 0xc000'0082;
inline constexpr std::uint32_t msr_fmask = 0xc000'0084;
inline constexpr std::uint32_t msr_fs_base = 0xc000'0100;
inline constexpr std::uint32_t msr_gs_base = 0xc000'0101;
inline constexpr std::uint32_t msr_kernel_gs_base = 0xc000'0102;

inline constexpr std::uint64_t efer_sce = std::uint64_t{1} << 0;
inline constexpr std::uint64_t efer_nxe = std::uint64_t{1} << 11;

inline std::uint64_t read_msr(std::uint32_t index) {
    std::uint32_t low;
    std::uint32_t high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return (std::uint64_t{high} << 32) | low;
}
inline void write_msr(std::uint32_t index, std::uint64_t value) {
    asm volatile("wrmsr"
                 :
                 : "c"(index), "a"(static_cast<std::uint32_t>(value)),
                   "d"(static_cast<std::uint32_t>(value >> 32))
                 : "memory");
}

// What the CPU can do

struct Cpuid {
    std::uint32_t eax, ebx, ecx, edx;
};
inline Cpuid cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
    Cpuid result{};
    asm volatile("cpuid"
                 : "=a"(result.eax), "=b"(result.ebx), "=c"(result.ecx), "=d"(result.edx)
                 : "a"(leaf), "c"(subleaf));
    return result;
}
/// Bits in a physical address (MAXPHYADDR).
inline unsigned physical_address_bits() {
    return cpuid(0x8000'0008).eax & 0xff;
}
inline bool has_1g_pages() {
    return (cpuid(0x8000'0001).edx & (1U << 26)) != 0;
}

inline bool has_pcid() {
    return (cpuid(1).ecx & (1U << 17)) != 0;
}
inline bool has_invpcid() {
    return (cpuid(7).ebx & (1U << 10)) != 0;
}
inline bool has_smap() {
    return (cpuid(7).ebx & (1U << 20)) != 0;
}

inline std::uint64_t read_tsc() {
    std::uint32_t low;
    std::uint32_t high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high));
    return (std::uint64_t{high} << 32) | low;
}

} // namespace umbra::guest
