"""Makes models smaller: shares weights through codebooks, ties similar filters, and saves both at their packed size.

small, report = tritonshare.compress(model, bits=4)
tritonshare.compress.save(small, "small.safetensors")
tritonshare.compress.load("small.safetensors", model)
"""

from . import share
from .files import load, save
from .filters import similar_filters
from .report import Layer, Report
from .share import decompress

__all__ = ["Layer", "Report", "compress", "decompress", "load", "save", "similar_filters"]


class Compress:
    """The function `tritonshare.compress(model)`, with the others beside it as `tritonshare.compress.save`."""

    Layer = Layer
    Report = Report
    compress = staticmethod(share.compress)
    decompress = staticmethod(decompress)
    load = staticmethod(load)
    save = staticmethod(save)
    similar_filters = staticmethod(similar_filters)
    __call__ = compress


compress = Compress()
compress.__doc__ = share.compress.__doc__
