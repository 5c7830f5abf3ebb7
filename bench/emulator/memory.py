"""Global memory, which is the memory of CPU tensors, and the shared memory of programs that run together.

An access that leaves what a launch was given, or is not aligned, is a `Fault`; nothing has been read or written then.
"""

from __future__ import annotations

import bisect
import ctypes
import gc
from collections.abc import Callable

import numpy as np
import torch

Where = Callable[[], str]  # names the instruction
SECTOR = 32  # bytes of global memory that travel together


class Fault(RuntimeError):
    """What a GPU would stop at, or get wrong without a word."""


class _Bytes:
    """Bytes that can be looked at as vectors of elements of any size."""

    def __init__(self, array: np.ndarray) -> None:
        self.bytes = array
        self._views: dict[tuple[int, int], np.ndarray] = {}

    def view(self, size: int, count: int = 1) -> np.ndarray:
        found = self._views.get((size, count))
        if found is None:
            flat = self.bytes.view(f"u{size}")
            found = self._views[size, count] = flat if count == 1 else flat.reshape(-1, count)
        return found


def _columns(found: np.ndarray, count: int) -> list[np.ndarray]:
    """Vectors [threads, count] as `count` arrays."""
    return [found] if count == 1 else list(np.ascontiguousarray(found.T))


def _together(values: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Arrays as vectors [threads, count]; a single one as it is."""
    if len(values) == 1:
        return np.broadcast_to(values[0], shape)
    return np.stack([np.broadcast_to(v, shape) for v in values], -1)


class Region(_Bytes):
    """Global memory that may be accessed: one tensor's storage."""

    def __init__(self, base: int, size: int) -> None:
        self.base, self.end = base, base + size
        self.first = base // SECTOR * SECTOR  # whole sectors lie on the same page
        whole = -(-(self.end - self.first) // SECTOR) * SECTOR
        super().__init__(np.frombuffer((ctypes.c_uint8 * whole).from_address(self.first), np.uint8))
        self.read = np.zeros(whole // SECTOR, bool)  # sectors
        self.written = np.zeros(whole // SECTOR, bool)

    def places(self, address: np.ndarray) -> np.ndarray:
        """Bytes from `first`."""
        return (address - np.uint64(self.first)).astype(np.int64)


def has_memory(found: object) -> bool:
    """Whether it is a tensor of this process's memory. What tracing leaves behind (fake and functional tensors) is not:
    their addresses mean nothing."""
    if type(found) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return found.device.type == "cpu" and found.layout == torch.strided and not torch._is_functional_tensor(found)


class GlobalMemory:
    """Regions by address. An address that no argument holds (a kernel may read addresses from memory) is looked up
    among all living tensors."""

    def __init__(self) -> None:
        self.regions: list[Region] = []  # in the order of their bases
        self._searched = False

    def allow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        base, size = storage.data_ptr(), storage.nbytes()
        if size and not any(r.base <= base and base + size <= r.end for r in self.regions):
            bisect.insort(self.regions, Region(base, size), key=lambda region: region.base)

    def _region(self, address: int) -> Region | None:
        at = bisect.bisect(self.regions, address, key=lambda region: region.base)
        # storages overlap where one was freed and another lies there now
        for region in self.regions[max(at - 3, 0) : at][::-1]:
            if region.base <= address < region.end:
                return region
        if self._searched:
            return None
        self._searched = True
        for found in gc.get_objects():
            if has_memory(found):
                self.allow(found)
        return self._region(address)

    def parts(self, where: Where, address: np.ndarray, mask: np.ndarray | None, size: int):
        """[(region, its threads or None for all, addresses)] of an access of `size` bytes a thread, checked."""
        if mask is not None:
            if not mask.any():
                return []
            if not mask.all():  # threads that do not take part get an address of one that does
                address = np.where(mask, address, address[min(int(mask.argmax()), len(address) - 1)])
        stray = address & np.uint64(size - 1) if size > 1 else np.zeros(1, np.uint64)
        if stray.any():
            raise Fault(f"{where()} accesses {size} bytes at {int(address[stray != 0][0]):#x}, not aligned to them")
        region = self._region(int(address.min()))
        if region is not None and int(address.max()) + size <= region.end:
            return [(region, None, address)]
        found, left = [], np.ones(address.shape, bool) if mask is None else np.broadcast_to(mask, address.shape).copy()
        while left.any():
            first = int(address[left].min())
            region = self._region(first)
            if region is None or first + size > region.end:
                near = min(self.regions, key=lambda r: min(abs(first - r.base), abs(first - r.end)), default=None)
                beside = f"; the nearest tensor is at {near.base:#x} to {near.end:#x}" if near else ""
                raise Fault(f"{where()} accesses {size} bytes at {first:#x}, outside of every tensor{beside}")
            inside = left & (address <= np.uint64(region.end - size))
            found.append((region, inside, address))
            left = left & ~inside
        return found

    def load(self, where: Where, address, mask, size: int, count: int) -> list[np.ndarray]:
        """`count` elements of `size` bytes for each thread; 0 for those that are masked off."""
        total, result = size * count, None
        for region, threads, at in self.parts(where, address, mask, total):
            if threads is not None:
                at = np.where(threads, at, np.uint64(region.first))
            found = region.view(size, count)[region.places(at) // total]
            if result is None or threads is None:
                result = found
            else:
                result = np.where(threads if count == 1 else threads[:, None], found, result)
        if result is None:
            result = np.zeros((1, count) if count > 1 else 1, f"u{size}")
        return _columns(result, count)

    def store(self, where: Where, address, mask, values: list[np.ndarray]) -> None:
        size, count = values[0].dtype.itemsize, len(values)
        shape = np.broadcast_shapes(address.shape, *(v.shape for v in values), () if mask is None else mask.shape)
        given = _together(values, shape)
        for region, threads, at in self.parts(where, address, mask, size * count):
            chosen = mask if threads is None else threads
            place = np.broadcast_to(region.places(at) // (size * count), shape)
            view = region.view(size, count)
            if chosen is None:
                view[place] = given
            else:
                chosen = np.broadcast_to(chosen, shape)
                view[place[chosen]] = given[chosen]


class SharedMemory(_Bytes):
    """`size` bytes for each of some programs, side by side, with addresses from `base`. All is NaN at first."""

    def __init__(self, base: int, size: int, programs: int, threads: int) -> None:
        self.base, self.size = base, size
        self.stride = -(-(base + size) // 1024) * 1024
        super().__init__(np.full(programs * self.stride, 0xFF, np.uint8))
        self.offsets = np.repeat(np.arange(programs, dtype=np.int64) * self.stride, threads)  # by thread

    def places(self, where: Where, address: np.ndarray, mask, size: int, offsets=None) -> np.ndarray:
        """Where accesses of `size` bytes lie in `bytes`, checked. offsets: of the threads, where not all take part."""
        if mask is not None and not mask.all():
            address = np.where(mask, address, np.uint32(self.base))
        low, high = int(address.min()), int(address.max())
        if low < self.base or high + size > self.base + self.size:
            bad, end = low if low < self.base else high, self.base + self.size
            raise Fault(f"{where()} accesses {size} bytes at {bad:#x} of shared memory {self.base:#x} to {end:#x}")
        stray = address & np.uint32(size - 1) if size > 1 else np.zeros(1, np.uint32)
        if stray.any():
            bad = int(address[stray != 0][0])
            raise Fault(f"{where()} accesses {size} bytes at {bad:#x} of shared memory, not aligned to them")
        return (self.offsets if offsets is None else offsets) + address

    def load(self, where: Where, address, mask, size: int, count: int) -> list[np.ndarray]:
        place = self.places(where, address, mask, size * count)
        return _columns(self.view(size, count)[place // (size * count)], count)

    def store(self, where: Where, address, mask, values: list[np.ndarray]) -> None:
        size, count = values[0].dtype.itemsize, len(values)
        place = self.places(where, address, mask, size * count) // (size * count)
        given = _together(values, place.shape)
        view = self.view(size, count)
        if mask is None:
            view[place] = given
        else:
            chosen = np.broadcast_to(mask, place.shape)
            view[place[chosen]] = given[chosen]
