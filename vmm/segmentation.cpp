#include "vmm/segmentation.hpp"

#include <algorithm>

namespace umbra {
namespace {

constexpr unsigned descriptor_size = 8;
constexpr unsigned system_descriptor_size = 16; ///< in long mode (Intel SDM vol. 3A, figure 7-4)
constexpr std::array<std::uint8_t, 1> ldt_types{descriptor_type::ldt};
constexpr std::array<std::uint8_t, 2> tss_types{descriptor_type::tss_available,
                                                descriptor_type::tss_16_available}; ///< the last: legacy only
/// What a far JMP or CALL may name besides code; all but the first in legacy mode only.
constexpr std::array<std::uint8_t, 5> jump_types{descriptor_type::call_gate, descriptor_type::call_gate_16,
                                                 descriptor_type::task_gate, descriptor_type::tss_available,
                                                 descriptor_type::tss_16_available};

Exception not_present(std::uint32_t code) {
    return {Vector::segment_not_present, code, {}};
}
Exception stack_fault(std::uint32_t code) {
    return {Vector::stack_fault, code, {}};
}

/// Where the `size` bytes of a descriptor lie, or #GP if they are not all inside the table.
std::optional<Exception> locate(const VirtualCpu& cpu, std::uint16_t selector, unsigned size,
                                std::uint32_t ext, GuestVirt& at) {
    if (selector::null(selector))
        return Exception::general_protection(ext);
    const bool local = (selector & selector::local) != 0;
    const std::uint32_t offset = selector & ~std::uint32_t{7};
    const std::uint32_t limit = local ? cpu.ldtr.limit : cpu.gdtr.limit;
    if ((local && !cpu.ldtr.present) || offset + size - 1 > limit)
        return Exception::general_protection(selector::error_code(selector) | ext);
    at = linear(cpu, (local ? cpu.ldtr.base : cpu.gdtr.base.value()) + offset);
    return std::nullopt;
}

/// A non-canonical address of a descriptor is #GP with its selector; GuestSpace cannot know that.
std::optional<Exception> with_selector(std::optional<Exception> exception, std::uint16_t selector,
                                       std::uint32_t ext) {
    if (exception && exception->vector == Vector::general_protection)
        exception->error_code = selector::error_code(selector) | ext;
    return exception;
}

Segment parse(std::uint16_t selector, std::uint64_t raw) {
    Segment result;
    result.selector = selector;
    result.base = ((raw >> 16) & 0xff'ffff) | ((raw >> 32) & 0xff00'0000);
    result.type = (raw >> 40) & 0xf;
    result.system = ((raw >> 44) & 1) == 0;
    result.dpl = (raw >> 45) & 3;
    result.present = ((raw >> 47) & 1) != 0;
    result.available = ((raw >> 52) & 1) != 0;
    result.long_mode = ((raw >> 53) & 1) != 0;
    result.default_32 = ((raw >> 54) & 1) != 0;
    result.granularity = ((raw >> 55) & 1) != 0;
    const auto limit = static_cast<std::uint32_t>((raw & 0xffff) | ((raw >> 32) & 0xf'0000));
    result.limit = result.granularity ? (limit << page_shift) | (page_size - 1) : limit;
    return result;
}

/// LLDT and LTR: a descriptor in the GDT, whose type is among `types`.
std::optional<Exception> read_system_descriptor(const VirtualCpu& cpu, const GuestSpace& space,
                                                std::uint16_t selector, std::span<const std::uint8_t> types,
                                                Segment& into) {
    const Exception bad = Exception::general_protection(selector::error_code(selector));
    if ((selector & selector::local) != 0)
        return bad;
    const unsigned size = in_long_mode(cpu) ? system_descriptor_size : descriptor_size;
    GuestVirt at;
    if (auto exception = locate(cpu, selector, size, 0, at))
        return exception;
    std::array<std::uint64_t, 2> raw{}; // the upper half stays zero in legacy mode
    if (auto exception = space.read(at, std::as_writable_bytes(std::span(raw)).first(size)))
        return with_selector(exception, selector, 0);
    into = parse(selector, raw[0]);
    into.base |= raw[1] << 32;
    const bool upper_type_zero = ((raw[1] >> 40) & 0x1f) == 0;
    if (!into.system || std::ranges::find(types, into.type) == types.end() || !upper_type_zero)
        return bad;
    if (!into.present)
        return not_present(selector::error_code(selector));
    if (in_long_mode(cpu) && !space.paging().format->canonical(GuestVirt(into.base)))
        return bad;
    return std::nullopt;
}

/// What MOV to SS and a return to `cpl` ask of a stack segment that is not null.
std::optional<Exception> check_stack_segment(const VirtualCpu& cpu, const GuestSpace& space,
                                             std::uint16_t selector, std::uint8_t cpl, Segment& into) {
    if (auto exception = read_descriptor(cpu, space, selector, into))
        return exception;
    if (selector::rpl(selector) != cpl || !is_writable_data(into) || into.dpl != cpl)
        return Exception::general_protection(selector::error_code(selector));
    if (!into.present)
        return stack_fault(selector::error_code(selector));
    return std::nullopt;
}

Segment null_segment(std::uint16_t selector) {
    Segment result;
    result.selector = selector;
    return result;
}

} // namespace

Segment& segment(VirtualCpu& cpu, SegmentRegister reg) {
    switch (reg) {
    case SegmentRegister::es:
        return cpu.es;
    case SegmentRegister::cs:
        return cpu.cs;
    case SegmentRegister::ss:
        return cpu.ss;
    case SegmentRegister::ds:
        return cpu.ds;
    case SegmentRegister::fs:
        return cpu.fs;
    case SegmentRegister::gs:
        break;
    }
    return cpu.gs;
}

std::optional<std::string_view> unsupported_mode(const VirtualCpu& cpu) {
    if (in_long_mode(cpu))
        return std::nullopt;
    if ((cpu.cr0 & cr0::pe) == 0)
        return "real mode";
    if ((cpu.rflags & rflags::virtual_8086) != 0)
        return "virtual-8086 mode";
    if (cpu.cs.long_mode)
        return "a 64-bit code segment outside long mode";
    return std::nullopt;
}

std::optional<GuestVirt> address_in_segment(const Segment& segment, std::uint64_t offset, std::size_t size,
                                            bool write) {
    const bool readable = !is_code(segment) || (segment.type & descriptor_type::readable) != 0;
    const bool expand_down = !is_code(segment) && (segment.type & descriptor_type::expand_down) != 0;
    const std::uint64_t last = offset + (size - 1);
    const std::uint64_t top = expand_down && !segment.default_32 ? 0xffff : 0xffff'ffff;
    const bool inside = expand_down ? offset > segment.limit && last <= top : last <= segment.limit;
    if (!segment.present || !inside || (write ? !is_writable_data(segment) : !readable))
        return std::nullopt;
    return GuestVirt(static_cast<std::uint32_t>(segment.base + offset));
}

std::optional<Exception> read_descriptor(const VirtualCpu& cpu, const GuestSpace& space,
                                         std::uint16_t selector, Segment& into, std::uint32_t ext) {
    GuestVirt at;
    if (auto exception = locate(cpu, selector, descriptor_size, ext, at))
        return exception;
    std::uint64_t raw = 0;
    if (auto exception = space.read(at, raw))
        return with_selector(exception, selector, ext);
    into = parse(selector, raw);
    into.long_mode &= in_long_mode(cpu);
    return std::nullopt;
}

std::optional<Exception> find_visible_descriptor(const VirtualCpu& cpu, const GuestSpace& space,
                                                 std::uint16_t selector, VisibleDescriptor& into) {
    into = {};
    GuestVirt at;
    if (locate(cpu, selector, descriptor_size, 0, at)) // null, or outside its table
        return std::nullopt;
    std::uint64_t raw = 0;
    if (auto exception = space.read(at, raw))
        return exception->vector == Vector::page_fault ? exception : std::nullopt;
    const Segment found = parse(selector, raw);
    if (is_conforming(found) || (cpu.cpl <= found.dpl && selector::rpl(selector) <= found.dpl))
        into = {.raw = raw, .segment = found};
    return std::nullopt;
}

std::optional<Exception> mark_accessed(const VirtualCpu& cpu, const GuestSpace& space, Segment& segment) {
    if ((segment.type & descriptor_type::accessed) != 0)
        return std::nullopt;
    GuestVirt at;
    if (auto exception = locate(cpu, segment.selector, descriptor_size, 0, at))
        return exception;
    // One byte, as another CPU may be changing the rest: P, DPL, S, type.
    segment.type |= descriptor_type::accessed;
    const auto rights =
        static_cast<std::uint8_t>((segment.present ? 0x80U : 0U) | (unsigned{segment.dpl} << 5) |
                                  (segment.system ? 0U : 0x10U) | segment.type);
    return space.write(at + 5, rights);
}

std::optional<Exception> load_segment(VirtualCpu& cpu, const GuestSpace& space, SegmentRegister reg,
                                      std::uint16_t selector) {
    Segment loaded;
    if (reg == SegmentRegister::ss) {
        if (selector::null(selector)) {
            if (!cpu.cs.long_mode || cpu.cpl == 3 || selector::rpl(selector) != cpu.cpl)
                return Exception::general_protection();
            cpu.ss = null_segment(selector);
            cpu.ss.dpl = cpu.cpl;
            return std::nullopt;
        }
        if (auto exception = check_stack_segment(cpu, space, selector, cpu.cpl, loaded))
            return exception;
    } else {
        if (selector::null(selector)) {
            segment(cpu, reg) = null_segment(selector);
            return std::nullopt;
        }
        if (auto exception = read_descriptor(cpu, space, selector, loaded))
            return exception;
        const bool readable = !is_code(loaded) || (loaded.type & descriptor_type::readable) != 0;
        const bool reachable =
            is_conforming(loaded) || (selector::rpl(selector) <= loaded.dpl && cpu.cpl <= loaded.dpl);
        if (loaded.system || !readable || !reachable)
            return Exception::general_protection(selector::error_code(selector));
        if (!loaded.present)
            return not_present(selector::error_code(selector));
    }
    if (auto exception = mark_accessed(cpu, space, loaded))
        return exception;
    segment(cpu, reg) = loaded;
    return std::nullopt;
}

std::optional<Exception> check_return_code_segment(const VirtualCpu& cpu, const GuestSpace& space,
                                                   std::uint16_t selector, Segment& into) {
    if (auto exception = read_descriptor(cpu, space, selector, into))
        return exception;
    const std::uint8_t rpl = selector::rpl(selector);
    const bool level = is_conforming(into) ? into.dpl <= rpl : into.dpl == rpl;
    if (!is_code(into) || rpl < cpu.cpl || !level || (into.long_mode && into.default_32))
        return Exception::general_protection(selector::error_code(selector));
    if (!into.present)
        return not_present(selector::error_code(selector));
    return std::nullopt;
}

std::optional<Exception> check_return_stack_segment(const VirtualCpu& cpu, const GuestSpace& space,
                                                    std::uint16_t selector, std::uint8_t new_cpl,
                                                    bool to_64_bit, Segment& into) {
    if (selector::null(selector)) {
        if (!to_64_bit || new_cpl == 3 || selector::rpl(selector) != new_cpl)
            return Exception::general_protection();
        into = null_segment(selector);
        into.dpl = new_cpl;
        return std::nullopt;
    }
    return check_stack_segment(cpu, space, selector, new_cpl, into);
}

std::optional<Exception> check_jump_code_segment(const VirtualCpu& cpu, const GuestSpace& space,
                                                 std::uint16_t selector, Segment& into) {
    if (auto exception = read_descriptor(cpu, space, selector, into))
        return exception;
    const auto not_code = std::span(jump_types).first(in_long_mode(cpu) ? 1 : jump_types.size());
    if (into.system && std::ranges::find(not_code, into.type) != not_code.end())
        return std::nullopt;
    const bool level =
        is_conforming(into) ? into.dpl <= cpu.cpl : selector::rpl(selector) <= cpu.cpl && into.dpl == cpu.cpl;
    if (!is_code(into) || !level || (into.long_mode && into.default_32))
        return Exception::general_protection(selector::error_code(selector));
    if (!into.present)
        return not_present(selector::error_code(selector));
    return std::nullopt;
}

void drop_inner_data_segments(VirtualCpu& cpu) {
    for (Segment* reg : {&cpu.es, &cpu.ds, &cpu.fs, &cpu.gs}) {
        // A null selector goes, too, if its RPL is not 0, for the level in its hidden part is.
        if (!reg->present || (reg->dpl < cpu.cpl && !is_conforming(*reg))) {
            reg->selector = 0;
            reg->present = false;
        }
    }
}

std::optional<Exception> load_ldtr(VirtualCpu& cpu, const GuestSpace& space, std::uint16_t selector) {
    if (selector::null(selector)) {
        cpu.ldtr = null_segment(selector);
        cpu.ldtr.system = true;
        return std::nullopt;
    }
    Segment loaded;
    if (auto exception = read_system_descriptor(cpu, space, selector, ldt_types, loaded))
        return exception;
    cpu.ldtr = loaded;
    return std::nullopt;
}

std::optional<Exception> load_tr(VirtualCpu& cpu, const GuestSpace& space, std::uint16_t selector) {
    Segment loaded;
    const auto types = std::span(tss_types).first(in_long_mode(cpu) ? 1 : tss_types.size());
    if (auto exception = read_system_descriptor(cpu, space, selector, types, loaded))
        return exception;
    constexpr std::uint8_t busy = descriptor_type::tss_busy ^ descriptor_type::tss_available;
    loaded.type |= busy;
    const auto rights = static_cast<std::uint8_t>(0x80U | (unsigned{loaded.dpl} << 5) | loaded.type);
    const GuestVirt descriptor = linear(cpu, cpu.gdtr.base.value() + (selector & ~std::uint64_t{7}));
    if (auto exception = space.write(descriptor + 5, rights))
        return with_selector(exception, selector, 0);
    cpu.tr = loaded;
    return std::nullopt;
}

Segment flat_code_segment(std::uint16_t selector, std::uint8_t dpl, bool long_mode) {
    Segment result;
    result.selector = selector;
    result.limit = 0xffff'ffff;
    result.type = descriptor_type::code | descriptor_type::readable | descriptor_type::accessed;
    result.dpl = dpl;
    result.present = true;
    result.long_mode = long_mode;
    result.default_32 = !long_mode;
    result.granularity = true;
    return result;
}

Segment flat_stack_segment(std::uint16_t selector, std::uint8_t dpl) {
    Segment result;
    result.selector = selector;
    result.limit = 0xffff'ffff;
    result.type = descriptor_type::writable | descriptor_type::accessed;
    result.dpl = dpl;
    result.present = true;
    result.default_32 = true;
    result.granularity = true;
    return result;
}

} // namespace umbra
