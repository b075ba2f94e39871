// The four functions that compilers call by themselves, also in freestanding code (GCC manual, "Standards").
// String instructions, because a plain loop would be compiled into a call of the function it is meant to be.
#include <cstddef>

extern "C" {

void* memcpy(void* to, const void* from, std::size_t size) {
    void* const result = to;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return result;
}

void* memmove(void* to, const void* from, std::size_t size) {
    auto* target = static_cast<char*>(to);
    const auto* source = static_cast<const char*>(from);
    if (target <= source || target >= source + size)
        return memcpy(to, from, size);
    target += size - 1;
    source += size - 1;
    asm volatile("std\n rep movsb\n cld" : "+D"(target), "+S"(source), "+c"(size) : : "memory");
    return to;
}

void* memset(void* to, int value, std::size_t size) {
    void* const result = to;
    asm volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
    return result;
}

int memcmp(const void* left, const void* right, std::size_t size) {
    const auto* a = static_cast<const unsigned char*>(left);
    const auto* b = static_cast<const unsigned char*>(right);
    for (; size > 0; --size, ++a, ++b)
        if (*a != *b)
            return *a < *b ? -1 : 1;
    return 0;
}

} // extern "C"
