"""conv2d_act_pool on CPU tensors, from torch's own functions: forward and backward with everything fixed but the batch.

    inside    channels_last, whatever comes in, in which oneDNN convolves and torch pools fastest
    order     a maximum is taken before a monotone activation: the same values, of a quarter of the elements
    parts     as many samples at a time as leave their map, the convolution's output, in the processor's cache. Memory
              that the allocator gives back and asks for again costs more than what is computed in it
    kept      of a maximum a byte per pooled element, the last one of its index in the map, and never the map. The
              backward rebuilds the index from it: where a window lies is known
    rounding  that of torch's convolutions. The parts of a weight's gradient are summed in fp32 at the least,
              a bias's in a wider dtype
    order     of parts: fixed, and so is every sum for a number of threads

oneDNN can apply an activation within a convolution, but loses a ReLU's NaN and is no faster than a pass over a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

from ... import plan
from ...binding import without_autocast
from ...declare import Cost
from ...kernels.geometry import Axis, ceil_div
from ...launch import CPU
from .options import axes
from .reference import pooled

aten = torch.ops.aten
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PART = 4 * 2**20  # bytes of the map of a part
PER_THREAD = 2**20  # and at the least so many for every thread
LEAST = 2 * 2**20  # bytes of the map of a batch, below which the time of the calls outweighs what is gained


WIDER = {dtype: torch.float32 if dtype.itemsize == 2 else torch.float64 for dtype in FLOATS}


class Activation(NamedTuple):
    """value: in place where `of` is not "input". backward: a gradient times the derivative, which is computed `of` the
    output, of the input, or of nothing. monotone: it may follow a maximum."""

    value: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    of: str = "output"
    monotone: bool = True


ACTIVATIONS = {
    "none": Activation(lambda y: y, lambda grad, _: grad, of=""),
    "relu": Activation(torch.relu_, lambda grad, y: aten.threshold_backward(grad, y, 0)),
    "leaky_relu": Activation(F.leaky_relu_, lambda grad, y: aten.leaky_relu_backward(grad, y, 0.01, True)),
    "sigmoid": Activation(torch.sigmoid_, aten.sigmoid_backward),
    "tanh": Activation(torch.tanh_, aten.tanh_backward),
    "gelu": Activation(F.gelu, aten.gelu_backward, of="input", monotone=False),
    "silu": Activation(F.silu, aten.silu_backward, of="input", monotone=False),
    "hardswish": Activation(F.hardswish, aten.hardswish_backward, of="input", monotone=False),
}


class CpuConvProblem:
    """conv2d_act_pool of CPU tensors with everything fixed but the batch."""

    op = "conv2d_act_pool"

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> None:
        x, w, _ = tensors
        self.device, self.dtype = x.device, x.dtype
        self.override, self.facts = plan.override(), plan.facts(x.device)
        self.chosen = self.plans = self.passes = {}  # there are no kernels
        self.signature = plan.signature(tensors, options, "ieee")
        self.stride, self.padding, self.dilation, self.groups, name, self.pool, *self.pooling, self.count_pad = options
        self.h, self.w = axes(tensors, options)
        self.activation = ACTIVATIONS[name]
        self.channels, self.filters = int(x.shape[1]), int(w.shape[0])
        self.weight_format = suggest_memory_format(w)
        either = x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)  # as of a single channel
        self.format = self.weight_format if either else suggest_memory_format(x)
        of_pooled = self.pool == "none" or (self.pool == "max" and self.activation.monotone)
        # a mean needs the derivative at every element of the map
        self.keeps_map = self.pool == "avg" and self.activation.of != ""
        self.kept = (
            of_pooled and self.activation.of == "output",
            self.pool == "max",
            self.keeps_map or self.activation.of == "input",
        )

    # Geometry.

    @cached_property
    def inside(self) -> torch.memory_format:
        """The layout to compute in. A map that is the output has the output's."""
        if self.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
            return torch.contiguous_format  # oneDNN does not take part
        if any(_fails_in_channels_last(axis) for axis in (self.h, self.w)):
            return torch.contiguous_format
        return self.format if self.pool == "none" else torch.channels_last

    @cached_property
    def _pads_before(self) -> bool:
        """Whether opposite sides have other paddings, which torch's convolution does not know."""
        top, bottom, left, right = self.padding
        return (top, left) != (bottom, right)

    @cached_property
    def _paddings(self) -> tuple[int, int]:
        """Those that are left to torch's convolution."""
        return (0, 0) if self._pads_before else (self.padding[0], self.padding[2])

    @cached_property
    def _first(self) -> torch.Tensor:
        """By pooled element, the index in the map of its window's first element; of padding it may be negative."""
        starts = [
            torch.arange(axis.pooled, device=self.device) * axis.pool_stride - axis.pool_pad
            for axis in (self.h, self.w)
        ]
        return starts[0][:, None] * self.w.conv + starts[1]

    @cached_property
    def _in_a_byte(self) -> bool:
        """Whether the last byte of an index says which one of its window it is; else the place in the window is kept,
        counted by rows."""
        return (self.h.window - 1) * self.w.conv + self.w.window <= 256

    @cached_property
    def _first_byte(self) -> torch.Tensor:
        """`_first` modulo 256, of every channel, so that it is subtracted as fast as bytes can be."""
        first = self._first.to(torch.uint8).expand(1, self.filters, -1, -1)
        return first.contiguous(memory_format=self.inside)

    def _parts(self, batch: int) -> Iterator[slice]:
        """Equal parts of the batch, one after the other."""
        largest = batch
        if self.pool != "none" and not self.keeps_map:
            of_sample = prod(self._map) * self.dtype.itemsize
            largest = max(1, max(PART, PER_THREAD * torch.get_num_threads()) // of_sample)
        size = ceil_div(batch, ceil_div(batch, largest)) if batch else 1
        for start in range(0, batch, size):
            yield slice(start, start + size)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What `explain` tells."""
        inside = str(self.inside).removeprefix("torch.").removesuffix("_format")
        kept = "the map, of which a mean needs every element" if self.keeps_map else ""
        if self.pool == "max":
            kept = "a byte per pooled element" + ("" if self.kept[0] or not self.kept[2] else ", and its map's value")
        found = [f"computed in {inside}" + (f"; kept for the backward: {kept}" if kept else "")]
        if self.least_batch > 1:
            found.append(f"fewer than {self.least_batch} samples: torch's own autograd, for there is little to gain")
        return tuple(found)

    # So few samples that torch's own autograd is faster.

    @cached_property
    def least_batch(self) -> int:
        if self.override.path == CPU:
            return 0
        return ceil_div(LEAST, prod(self._map) * self.dtype.itemsize)

    def few(self, x, w, b) -> torch.Tensor:
        """The output, for torch to differentiate."""
        with without_autocast(x):
            z = self._convolved(x, w, b)
            if self.pool == "max" and self.activation.monotone:
                y = self.activation.value(pooled(z, self.pool, *self.pooling, self.count_pad))
            else:
                y = pooled(self.activation.value(z), self.pool, *self.pooling, self.count_pad)
            return y.contiguous(memory_format=self.format)

    # Allocation.

    def _empty(
        self, batch: int, sizes: Sequence[int], form: torch.memory_format, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return torch.empty((batch, *sizes), dtype=dtype or self.dtype, device=self.device, memory_format=form)

    @cached_property
    def _pooled(self) -> tuple[int, int, int]:
        return (self.filters, self.h.pooled, self.w.pooled)

    @cached_property
    def _map(self) -> tuple[int, int, int]:
        return (self.filters, self.h.conv, self.w.conv)

    def allocate(self, x, w, b, *, save: bool = True) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        n = x.shape[0]
        y = self._empty(n, self._pooled, self.format)
        if not save:
            return y, None, None
        code = self._empty(n, self._pooled, self.inside, torch.uint8) if self.kept[1] else None
        of_aux = self._map if self.keeps_map else self._pooled
        return y, code, self._empty(n, of_aux, self.inside) if self.kept[2] else None

    def allocate_gradients(self, tensors, needs) -> list[torch.Tensor | None]:
        x, w, b = tensors
        return [
            self._empty(x.shape[0], x.shape[1:], self.format) if needs[0] else None,
            self._empty(w.shape[0], w.shape[1:], self.weight_format) if needs[1] else None,
            torch.empty_like(b, memory_format=torch.contiguous_format) if needs[2] else None,
        ]

    # Forward.

    def forward(self, x, w, b, *, save: bool = True) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        with without_autocast(x):
            w = laid(w, self.inside)
            if self.keeps_map or self.pool == "none":
                return self._whole(self._convolved(x, w, b), save)
            y, code, aux = outs = self.allocate(x, w, b, save=save)
            for part in self._parts(x.shape[0]):
                self._pool(self._convolved(x[part], w, b), *[t if t is None else t[part] for t in outs])
        return y, code, aux

    def _convolved(self, x, w, b) -> torch.Tensor:
        return torch.conv2d(self._padded(x), w, b, self.stride, self._paddings, self.dilation, self.groups)

    def _padded(self, x) -> torch.Tensor:
        if self._pads_before:
            top, bottom, left, right = self.padding
            x = F.pad(x, (left, right, top, bottom))
        return laid(x, self.inside)

    def _whole(self, z, save: bool) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        """What the forward returns, from a map that is the output, or is kept."""
        a = self.activation.value(z)
        y = a if self.pool == "none" else aten.avg_pool2d(a, *self.pooling, self.count_pad)
        aux = (z if self.activation.of == "input" else a) if save and self.kept[2] else None
        return y.contiguous(memory_format=self.format), None, aux

    def _pool(self, z, y, code, aux) -> None:
        """From a part of the map that part of what the forward returns."""
        if self.pool == "avg":  # without an activation
            aten.avg_pool2d.out(z, *self.pooling, self.count_pad, out=y)
        elif self.activation.monotone:
            self._maximum(z, y, code)
            self.activation.value(y)
        else:
            index = self._maximum(self.activation.value(z), y, code)
            if aux is not None:
                aux.copy_(_picked(z, index))

    def _maximum(self, z, y, code) -> torch.Tensor | None:
        """Into `y`; with a code also where it is, of which the index is returned."""
        if code is None and self.inside == torch.channels_last and all(map(_has_a_full_position, (self.h, self.w))):
            _largest(_largest(z, 2, self.h), 3, self.w, out=y)
            return None
        index = torch.empty_like(y, dtype=torch.int64, memory_format=self.inside)
        window, stride, padding, ceil_mode = self.pooling
        aten.max_pool2d_with_indices.out(z, window, stride, padding, 1, ceil_mode, out=y, indices=index)
        if code is not None:
            self._encode(index, code)
        return index

    def _encode(self, index, code) -> None:
        if self._in_a_byte:
            code.copy_(index)  # which leaves the last byte
            return
        offset = index - self._first
        rows = offset.div(self.w.conv, rounding_mode="floor")
        code.copy_(offset.sub_(rows, alpha=self.w.conv - self.w.window))

    def _index(self, code) -> torch.Tensor:
        """What `code` was made of."""
        if self._in_a_byte:
            return torch.sub(code, self._first_byte).to(torch.int64).add_(self._first)
        offset = code.to(torch.int64)
        rows = offset.div(self.w.window, rounding_mode="floor")
        return offset.add_(rows, alpha=self.w.conv - self.w.window).add_(self._first)

    # Backward.

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        x, w, _ = tensors
        found = self.allocate_gradients(tensors, needs)
        if x.shape[0] == 0:
            return [t if t is None else t.zero_() for t in found]
        sums: list[torch.Tensor | None] = [None, None]
        with without_autocast(x):
            w = laid(w, self.inside)
            for part in self._parts(x.shape[0]):
                of_parts = self._backward(grad[part], x[part], w, *[t if t is None else t[part] for t in outs], needs)
                if needs[0]:
                    found[0][part] = of_parts[0]
                for i, t in enumerate(of_parts[1:]):
                    sums[i] = t if sums[i] is None else sums[i].to(torch.promote_types(t.dtype, torch.float32)).add_(t)
        for t, total in zip(found[1:], sums, strict=True):
            if t is not None:
                t.copy_(total)
        return found

    def _backward(self, grad, x, w, y, code, aux, needs) -> tuple[torch.Tensor | None, ...]:
        """The gradients of a part."""
        if self.pool == "avg":
            grad = self._spread(grad)
        grad = laid(self.activation.backward(grad, y if self.kept[0] else aux), self.inside)
        # before it is spread: of fewer elements; their terms may cancel
        db = grad.sum((0, 2, 3), dtype=WIDER[self.dtype]) if needs[2] else None
        if not (needs[0] or needs[1]):
            return None, None, db
        if self.pool == "max":
            grad = self._unpooled(grad, code)
        dx, dw, _ = aten.convolution_backward(
            grad, self._padded(x), w, None, self.stride, self._paddings, self.dilation, False, (0, 0), self.groups,
            (needs[0], needs[1], False),
        )  # fmt: skip
        if self._pads_before and dx is not None:
            top, _, left, _ = self.padding
            dx = dx[:, :, top : top + self.h.size, left : left + self.w.size]
        return dx, dw, db

    def _spread(self, grad) -> torch.Tensor:
        """The map's gradient of a mean."""
        map_ = self._empty(len(grad), self._map, self.inside)  # torch reads its sizes alone
        return aten.avg_pool2d_backward(laid(grad, self.inside), map_, *self.pooling, self.count_pad, None)

    def _unpooled(self, grad, code) -> torch.Tensor:
        """The map's gradient of a maximum."""
        map_ = self._empty(len(grad), self._map, self.inside)  # torch reads its sizes, and fills it
        window, stride, padding, ceil_mode = self.pooling
        return aten.max_pool2d_with_indices_backward.grad_input(
            grad, map_, window, stride, padding, 1, ceil_mode, self._index(code), grad_input=map_
        )

    # What it costs.

    def saved_bytes(self, batch: int) -> int:
        of_aux = prod(self._map if self.keeps_map else self._pooled) * self.dtype.itemsize
        return batch * (prod(self._pooled) * self.kept[1] + of_aux * self.kept[2])

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        """Every output of the convolution is computed, whether a window holds it or not."""
        taps = self.channels // self.groups * self.h.taps * self.w.taps
        flops = 2 * batch * prod(self._map) * taps
        size = self.dtype.itemsize
        x, w = batch * self.channels * self.h.size * self.w.size * size, self.filters * taps * size
        y = batch * prod(self._pooled) * size
        saved = self.saved_bytes(batch) if any(needs) else 0
        costs = {"forward": Cost(x + w + self.filters * size + y + saved, flops)}
        read = y * (1 + self.kept[0]) + saved
        if needs[0]:
            costs["backward_input"] = Cost(read + w + x, flops)
        if needs[1] or needs[2]:
            costs["backward_weight"] = Cost(read + x + w + self.filters * size, flops if needs[1] else 0)
        return costs


def laid(t: torch.Tensor, form: torch.memory_format) -> torch.Tensor:
    """The tensor in a layout, told by all its strides: those of a single channel, which may be anything, decide which
    convolution torch calls."""
    t = t.contiguous(memory_format=form)
    _, c, h, w = t.shape
    strides = (h * w * c, 1, w * c, c) if form == torch.channels_last else (c * h * w, h * w, w, 1)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def _fails_in_channels_last(axis: Axis) -> bool:
    """Where oneDNN 3.12 crashes or computes something else in channels_last: outputs that read padding alone, and
    strides over an input that has one output or less than a filter."""
    span = axis.dilation * (axis.taps - 1) + 1
    return axis.pad >= span or (axis.stride > 1 and (axis.conv == 1 or axis.size < span))


def _picked(z: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Elements of maps by their index within a map."""
    n, k, h, w = index.shape
    if index.is_contiguous():
        return z.flatten(2).gather(2, index.flatten(2)).view(index.shape)
    pixels = z.permute(0, 2, 3, 1).reshape(n, -1, k)
    return pixels.gather(1, index.permute(0, 2, 3, 1).reshape(n, -1, k)).view(n, h, w, k).permute(0, 3, 1, 2)


def _positions(axis: Axis) -> list[tuple[int, int]]:
    """By position in the windows, from which to which of the windows it is within the map; those that are none have a
    last one before the first."""
    found = []
    for i in range(axis.window):
        first = max(0, ceil_div(axis.pool_pad - i, axis.pool_stride))
        last = min(axis.pooled - 1, (axis.conv - 1 + axis.pool_pad - i) // axis.pool_stride)
        found.append((first, last))
    return found


def _has_a_full_position(axis: Axis) -> bool:
    return (0, axis.pooled - 1) in _positions(axis)


def _largest(z: torch.Tensor, dim: int, axis: Axis, out: torch.Tensor | None = None) -> torch.Tensor:
    """The maximum of windows along one dimension, NaN if there is one: position by position, which needs no indices."""
    positions = _positions(axis)
    full = positions.index((0, axis.pooled - 1))

    def at(i: int) -> torch.Tensor:
        first, last = (axis.pool_stride * u - axis.pool_pad + i for u in positions[i])
        return z[(slice(None),) * dim + (slice(first, last + 1, axis.pool_stride),)]

    others = [i for i, span in enumerate(positions) if i != full and span[0] <= span[1]]
    best = torch.empty_like(at(full)) if out is None else out
    if others and positions[others[0]] == positions[full]:
        torch.maximum(at(full), at(others.pop(0)), out=best)
    else:
        best.copy_(at(full))
    for i in others:
        first, last = positions[i]
        some = best.narrow(dim, first, last + 1 - first)
        torch.maximum(some, at(i), out=some)
    return best
