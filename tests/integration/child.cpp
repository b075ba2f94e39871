#include "tests/integration/child.hpp"

#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <ostream>
#include <sstream>
#include <system_error>
#include <thread>

namespace umbra {
namespace {

using namespace std::chrono_literals;

int checked(int result, const char* what) {
    if (result < 0)
        throw std::system_error(errno, std::generic_category(), what);
    return result;
}

struct Ends {
    File ours, theirs;
};

Ends make_pipe(bool child_writes) {
    std::array<int, 2> fds{};
    checked(::pipe2(fds.data(), O_CLOEXEC), "pipe");
    File reading(fds[0]), writing(fds[1]);
    return child_writes ? Ends{std::move(reading), std::move(writing)}
                        : Ends{std::move(writing), std::move(reading)};
}

Ends make_terminal() {
    int ours = -1, theirs = -1;
    checked(::openpty(&ours, &theirs, nullptr, nullptr, nullptr), "openpty");
    ::fcntl(ours, F_SETFD, FD_CLOEXEC);
    ::fcntl(theirs, F_SETFD, FD_CLOEXEC);
    return {File(ours), File(theirs)};
}

/// By number: the C library's declaration (2.36) cannot be used from C++.
File open_process(pid_t pid) {
    return File(checked(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)), "pidfd_open"));
}

void set_nonblocking(const File& file) {
    checked(::fcntl(file.get(), F_SETFL, ::fcntl(file.get(), F_GETFL) | O_NONBLOCK), "fcntl");
}

/// In the child: what else is inherited from whoever runs the tests. An ignored SIGINT, for one, if they run
/// in the background of a shell script.
void reset_signals() {
    for (int signal = 1; signal < SIGRTMIN; ++signal)
        (void)::signal(signal, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    (void)::sigprocmask(SIG_SETMASK, &none, nullptr);
}

} // namespace

std::string Ended::verdict() const {
    constexpr std::string_view prefix = "umbra: ";
    std::string found;
    for (const std::string& line : lines_of(err))
        if (line.starts_with(prefix))
            found = line.substr(prefix.size());
    return found;
}

std::ostream& operator<<(std::ostream& stream, const Ended& ended) {
    if (ended.overran)
        stream << "was killed: it did not end in time";
    else if (ended.signal != 0)
        stream << "ended by signal " << ended.signal;
    else
        stream << "exit code " << ended.exit_code;
    const auto tail = [](std::string_view text) {
        constexpr std::size_t shown = 4000;
        return text.substr(text.size() - std::min(text.size(), shown));
    };
    return stream << "\n--- standard output\n"
                  << tail(ended.out) << "\n--- standard error\n"
                  << tail(ended.err) << "\n---";
}

Child::Child(std::vector<std::string> arguments, const Setup& setup) : unread_(setup.unread) {
    (void)::signal(SIGPIPE, SIG_IGN);
    File their_input, their_output;
    if (setup.input == Input::terminal) {
        Ends terminal = make_terminal();
        output_ = std::move(terminal.ours);
        input_ = File(checked(::fcntl(output_.get(), F_DUPFD_CLOEXEC, 0), "dup"));
        terminal_ = std::move(terminal.theirs);
        termios attributes = terminal_attributes();
        setup.attributes(attributes);
        checked(::tcsetattr(terminal_.get(), TCSANOW, &attributes), "tcsetattr");
        first_attributes_ = terminal_attributes();
        their_input = File(checked(::fcntl(terminal_.get(), F_DUPFD_CLOEXEC, 0), "dup"));
        their_output = File(checked(::fcntl(terminal_.get(), F_DUPFD_CLOEXEC, 0), "dup"));
    } else {
        if (setup.input == Input::pipe) {
            Ends ends = make_pipe(false);
            input_ = std::move(ends.ours);
            their_input = std::move(ends.theirs);
        } else {
            their_input = File(checked(::open("/dev/null", O_RDONLY | O_CLOEXEC), "/dev/null"));
        }
        Ends ends = make_pipe(true);
        output_ = std::move(ends.ours);
        their_output = std::move(ends.theirs);
    }
    Ends errors = make_pipe(true);
    errors_ = std::move(errors.ours);
    if (setup
            .unread) // little fits into a pipe that nobody reads; of a terminal this fails, which has no more
        (void)::fcntl(output_.get(), F_SETPIPE_SZ, static_cast<int>(::sysconf(_SC_PAGESIZE)));
    set_nonblocking(output_);
    set_nonblocking(errors_);
    if (input_.get() >= 0)
        set_nonblocking(input_);

    std::vector<char*> pointers;
    pointers.reserve(arguments.size() + 1);
    for (std::string& argument : arguments)
        pointers.push_back(argument.data());
    pointers.push_back(nullptr);
    pid_ = checked(::fork(), "fork");
    if (pid_ == 0) {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        ::setsid();
        ::dup2(their_input.get(), STDIN_FILENO);
        ::dup2(their_output.get(), STDOUT_FILENO);
        ::dup2(errors.theirs.get(), STDERR_FILENO);
        if (setup.input == Input::terminal)
            ::ioctl(STDIN_FILENO, TIOCSCTTY, 0);
        reset_signals();
        if (!setup.prepare())
            ::_exit(not_prepared);
        ::execv(pointers.front(), pointers.data());
        ::_exit(not_started);
    }
    handle_ = open_process(pid_);
}

Child::~Child() {
    if (reaped_)
        return;
    ::kill(-pid_, SIGKILL);
    ::kill(pid_, SIGKILL);
    reap();
}

bool Child::type(std::string_view text) {
    return pump(Clock::now() + patience, [&] {
        const ssize_t written = text.empty() ? 0 : ::write(input_.get(), text.data(), text.size());
        if (written > 0)
            text.remove_prefix(static_cast<std::size_t>(written));
        return text.empty();
    });
}

bool Child::wait_until_stopped() const {
    const auto deadline = Clock::now() + patience;
    while (Clock::now() < deadline) {
        siginfo_t info{};
        if (::waitid(P_PID, static_cast<id_t>(pid_), &info, WSTOPPED | WNOHANG | WNOWAIT) == 0 &&
            info.si_pid == pid_)
            return true;
        std::this_thread::sleep_for(1ms);
    }
    return false;
}

bool Child::wait_for(std::string_view text, std::chrono::seconds limit) {
    return pump(Clock::now() + limit, [&] { return ended_.out.find(text) != std::string::npos; });
}

bool Child::run_for(std::chrono::milliseconds time) {
    pump(Clock::now() + time, [] { return false; });
    return !reaped_;
}

const Ended& Child::end(std::chrono::seconds limit) {
    if (terminal_.get() >= 0)
        unread_ = false;
    pump(Clock::now() + limit, [] { return false; });
    if (!reaped_) {
        ended_.overran = true;
        ::kill(-pid_, SIGKILL);
        ::kill(pid_, SIGKILL);
        reap();
        take_in();
    }
    return ended_;
}

termios Child::terminal_attributes() const {
    termios attributes{};
    checked(::tcgetattr(terminal_.get(), &attributes), "tcgetattr");
    return attributes;
}

/// Takes in what the child writes until `done`, its end, or the deadline. True if `done`.
bool Child::pump(Clock::time_point deadline, const std::function<bool()>& done) {
    for (;;) {
        pollfd handle{handle_.get(), POLLIN, 0};
        const bool over = reaped_ || ::poll(&handle, 1, 0) > 0;
        take_in();
        if (done())
            return true;
        if (over) {
            reap();
            return false;
        }
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
        if (left <= 0ms)
            return false;
        // A `done` that offers input has to be asked again when there is room for it: soon.
        constexpr std::chrono::milliseconds step = 20ms;
        std::array<pollfd, 3> events{{{unread_ ? -1 : output_.get(), POLLIN, 0},
                                      {errors_.get(), POLLIN, 0},
                                      {handle_.get(), POLLIN, 0}}};
        (void)::poll(events.data(), events.size(), static_cast<int>(std::min(left, step).count()));
    }
}

void Child::take_in() {
    const auto drain = [](File& file, std::string& text) {
        std::array<char, 65536> buffer{};
        while (file.get() >= 0) {
            const ssize_t got = ::read(file.get(), buffer.data(), buffer.size());
            if (got > 0)
                text.append(buffer.data(), static_cast<std::size_t>(got));
            else if (got < 0 && errno == EAGAIN)
                break;
            else
                file = {}; // the end
        }
    };
    if (!unread_)
        drain(output_, ended_.out);
    drain(errors_, ended_.err);
}

void Child::reap() {
    if (std::exchange(reaped_, true))
        return;
    int status = 0;
    rusage usage{};
    while (::wait4(pid_, &status, 0, &usage) < 0 && errno == EINTR) {
    }
    ended_.resident_kb = usage.ru_maxrss;
    if (WIFEXITED(status))
        ended_.exit_code = WEXITSTATUS(status);
    else if (WIFSIGNALED(status))
        ended_.signal = WTERMSIG(status);
}

std::filesystem::path build_folder() {
    return std::filesystem::read_symlink("/proc/self/exe").parent_path();
}

std::string guest_file(const std::string& name) {
    return build_folder() / "guest" / name;
}

std::vector<std::string> umbra_command(const std::vector<std::string>& arguments) {
    std::vector<std::string> command{build_folder() / "umbra"};
    command.insert(command.end(), arguments.begin(), arguments.end());
    return command;
}

Ended run_umbra(const std::vector<std::string>& arguments, std::chrono::seconds limit) {
    return Child(umbra_command(arguments)).end(limit);
}

std::vector<std::string> lines_of(std::string_view text) {
    std::istringstream stream{std::string(text)};
    std::vector<std::string> lines;
    for (std::string line; std::getline(stream, line);)
        lines.push_back(line);
    return lines;
}

} // namespace umbra
