// Unit tests of launcher/test/manifest and its example: each key, each kind of mistake with what is said of
// it, the cross product of a matrix, and how manifests are found.
#include "launcher/test/example.hpp"
#include "launcher/test/manifest.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

namespace umbra {
namespace {

namespace fs = std::filesystem;
using Strings = std::vector<std::string>;
using namespace std::chrono_literals;

const fs::path base = "/base"; // need not be there

Cases parse(std::string_view text, const std::string& file = "guests/umbra.toml") {
    return parse_manifest(text, file, base);
}

std::string all(const std::vector<ManifestError>& errors) {
    std::string text;
    for (const ManifestError& error : errors)
        text += describe(error) + "\n";
    return text;
}

/// The cases of a manifest without a mistake.
std::vector<TestCase> cases(std::string_view text) {
    Cases read = parse(text);
    EXPECT_EQ(all(read.errors), "");
    return std::move(read.cases);
}

/// The only case, with `keys`.
TestCase one_case(std::string_view keys) {
    std::vector<TestCase> read = cases(fmt::format("[[case]]\nname = 'x'\nkernel = 'k'\n{}\n", keys));
    EXPECT_EQ(read.size(), 1U);
    return read.empty() ? TestCase() : std::move(read.front());
}

/// What is said of a case with `keys`, which begin in line 4.
std::string said(std::string_view keys) {
    const Cases read = parse(fmt::format("[[case]]\nname = 'x'\nkernel = 'k'\n{}\n", keys));
    EXPECT_EQ(read.cases.size(), 0U) << keys;
    return all(read.errors);
}

Strings names(const std::vector<TestCase>& tests) {
    Strings found;
    for (const TestCase& test : tests)
        found.push_back(test.name);
    return found;
}

// --- Keys

TEST(Manifest, AllKeysOfACase) {
    const std::vector<TestCase> read = cases(R"(
[[case]]
name = "all"
kernel = "build/../kernel.elf"
protocol = "multiboot1"
memory = "256M"
cpus = 1
append = "a b"
initrd = "/abs/initrd"
modules = ["m1", "sub/m2,its args,with commas"]
engine = "shadow"
cpu = "+smap,-pcid"
tlb = "stale"
sanitize = "tlb"
options = ["--fw-cfg", "name=opt/x,string=y"]
keyboard = true
timeout = 2.5
expect = { outcome = "failed", code = 4294967295 }
console = { required = ["a+", 'b\d'], forbidden = ["c"] }
conversation = [{ expect = "login:", send = "root\n" }, { expect = "# " }]
bounds = { "traps.count" = { min = 1, max = 1000 }, "instructions.cli" = { max = 0 } }
tags = ["slow", "net"]
hosts = ["native-ring0", "iopl", "cpuid", "stores-seen", "own-gdt", "exact-cpu", "exact-walks", "double-faults"]
)");
    ASSERT_EQ(read.size(), 1U);
    const TestCase& test = read.front();
    EXPECT_EQ(test.name, "guests/all");
    EXPECT_EQ(test.manifest, "/base/guests/umbra.toml");
    EXPECT_EQ(test.line, 2U);
    EXPECT_EQ(test.kernel, "/base/guests/kernel.elf");
    EXPECT_EQ(test.protocol, "multiboot1");
    EXPECT_EQ(test.memory, "256M");
    EXPECT_EQ(test.append, "a b");
    EXPECT_EQ(test.initrd, "/abs/initrd");
    EXPECT_EQ(test.modules, (Strings{"/base/guests/m1", "/base/guests/sub/m2,its args,with commas"}));
    EXPECT_EQ(test.engine, "shadow");
    EXPECT_EQ(test.cpu, "+smap,-pcid");
    EXPECT_EQ(test.tlb, "stale");
    EXPECT_TRUE(test.sanitize_tlb);
    EXPECT_EQ(test.options, (Strings{"--fw-cfg", "name=opt/x,string=y"}));
    EXPECT_TRUE(test.keyboard);
    EXPECT_EQ(test.timeout, 2500ms);
    EXPECT_EQ(test.expected, Outcome::failed);
    EXPECT_EQ(test.code, 4294967295U);
    EXPECT_EQ(test.required, (Strings{"a+", "b\\d"}));
    EXPECT_EQ(test.forbidden, Strings{"c"});
    ASSERT_EQ(test.conversation.size(), 2U);
    EXPECT_EQ(test.conversation[0].expect, "login:");
    EXPECT_EQ(test.conversation[0].send, "root\n");
    EXPECT_EQ(test.conversation[1].expect, "# ");
    EXPECT_EQ(test.conversation[1].send, "");
    ASSERT_EQ(test.bounds.size(), 2U);
    const CounterBound& traps = test.bounds[test.bounds[0].counter == "traps.count" ? 0 : 1];
    const CounterBound& cli = test.bounds[test.bounds[0].counter == "traps.count" ? 1 : 0];
    EXPECT_EQ(traps.counter, "traps.count");
    EXPECT_EQ(traps.least, 1U);
    EXPECT_EQ(traps.most, 1000U);
    EXPECT_EQ(cli.counter, "instructions.cli");
    EXPECT_EQ(cli.least, std::nullopt);
    EXPECT_EQ(cli.most, 0U);
    EXPECT_EQ(test.tags, (Strings{"slow", "net"}));
    EXPECT_EQ(test.hosts, (Strings{host_trait_names.begin(), host_trait_names.end()}));
    EXPECT_TRUE(test.parameters.empty());
}

TEST(Manifest, HostsMayBeAskedNotToHaveATrait) {
    EXPECT_EQ(one_case("hosts = ['!iopl', 'cpuid']").hosts, (Strings{"!iopl", "cpuid"}));
}

TEST(Manifest, TheLeastCaseHasTheDefaultsOfUmbraRun) {
    const TestCase test = one_case("");
    const TestCase untouched;
    EXPECT_EQ(test.kernel, "/base/guests/k");
    EXPECT_EQ(test.memory, "");
    EXPECT_EQ(test.protocol, "");
    EXPECT_EQ(test.expected, Outcome::passed);
    EXPECT_EQ(test.timeout, untouched.timeout);
    EXPECT_TRUE(test.required.empty() && test.options.empty() && test.bounds.empty());
}

TEST(Manifest, KeysOfDefaultsAreReplacedAsAWhole) {
    const std::vector<TestCase> read = cases(R"(
[[case]]
name = "inherits"
[[case]]
name = "replaces"
kernel = "other"
memory = 32
console.forbidden = ["oops"]
expect = "reset"
tags = []
initrd = ""
tlb = "natural"
# defaults count wherever they stand
[defaults]
kernel = "k"
memory = "64M"
console.required = ["ok"]
expect = { outcome = "failed", code = 3 }
tags = ["a"]
initrd = "i"
tlb = "eager"
)");
    ASSERT_EQ(read.size(), 2U);
    EXPECT_EQ(read[0].kernel, "/base/guests/k");
    EXPECT_EQ(read[0].memory, "64M");
    EXPECT_EQ(read[0].required, Strings{"ok"});
    EXPECT_EQ(read[0].code, 3U);
    EXPECT_EQ(read[0].tags, Strings{"a"});
    EXPECT_EQ(read[0].initrd, "/base/guests/i");
    EXPECT_EQ(read[0].tlb, "eager");
    EXPECT_EQ(read[1].kernel, "/base/guests/other");
    EXPECT_EQ(read[1].memory, "32");
    EXPECT_TRUE(read[1].required.empty());
    EXPECT_EQ(read[1].forbidden, Strings{"oops"});
    EXPECT_EQ(read[1].expected, Outcome::reset);
    EXPECT_EQ(read[1].code, std::nullopt);
    EXPECT_TRUE(read[1].tags.empty());
    EXPECT_EQ(read[1].initrd, "");
    EXPECT_EQ(read[1].tlb, "");
}

TEST(Manifest, Timeouts) {
    using Case = std::pair<std::string_view, std::chrono::milliseconds>;
    for (const auto& [text, expected] :
         {Case{"10", 10s}, Case{"0.25", 250ms}, Case{"'7'", 7s}, Case{"'500ms'", 500ms}, Case{"'90s'", 90s},
          Case{"'2m'", 2min}, Case{"'1.5m'", 90s}, Case{"'1h'", 1h}, Case{"'24h'", 24h}, Case{"0.001", 1ms},
          Case{"86400", 24h}})
        EXPECT_EQ(one_case(fmt::format("timeout = {}", text)).timeout, expected) << text;
    for (const std::string_view text : {"0", "-1", "0.0001", "86401", "nan", "inf", "''", "'m'", "'2x'",
                                        "'2 m'", "'25h'", "'1e9999'", "true", "[1]", "9223372036854775807"})
        EXPECT_NE(said(fmt::format("timeout = {}", text))
                      .find("guests/umbra.toml:4:11: case.timeout: expected seconds"),
                  std::string::npos)
            << text;
}

TEST(Manifest, EveryOutcomeButACrashCanBeExpected) {
    for (std::size_t i = 0; i < outcome_names.size(); ++i) {
        const std::string keys = fmt::format("expect = '{}'", outcome_names.at(i));
        if (static_cast<Outcome>(i) == Outcome::crashed)
            EXPECT_NE(said(keys).find("host-cannot or bad-usage, not 'crashed'"), std::string::npos);
        else
            EXPECT_EQ(one_case(keys).expected, static_cast<Outcome>(i)) << keys;
    }
}

TEST(Manifest, CountersWithAndWithoutQuotes) {
    const TestCase test =
        one_case("bounds.traps.count.max = 5\nbounds.'shadow.table_pages'.high_water = {min=1}\n"
                 "bounds.unclaimed_accesses = {port_reads = {max=0}, port_writes = {max=1}}");
    std::vector<std::pair<std::string, std::optional<std::uint64_t>>> found;
    for (const CounterBound& bound : test.bounds)
        found.emplace_back(bound.counter, bound.most);
    std::ranges::sort(found);
    EXPECT_EQ(found, (decltype(found){{"shadow.table_pages.high_water", std::nullopt},
                                      {"traps.count", 5},
                                      {"unclaimed_accesses.port_reads", 0},
                                      {"unclaimed_accesses.port_writes", 1}}));
}

TEST(Manifest, NamesTellTheFolder) {
    constexpr std::string_view text = "[[case]]\nname='c'\nkernel='k'";
    const auto name = [&](const std::string& file) { return names(parse(text, file).cases); };
    EXPECT_EQ(name("umbra.toml"), Strings{"c"});
    EXPECT_EQ(name("./umbra.toml"), Strings{"c"});
    EXPECT_EQ(name("a/b/umbra.toml"), Strings{"a/b/c"});
    EXPECT_EQ(name("a/x/../b/umbra.toml"), Strings{"a/b/c"});
    EXPECT_EQ(name("/base/a/umbra.toml"), Strings{"a/c"}); // the same case has one name
    EXPECT_EQ(name("/other/umbra.toml"), Strings{"../other/c"});
    EXPECT_EQ(name("smoke.toml"), Strings{"smoke/c"});
    EXPECT_EQ(name("a/smoke.toml"), Strings{"a/smoke/c"});
}

// --- Matrices

TEST(Manifest, AMatrixIsTheCrossProductInTheOrderOfTheFile) {
    const std::vector<TestCase> read = cases(R"(
[[case]]
name = "m"
kernel = "k"
timeout = 5
[case.matrix]
tlb = ["natural", "stale"]
memory = ["64M", 128, "1G"]
)");
    EXPECT_EQ(names(read), (Strings{"guests/m[tlb=natural,memory=64M]", "guests/m[tlb=natural,memory=128]",
                                    "guests/m[tlb=natural,memory=1G]", "guests/m[tlb=stale,memory=64M]",
                                    "guests/m[tlb=stale,memory=128]", "guests/m[tlb=stale,memory=1G]"}));
    ASSERT_EQ(read.size(), 6U);
    EXPECT_EQ(read[1].tlb, "");
    EXPECT_EQ(read[1].memory, "128");
    EXPECT_EQ(read[5].tlb, "stale");
    EXPECT_EQ(read[5].memory, "1G");
    EXPECT_EQ(read[5].timeout, 5s);
    EXPECT_EQ(read[5].parameters, (std::map<std::string, std::string>{{"tlb", "stale"}, {"memory", "1G"}}));
}

TEST(Manifest, EveryKeyOfAMatrixIsApplied) {
    const std::vector<TestCase> read = cases(R"(
[[case]]
name = "m"
[case.matrix]
kernel = ["k2"]
protocol = ["pvh"]
memory = ["8M"]
cpus = [1]
append = ["a,b c"]
initrd = ["i"]
engine = ["shadow"]
cpu = ["+smap"]
tlb = ["eager"]
sanitize = ["tlb"]
)");
    ASSERT_EQ(read.size(), 1U);
    const TestCase& test = read.front();
    EXPECT_EQ(test.name,
              "guests/m[kernel=k2,protocol=pvh,memory=8M,cpus=1,append=a,b c,initrd=i,engine=shadow,"
              "cpu=+smap,tlb=eager,sanitize=tlb]");
    EXPECT_EQ(test.kernel, "/base/guests/k2");
    EXPECT_EQ(test.protocol, "pvh");
    EXPECT_EQ(test.memory, "8M");
    EXPECT_EQ(test.append, "a,b c");
    EXPECT_EQ(test.initrd, "/base/guests/i");
    EXPECT_EQ(test.engine, "shadow");
    EXPECT_EQ(test.cpu, "+smap");
    EXPECT_EQ(test.tlb, "eager");
    EXPECT_TRUE(test.sanitize_tlb);
    EXPECT_EQ(test.parameters.size(), 10U);
}

TEST(Manifest, AMatrixOfDefaultsIsForAllCasesWithoutTheirOwn) {
    const std::vector<TestCase> read = cases(R"(
[defaults]
kernel = "k"
memory = "64M"
[defaults.matrix]
engine = ["shadow", "native"]
[[case]]
name = "inherits"
[[case]]
name = "own"
matrix.memory = ["1G"]
[[case]]
name = "none"
matrix = {}
engine = "native"
)");
    EXPECT_EQ(names(read), (Strings{"guests/inherits[engine=shadow]", "guests/inherits[engine=native]",
                                    "guests/own[memory=1G]", "guests/none"}));
    ASSERT_EQ(read.size(), 4U);
    EXPECT_EQ(read[1].engine, "native");
    EXPECT_EQ(read[2].engine, "");
    EXPECT_EQ(read[2].memory, "1G");
    EXPECT_EQ(read[3].memory, "64M");
}

/// 10 x 10 x … cases.
std::string matrix_of(std::size_t tens, const std::string& name = "m") {
    std::string text = fmt::format("[[case]]\nname = '{}'\nkernel = 'k'\n", name);
    for (const std::string_view key : {"append", "initrd", "memory", "cpu", "kernel"}) {
        if (tens-- == 0)
            break;
        text += fmt::format("matrix.{} = [", key);
        for (int i = 10; i < 20; ++i)
            text += key == "memory" ? fmt::format("{},", i)
                    : key == "cpu"  ? fmt::format("'{}smap,{}smep,{}pge,{}pcid',", i & 1 ? '+' : '-',
                                                 i & 2 ? '+' : '-', i & 4 ? '+' : '-', i & 8 ? '+' : '-')
                                    : fmt::format("'{}',", i);
        text += "]\n";
    }
    return text;
}

TEST(Manifest, AMatrixIsBounded) {
    EXPECT_EQ(cases(matrix_of(4)).size(), maximum_manifest_cases);
    const std::string more = all(parse(matrix_of(4) + matrix_of(0, "one more")).errors);
    EXPECT_EQ(
        more,
        "guests/umbra.toml:8:1: case.matrix: expected at most 10000 cases in a manifest, with all their "
        "matrices\n");
    const std::string more_cases = all(parse(matrix_of(4) + matrix_of(4, "n") + matrix_of(4, "o")).errors);
    EXPECT_EQ(std::ranges::count(more_cases, '\n'), 1) << more_cases;
}

// --- Mistakes

struct Mistake {
    std::string_view keys; ///< of the case, from line 4
    std::string_view said; ///< without the file's name
};

TEST(Manifest, MistakesInValues) {
    for (const auto& [keys, expected] : {
             // Unknown keys, near and far from known ones.
             Mistake{"memroy = '64M'", "4:1: case.memroy: unknown key; did you mean 'memory'?"},
             Mistake{"time-out = 3", "4:1: case.time-out: unknown key; did you mean 'timeout'?"},
             Mistake{"Tags = []", "4:1: case.Tags: unknown key; did you mean 'tags'?"},
             Mistake{"xyzzyplugh = 1",
                     "4:1: case.xyzzyplugh: unknown key; expected name, kernel, protocol, memory, cpus, "
                     "append, initrd, modules, engine, cpu, tlb, sanitize, options, keyboard, "
                     "timeout, expect, console, conversation, bounds, tags, hosts or matrix"},
             Mistake{"console.requierd = []",
                     "4:9: case.console.requierd: unknown key; did you mean 'required'?"},
             Mistake{"expect = {outcome='failed', exit=1}",
                     "4:29: case.expect.exit: unknown key; expected outcome or code"},
             // Each key, of another type.
             Mistake{"protocol = 1",
                     "4:12: case.protocol: expected linux, linux32, pvh, multiboot1, multiboot2, elf64, "
                     "elf32, flat or flat32, not a number"},
             Mistake{"memory = []",
                     "4:10: case.memory: expected a size such as \"64M\", or a number of MiB, not a list"},
             Mistake{"cpus = '1'", "4:8: case.cpus: expected 1, not '1'"},
             Mistake{"append = 1979-05-27", "4:10: case.append: expected a string, not a date or time"},
             Mistake{"initrd = {}", "4:10: case.initrd: expected a string, not a table"},
             Mistake{"modules = 'm'", "4:11: case.modules: expected a list, not 'm'"},
             Mistake{"engine = true", "4:10: case.engine: expected shadow or native, not true or false"},
             Mistake{"cpu = 1.5", "4:7: case.cpu: expected a string, not a number"},
             Mistake{"tlb = 1", "4:7: case.tlb: expected natural, stale or eager, not a number"},
             Mistake{"sanitize = true", "4:12: case.sanitize: expected none or tlb, not true or false"},
             Mistake{"options = '--force'", "4:11: case.options: expected a list, not '--force'"},
             Mistake{"keyboard = 'yes'", "4:12: case.keyboard: expected true or false, not 'yes'"},
             Mistake{"expect = 7",
                     "4:10: case.expect: expected an outcome such as \"passed\", or { outcome = \"failed\", "
                     "code = 7 }, not a number"},
             Mistake{"console = ['ok']",
                     "4:11: case.console: expected a table { required = [...], forbidden = [...] }, "
                     "not a list"},
             Mistake{"conversation = {}", "4:16: case.conversation: expected a list, not a table"},
             Mistake{
                 "bounds = 1",
                 "4:10: case.bounds: expected a table such as { \"traps.count\" = { max = 1000 } }, not a "
                 "number"},
             Mistake{"tags = 'slow'", "4:8: case.tags: expected a list, not 'slow'"},
             Mistake{"hosts = 'iopl'", "4:9: case.hosts: expected a list, not 'iopl'"},
             Mistake{"matrix = []",
                     R"(4:10: case.matrix: expected a table such as { memory = ["64M", "1G"] }, not a list)"},
             // Each key, with a bad value.
             Mistake{"protocol = 'multiboot'",
                     "4:12: case.protocol: expected linux, linux32, pvh, multiboot1, multiboot2, "
                     "elf64, elf32, flat or flat32, not 'multiboot'; did you mean 'multiboot1'?"},
             Mistake{"memory = '64X'",
                     "4:10: case.memory: bad memory size '64X': write a number with K, M or G, such as 64M"},
             Mistake{"memory = 1", "4:10: case.memory: memory size '1' is too small: at least 2 MiB"},
             Mistake{"memory = -5",
                     "4:10: case.memory: bad memory size '-5': write a number with K, M or G, such as 64M"},
             Mistake{"memory = '65G'", "4:10: case.memory: memory size '65G' is too large: at most 64 GiB"},
             Mistake{"cpus = 2", "4:8: case.cpus: expected 1, not 2: a guest has one CPU"},
             Mistake{R"(append = "a\u0000b")",
                     "4:10: case.append: expected a string without the character U+0000"},
             Mistake{"modules = ['']", "4:12: case.modules[0]: expected a string that is not empty"},
             Mistake{"modules = ['a', ',args']",
                     "4:17: case.modules[1]: expected FILE or FILE,ARGS, not ',args'"},
             Mistake{"engine = 'nativ'",
                     "4:10: case.engine: expected shadow or native, not 'nativ'; did you mean 'native'?"},
             Mistake{"tlb = 'state'",
                     "4:7: case.tlb: expected natural, stale or eager, not 'state'; did you mean 'stale'?"},
             Mistake{"sanitize = 'memory'", "4:12: case.sanitize: expected none or tlb, not 'memory'"},
             Mistake{"options = ['--force', '--memory=64M']",
                     "4:23: case.options[1]: expected the key memory instead of --memory"},
             Mistake{"options = ['-m64']", "4:12: case.options[0]: expected the key memory instead of -m"},
             Mistake{"options = ['--serial', 'x']",
                     "4:12: case.options[0]: expected another option: --serial is the runner's"},
             Mistake{"options = ['--', 'x']", "4:12: case.options[0]: expected the key append instead of --"},
             Mistake{"options = ['--result=x']",
                     "4:12: case.options[0]: expected another option: --result is the runner's"},
             Mistake{"options = [1]", "4:12: case.options[0]: expected a string, not a number"},
             Mistake{"expect = 'pased'", "4:10: case.expect: expected passed, failed, triple-fault, reset, "
                                         "stopped, timed-out, no-progress, "
                                         "host-cannot or bad-usage, not 'pased'; did you mean 'passed'?"},
             Mistake{"expect = {code=1}", "4:10: case.expect.outcome: missing: expected beside code"},
             Mistake{"expect = {outcome='passed', code=1}",
                     "4:10: case.expect.code: expected only with outcome = \"failed\""},
             Mistake{"expect = {outcome='failed', code=0}",
                     "4:34: case.expect.code: expected a code from 1 to 4294967295, not 0"},
             Mistake{"expect = {outcome='failed', code=4294967296}",
                     "4:34: case.expect.code: expected a code from 1 to 4294967295, not 4294967296"},
             Mistake{"expect = {outcome='failed', code='7'}",
                     "4:34: case.expect.code: expected the guest's code, a whole number, not '7'"},
             Mistake{"console = {forbidden = ['ok', '']}",
                     "4:31: case.console.forbidden[1]: expected a string that is not empty"},
             Mistake{"console.required = ['a', 3]",
                     "4:26: case.console.required[1]: expected a string, not a number"},
             Mistake{"console.required = 'a'", "4:20: case.console.required: expected a list, not 'a'"},
             Mistake{"conversation = ['a']",
                     "4:17: case.conversation[0]: expected a table { expect = \"...\", send = \"...\" }, "
                     "not 'a'"},
             Mistake{"conversation = [{expect='a'}, {send='b'}]",
                     "4:31: case.conversation[1].expect: missing: expected what the guest prints before it "
                     "is sent "
                     "anything"},
             Mistake{"conversation = [{expect='a', sned='b'}]",
                     "4:30: case.conversation[0].sned: unknown key; did you mean 'send'?"},
             Mistake{"bounds.x = 1",
                     "4:12: case.bounds.x: expected a table such as { max = 1000 }, not a number"},
             Mistake{"bounds.'traps.count' = {}", "4:24: case.bounds.traps.count: expected min, max or both"},
             Mistake{"bounds.'traps.count' = {maximum=3}",
                     "4:24: case.bounds.traps.count: expected min, max or both"},
             Mistake{"bounds.'traps.count' = {max=-3}",
                     "4:29: case.bounds.traps.count.max: expected a whole number, not below 0, not a number"},
             Mistake{"bounds.'traps.count' = {max='3'}",
                     "4:29: case.bounds.traps.count.max: expected a whole number, not below 0, not '3'"},
             Mistake{"bounds.'traps.count' = {min=3, max=2}",
                     "4:24: case.bounds.traps.count: expected min not above max, not 3 and 2"},
             Mistake{"bounds.'traps.conut' = {max=3}",
                     "4:24: case.bounds.traps.conut: expected a number of --stats=json, such "
                     "as traps.count, not 'traps.conut'; did you mean 'traps.count'?"},
             Mistake{"bounds = {'traps.count' = {max=3}, traps = {count = {max=4}}}",
                     "case.bounds.traps.count: expected one bound of traps.count, not two"},
             Mistake{
                 "tags = ['a b']",
                 "4:9: case.tags[0]: expected a tag without spaces, ',', '*' and '?', that does not begin "
                 "with '-', not 'a b'"},
             Mistake{"tags = ['a', '-b']", "4:14: case.tags[1]: expected a tag without spaces"},
             Mistake{
                 "hosts = ['iopl', 'native-ring-0']",
                 "4:18: case.hosts[1]: expected native-ring0, iopl, cpuid, stores-seen, own-gdt, exact-cpu, "
                 "exact-walks or double-faults, not 'native-ring-0'; did you mean 'native-ring0'?"},
             Mistake{"hosts = ['!']", "4:10: case.hosts[0]: expected native-ring0, iopl, "},
             Mistake{"matrix.timeout = [1]",
                     "4:8: case.matrix.timeout: unknown key; expected kernel, protocol, memory, cpus, "
                     "append, initrd, engine, cpu, tlb or sanitize"},
             Mistake{"matrix.memory = '64M'", "4:17: case.matrix.memory: expected a list, not '64M'"},
             Mistake{"matrix.memory = []", "4:17: case.matrix.memory: expected at least one value"},
             Mistake{"matrix.memory = ['64M', '64Q']", "4:25: case.matrix.memory[1]: bad memory size '64Q'"},
             Mistake{"matrix.memory = ['64', 64]", "4:24: case.matrix.memory[1]: '64' is there twice"},
             Mistake{"memory = '64M'\nmatrix.memory = ['64M']",
                     "4:10: case.memory: expected either here or in the matrix, not in both"},
             Mistake{"engine = 'native'\nmatrix.tlb = ['natural', 'stale', 'eager']",
                     "1:1: case.engine: expected engine shadow with tlb and sanitize, not native as in "
                     "guests/x[tlb=stale]: it does not see page tables"},
             Mistake{"engine = 'native'\nsanitize = 'tlb'",
                     "1:1: case.engine: expected engine shadow with tlb and sanitize, not native as in "
                     "guests/x: it does "
                     "not see page tables"},
             // TOML itself.
             Mistake{"memory = ", "4:10: no TOML: "},
             Mistake{"name = 'twice'", "4:8: no TOML: "},
         }) {
        const std::string errors = said(keys);
        EXPECT_TRUE(errors.starts_with("guests/umbra.toml:")) << errors;
        EXPECT_NE(errors.find(expected), std::string::npos)
            << "expected: " << expected << "\ngot: " << errors;
    }
}

TEST(Manifest, RegularExpressionsAreCompiled) {
    for (const std::string_view key :
         {"console.required = ['a', '{}']", "console.forbidden = ['{}']", "conversation = [{{expect='{}'}}]"})
        for (const std::string_view bad : {"(", "[a", "*", "a{2,1}", "\\", "(a{1000}){1000}"}) {
            const std::string errors = said(fmt::format(fmt::runtime(key), bad));
            EXPECT_NE(errors.find(fmt::format("expected a regular expression (RE2), not '{}': ", bad)),
                      std::string::npos)
                << bad << "\n"
                << errors;
        }
}

TEST(Manifest, MistakesInCpuFeaturesAreExplained) {
    const std::string errors = said("cpu = '+smop'");
    EXPECT_NE(errors.find("4:7: case.cpu: "), std::string::npos) << errors;
    EXPECT_NE(errors.find("smop"), std::string::npos) << errors;
    EXPECT_NE(errors.find("smap"), std::string::npos) << errors;
}

TEST(Manifest, MistakesInTheFrame) {
    struct Frame {
        std::string_view text, said;
    };
    for (const auto& [text, expected] : {
             Frame{"", "guests/umbra.toml: case: missing: expected at least one [[case]]\n"},
             // What toml++ asserts.
             Frame{"x = 1\n\n[[[a]]]\ny = 1\n",
                   "guests/umbra.toml:3:1: no TOML: expected a key or a table's name\n"},
             Frame{"[[=", "guests/umbra.toml:1:1: no TOML: expected a key or a table's name\n"},
             Frame{"case = []\nx = 1", "guests/umbra.toml:1:8: case: expected at least one [[case]]\n"
                                       "guests/umbra.toml:2:1: x: unknown key; expected defaults or case\n"},
             Frame{"[[cases]]\nname='x'",
                   "guests/umbra.toml:1:3: cases: unknown key; did you mean 'case'?\n"},
             Frame{"[case]\nname='x'",
                   "guests/umbra.toml:1:1: case: expected tables [[case]], not a table\n"},
             Frame{"case = [1]", "guests/umbra.toml:1:9: case: expected a table, [[case]], not a number\n"},
             Frame{"[[defaults]]\n[[case]]\nname='x'\nkernel='k'",
                   "guests/umbra.toml:1:1: defaults: expected a table, [defaults], not a list\n"},
             Frame{"[defaults]\nname='x'\n[[case]]\nname='x'\nkernel='k'",
                   "guests/umbra.toml:2:6: defaults.name: expected in each [[case]], not here\n"},
             Frame{"[defaults]\nmemory=8\nmatrix.memory=[8]\n[[case]]\nname='x'\nkernel='k'",
                   "guests/umbra.toml:2:8: defaults.memory: expected either here or in the matrix, not in "
                   "both\n"},
             Frame{
                 "[defaults]\nmatrix.memory=[8]\n[[case]]\nname='x'\nkernel='k'\nmemory=9",
                 "guests/umbra.toml:6:8: case.memory: expected either here or in the matrix, not in both\n"},
             Frame{"[[case]]\nkernel='k'",
                   "guests/umbra.toml:1:1: case.name: missing: expected a name for the case\n"},
             Frame{"[[case]]\nname='x'", "guests/umbra.toml:1:1: case.kernel: missing: expected a kernel "
                                         "file here or in [defaults]\n"},
             Frame{"[[case]]\nname='x'\nkernel=''",
                   "guests/umbra.toml:3:8: case.kernel: expected a string that is not empty\n"},
             Frame{"[[case]]\nname='x'\nkernel=3",
                   "guests/umbra.toml:3:8: case.kernel: expected a string, not a number\n"},
             Frame{"[defaults]\nkernel='k'\n[[case]]\nname='x'\n[[case]]\nname='y'\n[[case]]\nname='x'",
                   "guests/umbra.toml:8:6: case.name: expected a name of its own, not 'x' as in line 3\n"},
             Frame{"[[case]]\nname='x'\nkernel='k'\nmatrix={append=['a','a,initrd=b'],initrd=['b,initrd=c','"
                   "c']}",
                   "guests/umbra.toml:1:1: case.matrix: expected a name of its own for each case, not twice "
                   "guests/x[append=a,initrd=b,initrd=c]\n"},
         })
        EXPECT_EQ(all(parse(text).errors), expected) << text;
}

TEST(Manifest, NamesOfCases) {
    for (const std::string_view good : {"a", "boot 2", "boot-2_x.y", "-x", "grün", "a,b=c"})
        EXPECT_EQ(names(cases(fmt::format("[[case]]\nkernel='k'\nname='{}'", good))),
                  Strings{fmt::format("guests/{}", good)});
    const std::string longest(100, 'n');
    EXPECT_EQ(cases(fmt::format("[[case]]\nkernel='k'\nname='{}'", longest)).size(), 1U);
    for (const std::string& bad :
         {std::string("a/b"), std::string("a[b"), std::string("b]"), std::string(" a"), std::string("a "),
          std::string("a\\nb"), std::string("\\u007f"), longest + "n"}) {
        const std::string errors = all(parse(fmt::format("[[case]]\nkernel='k'\nname=\"{}\"", bad)).errors);
        EXPECT_NE(errors.find("3:6: case.name: expected a name of at most 100 bytes without '/'"),
                  std::string::npos)
            << bad << "\n"
            << errors;
        EXPECT_EQ(std::ranges::count(errors, '\n'), 1) << errors;
    }
}

TEST(Manifest, AllMistakesAreToldByLine) {
    const Cases read = parse(R"([[case]]
name = "a"
kernl = "k"
memory = "x"
[[case]]
name = "a"
kernel = "k"
tags = ["ok", 1, 2]
[defaults]
engine = "none"
)");
    EXPECT_TRUE(read.cases.empty());
    std::vector<std::pair<unsigned, std::string>> found;
    for (const ManifestError& error : read.errors)
        found.emplace_back(error.line, error.key);
    EXPECT_EQ(found, (decltype(found){{1, "case.kernel"},
                                      {3, "case.kernl"},
                                      {4, "case.memory"},
                                      {6, "case.name"},
                                      {8, "case.tags[1]"},
                                      {8, "case.tags[2]"},
                                      {10, "defaults.engine"}}));
}

TEST(Manifest, SizesAreBounded) {
    const std::string half(2047, 'a'), longest(4096, 'a');
    EXPECT_EQ(one_case(fmt::format("append = '''\n{}\n{}\n'''", half, half)).append.size(), longest.size());
    EXPECT_NE(said(fmt::format("append = '''\n{}b\n'''", longest))
                  .find("expected at most 4096 bytes in a line, not 4097"),
              std::string::npos);
    EXPECT_NE(said(fmt::format("append = '''\n{}\nb'''", longest))
                  .find("4:10: case.append: expected at most 4096 bytes, not 4098"),
              std::string::npos);
    EXPECT_NE(said(fmt::format("append = {}", std::string(200, '['))).find("no TOML: "), std::string::npos);
    // Each part of a key is a table in a table: the longest keys there can be.
    std::string key = "a";
    while (key.size() < 2030)
        key += ".a";
    std::string text = fmt::format("[{}]\n{} = ", key, key);
    for (int i = 0; i < 2; ++i)
        text += fmt::format("[\n{{ {} = ", key);
    text += "1 }\n] }\n]\n";
    EXPECT_NE(all(parse(text).errors).find("1:2: a: unknown key"), std::string::npos)
        << all(parse(text).errors);
    EXPECT_NE(said(fmt::format("bounds.{} = {{max=1}}", key)).find("expected a number of --stats=json"),
              std::string::npos);
}

TEST(Manifest, MessagesAreOneLine) {
    const std::string errors =
        said("engine = \"a\\nb\\u001b[2J\"\n\"k\\ny\" = 1\nmemory = \"1\\r\\n\"\ncpu = \"+\\n\"");
    EXPECT_EQ(std::ranges::count(errors, '\n'), 4) << errors;
    EXPECT_TRUE(std::ranges::none_of(errors, [](char c) { return c == '\x1b' || c == '\r'; })) << errors;
}

TEST(Manifest, WhateverIsInItIsCasesOrErrors) {
    const std::string example(example_manifest());
    std::size_t with_errors = 0;
    for (std::size_t size = 0; size < example.size(); size += 7) {
        const Cases read = parse(std::string_view(example).substr(0, size));
        EXPECT_NE(read.cases.empty(), read.errors.empty()) << size;
        with_errors += read.errors.empty() ? 0 : 1;
    }
    EXPECT_GT(with_errors, 0U);
    for (std::size_t at = 0; at < example.size(); at += 3)
        for (const char damage : {'\0', '"', '[', '=', '.', '\n', '\xff', '9'}) {
            std::string damaged = example;
            damaged[at] = damage;
            const Cases read = parse(damaged);
            EXPECT_NE(read.cases.empty(), read.errors.empty()) << at;
            for (const ManifestError& error : read.errors)
                EXPECT_FALSE(error.problem.empty());
        }
}

// --- The example

TEST(ManifestExample, IsRightAndHasEveryKey) {
    const std::vector<TestCase> read = cases(example_manifest());
    EXPECT_EQ(names(read),
              (Strings{"guests/boot", "guests/drivers", "guests/bad-checksum", "guests/panic", "guests/shell",
                       "guests/memory[memory=64M,tlb=natural]", "guests/memory[memory=64M,tlb=stale]",
                       "guests/memory[memory=64M,tlb=eager]", "guests/memory[memory=1G,tlb=natural]",
                       "guests/memory[memory=1G,tlb=stale]", "guests/memory[memory=1G,tlb=eager]"}));
    // An unknown key lists the known ones.
    const std::string errors = said("xyzzyplugh = 1");
    std::string known = errors.substr(errors.find("expected ") + std::string_view("expected ").size());
    std::ranges::replace(known, ',', ' ');
    std::istringstream words(known);
    std::size_t count = 0;
    for (std::string word; words >> word;) {
        if (word == "or")
            continue;
        const std::string text = "\n" + std::string(example_manifest());
        EXPECT_TRUE(text.find("\n" + word + " ") != std::string::npos ||
                    text.find("\n[case." + word + "]") != std::string::npos)
            << word;
        ++count;
    }
    EXPECT_EQ(count, 22U);
}

// --- Files

class ManifestFiles : public ::testing::Test {
  public:
    ManifestFiles() {
        std::string name = (fs::temp_directory_path() / "umbra-manifests-XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr)
            throw std::runtime_error("no temporary folder");
        folder = fs::canonical(name);
    }
    ~ManifestFiles() override {
        std::error_code ignored;
        fs::remove_all(folder, ignored);
    }
    ManifestFiles(const ManifestFiles&) = delete;
    ManifestFiles& operator=(const ManifestFiles&) = delete;
    ManifestFiles(ManifestFiles&&) = delete;
    ManifestFiles& operator=(ManifestFiles&&) = delete;

    std::string path(const std::string& name) const { return (folder / name).string(); }
    void write(const std::string& name, std::string_view text = "[[case]]\nname='c'\nkernel='k'\n") const {
        fs::create_directories((folder / name).parent_path());
        std::ofstream(folder / name) << text;
    }
    Discovery find(std::initializer_list<std::string> below) const {
        Strings paths;
        for (const std::string& name : below)
            paths.push_back(path(name));
        return find_manifests(paths);
    }
    /// Without the temporary folder's name.
    Strings below(const Strings& paths) const {
        Strings found;
        for (const std::string& name : paths)
            found.push_back(fs::path(name).lexically_relative(folder).string());
        return found;
    }
    std::string text_of(const std::vector<ManifestError>& errors) const {
        std::string text = all(errors);
        for (std::size_t at = 0; (at = text.find(folder.string())) != std::string::npos;)
            text.replace(at, folder.string().size(), "DIR");
        return text;
    }

    fs::path folder;
};

TEST_F(ManifestFiles, AFolderMeansAllBelowItSorted) {
    write("z/umbra.toml");
    write("a/deep/er/umbra.toml");
    write("a/umbra.toml");
    write("umbra.toml");
    write("a/other.toml");
    write("a/umbra.toml.orig");
    const Discovery found = find({""});
    EXPECT_EQ(below(found.manifests),
              (Strings{"a/deep/er/umbra.toml", "a/umbra.toml", "umbra.toml", "z/umbra.toml"}));
    EXPECT_TRUE(found.kernels.empty());
    EXPECT_TRUE(found.errors.empty());
}

TEST_F(ManifestFiles, HiddenAndBuildFoldersAreSearchedOnlyIfNamed) {
    write("umbra.toml");
    write(".git/umbra.toml");
    write("build/umbra.toml");
    write("build/CMakeCache.txt", "");
    write("target/debug/umbra.toml");
    write("target/CACHEDIR.TAG", "");
    EXPECT_EQ(below(find({""}).manifests), Strings{"umbra.toml"});
    EXPECT_EQ(below(find({"build", ".git", "target"}).manifests),
              (Strings{"build/umbra.toml", ".git/umbra.toml", "target/debug/umbra.toml"}));
}

TEST_F(ManifestFiles, LoopsOfLinksDoNoHarm) {
    write("a/umbra.toml");
    write("outside.toml");
    fs::create_directory_symlink("..", folder / "a/up");
    fs::create_directory_symlink("a", folder / "again");
    fs::create_symlink("self", folder / "a/self");
    fs::create_symlink("nowhere", folder / "a/dangling");
    EXPECT_EQ(below(find({""}).manifests), Strings{"a/umbra.toml"});
    EXPECT_EQ(text_of(find({""}).errors), "");
    // One that is named is followed, and its files are known again.
    EXPECT_EQ(below(find({"again"}).manifests), Strings{"again/umbra.toml"});
    EXPECT_EQ(below(find({"again", "a", "a/umbra.toml"}).manifests), Strings{"again/umbra.toml"});
    // A manifest may be a link itself; if it leads nowhere, that is not passed over.
    fs::create_directory(folder / "b");
    fs::create_symlink("../outside.toml", folder / "b/umbra.toml");
    EXPECT_EQ(below(find({"b"}).manifests), Strings{"b/umbra.toml"});
    fs::create_directory(folder / "c");
    fs::create_symlink("nowhere", folder / "c/umbra.toml");
    EXPECT_EQ(text_of(load_cases(Strings{path("c")}, folder).errors),
              "DIR/c/umbra.toml: cannot be read: No such file or directory\n");
}

TEST_F(ManifestFiles, FilesAreManifestsOrKernels) {
    write("smoke.toml");
    write("kernel.elf", "\x7f"
                        "ELF");
    const Discovery found = find({"kernel.elf", "smoke.toml", "kernel.elf", "missing.toml"});
    EXPECT_EQ(below(found.manifests), (Strings{"smoke.toml", "missing.toml"}));
    EXPECT_EQ(below(found.kernels), Strings{"kernel.elf"});
    const Cases read = load_cases(Strings{path("kernel.elf"), path("smoke.toml")}, folder);
    EXPECT_EQ(text_of(read.errors), "");
    EXPECT_EQ(names(read.cases), (Strings{"smoke/c", "kernel.elf"}));
    ASSERT_EQ(read.cases.size(), 2U);
    EXPECT_EQ(read.cases[1].kernel, path("kernel.elf"));
    EXPECT_EQ(read.cases[1].manifest, "");
    EXPECT_EQ(read.cases[1].expected, Outcome::passed);
}

TEST_F(ManifestFiles, WhatCannotBeFoundOrReadIsTold) {
    fs::create_directory(folder / "empty");
    fs::create_directory(folder / "folder.toml");
    fs::create_directories(folder / "odd/umbra.toml");
    write("large.toml", std::string(maximum_manifest_size + 1, '\n'));
    write("largest.toml", "[[case]]\nname='c'\nkernel='k'" + std::string(maximum_manifest_size - 28, '\n'));
    ASSERT_EQ(::mkfifo(path("pipe.toml").c_str(), 0600), 0);
    ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
    const auto errors = [&](const std::string& name) {
        return text_of(load_cases(Strings{path(name)}, folder).errors);
    };
    EXPECT_EQ(errors("empty"), "DIR/empty: no umbra.toml in it or below it\n");
    EXPECT_EQ(errors("odd"), "DIR/odd: no umbra.toml in it or below it\n");
    EXPECT_EQ(errors("missing"), "DIR/missing: No such file or directory\n");
    EXPECT_EQ(errors("missing.toml"), "DIR/missing.toml: cannot be read: No such file or directory\n");
    EXPECT_EQ(errors("folder.toml"), "DIR/folder.toml: no umbra.toml in it or below it\n");
    EXPECT_EQ(errors("pipe"), "DIR/pipe: neither a folder, a manifest nor a kernel\n");
    EXPECT_EQ(errors("pipe.toml"), "DIR/pipe.toml: cannot be read: not a regular file\n");
    EXPECT_EQ(errors("large.toml"), "DIR/large.toml: cannot be read: more than 1024 KiB\n");
    EXPECT_EQ(errors("largest.toml"), "");
    // The others are read all the same, and their mistakes told.
    write("bad.toml", "x = 1");
    write("good.toml");
    const Cases read = load_cases(Strings{path("bad.toml"), path("good.toml"), path("missing")}, folder);
    EXPECT_EQ(names(read.cases), Strings{"good/c"});
    EXPECT_EQ(read.errors.size(), 2U);
}

TEST_F(ManifestFiles, UnreadableFilesAndFoldersAreTold) {
    if (::geteuid() == 0)
        GTEST_SKIP() << "root may read everything";
    write("a/umbra.toml");
    write("closed/umbra.toml");
    fs::permissions(folder / "a/umbra.toml", fs::perms::none);
    fs::permissions(folder / "closed", fs::perms::none);
    const std::string errors = text_of(load_cases(Strings{path("")}, folder).errors);
    fs::permissions(folder / "closed", fs::perms::owner_all);
    EXPECT_NE(errors.find("cannot be searched: Permission denied"), std::string::npos) << errors;
    EXPECT_NE(errors.find("DIR/a/umbra.toml: cannot be read: Permission denied"), std::string::npos)
        << errors;
}

TEST_F(ManifestFiles, NamesAreOfOneCaseInARun) {
    write("umbra.toml", "[[case]]\nname='first'\nkernel='k'\n");
    write("smoke.toml");
    write("smoke/umbra.toml");
    const Cases read = load_cases(Strings{path(""), path("smoke.toml")}, folder);
    EXPECT_EQ(names(read.cases), (Strings{"smoke/c", "first"}));
    EXPECT_EQ(text_of(read.errors), "DIR/smoke.toml:1:1: expected cases with names of their own, not "
                                    "'smoke/c' as in DIR/smoke/umbra.toml\n");
}

TEST_F(ManifestFiles, PathsAreFromTheManifestsFolder) {
    write("tests/umbra.toml", "[[case]]\nname='c'\nkernel='../out/k'\ninitrd='i'\nmodules=['m,x=../y']\n");
    fs::create_directories(folder / "elsewhere/deep");
    fs::create_directory_symlink("elsewhere/deep", folder / "link");
    write("link/umbra.toml", "[[case]]\nname='c'\nkernel='../k'\n");
    const Cases read = load_cases(Strings{path("tests"), path("link")}, folder);
    ASSERT_EQ(names(read.cases), (Strings{"tests/c", "link/c"})) << text_of(read.errors);
    EXPECT_EQ(read.cases[0].kernel, path("out/k"));
    EXPECT_EQ(read.cases[0].initrd, path("tests/i"));
    EXPECT_EQ(read.cases[0].modules, Strings{path("tests/m") + ",x=../y"});
    EXPECT_EQ(read.cases[1].kernel, path("elsewhere/k")); // ".." is what it is for the kernel
    write("a,b/umbra.toml", "[[case]]\nname='c'\nkernel='k'\nmodules=['m']\n");
    EXPECT_EQ(text_of(load_cases(Strings{path("a,b")}, folder).errors),
              "DIR/a,b/umbra.toml:4:10: case.modules[0]: expected a path without commas, not 'DIR/a,b/m': "
              "what follows "
              "one is told the kernel\n");
}

TEST_F(ManifestFiles, WithoutAPathTheCurrentFolderIsMeant) {
    write("a/umbra.toml");
    const fs::path before = fs::current_path();
    fs::current_path(folder);
    const Discovery found = find_manifests({});
    const Cases read = load_cases({}, folder);
    fs::current_path(before);
    EXPECT_EQ(found.manifests, Strings{"a/umbra.toml"});
    EXPECT_EQ(names(read.cases), Strings{"a/c"});
}

} // namespace
} // namespace umbra
