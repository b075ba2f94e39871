// Monitor memory: what the machine needs and the guest cannot name.
//
// One memory slot above everything that the guest's tables may lead to. First the switcher's area
// (vmm/switcher.hpp), then the pool of shadow tables.
//
// A protected pool is mapped twice: one view is the machine's, and nothing of umbra knows where it is; the
// other is for editing, and read-only outside edit scopes. It takes two because KVM reaches the slot by this
// process's page rights and, on a vCPU's thread, by that thread's protection keys.
#pragma once

#include "shadow/address.hpp"
#include "vmm/host_memory.hpp"
#include "vmm/pool_protection.hpp"

#include <cstddef>
#include <memory>
#include <span>

namespace umbra {

class MonitorMemory {
  public:
    static constexpr std::size_t switcher_bytes = 2U << 20;

    /// Reserves address space for `pool_bytes` (a multiple of 2 MB) of tables and the switcher; pages are
    /// committed as they are touched. The machine sees it at `base`, which is 2 MB aligned. StartupError if
    /// memory is short. A protection that is not to be had is done without.
    MonitorMemory(MachinePhys base, std::size_t pool_bytes, PoolProtection protection = PoolProtection::none);

    [[nodiscard]] MachinePhys base() const { return base_; }
    /// For the machine's memory slot and nothing else.
    [[nodiscard]] std::span<std::byte> all() const {
        return machine_.bytes().empty() ? edited() : machine_.bytes();
    }
    [[nodiscard]] std::span<std::byte> switcher() const { return edited().first(switcher_bytes); }
    [[nodiscard]] std::span<std::byte> pool() const { return edited().subspan(switcher_bytes); }
    [[nodiscard]] MachinePhys pool_base() const { return base_ + switcher_bytes; }
    /// What keeps `pool` from being written outside edit scopes; nullptr if nothing does.
    [[nodiscard]] PoolGuard* guard() const { return guard_.get(); }

    /// Where monitor memory goes on a machine with this MAXPHYADDR: in the upper half of what it can address.
    [[nodiscard]] static MachinePhys default_base(unsigned physical_bits);
    /// The frame below it, which no memory answers, on such a machine. What lies below that is the guest's.
    [[nodiscard]] static MachineFrame nothing(unsigned physical_bits);

  private:
    [[nodiscard]] std::span<std::byte> edited() const { return memory_.bytes(); }

    MachinePhys base_;
    HostMemory memory_;
    HostMemory machine_; ///< empty without protection: then one view serves both
    std::unique_ptr<PoolGuard> guard_;
};

} // namespace umbra
