"""The same routings over real networks through the public interface: diffusers' and ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from atoll.cli.systems import Model, load_model, sample
from atoll.core import flow, sampler, seeds
from atoll.core.conditioning import concatenate
from atoll.core.denoiser import Denoiser
from atoll.core.digest import sha256_file, sha256_folder
from atoll.core.embedding import load_encoder
from atoll.core.errors import UsageError
from atoll.core.head import GateHead
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.core.trunk import Trunk
from atoll.router.assemble import assemble
from atoll.router.chooser import sample_settings, x_noise
from atoll.router.ensemble import Trajectory
from atoll.router.gate import Gate
from atoll.router.model import EnsembleModel
from atoll.router.routing import KINDS
from tests.router.conftest import PARTS

ROUTINGS = {
    "full": "full",
    "top-k": "top-k:2",
    "mass": "mass:0.8",
    "threshold": "threshold:0.1",
    "sample": "sample:2",
    "once": "once",
    "oracle": "oracle:shard-01",
}
PROMPTS = ["a grey square", "a bright dot", "", "something never seen"]
GUIDANCE = (1.0, 2.5)
STEPS = 4

# What a user types, in a process that has seen nothing of ours before.
SCRIPT = """
import json, sys, torch
import atoll.router
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
folder, saved, made = sys.argv[1:4]
pipeline = DiffusionPipeline.from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
assert type(pipeline).__name__ == "AtollPipeline"
cases = json.loads(sys.argv[4])
save_file({
    f"{routing} {guidance}": pipeline(
        prompts, routing=routing, guidance_scale=guidance, num_inference_steps=steps,
        seed=9, first=3, output_type="pt",
    ).images
    for routing, guidance, prompts, steps in cases
}, made)
pipeline.save_pretrained(saved)
"""


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("assembled") / "run"
    shutil.copytree(trained, place)
    assemble(Storage(place), Manifest.load(Storage(place)))
    return place / "ensemble"


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def fresh(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    """Every routing sampled by a fresh process, and the folder it saved."""
    place = tmp_path_factory.mktemp("fresh")
    cases = [(r, g, PROMPTS, STEPS) for r in ROUTINGS.values() for g in GUIDANCE]
    arguments = [str(folder), str(place / "saved"), str(place / "made"), json.dumps(cases)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 0, done.stderr
    return load_file(place / "made"), place / "saved"


def ours(model: Model, routing: str, guidance: float, **options: Any) -> Tensor:
    options = {"steps": STEPS, "seed": 9, "first": 3, **options}
    return sample(model, PROMPTS, routing=routing, guidance=guidance, **options).x_data


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


# -- diffusers' folder equals ours -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_the_folder_loaded_by_diffusers_equals_ours(
    fresh: tuple[dict[str, Tensor], Path], model: Model, kind: str, guidance: float
) -> None:
    theirs = fresh[0][f"{ROUTINGS[kind]} {guidance}"]
    assert theirs.shape == (4, 1, 8, 8)
    assert bool(theirs.isfinite().all())
    assert torch.equal(bits(theirs), bits(ours(model, ROUTINGS[kind], guidance)))


def test_routings_are_told_apart(fresh: tuple[dict[str, Tensor], Path]) -> None:
    """Or the comparison above would compare nothing."""
    made = fresh[0]
    for first in made:
        for second in made:
            assert first == second or not torch.equal(made[first], made[second])


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_a_trajectory_by_hand_is_the_same(
    fresh: tuple[dict[str, Tensor], Path], folder: Path, guidance: float
) -> None:
    """From the parts of the folder, without loading it as an ensemble."""
    shards = {name: records for name, (_, _, records) in PARTS.items()}
    place = folder / "transformer"
    encoder = load_encoder(folder / "text_encoder")
    experts = [Denoiser.load(place / "experts" / shard).velocity for shard in shards]
    trunk = Trunk.load(place / "trunk")
    heads = {shard: GateHead.load(place / "gate" / shard, trunk.config) for shard in shards}
    for routing in ("full", "once"):
        trajectory = Trajectory(
            experts,
            Gate(trunk, heads, shards),
            shards=list(shards),
            settings=sample_settings(
                len(PROMPTS), list(shards), routing=routing, guidance=guidance, seed=9, first=3
            ),
            cond=encoder.condition(PROMPTS),
            null=encoder.condition([""]),
        )
        noise = seeds.normal(9, "x_noise", first=3, count=4, shape=(1, 8, 8))
        made = sampler.euler(trajectory, noise, sampler.times(STEPS))
        assert torch.equal(bits(made), bits(fresh[0][f"{routing} {guidance}"]))


def digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): sha256_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_saving_writes_the_assembled_folder_back(
    fresh: tuple[dict[str, Tensor], Path], folder: Path, model: Model
) -> None:
    """Byte for byte, so that its digest still is the one in the ledger; and it loads again."""
    assert digests(fresh[1]) == digests(folder)
    assert str(folder) not in "".join(p.read_text() for p in fresh[1].rglob("*.json"))
    again = DiffusionPipeline.from_pretrained(fresh[1])
    made = again(
        PROMPTS, num_inference_steps=STEPS, seed=9, first=3, output_type="pt", routing="mass:0.8"
    )
    assert torch.equal(bits(made.images), bits(ours(model, "mass:0.8", 1.0)))


def test_saving_an_ensemble_with_missing_islands(trained: Path, tmp_path: Path) -> None:
    run = Storage(tmp_path / "run")
    shutil.copytree(trained, run.uri)
    manifest = Manifest.load(run)
    del manifest.experts["shard-02"]
    assemble(run, manifest)
    partial = DiffusionPipeline.from_pretrained(tmp_path / "run/ensemble")
    partial.save_pretrained(tmp_path / "saved")
    assert digests(tmp_path / "saved") == digests(tmp_path / "run/ensemble")
    card = json.loads((tmp_path / "saved/atoll.json").read_text())
    assert card["missing"] == ["shard-02"]
    assert not (tmp_path / "saved/transformer/experts/shard-02").exists()


def test_saved_over_an_older_one_nothing_of_what_has_left_it_stays(
    fresh: tuple[dict[str, Tensor], Path], trained: Path, tmp_path: Path
) -> None:
    run, saved = Storage(shutil.copytree(trained, tmp_path / "run")), tmp_path / "saved"
    shutil.copytree(fresh[1], saved)
    (saved / "transformer/experts/mine").mkdir()
    manifest = Manifest.load(run)
    del manifest.experts["shard-02"]
    assemble(run, manifest)
    partial = DiffusionPipeline.from_pretrained(tmp_path / "run/ensemble")
    partial.save_pretrained(saved)
    (saved / "transformer/experts/mine").rmdir()  # what was never ours is its owner's affair
    assert digests(saved) == digests(tmp_path / "run/ensemble")
    # Nor a gate of the other kind, or what an encoder had that now is without.
    shutil.copytree(saved / "transformer/trunk", saved / "transformer/joint")
    partial.transformer.text_projection = None
    partial.save_pretrained(saved)
    assert not (saved / "transformer/joint").exists()
    assert not (saved / "transformer/text_projection.safetensors").exists()


# -- the pipeline ----------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ROUTINGS.values())
def test_a_batch_can_be_cut(pipeline: Any, routing: str) -> None:
    options: dict[str, Any] = {
        "routing": routing, "num_inference_steps": 3, "guidance_scale": 2.0, "seed": 4,
        "output_type": "pt", "trace": True,
    }  # fmt: skip
    whole = pipeline(PROMPTS, **options)
    parts = [pipeline(PROMPTS[:1], **options), pipeline(PROMPTS[1:], first=1, **options)]
    # Other batch shapes are other kernels: the draws are the same, the last bits need not be.
    torch.testing.assert_close(
        torch.cat([p.images for p in parts]), whole.images, rtol=1e-3, atol=1e-3
    )
    for step, told in enumerate(whole.trace):
        weights = torch.cat([part.trace[step].weights for part in parts])
        torch.testing.assert_close(weights, told.weights, rtol=1e-3, atol=1e-4)


def test_what_a_user_of_diffusers_tries(pipeline: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    made = pipeline(PROMPTS, seed=4, **options)
    images, *_ = pipeline(PROMPTS, seed=np.int64(4), return_dict=False, **options)
    assert torch.equal(images, made.images)
    settings = sample_settings(len(PROMPTS), pipeline.transformer.shards, seed=4)
    given = x_noise(settings, pipeline.transformer.ensemble_config.picture.shape)
    assert torch.equal(pipeline(PROMPTS, latents=given, **options).images, made.images)
    with pytest.raises(UsageError, match="latents are"):
        pipeline(PROMPTS[:1], latents=given, **options)
    with pytest.raises(UsageError, match=r"seed=7"):
        pipeline(PROMPTS, generator=torch.Generator(), **options)
    numbers = {"guidance_scale": np.float32(1), "seed": np.int64(4), "callback_on_step_end": quiet}
    assert torch.equal(pipeline(PROMPTS, **numbers, **options).images, made.images)


def quiet(*_: Any) -> None:
    """A callback that changes nothing, and says so by nothing."""


def test_a_callback_may_end_it(pipeline: Any) -> None:
    seen = []

    def twice(pipe: Any, step: int, _t: Tensor, _told: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        pipe._interrupt = step == 1
        return {}

    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
    ended = pipeline("a bright dot", callback_on_step_end=twice, trace=True, **options)
    assert (seen, len(ended.trace)) == ([0, 1], 2)
    whole = pipeline("a bright dot", callback_on_step_end=quiet, trace=True, **options)
    assert len(whole.trace) == 4


def test_16_bit_noise_does_not_make_a_16_bit_path(pipeline: Any) -> None:
    settings = sample_settings(len(PROMPTS), pipeline.transformer.shards, seed=4)
    given = x_noise(settings, pipeline.transformer.ensemble_config.picture.shape).bfloat16()
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    made = pipeline(PROMPTS, latents=given, **options).images
    assert made.dtype == torch.float32
    assert torch.equal(made, pipeline(PROMPTS, latents=given.float(), **options).images)


def test_offloaded_components_are_brought_where_they_are_used(folder: Path) -> None:
    """accelerate brings a component when its forward is called; here other methods are."""
    pipe, brought = DiffusionPipeline.from_pretrained(folder), []

    class Hook(ModelHook):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.name, self.execution_device = name, torch.device("cpu")

        def pre_forward(self, module: Any, *given: Any, **named: Any) -> Any:
            if self.name not in brought:
                brought.append(self.name)
            return super().pre_forward(module, *given, **named)

    expected = pipe(PROMPTS, num_inference_steps=2, output_type="pt").images
    for name in ("text_encoder", "transformer"):
        assert name in pipe.model_cpu_offload_seq
        add_hook_to_module(getattr(pipe, name), Hook(name))
    made = pipe(PROMPTS, num_inference_steps=2, output_type="pt").images
    assert brought == ["text_encoder", "transformer"]
    assert torch.equal(made, expected)


def test_concurrent_calls_do_not_disturb_one_another(pipeline: Any) -> None:
    """Other steps, routings, guidance and seeds at once on one pipeline: the same bits as alone."""
    cases: list[dict[str, Any]] = [
        {"prompt": PROMPTS[: 1 + i % 3], "num_inference_steps": 2 + i % 4, "seed": i,
         "routing": list(ROUTINGS.values())[i % 7], "guidance_scale": GUIDANCE[i % 2],
         "output_type": "pt"}
        for i in range(14)
    ]  # fmt: skip
    alone = [pipeline(**case).images for case in cases]
    with ThreadPoolExecutor(6) as pool:
        together = [made.images for made in pool.map(lambda case: pipeline(**case), cases)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert pipeline.scheduler.step_index is None, "the pipeline's own was never started"


def test_pictures(pipeline: Any) -> None:
    made = pipeline("a bright dot", num_images_per_prompt=3, num_inference_steps=2)
    assert made.trace is None
    assert [type(image) for image in made.images] == [Image.Image] * 3
    x_data = pipeline(["a bright dot"] * 3, num_inference_steps=2, output_type="pt", trace=True)
    assert len(x_data.trace) == 2
    for image, x in zip(made.images, x_data.images, strict=True):
        assert (image.mode, image.size) == ("L", (8, 8))
        grey = np.asarray(image, dtype=np.float64) / 127.5 - 1
        np.testing.assert_allclose(grey, x[0].clamp(-1, 1).numpy(), atol=1 / 127.5)
    assert len({image.tobytes() for image in made.images}) == 3, "each picture has its own noise"


def test_the_seed_decides(pipeline: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "routing": "once"}
    state = torch.get_rng_state()
    a = pipeline(PROMPTS, seed=1, **options).images
    torch.manual_seed(99)
    b = pipeline(PROMPTS, seed=1, **options).images
    c = pipeline(PROMPTS, seed=2, **options).images
    torch.set_rng_state(state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"routing": "topk:2"}, "Did you mean 'top-k'"),
        ({"routing": "oracle:shard-03"}, "There is no shard 'shard-03'"),
        ({"output_type": "np"}, "output_type is 'np'"),
        ({"prompt": []}, "No picture"),
        ({"num_images_per_prompt": 0}, "No picture"),
        ({"prompt": None}, "No picture"),
        ({"prompt": [3]}, "The prompt is [3]"),
        ({"guidance_scale": None}, "The guidance is None"),
        ({"guidance_scale": "2"}, "The guidance is '2'"),
        ({"seed": None}, "The seed is None"),
        ({"seed": 1.7}, "The seed is 1.7"),
        ({"seed": True}, "The seed is True"),
        ({"routing": 3}, "The routing is 3"),
        ({"seed": [7], "num_images_per_prompt": 2}, "2 times the same"),
    ],
)
def test_wrong_arguments_list_the_choices(
    pipeline: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        pipeline(**{"prompt": "a bright dot", "num_inference_steps": 1, **options})
    assert said in caught.value.what
    assert caught.value.allowed


@pytest.mark.parametrize("prompt", ["$math$", "日本語 🦊", "\x00\ud800", "long " * 3000, " "])
def test_hostile_prompts(pipeline: Any, prompt: str) -> None:
    made = pipeline(prompt, num_inference_steps=1, output_type="pt").images
    assert bool(made.isfinite().all())


# -- one shard -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["shard-00", "shard-01", "shard-02"])
def alone(request: Any, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which one island has finished: UNet, PixArt, and a UNet that predicts x_data."""
    run = Storage(tmp_path_factory.mktemp("alone") / request.param)
    shutil.copytree(trained, run.uri)
    manifest = Manifest.load(run)
    manifest.experts = {request.param: manifest.experts[request.param]}
    assemble(run, manifest)
    return Path(run.uri)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_one_shard_ensemble_is_its_expert_bitwise(alone: Path, guidance: float) -> None:
    """Under every routing, through our sampler and through diffusers."""
    shard = alone.name
    model = load_model(str(alone))
    expert = Denoiser.load(alone / f"islands/{shard}/expert")
    cond = model.encoder.condition(PROMPTS)
    null = model.encoder.condition([""]).expand(len(PROMPTS))

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        if guidance == 1:
            return expert.velocity(x_t, t, cond)
        v = expert.velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), concatenate([cond, null]))
        return sampler.guide(*v.chunk(2), guidance)

    noise = seeds.normal(9, "x_noise", first=3, count=4, shape=(1, 8, 8))
    with torch.no_grad():
        expected = sampler.euler(velocity, noise, sampler.times(STEPS))
    as_model = load_model(str(alone / f"islands/{shard}/expert"))
    assert torch.equal(bits(ours(as_model, "full", guidance)), bits(expected))
    pipe = DiffusionPipeline.from_pretrained(alone / "ensemble")
    for routing in ROUTINGS.values():
        routing = f"oracle:{shard}" if routing.startswith("oracle") else routing
        assert torch.equal(bits(ours(model, routing, guidance)), bits(expected)), routing
        theirs = pipe(
            PROMPTS, routing=routing, guidance_scale=guidance, num_inference_steps=STEPS,
            seed=9, first=3, output_type="pt",
        )  # fmt: skip
        assert torch.equal(bits(theirs.images), bits(expected)), routing


# -- dtypes ----------------------------------------------------------------------------------------


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16),
        lambda folder: DiffusionPipeline.from_pretrained(folder).to(torch.bfloat16),
        lambda folder: DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16),
        lambda folder: DiffusionPipeline.from_pretrained(folder).to(torch.float64),
    ],
    ids=["load bfloat16", "cast bfloat16", "load float16", "cast float64"],
)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_other_dtypes(
    folder: Path, pipeline: Any, load: Callable[[Path], Any], guidance: float
) -> None:
    """Experts in 16 bits; path, odds and pictures stay in float32 and near the float32 ones."""
    options: dict[str, Any] = {
        "num_inference_steps": 3, "guidance_scale": guidance, "output_type": "pt", "seed": 1,
        "trace": True,
    }  # fmt: skip
    pipe = load(folder)
    assert {w.dtype for w in pipe.transformer.gate.parameters()} == {torch.float32}
    made, exact = pipe(PROMPTS, **options), pipeline(PROMPTS, **options)
    assert made.images.dtype == torch.float32
    assert relative(made.images, exact.images) < 0.05
    for a, b in zip(made.trace, exact.trace, strict=True):
        assert a.gate_weights.dtype == torch.float32
        torch.testing.assert_close(a.gate_weights, b.gate_weights, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"expert_byte": 1}, "Did you mean 'expert_bytes'"),
        ({"torch_dtype": "auto"}, "torch_dtype is 'auto'"),
        ({"device_map": "balanced"}, "device_map='balanced'"),
        ({"variant": "fp16"}, "variant='fp16'"),
    ],
)
def test_what_an_ensemble_is_not_loaded_by_is_refused(
    folder: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        EnsembleModel.from_pretrained(folder / "transformer", **options)
    assert said in str(caught.value)


def test_in_the_dtype_of_its_files_an_ensemble_is_saved_byte_for_byte(
    folder: Path, tmp_path: Path
) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for name in ("one", "other"):
        pipe.save_pretrained(tmp_path / name)
        pipe = DiffusionPipeline.from_pretrained(tmp_path / name, torch_dtype=torch.bfloat16)
    assert digests(tmp_path / "one") == digests(tmp_path / "other")


def test_loading_in_16_bits_leaves_the_files_alone(folder: Path) -> None:
    before = sha256_folder(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert pipe.transformer.networks[0].dtype == torch.bfloat16
    assert sha256_folder(folder) == before


def test_a_16_bit_expert_converts_its_prediction_in_float32(folder: Path) -> None:
    """(x_t - x_data) / t near t = 0 would magnify the rounding of x_t to bfloat16."""
    expert = Denoiser.load(folder / "transformer/experts/shard-02")
    expert.network.to(torch.bfloat16)
    cond = load_model(str(folder)).encoder.condition(["a bright dot"])
    x_t, t = seeds.normal(0, "x", first=0, count=1, shape=(1, 8, 8)), torch.tensor([1 / 64])
    with torch.no_grad():
        v = expert.velocity(x_t, t, cond)
        weight = expert.network.conv_in.weight
        x_data = expert.output(x_t.to(weight), t, cond.to(weight)).float()
    assert v.dtype == torch.float32
    assert torch.equal(v, flow.x_data_to_velocity(x_data, x_t, t))


def test_the_ensemble_moves_as_one(folder: Path) -> None:
    model = EnsembleModel.from_pretrained(folder / "transformer").to("meta")
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert model.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("routing", ROUTINGS.values())
def test_on_an_accelerator(folder: Path, pipeline: Any, routing: str) -> None:
    options: dict[str, Any] = {
        "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt", "routing": routing
    }  # fmt: skip
    pipe = DiffusionPipeline.from_pretrained(folder).to("cuda")
    made = pipe(PROMPTS, **options).images
    assert made.device.type == "cuda"
    assert relative(made.cpu(), pipeline(PROMPTS, **options).images) < 0.02
