// Kernel files that are damaged, absurd or missing: umbra says so in one line, or runs what can be run, and
// never falls over them.
#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"
#include "tests/integration/host.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <elf.h>
#include <glob.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

const std::string memtest = "/boot/memtest86+x64.bin";

class DamagedTest : public KvmTest {
  protected:
    [[nodiscard]] Ended run(const std::string& kernel) const {
        return run_umbra({"run", "-m", "16M", "--timeout", "0.3", folder_.write("kernel", kernel)});
    }
    /// The file is no kernel, which is said in one line.
    void expect_refused(const std::string& kernel) const {
        const Ended ended = run(kernel);
        EXPECT_EQ(ended.exit_code, 2) << ended;
        EXPECT_EQ(ended.out, "") << ended;
        EXPECT_EQ(lines_of(ended.err).size(), 1U) << ended;
        EXPECT_TRUE(ended.err.starts_with("umbra: ")) << ended;
    }
    /// Whether it can be run is the file's business, and how it then ends; but it ends as umbra documents.
    void expect_documented_end(const std::string& kernel) const {
        const Ended ended = run(kernel);
        EXPECT_EQ(ended.signal, 0) << ended;
        EXPECT_TRUE(ended.exit_code == 0 || ended.exit_code == 1 || ended.exit_code == 2 ||
                    ended.exit_code == 3 || ended.exit_code == 4 || ended.exit_code == 124)
            << ended;
        EXPECT_FALSE(ended.err.empty());
        EXPECT_TRUE(ended.exit_code != 2 || lines_of(ended.err).size() == 1) << ended;
    }

    TemporaryFolder folder_;
};

template<class Value>
std::string with(std::string file, std::size_t offset, Value value) {
    const auto bytes = std::bit_cast<std::array<char, sizeof value>>(value);
    std::ranges::copy(bytes, file.begin() + static_cast<std::ptrdiff_t>(offset));
    return file;
}

std::string random_bytes(std::mt19937& random, std::size_t size) {
    std::string bytes(size, '\0');
    std::ranges::generate(bytes, [&] { return static_cast<char>(random()); });
    return bytes;
}

/// Replaces up to `most` bytes at random.
std::string mutated(std::string bytes, std::mt19937& random, std::size_t most = 8) {
    const std::size_t changes = 1 + random() % most;
    for (std::size_t i = 0; i < changes; ++i)
        bytes[random() % bytes.size()] = static_cast<char>(random());
    return bytes;
}

// --- Files that are not there, or no kernels at all

TEST_F(DamagedTest, FilesThatCannotBeReadAreNamed) {
    std::vector<std::string> paths{folder_.file("missing"), folder_.file(""), folder_.write("empty", ""),
                                   "/dev/null", "/dev/zero"};
    if (::geteuid() != 0) { // root may read everything
        paths.push_back(folder_.write("unreadable", "x"));
        ASSERT_EQ(::chmod(paths.back().c_str(), 0), 0);
    }
    for (const std::string& path : paths) {
        const Ended ended = run_umbra({"run", path});
        EXPECT_EQ(ended.exit_code, 2) << ended;
        EXPECT_EQ(lines_of(ended.err).size(), 1U) << ended;
        EXPECT_NE(ended.err.find("'" + path + "'"), std::string::npos) << ended;
    }
}

TEST_F(DamagedTest, OtherFilesAreNoKernels) {
    std::mt19937 random(1);
    expect_refused("#!/bin/sh\necho hello\n");
    expect_refused("x");
    expect_refused(std::string(1 << 20, '\0'));
    for (const std::size_t size : {16U, 511U, 512U, 4096U, 300000U})
        expect_refused(random_bytes(random, size));
    expect_refused(contents_of(build_folder() / "umbra")); // a program of this host
}

// --- ELF

// How the guests' files begin: headers, and at 4096 the code.
constexpr std::size_t headers = sizeof(Elf64_Ehdr) + 3 * sizeof(Elf64_Phdr), code_offset = 4096;

TEST_F(DamagedTest, TruncatedElf) {
    const std::string kernel = contents_of(guest_file("hello"));
    ASSERT_GT(kernel.size(), 8192U);
    for (const std::size_t size :
         {1U, 3U, 4U, 5U, 15U, 16U, 20U, 63U, 64U, 65U, 119U, 120U, 200U, 1000U, 4095U, 4096U})
        expect_refused(kernel.substr(0, size));
    for (std::size_t size = kernel.size() - 1; size > 4096; size -= kernel.size() / 16)
        expect_documented_end(kernel.substr(0, size)); // the end holds symbols only
}

TEST_F(DamagedTest, AbsurdElf) {
    const std::string kernel = contents_of(guest_file("hello"));
    constexpr std::size_t first_segment = sizeof(Elf64_Ehdr);
    constexpr auto huge = ~std::uint64_t{0};
    ASSERT_EQ(kernel.at(offsetof(Elf64_Ehdr, e_phoff)), first_segment);
    expect_refused(with(kernel, EI_CLASS, std::uint8_t{ELFCLASS32}));
    expect_refused(with(kernel, EI_CLASS, std::uint8_t{77}));
    expect_refused(with(kernel, EI_DATA, std::uint8_t{ELFDATA2MSB}));
    expect_refused(with(kernel, offsetof(Elf64_Ehdr, e_machine), std::uint16_t{EM_AARCH64}));
    for (const int type : {ET_NONE, ET_REL, ET_DYN, ET_CORE, 0xffff})
        expect_refused(with(kernel, offsetof(Elf64_Ehdr, e_type), static_cast<Elf64_Half>(type)));
    for (const std::uint64_t entry : {std::uint64_t{0}, std::uint64_t{1} << 32, huge})
        expect_refused(with(kernel, offsetof(Elf64_Ehdr, e_entry), entry));
    for (const std::uint64_t offset : {std::uint64_t{kernel.size()}, huge, huge - 63})
        expect_refused(with(kernel, offsetof(Elf64_Ehdr, e_phoff), offset));
    for (const int count : {0, 0xfffe, 0xffff})
        expect_refused(with(kernel, offsetof(Elf64_Ehdr, e_phnum), static_cast<Elf64_Half>(count)));
    for (const int size : {0, 1, 55, 0xffff})
        expect_refused(with(kernel, offsetof(Elf64_Ehdr, e_phentsize), static_cast<Elf64_Half>(size)));
    for (const std::size_t field : {offsetof(Elf64_Phdr, p_filesz), offsetof(Elf64_Phdr, p_memsz)})
        for (const std::uint64_t value : {huge, huge / 2, std::uint64_t{1} << 40})
            expect_refused(with(kernel, first_segment + field, value));
    for (const std::uint64_t address : {std::uint64_t{0}, std::uint64_t{0x7000}, std::uint64_t{0xa0000},
                                        std::uint64_t{16} << 20, std::uint64_t{3} << 30, huge - 4096})
        expect_refused(with(kernel, first_segment + offsetof(Elf64_Phdr, p_paddr), address));
}

TEST_F(DamagedTest, RandomlyChangedElfHeaders) {
    const std::string kernel = contents_of(guest_file("hello"));
    std::mt19937 random(2);
    ASSERT_GT(kernel.size(), headers);
    for (int i = 0; i < 40; ++i) {
        SCOPED_TRACE(i);
        expect_documented_end(mutated(kernel.substr(0, headers), random) + kernel.substr(headers));
    }
}

TEST_F(DamagedTest, RandomlyChangedCode) {
    const std::string kernel = contents_of(guest_file("user"));
    ASSERT_GT(kernel.size(), code_offset);
    std::mt19937 random(3);
    for (int i = 0; i < 40; ++i) {
        SCOPED_TRACE(i);
        expect_documented_end(kernel.substr(0, code_offset) +
                              mutated(kernel.substr(code_offset), random, 1000));
    }
}

TEST_F(DamagedTest, RandomCode) {
    std::mt19937 random(4);
    for (int i = 0; i < 40; ++i) {
        SCOPED_TRACE(i);
        const std::string code = random_bytes(random, 65536);
        expect_documented_end(elf_kernel({code.begin(), code.end()}));
    }
}

// --- bzImage

class DamagedBzImageTest : public DamagedTest {
  protected:
    void SetUp() override {
        DamagedTest::SetUp();
        if (IsSkipped() || HasFatalFailure())
            return;
        image_ = contents_of(memtest);
        if (image_.empty())
            UMBRA_MISSING(memtest + " is missing: install memtest86+");
    }

    std::string image_;
};

// Offsets of the setup header's fields: Documentation/arch/x86/boot.rst.
constexpr std::size_t setup_sects = 0x1f1, syssize = 0x1f4, boot_flag = 0x1fe, jump_length = 0x201,
                      magic = 0x202, version = 0x206, loadflags = 0x211, pref_address = 0x258,
                      init_size = 0x260, header_end = 0x268;

TEST_F(DamagedBzImageTest, Truncated) {
    for (const std::size_t size :
         {0x1f1U, 0x201U, 0x202U, 0x206U, 0x236U, 0x264U, 0x268U, 0x400U, 5000U, 100000U})
        expect_refused(image_.substr(0, size));
}

TEST_F(DamagedBzImageTest, Absurd) {
    expect_refused(with(image_, setup_sects, std::uint8_t{255}));
    expect_refused(with(image_, syssize, std::uint32_t{0}));
    expect_refused(with(image_, syssize, std::uint32_t{1}));
    expect_refused(with(image_, syssize, ~std::uint32_t{0}));
    expect_refused(with(image_, boot_flag, std::uint16_t{0}));
    expect_refused(with(image_, jump_length, std::uint8_t{0}));
    expect_refused(with(image_, magic, std::uint32_t{0}));
    expect_refused(with(image_, version, std::uint16_t{0x200}));
    expect_refused(with(image_, loadflags, std::uint8_t{0}));
    for (const std::uint64_t address : {std::uint64_t{4096}, std::uint64_t{15} << 20, std::uint64_t{16} << 20,
                                        std::uint64_t{1} << 40, ~std::uint64_t{0}, ~std::uint64_t{0} << 12})
        expect_refused(with(with(image_, pref_address, address), init_size, std::uint32_t{4} << 20));
    expect_refused(with(image_, init_size, ~std::uint32_t{0}));
}

TEST_F(DamagedBzImageTest, RandomlyChangedHeaders) {
    std::mt19937 random(5);
    for (int i = 0; i < 40; ++i) {
        SCOPED_TRACE(i);
        const std::string header = mutated(image_.substr(setup_sects, header_end - setup_sects), random);
        expect_documented_end(std::string(image_).replace(setup_sects, header.size(), header));
    }
}

TEST_F(DamagedTest, KernelThatNeedsMoreMemoryIsToldHowMuch) {
    glob_t found{};
    const int result = ::glob("/boot/vmlinuz-*", 0, nullptr, &found);
    const std::string kernel = result == 0 ? found.gl_pathv[0] : "";
    ::globfree(&found);
    if (kernel.empty())
        GTEST_SKIP() << "there is no Linux kernel in /boot";
    const Ended ended = run_umbra({"run", "-m", "16M", kernel});
    EXPECT_EQ(ended.exit_code, 2) << ended;
    EXPECT_EQ(lines_of(ended.err).size(), 1U) << ended;
    EXPECT_NE(ended.err.find("it needs at least "), std::string::npos) << ended;
}

} // namespace
} // namespace umbra
