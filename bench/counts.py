"""What compiled kernels do: traffic, bank conflicts, instructions and products of programs run on the emulated GPU.

    python -m bench.counts                        layers and passes, bf16, channels_last; optimizers; sm_90
    python -m bench.counts --op conv2d_act_pool --case vgg1_2
    python -m bench.counts --record               what the tests hold later compilations against
    python -m bench.counts --show                 the record as a table
    python -m bench.counts --headers              its figures, into the headers of kernels

Beside bench.codegen, whose counts are static: an instruction in a loop counts as often as it runs. Of a launch some
programs are run (`sample`): "all", or a "wave", as many as the chip holds at a time, where they are short, and a few
in two places, "spread", where they are long.

Tensors are on the CPU, with random values and real indices; what the programs of a sample have written is written
again where the others would have, so that later launches find likely numbers. There are no caches: sectors are those
that requests ask of L2 where L1 has none of them, and `read` and `written` are the bytes of the sample's different
sectors. What wgmma reads of shared memory is not among the wavefronts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from packaging.version import Version

from bench.codegen import RECORDED, saved
from bench.emulator import SECTOR, Access, Counters, GlobalMemory, Options, emulate
from bench.launches import RecordedLaunch, case_tensors, hand_call, numbers, pass_of
from bench.rows import MAX_BYTES
from bench.sass import inspect
from bench.selection import SelectionError, cases, cases_and_steps
from bench.steps import CLASSES, STEPS, Step
from tritonshare import files, gate, plan
from tritonshare.declare import Case, Cost, Scalar, Whole
from tritonshare.op import Op

PILOT = 2  # programs that are run first, to see how long they are
FEW = 32  # of a spread sample, at the most
PLACES = 8  # programs that are run, not counted, where the sample has left out a tensor
WORK = 2_000_000  # warp instructions that a launch may take
PERIOD = 2**20  # elements after which values repeat

Row = Mapping[str, Any]
Rows = Sequence[Row]


def values(case: Case, tensors: list[Any]) -> None:
    """A case's tensors, written: integers as it declares them."""
    generator = torch.Generator().manual_seed(0)
    for t, declared in zip(tensors, case.tensors, strict=True):
        if isinstance(declared, Whole):
            t.copy_(declared.drawn(generator))
        elif isinstance(declared, Scalar):
            t.detach().fill_(declared.value)
        elif t is not None:
            repeated(t, generator)


def repeated(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random values in place, the same again and again: of hundreds of megabytes, of which a few programs read some."""
    flat = torch.as_strided(t.detach(), (t.numel(),), (1,))  # in the order of memory
    first = gate.fill(flat[:PERIOD], generator)
    for start in range(PERIOD, len(flat), PERIOD):
        flat[start : start + PERIOD] = first[: len(flat) - start]
    return t


def random_like(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return repeated(torch.empty_like(t), generator)


def spread_out(memory: GlobalMemory) -> None:
    """Write what was written again and again over the rest of the same tensors."""
    for region in memory.regions:
        whole = (region.end - region.first) // SECTOR  # sectors that are the tensor's alone
        places = np.flatnonzero(region.written[:whole])
        if region.base == region.first and 0 < len(places) < whole:
            sectors = region.bytes[: whole * SECTOR].reshape(-1, SECTOR)
            written = sectors[places]
            pattern = np.tile(written, (-(-4096 // len(written)), 1))
            for start in range(0, whole, len(pattern)):
                sectors[start : start + len(pattern)] = pattern[: whole - start]
            sectors[places] = written


# A launch.


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that an SM of sm_90 holds at a time."""
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = 233_472 // (-(-shared // 128) * 128 + 1024)  # of which the system keeps a KiB for each
    return max(1, min(by_registers, by_shared, 64 // warps, 32))


def programs_of(sample: str, count: int, grid: int) -> list[int]:
    """The first ones, or in two places as many neighbours, which tend to differ in what they do."""
    if sample != "spread":
        return [*range(count)]
    half = count // 2
    return [*range(grid // 3, grid // 3 + half), *range(2 * grid // 3, 2 * grid // 3 + count - half)]


def chosen(grid: int, wave: int, each: int) -> tuple[str, int]:
    """What is run of a launch whose programs have so many warp instructions each."""
    at_once, few = min(grid, wave), min(max(WORK // each, PILOT), FEW)
    if at_once * each <= WORK or 3 * few > 2 * grid:  # two places of neighbours have room in a third each
        return ("all" if grid <= wave else "wave"), at_once
    return "spread", few


def counted(launch: RecordedLaunch, arch: str, like: Row | None = None) -> dict[str, Any]:
    """What is counted of a launch, of the programs that the row `like` is of, or of those that are chosen."""
    compiled = launch.compile(arch)
    code = inspect(compiled)
    per_sm = resident(code.registers, code.shared_bytes, compiled.metadata.num_warps)
    wave = plan.DEVICES[arch].sms * per_sm

    def ran(programs: Sequence[int], memory: GlobalMemory) -> Counters:
        options = Options(counting=True, programs=programs)
        ptx, grid, given = compiled.asm["ptx"], (launch.grid, 1, 1), launch.arguments(arch)
        return emulate(ptx, compiled.metadata, grid, given, memory, options, Counter())

    pilot = "spread", min(PILOT, launch.grid)
    sample = pilot if like is None else (like["sample"], like["programs"])
    memory = GlobalMemory()
    found = ran(programs_of(*sample, launch.grid), memory)
    if like is None:
        sample = chosen(launch.grid, wave, found.instructions.total() // found.programs)
        if sample != pilot:
            memory = GlobalMemory()
            found = ran(programs_of(*sample, launch.grid), memory)
    if any(not (region.read.any() or region.written.any()) for region in memory.regions):
        others = np.linspace(0, launch.grid - 1, PLACES).astype(int)  # programs that may have other tensors
        ran(np.unique(others), memory)
    spread_out(memory)
    return {
        "file": launch.file, "kernel": launch.kernel, "plan": str(launch.plan), "grid": launch.grid, "wave": wave,
        "sample": sample[0], "programs": found.programs, **figures(found), "tensors": tensor_bytes(memory),
    }  # fmt: skip


def figures(found: Counters) -> dict[str, Any]:
    """Of the programs that were run, together."""
    on_chip = ("shared", "matrix")
    accesses = sorted(found.memory.items())
    return {
        "warps": dict(found.instructions.most_common()), "products": found.flops.total(),
        "sectors": {name: access(a) for name, a in accesses if not any(part in name for part in on_chip)},
        "wavefronts": {name: access(a) for name, a in accesses if any(part in name for part in on_chip)},
        "read": found.read_sectors * SECTOR, "written": found.written_sectors * SECTOR,
    }  # fmt: skip


def access(of: Access) -> list[int]:
    """requests, bytes, sectors or wavefronts, and how many of these the bytes need"""
    return [of.requests, of.bytes, of.units, of.least]


def tensor_bytes(memory: GlobalMemory) -> int:
    """All of every tensor that is read, and of every one that is written: what a launch moves at the least."""
    return sum((r.end - r.base) * (int(r.read.any()) + int(r.written.any())) for r in memory.regions)


# Layers and steps. `like`: recorded rows of the same call, whose programs are to be run.


def rows_of_case(op: Op, case: Case, like: Rows = (), **way: str) -> Iterator[dict[str, Any]]:
    """A row for each launch of a case: forward, then the gradients of all its tensors."""
    generator = torch.Generator().manual_seed(1)
    with numbers(way["dtype"]) as dtype:
        tensors = case_tensors(case, dtype, device="cpu", channels_last=way["layout"] == "channels_last")
        values(case, tensors)
        rows, take = taking(way["arch"], like)
        gradient = partial(random_like, generator=generator)
        problem = hand_call(op, case, tensors, way["arch"], take, gradient)
    costs = problem.cost(case.shapes[0][0], [True] * op.tensors)
    for row in rows:
        name = pass_of(row["kernel"], costs)
        yield {"op": op.name, "case": case.name, "pass": name, **way, **row, **of_cost(costs.get(name))}


def rows_of_step(step: Step, arch: str, like: Rows = ()) -> Iterator[dict[str, Any]]:
    """A row for each launch of an optimizer's step."""
    optimizer = step.optimizer("cpu")
    generator = torch.Generator().manual_seed(0)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        gate.fill(p.detach(), generator)
        gate.fill(p.grad, generator)
    rows, take = taking(arch, like)
    cost = step.hand(optimizer, arch, take)
    way = {"dtype": step.dtype, "arch": arch, "layout": "contiguous"}
    for row in rows:
        of = ("step", cost) if row["kernel"] == "update" else (None, None)
        yield {"op": step.rule, "case": step.case, "pass": of[0], **way, **row, **of_cost(of[1])}


def taking(arch: str, like: Rows) -> tuple[list[dict[str, Any]], Callable[[RecordedLaunch], None]]:
    """Rows, and what is to be called with the launches that they are of."""
    rows: list[dict[str, Any]] = []

    def take(launch: RecordedLaunch) -> None:
        before = like[len(rows)] if len(rows) < len(like) else None
        same = before is not None and (before["kernel"], before["grid"]) == (launch.kernel, launch.grid)
        rows.append(counted(launch, arch, before if same else None))

    return rows, take


def of_cost(cost: Cost | None) -> dict[str, int]:
    return {} if cost is None else {"bytes": cost.bytes, "flops": cost.flops}


# The record.


OFFLINE = Path(__file__).parent / "results" / "offline"
KERNELS = Path(__file__).parents[1] / "kernels"


def record_file() -> Path:
    version = Version(triton.__version__)
    return OFFLINE / f"counts-{RECORDED['arch']}-triton-{version.major}.{version.minor}.json"


def record_files() -> list[Path]:
    """Of every Triton."""
    return sorted(OFFLINE.glob("counts-*.json"))


@cache
def recorded(file: Path) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Rows by op, case and dtype, in the order of the call."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in files.read_json(file, MAX_BYTES)["rows"]:
        found.setdefault((row["op"], row["case"], row["dtype"]), []).append(row)
    return found


def total(row: Row, what: str) -> int:
    """All sectors or wavefronts of a row's programs."""
    return sum(units for _, _, units, _ in row[what].values())


def least(row: Row, what: str) -> int:
    return sum(needed for _, _, _, needed in row[what].values())


def regressions(found: Row, before: Row) -> list[str]:
    """What the same programs of a kernel do more than recorded, as sentences. Values may differ from machine to
    machine, and with them what depends on them: within a hundredth nothing is told."""
    measures: dict[str, Callable[[Row], int]] = {
        "warp instructions": lambda row: sum(row["warps"].values()),
        "FLOP of matrix instructions": lambda row: row["products"],
        "sectors of global memory": lambda row: total(row, "sectors"),
        "wavefronts of shared memory": lambda row: total(row, "wavefronts"),
        "bytes of different sectors": lambda row: row["read"] + row["written"],
    }
    both = {what: (of(found), of(before)) for what, of in measures.items()}
    return [f"{now} {what}, recorded were {then}" for what, (now, then) in both.items() if now > 1.01 * then]


def against_record(found: Rows, before: Rows) -> list[str]:
    """What is wrong with the rows of a call: they are of other launches or plans than recorded, or do more."""
    launches, known = ([(row["kernel"], row["plan"], row["grid"]) for row in rows] for rows in (found, before))
    if launches != known:
        advice = "run python -m bench.counts --record, once with each Triton, and look at what changed"
        return [f"has other launches or plans than recorded: {advice}"]
    pairs = zip(found, before, strict=True)
    return [f"{row['kernel']}: {sentence}" for row, then in pairs for sentence in regressions(row, then)]


# Figures that are read.


def issued(row: Row) -> float | None:
    """Products that a launch issues for each that its pass needs."""
    if not row.get("flops") or not row["products"]:
        return None
    return row["products"] / row["programs"] * row["grid"] / row["flops"]


def through_l2(row: Row) -> float:
    """Bytes that a launch asks of L2."""
    return SECTOR * total(row, "sectors") / row["programs"] * row["grid"]


def from_memory(row: Row) -> float | None:
    """Bytes that a launch moves through memory if L2 keeps what programs of a wave share, and nothing from wave to
    wave. None where no wave was run."""
    return None if row["sample"] == "spread" else (row["read"] + row["written"]) / row["programs"] * row["grid"]


def conflicts(row: Row) -> str:
    """The kind of access to shared memory that needs the most wavefronts for each that its bytes need, and how many."""
    of = {name: units / needed for name, (_, _, units, needed) in row["wavefronts"].items()}
    worst = max(of, key=of.__getitem__, default="")
    return f"{worst} {of[worst]:.2f}" if worst and of[worst] > 1 else ""


def stated(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """By file and kernel what its header has to say of the rows whose pass has a cost: the most that any of them takes,
    to two digits and rounded up."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["pass"]:
            found.setdefault((row["file"], row["kernel"]), []).append(row)
    return {key: sentence(of) for key, of in found.items()}


def sentence(rows: Rows) -> str:
    kernel = rows[0]["kernel"]
    tensors = max(row["tensors"] / row["bytes"] for row in rows)
    l2 = max(through_l2(row) / row["bytes"] for row in rows)
    products = [of for of in map(issued, rows) if of is not None]
    work = f", {rounded_up(max(products))} times Work" if products else ""
    return f"{kernel}: {rounded_up(tensors)} times Traffic, {rounded_up(l2)} times through L2{work}"


def rounded_up(x: float) -> str:
    """To two digits. A thousandth more is none."""
    step = 10.0 ** (floor(log10(x)) - 1)
    return f"{ceil(x / step - 0.01) * step:.{1 if step < 1 else 0}f}"


def ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a is not None and b else ""


COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "op": ("<23", lambda row: row["op"]),
    "case": ("<34", lambda row: row["case"]),
    "dtype": ("<5", lambda row: row["dtype"]),
    "kernel": ("<23", lambda row: row["kernel"]),
    "grid": (">7", lambda row: str(row["grid"])),
    "run": (">4", lambda row: str(row["programs"])),
    "": ("<6", lambda row: row["sample"]),
    "warp/prog": (">9", lambda row: str(sum(row["warps"].values()) // row["programs"])),
    "sect/req": (">8", lambda row: ratio(total(row, "sectors"), sum(r for r, *_ in row["sectors"].values()))),
    "/least": (">6", lambda row: ratio(total(row, "sectors"), least(row, "sectors"))),
    "wavefr/least": (">12", lambda row: ratio(total(row, "wavefronts"), least(row, "wavefronts"))),
    "most": (">20", lambda row: conflicts(row)),
    "L2 MB": (">9", lambda row: ratio(through_l2(row), 1e6)),
    "waves MB": (">8", lambda row: ratio(from_memory(row), 1e6)),
    "tensors MB": (">10", lambda row: ratio(row["tensors"], 1e6)),
    "cost MB": (">7", lambda row: ratio(row.get("bytes"), 1e6)),
    "issued": (">6", lambda row: ratio(issued(row), 1)),
}


LEGEND = """
/least: sectors, or wavefronts, for each that the same bytes need; most: of the accesses that conflict the most.
L2 MB: of all requests, L1 catching none. waves MB: through memory, if L2 keeps what a wave shares and nothing from wave
to wave. tensors MB: all of every tensor, once. issued: matrix instructions' products for each that the pass needs.
Of these, headers of kernels state the most, "Counted", for each byte of Traffic (tensors, L2) and each FLOP of Work:
"""


def line(row: Row | None) -> str:
    """A row of the table; without one its headings."""
    cells = {name: name if row is None else of(row) for name, (_, of) in COLUMNS.items()}
    return "  ".join(f"{text:{COLUMNS[name][0]}}" for name, text in cells.items())


def write_headers() -> None:
    """Write what the records say into the headers of kernels, as their section "Counted"."""
    rows = [row for file in record_files() for rows in recorded(file).values() for row in rows]
    of_file: dict[str, list[str]] = {}
    for (name, _), text in sorted(stated(rows).items()):
        of_file.setdefault(name, []).append(f"         {text}")
    for name, lines in of_file.items():
        path = KERNELS / f"{name}.py"
        text = re.sub(r"\nCounted .*?(?=\nRounding )", "", path.read_text(), count=1, flags=re.DOTALL)
        section = "\n".join(["Counted  at the most, in what bench.counts has recorded:", *lines])
        files.replace({path: text.replace("\nRounding ", f"\n{section}\nRounding ", 1).encode()})


Key = tuple[str, str, str]  # op, case, dtype
Calls = dict[Key, Callable[..., Iterator[dict[str, Any]]]]


def calls(layers: Iterable[tuple[Op, Case]], steps: Iterable[Step]) -> Calls:
    """What makes the rows of each, given recorded ones whose programs are to be run, or nothing."""
    of_layers = {
        (op.name, case.name, RECORDED["dtype"]): partial(rows_of_case, op, case, **RECORDED) for op, case in layers
    }
    return of_layers | {(of.rule, of.case, of.dtype): partial(rows_of_step, of, RECORDED["arch"]) for of in steps}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", help=f"an op's name, or one of {', '.join(CLASSES)} (default: all)")
    parser.add_argument("--case", action="append", help="a case's name (default: all layers and steps)")
    parser.add_argument(
        "--record", action="store_true", help="keep the rows in bench/results/offline, beside the others"
    )
    parser.add_argument("--show", action="store_true", help="print the recorded rows, and run nothing")
    parser.add_argument("--headers", action="store_true", help="write its figures into kernels, and run nothing")
    args = parser.parse_args(argv)
    if args.headers:
        write_headers()
        return 0
    known = dict.fromkeys(step.case for step in STEPS)
    try:
        layers, rules, names = cases_and_steps(args.op, args.case, CLASSES, known, "layer")
    except SelectionError as error:
        print(f"bench.counts: {error}", file=sys.stderr)
        return 2
    wanted = calls(layers, [step for step in STEPS if step.rule in rules and step.case in names])
    every = calls(cases(None, None, "layer"), STEPS)
    if args.record and not wanted.keys() <= every.keys():
        parser.error("--record takes layers and steps")

    kept = recorded(record_file()) if (args.record or args.show) and record_file().exists() else {}
    kept = {key: rows for key, rows in kept.items() if key in every}
    found: dict[Key, list[dict[str, Any]]] = {}
    print(line(None))
    for key, rows in wanted.items():
        found[key] = []
        for row in kept.get(key, []) if args.show else rows():
            found[key].append(row)
            print(line(row), flush=True)
        if args.record:  # what is long is kept as it comes
            status = saved([*chain.from_iterable((kept | found).values())], "bench.counts", record_file())
            if status:
                return status
    print(LEGEND)
    if args.show and (missing := [key for key in wanted if key not in kept]):
        print("not recorded: " + "; ".join(map(" ".join, missing)) + "\n")
    for (file, _), text in stated(chain.from_iterable(found.values())).items():
        print(f"kernels/{file}.py  {text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
