// What programs run on beside the reference model: the real Mmu on the FakeMachine, or the walker alone.
#pragma once

#include "tests/model/convert.hpp"
#include "tests/model/program.hpp"
#include "tests/unit/fake_machine.hpp"

#include <memory>
#include <optional>
#include <string>

namespace umbra::model {

/// A fault's outcome; `filled` if the access is to be tried again.
struct Missed {
    bool filled = false;
    bool no_slot = false;
    bool trapped_user_fetch = false;
    std::uint64_t address = 0;
    std::uint32_t error_code = 0;
    std::optional<StaleUse> stale{}; ///< the sanitizer's report
};

class Machine {
  public:
    Machine() = default;
    virtual ~Machine() = default;
    Machine(const Machine&) = delete;
    Machine& operator=(const Machine&) = delete;
    Machine(Machine&&) = delete;
    Machine& operator=(Machine&&) = delete;

    [[nodiscard]] virtual const GuestMemory& memory() const = 0;
    /// A store by the guest, to RAM.
    virtual void store(std::uint64_t at, std::uint64_t value) = 0;
    /// The operations; `cpu` is the state after it.
    virtual void start(const Cpu& cpu) = 0;
    virtual void load_cr3(const Cpu& cpu, bool no_flush) = 0;
    virtual void invlpg(std::uint64_t at) = 0;
    virtual void invpcid(unsigned type, std::uint16_t pcid, std::uint64_t at) = 0;
    virtual void set_control(const Cpu& before, const Cpu& cpu) = 0;
    virtual void set_trap_user_fetch(bool trap) = 0;
    /// The byte that an access reaches; nothing if it is a miss. Virtual privilege and EFLAGS.AC are as the
    /// access says from now on.
    [[nodiscard]] virtual std::optional<std::uint64_t> lookup(std::uint64_t at, Access access) = 0;
    [[nodiscard]] virtual Missed miss(std::uint64_t at, Access access) = 0;
    [[nodiscard]] virtual std::optional<std::string> audit() const = 0;
    [[nodiscard]] virtual const MmuCounters* counters() const = 0;

    /// Where a guest-physical address leads.
    [[nodiscard]] static std::uint64_t bus(std::uint64_t physical);
    /// Guest RAM of both machines.
    [[nodiscard]] static std::vector<Range> ram();
};

[[nodiscard]] std::unique_ptr<Machine> make_shadow_machine(const Setup& setup);
/// Has no TLB: each access is a walk.
[[nodiscard]] std::unique_ptr<Machine> make_walker_machine(const Setup& setup);

} // namespace umbra::model
