"""Convolution blocks and the two-block network on this machine's CPU, beside torch and ONNX Runtime.

    python -m bench.cpu                  # prints a table
    python -m bench.cpu --record         # writes bench/results/cpu-<name>/cpu.json, too

All providers of a row are called in turn, in one process, so that what else the machine does meets all alike; a row's
figure is the median of the rounds' ratios, with an interval. Nothing is timed whose results are not those of fp64 by
the numeric gate. Peak memory is what torch's allocator of CPU tensors hands out at once within a call, and what is kept
for the backward what autograd's hooks see, without parameters.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from bench.cpu_results import EAGER, EAGER_CL, OURS, CpuResults, CpuRow, Hardware, readable, reasons
from bench.rows import record
from tritonshare import gate, launch
from tritonshare.cli import Parser
from tritonshare.declare import Unavailable
from tritonshare.files import replace
from tritonshare.measure.machine import Interval
from tritonshare.nn import ConvActPool2d

RESULTS = Path(__file__).parent / "results"
CL = torch.channels_last
COMPILED, TUNED, ONNX = "torch.compile", "torch.compile max-autotune", "ONNX Runtime"
SECONDS = 1.5  # of a row's rounds
ROUNDS = (5, 101)
IMPALA_POOL = {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}


@dataclass(frozen=True)
class Layer:
    """A convolution block: channels in and out, size, filter; with padding that keeps the size, ReLU and a maximum.
    data: its input is data, which has no gradient."""

    name: str
    channels: int
    filters: int
    size: int
    taps: int
    batches: tuple[int, ...] = (1, 64, 512)
    data: bool = False
    pool: tuple[int, int, int] = (2, 2, 0)
    compiles: bool = False

    def shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.channels, self.size, self.size)

    def ours(self) -> torch.nn.Module:
        size, stride, padding = self.pool
        return ConvActPool2d(
            self.channels, self.filters, self.taps, padding=self.taps // 2, pool_size=size, pool_stride=stride,
            pool_padding=padding,
        )  # fmt: skip

    def plain(self) -> torch.nn.Module:
        convolution = torch.nn.Conv2d(self.channels, self.filters, self.taps, padding=self.taps // 2)
        return torch.nn.Sequential(convolution, torch.nn.ReLU(inplace=True), torch.nn.MaxPool2d(*self.pool))


@dataclass(frozen=True)
class Network:
    """The network of `tritonshare train`: two blocks and a dense head."""

    name: str = "two-block network"
    batches: tuple[int, ...] = (1, 64, 512)
    data: bool = True
    compiles: bool = True

    def shape(self, batch: int) -> tuple[int, ...]:
        return (batch, 3, 32, 32)

    def ours(self) -> torch.nn.Module:
        blocks = (ConvActPool2d(3, 32, 5, padding=2), ConvActPool2d(32, 64, 5, padding=2))
        return torch.nn.Sequential(*blocks, torch.nn.Flatten(), torch.nn.Linear(64 * 8 * 8, 10))

    def plain(self) -> torch.nn.Module:
        layers: list[torch.nn.Module] = []
        for channels, filters in ((3, 32), (32, 64)):
            convolution = torch.nn.Conv2d(channels, filters, 5, padding=2)
            layers += [convolution, torch.nn.ReLU(inplace=True), torch.nn.MaxPool2d(2)]
        return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(64 * 8 * 8, 10))


CASES = (
    Network(),
    Layer("article_conv1", 3, 32, 32, 5, data=True, compiles=True),
    Layer("article_conv2", 32, 64, 16, 5),
    Layer("cifar_conv1", 3, 64, 32, 3, data=True),
    Layer("mnist_conv1", 1, 32, 28, 5, data=True),
    Layer("impala_s1", 3, 16, 64, 3, data=True, pool=(3, 2, 1)),
    Layer("impala_s2", 16, 32, 32, 3, pool=(3, 2, 1)),
    Layer("vgg1_2", 64, 64, 112, 3, batches=(1, 8)),
    Layer("vgg4_3", 512, 512, 14, 3, batches=(1, 8)),
)
Case = Layer | Network


@dataclass
class Provider:
    """A way to compute a row: `call` once, and what the gate compares, by name."""

    call: Callable[[], Any]
    results: Callable[[], dict[str, torch.Tensor]]


def training(model: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, step: bool, function: Any) -> Provider:
    """Forward and backward; of a network with a loss and Adam's step."""
    parameters = [*model.parameters()]
    wanted = [*parameters, *([x] if x.requires_grad else [])]
    optimizer = torch.optim.Adam(parameters, lr=1e-3) if step else None

    def backward() -> torch.Tensor:
        for t in wanted:
            t.grad = None
        output = function(x)
        if step:
            F.cross_entropy(output, target).backward()
        else:
            output.backward(target)
        return output

    def call() -> None:
        backward()
        if optimizer is not None:
            optimizer.step()

    def results() -> dict[str, torch.Tensor]:
        output = backward()
        grads = {f"grad[{i}]": t.grad for i, t in enumerate(wanted)}
        return {"output": output.detach(), **{name: t.clone() for name, t in grads.items() if t is not None}}

    return Provider(call, results)


def inference(x: torch.Tensor, function: Any) -> Provider:
    def call() -> torch.Tensor:
        with torch.inference_mode():
            return function(x)

    return Provider(call, lambda: {"output": call()})


class Row:
    """The tensors and weights of a case, batch and pass, the same for all providers."""

    def __init__(self, case: Case, batch: int, trains: bool) -> None:
        torch.manual_seed(0)
        self.case, self.batch, self.trains = case, batch, trains
        self.state = [*case.plain().state_dict().values()]
        self.x = torch.randn(case.shape(batch))
        self.is_network = isinstance(case, Network)
        with torch.no_grad():
            output = self.model(case.plain())(self.x)
        self.target = torch.randint(10, (batch,)) if self.is_network else torch.randn_like(output)

    def model(self, made: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        made.load_state_dict(dict(zip(made.state_dict(), self.state, strict=True)))
        return made.to(dtype)

    def provider(self, made: torch.nn.Module, layout: Any = torch.contiguous_format, wrap: Any = None) -> Provider:
        model = self.model(made).to(memory_format=layout)
        x = self.x.clone().contiguous(memory_format=layout)
        x.requires_grad_(self.trains and not self.case.data)
        target = self.target.contiguous(memory_format=layout) if self.target.dim() == 4 else self.target
        function = wrap(model) if wrap else model
        if self.trains:
            return training(model, x, target, self.is_network, function)
        return inference(x, function)

    def truth(self, dtype: torch.dtype, layout: Any = torch.contiguous_format) -> dict[str, torch.Tensor]:
        """By plain torch in a dtype."""
        model = self.model(self.case.plain(), dtype).to(memory_format=layout)
        x = self.x.to(dtype, copy=True).contiguous(memory_format=layout)
        x.requires_grad_(self.trains and not self.case.data)
        target = self.target.to(dtype) if self.target.dim() == 4 else self.target
        made = training(model, x, target, self.is_network, model) if self.trains else inference(x, model)
        return made.results()

    def onnx(self) -> Provider:
        if self.trains:
            raise Unavailable("it has no gradients")
        try:
            import onnxruntime
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise Unavailable(f"{error.name} is not installed") from error
        program = torch.onnx.export(self.model(self.case.plain()).eval(), (self.x,), dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        data = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        name, given = session.get_inputs()[0].name, self.x.numpy()
        return Provider(
            lambda: session.run(None, {name: given}),
            lambda: {"output": torch.from_numpy(session.run(None, {name: given})[0])},
        )

    def compiled(self, mode: str) -> Provider:
        if not self.case.compiles:
            raise Unavailable("only some rows are compiled, for it takes long")
        import torch._inductor.config as inductor

        torch._dynamo.reset()

        def wrap(model: torch.nn.Module) -> Any:
            return torch.compile(model if self.trains else model.eval(), mode=mode, dynamic=False)

        frozen = inductor.patch(freezing=not self.trains)
        with frozen:
            made = self.provider(self.case.plain(), CL, wrap)
            made.results()  # compiles
        return made

    def providers(self) -> Iterator[tuple[str, Callable[[], Provider]]]:
        yield OURS, partial(self.provider, self.case.ours(), CL)
        yield EAGER_CL, partial(self.provider, self.case.plain(), CL)
        yield EAGER, partial(self.provider, self.case.plain())
        yield f"{OURS}, contiguous", partial(self.provider, self.case.ours())
        yield ONNX, self.onnx
        yield COMPILED, partial(self.compiled, "default")
        yield TUNED, partial(self.compiled, "max-autotune")


# Measuring.


def rounds(calls: Sequence[Callable[[], Any]], seconds: float, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of each call, by round; every round calls each once, in an order that turns."""
    found: list[list[float]] = []
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while len(found) < ROUNDS[0] or (len(found) < ROUNDS[1] and time.perf_counter() < end):
        times = [0.0] * len(calls)
        for k in range(len(calls)):
            i = (k + len(found)) % len(calls)
            start = clock()
            calls[i]()
            times[i] = clock() - start
        found.append(times)
    return found


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that the allocator of CPU tensors has handed out within a call, beyond what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def kept_bytes(row: Row, made: Provider) -> int | None:
    """What autograd keeps between forward and backward, of each memory once, without leaves."""
    if not row.trains:
        return None
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if not t.is_leaf or not t.requires_grad:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made.results()
    return sum(kept.values())


def judged(row: Row, made: Provider, truth: dict[str, torch.Tensor], yardstick: dict[str, torch.Tensor]) -> str:
    """What the gate says against it; nothing, if all is well."""
    found = made.results()
    comparisons = [gate.compare(name, t, truth[name], yardstick[name]) for name, t in found.items()]
    return "; ".join(str(c) for c in comparisons if not c.passed)


def worse(truth: dict[str, torch.Tensor], *found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of torch's results in several layouts, which sum in other orders, by name those that are further from truth."""

    def error(name: str, of: dict[str, torch.Tensor]) -> float:
        return (of[name] - truth[name]).abs().max().item()

    return {name: max(found, key=partial(error, name))[name] for name in truth}


@dataclass(frozen=True)
class Way:
    """How rows are measured: for how many seconds each, by which clock, and which providers (None: all)."""

    seconds: float
    clock: Callable[[], float] = time.perf_counter
    providers: Sequence[str] | None = None


def measure(row: Row, threads: int, way: Way) -> Iterator[CpuRow]:
    """Of all providers of a row; those that cannot run, or compute something else, say why."""
    torch.set_num_threads(threads)
    truth = row.truth(torch.float64)
    yardstick = worse(truth, row.truth(torch.float32), row.truth(torch.float32, CL))
    ready: dict[str, Provider] = {}
    whys: dict[str, str] = {}
    for name, build in row.providers():
        if way.providers and name not in way.providers:
            continue
        try:
            made = build()
            whys[name] = judged(row, made, truth, yardstick)
        except Unavailable as error:
            whys[name] = str(error)
        except Exception as error:  # compilers and exporters fail in any way
            whys[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        if not whys[name]:
            ready[name] = made
    times = rounds([made.call for made in ready.values()], way.seconds, way.clock)
    of = {name: [one[i] for one in times] for i, name in enumerate(ready)}
    for name, why in whys.items():
        us = ratio = None
        if name in of:
            interval = Interval.of([t * 1e6 for t in of[name]])
            us = (interval.low, interval.median, interval.high)
            if OURS in of:
                interval = Interval.of([t / ours for t, ours in zip(of[name], of[OURS], strict=True)])
                ratio = (interval.low, interval.median, interval.high)
        eager = name in ready and name not in (ONNX, COMPILED, TUNED)
        yield CpuRow(
            case=row.case.name, batch=row.batch, pass_="training" if row.trains else "inference", threads=threads,
            provider=name, us=us, ratio=ratio,
            peak_bytes=peak_bytes(ready[name].call) if eager else None,
            kept_bytes=kept_bytes(row, ready[name]) if eager else None, why=why,
        )  # fmt: skip


def hardware() -> Hardware:
    try:
        import onnxruntime

        version = onnxruntime.__version__
    except ImportError:
        version = None
    return Hardware(
        processor_name(), os.cpu_count() or 1, launch.cpu_bfloat16()[0], torch.__version__,
        platform.python_version(), version,
    )  # fmt: skip


def processor_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine() or "unknown"


def run(minutes: float, cases: Sequence[Case], threads_of: Sequence[int], way: Way) -> CpuResults:
    """The rows of all cases, in the order of worth, until the time is up."""
    end = time.monotonic() + minutes * 60
    before = torch.get_num_threads()
    rows: list[CpuRow] = []
    subjects = [
        (case, batch, trains, threads)
        for batch in (64, 8, 1, 512)
        for threads in threads_of
        for trains in (True, False)
        for case in cases
        if batch in case.batches
    ]
    for number, (case, batch, trains, threads) in enumerate(subjects, 1):
        if time.monotonic() > end:
            print(f"the time is up: {len(subjects) - number + 1} of {len(subjects)} rows are left out", flush=True)
            break
        rows += measure(Row(case, batch, trains), threads, way)
        what = f"{case.name}, batch {batch}, {'training' if trains else 'inference'}, {threads} threads"
        print(f"[{number}/{len(subjects)}] {what}", flush=True)
    torch.set_num_threads(before)
    return CpuResults(datetime.date.today().isoformat(), hardware(), tuple(rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.cpu", description="Convolution blocks on this machine's CPU, beside others.")
    add = parser.add_argument
    add("--record", action="store_true", help="write the results to bench/results/cpu-<name>/cpu.json")
    add("--minutes", type=float, default=12, metavar="N", help="begin no row after these (default: %(default)s)")
    add("--seconds", type=float, default=SECONDS, metavar="N", help="of a row's rounds (default: %(default)s)")
    add("--case", action="append", choices=[case.name for case in CASES], help="only this one; may be repeated")
    add("--provider", action="append", metavar="NAME", help=f"only {OURS} and this one; may be repeated")
    add("--processor-time", action="store_true", help="of one thread, where the machine does other things")
    args = parser.parse_args(argv)
    if args.record and (args.case or args.provider or args.processor_time):
        parser.error("--record takes all rows, by the clock")
    cases = [case for case in CASES if not args.case or case.name in args.case]
    threads = [1] if args.processor_time else [*dict.fromkeys((1, torch.get_num_threads()))]
    clock = time.thread_time if args.processor_time else time.perf_counter
    way = Way(args.seconds, clock, args.provider and [OURS, *args.provider])
    results = run(args.minutes, cases, threads, way)
    print(readable(results), *results.summary(), results.memory(), *reasons(results), sep="\n")
    if args.record:
        name = re.sub(r"[^a-z0-9]+", "-", results.machine.name.lower()).strip("-")
        file = RESULTS / f"cpu-{name}" / "cpu.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        replace({file: to_json(results)})
        print(f"written: {file}")
    return 0


def to_json(results: CpuResults) -> bytes:
    """A line for each row."""
    data = record(results)
    rows = ",\n".join(json.dumps(row) for row in data.pop("rows"))
    return (json.dumps(data)[:-1] + f', "rows": [\n{rows}\n]}}\n').encode()


if __name__ == "__main__":
    sys.exit(main())
