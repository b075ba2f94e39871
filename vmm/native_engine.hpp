// The native engine: the guest at ring 0 of the machine, on KVM's own MMU. The oracle that the shadow engine
// is compared with; on a host that interprets ring 0, slow and incomplete.
#pragma once

#include "vmm/engine.hpp"

namespace umbra {

class NativeEngine final : public Engine {
  public:
    /// `end_stuck`: as MonitorOptions::end_stuck.
    NativeEngine(Machine& machine, const VirtualCpu& boot, bool end_stuck = false) : Engine(machine, boot) {
        if (end_stuck)
            stuck_watch_.emplace();
    }
    [[nodiscard]] Verdict run(RunControl& control) override;

  private:
    std::optional<Verdict> handle(ExitReason reason, RunControl& control);
};

} // namespace umbra
