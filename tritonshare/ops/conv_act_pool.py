"""conv2d_act_pool: convolution, bias, activation and pooling in one kernel. Device code: kernels/conv_act_pool.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

from .. import check, launch, plan
from ..kernels.geometry import Axis, ConvActPool, ceil_div, conv_size, pool_size
from ..op import Case, Cost, Op
from ..plan import Plan

MAX_WINDOW = 8
# offsets within a sample are 32-bit; the margin keeps a tile's lanes behind the last one in range
MAX_SAMPLE = 2**31 - 2**20

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def reference(
    input, weight, bias, stride, padding, dilation, groups,
    activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, count_include_pad,
):  # fmt: skip
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        input = F.pad(input, (left, right, top, bottom))
        top = left = 0
    out = ACTIVATIONS[activation](F.conv2d(input, weight, bias, stride, (top, left), dilation, groups))
    if pool == "max":
        return F.max_pool2d(out, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    if pool == "avg":
        return F.avg_pool2d(out, pool_size, pool_stride, pool_padding, ceil_mode, count_include_pad)
    return out


# Options: from what a caller writes to the schema's.


def pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return (values[0], values[-1])


def four_sides(padding: Any, taps: Sequence[int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """Padding as (top, bottom, left, right). "same" puts the odd one at the end, as torch does."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        h, w = (d * (t - 1) for t, d in zip(taps, dilation, strict=True))
        return (h // 2, h - h // 2, w // 2, w - w // 2)
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        return tuple(padding)
    h, w = pair(padding)
    return (h, h, w, w)


def canonical(
    tensors, stride, padding, dilation, groups,
    activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, count_include_pad,
):  # fmt: skip
    dilation = pair(dilation)
    conv = (pair(stride), four_sides(padding, tensors[1].shape[2:], dilation), dilation, groups, activation or "none")
    if pool in (None, "none"):
        return (*conv, "none", (1, 1), (1, 1), (0, 0), False, True)
    size = pair(pool_size)
    step = size if pool_stride is None else pair(pool_stride)
    return (*conv, pool, size, step, pair(pool_padding), ceil_mode, count_include_pad)


# The contract.


def axes(a: check.Arguments) -> tuple[Axis, Axis]:
    """Both spatial axes of a call. Sizes may be too small: the clauses below look."""
    stride, padding, dilation, _, _, _, window, pool_stride, pool_pad, ceil_mode, _ = canonical(
        (a["input"], a["weight"], a["bias"]), *[a[name] for name in OPTIONS]
    )
    both = []
    for i in (0, 1):
        # int(): while torch traces, sizes other than the batch become constants here
        size, taps = int(a["input"].shape[2 + i]), int(a["weight"].shape[2 + i])
        conv = conv_size(size, taps, stride[i], padding[2 * i] + padding[2 * i + 1], dilation[i])
        pooled = pool_size(conv, window[i], pool_stride[i], pool_pad[i], ceil_mode)
        both.append(
            Axis(size, taps, stride[i], padding[2 * i], dilation[i], conv, window[i], pool_stride[i], pool_pad[i], pooled)
        )
    return both[0], both[1]


def _channels(a):
    groups, channels, of_weight = a["groups"], a["input"].shape[1], a["weight"].shape[1]
    if channels == of_weight * groups:
        return None
    return f"axis 1 (C / groups) is {of_weight}, but input has {channels} channels and groups is {groups}"


def _groups(a):
    out = a["weight"].shape[0]
    return None if out % a["groups"] == 0 else f"is {a['groups']}, which does not divide the {out} out-channels (weight axis 0)"


def _bias(a):
    if a["bias"] is None or a["bias"].shape[0] == a["weight"].shape[0]:
        return None
    return f"axis 0 is {a['bias'].shape[0]}, but weight has {a['weight'].shape[0]} out-channels (axis 0)"


def _nonempty(a):
    for axis, name in enumerate(("K", "C / groups", "R", "S")):
        if a["weight"].shape[axis] == 0:
            return f"axis {axis} ({name}) is empty"
    return None


def _same_needs_unit_stride(a):
    if a["padding"] == "same" and pair(a["stride"]) != (1, 1):
        return f"is 'same', which needs stride 1, but stride is {a['stride']!r}"
    return None


def _filter_fits(a):
    for i, (name, axis) in enumerate(zip("HW", axes(a), strict=True)):
        if axis.conv < 1:
            span = axis.dilation * (axis.taps - 1) + 1
            return f"axis {2 + i} ({name}) is {axis.size}, which with its padding is smaller than the filter's span of {span}"
    return None


def _window_fits(a):
    for i, (name, axis) in enumerate(zip("HW", axes(a), strict=True)):
        if axis.pooled < 1:
            return f"of {axis.window} is larger than the conv output's axis {2 + i} ({name}), which is {axis.conv} with pool_padding {axis.pool_pad}"
    return None


def _pool_pad(a):
    if a["pool"] in (None, "none"):
        return None
    for name, pad, window in zip("HW", pair(a["pool_padding"]), pair(a["pool_size"]), strict=True):
        if pad > window // 2:
            return f"is {pad} on axis {name}; at most half the window of {window} is allowed"
    return None


def _offsets(a):
    h, w = axes(a)
    per_sample = {
        "input": a["input"].shape[1] * h.size * w.size,
        "the output": a["weight"].shape[0] * h.pooled * w.pooled,
        "weight": prod(a["weight"].shape),
    }
    for name, count in per_sample.items():
        if count > MAX_SAMPLE:
            of = name if name == "weight" else f"one sample of {name}"
            return f"is too large: {of} has {count} elements, and at most {MAX_SAMPLE} are supported"
    return None


def _ones(a, name, sizes):
    """A tensor like a[name] with some axes of another size; on meta where it would be large."""
    shape = list(a[name].shape)
    for axis, size in sizes.items():
        shape[axis] = size
    return {name: torch.ones(shape, dtype=a[name].dtype, device="meta" if prod(shape) > 2**20 else a[name].device)}


CONTRACT = (
    check.tensor("input"),
    check.tensor("weight"),
    check.tensor("bias", optional=True),
    check.rank("input", "N C H W", "C H W"),
    check.rank("weight", "K C/groups R S"),
    check.rank("bias", "K"),
    check.floating("input"),
    check.same_dtype("weight", "input"),
    check.same_dtype("bias", "input"),
    check.same_device("weight", "input"),
    check.same_device("bias", "input"),
    check.relation("weight", _nonempty, lambda a: _ones(a, "weight", {0: 0}), lambda a: _ones(a, "weight", {2: 0})),
    check.integers("stride", (1, 2), 1),
    check.integers("padding", (1, 2, 4), 0, names=("same", "valid")),
    check.integers("dilation", (1, 2), 1),
    check.integers("groups", (1,), 1),
    check.relation("weight", _channels, lambda a: _ones(a, "weight", {1: a["weight"].shape[1] + 1})),
    check.relation("groups", _groups, lambda a: {"groups": 2, **_ones(a, "weight", {0: 3, 1: a["input"].shape[1] // 2})}),
    check.relation("bias", _bias, lambda a: _ones(a, "bias", {0: a["bias"].shape[0] + 1})),
    check.choice("activation", (*ACTIVATIONS, None)),
    check.choice("pool", ("max", "avg", "none", None)),
    check.integers("pool_size", (1, 2), 1, MAX_WINDOW),
    check.integers("pool_stride", (1, 2), 1, none=True),
    check.integers("pool_padding", (1, 2), 0),
    check.flag("ceil_mode"),
    check.flag("count_include_pad"),
    check.relation("padding", _same_needs_unit_stride, lambda a: {"padding": "same", "stride": 2}),
    check.relation("input", _filter_fits, lambda a: {**_ones(a, "input", {2: 1}), "padding": 0}),
    check.relation("pool_padding", _pool_pad, lambda a: {"pool_padding": 2, "pool_size": 3}),
    check.relation("pool_size", _window_fits, lambda a: {"pool_size": MAX_WINDOW, "padding": 0}),
    check.relation("input", _offsets, lambda a: {n: t.to("meta") for n, t in a.items() if isinstance(t, torch.Tensor)}
                   | _ones(a, "input", {2: 2**16, 3: 2**16})),
)  # fmt: skip


# Plans.


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds n, within low .. high."""
    return min(max(1 << (n - 1).bit_length(), low), high)


def reduction_block(inner: int, outer: int, high: int) -> int:
    """A block of a reduction over outer * inner elements: one that divides `inner` where that is not wasteful, since
    then an index of `outer` serves a whole block; else one that holds it all, up to `high`."""
    block = min(inner & -inner, high)
    return block if block >= 16 else power_of_two(outer * inner, 16, high)


class Ladder:
    """Block sizes of each pass: of the geometry, the element size and the device, and never of the batch."""

    def __init__(self, geo: ConvActPool, itemsize: int, ieee: bool, device: plan.Device) -> None:
        self.geo, self.itemsize, self.ieee, self.device = geo, itemsize, ieee, device
        # products of IEEE fp32 run on the ordinary cores, from registers: smaller tiles, or they spill
        self.side = 32 if ieee else 64
        self.deep = 32 if itemsize == 4 else 64

    def forward(self) -> Plan:
        geo = self.geo
        most = 1 if self.ieee else 4 if geo.monotone and geo.pool != "avg" else 2
        positions = max(p for p in range(1, most + 1) if geo.WINDOW % p == 0)
        k = power_of_two(geo.KG, 16, self.side)
        m = self.side * (2 if k <= self.side // 2 and not self.ieee else 1)
        red = reduction_block(geo.CG, geo.h.taps * geo.w.taps, self.deep)
        return self._staged(positions * m * red + red * k, BLOCK_M=m, BLOCK_K=k, BLOCK_RED=red, POSITIONS=positions)

    def backward_input(self) -> Plan:
        geo = self.geo
        c = power_of_two(geo.CG, 16, self.side)
        red = reduction_block(geo.KG, geo.h.phase_taps * geo.w.phase_taps, self.deep)
        return self._staged(2 * self.side * red + red * c, BLOCK_M=self.side, BLOCK_C=c, BLOCK_RED=red)

    def backward_weight(self) -> Plan:
        geo = self.geo
        most = 1 if self.ieee else 4
        positions = max(p for p in range(1, most + 1) if geo.WINDOW % p == 0)
        k = power_of_two(geo.KG, 16, self.side)
        red = reduction_block(geo.CG, geo.h.taps * geo.w.taps, self.side)
        m = self.deep
        return self._staged(2 * k * m + positions * m * red, BLOCK_M=m, BLOCK_K=k, BLOCK_RED=red, POSITIONS=positions)

    def _staged(self, elements: int, **blocks: int) -> Plan:
        """As many stages as leave room for two programs on a processor; `elements` are those of one stage.

        Four warps always: with eight, convolution loops have compiled to wrong code (pytorch#173068).
        """
        stages = max(1, min(4, self.device.shared // 2 // (elements * self.itemsize)))
        return Plan.of(num_warps=4, num_stages=stages, **blocks)


# The problem.


class ConvProblem:
    """conv2d_act_pool with everything fixed but the batch."""

    def __init__(self, tensors: Sequence[torch.Tensor | None], options: tuple[Any, ...]) -> None:
        from ..kernels.activation import ACTIVATIONS as DEVICE_ACTIVATIONS

        x, w, b = tensors
        self.options = options
        self.device, self.dtype = x.device, x.dtype
        arguments = dict(zip(CONV2D_ACT_POOL.arguments, (*tensors, *options), strict=True))
        h, width = axes(arguments)
        self.activation = DEVICE_ACTIVATIONS[arguments["activation"]]
        self.geo = ConvActPool(
            C=int(x.shape[1]),
            K=int(w.shape[0]),
            groups=arguments["groups"],
            h=h,
            w=width,
            pool=arguments["pool"],
            count_include_pad=arguments["count_include_pad"],
            derivative_of=self.activation.derivative_of,
            monotone=self.activation.monotone,
            slope=self.activation.slope,
            channels_last=suggest_memory_format(x) == torch.channels_last,
            weight_channels_last=suggest_memory_format(w) == torch.channels_last,
        )
        # a mean over a smooth activation would need its derivative at every unpooled element
        self.recomputes = self.geo.pool == "avg" and self.geo.derivative_of in ("output", "input")
        self.kept = (self.geo.aux == "output", self.geo.has_code, self.geo.aux == "input")
        self.overrides = dict(plan.override().plan)
        self.facts = plan.override().device or plan.facts(self.device)

    # Plans and launchers.

    @cached_property
    def precision(self) -> str:
        return precision() if self.dtype == torch.float32 and not self.facts.is_hip else "ieee"

    @cached_property
    def ladder(self) -> Ladder:
        ieee = self.dtype == torch.float32 and self.precision == "ieee"
        return Ladder(self.geo, self.dtype.itemsize, ieee, self.facts)

    @cached_property
    def plans(self) -> dict[str, Plan]:
        passes = ("forward", "backward_input", "backward_weight")
        return {name: getattr(self.ladder, name)().changed(self.overrides) for name in passes}

    @cached_property
    def notes(self) -> tuple[str, ...]:
        if self.recomputes:
            return ("backward: torch, from a recomputed map (a mean over this activation has no kernel for it)",)
        return ()

    @cached_property
    def _code(self) -> ModuleType:
        from ..kernels import conv_act_pool

        return conv_act_pool

    def _launcher(self, name: str, **constants: Any) -> launch.Launcher:
        import triton.language as tl

        type_of = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        dot = type_of[self.dtype]
        if launch.triton_state()[1] and self.dtype == torch.bfloat16:
            dot = tl.float32  # the interpreter cannot compute with bf16
        constants |= {"geo": self.geo, "DERIVATIVE": self.activation.derivative}
        constants |= {"DOT_TYPE": dot, "PRECISION": self.precision}
        return launch.Launcher(getattr(self._code, name), constants, self.plans[name], self.device)

    @cached_property
    def _forward(self) -> launch.Launcher:
        return self._launcher("forward", ACT=self.activation.value)

    @cached_property
    def _backward_input(self) -> launch.Launcher:
        return self._launcher("backward_input")

    @cached_property
    def _backward_weight(self) -> launch.Launcher:
        return self._launcher("backward_weight")

    @cached_property
    def _sum_splits(self) -> launch.Launcher:
        from ..kernels.reduce import sum_splits

        sizes = {"W": self.geo.K * self.geo.RED, "B": self.geo.K}
        return launch.Launcher(sum_splits, sizes, Plan.of(BLOCK=256, SPLITS_BLOCK=16), self.device)

    # The way of the tensors.

    def _empty(self, batch: int, *sizes: int, dtype: torch.dtype | None = None, like_weight: bool = False) -> torch.Tensor:
        last = self.geo.weight_channels_last if like_weight else self.geo.channels_last
        return torch.empty(
            (batch, *sizes), dtype=dtype or self.dtype, device=self.device, memory_format=memory_format(last)
        )

    def _dense(self, t: torch.Tensor, like_weight: bool = False) -> torch.Tensor:
        """t in the layout that the geometry states; a copy where it is not."""
        last = self.geo.weight_channels_last if like_weight else self.geo.channels_last
        return t.contiguous(memory_format=memory_format(last))

    def allocate(self, x, w, b) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        geo, n = self.geo, x.shape[0]
        sizes = (geo.K, geo.h.pooled, geo.w.pooled)
        none = x.new_empty(0)
        return (
            self._empty(n, *sizes),
            self._empty(n * geo.code_planes, *sizes, dtype=torch.uint8) if geo.has_code else none,
            self._empty(n, *sizes) if geo.aux == "input" else none,
        )

    def forward(self, x, w, b) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, code, aux = self.allocate(x, w, b)
        geo, sizes = self.geo, self.plans["forward"]
        n = x.shape[0]
        if n:
            k_blocks = geo.groups * ceil_div(geo.KG, sizes["BLOCK_K"])
            grid = k_blocks * ceil_div(n * geo.h.pooled * geo.w.pooled, sizes["BLOCK_M"])
            self._forward(
                grid, self._dense(x), self._dense(w, like_weight=True), None if b is None else b.contiguous(),
                y, code if geo.has_code else None, aux if geo.aux == "input" else None, n,
            )  # fmt: skip
        return y, code, aux

    def allocate_gradients(self, tensors, needs) -> list[torch.Tensor | None]:
        x, w, b = tensors
        return [
            self._empty(*x.shape) if needs[0] else None,
            self._empty(*w.shape, like_weight=True) if needs[1] else None,
            torch.empty_like(b, memory_format=torch.contiguous_format) if needs[2] else None,
        ]

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        if self.recomputes:
            return CONV2D_ACT_POOL.reference_backward(grad, tensors, self.options, needs)
        x, w, _ = tensors
        dx, dw, db = self.allocate_gradients(tensors, needs)
        if x.shape[0] == 0:
            for t in (dw, db):
                if t is not None:
                    t.zero_()
            return [dx, dw, db]
        y, code, z = outs
        read = (self._dense(grad), code if self.geo.has_code else None, {"output": y, "input": z, "": None}[self.geo.aux])
        if dx is not None:
            self._launch_backward_input(dx, read, self._dense(w, like_weight=True))
        if dw is not None or db is not None:
            self._launch_backward_weight(dw, db, read, self._dense(x))
        return [dx, dw, db]

    def _launch_backward_input(self, dx, read, w) -> None:
        geo, sizes, n = self.geo, self.plans["backward_input"], dx.shape[0]
        tiles = geo.groups * ceil_div(geo.CG, sizes["BLOCK_C"]) * geo.h.period * geo.w.period
        grid = tiles * ceil_div(n * geo.h.cells * geo.w.cells, sizes["BLOCK_M"])
        self._backward_input(grid, *read, w, dx, n)

    def _launch_backward_weight(self, dw, db, read, x) -> None:
        geo, sizes, n = self.geo, self.plans["backward_weight"], x.shape[0]
        weights, biases = geo.K * geo.RED, geo.K
        tiles = geo.groups * ceil_div(geo.KG, sizes["BLOCK_K"])
        tiles *= ceil_div(geo.RED, sizes["BLOCK_RED"]) if dw is not None else 1
        blocks = ceil_div(n * geo.h.pooled * geo.w.pooled, sizes["BLOCK_M"])
        splits = self.splits(tiles, blocks)
        per_split = ceil_div(blocks, splits)
        splits = ceil_div(blocks, per_split)
        if splits == 1:
            self._backward_weight(tiles, x, *read, dw, db, n, per_split)
            return
        partial = torch.empty(splits * (weights + biases), dtype=torch.float32, device=self.device)
        dw_part = partial if dw is not None else None
        db_part = partial[weights:] if db is not None else None
        self._backward_weight(tiles * splits, x, *read, dw_part, db_part, n, per_split)
        self._sum_splits(ceil_div(weights + biases, 256), partial, dw, db, splits)

    def splits(self, tiles: int, blocks: int) -> int:
        """Programs along the pixels in backward_weight: enough for two per processor, each of four blocks or more."""
        return max(1, min(ceil_div(2 * self.facts.processors, tiles), blocks // 4))

    def cost(self, batch: int) -> dict[str, Cost]:
        geo, size = self.geo, self.dtype.itemsize
        x, w = batch * geo.x_n, geo.K * geo.RED
        y = batch * geo.y_n
        code = y * geo.code_planes if geo.has_code else 0
        aux = y * size if geo.aux else 0
        flops = 2 * batch * geo.h.pooled * geo.w.pooled * geo.WINDOW * geo.K * geo.RED
        dense_flops = 2 * batch * geo.h.conv * geo.w.conv * geo.K * geo.RED
        written_aux = aux if geo.aux == "input" else 0
        return {
            "forward": Cost((x + w + geo.K + y) * size + code + written_aux, flops),
            "backward_input": Cost((y + w + x) * size + code + aux, dense_flops),
            "backward_weight": Cost((y + x + w + geo.K) * size + code + aux, flops),
        }


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def precision() -> str:
    """How convolutions multiply fp32, by torch's own switch (torch.backends.cudnn.conv.fp32_precision / allow_tf32)."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


# Cases: ((N, C, H, W), (K, C / groups, R, S), bias). "tiny" and "edge" run in the interpreter, "layer" is compiled.


def case(name, tags, x, w, bias=True, **options) -> Case:
    return Case(name, tuple(tags.split()), (x, w, (w[0],) if bias else None), options)


IMPALA_POOL = {"padding": 1, "pool_size": 3, "pool_stride": 2, "pool_padding": 1}
CASES = (
    # tiny: the plain geometry, exact and ragged tiles, every pooling
    case("exact", "tiny", (2, 16, 8, 8), (16, 16, 3, 3), padding=1),
    case("ragged", "tiny", (3, 3, 9, 7), (5, 3, 3, 3)),
    case("many_tiles", "tiny", (3, 5, 19, 17), (35, 5, 3, 3), padding=1),
    case("article_k5", "tiny", (2, 3, 12, 12), (32, 3, 5, 5), padding=2),
    case("avg", "tiny", (2, 4, 9, 9), (6, 4, 3, 3), pool="avg"),
    case("no_pool", "tiny", (2, 4, 7, 6), (6, 4, 3, 3), pool=None),
    # edge: one axis of difficulty each
    case("size_one", "edge", (1, 1, 1, 1), (1, 1, 1, 1), pool_size=1),
    case("empty_batch", "edge", (0, 3, 8, 8), (4, 3, 3, 3)),
    case("no_bias", "edge", (2, 3, 8, 8), (4, 3, 3, 3), bias=False),
    case("one_channel", "edge", (3, 1, 10, 10), (4, 1, 5, 5)),
    case("pointwise", "edge", (2, 17, 6, 6), (18, 17, 1, 1)),
    case("strided", "edge", (2, 3, 13, 12), (4, 3, 3, 3), stride=2, padding=1),
    case("stride_over_filter", "edge", (2, 3, 14, 15), (4, 3, 2, 2), stride=3),
    case("uneven_options", "edge", (2, 3, 15, 13), (4, 3, 3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2),
         pool_size=(2, 3), pool_stride=(3, 2), pool_padding=(1, 1)),
    case("dilated", "edge", (2, 3, 12, 12), (4, 3, 3, 3), dilation=2, padding=2),
    case("dilation_meets_stride", "edge", (1, 2, 15, 15), (3, 2, 3, 3), dilation=2, stride=2, padding=2),
    case("same_even", "edge", (2, 3, 8, 9), (4, 3, 2, 4), padding="same"),
    case("four_sides", "edge", (1, 3, 8, 8), (4, 3, 3, 3), padding=(0, 2, 1, 0)),
    case("groups", "edge", (2, 6, 8, 8), (9, 2, 3, 3), groups=3, padding=1),
    case("depthwise", "edge", (2, 5, 8, 8), (5, 1, 3, 3), groups=5, padding=1),
    case("overlapping_windows", "edge", (2, 3, 11, 11), (4, 3, 3, 3), **IMPALA_POOL),
    case("gap_between_windows", "edge", (1, 3, 13, 13), (4, 3, 3, 3), pool_size=2, pool_stride=3),
    case("ceil_mode", "edge", (1, 3, 10, 11), (4, 3, 3, 3), pool_size=3, pool_stride=2, ceil_mode=True),
    case("ceil_mode_padded", "edge", (1, 2, 10, 10), (3, 2, 3, 3), pool_size=3, pool_stride=3, pool_padding=1,
         ceil_mode=True),
    case("window_8x8", "edge", (1, 2, 17, 17), (3, 2, 2, 2), pool_size=8),
    case("window_is_the_map", "edge", (2, 3, 8, 8), (4, 3, 3, 3), pool_size=6),
    case("avg_padded", "edge", (2, 3, 9, 9), (4, 3, 3, 3), pool="avg", pool_size=3, pool_stride=2, pool_padding=1),
    case("avg_excluding_pad", "edge", (2, 3, 9, 9), (4, 3, 3, 3), pool="avg", pool_size=3, pool_stride=2,
         pool_padding=1, count_include_pad=False),
    case("avg_ceil", "edge", (1, 3, 10, 9), (4, 3, 3, 3), pool="avg", pool_size=3, pool_stride=2, pool_padding=1,
         ceil_mode=True),
    case("avg_linear", "edge", (2, 3, 8, 8), (4, 3, 3, 3), pool="avg", activation="none"),
    case("avg_leaky", "edge", (2, 3, 8, 8), (4, 3, 3, 3), pool="avg", activation="leaky_relu"),
    case("avg_window_6x6", "edge", (1, 2, 13, 13), (3, 2, 2, 2), pool="avg", pool_size=6),
    case("avg_tanh", "edge", (2, 3, 8, 8), (4, 3, 3, 3), pool="avg", activation="tanh"),
    case("no_pool_strided_gelu", "edge", (2, 3, 9, 9), (4, 3, 3, 3), pool=None, stride=2, activation="gelu"),
    case("no_pool_sigmoid", "edge", (2, 3, 6, 6), (4, 3, 3, 3), pool=None, activation="sigmoid"),
    case("no_pool_leaky", "edge", (2, 3, 6, 6), (4, 3, 3, 3), pool=None, activation="leaky_relu"),
    *(case(f"act_{name}", "edge", (2, 3, 8, 8), (4, 3, 3, 3), activation=name) for name in ACTIVATIONS if name != "relu"),
    # layers of networks that people train
    case("article_conv1", "layer", (128, 3, 32, 32), (32, 3, 5, 5), padding=2),
    case("article_conv2", "layer", (128, 32, 16, 16), (64, 32, 5, 5), padding=2),
    case("cifar_conv1", "layer", (512, 3, 32, 32), (64, 3, 3, 3), padding=1),
    case("mnist_conv1", "layer", (4096, 1, 28, 28), (32, 1, 5, 5), padding=2),
    case("impala_s1", "layer", (2048, 3, 64, 64), (16, 3, 3, 3), **IMPALA_POOL),
    case("impala_s2", "layer", (2048, 16, 32, 32), (32, 16, 3, 3), **IMPALA_POOL),
    case("resnet_stem", "layer", (256, 3, 224, 224), (64, 3, 7, 7), bias=False, stride=2, **{**IMPALA_POOL, "padding": 3}),
    case("vggish_conv1", "layer", (256, 1, 96, 64), (64, 1, 3, 3), padding=1),
    case("vgg1_2", "layer", (64, 64, 224, 224), (64, 64, 3, 3), padding=1),
    case("vgg4_3", "layer", (64, 512, 28, 28), (512, 512, 3, 3), padding=1),
    case("kernelbench_l2_82", "layer", (128, 8, 256, 256), (64, 8, 3, 3), activation="tanh", pool_size=4),
    case("kernelbench_l2_35", "layer", (128, 64, 128, 128), (128, 64, 3, 3), activation="hardswish"),
)  # fmt: skip

CONV2D_ACT_POOL = Op(
    name="conv2d_act_pool",
    schema="(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, int[2] dilation, int groups, "
    "str activation, str pool, int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode, "
    "bool count_include_pad)",
    outputs=3,  # the pooled output, a code per element of it, the pre-activation at the maximum
    contract=CONTRACT,
    canonical=canonical,
    problem=ConvProblem,
    reference=reference,
    cases=CASES,
    precision=precision,
)
OPTIONS = CONV2D_ACT_POOL.arguments[CONV2D_ACT_POOL.tensors :]
