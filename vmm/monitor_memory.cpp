#include "vmm/monitor_memory.hpp"

#include <algorithm>
#include <array>
#include <utility>

namespace umbra {

MonitorMemory::MonitorMemory(MachinePhys base, std::size_t pool_bytes, PoolProtection protection)
    : base_(base) {
    constexpr const char* what = "shadow tables";
    const std::size_t size = switcher_bytes + pool_bytes;
    if (protection == PoolProtection::none || pool_bytes == 0) {
        // Small pages: tables are touched one by one, and a huge page would commit 2 MB for the first of
        // them.
        memory_ = HostMemory(size, HostMemory::Pages::small, what);
    } else {
        std::array<HostMemory, 2> views = HostMemory::twice(size, what);
        memory_ = std::move(views[0]);
        machine_ = std::move(views[1]);
        guard_ = protect_pool(protection, pool());
    }
}

MachinePhys MonitorMemory::default_base(unsigned physical_bits) {
    // Bit 45 suffices for any RAM; some hosts' own tables limit what lies above.
    return MachinePhys(std::uint64_t{1} << (std::min(physical_bits, 46U) - 1));
}

MachineFrame MonitorMemory::nothing(unsigned physical_bits) {
    return (default_base(physical_bits) - page_size).frame();
}

} // namespace umbra
