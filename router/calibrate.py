"""How far an assembled gate can be trusted: measured on held-out records of all its shards.

Islands calibrate their heads alone; what they make together shows only where records of every shard
may be seen. Per band of t, with the caption and without: the negative log-likelihood of a record's
own shard, the accuracy, and the calibration error. Reads packs, writes nothing: the result goes
into the evaluation's `metrics.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from atoll.core import flow, seeds
from atoll.core.conditioning import Conditioning
from atoll.core.head import HeadCalibration, HeadConfig
from atoll.core.pack import Pack
from atoll.router.gate import GateWeights

BANDS = 5
MOST_RECORDS = 10_000
_BINS = 15
_BATCH = 500
# A debiased calibration error from which on the weights are not taken at their word, where chance
# makes less than half of it.
MOST_ERROR = 0.02
_SURE = 3.0  # standard errors by which a head must be worse than its prior to be called so


class GateBand(BaseModel):
    """The gate's figures around one noise level."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    t: float  # centre; 1 is pure noise, where the caption alone speaks
    nll: float  # nats, of the shard that a record is of
    prior_nll: float  # of the shards' record counts alone
    accuracy: float  # of the likeliest shard
    calibration_error: float  # debiased, of the likeliest shard's weight
    calibration_noise: float  # what a perfect gate shows of it at this many records: one deviation
    worse_than_prior: list[str]  # shards whose own weight says less than their record count


class GateCalibration(BaseModel):
    """What the held-out records of all shards say of a gate, and what follows for its use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int  # held-out records, each noised once per band
    shards: list[str]
    prompted: list[GateBand]
    unprompted: list[GateBand]
    # As their islands measured them.
    heads: dict[str, HeadCalibration] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    # The routing to use where the gate cannot be trusted; None where it can, or no routing does
    # without what cannot.
    recommended: str | None = None


@dataclass(frozen=True)
class Calibration:
    """A debiased calibration error, and the one that a perfect gate shows by chance."""

    error: float
    noise: float


def calibration_error(confidence: Tensor, right: Tensor, *, bins: int = _BINS) -> Calibration:
    """Root of the mean squared gap between `confidence` `(n,)` and how often it is `right` `(n,)`.

    In bins of equal mass, the square of a bin's mean gap less its variance over the number of its
    records, which is what chance adds (Kumar, Liang & Ma 2019, arXiv 1909.10155, section 5; the
    variance is that of confidence - right, for a confidence that is not constant within a bin).
    Unbiased before the root; what falls below 0 is 0.
    """
    # Equal confidences share a bin: cut anywhere, a bin could be of one shard's records alone.
    confidence = confidence.double().round(decimals=6)
    gap = confidence - right.double()
    inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    edges = torch.unique(confidence.quantile(inner))
    bin_of = torch.bucketize(confidence, edges)
    square = spread = 0.0
    for number in torch.unique(bin_of):
        here = gap[bin_of == number]
        if len(here) < 2:
            continue
        share, of_mean = len(here) / len(gap), float(here.var()) / len(here)
        square += share * (float(here.mean()) ** 2 - of_mean)
        spread += (share * of_mean) ** 2 * 2 * len(here) / (len(here) - 1)
    return Calibration(math.sqrt(max(0.0, square)), spread**0.25)


@torch.no_grad()
def measure_gate(
    gate: GateWeights,
    packs: Mapping[str, Pack],
    *,
    heads: Mapping[str, HeadConfig] | None = None,
    seed: int,
    count: int = MOST_RECORDS,
) -> GateCalibration:
    """Ask the gate about held-out records of its shards, `packs` in the order of its weights.

    At most `count` of them, drawn by `seed`; each is noised once in every band, so that records are
    independent within one. `heads` are those of the gate, if it is made of heads.
    """
    shards = list(packs)
    chosen = _chosen(packs, seed, count)
    n = sum(len(rows) for _, rows in chosen)
    prior = torch.tensor([float(pack.card.records) for pack in packs.values()]).double()
    prior = prior / prior.sum()
    centres = [(index + 0.5) / BANDS for index in range(BANDS)] + [1.0]
    found: dict[bool, list[GateBand]] = {True: [], False: []}
    for centre in centres if n else []:
        asked: dict[bool, list[Tensor]] = {True: [], False: []}
        truth = []
        for index, x_t, t, cond, null in _noised(packs, chosen, centre, seed):
            for prompted in asked:
                asked[prompted].append(gate(x_t, t, cond if prompted else null).double().cpu())
            truth.append(torch.full((len(x_t),), index))
        for prompted, parts in asked.items():
            found[prompted].append(_band(centre, torch.cat(parts), torch.cat(truth), prior, shards))
    alone = {shard: head.calibration for shard, head in (heads or {}).items()}
    warnings = [f"{shard} {said}" for shard, head in alone.items() for said in head.warnings()]
    warnings += _of_gate(found)
    return GateCalibration(
        n=n,
        shards=shards,
        prompted=found[True],
        unprompted=found[False],
        heads=alone,
        warnings=warnings,
        recommended="once" if warnings and not _bad_captions(found[True], alone) else None,
    )


def _bad_captions(prompted: Sequence[GateBand], heads: Mapping[str, HeadCalibration]) -> bool:
    """Whether what captions say alone is off too.

    If it is not, `once` does without the rest: it draws before there is anything to see, and keeps
    what it drew, so that it is exact whatever the heads say later. A head that has learnt nothing
    from captions leaves the record counts as they are, which misleads nobody: where captions do not
    name their owner there is no more to know.
    """
    told = any(band.t == 1 and (_is_off(band) or band.worse_than_prior) for band in prompted)
    return told or any(head.tells_captions_apart() for head in heads.values())


def _chosen(packs: Mapping[str, Pack], seed: int, count: int) -> list[tuple[int, Tensor]]:
    """Held-out rows by shard, and by shape where there are several; at most `count` in all."""
    groups = [
        (index, bucket.rows(torch.arange(len(bucket))))
        for index, pack in enumerate(packs.values())
        for bucket in pack.buckets(pack.held_out)
    ]
    total = sum(len(rows) for _, rows in groups)
    if not total:
        return []
    order = seeds.order(seed, "gate", "records", first=0, count=min(count, total), n=total)
    kept = torch.zeros(total, dtype=torch.bool)
    kept[torch.from_numpy(order)] = True
    parts = torch.split(kept, [len(rows) for _, rows in groups])
    cut = [(index, rows[part]) for (index, rows), part in zip(groups, parts, strict=True)]
    return [(index, rows) for index, rows in cut if len(rows)]


def _noised(
    packs: Mapping[str, Pack], chosen: Sequence[tuple[int, Tensor]], centre: float, seed: int
) -> Iterator[tuple[int, Tensor, Tensor, Conditioning, Conditioning]]:
    """Batches of one shard and shape: its number, x_t, t, the captions and as many empty ones."""
    stream = ("gate", f"{centre:.3f}")
    first = 0
    for index, rows in chosen:
        pack = list(packs.values())[index]
        for some in torch.split(rows, _BATCH):
            where = {"first": first, "count": len(some)}
            first += len(some)
            x_data = pack.x_data(some)
            x_noise = seeds.normal(seed, *stream, "x_noise", shape=tuple(x_data.shape[1:]), **where)
            offset = seeds.uniform(seed, *stream, "time", **where)[:, 0].float() - 0.5
            t = torch.ones(len(some)) if centre == 1 else centre + offset / BANDS
            x_t = flow.interpolate(x_data, x_noise, t)
            yield index, x_t, t, pack.cond(some), pack.null.expand(len(some))


def _band(
    centre: float, p: Tensor, truth: Tensor, prior: Tensor, shards: Sequence[str]
) -> GateBand:
    own = p.gather(1, truth[:, None])[:, 0].clamp(min=torch.finfo(torch.float32).tiny)
    likeliest = p.argmax(dim=1)
    right = likeliest == truth
    calibration = calibration_error(p.gather(1, likeliest[:, None])[:, 0], right)
    is_own = torch.nn.functional.one_hot(truth, len(shards)).bool()
    gain = _one_against_rest(p, is_own) - _one_against_rest(prior.expand_as(p), is_own)
    error = gain.std(dim=0) / math.sqrt(len(gain)) if len(gain) > 1 else torch.zeros(len(shards))
    worse = gain.mean(dim=0) > _SURE * error + 1e-6
    return GateBand(
        t=centre,
        nll=float(-own.log().mean()),
        prior_nll=float(-prior[truth].log().mean()),
        accuracy=float(right.double().mean()),
        calibration_error=calibration.error,
        calibration_noise=calibration.noise,
        worse_than_prior=[shard for shard, is_worse in zip(shards, worse, strict=True) if is_worse],
    )


def _one_against_rest(p: Tensor, is_own: Tensor) -> Tensor:
    """Binary cross-entropy `(n, shard)` of every shard's weight against all others'."""
    return -torch.where(is_own, p, 1 - p).clamp(min=1e-9).log()


def _of_gate(found: Mapping[bool, Sequence[GateBand]]) -> list[str]:
    """What shows only beside the other shards."""
    said = []
    for prompted, bands in found.items():
        how = "with" if prompted else "without"
        at: dict[str, list[float]] = {}
        for band in bands:
            for shard in band.worse_than_prior:
                at.setdefault(shard, []).append(band.t)
        said += [
            f"the weight of {shard} is worse than its prior at t = {_times(times)}, {how} prompt"
            for shard, times in at.items()
        ]
        off = [band for band in bands if _is_off(band)]
        if off:
            worst = max(band.calibration_error for band in off)
            where = _times([band.t for band in off])
            said.append(f"the weights are off by up to {worst:.2f} at t = {where}, {how} prompt")
    return said


def _is_off(band: GateBand) -> bool:
    return band.calibration_error > max(MOST_ERROR, 2 * band.calibration_noise)


def _times(times: Sequence[float]) -> str:
    return ", ".join(f"{t:g}" for t in times)
