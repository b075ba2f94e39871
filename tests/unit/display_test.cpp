// Unit tests of launcher/display: what is sent to a terminal, and the dump in a file.
#include "launcher/display.hpp"

#include "vmm/error.hpp"

#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>

#include <gtest/gtest.h>

namespace umbra {
namespace {

VgaScreen screen_with(unsigned cell, std::string_view text, std::uint8_t attribute = 0x07) {
    VgaScreen screen{};
    screen.cells.fill({' ', 0x07});
    for (const char character : text)
        screen.cells.at(cell++) = {static_cast<std::uint8_t>(character), attribute};
    return screen;
}

TEST(DrawScreen, DrawsAllAtFirst) {
    VgaScreen screen = screen_with(0, "hi", 0x1e); // yellow on blue
    screen.cursor = 82;
    const std::string text = draw_screen(screen, nullptr);
    EXPECT_NE(text.find("\x1b[1;1H\x1b[0;93;44mhi\x1b[0;37;40m "), std::string::npos);
    EXPECT_NE(text.find("\x1b[25;1H"), std::string::npos);
    EXPECT_TRUE(text.ends_with("\x1b[2;3H\x1b[?25h")) << "the cursor";
    EXPECT_NE(draw_screen(screen_with(0, "!", 0x9c), nullptr).find("\x1b[0;91;44;5m!"), std::string::npos);
}

TEST(DrawScreen, ThenOnlyWhatChanged) {
    const VgaScreen before = screen_with(0, "old");
    EXPECT_EQ(draw_screen(before, &before), "");
    VgaScreen after = before;
    after.cells.at(163).character = 'x';
    const std::string text = draw_screen(after, &before);
    EXPECT_NE(text.find("\x1b[3;1H\x1b[0;37;40m   x "), std::string::npos);
    EXPECT_EQ(text.find("\x1b[1;1H"), std::string::npos);
    EXPECT_EQ(text.find("\x1b[?25h"), std::string::npos) << "no cursor to be shown";
    after = before;
    after.cursor = 3;
    EXPECT_EQ(draw_screen(after, &before), "\x1b[?25l\x1b[0m\x1b[1;4H\x1b[?25h");
}

TEST(DrawScreen, GuestCannotSendControlCharacters) {
    std::string every;
    for (unsigned code = 0; code < 256; ++code)
        every.push_back(static_cast<char>(code));
    const std::string text = draw_screen(screen_with(0, every), nullptr);
    std::size_t lines_and_attributes = 0;
    for (std::size_t at = text.find('\x1b'); at != std::string::npos; at = text.find('\x1b', at + 1)) {
        EXPECT_EQ(text.at(at + 1), '[');
        ++lines_and_attributes;
    }
    EXPECT_EQ(lines_and_attributes, 1U + 25 + 25 + 1);
    for (const char character : text)
        EXPECT_TRUE(character == '\x1b' || static_cast<unsigned char>(character) >= ' ');
}

TEST(SaveScreen, WritesTheLinesOrSaysWhyNot) {
    std::string name = ::testing::TempDir() + "umbra-screen-XXXXXX";
    const int fd = ::mkstemp(name.data());
    ASSERT_GE(fd, 0);
    ::close(fd);
    EXPECT_EQ(save_screen(name, screen_with(80, "two")), std::nullopt);
    std::ostringstream text;
    text << std::ifstream(name).rdbuf();
    EXPECT_EQ(text.str(), "\ntwo\n" + std::string(23, '\n'));
    ::unlink(name.c_str());
    EXPECT_EQ(save_screen("/", {}), "Is a directory");
    EXPECT_EQ(save_screen("/dev/full", {}), "No space left on device");
}

/// A terminal whose other end is here.
class TextDisplayTest : public ::testing::Test {
  protected:
    void SetUp() override { ASSERT_EQ(::openpty(&master, &slave, nullptr, nullptr, nullptr), 0); }
    void TearDown() override {
        ::close(master);
        ::close(slave);
    }
    /// Whether the terminal gets this within ten seconds, from what it got last.
    bool gets(std::string_view text) {
        const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (got.find(text) == std::string::npos) {
            if (std::chrono::steady_clock::now() > deadline)
                return false;
            constexpr int wait_ms = 100;
            pollfd ready{master, POLLIN, 0};
            std::array<char, 4096> buffer{};
            if (::poll(&ready, 1, wait_ms) > 0)
                got.append(buffer.data(),
                           static_cast<std::size_t>(::read(master, buffer.data(), buffer.size())));
        }
        got.erase(0, got.find(text) + text.size());
        return true;
    }

    int master = -1, slave = -1;
    std::string got;
};

TEST_F(TextDisplayTest, FollowsTheScreenAndLeavesItBehind) {
    std::atomic<char> shown = 'a';
    {
        const TextDisplay display(slave, [&shown] { return screen_with(80, std::string(3, shown)); });
        EXPECT_TRUE(gets("\x1b[?1049h"));
        EXPECT_TRUE(gets("\x1b[2;1H\x1b[0;37;40maaa"));
        shown = 'b';
        EXPECT_TRUE(gets("\x1b[2;1H\x1b[0;37;40mbbb"));
        EXPECT_TRUE(gets("\x1b[2;1H\x1b[0;37;40mbbb")) << "now and then all is drawn anew";
    }
    EXPECT_TRUE(gets("\x1b[?1049l"));
    EXPECT_TRUE(gets("bbb\r\n"));
}

TEST_F(TextDisplayTest, NeedsATerminal) {
    const int file = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
    EXPECT_THROW(require_terminal(file), StartupError);
    EXPECT_THROW(TextDisplay(file, [] { return VgaScreen{}; }), StartupError);
    EXPECT_NO_THROW(require_terminal(slave));
    ::close(file);
}

TEST_F(TextDisplayTest, EndsWhenTheTerminalIsGone) {
    const auto start = std::chrono::steady_clock::now();
    {
        const TextDisplay display(slave, [] { return VgaScreen{}; });
        EXPECT_TRUE(gets("\x1b[2J"));
        ::close(master);
        master = -1;
    }
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

} // namespace
} // namespace umbra
