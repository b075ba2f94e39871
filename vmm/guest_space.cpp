#include "vmm/guest_space.hpp"

namespace umbra {
namespace {

/// Calls `piece(address, offset, size)` for each page-bounded piece of [at, at + size); stops at the first
/// exception.
template<class Piece>
std::optional<Exception> for_each_piece(GuestVirt at, std::size_t size, Piece&& piece) {
    for (std::size_t done = 0; done < size;) {
        const GuestVirt here = at + done;
        const std::size_t length = std::min<std::size_t>(size - done, page_size - here.page_offset());
        if (auto exception = piece(here, done, length))
            return exception;
        done += length;
    }
    return std::nullopt;
}

} // namespace

std::optional<Exception> GuestSpace::read(GuestVirt at, std::span<std::byte> into, Access access) const {
    return for_each_piece(
        at, into.size(),
        [&](GuestVirt here, std::size_t offset, std::size_t length) -> std::optional<Exception> {
            if (!paging_.format->canonical(here))
                return Exception::general_protection();
            const GuestWalk walk = translate(*memory_, paging_, here, access);
            if (walk.fault)
                return Exception::page_fault(*walk.fault);
            const auto bytes = memory_->range(walk.address, length);
            if (bytes.empty())
                std::memset(into.data() + offset, 0xff, length);
            else
                std::memcpy(into.data() + offset, bytes.data(), length);
            return std::nullopt;
        });
}

std::optional<Exception> GuestSpace::write(GuestVirt at, std::span<const std::byte> from,
                                           Access access) const {
    access.write = true;
    const auto check = [&](GuestVirt here, std::size_t, std::size_t) -> std::optional<Exception> {
        if (!paging_.format->canonical(here))
            return Exception::general_protection();
        if (const GuestWalk walk = walk_guest(*memory_, paging_, here, access); walk.fault)
            return Exception::page_fault(*walk.fault);
        return std::nullopt;
    };
    // One page needs no rehearsal: its only piece either faults or is written whole.
    const bool one_page = at.page_offset() + from.size() <= page_size;
    if (!one_page) {
        if (auto exception = for_each_piece(at, from.size(), check))
            return exception;
    }
    return for_each_piece(
        at, from.size(),
        [&](GuestVirt here, std::size_t offset, std::size_t length) -> std::optional<Exception> {
            if (!paging_.format->canonical(here))
                return Exception::general_protection();
            const GuestWalk walk = translate(*memory_, paging_, here, access);
            if (walk.fault)
                return Exception::page_fault(*walk.fault);
            const auto bytes = memory_->range(walk.address, length);
            if (!bytes.empty())
                std::memcpy(bytes.data(), from.data() + offset, length);
            return std::nullopt;
        });
}

std::size_t GuestSpace::peek(GuestVirt at, std::span<std::byte> into) const {
    std::size_t got = 0;
    (void)for_each_piece(
        at, into.size(),
        [&](GuestVirt here, std::size_t offset, std::size_t length) -> std::optional<Exception> {
            if (!paging_.format->canonical(here))
                return Exception::general_protection();
            const GuestWalk walk = walk_guest(*memory_, paging_, here, Access{});
            const auto bytes = walk.fault ? std::span<std::byte>{} : memory_->range(walk.address, length);
            if (bytes.empty())
                return Exception::general_protection();
            std::memcpy(into.data() + offset, bytes.data(), length);
            got = offset + length;
            return std::nullopt;
        });
    return got;
}

} // namespace umbra
