#include "launcher/test/judge.hpp"

#include "launcher/test/text.hpp"
#include "vmm/error.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

using Json = nlohmann::ordered_json;

/// A text's last line that says anything, without umbra's name before it.
std::string last_line(std::string_view text) {
    while (!text.empty() && (text.back() == '\n' || text.back() == '\r'))
        text.remove_suffix(1);
    const std::size_t end = text.rfind('\n');
    std::string_view line = end == std::string_view::npos ? text : text.substr(end + 1);
    constexpr std::string_view prefix = "umbra: ";
    if (line.starts_with(prefix))
        line.remove_prefix(prefix.size());
    return std::string(line);
}

/// What of `umbra run`'s words for verdicts are outcomes. One that KVM or umbra could not bring to its end
/// had begun: that is no host which cannot run it.
std::optional<Outcome> outcome_named(std::string_view word) {
    if (word == "host-failed")
        return Outcome::crashed;
    const auto* const found = std::ranges::find(outcome_names, word);
    if (found == outcome_names.end())
        return std::nullopt; // interrupted
    return static_cast<Outcome>(found - outcome_names.begin());
}

/// What `umbra run` says of itself. True if it has come to an end of its own.
bool read_result(const Json& json, CaseResult& result) {
    const auto verdict = json.is_object() ? json.find("verdict") : json.end();
    if (verdict == json.end() || !verdict->is_string())
        return false;
    result.outcome = outcome_named(verdict->get<std::string>());
    if (const auto code = json.find("code"); code != json.end() && code->is_number_unsigned())
        result.code = code->get<std::uint32_t>();
    if (const auto reason = json.find("reason"); reason != json.end() && reason->is_string())
        result.reason = reason->get<std::string>();
    if (const auto stats = json.find("stats"); stats != json.end() && stats->is_object())
        result.stats = stats->dump();
    return result.outcome.has_value();
}

/// A run without a result, by the exit code.
void read_exit(const RunFacts& facts, CaseResult& result) {
    result.reason = last_line(facts.errors);
    if (facts.signal != 0) {
        result.outcome = Outcome::crashed;
        result.reason =
            fmt::format("umbra was ended by signal {} ({})", facts.signal, strsignal(facts.signal));
    } else if (facts.exit_code == static_cast<int>(ExitCode::interrupted)) {
        result.outcome = Outcome::crashed;
        result.reason = "umbra was interrupted by somebody else";
    } else if (facts.exit_code == static_cast<int>(ExitCode::bad_usage)) {
        result.outcome = Outcome::bad_usage;
    } else if (facts.exit_code == static_cast<int>(ExitCode::host_cannot)) {
        result.outcome = Outcome::host_cannot;
    } else {
        result.outcome = Outcome::crashed;
        result.reason = fmt::format("umbra ended with exit code {} and no result{}{}", facts.exit_code,
                                    result.reason.empty() ? "" : ": ", result.reason);
    }
}

std::string expectation(const TestCase& test) {
    std::string text(name(test.expected));
    if (test.code)
        text += fmt::format(" with code {}", *test.code);
    return text;
}

/// "timed-out: REASON", or the reason alone where it says that itself.
std::string ending(const CaseResult& result) {
    std::string words(name(*result.outcome));
    std::ranges::replace(words, '-', ' ');
    if (result.reason.starts_with(words))
        return result.reason;
    return result.reason.empty() ? words : fmt::format("{}: {}", words, result.reason);
}

/// `all_shown`: the console has all that the case wants of it, and that is something.
void judge_outcome(CaseResult& result, bool all_shown) {
    const TestCase& test = result.test;
    if (result.outcome == test.expected && (!test.code || result.code == test.code))
        return;
    std::string problem = fmt::format("expected {}, but it ended: {}", expectation(test), ending(result));
    if (result.outcome == Outcome::timed_out || result.outcome == Outcome::no_progress) {
        if (result.console_bytes == 0)
            problem += "; the guest printed nothing";
        else if (all_shown)
            problem += "; it had printed all that is required, and did not end";
    }
    result.problems.push_back(std::move(problem));
}

/// What is to be told of a line that looks as if it were what was wanted; empty if there is none.
std::string near_miss(const std::optional<ConsoleWatch::Hit>& hit, CaseResult& result) {
    if (!hit)
        return {};
    if (!result.culprit)
        result.culprit = hit->line;
    return fmt::format("; line {} would match but for what cannot be seen in it: {}", hit->line,
                       with_escapes(hit->text));
}

void judge_console(const RunFacts& facts, CaseResult& result) {
    const TestCase& test = result.test;
    if (facts.required_found < test.required.size()) {
        const std::string place = facts.required_found == 0
                                      ? std::string()
                                      : fmt::format(" after '{}'", test.required[facts.required_found - 1]);
        result.problems.push_back(
            fmt::format("the console does not show '{}'{} ({} of {} required patterns found){}",
                        test.required[facts.required_found], place, facts.required_found,
                        test.required.size(), near_miss(facts.required_near_miss, result)));
    }
    if (facts.exchanges_met < test.conversation.size())
        result.problems.push_back(fmt::format("the conversation waits for '{}' in step {} of {}{}",
                                              test.conversation[facts.exchanges_met].expect,
                                              facts.exchanges_met + 1, test.conversation.size(),
                                              near_miss(facts.exchange_near_miss, result)));
    else if (!facts.all_sent)
        result.problems.emplace_back("the guest did not take all that the conversation sends");
}

void judge_bounds(CaseResult& result) {
    const TestCase& test = result.test;
    if (test.bounds.empty())
        return;
    const Json stats = Json::parse(result.stats, nullptr, false);
    for (const CounterBound& bound : test.bounds) {
        const Json* value = &stats;
        for (std::string_view path = bound.counter; value != nullptr && !path.empty();) {
            const std::string key(path.substr(0, path.find('.')));
            path.remove_prefix(std::min(path.size(), key.size() + 1));
            const auto found = value->is_object() ? value->find(key) : value->end();
            value = value->is_object() && found != value->end() ? &*found : nullptr;
        }
        static const Json none = 0;
        if (value == nullptr && stats.is_object() && bound.counter.starts_with("instructions."))
            value = &none; // only those are named that were emulated
        if (value == nullptr || !value->is_number()) {
            result.problems.push_back(
                fmt::format("{} is bounded, but this run has no such number", bound.counter));
            continue;
        }
        const auto number = value->get<double>(); // exact up to 2^53
        if (bound.least && number < static_cast<double>(*bound.least))
            result.problems.push_back(
                fmt::format("{} is {}, less than {}", bound.counter, value->dump(), *bound.least));
        if (bound.most && number > static_cast<double>(*bound.most))
            result.problems.push_back(
                fmt::format("{} is {}, more than {}", bound.counter, value->dump(), *bound.most));
    }
}

std::string one_line(std::string text) {
    std::ranges::replace_if(
        text, [](char c) { return c == '\n' || c == '\r'; }, ' ');
    return text;
}

} // namespace

void judge(const RunFacts& facts, bool host_fits, CaseResult& result) {
    using EndedFor = RunFacts::EndedFor;
    const TestCase& test = result.test;
    result.problems.clear();
    result.outcome.reset();
    const bool own_end = read_result(Json::parse(facts.result, nullptr, false), result);
    if (!own_end)
        read_exit(facts, result);
    result.verdict = CaseVerdict::failed;

    if (own_end || facts.ended_for == EndedFor::nothing) {
        if (result.outcome == Outcome::host_cannot && test.expected != Outcome::host_cannot && !host_fits) {
            result.verdict = CaseVerdict::skipped;
            result.problems.push_back(
                one_line(result.reason.empty() ? "this host cannot run it" : result.reason));
            return;
        }
    } else if (facts.ended_for == EndedFor::interrupt) {
        result.outcome.reset();
        result.reason.clear();
        result.verdict = CaseVerdict::not_run;
        result.problems.emplace_back("interrupted while it ran");
        return;
    } else if (facts.ended_for == EndedFor::overrun) {
        result.outcome = Outcome::crashed;
        result.reason = "umbra did not end at its time limit, and was killed";
    } else { // for what the console shows: it was not left to end
        result.outcome.reset();
        result.reason.clear();
    }
    if (facts.forbidden) {
        result.culprit = facts.forbidden->line;
        result.problems.push_back(fmt::format("line {} of the console shows '{}', which is forbidden: {}",
                                              facts.forbidden->line, facts.forbidden->pattern,
                                              facts.forbidden->text));
    }
    if (result.outcome) {
        judge_outcome(result, test.required.size() + test.conversation.size() != 0 &&
                                  facts.required_found == test.required.size() &&
                                  facts.exchanges_met == test.conversation.size());
        judge_console(facts, result);
        judge_bounds(result);
    }
    if (result.problems.empty())
        result.verdict = CaseVerdict::passed;
    std::ranges::transform(result.problems, result.problems.begin(), one_line);
}

std::string result_json(const CaseResult& result) {
    const TestCase& test = result.test;
    const auto seconds = [](auto duration) { return std::chrono::duration<double>(duration).count(); };
    const auto or_null = [](bool known, auto value) { return known ? Json(std::move(value)) : Json(); };
    Json stats = Json::parse(result.stats, nullptr, false);
    if (stats.is_discarded())
        stats = nullptr;
    const Json json{
        {"name", test.name},
        {"manifest", or_null(!test.manifest.empty(), test.manifest)},
        {"line", or_null(test.line != 0, test.line)},
        {"tags", test.tags},
        {"parameters", test.parameters},
        {"attempt", result.attempt},
        {"attempts", result.attempts},
        {"verdict", name(result.verdict)},
        {"problems", result.problems},
        {"expected", expectation(test)},
        {"outcome", result.outcome ? Json(name(*result.outcome)) : Json()},
        {"code", result.code ? Json(*result.code) : Json()},
        {"reason", or_null(!result.reason.empty(), result.reason)},
        {"start_seconds", seconds(result.start)},
        {"wall_seconds", seconds(result.wall)},
        {"console_bytes", result.console_bytes},
        {"culprit", result.culprit ? Json(*result.culprit) : Json()},
        {"folder", or_null(!result.folder.empty(), result.folder)},
        {"stats", std::move(stats)},
    };
    return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// --- By hand

namespace {

/// The options that `umbra run` and `umbra debug` have in common.
std::vector<std::string> machine_arguments(const TestCase& test) {
    std::vector<std::string> arguments{test.kernel};
    const auto option = [&arguments](const char* option_name, const std::string& value) {
        if (!value.empty()) // in one word, whatever the value begins with
            arguments.push_back(fmt::format("{}={}", option_name, value));
    };
    option("--protocol", test.protocol);
    option("--memory", test.memory);
    option("--append", test.append);
    option("--initrd", test.initrd);
    for (const std::string& module : test.modules)
        option("--module", module);
    option("--cpu", test.cpu);
    option("--tlb", test.tlb);
    if (test.sanitize_tlb)
        arguments.emplace_back("--sanitize=tlb");
    arguments.insert(arguments.end(), test.options.begin(), test.options.end());
    return arguments;
}

std::string command(const std::vector<std::string>& words) {
    std::string line;
    for (const std::string& word : words)
        line += (line.empty() ? "" : " ") + shell_quoted(word);
    return line;
}

std::string script(const TestCase& test, const std::string& what, const std::string& folder,
                   const std::string& line) {
    return fmt::format("#!/bin/sh\n# {}: {}\ncd {} || exit\nexec {} \"$@\"\n", one_line(test.name), what,
                       shell_quoted(folder), line);
}

} // namespace

std::vector<std::string> guest_arguments(const TestCase& test) {
    std::vector<std::string> arguments = machine_arguments(test);
    arguments.emplace_back("--end-stuck");
    if (!test.engine.empty())
        arguments.push_back("--engine=" + test.engine);
    if (test.keyboard)
        arguments.emplace_back("--keyboard");
    arguments.push_back(fmt::format("--timeout={:.3f}", std::chrono::duration<double>(test.timeout).count()));
    return arguments;
}

std::string shell_quoted(std::string_view text) {
    constexpr std::string_view plain =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./=,:+@%";
    if (!text.empty() && text.find_first_not_of(plain) == std::string_view::npos)
        return std::string(text);
    std::string quoted = "'";
    for (const char c : text) {
        if (c == '\'')
            quoted += R"('\'')";
        else
            quoted += c;
    }
    return quoted + "'";
}

std::string rerun_script(const TestCase& test, const std::string& umbra, const std::string& folder) {
    std::vector<std::string> words{umbra, "run"};
    std::ranges::move(guest_arguments(test), std::back_inserter(words));
    const std::string what = "run again; expected is: " + expectation(test);
    const bool just_passes = test.expected == Outcome::passed && test.required.empty() &&
                             test.forbidden.empty() && test.conversation.empty() && test.bounds.empty();
    if (just_passes)
        return script(test, what, folder, command(words));
    std::string filter = test.name; // a pattern that it matches
    if (filter.starts_with('-'))
        filter.front() = '?'; // it would exclude
    return script(test, what + "\n# The guest alone, on this terminal: " + one_line(command(words)), folder,
                  command({umbra, "test", "--output=none", "--filter=" + filter, test.manifest}));
}

std::string debug_script(const TestCase& test, const std::string& umbra, const std::string& folder,
                         bool core) {
    std::vector<std::string> words{umbra, "debug"};
    std::ranges::move(machine_arguments(test), std::back_inserter(words));
    std::string what = "in gdb, stopped before its first instruction, without a time limit";
    if (test.engine == "native")
        what += "; by the shadow engine, as the native one has no debugger";
    if (core)
        what += fmt::format("\n# What the failed run left: gdb {} core", shell_quoted(one_line(test.kernel)));
    return script(test, what, folder, command(words));
}

} // namespace umbra
