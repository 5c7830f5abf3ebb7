"""8-bit states in plain torch, as kernels/adaptive_update.py has them (`encode`, `decode`): for checkpoints and tests.

A block of QUANT elements, in the order of memory, shares a scale: the largest magnitude. A code stands for scale * x
with x = (q / 127)^2 and a sign, or (q / 255)^4 for what has none. Encoding what was decoded gives the same codes.
"""

from __future__ import annotations

import torch

from ..kernels.geometry import STATE_BLOCK as QUANT

PADDING = 4096  # elements that the number of scales is rounded up to: no block of a kernel is larger


def scale_of(state: str) -> str:
    """The name of the scales of an 8-bit state."""
    return f"{state}_scale"


def flat(t: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in the order of its memory; a view."""
    return t.as_strided((t.numel(),), (1,))


def scales(numel: int) -> int:
    return -(-max(1, numel) // PADDING) * (PADDING // QUANT)


def zeros(like: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of zeros, in the memory order of `like`, and their scales."""
    codes = torch.full_like(like, 128 if signed else 0, dtype=torch.uint8, requires_grad=False)
    return codes, torch.zeros(scales(like.numel()), dtype=torch.float32, device=like.device)


def encode(values: torch.Tensor, like: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of `values`, in the memory order of `like`."""
    codes, scale = zeros(like, signed)
    x = torch.zeros(scale.numel() * QUANT, dtype=torch.float32, device=like.device)
    x[: like.numel()] = flat(torch.empty_like(like, dtype=torch.float32).copy_(values))
    x = x.view(-1, QUANT)
    scale.copy_(x.abs().amax(1))
    ratio = (x.abs() * scale.reciprocal()[:, None]).clamp(max=1).nan_to_num(nan=0.0)
    if signed:
        q = (ratio.sqrt() * 127 + 0.5).floor()
        q = torch.where(x < 0, 128 - q, 128 + q)
    else:
        q = (ratio.sqrt().sqrt() * 255 - 0.0078125).ceil()  # less what sqrt may have rounded up
        q = torch.where(x > 0, q.clamp(min=1), 0.0)
    flat(codes).copy_(q.view(-1)[: like.numel()])
    return codes, scale


def decode(codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> torch.Tensor:
    """fp32, in the memory order of the codes."""
    q = flat(codes).float()
    if signed:
        q = (q - 128) * (1 / 127)
        x = q * q.abs()
    else:
        q = q * (1 / 255)
        x = (q * q) * (q * q)
    values = torch.empty_like(codes, dtype=torch.float32)
    flat(values).copy_(x * scale.repeat_interleave(QUANT)[: codes.numel()])
    return values
