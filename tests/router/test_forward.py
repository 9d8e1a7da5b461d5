"""The ensemble's forward: its family's arguments, our conditioning, and routing without memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors.torch import save_file
from torch import Tensor

from atoll.core import sampler, seeds
from atoll.core.conditioning import Conditioning, concatenate
from atoll.core.digest import sha256_folder
from atoll.core.embedding import Encoder, load_encoder, text_projection
from atoll.core.errors import Refused, UsageError
from atoll.core.families import FAMILIES
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.router.assemble import assemble
from atoll.router.chooser import sample_settings, x_noise
from atoll.router.ensemble import Trajectory
from atoll.router.forward import FORWARDS, PROJECTION_NAME, TextProjection, stateless
from atoll.router.model import EnsembleModel
from atoll.router.pipeline import AtollPipeline
from tests.router.conftest import PICTURE
from tests.router.experts import TEXT, of_families

PROMPTS = ["a grey square", "a bright dot", "something never seen", "a bright dot"]
STATELESS = (
    "full", "top-k:2", "top-k:1", "mass:0.8", "threshold:0.1", "oracle:shard-01",
    "full>0.6,top-k:1", "top-k:1>0.7,oracle:shard-02",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("assembled") / "run"
    shutil.copytree(trained, place)
    assemble(Storage(place), Manifest.load(Storage(place)))
    return place / "ensemble"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return load_encoder(folder / "text_encoder")


@pytest.fixture
def model(folder: Path) -> EnsembleModel:
    return EnsembleModel.from_pretrained(folder, subfolder="transformer")


def trajectory_of(
    model: EnsembleModel, cond: Conditioning, null: Conditioning, *, trace: bool = False, **how: Any
) -> Trajectory:
    settings = sample_settings(len(cond), model.shards, **how)
    return model.trajectory(cond, null, settings, trace=trace)


def x_at(count: int = 4) -> Tensor:
    return seeds.normal(5, "x", first=0, count=count, shape=PICTURE.shape)


def call_of(family: str, cond: Conditioning, x_t: Tensor, timestep: Any) -> dict[str, Any]:
    """What a stock pipeline of the family hands over."""
    match family:
        case "unet":
            return {"sample": x_t, "timestep": timestep, "encoder_hidden_states": cond.tokens}
        case "dit":
            return {
                "hidden_states": x_t,
                "timestep": timestep,
                "pooled_projections": cond.pooled * math.sqrt(TEXT),
            }
    given = {"hidden_states": x_t, "timestep": timestep, "encoder_hidden_states": cond.tokens}
    if family == "sd3":
        given["pooled_projections"] = cond.pooled * math.sqrt(TEXT)
    if family == "pixart":
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return given


# -- a family's own forward ------------------------------------------------------------------------


def test_every_family_has_a_forward() -> None:
    assert FORWARDS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_answers_as_its_network(family: str, encoder: Encoder) -> None:
    """For the same arguments, but for the mask of tokens, which stock Stable Diffusion leaves out.

    Bit for bit, save where a pooled vector of any length is taken.
    """
    model, cond = of_families(family), encoder.condition(PROMPTS)
    given = call_of(family, cond, x_at(), torch.tensor([1000.0, 700.0, 400.0, 3.0]))
    masked = family in ("unet", "pixart", "uvit")
    mask = cond.mask.float() if family == "pixart" else cond.mask
    network: Any = model.networks[0]
    null = {"is_null": torch.zeros(4, dtype=torch.bool)} if family == "dit" else {}
    with torch.no_grad():
        expected = network(**given, **({"encoder_attention_mask": mask} if masked else {})).sample
        made = model(**given, **null)
        [as_tuple] = model(**given, **null, return_dict=False)
    kind = UNet2DConditionOutput if family == "unet" else Transformer2DModelOutput
    assert type(made) is kind
    assert torch.equal(as_tuple, made.sample)
    if family in ("dit", "sd3"):
        torch.testing.assert_close(made.sample, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(made.sample, expected)


@pytest.mark.parametrize("timestep", [250, 250.0, torch.tensor(250.0), torch.tensor([250])])
def test_timesteps_are_what_schedulers_give(
    model: EnsembleModel, encoder: Encoder, timestep: Any
) -> None:
    cond = encoder.condition(PROMPTS)
    with torch.no_grad():
        made = model(x_at(), timestep, cond.tokens).sample
        expected = model(x_at(), torch.full((4,), 250.0), cond.tokens).sample
    assert torch.equal(made, expected)


@pytest.mark.parametrize("family", ["unet", "pixart"])
def test_the_family_named_is_the_forward(folder: Path, encoder: Encoder, family: str) -> None:
    model = EnsembleModel.from_pretrained(folder / "transformer", family=family)
    first = EnsembleModel.from_pretrained(folder / "transformer")
    assert (model.family, first.family) == (family, "unet")
    cond = encoder.condition(PROMPTS)
    with torch.no_grad():
        made = model(**call_of(family, cond, x_at(), 400.0)).sample
        assert torch.equal(made, first(x_at(), 400.0, cond.tokens).sample)
    config = model.config
    assert (config.in_channels, config.out_channels, config.sample_size) == (1, 1, 8)
    assert config["_class_name"] == FAMILIES[family].network.__name__
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(folder: Path, encoder: Encoder, dtype: torch.dtype) -> None:
    """Pictures come back as they came; the path and the gate stay in float32 at least."""
    model = EnsembleModel.from_pretrained(folder / "transformer", torch_dtype=dtype).to(dtype)
    exact = EnsembleModel.from_pretrained(folder / "transformer")
    cond = encoder.condition(PROMPTS)
    with torch.no_grad():
        made = model(x_at().to(dtype), 500.0, cond.tokens.to(dtype)).sample
        expected = exact(x_at(), 500.0, cond.tokens).sample
    assert made.dtype == model.dtype == dtype
    assert model.text_projection is not None
    assert model.text_projection.weight.dtype == torch.float32
    assert float((made.float() - expected).norm() / expected.norm()) < 0.05


# -- conditioning ----------------------------------------------------------------------------------


def heard(model: EnsembleModel, **given: Any) -> tuple[Conditioning, Tensor]:
    """What the gate is asked about in a call, and what it answers."""
    asked: list[tuple[Conditioning, Tensor]] = []
    gate = model.gate.register_forward_hook(
        lambda _gate, arguments, weights: asked.append((arguments[2], weights))
    )
    with torch.no_grad():
        model(**given)
    gate.remove()
    [answer] = asked
    return answer


@pytest.mark.parametrize("t", [1.0, 0.6, 0.05])
def test_the_gate_hears_of_tokens_what_the_pipeline_tells_it(
    folder: Path, model: EnsembleModel, encoder: Encoder, t: float
) -> None:
    """Mask, pooled vector and which captions are empty all follow from the token states."""
    cond = concatenate([encoder.condition(PROMPTS), encoder.condition(["", " "])])
    x_t = x_at(6)
    got, weights = heard(model, sample=x_t, timestep=1000 * t, encoder_hidden_states=cond.tokens)
    assert torch.equal(got.mask, cond.mask)
    assert got.is_null.tolist() == cond.is_null.tolist() == [False] * 4 + [True] * 2
    torch.testing.assert_close(got.pooled, cond.pooled, rtol=0, atol=1e-6)
    trajectory = trajectory_of(model, cond, encoder.condition([""]), trace=True)
    trajectory(x_t, torch.full((6,), t))
    assert trajectory.trace is not None
    torch.testing.assert_close(weights, trajectory.trace[0].gate_weights, rtol=1e-5, atol=1e-6)


def test_given_masks_and_pooled_vectors_are_taken(encoder: Encoder) -> None:
    cond, other = encoder.condition(PROMPTS), encoder.condition(PROMPTS[::-1])
    model = of_families("pixart", "uvit")
    got, _ = heard(
        model,
        hidden_states=x_at(), timestep=10.0, encoder_hidden_states=cond.tokens,
        encoder_attention_mask=torch.ones_like(cond.mask).long(), added_cond_kwargs={},
    )  # fmt: skip
    assert bool(got.mask.all())
    got, _ = heard(
        of_families("sd3", "uvit"),
        hidden_states=x_at(), timestep=10.0, encoder_hidden_states=cond.tokens,
        pooled_projections=7 * other.pooled,
    )  # fmt: skip
    torch.testing.assert_close(got.pooled, other.pooled)


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("kind", ["matrix", "layer", "none"])
def test_every_kind_of_projection(
    encoder: Encoder, tmp_path: Path, custom: bool, kind: str
) -> None:
    """Of the text towers that the encoder takes; read from the files alone."""
    text = {**encoder.config.model["text_cfg"]}
    text |= {"matrix": {}, "layer": {"proj_bias": True}, "none": {"proj_type": "none"}}[kind]
    made = Encoder(
        spec="test",
        model={**encoder.config.model, "text_cfg": text, "custom_text": custom},
        preprocess=encoder.config.preprocess,
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=seeds.generator(1, "w"))
            parameter.add_(0.1 * noise)
    made.save_pretrained(tmp_path / "encoder")
    TextProjection(text_projection(tmp_path / "encoder")).save(tmp_path)
    projection = TextProjection.load(tmp_path, pooled=TEXT)
    assert projection is not None
    assert {name for name, _ in projection.named_buffers()} == {
        "matrix": {"weight"}, "layer": {"weight", "bias"}, "none": set(),
    }[kind]  # fmt: skip
    cond = made.condition([*PROMPTS, ""])
    torch.testing.assert_close(projection(cond.tokens, cond.mask), cond.pooled, rtol=0, atol=1e-6)


# -- routing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", STATELESS)
def test_rows_are_routed_as_on_a_trajectory(
    model: EnsembleModel, encoder: Encoder, routing: str
) -> None:
    cond = encoder.condition(PROMPTS)
    trajectory = trajectory_of(model, cond, encoder.condition([""]), routing=routing)
    model.set_routing(routing)
    for t in (1.0, 0.5):
        expected = trajectory(x_at(), torch.full((4,), t))
        with torch.no_grad():
            made = model(x_at(), 1000 * t, cond.tokens).sample
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", STATELESS)
def test_paired_halves_are_the_two_branches_of_guidance(
    model: EnsembleModel, encoder: Encoder, routing: str
) -> None:
    """Both over the union of their sets, as `AtollPipeline` guides; unpaired, each over its own."""
    cond, null = encoder.condition(PROMPTS), encoder.condition([""])
    both = concatenate([null.expand(4), cond]).tokens
    model.set_routing(routing, paired=True)
    for t in (1.0, 0.4):
        trajectory = trajectory_of(model, cond, null, routing=routing, guidance=3.0)
        with torch.no_grad():
            v = model(x_at().repeat(2, 1, 1, 1), 1000 * t, both, return_dict=False)[0]
        v_0, v_c = v.chunk(2)
        expected = trajectory(x_at(), torch.full((4,), t))
        torch.testing.assert_close(sampler.guide(v_c, v_0, 3.0), expected, rtol=1e-4, atol=1e-4)


def test_pairs_share_the_union_of_their_sets() -> None:
    """Written out: two pictures, of which the first's branches favour different experts."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.3, 0.6, 0.1]])
    nothing = torch.zeros(4, 0, 0)
    cond = Conditioning(nothing, nothing[:, :, :0], torch.zeros(4, 1), torch.zeros(4).bool())
    x_t = x_at(2).repeat(2, 1, 1, 1)

    def weights(*, paired: bool) -> Tensor:
        routing = stateless("top-k:1", ["a", "b", "c"], experts=None, paired=paired)
        return routing.weights(lambda *_: p, x_t, torch.ones(4), cond, ["a", "b", "c"])

    expected = torch.tensor(
        [[5 / 7, 0, 2 / 7], [0, 1, 0], [2 / 8, 0, 6 / 8], [0, 1, 0]], dtype=torch.float32
    )
    torch.testing.assert_close(weights(paired=True), expected)
    own = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]])
    assert torch.equal(weights(paired=False), own)


@pytest.mark.parametrize("guided", [False, True])
def test_once_with_drawn_experts_is_the_pipelines_once(
    folder: Path, model: EnsembleModel, encoder: Encoder, guided: bool
) -> None:
    cond, null = encoder.condition(PROMPTS), encoder.condition([""])
    pipe = AtollPipeline.from_pretrained(folder)
    expected = pipe(
        PROMPTS, routing="once", seed=8, first=2, num_inference_steps=4, output_type="pt",
        guidance_scale=2.0 if guided else 1.0,
    ).images  # fmt: skip
    drawn = model.draw(cond, seed=8, first=2)
    assert len(drawn.unique()) > 1
    model.set_routing("once", experts=drawn.tolist(), paired=guided)
    x = x_noise(sample_settings(4, model.shards, seed=8, first=2), PICTURE.shape)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sampler.times(4)[:-1].tolist())
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            if guided:
                tokens = concatenate([null.expand(4), cond]).tokens
                v_0, v_c = model(x.repeat(2, 1, 1, 1), timestep, tokens).sample.chunk(2)
                v = sampler.guide(v_c, v_0, 2.0)
            else:
                v = model(x, timestep, cond.tokens).sample
            x = scheduler.step(v, timestep, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routing", "options", "said"),
    [
        ("once", {}, "cannot remember"),
        ("full>0.5,once", {"experts": [0]}, "from the posterior on the way"),
        ("full>0.5,sample:1", {}, "does not know where one begins"),
        ("sample:2", {}, "does not know where one begins"),
        ("full", {"experts": [0, 1]}, "takes no experts"),
        ("topk:1", {}, "Did you mean 'top-k'"),
        ("once", {"experts": [0, 3]}, "experts given"),
        ("once", {"experts": [-1]}, "experts given"),
        ("once", {"experts": []}, "experts given"),
        ("once", {"experts": [0.5]}, "experts given"),
        ("once", {"experts": [[0]]}, "experts given"),
    ],
)
def test_a_routing_that_needs_memory_is_refused_with_the_reason(
    model: EnsembleModel, routing: str, options: dict[str, Any], said: str
) -> None:
    before = model._stateless
    with pytest.raises(UsageError, match=said) as caught:
        model.set_routing(routing, **options)
    assert caught.value.allowed
    assert model._stateless is before


def changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: {**given, **changes}


CALLS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "another family's": (lambda given: {"hidden_states": given.pop("sample"), **given}, "called"),
    "ControlNet": (changed(mid_block_additional_residual=torch.ones(1)), "mid_block"),
    "an adapter's scale": (changed(cross_attention_kwargs={"scale": 1.0}), "cross_attention"),
    "no timestep": (changed(timestep=None), "no timestep"),
    "no tokens": (changed(encoder_hidden_states=None), "no token states"),
    "tokens of zeros": (lambda g: {**g, "encoder_hidden_states": g["encoder_hidden_states"] * 0},
                        "is empty"),
    "fewer captions": (lambda g: {**g, "encoder_hidden_states": g["encoder_hidden_states"][:2]},
                       "4 pictures are to be made of 2"),
    "another encoder's": (changed(encoder_hidden_states=torch.ones(4, 3, 7)), "7 wide"),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_a_call_that_cannot_be_is_refused(
    model: EnsembleModel, encoder: Encoder, what: str
) -> None:
    change, said = CALLS[what]
    given = call_of("unet", encoder.condition(PROMPTS), x_at(), 10.0)
    with pytest.raises(UsageError, match=said):
        model(**change(given))


def test_halves_that_are_no_pair_are_refused(model: EnsembleModel, encoder: Encoder) -> None:
    model.set_routing("top-k:1", paired=True)
    for count in (3, 4):
        with pytest.raises(UsageError, match="two branches"):
            model(x_at(count), 500.0, encoder.condition(PROMPTS[:count]).tokens)
    model.set_routing("once", experts=[0, 1, 0])
    with pytest.raises(UsageError, match="drawn for 3 pictures"):
        model(x_at(4), 500.0, encoder.condition(PROMPTS).tokens)
    # Twice as many are two branches of guidance only where that was said.
    model.set_routing("once", experts=[0, 1])
    with pytest.raises(UsageError, match="drawn for 2 pictures") as caught:
        model(x_at(4), 500.0, encoder.condition(PROMPTS).tokens)
    assert "paired=True" in (caught.value.allowed or "")


def test_a_dit_is_told_which_captions_are_empty(encoder: Encoder) -> None:
    model, cond = of_families("dit", "dit"), encoder.condition([*PROMPTS[:3], ""])
    given = call_of("dit", cond, x_at(), 500.0)
    with pytest.raises(UsageError, match="pooled vector"):
        model(**given)
    got, weights = heard(model, **given, is_null=cond.is_null)
    assert torch.equal(got.is_null, cond.is_null)
    torch.testing.assert_close(weights, model.gate(x_at(), torch.full((4,), 0.5), cond))
    with pytest.raises(UsageError, match="experts of unet read them"):
        of_families("dit", "unet")(**given, is_null=cond.is_null)


def test_a_family_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="'sd3'") as caught:
        EnsembleModel.from_pretrained(folder / "transformer", family="sd3")
    assert caught.value.allowed == "unet, pixart"


# -- the folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [None, "pixart"])
def test_saving_and_loading(folder: Path, tmp_path: Path, family: str | None) -> None:
    """Byte for byte; a family that was named is remembered."""
    model = EnsembleModel.from_pretrained(folder / "transformer", family=family)
    model.save_pretrained(tmp_path / "a")
    again = EnsembleModel.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert again.family == model.family
    same = sha256_folder(tmp_path / "a") == sha256_folder(folder / "transformer")
    assert same is (family is None)
    assert sha256_folder(tmp_path / "a") == sha256_folder(tmp_path / "b")


def test_a_folder_without_the_projection(folder: Path, tmp_path: Path) -> None:
    """As they were assembled before: the pipeline knows captions, a forward says what it lacks."""
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old/transformer" / PROJECTION_NAME).unlink()
    pipe = AtollPipeline.from_pretrained(tmp_path / "old")
    pipe("a bright dot", num_inference_steps=1)
    with pytest.raises(UsageError, match="atoll assemble"):
        pipe.transformer(x_at(), 10.0, pipe.text_encoder.condition(PROMPTS).tokens)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.ones(32, 5)},
        {"weight": torch.ones(32, 32), "code": torch.ones(32)},
        None,
    ],
)
def test_a_damaged_projection_is_refused(
    folder: Path, tmp_path: Path, tensors: dict[str, Tensor] | None
) -> None:
    shutil.copytree(folder / "transformer", tmp_path / "copy")
    path = tmp_path / "copy" / PROJECTION_NAME
    path.write_bytes(path.read_bytes()[:20]) if tensors is None else save_file(tensors, path)
    with pytest.raises(Refused, match=PROJECTION_NAME):
        EnsembleModel.from_pretrained(tmp_path / "copy")


def test_the_projection_moves_along_and_is_no_weight(model: EnsembleModel) -> None:
    assert [name for name, _ in model.named_children()] == ["networks", "gate", "text_projection"]
    assert not any(name.startswith("text_projection") for name in model.state_dict())
    moved = model.to("meta").text_projection
    assert moved is not None
    assert moved.weight is not None
    assert moved.weight.device.type == "meta"
