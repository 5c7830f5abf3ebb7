"""How products of fp32 are computed, by torch's own switches: "tf32" or "ieee"."""

import torch


def convolution() -> str:
    """Of convolutions: torch.backends.cudnn.conv.fp32_precision / allow_tf32."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def matmul() -> str:
    """Of matrix products: torch.backends.cuda.matmul.fp32_precision / allow_tf32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def none() -> str:
    """Of an op without products."""
    return "ieee"
