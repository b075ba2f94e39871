// The console. A port access may cost a trap of tens of microseconds, so text is gathered, and leaves by one
// string instruction for each filling of the UART's FIFO.
#include "guest/runtime/console.hpp"

#include "guest/runtime/cpu.hpp"

#include <cstdarg>
#include <cstddef>
#include <cstdint>

namespace umbra::guest {
namespace {

constexpr std::uint16_t uart = 0x3f8;
constexpr std::uint16_t uart_fifo_control = uart + 2;
constexpr std::uint16_t uart_line_status = uart + 5;
constexpr std::uint8_t fifo_enable_and_clear = 0x07;
constexpr std::uint8_t transmitter_empty = 0x20; // with the FIFO on: all of the FIFO is free
constexpr std::size_t fifo_size = 16;

constexpr std::size_t line_size = 256;
char line[line_size];
std::size_t line_length = 0;
bool fifo_enabled = false;

void put(char c) {
    line[line_length++] = c;
    if (c == '\n' || line_length == line_size)
        flush_console();
}

struct Field {
    unsigned width = 0;
    bool zero_padded = false;
    bool prefixed = false;
};

void put_text(const char* text, Field field) {
    unsigned length = 0;
    while (text[length] != '\0')
        ++length;
    for (unsigned i = length; i < field.width; ++i)
        put(' ');
    for (unsigned i = 0; i < length; ++i)
        put(text[i]);
}

void put_number(std::uint64_t value, unsigned base, bool negative, Field field) {
    char digits[24];
    unsigned count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value != 0);
    const char* prefix = negative ? "-" : field.prefixed ? "0x" : "";
    const unsigned length = count + (negative ? 1 : field.prefixed ? 2 : 0);

    if (!field.zero_padded)
        for (unsigned i = length; i < field.width; ++i)
            put(' ');
    put_text(prefix, {});
    if (field.zero_padded)
        for (unsigned i = length; i < field.width; ++i)
            put('0');
    while (count > 0)
        put(digits[--count]);
}

} // namespace

void print(const char* format, ...) {
    std::va_list arguments;
    va_start(arguments, format);
    for (const char* at = format; *at != '\0'; ++at) {
        if (*at != '%') {
            put(*at);
            continue;
        }
        Field field;
        for (++at; *at == '#' || *at == '0'; ++at)
            (*at == '#' ? field.prefixed : field.zero_padded) = true;
        for (; *at >= '0' && *at <= '9'; ++at)
            field.width = field.width * 10 + static_cast<unsigned>(*at - '0');
        bool is_long = false;
        for (; *at == 'l' || *at == 'z'; ++at)
            is_long = true;

        switch (*at) {
        case 's':
            put_text(va_arg(arguments, const char*), field);
            break;
        case 'c':
            put(static_cast<char>(va_arg(arguments, int)));
            break;
        case 'd': {
            const std::int64_t value = is_long ? va_arg(arguments, long) : va_arg(arguments, int);
            const auto magnitude = static_cast<std::uint64_t>(value);
            put_number(value < 0 ? 0 - magnitude : magnitude, 10, value < 0, field);
            break;
        }
        case 'u':
        case 'x':
            put_number(is_long ? va_arg(arguments, unsigned long) : va_arg(arguments, unsigned),
                       *at == 'x' ? 16 : 10, false, field);
            break;
        case 'p':
            field.prefixed = true;
            put_number(reinterpret_cast<std::uint64_t>(va_arg(arguments, void*)), 16, false, field);
            break;
        case '%':
            put('%');
            break;
        default: // the compiler has checked the format: none of these are in use
            put(*at);
            break;
        }
    }
    va_end(arguments);
}

void flush_console() {
    if (!fifo_enabled) {
        out8(uart_fifo_control, fifo_enable_and_clear);
        fifo_enabled = true;
    }
    for (std::size_t sent = 0; sent < line_length;) {
        while ((in8(uart_line_status) & transmitter_empty) == 0) {
        }
        const std::size_t count = line_length - sent < fifo_size ? line_length - sent : fifo_size;
        out8_string(uart, line + sent, count);
        sent += count;
    }
    line_length = 0;
}

} // namespace umbra::guest
