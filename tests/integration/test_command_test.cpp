// `umbra test` and `umbra report` with real guests, as their users meet them: what is told of each end of a
// run, in each output; mistakes in manifests; what becomes of the runs when the runner is ended; and what is
// kept of a failed case.
#include "tests/integration/child.hpp"
#include "tests/integration/debugged.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"
#include "tests/integration/machine_code.hpp"

#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

using namespace std::chrono_literals;
using namespace machine_code;
using testing::ElementsAre;
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::MatchesRegex;
using testing::Not;
using testing::StartsWith;

namespace fs = std::filesystem;
using Arguments = std::vector<std::string>;
using Clock = std::chrono::steady_clock;
using Json = nlohmann::json;

Code text(std::string_view characters) {
    Code code;
    for (const char c : characters)
        code = code + print(c);
    return code;
}

/// A far jump through a call gate, which umbra does not do (report_test.cpp).
const Code far_jump = mov_eax(0x00100000) + Code{0xa3, 0x08, 0x05, 0, 0, 0, 0, 0, 0} + mov_eax(0x00008c00) +
                      Code{0xa3, 0x0c, 0x05, 0, 0, 0, 0, 0, 0} + mov_eax(8) +
                      Code{0xa3, 0x04, 0, 0x20, 0, 0, 0, 0, 0} + Code{0xff, 0x2c, 0x25, 0, 0, 0x20, 0};
/// Waits for a key and exits with its scan code.
const Code read_key = Code{0xe4, 0x64, 0xa8, 0x01, 0x74, 0xfa, 0xe4, 0x60, 0x0f, 0xb6, 0xc0} + mov_dx(0xf4) +
                      out_dx_eax + spin; // 1: in; test; jz 1b; in; movzx
/// Exits with 0 or 1, as the lower bits of the time stamp counter are: one of its multiple's upper bits.
const Code toss = Code{0x0f, 0x31, 0x69, 0xc0, 0xb1, 0x79, 0x37, 0x9e, 0xc1, 0xe8, 0x1f} + mov_dx(0xf4) +
                  out_dx_eax + spin; // rdtsc; imul; shr

/// A case in a manifest; `rest` is further lines of it.
std::string a_case(const std::string& name, const std::string& kernel, const std::string& rest = {}) {
    return "[[case]]\nname = '" + name + "'\nkernel = '" + kernel + "'\n" + rest + "\n";
}

std::string in_guests(const std::string& name, const std::string& kernel, const std::string& rest = {}) {
    return a_case(name, guest_file(kernel), rest);
}

/// JSON lines.
std::vector<Json> events_in(const std::string& lines) {
    std::vector<Json> events;
    for (const std::string& line : lines_of(lines)) {
        events.push_back(Json::parse(line, nullptr, false));
        EXPECT_TRUE(events.back().is_object()) << line;
    }
    return events;
}

std::vector<Json> of_kind(const std::vector<Json>& events, const std::string& kind) {
    std::vector<Json> found;
    std::ranges::copy_if(events, std::back_inserter(found),
                         [&](const Json& event) { return event.value("event", "") == kind; });
    return found;
}

/// Well-formed by Python's parser, and valid by the project's schema, where both are there.
void expect_valid_junit(const std::string& file) {
    const std::string python = program_file("python3");
    if (!python.empty()) {
        const Ended ended = Child({python, "-c",
                                   "import sys\ntry: from xml.etree import ElementTree\n"
                                   "except ImportError: sys.exit()\nElementTree.parse(sys.argv[1])",
                                   file})
                                .end();
        EXPECT_EQ(ended.exit_code, 0) << file << ": " << ended;
    }
    const fs::path script = fs::path(UMBRA_SCRIPTS) / "check-junit";
    if (fs::exists(script) && !program_file("xmllint").empty()) {
        const Ended ended = Child({script, file}).end();
        EXPECT_EQ(ended.exit_code, 0) << ended;
    }
}

std::size_t count(std::string_view all, std::string_view part) {
    std::size_t found = 0;
    for (std::size_t at = all.find(part); at != std::string_view::npos; at = all.find(part, at + 1))
        ++found;
    return found;
}

Arguments test_command(Arguments options) {
    options.insert(options.begin(), "test");
    return umbra_command(options);
}

/// A folder of manifests, kernels and results, in which `umbra test` is run.
class ManifestFolder {
  public:
    void write(const std::string& cases, const std::string& name = "umbra.toml") const {
        (void)folder_.write(name, "[defaults]\nmemory = '32M'\ntimeout = 100\n" + cases);
    }
    /// The path of a kernel of these instructions.
    [[nodiscard]] std::string kernel(const std::string& name, const Code& code) const {
        return folder_.write(name, elf_kernel(code));
    }
    /// One that waits for an interrupt that does not come: it is idle, and runs until it is ended.
    [[nodiscard]] std::string waiting() const { return kernel("waiting", text("waiting\n") + halt); }
    [[nodiscard]] std::string file(const std::string& name) const { return folder_.file(name); }
    [[nodiscard]] std::string read(const std::string& name) const { return contents_of(file(name)); }

    using Prepare = std::function<bool()>;
    /// A child begins here, as a CI server's: neither is it CI, nor is its terminal dumb.
    [[nodiscard]] Child::Setup setup(
        const Prepare& prepare = [] { return true; }, Child::Input input = Child::Input::none) const {
        return {.input = input, .prepare = [here = folder_.file(""), prepare] {
                    return ::chdir(here.c_str()) == 0 && ::unsetenv("CI") == 0 &&
                           ::setenv("TERM", "xterm", 1) == 0 && ::unsetenv("COLUMNS") == 0 && prepare();
                }};
    }
    [[nodiscard]] Ended test(
        const Arguments& options = {}, const Prepare& prepare = [] { return true; }) const {
        return Child(test_command(options), setup(prepare)).end();
    }

    [[nodiscard]] std::vector<Json> events() const { return events_in(read("umbra-results/results.jsonl")); }
    /// What became of the cases, by their names.
    [[nodiscard]] std::map<std::string, Json> results() const {
        std::map<std::string, Json> results;
        for (const Json& event : of_kind(events(), "end"))
            EXPECT_TRUE(results.emplace(event.value("name", ""), event).second) << event;
        return results;
    }
    [[nodiscard]] std::string first_problem(const std::string& name) const {
        const Json result = results()[name];
        const bool has_one = result.is_object() && !result.at("problems").empty();
        return has_one ? result.at("problems").at(0).get<std::string>() : std::string();
    }

    /// The processes of guests with something of this folder on their command line.
    [[nodiscard]] std::vector<pid_t> guests() const {
        std::vector<pid_t> found;
        for (const auto& entry : fs::directory_iterator("/proc")) {
            const std::string name = entry.path().filename();
            pid_t pid = 0;
            const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), pid);
            if (error != std::errc() || end != name.data() + name.size())
                continue;
            std::ostringstream stream; // of a process that ends meanwhile, reading fails
            stream << std::ifstream(entry.path() / "cmdline").rdbuf();
            const std::string words = stream.str();
            if (words.find(std::string("\0run\0", 5)) != std::string::npos &&
                words.find(folder_.file("")) != std::string::npos)
                found.push_back(pid);
        }
        return found;
    }
    /// Waits until so many guests have printed something; false if that does not come.
    [[nodiscard]] bool wait_for_guests(Child& runner, std::size_t number) const {
        const auto deadline = Clock::now() + patience;
        while (guests().size() < number || count(read("umbra-results/results.jsonl"), "\"start\"") < number)
            if (Clock::now() > deadline || !runner.run_for(10ms))
                return false;
        return runner.run_for(emulated_host() ? 3s : 200ms);
    }
    /// Waits until none is there; false if some is after `limit`.
    [[nodiscard]] bool wait_for_none(std::chrono::milliseconds limit) const {
        const auto deadline = Clock::now() + limit;
        while (!guests().empty()) {
            if (Clock::now() > deadline)
                return false;
            ::usleep(2'000);
        }
        return true;
    }

  private:
    TemporaryFolder folder_;
};

class TestCommand : public KvmTest {
  protected:
    void TearDown() override { EXPECT_THAT(folder_.guests(), IsEmpty()) << "orphans"; }

    ManifestFolder folder_;
};

/// What needs no KVM.
class TestCommandLine : public testing::Test {
  protected:
    ManifestFolder folder_;
};

// --- How runs end

TEST_F(TestCommand, EachEndOfARunIsToldAndCanBeExpected) {
    struct End {
        std::string word, kernel, rest, told;
    };
    const std::vector<End> ends{
        {"failed", guest_file("fail"), "", "failed with code 7 (0x7)"},
        {"triple-fault", guest_file("triple"), "", "triple fault: while vector 6 was delivered"},
        {"reset", folder_.kernel("reset", write_port(0x64, 0xfe) + spin), "", "reset: the guest reset"},
        {"stopped", folder_.kernel("far", far_jump), "", "stopped: umbra does not emulate this instruction"},
        {"timed-out", folder_.waiting(), "timeout = 1", "timed out"},
        {"no-progress", guest_file("halt"), "", "no progress: the guest halted with interrupts off"},
        {"bad-usage", folder_.file("none"), "", "bad usage: cannot read kernel '"},
    };
    std::string cases = in_guests("passed as expected", "hello", "expect = 'passed'") +
                        in_guests("passed", "hello", "expect = 'failed'");
    for (const End& end : ends)
        cases += a_case(end.word + " as expected", end.kernel, end.rest + "\nexpect = '" + end.word + "'") +
                 a_case(end.word, end.kernel, end.rest);
    folder_.write(cases);
    const Ended ended = folder_.test({"--junit=junit.xml", "--tap=tap"});
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_THAT(ended.out, HasSubstr(": 8 passed, 8 failed, 0 skipped\n"));
    EXPECT_EQ(ended.err, "");

    const auto results = folder_.results();
    ASSERT_EQ(results.size(), 16U) << ended;
    const auto check = [&](const std::string& name, const std::string& word, const std::string& verdict) {
        const Json& result = results.at(name);
        EXPECT_EQ(result.at("outcome"), word) << result;
        EXPECT_EQ(result.at("verdict"), verdict) << result;
        EXPECT_EQ(result.at("problems").empty(), verdict == "passed") << result;
    };
    check("passed as expected", "passed", "passed");
    check("passed", "passed", "failed");
    EXPECT_EQ(folder_.first_problem("passed"), "expected failed, but it ended: passed");
    for (const End& end : ends) {
        check(end.word + " as expected", end.word, "passed");
        check(end.word, end.word, "failed");
        EXPECT_THAT(folder_.first_problem(end.word),
                    StartsWith("expected passed, but it ended: " + end.told));
    }
    EXPECT_EQ(results.at("failed").at("code"), 7);
    EXPECT_GE(results.at("timed-out").at("wall_seconds"), 1.0);
    EXPECT_LT(results.at("no-progress").at("wall_seconds"), 50.0) << "it is not waited for the time limit";
    const std::string junit = folder_.read("junit.xml");
    EXPECT_THAT(junit, HasSubstr("tests=\"16\" failures=\"7\" errors=\"1\""));
    EXPECT_EQ(count(folder_.read("tap"), "\nnot ok "), 8U);
    expect_valid_junit(folder_.file("junit.xml"));
}

TEST_F(TestCommand, TheGuestsCodeIsExpected) {
    folder_.write(in_guests("7", "fail", "expect = { outcome = 'failed', code = 7 }") +
                  in_guests("8", "fail", "expect = { outcome = 'failed', code = 8 }"));
    const Ended ended = folder_.test();
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_EQ(folder_.results()["7"].value("verdict", ""), "passed");
    EXPECT_EQ(folder_.first_problem("8"),
              "expected failed with code 8, but it ended: failed with code 7 (0x7)");
}

TEST_F(TestCommand, AKernelThatPrintsPassAndHangsHasNotPassed) {
    const std::string pass_hang = folder_.kernel("hang", text("PASS\n") + halt);
    const std::string silent = folder_.kernel("silent", halt);
    folder_.write(a_case("hang", pass_hang, "timeout = 2\nconsole.required = ['PASS']") +
                  a_case("stuck", guest_file("halt"), "console.required = ['halting']") +
                  a_case("silent", silent, "timeout = 1\nconsole.required = ['PASS']") +
                  in_guests("early", "hello", "console.required = ['Hello', 'all tests done']") +
                  in_guests("order", "hello", "console.required = ['hello: passed', 'Hello']") +
                  in_guests("good", "hello", "console.required = ['^Hello from', '^hello: passed$']"));
    const Ended ended = folder_.test();
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_THAT(ended.out, HasSubstr("1 passed, 5 failed"));
    EXPECT_EQ(folder_.first_problem("hang"), "expected passed, but it ended: timed out; it had printed all "
                                             "that is required, and did not end");
    EXPECT_THAT(folder_.first_problem("stuck"), StartsWith("expected passed, but it ended: no progress: "));
    EXPECT_THAT(folder_.first_problem("stuck"),
                EndsWith("; it had printed all that is required, and did not end"));
    EXPECT_EQ(folder_.first_problem("silent"),
              "expected passed, but it ended: timed out; the guest printed nothing");
    EXPECT_EQ(folder_.first_problem("early"),
              "the console does not show 'all tests done' after 'Hello' (1 of 2 required patterns found)");
    EXPECT_EQ(folder_.results()["early"].value("outcome", ""), "passed") << "ended by itself, but too early";
    EXPECT_EQ(folder_.first_problem("order"),
              "the console does not show 'Hello' after 'hello: passed' (1 of 2 required patterns found)");
    EXPECT_THAT(ended.out, HasSubstr("failed silent: expected passed, but it ended: timed out; the guest "
                                     "printed nothing\n        the console does not show 'PASS'"))
        << "all problems are told";
    EXPECT_THAT(ended.out, HasSubstr("        | hello: passed\n        in ")) << "and what was printed last";
}

TEST_F(TestCommand, AForbiddenLineEndsTheRunAndIsNamed) {
    const std::string bug = folder_.kernel("bug", text("one\ntwo BUG: here\nthree\n") + halt);
    folder_.write(a_case("bug", bug, "console.forbidden = ['WARN', 'BUG:']") +
                  in_guests("also", "hello", "console.forbidden = ['memory \\d+ KB']"));
    const Ended ended = folder_.test();
    EXPECT_EQ(ended.exit_code, 1) << ended;
    const auto results = folder_.results();
    EXPECT_EQ(results.at("bug").at("culprit"), 2);
    EXPECT_LT(results.at("bug").at("wall_seconds"), 50.0) << "nor is it waited for the time limit";
    EXPECT_EQ(folder_.first_problem("bug"),
              "line 2 of the console shows 'BUG:', which is forbidden: two BUG: here");
    EXPECT_EQ(results.at("also").at("culprit"), 2) << "of a guest that passes, too";
}

TEST_F(TestCommand, ConversationsGoToTheSerialPortAndTheKeyboard) {
    const std::string key = folder_.kernel("key", text("key? ") + read_key);
    folder_.write(
        in_guests("serial", "echo",
                  "conversation = [{ expect = 'ready', send = \"one\\n\" },\n"
                  "{ expect = '\\[one\\]', send = \"quit\\n\" }, { expect = 'passed', send = '' }]") +
        in_guests("unmet", "echo",
                  "timeout = 2\nconversation = [{ expect = 'ready', send = \"one\\n\" },\n"
                  "{ expect = 'login:', send = \"root\\n\" }]") +
        a_case("keyboard", key,
               "keyboard = true\nconversation = [{ expect = 'key\\? $', send = 'a' }]\n"
               "expect = { outcome = 'failed', code = 0x1e }"));
    const Ended ended = folder_.test();
    EXPECT_EQ(ended.exit_code, 1) << ended;
    const auto results = folder_.results();
    EXPECT_EQ(results.at("serial").at("verdict"), "passed") << results.at("serial");
    EXPECT_EQ(results.at("keyboard").at("verdict"), "passed") << results.at("keyboard");
    EXPECT_THAT(results.at("unmet").at("problems").dump(),
                HasSubstr("the conversation waits for 'login:' in step 2 of 2"));
}

TEST_F(TestCommand, BoundsAreMetOrBroken) {
    folder_.write(
        in_guests("met", "hello",
                  "bounds = { 'traps.count' = { min = 1, max = 100000 }, 'shadow.fills' = { min = 1 } }") +
        in_guests(
            "broken", "hello",
            "bounds = { 'traps.count' = { max = 1 }, 'shadow.table_pages.high_water' = { min = 4000 } }"));
    const Ended ended = folder_.test();
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_EQ(folder_.results()["met"].value("verdict", ""), "passed");
    const Json broken = folder_.results()["broken"];
    ASSERT_EQ(broken.at("problems").size(), 2U) << broken;
    EXPECT_THAT(broken.at("problems").dump(), MatchesRegex(R"(.*traps.count is [0-9]+, more than 1".*)"));
    EXPECT_THAT(broken.at("problems").dump(),
                MatchesRegex(R"(.*table_pages.high_water is [0-9]+, less than 4000".*)"));
}

TEST_F(TestCommand, AMatrixIsACaseForEachCombination) {
    const std::string engines = interprets_ring0() ? "['shadow']" : "['shadow', 'native']";
    folder_.write("[[case]]\nname = 'm'\nkernel = '" + guest_file("hello") +
                  "'\nconsole.required = ['memory \\d+ KB']\n"
                  "[case.matrix]\nmemory = ['16M', '64M']\ntlb = ['natural', 'stale', 'eager']\n"
                  "[[case]]\nname = 'e'\nkernel = '" +
                  guest_file("hello") + "'\nmatrix.engine = " + engines);
    const Ended ended = folder_.test({"--keep-passed"});
    EXPECT_EQ(ended.exit_code, 0) << ended;
    const auto results = folder_.results();
    EXPECT_EQ(results.size(), interprets_ring0() ? 7U : 8U) << ended;
    for (const char* const memory : {"16M", "64M"}) {
        for (const char* const tlb : {"natural", "stale", "eager"}) {
            const std::string name = std::string("m[memory=") + memory + ",tlb=" + tlb + "]";
            ASSERT_TRUE(results.contains(name)) << name;
            EXPECT_EQ(results.at(name).at("parameters"), (Json{{"memory", memory}, {"tlb", tlb}}));
            EXPECT_THAT(contents_of(results.at(name).at("folder").get<std::string>() + "/console.log"),
                        HasSubstr(memory == std::string("16M") ? ", memory 15999 KB" : ", memory 65151 KB"));
        }
    }
}

TEST_F(TestCommand, UmbraThatIsKilledHasCrashed) {
    folder_.write(a_case("victim", folder_.waiting()) + in_guests("other", "hello"));
    Child child(test_command({"-j2"}), folder_.setup());
    ASSERT_TRUE(folder_.wait_for_guests(child, 1)) << child.end(0s);
    while (folder_.guests().size() != 1) // the other one may still be there
        ASSERT_TRUE(child.run_for(10ms));
    ::kill(folder_.guests().front(), SIGKILL);
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_EQ(folder_.results()["victim"].value("outcome", ""), "crashed");
    EXPECT_EQ(folder_.first_problem("victim"),
              "expected passed, but it ended: crashed: umbra was ended by signal 9 (Killed)");
    EXPECT_EQ(folder_.results()["other"].value("verdict", ""), "passed");
}

/// Where nothing can run, that is told once, and no case is taken for one that was looked at.
TEST_F(TestCommand, AHostThatCannotSaysSoOnce) {
    const auto hide_kvm = [] {
        return ::setenv("UMBRA_HOST", "kvm", 1) == 0 && ::unshare(CLONE_NEWNS) == 0 &&
               ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
               ::mount("/dev/null", "/dev/kvm", nullptr, MS_BIND, nullptr) == 0;
    };
    folder_.write(in_guests("plain", "hello") + in_guests("other", "hello"));
    for (const std::string option : {"--no-trace", "--allow-skips"}) {
        const Ended ended = folder_.test({option}, hide_kvm);
        if (ended.exit_code == Child::not_prepared)
            GTEST_SKIP() << "only root can hide /dev/kvm";
        EXPECT_EQ(ended.exit_code, 4) << ended;
        EXPECT_EQ(ended.out, "");
        EXPECT_THAT(ended.err, testing::StartsWith("umbra: KVM_GET_API_VERSION: "));
        EXPECT_EQ(count(ended.err, "\n"), 1U) << ended;
    }
}

/// A case that wants what this host lacks is skipped, with the reason, in each output.
TEST_F(TestCommand, ACaseThatThisHostCannotRunIsSkipped) {
    // No host has it and has it not.
    folder_.write(in_guests("plain", "hello") + in_guests("wants", "hello", "hosts = ['iopl', '!iopl']"));
    const Ended ended = folder_.test({"--junit=junit.xml", "--tap=tap"});
    EXPECT_EQ(ended.exit_code, 4) << ended;
    EXPECT_THAT(ended.out, HasSubstr(": 1 passed, 0 failed, 1 skipped\n"));
    EXPECT_THAT(ended.out, testing::ContainsRegex("skipped 1: this host is not what the case needs "
                                                  "\\(see umbra probe\\): !?iopl\n"));
    EXPECT_EQ(folder_.results()["wants"].value("verdict", ""), "skipped");
    EXPECT_EQ(count(folder_.read("junit.xml"), "<skipped message="), 1U);
    EXPECT_EQ(count(folder_.read("tap"), " # SKIP "), 1U);
    expect_valid_junit(folder_.file("junit.xml"));
    EXPECT_EQ(folder_.test({"--allow-skips"}).exit_code, 0);
    folder_.write(in_guests("plain", "hello") + in_guests("bad", "hello", "expect = 'failed'"));
    EXPECT_EQ(folder_.test({"--allow-skips"}).exit_code, 1) << "that is for skips only";
}

// --- Manifests and options

TEST_F(TestCommandLine, EachMistakeInAManifestIsToldAndNothingRuns) {
    const std::string kernel = "kernel = 'k'\n";
    const std::vector<std::pair<std::string, std::string>> mistakes{
        {"[[case]\n", ":1:"},
        {"[[case]]\nname = 'a'\n", ":1:1: case.kernel: missing"},
        {"[[case]]\n" + kernel, ":1:1: case.name: missing"},
        {"[defaults]\n" + kernel, ": case: missing"},
        {"[[cases]]\n", ":1:3: cases: unknown key; did you mean 'case'?"},
        {"[[case]]\nname = 'a'\n" + kernel + "memroy = '1G'", ":4:1: case.memroy: unknown key; did you mean"},
        {"[[case]]\nname = 'a'\n" + kernel + "memory = 'much'", ":4:10: case.memory: "},
        {"[[case]]\nname = 'a'\n" + kernel + "cpus = 2", ":4:8: case.cpus: expected 1, not 2"},
        {"[[case]]\nname = 'a'\n" + kernel + "timeout = '5 days'", ":4:11: case.timeout: expected seconds"},
        {"[[case]]\nname = 'a'\n" + kernel + "expect = 'panic'",
         ":4:10: case.expect: expected passed, failed"},
        {"[[case]]\nname = 'a'\n" + kernel + "expect = { outcome = 'reset', code = 1 }",
         ":4:10: case.expect.code: expected only with"},
        {"[[case]]\nname = 'a'\n" + kernel + "console.required = ['a', '(']",
         ":4:26: case.console.required[1]: expected a regular expression"},
        {"[[case]]\nname = 'a'\n" + kernel + "bounds.'traps.conut' = { max = 1 }",
         ":4:24: case.bounds.traps.conut: expected a number of --stats=json"},
        {"[[case]]\nname = 'a'\n" + kernel + "options = ['--serial=none']",
         ":4:12: case.options[0]: expected another option"},
        {"[[case]]\nname = 'a'\n" + kernel + "hosts = ['svm']",
         ":4:10: case.hosts[0]: expected native-ring0"},
        {"[[case]]\nname = 'a'\n" + kernel + "tags = ['a b']", ":4:9: case.tags[0]: expected a tag"},
        {"[[case]]\nname = 'a'\n" + kernel + "conversation = [{ send = 'x' }]",
         ":4:17: case.conversation[0].expect: missing"},
        {"[[case]]\nname = 'a'\n" + kernel + "matrix.memory = []", ":4:17: case.matrix.memory: expected at"},
        {"[[case]]\nname = 'a'\n" + kernel + "engine = 'native'\ntlb = 'eager'",
         ":1:1: case.engine: expected"},
        {"[[case]]\nname = 'a'\n" + kernel + "[[case]]\nname = 'a'\n" + kernel,
         ":5:8: case.name: expected a name of its own, not 'a' as in line 1"},
    };
    folder_.write(in_guests("good", "hello"), "good.toml");
    Arguments files{"good.toml"};
    for (std::size_t i = 0; i < mistakes.size(); ++i) {
        files.push_back("bad" + std::to_string(i) + ".toml");
        std::ofstream(folder_.file(files.back())) << mistakes[i].first;
    }
    const Ended ended = folder_.test(files);
    EXPECT_EQ(ended.exit_code, 2) << ended;
    EXPECT_EQ(ended.out, "") << "nothing is run";
    EXPECT_FALSE(fs::exists(folder_.file("umbra-results")));
    for (std::size_t i = 0; i < mistakes.size(); ++i)
        EXPECT_THAT(ended.err, HasSubstr("bad" + std::to_string(i) + ".toml" + mistakes[i].second));
    EXPECT_THAT(ended.err, Not(HasSubstr("good.toml")));
}

TEST_F(TestCommandLine, WhatCannotBeReadIsTold) {
    fs::create_directory(folder_.file("empty"));
    ASSERT_EQ(::mkfifo(folder_.file("pipe.toml").c_str(), 0600), 0);
    std::ofstream(folder_.file("big.toml")) << std::string((1 << 20) + 1, '#');
    std::ofstream(folder_.file("secret.toml")) << "";
    ASSERT_EQ(::chmod(folder_.file("secret.toml").c_str(), 0), 0);
    const Ended ended = folder_.test({"empty", "none.toml", "none", "pipe.toml", "big.toml", "secret.toml"});
    EXPECT_EQ(ended.exit_code, 2) << ended;
    EXPECT_EQ(ended.out, "");
    for (const char* const line :
         {"empty: no umbra.toml in it or below it\n",
          "none.toml: cannot be read: No such file or directory\n", "none: No such file or directory\n",
          "pipe.toml: cannot be read: not a regular file\n",
          "big.toml: cannot be read: more than 1024 KiB\n"})
        EXPECT_THAT(ended.err, HasSubstr(line));
    if (::geteuid() != 0) {
        EXPECT_THAT(ended.err, HasSubstr("secret.toml: cannot be read: Permission denied\n"));
    }
    EXPECT_THAT(folder_.test().err, HasSubstr("no umbra.toml in it or below it")) << "of the folder here";
}

TEST_F(TestCommandLine, CasesAreListedAndSelected) {
    fs::create_directory(folder_.file("sub"));
    folder_.write(a_case("a", "k", "tags = ['slow', 'net']") + a_case("b", "k", "tags = ['net']") +
                  "[[case]]\nname = 'c'\nkernel = 'k'\nmatrix.tlb = ['stale', 'eager']\n");
    folder_.write(a_case("a", "k"), "sub/umbra.toml");
    const auto listed = [&](Arguments options) {
        options.insert(options.begin(), "--list");
        const Ended ended = folder_.test(options);
        EXPECT_EQ(ended.exit_code, 0) << ended;
        return lines_of(ended.out);
    };
    EXPECT_THAT(listed({}), ElementsAre("sub/a", "a", "b", "c[tlb=stale]", "c[tlb=eager]"));
    EXPECT_THAT(listed({"--filter", "a"}), ElementsAre("sub/a", "a"));
    EXPECT_THAT(listed({"--filter=-a", "--filter=-b"}), ElementsAre("c[tlb=stale]", "c[tlb=eager]"));
    EXPECT_THAT(listed({"--filter", "c*", "--filter=-*eager*"}), ElementsAre("c[tlb=stale]"));
    EXPECT_THAT(listed({"--tag", "net", "--tag=-slow"}), ElementsAre("b"));
    EXPECT_THAT(listed({"sub"}), ElementsAre("sub/a"));

    const Json json = Json::parse(folder_.test({"--list=json", "--tag", "slow"}).out, nullptr, false);
    ASSERT_TRUE(json.is_array() && json.size() == 1) << json;
    EXPECT_EQ(json[0].at("name"), "a");
    EXPECT_EQ(json[0].at("tags"), (Json{"slow", "net"}));
    EXPECT_EQ(json[0].at("manifest"), folder_.file("umbra.toml"));
    EXPECT_EQ(json[0].at("line"), 4);
    EXPECT_EQ(json[0].at("timeout_seconds"), 100.0);

    const Ended none = folder_.test({"--filter", "nobody"});
    EXPECT_EQ(none.exit_code, 2);
    EXPECT_EQ(none.err, "umbra: none of 5 cases is left by --filter=nobody (see umbra test --list)\n");
    EXPECT_FALSE(fs::exists(folder_.file("umbra-results")));
}

TEST_F(TestCommandLine, ShardsShareTheCases) {
    std::string cases;
    for (unsigned i = 0; i < 60; ++i)
        cases += a_case("case " + std::to_string(i), "k");
    folder_.write(cases);
    const auto all = lines_of(folder_.test({"--list"}).out);
    ASSERT_EQ(all.size(), 60U);
    std::vector<std::string> together;
    for (const char* const shard : {"1/3", "2/3", "3/3"}) {
        const auto part = lines_of(folder_.test({"--list", "--shard", shard}).out);
        EXPECT_GT(part.size(), 5U);
        together.insert(together.end(), part.begin(), part.end());
    }
    EXPECT_THAT(together, testing::UnorderedElementsAreArray(all));
    for (const char* const wrong : {"0/3", "4/3", "3", "a/b"})
        EXPECT_EQ(folder_.test({"--list", "--shard", wrong}).exit_code, 2) << wrong;
}

TEST_F(TestCommandLine, AnExampleIsWrittenAndCanBeRead) {
    Ended ended = folder_.test({"--init"});
    EXPECT_EQ(ended.exit_code, 0) << ended;
    ended = folder_.test({"--list"});
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_THAT(ended.out, HasSubstr("boot\n"));
    const std::string example = folder_.read("umbra.toml");
    ended = folder_.test({"--init"});
    EXPECT_EQ(ended.exit_code, 2) << "what is there stays";
    EXPECT_EQ(folder_.read("umbra.toml"), example);
}

TEST_F(TestCommand, BareKernelsShallPass) {
    const Ended ended = folder_.test({guest_file("hello"), guest_file("fail"), "-o", "none"});
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_THAT(ended.out, HasSubstr(": 1 passed, 1 failed, 0 skipped\n"));
    EXPECT_FALSE(fs::exists(folder_.file("umbra-results")));
    EXPECT_EQ(folder_.test({guest_file("hello")}).exit_code, 0);
}

// --- Many

TEST_F(TestCommand, TwoHundredCasesInParallelLoseNothing) {
    std::string cases;
    std::map<std::string, std::string> expected;
    for (unsigned i = 0; i < 200; ++i) {
        const bool fails = i % 5 == 3;
        const std::string name = "case-" + std::to_string(i);
        cases += in_guests(name, fails ? "fail" : "hello", "console.required = ['with 7|hello: passed']");
        expected[name] = fails ? "failed" : "passed";
    }
    folder_.write(cases);
    for (const char* const jobs : {"2", "8"}) {
        if (emulated_host() && jobs == std::string("2"))
            continue; // minutes
        const Ended ended =
            Child(test_command({"-j", jobs, "--no-core", "--junit=junit.xml", "--tap=tap", "--json=events"}),
                  folder_.setup())
                .end(patience * 3);
        EXPECT_EQ(ended.exit_code, 1) << ended;
        EXPECT_THAT(ended.out, HasSubstr(": 160 passed, 40 failed, 0 skipped\n"));
        EXPECT_EQ(count(ended.out, "/200] "), 200U) << "a line each";
        // But for the first line, in which each says when it was begun.
        const auto events = [this](const char* file) {
            const std::string text = folder_.read(file);
            return text.substr(std::min(text.find('\n'), text.size()));
        };
        EXPECT_EQ(events("events"), events("umbra-results/results.jsonl"));
        EXPECT_EQ(of_kind(folder_.events(), "start").size(), 200U);

        std::map<std::string, std::string> json, tap, junit;
        for (const auto& [name, result] : folder_.results()) {
            json[name] = result.at("verdict");
            EXPECT_GT(result.at("console_bytes"), 20) << name;
        }
        EXPECT_EQ(json, expected);
        static const std::regex tap_line("(not )?ok \\d+ - (.*)");
        std::smatch match;
        for (const std::string& line : lines_of(folder_.read("tap")))
            if (std::regex_match(line, match, tap_line))
                tap[match[2]] = match[1].matched ? "failed" : "passed";
        EXPECT_EQ(tap, expected);
        const std::string xml = folder_.read("junit.xml");
        static const std::regex element(
            "<testcase classname=\"umbra\" name=\"([^\"]*)\"[^>]*>\\s*(<failure)?");
        for (auto at = std::sregex_iterator(xml.begin(), xml.end(), element); at != std::sregex_iterator();
             ++at)
            junit[(*at)[1]] = (*at)[2].matched ? "failed" : "passed";
        EXPECT_EQ(junit, expected);
        EXPECT_THAT(xml, HasSubstr("tests=\"200\" failures=\"40\" errors=\"0\""));
        expect_valid_junit(folder_.file("junit.xml"));
        for (const auto& [name, verdict] : expected)
            EXPECT_EQ(fs::exists(folder_.file("umbra-results/" + name + "/console.log")), verdict == "failed")
                << name;
        EXPECT_THAT(folder_.guests(), IsEmpty());
    }
}

TEST_F(TestCommand, FlakyCasesAreToldWithTheirRates) {
    const std::string flaky = folder_.kernel("flaky", toss);
    folder_.write(a_case("flaky", flaky) + in_guests("bad", "fail") + in_guests("good", "hello"));
    const Ended ended = folder_.test({"--repeat=40", "--no-core"});
    EXPECT_EQ(ended.exit_code, 1) << ended;
    unsigned failed = 0;
    for (const Json& event : of_kind(folder_.events(), "end"))
        failed += event.at("name") == "flaky" && event.at("verdict") == "failed" ? 1 : 0;
    EXPECT_GT(failed, 0U);
    EXPECT_LT(failed, 40U);
    EXPECT_THAT(ended.out, HasSubstr("\nflaky  flaky: expected passed, but it ended: failed with code 1"));
    EXPECT_THAT(ended.out, HasSubstr("        " + std::to_string(failed) + " of 40 runs failed ("));
    EXPECT_THAT(ended.out, HasSubstr("\nfailed bad: "));
    EXPECT_THAT(ended.out, HasSubstr("        40 of 40 runs failed (100 %)\n"));
    EXPECT_THAT(ended.out, HasSubstr(std::to_string(80 - failed) + " passed, " + std::to_string(40 + failed) +
                                     " failed, 0 skipped\n"));
}

TEST_F(TestCommand, UntilFailureEndsWithOne) {
    const std::string flaky = folder_.kernel("flaky", toss);
    folder_.write(a_case("flaky", flaky) + in_guests("good", "hello"));
    const Ended ended = folder_.test({"--until-failure", "--tap=tap"});
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_THAT(ended.out, HasSubstr(" 1 failed, 0 skipped\n"));
    const auto ends = of_kind(folder_.events(), "end");
    EXPECT_EQ(ends.size() % 2, 0U) << "the round is brought to its end";
    for (std::size_t i = 0; i + 2 < ends.size(); ++i)
        EXPECT_EQ(ends[i].at("verdict"), "passed");
    EXPECT_THAT(folder_.read("tap"), EndsWith("1.." + std::to_string(ends.size()) + "\n"));
}

TEST_F(TestCommand, FailFastStartsNothingMore) {
    folder_.write(in_guests("a", "hello") + in_guests("b", "fail") + in_guests("c", "hello") +
                  in_guests("d", "hello"));
    const Ended ended = folder_.test({"-j1", "--fail-fast", "--junit=junit.xml"});
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_THAT(ended.out, HasSubstr(": 1 passed, 1 failed, 0 skipped, 2 not run\n"));
    EXPECT_EQ(of_kind(folder_.events(), "start").size(), 2U);
    EXPECT_EQ(folder_.results()["d"].value("verdict", ""), "not-run");
    EXPECT_EQ(folder_.first_problem("d"), "another case failed before its turn came");
    EXPECT_EQ(count(folder_.read("junit.xml"), "<skipped message="), 2U);
    expect_valid_junit(folder_.file("junit.xml"));
}

TEST_F(TestCommand, ASeedIsAnOrder) {
    std::string cases;
    for (unsigned i = 0; i < 12; ++i)
        cases += in_guests(std::to_string(i), "hello");
    folder_.write(cases);
    const auto order = [&](const std::string& seed) {
        const Ended ended = folder_.test({"-j1", "--shuffle", seed});
        EXPECT_EQ(ended.exit_code, 0) << ended;
        std::vector<std::string> names;
        for (const Json& event : of_kind(folder_.events(), "start"))
            names.push_back(event.at("name"));
        EXPECT_EQ(names.size(), 12U);
        return std::pair(names, lines_of(ended.out).at(0));
    };
    const auto [first, told] = order("1");
    EXPECT_EQ(told, "in the order of --shuffle=1");
    EXPECT_EQ(order("1").first, first);
    EXPECT_NE(order("2").first, first);
    const auto [random, its_seed] = order("random");
    EXPECT_EQ(order(its_seed.substr(its_seed.find('=') + 1)).first, random) << its_seed;
}

// --- When the runner is ended

TEST_F(TestCommand, NoGuestOutlivesAKilledRunner) {
    const std::string waiting = folder_.waiting();
    folder_.write(a_case("a", waiting) + a_case("b", waiting) + a_case("c", waiting));
    Child child(test_command({"-j3"}), folder_.setup());
    ASSERT_TRUE(folder_.wait_for_guests(child, 3)) << child.end(0s);
    child.send_signal(SIGKILL);
    EXPECT_TRUE(folder_.wait_for_none(emulated_host() ? 10s : 1s));
    EXPECT_EQ(child.end().signal, SIGKILL);
}

/// All is told of a run that was interrupted: one case passed, two ran, one was not begun.
void expect_interrupted(const Ended& ended, const ManifestFolder& folder) {
    EXPECT_EQ(ended.exit_code, 130) << ended;
    EXPECT_THAT(ended.out, HasSubstr("interrupted: 1 in "));
    EXPECT_THAT(ended.out, HasSubstr(": 1 passed, 0 failed, 0 skipped, 3 not run"));
    const auto results = folder.results();
    ASSERT_EQ(results.size(), 4U);
    EXPECT_EQ(results.at("a").at("verdict"), "passed");
    for (const char* const name : {"b", "c", "d"})
        EXPECT_EQ(results.at(name).at("verdict"), "not-run");
    EXPECT_EQ(folder.first_problem("b"), "interrupted while it ran");
    EXPECT_EQ(folder.first_problem("d"), "interrupted before its turn came");
    EXPECT_EQ(folder.events().back().value("interrupted", false), true);
    const std::string junit = folder.read("junit.xml");
    for (const char* const name : {"a", "b", "c", "d"})
        EXPECT_THAT(junit, HasSubstr(std::string("<testcase classname=\"umbra\" name=\"") + name + "\""));
    EXPECT_THAT(junit, HasSubstr("tests=\"4\" failures=\"0\" errors=\"3\""));
    EXPECT_THAT(junit, EndsWith("</testsuites>\n"));
    expect_valid_junit(folder.file("junit.xml"));
    EXPECT_THAT(folder.read("tap"), EndsWith("Bail out! interrupted\n"));
    EXPECT_THAT(folder.guests(), IsEmpty());
}

/// Ends the tests of expect_interrupted() in the midst of them.
void interrupt(const ManifestFolder& folder, const Child::Setup& setup,
               const std::function<void(Child&)>& signal) {
    fs::remove_all(folder.file("umbra-results"));
    const std::string waiting = folder.waiting();
    folder.write(in_guests("a", "hello") + a_case("b", waiting) + a_case("c", waiting) +
                 in_guests("d", "hello"));
    Child child(test_command({"-j2", "--junit=junit.xml", "--tap=tap"}), setup);
    const auto deadline = Clock::now() + patience;
    while (count(folder.read("umbra-results/results.jsonl"), "\"start\"") < 3) {
        ASSERT_TRUE(child.run_for(10ms)) << child.end();
        ASSERT_LT(Clock::now(), deadline) << child.end(0s);
    }
    child.run_for(100ms);
    signal(child);
    expect_interrupted(child.end(), folder);
}

TEST_F(TestCommand, SignalsEndInWholeResults) {
    for (const int signal : {SIGINT, SIGTERM, SIGHUP})
        interrupt(folder_, folder_.setup(), [signal](Child& child) { child.send_signal(signal); });
}

TEST_F(TestCommand, CtrlCEndsInWholeResults) {
    interrupt(folder_, folder_.setup([] { return true; }, Child::Input::terminal),
              [](Child& child) { ASSERT_TRUE(child.type("\x03")); });
}

TEST_F(TestCommand, ASecondSignalIsLessPatient) {
    folder_.write(a_case("a", folder_.waiting()));
    // How long it takes from the first signal on, with a guest that does not listen.
    const auto interrupted = [&](bool twice) {
        Child child(test_command({}), folder_.setup());
        EXPECT_TRUE(folder_.wait_for_guests(child, 1)) << child.end(0s);
        for (const pid_t guest : folder_.guests())
            ::kill(guest, SIGSTOP);
        const auto begun = Clock::now();
        child.send_signal(SIGINT);
        EXPECT_TRUE(child.run_for(300ms)) << "it waits for the guest";
        if (twice)
            child.send_signal(SIGINT);
        EXPECT_EQ(child.end().exit_code, 130);
        return Clock::now() - begun;
    };
    EXPECT_GT(interrupted(false), 2s);
    auto soonest = interrupted(true);
    for (unsigned others = 2; soonest > 2s && others > 0; --others) // a busy host may have slept
        soonest = interrupted(true);
    EXPECT_LT(soonest, 2s);
}

// --- Where results cannot be written

TEST_F(TestCommand, AFullDiskIsToldWithTheVerdicts) {
    folder_.write(in_guests("a", "hello") + in_guests("b", "hello"));
    const Ended good = folder_.test({"--json=/dev/full", "-o", "none"});
    EXPECT_EQ(good.exit_code, 1) << good;
    EXPECT_EQ(good.err, "umbra: cannot write '/dev/full': No space left on device\n");
    EXPECT_THAT(good.out, HasSubstr(": 2 passed, 0 failed, 0 skipped\n"));
    for (const char* const output : {"--tap=/dev/full", "--junit=/dev/full"}) {
        const Ended ended = folder_.test({output, "-o", "none"});
        EXPECT_EQ(ended.exit_code, 1) << ended;
        EXPECT_EQ(ended.err, good.err);
    }
    folder_.write(in_guests("a", "hello") + in_guests("b", "fail"));
    const Ended bad = folder_.test({"--junit=/dev/full", "-o", "none"});
    EXPECT_EQ(bad.exit_code, 1) << bad;
    EXPECT_EQ(bad.err, good.err);
}

TEST_F(TestCommandLine, ALimitOfFilesSizesIsToldWithTheVerdicts) {
    folder_.write(a_case("a", folder_.file("none"))); // a guest's own memory may be such a file
    const Ended ended = folder_.test({"--repeat=20", "--json=events", "-o", "none"}, [] {
        const rlimit limit{4096, 4096};
        return ::setrlimit(RLIMIT_FSIZE, &limit) == 0;
    });
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_EQ(ended.err, "umbra: cannot write 'events': File too large\n");
    EXPECT_THAT(ended.out, HasSubstr(": 0 passed, 20 failed, 0 skipped\n"));
}

/// Makes a file system of a few kilobytes at `folder`, in a world of the child's own.
std::function<bool()> tiny_disk(const std::string& folder, const std::string& options) {
    return [=] {
        return ::unshare(CLONE_NEWNS) == 0 &&
               ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
               ::mount("tmpfs", folder.c_str(), "tmpfs", 0, options.c_str()) == 0;
    };
}

TEST_F(TestCommand, AFolderOnAFullDiskIsToldWithTheVerdicts) {
    const std::string disk = folder_.file("disk");
    fs::create_directory(disk);
    folder_.write(in_guests("good", "hello"));
    const Ended passed =
        folder_.test({"-o", "disk/out", "--keep-passed", "--repeat=30"}, tiny_disk(disk, "size=64k"));
    if (passed.exit_code == Child::not_prepared)
        GTEST_SKIP() << "only root can mount a disk";
    EXPECT_EQ(passed.exit_code, 1) << "what should be kept is not: " << passed;
    EXPECT_EQ(count(passed.out, "No space left on device\n"), 1U) << "told once: " << passed;
    EXPECT_THAT(passed.out, HasSubstr(": 30 passed, 0 failed, 0 skipped\n"));

    folder_.write(in_guests("bad", "fail"));
    const Ended failed = folder_.test({"-o", "disk/out", "--junit=disk/junit"}, tiny_disk(disk, "size=4k"));
    EXPECT_EQ(failed.exit_code, 1) << failed;
    EXPECT_THAT(failed.out, HasSubstr("umbra: cannot write '" + disk + "/out/bad/"));
    EXPECT_THAT(failed.out, HasSubstr(": 0 passed, 1 failed, 0 skipped\n"));
    EXPECT_THAT(failed.err, HasSubstr("umbra: cannot write 'disk/junit': No space left on device\n"));

    const Ended coreless = folder_.test({"-o", "disk/out"}, tiny_disk(disk, "size=64k"));
    EXPECT_EQ(coreless.exit_code, 1);
    EXPECT_THAT(coreless.out, HasSubstr("umbra: no core was written to '" + disk +
                                        "/out/bad/core': No space left on device\n"));
}

TEST_F(TestCommand, AFolderThatCannotBeWrittenIsToldAtOnce) {
    folder_.write(in_guests("a", "hello"));
    Ended ended = folder_.test({"-o", "umbra.toml"});
    EXPECT_EQ(ended.exit_code, 2) << ended;
    EXPECT_EQ(ended.out, "") << "nothing is run";
    EXPECT_EQ(ended.err, "umbra: cannot make the folder 'umbra.toml' for the results: Not a directory "
                         "(--output names another, or none)\n");
    for (const char* const output : {"--junit=none/x", "--tap=none/x", "--json=none/x"}) {
        ended = folder_.test({output});
        EXPECT_EQ(ended.exit_code, 2) << ended;
        EXPECT_EQ(ended.out, "");
        EXPECT_EQ(ended.err, "umbra: cannot write 'none/x': No such file or directory\n");
    }
    const std::string disk = folder_.file("disk");
    fs::create_directory(disk);
    ended = folder_.test({"-o", "disk"}, [&] {
        return tiny_disk(disk, "size=64k")() &&
               ::mount(nullptr, disk.c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr) == 0;
    });
    if (ended.exit_code == Child::not_prepared)
        GTEST_SKIP() << "only root can mount a disk";
    EXPECT_EQ(ended.exit_code, 2) << ended;
    EXPECT_EQ(ended.err, "umbra: cannot write 'disk/results.jsonl': Read-only file system\n");
    EXPECT_EQ(ended.out, "");
}

// --- What is kept of a case

TEST_F(TestCommand, AFailedCaseLeavesWhatIsNeededToFindOut) {
    folder_.write(in_guests("triple", "triple") + in_guests("good", "hello"));
    ASSERT_EQ(folder_.test().exit_code, 1);
    EXPECT_FALSE(fs::exists(folder_.file("umbra-results/good")));
    const std::string kept = "umbra-results/triple/";
    EXPECT_EQ(folder_.read(kept + "console.log"), "triple: faulting without an IDT\n");
    const std::string errors = folder_.read(kept + "stderr.log");
    EXPECT_THAT(errors, StartsWith("umbra: triple fault: "));
    EXPECT_THAT(errors, HasSubstr("\nGuest report: triple fault: "));
    const std::string trace = folder_.read(kept + "trace.log");
    EXPECT_THAT(trace, StartsWith("# umbra trace"));
    EXPECT_THAT(trace, HasSubstr(" instruction=lidt "));
    EXPECT_THAT(folder_.read(kept + "core"), StartsWith("\x7f"
                                                        "ELF"));
    const Json result = Json::parse(folder_.read(kept + "result.json"), nullptr, false);
    ASSERT_TRUE(result.is_object());
    EXPECT_EQ(result.at("name"), "triple");
    EXPECT_EQ(result.at("outcome"), "triple-fault");
    EXPECT_EQ(result.at("folder"), folder_.file("umbra-results/triple"));
    EXPECT_GT(result.at("stats").at("traps").at("count"), 0);

    // From any folder: the scripts know theirs.
    const Ended again = Child({folder_.file(kept + "rerun.sh")}).end();
    EXPECT_EQ(again.exit_code, 3) << again;
    EXPECT_EQ(again.out, "triple: faulting without an IDT\n");
    EXPECT_THAT(again.err, HasSubstr("\nGuest report: triple fault: "));
    EXPECT_THAT(Child({folder_.file(kept + "rerun.sh"), "--stats=json"}).end().err, HasSubstr("\"traps\":"));

    // What a run before left of the same case goes.
    folder_.write(in_guests("triple", "hello") + in_guests("good", "hello"));
    ASSERT_EQ(folder_.test().exit_code, 0);
    EXPECT_FALSE(fs::exists(folder_.file("umbra-results/triple")));
    ASSERT_EQ(folder_.test({"--keep-passed", "--no-trace", "--no-core"}).exit_code, 0);
    EXPECT_TRUE(fs::exists(folder_.file("umbra-results/good/console.log")));
    EXPECT_FALSE(fs::exists(folder_.file("umbra-results/good/trace.log")));
}

TEST_F(TestCommand, RerunPassesOnlyIfTheCaseDoes) {
    const std::string kernel = folder_.kernel("kernel", text("no\n") + exit(0));
    folder_.write(a_case("pattern", kernel, "console.required = ['yes']") +
                  a_case("bound", kernel, "bounds.'traps.count' = { max = 1 }") +
                  a_case("code", kernel, "expect = 'failed'") +
                  a_case("talk", kernel, "conversation = [{ expect = 'yes', send = 'x' }]"));
    ASSERT_EQ(folder_.test().exit_code, 1);
    const auto rerun = [&](const std::string& name) {
        return Child({folder_.file("umbra-results/" + name + "/rerun.sh")}).end();
    };
    const std::string results = folder_.read("umbra-results/results.jsonl");
    for (const char* const name : {"pattern", "bound", "code", "talk"}) {
        const Ended ended = rerun(name);
        EXPECT_EQ(ended.exit_code, 1) << name << ": " << ended;
        EXPECT_THAT(ended.out, HasSubstr("        | no\n")) << "the console is shown";
    }
    EXPECT_EQ(folder_.read("umbra-results/results.jsonl"), results) << "the report stays whole";
    (void)folder_.kernel("kernel", text("yes\n") + exit(0));
    EXPECT_EQ(rerun("pattern").exit_code, 0);
    EXPECT_EQ(rerun("bound").exit_code, 1);
}

TEST_F(TestCommand, AFailedCaseIsOpenedInGdb) {
    const std::string gdb = program_file("gdb");
    if (gdb.empty())
        UMBRA_MISSING("gdb is not installed");
    folder_.write(in_guests("triple", "triple"));
    ASSERT_EQ(folder_.test().exit_code, 1);
    const std::string kept = folder_.file("umbra-results/triple/");
    Child debug(
        {kept + "debug.sh", "--command", "info symbol $rip", "--command", "kill", "--command", "quit"});
    const Ended& ended = debug.end();
    EXPECT_THAT(ended.out, HasSubstr("\n_start in section")) << "before its first instruction: " << ended;
    const Ended core = Child({gdb, "-q", "-nx", "-batch", "-ex", "info symbol $rip", "-ex", "x/i $rip",
                              guest_file("triple"), kept + "core"})
                           .end();
    EXPECT_THAT(core.out, HasSubstr("kernel_main + ")) << core;
    EXPECT_THAT(core.out, HasSubstr("ud2")) << core;
}

// --- What is told

TEST_F(TestCommand, ALogHasPlainLines) {
    folder_.write(in_guests("a", "hello") + in_guests("b", "fail"));
    const Ended ended = folder_.test({"-j1"});
    EXPECT_EQ(ended.out.find_first_of("\r\x1b"), std::string::npos) << ended;
    EXPECT_THAT(lines_of(ended.out),
                ElementsAre(MatchesRegex(R"(\[1/2\] passed  a \(.* s\))"),
                            MatchesRegex(R"(\[2/2\] failed  b \(.* s\): expected passed, but it ended: .*)"),
                            StartsWith("failed b: expected passed, but it ended: failed with code 7"),
                            "        | fail: exiting with 7", "        in " + folder_.file("umbra-results/b"),
                            MatchesRegex("2 in .* s: 1 passed, 1 failed, 0 skipped")));
}

TEST_F(TestCommand, ATerminalHasOneLiveLine) {
    folder_.write(in_guests("a", "hello") + a_case("b", folder_.waiting(), "timeout = 2") +
                  in_guests("c", "hello"));
    Child child(test_command({"-j1"}), folder_.setup([] { return true; }, Child::Input::terminal));
    const Ended& ended = child.end();
    EXPECT_EQ(ended.exit_code, 1) << ended;
    static const std::regex drawn("\r\x1b\\[\\?7l\\[1/3\\][^\r\n]*: b[^\r\n]*\x1b\\[K\x1b\\[\\?7h\r");
    EXPECT_TRUE(std::regex_search(ended.out, drawn)) << "in place: " << ended;
    EXPECT_THAT(ended.out, HasSubstr(" s left: b (1 s)"));
    EXPECT_THAT(ended.out, HasSubstr("\r\x1b[K[2/3] failed  b (")) << "above it, what did not pass";
    const auto lines = lines_of(ended.out);
    EXPECT_EQ(lines.size(), 5U) << "and nothing else: " << ended;
    EXPECT_THAT(lines.back(), MatchesRegex("3 in .* s: 2 passed, 1 failed, 0 skipped\r"));
}

TEST_F(TestCommand, ResultsOnStandardOutputAreAlone) {
    folder_.write(in_guests("a", "hello") + in_guests("b", "fail"));
    const Ended tap = folder_.test({"--tap=-"});
    EXPECT_THAT(tap.out, StartsWith("TAP version 14\n1..2\n"));
    EXPECT_THAT(tap.err, HasSubstr(": 1 passed, 1 failed, 0 skipped\n"));
    const Ended json = folder_.test({"--json=-"});
    EXPECT_EQ(of_kind(events_in(json.out), "end").size(), 2U);
    const Ended junit = folder_.test({"--junit=-"});
    EXPECT_THAT(junit.out, StartsWith("<?xml "));
    EXPECT_THAT(junit.out, EndsWith("</testsuites>\n"));
    EXPECT_EQ(folder_.test({"--json=-", "--tap=-"}).exit_code, 2);
}

TEST_F(TestCommand, GitHubGetsAnAnnotationForEachFailure) {
    folder_.write(in_guests("a", "hello") + in_guests("b", "fail"));
    const Ended ended = folder_.test({"--github"}, [here = folder_.file("")] {
        return ::setenv("GITHUB_WORKSPACE", here.c_str(), 1) == 0;
    });
    EXPECT_THAT(ended.out, HasSubstr("\n::error file=umbra.toml,line=8,title=b::expected passed, but it "
                                     "ended: failed with code 7 (0x7)\n"));
    EXPECT_EQ(count(ended.out, "::error"), 1U) << ended;
}

TEST_F(TestCommand, AReportIsOnePage) {
    folder_.write(in_guests("good one", "hello") + in_guests("bad one", "fail") +
                  in_guests("worse one", "triple", "console.forbidden = ['faulting']"));
    ASSERT_EQ(folder_.test().exit_code, 1);
    const Ended ended = Child(umbra_command({"report"}), folder_.setup()).end();
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(ended.out, "umbra-results/report.html\n");
    const std::string page = folder_.read("umbra-results/report.html");
    for (const char* const name : {"good one", "bad one", "worse one", "faulting without an IDT"})
        EXPECT_THAT(page, HasSubstr(name));
    for (const char* const other_file : {"src=", "<link", "@import", "url("})
        EXPECT_THAT(page, Not(HasSubstr(other_file)));
    const Ended none = Child(umbra_command({"report", "none"}), folder_.setup()).end();
    EXPECT_EQ(none.exit_code, 2) << none;
    EXPECT_THAT(none.err, StartsWith("umbra: "));
}

TEST_F(TestCommand, ABrowserShowsTheReport) {
    const fs::path script = fs::path(UMBRA_SCRIPTS) / "check-report";
    if (!fs::exists(script))
        GTEST_SKIP() << "the project's scripts are not on this machine";
    if (emulated_host())
        GTEST_SKIP() << "the page is that of every host; browsers have not been tried on an emulated one";
    folder_.write(in_guests("good", "hello") + in_guests("bad", "triple"));
    ASSERT_EQ(folder_.test().exit_code, 1);
    ASSERT_EQ(Child(umbra_command({"report"}), folder_.setup()).end().exit_code, 0);
    const Ended ended = Child({script, "umbra-results/report.html", "screenshot.png"}, folder_.setup()).end();
    if (ended.exit_code == 77)
        GTEST_SKIP() << ended.out << ended.err;
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_GT(fs::file_size(folder_.file("screenshot.png")), 10'000U);
}

} // namespace
} // namespace umbra
