// The shipped guests, by umbra's own runner: all cases of guest/umbra.toml and of the manifests of
// tests/guests, on each engine, must end as they say.
#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"

#include <chrono>
#include <filesystem>
#include <iostream>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

using Json = nlohmann::json;

constexpr std::chrono::minutes limit{40}; // of an emulated host

/// `umbra test OPTIONS` of all manifests.
Ended test_guests(std::vector<std::string> options) {
    options.insert(options.begin(), "test");
    options.push_back(build_folder() / "guest");
    for (const char* const manifest : {"sanitize", "shadow"})
        options.push_back(guest_file(manifest) + ".toml");
    return run_umbra(options, limit);
}

/// What `umbra test` did, by its own account.
struct TestRun {
    Ended ended;
    std::size_t planned = 0;
    std::vector<std::string> started;
    std::vector<Json> results;
    Json summary = Json::object();
};

TestRun run_guests(const std::vector<std::string>& options) {
    const TemporaryFolder folder;
    std::vector<std::string> arguments{
        "--output",  folder.file("results"), "--json", folder.file("events"), "--no-trace",
        "--no-core", "--allow-skips"};
    arguments.insert(arguments.end(), options.begin(), options.end());
    TestRun run;
    run.ended = test_guests(arguments);
    for (const std::string& line : lines_of(contents_of(folder.file("events")))) {
        Json event = Json::parse(line, nullptr, false);
        const std::string kind = event.is_object() ? event.value("event", "") : "";
        if (kind == "plan")
            run.planned = event.at("runs");
        else if (kind == "start")
            run.started.push_back(event.at("name"));
        else if (kind == "end")
            run.results.push_back(std::move(event));
        else if (kind == "summary")
            run.summary = std::move(event);
        else
            ADD_FAILURE() << "an event that is none: " << line;
    }
    const std::vector<std::string> lines = lines_of(run.ended.out);
    std::cout << (lines.empty() ? "nothing" : lines.back()) << "\n";
    return run;
}

/// All passed but what this host's KVM cannot run, and nothing was lost on the way.
void expect_passed(const TestRun& run) {
    EXPECT_EQ(run.ended.exit_code, 0) << run.ended;
    EXPECT_EQ(run.planned, run.results.size()) << run.ended;
    EXPECT_EQ(run.summary.value("failed", 1), 0) << run.ended;
    EXPECT_EQ(run.summary.value("not_run", 1), 0) << run.ended;
    for (const Json& result : run.results) {
        const std::string verdict = result.at("verdict");
        const bool elsewhere = verdict == "skipped" && !result.at("problems").empty() &&
                               result.at("problems")[0].get<std::string>().starts_with("this host is not");
        EXPECT_TRUE(verdict == "passed" || elsewhere) << result;
    }
}

/// `umbra test --list=json`
Json listed(const std::vector<std::string>& options) {
    std::vector<std::string> arguments{"--list=json"};
    arguments.insert(arguments.end(), options.begin(), options.end());
    const Ended ended = test_guests(arguments);
    EXPECT_EQ(ended.exit_code, 0) << ended;
    Json list = Json::parse(ended.out, nullptr, false);
    EXPECT_TRUE(list.is_array()) << ended;
    return list.is_array() ? list : Json::array();
}

using GuestsTest = KvmTest;

TEST_F(GuestsTest, EndAsTheirManifestsSay) {
    const TestRun run = run_guests({});
    expect_passed(run);
    std::multiset<std::string> expected, ended;
    for (const Json& test : listed({}))
        expected.insert(test.at("name"));
    std::size_t ran = 0;
    for (const Json& result : run.results) {
        ended.insert(result.at("name"));
        ran += result.at("outcome").is_null() ? 0 : 1;
    }
    EXPECT_EQ(ended, expected) << run.ended;
    EXPECT_GE(ran, 60U) << run.ended;
}

TEST(GuestManifestTest, EachGuestHasACaseOnEachEngine) {
    namespace fs = std::filesystem;
    std::map<std::string, std::set<std::string>> engines; // by kernels
    for (const Json& test : listed({}))
        for (const Json& tag : test.at("tags"))
            if (tag == "shadow" || tag == "native")
                engines[fs::path(test.at("kernel").get<std::string>()).filename()].insert(tag);
    std::size_t guests = 0;
    for (const fs::directory_entry& file : fs::directory_iterator(build_folder() / "guest")) {
        const bool executable = (file.status().permissions() & fs::perms::owner_exec) != fs::perms::none;
        if (!file.is_regular_file() || !executable)
            continue;
        EXPECT_EQ(engines[file.path().filename()], (std::set<std::string>{"native", "shadow"}))
            << file.path();
        ++guests;
    }
    EXPECT_GE(guests, 35U);
    for (const auto& [kernel, tags] : engines)
        EXPECT_TRUE(fs::is_regular_file(guest_file(kernel))) << kernel;
}

TEST_F(GuestsTest, RunAtTheSameTime) {
    const TestRun run = run_guests({"--jobs=12", "--repeat=2", "--filter=hello*", "--filter=spaces*",
                                    "--filter=fail*", "--filter=timer*", "--filter=user*"});
    expect_passed(run);
    EXPECT_GE(run.started.size(), 10U) << run.ended;
}

TEST_F(GuestsTest, EndTheSameWayEveryTime) {
    const TestRun run = run_guests({"--repeat=20", "--filter=hello", "--filter=hello-native"});
    expect_passed(run);
    EXPECT_EQ(run.results.size(), 40U);
    EXPECT_EQ(run.started.size(), interprets_ring0() ? 20U : 40U);
    std::set<std::size_t> lengths; // of what it prints
    for (const Json& result : run.results)
        if (result.at("verdict") == "passed")
            lengths.insert(result.at("console_bytes").get<std::size_t>());
    EXPECT_EQ(lengths.size(), 1U) << run.ended;
}

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
