#include "vmm/switcher.hpp"

#include "vmm/error.hpp"
#include "vmm/kvm/kvm.hpp"
#include "vmm/msr.hpp"
#include "vmm/segmentation.hpp"
#include "vmm/switcher_layout.h"

#include <cstring>

extern "C" {
extern const std::byte umbra_switcher_begin[], umbra_switcher_end[];
extern const std::byte umbra_switcher_syscall[], umbra_switcher_done[], umbra_switcher_return[];
extern const std::byte umbra_switcher_republish[], umbra_switcher_switch[];
extern const std::byte umbra_switcher_in8[], umbra_switcher_in16[], umbra_switcher_in32[];
extern const std::byte umbra_switcher_out8[], umbra_switcher_out16[], umbra_switcher_out32[];
}

namespace umbra {
namespace {

// The area's pages. Pages that are not named are guards: nothing is mapped there.
constexpr std::size_t image_page = 0; // and the next one
constexpr std::size_t image_pages = 2;
constexpr std::size_t pdpt_page = 2;      // of the reserved slot
constexpr std::size_t directory_page = 3; // of the area
constexpr std::size_t table_page = 4;     // of the area
constexpr std::size_t pool_page = 5;      // directory of the pool's 2 MB pages
constexpr std::size_t first_block = 16;   // vCPU blocks from here on
constexpr std::size_t area_pages = MonitorMemory::switcher_bytes / page_size;

// The pages of a vCPU's block. Of those of the GDT the last one is there, with the switcher's descriptors at
// its start, which are the last that the GDT has; of those of the LDT none.
constexpr std::size_t idt_page = 0, tss_page = 1, gdt_page = 2, gdt_end_page = gdt_page + 16,
                      ldt_page = gdt_end_page + 1, nmi_stack_page = ldt_page + 17,
                      fault_stack_page = nmi_stack_page + 2, stack_page = fault_stack_page + 2;
constexpr std::size_t descriptor_table_bytes = 16 * page_size; ///< as many as a selector can name

/// Where the pool is mapped, from the start of the reserved slot: its own entry of the slot's PDPT.
constexpr std::size_t pool_offset = std::size_t{1} << 30;

// The switcher's own segments.
constexpr std::uint16_t ring0_cs = 0xffe0, ring0_ss = 0xffe8, // `syscall` wants SS right behind CS
    task = 0xfff0;
constexpr std::size_t own_descriptor_bytes = 0x10000 - ring0_cs;

// What 32-bit code runs with where the machine's GDT is not the one in force, but KVM's, which interprets
// such code, looks at it: the first page of the GDT is there then, with what the guest runs with.
constexpr std::uint16_t interpreted_ss = 0xfd0 | 3, interpreted_cs = 0xfd8 | 3;

Segment flat(std::uint16_t selector, bool code, std::uint8_t dpl) {
    Segment segment;
    segment.selector = selector;
    segment.limit = 0xffff'ffff;
    segment.type = code ? 0xb : 0x3; // accessed; execute/read or read/write
    segment.dpl = dpl;
    segment.present = true;
    segment.long_mode = code;
    segment.default_32 = !code;
    segment.granularity = true;
    return segment;
}

/// A segment descriptor (Intel SDM vol. 3A, 3.4.5).
std::uint64_t descriptor(const Segment& segment) {
    const std::uint64_t limit = segment.granularity ? segment.limit >> page_shift : segment.limit;
    return (limit & 0xffff) | (segment.base & 0xff'ffff) << 16 |
           (std::uint64_t{segment.type} | std::uint64_t{!segment.system} << 4 |
            std::uint64_t{segment.dpl} << 5 | std::uint64_t{segment.present} << 7)
               << 40 |
           (limit >> 16 & 0xf) << 48 | std::uint64_t{segment.long_mode} << 53 |
           std::uint64_t{segment.default_32} << 54 | std::uint64_t{segment.granularity} << 55 |
           (segment.base >> 24 & 0xff) << 56;
}

/// The guest's segment as one of the machine's CPL 3. A byte-granular limit that only pages can express is
/// one of pages.
Segment for_machine(Segment segment, std::uint16_t selector) {
    constexpr std::uint32_t most_bytes = 0xf'ffff;
    segment.selector = selector;
    segment.dpl = 3;
    segment.type |= 1; // accessed: the CPU need not write to the GDT
    segment.granularity = segment.limit > most_bytes;
    return segment;
}

std::size_t image_offset(const std::byte* label) {
    return static_cast<std::size_t>(label - umbra_switcher_begin);
}

template<class T>
T* at(std::span<std::byte> bytes, std::size_t offset) {
    return reinterpret_cast<T*>(bytes.subspan(offset, sizeof(T)).data());
}

const std::byte* port_routine(const NativePortAccess& access) {
    if (access.write)
        return access.size == 1   ? umbra_switcher_out8
               : access.size == 2 ? umbra_switcher_out16
                                  : umbra_switcher_out32;
    return access.size == 1   ? umbra_switcher_in8
           : access.size == 2 ? umbra_switcher_in16
                              : umbra_switcher_in32;
}

/// What the machine's CR0.AM should be. A CPU checks alignment at CPL 3 only, where the machine runs the
/// guest's kernel as well; to that one EFLAGS.AC means something else (CR4.SMAP), so it must stay in the
/// flags. While the kernel has AC clear, CR0.AM does no harm and saves its change at every change of
/// privilege.
bool wants_alignment_checks(const VirtualCpu& cpu) {
    const bool kernel_has_flag = cpu.cpl != 3 && (cpu.rflags & rflags::alignment_check) != 0;
    return (cpu.cr0 & cr0::am) != 0 && !kernel_has_flag;
}

/// `Cpu`: VirtualCpu, const or not.
template<class Cpu>
auto data_segments(Cpu& cpu) {
    return std::array{std::pair{SegmentName::ds, &cpu.ds}, std::pair{SegmentName::es, &cpu.es},
                      std::pair{SegmentName::fs, &cpu.fs}, std::pair{SegmentName::gs, &cpu.gs}};
}

} // namespace

// --- SwitcherRegion

SwitcherRegion::SwitcherRegion(MonitorMemory& memory, unsigned vcpus)
    : memory_(memory), block_pages_((area_pages - first_block) / vcpus) {
    const auto area = memory.switcher();
    const std::size_t image_size = image_offset(umbra_switcher_end);
    std::memcpy(area.data() + image_page * page_size, umbra_switcher_begin, image_size);

    const auto frame = [&](std::size_t page) { return (memory.base() + page * page_size).frame(); };
    const auto set = [&](std::size_t table, std::size_t slot, ShadowEntry entry) {
        *at<ShadowEntry>(area, table * page_size + slot * sizeof(ShadowEntry)) = entry;
    };
    // Supervisor-only throughout. Accessed and dirty are set beforehand, as in the shadow tables.
    constexpr std::uint64_t reads = entry_bit::present | entry_bit::accessed | entry_bit::dirty;
    constexpr std::uint64_t writes = reads | entry_bit::writable;
    set(pdpt_page, 0, ShadowEntry(frame(directory_page), writes));
    set(directory_page, 0, ShadowEntry(frame(table_page), writes));
    for (std::size_t page = image_page; page < image_page + image_pages; ++page)
        set(table_page, page, ShadowEntry(frame(page), reads));
    for (unsigned vcpu = 0; vcpu < vcpus; ++vcpu) {
        const std::size_t block = first_block + vcpu * block_pages_;
        for (const std::size_t page : {gdt_end_page, idt_page, tss_page})
            set(table_page, block + page, ShadowEntry(frame(block + page), reads | entry_bit::no_execute));
        for (const std::size_t page : {nmi_stack_page, fault_stack_page})
            set(table_page, block + page, ShadowEntry(frame(block + page), writes | entry_bit::no_execute));
        for (std::size_t page = stack_page; page + 1 < block_pages_; ++page) // the last one is a guard
            set(table_page, block + page, ShadowEntry(frame(block + page), writes | entry_bit::no_execute));
    }
    // The shadow tables, for the routine that makes KVM look at them again.
    const std::uint64_t large = paging_4_level.level(2).span();
    set(pdpt_page, pool_offset / paging_4_level.level(3).span(), ShadowEntry(frame(pool_page), writes));
    for (std::size_t i = 0; i * large < memory.pool().size(); ++i)
        set(pool_page, i,
            ShadowEntry((memory.pool_base() + i * large).frame(),
                        writes | entry_bit::page_size | entry_bit::no_execute));
}

ShadowEntry SwitcherRegion::root_entry() const {
    return {(memory_.base() + pdpt_page * page_size).frame(),
            entry_bit::present | entry_bit::writable | entry_bit::accessed | entry_bit::dirty};
}

std::size_t SwitcherRegion::max_debt(unsigned vcpus) {
    const std::size_t stack = (area_pages - first_block) / vcpus - stack_page - 1;
    return (stack - 1) * page_size / (2 * sizeof(std::uint64_t)); // the top page is the frame's
}

// --- Switcher

Switcher::Switcher(SwitcherRegion& region, Vcpu& machine, const HostTraits& traits, unsigned id)
    : memory_(region.memory_), machine_(machine), traits_(traits),
      block_((first_block + id * region.block_pages_) * page_size),
      stack_top_(block_ + (region.block_pages_ - 1) * page_size) {
    for (const Segment& segment : {flat(ring0_cs, true, 0), flat(ring0_ss, false, 0)})
        set_descriptor(segment);
    if (!traits_.own_gdt) {
        const std::size_t page = block_ / page_size + gdt_page;
        *at<ShadowEntry>(memory_.switcher(), table_page * page_size + page * sizeof(ShadowEntry)) =
            ShadowEntry((memory_.base() + page * page_size).frame(),
                        entry_bit::present | entry_bit::accessed | entry_bit::dirty | entry_bit::no_execute);
    }
    // As after a trap: what the machine's reset leaves, real-mode selectors, could be taken for ring 0.
    machine_.set_segment(SegmentName::cs, flat(ring0_cs, true, 0));
    machine_.set_segment(SegmentName::ss, flat(ring0_ss, false, 0));
}

/// The GDT ends a little behind the start of its last page, and so begins a little behind that of its first.
GuestVirt Switcher::gdt_base() const {
    return GuestVirt(address(block_ + gdt_page * page_size + own_descriptor_bytes));
}

GuestVirt Switcher::ldt_base() const {
    return GuestVirt(address(block_ + ldt_page * page_size));
}

/// What names the descriptor at an address, but for its RPL.
std::optional<std::uint16_t> Switcher::selector_of(GuestVirt descriptor) const {
    const auto within = [descriptor](GuestVirt table) -> std::optional<std::uint16_t> {
        const std::uint64_t offset = descriptor.value() - table.value();
        return offset < descriptor_table_bytes
                   ? std::optional(static_cast<std::uint16_t>(offset & ~std::uint64_t{7}))
                   : std::nullopt;
    };
    if (const auto local = within(ldt_base()))
        return static_cast<std::uint16_t>(*local | selector::local);
    return within(gdt_base());
}

void Switcher::set_descriptor(const Segment& segment) {
    const std::size_t offset = segment.selector & ~std::size_t{7};
    *at<std::uint64_t>(memory_.switcher(), block_ + gdt_page * page_size + own_descriptor_bytes + offset) =
        descriptor(segment);
}

bool Switcher::in_ring0() const {
    // Of the guest's own selectors the RPL tells nothing; of those of the host's GDT it is the level.
    return traits_.own_gdt ? machine_.segment(SegmentName::ss).dpl == 0
                           : selector::rpl(machine_.selector(SegmentName::cs)) == 0;
}

std::uint64_t Switcher::address(std::size_t offset) const {
    return (base_ + offset).value();
}

void Switcher::place(unsigned slot) {
    base_ =
        MachineVirt(paging_4_level.sign_extend(std::uint64_t{slot} << paging_4_level.root().shift).value());
    const auto area = memory_.switcher();

    // IDT: 256 interrupt gates of DPL 0 (Intel SDM vol. 3A, 6.14.1), so that `int n` of the guest is #GP.
    const auto interrupt_stack = [](std::size_t vector) -> std::uint64_t {
        if (vector == static_cast<std::size_t>(Vector::nmi))
            return 1;
        return vector == static_cast<std::size_t>(Vector::double_fault) ||
                       vector == static_cast<std::size_t>(Vector::machine_check)
                   ? 2
                   : 0;
    };
    for (std::size_t vector = 0; vector < 256; ++vector) {
        const std::uint64_t stub = address(image_page * page_size + vector * STUB_SIZE);
        auto* gate = at<std::array<std::uint64_t, 2>>(area, block_ + idt_page * page_size + vector * 16);
        (*gate)[0] = (stub & 0xffff) | std::uint64_t{ring0_cs} << 16 | interrupt_stack(vector) << 32 |
                     std::uint64_t{0x8e} << 40 | (stub >> 16 & 0xffff) << 48;
        (*gate)[1] = stub >> 32;
    }
    // TSS (Intel SDM vol. 3A, 7.7): RSP0 at byte 4; the I/O bitmap lies beyond the limit, so every port is
    // denied.
    constexpr std::uint32_t tss_limit = 0x67;
    const std::uint64_t tss = address(block_ + tss_page * page_size);
    const std::uint64_t top = address(stack_top_);
    std::memcpy(area.data() + block_ + tss_page * page_size + 4, &top, sizeof(top));
    // IST1 and IST2 at byte 36: what may come in ring 0, where `syscall` leaves the guest's stack.
    const std::array<std::uint64_t, 2> interrupt_stacks{address(block_ + (nmi_stack_page + 1) * page_size),
                                                        address(block_ + (fault_stack_page + 1) * page_size)};
    std::memcpy(area.data() + block_ + tss_page * page_size + 36, interrupt_stacks.data(),
                sizeof(interrupt_stacks));
    const std::uint16_t bitmap = tss_limit + 1;
    std::memcpy(area.data() + block_ + tss_page * page_size + 102, &bitmap, sizeof(bitmap));
    auto* tss_descriptor =
        at<std::array<std::uint64_t, 2>>(area, block_ + gdt_page * page_size + own_descriptor_bytes + task);
    (*tss_descriptor)[0] =
        tss_limit | (tss & 0xff'ffff) << 16 | std::uint64_t{0x8b} << 40 | (tss >> 24 & 0xff) << 56;
    (*tss_descriptor)[1] = tss >> 32;

    machine_.set_descriptor_tables(
        {.base = gdt_base(), .limit = descriptor_table_bytes - 1},
        {.base = GuestVirt(address(block_ + idt_page * page_size)), .limit = page_size - 1});
    Segment tr;
    tr.selector = task;
    tr.base = tss;
    tr.limit = tss_limit;
    tr.type = 0xb; // busy 64-bit TSS
    tr.present = true;
    tr.system = true;
    machine_.set_segment(SegmentName::tr, tr);
    // KVM's reset leaves an LDT of 64 KB at address 0. What lies there is the guest's: it would be a table of
    // its own making that the machine obeys, with call gates into ring 0.
    Segment ldt;
    ldt.selector = task; // any that is not null
    ldt.base = ldt_base().value();
    ldt.limit = descriptor_table_bytes - 1;
    ldt.type = descriptor_type::ldt;
    ldt.present = true;
    ldt.system = true;
    machine_.set_segment(SegmentName::ldt, ldt);

    syscall_entry_ = address(image_page * page_size + image_offset(umbra_switcher_syscall));
    const bool set = machine_.write_msr(msr::star, std::uint64_t{ring0_cs} << 32) &&
                     machine_.write_msr(msr::lstar, syscall_entry_) &&
                     machine_.write_msr(msr::cstar, syscall_entry_) && machine_.write_msr(msr::fmask, ~0U);
    if (!set)
        throw StartupError(ExitCode::host_cannot, "KVM refuses the system-call MSRs");
}

void Switcher::set_control(const VirtualCpu& cpu, std::uint64_t allowed_cr4) {
    constexpr std::uint64_t from_cr0 = cr0::mp | cr0::em | cr0::ts;
    constexpr std::uint64_t from_cr4 =
        cr4::osfxsr | cr4::osxmmexcpt | cr4::osxsave | cr4::fsgsbase | cr4::tsd | cr4::de;
    control_cr0_ = cr0::pe | cr0::pg | cr0::wp | cr0::ne | cr0::et | (cpu.cr0 & from_cr0);
    control_cr4_ = cr4::pae | (((cpu.cr4 & from_cr4) | cr4::umip) & allowed_cr4);
    // A guest without SYSCALL shall get its #UD with all registers as they were.
    const bool has_syscall = (cpu.efer & efer::lma) != 0 && (cpu.efer & efer::sce) != 0;
    control_efer_ = efer::lme | efer::lma | efer::nxe | (has_syscall ? efer::sce : 0);
    set_alignment_checks(cpu);
}

void Switcher::set_alignment_checks(const VirtualCpu& cpu) {
    alignment_checks_ = wants_alignment_checks(cpu);
    machine_.set_control(control_cr0_ | (alignment_checks_ ? cr0::am : 0), control_cr4_, control_efer_);
}

// What remains: the kernel has set AC by a POPF, which is no trap, or this host checks alignment with CR0.AM
// clear too. Against the latter it only helps to clear AC, which the guest then cannot see by PUSHF.
bool Switcher::absorb_alignment_check(const VirtualCpu& cpu) {
    if (cpu.cpl == 3 && (cpu.cr0 & cr0::am) != 0)
        return false;
    hide_alignment_flag_ = !alignment_checks_;
    return true;
}

std::uint64_t Switcher::machine_flags(const VirtualCpu& cpu) const {
    std::uint64_t flags = cpu.rflags & ~(rflags::iopl | rflags::virtual_8086);
    // The guest's kernel runs at CPL 3: IOPL 3 lets it use its flag and port instructions.
    if (!iopl_withheld_)
        flags |= cpu.cpl == 3 ? cpu.rflags & rflags::iopl : rflags::iopl;
    if (alignment_flag_hidden_)
        flags &= ~rflags::alignment_check;
    return flags | rflags::fixed;
}

/// An NMI that came in ring 0 is noted, and the machine put back to where it was.
bool Switcher::set_nmi_aside() {
    constexpr auto vector = static_cast<std::uint64_t>(Vector::nmi);
    const std::uint64_t stub = address(image_page * page_size + vector * STUB_SIZE);
    const Frame& frame =
        *at<Frame>(memory_.switcher(), block_ + (nmi_stack_page + 1) * page_size - sizeof(Frame));
    const std::uint64_t image = address(image_page * page_size);
    const bool in_switcher = frame.cs == ring0_cs && frame.rip - image < image_pages * page_size;
    if (machine_.rip() - stub >= STUB_SIZE || !in_switcher)
        return false;
    nmi_came_ = true;
    machine_.set_rip(frame.rip);
    machine_.set_rsp(frame.rsp);
    machine_.set_rflags(frame.rflags);
    return true;
}

/// KVM may inject an interrupt once more that has just arrived, if a signal or an exit of its own came
/// between its delivery and the first instruction of the stub: then it is delivered in ring 0, where
/// interrupts are off, on the same stack. The second time is undone.
bool Switcher::undo_repeated_interrupt() {
    constexpr std::uint64_t stub = ~std::uint64_t{STUB_SIZE - 1};
    const std::uint64_t rip = machine_.rip(), below_top = address(stack_top_) - machine_.rsp();
    if (rip - address(image_page * page_size) >= std::uint64_t{256} * STUB_SIZE ||
        below_top < 2 * sizeof(Frame) || below_top > page_size)
        return false;
    const Frame& frame = *at<Frame>(memory_.switcher(), stack_top_ - below_top);
    if (frame.cs != ring0_cs || frame.rip != (rip & stub))
        return false;
    machine_.set_rip(frame.rip);
    machine_.set_rsp(frame.rsp);
    machine_.set_rflags(frame.rflags);
    return true;
}

Trap Switcher::leave(VirtualCpu& cpu) {
    (void)set_nmi_aside();
    while (undo_repeated_interrupt()) {
    }
    machine_.read_gprs(cpu.gpr);
    std::uint64_t flags = machine_.rflags();
    take_segments(cpu);
    const auto finish = [&](Trap trap) {
        // What the machine's flags cannot tell: IOPL is ours, and where it is not honoured so is IF; but a
        // KVM that runs 64-bit code so interprets the rest, and its interpreter honours IOPL.
        constexpr std::uint64_t ours = rflags::iopl | rflags::virtual_8086;
        const bool iopl_honoured = traits_.iopl_honoured || !code_.long_mode;
        const std::uint64_t kept = ours | (iopl_honoured ? 0 : rflags::interrupt) |
                                   (alignment_flag_hidden_ ? rflags::alignment_check : 0);
        cpu.rflags = (flags & ~kept) | (cpu.rflags & kept) | rflags::fixed;
        return trap;
    };

    const std::uint64_t rip = machine_.rip();
    const std::uint64_t image = address(image_page * page_size);
    if (rip - image >= image_pages * page_size) {
        cpu.rip = rip;
        return finish({});
    }
    const auto syscall = [&] { // what the instruction did: RCX is the return address, R11 the flags
        cpu.rip = cpu[Gpr::rcx];
        flags = cpu[Gpr::r11];
        return finish({.kind = Trap::Kind::syscall, .error_code = {}, .address = {}});
    };
    // An `out` leaves RIP at or behind itself, as KVM likes.
    if ((rip & ~std::uint64_t{STUB_SIZE - 1}) == syscall_entry_)
        return syscall();

    Trap trap;
    trap.kind = Trap::Kind::vector;
    trap.vector = static_cast<std::uint8_t>((rip - image) / STUB_SIZE);
    trap.address = GuestVirt(machine_.cr2());
    std::size_t stack_top = stack_top_;
    for (const std::size_t page : {nmi_stack_page, fault_stack_page}) // not every KVM knows these
        if (address(block_ + (page + 1) * page_size) - machine_.rsp() < page_size)
            stack_top = block_ + (page + 1) * page_size;
    const std::uint64_t top = address(stack_top);
    const std::uint64_t pushed = top - machine_.rsp();
    const bool with_code = pushed == sizeof(Frame) + sizeof(std::uint64_t);
    if (rip - image >= std::uint64_t{256} * STUB_SIZE || (!with_code && pushed != sizeof(Frame))) {
        trap.kind = Trap::Kind::broken;
        cpu.rip = rip;
        return trap;
    }
    const auto area = memory_.switcher();
    const Frame& frame = *at<Frame>(area, stack_top - sizeof(Frame));
    if (with_code)
        trap.error_code = static_cast<std::uint32_t>(*at<std::uint64_t>(area, stack_top - pushed));
    cpu.rip = frame.rip;
    cpu[Gpr::rsp] = frame.rsp;
    flags = frame.rflags;
    // Where `syscall` stays at CPL 3, the fetch from LSTAR's supervisor page is the trap.
    if (!traits_.syscall_to_ring0 && frame.rip == syscall_entry_ && trap.address.value() == syscall_entry_)
        return syscall();
    const auto fault = static_cast<std::uint8_t>(Vector::page_fault);
    if (trap.vector == fault && trap.error_code && (*trap.error_code & PageFault::user) == 0) {
        if (const auto selector = selector_of(trap.address)) {
            trap.kind = Trap::Kind::descriptor;
            trap.vector = static_cast<std::uint8_t>(Vector::general_protection);
            trap.error_code = *selector;
        }
    }
    return finish(trap);
}

/// What the guest has loaded without a trap: the bases of FS and GS, null selectors, and where KVM interprets
/// its code, the machine's CS and SS.
void Switcher::take_segments(VirtualCpu& cpu) {
    cpu.fs.base = machine_.segment_base(SegmentName::fs);
    cpu.gs.base = machine_.segment_base(SegmentName::gs);
    if (!traits_.own_gdt && code_.long_mode)
        return;
    std::size_t i = 0;
    for (const auto& [name, segment] : data_segments(cpu)) {
        Segment& known = data_[i++];
        const std::uint16_t selector = machine_.selector(name);
        if (selector == known.selector)
            continue;
        known = Segment{.selector = selector};
        if (!traits_.own_gdt && (selector | 3) == stack_.selector)
            *segment = cpu.ss;
        else if (!traits_.own_gdt && (selector | 3) == code_.selector)
            *segment = cpu.cs;
        else
            *segment = Segment{.selector = selector, .base = segment->base};
    }
}

/// Gives the machine the guest's data segments. Where its GDT is not ours, 64-bit code has those that the
/// host gives it, of which only the bases of FS and GS count.
void Switcher::put_segments(const VirtualCpu& cpu) {
    const bool given = !traits_.own_gdt && cpu.cs.long_mode;
    std::size_t i = 0;
    for (const auto& [name, segment] : data_segments(cpu)) {
        Segment wanted = given ? Segment{} : for_machine(*segment, segment->selector);
        wanted.base = 0; // compared below, for the guest may change it
        Segment& known = data_[i++];
        if (known != wanted) {
            known = wanted;
            wanted.base = segment->base;
            machine_.set_segment(name, wanted);
        } else if (machine_.segment_base(name) != segment->base) {
            machine_.set_segment_base(name, segment->base);
        }
    }
}

/// The machine's CS and SS for `cpu`: flat for 64-bit code, where no more than that counts, and otherwise the
/// guest's own; with the guest's selectors, unless those of the host's GDT are the only ones.
void Switcher::choose_code_and_stack(const VirtualCpu& cpu) {
    const std::uint16_t rpl = traits_.rpl_hidden ? 0 : 3;
    std::uint16_t cs = cpu.cs.selector | rpl, ss = cpu.ss.selector | rpl;
    if (!traits_.own_gdt) {
        cs = cpu.cs.long_mode ? host_user_code : interpreted_cs;
        ss = cpu.cs.long_mode ? host_user_data : interpreted_ss;
    }
    Segment code = flat(cs, true, 3), stack = flat(ss, false, 3);
    if (!cpu.cs.long_mode) {
        code = for_machine(cpu.cs, cs);
        if (cpu.ss.present) {
            stack = for_machine(cpu.ss, ss);
        } else { // left behind by 64-bit code: nothing can be accessed by it
            stack.limit = 0;
            stack.granularity = false;
        }
    }
    if (traits_.own_gdt) {
        code_ = code;
        stack_ = stack;
        return;
    }
    // The GDT holds these two and no others of CPL 3: any load of another selector traps.
    const auto replace = [this](Segment& old, const Segment& now) {
        if (old == now)
            return;
        if (old.selector != now.selector)
            set_descriptor(Segment{.selector = old.selector, .system = true});
        set_descriptor(now);
        old = now;
    };
    replace(code_, code);
    replace(stack_, stack);
}

bool Switcher::enter(VirtualCpu& cpu, MachineFrame root, const Debt& debt, const TablePool& pool,
                     std::optional<NativePortAccess> access) {
    const Segment old_code = code_, old_stack = stack_;
    choose_code_and_stack(cpu);
    if (root_ == MachineFrame() || debt.root_gone) // ring-0 code needs tables from its first instruction on
        machine_.set_cr3(root);
    put_segments(cpu);
    machine_.write_gprs(cpu.gpr);
    alignment_flag_hidden_ = std::exchange(hide_alignment_flag_, false);
    if (alignment_checks_ != wants_alignment_checks(cpu))
        set_alignment_checks(cpu);

    if (!debt.none() || access) {
        prepare_work(cpu, root, debt, pool, access);
        root_ = root;
        if (!traits_.own_gdt)
            return true; // ring 0 goes on with the guest
        if (!finish_work())
            return false;
        if (access && !access->write)
            cpu[Gpr::rax] = machine_.gpr(Gpr::rax);
        machine_.write_gprs(cpu.gpr);
    }
    if (root != root_)
        machine_.set_cr3(root);
    const bool from_ring0 = in_ring0();
    if (from_ring0 || code_ != old_code)
        machine_.set_segment(SegmentName::cs, code_);
    if (from_ring0 || stack_ != old_stack)
        machine_.set_segment(SegmentName::ss, stack_);
    machine_.set_rip(cpu.rip);
    machine_.set_rflags(machine_flags(cpu));
    root_ = root;
    return true;
}

/// Puts the machine in ring 0, where it goes from routine to routine as the stack says. The last one leads
/// out again; where the machine's GDT is not ours, into the guest.
void Switcher::prepare_work(const VirtualCpu& cpu, MachineFrame root, const Debt& debt, const TablePool& pool,
                            std::optional<NativePortAccess> access) {
    if (!in_ring0()) {
        machine_.set_segment(SegmentName::cs, flat(ring0_cs, true, 0));
        machine_.set_segment(SegmentName::ss, flat(ring0_ss, false, 0));
    }
    machine_.set_rflags(rflags::fixed); // no interrupts
    const auto area = memory_.switcher();
    std::size_t stack = stack_top_;
    const auto push = [&](std::uint64_t value) {
        stack -= sizeof(value);
        *at<std::uint64_t>(area, stack) = value;
    };
    const auto address_of = [&](const std::byte* routine) {
        return address(image_page * page_size + image_offset(routine));
    };
    const std::byte* first = traits_.own_gdt ? umbra_switcher_done : umbra_switcher_return;
    const auto before = [&](const std::byte* routine,
                            auto... items) { // the last item is the first to be popped
        push(address_of(std::exchange(first, routine)));
        (push(items), ...);
    };
    if (!traits_.own_gdt) {
        for (const std::uint64_t value :
             {std::uint64_t{stack_.selector}, cpu[Gpr::rsp], machine_flags(cpu),
              std::uint64_t{code_.selector}, cpu.rip, cpu[Gpr::rcx], cpu[Gpr::rdx], cpu[Gpr::rdi]})
            push(value);
    }
    if (access) {
        before(port_routine(*access));
        machine_.write_gpr(Gpr::rdx, access->port);
    }
    if (debt.flush || root != root_)
        before(umbra_switcher_switch, root.base().value());
    if (!debt.tables.empty()) {
        before(umbra_switcher_republish);
        for (const TableIndex index : debt.tables) {
            constexpr std::size_t straddling = sizeof(ShadowEntry) / 2;
            std::uint64_t value = 0;
            std::memcpy(&value, std::as_bytes(pool.entries(index)).data() + straddling, sizeof(value));
            push(value);
            push(address(pool_offset + TablePool::number(index) * page_size + straddling));
        }
        machine_.write_gpr(Gpr::rcx, debt.tables.size());
    }
    machine_.set_rip(address_of(first));
    machine_.set_rsp(address(stack));
}

/// Runs ring 0 until it is done. A signal that comes in between is the next run's.
bool Switcher::finish_work() {
    bool interrupted = false;
    ExitReason reason = machine_.run();
    for (; reason == ExitReason::interrupted || (reason == ExitReason::port && set_nmi_aside());
         reason = machine_.run()) {
        interrupted |= reason == ExitReason::interrupted;
        machine_.clear_exit_request();
    }
    if (interrupted)
        machine_.request_exit();
    const std::uint64_t offset =
        machine_.rip() - address(image_page * page_size + image_offset(umbra_switcher_done));
    return reason == ExitReason::port && machine_.port_exit().port == TRAP_PORT && offset < STUB_SIZE;
}

} // namespace umbra
