// Reading order: report() at the end, then its sections, which are in the order of the page.
#include "vmm/report.hpp"

#include "vmm/disassembler.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <set>
#include <span>
#include <tuple>
#include <utility>

#include <Zydis/Zydis.h>
#include <fmt/core.h>

namespace umbra {
namespace {

using namespace std::string_view_literals;

constexpr std::size_t longest_instruction = 15;

/// The page that is being written.
class Text {
  public:
    template<class... Args>
    void line(fmt::format_string<Args...> format, Args&&... args) {
        std::string text = fmt::format(format, std::forward<Args>(args)...);
        text.resize(text.find_last_not_of(' ') + 1);
        text_ += text + '\n';
    }
    [[nodiscard]] std::string take() { return std::move(text_); }

  private:
    std::string text_;
};

// ---- words

struct Flag {
    std::uint64_t bit;
    std::string_view name;
};

constexpr std::array rflags_names{
    Flag{1U << 0, "CF"},  Flag{1U << 2, "PF"},   Flag{1U << 4, "AF"},   Flag{1U << 6, "ZF"},
    Flag{1U << 7, "SF"},  Flag{1U << 8, "TF"},   Flag{1U << 9, "IF"},   Flag{1U << 10, "DF"},
    Flag{1U << 11, "OF"}, Flag{1U << 14, "NT"},  Flag{1U << 16, "RF"},  Flag{1U << 17, "VM"},
    Flag{1U << 18, "AC"}, Flag{1U << 19, "VIF"}, Flag{1U << 20, "VIP"}, Flag{1U << 21, "ID"},
};
constexpr std::array cr0_names{
    Flag{cr0::pe, "PE"}, Flag{cr0::mp, "MP"}, Flag{cr0::em, "EM"}, Flag{cr0::ts, "TS"},
    Flag{cr0::et, "ET"}, Flag{cr0::ne, "NE"}, Flag{cr0::wp, "WP"}, Flag{cr0::am, "AM"},
    Flag{cr0::nw, "NW"}, Flag{cr0::cd, "CD"}, Flag{cr0::pg, "PG"},
};
constexpr std::array cr4_names{
    Flag{cr4::vme, "VME"},
    Flag{cr4::pvi, "PVI"},
    Flag{cr4::tsd, "TSD"},
    Flag{cr4::de, "DE"},
    Flag{cr4::pse, "PSE"},
    Flag{cr4::pae, "PAE"},
    Flag{cr4::mce, "MCE"},
    Flag{cr4::pge, "PGE"},
    Flag{cr4::pce, "PCE"},
    Flag{cr4::osfxsr, "OSFXSR"},
    Flag{cr4::osxmmexcpt, "OSXMMEXCPT"},
    Flag{cr4::umip, "UMIP"},
    Flag{cr4::la57, "LA57"},
    Flag{cr4::fsgsbase, "FSGSBASE"},
    Flag{cr4::pcide, "PCIDE"},
    Flag{cr4::osxsave, "OSXSAVE"},
    Flag{cr4::smep, "SMEP"},
    Flag{cr4::smap, "SMAP"},
    Flag{cr4::pke, "PKE"},
};
constexpr std::array efer_names{
    Flag{efer::sce, "SCE"},
    Flag{efer::lme, "LME"},
    Flag{efer::lma, "LMA"},
    Flag{efer::nxe, "NXE"},
};

/// The names of the bits that are set, and what has no name as a number.
std::string words(std::uint64_t value, std::span<const Flag> names) {
    std::string text;
    for (const Flag& flag : names) {
        if ((value & flag.bit) != 0)
            text += fmt::format("{} ", flag.name);
        value &= ~flag.bit;
    }
    if (value != 0)
        text += fmt::format("+{:#x} ", value);
    if (!text.empty())
        text.pop_back();
    return text;
}

constexpr std::array vector_names{"#DE"sv, "#DB"sv, "NMI"sv, "#BP"sv, "#OF"sv, "#BR"sv, "#UD"sv,
                                  "#NM"sv, "#DF"sv, ""sv,    "#TS"sv, "#NP"sv, "#SS"sv, "#GP"sv,
                                  "#PF"sv, ""sv,    "#MF"sv, "#AC"sv, "#MC"sv, "#XM"sv};

std::string vector_name(std::uint8_t vector) {
    if (vector < vector_names.size() && !vector_names.at(vector).empty())
        return std::string(vector_names.at(vector));
    return fmt::format("vector {:#x}", vector);
}

/// "write by user code": what a page fault's access was.
std::string describe(Access access) {
    const char* const kind = access.fetch ? "fetch" : access.write ? "write" : "read";
    return fmt::format("{} by {}", kind, access.user ? "user code" : "the kernel");
}

/// Of a page fault. Not by the error code's U/S: the machine's is always 1, as all of the guest runs at
/// CPL 3.
Access access_of(const TrapRecord& record) {
    return {.write = (record.detail & PageFault::write) != 0,
            .fetch = (record.detail & PageFault::fetch) != 0,
            .user = record.cpl == 3};
}

// ---- reading without a trace

GuestVirt instruction_pointer(const VirtualCpu& cpu) {
    // Only 64-bit code ignores the segment's base.
    return GuestVirt(cpu.cs.long_mode ? cpu.rip : static_cast<std::uint32_t>(cpu.cs.base + cpu.rip));
}

GuestVirt stack_pointer(const VirtualCpu& cpu) {
    return GuestVirt(cpu.cs.long_mode ? cpu[Gpr::rsp]
                                      : static_cast<std::uint32_t>(cpu.ss.base + cpu[Gpr::rsp]));
}

} // namespace

std::string why_faulted(const GuestMemory& memory, const GuestPaging& paging, const GuestWalk& walk,
                        Access access) {
    const GuestWalk::Step& last = walk.leaf();
    if (!last.level->in_registers && !memory.contains(last.slot, last.level->entry_bytes))
        return fmt::format("the table of this {} is not in RAM, and reads as all-ones", last.level->name);
    if (!last.entry.present())
        return fmt::format("the {} is not present", last.level->name);
    if ((walk.fault->error_code & PageFault::reserved) != 0) {
        if (last.entry.no_execute() && !paging.no_execute)
            return fmt::format("the {} has NX set, which is reserved while EFER.NXE is 0", last.level->name);
        return fmt::format("the {} has a reserved bit set", last.level->name);
    }
    const auto first = [&walk](auto&& denies) {
        const auto steps = walk.visited();
        const auto step = std::ranges::find_if(
            steps, [&](const GuestWalk::Step& s) { return !s.level->in_registers && denies(s.entry); });
        return step == steps.end() ? "" : step->level->name;
    };
    if (access.user && !walk.user)
        return fmt::format("the {} is the kernel's only (U/S is 0)",
                           first([](GuestEntry e) { return !e.user(); }));
    if (access.write && !walk.writable)
        return fmt::format("the {} is read-only (R/W is 0)",
                           first([](GuestEntry e) { return !e.writable(); }));
    if (access.fetch && walk.no_execute)
        return fmt::format("the {} forbids execution (NX is 1)",
                           first([](GuestEntry e) { return e.no_execute(); }));
    if (access.fetch)
        return "the page is the user's, and CR4.SMEP forbids the kernel to execute it";
    if ((walk.fault->error_code & PageFault::protection_key) != 0)
        return fmt::format("PKRU denies protection key {}", walk.key);
    return "the page is the user's, and CR4.SMAP forbids the kernel to access it while EFLAGS.AC is 0";
}

namespace {

struct Bytes {
    std::vector<std::byte> bytes;
    std::string missing; ///< why they are fewer than asked for
};

/// Up to `size` bytes from `at`, until one cannot be accessed.
Bytes read_bytes(const ReportInput& input, GuestVirt at, std::size_t size, Access access) {
    Bytes result;
    while (result.bytes.size() < size) {
        const GuestVirt here = at + result.bytes.size();
        if (!input.paging.format->canonical(here)) {
            result.missing = "the address is not canonical";
            break;
        }
        const GuestWalk walk = walk_guest(input.memory, input.paging, here, access);
        if (walk.fault) {
            result.missing = why_faulted(input.memory, input.paging, walk, access);
            break;
        }
        const auto bytes = input.memory.range(
            walk.address, std::min<std::size_t>(size - result.bytes.size(), page_size - here.page_offset()));
        if (bytes.empty()) {
            result.missing = fmt::format("it leads to {}, which is not RAM", walk.address);
            break;
        }
        result.bytes.insert(result.bytes.end(), bytes.begin(), bytes.end());
    }
    return result;
}

// ---- sections

/// "  <main+0x12>", or nothing.
std::string symbol(const ReportInput& input, GuestVirt at) {
    const std::string name = input.symbols.name(at);
    return name.empty() ? name : fmt::format("  <{}>", name);
}

void add_registers(Text& text, const ReportInput& input) {
    const VirtualCpu& cpu = input.cpu;
    constexpr std::array names{"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                               "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"}; // as Gpr counts
    constexpr std::array shown{Gpr::rax, Gpr::rbx, Gpr::rcx, Gpr::rdx, Gpr::rsi, Gpr::rdi,
                               Gpr::rbp, Gpr::rsp, Gpr::r8,  Gpr::r9,  Gpr::r10, Gpr::r11,
                               Gpr::r12, Gpr::r13, Gpr::r14, Gpr::r15};
    constexpr std::size_t columns = 4;
    text.line("\nRegisters (CPL {}{}):", cpu.cpl, cpu.halted ? ", halted" : "");
    text.line("  rip    {:016x}{}", cpu.rip, symbol(input, instruction_pointer(cpu)));
    text.line("  rflags {:016x}  {} IOPL={}", cpu.rflags,
              words(cpu.rflags & ~(rflags::iopl | rflags::fixed), rflags_names), cpu.iopl());
    std::string row;
    for (std::size_t i = 0; i < shown.size(); ++i) {
        const Gpr reg = shown.at(i);
        row += fmt::format("  {:3} {:016x}", names.at(static_cast<std::size_t>(reg)), cpu[reg]);
        if (i % columns == columns - 1)
            text.line("{}", std::exchange(row, {}));
    }
}

/// A segment's type in words (Intel SDM vol. 3A, tables 3-1 and 3-2).
std::string describe(const Segment& segment) {
    if (!segment.present)
        return "null";
    if (segment.system) {
        switch (segment.type) {
        case 0x2:
            return "LDT";
        case 0x9:
            return "TSS, available";
        case 0xb:
            return "TSS, busy";
        default:
            return fmt::format("system, type {:#x}", segment.type);
        }
    }
    const bool code = (segment.type & 8) != 0;
    std::string text = code ? (segment.long_mode    ? "64-bit code"
                               : segment.default_32 ? "32-bit code"
                                                    : "16-bit code")
                            : "data";
    if (code)
        text += (segment.type & 2) != 0 ? ", readable" : ", execute-only";
    else
        text += (segment.type & 2) != 0 ? ", writable" : ", read-only";
    if ((segment.type & 4) != 0)
        text += code ? ", conforming" : ", expand-down";
    return text;
}

void add_segments(Text& text, const VirtualCpu& cpu) {
    const std::array<std::pair<const char*, const Segment*>, 8> segments{{{"cs", &cpu.cs},
                                                                          {"ss", &cpu.ss},
                                                                          {"ds", &cpu.ds},
                                                                          {"es", &cpu.es},
                                                                          {"fs", &cpu.fs},
                                                                          {"gs", &cpu.gs},
                                                                          {"ldtr", &cpu.ldtr},
                                                                          {"tr", &cpu.tr}}};
    text.line("\nSegments:");
    for (const auto& [name, segment] : segments)
        text.line("  {:4}  {:04x}  base {:016x}  limit {:08x}  dpl {}  {}", name, segment->selector,
                  segment->base, segment->limit, segment->dpl, describe(*segment));
    text.line("  gdtr        base {:016x}  limit {:08x}", cpu.gdtr.base.value(), cpu.gdtr.limit);
    text.line("  idtr        base {:016x}  limit {:08x}", cpu.idtr.base.value(), cpu.idtr.limit);
}

/// If the run ended at an event that could not be delivered: the gates that it would have gone through.
void add_gates(Text& text, const ReportInput& input) {
    constexpr std::uint8_t double_fault = 8;
    constexpr std::uint64_t gate_size = 16;
    const std::vector<TrapRecord> records = input.log.last();
    if (records.empty() || records.back().action != TrapAction::stop || !records.back().has_vector())
        return;
    text.line("\nIDT gates of the last event, and of the double fault:");
    for (const std::uint8_t vector : std::set{records.back().vector, double_fault}) {
        const std::uint64_t offset = vector * gate_size;
        const std::string name = vector_name(vector);
        if (offset + gate_size - 1 > input.cpu.idtr.limit) {
            text.line("  {:11} lies beyond the IDT's limit", name);
            continue;
        }
        const Bytes read = read_bytes(input, input.cpu.idtr.base + offset, gate_size, Access{});
        if (read.bytes.size() < gate_size) {
            text.line("  {:11} cannot be read: {}", name, read.missing);
            continue;
        }
        std::array<std::uint64_t, 2> gate{}; // Intel SDM vol. 3A, 6.14.1
        std::memcpy(gate.data(), read.bytes.data(), gate_size);
        const GuestVirt handler((gate[0] & 0xffff) | (gate[0] >> 32 & 0xffff'0000) | gate[1] << 32);
        const auto type = gate[0] >> 40 & 0xf;
        const bool present = (gate[0] >> 47 & 1) != 0;
        text.line("  {:11} {:016x}  cs {:04x}  ist {}  dpl {}  {}{}", name, handler.value(),
                  gate[0] >> 16 & 0xffff, gate[0] >> 32 & 7, gate[0] >> 45 & 3,
                  !present      ? "not present"
                  : type == 0xe ? "interrupt gate"
                  : type == 0xf ? "trap gate"
                                : "not a gate of long mode",
                  symbol(input, handler));
    }
}

void add_control_registers(Text& text, const ReportInput& input) {
    const VirtualCpu& cpu = input.cpu;
    text.line("\nControl registers:");
    text.line("  cr0  {:016x}  {}", cpu.cr0, words(cpu.cr0, cr0_names));
    text.line("  cr2  {:016x}{}", cpu.cr2, symbol(input, GuestVirt(cpu.cr2)));
    text.line("  cr3  {:016x}  root {}, {}-level tables", cpu.cr3, input.paging.root.base(),
              input.paging.format->levels.size());
    text.line("  cr4  {:016x}  {}", cpu.cr4, words(cpu.cr4, cr4_names));
    text.line("  cr8  {:016x}", cpu.cr8);
    text.line("  efer {:016x}  {}", cpu.efer, words(cpu.efer, efer_names));
    text.line("  kernel_gs_base {:016x}", cpu.kernel_gs_base);
    text.line("  lstar          {:016x}{}", cpu.lstar, symbol(input, GuestVirt(cpu.lstar)));
}

/// Bytes of the first instruction in `code`; 0 if there is none that can be decoded.
std::size_t instruction_length(std::span<const std::byte> code, bool mode64) {
    ZydisDecoder decoder;
    ZydisDecoderInit(&decoder, mode64 ? ZYDIS_MACHINE_MODE_LONG_64 : ZYDIS_MACHINE_MODE_LONG_COMPAT_32,
                     mode64 ? ZYDIS_STACK_WIDTH_64 : ZYDIS_STACK_WIDTH_32);
    ZydisDecodedInstruction instruction;
    const ZyanStatus status =
        ZydisDecoderDecodeInstruction(&decoder, nullptr, code.data(), code.size(), &instruction);
    return ZYAN_SUCCESS(status) ? instruction.length : 0;
}

/// The starts of a few instructions before `rip`: found from the start of its function, if that is known,
/// near and readable, and if instructions from there lead to `rip`.
std::vector<GuestVirt> instructions_before(const ReportInput& input, GuestVirt rip) {
    constexpr std::size_t shown = 4;
    constexpr std::uint64_t near = 16384;
    const auto place = input.symbols.find(rip);
    if (!place || place->offset > near)
        return {};
    const GuestVirt function = rip - place->offset;
    const Bytes code = read_bytes(input, function, place->offset + longest_instruction, Access{});
    std::vector<GuestVirt> starts;
    std::size_t offset = 0;
    while (offset < place->offset && offset < code.bytes.size()) {
        const std::size_t length =
            instruction_length(std::span(code.bytes).subspan(offset), input.cpu.cs.long_mode);
        if (length == 0)
            return {};
        starts.push_back(function + offset);
        offset += length;
    }
    if (offset != place->offset)
        return {};
    if (starts.size() > shown)
        starts.erase(starts.begin(), starts.end() - shown);
    return starts;
}

void add_code(Text& text, const ReportInput& input) {
    constexpr std::size_t shown_after = 5;
    const bool mode64 = input.cpu.cs.long_mode;
    const GuestVirt rip = instruction_pointer(input.cpu);
    const Access fetch{.write = false, .fetch = true, .user = input.cpu.cpl == 3};
    const Bytes fetched = read_bytes(input, rip, (shown_after + 1) * longest_instruction, fetch);
    text.line("\nCode{}:", symbol(input, rip));
    const auto add = [&](GuestVirt at, std::span<const std::byte> code) {
        const std::size_t length = std::max<std::size_t>(instruction_length(code, mode64), 1);
        std::string hex;
        for (const std::byte byte : code.first(length))
            hex += fmt::format("{:02x}", static_cast<unsigned>(byte));
        text.line("  {} {:016x}  {:16}  {}", at == rip ? "=>" : "  ", at.value(), hex,
                  disassemble(code, at, mode64));
        return length;
    };
    for (const GuestVirt at : instructions_before(input, rip))
        add(at, read_bytes(input, at, std::min<std::size_t>(rip - at, longest_instruction), Access{}).bytes);
    std::size_t offset = 0;
    for (std::size_t i = 0; i <= shown_after && offset < fetched.bytes.size(); ++i)
        offset += add(rip + offset, std::span(fetched.bytes).subspan(offset));
    if (fetched.bytes.empty())
        text.line("  => {:016x}  cannot be fetched: {}", rip.value(), fetched.missing);
}

void add_stack(Text& text, const ReportInput& input) {
    constexpr std::size_t shown = 8;
    const GuestVirt top = stack_pointer(input.cpu);
    const Bytes read = read_bytes(input, top, shown * sizeof(std::uint64_t), {.user = input.cpu.cpl == 3});
    text.line("\nStack:");
    for (std::size_t offset = 0; offset + sizeof(std::uint64_t) <= read.bytes.size();
         offset += sizeof(std::uint64_t)) {
        std::uint64_t word = 0;
        std::memcpy(&word, read.bytes.data() + offset, sizeof word);
        text.line("  {:016x}  {:016x}{}", (top + offset).value(), word, symbol(input, GuestVirt(word)));
    }
    if (!read.missing.empty())
        text.line("  {:016x}  cannot be read: {}", (top + read.bytes.size()).value(), read.missing);
}

template<class Space>
void add_step(Text& text, const Level& level, Address<Space> slot, Entry<Space> entry) {
    std::string target = "nothing";
    if (entry.present() && entry.leaf(level)) {
        constexpr std::array sizes{"4 KB", "2 MB", "1 GB"};
        target = fmt::format("{} page {}", level.pse_36 ? "4 MB" : sizes.at(level.number - 1),
                             entry.page(level).base());
    } else if (entry.present()) {
        target = fmt::format("table {}", entry.table().base());
    }
    text.line("  {:5}  {:22}  {:016x}  {:14}  -> {}", level.name, fmt::format("{}", slot), entry.raw(),
              entry_flags(entry, level), target);
}

} // namespace

std::string rights(const GuestWalk& walk, const GuestPaging& paging) {
    const auto letters = [](bool write, bool fetch) {
        return fmt::format("r{}{}", write ? 'w' : '-', fetch ? 'x' : '-');
    };
    return fmt::format(
        "kernel {}{}, user {}",
        letters(walk.writable || !paging.write_protect, !walk.no_execute && !(paging.smep && walk.user)),
        paging.smap && walk.user ? " (data only with EFLAGS.AC set)" : "",
        walk.user ? letters(walk.writable, !walk.no_execute) : "---");
}

namespace {

void add_walks(Text& text, const ReportInput& input) {
    const ReportSubject subject = report_subject(input.cpu, input.log);
    const std::string what =
        !subject.page_fault        ? "RIP"
        : subject.traps_since == 0 ? "the last trap, a page fault"
        : subject.traps_since == 1
            ? "the last page fault, 1 trap before the last"
            : fmt::format("the last page fault, {} traps before the last", subject.traps_since);
    text.line("\nTranslation of {:#018x} for a {} ({}):", subject.address.value(), describe(subject.access),
              what);
    if ((input.cpu.cr0 & cr0::pg) == 0) {
        text.line("  paging is off");
        return;
    }
    if (!input.paging.format->canonical(subject.address)) {
        text.line("  not canonical: no translation, but #GP or #SS");
        return;
    }
    text.line("  in the guest's tables:");
    const GuestWalk walk = walk_guest(input.memory, input.paging, subject.address, subject.access);
    for (const GuestWalk::Step& step : walk.visited())
        add_step(text, *step.level, step.slot, step.entry);
    if (walk.fault)
        text.line("  page fault, error code {:#x}: {}", walk.fault->error_code,
                  why_faulted(input.memory, input.paging, walk, subject.access));
    else
        text.line("  {}, {}; allowed: {}", walk.address,
                  input.memory.contains(walk.address, 1) ? "RAM" : "not RAM", rights(walk, input.paging));
    if (input.shadow.empty())
        return;
    text.line("  in the machine's (shadow) tables:");
    for (const WalkStep<MachinePhysSpace>& step : input.shadow)
        add_step(text, *step.level, step.slot, step.entry);
}

/// What is worth telling of a trap beside its reason.
std::string detail(const TrapRecord& record) {
    if (record.is_page_fault())
        return fmt::format("{:016x} error {:#x}", record.address.value(), record.detail);
    if (record.has_vector())
        return vector_name(record.vector) +
               (record.detail != 0 ? fmt::format(" error {:#x}", record.detail) : "");
    if (record.reason == TrapReason::port_read || record.reason == TrapReason::port_write)
        return fmt::format("port {:#x}", record.detail);
    if (record.reason == TrapReason::mmio_read || record.reason == TrapReason::mmio_write)
        return fmt::format("{}", record.device);
    return record.instruction != nullptr ? record.instruction : "";
}

void add_traps(Text& text, const ReportInput& input, std::size_t count = TrapLog::remembered) {
    std::vector<TrapRecord> records = input.log.last();
    if (records.size() > count)
        records.erase(records.begin(), records.end() - static_cast<std::ptrdiff_t>(count));
    if (records.empty())
        return;
    text.line("\nLast {} of {} traps (us before the last one):", records.size(), input.log.added());
    text.line("  {:>12} cpl {:11} {:7} {:16}  {}", "us", "reason", "action", "rip", "detail");
    for (const TrapRecord& record : records) {
        const double ago = static_cast<double>(records.back().start - record.start) / input.ticks_per_us;
        text.line("  {:12.3f}  {}  {:11} {:7} {:016x}  {:26}{}", 0 - ago, record.cpl, name(record.reason),
                  name(record.action), record.rip.value(), detail(record), symbol(input, record.rip));
    }
}

} // namespace

template<class Space>
std::string entry_flags(Entry<Space> entry, const Level& level) {
    const bool leaf = entry.leaf(level);
    const auto flag = [&entry](std::uint64_t bit, std::string_view set, bool applies = true) {
        return applies && entry.has(bit) ? set : "-"sv;
    };
    std::string text = fmt::format("{} {} {} {} {} {} {:2}", flag(entry_bit::present, "P"),
                                   flag(entry_bit::writable, "W"), flag(entry_bit::user, "U"),
                                   flag(entry_bit::accessed, "A"), flag(entry_bit::dirty, "D", leaf),
                                   flag(entry_bit::global, "G", leaf), flag(entry_bit::no_execute, "NX"));
    text.resize(text.find_last_not_of(' ') + 1);
    // PAT takes the place of PS in the lowest level, and of the lowest address bit in large pages.
    const std::uint64_t pat = level.number == 1 ? entry_bit::page_size : page_size;
    for (const auto& [bit, name, applies] :
         {std::tuple(entry_bit::write_through, " PWT", true),
          std::tuple(entry_bit::cache_disable, " PCD", true), std::tuple(pat, " PAT", leaf)}) {
        if (applies && entry.has(bit))
            text += name;
    }
    return text;
}

template std::string entry_flags(GuestEntry, const Level&);
template std::string entry_flags(ShadowEntry, const Level&);

ReportSubject report_subject(const VirtualCpu& cpu, const TrapLog& log) {
    const std::vector<TrapRecord> records = log.last();
    const auto fault = std::find_if(records.rbegin(), records.rend(), [](const TrapRecord& record) {
        return record.is_page_fault() && record.action != TrapAction::fill;
    });
    if (fault != records.rend())
        return {fault->address, access_of(*fault), true, static_cast<std::size_t>(fault - records.rbegin())};
    return {instruction_pointer(cpu), {.write = false, .fetch = true, .user = cpu.cpl == 3}, false, 0};
}

std::string report(const ReportInput& input) {
    Text text;
    text.line("Guest report: {}", input.why);
    add_registers(text, input);
    add_code(text, input);
    add_stack(text, input);
    add_walks(text, input);
    add_control_registers(text, input);
    add_segments(text, input.cpu);
    add_gates(text, input);
    add_traps(text, input);
    return text.take();
}

std::string report_registers(const ReportInput& input) {
    Text text;
    add_registers(text, input);
    add_control_registers(text, input);
    add_segments(text, input.cpu);
    return text.take();
}

std::string report_traps(const ReportInput& input, std::size_t count) {
    Text text;
    add_traps(text, input, count);
    return text.take();
}

} // namespace umbra
