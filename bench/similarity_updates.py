"""Plain updates against those scaled by similarity: the two-block CNN on digits, trained by the trainer's own code.

    python -m bench.similarity_updates                    a minute or two of CPU; writes to bench/training
    python -m bench.similarity_updates --out FOLDER --epochs 2 --seeds 1 --optimizer sgd --updates row
    python -m bench.similarity_updates --draw             the picture and the table again, from the recorded runs

Runs of a seed share initial weights, order and distortions of the images, and all options but those compared. Scaled
steps are shorter, and that alone changes a curve: `half` shows plain updates with half the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.recorded import Document, command, parser, to_json
from bench.selection import SelectionError, chosen
from tritonshare import __version__
from tritonshare.files import replace
from tritonshare.training import data, report
from tritonshare.training.options import OPTIMIZERS, Options
from tritonshare.training.report import Axes, Figure
from tritonshare.training.run import Run, one_epoch, threads_for

SUMMARY = (__doc__ or "").split("\n")[0]
NAME = "similarity_updates"
COMPARED = ("adam", "sgd")
CURVES = ("loss", "held_out_loss", "held_out_accuracy")  # what of each epoch is recorded


@dataclass(frozen=True)
class Updates:
    """Updates that are compared, and how they are drawn: Okabe and Ito's colours, which the colour-blind tell apart."""

    label: str
    similarity: str
    rate: float  # times the optimizer's default learning rate
    color: str
    line: str


UPDATES = {
    "plain": Updates("plain", "none", 1, "#0072b2", "-"),
    "half": Updates("plain, half the learning rate", "none", 0.5, "#000000", ":"),
    "tensor": Updates("scaled per tensor", "tensor", 1, "#d55e00", "-"),
    "row": Updates("scaled per row", "row", 1, "#009e73", "--"),
}


def trained(options: Options, epochs: int, images: data.ImageSet) -> Document:
    """One run: what its checkpoint would remember of its options, and its curves."""
    device = torch.device("cpu")
    with threads_for(options, images, device):
        run = Run(options, images, device)
        history = [one_epoch(run, epoch, epochs) for epoch in range(epochs)]
    return {"config": run.config, **{name: [getattr(epoch, name) for epoch in history] for name in CURVES}}


def compare(optimizers: Iterable[str], updates: list[str], seeds: int, epochs: int, results: Path) -> Document:
    """All runs. The file `results` has those that there are: after each it is replaced."""
    images = data.load("digits")
    document = {
        "about": SUMMARY,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "tritonshare": __version__,
        "device": "cpu",
        "epochs": epochs,
        "seeds": list(range(seeds)),
        "runs": [],
    }
    for optimizer in optimizers:
        for name in updates:
            for seed in range(seeds):
                of, rate = UPDATES[name], OPTIMIZERS[optimizer].lr
                options = Options(optimizer=optimizer, similarity=of.similarity, lr=rate * of.rate, seed=seed)
                print(f"\n{OPTIMIZERS[optimizer]}, {of.label}, seed {seed}")
                document["runs"].append({"updates": name, **trained(options, epochs, images)})
                replace({results: to_json(document, "runs")})
    return document


def groups(document: Document) -> dict[str, dict[str, list[Document]]]:
    """The runs of all seeds, by optimizer and updates."""
    found: dict[str, dict[str, list[Document]]] = {}
    for run in document["runs"]:
        found.setdefault(run["config"]["optimizer"], {}).setdefault(run["updates"], []).append(run)
    return found


def table(document: Document) -> str:
    """The last epoch in Markdown: means over the seeds, with the lowest and the highest."""

    def cell(runs: list[Document], curve: str, form: str) -> str:
        last = [run[curve][-1] for run in runs]
        return f"{sum(last) / len(last):{form}} ({min(last):{form}} to {max(last):{form}})"

    lines = ["| optimizer | updates | training loss | held-out loss | held-out accuracy |", "|---|---|---|---|---|"]
    for optimizer, of_optimizer in groups(document).items():
        for name, runs in of_optimizer.items():
            cells = [cell(runs, curve, form) for curve, form in zip(CURVES, (".3f", ".3f", ".1%"), strict=True)]
            lines.append(f"| {' | '.join([optimizer, UPDATES[name].label, *cells])} |")
    return "\n".join(lines)


def picture(document: Document) -> bytes:
    """A PNG with a row of charts for each optimizer: training loss, and held-out accuracy."""
    found = groups(document)
    figure = Figure(figsize=(9, 0.6 + 3.2 * len(found)), dpi=150, layout="constrained")
    charts = figure.subplots(len(found), 2, squeeze=False)
    for (optimizer, of_optimizer), (loss, accuracy) in zip(found.items(), charts, strict=True):
        for name, runs in of_optimizer.items():
            curve(loss, [run["loss"] for run in runs], UPDATES[name])
            curve(accuracy, [run["held_out_accuracy"] for run in runs], UPDATES[name])
        loss.set_title(f"{OPTIMIZERS[optimizer]}: training loss")
        report.loss_by_epoch(loss)
        accuracy.set_title(f"{OPTIMIZERS[optimizer]}: held-out accuracy")
        report.accuracy_by_epoch(accuracy)
        # The first epochs, where all rise steeply, would leave no room for the others.
        runs = [run["held_out_accuracy"] for runs in of_optimizer.values() for run in runs]
        accuracy.set_ylim(min(run[document["epochs"] // 5] for run in runs), 1)
    handles, labels = charts[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    seeds = len(document["seeds"])
    figure.supxlabel(f"TwoBlockCNN on digits, {seeds} seeds: mean (line), lowest to highest (band)", fontsize="medium")
    return report.png(figure)


def curve(axes: Axes, runs: list[list[float]], of: Updates) -> None:
    by_epoch = list(zip(*runs, strict=True))
    epochs = range(1, len(by_epoch) + 1)
    means = [sum(values) / len(values) for values in by_epoch]
    axes.plot(epochs, means, of.line, color=of.color, label=of.label)
    axes.fill_between(epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), color=of.color, alpha=0.15, lw=0)


def main(argv: list[str] | None = None) -> int:
    made = parser(NAME, SUMMARY, epochs=20, what="of each run", seeds=5)
    both = " and ".join(COMPARED)
    add = made.add_argument
    add("--optimizer", action="append", metavar="NAME", help=f"of {', '.join(OPTIMIZERS)} (default: {both})")
    add("--updates", action="append", metavar="NAME", help=f"of {', '.join(UPDATES)} (default: all)")
    args = made.parse_args(argv)
    try:
        optimizers = chosen(args.optimizer or COMPARED, OPTIMIZERS, "optimizer")
        updates = chosen(args.updates, UPDATES, "updates")
    except SelectionError as error:
        made.error(str(error))

    def run(file: Path) -> Document:
        return compare(optimizers, updates, args.seeds, args.epochs, file)

    return command(made, args, NAME, run, picture, table)


if __name__ == "__main__":
    raise SystemExit(main())
