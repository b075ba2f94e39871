#include "vmm/debug/registers.hpp"

#include "vmm/debug/operands.hpp"
#include "vmm/debug/packet.hpp"

#include <array>
#include <cstring>

#include <fmt/core.h>

namespace umbra {
namespace {

using Bytes = std::span<const std::byte>;

void put(std::span<std::byte> out, std::uint64_t value) {
    std::memcpy(out.data(), &value, std::min(out.size(), sizeof(value)));
}
std::uint64_t take(Bytes in) {
    std::uint64_t value = 0;
    std::memcpy(&value, in.data(), std::min(in.size(), sizeof(value)));
    return value;
}

bool address_ok(const VirtualCpu& cpu, std::uint64_t value) {
    if ((cpu.efer & efer::lma) == 0)
        return value >> 32 == 0;
    return paging_format(cpu).canonical(GuestVirt(value));
}

template<auto Member>
void get_cpu(const CpuView& view, std::size_t, std::span<std::byte> out) {
    put(out, view.cpu.*Member);
}
template<auto Member>
void get_selector(const CpuView& view, std::size_t, std::span<std::byte> out) {
    put(out, (view.cpu.*Member).selector);
}
template<auto Member>
void get_base(const CpuView& view, std::size_t, std::span<std::byte> out) {
    put(out, (view.cpu.*Member).base);
}
template<auto Member>
bool set_base(const CpuEdit& edit, std::size_t, Bytes in) {
    if (!address_ok(edit.cpu, take(in)))
        return false;
    (edit.cpu.*Member).base = take(in);
    return true;
}
template<auto Member>
bool set_address(const CpuEdit& edit, std::size_t, Bytes in) {
    if (!address_ok(edit.cpu, take(in)))
        return false;
    edit.cpu.*Member = take(in);
    return true;
}
template<auto Member>
void get_fpu(const CpuView& view, std::size_t, std::span<std::byte> out) {
    put(out, view.extended.*Member);
}
/// `Bits`: those above are reserved (Intel SDM vol. 1, 8.1.9 and 10.2.3).
template<auto Member, unsigned Bits>
bool set_fpu(const CpuEdit& edit, std::size_t, Bytes in) {
    if (take(in) >> Bits != 0)
        return false;
    auto& field = edit.extended.*Member;
    field = static_cast<std::remove_reference_t<decltype(field)>>(take(in));
    return true;
}
template<auto Member>
void get_vector(const CpuView& view, std::size_t index, std::span<std::byte> out) {
    std::memcpy(out.data(), (view.extended.*Member).at(index).data(), out.size());
}
template<auto Member>
bool set_vector(const CpuEdit& edit, std::size_t index, Bytes in) {
    std::memcpy((edit.extended.*Member).at(index).data(), in.data(), in.size());
    return true;
}
template<auto Table>
void get_table_base(const CpuView& view, std::size_t, std::span<std::byte> out) {
    put(out, (view.cpu.*Table).base.value());
}
template<auto Table>
void get_limit(const CpuView& view, std::size_t, std::span<std::byte> out) {
    put(out, (view.cpu.*Table).limit);
}

/// 32-bit code has eight, of 32 bits: what long mode has left above is not theirs.
std::uint64_t gpr_mask(const VirtualCpu& cpu, std::size_t index) {
    constexpr std::size_t legacy_gprs = 8;
    return index < legacy_gprs && code_mode(cpu) != CodeMode::bits_64 ? 0xffff'ffff : ~std::uint64_t{0};
}
void get_gpr(const CpuView& view, std::size_t index, std::span<std::byte> out) {
    put(out, view.cpu.gpr.at(index) & gpr_mask(view.cpu, index));
}
bool set_gpr(const CpuEdit& edit, std::size_t index, Bytes in) {
    edit.cpu.gpr.at(index) = take(in) & gpr_mask(edit.cpu, index);
    return true;
}
void get_code_bits(const CpuView& view, std::size_t, std::span<std::byte> out) {
    put(out, std::uint64_t{16} << static_cast<unsigned>(code_mode(view.cpu)));
}

void get_dr(const CpuView& view, std::size_t index, std::span<std::byte> out) {
    put(out, view.cpu.dr.at(index));
}

/// Bits that are fixed keep their values; VM is refused, as it would change what all selectors mean.
bool set_flags(const CpuEdit& edit, std::size_t, Bytes in) {
    constexpr std::uint64_t defined = 0x3d'7fd5;
    if (((take(in) ^ edit.cpu.rflags) & rflags::virtual_8086) != 0)
        return false;
    edit.cpu.rflags = (take(in) & defined) | rflags::fixed | (edit.cpu.rflags & rflags::virtual_8086);
    return true;
}

// Intel SDM vol. 3A, 2.5; vol. 4, IA32_EFER.

bool set_cr0(const CpuEdit& edit, std::size_t, Bytes in) {
    constexpr std::uint64_t defined = cr0::pe | cr0::mp | cr0::em | cr0::ts | cr0::et | cr0::ne | cr0::wp |
                                      cr0::am | cr0::nw | cr0::cd | cr0::pg;
    const std::uint64_t value = take(in);
    const bool caching_valid = (value & cr0::cd) != 0 || (value & cr0::nw) == 0;
    if ((value & ~defined) != 0 || !caching_valid || ((value ^ edit.cpu.cr0) & (cr0::pe | cr0::pg)) != 0)
        return false;
    edit.cpu.cr0 = value | cr0::et;
    return true;
}
bool set_cr3(const CpuEdit& edit, std::size_t, Bytes in) {
    if (take(in) >> edit.physical_bits != 0)
        return false;
    edit.cpu.cr3 = take(in);
    return true;
}
bool set_cr4(const CpuEdit& edit, std::size_t, Bytes in) {
    constexpr std::uint64_t pcid_mask = 0xfff;
    const std::uint64_t value = take(in), changed = value ^ edit.cpu.cr4;
    const bool pcids_on = (changed & value & cr4::pcide) != 0;
    if ((value & ~edit.cr4_allowed) != 0 || (changed & (cr4::pae | cr4::la57)) != 0 ||
        (pcids_on && ((edit.cpu.efer & efer::lma) == 0 || (edit.cpu.cr3 & pcid_mask) != 0)))
        return false;
    edit.cpu.cr4 = value;
    return true;
}
bool set_cr8(const CpuEdit& edit, std::size_t, Bytes in) {
    if (take(in) > 0xf)
        return false;
    edit.cpu.cr8 = take(in);
    return true;
}
bool set_efer(const CpuEdit& edit, std::size_t, Bytes in) {
    if (((take(in) ^ edit.cpu.efer) & ~(efer::sce | efer::nxe)) != 0)
        return false;
    edit.cpu.efer = take(in);
    return true;
}

constexpr const char* core = "org.gnu.gdb.i386.core";
constexpr const char* sse = "org.gnu.gdb.i386.sse";
constexpr const char* avx_feature = "org.gnu.gdb.i386.avx";
constexpr const char* segments = "org.gnu.gdb.i386.segments";
constexpr const char* system_feature = "org.umbra.system";

struct Field {
    const char* name;
    unsigned start, end;
};
std::string flags(const char* id, unsigned bytes, std::initializer_list<Field> fields) {
    std::string text = fmt::format("<flags id=\"{}\" size=\"{}\">\n", id, bytes);
    for (const Field& field : fields)
        text +=
            fmt::format("<field name=\"{}\" start=\"{}\" end=\"{}\"/>\n", field.name, field.start, field.end);
    return text + "</flags>\n";
}

/// The types that a feature's registers use.
std::string types_of(std::string_view feature, unsigned word_bytes) {
    if (feature == core)
        return flags("i386_eflags", 4,
                     {{"CF", 0, 0},
                      {"", 1, 1},
                      {"PF", 2, 2},
                      {"AF", 4, 4},
                      {"ZF", 6, 6},
                      {"SF", 7, 7},
                      {"TF", 8, 8},
                      {"IF", 9, 9},
                      {"DF", 10, 10},
                      {"OF", 11, 11},
                      {"IOPL", 12, 13},
                      {"NT", 14, 14},
                      {"RF", 16, 16},
                      {"VM", 17, 17},
                      {"AC", 18, 18},
                      {"VIF", 19, 19},
                      {"VIP", 20, 20},
                      {"ID", 21, 21}});
    if (feature == sse)
        return "<vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/>\n"
               "<vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/>\n"
               "<vector id=\"v16i8\" type=\"int8\" count=\"16\"/>\n<vector id=\"v8i16\" type=\"int16\" "
               "count=\"8\"/>\n"
               "<vector id=\"v4i32\" type=\"int32\" count=\"4\"/>\n<vector id=\"v2i64\" type=\"int64\" "
               "count=\"2\"/>\n"
               "<union id=\"vec128\">\n<field name=\"v4_float\" type=\"v4f\"/>\n<field name=\"v2_double\" "
               "type=\"v2d\"/>\n"
               "<field name=\"v16_int8\" type=\"v16i8\"/>\n<field name=\"v8_int16\" type=\"v8i16\"/>\n"
               "<field name=\"v4_int32\" type=\"v4i32\"/>\n<field name=\"v2_int64\" type=\"v2i64\"/>\n"
               "<field name=\"uint128\" type=\"uint128\"/>\n</union>\n" +
               flags("i386_mxcsr", 4,
                     {{"IE", 0, 0},
                      {"DE", 1, 1},
                      {"ZE", 2, 2},
                      {"OE", 3, 3},
                      {"UE", 4, 4},
                      {"PE", 5, 5},
                      {"DAZ", 6, 6},
                      {"IM", 7, 7},
                      {"DM", 8, 8},
                      {"ZM", 9, 9},
                      {"OM", 10, 10},
                      {"UM", 11, 11},
                      {"PM", 12, 12},
                      {"RC", 13, 14},
                      {"FZ", 15, 15}});
    if (feature != system_feature)
        return {};
    return flags("umbra_cr0", word_bytes,
                 {{"PE", 0, 0},
                  {"MP", 1, 1},
                  {"EM", 2, 2},
                  {"TS", 3, 3},
                  {"ET", 4, 4},
                  {"NE", 5, 5},
                  {"WP", 16, 16},
                  {"AM", 18, 18},
                  {"NW", 29, 29},
                  {"CD", 30, 30},
                  {"PG", 31, 31}}) +
           flags("umbra_cr4", word_bytes,
                 {{"VME", 0, 0},
                  {"PVI", 1, 1},
                  {"TSD", 2, 2},
                  {"DE", 3, 3},
                  {"PSE", 4, 4},
                  {"PAE", 5, 5},
                  {"MCE", 6, 6},
                  {"PGE", 7, 7},
                  {"PCE", 8, 8},
                  {"OSFXSR", 9, 9},
                  {"OSXMMEXCPT", 10, 10},
                  {"UMIP", 11, 11},
                  {"LA57", 12, 12},
                  {"FSGSBASE", 16, 16},
                  {"PCIDE", 17, 17},
                  {"OSXSAVE", 18, 18},
                  {"SMEP", 20, 20},
                  {"SMAP", 21, 21},
                  {"PKE", 22, 22}}) +
           flags("umbra_efer", 8, {{"SCE", 0, 0}, {"LME", 8, 8}, {"LMA", 10, 10}, {"NXE", 11, 11}});
}

} // namespace

void RegisterSet::add(std::string name, unsigned bits, const char* type, const char* group, Get get, Set set,
                      std::size_t index) {
    registers_.push_back({std::move(name), bits, type, group, feature_, get, set, index});
}

RegisterSet::RegisterSet(TargetWidth width, bool avx) : width_(width) {
    const bool wide = width == TargetWidth::bits_64;
    const unsigned word = wide ? 64 : 32;
    const char* integer = wide ? "int64" : "int32";
    const std::size_t vectors = wide ? 16 : 8;

    // The order is gdb's: 64bit-core.xml and 32bit-core.xml of its features/i386.
    feature_ = core;
    struct General {
        const char* name;
        Gpr reg;
    };
    constexpr std::array order_64{General{"ax", Gpr::rax}, General{"bx", Gpr::rbx}, General{"cx", Gpr::rcx},
                                  General{"dx", Gpr::rdx}, General{"si", Gpr::rsi}, General{"di", Gpr::rdi},
                                  General{"bp", Gpr::rbp}, General{"sp", Gpr::rsp}};
    constexpr std::array order_32{General{"ax", Gpr::rax}, General{"cx", Gpr::rcx}, General{"dx", Gpr::rdx},
                                  General{"bx", Gpr::rbx}, General{"sp", Gpr::rsp}, General{"bp", Gpr::rbp},
                                  General{"si", Gpr::rsi}, General{"di", Gpr::rdi}};
    for (const General& general : wide ? order_64 : order_32) {
        const bool pointer = general.reg == Gpr::rsp || general.reg == Gpr::rbp;
        add(fmt::format("{}{}", wide ? 'r' : 'e', general.name), word, pointer ? "data_ptr" : integer,
            nullptr, get_gpr, set_gpr, static_cast<std::size_t>(general.reg));
    }
    for (std::size_t i = 8; wide && i < 16; ++i)
        add(fmt::format("r{}", i), word, integer, nullptr, get_gpr, set_gpr, i);
    add(wide ? "rip" : "eip", word, "code_ptr", nullptr, get_cpu<&VirtualCpu::rip>,
        set_address<&VirtualCpu::rip>);
    add("eflags", 32, "i386_eflags", nullptr, get_cpu<&VirtualCpu::rflags>, set_flags);
    add("cs", 32, "int32", nullptr, get_selector<&VirtualCpu::cs>, nullptr);
    add("ss", 32, "int32", nullptr, get_selector<&VirtualCpu::ss>, nullptr);
    add("ds", 32, "int32", nullptr, get_selector<&VirtualCpu::ds>, nullptr);
    add("es", 32, "int32", nullptr, get_selector<&VirtualCpu::es>, nullptr);
    add("fs", 32, "int32", nullptr, get_selector<&VirtualCpu::fs>, nullptr);
    add("gs", 32, "int32", nullptr, get_selector<&VirtualCpu::gs>, nullptr);
    using X = ExtendedState;
    for (std::size_t i = 0; i < 8; ++i)
        add(fmt::format("st{}", i), 80, "i387_ext", nullptr, get_vector<&X::st>, set_vector<&X::st>, i);
    add("fctrl", 32, "int", "float", get_fpu<&X::fctrl>, set_fpu<&X::fctrl, 16>);
    add("fstat", 32, "int", "float", get_fpu<&X::fstat>, set_fpu<&X::fstat, 16>);
    add("ftag", 32, "int", "float", get_fpu<&X::ftag>, set_fpu<&X::ftag, 16>);
    add("fiseg", 32, "int", "float", get_fpu<&X::fiseg>, set_fpu<&X::fiseg, 16>);
    add("fioff", 32, "int", "float", get_fpu<&X::fioff>, set_fpu<&X::fioff, 32>);
    add("foseg", 32, "int", "float", get_fpu<&X::foseg>, set_fpu<&X::foseg, 16>);
    add("fooff", 32, "int", "float", get_fpu<&X::fooff>, set_fpu<&X::fooff, 32>);
    add("fop", 32, "int", "float", get_fpu<&X::fop>, set_fpu<&X::fop, 11>);

    feature_ = sse;
    for (std::size_t i = 0; i < vectors; ++i)
        add(fmt::format("xmm{}", i), 128, "vec128", nullptr, get_vector<&X::xmm>, set_vector<&X::xmm>, i);
    add("mxcsr", 32, "i386_mxcsr", "vector", get_fpu<&X::mxcsr>, set_fpu<&X::mxcsr, 16>);
    feature_ = avx_feature;
    for (std::size_t i = 0; avx && i < vectors; ++i)
        add(fmt::format("ymm{}h", i), 128, "uint128", nullptr, get_vector<&X::ymm_high>,
            set_vector<&X::ymm_high>, i);

    // gdb knows the feature of the bases for 64 bits only.
    feature_ = wide ? segments : system_feature;
    const char* group = wide ? nullptr : "system";
    add("fs_base", word, wide ? "int" : "data_ptr", group, get_base<&VirtualCpu::fs>,
        set_base<&VirtualCpu::fs>);
    add("gs_base", word, wide ? "int" : "data_ptr", group, get_base<&VirtualCpu::gs>,
        set_base<&VirtualCpu::gs>);

    feature_ = system_feature;
    group = "system";
    if (wide)
        add("k_gs_base", 64, "data_ptr", group, get_cpu<&VirtualCpu::kernel_gs_base>,
            set_address<&VirtualCpu::kernel_gs_base>);
    add("cr0", word, "umbra_cr0", group, get_cpu<&VirtualCpu::cr0>, set_cr0);
    add("cr2", word, integer, group, get_cpu<&VirtualCpu::cr2>,
        [](const CpuEdit& edit, std::size_t, Bytes in) { return edit.cpu.cr2 = take(in), true; });
    add("cr3", word, integer, group, get_cpu<&VirtualCpu::cr3>, set_cr3);
    add("cr4", word, "umbra_cr4", group, get_cpu<&VirtualCpu::cr4>, set_cr4);
    add("cr8", word, integer, group, get_cpu<&VirtualCpu::cr8>, set_cr8);
    add("efer", 64, "umbra_efer", group, get_cpu<&VirtualCpu::efer>, set_efer);
    add("ldtr", 32, "int32", group, get_selector<&VirtualCpu::ldtr>, nullptr);
    add("tr", 32, "int32", group, get_selector<&VirtualCpu::tr>, nullptr);
    add("gdtr_base", word, "data_ptr", group, get_table_base<&VirtualCpu::gdtr>, nullptr);
    add("gdtr_limit", 32, "int32", group, get_limit<&VirtualCpu::gdtr>, nullptr);
    add("idtr_base", word, "data_ptr", group, get_table_base<&VirtualCpu::idtr>, nullptr);
    add("idtr_limit", 32, "int32", group, get_limit<&VirtualCpu::idtr>, nullptr);
    for (std::size_t i = 0; i < 4; ++i)
        add(fmt::format("dr{}", i), word, "data_ptr", group, get_dr, nullptr, i);
    add("dr6", word, integer, group, get_cpu<&VirtualCpu::dr6>, nullptr);
    add("dr7", word, integer, group, get_cpu<&VirtualCpu::dr7>, nullptr);
    add("code_bits", 32, "int32", group, get_code_bits, nullptr);
    add("cpl", 32, "int32", group, get_cpu<&VirtualCpu::cpl>, nullptr);
}

std::string RegisterSet::target_xml() const {
    const bool wide = width_ == TargetWidth::bits_64;
    std::string text = fmt::format("<?xml version=\"1.0\"?>\n<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n"
                                   "<target version=\"1.0\">\n<architecture>{}</architecture>\n"
                                   "<compatible>{}</compatible>\n",
                                   wide ? "i386:x86-64" : "i386", wide ? "i386" : "i386:x86-64");
    std::string_view feature;
    for (std::size_t number = 0; number < registers_.size(); ++number) {
        const Register& reg = registers_[number];
        if (reg.feature != feature) {
            text += fmt::format("{}<feature name=\"{}\">\n{}", feature.empty() ? "" : "</feature>\n",
                                reg.feature, types_of(reg.feature, wide ? 8 : 4));
            feature = reg.feature;
        }
        text += fmt::format(R"(<reg name="{}" bitsize="{}" type="{}" regnum="{}")", reg.name, reg.bits,
                            reg.type, number);
        if (reg.group != nullptr)
            text += fmt::format(" group=\"{}\"", reg.group);
        text += std::string_view(reg.feature) == system_feature ? " save-restore=\"no\"/>\n" : "/>\n";
    }
    return text + "</feature>\n</target>\n";
}

std::string RegisterSet::read(std::size_t number, const CpuView& view) const {
    if (number >= registers_.size())
        return {};
    const Register& reg = registers_[number];
    std::array<std::byte, 16> bytes{};
    const auto used = std::span(bytes).first(reg.bits / 8);
    reg.get(view, reg.index, used);
    return to_hex(used);
}

std::optional<std::uint64_t> RegisterSet::value(std::size_t number, const VirtualCpu& cpu) const {
    if (number >= registers_.size())
        return std::nullopt;
    const Register& reg = registers_[number];
    const std::string_view group = reg.group == nullptr ? "" : reg.group;
    std::uint64_t value = 0;
    if (reg.bits > 8 * sizeof(value) || group == "float" || group == "vector")
        return std::nullopt;
    const ExtendedState none;
    reg.get({cpu, none}, reg.index, std::as_writable_bytes(std::span(&value, 1)).first(reg.bits / 8));
    return value;
}

std::string RegisterSet::read_all(const CpuView& view) const {
    std::string text;
    for (std::size_t number = 0; number < registers_.size(); ++number)
        text += read(number, view);
    return text;
}

std::string RegisterSet::expedited(const VirtualCpu& cpu) const {
    const bool wide = width_ == TargetWidth::bits_64;
    const ExtendedState none;
    std::string text;
    for (const std::size_t number : wide ? std::array{6U, 7U, 16U} : std::array{5U, 4U, 8U})
        text += fmt::format("{:02x}:{};", number, read(number, {cpu, none}));
    return text;
}

bool RegisterSet::write(std::size_t number, std::string_view hex, const CpuEdit& edit) const {
    if (number >= registers_.size())
        return false;
    const Register& reg = registers_[number];
    const auto bytes = from_hex(hex);
    if (!bytes || bytes->size() != reg.bits / 8)
        return false;
    if (to_hex(*bytes) == read(number, {edit.cpu, edit.extended}))
        return true;
    if (reg.set == nullptr)
        return false;
    VirtualCpu cpu = edit.cpu;
    ExtendedState extended = edit.extended;
    if (!reg.set({cpu, extended, edit.cr4_allowed, edit.physical_bits}, reg.index, *bytes))
        return false;
    edit.cpu = cpu;
    edit.extended = extended;
    return true;
}

bool RegisterSet::write_all(std::string_view hex, const CpuEdit& edit) const {
    VirtualCpu cpu = edit.cpu;
    ExtendedState extended = edit.extended;
    for (std::size_t number = 0; number < registers_.size(); ++number) {
        const std::size_t digits = registers_[number].bits / 4;
        if (hex.size() < digits ||
            !write(number, hex.substr(0, digits), {cpu, extended, edit.cr4_allowed, edit.physical_bits}))
            return false;
        hex.remove_prefix(digits);
    }
    if (!hex.empty())
        return false;
    edit.cpu = cpu;
    edit.extended = extended;
    return true;
}

} // namespace umbra
