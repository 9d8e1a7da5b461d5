"""The benchmark of soups at its smallest: what it times is the command, what it counts is true."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from atoll.merge.weights import WEIGHTS_NAME
from benchmarks import peers, soup

CASE = replace(
    soup.QUICK[0], config=soup.TINY | {"block_out_channels": (8, 8), "norm_num_groups": 4}
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("soup")


@pytest.fixture(scope="module")
def rows(out: Path) -> list[dict[str, Any]]:
    return soup.measure(CASE, out, "there are none", sampled=2000, repeats=1)


def test_its_rows(rows: list[dict[str, Any]], out: Path) -> None:
    told = {row["name"].partition(" GB in bfloat16")[2]: row for row in rows}
    assert list(told) == [
        ", warm: bytes a second", ", cold: bytes a second",
        ": anonymous memory beyond the interpreter's",
        ": elements that fractions round otherwise",
        ", warm: beside mergekit", ", cold: beside mergekit",
        ": elements that fractions round otherwise, mergekit",
        ", warm: beside sd-mecha", ", cold: beside sd-mecha",
        ": elements that fractions round otherwise, sd-mecha",
    ]  # fmt: skip
    assert told[": elements that fractions round otherwise"]["value"] == 0
    assert told[": elements that fractions round otherwise"]["holds"] is True
    assert 0 < told[": anonymous memory beyond the interpreter's"]["value"] < 1
    unmeasured = [row for name, row in told.items() if "mergekit" in name or "mecha" in name]
    assert all(row["value"] is None and row["holds"] is None for row in unmeasured)
    assert "there are none" in unmeasured[0]["against"]
    # Another run finds the experts made.
    place = out / "tiny-bf16"
    before = [(place / f"expert-{n}" / WEIGHTS_NAME).stat().st_mtime_ns for n in range(3)]
    soup.experts(CASE, place)
    assert before == [(place / f"expert-{n}" / WEIGHTS_NAME).stat().st_mtime_ns for n in range(3)]


def test_what_is_rounded_otherwise_is_counted(rows, out: Path, tmp_path: Path) -> None:
    inputs = [out / f"tiny-bf16/expert-{n}" / WEIGHTS_NAME for n in range(3)]
    parts = [load_file(file) for file in inputs]
    exact = load_file(out / "tiny-bf16/soup" / WEIGHTS_NAME)
    in_bfloat16 = {name: (parts[0][name] + parts[1][name] + parts[2][name]) / 3 for name in exact}
    save_file(in_bfloat16, tmp_path / "usual.safetensors")
    every = sum(value.numel() for value in exact.values())
    expected = sum(int((in_bfloat16[name] != exact[name]).sum()) for name in exact)
    assert soup.differing(tmp_path / "usual.safetensors", inputs, every) == (expected, every)
    assert 0.1 < expected / every < 0.5
    save_file({name: value.float() for name, value in exact.items()}, tmp_path / "wide.safetensors")
    wrong, counted = soup.differing(tmp_path / "wide.safetensors", inputs, 2000)
    assert wrong == counted > 1000


def test_peers_are_told_what_to_average(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    mergekit, mecha = peers.peers(Path("/env/bin/python"), files, tmp_path / "out", "bfloat16")
    told = yaml.safe_load(Path(mergekit.command[1]).read_text())
    assert (told["merge_method"], told["dtype"]) == ("linear", "bfloat16")
    assert [each["model"] for each in told["models"]] == list(map(str, files))
    assert mecha.command[0] == "/env/bin/python"
    assert mecha.command[-2:] == list(map(str, files))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('it has no word for this')", "it has no word for this"),
        ("pass", "it left no mean.safetensors"),
    ],
)
def test_a_peer_that_does_not_end_well_says_why(tmp_path: Path, code: str, said: str) -> None:
    peer = peers.Peer("other", [sys.executable, "-c", code], tmp_path / "mean.safetensors")
    with pytest.raises(peers.PeerError, match=said):
        peers.run(peer)


def test_a_peer_is_measured_beside_ours(
    rows: list[dict[str, Any]], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [out / f"tiny-bf16/expert-{n}" / WEIGHTS_NAME for n in range(3)]
    result = tmp_path / "peers" / "copy.safetensors"
    code = f"import shutil; shutil.copy({str(inputs[0])!r}, {str(result)!r})"
    copies = peers.Peer("copies", [sys.executable, "-c", code], result)
    monkeypatch.setattr(peers, "peers", lambda *_: [copies])
    (tmp_path / "peers").mkdir()
    seconds = {False: 0.5, True: 1.0}
    warm, cold, wrong = soup._beside(
        "copies", Path("python"), "here", inputs, tmp_path / "peers", CASE, seconds, 1000
    )
    assert warm["value"] is not None
    assert cold["holds"] == (cold["value"] >= soup.COLD)
    assert wrong["value"] > 900
    assert torch.equal(*(load_file(file)["conv_in.bias"] for file in (result, inputs[0])))


def test_changes_with_and_without_a_state(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state in float64 is as large as two experts in float32; a soup has three and four."""
    monkeypatch.setattr(soup, "COUNTS", (3, 4))
    case = replace(CASE, name="changes", dtype=torch.float32, count=4)
    rows = soup.measure_changes(case, out)
    read = [row for row in rows if "bytes read" in row["name"]]
    ways = [row["against"].split(":")[0] for row in read]
    assert ways == ["from the experts", "from the experts", "from the state", "from the experts"]
    assert all(row["value"] <= 1 and row["holds"] for row in read)
    assert [row["value"] for row in rows if "differ" in row["name"]] == [0, 0, 0, 0]
