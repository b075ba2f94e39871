// Which CPU a guest sees: KVM's, less what the monitor cannot do, with what the monitor does by itself, and
// as the user wants it.
#pragma once

#include "vmm/kvm/kvm.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// The features that can be had or not, on both engines. Up to `gbpages` the shadow engine's monitor does
/// them by itself; the others are KVM's.
enum class CpuFeature : std::uint8_t {
    smap,         ///< supervisor-mode access prevention, with STAC and CLAC
    smep,         ///< supervisor-mode execution prevention
    pcid,         ///< process-context identifiers
    invpcid,      ///< the INVPCID instruction
    pge,          ///< global pages
    gbpages,      ///< 1 GB pages
    x2apic,       ///< the local APIC's registers as MSRs
    tsc_deadline, ///< the local APIC timer's TSC-deadline mode
    fsgsbase,     ///< RDFSBASE and its kin
    kvmclock,     ///< KVM's paravirtual clock
    invtsc,       ///< a time-stamp counter whose rate never changes
};
inline constexpr std::size_t cpu_feature_count = 11;

/// What the user wants of the guest's CPU: for each feature yes, no, or nothing.
class CpuChoice {
  public:
    /// Reads +NAME and -NAME, separated by commas, as QEMU's -cpu has them; of two for one feature the later
    /// counts. StartupError (bad_usage) says what is wrong, and lists the names that there are.
    [[nodiscard]] static CpuChoice parse(std::string_view text);

    [[nodiscard]] std::optional<bool> operator[](CpuFeature feature) const {
        return wanted_[static_cast<std::size_t>(feature)];
    }
    [[nodiscard]] bool none() const { return *this == CpuChoice(); }
    bool operator==(const CpuChoice&) const = default;

  private:
    std::array<std::optional<bool>, cpu_feature_count> wanted_;
};

/// The feature's name, and the CR4 bit that a kernel sets to use it; 0 if there is none.
[[nodiscard]] std::string_view name(CpuFeature feature);
[[nodiscard]] std::uint64_t cr4_bit(CpuFeature feature);
/// The names that CpuChoice::parse knows, separated by commas.
[[nodiscard]] std::string cpu_feature_names();

/// The CPUID leaves of a guest's CPU, made from what KVM `offered`: one logical processor, with what KVM and
/// the monitor can do, and nothing else.
///
/// Features are there unless the user says no, but for three that must be asked for, as on the shadow engine
/// they cost more than they save: each STAC and CLAC of SMAP would trap; so would each EOI of an x2APIC,
/// while KVM answers the APIC's memory window without umbra; with FSGSBASE, a switch of tasks takes Linux
/// four SWAPGS, which trap, in place of one WRMSR, and it finds its per-CPU data by LSL, which does not trap
/// but consults the machine's GDT. Those of the monitor need nothing of KVM on the shadow engine. Of the
/// others, and on the native engine of all, the guest has what KVM offers: StartupError (host_cannot) if the
/// user wants more.
///
/// `tsc_khz`, the rate of the guest's TSC, if known, is told in leaves 0x15 and 0x16 (Intel SDM vol. 2A,
/// CPUID) and 0x40000010 (VMware's convention), so that no kernel needs to measure it.
[[nodiscard]] std::vector<CpuidLeaf> guest_cpuid(std::vector<CpuidLeaf> offered, const CpuChoice& choice,
                                                 bool shadow_engine,
                                                 std::optional<std::uint32_t> tsc_khz = std::nullopt);

/// What a guest's CPU does, where the engine has to know it.
struct CpuFeatures {
    unsigned physical_bits = 0; ///< MAXPHYADDR
    bool gigabyte_pages = false;
    std::uint64_t cr4 = 0; ///< the bits that may be set
    bool x2apic = false, tsc_deadline = false, kvmclock = false, tsc_adjust = false, mtrr = false,
         machine_checks = false, arch_capabilities = false, osvw = false; ///< whose MSRs are there
    bool amd = false; ///< the vendor is AMD, or Hygon: MSRs that no other CPUID bit tells of
};
/// As the guest's CPUID says, which is `leaves`, made by guest_cpuid, or the host's own where the host does
/// not intercept it. There `choice` cannot change what the guest sees, but still what its CPU does.
[[nodiscard]] CpuFeatures guest_features(std::span<const CpuidLeaf> leaves, const CpuChoice& choice,
                                         bool cpuid_intercepted);

} // namespace umbra
