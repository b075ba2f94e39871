// Unit tests of vmm/trap_log.hpp.
#include "vmm/trap_log.hpp"

#include "vmm/error.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <thread>

#include <gtest/gtest.h>
#include <unistd.h>

namespace umbra {
namespace {

using Fields = std::map<std::string, std::string>;

TrapRecord record(TrapReason reason, TrapAction action, std::uint64_t cycles = 100) {
    TrapRecord result;
    result.start = 1000;
    result.end = 1000 + cycles;
    result.reason = reason;
    result.action = action;
    return result;
}

/// A log whose trace goes to a file that goes away with it.
class TraceTest : public ::testing::Test {
  public:
    TraceTest()
        : path(std::filesystem::temp_directory_path() / ("umbra-trace-" + std::to_string(getpid()))) {}
    void TearDown() override { std::filesystem::remove(path); }

    /// The file's lines.
    [[nodiscard]] std::vector<std::string> lines() const {
        std::ifstream file(path);
        std::vector<std::string> result;
        for (std::string line; std::getline(file, line);)
            result.push_back(line);
        return result;
    }
    /// What a script would make of the one line that tracing `traced` gives.
    Fields trace(const TrapRecord& traced) {
        TrapLog log;
        log.trace_to(path);
        log.add(traced);
        EXPECT_TRUE(log.finish_trace());
        const auto all = lines();
        EXPECT_EQ(all.size(), 2U);
        std::istringstream words(all.back());
        Fields fields;
        for (std::string word; words >> word;) {
            const auto equals = word.find('=');
            EXPECT_NE(equals, std::string::npos) << word;
            EXPECT_TRUE(fields.emplace(word.substr(0, equals), word.substr(equals + 1)).second) << word;
        }
        return fields;
    }
    static std::set<std::string> keys(const Fields& fields) {
        std::set<std::string> result;
        for (const auto& [key, value] : fields)
            result.insert(key);
        return result;
    }

    std::string path;
};

using Keys = std::set<std::string>;

TEST(TrapLog, NamesAreDifferentAndPlain) {
    std::set<std::string_view> names;
    for (unsigned i = 0; i < static_cast<unsigned>(TrapReason::count_); ++i)
        names.insert(name(static_cast<TrapReason>(i)));
    EXPECT_EQ(names.size(), static_cast<std::size_t>(TrapReason::count_));
    EXPECT_EQ(name(TrapReason::page_fault), "page_fault");
    EXPECT_EQ(name(TrapReason::exception), "exception");
    EXPECT_EQ(name(TrapReason::mmio_write), "mmio_write");
    EXPECT_EQ(name(TrapReason::signal), "signal");
    for (unsigned i = 0; i < static_cast<unsigned>(TrapAction::count_); ++i)
        EXPECT_TRUE(names.insert(name(static_cast<TrapAction>(i))).second);
    EXPECT_EQ(name(TrapAction::fill), "fill");
    EXPECT_EQ(name(TrapAction::device), "device");
    EXPECT_EQ(name(TrapAction::stop), "stop");
    for (const std::string_view text : names)
        EXPECT_EQ(text.find_first_not_of("abcdefghijklmnopqrstuvwxyz_"), std::string_view::npos) << text;
}

TEST(TrapLog, CountsByReasonAndAction) {
    TrapLog log;
    log.add(record(TrapReason::page_fault, TrapAction::fill, 100));
    log.add(record(TrapReason::page_fault, TrapAction::fill, 50));
    log.add(record(TrapReason::page_fault, TrapAction::deliver, 7));
    EXPECT_EQ(log.total(TrapReason::page_fault, TrapAction::fill).count, 2U);
    EXPECT_EQ(log.total(TrapReason::page_fault, TrapAction::fill).cycles, 150U);
    EXPECT_EQ(log.total(TrapReason::page_fault, TrapAction::deliver).count, 1U);
    EXPECT_EQ(log.total(TrapReason::page_fault, TrapAction::deliver).cycles, 7U);
    EXPECT_EQ(log.total(TrapReason::exception, TrapAction::deliver).count, 0U);
    EXPECT_EQ(log.added(), 3U);
}

TEST(TrapLog, RemembersTheLastOldestFirst) {
    TrapLog log;
    EXPECT_TRUE(log.last().empty());
    for (std::uint64_t i = 0; i < 3 * TrapLog::remembered + 5; ++i) {
        TrapRecord next = record(TrapReason::signal, TrapAction::attend);
        next.rip = GuestVirt(i);
        log.add(next);
        const auto last = log.last();
        ASSERT_EQ(last.size(), std::min<std::size_t>(i + 1, TrapLog::remembered));
        for (std::size_t k = 0; k < last.size(); ++k)
            ASSERT_EQ(last[k].rip, GuestVirt(i + 1 - last.size() + k));
    }
}

TEST(TrapRecord, SaysWhatItTellsOf) {
    TrapRecord trap = record(TrapReason::instruction, TrapAction::emulate);
    EXPECT_FALSE(trap.has_vector());
    EXPECT_FALSE(trap.is_page_fault());
    trap.vector = 14;
    EXPECT_TRUE(trap.has_vector());
    EXPECT_TRUE(trap.is_page_fault());
    trap.reason = TrapReason::interrupt;
    EXPECT_FALSE(trap.is_page_fault()) << "an interrupt controller left at its reset vectors";
    EXPECT_TRUE(record(TrapReason::exception, TrapAction::deliver).has_vector()) << "#DE is vector 0";
    EXPECT_TRUE(record(TrapReason::page_fault, TrapAction::fill).is_page_fault());
}

TEST_F(TraceTest, BeginsWithAComment) {
    TrapLog log;
    log.trace_to(path);
    EXPECT_TRUE(log.finish_trace());
    ASSERT_EQ(lines().size(), 1U);
    EXPECT_TRUE(lines().front().starts_with("# umbra trace"));
}

TEST_F(TraceTest, PageFault) {
    TrapRecord trap = record(TrapReason::page_fault, TrapAction::fill);
    trap.start = timestamp();
    trap.end = trap.start + static_cast<std::uint64_t>(2 * ticks_per_microsecond());
    trap.vcpu = 3;
    trap.cpl = 3;
    trap.vector = 14;
    trap.detail = 6;
    trap.rip = GuestVirt(0xffff'ffff'8100'0123);
    trap.address = GuestVirt(0x7fff'f000);
    Fields fields = trace(trap);
    EXPECT_EQ(fields["vcpu"], "3");
    EXPECT_EQ(fields["reason"], "page_fault");
    EXPECT_EQ(fields["cpl"], "3");
    EXPECT_EQ(fields["rip"], "0xffffffff81000123");
    EXPECT_EQ(fields["vector"], "14");
    EXPECT_EQ(fields["error"], "0x6");
    EXPECT_EQ(fields["cr2"], "0x7ffff000");
    EXPECT_EQ(fields["action"], "fill");
    EXPECT_NEAR(std::stod(fields["took_us"]), 2.0, 0.1);
    EXPECT_GT(std::stod(fields["us"]), 0.0);
    EXPECT_EQ(fields.size(), 10U);
}

TEST_F(TraceTest, OtherReasonsHaveTheFieldsThatApply) {
    const Keys always{"us", "vcpu", "reason", "cpl", "rip", "action", "took_us"};
    const auto with = [&always](Keys more) {
        more.insert(always.begin(), always.end());
        return more;
    };
    EXPECT_EQ(keys(trace(record(TrapReason::syscall, TrapAction::enter))), always);
    EXPECT_EQ(keys(trace(record(TrapReason::instruction, TrapAction::emulate))), always);
    EXPECT_EQ(keys(trace(record(TrapReason::mmio_read, TrapAction::device))), with({"gpa"}));
    EXPECT_EQ(keys(trace(record(TrapReason::signal, TrapAction::attend))), always);
    EXPECT_EQ(keys(trace(record(TrapReason::exception, TrapAction::deliver))), with({"vector", "error"}));
    EXPECT_EQ(keys(trace(record(TrapReason::port_write, TrapAction::device))), with({"port"}));

    TrapRecord port = record(TrapReason::port_read, TrapAction::machine);
    port.detail = 0x3f8;
    EXPECT_EQ(trace(port)["port"], "0x3f8");

    TrapRecord interrupt = record(TrapReason::interrupt, TrapAction::deliver);
    interrupt.vector = 0xec;
    EXPECT_EQ(keys(trace(interrupt)), with({"vector", "error"}));
    EXPECT_EQ(trace(interrupt)["vector"], "236");

    TrapRecord instruction = record(TrapReason::instruction, TrapAction::deliver);
    instruction.vector = 14;
    EXPECT_EQ(keys(trace(instruction)), with({"vector", "error", "cr2"}));
    instruction.instruction = "invlpg";
    EXPECT_EQ(trace(instruction)["instruction"], "invlpg");
}

TEST_F(TraceTest, OneLineForEachInOrder) {
    TrapLog log;
    log.trace_to(path);
    constexpr std::uint64_t count = 10'000;
    for (std::uint64_t i = 0; i < count; ++i) {
        TrapRecord trap = record(TrapReason::exception, TrapAction::deliver);
        trap.rip = GuestVirt(i);
        log.add(trap);
    }
    EXPECT_TRUE(log.finish_trace());
    const auto all = lines();
    ASSERT_EQ(all.size(), count + 1);
    EXPECT_NE(all[1].find(" rip=0x0 "), std::string::npos);
    EXPECT_NE(all[count].find(" rip=0x270f "), std::string::npos);
}

TEST_F(TraceTest, WithoutATraceNothingIsLost) {
    TrapLog log;
    log.add(record(TrapReason::signal, TrapAction::attend));
    EXPECT_TRUE(log.finish_trace());
    EXPECT_FALSE(std::filesystem::exists(path));
}

TEST_F(TraceTest, CannotBeOpened) {
    TrapLog log;
    try {
        log.trace_to("/nonexistent/folder/trace");
        FAIL() << "a trace in a folder that is none";
    } catch (const StartupError& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_usage);
        EXPECT_NE(std::string(error.what()).find("/nonexistent/folder/trace"), std::string::npos);
        EXPECT_NE(std::string(error.what()).find("No such file"), std::string::npos);
    }
}

TEST_F(TraceTest, FullDiskIsToldAtTheEnd) {
    if (!std::filesystem::exists("/dev/full"))
        GTEST_SKIP() << "no /dev/full";
    for (const int count : {1, 10'000}) { // noticed when the file is closed; while the guest runs
        TrapLog log;
        log.trace_to("/dev/full");
        for (int i = 0; i < count; ++i)
            log.add(record(TrapReason::signal, TrapAction::attend));
        EXPECT_EQ(log.added(), static_cast<std::uint64_t>(count)) << "the log goes on without it";
        EXPECT_FALSE(log.finish_trace());
        EXPECT_FALSE(log.finish_trace()) << "and stays so";
    }
}

TEST(Timestamp, RateIsThatOfTheClock) {
    using Clock = std::chrono::steady_clock;
    const double rate = ticks_per_microsecond();
    const std::uint64_t first = timestamp();
    const auto start = Clock::now();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const std::chrono::duration<double, std::micro> passed = Clock::now() - start;
    const double measured = static_cast<double>(timestamp() - first) / passed.count();
    EXPECT_NEAR(rate / measured, 1.0, 0.05);
    EXPECT_NEAR(rate / ticks_per_microsecond(), 1.0, 0.01);
}

} // namespace
} // namespace umbra
