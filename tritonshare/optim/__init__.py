"""Optimizers that step a whole model in one launch: drop-in replacements for torch.optim's SGD, Adam and AdamW.

All else that torch.optim has (lr_scheduler, the other optimizers, ...) is here under its name, and is torch's.
"""

from typing import Any

import torch

from .attachment import attach
from .optimizers import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW", "attach"]


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch.optim, name)
    except AttributeError:
        raise AttributeError(f"neither tritonshare.optim nor torch.optim has {name!r}") from None
