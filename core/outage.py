"""Outages of a store: which errors are one, and reading that waits until it is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from atoll.core.errors import AtollError, Failed
from atoll.core.journal import log

T = TypeVar("T")

LONGEST_PAUSE = 30.0  # seconds between two attempts


def is_outage(error: Exception) -> bool:
    """Whether trying again may help: the system's errors, no space, and those of store clients."""
    if isinstance(error, AtollError):
        return isinstance(error, Failed)
    home = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or home not in ("builtins", "atoll", "safetensors", "torch")


def ride_out(what: str, read: Callable[[], T], *, patience: float, pause: float) -> T:
    """What `read` returns, tried again with growing pauses (seconds) while its store is away.

    Raises `Failed` when the outage has lasted for `patience` seconds, and at once whatever is no
    outage, a file that is not there among it.
    """
    began = time.monotonic()
    while True:
        try:
            return read()
        except Exception as error:
            if isinstance(error, FileNotFoundError) or not is_outage(error):
                raise
            lasted = time.monotonic() - began
            if lasted + pause > patience:
                raise Failed(
                    f"Storage has not given {what} for {lasted:.0f} s: {error}",
                    cure="make storage reachable and run the same command again, it resumes",
                ) from error
            log.warning("storage did not give %s, tried again in %.1f s: %s", what, pause, error)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
