// Sessions of the real LLDB, which speaks gdb's protocol with words of its own.
#include "tests/integration/debugged.hpp"
#include "tests/integration/host.hpp"
#include "vmm/symbols.hpp"

#include <span>
#include <string>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

std::string lldb_file() {
    const std::string plain = program_file("lldb");
    return plain.empty() ? program_file("lldb-14") : plain;
}

class LldbTest : public KvmTest {
  protected:
    void SetUp() override {
        KvmTest::SetUp();
        if (emulated_host())
            GTEST_SKIP() << "LLDB has not been tried on an emulated host";
        if (!IsSkipped() && !HasFatalFailure() && lldb_file().empty())
            UMBRA_MISSING("lldb is not installed");
    }

    static void run(Debugged& guest, const std::string& kernel, const std::vector<Exchange>& session) {
        std::vector<std::string> command{lldb_file(), "--no-lldbinit", "--batch", "--no-use-colors"};
        const auto give = [&command](const std::string& text) {
            command.insert(command.end(), {"-o", text});
        };
        give("settings set plugin.process.gdb-remote.packet-timeout 60");
        give("gdb-remote " + guest.address());
        for (std::size_t i = 0; i < session.size(); ++i) {
            give("shell echo " + mark(i));
            give(session[i].command);
        }
        give("shell echo " + mark(session.size()));
        if (!kernel.empty())
            command.push_back(guest_file(kernel));
        const Ended ended =
            Child(command, {.prepare = [] { return ::dup2(STDOUT_FILENO, STDERR_FILENO) >= 0; }}).end();
        expect_answers(ended, session);
    }
};

TEST_F(LldbTest, DebugsByTcp) {
    Debugged guest("debug", {.address = "127.0.0.1:0"});
    run(guest, "debug",
        {
            {"register read rip cs cr3", "rip = 0x0*100000[^]*cs = 0x0*10"},
            {"breakpoint set --name work", "^Breakpoint 1: where = debug`.*work"},
            {"continue", "stop reason = breakpoint 1"},
            {"bt", "work\\(round=0\\)[^]*kernel_main"},
            {"frame variable round", "round = 0$"},
            {"thread step-inst", "stop reason = instruction step into"},
            {"memory read --format x --size 8 --count 3 `&table`", "0x0*1 0x0*1\n.*0x0*2"},
            {"expression -- table[7]", " 21$"},
            {"memory write --size 8 `&counter` 40", "^\\(lldb\\) memory write [^\n]*$"},
            {"expression -- counter", " 64$"}, // the number was hexadecimal
            {"watchpoint set variable counter", "^Watchpoint created: Watchpoint 1: "},
            {"continue", "stop reason = watchpoint 1"},
            {"expression -- counter", " 65$"},
            {"watchpoint delete --force", "removed"},
            {"breakpoint disable", "disabled"},
            {"breakpoint set --name finished", "^Breakpoint 2: where = debug`.*finished"},
            {"continue", "stop reason = breakpoint 2"},
            {"process detach", "process detach"}, // that it is done, LLDB says at any time
        });
    guest.expect_pass();
}

TEST_F(LldbTest, FollowsKernelsIntoLongMode) {
    const std::string kernel = contents_of(guest_file("climb"));
    const Symbols symbols = Symbols::from_elf(std::as_bytes(std::span(kernel)));
    const auto start = symbols.function("_start"), high_code = symbols.function("high_code");
    ASSERT_TRUE(start && high_code);
    constexpr unsigned to_low_code = 20; // bytes
    const std::string low = fmt::format("{:x}", start->start.value() + to_low_code),
                      next = fmt::format("{:x}", start->start.value() + to_low_code + 1),
                      high = fmt::format("{:x}", high_code->start.value());
    for (const std::string file : {"climb", ""}) {
        SCOPED_TRACE(file);
        Debugged guest("climb", {.address = "127.0.0.1:0"});
        run(guest, file,
            {
                {"register read rip code_bits", "rip = 0x0*1000[^]*code_bits = 0x0*20$"},
                {"breakpoint set --address 0x" + low, "^Breakpoint 1: "},
                {"breakpoint set --address 0x" + high, "^Breakpoint 2: "},
                {"continue", "stop reason = breakpoint 1"},
                {"register read rcx rsi", "rcx = 0x0*11223344$[^]*rsi = 0x0*55667788$"},
                {"disassemble --arch i386 --count 1 --start-address 0x" + low, "incl? +%ecx"},
                {"thread step-inst", "stop reason = instruction step into"},
                {"register read rip rcx", "rip = 0x0*" + next + "[^]*rcx = 0x0*11223345$"},
                {"continue", "stop reason = breakpoint 2"},
                {"register read rip code_bits", "rip = 0x" + high + "[^]*code_bits = 0x0*40$"},
                {"breakpoint disable", "disabled"},
                {"process detach", "process detach"},
            });
        guest.expect_pass();
    }
}

} // namespace
} // namespace umbra
