"""Denoisers on disk and in memory: bitwise round trips, refusals, adapters against diffusers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core import flow, seeds
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import (
    CARD_NAME,
    Card,
    Denoiser,
    load_network,
    new_network,
    read_card,
    write_card,
)
from atoll.core.digest import sha256_folder
from atoll.core.dit import DiT
from atoll.core.errors import AtollError, ExitCode, MissingError, Refused, UsageError
from atoll.core.families import FAMILIES
from atoll.core.flow import Prediction
from atoll.core.manifest import Picture
from atoll.core.recipes import RECIPES, build, network_config
from atoll.core.schedule import NoiseSchedule, alphas_cumprod
from atoll.core.uvit import UViT

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {family: f"{family}-tiny" for family in FAMILIES}
MakeCond = Callable[..., Conditioning]


def card(family: str = "unet", **changes: Any) -> Card:
    fields: dict[str, Any] = {
        "name": "shard-00",
        "kind": "expert",
        "shard": "shard-00",
        "base_sha256": "b" * 64,
        "family": family,
        "prediction": Prediction.VELOCITY,
        "latent_space": "pixels",
        "images_seen": 64,
    }
    return Card(**fields | changes)


def denoiser(family: str, *, seed: int = 0, **changes: Any) -> Denoiser:
    network = build(RECIPES[TINY[family]], Picture(channels=1, height=8, width=8), 8, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():  # transformers begin at a zero output
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Denoiser(network.eval(), card(family, **changes))


def batch(n: int = 3) -> tuple[Tensor, Tensor]:
    return seeds.normal(0, "x", first=0, count=n, shape=(1, 8, 8)), torch.linspace(0.1, 0.9, n)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    denoiser("unet").save(tmp_path / "expert")
    return tmp_path / "expert"


# -- round trips ---------------------------------------------------------------------------------


def test_saved_and_loaded_is_bitwise_the_same(family: str, tmp_path: Path, cond: MakeCond) -> None:
    made = denoiser(family)
    made.save(tmp_path / "one")
    loaded = Denoiser.load(tmp_path / "one")
    assert loaded.card == made.card
    assert not loaded.network.training
    state = made.network.state_dict()
    assert loaded.network.state_dict().keys() == state.keys()
    for name, value in loaded.network.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name]), name
    x_t, t = batch()
    with torch.no_grad():
        assert torch.equal(loaded.velocity(x_t, t, cond(3)), made.velocity(x_t, t, cond(3)))
    loaded.save(tmp_path / "elsewhere" / "two")
    assert sha256_folder(tmp_path / "elsewhere" / "two") == sha256_folder(tmp_path / "one")


def test_folder_has_three_files_and_nothing_pickled(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == sorted(["config.json", WEIGHTS, CARD_NAME])
    assert str(saved) not in (saved / "config.json").read_text()


def test_diffusers_loads_the_folder_by_itself(saved: Path) -> None:
    theirs = UNet2DConditionModel.from_pretrained(saved)
    ours = load_network(saved, "unet")
    for (name, one), (other_name, other) in zip(
        theirs.state_dict().items(), ours.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)


def test_new_network_is_a_function_of_its_seed_and_leaves_the_global_one(family: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    picture = Picture(channels=1, height=8, width=8)
    one, same, other = (build(RECIPES[TINY[family]], picture, 8, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


# -- adapters ------------------------------------------------------------------------------------


def test_unet_adapter_is_the_bare_diffusers_call(cond: MakeCond) -> None:
    network = new_network(
        "unet",
        {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
        },
        seed=0,
    ).eval()
    x_t, t = batch()
    told = 1000 * t
    c = cond(3)
    with torch.no_grad():
        ours = FAMILIES["unet"].adapter(network, x_t, told, c)
        theirs = network(
            x_t, told, encoder_hidden_states=c.tokens, encoder_attention_mask=c.mask
        ).sample
        assert torch.equal(ours, theirs)
        # The mask is heeded: what stands in masked tokens changes nothing ...
        noisy = Conditioning(
            torch.where(c.mask[:, :, None], c.tokens, 9.0), c.mask, c.pooled, c.is_null
        )
        torch.testing.assert_close(FAMILIES["unet"].adapter(network, x_t, told, noisy), ours)
        # ... and what stands in the others does, as does time.
        assert not torch.equal(FAMILIES["unet"].adapter(network, x_t, told, cond(4)[1:]), ours)
        assert not torch.equal(FAMILIES["unet"].adapter(network, x_t, told.flip(0), c), ours)


def test_pixart_adapter_is_the_bare_diffusers_call(cond: MakeCond) -> None:
    network = denoiser("pixart").network
    assert isinstance(network, PixArtTransformer2DModel)
    x_t, t = batch()
    told = 1000 * t
    c = cond(3)
    with torch.no_grad():
        ours = FAMILIES["pixart"].adapter(network, x_t, told, c)
        theirs = network(
            x_t,
            encoder_hidden_states=c.tokens,
            timestep=told,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=c.mask.long(),
        ).sample
        assert torch.equal(ours, theirs)
        noisy = Conditioning(
            torch.where(c.mask[:, :, None], c.tokens, 9.0), c.mask, c.pooled, c.is_null
        )
        torch.testing.assert_close(FAMILIES["pixart"].adapter(network, x_t, told, noisy), ours)
        assert not torch.equal(FAMILIES["pixart"].adapter(network, x_t, told, cond(4)[1:]), ours)
        assert not torch.equal(FAMILIES["pixart"].adapter(network, x_t, told.flip(0), c), ours)


def test_sd3_adapter_is_the_diffusers_call_with_silent_padding(cond: MakeCond) -> None:
    network = denoiser("sd3").network
    assert isinstance(network, SD3Transformer2DModel)
    x_t, t = batch()
    told = 1000 * t
    c = cond(3)
    with torch.no_grad():
        ours = FAMILIES["sd3"].adapter(network, x_t, told, c)
        theirs = network(
            x_t,
            encoder_hidden_states=c.tokens,
            pooled_projections=c.pooled * 8**0.5,
            timestep=told,
        ).sample
        torch.testing.assert_close(ours, theirs)
        noisy = Conditioning(
            torch.where(c.mask[:, :, None], c.tokens, 9.0), c.mask, c.pooled, c.is_null
        )
        assert torch.equal(FAMILIES["sd3"].adapter(network, x_t, told, noisy), ours)
        for other in (
            Conditioning(cond(4).tokens[1:], c.mask, c.pooled, c.is_null),
            Conditioning(c.tokens, c.mask, c.pooled.flip(0), c.is_null),
        ):
            assert not torch.equal(FAMILIES["sd3"].adapter(network, x_t, told, other), ours)
        assert not torch.equal(FAMILIES["sd3"].adapter(network, x_t, told.flip(0), c), ours)


def test_pixart_that_puts_out_a_variance_too_is_read_without_it(cond: MakeCond) -> None:
    config = network_config(RECIPES["pixart-tiny"], Picture(channels=1, height=8, width=8), 8)
    network = new_network("pixart", {**config, "out_channels": 2}, seed=0)
    torch.nn.init.ones_(network.proj_out.bias)  # type: ignore[union-attr,arg-type]
    x_t, t = batch()
    assert FAMILIES["pixart"].adapter(network, x_t, t, cond(3)).shape == x_t.shape


def test_gradient_checkpointing_changes_no_gradient(family: str, cond: MakeCond) -> None:
    network: Any = denoiser(family).network.train()
    x_t, t = batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        network.zero_grad()
        FAMILIES[family].adapter(network, x_t, t, cond(3)).square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sum(g.abs().sum() for g in gradients[0]) > 0


def test_rows_do_not_see_each_other(family: str, cond: MakeCond) -> None:
    made = denoiser(family)
    x_t, t = batch()
    with torch.no_grad():
        together = made.velocity(x_t, t, cond(3))
        for row in range(3):
            one = slice(row, row + 1)
            alone = made.velocity(x_t[one], t[one], cond(3)[one])
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_nothing_is_random_in_training_mode_either(family: str, cond: MakeCond) -> None:
    network = denoiser(family).network.train()
    x_t, t = batch()
    torch.manual_seed(0)
    one = FAMILIES[family].adapter(network, x_t, t, cond(3))
    torch.manual_seed(1)
    assert torch.equal(FAMILIES[family].adapter(network, x_t, t, cond(3)), one)


@pytest.mark.parametrize("prediction", list(Prediction))
def test_velocity_is_converted_by_what_the_card_says(
    prediction: Prediction, cond: MakeCond
) -> None:
    made = denoiser("unet", prediction=prediction)
    x_t, t = batch()
    with torch.no_grad():
        wanted = flow.to_velocity(made.output(x_t, t, cond(3)), x_t, t, prediction)
        assert torch.equal(made.velocity(x_t, t, cond(3)), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_network_of_a_schedule_is_asked_as_its_pipeline_would(family: str, cond: MakeCond) -> None:
    """At a timestep k with the variance-preserving point, to the last bit but those of the time."""
    made = denoiser(family, prediction="epsilon", schedule=SCHEDULE)
    alpha = alphas_cumprod(SCHEDULE)[[40, 500, 960]].sqrt()
    sigma = (1 - alphas_cumprod(SCHEDULE)[[40, 500, 960]]).sqrt()
    x_t, _ = batch()
    with torch.no_grad():
        theirs = FAMILIES[family].adapter(
            made.network, x_t * flow.expand(alpha + sigma, x_t), torch.tensor([40, 500, 960]),
            cond(3),
        )  # fmt: skip
        ours = made.output(x_t, sigma / (alpha + sigma), cond(3))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# -- the card ------------------------------------------------------------------------------------


def test_card_round_trip(tmp_path: Path) -> None:
    for made in (
        card(schedule=SCHEDULE),
        card(kind="base", shard=None, base_sha256=None, prediction="epsilon"),
        card(),
    ):
        write_card(tmp_path, made)
        assert read_card(tmp_path) == made
    keys = set(json.loads((tmp_path / CARD_NAME).read_text()))
    # ARCHITECTURE: "Every expert, base and soup folder carries atoll.json".
    assert keys >= {"schema_version", "name", "shard", "base_sha256", "family", "prediction"}
    assert keys >= {"latent_space", "images_seen"}
    assert "schedule" not in keys  # of our own path, as it was before there were others


def test_no_card_is_no_denoiser(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UsageError, match=r"There is no denoiser at"):
            Denoiser.load(place)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"schema_version": None},
        {"surprise": 1},
        {"kind": "monolith"},
        {"prediction": "noise"},
        {"schedule": {"beta_schedule": "noise"}},
        {"schedule": "own"},
        {"images_seen": "many"},
        {"name": None},
        {"family": "dit"},  # a family, and not this one
        {"family": "flux"},
        {"family": "os.system"},
    ],
)
def test_changed_card_is_refused(saved: Path, change: dict[str, Any]) -> None:
    values = json.loads((saved / CARD_NAME).read_text()) | change
    (saved / CARD_NAME).write_text(json.dumps(values))
    with pytest.raises(Refused) as caught:
        Denoiser.load(saved)
    assert caught.value.exit_code == ExitCode.REFUSED


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_what_is_no_card_is_refused(saved: Path, text: str) -> None:
    (saved / CARD_NAME).write_text(text)
    with pytest.raises(Refused):
        Denoiser.load(saved)


# -- damage and strangers ------------------------------------------------------------------------


def _weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def _config(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        values = change(json.loads((folder / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(values))

    return apply


def _shorten(folder: Path, keep: float) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * keep)])


STRANGE: dict[str, Callable[[Path], Any]] = {
    "key missing": _weights(lambda w: w.pop("conv_in.weight")),
    "key too many": _weights(lambda w: w.update(surprise=torch.zeros(1))),
    "other shape": _weights(lambda w: w.update({"conv_in.bias": torch.zeros(3)})),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "empty weights": lambda f: (f / WEIGHTS).write_bytes(b""),
    "half the weights": lambda f: _shorten(f, 0.5),
    "header only": lambda f: _shorten(f, 0.001),
    "header of 2^63 bytes": lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"),
    "no config": lambda f: (f / "config.json").unlink(),
    "torn config": lambda f: (f / "config.json").write_text("{"),
    "config of another kind": _config(lambda c: [c]),
    "other class": _config(lambda c: c | {"_class_name": "PixArtTransformer2DModel"}),
    "no class": _config(lambda c: {k: v for k, v in c.items() if k != "_class_name"}),
    "class to import": _config(lambda c: c | {"_class_name": ["os", "system"]}),
    "other width": _config(lambda c: c | {"block_out_channels": [16, 16]}),
    "impossible": _config(lambda c: c | {"norm_num_groups": 7}),
}


@pytest.mark.parametrize("how", STRANGE)
def test_stranger_is_refused_with_a_sentence(saved: Path, how: str) -> None:
    STRANGE[how](saved)
    with pytest.raises(AtollError) as caught:
        Denoiser.load(saved)
    assert isinstance(caught.value, Refused | MissingError)
    assert str(saved) in str(caught.value)


def test_pickled_weights_are_never_opened(saved: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (saved / "exploded",))

    (saved / WEIGHTS).unlink()
    (saved / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Bomb()}))
    with pytest.raises(MissingError):
        Denoiser.load(saved)
    assert not (saved / "exploded").exists()


def test_families_are_classes_of_diffusers_or_models_of_ours() -> None:
    for row in FAMILIES.values():
        theirs = getattr(diffusers, row.network.__name__, None)
        assert theirs is row.network or row.network in (UViT, DiT)
        assert issubclass(row.network, diffusers.ModelMixin)
