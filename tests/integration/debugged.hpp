// A guest that is debugged: umbra, the debugger's client, and what they say to each other.
#pragma once

#include "tests/integration/child.hpp"
#include "tests/integration/files.hpp"

#include <string>
#include <utility>
#include <vector>

namespace umbra {

/// `umbra run --gdb` of a shipped guest, or of a kernel's file if it is an absolute path. What umbra itself
/// says is among what the guest writes.
class Debugged {
  public:
    struct Setup {
        bool pause = true;
        std::string address{};              ///< none: a socket in a temporary folder
        std::vector<std::string> options{}; ///< of umbra
        std::vector<std::string> words{};   ///< for the guest
    };
    explicit Debugged(const std::string& guest) : Debugged(guest, Setup()) {}
    Debugged(const std::string& guest, const Setup& setup);

    /// Waits until a debugger can connect: its address, as umbra names it. Empty if that never comes.
    [[nodiscard]] const std::string& address();
    [[nodiscard]] Child& child() { return child_; }
    /// Its end, which is to be a pass.
    void expect_pass();
    /// Its end, which is to be with this exit code; `said` is then among what it wrote.
    void expect_end(int exit_code, const std::string& said);

  private:
    TemporaryFolder folder_;
    Child child_;
    std::string address_;
};

/// One command for a debugger, and a regular expression (ECMAScript's; ^ and $ are at each line) that is to
/// be found in what the debugger answers. An empty one: it answers nothing.
struct Exchange {
    std::string command; ///< several lines: a script
    std::string answer;
};

/// gdb in batch mode. It connects to the guest, has the symbols of `kernel`, if there is one, and is given
/// one command after the other.
class Gdb {
  public:
    Gdb(Debugged& guest, const std::string& kernel, std::vector<Exchange> session);

    [[nodiscard]] Child& child() { return child_; }
    /// Waits for its end, and checks what it answered.
    void expect_answers();

  private:
    TemporaryFolder scripts_;
    std::vector<Exchange> session_;
    Child child_;
};
inline void run_gdb(Debugged& guest, const std::string& kernel, std::vector<Exchange> session) {
    Gdb(guest, kernel, std::move(session)).expect_answers();
}

/// The path of a program; empty if it is not installed.
[[nodiscard]] std::string program_file(const std::string& name);

/// Checks what a debugger wrote in a session in which `mark(n)` was written before the nth command.
void expect_answers(const Ended& debugger, const std::vector<Exchange>& session);
[[nodiscard]] std::string mark(std::size_t number);

} // namespace umbra
