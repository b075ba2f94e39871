#include "launcher/test/junit.hpp"

#include "launcher/test/output_file.hpp"
#include "launcher/test/text.hpp"

#include <algorithm>

#include <fmt/core.h>

namespace umbra {
namespace {

/// Where the case's own name begins in "FOLDER/CASE[KEY=VALUE]": a value may have a '/'.
std::size_t after_folder(std::string_view name) {
    const std::size_t slash = name.substr(0, name.find('[')).rfind('/');
    return slash == std::string_view::npos ? 0 : slash + 1;
}

std::string suite_name(std::string_view name) {
    const std::size_t start = after_folder(name);
    return start <= 1 ? "umbra" : std::string(name.substr(0, start - 1));
}

/// CI servers take a classname's dots for a hierarchy.
std::string class_name(std::string suite) {
    std::ranges::replace(suite, '.', '_');
    std::ranges::replace(suite, '/', '.');
    return suite;
}

/// As attributes have it, which a parser would make spaces of line breaks in.
std::string attribute(std::string_view text) {
    return markup(printable_line(text));
}

std::string first_problem(const CaseResult& result) {
    return attribute(result.problems.empty() ? name(result.verdict)
                                             : std::string_view(result.problems.front()));
}

/// `failure` or `error`: all problems, and where the files are.
std::string problem_element(std::string_view element, const CaseResult& result) {
    std::string text = fmt::format(R"(<{} message="{}" type="{}">)", element, first_problem(result),
                                   result.outcome ? name(*result.outcome) : name(result.verdict));
    for (const std::string& problem : result.problems)
        text += markup(printable_line(problem)) + "\n";
    const bool told = std::ranges::any_of(result.problems, [&result](const std::string& problem) {
        return problem.find(result.reason) != std::string::npos;
    });
    if (!result.reason.empty() && !told)
        text += "the run ended: " + markup(printable_line(result.reason)) + "\n";
    if (!result.folder.empty())
        text += "files: " + markup(printable_line(result.folder)) + "\n";
    return fmt::format("{}</{}>", text, element);
}

} // namespace

JUnitSink::JUnitSink(std::string path) : path_(std::move(path)) {
    if (path_ != "-")
        require_replaceable(path_);
}

void JUnitSink::ended(const CaseResult& result) {
    if (result.verdict == CaseVerdict::not_run)
        not_run_.push_back(result);
    else
        add(result, false);
}

void JUnitSink::add(const CaseResult& result, bool not_run_is_error) {
    const std::string folder = suite_name(result.test.name);
    Suite& suite = suites_[folder];
    const double seconds = std::chrono::duration<double>(result.wall).count();
    ++suite.tests;
    suite.seconds += seconds;
    std::string name = result.test.name.substr(after_folder(result.test.name));
    if (result.attempts != 1)
        name += fmt::format(" (run {})", result.attempt);
    std::string& xml = suite.cases;
    xml += fmt::format("    <testcase classname=\"{}\" name=\"{}\" time=\"{:.3f}\">\n",
                       attribute(class_name(folder)), attribute(name), seconds);
    const bool umbras = result.outcome == Outcome::crashed || result.outcome == Outcome::bad_usage;
    if (result.verdict == CaseVerdict::skipped ||
        (result.verdict == CaseVerdict::not_run && !not_run_is_error)) {
        ++suite.skipped;
        xml += fmt::format("      <skipped message=\"{}\"/>\n", first_problem(result));
    } else if (result.verdict == CaseVerdict::not_run || (result.verdict == CaseVerdict::failed && umbras)) {
        ++suite.errors;
        xml += "      " + problem_element("error", result) + "\n";
    } else if (result.verdict == CaseVerdict::failed) {
        ++suite.failures;
        xml += "      " + problem_element("failure", result) + "\n";
    }
    const bool passed = result.verdict == CaseVerdict::passed;
    if (!result.console.empty())
        xml += "      <system-out>" +
               markup(last_part(result.console, passed ? junit_passed_console : junit_console)) +
               "</system-out>\n";
    xml += "    </testcase>\n";
}

void JUnitSink::finished(const RunSummary& summary) {
    for (const CaseResult& result : not_run_)
        add(result, summary.interrupted);
    Suite sum;
    std::string text;
    const std::string begun = utc_text(begun_);
    for (const auto& [name, suite] : suites_) {
        sum.tests += suite.tests;
        sum.failures += suite.failures;
        sum.errors += suite.errors;
        text +=
            fmt::format("  <testsuite name=\"{}\" tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\" "
                        "time=\"{:.3f}\" timestamp=\"{}\">\n{}  </testsuite>\n",
                        attribute(name), suite.tests, suite.failures, suite.errors, suite.skipped,
                        suite.seconds, begun, suite.cases);
    }
    const std::string xml = fmt::format(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"umbra test\" tests=\"{}\" "
        "failures=\"{}\" errors=\"{}\" time=\"{:.3f}\">\n{}</testsuites>\n",
        sum.tests, sum.failures, sum.errors, std::chrono::duration<double>(summary.duration).count(), text);
    if (path_ != "-") {
        problem_ = replace_file(path_, xml);
        return;
    }
    OutputFile output(path_);
    output.write(xml);
    problem_ = output.problem();
}

} // namespace umbra
