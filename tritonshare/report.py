"""What a training run reports: a picture of its curves and a table."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter


@dataclass(frozen=True)
class Epoch:
    """What one epoch reached: mean losses (nats), accuracy in 0..1, and the seconds its training steps took."""

    loss: float
    held_out_loss: float
    held_out_accuracy: float
    seconds: float


def draw_curves(history: Sequence[Epoch], title: str) -> bytes:
    """A PNG with the losses (logarithmic) on the left and the held-out accuracy on the right.

    Drawn without pyplot: no display, no window and no global state is involved.
    """
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    figure.suptitle(title)
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
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _curve(axes: Axes, values: Sequence[float], color: str, label: str) -> None:
    # Few epochs get dots: a single one would be an invisible line.
    marker = "o" if len(values) < 10 else ""
    axes.plot(range(1, len(values) + 1), values, color=color, marker=marker, label=label)


def table(rows: Mapping[str, str]) -> str:
    """Names and values in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
