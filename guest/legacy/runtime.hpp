// What 32-bit guest kernels need: ports, control registers, a console, checks, and the end of the run.
//
// They are not built on guest/runtime, which is for 64-bit mode, and include C's headers instead of C++'s,
// whose 32-bit configuration is not installed with a 64-bit compiler.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace umbra::legacy {

// Ports

inline void out8(uint16_t port, uint8_t value) {
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}
inline void out32(uint16_t port, uint32_t value) {
    asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}
inline uint8_t in8(uint16_t port) {
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

// Control registers and MSRs: Intel SDM vol. 3A ch. 2, vol. 4

inline constexpr uint32_t cr0_pe = 1U << 0;
inline constexpr uint32_t cr0_wp = 1U << 16;
inline constexpr uint32_t cr0_pg = 1U << 31;
inline constexpr uint32_t cr4_pse = 1U << 4;
inline constexpr uint32_t cr4_pae = 1U << 5;
inline constexpr uint32_t msr_efer = 0xc000'0080;
inline constexpr uint32_t efer_lme = 1U << 8;
inline constexpr uint32_t efer_lma = 1U << 10;
inline constexpr uint32_t efer_nxe = 1U << 11;
inline constexpr uint32_t eflags_if = 1U << 9;
inline constexpr uint32_t eflags_vm = 1U << 17;

#define UMBRA_LEGACY_CONTROL_REGISTER(name)                                                                  \
    inline uint32_t read_##name() {                                                                          \
        uint32_t value;                                                                                      \
        asm volatile("mov %%" #name ", %0" : "=r"(value) : : "memory");                                      \
        return value;                                                                                        \
    }                                                                                                        \
    inline void write_##name(uint32_t value) {                                                               \
        asm volatile("mov %0, %%" #name : : "r"(value) : "memory");                                          \
    }
UMBRA_LEGACY_CONTROL_REGISTER(cr0)
UMBRA_LEGACY_CONTROL_REGISTER(cr2)
UMBRA_LEGACY_CONTROL_REGISTER(cr3)
UMBRA_LEGACY_CONTROL_REGISTER(cr4)
#undef UMBRA_LEGACY_CONTROL_REGISTER

/// Of EFER, whose upper half is 0.
inline uint32_t read_efer() {
    uint32_t low;
    uint32_t high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr_efer));
    return low;
}
inline void write_efer(uint32_t value) {
    asm volatile("wrmsr" : : "c"(msr_efer), "a"(value), "d"(0) : "memory");
}
inline void invlpg(uint32_t address) {
    asm volatile("invlpg (%0)" : : "r"(address) : "memory");
}
inline bool cpu_has_extended_feature(unsigned bit) { ///< of EDX in leaf 0x80000001
    uint32_t eax = 0x8000'0001;
    uint32_t edx;
    asm volatile("cpuid" : "+a"(eax), "=d"(edx) : : "ebx", "ecx");
    return (edx >> bit & 1) != 0;
}
inline bool cpu_has_nx() {
    return cpu_has_extended_feature(20);
}
inline bool cpu_has_long_mode() {
    return cpu_has_extended_feature(29);
}

inline void enable_interrupts() {
    asm volatile("sti" : : : "memory");
}
inline void disable_interrupts() {
    asm volatile("cli" : : : "memory");
}
/// Waits for the next interrupt: `sti` holds it back until `hlt` is reached.
inline void wait_for_interrupt() {
    asm volatile("sti\n hlt" : : : "memory");
}

/// Memory as it is now, by its linear address; 0 is one, too, which compilers must not know.
template<class T>
[[nodiscard]] inline volatile T& memory_at(uint32_t address) {
    asm("" : "+r"(address));
    return *reinterpret_cast<volatile T*>(address);
}

// The console

/// What print() can print.
struct Printed {
    constexpr Printed() = default;
    constexpr Printed(uint32_t value) : number(value) {}
    constexpr Printed(uint64_t value) : number(value) {}
    constexpr Printed(const char* value) : text(value) {}

    uint64_t number = 0;
    const char* text = nullptr;
};
void print_all(const char* format, const Printed* values);

/// As printf(3), with %s, %x, and %u for numbers of 32 bits; sent at once. There must be as many values as
/// the format asks for.
template<class... Values>
void print(const char* format, Values... values) {
    const Printed all[] = {Printed(values)..., Printed()};
    print_all(format, all);
}

/// The number of characters of a string.
[[nodiscard]] unsigned length(const char* text);
/// Whether the first `count` characters are the same, of strings that may both be longer.
[[nodiscard]] bool equal(const char* left, const char* right, unsigned count);
/// What is behind `name` where a word of the command line begins with that; nullptr if none does.
[[nodiscard]] const char* find_word(const char* command_line, const char* name);
/// Whether "qemu" is a word of the command line of a kernel that multiboot 1 has started with this in EBX:
/// the CPU is QEMU's software emulation (version 7.2). Checks that it is known to fail are then left out.
[[nodiscard]] bool on_qemu(uint32_t ebx);

/// Ends the run: 0 is success.
extern "C" [[noreturn]] void exit_guest(int code);

/// Says which check failed and ends the run. To be used by CHECK.
[[noreturn]] void fail(const char* file, unsigned line, const char* what);
[[noreturn]] void fail_equal(const char* file, unsigned line, const char* what, uint64_t value,
                             uint64_t expected);

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            ::umbra::legacy::fail(__FILE__, __LINE__, #condition);                                           \
    } while (false)
#define CHECK_EQ(value, expected)                                                                            \
    do {                                                                                                     \
        const uint64_t check_value = (value), check_expected = (expected);                                   \
        if (check_value != check_expected)                                                                   \
            ::umbra::legacy::fail_equal(__FILE__, __LINE__, #value, check_value, check_expected);            \
    } while (false)

/// As the boot loader left them (start.S).
extern "C" const uint32_t load_offset, entry_flags, entry_cr0, entry_cr4;
/// Of the image (kernel.ld). Their addresses are their values.
extern "C" const char image_begin[], image_end[], memory_end[];

} // namespace umbra::legacy

/// Every kernel defines this, and is given EAX and where its boot information is: EBX, or ESI if it has no
/// header (start.S). What it returns becomes the guest's exit code: 0 is success.
extern "C" int kernel_main(uint32_t eax, uint32_t information);
