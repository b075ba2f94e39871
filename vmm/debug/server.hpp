// Serves gdb's remote protocol to one client at a time: sockets, acknowledgments and a thread of its own, so
// that nothing a client does, or fails to do, holds up the guest. What packets mean is not decided here.
//
// GDB manual, appendix "GDB Remote Serial Protocol", sections "Overview", "Packet Acknowledgment" and
// "Interrupts".
#pragma once

#include "vmm/debug/listener.hpp"
#include "vmm/debug/packet.hpp"
#include "vmm/kvm/file.hpp"

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <poll.h>
#include <sys/types.h>

namespace umbra {

struct ServerEvent {
    enum class Kind : std::uint8_t {
        connected,    ///< payload: who, for a log
        packet,       ///< payload: the packet's
        interrupt,    ///< Ctrl-C
        disconnected, ///< whoever's fault it was; follows every connected
    };
    Kind kind{};
    std::string payload;
};

/// The server thread owns the sockets. It answers QStartNoAckMode by itself, acknowledges packets and sends
/// replies again as long as there are acknowledgments, and turns the rest into events, in the order in which
/// it came. A client that comes while another is attached is told so and sent away.
class GdbServer {
  public:
    /// Events that wait; more stay in the socket, and the client waits.
    static constexpr std::size_t most_events = 64;
    /// Bytes that wait for the client to read them; if there were to be more, it is dropped.
    static constexpr std::size_t most_unsent = std::size_t{1} << 20;
    /// How long a client that is sent away has to read what it was sent.
    static constexpr std::chrono::milliseconds patience{200};

    /// Listens from now on. `wake` is called by the server thread whenever there are new events (one or
    /// more: take them until there is none), and must not wait for anybody who waits for this object.
    /// StartupError (bad_usage) if the address cannot be served: in use, unknown, not permitted.
    GdbServer(const GdbAddress& where, std::function<void()> wake)
        : GdbServer(GdbListener(where), std::move(wake)) {}
    GdbServer(GdbListener listener, std::function<void()> wake);
    /// Sends away the client, which takes `patience` at most, and unlinks the Unix socket.
    ~GdbServer();
    GdbServer(const GdbServer&) = delete;
    GdbServer& operator=(const GdbServer&) = delete;
    GdbServer(GdbServer&&) = delete;
    GdbServer& operator=(GdbServer&&) = delete;

    /// As gdb's `target remote` takes it: HOST:PORT, with the port that is served, or an absolute path.
    [[nodiscard]] const std::string& address() const { return listener_.address(); }

    // The debugged vCPU's thread. None of these waits for the client.

    /// The oldest event that has not been taken. Between a disconnected and the next connected there is no
    /// client: nobody is accepted before the former has been taken, so no reply goes to the wrong client.
    [[nodiscard]] std::optional<ServerEvent> next();
    /// Sends a packet to the client that the events so far tell of; nothing happens if it has gone.
    void reply(std::string_view payload);
    /// Sends the client away when it has read what it was sent, or after `patience`. No more is read from it;
    /// after the events that already wait, disconnected follows.
    void disconnect();

  private:
    using Clock = std::chrono::steady_clock;

    struct Client {
        File socket;
        std::string unsent{};
        std::string unacknowledged{}; ///< the last packet sent, until its '+'
        bool acknowledges = true;     ///< off: QStartNoAckMode
        bool gone = false;            ///< it closed the connection, the connection broke, or it does not read
        bool end_sent = false;
        std::optional<Clock::time_point> gone_by{}; ///< it is being sent away
    };
    /// A client that came while another was attached, until it has read that.
    struct Refused {
        File socket;
        Clock::time_point gone_by;
        PacketParser parser{};
        bool answered = false;
    };

    // The server thread's; from take_input to end_client with mutex_ held.
    void serve();
    [[nodiscard]] std::optional<int> prepare(std::vector<pollfd>& polled);
    void take_input();
    void handle(PacketItem item);
    void push(ServerEvent::Kind kind, std::string payload = {});
    void attend_client(const pollfd& happened);
    void see_off();
    void end_client();
    void accept_client();
    void attend_refused(std::span<const pollfd> happened);

    // Either thread's, with mutex_ held and a client.
    void send(std::string_view bytes);
    void send_packet(std::string_view payload);
    void flush();

    void kick() const;

    const std::function<void()> wake_;
    GdbListener listener_;
    File kick_;

    // The server thread's.
    PacketParser parser_;
    std::string input_; ///< read but not parsed: there were too many events
    std::vector<Refused> refused_;
    std::optional<Clock::time_point> accept_from_; ///< accept() failed for want of something
    bool news_ = false;                            ///< wake_ is to be called

    std::mutex mutex_; ///< guards what follows
    std::deque<ServerEvent> events_;
    std::optional<Client> client_;
    bool leaving_ = false;  ///< disconnected has not been taken
    bool attached_ = false; ///< connected has been taken, and disconnected has not
    bool stopping_ = false;

    std::thread thread_;
};

} // namespace umbra
