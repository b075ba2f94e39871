// Unit tests of vmm/debug/core_file.hpp: the file as a reader of ELF sees it, and what a failure leaves.
#include "vmm/debug/core_file.hpp"

#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <elf.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/procfs.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/user.h>
#include <unistd.h>

namespace umbra {
namespace {

namespace fs = std::filesystem;
using namespace std::string_view_literals;

constexpr std::uint64_t kernel_rights = entry_bit::present | entry_bit::writable;
constexpr std::uint64_t mb = 1 << 20;

/// Two pieces of RAM, and page tables that map some of it.
class Guest {
  public:
    static constexpr GuestPhys low{0}, high{0x1'0000'0000};
    static constexpr std::uint64_t low_size = 4 * mb, high_size = 16 * page_size;
    static constexpr GuestVirt text{0xffff'ffff'8000'0000}, data{0x7000}, block{0x4000'0000},
        device{0x5000'0000};

    Guest() {
        for (std::uint64_t page = 16; page < low_.size() / page_size; page += 3) // others stay zero
            fill(low_, page);
        fill(high_, 2), fill(high_, 3), fill(high_, 15);
        map(text, high + 2 * page_size, entry_bit::present);
        map(text + page_size, high + 3 * page_size, entry_bit::present);
        map(data, GuestPhys(0x15'3000), kernel_rights | entry_bit::no_execute);
        map(device, GuestPhys(0xfee0'0000), kernel_rights | entry_bit::no_execute);
        map(block, GuestPhys(2 * mb), kernel_rights | entry_bit::page_size, 2);
        paging.root = GuestFrame(1);
        paging.no_execute = true;
    }

    void map(GuestVirt at, GuestPhys to, std::uint64_t bits, unsigned level = 1) {
        std::uint64_t table = page_size;
        for (unsigned number = 4; number > level; --number) {
            const std::uint64_t slot = table + sizeof(GuestEntry) * paging_4_level.level(number).index(at);
            std::uint64_t entry = get(slot);
            if (entry == 0)
                put(slot, entry = (next_table_ += page_size) | kernel_rights | entry_bit::user);
            table = entry & ~(page_size - 1);
        }
        put(table + sizeof(GuestEntry) * paging_4_level.level(level).index(at), to.value() | bits);
    }

    GuestMemory memory() { return GuestMemory({{low, low_}, {high, high_}}); }
    GuestPaging paging;

  private:
    std::uint64_t get(std::uint64_t at) const {
        std::uint64_t value = 0;
        std::memcpy(&value, low_.data() + at, sizeof(value));
        return value;
    }
    void put(std::uint64_t at, std::uint64_t value) { std::memcpy(low_.data() + at, &value, sizeof(value)); }
    static void fill(std::vector<std::byte>& ram, std::uint64_t page) {
        for (std::uint64_t i = 0; i < page_size; ++i)
            ram.at(page * page_size + i) = static_cast<std::byte>(page * 7 + i * 13 + 1);
    }

    std::vector<std::byte> low_ = std::vector<std::byte>(low_size);
    std::vector<std::byte> high_ = std::vector<std::byte>(high_size);
    std::uint64_t next_table_ = page_size;
};

class CoreFile : public ::testing::Test {
  public:
    CoreFile() {
        std::string name = (fs::temp_directory_path() / "umbra-core-XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr)
            throw std::runtime_error("no temporary folder");
        folder = name;
        path = folder / "guest.core";
        for (std::size_t i = 0; i < cpu.gpr.size(); ++i)
            cpu.gpr[i] = 0x1111'0000'0000'0000 + i;
        cpu.rip = 0xffff'ffff'8000'0123;
        cpu.rflags = 0x246;
        cpu.cs.selector = 0x8, cpu.ss.selector = 0x10, cpu.ds.selector = 0x18, cpu.es.selector = 0x20;
        cpu.fs.selector = 0x28, cpu.gs.selector = 0x30;
        cpu.fs.base = 0x1234'5000, cpu.gs.base = 0xffff'8800'0000'0000;
    }
    ~CoreFile() override {
        std::error_code ignored;
        fs::permissions(folder, fs::perms::owner_all, ignored);
        fs::remove_all(folder, ignored);
    }
    CoreFile(const CoreFile&) = delete;
    CoreFile& operator=(const CoreFile&) = delete;
    CoreFile(CoreFile&&) = delete;
    CoreFile& operator=(CoreFile&&) = delete;

    [[nodiscard]] std::optional<std::string> write(const ExtendedState* extended = nullptr) {
        return write_core(path.string(), cpu, extended, guest.memory(), guest.paging);
    }
    /// Names in the folder.
    [[nodiscard]] std::vector<std::string> listing() const {
        std::vector<std::string> names;
        for (const auto& entry : fs::directory_iterator(folder))
            names.push_back(entry.path().filename().string());
        return names;
    }

    fs::path folder, path;
    Guest guest;
    VirtualCpu cpu;
};

std::string contents(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

/// The file in the terms of the System V ABI. Whatever lies outside the file throws.
class Elf {
  public:
    explicit Elf(const fs::path& path) : bytes_(contents(path)) {
        header = at<Elf64_Ehdr>(0);
        for (unsigned i = 0; i < header.e_phnum; ++i)
            segments.push_back(at<Elf64_Phdr>(header.e_phoff + i * sizeof(Elf64_Phdr)));
    }
    template<class T>
    [[nodiscard]] T at(std::uint64_t offset) const {
        T value{};
        std::memcpy(&value, range(offset, sizeof(T)).data(), sizeof(T));
        return value;
    }
    [[nodiscard]] std::string_view range(std::uint64_t offset, std::uint64_t size) const {
        const std::string_view rest = std::string_view(bytes_).substr(offset); // throws
        if (size > rest.size())
            throw std::out_of_range("beyond the file's end");
        return rest.substr(0, size);
    }
    /// The note's content.
    [[nodiscard]] std::optional<std::string_view> note(std::uint32_t type) const {
        for (const Elf64_Phdr& segment : segments) {
            if (segment.p_type != PT_NOTE)
                continue;
            for (std::uint64_t done = 0; done < segment.p_filesz;) {
                const auto found = at<Elf64_Nhdr>(segment.p_offset + done);
                const std::uint64_t name = segment.p_offset + done + sizeof(found);
                const std::uint64_t content = name + ((found.n_namesz + 3U) & ~3U);
                if (found.n_type == type && range(name, found.n_namesz) == "CORE\0"sv)
                    return range(content, found.n_descsz);
                done = content + ((found.n_descsz + 3U) & ~3U) - segment.p_offset;
            }
        }
        return std::nullopt;
    }
    /// The segment that has this address.
    [[nodiscard]] const Elf64_Phdr* segment(std::uint64_t address) const {
        const auto found = std::ranges::find_if(segments, [address](const Elf64_Phdr& s) {
            return s.p_type == PT_LOAD && address - s.p_vaddr < s.p_memsz;
        });
        return found == segments.end() ? nullptr : &*found;
    }
    /// The page at this address.
    [[nodiscard]] std::optional<std::string_view> page(std::uint64_t address) const {
        const Elf64_Phdr* found = segment(address);
        if (found == nullptr)
            return std::nullopt;
        return range(found->p_offset + (address - found->p_vaddr), page_size);
    }

    Elf64_Ehdr header{};
    std::vector<Elf64_Phdr> segments;

  private:
    std::string bytes_;
};

std::string_view page_of(const GuestMemory& memory, GuestPhys at) {
    const auto bytes = memory.range(at, page_size);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// ---- What is in it

TEST_F(CoreFile, IsAnElfCore) {
    ASSERT_EQ(write(), std::nullopt);
    const Elf elf(path);
    EXPECT_EQ(std::memcmp(elf.header.e_ident, ELFMAG, SELFMAG), 0);
    EXPECT_EQ(elf.header.e_ident[EI_CLASS], ELFCLASS64);
    EXPECT_EQ(elf.header.e_ident[EI_DATA], ELFDATA2LSB);
    EXPECT_EQ(elf.header.e_ident[EI_VERSION], EV_CURRENT);
    EXPECT_EQ(elf.header.e_type, ET_CORE);
    EXPECT_EQ(elf.header.e_machine, EM_X86_64);
    EXPECT_EQ(elf.header.e_version, EV_CURRENT);
    EXPECT_EQ(elf.header.e_ehsize, sizeof(Elf64_Ehdr));
    EXPECT_EQ(elf.header.e_phentsize, sizeof(Elf64_Phdr));
    ASSERT_FALSE(elf.segments.empty());
    EXPECT_EQ(std::ranges::count(elf.segments, Elf64_Word{PT_NOTE}, &Elf64_Phdr::p_type), 1);
    for (const Elf64_Phdr& segment : elf.segments) {
        EXPECT_EQ(elf.range(segment.p_offset, segment.p_filesz).size(), segment.p_filesz);
        if (segment.p_type != PT_LOAD)
            continue;
        EXPECT_EQ(segment.p_filesz, segment.p_memsz);
        EXPECT_EQ(segment.p_offset % segment.p_align, segment.p_vaddr % segment.p_align);
    }
    EXPECT_EQ(listing(), std::vector<std::string>{"guest.core"});
    struct stat info {};
    ASSERT_EQ(::stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600U) << "a guest's memory may hold secrets";
}

TEST_F(CoreFile, HoldsTheRegisters) {
    ASSERT_EQ(write(), std::nullopt);
    const Elf elf(path);
    const auto note = elf.note(NT_PRSTATUS);
    ASSERT_TRUE(note);
    ASSERT_EQ(note->size(), sizeof(prstatus_t));
    prstatus_t status{};
    std::memcpy(&status, note->data(), sizeof(status));
    user_regs_struct regs{};
    static_assert(sizeof(regs) == sizeof(status.pr_reg));
    std::memcpy(&regs, &status.pr_reg, sizeof(regs));
    EXPECT_EQ(regs.rax, cpu[Gpr::rax]);
    EXPECT_EQ(regs.rbx, cpu[Gpr::rbx]);
    EXPECT_EQ(regs.rcx, cpu[Gpr::rcx]);
    EXPECT_EQ(regs.rdx, cpu[Gpr::rdx]);
    EXPECT_EQ(regs.rsi, cpu[Gpr::rsi]);
    EXPECT_EQ(regs.rdi, cpu[Gpr::rdi]);
    EXPECT_EQ(regs.rbp, cpu[Gpr::rbp]);
    EXPECT_EQ(regs.rsp, cpu[Gpr::rsp]);
    EXPECT_EQ(regs.r8, cpu[Gpr::r8]);
    EXPECT_EQ(regs.r9, cpu[Gpr::r9]);
    EXPECT_EQ(regs.r10, cpu[Gpr::r10]);
    EXPECT_EQ(regs.r11, cpu[Gpr::r11]);
    EXPECT_EQ(regs.r12, cpu[Gpr::r12]);
    EXPECT_EQ(regs.r13, cpu[Gpr::r13]);
    EXPECT_EQ(regs.r14, cpu[Gpr::r14]);
    EXPECT_EQ(regs.r15, cpu[Gpr::r15]);
    EXPECT_EQ(regs.rip, 0xffff'ffff'8000'0123);
    EXPECT_EQ(regs.eflags, 0x246U);
    EXPECT_EQ(regs.cs, 0x8U);
    EXPECT_EQ(regs.ss, 0x10U);
    EXPECT_EQ(regs.ds, 0x18U);
    EXPECT_EQ(regs.es, 0x20U);
    EXPECT_EQ(regs.fs, 0x28U);
    EXPECT_EQ(regs.gs, 0x30U);
    EXPECT_EQ(regs.fs_base, 0x1234'5000U);
    EXPECT_EQ(regs.gs_base, 0xffff'8800'0000'0000);
    EXPECT_EQ(elf.note(NT_FPREGSET), std::nullopt);
    EXPECT_EQ(status.pr_fpvalid, 0);
}

TEST_F(CoreFile, HoldsTheFloatingPointRegisters) {
    ExtendedState state;
    state.mxcsr = 0x1fa0;
    state.fctrl = 0x27f;
    state.xmm[3].fill(std::byte{0x5a});
    ASSERT_EQ(write(&state), std::nullopt);
    const Elf elf(path);
    const auto note = elf.note(NT_FPREGSET);
    ASSERT_TRUE(note);
    user_fpregs_struct regs{};
    ASSERT_EQ(note->size(), sizeof(regs));
    std::memcpy(&regs, note->data(), sizeof(regs));
    EXPECT_EQ(regs.mxcsr, 0x1fa0U);
    EXPECT_EQ(regs.cwd, 0x27fU);
    EXPECT_EQ(regs.xmm_space[12], 0x5a5a'5a5aU);
    EXPECT_EQ(regs.xmm_space[16], 0U);
}

TEST_F(CoreFile, ShowsMemoryAtItsVirtualAddresses) {
    ASSERT_EQ(write(), std::nullopt);
    const Elf elf(path);
    const GuestMemory memory = guest.memory();
    const auto expect_page = [&](GuestVirt virt, GuestPhys phys, std::uint32_t flags) {
        SCOPED_TRACE(fmt::format("{}", virt));
        const auto page = elf.page(virt.value());
        ASSERT_TRUE(page);
        EXPECT_TRUE(*page == page_of(memory, phys));
        EXPECT_EQ(elf.segment(virt.value())->p_flags, flags);
        EXPECT_EQ(elf.segment(virt.value())->p_paddr + (virt.value() - elf.segment(virt.value())->p_vaddr),
                  phys.value());
    };
    expect_page(Guest::text, Guest::high + 2 * page_size, PF_R | PF_X);
    expect_page(Guest::text + page_size, Guest::high + 3 * page_size, PF_R | PF_X);
    expect_page(Guest::data, GuestPhys(0x15'3000), PF_R | PF_W);
    for (std::uint64_t offset = 0; offset < 2 * mb; offset += page_size)
        expect_page(Guest::block + offset, GuestPhys(2 * mb + offset), PF_R | PF_W | PF_X);
    for (const GuestVirt absent :
         {Guest::text + 2 * page_size, Guest::text - page_size, Guest::block + 2 * mb, Guest::device})
        EXPECT_EQ(elf.segment(absent.value()), nullptr) << fmt::format("{}", absent);
}

TEST_F(CoreFile, ShowsAllOfRamInTheWindow) {
    ASSERT_EQ(write(), std::nullopt);
    const Elf elf(path);
    const GuestMemory memory = guest.memory();
    for (const auto& region : memory.regions()) {
        for (std::uint64_t offset = 0; offset < region.bytes.size(); offset += page_size) {
            const GuestPhys at = region.base + offset;
            const auto page = elf.page(physical_window.value() + at.value());
            ASSERT_TRUE(page);
            EXPECT_TRUE(*page == page_of(memory, at)) << fmt::format("{}", at);
        }
    }
    EXPECT_EQ(elf.segment(physical_window.value() + Guest::low_size), nullptr);
    EXPECT_EQ(elf.segment(physical_window.value() + Guest::high.value() + Guest::high_size), nullptr);
}

TEST_F(CoreFile, HasRamOnceAndZerosAsHoles) {
    ASSERT_EQ(write(), std::nullopt);
    struct stat info {};
    ASSERT_EQ(::stat(path.c_str(), &info), 0);
    const auto size = static_cast<std::uint64_t>(info.st_size);
    EXPECT_GE(size, Guest::low_size + Guest::high_size);
    EXPECT_LE(size, Guest::low_size + Guest::high_size + 4 * page_size);
    EXPECT_LT(static_cast<std::uint64_t>(info.st_blocks) * 512, size / 2)
        << "a third of the pages are filled";
}

TEST_F(CoreFile, OfAGuestWithoutPaging) {
    guest.paging.format = &paging_off;
    ASSERT_EQ(write(), std::nullopt);
    const Elf elf(path);
    const auto page = elf.page(0x15'3000);
    ASSERT_TRUE(page);
    EXPECT_TRUE(*page == page_of(guest.memory(), GuestPhys(0x15'3000)));
    EXPECT_EQ(elf.segment(Guest::high.value()), nullptr) << "not without paging";
}

TEST_F(CoreFile, TakesThePlaceOfAFile) {
    std::ofstream(path) << std::string(8 * mb, 'x');
    ASSERT_EQ(write(), std::nullopt);
    EXPECT_EQ(Elf(path).header.e_type, ET_CORE);
    EXPECT_LT(fs::file_size(path), 8 * mb);
    EXPECT_EQ(listing().size(), 1U);
}

// ---- What goes wrong

/// No file may be longer, for as long as this exists.
class FileSizeLimit {
  public:
    explicit FileSizeLimit(rlim_t bytes) {
        EXPECT_EQ(::getrlimit(RLIMIT_FSIZE, &before_), 0);
        const rlimit limit{bytes, before_.rlim_max};
        EXPECT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
    }
    ~FileSizeLimit() { ::setrlimit(RLIMIT_FSIZE, &before_); }
    FileSizeLimit(const FileSizeLimit&) = delete;
    FileSizeLimit& operator=(const FileSizeLimit&) = delete;
    FileSizeLimit(FileSizeLimit&&) = delete;
    FileSizeLimit& operator=(FileSizeLimit&&) = delete;

  private:
    rlimit before_{};
};

TEST_F(CoreFile, ThatCannotBeWholeIsNotThereAtAll) {
    for (const rlim_t limit : {rlim_t{0}, rlim_t{100}, rlim_t{page_size}, rlim_t{3 * mb}}) {
        const FileSizeLimit small(limit);
        EXPECT_EQ(write(), std::strerror(EFBIG)) << limit;
        EXPECT_EQ(listing(), std::vector<std::string>{}) << limit;
    }
    ASSERT_EQ(write(), std::nullopt) << "no signal is pending";
}

TEST_F(CoreFile, ThatCannotBeWholeLeavesTheOldOne) {
    std::ofstream(path) << "old";
    {
        const FileSizeLimit small(3 * mb);
        EXPECT_EQ(write(), std::strerror(EFBIG));
    }
    EXPECT_EQ(contents(path), "old");
    EXPECT_EQ(listing().size(), 1U);
}

TEST_F(CoreFile, LeavesTheSignalMaskAsItIs) {
    for (const int how : {SIG_BLOCK, SIG_UNBLOCK}) {
        sigset_t wanted, after;
        sigemptyset(&wanted);
        sigaddset(&wanted, SIGXFSZ);
        ASSERT_EQ(pthread_sigmask(how, &wanted, nullptr), 0);
        ASSERT_EQ(write(), std::nullopt);
        ASSERT_EQ(pthread_sigmask(SIG_BLOCK, nullptr, &after), 0);
        EXPECT_EQ(sigismember(&after, SIGXFSZ) != 0, how == SIG_BLOCK);
    }
}

TEST_F(CoreFile, InAFolderThatIsNotThere) {
    path = folder / "none" / "guest.core";
    EXPECT_EQ(write(), std::strerror(ENOENT));
    EXPECT_EQ(listing(), std::vector<std::string>{});
}

TEST_F(CoreFile, InAFolderThatMayNotBeWrittenTo) {
    if (::geteuid() != 0) {
        fs::permissions(folder, fs::perms::owner_read | fs::perms::owner_exec);
        EXPECT_EQ(write(), std::strerror(EACCES));
    } else { // whom permissions do not stop
        path = "/proc/self/guest.core";
        EXPECT_NE(write(), std::nullopt);
    }
    EXPECT_EQ(listing(), std::vector<std::string>{});
}

TEST_F(CoreFile, InWhatIsNoFolder) {
    std::ofstream(folder / "file") << "old";
    path = folder / "file" / "guest.core";
    EXPECT_EQ(write(), std::strerror(ENOTDIR));
    EXPECT_EQ(contents(folder / "file"), "old");
}

TEST_F(CoreFile, TakesThePlaceOfNothingButAFile) {
    fs::create_directory(path);
    EXPECT_EQ(write(), "it is not a regular file");
    EXPECT_TRUE(fs::is_directory(path));
    path = "/dev/full";
    EXPECT_EQ(write(), "it is not a regular file");
    path = folder / "link";
    fs::create_symlink("/dev/full", path);
    EXPECT_EQ(write(), "it is not a regular file");
    EXPECT_TRUE(fs::is_symlink(path));
    EXPECT_EQ(listing().size(), 2U);
}

TEST_F(CoreFile, ErrorsAreOneLine) {
    path = folder / "none" / "guest.core";
    const auto problem = write();
    ASSERT_TRUE(problem);
    EXPECT_EQ(problem->find('\n'), std::string::npos);
    EXPECT_FALSE(problem->empty());
}

} // namespace
} // namespace umbra
