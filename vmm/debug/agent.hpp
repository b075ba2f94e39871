// Agent expressions: what gdb compiles the conditions of breakpoints to, so that they are evaluated here and
// a breakpoint whose condition does not hold costs no conversation.
//
// GDB manual, appendix "The GDB Agent Expression Mechanism". Expressions come from the client: everything
// about them is checked and bounded.
#pragma once

#include "shadow/address.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace umbra {

struct AgentExpression {
    std::vector<std::byte> code;

    bool operator==(const AgentExpression&) const = default;
};

/// What an expression may see of the guest.
class AgentContext {
  public:
    AgentContext() = default;
    AgentContext(const AgentContext&) = delete;
    AgentContext(AgentContext&&) = delete;
    AgentContext& operator=(const AgentContext&) = delete;
    AgentContext& operator=(AgentContext&&) = delete;
    virtual ~AgentContext() = default;

    /// By the numbers of the target description; nothing: no such register, or one of more than 64 bits.
    [[nodiscard]] virtual std::optional<std::uint64_t> read_register(unsigned number) = 0;
    /// False if any of it cannot be read.
    [[nodiscard]] virtual bool read_memory(GuestVirt at, std::span<std::byte> into) = 0;
    virtual void print(std::string_view text) = 0;
};

enum class AgentError : std::uint8_t {
    bad_code,  ///< an unknown operation, or one cut off, or a jump to nowhere
    stack,     ///< too little on it, or too much
    too_long,  ///< more steps than agent_steps, or more text than agent_text
    division,  ///< by zero
    memory,    ///< not there
    registers, ///< no such register
};

inline constexpr unsigned agent_steps = 10'000, agent_stack = 100;
inline constexpr std::size_t agent_text = 0x10000; ///< bytes that one evaluation may print

/// The value on top of the stack when it ended; 0 if there is none.
using AgentResult = std::variant<std::int64_t, AgentError>;
[[nodiscard]] AgentResult evaluate(const AgentExpression& expression, AgentContext& context);

/// What follows the place in a Z packet (GDB manual, "Packets": Z0).
struct PointLists {
    std::vector<AgentExpression> conditions;
    std::vector<AgentExpression> commands;
};
/// `text`: ";X LENGTH,CODE..." and ";cmds:PERSIST,X LENGTH,CODE..."; may be empty. Nothing if it is neither.
[[nodiscard]] std::optional<PointLists> parse_point_lists(std::string_view text);

} // namespace umbra
