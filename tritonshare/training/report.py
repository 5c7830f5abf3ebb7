"""Reports a training run: a picture of its curves, and a table."""

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from tritonshare import records
from tritonshare.files import sentence


@contextmanager
def _no_backend() -> Iterator[None]:
    """Within the block MPLBACKEND is not set. Notebooks name a backend there that matplotlib may not know, and then it
    cannot be imported; the pictures here need no backend."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named


with _no_backend():
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

LINE = 10_000  # characters of a line that may have a path in it
LOSS = records.number(0, 1e300)


@dataclass(frozen=True)
class Epoch:
    """The result of one epoch: mean losses (nats), accuracy in 0..1, and the seconds that its training steps took."""

    loss: Annotated[float, LOSS]
    held_out_loss: Annotated[float, LOSS]
    held_out_accuracy: Annotated[float, records.number(0, 1)]
    seconds: Annotated[float, records.number(1e-9, 1e9)]


def draw_curves(history: Sequence[Epoch], title: str) -> bytes:
    """A PNG with the losses (logarithmic) on the left and the held-out accuracy on the right.

    Drawn without pyplot: no display, no window and no global state is involved.
    """
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    figure.suptitle(sentence(title, 100), parse_math=False)
    loss, accuracy = figure.subplots(1, 2)
    _curve(loss, [epoch.loss for epoch in history], "#0072b2", "training")
    _curve(loss, [epoch.held_out_loss for epoch in history], "#d55e00", "held out")
    loss.set_title("Loss")
    loss_by_epoch(loss)
    loss.legend(frameon=False)
    _curve(accuracy, [epoch.held_out_accuracy for epoch in history], "#d55e00", "held out")
    accuracy.set_title(f"Held-out accuracy: {history[-1].held_out_accuracy:.2%} at the end")
    accuracy_by_epoch(accuracy)
    return png(figure)


@dataclass(frozen=True)
class Size:
    """A model's parameters and buffers in bytes, and its held-out accuracy in 0..1."""

    bytes: int
    accuracy: float


SIZE_STYLES = (("#0072b2", "o", ":"), ("#d55e00", "s", "-"), ("#009e73", "D", "--"))


def draw_sizes(curves: Mapping[str, Mapping[Any, Size]], dense: Size | None, title: str) -> bytes:
    """A PNG of size against accuracy: a curve by name, with a point for each number of bits, and the dense model."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for (name, sizes), (color, marker, line) in zip(curves.items(), SIZE_STYLES, strict=False):
        points = list(sizes.values())
        places = [size.bytes for size in points], [size.accuracy for size in points]
        axes.plot(*places, line, color=color, marker=marker, label=name)
        for bits, size in sizes.items():
            below = name == next(iter(curves))
            axes.annotate(
                str(bits),
                (size.bytes, size.accuracy),
                xytext=(0, -13 if below else 7),
                textcoords="offset points",
                ha="center",
                fontsize="small",
                color=color,
            )
    if dense is not None:
        axes.axhline(dense.accuracy, color="#000000", lw=0.8, ls="--")
        axes.plot([dense.bytes], [dense.accuracy], "k*", markersize=11, label="dense")
    title = f"{sentence(title, 60)}: accuracy by size, points labelled with bits a weight"
    axes.set_title(title, fontsize="medium", parse_math=False)
    size_axes(axes)
    axes.legend(frameon=False)
    return png(figure)


def size_axes(axes: Axes) -> None:
    axes.set(xlabel="bytes of weights", ylabel="held-out accuracy", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def loss_by_epoch(axes: Axes) -> None:
    axes.set(ylabel="cross-entropy (nats)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _by_epoch(axes)


def accuracy_by_epoch(axes: Axes) -> None:
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _by_epoch(axes)


def _by_epoch(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a title may have characters that the font lacks
        FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def _curve(axes: Axes, values: Sequence[float], color: str, label: str) -> None:
    # Few epochs get dots: a single one would be an invisible line.
    marker = "o" if len(values) < 10 else ""
    axes.plot(range(1, len(values) + 1), values, color=color, marker=marker, label=label)


def table(rows: Mapping[str, str]) -> str:
    """Names and values in two columns; a value, which may have a path in it, is one line."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {sentence(value, LINE)}" for name, value in rows.items())
