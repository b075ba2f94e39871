// TLB sanitizer: tells when the guest uses a translation that its page tables no longer contain.
//
// A CPU goes on using what it has cached of the page tables until it is told to forget: by INVLPG, INVPCID, a
// load of CR3, or a change of a control bit. A kernel that changes an entry and forgets to say so works on
// most days. This is a model of all that one CPU's TLB and paging-structure caches may still hold: what the
// guest has used since the last invalidation that covers it. An access for which any of that gives another
// result than the tables in memory is a stale use. Intel SDM vol. 3A, 4.10.
//
// How it is called: for each miss, `check` first, with the walk that the miss made; then `faulted` if the
// guest is given a page fault, `used` otherwise. Each CPU has a sanitizer of its own; `written` goes to all
// of them.
#pragma once

#include "shadow/guest_walk.hpp"
#include "shadow/recent_log.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace umbra {

/// Who did something, and when.
struct Origin {
    GuestVirt rip;
    std::uint64_t time = 0;  ///< in a unit of the caller's choice
    std::uint64_t traps = 0; ///< that the run had taken
};

/// How often the CPU was told to forget something.
struct Invalidations {
    std::uint64_t pages = 0;    ///< INVLPG, and INVPCID of one address
    std::uint64_t contexts = 0; ///< all but global pages: CR3 loads, and INVPCID of one or all PCIDs
    GuestVirt last_page;        ///< of `pages`
};

/// An access that a CPU may carry out by a translation that the guest's tables no longer give.
struct StaleUse {
    enum class Harm : std::uint8_t {
        fault_missed, ///< the tables ask for a page fault
        other_page,   ///< the tables lead elsewhere
        dirty_missed, ///< the page is written to, and the entry's dirty bit stays clear
    };
    /// The entry to blame: one that lies on both walks, and has changed in between.
    struct Change {
        const Level* level = nullptr;
        GuestPhys slot;
        GuestEntry before, now;
        std::optional<Origin> written; ///< when it ceased to be what it was; nothing if that was not seen
    };

    GuestVirt address;
    Access access;
    Harm harm = Harm::fault_missed;
    /// The old translation, with the `address` it gives; allows the access. A Mmu that plays the forgetful
    /// CPU may install it, after set_accessed_dirty if `through_structure_cache`.
    GuestWalk before;
    GuestWalk now; ///< what the tables say
    /// Nothing if the two walks share no entry that differs: they are of different address spaces.
    std::optional<Change> change;
    std::uint16_t pcid = 0; ///< the CPU's tag of the old translation, unless before.global
    /// Not the translation itself was cached, but an entry above; what lies below it was read now.
    bool through_structure_cache = false;
    Invalidations spared; ///< those that did not cover it, since the write, or, if unseen, since its last use
    std::uint64_t times =
        1; ///< that this page was used so; 1 asks for a report, the others are to be counted
};

class TlbSanitizer {
  public:
    static constexpr std::size_t default_capacity = 32768;

    /// `memory` outlives this. Remembers at most `capacity` cached items, writes and reports each, and drops
    /// the first added of them for a new one (and then may miss a stale use, but never invents one): at most
    /// about 700 bytes of the host's memory for each unit of capacity.
    explicit TlbSanitizer(const GuestMemory& memory, std::size_t capacity = default_capacity);

    /// The CPU uses `walk`, complete and as it left the entries (accessed and dirty set): from now on it may
    /// hold it, and each entry above its leaf. `paging` is what the walk was made under, here and below.
    void used(GuestVirt at, const GuestWalk& walk, const GuestPaging& paging);

    /// The guest has been given a page fault at `at`: the CPU has forgotten what it held for that page
    /// (4.10.4.1).
    void faulted(GuestVirt at, const GuestPaging& paging);

    /// The guest has changed a live entry of its tables. Serves to name the culprit only.
    void written(GuestPhys slot, GuestEntry before, GuestEntry after, const Origin& by);

    // ---- what makes the CPU forget (4.10.4.1). A change of the paging mode is flush_everything.

    /// MOV to CR3 with bit 63 clear, which names the PCID by its new value; INVPCID type 1. Spares global
    /// pages.
    void flush_context(std::uint16_t pcid);
    /// INVPCID type 3. Spares global pages.
    void flush_all_contexts();
    /// A change of CR4.PGE or CR0.PG, CR4.PCIDE becoming 0, INVPCID type 2 …
    void flush_everything();
    /// INVLPG: the page that `at`, canonical, lies in, of the current PCID and global; and all structure
    /// caches of that PCID.
    void invalidate(GuestVirt at, const GuestPaging& paging);
    /// INVPCID type 0: as INVLPG for any `pcid`, but it spares global pages, and structure caches of other
    /// addresses.
    void invalidate_in(std::uint16_t pcid, GuestVirt at, const GuestPaging& paging);

    // ---- the question

    /// Whether an old translation, still legal for a CPU, lets the access pass where `fresh` does not, or
    /// takes it elsewhere. `fresh`: of the tables as they are, by walk_guest: before set_accessed_dirty. Not
    /// stale are: a gain of rights or presence (the old would only fault), a cleared accessed bit, a value
    /// that is back when the entry is used, what was never used since it was last invalidated, and an old
    /// translation that gives this access the same result.
    [[nodiscard]] std::optional<StaleUse> check(GuestVirt at, Access access, const GuestWalk& fresh,
                                                const GuestPaging& paging);

    [[nodiscard]] std::uint64_t uses() const { return uses_; }         ///< all stale ones
    [[nodiscard]] std::uint64_t reported() const { return reported_; } ///< of these: with `times` of 1

  private:
    /// Counts everything that happens here.
    using Moment = std::uint64_t;

    enum class Kind : std::uint8_t {
        translation, ///< a TLB entry
        global,      ///< the same, valid for every PCID
        structure,   ///< of a paging-structure cache: an entry that refers to a table
    };
    struct Key {
        std::uint64_t number = 0; ///< the address >> shift
        std::uint16_t pcid = 0;   ///< 0 for `global`
        std::uint8_t shift = 0;   ///< of the entry's level
        Kind kind = Kind::translation;

        bool operator==(const Key&) const = default;
    };
    struct KeyHash {
        std::size_t operator()(const Key& key) const noexcept;
    };
    struct Cached {
        GuestWalk walk; ///< down to the cached entry
        Moment used = 0;
        Invalidations invalidations; ///< as counted then
        bool dropped = false;        ///< by an invalidation of its page
    };
    struct Written {
        GuestEntry before, after;
        Origin by;
        Moment moment = 0;
        Invalidations invalidations;
    };
    /// What makes two stale uses the same for the reader.
    struct ReportKey {
        GuestVirt page;
        GuestPhys slot; ///< of the changed entry
        GuestEntry before, now;
        StaleUse::Harm harm = StaleUse::Harm::fault_missed;

        bool operator==(const ReportKey&) const = default;
    };
    struct ReportKeyHash {
        std::size_t operator()(const ReportKey& key) const noexcept;
    };

    [[nodiscard]] static Key key(Kind kind, GuestVirt at, const Level& level, std::uint16_t pcid);
    [[nodiscard]] bool holds(const Key& key, const Cached& cached) const;
    void remember(const Key& key, const GuestWalk& walk);
    void drop(const Key& key);
    [[nodiscard]] std::optional<StaleUse> compare(const Key& key, const Cached& cached, GuestVirt at,
                                                  Access access, const GuestWalk& fresh,
                                                  const GuestPaging& paging) const;
    [[nodiscard]] GuestWalk walk_on(const GuestWalk& upper, GuestVirt at, const GuestPaging& paging) const;
    void blame(StaleUse& use, const Cached& cached);
    void count(StaleUse& use);

    const GuestMemory& memory_;
    RecentLog<Key, Cached, KeyHash> cached_;
    RecentLog<std::uint64_t, Written> written_; ///< by slot
    RecentLog<ReportKey, std::uint64_t, ReportKeyHash> reports_;

    Moment now_ = 0;
    // When each kind of thing was last flushed: an item is held if it was used later.
    Moment everything_flushed_ = 0, contexts_flushed_ = 0;
    std::vector<Moment> context_flushed_;    ///< by PCID
    std::vector<Moment> structures_flushed_; ///< by PCID
    Invalidations invalidations_;
    std::uint64_t uses_ = 0;
    std::uint64_t reported_ = 0;
};

} // namespace umbra
