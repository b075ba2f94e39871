// `umbra run`: one guest, from kernel file to exit code.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace umbra {

enum class EngineKind { shadow, native };
enum class StatsFormat { none, text, json };
enum class TlbBehaviour { natural, stale, eager };

struct RunOptions {
    std::string kernel;
    std::vector<std::string> arguments; ///< joined to the command line
    std::string memory = "128M";
    std::string append;
    std::string initrd;
    std::string serial = "stdio";
    std::string trace;
    std::string expect;
    std::string cpu;                ///< see CpuChoice::parse; empty: nothing chosen
    std::string log_level = "info"; ///< spdlog's name of one
    std::optional<double> timeout;  ///< seconds
    std::string shadow_memory;      ///< as `memory`; empty: in proportion to it
    std::string sync = "auto";      ///< auto, compare or protect
    bool sanitize_tlb = false;
    TlbBehaviour tlb = TlbBehaviour::natural;
    std::string protect_page_tables;          ///< report or refuse; empty: neither
    std::vector<std::string> page_table_code; ///< FUNCTION or START-END, hexadecimal
    EngineKind engine = EngineKind::shadow;
    StatsFormat stats = StatsFormat::none;
    bool qemu_exit = false;
    std::string gdb;             ///< where to serve a debugger: GdbAddress::parse; empty: nowhere
    bool pause = false;          ///< wait for the debugger before the first instruction
    std::string core_on_failure; ///< where a core of a guest that did not pass goes; empty: nowhere
    bool serial_input = true;    ///< with `serial` stdio: standard input goes to the guest
    /// A debugger can connect to this address; `end` ends the run. `umbra debug` starts gdb then, and the run
    /// ends when its client goes.
    std::function<void(const std::string& address, std::function<void()> end)> debugger_ready;
};

/// Runs the guest and returns the process's exit code. StartupError if it cannot be started.
[[nodiscard]] int run_command(const RunOptions& options);

} // namespace umbra
