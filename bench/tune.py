"""Measured plans for the layers of the registry, into the table that comes with the library. Needs a GPU.

    python -m bench.tune conv2d_act_pool --budget 600
    python -m bench.tune conv2d_act_pool --case vgg1_2 --dtype bf16 --dtype tf32
    python -m bench.tune conv2d_act_pool --case vgg1_2 --any-order     also what no table may hold: for the heuristic
    python -m bench.tune conv2d_act_pool --dry --out plans.json        all but the measuring, without a GPU

The file is written after every layer. What the time is too short for is told, and is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.dry import dry_machine
from bench.launches import NUMBERS, case_tensors, needs, numbers
from bench.selection import SelectionError, cases, chosen
from tritonshare import gate, plan, tables
from tritonshare.cli import reason_of
from tritonshare.declare import Case
from tritonshare.measure.machine import Machine
from tritonshare.measure.tune import Layer, Tuned, TuneError, Tuner
from tritonshare.op import Op
from tritonshare.plan import Plan


class UsageError(ValueError):
    """Options that make no run: one sentence."""


def layer_of(op: Op, case: Case, dtype: torch.dtype, name: str, *, channels_last: bool) -> Layer:
    """A case as a call to tune, with the gradients that it wants where it stands in a network."""
    tensors = case_tensors(case, dtype, device="meta", channels_last=channels_last)
    for t, wanted in zip(tensors, needs(case), strict=True):
        if t is not None:
            t.requires_grad_(wanted)
    return Layer(name, op, tuple(tensors), tuple(gate.raw_options(op, case.options)))


def revision() -> str:
    """Of the sources, as git tells it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError("git cannot tell the revision of the sources: give it with --revision") from error


@contextmanager
def machine(dry: bool) -> Iterator[Machine]:
    if dry:
        with dry_machine() as made:
            yield made
    else:
        yield Machine(torch.device("cuda"))


def table(rows: Iterable[tuple[str, tables.Row]]) -> str:
    """The closing table: a line for each row, as it stands in the file."""
    lines = [f"{'layer':<36} {'pass':<16} {'us':>10} {'before':>10} {'gain':>7}  plan"]
    for name, row in rows:
        if isinstance(row, tables.PlanRow):
            before, what = row.default_us.median, str(Plan.of_data(row.plan))
        else:
            before, what = row.rival_us.median, f"beside torch ({row.rival})"
        gain = before / row.us.median
        lines.append(f"{name:<36} {row.pass_:<16} {row.us.median:>10.2f} {before:>10.2f} {gain:>6.2f}x  {what}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    add = made.add_argument
    add("op", metavar="OP", help="an op's name")
    add("--case", action="append", help="a case's name (default: all layers)")
    add("--dtype", action="append", help=f"one of {', '.join(NUMBERS)} (default: bf16)")
    add("--contiguous", action="store_true", help="NCHW tensors instead of channels_last ones")
    add("--budget", type=float, default=600.0, metavar="SECONDS", help="time to spend (default: %(default)s)")
    add("--plans", type=int, metavar="N", help="plans to try for a pass, at the most (default: all)")
    add("--any-order", action="store_true", help="time plans that change results, too, and tell of them")
    add("--dry", action="store_true", help="launch kernels into nothing; needs --out, a new file that nobody reads")
    add("--revision", help="of the sources, where git cannot tell")
    add("--out", type=Path, metavar="FILE", help="the table to add to (default: tritonshare/plans/ARCH.json)")
    return made


def run(args: argparse.Namespace) -> int:
    selected = cases([args.op], args.case, "layer")
    names = chosen(args.dtype or ["bf16"], NUMBERS, "dtype")
    if args.plans is not None and args.plans < 1:
        raise UsageError("--plans must be at least 1")
    if args.dry and args.out is None:
        raise UsageError("--dry needs --out: nothing that it writes is a measurement")
    if not args.dry and not torch.cuda.is_available():
        raise UsageError("no GPU: plans are measured on the one that they are for (--dry runs without measuring)")
    made_by = args.revision or revision()
    done: list[Tuned] = []
    with machine(args.dry) as gpu:
        arch = plan.facts(gpu.device).arch
        keeper = tables.Keeper(args.out or tables.shipped_file(arch), arch, dry=args.dry)
        tuner = Tuner(gpu, seconds=args.budget, revision=made_by, any_order=args.any_order, plans=args.plans)
        for name in names:
            with numbers(name) as dtype:
                for op, case in selected:
                    layer = layer_of(op, case, dtype, f"{case.name} {name}", channels_last=not args.contiguous)
                    done.append(tuner.tune(layer))
                    if done[-1].rows:
                        keeper.add(done[-1].rows)
    print()
    print(table((tuned.layer.name, row) for tuned in done for row in tuned.rows))
    for tuned in done:
        for sentence in (*tuned.left, *([tuned.failure] if tuned.failure else [])):
            print(f"left: {sentence}")
    print(f"{sum(len(tuned.rows) for tuned in done)} rows for {keeper.path}" + (", of a dry run" if args.dry else ""))
    return 1 if any(tuned.failure for tuned in done) else 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (UsageError, SelectionError, tables.TableError, TuneError) as error:
        print(f"bench.tune: {error}", file=sys.stderr)
        return 1 if isinstance(error, TuneError) else 2
    except OSError as error:
        print(f"bench.tune: {reason_of(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
