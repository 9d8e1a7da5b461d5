"""Experts and gate heads of a run -> an ensemble folder that diffusers loads.

Files are copied, not rewritten, so that the folder's digest follows from the islands' digests and
the shards' record counts alone; assembling again after a removal gives the folder that never had
the shard.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler

from atoll.core.digest import canonical_json
from atoll.core.embedding import text_projection
from atoll.core.errors import DataError, Refused, UsageError
from atoll.core.head import read_head_config
from atoll.core.ledger import Ledger
from atoll.core.manifest import Artefact, Manifest, check_artefact, require
from atoll.core.storage import Storage
from atoll.router.component import (
    BASE,
    EnsembleConfig,
    GateKind,
    check_trunk,
    copy_experts,
    copy_heads,
    copy_joint,
    write_ensemble_config,
)
from atoll.router.forward import TextProjection
from atoll.router.pipeline import CARD_NAME, ensemble_card

_log = logging.getLogger("atoll")


def assemble(
    run: Storage,
    manifest: Manifest,
    out: str | None = None,
    *,
    gate: GateKind = "per-shard",
    with_base: bool = False,
) -> Artefact:
    """Write the ensemble of all experts that are there into the run, and a copy of it to `out`.

    A copy leaves the run, so the manifest lists it under exports.

    Shards whose island is not finished are missing islands: the ensemble is the exact law over
    those that are there, and its folder says which are not. With the base it is about that of the
    commons and the shards together (`Gate` says how nearly): the base is one expert more, and
    answers where no shard does.
    """
    present, missing = _here(manifest)
    check_parts(run, manifest, gate=gate, with_base=with_base)
    if out is not None:
        _export_place(out)
    if gate == "per-shard":
        for shard in present:
            head = read_head_config(run.local(manifest.experts[shard].gate_head.path))
            for said in head.calibration.warnings():
                _log.warning("%s %s; `atoll evaluate` says what follows", shard, said)
    if missing:
        _log.warning("Missing shards, left out and renormalised: %s", ", ".join(missing))
    with run.writing_folder("ensemble") as folder:
        build(run, manifest, folder, gate=gate, with_base=with_base)
    manifest.ensemble = Artefact(path="ensemble", sha256=run.sha256("ensemble"))
    if out is not None:
        export(run.local("ensemble"), out)
        manifest.add_export(out)
    _record(run, manifest, present, gate, with_base)
    return manifest.ensemble


def check_parts(
    run: Storage, manifest: Manifest, *, gate: GateKind = "per-shard", with_base: bool = False
) -> None:
    """Refuse, before anything is written, what is missing, changed, or does not go together."""
    if with_base:
        _check_base(manifest, gate)
        check_artefact(run, _base(manifest))
    elif not manifest.experts:
        raise DataError("This run has no expert yet", cure="train one with `atoll train RUN`")
    check_artefact(run, manifest.encoder)
    if manifest.vae is not None:
        check_artefact(run, manifest.vae)
    shared = _joint(manifest) if gate == "joint" else _trunk(manifest)
    check_artefact(run, shared)
    for expert in manifest.experts.values():
        check_artefact(run, expert)
        check_artefact(run, expert.gate_head)
        if gate == "per-shard":
            check_trunk(read_head_config(run.local(expert.gate_head.path)), shared.sha256)


def has_base(run: Storage) -> bool:
    """Whether the run's ensemble was assembled with the base, as the ledger says."""
    made = (ledger := Ledger(run)).latest("ensemble", "ensemble")
    base = ledger.latest("base", "base")
    return made is not None and base is not None and base.id in made.parents


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


def _check_base(manifest: Manifest, gate: GateKind) -> None:
    """Refuse the base beside a gate, or a shard, with which it cannot stand."""
    _base(manifest)
    if gate == "joint":
        raise UsageError(
            "A joint gate has learned to tell shards apart, and has no word for the base",
            allowed="--with-base with the islands' own heads",
        )
    if BASE in manifest.shards:
        raise UsageError(
            f"A shard of this run is called '{BASE}', as the base would be in its ensemble",
            cure="assemble without --with-base",
        )


def _base(manifest: Manifest) -> Artefact:
    return require(manifest.base, "base", "train it with `atoll base RUN`")


def _trunk(manifest: Manifest) -> Artefact:
    return require(manifest.trunk, "trunk of its gate", "train one with `atoll base RUN`")


def _joint(manifest: Manifest) -> Artefact:
    return require(
        manifest.joint_gate, "joint gate", "train one: `atoll assemble RUN --gate joint`"
    )


def _here(manifest: Manifest) -> tuple[list[str], list[str]]:
    """Shards with an expert, and shards without, in the order in which JSON keeps them."""
    present = sorted(shard for shard in manifest.shards if shard in manifest.experts)
    return present, sorted(shard for shard in manifest.shards if shard not in manifest.experts)


def build(
    run: Storage,
    manifest: Manifest,
    folder: Path,
    *,
    gate: GateKind = "per-shard",
    with_base: bool = False,
) -> None:
    """Fill a local folder with the ensemble; its bytes follow from the run's files alone."""
    present, missing = _here(manifest)
    transformer = folder / "transformer"
    experts = {shard: manifest.experts[shard] for shard in present}
    places = {shard: run.local(each.path) for shard, each in experts.items()}
    records = {shard: manifest.shards[shard].records for shard in present}
    if with_base:
        places[BASE] = run.local(_base(manifest).path)
        records = dict(sorted({**records, BASE: manifest.commons.records}.items()))
    copy_experts(transformer, places)
    if gate == "joint":
        copy_joint(transformer, run.local(_joint(manifest).path), present)
    else:
        heads = {shard: run.local(each.gate_head.path) for shard, each in experts.items()}
        copy_heads(transformer, run.local(_trunk(manifest).path), heads)
    config = EnsembleConfig(
        picture=manifest.picture,
        records=records,
        gate=gate,
        base=with_base,
        missing=missing,
    )
    version = _diffusers_version(next(iter(places.values())))
    write_ensemble_config(transformer, config, version=version)
    encoder = run.local(manifest.encoder.path)
    TextProjection(text_projection(encoder)).save(transformer)
    shutil.copytree(encoder, folder / "text_encoder")
    if manifest.vae is not None:
        shutil.copytree(run.local(manifest.vae.path), folder / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    # As diffusers lays its files out, so that a pipeline that is saved again is the same.
    scheduler.write_text(
        json.dumps({**settings, "_diffusers_version": version}, indent=2, sort_keys=True) + "\n"
    )
    index = {
        "_class_name": "AtollPipeline",
        "_diffusers_version": version,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["atoll.core.embedding", "Encoder"],
        "transformer": ["atoll.router.model", "EnsembleModel"],
    }
    if manifest.vae is not None:
        index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_bytes(canonical_json(index))
    (folder / CARD_NAME).write_bytes(canonical_json(ensemble_card(list(records), missing)))


def _diffusers_version(expert: Path) -> str:
    """The version that wrote an expert: who assembles, or rechecks, may have another."""
    return str(json.loads((expert / "config.json").read_text())["_diffusers_version"])


def _record(
    run: Storage, manifest: Manifest, present: list[str], gate: GateKind, with_base: bool
) -> None:
    """One ledger entry, descending from every expert and the gate; then the manifest."""
    assert manifest.ensemble is not None
    ledger = Ledger(run)
    parents = [
        entry
        for shard in present
        for kind in (("expert",) if gate == "joint" else ("expert", "gate_head"))
        if (entry := ledger.latest(kind, shard)) is not None
    ]
    shared = ["encoder", "vae", "joint_gate" if gate == "joint" else "trunk"]
    for part in [*shared, "base"] if with_base else shared:
        entry = ledger.latest(part, part)
        parents += [entry] if entry is not None else []
    ledger.append("ensemble", "ensemble", manifest.ensemble.sha256, parents=parents)
    manifest.save(run)
