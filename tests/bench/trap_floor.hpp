// What a trap costs at least on this host: the same guest code in a bare machine.
#pragma once

#include "tests/bench/bare_machine.hpp"
#include "tests/bench/guest_loops.hpp"
#include "tests/bench/result.hpp"
#include "vmm/error.hpp"

#include <algorithm>
#include <optional>
#include <vector>

namespace umbra::bench {

inline constexpr unsigned traps_a_slice = 20;

/// The bare minimum of either way back into the guest: the faster one is the baseline, whatever umbra chose.
class BareTraps {
  public:
    explicit BareTraps(const Kvm& kvm)
        : by_registers_{.machine = {kvm, loops_image(), ResumeBy::system_registers}, .times = {}},
          by_iretq_{.machine = {kvm, loops_image(), ResumeBy::iretq}, .times = {}} {}

    template<class Slice>
    void time(Slice&& slice) {
        for (Bare* bare : {&by_registers_, &by_iretq_}) {
            const auto ticks = slice(bare->machine);
            ok_ &= ticks.has_value();
            bare->times.push_back(static_cast<double>(ticks.value_or(0)));
        }
    }
    template<class Start>
    void start(Start&& start) {
        start(by_registers_.machine);
        start(by_iretq_.machine);
    }
    [[nodiscard]] bool ok() const { return ok_; }
    [[nodiscard]] double median_ticks() const {
        return std::min(median(by_registers_.times), median(by_iretq_.times));
    }

  private:
    struct Bare {
        BareMachine machine;
        std::vector<double> times;
    };
    Bare by_registers_, by_iretq_;
    bool ok_ = true;
};

/// What `trap` takes, traps_a_slice times; nothing if it returns false once. The first one is not counted: as
/// in the guest, the vCPU has been loaded when the clock is started.
template<class Trap>
[[nodiscard]] std::optional<std::uint64_t> time_traps(Trap&& trap) {
    if (!trap())
        return std::nullopt;
    const std::uint64_t start = timestamp();
    for (unsigned i = 0; i < traps_a_slice; ++i) {
        if (!trap())
            return std::nullopt;
    }
    return timestamp() - start;
}

[[nodiscard]] inline double per_trap(double ticks) {
    return nanoseconds(ticks) / traps_a_slice;
}

/// One slice of traps by an instruction that the bare machine skips.
inline void time_instruction_traps(BareTraps& bare) {
    bare.time([](BareMachine& machine) {
        return time_traps([&] {
            const bool trapped = machine.run();
            machine.resume(BENCH_SENSITIVE_SIZE);
            return trapped;
        });
    });
}
inline void start_instruction_traps(BareTraps& bare) {
    bare.start(
        [](BareMachine& machine) { machine.start(loop_offset(bench_sensitive), ~std::uint64_t{0}, 0); });
}

/// Runs a benchmark that needs KVM; it could not run if there is none.
inline void with_kvm(benchmark::State& state, void (*run)(const Kvm&, benchmark::State&)) {
    for ([[maybe_unused]] auto _ : state) {
        try {
            run(Kvm(), state);
        } catch (const StartupError& error) {
            state.SkipWithError(error.what());
        }
    }
}

} // namespace umbra::bench
