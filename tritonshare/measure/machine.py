"""A GPU to measure on: its clock, its memory, and what it reports about itself.

    gpu = Machine(torch.device("cuda"))
    replay = gpu.capture([lambda: function(x) for x in copies])
    seconds = gpu.time(replay, rounds=50)

A call's device time is that of a CUDA graph which holds the call once for each of several copies of its tensors. It
includes no host time, and no copy is still in the L2 cache when its turn comes again.
"""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil, inf, sqrt
from typing import Any

import torch

Call = Callable[[], Any]
REPLAY_SECONDS = 2e-3  # how long a timed replay takes, at least


@dataclass(frozen=True)
class Interval:
    """A median and its 95% confidence interval, in the samples' unit."""

    median: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.median <= self.high < inf:
            raise ValueError(f"0 < low <= median <= high does not hold for {self.low}, {self.median}, {self.high}")

    @classmethod
    def of(cls, samples: Sequence[float]) -> Interval:
        """By order statistics, which assume nothing about the distribution. For a handful of samples it is their
        range."""
        ordered = sorted(samples)
        n = len(ordered)
        reach = 1.96 * sqrt(n) / 2
        low, high = max(0, int(n / 2 - reach)), min(n - 1, ceil(n / 2 + reach))
        middle = ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2
        return cls(middle, ordered[low], ordered[high])

    def scaled(self, factor: float) -> Interval:
        return Interval(self.median * factor, self.low * factor, self.high * factor)

    def over(self, other: Interval) -> Interval:
        """The ratio of two times, with the widest interval that theirs allow."""
        return Interval(self.median / other.median, self.low / other.high, self.high / other.low)


class Stamp:
    """A point in a stream's time. The difference of two is in seconds; taking it waits for both."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def __sub__(self, earlier: Stamp) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) * 1e-3


class Machine:
    """One CUDA device."""

    dry = False  # whether kernels are launched into nothing: see bench/dry.py

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._stream = torch.cuda.Stream(self.device)

    def stream(self) -> AbstractContextManager:
        """Within the block, work and its backward passes are issued to the stream that `capture` captures."""
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def stamp(self) -> Stamp:
        return Stamp(self._stream)

    def keep_busy(self) -> None:
        """Keep the device busy for some 20 microseconds, so that what is issued next is there when it begins."""
        with self.stream():
            torch.cuda._sleep(40_000)

    def capture(self, calls: Sequence[Call], times: int = 1) -> Call:
        """A function that replays the calls `times` times without their host time. They must have run before."""
        graph = torch.cuda.CUDAGraph()
        self.synchronize()
        results = []  # what a call returns is memory that the replay writes
        with torch.cuda.graph(graph, stream=self._stream):
            for _ in range(times):
                results = [call() for call in calls]

        def replay() -> Any:
            with self.stream():
                graph.replay()
            return results

        return replay

    def times(self, seconds: float) -> int:
        """How often a replay must repeat calls that take `seconds` together, so that the time of a stamp does not
        matter."""
        return min(max(1, round(REPLAY_SECONDS / seconds)), 256)

    def time(self, replay: Call, rounds: int) -> list[float]:
        """Seconds of each round."""
        replay()
        stamps = [self.stamp()]
        for _ in range(rounds):
            replay()
            stamps.append(self.stamp())
        return [late - early for early, late in pairwise(stamps)]

    def copies(self, nbytes: int) -> int:
        """How many copies of a call's tensors, `nbytes` together, outlast the L2 cache."""
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(64, 1 + ceil(2 * l2 / max(1, nbytes)))

    def peak_bytes(self, call: Call) -> int:
        """The most memory that a call holds at any time, beyond what was allocated before it. Its result is
        included."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del result
        return peak

    def launches(self, call: Call) -> int | None:
        """How often a call launches something on the device, copies and fills included; None if the profiler does not
        say."""
        from torch.profiler import ProfilerActivity, profile

        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            self.synchronize()
        on_device = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not event.is_user_annotation for event in on_device) or None

    @property
    def free_bytes(self) -> int:
        """Memory that tensors may take now."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    @cached_property
    def gpu(self) -> str:
        return torch.cuda.get_device_properties(self.device).name

    @cached_property
    def driver(self) -> str:
        return self._smi("driver_version")

    @cached_property
    def clocks(self) -> dict[str, str]:
        """Clock rates in MHz. Ask while the GPU has just been busy: an idle one lowers them."""
        fields = {"sm_mhz": "clocks.sm", "sm_max_mhz": "clocks.max.sm", "memory_mhz": "clocks.mem"}
        return {name: self._smi(field) for name, field in fields.items()}

    def facts(self) -> dict[str, Any]:
        """What must be recorded with every measurement."""
        import triton

        return {
            "gpu": self.gpu,
            "driver": self.driver,
            "clocks": self.clocks,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "dry": self.dry,
        }

    def _smi(self, field: str) -> str:
        """A field of nvidia-smi, "unknown" where it does not answer."""
        uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        return done.stdout.strip().splitlines()[0]
