// Unit tests of vmm/loader: kernels made in memory, damaged in every field, cut at every length, and mutated.
#include "vmm/loader/loader.hpp"

#include "tests/unit/loader_fixture.hpp"
#include "vmm/loader/memory_plan.hpp"

#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <elf.h>
#include <fmt/core.h>
#include <gtest/gtest.h>
#include <unistd.h>

namespace umbra {
namespace {

// Linux's boot structures are packed: EXPECT_EQ cannot refer to their fields, so it gets copies by unary +.

// ---- ELF

constexpr std::size_t code_segment = 0;
constexpr std::size_t data_segment = 1;

/// A small executable: code at 1 MB, data with bss at 2 MB. Its last byte is the last byte of the data.
struct SmallElf {
    Elf64_Ehdr header{};
    std::array<Elf64_Phdr, 3> segments{};
    std::string code = "code: the kernel";
    std::string data = "data: of the kernel";

    SmallElf() {
        std::memcpy(header.e_ident, ELFMAG, SELFMAG);
        header.e_ident[EI_CLASS] = ELFCLASS64;
        header.e_ident[EI_DATA] = ELFDATA2LSB;
        header.e_ident[EI_VERSION] = EV_CURRENT;
        header.e_type = ET_EXEC;
        header.e_machine = EM_X86_64;
        header.e_version = EV_CURRENT;
        header.e_entry = 0x100004;
        header.e_phoff = sizeof header;
        header.e_ehsize = sizeof header;
        header.e_phentsize = sizeof(Elf64_Phdr);
        header.e_phnum = static_cast<Elf64_Half>(segments.size());

        const std::uint64_t contents = sizeof header + sizeof segments;
        segments[code_segment] = {.p_type = PT_LOAD,
                                  .p_flags = PF_R | PF_X,
                                  .p_offset = contents,
                                  .p_vaddr = 0xffff'8000'0010'0000,
                                  .p_paddr = 0x100000,
                                  .p_filesz = code.size(),
                                  .p_memsz = code.size(),
                                  .p_align = page_size};
        segments[data_segment] = {.p_type = PT_LOAD,
                                  .p_flags = PF_R | PF_W,
                                  .p_offset = contents + code.size(),
                                  .p_vaddr = 0xffff'8000'0020'0000,
                                  .p_paddr = 0x200000,
                                  .p_filesz = data.size(),
                                  .p_memsz = 0x3000,
                                  .p_align = page_size};
        segments[2] = {.p_type = PT_GNU_STACK,
                       .p_flags = PF_R | PF_W,
                       .p_offset = ~std::uint64_t{0},
                       .p_vaddr = 0,
                       .p_paddr = 0,
                       .p_filesz = 0,
                       .p_memsz = 0,
                       .p_align = 16};
    }

    [[nodiscard]] Bytes bytes() const {
        Bytes file(sizeof header + sizeof segments);
        std::memcpy(file.data(), &header, sizeof header);
        std::memcpy(file.data() + sizeof header, segments.data(), sizeof segments);
        for (const Bytes& part : {bytes_of(code), bytes_of(data)})
            file.insert(file.end(), part.begin(), part.end());
        return file;
    }
};

TEST(ElfLoaderTest, CopiesSegmentsToPhysicalAddresses) {
    const SmallElf elf;
    const TestRam ram(16 * mib);
    const LoadedKernel kernel =
        load_kernel(elf.bytes(), {.command_line = "quiet mode=1", .initrd = {}}, ram.memory());
    EXPECT_EQ(kernel.protocol, KernelProtocol::elf64);
    EXPECT_EQ(kernel.entry, GuestVirt{0x100004});
    EXPECT_EQ(ram.text(GuestPhys{0x100000}, elf.code.size()), elf.code);
    EXPECT_EQ(ram.text(GuestPhys{0x200000}, elf.data.size()), elf.data);
    EXPECT_EQ(ram.at<std::uint8_t>(GuestPhys{0x200000} + elf.data.size()), 0);

    const auto params = ram.at<boot_params>(GuestPhys{kernel.rsi});
    EXPECT_EQ(+params.hdr.boot_flag, 0xaa55);
    EXPECT_EQ(+params.hdr.header, 0x53726448U);
    EXPECT_EQ(+params.hdr.cmd_line_ptr, 0x20000U);
    EXPECT_EQ(ram.text(GuestPhys{0x20000}, 13), std::string("quiet mode=1\0", 13));
    EXPECT_EQ(+params.hdr.ramdisk_size, 0U);
}

TEST(ElfLoaderTest, TakesWhatIsUnusualButFits) {
    SmallElf elf;
    elf.segments[code_segment].p_paddr = 0x30000; // right behind the boot data
    elf.header.e_entry = 0x30000;
    EXPECT_EQ(failure(elf.bytes()), "");

    elf.segments[data_segment].p_paddr = 0x30000 + elf.code.size(); // adjacent is not overlapping
    EXPECT_EQ(failure(elf.bytes()), "");

    elf.segments[data_segment].p_paddr =
        16 * mib - elf.segments[data_segment].p_memsz; // the last byte of RAM
    EXPECT_EQ(failure(elf.bytes()), "");
}

// As ld makes it by -Ttext=0x100000: its first segment has the headers, in the page before.
TEST(ElfLoaderTest, HeadersMayLieWhereFirmwareDoes) {
    SmallElf elf;
    Elf64_Phdr& first = elf.segments[data_segment];
    first.p_flags = PF_R;
    first.p_offset = 0;
    first.p_paddr = first.p_vaddr = 0xff000;
    first.p_filesz = first.p_memsz = sizeof elf.header + sizeof elf.segments;
    const Bytes file = elf.bytes();
    const TestRam ram(16 * mib);
    const LoadedKernel kernel = load_kernel(file, {}, ram.memory());
    EXPECT_EQ(kernel.entry, GuestVirt{0x100004});
    EXPECT_EQ(ram.text(GuestPhys{0xff000}, first.p_filesz),
              std::string(reinterpret_cast<const char*>(file.data()), first.p_filesz));
    EXPECT_EQ(ram.text(GuestPhys{0xf0000}, 8), "RSD PTR ");
}

TEST(ElfLoaderTest, GetsAllRamThatItAsksFor) {
    for (const std::uint64_t at : {0x0U, 0x9'd000U, 0xc'0000U, 0xf'0000U, 0xf'8000U, 0xf'd001U}) {
        SmallElf elf;
        elf.code = std::string(0x3000, 'x'); // as long as the data
        elf.data = std::string(0x3000, 'y');
        for (Elf64_Phdr& segment : elf.segments)
            segment.p_filesz = segment.p_memsz = 0x3000;
        elf.segments[data_segment].p_offset = elf.segments[code_segment].p_offset + 0x3000;
        elf.segments[code_segment].p_paddr = mib;
        elf.segments[data_segment].p_paddr = at;
        if (at > mib - 0x3000)
            elf.segments[code_segment].p_paddr = 2 * mib, elf.header.e_entry = 2 * mib;
        const TestRam ram(16 * mib);
        const LoadedKernel kernel = load_kernel(elf.bytes(), {.command_line = "text"}, ram.memory());
        EXPECT_EQ(ram.text(GuestPhys{at}, 0x3000), elf.data) << at;
        const auto params = ram.at<boot_params>(GuestPhys{kernel.rsi});
        EXPECT_EQ(ram.text(GuestPhys{params.acpi_rsdp_addr}, 8), "RSD PTR ") << at;
        EXPECT_EQ(ram.text(GuestPhys{params.hdr.cmd_line_ptr}, 5), std::string("text\0", 5)) << at;
    }
}

TEST(ElfLoaderTest, LoadsIntoMemoryAboveFourGigabytes) {
    SmallElf elf;
    elf.segments[data_segment].p_paddr = 0x1'0000'0000;
    const TestRam ram(4096 * mib);
    (void)load_kernel(elf.bytes(), {}, ram.memory());
    EXPECT_EQ(ram.text(GuestPhys{0x1'0000'0000}, elf.data.size()), elf.data);
}

TEST(ElfLoaderTest, EachDamagedFieldHasItsMessage) {
    struct Case {
        const char* message; ///< part of it
        std::function<void(SmallElf&)> damage;
    };
    constexpr std::uint64_t huge = std::numeric_limits<std::uint64_t>::max();
    const std::vector<Case> cases{
        {"not a kernel", [](SmallElf& elf) { elf.header.e_ident[0] = 0; }},
        {"32-bit ELF for machine type 62", [](SmallElf& elf) { elf.header.e_ident[EI_CLASS] = ELFCLASS32; }},
        {"class 9", [](SmallElf& elf) { elf.header.e_ident[EI_CLASS] = 9; }},
        {"little-endian", [](SmallElf& elf) { elf.header.e_ident[EI_DATA] = ELFDATA2MSB; }},
        {"unknown ELF version", [](SmallElf& elf) { elf.header.e_ident[EI_VERSION] = 2; }},
        {"unknown ELF version", [](SmallElf& elf) { elf.header.e_version = 0; }},
        {"machine type 183", [](SmallElf& elf) { elf.header.e_machine = EM_AARCH64; }},
        {"relocatable object", [](SmallElf& elf) { elf.header.e_type = ET_REL; }},
        {"-no-pie", [](SmallElf& elf) { elf.header.e_type = ET_DYN; }},
        {"of type 4", [](SmallElf& elf) { elf.header.e_type = ET_CORE; }},
        {"nothing to load", [](SmallElf& elf) { elf.header.e_phnum = 0; }},
        {"more than 65534", [](SmallElf& elf) { elf.header.e_phnum = PN_XNUM; }},
        {"program headers lie outside", [](SmallElf& elf) { elf.header.e_phnum = 0xfffe; }},
        {"program headers of 32 bytes", [](SmallElf& elf) { elf.header.e_phentsize = 32; }},
        {"program headers lie outside", [](SmallElf& elf) { elf.header.e_phoff = huge; }},
        {"program headers lie outside",
         [](SmallElf& elf) { elf.header.e_phoff = huge - 2 * sizeof(Elf64_Phdr); }},
        {"more bytes in the file", [](SmallElf& elf) { elf.segments[data_segment].p_memsz = 4; }},
        {"lies outside the file", [](SmallElf& elf) { elf.segments[data_segment].p_offset += 1; }},
        {"lies outside the file", [](SmallElf& elf) { elf.segments[data_segment].p_offset = huge; }},
        {"lies outside the file", [](SmallElf& elf) { elf.segments[data_segment].p_filesz = 0x2000; }},
        {"wraps around", [](SmallElf& elf) { elf.segments[data_segment].p_paddr = huge - 0x1000; }},
        {"wraps around", [](SmallElf& elf) { elf.segments[data_segment].p_memsz = huge; }},
        {"usable memory", [](SmallElf& elf) { elf.segments[data_segment].p_paddr = 0x9'f000; }},
        {"usable memory", [](SmallElf& elf) { elf.segments[data_segment].p_paddr = 0xa'0000; }},
        {"usable memory", [](SmallElf& elf) { elf.segments[data_segment].p_paddr = 0xb'ffff; }},
        {"at least 17 MiB", [](SmallElf& elf) { elf.segments[data_segment].p_paddr = 16 * mib - 0x2fff; }},
        {"at least 3000 MiB",
         [](SmallElf& elf) { elf.segments[data_segment].p_paddr = 3000 * mib - 0x3000; }},
        {"usable memory", [](SmallElf& elf) { elf.segments[data_segment].p_paddr = 3072 * mib; }},
        {"overlap", [](SmallElf& elf) { elf.segments[data_segment].p_paddr = 0x100001; }},
        {"overlap", [](SmallElf& elf) { elf.segments[code_segment].p_paddr = 0x20'2fff; }},
        {"nothing to load",
         [](SmallElf& elf) {
             for (auto& segment : elf.segments)
                 segment.p_type = PT_NOTE;
         }},
        {"entry point", [](SmallElf& elf) { elf.header.e_entry = 0x200000 + elf.data.size(); }},
        {"entry point", [](SmallElf& elf) { elf.header.e_entry = 0x100000 + elf.code.size(); }},
        {"entry point", [](SmallElf& elf) { elf.header.e_entry = 0xf'ffff; }},
        {"entry point", [](SmallElf& elf) { elf.header.e_entry = 0; }},
        {"must be a physical address", [](SmallElf& elf) { elf.header.e_entry = 0xffff'8000'0010'0000; }},
    };
    for (const Case& c : cases) {
        SmallElf elf;
        c.damage(elf);
        const std::string message = failure(elf.bytes());
        EXPECT_NE(message.find(c.message), std::string::npos)
            << "expected: " << c.message << "\ngot: " << message;
    }
}

TEST(ElfLoaderTest, EveryTruncationIsRefused) {
    const Bytes whole = SmallElf().bytes();
    ASSERT_EQ(failure(whole), "");
    for (std::size_t size = 0; size < whole.size(); ++size)
        EXPECT_NE(failure({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)}), "") << size;
}

// ---- bzImage

constexpr std::size_t setup_size = 1024; // boot sector and one setup sector
constexpr std::size_t payload_size = 0x410;

/// A small bzImage. Its header is as long as memtest86+'s: up to and with handover_offset.
struct BzImage {
    setup_header header{};
    std::uint8_t header_length = 0x66; // from 0x202

    BzImage() {
        header.setup_sects = 1;
        header.syssize = payload_size / 16;
        header.boot_flag = 0xaa55;
        header.header = 0x53726448;
        header.version = 0x020c;
        header.loadflags = LOADED_HIGH;
        header.code32_start = 0x100000;
        header.initrd_addr_max = 0xffff'ffff;
        header.kernel_alignment = 0x1000;
        header.xloadflags = XLF_KERNEL_64;
        header.cmdline_size = 255;
        header.pref_address = 0x100000;
        header.init_size = 0x20000;
    }

    [[nodiscard]] Bytes bytes() const {
        Bytes file(setup_size + payload_size);
        std::memcpy(file.data() + 0x1f1, &header, 0x77);
        file[0x200] = std::byte{0xeb};
        file[0x201] = std::byte{header_length};
        for (std::size_t i = 0; i < payload_size; ++i)
            file[setup_size + i] = static_cast<std::byte>(i % 251);
        return file;
    }
};

TEST(BzImageLoaderTest, LoadsAndFillsTheZeroPage) {
    const Bytes file = BzImage().bytes();
    const TestRam ram(16 * mib);
    const LoadedKernel kernel =
        load_kernel(file, {.command_line = "console=ttyS0", .initrd = {}}, ram.memory());
    EXPECT_EQ(kernel.protocol, KernelProtocol::linux64);
    EXPECT_EQ(kernel.entry, GuestVirt{0x100200});
    EXPECT_EQ(ram.text(GuestPhys{0x100000}, payload_size),
              std::string(reinterpret_cast<const char*>(file.data()) + setup_size, payload_size));

    const auto params = ram.at<boot_params>(GuestPhys{kernel.rsi});
    EXPECT_EQ(+params.hdr.version, 0x020c);
    EXPECT_EQ(+params.hdr.init_size, 0x20000U);
    EXPECT_EQ(+params.hdr.cmdline_size, 255U);
    EXPECT_EQ(+params.hdr.type_of_loader, 0xff);
    EXPECT_EQ(+params.hdr.cmd_line_ptr, 0x20000U);
    EXPECT_EQ(+params.hdr.ramdisk_image, 0U);
    EXPECT_EQ(+params.sentinel, 0) << "otherwise Linux takes the zero page for one filled by an old loader";
    EXPECT_EQ(ram.text(GuestPhys{0x20000}, 14), std::string("console=ttyS0\0", 14));
    EXPECT_EQ(+params.screen_info.orig_video_isVGA, 1);
    EXPECT_EQ(+params.screen_info.orig_video_mode, 3);
    EXPECT_EQ(+params.screen_info.orig_video_cols, 80);
    EXPECT_EQ(+params.screen_info.orig_video_lines, 25);
    EXPECT_EQ(+params.screen_info.orig_video_points, 16);
}

TEST(BzImageLoaderTest, LoadsAtThePreferredAddress) {
    BzImage image;
    image.header.pref_address = 0x400000;
    const TestRam ram(16 * mib);
    EXPECT_EQ(load_kernel(image.bytes(), {}, ram.memory()).entry, GuestVirt{0x400200});
    EXPECT_EQ(ram.at<std::uint8_t>(GuestPhys{0x400001}), 1);
    EXPECT_EQ(+ram.at<boot_params>(BootArea{}.boot_params()).hdr.code32_start, 0x400000U);

    image.header.pref_address = 0;
    EXPECT_EQ(load_kernel(image.bytes(), {}, ram.memory()).entry, GuestVirt{0x100200});
}

TEST(BzImageLoaderTest, ZeroSetupSectorsMeanFour) {
    BzImage image;
    image.header.setup_sects = 0;
    Bytes file = image.bytes();
    file.insert(file.begin() + setup_size, std::size_t{3} * 512, std::byte{0});
    const TestRam ram(16 * mib);
    (void)load_kernel(file, {}, ram.memory());
    EXPECT_EQ(ram.at<std::uint8_t>(GuestPhys{0x100001}), 1);
}

TEST(BzImageLoaderTest, SignatureBehindTheCodeIsNotLoaded) {
    Bytes file = BzImage().bytes();
    file.insert(file.end(), 100, std::byte{0x5a});
    const TestRam ram(16 * mib);
    (void)load_kernel(file, {}, ram.memory());
    EXPECT_EQ(ram.at<std::uint8_t>(GuestPhys{0x100000 + payload_size}), 0);
}

TEST(BzImageLoaderTest, EachDamagedFieldHasItsMessage) {
    struct Case {
        const char* message; ///< part of it
        std::function<void(BzImage&)> damage;
    };
    const std::vector<Case> cases{
        {"not a kernel", [](BzImage& image) { image.header.boot_flag = 0; }},
        {"not a kernel", [](BzImage& image) { image.header.header = 0; }},
        {"ends at 0x263, too short for boot protocol 2.12",
         [](BzImage& image) { image.header_length = 0x61; }},
        {"boot protocol 2.01", [](BzImage& image) { image.header.version = 0x0201; }},
        {"zImage", [](BzImage& image) { image.header.loadflags = 0; }},
        {"do not reach its entry", [](BzImage& image) { image.header.syssize = 0; }},
        {"that needs a BIOS",
         [](BzImage& image) {
             image.header.xloadflags = 0;
             image.header.syssize = 0;
         }},
        {"do not reach its entry", [](BzImage& image) { image.header.syssize = 0x20; }},
        {"truncated", [](BzImage& image) { image.header.syssize = payload_size / 16 + 1; }},
        {"truncated", [](BzImage& image) { image.header.syssize = 0xffff'ffff; }},
        {"truncated", [](BzImage& image) { image.header.setup_sects = 255; }},
        {"must lie between", [](BzImage& image) { image.header.pref_address = 0x1000; }},
        {"must lie between", [](BzImage& image) { image.header.pref_address = 3072 * mib; }},
        {"must lie between",
         [](BzImage& image) { image.header.pref_address = std::numeric_limits<std::uint64_t>::max(); }},
        {"must lie between", [](BzImage& image) { image.header.init_size = 0xffff'ffff; }},
        {"needs at least 18 MiB", [](BzImage& image) { image.header.init_size = 16 * mib + 1; }},
        {"needs at least 17 MiB", [](BzImage& image) { image.header.pref_address = 16 * mib - 0x1'0000; }},
    };
    for (const Case& c : cases) {
        BzImage image;
        c.damage(image);
        const std::string message = failure(image.bytes());
        EXPECT_NE(message.find(c.message), std::string::npos)
            << "expected: " << c.message << "\ngot: " << message;
    }
}

TEST(BzImageLoaderTest, EveryTruncationIsRefused) {
    const Bytes whole = BzImage().bytes();
    ASSERT_EQ(failure(whole), "");
    // The last 15 bytes may be the padding of the last paragraph.
    for (std::size_t size = 0; size + 15 < whole.size(); ++size)
        EXPECT_NE(failure({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)}), "") << size;
}

// ---- Command line and initrd

TEST(LoaderTest, CommandLineUpToTheKernelsLimit) {
    const Bytes bzimage = BzImage().bytes();
    EXPECT_EQ(failure(bzimage, {.command_line = std::string(255, 'a'), .initrd = {}}), "");
    EXPECT_EQ(failure(bzimage, {.command_line = std::string(256, 'a'), .initrd = {}}),
              "the command line has 256 bytes; this kernel takes at most 255");

    const Bytes elf = SmallElf().bytes();
    EXPECT_EQ(failure(elf, {.command_line = std::string(command_line_limit, 'a'), .initrd = {}}), "");
    EXPECT_NE(failure(elf, {.command_line = std::string(command_line_limit + 1, 'a'), .initrd = {}}), "");

    BzImage boundless;
    boundless.header.cmdline_size = 0xffff'ffff;
    EXPECT_NE(
        failure(boundless.bytes(), {.command_line = std::string(command_line_limit + 1, 'a'), .initrd = {}}),
        "");
}

TEST(LoaderTest, InitrdIsPageAlignedAtTheTop) {
    const Bytes initrd(0x1801, std::byte{0x77});
    for (const Bytes& kernel : {SmallElf().bytes(), BzImage().bytes()}) {
        const TestRam ram(16 * mib);
        (void)load_kernel(kernel, {.command_line = {}, .initrd = initrd}, ram.memory());
        const auto params = ram.at<boot_params>(BootArea{}.boot_params());
        EXPECT_EQ(+params.hdr.ramdisk_image, 16 * mib - 0x2000);
        EXPECT_EQ(+params.hdr.ramdisk_size, 0x1801U);
        EXPECT_EQ(+params.ext_ramdisk_image, 0U);
        EXPECT_EQ(ram.text(GuestPhys{params.hdr.ramdisk_image}, initrd.size()),
                  std::string(initrd.size(), 'w'));
        EXPECT_EQ(ram.at<std::uint8_t>(GuestPhys{16 * mib - 0x2000 + 0x1801}), 0);
    }
}

TEST(LoaderTest, InitrdStaysBelowTheKernelsLimit) {
    const Bytes initrd(0x1000, std::byte{1});
    BzImage image;
    image.header.initrd_addr_max = 0x7f'ffff;
    const TestRam ram(16 * mib);
    (void)load_kernel(image.bytes(), {.command_line = {}, .initrd = initrd}, ram.memory());
    EXPECT_EQ(+ram.at<boot_params>(BootArea{}.boot_params()).hdr.ramdisk_image, 8 * mib - 0x1000);

    const TestRam large(5120 * mib);
    (void)load_kernel(BzImage().bytes(), {.command_line = {}, .initrd = initrd}, large.memory());
    EXPECT_EQ(+large.at<boot_params>(BootArea{}.boot_params()).hdr.ramdisk_image, 3072 * mib - 0x1000);
}

TEST(LoaderTest, InitrdThatDoesNotFit) {
    const auto with_initrd = [](const BzImage& image, std::size_t size) {
        const Bytes initrd(size);
        return failure(image.bytes(), {.command_line = {}, .initrd = initrd});
    };
    BzImage image; // ends at 1 MiB + 128 KiB
    EXPECT_EQ(with_initrd(image, 14 * mib), "");
    EXPECT_NE(with_initrd(image, 15 * mib).find("needs at least 17 MiB"), std::string::npos);
    image.header.initrd_addr_max = 2 * mib - 1;
    EXPECT_NE(with_initrd(image, mib).find("does not fit between"), std::string::npos);
    image.header.initrd_addr_max = 0;
    EXPECT_NE(with_initrd(image, 1).find("does not fit between"), std::string::npos);

    SmallElf elf; // occupies the end of RAM
    elf.segments[data_segment].p_paddr = 16 * mib - 0x3000;
    const Bytes initrd(1);
    EXPECT_NE(failure(elf.bytes(), {.command_line = {}, .initrd = initrd}), "");
}

// ---- Boot data

struct E820 {
    std::uint64_t start;
    std::uint64_t end;
    std::uint32_t type;
    bool operator==(const E820&) const = default;
};
std::ostream& operator<<(std::ostream& stream, const E820& entry) {
    return stream << fmt::format("[{:#x}, {:#x}) {}", entry.start, entry.end, entry.type);
}

std::vector<E820> e820_after_load(std::uint64_t memory_size) {
    const TestRam ram(memory_size);
    (void)load_kernel(BzImage().bytes(), {}, ram.memory());
    const auto params = ram.at<boot_params>(BootArea{}.boot_params());
    std::vector<E820> map;
    for (std::size_t i = 0; i < params.e820_entries; ++i) {
        const boot_e820_entry entry = params.e820_table[i];
        map.push_back({entry.addr, entry.addr + entry.size, entry.type});
    }
    return map;
}

TEST(BootDataTest, MemoryMap) {
    EXPECT_EQ(e820_after_load(64 * mib),
              (std::vector<E820>{
                  {0, 0x9fc00, 1}, {0x9fc00, 0xa0000, 2}, {0xf0000, 0x100000, 2}, {0x100000, 64 * mib, 1}}));
    EXPECT_EQ(e820_after_load(5120 * mib), (std::vector<E820>{{0, 0x9fc00, 1},
                                                              {0x9fc00, 0xa0000, 2},
                                                              {0xf0000, 0x100000, 2},
                                                              {0x100000, 3072 * mib, 1},
                                                              {4096 * mib, 6144 * mib, 1}}));
}

TEST(BootDataTest, PageTablesMapFourGigabytesToThemselves) {
    const TestRam ram(2 * mib);
    const LoadedKernel kernel = load_kernel(BzImage().bytes(), {}, ram.memory());
    EXPECT_EQ(kernel.mode, StartMode::long_mode);
    EXPECT_EQ(kernel.page_table_root, GuestPhys{0x9000});
    const auto entry = [&ram](std::uint64_t table, std::uint64_t index) {
        return ram.at<std::uint64_t>(GuestPhys{(table & ~std::uint64_t{0xfff}) + 8 * index});
    };
    for (std::uint64_t address = 0; address < 4096 * mib; address += 2 * mib) {
        const std::uint64_t root = entry(kernel.page_table_root.value(), address >> 39);
        ASSERT_EQ(root, 0xa003U);
        const std::uint64_t pointer = entry(root, address >> 30);
        ASSERT_EQ(pointer, 0xb003U + (address >> 30) * 0x1000);
        ASSERT_EQ(entry(pointer, (address >> 21) % 512), address | 0x83U);
    }
    for (std::uint64_t index = 1; index < 512; ++index)
        ASSERT_EQ(entry(0x9000, index), 0U);
    for (std::uint64_t index = 4; index < 512; ++index)
        ASSERT_EQ(entry(0xa000, index), 0U);
}

TEST(BootDataTest, DescriptorTable) {
    const TestRam ram(2 * mib);
    const LoadedKernel kernel = load_kernel(BzImage().bytes(), {}, ram.memory());
    EXPECT_EQ(kernel.gdt, GuestPhys{0x500});
    EXPECT_EQ(kernel.stack_top, GuestVirt{0x7000});
    // Long-mode code: L set, D clear, present, DPL 0. Data: present, DPL 0, writable.
    EXPECT_EQ((ram.at<std::array<std::uint64_t, 4>>(kernel.gdt)),
              (std::array<std::uint64_t, 4>{0, 0, 0x00af'9b00'0000'ffff, 0x00cf'9300'0000'ffff}));
    EXPECT_EQ(kernel.code_selector, 0x10);
    EXPECT_EQ(kernel.data_selector(), 0x18);
    EXPECT_EQ(kernel.gdt_limit(), 0x1f);
}

TEST(BootDataTest, MakesWayForTheKernel) {
    struct Case {
        std::uint64_t data;      ///< where the kernel's data segment is, of 0x3000 bytes
        std::uint64_t boot_data; ///< where the boot data is then
    };
    for (const Case& c : {Case{0x0, 0x30000}, Case{0x7c00, 0x30000}, Case{0x2'f000, 0x32000},
                          Case{0x3'0000, 0}, Case{0x500, 0x30000}}) {
        SmallElf elf;
        elf.segments[data_segment].p_paddr = c.data;
        const TestRam ram(16 * mib);
        const LoadedKernel kernel =
            load_kernel(elf.bytes(), {.command_line = "x", .initrd = {}}, ram.memory());
        EXPECT_EQ(kernel.stack_top, GuestVirt{c.boot_data + 0x7000}) << c.data;
        EXPECT_EQ(kernel.gdt, GuestPhys{c.boot_data + 0x500});
        EXPECT_EQ(kernel.page_table_root, GuestPhys{c.boot_data + 0x9000});
        EXPECT_EQ(ram.at<std::uint64_t>(kernel.page_table_root), c.boot_data + 0xa003);
        EXPECT_EQ(+ram.at<boot_params>(GuestPhys{kernel.rsi}).hdr.cmd_line_ptr, c.boot_data + 0x20000);
        EXPECT_EQ(ram.text(GuestPhys{c.boot_data + 0x20000}, 2), std::string("x\0", 2));
        EXPECT_EQ(ram.text(GuestPhys{c.data}, elf.data.size()), elf.data);
    }
}

TEST(BootDataTest, ThatDoesNotFitBesideTheKernel) {
    SmallElf elf; // all of RAM but 2 times less than the boot data takes
    elf.segments[code_segment].p_memsz = mib;
    elf.segments[data_segment].p_paddr = 2 * mib;
    elf.segments[data_segment].p_memsz = 14 * mib;
    elf.segments[2] = elf.segments[data_segment];
    elf.segments[2].p_paddr = 0x20000;
    elf.segments[2].p_memsz = 0x60000;
    const std::string message = failure(elf.bytes());
    EXPECT_NE(message.find("boot data"), std::string::npos) << message;
}

TEST(BootDataTest, TellsOfTheAcpiTables) {
    const TestRam ram(16 * mib);
    const LoadedKernel kernel = load_kernel(BzImage().bytes(), {}, ram.memory());
    EXPECT_EQ(+ram.at<boot_params>(GuestPhys{kernel.rsi}).acpi_rsdp_addr, 0xf0000U);
    EXPECT_EQ(ram.text(GuestPhys{0xf0000}, 8), "RSD PTR ");
}

TEST(BootDataTest, TellsOfAcpiTablesThatNoScanFinds) {
    SmallElf elf;
    elf.segments[data_segment].p_paddr = 0x9f000;
    elf.segments[data_segment].p_memsz = 0x1000;
    elf.segments[2] = elf.segments[data_segment];
    elf.segments[2].p_paddr = 0xc0000;
    elf.segments[2].p_memsz = 0x40000;
    const TestRam ram(16 * mib);
    const LoadedKernel kernel = load_kernel(elf.bytes(), {}, ram.memory());
    const auto params = ram.at<boot_params>(GuestPhys{kernel.rsi});
    EXPECT_EQ(+params.acpi_rsdp_addr, 16 * mib - 0x1000);
    EXPECT_EQ(ram.text(GuestPhys{params.acpi_rsdp_addr}, 8), "RSD PTR ");
    ASSERT_EQ(+params.e820_entries, 6) << "the map has them reserved";
    EXPECT_EQ(params.e820_table[5].addr + params.e820_table[5].size, 16 * mib);
    EXPECT_EQ(+params.e820_table[5].type, e820_reserved);
}

TEST(BootDataTest, MemoryWithoutRoomForIt) {
    EXPECT_EQ(failure(BzImage().bytes(), {}, mib),
              "guest memory is too small: a kernel needs at least 2 MiB");
    EXPECT_THROW((void)load_kernel(BzImage().bytes(), {}, GuestMemory()), StartupError);
}

// ---- Hostile files

/// Loads `rounds` mutations of `seed`, whose first `header_size` bytes are hit most. Each is refused or
/// loaded; what is loaded has its entry in RAM and intact boot data around it.
void load_mutations(const Bytes& seed, std::size_t header_size, unsigned rounds) {
    constexpr std::array<std::uint64_t, 10> interesting{
        0,      1,        0x7fff'ffff, 0xffff'ffff, 0x8000'0000'0000'0000, ~std::uint64_t{0},
        0x1000, 0x100000, 16 * mib,    0x500};
    std::mt19937_64 random(20240229); // NOLINT(cert-msc51-cpp): the same sequence every time
    const auto below = [&random](std::size_t limit) { return static_cast<std::size_t>(random() % limit); };
    unsigned loaded = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        Bytes file = seed;
        for (std::size_t hits = 1 + below(3); hits > 0; --hits) {
            const std::size_t limit = below(8) == 0 ? file.size() : header_size;
            if (below(2) == 0) {
                file[below(limit)] = static_cast<std::byte>(random());
            } else {
                const std::size_t size = std::size_t{1} << below(4);
                const std::uint64_t value = interesting.at(below(interesting.size())) + below(3) - 1;
                std::memcpy(file.data() + below(limit - 8), &value, size);
            }
        }
        if (below(16) == 0)
            file.resize(below(file.size()));
        file.shrink_to_fit(); // a sanitizer then sees each byte read behind the end
        const TestRam ram(16 * mib);
        try {
            const LoadedKernel kernel = load_kernel(file, {.command_line = "x", .initrd = {}}, ram.memory());
            ++loaded;
            ASSERT_TRUE(MemoryPlan(ram.memory()).is_unclaimed(GuestPhys{kernel.entry.value()}, 1)) << round;
            const auto line = ram.at<boot_params>(GuestPhys{kernel.rsi}).hdr.cmd_line_ptr;
            ASSERT_EQ(ram.at<char>(GuestPhys{line}), 'x') << round;
            ASSERT_EQ(ram.at<std::uint64_t>(kernel.gdt + kernel.code_selector) >> 40 & 0xff, 0x9bU) << round;
        } catch (const StartupError& error) {
            ASSERT_EQ(error.code(), ExitCode::bad_usage) << round;
        }
    }
    EXPECT_GT(loaded, 0U) << "some mutations are harmless";
    EXPECT_LT(loaded, rounds) << "most are not";
}

TEST(HostileFileTest, MutatedElf) {
    load_mutations(SmallElf().bytes(), sizeof(Elf64_Ehdr) + 2 * sizeof(Elf64_Phdr), 20000);
}

TEST(HostileFileTest, MutatedBzImage) {
    load_mutations(BzImage().bytes(), 0x268, 20000);
}

TEST(HostileFileTest, RandomBytes) {
    std::mt19937_64 random(1); // NOLINT(cert-msc51-cpp): the same sequence every time
    for (unsigned round = 0; round < 2000; ++round) {
        Bytes file(random() % 2048);
        for (std::byte& byte : file)
            byte = static_cast<std::byte>(random());
        EXPECT_NE(failure(file), "") << round;
        if (file.size() >= SELFMAG) {
            std::memcpy(file.data(), ELFMAG, SELFMAG);
            EXPECT_NE(failure(file), "") << round;
        }
    }
}

// ---- A real kernel

constexpr const char* memtest_path = "/boot/memtest86+x64.bin";

TEST(RealKernelTest, Memtest) {
    if (!std::filesystem::exists(memtest_path))
        GTEST_SKIP() << memtest_path << " is not here: package memtest86+ is not installed";
    const Bytes file = read_kernel(memtest_path);
    const TestRam ram(64 * mib);
    const LoadedKernel kernel =
        load_kernel(file, {.command_line = "console=ttyS0,115200", .initrd = {}}, ram.memory());
    EXPECT_EQ(kernel.protocol, KernelProtocol::linux64);
    const GuestPhys load{kernel.entry.value() - 0x200};
    const std::size_t setup = (1 + std::to_integer<std::size_t>(file.at(0x1f1))) * 512;
    const auto loaded = ram.memory().range(load, file.size() - setup);
    EXPECT_TRUE(std::equal(loaded.begin(), loaded.end(), file.begin() + static_cast<std::ptrdiff_t>(setup)));

    for (std::size_t size = 0; size < 8192; ++size)
        ASSERT_NE(failure({file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size)}), "") << size;
}

TEST(RealKernelTest, MutatedMemtest) {
    if (!std::filesystem::exists(memtest_path))
        GTEST_SKIP() << memtest_path << " is not here: package memtest86+ is not installed";
    load_mutations(read_kernel(memtest_path), 0x268, 2000);
}

// ---- Files and sizes

class ReadFileTest : public ::testing::Test {
  protected:
    void SetUp() override {
        folder = std::filesystem::path(::testing::TempDir()) / fmt::format("umbra-loader-test-{}", getpid());
        std::filesystem::create_directories(folder);
    }
    void TearDown() override { std::filesystem::remove_all(folder); }

    [[nodiscard]] std::string path(const char* name) const { return (folder / name).string(); }

    static std::string message(const std::string& path, std::string_view what = "kernel") {
        try {
            (void)(what == "kernel" ? read_kernel(path) : read_file(path, what));
        } catch (const StartupError& error) {
            EXPECT_EQ(error.code(), ExitCode::bad_usage);
            return error.what();
        }
        return {};
    }

    std::filesystem::path folder;
};

TEST_F(ReadFileTest, ReadsEveryByte) {
    const std::string text("a\0b\n\r\xff", 6);
    std::ofstream(path("file"), std::ios::binary) << text;
    EXPECT_EQ(read_file(path("file"), "file"), bytes_of(text));
}

TEST_F(ReadFileTest, TellsWhatIsWrong) {
    EXPECT_EQ(message(path("none")),
              fmt::format("cannot read kernel '{}': No such file or directory", path("none")));
    EXPECT_EQ(message(folder.string(), "initrd"),
              fmt::format("cannot read initrd '{}': Is a directory", folder.string()));
    EXPECT_EQ(message("/dev/zero"), "cannot read kernel '/dev/zero': not a regular file");
    std::ofstream(path("empty")).close();
    EXPECT_EQ(message(path("empty")),
              fmt::format("cannot read kernel '{}': the file is empty", path("empty")));
    EXPECT_EQ(message(path("empty"), "module"), "") << "a module of size 0";
    EXPECT_NE(message(""), "");

    std::ofstream(path("huge")).close();
    std::filesystem::resize_file(path("huge"), std::uint64_t{1} << 40);
    EXPECT_NE(message(path("huge")).find("larger than"), std::string::npos);
}

TEST_F(ReadFileTest, Unreadable) {
    std::ofstream(path("secret")) << "x";
    std::filesystem::permissions(path("secret"), std::filesystem::perms::none);
    if (access(path("secret").c_str(), R_OK) == 0)
        GTEST_SKIP() << "this user reads every file (root)";
    EXPECT_EQ(message(path("secret")),
              fmt::format("cannot read kernel '{}': Permission denied", path("secret")));
}

TEST(MemorySizeTest, Parses) {
    EXPECT_EQ(parse_memory_size("64"), 64 * mib);
    EXPECT_EQ(parse_memory_size("64M"), 64 * mib);
    EXPECT_EQ(parse_memory_size("64m"), 64 * mib);
    EXPECT_EQ(parse_memory_size("2G"), 2048 * mib);
    EXPECT_EQ(parse_memory_size("1g"), 1024 * mib);
    EXPECT_EQ(parse_memory_size("2052K"), 2 * mib + page_size);
    EXPECT_EQ(parse_memory_size("2"), minimum_memory);
    EXPECT_EQ(parse_memory_size("64G"), maximum_memory);
}

TEST(MemorySizeTest, Refuses) {
    for (const char* text :
         {"", "M", "-1", "+64", " 64", "64 M", "64MB", "64T", "1.5G", "0x40", "64M ", "sixty"})
        EXPECT_THROW((void)parse_memory_size(text), StartupError) << text;
    const auto message = [](const char* text) -> std::string {
        try {
            (void)parse_memory_size(text);
        } catch (const StartupError& error) {
            EXPECT_EQ(error.code(), ExitCode::bad_usage);
            return error.what();
        }
        return {};
    };
    EXPECT_EQ(message("1"), "memory size '1' is too small: at least 2 MiB");
    EXPECT_EQ(message("0"), "memory size '0' is too small: at least 2 MiB");
    EXPECT_EQ(message("65G"), "memory size '65G' is too large: at most 64 GiB");
    EXPECT_EQ(message("17179869184G"), "memory size '17179869184G' is too large: at most 64 GiB"); // 2^64
    EXPECT_EQ(message("99999999999999999999"),
              "memory size '99999999999999999999' is too large: at most 64 GiB");
    EXPECT_EQ(message("4097K"), "memory size '4097K' is not a multiple of 4 KiB");
}

TEST(MemorySizeTest, RamLeavesTheDeviceWindowFree) {
    EXPECT_EQ(ram_ranges(64 * mib), (std::vector<RamRange>{{GuestPhys{0}, 64 * mib}}));
    EXPECT_EQ(ram_ranges(3072 * mib), (std::vector<RamRange>{{GuestPhys{0}, 3072 * mib}}));
    EXPECT_EQ(ram_ranges(3073 * mib),
              (std::vector<RamRange>{{GuestPhys{0}, 3072 * mib}, {GuestPhys{4096 * mib}, mib}}));
}

} // namespace
} // namespace umbra
