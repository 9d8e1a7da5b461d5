"""The encoder: seeded fit, bitwise records, token states against open_clip, specifications."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from atoll.core.embedding import (
    Encoder,
    FitConfig,
    encoder_from_spec,
    fit,
    load_encoder,
)
from atoll.core.errors import AtollError, ConfigError, ExitCode, MissingError, Refused, UsageError

CAPTIONS = ["", "a red square", "a blue square with a very long caption " * 3, "ein Öl 漢字", "  "]
TINY = FitConfig(steps=4, batch=8, width=32, layers=1, warmup=2)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def pictures(n: int = 12) -> list[Image.Image]:
    colours = np.random.default_rng(0).integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)
    return [Image.fromarray(colour) for colour in colours]


def fitted(seed: int = 0, config: FitConfig = TINY) -> Encoder:
    captions = [CAPTIONS[1 + i % 3] for i in range(12)]
    return fit(pictures(), captions, config, seed=seed)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return fitted()


@pytest.fixture
def saved(encoder: Encoder, tmp_path: Path) -> Path:
    encoder.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As HF_HUB_OFFLINE=1 with an empty cache would make it, which is read on import."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def no_network(*_: Any, **__: Any) -> Any:
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", no_network)


# -- embedding -----------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_of_open_clip(encoder: Encoder) -> None:
    images, ids = pictures(5), encoder._tokenize(CAPTIONS)
    with torch.no_grad():
        pixels = torch.stack([encoder._transform(image) for image in images])
        wanted_images = functional.normalize(encoder.clip.encode_image(pixels), dim=1)
        wanted_text = functional.normalize(encoder.clip.encode_text(ids), dim=1)
    assert torch.equal(encoder.embed_images(images), wanted_images)
    assert torch.equal(encoder.embed_text(CAPTIONS), wanted_text)
    assert encoder.dim == wanted_text.shape[1] == 32
    torch.testing.assert_close(wanted_text.norm(dim=1), torch.ones(len(CAPTIONS)))


def test_state_at_end_of_text_projects_to_the_pooled_vector(encoder: Encoder) -> None:
    c = encoder.condition(CAPTIONS)
    rows = torch.arange(len(CAPTIONS))
    with torch.no_grad():
        pooled = c.tokens[rows, c.mask.sum(dim=1) - 1] @ encoder.clip.text_projection
    torch.testing.assert_close(functional.normalize(pooled, dim=1), c.pooled)
    assert encoder.text_width == c.tokens.shape[2]


def test_mask_ends_with_end_of_text_and_the_rest_is_0(encoder: Encoder) -> None:
    c, ids = encoder.condition(CAPTIONS), encoder._tokenize(CAPTIONS)
    tokenizer = open_clip.SimpleTokenizer(context_length=TINY.context_length)
    for row, mask, states in zip(ids.tolist(), c.mask.tolist(), c.tokens, strict=True):
        end = row.index(tokenizer.eot_token_id)
        assert mask == [place <= end for place in range(TINY.context_length)]
        assert (states[end + 1 :] == 0).all()
        assert (states[: end + 1].abs().sum(dim=1) > 0).all()
    assert c.mask.sum(dim=1).tolist()[0] == 2  # start and end alone
    assert c.mask.sum(dim=1).tolist()[2] == TINY.context_length  # cut off, end kept
    assert c.is_null.tolist() == [True, False, False, False, True]  # blanks say nothing either


def test_what_follows_end_of_text_does_not_reach_what_is_kept(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, tokenize = encoder.condition(CAPTIONS[:2]), encoder._tokenize

    def padded(captions: list[str]) -> torch.Tensor:
        ids = tokenize(captions)
        return torch.where(ids == 0, 77, ids)

    monkeypatch.setattr(encoder, "_tokenize", padded)
    after = encoder.condition(CAPTIONS[:2])
    torch.testing.assert_close(after.tokens, before.tokens)
    assert torch.equal(after.mask, before.mask)


def test_no_captions_are_refused(encoder: Encoder) -> None:
    with pytest.raises(UsageError, match="nothing to embed"):
        encoder.condition([])


def test_rows_do_not_depend_on_their_batch(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, captions = pictures(7), CAPTIONS + CAPTIONS[1:3]
    whole, text = encoder.embed_images(images), encoder.condition(captions)
    monkeypatch.setattr("atoll.core.embedding._BATCH", 3)
    torch.testing.assert_close(encoder.embed_images(images), whole)
    cut = encoder.condition(captions)
    torch.testing.assert_close(cut.tokens, text.tokens)
    assert torch.equal(cut.mask, text.mask)
    assert torch.equal(cut.is_null, text.is_null)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I", "LA"])
def test_pictures_of_every_mode_and_size_are_embedded(encoder: Encoder, mode: str) -> None:
    image = Image.new(mode, (31, 7))
    assert torch.isfinite(encoder.embed_images([image])).all()


# -- fit -----------------------------------------------------------------------------------------


def test_fit_is_bitwise_the_same_for_a_seed_and_leaves_the_global_one(encoder: Encoder) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    again, other = fitted(), fitted(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.fingerprint() == encoder.fingerprint()
    assert other.fingerprint() != encoder.fingerprint()
    for name, value in again.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name])


def test_fit_learns_to_tell_its_captions_apart() -> None:
    n = 32
    images = [Image.new("L", (8, 8), 255 if i % 2 else 0) for i in range(n)]
    captions = ["white" if i % 2 else "black" for i in range(n)]
    config = FitConfig(steps=40, batch=16, width=32, layers=1, warmup=5)
    made = fit(images, captions, config, seed=0)
    similar = made.embed_images(images) @ made.embed_text(["black", "white"]).T
    assert similar.argmax(dim=1).tolist() == [i % 2 for i in range(n)]


def test_fit_with_fewer_pairs_than_a_batch(encoder: Encoder) -> None:
    made = fit(pictures(3), ["a", "b", "a"], TINY, seed=0)
    assert made.dim == encoder.dim


# -- on disk -------------------------------------------------------------------------------------


def test_saved_and_loaded_is_bitwise_the_same(encoder: Encoder, saved: Path) -> None:
    loaded = load_encoder(saved)
    assert loaded.fingerprint() == encoder.fingerprint()
    assert not loaded.training
    assert torch.equal(loaded.embed_images(pictures(3)), encoder.embed_images(pictures(3)))
    one, other = loaded.condition(CAPTIONS), encoder.condition(CAPTIONS)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.pooled, other.pooled)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", WEIGHTS]


def test_fingerprint_sees_weights_and_preprocessing(encoder: Encoder, saved: Path) -> None:
    moved = load_encoder(saved)
    with torch.no_grad():
        moved.clip.logit_scale += 1e-6
    assert moved.fingerprint() != encoder.fingerprint()
    values = json.loads((saved / "config.json").read_text())
    values["preprocess"]["interpolation"] = "bilinear"
    (saved / "config.json").write_text(json.dumps(values))
    assert load_encoder(saved).fingerprint() != encoder.fingerprint()


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
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


STRANGE: dict[str, Callable[[Path], Any]] = {
    "key missing": _weights(lambda w: w.pop("clip.positional_embedding")),
    "key too many": _weights(lambda w: w.update(surprise=torch.zeros(1))),
    "other shape": _weights(lambda w: w.update({"clip.ln_final.bias": torch.zeros(3)})),
    "torn weights": lambda f: (f / WEIGHTS).write_bytes(b"abc"),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "no config": lambda f: (f / "config.json").unlink(),
    "torn config": lambda f: (f / "config.json").write_text("{"),
    "list": _config(lambda c: [c]),
    "other class": _config(lambda c: c | {"_class_name": "UNet2DModel"}),
    "no model": _config(lambda c: {k: v for k, v in c.items() if k != "model"}),
    "empty model": _config(lambda c: c | {"model": {}}),
    "other model": _config(lambda c: c | {"model": c["model"] | {"surprise": 1}}),
    "other preprocessing": _config(lambda c: c | {"preprocess": {"surprise": 1}}),
}


@pytest.mark.parametrize("how", STRANGE)
@pytest.mark.usefixtures("offline")
def test_stranger_is_refused_with_a_sentence(saved: Path, how: str) -> None:
    STRANGE[how](saved)
    with pytest.raises(AtollError) as caught:
        load_encoder(saved)
    assert isinstance(caught.value, Refused | MissingError)
    assert str(saved) in str(caught.value)


# -- specifications ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fitt", "Did you mean 'fit'?"),
        ("ViT-B-33/openai", "Did you mean 'ViT-B-32'?"),
        ("ViT-B-32/opena", "Did you mean 'openai'?"),
        ("ViT-B-32", "ARCHITECTURE/PRETRAINED"),
        ("", "hf-hub:ORG/NAME"),
        ("ViT-B-32/", "ARCHITECTURE/PRETRAINED"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "hf_model_name"),
        ("ViT-B-16-SigLIP/webli", "hf_tokenizer_name"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "not causal"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_unknown_or_unsupported_encoder_is_a_configuration_error(spec: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        encoder_from_spec(spec)
    assert caught.value.exit_code == ExitCode.CONFIGURATION == 3
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "ViT-B-32/laion2b_s34b_b79k",
        "ViT-B-32/openai",
        "hf-hub:nobody/nothing",
        "hf-hub:",
        "local-dir:/nowhere",
        "local-dir:",
    ],
)
@pytest.mark.usefixtures("offline")
def test_weights_out_of_reach_are_missing_and_the_cure_is_said(spec: str) -> None:
    with pytest.raises(MissingError, match=r"not within reach.*Cure: give local-dir") as caught:
        encoder_from_spec(spec)
    assert caught.value.exit_code == ExitCode.MISSING == 5


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.usefixtures("offline")
def test_local_folder_of_open_clip_embeds_as_open_clip_does(
    tmp_path: Path, encoder: Encoder, custom_text: bool
) -> None:
    model = {**encoder.config.model, "quick_gelu": True}
    if custom_text:
        model["custom_text"] = True
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    torch.manual_seed(0)
    theirs = kind(**{k: v for k, v in model.items() if k != "custom_text"}).eval()
    preprocess = {**encoder.config.preprocess, "mean": [0.1, 0.2, 0.3]}
    preprocess.pop("size")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": preprocess})
    )
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    made = encoder_from_spec(f"local-dir:{tmp_path}")
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in pictures(4)])
        images = functional.normalize(theirs.encode_image(pixels), dim=1)
        ids = open_clip.tokenize(CAPTIONS, context_length=TINY.context_length)
        text = functional.normalize(theirs.encode_text(ids), dim=1)
    assert torch.equal(made.embed_images(pictures(4)), images)
    assert torch.equal(made.embed_text(CAPTIONS), text)
    made.save_pretrained(tmp_path / "ours")
    loaded = load_encoder(tmp_path / "ours")
    assert loaded.fingerprint() == made.fingerprint()
    assert torch.equal(loaded.embed_images(pictures(4)), images)


@pytest.mark.usefixtures("offline")
def test_local_folder_with_a_foreign_text_tower_is_refused(
    tmp_path: Path, encoder: Encoder
) -> None:
    model = json.loads(json.dumps(dict(encoder.config.model)))
    model["text_cfg"]["no_causal_mask"] = True
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {}})
    )
    save_file(encoder.clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(AtollError):
        encoder_from_spec(f"local-dir:{tmp_path}")
