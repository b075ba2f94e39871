#include "vmm/debug/core_file.hpp"

#include "vmm/debug/mapped_ranges.hpp"
#include "vmm/log.hpp"

#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/procfs.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <utility>
#include <vector>

namespace umbra {
namespace {

constexpr std::size_t most_headers = 65'000; // e_phnum's largest value, PN_XNUM, has another meaning

void append(std::vector<std::byte>& out, const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::byte*>(data);
    out.insert(out.end(), bytes, bytes + size);
}

void append_note(std::vector<std::byte>& out, std::uint32_t type, const void* data, std::size_t size) {
    constexpr char name[8] = "CORE"; // padded
    const Elf64_Nhdr header{5, static_cast<Elf64_Word>(size), type};
    append(out, &header, sizeof(header));
    append(out, name, sizeof(name));
    append(out, data, size);
    out.resize((out.size() + 3) & ~std::size_t{3});
}

std::vector<std::byte> notes_of(const VirtualCpu& cpu, const ExtendedState* extended) {
    prstatus_t status{};
    status.pr_pid = 1;
    user_regs_struct regs{};
    regs.r15 = cpu[Gpr::r15], regs.r14 = cpu[Gpr::r14], regs.r13 = cpu[Gpr::r13], regs.r12 = cpu[Gpr::r12];
    regs.r11 = cpu[Gpr::r11], regs.r10 = cpu[Gpr::r10], regs.r9 = cpu[Gpr::r9], regs.r8 = cpu[Gpr::r8];
    regs.rax = cpu[Gpr::rax], regs.rbx = cpu[Gpr::rbx], regs.rcx = cpu[Gpr::rcx], regs.rdx = cpu[Gpr::rdx];
    regs.rsi = cpu[Gpr::rsi], regs.rdi = cpu[Gpr::rdi], regs.rbp = cpu[Gpr::rbp], regs.rsp = cpu[Gpr::rsp];
    regs.orig_rax = ~0ULL; // in no system call
    regs.rip = cpu.rip, regs.eflags = cpu.rflags;
    regs.cs = cpu.cs.selector, regs.ss = cpu.ss.selector, regs.ds = cpu.ds.selector,
    regs.es = cpu.es.selector;
    regs.fs = cpu.fs.selector, regs.gs = cpu.gs.selector;
    regs.fs_base = cpu.fs.base, regs.gs_base = cpu.gs.base;
    static_assert(sizeof(status.pr_reg) == sizeof(regs));
    std::memcpy(&status.pr_reg, &regs, sizeof(regs));
    status.pr_fpvalid = extended != nullptr;
    std::vector<std::byte> notes;
    append_note(notes, NT_PRSTATUS, &status, sizeof(status));
    if (extended != nullptr) {
        const auto image = to_fxsave(*extended);
        append_note(notes, NT_FPREGSET, image.data(), image.size());
    }
    return notes;
}

/// Where the thread may not write more to a file (RLIMIT_FSIZE), it is told by EFBIG alone while this exists.
class SizeLimitIsAnError {
  public:
    SizeLimitIsAnError() {
        sigemptyset(&signal_);
        sigaddset(&signal_, SIGXFSZ);
        pthread_sigmask(SIG_BLOCK, &signal_, &before_);
    }
    ~SizeLimitIsAnError() {
        constexpr timespec at_once{};
        if (sigismember(&before_, SIGXFSZ) != 0)
            return;
        while (sigtimedwait(&signal_, nullptr, &at_once) > 0) {
        }
        pthread_sigmask(SIG_SETMASK, &before_, nullptr);
    }
    SizeLimitIsAnError(const SizeLimitIsAnError&) = delete;
    SizeLimitIsAnError& operator=(const SizeLimitIsAnError&) = delete;
    SizeLimitIsAnError(SizeLimitIsAnError&&) = delete;
    SizeLimitIsAnError& operator=(SizeLimitIsAnError&&) = delete;

  private:
    sigset_t signal_{}, before_{};
};

/// A file that is there for its readers when it is whole, and leaves nothing behind otherwise. Its members
/// set errno when they fail.
class NewFile {
  public:
    /// Only the user may read it.
    explicit NewFile(const std::string& path)
        : path_(path), name_(path + ".XXXXXX"), fd_(::mkostemp(name_.data(), O_CLOEXEC)), made_(fd_ >= 0) {}
    ~NewFile() {
        if (fd_ >= 0)
            ::close(fd_);
        if (made_)
            (void)::unlink(name_.c_str());
    }
    NewFile(const NewFile&) = delete;
    NewFile& operator=(const NewFile&) = delete;
    NewFile(NewFile&&) = delete;
    NewFile& operator=(NewFile&&) = delete;

    [[nodiscard]] bool made() const { return made_; }
    [[nodiscard]] int get() const { return fd_; }
    /// Takes the place of what `path` was. Some file systems tell only by close() that a write has failed.
    [[nodiscard]] bool publish() {
        if (::close(std::exchange(fd_, -1)) != 0 || ::rename(name_.c_str(), path_.c_str()) != 0)
            return false;
        made_ = false;
        return true;
    }

  private:
    std::string path_;
    std::string name_; ///< until then, in the same folder
    int fd_;
    bool made_;
};

bool write_at(int file, const void* data, std::size_t size, std::uint64_t offset) {
    const auto* bytes = static_cast<const std::byte*>(data);
    while (size != 0) {
        const ssize_t done = ::pwrite(file, bytes, size, static_cast<off_t>(offset));
        if (done < 0 && errno == EINTR)
            continue;
        if (done == 0)
            errno = EIO;
        if (done <= 0)
            return false;
        bytes += done, offset += static_cast<std::uint64_t>(done), size -= static_cast<std::size_t>(done);
    }
    return true;
}

bool write_pages(int file, std::span<const std::byte> bytes, std::uint64_t offset) {
    for (; !bytes.empty(); bytes = bytes.subspan(page_size), offset += page_size) {
        const auto page = bytes.first(page_size);
        if (std::ranges::any_of(page, [](std::byte b) { return b != std::byte{}; }) &&
            !write_at(file, page.data(), page.size(), offset))
            return false;
    }
    return true;
}

} // namespace

std::optional<std::string> write_core(const std::string& path, const VirtualCpu& cpu,
                                      const ExtendedState* extended, const GuestMemory& memory,
                                      const GuestPaging& paging) {
    const auto& regions = memory.regions();
    const MappedRanges mapped = guest_ranges(memory, paging);
    std::vector<Elf64_Phdr> headers(
        1); // the notes; offsets in the file are relative to RAM's until it is known
    bool truncated = mapped.truncated;
    const auto load = [&](std::uint64_t at, GuestPhys physical, std::uint64_t size, std::uint32_t flags) {
        std::uint64_t offset = 0;
        for (const auto& region : regions) {
            const GuestPhys first = std::max(physical, region.base);
            const GuestPhys end = std::min(physical + size, region.base + region.bytes.size());
            if (first < end && headers.size() < most_headers)
                headers.push_back({PT_LOAD, flags, offset + (first - region.base), at + (first - physical),
                                   first.value(), end - first, end - first, page_size});
            else if (first < end)
                truncated = true;
            offset += region.bytes.size();
        }
    };
    for (const auto& region : regions)
        load(physical_window.value() + region.base.value(), region.base, region.bytes.size(), PF_R);
    for (const MappedRange& range : mapped.ranges)
        load(range.start.value(), range.physical, range.size,
             PF_R | (range.writable ? PF_W : 0U) | (range.executable ? PF_X : 0U));

    const std::vector<std::byte> notes = notes_of(cpu, extended);
    const std::uint64_t notes_at = sizeof(Elf64_Ehdr) + headers.size() * sizeof(Elf64_Phdr);
    const std::uint64_t ram_at = (notes_at + notes.size() + page_size - 1) & ~(page_size - 1);
    for (Elf64_Phdr& header : headers)
        header.p_offset += ram_at;
    headers[0] = {PT_NOTE, 0, notes_at, 0, 0, notes.size(), 0, 4};
    Elf64_Ehdr elf{};
    std::memcpy(elf.e_ident, ELFMAG, SELFMAG);
    elf.e_ident[EI_CLASS] = ELFCLASS64, elf.e_ident[EI_DATA] = ELFDATA2LSB,
    elf.e_ident[EI_VERSION] = EV_CURRENT;
    elf.e_type = ET_CORE, elf.e_machine = EM_X86_64, elf.e_version = EV_CURRENT;
    elf.e_phoff = elf.e_ehsize = sizeof(Elf64_Ehdr), elf.e_phentsize = sizeof(Elf64_Phdr);
    elf.e_phnum = static_cast<Elf64_Half>(headers.size());

    struct stat info {};
    if (::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode))
        return "it is not a regular file";
    const SizeLimitIsAnError no_signal;
    NewFile file(path);
    if (!file.made())
        return std::strerror(errno);
    bool good = write_at(file.get(), &elf, sizeof(elf), 0) &&
                write_at(file.get(), headers.data(), headers.size() * sizeof(Elf64_Phdr), sizeof(elf)) &&
                write_at(file.get(), notes.data(), notes.size(), notes_at);
    std::uint64_t offset = ram_at;
    for (const auto& region : regions) {
        good = good && write_pages(file.get(), region.bytes, offset);
        offset += region.bytes.size();
    }
    // The last pages may be holes.
    if (!good || ::ftruncate(file.get(), static_cast<off_t>(offset)) != 0 || !file.publish())
        return std::strerror(errno);
    if (truncated)
        log_warning("the guest maps more than a core file can list: '{}' lacks some virtual addresses", path);
    return std::nullopt;
}

} // namespace umbra
