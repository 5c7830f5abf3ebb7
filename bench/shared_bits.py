"""Size against accuracy: the two-block CNN on digits with shared weights, by the trainer's own code.

    python -m bench.shared_bits                        minutes of CPU; writes to bench/training
    python -m bench.shared_bits --out FOLDER --epochs 2 --seeds 1 --bits 4
    python -m bench.shared_bits --draw                 the picture and the table again, from the recorded runs

For each seed one dense model is trained. From it each number of bits is shared, evaluated, fine-tuned and evaluated,
as `tritonshare train --shared-bits` does it.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.recorded import Document, command, parser, to_json
from tritonshare import __version__
from tritonshare.files import replace
from tritonshare.training import data, finetune, report
from tritonshare.training.options import DEFAULT_EPOCHS, SHARED_CODEBOOKS, Options
from tritonshare.training.report import Axes, Figure
from tritonshare.training.run import Run, one_epoch, threads_for

SUMMARY = (__doc__ or "").split("\n")[0]
NAME = "shared_bits"
BITS = tuple(finetune.EVERY)


def measured(options: Options, epochs: int, bits: list[int], images: data.ImageSet) -> list[Document]:
    """The rows of one seed: of the dense model, then of each number of bits."""
    device = torch.device("cpu")
    with threads_for(options, images, device):
        run = Run(options, images, device)
        for epoch in range(epochs):
            one_epoch(run, epoch, epochs)
        size = sum(tensor.nbytes for tensor in run.model.state_dict().values())
        rows = [{"seed": options.seed, "bits": None, "bytes": size} | accuracies(run, "")]
        for number in bits:
            print(f"{number} bits")
            untuned, shrinkage = finetune.shared_run(run, number, epochs)
            tuned, _ = finetune.fine_tune(run, number, epochs)
            row = {"seed": options.seed, "bits": number, "bytes": shrinkage.bytes_after}
            rows.append(row | accuracies(untuned, "_untuned") | accuracies(tuned, ""))
    return rows


def accuracies(run: Run, which: str) -> Document:
    loss, accuracy = run.evaluate()
    found = {f"held_out_loss{which}": loss, f"held_out_accuracy{which}": accuracy}
    return found if which else found | {"held_out_accuracy_by_class": finetune.by_class(run)}


def record(seeds: int, epochs: int, bits: list[int], results: Path) -> Document:
    """All rows. The file `results` has those that there are: after each seed it is replaced."""
    images = data.load("digits")
    options = Options()
    document = {
        "about": SUMMARY,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "tritonshare": __version__,
        "device": "cpu",
        "epochs": epochs,
        "shared_epochs": options.shared_epochs,
        "shared_lr": options.shared_lr,
        "codebooks": SHARED_CODEBOOKS,
        "seeds": list(range(seeds)),
        "rows": [],
    }
    for seed in range(seeds):
        print(f"\nseed {seed}")
        document["rows"] += measured(Options(seed=seed), epochs, bits, images)
        replace({results: to_json(document, "rows")})
    return document


def by_bits(document: Document) -> dict[int | None, list[Document]]:
    """The rows of all seeds, by number of bits; None: dense."""
    found: dict[int | None, list[Document]] = {}
    for row in document["rows"]:
        found.setdefault(row["bits"], []).append(row)
    return found


def table(document: Document) -> str:
    """In Markdown: bytes, and held-out accuracies: means over the seeds, with the lowest and the highest."""
    found = by_bits(document)
    (dense,) = {row["bytes"] for row in found[None]}

    def cell(rows: list[Document], key: str) -> str:
        values = [row[key] for row in rows]
        return f"{sum(values) / len(values):.2%} ({min(values):.2%} to {max(values):.2%})"

    lines = [
        "| bits | bytes of weights | smaller | accuracy | fine-tuned | most points lost by a seed |",
        "|---|---|---|---|---|---|",
        f"| dense | {dense:,} | | {cell(found[None], 'held_out_accuracy')} | | |",
    ]
    before = {row["seed"]: row["held_out_accuracy"] for row in found.pop(None)}
    for bits, rows in found.items():
        (size,) = {row["bytes"] for row in rows}
        worst = max(100 * (before[row["seed"]] - row["held_out_accuracy"]) for row in rows)
        accuracies = f"{cell(rows, 'held_out_accuracy_untuned')} | {cell(rows, 'held_out_accuracy')}"
        lines.append(f"| {bits} | {size:,} | {dense / size:.2f}x | {accuracies} | {max(worst, 0):.2f} |")
    return "\n".join(lines)


def class_table(document: Document, bits: int) -> str:
    """In Markdown: the held-out accuracy of every class, over all seeds, dense and with `bits`."""
    found = by_bits(document)
    key = "held_out_accuracy_by_class"
    rows = []
    for name, group in (("dense", found[None]), (f"{bits} bits, fine-tuned", found[bits])):
        means = [sum(values) / len(values) for values in zip(*(row[key] for row in group), strict=True)]
        rows.append(f"| {name} | {' | '.join(f'{mean:.1%}' for mean in means)} |")
    numbers = range(len(found[None][0][key]))
    return "\n".join([f"| digit | {' | '.join(map(str, numbers))} |", f"|---{'|---' * len(numbers)}|", *rows])


def picture(document: Document) -> bytes:
    """A PNG of size against held-out accuracy: means, with the lowest and the highest of the seeds."""
    found = by_bits(document)
    dense = found.pop(None)
    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    curve(axes, found, "held_out_accuracy_untuned", "shared", report.SIZE_STYLES[0])
    curve(axes, found, "held_out_accuracy", "shared, fine-tuned", report.SIZE_STYLES[1])
    values = [row["held_out_accuracy"] for row in dense]
    mean, size = sum(values) / len(values), dense[0]["bytes"]
    axes.axhline(mean, color="#000000", lw=0.8, ls="--")
    axes.errorbar(
        [size], [mean], [[mean - min(values)], [max(values) - mean]], fmt="k*", ms=11, capsize=3, label="dense"
    )
    for bits, rows in found.items():
        axes.text(rows[0]["bytes"], 0.98, str(bits), transform=axes.get_xaxis_transform(), ha="center", va="top")
    report.size_axes(axes)
    seeds = len(document["seeds"])
    axes.set_title(
        f"TwoBlockCNN on digits, {seeds} seeds: mean, lowest to highest, by bits a weight", fontsize="medium"
    )
    axes.legend(frameon=False, loc="lower right")
    return report.png(figure)


def curve(axes: Axes, found: dict[Any, list[Document]], key: str, label: str, style: tuple[str, str, str]) -> None:
    color, marker, line = style
    sizes = [rows[0]["bytes"] for rows in found.values()]
    runs = [[row[key] for row in rows] for rows in found.values()]
    axes.plot(sizes, [sum(run) / len(run) for run in runs], line, color=color, marker=marker, label=label)
    axes.fill_between(sizes, list(map(min, runs)), list(map(max, runs)), color=color, alpha=0.15, lw=0)


def main(argv: list[str] | None = None) -> int:
    made = parser(NAME, SUMMARY, epochs=DEFAULT_EPOCHS["digits"], what="dense ones", seeds=8)
    made.add_argument("--bits", type=int, action="append", choices=BITS, help="one number of bits (default: all)")
    args = made.parse_args(argv)
    bits = sorted(set(args.bits or BITS))
    return command(made, args, NAME, lambda file: record(args.seeds, args.epochs, bits, file), picture, table)


if __name__ == "__main__":
    raise SystemExit(main())
