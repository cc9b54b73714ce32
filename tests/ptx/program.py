"""A parsed kernel -> steps that a run takes: each instruction bound to its operands once, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.flow import CONTROL, find_doubtful, registers_of, trace_pointers
from ptx.instructions import ARITHMETIC, TYPES, explain_unknown
from ptx.memory import UNSIGNED
from ptx.parse import Address, Immediate, Instruction, Kernel, Operand, Parameter, PtxError, Register, Symbol

if TYPE_CHECKING:
    from ptx.execute import Run

# What a step is taken for: a slice or sorted indices of threads.
Lanes = Any
Step = Callable[["Run", Lanes], None]
Read = Callable[["Run", Lanes], Any]
Write = Callable[["Run", Any, Lanes], None]

_EVERY_LANE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Access:
    """What a memory instruction touches.

    Attributes:
        space: "global" or "shared".
        kind: "read", "write" or "atomic".
        width, count: bytes of a cell, and cells of each thread.
        parameters: the pointers that its address may be made of, by their places among the kernel's parameters.
    """

    space: str
    kind: str
    width: int
    count: int
    parameters: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel ready to run.

    Attributes:
        steps: one for each instruction that is not one of control.
        ends: for each instruction the next one that threads may meet at, or part: a label or one of control.
        accesses: by instruction.
    """

    kernel: Kernel
    steps: tuple[Step | None, ...]
    ends: tuple[int, ...]
    accesses: dict[int, Access]


def prepare(kernel: Kernel) -> Program:
    """Bind every instruction.

    Raises:
        PtxError: one that the machine does not know.
    """
    for instruction in kernel.instructions:
        if instruction.opcode in CONTROL:
            _check_control(kernel, instruction)
    pointers, bind = trace_pointers(kernel), _Binder(kernel, find_doubtful(kernel))
    steps: list[Step | None] = []
    accesses: dict[int, Access] = {}
    for k, instruction in enumerate(kernel.instructions):
        access = _find_access(instruction, pointers)
        if access is not None:
            accesses[k] = access
        try:
            steps.append(None if instruction.opcode in CONTROL else bind(instruction, k, access))
        except PtxError as error:
            raise instruction.error(error) from None
    stops = set(kernel.labels.values()) | {k for k, step in enumerate(steps) if step is None}
    ends: list[int] = []
    end = len(steps)
    for k in reversed(range(len(steps))):
        # From a label on, the next stop behind it; control stops at itself.
        ends.append(end if steps[k] is not None else k)
        if k in stops:
            end = k
    return Program(kernel, tuple(steps), tuple(reversed(ends)), accesses)


def _check_control(kernel: Kernel, instruction: Instruction) -> None:
    name = instruction.opcode.split(".")[0]
    operand = instruction.operands[0] if len(instruction.operands) == 1 else None
    fine = {
        "bra": isinstance(operand, Symbol) and operand.name in kernel.labels,
        "bar": operand == Immediate(0) and instruction.guard is None,
        "ret": not instruction.operands and instruction.guard is None,
    }
    if not fine[name]:
        raise instruction.error("unknown form")


def _find_access(instruction: Instruction, pointers: list[frozenset[int]]) -> Access | None:
    opcode = instruction.opcode.replace("shared::cta", "shared")
    name, *modifiers = opcode.split(".")
    space = next((space for space in ("global", "shared") if space in modifiers), None)
    if name not in ("ld", "st", "atom", "red", "ldmatrix") or space is None:
        return None
    addresses = [operand for operand in instruction.operands if isinstance(operand, Address)]
    if len(addresses) != 1 or modifiers[-1] not in TYPES:
        return None
    made_of = frozenset().union(*[pointers[register.index] for register in registers_of(addresses)])
    kind = {"ld": "read", "ldmatrix": "read", "st": "write"}.get(name, "atomic")
    # A row of a matrix is 16 bytes.
    width, count = (4, 4) if name == "ldmatrix" else (np.dtype(TYPES[modifiers[-1]]).itemsize, 1)
    for modifier in modifiers:
        if modifier in ("v2", "v4"):
            count = int(modifier[1:])
    return Access(space, kind, width, count, made_of)


def parameter_size(parameter: Parameter) -> int:
    """Bytes of a parameter's value."""
    return int(parameter.type[1:]) // 8


def _expect(instruction: Instruction, count: int) -> tuple[Operand, ...]:
    if len(instruction.operands) != count:
        raise PtxError(f"{len(instruction.operands)} operands, {count} are known")
    return instruction.operands


def _vector(operand: Operand, count: int) -> tuple[Operand, ...]:
    parts = operand if isinstance(operand, tuple) else (operand,)
    if len(parts) != count:
        raise PtxError(f"a vector of {len(parts)}, the instruction takes {count}")
    return parts


def _unsigned(dtype: Any) -> Any:
    """What a register holds values of a type as."""
    return np.bool_ if dtype is np.bool_ else UNSIGNED[np.dtype(dtype).itemsize]


class _Binder:
    """Makes steps of a kernel's instructions. `doubtful` are the registers whose every read is to be checked."""

    def __init__(self, kernel: Kernel, doubtful: frozenset[int]) -> None:
        self._kernel, self._doubtful = kernel, doubtful

    def __call__(self, instruction: Instruction, place: int, access: Access | None) -> Step:
        opcode = instruction.opcode.replace("shared::cta", "shared")
        if opcode in ARITHMETIC:
            step = self._arithmetic(instruction)
        elif opcode in _OTHERS:
            step = _OTHERS[opcode](self, instruction)
        elif opcode in _MEMORY and access is not None:
            step = _MEMORY[opcode](self, instruction, place, access)
        else:
            raise PtxError(explain_unknown(opcode))
        if instruction.guard is None:
            return step
        predicate, negated = instruction.guard
        holds = self.use(predicate, np.bool_)

        def guarded(run: Run, lanes: Lanes) -> None:
            chosen = run.choose(holds(run, lanes) != negated, lanes)
            if chosen is not None:
                step(run, chosen)

        return guarded

    # Operands

    def read(self, operand: Operand, dtype: Any) -> Read:
        """An operand as an array of a numpy type (or one number, where it is constant)."""
        bits = 1 if dtype is np.bool_ else 8 * np.dtype(dtype).itemsize
        if isinstance(operand, Register):
            if operand.bits != bits:
                raise PtxError(f"{operand.name} has {operand.bits} bits, the instruction takes {bits}")
            index = operand.index
            if index in self._doubtful:
                return lambda run, lanes: run.read_doubtful(operand, lanes).view(dtype)
            if dtype is _unsigned(dtype):
                return lambda run, lanes: run.registers[index][lanes]
            return lambda run, lanes: run.registers[index][lanes].view(dtype)
        if isinstance(operand, Immediate):
            constant = _constant(operand, dtype)
            return lambda run, lanes: constant
        if operand == Symbol("global_smem"):
            # Shared memory begins at address 0.
            zero = dtype(0)
            return lambda run, lanes: zero
        if isinstance(operand, Symbol) and operand.name[0] == "%":
            name = operand.name
            return lambda run, lanes: run.special[name][lanes].astype(dtype)
        raise PtxError(f"operand {operand} is unknown")

    def use(self, operand: Operand, dtype: Any) -> Read:
        """As `read`, of what decides where threads go or what memory holds: rubbish is an error there."""
        read = self.read(operand, dtype)
        if not any(register.index in self._doubtful for register in registers_of([operand])):
            return read
        return lambda run, lanes: run.use(read(run, lanes))

    def write(self, operand: Operand, dtype: Any, *wider: int, by_halves: bool = False) -> Write:
        """A function that puts values of a numpy type into a register of as many bits, or of one of `wider`.

        Args:
            by_halves: each half of the values is made of the operands' same halves.
        """
        bits = 1 if dtype is np.bool_ else 8 * np.dtype(dtype).itemsize
        if not isinstance(operand, Register) or operand.bits not in (bits, *wider):
            raise PtxError(f"the result goes to {operand}, a register of {bits} bits was expected")
        index, holds = operand.index, np.bool_ if operand.bits == 1 else UNSIGNED[operand.bits // 8]
        if index in self._doubtful:
            return lambda run, values, lanes: run.write_doubtful(operand, values.view(holds), lanes, by_halves)
        if dtype is holds:
            return lambda run, values, lanes: run.write(index, holds, values, lanes)
        if operand.bits == bits:
            return lambda run, values, lanes: run.write(index, holds, values.view(holds), lanes)
        return lambda run, values, lanes: run.write(index, holds, values.astype(holds), lanes)

    def address(self, operand: Operand, access: Access) -> Read:
        dtype = np.uint64 if access.space == "global" else np.uint32
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} is no address")
        base = self.use(operand.base, dtype)
        if not operand.offset:
            return base
        offset = dtype(operand.offset % (1 << 8 * np.dtype(dtype).itemsize))
        return lambda run, lanes: base(run, lanes) + offset

    # Arithmetic

    def _arithmetic(self, instruction: Instruction) -> Step:
        if any(isinstance(operand, tuple) for operand in instruction.operands):
            return self._move_halves(instruction)
        known = ARITHMETIC[instruction.opcode]
        target, *sources = _expect(instruction, 1 + len(known.operands))
        write = self.write(target, known.result, by_halves=instruction.opcode.endswith("x2"))
        function = known.function
        reads = [self.read(*each) for each in zip(sources, known.operands, strict=True)]
        if len(reads) == 2:
            first, second = reads
            return lambda run, lanes: write(run, function(first(run, lanes), second(run, lanes)), lanes)
        return lambda run, lanes: write(run, function(*[read(run, lanes) for read in reads]), lanes)

    def _move_halves(self, instruction: Instruction) -> Step:
        """A register taken apart into halves, or made of them; the first is the low one."""
        target, source = _expect(instruction, 2)
        if instruction.opcode not in ("mov.b32", "mov.b64"):
            raise PtxError("unknown form")
        whole = TYPES[instruction.opcode[4:]]
        half = UNSIGNED[np.dtype(whole).itemsize // 2]
        if isinstance(target, tuple):
            read = self.read(source, whole)
            # Where only one half is wanted, the other's place has a `_`.
            halves = [(k, self.write(each, half)) for k, each in enumerate(_vector(target, 2)) if each != Symbol("_")]

            def take_apart(run: Run, lanes: Lanes) -> None:
                for k, write in halves:
                    values = np.ascontiguousarray(read(run, lanes)).view(half)[k::2].copy()
                    rubbish = run.take_rubbish()
                    run.set_rubbish(None if rubbish is None else rubbish & (1 << k), None)
                    write(run, values, lanes)

            return take_apart
        write = self.write(target, whole, by_halves=True)
        read_low, read_high = (self.read(each, half) for each in _vector(source, 2))
        shift = whole(8 * np.dtype(half).itemsize)

        def put_together(run: Run, lanes: Lanes) -> None:
            low = read_low(run, lanes).astype(whole)
            rubbish = run.take_rubbish()
            high = read_high(run, lanes).astype(whole)
            run.set_rubbish(rubbish, run.take_rubbish())
            write(run, high << shift | low, lanes)

        return put_together

    # Memory

    def load(self, instruction: Instruction, place: int, access: Access) -> Step:
        target, source = _expect(instruction, 2)
        address, width = self.address(source, access), access.width
        # Into a wider register the value is zero-extended.
        wider = [bits for bits in (16, 32, 64) if bits > 8 * width]
        writes = [self.write(each, UNSIGNED[width], *wider) for each in _vector(target, access.count)]

        def step(run: Run, lanes: Lanes) -> None:
            data, cells = run.locate(place, access, address(run, lanes), lanes)
            for k, write in enumerate(writes):
                write(run, data.read(cells + k if k else cells, width), lanes)

        return step

    def store(self, instruction: Instruction, place: int, access: Access) -> Step:
        target, source = _expect(instruction, 2)
        address, width = self.address(target, access), access.width
        dtype = UNSIGNED[width]
        # Of a wider register the low bits.
        reads = [
            self.use(each, UNSIGNED[max(width, each.bits // 8)] if isinstance(each, Register) else dtype)
            for each in _vector(source, access.count)
        ]

        def step(run: Run, lanes: Lanes) -> None:
            values = [read(run, lanes).astype(dtype, copy=False) for read in reads]
            data, cells = run.locate(place, access, address(run, lanes), lanes, values)
            for k, each in enumerate(values):
                data.write(cells + k if k else cells, width, each)

        return step

    def atomic(self, instruction: Instruction, place: int, access: Access) -> Step:
        *target, location, source = _expect(instruction, 3 if instruction.opcode.startswith("atom") else 2)
        _, _, scope, order, operation, kind = instruction.opcode.split(".")
        dtype = TYPES[kind]
        address, value = self.address(location, access), self.use(source, dtype)
        write = self.write(target[0], dtype) if target else None
        # A narrower scope orders nothing between blocks.
        orders = scope in ("gpu", "sys") and order != "relaxed"
        combine = _COMBINE[operation]

        def step(run: Run, lanes: Lanes) -> None:
            data, cells = run.locate(place, access, address(run, lanes), lanes)
            data.read(cells, access.width)
            turns = run.turns(len(cells))
            if orders:
                run.synchronise(place, access, cells[turns], lanes, turns, order)
            memory = data.cells(access.width).view(dtype)
            values = np.broadcast_to(value(run, lanes), cells.shape)
            if write is None:
                combine.at(memory, cells, values)
                return
            before = np.empty(len(cells), dtype)
            for turn in turns.tolist():
                cell = cells[turn]
                before[turn] = memory[cell]
                memory[cell] = combine(memory[cell], values[turn])
            write(run, before, lanes)

        return step

    def load_matrix(self, instruction: Instruction, place: int, access: Access) -> Step:
        """Four 8 x 8 matrices of 16 bits: thread l of a warp has the address of row l % 8 of matrix l // 8."""
        target, source = _expect(instruction, 2)
        address = self.address(source, access)
        writes = [self.write(each, np.uint32) for each in _vector(target, 4)]
        lane = np.arange(32)

        def step(run: Run, lanes: Lanes) -> None:
            run.check_whole_warps(lanes)
            data, cells = run.locate(place, access, address(run, lanes), lanes)
            rows = cells.reshape(-1, 32)
            for k, write in enumerate(writes):
                write(run, data.read(rows[:, 8 * k + lane // 4] + lane % 4, 4).reshape(-1), lanes)

        return step

    def load_parameter(self, instruction: Instruction) -> Step:
        target, source = _expect(instruction, 2)
        dtype = TYPES[instruction.opcode.split(".")[-1]]
        size = np.dtype(dtype).itemsize
        if not isinstance(source, Address) or not isinstance(source.base, Symbol) or source.offset:
            raise PtxError("unknown form")
        names = [parameter.name for parameter in self._kernel.parameters]
        if source.base.name not in names:
            raise PtxError("no such parameter")
        place = names.index(source.base.name)
        if parameter_size(self._kernel.parameters[place]) != size:
            raise PtxError(f"a parameter of type {self._kernel.parameters[place].type}")
        # Into a wider register the value is sign-extended, or zero-extended.
        write = self.write(target, dtype, 64)
        return lambda run, lanes: write(run, UNSIGNED[size](run.parameters[place]).view(dtype), lanes)

    # Between the threads of a warp

    def shuffle(self, instruction: Instruction) -> Step:
        """Values of another thread of the warp, or one's own where there is none."""
        target, source, distance, clamp, mask = _expect(instruction, 5)
        kind = instruction.opcode.split(".")[2]
        if mask not in (Immediate(-1), Immediate(_EVERY_LANE)) or clamp != Immediate(0 if kind == "up" else 31):
            raise PtxError("unknown form: only whole warps take part")
        write, lane = self.write(target, np.uint32), np.arange(32)
        read, read_distance = self.read(source, np.uint32), self.use(distance, np.uint32)
        find: Callable[[Any], Any] = {
            "bfly": lambda by: lane ^ by,
            "up": lambda by: np.where(lane >= by, lane - by, lane),
            "down": lambda by: np.where(lane + by < 32, lane + by, lane),
            "idx": lambda by: by + 0 * lane,
        }[kind]
        fixed = find(distance.value % 32)[None] if isinstance(distance, Immediate) else None

        def step(run: Run, lanes: Lanes) -> None:
            run.check_whole_warps(lanes)
            where = fixed
            if where is None:
                where = find(read_distance(run, lanes).astype(np.int64).reshape(-1, 32) % 32)
            values = read(run, lanes).reshape(-1, 32)
            run.share_rubbish(lambda rubbish: np.take_along_axis(rubbish, where, 1))
            write(run, np.take_along_axis(values, where, 1).reshape(-1), lanes)

        return step

    def wait_for_launch(self, instruction: Instruction) -> Step:
        """For the end of the launch before, which has ended here."""
        _expect(instruction, 0)
        return lambda run, lanes: None

    def reduce(self, instruction: Instruction) -> Step:
        target, source, mask = _expect(instruction, 3)
        _, _, operation, kind = instruction.opcode.split(".")
        dtype = TYPES[kind]
        write, read, read_mask = self.write(target, dtype), self.read(source, dtype), self.use(mask, np.uint32)
        combine = _COMBINE[operation]

        def step(run: Run, lanes: Lanes) -> None:
            run.check_whole_warps(lanes)
            if (read_mask(run, lanes) != _EVERY_LANE).any():
                raise PtxError("unknown form: only whole warps take part")
            values = read(run, lanes).reshape(-1, 32)
            run.share_rubbish(lambda rubbish: rubbish.max(1, keepdims=True))
            write(run, np.repeat(combine.reduce(values, axis=1, dtype=dtype), 32), lanes)

        return step


def _constant(operand: Immediate, dtype: Any) -> Any:
    size = np.dtype(dtype).itemsize
    if operand.kind != "int" and size != int(operand.kind[1:]) // 8:
        raise PtxError(f"a constant of {operand.kind}, the instruction takes {8 * size} bits")
    if dtype is np.bool_:
        return np.bool_(operand.value & 1)
    if np.dtype(dtype).kind == "f" and operand.kind == "int":
        raise PtxError("an integer where the instruction takes a floating-point number")
    return UNSIGNED[size](operand.value & ((1 << 8 * size) - 1)).view(dtype)


_COMBINE: dict[str, np.ufunc] = {"add": np.add, "max": np.maximum, "min": np.minimum}
_CELLS = ("b8", "b16", "b32", "b64")
# A thread's access has at most 16 bytes.
_VECTORS = [f".v{count}.{kind}" for count in (2, 4) for kind in _CELLS if (count, kind) != (4, "b64")]
_KINDS = [*(f".{kind}" for kind in _CELLS), *_VECTORS]
_ORDERS = ("relaxed", "acquire", "release", "acq_rel")
_OPERATIONS = ("add.u32", "max.s32", "max.u32", "min.s32")
_MEMORY: dict[str, Callable[[_Binder, Instruction, int, Access], Step]] = {
    **{f"ld.{space}{kind}": _Binder.load for space in ("global", "volatile.global", "shared") for kind in _KINDS},
    **{f"st.{space}{kind}": _Binder.store for space in ("global", "shared") for kind in _KINDS},
    **{
        f"{name}.global.{scope}.{order}.{operation}": _Binder.atomic
        for name in ("atom", "red")
        for scope in ("cta", "gpu", "sys")
        for order in _ORDERS
        for operation in _OPERATIONS
    },
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": _Binder.load_matrix,
}
_OTHERS: dict[str, Callable[[_Binder, Instruction], Step]] = {
    **{f"ld.param.{kind}": _Binder.load_parameter for kind in ("b32", "b64", "s32", "u32", "u64")},
    **{f"shfl.sync.{kind}.b32": _Binder.shuffle for kind in ("bfly", "up", "down", "idx")},
    **{f"redux.sync.{operation}.s32": _Binder.reduce for operation in _COMBINE},
    "griddepcontrol.wait": _Binder.wait_for_launch,
}
