"""Accesses that nothing puts in an order, although in an emulated run they had one.

Shared memory, byte by byte:
- of two warps that touch a byte between the same two barriers, one writes it (the same value is no race);
- of two lanes of a warp, one reads what the other has written, with no bar.warp.sync or barrier between;
- bytes that an asynchronous copy is on its way to are touched;
- the operand of a wgmma is written before the wgmma has been waited for;
- a wgmma reads what a store has written and no fence.proxy.async of the storing warp has passed on.

Two lanes of a warp that store different values to one address with one instruction are no race here: Triton emits that
for sums whose lanes round differently, and hardware takes one of them.

Global memory: of two programs of a launch that touch a byte, one writes it (the same value is no race).
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from .memory import Region, SharedMemory, Where

_SEVERAL = 63  # in place of a warp's number in a tag
_NEVER = -1


def _bytes_of(place: np.ndarray, size: int) -> np.ndarray:
    """All bytes of accesses that begin at `place`."""
    return (place[..., None] + np.arange(size)).reshape(-1)


def _last_given(at: np.ndarray, given: np.ndarray) -> np.ndarray:
    """For each byte of `at`, the value that an assignment leaves where places repeat."""
    _, first_of_reversed, inverse = np.unique(at[::-1], return_index=True, return_inverse=True)
    return given[::-1][first_of_reversed][inverse][::-1]


class SharedRaces:
    """Tags say when and by whom a byte was touched: barriers passed by the program * 64 + warp."""

    def __init__(self, shared: SharedMemory, programs: int, threads: int, found: Counter[str]) -> None:
        size = len(shared.bytes)
        self.shared, self.found = shared, found
        self.wrote = np.full(size, _NEVER, np.int32)
        self.read = np.full(size, _NEVER, np.int32)
        self.writer = np.zeros(size, np.int32)  # thread
        self.coming = np.zeros(size, bool)
        self.changed = np.zeros(size, np.int64)  # the moment of the last write
        self.stored = np.full(size, _NEVER, np.int32)  # by the writing warp's count of proxy fences; not by copies
        self.synced = np.full(size, _NEVER, np.int32)  # by the writing warp's count of bar.warp.sync
        self.now = 0
        self.barriers = np.zeros(programs, np.int32)
        self.program = np.repeat(np.arange(programs), threads)
        self.warp_in_program = np.tile(np.arange(threads, dtype=np.int32) // 32, programs)
        self.fences = np.zeros(programs * threads // 32, np.int32)  # by warp
        self.syncs = np.zeros(programs * threads // 32, np.int32)

    def moment(self) -> int:
        self.now += 1
        return self.now

    def barrier(self, programs: np.ndarray | None) -> None:
        self.barriers += 1 if programs is None else programs.astype(np.int32)

    def fence(self, mask: np.ndarray | None) -> None:
        self.fences += 1 if mask is None else mask.reshape(-1, 32).any(axis=1)

    def sync(self, mask: np.ndarray | None) -> None:
        self.syncs += 1 if mask is None else mask.reshape(-1, 32).any(axis=1)

    def note(self, where: Where, what: str) -> None:
        self.found[f"{where()}: {what}"] += 1

    def _touched(self, place, mask, size):
        """(bytes, their tags, their threads) of an access."""
        thread = np.arange(len(place)) if mask is None else np.nonzero(mask)[0]
        tag = self.barriers[self.program[thread]] * 64 + self.warp_in_program[thread]
        return _bytes_of(place[thread], size), np.repeat(tag, size), np.repeat(thread, size)

    @staticmethod
    def _by_another(seen, tag):
        """Whether what was seen there was another warp's doing, since the last barrier."""
        return (seen >> 6 == tag >> 6) & (seen & 63 != tag & 63)

    def load(self, where: Where, place, mask, size: int) -> None:
        at, tag, thread = self._touched(place, mask, size)
        if self.coming[at].any():
            self.note(where, "reads bytes that a copy is on its way to")
        if self._by_another(self.wrote[at], tag).any():
            self.note(where, "reads what another warp has written since the last barrier")
        own = (self.wrote[at] == tag) & (self.writer[at] != thread)
        if (own & (self.synced[at] == self.syncs[thread // 32])).any():
            self.note(where, "reads what another lane has written since the last bar.warp.sync")
        several = self._by_another(self.read[at], tag)
        self.read[at] = np.where(several, tag & ~63 | _SEVERAL, tag)
        again = self._by_another(self.read[at], tag)  # two warps read a byte in this instruction
        self.read[at[again]] = tag[again] & ~63 | _SEVERAL

    def store(self, where: Where, place, mask, values: np.ndarray) -> None:
        """values: [threads, elements] that are about to be written."""
        at, tag, thread = self._touched(place, mask, values.dtype.itemsize * values.shape[1])
        given = np.ascontiguousarray(values if mask is None else values[mask]).view(np.uint8).reshape(-1)
        changes = self.shared.bytes[at] != given
        if self.coming[at].any():
            self.note(where, "writes bytes that a copy is on its way to")
        if (self._by_another(self.wrote[at], tag) & changes).any():
            self.note(where, "writes what another warp has written since the last barrier")
        if (self._by_another(self.read[at], tag) & changes).any():
            self.note(where, "writes what another warp has read since the last barrier")
        self._written(at, tag, thread)
        self.stored[at], self.synced[at] = self.fences[thread // 32], self.syncs[thread // 32]
        lost = self.wrote[at] != tag
        if lost.any() and (lost & (_last_given(at, given) != given)).any():
            self.note(where, "writes with two warps to the same bytes")

    def _written(self, at, tag, thread) -> None:
        self.wrote[at], self.writer[at], self.changed[at] = tag, thread, self.moment()

    def copy_begins(self, where: Where, place, mask, size: int) -> None:
        at, tag, _ = self._touched(place, mask, size)
        for seen, verb in ((self.read, "read"), (self.wrote, "written")):
            if self._by_another(seen[at], tag).any():
                self.note(where, f"copies to what another warp has {verb} since the last barrier")
        if self.coming[at].any():
            self.note(where, "copies to where another copy is on its way")
        self.coming[at] = True

    def copy_ends(self, place, mask, size: int) -> None:
        at, tag, thread = self._touched(place, mask, size)
        self.coming[at] = False
        self._written(at, tag, thread)
        self.stored[at] = self.synced[at] = _NEVER

    def product_begins(self, where: Where, groups, size: int) -> None:
        """A wgmma is issued. groups: [(places of the matrix, the first thread of the four warps)]."""
        for places, thread in groups:
            at = _bytes_of(places, size)
            if (self.wrote[at] >> 6 == self.barriers[self.program[thread]]).any():
                self.note(where, "multiplies what was written since the last barrier")
            if (self.stored[at] == self.fences[self.writer[at] // 32]).any():
                self.note(where, "multiplies what was stored with no fence.proxy.async since")
            if self.coming[at].any():
                self.note(where, "multiplies bytes that a copy is on its way to")

    def product_ends(self, where: Where, groups, size: int, begun: int) -> None:
        """It is waited for, having begun at that moment."""
        for places, thread in groups:
            at = _bytes_of(places, size)
            if (self.changed[at] > begun).any():
                self.note(where, "was not waited for when its operand was written anew")
            if self.coming[at].any():
                self.note(where, "multiplies bytes that a copy is on its way to")
            self.read[at] = self.barriers[self.program[thread]] * 64 + _SEVERAL


class GlobalRaces:
    """Of one launch: who wrote and who read each byte. Atomic operations are in no race with each other."""

    def __init__(self, found: Counter[str]) -> None:
        self.found = found
        self._writers: dict[int, np.ndarray] = {}  # by region: program + 1 by byte; 0: nobody
        self._readers: dict[int, np.ndarray] = {}  # -1: several

    def access(self, where: Where, region: Region, place, program, values: np.ndarray | None, size: int) -> None:
        """A load of `size` bytes at each place, or with `values` [threads, elements] a store; by program + 1."""
        key = region.base
        if key not in self._writers:
            self._writers[key] = np.zeros(len(region.bytes), np.int32)
            self._readers[key] = np.zeros(len(region.bytes), np.int32)
        writers, readers = self._writers[key], self._readers[key]
        at, who = _bytes_of(place, size), np.repeat(program, size)
        others = (writers[at] != 0) & (writers[at] != who)
        if values is None:
            if others.any():
                self.found[f"{where()}: reads what another program of the launch has written"] += 1
            readers[at] = np.where((readers[at] != 0) & (readers[at] != who), -1, who)
            shared = readers[at] != who
            readers[at[shared]] = -1
            return
        given = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        changes = region.bytes[at] != given
        if (others & changes).any():
            self.found[f"{where()}: writes what another program of the launch has written"] += 1
        if ((readers[at] != 0) & (readers[at] != who) & changes).any():
            self.found[f"{where()}: writes what another program of the launch has read"] += 1
        writers[at] = who
        lost = writers[at] != who
        if lost.any() and (lost & (_last_given(at, given) != given)).any():
            self.found[f"{where()}: writes with two programs to the same bytes"] += 1
