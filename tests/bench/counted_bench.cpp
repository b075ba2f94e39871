// How many traps the cache of shadow tables saves. Counted, hence exact: the same on every host of a kind.

#include "tests/bench/trap_floor.hpp"
#include "vmm/loader/loader.hpp"

#include <filesystem>

#include <fmt/core.h>

namespace umbra::bench {
namespace {

struct Counted {
    std::uint64_t traps = 0;
    MmuCounters mmu;
};

/// Runs a guest that stands beside this program; nothing unless it passes.
std::optional<Counted> count_traps(const Kvm& kvm, const char* guest, bool virtual_tlb) {
    const auto build = std::filesystem::read_symlink("/proc/self/exe").parent_path();
    const std::vector<std::byte> kernel = read_kernel(build / "guest" / guest);
    Machine machine(kvm, {.memory_bytes = std::uint64_t{64} << 20,
                          .pool_bytes = std::size_t{16} << 20,
                          .cpu = {},
                          .serial_output = {},
                          .debug_output = {}});
    MonitorOptions options;
    options.virtual_tlb = virtual_tlb;
    if (virtual_tlb) // it would only pay for the protection of tables, and for the large pages split for it
        options.sync = Sync::compare;
    Monitor monitor(machine, probe_traits(kvm), boot_cpu(load_kernel(kernel, {}, machine.memory())), options);
    RunControl control;
    if (monitor.run(control).kind != Verdict::Kind::passed)
        return std::nullopt;
    return Counted{monitor.log().added(), monitor.mmu()->counters()};
}

double faults_per_flush(const MmuCounters& mmu) {
    const std::uint64_t faults = mmu.fills + mmu.table_writes;
    return static_cast<double>(faults) / static_cast<double>(std::max<std::uint64_t>(mmu.flushes, 1));
}

} // namespace

// All traps of a guest's run. The baseline is a virtual TLB, which forgets everything at each flush.
void counted_traps(benchmark::State& state, const char* guest) {
    for ([[maybe_unused]] auto _ : state) {
        try {
            const Kvm kvm;
            const auto cached = count_traps(kvm, guest, false), forgetful = count_traps(kvm, guest, true);
            if (!cached || !forgetful) {
                state.SkipWithError("the guest failed");
                continue;
            }
            const auto measured = static_cast<double>(cached->traps),
                       baseline = static_cast<double>(forgetful->traps);
            report(state,
                   {.unit = Unit::count,
                    .measured = measured,
                    .baseline = baseline,
                    .ratio = measured / baseline,
                    .note = fmt::format("{} flushes; hidden faults for each: {:.2f}, without cache {:.2f}",
                                        cached->mmu.flushes, faults_per_flush(cached->mmu),
                                        faults_per_flush(forgetful->mmu))});
        } catch (const StartupError& error) {
            state.SkipWithError(error.what());
        }
    }
}

} // namespace umbra::bench
