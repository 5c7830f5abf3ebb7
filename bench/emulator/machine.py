"""A launch: its programs, batch by batch, with all threads of a batch in step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from .accesses import Accesses
from .arithmetic import canonical
from .asynchronous import Asynchronous
from .counters import Counters
from .memory import Fault, GlobalMemory, SharedMemory, Where
from .races import GlobalRaces, SharedRaces
from .translate import SHARED_BASE, Code


@dataclass(frozen=True)
class Options:
    counting: bool = False  # memory traffic; instructions and FLOP are always counted
    races: bool = False  # watch memory for accesses that nothing puts in an order
    eager: bool = False  # cp.async at once, not when it is waited for
    programs: Sequence[int] | None = None  # only these of a launch, in this order
    backwards: bool = False  # the last program of a launch first
    sample: int | None = None  # only so many, evenly spread
    lanes: int = 8192  # threads that run together, about
    limit: int = 50_000_000  # blocks that a batch may run: more is taken for an endless loop


class _MadeNaN:
    """Whether arithmetic has made a NaN; NumPy calls it."""

    seen = False

    def __call__(self, *_) -> None:
        self.seen = True


@contextmanager
def _noticing_nan() -> Iterator[_MadeNaN]:
    made = _MadeNaN()
    before = np.seterrcall(made)
    try:
        with np.errstate(all="ignore", invalid="call"):
            yield made
    finally:
        np.seterrcall(before)


def run(
    code: Code,
    grid: tuple[int, int, int],
    arguments: dict[str, bytes],  # by the parameters' names
    memory: GlobalMemory,
    shared: int,  # bytes of a program
    options: Options,
    races: Counter[str],  # gets what is found
) -> Counters:
    total = grid[0] * grid[1] * grid[2]
    programs = np.arange(total) if options.programs is None else np.asarray(options.programs)
    if options.sample is not None and options.sample < len(programs):
        programs = programs[np.linspace(0, len(programs) - 1, options.sample).round().astype(int)]
    if options.backwards:
        programs = programs[::-1]
    threads = code.kernel.threads
    counters = Counters(code.kernel.name, len(programs), total, threads)
    between_programs = GlobalRaces(races) if options.races else None
    together = max(1, options.lanes // threads)
    with _noticing_nan() as made_nan:
        for first in range(0, len(programs), together):
            batch = programs[first : first + together]
            machine = Machine(code, grid, batch, arguments, memory, shared, options, counters, made_nan)
            machine.watch(races, between_programs)
            machine.run()
    counters.read_sectors = sum(int(r.read.sum()) for r in memory.regions)
    counters.written_sectors = sum(int(r.written.sum()) for r in memory.regions)
    return counters


class Machine:
    """Some programs of a launch. The functions that blocks are translated to call it `X`."""

    def __init__(self, code, grid, programs, arguments, memory, shared, options, counters, made_nan) -> None:
        self.code, self.options, self.counters, self.made_nan = code, options, counters, made_nan
        self.arguments, self._parameters = arguments, {}
        self.of = code.kernel.threads
        self.programs = len(programs)
        self.threads = self.programs * self.of
        self.global_memory = memory
        self.shared = SharedMemory(SHARED_BASE, max(shared, code.kernel.shared.size), self.programs, self.of)
        self.local = SharedMemory(SHARED_BASE, -(-code.kernel.local.size // 16) * 16, self.threads, 1)
        self.program = np.repeat(np.arange(self.programs), self.of)
        self.numbers = np.repeat(programs, self.of)
        u32 = np.uint32
        thread = np.tile(np.arange(self.of, dtype=u32), self.programs)
        one, none = np.ones(1, u32), np.zeros(1, u32)
        x, y, z = self.numbers % grid[0], self.numbers // grid[0] % grid[1], self.numbers // (grid[0] * grid[1])
        self.tid = {"x": thread, "y": none, "z": none}
        self.ntid = {"x": one * u32(self.of), "y": one, "z": one}
        self.ctaid = {axis: self._uniform(v.astype(u32)) for axis, v in zip("xyz", (x, y, z), strict=True)}
        self.nctaid = {axis: np.array([n], u32) for axis, n in zip("xyz", grid, strict=True)}
        self.lane = thread & u32(31)
        self.elected = self.lane == 0
        self.waiting_at = np.zeros(self.threads, np.int64)  # barriers' numbers

    def watch(self, races: Counter[str], between_programs: GlobalRaces | None) -> None:
        """Set up what watches and counts."""
        watched = self.options.races
        self.races = SharedRaces(self.shared, self.programs, self.of, races) if watched else None
        counted = self.counters if self.options.counting else None
        self.memory = Accesses(
            self.where, self.numbers, self.global_memory, self.shared, self.local, counted, self.races, between_programs
        )
        self.asynchronous = Asynchronous(self.memory, self.of, self.counters, self.options.eager)

    def _uniform(self, x: np.ndarray) -> np.ndarray:
        """One element where all programs are one."""
        return x[:1] if self.programs == 1 else x

    # The scheduler.

    def run(self) -> None:
        blocks, rank = self.code.blocks, self.code.ranks
        end = len(blocks)
        registers = list(self.code.initial)
        where = np.zeros(self.threads, np.int32)  # each thread's block
        waiting = np.zeros(self.threads, bool)
        parted = False  # whether `where` and `waiting` differ among threads; else `current` is everyone's
        current = 0
        for _ in range(self.options.limit):
            mask = None
            if parted:
                ready = ~waiting
                current = int(where[ready][rank[where[ready]].argmin()]) if ready.any() else end
                if current == end and waiting.any():
                    raise Fault(f"{self.code.kernel.name}: threads wait at a barrier for others that never come")
                mask = ready & (where == current)
                mask = None if mask.all() else mask
            if current == end:
                return
            block = blocks[current]
            self._count(block, mask)
            result = block.function(mask is not None)(registers, self, mask)
            if not parted:
                where[:] = current
            if block.waits:
                self._barrier(*result, mask, where, waiting)
            else:
                self._move(block, result, mask, where, end)
            parted = bool(waiting.any() or (where != where[0]).any())
            current = int(where[0])
        raise Fault(f"{self.code.kernel.name}: no end after {self.options.limit} blocks")

    def _count(self, block, mask) -> None:
        warps = self.threads // 32 if mask is None else int(mask.reshape(-1, 32).any(axis=1).sum())
        for name, count in block.classes.items():
            self.counters.instructions[name] += count * warps

    @staticmethod
    def _move(block, taken, mask, where, end: int) -> None:
        """Threads go on: to the branch's target (or the end) those that took it, to the next block the others.
        taken: of which threads, None where the branch has no condition."""
        target = end if block.leaves else block.target
        following = where + 1 if target is None else target if taken is None else np.where(taken, target, where + 1)
        where[:] = following if mask is None else np.where(mask, following, where)

    def _barrier(self, which, count, mask, where, waiting) -> None:
        """All threads of a program, or as many as the barrier says, go on together."""
        if mask is None and int(count.max()) == self.of and not waiting.any():
            where += 1
            if self.races is not None:
                self.races.barrier(None)
            return
        mask = np.ones(self.threads, bool) if mask is None else mask
        gone = np.bincount(self.program[where == len(self.code.blocks)], minlength=self.programs)
        where[mask] += 1
        waiting |= mask
        self.waiting_at[mask] = np.broadcast_to(which, mask.shape)[mask]
        wanted = np.broadcast_to(count, mask.shape)
        for barrier in np.unique(self.waiting_at[mask]):
            arrived = waiting & (self.waiting_at == barrier)
            wants = np.zeros(self.programs, np.int64)
            np.maximum.at(wants, self.program[mask], wanted[mask].astype(np.int64))
            there = np.bincount(self.program[arrived], minlength=self.programs)
            full = (there > 0) & (wants > 0) & (there + np.where(wants == self.of, gone, 0) >= wants)
            waiting &= ~(arrived & full[self.program])
            if self.races is not None:
                self.races.barrier(full)

    # What blocks ask for.

    @property
    def invalid(self) -> bool:
        return self.made_nan.seen

    def clean(self, x: np.ndarray) -> np.ndarray:
        """The NaN that arithmetic has just made, as a GPU makes it."""
        self.made_nan.seen = False
        return canonical(x)

    def where(self, at: int) -> Where:
        return lambda: f"{self.code.kernel.name}, {self.code.instructions[at]}"

    def trap(self, at: int, mask: np.ndarray | None) -> None:
        if mask is None or mask.any():
            raise Fault(f"{self.where(at)()}: trapped")

    def full(self, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, (self.threads,))

    def masked(self, mask: np.ndarray | None) -> np.ndarray | None:
        return None if mask is None else self.full(mask)

    def special(self, name: str) -> np.ndarray:
        if name == "laneid":
            return self.lane
        if name == "warpid":
            return self.tid["x"] >> np.uint32(5)
        if name in ("dynamic_smem_size", "total_smem_size"):
            return np.array([self.shared.size], np.uint32)
        return np.array([sum(self.counters.instructions.values()) & 0xFFFFFFFF], np.uint32)  # a clock

    def parameter(self, name: str, offset: int, size: int) -> np.ndarray:
        key = name, offset, size
        if key not in self._parameters:
            bytes_ = np.frombuffer(self.arguments[name], np.uint8)[offset : offset + size]
            self._parameters[key] = bytes_.copy().view(f"u{size}")
        return self._parameters[key]

    def order(self, proxy: bool, mask: np.ndarray | None) -> None:
        """fence.proxy.async, or else bar.warp.sync."""
        if self.races is not None:
            (self.races.fence if proxy else self.races.sync)(self.masked(mask))

    def flops(self, kind: str, shape: tuple[int, int, int], mask: np.ndarray | None) -> None:
        m, n, k = shape
        warps = self.threads // 32 if mask is None else int(mask.reshape(-1, 32).any(axis=1).sum())
        self.counters.flops[kind] += 2 * m * n * k * warps
