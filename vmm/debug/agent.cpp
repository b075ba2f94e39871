#include "vmm/debug/agent.hpp"

#include "vmm/debug/packet.hpp"

#include <algorithm>
#include <array>
#include <cstdio>

#include <fmt/core.h>

namespace umbra {
namespace {

/// The operations' codes (gdb/common/ax.def).
enum class Op : std::uint8_t {
    add = 0x02,
    sub,
    mul,
    div_signed,
    div_unsigned,
    rem_signed,
    rem_unsigned,
    lsh,
    rsh_signed,
    rsh_unsigned,
    trace,
    trace_quick,
    log_not,
    bit_and,
    bit_or,
    bit_xor,
    bit_not,
    equal,
    less_signed,
    less_unsigned,
    ext,
    ref8,
    ref16,
    ref32,
    ref64,
    if_goto = 0x20,
    go_to,
    const8,
    const16,
    const32,
    const64,
    reg,
    end,
    dup,
    pop,
    zero_ext,
    swap,
    trace16 = 0x30,
    pick = 0x32,
    rot,
    printf,
};

/// gdb sends a format as the user wrote it: the escapes of C in it (gdbsupport's format_pieces).
std::string unescape(std::string_view text) {
    constexpr std::string_view letters = "abefnrtv", meanings = "\a\b\x1b\f\n\r\t\v";
    std::string out;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] != '\\' || i + 1 == text.size()) {
            out += text[i];
            continue;
        }
        const char escape = text[++i];
        if (const std::size_t known = letters.find(escape); known != std::string_view::npos) {
            out += meanings[known];
        } else if (escape >= '0' && escape <= '7') {
            unsigned value = 0;
            for (unsigned digits = 0; digits < 3 && i < text.size() && text[i] >= '0' && text[i] <= '7';
                 ++digits)
                value = value * 8 + static_cast<unsigned>(text[i++] - '0');
            --i;
            out += static_cast<char>(value);
        } else {
            out += escape; // backslash and quotes
        }
    }
    return out;
}

/// A conversion of a format, without its '%'.
struct Field {
    std::string spec;          ///< flags, width and precision
    std::size_t precision = 0; ///< that of a string: how much of it is printed
    unsigned bits = 32;        ///< of the value
    char kind = 0;
};
constexpr std::size_t longest_string = 1024;

/// Takes a conversion from the front of what follows a '%'. Nothing if it is none, or one whose text would
/// not fit `printed`.
std::optional<Field> take_field(std::string_view& pattern) {
    const auto take = [&](std::string_view accepted) {
        const std::size_t length = std::min(pattern.find_first_not_of(accepted), pattern.size());
        const std::string_view taken = pattern.substr(0, length);
        pattern.remove_prefix(length);
        return taken;
    };
    constexpr std::string_view digits = "0123456789";
    constexpr std::size_t most_flags = 6, most_digits = 3;
    const std::string_view flags = take("-+ #0'"), width = take(digits);
    const bool precise = pattern.starts_with('.');
    pattern.remove_prefix(precise ? 1 : 0);
    const std::string_view precision = take(digits), length = take("hlLjqtz");
    if (pattern.empty() || flags.size() > most_flags || width.size() > most_digits ||
        precision.size() > most_digits || length.size() > 2)
        return std::nullopt;
    Field field{fmt::format("%{}{}{}{}", flags, width, precise ? "." : "", precision), longest_string, 32,
                pattern.front()};
    pattern.remove_prefix(1);
    if (precise) {
        field.precision = 0;
        for (const char digit : precision)
            field.precision = field.precision * 10 + static_cast<std::size_t>(digit - '0');
    }
    if (!length.empty())
        field.bits = length == "h" ? 16 : length == "hh" ? 8 : 64;
    return field;
}

/// One value in C's way: whatever the flags mean there they mean here.
template<class Value>
std::string printed(const std::string& spec, Value value) {
    std::array<char, longest_string + 1> text{};
    const int length = std::snprintf(text.data(), text.size(), spec.c_str(), value);
    return {text.data(), std::min(static_cast<std::size_t>(std::max(length, 0)), text.size() - 1)};
}

class Machine {
  public:
    Machine(std::span<const std::byte> code, AgentContext& context) : code_(code), context_(context) {}

    AgentResult run() {
        for (unsigned steps = 0; !ended_ && !error_; ++steps) {
            if (steps == agent_steps)
                return AgentError::too_long;
            const std::uint64_t op = operand(1);
            if (!error_)
                step(static_cast<Op>(op));
        }
        if (error_)
            return *error_;
        return stack_.empty() ? 0 : static_cast<std::int64_t>(stack_.back());
    }

  private:
    void fail(AgentError error) {
        if (!error_)
            error_ = error;
    }
    void push(std::uint64_t value) {
        if (stack_.size() == agent_stack)
            fail(AgentError::stack);
        else
            stack_.push_back(value);
    }
    std::uint64_t pop() {
        if (stack_.empty()) {
            fail(AgentError::stack);
            return 0;
        }
        const std::uint64_t value = stack_.back();
        stack_.pop_back();
        return value;
    }
    /// An operand in the code, most significant byte first.
    std::uint64_t operand(std::size_t size) {
        if (code_.size() - at_ < size) {
            fail(AgentError::bad_code);
            return 0;
        }
        std::uint64_t value = 0;
        for (const std::byte byte : code_.subspan(at_, size))
            value = value << 8 | std::to_integer<std::uint64_t>(byte);
        at_ += size;
        return value;
    }
    void jump(std::uint64_t target) {
        if (target >= code_.size())
            fail(AgentError::bad_code);
        else
            at_ = target;
    }
    void fetch(std::size_t size) {
        std::array<std::byte, 8> bytes{};
        const GuestVirt at(pop());
        if (error_)
            return;
        if (!context_.read_memory(at, std::span(bytes).first(size)))
            return fail(AgentError::memory);
        std::uint64_t value = 0;
        for (std::size_t i = size; i-- > 0;)
            value = value << 8 | std::to_integer<std::uint64_t>(bytes[i]);
        push(value);
    }
    template<class Function>
    void binary(Function function) {
        const std::uint64_t right = pop(), left = pop();
        push(function(left, right));
    }
    template<class Function>
    void divide(Function function) {
        const std::uint64_t right = pop(), left = pop();
        if (right == 0)
            return fail(AgentError::division);
        push(function(left, right));
    }
    static std::int64_t sign(std::uint64_t value) { return static_cast<std::int64_t>(value); }
    void extend(bool is_signed);
    void step(Op op);
    void print();
    [[nodiscard]] std::string format(std::string_view pattern, std::span<const std::uint64_t> values);
    [[nodiscard]] std::string format(const Field& field, std::uint64_t value);
    [[nodiscard]] std::string text_at(GuestVirt at, std::size_t longest);

    std::span<const std::byte> code_;
    AgentContext& context_;
    std::size_t at_ = 0;
    std::vector<std::uint64_t> stack_;
    std::size_t text_size_ = 0; ///< of all that was printed
    bool ended_ = false;
    std::optional<AgentError> error_;
};

void Machine::extend(bool is_signed) {
    const std::uint64_t bits = operand(1), value = pop();
    if (bits >= 64)
        return push(value);
    if (bits == 0) // of no bits there is no sign
        return is_signed ? fail(AgentError::bad_code) : push(0);
    const std::uint64_t unused = 64 - bits;
    push(is_signed ? static_cast<std::uint64_t>(sign(value << unused) >> unused) : value << unused >> unused);
}

void Machine::step(Op op) {
    const auto shift = [](std::uint64_t by) { return std::min<std::uint64_t>(by, 63); };
    switch (op) {
    case Op::add:
        return binary([](auto a, auto b) { return a + b; });
    case Op::sub:
        return binary([](auto a, auto b) { return a - b; });
    case Op::mul:
        return binary([](auto a, auto b) { return a * b; });
    case Op::div_signed:
        // By -1: in C, the lowest number's quotient would not be defined.
        return divide([](auto a, auto b) {
            return sign(b) == -1 ? ~a + 1 : static_cast<std::uint64_t>(sign(a) / sign(b));
        });
    case Op::div_unsigned:
        return divide([](auto a, auto b) { return a / b; });
    case Op::rem_signed:
        return divide(
            [](auto a, auto b) { return sign(b) == -1 ? 0 : static_cast<std::uint64_t>(sign(a) % sign(b)); });
    case Op::rem_unsigned:
        return divide([](auto a, auto b) { return a % b; });
    case Op::lsh:
        return binary([](auto a, auto b) { return b > 63 ? 0 : a << b; });
    case Op::rsh_signed:
        return binary([&](auto a, auto b) { return static_cast<std::uint64_t>(sign(a) >> shift(b)); });
    case Op::rsh_unsigned:
        return binary([](auto a, auto b) { return b > 63 ? 0 : a >> b; });
    case Op::trace: // there is no trace buffer: what would be put into it is dropped
        pop();
        pop();
        return;
    case Op::trace_quick: // the address stays
        (void)operand(1);
        return push(pop());
    case Op::trace16:
        (void)operand(2);
        return push(pop());
    case Op::log_not:
        return push(pop() == 0 ? 1 : 0);
    case Op::bit_and:
        return binary([](auto a, auto b) { return a & b; });
    case Op::bit_or:
        return binary([](auto a, auto b) { return a | b; });
    case Op::bit_xor:
        return binary([](auto a, auto b) { return a ^ b; });
    case Op::bit_not:
        return push(~pop());
    case Op::equal:
        return binary([](auto a, auto b) -> std::uint64_t { return a == b; });
    case Op::less_signed:
        return binary([](auto a, auto b) -> std::uint64_t { return sign(a) < sign(b); });
    case Op::less_unsigned:
        return binary([](auto a, auto b) -> std::uint64_t { return a < b; });
    case Op::ext:
        return extend(true);
    case Op::zero_ext:
        return extend(false);
    case Op::ref8:
        return fetch(1);
    case Op::ref16:
        return fetch(2);
    case Op::ref32:
        return fetch(4);
    case Op::ref64:
        return fetch(8);
    case Op::if_goto: {
        const std::uint64_t target = operand(2);
        if (pop() != 0)
            jump(target);
        return;
    }
    case Op::go_to:
        return jump(operand(2));
    case Op::const8:
        return push(operand(1));
    case Op::const16:
        return push(operand(2));
    case Op::const32:
        return push(operand(4));
    case Op::const64:
        return push(operand(8));
    case Op::reg: {
        const auto value = context_.read_register(static_cast<unsigned>(operand(2)));
        return value ? push(*value) : fail(AgentError::registers);
    }
    case Op::end:
        ended_ = true;
        return;
    case Op::dup: {
        const std::uint64_t value = pop();
        push(value);
        return push(value);
    }
    case Op::pop:
        pop();
        return;
    case Op::swap: {
        const std::uint64_t top = pop(), below = pop();
        push(top);
        return push(below);
    }
    case Op::pick: {
        const std::uint64_t depth = operand(1);
        return depth < stack_.size() ? push(stack_[stack_.size() - 1 - depth]) : fail(AgentError::stack);
    }
    case Op::rot: { // a b c -> c a b, c on top before
        const std::uint64_t c = pop(), b = pop(), a = pop();
        push(c);
        push(a);
        return push(b);
    }
    case Op::printf:
        return print();
    }
    fail(AgentError::bad_code);
}

/// Operands: the number of values, the format's length and the format with its NUL. On the stack: the values,
/// the first one on top, below the format's function and channel, which mean nothing here.
void Machine::print() {
    const std::uint64_t count = operand(1);
    const std::uint64_t length = operand(2);
    if (error_ || length == 0 || code_.size() - at_ < length || code_[at_ + length - 1] != std::byte{})
        return fail(AgentError::bad_code);
    const auto* text = reinterpret_cast<const char*>(code_.data() + at_);
    at_ += length;
    (void)pop(); // function
    (void)pop(); // channel
    std::vector<std::uint64_t> values;
    for (std::uint64_t i = 0; i < count && !error_; ++i)
        values.push_back(pop());
    if (error_)
        return;
    const std::string out = format(unescape({text, length - 1}), values);
    if (!error_)
        context_.print(out);
}

/// Up to its NUL or to where there is no memory.
std::string Machine::text_at(GuestVirt at, std::size_t longest) {
    std::string text;
    for (std::byte byte{}; text.size() < longest &&
                           context_.read_memory(at + text.size(), std::span(&byte, 1)) &&
                           byte != std::byte{};)
        text += static_cast<char>(byte);
    return text;
}

std::string Machine::format(const Field& field, std::uint64_t value) {
    const unsigned unused = 64 - field.bits;
    switch (field.kind) {
    case 'd':
    case 'i':
        return printed(field.spec + "lld", static_cast<long long>(sign(value << unused) >> unused));
    case 'u':
    case 'x':
    case 'X':
    case 'o':
        return printed(field.spec + "ll" + field.kind,
                       static_cast<unsigned long long>(value << unused >> unused));
    case 'p':
        return printed(field.spec + "s", fmt::format("{:#x}", value).c_str());
    case 'c':
        return printed(field.spec + "c", static_cast<int>(value & 0xff));
    case 's': { // null as gdb's own printf shows it
        const std::size_t longest = std::min(field.precision, longest_string);
        const std::string text = value == 0 ? "(null)" : text_at(GuestVirt(value), longest);
        return printed(field.spec + "s", text.c_str());
    }
    default: // floating point, and what is no conversion
        fail(AgentError::bad_code);
        return {};
    }
}

/// As printf, for integers, pointers, characters and strings.
std::string Machine::format(std::string_view pattern, std::span<const std::uint64_t> values) {
    std::string out;
    while (!pattern.empty() && !error_) {
        const std::size_t literal = std::min(pattern.find('%'), pattern.size());
        out += pattern.substr(0, literal);
        pattern.remove_prefix(literal);
        if (!pattern.empty()) {
            pattern.remove_prefix(1);
            const auto field = take_field(pattern);
            if (!field) {
                fail(AgentError::bad_code);
            } else if (field->kind == '%') {
                out += '%';
            } else if (values.empty()) {
                fail(AgentError::stack);
            } else {
                out += format(*field, values.front());
                values = values.subspan(1);
            }
        }
        if (text_size_ + out.size() > agent_text)
            fail(AgentError::too_long);
    }
    text_size_ += out.size();
    return out;
}

/// "X LENGTH,CODE", the length in hexadecimal.
std::optional<AgentExpression> parse_expression(Cursor& cursor) {
    if (!cursor.take('X'))
        return std::nullopt;
    (void)cursor.take(' ');
    const auto length = cursor.hex();
    if (!length || !cursor.take(','))
        return std::nullopt;
    auto code = cursor.bytes(*length);
    if (!code)
        return std::nullopt;
    return AgentExpression{std::move(*code)};
}

} // namespace

AgentResult evaluate(const AgentExpression& expression, AgentContext& context) {
    return Machine(expression.code, context).run();
}

std::optional<PointLists> parse_point_lists(std::string_view text) {
    PointLists lists;
    for (Cursor cursor(text); !cursor.empty();) {
        if (!cursor.take(';'))
            return std::nullopt;
        std::vector<AgentExpression>* list = &lists.conditions;
        if (cursor.take("cmds:")) {
            if (!cursor.hex() || !cursor.take(','))
                return std::nullopt;
            list = &lists.commands;
        }
        do {
            auto expression = parse_expression(cursor);
            if (!expression)
                return std::nullopt;
            list->push_back(std::move(*expression));
        } while (cursor.rest().starts_with('X'));
    }
    return lists;
}

} // namespace umbra
