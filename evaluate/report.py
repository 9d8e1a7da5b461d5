"""The report: one HTML file with everything in it, no scripts, nothing fetched.

Reads a `ReportData`, writes `RUN/evaluation/report.html`. Text is escaped by the template engine,
and a content policy in the page forbids scripts and anything from outside even if it were not. The
same data gives the same bytes: the page carries no time and no machine.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import jinja2
from markupsafe import Markup
from torch import Tensor

from atoll.core.head import Band
from atoll.core.storage import Storage
from atoll.evaluate import charts
from atoll.evaluate.evaluation import Evaluation, Kind, Row
from atoll.evaluate.features import to_images, to_uint8
from atoll.evaluate.metrics import Estimate
from atoll.evaluate.verdict import outcome, verdict
from atoll.evaluate.views import Curve, PictureRow, RemovalRow, ReportData
from atoll.router.calibrate import GateBand, GateCalibration

REPORT_NAME = "evaluation/report.html"
MONTAGE = 24
# A mean difference that the eye does not see on a screen, in levels of 255.
VISIBLE_LEVELS = 2.0


def write_report(data: ReportData, run: Storage, *, name: str = REPORT_NAME) -> None:
    """Render and store, complete or not at all."""
    run.write_bytes(name, render_report(data).encode())


def render_report(data: ReportData) -> str:
    """The page as text."""
    evaluation = data.evaluation
    sizes = {s.name: s.records for s in data.partition.shards} if data.partition else {}
    page = _environment().get_template("report.html")
    return page.render(
        data=data,
        palette=charts.palette(len(data.shards)),
        ring=charts.ring(data.shards, sizes, data.removed, pictures=_lagoon(data)),
        verdict=verdict(evaluation) if evaluation else [],
        tables=[_table(evaluation, space) for space in evaluation.spaces] if evaluation else [],
        shares=_shares(data) if evaluation else [],
        removal=[_removal(row) for row in data.removal.rows] if data.removal else [],
        groups=_groups(data),
        sizes=_sizes(data),
        panels=_panels(data),
        times=_band_times(data),
        calibrations=_calibrations(evaluation) if evaluation else [],
        flops=sum(line.flops or 0 for line in data.costs),
        tone=lambda name: Markup(charts.tone(data.shards, name)),
        montage=MONTAGE,
        visible=VISIBLE_LEVELS,
    )


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "uri": data_uri,
        "shared": shared_words,
        "si": charts.si,
        "duration": charts.duration,
        "share": lambda number: f"{100 * number:.1f}%",
    }
    environment.globals |= {"bar": charts.bar, "heat_strip": charts.heat_strip, "trust": _trust}
    return environment


def data_uri(picture: Tensor) -> str:
    """One picture `(channel, height, width)` as a PNG inside the page."""
    buffer = io.BytesIO()
    to_images(picture[None])[0].save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# -- the corpus and the pictures ------------------------------------------------------------------


def _sizes(data: ReportData) -> list[tuple[str, str, float]]:
    """The corpus as parts of a bar: the shards, then the commons."""
    if data.partition is None:
        return []
    views = [*data.partition.shards, *filter(None, [data.partition.commons])]
    return [(view.name, charts.tone(data.shards, view.name), view.records) for view in views]


def _lagoon(data: ReportData) -> list[str]:
    """What the shards make together, for the middle of the emblem: nine pictures of an ensemble."""
    rows = (
        [row for row in data.comparison.rows if row.kind == "ensemble"] if data.comparison else []
    )
    return [data_uri(picture) for picture in rows[0].pictures[:9]] if rows else []


def _groups(data: ReportData) -> list[tuple[Kind, list[PictureRow]]]:
    """The rows of the comparison by kind, in the order in which the kinds build on one another."""
    rows = data.comparison.rows if data.comparison else ()
    grouped = [(kind, [row for row in rows if row.kind == kind]) for kind in get_args(Kind)]
    return [(kind, found) for kind, found in grouped if found]


def shared_words(prompts: Sequence[str]) -> str:
    """The words that all prompts begin with; a column's heading then needs only the rest."""
    words = [prompt.split(" ") for prompt in prompts]
    count = 0
    while len(words) > 1 and all(len(w) > count + 1 and w[count] == words[0][count] for w in words):
        count += 1
    return " ".join(words[0][:count]) if count else ""


# -- training --------------------------------------------------------------------------------------


def _panels(data: ReportData) -> list[tuple[str, Markup, list[Curve]]]:
    """Curves in two charts: what starts from noise, and what starts from the base."""
    islands = [curve for curve in data.curves if curve.name in data.shards]
    others = [curve for curve in data.curves if curve.name not in data.shards]
    start = "The common start" + (" and the control" if len(others) > 1 else "")
    pairs = ((start, others), ("The islands", islands))
    return [(title, charts.curves(lines, data.shards), lines) for title, lines in pairs if lines]


# -- gate ------------------------------------------------------------------------------------------


def _band_times(data: ReportData) -> list[float]:
    heads = data.gate_heads.values()
    return sorted({band.t for head in heads for band in head.calibration.unprompted})


def _trust(band: Band) -> float:
    """How much a head knows at a noise level: 1 - loss / log 2, between 0 and 1."""
    return min(1.0, max(0.0, 1 - band.loss / 0.6931471805599453))


def _calibrations(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Each ensemble's gate: two charts over t, and the table that they are drawn from."""
    return [
        {"name": name, "gate": gate, "charts": _gate_charts(gate), "kinds": _kinds(gate)}
        for name, gate in evaluation.gates.items()
        if gate.prompted
    ]


def _kinds(gate: GateCalibration) -> list[tuple[str, str, list[GateBand]]]:
    return [
        ("with prompt", "var(--sea)", gate.prompted),
        ("without prompt", "var(--ink)", gate.unprompted),
    ]


def _gate_charts(gate: GateCalibration) -> list[tuple[str, Markup]]:
    def line(name: str, colour: str, bands: list[GateBand], what: str) -> charts.Line:
        return name, colour, [(band.t, getattr(band, what)) for band in bands]

    kinds, faint = _kinds(gate), "var(--quiet)"
    losses = [line(*kind, "nll") for kind in kinds]
    losses.append(line("prior", faint, gate.unprompted, "prior_nll"))
    errors = [line(*kind, "calibration_error") for kind in kinds]
    errors.append(line("a perfect gate, by chance", faint, gate.unprompted, "calibration_noise"))
    titles = ("Loss in nats", "Calibration error, debiased")
    return [
        (title, charts.over_t(lines, title))
        for title, lines in zip(titles, (losses, errors), strict=True)
    ]


# -- metrics ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A row of a metrics table, formatted."""

    row: Row
    kid: str
    kid_interval: str
    chart: Markup
    against: str  # "better", "worse", "open" or ""
    frechet: str
    frechet_interval: str
    precision: Estimate
    recall: Estimate


def _table(evaluation: Evaluation, space: str) -> dict[str, Any]:
    """One feature space's figures, the nearest to the reference first."""
    rows = sorted(evaluation.rows, key=lambda row: (row.spaces[space].kid.value, row.name))
    kids = {row.name: row.spaces[space].kid for row in rows}
    # The base alone would set the scale; where it lies beyond, an arrow says so.
    near = [row.name for row in rows if row.kind not in ("base", "expert")] or list(kids)
    scale = charts.span((kids[name].low, kids[name].high) for name in near)
    lines = [
        Line(
            row=row,
            kid=_kilo(kids[row.name].value),
            kid_interval=f"{_kilo(kids[row.name].low)} to {_kilo(kids[row.name].high)}",
            chart=charts.interval(
                kids[row.name].value, kids[row.name].low, kids[row.name].high, scale
            ),
            against=_against(row, space),
            frechet=_figure(row.spaces[space].frechet.value),
            frechet_interval=_range(row.spaces[space].frechet),
            precision=row.spaces[space].precision,
            recall=row.spaces[space].recall,
        )
        for row in rows
    ]
    singular = min(row.n for row in rows) <= evaluation.dimensions[space]
    return {"space": space, "about": evaluation.spaces[space], "lines": lines, "thin": singular}


def _against(row: Row, space: str) -> str:
    difference = row.kid_minus_control.get(space)
    return outcome(difference) if difference else ""


def _kilo(value: float) -> str:
    """KID in thousandths, with a true minus sign."""
    return _figure(1000 * value, places=1)


def _range(estimate: Estimate) -> str:
    return f"{_figure(estimate.low)} to {_figure(estimate.high)}"


def _figure(value: float, *, places: int = 2) -> str:
    """A number with so many decimal places, fewer when it is large."""
    places = places if abs(value) < 100 else 0
    return f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def _shares(data: ReportData) -> list[dict[str, Any]]:
    """A bar per system, the reference's own first."""
    assert data.evaluation is not None
    measured = [row for row in data.evaluation.rows if row.shares is not None]
    if not measured:
        return []
    first = measured[0].shares
    assert first is not None
    lines: list[dict[str, Any]] = [
        {"row": None, "name": "held-out records", "bar": _share_bar(data, first.reference)}
    ]
    for row in measured:
        if row.kind != "real" and row.shares is not None:
            bar = _share_bar(data, row.shares.counts)
            lines.append({"row": row, "name": row.name, "bar": bar, "shares": row.shares})
    return lines


def _share_bar(data: ReportData, counts: dict[str, int]) -> Markup:
    return charts.bar((n, charts.tone(data.shards, n), counts[n]) for n in counts)


# -- removal ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changed:
    """How far each picture of a system moved, in mean levels of 255, and in words."""

    row: RemovalRow
    levels: list[float]

    @property
    def said(self) -> str:
        same = sum(level == 0 for level in self.levels)
        seen = sum(level > VISIBLE_LEVELS for level in self.levels)
        parts = [f"{seen} of {len(self.levels)} pictures changed visibly"]
        if same:
            parts.append(f"{same} not by one bit")
        return ", ".join(parts)


def _removal(row: RemovalRow) -> Changed:
    before, after = to_uint8(row.before).float(), to_uint8(row.after).float()
    return Changed(row, (before - after).abs().flatten(1).mean(dim=1).tolist())
