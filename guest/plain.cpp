// plain: a kernel of one file and no linker script, made by `g++ -nostdlib -static -Wl,-Ttext=0x100000`.
// Proves that such a file is loaded, though its headers want to lie where a PC's firmware does. Outcome:
// passed.
namespace {

void out(unsigned short port, unsigned char value) {
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

} // namespace

// Where ld has a program begin.
// NOLINTNEXTLINE(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp,readability-identifier-naming)
extern "C" [[noreturn]] void _start() {
    constexpr unsigned short serial_port = 0x3f8, exit_port = 0xf4;
    for (const char* text = "plain: passed\n"; *text != '\0'; ++text)
        out(serial_port, static_cast<unsigned char>(*text));
    out(exit_port, 0);
    for (;;)
        asm volatile("hlt");
}
