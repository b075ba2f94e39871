// Unit tests of vmm/debug/server.hpp, over real sockets.
#include "vmm/debug/server.hpp"
#include "vmm/error.hpp"

#include <array>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;
using Kind = ServerEvent::Kind;
using Clock = std::chrono::steady_clock;

constexpr auto soon = 10s; // far longer than anything takes; a failing test is not to hang

/// A server, and what a vCPU's thread does with it.
class Served {
  public:
    explicit Served(const GdbAddress& where = {})
        : server_(where, [this] {
              const std::lock_guard lock(mutex_);
              ++wakes_;
              woken_.notify_all();
          }) {}

    [[nodiscard]] GdbServer& server() { return server_; }
    /// The next event, waited for.
    [[nodiscard]] std::optional<ServerEvent> event(Clock::duration patience = soon) {
        const auto end = Clock::now() + patience;
        while (true) {
            unsigned seen = 0;
            {
                const std::lock_guard lock(mutex_);
                seen = wakes_;
            }
            if (auto event = server_.next())
                return event;
            std::unique_lock lock(mutex_);
            if (!woken_.wait_until(lock, end, [&] { return wakes_ != seen; }))
                return std::nullopt;
        }
    }
    /// Whether this is the next event.
    [[nodiscard]] testing::AssertionResult comes(Kind kind, std::string_view payload = {}) {
        const auto found = event();
        if (!found)
            return testing::AssertionFailure() << "no event";
        const bool any_payload = kind == Kind::connected;
        if (found->kind != kind || (!any_payload && found->payload != payload))
            return testing::AssertionFailure()
                   << "event " << static_cast<int>(found->kind) << " '" << found->payload << "'";
        return testing::AssertionSuccess();
    }
    [[nodiscard]] testing::AssertionResult nothing_comes() {
        if (const auto found = event(50ms))
            return testing::AssertionFailure()
                   << "event " << static_cast<int>(found->kind) << " '" << found->payload << "'";
        return testing::AssertionSuccess();
    }

  private:
    std::mutex mutex_;
    std::condition_variable woken_;
    unsigned wakes_ = 0;
    GdbServer server_;
};

/// A debugger's end of the connection.
class Debugger {
  public:
    explicit Debugger(const std::string& address) {
        sockaddr_un path{};
        sockaddr_in numbers{};
        const auto* name = reinterpret_cast<const sockaddr*>(&path);
        socklen_t size = sizeof path;
        if (address.starts_with('/')) {
            path.sun_family = AF_UNIX;
            address.copy(static_cast<char*>(path.sun_path), sizeof path.sun_path - 1);
        } else {
            const std::size_t colon = address.rfind(':');
            numbers.sin_family = AF_INET;
            numbers.sin_port = htons(static_cast<std::uint16_t>(std::stoi(address.substr(colon + 1))));
            EXPECT_EQ(::inet_pton(AF_INET, address.substr(0, colon).c_str(), &numbers.sin_addr), 1);
            name = reinterpret_cast<const sockaddr*>(&numbers);
            size = sizeof numbers;
        }
        socket_ = File(::socket(name->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
        constexpr timeval patience{10, 0};
        (void)::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        EXPECT_EQ(::connect(socket_.get(), name, size), 0) << std::strerror(errno);
    }
    explicit Debugger(Served& served) : Debugger(served.server().address()) {}

    void send(std::string_view bytes) const {
        EXPECT_EQ(::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL),
                  static_cast<::ssize_t>(bytes.size()));
    }
    /// As much as is accepted at once.
    [[nodiscard]] std::size_t try_send(std::string_view bytes) const {
        const ::ssize_t sent = ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        return sent < 0 ? 0 : static_cast<std::size_t>(sent);
    }
    /// So many bytes; fewer if the connection ends first.
    [[nodiscard]] std::string read(std::size_t count) const {
        std::string bytes(count, 0);
        std::size_t got = 0;
        while (got < count) {
            const ::ssize_t size = ::recv(socket_.get(), bytes.data() + got, count - got, 0);
            if (size <= 0)
                break;
            got += static_cast<std::size_t>(size);
        }
        bytes.resize(got);
        return bytes;
    }
    /// Whether these bytes come next.
    [[nodiscard]] testing::AssertionResult reads(std::string_view expected) const {
        const std::string found = read(expected.size());
        if (found == expected)
            return testing::AssertionSuccess();
        return testing::AssertionFailure() << "read '" << found << "', expected '" << expected << "'";
    }
    /// Whether the connection ends, properly and without anything more.
    [[nodiscard]] testing::AssertionResult reads_end() const {
        char byte = 0;
        const ::ssize_t size = ::recv(socket_.get(), &byte, 1, 0);
        if (size == 0)
            return testing::AssertionSuccess();
        if (size > 0)
            return testing::AssertionFailure() << "read '" << byte << "'";
        return testing::AssertionFailure() << std::strerror(errno);
    }
    /// Says that nothing more will be sent, as closing does.
    void shut() const { (void)::shutdown(socket_.get(), SHUT_WR); }

  private:
    File socket_;
};

/// A folder of the test's own.
class Folder {
  public:
    Folder() {
        std::string name = std::filesystem::temp_directory_path() / "umbra-gdb-XXXXXX";
        path_ = ::mkdtemp(name.data());
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    Folder(Folder&&) = delete;
    Folder& operator=(Folder&&) = delete;

    [[nodiscard]] std::string operator/(std::string_view name) const { return path_ / name; }

  private:
    std::filesystem::path path_;
};

/// The message with which this is refused.
template<class Function>
std::string refusal_of(Function function) {
    try {
        function();
    } catch (const StartupError& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_usage) << error.what();
        return error.what();
    }
    return "not refused";
}

GdbAddress unix_socket(const std::string& path) {
    return GdbAddress::parse("unix:" + path);
}

// --- Addresses

TEST(GdbAddress, IsLoopbackUnlessAHostIsNamed) {
    EXPECT_EQ(GdbAddress::parse("1234"), (GdbAddress{{}, "127.0.0.1", 1234}));
    EXPECT_EQ(GdbAddress::parse(":1234"), (GdbAddress{{}, "127.0.0.1", 1234}));
    EXPECT_EQ(GdbAddress::parse("tcp::1234"), (GdbAddress{{}, "127.0.0.1", 1234}));
    EXPECT_EQ(GdbAddress::parse("tcp:1234"), (GdbAddress{{}, "127.0.0.1", 1234}));
    EXPECT_EQ(GdbAddress::parse("0"), (GdbAddress{{}, "127.0.0.1", 0}));
    EXPECT_EQ(GdbAddress::parse("0.0.0.0:65535"), (GdbAddress{{}, "0.0.0.0", 65535}));
    EXPECT_EQ(GdbAddress::parse("localhost:1"), (GdbAddress{{}, "localhost", 1}));
    EXPECT_EQ(GdbAddress::parse("tcp:localhost:1"), (GdbAddress{{}, "localhost", 1}));
    EXPECT_EQ(GdbAddress::parse("[::1]:22"), (GdbAddress{{}, "::1", 22}));
    EXPECT_EQ(GdbAddress::parse("tcp:[fe80::1%lo]:22"), (GdbAddress{{}, "fe80::1%lo", 22}));
    EXPECT_EQ(GdbAddress::parse("unix:/run/x:1"), (GdbAddress{"/run/x:1", "127.0.0.1", 0}));
}

TEST(GdbAddress, RefusesWhatItIsNot) {
    for (const std::string_view text : {"",          ":",
                                        "tcp:",      "tcp::",
                                        "unix:",     "x",
                                        "localhost", "localhost:",
                                        "65536",     "99999999999999999999",
                                        "-1",        "+1",
                                        " 1",        "1 ",
                                        "0x10",      "1234,server=on",
                                        "::1:1234",  "::1",
                                        "[::1]",     "[::1]1234",
                                        "[]:1",      "[1.2.3.4]:1",
                                        "a]:1",      "[a:1",
                                        "a:b:1",     "udp::1"}) {
        const std::string message = refusal_of([&] { (void)GdbAddress::parse(text); });
        EXPECT_TRUE(message.starts_with('\'' + std::string(text) + "' is no address to serve gdb on: "))
            << message;
    }
    EXPECT_EQ(refusal_of([] { (void)GdbAddress::parse("localhost:gdb"); }),
              "'localhost:gdb' is no address to serve gdb on: the port, 'gdb', is no number from 0 (any free "
              "one) to "
              "65535");
    EXPECT_NE(
        refusal_of([] { (void)GdbAddress::parse("unix:/" + std::string(107, 'x')); }).find("longer than 107"),
        std::string::npos);
}

// --- Listening

TEST(GdbServer, TellsThePortItTook) {
    Served served;
    const std::string address = served.server().address();
    EXPECT_TRUE(address.starts_with("127.0.0.1:")) << address;
    EXPECT_NE(address, "127.0.0.1:0");
    const Debugger debugger(served);
    EXPECT_TRUE(served.comes(Kind::connected));
}

TEST(GdbServer, SaysThatAPortIsInUse) {
    Served served;
    const auto taken = GdbAddress::parse(served.server().address());
    const std::string port = std::to_string(taken.port);
    EXPECT_EQ(refusal_of([&] { const Served second(taken); }),
              "cannot serve gdb on 127.0.0.1:" + port + ": port " + port +
                  " is in use; choose another, or 0 for any free one");
}

TEST(GdbServer, TakesAPortWhoseLastConnectionsLinger) {
    auto served = std::make_unique<Served>();
    const auto address = GdbAddress::parse(served->server().address());
    const Debugger debugger(*served);
    EXPECT_TRUE(served->comes(Kind::connected));
    served = nullptr; // closes first, so its end waits for a minute
    const Served again(address);
}

TEST(GdbServer, SaysThatAHostIsUnknownOrAnothers) {
    EXPECT_TRUE(refusal_of([] {
                    const Served served(GdbAddress::parse("host.invalid:1"));
                }).starts_with("cannot serve gdb on host.invalid:1: "));
    EXPECT_EQ(refusal_of([] { const Served served(GdbAddress::parse("192.0.2.1:0")); }),
              "cannot serve gdb on 192.0.2.1:0: this computer does not have that address");
}

TEST(GdbServer, ServesAUnixSocketOfItsOwner) {
    const Folder folder;
    const std::string path = folder / "gdb";
    {
        Served served(unix_socket(path));
        EXPECT_EQ(served.server().address(), path);
        struct stat found {};
        ASSERT_EQ(::stat(path.c_str(), &found), 0);
        EXPECT_EQ(found.st_mode, S_IFSOCK | 0600U);
        EXPECT_EQ(refusal_of([&] { const Served second(unix_socket(path)); }),
                  "cannot serve gdb on " + path + ": another program listens there");
        EXPECT_TRUE(served.nothing_comes()); // it asks without connecting
        const Debugger debugger(served);
        const auto connected = served.event();
        ASSERT_TRUE(connected);
        EXPECT_EQ(connected->payload, "process " + std::to_string(::getpid()));
        debugger.send("$g#67");
        EXPECT_TRUE(served.comes(Kind::packet, "g"));
        served.server().reply("00");
        EXPECT_TRUE(debugger.reads("+$00#60"));
    }
    EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(GdbServer, ReplacesAStaleSocketAndNothingElse) {
    const Folder folder;
    const std::string stale = folder / "stale", file = folder / "file";
    {
        const File dead(::socket(AF_UNIX, SOCK_STREAM, 0));
        sockaddr_un name{};
        name.sun_family = AF_UNIX;
        stale.copy(static_cast<char*>(name.sun_path), sizeof name.sun_path - 1);
        ASSERT_EQ(::bind(dead.get(), reinterpret_cast<const sockaddr*>(&name), sizeof name), 0);
    }
    Served served(unix_socket(stale));
    const Debugger debugger(served);
    EXPECT_TRUE(served.comes(Kind::connected));

    std::ofstream(file) << "precious";
    EXPECT_EQ(refusal_of([&] { const Served second(unix_socket(file)); }),
              "cannot serve gdb on " + file + ": there is a file of that name, and it is no socket");
    EXPECT_EQ(std::filesystem::file_size(file), 8U);
    EXPECT_EQ(refusal_of([&] { const Served second(unix_socket(folder / "none/gdb")); }),
              "cannot serve gdb on " + folder / "none/gdb" + ": No such file or directory");
}

TEST(GdbServer, LeavesASocketThatIsNotItsOwn) {
    const Folder folder;
    const std::string path = folder / "gdb";
    {
        const Served served(unix_socket(path));
        std::filesystem::remove(path);
        std::ofstream(path) << "another's";
    }
    EXPECT_TRUE(std::filesystem::exists(path));
}

// --- Packets

TEST(GdbServer, AcknowledgesPacketsAndSendsReplies) {
    Served served;
    const Debugger debugger(served);
    EXPECT_TRUE(served.comes(Kind::connected));
    debugger.send("+$qSupported:a#");
    EXPECT_TRUE(served.nothing_comes());
    debugger.send("d2$?#3f");
    EXPECT_TRUE(debugger.reads("++"));
    EXPECT_TRUE(served.comes(Kind::packet, "qSupported:a"));
    EXPECT_TRUE(served.comes(Kind::packet, "?"));
    served.server().reply("S05");
    EXPECT_TRUE(debugger.reads("$S05#b8"));
    debugger.send("+\x03");
    EXPECT_TRUE(served.comes(Kind::interrupt));
    EXPECT_TRUE(served.nothing_comes());
}

TEST(GdbServer, SendsAgainWhatWasNotUnderstood) {
    Served served;
    const Debugger debugger(served);
    EXPECT_TRUE(served.comes(Kind::connected));
    debugger.send("-"); // nothing was sent yet
    debugger.send("$?#00");
    EXPECT_TRUE(debugger.reads("-"));
    EXPECT_TRUE(served.nothing_comes());
    debugger.send("$?#3f");
    EXPECT_TRUE(served.comes(Kind::packet, "?"));
    served.server().reply("S05");
    EXPECT_TRUE(debugger.reads("+$S05#b8"));
    debugger.send("-");
    EXPECT_TRUE(debugger.reads("$S05#b8"));
    debugger.send("-");
    EXPECT_TRUE(debugger.reads("$S05#b8"));
    debugger.send("+-$?#3f");
    EXPECT_TRUE(debugger.reads("+")); // after the '+' there is nothing to send again
    EXPECT_TRUE(served.comes(Kind::packet, "?"));
    served.server().reply("S02");
    EXPECT_TRUE(debugger.reads("$S02#b5"));
}

TEST(GdbServer, StopsAcknowledgingWhenAsked) {
    Served served;
    const Debugger debugger(served);
    EXPECT_TRUE(served.comes(Kind::connected));
    debugger.send("$QStartNoAckMode#b0");
    EXPECT_TRUE(debugger.reads("+$OK#9a"));
    debugger.send("+$?#00-"); // neither sums nor '-' count any longer
    EXPECT_TRUE(served.comes(Kind::packet, "?"));
    served.server().reply("S05");
    EXPECT_TRUE(debugger.reads("$S05#b8"));
    debugger.send("-$QStartNoAckMode#b0");
    EXPECT_TRUE(debugger.reads("$OK#9a"));
    // A packet that is too long has an answer, or the client would wait for one.
    debugger.send('$' + std::string(PacketParser::max_payload + 1, 'x') + "#00");
    EXPECT_TRUE(debugger.reads(frame("E.this packet is longer than PacketSize")));
    EXPECT_TRUE(served.nothing_comes());
}

TEST(GdbServer, BeginsWithAcknowledgmentsForEachClient) {
    Served served;
    {
        const Debugger debugger(served);
        debugger.send("$QStartNoAckMode#b0$half");
        EXPECT_TRUE(debugger.reads("+$OK#9a"));
    }
    EXPECT_TRUE(served.comes(Kind::connected));
    EXPECT_TRUE(served.comes(Kind::disconnected));
    const Debugger debugger(served);
    EXPECT_TRUE(served.comes(Kind::connected));
    debugger.send("g#67$?#00");
    EXPECT_TRUE(debugger.reads("-"));
    EXPECT_TRUE(served.nothing_comes());
}

// --- Clients that come and go

TEST(GdbServer, OutlivesGarbageAndHalfPackets) {
    Served served;
    for (const std::string_view bytes :
         {std::string_view("GET / HTTP/1.1\r\n\r\n"), std::string_view("$"), std::string_view("$m0,"),
          std::string_view("$m0,4#"), std::string_view("$m0,4#f"), std::string_view("$}"),
          std::string_view("\0\xff\0", 3), std::string_view("")}) {
        Debugger(served).send(bytes);
        EXPECT_TRUE(served.comes(Kind::connected)) << bytes;
        EXPECT_TRUE(served.comes(Kind::disconnected)) << bytes;
    }
}

TEST(GdbServer, ServesOneClientAfterTheOther) {
    Served served;
    for (unsigned i = 0; i < 100; ++i) {
        const Debugger debugger(served); // at once, while the last one is on its way out
        debugger.send("$g#67");
        ASSERT_TRUE(served.comes(Kind::connected)) << i;
        ASSERT_TRUE(served.comes(Kind::packet, "g")) << i;
        served.server().reply(std::to_string(i));
        ASSERT_TRUE(debugger.reads('+' + frame(std::to_string(i))));
        if (i % 2 == 0) {
            served.server().disconnect();
            ASSERT_TRUE(debugger.reads_end()) << i;
        }
        debugger.shut();
        const Debugger next(served); // waits, and is not refused
        next.send("$k#6b");
        ASSERT_TRUE(served.comes(Kind::disconnected)) << i;
        ASSERT_TRUE(served.comes(Kind::connected)) << i;
        ASSERT_TRUE(served.comes(Kind::packet, "k")) << i;
        next.shut();
        ASSERT_TRUE(served.comes(Kind::disconnected)) << i;
    }
}

TEST(GdbServer, AcceptsNobodyBeforeTheLastEndHasBeenTaken) {
    Served served;
    {
        const Debugger debugger(served);
        debugger.send("$g#67");
        EXPECT_TRUE(debugger.reads("+"));
    }
    const Debugger next(served);
    next.send("$?#3f");
    EXPECT_TRUE(served.comes(Kind::connected));
    EXPECT_TRUE(served.comes(Kind::packet, "g"));
    served.server().reply("not for the next one");
    EXPECT_TRUE(served.comes(Kind::disconnected));
    served.server().reply("nor this");
    EXPECT_TRUE(served.comes(Kind::connected));
    EXPECT_TRUE(served.comes(Kind::packet, "?"));
    served.server().reply("S05");
    EXPECT_TRUE(next.reads("+$S05#b8"));
}

TEST(GdbServer, TellsASecondClientThatThereIsOne) {
    Served served;
    const Debugger silent(served);
    EXPECT_TRUE(served.comes(Kind::connected));
    for (unsigned i = 0; i < 20; ++i) {
        const Debugger second(served);
        second.send("+$qSup");
        second.send("ported#37$?#3f");
        EXPECT_TRUE(second.reads('+' + frame("E.another debugger is attached to this guest")));
        EXPECT_TRUE(second.reads_end());
    }
    EXPECT_TRUE(served.nothing_comes());
    // The first one never notices.
    silent.send("$g#67");
    EXPECT_TRUE(served.comes(Kind::packet, "g"));
    served.server().reply("00");
    EXPECT_TRUE(silent.reads("+$00#60"));
}

TEST(GdbServer, DoesNotWaitForSilentSecondClients) {
    Served served;
    const Debugger first(served);
    EXPECT_TRUE(served.comes(Kind::connected));
    std::vector<std::unique_ptr<Debugger>> others;
    others.reserve(20);
    for (unsigned i = 0; i < 20; ++i)
        others.push_back(std::make_unique<Debugger>(served));
    first.send("$g#67");
    EXPECT_TRUE(served.comes(Kind::packet, "g"));
    for (const auto& other : others)
        EXPECT_TRUE(other->reads_end()); // some at once, the others when they have had their time
}

// --- Clients that do not keep up

TEST(GdbServer, DropsAClientThatReadsNothing) {
    Served served;
    const Debugger debugger(served);
    EXPECT_TRUE(served.comes(Kind::connected));
    std::string noise;
    for (unsigned i = 0; i < 50'000; ++i)
        noise += to_hex(std::to_string(i));
    const auto start = Clock::now();
    for (unsigned i = 0; i < 200; ++i)
        served.server().reply(noise); // 80 MB in all
    EXPECT_LT(Clock::now() - start, 5s);
    EXPECT_TRUE(served.comes(Kind::disconnected));
    const Debugger next(served);
    EXPECT_TRUE(served.comes(Kind::connected));
}

TEST(GdbServer, SendsLargeRepliesAsFastAsTheyAreRead) {
    Served served;
    const Debugger debugger(served);
    EXPECT_TRUE(served.comes(Kind::connected));
    debugger.send("$QStartNoAckMode#b0");
    EXPECT_TRUE(debugger.reads("+$OK#9a"));
    std::string large;
    for (unsigned i = 0; large.size() < PacketParser::max_payload; ++i)
        large += to_hex(std::to_string(i));
    for (unsigned i = 0; i < 50; ++i) {
        served.server().reply(large);
        ASSERT_TRUE(debugger.reads(frame(large))) << i;
    }
}

TEST(GdbServer, ReadsNoMoreThanIsTaken) {
    Served served;
    const Debugger debugger(served);
    EXPECT_TRUE(served.comes(Kind::connected));
    debugger.send("$QStartNoAckMode#b0");
    EXPECT_TRUE(debugger.reads("+$OK#9a"));
    // Until nothing is accepted for a while: then the server has stopped to read.
    constexpr std::string_view packet = "$M0,1:00#00";
    std::string packets;
    for (unsigned i = 0; i < 1000; ++i)
        packets += packet;
    std::size_t sent = 0;
    constexpr std::size_t far_too_much = std::size_t{256} << 20;
    for (unsigned idle = 0; idle < 20 && sent < far_too_much;) {
        const std::size_t count = debugger.try_send(std::string_view(packets).substr(sent % packets.size()));
        idle = count == 0 ? idle + 1 : 0;
        sent += count;
        if (count == 0)
            std::this_thread::sleep_for(5ms);
    }
    ASSERT_LT(sent, far_too_much);
    ASSERT_GT(sent, packets.size());
    // All of it comes when it is taken.
    for (std::size_t i = 0; i < sent / packet.size(); ++i)
        ASSERT_TRUE(served.comes(Kind::packet, "M0,1:00")) << i;
    EXPECT_TRUE(served.nothing_comes());
}

TEST(GdbServer, NoticesTheEndOfAClientWhosePacketsWait) {
    Served served;
    {
        const Debugger debugger(served);
        for (unsigned i = 0; i < GdbServer::most_events * 2; ++i)
            debugger.send("$g#67");
        // No more than that is acknowledged: `connected` waits as well.
        EXPECT_TRUE(debugger.reads(std::string(GdbServer::most_events - 1, '+')));
    }
    EXPECT_TRUE(served.comes(Kind::connected));
    unsigned packets = 0;
    auto event = served.event();
    for (; event && event->kind == Kind::packet; event = served.event())
        ++packets;
    ASSERT_TRUE(event);
    EXPECT_EQ(event->kind, Kind::disconnected);
    EXPECT_GE(packets, GdbServer::most_events - 1);
    EXPECT_LE(packets, GdbServer::most_events * 2);
}

// --- The end

TEST(GdbServer, SendsEverythingBeforeItSendsAClientAway) {
    Served served;
    const Debugger debugger(served);
    EXPECT_TRUE(served.comes(Kind::connected));
    debugger.send("$k#6b");
    EXPECT_TRUE(served.comes(Kind::packet, "k"));
    std::string large;
    for (unsigned i = 0; large.size() < 32768; ++i) // which the sockets hold, whoever is slow
        large += to_hex(std::to_string(i));
    served.server().reply(large);
    served.server().reply("X09");
    served.server().disconnect();
    served.server().reply("too late");
    debugger.send("+$never#heard\x03");
    EXPECT_TRUE(debugger.reads('+' + frame(large) + frame("X09")));
    EXPECT_TRUE(debugger.reads_end());
    EXPECT_TRUE(served.comes(Kind::disconnected));
    served.server().disconnect(); // nobody
    EXPECT_TRUE(served.nothing_comes());
}

TEST(GdbServer, DoesNotWaitLongForAClientToLeave) {
    auto served = std::make_unique<Served>();
    const Debugger debugger(*served);
    EXPECT_TRUE(served->comes(Kind::connected));
    auto start = Clock::now();
    served->server().disconnect();
    EXPECT_LT(Clock::now() - start, GdbServer::patience / 2); // not at all
    EXPECT_TRUE(served->comes(Kind::disconnected));
    EXPECT_LT(Clock::now() - start, GdbServer::patience + 2s);

    const Debugger second(*served);
    EXPECT_TRUE(served->comes(Kind::connected));
    served->server().reply("W00");
    start = Clock::now();
    served = nullptr;
    EXPECT_LT(Clock::now() - start, GdbServer::patience + 2s);
    EXPECT_TRUE(second.reads("$W00#b7"));
    EXPECT_TRUE(second.reads_end());
}

} // namespace
} // namespace umbra
