#include "launcher/console.hpp"

#include "vmm/error.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdint>
#include <cstring>

#include <fmt/core.h>

namespace umbra {
namespace {

File checked(int fd, const char* what) {
    if (fd < 0)
        throw StartupError(ExitCode::host_cannot, fmt::format("{}: {}", what, std::strerror(errno)));
    return File(fd);
}

sigset_t attended_signals() {
    sigset_t set;
    sigemptyset(&set);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGTSTP, SIGTTIN, SIGTTOU})
        sigaddset(&set, signal);
    return set;
}

} // namespace

// --- GuestTerminal

GuestTerminal::GuestTerminal(int fd) : fd_(fd) {
    take();
}

void GuestTerminal::take() {
    termios current{};
    if (saved_ || fd_ < 0 || ::tcgetpgrp(fd_) != ::getpgrp() || ::tcgetattr(fd_, &current) != 0)
        return;
    saved_ = current;
    current.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO | IEXTEN);
    current.c_iflag &= ~static_cast<tcflag_t>(ICRNL | IXON);
    (void)::tcsetattr(fd_, TCSANOW, &current);
}

void GuestTerminal::restore() {
    if (!saved_)
        return;
    (void)::tcsetattr(fd_, TCSANOW, &*saved_);
    saved_.reset();
}

// --- GuestOutput

void GuestOutput::write(std::span<const char> text) {
    if (!expected_.empty())
        search(text);
    while (!text.empty() && failure_.empty() && fd_ >= 0) {
        if (!writable())
            continue;
        // What poll() promises of a pipe: more would wait for the reader, and past the time limit.
        const ssize_t written = ::write(fd_, text.data(), std::min<std::size_t>(text.size(), PIPE_BUF));
        if (written >= 0)
            text = text.subspan(static_cast<std::size_t>(written));
        else if (errno != EINTR && errno != EAGAIN)
            failure_ = std::strerror(errno);
    }
}

/// Waits a little for whoever reads what the guest prints; gives up on them when the run is to end.
bool GuestOutput::writable() {
    constexpr int patience_ms = 100;
    pollfd ready{fd_, POLLOUT, 0};
    if (::poll(&ready, 1, patience_ms) > 0)
        return true;
    if (control_.ending())
        failure_ = "nobody reads it";
    return false;
}

void GuestOutput::search(std::span<const char> text) {
    tail_.append(text.begin(), text.end());
    if (tail_.find(expected_) != std::string::npos)
        control_.expectation_met();
    if (tail_.size() >= expected_.size())
        tail_.erase(0, tail_.size() - (expected_.size() - 1));
}

// --- Attendant

Attendant::Attendant(RunControl& control, Config config)
    : control_(control), terminal_(config.input ? STDIN_FILENO : -1),
      input_(config.input ? File(::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0)) : File()) {
    const sigset_t signals = attended_signals();
    (void)::pthread_sigmask(SIG_BLOCK, &signals, &signals_before_);
    signals_ = checked(::signalfd(-1, &signals, SFD_CLOEXEC), "signalfd");
    quit_ = checked(::eventfd(0, EFD_CLOEXEC), "eventfd");
    if (config.timeout) {
        timer_ = checked(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC), "timerfd");
        const auto nanoseconds =
            std::chrono::duration_cast<std::chrono::nanoseconds>(*config.timeout).count();
        constexpr std::int64_t second = 1'000'000'000;
        itimerspec when{};
        when.it_value.tv_sec = nanoseconds / second;
        when.it_value.tv_nsec = nanoseconds % second;
        (void)::timerfd_settime(timer_.get(), 0, &when, nullptr);
    }
    thread_ = std::thread([this] { attend(); });
}

Attendant::~Attendant() {
    const std::uint64_t one = 1;
    (void)!::write(quit_.get(), &one, sizeof(one));
    thread_.join();
    (void)::pthread_sigmask(SIG_SETMASK, &signals_before_, nullptr);
}

void Attendant::attend() {
    for (;;) {
        std::array<pollfd, 4> events{{
            {quit_.get(), POLLIN, 0},
            {signals_.get(), POLLIN, 0},
            {timer_.get(), POLLIN, 0}, // -1 where there is no timeout: poll ignores it
            {input_.get(), POLLIN, 0}, // -1
        }};
        // A guest that waits without an exit leaves what it has just printed unseen.
        constexpr int flush_interval_ms = 50;
        const int ready = ::poll(events.data(), events.size(), flush_interval_ms);
        if (ready == 0)
            control_.flush_output();
        if (ready <= 0)
            continue;
        if (events[0].revents != 0)
            return;
        if (events[1].revents != 0)
            handle_signal();
        if (events[2].revents != 0) {
            std::uint64_t expirations = 0;
            (void)!::read(timer_.get(), &expirations, sizeof(expirations));
            control_.time_out();
        }
        if (events[3].revents != 0 && !read_input())
            input_ = SharedInput();
    }
}

void Attendant::handle_signal() {
    signalfd_siginfo info{};
    if (::read(signals_.get(), &info, sizeof(info)) != sizeof(info))
        return;
    switch (info.ssi_signo) {
    case SIGINT:
    case SIGTERM:
    case SIGHUP:
        control_.interrupt();
        break;
    case SIGTSTP:
        terminal_.restore();
        (void)::raise(SIGSTOP); // by this thread: it would run on until another one had taken the signal
        terminal_.take();       // continued, in the foreground or not
        break;
    default: // SIGTTIN, SIGTTOU: the read or write that raised it has failed, which is enough
        break;
    }
}

/// False at the end of the input.
bool Attendant::read_input() {
    std::array<char, 256> buffer{};
    const ssize_t got = input_.read(buffer.data(), buffer.size());
    if (got > 0)
        control_.input({buffer.data(), static_cast<std::size_t>(got)});
    return got > 0 || (got < 0 && (errno == EINTR || errno == EAGAIN));
}

} // namespace umbra
