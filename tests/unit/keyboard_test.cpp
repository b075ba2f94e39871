// Unit tests of vmm/devices/keyboard and of how the keyboard controller hands on what is typed.
#include "vmm/devices/keyboard.hpp"

#include "vmm/devices/keyboard_controller.hpp"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using Bytes = std::vector<unsigned>;

class KeyboardTest : public ::testing::Test {
  protected:
    std::size_t type(std::string_view text) { return controller.receive({text.data(), text.size()}); }
    Bytes read_all() {
        Bytes bytes;
        while ((controller.read_status() & 0x01) != 0)
            bytes.push_back(controller.read_data());
        return bytes;
    }
    void command_byte(std::uint8_t value) {
        controller.write_command(0x60);
        controller.write_data(value);
    }
    Bytes answer(std::uint8_t command) {
        controller.write_data(command);
        return read_all();
    }

    std::vector<bool> levels;
    KeyboardController controller{[this](bool level) { levels.push_back(level); }};
};

TEST_F(KeyboardTest, KeysArriveTranslatedToSet1) {
    type("a");
    EXPECT_EQ(read_all(), (Bytes{0x1e, 0x9e}));
    type("A");
    EXPECT_EQ(read_all(), (Bytes{0x2a, 0x1e, 0x9e, 0xaa})) << "shift around it";
    type("\x03");
    EXPECT_EQ(read_all(), (Bytes{0x1d, 0x2e, 0xae, 0x9d})) << "control and C";
    type("\x1b[A");
    EXPECT_EQ(read_all(), (Bytes{0xe0, 0x48, 0xe0, 0xc8})) << "arrow up";
}

TEST_F(KeyboardTest, WithoutTranslationTheyAreOfSet2) {
    command_byte(0x05);
    type("a\x1b[A");
    EXPECT_EQ(read_all(), (Bytes{0x1c, 0xf0, 0x1c, 0xe0, 0x75, 0xe0, 0xf0, 0x75}));
    EXPECT_EQ(answer(0xf0), Bytes{0xfa});
    EXPECT_EQ(answer(0x00), (Bytes{0xfa, 0x02}));
    EXPECT_EQ(answer(0xf0), Bytes{0xfa});
    EXPECT_EQ(answer(0x01), Bytes{0xfa});
    type("a");
    EXPECT_EQ(read_all(), (Bytes{0x1e, 0x9e})) << "the keyboard's own set 1";
    EXPECT_EQ(answer(0xf0), Bytes{0xfa});
    EXPECT_EQ(answer(0x03), Bytes{0xfe}) << "set 3 is not there";
    EXPECT_EQ(answer(0xf2), (Bytes{0xfa, 0xab, 0x83}));
}

TEST_F(KeyboardTest, EveryPrintableCharacterHasAKey) {
    // What the keys make, by make code, is the layout; each must be told from all others.
    std::vector<std::string> seen;
    for (char character = ' '; character <= '~'; ++character) {
        const TypedKey key = typed_key({&character, 1});
        ASSERT_FALSE(key.events.empty()) << character;
        EXPECT_EQ(key.used, 1U);
        std::string events;
        for (const KeyEvent& event : key.events) {
            EXPECT_FALSE(event.extended);
            events += std::to_string(event.code) + (event.released ? "r " : " ");
        }
        for (const std::string& other : seen)
            EXPECT_NE(events, other) << character;
        seen.push_back(events);
    }
    const auto code = [](char character) {
        const TypedKey key = typed_key({&character, 1});
        return unsigned{key.events.at(key.events.size() / 2 - 1).code};
    };
    EXPECT_EQ(code('1'), 0x02U);
    EXPECT_EQ(code('!'), 0x02U);
    EXPECT_EQ(code(')'), 0x0bU);
    EXPECT_EQ(code('_'), 0x0cU);
    EXPECT_EQ(code('Q'), 0x10U);
    EXPECT_EQ(code('"'), 0x28U);
    EXPECT_EQ(code('~'), 0x29U);
    EXPECT_EQ(code('|'), 0x2bU);
    EXPECT_EQ(code('m'), 0x32U);
    EXPECT_EQ(code('?'), 0x35U);
    EXPECT_EQ(code(' '), 0x39U);
    EXPECT_EQ(code('\r'), 0x1cU);
    EXPECT_EQ(code('\n'), 0x1cU);
    EXPECT_EQ(code('\t'), 0x0fU);
    EXPECT_EQ(code('\x7f'), 0x0eU);
    EXPECT_EQ(code('\x1b'), 0x01U);
}

TEST_F(KeyboardTest, TerminalSequencesAreOneKey) {
    const auto first = [](std::string_view text) { return typed_key({text.data(), text.size()}); };
    EXPECT_EQ(first("\x1b[24~x").used, 5U);
    EXPECT_EQ(first("\x1b[24~x").events.front(), (KeyEvent{.code = 0x58}));
    EXPECT_EQ(first("\x1b[3~").events.front(), (KeyEvent{.code = 0x53, .extended = true}));
    EXPECT_EQ(first("\x1bOP").events.front(), (KeyEvent{.code = 0x3b}));
    EXPECT_EQ(first("\x1b[99z").used, 1U) << "an escape, and what follows";
    EXPECT_EQ(first("\x1b").events.front(), (KeyEvent{.code = 0x01}));
    EXPECT_TRUE(first("\xc3").events.empty()) << "no key makes it";
    EXPECT_EQ(type("\xc3\xa4"), 2U);
    EXPECT_EQ(read_all(), Bytes{});
}

TEST_F(KeyboardTest, EachByteIsAnEdge) {
    type("a");
    EXPECT_EQ(levels, std::vector<bool>{true});
    EXPECT_EQ(controller.read_status() & 0x01, 1U);
    EXPECT_EQ(controller.read_data(), 0x1eU);
    EXPECT_EQ(levels, (std::vector<bool>{true, false, true}));
    EXPECT_EQ(controller.read_data(), 0x9eU);
    EXPECT_EQ(levels, (std::vector<bool>{true, false, true, false}));
    EXPECT_EQ(controller.read_data(), 0x9eU) << "reads again as what it was";
    EXPECT_EQ(levels.size(), 4U);
}

TEST_F(KeyboardTest, CommandByteMasksTheInterruptAndTheKeyboard) {
    command_byte(0x44);
    type("a");
    EXPECT_TRUE(levels.empty());
    EXPECT_EQ(controller.read_status() & 0x01, 1U) << "to be polled";
    command_byte(0x45);
    EXPECT_EQ(levels, std::vector<bool>{true});
    (void)read_all();
    controller.write_command(0xad);
    type("b");
    EXPECT_EQ(read_all(), Bytes{});
    controller.write_command(0xae);
    EXPECT_EQ(read_all(), (Bytes{0x30, 0xb0}));
}

TEST_F(KeyboardTest, ScanningOffHoldsKeysBack) {
    EXPECT_EQ(answer(0xf5), Bytes{0xfa});
    type("a");
    EXPECT_EQ(read_all(), Bytes{});
    EXPECT_EQ(answer(0xf4), (Bytes{0xfa, 0x1e, 0x9e}));
}

TEST_F(KeyboardTest, AnswersComeBeforeKeysThatWait) {
    type("ab");
    controller.write_command(0x20);
    EXPECT_EQ(controller.read_data(), 0x1eU) << "was in the output buffer already";
    EXPECT_EQ(controller.read_data(), 0x45U);
    EXPECT_EQ(read_all(), (Bytes{0x9e, 0x30, 0xb0}));
}

TEST_F(KeyboardTest, InputIsBounded) {
    const std::string much(1000, 'a');
    const std::size_t taken = type(much);
    EXPECT_EQ(taken, Keyboard::event_limit / 2);
    EXPECT_EQ(type("A"), 0U) << "all four events of it or none";
    EXPECT_EQ(read_all().size(), 2 * taken);
    EXPECT_EQ(type("A"), 1U);
}

TEST_F(KeyboardTest, WorksWithoutCallback) {
    KeyboardController silent({});
    EXPECT_EQ(silent.receive(std::string_view("x")), 1U);
    EXPECT_EQ(silent.read_data(), 0x2dU);
}

} // namespace
} // namespace umbra
