"""`tritonshare train`: a run from start to end, in a folder that no other run uses, and the closing table."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tritonshare import checkpoint, files, launch
from tritonshare.files import sentence
from tritonshare.training import data, finetune, report
from tritonshare.training.options import DEFAULT_EPOCHS, OPTIMIZERS, OptionError, Options
from tritonshare.training.report import Epoch
from tritonshare.training.run import (
    CHECKPOINT,
    CURVES,
    MODEL,
    SHARED,
    SIZES,
    Run,
    choose_device,
    one_epoch,
    threads_for,
)

LOCK = ".lock"  # exists while a run goes on


def train(options: Options) -> list[Epoch]:
    """Train as `options` say, printing a line per epoch and a closing table; returns the epochs, resumed ones included.

    The folder gets checkpoint.safetensors (everything a resumed run needs), model.safetensors (the weights, under the
    keys of `TwoBlockCNN.state_dict()`) after every epoch, and curves.png at the end. With `shared_bits` follow
    shared.safetensors, for `tritonshare.compress.load`, and sizes.png, from the last epoch: see
    tritonshare.training.finetune.

    Raises:
        OptionError, DataError, CheckpointError: before anything is written.
        TrainingError: the loss is not finite; the files of the last complete epoch stay.
        OSError: a file cannot be written.
    """
    check_folder(options)
    device = choose_device(options.device)
    images = data.load(options.data, options.data_dir)
    with threads_for(options, images, device), sole(options.folder):
        check_folder(options)  # another run may have been here since
        return train_on(images, options, device)


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Make the folder. Within the block no other run works in it, and files can be made there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with files.held(folder / LOCK, f"--out {folder}"):
            yield
    except files.Busy as error:
        raise OptionError(str(error)) from error


def train_on(images: data.ImageSet, options: Options, device: torch.device) -> list[Epoch]:
    """`train`, once the images are loaded, the device is chosen and the folder is locked."""
    began, folder = time.perf_counter(), options.folder
    epochs = options.epochs or DEFAULT_EPOCHS[options.data]
    run = Run(options, images, device)
    history = run.resume() if options.resume else []
    if len(history) > epochs:
        raise OptionError(f"{folder / CHECKPOINT} has {len(history)} epochs already, more than --epochs {epochs}")
    if history:
        files.replace({folder / MODEL: run.exported()})
        print(sentence(f"resumed after epoch {len(history)} from {folder / CHECKPOINT}", report.LINE), flush=True)
    if options.dtype == "float16" and device.type == "cpu":
        print("float16 is slow on a CPU, whose float32 and bfloat16 are not: an epoch may take minutes", flush=True)
    if options.dtype == "bfloat16" and device.type == "cpu":
        print(f"bfloat16 on this CPU: {launch.cpu_bfloat16()[1]}", flush=True)

    def keep(epoch: Epoch) -> None:
        history.append(epoch)
        run.save(history)

    for epoch in range(len(history), epochs):
        one_epoch(run, epoch, epochs, keep=keep)
    title = f"TwoBlockCNN on {options.data}, {options.dtype}, seed {options.seed}"
    files.replace({folder / CURVES: report.draw_curves(history, title)})
    print(f"\n{report.table(facts(run, history, time.perf_counter() - began))}", flush=True)
    if options.shared_bits is not None:
        finetune.finish(run, len(history), options.shared_bits)
    return history


def facts(run: Run, history: list[Epoch], seconds: float) -> dict[str, str]:
    """The rows of the closing table; `seconds` is the wall-clock time of this call."""
    options, count = run.options, len(run.train_labels)
    best = max(history, key=lambda epoch: epoch.held_out_accuracy)
    shape = "x".join(str(size) for size in run.train_images.shape[1:])
    return {
        "data": f"{options.data}: {count:,} training and {len(run.held_out_labels):,} held-out images of {shape}",
        "epochs": f"{len(history)}, batch size {options.batch_size}, seed {options.seed}",
        "optimizer": f"{OPTIMIZERS[options.optimizer]}, lr {options.learning_rate:g}, similarity {options.similarity}",
        "training loss": f"{history[-1].loss:.4f}",
        "held-out accuracy": f"{history[-1].held_out_accuracy:.2%} (highest: {best.held_out_accuracy:.2%} in epoch "
        f"{history.index(best) + 1})",
        "training speed": f"{count * len(history) / sum(epoch.seconds for epoch in history):,.0f} images/s",
        "time": f"{seconds:.1f} s",
        "parameters": f"{sum(parameter.numel() for parameter in run.model.parameters()):,}",
        "path": run.path(),
        "written": f"{MODEL}, {CHECKPOINT} and {CURVES} in {options.folder}",
    }


def check_folder(options: Options) -> None:
    """Refuse a folder that holds another run, unless it is to be resumed. Raises OptionError, CheckpointError."""
    folder = options.folder
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--out {folder} is not a folder")
    present = [name for name in (CHECKPOINT, MODEL, CURVES, SHARED, SIZES) if os.path.lexists(folder / name)]
    if present and not options.resume:
        raise OptionError(f"{folder} already holds {present[0]}: choose another --out, or continue it with --resume")
    if options.resume and CHECKPOINT not in present:
        raise checkpoint.CheckpointError(f"there is no {folder / CHECKPOINT} to resume from")
    for path in (folder / name for name in present):
        if path.exists() and not path.is_file():
            raise OptionError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}")
    if options.shared_bits is None and SHARED in present:
        raise OptionError(f"{folder} holds {SHARED}, which would be left behind: give --shared-bits, too")
