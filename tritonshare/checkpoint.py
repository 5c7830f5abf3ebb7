"""Safetensors files with a checksum and a format number, for training runs and for models. Nothing is unpickled.

A run's file keeps the model's tensors as `model.<key>`, the optimizer's as `optimizer.<parameter index>.<state name>`,
and everything else as JSON under one metadata key. A reader sees the whole old file or the whole new one.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import save as to_safetensors

from tritonshare import files
from tritonshare.files import FileError, Form, sentence

METADATA_KEY = "tritonshare"  # a single key: safetensors writes several in an order that changes from run to run
MAX_HEADER = 4 * 2**20  # bytes: some 40,000 tensors
CODES = {  # what safetensors calls torch's dtypes
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
NOT_WHOLE = "is not a whole safetensors file"


RUN = Form("checkpoint of tritonshare train", "tritonshare.train", 1, "config")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to a run with other options. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


def tensors_to_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> bytes:
    """A safetensors file with `tensors` and JSON-able `metadata`. Equal inputs give equal bytes, whatever the device.

    Raises: ValueError for a name or dtype that a file cannot hold, and for a header larger than what is read again.
    """
    plain: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if key == "__metadata__" or not _is_unicode(key):
            raise ValueError(f"a file cannot hold a tensor of the name {key!r:.80}")
        # safetensors refuses channels_last tensors, hence contiguous(), and tensors that share memory
        own = tensor.detach().cpu().contiguous()
        plain[key] = own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
    owners: dict[int, str] = {}
    for key, tensor in plain.items():
        if tensor.numel() and owners.setdefault(tensor.data_ptr(), key) != key:
            plain[key] = tensor.clone()
    try:
        content = to_safetensors(plain, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    except KeyError as error:
        raise ValueError(f"a file cannot hold tensors of {error}") from error
    if int.from_bytes(content[:8], "little") > MAX_HEADER:
        raise ValueError(f"names and metadata of {len(plain):,} tensors are more than a file's header can hold")
    return content


def _is_unicode(text: str) -> bool:
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def content(tensors: dict[str, torch.Tensor], metadata: dict[str, Any], form: Form = RUN) -> bytes:
    """A file in the format `form`, for `read`: tensors, metadata (JSON-able), format number and checksum."""
    metadata = metadata | {"format": form.name, "version": form.version}
    return tensors_to_bytes(tensors, metadata | {"sha256": _digest(tensors, metadata)})


def of_run(model: torch.nn.Module, optimizer: torch.optim.Optimizer, metadata: dict[str, Any]) -> bytes:
    """The file of a run: model, optimizer state and `metadata` (JSON-able)."""
    tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    return content(tensors | _named(optimizer.state_dict()["state"]), metadata)


def _named(states: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"optimizer.{index}.{name}": value for index, state in states.items() for name, value in state.items()}


def memory() -> int:
    """Bytes of this machine's memory. Files that do not fit into it are not read."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**40


class Opened:
    """A safetensors file whose header was read and is right. Tensors are read when they are asked for.

    This library reads it itself, because safetensors takes a path (which may not be Unicode, or lead to another file by
    now) and maps the file (the process dies if the file gets shorter).

    metadata: what this library wrote about the file; {} if another program wrote the file.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise FileError(NOT_WHOLE)
        if length > MAX_HEADER:
            raise FileError(f"has a header of {length:,} bytes, but at most {MAX_HEADER:,} are read")
        try:
            header = files.parse(file.read(length))
        except FileError as error:
            raise FileError(f"{NOT_WHOLE}: its header {error}") from error
        if not isinstance(header, dict):
            raise FileError(NOT_WHOLE)
        self._file = file
        self.metadata = _metadata(header.pop("__metadata__", None))
        self._entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda entry: entry.begin)
        ends = [0, *(entry.end for entry in self._entries)]
        if [entry.begin for entry in self._entries] != ends[:-1] or ends[-1] != size - 8 - length:
            raise FileError(NOT_WHOLE)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {}
        for entry in self._entries:
            content = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
            memory: Any = content.numpy()  # Python before 3.12 has no type for what a memoryview is made of
            if self._file.readinto(memoryview(memory)) != len(content):  # pyright: ignore[reportAttributeAccessIssue]
                raise FileError("becomes shorter while it is read")
            found[entry.name] = content.view(entry.dtype).view(entry.shape)
        return found


class Entry(NamedTuple):
    """A tensor in a file, and where its bytes are."""

    name: str
    dtype: torch.dtype
    shape: list[int]  # torch's; an element of it may be a pair of four-bit numbers
    begin: int
    end: int


def _entry(name: str, entry: Any) -> Entry:
    """Check what a header says about a tensor. Raises FileError."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(NOT_WHOLE)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(code, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise FileError(NOT_WHOLE)
    if any(type(number) is not int or not 0 <= number < 2**63 for number in (*shape, *offsets)) or len(shape) > 64:
        raise FileError(NOT_WHOLE)
    dtype = getattr(torch, CODES.get(code, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise FileError(f"has the tensor {name:.80} of {code:.20}, which this torch does not know")
    if code == "F4" and shape:
        shape = [*shape[:-1], shape[-1] // 2]
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0] or math.prod(n or 1 for n in shape) >= 2**63:
        raise FileError(NOT_WHOLE)
    return Entry(name, dtype, shape, *offsets)


def _metadata(entries: Any) -> dict[str, Any]:
    text = entries.get(METADATA_KEY) if isinstance(entries, dict) else None
    try:
        metadata = files.parse(text) if isinstance(text, str) else {}
    except FileError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


@contextmanager
def opened(path: Path, most: int | None = None) -> Iterator[Opened]:
    """The safetensors file at `path`, with at most `most` bytes of tensors (None: what fits into memory). Raises
    FileNotFoundError, FileError."""
    with files.opened(path, 8 + MAX_HEADER + (memory() if most is None else most)) as (file, size):
        yield Opened(file, size)


def read(path: Path, form: Form = RUN, most: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of the file at `path`, opened as by `opened`. Raises CheckpointError if it is missing,
    damaged, or not of the format `form`.
    """
    try:
        with opened(path, most) as file:
            metadata = file.metadata
            _check_form(form, metadata)
            checksum = metadata.pop("sha256", None)
            tensors = file.tensors()
        if checksum != _digest(tensors, metadata):
            raise FileError("is damaged: its tensors do not match their checksum")
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {form.kind} {path}") from error
    except FileError as error:
        raise CheckpointError(f"{path} {error}") from error
    return tensors, {key: value for key, value in metadata.items() if key not in ("format", "version")}


def _check_form(form: Form, metadata: dict[str, Any]) -> None:
    if "format" not in metadata and form.unmarked and form.unmarked in metadata:
        return
    version = metadata.get("version")
    if metadata.get("format") != form.name or type(version) is not int or version < 1:
        raise FileError(f"is not a {form.kind}")
    if version > form.version:
        raise FileError(
            f"has version {version} of its format, but this tritonshare reads up to version {form.version}"
        )


def restore(
    path: Path,
    tensors: dict[str, torch.Tensor],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int | None = None,
    *,
    unstepped: bool = False,
) -> None:
    """Copy `tensors`, read from `path`, into `model` and `optimizer`, on each parameter's device and in its layout.

    steps: how many steps may have been taken at most. unstepped: whether it may have been none.

    Raises:
        CheckpointError: the tensors do not fit the model, or training cannot have left them. Nothing is changed then.
    """
    weights = model.state_dict()
    states = _named(_states_of(model, optimizer))
    none = unstepped and not any(key.startswith("optimizer.") for key in tensors)
    try:
        _check(tensors, {f"model.{key}": tensor for key, tensor in weights.items()} | ({} if none else states))
        for key, tensor in tensors.items():
            _check_values(key, tensor, steps)
    except FileError as error:
        raise CheckpointError(f"the tensors in {path} do not fit this model: {error}") from error
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key in () if none else states:
        _, index, name = key.split(".", 2)
        tensor, parameter = tensors[key], parameters[int(index)]
        if tensor.shape == parameter.shape:  # not so for the count of steps, which torch keeps on the CPU
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[name] = tensor
    model.load_state_dict({key: tensors[f"model.{key}"] for key in weights})
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _states_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, torch.Tensor]]:
    """The states that the optimizer keeps, by parameter index, taken from a copy that has made a step."""
    _, trial = copy.deepcopy((model, optimizer))
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trial.step()
    return trial.state_dict()["state"]


def _check(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raise FileError unless tensors have the names, shapes and dtypes of those that are wanted."""
    for keys, what in ((wanted.keys() - tensors.keys(), "no"), (tensors.keys() - wanted.keys(), "an unknown")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise FileError(f"there is {what} {min(keys):.80}{more}")
    for key, value in wanted.items():
        found = tensors[key]
        if found.shape != value.shape or found.dtype != value.dtype:
            are, should = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (found, value))
            raise FileError(f"{key:.80} is {are:.80}, not {should}")


def _check_values(key: str, tensor: torch.Tensor, steps: int | None) -> None:
    """Raise FileError for values that no step can leave behind."""
    name, weights = key.rsplit(".", 1)[-1], key.startswith("model.")
    if name == "step":
        count = tensor.item()
        if not (1 <= count <= (steps or 2**53) and count % 1 == 0):
            raise FileError(f"{key} is {count}, which is no count of the steps taken")
    elif tensor.isnan().any() or (weights and not tensor.isfinite().all()):
        raise FileError(f"{key} has values that are not finite")
    elif name.endswith("_sq") and (tensor < 0).any():
        raise FileError(f"{key} has squares below 0")


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> str:
    """SHA-256 over the metadata and over the names, dtypes, shapes and contents of the tensors."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode("utf-8", "backslashreplace"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
