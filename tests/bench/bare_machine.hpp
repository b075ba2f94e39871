// The least that a KVM program needs to run deprivileged code and to see its traps: what umbra is compared
// with.
#pragma once

#include "shadow/format.hpp"
#include "vmm/host_memory.hpp"
#include "vmm/kvm/kvm.hpp"

#include <cstdint>
#include <span>

namespace umbra::bench {

/// How the machine is put back into CPL 3 after a trap.
enum class ResumeBy : std::uint8_t {
    iretq,            ///< of ring 0
    system_registers, ///< synchronised ones: fewer instructions for a KVM that interprets ring 0
};

/// 2 MB of memory on hand-made tables, one vCPU at CPL 3, and ring-0 code of one `out` for the two traps that
/// the benchmarks make. No monitor: the caller knows what trapped and why.
class BareMachine {
  public:
    /// Where the pages lie that nothing maps at first.
    static constexpr GuestVirt pages_begin{std::uint64_t{1} << 39};
    static constexpr std::size_t pages = 16 * std::size_t{entries_per_table};
    /// Many pages share a frame, but not too many: some hosts keep a list for each frame of who maps it.
    static constexpr std::size_t frames = 256;

    /// `code` is what it can run, at most 4 KB.
    BareMachine(const Kvm& kvm, std::span<const std::byte> code, ResumeBy resume);

    /// Enters at `offset` of the code with RDI and RSI, when it is run next.
    void start(std::size_t offset, std::uint64_t rdi, std::uint64_t rsi);
    /// Runs to the next trap. False if something else happened: the machine is of no more use then.
    [[nodiscard]] bool run();
    /// Goes on behind an instruction of `length` bytes that trapped, or with it (0), when it is run next.
    void resume(unsigned length);
    /// Maps one of the pages.
    void map(std::size_t number);
    /// Gives the machine `memory` (2 MB aligned, at most 1 GB) at `more_begin`, mapped by pages of 2 MB.
    static constexpr GuestVirt more_begin{std::uint64_t{2} << 39};
    void add_memory(std::span<std::byte> memory, WriteLog log);
    /// Of that memory: Vm::written_pages.
    [[nodiscard]] bool written_pages(std::span<std::uint64_t> bits) {
        return vm_.written_pages(more_slot, bits);
    }

  private:
    static constexpr unsigned more_slot = 1;
    [[nodiscard]] std::uint64_t* at(std::size_t address);

    ResumeBy resume_;
    HostMemory memory_;
    Vm vm_;
    Vcpu vcpu_;
};

} // namespace umbra::bench
