"""How a run remembers a soup: its digest where it lies in the run, else its place as an export."""

from __future__ import annotations

from atoll.core.ledger import Ledger
from atoll.core.manifest import Artefact, Manifest
from atoll.core.storage import Storage
from atoll.merge.ledger_entry import ledger_entry
from atoll.merge.soup import Soup


def remember(made: Soup, run: Storage, manifest: Manifest) -> None:
    """Record a soup in the manifest and the ledger of a run."""
    folder = made.path.resolve()
    home = run.local("").resolve() if run.is_local else None
    if home is not None and folder.is_relative_to(home):
        name = folder.relative_to(home).as_posix()
        entry = ledger_entry(folder, name)
        manifest.soups[name] = Artefact(path=name, sha256=entry.sha256)
        manifest.soups = dict(sorted(manifest.soups.items()))
    else:
        name = str(folder)
        entry = ledger_entry(folder, name)
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
