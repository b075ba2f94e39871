// The keyboard's commands, its scan codes, and the US layout.
#include "vmm/devices/keyboard.hpp"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

namespace umbra {
namespace {

constexpr std::uint8_t acknowledge = 0xfa;
constexpr std::uint8_t resend = 0xfe;
constexpr std::uint8_t self_test_passed = 0xaa;
constexpr std::uint8_t extended_prefix = 0xe0;
constexpr std::uint8_t set_1_released = 0x80;
constexpr std::uint8_t set_2_released_prefix = 0xf0;

constexpr std::uint8_t command_lights = 0xed;
constexpr std::uint8_t command_scan_code_set = 0xf0;
constexpr std::uint8_t command_repeat_rate = 0xf3;

/// Set 2's make codes by set 1's, extended keys alike.
constexpr std::array<std::uint8_t, 0x59> set_2_codes{
    0x00, 0x76, 0x16, 0x1e, 0x26, 0x25, 0x2e, 0x36, 0x3d, 0x3e, 0x46, 0x45, 0x4e, 0x55, 0x66, 0x0d, // 00-0f
    0x15, 0x1d, 0x24, 0x2d, 0x2c, 0x35, 0x3c, 0x43, 0x44, 0x4d, 0x54, 0x5b, 0x5a, 0x14, 0x1c, 0x1b, // 10-1f
    0x23, 0x2b, 0x34, 0x33, 0x3b, 0x42, 0x4b, 0x4c, 0x52, 0x0e, 0x12, 0x5d, 0x1a, 0x22, 0x21, 0x2a, // 20-2f
    0x32, 0x31, 0x3a, 0x41, 0x49, 0x4a, 0x59, 0x7c, 0x11, 0x29, 0x58, 0x05, 0x06, 0x04, 0x0c, 0x03, // 30-3f
    0x0b, 0x83, 0x0a, 0x01, 0x09, 0x77, 0x7e, 0x6c, 0x75, 0x7d, 0x7b, 0x6b, 0x73, 0x74, 0x79, 0x69, // 40-4f
    0x72, 0x7a, 0x70, 0x71, 0x84, 0x60, 0x61, 0x78, 0x07,                                           // 50-58
};

/// Set 1's make codes below 0x3a of the keys that make characters, by the character: without shift, and
/// with. Where a key makes none there is a space, which is another key.
constexpr std::string_view plain = "  1234567890-=  qwertyuiop[]  asdfghjkl;'` \\zxcvbnm,./   ";
constexpr std::string_view shifted = "  !@#$%^&*()_+  QWERTYUIOP{}  ASDFGHJKL:\"~ |ZXCVBNM<>?   ";
static_assert(plain.size() == shifted.size() && plain[0x35] == '/' && plain[0x1e] == 'a');

constexpr std::uint8_t key_escape = 0x01, key_backspace = 0x0e, key_tab = 0x0f, key_enter = 0x1c,
                       key_control = 0x1d, key_shift = 0x2a, key_space = 0x39;

struct Sequence {
    std::string_view text;
    std::uint8_t code;
    bool extended;
};
/// What terminals send, after ESC, for keys that make no character (xterm's control sequences).
constexpr std::array<Sequence, 30> sequences{{
    {"[A", 0x48, true},    {"[B", 0x50, true},    {"[C", 0x4d, true},    {"[D", 0x4b, true},
    {"[H", 0x47, true},    {"[F", 0x4f, true},    {"OH", 0x47, true},    {"OF", 0x4f, true},
    {"[1~", 0x47, true},   {"[2~", 0x52, true},   {"[3~", 0x53, true},   {"[4~", 0x4f, true},
    {"[5~", 0x49, true},   {"[6~", 0x51, true},   {"OP", 0x3b, false},   {"OQ", 0x3c, false},
    {"OR", 0x3d, false},   {"OS", 0x3e, false},   {"[15~", 0x3f, false}, {"[17~", 0x40, false},
    {"[18~", 0x41, false}, {"[19~", 0x42, false}, {"[20~", 0x43, false}, {"[21~", 0x44, false},
    {"[23~", 0x57, false}, {"[24~", 0x58, false}, {"OA", 0x48, true},    {"OB", 0x50, true},
    {"OC", 0x4d, true},    {"OD", 0x4b, true},
}};

struct Key {
    std::uint8_t code = 0; ///< 0: none
    bool extended = false;
    std::uint8_t with = 0; ///< the key that is held meanwhile; 0: none
};

Key key_of(char character) {
    switch (character) {
    case '\x1b':
        return {.code = key_escape};
    case '\b':
    case '\x7f':
        return {.code = key_backspace};
    case '\t':
        return {.code = key_tab};
    case '\r':
    case '\n':
        return {.code = key_enter};
    case ' ':
        return {.code = key_space};
    default:
        break;
    }
    if (const auto at = plain.find(character); at != std::string_view::npos)
        return {.code = static_cast<std::uint8_t>(at)};
    if (const auto at = shifted.find(character); at != std::string_view::npos)
        return {.code = static_cast<std::uint8_t>(at), .with = key_shift};
    if (character >= 1 && character <= 26) {
        const auto letter = static_cast<char>('a' + character - 1);
        return {.code = static_cast<std::uint8_t>(plain.find(letter)), .with = key_control};
    }
    return {};
}

std::vector<KeyEvent> strokes(const Key& key) {
    if (key.code == 0)
        return {};
    std::vector<KeyEvent> events{{.code = key.code, .extended = key.extended},
                                 {.code = key.code, .extended = key.extended, .released = true}};
    if (key.with != 0) {
        events.insert(events.begin(), {.code = key.with});
        events.push_back({.code = key.with, .released = true});
    }
    return events;
}

} // namespace

TypedKey typed_key(std::span<const char> text) {
    if (text.front() == '\x1b') {
        const std::string_view rest(text.data() + 1, text.size() - 1);
        for (const Sequence& sequence : sequences)
            if (rest.starts_with(sequence.text))
                return {strokes({.code = sequence.code, .extended = sequence.extended}),
                        1 + sequence.text.size()};
    }
    return {strokes(key_of(text.front())), 1};
}

std::size_t Keyboard::receive(std::span<const char> text) {
    std::size_t taken = 0;
    while (taken < text.size()) {
        const TypedKey key = typed_key(text.subspan(taken));
        if (events_.size() + key.events.size() > event_limit)
            break;
        events_.insert(events_.end(), key.events.begin(), key.events.end());
        taken += key.used;
    }
    return taken;
}

std::vector<std::uint8_t> Keyboard::next_event(bool translated) {
    if (events_.empty() || !scanning_)
        return {};
    const KeyEvent event = events_.front();
    events_.pop_front();
    std::vector<std::uint8_t> bytes;
    if (event.extended)
        bytes.push_back(extended_prefix);
    if (translated || set_ == ScanCodeSet::set_1) {
        bytes.push_back(static_cast<std::uint8_t>(event.code | (event.released ? set_1_released : 0U)));
        return bytes;
    }
    if (event.released)
        bytes.push_back(set_2_released_prefix);
    bytes.push_back(set_2_codes.at(event.code));
    return bytes;
}

std::vector<std::uint8_t> Keyboard::command(std::uint8_t value, bool translated) {
    switch (std::exchange(parameter_of_, std::uint8_t{0})) {
    case command_lights:
    case command_repeat_rate:
        return {acknowledge};
    case command_scan_code_set:
        if (value == 0)
            return {acknowledge, static_cast<std::uint8_t>(set_)};
        if (value > static_cast<std::uint8_t>(ScanCodeSet::set_2))
            return {resend};
        set_ = static_cast<ScanCodeSet>(value);
        return {acknowledge};
    default:
        break;
    }
    switch (value) {
    case command_lights:
    case command_scan_code_set:
    case command_repeat_rate:
        parameter_of_ = value;
        return {acknowledge};
    case 0xee: // echo
        return {0xee};
    case 0xf2: // identify
        return {acknowledge, 0xab, translated ? std::uint8_t{0x41} : std::uint8_t{0x83}};
    case 0xf4: // enable scanning
        scanning_ = true;
        return {acknowledge};
    case 0xf5: // disable scanning, with the defaults
        reset();
        scanning_ = false;
        return {acknowledge};
    case 0xf6: // set defaults
        reset();
        return {acknowledge};
    case 0xff: // reset
        reset();
        return {acknowledge, self_test_passed};
    default:
        return {resend};
    }
}

/// What was typed ahead stays: who types into a pipe does not wait for the driver.
void Keyboard::reset() {
    scanning_ = true;
    set_ = ScanCodeSet::set_2;
}

} // namespace umbra
