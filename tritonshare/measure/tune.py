"""Chooses plans by measurement: candidates -> those that fit -> those with right results -> times -> a row of a table.

    rows = Tuner(machine, seconds=300, revision="...").tune(layer)

A plan may change speed only. So only candidates that take sums in the order of the default plan are tried; each must
give the default plan's results bit for bit, which have passed the numeric gate, and give them twice; and it
is kept only if it was faster than the default plan by more than both confidence intervals. Then the whole op is timed
beside torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch

from .. import __version__, plan, tables
from ..declare import Rival, Unavailable
from ..explanation import Explanation, explaining
from ..heuristic import with_other_stages_and_warps
from ..op import REGISTRY, Op
from ..plan import Plan
from .machine import Call, Interval, Machine
from .trial import Layer, Refused, Subject, Trial, TuneError

QUICK_ROUNDS = 5
REFINED = 2  # plans whose stages and warps are varied, too
FINALISTS = 4  # plans that are timed again, besides the default plan
TURNS, TURN_SECONDS = 6, 0.05  # of each finalist, one after the other: a drift of the clock meets all of them


def tell(line: str) -> None:
    print(line, flush=True)


class NothingToTune(TuneError):
    """Nothing was started."""


@dataclass(eq=False)
class Timed:
    """A plan and its time in seconds. keeps_order: False if it was tried only to know its time."""

    plan: Plan
    calls: list[Call]
    keeps_order: bool
    time: Interval


@dataclass
class Tuned:
    """What tuning a layer gave: rows for a table, and sentences on what was not done."""

    layer: Layer
    rows: list[tables.Row] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failure: str = ""  # that results of default plans are wrong, or that there is too little memory


class Tuner:
    """Tunes layers on a machine until `seconds` are over.

    revision: the version of the sources, for the rows. say: called with a line on every pass. any_order: also try plans
    that take sums in another order, and report them; no row ever holds one. plans: how many to try per pass, at most.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        seconds: float,
        revision: str,
        say: Callable[[str], Any] = tell,
        any_order: bool = False,
        plans: int | None = None,
    ) -> None:
        self.machine, self.say, self.any_order, self.revision = machine, say, any_order, revision
        self.plans = plans
        self.deadline = monotonic() + seconds

    def out_of_time(self) -> bool:
        return monotonic() >= self.deadline

    def tune(self, layer: Layer) -> Tuned:
        """Tune every pass of a layer, then time the whole op. What there is no time for is left out; a fault of the
        device is raised."""
        tuned = Tuned(layer)
        if self.out_of_time():
            tuned.left.append(f"{layer.name}: no time was left")
            return tuned
        try:
            with _plain_torch(self.machine.device), self.machine.stream():
                self._tune(tuned)
        except torch.OutOfMemoryError:
            tuned.failure = f"{layer.name}: the device has too little memory"
            self.say(tuned.failure)
        return tuned

    def _tune(self, tuned: Tuned) -> None:
        layer, subject = tuned.layer, Subject(self.machine, tuned.layer)
        defaults = subject.problem({}).heuristic.plans
        if not self.machine.dry:
            wrong = subject.judge(defaults)
            if wrong:
                tuned.failure = f"{layer.name}: the default plans fail the numeric gate ({wrong})"
                self.say(tuned.failure)
                return
        winners = dict(defaults)
        for pass_ in subject.passes:
            if self.out_of_time():
                tuned.left.append(f"{layer.name} {pass_}: no time was left")
                continue
            row = self._pass(subject, pass_)
            if row is None:
                tuned.left.append(f"{layer.name} {pass_}: there was time for the default plan only")
                continue
            tuned.rows.append(row)
            winners[pass_] = Plan.of_data(row.plan)
        if winners != defaults and not self.machine.dry:
            wrong = subject.judge(winners)
            if wrong:
                raise TuneError(f"{layer.name}: plans that were right one by one are wrong together ({wrong})")
        for training in (False, True) if any(subject.needs) else (False,):
            mode = "training" if training else "inference"
            if self.out_of_time():
                tuned.left.append(f"{layer.name} {mode}, beside torch: no time was left")
                continue
            try:
                tuned.rows.append(self._verdict(subject, winners, mode))
            except torch.OutOfMemoryError:  # torch keeps tensors that this library does not
                tuned.left.append(f"{layer.name} {mode}, beside torch: the device has too little memory")

    # A pass.

    def _pass(self, subject: Subject, pass_: str) -> tables.PlanRow | None:
        """The row of a pass; None where there was time for the default plan only."""
        heuristic = subject.problem({}).heuristic
        default = heuristic.plans[pass_]
        trial = Trial(self.machine, subject, pass_)
        timed: dict[Plan, Timed] = {}
        refused: list[str] = []
        times = 1

        def try_all(candidates: Iterable[Plan]) -> None:
            nonlocal times
            for candidate in candidates:
                keeps = heuristic.keeps_order(pass_, candidate)
                if candidate in timed or not (keeps or self.any_order):
                    continue
                if timed and (len(timed) == self.plans or self.out_of_time()):
                    return
                try:
                    calls = trial.calls(candidate, keeps)
                except Refused as reason:
                    if candidate == default:
                        raise TuneError(f"{subject.layer.name} {pass_}: the default plan {reason}") from reason
                    refused.append(f"{candidate}: {reason}")
                    continue
                replay = self.machine.capture(calls, times)
                samples = self.machine.time(replay, QUICK_ROUNDS)
                timed[candidate] = Timed(candidate, calls, keeps, Interval.of(samples).scaled(1 / (times * len(calls))))
                times = self.machine.times(timed[default].time.median * len(calls))

        try_all(heuristic.candidates(pass_))
        for best in _fastest(timed.values(), default)[:REFINED]:
            try_all(c for c in with_other_stages_and_warps(best.plan) if heuristic.fits(pass_, c))
        counts = f"{len(timed)} plans timed" + (f", {len(refused)} refused" if refused else "")
        if len(timed) == 1 and self.out_of_time():
            return None
        finalists = [timed[default], *_finalists(timed.values(), default)]
        self._time_again(finalists, times)
        winner, runner_up = decide([t for t in finalists if t.keeps_order])
        row = tables.PlanRow(
            op=subject.layer.op.name,
            pass_=pass_,
            problem=subject.problem({}).signature,
            plan=winner.plan.data,
            us=_microseconds(winner.time),
            default_us=_microseconds(timed[default].time),
            runner_up=runner_up and tables.RunnerUp(runner_up.plan.data, _microseconds(runner_up.time)),
            candidates=len(timed),
            provenance=self._provenance(subject),
        )
        outcome = "the default plan stays" if winner is timed[default] else str(winner.plan)
        gain = f"{row.default_us.median:.2f} -> {row.us.median:.2f} us"
        self.say(f"{subject.layer.name} {pass_}: {gain}, {outcome} ({counts})")
        for reason in refused:
            self.say(f"    refused: {reason}")
        for other in finalists:
            if not other.keeps_order:
                self.say(f"    in another order of sums: {1e6 * other.time.median:.2f} us, {other.plan}")
        return row

    def _time_again(self, finalists: Sequence[Timed], times: int) -> None:
        """Give the finalists a time of many rounds, in turns."""
        replays = [self.machine.capture(t.calls, times) for t in finalists]
        scales = [1 / (times * len(t.calls)) for t in finalists]
        medians = [t.time.median / scale for t, scale in zip(finalists, scales, strict=True)]
        for t, samples, scale in zip(finalists, self._in_turns(replays, medians), scales, strict=True):
            t.time = Interval.of(samples).scaled(scale)

    def _in_turns(self, replays: Sequence[Call], seconds: Sequence[float]) -> list[list[float]]:
        """Samples of each replay, taken in turns; one replay takes about `seconds`."""
        samples: list[list[float]] = [[] for _ in replays]
        for _ in range(1 if self.machine.dry else TURNS):
            for replay, one, series in zip(replays, seconds, samples, strict=True):
                series += self.machine.time(replay, min(max(3, round(TURN_SECONDS / one)), 50))
        return samples

    # The whole op, beside torch.

    def _verdict(self, subject: Subject, plans: Mapping[str, Plan], mode: str) -> tables.VerdictRow:
        """This library's time with these plans, and that of the fastest way to write the op in torch."""
        op, layer = subject.layer.op, subject.layer
        ways = {"ours": lambda *tensors: op(*tensors, *layer.options), **torch_ways(op, subject.options)}
        with plan.using(plan=plans):
            calls = {name: subject.whole(way, mode) for name, way in ways.items()}
            for one in (one for same in calls.values() for one in same):
                one()
            replays = [self.machine.capture(same) for same in calls.values()]
        seconds = [Interval.of(self.machine.time(replay, 3)).median for replay in replays]
        scale = 1 / len(subject.copies)
        samples = self._in_turns(replays, seconds)
        times = {name: Interval.of(s).scaled(scale) for name, s in zip(calls, samples, strict=True)}
        ours = times.pop("ours")
        rival = min(times, key=lambda name: times[name].median)
        self.say(
            f"{layer.name} {mode}: {1e6 * ours.median:.2f} us, {rival} {1e6 * times[rival].median:.2f} us: "
            f"{times[rival].median / ours.median:.2f}x"
        )
        return tables.VerdictRow(
            op=op.name,
            pass_=mode,
            problem=subject.problem({}).signature,
            us=_microseconds(ours),
            rival=rival,
            rival_us=_microseconds(times[rival]),
            provenance=self._provenance(subject),
        )

    def _provenance(self, subject: Subject) -> tables.Provenance:
        facts = self.machine.facts()
        known = {name: facts[name] for name in ("gpu", "driver", "torch", "triton", "date")}
        return tables.Provenance(**known, revision=self.revision, batch=subject.layer.batch)


def _microseconds(seconds: Interval) -> tables.Time:
    return tables.Time(**{name: round(1e6 * value, 3) for name, value in vars(seconds).items()})


def decide(timed: Sequence[Timed]) -> tuple[Timed, Timed | None]:
    """Which plan to keep, and the next best; the first is the default plan. The fastest is kept if its interval lies
    below that of the default plan, else the default plan is."""
    default, *others = timed
    fastest = min(others, key=lambda t: t.time.median, default=default)
    winner = fastest if fastest.time.high < default.time.low else default
    rest = [t for t in timed if t is not winner]
    return winner, min(rest, key=lambda t: t.time.median, default=None)


def _fastest(timed: Iterable[Timed], default: Plan) -> list[Timed]:
    """The plans but the default one, fastest first."""
    return sorted((t for t in timed if t.plan != default), key=lambda t: t.time.median)


def _finalists(timed: Iterable[Timed], default: Plan) -> list[Timed]:
    """The few fastest plans that keep the order of sums, and the few fastest others."""
    ranked = _fastest(timed, default)
    return [t for keeps in (True, False) for t in [t for t in ranked if t.keeps_order == keeps][:FINALISTS]]


def torch_ways(op: Op, options: tuple[Any, ...]) -> dict[str, Callable[..., torch.Tensor]]:
    """An op in plain torch, by name: its reference, and its rival "eager" where it has one for these options."""
    ways = {"reference": lambda *tensors: op.reference(*tensors, *options)}
    rival: Rival | None = op.rivals.get("eager")
    if rival is not None:
        with suppress(Unavailable):
            ways["eager"] = rival.build(options)
    return ways


@contextmanager
def _plain_torch(device: torch.device) -> Iterator[None]:
    """Within the block torch computes gradients and casts nothing, and cuDNN looks for its fastest algorithm."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


# A user's own model.


def layers_of(explanations: Iterable[Explanation]) -> list[Layer]:
    """The calls that took kernels, each problem once: that with the largest batch."""
    layers: dict[tuple[str, str], Layer] = {}
    for note in explanations:
        if note.problem is None:
            continue
        name = f"{note.op} {' '.join('x'.join(map(str, t.shape)) for t in note.tensors[:2] if t is not None)}"
        layer = Layer(name, REGISTRY[note.op], note.tensors, note.options)
        key = (note.op, note.problem.signature)
        if layer.batch and (key not in layers or layer.batch > layers[key].batch):
            layers[key] = layer
    return list(layers.values())


def tune_model(
    module: Callable[..., Any],
    *inputs: Any,
    budget: float = 300.0,
    dtype: torch.dtype | None = None,
    say: Callable[[str], Any] = tell,
) -> list[Tuned]:
    """Measure plans for this library's ops in one forward of `module(*inputs)`, on the GPU that the inputs are on, and
    keep them in the user's table, which processes that start from now on use.

    budget: how many seconds to spend. dtype: autocast's in that forward. say: called with lines on the progress.
    Buffers of the module, such as running means, are left as they were. Raises NothingToTune where there is no GPU, no
    op of this library or no folder for the table, and TuneError where the device breaks.
    """
    devices = [t.device for t in inputs if isinstance(t, torch.Tensor)]
    if not devices or devices[0].type != "cuda":
        raise NothingToTune(f"plans are measured on a GPU, and the inputs are on {devices[0] if devices else 'none'}")
    return tune_on(Machine(devices[0]), module, inputs, budget, dtype, say)


def tune_on(
    machine: Machine, module: Callable[..., Any], inputs: Sequence[Any], budget: float, dtype, say
) -> list[Tuned]:
    """tune_model, on this machine."""
    arch = plan.facts(machine.device).arch
    path = tables.user_file(arch)
    if path is None:
        raise NothingToTune("platformdirs is not installed: there is no folder for a user's table")
    layers = layers_of(calls_of(machine.device, module, inputs, dtype))
    if not layers:
        raise NothingToTune("the forward called no op of this library that takes kernels")
    keeper = tables.Keeper(path, arch, private=True)
    tuner = Tuner(machine, seconds=budget, revision=f"tritonshare {__version__}", say=say)
    done = []
    for layer in layers:
        done.append(tuner.tune(layer))
        if done[-1].rows:
            keeper.add(done[-1].rows)
    for sentence in (sentence for tuned in done for sentence in tuned.left):
        say(f"left: {sentence}")
    say(f"{sum(len(tuned.rows) for tuned in done)} rows for {path}")
    return done


def calls_of(device: torch.device, module: Callable[..., Any], inputs: Sequence[Any], dtype) -> list[Explanation]:
    """The calls of this library's ops in one forward."""
    buffers = [(b, b.clone()) for b in module.buffers()] if isinstance(module, torch.nn.Module) else []
    autocast = torch.autocast(device.type, dtype) if dtype is not None else nullcontext()
    with explaining() as notes, torch.enable_grad(), autocast:
        module(*inputs)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return notes
