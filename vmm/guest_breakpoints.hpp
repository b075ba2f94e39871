// The guest's own breakpoints: what its DR0 to DR3 and DR7 ask for (Intel SDM vol. 3B, 17.2; AMD APM vol. 2,
// 13.1.1). The machine's stay clear: the guest's are met by umbra's own means, guards of the shadow MMU and
// entries for one instruction, as gdb's are, and so are the same on every host.
//
// Execution breakpoints are faults at the instruction. All others are traps: what the instruction under way
// meets is noted, and told when it is done.
#pragma once

#include "shadow/shadow_tables.hpp"
#include "vmm/cpu.hpp"
#include "vmm/debug/operands.hpp"

#include <array>
#include <cstdint>
#include <span>

namespace umbra {

/// DR6 (Intel SDM vol. 3B, 17.2.3).
namespace dr6 {
inline constexpr std::uint64_t breakpoints = 0xf; ///< B0 to B3: which have been met
inline constexpr std::uint64_t single_step = 1U << 14;
} // namespace dr6

/// Conditions that are met are told by their bits in DR6, B0 to B3; 0: none.
class GuestBreakpoints {
  public:
    /// `cpu`, which outlives this, has the registers.
    explicit GuestBreakpoints(const VirtualCpu& cpu) : cpu_(&cpu) {}

    /// Whether DR7 enables any.
    [[nodiscard]] bool enabled() const;
    /// What must not go unseen of memory.
    [[nodiscard]] Guards guards() const;
    /// Whether the guest, at its present privilege, is to be run instruction by instruction: accesses to
    /// ports are watched, which it may make without a trap, or something is to be told that was held back.
    [[nodiscard]] bool wants_step() const;

    /// The execution breakpoints at RIP, if the CPU looks at them there: not with RFLAGS.RF, and not behind
    /// MOV or POP to SS.
    [[nodiscard]] std::uint64_t at_instruction() const;

    // --- What the instruction under way meets

    void accessed(GuestVirt at, std::uint64_t size, bool write);
    void accessed(std::span<const MemoryAccess> operands);
    void accessed_port(std::uint16_t port, std::uint64_t size);
    /// It is not done, or will be done anew.
    void abandon() { met_ = 0; }
    /// It was one that holds its traps back until the next instruction is done, or an event delivered: MOV or
    /// POP to SS (Intel SDM vol. 3A, 6.8.3).
    void hold_back();
    /// It is done: all that is to be told.
    [[nodiscard]] std::uint64_t take();
    /// The frame of a #DB has been pushed. What that met would end in #DB after #DB: it is told when the
    /// handler's first instruction is done.
    void delay();

  private:
    enum class Condition : std::uint8_t { execution, write, port, access }; ///< R/W0 to R/W3 in DR7
    struct Breakpoint {
        Condition condition{};
        std::uint64_t at = 0; ///< linear address or port, aligned by `size`
        std::uint64_t size = 1;
        std::uint64_t bit = 0; ///< in DR6

        [[nodiscard]] bool meets(std::uint64_t first, std::uint64_t count) const {
            return first - at < size || at - first < count;
        }
    };
    [[nodiscard]] Breakpoint breakpoint(unsigned number) const;
    template<class Action>
    void for_each(Action action) const;

    const VirtualCpu* cpu_;
    std::uint64_t met_ = 0;  ///< by the instruction under way
    std::uint64_t held_ = 0; ///< before it, and not told
    bool after_stack_load_ = false;
};

} // namespace umbra
