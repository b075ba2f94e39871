// A machine for experiments: what the host traits are tried on.
#pragma once

#include "shadow/table_pool.hpp"
#include "vmm/host_memory.hpp"
#include "vmm/kvm/kvm.hpp"
#include "vmm/monitor_memory.hpp"
#include "vmm/switcher.hpp"

#include <cstdint>
#include <optional>
#include <span>

namespace umbra {

/// A VM with a few pages of memory and one vCPU on hand-made tables, to try instructions at CPL 3 in.
/// Address 0 to 64 KB translates to the frames of the same number, all rights, by 4 KB entries.
class ScratchMachine {
  public:
    static constexpr std::size_t pages = 16;
    static constexpr std::uint64_t code_address = 0x1000;
    static constexpr unsigned switcher_slot = 1; ///< any but the first, which the code is in
    /// The CPUID leaf (the start of the brand string) whose EAX is not the host's.
    static constexpr std::uint32_t marked_leaf = 0x80000002;
    static constexpr std::uint32_t leaf_mark = 0x72626d75; // "umbr"

    enum class InterruptControllers : bool { none, in_kernel };

    ScratchMachine(const Kvm& kvm, const HostTraits& assumed,
                   InterruptControllers controllers = InterruptControllers::none);

    /// Runs `code` (placed at code_address) as virtual CPL `cpl` until it leaves the guest. Registers are as
    /// `cpu` has them. The exit must be a trap of the switcher, otherwise Trap::Kind::none.
    Trap run(std::span<const std::uint8_t> code, std::uint8_t cpl = 0);
    /// Runs `code` and a `ud2` behind it; whether it got that far.
    [[nodiscard]] bool completes(std::span<const std::uint8_t> code);
    /// What code reads at the start of page `number` (below 8); nothing if the access traps.
    [[nodiscard]] std::optional<std::uint64_t> load(std::uint8_t number);
    /// Control registers as `cpu` has them, from the next run on.
    void set_control() { switcher_.set_control(cpu, cr4_offered_); }

    VirtualCpu cpu;
    Debt debt;                              ///< paid by the next run
    std::optional<NativePortAccess> access; ///< made by the next run
    [[nodiscard]] Vm& vm() { return vm_; }
    [[nodiscard]] Vcpu& machine() { return machine_; }
    [[nodiscard]] Switcher& switcher() { return switcher_; }
    [[nodiscard]] ExitReason exit_reason() const { return exit_; }
    /// A page of its memory.
    [[nodiscard]] std::span<std::uint64_t> page(std::size_t number);
    /// The table entry that maps page `number`, for a store as userspace makes it.
    [[nodiscard]] ShadowEntry& entry(std::size_t number) { return pool_.entries(table_)[number]; }
    [[nodiscard]] static ShadowEntry mapping(std::size_t frame);
    /// The top-level entries. The first leads to all that is mapped, the one at switcher_slot to the
    /// switcher.
    [[nodiscard]] std::span<ShadowEntry, entries_per_table> top_level() { return pool_.entries(root_); }
    /// The ring-0 code that a trap by `vector` begins with.
    [[nodiscard]] std::span<std::byte> stub(std::uint8_t vector);
    /// The table that entry() is in, and another one that maps nothing.
    [[nodiscard]] TableIndex table() const { return table_; }
    [[nodiscard]] TableIndex spare_table() const { return spare_; }

  private:
    MonitorMemory memory_;
    HostMemory ram_;
    Vm vm_;
    Vcpu machine_;
    SwitcherRegion region_;
    Switcher switcher_;
    TablePool pool_;
    TableIndex root_, table_, spare_;
    std::uint64_t cr4_offered_;
    ExitReason exit_ = ExitReason::other;
};

} // namespace umbra
