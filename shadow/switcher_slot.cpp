#include "shadow/switcher_slot.hpp"

#include "shadow/entry_access.hpp"

#include <algorithm>
#include <iterator>
#include <vector>

namespace umbra {

std::optional<unsigned> free_slot(const GuestMemory& memory, const TableStore& store, const MmuConfig& config,
                                  const GuestPaging& paging) {
    std::vector<bool> free = config.usable_slots;
    free[store.reserved_slot()] = false;
    const auto exclude = [&](GuestPhys root) {
        const auto guest = memory.range(root, page_size);
        for (unsigned slot = 0; slot < entries_per_table && !guest.empty(); ++slot) {
            if (load_entry(guest, slot, sizeof(GuestEntry)).present())
                free[slot] = false;
        }
    };
    if (guest_mode(*paging.format) == GuestMode::bits_64) // others use the first slot only
        exclude(paging.root.base());
    store.for_each_of_level(root_level, [&](TableIndex root) {
        if (store[root].guest != GuestTableIndex::none)
            exclude(store[root].key.origin);
        store.for_each_entry(root, [&](unsigned slot, ShadowEntry) { free[slot] = false; });
    });
    const auto found =
        std::find(free.rbegin(), free.rend(), true); // from the top: rarely used by small kernels
    if (found == free.rend())
        return std::nullopt;
    return static_cast<unsigned>(std::distance(found, free.rend()) - 1);
}

} // namespace umbra
