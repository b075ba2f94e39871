// Debugging by gdb's remote protocol: umbra with a guest, and a client that speaks it over a Unix socket.

#include "shadow/address.hpp"
#include "tests/bench/result.hpp"
#include "vmm/debug/packet.hpp"
#include "vmm/kvm/file.hpp"
#include "vmm/loader/loader.hpp"
#include "vmm/symbols.hpp"

#include <fcntl.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <iterator>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/core.h>

namespace umbra::bench {
namespace {

using namespace std::chrono_literals;

/// A benchmark that could not run.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::filesystem::path guest_file(const std::string& name) {
    return std::filesystem::read_symlink("/proc/self/exe").parent_path() / "guest" / name;
}

// --- The client

/// As a client may send it: not run-length encoded.
std::string packet(std::string_view payload) {
    const unsigned sum = std::accumulate(payload.begin(), payload.end(), 0U, [](unsigned so_far, char c) {
        return so_far + static_cast<unsigned char>(c);
    });
    return fmt::format("${}#{:02x}", payload, sum & 0xff);
}

/// Run lengths undone (GDB manual, "Overview" of the remote protocol).
std::string expand(std::string_view encoded) {
    constexpr char least = 29; // stands for no repetition
    std::string payload;
    for (std::size_t i = 0; i < encoded.size(); ++i) {
        if (encoded[i] == '*' && !payload.empty() && i + 1 < encoded.size())
            payload.append(static_cast<std::size_t>(encoded[++i] - least), payload.back());
        else
            payload += encoded[i];
    }
    return payload;
}

/// One end of a conversation, without acknowledgments.
class Client {
  public:
    Client() = default;
    /// False as long as nobody listens there.
    [[nodiscard]] bool connect(const std::string& path) {
        File socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_un name{};
        name.sun_family = AF_UNIX;
        path.copy(static_cast<char*>(name.sun_path), sizeof name.sun_path - 1);
        if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&name), sizeof name) != 0)
            return false;
        constexpr timeval patience{.tv_sec = 60, .tv_usec = 0};
        (void)::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        socket_ = std::move(socket);
        expect("QStartNoAckMode", "OK");
        send("+");
        return true;
    }

    void send(std::string_view bytes) const {
        if (::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) !=
            static_cast<::ssize_t>(bytes.size()))
            throw Failure("umbra has closed the connection");
    }
    void send_packet(std::string_view payload) const { send(packet(payload)); }
    /// The next reply, but for what umbra prints meanwhile.
    [[nodiscard]] std::string receive() {
        for (;;) {
            std::string payload = receive_packet();
            if (!payload.starts_with('O') || payload == "OK")
                return payload;
        }
    }
    [[nodiscard]] std::string ask(std::string_view payload) {
        send_packet(payload);
        return receive();
    }
    void expect(std::string_view payload, std::string_view answer) {
        const std::string reply = ask(payload);
        if (!reply.starts_with(answer))
            throw Failure(fmt::format("umbra answered '{}' to '{}'", reply, payload));
    }

  private:
    [[nodiscard]] std::string receive_packet() {
        constexpr std::size_t sum = 3; // '#' and two digits
        for (;;) {
            const std::size_t begin = received_.find('$'), end = received_.find('#', begin);
            if (end != std::string::npos && received_.size() >= end + sum) {
                const std::string encoded = received_.substr(begin + 1, end - begin - 1);
                received_.erase(0, end + sum);
                return expand(encoded);
            }
            std::array<char, 4096> bytes{};
            const ::ssize_t got = ::recv(socket_.get(), bytes.data(), bytes.size(), 0);
            if (got <= 0)
                throw Failure("umbra does not answer");
            received_.append(bytes.data(), static_cast<std::size_t>(got));
        }
    }

    File socket_;
    std::string received_;
};

// --- The guest

/// `umbra run --gdb --pause` of a shipped guest, and its client. Failure if that does not come to be.
class DebuggedGuest {
  public:
    DebuggedGuest(const std::string& guest, std::vector<std::string> words) {
        std::string name = (std::filesystem::temp_directory_path() / "umbra-XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr)
            throw Failure("no temporary folder");
        folder_ = name;
        const std::string socket = folder_ / "gdb";
        std::vector<std::string> command{guest_file("").parent_path().parent_path() / "umbra",
                                         "run",
                                         "--gdb=unix:" + socket,
                                         "--pause",
                                         "--serial=none",
                                         "--timeout=600", // should this process die
                                         guest_file(guest),
                                         "--"};
        std::move(words.begin(), words.end(), std::back_inserter(command));
        start(command);
        const auto deadline = std::chrono::steady_clock::now() + 20s;
        while (!client_.connect(socket)) {
            if (::waitpid(process_, nullptr, WNOHANG) == process_)
                process_ = 0;
            if (process_ == 0 || std::chrono::steady_clock::now() > deadline) {
                finish();
                throw Failure("umbra or its guest, beside this program, failed");
            }
            std::this_thread::sleep_for(1ms);
        }
    }
    DebuggedGuest(const DebuggedGuest&) = delete;
    DebuggedGuest& operator=(const DebuggedGuest&) = delete;
    DebuggedGuest(DebuggedGuest&&) = delete;
    DebuggedGuest& operator=(DebuggedGuest&&) = delete;
    ~DebuggedGuest() { finish(); }

    [[nodiscard]] Client& client() { return client_; }
    /// What umbra and its guest have had of the CPUs so far.
    [[nodiscard]] double cpu_nanoseconds() const {
        ::clockid_t clock{};
        timespec time{};
        if (::clock_getcpuclockid(process_, &clock) != 0 || ::clock_gettime(clock, &time) != 0)
            throw Failure("the CPU time of umbra is not known");
        return static_cast<double>(time.tv_sec) * 1e9 + static_cast<double>(time.tv_nsec);
    }

  private:
    void start(std::vector<std::string>& command) {
        std::vector<char*> arguments;
        arguments.reserve(command.size() + 1);
        for (std::string& argument : command)
            arguments.push_back(argument.data());
        arguments.push_back(nullptr);
        posix_spawn_file_actions_t files;
        ::posix_spawn_file_actions_init(&files);
        for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
            (void)::posix_spawn_file_actions_addopen(&files, fd, "/dev/null", O_RDWR, 0);
        if (::posix_spawn(&process_, arguments[0], &files, nullptr, arguments.data(), environ) != 0)
            process_ = 0;
        ::posix_spawn_file_actions_destroy(&files);
    }
    void finish() {
        if (process_ != 0) {
            (void)::kill(process_, SIGKILL);
            (void)::waitpid(process_, nullptr, 0);
        }
        std::error_code ignored;
        std::filesystem::remove_all(folder_, ignored);
    }

    std::filesystem::path folder_;
    pid_t process_ = 0;
    Client client_;
};

/// Runs a benchmark, which may fail.
template<class Body>
void run(benchmark::State& state, Body&& body) {
    for ([[maybe_unused]] auto _ : state) {
        try {
            body();
        } catch (const std::exception& failure) {
            state.SkipWithError(failure.what());
        }
    }
}

double nanoseconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
}

// --- From Ctrl-C to the prompt

constexpr unsigned stops = 200;

struct StopTimes {
    std::vector<double> stop;       ///< 0x03 to the stop's reply
    std::vector<double> round_trip; ///< the same reply, asked for when the guest stands still
};

StopTimes time_stops(const std::vector<std::string>& words) {
    DebuggedGuest guest("debug", words);
    Client& client = guest.client();
    StopTimes times;
    for (unsigned i = 0; i <= stops; ++i) {
        client.send_packet("vCont;c");
        // The first time it gets to where it is to be; then it is met at different moments of its work.
        std::this_thread::sleep_for(i == 0 ? std::chrono::microseconds(500ms)
                                           : std::chrono::microseconds(2000 + i % 16 * 137));
        const auto start = std::chrono::steady_clock::now();
        client.send("\x03");
        const std::string reply = client.receive();
        if (i > 0)
            times.stop.push_back(nanoseconds_since(start));
        if (!reply.starts_with("T02"))
            throw Failure(fmt::format("the guest did not stop but said '{}'", reply));

        const auto asked = std::chrono::steady_clock::now();
        client.expect("?", "T02");
        if (i > 0)
            times.round_trip.push_back(nanoseconds_since(asked));
    }
    return times;
}

// --- A breakpoint's condition

// Of gdb's amd64 registers (GDB manual, "Standard Target Features"): as in the target description.
constexpr unsigned register_rdi = 5, register_rip = 16;
constexpr std::string_view no_levels_left = "0000000000000000"; ///< RDI

/// The breakpoint's place is a function that calls itself so many times, its argument counting down to 0.
/// Few, so that most samples are done before another process gets the CPU.
constexpr unsigned false_hits = 50;

struct BreakpointTimes {
    std::vector<double> by_umbra, by_client; ///< of a hit
};

GuestVirt function_of(const std::filesystem::path& kernel, std::string_view name) {
    const auto function = Symbols::from_elf(read_kernel(kernel)).function(name);
    if (!function)
        throw Failure(fmt::format("'{}' has no function '{}'", kernel.string(), name));
    return function->start;
}

/// As registers are sent: the least significant byte first.
std::string register_value(std::uint64_t value) {
    return to_hex(std::as_bytes(std::span(&value, 1)));
}

/// Agent code for `levels == 0`, as gdb compiles it (GDB manual, "Bytecode Descriptions"): reg 5, const8 0,
/// equal, end.
constexpr std::string_view condition = ";X7,26000522001327";

BreakpointTimes time_conditions() {
    constexpr unsigned samples = 100;
    const GuestVirt idle = function_of(guest_file("debug"), "idle"),
                    depth = function_of(guest_file("debug"), "depth");
    DebuggedGuest guest("debug", {"idle"});
    Client& client = guest.client();
    const auto stop_at = [](GuestVirt at) { return fmt::format("0,{:x},1", at.value()); };
    client.expect("Z" + stop_at(idle), "OK");
    client.expect("vCont;c", "T05");
    client.expect("z" + stop_at(idle), "OK");
    const std::string registers = client.ask("g");

    const auto call = [&] {
        client.expect(fmt::format("P{:x}={}", register_rip, register_value(depth.value())), "OK");
        client.expect(fmt::format("P{:x}={}", register_rdi, register_value(false_hits)), "OK");
    };
    const auto levels_left = [&] { return client.ask(fmt::format("p{:x}", register_rdi)); };
    BreakpointTimes times;
    for (unsigned i = 0; i < samples; ++i) {
        call();
        client.expect(fmt::format("Z{}{}", stop_at(depth), condition), "OK");
        auto start = std::chrono::steady_clock::now();
        client.expect("vCont;c", "T05");
        times.by_umbra.push_back(nanoseconds_since(start) / false_hits);
        if (levels_left() != no_levels_left)
            throw Failure("the guest stopped though the condition was false");
        client.expect("z" + stop_at(depth), "OK");
        client.expect("G" + registers, "OK");

        call();
        client.expect("Z" + stop_at(depth), "OK");
        unsigned hits = 0;
        start = std::chrono::steady_clock::now();
        do {
            client.expect("vCont;c", "T05");
            ++hits;
        } while (levels_left() != no_levels_left);
        times.by_client.push_back(nanoseconds_since(start) / hits);
        client.expect("z" + stop_at(depth), "OK");
        client.expect("G" + registers, "OK");
    }
    return times;
}

// --- Watchpoints that nobody touches

constexpr unsigned watchpoints = 100;
constexpr GuestPhys watched{0x600'0000}; ///< mapped, and above what the guest uses of its 128 MB
/// All kinds of traps, many of each, and an end of its own.
constexpr const char *worker = "mmufuzz", *work = "rounds=500";

struct WorkTime {
    double cpu = 0, wall = 0;
};

/// The whole run of a guest, with so many watchpoints.
WorkTime time_work(unsigned count) {
    DebuggedGuest guest(worker, {work});
    for (unsigned i = 0; i < count; ++i)
        guest.client().expect(fmt::format("Z2,{:x},8", (watched + i * page_size).value()), "OK");
    const auto start = std::chrono::steady_clock::now();
    const double before = guest.cpu_nanoseconds();
    guest.client().expect("vCont;c", "W00"); // and no stop before
    return {guest.cpu_nanoseconds() - before, nanoseconds_since(start)};
}

} // namespace

void debug_stop(benchmark::State& state, const std::vector<std::string>& words, bool worst) {
    run(state, [&] {
        const StopTimes times = time_stops(words);
        const auto of = [worst](const std::vector<double>& samples) {
            return worst ? std::ranges::max(samples) : median(samples);
        };
        const double measured = of(times.stop), baseline = of(times.round_trip);
        constexpr Goal goal{.of = Goal::Of::measured, .bound = Goal::Bound::at_most, .value = 100e6};
        report(state, {Unit::nanoseconds, measured, baseline, measured / baseline, goal,
                       fmt::format("of {}; baseline: a question to a stopped guest", stops)});
    });
}

void debug_condition(benchmark::State& state) {
    run(state, [&] {
        const BreakpointTimes times = time_conditions();
        const double measured = median(times.by_umbra), baseline = median(times.by_client);
        report(state, {Unit::nanoseconds,
                       measured,
                       baseline,
                       measured / baseline,
                       {},
                       "baseline: the client decides, by one register"});
    });
}

void debug_watchpoints(benchmark::State& state) {
    run(state, [&] {
        constexpr unsigned runs = 21;
        std::array<std::vector<double>, 2> cpu, wall; // without, with
        for (unsigned i = 0; i < 2 * runs; ++i) {
            const bool with = i % 4 == 1 || i % 4 == 2; // which of a pair is first changes
            const WorkTime time = time_work(with ? watchpoints : 0);
            cpu[with ? 1 : 0].push_back(time.cpu);
            wall[with ? 1 : 0].push_back(time.wall);
        }
        const double measured = median(cpu[1]), baseline = median(cpu[0]);
        constexpr Goal goal{.of = Goal::Of::ratio, .bound = Goal::Bound::at_least, .value = 0.99};
        report(state, {Unit::nanoseconds, measured, baseline, baseline / measured, goal,
                       fmt::format("CPU time; by the clock {:.3f}", median(wall[0]) / median(wall[1]))});
    });
}

} // namespace umbra::bench
