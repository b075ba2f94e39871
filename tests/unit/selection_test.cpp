// Unit tests of launcher/test/selection: patterns, tags, shards that share all cases among them, and orders.
#include "launcher/test/selection.hpp"

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

using Strings = std::vector<std::string>;

std::vector<TestCase> cases_of(const Strings& names) {
    std::vector<TestCase> cases(names.size());
    for (std::size_t i = 0; i < names.size(); ++i)
        cases[i].name = names[i];
    return cases;
}

std::vector<TestCase> many_cases(std::size_t count) {
    std::vector<TestCase> cases(count);
    for (std::size_t i = 0; i < count; ++i)
        cases[i].name = fmt::format("guests/case{}[memory=64M]", i);
    return cases;
}

Strings names_of(const std::vector<TestCase>& cases) {
    Strings names;
    std::ranges::transform(cases, std::back_inserter(names), &TestCase::name);
    return names;
}

TEST(Selection, Globs) {
    struct Match {
        std::string_view pattern, text;
        bool matches;
    };
    for (const auto& [pattern, text, matches] : {
             Match{"", "", true},
             Match{"", "a", false},
             Match{"a", "", false},
             Match{"*", "", true},
             Match{"**", "", true},
             Match{"*", "a/b[c=d]", true},
             Match{"boot", "boot", true},
             Match{"boot", "boot2", false},
             Match{"boot", "reboot", false},
             Match{"boot*", "boot2", true},
             Match{"*boot", "reboot", true},
             Match{"*boot", "boots", false},
             Match{"?", "", false},
             Match{"?oot", "boot", true},
             Match{"b?t", "boot", false},
             Match{"b??t", "boot", true},
             Match{"b*?t", "bt", false},
             Match{"*[memory=64M*]", "a[memory=64M,tlb=stale]", true},
             Match{"[ab]", "a", false},
             Match{"[ab]", "[ab]", true},
             Match{"a*b*c", "aXbYbZc", true},
             Match{"a*b*c", "aXcYb", false},
             Match{"*ab", "aab", true},
             Match{"*aab", "aaab", true},
             Match{"*a*a*a*", "aa", false},
             Match{"a*", "ba", false},
             Match{"Boot", "boot", false},
         })
        EXPECT_EQ(glob_matches(pattern, text), matches) << pattern << " " << text;
}

TEST(Selection, GlobsTakeNoExponentialTime) {
    std::string pattern;
    for (int i = 0; i < 500; ++i)
        pattern += "*a";
    EXPECT_FALSE(glob_matches(pattern + "b", std::string(5000, 'a')));
    EXPECT_TRUE(glob_matches(pattern, std::string(5000, 'a')));
}

TEST(Selection, FiltersByName) {
    const auto cases =
        cases_of({"a/boot", "a/boot[memory=64M]", "b/c/boot", "reboot", "a/net[tlb=stale]", "b/c/net"});
    const auto filtered = [&](const Strings& patterns) { return names_of(filter_by_name(cases, patterns)); };
    EXPECT_EQ(filtered({}), names_of(cases));
    EXPECT_EQ(filtered({"boot"}), (Strings{"a/boot", "b/c/boot"})); // what follows a '/', too
    EXPECT_EQ(filtered({"c/boot"}), Strings{"b/c/boot"});
    EXPECT_EQ(filtered({"boot*"}), (Strings{"a/boot", "a/boot[memory=64M]", "b/c/boot"}));
    EXPECT_EQ(filtered({"*boot*"}), (Strings{"a/boot", "a/boot[memory=64M]", "b/c/boot", "reboot"}));
    EXPECT_EQ(filtered({"a/*"}), (Strings{"a/boot", "a/boot[memory=64M]", "a/net[tlb=stale]"}));
    EXPECT_EQ(filtered({"net*", "reboot"}), (Strings{"reboot", "a/net[tlb=stale]", "b/c/net"}));
    EXPECT_EQ(filtered({"-boot*"}), (Strings{"reboot", "a/net[tlb=stale]", "b/c/net"}));
    EXPECT_EQ(filtered({"-*boot*", "a/*"}), Strings{"a/net[tlb=stale]"}); // wherever it stands
    EXPECT_EQ(filtered({"a/*", "-*[*]", "b/*"}), (Strings{"a/boot", "b/c/boot", "b/c/net"}));
    EXPECT_EQ(filtered({"nothing"}), Strings{});
    EXPECT_EQ(filtered({"-*"}), Strings{});
}

TEST(Selection, FiltersByTag) {
    auto cases = cases_of({"none", "slow", "slow net", "net"});
    cases[1].tags = {"slow"};
    cases[2].tags = {"slow", "net"};
    cases[3].tags = {"net"};
    const auto filtered = [&](const Strings& patterns) { return names_of(filter_by_tag(cases, patterns)); };
    EXPECT_EQ(filtered({}), names_of(cases));
    EXPECT_EQ(filtered({"slow"}), (Strings{"slow", "slow net"}));
    EXPECT_EQ(filtered({"slow", "net"}), (Strings{"slow", "slow net", "net"}));
    EXPECT_EQ(filtered({"-slow"}), (Strings{"none", "net"}));
    EXPECT_EQ(filtered({"net", "-slow"}), Strings{"net"});
    EXPECT_EQ(filtered({"s*"}), (Strings{"slow", "slow net"}));
    EXPECT_EQ(filtered({"*"}), (Strings{"slow", "slow net", "net"}));
    EXPECT_EQ(filtered({"slo"}), Strings{});
}

TEST(Selection, ShardsAreWritten) {
    EXPECT_EQ(parse_shard("1/1"), (Shard{1, 1}));
    EXPECT_EQ(parse_shard("3/8"), (Shard{3, 8}));
    EXPECT_EQ(parse_shard("10000/10000"), (Shard{10000, 10000}));
    for (const std::string_view bad :
         {"", "1", "/", "1/", "/2", "0/2", "3/2", "1/0", "-1/2", "1/-2", "+1/2", "1/2/3", " 1/2", "1 /2",
          "1/ 2", "1/2x", "1/10001", "99999999999/99999999999", "a/b"})
        EXPECT_EQ(parse_shard(bad), std::nullopt) << bad;
}

TEST(Selection, ShardsShareAllCases) {
    const auto cases = many_cases(1000);
    for (const unsigned count : {1U, 2U, 3U, 7U, 16U, 1500U}) {
        Strings together;
        for (unsigned index = 1; index <= count; ++index) {
            const Strings shard = names_of(take_shard(cases, {index, count}));
            const Strings all = names_of(cases);
            // In the order that they had.
            std::size_t at = 0;
            for (const std::string& name : shard) {
                at = static_cast<std::size_t>(
                    std::find(all.begin() + static_cast<std::ptrdiff_t>(at), all.end(), name) - all.begin());
                ASSERT_LT(at++, all.size()) << name;
            }
            if (count <= 16) { // none does much more than its part
                EXPECT_GT(shard.size(), 1000 / count / 2) << index << "/" << count;
                EXPECT_LT(shard.size(), 1000 / count * 2) << index << "/" << count;
            }
            std::ranges::copy(shard, std::back_inserter(together));
        }
        Strings all = names_of(cases);
        std::ranges::sort(all);
        std::ranges::sort(together);
        EXPECT_EQ(together, all) << count;
    }
}

TEST(Selection, AShardDependsOnTheNameAlone) {
    const auto cases = many_cases(100);
    const Strings of_all = names_of(take_shard(cases, {2, 3}));
    for (const TestCase& one : cases) {
        TestCase changed = one;
        changed.memory = "1G";
        EXPECT_EQ(take_shard({changed}, {2, 3}).size(),
                  static_cast<std::size_t>(std::ranges::count(of_all, one.name)));
    }
    // Machines with other builds of umbra share the work too, so these are for ever.
    EXPECT_EQ(
        names_of(take_shard(cases_of({"boot", "net", "disk", "a/b[memory=64M]", "x", "y", "z", ""}), {2, 3})),
        (Strings{"y", "z"}));
}

TEST(Selection, ShufflesAsTheSeedSays) {
    const auto cases = many_cases(200);
    const Strings shuffled = names_of(shuffle_cases(cases, 1));
    EXPECT_EQ(names_of(shuffle_cases(cases, 1)), shuffled);
    EXPECT_NE(names_of(shuffle_cases(cases, 2)), shuffled);
    EXPECT_NE(shuffled, names_of(cases));
    Strings sorted = shuffled, all = names_of(cases);
    std::ranges::sort(sorted);
    std::ranges::sort(all);
    EXPECT_EQ(sorted, all);
    EXPECT_TRUE(shuffle_cases({}, 1).empty());
    EXPECT_EQ(names_of(shuffle_cases(cases_of({"one"}), 1)), Strings{"one"});
    // A seed from another machine's log gives its order.
    EXPECT_EQ(names_of(shuffle_cases(cases_of({"a", "b", "c", "d", "e", "f"}), 42)),
              (Strings{"d", "b", "f", "c", "e", "a"}));
}

} // namespace
} // namespace umbra
