"""Weight sharing for PyTorch in hand-written Triton kernels."""

from . import functional, nn, optim
from .check import ArgumentError, ArgumentTypeError
from .compress import compress
from .explanation import explain
from .plan import using

__version__ = "0.1.0"
__all__ = ["ArgumentError", "ArgumentTypeError", "compress", "explain", "functional", "nn", "optim", "using"]
