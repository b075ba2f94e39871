// Unit tests of vmm/debug/agent.hpp.
#include "vmm/debug/agent.hpp"

#include <array>
#include <chrono>
#include <concepts>
#include <initializer_list>
#include <map>
#include <set>
#include <string>

#include <gtest/gtest.h>

namespace umbra {
namespace {

using namespace std::string_literals;
using Code = std::vector<unsigned>;

/// The operations by their names in the manual, each with its code there.
enum : unsigned {
    op_add = 0x02,
    op_sub = 0x03,
    op_mul = 0x04,
    op_div_signed = 0x05,
    op_div_unsigned = 0x06,
    op_rem_signed = 0x07,
    op_rem_unsigned = 0x08,
    op_lsh = 0x09,
    op_rsh_signed = 0x0a,
    op_rsh_unsigned = 0x0b,
    op_trace = 0x0c,
    op_trace_quick = 0x0d,
    op_log_not = 0x0e,
    op_bit_and = 0x0f,
    op_bit_or = 0x10,
    op_bit_xor = 0x11,
    op_bit_not = 0x12,
    op_equal = 0x13,
    op_less_signed = 0x14,
    op_less_unsigned = 0x15,
    op_ext = 0x16,
    op_ref8 = 0x17,
    op_ref16 = 0x18,
    op_ref32 = 0x19,
    op_ref64 = 0x1a,
    op_if_goto = 0x20,
    op_goto = 0x21,
    op_const8 = 0x22,
    op_const16 = 0x23,
    op_const32 = 0x24,
    op_const64 = 0x25,
    op_reg = 0x26,
    op_end = 0x27,
    op_dup = 0x28,
    op_pop = 0x29,
    op_zero_ext = 0x2a,
    op_swap = 0x2b,
    op_trace16 = 0x30,
    op_pick = 0x32,
    op_rot = 0x33,
    op_printf = 0x34,
};

constexpr std::uint64_t memory_at = 0xffff'8000'0000'1000;

/// 16 registers, 64 bytes and a text.
class Context : public AgentContext {
  public:
    std::optional<std::uint64_t> read_register(unsigned number) override {
        if (number >= 16)
            return std::nullopt;
        return number == 3 ? 0xffff'ffff'ffff'fff0 : 0x1000 + number;
    }
    bool read_memory(GuestVirt at, std::span<std::byte> into) override {
        ++reads;
        const std::uint64_t offset = at - GuestVirt(memory_at);
        if (offset >= memory.size() || into.size() > memory.size() - offset)
            return false;
        for (std::size_t i = 0; i < into.size(); ++i)
            into[i] = std::byte{static_cast<std::uint8_t>(memory[offset + i])};
        return true;
    }
    void print(std::string_view text) override {
        printed += text;
        ++prints;
    }

    std::string memory = "\x80\x91\xa2\xb3\xc4\xd5\xe6\xf7hello\0"s + std::string(50, 'z');
    std::string printed;
    unsigned prints = 0, reads = 0;
};

AgentExpression expression(const Code& code) {
    AgentExpression made;
    for (const unsigned byte : code)
        made.code.push_back(static_cast<std::byte>(byte));
    return made;
}

/// const64, which every value fits.
template<std::integral Value>
Code number(Value value) {
    Code code{op_const64};
    for (unsigned shift = 64; shift != 0; shift -= 8)
        code.push_back(static_cast<unsigned>(static_cast<std::uint64_t>(value) >> (shift - 8) & 0xff));
    return code;
}

Code joined(std::initializer_list<Code> parts) {
    Code all;
    for (const Code& part : parts)
        all.insert(all.end(), part.begin(), part.end());
    return all;
}

AgentResult run(const Code& code) {
    Context context;
    return evaluate(expression(code), context);
}
/// What is left on top after `left`, `right` and the operation.
template<class Left, class Right>
AgentResult two(Left left, Right right, unsigned op) {
    return run(joined({number(left), number(right), {op, op_end}}));
}
template<class Value>
AgentResult one(Value value, const Code& ops) {
    return run(joined({number(value), ops, {op_end}}));
}

AgentResult value(std::int64_t number) {
    return number;
}
AgentResult bits(std::uint64_t number) {
    return static_cast<std::int64_t>(number);
}
constexpr std::uint64_t top_bit = std::uint64_t{1} << 63;

TEST(GdbAgent, Arithmetic) {
    EXPECT_EQ(two(7, 5, op_add), value(12));
    EXPECT_EQ(two(~std::uint64_t{0}, 1, op_add), value(0));
    EXPECT_EQ(two(7, 5, op_sub), value(2));
    EXPECT_EQ(two(5, 7, op_sub), value(-2));
    EXPECT_EQ(two(-3, 5, op_mul), value(-15));
    EXPECT_EQ(two(top_bit, 2, op_mul), value(0));
    EXPECT_EQ(two(-7, 2, op_div_signed), value(-3));
    EXPECT_EQ(two(-7, -1, op_div_signed), value(7));
    EXPECT_EQ(two(-7, 2, op_div_unsigned), bits((~std::uint64_t{0} - 6) / 2));
    EXPECT_EQ(two(-7, 2, op_rem_signed), value(-1));
    EXPECT_EQ(two(7, -2, op_rem_signed), value(1));
    EXPECT_EQ(two(-7, 10, op_rem_unsigned), bits((~std::uint64_t{0} - 6) % 10));
}

TEST(GdbAgent, Division) {
    for (const unsigned op : {op_div_signed, op_div_unsigned, op_rem_signed, op_rem_unsigned}) {
        EXPECT_EQ(two(1, 0, op), AgentResult(AgentError::division)) << op;
        EXPECT_EQ(two(0, 0, op), AgentResult(AgentError::division)) << op;
        EXPECT_EQ(one(1, {op}), AgentResult(AgentError::stack)) << op;
    }
    // The quotient that does not fit wraps; as unsigned numbers the same are ordinary.
    EXPECT_EQ(two(top_bit, -1, op_div_signed), bits(top_bit));
    EXPECT_EQ(two(top_bit, -1, op_rem_signed), value(0));
    EXPECT_EQ(two(top_bit, -1, op_div_unsigned), value(0));
    EXPECT_EQ(two(top_bit, -1, op_rem_unsigned), bits(top_bit));
}

TEST(GdbAgent, BitsAndShifts) {
    EXPECT_EQ(two(0b1100, 0b1010, op_bit_and), value(0b1000));
    EXPECT_EQ(two(0b1100, 0b1010, op_bit_or), value(0b1110));
    EXPECT_EQ(two(0b1100, 0b1010, op_bit_xor), value(0b0110));
    EXPECT_EQ(one(5, {op_bit_not}), value(-6));
    EXPECT_EQ(one(0, {op_log_not}), value(1));
    EXPECT_EQ(one(1, {op_log_not}), value(0));
    EXPECT_EQ(one(top_bit, {op_log_not}), value(0));
    EXPECT_EQ(two(3, 4, op_lsh), value(48));
    EXPECT_EQ(two(1, 63, op_lsh), bits(top_bit));
    EXPECT_EQ(two(top_bit, 63, op_rsh_unsigned), value(1));
    EXPECT_EQ(two(top_bit, 63, op_rsh_signed), value(-1));
    EXPECT_EQ(two(-256, 4, op_rsh_signed), value(-16));
    EXPECT_EQ(two(-256, 4, op_rsh_unsigned), bits(0x0fff'ffff'ffff'fff0));
    // All bits are shifted out by as many as there are, or more.
    for (const std::uint64_t by : {std::uint64_t{64}, std::uint64_t{65}, std::uint64_t{256}, top_bit}) {
        EXPECT_EQ(two(-1, by, op_lsh), value(0)) << by;
        EXPECT_EQ(two(-1, by, op_rsh_unsigned), value(0)) << by;
        EXPECT_EQ(two(-2, by, op_rsh_signed), value(-1)) << by;
        EXPECT_EQ(two(2, by, op_rsh_signed), value(0)) << by;
    }
}

TEST(GdbAgent, Comparisons) {
    EXPECT_EQ(two(3, 3, op_equal), value(1));
    EXPECT_EQ(two(3, 4, op_equal), value(0));
    EXPECT_EQ(two(0x1'0000'0000, 0, op_equal), value(0));
    EXPECT_EQ(two(-1, 1, op_less_signed), value(1));
    EXPECT_EQ(two(1, -1, op_less_signed), value(0));
    EXPECT_EQ(two(1, 1, op_less_signed), value(0));
    EXPECT_EQ(two(-1, 1, op_less_unsigned), value(0));
    EXPECT_EQ(two(1, -1, op_less_unsigned), value(1));
    EXPECT_EQ(two(1, 1, op_less_unsigned), value(0));
}

TEST(GdbAgent, Extending) {
    EXPECT_EQ(one(0x80, {op_ext, 8}), value(-128));
    EXPECT_EQ(one(0x7f, {op_ext, 8}), value(127));
    EXPECT_EQ(one(0x1234'567f, {op_ext, 8}), value(127));
    EXPECT_EQ(one(0x8000'0000, {op_ext, 32}), value(-0x8000'0000LL));
    EXPECT_EQ(one(0x1'7fff'ffff, {op_ext, 32}), value(0x7fff'ffff));
    EXPECT_EQ(one(1, {op_ext, 1}), value(-1));
    EXPECT_EQ(one(top_bit >> 1, {op_ext, 63}), bits(top_bit | top_bit >> 1));
    EXPECT_EQ(one(-1, {op_zero_ext, 8}), value(0xff));
    EXPECT_EQ(one(-1, {op_zero_ext, 1}), value(1));
    EXPECT_EQ(one(-1, {op_zero_ext, 63}), bits(~top_bit));
    EXPECT_EQ(one(-1, {op_zero_ext, 0}), value(0));
    for (const unsigned wide : {64U, 65U, 128U, 255U}) { // no effect
        EXPECT_EQ(one(top_bit | 5, {op_ext, wide}), bits(top_bit | 5)) << wide;
        EXPECT_EQ(one(top_bit | 5, {op_zero_ext, wide}), bits(top_bit | 5)) << wide;
    }
    EXPECT_EQ(one(1, {op_ext, 0}), AgentResult(AgentError::bad_code));
    EXPECT_EQ(run({op_ext, 8, op_end}), AgentResult(AgentError::stack));
}

TEST(GdbAgent, Constants) {
    EXPECT_EQ(run({op_const8, 0xff, op_end}), value(0xff)); // no sign
    EXPECT_EQ(run({op_const16, 0xff, 0xfe, op_end}), value(0xfffe));
    EXPECT_EQ(run({op_const32, 0x80, 1, 2, 3, op_end}), value(0x8001'0203));
    EXPECT_EQ(run({op_const64, 0x80, 1, 2, 3, 4, 5, 6, 7, op_end}), bits(0x8001'0203'0405'0607));
    EXPECT_EQ(run({op_const8, 0xff, op_ext, 8, op_end}), value(-1));
}

TEST(GdbAgent, Registers) {
    EXPECT_EQ(run({op_reg, 0, 5, op_end}), value(0x1005));
    EXPECT_EQ(run({op_reg, 0, 3, op_end}), bits(0xffff'ffff'ffff'fff0));
    EXPECT_EQ(run({op_reg, 0, 16, op_end}), AgentResult(AgentError::registers));
    EXPECT_EQ(run({op_reg, 1, 5, op_end}), AgentResult(AgentError::registers)); // two bytes of number
}

TEST(GdbAgent, Memory) {
    const auto ref = [](std::uint64_t offset, unsigned op) { return one(memory_at + offset, {op}); };
    EXPECT_EQ(ref(0, op_ref8), value(0x80)); // no sign
    EXPECT_EQ(ref(0, op_ref16), value(0x9180));
    EXPECT_EQ(ref(0, op_ref32), value(0xb3a2'9180));
    EXPECT_EQ(ref(0, op_ref64), bits(0xf7e6'd5c4'b3a2'9180));
    EXPECT_EQ(ref(3, op_ref32), value(0xe6d5'c4b3)); // aligned to nothing
    EXPECT_EQ(ref(63, op_ref8), value('z'));
    for (const unsigned op : {op_ref8, op_ref16, op_ref32, op_ref64}) {
        EXPECT_EQ(ref(64, op), AgentResult(AgentError::memory)) << op;
        EXPECT_EQ(ref(~std::uint64_t{0}, op), AgentResult(AgentError::memory)) << op;
        EXPECT_EQ(run({op, op_end}), AgentResult(AgentError::stack)) << op;
    }
    EXPECT_EQ(ref(63, op_ref16), AgentResult(AgentError::memory));
    EXPECT_EQ(ref(61, op_ref32), AgentResult(AgentError::memory));
    EXPECT_EQ(ref(57, op_ref64), AgentResult(AgentError::memory));
}

TEST(GdbAgent, TheStack) {
    const Code three = joined({number(1), number(2), number(3)}); // 3 on top
    // All of the stack, the top in the lowest digit.
    const auto digits = [&](const Code& ops, unsigned count) {
        Code code = joined({three, ops});
        std::uint64_t all = 0, scale = 1;
        for (unsigned i = 0; i < count; ++i, scale *= 10) {
            Code popped = code;
            popped.insert(popped.end(), i, op_pop);
            popped.push_back(op_end);
            all += static_cast<std::uint64_t>(std::get<std::int64_t>(run(popped))) * scale;
        }
        code.insert(code.end(), count + 1, op_pop);
        code.push_back(op_end);
        EXPECT_EQ(run(code), AgentResult(AgentError::stack)); // no more than `count`
        return all;
    };
    EXPECT_EQ(digits({}, 3), 123U);
    EXPECT_EQ(digits({op_dup}, 4), 1233U);
    EXPECT_EQ(digits({op_pop}, 2), 12U);
    EXPECT_EQ(digits({op_swap}, 3), 132U);
    EXPECT_EQ(digits({op_rot}, 3), 312U);
    EXPECT_EQ(digits({op_rot, op_rot, op_rot}, 3), 123U);
    EXPECT_EQ(digits({op_pick, 0}, 4), 1233U);
    EXPECT_EQ(digits({op_pick, 1}, 4), 1232U);
    EXPECT_EQ(digits({op_pick, 2}, 4), 1231U);
    for (const unsigned deep : {3U, 4U, 255U})
        EXPECT_EQ(run(joined({three, {op_pick, deep, op_end}})), AgentResult(AgentError::stack)) << deep;
    EXPECT_EQ(one(1, {op_swap}), AgentResult(AgentError::stack));
    EXPECT_EQ(run(joined({number(1), number(2), {op_rot, op_end}})), AgentResult(AgentError::stack));
    EXPECT_EQ(run({op_dup, op_end}), AgentResult(AgentError::stack));
    EXPECT_EQ(run({op_end}), value(0)); // nothing on it
}

TEST(GdbAgent, EveryOperationNeedsItsOperands) {
    const std::map<unsigned, unsigned> wanted{
        {op_add, 2},          {op_sub, 2},          {op_mul, 2},           {op_div_signed, 2},
        {op_div_unsigned, 2}, {op_rem_signed, 2},   {op_rem_unsigned, 2},  {op_lsh, 2},
        {op_rsh_signed, 2},   {op_rsh_unsigned, 2}, {op_trace, 2},         {op_log_not, 1},
        {op_bit_and, 2},      {op_bit_or, 2},       {op_bit_xor, 2},       {op_bit_not, 1},
        {op_equal, 2},        {op_less_signed, 2},  {op_less_unsigned, 2}, {op_dup, 1},
        {op_pop, 1},          {op_swap, 2},         {op_rot, 3},
    };
    for (const auto& [op, count] : wanted) {
        for (unsigned given = 0; given <= count; ++given) {
            Code code;
            for (unsigned i = 0; i < given; ++i)
                code.insert(code.end(), {op_const8, 1});
            code.insert(code.end(), {op, op_end});
            EXPECT_EQ(std::holds_alternative<std::int64_t>(run(code)), given == count) << op << ' ' << given;
            if (given < count) {
                EXPECT_EQ(run(code), AgentResult(AgentError::stack)) << op << ' ' << given;
            }
        }
    }
}

TEST(GdbAgent, TheStackIsBounded) {
    Code full;
    for (unsigned i = 0; i < agent_stack; ++i)
        full.insert(full.end(), {op_const8, i});
    EXPECT_EQ(run(joined({full, {op_end}})), value(agent_stack - 1));
    EXPECT_EQ(run(joined({full, {op_swap, op_rot, op_log_not, op_end}})), value(0));
    for (const Code& more :
         {Code{op_const8, 1}, Code{op_dup}, Code{op_pick, 0}, Code{op_reg, 0, 1}, Code{op_const16, 0, 1}})
        EXPECT_EQ(run(joined({full, more, {op_end}})), AgentResult(AgentError::stack)) << more[0];
    EXPECT_EQ(run({op_const8, 1, op_dup, op_goto, 0, 2}), AgentResult(AgentError::stack));
}

TEST(GdbAgent, TracingIsDropped) {
    EXPECT_EQ(run(joined({number(5), number(memory_at), number(8), {op_trace, op_end}})), value(5));
    EXPECT_EQ(one(memory_at, {op_trace_quick, 8}), bits(memory_at));
    EXPECT_EQ(one(memory_at, {op_trace16, 1, 0}), bits(memory_at));
    EXPECT_EQ(run({op_trace_quick, 8, op_end}), AgentResult(AgentError::stack));
    EXPECT_EQ(run({op_trace16, 0, 8, op_end}), AgentResult(AgentError::stack));
    EXPECT_EQ(one(memory_at, {op_trace16, 1}), AgentResult(AgentError::bad_code));
}

TEST(GdbAgent, Jumps) {
    const auto choose = [](unsigned condition) {
        return run({op_const8, condition, op_if_goto, 0, 8, op_const8, 10, op_end, op_const8, 20, op_end});
    };
    EXPECT_EQ(choose(0), value(10));
    EXPECT_EQ(choose(1), value(20));
    EXPECT_EQ(choose(0x80), value(20));
    // All bits of the condition count; it is taken off the stack.
    EXPECT_EQ(run(joined({number(0x1'0000'0000), {op_if_goto, 0, 13, op_end, op_const8, 3, op_end}})),
              value(3));
    EXPECT_EQ(run({op_const8, 1, op_if_goto, 0, 5, op_end}), value(0));
    EXPECT_EQ(run({op_goto, 0, 6, op_const8, 1, op_end, op_const8, 2, op_end}), value(2));
    // A countdown: 5 4 3 2 1 0
    EXPECT_EQ(run({op_const8, 5, op_const8, 1, op_sub, op_dup, op_if_goto, 0, 2, op_const8, 7, op_end}),
              value(7));

    EXPECT_EQ(run({op_goto, 0, 4, op_end}), AgentResult(AgentError::bad_code)); // just behind the end
    EXPECT_EQ(run({op_goto, 0xff, 0xff, op_end}), AgentResult(AgentError::bad_code));
    EXPECT_EQ(run({op_goto, 1, 3, op_end}), AgentResult(AgentError::bad_code)); // both bytes count
    EXPECT_EQ(run({op_const8, 1, op_if_goto, 0, 99, op_end}), AgentResult(AgentError::bad_code));
    EXPECT_EQ(run({op_const8, 0, op_if_goto, 0, 99, op_end}), value(0)); // not taken
    EXPECT_EQ(run({op_if_goto, 0, 3, op_end}), AgentResult(AgentError::stack));
    EXPECT_EQ(run({op_goto, 0, 2}), AgentResult(AgentError::stack)); // into an operand, which reads as `add`
}

TEST(GdbAgent, EndlessLoopsEnd) {
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(run({op_goto, 0, 0}), AgentResult(AgentError::too_long));
    EXPECT_EQ(run({op_const8, 1, op_if_goto, 0, 0}), AgentResult(AgentError::too_long));
    EXPECT_EQ(run(joined({number(memory_at), {op_dup, op_ref64, op_pop, op_goto, 0, 9}})),
              AgentResult(AgentError::too_long));
    // As many steps as are allowed: const8 and pop in turn, and the end.
    Code code;
    for (unsigned i = 0; i + 2 < agent_steps; i += 2)
        code.insert(code.end(), {op_const8, 1, op_pop});
    EXPECT_EQ(run(joined({code, {op_const8, 9, op_end}})), value(9));
    EXPECT_EQ(run(joined({code, {op_const8, 9, op_log_not, op_end}})), AgentResult(AgentError::too_long));
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST(GdbAgent, CutOffOrUnknownCode) {
    const Code whole = joined({number(1), number(2), {op_add, op_ext, 8, op_if_goto, 0, 26, op_end}});
    ASSERT_EQ(run(whole), AgentResult(AgentError::bad_code)); // the jump
    for (std::size_t size = 0; size < whole.size(); ++size)
        EXPECT_EQ(run(Code(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size))),
                  AgentResult(AgentError::bad_code))
            << size;
    for (const unsigned op : {op_const8, op_const16, op_const32, op_const64, op_reg, op_goto, op_printf}) {
        EXPECT_EQ(run({op}), AgentResult(AgentError::bad_code)) << op;
        if (op != op_const8) {
            EXPECT_EQ(run({op, 0}), AgentResult(AgentError::bad_code)) << op;
        }
    }
    std::set<unsigned> known{op_trace16, op_pick, op_rot, op_printf};
    for (unsigned op = op_add; op <= op_ref64; ++op)
        known.insert(op);
    for (unsigned op = op_if_goto; op <= op_swap; ++op)
        known.insert(op);
    // Unknown are floating point and, as there are no tracepoints, their variables.
    for (unsigned op = 0; op < 0x100; ++op) {
        if (!known.contains(op)) {
            EXPECT_EQ(run(joined({number(1), number(1), number(1), {op, 0, 0, op_end}})),
                      AgentResult(AgentError::bad_code))
                << op;
        }
    }
}

// --- printf

/// The format and its values, the first one first, as gdb compiles them.
Code print(std::string_view format, std::initializer_list<std::uint64_t> values = {}) {
    Code code;
    for (const auto* at = values.end(); at != values.begin();) {
        const Code pushed = number(*--at);
        code.insert(code.end(), pushed.begin(), pushed.end());
    }
    const std::size_t length = format.size() + 1;
    code.insert(code.end(), {op_const8, 0, op_const8, 0, op_printf, static_cast<unsigned>(values.size()),
                             static_cast<unsigned>(length >> 8), static_cast<unsigned>(length & 0xff)});
    for (const char character : format)
        code.push_back(static_cast<std::uint8_t>(character));
    code.insert(code.end(), {0, op_end});
    return code;
}

std::string printed(std::string_view format, std::initializer_list<std::uint64_t> values = {}) {
    Context context;
    EXPECT_EQ(evaluate(expression(print(format, values)), context), value(0)) << format;
    EXPECT_EQ(context.prints, 1U) << format;
    return context.printed;
}

TEST(GdbAgent, PrintfOfNumbers) {
    constexpr std::uint64_t minus = ~std::uint64_t{0};
    EXPECT_EQ(printed("plain"), "plain");
    EXPECT_EQ(printed(""), "");
    EXPECT_EQ(printed("%d %i", {5, minus}), "5 -1");
    EXPECT_EQ(printed("%d|%u|%x", {0x1'ffff'fffe, 0x1'ffff'fffe, 0x1'ffff'fffe}), "-2|4294967294|fffffffe");
    EXPECT_EQ(printed("%x %X %o", {0xbeef, 0xbeef, 8}), "beef BEEF 10");
    EXPECT_EQ(printed("%ld %lu %lx", {minus, minus, minus}), "-1 18446744073709551615 ffffffffffffffff");
    EXPECT_EQ(printed("%lld %llx", {top_bit, top_bit}), "-9223372036854775808 8000000000000000");
    EXPECT_EQ(printed("%zu %jd", {minus, minus}), "18446744073709551615 -1");
    EXPECT_EQ(printed("%hd %hu %hhx", {0x1'8000, 0x1'8000, 0x1ff}), "-32768 32768 ff");
    EXPECT_EQ(printed("%p %p", {0xffff'8000'0000'0000, 0}), "0xffff800000000000 0x0");
    EXPECT_EQ(printed("%c%c%c", {'o', 'k', 0x1'0021}), "ok!");
    EXPECT_EQ(printed("%c", {0}), "\0"s);
    EXPECT_EQ(printed("100%% %d%%", {1}), "100% 1%");
}

TEST(GdbAgent, PrintfOfFlagsAndWidths) {
    EXPECT_EQ(printed("%08x|%8x|%-8x|", {0xbeef, 0xbeef, 0xbeef}), "0000beef|    beef|beef    |");
    EXPECT_EQ(printed("%016lx", {0x1234'5678'9abc}), "0000123456789abc");
    EXPECT_EQ(printed("%#x %#o %+d % d", {255, 8, 5, 5}), "0xff 010 +5  5");
    EXPECT_EQ(printed("%.3d|%5.2d|%3c|%-3c|", {7, 7, 'a', 'b'}), "007|   07|  a|b  |");
    EXPECT_EQ(printed("%10s|%-10s|%.2s", {memory_at + 8, memory_at + 8, memory_at + 8}),
              "     hello|hello     |he");
    EXPECT_EQ(printed("%12p|", {0xf000}), "      0xf000|");
    EXPECT_EQ(printed("%999d", {1}), std::string(998, ' ') + "1");
}

TEST(GdbAgent, PrintfOfStrings) {
    EXPECT_EQ(printed("<%s>", {memory_at + 8}), "<hello>");
    EXPECT_EQ(printed("<%s>", {memory_at + 13}), "<>");
    EXPECT_EQ(printed("<%s>", {memory_at + 60}), "<zzzz>"); // until there is no memory
    EXPECT_EQ(printed("<%s>", {1}), "<>");
    EXPECT_EQ(printed("<%s>", {0}), "<(null)>"); // as gdb itself
    // No more is read than is printed.
    Context context;
    EXPECT_EQ(
        evaluate(expression(print("%.4s%.0s%.s", {memory_at + 20, memory_at + 20, memory_at + 20})), context),
        value(0));
    EXPECT_EQ(context.printed, "zzzz");
    EXPECT_EQ(context.reads, 4U);
    // A text that does not end is cut off.
    context.memory.assign(0x10000, 'y');
    EXPECT_EQ(evaluate(expression(print("%s", {memory_at})), context), value(0));
    EXPECT_EQ(context.printed.substr(4), std::string(1024, 'y'));
}

TEST(GdbAgent, PrintfOfEscapes) {
    EXPECT_EQ(printed(R"(a\tb\n)"), "a\tb\n");
    EXPECT_EQ(printed(R"(\a\b\e\f\n\r\t\v)"), "\a\b\x1b\f\n\r\t\v");
    EXPECT_EQ(printed(R"(\\ \" \')"), R"(\ " ')");
    EXPECT_EQ(printed(R"(\101\7\0601\33[m)"), "A\a01\x1b[m"); // of up to three digits
    EXPECT_EQ(printed(R"(\0)"), "\0"s);
    EXPECT_EQ(printed("ends\\"), "ends\\");
    EXPECT_EQ(printed(R"(\n%d\n)", {7}), "\n7\n");
}

TEST(GdbAgent, PrintfThatFailsPrintsNothing) {
    const auto fails = [](const Code& code, AgentError error) {
        Context context;
        EXPECT_EQ(evaluate(expression(code), context), AgentResult(error));
        EXPECT_EQ(context.prints, 0U);
    };
    fails(print("%d"), AgentError::stack); // missing values
    fails(print("%d %d", {1}), AgentError::stack);
    fails(print("%s"), AgentError::stack);
    for (const char* bad : {"%", "50%", "%l", "%5", "%-", "%f", "%e", "%n", "%*d", "%y", "%hello %d",
                            "%1234d", "%.1234d", "%.-1d", "%lllx", "%        d"})
        fails(print(bad, {1, 2}), AgentError::bad_code);
    fails({op_const8, 0, op_const8, 0, op_printf, 1, 0, 2, 'a', 0, op_end}, AgentError::stack);
    fails({op_const8, 0, op_printf, 0, 0, 2, 'a', 0, op_end}, AgentError::stack); // no channel
    fails({op_const8, 0, op_const8, 0, op_printf, 0, 0, 2, 'a', 'b', op_end}, AgentError::bad_code); // no NUL
    fails({op_const8, 0, op_const8, 0, op_printf, 0, 0, 0, op_end}, AgentError::bad_code); // not even a NUL
    fails({op_const8, 0, op_const8, 0, op_printf, 0, 0, 9, 'a', 0, op_end}, AgentError::bad_code);
    fails({op_const8, 0, op_const8, 0, op_printf, 0, 0, 1}, AgentError::bad_code);
    fails({op_const8, 0, op_const8, 0, op_printf, 0, 0}, AgentError::bad_code);
    fails({op_const8, 0, op_const8, 0, op_printf, 255, 0, 1, 0, op_end}, AgentError::stack);
}

TEST(GdbAgent, PrintfTakesItsValuesOnly) {
    Context context;
    Code code = joined({number(42), print("%d", {7})});
    EXPECT_EQ(evaluate(expression(code), context), value(42));
    EXPECT_EQ(context.printed, "7");
    // More values than conversions, and code behind the format.
    code = print("%d\\n", {1, 2});
    code.pop_back();
    code.insert(code.end(), {op_const8, 9, op_end});
    EXPECT_EQ(evaluate(expression(code), context), value(9));
    EXPECT_EQ(context.printed, "71\n");
}

TEST(GdbAgent, WhatIsPrintedIsBounded) {
    Context context;
    Code loop = print(std::string(5000, 'x'));
    loop.pop_back();
    loop.insert(loop.end(), {op_goto, 0, 0});
    EXPECT_EQ(evaluate(expression(loop), context), AgentResult(AgentError::too_long));
    EXPECT_EQ(context.printed.size(), agent_text / 5000 * 5000);
    // As much as one format can be.
    const std::string longest(0xfffe, 'x');
    EXPECT_EQ(printed(longest), longest);
}

// --- Packets

std::optional<std::string> codes(const std::vector<AgentExpression>& expressions) {
    std::string text;
    for (const AgentExpression& one : expressions) {
        for (const std::byte byte : one.code)
            text += fmt::format("{:02x}", std::to_integer<unsigned>(byte));
        text += ';';
    }
    return text;
}

TEST(GdbAgent, PointLists) {
    const auto lists = [](std::string_view text) {
        const auto parsed = parse_point_lists(text);
        EXPECT_TRUE(parsed) << text;
        return parsed.value_or(PointLists());
    };
    EXPECT_TRUE(lists("").conditions.empty());
    EXPECT_TRUE(lists("").commands.empty());
    EXPECT_EQ(codes(lists(";X3,220127").conditions), "220127;");
    EXPECT_EQ(codes(lists(";X3,220127X1,27").conditions), "220127;27;");    // as gdb sends them
    EXPECT_EQ(codes(lists(";X 3,220127;X 1,27").conditions), "220127;27;"); // as the manual writes them
    EXPECT_EQ(codes(lists(";Xa,22012201220122012701").conditions), "22012201220122012701;");
    EXPECT_EQ(codes(lists(";XA,22012201220122012701").conditions), "22012201220122012701;");
    EXPECT_EQ(codes(lists(";X3,2201FF").conditions), "2201ff;");
    EXPECT_EQ(codes(lists(";X0,").conditions), ";");
    const PointLists commands = lists(";cmds:0,X3,220127X1,27");
    EXPECT_EQ(codes(commands.commands), "220127;27;");
    EXPECT_TRUE(commands.conditions.empty());
    const PointLists both = lists(";X1,27;cmds:1,X2,2227");
    EXPECT_EQ(codes(both.conditions), "27;");
    EXPECT_EQ(codes(both.commands), "2227;");
}

TEST(GdbAgent, DamagedPointLists) {
    for (const char* text : {";",
                             ";;",
                             ";X",
                             ";X3",
                             ";X3,",
                             ";X,27",
                             ";X3,2201",
                             ";X3,22012",
                             ";X3,22012g",
                             ";X1,2701",
                             ";X1,27;",
                             ";X1,27 ",
                             ";Y1,27",
                             "X1,27",
                             "27",
                             ";x1,27",
                             ";X-1,27",
                             ";X0x1,27",
                             ";Xffffffffffffffff,27",
                             ";X10000000000000000,27",
                             ";X8000000000000000,",
                             ";cmds",
                             ";cmds:",
                             ";cmds:1",
                             ";cmds:1,",
                             ";cmds:,X1,27",
                             ";cmds:z,X1,27",
                             ";cmds:1X1,27",
                             ";cmds:1,X2,27",
                             "cmds:1,X1,27",
                             ";X1,27cmds:1,X1,27",
                             ";X1,27;;X1,27"})
        EXPECT_FALSE(parse_point_lists(text)) << text;
}

} // namespace
} // namespace umbra
