"""One module per op: its declaration. Importing this package registers them all."""

from . import adaptive_update, conv_act_pool

__all__ = ["adaptive_update", "conv_act_pool"]
