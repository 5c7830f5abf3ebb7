"""`tritonshare doctor`: what is installed, which way each op goes and why, and whether the kernels are right here."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch

from . import choose, gate, launch, plan
from .declare import Case
from .op import REGISTRY, Op
from .optim import verify
from .training.options import OptionError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = max(map(len, REGISTRY))  # the width of their column


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--no-check", action="store_true", help="leave the self-check of the kernels out")


def main(args: argparse.Namespace) -> int:
    """Print the report; 0 if every self-check passed, 1 if one failed. Raises OptionError: the device is not there."""
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # nothing can be computed on a meta device
    except Exception as error:  # what it is depends on the kind of device
        raise OptionError(f"device {args.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    for name, value in versions().items():
        print(f"{name:<12} {value}")
    print(f"{'device':<12} {describe(device)}")
    way = launch.path(torch.empty(1, device=device))
    print(f"{'path':<12} {way.reason}")
    if device.type == "cpu":
        print(f"{'bfloat16':<12} {launch.cpu_bfloat16()[1]}")
    for line in tables_in_use(device) if way.kernels else ["not used: no kernel runs here"]:
        print(f"{'plans':<12} {line}")
    print()
    for name in (*REGISTRY, "optim"):
        for dtype in DTYPES:
            x = torch.empty(1, device=device, dtype=dtype)
            way = REGISTRY[name].path(x) if name in REGISTRY else launch.path(x)
            print(f"{name:<{NAMES}}  {short(dtype):<9} {way.name:<10} {way.reason}")
    if args.no_check:
        return 0
    print()
    return self_check(device)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("tritonshare", "torch", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} ({platform.processor() or platform.machine()}, {os.cpu_count()} processors)"
    properties = torch.cuda.get_device_properties(device)
    return f"{device} {properties.name}, {properties.multi_processor_count} multiprocessors"


def tables_in_use(device: torch.device) -> list[str]:
    """The tables of measured plans, and how many of their rows count here; other problems take default plans."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with a file is told below
        sources = choose.sources(plan.facts(device).arch)
    lines = []
    for source in sources:
        rows = [*source.table.plans, *source.table.verdicts]
        if source.path is None:
            told = "none, platformdirs is not installed"
        elif source.problem:
            told = f"{source.path} {source.problem}: ignored"
        elif not rows:
            told = f"none at {source.path}"
        else:
            counted = sum(key[-1] == choose.triton_minor() for key in rows)
            told = f"{source.path}, {counted} of {len(rows)} rows are of Triton {choose.triton_minor()}"
        lines.append(f"{source.name}: {told}")
    return lines


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def self_check(device: torch.device) -> int:
    """Check the kernels on a GPU, or, without one, in Triton's interpreter: that needs a process of its own."""
    importable, interpreted, state = launch.triton_state()
    if not importable:
        print(f"self-check: left out, {state}")
        return 0
    if device.type == "cuda" or interpreted:
        return check_kernels(device)
    command = [sys.executable, "-c", "from tritonshare import doctor; raise SystemExit(doctor.check_kernels('cpu'))"]
    child = subprocess.Popen(command, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True)
    with child:
        try:
            for line in child.stdout or ():
                print(line, end="", flush=True)
        except BaseException:
            child.kill()
            raise
    return child.returncode


def check_kernels(device: torch.device | str) -> int:
    """Every op's tiny cases through the numeric gate, forward and every gradient, and steps by every rule of the
    optimizers; a table, and 1 if one fails."""
    where = "in Triton's interpreter" if launch.triton_state()[1] else f"on {device}"
    print(f"self-check of the kernels {where}, against torch in fp64:", flush=True)
    failed = 0
    for name, what, dtype, check in checks(device):
        try:
            problems = [str(c) for c in check() if not c.passed]
        except Exception as error:  # a compiler or driver that fails is what a doctor is asked about
            problems = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
        failed += bool(problems)
        print(f"  {name:<{NAMES}}  {what:<13} {short(dtype):<9} {'; '.join(problems) or 'pass'}", flush=True)
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


def check_op(op: Op, case: Case, dtype: torch.dtype, device: torch.device | str) -> list[gate.Comparison]:
    return gate.check(op, case, gate.make_tensors(case, dtype, device))


def checks(device: torch.device | str) -> Iterator[tuple[str, str, torch.dtype, Callable[[], list[gate.Comparison]]]]:
    """What is checked: op, case, dtype, and the check."""
    for op in REGISTRY.values():
        for case in (case for case in op.cases if "tiny" in case.tags):
            for dtype in DTYPES:
                yield op.name, case.name, dtype, partial(check_op, op, case, dtype, device)
    for rule in verify.RULES:
        for dtype in DTYPES:
            yield "optim", rule, dtype, partial(verify.check, rule, dtype, device)
