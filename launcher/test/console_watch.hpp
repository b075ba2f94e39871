// What a case asks of its guest's console, followed while the guest prints.
#pragma once

#include "launcher/test/case.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <re2/re2.h>

namespace umbra {

/// Text of which only the beginning and the end are kept, `limit` bytes in all.
class KeptText {
  public:
    explicit KeptText(std::size_t limit) : half_(limit / 2) {}
    void add(std::string_view text);
    /// Between both, if anything is left out, a line says how many bytes.
    [[nodiscard]] std::string text() const;
    [[nodiscard]] std::uint64_t bytes() const { return bytes_; } ///< that were added

  private:
    std::size_t half_;
    std::uint64_t bytes_ = 0;
    std::string head_, tail_; ///< `tail_` may be up to twice a half, so that it is not moved at each byte
};

/// What is wrong with a pattern; nothing if it is a regular expression of RE2's, of bytes. Those are looked
/// for in time and memory that the guest cannot drive up: https://github.com/google/re2/wiki/Syntax
[[nodiscard]] std::optional<std::string> pattern_problem(const std::string& pattern);

/// Looks for a case's patterns, and plays its conversation.
///
/// Patterns are looked for line by line: '^' and '$' are a line's beginning and end, and none matches over
/// several lines. A line ends at a "\n", with any "\r" before it: drivers add one to one that is there. A
/// line of more than `window` bytes is looked at in parts that overlap by a half of it, so that a guest that
/// ends none costs no memory.
class ConsoleWatch {
  public:
    static constexpr std::size_t window = 4096;

    /// StartupError(bad_usage) if a pattern is none.
    explicit ConsoleWatch(const TestCase& test);

    struct Hit {
        std::string pattern;
        std::uint64_t line = 0; ///< from 1
        std::string text;       ///< of the line
    };

    /// The guest has printed this. Returns what it is to be sent for that.
    [[nodiscard]] std::string add(std::string_view text);
    /// It prints nothing more: a last line without an end is one, too.
    void finish();

    /// How many of TestCase::required were found, and of TestCase::conversation met.
    [[nodiscard]] std::size_t required_found() const { return required_found_; }
    [[nodiscard]] std::size_t exchanges_met() const { return exchanges_met_; }
    /// The first occurrence of a forbidden pattern.
    [[nodiscard]] const std::optional<Hit>& forbidden() const { return forbidden_; }
    /// A line that the pattern which comes next, of TestCase::required or of TestCase::conversation, would
    /// match if it were only what is seen of it (visible()): the last since the one before was found.
    [[nodiscard]] const std::optional<Hit>& required_near_miss() const { return required_near_miss_; }
    [[nodiscard]] const std::optional<Hit>& exchange_near_miss() const { return exchange_near_miss_; }

  private:
    using Pattern = std::unique_ptr<const re2::RE2>;
    static Pattern compile(const std::string& text);
    /// The end of the first match in line_ from `from`, if there is one.
    [[nodiscard]] std::optional<std::size_t> find(const Pattern& pattern, std::size_t from,
                                                  bool line_ends) const;
    void end_line();
    void look(bool line_ends);
    void converse(bool line_ends, std::string& send);
    void look_for_near_misses();
    void shorten();

    const TestCase& test_;
    std::vector<Pattern> required_, banned_, expected_;
    std::string line_;         ///< so far; its end if it is long
    bool begins_here_ = true;  ///< line_ has the line's beginning; else what is before
    std::uint64_t number_ = 1; ///< of the line
    std::size_t required_from_ = 0, expected_from_ = 0; ///< in line_: where what was found before ends
    std::size_t required_found_ = 0, exchanges_met_ = 0;
    std::optional<Hit> forbidden_, required_near_miss_, exchange_near_miss_;
};

} // namespace umbra
