// A guest's run as a child process of the runner.
#pragma once

#include "vmm/kvm/file.hpp"

#include <string>
#include <vector>

#include <sys/types.h>

namespace umbra {

struct ChildEnd {
    int exit_code = -1; ///< -1: it was ended by `signal`
    int signal = 0;
};

/// A process in a process group of its own, with all that it says on pipes. It ends with this object, or with
/// the thread that made it, if not before: also if that is killed.
class ChildProcess {
  public:
    /// The descriptor on which the child writes its result: `--result /proc/self/fd/3`.
    static constexpr int result_fd = 3;

    /// `program` is what is executed, `arguments` its argv. With `input` there is a pipe to its standard
    /// input; otherwise that is /dev/null. std::system_error if it cannot be started.
    ChildProcess(const std::string& program, const std::vector<std::string>& arguments, bool input);
    ChildProcess(const ChildProcess&) = delete;
    ChildProcess& operator=(const ChildProcess&) = delete;
    ChildProcess(ChildProcess&&) = delete;
    ChildProcess& operator=(ChildProcess&&) = delete;
    ~ChildProcess();

    // Non-blocking. To be replaced by File() at their end.
    File input, console, errors, result;

    /// Readable when the process has ended.
    [[nodiscard]] int handle() const { return handle_.get(); }
    void send_signal(int signal) const;
    /// Waits for its end; ends also what it may have started.
    [[nodiscard]] ChildEnd reap();

  private:
    pid_t pid_ = -1; ///< -1: reaped
    File handle_;
};

} // namespace umbra
