"""Outages of a store: which errors are one, and work that is tried again until it is over.

They are ridden out by a patient handle, each of its requests (`Storage.patient`), by a training's
storage thread, each piece of its work (`islands/background.py`), and by a job for its last word. Of
work within work the outer one alone is tried again, as a whole, so that no patience is spent twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from atoll.core.errors import AtollError, Failed, Interrupted
from atoll.core.journal import log

T = TypeVar("T")

PATIENCE_SECONDS = 3600.0  # that an outage may last
GRACE_SECONDS = 60.0  # that whoever is about to end gives it
FIRST_PAUSE = 0.5  # seconds, doubled with every further attempt
LONGEST_PAUSE = 30.0  # seconds between two attempts
_GLANCE = 0.2  # seconds between two looks whether to leave

# What a store says when it is there, or this machine of a name: asked again, it says the same.
ANSWERS = (
    FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError,
)  # fmt: skip
_AT_ONCE = ContextVar("at_once", default=False)


def is_outage(error: BaseException) -> bool:
    """Whether trying again may help: no space, and the system's errors but for its answers.

    An error of a store's client is `Failed` by the time it leaves `Storage`.
    """
    return isinstance(error, Failed | OSError) and not isinstance(error, ANSWERS)


@contextmanager
def at_once() -> Iterator[None]:
    """Inside, in this thread, no outage is ridden out: it is raised as it comes."""
    token = _AT_ONCE.set(True)
    try:
        yield
    finally:
        _AT_ONCE.reset(token)


@contextmanager
def unless_away(what: str) -> Iterator[None]:
    """Inside is done what is not worth waiting for: an outage ends the block, and is logged."""
    try:
        with at_once():
            yield
    except Exception as error:
        if not is_outage(error):
            raise
        log.warning("storage is away, %s is left out: %s", what, _said(error))


def ride_out(
    what: str,
    work: Callable[[], T],
    *,
    patience: Callable[[], float],
    pause: float = FIRST_PAUSE,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What `work` returns, tried again with growing pauses (seconds) while its store is away.

    `what` is what the store is asked for. Raises `Failed` when the outage has lasted for
    `patience()` seconds, which may change meanwhile, and at once whatever is no outage.
    """
    if _AT_ONCE.get():
        return work()

    growing = wait_exponential(multiplier=pause, max=LONGEST_PAUSE)

    def left(state: RetryCallState) -> float:
        return patience() - (state.seconds_since_start or 0.0)

    def once() -> T:
        with at_once():
            return work()

    def give_up(state: RetryCallState) -> NoReturn:
        error = _error(state)
        raise Failed(
            f"Storage has been away for {state.seconds_since_start or 0:.0f} s, {what}: "
            f"{_said(error)}",
            cure="make storage reachable, with room, and run the same command again, it resumes",
        ) from error

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            log.warning("storage is away, %s, tried again for up to %.0f s: %s",
                        what, patience(), _said(_error(state)))  # fmt: skip

    retrying = Retrying(
        retry=retry_if_exception(is_outage),
        wait=lambda state: max(0.0, min(growing(state), left(state))),
        stop=lambda state: left(state) <= 0,
        retry_error_callback=give_up,
        before_sleep=tell,
        sleep=sleep,
    )
    began = time.monotonic()
    found = retrying(once)
    if retrying.statistics["attempt_number"] > 1:
        log.warning("storage answers again after %.0f s, %s", time.monotonic() - began, what)
    return found


@dataclass(frozen=True)
class Patience:
    """How a handle rides out: for so many `seconds` a request, and until it is to `leave`."""

    seconds: float = PATIENCE_SECONDS
    leave: Callable[[], bool] = lambda: False

    def ride_out(self, what: str, work: Callable[[], T]) -> T:
        """`ride_out`; raises `Interrupted` where it is to leave while storage is away."""
        return ride_out(what, work, patience=lambda: self.seconds, sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        # In pieces, and on no lock: a signal's handler, which says to leave, runs in between.
        end = time.monotonic() + seconds
        while not self.leave() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _GLANCE))
        if self.leave():
            raise Interrupted(
                "Stopped while storage was away; what was committed before stands",
                cure="run the same command again, it resumes",
            )


def _error(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


def _said(error: BaseException | None) -> str:
    """An error in short: its cure, where it has one, is for those who do not wait."""
    if isinstance(error, AtollError):
        return error.what
    return str(error) or type(error).__name__
