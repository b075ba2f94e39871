#include "shadow/tlb_sanitizer.hpp"

#include <algorithm>
#include <initializer_list>

namespace umbra {
namespace {

constexpr unsigned pcid_count = 4096;

/// How many different old entries for one page are looked at: a guest that makes more of them without ever
/// flushing could make each miss as slow as it likes.
constexpr std::size_t alternatives = 8;

/// How many writes to one slot are looked at for the culprit.
constexpr std::size_t writes_considered = 64;

/// The bits that decide where a translation leads and what it permits. Not among them: accessed, dirty, the
/// memory type, and bits that the CPU ignores.
constexpr std::uint64_t meaning = entry_bit::present | entry_bit::writable | entry_bit::user |
                                  entry_bit::page_size | entry_bit::frame_mask | entry_bit::no_execute |
                                  std::uint64_t{0xf} << entry_bit::key_shift;

bool same(GuestEntry a, GuestEntry b, std::uint64_t bits) {
    return ((a.raw() ^ b.raw()) & bits) == 0;
}

/// Whether the first `depth` entries of both walks lie at the same places and mean the same. `leaf_bits`:
/// what must be equal in the last of them.
bool same_path(const GuestWalk& a, const GuestWalk& b, unsigned depth, std::uint64_t leaf_bits) {
    for (unsigned i = 0; i < depth; ++i) {
        if (a.steps[i].slot != b.steps[i].slot ||
            !same(a.steps[i].entry, b.steps[i].entry, i + 1 == depth ? leaf_bits : meaning))
            return false;
    }
    return true;
}

/// The first `depth` entries of a walk, and the rights that they give together.
GuestWalk upper_part(const GuestWalk& walk, unsigned depth) {
    GuestWalk upper;
    upper.user = upper.writable = true;
    for (; upper.depth < depth; ++upper.depth) {
        const GuestWalk::Step& step = upper.steps[upper.depth] = walk.steps[upper.depth];
        if (step.level->in_registers)
            continue;
        upper.user &= step.entry.user();
        upper.writable &= step.entry.writable();
        upper.no_execute |= step.entry.no_execute();
    }
    return upper;
}

/// Whether a cached translation lets the access pass (Intel SDM vol. 3A, 4.6): the control bits count as they
/// are at the time of the access.
bool permits(const GuestWalk& walk, Access access, const GuestPaging& paging) {
    const bool obeys_writable = access.user || paging.write_protect;
    if ((access.write && !walk.writable && obeys_writable) || (access.fetch && walk.no_execute) ||
        (access.user && !walk.user))
        return false;
    if (!access.user && walk.user && (access.fetch ? paging.smep : paging.smap && !access.ac))
        return false;
    if (!paging.protection_keys || !paging.format->long_mode() || !walk.user || access.fetch)
        return true;
    const std::uint32_t denied = paging.pkru >> (2U * walk.key);
    return (denied & 1) == 0 && ((denied & 2) == 0 || !access.write || !obeys_writable);
}

GuestPhys address_in_page(const GuestWalk& walk, GuestVirt at) {
    const GuestWalk::Step& leaf = walk.leaf();
    return leaf.entry.page(*leaf.level).base() + (at.value() & (leaf.level->span() - 1));
}

/// Whether the change alone may take a translation, or some access by it, away.
bool takes_away(GuestEntry before, GuestEntry now) {
    constexpr std::uint64_t gifts = entry_bit::present | entry_bit::writable | entry_bit::user;
    constexpr std::uint64_t others = meaning & ~gifts & ~entry_bit::no_execute;
    return (before.raw() & ~now.raw() & gifts) != 0 || (now.no_execute() && !before.no_execute()) ||
           !same(before, now, others);
}

Invalidations operator-(const Invalidations& now, const Invalidations& then) {
    return {now.pages - then.pages, now.contexts - then.contexts, now.last_page};
}

std::size_t mix(std::initializer_list<std::uint64_t> values) {
    std::uint64_t hash = 0;
    for (const std::uint64_t value : values)
        hash = (hash ^ value) * 0x9e37'79b9'7f4a'7c15U, hash ^= hash >> 29;
    return static_cast<std::size_t>(hash);
}

} // namespace

std::size_t TlbSanitizer::KeyHash::operator()(const Key& key) const noexcept {
    return mix({key.number, std::uint64_t{key.pcid} << 16 | std::uint64_t{key.shift} << 8 |
                                static_cast<std::uint64_t>(key.kind)});
}

std::size_t TlbSanitizer::ReportKeyHash::operator()(const ReportKey& key) const noexcept {
    return mix({key.page.value(), key.slot.value(), key.before.raw(), key.now.raw(),
                static_cast<std::uint64_t>(key.harm)});
}

TlbSanitizer::TlbSanitizer(const GuestMemory& memory, std::size_t capacity)
    : memory_(memory), cached_(capacity), written_(capacity), reports_(capacity),
      context_flushed_(pcid_count), structures_flushed_(pcid_count) {}

// --- What the CPU may hold

TlbSanitizer::Key TlbSanitizer::key(Kind kind, GuestVirt at, const Level& level, std::uint16_t pcid) {
    return {.number = at.value() >> level.shift,
            .pcid = static_cast<std::uint16_t>(kind == Kind::global ? 0 : pcid % pcid_count),
            .shift = static_cast<std::uint8_t>(level.shift),
            .kind = kind};
}

bool TlbSanitizer::holds(const Key& key, const Cached& cached) const {
    if (cached.dropped || cached.used <= everything_flushed_)
        return false;
    if (key.kind == Kind::global)
        return true;
    if (cached.used <= contexts_flushed_ || cached.used <= context_flushed_[key.pcid])
        return false;
    return key.kind == Kind::translation || cached.used > structures_flushed_[key.pcid];
}

void TlbSanitizer::remember(const Key& key, const GuestWalk& walk) {
    const std::uint64_t leaf_bits = key.kind == Kind::structure ? meaning : meaning | entry_bit::dirty;
    const Cached now{walk, ++now_, invalidations_};
    Cached* place = cached_.find(key, alternatives, [&](const Cached& known) {
        return same_path(known.walk, walk, walk.depth, leaf_bits);
    });
    if (place == nullptr) // what is no longer held makes room
        place = cached_.find(key, alternatives, [&](const Cached& known) { return !holds(key, known); });
    if (place != nullptr)
        *place = now;
    else
        cached_.add(key, now);
}

void TlbSanitizer::used(GuestVirt at, const GuestWalk& walk, const GuestPaging& paging) {
    if (walk.depth == 0) // paging is off
        return;
    const Kind kind = walk.global ? Kind::global : Kind::translation;
    remember(key(kind, at, *walk.leaf().level, paging.pcid), walk);
    for (unsigned depth = 1; depth < walk.depth; ++depth) {
        const Level& level = *walk.steps[depth - 1].level;
        if (!level.in_registers)
            remember(key(Kind::structure, at, level, paging.pcid), upper_part(walk, depth));
    }
}

// --- What it forgets

void TlbSanitizer::drop(const Key& key) {
    cached_.find(key, alternatives, [](Cached& cached) {
        cached.dropped = true;
        return false;
    });
}

void TlbSanitizer::faulted(GuestVirt at, const GuestPaging& paging) {
    for (const Level& level : paging.format->levels) {
        for (const Kind kind : {Kind::translation, Kind::global, Kind::structure})
            drop(key(kind, at, level, paging.pcid));
    }
}

void TlbSanitizer::flush_context(std::uint16_t pcid) {
    ++invalidations_.contexts;
    context_flushed_[pcid % pcid_count] = ++now_;
}

void TlbSanitizer::flush_all_contexts() {
    ++invalidations_.contexts;
    contexts_flushed_ = ++now_;
}

void TlbSanitizer::flush_everything() {
    everything_flushed_ = ++now_;
}

void TlbSanitizer::invalidate(GuestVirt at, const GuestPaging& paging) {
    ++invalidations_.pages;
    invalidations_.last_page = at;
    for (const Level& level : paging.format->levels) {
        drop(key(Kind::translation, at, level, paging.pcid));
        drop(key(Kind::global, at, level, paging.pcid));
    }
    structures_flushed_[paging.pcid % pcid_count] = ++now_;
}

void TlbSanitizer::invalidate_in(std::uint16_t pcid, GuestVirt at, const GuestPaging& paging) {
    ++invalidations_.pages;
    invalidations_.last_page = at;
    for (const Level& level : paging.format->levels) {
        drop(key(Kind::translation, at, level, pcid));
        drop(key(Kind::structure, at, level, pcid));
    }
}

// --- Whether it shows

/// What a CPU finds that goes on from a cached upper entry by the tables as they are now; with a fault if
/// they lead nowhere.
GuestWalk TlbSanitizer::walk_on(const GuestWalk& upper, GuestVirt at, const GuestPaging& paging) const {
    const PagingFormat lower{paging.format->levels.subspan(upper.depth)};
    GuestPaging below = paging;
    below.format = &lower;
    below.root = upper.leaf().entry.table();
    below.smap = false; // the rights are judged by the whole path
    below.protection_keys = false;
    GuestWalk result = walk_guest(memory_, below, at, Access{});
    std::move_backward(result.steps.begin(), result.steps.begin() + result.depth,
                       result.steps.begin() + result.depth + upper.depth);
    std::copy_n(upper.steps.begin(), upper.depth, result.steps.begin());
    result.depth += upper.depth;
    result.user &= upper.user;
    result.writable &= upper.writable;
    result.no_execute |= upper.no_execute;
    if (paging.protection_keys && paging.format->long_mode())
        result.key = result.leaf().entry.key();
    return result;
}

/// The stale use that one cached item makes possible, still without a culprit.
std::optional<StaleUse> TlbSanitizer::compare(const Key& key, const Cached& cached, GuestVirt at,
                                              Access access, const GuestWalk& fresh,
                                              const GuestPaging& paging) const {
    const bool structure = key.kind == Kind::structure;
    if (structure && cached.walk.depth < fresh.depth &&
        same_path(cached.walk, fresh, cached.walk.depth, meaning))
        return std::nullopt; // nothing old about it
    GuestWalk old = structure ? walk_on(cached.walk, at, paging) : cached.walk;
    if (old.fault || !permits(old, access, paging))
        return std::nullopt;
    if (!structure && access.write && !old.leaf().entry.dirty())
        return std::nullopt; // the CPU walks again, to set the dirty bit
    old.address = address_in_page(old, at);

    StaleUse use;
    use.address = at;
    use.access = access;
    use.before = old;
    use.now = fresh;
    if (fresh.fault) {
        use.harm = StaleUse::Harm::fault_missed;
    } else if (old.address != fresh.address) {
        use.harm = StaleUse::Harm::other_page;
    } else if (access.write && !fresh.leaf().entry.dirty() &&
               (!structure || old.leaf().slot != fresh.leaf().slot)) {
        use.harm = StaleUse::Harm::dirty_missed; // or set in an entry that is no longer in use
    } else {
        return std::nullopt;
    }
    use.pcid = key.pcid;
    use.through_structure_cache = structure;
    return use;
}

/// Finds the entry that changed, and who changed it.
void TlbSanitizer::blame(StaleUse& use, const Cached& cached) {
    const bool dirty = use.harm == StaleUse::Harm::dirty_missed;
    const std::uint64_t bits = dirty ? meaning | entry_bit::dirty : meaning;
    const auto before = use.before.visited();
    const auto now = use.now.visited();
    for (std::size_t i = 0; i < std::min(before.size(), now.size()); ++i) {
        const GuestWalk::Step& was = before[i];
        const GuestEntry is = now[i].entry;
        if (was.slot != now[i].slot || same(was.entry, is, bits))
            continue;
        const bool guilty = dirty ? i + 1 == before.size() : takes_away(was.entry, is);
        if (guilty || !use.change)
            use.change = {
                .level = was.level, .slot = was.slot, .before = was.entry, .now = is, .written = {}};
        if (guilty)
            break;
    }
    Invalidations since = cached.invalidations;
    if (use.change) {
        const Written* const write =
            written_.find(use.change->slot.value(), writes_considered, [&](const Written& written) {
                return written.moment > cached.used && same(written.before, use.change->before, bits) &&
                       !same(written.after, use.change->before, bits);
            });
        if (write != nullptr) {
            use.change->written = write->by;
            since = write->invalidations;
        }
    }
    use.spared = invalidations_ - since;
}

/// Counts the use, and says how often the reader could have been told the same.
void TlbSanitizer::count(StaleUse& use) {
    ++uses_;
    const GuestWalk::Step& leaf = use.before.leaf();
    const auto bare = [](GuestEntry entry) { return GuestEntry(entry.raw() & meaning); };
    const ReportKey subject{.page = GuestVirt(use.address.value() & ~(leaf.level->span() - 1)),
                            .slot = use.change ? use.change->slot : use.now.steps[0].slot,
                            .before = bare(use.change ? use.change->before : leaf.entry),
                            .now = bare(use.change ? use.change->now : use.now.leaf().entry),
                            .harm = use.harm};
    if (std::uint64_t* const times = reports_.find(subject, 1, [](std::uint64_t) { return true; })) {
        use.times = ++*times;
        return;
    }
    reports_.add(subject, use.times);
    ++reported_;
}

std::optional<StaleUse> TlbSanitizer::check(GuestVirt at, Access access, const GuestWalk& fresh,
                                            const GuestPaging& paging) {
    if (fresh.depth == 0) // paging is off
        return std::nullopt;
    // A TLB entry serves before any structure cache is asked, and of these the lowest level is asked first.
    for (const Kind kind : {Kind::translation, Kind::global, Kind::structure}) {
        for (auto level = paging.format->levels.rbegin(); level != paging.format->levels.rend(); ++level) {
            const Key where = key(kind, at, *level, paging.pcid);
            std::optional<StaleUse> use;
            const Cached* const culprit = cached_.find(where, alternatives, [&](const Cached& cached) {
                if (holds(where, cached))
                    use = compare(where, cached, at, access, fresh, paging);
                return use.has_value();
            });
            if (culprit == nullptr)
                continue;
            blame(*use, *culprit);
            count(*use);
            return use;
        }
    }
    return std::nullopt;
}

void TlbSanitizer::written(GuestPhys slot, GuestEntry before, GuestEntry after, const Origin& by) {
    written_.add(slot.value(), {before, after, by, ++now_, invalidations_});
}

} // namespace umbra
