// Loads a guest kernel into guest RAM by any of the protocols of KernelProtocol.
//
// Kernel files are untrusted: every number in them is checked before it is used, and whatever is wrong with
// them is one StartupError(bad_usage) that says so.
#pragma once

#include "shadow/address.hpp"
#include "shadow/guest_memory.hpp"
#include "vmm/loader/boot_params.hpp"
#include "vmm/loader/kernel_file.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace umbra {

/// A file that is handed to the kernel, with what it is told about it.
struct BootModule {
    std::span<const std::byte> contents;
    std::string_view arguments; ///< without NUL
};

struct LoadRequest {
    std::string_view command_line{};
    /// Linux's and umbra's own protocols pass it as such; for the others it is the first module. Empty: none.
    std::span<const std::byte> initrd{};
    /// Multiboot and PVH only.
    std::span<const BootModule> modules{};
    /// The kernel's name: the first word of a multiboot 1 command line, as QEMU has it. Empty: none.
    std::string_view name{};
    std::optional<KernelProtocol> protocol{}; ///< otherwise the first that the file offers
    bool guest_decompress = false;            ///< Linux: a bzImage unpacks itself
    std::optional<GuestPhys> load_address{};  ///< flat binaries only, which need it
    std::optional<GuestPhys> entry{};         ///< flat binaries only; otherwise the load address
};

/// What the first vCPU needs to start the kernel. Register values beyond these are the same for all kernels
/// (boot_cpu, vmm/machine.hpp); general registers that are not named are 0.
struct LoadedKernel {
    KernelProtocol protocol{};
    StartMode mode{};
    GuestVirt entry;     ///< RIP; identity-mapped
    GuestVirt stack_top; ///< RSP
    std::uint64_t rax = 0, rbx = 0, rsi = 0, rdi = 0;
    GuestPhys page_table_root; ///< CR3; long mode only
    GuestPhys gdt;             ///< GDTR base: boot_gdt_entries(mode, code_selector)
    std::uint16_t code_selector = linux_code_selector;

    [[nodiscard]] std::uint16_t data_selector() const {
        return static_cast<std::uint16_t>(code_selector + descriptor_size);
    }
    [[nodiscard]] std::uint16_t gdt_limit() const {
        return static_cast<std::uint16_t>(data_selector() + descriptor_size - 1);
    }
};

/// The file as loaders read it: unpacked if it is compressed as a whole (gzip, xz, zstd, lz4). Throws
/// StartupError(bad_usage) if that cannot be done.
[[nodiscard]] std::vector<std::byte> unpack_kernel_file(std::vector<std::byte> file);

/// The protocol by which load_kernel() loads the file: the one that is asked for, otherwise the first that is
/// offered; a flat binary only if its load address is told. Throws StartupError(bad_usage) if the file does
/// not offer it, and tells why.
[[nodiscard]] KernelProtocol choose_protocol(const KernelFile& kernel, const LoadRequest& request);

/// Whether a protocol knows of modules; otherwise there is at most an initrd.
[[nodiscard]] bool takes_modules(KernelProtocol protocol);

/// Loads `file`, which may be compressed, with its initrd or modules, and writes what the protocol has for
/// the kernel to read, and what a PC's firmware leaves: BIOS data area, MP and ACPI tables. `memory` must be
/// freshly mapped: what a kernel wants zeroed is left as it is. Throws StartupError(bad_usage) if the file is
/// damaged or does not offer the protocol, or if something does not fit; the message then names how much
/// memory is needed. No message names the file: the caller knows its path.
[[nodiscard]] LoadedKernel load_kernel(std::span<const std::byte> file, const LoadRequest& request,
                                       const GuestMemory& memory);

/// The contents of a regular file, which may be empty. Throws StartupError(bad_usage): "cannot read WHAT
/// 'PATH': REASON".
[[nodiscard]] std::vector<std::byte> read_file(const std::string& path, std::string_view what);
/// Of a kernel's file, which must not be empty.
[[nodiscard]] std::vector<std::byte> read_kernel(const std::string& path);

} // namespace umbra
