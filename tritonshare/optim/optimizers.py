"""torch.optim's SGD, Adam and AdamW, in one launch."""

from __future__ import annotations

import inspect

import torch

from . import rules
from .base import OneLaunch

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


def documented(summary: str, source: str):
    """A class decorator: its docstring, and torch's arguments and ours as its signature."""

    def decorate(cls: type[OneLaunch]) -> type[OneLaunch]:
        cls.__doc__ = f"{summary}\n{EXTRAS}\n    Derived from: {source}\n    "
        ours = inspect.signature(OneLaunch.__init__).parameters.values()
        theirs = inspect.signature(cls.stepped_by).parameters.values()
        cls.__signature__ = inspect.Signature([*theirs, *(p for p in ours if p.kind is p.KEYWORD_ONLY)])
        return cls

    return decorate


@documented(
    "torch.optim.SGD: gradient descent with momentum, dampening, Nesterov and weight decay.",
    "Sutskever et al., On the importance of initialization and momentum in deep learning, 2013, as torch has it.",
)
class SGD(OneLaunch, torch.optim.SGD):
    stepped_by = torch.optim.SGD
    rule = staticmethod(rules.sgd_rule)
    steps_sparse = True


@documented(
    "torch.optim.Adam, with amsgrad and weight decay.",
    "Kingma and Ba, Adam: A method for stochastic optimization, 2015; amsgrad: Reddi et al., 2018.",
)
class Adam(OneLaunch, torch.optim.Adam):
    stepped_by = torch.optim.Adam
    rule = staticmethod(rules.adam_rule)
    steps_sparse = False


@documented(
    "torch.optim.AdamW: Adam with decoupled weight decay.",
    "Loshchilov and Hutter, Decoupled weight decay regularization, 2019.",
)
class AdamW(OneLaunch, torch.optim.AdamW):
    stepped_by = torch.optim.AdamW
    rule = staticmethod(rules.adam_rule)
    steps_sparse = False
