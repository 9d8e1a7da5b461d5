"""A trajectory's trace as files: every gate weight as JSON, and a heat strip as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from atoll.router.ensemble import TraceStep


def trace_json(trace: Sequence[TraceStep], shards: Sequence[str]) -> dict[str, Any]:
    """Per step the time, and per picture the gate's weights and the weights it was run with."""
    return {
        "schema_version": 1,
        "shards": list(shards),
        "steps": [
            {
                "t": step.t,
                "gate_weights": _rounded(step.gate_weights),
                "weights": _rounded(step.weights),
                "experts_run": step.experts_run,
            }
            for step in trace
        ],
    }


def _rounded(weights: Tensor) -> list[list[float]]:
    return [[round(float(value), 6) for value in row] for row in weights]


def strip_png(
    trace: Sequence[TraceStep], shards: Sequence[str], prompts: Sequence[str], *, most: int = 16
) -> bytes:
    """PNG bytes: one strip a picture, a row a shard, noise on the left and data on the right."""
    count = min(len(prompts), most)
    figure = Figure(figsize=(8, 0.5 + count * (0.35 + 0.22 * len(shards))), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for number, axis in enumerate(axes):
        weights = torch.stack([step.gate_weights[number] for step in trace], dim=1)
        axis.imshow(weights.numpy(), aspect="auto", cmap="magma", vmin=0, vmax=1)
        axis.set_yticks(range(len(shards)), shards, fontsize=7, parse_math=False)
        axis.set_xticks([])
        axis.set_title(_title(prompts[number]), fontsize=8, loc="left", parse_math=False)
    axes[-1].set_xlabel("noise  →  data", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _title(prompt: str, *, most: int = 100) -> str:
    """One line that any prompt fits on: a font knows no control characters or half surrogates."""
    line = "".join(sign if sign.isprintable() else " " for sign in prompt).strip()
    return (line if len(line) <= most else f"{line[: most - 1]}…") or "(no prompt)"
