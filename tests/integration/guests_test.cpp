// Each shipped guest on each engine: it must end as guest/outcomes.json says.
#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"

#include <chrono>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

struct GuestRun {
    std::string name, outcome, memory, cpu, console, engine;
    std::vector<std::string> arguments{}, modules{}; ///< for umbra; modules by names in guest/
};

std::ostream& operator<<(std::ostream& stream, const GuestRun& run) {
    return stream << run.name << " on " << run.engine << ": " << run.outcome;
}

std::vector<GuestRun> all_runs() {
    const auto outcomes =
        nlohmann::json::parse(contents_of(build_folder() / "guest/outcomes.json"), nullptr, false);
    std::vector<GuestRun> runs;
    if (!outcomes.is_array())
        return runs;
    for (const auto& guest : outcomes)
        for (const char* const engine : {"shadow", "native"})
            runs.push_back({guest.at("name"), guest.at("outcome"), guest.at("memory"), guest.at("cpu"),
                            guest.at("console"), engine, guest.at("arguments"), guest.at("modules")});
    return runs;
}

TEST(GuestsTest, OutcomesAreDeclared) {
    EXPECT_GE(all_runs().size(), 60U) << "guest/outcomes.json is missing, damaged or short";
}

/// Why this guest cannot pass natively on a KVM that is itself in QEMU's emulation; empty if it can. (On
/// shadow tables it can.)
std::string emulation_defect(const std::string& guest) {
    if (!shadows_tables() && (guest == "hostile" || guest == "cr3"))
        return "QEMU's nested page faults do not tell KVM that a guest's page table is not in RAM";
    if (shadows_tables() && guest == "exceptions")
        return "QEMU makes no double fault of an exception that KVM injects";
    return {};
}

/// Why this guest cannot pass natively on this KVM, whatever CPU it has; empty if it can.
std::string kvm_defect(const std::string& guest) {
    if (shadows_tables() && guest == "smap")
        return "KVM's shadow paging takes what a CPU with AC set reads by itself for an access of the "
               "program's, "
               "and never resolves its fault";
    return {};
}

class GuestTest : public KvmTest, public testing::WithParamInterface<GuestRun> {
  protected:
    void SetUp() override {
        KvmTest::SetUp();
        if (!IsSkipped() && !HasFatalFailure())
            require_engine(GetParam().engine);
        if (IsSkipped() || GetParam().engine != "native")
            return;
        if (const std::string why = kvm_defect(GetParam().name); !why.empty())
            GTEST_SKIP() << why;
        if (emulated_host())
            if (const std::string why = emulation_defect(GetParam().name); !why.empty())
                GTEST_SKIP() << why;
    }
};

std::vector<std::string> arguments_for(const GuestRun& run) {
    std::vector<std::string> arguments{"run", "--engine", run.engine, "-m", run.memory};
    if (!run.cpu.empty())
        arguments.insert(arguments.end(), {"--cpu", run.cpu});
    if (run.outcome == "timeout")
        arguments.insert(arguments.end(), {"--timeout", "1.5"});
    arguments.insert(arguments.end(), run.arguments.begin(), run.arguments.end());
    for (const std::string& module : run.modules)
        arguments.insert(arguments.end(), {"--module", guest_file(module)});
    arguments.push_back(guest_file(run.name));
    // Where KVM walks the guest's tables, and not QEMU, walks are exact on both engines.
    const bool walks = run.name == "reserved" || run.name == "random" || run.name == "pae";
    auto words = words_for_guest(walks && shadows_tables() ? "shadow" : run.engine);
    if (interprets_ring0()) { // whose programs, and so umbra's guests, read an IF that is always set
        if (words.empty())
            words.emplace_back("--");
        words.emplace_back("inexact-flags");
    }
    arguments.insert(arguments.end(), words.begin(), words.end());
    return arguments;
}

void expect_outcome(const Ended& ended, const GuestRun& run) {
    const std::string failed = "failed:";
    if (run.outcome == "passed") {
        EXPECT_EQ(ended.exit_code, 0) << ended;
        EXPECT_EQ(ended.verdict(), "passed") << ended;
    } else if (run.outcome == "triple-fault") {
        EXPECT_EQ(ended.exit_code, 3) << ended;
        EXPECT_NE(ended.err.find("umbra: triple fault"), std::string::npos) << ended;
    } else if (run.outcome == "timeout") {
        EXPECT_EQ(ended.exit_code, 124) << ended;
        EXPECT_EQ(ended.verdict(), "timed out") << ended;
    } else if (run.outcome.starts_with(failed)) {
        EXPECT_EQ(ended.exit_code, 1) << ended;
        EXPECT_TRUE(
            ended.verdict().starts_with("failed with code " + run.outcome.substr(failed.size()) + " "))
            << ended;
    } else {
        FAIL() << "no test knows the outcome " << run.outcome;
    }
}

TEST_P(GuestTest, EndsAsDeclared) {
    const GuestRun& run = GetParam();
    constexpr std::chrono::seconds limit{300};
    const Ended ended = run_umbra(arguments_for(run), limit);
    expect_outcome(ended, run);
    EXPECT_NE(ended.out.find(run.console), std::string::npos) << ended;
}

INSTANTIATE_TEST_SUITE_P(Shipped, GuestTest, testing::ValuesIn(all_runs()),
                         [](const testing::TestParamInfo<GuestRun>& run) {
                             return run.param.name + "_" + run.param.engine;
                         });

class ManyGuestsTest : public EngineTest {};

TEST_P(ManyGuestsTest, RunAtTheSameTime) {
    const std::vector<std::string> guests{"hello", "spaces", "fail", "hello", "timer", "user"};
    std::vector<std::unique_ptr<Child>> children;
    children.reserve(guests.size());
    for (const std::string& guest : guests)
        children.push_back(std::make_unique<Child>(
            umbra_command(arguments_for({guest, "passed", "64M", "", "", GetParam()}))));
    for (std::size_t i = 0; i < children.size(); ++i) {
        const Ended& ended = children[i]->end();
        EXPECT_EQ(ended.exit_code, guests[i] == "fail" ? 1 : 0) << guests[i] << ": " << ended;
    }
}

TEST_P(ManyGuestsTest, EndTheSameWayEveryTime) {
    for (int i = 0; i < 20; ++i) {
        const Ended ended = run_umbra({"run", "--engine", GetParam(), guest_file("hello")});
        ASSERT_EQ(ended.exit_code, 0) << "run " << i << ": " << ended;
        ASSERT_EQ(lines_of(ended.out).size(), 3U) << "run " << i << ": " << ended;
    }
}

INSTANTIATE_TEST_SUITE_P(Engines, ManyGuestsTest, engines(), engine_name);

using HelloTest = KvmTest;

TEST_F(HelloTest, NeedsLittleMemoryOfTheHost) {
    const Ended ended = run_umbra({"run", guest_file("hello")});
    ASSERT_EQ(ended.exit_code, 0) << ended;
    std::cout << "hello: " << ended.resident_kb << " KB resident at most\n";
    constexpr long far_too_much = 65536; // what it should need is measured by tests/bench
    EXPECT_LT(ended.resident_kb, far_too_much) << "has guest memory been touched that is not used?";
}

} // namespace
} // namespace umbra
