// Fuzzes agent expressions (vmm/debug/agent.hpp), which come from the client as bytes. Whatever they are, an
// evaluation ends, costs the guest a bounded number of accesses, prints a bounded text and means the same
// each time; lists of them come back from the packet that holds them.
#include "tests/fuzz/harness.hpp"
#include "vmm/debug/agent.hpp"
#include "vmm/debug/packet.hpp"

#include <string>

namespace umbra::fuzz {
namespace {

/// A few registers, and memory of one page with text at its end.
class Context : public AgentContext {
  public:
    static constexpr GuestVirt memory{0x1000};

    std::optional<std::uint64_t> read_register(unsigned number) override {
        if (number >= 16)
            return std::nullopt;
        return memory.value() + std::uint64_t{number} * 0x111;
    }
    bool read_memory(GuestVirt at, std::span<std::byte> into) override {
        ++reads;
        check(!into.empty() && into.size() <= sizeof(std::uint64_t), "{} bytes are no operand", into.size());
        const std::uint64_t offset = at - memory;
        if (offset >= page_size || into.size() > page_size - offset)
            return false;
        for (std::size_t i = 0; i < into.size(); ++i)
            into[i] = static_cast<std::byte>(offset + i < page_size / 2 ? offset + i : 'a');
        return true;
    }
    void print(std::string_view text) override { printed += text; }

    std::string printed;
    std::size_t reads = 0;
};

void check_evaluation(const AgentExpression& expression) {
    Context context;
    const AgentResult result = evaluate(expression, context);
    // A step reads once, and printing reads what is printed and where it ends; the last text, which may have
    // been too long, was not printed.
    constexpr std::size_t longest_string = 1024;
    check(context.printed.size() <= agent_text, "{} bytes were printed", context.printed.size());
    check(context.reads <= std::size_t{2} * agent_steps + agent_text + longest_string, "{} reads",
          context.reads);
    Context again;
    check(evaluate(expression, again) == result && again.printed == context.printed &&
              again.reads == context.reads,
          "an expression means the same each time");
    if (const auto* value = std::get_if<std::int64_t>(&result))
        trace("{:#x}, {} reads, '{}'", *value, context.reads, context.printed);
    else
        trace("error {}, {} reads", static_cast<int>(std::get<AgentError>(result)), context.reads);
}

std::string text_of(const std::vector<AgentExpression>& expressions) {
    std::string text;
    for (const AgentExpression& expression : expressions)
        text += fmt::format("X{:x},{}", expression.code.size(), to_hex(expression.code));
    return text;
}

/// As gdb writes them.
std::string text_of(const PointLists& lists) {
    std::string text;
    if (!lists.conditions.empty())
        text += ";" + text_of(lists.conditions);
    if (!lists.commands.empty())
        text += ";cmds:0," + text_of(lists.commands);
    return text;
}

void check_lists(const PointLists& lists) {
    const auto back = parse_point_lists(text_of(lists));
    check(back && back->conditions == lists.conditions && back->commands == lists.commands,
          "lists come back from their text");
    for (const auto* list : {&lists.conditions, &lists.commands}) {
        for (const AgentExpression& expression : *list)
            check_evaluation(expression);
    }
}

} // namespace
} // namespace umbra::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace umbra;
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    if (const auto lists = parse_point_lists(text)) {
        fuzz::check_lists(*lists);
        std::size_t bytes = 0;
        for (const auto* list : {&lists->conditions, &lists->commands}) {
            for (const AgentExpression& expression : *list)
                bytes += expression.code.size();
        }
        fuzz::check(bytes * 2 <= size, "no code comes from nowhere");
    }
    AgentExpression expression;
    const auto code = std::as_bytes(std::span(data, size));
    expression.code.assign(code.begin(), code.end());
    fuzz::check_evaluation(expression);
    fuzz::check_lists({{expression, {}}, {expression}});
    return 0;
}
