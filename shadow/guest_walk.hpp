// Translation by the guest's own page tables, as its CPU would do it.
#pragma once

#include "shadow/format.hpp"
#include "shadow/guest_memory.hpp"
#include "shadow/walker.hpp"

#include <array>
#include <optional>

namespace umbra {

/// The control-register state that decides how the guest's tables are read (Intel SDM vol. 3A, 4.1.1
/// and 4.6).
struct GuestPaging {
    const PagingFormat* format = &paging_4_level;
    GuestFrame root;             ///< CR3 bits [51:12]
    bool write_protect = true;   ///< CR0.WP
    bool no_execute = true;      ///< EFER.NXE
    bool smep = false;           ///< CR4.SMEP
    bool gigabyte_pages = true;  ///< CPUID.80000001H:EDX.Page1GB; otherwise PS is reserved at level 3
    unsigned physical_bits = 48; ///< MAXPHYADDR: entry bits [51:physical_bits] are reserved

    bool operator==(const GuestPaging&) const = default;
};

/// One access to memory. `user`: made at CPL 3 and not an implicit supervisor access.
struct Access {
    bool write = false;
    bool fetch = false;
    bool user = false;
};

/// #PF as the guest sees it. Error code bits: Intel SDM vol. 3A, 4.7.
struct PageFault {
    GuestVirt address;
    std::uint32_t error_code = 0;

    static constexpr std::uint32_t present = 1U << 0;
    static constexpr std::uint32_t write = 1U << 1;
    static constexpr std::uint32_t user = 1U << 2;
    static constexpr std::uint32_t reserved = 1U << 3;
    static constexpr std::uint32_t fetch = 1U << 4;
};

/// The record of one walk: every entry met, and either a translation or the fault to inject.
struct GuestWalk {
    struct Step {
        const Level* level = nullptr;
        GuestPhys slot;
        GuestEntry entry;
    };
    std::array<Step, 5> steps{};
    unsigned depth = 0; ///< steps used, root first; the last one is the leaf or where the walk ended
    std::optional<PageFault> fault;
    GuestPhys address;       ///< of the byte asked for; only without a fault
    bool user = false;       ///< all entries have U/S set
    bool writable = false;   ///< all entries have R/W set
    bool no_execute = false; ///< an entry has XD set

    [[nodiscard]] const Step& leaf() const { return steps[depth - 1]; }
    [[nodiscard]] std::span<const Step> visited() const { return std::span(steps).first(depth); }
};

/// Walks for one access, reading each entry once. A table outside RAM reads as all-ones, as on a bus where
/// nobody answers. `at` must be canonical (a non-canonical address is #GP or #SS, before any walk). Changes
/// nothing.
[[nodiscard]] GuestWalk walk_guest(const GuestMemory& memory, const GuestPaging& paging, GuestVirt at,
                                   Access access);

/// Sets accessed in every entry of a fault-free walk, and dirty in its leaf for a write, as the CPU does
/// before it uses the translation (Intel SDM vol. 3A, 4.8); `walk` is updated. Atomic against other writers
/// of the tables: false if an entry changed since the walk read it, and then the walk must be made again.
[[nodiscard]] bool set_accessed_dirty(const GuestMemory& memory, GuestWalk& walk, bool write);

/// walk_guest and set_accessed_dirty until both agree: one access of the CPU.
[[nodiscard]] GuestWalk translate(const GuestMemory& memory, const GuestPaging& paging, GuestVirt at,
                                  Access access);

} // namespace umbra
