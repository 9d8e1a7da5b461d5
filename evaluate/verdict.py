"""What the numbers say, in plain words and computed from them, also when the control wins.

Each sentence follows from intervals in `metrics.json`; where they cover 0 it says that nothing can
be told. No sentence is written by hand for a particular run.
"""

from __future__ import annotations

from collections.abc import Sequence

from atoll.evaluate.evaluation import Evaluation, Row
from atoll.evaluate.features import ENCODER
from atoll.evaluate.metrics import Estimate

_KNOWN = 0.5  # of a shard's records, what must be nearest to its centre
_STANDS = {
    "better": ("comes nearer to", "come nearer to"),
    "worse": ("stays further from", "stay further from"),
}


def verdict(evaluation: Evaluation) -> list[str]:
    """Sentences, the most important first."""
    parts = (
        _against_control, _between_spaces, _soup, _starved, _blind, _auto, _read, _floor, _caution,
    )  # fmt: skip
    said = [sentence for part in parts for sentence in part(evaluation)]
    return [sentence[0].upper() + sentence[1:] for sentence in said]


def outcome(difference: Estimate) -> str:
    """Where a difference of KID lies: "better", "worse" or "open"."""
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "open"


def _of(evaluation: Evaluation, *kinds: str) -> list[Row]:
    return [row for row in evaluation.rows if row.kind in kinds]


def _compared(evaluation: Evaluation, space: str) -> dict[str, list[Row]]:
    """Ensembles and soups by how they stand against the control."""
    found: dict[str, list[Row]] = {"better": [], "worse": [], "open": []}
    for row in _of(evaluation, "ensemble", "soup"):
        if space in row.kid_minus_control:
            found[outcome(row.kid_minus_control[space])].append(row)
    return found


def _against_control(evaluation: Evaluation) -> list[str]:
    found = _compared(evaluation, ENCODER)
    control = next((row for row in evaluation.rows if row.name == evaluation.control), None)
    if control is None or not any(found.values()):
        return []
    said = [
        f"{_names(found[how])} {words[len(found[how]) > 1]} real records than the {control.name}"
        for how, words in _STANDS.items()
        if found[how]
    ]
    if found["open"]:
        said.append(f"{_names(found['open'])} cannot be told apart from the {control.name}")
    about = f" ({control.about})" if control.about else ""
    return [
        f"Measured by KID in the encoder's space, {'; '.join(said)}{about}.",
        *_price(evaluation, control.name),
    ]


def _price(evaluation: Evaluation, control: str) -> list[str]:
    """What dividing the corpus cost, judged by the ensembles."""
    found = {
        how: [row for row in rows if row.kind == "ensemble"]
        for how, rows in _compared(evaluation, ENCODER).items()
    }
    if found["better"]:
        return ["At this budget dividing the corpus gained quality, with the right routing."]
    if found["open"]:
        return [
            f"At this budget dividing the corpus cost no quality that {evaluation.n} pictures "
            "can show, with the right routing."
        ]
    if found["worse"]:
        return [
            f"At this budget the {control} makes the better pictures. What dividing the corpus "
            "bought is isolation and exact removal, and this is its price."
        ]
    return []


def _between_spaces(evaluation: Evaluation) -> list[str]:
    """Systems that another feature space ranks otherwise against the control."""
    here = _compared(evaluation, ENCODER)
    said = []
    for space in evaluation.spaces:
        there = _compared(evaluation, space)
        for how, words in _STANDS.items():
            rows = [row for row in there[how] if row not in here[how]]
            if rows:
                said.append(f"{_names(rows)} {words[len(rows) > 1]} real records in {space}")
    if not said:
        return []
    return [
        f"The feature spaces do not agree: {'; '.join(said)}. Neither ranking should be quoted "
        "without the other."
    ]


def _soup(evaluation: Evaluation) -> list[str]:
    soup = next(iter(_of(evaluation, "soup")), None)
    full = next((row for row in _of(evaluation, "ensemble") if row.name == "full"), None)
    if soup is None or full is None:
        return []
    mine, theirs = soup.spaces[ENCODER].kid, full.spaces[ENCODER].kid
    if not _apart(mine, theirs):
        stand = "cannot be told apart from it"
    elif mine.value < theirs.value:
        stand = "still comes nearer to real records"
    else:
        stand = "stays further from real records"
    return [
        f"The {soup.name} runs one network a step where {_quoted(full)} runs "
        f"{full.experts_per_step or 1:.2g}, and {stand}."
    ]


def _starved(evaluation: Evaluation) -> list[str]:
    """Systems whose shares of shards are off by more than their interval and the noise allow."""
    worst: tuple[float, Row] | None = None
    for row in _of(evaluation, "ensemble", "soup", "control"):
        if row.shares is None or row.shares.distance.low <= row.shares.noise_level:
            continue
        if worst is None or row.shares.distance.value > worst[0]:
            worst = (row.shares.distance.value, row)
    if worst is None:
        measured = any(row.shares for row in _of(evaluation, "ensemble"))
        return ["No system's shares of shards differ from the real ones beyond noise."] * measured
    distance, row = worst
    assert row.shares is not None
    mine, real = row.shares.counts, row.shares.reference
    share = {name: count / sum(mine.values()) for name, count in mine.items()}
    wanted = {name: count / sum(real.values()) for name, count in real.items()}
    starved = min(share, key=lambda name: share[name] - wanted[name])
    return [
        f"The shares of shards are furthest off for {_quoted(row)} "
        f"(total variation {distance:.2f}, noise {row.shares.noise_level:.2f}): "
        f"{starved} gets {share[starved]:.0%} of the pictures instead of {wanted[starved]:.0%}."
    ]


def _blind(evaluation: Evaluation) -> list[str]:
    """Shards whose one centre is too little for what they hold, so that shares say little."""
    unknown = sorted((part, name) for name, part in evaluation.own.items() if part < _KNOWN)
    if not unknown:
        return []
    (part, name), *others = unknown
    more = f" ({', '.join(name for _, name in others)}: not half either)" if others else ""
    return [
        f"Shares of shards are to be read with care: of {name}'s own held-out records only "
        f"{part:.0%} are nearest to its centre{more}."
    ]


def _auto(evaluation: Evaluation) -> list[str]:
    auto = evaluation.auto
    if auto is None:
        return []
    return [f"The routing {_marked('auto')} is {_marked(auto.routing)} from now on: {auto.why}."]


def _read(evaluation: Evaluation) -> list[str]:
    read = [
        (row.reading.accuracy.value, row)
        for row in _of(evaluation, "ensemble", "soup", "control")
        if row.reading
    ]
    if not read or evaluation.reader is None:
        return []
    best, *others = sorted(read, key=lambda each: -each[0])
    told = f"What was asked for is read in {best[0]:.0%} of the pictures of {_quoted(best[1])}"
    if others:
        told += f" and in {others[-1][0]:.0%} of {_quoted(others[-1][1])}"
    own = evaluation.reader.value
    return [f"{told}; the reader itself is right about {own:.0%} of real records."]


def _floor(evaluation: Evaluation) -> list[str]:
    real = _of(evaluation, "real")
    if not real:
        return []
    floor = real[0].spaces[ENCODER].kid
    reached = [
        row
        for row in _of(evaluation, "ensemble", "soup", "control")
        # KID is 0 between equal laws, and no nearer to it than real records come at this N.
        if (kid := row.spaces[ENCODER].kid).low <= 0 and not _apart(kid, floor)
    ]
    if reached:
        return [f"{_names(reached)} cannot be told from real records by KID at this N."]
    return ["KID tells every system from real records: there is room above all of them."]


def _caution(evaluation: Evaluation) -> list[str]:
    return [
        f"All figures are of this run alone: one seed, {evaluation.n} pictures a system, "
        f"{evaluation.n_reference} {evaluation.reference}. Intervals are 95% each, not jointly."
    ]


def _apart(a: Estimate, b: Estimate) -> bool:
    return a.high < b.low or b.high < a.low


def _names(rows: Sequence[Row]) -> str:
    names = [_quoted(row) for row in rows]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _quoted(row: Row) -> str:
    """Routings in quotation marks, since their names are words; others with their article."""
    return _marked(row.name) if row.kind == "ensemble" else f"the {row.name}"


def _marked(text: str) -> str:
    return f"\N{LEFT DOUBLE QUOTATION MARK}{text}\N{RIGHT DOUBLE QUOTATION MARK}"
