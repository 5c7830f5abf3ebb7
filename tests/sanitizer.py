"""A memory sanitizer for Triton's interpreter (TRITON_INTERPRET=1, CPU tensors).

The interpreter runs the programs of a launch one after another in NumPy, and every access of a kernel, through
pointers or descriptors, ends in one of two methods of its builder: a masked load or a masked store. `Sanitizer` stands
in front of these two. An argument's pointers carry the argument's number in their upper 16 bits, which no address
uses and no sane offset reaches, so each access is held against the very tensor that it was derived from. The rest is
bookkeeping: which program read and wrote which cell, and in which order the programs run.

    with Sanitizer(order=7) as sanitizer:
        kernel[grid](x, y, n, BLOCK=128)
    assert sanitizer.launches and sanitizer.accesses

`SanitizerError` is raised for: a load outside the span of its tensor, a store to anything but an element of its
tensor, a misaligned access, two programs of a launch of which one writes what the other reads or writes, one store
with two values for one address, an integer overflow below 64 bits, a failed device_assert, and any atomic.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

__all__ = ["Sanitizer", "SanitizerError"]

_TAG_SHIFT = np.uint64(48)
_ADDRESS_BITS = np.uint64(2**48 - 1)
_PAGE = 1 << 16  # cells of a shadow page


class SanitizerError(AssertionError):
    """A kernel did something that a GPU would take without a word."""


class _View:
    """The memory of one tensor argument."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.itemsize = tensor.element_size()
        self.start = tensor.data_ptr()
        self.label = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        steps = [(step, n) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and step > 0]
        self.steps = sorted(steps, reverse=True)
        span = 1 + sum((n - 1) * step for step, n in steps) if tensor.numel() else 0
        self.end = self.start + span * self.itemsize
        self.dense = tensor.numel() >= span

    def covers(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Accesses of `width` bytes between the first and the last element."""
        if self.start == self.end:
            return np.zeros(addresses.shape, bool)
        return (addresses >= np.uint64(self.start)) & (addresses <= np.uint64(self.end - width))

    def owns(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Accesses to elements, not to the gaps between them."""
        inside = self.covers(addresses, width)
        if self.dense:
            return inside
        rest = np.where(inside, addresses - np.uint64(self.start), 0).astype(np.int64) // self.itemsize
        for step, n in self.steps:
            rest -= np.minimum(rest // step, n - 1) * step
        return inside & (rest == 0)


@dataclass
class _Region:
    """A stretch of memory under one or more overlapping views, with its history in this launch.

    The history is kept per cell (the smallest element of any view here) in pages made on demand, so that a tensor of
    more than 2^31 elements costs what was touched of it.
    """

    start: int
    end: int
    views: list[_View]
    pages: dict[int, np.ndarray] = field(default_factory=dict)

    @cached_property
    def cell(self) -> int:
        return min(view.itemsize for view in self.views)

    def _cells(self, addresses: np.ndarray, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(page, indices into it) for every page that these accesses touch."""
        cells = (addresses - np.uint64(self.start)).astype(np.int64) // self.cell
        if width > self.cell:
            cells = (cells[:, None] + np.arange(width // self.cell)).ravel()
        numbers = cells // _PAGE
        single = numbers.min() == numbers.max()
        for number in numbers[:1].tolist() if single else np.unique(numbers).tolist():
            if number not in self.pages:
                self.pages[number] = np.zeros((2, _PAGE), np.int32)
            yield self.pages[number], (cells if single else cells[numbers == number]) % _PAGE

    # A page has two rows, writer and reader: 0 for nobody, a program, or -1 for several readers.

    def load(self, addresses: np.ndarray, width: int, program: int) -> str | None:
        for (writer, reader), cells in self._cells(addresses, width):
            written, read = writer[cells], reader[cells]
            if ((written != 0) & (written != program)).any():
                return "reads what another program wrote"
            reader[cells] = np.where((read == 0) | (read == program), program, -1)
        return None

    def store(self, addresses: np.ndarray, width: int, program: int) -> str | None:
        for (writer, reader), cells in self._cells(addresses, width):
            written, read = writer[cells], reader[cells]
            if ((written != 0) & (written != program)).any():
                return "writes what another program wrote"
            if ((read != 0) & (read != program)).any():
                return "writes what another program read"
            writer[cells] = program
        return None


class _AddressSpace:
    """The tensors that one launch may touch."""

    def __init__(self, extra: Iterable[torch.Tensor]) -> None:
        self.tables = [_View(tensor) for tensor in extra]  # reached through addresses held in memory: no tag
        self.tagged: list[_View] = []

    def add(self, tensor: torch.Tensor) -> int:
        """The tag of a new argument."""
        self.tagged.append(_View(tensor))
        return len(self.tagged)

    @cached_property
    def regions(self) -> list[_Region]:
        """Built at the first access, when every argument is known."""
        regions: list[_Region] = []
        for view in sorted(self.tables + self.tagged, key=lambda view: view.start):
            if regions and view.start < regions[-1].end:
                regions[-1].end = max(regions[-1].end, view.end)
                regions[-1].views.append(view)
            elif view.end > view.start:
                regions.append(_Region(view.start, view.end, [view]))
        return regions

    def region(self, address: int) -> _Region | None:
        index = bisect_right(self.regions, address, key=lambda region: region.start) - 1
        return self.regions[index] if index >= 0 and address < self.regions[index].end else None

    def resolve(self, pointers: np.ndarray) -> Iterator[tuple[np.ndarray, list[_View]]]:
        """(addresses, the views that they may belong to), by argument."""
        tags = pointers >> _TAG_SHIFT
        for tag in np.unique(tags).tolist():
            addresses = pointers[tags == tag] & _ADDRESS_BITS
            if tag:
                yield addresses, self.tagged[tag - 1 : tag]
                continue
            while addresses.size:
                region = self.region(int(addresses[0]))
                if region is None:
                    yield addresses[:1], []
                    return
                here = (addresses >= np.uint64(region.start)) & (addresses < np.uint64(region.end))
                yield addresses[here], region.views
                addresses = addresses[~here]


class Sanitizer:
    """Context manager; see the head of this file.

    order: None for Triton's own order of programs, 'reverse', or a seed to shuffle them by.
    extra: tensors that kernels reach through a table of addresses rather than as arguments.
    races: False lets programs meet in memory, to show what their order changes.
    """

    def __init__(
        self,
        order: int | Literal["reverse"] | None = None,
        *,
        extra: Iterable[torch.Tensor] = (),
        races: bool = True,
    ) -> None:
        self.order, self.extra, self.races = order, list(extra), races
        self.launches = self.programs = self.accesses = 0
        self._patches = ExitStack()

    def __enter__(self) -> Sanitizer:
        if not knobs.runtime.interpret:
            raise RuntimeError("the sanitizer works in Triton's interpreter: run with TRITON_INTERPRET=1")
        with ExitStack() as patches:

            def patch(owner: Any, name: str, wrapper: Callable) -> None:
                original = getattr(owner, name)

                def call(*args, **kwargs):
                    return wrapper(original, *args, **kwargs)

                patches.enter_context(mock.patch.object(owner, name, call))

            patch(GridExecutor, "__call__", self._launch)
            patch(interpreter, "_implicit_cvt", self._convert)
            patch(InterpreterBuilder, "set_grid_idx", self._start_program)
            patch(InterpreterBuilder, "create_masked_load", self._load)
            patch(InterpreterBuilder, "create_masked_store", self._store)
            for name in dir(InterpreterBuilder):
                if name.startswith("create_atomic"):
                    patch(InterpreterBuilder, name, self._refuse_atomic)
            # Without debug, Triton emits neither device_assert nor its own overflow checks.
            builder = interpreter.interpreter_builder
            patches.enter_context(mock.patch.object(builder, "options", replace(builder.options, debug=True)))
            self._patches = patches.pop_all()
        return self

    def __exit__(self, *exc_info) -> None:
        self._patches.close()

    # What follows stands in for Triton's own functions: `original` is the one replaced.

    def _launch(self, original, executor, *args, **kwargs):
        self.launches += 1
        self._space = _AddressSpace(self.extra)
        self._permutation: list[int] | None = None
        self._program, self._index = 0, (0, 0, 0)
        try:
            return original(executor, *args, **kwargs)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, SanitizerError):
                raise cause from None
            if isinstance(cause, AssertionError):
                raise SanitizerError(f"program {self._index}: {cause}") from error
            raise

    def _convert(self, original, argument):
        converted = original(argument)
        if hasattr(argument, "data_ptr"):
            # triton.reinterpret wraps a tensor, in `base`, to change its element type.
            tensor = argument if isinstance(argument, torch.Tensor) else argument.base
            converted.handle.data = converted.handle.data | (np.uint64(self._space.add(tensor)) << _TAG_SHIFT)
        return converted

    def _start_program(self, original, builder, x, y, z):
        self.programs += 1
        nx, ny, nz = (int(n) for n in builder.grid_dim)
        number = (x * ny + y) * nz + z
        if self.order is not None:
            if self._permutation is None:
                numbers = range(nx * ny * nz)
                reverse = self.order == "reverse"
                self._permutation = (
                    list(reversed(numbers)) if reverse else random.Random(self.order).sample(numbers, len(numbers))
                )
            number = self._permutation[number]
        self._program = number + 1  # 0 is nobody
        self._index = (number // (ny * nz), number // nz % ny, number % nz)
        return original(builder, *self._index)

    def _load(self, original, builder, pointers, mask, *rest, **kwargs):
        self._check("load", pointers, mask)
        return original(builder, _untag(pointers), mask, *rest, **kwargs)

    def _store(self, original, builder, pointers, value, mask, *rest, **kwargs):
        self._check("store", pointers, mask, value)
        return original(builder, _untag(pointers), value, mask, *rest, **kwargs)

    def _refuse_atomic(self, original, *args, **kwargs):
        raise SanitizerError(f"program {self._index}: atomic operation")

    def _check(self, kind: str, pointers: TensorHandle, mask, value: TensorHandle | None = None) -> None:
        """All the rules for one access by one program."""
        # Where Triton 3.6 expands a descriptor itself, the mask is a bare array.
        lanes = np.broadcast_to(mask if isinstance(mask, np.ndarray) else mask.data, pointers.data.shape).astype(bool)
        active = pointers.data[lanes]
        if not active.size:
            return
        self.accesses += active.size
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        for addresses, views in self._space.resolve(active):
            inside = np.zeros(addresses.shape, bool)
            for view in views:
                inside |= view.covers(addresses, width) if kind == "load" else view.owns(addresses, width)
            if not inside.all():
                self._report_outside(kind, addresses[~inside], addresses.size, views)
            if (addresses % np.uint64(width)).any():
                raise SanitizerError(f"program {self._index}: {kind} not aligned to its {width} bytes")
            region = self._space.region(int(addresses[0]))
            assert region is not None
            if self.races and (conflict := getattr(region, kind)(addresses, width, self._program)):
                labels = ", ".join(view.label for view in views)
                raise SanitizerError(f"race: program {self._index} {conflict} in {labels}")
        if value is not None:
            self._check_lanes(active, np.broadcast_to(value.data, lanes.shape)[lanes])

    def _report_outside(self, kind: str, outside: np.ndarray, total: int, views: list[_View]) -> None:
        place = "no tensor of this launch"
        if views:
            place = f"{views[0].label}, at element {(int(outside[0]) - views[0].start) / views[0].itemsize:g}"
        raise SanitizerError(f"program {self._index}: {kind} outside {place}: {outside.size} of {total} lanes")

    def _check_lanes(self, addresses: np.ndarray, values: np.ndarray) -> None:
        if (addresses[1:] > addresses[:-1]).all():
            return  # already in order, so all different
        _, first, lane = np.unique(addresses, return_index=True, return_inverse=True)
        bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")
        if (bits != bits[first][lane]).any():
            raise SanitizerError(f"program {self._index}: duplicate lanes, one store with two values for one address")


def _untag(pointers: TensorHandle) -> TensorHandle:
    return TensorHandle(pointers.data & _ADDRESS_BITS, pointers.dtype)
