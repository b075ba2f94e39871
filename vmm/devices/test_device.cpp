#include "vmm/devices/test_device.hpp"

namespace umbra {
namespace {

constexpr std::uint16_t register_port = 0xe0, flush_port = 0xe4, byte_register_port = 0xe8,
                        first_line_port = 0x2000;
constexpr unsigned register_bytes = 4, lines = 24;
constexpr GuestPhys memory_base{0xff00'0000};

constexpr bool within(std::uint16_t port, std::uint16_t first, unsigned count) {
    return port >= first && port < first + count;
}

constexpr bool of_register(std::uint16_t port) {
    return within(port, register_port, register_bytes) || within(port, byte_register_port, register_bytes);
}

} // namespace

// Of port 0xe4 a page's address is written that the host shall have to map anew, which it need not here.
bool TestDevice::has(std::uint16_t port) {
    return of_register(port) || within(port, flush_port, register_bytes) ||
           within(port, first_line_port, lines);
}

std::uint32_t TestDevice::read(std::uint16_t port, unsigned size) const {
    std::uint32_t value = 0;
    for (unsigned i = 0, at = port % register_bytes; i < size && at < register_bytes; ++i, ++at)
        if (of_register(port))
            value |= std::uint32_t{register_.at(at)} << (8 * i);
    return value;
}

void TestDevice::write(std::uint16_t port, unsigned size, std::uint32_t value) {
    if (within(port, first_line_port, lines))
        lines_(port - first_line_port, value != 0);
    for (unsigned i = 0, at = port % register_bytes; i < size && at < register_bytes; ++i, ++at)
        if (of_register(port))
            register_.at(at) = static_cast<std::uint8_t>(value >> (8 * i));
}

std::span<std::byte> TestDevice::memory(GuestPhys at, std::size_t size) {
    const std::uint64_t offset = at.value() - memory_base.value();
    if (offset >= memory_.size() || size > memory_.size() - offset)
        return {};
    return std::span(memory_).subspan(offset, size);
}

} // namespace umbra
