#include "tests/model/convert.hpp"

#include <array>
#include <utility>

#include <fmt/core.h>

namespace umbra::model {

const PagingFormat& to_format(const Cpu& cpu) {
    switch (cpu.mode) {
    case Mode::off:
        break;
    case Mode::legacy:
        return cpu.pse ? paging_32_bit_pse : paging_32_bit;
    case Mode::pae:
        return paging_pae;
    case Mode::four_level:
        return paging_4_level;
    case Mode::five_level:
        return paging_5_level;
    }
    return paging_off;
}

GuestPaging to_paging(const Cpu& cpu) {
    GuestPaging paging;
    paging.format = &to_format(cpu);
    paging.root = GuestPhys(cpu.root).frame();
    paging.write_protect = cpu.wp;
    paging.no_execute = cpu.nxe;
    paging.smep = cpu.smep;
    paging.smap = cpu.smap;
    paging.gigabyte_pages = cpu.gigabyte_pages;
    paging.physical_bits = cpu.maxphyaddr;
    paging.protection_keys = cpu.pke;
    paging.pkru = cpu.pkru;
    paging.global_pages = cpu.pge;
    paging.pcid = cpu.pcid;
    if (cpu.mode == Mode::pae) {
        paging.pdptes = cpu.pdpte;
        paging.pdpt = GuestPhys(cpu.root);
    }
    return paging;
}

umbra::Access to_access(Access access) {
    return {.write = access.kind == Kind::write,
            .fetch = access.kind == Kind::fetch,
            .user = access.user,
            .ac = access.ac};
}

std::string text(Access access) {
    constexpr std::array kinds{"read", "write", "fetch"};
    return fmt::format("{} by {}{}", kinds.at(static_cast<std::size_t>(access.kind)),
                       access.user ? "user" : "kernel", access.ac ? ", AC" : "");
}

std::string text(const Cpu& cpu) {
    constexpr std::array modes{"paging off", "32-bit", "PAE", "4-level", "5-level"};
    std::string result = modes.at(static_cast<std::size_t>(cpu.mode));
    for (const auto& [set, name] :
         {std::pair(cpu.pse, " PSE"), std::pair(cpu.wp, " WP"), std::pair(cpu.nxe, " NXE"),
          std::pair(cpu.smep, " SMEP"), std::pair(cpu.smap, " SMAP"), std::pair(cpu.pge, " PGE"),
          std::pair(cpu.pcide, " PCIDE"), std::pair(cpu.gigabyte_pages, " 1GB")}) {
        if (set)
            result += name;
    }
    if (cpu.pke)
        result += fmt::format(" PKE {:#x}", cpu.pkru);
    return result;
}

std::string flags_text(std::uint64_t entry) {
    std::string result;
    for (const auto& [bit, name] :
         {std::pair(0, " P"), std::pair(1, " W"), std::pair(2, " U"), std::pair(5, " A"), std::pair(6, " D"),
          std::pair(7, " PS"), std::pair(8, " G"), std::pair(63, " XD")}) {
        if ((entry >> bit & 1) != 0)
            result += name;
    }
    return result.empty() ? "-" : result.substr(1);
}

} // namespace umbra::model
