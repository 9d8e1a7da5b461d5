"""What diffusers makes of soups with its other libraries: transformers, and peft for adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atoll.core.digest import sha256_file
from atoll.merge import exact, soup
from atoll.merge.lora import FILE_NAME
from atoll.merge.recipe import Settings
from atoll.merge.verify import verify

# diffusers has none of these classes without it; `pip install 'atoll[pipelines]'`.
pytest.importorskip("transformers")
pytest.importorskip("peft")

PARTS = {
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
}


def moved(network: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.02 * torch.randn(value.shape, generator=generator).to(value))
    return network


def stable_diffusion(folder: Path, seed: int, dtype: torch.dtype) -> Path:
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder.mkdir(parents=True)
    words = folder / "words"
    words.mkdir()
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, bos_token_id=52, eos_token_id=53,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8,
        attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    whole = StableDiffusionPipeline(
        vae=moved(vae, seed), unet=moved(unet, seed), text_encoder=moved(text, seed),
        tokenizer=CLIPTokenizer(
            str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=8
        ),
        scheduler=PNDMScheduler(skip_prk_steps=True), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    whole.to(dtype).save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stable_diffusion_pipeline_is_merged_loaded_and_run(tmp_path: Path, dtype) -> None:
    from diffusers import StableDiffusionPipeline

    paths = [stable_diffusion(tmp_path / name, seed, dtype) for seed, name in enumerate("abc")]
    # Three of one name: what they are called is what lies above.
    for path in paths:
        path.rename(path.parent / f"model-{path.parent.name}")
    paths = [path.parent / f"model-{path.parent.name}" for path in paths]
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1))
    for part in PARTS:
        mean, *values = (load_file(path / part) for path in (made.place, *paths))
        for name, value in mean.items():
            if value.is_floating_point():
                assert torch.equal(value, exact.mean([v[name] for v in values], [1, 1, 1])), name
            else:
                assert torch.equal(value, values[0][name])
    for tokens in (made.place / "tokenizer").iterdir():
        assert sha256_file(tokens) == sha256_file(paths[0] / "tokenizer" / tokens.name)
    assert verify(made.place).holds

    loaded = StableDiffusionPipeline.from_pretrained(made.place, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    state = loaded.text_encoder.state_dict()
    for name, value in load_file(made.place / "text_encoder/model.safetensors").items():
        name = name if name in state else name.removeprefix("text_model.")
        assert torch.equal(state[name], value.float())
    image = loaded(
        "a cat", num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert image.shape == (1, 8, 8, 3)


def test_diffusers_loads_the_mean_with_the_scale_that_is_meant(tmp_path, make_expert):
    """By the networks' outputs: of the mean of adapters, and of the base moved by all of them."""
    from diffusers import UNet2DConditionModel

    base = make_expert("base")
    layers = ["up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
              "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]  # fmt: skip
    states = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        states.append({
            f"unet.{layer}.{half}.weight": torch.randn(shape, generator=generator)
            for number, layer in enumerate(layers)
            for half, shape in (("lora_A", (1 + number, 8)), ("lora_B", (8, 1 + number)))
        })  # fmt: skip
    paths = [saved(tmp_path / f"{n}.safetensors", s) for n, s in zip("abc", states, strict=True)]
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1))
    loaded = UNet2DConditionModel.from_pretrained(base)
    wanted = UNet2DConditionModel.from_pretrained(base)
    with torch.no_grad():
        for layer in layers:
            mean = sum(product_of(state, f"unet.{layer}") for state in states) / 3
            wanted.get_submodule(layer).weight.add_(mean.float())
    loaded.load_lora_adapter(made.place, weight_name=FILE_NAME, prefix="unet")
    given = torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.randn(1, 2, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(*given).sample, wanted(*given).sample, rtol=1e-4, atol=1e-5
        )


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path)
    return path


def product_of(state: dict[str, Tensor], layer: str) -> Tensor:
    return state[f"{layer}.lora_B.weight"].double() @ state[f"{layer}.lora_A.weight"].double()


def test_baked_adapters_are_what_diffusers_fuses(tmp_path, make_expert):
    """Into one network, and into two of a pipeline."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    base = make_expert("base", kind="base", shard=None, base_sha256=None)
    layer = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    paths = []
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        state = {
            f"unet.{layer}.{half}.weight": torch.randn(shape, generator=generator)
            for half, shape in (("lora_A", (2, 8)), ("lora_B", (8, 2)))
        }
        paths.append(saved(tmp_path / f"{name}.safetensors", state))
    asked = Settings(method="bake", scale=2)  # each at full strength
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), asked, base=base)
    fused = UNet2DConditionModel.from_pretrained(base)
    for path in paths:
        fused.load_lora_adapter(path.parent, weight_name=path.name, prefix="unet")
        fused.fuse_lora()
        fused.unload_lora()
    baked = UNet2DConditionModel.from_pretrained(made.place).state_dict()
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(baked[name], value, rtol=1e-5, atol=1e-6)

    whole = stable_diffusion(tmp_path / "sd", 0, torch.float32)
    loaded = StableDiffusionPipeline.from_pretrained(whole)
    state = {}
    for prefix, network in (("unet", loaded.unet), ("text_encoder", loaded.text_encoder)):
        called = next(n for n, m in network.named_modules() if n.endswith(("to_q", "q_proj")))
        rows, columns = network.get_submodule(called).weight.shape
        state[f"{prefix}.{called}.lora_A.weight"] = torch.randn(3, columns)
        state[f"{prefix}.{called}.lora_B.weight"] = torch.randn(rows, 3)
    lora = saved(tmp_path / "both.safetensors", state)
    made = soup.create(tmp_path / "whole", {lora: 1}, Settings(method="bake"), base=whole)
    loaded.load_lora_weights(tmp_path, weight_name=lora.name)
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    baked = StableDiffusionPipeline.from_pretrained(made.place)
    for part in ("unet", "text_encoder"):
        found = getattr(baked, part).state_dict()
        moved_ones = 0
        start = getattr(StableDiffusionPipeline.from_pretrained(whole), part).state_dict()
        for name, value in getattr(loaded, part).state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
            moved_ones += not torch.equal(value, start[name])
        assert moved_ones == 1, part
