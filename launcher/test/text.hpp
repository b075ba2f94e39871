// Text that a guest made, put where people and programs read it. It is hostile: control bytes, escape
// sequences, what is no UTF-8, megabytes of it.
#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>

namespace umbra {

/// `bytes` as UTF-8 that can be shown anywhere, and that XML 1.0 allows (section 2.2): lines and tabs stay;
/// "\r\n" is "\n"; complete control sequences of terminals (ECMA-48, 5.4: colours, the cursor's moves) are
/// left out; other control characters are the pictures of them (U+2400 to U+2421); what is no UTF-8, and what
/// would be invisible or turn the direction of writing, is U+FFFD.
[[nodiscard]] std::string printable(std::string_view bytes);

/// The same on one line: what separates lines, and tabs, are a space.
[[nodiscard]] std::string printable_line(std::string_view bytes);

/// What a person sees of a line: without control sequences, other control characters but tabs, what would be
/// invisible, and blanks at its end. What is no UTF-8 stays.
[[nodiscard]] std::string visible(std::string_view line);
/// `line` with escapes as C++ has them in place of all that visible() leaves out, tabs and what is no UTF-8,
/// between double quotes.
[[nodiscard]] std::string with_escapes(std::string_view line);

/// The beginning of `line`, of printable_line()'s, that a terminal shows in at most `columns` columns, with
/// "…" at its end if something was cut off. Widths are those of Unicode's East Asian Width (UAX 11), and
/// never taken too small.
[[nodiscard]] std::string clipped(std::string_view line, std::size_t columns);
[[nodiscard]] std::size_t columns_of(std::string_view line);

/// printable(), in XML or HTML: in an element, or between double quotes in an attribute.
[[nodiscard]] std::string markup(std::string_view bytes);

/// printable(), between double quotes, in YAML 1.2 and JSON.
[[nodiscard]] std::string double_quoted(std::string_view bytes);

/// The last `limit` bytes of `bytes` or a few less: from where a line begins, if one does. The first line
/// says how many are left out, if any are.
[[nodiscard]] std::string last_part(std::string_view bytes, std::size_t limit);

/// ISO 8601, to the second: "2024-02-29T12:00:00Z".
[[nodiscard]] std::string utc_text(std::chrono::system_clock::time_point time);

} // namespace umbra
