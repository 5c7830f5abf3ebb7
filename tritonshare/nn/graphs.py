"""Modules in graphs of torch.fx: a graph calls the whole module, as it calls torch's own, and so keeps its checks and
state."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch


class Itself(torch.nn.Module):
    """What a graph calls where it was traced from the module alone."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def called_whole(module: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Let torch.fx.symbolic_trace record a call of this class's modules. A subclass with a forward of its own is traced
    through that, down to the functions that it calls."""
    forward = module.forward

    @wraps(forward)
    def recorded(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, torch.fx.Proxy) and type(self).forward is recorded:
            tracer: Any = input.tracer  # of modules, which has more than torch's base class
            name = "itself" if self is tracer.root else tracer.path_of_module(self)
            return tracer.create_proxy("call_module", name, (input, *args), kwargs)
        return forward(self, input, *args, **kwargs)

    module.forward = recorded
    # found by its name when a graph of the module alone is built
    module.itself = property(Itself)  # pyright: ignore[reportAttributeAccessIssue]  (an attribute that is new)
    return module
