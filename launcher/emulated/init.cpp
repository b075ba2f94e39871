// The first program of the emulated machine (PID 1): loads the modules that are packed with it, mounts the
// files of whoever started umbra, runs the one command that it is told to, and carries bytes and signals
// between that command and umbra outside. Static, and the only file of the machine's own beside the kernel's
// modules: everything else, umbra itself included, is shared.
//
// What goes wrong before the line is up can only be told on the console; umbra shows its end.

#include "launcher/emulated/relay.hpp"

#include <fcntl.h>
#include <linux/limits.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace {

using umbra::File;
using umbra::emulated::error_channel;
using umbra::emulated::input_channel;
using umbra::emulated::output_channel;
using umbra::emulated::Relay;
using umbra::emulated::Say;

constexpr const char* shared = "/shared";

[[noreturn]] void power_off() {
    ::sync();
    (void)::reboot(RB_POWER_OFF);
    std::abort(); // PID 1's end is a panic, by which the machine goes down
}

std::string problem(const std::string& what) {
    return what + ": " + std::strerror(errno);
}

std::string contents(const char* path) {
    std::string text;
    const File file(::open(path, O_RDONLY | O_CLOEXEC));
    std::array<char, 4096> buffer{};
    for (ssize_t count = 0; (count = ::read(file.get(), buffer.data(), buffer.size())) > 0;)
        text.append(buffer.data(), static_cast<std::size_t>(count));
    return text;
}

bool mount(const char* type, const std::string& where, const char* source = "none",
           const char* options = "") {
    return ::mount(source, where.c_str(), type, 0, options) == 0;
}

/// Loads what /modules.list names, in its order: a line each, file and parameters. Empty if all went well.
std::string load_modules() {
    std::string list = contents("/modules.list");
    std::string failure;
    for (std::size_t end = list.find('\n'); end != std::string::npos; end = list.find('\n')) {
        const std::string line = list.substr(0, end);
        list.erase(0, end + 1);
        const std::size_t space = line.find(' ');
        const std::string name = line.substr(0, space);
        const File module(::open(name.c_str(), O_RDONLY | O_CLOEXEC));
        if (::syscall(SYS_finit_module, module.get(), line.c_str() + space + 1, 0) != 0 && errno != EEXIST &&
            failure.empty())
            failure = problem("the kernel does not take its module " + name);
    }
    return failure;
}

/// The virtio serial port that umbra listens at: the only one. It appears some time after its driver.
File open_line() {
    constexpr int attempts = 10'000;
    for (int i = 0; i < attempts; ++i) {
        File line(::open("/dev/vport0p1", O_RDWR | O_CLOEXEC));
        if (line.get() < 0)
            line = File(::open("/dev/vport1p1", O_RDWR | O_CLOEXEC));
        if (line.get() >= 0)
            return line;
        (void)::usleep(1000);
    }
    std::fprintf(stderr, "umbra: the machine has no virtio serial port\n");
    power_off();
}

/// Mounts the files that are shared, and over them what must be this machine's own. Empty if that worked.
std::string mount_files() {
    const std::string root = shared;
    const std::string how = contents("/share"); // a file system's type, a space, its options
    const std::size_t space = how.find(' ');
    (void)::mkdir(shared, 0755);
    if (!mount(how.substr(0, space).c_str(), root, "umbra", how.c_str() + space + 1))
        return problem("the files cannot be shared with it");
    if (!mount("proc", root + "/proc") || !mount("sysfs", root + "/sys") || !mount("devtmpfs", root + "/dev"))
        return problem("its /proc, /sys and /dev cannot be mounted");
    for (const char* const folder : {"/dev/pts", "/dev/shm"})
        (void)::mkdir((root + folder).c_str(), 0755);
    if (!mount("devpts", root + "/dev/pts", "none", "ptmxmode=0666") || !mount("tmpfs", root + "/dev/shm"))
        return problem("its /dev/pts and /dev/shm cannot be mounted");
    for (const auto& [name, target] :
         {std::pair("/dev/fd", "/proc/self/fd"), std::pair("/dev/stdin", "/proc/self/fd/0"),
          std::pair("/dev/stdout", "/proc/self/fd/1"), std::pair("/dev/stderr", "/proc/self/fd/2")})
        (void)::symlink(target, (root + name).c_str());
    return {};
}

/// Loopback, which some programs take for granted.
void raise_loopback() {
    const File socket(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    struct {
        std::array<char, 16> name{'l', 'o'};
        short flags = 0x1 /* IFF_UP */ | 0x40 /* IFF_RUNNING */;
        std::array<char, 22> rest{};
    } request;
    constexpr unsigned long set_flags = 0x8914; // SIOCSIFFLAGS: <net/if.h> and <linux/if.h> do not mix
    (void)::ioctl(socket.get(), set_flags, &request);
}

struct Pair {
    File mine, its;
};

Pair make_pipe(bool it_writes) {
    std::array<int, 2> ends{-1, -1};
    (void)::pipe2(ends.data(), O_CLOEXEC);
    Pair pair{File(ends[it_writes ? 0 : 1]), File(ends[it_writes ? 1 : 0])};
    (void)::fcntl(pair.mine.get(), F_SETFL, O_NONBLOCK);
    return pair;
}

File again(const File& file) {
    return File(::fcntl(file.get(), F_DUPFD_CLOEXEC, 0));
}

/// What is to be run: the strings of Say::start, in this order.
struct Command {
    std::string folder;
    std::string terminals; ///< a character for each of standard input, output and error: t, a terminal; p, a
                           ///< pipe; -, nothing
    std::string debugger;  ///< the address at which debuggers are served outside; empty: nowhere
    std::vector<std::string> arguments, environment;

    explicit Command(std::vector<std::string> strings) {
        folder = std::move(strings.at(0));
        terminals = std::move(strings.at(1));
        debugger = std::move(strings.at(2));
        const auto count = std::strtoul(strings.at(3).c_str(), nullptr, 10);
        auto next = strings.begin() + 4;
        arguments.assign(next, next + static_cast<std::ptrdiff_t>(count));
        environment.assign(next + static_cast<std::ptrdiff_t>(count), strings.end());
    }
    [[nodiscard]] bool terminal(std::size_t file) const { return terminals[file] == 't'; }
};

/// Serves one umbra, from its first word to the machine's end.
class Init {
  public:
    explicit Init(File line)
        : relay_(std::move(line), [this](Say what, std::uint8_t channel, std::string_view payload) {
              take(what, channel, payload);
          }) {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGCHLD);
        (void)::sigprocmask(SIG_BLOCK, &set, nullptr);
        children_ = File(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
        relay_.watch(children_.get(), [this] { reap(); });
    }

    [[noreturn]] void serve(const std::string& failure) {
        if (failure.empty())
            relay_.say(Say::hello);
        else
            relay_.say(Say::failed, 0, failure);
        // What the command has written may still be on its way through its terminal, and processes that it
        // has left behind may hold its files open.
        constexpr int turn_ms = 20, quiet_turns = 2;
        int quiet = 0;
        while (relay_.turn(code_ < 0 || told_ ? -1 : turn_ms)) {
            if (code_ < 0 || told_)
                continue;
            const auto both = [this](bool (Relay::*is)(std::uint8_t) const) {
                return (relay_.*is)(output_channel) && (relay_.*is)(error_channel);
            };
            quiet = both(&Relay::drained) ? quiet + 1 : 0;
            if (!both(&Relay::ended) && quiet < quiet_turns)
                continue;
            told_ = true;
            const char code = static_cast<char>(code_);
            relay_.say(Say::ended, 0, std::string_view(&code, 1));
        }
        power_off(); // umbra has gone
    }

  private:
    void take(Say what, std::uint8_t channel, std::string_view payload) {
        switch (what) {
        case Say::start:
            start(Command(umbra::emulated::unpack(payload)));
            return;
        case Say::signal:
            if (child_ > 0)
                (void)::kill(-child_, payload.at(0));
            return;
        case Say::window:
            if (terminal_.get() >= 0) {
                const auto word = [payload](std::size_t at) {
                    return static_cast<unsigned short>(static_cast<unsigned char>(payload.at(at)) |
                                                       static_cast<unsigned char>(payload.at(at + 1)) << 8);
                };
                winsize size{};
                size.ws_row = word(0);
                size.ws_col = word(2);
                (void)::ioctl(terminal_.get(), TIOCSWINSZ, &size);
            }
            return;
        case Say::open:
            connect(channel);
            return;
        default:
            return;
        }
    }

    void fail(const std::string& text) {
        relay_.say(Say::failed, 0, text);
        told_ = true;
    }

    void start(const Command& command) {
        std::array<File, 3> its;
        std::array<File, 3> mine;
        if (command.terminals.find('t') != std::string::npos && !open_terminal(command))
            return fail(problem("it has no terminal for the command"));
        for (std::size_t i = 0; i < 3; ++i) {
            if (command.terminal(i)) {
                its[i] = File(::open(terminal_name_.c_str(), O_RDWR | O_NOCTTY | O_CLOEXEC));
            } else if (command.terminals[i] == 'p') {
                Pair pipe = make_pipe(i > 0);
                its[i] = std::move(pipe.its);
                mine[i] = std::move(pipe.mine);
            } else {
                its[i] = File(::open("/dev/null", O_RDWR | O_CLOEXEC));
            }
        }
        if (command.terminal(0))
            mine[0] = again(terminal_);
        // What a terminal shows comes from both; it goes where the terminal outside is.
        if (command.terminal(1))
            mine[1] = again(terminal_);
        else if (command.terminal(2))
            mine[2] = again(terminal_);
        relay_.join(input_channel, File(), std::move(mine[0]));
        relay_.join(output_channel, std::move(mine[1]), File());
        relay_.join(error_channel, std::move(mine[2]), File());

        File listener;
        Pair ready;
        if (!command.debugger.empty()) {
            listener = File(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
            (void)::bind(listener.get(), reinterpret_cast<const sockaddr*>(&debugger_name),
                         sizeof debugger_name);
            ready = make_pipe(true);
        }
        child_ = ::fork();
        if (child_ == 0)
            run(command, its, listener, ready.its);
        if (child_ < 0)
            return fail(problem("it cannot start a process"));
        if (!command.debugger.empty()) {
            ready_ = std::move(ready.mine);
            relay_.watch(ready_.get(), [this] { debugger_ready(); });
        }
    }

    bool open_terminal(const Command& command) {
        terminal_ = File(::open((std::string(shared) + "/dev/pts/ptmx").c_str(),
                                O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK));
        int number = 0;
        int unlock = 0;
        if (::ioctl(terminal_.get(), TIOCSPTLCK, &unlock) != 0 ||
            ::ioctl(terminal_.get(), TIOCGPTN, &number) != 0)
            return false;
        terminal_name_ = std::string(shared) + "/dev/pts/" + std::to_string(number);
        termios attributes{};
        if (!command.terminal(0) && ::tcgetattr(terminal_.get(), &attributes) == 0) {
            attributes.c_oflag &= ~static_cast<tcflag_t>(OPOST); // the terminal outside is not raw then
            (void)::tcsetattr(terminal_.get(), TCSANOW, &attributes);
        }
        return true;
    }

    /// In the child.
    [[noreturn]] static void run(const Command& command, const std::array<File, 3>& files,
                                 const File& listener, const File& ready) {
        (void)::setsid();
        for (int i = 0; i < 3; ++i)
            (void)::dup2(files[static_cast<std::size_t>(i)].get(), i);
        for (std::size_t i = 0; i < 3; ++i)
            if (command.terminal(i) && ::ioctl(static_cast<int>(i), TIOCSCTTY, 0) == 0)
                break;
        std::vector<std::string> environment = command.environment;
        if (listener.get() >= 0) {
            (void)::fcntl(listener.get(), F_SETFD, 0);
            (void)::fcntl(ready.get(), F_SETFD, 0);
            environment.push_back("UMBRA_DEBUGGERS=" + std::to_string(listener.get()) + "," +
                                  std::to_string(ready.get()) + "," + command.debugger);
        }
        sigset_t none;
        sigemptyset(&none);
        (void)::sigprocmask(SIG_SETMASK, &none, nullptr);
        (void)std::signal(SIGPIPE, SIG_DFL);
        if (::chroot(shared) != 0 || ::chdir(command.folder.c_str()) != 0) {
            std::fprintf(stderr, "umbra: the folder '%s' is not shared with the emulated machine: %s\n",
                         command.folder.c_str(), std::strerror(errno));
            ::_exit(not_started);
        }
        std::vector<char*> arguments, variables;
        for (const std::string& one : command.arguments)
            arguments.push_back(const_cast<char*>(one.c_str()));
        for (const std::string& one : environment)
            variables.push_back(const_cast<char*>(one.c_str()));
        arguments.push_back(nullptr);
        variables.push_back(nullptr);
        ::execvpe(arguments.front(), arguments.data(), variables.data());
        std::fprintf(stderr, "umbra: cannot run '%s' in the emulated machine: %s\n", arguments.front(),
                     std::strerror(errno));
        ::_exit(not_started);
    }

    void debugger_ready() {
        char byte = 0;
        if (::read(ready_.get(), &byte, 1) == 1)
            relay_.say(Say::serves);
        relay_.forget(ready_.get());
        ready_ = File();
    }

    void connect(std::uint8_t channel) {
        File socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&debugger_name),
                      sizeof debugger_name) != 0) {
            relay_.say(Say::end, channel);
            return;
        }
        (void)::fcntl(socket.get(), F_SETFL, O_NONBLOCK);
        relay_.join(channel, std::move(socket));
    }

    void reap() {
        signalfd_siginfo info{};
        while (::read(children_.get(), &info, sizeof info) == sizeof info) {
        }
        int status = 0;
        for (pid_t pid = 0; (pid = ::waitpid(-1, &status, WNOHANG | WUNTRACED)) > 0;) {
            if (pid != child_)
                continue;
            if (WIFSTOPPED(status))
                relay_.say(Say::stopped);
            else
                code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        }
    }

    static constexpr int not_started = 127;
    static constexpr sockaddr_un debugger_name{AF_UNIX, "\0umbra"};

    Relay relay_;
    File children_, ready_;
    File terminal_; ///< the side of the pseudo-terminal that is not the command's
    std::string terminal_name_;
    pid_t child_ = -1;
    int code_ = -1;
    bool told_ = false; ///< that the command has ended
};

} // namespace

int main() {
    (void)std::signal(SIGPIPE, SIG_IGN);
    for (const char* const folder : {"/proc", "/sys", "/dev"})
        (void)::mkdir(folder, 0755);
    (void)mount("devtmpfs", "/dev");
    (void)mount("proc", "/proc");
    (void)mount("sysfs", "/sys");
    std::string failure = load_modules();
    Init init(open_line());
    if (failure.empty() && ::access("/dev/kvm", R_OK | W_OK) != 0)
        failure = problem("its kernel has no KVM");
    if (failure.empty())
        failure = mount_files();
    raise_loopback();
    init.serve(failure);
}
