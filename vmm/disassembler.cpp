#include "vmm/disassembler.hpp"

#include <array>

#include <Zydis/Zydis.h>

namespace umbra {

std::string disassemble(std::span<const std::byte> code, GuestVirt at, bool mode64) {
    if (code.empty()) // which Zydis takes for a bad argument
        return "(no code)";
    ZydisDisassembledInstruction instruction;
    const ZyanStatus status =
        ZydisDisassembleIntel(mode64 ? ZYDIS_MACHINE_MODE_LONG_64 : ZYDIS_MACHINE_MODE_LONG_COMPAT_32,
                              at.value(), code.data(), code.size(), &instruction);
    if (ZYAN_SUCCESS(status))
        return instruction.text;
    return status == ZYDIS_STATUS_NO_MORE_DATA ? "(no code)" : "(bad)";
}

} // namespace umbra
