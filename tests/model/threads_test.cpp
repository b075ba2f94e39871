// Several vCPUs on one set of shadow tables: threads that fault, write to tables of the guest, flush and run
// at once. Under ThreadSanitizer (UMBRA_SANITIZE=thread) this finds what the locks forget; anywhere it checks
// that each vCPU's own pages are where it has put them, and that nobody reaches anything but guest RAM.
#include "shadow/mmu.hpp"

#include <array>
#include <atomic>
#include <chrono>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

namespace umbra::model {
namespace {

constexpr std::uint64_t rights = entry_bit::present | entry_bit::writable | entry_bit::user;
constexpr std::uint64_t ram_size = std::uint64_t{8} << 20;
constexpr MachineFrame pool_first{0x2'0000'0000};
constexpr unsigned vcpus = 4, private_pages = 8, shared_tables = 4;

/// RAM as the vCPUs see it: all of it at `linear`, by pages of 2 MB; the shared tables' pages from `shared`
/// on; a vCPU's own pages from `own` on, with a root and a table of its own, and a second root with the same.
constexpr GuestVirt linear{0xffff'8800'0000'0000}, shared{std::uint64_t{1} << 39}, own{0};

class Guest {
  public:
    Guest() {
        pdpt_linear_ = new_table();
        const GuestFrame directory = new_table();
        put(pdpt_linear_, 0, GuestEntry(directory, rights));
        for (unsigned i = 0; i < ram_size >> 21; ++i)
            put(directory, i,
                GuestEntry(GuestPhys(std::uint64_t{i} << 21).frame(), rights | entry_bit::page_size));
        pdpt_shared_ = new_table();
        const GuestFrame shared_directory = new_table();
        put(pdpt_shared_, 0, GuestEntry(shared_directory, rights));
        for (unsigned i = 0; i < shared_tables; ++i) {
            shared_leaf.at(i) = new_table();
            put(shared_directory, i, GuestEntry(shared_leaf.at(i), rights));
            for (unsigned slot = 0; slot < entries_per_table; ++slot)
                put(shared_leaf.at(i), slot, GuestEntry(data_frame(slot), rights));
        }
    }

    struct Space {
        std::array<GuestFrame, 2> roots;
        GuestFrame leaf;
    };
    Space new_space(unsigned vcpu) {
        Space space;
        const GuestFrame pdpt = new_table(), directory = new_table();
        space.leaf = new_table();
        put(pdpt, 0, GuestEntry(directory, rights));
        put(directory, 0, GuestEntry(space.leaf, rights));
        for (unsigned page = 0; page < private_pages; ++page)
            put(space.leaf, page, GuestEntry(data_frame(vcpu * private_pages + page), rights));
        for (GuestFrame& root : space.roots) {
            root = new_table();
            put(root, paging_4_level.root().index(own), GuestEntry(pdpt, rights));
            put(root, paging_4_level.root().index(shared), GuestEntry(pdpt_shared_, rights));
            put(root, paging_4_level.root().index(linear), GuestEntry(pdpt_linear_, rights));
        }
        return space;
    }

    /// A page that is no table, by number.
    [[nodiscard]] static GuestFrame data_frame(std::uint64_t number) {
        return GuestFrame((ram_size >> page_shift) - 1 - number % 1024);
    }
    [[nodiscard]] std::atomic_ref<std::uint64_t> word(GuestPhys at) const {
        return std::atomic_ref(*reinterpret_cast<std::uint64_t*>(memory.range(at, 8).data()));
    }

    std::array<GuestFrame, shared_tables> shared_leaf;

  private:
    GuestFrame new_table() { return std::exchange(next_, next_ + 1); }
    void put(GuestFrame table, unsigned slot, GuestEntry entry) const {
        word(table.base() + slot * sizeof(GuestEntry)).store(entry.raw());
    }

    std::vector<std::uint64_t> ram_ = std::vector<std::uint64_t>(ram_size / 8);
    GuestFrame next_{1}, pdpt_linear_, pdpt_shared_;

  public:
    GuestMemory memory{{{GuestPhys(0), std::as_writable_bytes(std::span(ram_))}}};
};

class Vcpu {
  public:
    Vcpu(Guest& guest, ShadowTables& tables, const TablePool& pool, const std::atomic<unsigned>& kicks,
         unsigned number)
        : guest_(guest), tables_(tables), pool_(pool), kicks_(kicks), mmu_(tables, number), number_(number),
          space_(guest.new_space(number)), random_(number) {
        for (unsigned page = 0; page < private_pages; ++page)
            expected_.at(page) = Guest::data_frame(number * private_pages + page);
        paging_.root = space_.roots[0];
        mmu_.set_paging(paging_);
        mmu_.flush();
    }

    void run(unsigned steps) {
        for (unsigned step = 0; step < steps && wrong.empty(); ++step)
            act();
    }

    std::string wrong; ///< the first thing that was

  private:
    std::uint64_t below(std::uint64_t bound) { return random_() % bound; }
    static GuestVirt alias(GuestPhys at) { return linear + at.value(); }

    void act() {
        if (below(64) == 0) { // the next write to a table would make up for one that was missed
            if (const auto broken = tables_.audit())
                fail(fmt::format("vCPU {}: {}", number_, *broken));
        }
        switch (below(12)) {
        case 0: { // its own page, moved and flushed: only the new one may be seen
            const std::uint64_t page = below(private_pages);
            const GuestFrame frame = Guest::data_frame(below(1024));
            store(space_.leaf.base() + page * 8, GuestEntry(frame, rights).raw());
            mmu_.invalidate(own + page * page_size);
            expected_.at(page) = frame;
            break;
        }
        case 1: // a page that all share
            store(guest_.shared_leaf.at(below(shared_tables)).base() + below(64) * 8,
                  GuestEntry(Guest::data_frame(below(1024)), below(8) == 0 ? 0 : rights).raw());
            break;
        case 2: // marks cleared, as a kernel does that looks for pages to give up
            clear_marks(guest_.shared_leaf.at(below(shared_tables)).base() + below(64) * 8);
            break;
        case 3:
            mmu_.flush();
            break;
        case 4:
            paging_.root = space_.roots.at(below(2));
            mmu_.set_paging(paging_);
            mmu_.flush();
            break;
        case 5:
            mmu_.invalidate(shared_page());
            break;
        case 6:
            user_ = !user_;
            break;
        case 7:
            stay();
            break;
        case 8:
        case 9:
            (void)access(shared_page(), below(2) == 0);
            break;
        default: {
            const std::uint64_t page = below(private_pages);
            const auto reached = access(own + page * page_size, below(2) == 0);
            if (!reached || reached->number() != expected_.at(page).number())
                fail(fmt::format("vCPU {}: its page {} leads to frame {:#x} instead of {:#x}", number_, page,
                                 reached ? reached->number() : 0, expected_.at(page).number()));
        }
        }
    }

    GuestVirt shared_page() { return shared + (below(shared_tables) << 21) + below(64) * page_size; }

    void store(GuestPhys at, std::uint64_t value) {
        (void)access(alias(at), true, [&] { guest_.word(at).store(value); });
    }
    void clear_marks(GuestPhys at) {
        (void)access(alias(at), true,
                     [&] { guest_.word(at).fetch_and(~(entry_bit::accessed | entry_bit::dirty)); });
    }

    /// The frame that the access reaches, where `effect` happens; nothing if it is #PF.
    template<class Effect>
    std::optional<MachineFrame> access(GuestVirt at, bool write, Effect&& effect) {
        const Access access{.write = write, .fetch = false, .user = user_};
        constexpr unsigned patience = 10'000; // the others take tables away all the time
        for (unsigned attempt = 0; attempt < patience; ++attempt) {
            const MachineFrame root = enter();
            const auto reached = translate_by_hardware(root, at, write);
            if (reached) {
                if (write && below(2) == 0) // a chance for the others to take away what was found
                    std::this_thread::sleep_for(std::chrono::microseconds(below(50)));
                effect();
            }
            mmu_.left();
            if (reached) {
                if (mmu_.table_write_begun())
                    (void)mmu_.finish_table_write();
                return reached;
            }
            const MissResult miss = mmu_.fault(at, access);
            if (miss.outcome == Miss::guest_fault)
                return std::nullopt;
            if (miss.outcome == Miss::table_write)
                mmu_.begin_table_write();
        }
        fail(fmt::format("vCPU {}: an access makes no progress", number_));
        return std::nullopt;
    }
    std::optional<MachineFrame> access(GuestVirt at, bool write) {
        return access(at, write, [] {});
    }

    /// Runs for a while, until another vCPU wants it out.
    void stay() {
        const unsigned kicks = kicks_.load();
        const MachineFrame root = enter();
        for (unsigned i = 0; i < 200 && kicks_.load() == kicks; ++i)
            (void)translate_by_hardware(root, shared_page(), false);
        mmu_.left();
    }

    MachineFrame enter() {
        MachineState state = mmu_.enter(user_);
        state.debt.paid(); // no TLB here: each access is a walk
        return state.root;
    }

    std::optional<MachineFrame> translate_by_hardware(MachineFrame table, GuestVirt at, bool write) {
        bool writable = true;
        for (const Level& level : paging_4_level.levels) {
            const auto page = pool_.page_of(table);
            if (!page) {
                fail(fmt::format("vCPU {}: a shadow entry leads out of the pool", number_));
                return std::nullopt;
            }
            ShadowEntry& slot = pool_.entries(*page)[level.index(at)];
            const ShadowEntry entry = std::atomic_ref(slot).load(std::memory_order_acquire);
            if (!entry.present())
                return std::nullopt;
            writable &= entry.writable();
            if (!entry.leaf(level)) {
                table = entry.table();
                continue;
            }
            if (write && !writable)
                return std::nullopt;
            const MachineFrame frame = (entry.page(level).base() + (at.value() & (level.span() - 1))).frame();
            if (!guest_.memory.contains(GuestPhys(frame.base().value()), page_size))
                fail(fmt::format("vCPU {}: reaches frame {:#x}", number_, frame.number()));
            return frame;
        }
        return std::nullopt;
    }

    void fail(std::string what) {
        if (wrong.empty())
            wrong = std::move(what);
    }

    Guest& guest_;
    const ShadowTables& tables_;
    const TablePool& pool_;
    const std::atomic<unsigned>& kicks_;
    Mmu mmu_;
    unsigned number_;
    Guest::Space space_;
    std::mt19937_64 random_;
    GuestPaging paging_;
    bool user_ = false;
    std::array<GuestFrame, private_pages> expected_;
};

struct Kind {
    Sync sync;
    std::size_t pool_pages;
    const char* name;
};

class Threads : public ::testing::TestWithParam<Kind> {};

TEST_P(Threads, FaultWriteFlushAtOnce) {
    Guest guest;
    std::vector<std::uint64_t> pool_memory(GetParam().pool_pages * page_size / 8 + page_size / 8);
    const auto address = reinterpret_cast<std::uintptr_t>(pool_memory.data());
    TablePool pool(pool_first, std::as_writable_bytes(std::span(pool_memory))
                                   .subspan((page_size - address % page_size) % page_size,
                                            GetParam().pool_pages * page_size));
    std::atomic<unsigned> kicks = 0;
    MmuConfig config;
    config.nothing = MachineFrame(0x1'fffe'ffff);
    config.stores_seen = true;
    config.first_slot = 300;
    config.sync = GetParam().sync;
    config.trap_cost = 2;
    config.settled_after = 2;
    config.kick = [&kicks] { ++kicks; };
    constexpr ShadowEntry switcher{MachineFrame{0x1'ffff'0000}, entry_bit::present};
    ShadowTables tables(guest.memory, pool, config, switcher);
    std::vector<std::unique_ptr<Vcpu>> all;
    for (unsigned number = 0; number < vcpus; ++number)
        all.push_back(std::make_unique<Vcpu>(guest, tables, pool, kicks, number));
    std::vector<std::thread> threads;
    for (const auto& vcpu : all)
        threads.emplace_back([&vcpu] { vcpu->run(5000); });
    for (std::thread& thread : threads)
        thread.join();
    for (const auto& vcpu : all)
        EXPECT_EQ(vcpu->wrong, "");
    EXPECT_EQ(tables.audit(), std::nullopt);
    EXPECT_GT(tables.counters().fills, 500U);
    EXPECT_GT(tables.counters().entries_dropped, 500U);
    if (GetParam().sync == Sync::protect || GetParam().sync == Sync::trap) {
        EXPECT_GT(tables.counters().table_writes, 500U);
    }
    if (GetParam().pool_pages < 64) {
        EXPECT_GT(tables.counters().tables_recycled, 100U);
    }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Threads,
                         ::testing::Values(Kind{Sync::compare, 256, "Compare"},
                                           Kind{Sync::protect, 256, "Protect"},
                                           Kind{Sync::adaptive, 256, "Adaptive"},
                                           Kind{Sync::trap, 256, "Trap"},
                                           Kind{Sync::compare, 32, "CompareInATightPool"},
                                           Kind{Sync::adaptive, 32, "AdaptiveInATightPool"}),
                         [](const auto& tested) { return std::string(tested.param.name); });

} // namespace
} // namespace umbra::model
