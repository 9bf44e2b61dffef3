"""Global memory (the caller's arrays, apart from one another), parameters, and shared memory of a block."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .errors import PtxError
from .races import GlobalLedger, Ledger

GLOBAL_BASE = 0x7F00_0000_0000
PARAMETER_BASE = 0x6000_0000_0000  # of generic addresses of parameters
SHARED_BASE = 0x5000_0000_0000  # of generic addresses of shared memory
GUARD = 512  # bytes between two arrays: what runs over an end is seen
POISON = 0xFF  # a NaN in every float


class Region(NamedTuple):
    """An array in global memory."""

    start: int
    size: int
    name: str
    array: np.ndarray


class GlobalMemory:
    """Arrays at addresses. Programs work on copies; `array` gives what has become of one."""

    def __init__(self):
        self.bytes = np.zeros(0, np.uint8)
        self.owner = np.zeros(0, np.int32)  # number of the region + 1, 0 for gaps
        self.regions: list[Region] = []
        self.ledger = GlobalLedger(0)

    def place(self, array: np.ndarray, name: str, offset: int = 0) -> int:
        """The address of a copy; `offset` bytes beyond a multiple of 256."""
        array = np.ascontiguousarray(array)
        start = -(-(len(self.bytes) + GUARD) // 256) * 256 + offset
        grown = np.full(start + array.nbytes + GUARD, POISON, np.uint8)
        grown[: len(self.bytes)] = self.bytes
        grown[start : start + array.nbytes] = array.view(np.uint8).ravel()
        owner = np.zeros(len(grown), np.int32)
        owner[: len(self.owner)] = self.owner
        owner[start : start + array.nbytes] = len(self.regions) + 1
        self.bytes, self.owner = grown, owner
        self.regions.append(Region(start, array.nbytes, name, array))
        self.ledger = GlobalLedger(len(grown))
        return GLOBAL_BASE + start

    def launch(self) -> None:
        """A launch begins: what came before it is ordered before it."""
        self.ledger = GlobalLedger(len(self.bytes))

    def array(self, name: str) -> np.ndarray:
        """What an array holds now."""
        region = next(r for r in self.regions if r.name == name)
        raw = self.bytes[region.start : region.start + region.size].copy()
        return raw.view(region.array.dtype).reshape(region.array.shape)

    def places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Byte positions [len(addresses), size] of accesses, which must lie inside of one array each."""
        at = addresses.astype(np.int64) - GLOBAL_BASE
        if size > 1 and (at % size).any():
            raise PtxError("alignment", f"address {self._where(int(at[at % size != 0][0]))} of {size} bytes")
        if len(at) and (at.min() < 0 or at.max() + size > len(self.bytes)):
            bad = at[(at < 0) | (at + size > len(self.bytes))]
            raise PtxError("bounds", f"global address {self._where(int(bad[0]))} is in no array")
        owners = self.owner[at], self.owner[at + size - 1]
        if not (owners[0] & owners[1]).all() or (owners[0] != owners[1]).any():
            bad = at[(owners[0] == 0) | (owners[0] != owners[1])]
            raise PtxError("bounds", f"global address {self._where(int(bad[0]))} is in no array")
        return at[:, None] + np.arange(size)

    def read(self, block: int, addresses: np.ndarray, size: int) -> np.ndarray:
        places = self.places(addresses, size)
        self.ledger.read(block, places, self._where)
        return self.bytes[places]

    def write(self, block: int, addresses: np.ndarray, data: np.ndarray) -> None:
        places = self.places(addresses, data.shape[1])
        self.ledger.write(block, places, self._where)
        self.bytes[places] = data

    def atomic(self, block: int, address: int, size: int) -> np.ndarray:
        """The bytes that an atomic operation is about to change."""
        places = self.places(np.array([address]), size)
        self.ledger.atomic(block, places, self._where)
        return self.bytes[places[0]]

    def _where(self, at: int) -> str:
        """A position in words."""
        k = bisect.bisect_right([r.start for r in self.regions], at) - 1
        if k < 0:
            return hex(at + GLOBAL_BASE)
        region = self.regions[k]
        return f"{region.name} + {at - region.start} ({region.size} bytes)"


class SharedMemory:
    """The shared memory of a block: NaN until it is written, and never read before."""

    def __init__(self, base: int, size: int, ledger: Ledger):
        self.base, self.end = base, base + size
        self.bytes = np.full(base + size, POISON, np.uint8)
        self.ledger = ledger
        self.reserved: dict[int, str] = {}  # addresses of mbarriers, which are no data
        # an order of lanes that write to one address; None: an error if they differ
        self.last_lane_wins: Callable[[int], list[int]] | None = None

    def places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Byte positions [len(addresses), size] of accesses."""
        at = addresses.astype(np.int64)
        if size > 1 and (at % size).any():
            raise PtxError("alignment", f"shared address {int(at[at % size != 0][0])} of {size} bytes")
        self.check(int(at.min()), int(at.max()) + size)
        return at[:, None] + np.arange(size)

    def check(self, first: int, end: int) -> None:
        """Whether bytes are the block's."""
        if first < self.base or end > self.end:
            raise PtxError("bounds", f"shared bytes {first} to {end - 1}, the block has {self.base} to {self.end - 1}")

    def not_barriers(self, places: np.ndarray) -> None:
        """No mbarrier may lie where data are accessed."""
        if not self.reserved:
            return
        first, last = int(places.min()), int(places.max())
        for address in self.reserved:
            if first - 8 < address <= last and np.isin(np.arange(address, address + 8), places).any():
                raise PtxError("barrier", f"data accessed at {address}, where an mbarrier is")

    def read(self, threads: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        places = self.places(addresses, size)
        self.not_barriers(places)
        self.ledger.generic_read(threads, places)
        return self.bytes[places]

    def write(self, threads: np.ndarray, addresses: np.ndarray, data: np.ndarray) -> None:
        places = self.places(addresses, data.shape[1])
        self.not_barriers(places)
        self.ledger.generic_write(threads, places, self.bytes[places] == data)
        if self.last_lane_wins is not None:
            order = self.last_lane_wins(len(threads))
            self.bytes[places[order]] = data[order]
            return
        self.bytes[places] = data
        if len(threads) > 1 and (self.bytes[places] != data).any():
            raise PtxError("race", f"lanes of a warp write different values to one shared address of {places.min()}...")
