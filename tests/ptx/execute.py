"""Runs a kernel: each instruction for the threads of many blocks at once, in numpy.

Threads at the same instruction run together, those furthest behind first, so that branches meet again. A block's threads
wait at a barrier for each other; blocks beyond those that run at once follow when these are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx.memory import RUBBISH, UNSIGNED, Bytes, Memory, Region, Span
from ptx.parse import PtxError, Register, Symbol
from ptx.program import Access, Lanes, Program, parameter_size
from ptx.races import Races, SharedWatch, Watch

WARP = 32
# Enough for numpy to be busy with numbers, few enough to stay in a processor's cache.
_THREADS_AT_ONCE = 8192
_BOTH_HALVES = 3


def launch(
    program: Program,
    grid: Sequence[int],
    parameters: Sequence[int],
    shared: int,
    memory: Memory,
    seed: int | None = None,
) -> int:
    """Run a grid to its end.

    Args:
        grid: blocks along x, y and z.
        parameters: the value of each of the kernel's, pointers as addresses of `memory`.
        shared: bytes of shared memory of a block.
        seed: lets blocks, and the warps of each, run in an order drawn from it; None: in order.

    Returns:
        How many instructions all threads came to, those under a predicate that does not hold among them.

    Raises:
        PtxError: the kernel does what no correct one would; with the instruction and its line.
        ValueError: a grid without blocks, or parameters that are not the kernel's.
    """
    kernel = program.kernel
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid: {tuple(grid)}; pass three positive numbers of blocks")
    if len(parameters) != len(kernel.parameters):
        raise ValueError(f"parameters: {len(parameters)} values; {kernel.name} has {len(kernel.parameters)}")
    for value, parameter in zip(parameters, kernel.parameters, strict=True):
        bits = 8 * parameter_size(parameter)
        if not -(1 << (bits - 1)) <= value < 1 << bits:
            raise ValueError(f"parameters: {value} for {parameter.name}, which has {bits} bits")
    # A pointer that is null may be passed, and not followed.
    regions = {
        k: memory.at(value)
        for k, (value, parameter) in enumerate(zip(parameters, kernel.parameters, strict=True))
        if parameter.pointer and value
    }
    values = [int(value) % (1 << 8 * parameter_size(p)) for value, p in zip(parameters, kernel.parameters, strict=True)]
    spans = memory.spans(regions.values())
    blocks = np.arange(math.prod(grid))
    order = None if seed is None else np.random.default_rng(seed)
    if order is not None:
        blocks = order.permutation(blocks)
    warps = kernel.threads // WARP
    races = Races(len(blocks), warps)
    tensors = _watch_tensors(program, regions, spans, races)
    at_once = max(1, _THREADS_AT_ONCE // kernel.threads)
    executed = 0
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), at_once):
            run = Run(program, grid, blocks[first : first + at_once], values, shared, tensors, races, order)
            run.run()
            executed += run.executed
    for span in set(spans.values()):
        span.keep_unwritten(memory.unwritten)
    return executed


def _watch_tensors(
    program: Program, regions: dict[int, Region], spans: dict[Region, Span], races: Races
) -> dict[int, list[tuple[Region, Span, Watch | None]]]:
    """For each access of global memory the regions it may be in, with a watch on those that the kernel writes."""
    by_access = {
        place: [regions[k] for k in sorted(access.parameters) if k in regions]
        for place, access in program.accesses.items()
        if access.space == "global"
    }
    widths: dict[Span, int] = {}
    written: set[Span] = set()
    for place, found in by_access.items():
        access = program.accesses[place]
        for region in found:
            span = spans[region]
            widths[span] = min(access.width, widths.get(span, access.width))
            if access.kind != "read":
                written.add(span)
    watches = {span: Watch(races, widths[span], span.bytes) for span in written}
    return {
        place: [(region, spans[region], watches.get(spans[region])) for region in found]
        for place, found in by_access.items()
    }


class Run:
    """Some blocks of a launch, at once.

    Threads are numbered warp by warp, the same warp of all blocks together, so that some warps of each are a slice.

    Attributes:
        executed: how many instructions all threads came to.
    """

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        blocks: np.ndarray,
        parameters: list[int],
        shared: int,
        tensors: dict[int, list[tuple[Region, Span, Watch | None]]],
        races: Races,
        order: np.random.Generator | None,
    ) -> None:
        threads = program.kernel.threads
        self._program, self.parameters, self._tensors, self._order = program, parameters, tensors, order
        self._warps, self._blocks, self._size = threads // WARP, len(blocks), threads * len(blocks)
        self._everyone = slice(0, self._size)
        self.executed = 0
        thread = np.arange(self._size)
        self._warp, position, lane = thread // (WARP * len(blocks)), thread // WARP % len(blocks), thread % WARP
        block = blocks[position]
        self._block_numbers, self._races = blocks, races
        # Which of the launch's warps each thread is in.
        self._agent = block * self._warps + self._warp
        x, y, _ = grid
        self.special = {"%tid.x": self._warp * WARP + lane, "%tid.y": thread * 0, "%tid.z": thread * 0}
        for axis, values, count in zip("xyz", (block % x, block // x % y, block // (x * y)), grid, strict=True):
            self.special |= {f"%ctaid.{axis}": values, f"%nctaid.{axis}": np.full(self._size, count)}
        # The instruction each thread is at, behind its barrier where it waits; -1 where it is done.
        self._at = np.zeros(self._size, np.int64)
        self.registers: list[Any] = [None] * len(program.kernel.registers)
        self._rubbish_in: dict[int, np.ndarray] = {}
        # What this instruction has read of it.
        self._rubbish: np.ndarray | None = None
        stride = -(-max(shared, 1) // 16) * 16
        self._shared_size, self._shared_start = shared, position * stride
        self._shared = Bytes(np.full(stride * len(blocks), RUBBISH, np.uint8), np.ones(stride * len(blocks), np.uint8))
        widths = [access.width for access in program.accesses.values() if access.space == "shared"]
        self._shared_watch = SharedWatch(min(widths, default=4), self._shared)
        # How many barriers of any block there had been when a thread's block passed its last one.
        self._phases, self._phase = 1, np.ones(self._size, np.int64)

    # Registers

    def write(self, index: int, dtype: Any, values: Any, lanes: Lanes) -> None:
        """Put values, which nothing else holds, into a register of a numpy type."""
        if lanes is self._everyone:
            self.registers[index] = values if values.ndim else np.full(self._size, values)
            return
        array = self.registers[index]
        if array is None:
            array = self.registers[index] = np.zeros(self._size, dtype)
        array[lanes] = values

    def read_doubtful(self, register: Register, lanes: Lanes) -> np.ndarray:
        """Values that may be rubbish: what is made of them is, and `use` finds it."""
        array, rubbish = self._doubtful(register)
        here = rubbish[lanes]
        if here.any():
            self._rubbish = here if self._rubbish is None else self._rubbish | here
        return array[lanes]

    def write_doubtful(self, register: Register, values: Any, lanes: Lanes, by_halves: bool) -> None:
        """Put values into a register. by_halves: rubbish in a half of the operands is in that half of them alone."""
        array, rubbish = self._doubtful(register)
        array[lanes] = values
        found = self.take_rubbish()
        rubbish[lanes] = 0 if found is None else found if by_halves else np.where(found, _BOTH_HALVES, 0)

    def take_rubbish(self) -> np.ndarray | None:
        """Where this instruction has read rubbish so far, in the low half (1) or the high one (2); None: nowhere."""
        found, self._rubbish = self._rubbish, None
        return found

    def set_rubbish(self, low: np.ndarray | None, high: np.ndarray | None) -> None:
        """Rubbish in the low half where `low` has any, and so on."""
        parts = [np.where(part, bit, 0).astype(np.uint8) for bit, part in ((1, low), (2, high)) if part is not None]
        self._rubbish = sum(parts[1:], parts[0]) if parts else None

    def use(self, values: Any) -> Any:
        """Values that decide where threads go, or what memory holds.

        Raises:
            PtxError: one of them is made of a register that was not written.
        """
        if self._rubbish is not None:
            raise PtxError("a register is read before it was written")
        return values

    def share_rubbish(self, source: Callable[[np.ndarray], np.ndarray]) -> None:
        """What a warp's threads take from each other: `source` of the rubbish of `[warps, 32]` threads."""
        if self._rubbish is not None:
            warps = self._rubbish.reshape(-1, WARP)
            self._rubbish = np.broadcast_to(source(warps), warps.shape).reshape(-1)

    def _doubtful(self, register: Register) -> tuple[np.ndarray, np.ndarray]:
        """A register's values, and which halves of which threads' are rubbish."""
        array = self.registers[register.index]
        if array is None:
            dtype = np.bool_ if register.bits == 1 else UNSIGNED[register.bits // 8]
            array = np.full(self._size, dtype(0xDEADBEEFDEADBEEF >> (64 - register.bits)))
            self.registers[register.index] = array
            self._rubbish_in[register.index] = np.full(self._size, _BOTH_HALVES, np.uint8)
        return array, self._rubbish_in[register.index]

    def choose(self, holds: np.ndarray, lanes: Lanes) -> Lanes | None:
        """Those of `lanes` for which a predicate holds."""
        if holds.all():
            return lanes
        return self._narrow(_indices(lanes)[holds]) if holds.any() else None

    def _narrow(self, lanes: np.ndarray) -> Lanes:
        """A slice, where sorted indices are one."""
        if len(lanes) == self._size:
            return self._everyone
        first, last = int(lanes[0]), int(lanes[-1])
        return slice(first, last + 1) if last - first + 1 == len(lanes) else lanes

    # Between threads

    def check_whole_warps(self, lanes: Lanes) -> None:
        if isinstance(lanes, slice):
            whole = lanes.start % WARP == 0 and lanes.stop % WARP == 0
        else:
            rows = lanes[: len(lanes) // WARP * WARP].reshape(-1, WARP)
            whole = len(lanes) % WARP == 0 and bool((rows == rows[:, :1] // WARP * WARP + np.arange(WARP)).all())
        if not whole:
            raise PtxError("only part of a warp gets here")

    def turns(self, count: int) -> np.ndarray:
        """The order in which the atomic operations of an instruction take effect."""
        return np.arange(count) if self._order is None else self._order.permutation(count)

    def synchronise(
        self, place: int, access: Access, cells: np.ndarray, lanes: Lanes, turns: np.ndarray, order: str
    ) -> None:
        """What atomic operations that are not relaxed order, one after the other."""
        watch = next(watch for _, _, watch in self._tensors[place] if watch is not None)
        for cell, agent in zip(cells.tolist(), self._agent[lanes][turns].tolist(), strict=True):
            watch.synchronise(cell, access.width, agent, order)

    # Memory

    def locate(
        self, place: int, access: Access, addresses: Any, lanes: Lanes, values: list[Any] | None = None
    ) -> tuple[Bytes, np.ndarray]:
        """The memory that an instruction's addresses are in, and the cells there.

        Args:
            values: what will be stored there.

        Raises:
            PtxError: outside, misaligned, or touched by another thread that nothing orders before this one.
        """
        size = access.width * access.count
        agents = self._agent[lanes]
        addresses = np.broadcast_to(addresses, agents.shape)
        if access.space == "shared":
            offsets = addresses.astype(np.int64)
            self._check_bounds(offsets, size, 0, self._shared_size, "shared memory")
            cells = (offsets + self._shared_start[lanes]) // access.width
            self._shared_watch.note(access, cells, self._phase[lanes], self._warp[lanes], values)
            return self._shared, cells
        region, span, watch = self._find_region(place, addresses, size)
        self._check_bounds(addresses, size, region.address, region.end, "a tensor")
        cells = ((addresses - np.uint64(span.base)) // np.uint64(access.width)).astype(np.int64)
        if watch is not None:
            watch.note(access, cells, agents)
        return span.bytes, cells

    def _find_region(self, place: int, addresses: np.ndarray, size: int) -> tuple[Region, Span, Watch | None]:
        candidates = self._tensors[place]
        if not candidates:
            raise PtxError("the address is made of no pointer that the kernel was given")
        if len(candidates) > 1:
            low, high = int(addresses.min()), int(addresses.max()) + size
            for candidate in candidates:
                if candidate[0].address <= low and high <= candidate[0].end:
                    return candidate
        return candidates[0]

    def _check_bounds(self, addresses: np.ndarray, size: int, first: int, end: int, what: str) -> None:
        low, high = int(addresses.min()), int(addresses.max())
        if low < first or high + size > end:
            beyond = low - first if low < first else high + size - end
            raise PtxError(f"outside {what} of {end - first} bytes, by {beyond} bytes")
        if np.bitwise_or.reduce(addresses) & type(addresses[0])(size - 1):
            raise PtxError(f"an address that is no multiple of {size}")

    # Scheduling

    def run(self) -> None:
        """All threads to their end."""
        while True:
            for part in self._cut_warps():
                self._advance(part)
            if (self._at < 0).all():
                break
            self._pass_barriers()
        self._races.forget(self._agent)

    def _cut_warps(self) -> list[slice]:
        """The threads in the order in which they run until they wait: some of each block's warps, then the others."""
        if self._order is None or self._warps == 1:
            return [self._everyone]
        middle = WARP * self._blocks * int(self._order.integers(1, self._warps))
        parts = [slice(0, middle), slice(middle, self._size)]
        return parts[::-1] if self._order.integers(2) else parts

    def _pass_barriers(self) -> None:
        """Let the blocks go on whose threads all wait; each thread is at the instruction behind its barrier."""
        places = self._at.reshape(self._warps, self._blocks, WARP)
        waiting = (places >= 0).any((0, 2))
        together = (places == places[:1, :, :1]).all((0, 2))
        if not together[waiting].all():
            apart = places[:, np.flatnonzero(waiting & ~together)[0]]
            place = int(apart[apart >= 0][0]) - 1
            raise self._program.kernel.instructions[place].error("only part of a block reaches this barrier")
        self._races.barrier(self._block_numbers[waiting])
        self._phases += 1
        self._phase[np.repeat(waiting, WARP)[None].repeat(self._warps, 0).reshape(-1)] = self._phases

    def _advance(self, part: slice) -> None:
        """Some threads until all of them wait or are done."""
        kernel, steps, ends = self._program.kernel, self._program.steps, self._program.ends
        places = self._at[part]
        alive = np.unique(places[places >= 0]).tolist()
        groups: dict[int, np.ndarray] = {place: np.flatnonzero(places == place) + part.start for place in alive}
        while groups:
            place = min(groups)
            indices = groups.pop(place)
            lanes = self._narrow(indices)
            while True:
                first, end = place, ends[place]
                try:
                    for place in range(first, end):
                        steps[place](self, lanes)
                except PtxError as error:
                    raise kernel.instructions[place].error(error) from None
                place = end
                self.executed += (end - first) * len(indices)
                if steps[place] is None:
                    self.executed += len(indices)
                    instruction = kernel.instructions[place]
                    name = instruction.opcode.split(".")[0]
                    if name != "bra":
                        self._at[lanes] = -1 if name == "ret" else place + 1
                        break
                    target = instruction.operands[0]
                    assert isinstance(target, Symbol)
                    goal = kernel.labels[target.name]
                    if instruction.guard is not None:
                        predicate, negated = instruction.guard
                        try:
                            taken = self.use(self._read_predicate(predicate, lanes)) != negated
                        except PtxError as error:
                            raise instruction.error(error) from None
                        if not taken.all():
                            _join(groups, place + 1, indices[~taken])
                            if taken.any():
                                _join(groups, goal, indices[taken])
                            break
                    place = goal
                if groups and min(groups) <= place:
                    _join(groups, place, indices)
                    break

    def _read_predicate(self, register: Register, lanes: Lanes) -> np.ndarray:
        if register.index in self._rubbish_in or self.registers[register.index] is None:
            return self.read_doubtful(register, lanes)
        return self.registers[register.index][lanes]


def _indices(lanes: Lanes) -> np.ndarray:
    return np.arange(lanes.start, lanes.stop) if isinstance(lanes, slice) else lanes


def _join(groups: dict[int, np.ndarray], place: int, lanes: np.ndarray) -> None:
    """Let threads go on from `place` with those that are there."""
    there = groups.get(place)
    groups[place] = lanes if there is None else np.sort(np.concatenate([there, lanes]))
