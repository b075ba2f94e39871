// The console, the end of the run, and the functions that compilers call by themselves.
#include "guest/legacy/runtime.hpp"

namespace umbra::legacy {
namespace {

constexpr uint16_t uart = 0x3f8;
constexpr uint16_t uart_line_status = uart + 5;
constexpr uint8_t transmitter_ready = 0x20;
constexpr uint16_t debug_exit = 0xf4;

void put(char character) {
    while ((in8(uart_line_status) & transmitter_ready) == 0) {
    }
    out8(uart, static_cast<uint8_t>(character));
}

void put_decimal(uint32_t value) {
    char digits[10];
    unsigned count = 0;
    do {
        digits[count++] = static_cast<char>('0' + value % 10);
        value /= 10;
    } while (value != 0);
    while (count > 0)
        put(digits[--count]);
}

void put_hexadecimal(uint64_t value) {
    int shift = 60;
    while (shift > 0 && (value >> shift) == 0)
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[(value >> shift) & 0xf]);
}

} // namespace

void print_all(const char* format, const Printed* values) {
    for (const char* at = format; *at != '\0'; ++at) {
        if (*at != '%') {
            put(*at);
            continue;
        }
        const Printed& value = *values++;
        switch (*++at) {
        case 's':
            for (const char* text = value.text; *text != '\0'; ++text)
                put(*text);
            break;
        case 'u':
            put_decimal(static_cast<uint32_t>(value.number));
            break;
        default: // x
            put_hexadecimal(value.number);
            break;
        }
    }
}

unsigned length(const char* text) {
    unsigned count = 0;
    while (text[count] != '\0')
        ++count;
    return count;
}

bool equal(const char* left, const char* right, unsigned count) {
    for (unsigned i = 0; i < count; ++i)
        if (left[i] != right[i] || left[i] == '\0')
            return left[i] == right[i];
    return true;
}

const char* find_word(const char* command_line, const char* name) {
    for (const char* at = command_line; *at != '\0'; ++at)
        if (equal(at, name, length(name)) && (at == command_line || at[-1] == ' '))
            return at + length(name);
    return nullptr;
}

bool on_qemu(uint32_t ebx) {
    constexpr uint32_t has_command_line = 1 << 2;
    constexpr unsigned command_line = 16; // in the boot information, bytes
    if ((memory_at<uint32_t>(ebx) & has_command_line) == 0)
        return false;
    const char* const end =
        find_word(reinterpret_cast<const char*>(memory_at<uint32_t>(ebx + command_line)), "qemu");
    return end != nullptr && (*end == ' ' || *end == '\0');
}

extern "C" void exit_guest(int code) {
    for (;;)
        out32(debug_exit, static_cast<uint32_t>(code));
}

void fail(const char* file, unsigned line, const char* what) {
    print("%s:%u: not so: %s\n", file, line, what);
    exit_guest(1);
}

void fail_equal(const char* file, unsigned line, const char* what, uint64_t value, uint64_t expected) {
    print("%s:%u: %s is 0x%x instead of 0x%x\n", file, line, what, value, expected);
    exit_guest(1);
}

extern "C" {

void* memcpy(void* to, const void* from, size_t size) {
    void* const result = to;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return result;
}

void* memset(void* to, int value, size_t size) {
    void* const result = to;
    asm volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
    return result;
}

} // extern "C"

} // namespace umbra::legacy
