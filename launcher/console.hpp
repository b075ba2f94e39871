// The launcher's side of a guest's console: the terminal, the thread that attends to it, and what the user
// waits for.
#pragma once

#include "launcher/shared_input.hpp"
#include "vmm/devices/output.hpp"
#include "vmm/kvm/file.hpp"
#include "vmm/run_control.hpp"

#include <chrono>
#include <csignal>
#include <optional>
#include <span>
#include <string>
#include <thread>

#include <termios.h>

namespace umbra {

/// A terminal whose input reaches the guest key by key and unechoed, Ctrl-C and Ctrl-Z excepted, while this
/// lives. Nothing happens unless `fd` is a terminal and this process is in its foreground.
class GuestTerminal {
  public:
    explicit GuestTerminal(int fd);
    GuestTerminal(const GuestTerminal&) = delete;
    GuestTerminal& operator=(const GuestTerminal&) = delete;
    GuestTerminal(GuestTerminal&&) = delete;
    GuestTerminal& operator=(GuestTerminal&&) = delete;
    ~GuestTerminal() { restore(); }

    void take(); ///< again, after restore()
    void restore();

  private:
    int fd_;
    std::optional<termios> saved_;
};

/// Writes all of what a guest prints to a file descriptor, and looks for an expected text in it.
class GuestOutput {
  public:
    /// `fd` stays the caller's. `expected`: empty for none.
    GuestOutput(int fd, std::string expected, RunControl& control)
        : fd_(fd), expected_(std::move(expected)), control_(control) {}

    [[nodiscard]] OutputSink sink() {
        return [this](std::span<const char> text) { write(text); };
    }
    /// The reason for which output was lost; empty if none was.
    [[nodiscard]] const std::string& failure() const { return failure_; }

  private:
    void write(std::span<const char> text);
    void search(std::span<const char> text);
    [[nodiscard]] bool writable();

    int fd_;
    std::string expected_;
    std::string tail_; ///< the end of the output so far, in which `expected_` may have begun
    RunControl& control_;
    std::string failure_;
};

/// A thread that turns signals, the timeout and terminal input into requests to the vCPU. It must exist
/// before any other thread does: it blocks the signals that it attends to, for all threads started later.
class Attendant {
  public:
    struct Config {
        std::optional<std::chrono::duration<double>> timeout;
        bool input = false; ///< standard input goes to the guest
    };
    Attendant(RunControl& control, Config config);
    Attendant(const Attendant&) = delete;
    Attendant& operator=(const Attendant&) = delete;
    Attendant(Attendant&&) = delete;
    Attendant& operator=(Attendant&&) = delete;
    ~Attendant();

  private:
    void attend();
    void handle_signal();
    [[nodiscard]] bool read_input();

    RunControl& control_;
    GuestTerminal terminal_;
    SharedInput input_; ///< none: there is none, or it has ended
    sigset_t signals_before_{};
    File signals_, timer_, quit_;
    std::thread thread_;
};

} // namespace umbra
