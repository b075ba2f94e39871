// PVH: the start information, its modules and memory map (Xen, public/arch-x86/hvm/start_info.h).
#include "vmm/loader/protocols.hpp"

namespace umbra {

namespace {

struct StartInfo {
    std::uint32_t magic = 0x336ec578;
    std::uint32_t version = 1;
    std::uint32_t flags = 0;
    std::uint32_t module_count = 0;
    std::uint64_t modules = 0;      ///< address
    std::uint64_t command_line = 0; ///< address
    std::uint64_t rsdp = 0;         ///< address
    std::uint64_t memory_map = 0;   ///< address
    std::uint32_t memory_map_entries = 0;
    std::uint32_t reserved = 0;
};
static_assert(sizeof(StartInfo) == 56);

struct ModuleEntry {
    std::uint64_t address = 0;
    std::uint64_t size = 0;      ///< bytes
    std::uint64_t arguments = 0; ///< address
    std::uint64_t reserved = 0;
};

struct MemoryMapEntry {
    std::uint64_t address = 0;
    std::uint64_t size = 0; ///< bytes
    std::uint32_t type = 0; ///< as in the e820 map
    std::uint32_t reserved = 0;
};

} // namespace

LoadedKernel load_pvh(const LoadContext& context) {
    MemoryPlan& plan = context.plan;
    const KernelParts parts = parts_of(*context.kernel.elf, context.file);
    check_entry(parts, *context.kernel.pvh_entry);
    const PlacedKernel placed = place_kernel(parts, plan);

    std::vector<ModuleEntry> modules;
    for (const PlacedModule& module : place_modules(context, placed.end))
        modules.push_back(
            {module.begin.value(), module.end - module.begin, store_text(plan, module.arguments).value()});
    std::vector<MemoryMapEntry> map;
    for (const boot_e820_entry& entry : plan.memory_map())
        map.push_back({entry.addr, entry.size, entry.type});

    StartInfo info;
    info.module_count = static_cast<std::uint32_t>(modules.size());
    if (!modules.empty())
        info.modules = store_objects(plan, modules).value();
    info.command_line = store_text(plan, context.request.command_line).value();
    info.rsdp = placed.rsdp.value();
    info.memory_map = store_objects(plan, map).value();
    info.memory_map_entries = static_cast<std::uint32_t>(map.size());

    LoadedKernel kernel = start_in_protected_mode(context, *context.kernel.pvh_entry);
    kernel.rbx = store_objects(plan, std::vector{info}).value();
    return kernel;
}

} // namespace umbra
