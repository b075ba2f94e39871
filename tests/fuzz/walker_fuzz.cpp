// Fuzzes the walk of guest tables (shadow/guest_walk.hpp, shadow/walker.hpp): arbitrary guest memory, every
// paging mode, any control state. What is checked are the rules that hold for all of them; what each walk
// must give is the model tests' affair.
#include "tests/fuzz/harness.hpp"

namespace umbra::fuzz {
namespace {

/// `contents` once the CPU has used `walk`. Entries elsewhere are zero, or outside RAM all-ones, and stay so.
std::vector<std::uint64_t> marked(std::vector<std::uint64_t> contents, const GuestWalk& walk, bool write) {
    for (const GuestWalk::Step& step : walk.visited()) {
        const auto offset = SmallMemory::offset(step.slot);
        if (step.level->in_registers || !offset)
            continue;
        const std::uint64_t marks =
            entry_bit::accessed | (&step == &walk.leaf() && write ? entry_bit::dirty : 0);
        contents.at(*offset / sizeof(std::uint64_t)) |= marks << *offset % sizeof(std::uint64_t) * 8;
    }
    return contents;
}

class Program {
  public:
    Program(const SmallMemory& ram, Input input) : ram_(ram), memory_(ram.memory()), input_(input) {}

    void run() {
        set_paging();
        constexpr unsigned max_operations = 64;
        for (unsigned i = 0; i < max_operations && !input_.empty(); ++i) {
            switch (input_.below(8)) {
            case 0:
                write();
                break;
            case 1:
            case 2:
            case 3:
                extend();
                break;
            case 4:
                set_paging();
                break;
            case 5:
                range();
                break;
            default:
                access_memory();
            }
        }
    }

  private:
    void set_paging() {
        const auto bits = input_.take<std::uint16_t>();
        const unsigned mode = input_.below(formats.size());
        paging_.format = formats.at(mode);
        paging_.write_protect = (bits & 1) != 0;
        paging_.no_execute = (bits & 2) != 0;
        paging_.smep = (bits & 4) != 0;
        paging_.smap = (bits & 8) != 0;
        paging_.gigabyte_pages = (bits & 16) != 0;
        paging_.protection_keys = (bits & 32) != 0;
        paging_.global_pages = (bits & 64) != 0;
        paging_.physical_bits = 32 + (bits >> 8) % 21;
        paging_.pkru = paging_.protection_keys ? input_.take<std::uint32_t>() : 0;
        paging_.root = SmallMemory::frame(input_);
        if (paging_.format == &paging_pae) {
            const std::uint64_t cr3 = paging_.root.base().value() | (std::uint64_t{bits} & 0x80) << 4;
            if (const auto loaded = load_pdptes(memory_, cr3, paging_.physical_bits))
                paging_.pdptes = *loaded;
            paging_.pdpt = GuestPhys(cr3);
            if ((bits & 0x80) != 0) // what another table, or another CPU, had in it
                paging_.pdptes[input_.below(4)] = SmallMemory::entry(input_).raw();
        }
        trace("mode {}, bits {:#x}, {} physical bits, PKRU {:#x}, root {}", mode, bits, paging_.physical_bits,
              paging_.pkru, paging_.root.base());
    }

    [[nodiscard]] GuestVirt address() { return SmallMemory::address(input_, *paging_.format); }

    void write() {
        const GuestPhys slot = SmallMemory::slot(input_);
        const auto value = input_.take<std::uint64_t>();
        trace("write {} {:#x}", slot, value);
        check(memory_.write(slot, value), "a slot of RAM can be written");
    }

    /// Writes the entry that the walk of an address ended at: so the tables grow deep.
    void extend() {
        const GuestVirt at = address();
        const GuestEntry entry = SmallMemory::entry(input_);
        const GuestWalk walk = walk_guest(memory_, paging_, at, {});
        if (walk.depth == 0 || walk.leaf().level->in_registers)
            return;
        trace("extend {} at {} {} {:#x}", at, walk.leaf().level->name, walk.leaf().slot, entry.raw());
        put(memory_, *walk.leaf().level, walk.leaf().slot, entry);
    }

    void access_memory() {
        const GuestVirt at = address();
        const Access access = fuzz::access(input_.take<std::uint8_t>());
        trace("access {} write {} fetch {} user {} ac {}", at, access.write, access.fetch, access.user,
              access.ac);
        const auto before = ram_.contents();
        const GuestWalk found = walk_guest(memory_, paging_, at, access);
        check(ram_.contents() == before, "a walk changes nothing");
        check_walk(found, at, access);

        const GuestWalk done = translate(memory_, paging_, at, access);
        const auto after = ram_.contents();
        check_walk(done, at, access);
        check(done.fault.has_value() == found.fault.has_value(), "marks decide no access");
        if (done.fault) {
            check(done.fault->error_code == found.fault->error_code, "the fault is the walk's");
            check(after == before, "a fault marks nothing");
            return;
        }
        check(after == marked(before, done, access.write),
              "an access marks each entry accessed, and dirty the leaf of a write, and changes nothing else");
        const GuestWalk again = translate(memory_, paging_, at, access);
        check(ram_.contents() == after, "the second access marks nothing");
        check(again.address == done.address, "the second access reaches the same byte");
        const Access read{.user = access.user, .ac = access.ac};
        check(access.fetch || !walk_guest(memory_, paging_, at, read).fault,
              "what may be written may be read");
    }

    void check_walk(const GuestWalk& walk, GuestVirt at, Access access) const {
        const auto levels = paging_.format->levels;
        check(walk.depth <= levels.size(), "a walk is no deeper than the tables");
        bool user = true, writable = true, no_execute = false;
        for (unsigned i = 0; i < walk.depth; ++i) {
            const GuestWalk::Step& step = walk.steps.at(i);
            check(step.level == &levels[i], "a walk meets one entry of each level");
            check(step.level->in_registers || step.slot.page_offset() % step.level->entry_bytes == 0,
                  "entries are aligned");
            if (!step.level->in_registers) {
                user &= step.entry.user();
                writable &= step.entry.writable();
                no_execute |= step.entry.no_execute();
            }
            const bool last = i + 1 == walk.depth;
            const bool valid = step.entry.present() &&
                               (step.entry.raw() & reserved_bits(paging_, *step.level, step.entry)) == 0;
            check(last || (valid && !step.entry.leaf(*step.level)), "a walk goes on below tables only");
            check(walk.fault || !last || (valid && step.entry.leaf(*step.level)),
                  "a translation ends at a leaf");
            if (!last)
                check(step.level->in_registers || walk.steps.at(i + 1).slot.frame() == step.entry.table() ||
                          step.level[1].entry_bytes != step.level->entry_bytes,
                      "the next entry lies in the table that this one refers to");
        }
        if (!walk.fault) {
            const std::uint64_t limit = std::uint64_t{1}
                                        << (levels.empty() ? 32 : std::max(paging_.physical_bits, 32U));
            check(walk.address.value() < limit, "{} is beyond MAXPHYADDR", walk.address);
            check(levels.empty() || walk.address.frame() == page_of(walk.leaf(), at),
                  "the leaf gives the page");
            check(walk.user == user && walk.writable == writable && walk.no_execute == no_execute,
                  "the rights are those of all entries together");
            check(!access.fetch || !walk.no_execute, "no fetch from a page with XD");
            check(!access.user || walk.user, "no user access to a supervisor page");
            check(!access.write || walk.writable || (!access.user && !paging_.write_protect),
                  "no write to a read-only page");
            return;
        }
        const std::uint32_t code = walk.fault->error_code;
        check(walk.fault->address == at, "CR2 is the address");
        check(!levels.empty(), "without paging nothing faults");
        const GuestEntry entry = walk.leaf().entry;
        const bool reserved = (entry.raw() & reserved_bits(paging_, *walk.leaf().level, entry)) != 0;
        check(((code & PageFault::present) != 0) == entry.present(), "bit P of {:#x}", code);
        check(((code & PageFault::reserved) != 0) == (entry.present() && reserved), "bit RSVD of {:#x}",
              code);
        check(((code & PageFault::write) != 0) == access.write, "bit W/R of {:#x}", code);
        check(((code & PageFault::user) != 0) == access.user, "bit U/S of {:#x}", code);
        check((code & PageFault::fetch) == 0 || access.fetch, "bit I/D of {:#x}", code);
        check((code & PageFault::protection_key) == 0 || (paging_.protection_keys && !access.fetch),
              "bit PK of {:#x}", code);
        check(code < 1U << 6, "no other bit in {:#x}", code);
    }

    [[nodiscard]] static GuestFrame page_of(const GuestWalk::Step& leaf, GuestVirt at) {
        const std::uint64_t offset = at.value() & (leaf.level->span() - 1);
        return leaf.entry.page(*leaf.level) + (offset >> page_shift);
    }

    /// The walk over a range, as the debugger's listing of mappings makes it: tables may refer to themselves,
    /// so its end is the visitor's.
    void range() {
        const PagingFormat& format = *paging_.format;
        if (format.levels.empty() || format.root().in_registers)
            return;
        GuestVirt first = address(), last = address();
        if (first > last)
            std::swap(first, last);
        if (format.long_mode() && (first.value() ^ last.value()) >> 63 != 0)
            return; // not within one half
        trace("range {} {}", first, last);
        const auto read = [this](const Level& level, GuestPhys slot) {
            check(slot.page_offset() + level.entry_bytes <= page_size, "slots lie in their table");
            if (level.entry_bytes == sizeof(std::uint32_t))
                return GuestEntry(memory_.read<std::uint32_t>(slot).value_or(0));
            return GuestEntry(memory_.read<std::uint64_t>(slot).value_or(0));
        };
        constexpr unsigned patience = 2000;
        unsigned visited = 0;
        GuestVirt reached = first;
        const bool complete = walk(format, paging_.root, first, last, read, [&](const auto& step) {
            check(step.address >= reached && step.address <= last, "a range is walked upwards, inside it");
            check(step.address == first || (step.address.value() & (step.level->span() - 1)) == 0,
                  "all but the first address begin a span");
            reached = step.address;
            return ++visited < patience ? WalkNext::descend : WalkNext::stop;
        });
        check(complete == (visited < patience), "only the visitor ends a walk early");
        check(visited > 0, "a range has an entry");
    }

    const SmallMemory& ram_;
    const GuestMemory& memory_;
    Input input_;
    GuestPaging paging_;
};

} // namespace
} // namespace umbra::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const umbra::fuzz::SmallMemory ram;
    ram.clear();
    umbra::fuzz::Program(ram, {data, size}).run();
    return 0;
}
