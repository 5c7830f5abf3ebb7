"""What goes into tritonshare/functional.py."""

import torch
from tritonshare.ops.square import SQUARE


def square(input: torch.Tensor) -> torch.Tensor:
    """Each element times itself: `output = input^2`.

    Args:
        input: [N, D], D at least 1; float32, float16 or bfloat16 (float64 is computed by torch).

    Returns:
        [N, D], contiguous, in the dtype of input, which has a gradient.

    Raises:
        ArgumentError, ArgumentTypeError: one sentence naming argument and axis, before anything is launched.

    Example:
        >>> square(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 4.]])
    """
    return SQUARE(input)
