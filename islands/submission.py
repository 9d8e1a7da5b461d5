"""One submission of a shard to an island, as its controller hears of it.

A job's word is its `exit.json`; Ray's is a hint. That it lives is seen in storage, where its signs
of life change.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from atoll.core.checkpoint import newest_generation
from atoll.core.errors import ExitCode, Failed
from atoll.core.journal import log
from atoll.core.storage import Storage
from atoll.islands.settings import WatchConfig
from atoll.islands.signs import (
    ask_to_leave,
    exit_code,
    island_folder,
    process_heartbeat,
    read_object,
    signs_of_life,
    trainings,
    write_log,
)
from atoll.islands.sites import Site
from atoll.islands.state import Differing
from atoll.islands.submit import ENDED, NotThere, Unreachable

_LOG_SECONDS = 5.0
_RAY_SAYS = "Running entrypoint for job "
_TRAININGS = ("expert", "gate_head")  # stages of a job that consist of steps
_BEGIN_SECONDS = 300.0  # an environment is set up, libraries are loaded


@dataclass(frozen=True)
class Heard:
    """What one look at a job comes to."""

    begun: bool = False  # a training of its own has taken a step
    ended: bool = False  # by its own word, or by Ray's
    pending: bool = False  # it has not begun for long
    dead: str = ""  # why it is to be taken for dead


class Submission:
    """A job from just before it is submitted until it ends or is left behind, by one clock."""

    def __init__(self, run: Storage, shard: str, site: Site, name: str, *, now: float) -> None:
        self.site = site
        self.name = name
        self._run = run
        self._shard = shard
        self._began = now
        self._signs = signs_of_life(run, shard)
        # Of the expert's training and of the gate head's: what claims next is this job.
        self._generations = [newest_generation(run, place) for place in trainings(shard)]
        self._alive_at = now  # when its signs of life last changed
        self._stepped_at = now  # and when those of a training did
        self._logged_at = now

    def look(self, now: float, watch: WatchConfig) -> Heard:
        """Whether it has ended, and if not, whether it lives."""
        ended, pending = self.said() is not None, False
        if not ended and self.site.answers() and not self.site.gone():
            try:
                status = self.site.jobs.status(self.name)
            except NotThere as error:
                log.debug("%s: %s", self._shard, error)  # its signs of life end too
            except Failed as error:
                self.site.missed(error)
            else:
                self.site.heard()
                ended = status in ENDED
                slow = now - self._began > _BEGIN_SECONDS
                # In Ray's queue, or loading libraries, nothing of ours lives yet.
                if status == "PENDING" or (status == "RUNNING" and not slow and not self.speaks()):
                    self._alive_at = now
                pending = status == "PENDING" and slow
                if ended or now - self._logged_at > _LOG_SECONDS:
                    self._logged_at = now
                    self.keep_log()
        self._listen(now)
        dead = "" if ended else self._why_dead(now, watch)
        return Heard(self._has_begun(), ended, pending, dead)

    def _listen(self, now: float) -> None:
        before, self._signs = self._signs, signs_of_life(self._run, self._shard)
        if self._signs != before:
            self._alive_at = now
        # Beside the process, which may live on with a training that hangs.
        if self._signs[1:] != before[1:] or self._signs[0].get("name") != before[0].get("name"):
            self._stepped_at = now

    def _has_begun(self) -> bool:
        """By heartbeats of later generations than there were: an earlier job's may go on."""
        beats = zip(self._signs[1:], self._generations, strict=True)
        return any(int(beat.get("generation", 0)) > before for beat, before in beats)

    def _why_dead(self, now: float, watch: WatchConfig) -> str:
        """Why nothing more is to be expected of it; empty where something is."""
        silence, still = now - self._alive_at, now - self._stepped_at
        if self.site.gone():
            return f"island {self.site.island.name} has ended"
        if silence > watch.dead_seconds:
            return f"no sign of life from island {self.site.island.name} for {silence:.0f} s"
        if self._signs[0].get("name") in _TRAININGS and still > watch.stalled_seconds:
            return f"it lives, and has taken no step for {still:.0f} s"
        return ""

    def why_pending(self) -> str:
        """The island, and what Ray says of a job that asks for more than is free, or than is."""
        site, said = self.site, ""
        with contextlib.suppress(Failed):
            said = str(site.jobs.details(self.name).get("message") or "")
        asked = f"{site.cpus} CPUs and {site.gpus} GPUs"
        return f"island {site.island.name}, which was asked for {asked}: {said}".rstrip(": ")

    def said(self) -> ExitCode | None:
        """How it says that it has ended."""
        return exit_code(self._run, self._shard, of=self.name)

    def how_it_ended(self) -> tuple[ExitCode | None, str, Differing]:
        """Of one that is over: its code, why, and what it found made otherwise."""
        code = self.said()
        if code is None:
            # Ray's own line is in the log of a job that died at once behind what that said.
            words = [line for line in self.keep_log() if not line.startswith(_RAY_SAYS)]
            return (
                None,
                "its process died" + (f"; its last words: {words[-1]}" if words else ""),
                {},
            )
        said = read_object(self._run, f"{island_folder(self._shard)}/exit.json")
        return code, str(said.get("reason", "")), said.get("differing", {})

    def speaks(self) -> bool:
        """Whether the shard's last sign of life is of this submission."""
        beat = read_object(self._run, process_heartbeat(self._shard))
        return beat.get("submission_id") == self.name

    def leave(self) -> bool:
        """Ask it in storage, where it finds the time for a last commit; false: stopped by Ray.

        Ray kills seconds after it has asked. A job that has not begun has nothing to commit.
        """
        try:
            if self.speaks():
                ask_to_leave(self._run, self._shard, self.name)
                return True
        except (Failed, OSError) as error:
            log.debug("%s cannot be asked to leave: %s", self._shard, error)
        self.stop()
        return False

    def stop(self) -> None:
        """Have Ray stop it; an island that does not answer is not waited for."""
        with contextlib.suppress(Unreachable):
            self.site.jobs.stop(self.name)

    def has_left(self) -> bool:
        """By its own word, or by Ray's."""
        with contextlib.suppress(Failed, OSError):
            if self.said() is not None:
                return True
        with contextlib.suppress(Failed):
            return self.site.gone() or self.site.jobs.status(self.name) in ENDED
        return False

    def keep_log(self) -> list[str]:
        """Copy what the job said into storage, where it outlives its island."""
        if self.site.silent_since is not None or self.site.gone():
            return []
        try:
            lines = self.site.jobs.logs(self.name).strip().splitlines()
        except Failed:
            return []
        write_log(self._run, self._shard, self.name, self.site.island.name, lines)
        return lines
