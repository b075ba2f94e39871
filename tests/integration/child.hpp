// Running a program as a child process: the real `umbra`, in these tests.
#pragma once

#include "vmm/kvm/file.hpp"

#include <chrono>
#include <csignal>
#include <filesystem>
#include <functional>
#include <iosfwd>
#include <string>
#include <string_view>
#include <vector>

#include <termios.h>
#include <unistd.h>

namespace umbra {

/// How long these tests wait for what should come at once or in seconds: much longer than an emulated host
/// takes.
inline constexpr std::chrono::seconds patience{600};

/// How a child ended, and what it wrote.
struct Ended {
    int exit_code = -1; ///< -1: it was ended by `signal`
    int signal = 0;
    bool overran = false; ///< it did not end in time, and was killed
    std::string out;      ///< or all of the terminal's, if it had one
    std::string err;
    long resident_kb = 0; ///< at most

    /// The last line that umbra itself said of the run: "passed", "failed with code 7 (0x7)", ...
    [[nodiscard]] std::string verdict() const;
};
std::ostream& operator<<(std::ostream& stream, const Ended& ended);

/// A child process. It ends with this object, or with this process, if not before.
class Child {
  public:
    enum class Input { none, pipe, terminal };
    struct Setup {
        Input input = Input::none;
        bool unread = false; ///< nobody reads its standard output; with a terminal: not until end()
        /// Changes a new terminal's attributes.
        std::function<void(termios&)> attributes = [](termios&) {};
        /// Called in the child before the program is started; false: it cannot be.
        std::function<bool()> prepare = [] { return true; };
    };
    static constexpr int not_prepared = 126, not_started = 127; ///< exit codes

    /// `arguments`: the program's path and its arguments. With a terminal as input, standard output goes
    /// there, too. Signals are at their defaults in the child, and it has a session of its own.
    explicit Child(std::vector<std::string> arguments) : Child(std::move(arguments), Setup()) {}
    Child(std::vector<std::string> arguments, const Setup& setup);
    Child(const Child&) = delete;
    Child& operator=(const Child&) = delete;
    Child(Child&&) = delete;
    Child& operator=(Child&&) = delete;
    ~Child();

    /// Gives it input. False if it does not take it in time.
    [[nodiscard]] bool type(std::string_view text);
    void end_input() { input_ = {}; }
    /// Closes the reading end of its standard output.
    void stop_reading() { output_ = {}; }
    void send_signal(int signal) const { ::kill(pid_, signal); }
    [[nodiscard]] bool wait_until_stopped() const;

    /// Waits until its output contains `text`. False if it ends before that, or `limit` passes.
    [[nodiscard]] bool wait_for(std::string_view text, std::chrono::seconds limit = patience);
    /// Takes in what it writes in the given time; false if it has ended.
    bool run_for(std::chrono::milliseconds time);
    /// What it has written so far to its standard output, or to its terminal.
    [[nodiscard]] const std::string& output() const { return ended_.out; }

    /// Waits for its end.
    const Ended& end(std::chrono::seconds limit = patience);

    /// Of the child's terminal: now, and as the child found it.
    [[nodiscard]] termios terminal_attributes() const;
    [[nodiscard]] const termios& first_terminal_attributes() const { return first_attributes_; }

  private:
    using Clock = std::chrono::steady_clock;

    bool pump(Clock::time_point deadline, const std::function<bool()>& done);
    void take_in();
    void reap();

    pid_t pid_ = -1;
    bool reaped_ = false, unread_;
    File input_, output_, errors_, handle_; ///< `handle_` is readable when the process has ended
    File terminal_;                         ///< kept open: its attributes outlive the child
    termios first_attributes_{};
    Ended ended_;
};

/// The folder of this program: umbra and guest/ lie beside it.
[[nodiscard]] std::filesystem::path build_folder();
/// A shipped guest.
[[nodiscard]] std::string guest_file(const std::string& name);
/// The command `umbra` with `arguments`.
[[nodiscard]] std::vector<std::string> umbra_command(const std::vector<std::string>& arguments);
/// Runs umbra to its end, without input.
[[nodiscard]] Ended run_umbra(const std::vector<std::string>& arguments,
                              std::chrono::seconds limit = patience);

[[nodiscard]] std::vector<std::string> lines_of(std::string_view text);

} // namespace umbra
