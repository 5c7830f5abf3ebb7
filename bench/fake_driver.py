"""What Triton drivers without a GPU have in common: answers for a device, and a way to make one active for a while."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver as drivers
from triton.runtime.jit import JITFunction

# arch -> (multiprocessors, shared memory a program may ask for, in bytes): A100, H100 and H200, B200.
_DEVICES = {80: (108, 163 * 1024), 90: (132, 227 * 1024), 100: (148, 227 * 1024)}


class FakeDriver(DriverBase):
    """A driver that claims to be a GPU. Subclasses say what `load` makes of a binary, and what a launch does: for each
    kernel that it loads Triton builds a `launcher_cls`.

    Set `device` or `streams[device]` to move elsewhere. `binder_runs` counts passes through Triton's Python binder.
    """

    def __init__(self, arch: int = 90) -> None:
        super().__init__()
        multiprocessors, max_shared_mem = _DEVICES[arch]
        self.properties = {
            "max_shared_mem": max_shared_mem,
            "max_num_regs": 65536,
            "multiprocessor_count": multiprocessors,
            "warpSize": 32,
        }
        self.arch = arch
        self.device = 0
        self.streams: defaultdict[int, int] = defaultdict(int)
        self.binder_runs = 0
        # Names and signatures from here on are those that Triton calls.
        self.utils = SimpleNamespace(
            load_binary=self._load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: self.properties,
        )

    def load(self, name: str, binary: bytes, shared: int, device: int) -> Any:
        """The function that a launch gets."""
        raise NotImplementedError

    def _load_binary(self, name: str, binary: bytes, shared: int, device: int):
        module, registers, spills, max_threads = object(), 0, 0, 1024
        return module, self.load(name, binary, shared, device), registers, spills, max_threads

    @classmethod
    def is_active(cls) -> Any:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no launcher is built in C")

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        self.device = device

    def get_current_stream(self, device: int) -> int:
        return self.streams[device]

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self):
        raise NotImplementedError("tensors stay on the CPU")

    def get_benchmarker(self):
        raise NotImplementedError("time here says nothing of a GPU's")


Driver = TypeVar("Driver", bound=FakeDriver)


@contextmanager
def activated(driver: Driver) -> Iterator[Driver]:
    """Make a driver Triton's active one, and leave no trace of it in any kernel afterwards."""
    run, init_handles, previous = JITFunction.run, CompiledKernel._init_handles, drivers._active
    caches: dict[JITFunction, Any] = {}
    loaded: list[CompiledKernel] = []

    def counting_run(self, *args, grid, warmup, **kwargs):
        # A cache filled under another driver holds another target's kernels: every driver starts with its own.
        if self not in caches:
            caches[self] = self.device_caches
            self.device_caches = defaultdict(self.create_binder)
        driver.binder_runs += 1
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def noting_init_handles(self):
        if self.module is None:
            loaded.append(self)
        return init_handles(self)

    JITFunction.run, CompiledKernel._init_handles = counting_run, noting_init_handles
    drivers.set_active(driver)
    try:
        yield driver
    finally:
        JITFunction.run, CompiledKernel._init_handles = run, init_handles
        drivers._active = previous  # None where no driver was ever asked for
        for jit, cache in caches.items():
            jit.device_caches = cache
        for kernel in loaded:
            # Whoever still holds the kernel loads it anew, on the driver of that day.
            kernel.module = kernel.function = kernel._run = None
