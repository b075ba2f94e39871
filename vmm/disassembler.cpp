#include "vmm/disassembler.hpp"

#include <array>

#include <Zydis/Zydis.h>

namespace umbra {

std::string disassemble(std::span<const std::byte> code, GuestVirt at, bool mode64) {
    return disassemble_next(code, at, mode64 ? 64 : 32).text;
}

Disassembled disassemble_next(std::span<const std::byte> code, GuestVirt at, unsigned bits) {
    if (code.empty()) // which Zydis takes for a bad argument
        return {"(no code)"};
    const ZydisMachineMode mode = bits == 64   ? ZYDIS_MACHINE_MODE_LONG_64
                                  : bits == 32 ? ZYDIS_MACHINE_MODE_LONG_COMPAT_32
                                               : ZYDIS_MACHINE_MODE_LONG_COMPAT_16;
    ZydisDisassembledInstruction instruction;
    const ZyanStatus status = ZydisDisassembleIntel(mode, at.value(), code.data(), code.size(), &instruction);
    if (ZYAN_SUCCESS(status))
        return {instruction.text, instruction.info.length};
    return {status == ZYDIS_STATUS_NO_MORE_DATA ? "(no code)" : "(bad)"};
}

} // namespace umbra
