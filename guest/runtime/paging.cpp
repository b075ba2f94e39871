// Frames and page tables.
#include "guest/runtime/paging.hpp"

#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/process.hpp"

#include <cstring>

extern "C" const std::uint8_t image_end[]; // kernel.ld

namespace umbra::guest {
namespace {

std::uint64_t next_free = 0;
std::uint64_t end_of_memory = 0;

Word& table_entry(std::uint64_t table, std::uint64_t virt, unsigned level) {
    const std::uint64_t index = virt / span_of(level) % 512;
    return physical(table, index);
}

} // namespace

void init_memory(const BootParams& boot) {
    next_free = reinterpret_cast<std::uint64_t>(image_end);
    end_of_memory = boot.ram_end();
}

std::uint64_t allocate_frames(std::uint64_t count, std::uint64_t alignment) {
    const std::uint64_t first = (next_free + alignment - 1) & ~(alignment - 1);
    const std::uint64_t end = first + count * page_4k;
    if (end > end_of_memory) {
        print("out of memory: %lu frames wanted at %#lx, RAM ends at %#lx\n", count, first, end_of_memory);
        exit_guest(exit_out_of_memory);
    }
    next_free = end;
    std::memset(reinterpret_cast<void*>(first), 0, count * page_4k);
    return first;
}

AddressSpace AddressSpace::create() {
    AddressSpace space(allocate_frame());
    physical(space.root_) = physical(current().root_);
    return space;
}

AddressSpace AddressSpace::current() {
    return AddressSpace(read_cr3() & pte_address);
}

void AddressSpace::load() const {
    write_cr3(root_);
}

void AddressSpace::map(std::uint64_t virt, std::uint64_t phys, std::uint64_t flags, unsigned level) const {
    std::uint64_t table = root_;
    for (unsigned at = 4; at > level; --at) {
        Word& slot = table_entry(table, virt, at);
        if ((slot & pte_present) == 0)
            slot = allocate_frame() | pte_user_rw;
        table = slot & pte_address;
    }
    table_entry(table, virt, level) = phys | flags | (level > 1 ? pte_large : 0);
}

Word& AddressSpace::entry(std::uint64_t virt, unsigned level) const {
    std::uint64_t table = root_;
    for (unsigned at = 4; at > level; --at)
        table = table_entry(table, virt, at) & pte_address;
    return table_entry(table, virt, level);
}

} // namespace umbra::guest
