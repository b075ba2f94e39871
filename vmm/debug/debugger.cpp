#include "vmm/debug/debugger.hpp"

#include "vmm/disassembler.hpp"
#include "vmm/guest_space.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include <fmt/core.h>

namespace umbra {
namespace {

constexpr std::byte int3{0xcc};
constexpr std::size_t longest_instruction = 15;
constexpr Access looking{.ac = true}; ///< the debugger is not held back by SMAP

bool overlap(std::uint64_t first, std::uint64_t first_size, std::uint64_t second, std::uint64_t second_size) {
    return first - second < second_size || second - first < first_size;
}

bool concerns(WatchKind kind, bool read, bool write) {
    return (kind != WatchKind::write && read) || (kind != WatchKind::read && write);
}

Guard guard_for(WatchKind kind) {
    return {.read = kind != WatchKind::write, .write = kind != WatchKind::read, .fetch = false};
}

Stop accessed(WatchKind kind, GuestVirt at) {
    return {.kind = Stop::Kind::watchpoint, .watch = kind, .address = at};
}

/// `at`: nothing if a device did it.
Stop accessed(WatchKind kind, GuestPhys watched, std::optional<GuestVirt> at) {
    return {.kind = Stop::Kind::watchpoint,
            .watch = kind,
            .address = at.value_or(GuestVirt()),
            .physical = true,
            .text = at ? fmt::format("the watchpoint on {} was met, at {}", watched, *at)
                       : fmt::format("the watchpoint on {} was met by a device", watched)};
}

/// What an agent expression may see.
class Registers final : public AgentContext {
  public:
    explicit Registers(Debugger& debugger) : debugger_(debugger) {}

    std::optional<std::uint64_t> read_register(unsigned number) override {
        return debugger_.frontend().read_register(number);
    }
    bool read_memory(GuestVirt at, std::span<std::byte> into) override {
        return debugger_.read(at, into) == into.size();
    }
    void print(std::string_view text) override { debugger_.frontend().print(text); }

  private:
    Debugger& debugger_;
};

} // namespace

Debugger::Debugger(DebugTarget target, DebugFrontend& frontend) : target_(target), frontend_(frontend) {
    frontend_.attach(this);
}

Debugger::~Debugger() {
    frontend_.attach(nullptr);
}

std::vector<std::byte> Debugger::code() const {
    std::vector<std::byte> bytes(longest_instruction);
    bytes.resize(read(GuestVirt(target_.cpu.rip), bytes));
    return bytes;
}

// --- Memory

std::optional<GuestPhys> Debugger::translate(GuestVirt at, std::optional<GuestFrame> root) const {
    GuestPaging paging = target_.mmu.paging();
    if (root)
        paging.root = *root;
    if (!paging.format->canonical(at))
        return std::nullopt;
    const GuestWalk walk = walk_guest(target_.memory, paging, at, looking);
    if (walk.fault)
        return std::nullopt;
    return walk.address;
}

/// Calls `piece(physical, its RAM, offset)` for each page-bounded piece of [at, at + size), until one is
/// missing. Returns how far it came.
template<class Address, class Piece>
std::size_t Debugger::for_each_piece(Address at, std::size_t size, Piece piece) const {
    for (std::size_t done = 0; done < size;) {
        const Address here = at + done;
        const std::size_t length = std::min<std::size_t>(size - done, page_size - here.page_offset());
        const std::optional<GuestPhys> physical = translate(here);
        const auto ram = physical ? target_.memory.range(*physical, length) : std::span<std::byte>();
        if (ram.empty())
            return done;
        piece(*physical, ram, done);
        done += length;
    }
    return size;
}

/// Copies what the guest has put there.
void Debugger::copy_out(std::span<const std::byte> ram, GuestPhys at, std::span<std::byte> into) const {
    std::ranges::copy(ram, into.begin());
    for (auto patch = patches_.lower_bound(at); patch != patches_.end() && patch->first - at < into.size();
         ++patch) {
        if (!patch->second.lifted)
            into[patch->first - at] = patch->second.original;
    }
}

void Debugger::copy_in(std::span<std::byte> ram, GuestPhys at, std::span<const std::byte> from) {
    std::ranges::copy(from, ram.begin());
    for (auto patch = patches_.lower_bound(at); patch != patches_.end() && patch->first - at < from.size();
         ++patch) {
        patch->second.original = from[patch->first - at];
        if (!patch->second.lifted)
            ram[patch->first - at] = int3;
    }
    (void)target_.tables.wrote(at, from.size());
}

template<class Address>
std::size_t Debugger::read(Address at, std::span<std::byte> into) const {
    return for_each_piece(at, into.size(), [&](GuestPhys physical, auto ram, std::size_t offset) {
        copy_out(ram, physical, into.subspan(offset, ram.size()));
    });
}
template std::size_t Debugger::read(GuestVirt at, std::span<std::byte> into) const;
template std::size_t Debugger::read(GuestPhys at, std::span<std::byte> into) const;

template<class Address>
std::size_t Debugger::write(Address at, std::span<const std::byte> from) {
    return for_each_piece(at, from.size(), [&](GuestPhys physical, auto ram, std::size_t offset) {
        copy_in(ram, physical, from.subspan(offset, ram.size()));
    });
}
template std::size_t Debugger::write(GuestVirt at, std::span<const std::byte> from);
template std::size_t Debugger::write(GuestPhys at, std::span<const std::byte> from);

// --- What the front end asks for

void Debugger::insert(Breakpoint breakpoint) {
    remove(breakpoint.kind, breakpoint.at);
    breakpoints_.push_back(std::move(breakpoint));
}

void Debugger::remove(BreakpointKind kind, GuestVirt at) {
    std::erase_if(breakpoints_,
                  [&](const Breakpoint& known) { return known.kind == kind && known.at == at; });
}

bool Debugger::watch(WatchKind kind, GuestVirt at, std::uint64_t size) {
    if (size == 0 || size > watch_limit || watched_bytes() + size > watch_limit)
        return false;
    watches_.push_back({kind, at, std::nullopt, size});
    return true;
}

bool Debugger::watch(WatchKind kind, GuestPhys at, std::uint64_t size) {
    if (size == 0 || size > watch_limit || watched_bytes() + size > watch_limit)
        return false;
    watches_.push_back({kind, {}, at, size});
    return true;
}

void Debugger::unwatch(WatchKind kind, GuestVirt at, std::uint64_t size) {
    std::erase(watches_, Watch{kind, at, std::nullopt, size});
}

void Debugger::unwatch(WatchKind kind, GuestPhys at, std::uint64_t size) {
    std::erase(watches_, Watch{kind, {}, at, size});
}

std::uint64_t Debugger::watched_bytes() const {
    std::uint64_t sum = 0;
    for (const Watch& watch : watches_)
        sum += watch.size;
    return sum;
}

std::vector<Debugger::PhysicalWatch> Debugger::physical_watches() const {
    std::vector<PhysicalWatch> found;
    for (const Watch& watch : watches_) {
        if (watch.physical)
            found.push_back({watch.kind, *watch.physical, watch.size});
    }
    return found;
}

void Debugger::bind(GuestVirt at, std::optional<GuestFrame> root) {
    if (root)
        bound_[at] = *root;
    else
        bound_.erase(at);
}

std::optional<GuestFrame> Debugger::bound_to(GuestVirt at) const {
    const auto found = bound_.find(at);
    return found == bound_.end() ? std::nullopt : std::optional(found->second);
}

/// Whether what is set at this address counts in the current address space.
bool Debugger::counts_here(GuestVirt at) const {
    const auto root = bound_to(at);
    return !root || *root == target_.mmu.paging().root;
}

void Debugger::resume(const Resume& how) {
    resume_ = how;
    return_to_.reset();
    told_.reset();
    resumed_at_ = GuestVirt(target_.cpu.rip);
}

void Debugger::clear() {
    breakpoints_.clear();
    watches_.clear();
    bound_.clear();
    catches_ = {};
    hidden_ = false;
    step_interrupts_ = false;
    resume_ = {};
    return_to_.reset();
    told_.reset();
    accesses_.clear();
    stop_.reset();
}

void Debugger::want_stop(Stop stop) {
    if (!stop_)
        stop_ = std::move(stop);
}

Stop Debugger::take_stop() {
    abandon_instruction();
    return std::exchange(stop_, std::nullopt).value_or(Stop());
}

// --- Taking effect

void Debugger::apply() {
    (void)set_patches();
    set_guards();
}

/// Makes int3 stand where it should, and nowhere else. True if there is a new one. It is the frame that has
/// it, so each address space may add one for a breakpoint, which stays while that space's tables lead there.
bool Debugger::set_patches() {
    std::map<GuestPhys, Patch> wanted;
    const auto want = [&](GuestVirt at, GuestFrame root) {
        if (const auto place = translate(at, root); place && target_.memory.contains(*place, 1))
            wanted.try_emplace(*place, Patch{.at = at, .root = root});
    };
    const GuestFrame here = target_.mmu.paging().root;
    for (const Breakpoint& breakpoint : breakpoints_) {
        if (breakpoint.kind != BreakpointKind::software || hidden_)
            continue;
        const auto root = bound_to(breakpoint.at);
        want(breakpoint.at, root.value_or(here));
        for (const auto& [place, patch] : patches_) {
            if (patch.at == breakpoint.at && !root && translate(patch.at, patch.root) == place)
                wanted.try_emplace(place, patch);
        }
    }
    if (return_to_)
        want(return_to_->rip, here);
    for (auto patch = patches_.begin(); patch != patches_.end();) {
        if (wanted.contains(patch->first)) {
            ++patch;
            continue;
        }
        lift(patch->first);
        patch = patches_.erase(patch);
    }
    bool added = false;
    for (auto& [place, patch] : wanted) {
        if (patches_.contains(place))
            continue;
        std::byte& byte = target_.memory.range(place, 1).front();
        patch.original = byte;
        patches_.emplace(place, patch);
        byte = int3;
        added = true;
    }
    return added;
}

void Debugger::set_guards() {
    Guards guards;
    auto& frames = guards.frames;
    auto& executable = guards.executable;
    const auto guard_page = [&guards](GuestVirt page, const Guard& guard) {
        guards.pages[page] = guards.pages[page] | guard;
    };
    // What the guest writes around an int3 must not be lost when it goes.
    for (const auto& [place, patch] : patches_)
        frames[place.frame()] = frames[place.frame()] | Guard{.write = true};
    // Where a breakpoint's page is of another frame, or of none yet, it is noticed when the guest gets there.
    for (const Breakpoint& breakpoint : breakpoints_) {
        guard_page(breakpoint.at.page_base(), {.fetch = true});
        if (breakpoint.kind == BreakpointKind::hardware || hidden_)
            continue;
        for (const auto& [place, patch] : patches_) {
            if (patch.at == breakpoint.at)
                executable.emplace(breakpoint.at.page_base(), place.frame());
        }
    }
    for (const Breakpoint& breakpoint : breakpoints_) {
        if (breakpoint.kind == BreakpointKind::hardware)
            std::erase_if(executable,
                          [&](const auto& place) { return place.first == breakpoint.at.page_base(); });
    }
    for (const Watch& watch : watches_) {
        for (std::uint64_t done = 0; done < watch.size;) {
            if (watch.physical) {
                const GuestPhys here = *watch.physical + done;
                frames[here.frame()] = frames[here.frame()] | guard_for(watch.kind);
                done += page_size - here.page_offset();
            } else {
                const GuestVirt here = watch.at + done;
                guard_page(here.page_base(), guard_for(watch.kind));
                done += page_size - here.page_offset();
            }
        }
    }
    target_.mmu.set_guards(std::move(guards));
}

/// Takes an int3 away for one instruction.
void Debugger::lift(GuestPhys at) {
    Patch& patch = patches_.at(at);
    if (std::exchange(patch.lifted, true))
        return;
    target_.memory.range(at, 1).front() = patch.original;
}

void Debugger::lift_page(GuestFrame frame) {
    for (auto patch = patches_.lower_bound(frame.base());
         patch != patches_.end() && patch->first.frame() == frame; ++patch)
        lift(patch->first);
}

/// Everything that was out of the instruction's way is in place again.
void Debugger::put_back() {
    stepping_over_ = false;
    target_.mmu.finish_guarded_access();
    for (auto& [at, patch] : patches_) {
        if (!std::exchange(patch.lifted, false))
            continue;
        std::byte& byte = target_.memory.range(at, 1).front();
        patch.original = byte; // the guest may have written there
        byte = int3;
    }
}

// --- While the guest runs

bool Debugger::prepare_entry() {
    const GuestVirt rip(target_.cpu.rip);
    if (resumed_at_ == rip) { // told already
        if (const auto place = translate(rip); place && patches_.contains(*place)) {
            lift(*place);
            stepping_over_ = true;
        }
    }
    return (resume_.kind == Resume::Kind::step && !return_to_) || stepping_over_;
}

/// The breakpoints at RIP: whether one of them stops the guest.
bool Debugger::hit(GuestVirt rip) {
    Registers registers(*this);
    for (const Breakpoint& breakpoint : breakpoints_) {
        if (breakpoint.at != rip || !counts_here(rip))
            continue;
        // An expression that cannot be evaluated is the user's to look at, so it counts as true.
        const auto holds = [&](const AgentExpression& condition) {
            const AgentResult result = evaluate(condition, registers);
            return !std::holds_alternative<std::int64_t>(result) || std::get<std::int64_t>(result) != 0;
        };
        if (!breakpoint.conditions.empty() && std::ranges::none_of(breakpoint.conditions, holds))
            continue;
        for (const AgentExpression& command : breakpoint.commands)
            (void)evaluate(command, registers);
        if (!breakpoint.commands.empty())
            continue;
        stop_ = Stop{.kind = Stop::Kind::breakpoint, .breakpoint = breakpoint.kind};
        return true;
    }
    return false;
}

bool Debugger::breakpoint_trap(std::uint8_t vector) {
    VirtualCpu& cpu = target_.cpu;
    // #BP comes after the instruction, the others come at it.
    const GuestVirt rip(vector == static_cast<std::uint8_t>(Vector::breakpoint) ? cpu.rip - 1 : cpu.rip);
    const auto place = translate(rip);
    if (!place)
        return false;
    const auto patch = patches_.find(*place);
    if (patch == patches_.end() || patch->second.lifted)
        return false; // the guest's own
    cpu.rip = rip.value();
    if (return_to_ && return_to_->rip == rip && return_to_->rsp == cpu[Gpr::rsp]) {
        const bool done = return_to_->done;
        return_to_.reset();
        apply();
        if (done) {
            stop_ = Stop{.kind = Stop::Kind::step};
            return true;
        }
        resumed_at_ = rip;
        return true;
    }
    if (!hit(rip))
        resumed_at_ = rip;
    return true;
}

/// An access by the instruction under way.
void Debugger::check_access(GuestVirt at, std::uint64_t size, bool read, bool write) {
    const auto add = [&](Stop stop, std::uint64_t count) {
        Candidate candidate{std::move(stop), {}};
        if (write) {
            candidate.before.resize(count);
            candidate.before.resize(this->read(candidate.stop.address, candidate.before));
        }
        accesses_.push_back(std::move(candidate));
    };
    for (const Watch& watch : watches_) {
        if (!concerns(watch.kind, read, write))
            continue;
        if (!watch.physical) {
            if (!overlap(at.value(), size, watch.at.value(), watch.size) || !counts_here(watch.at))
                continue;
            const GuestVirt first = at - watch.at < watch.size ? at : watch.at;
            add(accessed(watch.kind, first), std::min(size - (first - at), watch.size - (first - watch.at)));
            continue;
        }
        for_each_piece(at, size, [&](GuestPhys physical, auto ram, std::size_t offset) {
            if (overlap(physical.value(), ram.size(), watch.physical->value(), watch.size))
                add(accessed(watch.kind, *watch.physical, at + offset), ram.size());
        });
    }
}

/// What the instruction at RIP, one of whose accesses met a guard, does to what is watched.
void Debugger::check_operands(GuestVirt at, const Access& access) {
    if (watches_.empty())
        return;
    accesses_.clear(); // from another of its accesses, which met a guard before
    if (const auto operands = memory_accesses(target_.cpu, code())) {
        for (const MemoryAccess& part : *operands)
            check_access(part.at, part.size, part.read, part.write);
    } else if (!access.fetch) {
        check_access(at, 1, !access.write, access.write);
    }
}

/// The access to tell. A client that looks for changes drops a write that made none, so that one that did
/// comes first.
std::optional<Stop> Debugger::take_access() {
    const auto accesses = std::exchange(accesses_, {});
    if (accesses.empty())
        return std::nullopt;
    const auto worth_telling = [this](const Candidate& candidate) {
        if (candidate.stop.watch != WatchKind::write)
            return true;
        std::vector<std::byte> after(candidate.before.size());
        return read(candidate.stop.address, after) != after.size() || after != candidate.before;
    };
    const auto first = std::ranges::find_if(accesses, worth_telling);
    return (first == accesses.end() ? accesses.front() : *first).stop;
}

bool Debugger::guarded(GuestVirt at, Access access) {
    const GuestVirt rip(target_.cpu.rip);
    if (access.fetch) {
        if (resumed_at_ != rip && hit(rip))
            return false;
        // What was not mapped there before gets a real int3 now.
        if (set_patches()) {
            set_guards();
            return false;
        }
    }
    check_operands(at, access);
    if (const auto place = translate(at); place && access.write) {
        // A frame that the guest gives another use loses what its old one had.
        const std::size_t before = patches_.size();
        if (set_patches() || patches_.size() != before) {
            set_guards();
            return false;
        }
        lift_page(place->frame());
    }
    return true;
}

void Debugger::stored(GuestPhys at, std::optional<GuestVirt> linear, std::size_t size) {
    for (auto patch = patches_.lower_bound(at); patch != patches_.end() && patch->first - at < size;
         ++patch) {
        if (patch->second.lifted)
            continue;
        std::byte& byte = target_.memory.range(patch->first, 1).front();
        patch->second.original = byte;
        byte = int3;
    }
    for (const Watch& watch : watches_) {
        if (watch.kind == WatchKind::read)
            continue;
        if (watch.physical) {
            if (overlap(at.value(), size, watch.physical->value(), watch.size))
                stored_ = accessed(watch.kind, *watch.physical, linear);
        } else if (linear && overlap(linear->value(), size, watch.at.value(), watch.size) &&
                   counts_here(watch.at)) {
            stored_ = accessed(watch.kind, *linear - watch.at < watch.size ? *linear : watch.at);
        }
    }
}

void Debugger::instruction_ended(bool retired) {
    put_back();
    resumed_at_.reset();
    if (told_ && told_->rsp == target_.cpu[Gpr::rsp]) { // its frame is popped
        if (told_->rip.value() == target_.cpu.rip)
            resumed_at_ = told_->rip;
        told_.reset();
    }
    auto access = take_access();
    auto stored = std::exchange(stored_, std::nullopt);
    if (stored || (access && retired)) {
        stop_ = stored ? std::move(stored) : std::move(access);
        return;
    }
    if (stop_ || resume_.kind != Resume::Kind::step || return_to_)
        return;
    const GuestVirt rip(target_.cpu.rip);
    if (retired && rip >= resume_.range_start && rip < resume_.range_end && !hit(rip))
        return;
    if (!stop_)
        stop_ = Stop{.kind = Stop::Kind::step};
}

void Debugger::abandon_instruction() {
    put_back();
    accesses_.clear();
}

void Debugger::halted() {
    put_back();
    resumed_at_.reset();
}

void Debugger::delivered(const Event& event, const ReturnTo& interrupted) {
    const bool told = resumed_at_ == interrupted.rip;
    if (is_interrupt(event.kind))
        entered_interrupt(interrupted);
    else
        instruction_ended(false);
    if (told && !(return_to_ && return_to_->rip == interrupted.rip))
        told_ = interrupted;
}

void Debugger::entered_interrupt(const ReturnTo& interrupted) {
    abandon_instruction();
    if (auto stored = std::exchange(stored_, std::nullopt)) { // its frame
        stop_ = std::move(stored);
        return;
    }
    if (resume_.kind != Resume::Kind::step || return_to_ || stop_)
        return;
    if (step_interrupts_) {
        stop_ = Stop{.kind = Stop::Kind::step};
        return;
    }
    return_to_ = interrupted;
    apply();
}

bool Debugger::catches_event(const Event& event) {
    if (!catches_.vectors.contains(event.vector))
        return false;
    abandon_instruction();
    std::string text = fmt::format("vector {}", event.vector);
    if (event.error_code)
        text += fmt::format(", error code {:#x}", *event.error_code);
    if (event.vector == static_cast<std::uint8_t>(Vector::page_fault))
        text += fmt::format(", at {}", event.address);
    stop_ = Stop{.kind = Stop::Kind::event, .vector = event.vector, .text = std::move(text)};
    return true;
}

bool Debugger::catches_instruction() {
    const VirtualCpu& cpu = target_.cpu;
    const GuestVirt rip(cpu.rip);
    if (!catches_.instructions() || resumed_at_ == rip)
        return false;
    const std::string text = disassemble(code(), rip, cpu.cs.long_mode);
    const bool msr = text == "wrmsr" || text == "rdmsr";
    const auto index = static_cast<std::uint32_t>(cpu[Gpr::rcx]);
    if (!(catches_.cr3 && text.starts_with("mov cr3,")) &&
        !(msr && (catches_.any_msr || catches_.msrs.contains(index))))
        return false;
    abandon_instruction();
    stop_ = Stop{.kind = Stop::Kind::event, .text = msr ? fmt::format("{} of MSR {:#x}", text, index) : text};
    return true;
}

} // namespace umbra
