"""`atoll verify`: a stranger's recheck of a run or a removal, from files alone, wherever they are.

Recomputes and never trusts: every digest, the ledger's chain, each soup from its ingredients, the
ensemble from its parts, and that nothing left descends from a shard that was taken out.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from safetensors import SafetensorError

from atoll.cli.recording import place_in
from atoll.cli.signature import BYTES as SIGNATURE_BYTES
from atoll.cli.signature import check_signature, read_signer, signature_name
from atoll.cli.unlearn import (
    CERTIFICATE_NAME,
    SCHEMA_VERSION,
    Certificate,
    extract,
)
from atoll.cli.working import INTENT_NAME, check_no_removal
from atoll.core.config import CONFIG_NAME
from atoll.core.digest import sha256_folder
from atoll.core.errors import AtollError, Refused, UsageError
from atoll.core.journal import log
from atoll.core.ledger import Ledger
from atoll.core.lock import LOCK_NAME
from atoll.core.manifest import MANIFEST_NAME, Commons, Manifest, Plan, Shard, check_schema
from atoll.core.storage import Storage

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from atoll.merge.far import Place

_CENTROIDS = "partition/centroids.safetensors"


@dataclass(frozen=True)
class Finding:
    """One thing that was rechecked, whether it held, and why not."""

    what: str
    holds: bool
    detail: str = ""


def verify(target: str, *, signer: str | None = None) -> list[Finding]:
    """Recheck a run (its folder) or a removal (its certificate, lying in the run's folder).

    A certificate has to be signed by the `signer` whose public key is in that file.
    """
    if target.endswith(".json"):
        parent, _, name = target.rpartition("/")
        return _verify_certificate(Storage(parent or "."), name, signer)
    if signer is not None:
        raise UsageError(
            "A run is not signed, the certificate of a removal is",
            cure=f"verify {target}/{CERTIFICATE_NAME}, or leave out --signer",
        )
    return verify_run(Storage(target))


def verify_run(run: Storage) -> list[Finding]:
    """Recheck everything that the manifest names."""
    manifest = Manifest.load(run)
    findings = [
        _check("no removal is unfinished", lambda: check_no_removal(run)),
        _check("the ledger is an unbroken chain", lambda: Ledger(run).entries()),
    ]
    for path, expected in manifest.artefacts().items():
        findings.append(_check(f"{path} has its digest", _digest_check(run, path, expected)))
    findings.append(_check("every artefact is in the ledger", lambda: _in_ledger(run, manifest)))
    findings.append(_check("the manifest says what they say", lambda: _facts_check(run, manifest)))
    for artefact in manifest.soups.values():
        findings.append(
            _check(
                f"{artefact.path} is the exact mean of its ingredients",
                _soup_check(place_in(run, artefact.path)),
            )
        )
    if manifest.ensemble is not None:
        findings.append(
            _check(
                "the ensemble is assembled from the run's experts and gate heads",
                lambda: _ensemble_check(run, manifest),
            )
        )
    for name in _removed(run):
        findings.append(_check(f"nothing of {name} is left", _removal_check(run, manifest, name)))
    return findings


def _verify_certificate(run: Storage, name: str, signer: str | None) -> list[Finding]:
    key = None if signer is None else read_signer(signer)
    certificate = load_certificate(run, name)
    if not run.exists(MANIFEST_NAME):
        raise UsageError(
            f"{run.uri}/{name} lies alone: there is no {MANIFEST_NAME} beside it",
            allowed="a certificate in the folder of its run",
            cure="fetch the whole run; a removal is rechecked from its files",
        )
    findings = [
        _check(
            "the ledger holds the removal that the certificate names",
            lambda: _certified(run, certificate),
        )
    ]
    if key is not None:
        findings.append(
            _check(f"{name} is signed by {signer}", lambda: _check_signed(run, name, key))
        )
    elif run.exists(signature_name(name)):
        log.warning(
            "%s is signed, and nobody has asked by whom: --signer PUBLIC.pem checks that", name
        )
    return findings + verify_run(run)


def load_certificate(run: Storage, name: str = CERTIFICATE_NAME) -> Certificate:
    """Read a certificate; `UsageError` when there is none, `Refused` when it is damaged."""
    try:
        values = run.read_json(name)
    except FileNotFoundError:
        raise UsageError(f"There is no certificate at {run.uri}/{name}") from None
    check_schema(values, SCHEMA_VERSION, f"{run.uri}/{name}")
    try:
        return Certificate.model_validate(values)
    except ValidationError as error:
        raise Refused(f"{run.uri}/{name} is no certificate: {error.errors()[0]['msg']}") from error


def _check(what: str, recheck: Callable[[], object]) -> Finding:
    try:
        recheck()
    except (AtollError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        # What a library or a look-up makes of a damaged file is a finding like any other.
        detail = str(error) if isinstance(error, AtollError) else f"{type(error).__name__}: {error}"
        return Finding(what, False, detail)
    return Finding(what, True)


def _digest_check(run: Storage, path: str, expected: str) -> Callable[[], None]:
    def recheck() -> None:
        if not run.exists(path):
            raise Refused(f"{path} is missing")
        found = run.sha256(path)
        if found != expected:
            raise Refused(f"{path} has sha256 {found}, the manifest says {expected}")

    return recheck


def _in_ledger(run: Storage, manifest: Manifest) -> None:
    recorded = {entry.sha256 for entry in Ledger(run).entries()}
    unknown = [path for path, sha in manifest.artefacts().items() if sha not in recorded]
    if unknown:
        raise Refused(f"not in the ledger: {', '.join(unknown)}")


def _facts_check(run: Storage, manifest: Manifest) -> None:
    """What the manifest says besides digests, against the artefacts that those digests cover."""
    from atoll.core.denoiser import read_card
    from atoll.core.latents import load_autoencoder
    from atoll.core.pack import read_shard_card
    from atoll.partitioner.buckets import sizes_of
    from atoll.partitioner.previous import saved_config

    config = saved_config(run)
    ledger = Ledger(run)
    encoder, centroids = ledger.latest("encoder", "encoder"), ledger.latest("centroids", _CENTROIDS)
    told: dict[str, tuple[object, object]] = {
        "seed": (manifest.seed, config.seed),
        "partition.by": (manifest.partition.by, config.by),
        "commons.declared": (manifest.commons.declared, config.commons),
        "encoder.spec": (manifest.encoder.spec, run.read_json("encoder/config.json")["spec"]),
    }
    main, factor = manifest.picture, 1
    if manifest.vae is not None:
        loaded = load_autoencoder(run.local(manifest.vae.path))
        main, factor = manifest.vae.picture, loaded.factor
        told["vae.spec"] = (manifest.vae.spec, config.vae)
        told["vae.latent_space"] = (manifest.vae.latent_space, loaded.latent_space)
    sizes = [(p.height * factor, p.width * factor) for p in manifest.pictures]
    told["buckets"] = (sizes, sizes_of(config.buckets, main.height, factor=factor))
    for entry, fit in ((manifest.encoder, encoder), (manifest.partition, centroids)):
        told[f"{entry.path}: fitted_on"] = (entry.fitted_on, [] if fit is None else fit.shards)
    parts: dict[str, Commons | Shard] = {"commons": manifest.commons, **manifest.shards}
    for name, part in parts.items():
        card = read_shard_card(run.local(part.path))
        stated = (part.records, part.held_out, manifest.picture, manifest.latent_space)
        found = (card.records, card.held_out, card.picture, card.latent_space)
        told[f"{name}: records"] = (stated, found)
        strange = [p for p in (card.shapes or {}).values() if p not in manifest.pictures]
        told[f"{name}: shapes"] = (
            (manifest.buckets is None, []),
            (card.shapes is None, strange),
        )
    for name, expert in manifest.experts.items():
        images_seen = read_card(run.local(expert.path)).images_seen
        told[f"{name}: images_seen"] = (expert.images_seen, images_seen)
        order = run.read_json(f"islands/{name}/island.json")
        told[f"{name}: recipe"] = (manifest.recipe, order["recipe"])
        told[f"{name}: plan"] = (manifest.shard(name).plan, Plan.model_validate(order["plan"]))
    differing = [what for what, (stated, found) in told.items() if stated != found]
    if differing:
        raise Refused(f"the manifest and the files differ about: {', '.join(differing)}")


def _soup_check(soup: Place) -> Callable[[], None]:
    def recheck() -> None:
        from atoll.merge.verify import verify as verify_soup

        verdict = verify_soup(soup)
        if not verdict.holds:
            raise Refused("; ".join(verdict.problems))

    return recheck


def _ensemble_check(run: Storage, manifest: Manifest) -> None:
    """Build the folder again in a scratch place, from the islands' own files, and compare."""
    from atoll.router.assemble import build
    from atoll.router.component import read_ensemble_config

    config = read_ensemble_config(run.local("ensemble/transformer"))
    assert manifest.ensemble is not None
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
        folder = Path(scratch) / "ensemble"
        build(run, manifest, folder, gate=config.gate, with_base=config.base)
        found = sha256_folder(folder)
    if found != manifest.ensemble.sha256:
        raise Refused(f"assembled anew it has sha256 {found}, not {manifest.ensemble.sha256}")


def _removed(run: Storage) -> list[str]:
    try:
        return [entry.name for entry in Ledger(run).entries() if entry.kind == "removal"]
    except AtollError:
        return []  # the chain is broken, which is a finding of its own


def _removal_check(run: Storage, manifest: Manifest, shard: str) -> Callable[[], None]:
    """No artefact, no file name and no row of the partition has the shard in it."""

    def recheck() -> None:
        newest = {(entry.kind, entry.name): entry for entry in Ledger(run).entries()}
        descended = {entry.sha256 for entry in newest.values() if shard in entry.shards}
        # What --fit-on all let the shard reach is in everything; the certificate names it.
        if shard in (*manifest.encoder.fitted_on, *manifest.partition.fitted_on):
            descended = set()
        left = [path for path, sha in manifest.artefacts().items() if sha in descended]
        left += _unaccounted(run, manifest)
        left += [name for name in run.list() if shard in name.split("/")]
        left += [part for part in ("shards", "experts") if shard in getattr(manifest, part)]
        from atoll.partitioner.assignments import read_assignments

        if any(row.shard == shard for row in read_assignments(run)):
            left.append("rows of partition/assignments.parquet")
        if left:
            raise Refused(f"still there: {', '.join(sorted(set(left)))}")

    return recheck


def _unaccounted(run: Storage, manifest: Manifest) -> list[str]:
    """Files that neither an artefact nor a known name accounts for: they may hold the shard."""
    kept = set(manifest.artefacts()) | {f"islands/{shard}" for shard in manifest.shards}
    kept |= {MANIFEST_NAME, CERTIFICATE_NAME, INTENT_NAME, ".lock", LOCK_NAME}
    kept |= {
        "ledger",
        "base-training",
        "trunk-training",
        "joint-gate-training",
        "evaluation",
        f"islands/{CONFIG_NAME}",
    }
    names = run.list()
    if run.is_local:  # hidden ones too
        root = run.local("")
        names = [f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file()]
    strays = [n for n in names if not any(n == k or n.startswith(f"{k}/") for k in kept)]
    return [name for name in strays if not _is_certificate(run, name)]


def _check_signed(run: Storage, name: str, key: Ed25519PublicKey) -> None:
    if not run.exists(signature_name(name)):
        raise Refused(f"{signature_name(name)} is not there")
    check_signature(run.read_bytes(name), run.read_bytes(signature_name(name)), key)


def _is_certificate(run: Storage, name: str) -> bool:
    """An earlier removal's, kept under another name, or its signature: digests and 64 bytes."""
    stem, _, end = name.rpartition(".")
    if "/" in name or end not in ("json", "sig"):
        return False
    if end == "sig" and run.size(name) != SIGNATURE_BYTES:
        return False
    try:
        load_certificate(run, f"{stem}.json")
    except AtollError:
        return False
    return True


def _certified(run: Storage, certificate: Certificate) -> None:
    """The removal's entry is in the chain as it was when the certificate was written."""
    entries = Ledger(run).entries()
    number = certificate.removal_entry
    if number >= len(entries):
        raise Refused(f"the ledger has {len(entries)} entries, the certificate names {number}")
    entry = entries[number]
    if (entry.kind, entry.name) != ("removal", certificate.shard):
        raise Refused(f"ledger entry {number} is not a removal of {certificate.shard}")
    if run.sha256(f"ledger/{number:06d}.json") != certificate.ledger_sha256:
        raise Refused(f"ledger entry {number} is not the one that the certificate closed with")
    told = extract(run, entry)
    differing = [key for key in vars(told) if getattr(told, key) != getattr(certificate, key)]
    if differing:
        raise Refused(f"the certificate and the ledger differ about: {', '.join(differing)}")
    recorded = {each.sha256 for each in entries}
    unknown = [path for path, sha in certificate.after.items() if sha not in recorded]
    if unknown:
        raise Refused(f"the ledger does not know of {', '.join(unknown)}")


def findings_json(findings: list[Finding]) -> list[dict[str, object]]:
    """For `--json` and the report."""
    return [json.loads(json.dumps(vars(finding))) for finding in findings]
