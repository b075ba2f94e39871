#include "shadow/snapshots.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace umbra {

Snapshots::Snapshots(std::size_t pages) : bytes_(std::max<std::size_t>(pages, 1) * page_size) {
    void* mapped =
        ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        throw std::bad_alloc();
    // Only advice, as all of madvise here: a huge page would be there for the sake of one small one.
    (void)::madvise(mapped, bytes_, MADV_NOHUGEPAGE);
    memory_ = static_cast<std::uint64_t*>(mapped);
}

Snapshots::~Snapshots() {
    ::munmap(memory_, bytes_);
}

/// Neighbours go together: a system call each costs more than all else.
void Snapshots::release(std::vector<TableIndex> tables) {
    std::ranges::sort(tables);
    for (std::size_t begin = 0, end = 0; begin < tables.size(); begin = end) {
        const std::size_t first = TablePool::number(tables[begin]);
        do
            ++end;
        while (end < tables.size() && TablePool::number(tables[end]) <= first + (end - begin));
        (void)::madvise(of(tables[begin]).data(), (end - begin) * page_size, MADV_DONTNEED);
    }
}

} // namespace umbra
