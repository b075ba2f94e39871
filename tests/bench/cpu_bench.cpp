// Guest code that does not trap, against the same code in this process.

#include "tests/bench/guest_loops.hpp"
#include "tests/bench/result.hpp"
#include "vmm/error.hpp"

namespace umbra::bench {
namespace {

constexpr unsigned slices = 300;
constexpr std::uint64_t hash_times = 200'000, memory_times = 5'000; // below a millisecond each

constexpr Goal goal{.of = Goal::Of::ratio, .bound = Goal::Bound::at_least, .value = 0.98};

/// Takes turns between the guest's loop at `offset` and `here`.
template<class Loop, class Here>
void compare(benchmark::State& state, LoopGuest& guest, Loop* loop, Here&& here) {
    std::vector<double> in_guest, on_host;
    const bool passed = guest.run(loop_offset(loop), slices, [&] {
        in_guest.push_back(static_cast<double>(guest.mailbox().ticks));
        const std::uint64_t start = timestamp();
        here();
        on_host.push_back(static_cast<double>(timestamp() - start));
    });
    if (!passed)
        return state.SkipWithError("the guest failed");
    const double measured = nanoseconds(median(in_guest)), baseline = nanoseconds(median(on_host));
    report(state, {Unit::nanoseconds, measured, baseline, baseline / measured, goal});
}

void arithmetic(benchmark::State& state, LoopGuest& guest) {
    guest.mailbox().first = hash_times;
    compare(state, guest, bench_hash, [] { benchmark::DoNotOptimize(bench_hash(hash_times, 0)); });
}

void memory(benchmark::State& state, LoopGuest& guest) {
    constexpr std::uint64_t buffer = 0x1000000;
    const HostMemory host(BENCH_MEMORY_BYTES, HostMemory::Pages::huge, "the loop's memory");
    guest.mailbox().first = buffer;
    guest.mailbox().second = memory_times;
    compare(state, guest, bench_memory, [&] {
        benchmark::DoNotOptimize(
            bench_memory(reinterpret_cast<std::uint64_t*>(host.bytes().data()), memory_times));
    });
}

void in_guest(benchmark::State& state, void (*run)(benchmark::State&, LoopGuest&)) {
    for ([[maybe_unused]] auto _ : state) {
        try {
            const Kvm kvm;
            LoopGuest guest(kvm, probe_traits(kvm));
            run(state, guest);
        } catch (const StartupError& error) {
            state.SkipWithError(error.what());
        }
    }
}

} // namespace

void guest_arithmetic(benchmark::State& state) {
    in_guest(state, arithmetic);
}
void guest_memory(benchmark::State& state) {
    in_guest(state, memory);
}

} // namespace umbra::bench
