"""What a demo found, as the report shows it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import diffusers
import torch

import atoll
from atoll.cli import evaluating
from atoll.cli.demo_settings import DemoSettings
from atoll.cli.systems import Pictures
from atoll.cli.unlearn import Certificate
from atoll.cli.verify import Finding
from atoll.core.denoiser import Denoiser
from atoll.core.ledger import LedgerEntry
from atoll.core.manifest import Manifest
from atoll.core.pack import Pack
from atoll.core.recipes import forward_flops
from atoll.core.storage import Storage
from atoll.evaluate.evaluation import Evaluation
from atoll.evaluate.report import write_report
from atoll.evaluate.views import (
    CertificateView,
    Check,
    Command,
    ComparisonView,
    CostLine,
    Curve,
    Figure,
    RemovalRow,
    RemovalView,
    ReportData,
    gate_traces,
)

_TRAINING_PASSES = 3  # forward and backward, in forward passes


@dataclass
class Outcome:
    """Filled stage by stage."""

    settings: DemoSettings
    seconds: dict[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    prompts: tuple[str, ...] = ()
    comparison: ComparisonView | None = None
    traced: Pictures | None = None
    curves: tuple[Curve, ...] = ()
    removed: str = ""
    certificate: Certificate | None = None
    findings: Sequence[Finding] = ()
    after: ComparisonView | None = None
    ledger: Sequence[LedgerEntry] = ()


def write_demo_report(
    outcome: Outcome, place: Storage, run: Storage, manifest: Manifest, *, name: str
) -> None:
    """Write the report at the demo's place."""
    corpus = outcome.settings.corpus
    what = "1,797 handwritten digits were" if corpus is None else f"The corpus {corpus} was"
    trace = outcome.traced.trace if outcome.traced else []
    pictures = outcome.traced.x_data if outcome.traced else torch.empty(0)
    data = ReportData(
        title="Atoll: a diffusion model from islands, and how it forgets",
        shards=tuple(manifest.shards),
        sentence=(
            f"{what} partitioned into {len(manifest.shards)} shards, each trained as an "
            "isolated Ray job, put together as an ensemble and as a soup, and one shard was taken "
            "out again, exactly."
        ),
        removed=outcome.removed,
        figures=_figures(outcome, manifest),
        partition=evaluating.partition_view(run, manifest),
        curves=outcome.curves,
        comparison=outcome.comparison,
        gate_traces=gate_traces(trace, outcome.prompts, pictures),
        gate_heads=evaluating.gate_heads(run, manifest),
        removal=_removal(outcome),
        evaluation=outcome.evaluation,
        costs=_costs(outcome, run, manifest),
        ledger=outcome.ledger,
        certificate=_certificate(outcome),
        commands=_commands(place, outcome),
        versions={
            "atoll": atoll.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "ray": version("ray"),
            "python": platform.python_version(),
        },
    )
    write_report(data, place, name=name)


def _figures(outcome: Outcome, manifest: Manifest) -> tuple[Figure, ...]:
    records = sum(s.records + s.held_out for s in manifest.shards.values())
    records += manifest.commons.records + manifest.commons.held_out
    figures = [
        Figure(f"{records:,}", "records", f"{manifest.commons.records:,} of them the commons"),
        Figure(str(len(manifest.shards)), "islands", "sharing nothing but storage"),
    ]
    rows = {row.name: row for row in outcome.evaluation.rows} if outcome.evaluation else {}
    full = rows.get("full")
    if full is not None and full.reading is not None:
        accuracy = full.reading.accuracy
        figures.append(
            Figure(
                f"{100 * accuracy.value:.1f}%", "read as asked",
                f"of {accuracy.n} pictures by the full ensemble, unguided",
            )
        )  # fmt: skip
    held = sum(finding.holds for finding in outcome.findings)
    figures.append(
        Figure(f"{held}/{len(outcome.findings)}", "checks hold", f"after {outcome.removed} left")
    )
    minutes = sum(outcome.seconds.values()) / 60
    figures.append(Figure(f"{minutes:.1f}", "minutes", "on this machine, Ray included"))
    return tuple(figures)


def _removal(outcome: Outcome) -> RemovalView | None:
    if outcome.after is None or outcome.comparison is None:
        return None
    before = {row.name: row for row in outcome.comparison.rows}
    rows = tuple(
        RemovalRow(row.name, row.kind, before[row.name].pictures, row.pictures)
        for row in outcome.after.rows
    )
    return RemovalView(outcome.removed, outcome.prompts, rows, how=outcome.after.how)


def _costs(outcome: Outcome, run: Storage, manifest: Manifest) -> tuple[CostLine, ...]:
    """Images and FLOPs by count, seconds by this demo's clock."""
    assert manifest.base is not None
    base = Denoiser.load(run.local(manifest.base.path))
    null = Pack(run.local(manifest.commons.path)).null
    forward = forward_flops(base.network, base.card.family, manifest.picture, null)
    each = float(_TRAINING_PASSES * forward)
    plans = {name: shard.plan for name, shard in manifest.shards.items() if shard.plan}
    total = sum(plan.images_seen for plan in plans.values())
    islands = [
        CostLine(name, plan.images_seen, plan.images_seen * each, shard=name)
        for name, plan in plans.items()
    ]
    seconds = outcome.seconds
    return (
        CostLine("partition", seconds=seconds.get("partition")),
        CostLine(
            "base", base.card.images_seen, base.card.images_seen * each, seconds.get("base")
        ),
        *islands,
        CostLine(
            "all islands", None, None, seconds.get("islands"),
            about="Ray's start, gate heads and previews included",
        ),
        CostLine(
            "monolith", total, total * each, seconds.get("control"),
            about="the control: equal images and FLOPs, the same base",
        ),
        CostLine("assemble and soup", seconds=seconds.get("assemble and soup")),
        CostLine("evaluation", seconds=seconds.get("evaluation")),
        CostLine("unlearn and verify", seconds=seconds.get("unlearn and verify")),
    )  # fmt: skip


def _certificate(outcome: Outcome) -> CertificateView | None:
    certificate = outcome.certificate
    if certificate is None:
        return None
    return CertificateView(
        shard=certificate.shard,
        checks=tuple(Check(f.what, f.holds, f.detail) for f in outcome.findings),
        facts=(
            ("records taken out", f"{certificate.records:,}"),
            ("artefacts that descended from them", str(len(certificate.before))),
            ("manifest.json", certificate.manifest_sha256),
            ("ledger entry that closes the removal", str(certificate.removal_entry)),
        ),
        beyond_reach=tuple(certificate.beyond_reach),
    )


def _commands(place: Storage, outcome: Outcome) -> tuple[Command, ...]:
    out = place.uri
    prompt = outcome.prompts[0] if outcome.prompts else ""
    return (
        Command("atoll demo", "all of this again"),
        Command(f'atoll sample {out}/run "{prompt}" --routing once', "pictures of your own"),
        Command(f"atoll verify {out}/forgotten/certificate.json", "recheck the removal"),
        Command(f"atoll soup show {out}/run/soups/all", "what is in the soup"),
    )
