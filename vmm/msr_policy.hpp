// Which model-specific registers a guest's CPU has, and where their values come from: one table.
//
// The emulator asks here for what VirtualCpu does not hold itself. What is not in the table does not exist:
// the guest gets #GP(0), as from a CPU without that register, which kernels expect where CPUID does not
// promise it. KVM's own checks are none: to it a write for the guest is userspace's, which may do more than a
// guest.
#pragma once

#include "shadow/guest_memory.hpp"
#include "vmm/cpu_model.hpp"

#include <cstdint>
#include <optional>
#include <span>

namespace umbra {

/// Where what RDMSR reads comes from.
struct MsrRead {
    enum Kind : std::uint8_t {
        refused, ///< #GP(0)
        fixed,   ///< `value`
        machine, ///< KVM's register, of which `value` are the bits that the guest may see; #GP(0) if KVM has
                 ///< none
    };
    Kind kind = refused;
    std::uint64_t value = 0;
    bool operator==(const MsrRead&) const = default;
};

/// What becomes of WRMSR.
enum class MsrWrite : std::uint8_t {
    refused,   ///< #GP(0)
    ignored,   ///< nothing, and no fault
    unchanged, ///< the value that is read: nothing; any other: #GP(0)
    machine,   ///< KVM's register is written; #GP(0) if KVM refuses the value
    apic_base, ///< the same if apic_base_allowed(), otherwise #GP(0)
    tsc,       ///< the TSC is moved to the value, and IA32_TSC_ADJUST by as much (Intel SDM vol. 3B, 17.17.3)
    tsc_adjust, ///< the TSC is moved by as much as this register
};

/// A row of the table.
struct MsrRule {
    std::uint32_t first = 0, last = 0; ///< the registers, both inclusive
    MsrRead read;
    MsrWrite write = MsrWrite::refused;
    bool CpuFeatures::*needs = nullptr; ///< without this feature they do not exist; nullptr: always there
};

/// In ascending order, without overlaps. The reasons are beside the rows.
[[nodiscard]] std::span<const MsrRule> msr_rules();

[[nodiscard]] MsrRead msr_read(std::uint32_t index, const CpuFeatures& features);

/// Refuses an address that the guest hands to KVM, which writes there by itself, unless all that KVM writes
/// lies in `memory`: this is part of the boundary between the guest and monitor memory, which is a memory
/// slot of KVM's like the guest's RAM.
[[nodiscard]] MsrWrite msr_write(std::uint32_t index, std::uint64_t value, const CpuFeatures& features,
                                 const GuestMemory& memory);

/// Whether IA32_APIC_BASE may go from `current` to `value`: reserved bits are zero; x2APIC mode is entered
/// from xAPIC mode, and left by disabling the APIC (Intel SDM vol. 3A, 10.12.5).
[[nodiscard]] bool apic_base_allowed(std::uint64_t current, std::uint64_t value, const CpuFeatures& features);

} // namespace umbra
