#include "vmm/debug/packet.hpp"

#include <algorithm>
#include <utility>

namespace umbra {
namespace {

constexpr char escape_mark = '}';
constexpr char escape_bit = 0x20;
constexpr char interrupt_byte = 0x03;

std::optional<std::uint8_t> digit(char character) {
    if (character >= '0' && character <= '9')
        return static_cast<std::uint8_t>(character - '0');
    if (character >= 'a' && character <= 'f')
        return static_cast<std::uint8_t>(character - 'a' + 10);
    if (character >= 'A' && character <= 'F')
        return static_cast<std::uint8_t>(character - 'A' + 10);
    return std::nullopt;
}

void put_hex(std::string& text, std::uint8_t byte) {
    constexpr std::string_view digits = "0123456789abcdef";
    text += digits[byte >> 4];
    text += digits[byte & 0xf];
}

std::optional<std::uint8_t> byte_of(char high, char low) {
    const auto left = digit(high), right = digit(low);
    if (!left || !right)
        return std::nullopt;
    return static_cast<std::uint8_t>(*left << 4 | *right);
}

template<class Bytes>
std::optional<Bytes> decode(std::string_view digits) {
    if (digits.size() % 2 != 0)
        return std::nullopt;
    Bytes bytes;
    bytes.reserve(digits.size() / 2);
    for (std::size_t i = 0; i < digits.size(); i += 2) {
        const auto byte = byte_of(digits[i], digits[i + 1]);
        if (!byte)
            return std::nullopt;
        bytes.push_back(static_cast<typename Bytes::value_type>(*byte));
    }
    return bytes;
}

bool needs_escape(char character) {
    return character == '$' || character == '#' || character == escape_mark || character == '*';
}

// --- Run-length encoding: after a character, '*' and the number of its repetitions plus 29, as a character.

constexpr std::size_t repeat_base = 29;
constexpr std::size_t fewest_repeats = 3; // ' ', the first printable one
constexpr std::size_t most_repeats = 97;  // '~', the last one

/// The most repetitions, no more than these, whose count does not look like one of the protocol's own
/// characters.
std::size_t encodable(std::size_t repeats) {
    while (std::string_view("$#+-").find(static_cast<char>(repeats + repeat_base)) != std::string_view::npos)
        --repeats;
    return repeats;
}

} // namespace

// --- PacketParser

std::optional<PacketItem> PacketParser::take(std::string_view& bytes) {
    while (!bytes.empty()) {
        const char byte = bytes.front();
        bytes.remove_prefix(1);
        if (byte == '$') {
            begin();
            continue;
        }
        switch (state_) {
        case State::between:
            if (byte == '+')
                return PacketItem{PacketItem::Kind::ack};
            if (byte == '-')
                return PacketItem{PacketItem::Kind::nack};
            if (byte == interrupt_byte)
                return PacketItem{PacketItem::Kind::interrupt};
            break;
        case State::data:
        case State::escape: // a '#' ends the packet even here: data never contains one
            if (byte == '#')
                state_ = State::sum_high;
            else
                add(byte);
            break;
        case State::sum_high:
            sum_high_ = byte;
            state_ = State::sum_low;
            break;
        case State::sum_low:
            return finish(byte);
        }
    }
    return std::nullopt;
}

void PacketParser::begin() {
    state_ = State::data;
    too_long_ = false;
    sum_ = 0;
    payload_.clear();
}

void PacketParser::add(char byte) {
    sum_ = static_cast<std::uint8_t>(sum_ + static_cast<std::uint8_t>(byte));
    if (state_ == State::data && byte == escape_mark) {
        state_ = State::escape;
        return;
    }
    if (state_ == State::escape)
        byte ^= escape_bit;
    state_ = State::data;
    too_long_ |= payload_.size() == max_payload;
    if (!too_long_)
        payload_ += byte;
}

PacketItem PacketParser::finish(char low) {
    state_ = State::between;
    if (too_long_ || (check_sums_ && byte_of(sum_high_, low) != sum_))
        return {PacketItem::Kind::bad_packet};
    return {PacketItem::Kind::packet, std::exchange(payload_, {})};
}

std::string frame(std::string_view payload) {
    std::string framed = "$";
    framed.reserve(payload.size() + 4);
    while (!payload.empty()) {
        const char character = payload.front();
        // What is escaped is not encoded: the client undoes the encoding first.
        if (needs_escape(character)) {
            framed += escape_mark;
            framed += static_cast<char>(character ^ escape_bit);
            payload.remove_prefix(1);
            continue;
        }
        framed += character;
        payload.remove_prefix(1);
        const std::string_view ahead = payload.substr(0, most_repeats);
        const std::size_t repeats = encodable(std::min(ahead.find_first_not_of(character), ahead.size()));
        if (repeats >= fewest_repeats) {
            framed += '*';
            framed += static_cast<char>(repeats + repeat_base);
            payload.remove_prefix(repeats);
        }
    }
    std::uint8_t sum = 0;
    for (const char character : std::string_view(framed).substr(1))
        sum = static_cast<std::uint8_t>(sum + static_cast<std::uint8_t>(character));
    framed += '#';
    put_hex(framed, sum);
    return framed;
}

// --- Hexadecimal

std::string to_hex(std::span<const std::byte> bytes) {
    std::string text;
    text.reserve(bytes.size() * 2);
    for (const std::byte byte : bytes)
        put_hex(text, static_cast<std::uint8_t>(byte));
    return text;
}

std::string to_hex(std::string_view text) {
    return to_hex(std::as_bytes(std::span(text)));
}

std::optional<std::vector<std::byte>> from_hex(std::string_view digits) {
    return decode<std::vector<std::byte>>(digits);
}

std::optional<std::string> text_from_hex(std::string_view digits) {
    return decode<std::string>(digits);
}

// --- Cursor

bool Cursor::take(char expected) {
    return take(std::string_view(&expected, 1));
}

bool Cursor::take(std::string_view expected) {
    if (!left_.starts_with(expected))
        return false;
    left_.remove_prefix(expected.size());
    return true;
}

std::optional<std::uint64_t> Cursor::hex() {
    std::uint64_t number = 0;
    std::size_t digits = 0;
    for (; digits < left_.size(); ++digits) {
        const auto value = digit(left_[digits]);
        if (!value)
            break;
        if (number >> 60 != 0)
            return std::nullopt;
        number = number << 4 | *value;
    }
    if (digits == 0)
        return std::nullopt;
    left_.remove_prefix(digits);
    return number;
}

std::optional<std::vector<std::byte>> Cursor::bytes(std::size_t count) {
    if (count > left_.size() / 2)
        return std::nullopt;
    auto bytes = from_hex(left_.substr(0, count * 2));
    if (bytes)
        left_.remove_prefix(count * 2);
    return bytes;
}

std::string_view Cursor::until(char end) {
    const std::size_t length = left_.find(end);
    const std::string_view taken = left_.substr(0, length);
    left_.remove_prefix(length == std::string_view::npos ? left_.size() : length + 1);
    return taken;
}

} // namespace umbra
