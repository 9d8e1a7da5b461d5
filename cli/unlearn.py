"""`atoll unlearn`: take one shard out of a run, so that the run is the one that never had it.

Nothing is retrained: soups are averaged anew without the shard, the ensemble and its gate are
assembled anew, the partition's files lose the shard's rows, and what was made with the shard's help
(metrics, reports) is deleted. A removal that was interrupted leaves `unlearn.json`; the run then
takes no other command, and the same command finishes it. Every step may be repeated.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from atoll.core.errors import Refused, UsageError
from atoll.core.journal import log
from atoll.core.ledger import Ledger, LedgerEntry
from atoll.core.manifest import MANIFEST_NAME, Artefact, Manifest
from atoll.core.storage import Storage

if TYPE_CHECKING:
    from atoll.merge.soup import Soup

INTENT_NAME = "unlearn.json"
CERTIFICATE_NAME = "certificate.json"
SCHEMA_VERSION = 1


class Certificate(BaseModel):
    """`certificate.json`: what a stranger rechecks of a removal, and what it does not cover."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    shard: str
    records: int
    before: dict[str, str]  # every artefact that descended from the shard -> sha256
    after: dict[str, str]  # every artefact of the run now -> sha256
    manifest_sha256: str
    removal_entry: int  # the removal's number in the ledger
    ledger_sha256: str  # of that entry's file, which closes the chain of all before it
    rewritten_exports: list[str]
    beyond_reach: list[str]
    recheck: list[str] = Field(default_factory=list)


def check_no_removal(run: Storage) -> None:
    """Refuse to work on a run in the middle of a removal."""
    if run.exists(INTENT_NAME):
        shard = run.read_json(INTENT_NAME)["shard"]
        raise Refused(
            f"A removal of {shard} from {run.uri} was interrupted",
            cure=f"finish it first: `atoll unlearn {run.uri} {shard}`",
        )


def unlearn(run: Storage, shard: str) -> Certificate:
    """Take the shard out of everything in the run, and say in writing what was done.

    Exports that can be reached are rewritten; the others are named in `beyond_reach`.
    """
    from atoll.partitioner.forget import forget

    manifest = Manifest.load(run)
    intent = _intent(run, manifest, shard)
    _leave_soups(run, manifest, shard)
    rewritten, unreached = _leave_exports(run, manifest, shard)
    if shard in manifest.shards:
        forget(run, manifest, shard)
    manifest.experts.pop(shard, None)
    _leave_ensemble(run, manifest)
    run.remove("evaluation")
    run.remove(f"islands/{shard}")
    manifest.save(run)
    certificate = _certify(run, manifest, intent, rewritten, unreached)
    run.write_json(CERTIFICATE_NAME, certificate.model_dump(mode="json"))
    run.remove(INTENT_NAME)
    return certificate


def artefacts(manifest: Manifest) -> dict[str, str]:
    """Every artefact that a manifest names, by path -> sha256."""
    entries: list[Artefact] = [manifest.encoder, manifest.commons, manifest.partition]
    entries += manifest.shards.values()
    entries += [entry for entry in (manifest.base, manifest.ensemble) if entry is not None]
    for expert in manifest.experts.values():
        entries += [expert, expert.gate_head]
    entries += manifest.soups.values()
    return {entry.path: entry.sha256 for entry in entries}


def _intent(run: Storage, manifest: Manifest, shard: str) -> dict[str, Any]:
    """What is being removed, written before anything is touched; read again by a second attempt."""
    if run.exists(INTENT_NAME):
        intent: dict[str, Any] = run.read_json(INTENT_NAME)
        if intent["shard"] != shard:
            check_no_removal(run)
        return intent
    entry = manifest.shard(shard)
    if len(manifest.shards) == 1:
        raise UsageError(
            f"{shard} is the only shard of this run",
            cure="delete the run to be rid of it; the base and the commons do not descend from it",
        )
    newest = {(e.kind, e.name): e for e in Ledger(run).entries()}
    reached = {e.sha256 for e in newest.values() if shard in e.shards}
    before = {path: sha for path, sha in artefacts(manifest).items() if sha in reached}
    intent = {
        "schema_version": SCHEMA_VERSION,
        "shard": shard,
        "records": entry.records + entry.held_out,
        "before": before,
        "fitted": {
            "encoder": shard in manifest.encoder.fitted_on,
            "centroids": shard in manifest.partition.fitted_on,
        },
    }
    run.write_json(INTENT_NAME, intent)
    return intent


def _leave_soups(run: Storage, manifest: Manifest, shard: str) -> None:
    from atoll.cli.soups import remember

    for name, artefact in list(manifest.soups.items()):
        left = _without(run.local(artefact.path), shard)
        if left is not None:
            remember(left, run, manifest)
            continue
        log.warning("%s held nothing but %s and is gone", artefact.path, shard)
        run.remove(artefact.path)
        del manifest.soups[name]
        manifest.save(run)


def _without(folder: Path, shard: str) -> Soup | None:
    """Take a shard out of a soup where it is in it; None where nothing would be left."""
    from atoll.merge import soup as soups

    made = soups.show(folder)
    for part in made.recipe.ingredients:
        if part.shard != shard:
            continue
        if len(made.recipe.ingredients) == 1:
            return None
        made = soups.remove(folder, part.name)
    return made


def _leave_exports(run: Storage, manifest: Manifest, shard: str) -> tuple[list[str], list[str]]:
    """Rewrite the copies outside the run that can be reached; name the others."""
    from atoll.cli.soups import remember

    rewritten, unreached = [], []
    for export in manifest.exports:
        place = Path(export)
        if (place / "soup.json").is_file():
            left = _without(place, shard)
            if left is None:
                shutil.rmtree(place)
            else:
                remember(left, run, manifest)
            rewritten.append(export)
        elif (place / "model_index.json").is_file():
            rewritten.append(export)  # assembled anew together with the run's own ensemble
        else:
            unreached.append(export)
    return rewritten, unreached


def _leave_ensemble(run: Storage, manifest: Manifest) -> None:
    from atoll.router.assemble import assemble, export

    if manifest.ensemble is not None:
        if manifest.experts:
            assemble(run, manifest)
        else:
            run.remove(manifest.ensemble.path)
            manifest.ensemble = None
    for place in manifest.exports:
        if not (Path(place) / "model_index.json").is_file():
            continue
        if manifest.ensemble is None:
            shutil.rmtree(place)
        else:
            export(run.local(manifest.ensemble.path), place)


def _certify(
    run: Storage,
    manifest: Manifest,
    intent: dict[str, Any],
    rewritten: list[str],
    unreached: list[str],
) -> Certificate:
    """Close the removal in the ledger, and extract what a stranger rechecks."""
    shard = intent["shard"]
    manifest_sha256 = run.sha256(MANIFEST_NAME)
    ledger = Ledger(run)
    removal: LedgerEntry = ledger.append(
        "removal", shard, manifest_sha256, note={"before": intent["before"]}
    )
    beyond = ["copies of the ensemble, the experts or soups that others were given before"]
    beyond += ["the ledger's own lines, which go on naming the shard"]
    beyond += [f"the export {place}, which is not within reach from here" for place in unreached]
    for what, was in intent["fitted"].items():
        if was:
            beyond.append(f"the {what}, fitted on this shard's records too (--fit-on all)")
    return Certificate(
        shard=shard,
        records=intent["records"],
        before=intent["before"],
        after=artefacts(manifest),
        manifest_sha256=manifest_sha256,
        removal_entry=removal.id,
        ledger_sha256=run.sha256(f"ledger/{removal.id:06d}.json"),
        rewritten_exports=rewritten,
        beyond_reach=beyond,
        recheck=["atoll verify RUN/certificate.json", "sha256sum RUN/manifest.json"],
    )
