// Unit tests of vmm/cpu_model: the words of --cpu, and the CPUID leaves that come of them.
#include "vmm/cpu_model.hpp"

#include "vmm/error.hpp"

#include <string>

#include <gtest/gtest.h>

namespace umbra {
namespace {

constexpr std::uint32_t bit(unsigned number) {
    return std::uint32_t{1} << number;
}
constexpr std::uint32_t all = ~std::uint32_t{0};

/// Where CPUID shows each feature: Intel SDM vol. 2A, CPUID, and Documentation/virt/kvm/x86/cpuid.rst.
struct Place {
    CpuFeature feature;
    std::string name;
    std::uint32_t leaf;
    std::uint32_t CpuidLeaf::*word;
    unsigned bit;
    std::uint64_t cr4;
    bool monitors, by_default;
};
const std::array<Place, cpu_feature_count> places{{
    {CpuFeature::smap, "smap", 7, &CpuidLeaf::ebx, 20, cr4::smap, true, false},
    {CpuFeature::smep, "smep", 7, &CpuidLeaf::ebx, 7, cr4::smep, true, true},
    {CpuFeature::pcid, "pcid", 1, &CpuidLeaf::ecx, 17, cr4::pcide, true, true},
    {CpuFeature::invpcid, "invpcid", 7, &CpuidLeaf::ebx, 10, 0, true, true},
    {CpuFeature::pge, "pge", 1, &CpuidLeaf::edx, 13, cr4::pge, true, true},
    {CpuFeature::gbpages, "gbpages", 0x8000'0001, &CpuidLeaf::edx, 26, 0, true, true},
    {CpuFeature::x2apic, "x2apic", 1, &CpuidLeaf::ecx, 21, 0, false, false},
    {CpuFeature::tsc_deadline, "tsc-deadline", 1, &CpuidLeaf::ecx, 24, 0, false, true},
    {CpuFeature::fsgsbase, "fsgsbase", 7, &CpuidLeaf::ebx, 0, cr4::fsgsbase, false, false},
    {CpuFeature::kvmclock, "kvmclock", 0x4000'0001, &CpuidLeaf::eax, 3, 0, false, true},
    {CpuFeature::invtsc, "invtsc", 0x8000'0007, &CpuidLeaf::edx, 8, 0, false, true},
}};

/// What a KVM offers: all words the same. Leaves 7 and 0xd have more than one subleaf.
std::vector<CpuidLeaf> offered(std::uint32_t word) {
    std::vector<CpuidLeaf> leaves;
    const auto add = [&](std::uint32_t function, std::uint32_t index = 0) {
        leaves.push_back({function, index, 0, word, word, word, word});
    };
    for (const std::uint32_t function :
         {0U,           1U,           4U,           5U,           6U,           7U,           0xaU,
          0xbU,         0xdU,         0x1fU,        0x4000'0000U, 0x4000'0001U, 0x4000'0002U, 0x8000'0001U,
          0x8000'0007U, 0x8000'0008U, 0x8000'000aU, 0x8000'001dU, 0x8000'001eU, 0x8000'0021U})
        add(function);
    add(7, 1);
    add(7, 2);
    add(0xb, 1);
    add(0xd, 1);
    return leaves;
}

const CpuidLeaf& leaf(const std::vector<CpuidLeaf>& leaves, std::uint32_t function, std::uint32_t index = 0) {
    for (const CpuidLeaf& candidate : leaves)
        if (candidate.function == function && candidate.index == index)
            return candidate;
    ADD_FAILURE() << "no leaf " << function;
    return leaves.front();
}

bool shows(const std::vector<CpuidLeaf>& leaves, const Place& place) {
    return (leaf(leaves, place.leaf).*place.word >> place.bit & 1) != 0;
}

std::string complaint(std::string_view text) {
    try {
        (void)CpuChoice::parse(text);
    } catch (const StartupError& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_usage);
        return error.what();
    }
    return {};
}

TEST(CpuChoiceTest, Words) {
    const CpuChoice choice = CpuChoice::parse("+smap,-pcid,-smap,+gbpages");
    EXPECT_EQ(choice[CpuFeature::smap], false); // the later word counts
    EXPECT_EQ(choice[CpuFeature::pcid], false);
    EXPECT_EQ(choice[CpuFeature::gbpages], true);
    EXPECT_EQ(choice[CpuFeature::smep], std::nullopt);
    EXPECT_FALSE(choice.none());
    EXPECT_TRUE(CpuChoice().none());
    for (const Place& place : places)
        EXPECT_EQ(CpuChoice::parse("+" + place.name)[place.feature], true) << place.name;
}

TEST(CpuChoiceTest, ComplaintsNameTheWordAndAllNames) {
    for (const auto& [text, word] :
         std::initializer_list<std::pair<const char*, const char*>>{{"+la57", "'+la57'"},
                                                                    {"smap", "'smap'"},
                                                                    {"+smap,pcid", "'pcid'"},
                                                                    {"", "''"},
                                                                    {"+", "'+'"},
                                                                    {"+smap,", "''"},
                                                                    {"+SMAP", "'+SMAP'"},
                                                                    {"+smap -pcid", "'+smap -pcid'"}}) {
        const std::string said = complaint(text);
        EXPECT_NE(said.find(word), std::string::npos) << text << ": " << said;
        for (const Place& place : places)
            EXPECT_NE(said.find(place.name), std::string::npos) << said;
    }
}

TEST(CpuModelTest, ShadowEngineHasItsFeaturesWhateverKvmOffers) {
    for (const std::uint32_t word : {0U, all}) {
        const auto leaves = guest_cpuid(offered(word), {}, true);
        const CpuFeatures features = guest_features(leaves, {}, true);
        for (const Place& place : places) {
            const bool by_default = place.by_default && (place.monitors || word != 0);
            EXPECT_EQ(shows(leaves, place), by_default) << place.name << " of " << word;
            EXPECT_EQ(features.cr4 & place.cr4, by_default ? place.cr4 : 0) << place.name << " of " << word;
        }
        EXPECT_TRUE(features.gigabyte_pages);
        EXPECT_FALSE(features.x2apic);
        EXPECT_EQ(features.tsc_deadline, word != 0);
        EXPECT_EQ(features.kvmclock, word != 0);
    }
}

TEST(CpuModelTest, ChoiceIsObeyed) {
    for (const Place& place : places) {
        for (const bool wanted : {false, true}) {
            const CpuChoice choice = CpuChoice::parse((wanted ? "+" : "-") + place.name);
            for (const std::uint32_t word : {0U, all}) {
                if (word == 0 && wanted && !place.monitors)
                    continue; // NativeEngineHasWhatKvmOffers
                const auto leaves = guest_cpuid(offered(word), choice, true);
                EXPECT_EQ(shows(leaves, place), wanted) << place.name << " of " << word;
                // With the host's own leaves, too, CR4 obeys.
                for (const bool intercepted : {false, true}) {
                    const CpuFeatures features = guest_features(leaves, choice, intercepted);
                    EXPECT_EQ(features.cr4 & place.cr4, wanted ? place.cr4 : 0) << place.name;
                    if (place.feature == CpuFeature::gbpages) {
                        EXPECT_EQ(features.gigabyte_pages, wanted);
                    }
                    if (place.feature == CpuFeature::x2apic) {
                        EXPECT_EQ(features.x2apic, wanted);
                    }
                    if (place.feature == CpuFeature::tsc_deadline) {
                        EXPECT_EQ(features.tsc_deadline, wanted);
                    }
                    if (place.feature == CpuFeature::kvmclock) {
                        EXPECT_EQ(features.kvmclock, wanted);
                    }
                }
            }
        }
    }
}

TEST(CpuModelTest, NativeEngineHasWhatKvmOffers) {
    const auto full = guest_cpuid(offered(all), {}, false);
    const auto empty = guest_cpuid(offered(0), CpuChoice::parse("-smep"), false);
    for (const Place& place : places) {
        EXPECT_EQ(shows(full, place), place.by_default) << place.name;
        EXPECT_FALSE(shows(empty, place)) << place.name;
        const CpuChoice with = CpuChoice::parse("+" + place.name);
        EXPECT_TRUE(shows(guest_cpuid(offered(all), with, false), place)) << place.name;
        EXPECT_FALSE(shows(guest_cpuid(offered(all), CpuChoice::parse("-" + place.name), false), place));
        for (const bool shadow_engine : {false, true}) {
            if (shadow_engine && place.monitors)
                continue; // needs nothing of KVM
            try {
                (void)guest_cpuid(offered(0), with, shadow_engine);
                ADD_FAILURE() << place.name << " is not there, and nobody says so";
            } catch (const StartupError& error) {
                EXPECT_EQ(error.code(), ExitCode::host_cannot);
                EXPECT_NE(std::string(error.what()).find(place.name), std::string::npos) << error.what();
            }
        }
    }
}

TEST(CpuModelTest, WhatTheMonitorCannotDoIsHidden) {
    const auto leaves = guest_cpuid(offered(all), CpuChoice::parse("+smap,-pge"), true);
    const auto hidden = [&](std::uint32_t function, std::uint32_t index, std::uint32_t CpuidLeaf::*word) {
        return ~(leaf(leaves, function, index).*word);
    };
    // Of leaf 1: DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, CNXT-ID, SDBG, xTPR, PDCM, DCA, x2APIC.
    EXPECT_EQ(hidden(1, 0, &CpuidLeaf::ecx), bit(2) | bit(3) | bit(4) | bit(5) | bit(6) | bit(7) | bit(8) |
                                                 bit(10) | bit(11) | bit(14) | bit(15) | bit(18) | bit(21));
    // VME, PGE, DS, ACPI, HTT, TM, PBE.
    EXPECT_EQ(hidden(1, 0, &CpuidLeaf::edx),
              bit(1) | bit(13) | bit(21) | bit(22) | bit(28) | bit(29) | bit(31));
    EXPECT_EQ(leaf(leaves, 6).eax, bit(2)); // ARAT
    EXPECT_EQ(leaf(leaves, 6).ecx, 0U);     // APERF, MPERF, energy bias
    EXPECT_EQ(hidden(7, 0, &CpuidLeaf::ebx), bit(0) | bit(2) | bit(12) | bit(14) | bit(15) | bit(25));
    for (const unsigned number : {3U, 5U, 7U, 16U, 31U}) // PKU, WAITPKG, shadow stacks, LA57, PKS
        EXPECT_NE(hidden(7, 0, &CpuidLeaf::ecx) & bit(number), 0U) << number;
    EXPECT_EQ(hidden(7, 0, &CpuidLeaf::ecx) & bit(2), 0U);       // UMIP
    for (const unsigned number : {20U, 22U, 26U, 27U, 28U, 31U}) // IBT, AMX, IBRS, STIBP, L1D_FLUSH, SSBD
        EXPECT_NE(hidden(7, 0, &CpuidLeaf::edx) & bit(number), 0U) << number;
    EXPECT_EQ(hidden(7, 0, &CpuidLeaf::edx) & (bit(10) | bit(29)), 0U); // MD_CLEAR, ARCH_CAPABILITIES
    EXPECT_EQ(leaf(leaves, 7, 2).edx, bit(5));
    EXPECT_EQ(hidden(0xd, 0, &CpuidLeaf::eax), bit(3) | bit(4) | bit(9) | bit(17) | bit(18));
    EXPECT_EQ(hidden(0xd, 1, &CpuidLeaf::eax), bit(3) | bit(4)); // XSAVES, XFD
    EXPECT_EQ(leaf(leaves, 0xd, 1).ecx, 0U);                     // supervisor states
    for (const unsigned number : {1U, 2U, 4U, 10U, 23U, 29U})    // CmpLegacy, SVM, CR8, IBS, counters, MWAITX
        EXPECT_NE(hidden(0x8000'0001, 0, &CpuidLeaf::ecx) & bit(number), 0U) << number;
    EXPECT_EQ(hidden(0x8000'0001, 0, &CpuidLeaf::edx), bit(13) | bit(25)); // PGE, as in leaf 1; FXSR_OPT
    EXPECT_EQ(leaf(leaves, 0x8000'0007).ebx, 0U);
    EXPECT_EQ(leaf(leaves, 0x8000'0007).edx, bit(8));                 // the invariant TSC
    for (const unsigned number : {12U, 14U, 15U, 17U, 24U, 25U, 28U}) // speculation controls
        EXPECT_NE(hidden(0x8000'0008, 0, &CpuidLeaf::ebx) & bit(number), 0U) << number;
    EXPECT_NE(hidden(0x8000'0021, 0, &CpuidLeaf::eax) & bit(8), 0U); // automatic IBRS
    for (const std::uint32_t function : {5U, 0xaU, 0x1fU, 0x8000'000aU}) {
        const CpuidLeaf& empty = leaf(leaves, function);
        EXPECT_EQ(empty.eax | empty.ebx | empty.ecx | empty.edx, 0U) << function;
    }
    const CpuFeatures features = guest_features(leaves, {}, true);
    EXPECT_EQ(features.physical_bits, 0xffU);
    EXPECT_EQ(features.cr4 & (cr4::vme | cr4::pke | cr4::la57), 0U);
    EXPECT_NE(guest_features(guest_cpuid(offered(0), {}, true), {}, true).cr4 & cr4::umip, 0U);
}

TEST(CpuModelTest, OneLogicalProcessor) {
    const auto leaves = guest_cpuid(offered(all), {}, true);
    EXPECT_EQ(leaf(leaves, 1).ebx, 0x1'ffffU); // APIC ID 0
    EXPECT_EQ(leaf(leaves, 4).eax >> 14, 0U);  // nothing shares a cache, no other core
    EXPECT_EQ(leaf(leaves, 4).eax & 0x3fff, 0x3fffU);
    EXPECT_EQ(leaf(leaves, 0x8000'001d).eax >> 14 & 0xfff, 0U);
    EXPECT_EQ(leaf(leaves, 0x8000'001e).eax, 0U);
    EXPECT_EQ(leaf(leaves, 0x8000'0008).ecx & 0xf0ff, 0U);
    for (const std::uint32_t level : {0U, 1U}) {
        const CpuidLeaf& topology = leaf(leaves, 0xb, level);
        EXPECT_EQ(topology.flags, 1U); // its index matters
        EXPECT_EQ(topology.eax, 0U);
        EXPECT_EQ(topology.ebx, 1U);
        EXPECT_EQ(topology.ecx, level | (level + 1) << 8); // threads, then cores
        EXPECT_EQ(topology.edx, 0U);
    }
}

TEST(CpuModelTest, HypervisorLeaves) {
    for (const std::uint32_t word : {0U, all}) {
        const auto leaves = guest_cpuid(offered(word), {}, true);
        const CpuidLeaf& first = leaf(leaves, 0x4000'0000);
        EXPECT_EQ(first.eax, 0x4000'0001U);
        std::string signature;
        for (const std::uint32_t part : {first.ebx, first.ecx, first.edx})
            for (unsigned i = 0; i < 4; ++i)
                signature += static_cast<char>(part >> (8 * i));
        EXPECT_EQ(signature, std::string("KVMKVMKVM\0\0\0", 12));
        EXPECT_NE(leaf(leaves, 1).ecx & bit(31), 0U);
        // The clock by both pairs of MSRs, no delay for ports, and a clock that is stable; nothing else.
        const std::uint32_t expected = bit(0) | bit(1) | bit(3) | bit(24);
        EXPECT_EQ(leaf(leaves, 0x4000'0001).eax, word & expected);
        EXPECT_EQ(leaf(leaves, 0x4000'0001).edx, 0U); // no hints
        for (const CpuidLeaf& other : leaves)
            EXPECT_NE(other.function, 0x4000'0002U);
    }
    const auto without = guest_cpuid(offered(all), CpuChoice::parse("-kvmclock"), true);
    EXPECT_EQ(leaf(without, 0x4000'0001).eax, bit(1));
}

/// As Linux computes it, in 32 bits (arch/x86/kernel/tsc.c, native_calibrate_tsc).
std::uint32_t tsc_khz_by_leaf_15(const CpuidLeaf& crystal) {
    return crystal.ecx / 1000 * crystal.ebx / crystal.eax;
}

TEST(CpuModelTest, TscFrequencyIsTold) {
    for (const std::uint32_t khz : {800'000U, 999'999U, 1'000'000U, 1'996'247U, 2'596'120U, 3'693'013U,
                                    4'294'000U, 5'700'001U, 31'250U}) {
        const auto leaves = guest_cpuid(offered(0), {}, true, khz);
        EXPECT_EQ(leaf(leaves, 0).eax, 0x16U);
        const CpuidLeaf& crystal = leaf(leaves, 0x15);
        EXPECT_EQ(crystal.ecx, 1'000'000'000U); // the rate of KVM's APIC timer
        EXPECT_LE(std::uint64_t{crystal.ecx / 1000} * crystal.ebx, all);
        EXPECT_NEAR(tsc_khz_by_leaf_15(crystal), khz, 1.2e-4 * khz + 1);
        EXPECT_EQ(leaf(leaves, 0x16).eax, (khz + 500) / 1000);
        EXPECT_EQ(leaf(leaves, 0x4000'0000).eax, 0x4000'0010U);
        EXPECT_EQ(leaf(leaves, 0x4000'0010).eax, khz);
        EXPECT_EQ(leaf(leaves, 0x4000'0010).ebx, 1'000'000U);
    }
    const auto unknown = guest_cpuid(offered(0), {}, true);
    for (const CpuidLeaf& other : unknown)
        EXPECT_FALSE(other.function == 0x15 || other.function == 0x16 || other.function == 0x4000'0010);
    EXPECT_EQ(leaf(guest_cpuid(offered(all), {}, true, 2'000'000), 0).eax, all); // more leaves stay
}

} // namespace
} // namespace umbra
