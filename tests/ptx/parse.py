"""PTX text -> a kernel: its parameters, registers, instructions and labels.

Notation follows the PTX ISA: `@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd3+8];` is an instruction with a guard predicate, an
opcode, a vector of registers and an address.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


class PtxError(Exception):
    """What a kernel does and no correct one would, or what the machine does not know."""


@dataclass(frozen=True, slots=True)
class Register:
    """A register, by its place among the kernel's. bits: 1 (a predicate), 16, 32 or 64."""

    index: int
    name: str
    bits: int


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant as the bits of an integer; `kind` is "int", or "f32" or "f64" where it was written as one."""

    value: int
    kind: str = "int"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A special register, a parameter, shared memory or a label."""

    name: str


@dataclass(frozen=True, slots=True)
class Address:
    base: Register | Symbol
    offset: int


Operand = Register | Immediate | Symbol | Address | tuple["Operand", ...]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        line: its line in the PTX, from 1.
        guard: the predicate it is executed under, and whether that is negated.
    """

    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None = None

    def error(self, problem: object) -> PtxError:
        return PtxError(f"PTX line {self.line}, {self.text}: {problem}")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A kernel's parameter: its type, such as "u64", and whether it is declared a pointer."""

    name: str
    type: str
    pointer: bool


@dataclass(frozen=True, slots=True)
class Kernel:
    """A parsed kernel.

    Attributes:
        threads: threads of a block.
        registers: all of them, by index.
        labels: the instruction each label stands before.
    """

    name: str
    parameters: tuple[Parameter, ...]
    threads: int
    registers: tuple[Register, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{\s*$(.*?)^\}", re.DOTALL | re.MULTILINE)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(\.ptr\b.*?)?(\w+)$")
_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?$", re.DOTALL)
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*")
_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]$")
# What says nothing of a kernel's results; a pragma tells the assembler of bytes of a load that are not used.
_IGNORED_DIRECTIVES = (".loc", ".pragma")


def load(ptx: str) -> Kernel:
    """Parse the one kernel of a module.

    Raises:
        PtxError: no kernel or several, a block size that is not fixed, or text that is no known PTX.
    """
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise PtxError(f"ptx: {len(entries)} kernels with a body; pass a module of one")
    (entry,) = entries
    name, head, attributes, body = entry.groups()
    threads = re.search(r"\.reqntid\s+(\d+)\s*(?:,\s*1\s*,\s*1\s*)?$", attributes.strip())
    if threads is None or int(threads[1]) % 32:
        declared = attributes.strip() or "no block size"
        raise PtxError(f"{name}: {declared}; a kernel needs .reqntid of whole warps in one dimension")
    registers: dict[str, Register] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line, text in _statements(body, ptx.count("\n", 0, entry.start(4)) + 1):
        if text.endswith(":"):
            labels[text[:-1]] = len(instructions)
        elif text.startswith(".reg"):
            _declare(text, line, registers)
        elif not text.startswith(_IGNORED_DIRECTIVES):
            instructions.append(_parse(text, line, registers))
    parameters = tuple(_parameter(each, name) for each in head.split(",") if each.strip())
    return Kernel(name, parameters, int(threads[1]), tuple(registers.values()), tuple(instructions), labels)


def _statements(body: str, line: int) -> Iterator[tuple[int, str]]:
    """Statements and labels with their lines."""
    for number, text in enumerate(body.split("\n"), line):
        for part in text.split("//")[0].split(";"):
            if part.strip():
                yield number, part.strip()


def _parameter(text: str, kernel: str) -> Parameter:
    found = _PARAMETER.match(text.strip())
    if found is None:
        raise PtxError(f"{kernel}: parameter {text.strip()!r} is not understood")
    return Parameter(found[3], found[1], found[2] is not None)


def _declare(text: str, line: int, registers: dict[str, Register]) -> None:
    found = re.match(r"\.reg\s+\.(pred|[bsuf](16|32|64))\s+(%\w+)<(\d+)>$", text)
    if found is None:
        raise PtxError(f"PTX line {line}, {text}: a declaration that is not understood")
    for k in range(int(found[4])):
        name = f"{found[3]}{k}"
        registers[name] = Register(len(registers), name, int(found[2] or 1))


def _parse(text: str, line: int, registers: dict[str, Register]) -> Instruction:
    found = _INSTRUCTION.match(text)
    if found is None:
        raise PtxError(f"PTX line {line}, {text}: not understood")
    negated, predicate, opcode, operands = found.groups()
    try:
        guard = (registers[predicate], negated == "!") if predicate else None
        parsed = tuple(_operand(each.strip(), registers) for each in _OPERANDS.findall(operands or ""))
    except (KeyError, ValueError) as error:
        raise PtxError(f"PTX line {line}, {text}: operand {error} is not understood") from None
    return Instruction(line, " ".join(text.split()), opcode, parsed, guard)


def _operand(text: str, registers: dict[str, Register]) -> Operand:
    if text in registers:
        return registers[text]
    if text[0] == "{":
        return tuple(_operand(each.strip(), registers) for each in text[1:-1].split(","))
    if text[0] == "[":
        found = _ADDRESS.match(text)
        if found is None:
            raise ValueError(text)
        base = registers.get(found[1]) or Symbol(found[1])
        return Address(base, int(found[2] or "0", 0))
    if text[:2] in ("0f", "0d"):
        return Immediate(int(text[2:], 16), "f32" if text[1] == "f" else "f64")
    if re.match(r"-?\d", text):
        return Immediate(int(text.removesuffix("U"), 0))
    if not re.match(r"(%(tid|ctaid|nctaid)\.[xyz]|[$A-Za-z_][\w$]*)$", text):
        raise ValueError(text)
    return Symbol(text)
