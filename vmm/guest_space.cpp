#include "vmm/guest_space.hpp"

namespace umbra {
namespace {

/// How a piece is translated: walk_guest, which changes nothing, or translate, which is an access of the CPU.
using Walker = GuestWalk (*)(const GuestMemory&, const GuestPaging&, GuestVirt, Access);

/// Translates each page-bounded piece of [at, at + size) and calls `piece(address, bytes, offset, length)`
/// for it: the host's bytes, none where it is not RAM, and its place in the whole. Stops at the first
/// exception.
template<class Piece>
std::optional<Exception> for_each_piece(const GuestMemory& memory, const GuestPaging& paging, Walker walker,
                                        GuestVirt at, std::size_t size, Access access, Piece&& piece) {
    for (std::size_t done = 0; done < size;) {
        const GuestVirt here = at + done;
        const std::size_t length = std::min<std::size_t>(size - done, page_size - here.page_offset());
        if (!paging.format->canonical(here))
            return Exception::general_protection();
        const GuestWalk walk = walker(memory, paging, here, access);
        if (walk.fault)
            return Exception::page_fault(*walk.fault);
        piece(walk.address, memory.range(walk.address, length), done, length);
        done += length;
    }
    return std::nullopt;
}

} // namespace

std::optional<Exception> GuestSpace::read(GuestVirt at, std::span<std::byte> into, Access access) const {
    return for_each_piece(
        *memory_, paging_, translate, at, into.size(), access,
        [&](GuestPhys address, std::span<const std::byte> bytes, std::size_t offset, std::size_t length) {
            if (!bytes.empty())
                std::memcpy(into.data() + offset, bytes.data(), length);
            else if (bus_ != nullptr)
                bus_->read_device(address, into.subspan(offset, length));
            else
                std::memset(into.data() + offset, 0xff, length);
        });
}

std::optional<Exception> GuestSpace::write(GuestVirt at, std::span<const std::byte> from,
                                           Access access) const {
    access.write = true;
    // One page needs no rehearsal: its only piece either faults or is written whole.
    if (at.page_offset() + from.size() > page_size) {
        const auto nothing = [](GuestPhys, std::span<std::byte>, std::size_t, std::size_t) {};
        if (auto exception = for_each_piece(*memory_, paging_, walk_guest, at, from.size(), access, nothing))
            return exception;
    }
    return for_each_piece(
        *memory_, paging_, translate, at, from.size(), access,
        [&](GuestPhys address, std::span<std::byte> bytes, std::size_t offset, std::size_t length) {
            if (bytes.empty()) {
                if (bus_ != nullptr)
                    bus_->write_device(address, from.subspan(offset, length));
                return;
            }
            std::memcpy(bytes.data(), from.data() + offset, length);
            if (bus_ != nullptr)
                bus_->stored(address, at + offset, length);
        });
}

std::size_t GuestSpace::peek(GuestVirt at, std::span<std::byte> into) const {
    std::size_t got = 0;
    const auto copy = [&](GuestPhys, std::span<const std::byte> bytes, std::size_t offset,
                          std::size_t length) {
        if (bytes.empty() || got != offset) // what follows a gap is of no use
            return;
        std::memcpy(into.data() + offset, bytes.data(), length);
        got += length;
    };
    constexpr Access looking{.ac = true}; // it is not the kernel that looks: SMAP does not matter
    (void)for_each_piece(*memory_, paging_, walk_guest, at, into.size(), looking, copy);
    return got;
}

} // namespace umbra
