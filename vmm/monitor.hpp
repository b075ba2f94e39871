// The monitor: runs a guest deprivileged on shadow page tables, and decides what each trap means.
//
// Reading order: run (the loop), handle_trap (the life of a trap), then the kinds of traps one by one.
#pragma once

#include "shadow/mmu.hpp"
#include "vmm/debug/debugger.hpp"
#include "vmm/emulator.hpp"
#include "vmm/engine.hpp"
#include "vmm/guest_breakpoints.hpp"
#include "vmm/guest_checks.hpp"
#include "vmm/switcher.hpp"
#include "vmm/traits.hpp"

#include <optional>

namespace umbra {

struct MonitorOptions {
    std::optional<Sync> sync;         ///< in place of what the host's traits suggest
    std::optional<unsigned> prefetch; ///< MmuConfig::prefetch
    GuestChecks* checks = nullptr;    ///< outlives the monitor
    bool virtual_tlb = false;         ///< MmuConfig::virtual_tlb
    /// With interrupts off, a HLT or a jump to itself (StuckWatch), which nothing here can end, ends the run.
    bool end_stuck = false;
    DebugFrontend* frontend = nullptr; ///< outlives the monitor; nullptr: no debugger
};

class Monitor final : public Engine, private CpuEnvironment, private GuestBus {
  public:
    /// `machine` has a pool for shadow tables.
    Monitor(Machine& machine, const HostTraits& traits, const VirtualCpu& boot, MonitorOptions options = {});

    Monitor(const Monitor&) = delete;
    Monitor& operator=(const Monitor&) = delete;
    Monitor(Monitor&&) = delete;
    Monitor& operator=(Monitor&&) = delete;
    ~Monitor() override { machine_.platform().observe_dma({}); }

    [[nodiscard]] Verdict run(RunControl& control) override;
    [[nodiscard]] Mmu* mmu() override { return &mmu_; }

  private:
    // What one trap leads to: nothing (go on), or the end of the run.
    using Step = std::optional<Verdict>;

    Step handle_exit(ExitReason reason, RunControl& control);
    Step handle_trap(const Trap& trap);
    Step handle_page_fault(const Trap& trap);
    Step handle_exception(const Trap& trap);
    bool note_nmi();
    Step deliver_nmi();
    Step handle_guarded(const Trap& trap, Access access);
    Step deliver_debug(std::uint64_t status);
    Step finish_instruction(bool stepping);
    Step finish_instruction(const emulated::Done& done, bool stepping);
    Step finish_step();
    void note_operands();
    void refresh_breakpoints();
    [[nodiscard]] std::vector<std::byte> code();
    [[nodiscard]] bool was_int1();
    [[nodiscard]] bool missed_step();
    [[nodiscard]] bool is_behind(std::byte instruction);
    [[nodiscard]] bool withholds_iopl() const;
    void prepare_steps(bool sleeping);
    Step handle_syscall();
    [[nodiscard]] Step run_ahead();
    bool continue_output();
    Step deliver_event(const Event& event, TrapReason reason);
    Step deliver_refusal(const Event& event, TrapReason reason);
    Step finish_user_entry();
    Step complete_event(const Event& event);
    void take_back_flags(const Trap& trap, std::uint64_t own);
    void take_back_pushed(std::uint64_t own, std::uint64_t changed);
    Step attend_debugger(RunControl& control, const Step& verdict, bool stoppable, bool& entered);
    Step stand_still(RunControl& control);
    Step serve_stop(RunControl& control);
    Step begin_table_write(const Trap& trap, Access access, GuestPhys slot);
    void finish_table_write();
    [[nodiscard]] Origin origin() const { return {trap_.rip, trap_.start, log_.added()}; }
    [[nodiscard]] Step enter();
    void refresh_control();
    void tell_alignment_check() { mmu_.set_alignment_check((cpu_.rflags & rflags::alignment_check) != 0); }
    [[nodiscard]] bool has_untrapped_user_code();
    [[nodiscard]] bool is_user_entry(const Trap& trap, Access access);

    // The virtual CPU's surroundings.
    std::uint32_t port_read(std::uint16_t port, unsigned size) override {
        breakpoints_.accessed_port(port, size);
        return machine_.port_read(port, size);
    }
    void port_write(std::uint16_t port, unsigned size, std::uint32_t value) override {
        breakpoints_.accessed_port(port, size);
        machine_.port_write(port, size, value);
    }
    bool kernel_owns(std::uint16_t port) override { return Platform::kvm_owns(Port{port}); }
    std::optional<std::uint64_t> read_msr(std::uint32_t index) override;
    bool write_msr(std::uint32_t index, std::uint64_t value) override;
    bool write_xcr0(std::uint64_t value) override { return machine_.vcpu().write_xcr0(value); }
    std::uint64_t read_tsc() override;
    bool move_tsc(std::uint64_t distance);
    bool steps() override { return single_step_ || breakpoints_.enabled(); }
    void paging_changed(const PagingChange& change) override;
    std::optional<std::array<std::uint64_t, 4>> pdptes(std::uint64_t cr3) override;
    CpuidResult cpuid(std::uint32_t leaf, std::uint32_t subleaf) override;
    bool amd() override { return features_.amd; }
    unsigned physical_bits() override { return features_.physical_bits; }
    std::uint64_t cr4_allowed() override { return features_.cr4; }

    void stored(GuestPhys at, std::optional<GuestVirt> linear, std::size_t size) override;
    void read_device(GuestPhys at, std::span<std::byte> into) override {
        machine_.platform().mmio_read(at, into);
    }
    void write_device(GuestPhys at, std::span<const std::byte> from) override {
        machine_.platform().mmio_write(at, from);
    }

    [[nodiscard]] GuestSpace space() { return {machine_.memory(), paging(), this}; }

    HostTraits traits_;
    TablePool pool_;
    SwitcherRegion region_;
    Switcher switcher_;
    ShadowTables tables_;
    Mmu mmu_;
    std::vector<CpuidLeaf> cpuid_;
    std::uint64_t machine_cr4_allowed_; ///< what KVM lets the machine have
    unsigned placed_slot_;
    GuestVirt last_rip_; ///< where the guest went on after the trap before
    std::uint64_t machine_cr0_ = 0, machine_cr4_ = 0, machine_efer_ = 0,
                  machine_tsc_aux_ = 0;             ///< the guest's, as last told to the machine
    std::optional<NativePortAccess> native_access_; ///< to be made at the next entry
    GuestChecks* checks_;
    bool end_dead_halt_; ///< MonitorOptions::end_stuck
    std::optional<Debugger> debugger_;
    std::optional<Event> held_event_; ///< caught by the debugger, to be delivered when the guest goes on
    GuestBreakpoints breakpoints_{cpu_};
    std::uint64_t guarded_dr7_ = 0; ///< as of which the guest's breakpoints have their guards
    std::array<std::uint64_t, 4> guarded_dr_{};
    Guards breakpoint_guards_;      ///< in force
    bool nmi_pending_ = false;      ///< one has come, and the guest has not taken it
    bool interrupt_shadow_ = false; ///< of the next entry
    bool single_step_ = false;      ///< the guest was entered for one instruction
    bool interrupts_held_ = false;  ///< and for that, without EFLAGS.IF
    /// What was at RIP, if the machine was entered with EFLAGS.TF, umbra's or the guest's.
    std::optional<StepKind> step_kind_;
    bool stepping_ = false;   ///< the guest's own RFLAGS.TF, of then
    bool was_halted_ = false; ///< when the trap came
    /// RIP while the machine makes a port access that is a step of its own: it goes nowhere from there.
    std::optional<std::uint64_t> after_access_;
    std::optional<Origin>
        table_write_; ///< the guest runs for one instruction, which writes to its page tables

    struct {
        GuestVirt address;
        unsigned times = 0; ///< in a row
    } last_fill_;           ///< to notice a machine that does not see what was filled
};

} // namespace umbra
