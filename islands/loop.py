"""The loop around a training step: resume, guard, commits, heartbeat and metrics; for any module.

The base, an expert and a gate head are all trained by it. What it writes goes below one folder of
the run; one writer at a time is made sure of by fencing generations (`core/checkpoint.py`), and no
step waits for storage (`islands/background.py`).
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from atoll.core.checkpoint import Checkpoint, Checkpoints
from atoll.core.errors import ConfigError, Interrupted, Refused
from atoll.core.journal import log, progress
from atoll.core.manifest import Plan
from atoll.core.storage import Storage
from atoll.islands.background import GRACE_SECONDS, Background
from atoll.islands.compute import device_name
from atoll.islands.ema import Averages
from atoll.islands.guard import Guard
from atoll.islands.learner import Learner
from atoll.islands.metrics import Means, Metrics
from atoll.islands.settings import GuardConfig, LoraConfig
from atoll.islands.step import Loss, Orders, Taken, learning_rate_at, take_step

HEARTBEAT_SECONDS = 2.0
# Facts of a checkpoint that go on with a training, and need not be the same for it to go on.
_CARRIED = ("means", "guard")
# And those without which it is another training.
_THE_TRAINING = ("plan", "lora")


@dataclass(frozen=True)
class Course:
    """How one training runs: the plan and what the optimiser is told."""

    plan: Plan
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup: float
    clip: float
    ema_decays: tuple[float, ...]
    checkpoints: int
    checkpoint_seconds: float | None = None
    guard: GuardConfig = field(default_factory=GuardConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    accumulation: int = 1
    kernel: str = "fused"
    bitwise_resume: bool = True  # else a resume on other hardware or versions is only journalled


@dataclass(frozen=True)
class Milestones:
    """Where on the way something is made with the averaged weights, and what.

    `make` is given images_seen and returns files to be written into the training's folder. It must
    draw from no generator that a loss draws from.
    """

    at: Collection[int] = ()
    make: Callable[[int], Mapping[str, bytes]] = lambda _seen: {}


@contextmanager
def stop_on_sigterm(leave: threading.Event) -> Iterator[None]:
    """Inside, SIGTERM sets the flag: the loop then commits and leaves as interrupted.

    In a launcher's thread no signal arrives; whoever launched it sets the flag.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        leave.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Loop:
    """One training at one place of the run, `folder`, by the one writer that claimed it.

    Of several processes each runs this loop; the first one claims and writes for all.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        module: nn.Module,
        course: Course,
        *,
        name: str,
        learner: Learner | None = None,
        told: Mapping[str, float] | None = None,
    ) -> None:
        """`told` goes into every heartbeat, for whoever watches."""
        if course.plan.batch % course.accumulation:
            raise ConfigError(
                f"A batch of {course.plan.batch} is not to be had in {course.accumulation} parts",
                cure="choose training.accumulation so that it divides the batch",
            )
        self._learner = learner or Learner(module)
        self._group = self._learner.group
        part = course.plan.batch // course.accumulation
        if part < self._group.world:
            raise ConfigError(
                f"{part} images are too few for {self._group.world} workers",
                cure="choose fewer workers, a larger batch or less training.accumulation",
            )
        self._storage = storage
        self._folder = folder
        self._course = course
        self._name = name
        self._told = dict(told or {})
        self._checkpoints = Checkpoints(storage, folder)
        self._names = self._learner.names
        self._parameters = self._learner.parameters
        self._module = module
        self._averages = Averages(self._parameters, course.ema_decays)
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=course.learning_rate,
            betas=course.betas,
            weight_decay=course.weight_decay,
            fused=course.kernel == "fused",
            foreach=course.kernel == "foreach",
        )
        self._guard = Guard(course.guard, course.plan, name)
        self._metrics = Metrics(storage, folder, course.plan)
        self._means = Means(self._group)
        self._committed_at = 0.0

    def run(
        self,
        loss: Loss,
        *,
        held_out: Callable[[], float] | None = None,
        milestones: Milestones | None = None,
    ) -> None:
        """Train to the planned images_seen; the module then holds the averaged weights.

        Of several averages it is the one of least `held_out`. Raises `Interrupted` after SIGTERM
        (committed), `Fenced` when another writer took over and `Failed` when the loss is no longer
        finite or storage stays away.
        """
        generation = self._group.gather(self._checkpoints.claim() if self._group.leads else 0)[0]
        self._checkpoints.generation = generation
        seen = self._resume(generation)
        # Two, so that a heart beats while a large commit is on its way.
        self._background, self._pulse = Background(), Background()
        try:
            started, first = time.time(), seen
            seen = self._train(loss, seen, milestones or Milestones())
            seconds = time.time() - started
            self._journal(
                {
                    "event": "trained", "name": self._name, "from_images_seen": first,
                    "generation": self._checkpoints.generation, "images_seen": seen,
                    "seconds": seconds, "images_per_second": (seen - first) / max(seconds, 1e-9),
                }
            )  # fmt: skip
            self._background.drain()
            self._pulse.drain()
        finally:
            self._background.close()
            self._pulse.close()
        self._module.eval()
        self._publish(held_out)

    def _train(self, loss: Loss, seen: int, milestones: Milestones) -> int:
        total, batch = self._course.plan.images_seen, self._course.plan.batch
        every = batch * max(1, round(total / batch / self._course.checkpoints))
        self._module.train()
        if seen == 0:
            self._commit(0)  # something to go back to
        self._committed_at = time.monotonic()
        started, first, beat = time.time(), seen, 0.0
        due = False
        stopping = stop_on_sigterm(self._group.leave)
        with progress(self._name, total, done=seen) as advance, stopping:
            while seen < total:
                if not self._guard.skips(seen):
                    taken = self._step(loss, seen)
                    if not taken.applied:
                        committed = self._go_back(seen, taken)
                        advance(committed - seen, note="going back")
                        seen = committed
                        continue
                    self._means.add(taken)
                seen += batch
                stop, late = self._agree()
                advance(batch, note=f"loss {self._means.loss:.3f}")
                if self._metrics.due(seen):
                    self._write_metrics(seen)
                if seen in milestones.at:
                    self._show(seen, milestones)
                due = due or seen % every == 0 or late
                if due:
                    # The one before is there long since; if not, it is waited for, so that no more
                    # than an interval is ever at risk. Unless storage is away: then it is not.
                    self._background.settle()
                if seen == total or stop or (due and self._all_idle()):
                    self._commit(seen)
                    due = False
                if time.time() - beat > HEARTBEAT_SECONDS or seen == total:
                    beat = time.time()
                    self._beat(seen, (seen - first) / max(beat - started, 1e-9))
                if stop and seen < total:
                    self._background.drain(patience=GRACE_SECONDS)
                    # Together: a launcher ends all ranks with the first one that raises.
                    self._group.any(stop)
                    raise Interrupted(
                        f"Stopped {self._name} at {seen} of {total} images, committed",
                        cure="run the same command again, it resumes",
                    )
        return seen

    def _agree(self) -> tuple[bool, bool]:
        """Whether any rank is to stop or thinks a commit is due; raises what any has failed with.

        Every rank asks at every step, so that all do the same at the same one.
        """
        error = self._background.error or self._pulse.error
        leave = self._group.leave.is_set()
        stop, late, failed = self._group.any(leave, self._long_ago(), error is not None)
        if failed:
            raise next(each for each in self._group.gather(error) if each is not None)
        return stop, late

    def _all_idle(self) -> bool:
        return not self._group.any(not self._background.idle)[0]

    def _step(self, loss: Loss, seen: int) -> Taken:
        course = self._course
        total = course.plan.images_seen
        return take_step(
            loss,
            self._learner,
            self._optimizer,
            self._averages,
            self._guard,
            Orders(
                batch=course.plan.batch,
                accumulation=course.accumulation,
                clip=course.clip,
                learning_rate=learning_rate_at(course.learning_rate, seen, total, course.warmup),
            ),
            first=seen,
        )

    def _publish(self, held_out: Callable[[], float] | None) -> None:
        """Give the module its average, of several the one that does best on held-out records."""
        losses = []
        for index in range(len(self._averages.decays)):
            self._averages.publish(index)
            if len(self._averages.decays) == 1 or held_out is None:
                return
            losses.append(held_out())
        best = self._group.gather(losses.index(min(losses)))[0]
        self._averages.publish(best)
        decays = dict(zip(map(str, self._averages.decays), losses, strict=True))
        self._journal({"event": "published", "name": self._name, "held_out_loss": decays})

    # -- the state on disk -----------------------------------------------------------------------

    def _commit(self, seen: int) -> None:
        """Copy the state and hand it to the background; what is queued before it comes first.

        Replicas are the same, so that the first one's is the state; of shards each writes its own.
        """
        facts = {**self._facts(), "means": self._means.state(), "guard": self._guard.state()}
        self._committed_at = time.monotonic()
        group, piece, checkpoints = self._group, self._learner.piece, self._checkpoints
        if not group.leads and piece.count == 1:
            return
        tensors = {
            name: value.detach().to("cpu", copy=True) for name, value in self._tensors().items()
        }
        files: list[dict[str, Any]] = []  # of all ranks; kept where sealing is tried again

        def work() -> None:
            if not files:
                own = checkpoints.write(seen, tensors, piece)
                files.extend([own] if piece.count == 1 else group.gather_files(own))
            if group.leads:
                checkpoints.seal(seen, files, facts)

        self._background.submit("a checkpoint", work)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = self._averages.tensors(self._names)
        for name, parameter in zip(self._names, self._parameters, strict=True):
            tensors[f"weights/{name}"] = parameter
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        return tensors

    def _long_ago(self) -> bool:
        seconds = self._course.checkpoint_seconds
        return seconds is not None and time.monotonic() - self._committed_at > seconds

    def _facts(self) -> dict[str, Any]:
        """What must be the same for a resume to be bitwise."""
        lora = self._course.lora
        adapters = {} if lora.rank is None else {"lora": lora.model_dump(mode="json")}
        return {
            **adapters,
            "plan": self._course.plan.model_dump(),
            "workers": self._group.world,
            "parallel": self._learner.parallel,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if self._parameters[0].is_cuda else None,
            "numpy": np.__version__,  # the order of records is its permutation
            "diffusers": diffusers.__version__,
            "device": device_name(self._parameters[0].device),
        }

    def _resume(self, generation: int) -> int:
        latest = self._latest()
        if latest is None:
            self._keep_metrics(0)
            return 0
        facts = {key: value for key, value in latest.facts.items() if key not in _CARRIED}
        if facts != self._facts():
            self._resume_otherwise(facts, generation, latest.images_seen)
        self._restore(latest)
        self._guard.restore(latest.facts["guard"])
        return latest.images_seen

    def _latest(self) -> Checkpoint | None:
        """The newest state that verifies on every rank, of those that the first one sees."""
        for name in reversed(self._group.gather(self._checkpoints.names())[0]):
            found = self._checkpoints.load(name, self._learner.piece)
            if not self._group.any(found is None)[0]:
                return found
        return None

    def _resume_otherwise(self, facts: dict[str, Any], generation: int, seen: int) -> None:
        """Refuse what would not be bitwise, or write down that it is not."""
        ours = self._facts()
        other = any(facts.get(key) != ours.get(key) for key in _THE_TRAINING)
        if other or self._course.bitwise_resume:
            raise Refused(
                f"The checkpoint of {self._name} was made otherwise: {facts}",
                allowed=f"{ours}",
                cure="use the same plan, adapters, workers, threads and versions; where plan and "
                "adapters are the same, --allow-inexact-resume goes on, and the result is not "
                "bitwise what it would be",
            )
        log.warning("%s goes on from %d images, not bitwise: it was %s", self._name, seen, facts)
        self._journal(
            {
                "event": "resumed", "name": self._name, "generation": generation, "bitwise": False,
                "images_seen": seen, "was": facts, "is": ours,
            }
        )  # fmt: skip

    def _go_back(self, seen: int, taken: Taken) -> int:
        """Return to the last commit, knowing what to skip from there."""
        self._background.drain()
        latest = self._latest()
        assert latest is not None, "a training commits before its first step"
        start, end = self._guard.refuse(seen, latest.images_seen, loss=taken.loss, norm=taken.norm)
        log.warning(
            "%s: loss %g, gradient %g: back to %d images, %d to %d are skipped",
            self._name, taken.loss, taken.norm, latest.images_seen, start, end,
        )  # fmt: skip
        self._restore(latest)
        # The ranges are in the next commit. Killed before it, a training meets the batch again.
        self._guard.restore(latest.facts["guard"], keep_ranges=True)
        self._journal(
            {
                "event": "skipped", "name": self._name, "images_seen": seen, "loss": taken.loss,
                "gradient_norm": taken.norm, "first": start, "end": end,
            }
        )  # fmt: skip
        return latest.images_seen

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors
        self._averages.restore(self._names, tensors)
        with torch.no_grad():
            for name, parameter in zip(self._names, self._parameters, strict=True):
                parameter.copy_(tensors[f"weights/{name}"])
                # Before the first step there is none.
                if f"optimizer/step/{name}" in tensors:
                    self._optimizer.state[parameter] = {
                        key: tensors[f"optimizer/{key}/{name}"].to(parameter.device, copy=True)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
                else:
                    self._optimizer.state.pop(parameter, None)
        self._means = Means(self._group, checkpoint.facts["means"])
        self._keep_metrics(checkpoint.images_seen)

    # -- what is said ----------------------------------------------------------------------------

    def _keep_metrics(self, seen: int) -> None:
        if self._group.leads:
            self._metrics.keep(seen)

    def _write_metrics(self, seen: int) -> None:
        text = self._metrics.add(seen, self._means)
        self._means = Means(self._group)
        if not self._group.leads:
            return
        name, storage, checkpoints = self._metrics.name, self._storage, self._checkpoints

        def work() -> None:
            checkpoints.check_fence()  # the file is whole: a zombie's would replace its heir's
            storage.write_bytes(name, text)

        self._background.submit("metrics", work)

    def _show(self, seen: int, milestones: Milestones) -> None:
        """Make what belongs to a milestone, with the first average, and leave no trace of it.

        Every rank does, since a sharded network answers only to all; the first one writes.
        It is queued before the commit at the same place: whoever resumes there finds it made.
        """
        with self._averages.shown(0):
            self._module.eval()
            files = milestones.make(seen)
            self._module.train()
        if not self._group.leads:
            return
        storage, checkpoints, folder = self._storage, self._checkpoints, self._folder

        def work() -> None:
            checkpoints.check_fence()
            for name, data in files.items():
                storage.write_bytes(f"{folder}/{name}", data)

        self._background.submit("a milestone", work)

    def _beat(self, seen: int, images_per_second: float) -> None:
        if not self._group.leads:
            return
        if not self._pulse.idle and seen < self._course.plan.images_seen:
            return  # storage is slower than a heart, or away
        storage, checkpoints, name = self._storage, self._checkpoints, self._folder
        beat = {
            "schema_version": 1,
            "generation": checkpoints.generation,
            "images_seen": seen,
            "of": self._course.plan.images_seen,
            "images_per_second": round(images_per_second, 3),
            "unix_seconds": round(time.time(), 3),
            **self._told,
        }

        def work() -> None:
            checkpoints.check_fence()
            storage.write_json(f"{name}/heartbeat.json", beat)

        self._pulse.submit("a heartbeat", work)

    def _journal(self, line: dict[str, Any]) -> None:
        if self._group.leads:
            self._storage.append_line(f"{self._folder}/journal.jsonl", json.dumps(line))
