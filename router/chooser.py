"""What a batch's routings choose from step to step, and what they remember.

Samples are chosen for one by one: each has its routing, and draws from its own (seed, number, step)
alone.
"""

from __future__ import annotations

import math
import numbers
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.core import seeds
from atoll.core.errors import UsageError
from atoll.router.routing import (
    Routing,
    Rule,
    draw,
    mean_of_draws,
    parse_routing,
    renormalise,
    support,
)


@dataclass(frozen=True)
class SampleSettings:
    """How one sample of a batch is made; its neighbours may be made otherwise."""

    routing: Routing
    guidance: float = 1.0  # 1 is unguided
    seed: int = 0
    number: int = 0  # samples of one seed differ by it

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise UsageError(
                f"Guidance of {self.guidance}", allowed="a finite number; 1 is unguided"
            )


def sample_settings(
    count: int,
    shards: Sequence[str],
    *,
    routing: str | Sequence[str] = "full",
    guidance: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    first: int = 0,
) -> list[SampleSettings]:
    """Settings of `count` samples, from values for all of them or one for each.

    Samples of one seed are numbers `first` onwards. With a seed for each, every one is number
    `first` of its own, so that it is what it would be alone.
    """
    routings = _each("routing", routing, count, str, "a text")
    scales = _each("guidance", guidance, count, numbers.Real, "a number")
    seeded = _each("seed", seed, count, numbers.Integral, "a whole number")
    alone = isinstance(seed, Iterable)
    if isinstance(seed, Iterable) and count > len(list(seed)):
        raise UsageError(
            f"One seed in a list for {count} pictures would make {count} times the same",
            allowed="a number, or one for each in a list",
        )
    parsed = {text: parse_routing(text, shards) for text in dict.fromkeys(routings)}
    return [
        SampleSettings(
            parsed[routings[i]], float(scales[i]), int(seeded[i]), first if alone else first + i
        )
        for i in range(count)
    ]


def _each(name: str, given: object, count: int, kind: type, what: str) -> list[Any]:
    """`count` values of a kind, from one or from as many."""
    several = isinstance(given, Iterable) and not isinstance(given, kind)
    values = list(given) if several else [given]  # type: ignore[call-overload]
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"The {name} is {value!r}", allowed=f"{what}, or one for each picture")
    if len(values) not in (1, count):
        raise UsageError(
            f"{len(values)} values of {name} for {count} pictures", allowed="one, or one for each"
        )
    return values * (count if len(values) == 1 else 1)


class Chooser:
    """The experts of every sample of one batch, with the weights that they are mixed by.

    `once` keeps the expert that it drew when its band of t began, and what was drawn for a solver's
    step is held for all of the step.
    """

    def __init__(self, settings: Sequence[SampleSettings], shards: Sequence[str]) -> None:
        self._settings = list(settings)
        self._shards = list(shards)
        self.guided = torch.tensor([each.guidance != 1 for each in settings], dtype=torch.bool)
        self._step = -1
        self._bands = [-1] * len(settings)
        self._rules: dict[Rule, Tensor] = {}  # rows of the batch, by the rule they are under
        self._kept = torch.full((len(settings),), -1)  # a sole expert, -1 where there is none yet
        self._drawn: dict[tuple[Rule, str], Tensor] = {}  # weights that `sample` drew at this step

    def begin(self, t: Tensor, step: int | None) -> None:
        """Bring the rules up to a solver's step at times `t` `(batch,)`; None is the next one."""
        if step == self._step:
            return
        self._step = self._step + 1 if step is None else step
        self._drawn.clear()
        rules: dict[Rule, list[int]] = defaultdict(list)
        for row, (each, time) in enumerate(zip(self._settings, t.tolist(), strict=True)):
            band = each.routing.band(time)
            rule = each.routing.rules[band]
            rules[rule].append(row)
            if band != self._bands[row]:
                self._bands[row] = band
                named = rule.kind == "oracle"
                self._kept[row] = self._shards.index(str(rule.argument)) if named else -1
        self._rules = {rule: torch.tensor(rows) for rule, rows in rules.items()}

    @property
    def undecided(self) -> Tensor:
        """True for samples whose experts depend on the posterior now, bool `(batch,)`."""
        return self._kept < 0

    def choose(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the conditional and of the null branch, each `(batch, shard)`, 0: not run.

        `p` and `q` are the posteriors of the two, of no matter where a sample is decided, and `q`
        where it is not guided; there the null branch's weights are 0.
        """
        weights, null_weights = torch.zeros_like(p), torch.zeros_like(p)
        for rule, rows in self._rules.items():
            own, null = self._under(rule, rows, p[rows], q[rows])
            weights[rows] = own
            guided = self.guided[rows].to(p.device)[:, None]
            null_weights[rows] = torch.where(guided, null, torch.zeros_like(null))
        return weights, null_weights

    def _under(self, rule: Rule, rows: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches' weights under one rule, for the rows of the batch that `p`, `q` are of."""
        if rule.kind in ("once", "oracle"):
            new = self.undecided[rows]
            if bool(new.any()):
                self._kept[rows[new]] = draw(p[new], self._uniform(rule, rows[new]))[:, 0].cpu()
            sole = mean_of_draws(self._kept[rows][:, None], len(self._shards)).to(p)
            return sole, sole
        if rule.kind == "sample":
            own = self._sampled(rule, "own", rows, p)
            # The same uniforms for both posteriors: where they agree, so do the draws.
            return own, self._sampled(rule, "null", rows, q, self.guided[rows])
        guided = self.guided[rows].to(p.device)[:, None]
        union = support(rule, p) | (support(rule, q) & guided)
        return renormalise(p * union), renormalise(q * union)

    def _sampled(
        self, rule: Rule, branch: str, rows: Tensor, p: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        if (rule, branch) not in self._drawn:
            weights = torch.zeros_like(p)
            here = torch.ones_like(rows, dtype=torch.bool) if wanted is None else wanted
            if bool(here.any()):
                drawn = draw(p[here], self._uniform(rule, rows[here]))
                weights[here] = mean_of_draws(drawn, len(self._shards)).to(p)
            self._drawn[rule, branch] = weights
        return self._drawn[rule, branch]

    def _uniform(self, rule: Rule, rows: Tensor) -> Tensor:
        """Uniforms `(rows, draws)` of this step, each row's from its own seed and number."""
        chosen = (self._settings[row] for row in rows.tolist())
        return torch.cat(
            [
                seeds.uniform(
                    seed, "routing", self._step, first=first, count=count, each=rule.draws
                )
                for seed, first, count in seeds.runs(_items(chosen))
            ]
        )


def x_noise(settings: Iterable[SampleSettings], shape: tuple[int, ...]) -> Tensor:
    """The noise that samples start from, `(batch, *shape)`, each of its own seed and number."""
    return torch.cat(
        [
            seeds.normal(seed, "x_noise", first=first, count=count, shape=shape)
            for seed, first, count in seeds.runs(_items(settings))
        ]
    )


def _items(settings: Iterable[SampleSettings]) -> list[tuple[int, int]]:
    return [(each.seed, each.number) for each in settings]
