#include "launcher/debug.hpp"

#include "vmm/debug/listener.hpp"
#include "vmm/error.hpp"

#include <elf.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <thread>
#include <utility>

#include <fmt/core.h>

namespace umbra {
namespace {

/// A folder of this process alone, for the socket and the script.
class PrivateFolder {
  public:
    PrivateFolder() {
        std::string name = (std::filesystem::temp_directory_path() / "umbra-XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr)
            throw StartupError(ExitCode::host_cannot,
                               fmt::format("cannot make the folder '{}': {}", name, std::strerror(errno)));
        path_ = name;
    }
    PrivateFolder(const PrivateFolder&) = delete;
    PrivateFolder& operator=(const PrivateFolder&) = delete;
    PrivateFolder(PrivateFolder&&) = delete;
    PrivateFolder& operator=(PrivateFolder&&) = delete;
    ~PrivateFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  private:
    std::filesystem::path path_;
};

/// gdb in a process group of its own, which has the terminal while gdb lives: Ctrl-C is gdb's.
class GdbProcess {
  public:
    GdbProcess() = default;
    GdbProcess(const GdbProcess&) = delete;
    GdbProcess& operator=(const GdbProcess&) = delete;
    GdbProcess(GdbProcess&&) = delete;
    GdbProcess& operator=(GdbProcess&&) = delete;
    ~GdbProcess() { wait(); }

    /// `ended` is called on another thread when gdb has.
    void start(const std::vector<std::string>& arguments, std::function<void()> ended) {
        std::vector<char*> argv;
        argv.reserve(arguments.size() + 1);
        for (const std::string& argument : arguments)
            argv.push_back(const_cast<char*>(argument.c_str()));
        argv.push_back(nullptr);
        posix_spawnattr_t attributes;
        posix_spawnattr_init(&attributes);
        sigset_t none;
        sigemptyset(&none);
        sigset_t all;
        sigfillset(&all);
        posix_spawnattr_setsigmask(&attributes, &none);
        posix_spawnattr_setsigdefault(&attributes, &all);
        posix_spawnattr_setpgroup(&attributes, 0);
        posix_spawnattr_setflags(&attributes,
                                 POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
        pid_t child = 0;
        const int error = posix_spawnp(&child, argv.front(), nullptr, &attributes, argv.data(), environ);
        posix_spawnattr_destroy(&attributes);
        if (error != 0)
            throw StartupError(
                ExitCode::host_cannot,
                fmt::format("cannot start {}: {}; install the package gdb, or use umbra run --gdb",
                            argv.front(), std::strerror(error)));
        give_terminal(child);
        waiter_ = std::thread([child, ended = std::move(ended)] {
            int status = 0;
            while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
            }
            give_terminal(::getpgrp());
            ended();
        });
    }
    void wait() {
        if (waiter_.joinable())
            waiter_.join();
    }

  private:
    /// Nothing happens where there is none.
    static void give_terminal(pid_t group) {
        sigset_t blocked, before;
        sigemptyset(&blocked);
        sigaddset(&blocked, SIGTTOU);
        (void)::pthread_sigmask(SIG_BLOCK, &blocked, &before);
        (void)::tcsetpgrp(STDIN_FILENO, group);
        (void)::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    std::thread waiter_;
};

/// RunOptions::gdb_arch for a gdb that is given this file: x86-64 if it is a 64-bit ELF, otherwise empty.
std::string arch_of(const std::string& file) {
    std::array<char, EI_NIDENT> ident{};
    std::ifstream(file, std::ios::binary).read(ident.data(), ident.size());
    if (!std::string_view(ident.data(), ident.size()).starts_with(ELFMAG))
        return {};
    return ident[EI_CLASS] == ELFCLASS64 ? "x86-64" : "";
}

} // namespace

int debug_command(DebugOptions options, const std::function<int(const RunOptions&)>& run_elsewhere) {
    options.run.pause = true;
    if (!options.symbols.empty() && options.run.gdb_arch.empty())
        options.run.gdb_arch = arch_of(options.symbols);
    options.run.serial_input = false;                              // the terminal is gdb's
    if (std::getenv(GdbListener::inherited_variable) != nullptr) { // gdb is elsewhere
        options.run.gdb = "0";                                     // wherever it is
        options.run.debugger_ready = [](const std::string&, const std::function<void()>&) {};
        return run_command(options.run);
    }
    const PrivateFolder folder;
    const std::filesystem::path script = folder.path() / "umbra.py";
    if (!(std::ofstream(script) << gdb_script()))
        throw StartupError(ExitCode::host_cannot, fmt::format("cannot write '{}'", script.string()));

    std::vector<std::string> arguments{"gdb", "-q"};
    arguments.insert(arguments.end(), {"-x", script.string()});
    GdbProcess gdb;
    options.run.gdb = "unix:" + (folder.path() / "gdb").string();
    options.run.debugger_ready = [&](const std::string& address, std::function<void()> end) {
        arguments.insert(arguments.end(), {"-ex", "target remote " + address});
        for (const std::string& command : options.commands)
            arguments.insert(arguments.end(), {"-ex", command});
        arguments.push_back(options.symbols.empty() ? options.run.kernel : options.symbols);
        gdb.start(arguments, std::move(end));
    };
    const int code = run_elsewhere ? run_elsewhere(options.run) : run_command(options.run);
    gdb.wait();
    return code;
}

} // namespace umbra
