// A PC keyboard with the US layout (IBM Personal System/2 Hardware Technical Reference, "Keyboard"): what is
// typed as text becomes keys pressed and released.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

namespace umbra {

/// A key going down or up.
struct KeyEvent {
    std::uint8_t code = 0; ///< its make code in scan code set 1, below 0x80
    bool extended = false; ///< prefixed by E0
    bool released = false;

    bool operator==(const KeyEvent&) const = default;
};

/// Text and what terminals send for keys, as events: shift and control go down and up around their key.
/// `used` is how many characters at the start of `text` the events are of: 1, or an escape sequence. Empty
/// for a character that no key makes.
struct TypedKey {
    std::vector<KeyEvent> events;
    std::size_t used = 0;
};
/// `text` is not empty.
[[nodiscard]] TypedKey typed_key(std::span<const char> text);

/// Scan code sets that a keyboard can be told to use.
enum class ScanCodeSet : std::uint8_t { set_1 = 1, set_2 = 2 };

class Keyboard {
  public:
    /// How many events wait to be read before receive() takes no more.
    static constexpr std::size_t event_limit = 256;

    /// Text that is typed. Takes what there is room for and returns how many characters that was.
    [[nodiscard]] std::size_t receive(std::span<const char> text);

    // `translated`: the controller makes set 1 of set 2, in all that the keyboard sends.

    /// A byte from the controller. The answer is one to three bytes.
    [[nodiscard]] std::vector<std::uint8_t> command(std::uint8_t value, bool translated);

    /// The bytes of the next event, at most three; none if nothing was typed or scanning is off.
    [[nodiscard]] std::vector<std::uint8_t> next_event(bool translated);

  private:
    void reset();

    std::deque<KeyEvent> events_;
    bool scanning_ = true;
    ScanCodeSet set_ = ScanCodeSet::set_2;
    std::uint8_t parameter_of_ = 0; ///< the command whose parameter comes next; 0 is none
};

} // namespace umbra
