// Keeps the list of free ranges.
#include "vmm/loader/memory_plan.hpp"

#include "vmm/loader/boot_params.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/loader/reject.hpp"

#include <algorithm>
#include <array>
#include <iterator>
#include <utility>

namespace umbra {

namespace {

std::uint64_t align_down(std::uint64_t value, std::uint64_t alignment) {
    return value & ~(alignment - 1);
}

} // namespace

// --- FreeMemory

void FreeMemory::add(GuestPhys begin, GuestPhys end) {
    if (begin < end)
        ranges_.push_back({begin, end});
}

void FreeMemory::remove(GuestPhys begin, GuestPhys end) {
    std::vector<Range> rest;
    for (const Range& range : ranges_) {
        const Range before{range.begin, std::min(range.end, begin)},
            behind{std::max(range.begin, end), range.end};
        std::ranges::copy_if(std::array{before, behind}, std::back_inserter(rest),
                             [](const Range& piece) { return piece.begin < piece.end; });
    }
    ranges_ = std::move(rest);
}

bool FreeMemory::covers(GuestPhys begin, GuestPhys end) const {
    return std::ranges::any_of(ranges_, [begin, end](const Range& range) {
        return begin >= range.begin && begin < end && end <= range.end;
    });
}

std::optional<GuestPhys> FreeMemory::lowest(std::uint64_t size, const PlacementWindow& window) const {
    for (const Range& range : ranges_) {
        const std::uint64_t above = std::max(range.begin, window.begin).value() + (window.alignment - 1);
        const GuestPhys begin{align_down(above, window.alignment)};
        const GuestPhys end = std::min(range.end, window.end);
        if (begin < end && size <= end - begin)
            return begin;
    }
    return std::nullopt;
}

std::optional<GuestPhys> FreeMemory::highest(std::uint64_t size, const PlacementWindow& window) const {
    std::optional<GuestPhys> found;
    for (const Range& range : ranges_) {
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

// --- MemoryPlan

MemoryPlan::MemoryPlan(const GuestMemory& memory) : memory_(memory) {
    const auto& regions = memory.regions();
    if (regions.empty() || regions.front().base != GuestPhys{0} ||
        regions.front().bytes.size() < minimum_memory)
        reject("guest memory is too small: a kernel needs at least {} MiB", minimum_memory >> 20);
    for (const GuestMemory::Region& region : regions)
        ram_.add(region.base, region.base + region.bytes.size());
    ram_.remove(vga_memory_begin, vga_memory_end);
    map_ = e820_map(memory);
    for (const boot_e820_entry& entry : map_) {
        if (entry.type == e820_ram)
            usable_.add(GuestPhys{entry.addr}, GuestPhys{entry.addr + entry.size});
    }
}

bool MemoryPlan::is_free(GuestPhys start, std::uint64_t size) const {
    return usable_.covers(start, start + size);
}

bool MemoryPlan::is_unclaimed(GuestPhys start, std::uint64_t size) const {
    return ram_.covers(start, start + size);
}

void MemoryPlan::claim(GuestPhys start, std::uint64_t size, std::string_view what) {
    if (size == 0)
        return;
    const GuestPhys end = start + size;
    if (end <= start)
        reject("{} at {} wraps around the address space", what, start);
    if (!ram_.covers(start, end)) {
        if (end <= low_memory_end && !memory_.contains(start, size))
            reject("{} at {} ends outside guest memory: it needs at least {} MiB", what, start,
                   mebibytes_up_to(end));
        if (memory_.contains(start, size) && (end <= vga_memory_begin || start >= vga_memory_end))
            reject("{} at {}, {:#x} bytes, overlaps something that is loaded", what, start, size);
        reject("{} at {}, {:#x} bytes, does not lie in usable memory", what, start, size);
    }
    ram_.remove(start, end);
    usable_.remove(start, end);
}

GuestPhys MemoryPlan::reserve(std::uint64_t size, std::string_view what) {
    const std::uint64_t whole = (size + page_size - 1) & ~(page_size - 1);
    const auto at = highest(whole, {extended_memory, low_memory_end});
    if (!at)
        reject("{} of {} bytes does not fit into guest memory beside the kernel", what, size);
    claim(*at, whole, what);
    const auto entry = std::ranges::find_if(map_, [at](const boot_e820_entry& range) {
        return at->value() - range.addr < range.size; // wraps when it is below: then too large
    });
    const boot_e820_entry before{entry->addr, at->value() - entry->addr, e820_ram};
    const boot_e820_entry reserved{at->value(), whole, e820_reserved};
    const boot_e820_entry behind{reserved.addr + whole, entry->size - before.size - whole, e820_ram};
    auto next = map_.erase(entry);
    for (const boot_e820_entry& piece : {behind, reserved, before}) {
        if (piece.size != 0)
            next = map_.insert(next, piece);
    }
    return *at;
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
