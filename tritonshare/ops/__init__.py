"""One module per op: its declaration. Importing this package registers them all."""

from . import conv_act_pool

__all__ = ["conv_act_pool"]
