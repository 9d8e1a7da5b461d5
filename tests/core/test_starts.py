"""Starts: every kind of source, bitwise, strict, and refused with a sentence where it must be."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from atoll.core import flow, seeds
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Card, Denoiser, new_network
from atoll.core.digest import sha256_folder
from atoll.core.errors import AtollError, ConfigError, MissingError, Refused, UsageError
from atoll.core.families import FAMILIES
from atoll.core.flow import Prediction
from atoll.core.manifest import Picture
from atoll.core.recipes import RECIPES, build, network_config
from atoll.core.schedule import NoiseSchedule
from atoll.core.starts import Start, load_start

MakeCond = Callable[..., Conditioning]
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICTURE = Picture(channels=1, height=8, width=8)
COSINE = NoiseSchedule(beta_schedule="squaredcos_cap_v2")
OTHER = NoiseSchedule(num_train_timesteps=500)
PARTS = {"unet": "unet"}  # every other family's network is called transformer


def load(spec: Path | str, picture: Picture = PICTURE, **options: Any) -> Start:
    return load_start(str(spec), picture, **{"text_width": 8, "pooled_width": 8} | options)


def network(family: str = "unet", **changes: Any) -> Any:
    config = network_config(RECIPES[f"{family}-tiny"], PICTURE, 8)
    return new_network(family, config | changes, seed=3)


def pipeline(
    folder: Path, scheduler: dict[str, Any], *, family: str = "unet", **changes: Any
) -> Path:
    """A pipeline folder as diffusers writes them, with what a start must leave alone."""
    made, part = network(family, **changes), PARTS.get(family, "transformer")
    made.save_pretrained(folder / part)
    index = {
        "_class_name": "StableDiffusionPipeline",
        part: ["diffusers", type(made).__name__],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["os", "system"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture
def epsilon(tmp_path: Path) -> Path:
    scheduler = {"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}
    return pipeline(tmp_path / "pipeline", scheduler)


# -- what can be read ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_denoiser_of_ours(family: str, tmp_path: Path) -> None:
    card = Card(
        name="base", kind="base", shard=None, base_sha256=None, family=family,
        prediction=Prediction.X_DATA, latent_space="pixels", images_seen=5,
    )  # fmt: skip
    made = network(family)
    Denoiser(made, card).save(tmp_path)
    start = load(tmp_path)
    assert (start.family, start.prediction, start.declared) == (family, "x_data", "x_data")
    assert same(start.network, made)
    assert not start.network.training
    # The digest that a manifest gives for this folder.
    assert start.sha256 == sha256_folder(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_component_folder_by_its_class(family: str, tmp_path: Path) -> None:
    made = network(family)
    made.save_pretrained(tmp_path)
    start = load(tmp_path, prediction=Prediction.EPSILON)
    assert (start.family, start.prediction, start.declared) == (family, "epsilon", None)
    assert same(start.network, made)


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_folder_by_its_network(family: str, tmp_path: Path) -> None:
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    start = load(pipeline(tmp_path, scheduler, family=family))
    assert (start.family, start.prediction) == (family, "velocity")
    assert same(start.network, network(family))


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [
        ({"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}, "epsilon"),
        ({"_class_name": "PNDMScheduler"}, "epsilon"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "sample"}, "x_data"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
            "velocity",
        ),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "velocity"),
    ],
)
def test_prediction_is_what_the_scheduler_says(
    scheduler: dict[str, Any], prediction: str, tmp_path: Path
) -> None:
    assert load(pipeline(tmp_path, scheduler)).prediction == prediction


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, None),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, None),
        ({"_class_name": "PNDMScheduler", "beta_schedule": "squaredcos_cap_v2"}, COSINE),
        (
            {"_class_name": "DDIMScheduler", "beta_end": 0.01, "trained_betas": None, "eta": 0},
            NoiseSchedule(beta_end=0.01),
        ),
    ],
)
def test_path_is_kept_where_that_is_asked_for(
    scheduler: dict[str, Any], schedule: NoiseSchedule | None, tmp_path: Path
) -> None:
    folder = pipeline(tmp_path, scheduler)
    assert load(folder, keep_path=True).schedule == schedule
    assert load(folder).schedule is None
    assert load(folder, keep_path=True, schedule=OTHER).schedule == OTHER
    assert load(folder, schedule=OTHER).schedule == OTHER


@pytest.mark.parametrize("schedule", [None, COSINE])
def test_path_of_a_denoiser_of_ours_is_kept_too(
    schedule: NoiseSchedule | None, tmp_path: Path
) -> None:
    card = Card(
        name="base", kind="base", shard=None, base_sha256=None, family="unet", schedule=schedule,
        prediction=Prediction.V_PREDICTION, latent_space="pixels", images_seen=5,
    )  # fmt: skip
    Denoiser(network(), card).save(tmp_path)
    assert load(tmp_path, keep_path=True).schedule == schedule
    assert load(tmp_path).schedule is None


def test_sharded_weights(tmp_path: Path) -> None:
    made = network("uvit")
    made.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(path.name for path in tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    start = load(tmp_path, prediction=Prediction.VELOCITY)
    assert same(start.network, made)
    assert start.sha256 == sha256_folder(tmp_path)


def test_digest_is_of_what_was_read_and_nothing_else(epsilon: Path) -> None:
    before = load(epsilon).sha256
    (epsilon / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"others")
    (epsilon / "unet" / "README.md").write_text("words")
    assert load(epsilon).sha256 == before
    tensors = load_file(epsilon / "unet" / WEIGHTS)
    tensors["conv_in.bias"] += 1
    save_file(tensors, epsilon / "unet" / WEIGHTS)
    assert load(epsilon).sha256 != before


# -- continuing ----------------------------------------------------------------------------------


def _learn(start: Start, cond: Conditioning, steps: int = 40) -> list[float]:
    x_data = seeds.normal(0, "x_data", first=0, count=4, shape=PICTURE.shape)
    x_noise = seeds.normal(0, "x_noise", first=0, count=4, shape=PICTURE.shape)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    x_t = flow.interpolate(x_data, x_noise, t)
    wanted = flow.target(x_data, x_noise, t, start.prediction)
    optimizer = torch.optim.AdamW(start.network.parameters(), lr=6e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = FAMILIES[start.family].adapter(start.network, x_t, 1000 * t, cond)
        loss = (output - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_epsilon_checkpoint_goes_on_as_velocity(epsilon: Path, cond: MakeCond) -> None:
    as_it_is, chosen = load(epsilon), load(epsilon, prediction=Prediction.VELOCITY)
    assert (as_it_is.prediction, chosen.prediction) == ("epsilon", "velocity")
    assert as_it_is.declared == chosen.declared == "epsilon"
    assert as_it_is.sha256 == chosen.sha256
    assert same(as_it_is.network, chosen.network)
    for start in (as_it_is, chosen):
        losses = _learn(start, cond(4))
        assert losses[-1] < 0.2 * losses[0]
    assert not same(as_it_is.network, chosen.network)


def test_other_picture_size_is_taken_where_the_network_can(tmp_path: Path, cond: MakeCond) -> None:
    for family in ("unet", "uvit", "dit"):
        network(family).save_pretrained(tmp_path / family)
        picture = Picture(channels=1, height=16, width=12)
        start = load(tmp_path / family, picture, prediction=Prediction.VELOCITY)
        config: Any = start.network.config
        # Kept when it is saved again: an ensemble is checked against it.
        assert tuple(config.sample_size) == (16, 12)
        x = torch.zeros(1, *picture.shape)
        assert FAMILIES[family].adapter(start.network, x, torch.ones(1), cond(1)).shape == x.shape


# -- what is refused -----------------------------------------------------------------------------


def test_unknown_prediction_is_refused_unless_it_is_to_become_another(tmp_path: Path) -> None:
    odd = pipeline(tmp_path, {"_class_name": "DDIMScheduler", "prediction_type": "score"})
    with pytest.raises(Refused, match=r"predicts score.*v_prediction.*choose the prediction"):
        load(odd)
    start = load(odd, prediction=Prediction.VELOCITY)
    assert (start.declared, start.prediction) == ("score", "velocity")


def test_path_that_nothing_says_is_refused_unless_it_is_given(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    kept: dict[str, Any] = {"prediction": Prediction.EPSILON, "keep_path": True}
    with pytest.raises(UsageError, match=r"Nothing at .* says on which path") as caught:
        load(tmp_path, **kept)
    assert "training.schedule" in caught.value.cure
    assert load(tmp_path, **kept, schedule=COSINE).schedule == COSINE


def test_path_that_is_not_known_is_a_start_for_ours(tmp_path: Path) -> None:
    scheduler = {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}
    edm = pipeline(tmp_path, scheduler)
    with pytest.raises(Refused, match="scheduler is EDMEulerScheduler"):
        load(edm, keep_path=True)
    assert load(edm).schedule is None


def test_component_that_does_not_say_what_it_predicts(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"Nothing at .* says.*velocity, epsilon, x_data"):
        load(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=r"nothing to start from.*hf-hub:ORG/NAME"):
            load(place)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("unet", {"in_channels": 4, "out_channels": 4}, "in_channels=4.*in_channels=1"),
        ("unet", {"out_channels": 2}, "out_channels=2"),
        ("unet", {"cross_attention_dim": 12}, "cross_attention_dim=12.*cross_attention_dim=8"),
        ("pixart", {"caption_channels": 12}, "caption_channels=12"),
        ("uvit", {"joint_attention_dim": 12}, "joint_attention_dim=12"),
        ("dit", {"pooled_projection_dim": 12}, "pooled_projection_dim=12"),
        ("sd3", {"pooled_projection_dim": 12}, "pooled_projection_dim=12"),
        ("sd3", {"pos_embed_max_size": 2}, "knows 4 positions"),
    ],
)
def test_network_for_other_data_is_refused_with_the_cure(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    network(family, **changes).save_pretrained(tmp_path)
    with pytest.raises(Refused, match=said) as caught:
        load(tmp_path, prediction=Prediction.VELOCITY)
    assert caught.value.cure


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 7)])
def test_picture_that_does_not_divide_is_refused_with_the_cure(
    height: int, width: int, epsilon: Path
) -> None:
    with pytest.raises(ConfigError, match="multiple of 2"):
        load(epsilon, Picture(channels=1, height=height, width=width))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("pixart", {"use_additional_conditions": True}, "use_additional_conditions"),
        ("pixart", {"use_additional_conditions": None, "sample_size": 128}, "use_additional"),
        ("unet", {"_class_name": "FluxTransformer2DModel"}, "names the class Flux.*UViT"),
        ("unet", {"_class_name": ["os", "system"]}, "names the class"),
        ("unet", {"_class_name": None}, "names the class None"),
        ("unet", {"block_out_channels": 3}, "damaged"),
        ("uvit", {"patch_size": 0}, "damaged"),
        ("uvit", {"num_layers": "many"}, "cannot be loaded"),
        ("uvit", {"num_layers": 7}, "not those of its config.json"),
    ],
)
def test_strange_configuration_is_refused_before_the_weights(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    network(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(AtollError, match=said):
        load(tmp_path, prediction=Prediction.VELOCITY)


def _pickled(folder: Path) -> None:
    made = network()
    (folder / "unet" / WEIGHTS).unlink()
    made.save_pretrained(folder / "unet", safe_serialization=False)


def _index(change: dict[str, Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return apply


def _shards(names: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = {"metadata": {}, "weight_map": names}
        (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return apply


STRANGE: dict[str, tuple[type[AtollError], Callable[[Path], Any]]] = {
    "weights as pickles": (MissingError, _pickled),
    "no weights": (MissingError, lambda f: (f / "unet" / WEIGHTS).unlink()),
    "no network": (Refused, _index({"unet": None})),
    "network left out": (Refused, _index({"unet": [None, None]})),
    "index of another kind": (Refused, lambda f: (f / "model_index.json").write_text("[]")),
    "torn index": (MissingError, lambda f: (f / "model_index.json").write_text("{")),
    "no scheduler": (MissingError, lambda f: (f / "scheduler/scheduler_config.json").unlink()),
    "no configuration": (MissingError, lambda f: (f / "unet" / "config.json").unlink()),
    "weights elsewhere": (Refused, _shards({"conv_in.weight": "../../stolen.safetensors"})),
    "weights nowhere": (Refused, _shards({})),
    "weights of another kind": (Refused, _shards("all")),
}


@pytest.mark.parametrize("how", STRANGE)
def test_strange_pipeline_is_refused_with_a_sentence(how: str, epsilon: Path) -> None:
    wanted, change = STRANGE[how]
    change(epsilon)
    with pytest.raises(wanted) as caught:
        load(epsilon)
    assert str(epsilon) in str(caught.value)


# -- the hub, without the network ----------------------------------------------------------------


def test_hub_id_is_a_folder_once_it_is_here(epsilon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "unet/config.json" in allow_patterns
        assert not any("text_encoder" in pattern for pattern in allow_patterns)
        return str(epsilon)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    start = load("hf-hub:some/model")
    assert same(start.network, network())
    assert load("hf-hub:some/model@abc123").sha256 == start.sha256
    assert asked == [("some/model", None), ("some/model", "abc123")]


def test_hub_out_of_reach_is_said_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match=r"hf-hub:some/model is not within reach") as caught:
        load("hf-hub:some/model")
    assert "HF_TOKEN" in caught.value.cure


@pytest.mark.parametrize("spec", ["hf-hub:", "hf-hub:model", "hf-hub:a/b/c", "hf-hub:@main"])
def test_hub_id_of_another_form(spec: str) -> None:
    with pytest.raises(UsageError, match="names no repository"):
        load(spec)


def test_network_of_a_start_is_that_of_a_new_one_after_saving(tmp_path: Path) -> None:
    build(RECIPES["sd3-tiny"], PICTURE, 8, seed=5).save_pretrained(tmp_path)  # type: ignore[operator]
    start = load(tmp_path, prediction=Prediction.VELOCITY)
    assert same(start.network, build(RECIPES["sd3-tiny"], PICTURE, 8, seed=5))
