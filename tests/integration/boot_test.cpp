// What the options give the guest: command line and initial RAM disk; memory sizes are in
// guest/CMakeLists.txt.
#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"

#include <cstdint>
#include <string>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

class BootTest : public EngineTest {
  protected:
    static Ended boot(std::vector<std::string> options, const std::vector<std::string>& words = {}) {
        options.insert(options.begin(), {"run", "--engine", GetParam()});
        options.push_back(guest_file("bootinfo"));
        options.insert(options.end(), words.begin(), words.end());
        return run_umbra(options);
    }
    static void expect_said(const Ended& ended, const std::vector<std::string>& lines) {
        EXPECT_EQ(ended.exit_code, 0) << ended;
        for (const std::string& line : lines)
            EXPECT_NE(("\n" + ended.out).find("\n" + line + "\n"), std::string::npos)
                << "not there: " << line << "\n"
                << ended;
    }

    TemporaryFolder folder_;
};

TEST_P(BootTest, NothingIsSaidByDefault) {
    expect_said(boot({}), {"command line \"\"", "no initrd", "memory 0x100000-0x8000000 RAM"});
}

TEST_P(BootTest, CommandLineGoesOnWithWhatFollowsTheDashes) {
    expect_said(boot({}, {"--", "one", "two three", "--four", "-m"}),
                {"command line \"one two three --four -m\""});
    expect_said(boot({"--append", "first"}, {"--", "second"}), {"command line \"first second\""});
}

TEST_P(BootTest, LongCommandLineArrivesAndATooLongOneIsRefused) {
    const std::string line(1500, 'x');
    expect_said(boot({"--append", line}), {"command line \"" + line + "\""});
    const Ended refused = boot({"--append", std::string(100000, 'x')});
    EXPECT_EQ(refused.exit_code, 2) << refused;
    EXPECT_EQ(lines_of(refused.err).size(), 1U) << refused;
}

std::string noise(std::size_t size) {
    std::string bytes(size, '\0');
    std::uint32_t state = 1;
    for (char& byte : bytes) {
        state = state * 1664525 + 1013904223;
        byte = static_cast<char>(state >> 24);
    }
    return bytes;
}

/// 64-bit FNV-1a, as the guest computes it.
std::uint64_t hash(const std::string& bytes) {
    std::uint64_t value = 0xcbf29ce484222325;
    for (const char byte : bytes)
        value = (value ^ static_cast<std::uint8_t>(byte)) * 0x100000001b3;
    return value;
}

TEST_P(BootTest, InitialRamDiskArrivesUnchanged) {
    for (const std::size_t size : {1U, 4096U, 3'000'001U}) {
        const std::string disk = noise(size);
        expect_said(boot({"--initrd", folder_.write("disk", disk)}),
                    {fmt::format("initrd of {} bytes, hash {:#x}", size, hash(disk))});
    }
}

TEST_P(BootTest, EmptyFilesAreNoError) {
    const std::string empty = folder_.write("empty", "");
    expect_said(boot({"--initrd", empty}), {"no initrd"});
    for (const char* const kernel : {"legacy_multiboot1", "legacy_multiboot2", "legacy_pvh"}) {
        const Ended ended =
            run_umbra({"run", "--engine", GetParam(), "--initrd", empty + " first module", "--module",
                       empty + ",second module", "--fw-cfg", "name=opt/empty,file=" + empty, "-m", "64M",
                       guest_file(kernel), "--", "memory=64", "modules=2", "empty-modules", "inexact-flags"});
        EXPECT_EQ(ended.exit_code, 0) << ended;
    }
}

TEST_P(BootTest, InitialRamDiskThatCannotBeHadIsOneLine) {
    const std::string large = folder_.write("large", std::string(std::size_t{4} << 20, 'x'));
    for (const std::string& disk : {folder_.file("missing"), folder_.file(""), large}) {
        const Ended ended = boot({"-m", "4M", "--initrd", disk});
        EXPECT_EQ(ended.exit_code, 2) << ended;
        EXPECT_EQ(lines_of(ended.err).size(), 1U) << ended;
        EXPECT_NE(ended.err.find("initrd"), std::string::npos) << ended;
    }
}

INSTANTIATE_TEST_SUITE_P(Engines, BootTest, engines(), engine_name);

} // namespace
} // namespace umbra
