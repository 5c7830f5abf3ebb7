"""Where everything in a chart stands: pure arithmetic. The template `charts.html` draws it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any, TypeVar

from bench.rows import DTYPES
from tritonshare.measure.machine import Interval

SIZE = 11  # font size of all text in a chart
CHARACTER = 0.61 * SIZE  # width of a monospaced character
LABEL = 28  # characters of a name, at the most
BAR = 13  # height of a bar with its surroundings, and the room of its text
GAP = 9  # between the bars of two layers
TOP = 30  # room for the titles above a plot
TEXT_ROOM = 110  # and for the texts to the right of it

TIMES, NOTHING = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"

T = TypeVar("T")
Box = tuple[float, float, float, float]  # left, top, right, bottom


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


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: values from `low` to `high` on coordinates from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = log10(value / self.low) / log10(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, label: Callable[[float], str], spacing: float) -> list[Tick]:
        """At powers of ten, with 2 and 5 between them where there is room."""
        first, last = floor(log10(self.low)), ceil(log10(self.high))
        decade = abs(self.end - self.start) / log10(self.high / self.low)
        steps = (1, 2, 5) if 0.3 * decade >= spacing else (1,)
        every = ceil(spacing / decade)
        values = [step * 10.0**power for power in range(first, last + 1) if power % every == 0 for step in steps]
        return [Tick(self.at(value), label(value)) for value in values if self.low <= value <= self.high]


@dataclass(frozen=True)
class Bar:
    """One bar with the text to its right; `width` 0 where there is only the text."""

    kind: str  # a CSS class
    title: str
    text: str
    mark: str  # a CSS class of the text
    y: float
    x: float = 0
    width: float = 0
    whisker: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    label: str
    title: str
    y: float
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Panel:
    """A plot area, and a column of texts to its right."""

    title: str
    start: float
    end: float
    ticks: Sequence[Tick]
    rows: Sequence[Row]
    baseline: float
    sides: Sequence[str] = ()  # what it means to be left or right of the baseline


@dataclass(frozen=True)
class BarChart:
    width: float
    height: float
    top: float
    bottom: float
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Ratio:
    """A ratio of times, or why there is none."""

    kind: str
    title: str
    text: str
    mark: str
    value: Interval | None = None


@dataclass(frozen=True)
class Amount:
    """Of bytes; None is unknown."""

    kind: str
    title: str
    value: float | None


Layers = Sequence[tuple[str, Sequence[T]]]


def speedups(layers: Layers[Ratio]) -> BarChart:
    """Bars from 1 to each ratio, on a logarithmic axis: to the right where ours is faster."""
    ratios = [item.value for _, items in layers for item in items if item.value]
    low = min([0.5, *(ratio.low for ratio in ratios)]) / 1.15
    high = max([2, *(ratio.high for ratio in ratios)]) * 1.15
    start = label_width(layers)
    axis = Axis(low, high, start, start + 460)
    one = axis.at(1)

    def bar(item: Ratio, y: float) -> Bar:
        if item.value is None:
            return Bar(item.kind, item.title, item.text, item.mark, y)
        end = axis.at(item.value.median)
        whisker = (axis.at(item.value.low), axis.at(item.value.high))
        return Bar(item.kind, item.title, item.text, item.mark, y, min(one, end), abs(end - one), whisker)

    rows, bottom = stacked(layers, bar)
    ticks = axis.ticks(lambda value: f"{number(value, 1)}{TIMES}", spacing=52)
    panel = Panel("", axis.start, axis.end, ticks, rows, one, ("◀ ours slower", "ours faster ▶"))
    return BarChart(axis.end + TEXT_ROOM, bottom + 28, TOP, bottom, [panel])


def memory(quantities: Mapping[str, Layers[Amount]]) -> BarChart:
    """A panel for each quantity, with bars as shares of the largest of their layer."""
    start, bottom, panels = label_width(next(iter(quantities.values()))), 0.0, []
    for title, layers in quantities.items():
        end = start + 200
        ticks = [Tick(start, "0"), Tick((start + end) / 2, "½"), Tick(end, "largest")]
        scaled = [(name, [(a, max(b.value or 0 for b in amounts)) for a in amounts]) for name, amounts in layers]
        rows, bottom = stacked(scaled, lambda item, y, start=start, end=end: memory_bar(*item, y, start, end))
        panels.append(Panel(title, start, end, ticks, rows, start))
        start = end + TEXT_ROOM
    return BarChart(start, bottom + 28, TOP, bottom, panels)


def memory_bar(amount: Amount, largest: float, y: float, start: float, end: float) -> Bar:
    text = NOTHING if amount.value is None else prefixed(amount.value, "B")
    width = (end - start) * amount.value / largest if amount.value else 0
    return Bar(amount.kind, f"{amount.title}: {text}", text, "", y, start, width)


def stacked(layers: Layers[T], bar: Callable[[T, float], Bar]) -> tuple[list[Row], float]:
    """The rows of a chart from top to bottom, and where they end."""
    rows, y = [], TOP + GAP / 2
    for name, items in layers:
        bars = [bar(item, y + BAR * i) for i, item in enumerate(items)]
        rows.append(Row(shortened(name, LABEL), name, y + BAR * len(items) / 2, bars))
        y += BAR * len(items) + GAP
    return rows, y - GAP / 2


def label_width(layers: Layers[Any]) -> float:
    return CHARACTER * min(LABEL, max(len(name) for name, _ in layers)) + 16


@dataclass(frozen=True)
class Point:
    """A measured case in the roofline picture."""

    name: str
    dtype: str
    intensity: float  # FLOP/byte
    rate: float  # FLOP/s
    title: str


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    kind: str
    title: str


@dataclass(frozen=True)
class Line:
    kind: str
    x1: float
    y1: float
    x2: float
    y2: float

    def boxes(self) -> list[Box]:
        """Small boxes that together cover it."""
        steps = 1 + int(max(abs(self.x2 - self.x1), abs(self.y2 - self.y1)) / 4)
        shares = [i / steps for i in range(steps + 1)]
        middles = [(self.x1 + share * (self.x2 - self.x1), self.y1 + share * (self.y2 - self.y1)) for share in shares]
        return [(x - 2, y - 2, x + 2, y + 2) for x, y in middles]


@dataclass(frozen=True)
class Text:
    x: float
    y: float
    text: str
    kind: str
    anchor: str = "start"

    def box(self) -> Box:
        width = CHARACTER * len(self.text)
        left = self.x - {"start": 0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - SIZE, left + width, self.y + 3


@dataclass(frozen=True)
class Roofline:
    width: float
    height: float
    plot: Box
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    roofs: Sequence[Line]
    marks: Sequence[Mark]
    texts: Sequence[Text]


def roofline(points: Sequence[Point], roofs: Sequence[Mapping[str, float]]) -> Roofline:
    """Attained FLOP/s against FLOP/byte, both logarithmic, under the roofs of each run; the last run's are named."""
    dtypes = [dtype for dtype in DTYPES if any(point.dtype == dtype for point in points)]
    ridges = [of[dtype] / of["copy"] for of in roofs for dtype in dtypes if dtype in of]
    rates = [of[dtype] for of in roofs for dtype in dtypes if dtype in of]
    left, top, right, bottom = plot = (58.0, 22.0, 508.0, 340.0)
    across = [*ridges, *(point.intensity for point in points)]
    x = Axis(min(across) / 3, max(across) * 5, left, right)
    up = [*rates, *(point.rate for point in points)]
    y = Axis(min(up) / 3, max(up) * 4, bottom, top)

    lines = []
    for of in roofs:
        lowest, highest = max(x.low, y.low / of["copy"]), max(of[dtype] for dtype in dtypes if dtype in of)
        lines.append(Line("copy", x.at(lowest), y.at(lowest * of["copy"]), x.at(highest / of["copy"]), y.at(highest)))
        for dtype in dtypes:
            if dtype in of:
                lines.append(Line(dtype, x.at(of[dtype] / of["copy"]), y.at(of[dtype]), right, y.at(of[dtype])))
    marks = [Mark(x.at(point.intensity), y.at(point.rate), point.dtype, point.title) for point in points]
    texts, height = names(points, marks, lines, plot), 0.0
    for dtype in sorted((d for d in dtypes if d in roofs[-1]), key=lambda d: -roofs[-1][d]):
        height = max(height + SIZE + 1, y.at(roofs[-1][dtype]) + 4)
        texts.append(Text(right + 5, height, dtype, dtype))
    per_byte = x.ticks(lambda value: number(value, 1), spacing=44)
    per_second = y.ticks(lambda value: prefixed(value, "", 1), spacing=24)
    return Roofline(right + 40, bottom + 46, plot, per_byte, per_second, lines, marks, texts)


def names(points: Sequence[Point], marks: Sequence[Mark], lines: Sequence[Line], plot: Box) -> list[Text]:
    """Names of cases, each once and only where it covers nothing."""
    taken = [(mark.x - 4, mark.y - 4, mark.x + 4, mark.y + 4) for mark in marks]
    taken += [box for line in lines for box in line.boxes()]
    placed: dict[str, Text] = {}
    for point, mark in zip(points, marks, strict=True):
        if point.name in placed:
            continue
        name = shortened(point.name, LABEL)
        for dx, dy, anchor in ((7, 4, "start"), (-7, 4, "end"), (0, -8, "middle"), (0, 17, "middle")):
            text = Text(mark.x + dx, mark.y + dy, name, "name", anchor)
            box = text.box()
            inside = plot[0] < box[0] and plot[1] < box[1] and box[2] < plot[2] and box[3] < plot[3]
            if inside and not any(overlap(box, other) for other in taken):
                placed[point.name] = text
                taken.append(box)
                break
    return list(placed.values())


def overlap(box: Box, other: Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
