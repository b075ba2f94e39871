// Selection of test cases by name, tag and shard, and their order.
#include "launcher/test/selection.hpp"

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <random>
#include <system_error>
#include <utility>

namespace umbra {

namespace {

/// Whether `text` is wanted by `patterns`: like one of those to include, if there are any, and none to
/// exclude. `matches`: whether a case is like a pattern.
template<class Matches>
bool wanted(std::span<const std::string> patterns, const Matches& matches) {
    bool any_included = false, included = false;
    for (const std::string_view pattern : patterns) {
        if (pattern.starts_with('-')) {
            if (matches(pattern.substr(1)))
                return false;
        } else {
            any_included = true;
            included = included || matches(pattern);
        }
    }
    return included || !any_included;
}

bool name_matches(std::string_view pattern, std::string_view name) {
    for (;;) {
        if (glob_matches(pattern, name))
            return true;
        const std::size_t slash = name.find('/');
        if (slash == std::string_view::npos)
            return false;
        name.remove_prefix(slash + 1);
    }
}

/// FNV-1a (draft-eastlake-fnv) over the name, then the finaliser of MurmurHash3: the low bits of FNV-1a alone
/// depend on few of the name's bits.
std::uint64_t hash(std::string_view name) {
    std::uint64_t value = 0xcbf2'9ce4'8422'2325;
    for (const char c : name)
        value = (value ^ static_cast<unsigned char>(c)) * 0x100'0000'01b3;
    value = (value ^ value >> 33) * 0xff51'afd7'ed55'8ccd;
    value = (value ^ value >> 33) * 0xc4ce'b9fe'1a85'ec53;
    return value ^ value >> 33;
}

} // namespace

bool glob_matches(std::string_view pattern, std::string_view text) {
    // A later '*' can take over from an earlier one, so only the last one met is gone back to.
    constexpr std::size_t none = std::string_view::npos;
    std::size_t p = 0, t = 0, star = none, star_text = 0;
    while (t < text.size()) {
        if (p < pattern.size() && pattern[p] == '*') {
            star = p++;
            star_text = t;
        } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) {
            ++p;
            ++t;
        } else if (star != none) {
            p = star + 1;
            t = ++star_text;
        } else {
            return false;
        }
    }
    return pattern.find_first_not_of('*', p) == none;
}

std::vector<TestCase> filter_by_name(std::vector<TestCase> cases, std::span<const std::string> patterns) {
    std::erase_if(cases, [&](const TestCase& test) {
        return !wanted(patterns, [&](std::string_view pattern) { return name_matches(pattern, test.name); });
    });
    return cases;
}

std::vector<TestCase> filter_by_tag(std::vector<TestCase> cases, std::span<const std::string> patterns) {
    std::erase_if(cases, [&](const TestCase& test) {
        return !wanted(patterns, [&](std::string_view pattern) {
            return std::ranges::any_of(test.tags,
                                       [&](const std::string& tag) { return glob_matches(pattern, tag); });
        });
    });
    return cases;
}

std::optional<Shard> parse_shard(std::string_view text) {
    Shard shard;
    const char* const end = text.data() + text.size();
    const auto index = std::from_chars(text.data(), end, shard.index);
    if (index.ec != std::errc() || index.ptr == end || *index.ptr != '/')
        return std::nullopt;
    const auto count = std::from_chars(index.ptr + 1, end, shard.count);
    if (count.ec != std::errc() || count.ptr != end)
        return std::nullopt;
    if (shard.index < 1 || shard.index > shard.count || shard.count > maximum_shards)
        return std::nullopt;
    return shard;
}

std::vector<TestCase> take_shard(std::vector<TestCase> cases, Shard shard) {
    std::erase_if(cases,
                  [&](const TestCase& test) { return hash(test.name) % shard.count != shard.index - 1; });
    return cases;
}

std::vector<TestCase> shuffle_cases(std::vector<TestCase> cases, std::uint64_t seed) {
    // Not std::shuffle: what that does with the generator's numbers differs from one library to the next.
    std::mt19937_64 random(seed);
    for (std::size_t left = cases.size(); left > 1; --left)
        std::swap(cases[left - 1], cases[random() % left]);
    return cases;
}

} // namespace umbra
