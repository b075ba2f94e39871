// Sessions of the real gdb with shipped guests, command by command. Most are with the guest `debug`.
#include "tests/integration/debugged.hpp"
#include "tests/integration/host.hpp"

#include <chrono>
#include <csignal>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <unistd.h>

namespace umbra {
namespace {

class GdbTest : public KvmTest {
  protected:
    void SetUp() override {
        KvmTest::SetUp();
        if (!IsSkipped() && !HasFatalFailure() && program_file("gdb").empty())
            UMBRA_MISSING("gdb is not installed");
    }

    /// As gdb wants it in a session without the kernel's file: "*0x100000".
    static std::string place(const std::string& guest, const std::string& symbol) {
        return '*' + Child({program_file("gdb"), "-q", "-nx", "-batch", "-ex", "output/x (long)&" + symbol,
                            guest_file(guest)})
                         .end()
                         .out;
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

// --- Kernels that change the mode

/// gdb takes the width of registers when it connects, and refuses one that is not that of its file.
TEST_F(GdbTest, FollowsSixtyFourBitKernelsIntoLongMode) {
    struct Way {
        std::string protocol, file;
    };
    for (const Way& way : std::vector<Way>{
             {"multiboot1", "climb"}, {"multiboot2", "climb"}, {"pvh", "climb"}, {"multiboot1", ""}}) {
        SCOPED_TRACE(way.protocol + (way.file.empty() ? ", no file" : ""));
        const std::string low = way.file.empty() ? place("climb", "low_code") : "low_code",
                          high = way.file.empty() ? place("climb", "high_code") : "high_code";
        Debugged guest("climb", {.options = {"--protocol", way.protocol}});
        std::vector<Exchange> session{
            {"show architecture", R"(i386:x86-64"\)\.$)"},
            {"p $code_bits", "= 32$"},
            {"break " + low + " if $esi == 0x55667788", "^Breakpoint 1 at 0x10"},
            {"break " + high + " if $rcx == 0x11223344", "^Breakpoint 2 at 0xffffffff801"},
            {"continue", "^Breakpoint 1, "},
            {"p/x $rcx", "= 0x11223344$"},
            {"p/x $esi", "= 0x55667788$"},
            {"p $efer", "= \\[ \\]$"},
            {"x/wx $rsp", "\t0x00001234$"},
            {"stepi", "\t|^0x"},
            {"p/x $rcx", "= 0x11223345$"}, // INC ECX, which in 64-bit code is a prefix
            {"set var $rcx = $ecx", ""},
            {"continue", "^Breakpoint 2, "},
            {"p $code_bits", "= 64$"},
            {"p $efer", "LME LMA"},
            {"p/x $rsi", "= 0x55667788$"},
            {"stepi 6", "\t|^0x"},
            {"p/x $r15", "= 0x123456789abcdef$"},
        };
        if (!way.file.empty()) {
            session.push_back({"break climbed", "^Breakpoint 3 at "});
            session.push_back({"continue", R"(^Breakpoint 3, .*climbed \(height=3\))"});
            session.push_back({"bt", R"(climb_main \(\)[^]*^#2 .* in high_code \(\))"});
        }
        session.push_back({"continue", "exited normally"});
        run_gdb(guest, way.file, session);
        guest.expect_pass();
    }
}

/// A 32-bit file stays 32-bit for gdb, until it asks again.
TEST_F(GdbTest, FollowsThirtyTwoBitKernelsIntoLongMode) {
    const Debugged::Setup told{.options = {"--gdb-arch", "x86-64"}};
    for (const std::string file : {"long_way", "climb", ""}) { // the second: of the other kind
        SCOPED_TRACE(file);
        const std::string walk = place("long_way", "walk_through_64_bit_code");
        Debugged guest("long_way");
        run_gdb(guest, file,
                {
                    {"show architecture", R"("i386"\)\.$)"},
                    {"p $code_bits", "= 32$"},
                    {"x/i $eip", "\tmov +\\$0x[0-9a-f]+,%esp$"},
                    {"break " + walk + " if *(int*)($esp + 4) == 100 && $esp > $eip", "^Breakpoint 1 at "},
                    {"continue", "^Breakpoint 1, "},
                    {"p *(int*)($esp + 4)", "= 100$"},
                    {"stepi 8", "\t|^0x"},
                    {"p $code_bits", "= 64$"},
                    {"unset tdesc filename", ""},
                    {"show architecture", R"(i386:x86-64"\)\.$)"},
                    {"stepi 3", "\t|^0x"},
                    {"p/x $r8", "= 0x6400000000$"},
                    {"x/i $rip", "lea +\\(%r8,%r8,2\\),%r15$"},
                    {"delete", ""},
                    {"continue", "exited normally"},
                });
        guest.expect_pass();

        Debugged wide("long_way", told);
        run_gdb(wide, file,
                {
                    {"show architecture", R"(i386:x86-64"\)\.$)"},
                    {"break " + walk, "^Breakpoint 1 at "},
                    {"continue", "^Breakpoint 1, "},
                    {"p *(int*)($rsp + 4)", "= 1$"},
                    {"stepi 11", "\t|^0x"},
                    {"p/x $r8", "= 0x100000000$"},
                    {"delete", ""},
                    {"continue", "exited normally"},
                });
        wide.expect_pass();
    }
}

/// Of gdb's numbers of registers, those of the description are meant.
TEST_F(GdbTest, ConditionsOnThirtyTwoBitRegisters) {
    const std::string low = place("climb", "low_code"), next = low + " + 1";
    Debugged guest("climb", {.options = {"--gdb-arch", "i386"}});
    run_gdb(guest, "",
            {
                {"break " + low + " if $ecx != 0x11223344 || $esi != 0x55667788", "^Breakpoint 1 at "},
                {"break " + next + " if $ecx == 0x11223345 && $esi == 0x55667788", "^Breakpoint 2 at "},
                {"continue", "^Breakpoint 2, "},
                {"delete", ""},
                {"continue", "exited normally"},
            });
    guest.expect_pass();
}

// --- umbra debug

/// gdb decodes by the description, which does not change before the guest's first 64-bit code: its script
/// does.
TEST_F(GdbTest, DebugKnowsTheMode) {
    std::vector<std::string> arguments{"debug", "--log-level", "warning"};
    const auto say = [&arguments](const std::string& command) {
        arguments.insert(arguments.end(), {"--command", command});
    };
    for (const char* command : {"set style enabled off", "set width 0", "break low_code", "break high_code",
                                "continue", "x/2i $pc", "continue", "x/i $pc", "continue"})
        say(command);
    arguments.push_back(guest_file("climb"));
    const Ended climb = run_umbra(arguments);
    EXPECT_EQ(climb.exit_code, 0) << climb;
    EXPECT_NE(climb.out.find("<_start+20>:\tinc    %ecx\n"), std::string::npos) << climb;
    EXPECT_NE(climb.out.find("<_start+21>:\tdec    %ecx\n"), std::string::npos) << climb;
    EXPECT_NE(climb.out.find("<high_code>:\txor    %eax,%eax\n"), std::string::npos) << climb;
    EXPECT_NE(climb.out.find("exited normally"), std::string::npos) << climb;
    EXPECT_EQ(climb.out.find("Switching to inferior"), std::string::npos) << climb;

    arguments = {"debug", "--log-level", "warning"};
    for (const char* command :
         {"break walk_through_64_bit_code", "continue", "show architecture", "bt", "stepi 11",
          "show architecture", "p/x $r8", "umbra reset", "p $eip == _start", "kill"})
        say(command);
    arguments.push_back(guest_file("long_way"));
    const Ended way = run_umbra(arguments);
    EXPECT_EQ(way.exit_code, 130) << way;
    for (const char* said : {"currently \"i386\"", " in kernel_main (", "currently \"i386:x86-64\"",
                             "= 0x100000000\n", "$2 = 1\n"})
        EXPECT_NE(way.out.find(said), std::string::npos) << "not '" << said << "': " << way;

    // The symbols' file is gdb's.
    const Ended other = run_umbra({"debug", "--symbols", guest_file("climb"), "--command",
                                   "show architecture", "--command", "kill", guest_file("long_way")});
    EXPECT_NE(other.out.find("currently \"i386:x86-64\""), std::string::npos) << other;
}

/// A guest that did not come to its end has not passed, whatever the debugger's reasons.
TEST_F(GdbTest, DebugTellsOfGuestsThatDidNotEnd) {
    for (const char* command : {"kill", "detach", "disconnect", "quit", "python import os; os.abort()"}) {
        const Ended ended = run_umbra({"debug", "--command", command, guest_file("hello")});
        EXPECT_EQ(ended.exit_code, 130) << command << ": " << ended;
    }
    EXPECT_EQ(run_umbra({"debug", "--command", "continue", guest_file("hello")}).exit_code, 0);
    EXPECT_EQ(run_umbra({"debug", "--command", "continue", guest_file("fail")}).exit_code, 1);
}

// --- Steps

/// With a timer that interrupts 1000 times a second, which no step is to fall into.
TEST_F(GdbTest, StepsStayInTheCodeThatIsStepped) {
    Debugged guest("debug", {.words = {"ticks", "idle"}});
    run_gdb(guest, "debug",
            {
                {"break idle", "^Breakpoint 1 at "},
                {"continue", R"(^Breakpoint 1, idle \(\))"},
                {"set $before = ticks", ""},
                {"set $in_handlers = 0\n"
                 "set $i = 0\n"
                 "while $i < 200\n"
                 "  stepi\n"
                 "  set $i = $i + 1\n"
                 "  if $rip < (unsigned long)&depth || $rip >= (unsigned long)&kernel_main + 4096\n"
                 "    set $in_handlers = $in_handlers + 1\n"
                 "  end\n"
                 "end\n",
                 "asm volatile"},
                {"p $in_handlers", "= 0$"},
                {"p ticks - $before > 10", "= true$"}, // HLT is stepped over, too
                {"tbreak idle", "^Temporary breakpoint 2 at "},
                {"continue", R"(Breakpoint 1, idle \(\))"},
                {"finish", R"(^kernel_main \(|^0x[0-9a-f]+ in kernel_main \(|^Run till exit)"},
                {"next", R"(^\d+\t)"},
                {"next", R"(^\d+\t|idle \(\))"},
                {"delete", ""},
                {"set var released = 1", ""},
                {"break pushed_flags", "^Breakpoint 3 at "},
                {"continue", R"(^Breakpoint 3, pushed_flags \(\))"},
                {"stepi", "pushed_flags"},          // PUSHFQ
                {"p *(long*)$rsp & 0x100", "= 0$"}, // not the stepping flag
                {"stepi", "pushed_flags"},          // POP
                {"stepi", R"(\d+\t)"},              // CLI
                {"stepi", "pushed_flags"},          // PUSH
                {"set var *(long*)$rsp = 0x2", ""},
                {"stepi", "pushed_flags"}, // POPFQ: flags of its own, and the step ends
                {"p $eflags & 0x8d5", "= 0$"},
                {"stepi", R"(\d+\t)"}, // CLI
                {"x/i $rip", "ret"},
                {"stepi", "kernel_main|check_equal"},
                {"delete", ""},
                {"break work", "^Breakpoint 4 at "},
                {"continue", R"(^Breakpoint 4, work \(round=0\))"},
                {"step", R"(^fill \(value=0 )"},
                {"finish", R"(^work \(round=|in work \(round=)"},
                {"next", "CHECK_EQ\\(depth|CHECK_EQ\\(sum"},
                {"advance depth", R"(^depth \(levels=5\))"},
                {"until", R"(^\d+\t)"},
                {"finish", "= 6$"},
                {"advance triangle", R"(^triangle \(\))"},
                {"finish", R"(^Value returned is \$\d+ = 6$)"},
                {"continue", R"(^Breakpoint 4, work \(round=1\))"},
                {"delete", ""},
                {"break finished", "^Breakpoint 5 at "},
                {"continue", R"(^Breakpoint 5, finished \(\))"},
                {"p counter", "= 10$"},
                {"detach", "detached"},
            });
    guest.expect_pass();
}

TEST_F(GdbTest, StepsIntoHandlersIfAsked) {
    Debugged guest("debug", {.words = {"ticks", "idle"}});
    run_gdb(guest, "debug",
            {
                {"break idle", "^Breakpoint 1 at "},
                {"continue", R"(^Breakpoint 1, idle \(\))"},
                {"monitor step-interrupts on", "^step-interrupts: on$"},
                {"set $in_stubs = 0\n"
                 "set $i = 0\n"
                 "while $i < 200 && $in_stubs == 0\n"
                 "  stepi\n"
                 "  set $i = $i + 1\n"
                 "  if $rip >= (unsigned long)&trap_entry - 4096 && $rip < (unsigned long)&trap_entry\n"
                 "    set $in_stubs = $in_stubs + 1\n"
                 "  end\n"
                 "end\n",
                 "trap_stubs"},
                {"p $in_stubs", "= 1$"},
                {"monitor step-interrupts off", "^step-interrupts: off$"},
                {"set var released = 1", ""},
                {"detach", "detached"},
            });
    guest.expect_pass();
}

TEST_F(GdbTest, StepsBetweenKernelAndPrograms) {
    const std::string until_user = "while ($cs & 3) == 0\n  stepi\nend\n",
                      until_kernel = "while ($cs & 3) != 0\n  stepi\nend\n";
    Debugged guest("user");
    run_gdb(guest, "user",
            {
                {"break enter_user if ($rsi & 0xff) == 0", "^Breakpoint 1 at "},
                {"continue", R"(^Breakpoint 1, enter_user \(\))"},
                {until_user, "enter_user"}, // by IRETQ
                {"p (unsigned long)$rip >> 39", "= 2$"},
                {"p $cs & 3", "= 3$"},
                {"info threads", "vCPU 0, user"},
                {"x/i $rip", "^=> 0x100[0-9a-f]+:\t[a-z]+"},
                {until_kernel, "syscall_entry|^0x"},
                {"delete", ""},
                {"break enter_user if ($rsi & 0xff) == 1", "^Breakpoint 2 at "},
                {"continue", R"(^Breakpoint 2, enter_user \(\))"},
                {until_user, "enter_user"}, // by SYSRET
                {"p (unsigned long)$rip >> 39", "= 2$"},
                {"p (int)$eflags & 0x100", "= 0$"},
                {"x/i $rip", "\tsyscall$"},
                {"stepi", R"(^syscall_entry \(\))"},
                {"p $cs & 3", "= 0$"},
                {"p $r11 & 0x100", "= 0$"},
                {"bt 1", R"(^#0  syscall_entry \(\))"},
                {"stepi", R"(^\d+\t|syscall_entry)"},
                {"delete", ""},
                {"detach", "detached"},
            });
    guest.expect_pass();
}

TEST_F(GdbTest, StepsEndBehindStiAndMovSs) {
    Debugged guest("debug", {.words = {"shadows"}});
    std::vector<Exchange> session{
        {"break *shadows", "^Breakpoint 1 at "},
        {"continue", R"(^Breakpoint 1, .*shadows \(\))"},
        {"stepi", "asm"}, // CLI
        {"x/i $rip", R"(\+1>:\tsti)"},
        {"stepi", "asm"},
        {"x/i $rip", R"(\+2>:\tnop)"},
        {"p $eflags & 0x300", "= 512$"},
        {"stepi 2", "asm"},
        {"x/i $rip", R"(\+5>:\tmov +%eax,%ss)"},
    };
    if (!interprets_ring0()) // there the machine itself loads SS, and ends no step there
        session.insert(session.end(), {{"stepi", "asm"}, {"x/i $rip", R"(\+7>:\tnop)"}});
    session.insert(session.end(), {
                                      {"tbreak *((char*)shadows + 9)", "^Temporary breakpoint 2 at "},
                                      {"continue", R"(^Temporary breakpoint 2, )"},
                                      {"p $eflags & 0x300", "= 0$"},
                                      {"detach", "detached"},
                                  });
    run_gdb(guest, "debug", session);
    guest.expect_pass();
}

TEST_F(GdbTest, DebugRegistersAreTheGuests) {
    Debugged guest("debugregs");
    run_gdb(guest, "debugregs",
            {
                {"hbreak execution_breakpoints", "^Hardware assisted breakpoint 1 at "},
                {"hbreak off_is_off", "^Hardware assisted breakpoint 2 at "},
                {"continue", "^Breakpoint 1, .*execution_breakpoints"},
                {"continue", "^Breakpoint 2, .*off_is_off"},
                {"watch elsewhere[8]", R"(^Hardware watchpoint 3: elsewhere\[8\]$)"},
                {"continue", R"(^New value = 1$)"},
                {"bt 1", R"(^#0 .*off_is_off)"},
                {"p met", "= 0$"},
                {"p $dr6", "= 0xffff0ff1$|= 4294905841$"},
                {"stepi", R"(^trap_stubs \(\))"}, // the guest's own
                {"detach", "detached"},
            });
    guest.expect_pass();
}

TEST_F(GdbTest, OwnInt3IsTheGuests) {
    Debugged guest("debug", {.words = {"int3"}});
    run_gdb(guest, "debug",
            {
                {"break finished", "^Breakpoint 1 at "},
                {"break on_breakpoint", "^Breakpoint 2 at "},
                {"continue", R"(^Breakpoint 2, .*on_breakpoint)"},
                {"bt 2", R"(^#1 .* in (trap_entry|.*dispatch_trap))"},
                {"continue", R"(^Breakpoint 1, finished \(\))"},
                {"p breakpoints", "= 1$"},
                {"detach", "detached"},
            });
    guest.expect_pass();
}

// --- Breakpoints

TEST_F(GdbTest, BreakpointsWaitForTheirPages) {
    constexpr const char *function = "*0x18000000010",
                         *there = R"(^Breakpoint 1, 0x0000018000000010 in \?\? \(\))";
    for (const std::string command : {"break ", "hbreak "}) {
        SCOPED_TRACE(command);
        Debugged guest("debug", {.words = {"ticks"}});
        run_gdb(guest, "debug",
                {
                    {command + function, "reakpoint 1 at 0x18000000010$"},
                    {"x/i 0x18000000010", "Cannot access memory at address 0x18000000010"},
                    {"continue", there},
                    {"x/2i $rip", "^=> 0x18000000010:\tmov +\\$0x1,%eax\n +0x18000000015:\tret"},
                    {"bt", R"(^#1  0x[0-9a-f]+ in kernel_main \()"},
                    {"set $first = $cr3", ""},
                    {"stepi", "^0x0000018000000015 in"},
                    {"p $rax", "= 1$"},
                    {"continue", there}, // in the other address space
                    {"p $cr3 != $first", "= (1|true)$"},
                    {"x/i $rip", "mov +\\$0x2,%eax$"},
                    {"ignore 1 7", ""},
                    {"continue", there},
                    {"p *(long*)0x18000000000", "= 9$"},
                    {"info breakpoints", "already hit 10 times"},
                    {"delete", ""},
                    {"detach", "detached"},
                });
        guest.expect_pass();
    }
}

TEST_F(GdbTest, BreakpointsOfOneAddressSpace) {
    Debugged guest("debug");
    run_gdb(guest, "debug",
            {
                {"break work", "^Breakpoint 1 at "},
                {"continue", R"(^Breakpoint 1, work \(round=0\))"},
                {"monitor bind work current", "in the address space of CR3 .* only$"},
                {"continue", R"(^Breakpoint 1, work \(round=2\))"},
                {"continue", R"(^Breakpoint 1, work \(round=4\))"},
                {"monitor bind work any", "in all address spaces$"},
                {"continue", R"(^Breakpoint 1, work \(round=5\))"},
                {"detach", "detached"},
            });
    guest.expect_pass();
}

TEST_F(GdbTest, BreakpointsWithConditionsAndCommands) {
    Debugged guest("debug", {.words = {"ticks"}});
    run_gdb(
        guest, "debug",
        {
            {"break depth if levels == 2 && counter != 4", "^Breakpoint 1 at "},
            {"break cross\ncommands\nsilent\nprintf \"<%lu,%u>\", value, buffer[0]\ncontinue\nend\n",
             "^Breakpoint 2 at "},
            {"tbreak fill", "^Temporary breakpoint 3 at "},
            {"break finished", "^Breakpoint 4 at "},
            {"set dprintf-style agent", ""},
            {"dprintf triangle,\"{%d %lu %s}\\n\", (int)table[5], counter, place.name", "^Dprintf 5 at "},
            {"continue", R"(^Temporary breakpoint 3, fill \(value=0 )"},
            {"ignore 1 8", ""},
            {"continue",
             R"(\{8 1 a place\}\n<0,0>\{8 2 a place\}\n<1,1>\{8 3 a place\}\n<2,2>[^]*\n<7,7>\{8 9 a place\}\n<8,8>\n*Breakpoint 1, depth \(levels=2\))"},
            {"p counter", "= 9$"},
            {"bt -2", R"(in kernel_main \()"},
            {"continue", R"(^\{8 10 a place\}\n<9,9>\n*Breakpoint 4, finished \(\))"},
            {"info breakpoints", R"(if levels == 2[^]*already hit 9 times)"},
            {"continue", R"(^\[Inferior 1 \(.*\) exited normally\]$)"},
        });
    guest.expect_pass();
}

TEST_F(GdbTest, ManyBreakpoints) {
    Debugged guest("debug", {.words = {"ticks"}});
    run_gdb(guest, "debug",
            {
                // The stubs of traps that never come.
                {"set $i = 100\n"
                 "while $i < 200\n"
                 "  break *((unsigned long)&trap_entry - 4096 + 16 * $i)\n"
                 "  set $i = $i + 1\n"
                 "end\n",
                 "^Breakpoint 100 at "},
                {"break sum", "^Breakpoint 101 at "},
                {"continue", R"(^Breakpoint 101, sum \(\))"},
                {"ignore 101 8", ""},
                {"continue", R"(^Breakpoint 101, sum \(\))"},
                {"p counter", "= 9$"},
                {"compare-sections .text", "matched\\.$"}, // nothing of them is seen
                {"delete", ""},
                {"detach", "detached"},
            });
    guest.expect_pass();
}

TEST_F(GdbTest, CodeIsChangedByVisibleBreakpointsOnly) {
    const std::vector<Exchange> session{
        {"break work", "^Breakpoint 1 at "},
        {"continue", R"(^Breakpoint 1, work \(round=0\))"},
        {"break *((long)&depth + 4)\nbreak depth\n", "^Breakpoint 3 at "},
        {"continue", R"(^Breakpoint 3, depth \(levels=5\))"},
        {"delete 1 2", ""},
        {"ignore 3 1000", ""},
        {"continue", "exited normally"},
    };
    std::vector<Exchange> hidden = session;
    hidden.insert(hidden.begin(), {"monitor hidden-breakpoints on", "^hidden-breakpoints: on$"});
    for (const bool hide : {false, true}) {
        SCOPED_TRACE(hide);
        Debugged guest("debug");
        run_gdb(guest, "debug", hide ? hidden : session);
        guest.expect_pass();
        EXPECT_EQ(guest.child().output().find("the code has changed") == std::string::npos, hide)
            << guest.child().output();
    }
}

// --- Watchpoints

/// Guards make each instruction that touches the stack's page a few traps. Of a handler that takes longer
/// than the timer's period the guest would not get anywhere.
const std::vector<std::string> interruptions{"slow-ticks"};

/// Continues until finished() is reached, quickly.
const std::string to_the_end = "while $rip != (void (*)())&finished\n  continue\nend\n";

TEST_F(GdbTest, WatchpointsAreExact) {
    Debugged guest("debug", {.words = interruptions});
    run_gdb(guest, "debug",
            {
                {"break finished", "^Breakpoint 1 at "},
                {"watch buffer[7]", R"(^Hardware watchpoint 2: buffer\[7\]$)"},
                {"watch *(short*)&buffer[10]", "^Hardware watchpoint 3: "},
                {"watch *(int*)&buffer[16]", "^Hardware watchpoint 4: "},
                {"watch *(long*)&buffer[24]", "^Hardware watchpoint 5: "},
                {"watch late_page[3]", "^Hardware watchpoint 6: "},
                {"watch *(char*)&two_pages[4091]", "^Hardware watchpoint 7: "},
                {"watch *(char*)&two_pages[4092]", "^Hardware watchpoint 8: "},
                {"awatch *(char*)&two_pages[4100]", "^Hardware access \\(read/write\\) watchpoint 9: "},
                {"awatch counter", "^Hardware access \\(read/write\\) watchpoint 10: "},
                {to_the_end, "^Breakpoint 1, finished"},
                {"info breakpoints 1", "already hit 1 time$"},
                {"info breakpoints 2", "already hit 10 times"}, // 0 -> 7, 7 -> 8 ...
                {"info breakpoints 3", "already hit 20 times"},
                {"info breakpoints 4", "already hit 40 times"},
                {"info breakpoints 5", "already hit 80 times"},
                {"info breakpoints 6", "already hit 1 time$"},
                {"info breakpoints 7", "two_pages\\[4091\\]$"},
                {"info breakpoints 8", "already hit 9 times"}, // the first writes the 0 that is there
                {"info breakpoints 9", "two_pages\\[4100\\]$"},
                {"info breakpoints 10", "already hit (10|20) times"}, // a read and a write, or both at once
                {"delete", ""},
                {"continue", "exited normally"},
            });
    guest.expect_pass();
}

TEST_F(GdbTest, WatchpointsOfReads) {
    Debugged guest("debug", {.words = interruptions});
    run_gdb(guest, "debug",
            {
                {"break finished", "^Breakpoint 1 at "},
                {"rwatch table[3]", R"(^Hardware read watchpoint 2: table\[3\]$)"},
                {"rwatch buffer", "^Hardware read watchpoint 3: buffer$"},
                // In the second page of what is written across both.
                {"awatch *(char*)&two_pages[4099]", "^Hardware access \\(read/write\\) watchpoint 4: "},
                {to_the_end, "^Breakpoint 1, finished"},
                {"info breakpoints 2", "already hit 10 times"},
                {"info breakpoints 3", "buffer$"}, // is only written
                {"info breakpoints 4", "already hit 10 times"},
                {"delete", ""},
                {"continue", "exited normally"},
            });
    guest.expect_pass();
}

TEST_F(GdbTest, WatchpointsTellTheHistory) {
    if (!emulated_host()) { // where 639 stops take minutes
        Debugged guest("debug", {.words = interruptions});
        run_gdb(guest, "debug",
                {
                    {"break finished", "^Breakpoint 1 at "},
                    {"watch buffer", "^Hardware watchpoint 2: buffer$"},
                    {to_the_end, "^Breakpoint 1, finished"},
                    {"info breakpoints 2", "already hit 639 times"}, // all 64 bytes, but for the first 0
                    {"delete", ""},
                    {"continue", "exited normally"},
                });
        guest.expect_pass();
    }

    Debugged other("debug", {.words = interruptions});
    run_gdb(other, "debug",
            {
                {"break finished", "^Breakpoint 1 at "},
                {"watch counter\ncommands\nsilent\nprintf \"<%lu>\", counter\ncontinue\nend\n",
                 "^Hardware watchpoint 2: counter$"},
                {"continue", "^<1><2><3><4><5><6><7><8><9><10>\n*Breakpoint 1, finished"},
                {"delete", ""},
                {"detach", "detached"},
            });
    other.expect_pass();
}

TEST_F(GdbTest, WatchpointsOnTheStackAndInOneAddressSpace) {
    Debugged guest("debug", {.words = interruptions});
    run_gdb(guest, "debug",
            {
                {"break triangle", "^Breakpoint 1 at "},
                {"continue", R"(^Breakpoint 1, triangle \(\))"},
                {"next", R"(^\d+\t)"},
                {"watch total", "^Hardware watchpoint 2: total$"},
                {"continue", "^Old value = 0\nNew value = 1$"},
                {"continue", "^Old value = 1\nNew value = 3$"},
                {"continue", "^Old value = 3\nNew value = 6$"},
                {"continue", "^Watchpoint 2 deleted because the program has left the block"},
                {"delete", ""},
                // Mapped in both address spaces, to frames of their own.
                {"watch *(long*)0x18000000000", "^Hardware watchpoint 3: "},
                {"continue", "^Old value = 0\nNew value = 1$"},
                {"continue", "^Old value = 1\nNew value = 2$"},
                {"monitor bind 0x18000000000 current", "in the address space of CR3 .* only$"},
                {"continue", "^Old value = 2\nNew value = 4$"},
                {"continue", "^Old value = 4\nNew value = 6$"},
                {"delete", ""},
                {"monitor watch phys 0x9000 8 w", "0x9000"},
                {"monitor unwatch all", "^no physical watchpoints$"},
                {"detach", "detached"},
            });
    guest.expect_pass();
}

// --- Ctrl-C

TEST_F(GdbTest, InterruptsGuestsThatListenToNothing) {
    for (const std::string word : {"wait", "sleep"}) {
        SCOPED_TRACE(word);
        Debugged guest("debug", {.words = {word}});
        std::vector<Exchange> session{
            {"continue", R"(^Program received signal SIGINT, Interrupt\.[^]*kernel_main \()"},
            {"bt 1", R"(^#0 .*kernel_main \()"},
            {"p (int)$eflags & 0x200", "= 0$"},
            {"stepi", "\t"},
            {"set var released = 1", ""},
            {"break work", "^Breakpoint 1 at "},
        };
        if (word == "sleep") {
            session.erase(session.begin() + 3); // it would not end
            session.push_back({"kill", "killed"});
        } else {
            session.push_back({"continue", R"(^Breakpoint 1, work \(round=0\))"});
            session.push_back({"detach", "detached"});
        }
        Gdb gdb(guest, "debug", session);
        ASSERT_TRUE(guest.child().wait_for(word == "wait" ? "debug: waiting" : "debug: asleep"));
        gdb.child().run_for(std::chrono::milliseconds(100)); // it has said all, and only waits
        gdb.child().send_signal(SIGINT);
        gdb.expect_answers();
        if (word == "wait")
            guest.expect_pass();
        else
            guest.expect_end(130, "umbra: interrupted: killed by the debugger");
    }
}

// --- Memory

TEST_F(GdbTest, MemoryIsReadAndWrittenThroughTheGuestsTables) {
    const std::string file = folder_.file("table");
    Debugged guest("debug");
    run_gdb(
        guest, "debug",
        {
            {"break work", "^Breakpoint 1 at "},
            {"continue", R"(^Breakpoint 1, work \(round=0\))"},
            {"x/4xb 0x7f0000000000", "^0x7f0000000000:\tCannot access memory at address 0x7f0000000000$"},
            {"x/2gx 0xffff900000000000", "Cannot access memory at address 0xffff900000000000$"},
            {"p *(char*)0x0000900000000000", "Cannot access memory"}, // not canonical
            {"x/4xg 0x18000000ff0", "^0x18000000ff0:\t0x0000000000000000\t0x0000000000000000\n0x18000001000:"
                                    "\tCannot access memory at "
                                    "address 0x18000001000$"},
            {"set var *(char*)0x7f0000000000 = 1", "^Cannot access memory at address 0x7f0000000000$"},
            {"p/x *(unsigned char*)&idle", "= 0x[0-9a-f]+$"},
            {"set $byte = *(unsigned char*)&idle", ""},
            {"set var *(unsigned char*)&idle = 0xf4", ""},
            {"x/i &idle", "\thlt"},
            {"compare-sections .text", "^Section \\.text, range 0x[0-9a-f]+ -- 0x[0-9a-f]+: MIS-MATCHED!$"},
            {"set var *(unsigned char*)&idle = $byte", ""},
            {"compare-sections .text", "^Section \\.text, range 0x[0-9a-f]+ -- 0x[0-9a-f]+: matched\\.$"},
            {"compare-sections .rodata", "matched\\.$"},
            {"maint packet Qqemu.PhyMemMode:1", "^received: \"OK\"$"},
            {"maint packet qqemu.PhyMemMode", "^received: \"1\"$"},
            {"x/xg $cr3 & ~0xfff", "^0x[0-9a-f]+:\t0x[0-9a-f]+[37]$"}, // the root, and its first entry
            {"x/xg 0x18000000000", "Cannot access memory"},
            {"x/xg 0x100000000000", "Cannot access memory"},
            {"maint packet Qqemu.PhyMemMode:0", "^received: \"OK\"$"},
            {"find &table, +64, 13L", "<table\\+48>\n1 pattern found\\.$"},
            {"find &table, +64, 99L", "^Pattern not found\\.$"},
            {"find /b &place, +4096, 'a', ' ', 'p', 'l'", "Pattern not found|pattern"},
            {"dump binary memory " + file + " &table[0] &table[8]", ""},
            {"set var table[3] = 99", ""},
            {"p table[3]", "= 99$"},
            {"restore " + file + " binary &table[0]", "^Restoring binary file "},
            {"p table", R"(= \{1, 1, 2, 3, 5, 8, 13, 21\}$)"},
            {"restore " + file + " binary 0x7f0000000000", "memory write failed"},
            {"monitor pt work", "."},
            {"monitor vtop 0x18000000000", "0x[0-9a-f]+"},
            {"detach", "detached"},
        });
    guest.expect_pass();
}

/// What gdb changes, the guest sees: also in its own page tables.
TEST_F(GdbTest, WritesAreSeenByTheGuest) {
    Debugged guest("debug");
    run_gdb(guest, "debug",
            {
                {"break sum", "^Breakpoint 1 at "},
                {"continue", R"(^Breakpoint 1, sum \(\))"},
                {"set var table[0] = 2", ""},
                {"delete", ""},
                {"continue", R"(exited with code 01\]$)"},
            });
    guest.expect_end(1, "debug.cpp");
    EXPECT_NE(guest.child().output().find("umbra: failed with code 101"), std::string::npos);

    Debugged other("debug");
    run_gdb(other, "debug",
            {
                {"break work if round == 2", "^Breakpoint 1 at "},
                {"continue", R"(^Breakpoint 1, work \(round=2\))"},
                // The entry of the page that both address spaces map elsewhere, found by hand.
                {"set $entry = *(unsigned long*)(($cr3 & ~0xfff) + 8 * 3) & 0xffffffffff000", ""},
                {"set $entry = *(unsigned long*)$entry & 0xffffffffff000", ""},
                {"set $entry = *(unsigned long*)$entry & 0xffffffffff000", ""},
                {"x/xg $entry", "0x[0-9a-f]+[37]$"},
                {"set var *(unsigned long*)$entry = 0", ""},
                {"p *(long*)0x18000000000", "Cannot access memory"},
                {"delete", ""},
                {"continue", R"(exited with code 01\]$)"},
            });
    other.expect_end(1, "umbra: failed with code 102");
}

// --- Ends

TEST_F(GdbTest, PanicsStayToBeLookedAt) {
    Debugged guest("debug", {.words = {"panic"}});
    run_gdb(
        guest, "debug",
        {
            {"continue",
             R"(^umbra: triple fault: while vector 6 was delivered[^]*^Program received signal SIGABRT, Aborted\.[^]*kernel_main \()"},
            {"x/i $rip", "\tud2"},
            {"bt", R"(^#0 .*kernel_main \([^]*^#1 .*_start \(\))"},
            {"p counter", "= 10$"},
            {"p/x $idtr_base", "= 0x0$"},
            {"continue", R"(exited with code 03\]$)"},
        });
    guest.expect_end(3, "umbra: triple fault");

    Debugged triple("triple");
    run_gdb(triple, "triple",
            {
                {"continue", "^Program received signal SIGABRT, Aborted"},
                {"kill", R"(^\[Inferior 1 \(.*\) killed\]$)"},
            });
    triple.expect_end(3, "umbra: triple fault");
}

TEST_F(GdbTest, CatchesEventsBeforeTheGuestSeesThem) {
    Debugged guest("debug", {.words = {"int3", "panic"}});
    run_gdb(guest, "debug",
            {
                {"monitor catch cr3", "cr3"},
                {"continue", R"(^umbra: mov cr3[^]*^Program received signal SIGTRAP[^]*write_cr3)"},
                {"x/i $rip", "\tmov +%r[a-z0-9]+,%cr3$"},
                {"monitor uncatch all", "^caught: nothing"},
                {"monitor catch bp ud", "bp.*ud|ud.*bp"},
                {"continue", R"(^umbra: vector 3[^]*SIGTRAP)"},
                {"p breakpoints", "= 0$"},
                {"continue", R"(^umbra: vector 6[^]*^Program received signal SIGILL)"},
                {"p breakpoints", "= 1$"},
                {"x/i $rip", "\tud2"},
                {"kill", "killed"},
            });
    guest.expect_end(130, "umbra: interrupted: killed by the debugger");
}

TEST_F(GdbTest, EndsAreTold) {
    struct End {
        std::string guest;
        std::vector<Exchange> session;
        int exit_code;
        std::string said;
    };
    const std::vector<End> ends{
        {"hello", {{"continue", R"(^\[Inferior 1 \(.*\) exited normally\]$)"}}, 0, "umbra: passed"},
        {"fail",
         {{"continue", R"(^\[Inferior 1 \(.*\) exited with code 01\]$)"}, {"p $_exitcode", "= 1$"}},
         1,
         "umbra: failed with code 7"},
        {"hello",
         {{"kill", R"(^\[Inferior 1 \(.*\) killed\]$)"}},
         130,
         "umbra: interrupted: killed by the debugger"},
        {"hello", {{"monitor quit", "."}}, 130, "umbra: interrupted: killed by the debugger"},
    };
    for (const End& end : ends) {
        SCOPED_TRACE(end.guest + ": " + end.session.front().command);
        Debugged guest(end.guest);
        run_gdb(guest, end.guest, end.session);
        guest.expect_end(end.exit_code, end.said);
    }
}

// --- Coming and going

TEST_F(GdbTest, ConnectsToRunningGuestsAgainAndAgain) {
    Debugged guest("debug", {.pause = false, .words = {"ticks", "idle"}});
    ASSERT_TRUE(guest.child().wait_for("debug: idle"));
    for (int i = 0; i < 3; ++i)
        run_gdb(guest, "debug",
                {
                    {"bt -2", "kernel_main|trap_entry"},
                    {"break idle", "^Breakpoint 1 at "},
                    {"continue", R"(^Breakpoint 1, idle \(\))"},
                    {"detach", "detached"},
                });
    // gdb dies with its breakpoints in place: while the guest stands still, and while it runs.
    for (const std::string last : {"shell kill -9 $PPID", "continue"}) {
        Gdb gdb(guest, "debug",
                {
                    {"break idle\nbreak work\n", "^Breakpoint 2 at "},
                    {"continue", R"(^Breakpoint 1, idle \(\))"},
                    {"delete 1", ""},
                    {last, ""},
                });
        ASSERT_TRUE(gdb.child().wait_for(mark(3)));
        gdb.child().run_for(std::chrono::milliseconds(100));
        gdb.child().send_signal(SIGKILL);
        EXPECT_EQ(gdb.child().end().signal, SIGKILL);
    }
    run_gdb(guest, "debug", {{"set var released = 1", ""}, {"detach", "detached"}});
    guest.expect_pass();
}

TEST_F(GdbTest, ResetStartsAnew) {
    Debugged guest("debug");
    run_gdb(guest, "debug",
            {
                {"break work if round == 3", "^Breakpoint 1 at "},
                {"continue", R"(^Breakpoint 1, work \(round=3\))"},
                {"monitor reset", "."},
                {"maint flush register-cache", ""},
                {"info registers rip", "<_start>$"},
                {"continue", R"(^Breakpoint 1, work \(round=3\))"},
                {"p counter", "= 3$"},
                {"detach", "detached"},
            });
    guest.expect_pass();
}

// --- A real program

TEST_F(GdbTest, DebugsMemtestWithoutSymbols) {
    const std::string memtest = "/boot/memtest86+x64.bin";
    if (::access(memtest.c_str(), R_OK) != 0)
        UMBRA_MISSING(memtest + " is missing: install memtest86+");
    Debugged guest(memtest, {.options = {"-m", "64M", "--append", "console=ttyS0,115200"}});
    run_gdb(guest, "",
            {
                {"x/2i $pc", "=> 0x100200:\tcld[^]*0x100201:\tcli"},
                {"break *0x100202", "^Breakpoint 1 at 0x100202$"},
                {"continue", R"(^Breakpoint 1, 0x0*100202 in \?\? \(\)$)"},
                {"watch *(char(*)[4096])0xb8000", "^Hardware watchpoint 2: "}, // the screen
                {"continue", R"(^Old value = " \\a \\a \\a)"},
                {"bt 2", R"(^#0 +0x[0-9a-f]+ in \?\? \(\)\n#1 +0x[0-9a-f]+ in )"},
                {"continue", R"(^New value = ")"},
                {"delete", ""},
                {"kill", "killed"},
            });
}

} // namespace
} // namespace umbra
