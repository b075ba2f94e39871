// Runs the loops of guest_loops.S in a guest of umbra.
#pragma once

#include "tests/bench/guest_loops.h"
#include "vmm/machine.hpp"
#include "vmm/monitor.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

extern "C" {
extern const std::byte bench_guest_begin[], bench_guest_end[];
std::uint64_t bench_sensitive(std::uint64_t times);
std::uint64_t bench_touch(std::uint64_t address, std::uint64_t pages);
void bench_write(std::uint64_t address, std::uint64_t pages);
void bench_switch(const std::uint64_t* roots, std::uint64_t count);
void bench_change(std::uint64_t* entry, std::uint64_t times);
void bench_invlpg(std::uint64_t address, std::uint64_t times);
void bench_write_entry(std::uint64_t* entry, std::uint64_t times);
std::uint64_t bench_hash(std::uint64_t times, std::uint64_t seed);
std::uint64_t bench_memory(std::uint64_t* buffer, std::uint64_t times);
}

namespace umbra::bench {

/// All the loops' code, to be copied anywhere.
[[nodiscard]] inline std::span<const std::byte> loops_image() {
    return {bench_guest_begin, bench_guest_end};
}
/// Where in it a loop begins.
template<class Loop>
[[nodiscard]] std::size_t loop_offset(Loop* loop) {
    return static_cast<std::size_t>(reinterpret_cast<const std::byte*>(loop) - bench_guest_begin);
}

/// A guest that calls one loop again and again, and waits for the host in between: so its calls and what they
/// are compared with take turns.
class LoopGuest {
  public:
    LoopGuest(const Kvm& kvm, const HostTraits& traits, MonitorOptions options = {});

    /// The guest's orders and answers: guest_loops.h.
    struct Mailbox {
        std::uint64_t routine, first, second; ///< what to call, with which arguments
        std::uint64_t remaining;
        std::uint64_t ticks; ///< that the last call took
    };
    [[nodiscard]] Mailbox& mailbox();
    [[nodiscard]] const GuestMemory& memory() const { return machine_.memory(); }
    [[nodiscard]] TrapLog& log() { return monitor_.log(); }
    [[nodiscard]] const MmuCounters& counters() { return monitor_.mmu()->counters(); }

    /// Runs the guest: `calls` calls of the loop at `offset`, with the arguments that the mailbox has at the
    /// time. `between` is called after each. False if the guest or the machine failed.
    [[nodiscard]] bool run(std::size_t offset, unsigned calls, std::function<void()> between);

  private:
    static constexpr std::uint64_t memory_bytes = std::uint64_t{64} << 20;
    static constexpr std::size_t pool_bytes = std::size_t{16} << 20;

    std::function<void()> between_;
    Machine machine_;
    Monitor monitor_;
};

} // namespace umbra::bench
