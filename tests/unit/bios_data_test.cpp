// Unit tests of vmm/loader/bios_data: what kernels look up there.
#include "vmm/loader/bios_data.hpp"

#include "vmm/devices/vga.hpp"
#include "vmm/error.hpp"
#include "vmm/loader/boot_params.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

TEST(BiosData, TellsOfPortsMemoryAndScreen) {
    std::vector<std::byte> ram(std::size_t{2} << 20);
    const GuestMemory memory(std::vector<GuestMemory::Region>{{GuestPhys{0}, ram}});
    write_bios_data(memory, true);
    clear_screen(memory);
    const auto word = [&memory](std::uint64_t at) {
        return unsigned{memory.read<std::uint16_t>(GuestPhys(at)).value_or(0)};
    };
    EXPECT_EQ(word(0x400), 0x3f8U);
    EXPECT_EQ(word(0x402), 0x2f8U);
    EXPECT_EQ(word(0x404), 0U) << "there are two";
    EXPECT_EQ(word(0x410) >> 9 & 7, 2U) << "as the equipment word says";
    EXPECT_EQ(word(0x410) >> 4 & 3, 2U) << "80x25 in colour";
    EXPECT_EQ(word(0x413), 639U);
    EXPECT_EQ(word(0x449) & 0xff, 3U);
    EXPECT_EQ(word(0x44a), 80U);
    EXPECT_EQ(word(0x463), 0x3d4U);
    EXPECT_EQ(word(0x484) & 0xff, 24U);

    const GuestPhys extended(std::uint64_t{word(0x40e)} << 4);
    EXPECT_EQ(word(extended.value()) & 0xff, 1U) << "KB";
    EXPECT_EQ(extended, GuestPhys{e820_map(memory).front().size}) << "where usable memory ends";
    EXPECT_EQ(extended.value(), word(0x413) * 1024U);

    const VgaScreen screen = vga_screen(memory, {});
    EXPECT_EQ(vga_text(screen), std::string(25, '\n'));
    EXPECT_EQ(screen.cells.back(), (VgaCell{' ', 0x07}));

    const auto zero = [](std::byte byte) { return byte == std::byte{0}; };
    EXPECT_TRUE(std::all_of(ram.begin() + 0x500, ram.begin() + 0x9fc00, zero));
    EXPECT_TRUE(std::all_of(ram.begin() + 0x9fc01, ram.begin() + 0xb8000, zero));
    EXPECT_TRUE(std::all_of(ram.begin() + 0xb8000 + 80 * 25 * 2, ram.end(), zero));
    EXPECT_TRUE(std::all_of(ram.begin(), ram.begin() + 0x400, zero));
}

TEST(BiosData, NeedsBaseMemory) {
    std::vector<std::byte> ram(0x9f000);
    const GuestMemory memory(std::vector<GuestMemory::Region>{{GuestPhys{0}, ram}});
    EXPECT_THROW(write_bios_data(memory, true), StartupError);
    EXPECT_THROW(clear_screen(memory), StartupError);
}

} // namespace
} // namespace umbra
