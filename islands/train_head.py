"""A gate head: its shard's noised records against the one anchor, then calibrated.

f_k(x_t, t, cond) is the logit of a balanced binary classifier, so it estimates the log density
ratio of the shard to the anchor at noise level t. The anchor is the same for every shard: commons
records, and a share of seeded broad noise so that a head is defined where the commons never goes.
Both sides get the same times, noise law and caption dropout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from atoll.core import flow, seeds
from atoll.core.conditioning import Conditioning, concatenate
from atoll.core.head import Band, GateHead, HeadCalibration
from atoll.core.journal import log
from atoll.core.pack import Pack
from atoll.core.trunk import Trunk
from atoll.islands.data import drop, rows_at
from atoll.islands.settings import HeadTraining
from atoll.islands.step import Errors, Loss

_PULL = 4.0  # records' worth of belief that a head is calibrated as it stands
_DRAWS = 2048  # noised records of each side that a band is fitted and measured on
_AT_ONCE = 128  # of them
_RECORDS, _ROUNDS = 512, 50  # of the shares of labels
_LEAST = 1e-2  # of its share of the commons, that a label keeps
_PIXEL_RECORDS = 16384  # at least, where there are so many, that the commons' pixels are judged by
_TURN = 16  # records of one shape at a time, where there are several


@dataclass(frozen=True)
class Anchor:
    """The frozen reference: rows of the commons, and how broad the noise beside them is."""

    commons: Pack
    rows: range
    broad: float  # share of broad samples
    mean: Tensor  # (channel, 1, 1) of the commons' pixels
    std: Tensor

    def draw(
        self, seed: int, purpose: str, *, first: int, count: int, batch: int | None = None
    ) -> tuple[Tensor, Conditioning]:
        """Records `first` onwards: x_data `(count, channel, height, width)` and captions.

        Keyed by the run's seed alone and not by a shard, so that all heads meet one anchor. A broad
        sample is Gaussian with the commons' pixel mean and twice its deviation, under a caption of
        the commons, so that text alone cannot tell it from the rest. `batch` is as of `rows_at`.
        """
        stream = f"anchor-{purpose}"
        rows = rows_at(self.commons, self.rows, seed, stream, first=first, count=count, batch=batch)
        x_data = self.commons.x_data(rows)
        noise = seeds.normal(
            seed, stream, "broad", first=first, count=count, shape=tuple(x_data.shape[1:])
        )
        is_broad = seeds.uniform(seed, stream, "share", first=first, count=count)[:, 0] < self.broad
        wide = self.mean + 2 * self.std * noise
        return torch.where(flow.expand(is_broad, x_data), wide, x_data), self.commons.cond(rows)


def anchor_of(commons: Pack, broad: float, *, held_out: bool) -> Anchor:
    """The anchor to train against, or the held-out one to calibrate and measure on."""
    rows = commons.held_out if held_out else commons.train
    return Anchor(commons, rows, broad, *_pixels(commons))


def _pixels(commons: Pack) -> tuple[Tensor, Tensor]:
    """Mean and deviation `(channel, 1, 1)` of the commons' pixels, from records of every shape.

    Runs of them at even distances, one at a time: the commons may be far away, and larger than
    memory.
    """
    buckets = commons.buckets(commons.train)
    every = max(1, sum(map(len, buckets)) // _PIXEL_RECORDS)
    count = 0
    sums = torch.zeros(2, commons.card.picture.channels, dtype=torch.float64)
    for bucket in buckets:
        for places in torch.split(torch.arange(len(bucket)), _AT_ONCE)[::every]:
            values = commons.x_data(bucket.rows(places)).double().transpose(0, 1).flatten(1)
            sums += torch.stack([values.sum(1), values.square().sum(1)])
            count += values.shape[1]
    mean, square = sums / count
    std = ((square - mean.square()).clamp(min=0) * count / max(1, count - 1)).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]


@torch.no_grad()
def label_shares(trunk: Trunk, pack: Pack, config: HeadTraining, *, seed: int) -> Tensor:
    """Log of the share of each of the trunk's labels in a shard, `(label,)`.

    By expectation and maximisation (Saerens, Latinne & Decaestecker 2002, "Adjusting the outputs of
    a classifier to new a priori probabilities") on records of the shard itself, lightly noised.
    """
    stream, prior = f"shares-{pack.card.name}", trunk.config.log_shares()
    likelihood = []
    for first in range(0, _RECORDS, config.batch):
        where = {"first": first, "count": config.batch}
        rows = rows_at(pack, pack.train, seed, stream, "order", **where, batch=config.batch)
        x_data = pack.x_data(rows)
        t = 0.5 * seeds.uniform(seed, stream, "time", **where)[:, 0].float()
        x_noise = seeds.normal(seed, stream, "x_noise", shape=tuple(x_data.shape[1:]), **where)
        x_t = flow.interpolate(x_data, x_noise, t)
        logits = trunk.logits(x_t, t, pack.null.expand(len(rows)))
        likelihood.append(logits.double().log_softmax(dim=1) - prior)
    found = torch.cat(likelihood)
    shares = prior
    for _ in range(_ROUNDS):
        mean = (found + shares).softmax(dim=1).mean(dim=0)
        # No label is given up for good: the head is still to be trained.
        shares = mean.maximum(_LEAST * prior.exp()).log().log_softmax(dim=0)
    return shares


def head_loss(
    head: GateHead, trunk: Trunk, pack: Pack, anchor: Anchor, config: HeadTraining, *, seed: int
) -> Loss:
    """Binary cross-entropy of shard against anchor, balanced at every t; and of text alone."""
    stream = f"head-{head.config.shard}"
    device = next(head.parameters()).device

    def loss(first: int, count: int) -> Errors:
        t = seeds.uniform(seed, stream, "time", first=2 * first, count=2 * count)[:, 0].float()
        f, is_shard, cond = _raw(
            head, trunk, pack, pack.train, anchor, t, config.condition_dropout,
            seed=seed, stream=stream, purpose="train", first=first, count=count,
        )  # fmt: skip
        wanted = is_shard.float().to(device)
        picture = functional.binary_cross_entropy_with_logits(f, wanted, reduction="none")
        text = functional.binary_cross_entropy_with_logits(head.raw_text(cond.to(f)), wanted)
        return Errors(picture.mean() + text, picture.detach(), t.to(device))

    return loss


def _raw(
    head: GateHead,
    trunk: Trunk,
    pack: Pack,
    rows: range,
    anchor: Anchor,
    t: Tensor,
    dropout: float,
    *,
    seed: int,
    stream: str,
    purpose: str,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor, Conditioning]:
    """Raw f of shard and anchor records `first` onwards, noised to times `t` `(2 * count,)`.

    With it which of them are the shard's, and their captions before dropout. Each side keeps to the
    shapes that it has, which are part of what tells them apart. Where there are several they take
    short turns: a batch that is of one shape here and of another there would teach the shape alone.
    """
    alone = len(pack.buckets(rows)) == len(anchor.commons.buckets(anchor.rows)) == 1
    turn = None if alone else _TURN
    uniform = seeds.uniform(seed, stream, "dropout", first=2 * first, count=2 * count)
    f, is_shard, conds = [], [], []
    for start, length in _pieces(first, count, turn):
        where = {"first": start, "count": length}
        picked = rows_at(pack, rows, seed, stream, "order", **where, batch=turn)
        other, other_cond = anchor.draw(seed, purpose, **where, batch=turn)
        here = slice(2 * (start - first), 2 * (start - first + length))
        cond = concatenate([pack.cond(picked), other_cond])
        dropped = drop(cond, pack.null, uniform[here], dropout)
        sides = (pack.x_data(picked), other)
        f.append(_of_sides(head, trunk, sides, t[here], dropped, seed, stream, first=2 * start))
        is_shard.append(torch.arange(2 * length) < length)
        conds.append(cond)
    return torch.cat(f), torch.cat(is_shard), concatenate(conds)


def _pieces(first: int, count: int, turn: int | None) -> Iterator[tuple[int, int]]:
    """The records `first` to `first + count - 1`, cut where one turn ends and the next begins."""
    end = first + count
    while first < end:
        length = end - first if turn is None else min(end - first, turn - first % turn)
        yield first, length
        first += length


def _of_sides(
    head: GateHead,
    trunk: Trunk,
    sides: tuple[Tensor, Tensor],
    t: Tensor,
    cond: Conditioning,
    seed: int,
    stream: str,
    *,
    first: int,
) -> Tensor:
    """Raw f `(batch,)` of both sides, in one pass where they are of one shape, else in two."""
    alike = sides[0].shape[1:] == sides[1].shape[1:]
    f, start = [], 0
    for x_data in [torch.cat(sides)] if alike else sides:
        here = slice(start, start + len(x_data))
        where = {"first": first + start, "count": len(x_data)}
        x_noise = seeds.normal(seed, stream, "x_noise", shape=tuple(x_data.shape[1:]), **where)
        x_t = flow.interpolate(x_data, x_noise, t[here]).to(next(head.parameters()).device)
        with torch.no_grad():  # it is frozen
            features = trunk.features(x_t, t[here].to(x_t), cond[here].to(x_t))
            text = head.text(cond[here].to(x_t))  # has a loss of its own
        f.append(head.raw(features, text))
        start = here.stop
    return torch.cat(f)


@torch.no_grad()
def calibrate(
    head: GateHead, trunk: Trunk, pack: Pack, commons: Pack, config: HeadTraining, *, seed: int
) -> GateHead:
    """Fit slope and intercept per band of t on held-out records, and measure what is left.

    Once with their captions and once without. Only this shard and the anchor are needed, so an
    island does it alone; the prior is never touched. Records are noised several times over until a
    band has enough of them. Without held-out records a head stays as it was trained.
    """
    if not (len(pack.held_out) and len(commons.held_out)):
        log.warning("%s has no held-out records: its gate head is not calibrated", pack.card.name)
        return head.eval()
    anchor = anchor_of(commons, config.broad, held_out=True)
    # First, since it is part of what a head says of a picture.
    head = _told(head, HeadCalibration(text=_text_band(head, pack, anchor)))
    prompted, unprompted = (
        _noised_bands(head, trunk, pack, anchor, config.bands, dropout, seed=seed)
        for dropout in (0.0, 1.0)
    )
    # Where one side has no captions there is nothing to fit them by.
    bands = {"prompted": prompted or unprompted, "unprompted": unprompted}
    return _told(head, head.config.calibration.model_copy(update=bands))


def _text_band(head: GateHead, pack: Pack, anchor: Anchor) -> Band:
    """What captions say alone, of all held-out records that have one."""
    sides = pack.cond(torch.tensor(pack.held_out)), anchor.commons.cond(torch.tensor(anchor.rows))
    own, others = (head.raw_text(cond)[~cond.is_null] for cond in sides)
    if not (len(own) and len(others)):  # nor has it learnt what captions say
        return Band(t=1.0, slope=0.0, intercept=0.0, loss=math.log(2), overlap=1.0, mean_ratio=0.0)
    return _band(1.0, own, others, drawn=(len(sides[0]), len(sides[1])))


def _told(head: GateHead, calibration: HeadCalibration) -> GateHead:
    """The head with a calibration."""
    told = copy.deepcopy(head)
    told.config = head.config.model_copy(update={"calibration": calibration})
    return told.eval()


def _noised_bands(
    head: GateHead,
    trunk: Trunk,
    pack: Pack,
    anchor: Anchor,
    count: int,
    dropout: float,
    *,
    seed: int,
) -> list[Band]:
    """Bands of t from held-out records of shard and anchor, with their captions or with none.

    `dropout` is 0 or 1. Records that have no caption are not asked about theirs, and their side
    weighs the less, since how many have one is part of what tells the sides apart; a band is left
    out where one of them has none.
    """
    bands = []
    for index in range(count):
        centre = (index + 0.5) / count
        stream = f"calibrate-{head.config.shard}-{centre:.3f}"
        offset = seeds.uniform(seed, stream, "time", first=0, count=2 * _DRAWS)[:, 0].float() - 0.5
        t = centre + offset / count
        own, others = [], []
        for first in range(0, _DRAWS, _AT_ONCE):
            f, is_shard, cond = _raw(
                head, trunk, pack, pack.held_out, anchor, t[2 * first : 2 * (first + _AT_ONCE)],
                dropout, seed=seed, stream=stream, purpose=f"calibrate-{centre:.3f}",
                first=first, count=_AT_ONCE,
            )  # fmt: skip
            asked = ~cond.is_null | (dropout == 1)
            own.append(f[is_shard & asked])
            others.append(f[~is_shard & asked])
        sides = torch.cat(own), torch.cat(others)
        if all(len(side) for side in sides):
            bands.append(_band(centre, *sides, drawn=(_DRAWS, _DRAWS)))
    return bands


def _band(centre: float, own: Tensor, others: Tensor, *, drawn: tuple[int, int]) -> Band:
    """Platt scaling (1999) with a pull towards slope 1 and intercept 0; convex.

    A side weighs as the part that it is of what was `drawn`, and all that was drawn of one side as
    all of the other, as in training.
    """
    f = torch.cat([own, others]).double()
    wanted = torch.cat([torch.ones_like(own), torch.zeros_like(others)]).double()
    weight = torch.cat(
        [
            torch.full_like(side, 0.5 / count)
            for side, count in zip((own, others), drawn, strict=True)
        ]
    ).double() * min(len(own), len(others))
    design = torch.stack([f, torch.ones_like(f)], dim=1)
    scale = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    start = scale.detach().clone()
    solver = torch.optim.LBFGS(
        [scale], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        logits = design @ scale
        value = (
            functional.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="sum")
            + _PULL / 2 * (scale - start).square().sum()
        )
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    # A head whose sign came out wrong knows nothing: it may be flattened, never turned round.
    slope, intercept = scale.detach().tolist()
    if slope <= 0:  # then the intercept says nothing either: classes are balanced, the odds are 1
        slope = intercept = 0.0
    fitted = slope * f + intercept
    per_record = functional.binary_cross_entropy_with_logits(fitted, wanted, reduction="none")
    q = torch.sigmoid(fitted[len(own) :])
    return Band(
        t=centre,
        slope=slope,
        intercept=intercept,
        loss=float((per_record * weight).sum() / weight.sum()),
        overlap=float((2 * torch.minimum(q, 1 - q)).mean()),
        mean_ratio=float(fitted[len(own) :].clamp(max=math.log(1e6)).exp().mean()),
    )
