"""What the report can show: typed records that a command fills from a run.

Every section of `ReportData` is optional; `atoll evaluate` fills a few, the demo fills all.
Pictures are tensors `(n, channel, height, width)`, uint8 or x_data in [-1, 1]. Text may come from
strangers (captions, owners' names): it is escaped when the page is made, never here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atoll.core.head import HeadConfig
from atoll.core.ledger import LedgerEntry
from atoll.core.storage import Storage
from atoll.evaluate.evaluation import Evaluation, Kind
from atoll.router.ensemble import TraceStep


@dataclass(frozen=True)
class Figure:
    """A number that stands alone: "1,797", "records", and a remark in small print."""

    value: str
    label: str
    remark: str = ""


@dataclass(frozen=True)
class ShardView:
    """One shard (or the commons) as the partition made it."""

    name: str
    records: int
    held_out: int
    words: tuple[str, ...] = ()  # the most telling caption words, best first
    pictures: Tensor | None = None  # a montage, at most 48 are shown


@dataclass(frozen=True)
class PartitionView:
    """How the corpus was divided."""

    shards: tuple[ShardView, ...]
    commons: ShardView | None = None
    how: str = ""  # a sentence: which encoder, fitted on what, by clusters or by owner


@dataclass(frozen=True)
class Curve:
    """A training's loss over the images it has seen; `name` is a shard, "base" or a control."""

    name: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class PictureRow:
    """What one system made of the prompts, in their order."""

    name: str
    kind: Kind
    pictures: Tensor
    shard: str | None = None
    about: str = ""


@dataclass(frozen=True)
class ComparisonView:
    """The same noise through every system: rows are systems, columns prompts."""

    prompts: tuple[str, ...]
    rows: tuple[PictureRow, ...]
    noise: Tensor | None = None
    how: str = ""  # steps, guidance, seed


@dataclass(frozen=True)
class GateTrace:
    """The gate's weights along one trajectory."""

    prompt: str
    times: tuple[float, ...]  # of each step, from noise to data
    weights: Tensor  # (step, shard), in the order of ReportData.shards
    picture: Tensor  # (channel, height, width)
    noise: Tensor | None = None


@dataclass(frozen=True)
class RemovalRow:
    """One system before and after a shard was taken out, on the same noise and prompts."""

    name: str
    kind: Kind
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class RemovalView:
    """What forgetting a shard changed."""

    shard: str
    prompts: tuple[str, ...]
    rows: tuple[RemovalRow, ...]
    how: str = ""


@dataclass(frozen=True)
class CostLine:
    """What one stage took; a figure that was not measured is None."""

    stage: str
    images_seen: int | None = None
    flops: float | None = None
    seconds: float | None = None
    shard: str | None = None
    about: str = ""


@dataclass(frozen=True)
class Check:
    """Something that was recomputed, whether it held, and the detail."""

    what: str
    holds: bool
    detail: str = ""


@dataclass(frozen=True)
class CertificateView:
    """The certificate of a removal in words; the file itself is `certificate.json`."""

    shard: str
    checks: tuple[Check, ...]
    facts: tuple[tuple[str, str], ...] = ()  # (what, value), such as digests
    beyond_reach: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A line to type, and what it does."""

    line: str
    does: str = ""


@dataclass(frozen=True)
class ReportData:
    """Everything that a report may show. `shards` fixes the order and so the colours."""

    title: str
    shards: tuple[str, ...]
    sentence: str
    removed: str | None = None
    figures: tuple[Figure, ...] = ()
    partition: PartitionView | None = None
    curves: tuple[Curve, ...] = ()
    comparison: ComparisonView | None = None
    gate_traces: tuple[GateTrace, ...] = ()
    gate_heads: Mapping[str, HeadConfig] = field(default_factory=dict)
    removal: RemovalView | None = None
    evaluation: Evaluation | None = None
    costs: tuple[CostLine, ...] = ()
    ledger: Sequence[LedgerEntry] = ()
    certificate: CertificateView | None = None
    commands: tuple[Command, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def read_curve(run: Storage, name: str, file: str) -> Curve:
    """A training's `metrics.jsonl` as a curve; a torn last line is skipped."""
    points: dict[int, float] = {}
    for values in run.read_lines(file):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            points[int(values["images_seen"])] = float(values["loss"])
    return Curve(name, tuple(sorted(points.items())))


def gate_traces(
    trace: Sequence[TraceStep],
    prompts: Sequence[str],
    pictures: Tensor,
    *,
    noise: Tensor | None = None,
) -> tuple[GateTrace, ...]:
    """One record a prompt from what `Trajectory` or `AtollPipeline` noted for the whole batch."""
    times = tuple(step.t for step in trace)
    return tuple(
        GateTrace(
            prompt,
            times,
            _column(trace, index),
            pictures[index],
            None if noise is None else noise[index],
        )
        for index, prompt in enumerate(prompts)
    )


def _column(trace: Sequence[TraceStep], index: int) -> Tensor:
    return torch.stack([step.gate_weights[index] for step in trace])
