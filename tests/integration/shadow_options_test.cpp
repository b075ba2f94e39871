// Options of `umbra run` about shadow paging: what they report and refuse, and that mistakes are told. Guests
// that run right under each are in tests/guests/shadow.toml.
#include "tests/integration/child.hpp"
#include "tests/integration/host.hpp"

#include <chrono>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;

Ended run_with(std::vector<std::string> options, const std::string& guest,
               std::vector<std::string> words = {}) {
    options.insert(options.begin(), "run");
    options.push_back(guest_file(guest));
    if (const auto host = words_for_guest("shadow"); !host.empty())
        words.push_back(host.back());
    if (!words.empty())
        options.emplace_back("--");
    options.insert(options.end(), words.begin(), words.end());
    return run_umbra(options, 120s);
}

class ShadowOptions : public KvmTest {};

TEST_F(ShadowOptions, WritesToTablesByUndeclaredCodeAreReported) {
    const Ended ended =
        run_with({"--protect-page-tables", "--page-table-code=umbra::guest::AddressSpace::map"}, "spaces");
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_NE(ended.err.find("Page table written by undeclared code: "), std::string::npos) << ended;
    EXPECT_NE(ended.err.find("<kernel_main+"), std::string::npos) << ended;
    EXPECT_EQ(ended.err.find("AddressSpace::map"), std::string::npos) << ended;
    EXPECT_NE(ended.verdict().find("by undeclared code"), std::string::npos) << ended;
    EXPECT_NE(ended.out.find("spaces: passed"), std::string::npos) << ended;
}

TEST_F(ShadowOptions, RefusedWritesArePageFaults) {
    const Ended ended =
        run_with({"--protect-page-tables=refuse", "--page-table-code=kernel_main"}, "tlb", {"bug=remap"});
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_NE(ended.err.find("refused: the guest gets a page fault"), std::string::npos) << ended;
    EXPECT_NE(ended.out.find("unexpected trap 14 error 0x23"), std::string::npos)
        << "present, write, protection key\n"
        << ended;
}

TEST_F(ShadowOptions, MistakesAreTold) {
    const auto expect_usage_error = [](std::vector<std::string> options, const char* words) {
        const Ended ended = run_with(std::move(options), "hello");
        EXPECT_EQ(ended.exit_code, 2) << ended;
        EXPECT_NE(ended.err.find(words), std::string::npos) << ended;
    };
    expect_usage_error({"--protect-page-tables"}, "no section .page_table_code");
    expect_usage_error({"--page-table-code=kernel_main"}, "needs --protect-page-tables");
    for (const char* code : {"nobody", "2000-1000", "1000-", "0x", "10000000000000000-20000000000000000"})
        expect_usage_error({"--protect-page-tables", std::string("--page-table-code=") + code},
                           "neither a function of the kernel nor START-END");
    expect_usage_error({"--shadow-memory=2M"}, "--shadow-memory must be at least 4M");
    expect_usage_error({"--sanitize=tlb", "--engine=native"}, "need the shadow engine");
    expect_usage_error({"--sanitize=cache"}, "--sanitize");
    expect_usage_error({"--sync=never"}, "--sync");
}

} // namespace
} // namespace umbra
