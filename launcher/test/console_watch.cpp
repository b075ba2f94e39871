#include "launcher/test/console_watch.hpp"

#include "launcher/test/text.hpp"
#include "vmm/error.hpp"

#include <algorithm>
#include <iterator>

#include <fmt/core.h>

namespace umbra {

void KeptText::add(std::string_view text) {
    bytes_ += text.size();
    const std::size_t first = std::min(text.size(), half_ - head_.size());
    head_ += text.substr(0, first);
    text.remove_prefix(first);
    tail_ += text.substr(text.size() - std::min(text.size(), half_));
    if (tail_.size() > 2 * half_)
        tail_.erase(0, tail_.size() - half_);
}

std::string KeptText::text() const {
    const std::string_view tail =
        std::string_view(tail_).substr(tail_.size() - std::min(tail_.size(), half_));
    const std::uint64_t left_out = bytes_ - head_.size() - tail.size();
    if (left_out == 0)
        return head_ + std::string(tail);
    return fmt::format("{}\n[{} bytes are left out here]\n{}", head_, left_out, tail);
}

namespace {

re2::RE2::Options pattern_options() {
    re2::RE2::Options options;
    options.set_encoding(re2::RE2::Options::EncodingLatin1); // a guest's bytes may be no UTF-8
    options.set_log_errors(false);
    return options;
}

} // namespace

std::optional<std::string> pattern_problem(const std::string& pattern) {
    const re2::RE2 compiled(pattern, pattern_options());
    return compiled.ok() ? std::nullopt : std::optional(compiled.error());
}

ConsoleWatch::Pattern ConsoleWatch::compile(const std::string& text) {
    Pattern pattern = std::make_unique<const re2::RE2>(text, pattern_options());
    if (!pattern->ok())
        throw StartupError(ExitCode::bad_usage,
                           fmt::format("'{}' is no regular expression: {}", text, pattern->error()));
    return pattern;
}

ConsoleWatch::ConsoleWatch(const TestCase& test) : test_(test) {
    std::ranges::transform(test.required, std::back_inserter(required_), compile);
    std::ranges::transform(test.forbidden, std::back_inserter(banned_), compile);
    for (const Exchange& exchange : test.conversation)
        expected_.push_back(compile(exchange.expect));
}

std::string ConsoleWatch::add(std::string_view text) {
    std::string send;
    while (!text.empty()) {
        const std::size_t room = window - line_.size();
        const std::string_view part = text.substr(0, std::min(room, text.find('\n')));
        line_ += part;
        text.remove_prefix(part.size());
        if (!text.empty() && text.front() == '\n') {
            text.remove_prefix(1);
            end_line();
            look(true);
            converse(true, send);
            look_for_near_misses();
            line_.clear();
            begins_here_ = true;
            required_from_ = expected_from_ = 0;
            ++number_;
        } else if (line_.size() == window) {
            look(false);
            converse(false, send);
            shorten();
        }
    }
    if (!line_.empty())
        converse(true, send); // a prompt has no end of line: where the guest pauses is one
    return send;
}

void ConsoleWatch::finish() {
    if (line_.empty())
        return;
    end_line();
    look(true);
    look_for_near_misses();
}

void ConsoleWatch::end_line() {
    line_.erase(line_.find_last_not_of('\r') + 1); // npos + 1 is 0
}

std::optional<std::size_t> ConsoleWatch::find(const Pattern& pattern, std::size_t from,
                                              bool line_ends) const {
    // What lies outside these bounds is seen by ^, $ and \b.
    const std::size_t begin = std::max<std::size_t>(from, begins_here_ ? 0 : 1);
    const std::size_t end = line_.size() - (line_ends ? 0 : 1);
    re2::StringPiece match;
    if (begin > end || !pattern->Match(line_, begin, end, re2::RE2::UNANCHORED, &match, 1))
        return std::nullopt;
    return static_cast<std::size_t>(match.data() - line_.data()) + match.size();
}

void ConsoleWatch::look(bool line_ends) {
    for (const Pattern& pattern : banned_)
        if (!forbidden_ && find(pattern, 0, line_ends))
            forbidden_ = {pattern->pattern(), number_, line_};
    while (required_found_ < required_.size()) {
        const auto end = find(required_[required_found_], required_from_, line_ends);
        if (!end)
            return;
        required_from_ = *end;
        ++required_found_;
        required_near_miss_.reset();
    }
}

void ConsoleWatch::converse(bool line_ends, std::string& send) {
    while (exchanges_met_ < expected_.size()) {
        const auto end = find(expected_[exchanges_met_], expected_from_, line_ends);
        if (!end)
            return;
        expected_from_ = *end;
        send += test_.conversation[exchanges_met_].send;
        ++exchanges_met_;
        exchange_near_miss_.reset();
    }
}

void ConsoleWatch::look_for_near_misses() {
    if (!begins_here_)
        return;
    const std::string seen = visible(line_);
    if (seen == line_)
        return;
    const auto look_for = [&](const std::vector<Pattern>& patterns, std::size_t next,
                              std::optional<Hit>& miss) {
        if (next < patterns.size() && re2::RE2::PartialMatch(seen, *patterns[next]))
            miss = {patterns[next]->pattern(), number_, line_};
    };
    look_for(required_, required_found_, required_near_miss_);
    look_for(expected_, exchanges_met_, exchange_near_miss_);
}

void ConsoleWatch::shorten() {
    constexpr std::size_t cut = window / 2;
    line_.erase(0, cut);
    begins_here_ = false;
    required_from_ -= std::min(required_from_, cut);
    expected_from_ -= std::min(expected_from_, cut);
}

} // namespace umbra
