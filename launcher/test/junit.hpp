// JUnit's XML, as CI servers read it: Jenkins, GitLab and others. tests/data/junit.xsd is what of it umbra
// writes.
#pragma once

#include "launcher/test/sink.hpp"

#include <map>
#include <string>
#include <vector>

namespace umbra {

/// Bytes of a console in the file, which is kept in memory until the end.
inline constexpr std::size_t junit_console = 65536, junit_passed_console = 4096;

/// The file is written when the run of the tests ends, also by Ctrl-C, and replaced in one step: a CI server
/// never reads half of it.
///
/// A suite is a folder of cases: "mm" has "mm/oom[memory=64M]" as its case "oom[memory=64M]". A case that was
/// run more than once is there each time, as "oom (run 2)". `failure` is the guest's, `error` is umbra's or
/// the manifest's (outcomes crashed and bad-usage). What was not run is `skipped`, or `error` after Ctrl-C:
/// such a file is not to be taken for that of a run in which everything passed. `system-out` is the console's
/// last part.
class JUnitSink final : public ResultSink {
  public:
    /// "-" is standard output. StartupError(bad_usage) if the file cannot be written: require_replaceable().
    explicit JUnitSink(std::string path);

    void plan(const RunPlan& plan) override { begun_ = plan.begun; }
    void started(const TestCase& /*test*/, unsigned /*attempt*/) override {}
    void ended(const CaseResult& result) override;
    void finished(const RunSummary& summary) override;
    [[nodiscard]] std::optional<std::string> problem() const override { return problem_; }

  private:
    struct Suite {
        std::size_t tests = 0, failures = 0, errors = 0, skipped = 0;
        double seconds = 0;
        std::string cases; ///< XML
    };
    void add(const CaseResult& result, bool not_run_is_error);

    std::string path_;
    std::chrono::system_clock::time_point begun_;
    std::map<std::string, Suite> suites_;
    std::vector<CaseResult> not_run_; ///< until it is known why
    std::optional<std::string> problem_;
};

} // namespace umbra
