"""Which updates are refused, and which images are skipped for it (`GuardConfig` says why)."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from atoll.core.errors import Failed
from atoll.core.manifest import Plan
from atoll.islands.settings import GuardConfig

_WINDOW = 64  # steps whose gradient norms say what is usual
_LEAST = 16  # and how many there must be before anything is unusual


class Guard:
    """The norms of late, and the ranges of images_seen that are left out."""

    def __init__(self, config: GuardConfig, plan: Plan, name: str) -> None:
        self._config = config
        self._plan = plan
        self._name = name
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._skipped: list[dict[str, int]] = []  # first, end, and the commit gone back to

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether an update with this loss and gradient norm may be applied."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        spike = self._config.spike
        if spike is not None and len(self._norms) >= _LEAST:
            usual = statistics.median(self._norms)
            if usual > 0 and norm > spike * usual:
                return False
        self._norms.append(norm)
        return True

    def refuse(self, first: int, committed: int, *, loss: float, norm: float) -> tuple[int, int]:
        """Skip the batch at `first` and, from the second time on, more before it.

        Returns the range. Raises `Failed` where skipping has not helped.
        """
        batch = self._plan.batch
        before = sum(range_["commit"] == committed for range_ in self._skipped)
        start = max(committed, first - (2**before - 1) * batch)
        skipped = {"first": start, "end": first + batch, "commit": committed}
        if before >= self._config.attempts:
            raise self._hopeless(first, loss, norm, f"{before} attempts from {committed} on")
        ranges = [*self._skipped, skipped]
        left_out = sum(self._in(ranges, seen) for seen in range(0, first + batch, batch)) * batch
        if left_out > max(batch, self._config.share * self._plan.images_seen):
            raise self._hopeless(first, loss, norm, f"{left_out} images would be skipped")
        self._skipped = ranges
        return start, first + batch

    def skips(self, seen: int) -> bool:
        """Whether the batch at this position is left out."""
        return self._in(self._skipped, seen)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"norms": list(self._norms), "skipped": [dict(range_) for range_ in self._skipped]}

    def restore(self, state: Mapping[str, Any], *, keep_ranges: bool = False) -> None:
        """What `state` gave; `keep_ranges` where a training goes back and has learnt of more."""
        self._norms = deque(state["norms"], maxlen=_WINDOW)
        if not keep_ranges:
            self._skipped = [dict(range_) for range_ in state["skipped"]]

    @staticmethod
    def _in(ranges: list[dict[str, int]], seen: int) -> bool:
        return any(range_["first"] <= seen < range_["end"] for range_ in ranges)

    def _hopeless(self, first: int, loss: float, norm: float, tried: str) -> Failed:
        return Failed(
            f"The loss of {self._name} is {loss:g} with a gradient of {norm:g} after {first} "
            f"images; {tried}",
            cure="lower the learning rate (training.optimizer.learning_rate, of a gate head "
            "head.learning_rate), or look into the data there; the last checkpoint is kept, and "
            "--allow-inexact-resume goes on from it with other settings",
        )
