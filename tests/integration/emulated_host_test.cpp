// umbra on an emulated host: what goes in and comes out, and what is left when something is killed. On any
// computer, with KVM or without; but not on an emulated host, whose emulation of a second one would take
// minutes.
#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"

#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

using testing::HasSubstr;

class EmulatedHostTest : public testing::Test {
  protected:
    void SetUp() override {
        if (std::getenv("UMBRA_EMULATED_HOST") != nullptr)
            GTEST_SKIP() << "this is one";
        ASSERT_EQ(::setenv("UMBRA_HOST", "emulated", 1), 0);
    }
    void TearDown() override { ::unsetenv("UMBRA_HOST"); }
};

/// The processes that `parent` has started.
std::vector<pid_t> children_of(pid_t parent) {
    std::vector<pid_t> children;
    const std::string list =
        contents_of("/proc/" + std::to_string(parent) + "/task/" + std::to_string(parent) + "/children");
    for (std::size_t at = 0; at < list.size(); at = list.find(' ', at) + 1)
        children.push_back(static_cast<pid_t>(std::stol(list.substr(at))));
    return children;
}

std::string name_of(pid_t process) {
    return contents_of("/proc/" + std::to_string(process) + "/comm");
}

bool gone(pid_t process) {
    const auto deadline = std::chrono::steady_clock::now() + patience;
    while (::kill(process, 0) == 0 && std::chrono::steady_clock::now() < deadline)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    return ::kill(process, 0) != 0;
}

TEST_F(EmulatedHostTest, AGuestRunsAsOnThisOne) {
    const Ended ended = run_umbra({"run", guest_file("hello"), "--", "some", "words"});
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_THAT(ended.out, HasSubstr("command line \"some words\"")) << ended;
    EXPECT_EQ(ended.err, "umbra: passed\n");
}

TEST_F(EmulatedHostTest, FilesAreThisComputersOwn) {
    const TemporaryFolder folder;
    const std::string kernel = folder.file("a kernel"), result = folder.file("a result"),
                      trace = folder.file("a trace"), core = folder.file("a core");
    std::filesystem::copy_file(guest_file("fail"), kernel);
    const Ended ended =
        run_umbra({"run", "--result", result, "--trace", trace, "--core-on-failure", core, kernel});
    EXPECT_EQ(ended.exit_code, 1) << ended;
    const auto json = nlohmann::json::parse(contents_of(result), nullptr, false);
    EXPECT_EQ(json.value("code", 0), 7) << contents_of(result);
    EXPECT_THAT(contents_of(trace), HasSubstr("port_write"));
    EXPECT_EQ(contents_of(core).substr(1, 3), "ELF");

    std::filesystem::permissions(folder.file(""),
                                 std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
    const Ended missing = run_umbra({"run", folder.file("no such kernel")});
    EXPECT_EQ(missing.exit_code, 2) << missing;
    std::filesystem::permissions(folder.file(""), std::filesystem::perms::owner_all);
}

TEST_F(EmulatedHostTest, KeysReachTheGuestAndCtrlCEndsIt) {
    Child child(umbra_command({"run", guest_file("echo")}), {.input = Child::Input::terminal});
    ASSERT_TRUE(child.wait_for("echo: ready")) << child.end();
    ASSERT_TRUE(child.type("what is said\n"));
    EXPECT_TRUE(child.wait_for("echo: [what is said]")) << child.output();
    ASSERT_TRUE(child.type("\x03"));
    EXPECT_EQ(child.end().exit_code, 130) << child.end();
    const termios now = child.terminal_attributes(), first = child.first_terminal_attributes();
    EXPECT_EQ(now.c_lflag, first.c_lflag);
    EXPECT_EQ(now.c_oflag, first.c_oflag);
}

TEST_F(EmulatedHostTest, SignalsAndTimeLimitsEndIt) {
    Child child(umbra_command({"run", guest_file("spin"), "--", "counting"}));
    ASSERT_TRUE(child.wait_for("spin: going round")) << child.end();
    child.send_signal(SIGINT);
    EXPECT_EQ(child.end().exit_code, 130) << child.end();

    Child early(umbra_command({"run", guest_file("spin")}));
    child.send_signal(SIGTERM);
    early.send_signal(SIGTERM);
    EXPECT_NE(early.end().exit_code, 0) << early.end();

    const Ended late = run_umbra({"run", "--timeout", "1", guest_file("spin"), "--", "counting"});
    EXPECT_EQ(late.exit_code, 124) << late;
}

TEST_F(EmulatedHostTest, GdbConnectsFromOutside) {
    const std::string umbra = (build_folder() / "umbra").string(), kernel = guest_file("debug");
    Child child({"/bin/sh", "-c", umbra + " run --gdb 0 --pause " + kernel + " 2>&1"});
    ASSERT_TRUE(child.wait_for("target remote 127.0.0.1:")) << child.end();
    ASSERT_TRUE(child.wait_for("'\n")) << child.end();
    const std::string address = child.output().substr(child.output().find("127.0.0.1:"));
    Child gdb({"/usr/bin/gdb", "-q", "-batch", "-ex",
               "target remote " + address.substr(0, address.find('\'')), "-ex", "break work", "-ex",
               "continue", "-ex", "kill", kernel});
    EXPECT_THAT(gdb.end().out, HasSubstr("Breakpoint 1, work (round=round@entry=0)")) << gdb.end();
    EXPECT_EQ(child.end().exit_code, 130) << child.end();

    const Ended debugged = run_umbra({"debug", "--command", "break work", "--command", "continue",
                                      "--command", "kill", "--command", "quit", kernel});
    EXPECT_THAT(debugged.out, HasSubstr("Breakpoint 1, work (round=round@entry=0)")) << debugged;
    EXPECT_EQ(debugged.exit_code, 130) << debugged;
}

TEST_F(EmulatedHostTest, ThatGoesDownIsNoPass) {
    const TemporaryFolder folder;
    const std::string pid_file = folder.file("pid");
    Child child({"/bin/sh", "-c",
                 "echo $$ >" + pid_file + "; exec " + (build_folder() / "umbra").string() + " run " +
                     guest_file("spin") + " counting"});
    ASSERT_TRUE(child.wait_for("spin: going round")) << child.end();
    for (const pid_t helper : children_of(static_cast<pid_t>(std::stol(contents_of(pid_file)))))
        if (name_of(helper).starts_with("qemu"))
            ::kill(helper, SIGKILL);
    EXPECT_EQ(child.end().exit_code, 3) << child.end();
    EXPECT_THAT(child.end().err, HasSubstr("the emulated host went down: QEMU was ended by signal 9"));
}

TEST_F(EmulatedHostTest, DoesNotOutliveUmbra) {
    const TemporaryFolder folder;
    const std::string pid_file = folder.file("pid");
    Child child({"/bin/sh", "-c",
                 "echo $$ >" + pid_file + "; exec " + (build_folder() / "umbra").string() + " run " +
                     guest_file("spin") + " counting"});
    ASSERT_TRUE(child.wait_for("spin: going round")) << child.end();
    const std::vector<pid_t> helpers = children_of(static_cast<pid_t>(std::stol(contents_of(pid_file))));
    EXPECT_GE(helpers.size(), 1U);
    child.send_signal(SIGKILL);
    EXPECT_EQ(child.end().signal, SIGKILL);
    for (const pid_t helper : helpers)
        EXPECT_TRUE(gone(helper)) << name_of(helper);
}

TEST_F(EmulatedHostTest, OneServesAllCases) {
    const TemporaryFolder folder;
    const std::string junit = folder.file("junit.xml");
    const Ended ended =
        run_umbra({"test", "--filter=hello", "--filter=fail", "--filter=triple", "--output",
                   folder.file("results"), "--junit", junit, (build_folder() / "guest").string()});
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_THAT(contents_of(junit), HasSubstr("tests=\"3\"")) << contents_of(junit);
}

TEST_F(EmulatedHostTest, WhatIsMissingIsToldInOneLine) {
    const TemporaryFolder folder;
    Child child(umbra_command({"run", guest_file("hello")}),
                {.prepare = [&] { return ::setenv("PATH", folder.file("").c_str(), 1) == 0; }});
    EXPECT_EQ(child.end().exit_code, 4) << child.end();
    EXPECT_EQ(child.end().err, "umbra: the emulated host needs QEMU: apt-get install qemu-system-x86\n");

    const Ended unknown = run_umbra({"probe", "--host", "somewhere"});
    EXPECT_EQ(unknown.exit_code, 2) << unknown;
    EXPECT_THAT(unknown.err, HasSubstr("--host: 'somewhere' is none of auto, kvm, emulated"));
}

TEST_F(EmulatedHostTest, ProgramsRunInParallelOnSeveral) {
    Child first(
        umbra_command({"exec", "--host", "emulated:B", "--", "cat", "/sys/module/kvm_amd/parameters/npt"}));
    Child second(umbra_command({"exec", "--host", "emulated:A", "--counted", "--", "sh", "-c",
                                "cat /sys/module/kvm_amd/parameters/npt; nproc; echo told >&2; kill -9 $$"}));
    EXPECT_EQ(first.end().out, "N\n") << first.end();
    EXPECT_EQ(first.end().exit_code, 0);
    EXPECT_EQ(second.end().out, "Y\n1\n") << second.end();
    EXPECT_EQ(second.end().err, "told\n");
    EXPECT_EQ(second.end().exit_code, 128 + SIGKILL);
}

} // namespace
} // namespace umbra
