"""torch.optim's SGD, Adam and AdamW, in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.optim.optimizer import ParamsT

from . import rules
from .base import FusedOptimizer
from .extras import Extras, Similarity

Class = TypeVar("Class")
Betas = tuple[float | torch.Tensor, float | torch.Tensor]

EXTRAS = """
    Everything of torch's class holds: arguments and defaults, parameter groups, closures, hooks, schedulers,
    GradScaler, and a state_dict that either class loads from the other. On CUDA tensors of float32, float16 and
    bfloat16 one launch steps all parameters of a dtype, in fp32 arithmetic; any others are stepped by torch's own code.
    An entry of `state` is replaced by load_state_dict, not by assignment; its tensors may be written in place, and
    entries of your own stay as they are. A state_dict holds all that a run goes on from, but not the arguments beyond
    torch's: with the same ones, a resumed run has the bits of one that never stopped. As with torch, fused=True leaves
    GradScaler's work to the step: one pass over the gradients less, but nothing may unscale or clip them in between.

    Args beyond torch's:
        similarity: scales each update (w -= lr * similarity * direction): "tensor" or "row" for (1 + cos) / 2 of a
            gradient and its momentum, per parameter or per row (axis 0; parameters of one axis are not scaled then); a
            number; a tensor that broadcasts against every parameter; or a function of a parameter that returns one of
            these or None, called at every step.
        state_dtype: of momenta: torch.float32, torch.bfloat16, or torch.uint8 for 8 bits in blocks of 256 with a scale
            each. Default: the parameter's. Kernels only.
        stochastic_rounding: bfloat16 parameters are rounded at random, so that small updates are not lost. Kernels
            only.
        seed: of that rounding: the same seed, parameters in the same order and the same steps give the same bits.
        max_norm: clip all gradients together, as torch.nn.utils.clip_grad_norm_ before the step would; their norm is in
            `grad_norm` afterwards. The gradients themselves stay as they are.
        clear_gradients: fill gradients with zeros in the same pass.

    Raises:
        ArgumentError (a ValueError and RuntimeError), ArgumentTypeError (a TypeError and RuntimeError): one sentence,
        and no parameter, state or count has changed.
"""


def documented(summary: str, source: str) -> Callable[[type[Class]], type[Class]]:
    """A class decorator that writes its docstring."""

    def decorate(cls: type[Class]) -> type[Class]:
        cls.__doc__ = f"{summary}\n{EXTRAS}\n    Derived from: {source}\n    "
        return cls

    return decorate


@documented(
    "torch.optim.SGD: gradient descent with momentum, dampening, Nesterov and weight decay.",
    "Sutskever et al., On the importance of initialization and momentum in deep learning, 2013, as torch has it.",
)
class SGD(FusedOptimizer, torch.optim.SGD):
    stepped_by = torch.optim.SGD
    rule = staticmethod(rules.sgd_rule)
    steps_sparse = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        similarity: Similarity = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_norm: float | None = None,
        clear_gradients: bool = False,
    ) -> None:
        self.extras = Extras(similarity, state_dtype, stochastic_rounding, seed, max_norm, clear_gradients)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )


@documented(
    "torch.optim.Adam, with amsgrad and weight decay.",
    "Kingma and Ba, Adam: A method for stochastic optimization, 2015; amsgrad: Reddi et al., 2018.",
)
class Adam(FusedOptimizer, torch.optim.Adam):
    stepped_by = torch.optim.Adam
    rule = staticmethod(rules.adam_rule)
    steps_sparse = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        similarity: Similarity = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_norm: float | None = None,
        clear_gradients: bool = False,
    ) -> None:
        self.extras = Extras(similarity, state_dtype, stochastic_rounding, seed, max_norm, clear_gradients)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


@documented(
    "torch.optim.AdamW: Adam with decoupled weight decay.",
    "Loshchilov and Hutter, Decoupled weight decay regularization, 2019.",
)
class AdamW(FusedOptimizer, torch.optim.AdamW):
    stepped_by = torch.optim.AdamW
    rule = staticmethod(rules.adam_rule)
    steps_sparse = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        similarity: Similarity = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_norm: float | None = None,
        clear_gradients: bool = False,
    ) -> None:
        self.extras = Extras(similarity, state_dtype, stochastic_rounding, seed, max_norm, clear_gradients)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
