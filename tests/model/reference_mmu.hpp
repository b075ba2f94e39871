// A reference model of the x86 MMU: Intel SDM vol. 3A, chapter 4, in plain numbers.
//
// Simple and slow on purpose, and without anything of shadow/: what both have in common would be wrong in
// both. `walk` and `mark` are the translation proper. ReferenceMmu adds time: memory that remembers what it
// held, and caches that are not lists of entries but the question whether a CPU may hold a translation.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <unordered_map>
#include <vector>

namespace umbra::model {

/// 4.1.1.
enum class Mode : std::uint8_t { off, legacy, pae, four_level, five_level };

/// What decides how tables are read and what they permit.
struct Cpu {
    Mode mode = Mode::four_level;
    bool pse = false; ///< CR4.PSE: 4 MB pages in legacy mode
    bool wp = true, nxe = true, smep = false, smap = false, pge = false, pcide = false, pke = false;
    std::uint32_t pkru = 0;
    bool gigabyte_pages = true;
    unsigned maxphyaddr = 48;
    std::uint64_t root = 0; ///< the address in CR3
    std::uint16_t pcid = 0; ///< CR3[11:0] while PCIDE
    std::array<std::uint64_t, 4> pdpte{};
};

enum class Kind : std::uint8_t { read, write, fetch };

struct Access {
    Kind kind = Kind::read;
    bool user = false;
    bool ac = false; ///< explicit, with EFLAGS.AC = 1
};

class Memory {
  public:
    Memory() = default;
    virtual ~Memory() = default;
    Memory(const Memory&) = default;
    Memory& operator=(const Memory&) = default;
    Memory(Memory&&) = default;
    Memory& operator=(Memory&&) = default;

    /// The aligned 8 bytes at `at`; all ones where nobody answers.
    [[nodiscard]] virtual std::uint64_t load(std::uint64_t at) const = 0;
    virtual void store(std::uint64_t at, std::uint64_t value) = 0;
};

struct Step {
    unsigned level = 0;
    std::uint64_t slot = 0; ///< meaningless for PAE's level 3: a register
    std::uint64_t value = 0;
};

struct Walk {
    std::array<Step, 5> steps{};
    unsigned count = 0;
    std::optional<std::uint32_t> error_code;
    std::uint64_t physical = 0; ///< without an error
    bool user_page = false;     ///< a user-mode address (4.6); none is while paging is off
};

[[nodiscard]] unsigned top_level(Mode mode);
/// 4 or 8.
[[nodiscard]] unsigned entry_bytes(Mode mode);
/// The entry of `bytes` bytes at `at`.
[[nodiscard]] std::uint64_t load_entry(const Memory& memory, std::uint64_t at, unsigned bytes);

[[nodiscard]] Walk walk(const Cpu& cpu, const Memory& memory, std::uint64_t at, Access access);
/// 4.8: what the CPU writes when it uses the walk.
void mark(const Cpu& cpu, Memory& memory, const Walk& walk, bool write);
/// 4.4.1: what MOV CR3 loads; nothing if it is #GP.
[[nodiscard]] std::optional<std::array<std::uint64_t, 4>> load_pdptes(const Cpu& cpu, const Memory& memory,
                                                                      std::uint64_t cr3);

struct Range {
    std::uint64_t base = 0, size = 0;
};

/// A CPU with its memory over time. The caches of 4.10 may hold whatever was there to be cached since the
/// flushes that would have removed it:
/// - an entry is cached only while it is present, well-formed and has its accessed flag set;
/// - the paging-structure caches let a walk combine upper entries read earlier with lower entries read later,
///   never the other way round, and never across a flush of these caches, which every INVLPG is;
/// - a TLB entry is one such walk as a whole. A write uses it only if the dirty flag was set when it was
/// made;
/// - both belong to the PCID that was current; a global TLB entry (CR4.PGE) belongs to all.
/// Rights are checked when an entry is used, by what CR0, CR4, PKRU and EFLAGS.AC say then. EFER.NXE counts
/// when an entry is read: with XD set it is well-formed only while NXE is 1.
class ReferenceMmu final : public Memory {
  public:
    explicit ReferenceMmu(std::vector<Range> ram) : ram_(std::move(ram)) {}

    [[nodiscard]] const Cpu& cpu() const { return cpu_; }

    [[nodiscard]] bool in_ram(std::uint64_t at) const;
    [[nodiscard]] std::uint64_t load(std::uint64_t at) const override;
    void store(std::uint64_t at, std::uint64_t value) override;
    /// Calls `each(at, value)` for everything that was ever stored.
    void contents(const std::function<void(std::uint64_t, std::uint64_t)>& each) const;

    // ---- instructions; those that would be #GP return false and change nothing

    /// The state at the start, or after a change of the paging mode by way of CR0.PG = 0: nothing is cached.
    bool start(const Cpu& cpu);
    bool load_cr3(std::uint64_t root, std::uint16_t pcid, bool no_flush);
    void invlpg(std::uint64_t at);
    bool invpcid(unsigned type, std::uint16_t pcid, std::uint64_t at);
    /// MOV CR0, MOV CR4, WRMSR, WRPKRU: takes everything but mode, root, pcid and PDPTEs from `to`.
    bool set_control(Cpu to);

    // ---- accesses

    [[nodiscard]] Walk walk(std::uint64_t at, Access access) const {
        return model::walk(cpu_, *this, at, access);
    }
    void mark(const Walk& walk, bool write) { model::mark(cpu_, *this, walk, write); }

    /// Whether the caches may let this access pass with a translation that `wanted(physical, user page)`
    /// accepts.
    using Wanted = std::function<bool(std::uint64_t physical, bool user_page)>;
    [[nodiscard]] bool may_have_cached(std::uint64_t at, Access access, const Wanted& wanted) const;

  private:
    struct Version {
        std::uint64_t since = 0;
        std::uint64_t value = 0;
    };
    /// A time with one CR3.
    struct Era {
        std::uint64_t since = 0;
        std::uint64_t root = 0;
        std::uint16_t pcid = 0;
        std::array<std::uint64_t, 4> pdpte{};
    };
    struct Flush {
        std::uint64_t time = 0;
        std::optional<std::uint16_t> pcid{};    ///< of this PCID only
        std::optional<std::uint64_t> address{}; ///< translations of this address only
        bool globals = false;                   ///< global translations, too: of any PCID
        bool structures = false; ///< paging-structure caches of the PCID, not only those for `address`
    };
    struct Query;
    struct Path;

    void flush_all();
    void flush(Flush flush);
    void begin_era();
    [[nodiscard]] std::uint64_t dropped(std::uint64_t at, unsigned page_bits, bool global) const;
    [[nodiscard]] std::uint64_t structures_dropped_after(std::uint64_t time, std::uint16_t pcid,
                                                         std::uint64_t at) const;
    [[nodiscard]] std::uint64_t current_from(std::uint16_t pcid, std::uint64_t time) const;
    [[nodiscard]] std::uint64_t nxe_from(std::uint64_t time) const;
    [[nodiscard]] bool search(const Query& query, const Path& path) const;
    [[nodiscard]] bool usable(const Query& query, const Path& path, std::uint64_t entry) const;

    std::vector<Range> ram_;
    Cpu cpu_;
    std::unordered_map<std::uint64_t, std::vector<Version>> memory_; ///< oldest first; one since flush_all
    std::vector<Era> eras_;                                          ///< likewise
    std::vector<Flush> flushes_;                                     ///< since flush_all
    std::vector<Version> nxe_; ///< values of EFER.NXE; the last one, and those since flush_all
    std::uint64_t now_ = 0;
};

} // namespace umbra::model
