"""The options of `tritonshare train`. Importing this needs no package of the extra `train`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tritonshare import optim
from tritonshare.files import sentence

DEFAULT_EPOCHS = {"digits": 60, "cifar10": 20}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIMILARITIES = {"none": None, "tensor": "tensor", "row": "row"}
SHARED_CODEBOOKS = 8  # how many a layer has at most, with --shared-bits
SHARED_REASSIGNED = 10  # steps of fine-tuning between two re-assignments of indices
MAX_EPOCHS = 10_000  # the history of so many still fits into a checkpoint's header
MAX_BATCH = 10**9
MAX_RATE = 1e38  # a weight is float32
HALVING_EPOCHS = 20  # the step size is halved each time this many epochs are done


class OptionError(ValueError):
    """An option cannot be honoured. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


@dataclass(frozen=True)
class Choice:
    """A choice of --optimizer: its class, the arguments that differ from its defaults, and the learning rate without
    --lr."""

    cls: type[optim.SGD] | type[optim.Adam] | type[optim.AdamW]
    lr: float
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join([self.cls.__name__, *(f"{name} {value:g}" for name, value in self.arguments.items())])


OPTIMIZERS = {
    "adam": Choice(optim.Adam, 0.001, {}),
    "adamw": Choice(optim.AdamW, 0.001, {}),
    "sgd": Choice(optim.SGD, 0.02, {"momentum": 0.9}),
}


@dataclass(frozen=True)
class Options:
    """What `tritonshare train` is asked to do. None stands for a default that depends on other options or the machine.

    Raises:
        OptionError: a number is out of range or a name unknown.
    """

    data: str = "digits"  # or "cifar10"
    data_dir: Path | None = None  # folder of the CIFAR-10 binary files
    epochs: int | None = None
    batch_size: int = 64
    optimizer: str = "adam"
    similarity: str = "none"  # scales each update by (1 + cos(gradient, momentum)) / 2, per parameter or per row of it
    lr: float | None = None
    seed: int = 0
    device: str | None = None  # "cpu", "cuda" or "cuda:N"; None: CUDA if there is one
    dtype: str = "float32"  # the dtype of autocast; weights and optimizer state stay float32
    out: Path | None = None  # None: runs/<data>
    shared_bits: int | None = None  # then share the trained weights, with indices of so many bits, and fine-tune
    shared_epochs: int = 10  # of fine-tuning
    shared_lr: float = 0.0003  # the learning rate of fine-tuning's first epoch; it falls to zero along a cosine
    resume: bool = False

    def __post_init__(self) -> None:
        names = {"data": DEFAULT_EPOCHS, "dtype": DTYPES, "optimizer": OPTIMIZERS, "similarity": SIMILARITIES}
        for option, known in names.items():
            if getattr(self, option) not in known:
                raise OptionError(f"--{option} must be one of {', '.join(known)}, not {getattr(self, option)}")
        if self.epochs is not None and not 1 <= self.epochs <= MAX_EPOCHS:
            raise OptionError(f"--epochs must be from 1 to {MAX_EPOCHS:,}, not {self.epochs}")
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise OptionError(f"--batch-size must be from 1 to {MAX_BATCH:,}, not {self.batch_size}")
        if not 0 < self.learning_rate <= MAX_RATE:
            raise OptionError(f"--lr must be a positive number up to {MAX_RATE:g}, not {self.learning_rate:g}")
        if self.shared_bits is not None and not 1 <= self.shared_bits <= 8:
            raise OptionError(f"--shared-bits must be from 1 to 8, not {self.shared_bits}")
        if not 1 <= self.shared_epochs <= MAX_EPOCHS:
            raise OptionError(f"--shared-epochs must be from 1 to {MAX_EPOCHS:,}, not {self.shared_epochs}")
        if not 0 < self.shared_lr <= MAX_RATE:
            raise OptionError(f"--shared-lr must be a positive number up to {MAX_RATE:g}, not {self.shared_lr:g}")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"--seed must be in 0..2**63-1, not {self.seed}")

    @property
    def folder(self) -> Path:
        return Path("runs") / self.data if self.out is None else Path(self.out)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first epochs."""
        return OPTIMIZERS[self.optimizer].lr if self.lr is None else self.lr
