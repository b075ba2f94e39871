// Random programs of privileged and sensitive instructions as a guest (guest/cpufuzz): what they lead to is
// the same on both engines, the native one being the CPU itself. A program on which the engines differ is
// shrunk and printed with its seed. The environment may ask for more programs (UMBRA_CPUFUZZ_PROGRAMS) and
// others (UMBRA_CPUFUZZ_SEED).
#include "tests/integration/child.hpp"
#include "tests/integration/host.hpp"
#include "vmm/disassembler.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

constexpr std::uint64_t programs_per_run = 5000, programs_per_block = 250;
constexpr unsigned max_steps = 8; ///< of a program
constexpr unsigned max_shown = 3; ///< programs on which the engines differ

std::uint64_t number_from_environment(const char* name, std::uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

/// What one run of the guest printed.
struct Answer {
    std::map<std::uint64_t, std::string> blocks; ///< checksums by the number of the first program
    std::vector<std::string> lines;
    std::string verdict;
};

class CpuFuzzTest : public KvmTest {
  protected:
    void SetUp() override {
        KvmTest::SetUp();
        if (IsSkipped() || HasFatalFailure())
            return;
        require_engine("native");
        if (emulated_host() && shadows_tables())
            GTEST_SKIP() << "here KVM injects page faults, which QEMU's emulation does not double exactly";
    }

    [[nodiscard]] Answer run(const std::string& engine, std::uint64_t first, std::uint64_t programs,
                             std::uint64_t block, const std::string& more = "") const {
        std::vector<std::string> arguments{
            "run", "--engine", engine, "--timeout", "300", guest_file("cpufuzz"), "--"};
        arguments.push_back(
            fmt::format("seed={} first={} programs={} block={} {}", seed_, first, programs, block, more));
        if (const auto words = words_for_guest(engine); !words.empty())
            arguments.push_back(words.back());
        const Ended ended = run_umbra(arguments);
        Answer answer;
        answer.verdict = ended.verdict();
        for (const std::string_view line : lines_of(ended.out)) {
            answer.lines.emplace_back(line);
            std::istringstream words{std::string(line)};
            std::string word, sum;
            std::uint64_t number = 0;
            char colon = 0;
            if (words >> word >> number >> colon >> sum && word == "block")
                answer.blocks[number] = sum;
        }
        return answer;
    }

    [[nodiscard]] std::array<Answer, 2> run_both(std::uint64_t first, std::uint64_t programs,
                                                 std::uint64_t block, const std::string& more = "") const {
        return {run("native", first, programs, block, more), run("shadow", first, programs, block, more)};
    }

    /// The first programs of the blocks in which the engines differ, or one of them came to no end.
    [[nodiscard]] static std::vector<std::uint64_t> differing(const std::array<Answer, 2>& answers,
                                                              std::uint64_t first, std::uint64_t programs,
                                                              std::uint64_t block) {
        std::vector<std::uint64_t> result;
        for (std::uint64_t at = first; at < first + programs; at += block) {
            const auto native = answers[0].blocks.find(at), shadow = answers[1].blocks.find(at);
            const bool here = native != answers[0].blocks.end() && shadow != answers[1].blocks.end();
            if (!here || native->second != shadow->second)
                result.push_back(at);
            if (!here)
                break; // what follows was not run
        }
        return result;
    }

    /// Program `number` without the steps that the difference does not need, as assembly, and what became of
    /// it.
    [[nodiscard]] std::string shrunk(std::uint64_t number) const {
        std::uint64_t dropped = 0;
        for (unsigned step = max_steps; step-- > 0;) {
            const std::uint64_t fewer = dropped | std::uint64_t{1} << step;
            if (!differing(run_both(number, 1, 1, fmt::format("drop={}", fewer)), number, 1, 1).empty())
                dropped = fewer;
        }
        const std::string options = fmt::format("trace drop={}", dropped);
        const auto answers = run_both(number, 1, 1, options);
        std::string text = fmt::format("seed={} first={} programs=1 {}\n", seed_, number, options);
        for (const std::string& line : answers[0].lines)
            if (line.starts_with("start") || line.starts_with("code"))
                text += as_assembly(line) + '\n';
        for (const Answer& answer : answers) {
            text += &answer == &answers[0] ? "native:\n" : "shadow:\n";
            for (const std::string& line : answer.lines)
                if (line.starts_with("event") || line.starts_with("  ") || line.starts_with("system"))
                    text += "  " + line + '\n';
            text += "  " + answer.verdict + '\n';
        }
        return text;
    }

    std::uint64_t seed_ = number_from_environment("UMBRA_CPUFUZZ_SEED", 1);

  private:
    /// A line "code ADDRESS BITS BYTES NAME" of the guest's, with the instructions in place of the bytes.
    [[nodiscard]] static std::string as_assembly(const std::string& line) {
        std::istringstream words(line);
        std::string word, hex, name;
        std::uint64_t address = 0;
        unsigned bits = 0;
        if (!(words >> word >> std::hex >> address >> std::dec >> bits >> hex) || word != "code")
            return line;
        std::getline(words, name);
        std::string text = fmt::format("{:x}, {} bits:{} ({})", address, bits, name, hex);
        std::vector<std::byte> code;
        for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
            code.push_back(static_cast<std::byte>(std::stoul(hex.substr(i, 2), nullptr, 16)));
        for (std::span<const std::byte> rest(code); !rest.empty();) {
            const Disassembled next = disassemble_next(rest, GuestVirt(address), bits);
            text += "\n    " + next.text;
            if (next.length == 0)
                break;
            rest = rest.subspan(next.length);
            address += next.length;
        }
        return text;
    }
};

TEST_F(CpuFuzzTest, ProgramsSeeTheSameCpu) {
    const std::uint64_t programs = number_from_environment("UMBRA_CPUFUZZ_PROGRAMS", 5000);
    unsigned shown = 0;
    for (std::uint64_t first = 0; first < programs && shown < max_shown; first += programs_per_run) {
        const std::uint64_t here = std::min(programs_per_run, programs - first);
        for (const std::uint64_t block :
             differing(run_both(first, here, programs_per_block), first, here, programs_per_block)) {
            for (const std::uint64_t program :
                 differing(run_both(block, programs_per_block, 1), block, programs_per_block, 1)) {
                if (shown++ < max_shown)
                    ADD_FAILURE() << shrunk(program);
            }
            EXPECT_NE(shown, 0U) << "only together, the programs of block " << block << " of seed " << seed_
                                 << " differ";
            if (shown >= max_shown)
                break;
        }
    }
    if (!HasFailure())
        fmt::print("[ programs ] {} of seed {}, each the same on both engines\n", programs, seed_);
}

} // namespace
} // namespace umbra
