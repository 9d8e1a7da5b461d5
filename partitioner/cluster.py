"""Two-stage spherical k-means, and the assignment of vectors to centroids.

Many fine centroids first, then few coarse ones among the fine: so the coarse ones follow the
extent of the data and not its density (Decentralized Diffusion Models, arXiv 2501.05450; Vo et al.
2024, arXiv 2405.15613). This is the one file that imports faiss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from atoll.core import seeds
from atoll.core.errors import DataError
from atoll.partitioner.embed import Floats
from atoll.partitioner.settings import ClusterConfig

_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class Centroids:
    """Unit vectors: `coarse` `(shards, dim)`, and the `fine` `(n, dim)` that they were made of."""

    coarse: Floats
    fine: Floats

    def as_safetensors(self) -> bytes:
        """The content of `partition/centroids.safetensors`."""
        return save({"centroids": self.coarse, "fine_centroids": self.fine})


@dataclass(frozen=True)
class Assignment:
    """Nearest coarse centroid of each vector, `(n,)` each.

    `distance` is 1 - cosine to it; `margin` is how much farther the second nearest is, and NaN
    where there is only one.
    """

    index: NDArray[np.int64]
    distance: Floats
    margin: Floats


def fit_centroids(vectors: Floats, shards: int, config: ClusterConfig, *, seed: int) -> Centroids:
    """Centroids of unit vectors `(n, dim)`, in an order that the seed and the vectors fix.

    `DataError` when there are fewer distinct vectors than shards.
    """
    # Equal pictures (many, in drawn or synthetic corpora) would be several centroids at one place.
    distinct: Floats = np.unique(vectors, axis=0)
    if len(distinct) < shards:
        raise DataError(
            f"The encoder sees only {len(distinct)} different pictures in the commons, "
            f"too few for {shards} centroids",
            cure="give fewer --shards, a larger --commons, or another --encoder",
        )
    wanted = min(config.fine, len(distinct) // config.records_per_fine)
    fine = _kmeans(distinct, max(shards, wanted), config.iterations, 1, seed, "fine")
    fine = np.unique(fine, axis=0)
    if len(fine) < shards:
        fine = distinct
    coarse = _kmeans(fine, shards, config.iterations, config.tries, seed, "coarse")
    return Centroids(coarse, fine)


def _kmeans(
    vectors: Floats, count: int, iterations: int, tries: int, seed: int, stage: str
) -> Floats:
    """Spherical k-means `(count, dim)`; every default of faiss that matters is set here."""
    import faiss

    if count == len(vectors):
        return vectors
    with _one_thread():
        kmeans = faiss.Kmeans(
            vectors.shape[1],
            count,
            niter=iterations,
            nredo=tries,
            seed=seeds.key(seed, "k-means", stage) & 0x7FFFFFFF,
            spherical=True,
            # All vectors are used: by default faiss draws 256 per centroid and says nothing.
            max_points_per_centroid=len(vectors),
            # Silences its advice of 39 per centroid: fine centroids of few records are meant.
            min_points_per_centroid=1,
        )
        kmeans.train(np.ascontiguousarray(vectors, dtype=np.float32))
    found: Floats = np.array(kmeans.centroids, dtype=np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    assert np.isfinite(found).all(), "k-means met a vector that is not finite"
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Pin faiss to one thread, so that no sum depends on how many cores there are."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def assign(vectors: Floats, centroids: Floats) -> Assignment:
    """Nearest centroid by cosine; of equals the first.

    Products are summed row by row in float64 and not by a matrix product, whose rounding depends
    on how many rows there are.
    """
    wide = centroids.astype(np.float64)
    rows = max(1, _CHUNK_VALUES // wide.size)
    parts = [
        (vectors[start : start + rows, None, :].astype(np.float64) * wide[None]).sum(axis=2)
        for start in range(0, len(vectors), rows)
    ]
    cosine = np.concatenate(parts) if parts else np.zeros((0, len(wide)))
    index = cosine.argmax(axis=1)
    ordered = np.sort(cosine, axis=1)
    best = ordered[:, -1]
    second = ordered[:, -2] if len(wide) > 1 else np.full(len(best), np.nan)
    return Assignment(
        index.astype(np.int64),
        (1 - best).clip(min=0).astype(np.float32),
        (best - second).astype(np.float32),
    )
