"""Named cases of conv2d_act_pool: ((N, C, H, W), (K, C / groups, R, S), bias) and options."""

from __future__ import annotations

import random

from ...declare import Case
from .reference import ACTIVATIONS


def case(name, tags, x, w, bias=True, **options) -> Case:
    tags += " chooses" * (options.get("pool", "max") == "max")
    return Case(name, tuple(tags.split()), (x, w, (w[0],) if bias else None), options)


# every pooling with a kinked activation of each class, and with a constant slope; windows have one or two elements, so
# that some windows hold nothing but infinities
AT_SIDES = {"pool_size": 2, "pool_stride": 2, "pool_padding": 1}
KINKED = ("none", "relu", "leaky_relu", "hardswish")
KINKS = {
    "none": ("kinks", {"pool": None}),
    "max": ("kinks infinities", AT_SIDES),
    "avg": ("kinks", {"pool": "avg", **AT_SIDES}),
    "avg_of_map": ("kinks", {"pool": "avg", "count_include_pad": False, **AT_SIDES}),
}
IMPALA_POOL = {"padding": 1, "pool_size": 3, "pool_stride": 2, "pool_padding": 1}
CASES = (
    # tiny: the plain geometry, exact and ragged tiles, every pooling
    case("ragged", "tiny laws", (3, 3, 9, 7), (5, 3, 3, 3)),
    case("exact", "tiny", (2, 16, 8, 8), (16, 16, 3, 3), padding=1),
    case("many_tiles", "tiny", (3, 3, 7, 9), (18, 3, 3, 3), padding=1),
    case("split_pixels", "edge", (5, 2, 16, 16), (3, 2, 1, 1)),
    case("article_k5", "edge", (1, 3, 6, 6), (32, 3, 5, 5), padding=2),
    case("avg", "tiny codegen", (2, 4, 9, 9), (6, 4, 3, 3), pool="avg"),
    case("no_pool", "tiny codegen", (2, 4, 7, 6), (6, 4, 3, 3), pool=None),
    # edge: one difficulty each
    case("size_one", "edge", (1, 1, 1, 1), (1, 1, 1, 1), pool_size=1),
    case("empty_batch", "edge", (0, 3, 8, 8), (4, 3, 3, 3)),
    case("no_bias", "edge", (2, 3, 8, 8), (4, 3, 3, 3), bias=False),
    case("one_channel", "edge", (3, 1, 8, 8), (4, 1, 5, 5)),
    case("even_filter_of_odd_map", "edge codegen", (1, 1, 13, 13), (16, 1, 4, 4), padding=2, pool=None),
    case("one_filter_of_a_column", "edge codegen", (1, 1, 24, 1), (1, 1, 5, 1), pool=None),
    case("pointwise", "edge", (2, 17, 6, 6), (18, 17, 1, 1)),
    case("strided", "edge", (2, 3, 13, 12), (4, 3, 3, 3), stride=2, padding=1),
    case("stride_over_filter", "edge", (2, 3, 14, 15), (4, 3, 2, 2), stride=3),
    case("uneven_options", "edge laws", (2, 3, 15, 13), (4, 3, 3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2),
         pool_size=(2, 3), pool_stride=(3, 2), pool_padding=(1, 1)),
    case("dilated", "edge", (2, 3, 12, 12), (4, 3, 3, 3), dilation=2, padding=2),
    case("dilation_meets_stride", "edge laws", (1, 2, 15, 15), (3, 2, 3, 3), dilation=2, stride=2, padding=2),
    case("same_even", "edge", (2, 3, 8, 9), (4, 3, 2, 4), padding="same"),
    case("four_sides", "edge", (1, 3, 8, 8), (4, 3, 3, 3), padding=(0, 2, 1, 0)),
    case("groups", "edge laws codegen", (2, 6, 8, 8), (9, 2, 3, 3), groups=3, padding=1),
    case("depthwise", "edge", (2, 3, 8, 8), (3, 1, 3, 3), groups=3, padding=1),
    case("overlapping_windows", "edge laws", (2, 3, 7, 9), (4, 3, 3, 3), **IMPALA_POOL),
    case("gap_between_windows", "edge", (1, 3, 13, 13), (4, 3, 3, 3), pool_size=2, pool_stride=3),
    case("ceil_mode", "edge", (1, 3, 10, 11), (4, 3, 3, 3), pool_size=3, pool_stride=2, ceil_mode=True),
    case("ceil_mode_padded", "edge laws codegen", (1, 2, 10, 10), (3, 2, 3, 3), pool_size=3, pool_stride=3,
         pool_padding=1, ceil_mode=True),
    case("window_8x8", "edge", (1, 2, 10, 10), (3, 2, 2, 2), pool_size=8),
    case("window_is_the_map", "edge", (2, 3, 7, 7), (4, 3, 3, 3), pool_size=5),
    case("avg_padded", "edge", (2, 3, 7, 9), (4, 3, 3, 3), pool="avg", pool_size=3, pool_stride=2, pool_padding=1),
    case("avg_excluding_pad", "edge", (1, 3, 9, 9), (4, 3, 3, 3), pool="avg", pool_size=3, pool_stride=2,
         pool_padding=1, count_include_pad=False),
    case("avg_ceil", "edge", (1, 3, 10, 9), (4, 3, 3, 3), pool="avg", pool_size=3, pool_stride=2, pool_padding=1,
         ceil_mode=True),
    case("avg_linear", "edge codegen", (2, 3, 8, 8), (4, 3, 3, 3), pool="avg", activation="none"),
    case("avg_leaky", "edge", (2, 3, 8, 8), (4, 3, 3, 3), pool="avg", activation="leaky_relu"),
    case("avg_window_6x6", "edge codegen", (1, 2, 13, 13), (3, 2, 2, 2), pool="avg", pool_size=6),
    case("avg_tanh", "edge", (2, 3, 8, 8), (4, 3, 3, 3), pool="avg", activation="tanh"),
    case("no_pool_strided_gelu", "edge", (2, 3, 9, 9), (4, 3, 3, 3), pool=None, stride=2, activation="gelu"),
    case("no_pool_sigmoid", "edge", (2, 3, 6, 6), (4, 3, 3, 3), pool=None, activation="sigmoid"),
    case("no_pool_leaky", "edge codegen", (2, 3, 6, 6), (4, 3, 3, 3), pool=None, activation="leaky_relu"),
    case("smooth", "smooth", (3, 3, 9, 7), (5, 3, 3, 3), activation="tanh"),
    *(case(f"act_{a}", "edge", (2, 3, 8, 8), (4, 3, 3, 3), activation=a) for a in ACTIVATIONS if a != "relu"),
    *(case(f"kinks_{pool}_{a}", tags, (24, 1, 3, 2), (5, 1, 1, 1), activation=a, **options)
      for pool, (tags, options) in KINKS.items() for a in KINKED),
    # layers of networks that people train
    case("article_conv1", "layer data", (128, 3, 32, 32), (32, 3, 5, 5), padding=2),
    case("article_conv2", "layer chips", (128, 32, 16, 16), (64, 32, 5, 5), padding=2),
    case("cifar_conv1", "layer chips data both_layouts", (512, 3, 32, 32), (64, 3, 3, 3), padding=1),
    case("mnist_conv1", "layer data both_layouts", (4096, 1, 28, 28), (32, 1, 5, 5), padding=2),
    case("impala_s1", "layer data", (2048, 3, 64, 64), (16, 3, 3, 3), **IMPALA_POOL),
    case("impala_s2", "layer chips", (2048, 16, 32, 32), (32, 16, 3, 3), **IMPALA_POOL),
    case("resnet_stem", "layer data both_layouts", (256, 3, 224, 224), (64, 3, 7, 7), bias=False, stride=2,
         **{**IMPALA_POOL, "padding": 3}),
    case("vggish_conv1", "layer data", (256, 1, 96, 64), (64, 1, 3, 3), padding=1),
    case("vgg1_2", "layer chips both_layouts", (64, 64, 224, 224), (64, 64, 3, 3), padding=1),
    case("vgg4_3", "layer", (64, 512, 28, 28), (512, 512, 3, 3), padding=1),
    case("kernelbench_l2_82", "layer", (128, 8, 256, 256), (64, 8, 3, 3), activation="tanh", pool_size=4),
    case("kernelbench_l2_35", "layer chips", (128, 64, 128, 128), (128, 64, 3, 3), activation="hardswish"),
    case("lenet5_conv1", "layer data", (256, 1, 28, 28), (6, 1, 5, 5), padding=2),
    case("lenet5_conv2", "layer", (256, 6, 14, 14), (16, 6, 5, 5)),
    case("lenet5_mean_tanh", "layer data", (256, 1, 28, 28), (6, 1, 5, 5), padding=2, activation="tanh", pool="avg"),
    # without pooling: what the block costs where there is nothing to fuse but bias and activation
    case("dqn_conv1", "layer data", (512, 4, 84, 84), (32, 4, 8, 8), stride=4, pool=None),
    case("dqn_conv2", "layer", (512, 32, 20, 20), (64, 32, 4, 4), stride=2, pool=None),
    # the same kernels on other batches
    case("article_conv1_1024", "bench data", (1024, 3, 32, 32), (32, 3, 5, 5), padding=2),
    case("article_conv2_1024", "bench", (1024, 32, 16, 16), (64, 32, 5, 5), padding=2),
    case("cifar_conv1_1", "bench data", (1, 3, 32, 32), (64, 3, 3, 3), padding=1),
    case("cifar_conv1_32", "bench data", (32, 3, 32, 32), (64, 3, 3, 3), padding=1),
    case("cifar_conv1_8192", "bench data", (8192, 3, 32, 32), (64, 3, 3, 3), padding=1),
    case("vgg1_2_1", "bench", (1, 64, 224, 224), (64, 64, 3, 3), padding=1),
    case("vgg4_3_1", "bench", (1, 512, 28, 28), (512, 512, 3, 3), padding=1),
    case("vgg4_3_32", "bench", (32, 512, 28, 28), (512, 512, 3, 3), padding=1),
)  # fmt: skip


def draw(rng: random.Random) -> Case:
    """A random small case: every option is drawn, and sizes are at least what the options need."""
    groups = rng.choice((1, 1, 1, 2, 3))
    channels, filters = rng.randint(1, 4) * groups, rng.randint(1, 5) * groups
    options = {
        "groups": groups,
        "activation": rng.choice(tuple(ACTIVATIONS)),
        "pool": rng.choice(("max", "max", "avg", None)),
        "stride": (rng.randint(1, 3), rng.randint(1, 3)),
        "dilation": (rng.randint(1, 2), rng.randint(1, 2)),
        "padding": (rng.randint(0, 2), rng.randint(0, 2)),
        "pool_size": (rng.randint(1, 4), rng.randint(1, 4)),
        "pool_stride": (rng.randint(1, 4), rng.randint(1, 4)),
        "ceil_mode": rng.random() < 0.3,
        "count_include_pad": rng.random() < 0.5,
    }
    options["pool_padding"] = tuple(rng.randint(0, size // 2) for size in options["pool_size"])
    taps = (rng.randint(1, 4), rng.randint(1, 4))
    sizes = []
    for i in (0, 1):
        conv = options["pool_size"][i] if options["pool"] else 1
        span = options["dilation"][i] * (taps[i] - 1) + 1
        sizes.append(span + (conv - 1) * options["stride"][i] + rng.randint(0, 4))
    shapes = ((rng.randint(1, 3), channels, *sizes), (filters, channels // groups, *taps))
    return case("drawn", "drawn", *shapes, bias=rng.random() < 0.7, **options)
