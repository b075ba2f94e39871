// Packets of gdb's remote protocol: from bytes to packets and back, and reading what is in one. No I/O.
//
// GDB manual, appendix "GDB Remote Serial Protocol", sections "Overview" (framing, escapes, run-length
// encoding) and "Packet Acknowledgment". Both ends may be anything: no input is refused otherwise than as
// described here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

// --- Framing

/// One thing that the client sent.
struct PacketItem {
    enum class Kind : std::uint8_t {
        packet,     ///< payload: what is between '$' and '#', escapes undone
        ack,        ///< '+'
        nack,       ///< '-': send the last packet again
        interrupt,  ///< 0x03 outside a packet: Ctrl-C
        bad_packet, ///< its checksum was wrong, or it was longer than PacketParser::max_payload
    };
    Kind kind{};
    std::string payload{}; ///< any bytes; empty unless a packet

    friend bool operator==(const PacketItem&, const PacketItem&) = default;
};

/// Finds the items in what a client sends. Bytes between packets that are none of them are skipped; a '$'
/// begins a packet anew wherever it stands, as data never contains one: so a client can begin again after
/// half a packet. Memory: at most max_payload.
class PacketParser {
  public:
    /// Bytes of the longest payload, escapes undone: what qSupported should announce as PacketSize.
    static constexpr std::size_t max_payload = 0x20000;

    /// Takes from the front of `bytes` until an item is complete; nothing if there is none in `bytes`, which
    /// are then all taken. How the stream was cut into pieces makes no difference.
    [[nodiscard]] std::optional<PacketItem> take(std::string_view& bytes);

    /// Checksums are compared until told not to (a client in no-ack mode need not compute them).
    void check_sums(bool on) { check_sums_ = on; }

  private:
    enum class State : std::uint8_t { between, data, escape, sum_high, sum_low };

    void begin();
    void add(char byte);
    [[nodiscard]] PacketItem finish(char low);

    State state_ = State::between;
    bool check_sums_ = true;
    bool too_long_ = false;
    std::uint8_t sum_ = 0;
    char sum_high_ = 0;
    std::string payload_;
};

/// The packet with this payload: escaped, run-length encoded (which only the stub's side may), with checksum.
/// At most twice the payload's length and 4 bytes.
[[nodiscard]] std::string frame(std::string_view payload);

// --- Hexadecimal

/// Two lower-case digits a byte, in the order of the bytes.
[[nodiscard]] std::string to_hex(std::span<const std::byte> bytes);
[[nodiscard]] std::string to_hex(std::string_view text);
/// Nothing unless `digits` are pairs of digits, of either case.
[[nodiscard]] std::optional<std::vector<std::byte>> from_hex(std::string_view digits);
[[nodiscard]] std::optional<std::string> text_from_hex(std::string_view digits);

// --- Reading a payload

/// Takes a payload apart from its front. What does not fit is left where it is. Refers to the payload.
class Cursor {
  public:
    explicit Cursor(std::string_view payload) : left_(payload) {}

    [[nodiscard]] bool empty() const { return left_.empty(); }
    [[nodiscard]] std::size_t size() const { return left_.size(); }
    /// What has not been taken.
    [[nodiscard]] std::string_view rest() const { return left_; }

    /// Takes what is expected; false if something else follows.
    [[nodiscard]] bool take(char expected);
    [[nodiscard]] bool take(std::string_view expected);
    /// Takes a number of hexadecimal digits, most significant first, up to the first character that is none.
    /// Nothing if there is no digit or the number has more than 64 bits.
    [[nodiscard]] std::optional<std::uint64_t> hex();
    /// Takes `count` bytes written as pairs of digits. Nothing if there are not as many.
    [[nodiscard]] std::optional<std::vector<std::byte>> bytes(std::size_t count);
    /// Takes up to `end`, which is taken too but not returned; everything if there is none.
    [[nodiscard]] std::string_view until(char end);

  private:
    std::string_view left_;
};

} // namespace umbra
