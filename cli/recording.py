"""How a run remembers a soup: its digest where it lies in the run, else its place as an export."""

from __future__ import annotations

from pathlib import Path

from atoll.core.ledger import Ledger
from atoll.core.manifest import Artefact, Manifest
from atoll.core.storage import Storage
from atoll.merge.far import Place
from atoll.merge.ledger_entry import ledger_entry
from atoll.merge.soup import Soup


def place_in(run: Storage, name: str) -> Place:
    """Where something of a run lies."""
    return run.local(name) if run.is_local else f"{run.uri}/{name}"


def name_in(run: Storage, place: Place) -> str | None:
    """What a place is called in the run that it lies in; None of one elsewhere."""
    if isinstance(place, str):
        place, home = place.rstrip("/"), f"{run.uri}/"
        return place.removeprefix(home) if place.startswith(home) else None
    if not run.is_local:
        return None
    folder, root = place.resolve(), run.local("").resolve()
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else None


def remember(made: Soup, run: Storage, manifest: Manifest) -> None:
    """Record a soup in the manifest and the ledger of a run."""
    if (name := name_in(run, made.place)) is not None:
        entry = ledger_entry(made, name)
        manifest.soups[name] = Artefact(path=name, sha256=entry.sha256)
        manifest.soups = dict(sorted(manifest.soups.items()))
        # As which it was listed while it was put there.
        manifest.exports = [place for place in manifest.exports if place != f"{run.uri}/{name}"]
    else:
        name = str(made.place.resolve() if isinstance(made.place, Path) else made.place)
        entry = ledger_entry(made, name)
        manifest.add_export(name)
    ledger = Ledger(run)
    known = [ledger.latest("expert", expert) for expert in entry.parents]
    ledger.append(
        "soup",
        name,
        entry.sha256,
        parents=[parent for parent in known if parent is not None],
        shards=entry.shards,
        note=entry.note,
    )
    manifest.save(run)
