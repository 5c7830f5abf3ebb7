"""How products are computed. In fp32, torch's own switches say "tf32" or "ieee"; half precision is widened to fp32."""

from typing import Any

import torch


def widened(t: torch.Tensor) -> torch.Tensor:
    """The tensor in at least fp32, in which the kernels compute: squares leave fp16's range, and sums need more digits
    than bf16 has."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def convolution() -> str:
    """How convolutions multiply fp32: torch.backends.cudnn.conv.fp32_precision / allow_tf32."""
    switch: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]  (not in torch's stubs)
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


def matmul() -> str:
    """How matrix products multiply fp32: torch.backends.cuda.matmul.fp32_precision / allow_tf32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def none() -> str:
    """For an op without products."""
    return "ieee"
