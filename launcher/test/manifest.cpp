// Finding and reading manifests: from TOML to test cases, with every mistake told by file, line and key.
//
// Reading order: Reader::keys (what a case can say), the functions named there, Reader::test_case,
// Reader::expand.
#include "launcher/test/manifest.hpp"

#include "launcher/test/console_watch.hpp"
#include "launcher/test/manifest_words.hpp"

#include "vmm/cpu_model.hpp"
#include "vmm/error.hpp"
#include "vmm/loader/kernel_file.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/stats.hpp"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <system_error>
#include <tuple>
#include <utility>

#include <fmt/core.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

namespace umbra {

namespace {

/// A manifest that toml++ did not expect.
struct ParserViolation {};
constexpr void require(bool condition) {
    if (!condition)
        throw ParserViolation();
}

} // namespace

} // namespace umbra

// The library as a header, in this file only, and only its parser. Up to version 3.4 some text that is no
// TOML, such as "[[[", breaks a condition that it asserts, or with NDEBUG takes for granted. Here that is one
// more error.
#undef NDEBUG
#define TOML_ASSERT(...) umbra::require(static_cast<bool>(__VA_ARGS__))
#define TOML_ENABLE_FORMATTERS 0
#define TOML_MAX_NESTED_VALUES 6
#include <toml++/toml.h>

namespace umbra {

namespace {

namespace fs = std::filesystem;

/// Bytes of a line. Keys lie in one line, and toml++ keeps a key of n parts as n tables in each other, which
/// it frees recursively: this bounds n.
constexpr std::size_t maximum_line = 4096;
constexpr std::size_t maximum_text = 4096; ///< bytes of a string
constexpr std::size_t maximum_name = 100;  ///< bytes of a case's own name
constexpr double maximum_seconds = 24 * 60 * 60;

// --- Words for messages

std::string_view kind(const toml::node& node) {
    switch (node.type()) {
    case toml::node_type::none:
        break;
    case toml::node_type::table:
        return "a table";
    case toml::node_type::array:
        return "a list";
    case toml::node_type::string:
        return "a string";
    case toml::node_type::integer:
    case toml::node_type::floating_point:
        return "a number";
    case toml::node_type::boolean:
        return "true or false";
    case toml::node_type::date:
    case toml::node_type::time:
    case toml::node_type::date_time:
        return "a date or time";
    }
    return "nothing";
}

// --- What the values mean

/// A time as "90s", "2m" or a bare number of seconds; nothing if it is none, or out of bounds.
std::optional<std::chrono::milliseconds> milliseconds(double seconds) {
    if (!(seconds >= 0.001 && seconds <= maximum_seconds)) // also a NaN
        return std::nullopt;
    return std::chrono::milliseconds(std::llround(seconds * 1000));
}
std::optional<std::chrono::milliseconds> milliseconds(std::string_view text) {
    double value = 0;
    const char* const end = text.data() + text.size();
    const auto number = std::from_chars(text.data(), end, value);
    if (number.ec != std::errc())
        return std::nullopt;
    const std::string_view unit(number.ptr, static_cast<std::size_t>(end - number.ptr));
    constexpr std::array<std::pair<std::string_view, double>, 5> units{
        {{"", 1}, {"ms", 0.001}, {"s", 1}, {"m", 60}, {"h", 3600}}};
    const auto* const known = std::ranges::find(units, unit, &std::pair<std::string_view, double>::first);
    return known == units.end() ? std::nullopt : milliseconds(value * known->second);
}

void collect_numbers(const nlohmann::ordered_json& json, const std::string& path,
                     std::set<std::string>& into) {
    if (json.is_number())
        into.insert(path);
    if (json.is_object())
        for (const auto& [key, value] : json.items())
            collect_numbers(value, path.empty() ? key : fmt::format("{}.{}", path, key), into);
}

/// The numbers of `--stats=json`, but for those of `instructions`, whose keys are what the guest did.
const std::set<std::string>& counters() {
    static const std::set<std::string> all = [] {
        Stats stats;
        stats.shadow = Stats::Shadow{};
        std::set<std::string> numbers;
        collect_numbers(nlohmann::ordered_json::parse(stats_json(stats)), "", numbers);
        return numbers;
    }();
    return all;
}

/// Options of `umbra run` that a case cannot have among its own, and the key that says the same; without a
/// key, those that the runner itself needs.
struct TakenOption {
    std::string_view option, key;
};
constexpr std::array taken_options{
    TakenOption{"-m", "memory"},
    TakenOption{"--memory", "memory"},
    TakenOption{"--append", "append"},
    TakenOption{"--initrd", "initrd"},
    TakenOption{"--module", "modules"},
    TakenOption{"--protocol", "protocol"},
    TakenOption{"--engine", "engine"},
    TakenOption{"--cpu", "cpu"},
    TakenOption{"--tlb", "tlb"},
    TakenOption{"--sanitize", "sanitize"},
    TakenOption{"--keyboard", "keyboard"},
    TakenOption{"--timeout", "timeout"},
    TakenOption{"--expect", "console.required"},
    TakenOption{"--serial", ""},
    TakenOption{"--stats", ""},
    TakenOption{"--trace", ""},
    TakenOption{"--core-on-failure", ""},
    TakenOption{"--qemu-exit", ""},
    TakenOption{"--log-level", ""},
    TakenOption{"--display", ""},
    TakenOption{"--gdb", ""},
    TakenOption{"--gdb-arch", ""},
    TakenOption{"--pause", ""},
    TakenOption{"--result", ""},
    TakenOption{"--end-stuck", ""},
    TakenOption{"--", "append"}, // the runner's own options come behind these
};

bool is_option(std::string_view text, std::string_view option) {
    if (!text.starts_with(option))
        return false;
    const std::string_view rest = text.substr(option.size());
    return rest.empty() || rest.front() == '=' || !option.starts_with("--"); // "-m64"
}

/// What names of cases begin with.
std::string name_prefix(const fs::path& file, const fs::path& base) {
    const fs::path folder =
        (base / file).lexically_normal().parent_path().lexically_relative(base.lexically_normal());
    std::string prefix = folder == "." ? "" : folder.generic_string() + "/";
    if (file.filename() != manifest_name)
        prefix += file.stem().string() + "/";
    return prefix;
}

/// The line that parsing `text` ends in with a ParserViolation, which does not say where.
unsigned violating_line(std::string_view text) {
    std::vector<std::size_t> ends; // of lines
    for (std::size_t end = 0; end < text.size(); ends.push_back(end))
        end = std::min(text.find('\n', end), text.size() - 1) + 1;
    const auto is_before = [&](std::size_t end) {
        try {
            (void)toml::parse(text.substr(0, end));
        } catch (const toml::parse_error&) {
            return true;
        } catch (const ParserViolation&) {
            return false;
        }
        return true;
    };
    return static_cast<unsigned>(std::ranges::partition_point(ends, is_before) - ends.begin()) + 1;
}

// --- The reader of one manifest

class Reader {
  public:
    Reader(const std::string& file, const fs::path& base)
        : file_(file), manifest_(absolute_path(base, file)), folder_(fs::path(manifest_).parent_path()),
          prefix_(name_prefix(file, base)) {}

    [[nodiscard]] Cases parse(std::string_view text);

  private:
    using Read = void (Reader::*)(const toml::node& node, const std::string& key, TestCase& into);
    struct Key {
        std::string_view name;
        Read read;
        bool may_vary = false; ///< may be in a matrix
    };
    static const std::vector<Key>& keys();
    static const Key* find_key(std::string_view name);
    static Words names_of_keys(bool in_matrix);

    /// A key of a matrix and its values, as they are written in names too.
    struct Dimension {
        const Key* key = nullptr;
        std::vector<std::pair<std::string, const toml::node*>> values;
    };
    using Matrix = std::vector<Dimension>;

    void problem(const toml::source_position& at, const std::string& key, std::string what);
    void problem(const toml::node& node, const std::string& key, std::string what);
    void expected(std::string_view what, const toml::node& node, const std::string& key);
    void check_lines(std::string_view text);
    [[nodiscard]] std::optional<toml::table> parse_toml(std::string_view text);

    // Values; nothing if the value is not as it should be, and then that has been told.
    std::optional<std::string> text(const toml::node& node, const std::string& key, bool may_be_empty = true);
    std::optional<std::string> pattern(const toml::node& node, const std::string& key);
    std::optional<std::size_t> one_of(const toml::node& node, const std::string& key, const Words& words);
    template<class OnItem>
    void each_item(const toml::node& node, const std::string& key, const OnItem& on_item);
    template<class OnKey>
    void each_key(const toml::table& table, const std::string& key, const Words& known, const OnKey& on_key);
    std::optional<std::string> own_name(const toml::node& node, const std::string& key);

    // The keys of a case.
    void kernel(const toml::node& node, const std::string& key, TestCase& into);
    void protocol(const toml::node& node, const std::string& key, TestCase& into);
    void memory(const toml::node& node, const std::string& key, TestCase& into);
    void cpus(const toml::node& node, const std::string& key, TestCase& into);
    void append(const toml::node& node, const std::string& key, TestCase& into);
    void initrd(const toml::node& node, const std::string& key, TestCase& into);
    void modules(const toml::node& node, const std::string& key, TestCase& into);
    void engine(const toml::node& node, const std::string& key, TestCase& into);
    void cpu(const toml::node& node, const std::string& key, TestCase& into);
    void tlb(const toml::node& node, const std::string& key, TestCase& into);
    void sanitize(const toml::node& node, const std::string& key, TestCase& into);
    void options(const toml::node& node, const std::string& key, TestCase& into);
    void keyboard(const toml::node& node, const std::string& key, TestCase& into);
    void timeout(const toml::node& node, const std::string& key, TestCase& into);
    void expect(const toml::node& node, const std::string& key, TestCase& into);
    void outcome(const toml::node& node, const std::string& key, TestCase& into);
    void code(const toml::node& node, const std::string& key, TestCase& into);
    void console(const toml::node& node, const std::string& key, TestCase& into);
    void conversation(const toml::node& node, const std::string& key, TestCase& into);
    void bounds(const toml::node& node, const std::string& key, TestCase& into);
    void bounds_below(const toml::table& table, const std::string& key, const std::string& path,
                      TestCase& into);
    void bound(const toml::table& table, const std::string& key, const std::string& counter, TestCase& into);
    void tags(const toml::node& node, const std::string& key, TestCase& into);
    void hosts(const toml::node& node, const std::string& key, TestCase& into);

    [[nodiscard]] Matrix matrix(const toml::node& node, const std::string& key);
    void not_in_matrix(const toml::table& table, const std::string& key, const Matrix& matrix);
    void defaults(const toml::node& node);
    void test_case(const toml::table& table);
    void expand(const toml::table& table, const TestCase& made, const Matrix& matrix);
    void add(const toml::table& table, TestCase made);

    const std::string file_;
    const std::string manifest_; ///< absolute
    const fs::path folder_;
    const std::string prefix_;
    TestCase defaults_;
    Matrix defaults_matrix_;
    std::map<std::string, unsigned> names_; ///< of cases without their matrices, and their lines
    std::set<std::string> full_names_;
    std::size_t count_ = 0; ///< of cases, with their matrices
    Cases result_;
};

const std::vector<Reader::Key>& Reader::keys() {
    static const std::vector<Key> all{
        {"kernel", &Reader::kernel, true},
        {"protocol", &Reader::protocol, true},
        {"memory", &Reader::memory, true},
        {"cpus", &Reader::cpus, true},
        {"append", &Reader::append, true},
        {"initrd", &Reader::initrd, true},
        {"modules", &Reader::modules},
        {"engine", &Reader::engine, true},
        {"cpu", &Reader::cpu, true},
        {"tlb", &Reader::tlb, true},
        {"sanitize", &Reader::sanitize, true},
        {"options", &Reader::options},
        {"keyboard", &Reader::keyboard},
        {"timeout", &Reader::timeout},
        {"expect", &Reader::expect},
        {"console", &Reader::console},
        {"conversation", &Reader::conversation},
        {"bounds", &Reader::bounds},
        {"tags", &Reader::tags},
        {"hosts", &Reader::hosts},
    };
    return all;
}

const Reader::Key* Reader::find_key(std::string_view name) {
    const auto found = std::ranges::find(keys(), name, &Key::name);
    return found == keys().end() ? nullptr : &*found;
}

Words Reader::names_of_keys(bool in_matrix) {
    Words names;
    for (const Key& key : keys())
        if (key.may_vary || !in_matrix)
            names.push_back(key.name);
    return names;
}

// --- Problems

void Reader::problem(const toml::source_position& at, const std::string& key, std::string what) {
    result_.errors.push_back({file_, at.line, at.column, key, std::move(what)});
}

void Reader::problem(const toml::node& node, const std::string& key, std::string what) {
    problem(node.source().begin, key, std::move(what));
}

void Reader::expected(std::string_view what, const toml::node& node, const std::string& key) {
    const auto* const string = node.as_string();
    problem(node, key,
            fmt::format("expected {}, not {}", what,
                        string == nullptr ? std::string(kind(node))
                                          : fmt::format("'{}'", printable(string->get()))));
}

void Reader::check_lines(std::string_view text) {
    for (unsigned line = 1; !text.empty(); ++line) {
        const std::size_t size = std::min(text.find('\n'), text.size());
        if (size > maximum_line)
            problem(toml::source_position{line, 1}, "",
                    fmt::format("expected at most {} bytes in a line, not {}", maximum_line, size));
        text.remove_prefix(std::min(size + 1, text.size()));
    }
}

// --- Values

std::optional<std::string> Reader::text(const toml::node& node, const std::string& key, bool may_be_empty) {
    const auto* const string = node.as_string();
    if (string == nullptr) {
        expected("a string", node, key);
        return std::nullopt;
    }
    std::string value = string->get();
    if (value.empty() && !may_be_empty)
        problem(node, key, "expected a string that is not empty");
    else if (value.size() > maximum_text)
        problem(node, key, fmt::format("expected at most {} bytes, not {}", maximum_text, value.size()));
    else if (value.find('\0') != std::string::npos)
        problem(node, key, "expected a string without the character U+0000");
    else
        return value;
    return std::nullopt;
}

std::optional<std::string> Reader::pattern(const toml::node& node, const std::string& key) {
    std::optional<std::string> value = text(node, key, false);
    if (!value)
        return std::nullopt;
    if (const auto wrong = pattern_problem(*value)) {
        problem(node, key,
                fmt::format("expected a regular expression (RE2), not '{}': {}", printable(*value),
                            printable(*wrong)));
        return std::nullopt;
    }
    return value;
}

std::optional<std::size_t> Reader::one_of(const toml::node& node, const std::string& key,
                                          const Words& words) {
    const auto* const string = node.as_string();
    if (string == nullptr) {
        expected(alternatives(words), node, key);
        return std::nullopt;
    }
    const auto found = std::ranges::find(words, std::string_view(string->get()));
    if (found == words.end()) {
        problem(node, key,
                fmt::format("expected {}, not '{}'{}", alternatives(words), printable(string->get()),
                            suggestion(string->get(), words)));
        return std::nullopt;
    }
    return static_cast<std::size_t>(found - words.begin());
}

template<class OnItem>
void Reader::each_item(const toml::node& node, const std::string& key, const OnItem& on_item) {
    const toml::array* const items = node.as_array();
    if (items == nullptr) {
        expected("a list", node, key);
        return;
    }
    std::size_t index = 0;
    for (const toml::node& item : *items)
        on_item(item, fmt::format("{}[{}]", key, index++));
}

template<class OnKey>
void Reader::each_key(const toml::table& table, const std::string& key, const Words& known,
                      const OnKey& on_key) {
    // toml++ sorts keys by name; a matrix wants them as they are written.
    std::vector<std::pair<const toml::key*, const toml::node*>> entries;
    for (const auto& [name, node] : table)
        entries.emplace_back(&name, &node);
    std::ranges::sort(entries, {}, [](const auto& entry) {
        const toml::source_position& at = entry.first->source().begin;
        return std::tuple(at.line, at.column);
    });
    for (const auto& [name, node] : entries) {
        const std::string path = fmt::format("{}{}{}", key, key.empty() ? "" : ".", printable(name->str()));
        if (std::ranges::find(known, name->str()) != known.end()) {
            on_key(name->str(), *node, path);
            continue;
        }
        std::string what = suggestion(name->str(), known);
        if (what.empty())
            what = "; expected " + alternatives(known);
        problem(name->source().begin, path, "unknown key" + what);
    }
}

std::optional<std::string> Reader::own_name(const toml::node& node, const std::string& key) {
    std::optional<std::string> name = text(node, key, false);
    if (!name)
        return std::nullopt;
    const bool good = name->size() <= maximum_name && name->find_first_of("/[]") == std::string::npos &&
                      std::ranges::none_of(*name, is_control) && name->front() != ' ' && name->back() != ' ';
    if (!good) {
        expected(
            fmt::format("a name of at most {} bytes without '/', '[', ']', control characters, and spaces "
                        "around it",
                        maximum_name),
            node, key);
        return std::nullopt;
    }
    return name;
}

// --- The keys of a case

void Reader::kernel(const toml::node& node, const std::string& key, TestCase& into) {
    if (const auto value = text(node, key, false))
        into.kernel = absolute_path(folder_, *value);
}

void Reader::protocol(const toml::node& node, const std::string& key, TestCase& into) {
    Words names;
    for (const KernelProtocol protocol : kernel_protocols)
        names.push_back(umbra::name(protocol));
    if (const auto choice = one_of(node, key, names))
        into.protocol = names[*choice];
}

void Reader::memory(const toml::node& node, const std::string& key, TestCase& into) {
    std::string size;
    if (const auto* const number = node.as_integer())
        size = std::to_string(number->get());
    else if (const auto* const string = node.as_string())
        size = string->get();
    else
        return expected("a size such as \"64M\", or a number of MiB", node, key);
    try {
        (void)parse_memory_size(size);
    } catch (const StartupError& error) {
        return problem(node, key, printable(error.what(), 300));
    }
    into.memory = size;
}

void Reader::cpus(const toml::node& node, const std::string& key, TestCase& /*into*/) {
    const auto* const number = node.as_integer();
    if (number == nullptr)
        expected("1", node, key);
    else if (number->get() != 1)
        problem(node, key, fmt::format("expected 1, not {}: a guest has one CPU", number->get()));
}

void Reader::append(const toml::node& node, const std::string& key, TestCase& into) {
    if (auto value = text(node, key))
        into.append = std::move(*value);
}

void Reader::initrd(const toml::node& node, const std::string& key, TestCase& into) {
    if (const auto value = text(node, key))
        into.initrd = value->empty() ? "" : absolute_path(folder_, *value);
}

void Reader::modules(const toml::node& node, const std::string& key, TestCase& into) {
    into.modules.clear();
    each_item(node, key, [&](const toml::node& item, const std::string& item_key) {
        const auto value = text(item, item_key, false);
        if (!value)
            return;
        const std::size_t comma = std::min(value->find(','), value->size());
        const std::string path = absolute_path(folder_, value->substr(0, comma));
        if (comma == 0)
            expected("FILE or FILE,ARGS", item, item_key);
        else if (path.find(',') != std::string::npos)
            problem(
                item, item_key,
                fmt::format("expected a path without commas, not '{}': what follows one is told the kernel",
                            printable(path)));
        else
            into.modules.push_back(path + value->substr(comma));
    });
}

void Reader::engine(const toml::node& node, const std::string& key, TestCase& into) {
    const Words words{"shadow", "native"};
    if (const auto choice = one_of(node, key, words))
        into.engine = words[*choice];
}

void Reader::cpu(const toml::node& node, const std::string& key, TestCase& into) {
    auto value = text(node, key);
    if (!value)
        return;
    try {
        if (!value->empty())
            (void)CpuChoice::parse(*value);
    } catch (const StartupError& error) {
        return problem(node, key, printable(error.what(), 300));
    }
    into.cpu = std::move(*value);
}

void Reader::tlb(const toml::node& node, const std::string& key, TestCase& into) {
    const Words words{"natural", "stale", "eager"};
    if (const auto choice = one_of(node, key, words))
        into.tlb = *choice == 0 ? "" : words[*choice];
}

void Reader::sanitize(const toml::node& node, const std::string& key, TestCase& into) {
    if (const auto choice = one_of(node, key, {"none", "tlb"}))
        into.sanitize_tlb = *choice == 1;
}

void Reader::options(const toml::node& node, const std::string& key, TestCase& into) {
    into.options.clear();
    each_item(node, key, [&](const toml::node& item, const std::string& item_key) {
        auto value = text(item, item_key, false);
        if (!value)
            return;
        const auto* const taken = std::ranges::find_if(
            taken_options, [&](const TakenOption& option) { return is_option(*value, option.option); });
        if (taken == taken_options.end())
            into.options.push_back(std::move(*value));
        else
            problem(item, item_key,
                    taken->key.empty()
                        ? fmt::format("expected another option: {} is the runner's", taken->option)
                        : fmt::format("expected the key {} instead of {}", taken->key, taken->option));
    });
}

void Reader::keyboard(const toml::node& node, const std::string& key, TestCase& into) {
    if (const auto* const value = node.as_boolean())
        into.keyboard = value->get();
    else
        expected("true or false", node, key);
}

void Reader::timeout(const toml::node& node, const std::string& key, TestCase& into) {
    std::optional<std::chrono::milliseconds> time;
    if (const auto number = node.is_number() ? node.value<double>() : std::nullopt)
        time = milliseconds(*number);
    else if (const auto* const string = node.as_string())
        time = milliseconds(std::string_view(string->get()));
    if (time)
        into.timeout = *time;
    else
        expected(fmt::format(R"(seconds, or a time such as "500ms", "90s", "2m" or "1h", from 1ms to {}h)",
                             maximum_seconds / 3600),
                 node, key);
}

void Reader::expect(const toml::node& node, const std::string& key, TestCase& into) {
    into.code.reset();
    const toml::table* const table = node.as_table();
    if (table == nullptr) {
        if (node.is_string())
            outcome(node, key, into);
        else
            expected(R"(an outcome such as "passed", or { outcome = "failed", code = 7 })", node, key);
        return;
    }
    each_key(*table, key, {"outcome", "code"},
             [&](std::string_view name, const toml::node& value, const std::string& value_key) {
                 name == "outcome" ? outcome(value, value_key, into) : code(value, value_key, into);
             });
    if (!table->contains("outcome"))
        problem(node, key + ".outcome", "missing: expected beside code");
    else if (into.code && into.expected != Outcome::failed)
        problem(node, key + ".code", "expected only with outcome = \"failed\"");
}

void Reader::outcome(const toml::node& node, const std::string& key, TestCase& into) {
    Words words(outcome_names.begin(), outcome_names.end());
    words.pop_back(); // nobody expects umbra to crash
    if (const auto choice = one_of(node, key, words))
        into.expected = static_cast<Outcome>(*choice);
}
static_assert(static_cast<std::size_t>(Outcome::crashed) == outcome_names.size() - 1);

void Reader::code(const toml::node& node, const std::string& key, TestCase& into) {
    const auto* const number = node.as_integer();
    if (number == nullptr)
        return expected("the guest's code, a whole number", node, key);
    if (number->get() < 1 || number->get() > UINT32_MAX)
        return problem(node, key,
                       fmt::format("expected a code from 1 to {}, not {}", UINT32_MAX, number->get()));
    into.code = static_cast<unsigned>(number->get());
}

void Reader::console(const toml::node& node, const std::string& key, TestCase& into) {
    const toml::table* const table = node.as_table();
    if (table == nullptr)
        return expected("a table { required = [...], forbidden = [...] }", node, key);
    into.required.clear();
    into.forbidden.clear();
    each_key(*table, key, {"required", "forbidden"},
             [&](std::string_view name, const toml::node& list, const std::string& list_key) {
                 std::vector<std::string>& patterns = name == "required" ? into.required : into.forbidden;
                 each_item(list, list_key, [&](const toml::node& item, const std::string& item_key) {
                     if (auto value = pattern(item, item_key))
                         patterns.push_back(std::move(*value));
                 });
             });
}

void Reader::conversation(const toml::node& node, const std::string& key, TestCase& into) {
    into.conversation.clear();
    each_item(node, key, [&](const toml::node& item, const std::string& item_key) {
        const toml::table* const table = item.as_table();
        if (table == nullptr)
            return expected(R"(a table { expect = "...", send = "..." })", item, item_key);
        Exchange exchange;
        each_key(*table, item_key, {"expect", "send"},
                 [&](std::string_view name, const toml::node& value, const std::string& value_key) {
                     if (name == "expect")
                         exchange.expect = pattern(value, value_key).value_or("");
                     else
                         exchange.send = text(value, value_key).value_or("");
                 });
        if (!table->contains("expect"))
            problem(item, item_key + ".expect",
                    "missing: expected what the guest prints before it is sent anything");
        into.conversation.push_back(std::move(exchange));
    });
}

void Reader::bounds(const toml::node& node, const std::string& key, TestCase& into) {
    into.bounds.clear();
    if (const toml::table* const table = node.as_table())
        bounds_below(*table, key, "", into);
    else
        expected("a table such as { \"traps.count\" = { max = 1000 } }", node, key);
}

/// "traps.count" = {…} as well as traps.count = {…}, which in TOML is a table in a table.
void Reader::bounds_below(const toml::table& table, const std::string& key, const std::string& path,
                          TestCase& into) {
    constexpr std::size_t longest = 200;
    for (const auto& [name, node] : table) {
        const std::string counter = fmt::format("{}{}{}", path, path.empty() ? "" : ".", name.str());
        const std::string counter_key = fmt::format("{}.{}", key, printable(name.str()));
        const toml::table* const inner = node.as_table();
        if (inner == nullptr) {
            expected("a table such as { max = 1000 }", node, counter_key);
            continue;
        }
        const bool has_tables = std::any_of(inner->begin(), inner->end(),
                                            [](const auto& entry) { return entry.second.is_table(); });
        if (has_tables && counter.size() <= longest)
            bounds_below(*inner, counter_key, counter, into);
        else
            bound(*inner, counter_key, counter, into);
    }
}

void Reader::bound(const toml::table& table, const std::string& key, const std::string& counter,
                   TestCase& into) {
    CounterBound made{counter, std::nullopt, std::nullopt};
    each_key(table, key, {"min", "max"},
             [&](std::string_view name, const toml::node& value, const std::string& value_key) {
                 const auto* const number = value.as_integer();
                 if (number == nullptr || number->get() < 0)
                     expected("a whole number, not below 0", value, value_key);
                 else
                     (name == "min" ? made.least : made.most) = static_cast<std::uint64_t>(number->get());
             });
    if (!table.contains("min") && !table.contains("max"))
        problem(table, key, "expected min, max or both");
    else if (made.least && made.most && *made.least > *made.most)
        problem(table, key,
                fmt::format("expected min not above max, not {} and {}", *made.least, *made.most));
    if (!counters().contains(counter) && !counter.starts_with("instructions."))
        problem(table, key,
                fmt::format("expected a number of --stats=json, such as traps.count, not '{}'{}",
                            printable(counter),
                            suggestion(counter, Words(counters().begin(), counters().end()))));
    if (std::ranges::find(into.bounds, counter, &CounterBound::counter) != into.bounds.end())
        problem(table, key, fmt::format("expected one bound of {}, not two", printable(counter)));
    into.bounds.push_back(std::move(made));
}

void Reader::tags(const toml::node& node, const std::string& key, TestCase& into) {
    into.tags.clear();
    each_item(node, key, [&](const toml::node& item, const std::string& item_key) {
        auto value = text(item, item_key, false);
        if (!value)
            return;
        const bool good = value->front() != '-' && std::ranges::none_of(*value, [](char c) {
                              return is_control(c) || std::strchr(" ,*?", c) != nullptr;
                          });
        if (good)
            into.tags.push_back(std::move(*value));
        else // as --tag could not choose it
            expected("a tag without spaces, ',', '*' and '?', that does not begin with '-'", item, item_key);
    });
}

void Reader::hosts(const toml::node& node, const std::string& key, TestCase& into) {
    into.hosts.clear();
    each_item(node, key, [&](const toml::node& item, const std::string& item_key) {
        const auto* const string = item.as_string();
        std::string_view name = string == nullptr ? "" : std::string_view(string->get());
        if (name.starts_with('!'))
            name.remove_prefix(1);
        if (std::ranges::find(host_trait_names, name) != host_trait_names.end())
            into.hosts.push_back(string->get());
        else
            (void)one_of(item, item_key, {host_trait_names.begin(), host_trait_names.end()}); // tells why not
    });
}

// --- Cases

Reader::Matrix Reader::matrix(const toml::node& node, const std::string& key) {
    Matrix made;
    const toml::table* const table = node.as_table();
    if (table == nullptr) {
        expected(R"(a table such as { memory = ["64M", "1G"] })", node, key);
        return made;
    }
    each_key(*table, key, names_of_keys(true),
             [&](std::string_view name, const toml::node& list, const std::string& list_key) {
                 Dimension dimension{find_key(name), {}};
                 TestCase scratch; // the values are checked here, once
                 each_item(list, list_key, [&](const toml::node& item, const std::string& item_key) {
                     (this->*dimension.key->read)(item, item_key, scratch);
                     std::string label = item.is_integer() ? std::to_string(*item.value<std::int64_t>())
                                                           : item.value_or(std::string());
                     std::ranges::replace_if(label, is_control, '?');
                     const bool known = std::ranges::any_of(
                         dimension.values, [&](const auto& value) { return value.first == label; });
                     if (known && item.is_value())
                         problem(item, item_key, fmt::format("'{}' is there twice", printable(label)));
                     dimension.values.emplace_back(std::move(label), &item);
                 });
                 if (list.is_array() && dimension.values.empty())
                     problem(list, list_key, "expected at least one value");
                 made.push_back(std::move(dimension));
             });
    return made;
}

void Reader::not_in_matrix(const toml::table& table, const std::string& key, const Matrix& matrix) {
    for (const Dimension& dimension : matrix)
        if (const toml::node* const node = table.get(dimension.key->name))
            problem(*node, fmt::format("{}.{}", key, dimension.key->name),
                    "expected either here or in the matrix, not in both");
}

void Reader::defaults(const toml::node& node) {
    const toml::table* const table = node.as_table();
    if (table == nullptr)
        return expected("a table, [defaults]", node, "defaults");
    Words known = names_of_keys(false);
    known.insert(known.end(), {"matrix", "name"});
    each_key(*table, "defaults", known,
             [&](std::string_view name, const toml::node& value, const std::string& key) {
                 if (name == "matrix")
                     defaults_matrix_ = matrix(value, key);
                 else if (name == "name")
                     problem(value, key, "expected in each [[case]], not here");
                 else
                     (this->*find_key(name)->read)(value, key, defaults_);
             });
    not_in_matrix(*table, "defaults", defaults_matrix_);
}

void Reader::test_case(const toml::table& table) {
    TestCase made = defaults_;
    made.manifest = manifest_;
    made.line = table.source().begin.line;
    Matrix own_matrix = defaults_matrix_;
    Words known{"name"};
    std::ranges::move(names_of_keys(false), std::back_inserter(known));
    known.emplace_back("matrix");
    each_key(table, "case", known,
             [&](std::string_view name, const toml::node& value, const std::string& key) {
                 if (name == "name")
                     made.name = own_name(value, key).value_or("");
                 else if (name == "matrix")
                     own_matrix = matrix(value, key);
                 else
                     (this->*find_key(name)->read)(value, key, made);
             });
    not_in_matrix(table, "case", own_matrix);
    if (!table.contains("name"))
        problem(table, "case.name", "missing: expected a name for the case");
    if (!made.name.empty()) {
        const auto [first, is_new] = names_.emplace(made.name, made.line);
        if (!is_new)
            problem(
                *table.get("name"), "case.name",
                fmt::format("expected a name of its own, not '{}' as in line {}", made.name, first->second));
    }
    const bool varies = std::ranges::any_of(
        own_matrix, [](const Dimension& dimension) { return dimension.key->name == "kernel"; });
    if (made.kernel.empty() && !table.contains("kernel") && !varies)
        problem(table, "case.kernel", "missing: expected a kernel file here or in [defaults]");
    expand(table, made, own_matrix);
}

void Reader::expand(const toml::table& table, const TestCase& made, const Matrix& matrix) {
    std::size_t count = 1;
    for (const Dimension& dimension : matrix)
        count = std::min(count * dimension.values.size(), 2 * maximum_manifest_cases); // cannot overflow
    const bool fitted = count_ <= maximum_manifest_cases;
    count_ += count;
    if (fitted && count_ > maximum_manifest_cases)
        problem(table, "case.matrix",
                fmt::format("expected at most {} cases in a manifest, with all their matrices",
                            maximum_manifest_cases));
    if (!result_.errors.empty())
        return; // its cases would not be used
    for (std::size_t number = 0; number < count; ++number) {
        TestCase one = made;
        std::string values;
        // Its digits, in a system whose bases are the dimensions; the last one varies fastest.
        std::size_t left = number, weight = count;
        for (const Dimension& dimension : matrix) {
            weight /= dimension.values.size();
            const auto& [label, node] = dimension.values[left / weight];
            left %= weight;
            (this->*dimension.key->read)(*node, "case.matrix", one);
            values += fmt::format("{}{}={}", values.empty() ? "" : ",", dimension.key->name, label);
            one.parameters.emplace(dimension.key->name, label);
        }
        one.name = prefix_ + made.name + (values.empty() ? "" : fmt::format("[{}]", values));
        add(table, std::move(one));
        if (!result_.errors.empty())
            return;
    }
}

void Reader::add(const toml::table& table, TestCase made) {
    if (made.engine == "native" && (made.sanitize_tlb || !made.tlb.empty()))
        problem(
            table, "case.engine",
            fmt::format("expected engine shadow with tlb and sanitize, not native as in {}: it does not see "
                        "page tables",
                        printable(made.name)));
    if (!full_names_.insert(made.name).second) // of values with commas
        problem(table, "case.matrix",
                fmt::format("expected a name of its own for each case, not twice {}", printable(made.name)));
    result_.cases.push_back(std::move(made));
}

std::optional<toml::table> Reader::parse_toml(std::string_view text) {
    try {
        return toml::parse(text);
    } catch (const toml::parse_error& error) {
        problem(error.source().begin, "", fmt::format("no TOML: {}", printable(error.description(), 300)));
    } catch (const ParserViolation&) {
        problem(toml::source_position{violating_line(text), 1}, "",
                "no TOML: expected a key or a table's name");
    }
    return std::nullopt;
}

Cases Reader::parse(std::string_view text) {
    check_lines(text);
    if (!result_.errors.empty())
        return std::move(result_);
    const std::optional<toml::table> parsed = parse_toml(text);
    if (!parsed)
        return std::move(result_);
    const toml::table& root = *parsed;
    // Those that a case can use come first, wherever they stand.
    if (const toml::node* const node = root.get("defaults"))
        defaults(*node);
    each_key(root, "", {"defaults", "case"},
             [&](std::string_view name, const toml::node& node, const std::string&) {
                 if (name != "case")
                     return;
                 const toml::array* const list = node.as_array();
                 if (list == nullptr)
                     return expected("tables [[case]]", node, "case");
                 if (list->empty())
                     problem(node, "case", "expected at least one [[case]]");
                 for (const toml::node& item : *list) {
                     if (const toml::table* const table = item.as_table())
                         test_case(*table);
                     else
                         expected("a table, [[case]]", item, "case");
                 }
             });
    if (!root.contains("case") && result_.errors.empty()) // "cases" has been told
        problem(toml::source_position{0, 0}, "case", "missing: expected at least one [[case]]");
    if (!result_.errors.empty())
        result_.cases.clear();
    std::ranges::stable_sort(result_.errors, {},
                             [](const ManifestError& error) { return std::tuple(error.line, error.column); });
    return std::move(result_);
}

} // namespace

std::string describe(const ManifestError& error) {
    std::string text = error.file;
    if (error.line != 0)
        text += fmt::format(":{}:{}", error.line, error.column);
    if (!error.key.empty())
        text += ": " + error.key;
    return text + ": " + error.problem;
}

Cases parse_manifest(std::string_view text, const std::string& file, const fs::path& base) {
    return Reader(file, base).parse(text);
}

} // namespace umbra
