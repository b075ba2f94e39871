// The report's page: a table of all cases, and behind it what there is to see of each.
#include "launcher/test/html.hpp"

#include "launcher/test/text.hpp"

#include <algorithm>
#include <cmath>
#include <span>

#include <fmt/core.h>

namespace umbra {
namespace {

/// Nothing is loaded and nothing runs, should anything of the guest's ever be taken for markup.
constexpr std::string_view head = R"(<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --text: #1d2127; --dim: #5c6570; --page: #fff; --panel: #f5f7f9; --line: #d8dde3;
  --link: #0b5cad; --passed: #1a7f37; --failed: #c62828; --skipped: #8a6100; --not-run: #6b4fa0; --mark: #ffdfdb;
  --filled: #2f6fb3; --delivered: #c77700; --other: #8a5bb5; --code: #2a8c82; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e7ec; --dim: #9aa5b1; --page: #14171b; --panel: #1c2026; --line: #353c45; --link: #7db7f5;
    --passed: #57c26f; --failed: #ff7b72; --skipped: #e0b040; --not-run: #b99ae0; --mark: #5c2320; --filled: #6ea8e8;
    --delivered: #f0a64b; --other: #bf9be6; --code: #5cc4b8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 100rem; padding: 1.5rem; font: 14px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
h1 { font-size: 1.4rem; margin: 0 0 .6rem; } h1, h2, td, li, p, summary { overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.4rem 0 .4rem; } p { margin: .3rem 0; }
code, pre { font: 12px/18px ui-monospace, monospace; }
.dim, figcaption { color: var(--dim); } .none { color: var(--dim); font-weight: 400; }
.passed { color: var(--passed); } .failed { color: var(--failed); } .skipped { color: var(--skipped); }
.not-run { color: var(--not-run); }
.filled { color: var(--filled); } .delivered { color: var(--delivered); } .other { color: var(--other); }
.code { color: var(--code); }
.counts { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .5rem 0; align-items: baseline; }
.counts label { font-weight: 600; } .counts input { margin: 0 .3rem 0 0; vertical-align: -1px; }
.whole { display: flex; gap: 2px; height: .5rem; margin: .6rem 0 1.2rem; }
.whole i { background: currentColor; min-width: 3px; border-radius: 2px; }
body:has(#show-passed:not(:checked)) :is(tr, .case).is-passed, body:has(#show-failed:not(:checked)) :is(tr, .case).is-failed,
body:has(#show-skipped:not(:checked)) :is(tr, .case).is-skipped,
body:has(#show-not-run:not(:checked)) :is(tr, .case).is-not-run { display: none; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: 600; white-space: nowrap; } tr > :last-child { padding-right: 0; }
.number { text-align: right; } td.number, td.word { white-space: nowrap; }
td.bar { width: 22%; min-width: 6rem; } .bar i { display: block; height: .65rem; margin-top: .35rem; min-width: 1px;
  border-radius: 2px; background: currentColor; }
.why { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; color: var(--dim); }
.case { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; padding: .5rem 1rem; content-visibility: auto;
  contain-intrinsic-height: auto 2.5rem; } .case[open] { padding-bottom: 1rem; }
.case > div { scroll-margin-top: 4rem; overflow-x: auto; }
summary { cursor: pointer; } .case > summary { font-weight: 600; }
.problems { margin: .4rem 0; padding-left: 1.2rem; font-weight: 600; }
.facts > * { margin-right: 1.2rem; }
.console { display: grid; grid-template-columns: auto minmax(0, 1fr); background: var(--panel); border: 1px solid var(--line);
  border-radius: 4px; margin: .3rem 0; }
.console pre { margin: 0; padding: .5rem .8rem; tab-size: 8; overflow-x: auto; }
.console .numbers { color: var(--dim); text-align: right; user-select: none; border-right: 1px solid var(--line);
  padding: .5rem .6rem; overflow: hidden; }
mark { display: inline-block; min-width: calc(100% + .5rem); vertical-align: top; background: var(--mark); color: inherit; font-weight: 600;
  box-shadow: -.3rem 0 var(--mark), .8rem 0 var(--mark), inset 3px 0 var(--failed); padding-left: .5rem; margin-left: -.5rem; scroll-margin: 40vh; }
.fold > summary { color: var(--link); }
figure { margin: .3rem 0; } svg { display: block; width: 100%; } rect { fill: currentColor; }
.plot { height: 8rem; background: var(--panel); border: 1px solid var(--line); border-bottom-color: var(--dim); }
.axis { display: flex; justify-content: space-between; color: var(--dim); }
.map td { border: 0; padding-top: .1rem; padding-bottom: .1rem; vertical-align: middle; } td.cells { width: 45%; min-width: 12rem; }
.cells svg { height: 18px; } rect.extent { fill: var(--line); opacity: .45; }
</style>
)";

template<class... Args>
void put(std::string& page, fmt::format_string<Args...> format, Args&&... args) {
    page += fmt::format(format, std::forward<Args>(args)...);
}

std::string one_line(std::string_view text) {
    return markup(printable_line(text));
}

double share(double part, double whole) {
    return whole > 0 ? std::clamp(100 * part / whole, 0.0, 100.0) : 0;
}

// --- Verdicts

/// What is to be looked at first comes first.
struct Style {
    std::string_view name; ///< as result.hpp's, and a class of the style sheet
    std::string_view sign, words;
};
constexpr std::array<Style, 4> styles{{
    {"failed", "✗", "failed"},
    {"not-run", "–", "not run"},
    {"skipped", "○", "skipped"},
    {"passed", "✓", "passed"},
}};

/// A word of the page's own, whatever the file said.
const Style& style_of(const ReportedCase& reported) {
    const auto* const found = std::ranges::find(styles, reported.verdict, &Style::name);
    return found == styles.end() ? styles.front() : *found;
}

std::string title_of(const ReportedCase& reported) {
    std::string title = one_line(reported.name);
    if (reported.attempts != 1)
        title += fmt::format(" (run {})", reported.attempt);
    return title;
}

bool has_section(const ReportedCase& reported) {
    return !reported.folder.empty() || !reported.console.empty() || !reported.traps.empty() ||
           reported.timeline;
}

// --- All cases

/// The runs of one case.
using Group = std::span<const ReportedCase>;

std::vector<Group> groups_of(std::span<const ReportedCase> cases) {
    std::vector<Group> groups;
    while (!cases.empty()) {
        const auto end = std::ranges::find_if(
            cases, [&](const ReportedCase& reported) { return reported.name != cases.front().name; });
        const auto length = static_cast<std::size_t>(end - cases.begin());
        groups.push_back(cases.first(length));
        cases = cases.subspan(length);
    }
    return groups;
}

/// The run of a group that decides on it.
const ReportedCase& worst_of(Group group) {
    return *std::ranges::min_element(group, {},
                                     [](const ReportedCase& reported) { return &style_of(reported); });
}

void put_link(std::string& page, const ReportedCase& reported, std::size_t number, std::string_view text) {
    if (has_section(reported))
        put(page, "<a href=\"#case{}\">{}</a>", number, text);
    else
        page += text;
}

void put_runs(std::string& page, Group group, std::size_t first) {
    constexpr std::size_t named = 20;
    const auto bad = [](const ReportedCase& reported) { return &style_of(reported) == styles.data(); };
    const auto count = static_cast<std::size_t>(std::ranges::count_if(group, bad));
    put(page, "<span class=\"why\">{} of {} runs failed", count, group.size());
    std::size_t told = 0;
    for (std::size_t i = 0; i < group.size() && told < named; ++i) {
        if (!bad(group[i]))
            continue;
        page += told++ == 0 ? ": " : ", ";
        put_link(page, group[i], first + i, fmt::format("run {}", group[i].attempt));
    }
    put(page, "{}</span>", told < count ? ", …" : "");
}

void put_overview(std::string& page, const std::vector<ReportedCase>& cases) {
    double longest = 0;
    for (const ReportedCase& reported : cases)
        longest = std::max(longest, reported.seconds);
    std::vector<Group> groups = groups_of(cases);
    std::ranges::stable_sort(groups, {}, [](Group group) { return &style_of(worst_of(group)); });
    page += "<table>\n<tr><th>verdict<th>case<th class=\"number\">seconds<th>\n";
    for (const Group group : groups) {
        const ReportedCase& worst = worst_of(group);
        const Style& style = style_of(worst);
        const auto first = static_cast<std::size_t>(group.data() - cases.data());
        const double seconds = std::ranges::max_element(group, {}, &ReportedCase::seconds)->seconds;
        const bool flaky = &style == styles.data() && std::ranges::any_of(group, [](const ReportedCase& run) {
            return &style_of(run) == &styles.back();
        });
        put(page, R"(<tr class="is-{0}"><td class="word {0}">{1} {2}<td>)", style.name, style.sign,
            flaky ? "flaky" : style.words);
        put_link(page, worst, static_cast<std::size_t>(&worst - cases.data()), one_line(worst.name));
        if (group.size() > 1)
            put_runs(page, group, first);
        else if (!worst.problems.empty())
            put(page, "<span class=\"why\">{}</span>", one_line(worst.problems.front()));
        put(page, "<td class=\"number\">{:.3f}<td class=\"bar {}\"><i style=\"width:{:.1f}%\"></i>\n",
            seconds, style.name, share(seconds, longest));
    }
    page += "</table>\n";
}

// --- Console

/// `text`'s lines, of which `first` is the first one's number.
void put_lines(std::string& page, std::string_view text, std::uint64_t first, std::uint64_t failing) {
    std::string numbers, lines;
    for (std::uint64_t line = first; !text.empty(); ++line) {
        const std::size_t length = std::min(text.find('\n'), text.size());
        std::string shown = markup(printable(std::string(text.substr(0, length)) + '\n'));
        shown.pop_back(); // with its end, that a "\r" before it is part of it
        put(numbers, "{}\n", line);
        if (line == failing)
            put(lines, "<mark>{}</mark>\n", shown);
        else
            lines += shown + '\n';
        text.remove_prefix(std::min(text.size(), length + 1));
    }
    // HTML leaves out a line break that comes first
    put(page,
        "<div class=\"console\"><pre class=\"numbers\" "
        "aria-hidden=\"true\">\n{}</pre><pre>\n{}</pre></div>\n",
        numbers, lines);
}

/// `text` up to where its line `number` begins, from 0.
std::size_t before_line(std::string_view text, std::uint64_t number) {
    std::size_t at = 0;
    for (std::uint64_t line = 0; line < number && at < text.size(); ++line)
        at = std::min(text.find('\n', at), text.size() - 1) + 1;
    return at;
}

std::uint64_t count_lines(std::string_view text) {
    return static_cast<std::uint64_t>(std::ranges::count(text, '\n')) +
           (text.empty() || text.ends_with('\n') ? 0 : 1);
}

void put_folded(std::string& page, std::string_view text, std::uint64_t first, std::string_view where) {
    if (text.empty())
        return;
    const std::uint64_t lines = count_lines(text);
    put(page, "<details class=\"fold\"><summary>{} line{} {}</summary>\n", lines, lines == 1 ? "" : "s",
        where);
    put_lines(page, text, first, 0);
    page += "</details>\n";
}

/// To be seen at once are the failing line and those around it, or else the last ones.
void put_console(std::string& page, const ReportedCase& reported) {
    constexpr std::uint64_t before = 20, after = 10, fold_least = 10;
    if (reported.console.empty())
        return;
    page += "<h2>Console";
    if (reported.failing_line != 0)
        put(page, ": line {}", reported.failing_line);
    page += "</h2>\n";
    if (reported.console_before != 0)
        put(page, "<p class=\"dim\">{} lines before are left out.</p>\n", reported.console_before);
    const std::string_view text = reported.console;
    const std::uint64_t lines = count_lines(text), first = reported.console_before + 1;
    std::uint64_t from = lines > before + after ? lines - before - after : 0, to = lines;
    if (reported.failing_line >= first) {
        const std::uint64_t failing = reported.failing_line - first;
        from = failing > before ? failing - before : 0;
        to = std::min(failing + 1 + after, lines);
    }
    from = from < fold_least ? 0 : from;
    to = lines - to < fold_least ? lines : to;
    const std::size_t start = before_line(text, from), end = before_line(text, to);
    put_folded(page, text.substr(0, start), first, "before");
    put_lines(page, text.substr(start, end - start), first + from, reported.failing_line);
    put_folded(page, text.substr(end), first + to, "after");
}

void put_errors(std::string& page, const ReportedCase& reported) {
    constexpr std::uint64_t at_once = 25;
    if (reported.errors.empty())
        return;
    page += "<h2>What umbra said</h2>\n";
    const std::string_view text = reported.errors;
    std::size_t start = before_line(text, at_once); // the reason and the registers come first
    if (count_lines(text.substr(start)) < at_once)
        start = text.size();
    put_lines(page, text.substr(0, start), 1, 0);
    put_folded(page, text.substr(start), at_once + 1, "more");
}

// --- Traps

constexpr std::uint64_t page_size = 4096;

void put_traps(std::string& page, const ReportedCase& reported) {
    if (reported.traps.empty())
        return;
    std::uint64_t sum = 0;
    double microseconds = 0;
    for (const ReportedCase::Traps& traps : reported.traps) {
        sum += traps.count;
        microseconds += traps.microseconds;
    }
    put(page,
        "<h2>Trap mix <span class=\"none\">{} traps, {:.3f} ms in umbra</span></h2>\n<table>\n<tr><th>trap"
        "<th>action<th class=\"number\">count<th class=\"number\">ms in umbra<th class=\"number\">share of "
        "all<th>\n",
        sum, microseconds / 1e3);
    for (const ReportedCase::Traps& traps : reported.traps) {
        const double part = share(static_cast<double>(traps.count), static_cast<double>(sum));
        put(page,
            "<tr><td class=\"word\">{}<td class=\"word\">{}<td class=\"number\">{}<td class=\"number\">{:.3f}"
            "<td class=\"number\">{:.1f} %<td class=\"bar filled\"><i style=\"width:{:.1f}%\"></i>\n",
            one_line(traps.reason), one_line(traps.action), traps.count, traps.microseconds / 1e3, part,
            part);
    }
    page += "</table>\n";
    if (reported.instructions.empty())
        return;
    constexpr std::size_t shown = 40;
    page += "<p class=\"dim\">Instructions:";
    for (std::size_t i = 0; i < std::min(reported.instructions.size(), shown); ++i)
        put(page, "{} <code>{}</code> {}", i == 0 ? "" : ",", one_line(reported.instructions[i].first),
            reported.instructions[i].second);
    put(page, "{}</p>\n", reported.instructions.size() > shown ? ", …" : "");
}

constexpr std::array<std::string_view, FaultTimeline::kinds> kind_styles{"filled", "delivered", "other"};
constexpr std::array<std::string_view, FaultTimeline::kinds> kind_words{"filled by umbra", "the guest's own",
                                                                        "others"};

std::string kinds_text(const FaultTimeline::Slot& faults) {
    std::string text;
    for (std::size_t kind = 0; kind < faults.size(); ++kind)
        if (faults.at(kind) != 0)
            put(text, "{}{} {}", text.empty() ? "" : ", ", faults.at(kind), kind_words.at(kind));
    return text;
}

std::uint64_t sum_of(const FaultTimeline::Slot& faults) {
    std::uint64_t sum = 0;
    for (const std::uint32_t count : faults)
        sum += count;
    return sum;
}

std::string time_text(double seconds) {
    if (seconds < 1e-3)
        return fmt::format("{:.0f} µs", seconds * 1e6);
    return seconds < 1 ? fmt::format("{:.1f} ms", seconds * 1e3) : fmt::format("{:.2f} s", seconds);
}

/// Kinds of faults on one another, from the bottom of a box up, in the box's units.
void put_stack(std::string& page, const FaultTimeline::Slot& faults, std::size_t x, double bottom,
               double unit) {
    for (std::size_t kind = 0; kind < faults.size(); ++kind) {
        const double part = unit * faults.at(kind);
        if (part <= 0)
            continue;
        bottom -= part;
        put(page, R"(<rect class="{}" x="{}" y="{:.2f}" width="1" height="{:.2f}"/>)", kind_styles.at(kind),
            x, bottom, part);
    }
}

void put_legend(std::string& page, bool code) {
    for (std::size_t kind = 0; kind < FaultTimeline::kinds; ++kind)
        put(page, "<span class=\"{}\">■ {}</span> ", kind_styles.at(kind), kind_words.at(kind));
    if (code)
        page += "<span class=\"code\">■ code that trapped</span> ";
}

void put_timeline(std::string& page, const FaultTimeline& timeline) {
    constexpr double height = 100;
    std::uint64_t highest = 0, all = 0;
    for (const FaultTimeline::Slot& slot : timeline.faults) {
        highest = std::max(highest, sum_of(slot));
        all += sum_of(slot);
    }
    const double slot_seconds = timeline.seconds / FaultTimeline::slots;
    put(page, "<h2>Page faults over time <span class=\"none\">{} in {} traps{}</span></h2>\n", all,
        timeline.traps, timeline.complete ? "" : ", of the trace's beginning only");
    if (all == 0)
        return;
    page += "<figure><figcaption>";
    put_legend(page, false);
    put(page,
        "at most {} in {}</figcaption>\n<svg class=\"plot\" viewBox=\"0 0 {} {:.0f}\" "
        "preserveAspectRatio=\"none\" "
        "role=\"img\" aria-label=\"page faults over time\">\n",
        highest, time_text(slot_seconds), FaultTimeline::slots, height);
    for (std::size_t i = 0; i < FaultTimeline::slots; ++i) {
        const FaultTimeline::Slot& slot = timeline.faults.at(i);
        if (sum_of(slot) == 0)
            continue;
        put(page, "<g><title>{}: {}</title>", time_text(slot_seconds * static_cast<double>(i)),
            kinds_text(slot));
        put_stack(page, slot, i, height, height / static_cast<double>(highest));
        page += "</g>\n";
    }
    page += "</svg>\n<div class=\"axis\">";
    for (const double part : {0.0, 0.25, 0.5, 0.75, 1.0})
        put(page, "<span>{}</span>", part == 0 ? "first trap" : time_text(timeline.seconds * part));
    page += "</div></figure>\n";
}

std::string size_text(std::uint64_t bytes) {
    constexpr std::array<std::string_view, 6> units{"KB", "MB", "GB", "TB", "PB", "EB"};
    double size = static_cast<double>(bytes) / 1024;
    std::size_t unit = 0;
    for (; size >= 1023.5 && unit + 1 < units.size(); ++unit) // that would be shown as 1024
        size /= 1024;
    return fmt::format("{:.4g} {}", size, units.at(unit));
}

struct MostOfCell {
    std::uint64_t faults = 1, code = 1;
};

/// A strip of the map: what there was of faults above, and of code below. The more, the stronger.
void put_cells(std::string& page, const FaultTimeline::Region& region, const MostOfCell& most) {
    constexpr double height = 18, faults_end = 11, code_start = 13;
    const auto strength = [](std::uint64_t count, std::uint64_t highest) {
        return 0.35 +
               0.65 * std::log1p(static_cast<double>(count)) / std::log1p(static_cast<double>(highest));
    };
    put(page,
        "<svg viewBox=\"0 0 {} {:.0f}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"pages\">"
        "<rect class=\"extent\" width=\"{}\" height=\"{:.0f}\"/>",
        FaultTimeline::most_cells, height, region.cells.size(), height);
    for (std::size_t i = 0; i < region.cells.size(); ++i) {
        const FaultTimeline::Cell& cell = region.cells[i];
        const std::uint64_t faults = sum_of(cell.faults);
        if (faults + cell.code == 0)
            continue;
        const std::uint64_t size = region.cell_pages * page_size, start = region.first + i * size;
        const std::uint64_t last =
            start + (std::min(size - page_size, region.last - start) | (page_size - 1));
        put(page, "<g><title>{:#x}–{:#x}: {}{}", start, last, kinds_text(cell.faults),
            faults != 0 && cell.code != 0 ? "; " : "");
        if (cell.code != 0)
            put(page, "{} traps of its code", cell.code);
        page += "</title>";
        if (faults != 0) {
            put(page, "<g opacity=\"{:.2f}\">", strength(faults, most.faults));
            put_stack(page, cell.faults, i, faults_end, faults_end / static_cast<double>(faults));
            page += "</g>";
        }
        if (cell.code != 0)
            put(page,
                "<rect class=\"code\" opacity=\"{:.2f}\" x=\"{}\" y=\"{:.0f}\" width=\"1\" "
                "height=\"{:.0f}\"/>",
                strength(cell.code, most.code), i, code_start, height - code_start);
        page += "</g>";
    }
    page += "</svg>";
}

void put_map(std::string& page, const FaultTimeline& timeline) {
    if (timeline.map.empty())
        return;
    MostOfCell most;
    for (const FaultTimeline::Region& region : timeline.map)
        for (const FaultTimeline::Cell& cell : region.cells)
            most = {std::max(most.faults, sum_of(cell.faults)),
                    std::max<std::uint64_t>(most.code, cell.code)};
    page += "<h2>Address space <span class=\"none\">guest-virtual, all address spaces together</span></h2>\n"
            "<figure><figcaption>Page faults: ";
    put_legend(page, true);
    page += "</figcaption>\n<table class=\"map\">\n<tr><th>first page<th>last page<th class=\"number\">gap "
            "before<th>map"
            "<th class=\"number\">a cell<th class=\"number\">pages met<th class=\"number\">faults<th "
            "class=\"number\">"
            "traps of code\n";
    std::uint64_t end = 0; // of the region before; of the last one it may be 0
    for (const FaultTimeline::Region& region : timeline.map) {
        put(page,
            "<tr><td class=\"word\"><code>{:#018x}</code><td class=\"word\"><code>{:#018x}</code>"
            "<td class=\"number dim\">{}<td class=\"cells\">",
            region.first, region.last, region.first == end ? "" : size_text(region.first - end));
        end = region.last + page_size;
        put_cells(page, region, most);
        put(page,
            "<td class=\"number\">{}<td class=\"number\">{}<td class=\"number\">{}<td class=\"number\">{}\n",
            size_text(region.cell_pages * page_size), region.pages, region.faults, region.code);
    }
    page += "</table>";
    if (timeline.more_places != 0)
        put(page, "\n<p class=\"dim\">{} more places had less.</p>", timeline.more_places);
    page += "</figure>\n";
}

// --- A case

/// A path as part of an address: what it could mean to a browser, or to HTML, is encoded (RFC 3986).
std::string address_of(std::string_view path) {
    constexpr std::string_view plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/";
    std::string address = "./"; // never a scheme, a host or a root
    for (const char c : path) {
        if (plain.find(c) != std::string_view::npos)
            address += c;
        else
            put(address, "%{:02X}", static_cast<unsigned char>(c));
    }
    return address;
}

void put_facts(std::string& page, const ReportedCase& reported) {
    page += "<p class=\"facts\">";
    if (!reported.expected.empty())
        put(page, "<span><span class=\"dim\">expected</span> {}</span> ", one_line(reported.expected));
    put(page,
        "<span><span class=\"dim\">ended</span> {}</span> <span><span class=\"dim\">after</span> {:.3f} "
        "s</span>",
        reported.outcome.empty() ? "not by itself" : one_line(reported.outcome), reported.seconds);
    for (const auto& [key, value] : reported.parameters)
        put(page, " <span><span class=\"dim\">{}</span> {}</span>", one_line(key), one_line(value));
    for (const std::string& tag : reported.tags)
        put(page, " <span class=\"dim\">#{}</span>", one_line(tag));
    page += "</p>\n";
    const bool told = std::ranges::any_of(reported.problems, [&reported](const std::string& problem) {
        return problem.find(reported.reason) != std::string::npos;
    });
    if (!reported.reason.empty() && !told && &style_of(reported) != &styles.back())
        put(page, "<p>{}</p>\n", one_line(reported.reason));
    if (!reported.manifest.empty())
        put(page, "<p><span class=\"dim\">from</span> <code>{}</code></p>\n", one_line(reported.manifest));
    if (reported.folder.empty())
        return;
    const std::string address = address_of(reported.folder);
    put(page, R"(<p><span class="dim">files</span> <a href="{}/"><code>{}</code></a>)", address,
        one_line(reported.folder));
    for (const std::string& file : reported.files)
        put(page, " · <a href=\"{}/{}\">{}</a>", address, address_of(file).substr(2), one_line(file));
    page += "</p>\n";
}

/// From so many bytes of the page on, a case is named with its problems and files, and that is all: browsers
/// take a page of hundreds of megabytes badly.
constexpr std::size_t enough = std::size_t{24} << 20;

void put_case(std::string& page, const ReportedCase& reported, std::size_t number, bool open) {
    const Style& style = style_of(reported);
    // A browser opens it for who comes to what is in it.
    put(page,
        "<details class=\"case is-{0}\"{1}>\n<summary><span class=\"{0}\">{2}</span> {3} <span "
        "class=\"{0}\">{4}</span>"
        "</summary>\n<div id=\"case{5}\">\n",
        style.name, open ? " open" : "", style.sign, title_of(reported),
        reported.verdict == style.name ? std::string(style.words) : one_line(reported.verdict), number);
    if (!reported.problems.empty()) {
        put(page, "<ul class=\"problems {}\">\n", style.name);
        for (const std::string& problem : reported.problems)
            put(page, "<li>{}\n", one_line(problem));
        page += "</ul>\n";
    }
    put_facts(page, reported);
    if (page.size() < enough) {
        put_console(page, reported);
        put_errors(page, reported);
        put_traps(page, reported);
        if (reported.timeline) {
            put_timeline(page, *reported.timeline);
            put_map(page, *reported.timeline);
        }
    } else {
        page += "<p class=\"dim\">This page is large already: umbra report of the folder with these files "
                "shows the "
                "rest.</p>\n";
    }
    page += "</div>\n</details>\n";
}

} // namespace

std::string report_page(std::string_view title, const std::vector<ReportedCase>& cases) {
    constexpr std::size_t opened = 10;
    std::string page;
    put(page, "<!DOCTYPE html>\n<html lang=\"en\">\n{}<title>{}</title>\n<h1>{}</h1>\n", head,
        one_line(title), one_line(title));
    double seconds = 0;
    for (const ReportedCase& reported : cases)
        seconds += reported.seconds;
    put(page, "<div class=\"counts\"><span>{} run{}, {:.1f} s of guests</span>", cases.size(),
        cases.size() == 1 ? "" : "s", seconds);
    std::string whole;
    for (const Style& style : styles) {
        const auto count = std::ranges::count(
            cases, &style, [](const ReportedCase& reported) { return &style_of(reported); });
        put(page, "\n<label class=\"{0}\"><input type=\"checkbox\" id=\"show-{0}\" checked>{1} {2}</label>",
            style.name, count, style.words);
        if (count != 0)
            put(whole, R"(<i class="{}" style="flex:{}"></i>)", style.name, count);
    }
    put(page, "</div>\n<div class=\"whole\">{}</div>\n", whole);
    put_overview(page, cases);
    std::size_t open = 0;
    for (const Style& style : styles)
        for (std::size_t i = 0; i < cases.size(); ++i)
            if (&style_of(cases[i]) == &style && has_section(cases[i]))
                put_case(page, cases[i], i, &style == styles.data() && open++ < opened);
    page += "</html>\n";
    return page;
}

} // namespace umbra
