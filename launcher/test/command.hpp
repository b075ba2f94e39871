// `umbra test`: from the command line to the exit code.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace umbra {

enum class ListFormat : std::uint8_t { none, names, json };

/// As the user gave them.
struct TestOptions {
    std::vector<std::string> paths; ///< manifests, folders of them and kernels; empty: the current folder
    bool init = false;              ///< write an example manifest, and run nothing

    // Which cases
    std::vector<std::string> filters, tags; ///< as filter_by_name() and filter_by_tag() take them
    std::string shard;                      ///< "I/N"; empty: all
    std::string shuffle;                    ///< a seed, or "random"; empty: in the manifests' order
    ListFormat list = ListFormat::none;     ///< tell which they are, and run nothing

    // How they run
    unsigned jobs = 0;  ///< RunnerConfig::jobs
    std::string memory; ///< of all guests that run at a time; empty: what the host has available
    unsigned repeat = 1;
    bool until_failure = false, fail_fast = false;
    bool allow_skips = false; ///< a case that this host cannot run does not change the exit code

    // What is told
    std::string output = "umbra-results"; ///< RunnerConfig::output; "none": nowhere
    bool keep_passed = false, trace = true, core = true;
    std::string junit, tap, json; ///< files, "-" for standard output; empty: none
    bool github = false;
};

/// Whether test_command() would run any, and not only tell something.
[[nodiscard]] inline bool runs_guests(const TestOptions& options) {
    return !options.init && options.list == ListFormat::none;
}

/// Returns the process's exit code:
///   0    every case ran and passed
///   1    a case failed, or did not run because another had, or the results could not be written
///   2    bad usage, a mistake in a manifest, or no case is left to run: nothing was run
///   4    nothing failed, but this host could not run some cases (unless allow_skips)
///   130  interrupted
/// StartupError if a file for the results cannot be opened.
[[nodiscard]] int test_command(const TestOptions& options);

} // namespace umbra
