from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load

from atoll.core.errors import DataError
from atoll.partitioner.cluster import assign, fit_centroids
from atoll.partitioner.settings import ClusterConfig


def unit(values: NDArray[np.float64]) -> NDArray[np.float32]:
    wide = values / np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(wide, dtype=np.float32)


def clouds(each: int, centres: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    middles = np.eye(centres, 16) * 4
    return unit(np.repeat(middles, each, axis=0) + 0.3 * rng.normal(size=(each * centres, 16)))


def test_separate_clouds_are_found_and_each_is_one_shard() -> None:
    vectors = clouds(60, 5)
    centroids = fit_centroids(vectors, 5, ClusterConfig(), seed=3)
    assert np.allclose(np.linalg.norm(centroids.coarse, axis=1), 1, atol=1e-6)
    assert len(centroids.fine) == 300 // 8
    found = assign(vectors, centroids.coarse).index.reshape(5, 60)
    assert (found == found[:, :1]).all()
    assert sorted(found[:, 0]) == [0, 1, 2, 3, 4]


def test_centroids_are_a_function_of_vectors_and_seed() -> None:
    vectors = clouds(50, 4, seed=1)
    config = ClusterConfig(fine=20)
    first = fit_centroids(vectors, 4, config, seed=7)
    shuffled = vectors[np.random.default_rng(5).permutation(len(vectors))]
    again = fit_centroids(shuffled, 4, config, seed=7)
    assert np.array_equal(first.coarse, again.coarse)
    stored = load(first.as_safetensors())
    assert np.array_equal(stored["centroids"], first.coarse)
    assert stored["fine_centroids"].shape == (20, 16)


def test_equal_pictures_make_no_centroid_of_their_own() -> None:
    few = unit(np.random.default_rng(0).normal(size=(3, 8)))
    vectors = np.repeat(few, 40, axis=0)
    centroids = fit_centroids(vectors, 3, ClusterConfig(), seed=0)
    assert len(np.unique(assign(vectors, centroids.coarse).index)) == 3
    with pytest.raises(DataError, match="only 3 different pictures"):
        fit_centroids(vectors, 4, ClusterConfig(), seed=0)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 40))
def test_assignment_is_the_nearest_by_cosine_whoever_else_is_there(
    seed: int, shards: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(count, 12)))
    centroids = unit(rng.normal(size=(shards, 12)))
    found = assign(vectors, centroids)
    cosine = vectors.astype(np.float64) @ centroids.astype(np.float64).T
    assert np.array_equal(found.index, cosine.argmax(axis=1))
    assert np.allclose(found.distance, 1 - cosine.max(axis=1), atol=1e-6)
    if shards == 1:
        assert np.isnan(found.margin).all()
    else:
        ordered = np.sort(cosine, axis=1)
        assert np.allclose(found.margin, ordered[:, -1] - ordered[:, -2], atol=1e-6)
    for row in range(count):
        alone = assign(vectors[row : row + 1], centroids)
        assert alone.index[0] == found.index[row]
        assert alone.distance.tobytes() == found.distance[row : row + 1].tobytes()
        assert alone.margin.tobytes() == found.margin[row : row + 1].tobytes()
