// What umbra can tell a kernel's developer that hardware does not: uses of stale translations
// (`--sanitize=tlb`), and writes to page tables by code that has no business there (`--protect-page-tables`).
//
// Both watch the guest's live page tables: the shadow tables' Sync is `trap`, and the monitor shows each
// write here. Reading order: CheckOptions, then the calls in the order that a write sees them.
#pragma once

#include "shadow/mmu.hpp"
#include "vmm/verdict.hpp"

#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace umbra {

/// [start, end) of guest code.
struct CodeRange {
    GuestVirt start, end;

    [[nodiscard]] bool contains(GuestVirt at) const { return at >= start && at < end; }
};

/// What happens to a write to a live page table from code outside the declared ranges.
enum class TableGuard : std::uint8_t {
    off,
    report, ///< it is told, and carried out
    refuse, ///< it is told, and the guest gets a page fault
};

struct CheckOptions {
    bool sanitize_tlb = false; ///< report uses of stale translations
    /// With or without reports: old translations are kept as long as the architecture permits, or dropped as
    /// soon as the guest changes its tables; nothing: as it comes.
    std::optional<bool> keep_stale;
    TableGuard table_guard = TableGuard::off;
    std::vector<CodeRange> table_code; ///< may write to page tables
    std::function<std::string(GuestVirt)> symbol = [](GuestVirt) { return std::string(); };
    std::function<void(const std::string&)> report = [](const std::string&) {}; ///< takes whole lines
    double ticks_per_us = 1;
};

class GuestChecks {
  public:
    explicit GuestChecks(CheckOptions options, const GuestMemory& memory);

    /// Whether each write to a live page table of the guest is to be shown here.
    [[nodiscard]] bool watch_tables() const {
        return sanitizer_ || options_.keep_stale || options_.table_guard != TableGuard::off;
    }
    /// Makes `mmu` tell the sanitizer, if there is one. `now`: who runs, and when; called at each stale use.
    void attach(Mmu& mmu, std::function<Origin()> now);

    /// The guest is about to write to a live page table at `at`, which is `slot`. False: it must not, and
    /// gets a page fault instead.
    [[nodiscard]] bool may_write_table(GuestVirt at, GuestPhys slot, const Origin& by);
    /// What the write has changed.
    void table_written(std::span<const TableWrite> writes, const Origin& by);

    /// A run that has passed but for what was found has failed.
    [[nodiscard]] Verdict judge(Verdict verdict) const;

  private:
    void report_stale_use(const StaleUse& use, const Origin& by);

    CheckOptions options_;
    std::optional<TlbSanitizer> sanitizer_;
    std::map<GuestVirt, std::uint64_t> intruders_; ///< writes to tables by instructions that must not
    std::uint64_t intrusions_ = 0;
    bool tell_write_ = false; ///< the write under way is to be reported
};

} // namespace umbra
