"""Outages of a store: which errors are one, and work that is tried again until it is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from atoll.core.errors import AtollError, Failed
from atoll.core.journal import log

T = TypeVar("T")

LONGEST_PAUSE = 30.0  # seconds between two attempts


def is_outage(error: BaseException) -> bool:
    """Whether trying again may help: the system's errors, no space, and those of store clients."""
    if isinstance(error, AtollError):
        return isinstance(error, Failed)
    home = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or home not in ("builtins", "atoll", "safetensors", "torch")


def ride_out(
    what: str,
    work: Callable[[], T],
    *,
    patience: Callable[[], float],
    pause: float,
    outage: Callable[[BaseException], bool] = is_outage,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What `work` returns, tried again with growing pauses (seconds) while its store is away.

    `what` is what the store is asked for. Raises `Failed` when the outage has lasted for
    `patience()` seconds, which may change meanwhile, and at once whatever is no `outage`.
    """

    growing = wait_exponential(multiplier=pause, max=LONGEST_PAUSE)

    def left(state: RetryCallState) -> float:
        return patience() - (state.seconds_since_start or 0.0)

    def give_up(state: RetryCallState) -> NoReturn:
        error = _error(state)
        raise Failed(
            f"Storage has been away for {state.seconds_since_start or 0:.0f} s, {what}: {error}",
            cure="make storage reachable, with room, and run the same command again, it resumes",
        ) from error

    def tell(state: RetryCallState) -> None:
        log.warning("storage is away, %s, tried again in %.1f s: %s",
                    what, state.upcoming_sleep, _error(state))  # fmt: skip

    return Retrying(
        retry=retry_if_exception(outage),
        wait=lambda state: max(0.0, min(growing(state), left(state))),
        stop=lambda state: left(state) <= 0,
        retry_error_callback=give_up,
        before_sleep=tell,
        sleep=sleep,
    )(work)


def _error(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()
