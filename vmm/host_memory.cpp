#include "vmm/host_memory.hpp"

#include "vmm/error.hpp"
#include "vmm/kvm/file.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include <fmt/core.h>

namespace umbra {
namespace {

constexpr std::size_t alignment = std::size_t{2} << 20; // so that the machine can map it by large pages

[[noreturn]] void fail(std::size_t size, const char* what) {
    throw StartupError(ExitCode::host_cannot, fmt::format("cannot reserve {} MB for {}: {}", size >> 20, what,
                                                          std::strerror(errno)));
}

/// An aligned anonymous mapping.
std::span<std::byte> reserve(std::size_t size, int protection, const char* what) {
    void* mapped =
        ::mmap(nullptr, size + alignment, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        fail(size, what);
    // Trim what the alignment leaves over on both sides.
    auto* start = static_cast<std::byte*>(mapped);
    const std::size_t before = (alignment - reinterpret_cast<std::uintptr_t>(start) % alignment) % alignment;
    if (before != 0)
        ::munmap(start, before);
    ::munmap(start + before + size, alignment - before);
    return {start + before, size};
}

/// Only advice: where it is not taken, all works as well with small pages.
void advise(std::span<std::byte> bytes, HostMemory::Pages pages) {
    (void)::madvise(bytes.data(), bytes.size(),
                    pages == HostMemory::Pages::huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

} // namespace

HostMemory::HostMemory(std::size_t size, Pages pages, const char* what)
    : bytes_(reserve(size, PROT_READ | PROT_WRITE, what)) {
    advise(bytes_, pages);
}

std::array<HostMemory, 2> HostMemory::twice(std::size_t size, const char* what) {
    const File file(::memfd_create(what, MFD_CLOEXEC));
    if (file.get() < 0 || ::ftruncate(file.get(), static_cast<off_t>(size)) != 0)
        fail(size, what);
    std::array<HostMemory, 2> views;
    for (HostMemory& view : views) {
        view = HostMemory(reserve(size, PROT_NONE, what));
        if (::mmap(view.bytes_.data(), size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file.get(), 0) ==
            MAP_FAILED)
            fail(size, what);
        advise(view.bytes_, Pages::small);
    }
    return views;
}

HostMemory::~HostMemory() {
    if (!bytes_.empty())
        ::munmap(bytes_.data(), bytes_.size());
}

} // namespace umbra
