#include "launcher/emulated/machine.hpp"

#include "vmm/error.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include <fmt/core.h>

namespace umbra::emulated {
namespace {

[[noreturn]] void cannot(const std::string& what) {
    throw StartupError(ExitCode::host_cannot, what);
}

File checked(int fd, const char* what) {
    if (fd < 0)
        cannot(fmt::format("{}: {}", what, std::strerror(errno)));
    return File(fd);
}

struct Ends {
    File ours, theirs;
};

Ends make_socket_pair() {
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0)
        cannot(fmt::format("socketpair: {}", std::strerror(errno)));
    return {File(ends[0]), File(ends[1])};
}

/// The program's path; empty if it is nowhere.
std::string find_program(const char* name, std::initializer_list<const char*> folders) {
    const char* const path = std::getenv("PATH");
    std::string_view rest = path == nullptr ? "/usr/local/bin:/usr/bin:/bin" : path;
    const auto executable = [name](std::string_view folder) {
        std::string file = fmt::format("{}/{}", folder, name);
        return ::access(file.c_str(), X_OK) == 0 ? file : std::string();
    };
    while (!rest.empty()) {
        const std::string_view folder = rest.substr(0, rest.find(':'));
        if (std::string file = executable(folder); !folder.empty() && !file.empty())
            return file;
        rest.remove_prefix(std::min(rest.size(), folder.size() + 1));
    }
    for (const char* const folder : folders)
        if (std::string file = executable(folder); !file.empty())
            return file;
    return {};
}

} // namespace

// --- Helper

Helper::Helper(const std::vector<std::string>& command, const std::vector<int>& passed, const File& log) {
    std::vector<char*> arguments;
    arguments.reserve(command.size() + 1);
    for (const std::string& argument : command)
        arguments.push_back(const_cast<char*>(argument.c_str()));
    arguments.push_back(nullptr);
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0)
        cannot(fmt::format("fork: {}", std::strerror(errno)));
    if (pid_ == 0) {
        (void)::setpgid(0, 0); // Ctrl-C is not for it
        (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
        const int nothing = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
        (void)::dup2(nothing, STDIN_FILENO);
        (void)::dup2(log.get(), STDOUT_FILENO);
        (void)::dup2(log.get(), STDERR_FILENO);
        for (const int fd : passed)
            (void)::fcntl(fd, F_SETFD, 0);
        sigset_t none;
        sigemptyset(&none);
        (void)::sigprocmask(SIG_SETMASK, &none, nullptr);
        if (::getppid() == parent)
            ::execv(arguments.front(), arguments.data());
        const std::string_view why = std::strerror(errno);
        (void)!::write(STDERR_FILENO, why.data(), why.size());
        ::_exit(127);
    }
    handle_ = File(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));
}

Helper::~Helper() {
    (void)::kill(pid_, SIGKILL);
    (void)::waitpid(pid_, nullptr, 0);
}

std::string Helper::end() const {
    siginfo_t info{};
    if (::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == 0)
        return {};
    if (info.si_code == CLD_EXITED)
        return fmt::format("ended with exit code {}", info.si_status);
    return fmt::format("was ended by signal {} ({})", info.si_status, ::strsignal(info.si_status));
}

// --- EmulatedMachine

namespace {

/// What the machine is made of; StartupError names all that is missing.
struct Parts {
    std::string qemu = find_program("qemu-system-x86_64", {});
    std::optional<HostKernel> kernel;

    explicit Parts(bool nested_paging) {
        std::string missing, packages;
        const auto lacks = [&](const std::string& what, const char* package) {
            missing += (missing.empty() ? "" : " and ") + what;
            packages += std::string(" ") + package;
        };
        if (qemu.empty())
            lacks("QEMU", "qemu-system-x86");
        if (const std::string kernel_lacks = find_host_kernel(nested_paging ? "npt=1" : "npt=0", kernel);
            !kernel)
            lacks(kernel_lacks, ::geteuid() == 0 ? "linux-image-cloud-amd64" : "linux-image-amd64");
        if (!missing.empty())
            cannot(fmt::format("the emulated host needs {}: apt-get install{}", missing, packages));
    }
};

} // namespace

EmulatedMachine::EmulatedMachine(const MachineConfig& config)
    : log_(checked(::memfd_create("log", MFD_CLOEXEC), "memfd_create")) {
    Parts parts(config.nested_paging);
    const std::string& qemu = parts.qemu;
    kernel_ = std::move(*parts.kernel);
    initramfs_ = make_initramfs(kernel_);
    (void)::fcntl(log_.get(), F_SETFL, O_APPEND);
    Ends line = make_socket_pair();
    line_ = std::move(line.ours);
    std::vector<int> passed{line.theirs.get(), initramfs_.get(), log_.get()};
    const auto descriptor = [](const File& file) { return fmt::format("/proc/self/fd/{}", file.get()); };

    // What saves boot time: no self-tests of the kernel's ciphers, no device that is not needed, no
    // mitigations (which cost each exit of the nested guest even more). An oops ends the machine instead of
    // leaving umbra waiting.
    std::string words =
        "console=ttyS0 quiet loglevel=4 mitigations=off cryptomgr.notests panic=-1 oops=panic";
    // On a busy computer the kernel would take its clock for unstable, which it is not, and patch its code
    // for that.
    words += " tsc=reliable";
    if (config.counted)
        words += " nokaslr norandmaps"; // or no two runs would count alike
    const std::uint64_t megabytes = config.memory_bytes >> 20;
    std::vector<std::string> arguments{
        qemu,
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-smp",
        std::to_string(config.processors),
        "-m",
        fmt::format("{}M", megabytes),
        "-object",
        fmt::format("memory-backend-memfd,id=memory,size={}M,share=on", megabytes),
        "-machine",
        "pc,memory-backend=memory",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-kernel",
        kernel_.image,
        "-initrd",
        descriptor(initramfs_),
        "-append",
        words,
        "-chardev",
        fmt::format("file,id=log,append=on,path={}", descriptor(log_)),
        "-serial",
        "chardev:log",
        "-device",
        "virtio-serial-pci,max_ports=2",
        "-chardev",
        fmt::format("socket,id=line,fd={}", line.theirs.get()),
        "-device",
        "virtserialport,chardev=line,nr=1"};
    if (config.counted)
        arguments.insert(arguments.end(), {"-icount", "shift=0,sleep=off"});
    const File files = share_files(arguments);
    if (files.get() >= 0)
        passed.push_back(files.get());
    qemu_ = std::make_unique<Helper>(arguments, passed, log_);
}

/// The whole file system of this computer, as this user may use it: what QEMU needs for it, and the socket it
/// talks to virtiofsd on.
File EmulatedMachine::share_files(std::vector<std::string>& arguments) {
    if (kernel_.sharing == Sharing::plan9) {
        arguments.insert(arguments.end(),
                         {"-fsdev", "local,id=files,path=/,security_model=none,multidevs=remap", "-device",
                          "virtio-9p-pci,fsdev=files,mount_tag=umbra"});
        return {};
    }
    const std::string program = find_program("virtiofsd", {"/usr/lib/qemu", "/usr/libexec"});
    if (program.empty())
        cannot("the emulated host needs virtiofsd, to share files: apt-get install qemu-system-common");
    // An abstract name that the kernel chooses: nothing is left behind.
    File listener = checked(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    socklen_t size = sizeof name.sun_family;
    auto* const address = reinterpret_cast<sockaddr*>(&name);
    if (::bind(listener.get(), address, size) != 0 || ::listen(listener.get(), 1) != 0)
        cannot(fmt::format("bind: {}", std::strerror(errno)));
    size = sizeof name;
    File connection = checked(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
    if (::getsockname(listener.get(), address, &size) != 0 || ::connect(connection.get(), address, size) != 0)
        cannot(fmt::format("connect: {}", std::strerror(errno)));
    // What has been read stays in the machine's memory, for programs start often: what somebody changes
    // outside while it is up, it may not see.
    virtiofsd_ = std::make_unique<Helper>(
        std::vector<std::string>{program, fmt::format("--fd={}", listener.get()), "-o",
                                 "source=/,cache=always,sandbox=chroot,log_level=err"},
        std::vector{listener.get()}, log_);
    arguments.insert(arguments.end(), {"-chardev", fmt::format("socket,id=files,fd={}", connection.get()),
                                       "-device", "vhost-user-fs-pci,chardev=files,tag=umbra"});
    return connection;
}

std::string EmulatedMachine::obituary() const {
    std::string text;
    for (const auto& [what, helper] : {std::pair("QEMU", &qemu_), std::pair("virtiofsd", &virtiofsd_)})
        if (const std::string end = *helper ? (*helper)->end() : std::string(); !end.empty())
            text += fmt::format("{}{} {}", text.empty() ? "" : ", ", what, end);
    if (text.empty())
        text = "it stopped talking";
    constexpr std::size_t most = 2000;
    std::array<char, most> buffer{};
    const off_t size = ::lseek(log_.get(), 0, SEEK_END);
    const ssize_t count = ::pread(log_.get(), buffer.data(), buffer.size(),
                                  std::max<off_t>(0, size - static_cast<off_t>(most)));
    std::string said(buffer.data(), static_cast<std::size_t>(std::max<ssize_t>(0, count)));
    std::erase(said, '\r');
    while (said.ends_with('\n'))
        said.pop_back();
    return said.empty() ? text : text + "; its last words:\n" + said;
}

} // namespace umbra::emulated
