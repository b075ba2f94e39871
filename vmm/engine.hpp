// What runs a guest: the shadow engine (vmm/monitor.hpp) or the native one (vmm/native_engine.hpp).
#pragma once

#include "vmm/cpu.hpp"
#include "vmm/machine.hpp"
#include "vmm/run_control.hpp"
#include "vmm/stuck_watch.hpp"
#include "vmm/trap_log.hpp"
#include "vmm/verdict.hpp"

#include <optional>
#include <string>
#include <utility>

namespace umbra {

class Mmu;

class Engine {
  public:
    Engine(Machine& machine, const VirtualCpu& boot, bool cpuid_intercepted = true)
        : machine_(machine), cpu_(boot), features_(machine.cpu_features(cpuid_intercepted)) {}
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;
    Engine(Engine&&) = delete;
    Engine& operator=(Engine&&) = delete;
    virtual ~Engine() = default;

    /// Runs the guest on the calling thread until it has ended, or `control` asks. Never throws.
    [[nodiscard]] virtual Verdict run(RunControl& control) = 0;
    /// The shadow MMU, if this engine has one.
    [[nodiscard]] virtual Mmu* mmu() { return nullptr; }

    /// The virtual CPU as of the last exit.
    [[nodiscard]] const VirtualCpu& cpu() const { return cpu_; }
    [[nodiscard]] GuestPaging paging() const {
        return guest_paging(cpu_, features_.physical_bits, features_.gigabyte_pages);
    }
    [[nodiscard]] const CpuFeatures& features() const { return features_; }
    [[nodiscard]] TrapLog& log() { return log_; }
    /// If the last exception that the guest got was by an instruction that its CPU refused for want of a
    /// feature: which one, and where. Only the shadow engine tells.
    struct Refusal {
        CpuFeature feature;
        GuestVirt rip;
    };
    [[nodiscard]] const std::optional<Refusal>& refusal() const { return refusal_; }

  protected:
    /// After every exit that has not ended the run: does what `control` asks, if anything; a verdict if that
    /// ends it.
    std::optional<Verdict> finish_exit(ExitReason reason, RunControl& control);
    /// Takes what `control` asks; a verdict if that ends the run.
    std::optional<Verdict> attend(RunControl& control);
    /// Begins the record of an exit; its reason, action and details are filled in while it is handled.
    void begin_trap() { trap_ = {.start = timestamp(), .cpl = cpu_.cpl, .rip = GuestVirt(cpu_.rip)}; }
    /// Adds it to the log: the guest can go on now, or has ended.
    void end_trap() {
        trap_.end = timestamp();
        log_.add(trap_);
    }
    /// Answers a port or MMIO exit of the vCPU.
    std::optional<Verdict> handle_port_exit();
    void handle_mmio_exit();
    /// After an exit that was none of the guest's doings, where stuck_watch_ is: a verdict if the guest, in
    /// `space`, will never do anything again.
    std::optional<Verdict> look_for_progress(const GuestSpace& space) {
        auto verdict = stuck_watch_->look(cpu_, space, log_.added());
        if (verdict && (machine_.vcpu().injects() || machine_.has_unmaskable_interrupts()))
            verdict.reset();
        return verdict;
    }
    /// The verdict if Vcpu::was_reset().
    Verdict stop_at_init() {
        trap_.reason = TrapReason::signal;
        return stop(Verdict::Kind::reset, "its local APIC has taken an INIT");
    }
    /// The verdict of a run that cannot go on.
    Verdict stop(Verdict::Kind kind, std::string reason) {
        trap_.action = TrapAction::stop;
        return {kind, 0, std::move(reason)};
    }

    Machine& machine_;
    VirtualCpu cpu_;
    CpuFeatures features_;
    TrapLog log_;
    TrapRecord trap_; ///< of the exit that is being handled
    std::optional<Refusal> refusal_;
    bool debugger_calls_ = false;           ///< RunControl::debugger_calls was taken
    std::optional<StuckWatch> stuck_watch_; ///< if a guest that cannot go on is to be ended
};

} // namespace umbra
