// The shadow MMU of one vCPU: what its CR3, its invalidations and its page faults mean.
//
// Contract: the machine on these tables behaves as a CPU whose TLB starts empty at each flush
// (shadow/README.md). The tables themselves are shared with the other vCPUs: shadow/shadow_tables.hpp.
#pragma once

#include "shadow/shadow_tables.hpp"
#include "shadow/tlb_sanitizer.hpp"

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace umbra {

enum class Miss {
    filled,      ///< hidden fault: the access will now succeed, or get further
    guest_fault, ///< the guest's own tables ask for the fault
    table_write, ///< Sync::trap only: the write is to a table of the guest; see Mmu::begin_table_write
    guarded,     ///< only a guard stands against the access; see Mmu::begin_guarded_access
    no_slot,     ///< the guest uses every top-level slot: there is no room for the switcher
};

struct MissResult {
    Miss outcome = Miss::filled;
    PageFault fault{}; ///< only for guest_fault
    /// With guest_fault: the guest's tables allow the fetch; only trap_user_fetch stands against it.
    bool trapped_user_fetch = false;
    GuestPhys address{}; ///< only for table_write and guarded: of the first byte accessed
};

/// Which translations a flush drops (Intel SDM vol. 3A, 4.10.4.1).
struct FlushScope {
    bool all_contexts = false; ///< otherwise those of `pcid` only
    std::uint16_t pcid = 0;
    bool globals = false; ///< those of global pages too
};

/// Whether a vCPU goes on using old translations that a CPU might still have.
enum class TlbPolicy : std::uint8_t {
    drop, ///< as it comes, or, with Sync::trap, dropped when the guest changes its tables
    keep, ///< kept as long as the architecture permits; needs a sanitizer, which remembers them
};

/// What the machine needs to enter the guest.
struct MachineState {
    MachineFrame root;
    unsigned reserved_slot = 0; ///< the top-level slot that the switcher is in
    Debt debt;                  ///< to be paid before the guest runs
};

class Mmu {
  public:
    /// `number`: of the vCPU; each has its own. `tables` outlive the Mmu.
    explicit Mmu(ShadowTables& tables, unsigned number = 0);
    ~Mmu();
    Mmu(const Mmu&) = delete;
    Mmu& operator=(const Mmu&) = delete;
    Mmu(Mmu&&) = delete;
    Mmu& operator=(Mmu&&) = delete;

    /// The paging state that later calls are about. A change of rights (WP, NXE, SMEP …) or of the root takes
    /// effect with the next `enter` and `fault`; what the change flushes must be said by `flush`. MOV CR3
    /// that flushes nothing is this alone.
    void set_paging(const GuestPaging& paging);
    [[nodiscard]] const GuestPaging& paging() const { return paging_; }
    /// EFLAGS.AC at virtual CPL 0 to 2: with CR4.SMAP, kernel data accesses may reach user pages. Takes
    /// effect as set_paging does.
    void set_alignment_check(bool ac) { alignment_check_ = ac; }

    /// From now on `sanitizer` is told of all that the guest uses and drops; `stale_use` is called for each
    /// use of a translation that the tables no longer contain. For that each page faults when it is first
    /// used after a flush. The tables' Sync is `trap`. `sanitizer` outlives this.
    void sanitize(TlbSanitizer& sanitizer, TlbPolicy policy, std::function<void(const StaleUse&)> stale_use);

    /// Whether a kernel-mode fetch from a page of the guest's programs must trap, though the guest's CPU
    /// would allow it: that is how a host is told of an `iretq` to user code that does not trap by itself.
    /// Takes effect as set_paging does.
    void set_trap_user_fetch(bool trap) { trap_user_fetch_ = trap; }

    /// The vCPU is about to run the guest at virtual CPL 3 (`user`) or below: the tables are in step with the
    /// guest's as of the last flush. No table page is reused until `left`.
    [[nodiscard]] MachineState enter(bool user);
    /// The vCPU has left the guest, and comes back by `enter` only. All calls below say so too.
    void left();

    /// Resolves a page fault of the machine at a canonical address. `access.user`: the virtual CPL was 3.
    [[nodiscard]] MissResult fault(GuestVirt at, Access access);

    /// CR3 load of the current context: all but global pages.
    void flush() { flush({.pcid = paging_.pcid}); }
    void flush(const FlushScope& scope);
    /// INVLPG, or INVPCID of one address in the current context: drops translations of `at` that the guest's
    /// tables no longer give, and whatever paging-structure caches hold (Intel SDM vol. 3A, 4.10.4.1).
    void invalidate(GuestVirt at) { invalidate(at, paging_.pcid, true); }
    /// The same in any context, and with or without global translations: INVPCID of one address.
    void invalidate(GuestVirt at, std::uint16_t pcid, bool globals);
    /// Forgets every table.
    void reset();

    /// After Miss::table_write, before anything else: lets that access through, until finish_table_write. The
    /// caller runs the guest for one instruction.
    void begin_table_write();
    /// Ends what begin_table_write began: what the instruction changed in tables of the guest. Shadow entries
    /// made from what was there before are dropped.
    [[nodiscard]] std::vector<TableWrite> finish_table_write();

    [[nodiscard]] bool table_write_begun() const { return !open_.empty(); }

    /// From now on these accesses of the guest end in Miss::guarded, on every vCPU, beside those that the
    /// other owner has guarded. So may others, to pages that have the level-1 entry of a guarded page in a
    /// table with guards: the caller looks at the address. Without a change nothing happens; with one, every
    /// table is forgotten.
    void set_guards(Guards guards, GuardOwner owner = GuardOwner::debugger);
    /// After Miss::guarded, before anything else: lets accesses to that page through, by that address and to
    /// that frame, until finish_guarded_access. The caller runs the guest for one instruction, which may come
    /// here for several pages before it is done.
    void begin_guarded_access();
    /// Does nothing if none was begun.
    void finish_guarded_access();

    [[nodiscard]] bool guarded_access_begun() const { return guard_open_; }

    /// What `enter` would ask for now.
    [[nodiscard]] const Debt& debt() const { return ledger_.debt(); }
    [[nodiscard]] unsigned reserved_slot() const { return tables_.reserved_slot(); }

    /// The entries that translate `at` in the machine's tables, root first (for reports and the debugger).
    [[nodiscard]] std::vector<WalkStep<MachinePhysSpace>> shadow_walk(GuestVirt at, bool user);

    [[nodiscard]] const MmuCounters& counters() const { return tables_.counters(); }
    [[nodiscard]] const TablePool& pool() const { return tables_.pool(); }
    [[nodiscard]] std::optional<std::string> audit() const { return tables_.audit(); }

  private:
    [[nodiscard]] ShadowTables::Editing edit();
    [[nodiscard]] Role role(bool user) const;
    [[nodiscard]] TableKey root_key(bool user) const;
    [[nodiscard]] TableIndex root_table(ShadowParts& shadow, bool user);
    void pin(ShadowParts& shadow, std::optional<TableIndex>& current, std::optional<TableIndex> root);
    void fill(ShadowParts& shadow, const GuestWalk& walk, GuestVirt at, bool user, Filler::Remember remember);
    void hide_exposed(ShadowParts& shadow, GuestVirt at) const;
    [[nodiscard]] std::optional<GuestWalk> stale_walk(const GuestMemory& memory, GuestVirt at, Access access);

    ShadowTables& tables_;
    unsigned number_;
    Ledger ledger_;
    GuestPaging paging_;
    bool alignment_check_ = false;
    bool trap_user_fetch_ = false;

    std::uint64_t required_ = 1;    ///< epoch as of which the current space's tables must be in step
    std::uint64_t invalidated_ = 1; ///< epoch of the last INVLPG, which has not reached roots not current

    std::array<std::optional<TableIndex>, 2> current_; ///< roots in use, pinned: kernel, user
    std::uint64_t resets_ = 0;                         ///< of the tables, when current_ was set
    struct AskedWrite {
        GuestVirt at;
        bool user = false;
        bool stale = false; ///< by an old translation
        GuestWalk walk;
    };
    std::optional<AskedWrite> asked_; ///< the last Miss::table_write
    struct AskedAccess {
        GuestVirt at;
        GuestFrame frame;
    };
    std::optional<AskedAccess> guarded_; ///< the last Miss::guarded
    bool guard_open_ = false;
    std::vector<GuestFrame> open_; ///< tables with a write under way

    std::vector<GuestVirt> exposed_; ///< pages filled for a fetch, though hidden from data accesses
    bool just_exposed_ = false;      ///< the last of them by the last fault: the fetch is still to come

    TlbSanitizer* sanitizer_ = nullptr;
    TlbPolicy policy_ = TlbPolicy::drop;
    std::function<void(const StaleUse&)> stale_use_;
};

} // namespace umbra
