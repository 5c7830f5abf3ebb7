"""Frozen records of a problem's geometry, folded into a kernel at compile time.

A kernel takes one record as a `constexpr`; every size, stride and pad in it is a compile-time number, so divisions by
it become multiplications and conditions on it vanish. The batch size is never in a record: it is a run-time argument.
"""

import inspect
import sys
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import sha256
from math import gcd
from typing import Any

STATE_BLOCK = 256  # elements of an 8-bit optimizer state that share a scale


def _key_of(value: Any) -> str:
    """What fixes a field's value: of jit functions and records it is their own key."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_key_of, value))})"
    return getattr(value, "cache_key", None) or repr(value)


class Record:
    """The base of every record that a kernel takes: frozen dataclasses.

    Triton finds a compiled kernel again by the `cache_key` of its constants, or else their repr. A repr has the fields
    alone, but kernels fold properties, too: so the key has a digest of the module that derives them. Properties use
    nothing of other modules of the package.
    """

    _texts = ""

    def __init_subclass__(cls) -> None:
        # now, and not when a kernel is compiled: by then the file may have changed
        cls._texts += sha256(inspect.getsource(sys.modules[cls.__module__]).encode()).hexdigest()

    @cached_property
    def cache_key(self) -> str:
        values = (f"{f.name}={_key_of(getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__module__}.{type(self).__qualname__}({', '.join(values)}) of {self._texts}"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def conv_size(size: int, taps: int, stride: int, pad: int, dilation: int) -> int:
    """Outputs of a convolution along one axis; `pad` is the sum of both ends."""
    return (size + pad - dilation * (taps - 1) - 1) // stride + 1


def pool_size(size: int, window: int, stride: int, pad: int, ceil_mode: bool) -> int:
    """Outputs of a pooling along one axis; `pad` is that of one end, as in torch."""
    out = (size + 2 * pad - window + (stride - 1 if ceil_mode else 0)) // stride + 1
    # with ceil_mode, a window that would start beyond the input and its left pad is dropped
    return out - 1 if ceil_mode and (out - 1) * stride >= size + pad else out


@dataclass(frozen=True)
class Axis(Record):
    """One spatial axis of a convolution followed by a pooling: input -> conv output -> pooled output.

    Conv output p reads inputs `p * stride - pad + r * dilation`, r < taps; pooled output u reads conv outputs
    `u * pool_stride - pool_pad + i`, i < window. Without pooling: window 1, pool_stride 1, pool_pad 0.
    """

    size: int
    taps: int
    stride: int
    pad: int
    dilation: int
    conv: int
    window: int
    pool_stride: int
    pool_pad: int
    pooled: int

    @cached_property
    def period(self) -> int:
        """Inputs between two neighbouring windows: input h and h + period have the same taps and window positions."""
        return self.stride * self.pool_stride

    @cached_property
    def origin(self) -> int:
        """Minus the input row that tap 0 of window position 0 of pooled output 0 reads."""
        return self.pad + self.stride * self.pool_pad

    @cached_property
    def reach(self) -> int:
        """Inputs from the first to the last that one window reads."""
        return (self.window - 1) * self.stride + (self.taps - 1) * self.dilation + 1

    @cached_property
    def reads_inside(self) -> bool:
        """No tap of any window position of any pooled output falls outside the input."""
        return self.origin == 0 and (self.pooled - 1) * self.period + self.reach <= self.size

    @cached_property
    def windows_inside(self) -> bool:
        """Every window lies wholly inside the conv output."""
        return self.pool_pad == 0 and (self.pooled - 1) * self.pool_stride + self.window <= self.conv

    # What the gradient to the input needs.

    @cached_property
    def cells(self) -> int:
        """Periods that cover the input, counted from -origin."""
        return ceil_div(self.size + self.origin, self.period)

    @cached_property
    def cell_windows(self) -> int:
        """Windows that read the rows of one cell: its own and those before it."""
        return (self.reach - 1) // self.period + 1

    @cached_property
    def tap_step(self) -> int:
        """Taps that reach one input row are this far apart: r and r + tap_step."""
        return self.stride // gcd(self.stride, self.dilation)

    @cached_property
    def phase_taps(self) -> int:
        """The most taps that reach one input row."""
        return ceil_div(self.taps, self.tap_step)

    @cached_property
    def overlap(self) -> int:
        """The most windows that hold one conv output."""
        return ceil_div(self.window, self.pool_stride)

    @cached_property
    def shift(self) -> int:
        """Periods to add so that `phase - r * dilation` is never negative."""
        return ceil_div((self.taps - 1) * self.dilation, self.period)


def code_unit(bits: int) -> tuple[int, int]:
    """(indices, bytes) of the smallest run of packed indices that begins and ends at a byte: 8 of 3 bits, 3 bytes."""
    return _UNITS[bits]


_UNITS = tuple((8 // gcd(bits, 8), bits // gcd(bits, 8)) for bits in range(9))  # looked up, as gcd cannot be traced


def code_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` packed indices."""
    return ceil_div(count * bits, 8)


@dataclass(frozen=True)
class Shared(Record):
    """A weight of `rows` x `count` elements that packed indices name in codebooks; tritonshare/packing.py says how."""

    rows: int
    count: int
    bits: int
    books: int

    @cached_property
    def ENTRIES(self) -> int:
        """Of a codebook."""
        return 1 << self.bits

    @cached_property
    def PITCH(self) -> int:
        """Bytes from a row to the next."""
        return code_bytes(self.count, self.bits)

    @cached_property
    def WORD(self) -> int:
        """Bytes of a row that are read at once: those of eight indices, at most four, where rows are whole ones."""
        size = min(self.bits, 4)
        return size if 8 % self.bits == 0 and self.PITCH % size == 0 else 1

    @cached_property
    def UNIT(self) -> int:
        """Indices of a unit, which begins and ends with a word."""
        return self.WORD * code_unit(self.bits)[0]

    @cached_property
    def UNIT_WORDS(self) -> int:
        return code_unit(self.bits)[1]

    @cached_property
    def BOOK_ROWS(self) -> int:
        """Rows that a codebook serves."""
        return self.rows // self.books


@dataclass(frozen=True)
class SharedLinear(Record):
    """A linear layer of shared weights: how its reduction is cut, and how it multiplies."""

    weight: Shared
    each: int  # elements of the reduction in a split
    dot_type: Any  # of operands, and `precision` of products: kernels/tile.py
    precision: str

    @cached_property
    def splits(self) -> int:
        """In how many parts the reduction is cut."""
        return ceil_div(self.weight.count, self.each)


@dataclass(frozen=True)
class ConvActPool(Record):
    """Shared-weight convolution, activation and pooling of an [N, C, H, W] input to an [N, K, U, V] output."""

    C: int
    K: int
    groups: int
    h: Axis
    w: Axis
    pool: Any  # a Pooling of kernels/pooling.py
    count_include_pad: bool
    activation: Any  # an Activation of kernels/activation.py
    dot_type: Any  # of operands, and `precision` of products: kernels/tile.py
    precision: str
    channels_last: bool  # input, output and their gradients
    weight_channels_last: bool
    shared: Shared | None = None  # the weight, where it is one of packed indices, in the order (k, r, s, c)

    @cached_property
    def CG(self) -> int:
        """Input channels of a group."""
        return self.C // self.groups

    @cached_property
    def KG(self) -> int:
        """Output channels of a group."""
        return self.K // self.groups

    @cached_property
    def RED(self) -> int:
        """Elements of the forward reduction, ordered (r, s, c) whatever the layout: layouts give the same bits."""
        return self.h.taps * self.w.taps * self.CG

    @cached_property
    def WINDOW(self) -> int:
        """Window positions."""
        return self.h.window * self.w.window

    @cached_property
    def windows_inside(self) -> bool:
        """Every window lies wholly inside the conv output."""
        return self.h.windows_inside and self.w.windows_inside

    @cached_property
    def pools_first(self) -> bool:
        """Whether the activation comes after pooling: the largest of its values is its value of the largest."""
        return self.pool.picks and self.activation.monotone

    # What the forward saves for the backward, beside its output.

    @cached_property
    def has_code(self) -> bool:
        """Whether there is a byte per pooled element: the maximum's position, or the signs of a mean."""
        return self.pool.picks or (self.pool.shares and self.activation.derivative_of == "sign")

    @cached_property
    def code_planes(self) -> int:
        """Bytes per pooled element: one for a maximum; for a mean one per eight window positions."""
        return ceil_div(self.WINDOW, 8) if self.pool.shares else 1

    @cached_property
    def aux(self) -> str:
        """The pooled-size tensor that the activation's derivative reads in the backward: "output", "input" or ""."""
        derivative_of = self.activation.derivative_of
        if self.pool.shares:
            return ""
        if derivative_of == "sign" and not self.pool.picks:
            return "output"
        return derivative_of if derivative_of in ("output", "input") else ""

    @cached_property
    def keeps(self) -> str:
        """What the forward keeps beside a value: "slope", a bit of the code that says whether the activation's
        derivative is its slope; "input", the pre-activation; or ""."""
        if self.has_code and self.activation.derivative_of == "sign":
            return "slope"
        return "input" if self.aux == "input" else ""

    @cached_property
    def carried(self) -> int:
        """Tiles that pooling carries from a window position to the next."""
        of_pool = 2 if self.pool.picks else 1 + self.has_code if self.pool.shares else 0
        return of_pool + (self.keeps == "input")

    @cached_property
    def divisor(self) -> int:
        """What a mean divides by, or 0 where it depends on the window."""
        return self.WINDOW if self.windows_inside or not self.pool.shares else 0

    # Element strides, by layout.

    @cached_property
    def x_n(self) -> int:
        return self.C * self.h.size * self.w.size

    @cached_property
    def x_h(self) -> int:
        return self.w.size * self.x_w

    @cached_property
    def x_w(self) -> int:
        return self.C if self.channels_last else 1

    @cached_property
    def x_c(self) -> int:
        return 1 if self.channels_last else self.h.size * self.w.size

    @cached_property
    def y_n(self) -> int:
        return self.K * self.h.pooled * self.w.pooled

    @cached_property
    def y_u(self) -> int:
        return self.w.pooled * self.y_v

    @cached_property
    def y_v(self) -> int:
        return self.K if self.channels_last else 1

    @cached_property
    def y_k(self) -> int:
        return 1 if self.channels_last else self.h.pooled * self.w.pooled

    @cached_property
    def w_k(self) -> int:
        """0 where filters are packed: places are then those within a filter."""
        return self.RED if self.shared is None else 0

    @cached_property
    def w_r(self) -> int:
        return self.w.taps * self.w_s

    @cached_property
    def w_s(self) -> int:
        return self.CG if self.weight_channels_last else 1

    @cached_property
    def w_c(self) -> int:
        return 1 if self.weight_channels_last else self.h.taps * self.w.taps


@dataclass(frozen=True, kw_only=True)
class Similarity(Record):
    """Similarities of rows of x to rows of y: which kind, in jit functions of kernels/similarity.py that are None where
    the kind has no such thing, and how it is computed. A kernel asks what there is (`sim.factor_x is not None`), and
    never for a kind's name."""

    K: int  # columns of x and y
    near: float  # the part of |x|^2 + |y|^2 below which a square distance is computed from differences
    dot_type: Any  # how rows are multiplied, as kernels/tile.py's dot takes it
    precision: str
    gradient_type: Any  # how gradients are multiplied with rows
    gradient_precision: str
    factor_x: Any  # of a kind
    factor_y: Any
    through_x: Any
    through_y: Any
    of_square: Any
    slope: Any
    by_number: Any
    transposed: bool = False  # whether the kernel's x is what the caller calls y
    partial: bool = False  # whether a launch leaves sums of splits, in fp32, which another kernel adds

    @cached_property
    def distance(self) -> bool:
        return self.of_square is not None

    @cached_property
    def swapped(self) -> "Similarity":
        """With x and y changed over: what a gradient of y is computed by, in the text of that of x."""
        return replace(
            self, transposed=not self.transposed, factor_x=self.factor_y, factor_y=self.factor_x,
            through_x=self.through_y, through_y=self.through_x,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reduction(Similarity):
    """Sums over the similarities of a row, or the values that their softmax mixes."""

    D: int  # columns of values; 0 of a sum
    sign: int  # of the exponents: -1 where the smaller is the more similar

    @cached_property
    def softmax(self) -> bool:
        return self.D > 0


@dataclass(frozen=True, kw_only=True)
class Choice(Similarity):
    """Of each row of x the most similar rows of y."""

    count: int  # how many
    to_key: Any  # a jit function of kernels/nearest.py: a number as an integer, the smaller the better
    from_key: Any  # ... and back

    @cached_property
    def TOP(self) -> int:
        """The power of two from `count` on: how many are held."""
        return 1 << (self.count - 1).bit_length()


@dataclass(frozen=True)
class Operands(Record):
    """The tensors of one launch of an optimizer's step: Triton's types of their elements."""

    weight: Any
    grad: Any
    state: Any
    aligned: bool  # every tensor (or every row, where a kernel reads rows) begins at a multiple of 16 bytes


@dataclass(frozen=True)
class Update(Record):
    """A step: its rule, and what is beside it."""

    scalars: Any  # a Rule's, in kernels/adaptive_update.py, as are the next two
    step: Any
    signed: tuple[bool, ...]
    along: str  # what has a similarity of its own: "none", "tensor", "row", "column", "element"
    keep_grad: str  # afterwards the gradient is "untouched", "unscaled" or "zero"

    @cached_property
    def states(self) -> int:
        """A weight's."""
        return len(self.signed)

    @cached_property
    def similarity_by_element(self) -> bool:
        return self.along == "element"
