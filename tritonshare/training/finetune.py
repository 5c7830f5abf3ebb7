"""The last step of `tritonshare train --shared-bits`: shares the trained weights, fine-tunes, and reports what was
lost.

The weights of every layer are shared as `tritonshare.compress` does it. Then Adam trains codebooks and biases and,
straight-through, the index tensors, which are assigned anew every few steps. Everything follows from the last dense
epoch and the seed: a run that was killed meanwhile begins this step again when it is resumed, and on the CPU ends at
the same bits.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch

from tritonshare import compress, files, optim
from tritonshare.compress import Report
from tritonshare.compress.files import content
from tritonshare.nn import SharedConv2d, SharedLinear
from tritonshare.training import report
from tritonshare.training.options import SHARED_CODEBOOKS, SHARED_REASSIGNED, Options
from tritonshare.training.report import Size
from tritonshare.training.run import SHARED, SIZES, Run, one_epoch

EVERY = range(1, 9)  # the numbers of bits in the picture of sizes


def shared_run(run: Run, bits: int, trained: int, codebooks: int = SHARED_CODEBOOKS) -> tuple[Run, Report]:
    """A run like `run`, after `trained` epochs, with shared weights and a new optimizer; and the report on sharing.

    Raises: ArgumentError where the model has no layer to share.
    """
    options = run.options
    tuned = copy.copy(run)
    tuned.model, shrinkage = compress.compress(run.model, bits, codebooks=codebooks, reassign_every=SHARED_REASSIGNED)
    tuned.optimizer = optim.Adam(tuned.model.parameters(), lr=options.shared_lr)
    tuned.scaler = torch.amp.GradScaler(run.device.type, enabled=options.dtype == "float16")
    tuned.rate = lambda epoch: cosine(options, epoch - trained)
    tuned.rate_option = "--shared-lr"
    return tuned, shrinkage


def cosine(options: Options, epoch: int) -> float:
    """The learning rate of fine-tuning's epoch 0, 1, ...: from --shared-lr down towards zero."""
    return options.shared_lr * (1 + math.cos(math.pi * epoch / options.shared_epochs)) / 2


def fine_tune(run: Run, bits: int, trained: int) -> tuple[Run, Report]:
    """Share the model of `run` after `trained` epochs and fine-tune it. Raises ArgumentError, TrainingError."""
    tuned, shrinkage = shared_run(run, bits, trained)
    print(f"{shrinkage}\n", flush=True)
    last = trained + run.options.shared_epochs
    for epoch in range(trained, last):
        one_epoch(tuned, epoch, last, "shared ")
    for module in tuned.model.modules():
        if isinstance(module, (SharedLinear, SharedConv2d)):
            module.fix_()
    return tuned, shrinkage


def sizes(run: Run, progress: Any = iter, codebooks: int = SHARED_CODEBOOKS) -> dict[int, Size]:
    """Bytes and held-out accuracy of the model with each number of bits, not fine-tuned."""
    by_bits = {}
    for bits in progress(EVERY):
        tuned, shrinkage = shared_run(run, bits, 0, codebooks)
        by_bits[bits] = Size(shrinkage.bytes_after, tuned.evaluate()[1])
    return by_bits


def by_class(run: Run) -> list[float]:
    """The held-out accuracy of every class; nan where no image is held out."""
    right = run.right()
    classes = range(run.model_config["num_classes"])
    return [right[run.held_out_labels == number].double().mean().item() for number in classes]


def finish(run: Run, trained: int, bits: int) -> tuple[float, float]:
    """Run the whole step after `trained` epochs: print, and write files. Returns the accuracies, dense and shared.

    Raises: ArgumentError, TrainingError, OSError.
    """
    options = run.options
    dense, per_class = run.evaluate()[1], by_class(run)
    drawn = sizes(run)
    print(f"\nweights shared, {bits} bits each", flush=True)
    tuned, shrinkage = fine_tune(run, bits, trained)
    accuracy, per_class_after = tuned.evaluate()[1], by_class(tuned)
    about = tuned.model_metadata | {"held_out_accuracy": accuracy, "held_out_accuracy_dense": dense}
    points = {"not fine-tuned": drawn, "fine-tuned": {bits: Size(shrinkage.bytes_after, accuracy)}}
    title = f"TwoBlockCNN on {options.data}, seed {options.seed}"
    picture = report.draw_sizes(points, Size(shrinkage.bytes_before, dense), title)
    files.replace({options.folder / SHARED: content(tuned.model, about), options.folder / SIZES: picture})
    counts = torch.bincount(run.held_out_labels.cpu(), minlength=len(per_class)).tolist()
    print(f"\n{class_table(per_class, per_class_after, counts)}\n")
    rows = {
        "shared weights": f"{bits} bits, up to {SHARED_CODEBOOKS} codebooks a layer; fine-tuned "
        f"for {options.shared_epochs} epochs, Adam, lr {options.shared_lr:g}",
        "held-out accuracy": f"{dense:.2%} dense, {drawn[bits].accuracy:.2%} shared, {accuracy:.2%} fine-tuned "
        f"({100 * (accuracy - dense):+.2f} points)",
        "bytes of weights": f"{shrinkage.bytes_before:,} dense, {shrinkage.bytes_after:,} shared: "
        f"{shrinkage.bytes_before / shrinkage.bytes_after:.2f}x smaller",
        "also written": f"{SHARED} and {SIZES} in {options.folder}",
    }
    print(report.table(rows))
    return dense, accuracy


def class_table(before: Iterable[float], after: Iterable[float], counts: Iterable[int]) -> str:
    """A table of held-out accuracy by class, dense and shared, with the difference in points."""
    lines = ["class  images    dense   shared  points"]
    for number, (dense, shared, count) in enumerate(zip(before, after, counts, strict=True)):
        lines.append(f"{number:>5}  {count:>6}  {dense:7.2%}  {shared:7.2%}  {100 * (shared - dense):+6.2f}")
    return "\n".join(lines)
