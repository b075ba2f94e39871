// Unit tests of the outputs of `umbra test`:
// launcher/test/{text,output_file,tap,json_lines,junit,annotations,progress,html}.
#include "launcher/test/annotations.hpp"
#include "launcher/test/html.hpp"
#include "launcher/test/json_lines.hpp"
#include "launcher/test/junit.hpp"
#include "launcher/test/output_file.hpp"
#include "launcher/test/progress.hpp"
#include "launcher/test/tap.hpp"
#include "launcher/test/text.hpp"
#include "vmm/error.hpp"

#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <regex>
#include <sstream>
#include <string>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <sys/stat.h>
#include <unistd.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;
using namespace std::string_literals;
using Json = nlohmann::json;
namespace fs = std::filesystem;

/// All bytes; escape sequences whole and cut; UTF-8 good and bad; what ends elements, blocks and commands.
std::string hostile() {
    std::string text = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[";
    for (unsigned byte = 0; byte < 256; ++byte)
        text += static_cast<char>(byte);
    return text +
           "\xc3\xa9 \xed\xa0\x80 \xf4\x90\x80\x80 \xef\xbf\xbe \xe2\x80\xae]]> --> </pre></script> & \"'\n"
           "::error::no\n  ...\nnot ok 7\n1..0\nBail out!\r\n\xe2\x82";
}

class OutputTest : public ::testing::Test {
  public:
    void SetUp() override {
        std::string name = (fs::temp_directory_path() / "umbra-output-XXXXXX").native();
        ASSERT_NE(::mkdtemp(name.data()), nullptr);
        folder = name;
    }
    void TearDown() override { fs::remove_all(folder); }

    [[nodiscard]] std::string path(const std::string& name = "out") const { return (folder / name).native(); }
    static std::string contents(const std::string& name) {
        std::ifstream file(name, std::ios::binary);
        return {std::istreambuf_iterator<char>(file), {}};
    }
    void put(const std::string& name, const std::string& text) const {
        fs::create_directories((folder / name).parent_path());
        std::ofstream(folder / name, std::ios::binary) << text;
    }

    fs::path folder;
};

CaseResult result_of(const std::string& name, CaseVerdict verdict, std::string problem = {}) {
    CaseResult result;
    result.test.name = name;
    result.verdict = verdict;
    if (!problem.empty())
        result.problems.push_back(std::move(problem));
    if (verdict == CaseVerdict::passed)
        result.outcome = Outcome::passed;
    if (verdict == CaseVerdict::failed)
        result.outcome = Outcome::timed_out;
    result.wall = 1'500us;
    return result;
}

CaseResult failure() {
    CaseResult result = result_of("mm/oom[memory=64M]", CaseVerdict::failed, "timed out after 60 s");
    result.test.manifest = "/repo/kernels/umbra.toml";
    result.test.line = 12;
    result.console = "boot\nstuck\n";
    result.folder = "out/mm";
    result.wall = 60'000'000us;
    return result;
}

constexpr std::chrono::system_clock::time_point leap_day{1'709'208'000s};

/// What every sink is told in the tests of exact outputs.
void tell(ResultSink& sink, bool interrupted = false) {
    sink.plan({4, leap_day});
    const CaseResult passed = result_of("hello", CaseVerdict::passed);
    sink.started(passed.test, 1);
    sink.ended(passed);
    sink.started(failure().test, 1);
    sink.ended(failure());
    sink.ended(result_of("mm/svm", CaseVerdict::skipped, "this host has no native-ring0"));
    sink.ended(result_of("mm/late", CaseVerdict::not_run, interrupted ? "interrupted" : "after a failure"));
    sink.finished({1, 1, 1, 1, 61s, interrupted});
}

std::size_t count(std::string_view text, std::string_view part) {
    std::size_t found = 0;
    for (std::size_t at = text.find(part); at != std::string_view::npos; at = text.find(part, at + 1))
        ++found;
    return found;
}

// --- text

TEST(Printable, KeepsTextAndShowsTheRest) {
    EXPECT_EQ(printable("caf\xc3\xa9\t1\n"), "caf\xc3\xa9\t1\n");
    EXPECT_EQ(printable("a\r\nb\r\r\nc\rd"), "a\nb\nc\xe2\x90\x8d"
                                             "d")
        << "a driver's line ends";
    EXPECT_EQ(printable("\x1b[1;31mred\x1b[0m\x1b[2J"), "red");
    EXPECT_EQ(printable("\x1b[31"), "␛[31") << "not complete";
    EXPECT_EQ(printable("\x1b[" + std::string(100, '1') + "m").substr(0, 4), "␛[") << "no terminal's";
    EXPECT_EQ(printable("\x1b]0;x\x07\x7f"s), "␛]0;x␇␡");
    EXPECT_EQ(printable("\0"s), "␀");
    EXPECT_EQ(printable("\xe2\x80\xae"), "\xef\xbf\xbd") << "right to left";
    EXPECT_EQ(printable("\xc2\x9b"), "\xef\xbf\xbd") << "C1: CSI";
}

TEST(Printable, ReplacesWhatIsNoUtf8ByMaximalSubparts) {
    constexpr auto replaced = [](std::size_t times) {
        std::string text;
        for (std::size_t i = 0; i < times; ++i)
            text += "\xef\xbf\xbd";
        return text;
    };
    EXPECT_EQ(printable("\xff|\xc0\xaf|\xe2\x82|\xe2\x82"),
              replaced(1) + "|" + replaced(2) + "|" + replaced(1) + "|" + replaced(1));
    EXPECT_EQ(printable("\xed\xa0\x80"), replaced(3)) << "a surrogate";
    EXPECT_EQ(printable("\xe0\x80\xaf"), replaced(3)) << "overlong";
    EXPECT_EQ(printable("\xf4\x90\x80\x80"), replaced(4)) << "above U+10FFFF";
    EXPECT_EQ(printable("\xf4\x8f\xbf\xbd"), "\xf4\x8f\xbf\xbd");
    EXPECT_EQ(printable("\xf0\x9f\x98\x80"), "\xf0\x9f\x98\x80");
}

TEST(Printable, OfHostileBytesIsWhatXmlAllows) {
    for (const char character : printable(hostile())) {
        const auto byte = static_cast<unsigned char>(character);
        EXPECT_TRUE(byte >= 0x20 || byte == '\n' || byte == '\t') << unsigned{byte};
        EXPECT_NE(byte, 0x7f);
    }
    EXPECT_NO_THROW((void)Json(printable(hostile())).dump()) << "strict about UTF-8";
    EXPECT_EQ(printable(printable(hostile())), printable(hostile()));
    EXPECT_EQ(printable_line("a\nb\tc"), "a b c");
}

TEST(Clipped, FitsAndCutsBetweenCharacters) {
    EXPECT_EQ(clipped("abcdef", 6), "abcdef");
    EXPECT_EQ(clipped("abcdef", 5), "abcd…");
    EXPECT_EQ(clipped("éééé", 3), "éé…");
    EXPECT_EQ(clipped("日本語", 6), "日本語");
    EXPECT_EQ(clipped("日本語", 5), "日本…");
    EXPECT_EQ(clipped("日本語", 4), "日…") << "half a character does not fit";
    EXPECT_EQ(clipped("abc", 1), "…");
    EXPECT_EQ(clipped("abc", 0), "");
    EXPECT_EQ(clipped("", 0), "");
    const std::string line = printable_line(hostile());
    for (std::size_t columns = 0; columns <= columns_of(line); ++columns) {
        const std::string part = clipped(line, columns);
        EXPECT_LE(columns_of(part), columns);
        EXPECT_EQ(printable(part), part) << "UTF-8 still";
    }
}

TEST(Quoted, IsAJsonStringOnOneLine) {
    EXPECT_EQ(double_quoted("a\"b\\c\nd\te"), R"("a\"b\\c\nd\te")");
    EXPECT_EQ(Json::parse(double_quoted(hostile())), printable(hostile()));
    EXPECT_EQ(double_quoted(hostile()).find('\n'), std::string::npos);
}

TEST(Markup, HasNoMarkup) {
    EXPECT_EQ(markup("<a href=\"x\">&'"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;");
    EXPECT_EQ(markup(hostile()).find_first_of("<>\"'"), std::string::npos);
}

TEST(LastPart, BeginsWithALine) {
    EXPECT_EQ(last_part("one\ntwo\n", 8), "one\ntwo\n");
    EXPECT_EQ(last_part("one\ntwo\nthree\n", 12), "[4 bytes before this are left out]\ntwo\nthree\n");
    EXPECT_EQ(last_part("abcdefgh", 3), "[5 bytes before this are left out]\nfgh") << "there is but one";
    EXPECT_EQ(last_part("abc日", 2), "[6 bytes before this are left out]\n") << "not half a character";
}

TEST(UtcText, IsIso8601) {
    EXPECT_EQ(utc_text(leap_day), "2024-02-29T12:00:00Z");
}

// --- files

TEST_F(OutputTest, FullDiskIsToldWithThePath) {
    OutputFile file("/dev/full");
    EXPECT_EQ(file.problem(), std::nullopt);
    file.write("text");
    ASSERT_TRUE(file.problem());
    EXPECT_EQ(*file.problem(), "cannot write '/dev/full': No space left on device");
    EXPECT_EQ(replace_file("/dev/full", "text"), file.problem());
    EXPECT_TRUE(fs::is_character_file("/dev/full")) << "it was not replaced";
}

TEST_F(OutputTest, UnwritablePlacesAreToldBeforeTheRun) {
    EXPECT_THROW(OutputFile{path("none/out")}, StartupError);
    EXPECT_THROW(OutputFile{folder.native()}, StartupError);
    EXPECT_THROW(require_replaceable(path("none/out")), StartupError);
    EXPECT_THROW(require_replaceable(folder.native()), StartupError);
    EXPECT_NO_THROW(require_replaceable(path()));
    EXPECT_NO_THROW(require_replaceable("/dev/full"));
    put("file", "");
    EXPECT_THROW(require_replaceable(path("file/out")), StartupError);
    EXPECT_THROW(JUnitSink{path("none/out")}, StartupError);
    try {
        require_replaceable(path("none/out"));
    } catch (const StartupError& error) {
        EXPECT_EQ(error.what(), "cannot write '" + path("none/out") + "': No such file or directory");
        EXPECT_EQ(error.code(), ExitCode::bad_usage);
    }
}

TEST_F(OutputTest, ReplacesInOneStep) {
    put("out", "old");
    fs::create_symlink("out", folder / "link");
    std::ifstream reader(path());
    EXPECT_EQ(replace_file(path("link"), "new"), std::nullopt);
    EXPECT_EQ(contents(path()), "new");
    EXPECT_TRUE(fs::is_symlink(folder / "link"));
    std::string seen;
    reader >> seen;
    EXPECT_EQ(seen, "old") << "who had opened it has the old file";
    EXPECT_EQ(std::distance(fs::directory_iterator(folder), {}), 2) << "nothing else is left";
    EXPECT_TRUE(replace_file(path("none/out"), "new"));
}

TEST_F(OutputTest, WritesToWhatIsNoFile) {
    ASSERT_EQ(::mkfifo(path().c_str(), 0600), 0);
    const int reader = ::open(path().c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC);
    ASSERT_GE(reader, 0);
    EXPECT_EQ(replace_file(path(), "text"), std::nullopt);
    EXPECT_TRUE(fs::is_fifo(path()));
    std::array<char, 8> read{};
    EXPECT_EQ(::read(reader, read.data(), read.size()), 4);
    EXPECT_STREQ(read.data(), "text");
    ::close(reader);
}

// --- TAP

TEST_F(OutputTest, Tap) {
    TapSink sink(path());
    tell(sink);
    EXPECT_EQ(contents(path()), R"(TAP version 14
1..4
ok 1 - hello
  ---
  duration_ms: 1.500
  ...
not ok 2 - mm/oom[memory=64M]
  ---
  message: "timed out after 60 s"
  severity: fail
  outcome: timed-out
  at:
    file: "/repo/kernels/umbra.toml"
    line: 12
  problems:
    - "timed out after 60 s"
  folder: "out/mm"
  console: "boot\nstuck\n"
  duration_ms: 60000.000
  ...
ok 3 - mm/svm # SKIP this host has no native-ring0
not ok 4 - mm/late
  ---
  message: "after a failure"
  severity: fail
  problems:
    - "after a failure"
  duration_ms: 1.500
  ...
)");
    EXPECT_EQ(sink.problem(), std::nullopt);
}

/// What a harness makes of TAP: of test lines, with directives; blocks are left out.
struct Tap {
    std::string plan;
    std::size_t good = 0, bad = 0, skipped = 0, others = 0;
    bool bailed = false;

    explicit Tap(const std::string& text) {
        static const std::regex test(R"((not )?ok \d+ - ((?:[^\\#]|\\.)*)( # SKIP .*)?)");
        std::istringstream lines(text);
        std::string line;
        std::getline(lines, line);
        EXPECT_EQ(line, "TAP version 14");
        while (std::getline(lines, line)) {
            std::smatch match;
            if (line == "  ---") {
                while (line != "  ..." && std::getline(lines, line))
                    EXPECT_TRUE(line.starts_with("  ")) << line;
            } else if (line.starts_with("1..")) {
                EXPECT_EQ(plan, "");
                plan = line;
            } else if (line.starts_with("Bail out!")) {
                bailed = true;
            } else if (std::regex_match(line, match, test)) {
                ++(match[3].matched ? skipped : match[1].matched ? bad : good);
            } else {
                ++others;
            }
        }
    }
};

TEST_F(OutputTest, TapOfHostileTextAndUnknownNumbersIsRead) {
    TapSink sink(path());
    sink.plan({0, leap_day});
    CaseResult bad = failure();
    bad.test.name = "a # SKIP b\\" + hostile();
    bad.problems = {hostile(), "# TODO"};
    bad.console = hostile() + std::string(10'000, 'x');
    bad.reason = hostile();
    bad.attempts = 0;
    sink.ended(bad);
    CaseResult skipped = result_of("# SKIP", CaseVerdict::skipped, hostile());
    sink.ended(skipped);
    EXPECT_EQ(Tap(contents(path())).bad, 1U) << "it is there while the others run";
    sink.finished({0, 1, 1, 0, 1s, false});
    const std::string text = contents(path());
    const Tap tap(text);
    EXPECT_EQ(tap.plan, "1..2");
    EXPECT_EQ(tap.bad, 1U);
    EXPECT_EQ(tap.skipped, 1U);
    EXPECT_EQ(tap.good + tap.others, 0U) << text;
    EXPECT_FALSE(tap.bailed);
    EXPECT_NE(text.find("  attempt: 1\n"), std::string::npos);
    EXPECT_LT(text.size(), 8 * tap_console);
}

TEST_F(OutputTest, TapOfAnInterruptedRun) {
    TapSink sink(path());
    tell(sink, true);
    const Tap tap(contents(path()));
    EXPECT_TRUE(tap.bailed);
    EXPECT_EQ(tap.plan, "1..4");
    EXPECT_EQ(tap.bad, 2U);
}

// --- JSON lines

std::vector<Json> events(const std::string& text) {
    std::vector<Json> result;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);)
        result.push_back(Json::parse(line));
    EXPECT_TRUE(text.ends_with('\n'));
    return result;
}

TEST_F(OutputTest, JsonLines) {
    JsonLinesSink sink(path());
    tell(sink, true);
    const auto all = events(contents(path()));
    ASSERT_EQ(all.size(), 8U);
    EXPECT_EQ(all[0], Json::parse(R"({"event":"plan","format":1,"runs":4,"begun":"2024-02-29T12:00:00Z"})"));
    EXPECT_EQ(all[1], Json::parse(R"({"event":"start","name":"hello","attempt":1})"));
    EXPECT_EQ(all[2].at("event"), "end");
    EXPECT_EQ(all[2].at("verdict"), "passed");
    EXPECT_EQ(all[2].at("console"), nullptr);
    EXPECT_EQ(all[4].at("name"), "mm/oom[memory=64M]");
    EXPECT_EQ(all[4].at("outcome"), "timed-out");
    EXPECT_EQ(all[4].at("problems"), Json({"timed out after 60 s"}));
    EXPECT_EQ(all[4].at("console"), "boot\nstuck\n");
    EXPECT_EQ(all[6].at("verdict"), "not-run");
    EXPECT_EQ(all[7], Json::parse(R"({"event":"summary","passed":1,"failed":1,"skipped":1,"not_run":1,
                                      "wall_seconds":61.0,"interrupted":true})"));
}

TEST_F(OutputTest, JsonOfHostileTextIsRead) {
    JsonLinesSink sink(path());
    sink.plan({0, leap_day});
    CaseResult bad = failure();
    bad.test.name = bad.reason = bad.console = hostile();
    bad.problems = {hostile()};
    sink.started(bad.test, 1);
    sink.ended(bad);
    const auto all = events(contents(path()));
    ASSERT_EQ(all.size(), 3U);
    EXPECT_EQ(all[0].at("runs"), nullptr);
    EXPECT_NE(all[2].at("console").get<std::string>().find("Bail out!\r\n"), std::string::npos);
}

// --- JUnit

TEST_F(OutputTest, JUnit) {
    JUnitSink sink(path());
    tell(sink);
    EXPECT_EQ(contents(path()), R"(<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="umbra test" tests="4" failures="1" errors="0" time="61.000">
  <testsuite name="mm" tests="3" failures="1" errors="0" skipped="2" time="60.003" timestamp="2024-02-29T12:00:00Z">
    <testcase classname="mm" name="oom[memory=64M]" time="60.000">
      <failure message="timed out after 60 s" type="timed-out">timed out after 60 s
files: out/mm
</failure>
      <system-out>boot
stuck
</system-out>
    </testcase>
    <testcase classname="mm" name="svm" time="0.002">
      <skipped message="this host has no native-ring0"/>
    </testcase>
    <testcase classname="mm" name="late" time="0.002">
      <skipped message="after a failure"/>
    </testcase>
  </testsuite>
  <testsuite name="umbra" tests="1" failures="0" errors="0" skipped="0" time="0.002" timestamp="2024-02-29T12:00:00Z">
    <testcase classname="umbra" name="hello" time="0.002">
    </testcase>
  </testsuite>
</testsuites>
)");
}

TEST_F(OutputTest, JUnitOfAnInterruptedRunHasErrors) {
    JUnitSink sink(path());
    tell(sink, true);
    const std::string text = contents(path());
    EXPECT_NE(text.find("<testsuites name=\"umbra test\" tests=\"4\" failures=\"1\" errors=\"1\""),
              std::string::npos);
    EXPECT_NE(text.find("<error message=\"interrupted\" type=\"not-run\">"), std::string::npos);
    EXPECT_TRUE(text.ends_with("</testsuites>\n"));
}

TEST_F(OutputTest, JUnitTellsRunsFoldersAndUmbrasOwnErrorsApart) {
    JUnitSink sink(path());
    sink.plan({2, leap_day});
    CaseResult bad = result_of("a.b/c/case[kernel=x/y]", CaseVerdict::failed, "died");
    bad.outcome = Outcome::crashed;
    bad.reason = "out of memory";
    bad.attempts = 2;
    bad.attempt = 2;
    sink.ended(bad);
    sink.finished({0, 1, 0, 0, 1s, false});
    const std::string text = contents(path());
    EXPECT_NE(text.find("<testsuite name=\"a.b/c\" tests=\"1\" failures=\"0\" errors=\"1\""),
              std::string::npos);
    EXPECT_NE(text.find("classname=\"a_b.c\" name=\"case[kernel=x/y] (run 2)\""), std::string::npos);
    EXPECT_NE(text.find("<error message=\"died\" type=\"crashed\">died\nthe run ended: out of memory\n"),
              std::string::npos);
}

TEST_F(OutputTest, JUnitIsBoundedAndWellFormedWhateverTheGuestPrints) {
    JUnitSink sink(path());
    sink.plan({1, leap_day});
    CaseResult bad = failure();
    bad.test.name = "folder/" + hostile();
    bad.problems = {hostile()};
    bad.console = std::string(1 << 20, '<') + hostile();
    sink.ended(bad);
    sink.finished({0, 1, 0, 0, 1s, false});
    const std::string text = contents(path());
    EXPECT_LT(text.size(), 5 * junit_console);
    EXPECT_EQ(count(text, "<"), 11U) << "the declaration, and five elements' beginnings and ends";
    EXPECT_EQ(printable(text), text);
    EXPECT_EQ(text.find("]]>"), std::string::npos);
}

TEST_F(OutputTest, JUnitOnAFullDisk) {
    JUnitSink sink("/dev/full");
    tell(sink);
    ASSERT_TRUE(sink.problem());
    EXPECT_EQ(*sink.problem(), "cannot write '/dev/full': No space left on device");
}

// --- annotations

TEST_F(OutputTest, Annotations) {
    AnnotationSink sink(path(), "/repo");
    tell(sink, true);
    EXPECT_EQ(contents(path()),
              "::error file=kernels/umbra.toml,line=12,title=mm/oom[memory=64M]::timed out after 60 s\n"
              "::notice title=umbra test::1 skipped: mm/svm\n"
              "::warning title=umbra test::interrupted: 1 not run\n");
}

TEST_F(OutputTest, AnnotationsAreTenAtMost) {
    for (const std::size_t failures : {10U, 12U}) {
        AnnotationSink sink(path(), "/other");
        CaseResult bad = failure();
        for (std::size_t i = 0; i < failures; ++i)
            sink.ended(bad);
        EXPECT_EQ(count(contents(path()), "::error"), 9U) << "while it runs";
        sink.finished({0, failures, 0, 0, 1s, false});
        const std::string text = contents(path());
        EXPECT_EQ(count(text, "::error file=/repo/kernels/umbra.toml"), failures == 10 ? 10U : 9U);
        EXPECT_EQ(count(text, "::error title=umbra test::3 more cases failed"), failures == 10 ? 0U : 1U);
    }
}

TEST_F(OutputTest, AnnotationsTakeNoCommandOfTheGuest) {
    EXPECT_EQ(command_message("50%\n::error::x, y"), "50%25%0A::error::x, y");
    EXPECT_EQ(command_property("a:b,c%\n"), "a%3Ab%2Cc%25%0A");
    AnnotationSink sink(path(), "/repo");
    CaseResult bad = failure();
    bad.test.name = hostile();
    bad.problems = {hostile(), "second"};
    sink.ended(bad);
    const std::string text = contents(path());
    EXPECT_EQ(count(text, "\n"), 1U);
    EXPECT_TRUE(text.ends_with("%0Asecond\n"));
    EXPECT_EQ(count(text, "%0A"), 1U) << "a line for each problem, however many the guest would have";
}

// --- progress

TEST(ProgressLine, TellsWhatThereIsToTell) {
    EXPECT_EQ(progress_line({200, 0, 0, {}, 0s}, 80), "[  0/200]");
    EXPECT_EQ(progress_line({200, 100, 0, {{"a", 0s}}, 10s}, 80), "[100/200] 10 s left: a");
    EXPECT_EQ(progress_line({200, 50, 2, {{"mm/oom", 3500ms}, {"b", 0s}}, 100s}, 80),
              "[ 50/200] 2 failed, 5 min 0 s left: mm/oom (3 s), b");
    EXPECT_EQ(progress_line({0, 7, 0, {{"a", 0s}}, 10s}, 80), "[7]: a") << "until one fails: nobody knows";
    EXPECT_EQ(progress_line({9, 1, 0, {}, 100ms}, 80), "[1/9]") << "too early";
    EXPECT_EQ(progress_line({9, 9, 0, {}, 10s}, 80), "[9/9]");
}

TEST(ProgressLine, FitsAnyWidth) {
    ProgressState state{200, 12, 1, {{"日本語/カーネル", 5s}, {hostile(), 0s}}, 5s};
    for (std::size_t columns = 0; columns < 200; ++columns)
        EXPECT_LE(columns_of(progress_line(state, columns)), columns);
    EXPECT_EQ(progress_line(state, 79), printable_line(progress_line(state, 79)));
}

TEST(DurationText, ForPeople) {
    EXPECT_EQ(duration_text(1500us), "0.00 s");
    EXPECT_EQ(duration_text(9990ms), "9.99 s");
    EXPECT_EQ(duration_text(9999ms), "10 s");
    EXPECT_EQ(duration_text(59'600ms), "1 min 0 s");
    EXPECT_EQ(duration_text(3 * 3600s + 125s), "3 h 2 min");
}

TEST(TerminalColumns, AreTheUsers) {
    ASSERT_EQ(::setenv("COLUMNS", "132", 1), 0);
    EXPECT_EQ(terminal_columns(), 132U);
    for (const char* const bad : {"", "x", "0", "12x", "-1", "99999999999999999999"}) {
        ASSERT_EQ(::setenv("COLUMNS", bad, 1), 0);
        EXPECT_EQ(terminal_columns(), 80U) << bad;
    }
    ASSERT_EQ(::unsetenv("COLUMNS"), 0);
    EXPECT_EQ(terminal_columns(), 80U);
}

/// A progress whose time the test makes.
class ProgressTest : public OutputTest {
  public:
    void open(bool live) {
        fd = ::open(path().c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        ASSERT_GE(fd, 0);
        progress = std::make_unique<Progress>(fd, live, 80, [this] { return now; });
    }
    void TearDown() override {
        ::close(fd);
        OutputTest::TearDown();
    }
    [[nodiscard]] std::string written() const { return contents(path()); }

    int fd = -1;
    std::chrono::steady_clock::time_point now{1000s};
    std::unique_ptr<Progress> progress;
};

TEST_F(ProgressTest, LogHasALineForEachRunAndTheSummary) {
    open(false);
    tell(*progress);
    EXPECT_EQ(written(), R"([1/4] passed  hello (0.00 s)
[2/4] failed  mm/oom[memory=64M] (1 min 0 s): timed out after 60 s
[3/4] skipped mm/svm (0.00 s): this host has no native-ring0
failed mm/oom[memory=64M]: timed out after 60 s
        | boot
        | stuck
        in out/mm
skipped 1: this host has no native-ring0
3 in 1 min 1 s: 1 passed, 1 failed, 1 skipped, 1 not run
)");
}

TEST_F(ProgressTest, LogIsNotSilentForLong) {
    open(false);
    progress->plan({2, leap_day});
    progress->started(failure().test, 1);
    now += 29s;
    progress->tick();
    EXPECT_EQ(written(), "");
    now += 1s;
    progress->tick();
    progress->tick();
    EXPECT_EQ(written(), "[0/2]: mm/oom[memory=64M] (30 s)\n");
}

TEST_F(ProgressTest, LiveLineIsRedrawnAndTakenAway) {
    open(true);
    progress->plan({2, leap_day});
    const CaseResult passed = result_of("hello", CaseVerdict::passed);
    progress->started(passed.test, 1);
    EXPECT_EQ(written(), "") << "not at once: cases may be over in a millisecond";
    now += Progress::draw_interval;
    progress->tick();
    EXPECT_EQ(written(), "\r\x1b[?7l[0/2]: hello\x1b[K\x1b[?7h");
    progress->ended(passed);
    EXPECT_EQ(count(written(), "\n"), 0U) << "what passed leaves no line";
    CaseResult bad = failure();
    bad.problems = {hostile()};
    progress->ended(bad);
    progress->finished({1, 1, 0, 0, 1s, true});
    const std::string text = written();
    EXPECT_NE(text.find("\r\x1b[K[2/2] failed  mm/oom"), std::string::npos);
    EXPECT_TRUE(
        text.ends_with("        in out/mm\ninterrupted: 2 in 1.00 s: 1 passed, 1 failed, 0 skipped\n"));
    const std::string plain = std::regex_replace(text, std::regex("\r?\x1b\\[\\??7?[lhK]"), "");
    EXPECT_EQ(printable(plain), plain) << "only umbra's own sequences reach the terminal";
}

TEST_F(ProgressTest, LogHasNoCommandForGitHub) {
    open(false);
    CaseResult bad = failure();
    bad.test.name = "::error::x";
    bad.folder = "::error::y";
    bad.problems = {"the console has '##[add-mask]e ###[error]'\n::error::z"};
    progress->ended(bad);
    progress->finished({0, 1, 0, 0, 1s, false});
    const std::string text = written();
    EXPECT_EQ(count(text, "##["), 0U);
    EXPECT_EQ(count(text, "## [add-mask]e ### [error]"), 2U);
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);)
        EXPECT_FALSE(std::regex_search(line, std::regex("^\\s*::"))) << line;
}

TEST_F(ProgressTest, WhatCannotBeWrittenIsOfNoConcern) {
    const int full = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
    Progress out(full, false, 80);
    tell(out);
    EXPECT_EQ(out.problem(), std::nullopt);
    ::close(full);
}

TEST(SummaryText, TellsRatesOfFlakyCases) {
    Summary summary;
    for (unsigned attempt = 1; attempt <= 10; ++attempt)
        for (const char* const name : {"flaky", "good", "bad"}) {
            const bool fails = name == "bad"s || (name == "flaky"s && attempt % 4 == 0);
            CaseResult result =
                result_of(name, fails ? CaseVerdict::failed : CaseVerdict::passed, fails ? "no" : "");
            result.attempt = attempt;
            result.attempts = 10;
            summary.add(result);
        }
    EXPECT_EQ(summary.text({18, 12, 0, 0, 2s, false}), R"(failed bad: no
        10 of 10 runs failed (100 %)
flaky  flaky: no
        2 of 10 runs failed (20 %)
30 in 2.00 s: 18 passed, 12 failed, 0 skipped
)");
}

TEST(SummaryText, TellsAllProblemsAndTheConsolesEnd) {
    Summary summary;
    CaseResult bad = failure();
    bad.problems = {"first", "sec\nond"};
    bad.console.clear();
    for (unsigned line = 1; line <= 300; ++line)
        bad.console += "line " + std::to_string(line) + (line == 298 ? std::string(1000, 'x') : "") + "\n";
    bad.console += "\x1b[31mprompt\x1b[0m> ";
    for (const char* const name : {"a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"}) {
        bad.test.name = name;
        summary.add(bad);
    }
    const std::string text = summary.text({});
    EXPECT_TRUE(text.starts_with("failed a: first\n        sec ond\n        | "));
    EXPECT_EQ(count(text, "        | line 299\n        | line 300\n        | prompt> \n        in out/mm\n"),
              10U);
    EXPECT_NE(text.find("failed k: first\n        sec ond\n        in out/mm\n"), std::string::npos);
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);)
        EXPECT_LE(columns_of(line), Summary::shown_columns + 10);
}

// --- the report

constexpr const char* trace = R"(# umbra trace: us=since umbra started ...
us=1000.000 vcpu=0 reason=page_fault cpl=0 rip=0x1 vector=14 error=0x2 cr2=0x401123 action=fill took_us=2.000
us=1001.000 vcpu=0 reason=page_fault cpl=0 rip=0x1 vector=14 error=0x2 cr2=0x402000 action=fill took_us=2.000
us=1002.000 vcpu=0 reason=page_fault cpl=0 rip=0x1 vector=14 error=0x2 cr2=0x402008 action=deliver took_us=2.000
us=nan vcpu=0 reason=page_fault cr2=0x402008 action=deliver took_us=2.000
not a line of it
us=2000.000 vcpu=0 reason=instruction cpl=0 rip=0x1 instruction=out action=emulate took_us=2.000
us=121000.000 vcpu=0 reason=instruction cpl=0 rip=0x1 vector=14 error=0x2 cr2=0xffff800000000000 instruction=mov action=emulate took_us=2.000
)";

TEST(Timeline, CountsFaultsByTimeAndPlace) {
    std::istringstream stream(trace);
    const auto timeline = read_timeline(stream);
    ASSERT_TRUE(timeline);
    EXPECT_TRUE(timeline->complete);
    EXPECT_EQ(timeline->traps, 5U);
    EXPECT_NEAR(timeline->seconds, 0.12, 1e-9);
    EXPECT_EQ(timeline->faults.front(), (FaultTimeline::Slot{2, 1, 0}));
    EXPECT_EQ(timeline->faults.back(), (FaultTimeline::Slot{0, 0, 1}));
    ASSERT_EQ(timeline->map.size(), 3U);
    const FaultTimeline::Region &code = timeline->map[0], &data = timeline->map[1];
    EXPECT_EQ(code.first, 0U);
    EXPECT_EQ(code.code, 5U);
    EXPECT_EQ(code.faults, 0U);
    EXPECT_EQ(data.first, 0x401000U);
    EXPECT_EQ(data.last, 0x402000U);
    EXPECT_EQ(data.pages, 2U);
    EXPECT_EQ(data.faults, 3U);
    ASSERT_EQ(data.cells.size(), 2U) << "a page each";
    EXPECT_EQ(data.cells[0].faults, (FaultTimeline::Slot{1, 0, 0}));
    EXPECT_EQ(data.cells[1].faults, (FaultTimeline::Slot{1, 1, 0}));
    EXPECT_EQ(timeline->map[2].first, 0xffff'8000'0000'0000U);
    EXPECT_EQ(timeline->map[2].cells.at(0).faults, (FaultTimeline::Slot{0, 0, 1}));
}

TEST(Timeline, MapsWideRegionsByCellsOfSeveralPages) {
    std::stringstream wide;
    for (const std::uint64_t page : {0x1000U, 0x1001U, 0x1080U, 0x1080U})
        wide << std::hex << "us=1 rip=0xffffffffffffffff cr2=0x" << page * 4096 << " action=fill\n";
    const auto timeline = read_timeline(wide);
    ASSERT_TRUE(timeline);
    ASSERT_EQ(timeline->map.size(), 2U);
    const FaultTimeline::Region& region = timeline->map[0];
    EXPECT_EQ(region.cell_pages, 4U);
    EXPECT_EQ(region.pages, 3U);
    ASSERT_EQ(region.cells.size(), 33U);
    EXPECT_EQ(region.cells.front().faults[0], 2U);
    EXPECT_EQ(region.cells.back().faults[0], 2U);
    EXPECT_EQ(timeline->map[1].last, 0xffff'ffff'ffff'f000U);
    EXPECT_EQ(timeline->map[1].code, 4U);
}

TEST(Timeline, IsBounded) {
    std::istringstream stream(trace), empty("nothing\n");
    const auto timeline = read_timeline(stream, 300);
    ASSERT_TRUE(timeline);
    EXPECT_FALSE(timeline->complete);
    EXPECT_EQ(timeline->traps, 2U);
    EXPECT_FALSE(read_timeline(empty));
    std::stringstream many;
    for (unsigned i = 0; i < 1000; ++i)
        many << "us=" << i << " cr2=0x" << std::hex << (std::uint64_t{i} << 32U) << std::dec
             << " action=fill\n";
    const auto wide = read_timeline(many);
    ASSERT_TRUE(wide);
    EXPECT_EQ(wide->map.size(), 64U);
    EXPECT_EQ(wide->more_places, 936U);
}

TEST(ReportPage, EscapesWhatTheGuestPrintedAndNeedsNothing) {
    ReportedCase reported;
    reported.name = reported.verdict = reported.outcome = reported.folder = hostile();
    reported.expected = reported.reason = reported.manifest = reported.errors = hostile();
    reported.problems = reported.tags = reported.files = {hostile()};
    reported.instructions = {{hostile(), 1}};
    reported.parameters = {{hostile(), hostile()}};
    reported.console = hostile();
    reported.traps = {{hostile(), hostile(), 1, 1}};
    std::istringstream stream(trace);
    reported.timeline = read_timeline(stream);
    const std::string page = report_page(hostile(), {reported});
    ReportedCase harmless = reported;
    harmless.name = harmless.verdict = harmless.outcome = harmless.folder = harmless.console = "x";
    harmless.expected = harmless.reason = harmless.manifest = harmless.errors = "x";
    harmless.problems = harmless.tags = harmless.files = {"x"};
    harmless.instructions = {{"x", 1}};
    harmless.parameters = {{"x", "x"}};
    harmless.traps = {{"x", "x", 1, 1}};
    EXPECT_EQ(count(page, "<"), count(report_page("x", {harmless}), "<")) << "no markup but the page's own";
    EXPECT_EQ(printable(page), page);
    EXPECT_EQ(page.find("<script"), std::string::npos);
    EXPECT_EQ(page.find("http"), page.find("http-equiv")) << "no address of anything";
    EXPECT_EQ(count(page, "http"), 1U);
    EXPECT_NE(page.find("prefers-color-scheme: dark"), std::string::npos);
    EXPECT_NE(page.find("default-src 'none'"), std::string::npos);
}

TEST(ReportPage, MarksTheFailingLine) {
    ReportedCase reported;
    reported.name = "boot/<x>";
    reported.verdict = "failed";
    reported.console = "one\r\nPANIC: <oops>\nthree";
    reported.console_before = 40;
    reported.failing_line = 42;
    const std::string page = report_page("run", {reported});
    EXPECT_NE(page.find("41\n42\n43\n</pre><pre>\none\n<mark>PANIC: &lt;oops&gt;</mark>\nthree\n</pre>"),
              std::string::npos)
        << page;
    EXPECT_NE(page.find("40 lines before are left out."), std::string::npos);
    EXPECT_NE(page.find(">1 failed</label>"), std::string::npos);
}

TEST(ReportPage, FoldsWhatIsFarFromTheFailingLine) {
    ReportedCase reported;
    reported.name = "x";
    reported.verdict = "failed";
    for (unsigned i = 1; i <= 100; ++i)
        reported.console += "line " + std::to_string(i) + "\n";
    reported.failing_line = 50;
    const std::string page = report_page("run", {reported});
    const std::size_t before = page.find("29 lines before"), mark = page.find("<mark>line 50</mark>"),
                      after = page.find("40 lines after");
    EXPECT_LT(before, mark);
    EXPECT_LT(mark, after);
    EXPECT_NE(after, std::string::npos);
    reported.failing_line = 0;
    const std::string end = report_page("run", {reported});
    EXPECT_NE(end.find("70 lines before"), std::string::npos);
    EXPECT_EQ(end.find("after</summary>"), std::string::npos);
}

TEST(ReportPage, ShowsRunsOfACaseTogether) {
    std::vector<ReportedCase> cases(12);
    for (std::size_t i = 0; i < cases.size(); ++i) {
        cases[i].name = i == 11 ? "steady" : "race";
        cases[i].attempt = i + 1;
        cases[i].attempts = 11;
        cases[i].verdict = i == 3 || i == 5 ? "failed" : "passed";
        cases[i].console = "x";
    }
    const std::string page = report_page("run", cases);
    EXPECT_NE(page.find("flaky<td><a href=\"#case3\">race</a><span class=\"why\">2 of 11 runs failed: "
                        "<a href=\"#case3\">run 4</a>, <a href=\"#case5\">run 6</a></span>"),
              std::string::npos)
        << page;
    EXPECT_EQ(count(page, "<tr class=\"is-"), 2U);
}

TEST(ReportPage, IsBounded) {
    std::vector<ReportedCase> cases(40);
    for (std::size_t i = 0; i < cases.size(); ++i) {
        cases[i].name = "case-" + std::to_string(i);
        cases[i].verdict = "failed";
        for (unsigned line = 0; line < 20'000; ++line)
            cases[i].console += "a line of a console that goes on and on\n";
    }
    const std::string page = report_page("run", cases);
    EXPECT_LT(page.size(), 32U << 20U);
    EXPECT_NE(page.find("</span> case-39 <span"), std::string::npos);
    EXPECT_NE(page.find("This page is large already"), std::string::npos);
}

TEST(ReportPage, LinksLeadNowhereElse) {
    ReportedCase reported;
    reported.name = "x";
    reported.folder = "javascript:alert(1)/\"é";
    reported.files = {"console.log"};
    const std::string page = report_page("run", {reported});
    EXPECT_NE(page.find("href=\"./javascript%3Aalert%281%29/%22%C3%A9/console.log\""), std::string::npos)
        << page;
}

TEST_F(OutputTest, ReportReadsWhatTheRunLeft) {
    {
        JsonLinesSink sink(path("results.jsonl"));
        tell(sink);
    }
    CaseResult bad = failure();
    bad.console_bytes = 8;
    bad.culprit = 2;
    bad.stats =
        R"({"traps":{"by_reason":[{"reason":"page_fault","action":"fill","count":7,"microseconds":2.5}]},)"
        R"("instructions":{"cli":2,"out":9}})";
    put("mm/result.json", result_json(bad));
    put("mm/"s + case_files::console, "boot\nBUG");
    put("mm/"s + case_files::trace, trace);
    put("mm/"s + case_files::errors, "umbra: triple fault\n");
    auto [cases, problems] = read_results(folder.native());
    EXPECT_EQ(problems, std::vector<std::string>{});
    ASSERT_EQ(cases.size(), 4U);
    const ReportedCase& reported = cases[2];
    EXPECT_EQ(reported.name, "mm/oom[memory=64M]");
    EXPECT_EQ(reported.console, "boot\nBUG");
    EXPECT_EQ(reported.failing_line, 2U);
    EXPECT_EQ(reported.folder, "mm");
    ASSERT_EQ(reported.traps.size(), 1U);
    EXPECT_EQ(reported.traps[0].count, 7U);
    ASSERT_EQ(reported.instructions.size(), 2U);
    EXPECT_EQ(reported.instructions[0].first, "out");
    EXPECT_EQ(reported.errors, "umbra: triple fault\n");
    EXPECT_EQ(reported.files,
              (std::vector<std::string>{case_files::console, case_files::errors, case_files::trace}));
    ASSERT_TRUE(reported.timeline);
    EXPECT_EQ(read_results(folder.native(), path("mm/deep")).first[2].folder, "..")
        << "the page is elsewhere";
    EXPECT_EQ(cases[0].verdict, "passed");
    EXPECT_EQ(report_command(folder.native(), ""), 0);
    EXPECT_NE(contents(path("report.html")).find("<mark>BUG</mark>"), std::string::npos);
    EXPECT_NE(report_command(folder.native(), "/dev/full"), 0);
}

TEST_F(OutputTest, ReportToldOfDamage) {
    EXPECT_NE(report_command(folder.native(), ""), 0) << "nothing there";
    EXPECT_NE(report_command(path("none"), ""), 0);
    put("a/result.json", "{\"name\":");
    put("b/result.json", std::string(100'000, '['));
    put("c/result.json", R"({"name":1,"traps":[]})");
    put("d/result.json",
        R"({"name":"d","problems":7,"stats":{"traps":{"by_reason":[1,{"count":-1}]}},"attempts":1})");
    put("events.jsonl", "{\"event\":\"end\",\"name\":\"e\"}\n{\"event\":\"end\",\"na");
    const auto [cases, problems] = read_results(folder.native());
    ASSERT_EQ(cases.size(), 2U);
    EXPECT_EQ(problems.size(), 4U);
    EXPECT_NE(problems.front().find("events.jsonl:2"), std::string::npos);
    EXPECT_NE(report_command(folder.native(), ""), 0) << "not all is in the page";
    EXPECT_TRUE(fs::exists(path("report.html")));
}

TEST_F(OutputTest, ReportShowsTheLineAmongMany) {
    std::string console;
    for (unsigned i = 1; i <= 200'000; ++i)
        console += "line " + std::to_string(i) + "\n";
    CaseResult bad = failure();
    bad.console_bytes = console.size();
    bad.culprit = 1000;
    put("mm/"s + case_files::console, console);
    put("mm/result.json", result_json(bad));
    const auto before = read_results(folder.native()).first.at(0);
    EXPECT_NE(report_page("x", {before}).find("<mark>line 1000</mark>"), std::string::npos);
    bad.culprit = 150'000;
    bad.console_bytes = 2 * console.size(); // the middle was not kept
    put("mm/result.json", result_json(bad));
    EXPECT_EQ(read_results(folder.native()).first.at(0).failing_line, 0U) << "it cannot be told which it is";
    bad.culprit = std::nullopt;
    put("mm/result.json", result_json(bad));
    const auto end = read_results(folder.native()).first.at(0);
    EXPECT_TRUE(end.console.ends_with("line 200000\n"));
    EXPECT_TRUE(end.console.starts_with("line " + std::to_string(end.console_before + 1) + "\n"));
    EXPECT_LE(end.console.size(), 256U << 10U);
}

} // namespace
} // namespace umbra
