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

/// Where CPUID shows each feature: Intel SDM vol. 2A, CPUID.
struct Place {
    CpuFeature feature;
    std::string name;
    std::uint32_t leaf;
    std::uint32_t CpuidLeaf::*word;
    unsigned bit;
    std::uint64_t cr4;
};
const std::array<Place, cpu_feature_count> places{{
    {CpuFeature::smap, "smap", 7, &CpuidLeaf::ebx, 20, cr4::smap},
    {CpuFeature::smep, "smep", 7, &CpuidLeaf::ebx, 7, cr4::smep},
    {CpuFeature::pcid, "pcid", 1, &CpuidLeaf::ecx, 17, cr4::pcide},
    {CpuFeature::invpcid, "invpcid", 7, &CpuidLeaf::ebx, 10, 0},
    {CpuFeature::pge, "pge", 1, &CpuidLeaf::edx, 13, cr4::pge},
    {CpuFeature::gbpages, "gbpages", 0x8000'0001, &CpuidLeaf::edx, 26, 0},
}};

/// What a KVM offers: all words the same. Leaf 7 has a second subleaf.
std::vector<CpuidLeaf> offered(std::uint32_t word) {
    std::vector<CpuidLeaf> leaves;
    for (const std::uint32_t function : {0U, 1U, 7U, 7U, 0x4000'0001U, 0x8000'0001U, 0x8000'0008U})
        leaves.push_back({function, 0, 0, word, word, word, word});
    leaves[3].index = 1;
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
            const bool by_default = place.feature != CpuFeature::smap;
            EXPECT_EQ(shows(leaves, place), by_default) << place.name << " of " << word;
            EXPECT_EQ(features.cr4 & place.cr4, by_default ? place.cr4 : 0) << place.name << " of " << word;
        }
        EXPECT_TRUE(features.gigabyte_pages);
        EXPECT_EQ(leaf(leaves, 7, 1).ebx, word); // another list of bits
    }
}

TEST(CpuModelTest, ChoiceIsObeyed) {
    for (const Place& place : places) {
        for (const bool wanted : {false, true}) {
            const CpuChoice choice = CpuChoice::parse((wanted ? "+" : "-") + place.name);
            for (const std::uint32_t word : {0U, all}) {
                const auto leaves = guest_cpuid(offered(word), choice, true);
                EXPECT_EQ(shows(leaves, place), wanted) << place.name << " of " << word;
                // With the host's own leaves, too, CR4 obeys.
                for (const bool intercepted : {false, true}) {
                    const CpuFeatures features = guest_features(leaves, choice, intercepted);
                    EXPECT_EQ(features.cr4 & place.cr4, wanted ? place.cr4 : 0) << place.name;
                    if (place.feature == CpuFeature::gbpages) {
                        EXPECT_EQ(features.gigabyte_pages, wanted);
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
        EXPECT_EQ(shows(full, place), place.feature != CpuFeature::smap) << place.name;
        EXPECT_FALSE(shows(empty, place)) << place.name;
        const CpuChoice with = CpuChoice::parse("+" + place.name);
        EXPECT_TRUE(shows(guest_cpuid(offered(all), with, false), place)) << place.name;
        EXPECT_FALSE(shows(guest_cpuid(offered(all), CpuChoice::parse("-" + place.name), false), place));
        try {
            (void)guest_cpuid(offered(0), with, false);
            ADD_FAILURE() << place.name << " is not there, and nobody says so";
        } catch (const StartupError& error) {
            EXPECT_EQ(error.code(), ExitCode::host_cannot);
            EXPECT_NE(std::string(error.what()).find(place.name), std::string::npos) << error.what();
        }
    }
}

TEST(CpuModelTest, WhatTheMonitorCannotDoIsHidden) {
    const auto leaves = guest_cpuid(offered(all), CpuChoice::parse("+smap,-pge"), true);
    EXPECT_EQ(leaf(leaves, 1).ebx, 0x1'ffffU);
    EXPECT_EQ(leaf(leaves, 1).ecx, all & ~(bit(3) | bit(5) | bit(21) | bit(24)));
    EXPECT_EQ(leaf(leaves, 1).edx, all & ~bit(13));
    EXPECT_EQ(leaf(leaves, 7).ebx, all);
    EXPECT_EQ(leaf(leaves, 7).ecx, all & ~(bit(3) | bit(7) | bit(16)));
    EXPECT_EQ(leaf(leaves, 7).edx, all & ~(bit(20) | bit(26) | bit(27) | bit(31)));
    EXPECT_EQ(leaf(leaves, 0x8000'0001).ecx, all & ~bit(2));
    EXPECT_EQ(leaf(leaves, 0x8000'0001).edx, all & ~bit(13)); // PGE, as in leaf 1
    EXPECT_EQ(leaf(leaves, 0x4000'0001).eax, 0U);
    const CpuFeatures features = guest_features(leaves, {}, true);
    EXPECT_EQ(features.physical_bits, 0xffU);
    EXPECT_EQ(features.cr4 & (cr4::pke | cr4::la57), 0U);
    EXPECT_NE(guest_features(guest_cpuid(offered(0), {}, true), {}, true).cr4 & cr4::umip, 0U);
}

} // namespace
} // namespace umbra
