// The TLB sanitizer on real guests: every planted mistake of guest/tlb.cpp is found and named. Guests that
// make none are in tests/guests/sanitize.toml.
#include "tests/integration/child.hpp"
#include "tests/integration/host.hpp"

#include <unistd.h>

#include <chrono>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;

constexpr std::string_view report_head = "Stale translation used: ";

std::size_t occurrences(std::string_view text, std::string_view words) {
    std::size_t count = 0;
    for (std::size_t at = text.find(words); at != std::string_view::npos; at = text.find(words, at + 1))
        ++count;
    return count;
}

/// The first line that has these words; empty if there is none.
std::string line_with(const std::string& text, std::string_view words) {
    for (const std::string& line : lines_of(text)) {
        if (line.find(words) != std::string::npos)
            return line;
    }
    return {};
}

/// `umbra run --sanitize=tlb OPTIONS GUEST -- WORDS`
Ended sanitized(const std::string& guest, std::vector<std::string> options = {},
                std::vector<std::string> words = {}) {
    std::vector<std::string> arguments{"run", "--sanitize=tlb"};
    arguments.insert(arguments.end(), options.begin(), options.end());
    arguments.push_back(guest);
    if (const auto host = words_for_guest("shadow"); !host.empty())
        words.push_back(host.back());
    if (!words.empty())
        arguments.emplace_back("--");
    arguments.insert(arguments.end(), words.begin(), words.end());
    constexpr auto limit = 300s;
    return run_umbra(arguments, limit);
}

void expect_silence(const Ended& ended) {
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(ended.verdict(), "passed") << ended;
    EXPECT_EQ(occurrences(ended.err, report_head), 0U) << ended;
}

struct Mistake {
    const char* name;
    const char* access;  ///< as the report calls it
    const char* level;   ///< of the changed entry
    const char* tables;  ///< what they ask for
    const char* missing; ///< invalidation
    const char* writer;  ///< the function that wrote the entry
};
std::ostream& operator<<(std::ostream& stream, const Mistake& mistake) {
    return stream << mistake.name;
}

constexpr Mistake mistakes[] = {
    {"unmap", "read", "PTE", "page fault, error code 0x0;", "INVLPG or INVPCID of this page", "unmap"},
    {"protect", "write", "PTE", "page fault, error code 0x3;", "INVLPG or INVPCID of this page", "protect"},
    {"remap", "read", "PTE", "may still reach", "INVLPG or INVPCID of this page", "map"},
    {"global", "read", "PTE", "may still reach", "the page is global", "map"},
    {"upper", "read", "PDE", "may still reach", "INVLPG or INVPCID of this page", "upper"},
    {"table", "read", "PDE", "may still reach", "any INVLPG", "table"},
    {"dirty", "write", "PTE", "the page is clean", "INVLPG or INVPCID of this page", "dirty"},
};

class PlantedMistakeTest : public KvmTest, public testing::WithParamInterface<Mistake> {
  protected:
    [[nodiscard]] static Ended run(const std::string& how, const std::vector<std::string>& options = {}) {
        return sanitized(guest_file("tlb"), options, {how + "=" + GetParam().name});
    }
    static void expect_report(const Ended& ended) {
        const Mistake& mistake = GetParam();
        EXPECT_EQ(ended.exit_code, 1) << ended;
        EXPECT_NE(ended.verdict().find("1 use of a stale translation"), std::string::npos) << ended;
        EXPECT_NE(ended.out.find("tlb: passed"), std::string::npos) << ended;
        EXPECT_EQ(occurrences(ended.err, report_head), 1U) << ended;
        const auto expect = [&](std::string_view line, std::string_view words) {
            EXPECT_NE(line_with(ended.err, line).find(words), std::string::npos)
                << "'" << words << "' is not in the line '" << line << "' of " << ended;
        };
        expect(report_head, std::string(mistake.access) + " of 0x");
        expect("used at ", "<");
        expect("written at ", mistake.writer);
        expect("written at ", " us and ");
        expect(" was ", mistake.level);
        expect(" is ", mistake.level);
        expect("by the tables: ", mistake.tables);
        expect("missing since: ", mistake.missing);
    }
    [[nodiscard]] static std::string saw(const char* what) {
        return std::string("tlb: ") + GetParam().name + " saw " + what + "\n";
    }
};

TEST_P(PlantedMistakeTest, IsReported) {
    expect_report(run("bug"));
}

TEST_P(PlantedMistakeTest, ShowsItselfWithAStaleTlb) {
    const Ended ended = run("bug", {"--tlb=stale"});
    expect_report(ended);
    EXPECT_NE(ended.out.find(saw("old")), std::string::npos) << ended;
}

TEST_P(PlantedMistakeTest, HidesWithAnEagerTlb) {
    const Ended ended = run("bug", {"--tlb=eager"});
    expect_report(ended);
    EXPECT_NE(ended.out.find(saw("new")), std::string::npos) << ended;
}

TEST_P(PlantedMistakeTest, DoneRightIsSilent) {
    const Ended ended = run("fixed", {"--tlb=stale"});
    expect_silence(ended);
    EXPECT_NE(ended.out.find(std::string("tlb: ") + GetParam().name + ", flushed by "), std::string::npos)
        << ended;
}

INSTANTIATE_TEST_SUITE_P(Each, PlantedMistakeTest, testing::ValuesIn(mistakes),
                         [](const testing::TestParamInfo<Mistake>& mistake) { return mistake.param.name; });

using SanitizeTest = KvmTest;

TEST_F(SanitizeTest, AllMistakesOfOneRunAreReported) {
    std::vector<std::string> words;
    for (const Mistake& mistake : mistakes)
        words.push_back(std::string("bug=") + mistake.name);
    const Ended ended = sanitized(guest_file("tlb"), {}, words);
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_EQ(occurrences(ended.err, report_head), std::size(mistakes)) << ended;
}

TEST_F(SanitizeTest, AGuestThatFailsKeepsItsVerdict) {
    const Ended ended = sanitized(guest_file("fail"));
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_TRUE(ended.verdict().starts_with("failed with code 7 ")) << ended;
}

TEST_F(SanitizeTest, PagingUsesAGlobalPageThatItHasMovedAndNothingElse) {
    const Ended ended = sanitized(guest_file("paging"));
    EXPECT_EQ(ended.exit_code, 1) << ended;
    EXPECT_NE(ended.out.find("paging: passed"), std::string::npos) << ended;
    EXPECT_EQ(occurrences(ended.err, report_head), 1U) << ended;
    EXPECT_NE(ended.err.find("the page is global"), std::string::npos) << ended;
}

TEST_F(SanitizeTest, RandomProgramsSeeTheSameWithAndWithout) {
    const Ended plain = run_umbra({"run", guest_file("mmufuzz"), "--", "seed=5", "nxe"});
    ASSERT_EQ(plain.exit_code, 0) << plain;
    for (const auto& options : std::vector<std::vector<std::string>>{{}, {"--tlb=stale"}, {"--tlb=eager"}}) {
        const Ended ended = sanitized(guest_file("mmufuzz"), options, {"seed=5", "nxe"});
        expect_silence(ended);
        EXPECT_EQ(ended.out, plain.out);
    }
}

TEST_F(SanitizeTest, Memtest86PlusIsSilent) {
    constexpr const char* memtest = "/boot/memtest86+x64.bin";
    if (::access(memtest, R_OK) != 0)
        UMBRA_MISSING(std::string(memtest) + " cannot be read (Debian package memtest86+)");
    const Ended ended =
        sanitized(memtest, {"-m", "64M", "--append", "console=ttyS0,115200", "--timeout", "15"});
    EXPECT_EQ(ended.exit_code, 124) << ended;
    EXPECT_FALSE(ended.out.empty()) << ended;
    EXPECT_EQ(occurrences(ended.err, report_head), 0U) << ended;
}

TEST(SanitizeUsageTest, UnknownWordsAreNamed) {
    for (const char* const option : {"--sanitize=cache", "--tlb=never"}) {
        const Ended ended = run_umbra({"run", option, guest_file("hello")});
        EXPECT_EQ(ended.exit_code, 2) << ended;
        EXPECT_NE(ended.err.find(std::string(option).substr(0, 5)), std::string::npos) << ended;
    }
}

} // namespace
} // namespace umbra
