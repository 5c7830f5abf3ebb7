"""The command `tritonshare`: its options, its messages and its exit statuses.

Exit status 0: done; 1: a failure on the way; 2: bad input, nothing was started; 130: interrupted. An error is one
sentence on standard error.
"""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from tritonshare import __version__
from tritonshare.files import naming, sentence
from tritonshare.training.options import (
    DEFAULT_EPOCHS,
    DTYPES,
    HALVING_EPOCHS,
    OPTIMIZERS,
    SHARED_CODEBOOKS,
    SIMILARITIES,
    OptionError,
    Options,
)

TRAIN_PACKAGES = ("sklearn", "tqdm", "matplotlib", "safetensors")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {sentence(message)}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message or "", end="", file=file or sys.stderr)  # argparse's own version hides failures


class Stream:
    """A standard stream that can write any text. After a failure it writes nothing more, since nobody could read it.

    stream: None where it is closed. name: what the OSError of a failure names; "" if a failure raises none.
    """

    def __init__(self, stream: Any, name: str) -> None:
        if stream is None or getattr(stream, "closed", False):
            stream = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        self._stream, self._name = stream, name
        self._errors = getattr(self._stream, "errors", None)
        self._reconfigure("backslashreplace")

    def _reconfigure(self, errors: str | None) -> None:
        if errors and hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors=errors)

    def write(self, text: str) -> int:
        return self._done(self._stream.write, text)

    def flush(self) -> None:
        self._done(self._stream.flush)

    def _done(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            with naming(self._name):
                return call(*args)
        except OSError:
            null = open(os.devnull, "w")  # noqa: SIM115
            if self._stream in (sys.__stdout__, sys.__stderr__):  # discard what it still holds when Python ends
                os.dup2(null.fileno(), self._stream.fileno())  # pyright: ignore[reportOptionalMemberAccess]  (see above)
            self._stream = null
            if self._name:
                raise

    def close(self) -> None:
        """Leave the stream as it was."""
        self._reconfigure(self._errors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def streams() -> Iterator[None]:
    """Within the block standard output and standard error are `Stream`s."""
    if None in (sys.stdin, sys.stdout, sys.stderr):  # no opened file may get the descriptor of a closed stream
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:
                os.dup2(null, number)
    out, err = Stream(sys.stdout, "standard output"), Stream(sys.stderr, "")
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        out.close()
        err.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit status.

    As argparse does, --help, --version and unknown options leave through SystemExit.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    name = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    with streams():
        try:
            try:
                return run_command(name, arguments)
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt:
            return fail(name, 130, "interrupted")
        except MemoryError:
            return fail(name, 1, "there is not enough memory")
        except OSError as error:
            return fail(name, 1, reason_of(error))
        except RuntimeError as error:  # from torch, such as that a device failed
            return fail(name, 1, f"{type(error).__name__}: {error}")


def run_command(name: str, arguments: list[str]) -> int:
    if not name:
        parser = top_parser()
        parser.parse_args(arguments or ["--help"])
        parser.error("the command comes first")
    add_arguments, run, summary = COMMANDS[name]
    parser = Parser(prog=f"tritonshare {name}", description=summary)
    add_arguments(parser)
    return run(parser.parse_args(arguments[1:]))


def reason_of(error: OSError) -> str:
    """What failed, and why."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def top_parser() -> Parser:
    summaries = "\n".join(f"  {name:<10}{summary}" for name, (_, _, summary) in COMMANDS.items())
    parser = Parser(
        prog="tritonshare",
        description="Weight sharing for PyTorch in hand-written Triton kernels.",
        epilog=f"commands:\n{summaries}\n\n'tritonshare COMMAND --help' lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tritonshare {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=" or ".join(COMMANDS))
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    epochs = ", ".join(f"{number} for {name}" for name, number in DEFAULT_EPOCHS.items())
    rates = ", ".join(f"{choice.lr:g} for {name}" for name, choice in OPTIMIZERS.items())
    meant = ", ".join(f"{name}: {choice}" for name, choice in OPTIMIZERS.items() if choice.arguments)
    add("--data", choices=DEFAULT_EPOCHS, default=Options.data, help="images to train on (default: %(default)s)")
    add("--data-dir", type=Path, metavar="DIR", help="folder of the CIFAR-10 binary files (data_batch_1.bin, ...)")
    add("--epochs", type=int, metavar="N", help=f"passes over the images (default: {epochs})")
    add("--batch-size", type=int, default=Options.batch_size, metavar="N", help="of each step (default: %(default)s)")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default=Options.optimizer,
        help=f"of tritonshare.optim; {meant} (default: %(default)s)",
    )
    add(
        "--similarity",
        choices=SIMILARITIES,
        default=Options.similarity,
        help="scale each update by (1 + cos(gradient, momentum)) / 2, per parameter (tensor) or per row of each (row) "
        "(default: %(default)s)",
    )
    add("--lr", type=float, help=f"learning rate, halved every {HALVING_EPOCHS} epochs (default: {rates})")
    add(
        "--shared-bits",
        type=int,
        metavar="N",
        help="then share the trained weights, 1 to 8 bits each, fine-tune, and write shared.safetensors and sizes.png",
    )
    add(
        "--shared-epochs",
        type=int,
        default=Options.shared_epochs,
        metavar="N",
        help="of fine-tuning shared weights; killed, it begins again with --resume (default: %(default)s)",
    )
    add(
        "--shared-lr",
        type=float,
        default=Options.shared_lr,
        metavar="LR",
        help="of fine-tuning's first epoch, falling to zero (default: %(default)s)",
    )
    add("--seed", type=int, default=Options.seed, metavar="N", help="of weights and all draws (default: %(default)s)")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add(
        "--dtype",
        choices=DTYPES,
        default=Options.dtype,
        help="of the computation, through autocast; weights stay float32 (default: %(default)s)",
    )
    add("--out", type=Path, metavar="DIR", help="folder for the results, refused if it holds some (default: runs/DATA)")
    add("--resume", action="store_true", help="continue the run in --out; give the options it was started with")


def run_train(args: argparse.Namespace) -> int:
    missing = [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return fail("train", 2, f"{', '.join(missing)} not installed: run pip install 'tritonshare[train]'")
    import torch

    from tritonshare.checkpoint import CheckpointError
    from tritonshare.training import train
    from tritonshare.training.data import DataError
    from tritonshare.training.run import TrainingError

    folder = None
    try:
        options = Options(**vars(args))
        folder = options.folder
        train.train(options)
    except (OptionError, DataError, CheckpointError) as error:
        return fail("train", 2, str(error))
    except (TrainingError, torch.OutOfMemoryError, MemoryError) as error:
        return fail("train", 1, f"{error or 'there is not enough memory'}{last_epoch(folder)}")
    except OSError as error:
        return fail("train", 1, f"{reason_of(error)}{last_epoch(folder)}")
    except KeyboardInterrupt:
        return fail("train", 130, f"interrupted{last_epoch(folder)}")
    return 0


def last_epoch(folder: Path | None) -> str:
    """The end of a sentence: where the last complete epoch of a broken run is."""
    from tritonshare.training.run import CHECKPOINT

    if folder is None or not os.path.exists(folder / CHECKPOINT):  # Path.exists raises for some names
        return "; no epoch was complete, nothing was written"
    return f"; the last complete epoch is in {folder / CHECKPOINT}, continue with --resume"


def fail(command: str, status: int, message: str) -> int:
    print(f"{' '.join(['tritonshare', *command.split()])}: {sentence(message)}", file=sys.stderr)
    return status


def add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="model or checkpoint of tritonshare train, or any safetensors file: of it, tensors called *.weight with 2 "
        "or 4 axes are shared",
    )
    add("-o", "--out", type=Path, required=True, metavar="OUT", help="file to write; a picture comes beside it (.png)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--bits", type=int, metavar="N", help="of every weight's index, 1 to 8 (default: 4)")
    how.add_argument("--target-bytes", type=int, metavar="N", help="choose bits by layer, for at most N bytes in all")
    how.add_argument(
        "--max-error", type=float, metavar="E", help="choose bits by layer, for a relative L2 error of weights up to E"
    )
    add(
        "--codebooks",
        type=int,
        default=SHARED_CODEBOOKS,
        metavar="N",
        help="of a layer, at most: each is for a range of its output channels (default: %(default)s)",
    )
    add("--data-dir", type=Path, metavar="DIR", help="CIFAR-10's files, for the accuracy of a model trained on it")
    add("--device", metavar="NAME", help="to evaluate on: cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--force", action="store_true", help="replace OUT and its picture")


def run_compress(args: argparse.Namespace) -> int:
    missing = [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return fail("compress", 2, f"{', '.join(missing)} not installed: run pip install 'tritonshare[train]'")
    from tritonshare.check import ArgumentError
    from tritonshare.checkpoint import CheckpointError
    from tritonshare.training import compress
    from tritonshare.training.data import DataError

    try:
        compress.main(args)
    except (compress.CommandError, ArgumentError, CheckpointError, DataError, OptionError) as error:
        return fail("compress", 2, str(error).removeprefix("compress: "))
    return 0


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    importlib.import_module("tritonshare.doctor").add_arguments(parser)


def run_doctor(args: argparse.Namespace) -> int:
    try:
        return importlib.import_module("tritonshare.doctor").main(args)
    except OptionError as error:
        return fail("doctor", 2, str(error))


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "target",
        metavar="TARGET",
        help="package.module:function or path/to/file.py:function: yours, and it returns (module, *example inputs)",
    )
    add("--budget", type=float, default=300.0, metavar="SECONDS", help="time to spend (default: %(default)s)")
    add("--device", default="cuda", metavar="NAME", help="cuda or cuda:N (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float16"), help="of autocast in the forward (default: none)")


def run_tune(args: argparse.Namespace) -> int:
    import torch

    from tritonshare.measure import tune
    from tritonshare.measure.target import TargetError, model_of

    if not args.budget > 0:
        return fail("tune", 2, f"--budget must be more than 0 seconds, but is {args.budget:g}")
    if not torch.cuda.is_available():
        return fail("tune", 2, "no GPU: plans are measured on the one that they are for")
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except RuntimeError as error:
        return fail("tune", 2, f"device {args.device!r} cannot be used: {str(error).splitlines()[0]}")
    try:
        module, inputs = model_of(args.target)
        if isinstance(module, torch.nn.Module):
            module.to(device)
        inputs = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs)
        dtype = getattr(torch, args.dtype) if args.dtype else None
        done = tune.tune_model(module, *inputs, budget=args.budget, dtype=dtype)
    except (TargetError, tune.NothingToTune) as error:
        return fail("tune", 2, str(error))
    except RuntimeError as error:
        return fail("tune", 1, str(error))
    return 1 if any(tuned.failure for tuned in done) else 0


Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]
COMMANDS: dict[str, Command] = {
    "train": (add_train_arguments, run_train, "Train the two-block CNN on real images."),
    "compress": (add_compress_arguments, run_compress, "Share the weights of a file, and write a smaller one."),
    "tune": (add_tune_arguments, run_tune, "Measure plans for a model of yours on this GPU, and keep them."),
    "doctor": (add_doctor_arguments, run_doctor, "Show versions and paths taken, and check the kernels."),
}
