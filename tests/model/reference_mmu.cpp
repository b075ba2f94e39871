#include "tests/model/reference_mmu.hpp"

#include <algorithm>

namespace umbra::model {
namespace {

constexpr std::uint64_t bit(unsigned number) {
    return std::uint64_t{1} << number;
}
/// Bits [high:low].
constexpr std::uint64_t bits(unsigned high, unsigned low) {
    return high < low ? 0 : (~std::uint64_t{0} >> (63 - high)) & ~(bit(low) - 1);
}

constexpr std::uint64_t p = bit(0), rw = bit(1), us = bit(2), accessed = bit(5), dirty = bit(6), ps = bit(7),
                        g = bit(8), xd = bit(63);
constexpr std::uint64_t never = ~std::uint64_t{0};

bool long_mode(Mode mode) {
    return mode == Mode::four_level || mode == Mode::five_level;
}

/// PAE's PDPTEs are registers (4.4.1).
bool is_register(Mode mode, unsigned level) {
    return mode == Mode::pae && level == 3;
}

/// Figures 4-2 to 4-11: where in its table the entry for `at` lies.
std::uint64_t slot(Mode mode, unsigned level, std::uint64_t table, std::uint64_t at) {
    if (mode == Mode::legacy)
        return table + (level == 2 ? at >> 22 & 0x3ff : at >> 12 & 0x3ff) * 4;
    switch (level) {
    case 5:
        return table + (at >> 48 & 0x1ff) * 8;
    case 4:
        return table + (at >> 39 & 0x1ff) * 8;
    case 3:
        return table + (at >> 30 & 0x1ff) * 8;
    case 2:
        return table + (at >> 21 & 0x1ff) * 8;
    default:
        return table + (at >> 12 & 0x1ff) * 8;
    }
}

/// log2 of the page that an entry of `level` maps.
unsigned page_bits(Mode mode, unsigned level) {
    switch (level) {
    case 1:
        return 12;
    case 2:
        return mode == Mode::legacy ? 22 : 21;
    default:
        return 30;
    }
}

bool maps_page(const Cpu& cpu, unsigned level, std::uint64_t entry) {
    if (level == 1)
        return true;
    if ((entry & ps) == 0)
        return false;
    switch (cpu.mode) {
    case Mode::legacy:
        return cpu.pse;
    case Mode::pae:
        return level == 2;
    case Mode::off:
    case Mode::four_level:
    case Mode::five_level:
        break;
    }
    return level <= 3;
}

/// The reserved bits of tables 4-4 to 4-6, 4-8 to 4-11 and 4-14 to 4-20.
bool malformed(const Cpu& cpu, unsigned level, std::uint64_t entry) {
    const unsigned m = cpu.maxphyaddr;
    if (cpu.mode == Mode::legacy) {
        if (level == 1 || !maps_page(cpu, level, entry))
            return false;
        // "21:(M-19) reserved", where M is the minimum of 40 and MAXPHYADDR.
        return (entry & bits(21, std::min(m, 40U) - 19)) != 0;
    }
    std::uint64_t reserved = bits(51, m);
    if (cpu.mode == Mode::pae)
        reserved |= bits(62, 52);
    if (!cpu.nxe)
        reserved |= xd;
    if (is_register(cpu.mode, level)) {
        reserved = bits(2, 1) | bits(8, 5) | bits(63, m);
    } else if (level >= 4) {
        reserved |= ps;
    } else if (level == 3 && !cpu.gigabyte_pages) {
        reserved |= ps;
    } else if (level == 3 && maps_page(cpu, level, entry)) {
        reserved |= bits(29, 13);
    } else if (level == 2 && maps_page(cpu, level, entry)) {
        reserved |= bits(20, 13);
    }
    return (entry & reserved) != 0;
}

std::uint64_t table_address(Mode mode, std::uint64_t entry) {
    return entry & (mode == Mode::legacy ? bits(31, 12) : bits(51, 12));
}

std::uint64_t physical_address(const Cpu& cpu, unsigned level, std::uint64_t entry, std::uint64_t at) {
    const unsigned size = page_bits(cpu.mode, level);
    const std::uint64_t offset = at & (bit(size) - 1);
    if (cpu.mode == Mode::legacy && level == 2)
        return (entry & bits(31, 22)) | (entry >> 13 & 0xff) << 32 | offset; // table 4-4
    return (entry & bits(cpu.mode == Mode::legacy ? 31 : 51, size)) | offset;
}

/// What all entries of a walk grant together (4.6).
struct Rights {
    bool user = true, write = true, execute = true;

    void restrict(std::uint64_t entry) {
        user = user && (entry & us) != 0;
        write = write && (entry & rw) != 0;
        execute = execute && (entry & xd) == 0;
    }
};

/// 4.6.2, of a user-mode address with this key.
bool key_permits(const Cpu& cpu, unsigned key, Access access) {
    if (!cpu.pke || !long_mode(cpu.mode) || access.kind == Kind::fetch)
        return true;
    const bool ad = (cpu.pkru >> (2 * key) & 1) != 0, wd = (cpu.pkru >> (2 * key + 1) & 1) != 0;
    if (ad)
        return false;
    if (access.kind == Kind::write && wd)
        return !access.user && !cpu.wp;
    return true;
}

/// 4.6.1, in the manual's order. Protection keys aside.
bool permits(const Cpu& cpu, const Rights& rights, Access access) {
    if (!access.user) {
        switch (access.kind) {
        case Kind::read:
            if (!rights.user)
                return true;
            return cpu.smap ? access.ac : true;
        case Kind::write:
            if (!rights.user)
                return cpu.wp ? rights.write : true;
            if (!cpu.wp)
                return cpu.smap ? access.ac : true;
            return cpu.smap ? rights.write && access.ac : rights.write;
        case Kind::fetch:
            if (!rights.user)
                return rights.execute;
            return cpu.smep ? false : rights.execute;
        }
    }
    if (!rights.user)
        return false;
    switch (access.kind) {
    case Kind::read:
        return true;
    case Kind::write:
        return rights.write;
    case Kind::fetch:
        return rights.execute;
    }
    return false;
}

/// 4.7: W/R, U/S and I/D of the error code.
std::uint32_t error_code(const Cpu& cpu, Access access) {
    std::uint32_t code = 0;
    if (access.kind == Kind::write)
        code |= 1U << 1;
    if (access.user)
        code |= 1U << 2;
    const bool pae = cpu.mode == Mode::pae || long_mode(cpu.mode); // CR4.PAE
    if (access.kind == Kind::fetch && (cpu.smep || (pae && cpu.nxe)))
        code |= 1U << 4;
    return code;
}

unsigned protection_key(std::uint64_t entry) {
    return entry >> 59 & 0xf;
}

} // namespace

unsigned top_level(Mode mode) {
    switch (mode) {
    case Mode::off:
        return 0;
    case Mode::legacy:
        return 2;
    case Mode::pae:
        return 3;
    case Mode::four_level:
        return 4;
    case Mode::five_level:
        return 5;
    }
    return 0;
}

unsigned entry_bytes(Mode mode) {
    return mode == Mode::legacy ? 4 : 8;
}

std::uint64_t load_entry(const Memory& memory, std::uint64_t at, unsigned bytes) {
    const std::uint64_t whole = memory.load(at & ~std::uint64_t{7});
    if (bytes == 8)
        return whole;
    return (at & 4) != 0 ? whole >> 32 : whole & 0xffff'ffff;
}

Walk walk(const Cpu& cpu, const Memory& memory, std::uint64_t at, Access access) {
    Walk result;
    if (cpu.mode == Mode::off) {
        result.physical = at;
        return result;
    }
    const std::uint32_t code = error_code(cpu, access);
    Rights rights;
    std::uint64_t table = cpu.root;
    for (unsigned level = top_level(cpu.mode);; --level) {
        Step& step = result.steps[result.count++];
        step.level = level;
        if (is_register(cpu.mode, level)) {
            step.value = cpu.pdpte[at >> 30 & 3];
        } else {
            step.slot = slot(cpu.mode, level, table, at);
            step.value = load_entry(memory, step.slot, entry_bytes(cpu.mode));
        }
        const std::uint64_t entry = step.value;
        if ((entry & p) == 0) {
            result.error_code = code;
            return result;
        }
        if (malformed(cpu, level, entry)) {
            result.error_code = code | 1U << 3 | 1U << 0;
            return result;
        }
        if (!is_register(cpu.mode, level))
            rights.restrict(entry);
        if (!maps_page(cpu, level, entry)) {
            table = table_address(cpu.mode, entry);
            continue;
        }
        result.user_page = rights.user;
        const bool key_denies = rights.user && !key_permits(cpu, protection_key(entry), access);
        if (key_denies || !permits(cpu, rights, access))
            result.error_code = code | 1U << 0 | (key_denies ? 1U << 5 : 0U);
        else
            result.physical = physical_address(cpu, level, entry, at);
        return result;
    }
}

void mark(const Cpu& cpu, Memory& memory, const Walk& walk, bool write) {
    for (unsigned i = 0; i < walk.count; ++i) {
        const Step& step = walk.steps[i];
        if (is_register(cpu.mode, step.level))
            continue;
        const std::uint64_t flags = accessed | (write && i + 1 == walk.count ? dirty : 0);
        const std::uint64_t old = memory.load(step.slot & ~std::uint64_t{7});
        const std::uint64_t marked = old | flags << (8 * (step.slot & 7));
        if (marked != old)
            memory.store(step.slot & ~std::uint64_t{7}, marked);
    }
}

std::optional<std::array<std::uint64_t, 4>> load_pdptes(const Cpu& cpu, const Memory& memory,
                                                        std::uint64_t cr3) {
    Cpu pae = cpu;
    pae.mode = Mode::pae;
    std::array<std::uint64_t, 4> pdptes{};
    for (unsigned i = 0; i < 4; ++i) {
        pdptes[i] = memory.load((cr3 & bits(31, 5)) + 8 * i);
        if ((pdptes[i] & p) != 0 && malformed(pae, 3, pdptes[i]))
            return std::nullopt;
    }
    return pdptes;
}

// ---- memory over time

bool ReferenceMmu::in_ram(std::uint64_t at) const {
    return std::any_of(ram_.begin(), ram_.end(),
                       [at](const Range& range) { return at - range.base < range.size; });
}

std::uint64_t ReferenceMmu::load(std::uint64_t at) const {
    const auto found = memory_.find(at);
    if (found != memory_.end())
        return found->second.back().value;
    return in_ram(at) ? 0 : ~std::uint64_t{0};
}

void ReferenceMmu::store(std::uint64_t at, std::uint64_t value) {
    if (!in_ram(at))
        return;
    auto& versions = memory_[at];
    if (versions.empty())
        versions.push_back({0, 0});
    versions.push_back({++now_, value});
}

void ReferenceMmu::contents(const std::function<void(std::uint64_t, std::uint64_t)>& each) const {
    for (const auto& [at, versions] : memory_)
        each(at, versions.back().value);
}

// ---- instructions

void ReferenceMmu::flush_all() {
    ++now_;
    for (auto& [at, versions] : memory_)
        versions.erase(versions.begin(), versions.end() - 1);
    eras_.clear();
    flushes_.clear();
    nxe_ = {{now_, cpu_.nxe ? 1U : 0U}};
    begin_era();
}

void ReferenceMmu::flush(Flush flush) {
    flush.time = ++now_;
    flushes_.push_back(flush);
}

void ReferenceMmu::begin_era() {
    eras_.push_back({++now_, cpu_.root, cpu_.pcid, cpu_.pdpte});
}

bool ReferenceMmu::start(const Cpu& cpu) {
    Cpu next = cpu;
    if (next.mode == Mode::pae) {
        const auto pdptes = load_pdptes(next, *this, next.root);
        if (!pdptes)
            return false;
        next.pdpte = *pdptes;
    }
    cpu_ = next;
    flush_all();
    return true;
}

bool ReferenceMmu::load_cr3(std::uint64_t root, std::uint16_t pcid, bool no_flush) {
    if (cpu_.mode == Mode::pae) {
        const auto pdptes = load_pdptes(cpu_, *this, root);
        if (!pdptes)
            return false;
        cpu_.pdpte = *pdptes;
    }
    cpu_.root = root;
    cpu_.pcid = cpu_.pcide ? pcid : std::uint16_t{0};
    if (!cpu_.pcide && !cpu_.pge) {
        flush_all();
        return true;
    }
    if (!cpu_.pcide || !no_flush)
        flush({.pcid = cpu_.pcid, .structures = true});
    begin_era();
    return true;
}

void ReferenceMmu::invlpg(std::uint64_t at) {
    flush({.pcid = cpu_.pcid, .address = at, .globals = true, .structures = true});
}

bool ReferenceMmu::invpcid(unsigned type, std::uint16_t pcid, std::uint64_t at) {
    if (!cpu_.pcide && pcid != 0 && type <= 1)
        return false;
    switch (type) {
    case 0: // of the paging-structure caches, only "mappings … for the linear address"
        flush({.pcid = pcid, .address = at});
        return true;
    case 1:
        flush({.pcid = pcid, .structures = true});
        return true;
    case 2:
        flush_all();
        return true;
    case 3:
        flush({.structures = true});
        return true;
    default:
        return false;
    }
}

bool ReferenceMmu::set_control(Cpu to) {
    const Cpu from = cpu_;
    if (to.pcide && (!long_mode(from.mode) || (!from.pcide && (from.root & 0xfff) != 0)))
        return false;
    to.mode = from.mode;
    to.pse = from.pse;
    to.root = from.root;
    to.pcid = from.pcid;
    to.pdpte = from.pdpte;
    if (!to.pcide)
        to.pcid = 0;
    cpu_ = to;
    if (to.nxe != from.nxe)
        nxe_.push_back({++now_, to.nxe ? 1U : 0U});
    // 4.10.4.1, MOV to CR4.
    if (to.pge != from.pge || (from.pcide && !to.pcide))
        flush_all();
    else if (to.smep && !from.smep)
        flush({.pcid = to.pcid, .structures = true});
    return true;
}

// ---- what may be cached

struct ReferenceMmu::Query {
    std::uint64_t at = 0;
    Access access;
    const Wanted* wanted = nullptr;
    unsigned leaf = 1;   ///< level of the entry that maps the page
    bool global = false; ///< only, or not at all, global translations
};

/// A walk on its way down.
struct ReferenceMmu::Path {
    std::uint16_t pcid = 0;
    unsigned level = 0;
    std::uint64_t table = 0;
    std::uint64_t time = 0;   ///< when the entries so far had been read
    std::uint64_t before = 0; ///< the next entry must be read before this
    std::uint64_t end = 0;    ///< and all others before this: the structures are flushed then
    Rights rights{};
};

/// When translations of the page around `at` were last dropped: global ones, or those of the current PCID.
std::uint64_t ReferenceMmu::dropped(std::uint64_t at, unsigned page_bits, bool global) const {
    for (auto flush = flushes_.rbegin(); flush != flushes_.rend(); ++flush) {
        const bool kind = global ? flush->globals : !flush->pcid || *flush->pcid == cpu_.pcid;
        if (kind && (!flush->address || *flush->address >> page_bits == at >> page_bits))
            return flush->time;
    }
    return 0;
}

/// When the paging-structure caches of `pcid` were first dropped after `time`, for walks of `at`.
std::uint64_t ReferenceMmu::structures_dropped_after(std::uint64_t time, std::uint16_t pcid,
                                                     std::uint64_t at) const {
    for (const Flush& flush : flushes_) {
        if (flush.time > time && (!flush.pcid || *flush.pcid == pcid) &&
            (flush.structures || (flush.address && *flush.address >> 12 == at >> 12)))
            return flush.time;
    }
    return never;
}

/// The first moment, from `time` on, when `pcid` is the current one.
std::uint64_t ReferenceMmu::current_from(std::uint16_t pcid, std::uint64_t time) const {
    for (std::size_t i = 0; i < eras_.size(); ++i) {
        const std::uint64_t end = i + 1 < eras_.size() ? eras_[i + 1].since : never;
        if (eras_[i].pcid == pcid && end > time)
            return std::max(time, eras_[i].since);
    }
    return never;
}

/// The first moment, from `time` on, when EFER.NXE is 1.
std::uint64_t ReferenceMmu::nxe_from(std::uint64_t time) const {
    for (std::size_t i = 0; i < nxe_.size(); ++i) {
        const std::uint64_t end = i + 1 < nxe_.size() ? nxe_[i + 1].since : never;
        if (nxe_[i].value != 0 && end > time)
            return std::max(time, nxe_[i].since);
    }
    return never;
}

bool ReferenceMmu::may_have_cached(std::uint64_t at, Access access, const Wanted& wanted) const {
    // Nearly always it is what the tables say now.
    const Walk now = walk(at, access);
    if (!now.error_code) {
        bool cached = true;
        for (unsigned i = 0; i < now.count; ++i) {
            const std::uint64_t needed =
                accessed | (access.kind == Kind::write && i + 1 == now.count ? dirty : 0);
            cached = cached &&
                     (is_register(cpu_.mode, now.steps[i].level) || (now.steps[i].value & needed) == needed);
        }
        if (cached && wanted(now.physical, now.user_page))
            return true;
    }
    const unsigned top = top_level(cpu_.mode);
    for (const bool global : {false, true}) {
        for (unsigned leaf = 1; leaf <= std::min(top, 3U) && (!global || cpu_.pge); ++leaf) {
            const Query query{at, access, &wanted, leaf, global};
            const std::uint64_t since = dropped(at, page_bits(cpu_.mode, leaf), global);
            for (std::size_t i = eras_.size(); i-- > 0;) {
                const Era& era = eras_[i];
                const std::uint64_t over = i + 1 < eras_.size() ? eras_[i + 1].since : never;
                if (over <= since)
                    break;
                if (!global && era.pcid != cpu_.pcid)
                    continue;
                Path path{.pcid = era.pcid, .level = top, .table = era.root};
                if (cpu_.mode == Mode::pae) {
                    const std::uint64_t pdpte = era.pdpte[at >> 30 & 3];
                    if ((pdpte & p) == 0)
                        continue;
                    path.level = 2;
                    path.table = table_address(cpu_.mode, pdpte);
                }
                // One try for each time between two flushes of the paging-structure caches.
                for (path.time = std::max(since, era.since); path.time < over; path.time = path.end) {
                    path.end = structures_dropped_after(path.time, era.pcid, at);
                    path.before = std::min(over, path.end);
                    if (search(query, path))
                        return true;
                }
            }
        }
    }
    return false;
}

/// Whether the walk can go on with a value that its next entry had.
bool ReferenceMmu::search(const Query& query, const Path& path) const {
    static const std::vector<Version> zero{{0, 0}}, ones{{0, ~std::uint64_t{0}}};
    const std::uint64_t where = slot(cpu_.mode, path.level, path.table, query.at);
    const std::uint64_t whole = where & ~std::uint64_t{7};
    const auto found = memory_.find(whole);
    const std::vector<Version>& versions = found != memory_.end() ? found->second
                                           : in_ram(whole)        ? zero
                                                                  : ones;
    for (std::size_t i = versions.size(); i-- > 0;) {
        const std::uint64_t gone = i + 1 < versions.size() ? versions[i + 1].since : never;
        if (gone <= path.time)
            break; // so are all that are older
        std::uint64_t entry = versions[i].value;
        if (cpu_.mode == Mode::legacy)
            entry = (where & 4) != 0 ? entry >> 32 : entry & 0xffff'ffff;
        Path next = path;
        next.time = current_from(path.pcid, std::max(path.time, versions[i].since));
        while ((entry & xd) != 0 && nxe_from(next.time) > next.time)
            next.time = current_from(path.pcid, nxe_from(next.time));
        if (next.time >= std::min(gone, path.before))
            continue;
        next.before = path.end;
        if (usable(query, next, entry))
            return true;
    }
    return false;
}

bool ReferenceMmu::usable(const Query& query, const Path& path, std::uint64_t entry) const {
    Cpu then = cpu_; // when the entry was read; `search` has seen to NXE
    then.nxe = true;
    if ((entry & p) == 0 || (entry & accessed) == 0 || malformed(then, path.level, entry))
        return false;
    const bool leaf = maps_page(cpu_, path.level, entry);
    if (leaf != (path.level == query.leaf))
        return false;
    Path next = path;
    next.rights.restrict(entry);
    if (!leaf) {
        next.table = table_address(cpu_.mode, entry);
        --next.level;
        return search(query, next);
    }
    if (query.access.kind == Kind::write && (entry & dirty) == 0)
        return false;
    if (((entry & g) != 0 && cpu_.pge) != query.global)
        return false;
    if (next.rights.user && !key_permits(cpu_, protection_key(entry), query.access))
        return false;
    return permits(cpu_, next.rights, query.access) &&
           (*query.wanted)(physical_address(cpu_, path.level, entry, query.at), next.rights.user);
}

} // namespace umbra::model
