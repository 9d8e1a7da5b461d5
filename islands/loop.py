"""A training that survives: steps, commits, metrics and a heartbeat around one loss.

The base, an expert and a gate head are trained by this one loop; only their loss differs. Resuming
is running it again: it starts at the newest commit that verifies. `metrics.jsonl` holds what
follows from data and seeds alone; clocks go to `heartbeat.json` and `journal.jsonl`.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from atoll.core.checkpoint import Checkpoint, Checkpoints
from atoll.core.errors import Failed, Interrupted, Refused
from atoll.core.journal import log, progress
from atoll.core.manifest import Plan
from atoll.core.storage import Storage
from atoll.islands.compute import device_name
from atoll.islands.step import Loss, learning_rate_at, take_step

HEARTBEAT_SECONDS = 2.0
_METRIC_LINES = 100  # over a whole training


@dataclass(frozen=True)
class Course:
    """How one training runs: the plan and what the optimiser is told."""

    plan: Plan
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup: float
    clip: float
    ema_decay: float
    checkpoints: int
    bitwise_resume: bool = True  # else a resume on other hardware or versions is only journalled


@dataclass
class _Sum:
    """Means between two metric lines, carried through a checkpoint."""

    loss: float = 0.0
    norm: float = 0.0
    steps: int = 0


@contextmanager
def stop_on_sigterm() -> Iterator[list[bool]]:
    """A flag that SIGTERM sets: the loop then commits and leaves as interrupted."""
    flag = [False]

    def handle(_signal: int, _frame: FrameType | None) -> None:
        flag[0] = True

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)


class Loop:
    """One training at one place of the run, `folder`, by the one writer that claimed it."""

    def __init__(
        self, storage: Storage, folder: str, module: nn.Module, course: Course, *, name: str
    ) -> None:
        self._storage = storage
        self._folder = folder
        self._course = course
        self._name = name
        self._checkpoints = Checkpoints(storage, folder)
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self._names = [n for n, _ in named]
        self._parameters = [p for _, p in named]
        self._module = module
        self._averaged = [p.detach().clone() for p in self._parameters]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=course.learning_rate,
            betas=course.betas,
            weight_decay=course.weight_decay,
            fused=True,
        )
        self._sum = _Sum()

    def run(self, loss: Loss) -> None:
        """Train to the planned images_seen; the module then holds the averaged weights.

        Raises `Interrupted` after SIGTERM (committed), `Fenced` when another writer took over and
        `Failed` when the loss is no longer finite.
        """
        generation = self._checkpoints.claim()
        seen = self._resume(generation)
        total, batch = self._course.plan.images_seen, self._course.plan.batch
        every = batch * max(1, round(total / batch / self._course.checkpoints))
        line = batch * max(1, round(total / batch / _METRIC_LINES))
        self._module.train()
        started, first, beat = time.time(), seen, 0.0
        with progress(self._name, total, done=seen) as advance, stop_on_sigterm() as stop:
            while seen < total:
                seen = self._step(loss, seen)
                advance(batch, note=f"loss {self._sum.loss / max(1, self._sum.steps):.3f}")
                if seen % line == 0 or seen == total:
                    self._write_metrics(seen)
                if seen % every == 0 or seen == total or stop[0]:
                    self._commit(seen)
                if time.time() - beat > HEARTBEAT_SECONDS or seen == total:
                    beat = time.time()
                    self._beat(seen, generation, (seen - first) / max(beat - started, 1e-9))
                if stop[0] and seen < total:
                    raise Interrupted(
                        f"Stopped {self._name} at {seen} of {total} images, committed",
                        cure="run the same command again, it resumes",
                    )
        seconds = time.time() - started
        self._journal(
            {
                "event": "trained", "name": self._name, "generation": generation,
                "from_images_seen": first, "images_seen": seen, "seconds": seconds,
                "images_per_second": (seen - first) / max(seconds, 1e-9),
            }
        )  # fmt: skip
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self._averaged, strict=True):
                parameter.copy_(average)
        self._module.eval()

    def _step(self, loss: Loss, seen: int) -> int:
        course = self._course
        total, batch = course.plan.images_seen, course.plan.batch
        value = loss(seen, batch)
        if not torch.isfinite(value):
            raise Failed(
                f"The loss of {self._name} is {float(value.detach())} after {seen} images",
                cure="lower training.optimizer.learning_rate; the last checkpoint is kept",
            )
        norm = take_step(
            value,
            self._parameters,
            self._optimizer,
            self._averaged,
            learning_rate=learning_rate_at(course.learning_rate, seen, total, course.warmup),
            clip=course.clip,
            ema_decay=course.ema_decay,
            step=seen // batch,
        )
        self._sum.loss += float(value.detach())
        self._sum.norm += norm
        self._sum.steps += 1
        return seen + batch

    # -- the state on disk -----------------------------------------------------------------------

    def _commit(self, seen: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter, average in zip(
            self._names, self._parameters, self._averaged, strict=True
        ):
            tensors[f"weights/{name}"] = parameter.detach()
            tensors[f"average/{name}"] = average
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        self._checkpoints.commit(seen, tensors, {**self._facts(), "sum": vars(self._sum)})

    def _facts(self) -> dict[str, Any]:
        """What must be the same for a resume to be bitwise."""
        return {
            "plan": self._course.plan.model_dump(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if self._parameters[0].is_cuda else None,
            "numpy": np.__version__,  # the order of records is its permutation
            "diffusers": diffusers.__version__,
            "device": device_name(self._parameters[0].device),
        }

    def _resume(self, generation: int) -> int:
        latest = self._checkpoints.latest()
        if latest is None:
            self._keep_metrics(0)
            return 0
        facts = {key: value for key, value in latest.facts.items() if key != "sum"}
        if facts != self._facts():
            self._resume_otherwise(facts, generation, latest.images_seen)
        self._restore(latest)
        self._sum = _Sum(**latest.facts["sum"])
        self._keep_metrics(latest.images_seen)
        return latest.images_seen

    def _resume_otherwise(self, facts: dict[str, Any], generation: int, seen: int) -> None:
        """Refuse what would not be bitwise, or write down that it is not."""
        if facts["plan"] != self._facts()["plan"] or self._course.bitwise_resume:
            raise Refused(
                f"The checkpoint of {self._name} was made otherwise: {facts}",
                allowed=f"{self._facts()}",
                cure="use the same plan, threads and versions; where only the plan is the same, "
                "--allow-inexact-resume goes on, and the result is not bitwise what it would be",
            )
        log.warning("%s goes on from %d images, not bitwise: it was %s", self._name, seen, facts)
        self._journal(
            {
                "event": "resumed", "name": self._name, "generation": generation, "bitwise": False,
                "images_seen": seen, "was": facts, "is": self._facts(),
            }
        )  # fmt: skip

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors
        with torch.no_grad():
            for name, parameter, average in zip(
                self._names, self._parameters, self._averaged, strict=True
            ):
                parameter.copy_(tensors[f"weights/{name}"])
                average.copy_(tensors[f"average/{name}"])
                self._optimizer.state[parameter] = {
                    key: tensors[f"optimizer/{key}/{name}"].to(parameter.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    # -- what is said ----------------------------------------------------------------------------

    def _write_metrics(self, seen: int) -> None:
        line = {
            "images_seen": seen,
            "loss": self._sum.loss / self._sum.steps,
            "gradient_norm": self._sum.norm / self._sum.steps,
        }
        self._sum = _Sum()
        self._storage.append_line(f"{self._folder}/metrics.jsonl", json.dumps(line))

    def _keep_metrics(self, seen: int) -> None:
        """Drop the lines of steps that were lost with a killed writer, torn ones included."""
        name = f"{self._folder}/metrics.jsonl"
        if not self._storage.exists(name):
            return
        kept = []
        for text in self._storage.read_bytes(name).decode(errors="replace").splitlines():
            try:
                if json.loads(text)["images_seen"] <= seen:
                    kept.append(text + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        self._storage.write_bytes(name, "".join(kept).encode())

    def _beat(self, seen: int, generation: int, images_per_second: float) -> None:
        self._checkpoints.check_fence()
        self._storage.write_json(
            f"{self._folder}/heartbeat.json",
            {
                "schema_version": 1,
                "generation": generation,
                "images_seen": seen,
                "of": self._course.plan.images_seen,
                "images_per_second": round(images_per_second, 3),
                "unix_seconds": round(time.time(), 3),
            },
        )

    def _journal(self, line: dict[str, Any]) -> None:
        self._storage.append_line(f"{self._folder}/journal.jsonl", json.dumps(line))
