#include "launcher/test/manifest_words.hpp"

#include <algorithm>
#include <system_error>

#include <fmt/core.h>
#include <fmt/ranges.h>

namespace umbra {
namespace {

/// The number of characters to insert, leave out, replace, or swap with the next, that make `b` of `a`.
std::size_t distance(std::string_view a, std::string_view b) {
    std::vector table(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
    for (std::size_t i = 0; i <= a.size(); ++i) {
        for (std::size_t j = 0; j <= b.size(); ++j) {
            std::size_t& best = table[i][j];
            if (i == 0 || j == 0) {
                best = i + j;
                continue;
            }
            best = std::min({table[i - 1][j] + 1, table[i][j - 1] + 1,
                             table[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                best = std::min(best, table[i - 2][j - 2] + 1);
        }
    }
    return table.back().back();
}

} // namespace

bool is_control(char c) {
    return static_cast<unsigned char>(c) < ' ' || c == '\x7f';
}

std::string printable(std::string_view text, std::size_t most) {
    std::string line(text.substr(0, most));
    if (text.size() > most) {
        while (!line.empty() && (line.back() & 0x80) != 0) // no part of a character
            line.pop_back();
        line += "...";
    }
    std::ranges::replace_if(line, is_control, '?');
    return line;
}

std::string alternatives(const Words& words) {
    if (words.size() < 2)
        return words.empty() ? "" : std::string(words.front());
    return fmt::format("{} or {}", fmt::join(words.begin(), words.end() - 1, ", "), words.back());
}

std::string suggestion(std::string_view word, const Words& known) {
    constexpr std::size_t longest = 60;
    if (word.size() > longest)
        return {};
    std::size_t least = std::max<std::size_t>(1, word.size() / 3) + 1;
    std::string_view best;
    for (const std::string_view candidate : known) {
        const std::size_t changes = distance(word, candidate);
        if (changes < least) {
            least = changes;
            best = candidate;
        }
    }
    return best.empty() ? "" : fmt::format("; did you mean '{}'?", best);
}

std::string absolute_path(const std::filesystem::path& folder, const std::filesystem::path& path) {
    const std::filesystem::path joined = folder / path;
    std::error_code error;
    const std::filesystem::path parent = std::filesystem::weakly_canonical(joined.parent_path(), error);
    return error ? joined.string() : (parent / joined.filename()).string();
}

} // namespace umbra
