"""The kernels in which an island's step spends its time."""

from __future__ import annotations

from itertools import islice
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from atoll.core.pack import Pack
from atoll.islands.step import prepare
from benchmarks.rows import Row, row
from benchmarks.steps import Features, stepping
from benchmarks.trainings import Case

_TOP = 10
_NAME = 100  # characters: those of templates are endless
_WARM, _STEPS = 3, 3


def kernels(case: Case, pack: Pack) -> list[Row]:
    """The ten that take longest, with their share of the time of all; on a CPU, operators."""
    denoiser = case.denoiser()
    prepare(denoiser, case.training, case.device)
    steps = stepping(case, pack, denoiser, Features())
    next(steps)
    for _ in islice(steps, _WARM):
        pass
    cuda = case.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        for _ in islice(steps, _STEPS):
            pass
        case.wait()
    steps.close()
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    device = DeviceType.CUDA if cuda else DeviceType.CPU
    events: list[Any] = [
        event
        for event in seen.key_averages()
        if event.device_type == device and not event.is_user_annotation
    ]
    events.sort(key=lambda event: getattr(event, spent), reverse=True)
    total = max(sum(getattr(event, spent) for event in events), 1)
    rows = []
    for place, event in enumerate(events[:_TOP], start=1):
        microseconds, name = getattr(event, spent), f"kernel {place}: {event.key[:_NAME]}"
        part = f"{microseconds / total:.1%} of all, {event.count // _STEPS} calls a step"
        milliseconds = microseconds / _STEPS / 1e3
        rows.append(row(f"{case.name} {name}", milliseconds, "ms/step", against=part))
    return rows
