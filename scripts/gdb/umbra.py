"""umbra's commands for gdb: what `monitor` offers, with gdb's expressions, help and completion.

`umbra debug` loads this file by itself. Otherwise: (gdb) source umbra.py, before or after target remote.
"""

import re

import gdb

try:
    import gdb.disassembler
except ImportError:  # gdb 12
    pass

EVENTS = (
    "de db nmi bp of br ud nm df ts np ss gp pf mf ac mc xm cr3 msr msr= vector= triple"
).split()


def monitor(command):
    """What umbra answers to a monitor command."""
    try:
        return gdb.execute("monitor " + command, to_string=True)
    except gdb.error as error:
        if "not supported by this target" in str(error):
            raise gdb.GdbError("no guest here: connect with target remote first") from None
        raise


def address(expression):
    """The value of a gdb expression, as a number that umbra takes."""
    value = gdb.parse_and_eval(expression)
    if value.type.strip_typedefs().code in (gdb.TYPE_CODE_ARRAY, gdb.TYPE_CODE_FUNC):
        value = value.address
    return "%#x" % (int(value) & 0xFFFFFFFFFFFFFFFF)


def show(text):
    """Prints what umbra answered, headings in gdb's style for titles where gdb uses styles."""
    styled = gdb.parameter("style enabled")
    for line in text.splitlines():
        if styled and line.endswith(":"):
            line = "\033[1m%s\033[m" % line
        gdb.write(line + "\n")


class Umbra(gdb.Command):
    """Commands for a guest that umbra runs. umbra COMMAND does what monitor COMMAND does, but takes gdb's expressions
for addresses."""

    def __init__(self):
        super().__init__("umbra", gdb.COMMAND_DATA, prefix=True)


class Command(gdb.Command):
    """A command that is passed on."""

    name = ""
    words = ()  # for completion
    addresses = ()  # which arguments are expressions
    least, most = 0, 0

    def __init__(self, completion=None):
        if completion is None:
            super().__init__("umbra " + self.name, gdb.COMMAND_DATA)
        else:
            super().__init__("umbra " + self.name, gdb.COMMAND_DATA, completion)

    def invoke(self, argument, _from_tty):
        # An expression may have blanks in it where it is all there is.
        arguments = [argument] if self.most == 1 and argument.strip() else gdb.string_to_argv(argument)
        if not self.least <= len(arguments) <= self.most:
            raise gdb.GdbError("wrong number of arguments: see help umbra " + self.name)
        for index in self.addresses:
            if index < len(arguments):
                arguments[index] = address(arguments[index])
        show(self.answer(arguments))

    def answer(self, arguments):
        return monitor(" ".join([self.name] + arguments))

    def choices(self, _text, word):
        return [choice for choice in self.words if choice.startswith(word)]


class Translate(Command):
    """How an address is translated: the guest's page tables and umbra's shadow of them, level by level.
Usage: umbra pt EXPRESSION"""

    name, least, most, addresses = "pt", 1, 1, (0,)


class VirtualToPhysical(Command):
    """The physical address behind a virtual one.
Usage: umbra vtop EXPRESSION"""

    name, least, most, addresses = "vtop", 1, 1, (0,)


class PhysicalToVirtual(Command):
    """The virtual addresses, in this address space, of a physical one.
Usage: umbra ptov EXPRESSION"""

    name, least, most, addresses = "ptov", 1, 1, (0,)


class Maps(Command):
    """What is mapped, in ranges: by the guest's tables, or in umbra's shadow of them.
Usage: umbra maps [guest|shadow]"""

    name, most, words = "maps", 1, ("guest", "shadow")
    complete = Command.choices


class Traps(Command):
    """The last traps: why the machine left the guest.
Usage: umbra traps [N]"""

    name, most = "traps", 1


class Registers(Command):
    """All registers, with their flags in words."""

    name = "regs"


class Stats(Command):
    """What the run has cost so far."""

    name = "stats"


class Trace(Command):
    """Writes every trap to a file.
Usage: umbra trace on FILE | off"""

    name, least, most, words = "trace", 1, 2, ("on", "off")
    complete = Command.choices


class Catch(Command):
    """Stops at events before the guest sees them, or lists what is caught.
Usage: umbra catch [EVENT...]
EVENT: an exception (pf, gp, ud, df ...), vector=N, cr3, msr, msr=INDEX, triple."""

    name, most, words = "catch", 64, EVENTS
    complete = Command.choices


class Uncatch(Command):
    """No longer stops at events.
Usage: umbra uncatch all | EVENT..."""

    name, least, most, words = "uncatch", 1, 64, ["all"] + EVENTS
    complete = Command.choices


class WatchPhysical(Command):
    """Stops when physical memory is written to (w), read from (r) or accessed (a); without arguments: lists.
Usage: umbra watch-phys [ADDRESS LENGTH [w|r|a]]"""

    name, most, addresses = "watch-phys", 3, (0, 1)

    def answer(self, arguments):
        return monitor(" ".join(["watch"] + (["phys"] + arguments if arguments else [])))


class UnwatchPhysical(Command):
    """No longer watches physical memory.
Usage: umbra unwatch-phys [ADDRESS LENGTH [w|r|a]]     all, without arguments"""

    name, most, addresses = "unwatch-phys", 3, (0, 1)

    def answer(self, arguments):
        return monitor(" ".join(["unwatch"] + (["phys"] + arguments if arguments else ["all"])))


class Bind(Command):
    """Breakpoints and watchpoints at an address, set now or later, stop the guest in one address space only.
Usage: umbra bind EXPRESSION [current|CR3|any]"""

    name, least, most, addresses, words = "bind", 1, 2, (0,), ("current", "any")
    complete = Command.choices


class HiddenBreakpoints(Command):
    """Breakpoints that leave the guest's code as it is, for code that reads itself.
Usage: umbra hidden-breakpoints on|off"""

    name, least, most, words = "hidden-breakpoints", 1, 1, ("on", "off")
    complete = Command.choices


class StepInterrupts(Command):
    """Whether a step may end in an interrupt's handler.
Usage: umbra step-interrupts on|off"""

    name, least, most, words = "step-interrupts", 1, 1, ("on", "off")
    complete = Command.choices


class Core(Command):
    """Writes the guest's memory and registers to a file that gdb opens.
Usage: umbra core FILE"""

    name, least, most = "core", 1, 1


class Reset(Command):
    """Loads the kernel and starts it anew, stopped at its first instruction."""

    name = "reset"

    def answer(self, arguments):
        text = super().answer(arguments)
        gdb.execute("maintenance flush register-cache", to_string=True)
        read_description()
        return text


class Physical(gdb.Function):
    """The physical address behind a virtual one: $umbra_vtop(EXPRESSION)."""

    def __init__(self):
        super().__init__("umbra_vtop")

    def invoke(self, value):
        text = monitor("vtop %#x" % (int(value) & 0xFFFFFFFFFFFFFFFF))
        found = re.search(r"-> gpa:(0x[0-9a-f]+)", text)
        if not found:
            raise gdb.GdbError(text.strip())
        return gdb.Value(int(found.group(1), 16))


def read_description():
    """Asks umbra anew which registers there are: it tells those of the guest's mode, unless it was told otherwise."""
    if not gdb.parameter("tdesc filename"):  # the user's own
        gdb.execute("unset tdesc filename", to_string=True)


def follow_into_64_bit_code(_event):
    """A kernel whose file is 32-bit has gone on to 64-bit code: all of its registers are to be seen."""
    try:
        frame = gdb.newest_frame()
        if frame.architecture().name() == "i386" and int(frame.read_register("code_bits")) == 64:
            read_description()
    except (gdb.error, ValueError):  # no guest of umbra's
        pass


def architectures(*names):
    """gdb's view of these architectures, which it has of that of an inferior only."""
    found = {}
    chosen, home = gdb.parameter("architecture"), gdb.selected_inferior().num
    gdb.execute("add-inferior -no-connection", to_string=True)
    guise = gdb.inferiors()[-1] if gdb.inferiors()[-1].num != home else gdb.inferiors()[0]
    try:
        gdb.execute("with suppress-cli-notifications on -- inferior %d" % guise.num, to_string=True)
        for name in names:
            gdb.execute("set architecture " + name, to_string=True)
            found[name] = guise.architecture()
        gdb.execute("set architecture " + (chosen or "auto"), to_string=True)
    finally:
        gdb.execute("with suppress-cli-notifications on -- inferior %d" % home, to_string=True)
        gdb.execute("remove-inferiors %d" % guise.num, to_string=True)
    return found


if hasattr(gdb, "disassembler"):

    class OldCode(gdb.disassembler.Disassembler):
        """Code of a 64-bit kernel that is not in 64-bit mode yet: of which addresses, only the CPU's mode tells."""

        def __init__(self):
            super().__init__("umbra")
            known = architectures("i386", "i8086")
            self.by_bits = {32: known["i386"], 16: known["i8086"]}

        def __call__(self, info):
            try:
                bits = int(gdb.newest_frame().read_register("code_bits"))
            except (gdb.error, ValueError):
                return None
            if bits not in self.by_bits or info.address >> 32 != 0:
                return None
            instruction = self.by_bits[bits].disassemble(info.address)[0]
            return gdb.disassembler.DisassemblerResult(instruction["length"], instruction["asm"])

    gdb.disassembler.register_disassembler(OldCode(), "i386:x86-64")

gdb.events.stop.connect(follow_into_64_bit_code)
Umbra()
for command in (Translate, VirtualToPhysical, PhysicalToVirtual, WatchPhysical, UnwatchPhysical):
    command(gdb.COMPLETE_EXPRESSION)
for command in (Traps, Registers, Stats, Reset):
    command(gdb.COMPLETE_NONE)
Core(gdb.COMPLETE_FILENAME)
for command in (Maps, Trace, Catch, Uncatch, Bind, HiddenBreakpoints, StepInterrupts):
    command()
Physical()
