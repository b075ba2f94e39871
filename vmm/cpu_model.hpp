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

/// The features that can be had or not, on both engines.
enum class CpuFeature : std::uint8_t {
    smap,    ///< supervisor-mode access prevention, with STAC and CLAC
    smep,    ///< supervisor-mode execution prevention
    pcid,    ///< process-context identifiers
    invpcid, ///< the INVPCID instruction
    pge,     ///< global pages
    gbpages, ///< 1 GB pages
};
inline constexpr std::size_t cpu_feature_count = 6;

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

/// The names that CpuChoice::parse knows, separated by commas.
[[nodiscard]] std::string cpu_feature_names();

/// The CPUID leaves of a guest's CPU, made from what KVM `offered`.
///
/// On the shadow engine all CpuFeatures are the monitor's work and need nothing of KVM; they are there unless
/// the user says no, but for SMAP, which must be asked for: each STAC and CLAC would cost a trap. The native
/// engine has of these what KVM offers: StartupError (host_cannot) if the user wants more.
[[nodiscard]] std::vector<CpuidLeaf> guest_cpuid(std::vector<CpuidLeaf> offered, const CpuChoice& choice,
                                                 bool shadow_engine);

/// What a guest's CPU does, where the engine has to know it.
struct CpuFeatures {
    unsigned physical_bits = 0; ///< MAXPHYADDR
    bool gigabyte_pages = false;
    std::uint64_t cr4 = 0; ///< the bits that may be set
};
/// As the guest's CPUID says, which is `leaves`, made by guest_cpuid, or the host's own where the host does
/// not intercept it. There `choice` cannot change what the guest sees, but still what its CPU does.
[[nodiscard]] CpuFeatures guest_features(std::span<const CpuidLeaf> leaves, const CpuChoice& choice,
                                         bool cpuid_intercepted);

} // namespace umbra
