// Whether a guest that makes no exits can still do something: with interrupts off, some cannot.
#pragma once

#include "vmm/cpu.hpp"
#include "vmm/guest_space.hpp"
#include "vmm/verdict.hpp"

#include <cstdint>
#include <optional>

namespace umbra {

/// Whether this CPU executes nothing but one direct jump, and at most two PAUSE or NOP that it jumps back to,
/// for as long as nobody interrupts it or changes its memory, and interrupts are off. Only what is certain
/// counts. Fetching the instructions sets accessed bits, as the CPU's own fetches have.
[[nodiscard]] bool jumps_to_itself(const VirtualCpu& cpu, const GuestSpace& space);

/// Looks at a guest from time to time. A machine has one CPU, and no device that writes to memory by itself;
/// of NMIs, which the guest can have its interrupt controllers send, the caller knows.
class StuckWatch {
  public:
    /// To be called when the guest was interrupted by none of its doings. `exits`: of the run so far, this
    /// one included. A verdict if it will never do anything again: at a jump, at the second look without an
    /// exit between the two, so that it has run there.
    [[nodiscard]] std::optional<Verdict> look(const VirtualCpu& cpu, const GuestSpace& space,
                                              std::uint64_t exits);

  private:
    std::optional<std::uint64_t> jumped_; ///< `exits` when it last was at such a jump
};

} // namespace umbra
