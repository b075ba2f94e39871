// Unit tests of vmm/cpu.hpp: which paging mode the control registers select, and what of them a walk needs.
#include "vmm/cpu.hpp"

#include <array>

#include <gtest/gtest.h>

namespace umbra {
namespace {

TEST(Cpu, PagingFormat) {
    struct Case {
        std::uint64_t cr0, cr4, efer;
        const PagingFormat* format;
    };
    constexpr std::uint64_t on = cr0::pe | cr0::pg;
    constexpr std::array cases{
        Case{cr0::pe, cr4::pae | cr4::pse, efer::lme, &paging_off},
        Case{on, 0, 0, &paging_32_bit},
        Case{on, cr4::pse, efer::nxe, &paging_32_bit_pse},
        Case{on, cr4::pae, 0, &paging_pae},
        Case{on, cr4::pae | cr4::pse, efer::nxe, &paging_pae},
        Case{on, cr4::pae, efer::lme | efer::lma, &paging_4_level},
        Case{on, cr4::pae | cr4::la57, efer::lme | efer::lma, &paging_5_level},
        Case{on, cr4::pae | cr4::la57, 0, &paging_pae}, // LA57 means nothing outside long mode
    };
    for (const Case& tested : cases) {
        VirtualCpu cpu;
        cpu.cr0 = tested.cr0;
        cpu.cr4 = tested.cr4;
        cpu.efer = tested.efer;
        EXPECT_EQ(&paging_format(cpu), tested.format)
            << std::hex << tested.cr0 << ' ' << tested.cr4 << ' ' << tested.efer;
    }
}

TEST(Cpu, EachControlBitReachesTheWalk) {
    VirtualCpu cpu;
    cpu.cr0 = cr0::pe | cr0::pg;
    cpu.cr4 = cr4::pae;
    cpu.efer = efer::lme | efer::lma;
    GuestPaging expected = guest_paging(cpu, 40, false);
    EXPECT_EQ(expected.physical_bits, 40U);
    EXPECT_FALSE(expected.gigabyte_pages || expected.write_protect || expected.no_execute || expected.smep ||
                 expected.smap || expected.global_pages);
    const auto same = [&] { return guest_paging(cpu, 40, false) == expected; };
    cpu.cr0 |= cr0::wp;
    expected.write_protect = true;
    EXPECT_TRUE(same());
    cpu.efer |= efer::nxe;
    expected.no_execute = true;
    EXPECT_TRUE(same());
    cpu.cr4 |= cr4::smep;
    expected.smep = true;
    EXPECT_TRUE(same());
    cpu.cr4 |= cr4::smap;
    expected.smap = true;
    EXPECT_TRUE(same());
    cpu.cr4 |= cr4::pge;
    expected.global_pages = true;
    EXPECT_TRUE(same());
}

TEST(Cpu, PartsOfCr3) {
    VirtualCpu cpu;
    cpu.cr0 = cr0::pe | cr0::pg;
    cpu.cr4 = cr4::pae;
    cpu.efer = efer::lme | efer::lma;
    cpu.cr3 = 0x0012'3456'789a'bfe5;
    cpu.pdptes = {1, 2, 3, 4};
    EXPECT_EQ(guest_paging(cpu, 52, true).root, GuestPhys(0x2'3456'789a'b000).frame());
    EXPECT_EQ(guest_paging(cpu, 52, true).pcid, 0U)
        << "without CR4.PCIDE these bits are PWT, PCD and ignored";
    cpu.cr4 |= cr4::pcide;
    EXPECT_EQ(guest_paging(cpu, 52, true).pcid, 0xfe5U);
    cpu.cr4 = cr4::pae;
    cpu.efer = 0;
    EXPECT_EQ(guest_paging(cpu, 52, true).root, GuestPhys(0x789a'b000).frame());
    EXPECT_EQ(guest_paging(cpu, 52, true).pdpt, GuestPhys(0x789a'bfe0));
    EXPECT_EQ(guest_paging(cpu, 52, true).pdptes, cpu.pdptes);
    cpu.cr4 = 0;
    EXPECT_EQ(guest_paging(cpu, 52, true).root, GuestPhys(0x789a'b000).frame());
}

} // namespace
} // namespace umbra
