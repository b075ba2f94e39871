#include "launcher/host.hpp"

#include "launcher/emulated/machine.hpp"
#include "launcher/emulated/relay.hpp"
#include "vmm/debug/listener.hpp"
#include "vmm/error.hpp"
#include "vmm/kvm/kvm.hpp"
#include "vmm/log.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include <fmt/core.h>

namespace umbra {
namespace {

using emulated::EmulatedMachine;
using emulated::error_channel;
using emulated::first_debugger_channel;
using emulated::input_channel;
using emulated::output_channel;
using emulated::Relay;
using emulated::Say;

/// Set for what runs on an emulated host, to the host's kind: it does not start one more.
constexpr const char* inside_variable = "UMBRA_EMULATED_HOST";

// --- This side of what runs there

/// The terminal, raw while this lives: what is typed goes to the terminal inside, which makes of Ctrl-C what
/// it is.
class RawTerminal {
  public:
    explicit RawTerminal(bool wanted) {
        if (wanted && ::tcgetattr(STDIN_FILENO, &saved_) == 0)
            take();
    }
    RawTerminal(const RawTerminal&) = delete;
    RawTerminal& operator=(const RawTerminal&) = delete;
    RawTerminal(RawTerminal&&) = delete;
    RawTerminal& operator=(RawTerminal&&) = delete;
    ~RawTerminal() { restore(); }

    void take() {
        termios raw = saved_;
        ::cfmakeraw(&raw);
        taken_ = ::tcsetattr(STDIN_FILENO, TCSADRAIN, &raw) == 0;
    }
    void restore() {
        if (std::exchange(taken_, false))
            (void)::tcsetattr(STDIN_FILENO, TCSADRAIN, &saved_);
    }
    [[nodiscard]] bool taken() const { return taken_; }

  private:
    termios saved_{};
    bool taken_ = false;
};

class Session {
  public:
    Session(const EmulatedHost& host, const Errand& errand);

    int run();

  private:
    void take(Say what, std::uint8_t channel, std::string_view payload);
    void start();
    void send_window();
    void handle_signals();
    void accept_debugger();
    void stop_here();
    [[nodiscard]] int machine_is_gone();

    const EmulatedHost& host_;
    const Errand& errand_;
    std::optional<GdbListener> debuggers_;
    std::uint8_t next_debugger_ = first_debugger_channel;
    File signals_, interrupt_;
    EmulatedMachine machine_;
    Relay relay_;
    std::optional<RawTerminal> terminal_;
    bool started_ = false;
    bool impatient_ = false; ///< the user asked for the end and the machine did not even come up
    int asked_to_end_ = 0;
    std::optional<int> code_;
    std::optional<std::string> failure_;
};

constexpr std::uint64_t own_memory = std::uint64_t{1} << 30; ///< of the machine, its page cache included

sigset_t passed_signals() {
    sigset_t set;
    sigemptyset(&set);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH})
        sigaddset(&set, signal);
    return set;
}

Session::Session(const EmulatedHost& host, const Errand& errand)
    : host_(host), errand_(errand), machine_({.nested_paging = host.nested_paging,
                                              .counted = errand.counted,
                                              .memory_bytes = own_memory + errand.memory_bytes,
                                              .processors = errand.processors}),
      relay_(machine_.take_line(), [this](Say what, std::uint8_t channel, std::string_view payload) {
          take(what, channel, payload);
      }) {
    if (!errand.debuggers.empty())
        debuggers_.emplace(GdbAddress::parse(errand.debuggers));
    const sigset_t set = passed_signals();
    (void)::pthread_sigmask(SIG_BLOCK, &set, nullptr);
    signals_ = File(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
    interrupt_ = File(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    relay_.watch(signals_.get(), [this] { handle_signals(); });
    relay_.watch(interrupt_.get(), [this] {
        std::uint64_t count = 0;
        (void)!::read(interrupt_.get(), &count, sizeof count);
        const char signal = SIGINT;
        relay_.say(Say::signal, 0, std::string_view(&signal, 1));
    });
}

void Session::take(Say what, std::uint8_t channel, std::string_view payload) {
    (void)channel;
    switch (what) {
    case Say::hello:
        start();
        return;
    case Say::failed:
        failure_ = payload;
        return;
    case Say::ended:
        code_ = static_cast<unsigned char>(payload.at(0));
        return;
    case Say::stopped:
        stop_here();
        return;
    case Say::serves:
        debuggers_->listen();
        relay_.watch(debuggers_->get(), [this] { accept_debugger(); });
        if (errand_.debugger_ready)
            errand_.debugger_ready(debuggers_->address(), [fd = interrupt_.get()] {
                constexpr std::uint64_t one = 1;
                (void)!::write(fd, &one, sizeof one);
            });
        return;
    case Say::start:
    case Say::signal:
    case Say::window:
    case Say::wake:
    case Say::open:
    case Say::data:
    case Say::credit:
    case Say::end:
    case Say::deaf:
        return;
    }
}

void Session::start() {
    const auto duplicate = [](int fd) { return File(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); };
    relay_.join(input_channel, errand_.input ? duplicate(STDIN_FILENO) : File(), File());
    relay_.join(output_channel, File(), duplicate(STDOUT_FILENO));
    relay_.join(error_channel, File(), duplicate(STDERR_FILENO));
    std::string kinds; // see init.cpp
    for (int fd = 0; fd < 3; ++fd) {
        if (::fcntl(fd, F_GETFD) < 0 || (fd == STDIN_FILENO && !errand_.input))
            kinds += '-';
        else
            kinds += ::isatty(fd) == 1 ? 't' : 'p';
    }
    terminal_.emplace(kinds[STDIN_FILENO] == 't' && ::tcgetpgrp(STDIN_FILENO) == ::getpgrp());
    std::error_code error;
    std::vector<std::string> strings{std::filesystem::current_path(error), kinds,
                                     debuggers_ ? debuggers_->address() : std::string(),
                                     std::to_string(errand_.command.size())};
    strings.insert(strings.end(), errand_.command.begin(), errand_.command.end());
    for (char** variable = environ; *variable != nullptr; ++variable)
        strings.emplace_back(*variable);
    strings.push_back(fmt::format("{}={}", inside_variable, host_.nested_paging ? "A" : "B"));
    relay_.say(Say::start, 0, emulated::pack(strings));
    send_window();
    started_ = true;
}

void Session::send_window() {
    winsize size{};
    for (const int fd : {STDOUT_FILENO, STDIN_FILENO, STDERR_FILENO})
        if (::ioctl(fd, TIOCGWINSZ, &size) == 0)
            break;
    const auto low = [](unsigned short value) { return static_cast<char>(value & 0xff); };
    const auto high = [](unsigned short value) { return static_cast<char>(value >> 8); };
    const std::array bytes{low(size.ws_row), high(size.ws_row), low(size.ws_col), high(size.ws_col)};
    relay_.say(Say::window, 0, std::string_view(bytes.data(), bytes.size()));
}

void Session::handle_signals() {
    signalfd_siginfo info{};
    while (::read(signals_.get(), &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGWINCH) {
            send_window();
            continue;
        }
        constexpr int patience = 3;
        impatient_ = impatient_ || !started_ || ++asked_to_end_ == patience;
        const char signal = static_cast<char>(info.ssi_signo);
        relay_.say(Say::signal, 0, std::string_view(&signal, 1));
    }
}

/// As what runs there, which the terminal (Ctrl-Z) has stopped; later both go on.
void Session::stop_here() {
    const bool was_raw = terminal_->taken();
    terminal_->restore();
    (void)::kill(0, SIGTSTP);
    if (was_raw)
        terminal_->take();
    const char signal = SIGCONT;
    relay_.say(Say::signal, 0, std::string_view(&signal, 1));
}

void Session::accept_debugger() {
    auto [socket, who] = debuggers_->accept();
    if (socket.get() < 0)
        return;
    const std::uint8_t channel = next_debugger_++;
    if (next_debugger_ == 0)
        next_debugger_ = first_debugger_channel;
    relay_.say(Say::open, channel);
    relay_.join(channel, std::move(socket));
}

int Session::machine_is_gone() {
    constexpr int moment_ms = 500; // for the reason to become known
    pollfd ended{machine_.handle(), POLLIN, 0};
    (void)::poll(&ended, 1, moment_ms);
    const std::string why = machine_.obituary();
    if (!started_)
        throw StartupError(ExitCode::host_cannot, "the emulated host did not come up: " + why);
    log_line(LogLevel::error, "the emulated host went down: " + why);
    return static_cast<int>(ExitCode::guest_panicked);
}

int Session::run() {
    using Clock = std::chrono::steady_clock;
    constexpr std::chrono::minutes boot_time{3}; // far more than it takes on a busy computer
    const Clock::time_point begun = Clock::now();
    Clock::time_point woken = begun;
    while (!code_) {
        if (failure_)
            throw StartupError(ExitCode::host_cannot, "the emulated host: " + *failure_);
        if (impatient_)
            return static_cast<int>(ExitCode::interrupted);
        if (!started_ && Clock::now() - begun > boot_time)
            return machine_is_gone();
        constexpr int second_ms = 1000;
        // Now and then the interrupt of the machine's timer is lost while it is halted, in which it would
        // stay for ever then. Any interrupt makes it look at its clock. But where instructions are counted,
        // it would be a cost.
        const bool wakes = started_ && !errand_.counted;
        if (!relay_.turn(started_ && !wakes ? -1 : second_ms) && !code_ && !failure_)
            return machine_is_gone();
        if (const auto now = Clock::now(); wakes && now - woken >= std::chrono::seconds(1)) {
            woken = now;
            relay_.say(Say::wake);
        }
    }
    while (!(relay_.written(output_channel) && relay_.written(error_channel)) && !impatient_)
        (void)relay_.turn(-1);
    return *code_;
}

} // namespace

std::optional<EmulatedHost> choose_host(const std::string& option) {
    const char* const variable = std::getenv(host_variable);
    const std::string choice = !option.empty() ? option : variable != nullptr ? variable : "";
    const std::array choices{"", "auto", "kvm", "emulated", "emulated:A", "emulated:B"};
    if (std::ranges::find(choices, choice) == choices.end())
        throw StartupError(ExitCode::bad_usage,
                           fmt::format("{}: '{}' is none of auto, kvm, emulated, emulated:A and emulated:B",
                                       option.empty() ? host_variable : "--host", choice));
    if (choice == "kvm" || std::getenv(inside_variable) != nullptr)
        return std::nullopt;
    if (choice.starts_with("emulated"))
        return EmulatedHost{.nested_paging = !choice.ends_with(":B"), .because = {}};
    try {
        const Kvm usable;
        return std::nullopt;
    } catch (const StartupError& error) {
        return EmulatedHost{.nested_paging = true, .because = error.what()};
    }
}

int run_on_emulated_host(const EmulatedHost& host, const Errand& errand) {
    std::optional<Session> session;
    try {
        session.emplace(host, errand);
    } catch (const StartupError& error) {
        if (host.because.empty())
            throw;
        throw StartupError(error.code(), fmt::format("{}; without that, {}", host.because, error.what()));
    }
    if (!host.because.empty())
        log_warning("{}; so this runs on an emulated host, which is slower (see --host)", host.because);
    return session->run();
}

} // namespace umbra
