#include "vmm/debug/agent.hpp"

#include "vmm/debug/packet.hpp"

#include <algorithm>
#include <array>

#include <fmt/format.h>

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
        const bool overflows = right == ~std::uint64_t{0} && left == std::uint64_t{1} << 63;
        if (right == 0 || overflows)
            return fail(AgentError::division);
        push(function(left, right));
    }
    static std::int64_t sign(std::uint64_t value) { return static_cast<std::int64_t>(value); }
    void extend(bool is_signed);
    void step(Op op);
    void print();
    void format(std::string_view pattern, std::span<const std::uint64_t> values);
    [[nodiscard]] std::string text_at(GuestVirt at);

    std::span<const std::byte> code_;
    AgentContext& context_;
    std::size_t at_ = 0;
    std::vector<std::uint64_t> stack_;
    bool ended_ = false;
    std::optional<AgentError> error_;
};

void Machine::extend(bool is_signed) {
    const std::uint64_t bits = operand(1), value = pop();
    if (bits == 0)
        return fail(AgentError::bad_code);
    if (bits >= 64)
        return push(value);
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
        return divide([](auto a, auto b) { return static_cast<std::uint64_t>(sign(a) / sign(b)); });
    case Op::div_unsigned:
        return divide([](auto a, auto b) { return a / b; });
    case Op::rem_signed:
        return divide([](auto a, auto b) { return static_cast<std::uint64_t>(sign(a) % sign(b)); });
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
    case Op::trace_quick:
        (void)operand(1);
        return;
    case Op::trace16:
        (void)operand(2);
        return;
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
    if (error_ || length == 0 || code_.size() - at_ < length)
        return fail(AgentError::bad_code);
    const auto* text = reinterpret_cast<const char*>(code_.data() + at_);
    at_ += length;
    (void)pop(); // function
    (void)pop(); // channel
    std::vector<std::uint64_t> values;
    for (std::uint64_t i = 0; i < count && !error_; ++i)
        values.push_back(pop());
    if (!error_)
        format(unescape({text, length - 1}), values);
}

std::string Machine::text_at(GuestVirt at) {
    constexpr std::size_t longest = 1024;
    std::string text;
    for (std::byte byte{}; text.size() < longest &&
                           context_.read_memory(at + text.size(), std::span(&byte, 1)) &&
                           byte != std::byte{};)
        text += static_cast<char>(byte);
    return text;
}

/// As printf, for integers, pointers, characters and strings; flags, width and precision are left out.
void Machine::format(std::string_view pattern, std::span<const std::uint64_t> values) {
    std::string out;
    for (std::size_t i = 0; i < pattern.size(); ++i) {
        if (pattern[i] != '%') {
            out += pattern[i];
            continue;
        }
        const std::size_t last = pattern.find_first_of("diuxXopcs%", i + 1);
        if (last == std::string_view::npos)
            return fail(AgentError::bad_code);
        const bool whole = pattern.substr(i, last - i).find('l') != std::string_view::npos;
        const char kind = pattern[last];
        i = last;
        if (kind == '%') {
            out += '%';
            continue;
        }
        if (values.empty())
            return fail(AgentError::stack);
        const std::uint64_t value =
            whole || kind == 'p' || kind == 's' ? values.front() : static_cast<std::uint32_t>(values.front());
        const std::int64_t with_sign =
            whole ? sign(value) : std::int64_t{static_cast<std::int32_t>(static_cast<std::uint32_t>(value))};
        values = values.subspan(1);
        switch (kind) {
        case 'd':
        case 'i':
            out += fmt::format("{}", with_sign);
            break;
        case 'u':
            out += fmt::format("{}", value);
            break;
        case 'x':
            out += fmt::format("{:x}", value);
            break;
        case 'X':
            out += fmt::format("{:X}", value);
            break;
        case 'o':
            out += fmt::format("{:o}", value);
            break;
        case 'p':
            out += fmt::format("{:#x}", value);
            break;
        case 'c':
            out += static_cast<char>(value);
            break;
        case 's':
            out += text_at(GuestVirt(value));
            break;
        default: // find_first_of gives no other
            break;
        }
    }
    context_.print(out);
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
        (void)cursor.take(';');
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
