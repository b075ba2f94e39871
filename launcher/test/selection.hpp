// Which test cases are run, and in which order: functions of the cases alone.
#pragma once

#include "launcher/test/case.hpp"

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// Whether all of `text` is like `pattern`, in which '*' stands for any characters, '/' too, and '?' for one.
/// There is nothing else, as names have brackets of their own. Takes time in proportion to the product of
/// both lengths at most.
[[nodiscard]] bool glob_matches(std::string_view pattern, std::string_view text);

/// `--filter`: the cases whose name, or what follows a '/' in it, is like one of `patterns`, and not like any
/// of those with '-' before them. Without one to include, all are.
[[nodiscard]] std::vector<TestCase> filter_by_name(std::vector<TestCase> cases,
                                                   std::span<const std::string> patterns);

/// `--tag`: by the same rules, of the cases' tags.
[[nodiscard]] std::vector<TestCase> filter_by_tag(std::vector<TestCase> cases,
                                                  std::span<const std::string> patterns);

/// One of several machines that share the work.
struct Shard {
    unsigned index = 1; ///< from 1 to count
    unsigned count = 1;

    bool operator==(const Shard&) const = default;
};
inline constexpr unsigned maximum_shards = 10'000;
/// "I/N"; nothing unless 1 <= I <= N <= maximum_shards.
[[nodiscard]] std::optional<Shard> parse_shard(std::string_view text);
/// `--shard`: each case is in exactly one shard, by its name alone: not by other cases, the computer, or the
/// version of umbra.
[[nodiscard]] std::vector<TestCase> take_shard(std::vector<TestCase> cases, Shard shard);

/// `--shuffle`: in an order that `seed` decides, everywhere the same.
[[nodiscard]] std::vector<TestCase> shuffle_cases(std::vector<TestCase> cases, std::uint64_t seed);

} // namespace umbra
