"""The ensemble on one page: experts mixed by the gate along a trajectory.

v(x_t, t, c) = sum_k p(k | x_t, t, c) v_k(x_t, t, c), exact for any partition of the data
(Decentralized Diffusion Models, arXiv 2501.05450, eq. 7). Guidance has two posteriors,
v_c = sum_k p(k | x_t, t, c) v_k(x_t, t, c) and v_0 = sum_k p(k | x_t, t, null) v_k(x_t, t, null),
both over the union of the two expert sets, and v = v_0 + s (v_c - v_0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.core import sampler, seeds
from atoll.core.conditioning import Conditioning, concatenate
from atoll.core.errors import UsageError
from atoll.router.gate import GateWeights
from atoll.router.routing import Routing, draw, mean_of_draws, renormalise, support

ExpertVelocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t, t, cond) -> velocity of one expert, all with the same leading batch."""


def mix(
    experts: Sequence[ExpertVelocity],
    weights: Tensor,
    x_t: Tensor,
    t: Tensor,
    cond: Conditioning,
) -> Tensor:
    """sum_k weights[:, k] v_k, each expert run on just the samples that give it weight.

    A sample with a sole expert gets that expert's output untouched, not multiplied by one.
    """
    mixed = torch.zeros_like(x_t)
    for k, expert in enumerate(experts):
        rows = weights[:, k].nonzero()[:, 0]
        if len(rows) == 0:
            continue
        # The whole batch goes in as it is: the same shape, so the same kernels and the same bits.
        whole = len(rows) == len(x_t)
        v = expert(x_t, t, cond) if whole else expert(x_t[rows], t[rows], cond[rows])
        # Before the sum: in 16 bits a weight of .999 would be a sole expert's.
        v = v.to(x_t)
        w = weights[rows, k].to(v).reshape(-1, *([1] * (v.ndim - 1)))
        mixed[rows] = torch.where(w == 1, v, mixed[rows] + w * v)
    return mixed


@dataclass(frozen=True)
class TraceStep:
    """What a trajectory did at one solver step."""

    t: float
    gate_weights: Tensor  # (batch, shard), of the conditional branch
    weights: Tensor  # (batch, shard), what was run with, of the conditional branch
    experts_run: int  # forward passes of experts, summed over the batch and both branches


class Trajectory:
    """The velocity along one batch's way from noise to data: a routing, guidance and its draws.

    Stateful where the routing is: `once` keeps the expert it drew at the first step. Samples have
    numbers `first`, `first + 1`, ... and draw from (seed, number, step) alone, so that a batch can
    be cut anywhere.
    """

    def __init__(
        self,
        experts: Sequence[ExpertVelocity],
        gate: GateWeights,
        *,
        shards: Sequence[str],
        routing: Routing,
        cond: Conditioning,
        null: Conditioning,
        guidance: float = 1.0,
        seed: int = 0,
        first: int = 0,
        trace: bool = False,
    ) -> None:
        if not math.isfinite(guidance):
            raise UsageError(f"Guidance of {guidance}", allowed="a finite number; 1 is unguided")
        self._experts = experts
        self._gate = gate
        self._shards = list(shards)
        self._routing = routing
        self._cond = cond
        self._null = null.expand(len(cond))
        self._guidance = guidance
        self._seed = seed
        self._first = first
        self._kept: Tensor | None = None
        self._step = 0
        self.trace: list[TraceStep] | None = [] if trace else None
        # Forward passes of experts so far, over the batch and both branches of guidance.
        self.experts_run = 0

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity at this step, `(batch, ...)`; call it once per solver step."""
        guided = self._guidance != 1.0
        cond = self._cond.to(x_t)
        null = self._null.to(x_t)
        weights, null_weights = self._weights(x_t, t, cond, null if guided else None)
        self._step += 1
        if null_weights is None:
            return mix(self._experts, weights, x_t, t, cond)
        # Both branches in one batch: an expert is called once for all rows that want it.
        both = mix(
            self._experts,
            torch.cat([weights, null_weights]),
            torch.cat([x_t, x_t]),
            torch.cat([t, t]),
            concatenate([cond, null]),
        )
        conditional, unconditional = both.chunk(2)
        return sampler.guide(conditional, unconditional, self._guidance)

    def _weights(
        self, x_t: Tensor, t: Tensor, cond: Conditioning, null: Conditioning | None
    ) -> tuple[Tensor, Tensor | None]:
        kind = self._routing.kind
        decided = kind == "oracle" or (kind == "once" and self._kept is not None)
        if decided and self.trace is None:
            p = x_t.new_zeros(len(x_t), len(self._shards))  # nobody asks the gate any more
        else:
            p = self._posterior(x_t, t, cond)
        if kind in ("once", "oracle"):
            chosen = self._sole(p, x_t)
            null_chosen = None if null is None else chosen
        elif kind == "sample":
            uniform = self._uniform()
            chosen = mean_of_draws(draw(p, uniform), len(self._shards)).to(p)
            null_chosen = None
            if null is not None:
                # The same uniforms for both posteriors: where they agree, so do the draws.
                drawn = draw(self._posterior(x_t, t, null), uniform)
                null_chosen = mean_of_draws(drawn, len(self._shards)).to(p)
        elif null is None:
            chosen, null_chosen = renormalise(p * support(self._routing, p)), None
        else:
            q = self._posterior(x_t, t, null)
            union = support(self._routing, p) | support(self._routing, q)
            chosen, null_chosen = renormalise(p * union), renormalise(q * union)
        self._note(t, p, chosen, null_chosen)
        return chosen, null_chosen

    def _posterior(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """gate_weights, not asked for where a sole shard leaves nothing to decide."""
        if len(self._shards) == 1:
            return x_t.new_ones(len(x_t), 1)
        return self._gate(x_t, t, cond)

    def _sole(self, p: Tensor, x_t: Tensor) -> Tensor:
        """One expert for the whole trajectory: named, or drawn from the posterior at the start."""
        if self._kept is None:
            if self._routing.kind == "oracle":
                index = self._shards.index(str(self._routing.argument))
                self._kept = torch.full((len(x_t), 1), index, device=x_t.device)
            else:
                self._kept = draw(p, self._uniform())
        return mean_of_draws(self._kept, len(self._shards)).to(p)

    def _uniform(self) -> Tensor:
        return seeds.uniform(
            self._seed,
            "routing",
            self._step,
            first=self._first,
            count=len(self._cond),
            each=self._routing.draws,
        )

    def _note(self, t: Tensor, p: Tensor, chosen: Tensor, null_chosen: Tensor | None) -> None:
        run = int((chosen > 0).sum())
        if null_chosen is not None:
            run += int((null_chosen > 0).sum())
        self.experts_run += run
        if self.trace is not None:
            self.trace.append(TraceStep(float(t[0]), p.cpu(), chosen.cpu(), run))
