// --stats and --trace: that they tell of the run that was, and agree with each other.
#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"
#include "tests/integration/machine_code.hpp"

#include <cstdint>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

using Json = nlohmann::json;

class StatsTest : public EngineTest {
  protected:
    static Ended run(std::vector<std::string> options, const std::string& guest) {
        options.insert(options.begin(), {"run", "--engine", GetParam()});
        options.push_back(guest_file(guest));
        const auto words = words_for_guest(GetParam());
        options.insert(options.end(), words.begin(), words.end());
        return run_umbra(options);
    }
    static bool shadow() { return GetParam() == "shadow"; }

    TemporaryFolder folder_;
};

/// The JSON on standard error, where it follows the verdict.
Json stats_of(const Ended& ended) {
    const std::size_t begin = ended.err.find("\n{");
    return begin == std::string::npos ? Json() : Json::parse(ended.err.substr(begin), nullptr, false);
}

std::uint64_t count_of(const Json& stats, const std::string& reason) {
    std::uint64_t count = 0;
    for (const Json& traps : stats.at("traps").at("by_reason"))
        if (traps.at("reason") == reason)
            count += traps.at("count").get<std::uint64_t>();
    return count;
}

TEST_P(StatsTest, JsonTellsOfTheRun) {
    const Ended ended = run({"--stats=json"}, "hello");
    ASSERT_EQ(ended.exit_code, 0) << ended;
    const Json stats = stats_of(ended);
    ASSERT_TRUE(stats.is_object()) << ended;

    const double seconds = stats.at("wall_seconds");
    EXPECT_GT(seconds, 0);
    EXPECT_LT(seconds, 60);
    const Json& traps = stats.at("traps");
    std::uint64_t sum = 0;
    for (const Json& entry : traps.at("by_reason")) {
        EXPECT_GT(entry.at("count"), 0) << entry;
        EXPECT_GE(entry.at("microseconds"), 0) << entry;
        EXPECT_FALSE(entry.at("action").get<std::string>().empty());
        sum += entry.at("count").get<std::uint64_t>();
    }
    EXPECT_EQ(traps.at("count"), sum);
    EXPECT_GE(sum, 5U) << "it printed three lines";
    EXPECT_LT(sum, 1000U) << "it did nothing else";
    EXPECT_LE(traps.at("microseconds"), seconds * 1e6);
    EXPECT_EQ(stats.at("exits"), sum) << "each trap is an exit";
    const Json& unclaimed = stats.at("unclaimed_accesses");
    for (const char* const key : {"port_reads", "port_writes", "mmio_reads", "mmio_writes"})
        EXPECT_EQ(unclaimed.at(key), 0) << key;
    EXPECT_EQ(stats.contains("shadow"), shadow());
}

TEST_P(StatsTest, ShadowCountersCount) {
    if (!shadow())
        GTEST_SKIP() << "the native engine has no shadow tables";
    const Ended ended = run({"--stats=json"}, "paging");
    ASSERT_EQ(ended.exit_code, 0) << ended;
    const Json stats = stats_of(ended);
    ASSERT_TRUE(stats.is_object()) << ended;
    const Json& counters = stats.at("shadow");
    for (const char* const key : {"fills", "upgrades", "guest_faults", "flushes", "invalidations",
                                  "tables_compared", "tables_changed", "entries_dropped", "tables_built"})
        EXPECT_GT(counters.at(key), 0) << key << " in " << counters;
    EXPECT_LE(counters.at("upgrades"), counters.at("fills"));
    EXPECT_LE(counters.at("tables_changed"), counters.at("tables_compared"));
    for (const char* const instruction : {"invlpg", "mov-cr", "lgdt", "ltr"})
        EXPECT_GT(stats.at("instructions").value(instruction, 0), 0) << instruction << " in " << stats;
    // Each fill is a page fault, and so is most of what the guest's own tables ask for.
    EXPECT_GE(count_of(stats, "page_fault"), counters.at("fills").get<std::uint64_t>());
    const Json& pages = counters.at("table_pages");
    EXPECT_GT(pages.at("in_use"), 0);
    EXPECT_LE(pages.at("in_use"), pages.at("high_water"));
    EXPECT_LE(pages.at("high_water"), pages.at("capacity"));
}

TEST_P(StatsTest, TextHasTheTotals) {
    const Ended ended = run({"--stats"}, "hello");
    ASSERT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(lines_of(ended.err).front(), "umbra: passed") << ended;
    EXPECT_TRUE(std::regex_search(ended.err, std::regex(R"(run: [0-9.]+ s, of which [0-9.]+ s in umbra for )"
                                                        R"([1-9][0-9]* traps)")))
        << ended;
    EXPECT_EQ(ended.err.find("shadow MMU") != std::string::npos, shadow()) << ended;
}

TEST_P(StatsTest, OptionTakesNothingThatIsNoFormat) {
    const std::string hello = guest_file("hello");
    using Arguments = std::vector<std::string>;
    for (const Arguments& arguments :
         {Arguments{"--stats", hello, "--", "word"}, Arguments{"--stats", hello, "--timeout", "100"},
          Arguments{hello, "--stats"}, Arguments{"--stats=text", hello}}) {
        Arguments command{"run", "--engine", GetParam()};
        command.insert(command.end(), arguments.begin(), arguments.end());
        const Ended ended = run_umbra(command);
        EXPECT_EQ(ended.exit_code, 0) << ended;
        EXPECT_NE(ended.err.find("\nrun: "), std::string::npos) << ended;
    }
}

TEST_P(StatsTest, EveryVerdictHasThem) {
    for (const char* const guest : {"fail", "triple"}) {
        const Json stats = stats_of(run({"--stats=json"}, guest));
        EXPECT_TRUE(stats.is_object() && stats.contains("traps")) << guest;
    }
}

/// A megabyte each way, and a megabyte in words: an exit for each element would be millions.
TEST_P(StatsTest, RepeatedPortAccessesAreFewExits) {
    if (!shadow())
        GTEST_SKIP() << "by the native engine KVM exits for each element of OUTS";
    const Ended ended = run({"--stats=json"}, "stringio");
    ASSERT_EQ(ended.exit_code, 0) << ended;
    const Json stats = stats_of(ended);
    ASSERT_TRUE(stats.is_object()) << ended;
    EXPECT_LT(stats.at("exits").get<std::uint64_t>(), 6000U);
}

// --- The trace

/// The pairs of a line of the trace, by their keys; empty if it is not well-formed.
std::map<std::string, std::string> pairs_of(const std::string& line) {
    static const std::regex format(
        R"(us=[0-9]+\.[0-9]{3} vcpu=0 reason=[a-z_]+ cpl=[03] rip=0x[0-9a-f]+( vector=[0-9]+ error=0x[0-9a-f]+)?)"
        R"(( cr2=0x[0-9a-f]+)?( port=0x[0-9a-f]+)?( gpa=0x[0-9a-f]+)?( instruction=[a-z0-9-]+)? action=[a-z]+ took_us=[0-9]+\.[0-9]{3})");
    std::map<std::string, std::string> pairs;
    if (!std::regex_match(line, format))
        return pairs;
    static const std::regex pair(R"(([a-z0-9_]+)=(\S+))");
    for (std::sregex_iterator at(line.begin(), line.end(), pair), end; at != end; ++at)
        pairs[(*at)[1]] = (*at)[2];
    return pairs;
}

TEST_P(StatsTest, TraceHasALineForEveryTrap) {
    const std::string file = folder_.file("trace");
    const Ended ended = run({"--stats=json", "--trace", file}, "user");
    ASSERT_EQ(ended.exit_code, 0) << ended;
    const Json stats = stats_of(ended);
    ASSERT_TRUE(stats.is_object()) << ended;

    std::map<std::pair<std::string, std::string>, std::uint64_t> counts;
    double last = 0;
    const auto lines = lines_of(contents_of(file));
    ASSERT_FALSE(lines.empty());
    EXPECT_TRUE(lines.front().starts_with("# umbra trace")) << lines.front();
    for (std::size_t i = 1; i < lines.size(); ++i) {
        const auto pairs = pairs_of(lines[i]);
        ASSERT_FALSE(pairs.empty()) << "line " << i + 1 << ": " << lines[i];
        ++counts[{pairs.at("reason"), pairs.at("action")}];
        EXPECT_GE(std::stod(pairs.at("us")), last) << "line " << i + 1 << ": " << lines[i];
        last = std::stod(pairs.at("us"));
    }
    EXPECT_EQ(stats.at("traps").at("count"), lines.size() - 1);
    for (const Json& traps : stats.at("traps").at("by_reason"))
        EXPECT_EQ(traps.at("count"), (counts[{traps.at("reason"), traps.at("action")}])) << traps;
}

TEST_P(StatsTest, TraceTellsOfProgramsSystemCallsAndInstructions) {
    if (!shadow())
        GTEST_SKIP() << "the native engine sees no system calls";
    const std::string file = folder_.file("trace");
    ASSERT_EQ(run({"--trace", file}, "user").exit_code, 0);
    std::set<std::string> cpls, reasons, instructions;
    for (const std::string& line : lines_of(contents_of(file))) {
        const auto pairs = pairs_of(line);
        if (pairs.empty())
            continue;
        cpls.insert(pairs.at("cpl"));
        reasons.insert(pairs.at("reason"));
        if (pairs.contains("instruction"))
            instructions.insert(pairs.at("instruction"));
        const bool page_fault = pairs.at("reason") == "page_fault";
        EXPECT_TRUE(!page_fault || (pairs.contains("cr2") && pairs.contains("error"))) << line;
    }
    EXPECT_EQ(cpls, (std::set<std::string>{"0", "3"}));
    for (const char* const reason : {"page_fault", "instruction", "syscall", "exception"})
        EXPECT_TRUE(reasons.contains(reason)) << reason;
    for (const char* const instruction : {"lgdt", "lidt", "ltr", "iretq", "wrmsr"})
        EXPECT_TRUE(instructions.contains(instruction)) << instruction;
}

/// Shadow tables lead where the guest's do, also where no memory is.
TEST_P(StatsTest, TraceTellsTheGuestsOwnAddressWhereNoMemoryIs) {
    using namespace machine_code;
    const Code load_dword{0x8b, 0x18}, store_byte{0x88, 0x18}; // (%rax)
    const std::string file = folder_.file("trace");
    const std::string kernel =
        folder_.write("kernel", elf_kernel(mov_eax(0xd0001238) + load_dword + mov_eax(0xfed00345) +
                                           store_byte + mov_eax(0xd0001238) + store_byte + exit(0)));
    const Ended ended = run_umbra({"run", "--engine", GetParam(), "--trace", file, kernel});
    ASSERT_EQ(ended.exit_code, 0) << ended;
    std::vector<std::pair<std::string, std::string>> accesses;
    for (const std::string& line : lines_of(contents_of(file))) {
        const auto pairs = pairs_of(line);
        if (pairs.contains("gpa"))
            accesses.emplace_back(pairs.at("reason"), pairs.at("gpa"));
    }
    EXPECT_EQ(accesses,
              (std::vector<std::pair<std::string, std::string>>{
                  {"mmio_read", "0xd0001238"}, {"mmio_write", "0xfed00345"}, {"mmio_write", "0xd0001238"}}));
}

TEST_P(StatsTest, TraceThatCannotBeWrittenIsBadUsage) {
    for (const std::string& file : {folder_.file("missing/trace"), folder_.file("")}) {
        const Ended ended = run({"--trace", file}, "hello");
        EXPECT_EQ(ended.exit_code, 2) << ended;
        EXPECT_EQ(ended.out, "") << ended;
        EXPECT_EQ(lines_of(ended.err).size(), 1U) << ended;
        EXPECT_NE(ended.err.find(file), std::string::npos) << ended;
    }
}

TEST_P(StatsTest, TraceThatIsLostIsToldAndChangesNoVerdict) {
    const Ended ended = run({"--trace", "/dev/full"}, "fail");
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_NE(ended.err.find("umbra: the trace '/dev/full' is incomplete"), std::string::npos) << ended;
}

INSTANTIATE_TEST_SUITE_P(Engines, StatsTest, engines(), engine_name);

} // namespace
} // namespace umbra
