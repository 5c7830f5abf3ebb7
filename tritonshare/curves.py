"""The picture of a training run: loss and held-out accuracy by epoch."""

import io
from collections.abc import Sequence
from typing import Protocol

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter


class Measured(Protocol):
    @property
    def loss(self) -> float: ...
    @property
    def held_out_loss(self) -> float: ...
    @property
    def held_out_accuracy(self) -> float: ...


def draw_curves(history: Sequence[Measured], title: str) -> bytes:
    """A PNG with the loss (nats, logarithmic) on the left and the held-out accuracy on the right.

    Drawn without pyplot, so no display, no window and no global state is involved.
    """
    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    figure.suptitle(title)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    marker = "o" if len(history) < 10 else ""  # a single epoch would be an invisible line

    loss_axes.plot(epochs, [e.loss for e in history], color="#0072b2", marker=marker, label="training")
    loss_axes.plot(epochs, [e.held_out_loss for e in history], color="#d55e00", marker=marker, label="held out")
    loss_axes.set(title="Loss", xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
    loss_axes.legend(frameon=False)

    accuracy = [e.held_out_accuracy for e in history]
    accuracy_axes.plot(epochs, accuracy, color="#d55e00", marker=marker)
    accuracy_axes.set(title=f"Held-out accuracy: {accuracy[-1]:.2%} in the end", xlabel="epoch", ylabel="accuracy")
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))

    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
