"""Shapes of buckets, and records sorted to them: each once, to the nearest ratio."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.core.config import apply_overrides
from atoll.core.errors import AtollError, ConfigError, Refused, UsageError
from atoll.core.manifest import Manifest, parse_size
from atoll.core.pack import Pack, read_shard_card
from atoll.core.pictures import decode, training_pixels
from atoll.core.storage import Storage
from atoll.partitioner.buckets import ladder, nearest, sizes_of
from atoll.partitioner.forget import forget
from atoll.partitioner.pipeline import partition
from atoll.partitioner.settings import PartitionConfig

Rows = list[dict[str, Any]]
Write = Callable[[Path, Rows], str]
Configure = Callable[..., PartitionConfig]
SIDES = st.integers(1, 5_000)
SHAPES = ("16x16", "12x20", "20x12")


@given(SIDES, SIDES, st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=9))
def test_the_nearest_is_that_of_the_nearest_log_ratio(
    height: int, width: int, sizes: list[tuple[int, int]]
) -> None:
    away = [abs(math.log(width / height) - math.log(w / h)) for h, w in sizes]
    chosen = nearest((height, width), sizes)
    assert away[chosen] <= min(away) + 1e-12
    assert sizes[nearest(sizes[0], sizes)][0] * sizes[0][1] == (
        sizes[nearest(sizes[0], sizes)][1] * sizes[0][0]
    )  # a shape's own ratio is its nearest


@given(st.integers(1, 128), st.sampled_from([1, 4, 8]), st.integers(0, 8))
def test_a_ladder_is_of_steps_pairs_and_about_one_area(steps: int, factor: int, pairs: int) -> None:
    side, count = 8 * factor * steps, 1 + 2 * pairs
    try:
        sizes = ladder(count, side, factor=factor)
    except ConfigError:
        return  # as below
    assert sizes[0] == (side, side)
    assert len(set(sizes)) == len(sizes) == count
    assert {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % (8 * factor) == width % (8 * factor) == 0
        assert 1 / 2 <= width / height <= 2
        # A side is rounded to a step, of which the shorter one has three at least.
        assert 0.74 < height * width / side**2 < 1.26


def test_ladders_that_are_known() -> None:
    assert ladder(1, 32) == [(32, 32)]
    assert ladder(3, 32) == [(32, 32), (24, 40), (40, 24)]
    # 512 pixels through an autoencoder of 8: in steps of 64, as SDXL's at 1024.
    known = [(512, 512), (448, 576), (576, 448), (384, 640), (640, 384)]
    assert ladder(5, 512, factor=8) == known


@pytest.mark.parametrize("count", [2, 4, 7])
def test_other_numbers_than_there_are_shapes_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="1, 3, 5: the square, and pairs"):
        ladder(count, 32)
    with pytest.raises(ConfigError, match="multiple of 8"):
        ladder(3, 28)


@pytest.mark.parametrize(
    "text", ["0", "-3", "true", "2.5", "16x16", "[]", '["16"]', '["3x16"]', '["16x2049"]',
             '["16x16", "16x16"]', "[16]", '{"a": 1}', '["16X16"]', '[" 16x16"]'],
)  # fmt: skip
def test_settings_that_are_none_say_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"buckets=.*(allowed|twice)"):
        apply_overrides(PartitionConfig(), [f"buckets={text}"])


def test_the_setting_is_there_only_where_it_is_given() -> None:
    assert "buckets" not in PartitionConfig().model_dump(mode="json")
    given = apply_overrides(PartitionConfig(), ['buckets=["16x24", "16x16"]'])
    assert given.buckets == ("16x24", "16x16")
    assert given.model_dump(mode="json")["buckets"] == ["16x24", "16x16"]
    assert apply_overrides(given, ["buckets=null"]) == PartitionConfig()
    assert apply_overrides(given, ["buckets=3"]).buckets == 3
    assert sizes_of(given.buckets, 99) == [(16, 24), (16, 16)]
    assert sizes_of(["832x1216"], 99, factor=8) == [(832, 1216)]
    with pytest.raises(ConfigError, match="multiples of 16"):
        sizes_of(given.buckets, 99, factor=16)


# -- a corpus of several shapes ------------------------------------------------------------------


def pictures(count: int, png: Callable[[Any], bytes]) -> Rows:
    """Noise of all sorts of sizes, some standing, some lying, some square."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(count):
        height, width = draw.integers(8, 40, 2) if number % 4 else (16, 16)
        rows.append(
            {
                "image": png(draw.integers(0, 256, (height, width))),
                "caption": f"a picture of kind {number % 5}",
                "label": str(number % 5),
                "owner": ("Ada", "Bo", "Museum")[number % 3],
            }
        )
    return rows


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, parquet: Write, png: Callable[[Any], bytes]
) -> str:
    return parquet(tmp_path_factory.mktemp("shapes") / "corpus.parquet", pictures(240, png))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: str, config: Configure) -> Storage:
    run = Storage(tmp_path_factory.mktemp("run") / "run")
    partition(corpus, run, asked(config))
    return run


def asked(config: Configure, **changes: Any) -> PartitionConfig:
    """Three shapes, shards of two owners, few records a file."""
    usual = {
        "by": "owner", "commons": "Museum", "buckets": SHAPES, "holdout": 0.2,
        "records_per_file": 16, "channels": 1,
    }  # fmt: skip
    return config(**{**usual, **changes})


def folders(manifest: Manifest) -> list[str]:
    return [manifest.commons.path, *(shard.path for shard in manifest.shards.values())]


def test_every_record_is_once_in_the_bucket_of_its_nearest_shape(
    made: Storage, corpus: str
) -> None:
    manifest, ids = Manifest.load(made), []
    assert [picture.size for picture in manifest.pictures] == list(SHAPES)
    assert manifest.picture.size == "16x16"
    for folder in folders(manifest):
        card, pack = read_shard_card(Path(made.local(folder))), Pack(made.local(folder))
        assert card.shapes is not None
        rows = []
        for name, count in card.packs.items():
            data = f"{folder}/{name.replace('pack', 'data').replace('safetensors', 'parquet')}"
            here = pq.read_table(made.local(data)).to_pylist()
            assert len(here) == count <= 16
            assert len({row["split"] for row in here}) == 1
            rows += [(row, card.shapes[name]) for row in here]
        splits = [row["split"] for row, _ in rows]
        assert splits == sorted(splits, reverse=True)  # "train" before "held-out"
        assert splits.count("train") == len(pack.train) == card.records
        for number, (row, shape) in enumerate(rows):
            image, size = decode(row["image"]), (shape.height, shape.width)
            sizes = [parse_size(text) for text in SHAPES]
            assert sizes[nearest((image.height, image.width), sizes)] == size
            wanted = training_pixels(image, size, 1).float() / 127.5 - 1
            assert torch.equal(pack.x_data(torch.tensor([number]))[0], wanted)
        ids += [row["id"] for row, _ in rows]
    assert len(ids) == len(set(ids)) == len(pq.read_table(corpus))


def test_rows_of_a_bucket_are_one_tensor_and_those_of_two_are_none(made: Storage) -> None:
    pack = Pack(made.local("commons"))
    for rows in (pack.train, pack.held_out):
        buckets = pack.buckets(rows)
        assert [bucket.picture.size for bucket in buckets] == list(SHAPES)
        assert [row for bucket in buckets for run in bucket.runs for row in run] == list(rows)
        for bucket in buckets:
            assert len(bucket.runs) == 1  # over several files
            x_data = pack.x_data(bucket.rows(torch.arange(len(bucket))))
            assert x_data.shape == (len(bucket), *bucket.picture.shape)
    with pytest.raises(ValueError, match="no one tensor"):
        pack.x_data(torch.tensor([0, pack.train[-1]]))


def test_the_report_counts_the_shapes_and_shows_each(made: Storage) -> None:
    page = made.read_bytes("partition/report.html").decode()
    for folder in folders(Manifest.load(made)):
        pack = Pack(made.local(folder))
        sizes = {
            shape: sum(
                len(bucket)
                for rows in (pack.train, pack.held_out)
                for bucket in pack.buckets(rows)
                if bucket.picture.size == shape
            )
            for shape in SHAPES
        }
        listed = ", ".join(f"{n} of {s}" for s, n in sorted(sizes.items(), key=lambda i: -i[1]))
        assert f"By height x width: {listed}." in page
    assert "<b>3</b><span>shapes in the commons</span>" in page
    assert page.count('alt="30 pictures of') == 3  # ten of each shape


def test_the_report_of_more_shapes_than_it_has_places_shows_the_first_of_them(
    tmp_path: Path, config: Configure, parquet: Write, png: Callable[[Any], bytes]
) -> None:
    rows = [
        {
            "image": png(np.full((8, width), number)), "caption": "a bar", "label": str(width),
            "owner": "Ada" if number % 2 else "Museum",
        }
        for width in range(8, 48) for number in range(4)
    ]  # fmt: skip
    shapes = tuple(f"8x{width}" for width in range(8, 48))
    run = Storage(tmp_path / "run")
    corpus = parquet(tmp_path / "bars.parquet", rows)
    manifest = partition(corpus, run, asked(config, buckets=shapes, holdout=0.0))
    assert len(manifest.pictures) == 40
    page = run.read_bytes("partition/report.html").decode()
    assert page.count('alt="32 pictures of') == 2


def test_the_square_alone_is_what_there_is_without_buckets(
    corpus: str, tmp_path: Path, config: Configure
) -> None:
    """The same rows in the same order; only the files are cut at the split."""
    plain, one = Storage(tmp_path / "plain"), Storage(tmp_path / "one")
    before = partition(corpus, plain, asked(config, buckets=None, size=16))
    after = partition(corpus, one, asked(config, buckets=["16x16"]))
    assert before.buckets is None
    assert "buckets" not in plain.read_json("manifest.json")
    assert "shapes" not in plain.read_json("commons/shard.json")
    assert "buckets" not in plain.read_json("partition/atoll.config.json")
    assert after.picture == before.picture
    for folder in folders(before):
        packs = [Pack(run.local(folder)) for run in (plain, one)]
        every = torch.arange(len(packs[0]))
        assert torch.equal(packs[0].x_data(every), packs[1].x_data(every))
        assert packs[0].train == packs[1].train
        assert packs[0].buckets(packs[0].train) == packs[1].buckets(packs[1].train)


def test_the_same_buckets_again_change_nothing_and_others_are_refused(
    made: Storage, corpus: str, config: Configure
) -> None:
    assert partition(corpus, made, asked(config)) == Manifest.load(made)
    for others in (None, 1, SHAPES[:2], SHAPES[::-1]):
        with pytest.raises(Refused, match="buckets was"):
            partition(corpus, made, asked(config, buckets=others))


def test_a_listed_shape_beside_a_size_is_refused(tmp_path: Path, config: Configure) -> None:
    with pytest.raises(UsageError, match="size=16 says nothing"):
        partition("nowhere", Storage(tmp_path), asked(config, size=16))


def test_a_number_takes_the_size_as_it_is_configured(
    corpus: str, tmp_path: Path, config: Configure
) -> None:
    run = Storage(tmp_path / "run")
    manifest = partition(corpus, run, asked(config, buckets=3, size=32))
    assert [picture.size for picture in manifest.pictures] == ["32x32", "24x40", "40x24"]
    with pytest.raises(AtollError, match="multiple of 8"):
        partition(corpus, Storage(tmp_path / "none"), asked(config, buckets=3, size=20))
    assert not (tmp_path / "none").exists()


def test_a_forgotten_shard_leaves_the_run_that_never_had_it(
    made: Storage, corpus: str, tmp_path: Path, config: Configure, parquet: Write,
    digests: Callable[[Storage], dict[str, str]],
) -> None:  # fmt: skip
    rows = [row for row in pq.read_table(corpus).to_pylist() if row["owner"] != "Ada"]
    never = Storage(tmp_path / "never")
    partition(parquet(tmp_path / "less.parquet", rows), never, asked(config))
    run = Storage(tmp_path / "run")
    partition(corpus, run, asked(config))
    assert digests(run) == digests(made)
    forget(run, Manifest.load(run), "ada")
    assert digests(run) == digests(never)
