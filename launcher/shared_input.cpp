#include "launcher/shared_input.hpp"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <utility>

namespace umbra {

SharedInput::SharedInput(File file) : file_(std::move(file)) {
    // To open this would make a new terminal.
    constexpr unsigned ptmx_major = 5, ptmx_minor = 2;
    struct stat status {};
    if (file_.get() < 0 || ::fstat(file_.get(), &status) != 0 ||
        !(S_ISFIFO(status.st_mode) ||
          (::isatty(file_.get()) == 1 && status.st_rdev != makedev(ptmx_major, ptmx_minor))))
        return;
    const std::string path = "/proc/self/fd/" + std::to_string(file_.get());
    own_ = File(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
}

ssize_t SharedInput::read(void* buffer, std::size_t size) const {
    if (own_.get() >= 0)
        return ::read(own_.get(), buffer, size);
    const ssize_t got = ::recv(file_.get(), buffer, size, MSG_DONTWAIT);
    return got < 0 && errno == ENOTSOCK ? ::read(file_.get(), buffer, size) : got;
}

} // namespace umbra
