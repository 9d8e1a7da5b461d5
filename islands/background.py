"""A training's storage work, in order, in one thread beside its steps.

An outage of the store or a full disk is ridden out: the work at the head of the queue is tried
again with growing pauses while the training goes on, and whatever has waited follows in order, so
that a commit is never visible before the lines of metrics that belong to it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from atoll.core.outage import FIRST_PAUSE, GRACE_SECONDS, PATIENCE_SECONDS, ride_out


class Background:
    """The thread and its queue. `patience` is how many seconds an outage may last.

    Once `leave()` says so, with nobody there to drain it, no more than the grace of an ending.
    """

    def __init__(
        self,
        *,
        patience: float = PATIENCE_SECONDS,
        pause: float = FIRST_PAUSE,
        leave: Callable[[], bool] = lambda: False,
    ) -> None:
        self._patience = patience
        self._leave = leave
        self._pause = pause
        self._ends: float | None = None  # when an ending training's grace is over
        self._work: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._hurry = threading.Event()  # ends a pause at once
        self._away = threading.Event()  # set while an outage lasts
        self._thread = threading.Thread(target=self._loop, name="storage", daemon=True)
        self._thread.start()

    def submit(self, what: str, work: Callable[[], None]) -> None:
        """Queue some work; raises what earlier work has failed with for good."""
        self.check()
        self._work.put((what, work))

    def check(self) -> None:
        """Raise what earlier work has failed with for good: `Fenced`, or an outage too long."""
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Wait until all is done, unless storage is away: then go on at once."""
        with self._work.all_tasks_done:
            while self._work.unfinished_tasks and not self._away.is_set() and not self._error:
                self._work.all_tasks_done.wait(0.05)

    @property
    def error(self) -> BaseException | None:
        """What earlier work has failed with for good."""
        return self._error

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or at work."""
        return self._work.unfinished_tasks == 0

    def drain(self, *, patience: float | None = None) -> None:
        """Wait until all is done; outages may last `patience` seconds from now on."""
        if patience is not None:
            self._ends = time.monotonic() + patience
            self._hurry.set()
        self._work.join()
        self.check()

    def close(self, *, patience: float = GRACE_SECONDS) -> None:
        """Finish what is queued, if storage takes it in a last while, and let the thread go."""
        if self._ends is None:
            self._ends = time.monotonic() + patience
        self._hurry.set()
        self._work.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (item := self._work.get()) is not None:
            try:
                if self._error is None:
                    self._persist(*item)
            except BaseException as error:  # handed to the training, which is told at its next step
                self._error = error
            finally:
                self._work.task_done()

    def _persist(self, what: str, work: Callable[[], None]) -> None:
        began = time.monotonic()

        def patience() -> float:
            if self._ends is None and self._leave():
                self._ends = time.monotonic() + GRACE_SECONDS
            return self._patience if self._ends is None else self._ends - began

        ride_out(f"writing {what}", work, patience=patience, pause=self._pause, sleep=self._wait)
        self._away.clear()

    def _wait(self, seconds: float) -> None:
        self._away.set()
        self._hurry.wait(seconds)
        self._hurry.clear()
