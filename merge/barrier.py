"""The loss barrier: what the way between two ingredients costs, where a soup would lie.

`L((a + b) / 2) - (L(a) + L(b)) / 2` on a few held-out records, with the same noise and times for
all: at most 0 where averaging is safe, and high where two networks have left the region in which
they can be averaged at all (Frankle et al. 2020, arXiv 1912.05671, section 2, at the middle).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atoll.core import flow, seeds
from atoll.core.denoiser import Denoiser
from atoll.core.errors import DataError, Refused
from atoll.core.journal import progress
from atoll.core.pack import Pack
from atoll.merge.ingredients import Opened

RECORDS = 256
_BATCH = 64


@dataclass(frozen=True)
class Barrier:
    """Mean squared errors of the velocity, in the order of the ingredients."""

    records: int
    losses: list[float]
    barriers: list[list[float]]  # of pairs; 0 of one with itself
    soup: float  # of the mean of all, with equal weights


def measure_barrier(
    opened: Sequence[Opened], pack: Pack, *, seed: int = 0, count: int = RECORDS
) -> Barrier:
    """Measure all pairs on held-out records of a run's shard or commons.

    One network and two more sets of weights are in memory. Raises `Refused` for ingredients that no
    family of ours can run, and `DataError` without records.
    """
    for one in opened:
        if one.card is None or not isinstance(one.place, Path):
            raise Refused(
                f"The loss of {one.place} cannot be measured",
                allowed="local experts with an atoll.json, which says what they predict",
            )
    rows = pack.held_out if len(pack.held_out) else pack.train
    if not len(rows):
        raise DataError(f"{pack.card.name} has no records to measure a loss on")
    count = min(count, len(rows))
    places = [Path(one.place) for one in opened]
    denoiser = Denoiser.load(places[0])
    for bucket in pack.buckets(rows):
        denoiser.check_takes(bucket.picture)
    losses, barriers = [], [[0.0] * len(places) for _ in places]
    pairs = list(itertools.combinations(range(len(places)), 2))
    with progress("measuring losses", len(places) + len(pairs) + 1) as advance:

        def measured(state: Mapping[str, Tensor]) -> float:
            denoiser.network.load_state_dict(dict(state))
            try:
                found = _loss(denoiser, pack, rows, seed, count)
            except RuntimeError as error:
                raise Refused(
                    f"The records of {pack.card.name} are not for these experts ({error})",
                    allowed="a shard or the commons of their run",
                ) from error
            advance()
            return found

        total: dict[str, Tensor] = {}
        for place in places:
            state = _state(place)
            losses.append(measured(state))
            total = {name: total.get(name, 0) + value.double() for name, value in state.items()}
        for a, b in pairs:
            middle = _middle(_state(places[a]), _state(places[b]))
            barriers[a][b] = barriers[b][a] = measured(middle) - (losses[a] + losses[b]) / 2
        soup = measured({name: value / len(places) for name, value in total.items()})
    return Barrier(records=count, losses=losses, barriers=barriers, soup=soup)


def _state(place: Path) -> dict[str, Tensor]:
    return Denoiser.load(place).network.state_dict()


def _middle(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: (value.double() + theirs[name].double()) / 2 for name, value in ours.items()}


@torch.no_grad()
def _loss(denoiser: Denoiser, pack: Pack, rows: range, seed: int, count: int) -> float:
    errors = []
    for first in range(0, count, _BATCH):
        length = min(_BATCH, count - first)
        where = {"first": first, "count": length}
        order = seeds.order(seed, "barrier", "records", **where, n=len(rows))
        some = torch.tensor([rows[int(index)] for index in order])
        x_data = pack.x_data(some)
        x_noise = seeds.normal(seed, "barrier", "x_noise", shape=tuple(x_data.shape[1:]), **where)
        t = seeds.uniform(seed, "barrier", "time", **where)[:, 0].float()
        x_t = flow.interpolate(x_data, x_noise, t)
        wanted = flow.target(x_data, x_noise, t, flow.Prediction.VELOCITY)
        error = denoiser.velocity(x_t, t, pack.cond(some)) - wanted
        errors.append(error.double().square().flatten(1).mean(dim=1))
    return float(torch.cat(errors).mean())
