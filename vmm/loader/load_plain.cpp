// ELF executables without any header, and flat binaries.
#include "vmm/loader/memory_size.hpp"
#include "vmm/loader/protocols.hpp"

namespace umbra {

namespace {

KernelParts flat_part(const LoadContext& context, GuestPhys load) {
    return {{.start = load,
             .size = context.file.size(),
             .contents = context.file,
             .linked = GuestVirt{load.value()}}};
}

} // namespace

LoadedKernel load_plain(const LoadContext& context) {
    const bool flat = context.protocol == KernelProtocol::flat || context.protocol == KernelProtocol::flat32;
    const bool long_mode =
        context.protocol == KernelProtocol::flat || context.protocol == KernelProtocol::elf64;
    const LoadRequest& request = context.request;
    const GuestPhys load = request.load_address.value_or(GuestPhys{}); // choose_protocol() has seen to it
    const KernelParts parts = flat ? flat_part(context, load) : parts_of(*context.kernel.elf, context.file);
    const GuestPhys entry = flat ? request.entry.value_or(load) : GuestPhys{context.kernel.elf->entry};
    check_entry(parts, entry);
    const PlacedKernel placed = place_kernel(parts, context.plan);
    LoadedKernel kernel =
        finish_boot_data(context, long_mode ? StartMode::long_mode : StartMode::protected_mode,
                         header_without_bzimage(), placed, low_memory_end);
    kernel.entry = GuestVirt{entry.value()};
    kernel.rdi = kernel.rsi;
    return kernel;
}

} // namespace umbra
