// How entries in memory that others use at the same time are read and written: by one load, one store.
#pragma once

#include "shadow/format.hpp"

#include <atomic>
#include <cstddef>
#include <span>

namespace umbra {

/// Entry `number` of a table of the guest with entries of 4 or 8 bytes, zero-extended. The guest may write at
/// the same time, and the copy is what counts.
[[nodiscard]] inline GuestEntry load_entry(std::span<const std::byte> table, unsigned number,
                                           unsigned entry_bytes) {
    auto* at = const_cast<std::byte*>(table.data()) + std::size_t{number} * entry_bytes;
    if (entry_bytes == 4)
        return GuestEntry(std::atomic_ref<std::uint32_t>(*reinterpret_cast<std::uint32_t*>(at))
                              .load(std::memory_order_relaxed));
    return GuestEntry(std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(at))
                          .load(std::memory_order_relaxed));
}

[[nodiscard]] inline ShadowEntry load_entry(const ShadowEntry& entry) {
    return std::atomic_ref<ShadowEntry>(const_cast<ShadowEntry&>(entry)).load(std::memory_order_relaxed);
}

inline void store_entry(ShadowEntry& entry, ShadowEntry value) {
    static_assert(std::atomic_ref<ShadowEntry>::is_always_lock_free);
    std::atomic_ref<ShadowEntry>(entry).store(value, std::memory_order_release);
}

} // namespace umbra
