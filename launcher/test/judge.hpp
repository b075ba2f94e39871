// What a finished run means: the facts of a child process against what its case expects. And how a case is
// run by hand. No processes here.
#pragma once

#include "launcher/test/console_watch.hpp"
#include "launcher/test/result.hpp"

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

// --- The verdict

/// What the runner has seen of one run of `umbra run`.
struct RunFacts {
    int exit_code = -1; ///< -1: it was ended by `signal`
    int signal = 0;
    std::string result; ///< what `--result` wrote
    std::string errors; ///< standard error, or its last part

    /// Why the runner ended it, if it did.
    enum class EndedFor : std::uint8_t {
        nothing,
        forbidden_pattern,
        overrun, ///< umbra was still there long after the time limit that it had been given
        interrupt,
    };
    EndedFor ended_for = EndedFor::nothing;

    std::size_t required_found = 0, exchanges_met = 0; ///< as ConsoleWatch's
    bool all_sent = true; ///< what the conversation had to send, the guest's run took
    std::optional<ConsoleWatch::Hit> forbidden, required_near_miss, exchange_near_miss; ///< as ConsoleWatch's
};

/// Fills in verdict, problems, outcome, code, reason, culprit and stats of `result`, whose `test` is set.
/// Passed is only a run that ended as expected, by itself, with all patterns in their order, none forbidden,
/// the conversation at its end and all bounds held. `host_fits`: the host has all that `test.hosts` names,
/// and there is something; then that it cannot run the case is no skip.
void judge(const RunFacts& facts, bool host_fits, CaseResult& result);

// --- By hand

/// Arguments of `umbra run` that make the case's guest, from the kernel on.
[[nodiscard]] std::vector<std::string> guest_arguments(const TestCase& test);

/// `text` as one word of a POSIX shell.
[[nodiscard]] std::string shell_quoted(std::string_view text);

/// A shell script that runs the case again, and whose exit code is 0 only if the case passes: by `umbra run`
/// where that alone tells, otherwise by `umbra test`. `umbra` and `folder` are absolute paths: of the
/// program, and of the folder where the tests were run.
[[nodiscard]] std::string rerun_script(const TestCase& test, const std::string& umbra,
                                       const std::string& folder);
/// The same in gdb, by `umbra debug`. `core`: there is a core beside the script.
[[nodiscard]] std::string debug_script(const TestCase& test, const std::string& umbra,
                                       const std::string& folder, bool core);

} // namespace umbra
