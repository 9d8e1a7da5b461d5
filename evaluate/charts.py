"""Small charts as inline SVG, drawn in CSS variables so that they follow light and dark mode.

Every function returns markup that is safe to place in the page: numbers are formatted here, text is
escaped. Colours are `var(--s0)`, `var(--s1)`, ... for shards and named tones for the rest.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup, escape
from torch import Tensor

from atoll.evaluate.views import Curve

# (light, dark): apart from one another for most kinds of colour vision, quiet on both grounds.
_PALETTE = (
    ("#0e8f8c", "#3fc7bf"),
    ("#e0603a", "#ff8d6b"),
    ("#4f61d1", "#93a2ff"),
    ("#c78b0a", "#f0bb45"),
    ("#a5418f", "#e286cf"),
    ("#4a8f3c", "#84cf75"),
    ("#2383c9", "#6bb9f5"),
    ("#8c6042", "#cda182"),
)
_GOLDEN = 0.6180339887498949


def palette(count: int) -> list[tuple[str, str]]:
    """A colour for light and one for dark mode for each of `count` shards."""
    return [_PALETTE[i] if i < len(_PALETTE) else _spun(i) for i in range(count)]


def _spun(index: int) -> tuple[str, str]:
    hue = (index * _GOLDEN) % 1
    return _hex(colorsys.hls_to_rgb(hue, 0.40, 0.55)), _hex(colorsys.hls_to_rgb(hue, 0.68, 0.65))


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


def tone(shards: Sequence[str], name: str | None) -> str:
    """The CSS colour of a shard; a neutral one for everything else."""
    return f"var(--s{shards.index(name)})" if name in shards else "var(--quiet)"


def _stroke(shards: Sequence[str], name: str) -> str:
    """A curve's colour: as `tone`, and ink for a control beside the base."""
    return "var(--ink)" if name not in (*shards, "base") else tone(shards, name)


def ring(
    shards: Sequence[str],
    sizes: Mapping[str, int],
    removed: str | None,
    *,
    pictures: Sequence[str] = (),
) -> Markup:
    """The emblem: an arc per shard around a lagoon, as long as it has records, the removed adrift.

    Without sizes all arcs are alike. Nine `pictures` (data URIs) stand in the lagoon.
    """
    size = [max(1, sizes.get(name, 1)) if sizes else 1 for name in shards]
    total, radius = sum(size), 84.0
    gap = min(0.32, 3.0 / len(shards)) if len(shards) > 1 else 0.0
    room = 2 * math.pi - gap * len(shards)
    # Long enough to be seen, however small the shard.
    least = min(0.12, room / (2 * max(1, len(shards))))
    lengths = [least + (room - least * len(shards)) * part / total for part in size]
    arcs, angle = [], -math.pi / 2
    for index, (name, length) in enumerate(zip(shards, lengths, strict=True)):
        middle = angle + length / 2
        adrift = name == removed
        move = f"{14 * math.cos(middle):.1f} {14 * math.sin(middle):.1f}" if adrift else "0 0"
        arcs.append(
            f'<path class="arc{" adrift" if adrift else ""}" style="--c:var(--s{index});'
            f'--i:{index}" transform="translate({move})" d="{_arc(radius, angle, length)}">'
            f"<title>{escape(name)}</title></path>"
        )
        angle += length + gap
    lagoon = '<circle class="lagoon" r="60"/><circle class="lagoon" r="36"/>'
    if len(pictures) == 9:
        lagoon = '<circle class="lagoon" r="62"/>' + "".join(
            f'<image x="{26 * (i % 3) - 38}" y="{26 * (i // 3) - 38}" width="24" height="24" '
            f'href="{escape(uri)}"/>'
            for i, uri in enumerate(pictures)
        )
    return Markup(
        '<svg class="ring" viewBox="-112 -112 224 224" role="img" aria-label="The shards as an '
        f'atoll">{lagoon}{"".join(arcs)}</svg>'
    )


def _arc(radius: float, start: float, length: float) -> str:
    length = min(length, 2 * math.pi - 1e-3)
    ends = [(radius * math.cos(a), radius * math.sin(a)) for a in (start, start + length)]
    (x0, y0), (x1, y1) = ends
    return f"M{x0:.2f} {y0:.2f}A{radius} {radius} 0 {int(length > math.pi)} 1 {x1:.2f} {y1:.2f}"


def bar(parts: Iterable[tuple[str, str, float]]) -> Markup:
    """A stacked bar from (name, CSS colour, amount)."""
    cells = [
        f'<i style="flex-grow:{amount:.4f};background:{escape(colour)}" '
        f'title="{escape(name)}: {amount:,.6g}"></i>'
        for name, colour, amount in parts
        if amount > 0
    ]
    return Markup(f'<span class="bar">{"".join(cells)}</span>')


def interval(value: float, low: float, high: float, span: tuple[float, float]) -> Markup:
    """A dot on its interval, on a scale that a whole column shares; the line at 0 is marked.

    A value beyond the scale is an arrow.
    """

    def x(number: float) -> float:
        return 4 + 152 * (number - span[0]) / ((span[1] - span[0]) or 1.0)

    if value > span[1]:
        return Markup(
            '<svg class="interval" viewBox="0 0 160 18" aria-hidden="true">'
            '<path d="M138 9H155M149 4L155 9L149 14"/></svg>'
        )
    zero = f'<path class="zero" d="M{x(0):.1f} 1V17"/>' if span[0] <= 0 <= span[1] else ""
    return Markup(
        f'<svg class="interval" viewBox="0 0 160 18" aria-hidden="true">{zero}'
        f'<path d="M{x(low):.1f} 9H{min(158.0, x(high)):.1f}"/>'
        f'<circle cx="{x(value):.1f}" cy="9" r="4"/></svg>'
    )


def span(estimates: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """A common scale for a column of intervals."""
    ends = list(estimates)
    low, high = min(min(low for low, _ in ends), 0.0), max(max(high for _, high in ends), 0.0)
    return (low, high) if high > low else (low, low + 1.0)


def heat_strip(trace_times: Sequence[float], weights: Tensor) -> Markup:
    """Gate weights `(step, shard)`: a line per shard, time from noise to data, ink for weight."""
    steps, shards = weights.shape
    cells: list[str] = []
    for shard in range(shards):
        column = [round(min(1.0, max(0.0, w)) * 50) / 50 for w in weights[:, shard].tolist()]
        start = 0
        for step in range(1, steps + 1):
            if step < steps and column[step] == column[start]:
                continue
            if column[start] > 0:
                cells.append(
                    f'<rect x="{start}" y="{shard * 10}" width="{step - start}" height="9" '
                    f'fill="var(--s{shard})" opacity="{column[start]:.2g}"/>'
                )
            start = step
    lines = "".join(
        f'<rect class="ground" x="0" y="{s * 10}" width="{steps}" height="9"/>'
        for s in range(shards)
    )
    ends = f"t = {trace_times[0]:.2g} to {trace_times[-1]:.2g}" if trace_times else ""
    return Markup(
        '<svg class="strip" shape-rendering="crispEdges" preserveAspectRatio="none" role="img" '
        f'viewBox="0 0 {steps} {shards * 10 - 1}" aria-label="Gate weights, {ends}">'
        f"{lines}{''.join(cells)}</svg>"
    )


# -- curves ----------------------------------------------------------------------------------------

_WIDE, _HIGH, _LEFT, _TOP, _BOTTOM = 520, 250, 46, 10, 34
_MOST_POINTS = 160


def curves(lines: Sequence[Curve], shards: Sequence[str]) -> Markup:
    """Losses over images seen: the measured ones faint, a running mean over a tenth on top."""
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return Markup("")
    smooth = [_smooth(line.points) for line in lines]
    right = max(points[-1][0] for points in smooth)
    values = sorted(y for points in smooth for _, y in points)
    low, high = values[0], values[min(len(values) - 1, round(0.985 * len(values)))]
    pad = 0.08 * (high - low) or 0.1
    low, high = low - pad, high + pad

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (_WIDE - _LEFT - 8) * point[0] / right
        y = _TOP + (_HIGH - _TOP - _BOTTOM) * (high - min(point[1], high)) / (high - low)
        return x, max(_TOP, min(_HIGH - _BOTTOM, y))

    paths = [
        f'<path class="{layer}" style="--c:{_stroke(shards, line.name)}" '
        f'd="{_path([place(p) for p in points])}"><title>{escape(line.name)}</title></path>'
        for layer, sets in (("raw", [_thin(line.points) for line in lines]), ("mean", smooth))
        for line, points in zip(lines, sets, strict=True)
    ]
    return Markup(
        f'<svg class="curves" viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="Training loss">'
        f"{_axes(low, high, right, place)}{''.join(paths)}</svg>"
    )


Line = tuple[str, str, Sequence[tuple[float, float]]]
"""A name, a CSS colour, and points of t and a value from 0 up."""


def over_t(lines: Sequence[Line], label: str) -> Markup:
    """Lines over t from 0, data, to 1, noise."""
    high = 1.08 * max(y for _, _, points in lines for _, y in points) or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (_WIDE - _LEFT - 8) * point[0]
        return x, _TOP + (_HIGH - _TOP - _BOTTOM) * (1 - point[1] / high)

    paths = [
        f'<path class="mean" style="--c:{escape(colour)}" d="{_path([place(p) for p in points])}">'
        f"<title>{escape(name)}</title></path>"
        for name, colour, points in lines
    ]
    return Markup(
        f'<svg class="curves" viewBox="0 0 {_WIDE} {_HIGH}" role="img" '
        f'aria-label="{escape(label)}">{_axes(0, high, 1, place)}{"".join(paths)}</svg>'
    )


def _axes(low: float, high: float, right: float, place: object) -> str:
    assert callable(place)
    parts = []
    for y in _ticks(low, high, 4):
        _, at = place((0, y))
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDE - 8}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for x in _ticks(0, right, 4):
        at, _ = place((x, low))
        parts.append(
            f'<text x="{at:.1f}" y="{_HIGH - 12}" text-anchor="middle">{escape(si(x))}</text>'
        )
    return "".join(parts)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers inside a span."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    reach = max(1, len(points) // 20)
    means = []
    for i in range(len(points)):
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        means.append((float(points[i][0]), sum(near) / len(near)))
    return _thin(means)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = max(1, math.ceil(len(points) / _MOST_POINTS))
    return [*points[:-1:every], points[-1]]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


# -- numbers in words ------------------------------------------------------------------------------


def si(number: float | None) -> str:
    """1234567 as 1.23 M; a dash for what was not measured."""
    if number is None:
        return "–"
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.3g} {letter}"
    return f"{number:.3g}" if number != int(number) else f"{int(number)}"


def duration(seconds: float | None) -> str:
    """Seconds as 4 min 12 s; a dash for what was not measured."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
