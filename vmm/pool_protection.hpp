// How the host keeps the memory of shadow tables from being written outside edit scopes
// (shadow/edit_scope.hpp).
#pragma once

#include "shadow/edit_scope.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace umbra {

enum class PoolProtection : std::uint8_t {
    none,
    page_rights,    ///< mprotect(2): two system calls a scope, and for all threads at once
    protection_key, ///< pkeys(7): two instructions a scope, for each thread by itself
};

/// The best that is worth its cost: protection keys where CPU and kernel have one left; otherwise page
/// rights, but in checking builds (UMBRA_AUDIT) only.
[[nodiscard]] PoolProtection best_pool_protection();

/// Protects `memory` (page aligned, a whole number of pages) until the guard's end. nullptr for
/// PoolProtection::none, and if the host refuses.
///
/// By a protection key, threads started later by this one may read the memory, as this one may; others only
/// after their first scope, and signal handlers never (pkeys(7)). A thread that is started inside a scope
/// has it for life. What the kernel does for a thread, KVM_RUN included, is under the same key: KVM must have
/// a mapping of its own.
[[nodiscard]] std::unique_ptr<PoolGuard> protect_pool(PoolProtection kind, std::span<std::byte> memory);

} // namespace umbra
