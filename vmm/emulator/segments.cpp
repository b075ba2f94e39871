// Descriptor tables, system segments, and segment registers.
#include "vmm/emulator/executor.hpp"

namespace umbra {

// --- Descriptor tables and system segments

/// SLDT, STR, SMSW: 16 bits to memory, the operand size to a register.
Emulation Executor::store_system_register(std::uint64_t value) {
    if (umip_denies())
        return general_protection();
    if (!has_memory_operand()) {
        write_register(rm_operand(), instruction_.operand_width / 8U, value);
        return done();
    }
    const auto word = static_cast<std::uint16_t>(value);
    GuestVirt at;
    if (auto fault = operand_address(memory_operand(), sizeof(word), true, at))
        return raise(*fault);
    if (auto fault = space_->write(at, word, access()))
        return raise(*fault);
    return done();
}

Emulation Executor::store_descriptor_table(const DescriptorTable& table) {
    if (umip_denies())
        return general_protection();
    const std::uint64_t base = table.base.value();
    std::array<std::byte, 10> image{};
    std::memcpy(image.data(), &table.limit, sizeof(table.limit));
    std::memcpy(image.data() + sizeof(table.limit), &base, sizeof(base));
    const auto stored = std::span(image).first(cpu_->cs.long_mode ? 10 : 6);
    GuestVirt at;
    if (auto fault = operand_address(memory_operand(), stored.size(), true, at))
        return raise(*fault);
    if (auto fault = space_->write(at, std::as_bytes(stored), access()))
        return raise(*fault);
    return done();
}

/// m16&64 in 64-bit mode, otherwise m16&32, of whose base an operand size of 16 bits takes 24 bits.
Emulation Executor::load_descriptor_table(DescriptorTable& table) {
    std::array<std::byte, 10> image{};
    const auto loaded = std::span(image).first(cpu_->cs.long_mode ? 10 : 6);
    GuestVirt at;
    if (auto fault = operand_address(memory_operand(), loaded.size(), false, at))
        return raise(*fault);
    if (auto fault = space_->read(at, loaded, access()))
        return raise(*fault);
    std::uint64_t base = 0;
    std::memcpy(&base, image.data() + sizeof(table.limit), sizeof(base));
    if (!cpu_->cs.long_mode && instruction_.operand_width == 16)
        base &= 0xff'ffff;
    if (!canonical(base))
        return general_protection();
    std::memcpy(&table.limit, image.data(), sizeof(table.limit));
    table.base = GuestVirt(base);
    return done();
}

Emulation Executor::load_system_segment() {
    std::uint16_t selector = 0;
    if (auto fault = read_rm16(selector))
        return raise(*fault);
    const Fault fault = instruction_.mnemonic == ZYDIS_MNEMONIC_LLDT ? load_ldtr(*cpu_, *space_, selector)
                                                                     : load_tr(*cpu_, *space_, selector);
    return fault ? raise(*fault) : done();
}

// --- Segment registers

Emulation Executor::load_segment_register(SegmentRegister which, std::uint16_t selector) {
    if (auto fault = load_segment(*cpu_, *space_, which, selector))
        return raise(*fault);
    advance();
    if (which == SegmentRegister::ss)
        return Done{.interrupt_shadow = true, .step = SingleStep::held};
    return Done{};
}

Emulation Executor::pop_segment() {
    SegmentRegister which = SegmentRegister::es;
    switch (instruction_.opcode) {
    case 0x07: // the first three only in compatibility mode
        break;
    case 0x17:
        which = SegmentRegister::ss;
        break;
    case 0x1f:
        which = SegmentRegister::ds;
        break;
    case 0xa1:
        which = SegmentRegister::fs;
        break;
    case 0xa9:
        which = SegmentRegister::gs;
        break;
    default:
        return NotSensitive{};
    }
    // A slot of the operand size, of which the lower 16 bits are the selector.
    const unsigned width = instruction_.operand_width / 8U;
    std::uint64_t slot = 0;
    if (auto fault = read_stack(0, width, std::span(&slot, 1)))
        return raise(*fault);
    const std::uint64_t popped = reg(Gpr::rsp) + width;
    const unsigned pointer_bytes = stack_bytes(); // before SS changes
    Emulation result = load_segment_register(which, static_cast<std::uint16_t>(slot));
    if (std::holds_alternative<Done>(result))
        write_register(Gpr::rsp, pointer_bytes, popped);
    return result;
}

Emulation Executor::load_far_pointer(SegmentRegister which) {
    std::uint16_t selector = 0;
    std::uint64_t offset = 0;
    if (auto fault = read_far_pointer(selector, offset))
        return raise(*fault);
    if (auto fault = load_segment(*cpu_, *space_, which, selector))
        return raise(*fault);
    write_register(reg_operand(), instruction_.operand_width / 8U, offset);
    return done();
}

/// LAR, LSL, VERR and VERW (Intel SDM vol. 2): ZF tells whether the descriptor is one that they know.
Emulation Executor::examine_descriptor() {
    std::uint16_t selector = 0;
    if (auto fault = read_rm16(selector))
        return raise(*fault);
    VisibleDescriptor found;
    if (auto fault = find_visible_descriptor(*cpu_, *space_, selector, found))
        return raise(*fault);
    const Segment& segment = found.segment;
    // Among system descriptors: the TSS of 16 bits, its gates and the task gate are none in long mode.
    const auto among = [&](std::initializer_list<std::uint8_t> types,
                           std::initializer_list<std::uint8_t> legacy) {
        const auto has = [&](std::initializer_list<std::uint8_t> list) {
            return std::ranges::find(list, segment.type) != list.end();
        };
        return has(types) || (!in_long_mode(*cpu_) && has(legacy));
    };
    namespace type = descriptor_type;
    bool known = found.raw.has_value();
    std::optional<std::uint32_t> result;
    switch (instruction_.mnemonic) {
    case ZYDIS_MNEMONIC_LAR: {
        constexpr std::uint32_t rights =
            0x00f0'ff00; // the byte of the type and what is around the limit's bits
        known = known &&
                (!segment.system ||
                 among({type::ldt, type::tss_available, type::tss_busy, type::call_gate},
                       {type::tss_16_available, type::tss_16_busy, type::call_gate_16, type::task_gate}));
        result = static_cast<std::uint32_t>(found.raw.value_or(0) >> 32) & rights;
        break;
    }
    case ZYDIS_MNEMONIC_LSL:
        known = known && (!segment.system || among({type::ldt, type::tss_available, type::tss_busy},
                                                   {type::tss_16_available, type::tss_16_busy}));
        result = segment.limit;
        break;
    case ZYDIS_MNEMONIC_VERR:
        known = known && !segment.system && (!is_code(segment) || (segment.type & type::readable) != 0);
        break;
    default: // VERW
        known = known && is_writable_data(segment);
        break;
    }
    constexpr std::uint64_t zero_flag = 1U << 6;
    cpu_->rflags = known ? cpu_->rflags | zero_flag : cpu_->rflags & ~zero_flag;
    if (known && result)
        write_register(reg_operand(), instruction_.operand_width / 8U, *result);
    return done();
}

} // namespace umbra
