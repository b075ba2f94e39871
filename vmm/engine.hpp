// What runs a guest: the shadow engine (vmm/monitor.hpp) or the native one (vmm/native_engine.hpp).
#pragma once

#include "vmm/cpu.hpp"
#include "vmm/machine.hpp"
#include "vmm/run_control.hpp"
#include "vmm/trap_log.hpp"
#include "vmm/verdict.hpp"

#include <optional>

namespace umbra {

class Mmu;

class Engine {
  public:
    Engine(Machine& machine, const VirtualCpu& boot, bool cpuid_intercepted = true)
        : machine_(machine), cpu_(boot), features_(guest_features(machine.kvm(), cpuid_intercepted)) {}
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
    [[nodiscard]] TrapLog& log() { return log_; }

  protected:
    /// Does what `control` asks; a verdict if that ends the run.
    std::optional<Verdict> attend(RunControl& control);
    /// Adds a record that began at `start` and ends now.
    void record(std::uint64_t start, TrapReason reason, TrapAction action, std::uint32_t detail = 0,
                std::uint8_t vector = 0, GuestVirt address = {});

    Machine& machine_;
    VirtualCpu cpu_;
    CpuFeatures features_;
    TrapLog log_;
    GuestVirt trap_rip_; ///< RIP and privilege when the exit came
    std::uint8_t trap_cpl_ = 0;
};

} // namespace umbra
