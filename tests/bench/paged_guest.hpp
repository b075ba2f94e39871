// Guests for the shadow MMU alone: page tables in memory, and the Mmu over them. No machine, no trap.
#pragma once

#include "shadow/mmu.hpp"
#include "vmm/host_memory.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace umbra::bench {

/// Address spaces with private pages from address 0 up and the kernel's, which they have in common, from
/// `kernel_begin` up; all of 4 KB.
class PagedGuest {
  public:
    static constexpr GuestVirt kernel_begin{std::uint64_t{1} << 46};

    struct Shape {
        unsigned spaces = 1;
        std::size_t private_tables = 0; ///< of level 1, in each space; each maps 2 MB
        std::size_t kernel_tables = 0;  ///< likewise, in common
        bool used = false;              ///< all pages have been accessed, and written to
    };
    explicit PagedGuest(const Shape& shape);

    [[nodiscard]] const Shape& shape() const { return shape_; }
    [[nodiscard]] std::size_t private_pages() const { return shape_.private_tables * entries_per_table; }
    [[nodiscard]] const GuestMemory& memory() const { return memory_; }
    [[nodiscard]] GuestPaging paging(unsigned space) const;

    [[nodiscard]] static GuestVirt private_page(std::size_t page) { return GuestVirt(page * page_size); }
    [[nodiscard]] static GuestVirt kernel_page(std::size_t page) { return kernel_begin + page * page_size; }
    /// Where the entry lies that maps a page.
    [[nodiscard]] GuestPhys private_entry(unsigned space, std::size_t page) const {
        return private_entries_[space] + page * sizeof(GuestEntry);
    }
    [[nodiscard]] GuestPhys kernel_entry(std::size_t page) const {
        return kernel_entries_ + page * sizeof(GuestEntry);
    }
    /// Makes an entry map another page than before.
    void remap(GuestPhys entry) const;

  private:
    [[nodiscard]] GuestPhys new_tables(std::size_t count);
    void set(GuestPhys table, std::size_t slot, GuestPhys target, std::uint64_t bits) const;
    [[nodiscard]] GuestPhys map(GuestPhys root, GuestVirt begin, std::size_t tables);

    Shape shape_;
    HostMemory ram_;
    GuestMemory memory_;
    GuestPhys next_table_{page_size};
    GuestPhys data_; ///< the pages that all spaces map
    std::vector<GuestPhys> roots_, private_entries_;
    GuestPhys kernel_entries_;
};

/// The shadow MMU of one vCPU that runs such a guest's kernel.
class ShadowedGuest {
  public:
    /// `pool_pages`: 0 for as many as the guest can need.
    ShadowedGuest(const PagedGuest& guest, const MmuConfig& config, std::size_t pool_pages = 0);

    [[nodiscard]] const PagedGuest& guest() const { return guest_; }
    [[nodiscard]] Mmu& mmu() { return mmu_; }
    [[nodiscard]] ShadowTables& tables() { return tables_; }
    [[nodiscard]] const MmuCounters& counters() const { return tables_.counters(); }

    /// What the monitor does before the guest runs.
    void enter() { mmu_.enter(false).debt.paid(); }
    /// Hidden fault.
    void fault(GuestVirt at, Access access = {}) {
        (void)mmu_.fault(at, access);
        enter();
    }
    /// MOV CR3.
    void load(unsigned space) {
        mmu_.set_paging(guest_.paging(space));
        mmu_.flush();
        enter();
    }
    /// INVLPG.
    void invalidate(GuestVirt at) {
        mmu_.invalidate(at);
        enter();
    }

    /// Whether the machine can read there without a fault.
    [[nodiscard]] bool mapped(GuestVirt at);
    /// Has each space use one page of each of its tables but the last `spare` ones, and of the kernel's.
    void populate(std::size_t spare = 0);
    /// Loads each space in turn until no table is compared any more, or it has taken too long. False then.
    [[nodiscard]] bool settle();

  private:
    const PagedGuest& guest_;
    HostMemory pool_memory_;
    TablePool pool_;
    ShadowTables tables_;
    Mmu mmu_;
};

} // namespace umbra::bench
