"""The ledger: an append-only, hash-chained record of every artefact and the shards that reached it.

One file per entry, `ledger/000042.json`, created exclusively, each holding the sha256 of the file
before it. An artefact's `shards` are those whose records reached it, directly or through a choice
made with it: the union of its own and of all its parents'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import atoll
from atoll.core.digest import canonical_json
from atoll.core.errors import Refused
from atoll.core.manifest import check_schema
from atoll.core.storage import Storage

FOLDER = "ledger"
# In the environment: the private key of who signs certificates, for nobody else's processes.
SIGNING_KEY = "ATOLL_SIGNING_KEY"
SCHEMA_VERSION = 1
_NO_PREVIOUS = "0" * 64


class LedgerEntry(BaseModel):
    """One line of the ledger."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    id: int
    kind: str
    name: str
    sha256: str
    parents: list[int] = Field(default_factory=list)
    shards: list[str] = Field(default_factory=list)
    note: dict[str, Any] = Field(default_factory=dict)
    code_version: str
    previous_sha256: str


class Ledger:
    """The entries below `ledger/` of a run."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def entries(self) -> list[LedgerEntry]:
        """All entries in order, after checking the chain; `Refused` names the first broken link."""
        return [entry for entry, _ in self._checked()]

    def _checked(self) -> list[tuple[LedgerEntry, str]]:
        found: list[tuple[LedgerEntry, str]] = []
        previous = _NO_PREVIOUS
        for number, name in enumerate(self._storage.list(FOLDER)):
            data = self._storage.read_bytes(name)
            where = f"{self._storage.uri}/{name}"
            values = self._storage.read_json(name)
            check_schema(values, SCHEMA_VERSION, where)
            try:
                entry = LedgerEntry.model_validate(values)
            except ValidationError as error:
                raise _broken(where, str(error.errors()[0]["msg"])) from error
            if name != _file_name(number) or entry.id != number:
                raise _broken(where, f"entry {number} was expected here")
            if entry.previous_sha256 != previous:
                raise _broken(where, "it does not follow the entry before it")
            previous = hashlib.sha256(data).hexdigest()
            found.append((entry, previous))
        return found

    def head(self) -> str:
        """The sha256 of the newest entry's file: what a certificate signs for."""
        checked = self._checked()
        return checked[-1][1] if checked else _NO_PREVIOUS

    def append(
        self,
        kind: str,
        name: str,
        sha256: str,
        *,
        parents: Iterable[LedgerEntry] = (),
        shards: Iterable[str] = (),
        note: Mapping[str, Any] | None = None,
    ) -> LedgerEntry:
        """Record an artefact, unless it is what the newest entry of its name already records."""
        checked = self._checked()
        parents = list(parents)
        reached = set(shards).union(*(parent.shards for parent in parents))
        for earlier, _ in reversed(checked):
            if (earlier.kind, earlier.name) == (kind, name):
                if (earlier.sha256, earlier.shards) == (sha256, sorted(reached)):
                    return earlier
                break
        entry = LedgerEntry(
            id=len(checked),
            kind=kind,
            name=name,
            sha256=sha256,
            parents=sorted(parent.id for parent in parents),
            shards=sorted(reached),
            note=dict(note or {}),
            code_version=atoll.__version__,
            previous_sha256=checked[-1][1] if checked else _NO_PREVIOUS,
        )
        try:
            self._storage.create(_file_name(entry.id), canonical_json(entry.model_dump()))
        except FileExistsError:
            raise Refused(
                f"Another command wrote ledger entry {entry.id} at the same moment",
                cure="run one command at a time on a run",
            ) from None
        return entry

    def latest(self, kind: str, name: str) -> LedgerEntry | None:
        """The newest entry of that kind and name, or None."""
        matching = [e for e in self.entries() if (e.kind, e.name) == (kind, name)]
        return matching[-1] if matching else None


def _file_name(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def _broken(where: str, why: str) -> Refused:
    return Refused(
        f"The ledger is broken at {where}: {why}",
        cure="restore the ledger from a copy; nothing was changed",
    )
