"""The processor that an island trains on: its threads, its accelerator, its kernels.

Bitwise resume holds for the same accelerator model, versions and threads with deterministic
kernels, so these are chosen here and nowhere else, and a checkpoint records them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from atoll.core.errors import ConfigError
from atoll.core.journal import log

Device = Literal["auto", "cpu", "cuda"]


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
    """What must be the same for the same bits: "cpu", or the accelerator's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
