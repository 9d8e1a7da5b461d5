"""Distances between sets of features, each with N and a 95% interval.

Frechet distance (Heusel et al. 2017, arXiv 1706.08500, eq. 6), KID (Binkowski et al. 2018, arXiv
1801.01401, section 3), improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991,
eq. 1). Intervals are delete-a-group jackknives: a bootstrap repeats rows, and all of these punish
repeated rows (a copy is its own nearest neighbour, and lowers the rank of a covariance), so that it
would answer for another sample size. The groups depend on (seed, N) alone, hence two systems that
were given the same noise are compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from atoll.core import seeds
from atoll.core.errors import DataError

GROUPS = 20
FEWEST = 10
NEIGHBOURS = 3
_Z = 1.959963984540054  # 97.5% quantile of the standard normal

Statistic = Callable[[Tensor, Tensor], float]
"""(rows kept of the generated set, of the reference), boolean masks -> the statistic."""


class Estimate(BaseModel):
    """A figure, its 95% interval and the numbers of pictures behind it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float
    high: float
    n: int
    n_reference: int | None = None
    note: str = ""


class Quality(BaseModel):
    """How near one set of pictures comes to the reference in one feature space."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    frechet: Estimate
    kid: Estimate
    precision: Estimate
    recall: Estimate


@dataclass(frozen=True)
class Jackknife:
    """A statistic on all rows, and without each group of generated and of reference rows."""

    value: float
    generated: Tensor
    reference: Tensor

    def __sub__(self, other: Jackknife) -> Jackknife:
        """The difference of two systems on the same noise and reference, pair by pair."""
        return Jackknife(
            self.value - other.value,
            self.generated - other.generated,
            self.reference - other.reference,
        )

    @property
    def variance(self) -> float:
        """Of the statistic at this N, for fresh noise and a fresh reference."""
        return _spread(self.generated) + _spread(self.reference)

    def interval(self) -> tuple[float, float]:
        """95%, by Student's t."""
        freedom = min(len(self.generated), len(self.reference)) - 1
        half = student(freedom) * math.sqrt(self.variance)
        return self.value - half, self.value + half


def jackknife(statistic: Statistic, n: int, n_reference: int, *, seed: int) -> Jackknife:
    """Evaluate a statistic with one group of rows left out at a time (Tukey 1958)."""
    everything = [torch.ones(size, dtype=torch.bool) for size in (n, n_reference)]
    without: list[Tensor] = []
    for side, size in enumerate((n, n_reference)):
        group = groups(size, seed=seed, side=side)
        values = []
        for left_out in range(int(group.max()) + 1):
            kept = list(everything)
            kept[side] = group != left_out
            values.append(statistic(*kept))
        without.append(torch.tensor(values, dtype=torch.float64))
    return Jackknife(statistic(*everything), without[0], without[1])


def groups(n: int, *, seed: int, side: int) -> Tensor:
    """Which group each of `n` rows is left out with, `(n,)`."""
    order = seeds.order(seed, "evaluate", "jackknife", side, first=0, count=n, n=n)
    return torch.from_numpy(order) % min(GROUPS, n)


def student(freedom: int) -> float:
    """97.5% quantile of Student's t (Cornish and Fisher 1938, expansion in 1/freedom)."""
    z, v = _Z, float(max(1, freedom))
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927); does not collapse at 0 or at n."""
    share = successes / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def proportion(successes: int, n: int) -> Estimate:
    """A share of `n` independent trials."""
    low, high = wilson(successes, n)
    return Estimate(value=successes / n, low=low, high=high, n=n)


# -- the statistics --------------------------------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of features `(n, dim)`.

    With centred rows X of a and Y of b, tr (A B)^(1/2) is the sum of the singular values of X Y^T:
    no square root of a matrix, no complex residue, and no harm from a singular covariance.
    """
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    x = (a - mean_a) / math.sqrt(len(a) - 1)
    y = (b - mean_b) / math.sqrt(len(b) - 1)
    total = (mean_a - mean_b).square().sum() + x.square().sum() + y.square().sum()
    # Triangular factors have the covariances of the rows and dim rows instead of n.
    if len(x) > x.shape[1]:
        x = torch.linalg.qr(x, mode="r").R
    if len(y) > y.shape[1]:
        y = torch.linalg.qr(y, mode="r").R
    return max(0.0, float(total - 2 * torch.linalg.svdvals(x @ y.T).sum()))


def frechet(a: Tensor, b: Tensor, *, seed: int) -> Jackknife:
    """Frechet distance; biased upwards by about 1/N, so comparable only at equal N."""
    return jackknife(lambda i, j: frechet_distance(a[i], b[j]), len(a), len(b), seed=seed)


def kid(a: Tensor, b: Tensor, *, seed: int) -> Jackknife:
    """Squared maximum mean discrepancy, cubic polynomial kernel, unbiased at every N."""
    aa, bb, ab = _cubic(a, a), _cubic(b, b), _cubic(a, b)
    aa.fill_diagonal_(0)
    bb.fill_diagonal_(0)

    def statistic(keep_a: Tensor, keep_b: Tensor) -> float:
        i, j = keep_a.double(), keep_b.double()
        n, m = float(i.sum()), float(j.sum())
        within = (i @ aa @ i) / (n * (n - 1)) + (j @ bb @ j) / (m * (m - 1))
        return float(within - 2 * (i @ ab @ j) / (n * m))

    return jackknife(statistic, len(a), len(b), seed=seed)


def coverage(queries: Tensor, manifold: Tensor, *, seed: int) -> Jackknife:
    """Share of `queries` inside a ball around some row of `manifold`.

    A ball reaches to its centre's third nearest other row. Precision asks with generated rows in
    the reference's manifold, recall the other way round. The first side of the result is `queries`.
    """
    exact = "donot_use_mm_for_euclid_dist"  # the fast way does not see that two rows are the same
    between = torch.cdist(queries, manifold, compute_mode=exact)
    within = torch.cdist(manifold, manifold, compute_mode=exact).fill_diagonal_(torch.inf)

    def statistic(keep_queries: Tensor, keep: Tensor) -> float:
        radius = within[keep][:, keep].kthvalue(NEIGHBOURS, dim=1).values
        inside = (between[keep_queries][:, keep] <= radius).any(dim=1)
        return float(inside.double().mean())

    return jackknife(statistic, len(queries), len(manifold), seed=seed)


def measure(generated: Tensor, reference: Tensor, *, seed: int) -> tuple[Quality, Jackknife]:
    """All four figures of one feature space, and KID's jackknife for comparing systems."""
    n, m = len(generated), len(reference)
    if min(n, m) < FEWEST:
        raise DataError(
            f"{n} generated and {m} held-out pictures are too few to measure",
            allowed=f"{FEWEST} or more of each",
            cure="hold out a larger share of the corpus (--holdout)",
        )
    near = kid(generated, reference, seed=seed)
    distance = frechet(generated, reference, seed=seed)
    note = f"biased upwards at N = {min(n, m)}; compare only at equal N"
    if min(n, m) <= generated.shape[1]:
        note += f"; fewer pictures than the {generated.shape[1]} dimensions, so mostly bias"
    quality = Quality(
        frechet=as_estimate(distance, n, m, note=note, least=0.0),
        kid=as_estimate(near, n, m, note="unbiased"),
        precision=_share(coverage(generated, reference, seed=seed), n, m),
        recall=_share(coverage(reference, generated, seed=seed), n, m),
    )
    return quality, near


def as_estimate(
    found: Jackknife, n: int, n_reference: int, *, note: str = "", least: float = -math.inf
) -> Estimate:
    """The record of a jackknifed statistic."""
    low, high = found.interval()
    return Estimate(
        value=found.value, low=max(least, low), high=high, n=n, n_reference=n_reference, note=note
    )


def _share(found: Jackknife, n: int, n_reference: int) -> Estimate:
    """A proportion whose jackknifed variance says how many independent trials it is worth."""
    share, trials = found.value, float(max(n, n_reference))
    if found.variance > 0 and 0 < share < 1:
        trials = min(trials, max(1.0, share * (1 - share) / found.variance))
    low, high = wilson(share * trials, trials)
    note = f"k = {NEIGHBOURS}; depends on N"
    return Estimate(value=share, low=low, high=high, n=n, n_reference=n_reference, note=note)


def _spread(without: Tensor) -> float:
    count = len(without)
    return float((count - 1) / count * (without - without.mean()).square().sum())


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    """(x . y / dim + 1)^3, the kernel of KID."""
    return (a @ b.T / a.shape[1] + 1) ** 3
