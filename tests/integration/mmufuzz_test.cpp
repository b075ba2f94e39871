// Random page-table programs as a guest (guest/mmufuzz.cpp): the checksum of all that it sees is the same on
// every engine and every host. The recorded ones were seen with the native engine on nested paging, where the
// CPU itself walks the guest's tables.
#include "tests/integration/child.hpp"
#include "tests/integration/host.hpp"

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

class MmuFuzzTest : public EngineTest {
  protected:
    /// The last line that tells a checksum, after a run that passed.
    static std::string result(const std::string& engine, unsigned seed, bool nxe) {
        std::vector<std::string> arguments{"run", "--engine", engine, guest_file("mmufuzz"), "--"};
        arguments.push_back(fmt::format("seed={}", seed));
        arguments.emplace_back("rounds=500");
        if (nxe)
            arguments.emplace_back("nxe");
        if (const auto words = words_for_guest(engine); !words.empty())
            arguments.push_back(words.back());
        const Ended ended = run_umbra(arguments);
        EXPECT_EQ(ended.verdict(), "passed") << ended;
        const auto lines = lines_of(ended.out);
        const auto last = std::find_if(lines.rbegin(), lines.rend(), [](std::string_view line) {
            return line.find("checksum") != std::string_view::npos;
        });
        return last == lines.rend() ? "none" : *last;
    }
};

struct Recorded {
    unsigned seed;
    bool nxe;
    const char* checksum;
};

TEST_P(MmuFuzzTest, GivesTheRecordedChecksums) {
    constexpr Recorded recorded[] = {
        {1, false, "0xacb0e536da6f0524"}, {2, false, "0x5017f4634a8bffd"}, {3, false, "0xb90b2345b431359e"},
        {1, true, "0x26ebd7957f0bbec7"},  {2, true, "0xb4b02aa8007e6f9a"}, {3, true, "0x4a0dcf0fc9d31a1"},
    };
    for (const Recorded& run : recorded) {
        if (run.nxe && GetParam() == "native" && shadows_tables())
            continue; // that KVM shares shadow pages between both values of EFER.NXE
        EXPECT_EQ(result(GetParam(), run.seed, run.nxe),
                  fmt::format("mmufuzz: seed {}: 4000 accesses, checksum {}", run.seed, run.checksum));
    }
}

INSTANTIATE_TEST_SUITE_P(Engines, MmuFuzzTest, engines(), engine_name);

using MmuFuzzOracleTest = MmuFuzzTest;

TEST_P(MmuFuzzOracleTest, AgreesWithTheShadowEngine) {
    for (unsigned seed = 100; seed < 104; ++seed)
        EXPECT_EQ(result("shadow", seed, false), result(GetParam(), seed, false));
}

INSTANTIATE_TEST_SUITE_P(Engines, MmuFuzzOracleTest, testing::Values("native"), engine_name);

} // namespace
} // namespace umbra
