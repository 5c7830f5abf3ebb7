"""Memory that shows what was done to it: tensors between guard bands, filled with poison.

A `Guard` holds one tensor inside a larger buffer. Every byte of the buffer that is not an element of the tensor (the
bands before and after it, the gaps between its rows) has a known value, so a stray write shows; the elements hold a
poison that no arithmetic produces (a NaN with a payload of its own, 0xA5A5... for integers), so an element that was
never written shows, and one that was read before it was written turns the result into NaN.

    guard = Guard.empty((8, 30), torch.float16)
    kernel[grid](x, guard.tensor)
    guard.check()

    with poisoned_allocations() as memory:
        y = op(x)  # its torch.empty, empty_like, empty_strided, new_empty are guarded
    memory.check()
    memory.check_written(y)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

__all__ = ["Allocations", "Guard", "GuardError", "poisoned_allocations"]

BAND_BYTES = 4096  # also keeps the alignment of the allocator's addresses
BAND_BYTE = 0xA5

# Bits are compared as integers of the element's width: a NaN is equal to nothing, itself included.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_BAND_BITS = {
    torch.uint8: 0xA5,
    torch.int16: 0xA5A5 - 2**16,
    torch.int32: 0xA5A5A5A5 - 2**32,
    torch.int64: 0xA5A5A5A5A5A5A5A5 - 2**64,
}
# Signalling NaNs: arithmetic returns quiet ones, so a result is never mistaken for memory left as it was.
_NAN_BITS = {
    torch.float16: 0x7DA5,
    torch.bfloat16: 0x7FA5,
    torch.float32: 0x7FA5A5A5,
    torch.float64: 0x7FF5A5A5A5A5A5A5,
}


class GuardError(AssertionError):
    """Memory was written where it should not be, or not written where it should be."""


class Guard:
    """One poisoned tensor and the buffer around it."""

    def __init__(
        self,
        size: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        *,
        offset: int = 0,
        device: torch.device | str = "cpu",
    ):
        """`offset`, in elements, moves the tensor off its 16-byte alignment."""
        span = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        self._bits = _BITS[dtype.itemsize]
        self._words = dtype.itemsize // self._bits.itemsize  # 2 for complex128, else 1
        first = BAND_BYTES // dtype.itemsize + offset
        length = BAND_BYTES + (offset + span) * dtype.itemsize + BAND_BYTES
        self._buffer = torch.full((-(-length // 16) * 16,), BAND_BYTE, dtype=torch.uint8, device=device)
        self.tensor = self._buffer.view(dtype).as_strided(size, stride, first)
        self._poison = _NAN_BITS.get(dtype, _BAND_BITS[self._bits])
        self._elements(self._buffer).fill_(self._poison)

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        *,
        offset: int = 0,
        device: torch.device | str = "cpu",
    ) -> Guard:
        stride = torch.empty(shape, device="meta").to(memory_format=memory_format).stride()
        return cls(tuple(shape), stride, dtype, offset=offset, device=device)

    def _elements(self, buffer: torch.Tensor) -> torch.Tensor:
        """The bits of the tensor's elements within `buffer`, as integers."""
        words = self._words
        size, stride = [*self.tensor.shape, words], [*(step * words for step in self.tensor.stride()), 1]
        return buffer.view(self._bits).as_strided(size, stride, self.tensor.storage_offset() * words)

    def check(self, written: bool = True) -> None:
        """The surroundings are untouched and, unless `written` is false, every element was written."""
        rest = self._buffer.clone()
        self._elements(rest).fill_(_BAND_BITS[self._bits])
        stray = (rest != BAND_BYTE).nonzero().flatten()
        if stray.numel():
            origin = self.tensor.storage_offset() * self.tensor.element_size()
            raise GuardError(
                f"{self} was written outside: {stray.numel()} bytes, "
                f"the first {int(stray[0]) - origin} bytes from its start"
            )
        if written and (missing := self.unwritten()):
            raise GuardError(f"{self}: {missing} of {self.tensor.numel()} elements were never written")

    def unwritten(self) -> int:
        """Elements that still hold the poison. An integer result may equal it: 165 in uint8, for one."""
        return int((self._elements(self._buffer) == self._poison).all(dim=-1).sum())

    def __str__(self) -> str:
        return f"a {str(self.tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(self.tensor.shape)}"


class Allocations:
    """The guarded tensors handed out by `poisoned_allocations`."""

    def __init__(self) -> None:
        self.guards: list[Guard] = []

    def check(self) -> None:
        """No write went past any of them. Scratch memory need not have been filled: see `check_written`."""
        for guard in self.guards:
            guard.check(written=False)

    def check_written(self, *tensors: torch.Tensor) -> None:
        """Each of these outputs came from a guarded allocation and was written everywhere."""
        for tensor in tensors:
            owner = [guard for guard in self.guards if guard.tensor.data_ptr() == tensor.data_ptr()]
            if tensor.numel() and not owner:
                raise GuardError(f"a tensor of shape {tuple(tensor.shape)} does not come from a guarded allocation")
            for guard in owner:
                guard.check()


# Patched, and not watched by a mode of torch: under a mode the ops would go to their registered operators.
FACTORIES = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextmanager
def poisoned_allocations() -> Iterator[Allocations]:
    """Every uninitialised tensor that Python code makes in this block is poisoned and guarded."""
    allocations = Allocations()

    def guarding(factory):
        def allocate(*args, **kwargs):
            result = factory(*args, **kwargs)
            # Empty, fake and meta tensors have no memory to guard.
            plain = type(result) is torch.Tensor and result.layout is torch.strided and not result.is_meta
            if not plain or not result.numel():
                return result
            guard = Guard(result.shape, result.stride(), result.dtype, device=result.device)
            allocations.guards.append(guard)
            return guard.tensor

        return allocate

    with ExitStack() as patches:
        factories = [(owner, name, getattr(owner, name)) for owner, name in FACTORIES]
        for owner, name, factory in factories:
            patches.enter_context(mock.patch.object(owner, name, guarding(factory)))
        yield allocations
