"""Looks into a model: its layers by name, weights that several layers use, bytes; and replaces layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..check import ArgumentError
from ..files import sentence
from ..nn import ConvActPool2d, SharedConv2d, SharedLinear

DENSE = (nn.Linear, nn.Conv2d, ConvActPool2d)  # exactly these: a subclass may use its weight in another way
SHARED = (SharedLinear, SharedConv2d)


SHARED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def label(name: str) -> str:
    """A layer's name for a sentence or a table: short, with characters that any terminal can show."""
    return sentence(name, 80) or "(model)"


@dataclass(eq=False)
class Group:
    """Layers that use the same weight; nearly always a single layer."""

    names: list[str]  # the first name of each module
    modules: list[Any]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def label(self) -> str:
        return label(self.name)


def copied(op: str, model: nn.Module) -> nn.Module:
    """A deep copy. Weights that hooks make anew in each forward (of pruning, of the old weight_norm and spectral_norm)
    are copied as they are now. Raises ArgumentError."""
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
            if isinstance(tensor, Tensor) and nn.parameter.is_lazy(tensor):
                where = f"{name}.{key}".lstrip(".")
                raise ArgumentError(f"{op}: model has {label(where)}, which is not initialized: call the model once")
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # the code of a module can raise anything
        raise ArgumentError(f"{op}: model cannot be copied: {sentence(str(error), 200)}") from error


def modes_of(model: nn.Module) -> dict[nn.Module, Any]:
    """The mode of every module, for `set_modes`; None where a module called `training` hides it."""
    return {module: module.__dict__.get("training") for module in model.modules()}


def set_modes(modes: Mapping[nn.Module, Any]) -> None:
    """Set the modes that `modes_of` returned. `train()` or an assignment would overwrite a module called `training`."""
    for module, mode in modes.items():
        if mode is None:
            module.__dict__.pop("training", None)
        else:
            module.__dict__["training"] = mode


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold tensors themselves, each under its first name."""
    return {name: module for name, module in _layers(model) if any(True for _ in own_tensors(module))}


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules, each under its first name, but not parametrizations, which belong to their layer."""
    return ((name, module) for name, module in model.named_modules() if "parametrizations" not in name.split("."))


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The module's parameters and buffers in a state_dict, including those of its parametrizations, without its
    children's."""
    if nn.utils.parametrize.is_parametrized(module):
        for part in module._modules["parametrizations"].modules():  # pyright: ignore[reportOptionalMemberAccess]
            yield from own_tensors(part)
    hidden = module._non_persistent_buffers_set
    latent = module.latent if isinstance(module, SHARED) else None  # exists while indices are trained, and is not saved
    yield from (tensor for tensor in module._parameters.values() if tensor is not None and tensor is not latent)
    yield from (tensor for key, tensor in module._buffers.items() if tensor is not None and key not in hidden)


def layer_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of every layer's tensors, by the layer's name. A tensor that several layers share is counted in the
    first."""
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for name, module in _layers(model):
        fresh = {id(tensor): tensor for tensor in own_tensors(module) if id(tensor) not in seen}
        seen |= fresh.keys()
        sizes[name] = sum(tensor.numel() * tensor.element_size() for tensor in fresh.values())
    return sizes


def groups_of(model: nn.Module) -> tuple[list[Group], dict[str, str]]:
    """The groups of layers that have one weight each and can be shared, and why the other layers cannot, by name."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module, key))
    groups: dict[int, Group] = {}
    unshared: dict[str, str] = {}
    for name, module in named_layers(model).items():
        why = _unfit(module)
        if not why:
            weight = module._parameters["weight"]
            others = [other for other in owners[id(weight)] if other[1] is not module or other[2] != "weight"]
            odd = [
                other for other in others if other[2] != "weight" or _unfit(other[1]) or not _alike(module, other[1])
            ]
            why = f"its weight is also {label(odd[0][0])}.{odd[0][2]}" if odd else ""
            if not why:
                group = groups.setdefault(id(weight), Group([], []))
                group.names.append(name)
                group.modules.append(module)
        if why:
            unshared[name] = why
    return list(groups.values()), unshared


def _alike(module: nn.Module, other: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) == isinstance(other, nn.Conv2d)


def _unfit(module: nn.Module) -> str:
    """Why a layer cannot be shared, or ''."""
    kind = type(module).__name__
    if module._parameters.get("weight") is None and isinstance(module.__dict__.get("weight"), Tensor):
        return "its weight is made by a hook, as of pruning or the old weight_norm"
    if isinstance(module, SHARED):
        return f"shared already, with {module.bits} bits"
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if type(module) not in DENSE:
        return f"{kind} is not shared"
    if not set(module._parameters) <= {"weight", "bias"} or module._parameters.get("weight") is None or module._buffers:
        return "it has other tensors than weight and bias"
    if module._modules:
        return "it has modules inside"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    weight: Any = module.weight
    bias, dtype = module._parameters.get("bias"), str(weight.dtype).removeprefix("torch.")
    fault = in_no_memory(weight) or ("" if weight.dtype in SHARED_DTYPES else dtype)
    if bias is not None and bias.dtype != weight.dtype:
        fault = fault or f"{dtype} and its bias is not"
    return f"its weight is {fault}" if fault else ""


def in_no_memory(tensor: Tensor) -> str:
    """Why a tensor's values cannot be read from memory as they are, or ''."""
    if nn.parameter.is_lazy(tensor):
        return "not initialized"
    if tensor.is_meta:
        return "on the meta device"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "sparse or nested"
    return "quantized" if tensor.is_quantized else ""


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in place of old ones wherever they are used; returns the model, which may be one of them."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[key] = new[child]
    return new.get(model, model)


def matching(op: str, argument: str, names: Iterable[str], patterns: Any) -> dict[str, str]:
    """The names that `patterns` match, each with its pattern: a name, or one with * and ?. Raises ArgumentError."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names, matched = list(names), {}
    for pattern in patterns:
        hits = [name for name in names if name == pattern] or [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            named = f"{argument} names {pattern!r:.80}"
            raise ArgumentError(f"{op}: {named}, but no layer that could be shared is called that")
        matched |= {name: pattern for name in hits if name not in matched}
    return matched


def modules_by_name(model: nn.Module, test: Callable[[nn.Module], Any]) -> dict[str, nn.Module]:
    """The modules that pass `test`, under every name: one for each place where a module is used."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if test(module)}


def finite(op: str, groups: Iterable[Group]) -> None:
    """Raise ArgumentError for the first weight that is not finite."""
    for group in groups:
        weight = group.modules[0].weight.detach()
        bad = weight.numel() - int(torch.isfinite(weight).sum())
        if bad:
            raise ArgumentError(f"{op}: model has {bad:,} weights that are not finite in layer {group.label}")
