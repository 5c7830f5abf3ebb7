"""Layers whose weights are shared through a codebook: an index of a few bits per weight, and the values that indices
name."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from .. import codebook, packing
from ..check import ArgumentError, ArgumentTypeError, integer
from ..functional import conv2d_act_pool, shared_conv2d_act_pool, shared_linear
from ..kernels.geometry import code_bytes
from ..ops.conv2d_act_pool.reference import Activation, Pool
from .arguments import convolution
from .averages import refuse_averaged
from .conv_act_pool import ConvActPool2d
from .recompute import Forwards, refuse_replica, within_function

Dense = TypeVar("Dense", torch.nn.Linear, torch.nn.Conv2d)


class _Shared(torch.nn.Module):
    """The base class of both layers: packed indices, codebooks, a bias and, while indices are trained, the dense
    weight."""

    codes: torch.Tensor
    codebook: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    latent: torch.nn.Parameter | None
    dense_shape: tuple[int, ...]  # of the weight

    def _build(self, bits: int, codebooks: int, bias: bool, reassign_every: int, device: Any, dtype: Any) -> None:
        name, rows, count = type(self).__name__, self.dense_shape[0], self._count
        bits, codebooks = packing.check_bits(name, bits), integer(name, "codebooks", codebooks, 1)
        _check_sharing(name, self.dense_shape, bits, codebooks)
        reassign_every = integer(name, "reassign_every", reassign_every, 0)
        self.bits, self.codebooks, self.reassign_every = bits, codebooks, reassign_every
        self._steps, self._forwards = 0, Forwards()
        codes = torch.empty(rows, code_bytes(count, bits), dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        empty = {"device": device, "dtype": dtype}
        self.codebook = torch.nn.Parameter(torch.empty(codebooks, 2**bits, **empty))
        self.bias = torch.nn.Parameter(torch.empty(rows, **empty)) if bias else None
        self.latent = torch.nn.Parameter(torch.empty(self.dense_shape, **empty)) if reassign_every else None
        self.reset_parameters()

    @property
    def _count(self) -> int:
        """How many weights an output channel has."""
        return torch.Size(self.dense_shape[1:]).numel()

    def reset_parameters(self) -> None:
        """Draw weights uniformly within 1 / sqrt(inputs), as torch's layers do, from 2**bits values spread over that
        range."""
        bound = self._count**-0.5
        entries = 2**self.bits
        with torch.no_grad():
            steps = torch.arange(1, 2 * entries, 2, device=self.codebook.device, dtype=torch.float32) / entries - 1
            self.codebook.copy_((bound * steps).expand_as(self.codebook))
            self.codes.random_(0, 256)
            left = self._count * self.bits % 8
            if left:
                self.codes[:, -1] &= (1 << left) - 1
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)
            if self.latent is not None:
                self.latent.copy_(self._decoded(self.codes))

    def indices(self) -> torch.Tensor:
        """The index tensor: which entry of its codebook each weight is; int64, of the weight's shape."""
        return packing.weight_of(packing.unpack(self.codes, self.bits, self._count), self.dense_shape)

    def _decoded(self, codes: torch.Tensor) -> torch.Tensor:
        rows = packing.decode(codes, self.codebook, self.bits, self._count)
        return packing.weight_of(rows, self.dense_shape)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, decoded. Its gradient goes to the codebook (and to `latent` where there is one)."""
        return self._dense(self.codes)

    def _dense(self, codes: torch.Tensor) -> torch.Tensor:
        weight = self._decoded(codes)
        # straight through: nothing is added to the value, and the gradient reaches both
        return weight if self.latent is None else weight + (self.latent - self.latent.detach())

    @torch.no_grad()
    def assign_(self, weight: torch.Tensor):
        """Set each index to the codebook entry nearest to a dense weight; the codebook stays. Returns the layer.

        Raises: ArgumentError for a weight of another shape or with values that are not finite; nothing is changed then.
        """
        name = type(self).__name__
        if tuple(weight.shape) != self.dense_shape:
            raise ArgumentError(
                f"{name}: weight must be of shape {list(self.dense_shape)}, but is {list(weight.shape)}"
            )
        _check_finite(name, "weight", weight)
        _check_finite(name, "codebook", self.codebook)
        rows = packing.rows_of(weight.to(self.codebook.device))
        self.codes.copy_(packing.pack(packing.nearest_indices(rows, self.codebook), self.bits))
        if self.latent is not None:
            self.latent.copy_(weight)
        return self

    def fix_(self):
        """Stop re-assigning: assign once more and drop `latent`, so that indices and codebook are all there is."""
        if self.latent is not None:
            self.assign_(self.latent)
            self.latent, self.reassign_every = None, 0
        return self

    def _fill(self, module: torch.nn.Linear | torch.nn.Conv2d, iterations: int):
        """Take over a dense module: the best codebooks for its weights, indices of the nearest entries, and its
        bias."""
        _check_finite(type(self).__name__, "weight", module.weight)
        with torch.no_grad():
            rows = packing.rows_of(module.weight)
            self.codebook.copy_(codebook.centroids(rows.reshape(self.codebooks, -1), 2**self.bits, iterations))
            self.assign_(module.weight)
            if self.bias is not None and module.bias is not None:
                self.bias.copy_(module.bias)
        return self

    def _like(self, module: torch.nn.Linear | torch.nn.Conv2d):
        """What is trained, and whether: as in a dense module."""
        self.codebook.requires_grad_(module.weight.requires_grad)
        if self.bias is not None and module.bias is not None:
            self.bias.requires_grad_(module.bias.requires_grad)
        return self.train(module.training)

    @torch.no_grad()
    def _fill_dense(self, module: Dense) -> Dense:
        """Copy this layer's weights and bias into a dense module."""
        module.weight.copy_(self.weight)
        module.weight.requires_grad_(self.codebook.requires_grad)
        if self.bias is not None and module.bias is not None:
            module.bias.copy_(self.bias)
            module.bias.requires_grad_(self.bias.requires_grad)
        return module.train(self.training)

    def _trained(self, input: torch.Tensor) -> torch.Tensor | None:
        """The dense weight, where it is what is trained; then a training step is counted."""
        if self.latent is None:
            return None
        if self.training and (torch.is_grad_enabled() or within_function()):
            # disabled here and not by a decorator, which would import torch's compiler with the package
            step = torch.compiler.disable(self._step) if torch.compiler.is_compiling() else self._step
            return self._dense(step(input))  # pyright: ignore[reportArgumentType]  (`disable` is not typed)
        return self.weight

    def _step(self, input: torch.Tensor) -> torch.Tensor:
        """The packed indices for this step, assigned anew when it is time to; those that the first forward saw, if a
        checkpoint computes it again."""
        assert self.latent is not None  # see _trained
        refuse_replica(self, "the steps of reassign_every")
        codes = self._forwards.recall(type(self).__name__, input)
        if codes is None:
            if self._steps and self._steps % self.reassign_every == 0:
                self.assign_(self.latent)
            self._steps += 1
            self._forwards.remember(input, self.codes)
            codes = self.codes
        return codes

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of, and a file."""
        refuse_averaged(type(self).__name__, "codes")
        return self.__dict__

    def _sharing(self) -> str:
        text = f", bits={self.bits}"
        if self.codebooks != 1:
            text += f", codebooks={self.codebooks}"
        if self.reassign_every:
            text += f", reassign_every={self.reassign_every}"
        return text


class SharedLinear(_Shared):
    """`torch.nn.Linear` whose weights are indices of `bits` bits each into codebooks of 2**bits values.

    Args:
        in_features, out_features, bias: as torch.nn.Linear's.
        bits: how many bits an index has, 1 to 8.
        codebooks: how many codebooks; each serves a contiguous range of out_features, whose number they must divide. A
            codebook must serve at least as many weights as it has entries, or sharing would store more than it saves.
        reassign_every: 0: indices stay, and the codebook is trained. n: a dense weight, `latent`, is trained as well.
            Its gradient is that of the decoded weight (straight-through), and every n training steps (forward calls
            with gradients, in training mode) each index is set to the codebook entry nearest to it. Meanwhile the layer
            costs what a dense layer costs: weight, gradient and optimizer state of every weight, and a decoded copy in
            each pass. Under torch.compile counting breaks the graph, and torch.nn.DataParallel is refused. A forward
            that a checkpoint computes again does not count. `fix_()` ends it. Every process counts for itself.

    Attributes:
        codebook: Parameter [codebooks, 2**bits]. codes: uint8 [out_features, ceil(in_features * bits / 8)], packed as
            tritonshare.packing says. bias: Parameter [out_features] or None. latent: Parameter [out_features,
            in_features] or None. weight: the dense weight, decoded, gradients go to the codebook.

    `torch.optim.swa_utils.AveragedModel` averages the codebook and copies the codes; with use_buffers=True it would
    average these, too, and is refused. Other averages of a model must leave integers alone.

    Raises: ArgumentError (a ValueError and RuntimeError), ArgumentTypeError (a TypeError and RuntimeError).
    Derived from: Han, Mao and Dally, Deep Compression, 2016, section 3 (k-means weight sharing, centroid gradients).

    >>> layer = SharedLinear.from_dense(torch.nn.Linear(256, 64), bits=4)
    >>> layer(torch.zeros(8, 256)).shape, layer.codes.numel()
    (torch.Size([8, 64]), 8192)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        codebooks: int = 1,
        reassign_every: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_features = integer(name, "in_features", in_features, 1)
        self.out_features = integer(name, "out_features", out_features, 1)
        self.dense_shape = (self.out_features, self.in_features)
        self._build(bits, codebooks, bias, reassign_every, device, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self._trained(input)
        if weight is not None:
            return F.linear(input, weight, self.bias)
        return shared_linear(input, self.codes, self.codebook, self.bias, bits=self.bits)

    @classmethod
    def from_dense(
        cls, module: torch.nn.Linear, bits: int = 4, codebooks: int = 1, iterations: int = 100, reassign_every: int = 0
    ) -> SharedLinear:
        """The layer nearest to a dense one: each codebook fits its weights best, and is the same every time.

        For up to 2,048 distinct weights the squared error is the least possible (0 for up to 2**bits of them). For more
        it is near that, after at most `iterations` steps of Lloyd's iteration; see `tritonshare.codebook`. Codebooks
        are computed on the CPU, in seconds for ten million weights. Zeros of pruned weights stay exactly 0, unless this
        adds more than a thousandth to the squared error.

        Raises: ArgumentError for weights that are not finite, and what the constructor refuses. `module` stays.
        """
        return cls.like_dense(module, bits, codebooks, reassign_every)._fill(module, iterations)

    @classmethod
    def like_dense(
        cls, module: torch.nn.Linear, bits: int = 4, codebooks: int = 1, reassign_every: int = 0
    ) -> SharedLinear:
        """A new layer of a dense one's geometry, device, dtype and mode. Raises as the constructor."""
        if not isinstance(module, torch.nn.Linear):
            raise ArgumentTypeError(f"{cls.__name__}: module must be a torch.nn.Linear, but is {type(module).__name__}")
        w = module.weight
        settings = {"bits": bits, "codebooks": codebooks, "reassign_every": reassign_every}
        made = cls(
            module.in_features, module.out_features, module.bias is not None, **settings, device=w.device, dtype=w.dtype
        )
        return made._like(module)

    def to_dense(self) -> torch.nn.Linear:
        """A torch.nn.Linear with the decoded weight."""
        like = {"device": self.codebook.device, "dtype": self.codebook.dtype}
        return self._fill_dense(torch.nn.Linear(self.in_features, self.out_features, self.bias is not None, **like))

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text + self._sharing()


class SharedConv2d(_Shared):
    """`torch.nn.Conv2d`, or `ConvActPool2d` if there is an activation or pooling, with weights from codebooks.

    Args: those of Conv2d; `activation` .. `count_include_pad` as in tritonshare.functional.conv2d_act_pool, but without
    activation and pooling by default; `bits`, `codebooks` (each serves a contiguous range of out_channels) and
    `reassign_every` as in SharedLinear, where their costs are given.

    Attributes: as SharedLinear's, with codes [out_channels, ceil(in_channels / groups * rows * columns * bits / 8)]:
    a filter's indices lie in the order (row, column, channel). Raises: as SharedLinear.

    >>> layer = SharedConv2d(3, 32, 5, padding=2, bits=3, activation="relu", pool="max")
    >>> layer(torch.zeros(8, 3, 32, 32)).shape
    torch.Size([8, 32, 16, 16])
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    activation: Activation | None
    pool: Pool | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        bits: int = 4,
        codebooks: int = 1,
        reassign_every: int = 0,
        activation: Activation | None = None,
        pool: Pool | None = None,
        pool_size: int | tuple[int, int] = 2,
        pool_stride: int | tuple[int, int] | None = None,
        pool_padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        given = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        block = (activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, count_include_pad)
        checked = convolution(type(self).__name__, dict(zip(_GEOMETRY + _BLOCK, given + block, strict=True)))
        # a module on meta has no memory
        twin = torch.nn.Conv2d(**{name: checked[name] for name in _GEOMETRY}, device="meta")
        for name in _GEOMETRY:
            setattr(self, name, getattr(twin, name))
        self._outside = twin._reversed_padding_repeated_twice
        self.dense_shape = tuple(twin.weight.shape)
        for name in _BLOCK:
            setattr(self, name, checked[name])
        self._build(bits, codebooks, bias, reassign_every, device, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":  # padded beforehand, as Conv2d does
            input = F.pad(input, self._outside, mode=self.padding_mode)
            padding = 0
        block = {name: getattr(self, name) for name in _BLOCK}
        where = (self.stride, padding, self.dilation, self.groups)
        weight = self._trained(input)
        if weight is not None:
            return conv2d_act_pool(input, weight, self.bias, *where, **block)
        return shared_conv2d_act_pool(
            input, self.codes, self.codebook, self.bias, self.kernel_size, *where, bits=self.bits, **block
        )

    @classmethod
    def from_dense(
        cls, module: torch.nn.Conv2d, bits: int = 4, codebooks: int = 1, iterations: int = 100, reassign_every: int = 0
    ) -> SharedConv2d:
        """The layer nearest to a Conv2d or a ConvActPool2d, as SharedLinear.from_dense."""
        return cls.like_dense(module, bits, codebooks, reassign_every)._fill(module, iterations)

    @classmethod
    def like_dense(
        cls, module: torch.nn.Conv2d, bits: int = 4, codebooks: int = 1, reassign_every: int = 0
    ) -> SharedConv2d:
        """A new layer of a dense one's geometry, device, dtype and mode. Raises as the constructor."""
        if not isinstance(module, torch.nn.Conv2d):
            raise ArgumentTypeError(f"{cls.__name__}: module must be a torch.nn.Conv2d, but is {type(module).__name__}")
        w = module.weight
        settings = {name: getattr(module, name) for name in _GEOMETRY}
        if isinstance(module, ConvActPool2d):
            settings |= {name: getattr(module, name) for name in _BLOCK}
        settings |= {"bits": bits, "codebooks": codebooks, "reassign_every": reassign_every}
        return cls(**settings, bias=module.bias is not None, device=w.device, dtype=w.dtype)._like(module)

    def to_dense(self) -> torch.nn.Conv2d:
        """A torch.nn.Conv2d with the decoded weight, or a ConvActPool2d where there is an activation or pooling."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in _GEOMETRY}
        settings |= {"device": self.codebook.device, "dtype": self.codebook.dtype, "bias": self.bias is not None}
        if self.activation in (None, "none") and self.pool in (None, "none"):
            return self._fill_dense(torch.nn.Conv2d(**settings))
        return self._fill_dense(ConvActPool2d(**settings, **{name: getattr(self, name) for name in _BLOCK}))

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, groups={self.groups}, bias={self.bias is not None}{self._sharing()}"
        return f"{text}, activation={self.activation}, pool={self.pool}"


_GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)  # fmt: skip
_BLOCK = ("activation", "pool", "pool_size", "pool_stride", "pool_padding", "ceil_mode", "count_include_pad")


def _check_sharing(name: str, shape: tuple[int, ...], bits: int, codebooks: int) -> None:
    """One sentence on why weights of this shape cannot be shared so, if they cannot."""
    if shape[0] % codebooks:
        raise ArgumentError(
            f"{name}: codebooks is {codebooks}, which does not divide the {shape[0]} output channels (weight axis 0)"
        )
    weights = torch.Size(shape).numel() // codebooks
    if weights < 2**bits:
        raise ArgumentError(
            f"{name}: codebooks of {2**bits} entries (bits is {bits}) would have {weights} weights each: "
            "a codebook must not be larger than what it serves"
        )


def _check_finite(name: str, argument: str, values: torch.Tensor) -> None:
    if not values.is_meta and not torch.isfinite(values.detach()).all():
        raise ArgumentError(f"{name}: {argument} has values that are not finite")
