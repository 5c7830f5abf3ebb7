"""Optimizers that step a whole model in one launch: drop-in replacements for torch.optim's."""

from .attachment import attach
from .optimizers import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW", "attach"]
