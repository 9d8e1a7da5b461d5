"""The errors a user sees: what was given, what is allowed, what to do, and an exit code.

Every failure that a user can cause or cure is an `AtollError`; the command line prints it and
leaves with its exit code. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the process says when it ends."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    CONFIGURATION = 3
    DATA = 4
    MISSING = 5
    INTERRUPTED = 6
    REFUSED = 7
    FENCED = 8


class AtollError(Exception):
    """Base of every error with a cure; `what` happened, what is `allowed`, the `cure`."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED

    def __init__(self, what: str, *, allowed: str = "", cure: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.allowed = allowed
        self.cure = cure

    def __str__(self) -> str:
        parts = [self.what]
        if self.allowed:
            parts.append(f"Allowed: {self.allowed}")
        if self.cure:
            parts.append(f"Cure: {self.cure}")
        return " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in parts)

    def as_dict(self) -> dict[str, str | int]:
        """The `error` object that `--json` prints."""
        return {
            "code": int(self.exit_code),
            "what": self.what,
            "allowed": self.allowed,
            "cure": self.cure,
        }


class Failed(AtollError):
    """Something outside gave way: no space left, a job that died."""

    exit_code = ExitCode.FAILED


class UsageError(AtollError):
    """An unknown command, option or choice, or a shard or model that does not exist."""

    exit_code = ExitCode.USAGE


class ConfigError(AtollError):
    """An unknown configuration key, recipe or encoder, or a value of the wrong type."""

    exit_code = ExitCode.CONFIGURATION


class DataError(AtollError):
    """A corpus that is missing, empty, unreadable, without captions or too small."""

    exit_code = ExitCode.DATA


class MissingError(AtollError):
    """Weights or a package that are not there."""

    exit_code = ExitCode.MISSING


class Interrupted(AtollError):
    """Stopped before the end; the same command resumes."""

    exit_code = ExitCode.INTERRUPTED


class Refused(AtollError):
    """Another schema, a digest that does not match, a foreign soup, a directory in use."""

    exit_code = ExitCode.REFUSED


class Fenced(AtollError):
    """Another writer took over this place in storage."""

    exit_code = ExitCode.FENCED


def did_you_mean(given: str, choices: Iterable[str]) -> str:
    """A question naming the closest choice, or an empty string when none is close."""
    close = difflib.get_close_matches(given, list(choices), n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else ""
