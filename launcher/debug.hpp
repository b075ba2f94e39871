// `umbra debug`: a guest and gdb in one terminal.
#pragma once

#include "launcher/run.hpp"

#include <functional>
#include <string>
#include <vector>

namespace umbra {

struct DebugOptions {
    RunOptions run;
    std::string symbols;               ///< the file that gdb takes them from; empty: the kernel
    std::vector<std::string> commands; ///< of gdb, after it has connected
};

/// Starts the guest, stopped before its first instruction, and gdb, which has the terminal. The guest goes
/// when gdb does. Returns the process's exit code, which is that of the guest's run: ExitCode::interrupted if
/// gdb was its end. StartupError if it cannot be started.
///
/// `run_elsewhere`: runs the guest in place of run_command(), on an emulated host, with RunOptions::gdb and
/// RunOptions::debugger_ready as they are for run_command().
[[nodiscard]] int debug_command(DebugOptions options,
                                const std::function<int(const RunOptions&)>& run_elsewhere = {});

/// scripts/gdb/umbra.py: umbra's commands for gdb.
[[nodiscard]] const char* gdb_script();

} // namespace umbra
