"""Takes a shard out of a partition, such that no file tells that it was ever there."""

from __future__ import annotations

from atoll.core.errors import Refused
from atoll.core.ledger import Ledger
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.partitioner.assignments import (
    read_assignments,
    read_unreadable,
    write_assignments,
    write_unreadable,
)
from atoll.partitioner.previous import FOLDER
from atoll.partitioner.report import write_report


def forget(run: Storage, manifest: Manifest, shard: str) -> None:
    """Remove a shard's records, its rows in `partition/` and its entry in the manifest.

    Afterwards these are bitwise those of a run whose corpus never held the shard's records, as far
    as the encoder and the centroids never saw them (`fitted_on` in the manifest). `manifest` is
    changed and saved, last: after an interruption the same call finishes the work. Experts, soups
    and whatever else was made of the shard are the caller's. Raises `UsageError` for a shard that
    does not exist and `Refused` for the last one.
    """
    manifest.shard(shard)
    if len(manifest.shards) == 1:
        raise Refused(
            f"'{shard}' is the only shard of {run.uri}, and without it there is no run",
            cure="remove the whole run instead",
        )
    # Read before anything is removed: a damaged file leaves the run as it was.
    assigned = read_assignments(run)
    unreadable = read_unreadable(run)
    run.remove(f"shards/{shard}")
    write_assignments(run, (row for row in assigned if row.shard != shard))
    write_unreadable(run, (row for row in unreadable if row["shard"] != shard))
    write_report(run)
    del manifest.shards[shard]
    manifest.partition.sha256 = run.sha256(FOLDER)
    _record(run, manifest)
    manifest.save(run)


def _record(run: Storage, manifest: Manifest) -> None:
    """Tell the ledger what the partition folder is now, with the notes it had."""
    ledger = Ledger(run)
    entries = ledger.entries()
    earlier = ledger.latest(FOLDER, FOLDER)
    kept = [
        entry
        for entry in entries
        if entry.kind in ("encoder", "vae", "commons", "centroids")
        or (entry.kind == "shard" and entry.name in manifest.shards)
    ]
    newest = {(entry.kind, entry.name): entry for entry in kept}
    note = {} if earlier is None else earlier.note
    ledger.append(FOLDER, FOLDER, manifest.partition.sha256, parents=newest.values(), note=note)
