"""A trajectory's trace as files: weights and experts as JSON, heat strips and previews as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from atoll.router.ensemble import TraceStep
from atoll.router.pipeline import to_pil

Decode = Callable[[Tensor], Tensor]
"""x_data `(batch, ...)` -> pixels in [-1, 1] `(batch, channel, height, width)`."""

_WIDTH, _LEFT, _ROW, _TITLE = 8.0, 1.5, 0.2, 0.35  # inches
_PREVIEWS = 10  # at most, over a strip
_LONGEST = 22  # signs of a shard's name


def trace_json(
    trace: Sequence[TraceStep], shards: Sequence[str], previews: Sequence[str]
) -> dict[str, Any]:
    """Per step the time, and per picture the gate's weights and the weights it was run with.

    Those of guidance's null branch besides, 0 for pictures without guidance.
    `previews` are the files that show where each step's velocity points to.
    """
    return {
        "schema_version": 1,
        "shards": list(shards),
        "steps": [
            {
                "t": step.t,
                "gate_weights": _rounded(step.gate_weights),
                "weights": _rounded(step.weights),
                "null_gate_weights": _rounded(step.null_gate_weights),
                "null_weights": _rounded(step.null_weights),
                "experts_run": step.experts_run,
                "x_data": preview,
            }
            for step, preview in zip(trace, previews, strict=True)
        ],
    }


def _rounded(weights: Tensor) -> list[list[float]]:
    return [[round(float(value), 6) for value in row] for row in weights]


def preview_png(step: TraceStep, decode: Decode) -> bytes:
    """PNG bytes: the x_data of a whole batch at one step, side by side."""
    buffer = io.BytesIO()
    to_pil(torch.cat(list(decode(step.x_data)), dim=-1)[None])[0].save(buffer, format="PNG")
    return buffer.getvalue()


def strip_png(
    trace: Sequence[TraceStep],
    shards: Sequence[str],
    prompts: Sequence[str],
    decode: Decode,
    *,
    most: int = 16,
) -> bytes:
    """PNG bytes: for each picture what its x_data was on the way, over a strip of gate weights.

    A row is a shard, noise is on the left and data on the right; a dot marks an expert that was
    run. The last of the pictures is the one that was made.
    """
    count = min(len(prompts), most)
    shown = sorted({round(i) for i in torch.linspace(0, len(trace) - 1, _PREVIEWS).tolist()})
    pictures = torch.stack([decode(trace[step].x_data[:count]) for step in shown], dim=1)
    wide = (_WIDTH - _LEFT - 0.1) / len(trace)  # inches of a step
    side = min(len(trace) * wide / len(shown) * 0.94, 0.7)
    tall = side * pictures.shape[-2] / pictures.shape[-1]
    each = _TITLE + tall + 0.05 + _ROW * len(shards)
    height = count * each + 0.3
    figure = Figure(figsize=(_WIDTH, height))
    for number in range(count):
        low = height - (number + 1) * each
        place = (_LEFT / _WIDTH, low / height, len(trace) * wide / _WIDTH, (each - _TITLE) / height)
        axes = figure.add_axes(place, xlim=(0, len(trace)), ylim=((each - _TITLE) / _ROW, 0))
        _over(axes, pictures[number], shown, side / wide, tall / _ROW)
        _strip(axes, trace, number, (tall + 0.05) / _ROW)
        names = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in shards]
        centres = [(tall + 0.05) / _ROW + 0.5 + k for k in range(len(shards))]
        axes.set_yticks(centres, names, fontsize=7, parse_math=False)
        axes.set_xticks([])
        axes.set_frame_on(False)
        axes.set_title(_title(prompts[number]), fontsize=8, loc="left", parse_math=False)
    axes.set_xlabel("noise  →  data", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _over(axes: Axes, pictures: Tensor, steps: Sequence[int], wide: float, tall: float) -> None:
    """Pictures of some steps at the top, each over the middle of its share of the way."""
    share = axes.get_xlim()[1] / len(steps)
    for place, picture in enumerate(to_pil(pictures)):
        left = (place + 0.5) * share - wide / 2
        extent = (left, left + wide, tall, 0)
        axes.imshow(picture, extent=extent, aspect="auto", cmap="gray", vmin=0, vmax=255)


def _strip(axes: Axes, trace: Sequence[TraceStep], number: int, top: float) -> None:
    """The gate's weights of one picture from `top` downwards, and dots at the experts that ran."""
    weights = torch.stack([step.gate_weights[number] for step in trace], dim=1)
    extent = (0, len(trace), top + len(weights), top)
    axes.imshow(
        weights.numpy(), extent=extent, aspect="auto", cmap="magma", vmin=0, vmax=1,
        interpolation="nearest",
    )  # fmt: skip
    run = torch.stack([step.weights[number] for step in trace], dim=1).nonzero()
    axes.scatter(run[:, 1] + 0.5, run[:, 0] + top + 0.5, s=6, color="deepskyblue", linewidths=0)
    axes.set(xlim=(0, len(trace)), ylim=(top + len(weights), 0))


def _title(prompt: str, *, most: int = 100) -> str:
    """One line that any prompt fits on: a font knows no control characters or half surrogates."""
    line = "".join(sign if sign.isprintable() else " " for sign in prompt).strip()
    return (line if len(line) <= most else f"{line[: most - 1]}…") or "(no prompt)"
