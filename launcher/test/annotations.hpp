// Annotations of GitHub Actions: failures where people look, at the manifest's line in a pull request. See
// "Workflow commands for GitHub Actions" in GitHub's documentation.
#pragma once

#include "launcher/test/output_file.hpp"
#include "launcher/test/sink.hpp"

#include <string>
#include <string_view>

namespace umbra {

/// Writes workflow commands: an error for each case that failed, when it does, and at the end a notice of the
/// skips.
///
///     ::error file=kernels/umbra.toml,line=12,title=boot/linux::timed out after 60 s
///
/// GitHub shows ten errors of a step: the tenth is written at the end, and says how many more there are.
class AnnotationSink final : public ResultSink {
  public:
    static constexpr std::size_t maximum_errors = 10;

    /// As OutputFile; GitHub reads standard output, "-". Paths are told from `base`, the repository's root,
    /// if they are below it.
    AnnotationSink(const std::string& path, std::string base) : file_(path), base_(std::move(base)) {}

    void plan(const RunPlan& /*plan*/) override {}
    void started(const TestCase& /*test*/, unsigned /*attempt*/) override {}
    void ended(const CaseResult& result) override;
    void finished(const RunSummary& summary) override;
    [[nodiscard]] std::optional<std::string> problem() const override { return file_.problem(); }

  private:
    [[nodiscard]] std::string error_of(const CaseResult& result) const;

    OutputFile file_;
    std::string base_;
    std::size_t errors_ = 0;
    std::string tenth_;   ///< held back until it is known whether there are more
    std::string skipped_; ///< the first few, by name
    std::size_t skips_ = 0;
};

/// Text as a command's message, and as the value of one of its properties.
[[nodiscard]] std::string command_message(std::string_view text);
[[nodiscard]] std::string command_property(std::string_view text);

} // namespace umbra
