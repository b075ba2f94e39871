#include "tests/model/program.hpp"

#include "tests/model/convert.hpp"

#include <array>

#include <fmt/core.h>

namespace umbra::model {
namespace {

std::string write_text(const Operation& operation) {
    constexpr std::array tables{"word", "PTE", "PDE", "PDPTE", "PML4E", "PML5E"};
    std::uint64_t at = operation.address, clear = operation.clear, set = operation.set;
    constexpr std::uint64_t low_half = 0xffff'ffff;
    std::uint64_t all = ~std::uint64_t{0};
    if ((clear | set) >> 32 != 0 &&
        ((clear | set) & low_half) == 0) { // an entry of 4 bytes, in the upper half
        at += 4;
        clear >>= 32;
        set >>= 32;
        all = low_half;
    } else if (clear == low_half) {
        all = low_half;
    }
    const std::string what = fmt::format("{:5} at {:#x}", tables.at(operation.level), at);
    if (clear == all)
        return fmt::format("{} = {:#x} ({})", what, set, flags_text(set));
    return fmt::format("{}: clear {:#x} ({}), set {:#x} ({})", what, clear, flags_text(clear), set,
                       flags_text(set));
}

} // namespace

std::string text(const Operation& operation) {
    switch (operation.kind) {
    case Operation::Kind::write:
        return write_text(operation);
    case Operation::Kind::access:
        return fmt::format("{} at {:#x}", text(operation.access), operation.address);
    case Operation::Kind::invlpg:
        return fmt::format("INVLPG {:#x}", operation.address);
    case Operation::Kind::load_cr3:
        return fmt::format("CR3 = {:#x}, PCID {}{}", operation.address, operation.pcid,
                           operation.flag ? ", no flush" : "");
    case Operation::Kind::invpcid:
        return fmt::format("INVPCID type {}, PCID {}, {:#x}", operation.type, operation.pcid,
                           operation.address);
    case Operation::Kind::control:
        return fmt::format("control: {}", text(operation.cpu));
    case Operation::Kind::mode:
        return fmt::format("mode: {}, CR3 = {:#x}", text(operation.cpu), operation.cpu.root);
    case Operation::Kind::trap_user_fetch:
        return fmt::format("trap user fetch {}", operation.flag ? "on" : "off");
    }
    return {};
}

std::string text(const Setup& setup) {
    constexpr std::array syncs{"compare", "protect", "adaptive", "trap"};
    constexpr std::array sanitizers{"", ", sanitized", ", sanitized, old translations kept"};
    return fmt::format("{}, CR3 {:#x}, MAXPHYADDR {}; machine: {} shadow pages, stores {}seen, {}1 GB pages, "
                       "slot {}, sync {}, trap cost {}, prefetch {}{}",
                       text(setup.cpu), setup.cpu.root, setup.cpu.maxphyaddr, setup.pool_pages,
                       setup.stores_seen ? "" : "not ", setup.gigabyte_pages ? "" : "no ", setup.first_slot,
                       syncs.at(static_cast<std::size_t>(setup.sync)), setup.trap_cost, setup.prefetch,
                       sanitizers.at(static_cast<std::size_t>(setup.sanitize)));
}

std::string text(const std::vector<Operation>& program) {
    std::string result;
    for (std::size_t i = 0; i < program.size(); ++i)
        result += fmt::format("{:4}  {}\n", i, text(program[i]));
    return result;
}

} // namespace umbra::model
