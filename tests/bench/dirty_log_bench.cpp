// KVM's dirty log, as a way to learn of the guest's writes to its page tables.

#include "tests/bench/trap_floor.hpp"

#include <array>

namespace umbra::bench {
namespace {

constexpr std::size_t memory_bytes = std::size_t{64} << 20, memory_pages = memory_bytes / page_size;
constexpr std::size_t written = 512; ///< pages, in each round of dirty_log_write
constexpr unsigned rounds = 50;

struct LogTimes {
    std::vector<double> writes, asks; ///< ticks of a round
};

/// Writes to so many pages in a machine, and asks for the log after each round if there is one. False if KVM
/// failed.
bool time_rounds(const Kvm& kvm, WriteLog log, std::size_t pages, LogTimes& times) {
    const HostMemory memory(memory_bytes, HostMemory::Pages::small, "the logged memory");
    BareMachine machine(kvm, loops_image(), ResumeBy::iretq);
    machine.add_memory(memory.bytes(), log);
    machine.start(loop_offset(bench_write), BareMachine::more_begin.value(), pages);
    std::array<std::uint64_t, memory_pages / 64> bits{};
    const auto trap = [&] {
        const bool trapped = machine.run();
        machine.resume(BENCH_SENSITIVE_SIZE);
        return trapped;
    };
    for (unsigned round = 0; round < rounds; ++round) {
        if (!trap())
            return false;
        std::uint64_t start = timestamp();
        if (!trap())
            return false;
        times.writes.push_back(static_cast<double>(timestamp() - start));
        start = timestamp();
        if (log == WriteLog::on && !machine.written_pages(bits))
            return false;
        times.asks.push_back(static_cast<double>(timestamp() - start));
    }
    return true;
}

} // namespace

// (pages): the log of 64 MB fetched, when so many pages have been written to since the last time.
void dirty_log_fetch(benchmark::State& state) {
    with_kvm(state, [](const Kvm& kvm, benchmark::State& inner) {
        LogTimes logged;
        if (!time_rounds(kvm, WriteLog::on, static_cast<std::size_t>(inner.range(0)), logged))
            return inner.SkipWithError("the bare machine or KVM's dirty log failed");
        report(inner, {.measured = nanoseconds(median(logged.asks)), .baseline = {}});
    });
}

// What the first write to a page costs after the log was fetched, beyond a write to one that is not logged.
void dirty_log_write(benchmark::State& state) {
    with_kvm(state, [](const Kvm& kvm, benchmark::State& inner) {
        LogTimes logged, plain;
        if (!time_rounds(kvm, WriteLog::on, written, logged) ||
            !time_rounds(kvm, WriteLog::off, written, plain))
            return inner.SkipWithError("the bare machine or KVM's dirty log failed");
        const double extra = nanoseconds(median(logged.writes) - median(plain.writes)) / written;
        report(inner, {.measured = extra, .baseline = {}});
    });
}

} // namespace umbra::bench
