// A test case: one guest, how it is run, and what is expected of it. What manifests are read into, and what
// the runner runs.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// Why a run ended, as far as a case can ask for it. The words of manifests and results are the enumerators'
/// names with '-' for '_'.
enum class Outcome : std::uint8_t {
    passed, ///< exit code 0
    failed, ///< the guest said so: a value other than 0 at port 0xf4 or 0x501
    triple_fault,
    reset,   ///< what kernels do that panic
    stopped, ///< umbra cannot go on with the guest
    timed_out,
    no_progress, ///< it halted, or jumped to itself, with interrupts off (`umbra run --end-stuck`)
    host_cannot, ///< this host cannot run it: a skip, unless hosts say otherwise
    bad_usage,   ///< a kernel file or an option that umbra refuses
    crashed,     ///< umbra itself died, or KVM or umbra could not go on in the midst of a run
};

/// In the enumerators' order.
inline constexpr std::array<std::string_view, 10> outcome_names{
    "passed",    "failed",      "triple-fault", "reset",     "stopped",
    "timed-out", "no-progress", "host-cannot",  "bad-usage", "crashed"};
[[nodiscard]] constexpr std::string_view name(Outcome outcome) {
    return outcome_names.at(static_cast<std::size_t>(outcome));
}

/// What a case can ask of its host, beside KVM (find_host_traits()); with a '!' before it,
/// that the host does not have it.
inline constexpr std::array<std::string_view, 8> host_trait_names{
    "native-ring0", "iopl", "cpuid", "stores-seen", "own-gdt", "exact-cpu", "exact-walks", "double-faults"};

/// A step of a scripted conversation with the guest.
struct Exchange {
    std::string expect; ///< to appear in what the console printed since the step before; a regular expression
                        ///< (pattern_problem())
    std::string send;   ///< then given to the guest, as its serial or keyboard input; empty: nothing
};

/// Bounds on a number of `--stats=json`, by its path in it: "traps.count", "shadow.fills",
/// "shadow.table_pages.high_water".
struct CounterBound {
    std::string counter;
    std::optional<std::uint64_t> least, most;
};

struct TestCase {
    std::string name;     ///< unique in a run: "FOLDER/CASE[memory=64M,engine=shadow]"
    std::string manifest; ///< the file that it is from; empty: a bare kernel
    unsigned line = 0;    ///< in it, where the case begins
    std::vector<std::string> tags;

    // How it is run: as `umbra run`'s options.
    std::string kernel;   ///< absolute path, as all paths here
    std::string protocol; ///< empty: automatic
    std::string memory;   ///< empty: `umbra run`'s default
    std::string append;
    std::string initrd;
    std::vector<std::string> modules; ///< FILE[,ARGS]
    std::string engine;               ///< empty: shadow
    std::string cpu;
    std::string tlb; ///< empty, "stale" or "eager"
    bool sanitize_tlb = false;
    std::vector<std::string> options; ///< any others, as they are
    bool keyboard = false;            ///< what is sent is typed on the keyboard

    // What is expected.
    std::chrono::milliseconds timeout{60'000};
    Outcome expected = Outcome::passed;
    std::optional<unsigned> code;       ///< with `failed`: the guest's value
    std::vector<std::string> required;  ///< regular expressions, found in the console's output in this order
    std::vector<std::string> forbidden; ///< and not found
    std::vector<Exchange> conversation;
    std::vector<CounterBound> bounds;
    std::vector<std::string> hosts; ///< [!]NAME of host_trait_names: otherwise a skip

    /// The values of the matrix that this case was made for, for reports.
    std::map<std::string, std::string> parameters;
};

} // namespace umbra
