// A guest's text screen: on the terminal while the guest runs, and in a file afterwards.
#pragma once

#include "vmm/devices/vga.hpp"

#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

namespace umbra {

/// What a terminal (ECMA-48) draws `screen` by: all of it, or, where `shown` is what it shows, the lines that
/// differ. Empty if nothing is to be done.
[[nodiscard]] std::string draw_screen(const VgaScreen& screen, const VgaScreen* shown);

/// Writes the screen's lines to a file. Returns what went wrong, if anything did.
[[nodiscard]] std::optional<std::string> save_screen(const std::string& file, const VgaScreen& screen);

/// Shows the screen on a terminal while this lives, up to 20 times a second, and leaves its last lines there.
/// To be made after Attendant, whose signals its thread must not take.
class TextDisplay {
  public:
    /// Called on a thread of the display's.
    using Source = std::function<VgaScreen()>;

    /// `fd` stays the caller's. StartupError(bad_usage) unless it is a terminal.
    TextDisplay(int fd, Source source);
    TextDisplay(const TextDisplay&) = delete;
    TextDisplay& operator=(const TextDisplay&) = delete;
    TextDisplay(TextDisplay&&) = delete;
    TextDisplay& operator=(TextDisplay&&) = delete;
    ~TextDisplay();

  private:
    void show(const std::stop_token& stop);
    [[nodiscard]] bool write(std::string_view text) const;

    int fd_;
    Source source_;
    std::mutex mutex_;
    std::condition_variable_any woken_;
    std::jthread thread_;
};

/// StartupError(bad_usage) unless `fd` is a terminal: to be asked before the guest is started.
void require_terminal(int fd);

} // namespace umbra
