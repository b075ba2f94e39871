// Unit tests of vmm/msr_policy: what the registers of a booting kernel get, and that what KVM writes by
// itself stays in guest RAM.
#include "vmm/msr_policy.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

constexpr std::uint64_t megabyte = std::uint64_t{1} << 20;
constexpr std::uint64_t all = ~std::uint64_t{0};

constexpr std::uint32_t apic_base = 0x1b, old_wall_clock = 0x11, old_system_time = 0x12,
                        wall_clock = 0x4b56'4d00, system_time = 0x4b56'4d01;

constexpr CpuFeatures everything() {
    CpuFeatures features;
    features.x2apic = features.tsc_deadline = features.kvmclock = features.amd = true;
    features.tsc_adjust = features.mtrr = features.machine_checks = true;
    features.arch_capabilities = features.osvw = true;
    features.physical_bits = 40;
    return features;
}

/// Two ranges of RAM, with a hole between them.
class MsrPolicyTest : public ::testing::Test {
  protected:
    [[nodiscard]] MsrWrite write(std::uint32_t index, std::uint64_t value) const {
        return msr_write(index, value, everything(), memory_);
    }
    static MsrRead read(std::uint32_t index) { return msr_read(index, everything()); }

    static constexpr GuestPhys high{4096 * megabyte};
    std::vector<std::byte> low_bytes_ = std::vector<std::byte>(megabyte), high_bytes_ = low_bytes_;
    GuestMemory memory_{{{GuestPhys(0), low_bytes_}, {high, high_bytes_}}};
};

TEST_F(MsrPolicyTest, TableIsAscendingAndFoundAtBothEndsOfEachRow) {
    std::uint64_t next = 0;
    for (const MsrRule& rule : msr_rules()) {
        EXPECT_GE(rule.first, next);
        EXPECT_GE(rule.last, rule.first);
        next = std::uint64_t{rule.last} + 1;
        for (const std::uint32_t index : {rule.first, rule.last}) {
            EXPECT_EQ(read(index), rule.read) << std::hex << index;
            EXPECT_EQ(write(index, 0), rule.write) << std::hex << index;
        }
    }
}

TEST_F(MsrPolicyTest, WhatIsNotListedDoesNotExist) {
    for (const std::uint32_t index : {
             0x2U,                                                   // between rows
             0x48U,        0x49U,                                    // SPEC_CTRL, PRED_CMD
             0x186U,       0x309U,       0x38fU,       0xc001'0200U, // performance counters
             0x400U,       0x401U,                                   // machine-check banks
             0x480U,                                                 // VMX
             0x20eU + 2,   0x24fU,       0x280U,                     // beside the MTRRs
             0x4000'0000U, 0x4000'0001U, // Hyper-V's, by which KVM writes code into guest memory
             0x4b56'4d02U, 0x4b56'4d03U, 0x4b56'4d04U, 0x4b56'4d05U, // KVM's, with addresses of the guest's
             0xc001'0112U, 0xc001'0114U, 0xc001'0117U, 0xc001'011fU, 0xc001'1020U, // SMM, SVM, SSBD
             0xffff'ffffU,
         }) {
        EXPECT_EQ(read(index).kind, MsrRead::refused) << std::hex << index;
        EXPECT_EQ(write(index, 0), MsrWrite::refused) << std::hex << index;
    }
}

TEST_F(MsrPolicyTest, RegistersOfFeaturesThatAreNotThere) {
    const CpuFeatures none;
    for (const std::uint32_t index :
         {old_wall_clock, old_system_time, wall_clock, system_time, 0x6e0U, 0x800U, 0x80bU, 0x8ffU}) {
        EXPECT_EQ(read(index), (MsrRead{MsrRead::machine, all})) << std::hex << index;
        EXPECT_EQ(write(index, 0), MsrWrite::machine) << std::hex << index;
        EXPECT_EQ(msr_read(index, none), MsrRead{}) << std::hex << index;
        EXPECT_EQ(msr_write(index, 0, none, memory_), MsrWrite::refused) << std::hex << index;
    }
    CpuFeatures clock_only;
    clock_only.kvmclock = true;
    EXPECT_EQ(msr_read(system_time, clock_only).kind, MsrRead::machine);
    EXPECT_EQ(msr_read(0x6e0, clock_only).kind, MsrRead::refused);
    EXPECT_EQ(msr_read(0x10, none).kind, MsrRead::machine); // of no feature
}

TEST_F(MsrPolicyTest, CountersOfAmdsCpusCountNothing) {
    CpuFeatures intel = everything();
    intel.amd = false;
    for (std::uint32_t index = 0xc001'0000; index < 0xc001'0008; ++index) {
        EXPECT_EQ(read(index), (MsrRead{MsrRead::fixed, 0})) << std::hex << index;
        EXPECT_EQ(write(index, all), MsrWrite::ignored) << std::hex << index;
        EXPECT_EQ(msr_read(index, intel).kind, MsrRead::refused) << std::hex << index;
        EXPECT_EQ(msr_write(index, 0, intel, memory_), MsrWrite::refused) << std::hex << index;
    }
}

TEST_F(MsrPolicyTest, SystemTimeIsWrittenToRamOnly) {
    constexpr std::uint64_t size = 32;
    for (const std::uint32_t index : {system_time, old_system_time}) {
        const auto enable = [&](std::uint64_t address) { return write(index, address | 1); };
        EXPECT_EQ(enable(0), MsrWrite::machine);
        EXPECT_EQ(enable(megabyte - size), MsrWrite::machine);
        EXPECT_EQ(enable(high.value()), MsrWrite::machine);
        EXPECT_EQ(enable((high + megabyte - size).value()), MsrWrite::machine);
        // Reaches out of RAM, lies in the hole, just below the second range, behind all.
        for (const std::uint64_t address :
             {megabyte - size + 2, megabyte - 2, megabyte, high.value() - size, high.value() - 2,
              (high + megabyte - size + 2).value(), (high + megabyte).value(), std::uint64_t{1} << 45,
              std::uint64_t{1} << 63, all - size, all - 1})
            EXPECT_EQ(enable(address), MsrWrite::refused) << std::hex << address;
        // Not enabled, nothing is written.
        EXPECT_EQ(write(index, 0), MsrWrite::machine);
        EXPECT_EQ(write(index, megabyte), MsrWrite::machine);
    }
}

TEST_F(MsrPolicyTest, WallClockIsWrittenToRamOnly) {
    constexpr std::uint64_t size = 12;
    for (const std::uint32_t index : {wall_clock, old_wall_clock}) {
        EXPECT_EQ(write(index, 0x1000), MsrWrite::machine);
        EXPECT_EQ(write(index, 0x1001), MsrWrite::machine); // bit 0 is the address's
        EXPECT_EQ(write(index, megabyte - size), MsrWrite::machine);
        EXPECT_EQ(write(index, high.value()), MsrWrite::machine);
        for (const std::uint64_t address : {megabyte - size + 1, megabyte - 1, megabyte, high.value() - 1,
                                            (high + megabyte - size + 1).value(), all, all - size})
            EXPECT_EQ(write(index, address), MsrWrite::refused) << std::hex << address;
    }
}

TEST_F(MsrPolicyTest, ApicBase) {
    constexpr std::uint64_t window = 0xfee0'0000, bootstrap = 1U << 8, x2apic = 1U << 10, enabled = 1U << 11;
    constexpr std::uint64_t off = window | bootstrap;
    constexpr std::array modes{off, off | enabled, off | enabled | x2apic};
    // From each mode, to each (Intel SDM vol. 3A, figure 10-27).
    constexpr std::array<std::array<bool, 3>, 3> allowed{
        {{true, true, false}, {true, true, true}, {true, false, true}}};
    for (std::size_t from = 0; from < modes.size(); ++from)
        for (std::size_t to = 0; to < modes.size(); ++to) {
            EXPECT_EQ(apic_base_allowed(modes.at(from), modes.at(to), everything()), allowed.at(from).at(to))
                << from << " to " << to;
            // The window may move, and the bootstrap bit is as the kernel likes it.
            for (const std::uint64_t other : {bootstrap, std::uint64_t{0x1000}, std::uint64_t{1} << 39})
                EXPECT_EQ(apic_base_allowed(modes.at(from), modes.at(to) ^ other, everything()),
                          allowed.at(from).at(to));
            for (const std::uint64_t reserved : {1U, 0x80U, 0x200U})
                EXPECT_FALSE(apic_base_allowed(modes.at(from), modes.at(to) | reserved, everything()));
            EXPECT_FALSE(
                apic_base_allowed(modes.at(from), modes.at(to) | std::uint64_t{1} << 40, everything()));
        }
    EXPECT_FALSE(apic_base_allowed(off | enabled, off | x2apic, everything())); // no such mode
    EXPECT_FALSE(apic_base_allowed(off, off | x2apic, everything()));
    CpuFeatures without = everything();
    without.x2apic = false;
    EXPECT_FALSE(apic_base_allowed(modes[1], modes[2], without));
    EXPECT_TRUE(apic_base_allowed(modes[1], modes[0], without));
    EXPECT_EQ(write(apic_base, 0), MsrWrite::apic_base);
}

/// What Linux does without asking first, and would complain of if it faulted.
TEST_F(MsrPolicyTest, RegistersThatLinuxTakesForGranted) {
    // Read, on Intel's CPUs and on AMD's.
    for (const std::uint32_t index :
         {0x10U, 0x17U, apic_base, 0x8bU, 0xcdU, 0xfeU, 0x10aU, 0x179U, 0x17aU, 0x1a0U, 0x1d9U, 0x2ffU,
          0xc001'0010U, 0xc001'0015U, 0xc001'001fU, 0xc001'0055U, 0xc001'0140U})
        EXPECT_NE(read(index).kind, MsrRead::refused) << std::hex << index;
    // Written.
    for (const std::uint32_t index : {0x79U, 0x8bU, 0x17aU, 0x1a0U, 0x200U, 0x20fU, 0x250U, 0x26fU, 0x2ffU,
                                      0xc001'0015U, 0xc001'001fU, 0xc001'0020U})
        EXPECT_NE(write(index, 0), MsrWrite::refused) << std::hex << index;
    // By which it decides: no machine-check banks; the TSC counts as P0; feature control is locked.
    EXPECT_EQ(read(0x179), (MsrRead{MsrRead::fixed, 0}));
    EXPECT_EQ(read(0xc001'0015), (MsrRead{MsrRead::fixed, 1U << 24}));
    EXPECT_EQ(read(0x3a), (MsrRead{MsrRead::fixed, 1}));
    // No CPUID faulting, which would be the machine's.
    EXPECT_EQ(read(0xce), (MsrRead{MsrRead::fixed, 0}));
    EXPECT_EQ(write(0x140, 1), MsrWrite::unchanged);
    // That enhanced IBRS is there (bit 1) would make it write SPEC_CTRL; that the CPU is not vulnerable to
    // Meltdown (bit 0) makes page-table isolation unnecessary.
    EXPECT_EQ(read(0x10a).kind, MsrRead::machine);
    EXPECT_EQ(read(0x10a).value & 3, 1U);
}

/// Registers in which userspace's writes do what a guest's must not.
TEST_F(MsrPolicyTest, WritesThatKvmTakesFromUserspaceOnly) {
    EXPECT_EQ(write(0x8b, 0), MsrWrite::ignored);    // the microcode's revision would become what is written
    EXPECT_EQ(write(0x3b, 1), MsrWrite::tsc_adjust); // would be read back, but move no TSC
    EXPECT_EQ(write(0x10, 0), MsrWrite::tsc);        // might be taken for an attempt to synchronize vCPUs
    EXPECT_EQ(write(0x10a, 0), MsrWrite::refused);   // capabilities
    EXPECT_EQ(write(0xfe, 0), MsrWrite::refused);    // likewise
    EXPECT_EQ(write(0xc001'0140, 0), MsrWrite::refused);
    EXPECT_EQ(write(0x1d9, 2), MsrWrite::unchanged); // BTF would change what the monitor's steps are
}

// --- The policy and CPUID

/// A bit of CPUID, and registers that a CPU has if it is 1, and that a guest then may read: "SDM", vol. 4,
/// table 2-2; APM vol. 2, appendix A; Documentation/virt/kvm/x86/msr.rst.
struct Announced {
    std::uint32_t leaf, index;
    std::uint32_t CpuidLeaf::*word;
    unsigned bit;
    std::vector<std::uint32_t> registers;
};
const std::vector<Announced>& announced() {
    static const std::vector<Announced> all_of_them{
        {1, 0, &CpuidLeaf::edx, 12, {0xfe, 0x200, 0x20f, 0x250, 0x258, 0x259, 0x268, 0x26f, 0x2ff}}, // MTRR
        {1, 0, &CpuidLeaf::edx, 14, {0x179, 0x17a}},                                                 // MCA
        {1, 0, &CpuidLeaf::ecx, 21, {0x802, 0x80f, 0x83f}},                                          // x2APIC
        {1, 0, &CpuidLeaf::ecx, 24, {0x6e0}},                              // TSC deadline
        {1, 0, &CpuidLeaf::ecx, 5, {0x480, 0x491}},                        // VMX
        {1, 0, &CpuidLeaf::ecx, 6, {0x9b}},                                // SMX
        {1, 0, &CpuidLeaf::ecx, 15, {0x345}},                              // PDCM
        {1, 0, &CpuidLeaf::edx, 21, {0x600}},                              // DS
        {1, 0, &CpuidLeaf::edx, 22, {0x19a, 0x19b, 0x19c}},                // thermal control
        {6, 0, &CpuidLeaf::ecx, 0, {0xe7, 0xe8}},                          // MPERF and APERF
        {6, 0, &CpuidLeaf::ecx, 3, {0x1b0}},                               // energy bias
        {6, 0, &CpuidLeaf::eax, 7, {0x770, 0x774}},                        // HWP
        {7, 0, &CpuidLeaf::ebx, 1, {0x3b}},                                // TSC_ADJUST
        {7, 0, &CpuidLeaf::ebx, 2, {0x8c}},                                // SGX
        {7, 0, &CpuidLeaf::ebx, 12, {0xc8d, 0xc8e}},                       // RDT monitoring
        {7, 0, &CpuidLeaf::ebx, 14, {0xd90}},                              // MPX
        {7, 0, &CpuidLeaf::ebx, 15, {0xc81, 0xc90}},                       // RDT allocation
        {7, 0, &CpuidLeaf::ebx, 25, {0x570}},                              // processor trace
        {7, 0, &CpuidLeaf::ecx, 5, {0xe1}},                                // WAITPKG
        {7, 0, &CpuidLeaf::ecx, 7, {0x6a0, 0x6a2, 0x6a4}},                 // shadow stacks
        {7, 0, &CpuidLeaf::ecx, 13, {0x981, 0x982}},                       // TME
        {7, 0, &CpuidLeaf::ecx, 31, {0x6e1}},                              // PKS
        {7, 0, &CpuidLeaf::edx, 20, {0x6a0, 0x6a2}},                       // IBT
        {7, 0, &CpuidLeaf::edx, 26, {0x48, 0x49}},                         // SPEC_CTRL, PRED_CMD
        {7, 0, &CpuidLeaf::edx, 28, {0x10b}},                              // FLUSH_CMD
        {7, 0, &CpuidLeaf::edx, 29, {0x10a}},                              // ARCH_CAPABILITIES
        {7, 0, &CpuidLeaf::edx, 30, {0xcf}},                               // CORE_CAPABILITIES
        {7, 1, &CpuidLeaf::eax, 17, {0x1cc, 0x1d0}},                       // FRED
        {7, 1, &CpuidLeaf::eax, 22, {0x17d1}},                             // HRESET
        {0xd, 1, &CpuidLeaf::eax, 4, {0x1c4, 0x1c5}},                      // XFD
        {0x8000'0001, 0, &CpuidLeaf::ecx, 2, {0xc001'0114, 0xc001'0117}},  // SVM
        {0x8000'0001, 0, &CpuidLeaf::ecx, 9, {0xc001'0140, 0xc001'0141}},  // OSVW
        {0x8000'0001, 0, &CpuidLeaf::ecx, 10, {0xc001'1030}},              // IBS
        {0x8000'0001, 0, &CpuidLeaf::ecx, 15, {0xc000'0105}},              // LWP
        {0x8000'0001, 0, &CpuidLeaf::ecx, 23, {0xc001'0200, 0xc001'020b}}, // six counters
        {0x8000'0001, 0, &CpuidLeaf::ecx, 24, {0xc001'0240}},              // of the northbridge
        {0x8000'0001, 0, &CpuidLeaf::ecx, 28, {0xc001'0230}},              // of the cache
        {0x8000'0008, 0, &CpuidLeaf::ebx, 12, {0x49}},                     // IBPB
        {0x8000'0008, 0, &CpuidLeaf::ebx, 14, {0x48}},                     // IBRS
        {0x8000'0008, 0, &CpuidLeaf::ebx, 24, {0x48}},                     // SSBD
        {0x8000'0008, 0, &CpuidLeaf::ebx, 25, {0xc001'011f}},              // VIRT_SPEC_CTRL
        {0x8000'001f, 0, &CpuidLeaf::eax, 0, {0xc001'0131}},               // SEV
        {0x8000'0022, 0, &CpuidLeaf::eax, 0, {0xc000'0300, 0xc000'0301}},  // counters of version 2
        {0x4000'0001, 0, &CpuidLeaf::eax, 0, {old_wall_clock, old_system_time}},
        {0x4000'0001, 0, &CpuidLeaf::eax, 3, {wall_clock, system_time}},
        {0x4000'0001, 0, &CpuidLeaf::eax, 4, {0x4b56'4d02}},  // asynchronous page faults
        {0x4000'0001, 0, &CpuidLeaf::eax, 5, {0x4b56'4d03}},  // stolen time
        {0x4000'0001, 0, &CpuidLeaf::eax, 6, {0x4b56'4d04}},  // end of interrupt in memory
        {0x4000'0001, 0, &CpuidLeaf::eax, 12, {0x4b56'4d05}}, // polling
        {0x4000'0001, 0, &CpuidLeaf::eax, 17, {0x4b56'4d08}}, // migration
    };
    return all_of_them;
}

/// What a KVM offers: in each leaf the same words.
std::vector<CpuidLeaf> offered(std::uint32_t word) {
    std::vector<CpuidLeaf> leaves{{0, 0, 0, 0x1f, 0, 0, 0}};
    for (const Announced& each : announced())
        if (std::ranges::none_of(leaves, [&](const CpuidLeaf& leaf) {
                return leaf.function == each.leaf && leaf.index == each.index;
            }))
            leaves.push_back({each.leaf, each.index, 0, word, word, word, word});
    return leaves;
}

/// For either engine, all that the guest's CPUID announces is there and can be read, and nothing else is.
TEST_F(MsrPolicyTest, FollowsFromCpuid) {
    for (const bool shadow_engine : {true, false})
        for (const char* words : {"+pge", "+x2apic", "-tsc-deadline", "-kvmclock"})
            for (const std::uint32_t word : {0U, ~0U}) {
                if (word == 0 && words[0] == '+') // what KVM does not offer cannot be asked for
                    continue;
                const CpuChoice choice = CpuChoice::parse(words);
                const auto leaves = guest_cpuid(offered(word), choice, shadow_engine);
                const CpuFeatures features = guest_features(leaves, choice, true);
                std::map<std::uint32_t, bool> there; // announced by any
                for (const Announced& each : announced())
                    for (const CpuidLeaf& leaf : leaves)
                        if (leaf.function == each.leaf && leaf.index == each.index)
                            for (const std::uint32_t index : each.registers)
                                there[index] |= (leaf.*each.word >> each.bit & 1) != 0;
                for (const auto& [index, shown] : there) {
                    EXPECT_EQ(msr_read(index, features).kind != MsrRead::refused, shown)
                        << std::hex << index << " with " << words << " of " << word;
                    if (!shown) {
                        EXPECT_EQ(msr_write(index, 0, features, memory_), MsrWrite::refused)
                            << std::hex << index;
                    }
                }
            }
}

} // namespace
} // namespace umbra
