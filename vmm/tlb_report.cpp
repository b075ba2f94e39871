// Reading order: tlb_report() at the end, then its lines, in their order.
#include "vmm/tlb_report.hpp"

#include "vmm/report.hpp"

#include <string_view>
#include <utility>

#include <fmt/core.h>

namespace umbra {
namespace {

class Text {
  public:
    template<class... Args>
    void line(fmt::format_string<Args...> format, Args&&... args) {
        text_ += fmt::format(format, std::forward<Args>(args)...);
        text_ += '\n';
    }
    [[nodiscard]] std::string take() { return std::move(text_); }

  private:
    std::string text_;
};

/// "0000000000101234  <main+0x12>"
std::string place(const TlbReportInput& input, GuestVirt at) {
    const std::string name = input.symbol(at);
    return fmt::format("{:016x}{}", at.value(), name.empty() ? name : fmt::format("  <{}>", name));
}

std::string count(std::uint64_t number, std::string_view one) {
    return fmt::format("{} {}{}", number, one, number == 1 ? "" : "s");
}

/// Where an entry leads: "table gpa:0x5000".
std::string target(GuestEntry entry, const Level& level) {
    if (!entry.present())
        return "nothing";
    if (!entry.leaf(level))
        return fmt::format("table {}", entry.table().base());
    constexpr std::uint64_t kb = 1024, mb = kb * kb, gb = kb * mb;
    const std::uint64_t span = level.span();
    const std::string size = span >= gb   ? fmt::format("{} GB", span / gb)
                             : span >= mb ? fmt::format("{} MB", span / mb)
                                          : fmt::format("{} KB", span / kb);
    return fmt::format("{} page {}", size, entry.page(level).base());
}

void add_access(Text& text, const TlbReportInput& input) {
    const StaleUse& stale = input.stale;
    const char* const kind = stale.access.fetch ? "fetch" : stale.access.write ? "write" : "read";
    text.line("Stale translation used: {} of {:#018x} by {}", kind, stale.address.value(),
              stale.access.user ? "user code" : "the kernel");
    text.line("  used at     {}", place(input, input.used.rip));
}

void add_entry(Text& text, const TlbReportInput& input) {
    const StaleUse& stale = input.stale;
    if (!stale.change) {
        const GuestPhys root = stale.before.steps[0].slot.page_base();
        const GuestPhys now = stale.now.steps[0].slot.page_base();
        if (root == now)
            text.line(
                "  no entry has changed, but what its bits mean (EFER.NXE, or a change that was undone)");
        else
            text.line("  it is of another address space: root {} when it was cached, {} now", root, now);
        return;
    }
    const StaleUse::Change& change = *stale.change;
    if (change.written)
        text.line("  written at  {}, {:.3f} us and {} before", place(input, change.written->rip),
                  static_cast<double>(input.used.time - change.written->time) / input.ticks_per_us,
                  count(input.used.traps - change.written->traps, "trap"));
    else
        text.line("  written at  a place that was not seen, since the translation was last used");
    for (const auto& [when, entry] : {std::pair("was", change.before), std::pair("is", change.now)})
        text.line("  {:5}  {:22}  {:3}  {:016x}  {:14}  -> {}", change.level->name,
                  fmt::format("{}", change.slot), when, entry.raw(), entry_flags(entry, *change.level),
                  target(entry, *change.level));
}

void add_harm(Text& text, const StaleUse& stale) {
    switch (stale.harm) {
    case StaleUse::Harm::fault_missed:
        text.line("  by the tables: page fault, error code {:#x}; a CPU may still reach {}",
                  stale.now.fault->error_code, stale.before.address);
        return;
    case StaleUse::Harm::other_page:
        text.line("  by the tables: {}; a CPU may still reach {}", stale.now.address, stale.before.address);
        return;
    case StaleUse::Harm::dirty_missed:
        text.line("  by the tables: the page is clean; a CPU may write to {}, and not set dirty again",
                  stale.before.address);
        return;
    }
}

void add_missing(Text& text, const StaleUse& stale) {
    const bool global = stale.before.global && !stale.through_structure_cache;
    const std::string tag = stale.pcid == 0 || global ? "" : fmt::format(" of PCID {:#x}", stale.pcid);
    if (stale.through_structure_cache)
        text.line(
            "  missing since: any INVLPG, CR3 load or INVPCID{}: the entry may be cached without the page",
            tag);
    else if (global)
        text.line("  missing since: INVLPG of this page, or a change of CR4.PGE: the page is global");
    else
        text.line("  missing since: INVLPG or INVPCID of this page, or a CR3 load{}", tag);
    if (stale.spared.contexts != 0)
        text.line("  in vain since: {} or the like{}", count(stale.spared.contexts, "CR3 load"),
                  global ? ", which global pages survive" : ", of another PCID");
    if (stale.spared.pages != 0)
        text.line("  in vain since: {}, {}of {:#018x}", count(stale.spared.pages, "INVLPG"),
                  stale.spared.pages == 1 ? "" : "the last ", stale.spared.last_page.value());
}

} // namespace

std::string tlb_report(const TlbReportInput& input) {
    Text text;
    add_access(text, input);
    add_entry(text, input);
    add_harm(text, input.stale);
    add_missing(text, input.stale);
    return text.take();
}

} // namespace umbra
