#include "launcher/emulated/relay.hpp"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <utility>

namespace umbra::emulated {
namespace {

/// What, channel, and the payload's length in two bytes, low byte first.
constexpr std::size_t header_size = 4;
constexpr std::size_t most_payload = 0xffff;
constexpr std::size_t read_size = std::size_t{16} << 10;

bool again() {
    return errno == EAGAIN || errno == EINTR;
}

std::string little_endian(std::uint32_t value) {
    std::string bytes;
    for (unsigned shift = 0; shift < 32; shift += 8)
        bytes.push_back(static_cast<char>(value >> shift));
    return bytes;
}

std::uint32_t little_endian(std::string_view bytes) {
    std::uint32_t value = 0;
    for (std::size_t i = bytes.size(); i-- > 0;)
        value = value << 8 | static_cast<unsigned char>(bytes[i]);
    return value;
}

} // namespace

std::string pack(const std::vector<std::string>& strings) {
    std::string text;
    for (const std::string& string : strings)
        text.append(string).push_back('\0');
    return text;
}

std::vector<std::string> unpack(std::string_view text) {
    std::vector<std::string> strings;
    for (std::size_t end = text.find('\0'); end != std::string_view::npos; end = text.find('\0')) {
        strings.emplace_back(text.substr(0, end));
        text.remove_prefix(end + 1);
    }
    return strings;
}

Relay::Relay(File line, Handler handler) : line_(std::move(line)), handler_(std::move(handler)) {
    (void)::fcntl(line_.get(), F_SETFL, ::fcntl(line_.get(), F_GETFL) | O_NONBLOCK);
}

// --- Channels

void Relay::join(std::uint8_t channel, File from, File to) {
    channels_[channel] = Channel();
    channels_[channel].from = SharedInput(std::move(from));
    channels_[channel].to = std::move(to);
}

void Relay::join(std::uint8_t channel, File socket) {
    File other(::fcntl(socket.get(), F_DUPFD_CLOEXEC, 0));
    join(channel, std::move(socket), std::move(other));
    channels_[channel].socket = true;
}

void Relay::end_reading(std::uint8_t number) {
    Channel& channel = channels_[number];
    if (channel.from.get() >= 0)
        say(Say::end, number);
    channel.from = SharedInput();
    if (channel.socket)
        channel.to = File();
}

void Relay::end_writing(std::uint8_t number) {
    channels_[number].to = File();
    channels_[number].unwritten.clear();
    if (channels_[number].socket)
        end_reading(number);
}

void Relay::read_from(std::uint8_t number) {
    Channel& channel = channels_[number];
    std::array<char, read_size> buffer{};
    const std::size_t most = std::min(buffer.size(), channel.may_send);
    const ssize_t count = channel.from.read(buffer.data(), most);
    channel.idle = count < 0 && errno == EAGAIN;
    if (count > 0) {
        channel.may_send -= static_cast<std::size_t>(count);
        say(Say::data, number, std::string_view(buffer.data(), static_cast<std::size_t>(count)));
    } else if (count == 0 || !again()) { // a terminal whose last user has gone fails with EIO
        end_reading(number);
    }
}

void Relay::write_to(std::uint8_t number) {
    Channel& channel = channels_[number];
    // POLLOUT promises room for this much, also in a file that blocks because others share it.
    const std::size_t most = std::min<std::size_t>(channel.unwritten.size(), PIPE_BUF);
    const ssize_t count = ::write(channel.to.get(), channel.unwritten.data(), most);
    if (count < 0) {
        if (again())
            return;
        say(Say::deaf, number);
        end_writing(number);
        return;
    }
    channel.unwritten.erase(0, static_cast<std::size_t>(count));
    channel.unreturned += static_cast<std::uint32_t>(count);
    if (channel.unreturned >= window / 2) {
        say(Say::credit, number, little_endian(channel.unreturned));
        channel.unreturned = 0;
    }
    if (channel.peer_ended && channel.unwritten.empty())
        end_writing(number);
}

// --- The line

void Relay::say(Say what, std::uint8_t channel, std::string_view payload) {
    do {
        const std::string_view part = payload.substr(0, most_payload);
        outgoing_.push_back(static_cast<char>(what));
        outgoing_.push_back(static_cast<char>(channel));
        outgoing_.append(little_endian(static_cast<std::uint32_t>(part.size())), 0, 2);
        outgoing_.append(part);
        payload.remove_prefix(part.size());
    } while (!payload.empty());
    write_line();
}

void Relay::write_line() {
    while (!outgoing_.empty()) {
        const ssize_t count = ::write(line_.get(), outgoing_.data(), outgoing_.size());
        if (count < 0) {
            if (!again())
                closed_ = true;
            return;
        }
        outgoing_.erase(0, static_cast<std::size_t>(count));
    }
}

void Relay::read_line() {
    std::array<char, read_size> buffer{};
    const ssize_t count = ::read(line_.get(), buffer.data(), buffer.size());
    if (count > 0)
        incoming_.append(buffer.data(), static_cast<std::size_t>(count));
    else if (count == 0 || !again())
        closed_ = true;
    take_frames();
}

void Relay::take_frames() {
    std::size_t begin = 0;
    while (incoming_.size() - begin >= header_size) {
        const std::string_view frame = std::string_view(incoming_).substr(begin);
        const std::size_t size = little_endian(frame.substr(2, 2));
        if (frame.size() < header_size + size)
            break;
        // A copy: the handler may have more frames taken in.
        const std::string payload(frame.substr(header_size, size));
        begin += header_size + size;
        take(static_cast<Say>(frame[0]), static_cast<std::uint8_t>(frame[1]), payload);
    }
    incoming_.erase(0, begin);
}

void Relay::take(Say what, std::uint8_t number, std::string_view payload) {
    Channel& channel = channels_[number];
    switch (what) {
    case Say::data:
        if (channel.to.get() >= 0)
            channel.unwritten.append(payload);
        return;
    case Say::credit:
        channel.may_send += little_endian(payload);
        return;
    case Say::end:
        channel.peer_ended = true;
        if (channel.unwritten.empty())
            end_writing(number);
        return;
    case Say::deaf: // whoever wrote to it shall notice
        channel.from = SharedInput();
        if (channel.socket)
            channel.to = File();
        return;
    default:
        break;
    }
    handler_(what, number, payload);
}

void Relay::watch(int fd, std::function<void()> ready) {
    watched_.push_back({fd, std::move(ready)});
}

void Relay::forget(int fd) {
    for (Watched& one : watched_)
        if (one.fd == fd)
            one.fd = -1; // poll() passes it over; its function may be running
}

bool Relay::turn(int milliseconds) {
    std::vector<pollfd> polled;
    polled.push_back(
        {closed_ ? -1 : line_.get(), static_cast<short>(outgoing_.empty() ? POLLIN : POLLIN | POLLOUT), 0});
    for (const Watched& one : watched_)
        polled.push_back({one.fd, POLLIN, 0});
    struct Source {
        std::uint8_t channel;
        bool to;
    };
    std::vector<Source> sources;
    for (std::size_t i = 0; i < channels_.size(); ++i) {
        const Channel& channel = channels_[i];
        const auto number = static_cast<std::uint8_t>(i);
        if (channel.from.get() >= 0 && channel.may_send > 0) {
            polled.push_back({channel.from.get(), POLLIN, 0});
            sources.push_back({number, false});
        }
        if (channel.to.get() >= 0 && !channel.unwritten.empty()) {
            polled.push_back({channel.to.get(), POLLOUT, 0});
            sources.push_back({number, true});
        }
    }
    if (::poll(polled.data(), polled.size(), milliseconds) < 0)
        return !closed_;
    const std::size_t first_source = 1 + watched_.size();
    for (std::size_t i = 0; i < sources.size(); ++i) {
        const auto [number, to] = sources[i];
        const bool ready = polled[first_source + i].revents != 0;
        if (to && ready)
            write_to(number);
        else if (!to && ready)
            read_from(number);
        else if (!to)
            channels_[number].idle = true;
    }
    for (std::size_t i = 1; i < first_source; ++i)
        if (polled[i].revents != 0)
            watched_[i - 1].ready();
    if ((polled[0].revents & POLLOUT) != 0)
        write_line();
    if ((polled[0].revents & (POLLIN | POLLHUP | POLLERR)) != 0)
        read_line();
    return !closed_;
}

} // namespace umbra::emulated
