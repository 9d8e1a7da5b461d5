from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from atoll.core.storage import Storage
from atoll.partitioner.pipeline import partition
from atoll.partitioner.report import REPORT_NAME, write_report
from atoll.partitioner.settings import PartitionConfig
from atoll.partitioner.words import count_words, telling_words

Write = Callable[[Path, list[dict[str, Any]]], str]
Configure = Callable[..., PartitionConfig]


@pytest.fixture(scope="module")
def run(
    digits: list[dict[str, Any]], parquet: Write, config: Configure,
    tmp_path_factory: pytest.TempPathFactory,
) -> Storage:  # fmt: skip
    """Owners of very different sizes, one with a hostile name, with twins and unreadable ones."""
    rows = [{**row, "owner": "<script>alert(1)</script>"} for row in digits[:10]]
    rows += [{**row, "owner": "Bo"} for row in digits[5:200]]
    rows += [{**row, "owner": "Museum"} for row in digits[200:]]
    rows += [{**digits[0], "image": b"nonsense", "owner": "Bo"}]
    hostile = {"caption": "<b>bold</b> & 'quoted'"}
    rows += [{**row, **hostile, "owner": "Eve & Co"} for row in digits[:60]]
    folder = tmp_path_factory.mktemp("report")
    corpus = parquet(folder / "c.parquet", rows)
    run = Storage(folder / "run")
    partition(corpus, run, config(by="owner", commons="Museum"))
    return run


class Tags(HTMLParser):
    """Checks nesting and collects attributes."""

    VOID = frozenset(("meta", "img", "rect", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_shows_what_is_there(run: Storage) -> None:
    page = run.read_bytes(REPORT_NAME).decode()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(tags.links) == 4, "one montage for each shard and the commons"
    for link in tags.links:
        kind, _, data = link.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as sheet:
            assert sheet.size[0] == 8 * 48
    assert not re.search(r"https?://|@import|url\(|<script|<b>bold", page)
    for text in ("eve-co", "The shards are skewed", "1 picture could not be used", "bold"):
        assert text in page
    assert re.search(r"<td>bo, script-alert-1-script</td><td>5</td>", page)
    assert "Distances" not in page, "owners have no centroids"


def test_writing_the_page_again_gives_the_same_bytes(run: Storage) -> None:
    before = run.read_bytes(REPORT_NAME)
    run.remove(REPORT_NAME)
    run.remove("manifest.json")
    write_report(run)
    assert run.read_bytes(REPORT_NAME) == before


def test_distances_are_shown_for_clusters(
    digits: list[dict[str, Any]], parquet: Write, config: Configure, tmp_path: Path
) -> None:
    run = Storage(tmp_path / "run")
    partition(parquet(tmp_path / "c.parquet", digits), run, config(commons="0.2"))
    page = run.read_bytes(REPORT_NAME).decode()
    assert page.count("<svg") == 8
    assert "0.2 · held out 5.0%" in page
    alone = Storage(tmp_path / "alone")
    partition(parquet(tmp_path / "c.parquet", digits), alone, config(shards=1))
    assert alone.read_bytes(REPORT_NAME).decode().count("<svg") == 2, "one centroid has no margin"


def test_telling_words_are_the_surely_more_frequent_ones() -> None:
    groups = {
        "cats": {"a photo of a cat": 90, "a photo of a dog": 10, "one zebra": 1},
        "dogs": {"a photo of a dog": 95, "a photo of a cat": 5},
        "mixed": {"a photo of a cat": 50, "a photo of a dog": 50},
    }
    counts = {name: count_words(captions) for name, captions in groups.items()}
    assert counts["cats"] == {"photo": 100, "of": 100, "cat": 90, "dog": 10, "zebra": 1, "one": 1}
    sizes = {name: sum(captions.values()) for name, captions in groups.items()}
    words = telling_words(counts, sizes, most=3)
    assert words == {"cats": ["cat"], "dogs": ["dog"], "mixed": []}


def test_a_word_of_every_caption_tells_nothing() -> None:
    counts = {"one": {"digit": 90, "seven": 90}, "two": {"digit": 90}}
    assert telling_words(counts, {"one": 90, "two": 90}, most=3) == {"one": ["seven"], "two": []}
