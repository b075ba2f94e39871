// stringio: repeated OUTS and INS. Proves that what they move arrives in order, whole, also over pages and
// downwards, and that a megabyte of it is no megabyte of exits (tests/integration). Outcome: passed.
#include "guest/runtime/boot.hpp"
#include "guest/runtime/console.hpp"
#include "guest/runtime/cpu.hpp"
#include "guest/runtime/process.hpp"

#include <cstddef>
#include <cstdint>
#include <initializer_list>

using namespace umbra::guest;

namespace {

constexpr std::uint16_t post_code = 0x80; // takes everything, and reads all-ones
constexpr std::uint16_t serial = 0x3f8, serial_control = 0x3fa, serial_modem = 0x3fc;
constexpr std::uint8_t fifo_on = 0x07, fifo_off = 0, loopback = 0x10;
constexpr std::size_t fifo_size = 16, page_size = 4096;
constexpr std::size_t much = std::size_t{1} << 20;

alignas(page_size) std::uint8_t buffer[much];

void out_string(std::uint16_t port, const void*& bytes, std::size_t& count) {
    asm volatile("rep outsb" : "+S"(bytes), "+c"(count) : "d"(port) : "memory");
}
void out_words(std::uint16_t port, const void*& bytes, std::size_t& count) {
    asm volatile("rep outsl" : "+S"(bytes), "+c"(count) : "d"(port) : "memory");
}
void out_down(std::uint16_t port, const void*& bytes, std::size_t& count) {
    asm volatile("std\n rep outsb\n cld" : "+S"(bytes), "+c"(count) : "d"(port) : "memory");
}
void in_string(std::uint16_t port, void*& bytes, std::size_t& count) {
    asm volatile("rep insb" : "+D"(bytes), "+c"(count) : "d"(port) : "memory");
}

/// What was written to the serial port comes back from it. `step`: 1 or -1, as the bytes were written.
void check_loopback(std::size_t first, int step) {
    std::uint8_t back[fifo_size] = {};
    void* to = back;
    std::size_t count = fifo_size;
    in_string(serial, to, count);
    CHECK_EQ(count, 0);
    CHECK(to == back + fifo_size);
    for (std::size_t i = 0; i < fifo_size; ++i)
        CHECK_EQ(back[i], buffer[step > 0 ? first + i : first - i]);
}

void write_and_check(std::size_t first, void (*write)(std::uint16_t, const void*&, std::size_t&), int step) {
    const void* from = &buffer[first];
    std::size_t count = fifo_size;
    write(serial, from, count);
    CHECK_EQ(count, 0);
    CHECK(from == &buffer[first] + static_cast<std::ptrdiff_t>(fifo_size) * step);
    check_loopback(first, step);
}

} // namespace

extern "C" int kernel_main(const BootParams&) {
    for (std::size_t i = 0; i < sizeof(buffer); ++i)
        buffer[i] = static_cast<std::uint8_t>(i * 7 + i / page_size);

    flush_console();
    out8(serial_modem, loopback);
    out8(serial_control, fifo_on);
    for (const std::size_t first : {std::size_t{0}, page_size - 1, 2 * page_size - fifo_size + 1})
        write_and_check(first, out_string, 1);
    write_and_check(page_size + 3, out_down, -1);
    out8(serial_modem, 0);
    out8(serial_control, fifo_off);

    const void* from = buffer;
    std::size_t count = much;
    out_string(post_code, from, count);
    CHECK_EQ(count, 0);
    CHECK(from == buffer + much);
    from = buffer;
    count = much / 4;
    out_words(post_code, from, count);
    CHECK_EQ(count, 0);
    CHECK(from == buffer + much);
    void* to = buffer;
    count = much;
    in_string(post_code, to, count);
    CHECK_EQ(count, 0);
    CHECK(to == buffer + much);
    CHECK_EQ(buffer[0], 0xff);
    CHECK_EQ(buffer[much - 1], 0xff);
    print("stringio: passed\n");
    return 0;
}
