"""The ops as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .binding import autocasts, serializable
from .check import ArgumentError, plain
from .dispatch import in_graph
from .op import FUNCTIONS
from .ops import adaptive_update
from .ops.adaptive_update.similarity import Similarity
from .ops.conv2d_act_pool import CONV2D_ACT_POOL
from .ops.conv2d_act_pool.reference import Activation, Pool
from .ops.nearest import NEAREST
from .ops.segment_sum import SEGMENT_SUM, check_ids
from .ops.shared_conv2d_act_pool import SHARED_CONV2D_ACT_POOL
from .ops.shared_linear import SHARED_LINEAR
from .ops.similarity.fold import folded
from .ops.similarity.kinds import Kind
from .ops.similarity_reduce import SIMILARITY_REDUCE
from .ops.similarity_reduce.contract import Reduce
from .ops.similarity_weight import SIMILARITY_WEIGHT
from .products import widened

__all__ = [
    "Nearest",
    "adaptive_update_",
    "cdist",
    "conv2d_act_pool",
    "cosine_similarity",
    "nearest",
    "segment_sum",
    "shared_conv2d_act_pool",
    "shared_linear",
    "similarity_reduce",
    "similarity_weight",
]


def conv2d_act_pool(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: Activation | None = "relu",
    pool: Pool | None = "max",
    pool_size: int | tuple[int, int] = 2,
    pool_stride: int | tuple[int, int] | None = None,
    pool_padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:
    """Convolution, bias, activation and pooling in one kernel: `pool(activation(conv2d(input, weight, bias)))`.

    The unpooled map never reaches memory. For the backward pass, `input`, `weight` and one byte per pooled element are
    kept (with sigmoid and tanh the output too; with gelu, silu and hardswish the pre-activation at each maximum).

    Args:
        input: [N, C, H, W] or [C, H, W]; float32 (multiplied as torch's TF32 switch for convolutions says), float16 or
            bfloat16; contiguous or channels_last, and the output has the same layout. Sums are in float32.
        weight: [K, C / groups, R, S], same dtype.
        bias: [K] or None.
        stride, dilation: of the convolution, one integer or (rows, columns).
        padding: zeros around the input: one integer, (rows, columns), (top, bottom, left, right), "valid" or "same".
        groups: input and output channels are split into this many independent convolutions.
        activation: "none", "relu", "leaky_relu" (slope 0.01), "sigmoid", "tanh", "gelu" (exact), "silu", "hardswish".
        pool: "max", "avg" or None. First maximum wins and NaN wins, as in torch.
        pool_size: window, at most 8 x 8.
        pool_stride: defaults to pool_size. Windows may overlap.
        pool_padding: at most half the window; outside the map is -inf for "max", and for "avg" zeros that count only
            with count_include_pad.
        ceil_mode: as in torch.nn.functional.max_pool2d.

    Returns:
        [N, K, U, V], or [K, U, V] for an unbatched input; sizes as torch's.

    Raises:
        ArgumentError (a ValueError and RuntimeError), ArgumentTypeError (a TypeError and RuntimeError): one sentence
        naming the argument and its axis, before anything is allocated.

    The gradient of "avg" with sigmoid, tanh, gelu, silu or hardswish comes from torch, by computing the map again.
    Derived from: the shared-weight convolution of LeCun et al., Gradient-based learning applied to document
    recognition, 1998, section II.
    """
    options = plain((
        stride, padding, dilation, groups,
        activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, count_include_pad,
    ))  # fmt: skip
    if isinstance(input, torch.Tensor) and input.dim() == 3:
        return CONV2D_ACT_POOL(input.unsqueeze(0), weight, bias, *options).squeeze(0)
    return CONV2D_ACT_POOL(input, weight, bias, *options)


def shared_linear(
    input: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
) -> torch.Tensor:
    """`linear(input, weight, bias)` for a weight that is stored as indices into codebooks; no dense weight is in
    memory.

    Args:
        input: [..., I]; float32, float16 or bfloat16. Sums are in float32.
        codes: uint8 [O, ceil(I * bits / 8)], packed as tritonshare.packing.pack does.
        codebook: [codebooks, 2**bits], same dtype; codebooks must divide O: row o takes codebook o * codebooks // O.
        bias: [O] or None.
        bits: how many bits an index has, 1 to 8.

    Returns:
        [..., O]. Gradients go to input, codebook and bias. The gradient of a codebook entry is the sum over the weights
        that have it; neither the dense weight nor its gradient is ever in memory. float32 is multiplied as torch's TF32
        switch for matrix products says.

    Raises:
        ArgumentError (a ValueError and RuntimeError), ArgumentTypeError (a TypeError and RuntimeError): one sentence
        naming the argument and its axis, before anything is allocated.

    Derived from: Han, Mao and Dally, Deep Compression, 2016, section 3.
    """
    bits = plain(bits)
    if isinstance(input, torch.Tensor) and input.dim() not in (0, 2):
        rows = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
        out = SHARED_LINEAR(rows, codes, codebook, bias, bits)
        return out.view(*input.shape[:-1], out.shape[-1])
    return SHARED_LINEAR(input, codes, codebook, bias, bits)


def shared_conv2d_act_pool(
    input: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    bits: int,
    activation: Activation | None = "relu",
    pool: Pool | None = "max",
    pool_size: int | tuple[int, int] = 2,
    pool_stride: int | tuple[int, int] | None = None,
    pool_padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:
    """conv2d_act_pool for a weight [K, C / groups, *kernel_size] that is stored as indices into codebooks.

    Args: those of conv2d_act_pool, and
        codes: uint8 [K, ceil(C / groups * R * S * bits / 8)]: a filter's indices in the order (r, s, c), packed as
            tritonshare.packing.pack does.
        codebook: [codebooks, 2**bits], the input's dtype; codebooks must divide K: filter k takes codebook
            k * codebooks // K.
        kernel_size: R and S, one integer or (rows, columns).
        bits: how many bits an index has, 1 to 8.

    Returns: as conv2d_act_pool. Gradients go to input, codebook and bias. For the codebook's, that of the dense weight
        is computed first and takes 4 bytes per weight in the meantime.
    Raises: as conv2d_act_pool.
    """
    options = plain((
        kernel_size, stride, padding, dilation, groups, bits,
        activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, count_include_pad,
    ))  # fmt: skip
    if isinstance(input, torch.Tensor) and input.dim() == 3:
        return SHARED_CONV2D_ACT_POOL(input.unsqueeze(0), codes, codebook, bias, *options).squeeze(0)
    return SHARED_CONV2D_ACT_POOL(input, codes, codebook, bias, *options)


def adaptive_update_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    *,
    lr: float | torch.Tensor,
    similarity: Similarity = None,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> torch.Tensor:
    """The adaptive update in place, in one pass: `weight -= lr * similarity * (grad + weight_decay * weight)`.

    The article's formula, `W_ij <- W_ij + lr * dL/dW_ij`, has a plus sign and so ascends; `maximize=True` does that.
    The default descends, as torch's optimizers do. tritonshare.optim has whole models, momentum and Adam.

    Args:
        weight: floating-point, of any shape. If it requires gradients, call this within torch.no_grad().
        grad: of the weight's shape; its dtype may be another one. The update is computed in float32, or in float64 for
            a float64 weight.
        lr: a number, or a tensor of one element, whose value the host does not wait for.
        similarity: one number for all elements; a tensor that broadcasts against weight, such as [rows, 1, ...] for one
            per row or [columns] for one per column; or a function of the weight that returns one of these or None.
        weight_decay: as in SGD: it is scaled by lr and similarity, like the gradient.
        maximize: ascend along the gradient.

    Returns:
        The weight.

    Raises:
        ArgumentError (a ValueError and RuntimeError), ArgumentTypeError (a TypeError and RuntimeError): one sentence
        naming the argument, before anything is written.
    """
    return adaptive_update.adaptive_update_(weight, grad, similarity, lr, weight_decay, maximize)


def segment_sum(input: torch.Tensor, segments: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of rows by segment, without atomics: `output[s] = sum of input[n] over all n with segments[n] == s`.

    A stable sort brings rows into the order of their segments. They are summed in that order, in fp32 and in pieces
    whose sums are added in a fixed order, so the result has the same bits on every run. A segment's sum depends on its
    own rows only.

    Args:
        input: [N, D], D at least 1; float32, float16 or bfloat16 (float64 is summed by torch).
        segments: [N] int64, from 0 to count - 1, in any order.
        count: how many segments there are, at least 1. The sum of a segment without rows is 0.

    Returns:
        [count, D], in the dtype of input. Gradients go to input: each row gets that of its segment's sum.

    Raises:
        ArgumentError, ArgumentTypeError: one sentence naming argument and axis, before anything is launched. A number
        of a segment that is out of range raises if `segments` is in the CPU's memory. Reading it from a GPU would make
        the host wait: there, and in compiled code, such a row belongs to no segment, its gradient is 0, and nothing is
        read or written out of bounds.
    """
    count = plain(count)
    check_ids(segments, count)
    return SEGMENT_SUM(input, segments, count)


def apart(*scalars: float | torch.Tensor | None) -> tuple[list[torch.Tensor | None], list[float | None]]:
    """Split scalars as ops take them: into tensors and numbers, each list with None where the other has the scalar."""
    tensors = [s if isinstance(s, torch.Tensor) else None for s in scalars]
    return tensors, [None if isinstance(s, torch.Tensor) else s for s in scalars]


def similarity_weight(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    kind: Kind = "projection",
    gamma: float | torch.Tensor | None = None,
    eps: float | torch.Tensor = 1e-8,
) -> torch.Tensor:
    """Similarities of all rows of x to all rows of y, in one kernel.

    "projection" is the article's weight, `W_ij = sum_k x_ik y_jk / sum_k x_ik^2`: how far y_j reaches along x_i.

    Args:
        x: [..., M, K]; float32, float16 or bfloat16. Sums are in float32. Products of float32 follow torch's TF32
            switch for matrix products; without TF32, and for distances, three products of TF32 give the digits of
            float32.
        y: [..., N, K], same dtype. Leading axes broadcast, as in matmul; a y without them is read once for all.
        kind: "projection"; "dot", x_i . y_j; "cosine", x_i . y_j / (max(|x_i|, eps) max(|y_j|, eps)); "euclidean",
            |x_i - y_j|; "sqeuclidean", its square; "rbf", exp(-gamma |x_i - y_j|^2). Distances of near rows are summed
            from differences, so that nothing cancels.
        gamma: for "rbf" a positive number, or a floating-point tensor of one element on x's device, such as a
            parameter; None for other kinds. Gradients go to a tensor. Nothing is compiled for a particular value, and
            the host never waits for one, so the value of a tensor is not checked. The gradient is one sum over all
            pairs: where it cancels, it can miss the numeric gate, as torch's own can.
        eps: for "cosine", likewise; not negative.

    Returns:
        [..., M, N]. Projections and cosines of a row of zeros are 0, and their gradients are 0, as is that of a
        distance of 0.

    Raises:
        ArgumentError (a ValueError and RuntimeError), ArgumentTypeError (a TypeError and RuntimeError): one sentence
        naming the argument and its axis, before anything is allocated.

    The forward keeps one number per row for the backward, and nothing of size M x N: squared distances are computed
    again, in float32. The plain-torch path holds few differences at a time, but all M N K of them where torch traces or
    transforms and no compiler fuses them.
    """
    tensors, numbers = apart(gamma, eps)
    return folded(SIMILARITY_WEIGHT, (x, y), *tensors, kind, *numbers)


@serializable
class Nearest(NamedTuple):
    """What `nearest` returns."""

    values: torch.Tensor
    indices: torch.Tensor


def nearest(
    x: torch.Tensor,
    features: torch.Tensor,
    *,
    kind: Kind = "euclidean",
    k: int = 1,
    gamma: float | torch.Tensor | None = None,
    eps: float | torch.Tensor = 1e-8,
) -> Nearest:
    """The k most similar rows of features to each row of x, without a similarity of every pair in memory.

    Args:
        x: [..., M, K], K at least 1; dtypes and products as in similarity_weight.
        features: [..., N, K], same dtype. Leading axes broadcast, as in matmul; features without them serve all.
        kind, gamma, eps: as in similarity_weight.
        k: how many rows to choose, from 1 to 64 and at most N.

    Returns:
        Nearest(values, indices), both [..., M, k], indices int64. The best come first: the smallest distances for
        "euclidean" and "sqeuclidean", the largest similarities for other kinds, and the first index of equal ones.
        Distances, and "rbf", are compared by squared distances in float32, where NaN is the farthest; for other kinds
        NaN is the largest and so comes first, as in torch.topk. Gradients go through the values to the chosen pairs.

    Raises:
        ArgumentError (a ValueError and RuntimeError), ArgumentTypeError (a TypeError and RuntimeError): one sentence
        naming the argument and its axis, before anything is allocated.
    """
    tensors, numbers = apart(gamma, eps)
    result = folded(NEAREST, (x, features), *tensors, kind, plain(k), *numbers)
    return Nearest(*result) if isinstance(result, tuple) else result  # a node of a torch.fx graph


def similarity_reduce(
    x: torch.Tensor,
    y: torch.Tensor,
    values: torch.Tensor | None = None,
    *,
    reduce: Reduce,
    kind: Kind = "projection",
    gamma: float | torch.Tensor | None = None,
    eps: float | torch.Tensor = 1e-8,
    temperature: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """A reduction over the similarities of each row of x to all rows of y, which are never in memory.

    Args:
        x: [..., M, K], K at least 1; dtypes and products as in similarity_weight.
        y: [..., N, K], N at least 1, same dtype. Leading axes broadcast, as in matmul.
        values: [..., N, D] for "softmax_matmul", same dtype; else None.
        reduce: "sum"; "max", where NaN wins and then the first of equal values (distances and "rbf" are compared by
            squared distances in float32); or "softmax_matmul", softmax(W / temperature, dim=-1) @ values. There, -W
            takes the place of W for "euclidean" and "sqeuclidean": as in nearest, small distances count most.
        kind, gamma, eps: as in similarity_weight.
        temperature: for "softmax_matmul", positive; a number or a tensor, like gamma. W / temperature is an exponent:
            where it is many times 1, as with squared distances over many columns, its error costs digits, and some
            results miss the numeric gate.

    Returns:
        [..., M], or [..., M, D] for "softmax_matmul". Gradients go to x, y and values; those of "max" go to the
        maximum alone.

    Raises:
        ArgumentError (a ValueError and RuntimeError), ArgumentTypeError (a TypeError and RuntimeError): one sentence
        naming the argument and its axis, before anything is allocated.

    The forward keeps one or two numbers per row for the backward, which computes similarities again.
    """
    tensors, numbers = apart(gamma, eps, temperature)
    return folded(SIMILARITY_REDUCE, (x, y, values), *tensors, reduce, kind, *numbers)


COMPUTE_MODES = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")


def cdist(
    x1: torch.Tensor,
    x2: torch.Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> torch.Tensor:
    """torch.cdist, whose Euclidean distances are `similarity_weight`'s, and so in half precision, too.

    x1: [..., M, K], x2: [..., N, K] -> [..., M, N]. compute_mode is one of torch's three names. Distances of near rows
    are always summed from differences. With "donot_use_mm_for_euclid_dist" all are, by torch's own cdist in at least
    float32, which has no second derivatives. For p other than 2 torch computes.
    """
    if compute_mode not in COMPUTE_MODES:
        of = ", ".join(map(repr, COMPUTE_MODES))
        raise ArgumentError(f"cdist: compute_mode must be one of {of}, but is {compute_mode!r}")
    if p != 2.0:
        return _by_torch(torch.cdist, x1, x2, p, compute_mode)
    if compute_mode == COMPUTE_MODES[2] and isinstance(x1, torch.Tensor) and isinstance(x2, torch.Tensor):
        wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (x1, x2)]
        return _by_torch(torch.cdist, *wide, p, compute_mode).to(x1.dtype)
    return similarity_weight(x1, x2, kind="euclidean")


def cosine_similarity(x1: torch.Tensor, x2: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    """torch.nn.functional.cosine_similarity, without a product of every pair in memory where it compares all pairs.

    It compares all pairs if x1 is [..., M, 1, K] and x2 [..., 1, N, K], over the last axis, or the other way round.
    Then `similarity_weight` computes the cosines [..., M, N]; all other shapes go to torch.
    """
    if isinstance(x1, torch.Tensor) and isinstance(x2, torch.Tensor) and min(x1.dim(), x2.dim()) >= 3:
        last = dim in (-1, max(x1.dim(), x2.dim()) - 1) and x1.shape[-1] == x2.shape[-1] and x1.dtype == x2.dtype
        if last and x1.shape[-2] == 1 and x2.shape[-3] == 1:
            return similarity_weight(x1.squeeze(-2), x2.squeeze(-3), kind="cosine", eps=eps)
        if last and x1.shape[-3] == 1 and x2.shape[-2] == 1:
            return similarity_weight(x2.squeeze(-2), x1.squeeze(-3), kind="cosine", eps=eps)
    node = in_graph(cosine_similarity, {"x1": x1, "x2": x2, "dim": dim, "eps": eps})
    return _by_torch(torch.nn.functional.cosine_similarity, x1, x2, dim, eps) if node is None else node


def _by_torch(function: Callable[..., torch.Tensor], x1: torch.Tensor, x2: torch.Tensor, *options) -> torch.Tensor:
    """torch's own function. Half precision is computed in fp32 and rounded once, as in this library's kernels."""
    dtypes = {t.dtype for t in (x1, x2) if isinstance(t, torch.Tensor)}
    if dtypes not in ({torch.float16}, {torch.bfloat16}) or autocasts(x1):
        return function(x1, x2, *options)
    return function(widened(x1), widened(x2), *options).to(x1.dtype)


# What a graph of torch.fx calls where an op meets its proxies.
FUNCTIONS.update({name: globals()[name] for name in __all__ if name != "Nearest"})
torch.fx.has_side_effect(adaptive_update_)  # what such a graph calls for its effect, it keeps
