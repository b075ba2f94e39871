// How umbra fails before the guest runs, and how a run ends.
#pragma once

#include <stdexcept>
#include <string>

namespace umbra {

/// Exit codes of the `umbra` command; README.md documents them to users.
enum class ExitCode : int {
    passed = 0,
    guest_failed = 1,   ///< the guest reported failure; its code is printed
    bad_usage = 2,      ///< bad command line, or a kernel that cannot be loaded
    guest_panicked = 3, ///< panic, triple fault, reset, or something umbra cannot run
    host_cannot = 4,    ///< this host cannot run the guest
    timed_out = 124,    ///< as coreutils' timeout(1)
    interrupted = 130,  ///< Ctrl-C: 128 + SIGINT, as shells count
};

/// A failure before the guest's first instruction. Thrown anywhere during start-up, caught once in main() and
/// printed as one line. Nothing throws once the run loop has begun.
class StartupError : public std::runtime_error {
  public:
    StartupError(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
    [[nodiscard]] ExitCode code() const { return code_; }

  private:
    ExitCode code_;
};

} // namespace umbra
