// Unit tests of vmm/verdict.hpp.
#include "vmm/verdict.hpp"

#include <array>
#include <set>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using Kind = Verdict::Kind;

constexpr std::array all_kinds{Kind::passed,       Kind::failed,      Kind::reset,
                               Kind::triple_fault, Kind::stopped,     Kind::timed_out,
                               Kind::interrupted,  Kind::host_failed, Kind::no_progress};

TEST(Verdict, ExitCodesAreThoseOfTheManual) {
    const auto code = [](Kind kind) { return static_cast<int>(exit_code({kind, 7, "why"})); };
    EXPECT_EQ(code(Kind::passed), 0);
    EXPECT_EQ(code(Kind::failed), 1);
    EXPECT_EQ(code(Kind::reset), 3);
    EXPECT_EQ(code(Kind::triple_fault), 3);
    EXPECT_EQ(code(Kind::stopped), 3);
    EXPECT_EQ(code(Kind::no_progress), 3);
    EXPECT_EQ(code(Kind::host_failed), 4);
    EXPECT_EQ(code(Kind::timed_out), 124);
    EXPECT_EQ(code(Kind::interrupted), 130);
}

TEST(Verdict, OnlyPassedIsSuccess) {
    for (const Kind kind : all_kinds)
        EXPECT_EQ(exit_code({kind, 0, {}}) == ExitCode::passed, kind == Kind::passed);
}

TEST(Verdict, EachKindReadsDifferently) {
    std::set<std::string> texts;
    for (const Kind kind : all_kinds) {
        const std::string text = describe({kind, 0, {}});
        EXPECT_FALSE(text.empty());
        EXPECT_EQ(text.find('\n'), std::string::npos);
        texts.insert(text);
    }
    EXPECT_EQ(texts.size(), all_kinds.size());
}

TEST(Verdict, TellsReasonAndCode) {
    EXPECT_EQ(describe({Kind::passed, 0, {}}), "passed");
    EXPECT_EQ(describe({Kind::passed, 0, "powered off"}), "passed: powered off");
    EXPECT_EQ(describe({Kind::failed, 7, {}}), "failed with code 7 (0x7)");
    EXPECT_EQ(describe({Kind::failed, 255, {}}), "failed with code 255 (0xff)");
    EXPECT_EQ(describe({Kind::stopped, 0, "no such thing"}), "stopped: no such thing");
    for (const Kind kind :
         {Kind::reset, Kind::triple_fault, Kind::timed_out, Kind::interrupted, Kind::host_failed})
        EXPECT_NE(describe({kind, 0, "the reason"}).find(": the reason"), std::string::npos);
}

} // namespace
} // namespace umbra
