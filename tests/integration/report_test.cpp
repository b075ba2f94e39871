// What the developer of a guest is shown when it cannot go on.
#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"
#include "tests/integration/machine_code.hpp"

#include <algorithm>
#include <regex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace machine_code;

/// Of the shadow engine. (The native one knows no more than KVM tells: on some hosts, not even the registers
/// of a machine that has shut down.)
class ReportTest : public KvmTest {
  protected:
    static Ended run(const std::string& kernel) { return run_umbra({"run", "--timeout", "100", kernel}); }

    TemporaryFolder folder_;
};

void expect_matches(const Ended& ended, const std::vector<std::string>& patterns) {
    for (const std::string& pattern : patterns)
        EXPECT_TRUE(std::regex_search(ended.err, std::regex(pattern))) << "not there: " << pattern << "\n"
                                                                       << ended;
}

/// The lines of the section whose heading begins with `heading`.
std::vector<std::string> section(const Ended& ended, const std::string& heading) {
    const auto lines = lines_of(ended.err);
    auto at = std::ranges::find_if(lines, [&](const std::string& line) { return line.starts_with(heading); });
    std::vector<std::string> found;
    if (at != lines.end())
        for (++at; at != lines.end() && !at->empty(); ++at)
            found.push_back(*at);
    return found;
}

TEST_F(ReportTest, RefusedFeatureIsNamed) {
    const Code set_fsgsbase{0x0f, 0x20, 0xe0, 0x0d, 0, 0, 1, 0, 0x0f, 0x22, 0xe0};
    const std::string kernel = folder_.write("kernel", elf_kernel(set_fsgsbase + exit(1)));
    const Ended refused = run_umbra({"run", "--cpu", "-fsgsbase", kernel});
    EXPECT_EQ(refused.exit_code, 3) << refused;
    expect_matches(refused,
                   {R"(\numbra: hint: the guest's CPU refused an instruction at 0x[0-9a-f]+ that takes )"
                    R"('fsgsbase': try --cpu \+fsgsbase\n)"});
    const std::string other = folder_.write("other", elf_kernel(ud2));
    EXPECT_EQ(run_umbra({"run", other}).err.find("hint"), std::string::npos);
}

TEST_F(ReportTest, TripleFaultShowsWhereAndWhy) {
    const Ended ended = run(guest_file("triple"));
    EXPECT_EQ(ended.exit_code, 3) << ended;
    expect_matches(ended,
                   {
                       R"(\nGuest report: triple fault)",
                       R"(\nRegisters \(CPL 0\):\n)",
                       R"(\n  rip    [0-9a-f]{16}  <kernel_main\+0x[0-9a-f]+>\n)",
                       R"(\n  rflags [0-9a-f]{16}  )",
                       R"(\n  rax [0-9a-f]{16}  rbx [0-9a-f]{16}  rcx [0-9a-f]{16}  rdx [0-9a-f]{16}\n)",
                       R"(\n  r12 [0-9a-f]{16}  r13 [0-9a-f]{16}  r14 [0-9a-f]{16}  r15 [0-9a-f]{16}\n)",
                       R"(\n     [0-9a-f]{16}  0f01[0-9a-f]+ +lidt )",
                       R"(\n  => [0-9a-f]{16}  0f0b +ud2\n)",
                       R"(\n  [0-9a-f]{16}  [0-9a-f]{16}  <_start\+0x[0-9a-f]+>\n)", // on the stack
                       R"(\n  cr0  [0-9a-f]{16}  PE MP ET NE WP PG\n)",
                       R"(\n  cr3  0000000000009000  root gpa:0x9000, 4-level tables\n)",
                       R"(\n  efer [0-9a-f]{16}  LME LMA NXE\n)",
                       R"(\n  idtr +base 0000000000000000  limit 00000000\n)",
                       R"(\n  cs +0010  base 0000000000000000 .* 64-bit code)",
                   });
}

TEST_F(ReportTest, TranslationIsWalkedInBothTables) {
    const Ended ended = run(guest_file("triple"));
    const auto walks = section(ended, "Translation of ");
    const auto count = [&](const char* pattern) {
        return std::ranges::count_if(
            walks, [&](const std::string& line) { return std::regex_search(line, std::regex(pattern)); });
    };
    EXPECT_EQ(count("in the guest's tables:"), 1) << ended;
    EXPECT_EQ(count("^  (PML4E|PDPTE|PDE)  +gpa:0x[0-9a-f]+ +[0-9a-f]{16}  P W "), 3) << ended;
    EXPECT_EQ(count("2 MB page gpa:0x0$"), 1) << ended;
    EXPECT_EQ(count(R"(tables:$)"), 2) << ended;
    EXPECT_EQ(count("^  (PML4E|PDPTE|PDE|PTE) +mpa:0x[0-9a-f]+ +[0-9a-f]{16}  P W U A "), 3) << ended;
}

TEST_F(ReportTest, PageFaultThatCannotBeDeliveredIsExplained) {
    const Ended ended = run(guest_file("cr3"));
    EXPECT_EQ(ended.exit_code, 3) << ended;
    expect_matches(
        ended,
        {
            R"(\n  => [0-9a-f]{16}  cannot be fetched: )",
            R"(\nTranslation of 0x[0-9a-f]{16} for a fetch by the kernel \(the last trap, a page fault\):\n)",
            R"(not in RAM, and reads as all-ones\n)",
            R"(\n +-?0\.000  0  page_fault +stop +[0-9a-f]{16} )",
        });
}

TEST_F(ReportTest, LastTrapsAreListed) {
    expect_matches(run(guest_file("triple")),
                   {R"(instruction +emulate +[0-9a-f]{16}  lidt +<kernel_main\+0x[0-9a-f]+>\n)",
                    R"(\n +-?0\.000  0  exception +stop +[0-9a-f]{16}  #UD +<kernel_main\+0x[0-9a-f]+>\n)"});
    expect_matches(run(folder_.write("few", elf_kernel(ud2))),
                   {R"(\nLast ([0-9]+) of \1 traps)",
                    R"(page_fault +fill +0000000000100000  0000000000100000 error 0x1?4\n)"});
    const Ended many = run(folder_.write("many", elf_kernel(repeat(100, write_port(0x80, 0)) + ud2)));
    expect_matches(many, {R"(\nLast 32 of 1[0-9][0-9] traps)"});
    constexpr std::size_t heading = 1;
    EXPECT_EQ(section(many, "Last 32 of ").size(), heading + 32) << many;
}

TEST_F(ReportTest, IsCompleteWithoutSymbols) {
    const Ended ended = run(folder_.write("kernel", elf_kernel(mov_eax(0x12345678) + ud2)));
    EXPECT_EQ(ended.exit_code, 3) << ended;
    expect_matches(ended,
                   {R"(\n  rip    0000000000100005\n)", R"(\n  rax 0000000012345678 )",
                    R"(\n  => 0000000000100005  0f0b +ud2\n)", R"(\nTranslation of 0x0000000000100005 )"});
    EXPECT_EQ(ended.err.find('<'), std::string::npos) << ended;
}

TEST_F(ReportTest, InstructionThatUmbraDoesNotDoStopsTheRun) {
    // A far jump through a call gate (Intel SDM vol. 3A, 5.8.3.1), which takes the place of the GDT's second
    // null.
    const Code write_gate = mov_eax(0x00100000) +
                            Code{0xa3, 0x08, 0x05, 0, 0, 0, 0, 0, 0} + // mov %eax, 0x508
                            mov_eax(0x00008c00) + Code{0xa3, 0x0c, 0x05, 0, 0, 0, 0, 0, 0};
    const Code jump{0xff, 0x2c, 0x25, 0, 0, 0x20, 0};                                 // ljmp *0x200000
    const Code write_pointer = mov_eax(8) + Code{0xa3, 0x04, 0, 0x20, 0, 0, 0, 0, 0}; // its selector
    const Ended ended = run(folder_.write("kernel", elf_kernel(write_gate + write_pointer + jump + exit(0))));
    EXPECT_EQ(ended.exit_code, 3) << ended;
    EXPECT_TRUE(ended.err.starts_with("umbra: stopped: umbra does not emulate this instruction: ")) << ended;
    expect_matches(ended, {R"(\nGuest report: stopped: )", R"(\n  => [0-9a-f]{16}  ff2c2500002000 +jmp )"});
}

TEST_F(ReportTest, FitsATerminal) {
    for (const char* const guest : {"triple", "cr3"})
        for (const std::string& line : lines_of(run(guest_file(guest)).err))
            EXPECT_LE(line.size(), 130U) << line;
}

TEST_F(ReportTest, NoOtherVerdictHasOne) {
    for (const char* const guest : {"hello", "fail"})
        EXPECT_EQ(lines_of(run(guest_file(guest)).err).size(), 1U) << guest;
}

} // namespace
} // namespace umbra
