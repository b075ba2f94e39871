// JSON lines (https://jsonlines.org): one object for each event, for programs that follow a run.
#pragma once

#include "launcher/test/output_file.hpp"
#include "launcher/test/sink.hpp"

namespace umbra {

/// Bytes of a console in an event.
inline constexpr std::size_t json_console = 65536;

/// Each line is an object with "event". New keys and events may come; these stay:
///
///     {"event":"plan","format":1,"runs":200,"begun":"2024-02-29T12:00:00Z"}      runs: null if not known
///     {"event":"start","name":NAME,"attempt":1}
///     {"event":"end", the keys of result_json(), "console":TEXT}
///     {"event":"summary","passed":198,"failed":1,"skipped":1,"not_run":0,"wall_seconds":12.3,"interrupted":false}
///
/// console: its last part, of a case that has not passed; otherwise null.
class JsonLinesSink final : public ResultSink {
  public:
    /// As OutputFile.
    explicit JsonLinesSink(const std::string& path) : file_(path) {}

    void plan(const RunPlan& plan) override;
    void started(const TestCase& test, unsigned attempt) override;
    void ended(const CaseResult& result) override;
    void finished(const RunSummary& summary) override;
    [[nodiscard]] std::optional<std::string> problem() const override { return file_.problem(); }

  private:
    OutputFile file_;
};

} // namespace umbra
