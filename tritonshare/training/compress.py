"""`tritonshare compress`: a file of weights becomes a smaller one that `tritonshare.compress.load` reads."""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tritonshare import checkpoint, records
from tritonshare.compress.files import MODEL, content
from tritonshare.compress.report import Report
from tritonshare.compress.share import compress
from tritonshare.files import Busy, FileError, held, lock_of, replace, sentence
from tritonshare.training import data, finetune, report
from tritonshare.training.options import DEFAULT_EPOCHS, DTYPES, Options
from tritonshare.training.run import Run, TwoBlockCNN, choose_device

DEEPEST = 64  # how many names of modules may lie within each other
SHARED_RANKS = {2: nn.Linear, 4: nn.Conv2d}  # by the number of axes of a tensor called *.weight


class Other(nn.Module):
    """A module that is no layer whose weight could be shared."""


class CommandError(ValueError):
    """The command cannot do what it is asked to; nothing was written. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


SIZE = records.whole(1, 2**16)
DATA = records.choice(DEFAULT_EPOCHS)
DTYPE = records.choice(DTYPES)


@dataclass(frozen=True)
class Config:
    """What a file says about the model of `tritonshare train` in it."""

    in_channels: Annotated[int, SIZE]
    image_size: Annotated[int, records.whole(4, 2**16)]
    num_classes: Annotated[int, SIZE]
    data: Annotated[str, DATA]
    dtype: Annotated[str, DTYPE]


class Known:
    """A model of `tritonshare train`, rebuilt from the metadata of its file."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        config = metadata.get("config", metadata)
        if not isinstance(config, dict) or not isinstance(config.get("model", {}), dict):
            raise FileError("has a config that is no record")
        fields = {"dtype": "float32"} | config | config.get("model", {})
        fields = {key: fields[key] for key in records.schema(Config) if key in fields}
        known: Config = records.read_record(Config, fields, "config")
        self.data, self.dtype = known.data, known.dtype
        self.config = {key: getattr(known, key) for key in ("in_channels", "image_size", "num_classes")}
        with torch.device("meta"):  # a file's sizes must not make us take memory
            self.model = TwoBlockCNN(**self.config)
        self.model.load_state_dict(tensors, assign=True)
        if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
            raise FileError("holds a model of the trainer that is not float32")

    def run(self, data_dir: Path | None, device: torch.device) -> Any:
        """A run of the trainer, to evaluate with; None where there are no images. Raises CommandError, DataError."""
        if self.data == "cifar10" and data_dir is None:
            return None
        images = data.load(self.data, data_dir)
        run = Run(Options(data=self.data, dtype=self.dtype), images, device)
        same = {"data_sha256": images.digest()} if "config" in self.metadata else {"mean": run.model_metadata["mean"]}
        config = self.metadata.get("config", self.metadata)  # a record, by now
        if run.model_config != self.config or any(config.get(key) != value for key, value in same.items()):
            raise CommandError(f"{self.path} was trained on other images than these")
        run.model = copy.deepcopy(self.model).to(device).to(memory_format=run.layout)  # pyright: ignore[reportCallIssue]
        return run


def main(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises CommandError and what `compress`, `data.load` and writing raise."""
    if not args.out.name or args.out.suffix == ".png":
        raise CommandError(f"--out {args.out} is no name for the file: give one that ends with .safetensors")
    if not args.out.parent.is_dir():
        raise CommandError(f"there is no folder {args.out.parent}")
    picture = args.out.with_suffix(".png")
    refuse(args.checkpoint, args.out, picture, args.force)
    device = choose_device(args.device)
    try:
        with held(lock_of(args.out), f"--out {args.out}"):
            refuse(args.checkpoint, args.out, picture, args.force)  # another process may have written it since
            made, shown = results(args, picture, device)
            replace(made)
    except Busy as error:
        raise CommandError(str(error)) from error
    print(shown)


def results(args: argparse.Namespace, picture: Path, device: torch.device) -> tuple[dict[Path, bytes], str]:
    """The files to write, and the text to print."""
    known, tensors = opened(args.checkpoint)
    run = known.run(args.data_dir, device) if known else None

    def bar(items: Any) -> Any:
        return tqdm(items, leave=False, disable=None)

    limits = {"target_bytes": args.target_bytes, "max_error": args.max_error}
    bits = 4 if args.bits is None else args.bits
    model = known.model if known else skeleton(tensors)
    small, shrinkage = compress(model, bits, codebooks=args.codebooks, progress=bar, **limits)
    about = {key: value for key, value in known.metadata.items() if key in _ABOUT} if known else {}
    if run is not None:
        about = run.model_metadata
    made = {args.out: content(small, about)}
    rows = {"bytes of weights": f"{shrinkage.bytes_before:,}, now {shrinkage.bytes_after:,}", "written": f"{args.out}"}
    if run is not None:
        dense, curve = run.evaluate()[1], finetune.sizes(run, bar, args.codebooks)
        run.model = small.to(device)
        chosen = report.Size(shrinkage.bytes_after, run.evaluate()[1])
        curves = {"the same bits in all layers": curve, "this model": {_label(shrinkage): chosen}}
        title = f"{args.checkpoint.name}, {known.data}" if known else ""
        made[picture] = report.draw_sizes(curves, report.Size(shrinkage.bytes_before, dense), title)
        rows = {"held-out accuracy": f"{dense:.2%}, now {chosen.accuracy:.2%}"} | rows
        rows["written"] += f" and {picture}"
    elif known:
        rows["no picture"] = f"the images of {known.data} are needed for accuracies: give --data-dir"
    return made, f"{shrinkage}\n\n{report.table(rows)}"


_ABOUT = ("data", "in_channels", "image_size", "num_classes", "mean", "std")


def _label(shrinkage: Report) -> str:
    numbers = sorted(set(shrinkage.bits.values()))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def refuse(source: Path, out: Path, picture: Path, force: bool) -> None:
    """Raise CommandError where writing would lose something."""
    for path in (out, picture):
        if path.exists() and source.exists() and path.samefile(source):
            raise CommandError(f"--out {out} would overwrite {source}")
        if path.exists() and not path.is_file():
            raise CommandError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}")
        if os.path.lexists(path) and not force:
            raise CommandError(f"there is {path} already: choose another --out, or --force it")


def opened(path: Path) -> tuple[Known | None, dict[str, Tensor]]:
    """The model of `tritonshare train`, if the file has one, and the tensors. Raises CommandError, CheckpointError."""
    try:
        with checkpoint.opened(path) as file:
            metadata = file.metadata
            if metadata.get("format") == MODEL.name:
                raise CommandError(f"{path} has shared weights already")
            tensors = {} if "config" in metadata else file.tensors()
        if "config" in metadata:  # with a checksum
            tensors, metadata = checkpoint.read(path)
            tensors = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
        known = "config" in metadata or {"in_channels", "image_size", "num_classes", "data"} <= metadata.keys()
        return Known(path, tensors, metadata) if known else None, tensors
    except FileNotFoundError as error:
        raise CommandError(f"there is no file {path}") from error
    except FileError as error:
        raise CommandError(f"{path} {error}") from error
    except RuntimeError as error:  # tensors of other shapes
        raise CommandError(f"{path} does not hold the model that it says it does") from error


def skeleton(tensors: dict[str, Tensor]) -> nn.Module:
    """A module whose state_dict is `tensors`: those called *.weight, of 2 or 4 axes and floating-point, are layers'.

    Nothing else is known about the layers, so they can be shared but not run. Raises CommandError.
    """
    by_module: dict[str, dict[str, Tensor]] = {"": {}}
    for key, tensor in tensors.items():
        *path, last = key.split(".")
        if not (all(path) and last and len(path) < DEEPEST):
            raise CommandError(f"the file has a tensor that no layer can hold, by its name {key!r:.80}")
        for depth in range(1, len(path) + 1):
            by_module.setdefault(".".join(path[:depth]), {})
        by_module[".".join(path)][last] = tensor
    modules: dict[str, nn.Module] = {}
    for name, of_module in by_module.items():  # outer modules come before inner ones
        made = modules[name] = _layer(of_module)
        for key, tensor in of_module.items():
            if key in made._parameters:
                made._parameters[key] = nn.Parameter(tensor, requires_grad=False)
            else:
                made._buffers[key] = tensor
        if name:
            parent, _, last = name.rpartition(".")
            if last in by_module[parent]:
                raise CommandError(f"the file has both a tensor {name:.80} and tensors inside of {name:.80}")
            modules[parent]._modules[last] = made
    return modules[""]


def _layer(tensors: dict[str, Tensor]) -> nn.Module:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.dim() not in SHARED_RANKS or not weight.is_floating_point() or not weight.numel():
        return Other()
    out, into, *kernel = weight.shape
    sizes: Any = (into, out, tuple(kernel)) if kernel else (into, out)
    made = SHARED_RANKS[weight.dim()](*sizes, device="meta")
    if bias is None:
        made.bias = None
    elif bias.shape != (out,) or bias.dtype != weight.dtype:
        del made.bias
    return made
