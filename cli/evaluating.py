"""Models as systems under test, and what a run can say about itself in a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from atoll.cli.systems import Model, Pictures, load_model, model_names, sample
from atoll.cli.working import working_on
from atoll.core import seeds
from atoll.core.errors import UsageError
from atoll.core.head import HeadConfig, read_head_config
from atoll.core.journal import log
from atoll.core.ledger import Ledger
from atoll.core.manifest import CLUSTERS, Artefact, Manifest, check_artefact
from atoll.core.pack import Pack
from atoll.core.storage import Storage
from atoll.evaluate.choice import choose_routing
from atoll.evaluate.evaluation import (
    METRICS_NAME,
    Evaluation,
    Request,
    Sampled,
    System,
    evaluate_systems,
)
from atoll.evaluate.features import embed
from atoll.evaluate.reference import TRAIN, Records, load_records
from atoll.evaluate.report import write_report
from atoll.evaluate.shares import Instrument, from_centroids, from_records
from atoll.evaluate.views import (
    ComparisonView,
    Curve,
    PartitionView,
    PictureRow,
    ReportData,
    ShardView,
    read_curve,
)
from atoll.partitioner.assignments import cluster_name
from atoll.partitioner.words import count_words, telling_words
from atoll.router.calibrate import GateCalibration, measure_gate
from atoll.router.component import BASE

_MONTAGE = 24
_MOST_REFERENCE = 1_000


def evaluate_models(
    models: Sequence[str],
    reference: str,
    *,
    routings: Sequence[str],
    count: int,
    steps: int,
    guidance: float,
    one_posterior: bool,
    seed: int,
    device: str,
    out: str | None,
) -> tuple[Evaluation, str]:
    """Measure models against a run's held-out records; write metrics.json and report.html.

    Without `out` they are the run's own, else one of its exports: they show every shard's records,
    and a removal deletes them.
    """
    with working_on(reference) as (run, manifest):
        if out is not None and _is_inside(out, run):
            raise UsageError(
                f"{out} is inside the run, where only what the manifest names may lie",
                cure="leave out --out, or name a folder elsewhere",
            )
        for artefact in (manifest.partition, manifest.commons, *manifest.shards.values()):
            check_artefact(run, artefact)
        evaluation, data = _measure(
            models, run, manifest, routings=routings, count=count, steps=steps, guidance=guidance,
            one_posterior=one_posterior, seed=seed, device=device,
        )  # fmt: skip
        if out is None:
            save_evaluation(evaluation, run, manifest)
            write_report(data, run)
        else:
            place = Storage(out)
            place.write_json("metrics.json", evaluation.model_dump(mode="json"))
            write_report(data, place, name="report.html")
            manifest.add_export(out)
            manifest.save(run)
    return evaluation, f"{reference}/evaluation" if out is None else out


def _is_inside(out: str, run: Storage) -> bool:
    return run.is_local and Path(out).resolve().is_relative_to(run.local("").resolve())


def _measure(
    models: Sequence[str],
    run: Storage,
    manifest: Manifest,
    *,
    routings: Sequence[str],
    count: int,
    steps: int,
    guidance: float,
    one_posterior: bool,
    seed: int,
    device: str,
) -> tuple[Evaluation, ReportData]:
    reference = run.uri
    loaded = [load_model(path, encoder=f"{reference}/encoder", device=device) for path in models]
    systems = []
    named = dict(zip(model_names(list(models)), loaded, strict=True))
    several = sum(model.kind == "ensemble" for model in loaded) > 1
    for name, model in named.items():
        ours, theirs = ((m.picture.shape, m.latent_space) for m in (model, manifest))
        if ours != theirs:
            raise UsageError(
                f"{name} makes {ours[1]} of {ours[0]}, the reference has {theirs[1]} of "
                f"{theirs[0]}",
                cure="measure it against its own run",
            )
        systems += systems_of(
            model, name, routings=routings, steps=steps, guidance=guidance,
            one_posterior=one_posterior, several=several,
        )  # fmt: skip
    encoder = loaded[0].encoder
    gates = {
        name: gate_of(model, run, manifest)
        for name, model in named.items()
        if model.kind == "ensemble" and set(model.shards) <= {BASE, *manifest.shards}
    }
    evaluation = evaluate_systems(
        systems,
        reference_of(run, manifest),
        encoder,
        seed=seed,
        count=count,
        instrument=instrument_of(run, manifest),
        real=load_records(run, manifest, split=TRAIN),
        shape=manifest.picture.shape,
    ).model_copy(update={"gates": gates})
    own = [name for name, model in named.items() if model.sha256 == _own_ensemble(manifest)]
    if own and not one_posterior:  # which is another law than the one that `auto` samples
        evaluation = with_choice(evaluation, manifest, own[0])
    data = ReportData(
        title=f"Evaluation of {reference}",
        shards=tuple(manifest.shards),
        sentence=f"Measured against {evaluation.n_reference} held-out records.",
        partition=partition_view(run, manifest),
        curves=training_curves(run, manifest),
        comparison=comparison(systems, prompts_of(run, manifest, 10), manifest, seed=seed),
        gate_heads=gate_heads(run, manifest),
        evaluation=evaluation,
        ledger=Ledger(run).entries(),
    )
    return evaluation, data


def reference_of(run: Storage, manifest: Manifest) -> Records:
    """The held-out records to compare with: all, or a seeded thousand of many.

    Distances between pictures of 32x32 are then a matter of minutes.
    """
    records = load_records(run, manifest)
    order = seeds.order(
        manifest.seed, "evaluate", "reference", first=0, count=len(records), n=len(records)
    )
    return records.take(sorted(order[:_MOST_REFERENCE].tolist()))


def with_choice(evaluation: Evaluation, manifest: Manifest, name: str) -> Evaluation:
    """The evaluation of a run's own ensemble, `name` there, with what `auto` is from now on."""
    sha256 = _own_ensemble(manifest)
    assert sha256 is not None
    return evaluation.model_copy(update={"auto": choose_routing(evaluation, name, sha256)})


def _own_ensemble(manifest: Manifest) -> str | None:
    return None if manifest.ensemble is None else manifest.ensemble.sha256


def save_evaluation(evaluation: Evaluation, run: Storage, manifest: Manifest) -> None:
    """Write a run's metrics and note in its ledger that every shard reached them."""
    evaluation.save(run)
    shards = list(manifest.shards)
    Ledger(run).append("evaluation", METRICS_NAME, run.sha256(METRICS_NAME), shards=shards)


def systems_of(
    model: Model,
    name: str,
    *,
    routings: Sequence[str],
    steps: int,
    guidance: float = 1.0,
    one_posterior: bool = False,
    several: bool = False,
) -> list[System]:
    """One system per routing for an ensemble, one for anything else.

    A routing is named by itself, and where there are `several` ensembles by its ensemble too.
    """
    how = {"steps": steps, "guidance": guidance}
    if model.kind != "ensemble":
        return [
            System(
                name=name,
                kind=model.kind,  # type: ignore[arg-type]
                sample=_sampler(model, "full", one_posterior=False, **how),
                shard=model.shards[0] if model.kind == "expert" else None,
                **how,  # type: ignore[arg-type]
            )
        ]
    before, after = f"{name} " if several else "", ", one posterior" if one_posterior else ""
    return [
        System(
            name=f"{before}{routing}{after}",
            kind="ensemble",
            sample=_sampler(model, routing, one_posterior=one_posterior, **how),
            ensemble=name,
            routing=routing,
            shards=tuple("commons" if shard == BASE else shard for shard in model.shards),
            **how,  # type: ignore[arg-type]
        )
        # As they are called, so that `auto` is measured under the name of what it stands for.
        for routing in dict.fromkeys(str(model.routing(text)) for text in routings)
    ]


def as_control(system: System) -> System:
    """The same system under the kind that the report compares the others with."""
    return replace(system, kind="control", shard=None)


def _sampler(model: Model, routing: str, **options: Any) -> Callable[[Request], Sampled]:
    def draw(request: Request) -> Sampled:
        made: Pictures = sample(
            model, request.prompts, routing=routing, seed=request.seed, first=request.first,
            x_noise=request.x_noise, **options,
        )  # fmt: skip
        return Sampled(made.x_data, made.experts_per_step, made.null_experts_per_step)

    return draw


def instrument_of(run: Storage, manifest: Manifest) -> Instrument:
    """Which shard a picture is of: by the partition's centroids, or the owners' mean directions."""
    shards = list(manifest.shards)
    if manifest.partition.by == CLUSTERS:
        centroids = load_file(run.local(f"{manifest.partition.path}/centroids.safetensors"))[
            "centroids"
        ]
        rows = [i for i in range(len(centroids)) if cluster_name(i) in manifest.shards]
        return from_centroids(tuple(cluster_name(i) for i in rows), centroids[rows])
    from atoll.core.embedding import load_encoder

    encoder = load_encoder(run.local(manifest.encoder.path))
    records = load_records(run, manifest, split=TRAIN)
    return from_records(
        {
            shard: embed(encoder, records.pictures[[s == shard for s in records.shards]])
            for shard in shards
        }
    )


def partition_view(run: Storage, manifest: Manifest) -> PartitionView:
    """Sizes, a montage and the telling words of every shard, from the shards' own files."""
    records = load_records(run, manifest, split=TRAIN)
    by_shard: dict[str, dict[str, int]] = {name: {} for name in (*manifest.shards, "commons")}
    for caption, shard in zip(records.captions, records.shards, strict=True):
        by_shard[shard][caption] = by_shard[shard].get(caption, 0) + 1
    words = telling_words(
        {name: count_words(captions) for name, captions in by_shard.items()},
        {name: sum(captions.values()) for name, captions in by_shard.items()},
        most=6,
    )
    sizes = {name: (entry.records, entry.held_out) for name, entry in manifest.shards.items()}
    sizes["commons"] = (manifest.commons.records, manifest.commons.held_out)
    views = {
        name: ShardView(
            name, *sizes[name], words=tuple(words[name]), pictures=_montage(records, name)
        )
        for name in by_shard
    }
    how = f"By {manifest.partition.by}, with the encoder {manifest.encoder.spec!r}" + (
        " fitted on the commons." if manifest.encoder.spec == "fit" else "."
    )
    commons = views.pop("commons")
    return PartitionView(tuple(views.values()), commons=commons, how=how)


def _montage(records: Records, shard: str) -> torch.Tensor:
    rows = [row for row, name in enumerate(records.shards) if name == shard]
    return records.pictures[rows[:_MONTAGE]]


def training_curves(run: Storage, manifest: Manifest) -> tuple[Curve, ...]:
    """The base's and every island's loss."""
    files = {"base": "base-training/metrics.jsonl"}
    files |= {shard: f"islands/{shard}/metrics.jsonl" for shard in manifest.shards}
    return tuple(read_curve(run, name, file) for name, file in files.items() if run.exists(file))


def gate_heads(run: Storage, manifest: Manifest) -> dict[str, HeadConfig]:
    """Every gate head's calibration, as its island measured it."""
    return {
        shard: read_head_config(run.local(expert.gate_head.path))
        for shard, expert in manifest.experts.items()
    }


def gate_of(model: Model, run: Storage, manifest: Manifest) -> GateCalibration:
    """An ensemble's gate on the held-out records of its shards; what it warns of is logged.

    Those of the base are the commons'.
    """
    parts: dict[str, Artefact] = {BASE: manifest.commons, **manifest.shards}
    packs = {name: Pack(run.local(parts[name].path)) for name in model.shards}
    found = measure_gate(model.gate, packs, heads=model.heads, seed=manifest.seed)
    for warning in found.warnings:
        log.warning("%s", warning)
    if found.recommended is not None:
        log.warning("--routing %s does without: it draws at the start", found.recommended)
    elif found.warnings:
        log.warning("no routing does without: one that draws at the start draws by the caption")
    return found


def prompts_of(run: Storage, manifest: Manifest, count: int) -> tuple[str, ...]:
    """Captions that stand for all shards: the commonest held-out ones of each in turn."""
    chosen: list[str] = []
    records = load_records(run, manifest)
    ranked = []
    for shard in manifest.shards:
        own = [c for c, s in zip(records.captions, records.shards, strict=True) if s == shard]
        ranked.append(sorted(set(own), key=lambda caption: (-own.count(caption), caption)))
    while len(chosen) < count and any(ranked):
        for captions in ranked:
            while captions and captions[0] in chosen:
                captions.pop(0)
            if captions and len(chosen) < count:
                chosen.append(captions.pop(0))
    return tuple(chosen)


def comparison(
    systems: Sequence[System], prompts: Sequence[str], manifest: Manifest, *, seed: int
) -> ComparisonView:
    """The same noise through every system, one picture a prompt."""
    from atoll.evaluate.evaluation import noise

    x_noise = noise(seed, manifest.picture.shape, first=0, count=len(prompts))
    rows = []
    for system in systems:
        log.debug("comparing %s", system.name)
        made = system.sample(Request(tuple(prompts), x_noise, 0, seed))
        rows.append(PictureRow(system.name, system.kind, made.x_data, system.shard, system.about))
    steps, guidance = systems[0].steps, systems[0].guidance
    guided = "without guidance" if guidance == 1 else f"guidance {guidance:g}"
    how = f"{steps} Euler steps, {guided}, seed {seed}."
    # The noise of latents is no picture.
    noise_shown = x_noise if manifest.vae is None else None
    return ComparisonView(tuple(prompts), tuple(rows), noise=noise_shown, how=how)
