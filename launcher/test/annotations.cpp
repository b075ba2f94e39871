#include "launcher/test/annotations.hpp"

#include "launcher/test/text.hpp"

#include <filesystem>

#include <fmt/core.h>

namespace umbra {
namespace {

/// What `special` characters are as %XX, which the runner undoes.
std::string percent_encoded(std::string_view text, std::string_view special) {
    std::string result;
    for (const char character : printable(text)) {
        if (special.find(character) == std::string_view::npos)
            result += character;
        else
            result += fmt::format("%{:02X}", static_cast<unsigned char>(character));
    }
    return result;
}

/// The part of a skip's name that a notice has room for.
constexpr std::size_t named_skips = 10;

std::string from_base(const std::string& file, const std::string& base) {
    const std::filesystem::path path = std::filesystem::path(file).lexically_relative(base);
    return path.empty() || *path.begin() == ".." ? file : path.native();
}

} // namespace

std::string command_message(std::string_view text) {
    return percent_encoded(text, "%\r\n");
}

std::string command_property(std::string_view text) {
    return percent_encoded(text, "%\r\n:,");
}

std::string AnnotationSink::error_of(const CaseResult& result) const {
    std::string place;
    if (!result.test.manifest.empty())
        place = fmt::format("file={},line={},", command_property(from_base(result.test.manifest, base_)),
                            result.test.line);
    std::string message;
    for (const std::string& problem : result.problems)
        message += (message.empty() ? "" : "\n") + printable_line(problem);
    return fmt::format("::error {}title={}::{}", place, command_property(printable_line(result.test.name)),
                       command_message(message));
}

void AnnotationSink::ended(const CaseResult& result) {
    if (result.verdict == CaseVerdict::skipped && skips_++ < named_skips)
        skipped_ += (skipped_.empty() ? "" : ", ") + printable_line(result.test.name);
    if (result.verdict != CaseVerdict::failed)
        return;
    ++errors_;
    if (errors_ < maximum_errors)
        file_.write(error_of(result) + "\n");
    else if (errors_ == maximum_errors)
        tenth_ = error_of(result);
}

void AnnotationSink::finished(const RunSummary& summary) {
    if (errors_ == maximum_errors)
        file_.write(tenth_ + "\n");
    else if (errors_ > maximum_errors)
        file_.write(fmt::format("::error title=umbra test::{} more cases failed: the log has them\n",
                                errors_ - maximum_errors + 1));
    if (skips_ != 0)
        file_.write(fmt::format("::notice title=umbra test::{} skipped: {}{}\n", skips_,
                                command_message(skipped_), skips_ > named_skips ? ", …" : ""));
    if (summary.interrupted)
        file_.write(fmt::format("::warning title=umbra test::interrupted: {} not run\n", summary.not_run));
}

} // namespace umbra
