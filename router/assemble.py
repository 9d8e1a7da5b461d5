"""Experts and gate heads of a run -> an ensemble folder that diffusers loads.

Files are copied, not rewritten, so that the folder's digest follows from the islands' digests and
the shards' record counts alone; assembling again after a removal gives the folder that never had
the shard.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from atoll.core.errors import DataError, Refused
from atoll.core.ledger import Ledger
from atoll.core.manifest import Artefact, Manifest, check_artefact
from atoll.core.storage import Storage, canonical_json, sha256_folder
from atoll.router.model import EnsembleConfig, copy_parts, write_ensemble_config
from atoll.router.pipeline import CARD_NAME, ensemble_card

_log = logging.getLogger("atoll")


def assemble(run: Storage, manifest: Manifest, out: str | None = None) -> Artefact:
    """Write the ensemble of all experts that are there into the run, and a copy of it to `out`.

    A copy leaves the run, so the manifest lists it under exports.

    Shards whose island is not finished are missing islands: the ensemble is the exact law over
    those that are there, and its folder says which are not.
    """
    if not manifest.experts:
        raise DataError("This run has no expert yet", cure="train one with `atoll train RUN`")
    present, missing = _here(manifest)
    for shard in present:
        check_artefact(run, manifest.experts[shard])
        check_artefact(run, manifest.experts[shard].gate_head)
    check_artefact(run, manifest.encoder)
    if out is not None:
        _export_place(out)
    if missing:
        _log.warning("Missing shards, left out and renormalised: %s", ", ".join(missing))
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
        folder = Path(scratch) / "ensemble"
        build(run, manifest, folder)
        sha256 = sha256_folder(folder)
        run.publish(folder, "ensemble")
        if out is not None:
            export(folder, out)
            add_export(manifest, out)
    manifest.ensemble = Artefact(path="ensemble", sha256=sha256)
    _record(run, manifest, present)
    return manifest.ensemble


def export(folder: Path, out: str) -> None:
    """Publish a copy of an ensemble at `out`, in place of an ensemble or of nothing."""
    place, name = _export_place(out)
    place.publish(folder, name)


def _export_place(out: str) -> tuple[Storage, str]:
    """Where a copy goes; `Refused` where something else stands, experts and soups among it."""
    parent, slash, name = out.rstrip("/").rpartition("/")
    place = Storage(parent or slash or ".")
    if place.list(name) and not place.exists(f"{name}/model_index.json"):
        raise Refused(f"{out} is not empty and holds no ensemble", cure="name another OUT")
    return place, name


def add_export(manifest: Manifest, out: str) -> None:
    """List a place outside the run, absolutely, so that a removal finds it again."""
    uri = out if "://" in out else str(Path(out).resolve())
    manifest.exports = sorted({*manifest.exports, uri})


def _here(manifest: Manifest) -> tuple[list[str], list[str]]:
    """Shards with an expert, and shards without, in the order in which JSON keeps them."""
    present = sorted(shard for shard in manifest.shards if shard in manifest.experts)
    return present, sorted(shard for shard in manifest.shards if shard not in manifest.experts)


def build(run: Storage, manifest: Manifest, folder: Path) -> None:
    """Fill a local folder with the ensemble; its bytes follow from the run's files alone."""
    present, missing = _here(manifest)
    copy_parts(
        folder / "transformer",
        {shard: run.local(manifest.experts[shard].path) for shard in present},
        {shard: run.local(manifest.experts[shard].gate_head.path) for shard in present},
    )
    config = EnsembleConfig(
        picture=manifest.picture,
        records={shard: manifest.shards[shard].records for shard in present},
        missing=missing,
    )
    write_ensemble_config(folder / "transformer", config)
    shutil.copytree(run.local(manifest.encoder.path), folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "AtollPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["atoll.core.embedding", "Encoder"],
        "transformer": ["atoll.router.model", "EnsembleModel"],
    }
    (folder / "model_index.json").write_bytes(canonical_json(index))
    (folder / CARD_NAME).write_bytes(canonical_json(ensemble_card(present, missing)))


def _record(run: Storage, manifest: Manifest, present: list[str]) -> None:
    """One ledger entry, descending from every expert and gate head; then the manifest."""
    assert manifest.ensemble is not None
    ledger = Ledger(run)
    parents = [
        entry
        for shard in present
        for kind in ("expert", "gate_head")
        if (entry := ledger.latest(kind, shard)) is not None
    ]
    encoder = ledger.latest("encoder", "encoder")
    parents += [encoder] if encoder is not None else []
    ledger.append("ensemble", "ensemble", manifest.ensemble.sha256, parents=parents)
    manifest.save(run)
