#include "shadow/shadow_tables.hpp"

#include "shadow/switcher_slot.hpp"

namespace umbra {
namespace {

/// One more than the last frame of RAM.
std::uint64_t frames_of(const GuestMemory& memory) {
    std::uint64_t end = 0;
    for (const GuestMemory::Region& region : memory.regions())
        end = std::max(end, region.base.frame().number() + region.bytes.size() / page_size);
    return end;
}

} // namespace

ShadowParts::ShadowParts(const GuestMemory& guest, TablePool& pool, MmuConfig how, ShadowEntry switcher)
    : memory(guest), config(std::move(how)), store(pool, config, counters, switcher, frames_of(guest)),
      tracker(memory, store, config, counters), guards(config),
      leaves(memory, store, tracker, guards, config), cache(pool, store, tracker, leaves, config, counters),
      filler(memory, store, tracker, guards, leaves, cache, config, counters) {}

void ShadowParts::reset() {
    store.stop_others();
    tracker.clear();
    guards.forget_entries();
    store.clear();
    ++resets;
}

bool ShadowParts::move_slot(const GuestPaging& paging) {
    store.stop_others();
    auto target = free_slot(memory, store, config, paging);
    if (!target) { // roots of other address spaces stand in the way, perhaps: without them it is this one's
        reset();
        target = free_slot(memory, store, config, paging);
    }
    if (!target)
        return false;
    store.move_switcher(*target);
    ++counters.slot_moves;
    return true;
}

void ShadowParts::set_guards(Guards wanted, GuardOwner owner) {
    if (guards.set(std::move(wanted), owner))
        reset();
}

void ShadowParts::close_guards() {
    for (const ShadowSlot place : guards.close()) {
        if (store.knows(place.table))
            store.drop_entry(place.table, place.slot);
    }
}

std::vector<TableWrite> ShadowTables::wrote(GuestPhys at, std::size_t size) {
    std::vector<TableWrite> writes;
    const auto editing = edit();
    editing->tracker.wrote(at, size, writes);
    return writes;
}

std::vector<ShadowSlot> ShadowTables::mappings(GuestFrame frame) const {
    const std::lock_guard lock(mutex_);
    const TableStore& store = parts_.store;
    std::vector<ShadowSlot> found;
    for (const unsigned level : {2U, 3U}) {
        const auto large = store.reverse().large(same_frame(first_of(frame, level)), level);
        found.insert(found.end(), large.begin(), large.end());
    }
    if (store.reverse().tracked(same_frame(frame))) {
        const auto small = store.reverse().small(same_frame(frame));
        found.insert(found.end(), small.begin(), small.end());
        return found;
    }
    store.for_each_of_level(1, [&](TableIndex table) {
        store.for_each_entry(table, [&](unsigned slot, ShadowEntry entry) {
            if (entry.table() == same_frame(frame))
                found.push_back({table, slot});
        });
    });
    return found;
}

std::optional<std::string> ShadowTables::audit() const {
    const std::lock_guard lock(mutex_);
    return umbra::audit(parts_);
}

} // namespace umbra
