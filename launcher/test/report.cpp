// `umbra report`: from the files of a run to the page.
#include "launcher/test/html.hpp"
#include "launcher/test/output_file.hpp"
#include "launcher/test/result.hpp"
#include "launcher/test/text.hpp"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr std::size_t maximum_result = std::size_t{16} << 20; ///< bytes of a file that is read as a whole
constexpr std::size_t maximum_depth = 64;                     ///< of what is in such a file
/// Bytes that are kept of a console, or a trace is read: of all of them together, and at least of each.
struct Budget {
    std::uint64_t all, least, most;
    [[nodiscard]] std::size_t of_each(std::size_t count) const {
        return static_cast<std::size_t>(std::clamp(all / std::max<std::uint64_t>(count, 1), least, most));
    }
};
constexpr Budget console_budget{std::uint64_t{16} << 20, std::uint64_t{4} << 10, std::uint64_t{256} << 10};
constexpr Budget trace_budget{std::uint64_t{2} << 30, std::uint64_t{1} << 20, std::uint64_t{256} << 20};
constexpr std::size_t shown_errors = std::size_t{64} << 10;

struct Bytes {
    std::string text;
    std::uint64_t before = 0; ///< bytes of the file that are not in it
};

/// The last `most` bytes of a file; nothing if it cannot be read.
std::optional<Bytes> read_end(const fs::path& path, std::size_t most) {
    std::error_code error;
    if (!fs::is_regular_file(path, error)) // a pipe would be waited for
        return std::nullopt;
    const std::uintmax_t size = fs::file_size(path, error);
    std::ifstream file(path, std::ios::binary);
    if (error || !file)
        return std::nullopt;
    Bytes bytes;
    bytes.before = size > most ? size - most : 0;
    bytes.text.resize(static_cast<std::size_t>(size - bytes.before));
    file.seekg(static_cast<std::streamoff>(bytes.before));
    file.read(bytes.text.data(), static_cast<std::streamsize>(bytes.text.size()));
    bytes.text.resize(static_cast<std::size_t>(file.gcount()));
    return bytes;
}

/// Nothing if it is no object, or so deep that taking it to pieces would take the stack.
std::optional<Json> parse_object(std::string_view text) {
    bool deep = false;
    Json json = Json::parse(
        text.begin(), text.end(),
        [&deep](int depth, Json::parse_event_t, Json&) {
            deep = deep || depth > static_cast<int>(maximum_depth);
            return !deep;
        },
        false);
    return deep || !json.is_object() ? std::nullopt : std::optional(std::move(json));
}

std::string text_of(const Json& json, const char* key) {
    const auto found = json.find(key);
    return found != json.end() && found->is_string() ? found->get<std::string>() : std::string();
}

double number_of(const Json& json, const char* key) {
    const auto found = json.find(key);
    return found != json.end() && found->is_number() ? std::max(found->get<double>(), 0.0) : 0;
}

std::uint64_t count_of(const Json& json, const char* key) {
    const auto found = json.find(key);
    return found != json.end() && found->is_number_unsigned() ? found->get<std::uint64_t>() : 0;
}

/// `--stats=json`'s, most frequent first.
std::vector<ReportedCase::Traps> traps_of(const Json& result) {
    std::vector<ReportedCase::Traps> traps;
    const Json::json_pointer path("/stats/traps/by_reason");
    if (!result.contains(path) || !result.at(path).is_array())
        return traps;
    for (const Json& entry : result.at(path))
        if (entry.is_object())
            traps.push_back({text_of(entry, "reason"), text_of(entry, "action"), count_of(entry, "count"),
                             number_of(entry, "microseconds")});
    std::ranges::stable_sort(traps, std::ranges::greater(), &ReportedCase::Traps::count);
    return traps;
}

/// Likewise.
std::vector<std::pair<std::string, std::uint64_t>> instructions_of(const Json& result) {
    std::vector<std::pair<std::string, std::uint64_t>> instructions;
    const Json::json_pointer path("/stats/instructions");
    if (!result.contains(path) || !result.at(path).is_object())
        return instructions;
    for (const auto& [name, count] : result.at(path).items())
        if (count.is_number_unsigned())
            instructions.emplace_back(name, count.get<std::uint64_t>());
    std::ranges::stable_sort(instructions, std::ranges::greater(),
                             &std::pair<std::string, std::uint64_t>::second);
    return instructions;
}

std::vector<std::string> texts_of(const Json& json, const char* key) {
    std::vector<std::string> texts;
    if (const auto found = json.find(key); found != json.end() && found->is_array())
        for (const Json& text : *found)
            if (text.is_string())
                texts.push_back(text.get<std::string>());
    return texts;
}

/// Where the line `number`, from 1, begins; nothing if there are not so many.
std::optional<std::size_t> start_of_line(std::string_view text, std::uint64_t number) {
    std::size_t at = 0;
    for (std::uint64_t line = 1; line < number; ++line) {
        at = text.find('\n', at);
        if (at == std::string_view::npos)
            return std::nullopt;
        ++at;
    }
    return at;
}

/// Keeps the console's part around the failing line, or else its end. `printed`: bytes that the guest
/// printed, of which the file may hold only the beginning and the end.
void take_console(ReportedCase& reported, const Bytes& console, std::uint64_t printed,
                  std::size_t shown_console) {
    const std::string_view text = console.text;
    const std::size_t whole = text.size() == printed ? text.size() : std::min(text.size(), kept_console / 2);
    std::optional<std::size_t> failing;
    if (reported.failing_line != 0 && console.before == 0)
        failing = start_of_line(text.substr(0, whole), reported.failing_line);
    if (!failing)
        reported.failing_line = 0; // behind what is left out: which line it is cannot be told
    std::size_t start = text.size() > shown_console ? text.size() - shown_console : 0;
    if (failing)
        start = std::min(start, *failing > shown_console / 2 ? *failing - shown_console / 2 : 0);
    if (start != 0) { // from the beginning of a line, if there is one
        const std::size_t end = text.find('\n', start);
        start = end == std::string_view::npos ? start : end + 1;
    }
    reported.console_before = static_cast<std::uint64_t>(std::ranges::count(text.substr(0, start), '\n'));
    reported.console = text.substr(start, shown_console);
}

/// What all cases' folders have in common.
struct Folders {
    fs::path page;
    std::size_t count = 0;
};

fs::path plain(const fs::path& path) {
    std::error_code error;
    const fs::path found = fs::weakly_canonical(path, error);
    return error ? path : found;
}

void read_folder(ReportedCase& reported, const fs::path& folder, const Folders& folders,
                 std::uint64_t printed) {
    reported.folder = plain(folder).lexically_relative(plain(folders.page)).native();
    std::error_code error;
    for (const char* const name : {case_files::console, case_files::errors, case_files::trace,
                                   case_files::core, case_files::rerun, case_files::debug})
        if (fs::is_regular_file(folder / name, error))
            reported.files.emplace_back(name);
    if (const auto console = read_end(folder / case_files::console, maximum_result))
        take_console(reported, *console, printed, console_budget.of_each(folders.count));
    if (auto errors = read_end(folder / case_files::errors, shown_errors))
        reported.errors = std::move(errors->text);
    if (fs::is_regular_file(folder / case_files::trace, error)) {
        std::ifstream trace(folder / case_files::trace);
        reported.timeline = read_timeline(trace, trace_budget.of_each(folders.count));
    }
}

ReportedCase reported_case(const Json& result) {
    ReportedCase reported;
    reported.name = text_of(result, "name");
    reported.attempt = count_of(result, "attempt");
    reported.attempts = count_of(result, "attempts");
    reported.verdict = text_of(result, "verdict");
    reported.expected = text_of(result, "expected");
    reported.outcome = text_of(result, "outcome");
    reported.reason = text_of(result, "reason");
    reported.problems = texts_of(result, "problems");
    reported.seconds = number_of(result, "wall_seconds");
    reported.manifest = text_of(result, "manifest");
    if (const std::uint64_t line = count_of(result, "line"); !reported.manifest.empty() && line != 0)
        reported.manifest += fmt::format(":{}", line);
    reported.tags = texts_of(result, "tags");
    if (const auto parameters = result.find("parameters");
        parameters != result.end() && parameters->is_object())
        for (const auto& [key, value] : parameters->items())
            if (value.is_string())
                reported.parameters.emplace(key, value.get<std::string>());
    reported.traps = traps_of(result);
    reported.instructions = instructions_of(result);
    return reported;
}

using Cases = std::map<std::pair<std::string, std::uint64_t>, ReportedCase>;

void add(Cases& cases, ReportedCase reported) {
    std::pair key(reported.name, reported.attempt);
    cases.insert_or_assign(std::move(key), std::move(reported));
}

/// The events of JSON lines that end a case. What a killed runner left may end in the middle of a line.
void read_events(const fs::path& path, Cases& cases, std::vector<std::string>& problems) {
    std::ifstream file(path, std::ios::binary);
    std::size_t number = 0;
    for (std::string line; std::getline(file, line);) {
        ++number;
        const auto event = line.size() <= maximum_result ? parse_object(line) : std::nullopt;
        if (!event) {
            problems.push_back(fmt::format("{}:{}: not an event of umbra test", path.native(), number));
        } else if (text_of(*event, "event") == "end") {
            ReportedCase reported = reported_case(*event);
            reported.console = text_of(*event, "console"); // its end, of which no line can be told
            add(cases, std::move(reported));
        }
    }
}

} // namespace

std::pair<std::vector<ReportedCase>, std::vector<std::string>> read_results(const std::string& folder,
                                                                            const std::string& page_folder) {
    Cases cases;
    std::vector<std::string> problems;
    std::error_code error;
    std::vector<fs::path> results, events;
    fs::recursive_directory_iterator walk(folder, error);
    if (error)
        problems.push_back(fmt::format("cannot read '{}': {}", folder, error.message()));
    for (; !error && walk != fs::recursive_directory_iterator(); walk.increment(error)) {
        if (walk->path().filename() == case_files::result)
            results.push_back(walk->path());
        else if (walk->path().extension() == ".jsonl")
            events.push_back(walk->path());
    }
    if (error && problems.empty())
        problems.push_back(fmt::format("cannot read all of '{}': {}", folder, error.message()));
    std::ranges::sort(events);
    std::ranges::sort(results);
    const Folders folders{page_folder.empty() ? folder : page_folder, results.size()};
    for (const fs::path& path : events)
        read_events(path, cases, problems);
    for (const fs::path& path : results) { // these know more
        const auto bytes = read_end(path, maximum_result);
        const auto result = bytes ? parse_object(bytes->text) : std::nullopt;
        if (!result || text_of(*result, "name").empty()) {
            problems.push_back(fmt::format("{}: not a result of umbra test", path.native()));
            continue;
        }
        ReportedCase reported = reported_case(*result);
        reported.failing_line = count_of(*result, "culprit");
        read_folder(reported, path.parent_path(), folders, count_of(*result, "console_bytes"));
        add(cases, std::move(reported));
    }
    std::vector<ReportedCase> list;
    list.reserve(cases.size());
    for (auto& [key, reported] : cases)
        list.push_back(std::move(reported));
    return {std::move(list), std::move(problems)};
}

int report_command(const std::string& folder, const std::string& file) {
    const fs::path page = file.empty() ? fs::path(folder) / "report.html" : fs::path(file);
    auto [cases, problems] = read_results(folder, page.has_parent_path() ? page.parent_path() : ".");
    if (cases.empty() && problems.empty())
        problems.push_back(fmt::format("no results of umbra test in '{}'", folder));
    if (!cases.empty()) {
        if (const auto problem = replace_file(page, report_page("umbra test: " + folder, cases)))
            problems.push_back(*problem);
        else
            (void)std::fprintf(stdout, "%s\n", page.c_str());
    }
    for (const std::string& problem : problems)
        (void)std::fprintf(stderr, "umbra: %s\n", printable_line(problem).c_str());
    return problems.empty() ? 0 : 2;
}

} // namespace umbra
