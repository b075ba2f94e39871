// Keeps the list of free ranges.
#include "vmm/loader/memory_plan.hpp"

#include "vmm/loader/boot_params.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/loader/reject.hpp"

#include <algorithm>
#include <iterator>

namespace umbra {

namespace {

std::uint64_t align_down(std::uint64_t value, std::uint64_t alignment) {
    return value & ~(alignment - 1);
}

} // namespace

MemoryPlan::MemoryPlan(const GuestMemory& memory) : memory_(memory) {
    const auto& regions = memory.regions();
    if (regions.empty() || regions.front().base != GuestPhys{0} ||
        regions.front().bytes.size() < minimum_memory)
        reject("guest memory is too small: a kernel needs at least {} MiB", minimum_memory >> 20);
    for (const boot_e820_entry& entry : e820_map(memory)) {
        if (entry.type == e820_ram)
            free_.push_back({GuestPhys{entry.addr}, GuestPhys{entry.addr + entry.size}});
    }
}

bool MemoryPlan::is_free(GuestPhys start, std::uint64_t size) const {
    return std::ranges::any_of(free_, [start, size](const Range& range) {
        return start >= range.begin && start < range.end && size <= range.end - start;
    });
}

void MemoryPlan::claim(GuestPhys start, std::uint64_t size, std::string_view what) {
    if (size == 0)
        return;
    const GuestPhys end = start + size;
    if (end <= start)
        reject("{} at {} wraps around the address space", what, start);
    const auto found = std::ranges::find_if(
        free_, [start, end](const Range& range) { return start >= range.begin && end <= range.end; });
    if (found == free_.end()) {
        if (is_usable_ram(memory_, start, size))
            reject("{} at {}, {:#x} bytes, overlaps something that is loaded", what, start, size);
        if (end <= low_memory_end && !memory_.contains(start, size))
            reject("{} at {} ends outside guest memory: it needs at least {} MiB", what, start,
                   mebibytes_up_to(end));
        reject("{} at {}, {:#x} bytes, does not lie in usable memory", what, start, size);
    }
    const Range before{found->begin, start}, behind{end, found->end};
    const auto at = free_.erase(found);
    const auto next = behind.begin < behind.end ? free_.insert(at, behind) : at;
    if (before.begin < before.end)
        free_.insert(next, before);
}

std::optional<GuestPhys> MemoryPlan::lowest(std::uint64_t size, const PlacementWindow& window) const {
    for (const Range& range : free_) {
        const std::uint64_t above = std::max(range.begin, window.begin).value() + (window.alignment - 1);
        const GuestPhys begin{align_down(above, window.alignment)};
        const GuestPhys end = std::min(range.end, window.end);
        if (begin < end && size <= end - begin)
            return begin;
    }
    return std::nullopt;
}

std::optional<GuestPhys> MemoryPlan::highest(std::uint64_t size, const PlacementWindow& window) const {
    std::optional<GuestPhys> found;
    for (const Range& range : free_) {
        const GuestPhys begin = std::max(range.begin, window.begin);
        const GuestPhys end = std::min(range.end, window.end);
        if (begin >= end || size > end - begin)
            continue;
        const GuestPhys at{align_down((end - size).value(), window.alignment)};
        if (at >= begin)
            found = at;
    }
    return found;
}

GuestPhys MemoryPlan::store(std::span<const std::byte> bytes, const PlacementWindow& window,
                            std::string_view what) {
    const auto at = lowest(bytes.size(), window);
    if (!at)
        reject("{} of {} bytes does not fit into guest memory", what, bytes.size());
    claim(*at, bytes.size(), what);
    std::ranges::copy(bytes, memory_.range(*at, bytes.size()).begin());
    return *at;
}

} // namespace umbra
