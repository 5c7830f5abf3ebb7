"""A day at a GPU as one command: tests of the kernels, then the benchmarks, in the minutes given.

    python -m bench.gpu_day                            9.5 minutes; results in runs/gpu-DATE
    python -m bench.gpu_day --steps tests,layers       these steps, in this order
    python -m bench.gpu_day --again DIR --minutes 2    what failed, or was not reached, in the day that is in DIR
    python -m bench.report DIR/layers.json DIR/compiled.json ... -o report.html        afterwards, anywhere

A step has its share of the time that is left: what one spares is for the next ones. What there is no time for is left
out, and said. Results are files that are whole at any time, so that a day that is killed has lost seconds. Nothing else
is left behind: caches, and the package as an installation would lay it out, are in a scratch folder.

Works from a checkout that is not installed, without a network. Exit status: 0 if nothing failed, though steps may have
been cut short; 1 if something did, or no test was run; 2 for bad usage, or no GPU; 130 if interrupted.

Triton's cache is taken from `--cache FILE` where that is there, and packed up in it at the end. One that was filled
elsewhere is of use if the version, build and Python of Triton are the same; its paths are not (bench/triton_cache.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic

from bench import outcomes, triton_cache

ROOT = Path(__file__).parents[1]
LEAST = 5.0  # seconds: with less, a step is not begun
GRACE = 20.0  # seconds that a command has to end once it is told to
WORKERS = min(8, os.cpu_count() or 1)  # each holds a context of its own on the GPU, some 500 MB

# Steps, and their shares in the time. The usual ones come first, in the order of their worth: right before fast.
STEPS = {"facts": 5, "tests": 45, "layers": 15, "compiled": 10, "optimizers": 11, "ops": 14}
USUAL = tuple(STEPS)
STEPS |= {"host": 10, "memcheck": 10, "racecheck": 10, "tune": 20}

# Of lists and of these settings a dry run does the first.
COMPILED = ("article_conv2", "cifar_conv1", "mnist_conv1", "impala_s2", "resnet_stem", "vgg1_2")
LAYERS = (*COMPILED, "article_conv1", "vggish_conv1", "impala_s1", "vgg4_3", "kernelbench_l2_82", "kernelbench_l2_35",
          "dqn_conv1")  # fmt: skip
BLOCK = "conv2d_act_pool"
OTHERS = ("nearest", "shared_linear", "similarity_reduce", "segment_sum", "shared_conv2d_act_pool", "similarity_weight")
RULES = ("AdamW", "momentum", "SGD")
SUITE = "bench/test_suite.py"
WAY = {"dtype": ["bf16"], "layout": ["channels_last"], "pass": ["inference", "both"]}

FACTS = """
import importlib.metadata, sys, tritonshare
for found in sorted(importlib.metadata.distributions(), key=lambda found: found.name.lower()):
    print(found.name, found.version)
print("python", sys.version)
print("tritonshare", tritonshare.__file__)
from tritonshare.cli import main
sys.exit(main(["doctor", "--no-check"]))
"""

Commands = Iterator[list[str]]
Run = Callable[[list[str], Path, float, Mapping[str, str]], "int | None"]


def run(command: list[str], log: Path, seconds: float, environment: Mapping[str, str]) -> int | None:
    """The command's exit status, or None if it did not end in the time given."""
    with log.open("a") as output:
        print("$", shlex.join(command), file=output, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # of an interrupted day, too; and no process of the command outlives it
            for how, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, how)
                    process.wait(patience)


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def options(**chosen: Sequence[str]) -> list[str]:
    return [f"--{name}={value}" for name, values in chosen.items() for value in values]


class Day:
    """Steps are methods that yield their commands; `left` is what the step that is on has of its time, in seconds."""

    def __init__(self, args: argparse.Namespace, scratch: Path, run: Run, clock: Callable[[], float]) -> None:
        self.args, self.out, self.scratch, self.run, self.clock = args, args.out, scratch, run, clock
        self.environment = environment(scratch)
        self.revision = options(revision=[args.revision] if args.revision else [])
        self.day_end = self.step_end = clock() + 60 * args.minutes
        self.failed = False

    @property
    def left(self) -> float:
        return self.step_end - self.clock()

    def some(self, values: Sequence[str]) -> Sequence[str]:
        """Of a list, what a dry run does."""
        return values[:1] if self.args.dry else values

    # Commands.

    def of_lane(self, *arguments: object) -> list[str]:
        lane = ("--lane=dry", "-m", "not long") if self.args.dry else ("--lane=gpu",)
        return python("-m", "pytest", *lane, *arguments)

    def rows(self, name: str, *arguments: object, **chosen: Sequence[str]) -> list[str]:
        """Rows of the benchmarks, as many as there is time for; what was done of them before is not done again."""
        minutes = max(self.left - GRACE, 0) / 60
        results, before = self.out / f"{name}.json", self.args.again and self.args.again / f"{name}.json"
        more = [f"--done={before}"] if before and before.exists() else []
        more += ["--dry"] if self.args.dry else []
        return python("-m", "pytest", *arguments, "-q", "-rfE", f"--results={results}", f"--minutes={minutes:.2f}",
                      *self.revision, *more, *options(**chosen))  # fmt: skip

    # Steps.

    def facts(self) -> Commands:
        if shutil.which("nvidia-smi"):
            yield ["nvidia-smi", "-q"]
        yield python("-c", FACTS)

    def tests(self) -> Commands:
        chosen = ["tests/test_ops_gpu.py", "tests/test_optim_gpu.py"]
        if self.args.again and (before := self.args.again / "tests.jsonl").exists():
            had = outcomes.read(before)
            chosen = next(filter(None, ([id for id in had if had[id] == what] for what in ("failed", "not run"))), [])
        if chosen:  # whoever is free takes the next one: in the order of their worth
            yield self.of_lane(*chosen, "-n", WORKERS, "--dist=load", "--maxschedchunk=1", "--durations=25",
                               "-p", "bench.outcomes", "--outcomes", self.out / "tests.jsonl")  # fmt: skip

    def layers(self) -> Commands:
        yield self.rows("layers", SUITE, **WAY, op=[BLOCK], case=self.some(LAYERS), provider=["ours", "eager"])

    def compiled(self) -> Commands:
        yield self.rows("compiled", SUITE, **WAY, op=[BLOCK], case=self.some(COMPILED), provider=["compile"])

    def optimizers(self) -> Commands:
        few = {"case": ["nature_dqn"], "dtype": ["fp32"]} if self.args.dry else {}
        provider = ["ours", "fused", "foreach"]
        yield self.rows("optimizers", "bench/test_optim.py::test_step", op=self.some(RULES), provider=provider, **few)

    def ops(self) -> Commands:
        few = {"case": ["few_features"]} if self.args.dry else {}
        yield self.rows("ops", SUITE, **WAY, op=self.some(OTHERS), provider=["ours", "eager"], **few)

    # What else there is time for on another day.

    def host(self) -> Commands:
        few = ("-k", "segment_sum") if self.args.dry else ()
        yield self.rows("host", "bench/test_host.py", "bench/test_optim.py::test_host", *few)

    def memcheck(self) -> Commands:
        yield self.sanitized("memcheck", "--report-api-errors", "no")

    def racecheck(self) -> Commands:
        yield self.sanitized("racecheck")

    def sanitized(self, *tool: str) -> list[str]:
        checker = ["compute-sanitizer", "--error-exitcode=99", "--target-processes=application-only", "--tool", *tool]
        command = self.of_lane("tests/test_ops_gpu.py", "-k", "test_sanitized", "-v")
        # with a caching allocator's blocks around it, an access out of bounds would meet valid memory
        return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *([] if self.args.dry else checker), *command]

    def tune(self) -> Commands:
        """Into the package in the scratch folder, so that the steps after it measure with these plans."""
        shipped, all_ops = self.scratch / "lib/tritonshare/plans", (BLOCK, *OTHERS)
        for i, op in enumerate(self.some(all_ops)):
            budget = max(self.left - GRACE, 1) / (len(all_ops) - i)
            few = ["--case", LAYERS[0], "--dry", "--plans=2", "--out", shipped / "dry.json"] if self.args.dry else []
            yield python("-m", "bench.tune", op, f"--budget={budget:.0f}", *self.revision, *few)
        for table in shipped.glob("*.json"):
            shutil.copy(table, self.out / f"plans-{table.name}")

    # The day.

    def do(self, name: str, share: float) -> str:
        """What became of a step that has this share of the time that is left."""
        self.step_end = self.clock() + share * (self.day_end - self.clock())
        if self.left < LEAST:
            return "left out"
        status = "ok"
        for command in getattr(self, name)():
            if self.left <= 0:
                return "out of time" if status == "ok" else status
            code = self.run(command, self.out / "log.txt", self.left, self.environment)
            if code is None:
                return "out of time" if status == "ok" else status
            if code:
                status = f"failed ({code})"
        return status

    def go(self, steps: Sequence[str]) -> int:
        """Do the steps; the exit status."""
        self.tell("step", "status", "seconds", "")
        for i, name in enumerate(steps):
            begin = self.clock()
            try:
                status = self.do(name, STEPS[name] / sum(STEPS[later] for later in steps[i:]))
            except KeyboardInterrupt:
                self.tell(name, "interrupted", f"{self.clock() - begin:.0f}", self.found(name))
                return 130
            self.tell(name, status, f"{self.clock() - begin:.0f}", self.found(name))
            self.failed |= status.startswith("failed") or (name, status) == ("tests", "left out")
        return int(self.failed)

    def found(self, name: str) -> str:
        """What there is of a step's results."""
        if name == "tests" and (file := self.out / "tests.jsonl").exists():
            had = outcomes.read(file)
            failed = "".join(f"\n    failed: {id}" for id in had if had[id] == "failed")
            return counted(had.values()) + failed
        if (file := self.out / f"{name}.json").exists():
            found = json.loads(file.read_text())
            rows = [row["status"] for row in found["not_timed"]]
            return counted(["timed"] * len(found["benchmarks"]) + rows)
        return ""

    def tell(self, name: str, status: str, seconds: str, found: str) -> None:
        line = f"{name:<12} {status:<12} {seconds:>8}  {found}".rstrip()
        print(line, flush=True)
        with (self.out / "summary.txt").open("a") as summary:
            print(line, file=summary)


def counted(outcomes: Iterable[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in Counter(outcomes).most_common())


def environment(scratch: Path) -> dict[str, str]:
    """For commands that see the package as an installation would lay it out, and leave nothing behind."""
    ignored, package = shutil.ignore_patterns("__pycache__"), scratch / "lib/tritonshare"
    shutil.copytree(ROOT / "tritonshare", package, ignore=ignored)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=ignored)
    (scratch / "tmp").mkdir()
    path = os.pathsep.join(filter(None, (str(scratch / "lib"), str(ROOT), os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    for name in ("TRITON_INTERPRET", "PYTHONHOME"):
        kept.pop(name, None)
    flags = dict.fromkeys(("PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"), "1")
    folders = {"TMPDIR": "tmp", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    folders["XDG_CACHE_HOME"] = "cache"  # where a table of the user's own would be
    return {**kept, **flags, "PYTHONPATH": path, **{name: str(scratch / folder) for name, folder in folders.items()}}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--steps", default=",".join(USUAL), help=f"some of {','.join(STEPS)} (default: %(default)s)")
    add("--minutes", type=float, default=9.5, help="(default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="an empty or new folder (default: runs/gpu-DATE)")
    add("--again", type=Path, metavar="DIR", help="only what failed, or was not reached, by the results in DIR")
    add("--cache", type=Path, metavar="FILE", help="Triton's cache, taken from here, and packed up here")
    add("--revision", help="of the sources, where git cannot tell")
    add("--dry", action="store_true", help="without a GPU: a few small cases, kernels launched into nothing")
    args = parser.parse_args(argv)
    args.steps = args.steps.split(",")
    for name in args.steps:
        if name not in STEPS:
            parser.error(f"--steps: unknown step {name!r}; known are {', '.join(STEPS)}")
    now = datetime.now(timezone.utc)
    args.out = (args.out or ROOT / f"runs/gpu-{now:%Y%m%d-%H%M%S}").absolute()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out: {args.out} is not an empty folder")
    if args.again and not args.again.is_dir():
        parser.error(f"--again: there is no folder {args.again}")
    args.again, args.cache = (path and path.absolute() for path in (args.again, args.cache))
    if not args.dry:
        import torch

        if not torch.cuda.is_available():
            parser.error("no GPU: torch finds none (--dry runs all but the kernels without one)")
    return args


def main(argv: Sequence[str] | None = None, run: Run = run, clock: Callable[[], float] = monotonic) -> int:
    args = parsed(argv)
    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch, "triton")
        if args.cache and args.cache.exists():
            try:
                triton_cache.unpack(args.cache, compiled)
            except (OSError, tarfile.TarError) as error:
                print(f"bench.gpu_day: --cache: {args.cache} cannot be unpacked ({error})", file=sys.stderr)
                return 2
        args.out.mkdir(parents=True, exist_ok=True)
        status = Day(args, Path(scratch), run, clock).go(args.steps)
        if args.cache:
            triton_cache.pack(args.cache, compiled)
    print(f"all of it is in {args.out}")
    return status


if __name__ == "__main__":
    for told in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(told, signal.default_int_handler)
    raise SystemExit(main())
