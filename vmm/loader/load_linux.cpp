// Linux: bzImages by their 64-bit or 32-bit entry, and vmlinux, which is also what a bzImage contains.
#include "vmm/loader/memory_size.hpp"
#include "vmm/loader/protocols.hpp"
#include "vmm/loader/reject.hpp"
#include "vmm/loader/setup_header.hpp"

#include <algorithm>

namespace umbra {

namespace {

constexpr GuestPhys high_load_address{0x100000};

/// Where a bzImage wants its code.
GuestPhys load_address(const setup_header& header) {
    const std::uint64_t preferred =
        header.version < first_version_with_preferred_address ? header.code32_start : header.pref_address;
    return preferred == 0 ? high_load_address : GuestPhys{preferred};
}

GuestPhys initrd_limit(const setup_header& header) {
    return GuestPhys{std::uint64_t{header.initrd_addr_max} + 1};
}

/// The code of a bzImage as it is, which unpacks the kernel in the guest.
LoadedKernel load_bzimage(const LoadContext& context, const LinuxImage& image) {
    setup_header header = image.header;
    // Relocatable kernels are loaded there as well: Linux does not unpack itself below its preferred address,
    // so a lower one would save no memory.
    const GuestPhys load = load_address(header);
    const std::uint64_t size = std::max<std::uint64_t>(header.init_size, image.code_size);
    if (load < high_load_address || load >= low_memory_end || size > low_memory_end - load)
        reject("not supported: a bzImage that wants {:#x} bytes at {}; it must lie between {} and {}", size,
               load, high_load_address, low_memory_end);
    const PlacedKernel placed =
        place_kernel({{.start = load,
                       .size = size,
                       .contents = context.file.subspan(image.code_offset, image.code_size),
                       .linked = GuestVirt{load.value()}}},
                     context.plan);
    header.code32_start = static_cast<std::uint32_t>(load.value());
    const bool long_mode = context.protocol == KernelProtocol::linux64;
    LoadedKernel kernel =
        finish_boot_data(context, long_mode ? StartMode::long_mode : StartMode::protected_mode, header,
                         placed, initrd_limit(header));
    kernel.entry = GuestVirt{load.value() + (long_mode ? long_mode_entry : 0)};
    return kernel;
}

LoadedKernel load_vmlinux(const LoadContext& context, const ElfFile& elf, std::span<const std::byte> file,
                          const setup_header& header) {
    const KernelParts parts = parts_of(elf, file);
    check_entry(parts, GuestPhys{elf.entry});
    LoadedKernel kernel = finish_boot_data(context, StartMode::long_mode, header,
                                           place_kernel(parts, context.plan), initrd_limit(header));
    kernel.entry = GuestVirt{elf.entry};
    return kernel;
}

/// Whether the kernel can be taken out of the bzImage and be entered without its decompressor, which for most
/// kernels executes more instructions than the rest of the boot.
bool unpacks_here(const LoadContext& context, const LinuxImage& image) {
    return context.protocol == KernelProtocol::linux64 && !context.request.guest_decompress &&
           !image.payload.empty() && can_unpack(image.compression);
}

} // namespace

LoadedKernel load_linux(const LoadContext& context) {
    const LinuxImage& image = *context.kernel.linux_image;
    if (!image.is_bzimage)
        return load_vmlinux(context, *context.kernel.elf, context.file, header_without_bzimage());
    if (!unpacks_here(context, image))
        return load_bzimage(context, image);
    const std::vector<std::byte> vmlinux = unpack_payload(image.payload, unpacked_kernel_limit);
    const KernelFile kernel = read_kernel_file(vmlinux);
    if (!kernel.offers(KernelProtocol::elf64))
        reject("damaged bzImage: what it contains is no 64-bit kernel; {}",
               kernel.problem(KernelProtocol::elf64));
    setup_header header = image.header;
    header.code32_start = static_cast<std::uint32_t>(kernel.elf->entry);
    return load_vmlinux(context, *kernel.elf, vmlinux, header);
}

} // namespace umbra
