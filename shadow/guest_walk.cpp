#include "shadow/guest_walk.hpp"

#include "shadow/entry_access.hpp"

namespace umbra {
namespace {

/// The entry at `slot`, of 4 or 8 bytes, read once; outside RAM all ones.
GuestEntry entry_at(const GuestMemory& memory, GuestPhys slot, unsigned entry_bytes) {
    const auto bytes = memory.range(slot, entry_bytes);
    if (bytes.empty())
        return GuestEntry(~std::uint64_t{0} >> (64 - 8 * entry_bytes));
    return load_entry(bytes, 0, entry_bytes);
}

template<class Raw>
bool exchange_entry(std::span<std::byte> bytes, GuestEntry from, GuestEntry to) {
    auto expected = static_cast<Raw>(from.raw());
    return std::atomic_ref<Raw>(*reinterpret_cast<Raw*>(bytes.data()))
        .compare_exchange_strong(expected, static_cast<Raw>(to.raw()));
}

/// Atomic: false if the entry of that step is not `step.entry` any more. It lies in RAM.
bool exchange_entry(const GuestMemory& memory, const GuestWalk::Step& step, GuestEntry to) {
    const auto bytes = memory.range(step.slot, step.level->entry_bytes);
    return step.level->entry_bytes == sizeof(std::uint32_t)
               ? exchange_entry<std::uint32_t>(bytes, step.entry, to)
               : exchange_entry<std::uint64_t>(bytes, step.entry, to);
}

/// Whether PKRU keeps the access from a user-mode address with this key (Intel SDM vol. 3A, 4.6.2).
bool key_denies(const GuestPaging& paging, std::uint8_t key, Access access) {
    const std::uint32_t rights = paging.pkru >> (2 * key);
    const bool access_disable = (rights & 1) != 0, write_disable = (rights & 2) != 0;
    return !access.fetch &&
           (access_disable || (write_disable && access.write && (access.user || paging.write_protect)));
}

/// Whether the rights of a complete walk keep the access out (Intel SDM vol. 3A, 4.6.1), keys aside.
bool rights_deny(const GuestPaging& paging, const GuestWalk& walk, Access access) {
    if (access.write && !walk.writable && (access.user || paging.write_protect))
        return true;
    if (access.fetch && walk.no_execute)
        return true;
    if (access.user)
        return !walk.user;
    return walk.user && (access.fetch ? paging.smep : paging.smap && !access.ac);
}

/// What no entry may have set. Entries of 4 bytes have none of these bits.
std::uint64_t reserved_everywhere(const GuestPaging& paging) {
    return (entry_bit::frame_mask & ~((std::uint64_t{1} << paging.physical_bits) - 1)) |
           (paging.no_execute ? 0 : entry_bit::no_execute);
}

} // namespace

std::uint64_t reserved_bits(const GuestPaging& paging, const Level& level, GuestEntry entry) {
    std::uint64_t reserved = level.reserved | reserved_everywhere(paging);
    if (level.number == 1 || !level.may_be_leaf || !entry.has(entry_bit::page_size))
        return reserved;
    if (level.number == 3 && !paging.gigabyte_pages)
        return reserved | entry_bit::page_size;
    // A large page's address bits below its size, except bit 12, which is PAT, and those of PSE-36.
    std::uint64_t unused = (level.span() - 1) & entry_bit::frame_mask & ~page_size;
    if (level.pse_36)
        unused &= ~(((std::uint64_t{1} << (std::clamp(paging.physical_bits, 32U, 40U) - 32)) - 1) << 13);
    return reserved | unused;
}

std::optional<std::array<std::uint64_t, 4>> load_pdptes(const GuestMemory& memory, std::uint64_t cr3,
                                                        unsigned physical_bits) {
    GuestPaging paging;
    paging.physical_bits = physical_bits;
    const GuestPhys pdpt(cr3 & 0xffff'ffe0);
    std::array<std::uint64_t, 4> pdptes{};
    for (std::size_t i = 0; i < pdptes.size(); ++i) {
        const auto entry = entry_at(memory, pdpt + i * sizeof(std::uint64_t), sizeof(std::uint64_t));
        if (entry.present() && (entry.raw() & reserved_bits(paging, paging_pae.root(), entry)) != 0)
            return std::nullopt;
        pdptes.at(i) = entry.raw();
    }
    return pdptes;
}

GuestWalk walk_guest(const GuestMemory& memory, const GuestPaging& paging, GuestVirt at, Access access) {
    GuestWalk result;
    result.user = result.writable = true;
    const PagingFormat& format = *paging.format;
    if (format.levels.empty()) {
        result.address = GuestPhys(at.value());
        return result;
    }
    const bool no_execute = paging.no_execute && format.root().entry_bytes == sizeof(std::uint64_t);
    std::uint32_t code = (access.write ? PageFault::write : 0) | (access.user ? PageFault::user : 0) |
                         (access.fetch && (no_execute || paging.smep) ? PageFault::fetch : 0);

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
        if (step.level->in_registers)
            return WalkNext::descend;
        result.user &= entry.user();
        result.writable &= entry.writable();
        result.no_execute |= entry.no_execute();
        return WalkNext::descend;
    };
    const auto read = [&memory](const Level& level, GuestPhys slot) {
        return entry_at(memory, slot, level.entry_bytes);
    };
    bool complete = false;
    if (format.root().in_registers) { // a step of its own: no table is read
        const unsigned index = format.root().index(at);
        const GuestEntry pdpte(paging.pdptes[index]);
        const GuestPhys slot = paging.pdpt + index * sizeof(std::uint64_t);
        complete = visit({&format.root(), slot, pdpte, at}) == WalkNext::descend &&
                   walk(format, pdpte.table(), at, at, read, visit, 1);
    } else {
        complete = walk(format, paging.root, at, at, read, visit);
    }
    if (!complete)
        return result;

    const GuestWalk::Step& leaf = result.leaf();
    result.global = paging.global_pages && leaf.entry.has(entry_bit::global);
    bool denied = rights_deny(paging, result, access);
    if (paging.protection_keys && format.long_mode()) {
        result.key = leaf.entry.key();
        if (result.user && key_denies(paging, result.key, access)) {
            denied = true;
            code |= PageFault::protection_key; // whatever else denies it (4.7)
        }
    }
    if (denied) {
        result.fault = PageFault{at, code | PageFault::present};
        return result;
    }
    result.address = leaf.entry.page(*leaf.level).base() + (at.value() & (leaf.level->span() - 1));
    return result;
}

bool set_accessed_dirty(const GuestMemory& memory, GuestWalk& walk, bool write) {
    for (unsigned i = 0; i < walk.depth; ++i) {
        GuestWalk::Step& step = walk.steps[i];
        const bool leaf = i + 1 == walk.depth;
        const GuestEntry wanted =
            step.entry.with(entry_bit::accessed | (leaf && write ? entry_bit::dirty : std::uint64_t{0}));
        if (wanted == step.entry || step.level->in_registers)
            continue;
        if (!exchange_entry(memory, step, wanted))
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
