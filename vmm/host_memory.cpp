#include "vmm/host_memory.hpp"

#include "vmm/error.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include <fmt/format.h>

namespace umbra {
namespace {

constexpr std::size_t alignment = std::size_t{2} << 20; // so that the machine can map it by large pages

} // namespace

HostMemory::HostMemory(std::size_t size, Pages pages, const char* what) {
    void* mapped = ::mmap(nullptr, size + alignment, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        throw StartupError(ExitCode::host_cannot, fmt::format("cannot reserve {} MB for {}: {}", size >> 20,
                                                              what, std::strerror(errno)));
    // Trim what the alignment leaves over on both sides.
    auto* start = static_cast<std::byte*>(mapped);
    const std::size_t before = (alignment - reinterpret_cast<std::uintptr_t>(start) % alignment) % alignment;
    if (before != 0)
        ::munmap(start, before);
    ::munmap(start + before + size, alignment - before);
    bytes_ = {start + before, size};
    // Only advice: where it is not taken, all works as well with small pages.
    (void)::madvise(bytes_.data(), size, pages == Pages::huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

HostMemory::~HostMemory() {
    if (!bytes_.empty())
        ::munmap(bytes_.data(), bytes_.size());
}

} // namespace umbra
