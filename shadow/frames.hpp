// Where guest frames lie in the machine: at the same number, if anywhere.
#pragma once

#include "shadow/mmu_config.hpp"

#include <algorithm>

namespace umbra {

/// Of RAM.
[[nodiscard]] constexpr MachineFrame same_frame(GuestFrame frame) {
    return MachineFrame(frame.number());
}

/// The isolation boundary: no other frame than what this returns ever enters a leaf.
[[nodiscard]] inline MachineFrame machine_frame(const MmuConfig& config, GuestFrame frame) {
    return std::min(same_frame(frame), config.nothing);
}

/// Frames that an entry of `level` maps.
[[nodiscard]] constexpr std::uint64_t frames_of(const Level& level) {
    return level.span() >> page_shift;
}

/// The first frame of the large page of `level` that holds `frame`.
[[nodiscard]] constexpr GuestFrame first_of(GuestFrame frame, unsigned level) {
    return GuestFrame(frame.number() & ~(frames_of(paging_4_level.level(level)) - 1));
}

} // namespace umbra
