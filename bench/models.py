"""The parameters of known networks, as lists of shapes: what an optimizer's step is timed on.

Nothing is downloaded or built: each list is written from the architecture, in the order in which torch's modules would
have their parameters. A network's count is tested against the published one.
"""

from __future__ import annotations

from math import prod

Shape = tuple[int, ...]
Shapes = list[Shape]


def linear(rows: int, columns: int) -> Shapes:
    return [(rows, columns), (rows,)]


def convolution(k: int, c: int, size: int) -> Shapes:
    return [(k, c, size, size), (k,)]


def norm(channels: int) -> Shapes:
    return [(channels,), (channels,)]


def resnet(depths: tuple[int, ...], bottleneck: bool) -> Shapes:
    """He et al. 2015, for 1000 classes: convolutions without bias, each with a batch norm."""

    def normed(k: int, c: int, size: int) -> Shapes:
        return [(k, c, size, size), *norm(k)]

    shapes, c = normed(64, 3, 7), 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        out = width * (4 if bottleneck else 1)
        for block in range(depth):
            if bottleneck:
                shapes += normed(width, c, 1) + normed(width, width, 3) + normed(out, width, 1)
            else:
                shapes += normed(width, c, 3) + normed(out, width, 3)
            if block == 0 and (stage or bottleneck):  # the shortcut changes size
                shapes += normed(out, c, 1)
            c = out
    return shapes + linear(1000, c)


def nature_dqn(actions: int = 18) -> Shapes:
    """Mnih et al. 2015: 4 frames of 84 x 84, which three convolutions reduce to 64 x 7 x 7."""
    features = convolution(32, 4, 8) + convolution(64, 32, 4) + convolution(64, 64, 3)
    return features + linear(512, 64 * 7 * 7) + linear(actions, 512)


def impala_deep(actions: int = 18) -> Shapes:
    """Espeholt et al. 2018, figure 3, right, on 4 frames of 84 x 84: three sections of a convolution, a pooling that
    halves (84, 42, 21, 11) and two residual blocks; 256 features; an LSTM of 256 that also sees the last reward and the
    last action; policy and value. The encoder of instructions is left out, as on Atari."""
    shapes, c = [], 4
    for k in (16, 32, 32):
        shapes += convolution(k, c, 3) + 4 * convolution(k, k, 3)
        c = k
    shapes += linear(256, c * 11 * 11)
    seen = 256 + 1 + actions
    shapes += [(4 * 256, seen), (4 * 256, 256), (4 * 256,), (4 * 256,)]
    return shapes + linear(actions, 256) + linear(1, 256)


def vit_b16(width: int = 768, layers: int = 12, patch: int = 16) -> Shapes:
    """Dosovitskiy et al. 2020: 14 x 14 patches and a class token, 1000 classes."""
    shapes = [(1, 1, width), *convolution(width, 3, patch), (1, 14 * 14 + 1, width)]
    for _ in range(layers):
        attention = linear(3 * width, width) + linear(width, width)
        shapes += norm(width) + attention + norm(width) + linear(4 * width, width) + linear(width, 4 * width)
    return shapes + norm(width) + linear(1000, width)


def gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """Radford et al. 2019: the output layer is the token embedding, and linear layers are stored [in, out]."""

    def transposed(rows: int, columns: int) -> Shapes:
        return [(rows, columns), (columns,)]

    shapes = [(vocabulary, width), (context, width)]
    for _ in range(layers):
        attention = transposed(width, 3 * width) + transposed(width, width)
        shapes += norm(width) + attention + norm(width) + transposed(width, 4 * width) + transposed(4 * width, width)
    return shapes + norm(width)


MODELS: dict[str, Shapes] = {
    "gpt2_124m": gpt2(),
    "resnet50": resnet((3, 4, 6, 3), bottleneck=True),
    "vit_b16": vit_b16(),
    "resnet18": resnet((2, 2, 2, 2), bottleneck=False),
    "nature_dqn": nature_dqn(),
    "impala_deep": impala_deep(),
    "2000_small": [(256,)] * 2000,  # 1 KB each in fp32: all of it is overhead
    "billion": [(10**9,)],
}


def numel(shapes: Shapes) -> int:
    return sum(map(prod, shapes))
