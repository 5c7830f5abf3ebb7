"""A linear layer whose weights are similarities: the article's formula, with codes of inputs and neurons."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..check import ArgumentError, integer
from ..functional import similarity_weight
from ..ops.similarity.kinds import KINDS, Kind
from ..products import widened
from .arguments import gamma_of, one_of
from .feature_maps import FeatureMaps


class SimilaritySharedLinear(torch.nn.Module):
    """`y = x W^T + b` like `torch.nn.Linear`, where W is computed from similarities to feature maps and never stored.

    Every input and every neuron has a code of `dim` numbers, and there are `num_features` feature maps of `dim`.
    With x_ik the similarity of input i to feature map k, and y_jk that of neuron j, the weight is the article's

        W_ij = sum_k x_ik y_jk / sum_k x_ik^2

    so inputs with similar codes share similar weights. There are (in + out + num_features) * dim parameters, and out
    for the bias, instead of in * out. W is applied as two thin products, `(input @ (x / |x|^2)) @ y^T`, which take
    fewer operations than a dense layer if num_features < in * out / (in + out).

    Args:
        in_features, out_features, bias: as in torch.nn.Linear.
        num_features: how many feature maps there are. W has at most this rank.
        dim: the length of codes and feature maps. For "projection", "dot" and "cosine" it bounds the rank, too.
        kind: the similarity of codes to feature maps, as in `functional.similarity_weight`. For the distances and "rbf"
            all similarities are positive, and so are all weights.
        gamma: as in `functional.similarity_weight`.

    Shape: [..., in_features] -> [..., out_features].

    Codes and feature maps start out normal, and weights are scaled to a root mean square of 1 / sqrt(in_features), so
    that inputs of unit variance give outputs of unit variance. For "dot" and "projection", in which W scales with the
    neurons' codes, those codes are scaled. For other kinds W is multiplied by the constant buffer `scale`.

    Raises: ArgumentError, ArgumentTypeError: one sentence naming class, argument and axis.
    """

    scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_features: int,
        dim: int,
        bias: bool = True,
        *,
        kind: Kind = "projection",
        gamma: float | torch.Tensor | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        in_features = integer(name, "in_features", in_features, 1)
        out_features = integer(name, "out_features", out_features, 1)
        num_features = integer(name, "num_features", num_features, 1)
        dim = integer(name, "dim", dim, 1)
        one_of(name, "kind", kind, KINDS)
        gamma_of(name, kind, gamma)
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        of = {"device": device, "dtype": dtype}
        self.input_codes = torch.nn.Parameter(torch.empty(in_features, dim, **of))
        self.neuron_codes = torch.nn.Parameter(torch.empty(out_features, dim, **of))
        self.feature_maps = FeatureMaps(num_features, dim, kind, "learned", gamma=gamma, **of)
        self.bias = torch.nn.Parameter(torch.empty(out_features, **of)) if bias else None
        self.register_buffer("scale", torch.empty((), **of))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        dim = self.input_codes.shape[1]
        for codes in (self.input_codes, self.neuron_codes):
            codes.normal_(0, dim**-0.5)
        self.feature_maps.reset_parameters()
        if self.bias is not None:
            self.bias.uniform_(-(self.in_features**-0.5), self.in_features**-0.5)
        self.scale.fill_(1)
        if self.scale.is_meta:
            return
        larger = self.in_features**-0.5 / self.weight.float().square().mean().sqrt().clamp_min(1e-12)
        if self.kind == "dot":
            self.neuron_codes.mul_(larger)
        elif self.kind == "projection":  # the projection of a code twice as long is half as large
            self.neuron_codes.div_(larger)
        else:
            self.scale.copy_(larger)

    def similarities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The similarities x [in, num_features] of inputs, and y [out, num_features] of neurons, to the feature
        maps."""
        return self.feature_maps.similarity(self.input_codes), self.feature_maps.similarity(self.neuron_codes)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]: the article's W_ij, transposed as torch.nn.Linear's. Made anew each time, and differentiable."""
        x, y = self.similarities()
        return self.scale * similarity_weight(x, y, kind="projection").mT

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(input, torch.Tensor) or input.dim() == 0 or input.shape[-1] != self.in_features:
            has = f"{input.shape[-1]}" if isinstance(input, torch.Tensor) and input.dim() else "missing"
            of = f"is {has}, but the layer has {self.in_features} in_features"
            raise ArgumentError(f"{type(self).__name__}: input's last axis {of}")
        x, y = self.similarities()
        wide = widened(x)
        sizes = wide.square().sum(-1, keepdim=True)
        # an input with no similarity to any feature map has weights of 0, as in similarity_weight
        x = (torch.where(sizes > 0, wide / torch.where(sizes > 0, sizes, 1), 0) * self.scale).to(x.dtype)
        return F.linear(F.linear(input, x.mT), y, self.bias)

    def extra_repr(self) -> str:
        of = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{of}, bias={self.bias is not None}, kind={self.kind!r}"
