#!/usr/bin/env python3
"""What scripts/bench --counted does besides starting machines.

    counted.py measure shadow|native BUILD KERNEL INITRAMFS
    counted.py table|update SHADOW NATIVE NPT0
    counted.py check SHADOW

measure: in a machine whose clock counts instructions; prints the figures of an engine as JSON. The others take files of
these: of the shadow engine, of the native one, and of the native one where KVM shadows page tables. table prints them;
update makes them the last figures, counted.json, too; check compares with those, and exits with 1 if one has grown. The
exit code is 3 if something could not be measured or compared.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

LAST_FIGURES = pathlib.Path(__file__).with_name("counted.json")
TOLERANCE = 0.03
COLUMNS = {"native": "native", "npt0": "KVM npt=0", "umbra": "umbra", "exits": "umbra, exits"}

# What guest/costs.cpp and tests/bench/linux_init.cpp call their operations, and what people do.
GUEST = {
    "instruction": "emulated instruction",
    "hidden-fault": "hidden fault",
    "delivered-fault": "delivered fault",
    "system-call": "system call",
    "timer-tick": "timer tick",
    "switch-1": "context switch, 1 space",
    "switch-16": "context switch, 16 spaces",
    "switch-256": "context switch, 256 spaces",
    "invlpg": "INVLPG and next use",
}
LINUX = {
    "getpid": "Linux: getpid",
    "pipe-round-trip": "Linux: pipe round trip",
    "fork": "Linux: fork, wait",
    "fork-exec": "Linux: fork, exec, wait",
    "page-touch": "Linux: first touch of a page",
}

# A run with few batches tells what else it costs; of many the median counts. Those of Linux are shorter.
FEW, MANY, MANY_OF_LINUX = 1, 9, 193
STARTS = 15


def fail(message):
    print(f"counted.py: {message}", file=sys.stderr)
    sys.exit(3)


@dataclass
class Ended:
    """A command that has ended well."""

    repetitions: dict  # of each operation, in a batch
    instructions: dict  # of each operation
    error: str  # what it said there

    @property
    def exits(self):
        return json.loads(self.error)["exits"]


def run(*command):
    words = [str(word) for word in command]
    ended = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode != 0:
        fail(f"{' '.join(words)}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}")
    lines = re.findall(r"^costs: (\S+): (\d+) in (\d+) ticks\r?$", ended.stdout, re.MULTILINE)
    return Ended(
        {name: int(count) for name, count, _ in lines},
        {name: int(ticks) / int(count) for name, count, ticks in lines},
        ended.stderr,
    )


def measure(engine, build, kernel, initramfs):
    build = pathlib.Path(build)
    # In memory, so that it does not matter how files come into the machine.
    programs = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm"))
    for name in ("umbra", "umbra_bench_bare"):
        shutil.copy(build / name, programs)
    umbra = [programs / "umbra", "run", "--engine", engine, "--log-level", "error"]
    figures = {}

    def note(label, instructions, exits=None):
        figures[label] = {"instructions": round(instructions, 1 if instructions < 100 else None)}
        if exits is not None:
            figures[label]["exits"] = round(exits, 2)

    def start(times, *command):
        return run(build / "umbra_bench_start", times, *command)

    def operations(names, most, *guest):
        """Notes what each costs, in a guest that takes words NAME=BATCHES."""

        def run_guest(batches):
            return run(*umbra, "--stats=json", *guest, *(f"{name}={count}" for name, count in batches.items()))

        if engine == "native":  # whose exits are not told, so one run is enough
            many = run_guest(dict.fromkeys(names, most))
            for name, label in names.items():
                note(label, many.instructions[name])
            return
        few = run_guest(dict.fromkeys(names, FEW))
        for name, label in names.items():
            many = run_guest(dict.fromkeys(names, FEW) | {name: most})
            exits = (many.exits - few.exits) / ((most - FEW) * many.repetitions[name])
            note(label, many.instructions[name], exits)

    for name, label in GUEST.items():
        operations({name: label}, MANY, build / "guest/costs", "--")
    # Nothing at random, and no more on the console than needs be.
    linux = ["-m", "256M", "--initrd", initramfs, kernel, "--"]
    linux += ["console=ttyS0", "quiet", "panic=-1", "nokaslr", "norandmaps"]
    operations(LINUX, MANY_OF_LINUX, *linux)
    boot = start(1, *umbra, "--stats=json", "--expect", "costs: init", *linux)
    note("Linux: start to /init", boot.instructions["start"], boot.exits)
    hello = build / "guest/hello"
    note("hello: start to exit", start(STARTS, *umbra, hello).instructions["start"], run(*umbra, "--stats=json", hello).exits)
    if engine == "native":
        note("bare KVM program: start to exit", start(STARTS, programs / "umbra_bench_bare").instructions["start"])
    json.dump(figures, sys.stdout)


def gather(shadow, native, npt0):
    """Of each operation the columns that it has."""
    sources = {"native": native, "npt0": npt0, "umbra": shadow}
    figures = {}
    for label in native:
        row = {column: source[label]["instructions"] for column, source in sources.items() if label in source}
        if label in shadow:
            row["exits"] = shadow[label]["exits"]
        figures[label] = row
    return figures


def print_table(figures):
    print(f"{'instructions':34}" + "".join(f"{heading:>16}" for heading in COLUMNS.values()))
    for label, row in figures.items():
        print(f"{label:34}" + "".join(f"{f'{row[column]:,}' if column in row else '':>16}" for column in COLUMNS))


def write_last(figures):
    """A line for each operation, so that a change shows which."""
    lines = (f"  {json.dumps(label)}: {json.dumps(row)}" for label, row in figures.items())
    LAST_FIGURES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def check(shadow):
    """Tells each figure of the shadow engine that is no longer what it was; whether none has grown."""
    last = json.loads(LAST_FIGURES.read_text(encoding="utf-8"))
    last = {label: row for label, row in last.items() if "umbra" in row}
    if last.keys() != shadow.keys():
        fail(f"{LAST_FIGURES.name} is of other operations: scripts/bench --counted --update")
    grown = shrunk = 0
    for label, figures in shadow.items():
        for column, key in {"umbra": "instructions", "exits": "exits"}.items():
            before, now = last[label][column], figures[key]
            if now > before * (1 + TOLERANCE):
                grown += 1
            elif now < before * (1 - TOLERANCE):
                shrunk += 1
            else:
                continue
            print(f"{label}: {before:,} -> {now:,} {key}" + (f", {now / before - 1:+.1%}" if before else ""))
    print(f"Of {2 * len(shadow)} figures {grown} have grown by more than {TOLERANCE:.0%}, and {shrunk} have shrunk")
    if shrunk and not grown:
        print("Keep what was gained: scripts/bench --counted --update")
    return grown == 0


def main(action, *arguments):
    if action == "measure":
        measure(*arguments)
        return
    measured = [json.loads(pathlib.Path(file).read_text(encoding="utf-8")) for file in arguments]
    if action == "check":
        sys.exit(0 if check(*measured) else 1)
    figures = gather(*measured)
    print_table(figures)
    if action == "update":
        write_last(figures)


if __name__ == "__main__":
    main(*sys.argv[1:])
