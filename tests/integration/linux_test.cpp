// A real kernel: Debian's stock Linux, unmodified and in its default configuration, runs the checks of
// scripts/initramfs-init and powers off.
#include "tests/integration/child.hpp"
#include "tests/integration/host.hpp"

#include <unistd.h>

#include <chrono>
#include <iostream>
#include <regex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

/// Where scripts/test puts the kernel and what scripts/make-initramfs made.
std::string kernel_file(const std::string& name) {
    return build_folder() / "kernels" / name;
}

class LinuxTest : public EngineTest {
  protected:
    void SetUp() override {
        EngineTest::SetUp();
        if (IsSkipped() || HasFatalFailure())
            return;
        if (interprets_ring0())
            GTEST_SKIP()
                << "this host can run only what traps: CPUID and the interrupt flag, which Linux needs, "
                   "do not trap here";
        for (const char* const name : {"vmlinuz", "initramfs"})
            if (::access(kernel_file(name).c_str(), R_OK) != 0)
                UMBRA_MISSING(kernel_file(name) + " is missing: see scripts/test");
    }

    static Ended boot(const std::string& words, const std::vector<std::string>& options = {}) {
        std::vector<std::string> arguments{"run", "--engine", GetParam(), "-m", "256M"};
        arguments.insert(arguments.end(), options.begin(), options.end());
        arguments.insert(arguments.end(), {"--append", "console=ttyS0 panic=-1 " + words, "--initrd",
                                           kernel_file("initramfs"), kernel_file("vmlinuz")});
        constexpr std::chrono::minutes limit{12};
        return run_umbra(arguments, limit);
    }
};

/// The first group of the line that matches; empty if there is none.
std::string said(const Ended& ended, const std::string& pattern) {
    std::smatch match;
    return std::regex_search(ended.out, match, std::regex(pattern)) ? match[1].str() : "";
}

TEST_P(LinuxTest, PassesItsChecksAndPowersOff) {
    // Twice the usual time: an emulated host may be late by more than 1 % of ten seconds.
    const Ended ended = boot(emulated_host() ? "seconds=20" : "");
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_EQ(ended.verdict(), "passed: the guest powered off") << ended;
    EXPECT_NE(said(ended, "(Linux version [0-9.-]+-cloud-amd64)"), "") << ended;
    EXPECT_NE(said(ended, "(linux: /init after [0-9.]+ s: Linux .* x86_64)"), "") << ended;
    EXPECT_NE(said(ended, "(model name\t: .+)"), "") << ended;
    EXPECT_NE(said(ended, "(linux: processes: 300 of 300 fork)"), "") << ended;
    EXPECT_NE(said(ended, "linux: memory: ([0-9]+) of \\1 files of 4 MB are as written"), "") << ended;
    EXPECT_NE(said(ended, "(sleep by the kernel's clock: .*: PASS)"), "") << ended;
    EXPECT_NE(said(ended, "(the kernel's clock by the real-time clock: .*: PASS)"), "") << ended;
    EXPECT_NE(said(ended, "(linux: passed)"), "") << ended;
    EXPECT_EQ(said(ended, "(linux: .*FAIL.*)"), "") << ended;
    // What must not be in the log of a kernel that is well; on the native engine it may be KVM's doing.
    if (GetParam() == "shadow") {
        EXPECT_EQ(said(ended, "(WARNING: .*|BUG: .*|Oops: .*|Kernel panic.*|soft lockup.*|Call Trace:)"), "")
            << ended;
    }
    std::cout << "Linux on " << GetParam() << ": /init after " << said(ended, "/init after ([0-9.]+ s)")
              << ", a fork and exec takes " << said(ended, "fork\\+exec in .*, ([0-9]+ us) each")
              << ", clock source " << said(ended, "clock source: (\\S+)") << "\n";
}

/// Then it also chooses its own address (KASLR); and it keeps its page tables from its programs (PTI), as it
/// does by itself on CPUs that need it.
TEST_P(LinuxTest, UnpacksItselfIfAsked) {
    const Ended ended =
        boot(std::string("pti=on forks=10 fill=5 ") + (emulated_host() ? "seconds=20" : "seconds=5"),
             {"--guest-decompress"});
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_NE(said(ended, "(page tables isolation: enabled)"), "") << ended;
    EXPECT_NE(said(ended, "(linux: processes: 10 of 10 fork)"), "") << ended;
}

TEST_P(LinuxTest, APanicIsNoPass) {
    const Ended ended = boot("quiet rdinit=/nothing root=none");
    EXPECT_EQ(ended.exit_code, 3) << ended;
    EXPECT_NE(said(ended, "(Kernel panic - not syncing: .*)"), "") << ended;
}

class LinuxHostTest : public KvmTest {};

TEST_F(LinuxHostTest, SaysWhatTheHostLacks) {
    if (!interprets_ring0())
        GTEST_SKIP() << "this host has what Linux needs";
    if (::access(kernel_file("vmlinuz").c_str(), R_OK) != 0)
        UMBRA_MISSING(kernel_file("vmlinuz") + " is missing: see scripts/test");
    const std::regex why("umbra: this host's KVM shows the guest [^\n]* with which Linux goes wrong.*");
    const Ended refused = run_umbra({"run", kernel_file("vmlinuz")});
    EXPECT_EQ(refused.exit_code, 4) << refused;
    EXPECT_EQ(refused.out, "");
    EXPECT_TRUE(std::regex_search(refused.err, why)) << refused;
    EXPECT_NE(refused.err.find("--force"), std::string::npos);

    const Ended forced = run_umbra({"run", "--force", "--timeout", "60", "--expect", "Linux version ",
                                    "--append", "console=ttyS0 earlyprintk=serial", kernel_file("vmlinuz")});
    EXPECT_EQ(forced.exit_code, 0) << forced;
    EXPECT_TRUE(std::regex_search(forced.err, why)) << forced;
}

INSTANTIATE_TEST_SUITE_P(Engines, LinuxTest, engines(), engine_name);

} // namespace
} // namespace umbra
