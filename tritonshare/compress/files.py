"""Small models as files: safetensors with packed indices as they are, checksum and version; nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..check import ArgumentError, ArgumentTypeError
from ..files import Form
from ..files import replace as replace_files
from ..nn import SharedConv2d, SharedLinear
from .filters import RULES, Ties, ties_of
from .layers import DENSE, SHARED, in_no_memory, label, modules_by_name, replace

MODEL = Form("model of tritonshare.compress", "tritonshare.compress", 1)
SMALL = 64 * 2**20  # bytes: a file of another model gets so far that the refusal can say what differs
TIES = "parametrizations.weight."
Tensors = dict[str, Tensor]


def save(model: nn.Module, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
    """Write a compressed model to `path`: all of its state_dict, the indices packed, tensors in common once.

    A file at `path` is replaced in one go: a crash leaves the old one or the new one, whole. A dense weight that is
    trained behind a shared layer (`latent`) is not written: what the layer computes is. Needs safetensors.

    Args:
        model: with shared layers or tied filters, or without.
        about: JSON-able, kept beside the tensors under "about".

    Raises: ArgumentError for a state that a file cannot hold; OSError.
    """
    replace_files({Path(path): content(model, about)})


def content(model: nn.Module, about: Mapping[str, Any] | None = None) -> bytes:
    """The file that `save` writes. Raises ArgumentError, ArgumentTypeError."""
    from .. import checkpoint

    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"save: model must be a torch.nn.Module, but is {type(model).__name__}")
    layers = {name: _described(module) for name, module in modules_by_name(model, _described).items()}
    tensors: Tensors = {}
    same: dict[str, str] = {}
    first: dict[Any, str] = {}
    for key, tensor in _state("save", model).items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else key
        if first.setdefault(place, key) == key:
            tensors[key] = tensor
        else:
            same[key] = first[place]
    metadata = {"layers": layers, "same": same, "about": dict(about or {})}
    try:
        return checkpoint.content(tensors, metadata, MODEL)
    except ValueError as error:
        raise ArgumentError(f"save: {error}") from error


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Put what `save` wrote into `model`, to the same bits, and return it.

    The layers that are shared in the file may be plain in `model` (as the code that made the model makes them): they
    are then replaced by shared ones. If `model` itself is such a layer the returned one is new. A weight that is shared
    in the file but belongs to a module that no shared layer can stand for (`nn.Embedding`, say) is decoded.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or does not fit. `model` is as it was then.
        ArgumentError: the model has a state that no file holds.
    """
    from ..checkpoint import CheckpointError, read

    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"load: model must be a torch.nn.Module, but is {type(model).__name__}")
    path = Path(path)
    size = sum(tensor.nbytes for tensor in _state("load", model).values())
    tensors, metadata = read(path, MODEL, most=4 * size + SMALL)
    try:
        return _put(model, tensors, metadata)
    except (_Misfit, ArgumentError, ArgumentTypeError) as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a {MODEL.kind} whose description of its layers is wrong") from error


class _Misfit(ValueError):
    """Model and file are of different layers."""


def _state(op: str, model: nn.Module) -> Tensors:
    latent = {f"{name}.latent".lstrip(".") for name in modules_by_name(model, lambda m: isinstance(m, SHARED))}
    state = {key: value for key, value in model.state_dict().items() if key not in latent}
    for key, value in state.items():
        told = f"{op}: model has the state {key:.80}, which"
        if not isinstance(value, Tensor):
            raise ArgumentError(f"{told} is {type(value).__name__} and no tensor")
        if fault := in_no_memory(value):
            raise ArgumentError(f"{told} is {fault}")
    return state


def _described(module: Any) -> dict[str, Any]:
    """What a file says of a shared or tied layer; {} for others."""
    if isinstance(module, SHARED):
        shape = list(module.dense_shape)
        return {"kind": type(module).__name__, "shape": shape, "bits": module.bits, "codebooks": module.codebooks}
    ties = ties_of(module)
    if ties is None:
        return {}
    filters = module.parametrizations["weight"].original
    return {"kind": Ties.__name__, "shape": [len(ties.index), *filters.shape[1:]], "rule": ties.rule}


def _put(model: nn.Module, tensors: Tensors, metadata: dict[str, Any]) -> nn.Module:
    """All that can go wrong goes wrong before the model is touched."""
    values = tensors | {key: tensors[first] for key, first in metadata["same"].items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    new: dict[nn.Module, nn.Module] = {}  # shared layers in place of plain ones
    tied: dict[nn.Module, Ties] = {}
    missing = [name for name in metadata["layers"] if name not in modules]
    if missing:
        raise _Misfit(f"it has no layer {missing[0]:.80}")
    for name in [name for name in modules if name in metadata["layers"]]:
        old, layer = modules[name], metadata["layers"][name]
        if layer["kind"] == Ties.__name__:
            _tie(name, old, layer, values, tied)
        else:
            _share(name, old, layer, values, new)
    for name, module in modules_by_name(model, _described).items():
        if name not in metadata["layers"]:
            raise _Misfit(
                f"layer {label(name)} is plain in the file and {_described(module)['kind']} in the model"
            )

    expected: Tensors = {}
    replaced = {name: module for name, module in modules.items() if module in new or module in tied}
    for key, value in _state("load", model).items():
        if key.rpartition(".")[0] not in replaced or (modules[key.rpartition(".")[0]] in tied and key.endswith("bias")):
            expected[key] = value
    for name, module in replaced.items():
        prefix = f"{name}." if name else ""
        if module in new:
            expected |= {prefix + key: value for key, value in new[module].state_dict().items()}
        else:
            original, index, weight = (
                prefix + TIES + "original",
                prefix + TIES + "0.index",
                module._parameters["weight"],
            )
            expected |= {original: values[original].to(weight), index: values[index]}
    _compare(expected, values)
    for key, value in _state("load", model).items():
        if any(stride == 0 < size - 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
            raise _Misfit(f"the elements of its {key:.80} have memory in common")

    for old, shared in new.items():
        shared.train(old.training)
    with torch.no_grad():
        for module, ties in tied.items():
            parametrize.register_parametrization(module, "weight", ties, unsafe=True)
        model = replace(model, new)
        _join(model, metadata["same"])
        for key, value in _state("load", model).items():
            value.copy_(values[key])
        for module in model.modules():
            if isinstance(module, SHARED) and module.latent is not None:
                module.latent.copy_(module.weight)
    return model


def _share(name: str, old: nn.Module, layer: dict[str, Any], values: Tensors, new: dict[nn.Module, nn.Module]) -> None:
    """A new shared layer for a plain one; or the decoded weight in `values`, for one that cannot be shared."""
    told, shape = label(name), tuple(layer["shape"])
    if isinstance(old, SHARED):
        if _described(old) != layer:
            raise _Misfit(f"layer {told} is {_told(_described(old))} in the model and {_told(layer)} in the file")
        return
    weight = getattr(old, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != shape:
        has = f"has a weight of shape {list(weight.shape)}" if isinstance(weight, Tensor) else "has no weight"
        raise _Misfit(f"layer {told} {has}, and one of shape {list(shape)} in the file")
    kind: Any = {"SharedLinear": SharedLinear, "SharedConv2d": SharedConv2d}[layer["kind"]]
    fits = type(old) in DENSE and isinstance(old, nn.Conv2d) == (kind is SharedConv2d) and not old._modules
    prefix = f"{name}." if name else ""
    if fits:
        new.setdefault(old, _empty(old, kind, layer))
        return
    codebook, codes = values.pop(prefix + "codebook"), values.pop(prefix + "codes")
    plain = (
        nn.Linear(*shape[::-1], bias=False) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    )
    holder = _empty(plain.to(codebook.dtype), kind, layer).to(codebook.device)
    _compare({"codebook": holder.codebook, "codes": holder.codes}, {"codebook": codebook, "codes": codes})
    with torch.no_grad():
        holder.codebook.copy_(codebook)
        holder.codes.copy_(codes)
        values[prefix + "weight"] = holder.weight.detach()


def _empty(module: nn.Module, kind: Any, layer: dict[str, Any]) -> Any:
    """A shared layer of a plain one's geometry, device and dtype, its values still to come."""
    return kind.like_dense(module, layer["bits"], layer["codebooks"])


def _tie(name: str, old: nn.Module, layer: dict[str, Any], values: Tensors, tied: dict[nn.Module, Ties]) -> None:
    told = label(name)
    if ties_of(old) is not None:
        if _described(old) != layer:
            raise _Misfit(f"layer {told} has other ties than in the file")
        return
    weight = getattr(old, "weight", None)
    if type(old) not in DENSE or not isinstance(weight, Tensor) or list(weight.shape) != layer["shape"]:
        raise _Misfit(f"layer {told} is {type(old).__name__}, and one of shape {layer['shape']} with ties in the file")
    prefix = f"{name}." if name else ""
    index, filters = values[prefix + TIES + "0.index"], values[prefix + TIES + "original"]
    ragged = index.dtype != torch.int32 or index.shape != (len(weight),) or filters.shape[1:] != weight.shape[1:]
    if ragged or layer["rule"] not in RULES or sorted(set(index.tolist())) != list(range(len(filters))):
        raise _Misfit(f"the ties of layer {told} are not whole")
    tied.setdefault(old, Ties(index.to(weight.device), layer["rule"]))


def _told(layer: dict[str, Any]) -> str:
    text = " x ".join(map(str, layer["shape"]))
    return (
        f"{text}, of {layer['bits']} bits in {layer['codebooks']} codebooks" if "bits" in layer else f"{text} with ties"
    )


def _compare(expected: Tensors, values: Tensors) -> None:
    for keys, where in ((expected.keys() - values.keys(), "the file"), (values.keys() - expected.keys(), "the model")):
        if keys:
            raise _Misfit(f"{where} has no {min(keys):.80}" + (f" and {len(keys) - 1} others" if len(keys) > 1 else ""))
    for key, value in expected.items():
        if value.shape != values[key].shape:
            raise _Misfit(f"{key:.80} is of shape {list(value.shape)}, and of {list(values[key].shape)} in the file")
        if value.dtype != values[key].dtype:
            raise _Misfit(f"{key:.80} is {value.dtype}, and {values[key].dtype} in the file")


def _join(model: nn.Module, same: dict[str, str]) -> None:
    """Shared layers with one codebook and one set of codes in the file have them in common in the model, too."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, first in same.items():
        (name, _, own), (other, _, its) = key.rpartition("."), first.rpartition(".")
        module, source = modules[name], modules[other]
        if own == its and own in ("codes", "codebook") and isinstance(module, SHARED) and isinstance(source, SHARED):
            setattr(module, own, getattr(source, own))
