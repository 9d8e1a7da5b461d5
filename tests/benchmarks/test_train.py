"""The training benchmark at its smallest, its GPU part on the CPU; no figure is looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from atoll.core.manifest import Picture
from atoll.islands.settings import DenoiserTraining
from benchmarks import cpu, gpu, train
from benchmarks.rows import row, show, unmeasured
from benchmarks.steps import ABLATIONS
from benchmarks.trainings import Case
from benchmarks.turns import Peer, Schedule, Times, alternate, interleave

DIGIT = Picture(channels=1, height=8, width=8)
SMALLEST = Schedule(warm=2, turn=1e-4, pair=1e-4, pairs=2)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small(name: str, **training: object) -> Case:
    config = DenoiserTraining.model_validate({"checkpoints": 1, **training})
    return Case(name, DIGIT, 4, config, torch.device("cpu"), tokens=(3, 8), records=16)


def counting(log: list[str], name: str) -> Peer:
    while True:
        yield
        log.append(name)


def test_all_take_as_many_steps_in_turns() -> None:
    log: list[str] = []
    settled: list[int] = []

    def ours(steps: int, before: object) -> None:
        assert callable(before)
        for _ in range(steps):
            before(lambda: settled.append(len(log)))
            log.append("ours")

    peers = {name: counting(log, name) for name in ("bare", "usual")}
    times = interleave(ours, peers, Schedule(warm=3, turn=1e-9, pair=1e-9, pairs=4))
    assert times.steps == times.rounds_a_pair == 1
    assert log[:9] == ["bare"] * 3 + ["usual"] * 3 + ["ours"] * 3
    laps = ["ours", "bare", "usual", "ours", "usual", "bare"] * 2
    assert log[9:] == [*laps, "ours"]
    assert settled == [9, 10, 13, 16, 19]  # where a turn of ours begins or ends
    assert [each.keys() for each in times.rounds] == [{"ours", "bare", "usual"}] * 4


def test_a_ratio_is_that_of_the_seconds_of_a_pair() -> None:
    laps = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}, {"a": 1.0, "b": 3.0}, {"a": 1.0, "b": 1.0}]
    times = Times(steps=5, rounds_a_pair=2, rounds=laps)
    assert times.ratios("a", "b") == [1.0, 2.0]
    assert times.ratio("a", "b") == 1.5
    assert times.rate("a") == 20 / 6
    times.worked = laps
    assert times.work_ratio("a", "b") == 8 / 6


def test_any_two_alternate() -> None:
    log: list[str] = []
    peers = {name: counting(log, name) for name in "ab"}
    times = alternate(peers, Schedule(warm=2, turn=1e-9, pair=1e-9, pairs=2), lambda: None)
    assert log == [*"bb", *"aa", *"ab" * 2, "a"]
    assert [each.keys() for each in times.rounds + times.worked] == [{"a", "b"}] * 4


def test_the_loop_and_its_peers_are_timed() -> None:
    rows = cpu.measure(small("unet-tiny"), SMALLEST, reading=0.0, profile=True)
    assert [made["name"] for made in rows[:7]] == [
        "unet-tiny island loop",
        "unet-tiny ratio to bare",
        "unet-tiny ratio to usual",
        "unet-tiny checkpoints in the timed part",
        "unet-tiny ratio to bare in work",
        "unet-tiny pack reading",
        "unet-tiny reading through the cache",
    ]
    assert all(made["value"] > 0 for made in rows if "checkpoints" not in made["name"])
    assert "mixed_precision='no'" in rows[2]["against"]
    assert "kernel 1:" in rows[7]["name"]


def test_checkpoints_by_the_clock_are_counted() -> None:
    case = small("unet-tiny", checkpoint_seconds=1e-9)
    rows = cpu.measure(case, SMALLEST, reading=0.0)
    assert rows[3]["value"] > 0


def test_what_a_gpu_measures_runs_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "dit-tiny"
    monkeypatch.setattr(gpu, "OF_FEATURES", SMALLEST)
    # What it compiles is then called as it stands: a compiler takes longer than all else here.
    case = small(name, precision="bfloat16", compile=True)
    with torch._dynamo.config.patch(disable=True):
        rows = gpu.measure(case, SMALLEST, share=0.4, ablate=True, profile=True)
    named = {made["name"].removeprefix(f"{name} "): made for made in rows}
    assert {f"with {feature}" for feature in ABLATIONS} <= named.keys()
    assert named["share of the matrix-product rate"]["value"] > 0
    assert "mixed_precision='bf16'" in named["ratio to usual"]["against"]
    assert named["peak memory"]["value"] is None
    assert "foretold" in named["peak memory"]["against"]
    assert sum(each.startswith("kernel") for each in named) == 10
    missing = {made["name"] for made in gpu.absent("dit-xl", "no CUDA device")}
    assert {each.replace("dit-xl", name) for each in missing} <= {made["name"] for made in rows}
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_a_gpu_no_row_holds_or_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["train", "--only", "gpu", "--json"])
    train.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len({made["name"] for made in rows}) == len(rows) == 14
    assert all(made["value"] is None and made["holds"] is None for made in rows)
    assert {made["against"] for made in rows} == {"not measured: no CUDA device"}


def test_a_row_holds_its_bar() -> None:
    assert row("a", 0.98, "ratio", at_least=0.98)["holds"]
    assert not row("a", 0.97, "ratio", at_least=0.98)["holds"]
    assert row("a", 15, "s", at_most=15)["holds"]
    assert row("a", 15, "s")["holds"] is None
    assert unmeasured(row("a", None, "ratio", at_least=1), "why")["holds"] is None


def test_the_object_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    show("nothing", [row("a", 1, "s")], as_json=True)
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    assert json.loads(text).keys() == {"benchmark", "machine", "rows"}
