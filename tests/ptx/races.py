"""Who may have touched memory before whom: vector clocks of warps.

Two accesses to the same bytes, one of them a write, need an order: the program's within a warp, a barrier within a block,
and between blocks a release and an acquire on the same memory with everything that leads from one to the other. Atomic
operations may meet each other.

A warp has a time, which moves on at every barrier and release. An access is noted as a stamp: its block, its warp and
the warp's time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.memory import Bytes
from ptx.parse import PtxError

if TYPE_CHECKING:
    from ptx.program import Access

# Stamps as integers; 0 is none. The last warp stands for several of a block.
_BLOCK, _WARP, _TIME = 40, 32, (1 << 32) - 1
_SEVERAL_WARPS = 255
_SEVERAL_BLOCKS = -1


class Races:
    """The times of a launch's warps, and what each knows of the others'.

    Warp w of block b is the agent `b * warps + w`.
    """

    def __init__(self, blocks: int, warps: int) -> None:
        self.warps = warps
        self._shape = (blocks, warps)
        self._time = np.ones(self._shape, np.int64)
        # What a block's own warps did before this time is known to all of them.
        self._since = np.ones(blocks, np.int64)
        # By agent, for each other warp the last time that is known of it; no entry where nothing is.
        self._knowledge: dict[int, np.ndarray] = {}

    def stamps(self, agents: np.ndarray) -> np.ndarray:
        block, warp = np.divmod(agents, self.warps)
        return block << _BLOCK | warp << _WARP | self._time[block, warp]

    def barrier(self, blocks: np.ndarray) -> None:
        """All warps of each of these blocks know what each of them knows."""
        times = self._time[blocks].max(1) + 1
        self._time[blocks] = times[:, None]
        self._since[blocks] = times
        if not self._knowledge:
            return
        for block in blocks.tolist():
            agents = range(block * self.warps, (block + 1) * self.warps)
            known = [self._knowledge[agent] for agent in agents if agent in self._knowledge]
            if known:
                self._knowledge |= dict.fromkeys(agents, np.maximum.reduce(known))

    def acquire(self, agent: int, clock: np.ndarray | None) -> None:
        if clock is not None:
            known = self._knowledge.get(agent)
            self._knowledge[agent] = clock if known is None else np.maximum(known, clock)

    def release(self, agent: int, clock: np.ndarray | None) -> np.ndarray:
        """The clock of memory that had `clock`, once an agent has released what it knows."""
        block, warp = divmod(agent, self.warps)
        released = np.zeros(self._shape, np.int32) if clock is None else clock.copy()
        known = self._knowledge.get(agent)
        if known is not None:
            np.maximum(released, known, out=released)
        released[block] = np.maximum(released[block], self._since[block] - 1)
        released[block, warp] = self._time[block, warp]
        self._time[block, warp] += 1
        return released

    def forget(self, agents: np.ndarray) -> None:
        """These are done."""
        for agent in np.unique(agents).tolist():
            self._knowledge.pop(agent, None)

    def known(self, agents: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """For each pair whether the agent comes after what the stamp stands for."""
        block, warp, time = stamps >> _BLOCK, stamps >> _WARP & 0xFF, stamps & _TIME
        own_block, own_warp = np.divmod(agents, self.warps)
        same = block == own_block
        result = same & ((warp == own_warp) | (time < self._since[own_block]))
        for agent in np.unique(agents[~same]).tolist():
            clock = self._knowledge.get(agent)
            if clock is not None:
                mine = ~same & (agents == agent)
                last = clock[block[mine], np.minimum(warp[mine], self.warps - 1)]
                several = warp[mine] == _SEVERAL_WARPS
                result[mine] = time[mine] <= np.where(several, clock[block[mine]].min(1), last)
        return result


class _Marks:
    """The last accesses of one kind to each cell, as many as nothing orders among themselves."""

    def __init__(self, races: Races, size: int) -> None:
        self._races = races
        self.last = np.zeros(size, np.int64)
        # By cell and block, where several blocks came.
        self._several: dict[int, dict[int, int]] = {}

    def unknown(self, cells: np.ndarray, agents: np.ndarray, stamps: np.ndarray) -> np.ndarray | None:
        """Which of the agents come to a cell before they know of all who came; None for no one."""
        last = self.last[cells]
        wrong = (last != 0) & ((last ^ stamps) >> _WARP != 0)
        if not wrong.any():
            return None
        several = last == _SEVERAL_BLOCKS
        wrong &= ~several
        wrong[wrong] = ~self._races.known(agents[wrong], last[wrong])
        for k in np.flatnonzero(several).tolist():
            earlier = np.fromiter(self._several[int(cells[k])].values(), np.int64)
            wrong[k] = not self._races.known(np.full(len(earlier), agents[k]), earlier).all()
        return wrong if wrong.any() else None

    def replace(self, cells: np.ndarray, stamps: np.ndarray) -> None:
        self.last[cells] = stamps

    def clear(self, cells: np.ndarray) -> None:
        self.last[cells] = 0

    def add(self, cells: np.ndarray, agents: np.ndarray, stamps: np.ndarray) -> None:
        last = self.last[cells]
        alone = (last == 0) | ((last ^ stamps) >> _WARP == 0)
        if not alone.all():
            others = ~alone & (last != _SEVERAL_BLOCKS)
            alone[others] = self._races.known(agents[others], last[others])
        self.last[cells[alone]] = stamps[alone]
        # Others in the same instruction came to the same cell, or somebody was there.
        rest = self.last[cells] != stamps
        if rest.any():
            pairs = np.unique(np.stack([cells[rest], stamps[rest]]), axis=1)
            for cell, stamp in pairs.T.tolist():
                self._merge(cell, stamp)

    def _merge(self, cell: int, stamp: int) -> None:
        last, block = int(self.last[cell]), stamp >> _BLOCK
        if last == _SEVERAL_BLOCKS:
            blocks = self._several[cell]
            blocks[block] = _both(blocks[block], stamp) if block in blocks else stamp
        elif last >> _BLOCK == block:
            self.last[cell] = _both(last, stamp)
        else:
            self._several[cell] = {last >> _BLOCK: last, block: stamp}
            self.last[cell] = _SEVERAL_BLOCKS


def _both(one: int, other: int) -> int:
    """One stamp for two of a block."""
    time = max(one & _TIME, other & _TIME)
    warps = {one >> _WARP & 0xFF, other >> _WARP & 0xFF}
    warp = warps.pop() if len(warps) == 1 else _SEVERAL_WARPS
    return one >> _BLOCK << _BLOCK | warp << _WARP | time


class Watch:
    """The accesses to some memory.

    Attributes:
        width: bytes of the cells that are told apart: the narrowest access.
    """

    def __init__(self, races: Races, width: int, data: Bytes) -> None:
        self._races, self._width = races, width
        self._size = len(data.cells(width))
        self._marks: dict[str, _Marks] = {}
        self._clocks: dict[int, np.ndarray] = {}

    def note(self, access: Access, cells: np.ndarray, agents: np.ndarray) -> None:
        """An access from each of `cells`, of its width, on.

        Raises:
            PtxError: one of them is not ordered with an earlier one.
        """
        kind = access.kind
        cells, each = _split(access, cells, self._width)
        cells, agents = cells.reshape(-1), np.repeat(agents, each)
        stamps = self._races.stamps(agents)
        for earlier, marks in self._marks.items():
            if kind == earlier and kind != "write":
                continue
            wrong = marks.unknown(cells, agents, stamps)
            if wrong is not None:
                self._report(kind, earlier, agents[wrong][0], int(cells[wrong][0]))
        marks = self._marks.get(kind)
        if marks is None:
            marks = self._marks[kind] = _Marks(self._races, self._size)
        if kind != "write":
            marks.add(cells, agents, stamps)
            return
        marks.replace(cells, stamps)
        twice = marks.last[cells] != stamps
        if twice.any():
            self._report(kind, kind, agents[twice][0], int(cells[twice][0]))
        # All of them come before this write.
        for earlier in ("read", "atomic"):
            if earlier in self._marks:
                self._marks[earlier].clear(cells)
        # What is acquired from now on is this write.
        for cell in [cell for cell in self._clocks if (cells == cell).any()]:
            del self._clocks[cell]

    def synchronise(self, cell: int, width: int, agent: int, order: str) -> None:
        """An atomic operation on a cell of `width` bytes whose `order` is "acquire", "release" or "acq_rel"."""
        cell *= width // self._width
        if order != "release":
            self._races.acquire(agent, self._clocks.get(cell))
        if order != "acquire":
            self._clocks[cell] = self._races.release(agent, self._clocks.get(cell))

    def _report(self, kind: str, earlier: str, agent: int, cell: int) -> None:
        block, warp = divmod(int(agent), self._races.warps)
        raise PtxError(
            f"a race: {kind} of block {block}, warp {warp}, after a {earlier} of byte {cell * self._width} that nothing"
            " orders before it"
        )


class SharedWatch:
    """The accesses to the shared memory of blocks, each of which its own threads alone touch.

    Warps may store what is there already, as layouts are converted by several that hold the same values.
    """

    def __init__(self, width: int, data: Bytes) -> None:
        self._width, self._data = width, data
        # For each cell the last phase and warp, as one number.
        self._written, self._read = np.zeros((2, len(data.cells(width))), np.int64)

    def note(
        self, access: Access, cells: np.ndarray, phases: np.ndarray, warps: np.ndarray, values: list[Any] | None
    ) -> None:
        """An access from each of `cells` on, by threads whose block has passed its last barrier in a phase.

        Raises:
            PtxError: no barrier lies between it and one by another warp.
        """
        parts, each = _split(access, cells, self._width)
        since = (phases << 8)[:, None]
        mark, several = since + warps[:, None], since + _SEVERAL_WARPS
        written, read = self._written[parts], self._read[parts]
        wrong = (written >= since) & (written != mark)
        if access.kind == "read":
            if wrong.any():
                self._report("read", "write", warps, wrong)
            marks = np.where((read >= since) & (read != mark), several, mark)
            self._read[parts] = marks
            shared = self._read[parts] != marks
            if shared.any():
                self._read[parts[shared]] = np.broadcast_to(several, parts.shape)[shared]
            return
        assert values is not None
        # Which of a thread's values are new there.
        here = cells[:, None] + np.arange(access.count)
        stored = np.stack([np.broadcast_to(value, cells.shape) for value in values], 1)
        wrong |= (read >= since) & (read != mark)
        if wrong.any():
            changed = np.repeat(self._data.cells(access.width)[here] != stored, each // access.count, 1)
            if (wrong & changed).any():
                self._report("write", "access", warps, wrong & changed)
        self._written[parts] = mark
        twice = self._written[parts] != mark
        if twice.any():
            self._data.cells(access.width)[here] = stored
            changed = np.repeat(self._data.cells(access.width)[here] != stored, each // access.count, 1)
            if (twice & changed).any():
                self._report("write", "write", warps, twice & changed)

    def _report(self, kind: str, earlier: str, warps: np.ndarray, wrong: np.ndarray) -> None:
        warp = warps[np.flatnonzero(wrong.any(1))[0]]
        raise PtxError(f"a race: {kind} of warp {warp} after another warp's {earlier}, with no barrier between them")


def _split(access: Access, cells: np.ndarray, width: int) -> tuple[np.ndarray, int]:
    """`[threads, each]`: the cells of a smaller width that each access has, and how many these are."""
    parts = access.width // width
    each = parts * access.count
    return cells[:, None] * parts + np.arange(each), each
