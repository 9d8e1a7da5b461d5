"""The queue of shards and the islands that work it off, watched from storage.

A shard whose job died, or gives no sign of life, or whose island went away (`submission.py`), is
started again at the next generation, elsewhere where there is an elsewhere; what it left behind is
fenced. One that refuses is not started again, unless an island of another kind can take it
(`work.py`). A stop request in storage is obeyed, by the job itself and here.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from atoll.core.checkpoint import newest_generation
from atoll.core.errors import (
    AtollError,
    ConfigError,
    DataError,
    ExitCode,
    Failed,
    Fenced,
    Interrupted,
    MissingError,
    Refused,
)
from atoll.core.journal import Advance, log, progress
from atoll.core.outage import at_once, unless_away
from atoll.core.storage import Storage
from atoll.islands.curves import Curves
from atoll.islands.settings import TrainConfig
from atoll.islands.signs import (
    committed,
    island_folder,
    read_object,
    stop_request,
    write_journal,
)
from atoll.islands.sites import Site
from atoll.islands.state import Differing, in_words
from atoll.islands.submission import Submission
from atoll.islands.submit import Unreachable
from atoll.islands.work import ALLOW, Choice, Work

_POLL_SECONDS = 0.5
_FAR_POLL_SECONDS = 3.0  # where storage is not local
_LEAVE_SECONDS = 90.0  # a step, and the grace that a last commit is given
_LOOKS = 4  # at a silent job at least, before it is taken for dead
# An island's own exit code is the command's, where all that failed agree on it.
_AS_RAISED: dict[ExitCode | None, type[AtollError]] = {
    kind.exit_code: kind for kind in (ConfigError, DataError, MissingError, Refused, Fenced)
}
_RETRIED = (None, ExitCode.FAILED, ExitCode.INTERRUPTED, ExitCode.FENCED)


class Queue:
    """Keeps the sites busy until every shard is collected, stopped or given up."""

    def __init__(
        self,
        run: Storage,
        config: TrainConfig,
        sites: Sequence[Site],
        collect: Callable[[str], None],
        curves: Curves,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self._config = config
        self._sites = sites
        self._collect = collect
        self._curves = curves
        self._begun = begun
        self._poll = _POLL_SECONDS if run.is_local else _FAR_POLL_SECONDS
        self._now, self._looked_at = 0.0, time.monotonic()
        self._waiting: list[Work] = []
        self._running: list[Work] = []
        self._stopped: list[Work] = []
        self._given_up: list[Work] = []
        self._left_behind: list[tuple[Site, str]] = []  # to be stopped, once their island answers

    def work(self, plans: dict[str, int]) -> None:
        """Train every shard, by name -> images_seen; raises at the end for those not finished.

        `begun` is called once a training of one of them has taken a step, and again.
        """
        self._waiting = [
            Work(shard, Choice(self._run, shard, self._config, self._sites)) for shard in plans
        ]
        try:
            with progress("training the islands", sum(plans.values())) as advance:
                while self._waiting or self._running:
                    self._turn(advance)
                    if self._waiting or self._running:
                        time.sleep(self._poll)
        except KeyboardInterrupt:
            with at_once():
                raise self._interrupted() from None
        finally:
            self._stop_left_behind()
        if self._given_up:
            raise self._failed(len(plans))
        if self._stopped:
            names = ", ".join(work.shard for work in self._stopped)
            raise Interrupted(
                f"Stopped as asked: {names}; what was trained is committed",
                cure=f"`atoll resume {self._run.uri}` goes on",
            )

    def _turn(self, advance: Advance) -> None:
        self._look_up()
        for site in self._sites:
            site.ask_again()
        self._stop_left_behind()
        self._heed_requests()
        for work in list(self._waiting):
            self._place(work)
        for work in list(self._running):
            self._look_at(work, advance)
        self._curves.update()

    def _look_up(self) -> None:
        """Let our clock go on; while storage is away it stands, since no sign of life arrives."""
        now = time.monotonic()
        self._now += min(now - self._looked_at, self._config.watch.dead_seconds / _LOOKS)
        self._looked_at = now

    # -- what waits ------------------------------------------------------------------------------

    def _heed_requests(self) -> None:
        """Hold what is asked to stop, and take it up again when the request is gone."""
        for work in list(self._waiting):
            if self._run.exists(stop_request(work.shard)):
                self._waiting.remove(work)
                self._stopped.append(work)
        for work in list(self._stopped):
            if not self._run.exists(stop_request(work.shard)):
                self._stopped.remove(work)
                self._waiting.append(work)

    def _place(self, work: Work) -> None:
        """Start it on the best island that is free; give it up where none will ever take it."""
        able, watch = work.choice.able(), self._config.watch
        if all(site.lost(watch.unreachable_seconds) for site in able):
            if any(site.revive() for site in able):
                return  # to be placed in the next turn
            if all(site.lost(watch.give_up_seconds) for site in able):
                self._give_up(work)
                return
            names = " or ".join(site.island.name for site in able if not site.gone())
            limit = watch.give_up_seconds
            bound = "" if limit is None else f", {limit:.0f} s at most"
            self._wait(work, f"waits for {names} to answer{bound}{work.choice.words()}")
        free = [site for site in able if site.free()]
        if free and time.monotonic() >= work.not_before:
            self._start(work, min(free, key=work.rank))

    def _wait(self, work: Work, reason: str, *, event: str = "waiting") -> None:
        """Say what a shard waits for, once."""
        if reason != work.waits_for:
            work.waits_for = reason
            log.warning("%s %s", work.shard, reason)
            self._journal(work, event, reason=reason)

    def _give_up(self, work: Work) -> None:
        """No island is left that could take it."""
        names, words = work.choice.names(), work.choice.words()
        why = [site.trouble for site in work.choice.able() if site.trouble]
        reason = f"no island is left for it; those that take it: {names}{words}"
        reason = ". ".join([reason, *why])
        work.code = ExitCode.REFUSED if words else None
        work.reasons.append(reason)
        self._waiting.remove(work)
        self._given_up.append(work)
        log.warning("%s: %s", work.shard, reason)
        self._journal(work, "given_up", reason=reason, made_with=work.choice.made_with)

    def _start(self, work: Work, site: Site) -> None:
        run, island = self._run, site.island
        generation = newest_generation(run, island_folder(work.shard)) + 1
        run_name = hashlib.sha256(run.uri.encode()).hexdigest()[:12]
        run.remove(f"{island_folder(work.shard)}/exit.json")
        here = str(run.local("").resolve()) if run.is_local else run.uri
        identity = f"{run_name}-{work.shard}-{generation}-{secrets.token_hex(4)}"
        submission = Submission(run, work.shard, site, identity, now=self._now)
        try:
            code = site.jobs.submit(
                island.prefix or here,
                work.shard,
                submission_id=identity,
                threads=self._config.threads,
                cpus=site.cpus,
                gpus=site.gpus,
                memory_gib=island.resources.memory_gib,
                workers=site.workers,
            )
        except Unreachable as error:
            # It may have arrived all the same: what comes of it is stopped, or fenced.
            site.missed(error)
            self._left_behind.append((site, identity))
            self._turned_away(work, site, error)
            return
        except Failed as error:
            self._waiting.remove(work)
            work.attempts += 1
            work.code = None
            self._again_or_not(work, site, str(error), retried=True)
            return
        except BaseException:  # Ctrl-C: it may have arrived
            self._left_behind.append((site, identity))
            raise
        self._waiting.remove(work)
        self._running.append(work)
        site.running += 1
        work.submission, work.attempts = submission, work.attempts + 1
        work.waits_for, work.turned_away = "", 0
        self._journal(
            work, "submitted", island=island.name, price=island.price, labels=island.labels,
            generation=generation, code_sha256=code,
        )  # fmt: skip
        log.debug("%s is generation %d on island %s", work.shard, generation, island.name)

    def _turned_away(self, work: Work, site: Site, error: Unreachable) -> None:
        """Try another island first, and later: one may answer, and yet take no job."""
        work.failed_at.append(site.island.name)
        pause = self._config.watch.backoff_seconds * 2 ** min(5, work.turned_away)
        work.turned_away += 1
        work.not_before = time.monotonic() + pause
        if work.turned_away > 1:  # once is a slip, or the beginning of a silence
            self._wait(work, f"could not be given to island {site.island.name}: {error.what}")

    # -- what runs -------------------------------------------------------------------------------

    def _look_at(self, work: Work, advance: Advance) -> None:
        submission = work.submission
        assert submission is not None
        self._advance(work, advance)
        heard = submission.look(self._now, self._config.watch)
        if heard.begun:
            self._begun()
        if heard.pending and not work.waits_for:
            self._wait(work, f"is not begun on {submission.why_pending()}", event="pending")
        if heard.ended:
            self._finish(work, submission)
        elif heard.dead:
            self._leave(work, submission, heard.dead)

    def _advance(self, work: Work, advance: Advance) -> None:
        beat = read_object(self._run, f"{island_folder(work.shard)}/heartbeat.json")
        seen = int(beat.get("images_seen", 0))
        if seen > work.said:
            advance(seen - work.said, note=work.shard)
            work.said = seen

    def _leave(self, work: Work, submission: Submission, reason: str) -> None:
        """Give a job up that may yet wake: the next generation fences it."""
        if not submission.site.gone():
            self._left_behind.append((submission.site, submission.name))
        self._end(work, submission, None, reason)

    def _finish(self, work: Work, submission: Submission) -> None:
        """A job is over, by its own word or by Ray's."""
        code, reason, found = submission.how_it_ended()
        if code is ExitCode.DONE:
            try:
                self._collect(work.shard)
            except AtollError as error:  # of this shard alone: the others are not to end with it
                code, reason = error.exit_code, str(error)
        self._end(work, submission, code, reason, found)

    def _end(
        self,
        work: Work,
        submission: Submission,
        code: ExitCode | None,
        reason: str,
        found: Differing | None = None,
    ) -> None:
        """Free the site; what is not done is stopped, started again or given up."""
        site = submission.site
        site.running -= 1
        self._running.remove(work)
        submission.keep_log()
        self._journal(work, "ended", code=None if code is None else int(code), reason=reason)
        work.code = code
        work.choice.look()
        if code is ExitCode.DONE:
            return
        if code in (None, ExitCode.INTERRUPTED) and self._run.exists(stop_request(work.shard)):
            self._stopped.append(work)
            log.info("%s has stopped as asked", work.shard)
            return
        if found:  # no failure of the shard's
            work.attempts -= 1
            work.choice.refused(site, found)
            self._waiting.insert(0, work)
            name = site.island.name
            self._wait(work, f"cannot go on bitwise on island {name}: {in_words(found)}")
            return
        self._again_or_not(work, site, reason, retried=code in _RETRIED)

    def _again_or_not(self, work: Work, site: Site, reason: str, *, retried: bool) -> None:
        """Queue what failed once more, after a pause, or give it up."""
        work.reasons.append(reason)
        work.failed_at.append(site.island.name)
        reached = committed(self._run, work.shard)
        if reached > work.committed:
            # A machine that is taken back now and then is no crash loop.
            work.committed, work.attempts = reached, min(1, work.attempts)
        again = retried and work.attempts <= self._config.retries
        pause = self._config.watch.backoff_seconds * 2 ** min(5, work.attempts - 1)
        then = f"; started again in {pause:g} s" if again else ""
        log.warning("%s: %s%s", work.shard, reason, then)
        if again:
            work.not_before = time.monotonic() + pause
            self._waiting.insert(0, work)
            return
        if retried and work.attempts > 1:
            work.reasons.append(f"{work.attempts - 1} retries got no further, the last: {reason}")
        self._given_up.append(work)

    # -- how it ends -----------------------------------------------------------------------------

    def _stop_left_behind(self) -> None:
        for site, submission_id in list(self._left_behind):
            if site.silent_since is None and site.answers() and not site.gone():
                try:
                    site.jobs.stop(submission_id)
                except Unreachable as error:
                    site.missed(error)
                    continue
                self._left_behind.remove((site, submission_id))

    def _interrupted(self) -> Interrupted:
        """Ctrl-C: every job commits and leaves; one that does not is stopped."""
        running = [(work, work.submission) for work in self._running if work.submission]
        left = [job for _, job in running if job.leave()]
        deadline = time.monotonic() + _LEAVE_SECONDS
        while left and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            left = [job for job in left if not job.has_left()]
        for job in left:
            job.stop()
        silent = [work.shard for work, _ in running]
        with unless_away("how the islands ended"):
            for work, job in running:
                code = job.said()
                value = None if code is None else int(code)
                self._journal(work, "ended", code=value, reason="interrupted")
                if code in (ExitCode.INTERRUPTED, ExitCode.DONE):
                    silent.remove(work.shard)
        said = "the islands have committed"
        if silent:
            said = f"{', '.join(silent)} did not say so, and will go on from their last commits"
        return Interrupted(f"Stopped; {said}", cure="run the same command again, it resumes")

    def _failed(self, total: int) -> AtollError:
        first = self._given_up[0]
        kinds = {work.code for work in self._given_up}
        kind = _AS_RAISED.get(kinds.pop(), Failed) if len(kinds) == 1 else Failed
        cure = "the others are done and kept; run the same command again for these"
        if any(work.choice.words() for work in self._given_up):
            cure += f", when an island like theirs is there, or with {ALLOW}"
        return kind(
            f"{len(self._given_up)} of {total} islands did not finish: "
            f"{', '.join(work.shard for work in self._given_up)}. "
            f"{first.shard}: {first.reasons[-1]}",
            cure=cure,
        )

    def _journal(self, work: Work, event: str, **facts: Any) -> None:
        name = "" if work.submission is None else work.submission.name
        write_journal(self._run, work.shard, event, name, **facts)
