// The runner of `umbra test`, as far as it needs no processes: verdicts, patterns, and how a case is run by
// hand.
#include "launcher/test/console_watch.hpp"
#include "launcher/test/judge.hpp"
#include "launcher/test/text.hpp"
#include "vmm/error.hpp"

#include <chrono>
#include <csignal>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using EndedFor = RunFacts::EndedFor;

// --- The verdict

std::string run_result(const std::string& verdict, const std::string& code = "null",
                       const std::string& stats = "null") {
    return R"({"verdict":")" + verdict + R"(","code":)" + code + R"(,"reason":")" + verdict +
           R"( it is","exit_code":0,"stats":)" + stats + "}\n";
}

RunFacts ended(const std::string& verdict, const std::string& code = "null",
               const std::string& stats = "null") {
    RunFacts facts;
    facts.exit_code = 0;
    facts.result = run_result(verdict, code, stats);
    return facts;
}

CaseResult judged(const TestCase& test, const RunFacts& facts, bool host_fits = false) {
    CaseResult result;
    result.test = test;
    result.console_bytes = 1;
    judge(facts, host_fits, result);
    return result;
}

TEST(Judge, AKernelThatPassesHasPassed) {
    const CaseResult result = judged({}, ended("passed", "0"));
    EXPECT_EQ(result.verdict, CaseVerdict::passed);
    EXPECT_EQ(result.outcome, Outcome::passed);
    EXPECT_EQ(result.code, 0U);
    EXPECT_THAT(result.problems, IsEmpty());
}

TEST(Judge, EachOutcomeIsToldFromEachOther) {
    const std::vector<std::pair<const char*, Outcome>> outcomes{{"passed", Outcome::passed},
                                                                {"failed", Outcome::failed},
                                                                {"triple-fault", Outcome::triple_fault},
                                                                {"reset", Outcome::reset},
                                                                {"stopped", Outcome::stopped},
                                                                {"timed-out", Outcome::timed_out},
                                                                {"bad-usage", Outcome::bad_usage},
                                                                {"host-failed", Outcome::crashed}};
    for (const auto& [word, outcome] : outcomes) {
        for (const auto& [other_word, expected] : outcomes) {
            TestCase test;
            test.expected = expected;
            const CaseResult result = judged(test, ended(word));
            EXPECT_EQ(result.outcome, outcome);
            EXPECT_EQ(result.verdict, outcome == expected ? CaseVerdict::passed : CaseVerdict::failed)
                << word << ", expected " << other_word;
            EXPECT_EQ(result.problems.empty(), outcome == expected);
        }
    }
}

TEST(Judge, TheGuestsCodeCounts) {
    TestCase test;
    test.expected = Outcome::failed;
    EXPECT_EQ(judged(test, ended("failed", "8")).verdict, CaseVerdict::passed);
    test.code = 7;
    EXPECT_EQ(judged(test, ended("failed", "7")).verdict, CaseVerdict::passed);
    EXPECT_THAT(judged(test, ended("failed", "8")).problems,
                ElementsAre("expected failed with code 7, but it ended: failed it is"));
    EXPECT_EQ(judged(test, ended("failed")).verdict, CaseVerdict::failed) << "umbra's check, not the guest";
}

TEST(Judge, AKernelThatPrintsAllAndHangsHasNotPassed) {
    TestCase test;
    test.required = {"PASS"};
    RunFacts facts = ended("timed-out");
    facts.required_found = 1;
    const CaseResult result = judged(test, facts);
    EXPECT_EQ(result.verdict, CaseVerdict::failed);
    EXPECT_THAT(result.problems,
                ElementsAre("expected passed, but it ended: timed out: timed-out it is; it had "
                            "printed all that is required, and did not end"));
}

TEST(Judge, EveryUnmetExpectationIsALine) {
    TestCase test;
    test.required = {"one", "two", "three"};
    test.conversation = {{"login", "root\n"}, {"#", ""}};
    test.bounds = {
        {"traps.count", 20, {}}, {"traps.count", {}, 5}, {"traps.count", 10, 10}, {"traps.no", 1, 1}};
    RunFacts facts = ended("reset", "null", R"({"traps":{"count":10}})");
    facts.required_found = 1;
    facts.exchanges_met = 1;
    EXPECT_THAT(judged(test, facts).problems,
                ElementsAre("expected passed, but it ended: reset it is",
                            "the console does not show 'two' after 'one' (1 of 3 required patterns found)",
                            "the conversation waits for '#' in step 2 of 2",
                            "traps.count is 10, less than 20", "traps.count is 10, more than 5",
                            "traps.no is bounded, but this run has no such number"));
}

TEST(Judge, WhatWasNotSentIsMissed) {
    TestCase test;
    test.conversation = {{"login", "root\n"}};
    RunFacts facts = ended("passed", "0");
    facts.exchanges_met = 1;
    EXPECT_EQ(judged(test, facts).verdict, CaseVerdict::passed);
    facts.all_sent = false;
    EXPECT_EQ(judged(test, facts).verdict, CaseVerdict::failed);
}

TEST(Judge, AForbiddenPatternFailsAlsoAGuestThatPasses) {
    RunFacts facts = ended("passed", "0");
    facts.forbidden = {"BUG:", 12, "BUG: here"};
    CaseResult result = judged({}, facts);
    EXPECT_EQ(result.verdict, CaseVerdict::failed);
    EXPECT_EQ(result.outcome, Outcome::passed);
    EXPECT_EQ(result.culprit, 12U);
    EXPECT_THAT(result.problems,
                ElementsAre("line 12 of the console shows 'BUG:', which is forbidden: BUG: here"));

    facts.ended_for = EndedFor::forbidden_pattern;
    facts.result = run_result("interrupted");
    result = judged({}, facts);
    EXPECT_EQ(result.verdict, CaseVerdict::failed);
    EXPECT_EQ(result.outcome, std::nullopt) << "it was not left to end";
    EXPECT_EQ(result.problems.size(), 1U);
}

TEST(Judge, AHostThatCannotIsASkip) {
    const CaseResult result = judged({}, ended("host-cannot"));
    EXPECT_EQ(result.verdict, CaseVerdict::skipped);
    EXPECT_THAT(result.problems, ElementsAre("host-cannot it is"));
    EXPECT_EQ(judged({}, ended("host-cannot"), true).verdict, CaseVerdict::failed)
        << "the case says that this host can";
    TestCase test;
    test.expected = Outcome::host_cannot;
    EXPECT_EQ(judged(test, ended("host-cannot")).verdict, CaseVerdict::passed);
}

TEST(Judge, WithoutAResultTheExitTells) {
    RunFacts facts;
    facts.exit_code = 2;
    facts.errors = "something\numbra: --nix is no option\n";
    EXPECT_EQ(judged({}, facts).outcome, Outcome::bad_usage);
    EXPECT_EQ(judged({}, facts).reason, "--nix is no option");
    facts.exit_code = 4;
    EXPECT_EQ(judged({}, facts).verdict, CaseVerdict::skipped);
    for (const int code : {0, 1, 3, 124, 127, 130}) { // nothing that could pass for the guest's word
        facts.exit_code = code;
        EXPECT_EQ(judged({}, facts).outcome, Outcome::crashed) << code;
        EXPECT_EQ(judged({}, facts).verdict, CaseVerdict::failed) << code;
    }
    facts.result = R"({"verdict":"passed","code")"; // cut off
    EXPECT_EQ(judged({}, facts).outcome, Outcome::crashed);
    facts.exit_code = -1;
    facts.signal = SIGSEGV;
    EXPECT_THAT(judged({}, facts).problems.at(0), HasSubstr("signal 11"));
}

TEST(Judge, WhatTheRunnerEndedIsNoVerdictOfTheGuest) {
    TestCase test;
    test.expected = Outcome::timed_out;
    RunFacts facts;
    facts.signal = SIGKILL;
    facts.ended_for = EndedFor::overrun;
    CaseResult result = judged(test, facts);
    EXPECT_EQ(result.verdict, CaseVerdict::failed);
    EXPECT_EQ(result.outcome, Outcome::crashed);

    facts.ended_for = EndedFor::interrupt;
    result = judged(test, facts);
    EXPECT_EQ(result.verdict, CaseVerdict::not_run);
    EXPECT_EQ(result.outcome, std::nullopt);
    EXPECT_THAT(result.problems, ElementsAre("interrupted while it ran"));

    facts.result = run_result("timed-out"); // it was faster
    EXPECT_EQ(judged(test, facts).verdict, CaseVerdict::passed);
}

TEST(Judge, AnInterruptByOthersIsNoPass) {
    RunFacts facts = ended("interrupted");
    facts.exit_code = 130;
    EXPECT_EQ(judged({}, facts).verdict, CaseVerdict::failed);
    EXPECT_EQ(judged({}, facts).outcome, Outcome::crashed);
}

TEST(ResultJson, IsOneLineWhateverIsInIt) {
    CaseResult result = judged({}, ended("failed", "7", R"({"traps":{"count":3}})"));
    result.test.name = "a\nb\xff";
    const std::string text = result_json(result);
    EXPECT_EQ(text.find('\n'), std::string::npos);
    const auto json = nlohmann::json::parse(text);
    EXPECT_EQ(json["name"], "a\nb\xef\xbf\xbd");
    EXPECT_EQ(json["verdict"], "failed");
    EXPECT_EQ(json["code"], 7);
    EXPECT_EQ(json["stats"]["traps"]["count"], 3);
    EXPECT_TRUE(json["manifest"].is_null());
    EXPECT_EQ(json["problems"].size(), 1U);
}

// --- The console

TEST(ConsoleWatch, RequiredPatternsComeInTheirOrder) {
    TestCase test;
    test.required = {"one", "two", "^three$"};
    ConsoleWatch watch(test);
    (void)watch.add("two one two three\r\nth");
    EXPECT_EQ(watch.required_found(), 2U);
    (void)watch.add("ree");
    EXPECT_EQ(watch.required_found(), 2U) << "the line has not ended";
    watch.finish();
    EXPECT_EQ(watch.required_found(), 3U);
}

TEST(ConsoleWatch, ALineEndsWithAllItsCarriageReturns) {
    for (const char* const text : {"ready\n", "ready\r\n", "ready\r\r\n", "ready\r\r\r\n", "ready\r\r"}) {
        TestCase test;
        test.required = {"^ready$"};
        test.conversation = {{"^ready$", ""}};
        ConsoleWatch watch(test);
        for (const char c : "\r\n" + std::string(text))
            (void)watch.add({&c, 1});
        watch.finish();
        EXPECT_EQ(watch.required_found(), 1U) << text;
        EXPECT_EQ(watch.exchanges_met(), 1U) << text;
        EXPECT_FALSE(watch.required_near_miss()) << text;
    }
}

TEST(ConsoleWatch, TellsOfLinesThatOnlyLookAsIfTheyMatched) {
    for (const char* const text : {"\x1b[32mready\x1b[0m", "ready ", "rea\rdy",
                                   "re\xe2\x80\x8b"
                                   "ady",
                                   "\x07ready"}) {
        TestCase test;
        test.required = {"begin", "^ready$", "end"};
        test.conversation = {{"^ready$", ""}};
        ConsoleWatch watch(test);
        (void)watch.add("begin\nnot ready\n" + std::string(text) + "\n!\n");
        watch.finish();
        EXPECT_EQ(watch.required_found(), 1U) << text;
        ASSERT_TRUE(watch.required_near_miss()) << text;
        EXPECT_EQ(watch.required_near_miss()->line, 3U);
        EXPECT_EQ(watch.required_near_miss()->text, text);
        EXPECT_TRUE(watch.exchange_near_miss() || watch.exchanges_met() == 1) << text;
        (void)watch.add("ready\n");
        EXPECT_EQ(watch.required_found(), 2U);
        EXPECT_FALSE(watch.required_near_miss()) << "it was found after all";
        EXPECT_FALSE(watch.exchange_near_miss());
    }
}

TEST(Text, VisibleAndEscapedAreOfOneLine) {
    EXPECT_EQ(visible("a\tb \x1b[1;31mc\x7f\r \t"), "a\tb c");
    EXPECT_EQ(visible("\xff\xc3\xa4\xef\xbb\xbf"), "\xff\xc3\xa4");
    EXPECT_EQ(visible(" \r"), "");
    EXPECT_EQ(with_escapes("a\tb\r \x1b[1mc\x7f\"\\ "), R"("a\tb\r \x1b[1mc\x7f\"\\ ")");
    EXPECT_EQ(with_escapes("\xff\xc3\xa4\xef\xbb\xbf"), "\"\\xff\xc3\xa4\\ufeff\"");
}

TEST(Judge, ANearMissShowsWhatCannotBeSeen) {
    TestCase test;
    test.required = {"^ready$"};
    test.conversation = {{"# $", ""}};
    RunFacts facts = ended("passed");
    facts.required_near_miss = {"^ready$", 7, "ready\x1b[0m"};
    facts.exchange_near_miss = {"# $", 8, "# \x07"};
    const CaseResult result = judged(test, facts);
    ASSERT_EQ(result.problems.size(), 2U);
    EXPECT_EQ(result.problems[0],
              "the console does not show '^ready$' (0 of 1 required patterns found); line 7 would "
              R"(match but for what cannot be seen in it: "ready\x1b[0m")");
    EXPECT_EQ(result.problems[1],
              "the conversation waits for '# $' in step 1 of 1; line 8 would match but for what "
              R"(cannot be seen in it: "# \x07")");
    EXPECT_EQ(result.culprit, 7U);
}

TEST(ConsoleWatch, OneOccurrenceIsFoundOnce) {
    TestCase test;
    test.required = {"ok", "ok"};
    ConsoleWatch watch(test);
    (void)watch.add("ok\n");
    EXPECT_EQ(watch.required_found(), 1U);
    (void)watch.add("ok\n");
    EXPECT_EQ(watch.required_found(), 2U);
}

TEST(ConsoleWatch, ForbiddenIsFoundByteByByteAndInItsLine) {
    TestCase test;
    test.forbidden = {"x{3}", "BUG: \\w+"};
    ConsoleWatch watch(test);
    for (const char c : std::string("fine\n\na BUG: here\nxxx\n"))
        (void)watch.add({&c, 1});
    ASSERT_TRUE(watch.forbidden());
    EXPECT_EQ(watch.forbidden()->line, 3U);
    EXPECT_EQ(watch.forbidden()->pattern, "BUG: \\w+");
    EXPECT_EQ(watch.forbidden()->text, "a BUG: here");
}

TEST(ConsoleWatch, ALongLineIsSearchedWherever) {
    for (const std::size_t before : {0U, 100U, 2040U, 2048U, 4090U, 4095U, 4096U, 100'000U}) {
        TestCase test;
        test.forbidden = {"PANIC!"};
        ConsoleWatch watch(test);
        (void)watch.add(std::string(before, '.') + "PANIC!" + std::string(5000, '.'));
        watch.finish();
        EXPECT_TRUE(watch.forbidden()) << before;
    }
}

TEST(ConsoleWatch, AMegabyteWithoutALineIsNoMatterOfStackOrTime) {
    TestCase test;
    test.forbidden = {"^.*nothing", "(a+)+b"};
    test.required = {"^(a|b)*c?$"};
    ConsoleWatch watch(test);
    (void)watch.add(std::string(1 << 20, 'a') + "\n");
    EXPECT_EQ(watch.required_found(), 0U) << "no part of it is a line's beginning and end";
}

TEST(ConsoleWatch, AnswersEachStepAndEachOnlyOnce) {
    TestCase test;
    test.conversation = {{"login: $", "root\n"}, {"# $", "ls\n"}, {"# $", ""}};
    ConsoleWatch watch(test);
    EXPECT_EQ(watch.add("booting\nlog"), "");
    EXPECT_EQ(watch.add("in: "), "root\n");
    EXPECT_EQ(watch.add("root\n"), "");
    EXPECT_EQ(watch.add("# "), "ls\n");
    EXPECT_EQ(watch.exchanges_met(), 2U) << "one prompt answers one step";
    EXPECT_EQ(watch.add("ls\n# "), "");
    EXPECT_EQ(watch.exchanges_met(), 3U);
}

TEST(ConsoleWatch, WhatCameAtOnceIsAnsweredAtOnce) {
    TestCase test;
    test.conversation = {{"one", "1"}, {"two", "2"}, {"one", "3"}};
    ConsoleWatch watch(test);
    EXPECT_EQ(watch.add("one two\n"), "12");
}

TEST(ConsoleWatch, RefusesWhatIsNoPattern) {
    TestCase test;
    test.required = {"("};
    EXPECT_THROW(ConsoleWatch{test}, StartupError);
}

TEST(KeptText, KeepsBeginningAndEnd) {
    KeptText text(10);
    for (const char c : std::string("0123456789"))
        text.add({&c, 1});
    EXPECT_EQ(text.text(), "0123456789");
    text.add("abcdefghijklmnopqrstuvwxyz");
    EXPECT_EQ(text.text(), "01234\n[26 bytes are left out here]\nvwxyz");
    EXPECT_EQ(text.bytes(), 36U);
}

// --- By hand

TestCase full_case() {
    TestCase test;
    test.name = "boot/a\nb";
    test.kernel = "/k/it's a kernel";
    test.memory = "64M";
    test.append = "-a b";
    test.modules = {"/m,-x y"};
    test.engine = "native";
    test.sanitize_tlb = true;
    test.keyboard = true;
    test.options = {"--fw-cfg", "name=a,string=b c"};
    test.timeout = std::chrono::milliseconds(1500);
    return test;
}

TEST(ByHand, ACaseIsArgumentsOfUmbraRun) {
    EXPECT_THAT(guest_arguments(full_case()),
                ElementsAre("/k/it's a kernel", "--memory=64M", "--append=-a b", "--module=/m,-x y",
                            "--sanitize=tlb", "--fw-cfg", "name=a,string=b c", "--end-stuck",
                            "--engine=native", "--keyboard", "--timeout=1.500"));
}

/// What a shell makes of `words`.
std::string shell_output(const std::string& words) {
    const std::unique_ptr<FILE, int (*)(FILE*)> pipe(::popen(("printf '<%s>' " + words).c_str(), "r"),
                                                     ::pclose);
    std::string output;
    for (int c = std::fgetc(pipe.get()); c != EOF; c = std::fgetc(pipe.get()))
        output += static_cast<char>(c);
    return output;
}

TEST(ByHand, AnyTextIsOneWordOfAShell) {
    for (const std::string text : {"", "plain/a=b,c", "it's", "'", "''\\'", R"($HOME `id` "x" \ !)", "a\nb\n",
                                   "*", "~", "#", "-n", "\xff"})
        EXPECT_EQ(shell_output(shell_quoted(text)), "<" + text + ">");
}

TEST(ByHand, ScriptsAreOfOneCommand) {
    EXPECT_EQ(
        rerun_script(full_case(), "/usr/bin/umbra", "/my tests"),
        "#!/bin/sh\n# boot/a b: run again; expected is: passed\ncd '/my tests' || exit\n"
        "exec /usr/bin/umbra run '/k/it'\\''s a kernel' --memory=64M '--append=-a b' '--module=/m,-x y' "
        "--sanitize=tlb --fw-cfg 'name=a,string=b c' --end-stuck --engine=native --keyboard --timeout=1.500 "
        "\"$@\"\n");
    const std::string debug = debug_script(full_case(), "/usr/bin/umbra", "/", true);
    EXPECT_THAT(debug, HasSubstr("exec /usr/bin/umbra debug '/k/it'\\''s a kernel' --memory=64M"));
    EXPECT_THAT(debug, HasSubstr("gdb '/k/it'\\''s a kernel' core\n"));
    for (const char* const refused : {"--keyboard", "--engine", "--timeout"})
        EXPECT_EQ(debug.find(refused), std::string::npos) << refused;
}

TEST(ByHand, WhatTheExitCodeAloneDoesNotTellIsRunByUmbraTest) {
    TestCase plain;
    plain.name = "-a/b[memory=64M]";
    plain.kernel = "/k";
    plain.manifest = "/t/umbra.toml";
    EXPECT_THAT(rerun_script(plain, "/u", "/"), HasSubstr("\nexec /u run /k "));
    std::vector<TestCase> cases(5, plain);
    cases[0].conversation = {{"a", "b"}};
    cases[1].required = {"a"};
    cases[2].forbidden = {"a"};
    cases[3].bounds = {{"traps.count", 1, {}}};
    cases[4].expected = Outcome::reset;
    for (const TestCase& test : cases) {
        const std::string script = rerun_script(test, "/u", "/");
        EXPECT_THAT(script, HasSubstr("\n# The guest alone, on this terminal: /u run /k --end-stuck"));
        EXPECT_THAT(
            script,
            HasSubstr("\nexec /u test --output=none '--filter=?a/b[memory=64M]' /t/umbra.toml \"$@\"\n"));
    }
}

} // namespace
} // namespace umbra
