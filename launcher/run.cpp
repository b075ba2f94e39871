#include "launcher/run.hpp"

#include "launcher/console.hpp"
#include "launcher/display.hpp"
#include "vmm/debug/core_file.hpp"
#include "vmm/debug/server.hpp"
#include "vmm/debug/session.hpp"
#include "vmm/guest_checks.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/log.hpp"
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
#include <iterator>
#include <memory>
#include <utility>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

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
    monitor.end_stuck = options.end_stuck;
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

/// What --serial says, or would have to say.
std::string serial_place(const RunOptions& options) {
    if (!options.serial.empty())
        return options.serial;
    return options.display ? "none" : "stdio"; // the terminal has one use
}

std::vector<FwCfgFile> fw_cfg_files(const RunOptions& options) {
    std::vector<FwCfgFile> files;
    for (const std::string& text : options.fw_cfg) {
        const FwCfgOption item = parse_fw_cfg(text);
        const auto value = std::as_bytes(std::span(item.value));
        files.push_back({item.name, item.is_file ? read_file(item.value, "fw_cfg item")
                                                 : std::vector<std::byte>{value.begin(), value.end()}});
    }
    return files;
}

File open_output(const std::string& path, const char* what) {
    File file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    if (file.get() < 0)
        throw StartupError(ExitCode::bad_usage,
                           fmt::format("cannot write {} to '{}': {}", what, path, std::strerror(errno)));
    return file;
}

/// Where the serial console goes: a file of our own, or standard output.
File open_serial(const std::string& serial) {
    if (serial == "stdio" || serial == "none")
        return {};
    return open_output(serial, "the serial console");
}

/// An address as users write it.
std::optional<GuestPhys> parse_address(const std::string& text, const char* option) {
    if (text.empty())
        return std::nullopt;
    const bool hexadecimal = text.starts_with("0x") || text.starts_with("0X");
    const char* const end = text.data() + text.size();
    std::uint64_t value = 0;
    const auto [rest, error] =
        std::from_chars(text.data() + (hexadecimal ? 2 : 0), end, value, hexadecimal ? 16 : 10);
    if (error != std::errc() || rest != end)
        throw StartupError(
            ExitCode::bad_usage,
            fmt::format("{} '{}' is no address: write a number such as 0x100000", option, text));
    return GuestPhys(value);
}

std::optional<KernelProtocol> parse_protocol(const std::string& text) {
    if (text.empty())
        return std::nullopt;
    const auto protocol = kernel_protocol(text);
    if (!protocol)
        throw StartupError(ExitCode::bad_usage, fmt::format("--protocol '{}' is unknown", text));
    return protocol;
}

/// A module's file and what the kernel is told with it.
struct ModuleFile {
    std::vector<std::byte> contents;
    std::string arguments;
};

/// FILE[,ARGS]; without arguments the file's name stands for them.
ModuleFile read_module(const std::string& text) {
    const std::size_t comma = text.find(',');
    return {read_file(text.substr(0, comma), "module"),
            comma == std::string::npos ? text : text.substr(comma + 1)};
}

/// QEMU's -initrd for multiboot: "FILE ARGS,FILE ARGS", where the kernel is told all of each.
std::vector<ModuleFile> read_initrd_modules(std::string_view text) {
    std::vector<ModuleFile> modules;
    while (!text.empty()) {
        const std::string_view module = text.substr(0, text.find(','));
        text.remove_prefix(std::min(text.size(), module.size() + 1));
        modules.push_back(
            {read_file(std::string(module.substr(0, module.find(' '))), "module"), std::string(module)});
    }
    return modules;
}

/// Calls `action`, whose failure is the kernel's.
template<class Action>
auto with_kernel_named(const RunOptions& options, Action action) {
    try {
        return action();
    } catch (const StartupError& error) {
        throw StartupError(error.code(),
                           fmt::format("cannot load kernel '{}': {}", options.kernel, error.what()));
    }
}

std::vector<std::byte> unpacked_kernel(const RunOptions& options) {
    std::vector<std::byte> file = read_kernel(options.kernel);
    return with_kernel_named(options, [&] { return unpack_kernel_file(std::move(file)); });
}

/// All that is loaded into the guest.
class GuestFiles {
  public:
    explicit GuestFiles(const RunOptions& options)
        : name_(options.kernel), command_line_(command_line(options)),
          protocol_(parse_protocol(options.protocol)), guest_decompress_(options.guest_decompress),
          load_address_(parse_address(options.load_address, "--load-address")),
          entry_(parse_address(options.entry, "--entry")), kernel_(unpacked_kernel(options)) {
        for (const std::string& text : options.modules)
            modules_.push_back(read_module(text));
        name_modules();
        const KernelFile file = read_kernel_file(kernel_);
        is_linux_ = file.is_linux();
        const KernelProtocol chosen =
            with_kernel_named(options, [&] { return choose_protocol(file, request()); });
        if (options.initrd.empty())
            return;
        if (!takes_modules(chosen)) {
            initrd_ = read_file(options.initrd, "initrd");
            return;
        }
        std::vector<ModuleFile> all = read_initrd_modules(options.initrd);
        std::ranges::move(modules_, std::back_inserter(all));
        modules_ = std::move(all);
        name_modules();
    }
    GuestFiles(const GuestFiles&) = delete;
    GuestFiles& operator=(const GuestFiles&) = delete;
    GuestFiles(GuestFiles&&) = delete;
    GuestFiles& operator=(GuestFiles&&) = delete;
    ~GuestFiles() = default;

    /// Not compressed.
    [[nodiscard]] std::span<const std::byte> kernel() const { return kernel_; }
    [[nodiscard]] bool is_linux() const { return is_linux_; }
    /// Refers to this.
    [[nodiscard]] LoadRequest request() const {
        return {.command_line = command_line_,
                .initrd = initrd_,
                .modules = boot_modules_,
                .name = name_,
                .protocol = protocol_,
                .guest_decompress = guest_decompress_,
                .load_address = load_address_,
                .entry = entry_};
    }

  private:
    void name_modules() {
        boot_modules_.clear();
        for (const ModuleFile& module : modules_)
            boot_modules_.push_back({module.contents, module.arguments});
    }

    std::string name_, command_line_;
    std::optional<KernelProtocol> protocol_;
    bool guest_decompress_, is_linux_ = false;
    std::optional<GuestPhys> load_address_, entry_;
    std::vector<std::byte> kernel_, initrd_;
    std::vector<ModuleFile> modules_;
    std::vector<BootModule> boot_modules_; ///< of modules_
};

/// A guest that KVM shut down at ring 0 leaves no state: the vCPU has been reset.
bool wants_report(const Verdict& verdict, EngineKind engine) {
    return (verdict.kind == Verdict::Kind::triple_fault && engine == EngineKind::shadow) ||
           verdict.kind == Verdict::Kind::no_progress || verdict.kind == Verdict::Kind::stopped ||
           verdict.kind == Verdict::Kind::host_failed;
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

/// The guest itself ended the run, by a value at port 0xf4.
bool is_debug_exit(const Verdict& verdict) {
    return verdict.reason.empty() &&
           (verdict.kind == Verdict::Kind::failed || verdict.kind == Verdict::Kind::passed);
}

int process_exit_code(const RunOptions& options, const Verdict& verdict) {
    if (options.qemu_exit && is_debug_exit(verdict))
        return static_cast<int>((verdict.code << 1 | 1) & 0xff);
    return static_cast<int>(exit_code(verdict));
}

/// How RunOptions::result calls it.
const char* result_word(Verdict::Kind kind) {
    switch (kind) {
    case Verdict::Kind::passed:
        return "passed";
    case Verdict::Kind::failed:
        return "failed";
    case Verdict::Kind::reset:
        return "reset";
    case Verdict::Kind::triple_fault:
        return "triple-fault";
    case Verdict::Kind::stopped:
        return "stopped";
    case Verdict::Kind::timed_out:
        return "timed-out";
    case Verdict::Kind::no_progress:
        return "no-progress";
    case Verdict::Kind::interrupted:
    case Verdict::Kind::restart:
        return "interrupted";
    case Verdict::Kind::host_failed:
        return "host-failed";
    }
    __builtin_unreachable();
}

using Json = nlohmann::ordered_json;

void write_result(const RunOptions& options, const File& file, const Json& result) {
    if (options.result.empty())
        return;
    const std::string text = result.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    for (std::string_view rest = text; !rest.empty();) {
        const ssize_t written = ::write(file.get(), rest.data(), rest.size());
        if (written >= 0) {
            rest.remove_prefix(static_cast<std::size_t>(written));
        } else if (errno != EINTR) {
            log_warning("the result was not written to '{}': {}", options.result, std::strerror(errno));
            return;
        }
    }
}

/// The width of registers that the debugger's client is told of. A 64-bit ELF is debugged as 64-bit code from
/// the first instruction, although boot loaders enter it in 32-bit mode: gdb takes one width when it
/// connects, and refuses one that is not that of the file. What else there may be stays as it is until it
/// changes.
std::optional<TargetWidth> target_width(const RunOptions& options, std::span<const std::byte> kernel) {
    if (!options.gdb_arch.empty())
        return options.gdb_arch == "i386" ? TargetWidth::bits_32 : TargetWidth::bits_64;
    const KernelFile file = read_kernel_file(kernel);
    return file.elf && file.elf->is_64_bit ? std::optional(TargetWidth::bits_64) : std::nullopt;
}

/// What every run of the guest begins with, and what outlives a reset by the debugger.
struct Session {
    Session(const RunOptions& run_options, int serial_fd)
        : options(run_options), files(options), memory_bytes(parse_memory_size(options.memory)),
          cpu(options.cpu.empty() ? CpuChoice() : CpuChoice::parse(options.cpu)),
          symbols(Symbols::from_elf(files.kernel())), output(serial_fd, options.expect, control) {}

    const RunOptions& options;
    const GuestFiles files;
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
    std::optional<GdbListener> listener = GdbListener::inherited();
    if (!listener)
        listener.emplace(GdbAddress::parse(options.gdb));
    session.server.emplace(std::move(*listener), [&session] { session.control.debugger_calls(); });
    session.debugger.emplace(*session.server, session.symbols,
                             GdbSession::Config{.pause = options.pause,
                                                .leave_with_client = options.debugger_ready != nullptr,
                                                .width = target_width(options, session.files.kernel())});
    const std::string& address = session.server->address();
    if (options.debugger_ready)
        options.debugger_ready(address, [&session] { session.control.interrupt(); });
    else
        log_info("{}: gdb {} -ex 'target remote {}'",
                 options.pause ? "the guest waits for a debugger" : "a debugger can connect", options.kernel,
                 address);
}

/// The failed guest's memory and registers, for gdb to open later.
void save_core(const RunOptions& options, const Engine& engine, Machine& machine) {
    const auto extended = machine.vcpu().read_extended();
    if (const auto problem = write_core(options.core_on_failure, engine.cpu(),
                                        extended ? &*extended : nullptr, machine.memory(), engine.paging()))
        log_warning("no core was written to '{}': {}", options.core_on_failure, *problem);
    else
        log_info("core written: gdb {} {}", options.kernel, options.core_on_failure);
}

/// Linux saves and restores its interrupt flag with instructions that do not trap, and builds on what CPUID
/// shows. Where both are the host's, it gets as far as its first program and goes wrong on the way.
void require_linux_host(const RunOptions& options, const HostTraits& traits) {
    if (traits.iopl_honoured && traits.cpuid_intercepted)
        return;
    const std::string why = fmt::format(
        "this host's KVM shows the guest {}{}{} in place of its own (see umbra probe), with which "
        "Linux goes wrong",
        traits.iopl_honoured ? "" : "the host's interrupt flag",
        traits.iopl_honoured || traits.cpuid_intercepted ? "" : " and ",
        traits.cpuid_intercepted ? "" : "the host's CPUID");
    if (!options.force)
        throw StartupError(ExitCode::host_cannot,
                           why + ": run it where KVM has VT-x or SVM, or all the same with --force");
    log_warning("{}", why);
}

/// How a run ended.
struct Ending {
    Verdict verdict;
    Stats stats;
};

/// From the machine's making to its end.
Ending run_once(Session& session) {
    const RunOptions& options = session.options;
    const bool shadow = options.engine == EngineKind::shadow;
    GuestOutput& output = session.output;
    Machine machine(session.kvm, {.memory_bytes = session.memory_bytes,
                                  .pool_bytes = shadow ? pool_bytes(options, session.memory_bytes) : 0,
                                  .cpu = session.cpu,
                                  .serial_output = output.sink(),
                                  .debug_output = output.sink(),
                                  .fw_cfg = fw_cfg_files(options),
                                  .test_device = !options.device.empty(),
                                  .keyboard = options.keyboard});
    const auto screen = [&machine] {
        return vga_screen(machine.memory(), machine.platform().vga_text_state());
    };
    const LoadedKernel kernel = with_kernel_named(options, [&] {
        return load_kernel(session.files.kernel(), session.files.request(), machine.memory());
    });
    const VirtualCpu boot = boot_cpu(kernel);
    // After the machine was made: KVM is still busy with its timer then (Vm::create_interrupt_controllers).
    const HostTraits traits = shadow ? probe_traits(session.kvm) : HostTraits{};
    if (shadow && !traits.cpuid_intercepted && !session.cpu.none())
        log_warning(
            "this host does not intercept CPUID: the guest sees the host's features; --cpu only decides "
            "which of them work");
    if (shadow && session.files.is_linux())
        require_linux_host(options, traits);
    GuestChecks checks(check_options(options, session.files.kernel(), session.symbols), machine.memory());
    MonitorOptions monitor = monitor_options(options, checks);
    if (session.debugger)
        monitor.frontend = &*session.debugger;
    const std::unique_ptr<Engine> engine =
        shadow ? std::unique_ptr<Engine>(std::make_unique<Monitor>(machine, traits, boot, monitor))
               : std::make_unique<NativeEngine>(machine, boot, options.end_stuck);
    if (session.debugger)
        session.debugger->serve_engine(*engine, machine);
    if (!options.trace.empty())
        engine->log().trace_to(options.trace);
    log_debug("{}: protocol {}, entered at {}, {} MB, {} engine", options.kernel, name(kernel.protocol),
              kernel.entry, session.memory_bytes >> 20, shadow ? "shadow" : "native");
    if (shadow)
        log_debug("host: userspace stores {}, IOPL {}, CPUID {}, ring 0 {}",
                  traits.stores_seen ? "seen" : "not seen",
                  traits.iopl_honoured ? "honoured" : "not honoured",
                  traits.cpuid_intercepted ? "intercepted" : "native",
                  traits.native_ring0 ? "native" : "interpreted");

    const auto timeout =
        options.timeout ? std::optional(std::chrono::duration<double>(*options.timeout)) : std::nullopt;
    const auto start = std::chrono::steady_clock::now();
    Verdict verdict = checks.judge([&] {
        const Attendant attendant(session.control, {.timeout = timeout, .input = reads_input(options)});
        std::optional<TextDisplay> display;
        if (options.display)
            display.emplace(STDOUT_FILENO, screen);
        return engine->run(session.control);
    }());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (verdict.kind == Verdict::Kind::no_progress)
        if (const std::string place = session.symbols.name(GuestVirt(engine->cpu().rip)); !place.empty())
            verdict.reason += fmt::format(" ({})", place);
    machine.platform().flush();
    if (verdict.kind == Verdict::Kind::restart) {
        log_info("the guest starts anew: {}", verdict.reason);
        return {std::move(verdict), {}};
    }

    log_line(verdict.kind == Verdict::Kind::passed ? LogLevel::info : LogLevel::error, describe(verdict));
    if (const auto& refusal = engine->refusal(); refusal && verdict.kind != Verdict::Kind::passed)
        log_info("hint: the guest's CPU refused an instruction at {:#x} that takes '{}': try --cpu +{}",
                 refusal->rip.value(), name(refusal->feature), name(refusal->feature));
    if (!output.failure().empty())
        log_warning("some of the guest's output was lost: {}", output.failure());
    if (wants_report(verdict, options.engine))
        std::fputs(make_report(*engine, machine, session.symbols, verdict).c_str(), stderr);
    if (!options.screen.empty())
        if (const auto problem = save_screen(options.screen, screen()))
            log_warning("the screen was not written to '{}': {}", options.screen, *problem);
    if (!options.core_on_failure.empty() && verdict.kind != Verdict::Kind::passed)
        save_core(options, *engine, machine);
    Stats stats;
    if (options.stats != StatsFormat::none || !options.result.empty())
        stats = gather_stats(engine->log(), engine->mmu(), machine.platform().unclaimed(),
                             machine.vcpu().exits(), seconds.count(), ticks_per_microsecond());
    if (options.stats != StatsFormat::none)
        std::fputs((options.stats == StatsFormat::json ? stats_json(stats) : stats_text(stats)).c_str(),
                   stderr);
    if (!engine->log().finish_trace())
        log_warning("the trace '{}' is incomplete: it could not be written", options.trace);
    return {std::move(verdict), std::move(stats)};
}

Ending run_guest(const RunOptions& options) {
    const std::string serial = serial_place(options);
    const File serial_file = open_serial(serial);
    const int serial_fd = serial == "stdio" ? STDOUT_FILENO : serial_file.get();
    if (options.display) {
        if (serial == "stdio")
            throw StartupError(ExitCode::bad_usage,
                               "--display text and --serial stdio want the same terminal");
        require_terminal(STDOUT_FILENO);
    }
    Session session(options, serial_fd);
    serve_debugger(session);
    while (true) {
        Ending ending = run_once(session);
        if (ending.verdict.kind != Verdict::Kind::restart)
            return ending;
    }
}

} // namespace

bool reads_input(const RunOptions& options) {
    return (options.keyboard || serial_place(options) == "stdio") && options.serial_input;
}

int run_command(const RunOptions& options) {
    const File file = options.result.empty() ? File() : open_output(options.result, "the result");
    try {
        const auto [verdict, stats] = run_guest(options);
        const int exit_code = process_exit_code(options, verdict);
        if (!options.result.empty())
            write_result(options, file,
                         {{"verdict", result_word(verdict.kind)},
                          {"code", is_debug_exit(verdict) ? Json(verdict.code) : Json()},
                          {"reason", describe(verdict)},
                          {"exit_code", exit_code},
                          {"stats", Json::parse(stats_json(stats))}});
        return exit_code;
    } catch (const StartupError& error) {
        write_result(options, file,
                     {{"verdict", error.code() == ExitCode::bad_usage ? "bad-usage" : "host-cannot"},
                      {"code", nullptr},
                      {"reason", error.what()},
                      {"exit_code", static_cast<int>(error.code())},
                      {"stats", nullptr}});
        throw;
    }
}

} // namespace umbra
