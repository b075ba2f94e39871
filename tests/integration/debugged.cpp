#include "tests/integration/debugged.hpp"

#include "tests/integration/host.hpp"

#include <cstdlib>
#include <iostream>
#include <regex>
#include <sstream>

#include <gtest/gtest.h>

namespace umbra {
namespace {

/// Both of a child's outputs are one.
Child::Setup outputs_joined() {
    return {.prepare = [] { return ::dup2(STDOUT_FILENO, STDERR_FILENO) >= 0; }};
}

std::vector<std::string> command_for(const std::string& guest, const Debugged::Setup& setup,
                                     const std::string& socket) {
    std::vector<std::string> arguments{"run", "--gdb",
                                       setup.address.empty() ? "unix:" + socket : setup.address};
    if (setup.pause)
        arguments.emplace_back("--pause");
    arguments.insert(arguments.end(), setup.options.begin(), setup.options.end());
    if (guest.starts_with('/')) {
        arguments.push_back(guest);
        return umbra_command(arguments);
    }
    arguments.push_back(guest_file(guest));
    std::vector<std::string> words = words_for_guest("shadow");
    if (words.empty())
        words.emplace_back("--");
    arguments.insert(arguments.end(), words.begin(), words.end());
    arguments.insert(arguments.end(), setup.words.begin(), setup.words.end());
    return umbra_command(arguments);
}

} // namespace

// --- Debugged

Debugged::Debugged(const std::string& guest, const Setup& setup)
    : child_(command_for(guest, setup, folder_.file("gdb")), outputs_joined()) {}

const std::string& Debugged::address() {
    const std::string before = "'target remote ", after = "'\n";
    if (address_.empty() && child_.wait_for(after)) {
        const std::string& said = child_.output();
        const std::size_t begin = said.find(before) + before.size();
        address_ = said.substr(begin, said.find(after, begin) - begin);
    }
    return address_;
}

void Debugged::expect_pass() {
    expect_end(0, "umbra: passed");
}

void Debugged::expect_end(int exit_code, const std::string& said) {
    const Ended& ended = child_.end();
    EXPECT_EQ(ended.exit_code, exit_code) << ended;
    EXPECT_NE(ended.out.find(said), std::string::npos) << "it did not say '" << said << "': " << ended;
}

// --- Sessions

std::string program_file(const std::string& name) {
    const char* const folders = std::getenv("PATH");
    std::istringstream list(folders == nullptr ? "" : folders);
    for (std::string folder; std::getline(list, folder, ':');) {
        const std::filesystem::path file = std::filesystem::path(folder) / name;
        if (::access(file.c_str(), X_OK) == 0)
            return file;
    }
    return {};
}

std::string mark(std::size_t number) {
    return "@" + std::to_string(number) + "@";
}

void expect_answers(const Ended& debugger, const std::vector<Exchange>& session) {
    EXPECT_EQ(debugger.exit_code, 0) << debugger;
    bool all = true;
    for (std::size_t i = 0; i < session.size(); ++i) {
        const std::string& said = debugger.out;
        const std::size_t found = said.find(mark(i) + '\n');
        if (found == std::string::npos) {
            ADD_FAILURE() << "the session ended before: " << session[i].command;
            all = false;
            break;
        }
        const std::size_t begin = found + mark(i).size() + 1;
        std::string answer = said.substr(begin, said.find(mark(i + 1) + '\n', begin) - begin);
        while (answer.ends_with('\n'))
            answer.pop_back();
        const bool right =
            session[i].answer.empty()
                ? answer.empty()
                : std::regex_search(answer, std::regex(session[i].answer, std::regex::multiline));
        EXPECT_TRUE(right) << "command:  " << session[i].command << "\nexpected: " << session[i].answer
                           << "\nanswer:   " << answer;
        all = all && right;
    }
    if (!all)
        std::cout << "The session: " << debugger << '\n';
}

namespace {

std::vector<std::string> gdb_command(const std::string& address, const std::string& kernel,
                                     const std::vector<Exchange>& session, const TemporaryFolder& scripts) {
    std::vector<std::string> command{program_file("gdb"), "-q", "-nx", "-batch"};
    const auto give = [&command](const std::string& text) { command.insert(command.end(), {"-ex", text}); };
    for (const char* const setting : {"set pagination off", "set confirm off", "set style enabled off",
                                      "set print entry-values no", "set remotetimeout 60", "set width 0"})
        give(setting);
    give("target remote " + address);
    for (std::size_t i = 0; i < session.size(); ++i) {
        give("echo \\n" + mark(i) + "\\n");
        const std::string& text = session[i].command;
        if (text.find('\n') == std::string::npos)
            give(text);
        else
            command.insert(command.end(), {"-x", scripts.write(std::to_string(i), text)});
    }
    give("echo \\n" + mark(session.size()) + "\\n");
    if (!kernel.empty())
        command.push_back(guest_file(kernel));
    return command;
}

} // namespace

Gdb::Gdb(Debugged& guest, const std::string& kernel, std::vector<Exchange> session)
    : session_(std::move(session)),
      child_(gdb_command(guest.address(), kernel, session_, scripts_), outputs_joined()) {}

void Gdb::expect_answers() {
    umbra::expect_answers(child_.end(), session_);
}

} // namespace umbra
