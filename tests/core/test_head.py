"""The gate head: 0 at the start, calibration by hand, text alone at t = 1, refusals on loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core import seeds
from atoll.core.conditioning import Conditioning
from atoll.core.errors import ExitCode, Refused
from atoll.core.head import Band, GateHead, HeadCalibration, HeadConfig, new_head
from atoll.core.trunk import Trunk, TrunkConfig, new_trunk

MakeCond = Callable[..., Conditioning]
N = 5


SHAPE = TrunkConfig(channels=1, pooled=8, width=8, stride=1, labels={"x": 30, "y": 10, "z": 5})


def trunk() -> Trunk:
    """With weights that say something."""
    made = new_trunk(SHAPE, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made.eval().requires_grad_(False)


TRUNK = trunk()


def config(*, bands: list[Band] | None = None, **calibration: Any) -> HeadConfig:
    both = {} if bands is None else {"prompted": bands, "unprompted": bands}
    told = HeadCalibration(**both, **calibration)
    return HeadConfig(shard="s0", trunk_sha256="0" * 64, calibration=told)


def band(t: float, slope: float, intercept: float) -> Band:
    return Band(t=t, slope=slope, intercept=intercept, loss=0.5, overlap=0.5, mean_ratio=1)


def head(**changes: Any) -> GateHead:
    """With weights that say something."""
    made = new_head(config(**changes), TRUNK)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def x_t(n: int = N) -> Tensor:
    return seeds.normal(0, "x", first=0, count=n, shape=(1, 8, 8))


def f_of(made: GateHead, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return made(TRUNK.features(x, t, cond), t, cond)


def raw_of(made: GateHead, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return made.raw(TRUNK.features(x, t, cond), made.text(cond))


def null(cond: Conditioning) -> Conditioning:
    return replace(cond, is_null=torch.ones_like(cond.is_null))


def at(t: float, n: int = N) -> Tensor:
    return torch.full((n,), t)


@torch.no_grad()
def test_new_head_of_an_unknown_shard_says_0_everywhere(cond: MakeCond) -> None:
    made = new_head(config(), TRUNK)
    for t in (0.0, 0.3, 0.999, 1.0):
        assert torch.equal(f_of(made, x_t(), at(t), cond(N)), torch.zeros(N))


@torch.no_grad()
def test_new_head_says_what_the_trunk_knows_of_a_mixture_of_labels(cond: MakeCond) -> None:
    """f = log sum_l w_l p(l | x_t) / pi_l, from the picture, the text and both, one by one."""
    shares = torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64)
    made, c = new_head(config(), TRUNK, shares.log()), cond(N)
    tilt = shares / torch.tensor([30, 10, 5]).double() * 45
    for t in (0.1, 0.8):
        p = TRUNK.logits(x_t(), at(t), null(c)).double().softmax(dim=1)
        torch.testing.assert_close(f_of(made, x_t(), at(t), null(c)).double(), (p @ tilt).log())
        p = TRUNK.upper(TRUNK.features(x_t(), at(t), c)).double().softmax(dim=1)
        f = (p @ tilt).log() + made.text(c)
        torch.testing.assert_close(f_of(made, x_t(), at(t), c).double(), f)
    p = TRUNK.text_logits(c).double().softmax(dim=1)
    torch.testing.assert_close(made.raw_text(c).double(), (p @ tilt).log())
    assert made.text(c)[0] == 0


def test_new_head_can_learn_in_all_its_parts(cond: MakeCond) -> None:
    made = new_head(config(), TRUNK)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0, 1.0])
    (f_of(made, x_t(), t, cond(N)) - 1).square().sum().backward()
    for name, parameter in made.named_parameters():
        if "out" in name or "text_only.2" in name:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in TRUNK.parameters())


@torch.no_grad()
def test_at_t_1_text_alone_speaks_and_cond_null_says_0(cond: MakeCond) -> None:
    made = head(text=band(1.0, 2.0, 0.5))
    c = cond(N)
    f = f_of(made, x_t(), at(1.0), c)
    assert c.is_null.tolist() == [True, False, False, False, False]
    assert f[0] == 0
    assert torch.equal(f[1:], (2.0 * made.raw_text(c) + 0.5)[1:])
    assert torch.equal(f_of(made, -7 * x_t(), at(1.0), c), f)
    assert (f[1:].unsqueeze(0) != f[1:].unsqueeze(1)).sum() == 12


@torch.no_grad()
def test_below_t_1_picture_time_and_text_speak(cond: MakeCond) -> None:
    made, c = head(), cond(N)
    f = f_of(made, x_t(), at(0.5), c)
    assert torch.equal(f, raw_of(made, x_t(), at(0.5), c))
    assert not torch.equal(f_of(made, x_t().flip(0), at(0.5), c), f)
    assert not torch.equal(f_of(made, x_t(), at(0.4), c), f)
    other = f_of(made, x_t(), at(0.5), c[torch.tensor([0, 2, 1, 4, 3])])
    assert torch.equal(other[0], f[0])
    assert (other[1:] != f[1:]).all()


@torch.no_grad()
def test_a_caption_adds_to_a_picture_what_it_says_alone(cond: MakeCond) -> None:
    """So that f runs into its value at t = 1."""
    mute, told, c = head(text=band(1.0, 0.0, 0.0)), head(text=band(1.0, 2.0, 0.5)), cond(N)
    added = f_of(told, x_t(), at(0.5), c) - f_of(mute, x_t(), at(0.5), c)
    torch.testing.assert_close(added, told.text(c))
    assert added[0] == 0
    assert torch.equal(told.text(c), f_of(told, x_t(), at(1.0), c))


@torch.no_grad()
def test_null_captions_pooled_vector_says_nothing(cond: MakeCond) -> None:
    made, c = head(), cond(1)
    other = Conditioning(c.tokens, c.mask, c.pooled * -3, c.is_null)
    for t in (0.2, 1.0):
        assert torch.equal(f_of(made, x_t(1), at(t, 1), c), f_of(made, x_t(1), at(t, 1), other))


BANDS = [band(0.1, 1.0, 0.0), band(0.3, 2.0, -1.0), band(0.9, 0.5, 4.0)]


@pytest.mark.parametrize(
    ("t", "slope", "intercept"),
    [
        (0.1, 1.0, 0.0),
        (0.3, 2.0, -1.0),
        (0.9, 0.5, 4.0),
        (0.0, 1.0, 0.0),
        (0.05, 1.0, 0.0),
        (0.95, 0.5, 4.0),
        (0.2, 1.5, -0.5),
        (0.6, 1.25, 1.5),
        (0.15, 1.25, -0.25),
    ],
)
@torch.no_grad()
def test_calibration_is_linear_between_centres_and_constant_outside(
    t: float, slope: float, intercept: float, cond: MakeCond
) -> None:
    made, c = head(bands=BANDS), cond(N)
    wanted = slope * raw_of(made, x_t(), at(t), c) + intercept
    got = f_of(made, x_t(), at(t), c)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    if t in (0.1, 0.3, 0.9):
        assert torch.equal(got, wanted)


@torch.no_grad()
def test_captions_and_the_empty_one_have_bands_of_their_own(cond: MakeCond) -> None:
    made = head(prompted=[band(0.5, 2.0, 1.0)], unprompted=BANDS)
    c = cond(N)
    raw, f = raw_of(made, x_t(), at(0.3), c), f_of(made, x_t(), at(0.3), c)
    assert f[0] == 2 * raw[0] - 1
    assert torch.equal(f[1:], 2 * raw[1:] + 1)
    only = head(unprompted=BANDS)
    assert torch.equal(f_of(only, x_t(), at(0.3), c)[1:], raw[1:])


@torch.no_grad()
def test_each_row_is_calibrated_at_its_own_time(cond: MakeCond) -> None:
    made, c = head(bands=BANDS, text=band(1.0, 3.0, 1.0)), cond(N)
    t = torch.tensor([0.1, 1.0, 0.3, 0.2, 1.0])
    together = f_of(made, x_t(), t, c)
    for row in range(N):
        one = slice(row, row + 1)
        torch.testing.assert_close(f_of(made, x_t()[one], t[one], c[one])[0], together[row])


@torch.no_grad()
def test_one_band_holds_everywhere_below_1(cond: MakeCond) -> None:
    made, c = head(bands=[band(0.5, 2.0, 1.0)]), cond(N)
    for t in (0.0, 0.5, 0.99):
        assert torch.equal(f_of(made, x_t(), at(t), c), 2 * raw_of(made, x_t(), at(t), c) + 1)


@torch.no_grad()
def test_saved_and_loaded_is_bitwise_the_same(tmp_path: Path, cond: MakeCond) -> None:
    made = head(bands=BANDS, text=band(1.0, 3.0, 1.0))
    made.save(tmp_path / "one")
    loaded = GateHead.load(tmp_path / "one", SHAPE)
    assert loaded.config == made.config
    assert not loaded.training
    assert loaded.state_dict().keys() == made.state_dict().keys()
    for t in (0.0, 0.123, 0.7, 1.0):
        assert torch.equal(f_of(loaded, x_t(), at(t), cond(N)), f_of(made, x_t(), at(t), cond(N)))
    loaded.save(tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def _weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def _config(**changes: Any) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return apply


STRANGE: dict[str, Callable[[Path], Any]] = {
    "key missing": _weights(lambda w: w.pop("upper.out.bias")),
    "key too many": _weights(lambda w: w.update(surprise=torch.zeros(1))),
    "other shape": _weights(lambda w: w.update({"upper.out.bias": torch.zeros(3)})),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "torn weights": lambda f: (f / "model.safetensors").write_bytes(b"abc"),
    "half the weights": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:2000]
    ),
    "no config": lambda f: (f / "config.json").unlink(),
    "torn config": lambda f: (f / "config.json").write_text("{"),
    "list": lambda f: (f / "config.json").write_text("[]"),
    "other schema": _config(schema_version=1),
    "surprise": _config(surprise=1),
    "no trunk": _config(trunk_sha256=None),
    "band without slope": _config(calibration={"prompted": [{"t": 0.5}]}),
}


@pytest.mark.parametrize("how", STRANGE)
def test_stranger_is_refused_with_a_sentence(tmp_path: Path, how: str) -> None:
    head().save(tmp_path / "x")
    STRANGE[how](tmp_path / "x")
    with pytest.raises(Refused) as caught:
        GateHead.load(tmp_path / "x", SHAPE)
    assert caught.value.exit_code == ExitCode.REFUSED


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is not a gate head"):
        GateHead.load(tmp_path / "nothing", SHAPE)
