"""Measure systems against held-out records: the same noise, prompts and reference for every one.

A system is a function from a request to pictures; whether a base, an expert, an ensemble under some
routing, a soup or a control stands behind it does not matter here. Writes nothing: the result is
the content of `RUN/evaluation/metrics.json`. It holds no times, so that it is the same every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from atoll.core import seeds
from atoll.core.errors import DataError, Refused
from atoll.core.journal import progress
from atoll.core.manifest import check_schema
from atoll.core.storage import Storage
from atoll.evaluate.features import ENCODER, EmbedsImages, Space, spaces, to_uint8
from atoll.evaluate.metrics import Estimate, Jackknife, Quality, as_estimate, measure
from atoll.evaluate.reader import Reader, Reading
from atoll.evaluate.reference import Records
from atoll.evaluate.shares import Instrument, Shares, compare
from atoll.router.calibrate import GateCalibration

SCHEMA_VERSION = 1
METRICS_NAME = "evaluation/metrics.json"
Kind = Literal["real", "base", "expert", "ensemble", "soup", "control"]


@dataclass(frozen=True)
class Request:
    """Pictures to make: prompts, their noise `(n, ...)` of x_data, and its position.

    `first` is the index of the first picture in the evaluation, for systems that draw something of
    their own (a routing that samples experts): their draws are functions of (seed, first + i).
    """

    prompts: tuple[str, ...]
    x_noise: Tensor
    first: int
    seed: int


@dataclass(frozen=True)
class Sampled:
    """Pictures `(n, channel, height, width)`, and experts run a step, of either branch."""

    x_data: Tensor
    experts_per_step: float = 1.0
    null_experts_per_step: float = 0.0


@dataclass(frozen=True)
class System:
    """Something that makes pictures, and what is to be printed beside its figures."""

    name: str
    kind: Kind
    sample: Callable[[Request], Sampled]
    steps: int
    guidance: float = 1.0
    shard: str | None = None
    about: str = ""
    ensemble: str | None = None  # what it is a routing of
    routing: str | None = None
    shards: tuple[str, ...] | None = None  # whose law it models; None: every shard's, no commons'


class Row(BaseModel):
    """One system's figures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Kind
    shard: str | None
    about: str
    n: int
    steps: int | None  # None for real records, which nobody sampled
    guidance: float | None
    experts_per_step: float | None
    passes_per_picture: float | None  # forward passes of one expert-sized network
    spaces: dict[str, Quality]
    kid_minus_control: dict[str, Estimate] = Field(default_factory=dict)
    shares: Shares | None = None
    reading: Reading | None = None
    ensemble: str | None = None  # what it is a routing of, as under `gates`
    routing: str | None = None


class Chosen(BaseModel):
    """The routing that `auto` is for one ensemble, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    routing: str
    why: str
    ensemble_sha256: str  # of the ensemble that was evaluated


class Evaluation(BaseModel):
    """`metrics.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    seed: int
    n: int
    n_reference: int
    reference: str
    spaces: dict[str, str]  # name -> what it is
    dimensions: dict[str, int]
    control: str | None
    reader: Estimate | None = None  # its own leave-one-out accuracy
    # Of each shard's reference records, the part that shares of shards count as its own.
    own: dict[str, float] = Field(default_factory=dict)
    rows: list[Row]
    gates: dict[str, GateCalibration] = Field(default_factory=dict)  # of each ensemble, by name
    auto: Chosen | None = None  # where the run's own ensemble was evaluated

    def save(self, run: Storage) -> None:
        """Write it below the run, complete or not at all."""
        run.write_json(METRICS_NAME, self.model_dump(mode="json"))

    @classmethod
    def load(cls, run: Storage) -> Evaluation:
        """Read it; `Refused` when it is damaged or of another version."""
        values: Any = run.read_json(METRICS_NAME)
        check_schema(values, SCHEMA_VERSION, f"{run.uri}/{METRICS_NAME}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise Refused(f"{run.uri}/{METRICS_NAME} is damaged: {error.errors()[0]}") from error


def evaluate_systems(
    systems: Sequence[System],
    reference: Records,
    encoder: EmbedsImages,
    *,
    seed: int,
    count: int,
    instrument: Instrument | None = None,
    real: Records,
    control: str | None = None,
    about_reference: str = "held-out records of all shards and of the commons",
    shape: tuple[int, ...] | None = None,
    batch: int = 100,
) -> Evaluation:
    """Sample `count` pictures from each system and measure them all in the same way.

    `real` are further real records of the same law: their captions are the prompts, and their
    pictures are measured like a system's, as the floor below which no figure can be expected at
    this N. Prompts must not be those of `reference` itself: a sample that has its very mixture of
    captions agrees with it better than chance, and KID comes out negative. `control` names the
    system that all the others are compared with, pair by pair. `shape` is that of the noise, where
    it is not that of pictures.
    """
    _check_names(systems, control)
    bench = _Bench(reference, spaces(encoder), instrument, seed)
    order = seeds.order(seed, "evaluate", "prompts", first=0, count=count, n=len(real))
    asked = real.take(order.tolist())
    measured = [bench.row(_real(real), asked.take(range(min(count, len(real)))), None)]
    for system in systems:
        pictures, runs = _draw(system, asked, seed, batch, shape)
        measured.append(bench.row(system, Records(pictures, *_said(asked)), runs))
    near_control = next((kids for row, kids in measured if row.name == control), None)
    rows = [_against(row, kids, near_control, control) for row, kids in measured]
    return Evaluation(
        seed=seed,
        n=count,
        n_reference=len(reference),
        reference=about_reference,
        spaces={space.name: space.about for space in bench.spaces},
        dimensions={name: rows.shape[1] for name, rows in bench.features.items()},
        control=control,
        reader=bench.reader.own_accuracy() if bench.reader else None,
        own=instrument.own(bench.features[ENCODER], reference.shards) if instrument else {},
        rows=rows,
    )


class _Bench:
    """The reference's features, computed once, and what measures a set of pictures by them."""

    def __init__(
        self,
        reference: Records,
        in_spaces: Iterable[Space],
        instrument: Instrument | None,
        seed: int,
    ) -> None:
        self.spaces = tuple(in_spaces)
        self.features = {s.name: s.features(reference.pictures) for s in self.spaces}
        self.instrument = instrument
        self.of = reference.shards
        self.seed = seed
        labelled = [row for row, label in enumerate(reference.labels) if label is not None]
        known = reference.take(labelled)
        self.reader = (
            Reader(known.pictures, [str(label) for label in known.labels])
            if len(labelled) > 1
            else None
        )

    def row(
        self, system: System, made: Records, runs: tuple[float, float] | None
    ) -> tuple[Row, dict[str, Jackknife]]:
        """Everything about one set of pictures and the captions and labels they were asked for.

        `runs` are the experts at a step, of the conditional and of the null branch.
        """
        features = {s.name: s.features(made.pictures) for s in self.spaces}
        found = {
            name: measure(rows, self.features[name], seed=self.seed)
            for name, rows in features.items()
        }
        row = Row(
            name=system.name,
            kind=system.kind,
            shard=system.shard,
            about=system.about,
            n=len(made),
            steps=None if runs is None else system.steps,
            guidance=None if runs is None else system.guidance,
            experts_per_step=None if runs is None else runs[0],
            passes_per_picture=None if runs is None else sum(runs) * system.steps,
            spaces={name: quality for name, (quality, _) in found.items()},
            shares=self._shares(features[ENCODER], made.shards, system.shards),
            reading=self._reading(made),
            ensemble=system.ensemble,
            routing=system.routing,
        )
        return row, {name: near for name, (_, near) in found.items()}

    def _shares(
        self, features: Tensor, asked: Sequence[str], law: Sequence[str] | None
    ) -> Shares | None:
        """Shares among records, and pictures of prompts, of the shards that a system models.

        The commons may be of other contents than all of them, and an ensemble may be without some.
        """
        if self.instrument is None:
            return None
        among = self.instrument.names if law is None else law
        made = features[[shard in among for shard in asked]]
        real = self.features[ENCODER][[shard in among for shard in self.of]]
        if not (len(made) and len(real)):
            return None
        counts = self.instrument.count(made), self.instrument.count(real)
        return compare(self.instrument.names, *counts, seed=self.seed)

    def _reading(self, made: Records) -> Reading | None:
        labelled = [row for row, label in enumerate(made.labels) if label is not None]
        if self.reader is None or not labelled:
            return None
        asked = made.take(labelled)
        return self.reader.reading(asked.pictures, [str(label) for label in asked.labels])


def noise(seed: int, shape: tuple[int, ...], *, first: int, count: int) -> Tensor:
    """The noise `(count, *shape)` that every system starts from.

    The stream is the one that `AtollPipeline` draws from for the same seed and position.
    """
    return seeds.normal(seed, "x_noise", first=first, count=count, shape=shape)


def _draw(
    system: System, asked: Records, seed: int, batch: int, shape: tuple[int, ...] | None
) -> tuple[Tensor, tuple[float, float]]:
    """A system's uint8 pictures, and its mean numbers of experts at a step, of both branches."""
    picture = tuple(asked.pictures.shape[1:])
    parts, experts, null_experts = [], 0.0, 0.0
    with progress(f"sampling {system.name}", len(asked)) as advance:
        for first in range(0, len(asked), batch):
            prompts = asked.captions[first : first + batch]
            x_noise = noise(seed, shape or picture, first=first, count=len(prompts))
            with torch.no_grad():
                sampled = system.sample(Request(prompts, x_noise, first, seed))
            if sampled.x_data.shape != (len(prompts), *picture):
                raise ValueError(
                    f"{system.name} made {tuple(sampled.x_data.shape)}; allowed: "
                    f"{(len(prompts), *picture)}; cure: return one picture a prompt"
                )
            parts.append(to_uint8(sampled.x_data))
            share = len(prompts) / len(asked)
            experts += sampled.experts_per_step * share
            null_experts += sampled.null_experts_per_step * share
            advance(len(prompts))
    return torch.cat(parts), (experts, null_experts)


def _against(
    row: Row, kids: dict[str, Jackknife], control: dict[str, Jackknife] | None, name: str | None
) -> Row:
    """The row with its KID minus the control's; both have the same noise and reference."""
    if control is None or row.name == name or row.kind == "real":
        return row
    about = f"below 0: nearer to the reference than {name}"
    differences = {
        space: as_estimate(kids[space] - control[space], row.n, kid.n_reference or 0, note=about)
        for space, kid in ((space, quality.kid) for space, quality in row.spaces.items())
    }
    return row.model_copy(update={"kid_minus_control": differences})


def _real(records: Records) -> System:
    def never(_request: Request) -> Sampled:
        raise AssertionError("real records are not sampled")

    about = f"{len(set(records.shards))} shards and commons, never in the reference"
    return System("real records", "real", never, steps=0, about=about)


def _said(asked: Records) -> tuple[tuple[str, ...], tuple[str | None, ...], tuple[str, ...]]:
    return asked.captions, asked.labels, asked.shards


def _check_names(systems: Sequence[System], control: str | None) -> None:
    names = [system.name for system in systems]
    if len(set(names)) != len(names):
        raise DataError(f"Two systems have one name among {', '.join(names)}")
    if control is not None and control not in names:
        raise DataError(f"The control '{control}' is not measured", allowed=", ".join(names))
