#include "launcher/test/text.hpp"

#include <algorithm>
#include <cstdint>

#include <fmt/chrono.h>
#include <fmt/format.h>

namespace umbra {
namespace {

constexpr char32_t replacement = 0xfffd;

bool continues(std::string_view text, std::size_t at, unsigned least = 0x80, unsigned most = 0xbf) {
    return at < text.size() && static_cast<unsigned char>(text[at]) >= least &&
           static_cast<unsigned char>(text[at]) <= most;
}

/// Takes a character off `rest`, which is not empty. Well-formed is what table 3-7 of Unicode 15 has; of what
/// is not, the longest beginning of something that could be is one U+FFFD (section 3.9, "maximal subpart").
char32_t take_character(std::string_view& rest) {
    const auto first = static_cast<unsigned char>(rest.front());
    std::size_t length = 1;
    char32_t value = first;
    unsigned least = 0x80, most = 0xbf; // of the second byte
    if (first >= 0x80) {
        if (first >= 0xc2 && first <= 0xdf) {
            length = 2;
            value = first & 0x1fU;
        } else if (first >= 0xe0 && first <= 0xef) {
            length = 3;
            value = first & 0x0fU;
            least = first == 0xe0 ? 0xa0 : 0x80; // no overlong forms
            most = first == 0xed ? 0x9f : 0xbf;  // no surrogates
        } else if (first >= 0xf0 && first <= 0xf4) {
            length = 4;
            value = first & 0x07U;
            least = first == 0xf0 ? 0x90 : 0x80;
            most = first == 0xf4 ? 0x8f : 0xbf; // nothing above U+10FFFF
        } else {
            value = replacement;
        }
    }
    std::size_t taken = 1;
    for (; taken < length; ++taken) {
        if (!(taken == 1 ? continues(rest, taken, least, most) : continues(rest, taken))) {
            value = replacement;
            break;
        }
        value = (value << 6U) | (static_cast<unsigned char>(rest[taken]) & 0x3fU);
    }
    rest.remove_prefix(taken);
    return value;
}

void append(std::string& text, char32_t character) {
    const auto put = [&text](char32_t byte) { text += static_cast<char>(static_cast<unsigned char>(byte)); };
    if (character < 0x80) {
        put(character);
    } else if (character < 0x800) {
        put(0xc0U | (character >> 6U));
        put(0x80U | (character & 0x3fU));
    } else if (character < 0x10000) {
        put(0xe0U | (character >> 12U));
        put(0x80U | ((character >> 6U) & 0x3fU));
        put(0x80U | (character & 0x3fU));
    } else {
        put(0xf0U | (character >> 18U));
        put(0x80U | ((character >> 12U) & 0x3fU));
        put(0x80U | ((character >> 6U) & 0x3fU));
        put(0x80U | (character & 0x3fU));
    }
}

/// Length of the control sequence that `text` begins with; 0 if it does not, or it is not complete.
std::size_t control_sequence(std::string_view text) {
    constexpr std::size_t longest = 64; // what is longer is no terminal's
    if (!text.starts_with("\x1b["))
        return 0;
    std::size_t at = 2;
    while (at < longest && continues(text, at, 0x30, 0x3f))
        ++at;
    while (at < longest && continues(text, at, 0x20, 0x2f))
        ++at;
    return continues(text, at, 0x40, 0x7e) ? at + 1 : 0;
}

/// Characters that are seen by what they do to others, or not at all.
bool deceives(char32_t character) {
    return (character >= 0x80 && character < 0xa0) || character == 0xad || character == 0x61c ||
           (character >= 0x200b && character <= 0x200f) || (character >= 0x2028 && character <= 0x202e) ||
           (character >= 0x2060 && character <= 0x206f) || character == 0xfeff ||
           (character >= 0xfff9 && character <= 0xfffb) || (character & 0xfffeU) == 0xfffe ||
           (character >= 0xfdd0 && character <= 0xfdef) || (character >= 0xe0000 && character <= 0xe0fff);
}

char32_t shown(char32_t character) {
    if (character == '\n' || character == '\t')
        return character;
    if (character < 0x20)
        return 0x2400 + character;
    if (character == 0x7f)
        return 0x2421;
    return deceives(character) ? replacement : character;
}

unsigned width(char32_t character) {
    const bool narrow = character < 0x1100 || (character >= 0x1160 && character < 0x2300) ||
                        (character >= 0x2400 && character < 0x25fd) || character == replacement;
    return narrow ? 1 : 2;
}

} // namespace

std::string printable(std::string_view bytes) {
    std::string text;
    text.reserve(bytes.size());
    while (!bytes.empty()) {
        if (const std::size_t length = control_sequence(bytes); length != 0) {
            bytes.remove_prefix(length);
            continue;
        }
        if (bytes.front() == '\r') {
            const std::size_t end = bytes.find_first_not_of('\r');
            if (end != std::string_view::npos &&
                bytes[end] == '\n') { // drivers add a '\r' to one that is there
                bytes.remove_prefix(end);
                continue;
            }
        }
        append(text, shown(take_character(bytes)));
    }
    return text;
}

std::string printable_line(std::string_view bytes) {
    std::string text = printable(bytes);
    std::ranges::replace_if(
        text, [](char character) { return character == '\n' || character == '\t'; }, ' ');
    return text;
}

std::string visible(std::string_view line) {
    std::string text;
    while (!line.empty()) {
        if (const std::size_t length = control_sequence(line); length != 0) {
            line.remove_prefix(length);
            continue;
        }
        const std::string_view before = line;
        const char32_t character = take_character(line);
        const bool control = (character < 0x20 && character != '\t') || character == 0x7f;
        if (!control && !deceives(character))
            text += before.substr(0, before.size() - line.size());
    }
    text.erase(text.find_last_not_of(" \t") + 1); // npos + 1 is 0
    return text;
}

std::string with_escapes(std::string_view line) {
    std::string text = "\"";
    while (!line.empty()) {
        const std::string_view before = line;
        const char32_t character = take_character(line);
        const std::string_view bytes = before.substr(0, before.size() - line.size());
        if (character == '"' || character == '\\')
            text += '\\';
        if (character == '\r') {
            text += "\\r";
        } else if (character == '\t') {
            text += "\\t";
        } else if (character < 0x20 || character == 0x7f || character == replacement) {
            for (const char byte : bytes)
                text += fmt::format("\\x{:02x}", static_cast<unsigned char>(byte));
        } else if (deceives(character)) {
            text += fmt::format("\\u{:04x}", static_cast<std::uint32_t>(character));
        } else {
            text += bytes;
        }
    }
    return text + '"';
}

std::size_t columns_of(std::string_view line) {
    std::size_t columns = 0;
    while (!line.empty())
        columns += width(take_character(line));
    return columns;
}

std::string clipped(std::string_view line, std::size_t columns) {
    if (columns_of(line) <= columns)
        return std::string(line);
    if (columns == 0)
        return {};
    std::size_t used = 0;
    std::string_view rest = line;
    while (true) { // ends before `rest` does: not all of it fits
        std::string_view after = rest;
        used += width(take_character(after));
        if (used > columns - 1)
            break;
        rest = after;
    }
    return std::string(line.substr(0, line.size() - rest.size())) + "…";
}

std::string markup(std::string_view bytes) {
    std::string text;
    for (const char character : printable(bytes)) {
        switch (character) {
        case '&':
            text += "&amp;";
            break;
        case '<':
            text += "&lt;";
            break;
        case '>':
            text += "&gt;"; // "]]>" may not be in an element
            break;
        case '"':
            text += "&quot;";
            break;
        case '\'':
            text += "&#39;";
            break;
        default:
            text += character;
        }
    }
    return text;
}

std::string double_quoted(std::string_view bytes) {
    std::string text = "\"";
    for (const char character : printable(bytes)) {
        switch (character) {
        case '\n':
            text += "\\n";
            break;
        case '\t':
            text += "\\t";
            break;
        case '"':
        case '\\':
            text += '\\';
            text += character;
            break;
        default:
            text += character;
        }
    }
    return text + '"';
}

std::string last_part(std::string_view bytes, std::size_t limit) {
    if (bytes.size() <= limit)
        return std::string(bytes);
    std::string_view part = bytes.substr(bytes.size() - limit);
    if (const std::size_t line = part.find('\n'); line != std::string_view::npos && line + 1 < part.size())
        part.remove_prefix(line + 1);
    else
        part.remove_prefix(std::min<std::size_t>(
            part.size(),
            static_cast<std::size_t>(std::ranges::find_if_not(part.substr(0, 3),
                                                              [](char byte) {
                                                                  return (static_cast<unsigned char>(byte) &
                                                                          0xc0U) == 0x80;
                                                              }) -
                                     part.begin()))); // not in the middle of a character
    return fmt::format("[{} bytes before this are left out]\n{}", bytes.size() - part.size(), part);
}

std::string utc_text(std::chrono::system_clock::time_point time) {
    return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::chrono::system_clock::to_time_t(time)));
}

} // namespace umbra
