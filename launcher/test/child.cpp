#include "launcher/test/child.hpp"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <system_error>
#include <utility>

namespace umbra {
namespace {

int checked(int result, const char* what) {
    if (result < 0)
        throw std::system_error(errno, std::generic_category(), what);
    return result;
}

/// `file` by a number that is none of those which the child gets.
File moved_up(File file) {
    constexpr int first = 10;
    return File(checked(::fcntl(file.get(), F_DUPFD_CLOEXEC, first), "fcntl"));
}

struct Ends {
    File ours, theirs;
};

Ends make_pipe(bool child_writes) {
    std::array<int, 2> fds{};
    checked(::pipe2(fds.data(), O_CLOEXEC), "pipe");
    File reading(fds[0]), writing(fds[1]);
    Ends ends = child_writes ? Ends{std::move(reading), moved_up(std::move(writing))}
                             : Ends{std::move(writing), moved_up(std::move(reading))};
    checked(::fcntl(ends.ours.get(), F_SETFL, O_NONBLOCK), "fcntl"); // theirs is another open file
    return ends;
}

/// In the child, where only async-signal-safe functions may be called (signal-safety(7)).
void reset_signals() {
    for (int signal = 1; signal < SIGRTMIN; ++signal)
        (void)::signal(signal, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    (void)::sigprocmask(SIG_SETMASK, &none, nullptr);
}

} // namespace

ChildProcess::ChildProcess(const std::string& program, const std::vector<std::string>& arguments,
                           bool with_input) {
    Ends in = with_input
                  ? make_pipe(false)
                  : Ends{{}, moved_up(File(checked(::open("/dev/null", O_RDONLY | O_CLOEXEC), "/dev/null")))};
    Ends out = make_pipe(true), err = make_pipe(true), res = make_pipe(true);
    std::vector<char*> pointers;
    pointers.reserve(arguments.size() + 1);
    for (const std::string& argument : arguments)
        pointers.push_back(const_cast<char*>(argument.c_str()));
    pointers.push_back(nullptr);

    const pid_t parent = ::getpid();
    pid_ = checked(::fork(), "fork");
    if (pid_ == 0) {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (::getppid() != parent) // it ended before it could take this one with it
            ::_exit(1);
        ::setpgid(0, 0);
        ::dup2(in.theirs.get(), STDIN_FILENO);
        ::dup2(out.theirs.get(), STDOUT_FILENO);
        ::dup2(err.theirs.get(), STDERR_FILENO);
        ::dup2(res.theirs.get(), result_fd);
        reset_signals();
        ::execv(program.c_str(), pointers.data());
        constexpr int not_started = 127; // as shells have it
        ::_exit(not_started);
    }
    (void)::setpgid(pid_, pid_); // whoever of both comes first
    input = std::move(in.ours);
    console = std::move(out.ours);
    errors = std::move(err.ours);
    result = std::move(res.ours);
    // By number: the C library's declaration (2.36) cannot be used from C++.
    handle_ = File(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));
    if (handle_.get() < 0) {
        const int error = errno;
        send_signal(SIGKILL);
        (void)reap(); // there is no destructor of what was not made
        throw std::system_error(error, std::generic_category(), "pidfd_open");
    }
}

ChildProcess::~ChildProcess() {
    if (pid_ < 0)
        return;
    send_signal(SIGKILL);
    (void)reap();
}

void ChildProcess::send_signal(int signal) const {
    if (pid_ > 0)
        (void)::kill(-pid_, signal);
}

ChildEnd ChildProcess::reap() {
    siginfo_t info{};
    while (::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOWAIT) < 0 && errno == EINTR) {
    }
    send_signal(SIGKILL); // while its number cannot be another's yet
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    if (WIFSIGNALED(status))
        return {-1, WTERMSIG(status)};
    return {WEXITSTATUS(status), 0};
}

} // namespace umbra
