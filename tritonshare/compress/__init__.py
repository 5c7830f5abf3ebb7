"""Makes models smaller: shares weights through codebooks, ties similar filters, and saves both at their packed size.

small, report = tritonshare.compress(model, bits=4)
tritonshare.compress.save(small, "small.safetensors")
tritonshare.compress.load("small.safetensors", model)
"""

import sys
from types import ModuleType
from typing import Any

from .files import load, save
from .filters import similar_filters
from .report import Layer, Report
from .share import compress, decompress

__all__ = ["Layer", "Report", "compress", "decompress", "load", "save", "similar_filters"]


class _Callable(ModuleType):
    """`tritonshare.compress(model)` is the function of that name, and `tritonshare.compress.save` is beside it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
