"""The loop around a training step: resume, guard, commits, heartbeat and metrics; for any module.

The base, an expert and a gate head are all trained by it. What it writes goes below one folder of
the run; one writer at a time is made sure of by fencing generations (`core/checkpoint.py`), and no
step waits for storage (`islands/background.py`), unless a commit is due while the one before is
still on its way: then more than an interval would be at risk.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

from atoll.core.checkpoint import Checkpoints
from atoll.core.errors import ConfigError, Interrupted
from atoll.core.journal import log, progress
from atoll.core.outage import GRACE_SECONDS
from atoll.core.storage import Storage
from atoll.islands.background import Background
from atoll.islands.course import Course
from atoll.islands.learner import Learner
from atoll.islands.metrics import Means, Metrics
from atoll.islands.settings import check_accumulation
from atoll.islands.state import TrainingState
from atoll.islands.step import Loss, Orders, Taken, learning_rate_at, take_step

HEARTBEAT_SECONDS = 2.0


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
        check_accumulation(course.plan.batch, course.accumulation)
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
        self._module = module
        self._checkpoints = Checkpoints(storage, folder)
        self._state = TrainingState(self._learner, course, self._checkpoints, name)
        self._metrics = Metrics(storage, folder, course.plan)
        self._committed_at = 0.0

    def run(
        self,
        loss: Loss,
        *,
        held_out: Callable[[], float] | None = None,
        milestones: Milestones | None = None,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        """Train to the planned images_seen; the module then holds the averaged weights.

        Of several averages it is the one of least `held_out`. `begun` is called once the state that
        is gone on from has been taken, or none was there. Raises `Interrupted` after SIGTERM
        (committed), `Fenced` when another writer took over and `Failed` when the loss is no longer
        finite or storage stays away.
        """
        generation = self._group.gather(self._checkpoints.claim() if self._group.leads else 0)[0]
        self._checkpoints.generation = generation
        seen = self._resume()
        begun()
        # Two, so that a heart beats while a large commit is on its way.
        leave = self._group.leave.is_set
        self._background, self._pulse = Background(leave=leave), Background(leave=leave)
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
            self._pulse.close(patience=0)  # no heartbeat is worth waiting for
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
                if not self._state.guard.skips(seen):
                    taken = self._step(loss, seen)
                    if not taken.applied:
                        committed = self._go_back(seen, taken)
                        advance(committed - seen, note="going back")
                        seen = committed
                        continue
                    self._state.means.add(taken)
                seen += batch
                stop, late = self._agree()
                advance(batch, note=f"loss {self._state.means.loss:.3f}")
                if self._metrics.due(seen):
                    self._write_metrics(seen)
                if seen in milestones.at:
                    self._show(seen, milestones)
                due = due or seen % every == 0 or late
                if due:
                    # The one before is there long since; if not, it is waited for, so that never
                    # more is at risk than an interval and what is learnt while one commit is on
                    # its way. Unless storage is away: then it is not.
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
            self._state.optimizer,
            self._state.averages,
            self._state.guard,
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
        for index in range(len(self._state.averages.decays)):
            self._state.averages.publish(index)
            if len(self._state.averages.decays) == 1 or held_out is None:
                return
            losses.append(held_out())
        best = self._group.gather(losses.index(min(losses)))[0]
        self._state.averages.publish(best)
        decays = dict(zip(map(str, self._state.averages.decays), losses, strict=True))
        self._journal({"event": "published", "name": self._name, "held_out_loss": decays})

    def _resume(self) -> int:
        """The images seen so far, with the state of then, or 0 and that of the start."""
        latest = self._state.latest()
        if latest is None:
            self._keep_metrics(0)
            return 0
        seen = latest.images_seen
        was = self._state.otherwise(latest)
        if was is not None:
            log.warning("%s goes on from %d images, not bitwise: it was %s", self._name, seen, was)
            self._journal(
                {
                    "event": "resumed", "name": self._name, "bitwise": False, "images_seen": seen,
                    "generation": self._checkpoints.generation, "was": was,
                    "is": self._state.facts(),
                }
            )  # fmt: skip
        self._state.restore(latest)
        self._keep_metrics(seen)
        return seen

    def _commit(self, seen: int) -> None:
        self._committed_at = time.monotonic()
        self._state.commit(seen, self._background)

    def _long_ago(self) -> bool:
        seconds = self._course.checkpoint_seconds
        return seconds is not None and time.monotonic() - self._committed_at > seconds

    def _go_back(self, seen: int, taken: Taken) -> int:
        """Return to the last commit, knowing what to skip from there."""
        self._background.drain()
        latest = self._state.latest()
        assert latest is not None, "a training commits before its first step"
        start, end = self._state.guard.refuse(
            seen, latest.images_seen, loss=taken.loss, norm=taken.norm
        )
        log.warning(
            "%s: loss %g, gradient %g: back to %d images, %d to %d are skipped",
            self._name, taken.loss, taken.norm, latest.images_seen, start, end,
        )  # fmt: skip
        self._state.restore(latest, keep_ranges=True)
        self._keep_metrics(latest.images_seen)
        self._journal(
            {
                "event": "skipped", "name": self._name, "images_seen": seen, "loss": taken.loss,
                "gradient_norm": taken.norm, "first": start, "end": end,
            }
        )  # fmt: skip
        return latest.images_seen

    # -- what is said ----------------------------------------------------------------------------

    def _keep_metrics(self, seen: int) -> None:
        if self._group.leads:
            self._metrics.keep(seen, self._checkpoints.check_fence)

    def _write_metrics(self, seen: int) -> None:
        text = self._metrics.add(seen, self._state.means)
        self._state.means = Means(self._group)
        if not self._group.leads:
            return
        name, storage, checkpoints = self._metrics.name, self._storage, self._checkpoints

        def work() -> None:
            # The file is whole: a zombie's would replace its heir's.
            storage.write_bytes(name, text, check=checkpoints.check_fence)

        self._background.submit("metrics", work)

    def _show(self, seen: int, milestones: Milestones) -> None:
        """Make what belongs to a milestone, with the first average, and leave no trace of it.

        Every rank does, since a sharded network answers only to all; the first one writes.
        It is queued before the commit at the same place: whoever resumes there finds it made.
        """
        with self._state.averages.shown(0):
            self._module.eval()
            files = milestones.make(seen)
            self._module.train()
        if not self._group.leads:
            return
        storage, checkpoints, folder = self._storage, self._checkpoints, self._folder

        def work() -> None:
            for name, data in files.items():
                storage.write_bytes(f"{folder}/{name}", data, check=checkpoints.check_fence)

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
            storage.write_json(f"{name}/heartbeat.json", beat, check=checkpoints.check_fence)

        self._pulse.submit("a heartbeat", work)

    def _journal(self, line: dict[str, Any]) -> None:
        if self._group.leads:
            self._storage.append_line(f"{self._folder}/journal.jsonl", json.dumps(line))
