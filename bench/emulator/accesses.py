"""What threads do to memory at once: loads, stores, atomics, matrix loads. All are checked; some are also watched."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arithmetic import bf16_to_f32, f32_to_bf16
from .counters import Counters
from .memory import GlobalMemory, SharedMemory, Where
from .races import GlobalRaces, SharedRaces


class Accesses:
    """Of the programs that run together. `counters` and the races are None where nobody wants them."""

    def __init__(
        self,
        where: Callable[[int], Where],
        program: np.ndarray,  # of each thread, by its number in the launch
        memory: GlobalMemory,
        shared: SharedMemory,
        local: SharedMemory,
        counters: Counters | None,
        shared_races: SharedRaces | None,
        global_races: GlobalRaces | None,
    ) -> None:
        self.where, self.program = where, program
        self.memory, self.shared, self.local = memory, shared, local
        self.counters, self.shared_races, self.global_races = counters, shared_races, global_races

    def _full(self, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, self.program.shape)

    def load(self, space: str, at: int, address, mask, size: int, count: int) -> list[np.ndarray]:
        where = self.where(at)
        if space == "global":
            self.watch_global("ld.global", where, address, mask, size * count)
        elif space == "shared":
            self._watch_shared("ld.shared", where, address, mask, size * count)
        return self._space(space).load(where, address, mask, size, count)

    def store(self, space: str, at: int, address, mask, values) -> None:
        where, size = self.where(at), values[0].dtype.itemsize * len(values)
        if space == "global":
            self.watch_global("st.global", where, address, mask, size, values)
        elif space == "shared":
            self._watch_shared("st.shared", where, address, mask, size, values)
        self._space(space).store(where, address, mask, list(values))

    def _space(self, space: str) -> GlobalMemory | SharedMemory:
        return {"global": self.memory, "shared": self.shared, "local": self.local}[space]

    def watch_global(self, name: str, where: Where, address, mask, size: int, values=None) -> None:
        if self.counters is None and self.global_races is None:
            return
        for region, threads, addresses in self.memory.parts(where, address, mask, size):
            chosen = threads if threads is not None else mask if mask is not None else np.ones(1, bool)
            chosen, place = self._full(chosen), self._full(region.places(addresses))
            if self.counters is not None:
                self.counters.count_global(name, region, place, chosen, size)
            if self.global_races is not None and name != "atomic":
                given = None if values is None else np.stack([self._full(v) for v in values], -1)[chosen]
                self.global_races.access(where, region, place[chosen], self.program[chosen] + 1, given, size)

    def _watch_shared(self, name: str, where: Where, address, mask, size: int, values=None) -> None:
        if self.counters is None and self.shared_races is None:
            return
        mask = None if mask is None else self._full(mask)
        place = self._full(self.shared.places(where, address, mask, size))
        self._note_shared(name, where, place, mask, size, values)

    def _note_shared(self, name, where, place, mask, size, values) -> None:
        if self.counters is not None:
            self.counters.count_shared(name, place, mask, size)
        if self.shared_races is not None and values is None:
            self.shared_races.load(where, place, mask, size)
        elif self.shared_races is not None:
            self.shared_races.store(where, place, mask, np.stack([self._full(v) for v in values], -1))

    # ldmatrix and stmatrix: lane 8 i + r names row r, 16 bytes, of matrix i; every four lanes hold a row of a matrix.

    def _rows(self, where: Where, address, mask, count: int) -> np.ndarray:
        """Where the rows begin [count, 8, warps]."""
        naming = np.tile(np.arange(32) < 8 * count, len(self.program) // 32)
        naming = naming if mask is None else naming & mask
        place = self.shared.places(where, self._full(address), naming, 16)
        return place.reshape(-1, 32).T.reshape(4, 8, -1)[:count]

    def _watch_matrices(self, name: str, where: Where, rows, mask, words=None) -> None:
        if self.counters is None and self.shared_races is None:
            return
        mask = None if mask is None else self._full(mask)
        for i, starts in enumerate(rows):
            place = (np.repeat(starts.T, 4, axis=1) + np.tile(np.arange(4) * 4, 8)).reshape(-1)
            self._note_shared(name, where, place, mask, 4, None if words is None else [words[i]])

    def load_matrices(self, at: int, address, mask, count: int, transposed: bool) -> list[np.ndarray]:
        where = self.where(at)
        rows = self._rows(where, address, mask, count)
        self._watch_matrices("ldmatrix", where, rows, mask)
        found = []
        for starts in rows:
            words = self.shared.view(4)[starts.T[:, :, None] // 4 + np.arange(4)]  # warp, row, word
            found.append(_transposed(words) if transposed else words.reshape(-1))
        return found

    def store_matrices(self, at: int, address, mask, values, transposed: bool) -> None:
        where = self.where(at)
        rows = self._rows(where, address, mask, len(values))
        words = [self._full(v).reshape(-1, 8, 4) for v in values]
        words = [_transposed(w) if transposed else w.reshape(-1) for w in words]
        self._watch_matrices("stmatrix", where, rows, mask, words)
        warps = slice(None) if mask is None else self._full(mask).reshape(-1, 32).any(axis=1)
        for starts, value in zip(rows, words, strict=True):
            place = starts.T[:, :, None] // 4 + np.arange(4)
            self.shared.view(4)[place[warps]] = value.reshape(-1, 8, 4)[warps]

    def atomic(self, space: str, at: int, verb: str, kind: str, address, mask, values) -> np.ndarray:
        """Thread by thread, in their order. What was there before."""
        where, size = self.where(at), values[0].dtype.itemsize
        address, values = self._full(address), [self._full(v) for v in values]
        if space == "global":
            self.watch_global("atomic", where, address, mask, size)
        before = np.zeros(self.program.shape, values[0].dtype)
        for i in range(len(before)) if mask is None else np.nonzero(self._full(mask))[0]:
            one = address[i : i + 1]
            if space == "global":
                ((region, _, _),) = self.memory.parts(where, one, None, size)
                view, place = region.view(size), region.places(one)[0] // size
            else:
                offset = self.shared.offsets[i : i + 1]
                view, place = self.shared.view(size), self.shared.places(where, one, None, size, offset)[0] // size
            before[i] = view[place]
            view[place] = _ATOMICS[verb](before[i : i + 1], kind, *(v[i : i + 1] for v in values))[0]
        return before


def _transposed(words: np.ndarray) -> np.ndarray:
    """The words of all lanes of 8 x 8 matrices of 16 bits [warps, 8, 4 words], transposed."""
    halves = np.ascontiguousarray(words).view(np.uint16).transpose(0, 2, 1)
    return np.ascontiguousarray(halves).view(np.uint32).reshape(-1)


def _on(kind_function):
    """An operation on values, as one from raw bits to raw bits."""

    def on_bits(old, kind: str, value):
        if kind.startswith("bf16"):
            a, b = (bf16_to_f32(x.view(np.uint16)) for x in (old, value))
            return f32_to_bf16(kind_function(a, b).astype(np.float32)).view(old.dtype)
        as_ = np.dtype({"f": "float", "i": "int", "u": "uint"}[kind[0]] + kind[1:].removesuffix("x2"))
        return kind_function(old.view(as_), value.view(as_)).astype(as_).view(old.dtype)

    return on_bits


_ATOMICS = {
    "add": _on(np.add),
    "min": _on(np.fmin),
    "max": _on(np.fmax),
    "and": _on(np.bitwise_and),
    "or": _on(np.bitwise_or),
    "xor": _on(np.bitwise_xor),
    "inc": _on(lambda a, b: np.where(a >= b, 0, a + 1)),
    "dec": _on(lambda a, b: np.where((a == 0) | (a > b), b, a - 1)),
    "exch": lambda old, kind, value: value,
    "cas": lambda old, kind, wanted, value: np.where(old == wanted, value, old),
}
