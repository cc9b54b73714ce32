"""Memory that a kernel may touch: tensors at their own addresses, and the shared memory of blocks.

Memory that nobody wrote yet is known byte by byte, and reading it is an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx.parse import PtxError

UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# What an allocation holds before it is written: NaN in every floating-point type, and no small integer.
RUBBISH = 0xFF
# Wider than any access, so that a view of every width begins at a whole number of each.
_LINE = 16


class Bytes:
    """Bytes as cells of 1, 2, 4 or 8 bytes.

    Attributes:
        unwritten: for each byte whether it has to be written before it is read; None where none has.
    """

    def __init__(self, data: np.ndarray, unwritten: np.ndarray | None) -> None:
        self._views = {width: data.view(dtype) for width, dtype in UNSIGNED.items()}
        self.unwritten = unwritten
        self._unwritten = None if unwritten is None else {w: unwritten.view(dtype) for w, dtype in UNSIGNED.items()}

    def cells(self, width: int) -> np.ndarray:
        """All of them, to change in place."""
        return self._views[width]

    def read(self, cells: np.ndarray, width: int) -> np.ndarray:
        if self._unwritten is not None and self._unwritten[width][cells].any():
            raise PtxError("memory is read before it was written")
        return self._views[width][cells]

    def write(self, cells: np.ndarray, width: int, values: Any) -> None:
        self._views[width][cells] = values
        if self._unwritten is not None:
            self._unwritten[width][cells] = 0


@dataclass(frozen=True, slots=True)
class Region:
    """A tensor's memory: its first address, and its size in bytes."""

    address: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


class Span:
    """Regions of one launch that overlap, as one piece of memory."""

    def __init__(self, regions: Iterable[Region], unwritten: dict[Region, np.ndarray]) -> None:
        regions = list(regions)
        self.base = min(region.address for region in regions) // _LINE * _LINE
        size = -(-(max(region.end for region in regions) - self.base) // _LINE) * _LINE
        data = np.frombuffer((ctypes.c_uint8 * size).from_address(self.base), np.uint8)
        shadow = None
        if any(region in unwritten for region in regions):
            shadow = np.zeros(size, np.uint8)
            for region in regions:
                if region in unwritten:
                    shadow[region.address - self.base : region.end - self.base] = unwritten[region]
        self.bytes = Bytes(data, shadow)
        self._regions = regions

    def keep_unwritten(self, unwritten: dict[Region, np.ndarray]) -> None:
        """Note in `unwritten` what is left of its regions'."""
        for region in set(self._regions) & set(unwritten):
            assert self.bytes.unwritten is not None
            unwritten[region] = self.bytes.unwritten[region.address - self.base : region.end - self.base].copy()


class Memory:
    """The tensors that kernels may be given, by their first addresses."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}
        self.unwritten: dict[Region, np.ndarray] = {}

    def add(self, address: int, size: int, *, written: bool = True) -> Region:
        """Let kernels touch `size` bytes from `address` on, which is the host's.

        Args:
            written: False fills them with rubbish, and reading a byte before a kernel wrote it is an error.
        """
        region = self._regions[address] = Region(address, size)
        if not written:
            ctypes.memset(address, RUBBISH, size)
            self.unwritten[region] = np.ones(size, np.uint8)
        return region

    def at(self, address: int) -> Region:
        """The region that begins at an address, or else the smallest one around it.

        Raises:
            PtxError: there is none.
        """
        region = self._regions.get(address)
        if region is None:
            around = [each for each in self._regions.values() if each.address <= address < each.end]
            if not around:
                raise PtxError(f"no memory was given at {address:#x}")
            region = min(around, key=lambda each: each.size)
        return region

    def spans(self, regions: Iterable[Region]) -> dict[Region, Span]:
        """For each region the span that it is in."""
        groups: list[list[Region]] = []
        for region in sorted(set(regions), key=lambda each: each.address):
            if groups and region.address < max(each.end for each in groups[-1]):
                groups[-1].append(region)
            else:
                groups.append([region])
        spans: dict[Region, Span] = {}
        for group in groups:
            spans |= dict.fromkeys(group, Span(group, self.unwritten))
        return spans
