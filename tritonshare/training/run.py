"""One training run: the two-block CNN, its state on a device, an epoch, and the checkpoint that holds it all.

Every draw of an epoch comes from a generator seeded by (seed, epoch) alone, the initial weights from the seed, and the
step size from the epoch: a run resumed from a checkpoint carries on exactly where an unbroken one would be. On the CPU
(same machine, versions and number of threads) it reaches the same bits.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tritonshare import checkpoint, explain, files, records
from tritonshare.explanation import WAYS
from tritonshare.nn import ConvActPool2d
from tritonshare.training import data
from tritonshare.training.options import (
    DTYPES,
    HALVING_EPOCHS,
    MAX_EPOCHS,
    OPTIMIZERS,
    SIMILARITIES,
    OptionError,
    Options,
)
from tritonshare.training.report import Epoch

CHECKPOINT, MODEL, CURVES = "checkpoint.safetensors", "model.safetensors", "curves.png"
SHARED, SIZES = "shared.safetensors", "sizes.png"  # written with --shared-bits

UNCHOSEN = {"optimizer": "adam", "similarity": "none"}  # in checkpoints from before there was a choice
CHECK_STEPS = 20  # steps between two readings of the loss: each waits for the device
EVALUATION_BATCH = 1024
SHARED_PIXELS = 2**15  # a batch with fewer positions than this (size squared, times images) stays on one CPU thread


class TrainingError(RuntimeError):
    """Training failed: the loss is not finite."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside its tensors."""

    config: Annotated[dict[str, Any], records.Kind("an object", lambda v: isinstance(v, dict), (None, [], "x"))]
    scaler: Annotated[dict[str, Any], records.Kind("an object", lambda v: isinstance(v, dict), (None, [], "x"))]
    history: Annotated[
        list[Any],
        records.Kind("a list of epochs", lambda v: isinstance(v, list) and 0 < len(v) <= MAX_EPOCHS, (None, {}, [])),
    ]


class TwoBlockCNN(torch.nn.Module):
    """5x5 conv to 32 channels, ReLU, 2x2 max pool; 5x5 conv to 64, ReLU, 2x2 max pool; one dense layer.

    Input [N, in_channels, image_size, image_size], output logits [N, num_classes]. Both convolutions keep the size of
    their input and each block is one fused kernel. `image_size` is at least 4: the pools divide it by 4, rounding down.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"TwoBlockCNN: image_size must be at least 4, not {image_size}")
        self.block1 = ConvActPool2d(in_channels, 32, 5, padding=2, activation="relu", pool="max", pool_size=2)
        self.block2 = ConvActPool2d(32, 64, 5, padding=2, activation="relu", pool="max", pool_size=2)
        self.head = torch.nn.Linear(64 * (image_size // 2 // 2) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(x)).flatten(1))


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, or CUDA if there is one and the CPU if not. Raises OptionError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name} is unknown: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device {name} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise OptionError(f"--device {name} does not exist: torch sees {count} CUDA devices")
    return device


def step_size(lr: float, epoch: int) -> float:
    """The learning rate of epoch 0, 1, ...: it does not depend on how many are asked for, so a run can be extended."""
    return lr * 0.5 ** (epoch // HALVING_EPOCHS)


@contextmanager
def threads_for(options: Options, images: data.ImageSet, device: torch.device) -> Iterator[None]:
    """One CPU thread for batches too small to share, torch's own number for others; the old number afterwards.

    A batch of digits takes about 5 ms on one thread. A second one saves half of that at best, and waiting for it costs
    several times as much when another process holds its core. With one thread the result also does not depend on the
    number of cores.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and options.batch_size * images.image_size**2 < SHARED_PIXELS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Run:
    """The state of a training run on one device: images, model, optimizer, loss scaler."""

    model: torch.nn.Module
    rate_option = "--lr"  # what to make smaller when the loss is not finite

    def __init__(self, options: Options, images: data.ImageSet, device: torch.device) -> None:
        self.options, self.device = options, device
        # The images stay bytes and move once; each batch is cut and distorted on the device.
        self.train_images = torch.from_numpy(images.train_images).to(device)
        self.train_labels = torch.from_numpy(images.train_labels).to(device)
        self.held_out_images = torch.from_numpy(images.held_out_images).to(device)
        self.held_out_labels = torch.from_numpy(images.held_out_labels).to(device)
        means, deviations = images.channel_statistics()
        self.mean = torch.tensor(means, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
        self.deviation = torch.tensor(deviations, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.model_config = {
            "in_channels": images.channels,
            "image_size": images.image_size,
            "num_classes": images.num_classes,
        }
        # What a user needs to feed the model: (raw pixel - mean) / standard deviation, channel by channel.
        self.model_metadata = self.model_config | {"data": images.name, "mean": means, "std": deviations}
        with torch.random.fork_rng(devices=[]):  # leaves the caller's generator as it was
            torch.manual_seed(options.seed)
            model = TwoBlockCNN(**self.model_config)
        self.model = model.to(device).to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]  (no such stub)
        choice, similarity = OPTIMIZERS[options.optimizer], SIMILARITIES[options.similarity]
        self.optimizer = choice.cls(
            self.model.parameters(), lr=options.learning_rate, similarity=similarity, **choice.arguments
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.dtype == "float16")
        self.config = {"model": self.model_config, "data": options.data, "data_sha256": images.digest()}
        # The optimizer comes before lr, whose default depends on it: a refusal names the first that differs.
        remembered = ("optimizer", "similarity", "batch_size", "seed", "dtype")
        self.config |= {key: getattr(options, key) for key in remembered} | {"lr": options.learning_rate}

    def prepare(self, images: Tensor) -> Tensor:
        """Bytes [N, C, H, W] to the model's input: float32, centred and scaled, in the device's layout."""
        return ((images.float() - self.mean) / self.deviation).contiguous(memory_format=self.layout)

    def logits(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, DTYPES[self.options.dtype], enabled=self.options.dtype != "float32"):
            return self.model(images)

    def step(self, images: Tensor, labels: Tensor, maps: Tensor) -> Tensor:
        """One step of the optimizer on a batch; returns the mean loss, still on the device."""
        grid = F.affine_grid(maps, list(images.shape), align_corners=False)
        inputs = F.grid_sample(self.prepare(images), grid, padding_mode="border", align_corners=False)
        loss = F.cross_entropy(self.logits(inputs.contiguous(memory_format=self.layout)).float(), labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch."""
        return step_size(self.options.learning_rate, epoch)

    def train_epoch(self, epoch: int, bar: tqdm) -> float:
        """All training images once, in the order of `epoch`; returns the mean loss. Raises TrainingError."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(epoch)
        count = len(self.train_labels)
        draws = data.epoch_draws(self.options.seed, epoch, count)
        order, maps = (torch.from_numpy(draw).to(self.device) for draw in draws)
        batches = list(zip(order.split(self.options.batch_size), maps.split(self.options.batch_size), strict=True))
        total, seen, mean = torch.zeros((), dtype=torch.float64, device=self.device), 0, math.nan
        for number, (chosen, chosen_maps) in enumerate(batches, start=1):
            loss = self.step(self.train_images[chosen], self.train_labels[chosen], chosen_maps)
            total += loss * len(chosen)
            seen += len(chosen)
            if number % CHECK_STEPS == 0 or number == len(batches):
                mean = total.item() / seen  # one bad step makes the sum bad for good, so that none is missed
                if not math.isfinite(mean):
                    raise TrainingError(
                        f"the loss became {mean} in epoch {epoch + 1}: try a smaller {self.rate_option}"
                    )
                bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
            bar.update(len(chosen))
        return mean

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy (0..1) on the held-out images."""
        loss, correct = 0.0, 0
        parts = zip(
            self.held_out_images.split(EVALUATION_BATCH), self.held_out_labels.split(EVALUATION_BATCH), strict=True
        )
        for images, labels in parts:
            logits = self.logits(self.prepare(images)).float()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
        return loss / len(self.held_out_labels), correct / len(self.held_out_labels)

    @torch.no_grad()
    def right(self) -> Tensor:
        """Whether each held-out image is recognised."""
        parts = self.held_out_images.split(EVALUATION_BATCH)
        predictions = [self.logits(self.prepare(images)).float().argmax(1) for images in parts]
        return torch.cat(predictions) == self.held_out_labels

    def path(self) -> str:
        """Which path computes the model's fused blocks on this device, and why."""
        notes = explain(self.logits, self.prepare(self.train_images[: self.options.batch_size]))
        ways = {f"{WAYS[note.path.name]}: {note.path.reason}" for note in notes}
        return f"{self.device}, {self.options.dtype}, {'; '.join(sorted(ways))}"

    def save(self, history: list[Epoch]) -> None:
        """Write the checkpoint and the model alone; if it crashes in between, resuming repairs it. Raises OSError."""
        metadata = {"config": self.config, "scaler": self.scaler.state_dict(), "history": [asdict(e) for e in history]}
        files.replace(
            {
                self.options.folder / CHECKPOINT: checkpoint.of_run(self.model, self.optimizer, metadata),
                self.options.folder / MODEL: self.exported(),
            }
        )

    def exported(self) -> bytes:
        """The file of the model alone."""
        return checkpoint.tensors_to_bytes(self.model.state_dict(), self.model_metadata)

    def resume(self) -> list[Epoch]:
        """Continue from the checkpoint in the folder; returns the epochs already done. Raises CheckpointError."""
        path = self.options.folder / CHECKPOINT
        size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        tensors, metadata = checkpoint.read(path, most=8 * size + 2**20)  # no optimizer keeps so many states
        try:
            saved: Saved = records.read_record(Saved, metadata, "metadata")
            history = [records.read_record(Epoch, epoch, f"history[{i}]") for i, epoch in enumerate(saved.history)]
            self._check_config(saved.config)
            self._check_scaler(saved.scaler)
        except files.FileError as error:
            raise checkpoint.CheckpointError(f"{path} {error}") from error
        steps = len(history) * math.ceil(len(self.train_labels) / self.options.batch_size)
        # where the loss is scaled, each step so far may have overflowed
        checkpoint.restore(path, tensors, self.model, self.optimizer, steps, unstepped=self.scaler.is_enabled())
        self.scaler.load_state_dict(saved.scaler)
        return history

    def _check_config(self, saved: dict[str, Any]) -> None:
        """Raise FileError unless a checkpoint was made with this run's options, images and model."""
        saved = UNCHOSEN | saved
        for name in (*sorted(self.config.keys() - saved.keys()), *sorted(saved.keys() - self.config.keys())):
            raise files.FileError(f"has config {'without' if name in self.config else 'with an unknown'} {name!r:.80}")
        for key, value in self.config.items():
            if json.dumps(saved[key], sort_keys=True) != json.dumps(value, sort_keys=True):  # where True is not 1
                if key in ("model", "data_sha256"):
                    raise files.FileError("was made from other images or another model")
                option = "--" + key.replace("_", "-")
                raise files.FileError(f"was made with {option} {saved[key]!s:.80}, not {value}")

    def _check_scaler(self, saved: dict[str, Any]) -> None:
        """Raise FileError unless it is a possible state of this run's loss scaler."""
        expected = self.scaler.state_dict()
        if expected:
            expected |= {key: saved.get(key) for key in ("scale", "_growth_tracker")}
            counts = records.whole(0, expected["growth_interval"]).holds(expected["_growth_tracker"])
            if not (counts and records.number(0, 1e38).holds(expected["scale"])):
                raise files.FileError("has a scale of losses that none can be")
        if json.dumps(saved, sort_keys=True) != json.dumps(expected, sort_keys=True):
            raise files.FileError("has another scaler of losses than this run")


def one_epoch(
    run: Run, epoch: int, epochs: int, kind: str = "", keep: Callable[[Epoch], None] = lambda done: None
) -> Epoch:
    """Train and evaluate epoch `epoch` (from 0) of `epochs`, call `keep` with its result, and then print its line,
    which may fail. Raises TrainingError, and what `keep` raises.
    """
    label, count = f"{kind}epoch {epoch + 1:{len(str(epochs))}}/{epochs}", len(run.train_labels)
    # disable=None: no bar where standard error is not a terminal.
    with tqdm(total=count, desc=label, unit=" images", unit_scale=True, leave=False, disable=None) as bar:
        start = time.perf_counter()
        loss = run.train_epoch(epoch, bar)
        seconds = time.perf_counter() - start
        held_out_loss, accuracy = run.evaluate()
    if not math.isfinite(held_out_loss):
        raise TrainingError(
            f"the held-out loss became {held_out_loss} in epoch {epoch + 1}: try a smaller {run.rate_option}"
        )
    done = Epoch(loss, held_out_loss, accuracy, seconds)
    keep(done)
    measured = f"loss {loss:.4f}  held-out loss {held_out_loss:.4f}  accuracy {accuracy:7.2%}"
    print(f"{label}  {measured}  {count / seconds:,.0f} images/s", flush=True)
    return done
