"""The ensemble on one page: experts mixed by the gate along a trajectory.

v(x_t, t, c) = sum_k p(k | x_t, t, c) v_k(x_t, t, c), exact for any partition of the data
(Decentralized Diffusion Models, arXiv 2501.05450, eq. 7). Guidance has two posteriors,
v_c = sum_k p(k | x_t, t, c) v_k(x_t, t, c) and v_0 = sum_k p(k | x_t, t, null) v_k(x_t, t, null),
both over the union of the two expert sets, and v = v_0 + s (v_c - v_0). Where one expert is run for
both branches (`once`, `oracle`) that is another law: each shard guided by itself, where the former
guides by the whole corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from atoll.core import flow, sampler
from atoll.core.conditioning import Conditioning, concatenate
from atoll.router.chooser import Chooser, SampleSettings
from atoll.router.gate import GateWeights

ExpertVelocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t, t, cond) -> velocity of one expert, all with the same leading batch."""


@runtime_checkable
class Paged(Protocol):
    """Experts of which not all are in memory; `[k]` brings one there."""

    def order(self, wanted: Sequence[int]) -> Sequence[int]:
        """The order in which to run these, so that few have to be brought."""


def mix(
    experts: Sequence[ExpertVelocity],
    weights: Tensor,
    x_t: Tensor,
    t: Tensor,
    cond: Conditioning,
) -> Tensor:
    """sum_k weights[:, k] v_k, each expert run on just the samples that give it weight.

    A sample with a sole expert gets that expert's output untouched, not multiplied by one. The sum
    is in the order of the experts, in whatever order they were run.
    """
    wide = torch.promote_types(x_t.dtype, torch.float32)
    rows = {k: weights[:, k].nonzero()[:, 0] for k in range(len(experts))}
    wanted = [k for k, here in rows.items() if len(here)]
    velocities = {}
    for k in experts.order(wanted) if isinstance(experts, Paged) else wanted:
        # The whole batch goes in as it is: the same shape, so the same kernels and the same bits.
        whole = len(rows[k]) == len(x_t)
        at = (x_t, t, cond) if whole else (x_t[rows[k]], t[rows[k]], cond[rows[k]])
        velocities[k] = experts[k](*at).to(x_t.device, wide)
    mixed = torch.zeros_like(x_t, dtype=wide)
    for k in wanted:
        v = velocities.pop(k)
        # Not in 16 bits, where a weight of .999 would be a sole expert's.
        w = weights[rows[k], k].to(v).reshape(-1, *([1] * (v.ndim - 1)))
        mixed[rows[k]] = torch.where(w == 1, v, mixed[rows[k]] + w * v)
    return mixed.to(x_t.dtype)


@dataclass(frozen=True)
class TraceStep:
    """What a trajectory did when it was asked for the velocity once."""

    t: float  # of the first sample
    gate_weights: Tensor  # (batch, shard), of the conditional branch
    weights: Tensor  # (batch, shard), what was run with, of the conditional branch
    null_gate_weights: Tensor  # likewise of guidance's null branch, 0 where there is none
    null_weights: Tensor
    experts_run: int  # forward passes of experts, summed over the batch and both branches
    x_data: Tensor  # (batch, ...), where the velocity points to from here


def joined(parts: Sequence[TraceStep]) -> TraceStep:
    """One step of several batches, as that of one."""
    if len(parts) == 1:
        return parts[0]
    of_all = ("gate_weights", "weights", "null_gate_weights", "null_weights", "x_data")
    return TraceStep(
        t=parts[0].t,
        experts_run=sum(part.experts_run for part in parts),
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in of_all},
    )


class Trajectory:
    """The velocity along one batch's way from noise to data, each sample by its own settings.

    `one_posterior` gives the null branch of guidance the conditional posterior in place of its own,
    for comparison with published systems.
    """

    def __init__(
        self,
        experts: Sequence[ExpertVelocity],
        gate: GateWeights,
        *,
        shards: Sequence[str],
        settings: Sequence[SampleSettings],
        cond: Conditioning,
        null: Conditioning,
        one_posterior: bool = False,
        trace: bool = False,
    ) -> None:
        self._experts = experts
        self._gate = gate
        self._shards = list(shards)
        self._chooser = Chooser(settings, shards)
        self._scales = torch.tensor([each.guidance for each in settings])
        # Rows of both branches: the null branch of sample i of n is row n + i.
        self._cond = concatenate([cond, null.expand(len(cond))])
        self._one_posterior = one_posterior
        self.trace: list[TraceStep] | None = [] if trace else None
        # Forward passes of experts so far, of the conditional branch and of the null branch.
        self.experts_run = self.null_experts_run = 0

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, step: int | None = None) -> Tensor:
        """The velocity at `x_t` `(batch, ...)` and `t` `(batch,)`, in the shape of `x_t`.

        `step` is the solver's, for one that asks several times for a step; else a call is a step.
        """
        self._chooser.begin(t, step)
        self._cond = self._cond.to(x_t)
        p, q = self._posteriors(x_t, t)
        weights, null_weights = self._chooser.choose(p, q)
        n, guided = len(x_t), self._chooser.guided.nonzero()[:, 0]
        # Both branches in one batch: an expert is called once for all rows that want it.
        rows = torch.cat([torch.arange(n), n + guided])
        v = mix(self._experts, torch.cat([weights, null_weights])[rows], *self._at(rows, x_t, t))
        if len(guided):
            v, null_v = v[:n], v[n:]
            v[guided] = sampler.guide(v[guided], null_v, self._scale(guided, v)).to(v)
        self._note(x_t, t, v, (p, weights, q, null_weights))
        return v

    def _posteriors(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """gate_weights of both branches, `(batch, shard)` each, 0 where nobody needs them."""
        n, shards = len(x_t), len(self._shards)
        if shards == 1:
            return x_t.new_ones(n, 1), x_t.new_ones(n, 1)  # there is nothing to decide
        wanted = self._chooser.undecided
        if self.trace is not None:
            wanted = torch.ones_like(wanted)  # for who reads it
        null_wanted = wanted & self._chooser.guided & (not self._one_posterior)
        rows = torch.cat([wanted, null_wanted]).nonzero()[:, 0]
        if len(rows) == 0:
            return x_t.new_zeros(n, shards), x_t.new_zeros(n, shards)
        given = self._gate(*self._at(rows, x_t, t))
        both = given.new_zeros(2 * n, shards)
        both[rows] = given
        return both[:n], both[:n] if self._one_posterior else both[n:]

    def _at(self, rows: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        """x_t, t and cond of some rows of both branches."""
        n = len(x_t)
        if torch.equal(rows, torch.arange(n)):
            return x_t, t, self._cond[:n]  # as it is, and nothing copied
        return x_t[rows % n], t[rows % n], self._cond[rows]

    def _scale(self, guided: Tensor, v: Tensor) -> Tensor:
        scales = self._scales[guided].to(v.device, torch.promote_types(v.dtype, torch.float32))
        return scales.reshape(-1, *([1] * (v.ndim - 1)))

    def _note(
        self, x_t: Tensor, t: Tensor, v: Tensor, decided: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> None:
        """`decided` are gate_weights and weights of the conditional branch, then of the null."""
        p, weights, q, null_weights = decided
        run, null_run = int((weights > 0).sum()), int((null_weights > 0).sum())
        self.experts_run += run
        self.null_experts_run += null_run
        if self.trace is not None:
            x_data = flow.velocity_to_x_data(v, x_t, t)
            guided = self._chooser.guided[:, None].to(p.device)
            self.trace.append(
                TraceStep(
                    t=float(t[0]),
                    gate_weights=p.cpu(),
                    weights=weights.cpu(),
                    null_gate_weights=(q * guided).cpu(),
                    null_weights=null_weights.cpu(),
                    experts_run=run + null_run,
                    x_data=x_data.cpu(),
                )
            )
