#include "vmm/cpu_model.hpp"

#include "vmm/error.hpp"

#include <algorithm>

#include <cpuid.h>
#include <fmt/format.h>

namespace umbra {
namespace {

constexpr std::uint32_t bit(unsigned number) {
    return std::uint32_t{1} << number;
}

/// Where CPUID shows a feature (Intel SDM vol. 2A, CPUID), and what it lets a kernel set.
struct Feature {
    std::string_view name;
    std::uint32_t leaf;
    std::uint32_t CpuidLeaf::*word;
    std::uint32_t flag;
    std::uint64_t cr4;
    bool by_default;
};

/// In the order of CpuFeature.
constexpr std::array<Feature, cpu_feature_count> features{{
    {"smap", 7, &CpuidLeaf::ebx, bit(20), cr4::smap, false},
    {"smep", 7, &CpuidLeaf::ebx, bit(7), cr4::smep, true},
    {"pcid", 1, &CpuidLeaf::ecx, bit(17), cr4::pcide, true},
    {"invpcid", 7, &CpuidLeaf::ebx, bit(10), 0, true},
    {"pge", 1, &CpuidLeaf::edx, bit(13), cr4::pge, true},
    {"gbpages", 0x8000'0001, &CpuidLeaf::edx, bit(26), 0, true},
}};

constexpr CpuFeature feature_at(std::size_t index) {
    return static_cast<CpuFeature>(index);
}

const Feature& feature(CpuFeature which) {
    return features[static_cast<std::size_t>(which)];
}

/// What the monitor cannot do, whoever asks for it.
void hide_the_rest(CpuidLeaf& leaf) {
    switch (leaf.function) {
    case 1:
        leaf.ebx = (leaf.ebx & 0xffff) | 1U << 16; // APIC ID 0, one logical processor
        // MONITOR, VMX, x2APIC, TSC deadline: each needs what the monitor does not virtualise.
        leaf.ecx &= ~(bit(3) | bit(5) | bit(21) | bit(24));
        leaf.ecx |= bit(31); // a hypervisor is present
        break;
    case 7:
        if (leaf.index == 0) {
            // PKU: PKRU binds accesses to user pages, which on the machine the pages of the guest's kernel
            // are too. They would have to have a key, and any of the 16, key 0 as well, may be closed by
            // programs.
            leaf.ecx &= ~(bit(3) | bit(7) | bit(16)); // PKU, shadow stacks, LA57
            leaf.edx &=
                ~(bit(20) | bit(26) | bit(27) | bit(31)); // IBT; speculation controls, whose MSRs are ours
        }
        break;
    case 0x8000'0001:
        leaf.ecx &= ~bit(2); // SVM
        break;
    case 0x4000'0001:
        leaf.eax = leaf.edx = 0; // KVM's paravirtual MSRs are not forwarded
        break;
    default:
        break;
    }
}

bool has(const Feature& feature, bool offered, std::optional<bool> wanted, bool shadow_engine) {
    if (shadow_engine)
        return wanted.value_or(feature.by_default);
    if (wanted.value_or(false) && !offered)
        throw StartupError(ExitCode::host_cannot,
                           fmt::format("KVM does not offer '{}' to the native engine", feature.name));
    return offered && wanted.value_or(feature.by_default);
}

} // namespace

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
                                   bool shadow_engine) {
    constexpr std::uint32_t amd_features = 0x8000'0001;
    bool global_pages = true;
    for (CpuidLeaf& leaf : offered) {
        hide_the_rest(leaf);
        for (std::size_t i = 0; i < features.size(); ++i) {
            const Feature& feature = features[i];
            if (leaf.function != feature.leaf || leaf.index != 0)
                continue;
            std::uint32_t& word = leaf.*feature.word;
            const bool there = has(feature, (word & feature.flag) != 0, choice[feature_at(i)], shadow_engine);
            word = there ? word | feature.flag : word & ~feature.flag;
            if (feature_at(i) == CpuFeature::pge)
                global_pages = there;
        }
        if (leaf.function == amd_features && !global_pages) // which repeats some of leaf 1, listed before
            leaf.edx &= ~feature(CpuFeature::pge).flag;
    }
    return offered;
}

CpuFeatures guest_features(std::span<const CpuidLeaf> leaves, const CpuChoice& choice,
                           bool cpuid_intercepted) {
    const auto leaf = [&](std::uint32_t function) {
        CpuidLeaf found;
        if (!cpuid_intercepted) {
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
    const Feature& gbpages = feature(CpuFeature::gbpages);
    result.gigabyte_pages =
        choice[CpuFeature::gbpages].value_or((leaf(gbpages.leaf).*gbpages.word & gbpages.flag) != 0);
    result.cr4 =
        cr4_offered(leaf(1).ecx, leaf(7).ebx, leaf(7).ecx) | cr4::umip; // which the monitor does itself
    for (std::size_t i = 0; i < features.size(); ++i)
        if (const auto wanted = choice[feature_at(i)])
            result.cr4 = *wanted ? result.cr4 | features[i].cr4 : result.cr4 & ~features[i].cr4;
    return result;
}

} // namespace umbra
