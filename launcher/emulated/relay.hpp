// The line between umbra and the machine that it started for itself: one stream of bytes each way (a virtio
// serial port), on which there are several channels, as in SSH's connection protocol (RFC 4254, section 5).
// Both ends are this code: umbra, and the first program of the machine (init.cpp).
//
// It needs nothing but the C++ library, for it is linked into a small static program too.
#pragma once

#include "launcher/shared_input.hpp"
#include "vmm/kvm/file.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace umbra::emulated {

/// What a frame says. Frames up to `started` go one way each; the rest concern a channel and go both ways.
enum class Say : std::uint8_t {
    hello,   ///< machine: it is up, and has KVM. Empty
    failed,  ///< machine: it cannot do what it is for; the text says why. The last that it says
    start,   ///< umbra: pack()ed: what is to be run
    signal,  ///< umbra: one byte, a signal for what runs
    window,  ///< umbra: rows and columns of the terminal, two bytes each, low byte first
    wake,    ///< umbra: nothing, but it comes with an interrupt (Session::run in host.cpp). Empty
    serves,  ///< machine: what runs takes debuggers now. Empty
    ended,   ///< machine: a byte: exit code, or 128 + the signal that ended it. The last that it says
    stopped, ///< machine: what runs was stopped by the terminal (Ctrl-Z). Empty
    open,    ///< umbra: a debugger has come; the channel is new
    data,
    credit, ///< so many bytes more may be sent: four bytes, low byte first
    end,    ///< no more data will come from this side
    deaf,   ///< nothing that the other side sends is read any more
};

/// Channels that always are there; those of debuggers follow.
enum : std::uint8_t { input_channel, output_channel, error_channel, first_debugger_channel };

/// Strings as one, each with a zero byte behind it; they must have none themselves.
[[nodiscard]] std::string pack(const std::vector<std::string>& strings);
/// The reverse; what has no zero byte behind it is left out.
[[nodiscard]] std::vector<std::string> unpack(std::string_view text);

/// One end of the line. Nothing waits but poll(): a channel whose reader is slow holds up its own sender and
/// nobody else, for each has a window of bytes that may be on their way.
class Relay {
  public:
    /// What the other side says that is not about bytes of a channel.
    using Handler = std::function<void(Say what, std::uint8_t channel, std::string_view payload)>;

    /// `line` is made non-blocking.
    Relay(File line, Handler handler);

    /// Joins two files of this side to a channel: what `from` gives is sent, what comes is written to `to`.
    /// Either may be absent; what then comes is dropped. Files that others share stay as they are, blocking
    /// or not.
    void join(std::uint8_t channel, File from, File to);
    /// A socket for both ways, which lives until either side closes it.
    void join(std::uint8_t channel, File socket);
    /// Whether `from` is at its end, or absent.
    [[nodiscard]] bool ended(std::uint8_t channel) const { return channels_[channel].from.get() < 0; }
    /// Whether `from` had nothing to read, or has ended.
    [[nodiscard]] bool drained(std::uint8_t channel) const {
        return ended(channel) || channels_[channel].idle;
    }
    /// Whether all that came has been written to `to`.
    [[nodiscard]] bool written(std::uint8_t channel) const { return channels_[channel].unwritten.empty(); }

    void say(Say what, std::uint8_t channel = 0, std::string_view payload = {});

    /// Calls `ready` from turn() when there is something to read.
    void watch(int fd, std::function<void()> ready);
    /// No more; to be called before the file is closed.
    void forget(int fd);

    /// Waits, `milliseconds` at most (-1: for ever), and does what there is to do. False once the line is
    /// closed.
    [[nodiscard]] bool turn(int milliseconds);

    /// Whether all that was said has been handed to the line.
    [[nodiscard]] bool said() const { return outgoing_.empty(); }

  private:
    static constexpr std::size_t window = std::size_t{64} << 10;

    struct Channel {
        SharedInput from;
        File to;
        bool socket = false;           ///< the two are one
        bool idle = false;             ///< `from` had nothing to read when it was last looked at
        bool peer_ended = false;       ///< close `to` when all has been written
        std::string unwritten;         ///< has come, and `to` has not taken it
        std::size_t may_send = window; ///< bytes of the other side's window that are free
        std::uint32_t unreturned = 0;  ///< bytes taken by `to` for which no credit has been given back
    };
    struct Watched {
        int fd;
        std::function<void()> ready;
    };

    void read_line();
    void write_line();
    void take_frames();
    void take(Say what, std::uint8_t channel, std::string_view payload);
    void read_from(std::uint8_t channel);
    void write_to(std::uint8_t channel);
    void end_reading(std::uint8_t channel);
    void end_writing(std::uint8_t channel);

    File line_;
    Handler handler_;
    bool closed_ = false;
    std::string incoming_, outgoing_;
    std::array<Channel, 256> channels_;
    std::deque<Watched> watched_;
};

} // namespace umbra::emulated
