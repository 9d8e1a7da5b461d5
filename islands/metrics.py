"""`metrics.jsonl`: a line of means now and then; no clock, so that its bits can be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from atoll.core.manifest import Plan
from atoll.core.storage import Storage
from atoll.islands.group import Group
from atoll.islands.step import Taken

_LINES = 100  # over a whole training
_BANDS = 8  # of t, equally wide: a mean over t hides what a network fails at


class Means:
    """Sums between two lines, carried through a checkpoint; added up step by step in float64.

    Losses and norms are the group's. The bands are each rank's own, and added up in the order of
    ranks only where they are read, so that it makes no difference when checkpoints are made.
    """

    def __init__(self, group: Group, state: Mapping[str, Any] | None = None) -> None:
        self._group = group
        self.loss_sum = float(state["loss_sum"]) if state else 0.0
        self.norm_sum = float(state["norm_sum"]) if state else 0.0
        self.steps = int(state["steps"]) if state else 0
        # Errors and how many, per band of t; on the device, so that no step waits for them.
        self._bands = _own_bands(group, state["bands"] if state else [])

    @property
    def loss(self) -> float:
        """The mean loss, 0 before the first step."""
        return self.loss_sum / max(1, self.steps)

    def add(self, taken: Taken) -> None:
        """Count a step that was applied."""
        self.loss_sum += taken.loss
        self.norm_sum += taken.norm
        self.steps += 1
        for part in taken.parts:
            band = (part.t * _BANDS).long().clamp(0, _BANDS - 1)
            both = torch.stack([part.each.double(), torch.ones_like(part.each).double()])
            self._bands = self._bands.to(both.device).index_add(1, band, both)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "loss_sum": self.loss_sum,
            "norm_sum": self.norm_sum,
            "steps": self.steps,
            "bands": self._group.gather(self._bands.tolist()),
        }

    def line(self, seen: int) -> dict[str, Any]:
        """The means; `error_by_t` is the unweighted error per band of t, null where none fell."""
        sums, counts = _added(self._group.gather(self._bands.tolist())).tolist()
        return {
            "images_seen": seen,
            "loss": self.loss,
            "gradient_norm": self.norm_sum / max(1, self.steps),
            "error_by_t": [
                value / count if count else None for value, count in zip(sums, counts, strict=True)
            ],
        }


def _added(bands: list[list[list[float]]]) -> torch.Tensor:
    return torch.tensor(bands, dtype=torch.float64).sum(0)


def _own_bands(group: Group, bands: list[list[list[float]]]) -> torch.Tensor:
    """What a checkpoint kept of this rank; of another number of ranks, the first takes all."""
    if len(bands) == group.world:
        return torch.tensor(bands[group.rank], dtype=torch.float64)
    kept = bands and group.leads
    return _added(bands) if kept else torch.zeros(2, _BANDS, dtype=torch.float64)


class Metrics:
    """The lines of one training."""

    def __init__(self, storage: Storage, folder: str, plan: Plan) -> None:
        self.name = f"{folder}/metrics.jsonl"
        self._storage = storage
        self._plan = plan
        self._every = plan.batch * max(1, round(plan.images_seen / plan.batch / _LINES))
        self._lines: list[str] = []

    def due(self, seen: int) -> bool:
        """Whether a line belongs after this many images."""
        return seen % self._every == 0 or seen == self._plan.images_seen

    def add(self, seen: int, means: Means) -> bytes:
        """Add a line; the whole file, which is written anew so that stores need no appending."""
        self._lines.append(json.dumps(means.line(seen)) + "\n")
        return "".join(self._lines).encode()

    def keep(self, seen: int, check: Callable[[], None]) -> None:
        """Drop the lines of steps that were lost with a killed writer, torn ones included.

        `check` raises where another writer has taken over.
        """
        if not self._lines and self._storage.exists(self.name):
            read = self._storage.read_bytes(self.name).decode(errors="replace")
            self._lines = [line + "\n" for line in read.splitlines()]
        self._lines = [line for line in self._lines if _seen(line) <= seen]
        if self._storage.exists(self.name):
            self._storage.write_bytes(self.name, "".join(self._lines).encode(), check=check)


def _seen(line: str) -> float:
    try:
        return float(json.loads(line)["images_seen"])
    except (ValueError, KeyError, TypeError):
        return math.inf
