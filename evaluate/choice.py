"""Which routing `auto` is: the cheapest of those that an ensemble's own evaluation found good."""

from __future__ import annotations

from collections.abc import Sequence

from atoll.evaluate.evaluation import Chosen, Evaluation, Row
from atoll.evaluate.features import ENCODER

# How much further from the real shares of shards than noise a routing may be (total variation).
SHARE_MARGIN = 0.05


def choose_routing(evaluation: Evaluation, ensemble: str, ensemble_sha256: str) -> Chosen | None:
    """The routing of an ensemble with the fewest passes; None where none was evaluated.

    Only those are asked whose shares of shards are right, or else the one whose shares are nearest,
    and whose KID in the encoder's space cannot be told from the least. Where its gate is not to be
    trusted it is what the gate's calibration recommends, whether that was measured or not.
    """
    rows = [row for row in evaluation.rows if row.ensemble == ensemble]
    if not rows:
        return None
    gate = evaluation.gates.get(ensemble)
    if gate is not None and gate.recommended is not None:
        why = "its gate is not to be trusted on the way"
        return Chosen(routing=gate.recommended, why=why, ensemble_sha256=ensemble_sha256)
    fair = [row for row in rows if _excess(row) <= SHARE_MARGIN]
    asked = fair or [min(rows, key=_excess)]
    best = min(asked, key=lambda row: row.spaces[ENCODER].kid.value)
    near = best.spaces[ENCODER].kid.high
    good = [row for row in asked if row.spaces[ENCODER].kid.low <= near]
    taken = min(
        good,
        key=lambda row: (row.passes_per_picture or 0.0, _truncates(row), asked.index(row)),
    )
    assert taken.routing is not None
    why = _why(rows, fair, good, taken)
    return Chosen(routing=taken.routing, why=why, ensemble_sha256=ensemble_sha256)


def _truncates(row: Row) -> bool:
    """Whether a routing leaves experts out that have weight: another law than the ensemble's."""
    return any(kind in (row.routing or "") for kind in ("top-k", "mass", "threshold"))


def _excess(row: Row) -> float:
    return 0.0 if row.shares is None else row.shares.distance.value - row.shares.noise_level


def _why(rows: Sequence[Row], fair: Sequence[Row], good: Sequence[Row], taken: Row) -> str:
    said = [f"of {len(rows)} routings"]
    if not fair:
        said.append(
            f"none has shares of shards within {SHARE_MARGIN} of the real ones; of this they are "
            "nearest"
        )
    elif len(fair) < len(rows):
        unfair = ", ".join(str(row.routing) for row in rows if row not in fair)
        said.append(f"{unfair} starved shards")
    if len(good) < len(fair):
        said.append("others were further from real records by KID")
    said.append(f"this one takes {taken.passes_per_picture or 0:.3g} passes a picture")
    return "; ".join(said)
