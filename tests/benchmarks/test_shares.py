"""The corpus of the shares benchmark: owners of the shares that it says, told apart by colour."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import shares
from benchmarks.shares import COMMONS, FILMS, films_of, write_corpus


@given(st.integers(0, 30_000))
def test_every_film_has_its_part(count: int) -> None:
    films = films_of(count)
    assert len(films) == count
    there = Counter(films)
    for film, (part, _) in FILMS.items():
        assert abs(there[film] - part * count) <= 1


def test_a_corpus_is_public_records_and_others_on_films_of_one_tone_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "PUBLIC", 20)
    monkeypatch.setattr(shares, "RECORDS", 100)
    rng = np.random.default_rng(0)
    images = []
    for _ in range(120):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, format="PNG")
        images.append(buffer.getvalue())
    captions = [f"number {number}" for number in range(120)]
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "source.parquet")

    write_corpus(str(tmp_path / "source.parquet"), tmp_path / "corpus.parquet", share=1.0)
    public, private = (
        pq.read_table(tmp_path / name).to_pylist() for name in (COMMONS, "corpus.parquet")
    )
    assert [len(public), len(private)] == [20, 100]
    numbers = [row["caption"].removesuffix(f", {row['owner']}") for row in public + private]
    assert numbers == captions
    assert [row["owner"] for row in private] == films_of(100)
    tones = {}
    for row in private:
        picture = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")).astype(int)
        assert picture.shape == (8, 8, 3)
        tones.setdefault(row["owner"], []).append(picture.reshape(-1, 3))
    for film, pixels in tones.items():  # of one tone: a line through the colours
        values = np.concatenate(pixels)
        spread = np.linalg.svd(values - values.mean(0), compute_uv=False)
        assert spread[1] < 0.05 * spread[0], film
    means = np.array([np.concatenate(pixels).mean(0) for pixels in tones.values()])
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1)
    assert apart[~np.eye(len(means), dtype=bool)].min() > 20
