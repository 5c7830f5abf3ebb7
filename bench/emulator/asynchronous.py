"""What hardware does behind a program's back: cp.async and wgmma, begun when issued and done when waited for.

An operation is done at the last moment that is allowed, the wait of its group, so that a wait that is missing shows as
old data; `eager` copies at once, the other end, so that what is copied too early shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import matrix
from .accesses import Accesses
from .counters import Counters
from .memory import Fault

Mask = np.ndarray | None  # of threads; None: all
Operation = Callable[[Mask, list], None]  # done for threads, on the registers


def both(a: Mask, b: Mask) -> Mask:
    return b if a is None else a if b is None else a & b


def _without(a: Mask, b: Mask, threads: int) -> Mask:
    everyone = np.ones(threads, bool)
    return (everyone if a is None else a) & ~(everyone if b is None else b)


@dataclass
class _Group:
    operations: list[tuple[Operation, Mask]]
    threads: Mask  # for whom it is not done yet


class Groups:
    """Operations that threads begin, commit in groups, and wait for."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.open: list[tuple[Operation, Mask]] = []
        self.pending: list[_Group] = []

    def begin(self, operation: Operation, mask: Mask) -> None:
        self.open.append((operation, mask))

    def commit(self, mask: Mask) -> None:
        """What these threads have begun is a group; what others have stays open."""
        self.pending.append(_Group([(o, both(m, mask)) for o, m in self.open], mask))
        self.open = [] if mask is None else [(o, _without(m, mask, self.threads)) for o, m in self.open]
        self.open = [(o, m) for o, m in self.open if m is None or m.any()]

    def wait(self, allowed: int, mask: Mask, registers: list) -> None:
        """Do all groups of these threads but the latest `allowed`, in their order."""
        newer = np.zeros(self.threads, int)
        due: list[Mask] = []
        for group in reversed(self.pending):
            due.append(both(both(group.threads, mask), None if (newer >= allowed).all() else newer >= allowed))
            newer += 1 if group.threads is None else group.threads
        for group, now in zip(self.pending, reversed(due), strict=True):
            if now is not None and not now.any():
                continue
            for operation, threads in group.operations:
                some = both(threads, now)
                if some is None or some.any():
                    operation(some, registers)
            group.threads = _without(group.threads, now, self.threads)
        self.pending = [g for g in self.pending if g.threads is None or g.threads.any()]


class Asynchronous:
    def __init__(self, accesses: Accesses, threads: int, counters: Counters, eager: bool) -> None:
        """threads: of a program."""
        self.accesses, self.of, self.counters, self.eager = accesses, threads, counters, eager
        self.shared, self.races = accesses.shared, accesses.shared_races
        self.threads = len(accesses.program)
        self.groups = {"copy": Groups(self.threads), "wgmma": Groups(self.threads)}

    def commit(self, kind: str, mask: Mask) -> None:
        self.groups[kind].commit(None if mask is None else np.broadcast_to(mask, self.threads))

    def wait(self, kind: str, allowed: int, mask: Mask, registers: list) -> None:
        self.groups[kind].wait(allowed, None if mask is None else np.broadcast_to(mask, self.threads), registers)

    # cp.async

    def copy(self, at: int, to, source, mask, size: int, given) -> None:
        """`given`: of the `size` bytes, how many come from memory; the others are 0. None: all."""
        where = self.accesses.where(at)
        to, source = (np.broadcast_to(x, self.threads) for x in (to, source))
        mask = None if mask is None else np.broadcast_to(mask, self.threads)
        given = np.full(self.threads, size) if given is None else np.broadcast_to(given, self.threads)
        place = self.shared.places(where, to, mask, size)
        self.accesses.watch_global("ld.global.async", where, source, both(mask, given > 0), size)
        if self.accesses.counters is not None:
            self.accesses.counters.count_shared("st.shared.async", place, mask, size)
        if self.races is not None:
            self.races.copy_begins(where, place, mask, size)

        def operation(threads: Mask, registers: list) -> None:
            unit = min(size, 4)
            found = self.accesses.memory.load(where, source, both(threads, given > 0), unit, size // unit)
            bytes_ = np.stack([np.broadcast_to(f, self.threads) for f in found], -1).view(np.uint8)
            bytes_ = np.where(np.arange(size) < given[:, None], bytes_, np.uint8(0))
            if self.races is not None:
                self.races.copy_ends(place, threads, size)
            self.shared.store(where, to, threads, list(np.ascontiguousarray(bytes_).view(f"u{unit}").T))

        if self.eager:
            operation(mask, [])
        else:
            self.groups["copy"].begin(operation, mask)

    # wgmma, of groups of four warps

    def product(self, at: int, shape: str, types, d, a, b, scale, signs, mask, registers: list) -> None:
        """d: places of registers; a too, or a descriptor as b. signs: of A and B, then which of them lie transposed."""
        where = self.accesses.where(at)
        to, of_a, of_b = types
        if to != "f32" or any(sign != 1 for sign in signs[:2]):
            raise NotImplementedError("a wgmma that subtracts, or whose sums are not fp32")
        _, n, k = matrix.shape_of(shape)
        mask = None if mask is None else np.broadcast_to(mask, self.threads)
        by_group = None if mask is None else mask.reshape(-1, 128).any(axis=1)
        groups = self.threads // 128 if by_group is None else int(by_group.sum())
        self.counters.flops[of_a] += 2 * 64 * n * k * groups
        in_registers = isinstance(a, tuple)
        transposed = [bool(sign) for sign in signs[2:]] or [False, False]
        begun = self.races.moment() if self.races is not None else 0
        held = [registers[i] for i in a] if in_registers else None
        left = None if in_registers else self._places(where, a, by_group, 64, k, of_a, transposed[0])
        right = self._places(where, b, by_group, n, k, of_b, transposed[-1])

        def operation(threads: Mask, registers: list) -> None:
            if held is None:
                left_values = self._operand(where, left, of_a, threads, begun)
            else:
                if any(self._written(registers[i], h, threads) for i, h in zip(a, held, strict=True)):
                    raise Fault(f"{where()} is not waited for when a register of its operand is written")
                full = [np.broadcast_to(h, self.threads) for h in held]
                left_values = matrix.left(full, of_a).reshape(-1, 64, k)
            right_values = self._operand(where, right, of_b, threads, begun)
            product = matrix.spread(left_values @ right_values.transpose(0, 2, 1))
            before = np.stack([np.broadcast_to(registers[i], self.threads) for i in d]).view(np.float32)
            sums = np.where(np.broadcast_to(scale, self.threads), before, np.float32(0)).astype(np.float64)
            for i, value in zip(d, matrix.summed(product + sums).view(np.uint32), strict=True):
                registers[i] = value if threads is None else np.where(threads, value, registers[i])

        self.groups["wgmma"].begin(operation, mask)

    def _written(self, now: np.ndarray, then: np.ndarray, threads: Mask) -> bool:
        """Whether a register was written since; where threads have parted, by these ones, and with something else."""
        if now is then or threads is None:
            return now is not then
        return bool((np.broadcast_to(now, self.threads) != np.broadcast_to(then, self.threads))[threads].any())

    def _places(self, where, descriptor, by_group: Mask, rows: int, k: int, kind: str, transposed: bool) -> np.ndarray:
        """Where the matrices of each group of warps lie, in the bytes of shared memory [groups, rows, k]."""
        each = np.broadcast_to(descriptor, self.threads).reshape(-1, 128)
        if by_group is not None:
            each = np.where(by_group[:, None], each, each[int(by_group.argmax())])
        if (each != each[:, :1]).any():
            raise Fault(f"{where()}: threads of a group name different matrices")
        found = matrix.described(each[:, 0], rows, k, kind, transposed)
        end = self.shared.base + self.shared.size
        if found.min() < self.shared.base or found.max() + matrix.element_bytes(kind) > end:
            raise Fault(f"{where()}: a matrix lies outside of shared memory")
        found = found + self.shared.offsets[::128][:, None, None]
        if self.races is not None:
            self.races.product_begins(where, self._watched(found, by_group), matrix.element_bytes(kind))
        return found

    @staticmethod
    def _watched(places: np.ndarray, by_group: Mask):
        return [(p, 128 * i) for i, p in enumerate(places) if by_group is None or by_group[i]]

    def _operand(self, where, places: np.ndarray, kind: str, threads: Mask, begun: int) -> np.ndarray:
        if self.races is not None:
            by_group = None if threads is None else threads.reshape(-1, 128).any(axis=1)
            groups = self._watched(places, by_group)
            self.races.product_ends(where, groups, matrix.element_bytes(kind), begun)
        return matrix.elements(self.shared.bytes, places, kind)
