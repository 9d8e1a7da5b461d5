"""Routings: how gate_weights become the experts that are run, and with which weights.

Every function here takes `(batch, shard)` weights that sum to 1 per row and gives such weights
back, zero for an expert that is not run. Sets are chosen per sample. Sources: top-k is what
DDM and Paris publish (arXiv 2501.05450, 2510.03434); `mass` is nucleus selection; `once`, `sample`
and `threshold` follow from the ensemble being a mixture over shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    "once": Kind("", None, "", "one expert drawn at the start and kept; exact in law"),
    "oracle": Kind("SHARD", str, "a shard of the ensemble", "always this shard's expert"),
}


@dataclass(frozen=True)
class Routing:
    """A parsed routing; `str()` gives back its text."""

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


def parse_routing(text: str, shards: Sequence[str]) -> Routing:
    """A routing from `KIND` or `KIND:ARGUMENT`; `UsageError` lists the choices."""
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
        return Routing(name)
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
    return Routing(name, value)


def renormalise(weights: Tensor) -> Tensor:
    """Weights `(batch, shard)` scaled to sum to 1 per row; a sole weight becomes exactly 1."""
    return weights / weights.sum(dim=1, keepdim=True)


def support(routing: Routing, weights: Tensor) -> Tensor:
    """True where a deterministic routing runs an expert, `(batch, shard)`."""
    match routing.kind:
        case "full":
            return weights > 0
        case "top-k":
            return _top(weights, min(int(routing.argument or 1), weights.shape[1]))
        case "mass":
            return _nucleus(weights, float(routing.argument or 1))
        case "threshold":
            return (weights >= float(routing.argument or 1)) | _top(weights, 1)
    raise ValueError(f"{routing} chooses by drawing or by name, not by weight")


def _top(weights: Tensor, k: int) -> Tensor:
    chosen = torch.zeros_like(weights, dtype=torch.bool)
    # A stable sort: among equals the first shards, whatever the batch (topk promises no order).
    place = weights.sort(dim=1, descending=True, stable=True).indices
    return chosen.scatter(1, place[:, :k], True)


def _nucleus(weights: Tensor, mass: float) -> Tensor:
    if mass >= 1:
        # Beside a sum rounded to 1 the smallest weights would seem to be needed no more.
        return weights > 0
    ordered, place = weights.double().sort(dim=1, descending=True, stable=True)
    # An expert is needed while those before it hold less than the mass; the first always is.
    before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered.cumsum(dim=1)[:, :-1]], dim=1)
    needed = (before < mass * ordered.sum(dim=1, keepdim=True)) & (ordered > 0)
    # Back from sorted places to shards: `place[b, i]` is the shard that stands i-th.
    return torch.zeros_like(needed).scatter(1, place, needed)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Shards drawn by inversion, int64 `(batch, draws)`, from uniforms `(batch, draws)`.

    In float64 on the CPU wherever the weights are, because not every accelerator has float64.
    """
    cumulative = weights.double().cpu().cumsum(dim=1)
    cumulative = cumulative / cumulative[:, -1:]
    # Below 1, where the last shard with any weight ends and those without would begin.
    uniform = uniform.double().cpu().clamp(max=1 - 2.0**-53).contiguous()
    return torch.searchsorted(cumulative, uniform, right=True).to(weights.device)


def mean_of_draws(drawn: Tensor, shards: int) -> Tensor:
    """Weights `(batch, shard)` of the plain mean over draws `(batch, draws)`."""
    counts = torch.nn.functional.one_hot(drawn, shards).sum(dim=1)
    return counts.to(torch.float32) / drawn.shape[1]
