// The command line of umbra.

#include "launcher/debug.hpp"
#include "launcher/host.hpp"
#include "launcher/inspect.hpp"
#include "launcher/probe.hpp"
#include "launcher/run.hpp"
#include "launcher/test/command.hpp"
#include "launcher/test/html.hpp"
#include "vmm/cpu_model.hpp"
#include "vmm/error.hpp"
#include "vmm/kvm/kvm.hpp"
#include "vmm/loader/kernel_file.hpp"
#include "vmm/loader/memory_size.hpp"
#include "vmm/log.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

namespace {

using umbra::DebugOptions;
using umbra::EngineKind;
using umbra::Errand;
using umbra::ExitCode;
using umbra::ListFormat;
using umbra::RunOptions;
using umbra::StatsFormat;
using umbra::TestOptions;
using umbra::TlbBehaviour;

constexpr unsigned most_processors = 64; ///< of an emulated host

constexpr const char* exit_codes = R"(Exit codes:
  0    passed: the guest wrote 0 to port 0xf4 or 0x501, powered off, or printed what --expect names
  1    failed: the guest wrote another value to port 0xf4 or 0x501
  2    bad usage, or a kernel that cannot be loaded
  3    the guest panicked: triple fault, reset, or something that umbra does not do; or it was stuck
       (--end-stuck)
  4    this host cannot run the guest
  124  timed out
  130  interrupted (Ctrl-C))";

/// What is wrong with a time limit; nothing if nothing is. CLI::Range would take "nan".
std::string seconds(const std::string& text) {
    double value = 0;
    if (CLI::detail::lexical_cast(text, value) && value >= 0.001 && value <= 1e9)
        return {};
    return fmt::format("'{}' is not a number of seconds from 0.001 to 1000000000", text);
}

/// How the kernel is loaded, where that is not as its file says.
void add_loader_options(CLI::App& run, RunOptions& options) {
    constexpr const char* group = "Loading";
    std::vector<std::string> protocols;
    protocols.reserve(umbra::kernel_protocols.size());
    for (const umbra::KernelProtocol protocol : umbra::kernel_protocols)
        protocols.emplace_back(umbra::name(protocol));
    run.add_option(
           "--protocol", options.protocol,
           "Boot protocol, if not the first that the file offers (see umbra inspect); flat and flat32: "
           "a binary that is entered in 64-bit mode, as umbra's own ELF kernels are, or in 32-bit "
           "protected mode")
        ->check(CLI::IsMember(protocols))
        ->type_name("NAME")
        ->group(group);
    run.add_option("--module", options.modules,
                   "A module for a multiboot or PVH kernel, and what the kernel is told with it [the file's "
                   "name]; may be repeated")
        ->type_name("FILE[,ARGS]")
        ->allow_extra_args(false)
        ->group(group);
    run.add_option("--load-address", options.load_address, "Where a flat binary is loaded, e.g. 0x100000")
        ->type_name("ADDRESS")
        ->group(group);
    run.add_option("--entry", options.entry, "Where a flat binary is entered [its load address]")
        ->type_name("ADDRESS")
        ->group(group);
    run.add_flag("--guest-decompress", options.guest_decompress,
                 "Let a Linux bzImage unpack itself in the guest")
        ->group(group);
    run.add_flag("--force", options.force,
                 "Run a Linux kernel also where this host's KVM lacks what it needs")
        ->group(group);
}

/// The devices, beside the serial console.
void add_platform_options(CLI::App& run, RunOptions& options) {
    constexpr const char* group = "Platform";
    run.add_option("--screen", options.screen, "Write the VGA text screen to a file at the end of the run")
        ->type_name("FILE")
        ->group(group);
    run.add_option("--fw-cfg", options.fw_cfg,
                   "An item of QEMU's firmware configuration device: name=NAME,string=TEXT or "
                   "name=NAME,file=FILE; may be repeated")
        ->type_name("ITEM")
        ->allow_extra_args(false)
        ->group(group);
    run.add_option("--device", options.device,
                   "A device besides: pc-testdev, QEMU's for programs that test hypervisors")
        ->type_name("NAME")
        ->check(CLI::IsMember({"pc-testdev"}))
        ->group(group);
}

/// How the guest's page tables are shadowed, and what is watched there.
void add_shadow_options(CLI::App& run, RunOptions& options) {
    constexpr const char* group = "Shadow paging";
    run.add_option(
           "--shadow-memory", options.shadow_memory,
           "Memory for shadow tables at most, as for --memory; what is older is built again when it is "
           "needed [a 32nd of the guest's]")
        ->type_name("SIZE")
        ->group(group);
    run.add_option(
           "--sync", options.sync,
           "How shadow tables follow the guest's: compare after each flush, protect (trap its writes), "
           "or auto: each table as it is cheaper")
        ->check(CLI::IsMember({"auto", "compare", "protect"}))
        ->capture_default_str()
        ->type_name("HOW")
        ->group(group);
    run.add_option_function<std::string>(
           "--sanitize", [&options](const std::string&) { options.sanitize_tlb = true; },
           "tlb: report each use of a translation that the guest has changed and not invalidated; such a run "
           "does not pass")
        ->check(CLI::IsMember({"tlb"}))
        ->type_name("WHAT")
        ->group(group);
    run.add_option_function<std::string>(
           "--tlb",
           [&options](const std::string& name) {
               options.tlb = name == "stale" ? TlbBehaviour::stale : TlbBehaviour::eager;
           },
           "stale: keep old translations as long as a CPU may; eager: drop them at once")
        ->check(CLI::IsMember({"stale", "eager"}))
        ->type_name("HOW")
        ->group(group);
    const std::string about_protection =
        "Report writes to live page tables by code that is not declared, or, with =refuse, answer them "
        "with a page fault";
    run.add_flag("--protect-page-tables", about_protection)
        ->check(CLI::IsMember({"true", "report", "refuse"}).description(""))
        ->each([&options](const std::string& how) {
            options.protect_page_tables = how == "refuse" ? "refuse" : "report";
        })
        ->group(group);
    run.add_option(
           "--page-table-code", options.page_table_code,
           "Code that may write to page tables, beside the kernel's section .page_table_code: FUNCTION "
           "or START-END, hexadecimal; may be repeated")
        ->type_name("CODE")
        ->delimiter(',')
        ->allow_extra_args(false)
        ->group(group);
}

/// What every way to run a guest takes.
void add_guest_options(CLI::App* run, RunOptions& options) {
    run->footer(exit_codes);
    run->add_option("kernel", options.kernel,
                    "ELF, multiboot, PVH or Linux kernel, or a flat binary; may be compressed")
        ->required()
        ->type_name("KERNEL");
    run->add_option("args", options.arguments, "Added to the kernel's command line (after --)")
        ->type_name("ARGS");
    run->add_option("-m,--memory", options.memory, "Guest memory, e.g. 64M or 1G; a bare number is in MiB")
        ->capture_default_str()
        ->type_name("SIZE");
    run->add_option("--append", options.append, "The kernel's command line")->type_name("TEXT");
    run->add_option(
           "--initrd", options.initrd,
           "Initial RAM disk; modules of a multiboot kernel, as QEMU has it: \"FILE ARGS,FILE ARGS\"")
        ->type_name("FILE");
    run->add_option("--serial", options.serial,
                    "Where the serial console goes: stdio, none, or a file's name [stdio]")
        ->type_name("WHERE");
    run->add_option("--timeout", options.timeout, "End the run after so many seconds")
        ->check(seconds)
        ->type_name("SECONDS");
    run->add_flag("--end-stuck", options.end_stuck,
                  "End the run when the guest halts or jumps to itself with interrupts off, which nothing "
                  "can end");
    run->add_option("--expect", options.expect, "End the run as passed when the console prints this")
        ->type_name("TEXT");
    run->add_option_function<std::string>(
           "--engine",
           [&options](const std::string& name) {
               options.engine = name == "native" ? EngineKind::native : EngineKind::shadow;
           },
           "shadow: deprivileged, on shadow page tables; native: at ring 0, on KVM's own MMU")
        ->check(CLI::IsMember({"shadow", "native"}))
        ->default_str("shadow")
        ->type_name("ENGINE");
    // A flag that takes a value, not an option, which would take the kernel's name for it.
    const std::string about_stats =
        "Tell afterwards what the run cost, on standard error: --stats or --stats=json";
    run->add_flag("--stats", about_stats)
        ->check(CLI::IsMember({"true", "text", "json"}).description("")) // "true": no value
        ->each([&options](const std::string& format) {
            options.stats = format == "json" ? StatsFormat::json : StatsFormat::text;
        });
    run->add_option(
           "--cpu", options.cpu,
           "Features that the guest's CPU shall have or not: +NAME and -NAME, separated by commas, of " +
               umbra::cpu_feature_names())
        ->type_name("FEATURES");
    run->add_option("--trace", options.trace, "Write every trap to a file, one line each")->type_name("FILE");
    run->add_option("--log-level", options.log_level, "How much umbra itself says, on standard error")
        ->check(CLI::IsMember({"debug", "info", "warning", "error", "off"}))
        ->capture_default_str()
        ->type_name("LEVEL");
    run->add_flag("--qemu-exit", options.qemu_exit,
                  "Exit with (value << 1) | 1 for a value written to port 0xf4 or 0x501, as QEMU does");
    run->add_option("--core-on-failure", options.core_on_failure,
                    "Write the memory and registers of a guest that does not pass to a file that gdb opens")
        ->type_name("FILE");
    run->add_option(
           "--gdb-arch", options.gdb_arch,
           "Whose registers gdb and LLDB are told of [x86-64 for a 64-bit ELF, else as the CPU's mode]")
        ->check(CLI::IsMember({"i386", "x86-64"}))
        ->type_name("ARCH")
        ->group("Debugging");
    add_loader_options(*run, options);
    add_platform_options(*run, options);
    add_shadow_options(*run, options);
}

CLI::App* add_run(CLI::App& app, RunOptions& options) {
    CLI::App* run = app.add_subcommand("run", "Run a guest kernel");
    add_guest_options(run, options);
    run->add_option_function<std::string>(
           "--display", [&options](const std::string& what) { options.display = what == "text"; },
           "text: show the guest's VGA text screen on this terminal, where the serial console is not then")
        ->check(CLI::IsMember({"text", "none"}))
        ->default_str("none")
        ->type_name("WHAT")
        ->group("Platform");
    run->add_option("--result", options.result,
                    "Write how the run ended, and its --stats, to a file, as one JSON object: for programs")
        ->type_name("FILE");
    run->add_flag("--keyboard", options.keyboard,
                  "Type standard input on the guest's keyboard, not into its serial port")
        ->group("Platform");
    run->add_option(
           "--gdb", options.gdb,
           "Serve gdb's and LLDB's remote protocol at [HOST:]PORT or unix:PATH; without a host, only to "
           "this computer")
        ->type_name("ADDRESS")
        ->group("Debugging");
    run->add_flag("--pause", options.pause, "Wait for the debugger before the guest's first instruction")
        ->group("Debugging");
    return run;
}

CLI::App* add_debug(CLI::App& app, DebugOptions& options) {
    CLI::App* debug = app.add_subcommand("debug", "Run a guest kernel under gdb, in this terminal");
    add_guest_options(debug, options.run);
    debug
        ->add_option("--symbols", options.symbols,
                     "The file with the kernel's symbols, if that is another one")
        ->type_name("FILE")
        ->group("Debugging");
    debug->add_option("--command", options.commands, "A gdb command, once gdb is connected; may be repeated")
        ->type_name("COMMAND")
        ->allow_extra_args(false)
        ->group("Debugging");
    return debug;
}

constexpr const char* test_exit_codes = R"(Exit codes:
  0    every case ran and passed
  1    a case failed, or did not run because another had, or the results could not be written
  2    bad usage, a mistake in a manifest, or no case is left to run
  4    nothing failed, but this host could not run some cases (see --allow-skips)
  130  interrupted (Ctrl-C))";

void add_test_selection(CLI::App& test, TestOptions& options) {
    constexpr const char* group = "Which cases";
    test.add_option(
            "--filter", options.filters,
            "Cases whose name, or its part behind a '/', is like this: * stands for any characters, ? "
            "for one; --filter=-PATTERN leaves them out; may be repeated")
        ->type_name("PATTERN")
        ->allow_extra_args(false)
        ->group(group);
    test.add_option("--tag", options.tags,
                    "Cases with a tag like this, or with --tag=-PATTERN without; may be repeated")
        ->type_name("PATTERN")
        ->allow_extra_args(false)
        ->group(group);
    test.add_option("--shard", options.shard,
                    "Share the cases among N machines: run part I of N, from 1. Which part a case is in "
                    "depends on its name alone")
        ->type_name("I/N")
        ->group(group);
    test.add_option("--shuffle", options.shuffle,
                    "Run them in another order: a number that stands for one, or random")
        ->type_name("SEED")
        ->group(group);
    const std::string about_list = "Tell which cases there are, and run nothing: --list or --list=json";
    test.add_flag("--list", about_list)
        ->check(CLI::IsMember({"true", "names", "json"}).description("")) // "true": no value
        ->each([&options](const std::string& format) {
            options.list = format == "json" ? ListFormat::json : ListFormat::names;
        })
        ->group(group);
}

void add_test_results(CLI::App& test, TestOptions& options) {
    constexpr const char* group = "Results";
    test.add_option("-o,--output", options.output,
                    "Folder for a folder of each failed case, with its console, a trap trace, the memory and "
                    "scripts that run it again; or none")
        ->capture_default_str()
        ->type_name("DIR")
        ->group(group);
    test.add_flag("--keep-passed", options.keep_passed, "A folder for cases that passed, too")->group(group);
    test.add_flag("--trace,!--no-trace", options.trace,
                  "Whether there are trap traces in these folders [yes]")
        ->group(group);
    test.add_flag("--core,!--no-core", options.core,
                  "Whether the memory and registers of a guest that failed are kept, for gdb [yes]")
        ->group(group);
    test.add_option("--junit", options.junit, "Write JUnit XML at the end; - is standard output")
        ->type_name("FILE")
        ->group(group);
    test.add_option("--tap", options.tap, "Write TAP 14 (Test Anything Protocol); - is standard output")
        ->type_name("FILE")
        ->group(group);
    test.add_option("--json", options.json, "Write a line of JSON for each event; - is standard output")
        ->type_name("FILE")
        ->group(group);
    test.add_flag("--github", options.github, "Print annotations for GitHub Actions")->group(group);
}

CLI::App* add_test(CLI::App& app, TestOptions& options) {
    CLI::App* test = app.add_subcommand("test", "Run regression guests, and tell which did as expected");
    test->footer(test_exit_codes);
    test->add_option("paths", options.paths,
                     "Manifests (umbra.toml), folders in which they are looked for, or kernels, which shall "
                     "just pass [the current folder]")
        ->type_name("PATH");
    test->add_flag("--init", options.init, "Write an example of a manifest to umbra.toml, and run nothing");
    constexpr const char* group = "How they run";
    test->add_option("-j,--jobs", options.jobs,
                     "Guests at a time, if memory allows [as many as there are cores]")
        ->check(CLI::Range(1U, 10'000U).description(""))
        ->type_name("N")
        ->group(group);
    test->add_option("--memory", options.memory,
                     "Memory that all guests may have at a time, e.g. 4G [what is available]")
        ->type_name("SIZE")
        ->group(group);
    CLI::Option* repeat =
        test->add_option("--repeat", options.repeat, "Run each case so often, and tell how often it passed")
            ->check(CLI::Range(1U, 1'000'000U).description(""))
            ->type_name("N")
            ->group(group);
    test->add_flag("--until-failure", options.until_failure, "Run all cases again and again, until one fails")
        ->excludes(repeat)
        ->group(group);
    test->add_flag("--fail-fast", options.fail_fast, "Start nothing more once a case has failed")
        ->group(group);
    test->add_flag("--allow-skips", options.allow_skips,
                   "Cases that this host cannot run do not change the exit code")
        ->group(group);
    add_test_selection(*test, options);
    add_test_results(*test, options);
    return test;
}

/// Where the guests run.
void add_host_option(CLI::App* command, std::string& host) {
    command
        ->add_option("--host", host,
                     "Where: kvm, this computer's; emulated, in a machine in QEMU's emulation that has KVM, "
                     "kind A or, "
                     "emulated:B, without nested paging; auto: as there is KVM or not [$UMBRA_HOST, or auto]")
        ->type_name("HOST");
}

/// `umbra exec`
struct ExecOptions {
    std::vector<std::string> command;
    std::string memory = "2G";
    unsigned processors = 1;
    bool counted = false;
};

CLI::App* add_exec(CLI::App& app, ExecOptions& options) {
    CLI::App* exec = app.add_subcommand("exec", "Run a program where guests would run: on an emulated host");
    exec->add_option("command", options.command, "The program and its arguments (after --)")
        ->required()
        ->type_name("COMMAND");
    exec->add_option("-m,--memory", options.memory, "Memory of the emulated host for it")
        ->capture_default_str()
        ->type_name("SIZE");
    exec->add_option("--processors", options.processors,
                     "The emulated host's processors; more than one now and then hang in QEMU 7.2")
        ->capture_default_str()
        ->check(CLI::Range(1U, most_processors).description(""))
        ->type_name("N");
    exec->add_flag(
        "--counted", options.counted,
        "The emulated host's clock counts its instructions, a nanosecond each; it has one processor");
    exec->footer(R"(Exit codes: the program's, and
  2    bad usage
  3    the emulated host went down under the program
  4    the emulated host could not be started
  130  interrupted before it was up)");
    return exec;
}

/// As this process was started.
std::vector<std::string> this_command(int argc, char** argv) {
    std::vector<std::string> command(argv, argv + argc);
    command.front() = std::filesystem::read_symlink("/proc/self/exe");
    return command;
}

/// What a run takes at most: shadow tables, and what KVM and umbra keep for each page, beside the guest's
/// own.
std::uint64_t guest_memory(const RunOptions& options) {
    const std::uint64_t memory = umbra::parse_memory_size(options.memory);
    return memory + memory / 8;
}

/// On the emulated host or, if umbra would run guests itself, here.
int run_program(const std::optional<umbra::EmulatedHost>& host, ExecOptions options) {
    if (!host) {
        std::vector<char*> arguments;
        for (std::string& argument : options.command)
            arguments.push_back(argument.data());
        arguments.push_back(nullptr);
        ::execvp(arguments.front(), arguments.data());
        throw umbra::StartupError(
            ExitCode::bad_usage,
            fmt::format("cannot run '{}': {}", options.command.front(), std::strerror(errno)));
    }
    return umbra::run_on_emulated_host(*host, {.command = std::move(options.command),
                                               .memory_bytes = umbra::parse_memory_size(options.memory),
                                               .processors = options.counted ? 1 : options.processors,
                                               .counted = options.counted});
}

/// Everything that may throw.
int launch(int argc, char** argv) {
    CLI::App app("umbra runs x86-64 kernels deprivileged, on software shadow page tables");
    app.name("umbra");
    app.set_version_flag("--version", "umbra " UMBRA_VERSION);
    app.require_subcommand(1);
    app.failure_message([](const CLI::App* failed, const CLI::Error& error) {
        const std::vector<std::string> unknown = failed->remaining();
        const std::string what = error.get_name() == "RequiredError" && !unknown.empty()
                                     ? fmt::format("'{}' is no subcommand", unknown.front())
                                     : error.what();
        return fmt::format("umbra: {} (see {} --help)\n", what, failed->get_name());
    });
    RunOptions run_options;
    (void)add_run(app, run_options);
    DebugOptions debug_options;
    const CLI::App* debug = add_debug(app, debug_options);
    TestOptions test_options;
    const CLI::App* test = add_test(app, test_options);
    CLI::App* report =
        app.add_subcommand("report", "Make one HTML page of what umbra test has left in a folder");
    std::string results = TestOptions().output, page;
    report->add_option("folder", results, "The folder")->capture_default_str()->type_name("DIR");
    report->add_option("-o,--output", page, "The page [DIR/report.html]")->type_name("FILE");
    CLI::App* probe =
        app.add_subcommand("probe", "Tell what kind of KVM host this is, and what that means for guests");
    bool json = false;
    probe->add_flag("--json", json, "For programs");
    CLI::App* inspect =
        app.add_subcommand("inspect", "Tell how a kernel file can be loaded, and what is in it");
    ExecOptions exec_options;
    const CLI::App* exec = add_exec(app, exec_options);
    std::string host_choice;
    for (CLI::App* const command : app.get_subcommands(
             [](const CLI::App* one) { return one->get_name() != "inspect" && one->get_name() != "report"; }))
        add_host_option(command, host_choice);
    std::string inspected;
    inspect->add_option("kernel", inspected, "The file")->required()->type_name("KERNEL");

    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
        return app.exit(error) == 0 ? 0 : static_cast<int>(ExitCode::bad_usage);
    }
    umbra::set_up_log(debug->parsed() ? debug_options.run.log_level : run_options.log_level);
    if (inspect->parsed())
        return umbra::inspect_command(inspected);
    if (report->parsed())
        return umbra::report_command(results, page);
    if (test->parsed() && !umbra::runs_guests(test_options))
        return umbra::test_command(test_options);

    const auto host = umbra::choose_host(host_choice);
    if (exec->parsed())
        return run_program(host, std::move(exec_options));
    Errand errand{.command = this_command(argc, argv)};
    if (debug->parsed()) {
        errand.memory_bytes = guest_memory(debug_options.run);
        const auto run_there = [&](const RunOptions& options) {
            errand.input = false;
            errand.debuggers = options.gdb;
            errand.debugger_ready = options.debugger_ready;
            return umbra::run_on_emulated_host(*host, errand);
        };
        return host ? umbra::debug_command(std::move(debug_options), run_there)
                    : umbra::debug_command(std::move(debug_options));
    }
    if (test->parsed()) {
        errand.input = false;
        errand.memory_bytes = std::uint64_t{3} << 30;
        if (!host)
            (void)umbra::Kvm(); // where there is none, this says so once
        return host ? umbra::run_on_emulated_host(*host, errand) : umbra::test_command(test_options);
    }
    if (probe->parsed()) {
        errand.input = false;
        return host ? umbra::run_on_emulated_host(*host, errand) : umbra::probe_command(json);
    }
    if (!host)
        return umbra::run_command(run_options);
    errand.input = umbra::reads_input(run_options);
    errand.memory_bytes = guest_memory(run_options);
    errand.debuggers = run_options.gdb;
    return umbra::run_on_emulated_host(*host, errand);
}

/// Puts something in place of each of standard input, output and error that is closed: a file opened later
/// would get its number, and what is meant for a terminal would go there. As from a closed one, nothing can
/// be read from it or written to it.
bool hold_standard_files() {
    for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
        const int useless = fd == STDIN_FILENO ? O_WRONLY : O_RDONLY;
        if (::fcntl(fd, F_GETFD) < 0 && ::open("/dev/null", useless) != fd) // the lowest free number
            return false;
    }
    return true;
}

/// The exit code of this process: `code`, unless that is 0 and what was to be told was not.
int after_output(int code) {
    const bool failed_before = std::ferror(stdout) != 0; // for a reason that is not known any more
    if (std::fflush(stdout) == 0 && !failed_before)
        return code;
    (void)std::fprintf(stderr, "umbra: cannot write to standard output%s%s\n", failed_before ? "" : ": ",
                       failed_before ? "" : std::strerror(errno));
    return code != 0 ? code : static_cast<int>(ExitCode::bad_usage);
}

} // namespace

int main(int argc, char** argv) {
    if (!hold_standard_files())
        return static_cast<int>(ExitCode::host_cannot);
    // A write that nobody reads, or to a file that may not grow, fails, which is enough.
    (void)std::signal(SIGPIPE, SIG_IGN);
    (void)std::signal(SIGXFSZ, SIG_IGN);
    try {
        return after_output(launch(argc, argv));
    } catch (const umbra::StartupError& error) {
        (void)std::fprintf(stderr, "umbra: %s\n", error.what());
        return static_cast<int>(error.code());
    } catch (const std::exception& error) { // out of memory and the like
        (void)std::fprintf(stderr, "umbra: %s\n", error.what());
        return static_cast<int>(ExitCode::host_cannot);
    }
}
