"""One shard of the queue: its attempts, and the islands that may take it.

Pins say which may. Of those, one that has other hardware, workers, threads or versions than the
shard's checkpoint was made with cannot go on with it bitwise. What the islands' file says of that
is known before it is asked; the rest its job finds out and says in `exit.json`, and it is not asked
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from atoll.core.checkpoint import newest_facts
from atoll.core.errors import ExitCode
from atoll.core.storage import Storage
from atoll.islands.island import PARTS
from atoll.islands.settings import TrainConfig
from atoll.islands.signs import HEAD_TRAINING, island_folder
from atoll.islands.sites import Site
from atoll.islands.state import Differing, differing, in_words, made_with
from atoll.islands.submission import Submission

ALLOW = "--allow-inexact-resume"


class Choice:
    """The islands that may take one shard, by pins and by what its checkpoint was made with."""

    def __init__(
        self, run: Storage, shard: str, config: TrainConfig, sites: Sequence[Site]
    ) -> None:
        self._run = run
        self._shard = shard
        self._config = config
        self._sites = [site for site in sites if site.island.takes(shard, config.islands)]
        # By island: what the checkpoint was made with when it refused, and why it did.
        self._refusals: dict[str, tuple[dict[str, Any], Differing]] = {}
        self.look()

    def look(self) -> None:
        """Read what the checkpoint was made with from which the next attempt goes on."""
        self.made_with: dict[str, Any] = {}
        self._by_all = True
        if not self._config.bitwise_resume:
            return
        here = island_folder(self._shard)
        for part, place in (("expert", here), ("gate_head", f"{here}/{HEAD_TRAINING}")):
            if not self._run.exists(f"{here}/{part}/{PARTS[part]}"):
                self.made_with = made_with(newest_facts(self._run, place))
                self._by_all = part == "expert"  # by all workers; a head is the first one's
                return

    def refused(self, site: Site, found: Differing) -> None:
        """Ask this island no more, as long as the checkpoint is of this kind."""
        self._refusals[site.island.name] = self.made_with, found

    def able(self) -> list[Site]:
        """Those that may take it, for all that is known."""
        return [site for site in self._sites if not self._unlike(site)]

    def unlike(self) -> dict[str, Differing]:
        """Those that the shard could go to if it had not to be bitwise, and why it has not."""
        found = {site.island.name: self._unlike(site) for site in self._sites if not site.gone()}
        return {name: why for name, why in found.items() if why}

    def words(self) -> str:
        """What the checkpoint was made with, and what other islands have; empty without any."""
        unlike = self.unlike()
        if not unlike:
            return ""
        made = ", ".join(
            f"{key} {value}" for key, value in sorted(self.made_with.items()) if value is not None
        )
        others = "; ".join(f"{name}: {in_words(why)}" for name, why in unlike.items())
        return (
            f". Its checkpoint was made with {made}, and {ALLOW} lets it go on elsewhere ({others})"
        )

    def names(self) -> str:
        """The islands that it is not pinned away from."""
        return ", ".join(site.island.name for site in self._sites) or "none"

    def _unlike(self, site: Site) -> Differing:
        then, found = self._refusals.get(site.island.name, ({}, {}))
        if found and then == self.made_with:
            return found
        workers = site.workers if self._by_all else 1
        known = {
            "workers": workers,
            "parallel": self._config.parallel if workers > 1 else "none",
            "threads": self._config.threads,
        }
        shared = {key: self.made_with[key] for key in known if key in self.made_with}
        return differing(shared, {key: known[key] for key in shared})


@dataclass
class Work:
    """One shard's attempts."""

    shard: str
    choice: Choice
    submission: Submission | None = None  # the last one
    attempts: int = 0  # since one that got further
    committed: int = 0  # images in storage when the last attempt ended
    not_before: float = 0.0
    said: int = 0  # images that the progress bar has been told of
    waits_for: str = ""  # as it was last said
    turned_away: int = 0  # times in a row that an island could not be given it
    failed_at: list[str] = field(default_factory=list)  # islands, with repetition
    reasons: list[str] = field(default_factory=list)
    code: ExitCode | None = None  # how the last attempt ended

    def rank(self, site: Site) -> tuple[int, int]:
        """Where to go next: where it failed least, then where least is going on."""
        return self.failed_at.count(site.island.name), site.running
