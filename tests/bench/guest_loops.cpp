#include "tests/bench/guest_loops.hpp"

#include <cstring>
#include <utility>
#include <vector>

#include <elf.h>

namespace umbra::bench {
namespace {

static_assert(offsetof(LoopGuest::Mailbox, routine) == BENCH_ROUTINE);
static_assert(offsetof(LoopGuest::Mailbox, first) == BENCH_FIRST);
static_assert(offsetof(LoopGuest::Mailbox, second) == BENCH_SECOND);
static_assert(offsetof(LoopGuest::Mailbox, remaining) == BENCH_REMAINING);
static_assert(offsetof(LoopGuest::Mailbox, ticks) == BENCH_TICKS);

/// The loops as an ELF executable of one segment.
std::vector<std::byte> make_elf() {
    const auto image = loops_image();
    Elf64_Ehdr header{};
    std::memcpy(header.e_ident, ELFMAG, SELFMAG);
    header.e_ident[EI_CLASS] = ELFCLASS64;
    header.e_ident[EI_DATA] = ELFDATA2LSB;
    header.e_ident[EI_VERSION] = EV_CURRENT;
    header.e_type = ET_EXEC;
    header.e_machine = EM_X86_64;
    header.e_version = EV_CURRENT;
    header.e_entry = BENCH_IMAGE;
    header.e_phoff = header.e_ehsize = sizeof(header);
    header.e_phentsize = sizeof(Elf64_Phdr);
    header.e_phnum = 1;
    Elf64_Phdr segment{};
    segment.p_type = PT_LOAD;
    segment.p_flags = PF_R | PF_X;
    segment.p_offset = page_size;
    segment.p_vaddr = segment.p_paddr = BENCH_IMAGE;
    segment.p_filesz = segment.p_memsz = image.size();
    segment.p_align = page_size;
    std::vector<std::byte> file(page_size + image.size());
    std::memcpy(file.data(), &header, sizeof(header));
    std::memcpy(file.data() + sizeof(header), &segment, sizeof(segment));
    std::memcpy(file.data() + page_size, image.data(), image.size());
    return file;
}

} // namespace

LoopGuest::LoopGuest(const Kvm& kvm, const HostTraits& traits, MonitorOptions options)
    : machine_(kvm, {.memory_bytes = memory_bytes,
                     .pool_bytes = pool_bytes,
                     .cpu = {},
                     .serial_output = {},
                     .debug_output = [this](std::span<const char> /*line*/) { between_(); }}),
      monitor_(machine_, traits, boot_cpu(load_kernel(make_elf(), {}, machine_.memory())), options) {}

LoopGuest::Mailbox& LoopGuest::mailbox() {
    return *reinterpret_cast<Mailbox*>(memory().range(GuestPhys(BENCH_MAILBOX), sizeof(Mailbox)).data());
}

bool LoopGuest::run(std::size_t offset, unsigned calls, std::function<void()> between) {
    between_ = std::move(between);
    mailbox().routine = BENCH_IMAGE + offset;
    mailbox().remaining = calls;
    RunControl control;
    return monitor_.run(control).kind == Verdict::Kind::passed;
}

} // namespace umbra::bench
