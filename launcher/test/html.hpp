// `umbra report DIR`: what `umbra test --output DIR` left there, as one page that a browser shows without
// anything else: no script, no other file, no network.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <istream>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace umbra {

/// Page faults over a run, by what umbra did about them, and where in the guest's address space they and the
/// code that trapped are: of a trap trace (TrapLog::trace_to).
struct FaultTimeline {
    static constexpr std::size_t slots = 120;
    enum class Kind : std::uint8_t {
        filled,    ///< hidden: filled in the shadow tables
        delivered, ///< the guest's own
        other,     ///< emulated writes to page tables, devices' windows
        count_,
    };
    static constexpr std::size_t kinds = static_cast<std::size_t>(Kind::count_);
    using Slot = std::array<std::uint32_t, kinds>;
    /// One or a few pages side by side.
    struct Cell {
        Slot faults{};          ///< at these pages
        std::uint32_t code = 0; ///< traps, of any kind, by instructions in these pages
    };
    /// Pages near each other that were faulted on, or have code that trapped.
    struct Region {
        std::uint64_t first = 0, last = 0; ///< guest-virtual, of its first and its last page
        std::uint64_t pages = 0;           ///< that are meant, of those between
        std::uint64_t faults = 0, code = 0;
        std::uint64_t cell_pages = 1; ///< of each cell
        std::vector<Cell> cells;      ///< from `first` to `last`; at most `most_cells`
    };
    static constexpr std::size_t most_cells = 64;

    double seconds = 0;      ///< from the trace's first trap to its last
    std::uint64_t traps = 0; ///< that were read
    std::array<Slot, slots> faults{};
    std::vector<Region> map;     ///< by address
    std::size_t more_places = 0; ///< that are not in `map`, as others had more
    bool complete = true;        ///< false: only the trace's beginning was read
};

/// Nothing if there is no trap in it that can be read. Reads `most` bytes, and holds 16 for each line.
[[nodiscard]] std::optional<FaultTimeline> read_timeline(std::istream& trace,
                                                         std::size_t most = std::size_t{256} << 20);

/// A run of a case as the page shows it. All of it may be the guest's or a manifest's: the page escapes it.
struct ReportedCase {
    struct Traps {
        std::string reason, action;
        std::uint64_t count = 0;
        double microseconds = 0;
    };
    std::string name;
    std::uint64_t attempt = 1, attempts = 1; ///< as CaseResult's
    std::string verdict;                     ///< "passed", "failed", "skipped", …: the result's
    std::string expected, outcome;           ///< expectation(), name(Outcome); may be empty
    std::string reason;                      ///< umbra's line on the end; may be empty
    std::vector<std::string> problems;       ///< why it is not "passed"
    double seconds = 0;
    std::string manifest; ///< FILE:LINE; may be empty
    std::vector<std::string> tags;
    std::map<std::string, std::string> parameters;
    std::string folder;               ///< from the page's folder; empty: none
    std::vector<std::string> files;   ///< of case_files, that are in it
    std::string console;              ///< its last part, see `console_before`
    std::uint64_t console_before = 0; ///< lines that were before it
    std::uint64_t failing_line = 0;   ///< of the whole console, from 1; 0: none is to blame
    std::string errors;               ///< what umbra said on standard error: its report on the guest
    std::vector<Traps> traps;
    std::vector<std::pair<std::string, std::uint64_t>> instructions; ///< that trapped, most frequent first
    std::optional<FaultTimeline> timeline;
};

/// The page, in HTML 5 and UTF-8. Runs of one case are to be side by side. Once it is some 24 MB, of further
/// cases no more is in it than their problems and where their files are.
[[nodiscard]] std::string report_page(std::string_view title, const std::vector<ReportedCase>& cases);

/// All results below `folder`, by name: of files *.jsonl (JsonLinesSink) and, knowing more, of result.json in
/// the folders of cases. What cannot be read is named in the second. At most 16 MB of a console or a result
/// are read, and less is kept the more cases there are. The page will be in `page_folder`; empty: in
/// `folder`.
[[nodiscard]] std::pair<std::vector<ReportedCase>, std::vector<std::string>>
read_results(const std::string& folder, const std::string& page_folder = {});

/// `umbra report DIR [FILE]`: writes the page to `file`, or, if that is empty, to DIR/report.html. Returns
/// the process's exit code: 0 only if every result could be read and the page be written.
[[nodiscard]] int report_command(const std::string& folder, const std::string& file);

} // namespace umbra
