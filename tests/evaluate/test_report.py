"""The page: escaped, self-contained, the same twice, and whole with any section left out."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from atoll.core.head import Band, HeadCalibration, HeadConfig
from atoll.core.ledger import LedgerEntry
from atoll.core.storage import Storage
from atoll.evaluate import charts, views
from atoll.evaluate.evaluation import Evaluation, Row
from atoll.evaluate.metrics import Estimate, Quality, proportion
from atoll.evaluate.reader import Reading
from atoll.evaluate.report import REPORT_NAME, render_report, shared_words, write_report
from atoll.evaluate.shares import compare
from atoll.router.calibrate import GateBand, GateCalibration
from atoll.router.ensemble import TraceStep

EVIL = "<script>alert(1)</script>\" onerror='x' {{ 7*7 }} \u202egnp"
SHARDS = ("shard-00", 'ow"ner<b>')
VOID = {"meta", "img", "br", "hr", "link", "input"}
# What an SVG element of ours may be written as without a closing tag.
SELF_CLOSED = {"path", "rect", "circle", "image"}


class Page(HTMLParser):
    """Checks that tags nest, and collects them with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SELF_CLOSED, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag, tag


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.1, high=value + 0.1, n=50, n_reference=40)


def row(name: str, kind: str, kid: float) -> Row:
    quality = Quality(
        frechet=estimate(2), kid=estimate(kid), precision=estimate(0.8), recall=estimate(0.7)
    )
    return Row.model_validate({
        "name": name, "kind": kind, "shard": None, "about": EVIL, "n": 50, "steps": 5,
        "guidance": 1.0, "experts_per_step": 1.5, "passes_per_picture": 7.5,
        "spaces": {"encoder": quality, "pixels": quality},
        "kid_minus_control": {} if kind == "control" else {"encoder": estimate(kid - 0.4)},
        "shares": compare(SHARDS, torch.tensor([20, 30]), torch.tensor([20, 20]), seed=0),
        "reading": Reading(accuracy=proportion(45, 50), by_label={EVIL: (45, 50)}),
    })  # fmt: skip


def evaluation() -> Evaluation:
    rows = [row("full", "ensemble", 0.1), row("soup", "soup", 0.9), row("mono", "control", 0.4)]
    return Evaluation(
        seed=0,
        n=50,
        n_reference=40,
        reference="held-out records",
        spaces={"encoder": "embeddings", "pixels": "pixels"},
        dimensions={"encoder": 64, "pixels": 16},
        control="mono",
        reader=proportion(39, 40),
        rows=rows,
        gates={EVIL: calibration()},
    )


def calibration() -> GateCalibration:
    bands = [
        GateBand(
            t=t, nll=0.2 + t, prior_nll=1.3, accuracy=1 - t / 2, calibration_error=t / 10,
            calibration_noise=0.012, worse_than_prior=[],
        )
        for t in (0.1, 0.5, 1.0)
    ]  # fmt: skip
    return GateCalibration(
        n=1234, shards=list(SHARDS), prompted=bands, unprompted=bands[:2], warnings=[EVIL],
        recommended="once",
    )  # fmt: skip


def everything() -> views.ReportData:
    x = torch.linspace(-1, 1, 3 * 16).reshape(3, 1, 4, 4)
    prompts = ("a red apple", "a red car", EVIL)
    band = Band(t=0.5, slope=1, intercept=0, loss=0.4, overlap=0.3, mean_ratio=1.1)
    trace = [
        TraceStep(
            t, torch.tensor([[t, 1 - t]] * 3), *[torch.zeros(3, 2)] * 3, 6, torch.zeros(3, 1, 8, 8)
        )
        for t in (1.0, 0.6, 0.2)
    ]
    entry = LedgerEntry(
        id=0, kind="expert", name=EVIL, sha256="a" * 64, parents=[], shards=list(SHARDS),
        code_version="0", previous_sha256="0" * 64,
    )  # fmt: skip
    shard_views = tuple(views.ShardView(name, 90, 10, (EVIL, "word"), x) for name in SHARDS)
    return views.ReportData(
        title=EVIL,
        shards=SHARDS,
        sentence=EVIL,
        removed=SHARDS[1],
        figures=(views.Figure(EVIL, EVIL, EVIL),),
        partition=views.PartitionView(shard_views, shard_views[0], EVIL),
        curves=(
            views.Curve("base", tuple((i * 8, 1 / (i + 1)) for i in range(400))),
            views.Curve(SHARDS[1], ((0, 0.5), (8, 0.5))),
            views.Curve(EVIL, ((0, 0.7), (16, 0.2))),
        ),
        comparison=views.ComparisonView(
            prompts,
            (
                views.PictureRow("base", "base", x),
                views.PictureRow(SHARDS[1], "expert", x, SHARDS[1], EVIL),
                views.PictureRow("full", "ensemble", x.repeat(1, 3, 1, 1)),
            ),
            x,
            EVIL,
        ),
        gate_traces=views.gate_traces(trace, prompts, x, noise=x),
        gate_heads={
            SHARDS[0]: HeadConfig(
                shard=SHARDS[0],
                trunk_sha256="0",
                calibration=HeadCalibration(prompted=[band], unprompted=[band], text=band),
            ),
            SHARDS[1]: HeadConfig(shard=SHARDS[1], trunk_sha256="0"),
        },
        removal=views.RemovalView(
            SHARDS[1],
            prompts,
            (views.RemovalRow("full", "ensemble", x, torch.cat([x[:1] + 0.5, x[1:]])),),
            EVIL,
        ),
        evaluation=evaluation(),
        costs=(views.CostLine("base", 100, 1e12, 3.2, 1 << 30), views.CostLine(EVIL, about=EVIL)),
        ledger=[entry],
        certificate=views.CertificateView(
            SHARDS[1],
            (views.Check(EVIL, True, EVIL), views.Check("no", False)),
            ((EVIL, EVIL),),
            (EVIL,),
        ),
        commands=(views.Command(EVIL, EVIL),),
        versions={"atoll": EVIL},
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(everything())


def test_captions_of_strangers_stay_text(page: str) -> None:
    tags = Page(page).tags
    assert not [tag for tag, _ in tags if tag in ("script", "b", "iframe", "object", "link")]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert "ow&#34;ner&lt;b&gt;" in page


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, value)
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import", page)


def test_the_page_is_the_same_twice_and_small(page: str) -> None:
    assert render_report(everything()) == page
    assert len(page) < 3_000_000


def test_every_section_is_there(page: str) -> None:
    sections = [
        "partition",
        "training",
        "noise",
        "gate",
        "removal",
        "metrics",
        "cost",
        "ledger",
        "again",
    ]
    assert [a["id"] for tag, a in Page(page).tags if tag == "section"] == sections
    linked = [str(a["href"])[1:] for tag, a in Page(page).tags if tag == "a"]
    assert sorted(linked) == sorted(sections)


OPTIONAL = [f.name for f in dataclasses.fields(views.ReportData) if f.name not in
            ("title", "shards", "sentence")]  # fmt: skip


@pytest.mark.parametrize("field", OPTIONAL)
def test_any_section_can_be_left_out(field: str) -> None:
    bare = views.ReportData("t", SHARDS, "s")
    Page(render_report(dataclasses.replace(everything(), **{field: getattr(bare, field)})))
    Page(render_report(dataclasses.replace(bare, **{field: getattr(everything(), field)})))


def test_a_report_of_nothing_is_still_a_page() -> None:
    tags = [tag for tag, _ in Page(render_report(views.ReportData("t", (), "s"))).tags]
    assert "h1" in tags
    assert "section" not in tags


@pytest.mark.parametrize("shards", [1, 2, 9, 40])
def test_every_shard_has_a_colour_and_an_arc(shards: int) -> None:
    names = tuple(f"shard-{i:02d}" for i in range(shards))
    page = render_report(views.ReportData("t", names, "s"))
    assert page.count('class="arc"') == shards
    assert f"--s{shards - 1}: #" in page
    assert len(set(charts.palette(shards))) == shards


def test_before_and_after_says_what_changed(page: str) -> None:
    assert "1 of 3 pictures changed visibly, 2 not by one bit" in page


def test_metrics_are_sorted_with_the_verdict_above(page: str) -> None:
    table = page[page.index('id="metrics"') :]
    assert table.index("verdict") < table.index("<bdi>full</bdi>") < table.index("<bdi>mono</bdi>")
    assert table.index("<bdi>mono</bdi>") < table.index("<bdi>soup</bdi>")


def test_the_gates_calibration_is_drawn_and_warned_of(page: str) -> None:
    gate = page[page.index('id="gate"') : page.index('id="removal"')]
    assert "1,234 held-out records of 2 shards" in gate
    assert "0.050<span" in gate  # the error at t = 0.5
    assert "--routing once" in gate
    assert gate.count('class="mean"') == 6  # two charts of three lines
    none = calibration().model_copy(update={"recommended": None})
    data = everything()
    assert data.evaluation is not None
    told = data.evaluation.model_copy(update={"gates": {EVIL: none}})
    said = render_report(dataclasses.replace(data, evaluation=told))
    assert "No routing is recommended" in said
    assert "--routing None" not in said


def test_the_gate_is_introduced_by_what_is_shown_of_it(page: str) -> None:
    assert "the fuller its colour" in page
    bare = render_report(dataclasses.replace(everything(), gate_traces=()))
    assert "the fuller its colour" not in bare
    assert "Whose a noised picture is" in bare


def test_heat_strip_draws_each_weight_once() -> None:
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.25, 0.75]])
    pattern = r'x="(\d+)" y="\d+" width="(\d+)" height="9" fill="var\(--s(\d)\)" opacity="([\d.]+)"'
    cells = re.findall(pattern, charts.heat_strip((1.0, 0.7, 0.3), weights))
    assert [(int(x), int(w), int(s), float(o)) for x, w, s, o in cells] == [
        (0, 2, 0, 1.0), (2, 1, 0, 0.24), (2, 1, 1, 0.76)
    ]  # fmt: skip


def test_shared_words_never_eat_a_whole_prompt() -> None:
    assert shared_words(["a handwritten one", "a handwritten two"]) == "a handwritten"
    assert shared_words(["a cat", "a cat", "a cat"]) == "a"
    assert shared_words(["cat", "dog"]) == ""
    assert shared_words(["one prompt"]) == ""


@pytest.mark.parametrize(
    ("number", "text"), [(None, "–"), (0, "0"), (12480, "12.5 k"), (2.9e14, "290 T"), (0.5, "0.5")]
)
def test_numbers_in_words(number: float | None, text: str) -> None:
    assert charts.si(number) == text


def test_durations() -> None:
    assert charts.duration(71.6) == "1 min 12 s"
    assert charts.duration(3725) == "1 h 02 min"
    assert charts.duration(0.214) == "0.214 s"


def test_curves_are_read_from_a_journal_with_a_torn_end(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    for i in range(3):
        run.append_line("islands/a/metrics.jsonl", f'{{"images_seen": {i * 8}, "loss": {i}.5}}')
    run.append_line("islands/a/metrics.jsonl", '{"images_seen": 32, "lo')
    curve = views.read_curve(run, "a", "islands/a/metrics.jsonl")
    assert curve == views.Curve("a", ((0, 0.5), (8, 1.5), (16, 2.5)))


def test_report_is_written_into_the_run(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    write_report(everything(), run)
    assert run.read_bytes(REPORT_NAME).decode() == render_report(everything())
