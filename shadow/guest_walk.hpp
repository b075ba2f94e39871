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
    GuestFrame root;              ///< of the top table: CR3 bits [51:12], or [31:12] in 32-bit modes
    bool write_protect = true;    ///< CR0.WP
    bool no_execute = true;       ///< EFER.NXE; means nothing in 32-bit paging
    bool smep = false;            ///< CR4.SMEP
    bool gigabyte_pages = true;   ///< CPUID.80000001H:EDX.Page1GB; otherwise PS is reserved at level 3
    unsigned physical_bits = 48;  ///< MAXPHYADDR, 32 to 52: entry bits [51:physical_bits] are reserved
    bool smap = false;            ///< CR4.SMAP
    bool protection_keys = false; ///< CR4.PKE; means nothing outside 4- and 5-level paging
    std::uint32_t pkru = 0;       ///< two bits for each key: access-disable, write-disable
    bool global_pages = false;    ///< CR4.PGE
    std::uint16_t pcid = 0;       ///< CR3 bits [11:0] while CR4.PCIDE is set, else 0
    std::array<std::uint64_t, 4> pdptes{}; ///< PAE: the PDPTE registers, see load_pdptes
    GuestPhys pdpt;                        ///< PAE: CR3 bits [31:5], where the registers were loaded from

    bool operator==(const GuestPaging&) const = default;
};

/// One access to memory. `user`: made at CPL 3 and not an implicit supervisor access. `ac`: an explicit
/// access with EFLAGS.AC set, which SMAP lets pass; implicit supervisor accesses leave it false.
struct Access {
    bool write = false;
    bool fetch = false;
    bool user = false;
    bool ac = false;
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
    static constexpr std::uint32_t protection_key = 1U << 5;
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
    bool user = false;       ///< all entries that carry rights have U/S set
    bool writable = false;   ///< all entries that carry rights have R/W set
    bool no_execute = false; ///< an entry has XD set
    bool global = false;     ///< the leaf has G set, and CR4.PGE heeds it
    std::uint8_t key = 0;    ///< the leaf's protection key, if CR4.PKE heeds it

    /// Not with paging off, when nothing is visited.
    [[nodiscard]] const Step& leaf() const { return steps[depth - 1]; }
    [[nodiscard]] std::span<const Step> visited() const { return std::span(steps).first(depth); }
};

/// Bits that must be zero in `entry`, found present at `level` (Intel SDM vol. 3A, tables 4-4 to 4-20).
[[nodiscard]] std::uint64_t reserved_bits(const GuestPaging& paging, const Level& level, GuestEntry entry);

/// What a load of CR3 with this value puts into the PDPTE registers under PAE paging; nothing if a present
/// entry has a reserved bit set, which is #GP there (Intel SDM vol. 3A, 4.4.1). Entries outside RAM read as
/// all-ones.
[[nodiscard]] std::optional<std::array<std::uint64_t, 4>>
load_pdptes(const GuestMemory& memory, std::uint64_t cr3, unsigned physical_bits);

/// Walks for one access, reading each entry once. A table outside RAM reads as all-ones, as on a bus where
/// nobody answers. `at` must be canonical (a non-canonical address is #GP or #SS, before any walk). With
/// paging off the address is its own translation, found in no step. Changes nothing.
[[nodiscard]] GuestWalk walk_guest(const GuestMemory& memory, const GuestPaging& paging, GuestVirt at,
                                   Access access);

/// Sets accessed in every entry of a fault-free walk that has the bit, and dirty in its leaf for a write, as
/// the CPU does before it uses the translation (Intel SDM vol. 3A, 4.8); `walk` is updated. Atomic against
/// other writers of the tables: false if an entry changed since the walk read it, and then the walk must be
/// made again.
[[nodiscard]] bool set_accessed_dirty(const GuestMemory& memory, GuestWalk& walk, bool write);

/// walk_guest and set_accessed_dirty until both agree: one access of the CPU.
[[nodiscard]] GuestWalk translate(const GuestMemory& memory, const GuestPaging& paging, GuestVirt at,
                                  Access access);

} // namespace umbra
