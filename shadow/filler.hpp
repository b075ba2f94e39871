// How shadow tables are filled: after a fault that the guest's tables do not ask for.
#pragma once

#include "shadow/table_cache.hpp"

namespace umbra {

class Filler {
  public:
    /// All of them outlive this.
    Filler(const GuestMemory& memory, TableStore& store, Tracker& tracker, GuardSet& guards, Leaves& leaves,
           TableCache& cache, const MmuConfig& config, MmuCounters& counters)
        : memory_(memory), store_(store), tracker_(tracker), guards_(guards), leaves_(leaves), cache_(cache),
          config_(config), counters_(counters) {}

    /// Whether what is installed is what the guest's tables say, or an old translation.
    enum class Remember : bool { no, yes };
    /// Makes the tables below `root` translate `at` as `walk` did. False if the pool is exhausted; what was
    /// made so far stays.
    [[nodiscard]] bool install(TableIndex root, const GuestPaging& paging, const GuestWalk& walk,
                               GuestVirt at, Remember remembering);

  private:
    [[nodiscard]] std::optional<TableIndex> descend_to_guest(TableIndex root, unsigned level, GuestVirt at);
    [[nodiscard]] bool install_leaf(TableIndex table, unsigned number, GuestFrame frame, GuestVirt at,
                                    std::uint64_t rights);
    void remember_for(TableIndex table, unsigned slot, GuestEntry entry);
    void prefetch(TableIndex table, const GuestPaging& paging, const GuestWalk::Step& leaf, GuestVirt at);

    const GuestMemory& memory_;
    TableStore& store_;
    Tracker& tracker_;
    GuardSet& guards_;
    Leaves& leaves_;
    TableCache& cache_;
    const MmuConfig& config_;
    MmuCounters& counters_;
};

} // namespace umbra
