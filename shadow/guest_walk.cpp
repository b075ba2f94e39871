#include "shadow/guest_walk.hpp"

namespace umbra {
namespace {

/// Bits that must be zero in a present entry (Intel SDM vol. 3A, tables 4-15 to 4-20).
std::uint64_t reserved_bits(const GuestPaging& paging, const Level& level, GuestEntry entry) {
    std::uint64_t reserved = entry_bit::frame_mask & ~((std::uint64_t{1} << paging.physical_bits) - 1);
    if (!paging.no_execute)
        reserved |= entry_bit::no_execute;
    if (level.number == 1 || !entry.has(entry_bit::page_size))
        return reserved;
    if (!level.may_be_leaf || (level.number == 3 && !paging.gigabyte_pages))
        return reserved | entry_bit::page_size;
    // A large page's address bits below its size, except bit 12, which is PAT.
    return reserved | ((level.span() - 1) & entry_bit::frame_mask & ~page_size);
}

std::atomic_ref<std::uint64_t> entry_at(std::span<std::byte> bytes) {
    return std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(bytes.data()));
}

} // namespace

GuestWalk walk_guest(const GuestMemory& memory, const GuestPaging& paging, GuestVirt at, Access access) {
    GuestWalk result;
    result.user = result.writable = true;
    std::uint32_t code = (access.write ? PageFault::write : 0) | (access.user ? PageFault::user : 0) |
                         (access.fetch && (paging.no_execute || paging.smep) ? PageFault::fetch : 0);

    const auto read = [&memory](GuestPhys slot) {
        const auto bytes = memory.range(slot, sizeof(std::uint64_t));
        return GuestEntry(bytes.empty() ? ~std::uint64_t{0}
                                        : entry_at(bytes).load(std::memory_order_relaxed));
    };
    const auto visit = [&](const WalkStep<GuestPhysSpace>& step) {
        const GuestEntry entry = step.entry;
        result.steps[result.depth++] = {step.level, step.slot, entry};
        if (!entry.present()) {
            result.fault = PageFault{at, code};
            return WalkNext::stop;
        }
        if ((entry.raw() & reserved_bits(paging, *step.level, entry)) != 0) {
            result.fault = PageFault{at, code | PageFault::present | PageFault::reserved};
            return WalkNext::stop;
        }
        result.user &= entry.user();
        result.writable &= entry.writable();
        result.no_execute |= entry.no_execute();
        return WalkNext::descend;
    };
    if (!walk(*paging.format, paging.root, at, at, read, visit))
        return result;

    // Access rights: Intel SDM vol. 3A, 4.6.1.
    const bool denied = (access.user && !result.user) ||
                        (access.write && !result.writable && (access.user || paging.write_protect)) ||
                        (access.fetch && result.no_execute) ||
                        (access.fetch && !access.user && paging.smep && result.user);
    if (denied) {
        result.fault = PageFault{at, code | PageFault::present};
        return result;
    }
    const GuestWalk::Step& leaf = result.leaf();
    result.address = leaf.entry.page(*leaf.level).base() + (at.value() & (leaf.level->span() - 1));
    return result;
}

bool set_accessed_dirty(const GuestMemory& memory, GuestWalk& walk, bool write) {
    for (unsigned i = 0; i < walk.depth; ++i) {
        GuestWalk::Step& step = walk.steps[i];
        const bool leaf = i + 1 == walk.depth;
        const GuestEntry wanted =
            step.entry.with(entry_bit::accessed | (leaf && write ? entry_bit::dirty : std::uint64_t{0}));
        if (wanted == step.entry)
            continue;
        std::uint64_t expected = step.entry.raw();
        const auto bytes = memory.range(step.slot, sizeof(expected));
        if (!entry_at(bytes).compare_exchange_strong(expected, wanted.raw()))
            return false;
        step.entry = wanted;
    }
    return true;
}

GuestWalk translate(const GuestMemory& memory, const GuestPaging& paging, GuestVirt at, Access access) {
    for (;;) {
        GuestWalk result = walk_guest(memory, paging, at, access);
        if (result.fault || set_accessed_dirty(memory, result, access.write))
            return result;
    }
}

} // namespace umbra
