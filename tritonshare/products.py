"""How products are computed: those of fp32 by torch's own switches, "tf32" or "ieee", and of half precision in fp32."""

import torch


def widened(t: torch.Tensor) -> torch.Tensor:
    """In fp32 at the least, as the kernels compute: squares leave fp16's range, and sums bf16's digits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def convolution() -> str:
    """Of convolutions: torch.backends.cudnn.conv.fp32_precision / allow_tf32."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def matmul() -> str:
    """Of matrix products: torch.backends.cuda.matmul.fp32_precision / allow_tf32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def none() -> str:
    """Of an op without products."""
    return "ieee"
