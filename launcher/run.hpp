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
    std::string initrd;               ///< for protocols with modules: FILE[ ARGS][,...], as QEMU has it
    std::vector<std::string> modules; ///< FILE[,ARGS]
    std::string protocol;             ///< kernel_protocol()'s name; empty: as the file offers
    std::string load_address, entry;  ///< of a flat binary, decimal or 0x and hexadecimal; empty: not told
    bool force = false;               ///< run what this host is known not to run rightly
    bool guest_decompress = false;
    std::string serial;              ///< stdio, none or a file; empty: stdio, or none with `display`
    bool keyboard = false;           ///< standard input goes to the keyboard, not to the serial port
    bool display = false;            ///< the text screen is shown on the terminal
    bool serial_input = true;        ///< with `serial` stdio or `keyboard`: standard input goes to the guest
    std::string screen;              ///< where the text screen goes at the end; empty: nowhere
    std::vector<std::string> fw_cfg; ///< items: see parse_fw_cfg
    std::string device;              ///< pc-testdev, or empty
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
    bool end_stuck = false; ///< MonitorOptions::end_stuck, NativeEngine's
    std::string gdb;        ///< where to serve a debugger: GdbAddress::parse; empty: nowhere
    std::string gdb_arch;   ///< i386, x86-64, or empty: as the kernel's file
    bool pause = false;     ///< wait for the debugger before the first instruction
    bool qemu_exit = false;
    std::string result; ///< file for how the run ended, as one JSON object (see run_command); empty: none
    std::string core_on_failure; ///< where a core of a guest that did not pass goes; empty: nowhere
    /// A debugger can connect to this address; `end` ends the run. `umbra debug` starts gdb then, and the run
    /// ends when its client goes.
    std::function<void(const std::string& address, std::function<void()> end)> debugger_ready;
};

/// Whether standard input goes to the guest.
[[nodiscard]] bool reads_input(const RunOptions& options);

/// Runs the guest and returns the process's exit code. StartupError if it cannot be started.
///
/// RunOptions::result gets, also then, at the run's end:
///   verdict    passed, failed, triple-fault, reset, stopped, timed-out, no-progress, interrupted,
///              host-failed (KVM or umbra could not go on), host-cannot or bad-usage (it was not started)
///   code       what the guest wrote to port 0xf4 or 0x501; null if that is not what ended it
///   reason     the line that umbra says on standard error
///   exit_code  of the process
///   stats      stats_json()'s object; null if it was not started
[[nodiscard]] int run_command(const RunOptions& options);

} // namespace umbra
