// The loaders of the single protocols, among which load_kernel() chooses. Internal to vmm/loader/.
#pragma once

#include "vmm/devices/vga.hpp"
#include "vmm/loader/kernel_parts.hpp"
#include "vmm/loader/loader.hpp"
#include "vmm/loader/memory_plan.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace umbra {

/// One call of load_kernel(): a file that is not compressed and offers the protocol.
struct LoadContext {
    std::span<const std::byte> file;
    const KernelFile& kernel;
    const LoadRequest& request;
    KernelProtocol protocol{};
    MemoryPlan& plan;
};

// Each throws StartupError(bad_usage) if the kernel cannot be loaded.

/// Linux by its boot protocol (Documentation/arch/x86/boot.rst): linux64 and linux32.
[[nodiscard]] LoadedKernel load_linux(const LoadContext& context);
/// Multiboot Specification version 0.6.96.
[[nodiscard]] LoadedKernel load_multiboot1(const LoadContext& context);
/// Multiboot2 Specification version 2.0.
[[nodiscard]] LoadedKernel load_multiboot2(const LoadContext& context);
/// Xen's x86/HVM direct boot ABI (docs/misc/pvh.pandoc).
[[nodiscard]] LoadedKernel load_pvh(const LoadContext& context);
/// umbra's own: ELF executables and flat binaries, entered with boot_params as Linux has them.
[[nodiscard]] LoadedKernel load_plain(const LoadContext& context);

// --- What several of them need

inline constexpr std::string_view boot_loader_name = "umbra";

/// The VGA's 80x25 text screen, as multiboot tells of it.
struct TextScreen {
    GuestPhys address;
    std::uint32_t pitch = 0, columns = 0, lines = 0; ///< bytes a line; characters
    std::uint8_t bits = 0;                           ///< of a character and its colours
};
inline constexpr TextScreen text_screen{vga_text_memory, sizeof(VgaCell) * vga_columns, vga_columns, vga_rows,
                                        16};
inline constexpr std::uint8_t multiboot_ega_text = 2; ///< type of such a "framebuffer"

/// The setup header's copy in boot_params of a kernel that has none: that of a Linux of the first 64-bit boot
/// protocol.
[[nodiscard]] setup_header header_without_bzimage();

/// What else is put into memory has to know.
struct PlacedKernel {
    GuestPhys end;  ///< as end_of()
    GuestPhys rsdp; ///< the ACPI root pointer
};
/// Loads the parts to where the kernel wants them, and puts around them what firmware leaves. Before anything
/// else is placed.
[[nodiscard]] PlacedKernel place_kernel(const KernelParts& parts, MemoryPlan& plan);

/// Puts the initrd as high as the kernel allows, behind itself and below `initrd_limit`, writes the boot
/// data, and fills all of the result but protocol, mode, entry and RDI.
[[nodiscard]] LoadedKernel finish_boot_data(const LoadContext& context, StartMode mode,
                                            const setup_header& header, const PlacedKernel& placed,
                                            GuestPhys initrd_limit);

/// What a protocol with modules passes to the kernel is put into low memory where the kernel is not: above
/// what kernels use for starting other CPUs, or higher.
[[nodiscard]] PlacementWindow info_window();

struct PlacedModule {
    GuestPhys begin, end;
    std::string_view arguments;
};
/// Copies the modules to page boundaries above the kernel; an initrd is the first of them.
[[nodiscard]] std::vector<PlacedModule> place_modules(const LoadContext& context, GuestPhys kernel_end);

/// As place_modules and PVH and multiboot need it: text with its NUL, in the info window.
GuestPhys store_text(MemoryPlan& plan, std::string_view text);
template<class T>
GuestPhys store_objects(MemoryPlan& plan, const std::vector<T>& objects) {
    return plan.store(std::as_bytes(std::span(objects)), info_window(), "the boot information");
}

/// Protected mode with a GDT as QEMU gives it, and a stack of a page, both in the info window.
[[nodiscard]] LoadedKernel start_in_protected_mode(const LoadContext& context, GuestPhys entry);

/// KiB of RAM from 0 and from 1 MiB, up to the first hole (Multiboot Specification 3.3, "mem_*").
struct BasicMemory {
    std::uint32_t lower = 0, upper = 0;
};
[[nodiscard]] BasicMemory basic_memory(const MemoryPlan& plan);

} // namespace umbra
