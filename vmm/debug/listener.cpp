#include "vmm/debug/listener.hpp"

#include "vmm/error.hpp"

#include <array>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>

#include <fcntl.h>
#include <fmt/core.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

namespace umbra {
namespace {

[[noreturn]] void refuse_address(std::string_view text, std::string_view why) {
    throw StartupError(ExitCode::bad_usage, fmt::format("'{}' is no address to serve gdb on: {}", text, why));
}

[[noreturn]] void cannot_serve(std::string_view where, std::string_view why) {
    throw StartupError(ExitCode::bad_usage, fmt::format("cannot serve gdb on {}: {}", where, why));
}

std::string host_and_port(std::string_view host, std::string_view port) {
    if (host.find(':') == std::string_view::npos)
        return fmt::format("{}:{}", host, port);
    return fmt::format("[{}]:{}", host, port);
}

struct Name {
    sockaddr_storage bytes{};
    socklen_t size = sizeof(sockaddr_storage);

    [[nodiscard]] sockaddr* get() { return reinterpret_cast<sockaddr*>(&bytes); }
};

/// An address in numbers.
std::string text_of(Name& name) {
    std::array<char, NI_MAXHOST> host{};
    std::array<char, NI_MAXSERV> port{};
    if (::getnameinfo(name.get(), name.size, host.data(), host.size(), port.data(), port.size(),
                      NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return "an unknown address";
    return host_and_port(host.data(), port.data());
}

/// Who is at the other end.
std::string peer_of(int socket, Name& name) {
    if (name.bytes.ss_family != AF_UNIX)
        return text_of(name);
    ucred peer{};
    socklen_t size = sizeof peer;
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0)
        return "a process of this computer";
    return fmt::format("process {}", peer.pid);
}

void enable(int socket, int level, int option) {
    constexpr int on = 1; // without it everything still works, only not as well
    (void)::setsockopt(socket, level, option, &on, sizeof on);
}

} // namespace

// --- GdbAddress

GdbAddress GdbAddress::parse(std::string_view text) {
    GdbAddress address;
    std::string_view rest = text;
    if (rest.starts_with("unix:")) {
        address.path = rest.substr(5);
        if (address.path.empty())
            refuse_address(text, "the path is missing");
        if (address.path.size() >= sizeof(sockaddr_un::sun_path))
            refuse_address(
                text, fmt::format("the path is longer than {} bytes", sizeof(sockaddr_un::sun_path) - 1));
        if (address.path.find('\0') != std::string::npos)
            refuse_address(text, "there is a zero byte in the path");
        return address;
    }
    if (rest.starts_with("tcp:"))
        rest.remove_prefix(4);
    const std::size_t colon = rest.rfind(':');
    if (colon != std::string_view::npos) {
        std::string_view host = rest.substr(0, colon);
        rest.remove_prefix(colon + 1);
        const bool brackets = host.starts_with('[') && host.ends_with(']');
        if (brackets)
            host = host.substr(1, host.size() - 2);
        else if (host.find_first_of(":[]") != std::string_view::npos)
            refuse_address(text, "write [IPV6]:PORT, [HOST:]PORT or unix:PATH");
        if (brackets && host.find(':') == std::string_view::npos)
            refuse_address(text, "there is no IPv6 address in the brackets");
        if (!host.empty())
            address.host = host;
    }
    const char* const end = rest.data() + rest.size();
    const auto [stop, error] = std::from_chars(rest.data(), end, address.port);
    if (error != std::errc{} || stop != end)
        refuse_address(text,
                       fmt::format("the port, '{}', is no number from 0 (any free one) to 65535", rest));
    return address;
}

// --- GdbListener

GdbListener::GdbListener(const GdbAddress& where) {
    if (where.path.empty())
        bind_tcp(where);
    else
        bind_unix(where.path);
}

std::optional<GdbListener> GdbListener::inherited() {
    const char* const text = std::getenv(inherited_variable);
    if (text == nullptr)
        return std::nullopt;
    const std::string_view all(text);
    const char* at = text;
    std::array<int, 2> fds{};
    for (int& fd : fds) {
        const auto [end, error] = std::from_chars(at, text + all.size(), fd);
        if (error != std::errc() || *end != ',')
            return std::nullopt;
        at = end + 1;
    }
    const auto [socket, told] = fds;
    for (const int fd : {socket, told})
        (void)::fcntl(fd, F_SETFD, FD_CLOEXEC);
    (void)::fcntl(socket, F_SETFL, O_NONBLOCK);
    return GdbListener(File(socket), File(told), at);
}

GdbListener::GdbListener(GdbListener&& other) noexcept
    : socket_(std::move(other.socket_)), told_(std::move(other.told_)), address_(std::move(other.address_)),
      path_(std::exchange(other.path_, {})), device_(other.device_), inode_(other.inode_) {}

GdbListener::~GdbListener() {
    struct stat found {};
    if (!path_.empty() && ::lstat(path_.c_str(), &found) == 0 && found.st_dev == device_ &&
        found.st_ino == inode_)
        (void)::unlink(path_.c_str());
}

void GdbListener::bind_tcp(const GdbAddress& where) {
    const std::string port = std::to_string(where.port);
    const std::string text = host_and_port(where.host, port);
    addrinfo hints{};
    hints.ai_flags = AI_NUMERICSERV;
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* list = nullptr;
    if (const int error = ::getaddrinfo(where.host.c_str(), port.c_str(), &hints, &list); error != 0)
        cannot_serve(text, ::gai_strerror(error));
    const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> found(list, ::freeaddrinfo);
    int error = 0;
    for (const addrinfo* one = found.get(); one != nullptr; one = one->ai_next) {
        File socket(::socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, one->ai_protocol));
        if (socket.get() >= 0)
            enable(socket.get(), SOL_SOCKET, SO_REUSEADDR); // the last run's connections may linger
        if (socket.get() < 0 || ::bind(socket.get(), one->ai_addr, one->ai_addrlen) != 0) {
            error = errno;
            continue;
        }
        socket_ = std::move(socket);
        Name name;
        (void)::getsockname(socket_.get(), name.get(), &name.size);
        address_ = text_of(name);
        return;
    }
    if (error == EADDRINUSE)
        cannot_serve(text, fmt::format("port {} is in use; choose another, or 0 for any free one", port));
    if (error == EADDRNOTAVAIL)
        cannot_serve(text, "this computer does not have that address");
    cannot_serve(text, std::strerror(error));
}

void GdbListener::bind_unix(const std::string& path) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    path.copy(static_cast<char*>(name.sun_path), sizeof name.sun_path - 1);
    const auto* const address = reinterpret_cast<const sockaddr*>(&name);

    struct stat found {};
    if (::lstat(path.c_str(), &found) == 0) {
        if (!S_ISSOCK(found.st_mode))
            cannot_serve(path, "there is a file of that name, and it is no socket");
        // What a server that was killed left behind is in nobody's way. A socket of the wrong type is told
        // apart: it asks whether there is a server without becoming its client.
        const File probe(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
        if (::connect(probe.get(), address, sizeof name) == 0 || errno == EPROTOTYPE)
            cannot_serve(path, "another program listens there");
        if (errno != ECONNREFUSED)
            cannot_serve(path, std::strerror(errno));
        if (::unlink(path.c_str()) != 0)
            cannot_serve(path, std::strerror(errno));
    }
    socket_ = File(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    // bind() gives the file the socket's own mode, so there is no moment in which others could connect.
    if (socket_.get() < 0 || ::fchmod(socket_.get(), S_IRUSR | S_IWUSR) != 0 ||
        ::bind(socket_.get(), address, sizeof name) != 0)
        cannot_serve(path, std::strerror(errno));
    std::error_code error;
    path_ = std::filesystem::absolute(path, error).string();
    if (error)
        path_ = path;
    address_ = path_;
    if (::lstat(path_.c_str(), &found) == 0) {
        device_ = found.st_dev;
        inode_ = found.st_ino;
    }
}

void GdbListener::listen() {
    if (::listen(socket_.get(), SOMAXCONN) != 0)
        cannot_serve(address_, std::strerror(errno));
    constexpr char listening = 1;
    if (told_.get() >= 0)
        (void)!::write(told_.get(), &listening, 1);
    told_ = File();
}

GdbListener::Connection GdbListener::accept() const {
    Name name;
    File socket(::accept4(socket_.get(), name.get(), &name.size, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (socket.get() < 0)
        return {};
    if (name.bytes.ss_family != AF_UNIX)
        enable(socket.get(), IPPROTO_TCP, TCP_NODELAY); // packets are small, and waited for
    std::string who = peer_of(socket.get(), name);
    return {std::move(socket), std::move(who)};
}

} // namespace umbra
