#include "launcher/test/output_file.hpp"

#include "vmm/error.hpp"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include <fcntl.h>
#include <fmt/core.h>
#include <poll.h>
#include <unistd.h>

namespace umbra {
namespace {

namespace fs = std::filesystem;

std::string told(const std::string& path, int error) {
    return fmt::format("cannot write '{}': {}", path, std::strerror(error));
}

/// Where `path` leads, if it is a symbolic link: what is replaced is the file, not the link.
fs::path target_of(const std::string& path) {
    std::error_code error;
    fs::path target = fs::canonical(path, error);
    return error ? fs::path(path) : target;
}

bool is_special(const fs::path& path) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    return fs::exists(status) && !fs::is_regular_file(status);
}

/// Writes `contents` to the file that `flags` open or create. 0 or an errno.
int write_file(const std::string& path, int flags, std::string_view contents) {
    constexpr mode_t mode = 0666; // less the user's umask
    const int fd = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | flags, mode);
    if (fd < 0)
        return errno;
    int error = write_all(fd, contents) ? 0 : errno;
    if (::close(fd) != 0 && error == 0) // some file systems tell only now that there is no room
        error = errno;
    return error;
}

} // namespace

bool write_all(int fd, std::string_view text) {
    while (!text.empty()) {
        const ssize_t written = ::write(fd, text.data(), text.size());
        if (written >= 0) {
            text.remove_prefix(static_cast<std::size_t>(written));
        } else if (errno == EAGAIN) {
            pollfd ready{fd, POLLOUT, 0};
            (void)::poll(&ready, 1, -1);
        } else if (errno != EINTR) {
            return false;
        }
    }
    return true;
}

OutputFile::OutputFile(const std::string& path)
    : path_(path == "-" ? "standard output" : path),
      fd_(path == "-" ? STDOUT_FILENO
                      : ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode_t{0666})) {
    if (fd_ < 0)
        throw StartupError(ExitCode::bad_usage, told(path_, errno));
}

OutputFile::~OutputFile() {
    if (fd_ != STDOUT_FILENO)
        (void)::close(fd_);
}

void OutputFile::write(std::string_view text) {
    if (!problem_ && !write_all(fd_, text))
        problem_ = told(path_, errno);
}

void require_replaceable(const std::string& path) {
    const fs::path target = target_of(path);
    std::error_code error;
    if (fs::is_directory(target, error))
        throw StartupError(ExitCode::bad_usage, told(path, EISDIR));
    const fs::path folder = target.has_parent_path() ? target.parent_path() : fs::path(".");
    if (::access(is_special(target) ? target.c_str() : folder.c_str(), W_OK) != 0)
        throw StartupError(ExitCode::bad_usage, told(path, errno));
    if (!is_special(target) && !fs::is_directory(folder, error))
        throw StartupError(ExitCode::bad_usage, told(path, ENOTDIR));
}

std::optional<std::string> replace_file(const std::string& path, std::string_view contents) {
    const fs::path target = target_of(path);
    if (is_special(target)) {
        const int error = write_file(target, 0, contents);
        return error != 0 ? std::optional(told(path, error)) : std::nullopt;
    }
    const std::string partial = fmt::format("{}.{}.partial", target.native(), ::getpid());
    int error = write_file(partial, O_CREAT | O_TRUNC | O_NOFOLLOW, contents);
    if (error == 0 && ::rename(partial.c_str(), target.c_str()) != 0)
        error = errno;
    if (error == 0)
        return std::nullopt;
    (void)::unlink(partial.c_str());
    return told(path, error);
}

} // namespace umbra
