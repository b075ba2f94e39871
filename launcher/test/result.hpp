// What became of a test case: what the runner hands to the outputs.
#pragma once

#include "launcher/test/case.hpp"

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// The runner's judgement.
enum class CaseVerdict : std::uint8_t {
    passed, ///< it ended as expected, and everything else that the case asks for was met
    failed,
    skipped, ///< this host cannot run it
    not_run, ///< its turn did not come, or the runner was interrupted while it ran
};

/// In the enumerators' order.
inline constexpr std::array<std::string_view, 4> case_verdict_names{"passed", "failed", "skipped", "not-run"};
[[nodiscard]] constexpr std::string_view name(CaseVerdict verdict) {
    return case_verdict_names.at(static_cast<std::size_t>(verdict));
}

/// Bytes that are kept of a console in the runner's memory: the beginning and the end, a half of it each.
/// Patterns are looked for in all of it, as it comes.
inline constexpr std::size_t kept_console = std::size_t{1} << 20;

/// One run of a case. Text in it may be the guest's: any bytes, of any meaning to whoever shows it.
struct CaseResult {
    TestCase test;
    unsigned attempt = 1;  ///< from 1; of `attempts`
    unsigned attempts = 1; ///< 0: until one fails

    CaseVerdict verdict = CaseVerdict::not_run;
    /// Why it is not `passed`: each unmet expectation, the reason of a skip, or of its not being run. One
    /// line each. Empty if and only if it is `passed`.
    std::vector<std::string> problems;

    /// How the guest's run ended; nothing if it was not started, or not left to end.
    std::optional<Outcome> outcome;
    std::optional<std::uint32_t>
        code;           ///< with `failed` and `passed`, if the guest gave one at port 0xf4 or 0x501
    std::string reason; ///< umbra's line on it: "triple fault: ..."; may be empty

    std::chrono::milliseconds start{0}; ///< since the runner began
    std::chrono::microseconds wall{0};  ///< of the child process, from its start to its end
    /// Of what the guest printed: all, or its beginning, a line that says how many bytes are left out, and
    /// its end.
    std::string console;
    std::uint64_t console_bytes = 0; ///< that the guest printed
    /// The line of all of it, from 1, with a forbidden pattern, or that looks like a required one.
    std::optional<std::uint64_t> culprit;
    std::string stats;  ///< `--stats=json`'s object; empty if there is none
    std::string folder; ///< where its files are; empty: none was kept
};

/// What is in the folder for results, beside the folders of cases: JsonLinesSink's events.
inline constexpr const char* results_file = "results.jsonl";

/// What is in a case's folder.
namespace case_files {
inline constexpr const char *console = "console.log", *errors = "stderr.log", *result = "result.json",
                            *rerun = "rerun.sh", *debug = "debug.sh";
inline constexpr const char *trace = "trace.log", *core = "core"; ///< only if asked for
} // namespace case_files

/// One JSON object, with the keys name, manifest, line, tags, parameters, attempt, attempts, verdict,
/// problems, expected, outcome, code, reason, start_seconds, wall_seconds, console_bytes, culprit, folder,
/// stats: what a failed case's result.json has, and JSON lines may. What is unknown is null. Text is UTF-8,
/// made so where it is not. The console is not in it.
[[nodiscard]] std::string result_json(const CaseResult& result);

} // namespace umbra
