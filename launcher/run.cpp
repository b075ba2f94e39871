#include "launcher/run.hpp"

#include "launcher/console.hpp"
#include "vmm/debug/core_file.hpp"
#include "vmm/debug/server.hpp"
#include "vmm/debug/session.hpp"
#include "vmm/guest_checks.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/machine.hpp"
#include "vmm/monitor.hpp"
#include "vmm/native_engine.hpp"
#include "vmm/report.hpp"
#include "vmm/stats.hpp"
#include "vmm/switcher.hpp"
#include "vmm/symbols.hpp"
#include "vmm/traits.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace umbra {
namespace {

/// Bytes for shadow tables. By default enough for the worst case, a guest that maps its memory by 4 KB pages
/// in kernel and user mode, several times over: address space, of which only what is used is ever committed.
std::size_t pool_bytes(const RunOptions& options, std::uint64_t memory_bytes) {
    constexpr std::uint64_t step = std::uint64_t{2} << 20, least = 8 * step;
    const std::uint64_t most = SwitcherRegion::max_debt(1) * page_size / step * step;
    if (options.shadow_memory.empty())
        return std::clamp((memory_bytes / 64 + step - 1) / step * step, least, most);
    // A table has a snapshot of the guest's beside it.
    const std::uint64_t bytes = parse_memory_size(options.shadow_memory) / 2 / step * step;
    if (bytes == 0)
        throw StartupError(ExitCode::bad_usage, fmt::format("--shadow-memory must be at least {}M, not '{}'",
                                                            2 * step >> 20, options.shadow_memory));
    return std::min(bytes, most);
}

/// The code that --page-table-code names.
CodeRange code_range(const std::string& text, const Symbols& symbols) {
    if (const auto function = symbols.function(text))
        return {function->start, function->start + function->size};
    const char* const end = text.data() + text.size();
    CodeRange range;
    std::uint64_t first = 0, last = 0;
    const auto skip = [end](const char* at) {
        return end - at > 2 && at[0] == '0' && at[1] == 'x' ? at + 2 : at;
    };
    auto parsed = std::from_chars(skip(text.data()), end, first, 16);
    if (parsed.ec == std::errc() && parsed.ptr != end && *parsed.ptr == '-') {
        parsed = std::from_chars(skip(parsed.ptr + 1), end, last, 16);
        range = {GuestVirt(first), GuestVirt(last)};
    }
    if (parsed.ec != std::errc() || parsed.ptr != end || last <= first)
        throw StartupError(
            ExitCode::bad_usage,
            fmt::format("--page-table-code '{}' is neither a function of the kernel nor START-END", text));
    return range;
}

CheckOptions check_options(const RunOptions& options, std::span<const std::byte> kernel,
                           const Symbols& symbols) {
    CheckOptions checks;
    checks.sanitize_tlb = options.sanitize_tlb;
    if (options.tlb != TlbBehaviour::natural)
        checks.keep_stale = options.tlb == TlbBehaviour::stale;
    checks.symbol = [&symbols](GuestVirt at) { return symbols.name(at); };
    checks.report = [](const std::string& lines) { std::fputs(lines.c_str(), stderr); };
    if (options.protect_page_tables.empty()) {
        if (!options.page_table_code.empty())
            throw StartupError(ExitCode::bad_usage, "--page-table-code needs --protect-page-tables");
    } else {
        constexpr const char* section = ".page_table_code";
        checks.table_guard =
            options.protect_page_tables == "refuse" ? TableGuard::refuse : TableGuard::report;
        for (const std::string& text : options.page_table_code)
            checks.table_code.push_back(code_range(text, symbols));
        if (const auto declared = elf_code_section(kernel, section))
            checks.table_code.push_back({declared->start, declared->start + declared->size});
        if (checks.table_code.empty())
            throw StartupError(
                ExitCode::bad_usage,
                fmt::format("--protect-page-tables: the kernel has no section {}, so name the code "
                            "that may write to page tables by --page-table-code",
                            section));
    }
    const bool any = checks.sanitize_tlb || checks.keep_stale || checks.table_guard != TableGuard::off;
    if (any && options.engine == EngineKind::native)
        throw StartupError(ExitCode::bad_usage, "--sanitize, --tlb and --protect-page-tables need the shadow "
                                                "engine: the native one does not see page tables");
    if (any)
        checks.ticks_per_us = ticks_per_microsecond();
    return checks;
}

MonitorOptions monitor_options(const RunOptions& options, GuestChecks& checks) {
    MonitorOptions monitor;
    if (options.sync != "auto")
        monitor.sync = options.sync == "protect" ? Sync::protect : Sync::compare;
    if (checks.watch_tables())
        monitor.checks = &checks;
    return monitor;
}

std::string command_line(const RunOptions& options) {
    std::string line = options.append;
    for (const std::string& argument : options.arguments) {
        if (!line.empty())
            line += ' ';
        line += argument;
    }
    return line;
}

/// Where the serial console goes: a file of our own, or standard output.
File open_serial(const std::string& serial) {
    if (serial == "stdio" || serial == "none")
        return {};
    File file(::open(serial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    if (file.get() < 0)
        throw StartupError(ExitCode::bad_usage, fmt::format("cannot write the serial console to '{}': {}",
                                                            serial, std::strerror(errno)));
    return file;
}

LoadedKernel load(const RunOptions& options, std::span<const std::byte> kernel,
                  std::span<const std::byte> initrd, const GuestMemory& memory) {
    const std::string line = command_line(options);
    try {
        return load_kernel(kernel, {.command_line = line, .initrd = initrd}, memory);
    } catch (const StartupError& error) {
        throw StartupError(error.code(),
                           fmt::format("cannot load kernel '{}': {}", options.kernel, error.what()));
    }
}

/// A guest that KVM shut down at ring 0 leaves no state: the vCPU has been reset.
bool wants_report(const Verdict& verdict, EngineKind engine) {
    return (verdict.kind == Verdict::Kind::triple_fault && engine == EngineKind::shadow) ||
           verdict.kind == Verdict::Kind::stopped || verdict.kind == Verdict::Kind::host_failed;
}

std::string make_report(Engine& engine, const Machine& machine, const Symbols& symbols,
                        const Verdict& verdict) {
    const std::string why = describe(verdict);
    const GuestPaging paging = engine.paging();
    const ReportSubject subject = report_subject(engine.cpu(), engine.log());
    ReportInput input{.why = why,
                      .cpu = engine.cpu(),
                      .memory = machine.memory(),
                      .paging = paging,
                      .log = engine.log(),
                      .symbols = symbols,
                      .shadow = {},
                      .ticks_per_us = ticks_per_microsecond()};
    if (Mmu* mmu = engine.mmu(); mmu != nullptr && paging.format->canonical(subject.address))
        input.shadow = mmu->shadow_walk(subject.address, subject.access.user);
    return report(input);
}

int process_exit_code(const RunOptions& options, const Verdict& verdict) {
    const bool debug_exit = verdict.reason.empty() &&
                            (verdict.kind == Verdict::Kind::failed || verdict.kind == Verdict::Kind::passed);
    if (options.qemu_exit && debug_exit)
        return static_cast<int>((verdict.code << 1 | 1) & 0xff);
    return static_cast<int>(exit_code(verdict));
}

/// What every run of the guest begins with, and what outlives a reset by the debugger.
struct Session {
    Session(const RunOptions& run_options, std::vector<std::byte> file, int serial_fd)
        : options(run_options), kernel(std::move(file)),
          initrd(options.initrd.empty() ? std::vector<std::byte>{} : read_file(options.initrd, "initrd")),
          memory_bytes(parse_memory_size(options.memory)),
          cpu(options.cpu.empty() ? CpuChoice() : CpuChoice::parse(options.cpu)),
          symbols(Symbols::from_elf(kernel)), output(serial_fd, options.expect, control) {}

    const RunOptions& options;
    const std::vector<std::byte> kernel, initrd;
    const std::uint64_t memory_bytes;
    const CpuChoice cpu;
    const Symbols symbols;
    const Kvm kvm;
    RunControl control;
    GuestOutput output;
    std::optional<GdbServer> server;
    std::optional<GdbSession> debugger;
};

/// Opens the door to debuggers, and says so.
void serve_debugger(Session& session) {
    const RunOptions& options = session.options;
    if (options.gdb.empty()) {
        if (options.pause)
            throw StartupError(ExitCode::bad_usage, "--pause needs --gdb: nothing else could end the pause");
        return;
    }
    if (options.engine == EngineKind::native)
        throw StartupError(ExitCode::bad_usage, "--gdb needs the shadow engine");
    session.server.emplace(GdbAddress::parse(options.gdb), [&session] { session.control.debugger_calls(); });
    session.debugger.emplace(
        *session.server, session.symbols,
        GdbSession::Config{.pause = options.pause, .leave_with_client = options.debugger_ready != nullptr});
    const std::string& address = session.server->address();
    if (options.debugger_ready)
        options.debugger_ready(address, [&session] { session.control.interrupt(); });
    else
        spdlog::info("{}: gdb {} -ex 'target remote {}'",
                     options.pause ? "the guest waits for a debugger" : "a debugger can connect",
                     options.kernel, address);
}

/// The failed guest's memory and registers, for gdb to open later.
void save_core(const RunOptions& options, const Engine& engine, Machine& machine) {
    const auto extended = machine.vcpu().read_extended();
    if (const auto problem = write_core(options.core_on_failure, engine.cpu(),
                                        extended ? &*extended : nullptr, machine.memory(), engine.paging()))
        spdlog::warn("no core was written to '{}': {}", options.core_on_failure, *problem);
    else
        spdlog::info("core written: gdb {} {}", options.kernel, options.core_on_failure);
}

/// From the machine's making to its end.
Verdict run_once(Session& session, int& exit_code) {
    const RunOptions& options = session.options;
    const bool shadow = options.engine == EngineKind::shadow;
    GuestOutput& output = session.output;
    Machine machine(session.kvm, {.memory_bytes = session.memory_bytes,
                                  .pool_bytes = shadow ? pool_bytes(options, session.memory_bytes) : 0,
                                  .cpu = session.cpu,
                                  .serial_output = output.sink(),
                                  .debug_output = output.sink()});
    const LoadedKernel kernel_image = load(options, session.kernel, session.initrd, machine.memory());
    const VirtualCpu boot = boot_cpu(kernel_image);
    // After the machine was made: KVM is still busy with its timer then (Vm::create_interrupt_controllers).
    const HostTraits traits = shadow ? probe_traits(session.kvm) : HostTraits{};
    if (shadow && !traits.cpuid_intercepted && !session.cpu.none())
        spdlog::warn(
            "this host does not intercept CPUID: the guest sees the host's features; --cpu only decides "
            "which of them work");
    GuestChecks checks(check_options(options, session.kernel, session.symbols), machine.memory());
    MonitorOptions monitor = monitor_options(options, checks);
    if (session.debugger)
        monitor.frontend = &*session.debugger;
    const std::unique_ptr<Engine> engine =
        shadow ? std::unique_ptr<Engine>(std::make_unique<Monitor>(machine, traits, boot, monitor))
               : std::make_unique<NativeEngine>(machine, boot);
    if (session.debugger)
        session.debugger->serve_engine(*engine, machine);
    if (!options.trace.empty())
        engine->log().trace_to(options.trace);
    spdlog::debug("{}: {}, entered at {}, {} MB, {} engine", options.kernel,
                  kernel_image.protocol == BootProtocol::elf64 ? "64-bit ELF" : "Linux 64-bit boot protocol",
                  kernel_image.entry, session.memory_bytes >> 20, shadow ? "shadow" : "native");
    if (shadow)
        spdlog::debug("host: userspace stores {}, IOPL {}, CPUID {}, resumed by {}",
                      traits.stores_seen ? "seen" : "not seen",
                      traits.iopl_honoured ? "honoured" : "not honoured",
                      traits.cpuid_intercepted ? "intercepted" : "native",
                      traits.resume == ResumeBy::iretq ? "iretq" : "system registers");

    const auto timeout =
        options.timeout ? std::optional(std::chrono::duration<double>(*options.timeout)) : std::nullopt;
    const auto start = std::chrono::steady_clock::now();
    Verdict verdict = checks.judge([&] {
        const Attendant attendant(
            session.control,
            {.timeout = timeout, .input = options.serial == "stdio" && options.serial_input});
        return engine->run(session.control);
    }());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    machine.platform().flush();
    if (verdict.kind == Verdict::Kind::restart) {
        spdlog::info("the guest starts anew: {}", verdict.reason);
        return verdict;
    }

    spdlog::log(verdict.kind == Verdict::Kind::passed ? spdlog::level::info : spdlog::level::err, "{}",
                describe(verdict));
    if (!output.failure().empty())
        spdlog::warn("some of the guest's output was lost: {}", output.failure());
    if (wants_report(verdict, options.engine))
        std::fputs(make_report(*engine, machine, session.symbols, verdict).c_str(), stderr);
    if (!options.core_on_failure.empty() && verdict.kind != Verdict::Kind::passed)
        save_core(options, *engine, machine);
    if (options.stats != StatsFormat::none) {
        const Stats stats = gather_stats(engine->log(), engine->mmu(), machine.platform().unclaimed(),
                                         seconds.count(), ticks_per_microsecond());
        std::fputs((options.stats == StatsFormat::json ? stats_json(stats) : stats_text(stats)).c_str(),
                   stderr);
    }
    if (!engine->log().finish_trace())
        spdlog::warn("the trace '{}' is incomplete: it could not be written", options.trace);
    exit_code = process_exit_code(options, verdict);
    return verdict;
}

} // namespace

int run_command(const RunOptions& options) {
    std::vector<std::byte> kernel = read_file(options.kernel);
    const File serial_file = open_serial(options.serial);
    const int serial_fd = options.serial == "stdio" ? STDOUT_FILENO : serial_file.get();
    Session session(options, std::move(kernel), serial_fd);
    serve_debugger(session);
    int exit_code = 0;
    while (run_once(session, exit_code).kind == Verdict::Kind::restart) {
    }
    return exit_code;
}

} // namespace umbra
