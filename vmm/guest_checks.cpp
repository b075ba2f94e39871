#include "vmm/guest_checks.hpp"

#include "vmm/tlb_report.hpp"

#include <algorithm>

#include <fmt/core.h>

namespace umbra {
namespace {

std::string counted(std::uint64_t number, const char* one, const char* many) {
    return fmt::format("{} {}", number, number == 1 ? one : many);
}

} // namespace

GuestChecks::GuestChecks(CheckOptions options, const GuestMemory& memory) : options_(std::move(options)) {
    if (options_.sanitize_tlb || options_.keep_stale == true)
        sanitizer_.emplace(memory);
}

void GuestChecks::attach(Mmu& mmu, std::function<Origin()> now) {
    if (!sanitizer_)
        return;
    mmu.sanitize(*sanitizer_, options_.keep_stale == true ? TlbPolicy::keep : TlbPolicy::drop,
                 [this, now = std::move(now)](const StaleUse& use) { report_stale_use(use, now()); });
}

void GuestChecks::report_stale_use(const StaleUse& use, const Origin& by) {
    if (!options_.sanitize_tlb || use.times != 1)
        return;
    options_.report(tlb_report(
        {.stale = use, .used = by, .symbol = options_.symbol, .ticks_per_us = options_.ticks_per_us}));
}

bool GuestChecks::may_write_table(GuestVirt at, GuestPhys slot, const Origin& by) {
    tell_write_ = false;
    const bool declared = std::ranges::any_of(options_.table_code,
                                              [&](const CodeRange& range) { return range.contains(by.rip); });
    if (options_.table_guard == TableGuard::off || declared)
        return true;
    ++intrusions_;
    tell_write_ = ++intruders_[by.rip] == 1;
    if (tell_write_) {
        const std::string name = options_.symbol(by.rip);
        options_.report(fmt::format(
            "Page table written by undeclared code: {:#018x}, {}\n"
            "  written at  {:016x}{}\n{}",
            at.value(), slot, by.rip.value(), name.empty() ? name : "  <" + name + ">",
            options_.table_guard == TableGuard::refuse ? "  refused: the guest gets a page fault\n" : ""));
    }
    return options_.table_guard != TableGuard::refuse;
}

void GuestChecks::table_written(std::span<const TableWrite> writes, const Origin& by) {
    for (const TableWrite& write : writes) {
        if (sanitizer_)
            sanitizer_->written(write.slot, write.before, write.after, by);
        if (tell_write_)
            options_.report(fmt::format("  entry of level {} at {}: {:016x} -> {:016x}\n", write.level,
                                        write.slot, write.before.raw(), write.after.raw()));
    }
    tell_write_ = false;
}

Verdict GuestChecks::judge(Verdict verdict) const {
    std::string found;
    if (options_.sanitize_tlb && sanitizer_->uses() != 0)
        found = counted(sanitizer_->uses(), "use of a stale translation", "uses of stale translations");
    if (intrusions_ != 0)
        found += fmt::format("{}{} by undeclared code", found.empty() ? "" : ", ",
                             counted(intrusions_, "write to a page table", "writes to page tables"));
    if (found.empty())
        return verdict;
    if (verdict.kind == Verdict::Kind::passed)
        return {Verdict::Kind::failed, 1, std::move(found)};
    verdict.reason += (verdict.reason.empty() ? "" : "; ") + found;
    return verdict;
}

} // namespace umbra
