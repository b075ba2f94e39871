// The guest's console: where its output goes, where its input comes from, and what happens to the terminal.
#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"
#include "tests/integration/machine_code.hpp"

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;
using namespace machine_code;

using Input = Child::Input;

const std::string hello_says = "Hello from a guest kernel\n";

class ConsoleTest : public EngineTest {
  protected:
    [[nodiscard]] std::vector<std::string> command(std::vector<std::string> options,
                                                   const std::string& kernel) const {
        options.insert(options.begin(), {"run", "--engine", GetParam()});
        options.push_back(kernel);
        return umbra_command(options);
    }
    [[nodiscard]] std::string kernel(const Code& code) const {
        return folder_.write("kernel", elf_kernel(code));
    }

    TemporaryFolder folder_;
};

// --- Output

TEST_P(ConsoleTest, SerialOutputGoesToStandardOutput) {
    const Ended ended = Child(command({}, guest_file("hello"))).end();
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_TRUE(ended.out.starts_with(hello_says)) << ended;
    EXPECT_EQ(ended.err, "umbra: passed\n");
}

TEST_P(ConsoleTest, SerialOutputGoesToAFile) {
    const std::string file = folder_.write("serial", "what was there before, and is longer than the rest is");
    const Ended ended = Child(command({"--serial", file}, guest_file("fail"))).end();
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_EQ(ended.out, "");
    EXPECT_EQ(contents_of(file), "fail: exiting with 7\n");
}

TEST_P(ConsoleTest, SerialOutputGoesNowhere) {
    const Ended ended = Child(command({"--serial", "none"}, guest_file("hello"))).end();
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(ended.out, "");
}

TEST_P(ConsoleTest, ExpectedTextIsFoundWhereverOutputGoes) {
    const Ended ended =
        Child(command({"--serial", "none", "--expect", "round", "--timeout", "100"}, guest_file("spin")))
            .end();
    EXPECT_EQ(ended.exit_code, 0) << ended;
}

TEST_P(ConsoleTest, DebugConsoleIsHeardToo) {
    const Ended ended =
        Child(command({}, kernel(write_port(0xe9, 'd') + write_port(0xe9, '\n') + exit(0)))).end();
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(ended.out, "d\n");
}

TEST_P(ConsoleTest, BytesArriveUnchanged) {
    Code code;
    std::string expected;
    for (int byte = 0; byte < 256; ++byte) {
        code = code + print(static_cast<char>(byte));
        expected += static_cast<char>(byte);
    }
    const Ended ended = Child(command({}, kernel(code + exit(0)))).end();
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(ended.out, expected);
}

TEST_P(ConsoleTest, UnfinishedLineIsShownWhileTheGuestWaits) {
    for (const Code& wait : {halt, halt_for_ever, spin}) {
        Child child(command({}, kernel(print('>') + wait)));
        EXPECT_TRUE(child.wait_for(">", 20s)) << "a prompt is not shown: " << child.end(0s);
    }
}

TEST_P(ConsoleTest, SerialFileThatCannotBeWrittenIsBadUsage) {
    for (const std::string& file : {folder_.file("missing/serial"), folder_.file("")}) {
        const Ended ended = Child(command({"--serial", file}, guest_file("hello"))).end();
        EXPECT_EQ(ended.exit_code, 2) << ended;
        EXPECT_EQ(lines_of(ended.err).size(), 1U) << ended;
        EXPECT_NE(ended.err.find(file), std::string::npos) << ended;
    }
}

TEST_P(ConsoleTest, LostOutputIsToldAndChangesNoVerdict) {
    const Ended full = Child(command({"--serial", "/dev/full"}, guest_file("fail"))).end();
    EXPECT_EQ(full.exit_code, 1) << full;
    EXPECT_NE(full.err.find("umbra: failed with code 7 (0x7)\n"), std::string::npos) << full;
    EXPECT_NE(full.err.find("output was lost: No space left on device"), std::string::npos) << full;
}

TEST_P(ConsoleTest, ClosedOutputIsToldAndChangesNoVerdict) {
    const Code code = print('a') + print('\n') + print('b') + exit(3); // a line, and the last without an end
    Child child(command({}, kernel(code)));
    child.stop_reading();
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_NE(ended.err.find("umbra: failed with code 3 (0x3)\n"), std::string::npos) << ended;
    EXPECT_NE(ended.err.find("output was lost: Broken pipe"), std::string::npos) << ended;
}

/// What umbra opens does not take the number of what is closed: the console's text and umbra's own would go
/// there.
TEST_P(ConsoleTest, ClosedStandardFilesAreNoOthers) {
    const std::string result = folder_.file("result"), trace = folder_.file("trace");
    for (const std::vector<int>& closed : std::vector<std::vector<int>>{{0}, {1}, {2}, {0, 1}, {0, 1, 2}}) {
        const Ended ended = Child(command({"--result", result, "--trace", trace}, guest_file("fail")),
                                  {.prepare =
                                       [&closed] {
                                           for (const int fd : closed)
                                               ::close(fd);
                                           return true;
                                       }})
                                .end();
        EXPECT_EQ(ended.exit_code, 1) << ended;
        EXPECT_TRUE(contents_of(result).starts_with("{")) << contents_of(result);
        EXPECT_TRUE(contents_of(trace).starts_with("# umbra trace"));
        EXPECT_EQ((contents_of(result) + contents_of(trace)).find("fail: exiting"), std::string::npos);
        const bool told = std::ranges::count(closed, 1) != 0 && std::ranges::count(closed, 2) == 0;
        EXPECT_EQ(ended.err.find("output was lost: Bad file descriptor") != std::string::npos, told) << ended;
    }
}

TEST_P(ConsoleTest, OutputThatNobodyReadsHoldsUpNoEnd) {
    Child child(command({"--timeout", "3"}, kernel(for_ever(print('x')))), {.unread = true});
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 124) << ended;
    EXPECT_NE(ended.err.find("output was lost: nobody reads it"), std::string::npos) << ended;
}

// --- Input

TEST_P(ConsoleTest, InputComesFromAPipe) {
    Child child(command({}, guest_file("echo")), {.input = Input::pipe});
    ASSERT_TRUE(child.wait_for("echo: ready\n")) << child.end(0s);
    ASSERT_TRUE(child.type("one\n"));
    EXPECT_TRUE(child.wait_for("echo: [one]\n"));
    ASSERT_TRUE(child.type("two words\nquit\n"));
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(ended.out, "echo: ready\necho: [one]\necho: [two words]\necho: [quit]\necho: passed\n");
}

TEST_P(ConsoleTest, MuchInputArrivesComplete) {
    Child child(command({}, guest_file("echo")), {.input = Input::pipe});
    ASSERT_TRUE(child.wait_for("echo: ready\n")) << child.end(0s);
    constexpr int lines = 1200; // more than the port's queue and a pipe's reader take at once
    std::string input, expected = "echo: ready\n";
    for (int i = 0; i < lines; ++i) {
        const std::string line = "line " + std::to_string(i);
        input += line + "\n";
        expected += "echo: [" + line + "]\n";
    }
    ASSERT_TRUE(child.type(input + "quit\n"));
    child.end_input();
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_TRUE(ended.out == expected + "echo: [quit]\necho: passed\n") << ended;
}

TEST_P(ConsoleTest, EndOfInputIsNoEndOfTheRun) {
    Child child(command({"--timeout", "1"}, guest_file("echo")), {.input = Input::pipe});
    ASSERT_TRUE(child.wait_for("echo: ready\n")) << child.end(0s);
    ASSERT_TRUE(child.type("last\n"));
    child.end_input();
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 124) << ended;
    EXPECT_EQ(ended.out, "echo: ready\necho: [last]\n");
}

TEST_P(ConsoleTest, InputIsLeftAloneUnlessTheSerialPortIsStdio) {
    Child child(command({"--serial", folder_.file("serial"), "--timeout", "1"}, guest_file("echo")),
                {.input = Input::pipe});
    ASSERT_TRUE(child.type("quit\n"));
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 124) << ended;
    EXPECT_EQ(contents_of(folder_.file("serial")), "echo: ready\n");
}

// --- The terminal

/// Some attributes that are unusual, so that it is noticed if they are set to what is usual.
void make_unusual(termios& attributes) {
    attributes.c_iflag ^= IUTF8 | IXANY;
    attributes.c_oflag &= ~static_cast<tcflag_t>(ONLCR);
    attributes.c_cc[VERASE] = 'h';
}

bool same(const termios& left, const termios& right) {
    return left.c_iflag == right.c_iflag && left.c_oflag == right.c_oflag && left.c_cflag == right.c_cflag &&
           left.c_lflag == right.c_lflag && std::ranges::equal(left.c_cc, right.c_cc);
}

class TerminalTest : public ConsoleTest {
  protected:
    Child start(const std::vector<std::string>& options, const std::string& kernel) const {
        return Child(command(options, kernel), {.input = Input::terminal, .attributes = make_unusual});
    }
    static void expect_restored(const Child& child) {
        EXPECT_TRUE(same(child.terminal_attributes(), child.first_terminal_attributes()));
    }
    static void expect_taken(const Child& child) {
        const termios attributes = child.terminal_attributes();
        EXPECT_EQ(attributes.c_lflag & (ICANON | ECHO | IEXTEN), 0U);
        EXPECT_EQ(attributes.c_iflag & (ICRNL | IXON), 0U);
        EXPECT_NE(attributes.c_lflag & ISIG, 0U);
    }
};

TEST_P(TerminalTest, KeysReachTheGuestUnechoed) {
    Child child = start({}, guest_file("echo"));
    ASSERT_TRUE(child.wait_for("echo: ready\n")) << child.end(0s);
    expect_taken(child);
    ASSERT_TRUE(child.type("ab\x7f\x15\x13 \r"));
    EXPECT_TRUE(child.wait_for("echo: [ab\x7f\x15\x13 ]\n"));
    ASSERT_TRUE(child.type("quit\r"));
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(ended.out, "echo: ready\necho: [ab\x7f\x15\x13 ]\necho: [quit]\necho: passed\n");
    expect_restored(child);
}

TEST_P(TerminalTest, CtrlCEndsWhateverTheGuestDoes) {
    for (const Code& code : {spin, halt, halt_for_ever}) {
        Child child = start({}, kernel(print('!') + print('\n') + code));
        ASSERT_TRUE(child.wait_for("!")) << child.end(0s);
        expect_taken(child);
        ASSERT_TRUE(child.type("\x03"));
        const Ended& ended = child.end();
        EXPECT_EQ(ended.exit_code, 130) << ended;
        EXPECT_EQ(ended.verdict(), "interrupted");
        expect_restored(child);
    }
}

TEST_P(TerminalTest, EveryEndRestoresTheTerminal) {
    struct End {
        std::vector<std::string> options;
        std::string kernel;
        int exit_code;
    };
    const std::vector<End> ends{
        {{}, guest_file("hello"), 0},
        {{}, guest_file("fail"), 1},
        {{}, build_folder() / "umbra", 2},
        {{}, guest_file("triple"), 3},
        {{"--timeout", "0.5"}, guest_file("spin"), 124},
        {{"--expect", "halting", "--timeout", "100"}, guest_file("halt"), 0},
    };
    for (const End& expected : ends) {
        Child child = start(expected.options, expected.kernel);
        const Ended& ended = child.end();
        EXPECT_EQ(ended.exit_code, expected.exit_code) << expected.kernel << ": " << ended;
        expect_restored(child);
    }
}

TEST_P(TerminalTest, StoppedRunGivesTheTerminalBackAndTakesItAgain) {
    Child child = start({}, guest_file("echo"));
    ASSERT_TRUE(child.wait_for("echo: ready\n")) << child.end(0s);
    ASSERT_TRUE(child.type("\x1a")); // Ctrl-Z
    ASSERT_TRUE(child.wait_until_stopped());
    expect_restored(child);
    child.send_signal(SIGCONT);
    ASSERT_TRUE(child.type("after\r"));
    EXPECT_TRUE(child.wait_for("echo: [after]\n"));
    expect_taken(child);
    ASSERT_TRUE(child.type("quit\r"));
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 0) << ended;
    expect_restored(child);
}

TEST_P(TerminalTest, IsLeftAloneUnlessTheSerialPortIsStdio) {
    Child child = start({"--serial", folder_.file("serial"), "--timeout", "1"}, guest_file("halt"));
    child.run_for(500ms);
    expect_restored(child);
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 124) << ended;
}

TEST_P(TerminalTest, ThatNobodyReadsHoldsUpNoEnd) {
    const Code endless = print('x') + print('\n');
    Child child(command({"--timeout", "1"}, kernel(for_ever(endless))),
                {.input = Input::terminal, .unread = true, .attributes = make_unusual});
    child.run_for(3s); // longer than its timeout: all that time nobody reads
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 124) << ended;
    expect_restored(child);
}

INSTANTIATE_TEST_SUITE_P(Engines, ConsoleTest, engines(), engine_name);
INSTANTIATE_TEST_SUITE_P(Engines, TerminalTest, engines(), engine_name);

} // namespace
} // namespace umbra
