// The parts of a kernel file that are copied to guest memory. Internal to vmm/loader/.
#pragma once

#include "vmm/loader/kernel_file.hpp"
#include "vmm/loader/memory_plan.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace umbra {

struct KernelPart {
    GuestPhys start;
    std::uint64_t size = 0;              ///< bytes in memory, at least contents.size(); the rest is zero
    std::span<const std::byte> contents; ///< in the file
    GuestVirt linked;                    ///< the virtual address that the ELF gives to `start`

    [[nodiscard]] GuestPhys end() const { return start + size; }
};

/// Of one kernel, sorted by address; none is empty, none overlap.
using KernelParts = std::vector<KernelPart>;

/// The PT_LOAD segments, at their physical addresses (System V ABI, "Program Loading"). Throws
/// StartupError(bad_usage) if they overlap or wrap around. `file` is what `elf` was read from.
[[nodiscard]] KernelParts parts_of(const ElfFile& elf, std::span<const std::byte> file);
[[nodiscard]] KernelParts parts_of(const MultibootPlacement& placement, std::span<const std::byte> file);

/// Claims the parts' memory and copies them. Memory is fresh: what is behind their contents is zero already.
/// Throws StartupError(bad_usage) if a part does not lie in free memory.
void load_parts(const KernelParts& parts, MemoryPlan& plan);

/// The first byte behind those parts that lie in low memory, where everything else is put; their first byte.
[[nodiscard]] GuestPhys end_of(const KernelParts& parts);
[[nodiscard]] GuestPhys begin_of(const KernelParts& parts);

/// Throws StartupError(bad_usage) unless `entry` is the physical address of something that comes from the
/// file (to enter zeroed memory is never meant) and lies below 4 GB. Whether an ELF calls its segment
/// executable does not matter: no loader asks, and there are kernels that do not.
void check_entry(const KernelParts& parts, GuestPhys entry);

/// Where an ELF is entered by loaders that take e_entry for a virtual address, as QEMU's and GRUB's do, if it
/// lies in a segment as such. Otherwise it is physical. Not checked.
[[nodiscard]] GuestPhys translated_entry(const KernelParts& parts, std::uint64_t entry);

/// For kernels that read their own symbols: the section headers, with the addresses to which the symbol and
/// string tables have been copied (Multiboot Specification 3.3, "syms").
struct SectionTable {
    std::vector<std::byte> headers;
    std::uint32_t count = 0;
    std::uint32_t entry_size = 0;  ///< bytes
    std::uint32_t names_index = 0; ///< of the section that has their names; e_shstrndx
};
/// Copies those tables above the kernel. Without section headers the count is 0. Throws
/// StartupError(bad_usage) if they do not fit.
[[nodiscard]] SectionTable load_sections(const ElfFile& elf, std::span<const std::byte> file,
                                         MemoryPlan& plan, GuestPhys kernel_end);

} // namespace umbra
