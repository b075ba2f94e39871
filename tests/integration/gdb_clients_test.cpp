// Clients that are no debuggers: garbage, half packets, silence, floods. The guest passes whatever they do.
// And how --gdb and --pause are refused.
#include "tests/integration/debugged.hpp"
#include "tests/integration/host.hpp"
#include "vmm/kvm/file.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <numeric>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

std::string packet(std::string_view payload) {
    const unsigned sum = std::accumulate(payload.begin(), payload.end(), 0U, [](unsigned so_far, char c) {
        return so_far + static_cast<unsigned char>(c);
    });
    return fmt::format("${}#{:02x}", payload, sum & 0xff);
}

/// A connection to a unix socket.
class Client {
  public:
    explicit Client(const std::string& path) : socket_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
        sockaddr_un name{};
        name.sun_family = AF_UNIX;
        path.copy(static_cast<char*>(name.sun_path), sizeof name.sun_path - 1);
        connected_ = ::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0;
    }
    [[nodiscard]] bool connected() const { return connected_; }

    /// As much as is taken without waiting; how much that was.
    std::size_t send(std::string_view bytes) const {
        const ::ssize_t sent = ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        return sent < 0 ? 0 : static_cast<std::size_t>(sent);
    }
    /// The next packet's payload; empty if none comes in time, or the connection ends.
    [[nodiscard]] std::string receive(Clock::duration limit = patience) {
        const auto deadline = Clock::now() + limit;
        for (;;) {
            const std::size_t begin = received_.find('$'), end = received_.find('#', begin);
            if (begin != std::string::npos && end != std::string::npos && received_.size() >= end + 3) {
                const std::string payload = received_.substr(begin + 1, end - begin - 1);
                received_.erase(0, end + 3);
                (void)send("+");
                return payload;
            }
            const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
            pollfd polled{socket_.get(), POLLIN, 0};
            if (left <= 0ms || ::poll(&polled, 1, static_cast<int>(left.count())) <= 0)
                return {};
            std::array<char, 4096> bytes{};
            const ::ssize_t got = ::recv(socket_.get(), bytes.data(), bytes.size(), 0);
            if (got <= 0)
                return {};
            received_.append(bytes.data(), static_cast<std::size_t>(got));
        }
    }
    std::string ask(std::string_view payload) {
        (void)send(packet(payload));
        return receive();
    }

  private:
    File socket_;
    bool connected_ = false;
    std::string received_;
};

class GdbClientsTest : public KvmTest {
  protected:
    void SetUp() override {
        KvmTest::SetUp();
        if (!IsSkipped() && !HasFatalFailure() && program_file("gdb").empty()) // which releases the guest
            UMBRA_MISSING("gdb is not installed");
    }
};

TEST_F(GdbClientsTest, InterruptsComeAtOnce) {
    for (const std::string word : {"wait", "sleep"}) {
        SCOPED_TRACE(word);
        Debugged guest("debug", {.words = {word}});
        Client client(guest.address());
        EXPECT_TRUE(client.ask("?").starts_with("T02"));
        Clock::duration longest{};
        for (int i = 0; i < 100; ++i) {
            (void)client.send(packet("vCont;c"));
            std::this_thread::sleep_for(std::chrono::microseconds(137 * (i % 16)));
            const auto start = Clock::now();
            (void)client.send("\x03");
            EXPECT_TRUE(client.receive(20s).starts_with("T02")) << "interrupt " << i;
            longest = std::max(longest, Clock::now() - start);
            if (HasFailure())
                break;
        }
        if (!emulated_host()) {
            EXPECT_LT(longest, 2s); // tests/bench measures it
        }
        (void)client.send(packet("k"));
        guest.expect_end(130, "umbra: interrupted: killed by the debugger");
    }
}

TEST_F(GdbClientsTest, GarbageHarmsNobody) {
    if (emulated_host())
        GTEST_SKIP() << "the server knows no host: it is tested on this machine itself";
    Debugged guest("debug", {.pause = false, .words = {"idle"}});
    ASSERT_TRUE(guest.child().wait_for("debug: idle"));
    for (const std::string& garbage :
         std::vector<std::string>{"",
                                  "\n",
                                  std::string(100'000, '$'),
                                  std::string(100'000, '\x03'),
                                  std::string(1000, '\0'),
                                  "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
                                  "$#00",
                                  "$g#00$g#00$g#00",
                                  "$" + std::string(200'000, 'a') + "#00",
                                  packet("vCont;q"),
                                  packet("Z0,,"),
                                  packet("Z9,1,1"),
                                  packet("m,"),
                                  packet("mffffffffffffffff,ffffffffffffffff"),
                                  packet("G0"),
                                  packet("P0="),
                                  packet("Z0,100000,1;X9999,00"),
                                  packet("qXfer:features:read:target.xml:ffffffffffffffff,1"),
                                  packet("QStartNoAckMode") + packet("Z2,0,ffffffffffffffff"),
                                  packet("qRcmd,zz"),
                                  packet("}")}) {
        Client client(guest.address());
        ASSERT_TRUE(client.connected());
        (void)client.send(garbage);
        (void)client.send(garbage);
    }
    run_gdb(guest, "debug", {{"set var released = 1", ""}, {"detach", "detached"}});
    guest.expect_pass();
}

/// The session of a debugger, cut off after each of its bytes: the guest goes on.
TEST_F(GdbClientsTest, SessionsEndAnywhere) {
    if (emulated_host())
        GTEST_SKIP() << "the server knows no host: it is tested on this machine itself";
    const std::string session = packet("qSupported:swbreak+;hwbreak+") + "+" + packet("QStartNoAckMode") +
                                "+" + packet("?") + packet("g") + packet("Z0,100000,1") +
                                packet("Z2,100000,8") + packet("vCont;s:1") + packet("m100000,10") +
                                packet("vCont;c") + "\x03" + packet("D");
    Debugged guest("debug", {.pause = false, .words = {"idle"}});
    ASSERT_TRUE(guest.child().wait_for("debug: idle"));
    for (std::size_t length = 0; length <= session.size(); ++length) {
        Client client(guest.address());
        ASSERT_TRUE(client.connected()) << length;
        EXPECT_EQ(client.send(std::string_view(session).substr(0, length)), length);
    }
    run_gdb(guest, "debug", {{"set var released = 1", ""}, {"detach", "detached"}});
    guest.expect_pass();
}

TEST_F(GdbClientsTest, FloodsAreNotKept) {
    if (emulated_host())
        GTEST_SKIP() << "the server knows no host: it is tested on this machine itself";
    Debugged guest("debug", {.pause = false, .words = {"wait"}});
    ASSERT_TRUE(guest.child().wait_for("debug: waiting"));
    {
        Client flood(guest.address()); // asks, and reads nothing
        const std::string many = [] {
            std::string text = "+";
            for (int i = 0; i < 1000; ++i)
                text += packet("m100000,1000");
            return text;
        }();
        const auto deadline = Clock::now() + 2s;
        while (Clock::now() < deadline && (flood.send(many) != 0 || flood.connected()))
            std::this_thread::sleep_for(1ms);
    }
    run_gdb(guest, "debug", {{"set var released = 1", ""}, {"detach", "detached"}});
    guest.expect_pass();
    EXPECT_LT(guest.child().end().resident_kb, 300'000);
}

TEST_F(GdbClientsTest, TheSecondIsRefused) {
    Debugged guest("debug", {.words = {"ticks"}});
    Client first(guest.address());
    EXPECT_TRUE(first.ask("?").starts_with("T02"));
    Client second(guest.address());
    EXPECT_EQ(second.ask("?"), "E.another debugger is attached to this guest");
    EXPECT_EQ(second.receive(), "");
    EXPECT_TRUE(first.ask("?").starts_with("T02"));
    const Client silent(guest.address());
    EXPECT_EQ(first.ask("vCont;c").substr(0, 1), "O"); // what umbra says of the end
    EXPECT_EQ(first.receive(), "W00");
    guest.expect_pass();
    EXPECT_NE(guest.child().output().find("a second debugger (from process "), std::string::npos);
}

// --- The command line

TEST(GdbUsageTest, BadOptionsAreOneLine) {
    const std::string hello = guest_file("hello");
    const TemporaryFolder folder;
    struct Bad {
        std::vector<std::string> options;
        std::string said;
    };
    for (const Bad& bad : std::vector<Bad>{
             {{"--pause"}, "--pause needs --gdb"},
             {{"--gdb", "0", "--engine", "native"}, "--gdb needs the shadow engine"},
             {{"--gdb", "nonsense"}, "'nonsense'"},
             {{"--gdb", "99999"}, "99999"},
             {{"--gdb", "unix:"}, "the path is missing"},
             {{"--gdb", "unix:" + std::string(200, 'x')}, "longer than"},
             {{"--gdb", "unix:" + folder.file("no/such/folder")}, "No such file"},
             {{"--gdb", "unix:" + folder.write("file", "text")}, "it is no socket"},
             {{"--gdb", "1:2:3"}, "'1:2:3'"},
             {{"--gdb", "[::1"}, "[::1"},
         }) {
        std::vector<std::string> arguments{"run"};
        arguments.insert(arguments.end(), bad.options.begin(), bad.options.end());
        arguments.push_back(hello);
        const Ended ended = run_umbra(arguments);
        EXPECT_EQ(ended.exit_code, 2) << ended;
        EXPECT_EQ(ended.out, "") << ended;
        EXPECT_EQ(lines_of(ended.err).size(), 1U) << ended;
        EXPECT_NE(ended.err.find(bad.said), std::string::npos) << "not '" << bad.said << "': " << ended;
    }
}

TEST_F(GdbClientsTest, AddressesInUseAreRefused) {
    for (const std::string address : {"127.0.0.1:0", ""}) {
        Debugged first("hello", {.address = address});
        ASSERT_FALSE(first.address().empty());
        const Ended second = run_umbra(
            {"run", "--gdb", (address.empty() ? "unix:" : "") + first.address(), guest_file("hello")});
        EXPECT_EQ(second.exit_code, 2) << second;
        EXPECT_EQ(lines_of(second.err).size(), 1U) << second;
        EXPECT_NE(second.err.find(address.empty() ? "another program listens there" : "in use"),
                  std::string::npos)
            << second;
    }
}

} // namespace
} // namespace umbra
