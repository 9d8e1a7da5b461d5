"""The processor that an island trains on: its threads, its accelerator, its kernels.

Bitwise resume holds for the same model of accelerator or processor, versions and threads with
deterministic kernels, so these are chosen here and nowhere else, and a checkpoint records them.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from atoll.core.errors import ConfigError
from atoll.core.journal import log

Device = Literal["auto", "cpu", "cuda"]

# Sides of the matrices that are multiplied, and how many products are timed together: large enough
# that a device is busy, small enough that a slow one is done at once.
_SIDE = {"cpu": 512, "cuda": 4096}
_AT_ONCE = {"cpu": 1, "cuda": 16}
_RATE_SECONDS = 0.1


def chosen_device(device: Device) -> torch.device:
    """The device by name; `auto` takes a GPU where there is one, and says so."""
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ConfigError(
            "device is cuda and this machine has no CUDA device",
            allowed="auto, cpu",
            cure="leave device at auto, or run where a GPU is",
        )
    if device == "auto" and there:
        log.info("training on %s", torch.cuda.get_device_name())
    if device == "cpu" or not there:
        return torch.device("cpu")
    # By number: what a thread takes for the current device is the first one, not its process's.
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: torch.device) -> str:
    """What must be the same for the same bits: the model of the accelerator, or of the processor.

    On a processor the libraries choose their kernels by its instructions, and the blocks they sum
    in by its caches.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"


@cache
def _processor() -> str:
    """Model of this machine's processor: its name may be one for several, its numbers are not."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            found[key.strip()] = value.strip()
    numbers = [found[key] for key in ("cpu family", "model") if key in found]
    return " ".join([found.get("model name", platform.processor() or platform.machine()), *numbers])


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the device's own matrix product, at its best.

    A multiply-add is two operations. It takes a few tenths of a second and draws nothing.
    """
    side, count = _SIDE[device.type], _AT_ONCE[device.type]
    matrix = torch.linspace(-1, 1, side * side, device=device, dtype=dtype).view(side, side)
    product = matrix @ matrix  # loads what is loaded at the first call
    best, began = math.inf, time.monotonic()
    while time.monotonic() - began < _RATE_SECONDS or best == math.inf:
        _wait_for(device)
        started = time.perf_counter()
        for _ in range(count):
            torch.mm(matrix, matrix, out=product)
        _wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 * count / best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def computing(device: Device, threads: int) -> Iterator[torch.device]:
    """Train inside with this many threads and deterministic kernels; all is put back after."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    chosen = chosen_device(device)
    torch.set_num_threads(threads)
    if chosen.type == "cuda":
        # cuBLAS asks for this, before its first call, to repeat its sums in one order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
