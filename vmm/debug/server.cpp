#include "vmm/debug/server.hpp"

#include "vmm/error.hpp"
#include "vmm/log.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <utility>

#include <fmt/core.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

namespace umbra {
namespace {

using namespace std::chrono_literals;

constexpr std::size_t read_bytes = 16384;
constexpr std::size_t most_refused = 8;
// gdb sends its first packet at once; who types by hand may take longer.
constexpr auto refusal_patience = 2s;
constexpr auto accept_pause = 100ms;
constexpr std::string_view refusal = "E.another debugger is attached to this guest";
constexpr std::string_view too_long = "E.this packet is longer than PacketSize";

/// Bytes read; 0 at the end, or if the connection is broken. Nothing if there is nothing to read now.
template<std::size_t size>
std::optional<std::size_t> receive(int socket, std::array<char, size>& bytes) {
    while (true) {
        const ::ssize_t read = ::recv(socket, bytes.data(), bytes.size(), MSG_DONTWAIT);
        if (read >= 0)
            return static_cast<std::size_t>(read);
        if (errno == EINTR)
            continue;
        if (errno == EAGAIN)
            return std::nullopt;
        return 0;
    }
}

/// Whether the client has closed its end, or the connection broke. There may still be something to read.
bool hung_up(int socket) {
    pollfd polled{socket, POLLRDHUP, 0};
    return ::poll(&polled, 1, 0) > 0;
}

} // namespace

// --- Listening

GdbServer::GdbServer(GdbListener listener, std::function<void()> wake)
    : wake_(std::move(wake)), listener_(std::move(listener)),
      kick_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (kick_.get() < 0)
        throw StartupError(ExitCode::host_cannot, fmt::format("eventfd: {}", std::strerror(errno)));
    listener_.listen();
    // Signals are for the other threads.
    sigset_t all, before;
    sigfillset(&all);
    (void)::pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] { serve(); });
    (void)::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

GdbServer::~GdbServer() {
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        kick();
    }
    thread_.join();
}

// --- The vCPU's thread

std::optional<ServerEvent> GdbServer::next() {
    const std::lock_guard lock(mutex_);
    if (events_.empty())
        return std::nullopt;
    ServerEvent event = std::move(events_.front());
    events_.pop_front();
    if (event.kind == ServerEvent::Kind::connected)
        attached_ = true;
    if (event.kind == ServerEvent::Kind::disconnected)
        attached_ = leaving_ = false;
    if (!attached_ || events_.size() + 1 == most_events)
        kick(); // the server thread held something back
    return event;
}

void GdbServer::reply(std::string_view payload) {
    const std::lock_guard lock(mutex_);
    if (!attached_ || !client_ || client_->gone || client_->gone_by)
        return;
    send_packet(payload);
    if (client_->gone || !client_->unsent.empty())
        kick();
}

void GdbServer::disconnect() {
    const std::lock_guard lock(mutex_);
    if (!attached_ || !client_ || client_->gone_by)
        return;
    client_->gone_by = Clock::now() + patience;
    kick();
}

// --- Sending

void GdbServer::send(std::string_view bytes) {
    if (client_->gone)
        return;
    client_->unsent += bytes;
    flush();
    if (client_->unsent.size() > most_unsent) {
        log_warning("the debugger does not read what it is sent, and was disconnected");
        client_->gone = true;
    }
}

void GdbServer::send_packet(std::string_view payload) {
    std::string framed = frame(payload);
    send(framed);
    if (client_->acknowledges)
        client_->unacknowledged = std::move(framed);
}

void GdbServer::flush() {
    std::string_view left = client_->unsent;
    while (!left.empty() && !client_->gone) {
        const ::ssize_t sent =
            ::send(client_->socket.get(), left.data(), left.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent >= 0)
            left.remove_prefix(static_cast<std::size_t>(sent));
        else if (errno == EAGAIN)
            break;
        else if (errno != EINTR)
            client_->gone = true;
    }
    client_->unsent.erase(0, client_->unsent.size() - left.size());
}

void GdbServer::kick() const {
    (void)::eventfd_write(kick_.get(), 1);
}

// --- The server thread

namespace {
enum Place : std::size_t { kicked, arrival, client, refused };
} // namespace

void GdbServer::serve() {
    std::vector<pollfd> polled;
    while (const auto timeout = prepare(polled)) {
        if (std::exchange(news_, false))
            wake_();
        if (::poll(polled.data(), polled.size(), *timeout) < 0)
            continue;
        if (polled[Place::kicked].revents != 0) {
            ::eventfd_t count = 0;
            (void)::eventfd_read(kick_.get(), &count);
        }
        attend_client(polled[Place::client]);
        attend_refused(std::span(polled).subspan(Place::refused));
        if (polled[Place::arrival].revents != 0)
            accept_client();
    }
}

/// Does what does not depend on a socket. Fills in what to wait for and gives poll()'s timeout; nothing at
/// the end.
std::optional<int> GdbServer::prepare(std::vector<pollfd>& polled) {
    const std::lock_guard lock(mutex_);
    const auto now = Clock::now();
    if (client_ && !client_->gone_by)
        take_input();
    if (client_ && (client_->gone || (client_->gone_by && *client_->gone_by <= now)))
        end_client();
    if (stopping_ && !client_)
        return std::nullopt;
    if (stopping_ && !client_->gone_by)
        client_->gone_by = now + patience;
    if (accept_from_ && *accept_from_ <= now)
        accept_from_.reset();

    std::optional<Clock::time_point> due = accept_from_;
    const auto consider = [&due](Clock::time_point when) { due = due ? std::min(*due, when) : when; };
    // While the last client is on its way out, the next one waits: it is not refused.
    const bool accepting = !stopping_ && !leaving_ && !accept_from_ && !(client_ && client_->gone_by);
    polled.assign({{kick_.get(), POLLIN, 0}, {accepting ? listener_.get() : -1, POLLIN, 0}, {-1, 0, 0}});
    if (client_) {
        short events = POLLRDHUP;
        if (client_->gone_by || (input_.empty() && events_.size() < most_events))
            events |= POLLIN;
        if (!client_->unsent.empty())
            events |= POLLOUT;
        polled[Place::client] = {client_->socket.get(), events, 0};
        if (client_->gone_by)
            consider(*client_->gone_by);
    }
    for (const Refused& one : refused_) {
        polled.push_back({one.socket.get(), POLLIN, 0});
        consider(one.gone_by);
    }
    if (!due)
        return -1;
    return std::max(0, static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(*due - now).count()));
}

void GdbServer::take_input() {
    std::string_view left = input_;
    while (events_.size() < most_events) {
        auto item = parser_.take(left);
        if (!item)
            break;
        handle(std::move(*item));
    }
    input_.erase(0, input_.size() - left.size());
}

void GdbServer::handle(PacketItem item) {
    switch (item.kind) {
    case PacketItem::Kind::packet:
        if (client_->acknowledges)
            send("+");
        if (item.payload != "QStartNoAckMode") {
            push(ServerEvent::Kind::packet, std::move(item.payload));
            break;
        }
        send_packet("OK");
        client_->acknowledges = false;
        client_->unacknowledged.clear();
        parser_.check_sums(false);
        break;
    case PacketItem::Kind::ack:
        client_->unacknowledged.clear();
        break;
    case PacketItem::Kind::nack:
        send(client_->unacknowledged);
        break;
    case PacketItem::Kind::interrupt:
        push(ServerEvent::Kind::interrupt);
        break;
    case PacketItem::Kind::bad_packet:
        if (client_->acknowledges)
            send("-");
        else
            send_packet(too_long); // checksums are not looked at
        break;
    }
}

void GdbServer::push(ServerEvent::Kind kind, std::string payload) {
    events_.push_back({kind, std::move(payload)});
    news_ = true;
}

void GdbServer::end_client() {
    client_.reset();
    leaving_ = true;
    input_.clear();
    parser_ = {};
    push(ServerEvent::Kind::disconnected);
}

void GdbServer::attend_client(const pollfd& happened) {
    const std::lock_guard lock(mutex_);
    if (!client_)
        return;
    flush();
    if (client_->gone_by) {
        see_off();
        return;
    }
    const bool hang_up = (happened.revents & ~(POLLIN | POLLOUT)) != 0;
    if ((happened.events & POLLIN) == 0) {
        client_->gone |= hang_up; // nobody waits for what it still sent
        return;
    }
    if (!hang_up && (happened.revents & POLLIN) == 0)
        return;
    std::array<char, read_bytes> bytes{};
    const auto size = receive(client_->socket.get(), bytes);
    client_->gone |= size == 0U;
    input_.assign(bytes.data(), size.value_or(0));
}

/// Ends the connection in such a way that the client gets all it was sent: to close while something it sent
/// is unread would reset the connection.
void GdbServer::see_off() {
    if (client_->unsent.empty() && !std::exchange(client_->end_sent, true))
        (void)::shutdown(client_->socket.get(), SHUT_WR);
    std::array<char, read_bytes> ignored{};
    client_->gone |= receive(client_->socket.get(), ignored) == 0U;
}

void GdbServer::accept_client() {
    const std::lock_guard lock(mutex_);
    // The one that has just left is not in the way of its successor: it is looked at again first.
    if (client_ && (client_->gone || client_->gone_by || hung_up(client_->socket.get())))
        return;
    auto [socket, from] = listener_.accept();
    if (socket.get() < 0) {
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
            accept_from_ = Clock::now() + accept_pause; // no descriptor is left, perhaps: no endless loop
        return;
    }
    if (!client_) {
        client_ = Client{std::move(socket)};
        push(ServerEvent::Kind::connected, from);
        return;
    }
    log_warning("a second debugger (from {}) was refused: one is attached", from);
    if (refused_.size() < most_refused)
        refused_.push_back({std::move(socket), Clock::now() + refusal_patience});
}

/// Answers the first packet, which gdb shows, and sends the client away. What is said before would be
/// discarded by gdb.
void GdbServer::attend_refused(std::span<const pollfd> happened) {
    const auto leaves = [](Refused& one, short events) {
        if (one.gone_by <= Clock::now())
            return true;
        if (events == 0)
            return false;
        std::array<char, read_bytes> bytes{};
        const auto size = receive(one.socket.get(), bytes);
        std::string_view left(bytes.data(), size.value_or(0));
        while (const auto item = one.parser.take(left)) {
            if (one.answered || item->kind != PacketItem::Kind::packet)
                continue;
            one.answered = true;
            const std::string answer = '+' + frame(refusal);
            (void)::send(one.socket.get(), answer.data(), answer.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
            (void)::shutdown(one.socket.get(), SHUT_WR);
        }
        return size == 0U;
    };
    std::vector<Refused> stay;
    for (std::size_t i = 0; i < refused_.size(); ++i) {
        if (!leaves(refused_[i], happened[i].revents))
            stay.push_back(std::move(refused_[i]));
    }
    refused_ = std::move(stay);
}

} // namespace umbra
