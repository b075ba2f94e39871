// What umbra itself says on standard error, as far as --log-level lets it. Only log.cpp knows spdlog, whose
// headers make a file slow to compile.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include <fmt/core.h>

namespace umbra {

enum class LogLevel : std::uint8_t { debug, info, warning, error };

/// From now on lines look like "umbra: …". `level` is the least that is shown, by spdlog's name for it: also
/// "off".
void set_up_log(const std::string& level);

[[nodiscard]] bool log_shows(LogLevel level);
void log_line(LogLevel level, std::string_view line);

template<class... Args>
void log_debug(fmt::format_string<Args...> format, Args&&... args) {
    if (log_shows(LogLevel::debug))
        log_line(LogLevel::debug, fmt::format(format, std::forward<Args>(args)...));
}

template<class... Args>
void log_info(fmt::format_string<Args...> format, Args&&... args) {
    if (log_shows(LogLevel::info))
        log_line(LogLevel::info, fmt::format(format, std::forward<Args>(args)...));
}

template<class... Args>
void log_warning(fmt::format_string<Args...> format, Args&&... args) {
    if (log_shows(LogLevel::warning))
        log_line(LogLevel::warning, fmt::format(format, std::forward<Args>(args)...));
}

} // namespace umbra
