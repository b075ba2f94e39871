// TAP 14, the Test Anything Protocol: https://testanything.org/tap-version-14-specification.html
#pragma once

#include "launcher/test/output_file.hpp"
#include "launcher/test/sink.hpp"

namespace umbra {

/// Bytes of a console in TAP.
inline constexpr std::size_t tap_console = 4096;

/// A line for each run of a case, in the order in which they end:
///
///     TAP version 14
///     1..3
///     ok 1 - boot/hello
///     not ok 2 - boot/linux[memory=64M]
///       ---
///       message: "timed out after 60 s"
///       severity: fail
///       outcome: timed-out
///       ...
///     ok 3 - boot/svm # SKIP this host has no native-ring0
///
/// The YAML block: message (the first problem), severity (fail), outcome, code (the guest's value at port
/// 0xf4 or 0x501, if there is one), duration_ms, attempt (with --repeat, from 1), at {file, line} of a
/// manifest's case, problems (all of them), reason (umbra's), folder, console (its last part). After a passed
/// case: duration_ms and attempt. Strings are between double quotes, and one line each. What was not run is
/// "not ok", and Ctrl-C "Bail out!" after it. The plan is at the end where the number of runs is not known
/// before.
class TapSink final : public ResultSink {
  public:
    /// As OutputFile.
    explicit TapSink(const std::string& path) : file_(path) {}

    void plan(const RunPlan& plan) override;
    void started(const TestCase& /*test*/, unsigned /*attempt*/) override {}
    void ended(const CaseResult& result) override;
    void finished(const RunSummary& summary) override;
    [[nodiscard]] std::optional<std::string> problem() const override { return file_.problem(); }

  private:
    OutputFile file_;
    std::size_t planned_ = 0, told_ = 0;
};

} // namespace umbra
