#include "vmm/monitor_memory.hpp"

#include <algorithm>

namespace umbra {

MonitorMemory::MonitorMemory(MachinePhys base, std::size_t pool_bytes)
    // Small pages: tables are touched one by one, and a huge page would commit 2 MB for the first of them.
    : base_(base), memory_(switcher_bytes + pool_bytes, HostMemory::Pages::small, "shadow tables") {}

MachinePhys MonitorMemory::default_base(unsigned physical_bits) {
    // Bit 45 suffices for any RAM; some hosts' own tables limit what lies above.
    return MachinePhys(std::uint64_t{1} << (std::min(physical_bits, 46U) - 1));
}

MachineFrame MonitorMemory::nothing(unsigned physical_bits) {
    return (default_base(physical_bits) - page_size).frame();
}

} // namespace umbra
