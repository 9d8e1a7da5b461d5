"""One evaluation from end to end with systems and an encoder made up on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atoll.core import seeds
from atoll.core.errors import DataError, Failed, Refused
from atoll.core.storage import Storage
from atoll.evaluate import evaluation as ev
from atoll.evaluate.features import embed, pixels, spaces, to_images, to_uint8
from atoll.evaluate.metrics import proportion
from atoll.evaluate.reader import Reading
from atoll.evaluate.reference import Records
from atoll.evaluate.shares import from_records
from atoll.evaluate.verdict import verdict
from atoll.router.chooser import sample_settings, x_noise


class FlatEncoder:
    """Unit vectors of the pixels, moved off the origin so that none is 0."""

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        rows = np.stack([np.asarray(image, dtype=np.float32).ravel() for image in images])
        return torch.nn.functional.normalize(torch.from_numpy(rows / 255 - 0.4), dim=1)


def pictures(count: int, *, first: int = 0) -> Records:
    """Two kinds of pictures, left-bright and right-bright, on noise."""
    x = seeds.normal(1, "pictures", first=first, count=count, shape=(1, 4, 4)) * 0.25
    kind = [(first + i) % 2 for i in range(count)]
    for i, side in enumerate(kind):
        x[i, :, :, 2 * side : 2 * side + 2] += 0.7
        x[i, :, :, 2 - 2 * side : 4 - 2 * side] -= 0.7
    words = [("left", "right")[side] for side in kind]
    return Records(to_uint8(x), tuple(f"a {w} one" for w in words), tuple(words), tuple(words))


def system(name: str, spoil: float, kind: ev.Kind = "ensemble") -> ev.System:
    """Draws what was asked for and spoils it by some of its noise."""

    def sample(request: ev.Request) -> ev.Sampled:
        x = request.x_noise * (0.25 + spoil)
        for i, prompt in enumerate(request.prompts):
            side = int("right" in prompt)
            x[i, :, :, 2 * side : 2 * side + 2] += 0.7
            x[i, :, :, 2 - 2 * side : 4 - 2 * side] -= 0.7
        return ev.Sampled(x, experts_per_step=2.0 if name == "full" else 1.0)

    return ev.System(name, kind, sample, steps=5, about="made up")


def run(*systems: ev.System, control: str | None = "monolith", count: int = 60) -> ev.Evaluation:
    encoder = FlatEncoder()
    train = pictures(40, first=500)
    sides = {s: [i for i, x in enumerate(train.shards) if x == s] for s in ("left", "right")}
    instrument = from_records(
        {side: embed(encoder, train.take(rows).pictures) for side, rows in sides.items()}
    )
    return ev.evaluate_systems(
        systems,
        pictures(50),
        encoder,
        seed=0,
        count=count,
        instrument=instrument,
        real=pictures(80, first=200),
        control=control,
        batch=25,
    )


@pytest.fixture(scope="module")
def measured() -> ev.Evaluation:
    return run(
        system("full", 0.0),
        system("once", 0.5),
        system("soup", 1.0, "soup"),
        system("monolith", 0.3, "control"),
    )


def test_every_row_has_two_spaces_n_and_what_it_cost(measured: ev.Evaluation) -> None:
    assert [row.name for row in measured.rows] == [
        "real records", "full", "once", "soup", "monolith"
    ]  # fmt: skip
    for row in measured.rows:
        assert set(row.spaces) == {"encoder", "pixels"}
        assert row.n == 60
        assert row.shares is not None
        assert row.shares.distance.n_reference == 50
    full = measured.rows[1]
    assert (full.experts_per_step, full.steps, full.passes_per_picture) == (2, 5, 10)
    assert measured.rows[0].passes_per_picture is None
    assert measured.dimensions == {"encoder": 16, "pixels": 16}


def test_a_perfect_system_is_not_better_than_real_records(measured: ev.Evaluation) -> None:
    """Prompts drawn from the reference itself would make KID negative; they come from `real`."""
    rows = {row.name: row for row in measured.rows}
    for name in ("real records", "full"):
        kid = rows[name].spaces["pixels"].kid
        assert kid.low <= 0 <= kid.high


def test_shares_are_among_the_shards_that_a_system_models() -> None:
    """Neither the commons' contents nor those of a shard that is missing are due from it."""
    others = Records(
        pictures(30, first=900).pictures, ("a left one",) * 30, (None,) * 30, ("commons",) * 30
    )
    encoder = FlatEncoder()
    train = pictures(40, first=500)
    sides = {s: [i for i, x in enumerate(train.shards) if x == s] for s in ("left", "right")}
    instrument = from_records(
        {side: embed(encoder, train.take(rows).pictures) for side, rows in sides.items()}
    )
    whole = pictures(50)
    both = Records(
        torch.cat([whole.pictures, others.pictures]),
        whole.captions + others.captions,
        whole.labels + others.labels,
        whole.shards + others.shards,
    )
    systems = [
        replace(system("all", 0.0), shards=("left", "right")),
        replace(system("one", 0.0), shards=("right",)),
        replace(system("with base", 0.0), shards=("left", "right", "commons")),
        replace(system("of another run", 0.0), shards=("x",)),
    ]
    found = ev.evaluate_systems(
        systems, both, encoder, seed=0, count=40, instrument=instrument, real=both,
    )  # fmt: skip
    rows = {row.name: row.shares for row in found.rows}
    for name in ("real records", "all"):
        assert rows[name] is not None
        assert rows[name].reference == {"left": 25, "right": 25}
        assert rows[name].distance.n < 40
    assert rows["one"].reference == {"left": 0, "right": 25}
    assert rows["one"].counts["left"] == 0
    assert rows["one"].distance.value == 0
    assert rows["with base"].distance.n_reference == 80
    assert rows["of another run"] is None


def test_better_systems_score_better_and_the_pairs_say_so(measured: ev.Evaluation) -> None:
    kid = {row.name: row.spaces["pixels"].kid.value for row in measured.rows}
    assert kid["full"] < kid["monolith"] < kid["once"] < kid["soup"]
    rows = {row.name: row for row in measured.rows}
    assert rows["full"].kid_minus_control["pixels"].high < 0
    assert rows["soup"].kid_minus_control["pixels"].low > 0
    assert not rows["monolith"].kid_minus_control
    assert not rows["real records"].kid_minus_control


def test_labels_are_read_and_the_reader_is_read_too(measured: ev.Evaluation) -> None:
    assert measured.reader is not None
    assert measured.reader.value == 1
    reading = measured.rows[1].reading
    assert reading is not None
    assert reading.accuracy.value == 1


def test_evaluation_is_the_same_again_and_independent_of_batches(measured: ev.Evaluation) -> None:
    systems = [system("full", 0.0), system("monolith", 0.3, "control")]
    again = run(*systems)
    assert again.rows[1] == measured.rows[1]
    assert again.rows[2] == measured.rows[4]


def test_every_system_gets_the_same_noise_and_prompts_by_position() -> None:
    seen: dict[str, list[tuple[int, tuple[str, ...], Tensor]]] = {"a": [], "b": []}

    def spy(name: str) -> ev.System:
        def sample(request: ev.Request) -> ev.Sampled:
            seen[name].append((request.first, request.prompts, request.x_noise.clone()))
            return ev.Sampled(request.x_noise)

        return ev.System(name, "ensemble", sample, steps=1)

    run(spy("a"), spy("b"), control=None, count=30)
    assert [(f, p) for f, p, _ in seen["a"]] == [(f, p) for f, p, _ in seen["b"]]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(seen["a"], seen["b"], strict=True))
    whole = ev.noise(0, (1, 4, 4), first=0, count=30)
    assert torch.equal(torch.cat([x for _, _, x in seen["a"]]), whole)


def test_noise_is_what_the_pipeline_draws() -> None:
    mine = ev.noise(7, (1, 4, 4), first=3, count=2)
    settings = sample_settings(2, [], seed=7, first=3)
    assert torch.equal(mine, x_noise(settings, (1, 4, 4)))


def test_metrics_json_round_trips_and_refuses_other_versions(
    measured: ev.Evaluation, tmp_path: object
) -> None:
    run_storage = Storage(str(tmp_path))
    measured.save(run_storage)
    assert ev.Evaluation.load(run_storage) == measured
    values = run_storage.read_json(ev.METRICS_NAME)
    run_storage.write_json(ev.METRICS_NAME, {**values, "schema_version": 99})
    with pytest.raises(Refused):
        ev.Evaluation.load(run_storage)
    run_storage.write_json(ev.METRICS_NAME, {**values, "rows": 3})
    with pytest.raises(Refused, match="damaged"):
        ev.Evaluation.load(run_storage)


def test_verdict_says_who_won_also_when_it_is_the_control(measured: ev.Evaluation) -> None:
    said = " ".join(verdict(measured))
    assert "“full” comes nearer to real records than the monolith" in said
    assert "the soup stay further" in said.lower() or "the soup stays further" in said.lower()
    lost = " ".join(verdict(run(system("full", 1.0), system("monolith", 0.0, "control"))))
    assert "the monolith makes the better pictures" in lost
    assert "gained" not in lost


@pytest.mark.parametrize(("low", "told"), [(-0.001, False), (0.001, True)])
def test_verdict_calls_nothing_real_whose_interval_leaves_0_out(
    measured: ev.Evaluation, low: float, told: bool
) -> None:
    bounds = {"full": (low, 1.0), "real records": (-0.01, 0.01)}

    def moved(row: ev.Row) -> ev.Row:
        if row.name not in bounds:
            return row
        quality, (least, most) = row.spaces["encoder"], bounds[row.name]
        kid = quality.kid.model_copy(update={"low": least, "high": most})
        spaces = {**row.spaces, "encoder": quality.model_copy(update={"kid": kid})}
        return row.model_copy(update={"spaces": spaces})

    changed = [moved(row) for row in measured.rows]
    said = verdict(measured.model_copy(update={"rows": changed}))
    (floor,) = [
        line for line in said if "from real records by KID" in line or "tells every" in line
    ]
    assert ("“full”" in floor) == (not told)


def test_verdict_names_the_shard_that_is_starved() -> None:
    def only_left(request: ev.Request) -> ev.Sampled:
        again = ev.Request(("a left one",) * len(request.prompts), request.x_noise, 0, 0)
        return system("full", 0.0).sample(again)

    found = run(ev.System("top-k:1", "ensemble", only_left, steps=5), control=None)
    assert "right gets 0% of the pictures instead of 50%" in " ".join(verdict(found))


def test_verdict_names_shards_that_their_centres_do_not_know(measured: ev.Evaluation) -> None:
    assert measured.own.keys() == {"left", "right"}
    assert min(measured.own.values()) > 0.5
    assert "to be read with care" not in " ".join(verdict(measured))

    def said(**own: float) -> str:
        return " ".join(verdict(measured.model_copy(update={"own": own})))

    assert "of left's own held-out records only 13% are nearest to its centre." in said(
        left=0.13, right=0.5
    )
    assert "of right's own held-out records only 20% are nearest to its centre (left: not half" in (
        said(left=0.3, right=0.2)
    )


def test_verdict_names_two_systems_that_are_read_alike(measured: ev.Evaluation) -> None:
    alike = Reading(accuracy=proportion(5, 50), by_label={"x": (5, 50)})
    rows = [row.model_copy(update={"reading": alike}) for row in measured.rows[1:3]]

    def said(rows: Sequence[ev.Row]) -> str:
        update = {"rows": rows, "reader": proportion(39, 40), "control": None}
        found = verdict(measured.model_copy(update=update))
        return next(line for line in found if line.startswith("What was asked for"))

    reader = "; the reader itself is right about 98% of real records."
    one = "What was asked for is read in 10% of the pictures of “full”"
    assert said(rows) == f"{one} and in 10% of “once”{reader}"
    assert said(rows[:1]) == f"{one}{reader}"


def test_pictures_that_are_not_finite_are_not_scored() -> None:
    def broken(request: ev.Request) -> ev.Sampled:
        return ev.Sampled(request.x_noise * float("nan"))

    with pytest.raises(Failed, match="not finite"):
        run(ev.System("broken", "ensemble", broken, steps=1), control=None)


def test_names_and_the_control_are_checked_before_anything_is_sampled() -> None:
    with pytest.raises(DataError, match="one name"):
        run(system("full", 0.0), system("full", 0.1), control=None)
    with pytest.raises(DataError, match="control"):
        run(system("full", 0.0), control="nobody")


def test_a_system_must_return_a_picture_a_prompt() -> None:
    short = ev.System("short", "base", lambda r: ev.Sampled(r.x_noise[:1]), steps=1)
    with pytest.raises(ValueError, match="one picture a prompt"):
        run(short, control=None)


def test_uint8_and_x_data_of_one_picture_have_the_same_features() -> None:
    raw = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4) * 5
    assert torch.equal(to_uint8(raw.float() / 127.5 - 1), raw)
    assert torch.equal(pixels(raw), pixels(raw.float() / 127.5 - 1))
    assert to_images(raw)[0].mode == "RGB"
    assert to_images(raw[:, :1])[0].mode == "L"
    lengths = embed(FlatEncoder(), raw).norm(dim=1)
    assert lengths.item() == pytest.approx(48**0.5, rel=1e-5)
    assert [space.name for space in spaces(FlatEncoder())] == ["encoder", "pixels"]
