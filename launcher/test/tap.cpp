#include "launcher/test/tap.hpp"

#include "launcher/test/text.hpp"

#include <fmt/core.h>

namespace umbra {
namespace {

/// A description or a reason: '#' would begin a directive.
std::string escaped(std::string_view text) {
    std::string result;
    for (const char character : printable_line(text)) {
        if (character == '#' || character == '\\')
            result += '\\';
        result += character;
    }
    return result;
}

void put_details(std::string& block, const CaseResult& result) {
    const auto put = [&block]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
        block += fmt::format(format, std::forward<Args>(args)...);
    };
    if (!result.problems.empty())
        put("  message: {}\n", double_quoted(result.problems.front()));
    put("  severity: fail\n");
    if (result.outcome)
        put("  outcome: {}\n", name(*result.outcome));
    if (result.code)
        put("  code: {}\n", *result.code);
    if (!result.reason.empty())
        put("  reason: {}\n", double_quoted(result.reason));
    if (!result.test.manifest.empty())
        put("  at:\n    file: {}\n    line: {}\n", double_quoted(result.test.manifest), result.test.line);
    if (!result.problems.empty())
        put("  problems:\n");
    for (const std::string& problem : result.problems)
        put("    - {}\n", double_quoted(problem));
    if (!result.folder.empty())
        put("  folder: {}\n", double_quoted(result.folder));
    if (!result.console.empty())
        put("  console: {}\n", double_quoted(last_part(result.console, tap_console)));
}

} // namespace

void TapSink::plan(const RunPlan& plan) {
    planned_ = plan.runs;
    file_.write("TAP version 14\n");
    if (planned_ != 0)
        file_.write(fmt::format("1..{}\n", planned_));
}

void TapSink::ended(const CaseResult& result) {
    const bool good = result.verdict == CaseVerdict::passed || result.verdict == CaseVerdict::skipped;
    std::string text = fmt::format("{}ok {} - {}", good ? "" : "not ", ++told_, escaped(result.test.name));
    if (result.verdict == CaseVerdict::skipped) {
        const std::string reason = result.problems.empty() ? std::string() : escaped(result.problems.front());
        file_.write(fmt::format("{} # SKIP {}\n", text, reason));
        return;
    }
    text += "\n  ---\n";
    if (!good)
        put_details(text, result);
    if (result.attempts != 1)
        text += fmt::format("  attempt: {}\n", result.attempt);
    text += fmt::format("  duration_ms: {:.3f}\n  ...\n", static_cast<double>(result.wall.count()) / 1e3);
    file_.write(text);
}

void TapSink::finished(const RunSummary& summary) {
    if (planned_ == 0)
        file_.write(fmt::format("1..{}\n", told_));
    if (summary.interrupted)
        file_.write("Bail out! interrupted\n");
}

} // namespace umbra
