#include "vmm/msr_policy.hpp"

#include "vmm/msr.hpp"

#include <algorithm>
#include <array>

namespace umbra {
namespace {

constexpr std::uint64_t all = ~std::uint64_t{0};

constexpr std::uint64_t bit(unsigned number) {
    return std::uint64_t{1} << number;
}
template<class... Numbers>
constexpr std::uint64_t bits(Numbers... numbers) {
    return (bit(numbers) | ...);
}

constexpr MsrRead fixed(std::uint64_t value) {
    return {MsrRead::fixed, value};
}
constexpr MsrRead machine(std::uint64_t mask = all) {
    return {MsrRead::machine, mask};
}

// What KVM writes to where the guest says (Documentation/virt/kvm/x86/msr.rst).
constexpr std::uint32_t old_wall_clock = 0x11, old_system_time = 0x12, wall_clock = 0x4b56'4d00,
                        system_time = 0x4b56'4d01;
constexpr std::uint64_t wall_clock_bytes = 12, system_time_bytes = 32;

/// Of IA32_ARCH_CAPABILITIES: that the CPU is not vulnerable to something, or that VERW clears buffers. The
/// other bits announce MSRs that are not there.
constexpr std::uint64_t not_vulnerable =
    bits(0U, 2U, 3U, 4U, 5U, 6U, 8U, 13U, 14U, 15U, 17U, 19U, 20U, 24U, 26U, 27U, 28U, 62U);

/// "SDM": Intel SDM vol. 4, table 2-2; "APM": AMD APM vol. 2, appendix A, and the manuals of the families;
/// "KVM": Documentation/virt/kvm/x86/msr.rst.
constexpr std::array rules{
    // P5 machine-check address and type (SDM): no machine check has happened.
    MsrRule{0x0, 0x1, fixed(0), MsrWrite::refused, nullptr},
    // IA32_TIME_STAMP_COUNTER (SDM).
    MsrRule{msr::tsc, msr::tsc, machine(), MsrWrite::tsc, nullptr},
    // Wall clock and system time by their old numbers (KVM).
    MsrRule{old_wall_clock, old_system_time, machine(), MsrWrite::machine, &CpuFeatures::kvmclock},
    // IA32_PLATFORM_ID (SDM), for microcode updates, which there are none of.
    MsrRule{0x17, 0x17, fixed(0), MsrWrite::refused, nullptr},
    // IA32_APIC_BASE (SDM).
    MsrRule{msr::apic_base, msr::apic_base, machine(), MsrWrite::apic_base, nullptr},
    // EBL_CR_POWERON (SDM): old kernels look for the bus frequency here; KVM, too, answers zero.
    MsrRule{0x2a, 0x2a, fixed(0), MsrWrite::unchanged, nullptr},
    // MSR_SMI_COUNT (SDM): there is no system-management mode.
    MsrRule{0x34, 0x34, fixed(0), MsrWrite::refused, nullptr},
    // IA32_FEATURE_CONTROL (SDM): locked, with nothing enabled.
    MsrRule{0x3a, 0x3a, fixed(1), MsrWrite::refused, nullptr},
    // IA32_TSC_ADJUST (SDM).
    MsrRule{msr::tsc_adjust, msr::tsc_adjust, machine(), MsrWrite::tsc_adjust, &CpuFeatures::tsc_adjust},
    // IA32_BIOS_UPDT_TRIG (SDM): no microcode is loaded.
    MsrRule{0x79, 0x79, {}, MsrWrite::ignored, nullptr},
    // IA32_BIOS_SIGN_ID (SDM), AMD's patch level. A guest writes zero before it reads; written by userspace,
    // KVM's would become that.
    MsrRule{0x8b, 0x8b, machine(), MsrWrite::ignored, nullptr},
    // MSR_FSB_FREQ (SDM), which kernels read on Atoms: KVM's answer, 100 MHz.
    MsrRule{0xcd, 0xcd, fixed(3), MsrWrite::refused, nullptr},
    // MSR_PLATFORM_INFO (SDM): without CPUID faulting, which KVM would do at the machine's CPL 3, where the
    // guest's kernel is, too.
    MsrRule{0xce, 0xce, fixed(0), MsrWrite::refused, nullptr},
    // IA32_MTRRCAP (SDM).
    MsrRule{0xfe, 0xfe, machine(), MsrWrite::refused, &CpuFeatures::mtrr},
    // IA32_ARCH_CAPABILITIES (SDM).
    MsrRule{0x10a, 0x10a, machine(not_vulnerable), MsrWrite::refused, &CpuFeatures::arch_capabilities},
    // MISC_FEATURES_ENABLES (SDM): CPUID faulting and ring-3 MWAIT, both not there.
    MsrRule{0x140, 0x140, fixed(0), MsrWrite::unchanged, nullptr},
    // IA32_MCG_CAP (SDM): no banks of machine-check registers, so none of them exists.
    MsrRule{0x179, 0x179, fixed(0), MsrWrite::refused, &CpuFeatures::machine_checks},
    // IA32_MCG_STATUS (SDM).
    MsrRule{0x17a, 0x17a, fixed(0), MsrWrite::ignored, &CpuFeatures::machine_checks},
    // IA32_PERF_STATUS (SDM): frequencies, which some kernels compute the TSC's from; KVM's answer.
    MsrRule{0x198, 0x198, machine(), MsrWrite::refused, nullptr},
    // IA32_MISC_ENABLE (SDM): flags that nothing here depends on.
    MsrRule{0x1a0, 0x1a0, machine(), MsrWrite::machine, nullptr},
    // IA32_DEBUGCTL (SDM): branch records and steps from branch to branch, which would be the machine's: the
    // monitor's own steps would become such.
    MsrRule{0x1d9, 0x1d9, fixed(0), MsrWrite::unchanged, nullptr},
    // MTRRs (SDM): kept by KVM, which checks their values; shadow tables have no memory types.
    MsrRule{0x200, 0x20f, machine(), MsrWrite::machine, &CpuFeatures::mtrr},
    MsrRule{0x250, 0x250, machine(), MsrWrite::machine, &CpuFeatures::mtrr},
    MsrRule{0x258, 0x259, machine(), MsrWrite::machine, &CpuFeatures::mtrr},
    MsrRule{0x268, 0x26f, machine(), MsrWrite::machine, &CpuFeatures::mtrr},
    MsrRule{0x2ff, 0x2ff, machine(), MsrWrite::machine, &CpuFeatures::mtrr},
    // Energy counters (SDM): old kernels read them by the CPU's model; KVM, too, answers zero.
    MsrRule{0x606, 0x606, fixed(0), MsrWrite::refused, nullptr},
    MsrRule{0x611, 0x611, fixed(0), MsrWrite::refused, nullptr},
    MsrRule{0x619, 0x619, fixed(0), MsrWrite::refused, nullptr},
    MsrRule{0x639, 0x639, fixed(0), MsrWrite::refused, nullptr},
    MsrRule{0x641, 0x641, fixed(0), MsrWrite::refused, nullptr},
    // IA32_TSC_DEADLINE (SDM).
    MsrRule{msr::tsc_deadline, msr::tsc_deadline, machine(), MsrWrite::machine, &CpuFeatures::tsc_deadline},
    // The local APIC's registers (SDM vol. 3A, 10.12.1); KVM knows those that are not there, and the mode.
    MsrRule{msr::x2apic_first, msr::x2apic_last, machine(), MsrWrite::machine, &CpuFeatures::x2apic},
    // IA32_XSS (SDM): no supervisor states. Read by kernels whose CPUID is the host's.
    MsrRule{0xda0, 0xda0, fixed(0), MsrWrite::unchanged, nullptr},
    // Wall clock and system time (KVM). The next ones are not offered: asynchronous page faults, stolen time,
    // end of interrupt in memory, polling, migration.
    MsrRule{wall_clock, system_time, machine(), MsrWrite::machine, &CpuFeatures::kvmclock},
    // PerfEvtSel and PerfCtr (APM), which every AMD CPU has four of: they count nothing, and a kernel that
    // looks whether a counter keeps what it writes finds that it does not.
    MsrRule{0xc001'0000, 0xc001'0007, fixed(0), MsrWrite::ignored, &CpuFeatures::amd},
    // SYSCFG (APM): no memory encryption, and no second top of memory.
    MsrRule{0xc001'0010, 0xc001'0010, fixed(0), MsrWrite::unchanged, nullptr},
    // HWCR (APM): the TSC counts at the rate of P0 (bit 24), as an invariant one does. What kernels set here
    // for errata has no meaning; KVM drops it, too.
    MsrRule{0xc001'0015, 0xc001'0015, fixed(bit(24)), MsrWrite::ignored, nullptr},
    // NB_CFG (APM): northbridges that are not there; kernels set ENABLE_CF8_EXT_CFG.
    MsrRule{0xc001'001f, 0xc001'001f, fixed(0), MsrWrite::ignored, nullptr},
    // Patch loader (APM): no microcode is loaded.
    MsrRule{0xc001'0020, 0xc001'0020, {}, MsrWrite::ignored, nullptr},
    // Interrupt-pending message (APM): C1E is off.
    MsrRule{0xc001'0055, 0xc001'0055, fixed(0), MsrWrite::refused, nullptr},
    // Base of PCI configuration space (APM): there is none in memory.
    MsrRule{0xc001'0058, 0xc001'0058, fixed(0), MsrWrite::refused, nullptr},
    // OSVW (APM): which errata a kernel need not work around.
    MsrRule{0xc001'0140, 0xc001'0141, machine(), MsrWrite::refused, &CpuFeatures::osvw},
    // DC_CFG and BU_CFG (APM): chicken bits, which kernels set for errata; KVM drops them, too.
    MsrRule{0xc001'1022, 0xc001'1023, fixed(0), MsrWrite::ignored, nullptr},
    // DE_CFG (APM): whether LFENCE serializes is the host's.
    MsrRule{0xc001'1029, 0xc001'1029, machine(), MsrWrite::unchanged, nullptr},
    // BU_CFG2 and EX_CFG (APM): as DC_CFG.
    MsrRule{0xc001'102a, 0xc001'102a, fixed(0), MsrWrite::ignored, nullptr},
    MsrRule{0xc001'102c, 0xc001'102c, fixed(0), MsrWrite::ignored, nullptr},
};

constexpr bool ascending() {
    for (std::size_t i = 0; i < rules.size(); ++i)
        if (rules[i].first > rules[i].last || (i != 0 && rules[i - 1].last >= rules[i].first))
            return false;
    return true;
}
static_assert(ascending());

/// Nothing if the guest's CPU has no such register.
const MsrRule* find(std::uint32_t index, const CpuFeatures& features) {
    const auto* const rule = std::ranges::lower_bound(rules, index, {}, &MsrRule::last);
    if (rule == rules.end() || index < rule->first || (rule->needs != nullptr && !(features.*rule->needs)))
        return nullptr;
    return rule;
}

/// Whether all that KVM is made to write by this lies in guest RAM.
bool writes_to_ram(std::uint32_t index, std::uint64_t value, const GuestMemory& memory) {
    switch (index) {
    case wall_clock:
    case old_wall_clock:
        return memory.contains(GuestPhys(value), wall_clock_bytes);
    case system_time:
    case old_system_time:
        // Bit 0 enables it; without, KVM writes no more.
        return (value & 1) == 0 || memory.contains(GuestPhys(value & ~bit(0)), system_time_bytes);
    default: // the others hold no address
        return true;
    }
}

} // namespace

std::span<const MsrRule> msr_rules() {
    return rules;
}

MsrRead msr_read(std::uint32_t index, const CpuFeatures& features) {
    const MsrRule* rule = find(index, features);
    return rule != nullptr ? rule->read : MsrRead{};
}

MsrWrite msr_write(std::uint32_t index, std::uint64_t value, const CpuFeatures& features,
                   const GuestMemory& memory) {
    const MsrRule* rule = find(index, features);
    return rule != nullptr && writes_to_ram(index, value, memory) ? rule->write : MsrWrite::refused;
}

bool apic_base_allowed(std::uint64_t current, std::uint64_t value, const CpuFeatures& features) {
    constexpr std::uint64_t x2apic = bit(10), enabled = bit(11), mode = x2apic | enabled;
    constexpr std::uint64_t reserved = bit(9) | 0xff;
    if ((value & reserved) != 0 || value >> features.physical_bits != 0)
        return false;
    const std::uint64_t from = current & mode, to = value & mode;
    if (to == x2apic || (to == mode && !features.x2apic)) // no such mode
        return false;
    return from == to || from == enabled || (from == mode && to == 0) || (from == 0 && to == enabled);
}

} // namespace umbra
