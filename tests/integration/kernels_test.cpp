// Real kernels that are not Linux, as Debian packages them: each gets as far as it can without what it would
// start.
#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <regex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace umbra {
namespace {

/// Runs a kernel that scripts/test has put into the build folder.
class KernelsTest : public EngineTest {
  protected:
    static Ended boot(const std::string& name, std::vector<std::string> options) {
        options.insert(options.begin(), {"run", "--engine", GetParam()});
        options.push_back(file(name));
        return run_umbra(options);
    }
    static std::string file(const std::string& name) { return build_folder() / "kernels" / name; }
    static bool is_there(const std::string& name) { return ::access(file(name).c_str(), R_OK) == 0; }
};

#define UMBRA_NEEDS_KERNEL(name)                                                                             \
    if (!is_there(name))                                                                                     \
    UMBRA_MISSING(file(name) + " is missing: see scripts/test")

void expect_said(const Ended& ended, const std::vector<std::string>& texts) {
    EXPECT_EQ(ended.exit_code, 0) << ended;
    for (const std::string& text : texts)
        EXPECT_NE(ended.out.find(text), std::string::npos) << "not there: " << text << "\n" << ended;
}

// A 64-bit kernel in an ELF64 with a multiboot 1 header, compressed: QEMU does not take it.
TEST_P(KernelsTest, GnuMachGetsToItsConsole) {
    UMBRA_NEEDS_KERNEL("gnumach.gz");
    const Ended ended = boot("gnumach.gz", {"-m", "64M", "--append", "console=com0", "--expect",
                                            "No bootstrap code loaded with the kernel"});
    expect_said(ended, {"GNU Mach 1.8", "biosmem: 000000000000100000:00000000000", "vm_page: DMA32: pages: ",
                        "RTC time is 2", "bootstrap_create: No bootstrap code loaded with the kernel!"});
}

// Xen's early boot: its own way into long mode, then console, command line and boot information.
class XenTest : public KernelsTest {
  protected:
    /// `name` is the first word of its command line, which Xen drops unless GRUB has loaded it.
    static void boot_by(const std::string& protocol, const std::string& name, const std::string& load_base) {
        UMBRA_NEEDS_KERNEL("xen.gz");
        const std::string words = "console=com1 com1=115200,8n1 no-real-mode noreboot";
        const Ended ended = boot("xen.gz", {"-m", "256M", "--protocol", protocol, "--append", name + words,
                                            "--expect", "dom0 kernel not specified"});
        expect_said(ended, {"(XEN) Xen version 4.", "(XEN) Bootloader: umbra", "(XEN) Command line: " + words,
                            "(XEN) Xen image load base address: " + load_base,
                            "(XEN)  VGA is text mode 80x25", "(XEN) Panic on CPU 0:"});
    }
};

TEST_P(XenTest, ReadsMultiboot1) {
    boot_by("multiboot1", "", "0\r\n"); // where it is linked
}

TEST_P(XenTest, ReadsMultiboot2) {
    boot_by("multiboot2", "xen ", "0xf"); // as high as it can be
}

// A multiboot 1 kernel with addresses in its header, which draws on the VGA text screen, by the timer.
TEST_P(KernelsTest, InvadersAreOnTheScreen) {
    UMBRA_NEEDS_KERNEL("invaders");
    const TemporaryFolder folder;
    const std::string screen = folder.file("screen");
    const Ended ended =
        boot("invaders", {"-m", "32M", "--timeout", emulated_host() ? "20" : "5", "--screen", screen});
    EXPECT_EQ(ended.exit_code, 124) << ended; // nobody plays
    const std::vector<std::string> lines = lines_of(contents_of(screen));
    EXPECT_EQ(lines.size(), 25U);
    const auto rows = std::count_if(lines.begin(), lines.end(), [](const std::string& line) {
        return line.find("-*") != std::string::npos;
    });
    EXPECT_GE(rows, 3) << contents_of(screen);
    ASSERT_FALSE(lines.empty());
    EXPECT_TRUE(std::regex_search(lines.back(), std::regex(R"(/.\\)"))) << contents_of(screen); // the player
}

INSTANTIATE_TEST_SUITE_P(Engines, KernelsTest, engines(), engine_name);
INSTANTIATE_TEST_SUITE_P(Engines, XenTest, engines(), engine_name);

} // namespace
} // namespace umbra
