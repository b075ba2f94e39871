// Sessions of the real LLDB, which speaks gdb's protocol with words of its own.
#include "tests/integration/debugged.hpp"
#include "tests/integration/host.hpp"

#include <string>
#include <utility>
#include <vector>

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

    static void run(Debugged& guest, const std::vector<Exchange>& session) {
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
        command.push_back(guest_file("debug"));
        const Ended ended =
            Child(command, {.prepare = [] { return ::dup2(STDOUT_FILENO, STDERR_FILENO) >= 0; }}).end();
        expect_answers(ended, session);
    }
};

TEST_F(LldbTest, DebugsByTcp) {
    Debugged guest("debug", {.address = "127.0.0.1:0"});
    run(guest, {
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

} // namespace
} // namespace umbra
