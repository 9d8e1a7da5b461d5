"""Routings: how gate_weights become the experts that are run, and with which weights.

A routing is one rule, or several by bands of t: `full>0.5,once` runs every expert while t is above
0.5 and from there on the one that it draws. Every function here takes `(batch, shard)` weights that
sum to 1 per row and gives such weights back, zero for an expert that is not run. Sets are chosen
per sample. Sources: top-k is what DDM and Paris publish (arXiv 2501.05450, 2510.03434); `mass` is
nucleus selection; `once`, `sample` and `threshold` follow from the ensemble being a mixture over
shards, and so does drawing one expert from the posterior where a band of `full` ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from atoll.core.errors import UsageError, did_you_mean

# Each draw is a row in memory; beyond this the mean is `full` to three digits.
MOST_DRAWS = 10_000


@dataclass(frozen=True)
class Kind:
    """A row of the table: what the argument is called, and how it is read and checked."""

    argument: str
    parse: Callable[[str], float | int | str] | None
    allowed: str
    about: str


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _draws(text: str) -> int:
    value = _count(text)
    if value > MOST_DRAWS:
        raise ValueError
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


KINDS: dict[str, Kind] = {
    "full": Kind("", None, "", "every expert, weighted by the gate: the exact ensemble"),
    "top-k": Kind("K", _count, "a whole number from 1", "the K likeliest experts; biased"),
    "mass": Kind("P", _probability, "0 < P <= 1", "the fewest experts that hold P of the weight"),
    "threshold": Kind("Q", _probability, "0 < Q <= 1", "experts of weight Q and up, or the best"),
    "sample": Kind(
        "M",
        _draws,
        f"a whole number from 1 to {MOST_DRAWS}",
        "mean of M draws at every step; unbiased",
    ),
    "once": Kind("", None, "", "one expert drawn where the rule begins, and kept; exact in law"),
    "oracle": Kind("SHARD", str, "a shard of the ensemble", "always this shard's expert"),
}


@dataclass(frozen=True)
class Rule:
    """How experts are chosen at one time; `str()` gives back its text."""

    kind: str
    argument: float | int | str | None = None

    def __str__(self) -> str:
        return self.kind if self.argument is None else f"{self.kind}:{self.argument}"

    @property
    def draws(self) -> int:
        """How many uniform numbers a sample needs at a step where it draws."""
        if self.kind == "sample":
            return int(self.argument or 1)
        return 1 if self.kind == "once" else 0


@dataclass(frozen=True)
class Routing:
    """Rules by bands of t, from noise to data: rule i holds while t is above `above[i]`.

    The last one holds to the end, so that `above` is one shorter, and falling.
    """

    rules: tuple[Rule, ...]
    above: tuple[float, ...] = ()

    def __str__(self) -> str:
        ends = [*(f">{end}" for end in self.above), ""]
        return ",".join(f"{rule}{end}" for rule, end in zip(self.rules, ends, strict=True))

    def band(self, t: float) -> int:
        """Which of the rules holds at `t`, in float32 as a solver's times are."""
        return sum(bool(np.float32(t) <= np.float32(end)) for end in self.above)


def parse_routing(text: str, shards: Sequence[str]) -> Routing:
    """A routing from `RULE` or `RULE>T,RULE>T,RULE`; `UsageError` lists the choices.

    A rule is `KIND` or `KIND:ARGUMENT`.
    """
    if text == "auto":
        raise UsageError(
            "'auto' is what the evaluation of a run chose for its own ensemble, and here is none",
            allowed=", ".join(KINDS),
            cure="`atoll sample RUN` takes it after `atoll evaluate RUN/ensemble --reference RUN`; "
            "in Python, and for a copy elsewhere, name the routing",
        )
    name, _, shard = text.partition(":")
    if name == "oracle" and shard in shards:
        return Routing((Rule(name, shard),))  # whatever signs the shard's name has
    *parts, last = text.split(",")
    rules, above = [], []
    for part in parts:
        rule, _, end = part.rpartition(">")
        rules.append(rule)
        above.append(_time(end))
    falling = all(a > b for a, b in pairwise([1.0, *above, 0.0]))
    if not falling or not all(rules) or ">" in last:
        raise UsageError(
            f"The bands of the routing '{text}' do not lead from noise to data",
            allowed="RULE>T,RULE with 1 > T > 0, falling where there are several T: full>0.5,once",
        )
    return Routing(tuple(parse_rule(rule.strip(), shards) for rule in [*rules, last]), tuple(above))


def _time(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # above and below nothing, so that it is refused with its neighbours


def parse_rule(text: str, shards: Sequence[str]) -> Rule:
    """A rule from `KIND` or `KIND:ARGUMENT`; `UsageError` lists the choices."""
    name, colon, argument = text.partition(":")
    choices = ", ".join(f"{k}:{v.argument}" if v.argument else k for k, v in KINDS.items())
    if name not in KINDS:
        raise UsageError(
            f"Unknown routing '{text}'. {did_you_mean(name, KINDS)}".strip(), allowed=choices
        )
    kind = KINDS[name]
    if kind.parse is None:
        if colon:
            raise UsageError(f"The routing '{name}' takes no argument", allowed=choices)
        return Rule(name)
    try:
        value = kind.parse(argument)
    except ValueError:
        raise UsageError(
            f"'{argument}' is not an argument of the routing '{name}'",
            allowed=f"{name}:{kind.argument} with {kind.allowed}",
        ) from None
    if name == "oracle" and value not in shards:
        raise UsageError(
            f"There is no shard '{value}'. {did_you_mean(str(value), shards)}".strip(),
            allowed=", ".join(shards),
        )
    return Rule(name, value)


def renormalise(weights: Tensor) -> Tensor:
    """Weights `(batch, shard)` scaled to sum to 1 per row; a sole weight becomes exactly 1."""
    return weights / weights.sum(dim=1, keepdim=True)


def support(rule: Rule, weights: Tensor) -> Tensor:
    """True where a deterministic rule runs an expert, `(batch, shard)`."""
    match rule.kind:
        case "full":
            return weights > 0
        case "top-k":
            return _top(weights, min(int(rule.argument or 1), weights.shape[1]))
        case "mass":
            return _nucleus(weights, float(rule.argument or 1))
        case "threshold":
            return (weights >= float(rule.argument or 1)) | _top(weights, 1)
    raise ValueError(f"{rule} chooses by drawing or by name, not by weight")


def _top(weights: Tensor, k: int) -> Tensor:
    chosen = torch.zeros_like(weights, dtype=torch.bool)
    # A stable sort: among equals the first shards, whatever the batch (topk promises no order).
    place = weights.sort(dim=1, descending=True, stable=True).indices
    return chosen.scatter(1, place[:, :k], True)


def _nucleus(weights: Tensor, mass: float) -> Tensor:
    if mass >= 1:
        # Beside a sum rounded to 1 the smallest weights would seem to be needed no more.
        return weights > 0
    # On the CPU, as `draw`.
    ordered, place = weights.cpu().double().sort(dim=1, descending=True, stable=True)
    # An expert is needed while those before it hold less than the mass; the first always is.
    before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered.cumsum(dim=1)[:, :-1]], dim=1)
    needed = (before < mass * ordered.sum(dim=1, keepdim=True)) & (ordered > 0)
    # Back from sorted places to shards: `place[b, i]` is the shard that stands i-th.
    return torch.zeros_like(needed).scatter(1, place, needed).to(weights.device)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Shards drawn by inversion, int64 `(batch, draws)`, from uniforms `(batch, draws)`.

    In float64 on the CPU wherever the weights are, because not every accelerator has float64.
    """
    cumulative = weights.cpu().double().cumsum(dim=1)
    cumulative = cumulative / cumulative[:, -1:]
    # Below 1, where the last shard with any weight ends and those without would begin.
    uniform = uniform.cpu().double().clamp(max=1 - 2.0**-53).contiguous()
    return torch.searchsorted(cumulative, uniform, right=True).to(weights.device)


def mean_of_draws(drawn: Tensor, shards: int) -> Tensor:
    """Weights `(batch, shard)` of the plain mean over draws `(batch, draws)`."""
    counts = torch.nn.functional.one_hot(drawn, shards).sum(dim=1)
    return counts.to(torch.float32) / drawn.shape[1]
