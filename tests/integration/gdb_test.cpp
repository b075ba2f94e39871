// Sessions of the real gdb with shipped guests, command by command. Most are with the guest `debug`.
#include "tests/integration/debugged.hpp"
#include "tests/integration/host.hpp"

#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

class GdbTest : public KvmTest {
  protected:
    void SetUp() override {
        KvmTest::SetUp();
        if (!IsSkipped() && !HasFatalFailure() && program_file("gdb").empty())
            UMBRA_MISSING("gdb is not installed");
    }

    TemporaryFolder folder_;
};

TEST_F(GdbTest, LooksAroundFromTheFirstInstruction) {
    Debugged guest("debug");
    run_gdb(
        guest, "debug",
        {
            {"info registers rip", R"(^rip +0x100000 +0x100000 <_start>$)"},
            {"info threads", R"(^\* 1 .*vCPU 0, kernel.* _start \(\))"},
            {"p $cs", R"(^\$\d+ = 16$)"},
            {"p $efer", R"(LMA)"},
            {"info registers cr0 cr4", R"(^cr0 .*PG)"},
            {"p/x $cr3 != 0", R"(= 0x1$)"},
            {"info symbol $rip", R"(^_start in section \.text)"},
            {"break work", R"(^Breakpoint 1 at 0x[0-9a-f]+: file .*debug\.cpp, line \d+\.$)"},
            {"continue", R"(^Breakpoint 1, work \(round=0\) at .*debug\.cpp:\d+$)"},
            {"bt",
             R"(^#0  work \(round=0\) at .*\n#1  0x[0-9a-f]+ in kernel_main \(.*\n#2  0x[0-9a-f]+ in _start \(\) at .*entry\.S:\d+$)"},
            {"p round", R"(^\$\d+ = 0$)"},
            {"info args", R"(^round = 0$)"},
            {"up", R"(^#1 .* in kernel_main )"},
            {"down", R"(^#0  work \(round=0\))"},
            {"p place.x + place.y", R"(= -1$)"},
            {"p place", R"(= \{x = 3, y = -4, name = 0x[0-9a-f]+ "a place"\}$)"},
            {"x/s place.name", R"(^0x[0-9a-f]+:\t"a place"$)"},
            {"p table", R"(= \{1, 1, 2, 3, 5, 8, 13, 21\}$)"},
            {"p *table@3", R"(= \{1, 1, 2\}$)"},
            {"x/3i $rip", R"(^=> 0x[0-9a-f]+ <work.*>:\tsub )"},
            {"tbreak depth", R"(^Temporary breakpoint 2 at )"},
            {"continue", R"(^Temporary breakpoint 2, depth \(levels=5\))"},
            {"finish", R"(^Value returned is \$\d+ = 6$)"},
            {"info registers rax", R"(^rax +0x6 +6$)"},
            {"advance triangle", R"(^triangle \(\) at )"},
            {"next", R"(\d+\t)"},
            {"info locals", R"(^total = \d+$)"},
            {"set var counter = 77", ""},
            {"p counter", R"(= 77$)"},
            {"set var $r15 = 0x123456789abcdef", ""},
            {"p/x $r15", R"(= 0x123456789abcdef$)"},
            {"set var $r15 = 0", ""},
            {"p $_siginfo", R"([uU]nable|No |not )"},
            {"p $xmm0.v4_int32", R"(= \{-?\d+, )"},
            {"info all-registers mxcsr", R"(^mxcsr +0x1f80 )"},
            {"disassemble idle", R"(^ +0x[0-9a-f]+ <\+0>:\tret)"},
            {"info line work",
             R"(^Line \d+ of .*debug\.cpp" starts at address 0x[0-9a-f]+ <work.* and ends at)"},
            {"delete", ""},
            {"break finished", R"(^Breakpoint 3 at )"},
            {"continue", R"(^Breakpoint 3, finished \(\))"},
            {"p counter", R"(= 86$)"}, // nine rounds after it was 77
            {"detach", R"(^\[Inferior 1 \(.*\) detached\]$)"},
        });
    guest.expect_pass();
}

} // namespace
} // namespace umbra
