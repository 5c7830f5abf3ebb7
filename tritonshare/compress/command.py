"""`tritonshare compress`: a file of weights becomes a smaller one that `tritonshare.compress.load` reads."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import FORMAT, save
from .report import Report
from .share import compress

SHARED_RANKS = {2: nn.Linear, 4: nn.Conv2d}  # of tensors called *.weight


class Other(nn.Module):
    """What is no layer whose weight could be shared."""


class CommandError(ValueError):
    """The command cannot do what it is asked for; nothing was written."""


class Known:
    """A model of `tritonshare train`, by the metadata of its file."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        from ..train import TwoBlockCNN

        config = metadata.get("config")
        self.path, self.metadata = path, metadata
        self.config = (
            config["model"] if config else {k: metadata[k] for k in ("in_channels", "image_size", "num_classes")}
        )
        self.data = config["data"] if config else metadata["data"]
        self.dtype = config["dtype"] if config else "float32"
        self.model = TwoBlockCNN(**self.config)
        self.model.load_state_dict(tensors)

    def run(self, data_dir: Path | None, device: torch.device) -> Any:
        """A run of the trainer, to evaluate with; None where there are no images. Raises CommandError, DataError."""
        from .. import data
        from ..options import Options
        from ..train import Run

        if self.data == "cifar10" and data_dir is None:
            return None
        images = data.load(self.data, data_dir)
        run = Run(Options(data=self.data, dtype=self.dtype), images, device)
        same = {"data_sha256": images.digest()} if "config" in self.metadata else {"mean": run.model_metadata["mean"]}
        seen = self.metadata.get("config", self.metadata)
        if run.model_config != self.config or any(seen.get(key) != value for key, value in same.items()):
            raise CommandError(f"{self.path} was trained on other images than these")
        run.model = copy.deepcopy(self.model).to(device).to(memory_format=run.layout)  # pyright: ignore[reportCallIssue]
        return run


def main(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises CommandError and what `compress`, `data.load` and writing raise."""
    from tqdm import tqdm

    from .. import checkpoint, finetune, report
    from ..train import choose_device

    picture = args.out.with_suffix(".png")
    refuse(args.checkpoint, args.out, picture, args.force)
    device = choose_device(args.device)
    found, tensors = opened(args.checkpoint)
    run = found.run(args.data_dir, device) if found else None

    def bar(items: Any) -> Any:
        return tqdm(items, leave=False, disable=None)

    limits = {"target_bytes": args.target_bytes, "max_error": args.max_error}
    bits = 4 if args.bits is None else args.bits
    model = found.model if found else skeleton(tensors)
    small, shrinkage = compress(model, bits, codebooks=args.codebooks, progress=bar, **limits)
    about = {key: value for key, value in found.metadata.items() if key in _ABOUT} if found else {}
    if run is not None:
        about = run.model_metadata
    save(small, args.out, about)
    print(f"{shrinkage}\n")
    rows = {"bytes of weights": f"{shrinkage.bytes_before:,}, now {shrinkage.bytes_after:,}", "written": f"{args.out}"}
    if run is not None:
        dense, curve = run.evaluate()[1], finetune.sizes(run, bar, args.codebooks)
        run.model = small.to(device)
        chosen = report.Size(shrinkage.bytes_after, run.evaluate()[1])
        curves = {"the same bits in all layers": curve, "this model": {_label(shrinkage): chosen}}
        title = f"{args.checkpoint.name}, {found.data}" if found else ""
        drawn = report.draw_sizes(curves, report.Size(shrinkage.bytes_before, dense), title)
        checkpoint.write_atomically(picture, drawn)
        rows = {"held-out accuracy": f"{dense:.2%}, now {chosen.accuracy:.2%}"} | rows
        rows["written"] += f" and {picture}"
    elif found:
        rows["no picture"] = f"the images of {found.data} are needed for accuracies: give --data-dir"
    print(report.table(rows))


_ABOUT = ("data", "in_channels", "image_size", "num_classes", "mean", "std")


def _label(shrinkage: Report) -> str:
    numbers = sorted(set(shrinkage.bits.values()))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def refuse(source: Path, out: Path, picture: Path, force: bool) -> None:
    """Raise CommandError where writing would lose something."""
    if out.suffix == ".png":
        raise CommandError(f"--out {out} is the name of a picture: give one that ends with .safetensors")
    if not out.parent.is_dir():
        raise CommandError(f"there is no folder {out.parent}")
    for path in (out, picture):
        if path.exists() and source.exists() and path.samefile(source):
            raise CommandError(f"--out {out} would overwrite {source}")
        if path.is_dir():
            raise CommandError(f"{path} is a folder")
        if path.exists() and not force:
            raise CommandError(f"there is {path} already: choose another --out, or --force it")


def opened(path: Path) -> tuple[Known | None, dict[str, Tensor]]:
    """The model of `tritonshare train`, if the file has one, and the tensors. Raises CommandError, CheckpointError."""
    from safetensors import SafetensorError, safe_open

    from .. import checkpoint

    if not path.is_file():
        raise CommandError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _metadata(file.metadata(), checkpoint.METADATA_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no dict)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CommandError(f"{path} is not a whole safetensors file") from error
    if metadata.get("format") == FORMAT:
        raise CommandError(f"{path} has shared weights already")
    config = "config" in metadata
    if config:  # with a checksum
        tensors, metadata = checkpoint.read(path)
        tensors = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    try:
        known = config or {"in_channels", "image_size", "num_classes", "data"} <= metadata.keys()
        return Known(path, tensors, metadata) if known else None, tensors
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CommandError(f"{path} does not hold the model that it says it does") from error


def _metadata(entries: dict[str, str] | None, key: str) -> dict[str, Any]:
    try:
        found = json.loads((entries or {})[key])
    except (KeyError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def skeleton(tensors: dict[str, Tensor]) -> nn.Module:
    """A module whose state_dict is `tensors`: those called *.weight, of 2 or 4 axes and floating-point, are layers'.

    Nothing else is known of the layers, which are good for sharing only. Raises CommandError.
    """
    owned: dict[str, dict[str, Tensor]] = {"": {}}
    for key, tensor in tensors.items():
        *path, last = key.split(".")
        for depth in range(1, len(path) + 1):
            owned.setdefault(".".join(path[:depth]), {})
        owned[".".join(path)][last] = tensor
    modules: dict[str, nn.Module] = {}
    for name, own in owned.items():  # what is outside comes before what is inside
        made = modules[name] = _layer(own)
        for key, tensor in own.items():
            if key in made._parameters:
                made._parameters[key] = nn.Parameter(tensor, requires_grad=False)
            else:
                made._buffers[key] = tensor
        if name:
            parent, _, last = name.rpartition(".")
            if last in owned[parent]:
                raise CommandError(f"the file has both a tensor {name} and tensors inside of {name}")
            modules[parent]._modules[last] = made
    return modules[""]


def _layer(own: dict[str, Tensor]) -> nn.Module:
    weight, bias = own.get("weight"), own.get("bias")
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
