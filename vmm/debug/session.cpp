#include "vmm/debug/session.hpp"

#include "vmm/debug/agent.hpp"
#include "vmm/log.hpp"
#include "vmm/machine.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <functional>
#include <tuple>

#include <fmt/core.h>

namespace umbra {
namespace {

// GDB's own numbering of signals (include/gdb/signals.def).
constexpr unsigned signal_int = 2, signal_ill = 4, signal_trap = 5, signal_abort = 6, signal_fpe = 8,
                   signal_bus = 10, signal_segv = 11;

// Errors have no defined numbers; these are Linux', as gdbserver sends them.
constexpr const char *bad_packet = "E16", *bad_address = "E0e", *refused = "E01", *too_much = "E0c";

constexpr std::size_t longest_read = PacketParser::max_payload / 2;

unsigned signal_of(const Stop& stop) {
    switch (stop.kind) {
    case Stop::Kind::request:
        return signal_int;
    case Stop::Kind::step:
    case Stop::Kind::breakpoint:
    case Stop::Kind::watchpoint:
        return signal_trap;
    case Stop::Kind::ended:
        return signal_abort;
    case Stop::Kind::event:
        break;
    }
    if (!stop.vector)
        return signal_trap;
    switch (static_cast<Vector>(*stop.vector)) {
    case Vector::divide_error:
    case Vector::x87:
    case Vector::simd:
        return signal_fpe;
    case Vector::invalid_opcode:
        return signal_ill;
    case Vector::general_protection:
    case Vector::page_fault:
    case Vector::bound:
        return signal_segv;
    case Vector::double_fault:
    case Vector::invalid_tss:
    case Vector::segment_not_present:
    case Vector::stack_fault:
    case Vector::alignment_check:
    case Vector::machine_check:
        return signal_bus;
    case Vector::debug:
    case Vector::breakpoint:
    case Vector::nmi:
    case Vector::overflow:
    case Vector::device_not_available:
        return signal_trap;
    }
    return signal_trap; // an interrupt
}

const char* watch_name(WatchKind kind) {
    switch (kind) {
    case WatchKind::write:
        return "watch";
    case WatchKind::read:
        return "rwatch";
    case WatchKind::access:
        return "awatch";
    }
    __builtin_unreachable();
}

/// What `qXfer` answers for a part of a text.
std::string part_of(std::string_view text, Cursor arguments) {
    const auto offset = arguments.hex();
    const bool comma = arguments.take(',');
    const auto length = arguments.hex();
    if (!offset || !comma || !length)
        return bad_packet;
    if (*offset > text.size())
        return bad_packet;
    const std::string_view part = text.substr(*offset, std::min<std::uint64_t>(*length, longest_read));
    const bool last = *offset + part.size() == text.size();
    return (last ? 'l' : 'm') + std::string(part);
}

/// The checksum of GDB's `compare-sections`: CRC-32 with the most significant bit first, from all ones.
std::uint32_t crc32(std::uint32_t crc, std::span<const std::byte> bytes) {
    constexpr std::uint32_t polynomial = 0x04c1'1db7;
    for (const std::byte byte : bytes) {
        crc ^= std::to_integer<std::uint32_t>(byte) << 24;
        for (unsigned bit = 0; bit < 8; ++bit)
            crc = crc << 1 ^ ((crc >> 31) != 0 ? polynomial : 0);
    }
    return crc;
}

} // namespace

GdbSession::GdbSession(GdbServer& server, const Symbols& symbols, Config config)
    : server_(server), symbols_(symbols), config_(config), pause_(config.pause),
      registers_(TargetWidth::bits_64) {}

void GdbSession::attach(Debugger* debugger) {
    debugger_ = debugger;
    reset_asked_ = false;
}

// --- The guest's comings and goings

/// Not beyond a client's end before that is handled: from then on, answers go to the next one.
void GdbSession::take_events() {
    while (events_.empty() || events_.back().kind != ServerEvent::Kind::disconnected) {
        auto event = server_.next();
        if (!event)
            return;
        events_.push_back(std::move(*event));
    }
}

bool GdbSession::poll() {
    take_events();
    return !events_.empty();
}

void GdbSession::stopped(const Stop& stop) {
    stop_ = stop;
    if (client_waits_ && stop.kind != Stop::Kind::request)
        report_stop();
}

DebugFrontend::Serve GdbSession::serve() {
    take_events();
    while (!events_.empty()) {
        const ServerEvent event = std::move(events_.front());
        events_.pop_front();
        if (const auto next = handle(event))
            return *next;
        if (events_.empty())
            take_events();
    }
    // What came was nothing that stops the guest; or the client has gone.
    return client_waits_ || (!connected_ && !pause_) ? Serve::resume : Serve::waiting;
}

std::optional<DebugFrontend::Serve> GdbSession::handle(const ServerEvent& event) {
    switch (event.kind) {
    case ServerEvent::Kind::connected:
        log_debug("a debugger is attached: {}", event.payload);
        connected_ = true;
        client_waits_ = physical_ = pause_ = false;
        set_width();
        return std::nullopt;
    case ServerEvent::Kind::interrupt:
        if (client_waits_)
            report_stop();
        return std::nullopt;
    case ServerEvent::Kind::disconnected:
        connected_ = client_waits_ = false;
        debugger_->clear();
        debugger_->resume({});
        return config_.leave_with_client ? Serve::kill : Serve::resume;
    case ServerEvent::Kind::packet:
        return handle_packet(event.payload);
    }
    __builtin_unreachable();
}

DebugFrontend::Serve GdbSession::go_on(Resume how) {
    debugger_->resume(how);
    client_waits_ = true;
    return Serve::resume;
}

void GdbSession::report_stop() {
    if (!stop_.text.empty())
        print(fmt::format("umbra: {}\n", stop_.text));
    client_waits_ = false;
    server_.reply(stop_reply());
}

std::string GdbSession::stop_reply() const {
    std::string reply = fmt::format("T{:02x}thread:1;", signal_of(stop_));
    switch (stop_.kind) {
    case Stop::Kind::breakpoint:
        reply += stop_.breakpoint == BreakpointKind::software ? "swbreak:;" : "hwbreak:;";
        break;
    case Stop::Kind::watchpoint:
        if (stop_.physical) // gdb drops what it has not asked for
            break;
        reply += fmt::format("{}:{:x};", watch_name(stop_.watch), stop_.address.value());
        break;
    case Stop::Kind::request:
    case Stop::Kind::step:
    case Stop::Kind::event:
    case Stop::Kind::ended:
        break;
    }
    return reply + registers_.expedited(debugger_->cpu());
}

/// Shown by gdb while it waits for the guest to stop.
void GdbSession::print(std::string_view text) {
    if (client_waits_)
        server_.reply("O" + to_hex(text));
}

void GdbSession::ended(const Verdict& verdict) {
    if (!client_waits_ || verdict.kind == Verdict::Kind::restart)
        return;
    print(fmt::format("umbra: {}\n", describe(verdict)));
    client_waits_ = false;
    server_.reply(fmt::format("W{:02x}", static_cast<unsigned>(exit_code(verdict))));
}

// --- Packets

std::optional<DebugFrontend::Serve> GdbSession::handle_packet(std::string_view payload) {
    if (payload.empty()) {
        server_.reply("");
        return std::nullopt;
    }
    Cursor arguments(payload.substr(1));
    std::string reply; // empty: not supported
    switch (payload.front()) {
    case '?':
        reply = stop_reply();
        break;
    case 'c':
    case 'C':
    case 's':
    case 'S':
        return handle_resume(payload);
    case 'D':
        debugger_->clear();
        debugger_->resume({});
        server_.reply("OK");
        server_.disconnect();
        connected_ = client_waits_ = false;
        return config_.leave_with_client ? Serve::kill : Serve::resume;
    case 'k':
        return Serve::kill;
    case 'g':
        reply = registers_.read_all({debugger_->cpu(), extended()});
        break;
    case 'G':
        reply =
            edit_registers([&](const CpuEdit& edit) { return registers_.write_all(arguments.rest(), edit); });
        break;
    case 'p':
        reply = answer_register(arguments);
        break;
    case 'P':
        reply = write_register(arguments);
        break;
    case 'm':
        reply = read_memory(arguments);
        break;
    case 'M':
    case 'X': {
        const auto at = arguments.hex();
        const bool comma = arguments.take(',');
        const auto size = arguments.hex();
        const bool colon = arguments.take(':');
        if (!at || !comma || !size || !colon) {
            reply = bad_packet;
            break;
        }
        const std::string_view data = arguments.rest();
        const auto bytes = payload.front() == 'M'
                               ? from_hex(data)
                               : std::optional(std::vector<std::byte>(
                                     reinterpret_cast<const std::byte*>(data.data()),
                                     reinterpret_cast<const std::byte*>(data.data() + data.size())));
        reply = bytes && bytes->size() == *size ? write_memory(GuestVirt(*at), *bytes) : bad_packet;
        break;
    }
    case 'H':
    case 'T': // the one vCPU
        reply = "OK";
        break;
    case 'z':
    case 'Z':
        reply = change_point(payload, payload.front() == 'Z');
        break;
    case 'v':
        if (payload == "vCont?") {
            reply = "vCont;c;C;s;S;r";
        } else if (payload.starts_with("vCont;")) {
            return handle_resume(payload.substr(std::string_view("vCont;").size()));
        } else if (payload.starts_with("vKill")) {
            server_.reply("OK");
            return Serve::kill;
        }
        break;
    case 'q':
    case 'Q':
        reply = query(payload);
        break;
    default:
        break;
    }
    server_.reply(reply);
    if (std::exchange(reset_asked_, false))
        return Serve::reset;
    if (std::exchange(quit_asked_, false))
        return Serve::kill;
    return std::nullopt;
}

/// One action, or the first of several: there is one thread. `c`, `s`, `C sig`, `S sig`, `r start,end`; with
/// `;address` or `:thread` after it.
std::optional<DebugFrontend::Serve> GdbSession::handle_resume(std::string_view actions) {
    Cursor cursor(actions);
    Resume how;
    const bool passes = actions.starts_with('C') || actions.starts_with('S');
    if (actions.starts_with('s') || actions.starts_with('S') || actions.starts_with('r'))
        how.kind = Resume::Kind::step;
    const std::string_view action = actions.substr(1);
    Cursor arguments(action);
    if (actions.starts_with('r')) {
        const auto start = arguments.hex();
        const bool comma = arguments.take(',');
        const auto end = arguments.hex();
        if (!start || !comma || !end) {
            server_.reply(bad_packet);
            return std::nullopt;
        }
        how.range_start = GuestVirt(*start);
        how.range_end = GuestVirt(*end);
    } else if (passes && !arguments.hex()) {
        server_.reply(bad_packet);
        return std::nullopt;
    }
    // What stopped as a signal is taken back by the user if it is not passed on: gdb's `signal 0`.
    how.drop_event = stop_.kind == Stop::Kind::event && signal_of(stop_) != signal_trap && !passes;
    return go_on(how);
}

// --- Registers

/// When the client connects, and when it reads the description of the registers, after which it means these.
void GdbSession::set_width() {
    const bool long_mode = (debugger_->cpu().efer & efer::lma) != 0;
    registers_ = RegisterSet(config_.width.value_or(long_mode ? TargetWidth::bits_64 : TargetWidth::bits_32),
                             __builtin_cpu_supports("avx") != 0);
}

std::optional<std::uint64_t> GdbSession::read_register(unsigned number) const {
    return registers_.value(number, debugger_->cpu());
}

ExtendedState GdbSession::extended() const {
    return debugger_->vcpu().read_extended().value_or(ExtendedState());
}

std::string GdbSession::answer_register(Cursor arguments) {
    const auto number = arguments.hex();
    if (!number)
        return bad_packet;
    const std::string value = registers_.read(*number, {debugger_->cpu(), extended()});
    return value.empty() ? refused : value;
}

std::string GdbSession::write_register(Cursor arguments) {
    const auto number = arguments.hex();
    if (!number || !arguments.take('='))
        return bad_packet;
    return edit_registers(
        [&](const CpuEdit& edit) { return registers_.write(*number, arguments.rest(), edit); });
}

std::string GdbSession::edit_registers(const std::function<bool(const CpuEdit&)>& edit) {
    VirtualCpu& cpu = debugger_->cpu();
    const VirtualCpu cpu_before = cpu;
    const ExtendedState before = extended();
    ExtendedState after = before;
    const auto paging_before = std::tuple(cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer);
    const CpuFeatures& features = engine_->features();
    if (!edit({cpu, after, features.cr4, features.physical_bits}))
        return refused;
    if (after != before && !debugger_->vcpu().write_extended(after)) {
        cpu = cpu_before;
        return refused;
    }
    if (paging_before != std::tuple(cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer)) {
        if (const auto pdptes = load_pdptes(debugger_->memory(), cpu.cr3, features.physical_bits))
            cpu.pdptes = *pdptes;
        debugger_->mmu().set_paging(engine_->paging());
        debugger_->mmu().reset();
    }
    return "OK";
}

// --- Memory

std::size_t GdbSession::read(std::uint64_t at, std::span<std::byte> into) {
    return physical_ ? debugger_->read(GuestPhys(at), into) : debugger_->read(GuestVirt(at), into);
}

std::size_t GdbSession::write(std::uint64_t at, std::span<const std::byte> from) {
    return physical_ ? debugger_->write(GuestPhys(at), from) : debugger_->write(GuestVirt(at), from);
}

std::string GdbSession::read_memory(Cursor arguments) {
    const auto at = arguments.hex();
    const bool comma = arguments.take(',');
    const auto size = arguments.hex();
    if (!at || !comma || !size || !arguments.empty())
        return bad_packet;
    std::vector<std::byte> bytes(std::min<std::uint64_t>(*size, longest_read));
    bytes.resize(read(*at, bytes));
    return bytes.empty() && *size != 0 ? bad_address : to_hex(bytes);
}

/// All of it or nothing, as far as that can be told beforehand.
std::string GdbSession::write_memory(GuestVirt at, std::span<const std::byte> bytes) {
    std::vector<std::byte> there(bytes.size());
    if (read(at.value(), there) != bytes.size())
        return bad_address;
    return write(at.value(), bytes) == bytes.size() ? "OK" : bad_address;
}

/// qSearch:memory:ADDRESS;LENGTH;PATTERN, the pattern in binary.
std::string GdbSession::search_memory(std::string_view text) {
    Cursor arguments(text);
    const auto at = arguments.hex();
    const bool first = arguments.take(';');
    const auto length = arguments.hex();
    const bool second = arguments.take(';');
    const std::string_view wanted = arguments.rest();
    if (!at || !first || !length || !second || wanted.empty())
        return bad_packet;
    const auto pattern = std::as_bytes(std::span(wanted));
    std::vector<std::byte> window(64 * page_size + pattern.size());
    for (std::uint64_t done = 0; done + pattern.size() <= *length;) {
        const std::uint64_t size = std::min<std::uint64_t>(window.size(), *length - done);
        const std::size_t got = read(*at + done, std::span(window).first(size));
        const auto found = std::search(window.begin(), window.begin() + static_cast<std::ptrdiff_t>(got),
                                       pattern.begin(), pattern.end());
        if (found != window.begin() + static_cast<std::ptrdiff_t>(got))
            return fmt::format("1,{:x}", *at + done + static_cast<std::uint64_t>(found - window.begin()));
        if (got < size)
            return done + got == 0 ? bad_address : "0";
        done += size - (pattern.size() - 1);
        if (size < window.size())
            break;
    }
    return "0";
}

/// qCRC:ADDRESS,LENGTH.
std::string GdbSession::checksum_memory(Cursor arguments) {
    const auto at = arguments.hex();
    const bool comma = arguments.take(',');
    const auto length = arguments.hex();
    if (!at || !comma || !length)
        return bad_packet;
    std::uint32_t crc = ~std::uint32_t{0};
    std::array<std::byte, page_size> page{};
    for (std::uint64_t done = 0; done < *length;) {
        const auto part = std::span(page).first(std::min<std::uint64_t>(page.size(), *length - done));
        if (read(*at + done, part) != part.size())
            return bad_address;
        crc = crc32(crc, part);
        done += part.size();
    }
    return fmt::format("C{:x}", crc);
}

// --- Breakpoints and watchpoints

std::string GdbSession::change_point(std::string_view payload, bool insert) {
    Cursor arguments(payload.substr(1));
    const auto type = arguments.hex();
    const bool first = arguments.take(',');
    const auto at = arguments.hex();
    const bool second = arguments.take(',');
    const auto size = arguments.hex();
    if (!type || !first || !at || !second || !size)
        return bad_packet;
    const GuestVirt address(*at);
    if (*type <= 1) {
        const auto kind = *type == 0 ? BreakpointKind::software : BreakpointKind::hardware;
        if (!insert) {
            debugger_->remove(kind, address);
            return "OK";
        }
        const auto lists = parse_point_lists(arguments.rest());
        if (!lists)
            return bad_packet;
        debugger_->insert({kind, address, lists->conditions, lists->commands});
        return "OK";
    }
    constexpr std::array kinds{WatchKind::write, WatchKind::read, WatchKind::access};
    if (*type - 2 >= kinds.size())
        return {};
    const WatchKind kind = kinds[*type - 2];
    if (!insert) {
        debugger_->unwatch(kind, address, *size);
        return "OK";
    }
    return debugger_->watch(kind, address, *size) ? "OK" : too_much;
}

// --- Queries

std::string GdbSession::query(std::string_view payload) {
    Cursor cursor(payload);
    if (cursor.take("qSupported"))
        return fmt::format(
            "PacketSize={:x};QStartNoAckMode+;qXfer:features:read+;vContSupported+;swbreak+;hwbreak+;"
            "ConditionalBreakpoints+;BreakpointCommands+",
            PacketParser::max_payload);
    if (cursor.take("qXfer:features:read:target.xml:")) {
        if (cursor.rest().starts_with("0,"))
            set_width();
        return part_of(registers_.target_xml(), cursor);
    }
    if (cursor.take("qRcmd,")) {
        const auto line = text_from_hex(cursor.rest());
        if (!line)
            return bad_packet;
        // In pieces that fit into a packet; the last one is the answer.
        std::string text = command(*line);
        constexpr std::size_t piece = PacketParser::max_payload / 4;
        for (; text.size() > piece; text.erase(0, piece))
            server_.reply("O" + to_hex(std::string_view(text).substr(0, piece)));
        return text.empty() ? "OK" : to_hex(text);
    }
    if (cursor.take("qSearch:memory:"))
        return search_memory(cursor.rest());
    if (cursor.take("qCRC:"))
        return checksum_memory(cursor);
    if (payload == "qfThreadInfo")
        return "m1";
    if (payload == "qsThreadInfo")
        return "l";
    if (payload == "qC")
        return "QC1";
    if (cursor.take("qThreadExtraInfo,")) {
        const VirtualCpu& cpu = debugger_->cpu();
        return to_hex(
            fmt::format("vCPU 0, {}{}", cpu.cpl == 3 ? "user" : "kernel", cpu.halted ? ", halted" : ""));
    }
    if (cursor.take("qAttached"))
        return "1";
    if (cursor.take("qSymbol"))
        return "OK";
    if (payload == "qqemu.PhyMemMode")
        return physical_ ? "1" : "0";
    if (cursor.take("Qqemu.PhyMemMode:")) {
        physical_ = cursor.rest() != "0";
        return "OK";
    }
    if (payload == "qHostInfo" || payload == "qProcessInfo") {
        const std::string triple =
            registers_.width() == TargetWidth::bits_64 ? "x86_64-unknown-none" : "i386-unknown-none";
        return fmt::format("{}triple:{};endian:little;ptrsize:{};", payload == "qProcessInfo" ? "pid:1;" : "",
                           to_hex(triple), registers_.width() == TargetWidth::bits_64 ? 8 : 4);
    }
    return {};
}

} // namespace umbra
