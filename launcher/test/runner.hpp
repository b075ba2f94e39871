// Runs test cases, each in a process of its own, several at a time.
#pragma once

#include "launcher/test/case.hpp"
#include "launcher/test/sink.hpp"

#include <chrono>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace umbra {

struct RunnerConfig {
    unsigned jobs = 0;          ///< at a time; 0: as many as this process may use cores
    std::uint64_t memory = 0;   ///< bytes that guests may have together; 0: what the host has available
    unsigned repeat = 1;        ///< attempts at each case
    bool until_failure = false; ///< in place of `repeat`: rounds of all cases until one has a failure
    bool fail_fast = false;     ///< after a failure nothing is started; what runs comes to its end

    /// Folder for those of the failed runs, made when there is one; empty: none. What an earlier run left
    /// there of the same cases goes.
    std::string output;
    bool keep_passed = false; ///< a folder also for each run that passed
    bool trace = false;       ///< with `output`: kept are the trap trace,
    bool core = false;        ///< and the guest's memory and registers

    std::string program = "/proc/self/exe"; ///< umbra
    /// How long after its time limit an umbra that is still there is killed, and after a signal that asks it
    /// to end.
    std::chrono::milliseconds overrun_grace{15'000}, end_grace{3'000};

    /// Called several times a second while cases run, to draw their progress.
    std::function<void()> tick;
    /// Told once: results cannot be kept for this reason.
    std::function<void(const std::string&)> warn;
};

/// Of host_trait_names, those that this host has; none if KVM cannot be used. About a millisecond.
[[nodiscard]] std::vector<std::string> find_host_traits();

/// Runs `cases`; each of their attempts is told to all of `sinks`, from beginning to end, whatever happens.
/// SIGINT, SIGTERM or SIGHUP, which it takes for its time, end the guests, and what has not come to its end
/// is "not run"; a second one is less patient.
///
/// A guest is ended with the calling thread, even if that is killed.
RunSummary run_cases(const std::vector<TestCase>& cases, const RunnerConfig& config,
                     std::span<ResultSink* const> sinks);

} // namespace umbra
