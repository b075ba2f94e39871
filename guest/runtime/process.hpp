// How a guest ends: by QEMU's isa-debug-exit convention, and by the checks that fail on the way.
#pragma once

#include <cstdint>

namespace umbra::guest {

/// Exit codes that the runtime itself uses; kernels take small numbers.
inline constexpr std::uint32_t exit_check_failed = 101;
inline constexpr std::uint32_t exit_unexpected_trap = 102;
inline constexpr std::uint32_t exit_out_of_memory = 103;

/// Ends the run. 0 is success, everything else failure. Prints what the console still holds.
extern "C" [[noreturn]] void exit_guest(std::uint32_t code);

/// Says which check did not hold, and ends the run with `exit_check_failed`.
[[noreturn]] void check_failed(const char* file, int line, const char* expression);
/// As above, for two values that should have been equal.
[[noreturn]] void check_failed(const char* file, int line, const char* expression, std::uint64_t actual,
                               std::uint64_t expected);

inline void check_equal(const char* file, int line, const char* expression, std::uint64_t actual,
                        std::uint64_t expected) {
    if (actual != expected)
        check_failed(file, line, expression, actual, expected);
}

} // namespace umbra::guest

/// The run goes on only if `condition` holds.
#define CHECK(condition)                                                                                     \
    ((condition) ? static_cast<void>(0) : ::umbra::guest::check_failed(__FILE__, __LINE__, #condition))

/// The run goes on only if the two numbers are equal; otherwise both are printed.
#define CHECK_EQ(actual, expected)                                                                           \
    ::umbra::guest::check_equal(__FILE__, __LINE__, #actual " == " #expected,                                \
                                static_cast<std::uint64_t>(actual), static_cast<std::uint64_t>(expected))
