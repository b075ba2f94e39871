// What umbra says to its user before any guest runs: help, bad options, memory sizes, hosts without KVM.
#include "tests/integration/child.hpp"
#include "tests/integration/host.hpp"

#include <grp.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using Arguments = std::vector<std::string>;

/// One line on standard error, nothing on standard output.
void expect_one_line(const Ended& ended, int exit_code) {
    EXPECT_EQ(ended.exit_code, exit_code) << ended;
    EXPECT_EQ(ended.out, "") << ended;
    EXPECT_EQ(lines_of(ended.err).size(), 1U) << ended;
    EXPECT_TRUE(ended.err.starts_with("umbra: ")) << ended;
}

TEST(UsageTest, HelpGoesToStandardOutput) {
    for (const Arguments& arguments :
         {Arguments{"--help"}, Arguments{"-h"}, Arguments{"run", "--help"}, Arguments{"probe", "--help"}}) {
        const Ended ended = run_umbra(arguments);
        EXPECT_EQ(ended.exit_code, 0) << ended;
        EXPECT_NE(ended.out.find("Usage: umbra"), std::string::npos) << ended;
        EXPECT_EQ(ended.err, "");
    }
}

TEST(UsageTest, HelpNamesEveryOptionAndExitCode) {
    const std::string help = run_umbra({"run", "--help"}).out;
    for (const char* const word :
         {"-m,--memory", "--append", "--initrd", "--serial", "--timeout", "--expect", "--engine",    "--cpu",
          "invpcid",     "shadow",   "native",   "--stats",  "json",      "--trace",  "--qemu-exit", "\n  0 ",
          "\n  1 ",      "\n  2 ",   "\n  3 ",   "\n  4 ",   "\n  124 ",  "\n  130 "})
        EXPECT_NE(help.find(word), std::string::npos) << word << " is not in\n" << help;
}

TEST(UsageTest, WhatCannotBeToldIsToldByTheExitCode) {
    const std::string hello = guest_file("hello");
    const auto without = [](int fd, const Arguments& arguments) {
        return Child(umbra_command(arguments), {.prepare = [fd] { return ::close(fd) == 0; }}).end();
    };
    for (const Arguments& arguments : {Arguments{"--help"}, Arguments{"--version"},
                                       Arguments{"inspect", hello}, Arguments{"test", "--list", hello}}) {
        const Ended ended = without(STDOUT_FILENO, arguments);
        EXPECT_EQ(ended.exit_code, 2) << ended;
        EXPECT_TRUE(ended.err.starts_with("umbra: cannot write to standard output")) << ended;
        EXPECT_EQ(without(STDIN_FILENO, arguments).exit_code, 0);
        EXPECT_EQ(without(STDERR_FILENO, arguments).exit_code, 0);
    }
    EXPECT_EQ(without(STDERR_FILENO, {"run", "--frobnicate", hello}).exit_code, 2);
    const Ended full =
        Child({"/bin/sh", "-c", "exec \"$@\" >/dev/full", "sh", umbra_command({})[0], "inspect", hello})
            .end();
    EXPECT_EQ(full.exit_code, 2) << full;
    EXPECT_EQ(full.err, "umbra: cannot write to standard output: No space left on device\n");
}

TEST(UsageTest, VersionIsOneLine) {
    const Ended ended = run_umbra({"--version"});
    EXPECT_EQ(ended.exit_code, 0) << ended;
    EXPECT_TRUE(ended.out.starts_with("umbra ")) << ended;
    EXPECT_EQ(lines_of(ended.out).size(), 1U) << ended;
}

TEST(UsageTest, BadOptionsAreNamed) {
    const std::string hello = guest_file("hello");
    struct Bad {
        Arguments arguments;
        std::string named; ///< in what is said
    };
    const std::vector<Bad> all{
        {{}, "subcommand"},
        {{"frobnicate"}, "subcommand"},
        {{"run"}, "kernel"},
        {{"run", "--frobnicate", hello}, "--frobnicate"},
        {{"run", "--engine", "turbo", hello}, "--engine"},
        {{"run", "--engine", "1", hello}, "--engine"},
        {{"run", "--engine"}, "--engine"},
        {{"run", "--timeout", "soon", hello}, "--timeout"},
        {{"run", "--timeout", "0", hello}, "--timeout"},
        {{"run", "--timeout", "-1", hello}, "--timeout"},
        {{"run", "--timeout", "nan", hello}, "--timeout"},
        {{"run", "--timeout", "1e300", hello}, "--timeout"},
        {{"run", "--cpu", "+la57", hello}, "'+la57' is not a feature"},
        {{"run", "--cpu", "smap", hello}, "smap, smep, pcid, invpcid, pge, gbpages"},
        {{"run", "--cpu"}, "--cpu"},
        {{"run", "--stats=xml", hello}, "--stats"},
        {{"run", "--stats=2", hello}, "--stats"},
        {{"run", "--log-level", "loud", hello}, "--log-level"},
        {{"probe", "--xml"}, "--xml"},
        {{"probe", "surplus"}, "surplus"},
    };
    for (const Bad& bad : all) {
        SCOPED_TRACE(testing::PrintToString(bad.arguments));
        const Ended ended = run_umbra(bad.arguments);
        expect_one_line(ended, 2);
        EXPECT_NE(ended.err.find(bad.named), std::string::npos) << ended;
        EXPECT_LT(ended.err.size(), 200U) << ended;
    }
}

TEST(UsageTest, BadMemorySizesAreOneLine) {
    for (const char* const size : {"", "0", "1", "1M", "2047K", "2049K", "-64M", "64 M", "64MB", "6.4G", "M",
                                   "0x40M", "65G", "1T", "99999999999999999999", "18446744073709551615K"}) {
        const Ended ended = run_umbra({"run", "--memory=" + std::string(size), guest_file("hello")});
        SCOPED_TRACE(size);
        expect_one_line(ended, 2);
    }
}

/// In the child: a file system of its own, in which /dev is empty. Needs rights, or a user namespace.
bool without_devices() {
    if (::unshare(CLONE_NEWNS) != 0 && ::unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0)
        return false;
    return ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
           ::mount("none", "/dev", "tmpfs", 0, nullptr) == 0;
}

TEST(UsageTest, HostWithoutKvmCannotRunGuests) {
    for (const Arguments& arguments :
         {Arguments{"run", "--host", "kvm", guest_file("hello")},
          Arguments{"run", "--host", "kvm", "--engine", "native", guest_file("hello")},
          Arguments{"probe", "--host", "kvm"}, Arguments{"probe", "--host", "kvm", "--json"},
          Arguments{"test", "--host", "kvm", guest_file("hello"), guest_file("fail")}}) {
        const Ended ended = Child(umbra_command(arguments), {.prepare = without_devices}).end();
        if (ended.exit_code == Child::not_prepared)
            GTEST_SKIP() << "this user can make no file system without /dev/kvm";
        expect_one_line(ended, 4);
        EXPECT_NE(ended.err.find("/dev/kvm does not exist"), std::string::npos) << ended;
    }
}

/// In the child: becomes a user without any rights.
bool as_nobody() {
    constexpr id_t nobody = 65534;
    return ::setgroups(0, nullptr) == 0 && ::setgid(nobody) == 0 && ::setuid(nobody) == 0;
}

TEST(UsageTest, UserWithoutPermissionCannotRunGuests) {
    struct stat kvm {};
    if (::stat("/dev/kvm", &kvm) != 0)
        UMBRA_MISSING("there is no /dev/kvm");
    if ((kvm.st_mode & S_IROTH) != 0)
        GTEST_SKIP() << "here every user may open /dev/kvm";
    const Ended ended =
        Child(umbra_command({"run", "--host", "kvm", guest_file("hello")}), {.prepare = as_nobody}).end();
    if (ended.exit_code == Child::not_prepared)
        GTEST_SKIP() << "only root can become another user";
    if (ended.exit_code == Child::not_started || ended.err.find("cannot read kernel") != std::string::npos)
        GTEST_SKIP() << "other users cannot reach this build folder";
    expect_one_line(ended, 4);
    EXPECT_NE(ended.err.find("/dev/kvm: permission denied"), std::string::npos) << ended;
}

} // namespace
} // namespace umbra
