#include "tests/model/machines.hpp"

#include <algorithm>

namespace umbra::model {
namespace {

using test::FakeMachine;

class ShadowMachine final : public Machine {
  public:
    explicit ShadowMachine(const Setup& setup)
        : machine_({.pool_pages = setup.pool_pages,
                    .stores_seen = setup.stores_seen,
                    .gigabyte_pages = setup.gigabyte_pages,
                    .first_slot = setup.first_slot,
                    .audits = false,
                    .sync = setup.sync,
                    .trap_cost = setup.trap_cost,
                    .prefetch = setup.prefetch}) {
        if (setup.sanitize == Sanitize::no)
            return;
        const TlbPolicy policy = setup.sanitize == Sanitize::keep ? TlbPolicy::keep : TlbPolicy::drop;
        machine_.mmu.sanitize(sanitizer_, policy, [this](const StaleUse& use) { stale_ = use; });
    }

    [[nodiscard]] const GuestMemory& memory() const override { return machine_.memory; }
    void store(std::uint64_t at, std::uint64_t value) override {
        if (++stores_ % 2 == 0)
            machine_.store(GuestPhys(at), value);
        else
            machine_.store_by_umbra(GuestPhys(at), value);
        if (!machine_.mmu.debt().none()) // it trapped
            machine_.enter();
    }

    void start(const Cpu& cpu) override {
        set_paging(cpu);
        machine_.mmu.flush({.all_contexts = true, .globals = true});
        machine_.enter();
    }
    void load_cr3(const Cpu& cpu, bool no_flush) override {
        set_paging(cpu);
        if (!no_flush)
            machine_.mmu.flush();
        machine_.enter();
    }
    void invlpg(std::uint64_t at) override { machine_.invlpg(GuestVirt(at)); }
    void invpcid(unsigned type, std::uint16_t pcid, std::uint64_t at) override {
        if (type == 0)
            machine_.mmu.invalidate(GuestVirt(at), pcid, false);
        else
            machine_.mmu.flush({.all_contexts = type >= 2, .pcid = pcid, .globals = type == 2});
        machine_.enter();
    }
    void set_control(const Cpu& before, const Cpu& cpu) override {
        set_paging(cpu);
        if (before.pge != cpu.pge || (before.pcide && !cpu.pcide))
            machine_.mmu.flush({.all_contexts = true, .globals = true});
        else if (cpu.smep && !before.smep)
            machine_.mmu.flush();
        machine_.enter();
    }
    void set_trap_user_fetch(bool trap) override {
        machine_.mmu.set_trap_user_fetch(trap);
        machine_.enter();
    }
    [[nodiscard]] std::optional<std::uint64_t> lookup(std::uint64_t at, Access access) override {
        if (access.user != machine_.user() || access.ac != alignment_check_) {
            alignment_check_ = access.ac;
            machine_.mmu.set_alignment_check(access.ac);
            machine_.set_user(access.user);
        }
        const auto address = machine_.lookup(GuestVirt(at), to_access(access));
        if (!address)
            return std::nullopt;
        if (machine_.mmu.table_write_begun()) { // the instruction is over
            (void)machine_.mmu.finish_table_write();
            machine_.enter();
        }
        return address->value();
    }
    [[nodiscard]] Missed miss(std::uint64_t at, Access access) override {
        stale_.reset();
        const MissResult result = machine_.mmu.fault(GuestVirt(at), to_access(access));
        if (result.outcome == Miss::table_write)
            machine_.mmu.begin_table_write();
        machine_.enter();
        return {.filled = result.outcome == Miss::filled || result.outcome == Miss::table_write,
                .no_slot = result.outcome == Miss::no_slot,
                .trapped_user_fetch = result.trapped_user_fetch,
                .address = result.fault.address.value(),
                .error_code = result.fault.error_code,
                .stale = stale_};
    }
    [[nodiscard]] std::optional<std::string> audit() const override { return machine_.mmu.audit(); }
    [[nodiscard]] const MmuCounters* counters() const override { return &machine_.mmu.counters(); }

  private:
    void set_paging(const Cpu& cpu) {
        machine_.paging = to_paging(cpu);
        machine_.mmu.set_paging(machine_.paging);
    }

    FakeMachine machine_;
    TlbSanitizer sanitizer_{machine_.memory};
    std::optional<StaleUse> stale_; ///< of the last miss
    unsigned stores_ = 0;
    bool alignment_check_ = false;
};

class WalkerMachine final : public Machine {
  public:
    [[nodiscard]] const GuestMemory& memory() const override { return machine_.memory; }
    void store(std::uint64_t at, std::uint64_t value) override {
        (void)machine_.memory.write(GuestPhys(at), value);
    }
    void start(const Cpu& cpu) override { paging_ = to_paging(cpu); }
    void load_cr3(const Cpu& cpu, bool /*no_flush*/) override { paging_ = to_paging(cpu); }
    void invlpg(std::uint64_t /*at*/) override {}
    void invpcid(unsigned /*type*/, std::uint16_t /*pcid*/, std::uint64_t /*at*/) override {}
    void set_control(const Cpu& /*before*/, const Cpu& cpu) override { paging_ = to_paging(cpu); }
    void set_trap_user_fetch(bool trap) override { trap_ = trap; }
    [[nodiscard]] std::optional<std::uint64_t> lookup(std::uint64_t /*at*/, Access /*access*/) override {
        return std::exchange(translated_, std::nullopt);
    }
    [[nodiscard]] Missed miss(std::uint64_t at, Access access) override {
        const GuestWalk walk = translate(machine_.memory, paging_, GuestVirt(at), to_access(access));
        if (walk.fault)
            return {.address = walk.fault->address.value(), .error_code = walk.fault->error_code};
        if (trap_ && access.kind == Kind::fetch && !access.user && walk.depth > 0 && walk.user)
            return {.trapped_user_fetch = true, .address = at};
        translated_ = bus(walk.address.value());
        return {.filled = true};
    }
    [[nodiscard]] std::optional<std::string> audit() const override { return std::nullopt; }
    [[nodiscard]] const MmuCounters* counters() const override { return nullptr; }

  private:
    FakeMachine machine_{{.pool_pages = 16}};
    GuestPaging paging_;
    bool trap_ = false;
    std::optional<std::uint64_t> translated_; ///< for the next lookup
};

} // namespace

std::uint64_t Machine::bus(std::uint64_t physical) {
    const std::uint64_t frame = std::min(physical / page_size, FakeMachine::nothing.number());
    return frame * page_size + physical % page_size;
}

std::vector<Range> Machine::ram() {
    return {{0, FakeMachine::hole},
            {FakeMachine::mb, FakeMachine::low_end - FakeMachine::mb},
            {FakeMachine::high, FakeMachine::high_end - FakeMachine::high}};
}

std::unique_ptr<Machine> make_shadow_machine(const Setup& setup) {
    return std::make_unique<ShadowMachine>(setup);
}

std::unique_ptr<Machine> make_walker_machine(const Setup& /*setup*/) {
    return std::make_unique<WalkerMachine>();
}

} // namespace umbra::model
