#include "vmm/cpu_model.hpp"

#include "vmm/error.hpp"

#include <algorithm>

#include <cpuid.h>
#include <fmt/core.h>

namespace umbra {
namespace {

constexpr std::uint32_t bit(unsigned number) {
    return std::uint32_t{1} << number;
}
template<class... Numbers>
constexpr std::uint32_t bits(Numbers... numbers) {
    return (bit(numbers) | ...);
}
constexpr std::uint32_t all_bits = ~std::uint32_t{0};

constexpr std::uint32_t hypervisor_leaves = 0x4000'0000, kvm_features = 0x4000'0001,
                        hypervisor_clocks = 0x4000'0010, extended_features = 0x8000'0001;
constexpr std::uint32_t index_matters = 1; // KVM_CPUID_FLAG_SIGNIFCANT_INDEX

// KVM's paravirtual clock by its two pairs of MSRs, and that its time never goes back
// (Documentation/virt/kvm/x86/cpuid.rst).
constexpr std::uint32_t kvm_clock = bits(0U, 3U, 24U), kvm_no_io_delay = bit(1);

/// Where CPUID shows a feature (Intel SDM vol. 2A, CPUID), and what it lets a kernel set.
struct Feature {
    std::string_view name;
    std::uint32_t leaf;
    std::uint32_t CpuidLeaf::*word;
    std::uint32_t flags;
    std::uint64_t cr4;
    bool monitors; ///< on the shadow engine it needs nothing of KVM
    bool by_default;
};

/// In the order of CpuFeature; the names are QEMU's.
constexpr std::array<Feature, cpu_feature_count> features{{
    {"smap", 7, &CpuidLeaf::ebx, bit(20), cr4::smap, true, false},
    {"smep", 7, &CpuidLeaf::ebx, bit(7), cr4::smep, true, true},
    {"pcid", 1, &CpuidLeaf::ecx, bit(17), cr4::pcide, true, true},
    {"invpcid", 7, &CpuidLeaf::ebx, bit(10), 0, true, true},
    {"pge", 1, &CpuidLeaf::edx, bit(13), cr4::pge, true, true},
    {"gbpages", extended_features, &CpuidLeaf::edx, bit(26), 0, true, true},
    {"x2apic", 1, &CpuidLeaf::ecx, bit(21), 0, false, false},
    {"tsc-deadline", 1, &CpuidLeaf::ecx, bit(24), 0, false, true},
    {"fsgsbase", 7, &CpuidLeaf::ebx, bit(0), cr4::fsgsbase, false, false},
    {"kvmclock", kvm_features, &CpuidLeaf::eax, kvm_clock, 0, false, true},
    {"invtsc", 0x8000'0007, &CpuidLeaf::edx, bit(8), 0, false, true},
}};

constexpr CpuFeature feature_at(std::size_t index) {
    return static_cast<CpuFeature>(index);
}

const Feature& feature(CpuFeature which) {
    return features[static_cast<std::size_t>(which)];
}

// --- What the monitor cannot do, whoever asks for it

/// The bits of a word that a guest may see, of those that KVM offers.
struct Kept {
    std::uint32_t leaf, index;
    std::uint32_t CpuidLeaf::*word;
    std::uint32_t flags;
};

constexpr std::uint32_t without(std::uint32_t hidden) {
    return ~hidden;
}

/// Bits by Intel SDM vol. 2A, CPUID, and AMD APM vol. 3, appendix E. Where most is hidden, what is kept is
/// listed, so that what later CPUs add is hidden until somebody has looked at it.
constexpr std::array kept{
    // DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, CNXT-ID, SDBG, xTPR, PDCM, DCA: their MSRs and
    // instructions.
    Kept{1, 0, &CpuidLeaf::ecx, without(bits(2U, 3U, 4U, 5U, 6U, 7U, 8U, 10U, 11U, 14U, 15U, 18U))},
    // VME: there is no virtual-8086 mode. DS, ACPI, TM, PBE: their MSRs. HTT: one logical processor.
    Kept{1, 0, &CpuidLeaf::edx, without(bits(1U, 21U, 22U, 28U, 29U, 31U))},
    // ARAT, which KVM's APIC timer is; no power management.
    Kept{6, 0, &CpuidLeaf::eax, bit(2)},
    Kept{6, 0, &CpuidLeaf::ebx, 0},
    Kept{6, 0, &CpuidLeaf::ecx, 0},
    Kept{6, 0, &CpuidLeaf::edx, 0},
    // SGX, RDT monitoring, MPX, RDT allocation, processor trace: their MSRs.
    Kept{7, 0, &CpuidLeaf::ebx, without(bits(2U, 12U, 14U, 15U, 25U))},
    // PKU: PKRU binds accesses to user pages, which on the machine the pages of the guest's kernel are too.
    // They would have to have a key, and any of the 16, key 0 as well, may be closed by programs.
    // LA57, shadow stacks, PKS, key locker: CR4 bits. WAITPKG, TME, bus-lock detection, ENQCMD, SGX: MSRs.
    Kept{7, 0, &CpuidLeaf::ecx, without(bits(3U, 4U, 5U, 7U, 13U, 16U, 23U, 24U, 29U, 30U, 31U))},
    // Speculation controls (26, 27, 28, 31, and 9, 13): their MSRs are the machine's, whose CPL 3 the guest's
    // kernel and its programs share, so that they would promise what they do not keep, at a trap for each
    // write. SGX keys, user interrupts, hybrid, PCONFIG, last-branch records, IBT, core capabilities: MSRs.
    // AMX (22, 24, 25): its state needs IA32_XFD.
    Kept{7, 0, &CpuidLeaf::edx,
         without(bits(1U, 5U, 9U, 13U, 15U, 18U, 19U, 20U, 22U, 24U, 25U, 26U, 27U, 28U, 30U, 31U))},
    // LASS, FRED, LKGS, WRMSRNS, AMX-FP16, HRESET, LAM, MSRLIST: at level 0, or with a CR4 bit.
    Kept{7, 1, &CpuidLeaf::eax, without(bits(6U, 17U, 18U, 19U, 21U, 22U, 26U, 27U))},
    Kept{7, 1, &CpuidLeaf::ebx, 0},
    Kept{7, 1, &CpuidLeaf::ecx, 0},
    Kept{7, 1, &CpuidLeaf::edx, without(bits(8U, 13U, 17U, 18U))}, // AMX-COMPLEX, UTMR, UIRET, shadow stacks
    Kept{7, 2, &CpuidLeaf::edx, bit(5)},                           // MCDT_NO; the rest is in SPEC_CTRL
    // XSAVE components of MPX, PKU, AMX. XSAVES and its states: it needs level 0 and IA32_XSS; XFD.
    Kept{0xd, 0, &CpuidLeaf::eax, without(bits(3U, 4U, 9U, 17U, 18U))},
    Kept{0xd, 1, &CpuidLeaf::eax, without(bits(3U, 4U))},
    Kept{0xd, 1, &CpuidLeaf::ecx, 0},
    Kept{0xd, 1, &CpuidLeaf::edx, 0},
    // LAHF, LZCNT, SSE4A, misaligned SSE, 3DNow prefetch, OSVW, XOP, FMA4, TBM, TOPOEXT: what needs no MSR.
    // Not: CmpLegacy (1), of several cores; CR8 by a LOCK prefix (4).
    Kept{extended_features, 0, &CpuidLeaf::ecx, bits(0U, 5U, 6U, 7U, 8U, 9U, 11U, 16U, 21U, 22U)},
    Kept{extended_features, 0, &CpuidLeaf::edx, without(bit(25))}, // FXSR_OPT: a bit of EFER
    // No machine checks beyond the architecture's, no power management but the invariant TSC.
    Kept{0x8000'0007, 0, &CpuidLeaf::eax, 0},
    Kept{0x8000'0007, 0, &CpuidLeaf::ebx, 0},
    Kept{0x8000'0007, 0, &CpuidLeaf::ecx, 0},
    Kept{0x8000'0007, 0, &CpuidLeaf::edx, bit(8)},
    // CLZERO, error pointers by XSAVE, WBNOINVD, no EFER.LMSLE, SSB_NO, BTC_NO. Speculation controls: above.
    Kept{0x8000'0008, 0, &CpuidLeaf::ebx, bits(0U, 2U, 9U, 20U, 26U, 29U)},
    Kept{0x8000'0008, 0, &CpuidLeaf::ecx, without(0xf0ff)}, // one core
    // No nested data breakpoints, LFENCE serializes, null selectors clear the base, no SMM_CTL, SRSO_NO.
    // Not: automatic IBRS and the like, which are bits of EFER.
    Kept{0x8000'0021, 0, &CpuidLeaf::eax, bits(0U, 2U, 6U, 9U, 29U)},
};

/// Leaves that are all zero: serial number, MWAIT, performance counters, RDT, SGX, processor trace, key
/// locker, hybrid, PCONFIG, last-branch records, AMX, history reset, TDX; SVM, IBS, LWP, memory encryption,
/// QoS, performance counters, multi-key encryption, AMD's extended topology. 0xb tells the topology, not
/// 0x1f.
constexpr std::array<std::uint32_t, 26> empty_leaves{
    3,           5,           0xa,         0xf,         0x10,        0x12,        0x14,
    0x19,        0x1a,        0x1b,        0x1c,        0x1d,        0x1e,        0x1f,
    0x20,        0x21,        0x23,        0x8000'000a, 0x8000'001b, 0x8000'001c, 0x8000'001f,
    0x8000'0020, 0x8000'0022, 0x8000'0023, 0x8000'0025, 0x8000'0026,
};

void hide_the_rest(CpuidLeaf& leaf) {
    if (std::ranges::find(empty_leaves, leaf.function) != empty_leaves.end())
        leaf.eax = leaf.ebx = leaf.ecx = leaf.edx = 0;
    for (const Kept& word : kept)
        if (leaf.function == word.leaf && leaf.index == word.index)
            leaf.*word.word &= word.flags;
}

// --- What is told besides

/// The leaf, which is made if there is none.
CpuidLeaf& leaf_of(std::vector<CpuidLeaf>& leaves, std::uint32_t function, std::uint32_t index = 0,
                   std::uint32_t flags = 0) {
    const auto found = std::ranges::find_if(
        leaves, [&](const CpuidLeaf& leaf) { return leaf.function == function && leaf.index == index; });
    return found != leaves.end() ? *found : leaves.emplace_back(CpuidLeaf{function, index, flags});
}

/// One logical processor with APIC ID 0.
void tell_topology(std::vector<CpuidLeaf>& leaves) {
    constexpr std::uint32_t basic = 1, caches = 4, topology = 0xb, amd_caches = 0x8000'001d,
                            amd_topology = 0x8000'001e;
    constexpr std::uint32_t sharing = 0xfffU << 14, cores = 0x3fU << 26; // each less one
    for (CpuidLeaf& leaf : leaves) {
        if (leaf.function == basic)
            leaf.ebx = (leaf.ebx & 0xffff) | 1U << 16;
        else if (leaf.function == caches)
            leaf.eax &= ~(sharing | cores);
        else if (leaf.function == amd_caches)
            leaf.eax &= ~sharing;
        else if (leaf.function == amd_topology)
            leaf.eax = leaf.ebx = leaf.ecx = leaf.edx = 0;
    }
    std::erase_if(leaves, [](const CpuidLeaf& leaf) { return leaf.function == topology; });
    constexpr std::uint32_t threads = 1, processors = 2; // level types
    for (std::uint32_t level = 0; level < 2; ++level)
        leaves.push_back(
            {topology, level, index_matters, 0, 1, level | (level == 0 ? threads : processors) << 8, 0});
}

/// KVM's own leaves. Of its paravirtual features the guest has the clock, and that ports need no delay. The
/// others would have KVM inject events that are not the machine's but the guest's (asynchronous page faults),
/// save an EOI only as long as there is no exit, which here every interrupt is, or are asked for by VMCALL,
/// which KVM refuses at CPL 3.
void tell_hypervisor(std::vector<CpuidLeaf>& leaves, std::optional<std::uint32_t> tsc_khz) {
    const std::uint32_t offered = leaf_of(leaves, kvm_features).eax;
    std::erase_if(leaves,
                  [](const CpuidLeaf& leaf) { return leaf.function >> 28 == hypervisor_leaves >> 28; });
    const std::uint32_t last = tsc_khz ? hypervisor_clocks : kvm_features;
    leaves.push_back({hypervisor_leaves, 0, 0, last, 0x4b4d'564b, 0x564b'4d56, 0x4d}); // "KVMKVMKVM"
    leaves.push_back({kvm_features, 0, 0, offered & (kvm_clock | kvm_no_io_delay), 0, 0, 0});
}

/// The core crystal clock, which the APIC timer counts (Intel SDM vol. 3A, 10.5.4): KVM's own rate.
constexpr std::uint32_t crystal_khz = 1'000'000;

/// The rate of the TSC as a fraction of the crystal clock's.
struct Ratio {
    std::uint32_t numerator = 0, denominator = 1;
};
/// The nearest one whose numerator times the crystal's kHz fits 32 bits, in which Linux multiplies them:
/// never off by more than 120 ppm.
Ratio tsc_ratio(std::uint32_t tsc_khz) {
    constexpr std::uint64_t most = all_bits / crystal_khz;
    Ratio best;
    std::uint64_t best_error = ~std::uint64_t{0};
    for (std::uint64_t denominator = 1; denominator <= most; ++denominator) {
        const std::uint64_t numerator = (tsc_khz * denominator + crystal_khz / 2) / crystal_khz;
        if (numerator > most)
            break;
        // In thousandths of a kHz.
        const std::uint64_t told = numerator * crystal_khz * 1000 / denominator,
                            exact = std::uint64_t{tsc_khz} * 1000;
        const std::uint64_t error = told > exact ? told - exact : exact - told;
        if (numerator != 0 && error < best_error) {
            best = {static_cast<std::uint32_t>(numerator), static_cast<std::uint32_t>(denominator)};
            best_error = error;
        }
    }
    return best;
}

void tell_clocks(std::vector<CpuidLeaf>& leaves, std::uint32_t tsc_khz) {
    constexpr std::uint32_t crystal = 0x15, frequencies = 0x16, bus_mhz = 100;
    const Ratio ratio = tsc_ratio(tsc_khz);
    if (ratio.numerator != 0) {
        CpuidLeaf& leaf = leaf_of(leaves, crystal);
        leaf.eax = ratio.denominator;
        leaf.ebx = ratio.numerator;
        leaf.ecx = crystal_khz * 1000;
        leaf.edx = 0;
    }
    CpuidLeaf& leaf = leaf_of(leaves, frequencies);
    leaf.eax = leaf.ebx = (tsc_khz + 500) / 1000;
    leaf.ecx = bus_mhz;
    leaf.edx = 0;
    leaf_of(leaves, hypervisor_clocks) = {hypervisor_clocks, 0, 0, tsc_khz, crystal_khz, 0, 0};
    CpuidLeaf& first = leaf_of(leaves, 0);
    first.eax = std::max(first.eax, frequencies);
}

bool has(const Feature& feature, bool offered, std::optional<bool> wanted, bool shadow_engine) {
    if (shadow_engine && feature.monitors)
        return wanted.value_or(feature.by_default);
    if (wanted.value_or(false) && !offered)
        throw StartupError(ExitCode::host_cannot,
                           fmt::format("KVM does not offer '{}'{}", feature.name,
                                       feature.monitors ? " to the native engine" : ""));
    return offered && wanted.value_or(feature.by_default);
}

} // namespace

std::string_view name(CpuFeature which) {
    return feature(which).name;
}

std::uint64_t cr4_bit(CpuFeature which) {
    return feature(which).cr4;
}

std::string cpu_feature_names() {
    std::string names;
    for (const Feature& feature : features)
        names.append(names.empty() ? "" : ", ").append(feature.name);
    return names;
}

CpuChoice CpuChoice::parse(std::string_view text) {
    CpuChoice choice;
    for (std::size_t begin = 0; begin <= text.size();) {
        const std::size_t end = std::min(text.find(',', begin), text.size());
        const std::string_view word = text.substr(begin, end - begin);
        begin = end + 1;
        const bool has_sign = word.starts_with('+') || word.starts_with('-');
        const auto* const found =
            std::ranges::find(features, has_sign ? word.substr(1) : word, &Feature::name);
        if (!has_sign || found == features.end())
            throw StartupError(ExitCode::bad_usage,
                               fmt::format("--cpu: '{}' is not a feature with + or - before it; there are {}",
                                           word, cpu_feature_names()));
        choice.wanted_[static_cast<std::size_t>(found - features.begin())] = word.front() == '+';
    }
    return choice;
}

std::vector<CpuidLeaf> guest_cpuid(std::vector<CpuidLeaf> offered, const CpuChoice& choice,
                                   bool shadow_engine, std::optional<std::uint32_t> tsc_khz) {
    std::ranges::for_each(offered, hide_the_rest);
    tell_topology(offered);
    tell_hypervisor(offered, tsc_khz);
    if (tsc_khz)
        tell_clocks(offered, *tsc_khz);
    leaf_of(offered, 1).ecx |= bit(31); // a hypervisor is present
    leaf_of(offered, 6).eax |= bit(2);  // ARAT: KVM's APIC timer never stops
    for (std::size_t i = 0; i < features.size(); ++i) {
        const Feature& feature = features[i];
        std::uint32_t& word = leaf_of(offered, feature.leaf).*feature.word;
        const bool there = has(feature, (word & feature.flags) != 0, choice[feature_at(i)], shadow_engine);
        if (!there)
            word &= ~feature.flags;
        else if (feature.monitors)
            word |= feature.flags;
        if (feature_at(i) == CpuFeature::pge && !there) // AMD's leaf repeats some of leaf 1
            leaf_of(offered, extended_features).edx &= ~feature.flags;
    }
    return offered;
}

CpuFeatures guest_features(std::span<const CpuidLeaf> leaves, const CpuChoice& choice,
                           bool cpuid_intercepted) {
    const auto leaf = [&](std::uint32_t function) {
        CpuidLeaf found;
        if (!cpuid_intercepted) {
            if (function >> 28 == hypervisor_leaves >> 28) // not below the highest that __get_cpuid knows of
                __cpuid_count(function, 0, found.eax, found.ebx, found.ecx, found.edx);
            else
                __get_cpuid_count(function, 0, &found.eax, &found.ebx, &found.ecx, &found.edx);
            return found;
        }
        const auto at = std::ranges::find_if(leaves, [&](const CpuidLeaf& candidate) {
            return candidate.function == function && candidate.index == 0;
        });
        return at != leaves.end() ? *at : found;
    };
    CpuFeatures result;
    result.physical_bits = leaf(0x8000'0008).eax & 0xff;
    constexpr std::uint32_t auth = 0x6874'7541, hygo = 0x6f67'7948; // how AuthenticAMD and HygonGenuine begin
    result.amd = leaf(0).ebx == auth || leaf(0).ebx == hygo;
    const auto offers = [&](CpuFeature which) {
        const Feature& asked = feature(which);
        return choice[which].value_or((leaf(asked.leaf).*asked.word & asked.flags) != 0);
    };
    result.gigabyte_pages = offers(CpuFeature::gbpages);
    result.x2apic = offers(CpuFeature::x2apic);
    result.tsc_deadline = offers(CpuFeature::tsc_deadline);
    result.kvmclock = offers(CpuFeature::kvmclock);
    result.tsc_adjust = (leaf(7).ebx & bit(1)) != 0;
    result.mtrr = (leaf(1).edx & bit(12)) != 0;
    result.machine_checks = (leaf(1).edx & bit(14)) != 0;
    result.arch_capabilities = (leaf(7).edx & bit(29)) != 0;
    result.osvw = (leaf(extended_features).ecx & bit(9)) != 0;
    result.cr4 =
        cr4_offered(leaf(1).ecx, leaf(7).ebx, leaf(7).ecx) | cr4::umip; // which the monitor does itself
    for (std::size_t i = 0; i < features.size(); ++i)
        if (const auto wanted = choice[feature_at(i)])
            result.cr4 = *wanted ? result.cr4 | features[i].cr4 : result.cr4 & ~features[i].cr4;
    return result;
}

} // namespace umbra
