// Where in the top-level tables the switcher can be: a slot that the guest does not use.
#pragma once

#include "shadow/table_store.hpp"

#include <optional>

namespace umbra {

/// A top-level slot, other than the present one, that neither the guest's root nor any known one uses.
[[nodiscard]] std::optional<unsigned> free_slot(const GuestMemory& memory, const TableStore& store,
                                                const MmuConfig& config, const GuestPaging& paging);

} // namespace umbra
