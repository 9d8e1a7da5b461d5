"""`atoll unlearn`: take one shard out of a run, so that the run is the one that never had it.

Nothing is retrained: soups are averaged anew without the shard, the ensemble and its gate are
assembled anew, the partition's files lose the shard's rows, and what was made with the shard's help
(metrics, reports) is deleted. A removal that was interrupted leaves `unlearn.json`; the run then
takes no other command, and the same command finishes it. Every step may be repeated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from atoll.cli.recording import place_in, remember
from atoll.cli.signature import signature_name, signer
from atoll.cli.working import INTENT_NAME, check_no_removal
from atoll.core.config import CONFIG_NAME
from atoll.core.denoiser import CARD_NAME, Card
from atoll.core.disk import sweep
from atoll.core.errors import AtollError, UsageError
from atoll.core.journal import log
from atoll.core.ledger import Ledger, LedgerEntry
from atoll.core.manifest import MANIFEST_NAME, Manifest, check_artefact
from atoll.core.storage import Storage
from atoll.merge.far import Place, place_of
from atoll.merge.home import Home, recovered
from atoll.merge.recipe import RECIPE_NAME

if TYPE_CHECKING:
    from atoll.merge.soup import Soup

CERTIFICATE_NAME = "certificate.json"
SCHEMA_VERSION = 1
ENSEMBLE, WITH_BASE = "ensemble", "ensemble with the base"  # kinds of exports
# What a certificate says that only the removal knew: the note of its ledger entry.
CERTIFIED = ("records", "before", "after", "rewritten_exports", "beyond_reach")


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


def unlearn(run: Storage, shard: str) -> Certificate:
    """Take the shard out of everything in the run, and say in writing what was done.

    Exports that can be reached are rewritten; the others are named in `beyond_reach`. What is
    written is signed if the environment has a key (`cli/signature.py`).
    """
    from atoll.islands.train_joint import FOLDER as JOINT
    from atoll.islands.train_joint import WORK as JOINT_WORK
    from atoll.partitioner.forget import forget

    sign = signer()  # which is refused, if at all, before anything is touched
    manifest = Manifest.load(run)
    intent = _intent(run, manifest, shard)
    emptied: list[str] = intent["emptied"]
    exports: dict[str, str] = intent["exports"]
    _leave_soups(run, manifest, shard, emptied)
    _leave_exported_soups(run, manifest, shard, exports, emptied)
    _leave_reports(manifest, exports)
    if shard in manifest.shards:
        forget(run, manifest, shard)
    manifest.experts.pop(shard, None)
    # It saw every shard; the ensemble goes back to heads.
    run.remove(JOINT)
    run.remove(JOINT_WORK)
    manifest.joint_gate = None
    _leave_ensemble(run, manifest, exports)
    run.remove("evaluation")
    run.remove(f"islands/{shard}")
    _leave_islands(run, shard)
    if run.is_local:
        sweep(run.local(""))  # what killed writers left may be the shard
    manifest.save(run)
    certificate = _certify(run, manifest, intent)
    run.remove(signature_name(CERTIFICATE_NAME))  # of a removal before
    run.write_json(CERTIFICATE_NAME, certificate.model_dump(mode="json"))
    if sign is not None:
        run.write_bytes(signature_name(CERTIFICATE_NAME), sign(run.read_bytes(CERTIFICATE_NAME)))
    run.remove(INTENT_NAME)
    return certificate


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
    before = {path: sha for path, sha in manifest.artefacts().items() if sha in reached}
    kinds, unreached = _exports(manifest, newest, shard)
    _check_sound(run, manifest, shard, kinds.values())
    soups = {each.path: place_in(run, each.path) for each in manifest.soups.values()}
    soups |= {export: place_of(export) for export, kind in kinds.items() if kind == "soup"}
    emptied = [name for name, folder in soups.items() if not _others(run, folder, shard)]
    beyond = ["copies of the ensemble, the experts or soups that others were given before"]
    beyond += ["the ledger's own lines, which go on naming the shard"]
    beyond += [f"the export {place}, which cannot be rewritten from here" for place in unreached]
    fitted = {"encoder": manifest.encoder.fitted_on, "centroids": manifest.partition.fitted_on}
    for what, shards in fitted.items():
        if shard in shards:
            beyond.append(f"the {what}, fitted on this shard's records too (--fit-on all)")
    if _planned_by_all(run):
        beyond.append(
            "how often every record was seen (--minutes), chosen with the number of all records"
        )
    intent = {
        "schema_version": SCHEMA_VERSION,
        "shard": shard,
        "records": entry.records + entry.held_out,
        "before": before,
        "rewritten_exports": sorted(kinds),
        "exports": kinds,
        "emptied": emptied,
        "beyond_reach": beyond,
    }
    run.write_json(INTENT_NAME, intent)
    return intent


def _leave_islands(run: Storage, shard: str) -> None:
    """What `train` was told of islands names no shard that is gone: its own island goes with it."""
    from atoll.core.config import save_config, saved_config
    from atoll.islands.settings import TrainConfig

    config = saved_config(TrainConfig, run, "islands")
    if config is None or not any(shard in island.shards for island in config.islands):
        return
    stay = []
    for island in config.islands:
        others = tuple(name for name in island.shards if name != shard)
        if others or not island.shards:
            stay.append(island.model_copy(update={"shards": others}))
    save_config(config.model_copy(update={"islands": tuple(stay)}), run, "islands")


def _planned_by_all(run: Storage) -> bool:
    """Whether --minutes was divided by a number of records that this shard's were among."""
    name = f"islands/{CONFIG_NAME}"
    return run.exists(name) and bool(run.read_json(name).get("planned_by_all"))


def _exports(
    manifest: Manifest, newest: dict[tuple[str, str], LedgerEntry], shard: str
) -> tuple[dict[str, str], list[str]]:
    """The exports that hold the shard: what those within reach are, and the others."""
    kinds: dict[str, str] = {}
    unreached = []
    for export in manifest.exports:
        soup = newest.get(("soup", export))
        if soup is not None and shard not in soup.shards:
            continue
        try:
            kind = _kind(Storage(export), manifest)
        except (AtollError, OSError, ValueError):  # damaged is as good as gone
            kind = None
        if kind is None:
            unreached.append(export)
        else:
            kinds[export] = kind
    return kinds, unreached


def _kind(place: Storage, manifest: Manifest) -> str | None:
    """What of this run lies at an export's place; None where it is gone, or a stranger's."""
    assert manifest.base is not None
    if place.exists(RECIPE_NAME):
        recipe = place.read_json(RECIPE_NAME)
        ours = isinstance(recipe, dict) and recipe.get("base_sha256") == manifest.base.sha256
        return "soup" if ours else None
    if not place.exists("model_index.json"):
        return "report" if place.exists("metrics.json") else None
    bases = set()
    for name in place.list():
        if not name.endswith(f"/{CARD_NAME}"):
            continue
        card = Card.model_validate(place.read_json(name))
        folder = name.removesuffix(f"/{CARD_NAME}")
        bases.add(place.sha256(folder) if card.kind == "base" else card.base_sha256)
    if manifest.base.sha256 not in bases:
        return None
    return WITH_BASE if place.read_json("transformer/config.json").get("base") else ENSEMBLE


def _check_sound(run: Storage, manifest: Manifest, shard: str, kinds: Collection[str]) -> None:
    """Refuse, while nothing is touched yet, damage that would stop the removal half-way.

    `kinds` are those of the exports within reach.
    """
    from atoll.router.assemble import check_parts, has_base

    stay = [manifest.encoder, manifest.commons, manifest.partition]
    stay += [entry for name, entry in manifest.shards.items() if name != shard]
    experts = {name: expert for name, expert in manifest.experts.items() if name != shard}
    stay += [part for expert in experts.values() for part in (expert, expert.gate_head)]
    for artefact in [*stay, *manifest.soups.values()]:
        check_artefact(run, artefact)
    staying = manifest.model_copy(update={"experts": experts})
    ensembles = {kind for kind in kinds if kind in (ENSEMBLE, WITH_BASE)}
    if manifest.ensemble is not None:
        ensembles.add(WITH_BASE if has_base(run) else ENSEMBLE)
    for kind in ensembles:
        if experts or kind == WITH_BASE:
            check_parts(run, staying, with_base=kind == WITH_BASE)


def _others(run: Storage, soup: Place, shard: str) -> bool:
    """Whether there is a soup without the shard; refused where the rest is not to be found again.

    There is none of nothing else, nor of what only the shard gave a mean: nobody without it could
    have made that.
    """
    from atoll.merge.ingredients import find_ingredients

    recipe = Home(soup).recipe()
    leaving = [part.name for part in recipe.ingredients if part.shard == shard]
    if not recipe.has_mean_without(leaving):
        return False
    if leaving:
        for opened in find_ingredients(recipe, soup, search=_search(run), leave=leaving):
            with opened.model:
                opened.read()
    return True


def _leave_soups(run: Storage, manifest: Manifest, shard: str, emptied: list[str]) -> None:
    for name, artefact in list(manifest.soups.items()):
        if artefact.path not in emptied:
            remember(_without(run, place_in(run, artefact.path), shard), run, manifest)
            continue
        log.warning("%s is no soup without %s, and is gone", artefact.path, shard)
        run.remove(artefact.path)
        del manifest.soups[name]
        manifest.save(run)


def _search(run: Storage) -> list[Path]:
    """Where else than recipes say experts may be; a run elsewhere is not fetched for it."""
    return [run.local("islands")] if run.is_local else []


def _without(run: Storage, soup: Place, shard: str) -> Soup:
    """Take a shard out of a soup where it is in it."""
    from atoll.merge import soup as soups

    recovered(soup)
    made = soups.show(soup)
    leaving = [part.name for part in made.recipe.ingredients if part.shard == shard]
    if not leaving:
        return made
    return soups.remove_all(soup, leaving, search=_search(run))


def _leave_exported_soups(
    run: Storage, manifest: Manifest, shard: str, exports: dict[str, str], emptied: list[str]
) -> None:
    """Rewrite the soups outside the run; one that held nothing else is no export any more."""
    for export in [place for place, kind in exports.items() if kind == "soup"]:
        if export in emptied:
            _drop_export(run, manifest, export)
        else:
            remember(_without(run, place_of(export), shard), run, manifest)


def _drop_export(run: Storage, manifest: Manifest, export: str) -> None:
    recovered(place_of(export))
    Storage(export).remove("")
    manifest.exports = [place for place in manifest.exports if place != export]
    manifest.save(run)


def _leave_reports(manifest: Manifest, exports: dict[str, str]) -> None:
    """Reports outside the run show the shard's records; what else lies beside them is not ours."""
    for place in [place for place, kind in exports.items() if kind == "report"]:
        for name in ("metrics.json", "report.html"):
            Storage(place).remove(name)
        manifest.exports = [each for each in manifest.exports if each != place]


def _leave_ensemble(run: Storage, manifest: Manifest, exports: dict[str, str]) -> None:
    """The ensemble and its copies anew; where neither an expert nor the base is left, none."""
    from atoll.router.assemble import assemble, build, export, has_base

    if manifest.ensemble is not None:
        if (with_base := has_base(run)) or manifest.experts:
            assemble(run, manifest, with_base=with_base)
        else:
            run.remove(manifest.ensemble.path)
            manifest.ensemble = None
    for place, kind in exports.items():
        if kind not in (ENSEMBLE, WITH_BASE):
            continue
        if kind == ENSEMBLE and not manifest.experts:
            _drop_export(run, manifest, place)
            continue
        # Each as it was, with the base or without, whatever the run's own is by now.
        with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
            build(run, manifest, folder := Path(scratch) / "ensemble", with_base=kind == WITH_BASE)
            export(folder, place)


def _certify(run: Storage, manifest: Manifest, intent: dict[str, Any]) -> Certificate:
    """Close the removal in the ledger, and extract what a stranger rechecks."""
    note = {key: intent[key] for key in CERTIFIED if key in intent}
    removal: LedgerEntry = Ledger(run).append(
        "removal",
        intent["shard"],
        run.sha256(MANIFEST_NAME),
        note={**note, "after": manifest.artefacts()},
    )
    return extract(run, removal)


def extract(run: Storage, removal: LedgerEntry) -> Certificate:
    """The certificate of a removal, a function of its ledger entry alone."""
    return Certificate(
        shard=removal.name,
        **{key: removal.note[key] for key in CERTIFIED},
        manifest_sha256=removal.sha256,
        removal_entry=removal.id,
        ledger_sha256=run.sha256(f"ledger/{removal.id:06d}.json"),
        recheck=["atoll verify RUN/certificate.json", "sha256sum RUN/manifest.json"],
    )
