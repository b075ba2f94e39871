// Programs for the reference model and a machine: lists of operations with all operands in them, so that any
// sublist of a program is a program.
#pragma once

#include "shadow/shadow_tables.hpp"
#include "tests/model/reference_mmu.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace umbra::model {

/// One thing that a guest does. What would be #GP does nothing.
struct Operation {
    enum class Kind : std::uint8_t {
        write,           ///< guest store of 8 bytes at `address`: clears the bits `clear`, sets `set`
        access,          ///< to `address`; what and by whom: `access`
        invlpg,          ///< `address`
        load_cr3,        ///< `address`, with `pcid`; `flag`: bit 63, no flush
        invpcid,         ///< `type`, `pcid`, `address`
        control,         ///< WP, NXE, SMEP, SMAP, PGE, PCIDE, PKE and PKRU as in `cpu`
        mode,            ///< paging off, and on again in the mode of `cpu`, with its root and PSE
        trap_user_fetch, ///< Mmu::set_trap_user_fetch(`flag`)
    };
    Kind kind = Kind::access;
    std::uint64_t address = 0;
    std::uint64_t clear = 0, set = 0;
    Access access{};
    std::uint16_t pcid = 0;
    unsigned type = 0;
    bool flag = false;
    Cpu cpu{};
    unsigned level = 0; ///< of the table written to, for the text only; 0: no matter
};

/// With a TlbSanitizer that watches, and old translations dropped or kept (TlbPolicy).
enum class Sanitize : std::uint8_t { no, drop, keep };

/// What a program runs on: the CPU at the start (CPUID's part of it holds throughout), and the machine as
/// MmuConfig has it.
struct Setup {
    Cpu cpu;
    std::size_t pool_pages = 64; ///< of shadow tables
    bool stores_seen = true;
    bool gigabyte_pages = true;
    unsigned first_slot = 300;
    Sync sync = Sync::compare;
    unsigned trap_cost = 4;
    unsigned prefetch = 1;
    Sanitize sanitize = Sanitize::no;
};

[[nodiscard]] std::string text(const Operation& operation);
[[nodiscard]] std::string text(const Setup& setup);
/// One operation a line.
[[nodiscard]] std::string text(const std::vector<Operation>& program);

} // namespace umbra::model
