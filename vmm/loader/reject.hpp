// How the loader refuses what it was given.
#pragma once

#include "shadow/address.hpp"
#include "vmm/error.hpp"

#include <cstdint>
#include <utility>

#include <fmt/core.h>

namespace umbra {

/// Throws StartupError(bad_usage) with the formatted message.
template<class... Args>
[[noreturn]] void reject(fmt::format_string<Args...> format, Args&&... args) {
    throw StartupError(ExitCode::bad_usage, fmt::format(format, std::forward<Args>(args)...));
}

/// MiB of guest memory that reach up to `end`, rounded up; for messages that tell how much is needed.
inline std::uint64_t mebibytes_up_to(GuestPhys end) {
    constexpr unsigned mib_shift = 20;
    const std::uint64_t whole = end.value() >> mib_shift;
    return whole + (end > GuestPhys{whole << mib_shift} ? 1 : 0);
}

} // namespace umbra
