// Text of the example manifest.
#include "launcher/test/example.hpp"

namespace umbra {

std::string_view example_manifest() {
    return R"toml(# Test cases for `umbra test`. This file is called umbra.toml; `umbra test FOLDER` finds all below a folder.
# The format is TOML: https://toml.io. Paths are relative to this file's folder.

# What all cases have in common: any key of a case but its name. A key of a case replaces it as a whole.
[defaults]
memory = "64M"          # K, M or G; a bare number is in MiB [128M]
timeout = "30s"         # seconds, or "500ms", "90s", "2m", "1h" [60]

# The least: the kernel shall pass. It does if it writes 0 to port 0xf4 or 0x501, or powers off.
[[case]]
name = "boot"           # unique in this file
kernel = "build/kernel.elf"

# How a guest is run, as by `umbra run`: only what differs from its defaults is needed.
[[case]]
name = "drivers"
kernel = "build/kernel.elf"
protocol = "multiboot1" # linux, linux32, pvh, multiboot1, multiboot2, elf64, elf32, flat, flat32 [as the file offers]
memory = "256M"
cpus = 1                # a guest has one
append = "test=drivers loglevel=7"           # the kernel's command line
initrd = "build/initrd.img"
modules = ["build/data.bin,a module"]        # FILE[,ARGS] for multiboot and PVH kernels
engine = "shadow"       # or "native"
cpu = "-pcid,+smap"     # features of the guest's CPU
tlb = "eager"           # "stale", "eager" or "natural"
sanitize = "tlb"        # report missing TLB invalidations; such a run does not pass
options = ["--fw-cfg", "name=opt/test,string=drivers"] # any other options of `umbra run`
keyboard = false        # true: what a conversation sends is typed on the keyboard, not into the serial port
tags = ["slow", "drivers"]                   # for `umbra test --tag slow` or --tag=-slow
# What the host must have, see `umbra probe`, or, as "!iopl", must not; elsewhere the case is skipped:
# native-ring0, iopl, cpuid, stores-seen, own-gdt, exact-cpu, exact-walks, double-faults
hosts = ["native-ring0"]

# What the console shall show: regular expressions (RE2's). The required ones in this order.
[case.console]
required = ["found \\d+ devices", "all drivers are up"]
forbidden = ["WARNING", "BUG:"]

# Bounds on the numbers of `umbra run --stats=json`: min, max or both.
[case.bounds]
"traps.count" = { max = 200000 }
"shadow.table_pages.high_water" = { min = 1, max = 4096 }

# A guest that shall fail, with this code (any, without `code`), is told from one that fails in another way. Others:
# "triple-fault", "reset", "stopped", "timed-out", "no-progress", "host-cannot", "bad-usage".
[[case]]
name = "bad-checksum"
kernel = "build/kernel.elf"
append = "test=checksum corrupt"
expect = { outcome = "failed", code = 7 }

# A kernel that panics when it is told to. Single quotes: nothing needs a backslash before it.
[[case]]
name = "panic"
kernel = "build/kernel.elf"
append = "test=panic"
expect = "reset"
console.required = ['panic: \w+']

# A conversation: when the guest has printed this, it is sent that, on its serial port or keyboard.
[[case]]
name = "shell"
kernel = "build/kernel.elf"
conversation = [
    { expect = "\\$ $", send = "uptime\n" },
    { expect = "up \\d+ s", send = "poweroff\n" },
]

# A matrix: the case is run with each combination, here 2 x 3 times, as "memory[memory=64M,tlb=natural]" and so on.
# kernel, protocol, memory, append, initrd, engine, cpu, tlb and sanitize can be in it.
[[case]]
name = "memory"
kernel = "build/kernel.elf"
append = "test=memory"
[case.matrix]
memory = ["64M", "1G"]
tlb = ["natural", "stale", "eager"]
)toml";
}

} // namespace umbra
