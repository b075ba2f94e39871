// Unit tests of vmm/missing_feature.
#include "vmm/missing_feature.hpp"

#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using Code = std::vector<unsigned char>;

const Code mov_rax_to_cr4{0x0f, 0x22, 0xe0}, mov_r9_to_cr4{0x41, 0x0f, 0x22, 0xe1},
    mov_rax_to_cr3{0x0f, 0x22, 0xd8}, mov_cr4_to_rax{0x0f, 0x20, 0xe0}, wrmsr{0x0f, 0x30}, rdmsr{0x0f, 0x32},
    stac{0x0f, 0x01, 0xcb}, wrgsbase_rax{0xf3, 0x48, 0x0f, 0xae, 0xd8}, ud2{0x0f, 0x0b};

class MissingFeatureTest : public ::testing::Test {
  protected:
    MissingFeatureTest() {
        cpu.cs.long_mode = true;
        features.cr4 = cr4::pae | cr4::pge;
    }
    [[nodiscard]] std::optional<CpuFeature> of(const Code& code) const {
        return missing_feature(cpu, std::as_bytes(std::span(code)), features);
    }
    VirtualCpu cpu;
    CpuFeatures features;
};

TEST_F(MissingFeatureTest, BitsOfCr4) {
    cpu[Gpr::rax] = cr4::pae | cr4::pge | cr4::fsgsbase;
    EXPECT_EQ(of(mov_rax_to_cr4), CpuFeature::fsgsbase);
    EXPECT_EQ(of(mov_rax_to_cr3), std::nullopt);
    EXPECT_EQ(of(mov_cr4_to_rax), std::nullopt);
    EXPECT_EQ(of(mov_r9_to_cr4), std::nullopt);
    cpu[Gpr::r9] = cr4::pae | cr4::smap;
    EXPECT_EQ(of(mov_r9_to_cr4), CpuFeature::smap);
    cpu[Gpr::rax] = cr4::pae | cr4::pke; // not to be had at all
    EXPECT_EQ(of(mov_rax_to_cr4), std::nullopt);
    features.cr4 |= cr4::smap;
    EXPECT_EQ(of(mov_r9_to_cr4), std::nullopt);
}

TEST_F(MissingFeatureTest, Msrs) {
    for (const std::uint64_t index : {0x800U, 0x80bU, 0x8ffU}) {
        cpu[Gpr::rcx] = index;
        EXPECT_EQ(of(wrmsr), CpuFeature::x2apic) << index;
        EXPECT_EQ(of(rdmsr), CpuFeature::x2apic) << index;
    }
    cpu[Gpr::rcx] = 0x6e0;
    EXPECT_EQ(of(wrmsr), CpuFeature::tsc_deadline);
    cpu[Gpr::rcx] = 0x1b;
    cpu[Gpr::rax] = 0xfee0'0900;
    EXPECT_EQ(of(wrmsr), std::nullopt);
    cpu[Gpr::rax] = 0xfee0'0d00;
    EXPECT_EQ(of(wrmsr), CpuFeature::x2apic);
    EXPECT_EQ(of(rdmsr), std::nullopt);
    features.x2apic = true;
    EXPECT_EQ(of(wrmsr), std::nullopt);
}

TEST_F(MissingFeatureTest, Instructions) {
    EXPECT_EQ(of(stac), CpuFeature::smap);
    EXPECT_EQ(of(wrgsbase_rax), CpuFeature::fsgsbase);
    EXPECT_EQ(of(ud2), std::nullopt);
    EXPECT_EQ(of({0x0f}), std::nullopt);
    EXPECT_EQ(of({}), std::nullopt);
    features.cr4 |= cr4::smap | cr4::fsgsbase; // the guest has not enabled it
    EXPECT_EQ(of(stac), std::nullopt);
    EXPECT_EQ(of(wrgsbase_rax), std::nullopt);
}

} // namespace
} // namespace umbra
