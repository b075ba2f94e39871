// The interrupt flag, HLT, and port I/O.
#include "vmm/emulator/executor.hpp"

namespace umbra {
namespace {

/// Elements of one repeated INS or OUTS that are done before the guest may be interrupted again.
constexpr unsigned string_chunk = 1024;

// Offset of the I/O map base in the 64-bit and the 32-bit TSS (Intel SDM vol. 3A, figures 7-11 and 7-2).
constexpr std::uint32_t tss_io_map_base = 102;

} // namespace

// --- Interrupt flag, HLT

Emulation Executor::set_interrupt_flag() {
    if (!io_flag_privileged())
        return general_protection();
    const bool was_set = cpu_->interrupts_enabled();
    cpu_->rflags |= rflags::interrupt;
    advance();
    if (was_set)
        return Done{};
    // STI; HLT in one go: no interrupt can come between, and its wake-up be lost.
    constexpr std::byte hlt{0xf4};
    if (instruction_.length < fetched_ && bytes_[instruction_.length] == hlt && privileged() && !steps()) {
        cpu_->rip += 1;
        cpu_->halted = true;
        return Halted{};
    }
    return Done{.interrupt_shadow = true};
}

Emulation Executor::halt() {
    advance();
    cpu_->halted = true;
    return Halted{};
}

// --- Port I/O

/// IOPL, or else the I/O permission bitmap (Intel SDM vol. 1, 18.5.2).
Fault Executor::check_port(std::uint16_t port, unsigned size) {
    if (io_flag_privileged())
        return std::nullopt;
    const Segment& tss = cpu_->tr;
    std::uint16_t map_base = 0;
    const bool has_map = (tss.type | 2) == descriptor_type::tss_busy; // a 16-bit TSS has none
    if (!tss.present || !has_map || tss.limit < tss_io_map_base + 1)
        return Exception::general_protection();
    if (auto fault = space_->read(linear(*cpu_, tss.base + tss_io_map_base), map_base))
        return fault;
    // The CPU always reads two bytes, as the ports may lie in both.
    const std::uint32_t offset = map_base + port / 8U;
    if (offset + 1 > tss.limit)
        return Exception::general_protection();
    std::uint16_t bits = 0;
    if (auto fault = space_->read(linear(*cpu_, tss.base + offset), bits))
        return fault;
    if (((bits >> (port % 8U)) & ((1U << size) - 1)) != 0)
        return Exception::general_protection();
    return std::nullopt;
}

Emulation Executor::port_io() {
    const bool write = instruction_.mnemonic == ZYDIS_MNEMONIC_OUT;
    const bool immediate = instruction_.raw.imm[0].size != 0;
    const auto port = static_cast<std::uint16_t>(immediate ? instruction_.raw.imm[0].value.u : reg(Gpr::rdx));
    const bool byte = (instruction_.opcode & 1) == 0;
    const unsigned size = byte ? 1 : instruction_.operand_width == 16 ? 2 : 4;
    if (auto fault = check_port(port, size))
        return raise(*fault);
    if (environment_->kernel_owns(port)) {
        advance();
        return PortAccess{port, static_cast<std::uint8_t>(size), write};
    }
    if (write) {
        const std::uint64_t mask = (std::uint64_t{1} << (8 * size)) - 1;
        environment_->port_write(port, size, static_cast<std::uint32_t>(reg(Gpr::rax) & mask));
    } else {
        write_register(Gpr::rax, size, environment_->port_read(port, size));
    }
    return done();
}

Emulation Executor::string_io() {
    const bool write = (instruction_.opcode & 2) != 0; // 6E and 6F are OUTS
    const bool byte = (instruction_.opcode & 1) == 0;
    const unsigned size = byte ? 1 : instruction_.operand_width == 16 ? 2 : 4;
    const auto port = static_cast<std::uint16_t>(reg(Gpr::rdx));
    if (auto fault = check_port(port, size))
        return raise(*fault);
    if (environment_->kernel_owns(port))
        return Unsupported{"string I/O at a port of an in-kernel device"};

    constexpr ZydisInstructionAttributes any_repeat =
        ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE;
    const bool repeated = (instruction_.attributes & any_repeat) != 0;
    const unsigned address_bytes = instruction_.address_width / 8U;
    const std::uint64_t address_mask =
        address_bytes == 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * address_bytes)) - 1;
    const Gpr pointer = write ? Gpr::rsi : Gpr::rdi;
    const std::uint64_t step = (cpu_->rflags & rflags::direction) != 0 ? -std::uint64_t{size} : size;
    const ZydisDecodedOperand& memory = memory_operand();
    const unsigned chunk = steps() ? 1 : string_chunk;

    for (unsigned elements = 0;; ++elements) {
        if (repeated && (reg(Gpr::rcx) & address_mask) == 0)
            return done();
        if (elements == chunk)
            return Done{};
        GuestVirt at;
        if (auto fault = operand_address(memory, size, !write, at))
            return raise(*fault);
        std::uint32_t value = 0;
        const auto bytes = std::as_writable_bytes(std::span(&value, 1)).first(size);
        // For INS this finds a fault before the device is read, which cannot be undone.
        if (auto fault = space_->read(at, bytes, access(!write)))
            return raise(*fault);
        if (write) {
            environment_->port_write(port, size, value);
        } else {
            value = environment_->port_read(port, size);
            if (auto fault = space_->write(at, std::as_bytes(bytes), access()))
                return raise(*fault);
        }
        write_register(pointer, address_bytes, reg(pointer) + step);
        if (!repeated)
            return done();
        write_register(Gpr::rcx, address_bytes, reg(Gpr::rcx) - 1);
    }
}

} // namespace umbra
