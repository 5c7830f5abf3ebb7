"""The report's pictures: figures of matplotlib, and as SVG that takes the page's colours and font and tells, where the
pointer rests, what each mark is."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from bench.rows import DTYPES

# Colours of the page in daylight. In a picture each stands for the page's variable of that name: see style.css.
COLOURS = {
    "ink": "#1d2024", "muted": "#5a6068", "rule": "#d8d9d4", "grid": "#e6e7e2",
    "faster": "#0a6355", "slower": "#a3310a", "ours": "#0b5394", "eager": "#8b9097", "compile": "#b5790f",
    "bf16": "#0b5395", "fp16": "#8a5b00", "tf32": "#0a7a68", "fp32": "#a3355f",
}  # fmt: skip
MARKERS = {"bf16": "o", "fp16": "s", "tf32": "^", "fp32": "D"}

SIZE = 11  # font size of all text in a picture, in pixels
CHARACTER = 0.61 * SIZE  # width of a monospaced character
LABEL = 28  # characters of a name, at the most
BAR = 13  # height of a bar with its surroundings, and the room of its text
GAP = 9  # between the bars of two layers
TOP, BOTTOM = 26, 28  # room for titles above a plot, and for its axis
TEXT_ROOM = 126  # and for the texts to the right of it

TIMES, NOTHING = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


def number(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits; exponents only where zeros would be many."""
    if value == 0 or value != value or abs(value) == float("inf"):
        return f"{value:g}"
    magnitude = floor(log10(abs(value)))
    if not -4 <= magnitude <= 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def prefixed(value: float, unit: str, digits: int = 3) -> str:
    """`value` with the prefix that makes it short: 51.4 MB."""
    power = min(max(floor(log10(value) / 3), 0), 5) if value > 0 else 0
    return f"{number(value / 1000**power, digits)} {' kMGTP'[power].strip()}{unit}"


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


# A picture's parts.


def picture(width: float, height: float) -> Figure:
    """A figure whose points are pixels."""
    figure = Figure(figsize=(ceil(width) / 72, ceil(height) / 72), dpi=72)
    FigureCanvasAgg(figure)
    return figure


def plot(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at these pixels of the figure."""
    full_width, full_height = figure.get_size_inches() * 72
    place = (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    axes = figure.add_axes(place)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=SIZE, labelcolor=COLOURS["muted"], labelfontfamily="monospace")
    return axes


def write(axes: Axes, text: str, x: float, y: float, dx: float = 0, colour: str = "ink", **how: Any) -> Annotation:
    """Text at this place of the axes, so many pixels aside. `gid` is what it tells where the pointer rests on it."""
    style = {"va": "center", "fontsize": SIZE, "family": "monospace", "parse_math": False, "xytext": (dx, 0)}
    style |= {"textcoords": "offset points", "annotation_clip": False, "color": COLOURS[colour]}
    return axes.annotate(text, (x, y), **style | how)


def logarithmic(axis: Axis, label: Callable[[float], str], decades: float) -> None:
    """Ticks at powers of ten, with 2 and 5 between them where there is room."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.6 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axis.grid(color=COLOURS["grid"], linewidth=1)


def svg(figure: Figure, title: str) -> str:
    """The figure as part of a page."""
    telling = figure.findobj(lambda artist: artist.get_gid() is not None)
    tips = [html.escape(artist.get_gid() or "") for artist in telling]
    for i, artist in enumerate(telling):
        artist.set_gid(f"tip{i}")
    drawn = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(drawn, format="svg", transparent=True)
    text = drawn.getvalue().split("</metadata>")[1].replace("xlink:href", "href").removesuffix("</svg>\n")
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<clipPath.*?</clipPath>", "", text, flags=re.DOTALL)
    text = re.sub(r' clip-path="[^"]*"| transform="rotate\(-0 [^"]*"|font-(size|family): [^;"]*;? ?', "", text)
    text = re.sub(r'<g id="tip(\d+)">', lambda found: f"<g><title>{tips[int(found[1])]}</title>", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the page has ids of its own
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    width, height = figure.get_size_inches() * 72
    style = f"width: {width:.0f}px; max-width: 100%; min-width: {0.85 * width:.0f}px"
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" style="{style}"><title>{html.escape(title)}</title>'
    return f"{head}{text}</svg>"


# Bars.


@dataclass(frozen=True)
class Bar:
    """A value, with its interval if it has one, and the text to its right; or the text alone."""

    kind: str
    tip: str
    text: str
    colour: str = "muted"
    value: float | None = None
    interval: tuple[float, float] | None = None


Layers = Sequence[tuple[str, Sequence[Bar]]]


def speedups(layers: Layers) -> Figure:
    """Bars from 1 to each ratio, on a logarithmic axis: to the right where ours is faster."""
    ends = [end for _, bars in layers for bar in bars for end in bar.interval or ()]
    low, high = min([0.5, *ends]) / 1.15, max([2, *ends]) * 1.15
    figure, (axes,) = bars(layers, 460)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    logarithmic(axes.xaxis, lambda value: f"{number(value, 1)}{TIMES}", log10(high / low))
    stack(axes, layers, 1)
    write(axes, "◀ ours slower", 1, -13, -8, "slower", ha="right")
    write(axes, "ours faster ▶", 1, -13, 8, "faster")
    return figure


def memory(quantities: Mapping[str, Layers]) -> Figure:
    """A plot for each quantity, with bars as shares of the largest of their layer."""
    figure, plots = bars(next(iter(quantities.values())), 200, len(quantities))
    for axes, (title, layers) in zip(plots, quantities.items(), strict=True):
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "½", "largest"])
        axes.grid(axis="x", color=COLOURS["grid"], linewidth=1)
        stack(axes, layers, 0)
        write(axes, title, 0, -13)
    return figure


def rows(layers: Layers) -> Iterator[tuple[str, float, list[tuple[float, Bar]]]]:
    """Each layer's name, its middle, and its bars with theirs, in pixels from the top of a plot."""
    y = GAP / 2
    for label, of in layers:
        yield label, y + BAR * len(of) / 2, [(y + BAR * (i + 0.5), bar) for i, bar in enumerate(of)]
        y += BAR * len(of) + GAP


def bars(layers: Layers, width: float, count: int = 1) -> tuple[Figure, list[Axes]]:
    """So many plots beside each other, whose rows are these layers."""
    start = CHARACTER * min(LABEL, max(len(label) for label, _ in layers)) + 16
    height = sum(BAR * len(of) + GAP for _, of in layers)
    figure = picture(start + count * (width + TEXT_ROOM), TOP + height + BOTTOM)
    plots = [plot(figure, start + i * (width + TEXT_ROOM), TOP, width, height) for i in range(count)]
    for axes in plots:
        axes.set_ylim(height, 0)
        axes.set_yticks([])
    for label, middle, _ in rows(layers):
        write(plots[0], shortened(label, LABEL), 0, middle, -10, ha="right", gid=label, xycoords=LEFT(plots[0]))
    return figure, plots


def stack(axes: Axes, layers: Layers, base: float) -> None:
    """Bars from `base` to their values."""
    axes.axvline(base, color=COLOURS["ink"], linewidth=1)
    for y, bar in (placed for *_, of in rows(layers) for placed in of):
        if bar.value:
            axes.barh(y, bar.value - base, 9, base, color=COLOURS[bar.kind], gid=bar.tip)
        if bar.interval:
            axes.plot(bar.interval, (y, y), color=COLOURS["ink"], linewidth=1)
        write(axes, bar.text, 1, y, 16, bar.colour, gid=bar.tip, xycoords=LEFT(axes))


LEFT = Axes.get_yaxis_transform  # from 0 at the left to 1 at the right


# The roofline.


@dataclass(frozen=True)
class Point:
    """A measured case in the roofline picture."""

    name: str
    dtype: str
    intensity: float  # FLOP/byte
    rate: float  # FLOP/s
    tip: str


def roofline(points: Sequence[Point], roofs: Sequence[Mapping[str, float]]) -> Figure:
    """Attained FLOP/s against FLOP/byte, both logarithmic, under the roofs of each run; the last run's are named."""
    dtypes = [dtype for dtype in DTYPES if any(point.dtype == dtype for point in points)]
    known = [(of["copy"], dtype, of[dtype]) for of in roofs for dtype in dtypes if dtype in of]
    across = [*(rate / copy for copy, _, rate in known), *(point.intensity for point in points)]
    up = [*(rate for *_, rate in known), *(point.rate for point in points)]
    left, right, low, high = min(across) / 3, max(across) * 5, min(up) / 3, max(up) * 4

    figure = picture(548, 386)
    axes = plot(figure, 58, 22, 450, 318)
    axes.spines[:].set(visible=True, color=COLOURS["rule"])
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    logarithmic(axes.xaxis, lambda value: number(value, 1), log10(right / left))
    logarithmic(axes.yaxis, lambda value: prefixed(value, "", 1), log10(high / low))
    write(axes, "FLOP per byte", 0.5, -36 / 318, ha="center", xycoords="axes fraction")
    write(axes, "FLOP/s", -57 / 450, 1 + 12 / 318, xycoords="axes fraction")

    lines = []
    for of in roofs:
        copy, highest = of["copy"], max(of[dtype] for dtype in dtypes if dtype in of)
        first = max(left, low / copy)
        lines += axes.plot((first, highest / copy), (first * copy, highest), color=COLOURS["ink"], linewidth=1.6)
    for copy, dtype, rate in known:
        lines += axes.plot((rate / copy, right), (rate, rate), color=COLOURS[dtype], linewidth=1.6)
    for point in points:
        face = (COLOURS[point.dtype], 0.35)
        how = {"color": COLOURS[point.dtype], "markerfacecolor": face, "markersize": 7, "gid": point.tip}
        axes.plot(point.intensity, point.rate, MARKERS[point.dtype], **how)
    height = float("inf")
    for dtype in sorted((d for d in dtypes if d in roofs[-1]), key=lambda d: -roofs[-1][d]):
        height = min(height - SIZE - 1, axes.transData.transform((1, roofs[-1][dtype]))[1])
        write(axes, dtype, 513, height, colour=dtype, xycoords="figure points")
    names(axes, points, lines)
    return figure


def names(axes: Axes, points: Sequence[Point], lines: Sequence[Line2D]) -> None:
    """Names of cases, each once and only where it covers nothing."""
    marks = axes.transData.transform([(point.intensity, point.rate) for point in points])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in marks]
    roofs = [line.get_path().transformed(line.get_transform()) for line in lines]
    placed = set()
    for point, (x, y) in zip(points, marks, strict=True):
        for dx, dy, ha in ((7, 0, "left"), (-7, 0, "right"), (0, 12, "center"), (0, -12, "center")):
            if point.name in placed:
                break
            text = write(axes, shortened(point.name, LABEL), x + dx, y + dy, colour=point.dtype, ha=ha,
                         xycoords="figure points")  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            crossed = any(roof.intersects_bbox(box, filled=False) for roof in roofs)
            if not inside or crossed or box.count_overlaps(taken):
                text.remove()
                continue
            placed.add(point.name)
            taken.append(box)
