"""What can be said of a kernel before it runs: which pointers an address is made of, and which registers may be rubbish."""

from __future__ import annotations

from collections.abc import Sequence

from ptx.parse import Address, Instruction, Kernel, Operand, Register, Symbol

_WITHOUT_TARGET = ("st", "red", "bra", "bar", "ret")
CONTROL = ("bra", "bra.uni", "bar.sync", "ret")


def registers_of(operands: Sequence[Operand]) -> list[Register]:
    found: list[Register] = []
    for operand in operands:
        if isinstance(operand, Register):
            found.append(operand)
        elif isinstance(operand, tuple):
            found += registers_of(operand)
        elif isinstance(operand, Address) and isinstance(operand.base, Register):
            found.append(operand.base)
    return found


def split(instruction: Instruction) -> tuple[list[Register], list[Register]]:
    """The registers that an instruction writes, and those that it reads."""
    count = 0 if instruction.opcode.split(".")[0] in _WITHOUT_TARGET else 1
    return registers_of(instruction.operands[:count]), registers_of(instruction.operands[count:])


def trace_pointers(kernel: Kernel) -> list[frozenset[int]]:
    """For each register the pointer parameters that its value may be made of, by their places.

    Through shared memory pointers pass as 64 bits; what is loaded from elsewhere is made of none.
    """
    places = {parameter.name: k for k, parameter in enumerate(kernel.parameters) if parameter.pointer}
    shared = len(kernel.registers)
    made_of: list[frozenset[int]] = [frozenset()] * (shared + 1)
    moves = []
    for instruction in kernel.instructions:
        name, *modifiers = instruction.opcode.split(".")
        targets, sources = ([register.index for register in each] for each in split(instruction))
        if name == "ld" and modifiers[0] == "param":
            address = instruction.operands[-1]
            if isinstance(address, Address) and isinstance(address.base, Symbol) and address.base.name in places:
                for index in targets:
                    made_of[index] |= {places[address.base.name]}
        elif name in ("ld", "st"):
            if modifiers[0].startswith("shared") and modifiers[-1] == "b64":
                values = [register.index for register in registers_of(instruction.operands[1:])]
                moves.append((targets, [shared]) if name == "ld" else ([shared], values))
        elif name not in ("ldmatrix", "atom", "setp"):
            moves.append((targets, sources))
    changed = True
    while changed:
        changed = False
        for written, read in moves:
            found = frozenset().union(*[made_of[index] for index in read])
            for index in written:
                if not found <= made_of[index]:
                    made_of[index] |= found
                    changed = True
    return made_of


def find_doubtful(kernel: Kernel) -> frozenset[int]:
    """Registers that some thread may read before it wrote them, and those made of these.

    A guarded instruction may write nothing. Of all other registers every path to a read has a write.
    """
    parts = [split(instruction) for instruction in kernel.instructions]
    doubtful = _find_unwritten(kernel, parts)
    changed = bool(doubtful)
    while changed:
        changed = False
        for targets, sources in parts:
            if any(register.index in doubtful for register in sources):
                for register in targets:
                    if register.index not in doubtful:
                        doubtful.add(register.index)
                        changed = True
    return frozenset(doubtful)


def _find_unwritten(kernel: Kernel, parts: list[tuple[list[Register], list[Register]]]) -> set[int]:
    """By the registers that are written on every path to each straight piece of code; a set is the bits of an integer."""
    starts = _find_starts(kernel)
    written = {0: 0}
    todo, doubtful = [0], set[int]()
    while todo:
        place = todo.pop()
        now = written[place]
        while True:
            instruction = kernel.instructions[place]
            targets, sources = parts[place]
            guard = [] if instruction.guard is None else [instruction.guard[0]]
            doubtful |= {register.index for register in sources + guard if not now >> register.index & 1}
            if not guard:
                for register in targets:
                    now |= 1 << register.index
            following = _following(kernel, place)
            if following != [place + 1] or place + 1 in starts:
                break
            place += 1
        for other in following:
            before = written.get(other)
            after = now if before is None else before & now
            if after != before:
                written[other] = after
                todo.append(other)
    return doubtful


def _find_starts(kernel: Kernel) -> set[int]:
    after_control = {k + 1 for k, each in enumerate(kernel.instructions) if each.opcode in CONTROL}
    return {*kernel.labels.values(), *after_control}


def _following(kernel: Kernel, place: int) -> list[int]:
    """The instructions that may be next."""
    instruction = kernel.instructions[place]
    name = instruction.opcode.split(".")[0]
    if name == "ret":
        return []
    goals = []
    if name == "bra":
        (target,) = instruction.operands
        assert isinstance(target, Symbol)
        goals.append(kernel.labels[target.name])
    if name != "bra" or instruction.guard is not None:
        goals.append(place + 1)
    return goals
