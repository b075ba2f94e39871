// How the outputs of `umbra test` are told what happens: all of them the same, in the order in which it
// happens.
#pragma once

#include "launcher/test/result.hpp"

#include <chrono>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace umbra {

struct RunPlan {
    std::size_t runs = 0; ///< cases times attempts; 0: not known, as with --until-failure
    std::chrono::system_clock::time_point begun;
};

struct RunSummary {
    std::size_t passed = 0, failed = 0, skipped = 0;
    std::size_t not_run = 0; ///< of the plan, because of Ctrl-C or --fail-fast
    std::chrono::nanoseconds duration{};
    bool interrupted = false; ///< by Ctrl-C
};

/// One output. Its calls come on one thread; none throws. A sink that cannot write goes on in silence, and
/// says in problem() what happened to it: who made it tells that to the user, once, and the exit code is not
/// 0 then.
class ResultSink {
  public:
    ResultSink() = default;
    ResultSink(const ResultSink&) = delete;
    ResultSink& operator=(const ResultSink&) = delete;
    ResultSink(ResultSink&&) = delete;
    ResultSink& operator=(ResultSink&&) = delete;
    virtual ~ResultSink() = default;

    /// First, once.
    virtual void plan(const RunPlan& plan) = 0;
    /// A run of a case begins; `attempt` from 1.
    virtual void started(const TestCase& test, unsigned attempt) = 0;
    /// Of each run that is planned, in whatever order; without started() before it if it was not run.
    virtual void ended(const CaseResult& result) = 0;
    /// Last, once, whatever ended the run of the tests.
    virtual void finished(const RunSummary& summary) = 0;
    /// "cannot write 'PATH': REASON".
    [[nodiscard]] virtual std::optional<std::string> problem() const = 0;
};

} // namespace umbra
