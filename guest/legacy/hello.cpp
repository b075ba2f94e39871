// legacy_hello: the smallest 32-bit guest, for whoever boots multiboot. With "wait" on its command line it
// does not end, and its CPU is idle. Outcome: passed.
#include "guest/legacy/runtime.hpp"

using namespace umbra::legacy;

namespace {

/// Waits for an interrupt, with interrupts on, when no device may send one.
[[noreturn]] void wait() {
    constexpr uint16_t pic_mask = 0x21, second_pic_mask = 0xa1;
    out8(pic_mask, 0xff);
    out8(second_pic_mask, 0xff);
    for (;;)
        wait_for_interrupt();
}

} // namespace

extern "C" int kernel_main(uint32_t /*eax*/, uint32_t ebx) {
    constexpr uint32_t has_command_line = 1 << 2;
    constexpr unsigned command_line = 16; // in the boot information, bytes
    print("Hello from a guest kernel\n%s: passed\n", LEGACY_NAME);
    if ((memory_at<uint32_t>(ebx) & has_command_line) != 0 &&
        find_word(reinterpret_cast<const char*>(memory_at<uint32_t>(ebx + command_line)), "wait") != nullptr)
        wait();
    return 0;
}
