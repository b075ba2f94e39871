#include "launcher/test/command.hpp"

#include "launcher/test/annotations.hpp"
#include "launcher/test/example.hpp"
#include "launcher/test/json_lines.hpp"
#include "launcher/test/junit.hpp"
#include "launcher/test/manifest.hpp"
#include "launcher/test/progress.hpp"
#include "launcher/test/runner.hpp"
#include "launcher/test/selection.hpp"
#include "launcher/test/tap.hpp"
#include "launcher/test/text.hpp"
#include "vmm/error.hpp"
#include "vmm/loader/memory_size.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <string_view>
#include <system_error>
#include <utility>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

namespace umbra {
namespace {

namespace fs = std::filesystem;

template<class... Arguments>
[[noreturn]] void refuse(fmt::format_string<Arguments...> text, Arguments&&... arguments) {
    throw StartupError(ExitCode::bad_usage, fmt::format(text, std::forward<Arguments>(arguments)...));
}

// --- Which cases

int write_example(const std::vector<std::string>& paths) {
    if (paths.size() > 1)
        refuse("--init takes one folder");
    const fs::path folder = paths.empty() ? fs::path() : fs::path(paths.front());
    const fs::path file = folder / manifest_name;
    std::error_code error;
    if (fs::exists(file, error))
        refuse("'{}' is there already", file.native());
    require_replaceable(file);
    if (const auto problem = replace_file(file, example_manifest()))
        refuse("{}", *problem);
    (void)fmt::print("{}: an example with every key; edit it, then run umbra test\n", file.native());
    return 0;
}

std::uint64_t seed_of(const std::string& text) {
    if (text == "random")
        return std::random_device()();
    std::uint64_t seed = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seed);
    if (error != std::errc() || end != text.data() + text.size())
        refuse("--shuffle: '{}' is neither a number below 2^64 nor \"random\"", text);
    return seed;
}

/// Those of `cases` that the options leave.
std::vector<TestCase> select(std::vector<TestCase> cases, const TestOptions& options) {
    const std::size_t found = cases.size();
    cases = filter_by_tag(filter_by_name(std::move(cases), options.filters), options.tags);
    if (cases.empty()) {
        std::string asked;
        for (const std::string& pattern : options.filters)
            asked += fmt::format(" --filter={}", pattern);
        for (const std::string& tag : options.tags)
            asked += fmt::format(" --tag={}", tag);
        refuse("none of {} {} is left by{} (see umbra test --list)", found, found == 1 ? "case" : "cases",
               asked);
    }
    if (!options.shard.empty()) {
        const auto shard = parse_shard(options.shard);
        if (!shard)
            refuse("--shard: '{}' is not I/N with 1 <= I <= N <= {}", options.shard, maximum_shards);
        cases = take_shard(std::move(cases), *shard);
    }
    return cases;
}

void list_cases(const std::vector<TestCase>& cases, ListFormat format) {
    if (format == ListFormat::names) {
        for (const TestCase& test : cases)
            (void)std::puts(printable_line(test.name).c_str()); // a failure is told at the end
        return;
    }
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    for (const TestCase& test : cases)
        list.push_back({{"name", test.name},
                        {"manifest", test.manifest},
                        {"line", test.line},
                        {"kernel", test.kernel},
                        {"tags", test.tags},
                        {"parameters", test.parameters},
                        {"timeout_seconds", std::chrono::duration<double>(test.timeout).count()}});
    (void)std::puts(list.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace).c_str());
}

// --- What is told

/// Whether a line can be written again and again: a person looks at it.
bool is_live(int fd) {
    const char* const terminal = std::getenv("TERM");
    return ::isatty(fd) == 1 && terminal != nullptr && std::string_view(terminal) != "dumb" &&
           std::getenv("CI") == nullptr;
}

std::string github_base() {
    const char* const workspace = std::getenv("GITHUB_WORKSPACE");
    return workspace != nullptr && *workspace != '\0' ? std::string(workspace) : fs::current_path().native();
}

/// The folder for the results. All in it is made by umbra, and belongs in no repository.
void make_output(const std::string& folder) {
    std::error_code error;
    const bool made = fs::create_directories(folder, error);
    if (error)
        refuse("cannot make the folder '{}' for the results: {} (--output names another, or none)", folder,
               error.message());
    if (made) // of the same disk as what is told below: if that cannot be written, more will be said
        (void)replace_file(fs::path(folder) / ".gitignore", "*\n");
}

std::vector<std::unique_ptr<ResultSink>> make_sinks(const TestOptions& options, const std::string& output) {
    const std::array files{&options.junit, &options.tap, &options.json};
    if (std::ranges::count_if(files, [](const std::string* file) { return *file == "-"; }) > 1)
        refuse("only one of --junit, --tap and --json can go to standard output");
    std::vector<std::unique_ptr<ResultSink>> sinks;
    if (!output.empty())
        sinks.push_back(std::make_unique<JsonLinesSink>(fs::path(output) / results_file));
    if (!options.junit.empty())
        sinks.push_back(std::make_unique<JUnitSink>(options.junit));
    if (!options.tap.empty())
        sinks.push_back(std::make_unique<TapSink>(options.tap));
    if (!options.json.empty())
        sinks.push_back(std::make_unique<JsonLinesSink>(options.json));
    if (options.github)
        sinks.push_back(std::make_unique<AnnotationSink>("-", github_base()));
    return sinks;
}

ExitCode exit_code(const RunSummary& summary, bool allow_skips, bool all_written) {
    if (summary.interrupted)
        return ExitCode::interrupted;
    if (summary.failed != 0 || summary.not_run != 0 || !all_written)
        return ExitCode::guest_failed;
    if (summary.skipped != 0 && !allow_skips)
        return ExitCode::host_cannot;
    return ExitCode::passed;
}

} // namespace

int test_command(const TestOptions& options) {
    if (options.init)
        return write_example(options.paths);

    auto [cases, errors] = load_cases(options.paths, fs::current_path());
    for (const ManifestError& error : errors)
        (void)fmt::print(stderr, "{}\n", printable_line(describe(error)));
    if (!errors.empty())
        return static_cast<int>(ExitCode::bad_usage);
    cases = select(std::move(cases), options);
    if (options.list != ListFormat::none) {
        list_cases(cases, options.list);
        return 0;
    }

    RunnerConfig config;
    config.jobs = options.jobs;
    constexpr std::uint64_t most_memory = std::uint64_t{1} << 50; // of all guests together
    config.memory = options.memory.empty() ? 0 : parse_memory_size(options.memory, most_memory);
    config.repeat = options.repeat;
    config.until_failure = options.until_failure;
    config.fail_fast = options.fail_fast;
    config.output = options.output == "none" ? "" : options.output;
    config.keep_passed = options.keep_passed;
    config.trace = options.trace;
    config.core = options.core;
    if (!config.output.empty())
        make_output(config.output);
    const auto sinks = make_sinks(options, config.output);

    const bool results_on_stdout = options.tap == "-" || options.json == "-" || options.junit == "-";
    const int terminal = results_on_stdout ? STDERR_FILENO : STDOUT_FILENO;
    Progress progress(terminal, is_live(terminal), terminal_columns());
    config.tick = [&progress] { progress.tick(); };
    bool all_written = true;
    config.warn = [&](const std::string& text) {
        all_written = false;
        progress.say("umbra: " + text);
    };
    if (!options.shuffle.empty()) {
        const std::uint64_t seed = seed_of(options.shuffle);
        cases = shuffle_cases(std::move(cases), seed);
        progress.say(fmt::format("in the order of --shuffle={}", seed));
    }
    if (cases.empty())
        progress.say(fmt::format("no case falls to shard {}", options.shard));

    std::vector<ResultSink*> told{&progress};
    std::ranges::transform(sinks, std::back_inserter(told), &std::unique_ptr<ResultSink>::get);
    const RunSummary summary = run_cases(cases, config, told);
    for (const auto& sink : sinks) {
        if (const auto problem = sink->problem()) {
            all_written = false;
            (void)fmt::print(stderr, "umbra: {}\n", printable_line(*problem));
        }
    }
    return static_cast<int>(exit_code(summary, options.allow_skips, all_written));
}

} // namespace umbra
