"""The smallest demo end to end: interrupted, resumed, repeated, and what its report holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import atoll, count, done, interrupted, tree

WORDS = ("demo", "--smallest", "--shards=3")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest demo, with Ctrl-C in the middle of its islands."""
    out = tmp_path_factory.mktemp("demo") / "out"
    words = [*WORDS, "--out", str(out)]
    islands = out / "run/islands"
    said = interrupted(words, lambda: count(islands / "shard-00/commits") > 0)
    assert said.code == 6, said
    assert not (out / "report.html").exists()
    base = tree(out / "run/base")
    said = atoll(*words, "--json")
    assert said.code == 0, said.err[-2000:]
    assert tree(out / "run/base") == base
    assert said.json["report"] == f"{out}/report.html"
    assert {"real records", "base", "monolith", "full", "once", "top-k:1", "soup"} == set(
        said.json["metrics"]
    )
    return out


def test_a_finished_demo_is_left_as_it_is(demo: Path, untouched) -> None:
    with untouched(demo):
        again = done(*WORDS, "--out", demo)
        assert again["run"] == f"{demo}/run"
        for other in (["--smallest"], ["--smallest", "--shards=3", "--minutes=1"], []):
            said = atoll("demo", "--out", demo, *other, "--json")
            assert said.code == 7
            assert "other options" in said.error["what"]


def test_the_report_is_whole_and_self_contained(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    for text in (
        "monolith", "shard-00", "shard-02", "top-k:1", "once", "soup", "read as asked",
        "checks hold", "a handwritten", "certificate", "ledger", "held-out",
    ):  # fmt: skip
        assert text in page, text
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert len(headings) >= 7, headings
    assert page.count("<img") + page.count("<svg") > 20
    assert not re.search(r"<(script|link|iframe|object)[^>]+(src|href)=", page)
    assert not re.search(r"(?:src|xlink:href)\s*=\s*[\"'](?!data:|#)", page)
    assert not re.search(r"url\(\s*[\"']?(?!data:|#)", page)
    assert "@import" not in page


def test_what_the_demo_made_holds(demo: Path) -> None:
    done("verify", demo / "run")
    checks = done("verify", demo / "forgotten/certificate.json")["checks"]
    assert "nothing of shard-00 is left" in {check["what"] for check in checks}
    manifest = json.loads((demo / "forgotten/manifest.json").read_text())
    assert list(manifest["shards"]) == ["shard-01", "shard-02"]
    done("soup", "verify", demo / "run/soups/all")
    sampled = done(
        "sample", demo / "run", "a handwritten seven", "--steps=2", "--out", demo.parent / "p"
    )
    assert len(sampled["pictures"]) == 1


def test_a_corpus_that_was_refused_does_not_take_the_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["demo", "--smallest", "--out", out, "--json"]
    for name in ("none.parquet", "other.parquet"):
        said = atoll(*words, "--corpus", tmp_path / name)
        assert said.code == 4
        assert name in said.error["what"]
