#include "vmm/log.hpp"

#include <utility>

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

namespace umbra {
namespace {

spdlog::level::level_enum level_of(LogLevel level) {
    switch (level) {
    case LogLevel::debug:
        return spdlog::level::debug;
    case LogLevel::info:
        return spdlog::level::info;
    case LogLevel::warning:
        return spdlog::level::warn;
    case LogLevel::error:
        break;
    }
    return spdlog::level::err;
}

} // namespace

void set_up_log(const std::string& level) {
    auto logger = spdlog::stderr_color_mt("umbra");
    logger->set_pattern("%^umbra: %v%$");
    logger->set_level(spdlog::level::from_str(level));
    spdlog::set_default_logger(std::move(logger));
}

bool log_shows(LogLevel level) {
    return spdlog::should_log(level_of(level));
}

void log_line(LogLevel level, std::string_view line) {
    spdlog::log(level_of(level), line);
}

} // namespace umbra
