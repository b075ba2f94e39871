// Fuzzes the shadow MMU (shadow/mmu.hpp): a guest with two vCPUs whose programs write any values into their
// page tables, flush or forget to, change modes and use memory. After each operation the audit must hold, and
// the tables must be ones that the machine may run on: nothing mapped that is not the guest's, nothing that
// the guest's tables did not give as of the last flush, nothing changed that the machine was not told of.
// Whether each access ends as on a CPU is the model tests' affair.
#include "shadow/mmu.hpp"
#include "tests/fuzz/harness.hpp"

#include <algorithm>
#include <map>

namespace umbra::fuzz {
namespace {

constexpr std::size_t most_pool_pages = 64;
constexpr std::size_t shadowed_formats = formats.size() - 1; // 5-level paging, the last one, is not
constexpr MachineFrame pool_first{0x2'0000'0000}, nothing{0x1'fffe'ffff};
constexpr ShadowEntry switcher{MachineFrame{0x1'ffff'0000}, entry_bit::present | entry_bit::writable |
                                                                entry_bit::accessed | entry_bit::dirty};

/// What a machine makes of the shadow tables for one page.
struct Translation {
    MachineFrame page;
    bool writable = true;
    bool no_execute = false;

    [[nodiscard]] bool allows(Access access) const {
        return (!access.write || writable) && (!access.fetch || !no_execute);
    }
    /// Whether a CPU that goes on with this one does nothing that `now` forbids.
    [[nodiscard]] bool within(const Translation& now) const {
        return page == now.page && (!writable || now.writable) && (no_execute || !now.no_execute);
    }
};

/// The machine's CPU and the monitor's state of one vCPU.
struct Cpu {
    Cpu(ShadowTables& tables, unsigned number) : mmu(tables, number) {}

    Mmu mmu;
    GuestPaging paging;
    bool user = false, ac = false, trap_user_fetch = false;
    bool in_guest = false;
    bool in_step = false; ///< nobody has written to RAM since this vCPU's last flush of everything
    bool exposed = false; ///< a page is mapped only because it was fetched from (Role::user_pages_hidden)
    GuestVirt last;       ///< address used
    std::optional<MachineFrame> root;         ///< that the machine has loaded
    std::map<std::uint64_t, Translation> tlb; ///< by page of the address
    /// Entries that the machine has met present and believes, where it does not see stores: by place.
    std::map<std::pair<std::size_t, unsigned>, ShadowEntry> believed;
};

class Program {
  public:
    Program(const SmallMemory& ram, std::span<std::byte> pool_memory, Input input)
        : memory_(ram.memory()), input_(input),
          pool_(pool_first, pool_memory.first((1 + input_.below(4)) * most_pool_pages / 4 * page_size)),
          tables_(memory_, pool_, config(), switcher), cpus_{Cpu(tables_, 0), Cpu(tables_, 1)} {
        const auto bits = input_.take<std::uint8_t>();
        for (Cpu& cpu : cpus_) { // what CPUID says stays
            cpu.paging.gigabyte_pages = (bits & 1) != 0;
            cpu.paging.physical_bits = std::array{48U, 36U, 40U, 52U}.at(bits >> 1 & 3);
            cpu.mmu.set_paging(cpu.paging);
        }
    }

    void run() {
        build();
        constexpr unsigned max_operations = 64;
        for (unsigned i = 0; i < max_operations && !input_.empty(); ++i) {
            const auto operation = input_.take<std::uint8_t>();
            operate(operation % 16, cpus_.at(operation >> 7));
            check_all();
        }
    }

  private:
    // ---- the machine at the start

    MmuConfig config() {
        const auto bits = input_.take<std::uint16_t>();
        MmuConfig config;
        config.nothing = nothing;
        config.gigabyte_pages = (bits & 1) != 0;
        config.stores_seen = (bits & 2) != 0;
        config.first_slot = std::array{300U, 0U, 1U, 511U}.at(bits >> 2 & 3);
        if ((bits & 0x10) != 0) {
            config.usable_slots.assign(entries_per_table, false);
            for (const unsigned slot : {0U, 1U, 300U, 511U})
                config.usable_slots[slot] = true;
        }
        config.sync = static_cast<Sync>(bits >> 5 & 3);
        config.trap_cost = bits >> 7 & 3;
        config.settled_after = 2;
        config.prefetch = std::array{1U, 2U, 16U, 512U}.at(bits >> 9 & 3);
        config.kick = [this] {
            for (Cpu& cpu : cpus_)
                leave(cpu);
        };
        trace("pool of {} pages, configuration {:#x}", pool_.capacity(), bits);
        return config;
    }

    /// Tables that map the pages themselves from address 0 on, so that a guest can write to its tables.
    void build() {
        Cpu& cpu = cpus_[0];
        set_paging(cpu);
        const PagingFormat& format = *cpu.paging.format;
        if (format.levels.empty())
            return;
        constexpr std::uint64_t rights = entry_bit::present | entry_bit::writable | entry_bit::user;
        const std::uint64_t upper_rights = input_.below(2) != 0 ? rights : rights & ~entry_bit::user;
        unsigned next = 1;
        GuestFrame table = SmallMemory::page(0);
        for (const Level& level : format.levels.first(format.levels.size() - 1)) {
            const GuestFrame below = SmallMemory::page(next++);
            write_entry(level, table.base(), GuestEntry(below, level.in_registers ? 1 : upper_rights));
            table = below;
        }
        const Level& last = format.level(1);
        for (unsigned i = 0; i < SmallMemory::pages.size(); ++i)
            write_entry(last, table.base() + std::uint64_t{i} * last.entry_bytes,
                        GuestEntry(SmallMemory::page(i), rights));
        load_cr3(cpu, SmallMemory::page(0));
    }

    // ---- operations

    void operate(unsigned operation, Cpu& cpu) {
        switch (operation) {
        case 0:
            write();
            break;
        case 1:
        case 2:
        case 3:
            extend(cpu, address(cpu));
            break;
        case 4:
        case 5:
        case 6: {
            const GuestVirt at = address(cpu);
            const bool entry = (operation & 1) != 0;
            const std::uint64_t value =
                entry ? SmallMemory::entry(input_).raw() : input_.take<std::uint64_t>();
            access(cpu, GuestVirt(at.value() & ~std::uint64_t{7}), {.write = true}, value);
            break;
        }
        case 7:
            set_paging(cpu);
            break;
        case 8:
            load_cr3(cpu, SmallMemory::frame(input_));
            break;
        case 9:
            flush(cpu);
            break;
        case 10:
            invalidate(cpu);
            break;
        case 11:
            if (input_.below(2) == 0)
                cpu.user = !cpu.user;
            else
                cpu.ac = !cpu.ac;
            trace("user {} ac {}", cpu.user, cpu.ac);
            cpu.mmu.set_alignment_check(cpu.ac);
            enter(cpu);
            break;
        case 12:
            look(cpu);
            break;
        default: {
            const GuestVirt at = address(cpu);
            const auto kind = fuzz::access(input_.take<std::uint8_t>());
            access(cpu, at, {.write = kind.write, .fetch = kind.fetch}, std::nullopt);
        }
        }
    }

    /// The last one again, or another: random addresses rarely meet.
    [[nodiscard]] GuestVirt address(Cpu& cpu) {
        if (input_.below(2) == 0 || !cpu.paging.format->canonical(cpu.last))
            cpu.last = SmallMemory::address(input_, *cpu.paging.format);
        return cpu.last;
    }

    /// RAM is about to change.
    void note_write() {
        for (Cpu& cpu : cpus_)
            cpu.in_step = false;
    }

    /// A store by umbra or a device.
    void write() {
        const GuestPhys slot = SmallMemory::slot(input_);
        const auto value = input_.take<std::uint64_t>();
        trace("write {} {:#x}", slot, value);
        note_write();
        check(memory_.write(slot, value), "a slot of RAM can be written");
        check_writes(tables_.wrote(slot, sizeof(value)));
    }

    void write_entry(const Level& level, GuestPhys slot, GuestEntry entry) {
        note_write();
        put(memory_, level, slot, entry);
        check_writes(tables_.wrote(slot, level.entry_bytes));
    }

    /// Likewise, of the entry that the walk of an address ends at: so tables grow deep.
    void extend(Cpu& cpu, GuestVirt at) {
        const GuestEntry entry = SmallMemory::entry(input_);
        const GuestWalk walk = walk_guest(memory_, cpu.paging, at, {});
        if (walk.depth == 0 || walk.leaf().level->in_registers || !SmallMemory::offset(walk.leaf().slot))
            return;
        const Level& level = *walk.leaf().level;
        trace("extend {} at {} {} {:#x}", at, level.name, walk.leaf().slot, entry.raw());
        write_entry(level, walk.leaf().slot, entry);
    }

    /// MOV CR0, MOV CR4 and WRMSR to EFER, at once.
    void set_paging(Cpu& cpu) {
        const auto bits = input_.take<std::uint16_t>();
        GuestPaging& paging = cpu.paging;
        const bool global_pages = (bits & 0x10) != 0;
        const PagingFormat* const format = formats.at((bits >> 8) % shadowed_formats);
        const bool flushes = format != paging.format || global_pages != paging.global_pages;
        paging.format = format;
        paging.write_protect = (bits & 1) != 0;
        paging.no_execute = (bits & 2) != 0;
        paging.smep = (bits & 4) != 0;
        paging.smap = (bits & 8) != 0;
        paging.global_pages = global_pages;
        cpu.ac = (bits & 0x20) != 0;
        cpu.trap_user_fetch = (bits & 0x40) != 0;
        if (!format->long_mode())
            paging.pcid = 0;
        trace("paging {:#x}: {} levels", bits, format->levels.size());
        if (flushes) // the Mmu takes the registers over with a flush only
            load_registers(cpu);
        cpu.mmu.set_trap_user_fetch(cpu.trap_user_fetch);
        cpu.mmu.set_alignment_check(cpu.ac);
        cpu.mmu.set_paging(paging);
        if (flushes)
            cpu.mmu.flush({.all_contexts = true, .globals = true});
        enter(cpu);
        if (flushes)
            check_in_step(cpu);
    }

    void load_registers(Cpu& cpu) const {
        GuestPaging& paging = cpu.paging;
        paging.pdpt = paging.root.base();
        if (const auto loaded = load_pdptes(memory_, paging.pdpt.value(), paging.physical_bits))
            paging.pdptes = *loaded;
    }

    void load_cr3(Cpu& cpu, GuestFrame root) {
        cpu.paging.root = cpu.paging.format->long_mode() ? root : GuestFrame(root.number() & 0xf'ffff);
        load_registers(cpu);
        const auto bits = input_.take<std::uint8_t>();
        if (cpu.paging.format->long_mode())
            cpu.paging.pcid = bits & 3;
        const bool keeps = cpu.paging.format->long_mode() && (bits & 0xc) == 0xc; // CR3 bit 63
        trace("cr3 {} pcid {}{}", cpu.paging.root.base(), cpu.paging.pcid, keeps ? " no flush" : "");
        cpu.mmu.set_paging(cpu.paging);
        if (!keeps)
            cpu.mmu.flush();
        enter(cpu);
        if (!keeps && !cpu.paging.global_pages)
            check_in_step(cpu);
    }

    void flush(Cpu& cpu) {
        const auto bits = input_.take<std::uint8_t>();
        const FlushScope scope{.all_contexts = (bits & 1) != 0,
                               .pcid = static_cast<std::uint16_t>(bits >> 2 & 3),
                               .globals = (bits & 2) != 0};
        trace("flush {:#x}", bits);
        cpu.mmu.flush(scope);
        enter(cpu);
        if ((scope.all_contexts || scope.pcid == cpu.paging.pcid) &&
            (scope.globals || !cpu.paging.global_pages))
            check_in_step(cpu);
    }

    void invalidate(Cpu& cpu) {
        const GuestVirt at = address(cpu);
        if (input_.below(2) != 0)
            extend(cpu, at);
        trace("invlpg {}", at);
        cpu.mmu.invalidate(at);
        enter(cpu);
        if (const auto found = translate_by_shadow(cpu, at, nullptr))
            check_page(cpu, at, *found);
    }

    void look(Cpu& cpu) {
        const auto bits = input_.take<std::uint8_t>();
        if (bits % 8 == 0) {
            trace("reset");
            leave(cpu);
            cpu.mmu.reset();
        } else if (bits % 2 == 0) {
            const GuestVirt at = address(cpu);
            trace("look {}", at);
            leave(cpu);
            check(cpu.mmu.shadow_walk(at, (bits & 8) != 0).size() <= 4, "the machine has four levels");
        } else {
            check_mappings(SmallMemory::frame(input_));
        }
    }

    // ---- the machine

    void leave(Cpu& cpu) {
        cpu.mmu.left();
        cpu.in_guest = false;
    }

    [[nodiscard]] bool has_switcher(MachineFrame root) const {
        return pool_.entries(*pool_.page_of(root))[tables_.reserved_slot()] == switcher;
    }

    /// Loads the root, and does what is owed.
    void enter(Cpu& cpu) {
        leave(cpu);
        MachineState state = cpu.mmu.enter(cpu.user);
        check(state.reserved_slot == tables_.reserved_slot() && has_switcher(state.root),
              "every root carries the switcher");
        check(!cpu.root || state.debt.root_gone || has_switcher(*cpu.root),
              "the loaded root still carries the switcher, unless the debt says that it is gone");
        if (state.debt.flush || cpu.root != state.root)
            cpu.tlb.clear();
        for (const TableIndex table : state.debt.tables)
            std::erase_if(cpu.believed,
                          [&](const auto& copy) { return copy.first.first == TablePool::number(table); });
        state.debt.paid();
        cpu.root = state.root;
        cpu.in_guest = true;
        cpu.exposed = false;
        check_told(cpu);
    }

    /// The translation by the tables that the machine has loaded. `cpu`: not null to remember what is met.
    [[nodiscard]] std::optional<Translation> translate_by_shadow(const Cpu& cpu, GuestVirt at, Cpu* meets) {
        Translation result;
        MachineFrame table = *cpu.root;
        for (const Level& level : paging_4_level.levels) {
            const auto page = pool_.page_of(table);
            check(page.has_value(), "{} is no table", table.base());
            const unsigned slot = level.index(at);
            const ShadowEntry entry = pool_.entries(*page)[slot];
            if (!entry.present() || !entry.user())
                return std::nullopt;
            if (meets != nullptr)
                meets->believed[{TablePool::number(*page), slot}] = entry;
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

    [[nodiscard]] std::optional<Translation> lookup(Cpu& cpu, GuestVirt at, Access access) {
        if (!cpu.in_guest)
            enter(cpu);
        const std::uint64_t page = at.frame().number();
        if (const auto found = cpu.tlb.find(page); found != cpu.tlb.end()) {
            if (found->second.allows(access))
                return found->second;
            cpu.tlb.erase(found);
        }
        const auto found = translate_by_shadow(cpu, at, &cpu);
        if (!found || !found->allows(access))
            return std::nullopt;
        cpu.tlb.emplace(page, *found);
        return found;
    }

    /// One access of the guest, with the page faults that it takes. A write stores `value`, if there is one
    /// and it goes to a page for writing.
    void access(Cpu& cpu, GuestVirt at, Access access, std::optional<std::uint64_t> value) {
        access.user = cpu.user;
        access.ac = cpu.ac;
        trace("access {} write {} fetch {} user {}", at, access.write, access.fetch, access.user);
        constexpr unsigned patience = 3;
        bool open = false;
        for (unsigned misses = 0;; ++misses) {
            if (const auto found = lookup(cpu, at, access)) {
                check_is_guests(found->page);
                const GuestPhys target(found->page.base().value() + at.page_offset());
                if (cpu.in_step && !cpu.exposed)
                    check_page(cpu, at, *found);
                if (value && SmallMemory::offset(target)) {
                    note_write();
                    check(memory_.write(target, *value), "a page of RAM can be written");
                }
                break;
            }
            check(misses < patience, "{} is filled, and still a miss", at);
            const GuestWalk wanted = walk_guest(memory_, cpu.paging, at, access);
            const MissResult miss = cpu.mmu.fault(at, access);
            cpu.in_guest = false;
            if (miss.outcome == Miss::guest_fault) {
                check_guest_fault(cpu, wanted, miss, access);
                break;
            }
            check(!wanted.fault, "{} is filled, though the guest's tables do not allow it", at);
            if (miss.outcome == Miss::no_slot)
                break;
            if (miss.outcome == Miss::table_write) {
                check(access.write && miss.address == wanted.address, "the write is to {}", wanted.address);
                check(!open, "one write is let through once");
                cpu.mmu.begin_table_write();
                open = true;
            }
            enter(cpu);
            cpu.exposed = access.fetch && !access.user && cpu.paging.smap && !cpu.ac;
            const auto made = translate_by_shadow(cpu, at, nullptr);
            check(made.has_value(), "{} is filled, and the tables do not map it", at);
            check(made->page == machine_frame(wanted.address.frame()), "{} is filled with another page", at);
            // A page that has become a table of the guest meanwhile takes a second miss.
            check(access.write || made->allows(access), "{} is filled without the right", at);
        }
        if (open)
            finish_table_write(cpu);
    }

    void finish_table_write(Cpu& cpu) {
        leave(cpu);
        check_writes(cpu.mmu.finish_table_write());
        check(!cpu.mmu.table_write_begun(), "the write has ended");
    }

    // ---- rules

    void check_guest_fault(const Cpu& cpu, const GuestWalk& wanted, const MissResult& miss,
                           Access access) const {
        if (miss.trapped_user_fetch) {
            check(cpu.trap_user_fetch && access.fetch && !access.user && wanted.user && !wanted.fault,
                  "only kernel fetches from user pages are trapped");
            return;
        }
        check(wanted.fault.has_value(), "a fault that the guest's tables do not ask for");
        check(miss.fault.address == wanted.fault->address &&
                  miss.fault.error_code == wanted.fault->error_code,
              "error code {:#x} instead of {:#x}", miss.fault.error_code, wanted.fault->error_code);
    }

    [[nodiscard]] MachineFrame machine_frame(GuestFrame frame) const {
        return std::min(MachineFrame(frame.number()), nothing);
    }

    void check_is_guests(MachineFrame frame) const {
        check(frame <= nothing, "{} is not the guest's", frame.base());
    }

    void check_all() {
        if (const auto broken = tables_.audit())
            check(false, "{}", *broken);
        for (const Cpu& cpu : cpus_)
            check(!cpu.in_guest || has_switcher(*cpu.root), "the root of a vCPU in the guest stays");
    }

    /// What the machine may have kept is still what the tables say, or less: for the rest the debt was paid.
    void check_told(Cpu& cpu) {
        for (const auto& [page, translation] : cpu.tlb) {
            const auto now = translate_by_shadow(cpu, GuestVirt(page << page_shift), nullptr);
            check(now && translation.within(*now), "nothing is owed for a change at {}",
                  GuestVirt(page << page_shift));
        }
        if (tables_.config().stores_seen)
            cpu.believed.clear();
        for (const auto& [place, entry] : cpu.believed) {
            const ShadowEntry now = pool_.entries(static_cast<TableIndex>(place.first))[place.second];
            const Translation before{entry.table(), entry.writable(), entry.no_execute()};
            check(now.present() && before.within({now.table(), now.writable(), now.no_execute()}),
                  "nothing is owed for a change of entry {} of table {}", place.second, place.first);
        }
    }

    /// A page that the machine can reach is one that the guest's tables give, with no more rights. With SMAP
    /// a page that a fetch has filled can be read (Role::user_pages_hidden).
    void check_page(const Cpu& cpu, GuestVirt at, const Translation& found) const {
        const auto allowed = [&](Access access) {
            access.user = cpu.user;
            access.ac = cpu.ac;
            const GuestWalk walk = walk_guest(memory_, cpu.paging, at, access);
            return !walk.fault && machine_frame(walk.address.frame()) == found.page;
        };
        check(allowed({}) || allowed({.fetch = true}), "{} is mapped, and the guest's tables do not map it",
              at);
        check(found.no_execute || allowed({.fetch = true}),
              "{} can be fetched from, and not by the guest's tables", at);
        if (!found.writable)
            return;
        check(allowed({.write = true}), "{} is writable, and not by the guest's tables", at);
        const GuestWalk walk =
            walk_guest(memory_, cpu.paging, at, {.write = true, .user = cpu.user, .ac = cpu.ac});
        check(walk.depth == 0 || walk.leaf().entry.dirty(), "{} is writable before it is dirty", at);
    }

    void check_writes(const std::vector<TableWrite>& writes) const {
        check(writes.empty() || tables_.config().sync == Sync::trap, "nobody asked for the writes");
        for (const TableWrite& write : writes) {
            trace("table write {} {:#x} {:#x}", write.slot, write.before.raw(), write.after.raw());
            check(SmallMemory::offset(write.slot).has_value(), "{} was not written", write.slot);
            check(write.before != write.after, "a write that changes nothing is none");
        }
    }

    /// Calls `visit(const WalkStep&, const Translation&)` for each leaf below the loaded root. The rights are
    /// those of the whole path.
    template<class Visit>
    void for_each_leaf(const Cpu& cpu, Visit visit) const {
        std::array<Translation, 5> path; // by level: the rights down to it
        const auto read = [this](const Level&, MachinePhys slot) {
            const auto page = pool_.page_of(slot.frame());
            check(page.has_value(), "{} is in no table", slot);
            const ShadowEntry entry = pool_.entries(*page)[slot.page_offset() / sizeof(ShadowEntry)];
            return entry.user() ? entry : ShadowEntry(); // the switcher's is not
        };
        const auto look = [&](const WalkStep<MachinePhysSpace>& step) {
            const Level& level = *step.level;
            Translation& here = path.at(level.number);
            here = level.number == 4 ? Translation() : path.at(level.number + 1);
            here.writable &= step.entry.writable();
            here.no_execute |= step.entry.no_execute();
            if (step.entry.present() && step.entry.leaf(level)) {
                here.page = step.entry.page(level);
                visit(step, here);
            }
            return WalkNext::descend;
        };
        constexpr GuestVirt last_low{(std::uint64_t{1} << 47) - 1}, first_high{~last_low.value()};
        (void)walk(paging_4_level, *cpu.root, GuestVirt(0), last_low, read, look);
        (void)walk(paging_4_level, *cpu.root, first_high, GuestVirt(~std::uint64_t{0}), read, look);
    }

    /// Right after a flush: all that the machine can reach is what the guest's tables say now.
    void check_in_step(Cpu& cpu) const {
        cpu.in_step = true;
        for_each_leaf(cpu, [&](const WalkStep<MachinePhysSpace>& step, Translation first) {
            check_page(cpu, step.address, first);
            const std::uint64_t last = step.level->span() - page_size; // of a large page
            first.page = first.page + (last >> page_shift);
            check_page(cpu, step.address + last, first);
        });
    }

    /// The reverse map gives a frame's mappings, all of them.
    void check_mappings(GuestFrame frame) {
        trace("mappings of {}", frame.base());
        const std::vector<ShadowSlot> found = tables_.mappings(frame);
        for (const ShadowSlot place : found)
            check(pool_.entries(place.table)[place.slot].present(), "a mapping is present");
        for (const Cpu& cpu : cpus_) {
            if (!cpu.in_guest)
                continue;
            for_each_leaf(cpu, [&](const WalkStep<MachinePhysSpace>& step, const Translation& leaf) {
                if (frame.number() - leaf.page.number() >= step.level->span() >> page_shift)
                    return;
                const ShadowSlot place{*pool_.page_of(step.slot.frame()),
                                       static_cast<unsigned>(step.slot.page_offset() / sizeof(ShadowEntry))};
                check(std::ranges::count(found, place) == 1, "the mapping at {} is known once", step.address);
            });
        }
    }

    const GuestMemory& memory_;
    Input input_;
    TablePool pool_;
    ShadowTables tables_;
    std::array<Cpu, 2> cpus_;
};

} // namespace
} // namespace umbra::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace umbra;
    static const fuzz::SmallMemory ram;
    static const auto pool_memory = std::make_unique<std::byte[]>(fuzz::most_pool_pages * page_size);
    const std::span pool(pool_memory.get(), fuzz::most_pool_pages * page_size);
    ram.clear();
    std::memset(pool.data(), 0, pool.size());
    fuzz::Program(ram, pool, {data, size}).run();
    return 0;
}
