// Monitor memory: what the machine needs and the guest cannot name.
//
// One memory slot above everything that the guest's tables may lead to. First the switcher's area
// (vmm/switcher.hpp), then the pool of shadow tables.
#pragma once

#include "shadow/address.hpp"
#include "vmm/host_memory.hpp"

#include <cstddef>
#include <span>

namespace umbra {

class MonitorMemory {
  public:
    static constexpr std::size_t switcher_bytes = 2U << 20;

    /// Reserves address space for `pool_bytes` (a multiple of 2 MB) of tables and the switcher; pages are
    /// committed as they are touched. The machine sees it at `base`, which is 2 MB aligned. StartupError if
    /// memory is short.
    MonitorMemory(MachinePhys base, std::size_t pool_bytes);

    [[nodiscard]] MachinePhys base() const { return base_; }
    [[nodiscard]] std::span<std::byte> all() const { return memory_.bytes(); }
    [[nodiscard]] std::span<std::byte> switcher() const { return all().first(switcher_bytes); }
    [[nodiscard]] std::span<std::byte> pool() const { return all().subspan(switcher_bytes); }
    [[nodiscard]] MachinePhys pool_base() const { return base_ + switcher_bytes; }

    /// Where monitor memory goes on a machine with this MAXPHYADDR: in the upper half of what it can address.
    [[nodiscard]] static MachinePhys default_base(unsigned physical_bits);
    /// A frame beside monitor memory that no memory answers, on such a machine.
    [[nodiscard]] static MachineFrame nothing(unsigned physical_bits);

  private:
    MachinePhys base_;
    HostMemory memory_;
};

} // namespace umbra
