// Loads a guest kernel into guest RAM: 64-bit ELF executables and Linux bzImages with a 64-bit entry.
//
// Kernel files are untrusted: every number in them is checked before it is used, and whatever is wrong with
// them is one StartupError(bad_usage) that says so.
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"
#include "vmm/loader/boot_params.hpp"

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

struct LoadRequest {
    std::string_view command_line;
    std::span<const std::byte> initrd; ///< empty: none
};

enum class BootProtocol {
    elf64,   ///< entered at e_entry
    linux64, ///< bzImage, entered at its 64-bit entry (Documentation/arch/x86/boot.rst, "64-bit Boot
             ///< Protocol")
};

/// What the first vCPU needs to start the kernel. Register values beyond these are the same for all kernels.
struct LoadedKernel {
    BootProtocol protocol{};
    GuestVirt entry;                              ///< RIP; identity-mapped
    GuestVirt stack_top = boot_stack_top;         ///< RSP
    GuestPhys boot_params = boot_params_address;  ///< RSI and RDI
    GuestPhys page_table_root = boot_page_tables; ///< CR3
    GuestPhys gdt = boot_gdt;                     ///< GDTR base; its limit is sizeof boot_gdt_entries - 1
};

/// Loads `file`, the command line and the initrd, and writes the boot data. `memory` must be freshly mapped:
/// what a kernel wants zeroed is left as it is. Throws StartupError(bad_usage) if the file is damaged or of
/// an unsupported kind, or if something does not fit; the message then names how much memory is needed. No
/// message names the file: the caller knows its path.
[[nodiscard]] LoadedKernel load_kernel(std::span<const std::byte> file, const LoadRequest& request,
                                       const GuestMemory& memory);

/// The contents of a regular file that is not empty. Throws StartupError(bad_usage): "cannot read WHAT
/// 'PATH': REASON".
[[nodiscard]] std::vector<std::byte> read_file(const std::string& path, std::string_view what = "kernel");

} // namespace umbra
