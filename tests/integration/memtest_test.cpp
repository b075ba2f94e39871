// A real program: Debian's memtest86+, unmodified, makes a full pass over its memory without an error: the
// 64-bit one, and the 32-bit one, which stays in protected mode, from its 32-bit entry.
#include "tests/integration/child.hpp"
#include "tests/integration/host.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <iostream>
#include <optional>
#include <regex>
#include <span>
#include <string>
#include <string_view>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;

/// The screen of a terminal of 80 columns and 25 lines, as far as memtest86+ needs one: text, cursor
/// positions and erasing; colours are ignored. ECMA-48, 8.3.
class Screen {
  public:
    Screen() { erase(); }

    void put(std::string_view text) {
        for (const char character : text)
            put(character);
    }
    /// All lines, each ended.
    [[nodiscard]] std::string text() const {
        std::string text;
        for (const std::string& line : lines_)
            text += line + '\n';
        return text;
    }

  private:
    static constexpr std::size_t rows = 25, columns = 80;

    void put(char character) {
        switch (state_) {
        case State::text:
            if (character == '\x1b')
                state_ = State::escape;
            else
                print(character);
            break;
        case State::escape:
            state_ = character == '[' ? State::sequence : State::text;
            parameters_.clear();
            break;
        case State::sequence:
            if (character < '@') {
                parameters_ += character;
            } else {
                obey(character);
                state_ = State::text;
            }
            break;
        }
    }
    void print(char character) {
        if (character == '\r') {
            column_ = 0;
        } else if (character == '\n') {
            row_ = std::min(row_ + 1, rows - 1);
        } else if (character >= ' ' && column_ < columns) {
            lines_.at(row_).at(column_++) = character;
        }
    }
    void obey(char command) {
        if (command == 'J')
            erase();
        if (command != 'H' && command != 'f')
            return;
        static const std::regex position("([0-9]*);?([0-9]*)");
        std::smatch match;
        if (!std::regex_match(parameters_, match, position))
            return;
        const auto number = [&match](std::size_t i, std::size_t most) -> std::size_t {
            return std::clamp<std::size_t>(match[i].length() == 0 ? 1 : std::stoul(match[i]), 1, most) - 1;
        };
        row_ = number(1, rows);
        column_ = number(2, columns);
    }
    void erase() { lines_.fill(std::string(columns, ' ')); }

    enum class State { text, escape, sequence };

    std::array<std::string, rows> lines_;
    std::size_t row_ = 0, column_ = 0;
    State state_ = State::text;
    std::string parameters_;
};

TEST(ScreenTest, ShowsWhatATerminalWould) {
    Screen screen;
    screen.put("\x1b[2J\x1b[?25lab\x1b[2;4Hx\x1b[1;1H\x1b[0;37;44mA\x1b[25;80H$$\x1b[H");
    std::string expected;
    for (int row = 1; row <= 25; ++row) {
        std::string line(80, ' ');
        if (row == 1)
            line.replace(0, 2, "Ab");
        if (row == 2)
            line[3] = 'x';
        if (row == 25)
            line[79] = '$';
        expected += line + '\n';
    }
    EXPECT_EQ(screen.text(), expected);
    screen.put("\x1b[2J");
    EXPECT_EQ(screen.text().find_first_not_of(" \n"), std::string::npos);
}

struct Memtest {
    std::string name, file, protocol;
};

std::ostream& operator<<(std::ostream& stream, const Memtest& memtest) {
    return stream << memtest.file;
}

/// The first group of `pattern` on the screen; empty if it is not there.
std::string shown(const Screen& screen, const std::string& pattern) {
    std::smatch match;
    const std::string text = screen.text();
    return std::regex_search(text, match, std::regex(pattern)) ? match[1].str() : "";
}

class MemtestTest : public KvmTest, public testing::WithParamInterface<Memtest> {
  protected:
    void SetUp() override {
        KvmTest::SetUp();
        if (IsSkipped() || HasFatalFailure())
            return;
        if (::access(GetParam().file.c_str(), R_OK) != 0)
            UMBRA_MISSING(GetParam().file + " is missing: install memtest86+");
        if (GetParam().protocol == "linux32" && interprets_ring0())
            GTEST_SKIP() << "this KVM interprets 32-bit code, without FWAIT";
    }
};

/// A key that memtest86+ is given when its screen shows this.
struct Key {
    const char* shown;
    const char* key;
};

/// Leaves out the bit fade test: it waits for three minutes, and tells of memory chips only.
constexpr std::array without_bit_fade{Key{"<F1> Configuration", "1"},    Key{"<F1>  Test selection", "1"},
                                      Key{"<F2>  Remove one test", "2"}, Key{"Enter test #", "10\r"},
                                      Key{R"(\*\. *\n)", "0"},           Key{"<F10> Exit menu", "0"}};

TEST_P(MemtestTest, FullPassFindsNoError) {
    constexpr std::chrono::minutes limit{
        12}; // where it is not left out, three of them are the bit fade test's
    Child child(umbra_command({"run", "-m", "64M", "--protocol", GetParam().protocol, "--append",
                               "console=ttyS0,115200", GetParam().file}),
                {.input = Child::Input::pipe});
    std::span<const Key> keys;
    if (emulated_host())
        keys = without_bit_fade;
    const auto start = std::chrono::steady_clock::now();
    const auto time = [&] {
        return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::steady_clock::now() - start);
    };
    Screen screen;
    std::size_t seen = 0;
    std::string test, passes;
    while (passes != "1" && time() < limit && child.run_for(500ms)) {
        screen.put(std::string_view(child.output()).substr(seen));
        seen = child.output().size();
        if (!keys.empty() && shown(screen, std::string("(") + keys.front().shown + ")") != "") {
            ASSERT_TRUE(child.type(keys.front().key)) << screen.text();
            keys = keys.subspan(1);
            continue;
        }
        passes = shown(screen, "Pass: +([0-9]+) ");
        ASSERT_TRUE(shown(screen, "Errors: +([0-9]+) ") == "0" || passes.empty()) << screen.text();
        const std::string now = shown(screen, R"((#[0-9]+ +\[[^\]]*\]))");
        if (now != test)
            std::cout << "memtest86+ after " << time().count() << " s: " << now << std::endl;
        test = now;
    }
    std::cout << "memtest86+ after " << time().count() << " s:\n" << screen.text() << std::flush;
    EXPECT_EQ(passes, "1");
    EXPECT_TRUE(keys.empty()) << "its menus are others: " << keys.front().shown << " was not seen";
    EXPECT_EQ(shown(screen, "Errors: +([0-9]+) "), "0");
    EXPECT_EQ(shown(screen, "Memory  : +([0-9]+MB) "), "64MB");

    child.send_signal(SIGINT);
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 130) << ended.err;
    EXPECT_EQ(ended.err, "umbra: interrupted\n");
}

INSTANTIATE_TEST_SUITE_P(Debian, MemtestTest,
                         testing::Values(Memtest{"x64", "/boot/memtest86+x64.bin", "linux"},
                                         Memtest{"ia32", "/boot/memtest86+ia32.bin", "linux32"}),
                         [](const testing::TestParamInfo<Memtest>& memtest) { return memtest.param.name; });

} // namespace
} // namespace umbra
