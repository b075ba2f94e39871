// How programs are made. What QEMU's emulation (version 7.2), alone or with a KVM in it, does otherwise
// than the manuals say is left out where the guest is told of it ("qemu", "qemu-host"); each is marked
// where it stands. In short:
//
// - Accesses check no limits and types of segments, returns no limit of code. Code, and SS of a return,
//   get no accessed bit. D and L together are 64-bit code. System types of 16 bits are valid in long
//   mode.
// - In a return, an absent SS is #NP, a null SS may have any RPL, the RPL of SS is looked at before its
//   descriptor, and CS before SS is popped; null FS and GS stay; inner data segments go without a
//   change of level, too; the flags of SYSRET outside 64-bit mode are those of R11.
// - Far transfers in 64-bit code go by the base and size of SS; far transfers push and pop with the
//   rights of level 0.
// - Canonical addresses are not checked in targets and MSRs; operands that lie astride an end are
//   several accesses, as are those of SGDT and SIDT. Reserved bits of CR0, CR3, DR6, DR7 and CR8 are
//   not refused.
// - Events are held behind LSS, too, and the step of TF behind STI. INT1 is #UD. SYSENTER exists in
//   compatibility mode. SGDT stores 24 bits of the base where operands have 16. MOV to CR5 is #GP at
//   level 3. There is no DR7.GD. LTR takes null.
// - An exception that KVM injects (#UD, #DB, #GP of what KVM intercepts) whose delivery fails makes no
//   double fault, and comes once more: such instructions are not in programs with bad stacks or gates.
// - An interrupt that is pending is lost now and then, and MOV to CR8 aborts QEMU then.
// - EXT and RF are not pushed, and the error code of a gate has its number doubled (machine.cpp).
#include "guest/cpufuzz/program.hpp"

#include <cstring>
#include <initializer_list>

namespace umbra::guest::cpufuzz {
namespace {

enum Register : unsigned { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi };
/// Registers that results go to; RBX holds addresses, and RAX what is loaded.
constexpr unsigned results[] = {rcx, rdx, rbp, rsi, rdi};
enum SegmentNumber : unsigned { es, cs, ss, ds, fs, gs };

namespace flag {
constexpr std::uint64_t fixed = 2, status = 0x8c5, trap = 0x100, interrupt = 0x200, direction = 0x400,
                        iopl = 0x3000, nested = 0x4000, resume = 0x1'0000, alignment = 0x4'0000,
                        id = 0x20'0000;
}

namespace control_0 {
constexpr std::uint64_t pe = 1, mp = 2, ts = 8, ne = 0x20, wp = 0x1'0000, am = 0x4'0000,
                        nw = std::uint64_t{1} << 29, pg = std::uint64_t{1} << 31,
                        reserved = std::uint64_t{1} << 40, usual = pg | wp | ne | 0x10 | pe;
}
namespace control_4 {
constexpr std::uint64_t tsd = 4, de = 8, pae = 0x20, mce = 0x40, pce = 0x100, umip = 0x800,
                        reserved = std::uint64_t{1} << 30, usual = pae | 0x600;
}

namespace msr {
constexpr std::uint64_t apic_base = 0x1b, sysenter_cs = 0x174, sysenter_esp = 0x175, sysenter_eip = 0x176,
                        pat = 0x277, efer = 0xc000'0080, star = 0xc000'0081, lstar = 0xc000'0082,
                        fmask = 0xc000'0084, fs_base = 0xc000'0100, gs_base = 0xc000'0101,
                        kernel_gs_base = 0xc000'0102, tsc_aux = 0xc000'0103;
}

/// A segment descriptor, taken apart.
struct Descriptor {
    std::uint64_t raw = 0;
    bool exists = false; ///< in its table, and in a page that is there

    [[nodiscard]] unsigned type() const { return raw >> 40 & 0xf; }
    [[nodiscard]] bool segment() const { return (raw >> 44 & 1) != 0; }
    [[nodiscard]] unsigned dpl() const { return raw >> 45 & 3; }
    [[nodiscard]] bool present() const { return (raw >> 47 & 1) != 0; }
    [[nodiscard]] bool code() const { return segment() && (type() & 8) != 0; }
    [[nodiscard]] bool conforming() const { return code() && (type() & 4) != 0; }
    [[nodiscard]] bool writable() const { return segment() && (type() & 0xa) == 2; }
    [[nodiscard]] bool call_gate() const { return !segment() && type() == 0xc; }
    [[nodiscard]] bool wide() const { return (raw >> 54 & 1) != 0; }
    [[nodiscard]] bool of_64_bits() const { return (raw >> 53 & 1) != 0; }
    [[nodiscard]] std::uint64_t base() const { return (raw >> 16 & 0xff'ffff) | (raw >> 56 & 0xff) << 24; }
};

class Maker {
  public:
    Maker(std::uint64_t seed, std::uint64_t number, std::uint64_t dropped, const Peculiarities& peculiar,
          Program& program)
        : seed_(seed), number_(number), random_(seed, number), dropped_(dropped), qemu_(peculiar.any),
          program_(&program) {}

    void make();

  private:
    // What the program finds
    void fill_tables();
    std::uint64_t random_descriptor();
    void random_gates_and_stacks();
    void choose_start();

    // Choices
    std::uint64_t flags(unsigned cpl);
    std::uint64_t selector();
    std::uint64_t code_selector();
    std::uint64_t gate_selector();
    std::uint64_t stack_selector(unsigned cpl);
    std::uint64_t stack_pointer(unsigned cpl);
    std::uint64_t data_address(unsigned size);
    std::uint64_t slot(unsigned size);
    unsigned operand_size(bool with_64 = true);
    static Descriptor descriptor(std::uint64_t selector);

    // Encoding
    void byte(std::uint64_t value);
    void bytes(std::uint64_t value, unsigned count);
    void prefixes(unsigned size, bool memory);
    template<class... Bytes>
    void op(unsigned size, Bytes... opcode) {
        prefixes(size, false);
        (byte(static_cast<std::uint64_t>(opcode)), ...);
    }
    /// An instruction on the memory at `address`.
    template<class... Bytes>
    void op_at(std::uint64_t address, unsigned size, unsigned reg, Bytes... opcode) {
        load(rbx, address - segment_base());
        prefixes(size, true);
        (byte(static_cast<std::uint64_t>(opcode)), ...);
        byte(reg << 3 | rbx);
    }
    static unsigned registers(unsigned reg, unsigned rm) { return 0xc0 | reg << 3 | rm; }
    void load(unsigned reg, std::uint64_t value);
    void push(unsigned reg);
    /// What is subtracted from an address to get it in code of 16 and 32 bits.
    std::uint64_t segment_base() const { return bits_ == 64 ? 0 : stack_base_; }
    void take_flat_stack();
    void leave_level_0();

    // The steps
    void step(unsigned number);
    void end_here() { over_ = true; }
    void go_on_in(std::uint64_t selector, std::uint64_t offset_at, unsigned width);
    const char* load_segment();
    const char* load_far_pointer();
    const char* store_segment();
    const char* examine();
    const char* far_jump();
    const char* far_return();
    const char* interrupt_return();
    const char* system_call();
    const char* system_return();
    const char* software_interrupt();
    const char* change_flags();
    const char* store_flags();
    const char* ordinary();
    const char* control_register();
    const char* status_word();
    const char* debug_register();
    const char* store_table();
    const char* load_table();
    const char* model_specific();
    const char* bases();
    const char* ports();
    const char* level_0();
    const char* wait();

    std::uint64_t seed_, number_;
    Random random_;
    std::uint64_t dropped_;
    bool qemu_;
    Program* program_;

    std::uint64_t at_ = 0; ///< where the next byte goes
    std::uint64_t next_slot_ = 0;
    unsigned bits_ = 64, cpl_ = 0;
    std::uint64_t code_base_ = 0, stack_base_ = 0; ///< of CS and SS, where they count
    bool over_ = false;                            ///< nothing that follows would be run
    bool bad_stack_ = false;                       ///< an exception may find none
    bool odd_gates_ = false;                       ///< the gate of an exception may be no good
    bool may_step_ = false;                        ///< TF may be set
};

// ---- what the program finds

std::uint64_t Maker::random_descriptor() {
    const std::uint64_t dpl = random_.one_in(8) ? random_.below(4) : random_.one_in(2) ? 3 : 0;
    const std::uint64_t present = random_.one_in(8) ? 0 : 1;
    std::uint64_t limit = 0xf'ffff, flags = 0xc, base = 0, type = 0;
    bool segment = true;
    if (random_.one_in(4)) {
        // Of the system's: not those that QEMU takes for valid in long mode, too.
        constexpr std::uint64_t types[] = {0, 2, 2, 8, 9, 0xb, 0xc, 0xc, 0xe, 0xf, 1, 3, 4, 5, 6, 7};
        type = types[random_.below(qemu_ ? 10 : 16)];
        segment = false;
        flags = 0;
        limit = type == 2 ? random_.below(std::uint64_t{ldt_slots} * 8) : page_4k - 1;
        base = type == 2 ? ldt_base : tss_page;
        if (type == 0xc) {
            const std::uint64_t target = call_gate_entry();
            const std::uint64_t where = random_.one_in(4) ? selector() : std::uint64_t{kernel_code_64};
            return (target & 0xffff) | where << 16 | (type | dpl << 5 | present << 7) << 40 |
                   (target >> 16 & 0xffff) << 48;
        }
    } else if (random_.one_in(2)) { // code
        type = 8 | random_.below(8);
        flags = !qemu_ && random_.one_in(8) ? 0xe
                : random_.one_in(2)         ? 0xa
                                            : 0xc; // QEMU: D and L is 64-bit code
        if (random_.one_in(6)) {
            flags = 0;
            base = arena;
            limit = 0xffff;
        } else if (!qemu_ && random_.one_in(6)) {
            limit = (arena + 0x1000) >> 12;
        }
        if (qemu_)
            type |= 1; // it does not set the accessed bit of code
    } else {
        type = random_.below(8);
        if (random_.one_in(4)) {
            flags = 0;
            base = arena;
            limit = 0xffff;
        }
        if (qemu_ && (type & 2) != 0)
            type = 3; // it checks no limits, and SS is not marked by a return
        else if (random_.one_in(4))
            limit = random_.below(0x10'0000);
    }
    return (limit & 0xffff) | (base & 0xff'ffff) << 16 |
           (type | std::uint64_t{segment} << 4 | dpl << 5 | present << 7) << 40 | (limit >> 16 & 0xf) << 48 |
           flags << 52 | (base >> 24 & 0xff) << 56;
}

void Maker::fill_tables() {
    auto* gdt = reinterpret_cast<std::uint64_t*>(gdt_base);
    for (unsigned slot = first_random_slot; slot < gdt_slots; ++slot) {
        gdt[slot] = random_descriptor();
        const Descriptor made{gdt[slot], true};
        if (!made.segment() && slot + 1 < gdt_slots) // the second half of 16 bytes
            gdt[++slot] = random_.one_in(8) ? std::uint64_t{1} << (qemu_ ? 44 : 32 + random_.below(32)) : 0;
    }
    auto* ldt = reinterpret_cast<std::uint64_t*>(ldt_base);
    for (unsigned slot = 0; slot < ldt_slots; ++slot)
        ldt[slot] = random_descriptor();
}

/// Handlers may run at level 3, and then what QEMU pushes for them cannot be put right (machine.cpp).
std::uint64_t Maker::gate_selector() {
    const std::uint64_t any = selector();
    const Descriptor named = descriptor(any);
    return qemu_ && (named.conforming() || named.dpl() != 0) ? std::uint64_t{kernel_code_64} : any;
}

void Maker::random_gates_and_stacks() {
    for (unsigned i = 0; i < random_gates; ++i) {
        std::uint64_t type = random_.one_in(2) ? 0x8e : 0x8f;
        if (random_.one_in(8))
            type = 0x80 | random_.below(32);
        if (random_.one_in(2))
            type |= 0x60;
        if (random_.one_in(8))
            type &= 0x7f;
        const std::uint64_t code = random_.one_in(6) ? gate_selector() : std::uint64_t{kernel_code_64};
        write_gate(first_random_gate + i, code, type, random_.one_in(3) ? 2 + random_.below(6) : 0);
    }
    write_gate(vector_pending, kernel_code_64, random_.one_in(2) ? 0x8e : 0x8f, random_.one_in(4) ? 2 : 0);
    // QEMU makes no double fault of an exception that KVM injects, and KVM injects it once more: of #DB, #UD,
    // and #GP of instructions that KVM intercepts.
    for (const unsigned vector : {10U, 11U, 12U, 13U, 14U}) {
        if (random_.one_in(12))
            write_gate(vector, kernel_code_64, 0x8e, 2 + random_.below(6));
        else if (random_.one_in(20)) {
            odd_gates_ = true;
            if (random_.one_in(2))
                write_gate(vector, gate_selector(), 0x8e, 0);
            else
                write_gate(vector, kernel_code_64, random_.one_in(2) ? 0x0e : 0x85, 0);
        }
    }
    if (random_.one_in(24)) {
        bad_stack_ = true;
        const std::uint64_t rsp0 = random_.one_in(4)   ? not_canonical
                                   : random_.one_in(3) ? unmapped
                                                       : trap_stack_page + random_.below(64);
        std::memcpy(reinterpret_cast<void*>(tss_page + 4), &rsp0, sizeof rsp0);
    }
    if (random_.one_in(8)) { // ports for programs
        const std::uint16_t map = 0x80;
        std::memcpy(reinterpret_cast<void*>(tss_page + 102), &map, sizeof map);
        for (std::uint64_t i = 0; i < 32; i += 8) {
            const std::uint64_t bits = random_.next() & random_.next();
            std::memcpy(reinterpret_cast<void*>(tss_page + map + i), &bits, sizeof bits);
        }
    }
}

void Maker::choose_start() {
    Start& start = program_->start;
    cpl_ = random_.one_in(2) ? 0 : 3;
    bits_ = random_.one_in(2) ? 64 : random_.one_in(3) ? 16 : 32;
    start.interrupt = random_.one_in(16) && !qemu_; // where one is lost now and then
    if (start.interrupt)
        cpl_ = 0;
    const std::uint16_t codes[3][2] = {
        {kernel_code_64, user_code_64}, {kernel_code_32, user_code_32}, {kernel_code_16, user_code_16}};
    start.cs = codes[bits_ == 64 ? 0 : bits_ == 32 ? 1 : 2][cpl_ == 0 ? 0 : 1];
    start.ss =
        bits_ == 16 ? (cpl_ == 0 ? kernel_data_16 : user_data_16) : (cpl_ == 0 ? kernel_data : user_data);
    start.data = bits_ == 64 ? 0 : cpl_ == 0 && random_.one_in(2) ? kernel_data : user_data;
    code_base_ = stack_base_ = bits_ == 16 ? arena : 0;
    at_ = random_.one_in(16) ? code_page + page_4k - 8 - random_.below(40) : code_page + 0x100;
    start.rip = at_ - code_base_;
    start.rflags = flags(cpl_);
    if (start.interrupt)
        start.rflags &= ~flag::interrupt;
    start.rsp = stack_pointer(cpl_);
    for (unsigned i = 0; i < 16; ++i)
        program_->registers[i] = untouched(i);
}

// ---- choices

/// For code at level `cpl`.
std::uint64_t Maker::flags(unsigned cpl) {
    std::uint64_t value = flag::fixed | (random_.next() & flag::status);
    if (random_.one_in(8))
        value |= random_.next() & (flag::direction | flag::alignment | flag::id);
    if (random_.one_in(2))
        value |= random_.next() & flag::interrupt;
    if (cpl != 0 && random_.one_in(2)) // POPF does not tell a deprivileged kernel's host of it
        value |= random_.next() & flag::iopl;
    if (random_.one_in(16))
        value |= flag::nested;
    if (!(qemu_ && bad_stack_) && random_.one_in(12))
        value |= flag::trap;
    may_step_ = may_step_ || (value & flag::trap) != 0;
    return value;
}

std::uint64_t Maker::selector() {
    const std::uint64_t kind = random_.below(16);
    if (kind == 0)
        return random_.below(4);
    if (kind == 1)
        return random_.below(0x1'0000);
    if (kind < 5)
        return 4 | random_.below(ldt_slots + 2) << 3 | random_.below(4);
    if (kind == 5)
        return (gdt_slots - 1 + random_.below(3)) << 3 | random_.below(4);
    const std::uint64_t rpl = random_.one_in(2) ? cpl_ : random_.below(4);
    return random_.below(gdt_slots) << 3 | rpl;
}

std::uint64_t Maker::code_selector() {
    if (random_.one_in(3))
        return selector();
    constexpr std::uint64_t kernel[] = {kernel_code_64, kernel_code_32, kernel_code_16};
    constexpr std::uint64_t user[] = {user_code_64, user_code_32, user_code_16};
    return cpl_ == 0 && random_.one_in(2) ? random_.of(kernel) : random_.of(user);
}

std::uint64_t Maker::stack_selector(unsigned cpl) {
    if (random_.one_in(4)) {
        std::uint64_t any = selector();
        // QEMU lets a null selector have any RPL, and be SS of 32-bit code; a return looks at the RPL before
        // it reads the descriptor.
        const Descriptor named = descriptor(any);
        if (qemu_ && ((any & ~std::uint64_t{3}) == 0 || (named.exists && !named.present())))
            any = kernel_code_64; // for one that is absent, too, it raises another exception in a return
        if (qemu_ && !descriptor(any).exists)
            any = (any & ~std::uint64_t{3}) | cpl;
        return any;
    }
    if (cpl == 0)
        return random_.one_in(4) ? kernel_data_16 : kernel_data;
    return random_.one_in(4) ? user_data_16 : user_data;
}

std::uint64_t Maker::stack_pointer(unsigned cpl) {
    const std::uint64_t page = cpl == 0 ? kernel_stack_page : user_stack_page;
    if (random_.one_in(16)) {
        if (cpl == 0)
            bad_stack_ = true;
        const std::uint64_t bad[] = {page + random_.below(64), unmapped, not_canonical, page + page_4k + 8};
        return bad[random_.below(bits_ == 64 && !qemu_ ? 4 : 2)];
    }
    const std::uint64_t top = page + page_4k - 0x40;
    return random_.one_in(4) ? top - random_.below(16) : top;
}

/// Of an operand of so many bytes, which may not be accessible.
std::uint64_t Maker::data_address(unsigned size) {
    switch (random_.below(24)) {
    case 0:
        return data_page + page_4k - random_.below(size); // goes on in a page that is not there
    case 1:
        return read_only_page + random_.below(64);
    case 2:
        return supervisor_page + random_.below(64);
    case 3:
        return unmapped;
    case 4:
        if (bits_ != 64 || (qemu_ && bad_stack_))
            return unmapped;
        return not_canonical - (qemu_ ? 0 : random_.below(size + 1)); // QEMU's accesses are several
    default:
        return slot(size);
    }
}

/// Fresh bytes of the data page.
std::uint64_t Maker::slot(unsigned size) {
    const std::uint64_t here = next_slot_;
    next_slot_ += (size + 7U) & ~7U;
    return here;
}

unsigned Maker::operand_size(bool with_64) {
    if (random_.one_in(4))
        return 16;
    return bits_ == 64 && with_64 && random_.one_in(2) ? 64 : 32;
}

Descriptor Maker::descriptor(std::uint64_t selector) {
    const std::uint64_t index = selector >> 3;
    const bool local = (selector & 4) != 0;
    if (index >= (local ? ldt_slots : gdt_slots) || (selector & ~std::uint64_t{3}) == 0)
        return {};
    Descriptor result{0, true};
    std::memcpy(&result.raw, reinterpret_cast<const void*>((local ? ldt_base : gdt_base) + index * 8),
                sizeof result.raw);
    return result;
}

// ---- encoding

void Maker::byte(std::uint64_t value) {
    if (at_ < code_page + page_4k) // what is beyond is not there
        *reinterpret_cast<volatile std::uint8_t*>(at_) = static_cast<std::uint8_t>(value);
    ++at_;
}

void Maker::bytes(std::uint64_t value, unsigned count) {
    for (unsigned i = 0; i < count; ++i)
        byte(value >> (8 * i) & 0xff);
}

/// `size` of the operands; 0: as it is without a prefix.
void Maker::prefixes(unsigned size, bool memory) {
    if (memory && bits_ != 64)
        byte(0x36); // by SS, which is always good
    if (memory && bits_ == 16)
        byte(0x67);
    if ((size == 16 && bits_ != 16) || (size == 32 && bits_ == 16))
        byte(0x66);
    if (size == 64)
        byte(0x48);
}

void Maker::load(unsigned reg, std::uint64_t value) {
    if (bits_ == 64 && value >> 32 != 0) {
        byte(0x48);
        byte(0xb8 | reg);
        bytes(value, 8);
        return;
    }
    if (bits_ == 16)
        byte(0x66);
    byte(0xb8 | reg);
    bytes(value, 4);
}

void Maker::push(unsigned reg) {
    if (bits_ == 16)
        byte(0x66);
    byte(0x50 | reg);
}

// ---- segment registers

const char* Maker::load_segment() {
    constexpr unsigned targets[] = {es, ss, ds, fs, gs};
    const unsigned target = random_.of(targets);
    std::uint64_t what = target == ss ? stack_selector(cpl_) : random_.one_in(3) ? user_data : selector();
    if (target == fs || target == gs)
        program_->changed |= target == fs ? changed_fs : changed_gs;
    if (qemu_ && target != ss && what < 4)
        what = 0; // others are not zeroed by the same returns
    const char* name = "mov to segment";
    const bool by_register = random_.one_in(2);
    if (!by_register && random_.one_in(2)) {
        const std::uint64_t where = target == ss && qemu_ ? slot(2) : data_address(2);
        if (where >= data_page && where + 2 <= data_page + page_4k)
            std::memcpy(reinterpret_cast<void*>(where), &what, 2);
        op_at(where, 0, target, 0x8e);
    } else if (!by_register && (target == fs || target == gs || bits_ != 64)) {
        name = "pop segment";
        load(rax, what);
        push(rax);
        constexpr unsigned codes[] = {0x07, 0, 0x17, 0x1f, 0xa1, 0xa9};
        if (bits_ == 16)
            byte(0x66);
        if (target == fs || target == gs)
            byte(0x0f);
        byte(codes[target]);
    } else {
        load(rax, what);
        op(0, 0x8e, registers(target, rax));
    }
    if (target == ss) {
        if (const Descriptor loaded = descriptor(what); loaded.exists)
            stack_base_ = loaded.base();
    }
    return name;
}

const char* Maker::load_far_pointer() {
    constexpr unsigned codes[] = {0xb2, 0xb4, 0xb5};
    auto which = static_cast<unsigned>(random_.below(bits_ == 64 ? 3 : 5));
    if (qemu_ && which == 0 && may_step_)
        which = 1; // LSS holds events there as MOV to SS does
    std::uint64_t what = which == 0 ? stack_selector(cpl_) : random_.one_in(2) ? user_data : selector();
    if (qemu_ && what < 4)
        what = 0;
    // QEMU: with REX.W as on Intel's CPUs only.
    const unsigned size = operand_size(!qemu_);
    const unsigned width = size / 8;
    const std::uint64_t where = which == 0 && qemu_ ? slot(width + 2) : data_address(width + 2);
    if (where >= data_page && where + width + 2 <= data_page + page_4k)
        std::memcpy(reinterpret_cast<void*>(where + width), &what, 2);
    if (which == 1 || which == 2)
        program_->changed |= which == 1 ? changed_fs : changed_gs;
    if (which >= 3)
        op_at(where, size, rbp, which == 3 ? 0xc4 : 0xc5);
    else
        op_at(where, size, rbp, 0x0f, codes[which]);
    if (which == 0) {
        if (const Descriptor loaded = descriptor(what); loaded.exists)
            stack_base_ = loaded.base();
    }
    return "load far pointer";
}

const char* Maker::store_segment() {
    const auto source = static_cast<unsigned>(random_.below(6));
    if (random_.one_in(4) && (source >= fs || bits_ != 64)) {
        constexpr unsigned codes[] = {0x06, 0x0e, 0x16, 0x1e, 0xa0, 0xa8};
        if (random_.one_in(2))
            byte(0x66);
        if (source >= fs)
            byte(0x0f);
        byte(codes[source]);
        return "push segment";
    }
    if (random_.one_in(2))
        op(operand_size(), 0x8c, registers(source, random_.of(results)));
    else
        op_at(data_address(2), operand_size(), source, 0x8c);
    return "mov from segment";
}

const char* Maker::examine() {
    const std::uint64_t what = random_.one_in(4) ? code_selector() : selector();
    const auto which = static_cast<unsigned>(random_.below(4));
    const unsigned reg = which < 2 ? random_.of(results) : which + 2; // VERR is /4, VERW /5
    const unsigned size = which < 2 ? operand_size() : 0;
    constexpr unsigned codes[] = {0x02, 0x03, 0x00, 0x00};
    if (random_.one_in(4)) {
        const std::uint64_t where = data_address(2);
        if (where >= data_page && where + 2 <= data_page + page_4k)
            std::memcpy(reinterpret_cast<void*>(where), &what, 2);
        op_at(where, size, reg, 0x0f, codes[which]);
    } else {
        load(rax, what);
        op(size, 0x0f, codes[which], registers(reg, rax));
    }
    op(0, 0x0f, 0x94, registers(0, rbx)); // setz %bl, where it is kept until the next address
    constexpr const char* names[] = {"lar", "lsl", "verr", "verw"};
    return names[which];
}

// ---- far transfers

/// The program goes on behind the instruction that is being made, in the segment of `selector`, if that is
/// code; the offset of `width` bytes goes to `offset_at`, once the instruction is complete.
void Maker::go_on_in(std::uint64_t selector, std::uint64_t offset_at, unsigned width) {
    const Descriptor target = descriptor(selector);
    std::uint64_t base = 0;
    if (target.code()) {
        bits_ = target.of_64_bits() ? 64 : target.wide() ? 32 : 16;
        base = target.of_64_bits() ? 0 : target.base();
        code_base_ = base;
        if (bits_ != 64 && target.of_64_bits())
            end_here();
    } else {
        end_here();
    }
    const std::uint64_t offset = at_ - base;
    if (offset_at >= data_page && offset_at + width <= data_page + page_4k)
        std::memcpy(reinterpret_cast<void*>(offset_at), &offset, width);
    if (width < 8 && offset >> (8 * width) != 0)
        end_here();
}

/// QEMU's far transfers of 64-bit code go by the base and the size of SS.
void Maker::take_flat_stack() {
    if (!qemu_ || bits_ != 64 || stack_base_ == 0)
        return;
    load(rax, cpl_ == 0 ? kernel_data : user_data);
    op(0, 0x8e, registers(ss, rax));
    load(rsp, (cpl_ == 0 ? kernel_stack_page : user_stack_page) + page_4k - 0x80);
    stack_base_ = 0;
}

const char* Maker::far_jump() {
    take_flat_stack();
    std::uint64_t where_to = code_selector();
    while (descriptor(where_to).call_gate())
        where_to = code_selector();
    const bool call = random_.one_in(2);
    if (call && qemu_ && cpl_ == 3) // which pushes at the kernel's privilege
        load(rsp, user_stack_page + page_4k - 0x80);
    const unsigned size = operand_size(!qemu_);
    const unsigned width = size / 8;
    if (bits_ != 64 && random_.one_in(2)) {
        prefixes(size, false);
        byte(call ? 0x9a : 0xea);
        const std::uint64_t immediate = at_;
        bytes(0, width);
        bytes(where_to, 2);
        const std::uint64_t behind = at_;
        const Descriptor target = descriptor(where_to);
        const std::uint64_t base = target.code() && !target.of_64_bits() ? target.base() : 0;
        go_on_in(where_to, 0, width);
        at_ = immediate;
        bytes(behind - base, width);
        at_ = behind;
    } else {
        const std::uint64_t where = data_address(width + 2);
        const bool there = where >= data_page && where + width + 2 <= data_page + page_4k;
        if (there)
            std::memcpy(reinterpret_cast<void*>(where + width), &where_to, 2);
        op_at(where, size, call ? 3 : 5, 0xff);
        if (there)
            go_on_in(where_to, where, width);
    }
    return call ? "far call" : "far jmp";
}

const char* Maker::far_return() {
    take_flat_stack();
    const std::uint64_t where_to = code_selector();
    const unsigned size = operand_size();
    const unsigned width = size / 8;
    const bool with_parameters = random_.one_in(4);
    const std::uint64_t parameters = with_parameters ? random_.below(3) * width : 0;
    const unsigned new_cpl = where_to & 3;
    const bool edge = random_.one_in(16) && (cpl_ == 0 || !qemu_); // whose #PF are not the program's
    const std::uint64_t frame =
        edge ? data_page + page_4k - random_.below(std::uint64_t{4} * width) : slot(6 * width);
    load(rsp, frame - segment_base());
    const std::uint64_t stack = stack_selector(new_cpl);
    const std::uint64_t pointer = stack_pointer(new_cpl);
    if (!edge) {
        std::memcpy(reinterpret_cast<void*>(frame + width), &where_to, width);
        std::memcpy(reinterpret_cast<void*>(frame + std::uint64_t{2} * width + parameters), &pointer, width);
        std::memcpy(reinterpret_cast<void*>(frame + std::uint64_t{3} * width + parameters), &stack, width);
    }
    op(size, with_parameters ? 0xca : 0xcb);
    if (with_parameters)
        bytes(parameters, 2);
    go_on_in(where_to, edge ? 0 : frame, width);
    if (edge)
        end_here();
    if (new_cpl > cpl_) {
        if (const Descriptor loaded = descriptor(stack); loaded.exists)
            stack_base_ = loaded.base();
        cpl_ = new_cpl;
    }
    return "far ret";
}

const char* Maker::interrupt_return() {
    take_flat_stack();
    const std::uint64_t where_to = code_selector();
    const unsigned size = operand_size();
    const unsigned width = size / 8;
    const unsigned new_cpl = where_to & 3;
    const bool edge = random_.one_in(16) && (cpl_ == 0 || !qemu_); // whose #PF are not the program's
    const std::uint64_t frame =
        edge ? data_page + page_4k - random_.below(std::uint64_t{qemu_ ? 3U : 5U} * width)
             : slot(5 * width); // QEMU looks at CS first
    load(rsp, frame - segment_base());
    const bool pops_stack = bits_ == 64 || new_cpl > cpl_;
    std::uint64_t stack = stack_selector(new_cpl);
    const std::uint64_t pointer = stack_pointer(new_cpl);
    const std::uint64_t loaded_flags = flags(new_cpl) | (random_.one_in(16) ? flag::resume : 0);
    if (!edge) {
        const std::uint64_t items[] = {where_to, loaded_flags, pointer, stack};
        for (unsigned i = 0; i < 4; ++i)
            std::memcpy(reinterpret_cast<void*>(frame + std::uint64_t{i + 1} * width), &items[i], width);
    }
    op(size, 0xcf);
    go_on_in(where_to, edge ? 0 : frame, width);
    if (edge)
        end_here();
    if (pops_stack) {
        if (const Descriptor loaded = descriptor(stack); loaded.exists)
            stack_base_ = loaded.base();
    }
    if (new_cpl > cpl_)
        cpl_ = new_cpl;
    return "iret";
}

/// Before an instruction that takes level 0 to level 3 and leaves the data segments. QEMU takes those that
/// level 3 may not have away when it returns to level 3 from there, too.
void Maker::leave_level_0() {
    if (cpl_ != 0)
        return;
    if (qemu_) {
        load(rax, 0);
        for (const unsigned segment : {es, ds})
            op(0, 0x8e, registers(segment, rax));
        if ((program_->changed & changed_fs) != 0)
            op(0, 0x8e, registers(fs, rax));
        if ((program_->changed & changed_gs) != 0)
            op(0, 0x8e, registers(gs, rax));
    }
    load(rsp, stack_pointer(3));
}

const char* Maker::system_call() {
    leave_level_0();
    op(0, 0x0f, 0x05);
    if (code_base_ != 0 && bits_ != 64)
        end_here(); // SYSRET goes on at base 0
    if (bits_ != 64)
        bits_ = 32;
    code_base_ = stack_base_ = 0;
    cpl_ = 3;
    return "syscall";
}

const char* Maker::system_return() {
    if (qemu_ && bits_ != 64)
        return system_call(); // takes R11 there, too
    const bool to_64 = bits_ == 64 && random_.one_in(2);
    leave_level_0();
    if (bits_ == 64) {
        byte(0x49);
        byte(0xbb); // mov to R11
        bytes(flags(3), 8);
    }
    // The target is the address behind: known, for the lengths are.
    const std::uint64_t length = (bits_ == 16 ? 6U : 5U) + (to_64 ? 1U : 0U) + 2U;
    load(rcx, at_ + length);
    op(to_64 ? 64 : 0, 0x0f, 0x07);
    if (bits_ != 64 || cpl_ != 0)
        end_here();
    bits_ = to_64 ? 64 : 32;
    code_base_ = stack_base_ = 0;
    cpl_ = 3;
    return "sysret";
}

const char* Maker::software_interrupt() {
    switch (random_.below(8)) {
    case 0:
        op(0, 0xcc);
        return "int3";
    case 1:
        if (qemu_)
            break; // #UD
        op(0, 0xf1);
        return "int1";
    case 2:
        if (bits_ == 64)
            break;
        op(0, 0xce);
        return "into";
    case 3:
        op(0, 0xcd, random_.below(32));
        return "int exception";
    default:
        break;
    }
    op(0, 0xcd, first_random_gate + random_.below(random_gates));
    return "int";
}

// ---- flags

const char* Maker::change_flags() {
    switch (random_.below(6)) {
    case 0:
        op(0, 0xfa);
        return "cli";
    case 1:
        if (qemu_ && may_step_) // whose #DB it leaves out behind STI
            break;
        op(0, 0xfb);
        return "sti";
    case 2:
        op(0, random_.one_in(2) ? 0xfc : 0xfd);
        return "cld or std";
    default:
        break;
    }
    load(rax, flags(cpl_));
    push(rax);
    if (bits_ == 16)
        byte(0x66);
    byte(0x9d);
    return "popf";
}

const char* Maker::store_flags() {
    const bool whole = at_ + 7 <= code_page + page_4k;
    if (cpl_ == 0 && (bits_ == 16 || (bits_ == 32 && stack_base_ != 0) || !whole))
        return ordinary();
    const bool narrow = random_.one_in(4);
    if (narrow != (bits_ == 16))
        byte(0x66);
    byte(0x9c);
    // IOPL is the host's at level 0: see cpufuzz.cpp.
    if (cpl_ == 0) {
        byte(0x80);
        byte(0x64);
        byte(0x24);
        byte(1);
        byte(0xcf);
    }
    return "pushf";
}

// ---- system registers

const char* Maker::control_register() {
    program_->changed |= changed_control;
    constexpr unsigned numbers[] = {0, 0, 2, 3, 4, 4, 8};
    unsigned number = random_.of(numbers);
    if (random_.one_in(16) && (cpl_ == 0 || !qemu_)) // QEMU looks at the level first
        number = static_cast<unsigned>(random_.below(8));
    const bool write = random_.one_in(2);
    if (number == 8 && bits_ != 64)
        return ordinary();
    if (number == 8 && write)
        program_->changed |= changed_cr8;
    if (write) {
        namespace c0 = control_0;
        namespace c4 = control_4;
        std::uint64_t value = random_.next() & 0xffff'ffff;
        if (number == 0) {
            value = c0::usual | (random_.next() & (c0::mp | c0::ts | c0::am | c0::ne | c0::wp));
            if (random_.one_in(8))
                value ^= random_.one_in(2) ? c0::pe : c0::nw; // refused
            if (random_.one_in(8) && bits_ == 64)
                value ^= qemu_ || random_.one_in(2) ? c0::pg : c0::reserved; // refused
        } else if (number == 3) {
            program_->changed |= changed_cr3;
            value = !qemu_ && random_.one_in(4) && bits_ == 64 ? std::uint64_t{1} << 62
                                                               : usual_cr3() | (random_.next() & 0x18);
        } else if (number == 4) {
            value = c4::usual | (random_.next() & (c4::tsd | c4::de | c4::umip | c4::pce | c4::mce));
            if (random_.one_in(8))
                value ^= random_.one_in(2) ? c4::pae : c4::reserved; // refused
        } else if (number == 8) {
            value = random_.below(qemu_ ? 16 : 18); // QEMU refuses none
        }
        load(rax, value);
    }
    const unsigned reg = write ? rax : random_.of(results);
    if (number == 8)
        byte(0x44); // REX.R
    op(0, 0x0f, write ? 0x22 : 0x20, registers(number & 7, reg));
    return write ? "mov to control register" : "mov from control register";
}

const char* Maker::status_word() {
    program_->changed |= changed_control;
    switch (random_.below(4)) {
    case 0:
        op(0, 0x0f, 0x06);
        return "clts";
    case 1:
        // MP, TS, and PE, which cannot be cleared; not EM.
        load(rax, random_.next() & 0xffff'fffb);
        op(operand_size(), 0x0f, 0x01, registers(6, rax));
        return "lmsw";
    case 2:
        op(operand_size(), 0x0f, 0x01, registers(4, random_.of(results)));
        break;
    default:
        op_at(data_address(2), operand_size(), 4, 0x0f, 0x01);
        break;
    }
    return "smsw";
}

const char* Maker::debug_register() {
    program_->changed |= changed_debug;
    const auto number = static_cast<unsigned>(random_.below(8));
    const bool write = random_.one_in(2);
    if (write) {
        constexpr std::uint64_t general_detect = 1 << 13, enables = 0xff, met = 0xf;
        std::uint64_t value = random_.next() & 0xffff'ffff;
        if (number == 4 || number == 6)
            value &= ~met; // a CPU may clear them with the next #DB
        if (number == 5 || number == 7)
            value &= ~enables; // no breakpoints
        if ((number == 5 || number == 7) && (qemu_ || !random_.one_in(4)))
            value &= ~general_detect; // which neither QEMU nor its KVM knows
        if (qemu_)                    // which keeps bits that are reserved
            value &= number == 7 || number == 5   ? 0xffff'23ff
                     : number == 6 || number == 4 ? 0xffff'ffff'ffff'e00f
                                                  : ~0ULL;
        if (bits_ == 64 && random_.one_in(8))
            value |= std::uint64_t{1} << 40;
        load(rax, value);
    }
    op(0, 0x0f, write ? 0x23 : 0x21, registers(number, write ? rax : random_.of(results)));
    return write ? "mov to debug register" : "mov from debug register";
}

const char* Maker::store_table() {
    if (random_.one_in(2)) {
        const bool idt = random_.one_in(2);
        // QEMU stores 24 bits of the base, where the operand size is 16, and the limit where the base faults.
        const unsigned size = bits_ == 64 ? 10 : 6;
        std::uint64_t where = data_address(size);
        if (qemu_ && where < data_page + page_4k && where + size > data_page + page_4k)
            where = slot(size);
        op_at(where, qemu_ && bits_ == 16 ? 32 : 0, idt ? 1 : 0, 0x0f, 0x01);
        return idt ? "sidt" : "sgdt";
    }
    const unsigned which = random_.one_in(2) ? 1 : 0;
    if (random_.one_in(2))
        op(operand_size(), 0x0f, 0x00, registers(which, random_.of(results)));
    else
        op_at(data_address(2), operand_size(), which, 0x0f, 0x00);
    return which == 0 ? "sldt" : "str";
}

const char* Maker::load_table() {
    if (random_.one_in(2)) {
        const bool idt = random_.one_in(2);
        program_->changed |= idt ? changed_idtr : changed_gdtr;
        const std::uint64_t where = data_address(10);
        const std::uint64_t gdt_limits[] = {0x7f, gdt_slots * 8 - 1, gdt_slots_admitted * 8 - 1, 0xffff};
        const std::uint64_t idt_limits[] = {page_4k - 1, 0x83f, 0x80f, 0xffff};
        const std::uint64_t limit = idt ? random_.of(idt_limits) : random_.of(gdt_limits);
        std::uint64_t base = idt ? idt_page : gdt_base;
        if (bits_ == 64 && !qemu_ && random_.one_in(6))
            base |= not_canonical;
        if (where < data_page || where + 10 > data_page + page_4k)
            return ordinary(); // what is there is no table
        std::memcpy(reinterpret_cast<void*>(where), &limit, 2);
        std::memcpy(reinterpret_cast<void*>(where + 2), &base, sizeof base);
        const unsigned size = bits_ == 16 ? 32 : 0; // 24 bits of the base otherwise
        op_at(where, size, idt ? 3 : 2, 0x0f, 0x01);
        return idt ? "lidt" : "lgdt";
    }
    const bool task_register = random_.one_in(2);
    program_->changed |= task_register ? changed_tr : changed_ldtr;
    const std::uint64_t what = random_.one_in(8) ? (task_register ? task : local_table) : selector();
    if (qemu_ && ((task_register && what < 4) || what >> 3 == gdt_slots - 1))
        return ordinary(); // no fault there, or another one where the second half is not in memory
    if (random_.one_in(2)) {
        load(rax, what);
        op(0, 0x0f, 0x00, registers(task_register ? 3 : 2, rax));
    } else {
        const std::uint64_t where = slot(2);
        std::memcpy(reinterpret_cast<void*>(where), &what, 2);
        op_at(where, 0, task_register ? 3 : 2, 0x0f, 0x00);
    }
    return task_register ? "ltr" : "lldt";
}

const char* Maker::model_specific() {
    program_->changed |= changed_msrs;
    constexpr std::uint64_t indices[] = {
        msr::efer,         msr::star,        msr::fmask,        msr::fs_base,        msr::gs_base,
        msr::tsc_aux,      msr::sysenter_cs, msr::sysenter_esp, msr::kernel_gs_base, msr::pat,
        msr::sysenter_eip, msr::lstar,       msr::apic_base};
    const std::uint64_t index = random_.of(indices);
    if (index == msr::fs_base)
        program_->changed |= changed_fs;
    if (index == msr::gs_base)
        program_->changed |= changed_gs;
    load(rcx, index);
    if (random_.one_in(2)) {
        op(0, 0x0f, 0x32);
        return "rdmsr";
    }
    constexpr std::uint64_t beyond = 0x8000; // the upper half of an address that is not canonical
    std::uint64_t low = random_.next() & 0xffff'ffff, high = 0;
    switch (index) {
    case msr::efer:
        low = 0xd00 | random_.below(2); // SCE comes and goes; LME, LMA and NXE stay
        if (random_.one_in(4))
            low |= std::uint64_t{1} << (random_.one_in(2) ? 9 : 20); // refused
        break;
    case msr::pat:
        low = random_.one_in(2) ? 0x0007'0406 : low;
        high = random_.one_in(2) ? 0x0007'0406 : 2;
        break;
    case msr::lstar:
        if (qemu_)
            return ordinary(); // takes it
        low = 0;
        high = beyond;
        break;
    case msr::apic_base:
        low = 0;
        high = 0xffff'0000; // refused
        break;
    case msr::star:
        high = std::uint64_t{user_code_32} << 16 | kernel_code_64;
        break;
    case msr::sysenter_cs:
        break;
    default:
        high = random_.one_in(4) && !qemu_ ? beyond : 0;
        break;
    }
    load(rax, low);
    load(rdx, high);
    op(0, 0x0f, 0x30);
    return "wrmsr";
}

const char* Maker::bases() {
    if (random_.one_in(2)) {
        program_->changed |= changed_gs | changed_msrs;
        op(0, 0x0f, 0x01, 0xf8);
        return "swapgs"; // #UD but in 64-bit code
    }
    op_at(data_address(1), 0, 7, 0x0f, 0x01);
    return "invlpg";
}

const char* Maker::ports() {
    const std::uint64_t port = 0x70 + random_.below(0x20);
    if (port == 0x70 || port == 0x71)
        return ordinary();
    load(rdx, port);
    load(rax, 0);
    switch (random_.below(4)) {
    case 0:
        op(0, 0xec);
        return "in byte";
    case 1:
        op(operand_size(false), 0xed);
        return "in";
    case 2:
        op(0, 0xee);
        return "out byte";
    default:
        op(0, 0xe4, 0x80);
        return "in byte from port 0x80";
    }
}

const char* Maker::level_0() {
    switch (random_.below(4)) {
    case 0:
        op(0, 0x0f, 0x09);
        return "wbinvd";
    case 1:
        if (cpl_ == 0)
            break;
        op(0, 0xf4);
        end_here();
        return "hlt";
    case 2:
        // KVM fails to emulate them in 64-bit mode where the CPU has none; QEMU has them where AMD's CPUs
        // have not.
        if (qemu_ || bits_ == 64)
            break;
        op(0, 0x0f, random_.one_in(2) ? 0x34 : 0x35);
        end_here();
        return "sysenter or sysexit";
    default:
        break;
    }
    if (may_step_ || at_ + 16 > code_page + page_4k)
        return ordinary(); // something that would show what it reads, the host's time
    op(0, 0x0f, 0x31);
    load(rax, 0);
    load(rdx, 0);
    return "rdtsc";
}

// ---- ordinary instructions

const char* Maker::ordinary() {
    switch (random_.below(8)) {
    case 0:
        op(0, 0x90);
        return "nop";
    case 1:
        op_at(data_address(4), 0, rdx, 0x8b);
        return "load";
    case 2:
        op_at(data_address(4), 0, rdx, 0x89);
        return "store";
    case 3:
        push(rbp);
        return "push";
    case 4:
        if (qemu_ && bad_stack_)
            break;
        op(0, 0x0f, 0x0b);
        end_here();
        return "ud2";
    case 5:
        load(rcx, 0);
        op(0, 0xf7, registers(6, rcx)); // div
        end_here();
        return "div by 0";
    default:
        break;
    }
    load(rdi, random_.next() & 0x7fff'ffff);
    op(0, 0x85, registers(rdi, rdi)); // test
    return "test";
}

const char* Maker::wait() {
    op(0, 0xfb);
    op(0, 0xf4);
    return "sti hlt";
}

// ---- the program

void Maker::step(unsigned number) {
    random_ = Random(seed_ + number + 1, number_); // so that no step depends on whether another is left out
    Step& made = program_->steps[program_->count];
    made.begin = at_;
    made.bits = bits_;
    using Make = const char* (Maker::*)();
    constexpr unsigned injected = 9; // the last ones: KVM may inject what they raise
    constexpr Make kinds[] = {
        &Maker::load_segment,
        &Maker::load_segment,
        &Maker::load_far_pointer,
        &Maker::store_segment,
        &Maker::examine,
        &Maker::examine,
        &Maker::far_jump,
        &Maker::far_return,
        &Maker::interrupt_return,
        &Maker::interrupt_return,
        &Maker::system_call,
        &Maker::system_return,
        &Maker::software_interrupt,
        &Maker::software_interrupt,
        &Maker::change_flags,
        &Maker::store_flags,
        &Maker::ordinary,
        &Maker::control_register,
        &Maker::status_word,
        &Maker::debug_register,
        &Maker::store_table,
        &Maker::load_table,
        &Maker::model_specific,
        &Maker::bases,
        &Maker::ports,
        &Maker::level_0,
    };
    constexpr unsigned count = sizeof kinds / sizeof *kinds;
    const bool waits = random_.one_in(2) && program_->start.interrupt && number == 0;
    // QEMU looks at the level before it fetches the rest of an instruction.
    const bool near_end = cpl_ == 3 && at_ + 40 > code_page + page_4k;
    const bool careful = qemu_ && (bad_stack_ || odd_gates_ || near_end);
    const Make kind = waits ? &Maker::wait : kinds[random_.below(careful ? count - injected : count)];
    made.name = (this->*kind)();
    made.end = at_;
    ++program_->count;
}

void Maker::make() {
    *program_ = Program{};
    next_slot_ = data_page + page_4k - 0x180;
    fill_tables();
    random_gates_and_stacks();
    choose_start();
    const std::uint64_t steps = 1 + random_.below(5);
    for (unsigned i = 0; i < steps && !over_; ++i) {
        if ((dropped_ >> i & 1) == 0)
            step(i);
    }
    Step& last = program_->steps[program_->count];
    last = {"end", at_, at_ + 2, bits_};
    op(0, 0xcd, vector_end);
}

} // namespace

void make_program(std::uint64_t seed, std::uint64_t number, std::uint64_t dropped,
                  const Peculiarities& peculiar, Program& program) {
    Maker(seed, number, dropped, peculiar, program).make();
}

} // namespace umbra::guest::cpufuzz
