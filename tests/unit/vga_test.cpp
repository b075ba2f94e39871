// Unit tests of vmm/devices/vga: the registers as kernels use them, and the screen's text.
#include "vmm/devices/vga.hpp"

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

class VgaTest : public ::testing::Test {
  protected:
    void set_crtc(std::uint8_t index, std::uint8_t value) {
        vga.write(0x3d4, index);
        vga.write(0x3d5, value);
    }
    std::uint8_t crtc(std::uint8_t index) {
        vga.write(0x3d4, index);
        return vga.read(0x3d5);
    }
    void set_attribute(std::uint8_t index, std::uint8_t value) {
        (void)vga.read(0x3da);
        vga.write(0x3c0, index);
        vga.write(0x3c0, value);
    }
    std::uint8_t attribute(std::uint8_t index) {
        (void)vga.read(0x3da);
        vga.write(0x3c0, index);
        return vga.read(0x3c1);
    }

    Vga vga;
};

TEST_F(VgaTest, IsInMode3) {
    EXPECT_EQ(crtc(0x01), 79U) << "80 columns";
    EXPECT_EQ(crtc(0x12), 399U & 0xff) << "400 lines";
    EXPECT_EQ(crtc(0x09) & 0x1f, 15U) << "of 16 a character";
    vga.write(0x3ce, 6);
    EXPECT_EQ(vga.read(0x3cf), 0x0eU) << "text at 0xb8000";
    EXPECT_EQ(vga.read(0x3cc) & 1, 1U) << "colour ports";
    EXPECT_EQ(attribute(0x07), 0x07U);
    EXPECT_EQ(vga.text_state(), VgaTextState{});
}

TEST_F(VgaTest, CursorAndStartMove) {
    set_crtc(0x0e, 0x07);
    set_crtc(0x0f, 0xcf);
    set_crtc(0x0c, 0x01);
    set_crtc(0x0d, 0x40);
    EXPECT_EQ(vga.text_state(), (VgaTextState{.start = 0x0140, .cursor = 0x07cf, .cursor_shown = true}));
    EXPECT_EQ(crtc(0x0e), 0x07U) << "kernels read where the BIOS left it";
    EXPECT_EQ(crtc(0x0f), 0xcfU);
    set_crtc(0x0a, 0x20);
    EXPECT_FALSE(vga.text_state().cursor_shown);
    set_crtc(0x0a, 0x0d);
    EXPECT_TRUE(vga.text_state().cursor_shown);
}

TEST_F(VgaTest, CrtcTimingIsWriteProtected) {
    set_crtc(0x01, 0x27);
    set_crtc(0x07, 0x00);
    EXPECT_EQ(crtc(0x01), 79U);
    EXPECT_EQ(crtc(0x07), 0x0fU) << "but for the line compare bit";
    set_crtc(0x11, 0x0e);
    set_crtc(0x01, 0x27);
    EXPECT_EQ(crtc(0x01), 0x27U);
}

TEST_F(VgaTest, StatusTogglesAndResetsTheFlipFlop) {
    const unsigned first = vga.read(0x3da);
    const unsigned second = vga.read(0x3da);
    EXPECT_EQ(first ^ second, 0x09U) << "retrace and display enable";
    EXPECT_EQ(vga.read(0x3da), first);

    set_attribute(0x10, 0x04);
    EXPECT_EQ(attribute(0x10), 0x04U);
    vga.write(0x3c0, 0x08); // data, for `attribute` has left the flip-flop so
    EXPECT_EQ(attribute(0x10), 0x08U);
    vga.write(0x3c0, 0x33);
    vga.write(0x3c0, 0x11); // an index, for the flip-flop has turned
    EXPECT_EQ(vga.read(0x3c0), 0x11U);
}

TEST_F(VgaTest, PaletteGoesByThrees) {
    vga.write(0x3c8, 0xff);
    for (const std::uint8_t value : std::to_array<std::uint8_t>({0x01, 0x02, 0xff, 0x04}))
        vga.write(0x3c9, value);
    EXPECT_EQ(vga.read(0x3c7), 0U);
    vga.write(0x3c7, 0xff);
    EXPECT_EQ(vga.read(0x3c7), 3U);
    EXPECT_EQ(vga.read(0x3c9), 0x01U);
    EXPECT_EQ(vga.read(0x3c9), 0x02U);
    EXPECT_EQ(vga.read(0x3c9), 0x3fU) << "six bits";
    EXPECT_EQ(vga.read(0x3c9), 0x04U) << "behind the last comes the first";
}

TEST_F(VgaTest, EveryPortAndIndexIsHarmless) {
    for (unsigned value = 0; value <= 0xff; ++value)
        for (std::uint16_t port = Vga::first_port; port <= Vga::last_port; ++port) {
            (void)vga.read(port);
            vga.write(port, static_cast<std::uint8_t>(value));
            (void)vga.read(port);
        }
    vga.write(0x3d4, 25);
    EXPECT_EQ(vga.read(0x3d5), 0xffU);
    EXPECT_EQ(vga.read(0x3d0), 0xffU);
}

class ScreenTest : public ::testing::Test {
  protected:
    std::vector<std::byte> ram = std::vector<std::byte>(0x10'0000);
    GuestMemory memory{std::vector<GuestMemory::Region>{{GuestPhys{0}, ram}}};

    void put(unsigned cell, std::string_view text, std::uint8_t attribute = 0x07) {
        for (const char character : text) {
            ram.at(0xb8000 + 2 * cell) = static_cast<std::byte>(character);
            ram.at(0xb8000 + 2 * cell++ + 1) = std::byte{attribute};
        }
    }
};

TEST_F(ScreenTest, LinesAreTrimmed) {
    put(0, "  hello   ");
    put(80 * 24 + 76, "last");
    std::string expected = "  hello" + std::string(24, '\n') + std::string(76, ' ') + "last\n";
    EXPECT_EQ(vga_text(vga_screen(memory, {})), expected);
}

TEST_F(ScreenTest, StartScrollsAndWraps) {
    put(80, "second");
    EXPECT_TRUE(vga_text(vga_screen(memory, {.start = 80})).starts_with("second\n"));
    EXPECT_TRUE(vga_text(vga_screen(memory, {.start = 0x3fb0})).starts_with("\n\nsecond\n"));
    EXPECT_TRUE(vga_text(vga_screen(memory, {.start = 0xffb0})).starts_with("\n\nsecond\n"))
        << "text memory has 32 KB";
}

TEST_F(ScreenTest, CursorIsOnTheScreenOrNowhere) {
    EXPECT_EQ(vga_screen(memory, {.start = 80, .cursor = 85}).cursor, 5U);
    EXPECT_EQ(vga_screen(memory, {.start = 80, .cursor = 79}).cursor, std::nullopt);
    EXPECT_EQ(vga_screen(memory, {.cursor = 1999}).cursor, 1999U);
    EXPECT_EQ(vga_screen(memory, {.cursor = 2000}).cursor, std::nullopt);
    EXPECT_EQ(vga_screen(memory, {.cursor = 5, .cursor_shown = false}).cursor, std::nullopt);
}

TEST_F(ScreenTest, CodePage437) {
    EXPECT_EQ(vga_character(0), " ");
    EXPECT_EQ(vga_character(1), "☺");
    EXPECT_EQ(vga_character(0x1b), "←") << "no control character gets through";
    EXPECT_EQ(vga_character(0x1f), "▼");
    EXPECT_EQ(vga_character(' '), " ");
    EXPECT_EQ(vga_character('~'), "~");
    EXPECT_EQ(vga_character(0x7f), "⌂");
    EXPECT_EQ(vga_character(0x80), "Ç");
    EXPECT_EQ(vga_character(0xb3), "│");
    EXPECT_EQ(vga_character(0xc9), "╔");
    EXPECT_EQ(vga_character(0xdb), "█");
    EXPECT_EQ(vga_character(0xe1), "ß");
    EXPECT_EQ(vga_character(0xfe), "■");
}

TEST_F(ScreenTest, WithoutTextMemoryItIsBlank) {
    const GuestMemory small(std::vector<GuestMemory::Region>{{GuestPhys{0}, std::span(ram).first(0xb9000)}});
    EXPECT_EQ(vga_text(vga_screen(small, {})), std::string(25, '\n'));
}

} // namespace
} // namespace umbra
