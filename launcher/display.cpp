#include "launcher/display.hpp"

#include "vmm/error.hpp"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <span>
#include <string_view>

#include <fmt/core.h>

namespace umbra {
namespace {

// The other screen of the terminal, cleared, without wrapping at the end of lines; and back.
constexpr std::string_view take_terminal = "\x1b[?1049h\x1b[?7l\x1b[2J";
constexpr std::string_view return_terminal = "\x1b[0m\x1b[?25h\x1b[?7h\x1b[?1049l";

/// The three colour bits: blue is the VGA's lowest, red is the terminal's.
unsigned terminal_colour(unsigned vga) {
    return (vga & 2) | (vga & 1) << 2 | (vga >> 2 & 1);
}

std::string rendition(std::uint8_t attribute) {
    constexpr unsigned foreground = 30, bright_foreground = 90, background = 40;
    const unsigned first = (attribute & 0x08) != 0 ? bright_foreground : foreground;
    return fmt::format("\x1b[0;{};{}{}m", first + terminal_colour(attribute & 7U),
                       background + terminal_colour(attribute >> 4 & 7U),
                       (attribute & 0x80) != 0 ? ";5" : "");
}

std::span<const VgaCell> line_of(const VgaScreen& screen, std::size_t row) {
    return std::span(screen.cells).subspan(row * vga_columns, vga_columns);
}

} // namespace

std::string draw_screen(const VgaScreen& screen, const VgaScreen* shown) {
    if (shown != nullptr && screen == *shown)
        return {};
    std::string text = "\x1b[?25l"; // the cursor would be seen to run along
    for (std::size_t row = 0; row < vga_rows; ++row) {
        const auto line = line_of(screen, row);
        if (shown != nullptr && std::ranges::equal(line, line_of(*shown, row)))
            continue;
        text += fmt::format("\x1b[{};1H", row + 1);
        std::optional<std::uint8_t> attribute;
        for (const VgaCell& cell : line) {
            if (attribute != cell.attribute)
                text += rendition(cell.attribute);
            attribute = cell.attribute;
            text += vga_character(cell.character);
        }
    }
    text += "\x1b[0m";
    if (screen.cursor)
        text += fmt::format("\x1b[{};{}H\x1b[?25h", *screen.cursor / vga_columns + 1,
                            *screen.cursor % vga_columns + 1);
    return text;
}

std::optional<std::string> save_screen(const std::string& file, const VgaScreen& screen) {
    const std::string text = vga_text(screen);
    std::FILE* const out = std::fopen(file.c_str(), "we");
    if (out == nullptr)
        return std::strerror(errno);
    const bool written = std::fwrite(text.data(), 1, text.size(), out) == text.size();
    const int problem = errno;
    if (std::fclose(out) != 0)
        return std::strerror(errno);
    return written ? std::nullopt : std::optional<std::string>(std::strerror(problem));
}

void require_terminal(int fd) {
    if (::isatty(fd) == 0)
        throw StartupError(ExitCode::bad_usage, "--display text needs a terminal on standard output; "
                                                "--screen FILE keeps the last screen without one");
}

TextDisplay::TextDisplay(int fd, Source source) : fd_(fd), source_(std::move(source)) {
    require_terminal(fd);
    thread_ = std::jthread([this](const std::stop_token& stop) { show(stop); });
}

TextDisplay::~TextDisplay() {
    thread_.request_stop();
    thread_.join();
    std::string last = vga_text(source_());
    last.resize(last.find_last_not_of('\n') + 1); // npos + 1 is 0
    (void)(write(return_terminal) && write(last) && write(last.empty() ? "" : "\n"));
}

void TextDisplay::show(const std::stop_token& stop) {
    using namespace std::chrono_literals;
    constexpr auto interval = 50ms;
    constexpr unsigned draws_anew = 20; // once a second: something else may have written to the terminal
    std::optional<VgaScreen> shown;
    if (!write(take_terminal))
        return;
    for (unsigned turn = 0; !stop.stop_requested(); ++turn) {
        const VgaScreen screen = source_();
        const bool anew = !shown || turn % draws_anew == 0;
        if (!write(draw_screen(screen, anew ? nullptr : &*shown)))
            return;
        shown = screen;
        std::unique_lock lock(mutex_);
        (void)woken_.wait_for(lock, stop, interval, [] { return false; });
    }
}

/// False if the terminal does not take it: it is gone, or somebody has stopped it.
bool TextDisplay::write(std::string_view text) const {
    constexpr int patience_ms = 1000;
    while (!text.empty()) {
        pollfd ready{fd_, POLLOUT, 0};
        if (::poll(&ready, 1, patience_ms) == 0)
            return false;
        const ssize_t written = ::write(fd_, text.data(), text.size());
        if (written >= 0)
            text.remove_prefix(static_cast<std::size_t>(written));
        else if (errno != EINTR && errno != EAGAIN)
            return false;
    }
    return true;
}

} // namespace umbra
