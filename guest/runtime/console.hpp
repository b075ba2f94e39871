// The guest's console: a 16550 UART at port 0x3f8, polled.
#pragma once

namespace umbra::guest {

/// As printf(3), with %s %c %d %u %x %lx %lu %ld %p %%, a width and a leading 0 or #. Complete lines go out
/// at once.
[[gnu::format(printf, 1, 2)]] void print(const char* format, ...);

/// Sends what print() still holds back: the unfinished last line.
void flush_console();

} // namespace umbra::guest
