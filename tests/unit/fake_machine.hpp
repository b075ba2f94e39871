// A machine in plain memory for the tests of the shadow MMU: guest RAM, a pool of table pages, and a CPU at
// CPL 3 that translates by the shadow tables and knows no more of them than a real one does. It has a TLB,
// and where stores are not seen (DESIGN section 8, hosts B and C) it keeps its own copy of every present
// entry that it has met: what the Mmu forgets to owe, the machine does not see.
#pragma once

#include "shadow/mmu.hpp"

#include <new>
#include <ostream>
#include <unordered_map>
#include <utility>

#include <gtest/gtest.h>
#include <sys/mman.h>

namespace umbra::test {

/// Zeroed memory that costs nothing where it is not touched.
class SparseMemory {
  public:
    explicit SparseMemory(std::uint64_t size) : size_(size) {
        void* const memory =
            mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED)
            throw std::bad_alloc();
        memory_ = static_cast<std::byte*>(memory);
    }
    ~SparseMemory() { munmap(memory_, size_); }
    SparseMemory(const SparseMemory&) = delete;
    SparseMemory& operator=(const SparseMemory&) = delete;
    SparseMemory(SparseMemory&&) = delete;
    SparseMemory& operator=(SparseMemory&&) = delete;

    [[nodiscard]] std::span<std::byte> bytes() const { return {memory_, size_}; }

  private:
    std::byte* memory_ = nullptr;
    std::uint64_t size_;
};

/// How an access of the guest's instruction ends.
struct Outcome {
    std::optional<MachinePhys> address;      ///< it reaches this byte
    std::optional<std::uint32_t> error_code; ///< #PF
    bool trapped_user_fetch = false;
    bool no_slot = false;
    bool guarded = false; ///< only a guard stands against it

    bool operator==(const Outcome&) const = default;
    friend std::ostream& operator<<(std::ostream& out, const Outcome& outcome) {
        if (outcome.address)
            out << fmt::format("{}", *outcome.address);
        if (outcome.error_code)
            out << fmt::format("#PF {:#x}", *outcome.error_code);
        return out << (outcome.trapped_user_fetch ? " trapped" : "") << (outcome.no_slot ? " no slot" : "");
    }
};

class FakeMachine {
  public:
    // Guest-physical space: RAM with a hole below 1 MB that holds a device window, and RAM from 4 GB up.
    static constexpr std::uint64_t mb = std::uint64_t{1} << 20, gb = std::uint64_t{1} << 30;
    static constexpr std::uint64_t hole = 0xa'0000, low_end = 32 * mb, high = 4 * gb, high_end = 6 * gb;
    static constexpr GuestFrame window{0xb8}, behind_window{0xc0};
    // Machine-physical space: beyond anything that the guest may name.
    static constexpr MachineFrame pool_first{0x2'0000'0000}, nothing{0x1'fffe'ffff};
    static constexpr ShadowEntry switcher{MachineFrame{0x1'ffff'0000},
                                          entry_bit::present | entry_bit::writable | entry_bit::accessed |
                                              entry_bit::dirty};

    struct Options {
        std::size_t pool_pages = 512;
        bool stores_seen = false;
        bool gigabyte_pages = true;
        unsigned first_slot = 300;
        bool audits = true; ///< at each entry
        Sync sync = Sync::compare;
        unsigned trap_cost = 4;
        unsigned settled_after = 2;
        unsigned prefetch = 1;
    };

    explicit FakeMachine() : FakeMachine(Options{}) {}
    explicit FakeMachine(const Options& options)
        : options_(options), low_(low_end), high_(high_end - high),
          pool_memory_(options.pool_pages * page_size), memory({{GuestPhys(0), low_.bytes().first(hole)},
                                                                {GuestPhys(mb), low_.bytes().subspan(mb)},
                                                                {GuestPhys(high), high_.bytes()}}),
          pool(pool_first, pool_memory_.bytes()), tables(memory, pool, config(options), switcher),
          mmu(tables) {}

    static MmuConfig config(const Options& options) {
        MmuConfig config;
        config.nothing = nothing;
        config.gigabyte_pages = options.gigabyte_pages;
        config.stores_seen = options.stores_seen;
        config.first_slot = options.first_slot;
        config.sync = options.sync;
        config.trap_cost = options.trap_cost;
        config.settled_after = options.settled_after;
        config.prefetch = options.prefetch;
        return config;
    }

    // ---- the guest's memory

    /// A page of RAM that nobody uses yet, zeroed.
    [[nodiscard]] GuestFrame new_frame() { return std::exchange(next_frame_, next_frame_ + 1); }
    /// A store by the guest: unseen where the machine may write to the frame, a trap elsewhere.
    void store(GuestPhys slot, std::uint64_t value) {
        const bool unseen = std::ranges::any_of(tlb_, [&](const auto& cached) {
            return cached.second.writable && cached.second.page.number() == slot.frame().number();
        });
        // The trap comes before the store: as if umbra had written elsewhere in the page, what the entry was
        // is still there.
        if (!unseen)
            (void)tables.wrote(slot.frame().base() + (slot.page_offset() ^ (page_size / 2)), 1);
        EXPECT_TRUE(memory.write(slot, value));
        if (!unseen && options_.sync == Sync::trap)
            (void)tables.wrote(slot, sizeof(value));
    }
    /// A store by umbra itself, told of afterwards.
    void store_by_umbra(GuestPhys slot, std::uint64_t value) {
        EXPECT_TRUE(memory.write(slot, value));
        (void)tables.wrote(slot, sizeof(value));
    }
    void put(GuestPhys slot, GuestEntry entry) { store(slot, entry.raw()); }
    [[nodiscard]] GuestEntry get(GuestPhys slot) const {
        return GuestEntry(memory.read<std::uint64_t>(slot).value());
    }
    /// Where entry `index` of a table lies.
    static constexpr GuestPhys slot_of(GuestFrame table, std::uint64_t index) {
        return table.base() + index * sizeof(GuestEntry);
    }
    /// Where the entry that translates `at` at `level` lies; the tables above it must exist.
    [[nodiscard]] GuestPhys slot(GuestFrame root, GuestVirt at, unsigned level = 1) const {
        GuestFrame table = root;
        for (unsigned number = paging_4_level.root().number; number > level; --number)
            table = get(slot_of(table, paging_4_level.level(number).index(at))).table();
        return slot_of(table, paging_4_level.level(level).index(at));
    }
    /// Maps by an entry of `level`. Tables that are missing are made, with all rights.
    void map(GuestFrame root, GuestVirt at, GuestFrame frame, std::uint64_t bits, unsigned level = 1) {
        for (unsigned number = paging_4_level.root().number; number > level; --number) {
            const GuestPhys above = slot(root, at, number);
            if (!get(above).present())
                put(above,
                    GuestEntry(new_frame(), entry_bit::present | entry_bit::writable | entry_bit::user));
        }
        put(slot(root, at, level), GuestEntry(frame, bits | (level > 1 ? entry_bit::page_size : 0)));
    }

    // ---- the guest's instructions, each as the monitor does it

    void load_cr3(GuestFrame root) {
        paging.root = root;
        mmu.set_paging(paging);
        mmu.flush();
        enter();
    }
    void invlpg(GuestVirt at) {
        mmu.invalidate(at);
        enter();
    }
    /// After a change of `paging` that flushes nothing (CR0.WP; Intel SDM vol. 3A, 4.10.4.1).
    void set_control() {
        mmu.set_paging(paging);
        enter();
    }
    void set_user(bool user) {
        user_ = user;
        enter();
    }
    [[nodiscard]] bool user() const { return user_; }

    Outcome read(GuestVirt at) { return access(at, {}); }
    Outcome write(GuestVirt at) { return access(at, {.write = true}); }
    Outcome fetch(GuestVirt at) { return access(at, {.fetch = true}); }

    /// Misses of the last access.
    [[nodiscard]] unsigned misses() const { return misses_; }

    Outcome access(GuestVirt at, Access access) {
        access.user = user_;
        for (misses_ = 0;; ++misses_) {
            if (const auto address = lookup(at, access))
                return {.address = address, .error_code = {}};
            if (misses_ == patience) {
                ADD_FAILURE() << fmt::format("{}: filled, and still a miss", at);
                return {};
            }
            const MissResult miss = mmu.fault(at, access);
            if (miss.outcome == Miss::table_write)
                mmu.begin_table_write();
            enter();
            switch (miss.outcome) {
            case Miss::table_write:
            case Miss::filled:
                break;
            case Miss::guest_fault:
                EXPECT_EQ(miss.fault.address, at);
                return {.address = {},
                        .error_code = miss.fault.error_code,
                        .trapped_user_fetch = miss.trapped_user_fetch};
            case Miss::guarded:
                return {.address = {}, .error_code = {}, .guarded = true};
            case Miss::no_slot:
                return {.address = {}, .error_code = {}, .no_slot = true};
            }
        }
    }

    // ---- the machine

    static constexpr unsigned patience =
        3; ///< misses of one access: the Mmu needs one, a moved slot none more

    /// Loads the root and pays the debt, as the switcher does before the guest runs.
    void enter() {
        if (options_.audits) {
            EXPECT_EQ(mmu.audit(), std::nullopt);
        }
        MachineState state = mmu.enter(user_);
        const MachineFrame root = state.root;
        const Debt& debt = state.debt;
        if (root_ && pool.entries(*pool.page_of(*root_))[mmu.reserved_slot()] != switcher && !debt.root_gone)
            ADD_FAILURE() << "the loaded root does not carry the switcher, and the debt does not say so";
        if (debt.flush || root_ != root)
            tlb_.clear();
        for (const TableIndex table : debt.tables)
            copies_[TablePool::number(table)].clear();
        flushes_paid += debt.flush ? 1 : 0;
        tables_paid += debt.tables.size();
        state.debt.paid();
        root_ = root;
    }

    /// The byte that an access at CPL 3 reaches; nothing if it is a miss.
    [[nodiscard]] std::optional<MachinePhys> lookup(GuestVirt at, Access access) {
        auto found = tlb_.find(at.frame().number());
        if (found == tlb_.end() || !found->second.allows(access)) {
            // A fault makes the CPU forget the entry, and a KVM without sight of stores look at the leaf
            // again.
            if (found != tlb_.end())
                tlb_.erase(found);
            auto translation = walk_tables(at, options_.stores_seen ? Copies::unused : Copies::believed);
            if (!options_.stores_seen && !(translation && translation->allows(access)))
                translation = walk_tables(at, Copies::refreshed);
            if (!translation || !translation->allows(access))
                return std::nullopt;
            found = tlb_.emplace(at.frame().number(), *translation).first;
        }
        return found->second.page.base() + at.page_offset();
    }

    std::uint64_t flushes_paid = 0;
    std::uint64_t tables_paid = 0; ///< touched by ring-0 code

  private:
    struct Translation {
        MachineFrame page; ///< of 4 KB
        bool writable = true;
        bool no_execute = false;

        [[nodiscard]] bool allows(Access access) const {
            return (!access.write || writable) && (!access.fetch || !no_execute);
        }
    };
    enum class Copies {
        unused,    ///< every entry comes from memory
        believed,  ///< present copies are believed
        refreshed, ///< the leaf is copied anew
    };

    /// The entry, or the machine's copy of it.
    [[nodiscard]] ShadowEntry read_entry(MachineFrame table, const Level& level, unsigned slot,
                                         Copies copies) {
        const TableIndex page = pool.page_of(table).value();
        const ShadowEntry stored = pool.entries(page)[slot];
        if (copies == Copies::unused)
            return stored;
        ShadowEntry& copy = copies_[TablePool::number(page)][slot];
        const bool leaf = copy.present() && copy.leaf(level);
        if (!copy.present() || (copies == Copies::refreshed && leaf))
            copy = stored;
        return copy;
    }

    [[nodiscard]] std::optional<Translation> walk_tables(GuestVirt at, Copies copies) {
        Translation result;
        MachineFrame table = root_.value();
        for (const Level& level : paging_4_level.levels) {
            const ShadowEntry entry = read_entry(table, level, level.index(at), copies);
            if (!entry.present() || !entry.user())
                return std::nullopt;
            if (level.number == 3 && entry.leaf(level) && !options_.gigabyte_pages)
                return std::nullopt; // PS is reserved
            result.writable &= entry.writable();
            result.no_execute |= entry.no_execute();
            if (entry.leaf(level)) {
                result.page = (entry.page(level).base() + (at.value() & (level.span() - 1))).frame();
                return result;
            }
            table = entry.table();
        }
        return std::nullopt;
    }

    Options options_;
    SparseMemory low_, high_, pool_memory_;
    GuestFrame next_frame_{mb >> page_shift};
    bool user_ = false;
    unsigned misses_ = 0;
    std::optional<MachineFrame> root_;
    std::unordered_map<std::uint64_t, Translation> tlb_; ///< by page of the address
    std::unordered_map<std::size_t, std::unordered_map<unsigned, ShadowEntry>>
        copies_; ///< by pool page, slot

  public:
    GuestPaging paging;
    GuestMemory memory;
    TablePool pool;
    ShadowTables tables;
    Mmu mmu;
};

} // namespace umbra::test
