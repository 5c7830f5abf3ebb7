"""One safetensors file that holds a whole training run, replaced in one go; nothing is unpickled.

The file keeps the model's tensors as `model.<key>`, the optimizer's as `optimizer.<parameter index>.<state name>`, and
everything else as JSON under one metadata key. A reader sees the previous file or the new one, never half of each.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

RUN = "checkpoint of tritonshare train"
METADATA_KEY = "tritonshare"  # a single key: safetensors writes several in an order that changes from run to run


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to a run with other options."""


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a crash at any moment leaves the old file or the new one, whole.

    The temporary file has a fixed name: what a killed run leaves behind is overwritten by the next write.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name itself must reach the disk; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def tensors_to_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> bytes:
    """A safetensors file of `tensors` and JSON-able `metadata`: equal inputs give equal bytes, whatever the device."""
    # safetensors refuses channels_last tensors, hence contiguous().
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    return to_safetensors(plain, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def save(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, metadata: dict[str, Any]) -> None:
    """Write model, optimizer state and `metadata` (JSON-able) to `path` atomically. Raises OSError."""
    tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    write(path, tensors, metadata)


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write `tensors` and `metadata` (JSON-able) to `path` atomically, with their checksum. Raises OSError."""
    write_atomically(path, tensors_to_bytes(tensors, metadata | {"sha256": _digest(tensors, metadata)}))


def read(path: Path, kind: str = RUN) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of the file at `path`, which `write` made. Raises CheckpointError if missing or damaged.

    `kind` says what the file should be, for the message.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {kind} {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no dict)
        intact = metadata.pop("sha256") == _digest(tensors, metadata)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a complete {kind}") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its tensors do not match their checksum")
    return tensors, metadata


def restore(path: Path, tensors: dict[str, torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """Copy `tensors`, read from `path`, into `model` and `optimizer`, on each parameter's device and in its layout.

    Raises:
        CheckpointError: the tensors do not fit the model.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights: dict[str, torch.Tensor] = {}
    state: dict[int, dict[str, torch.Tensor]] = {}
    try:
        for key, tensor in tensors.items():
            kind, name = key.split(".", 1)
            if kind == "model":
                weights[name] = tensor
                continue
            index, name = name.split(".", 1)
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:  # not so for the count of steps, which torch keeps on the CPU
                tensor = torch.empty_like(parameter).copy_(tensor)
            state.setdefault(int(index), {})[name] = tensor
        model.load_state_dict(weights)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    except (RuntimeError, ValueError, LookupError) as error:
        raise CheckpointError(f"the tensors in {path} do not fit this model") from error


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> str:
    """SHA-256 over the metadata and over the names, dtypes, shapes and contents of the tensors."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
