"""Adapters in their base, held against fractions element by element."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core.digest import sha256_folder
from atoll.core.errors import Refused, UsageError
from atoll.merge import bake, exact, soup
from atoll.merge.model import FILE_NAME
from atoll.merge.recipe import Block, Settings
from atoll.merge.verify import verify
from benchmarks.rounding import rounded

BAKED = Settings(method="bake")
LINEAR, CONV = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"


def saved(path: Path, state: dict[str, Tensor], **told: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    metadata = {"lora_adapter_metadata": json.dumps(told)} if told else None
    save_file(state, path, metadata=metadata)
    return path


def halves(
    stem: str, shape: Sequence[int], rank: int, seed: int, *, kohya: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:  # fmt: skip
    """A and B for a weight of that shape; in kohya's names with an alpha."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator).to(dtype)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator).to(dtype)
    if kohya is None:
        return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    return {
        f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": torch.tensor(kohya),
    }  # fmt: skip


def products(state: dict[str, Tensor], stem: str) -> list[list[Fraction]]:
    down, up = (
        next(v for k, v in state.items() if k.startswith(stem) and f".{half}" in k)
        for half in (("lora_A", "lora_B") if f"{stem}.lora_A.weight" in state
                     else ("lora_down", "lora_up"))
    )  # fmt: skip
    rows, columns = (half.flatten(1).double().tolist() for half in (up, down))
    return [
        [sum(Fraction(b) * Fraction(a) for b, a in zip(row, column, strict=True))
         for column in zip(*columns, strict=True)]
        for row in rows
    ]  # fmt: skip


def wanted(
    value: Tensor, parts: Sequence[tuple[Fraction, list[list[Fraction]]]], dtype: torch.dtype
) -> Tensor:
    flat = value.double().flatten(1).tolist()
    found = [
        [rounded(Fraction(w) + sum(part * p[i][j] for part, p in parts), dtype) + 0.0
         for j, w in enumerate(row)]
        for i, row in enumerate(flat)
    ]  # fmt: skip
    return torch.tensor(found, dtype=torch.float64).to(dtype).view(value.shape)


def tensors(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


def test_every_element_is_the_exact_one_rounded_once(make_expert, tmp_path):
    """In a linear layer and in a convolution, of adapters of several ranks, alphas and weights."""
    base = make_expert("base", kind="base", shard=None, base_sha256=None)
    state = tensors(base)
    shapes = {stem: state[f"{stem}.weight"].shape for stem in (LINEAR, CONV)}
    one = halves(f"unet.{LINEAR}", shapes[LINEAR], 3, 0) | halves(
        f"unet.{CONV}", shapes[CONV], 2, 1
    )
    two = halves(f"unet.{LINEAR}", shapes[LINEAR], 1, 2)
    paths = [saved(tmp_path / "a.safetensors", one), saved(tmp_path / "b.safetensors", two)]
    asked = Settings(method="bake", scale=1.5)
    made = soup.create(tmp_path / "soup", {paths[0]: 1, paths[1]: 2}, asked, base=base)
    found = tensors(made.place)
    third = Fraction(3, 2) / 3
    parts = {
        LINEAR: [(third, products(one, f"unet.{LINEAR}")),
                 (2 * third, products(two, f"unet.{LINEAR}"))],
        CONV: [(third, products(one, f"unet.{CONV}"))],
    }  # fmt: skip
    for name, value in state.items():
        stem = name.removesuffix(".weight")
        right = wanted(value, parts[stem], value.dtype) if stem in parts else value + 0.0
        assert torch.equal(found[name], right), name
    assert verify(made.place).holds
    assert {f.name for f in Path(made.place).iterdir()} == {
        "config.json", "soup.json", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    assert made.card is None
    assert made.recipe.base == "base"
    UNet2DConditionModel.from_pretrained(made.place)


@settings(max_examples=60, deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(exact.DTYPES), min_size=1, max_size=3),
    own=st.sampled_from(exact.DTYPES),
    target=st.sampled_from(["same", "float32", "bfloat16", "float16"]),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    alpha=st.floats(0.125, 64, width=16),
    seed=st.integers(0, 99),
    small=st.booleans(),
    opposite=st.booleans(),
)
def test_of_any_dtypes_and_where_products_cancel(
    tmp_path_factory, dtypes, own, target, weights, alpha, seed, small, opposite
):
    folder = tmp_path_factory.mktemp("bake")
    shape = (5, 7)
    generator = torch.Generator().manual_seed(seed)
    value = (torch.randn(shape, generator=generator) * (1e-6 if small else 1)).to(own)
    states = [
        halves("x", shape, 1 + n, seed + n, dtype=dtype, kohya=alpha)
        for n, dtype in enumerate(dtypes)
    ]
    if opposite and len(states) > 1:  # all but what the others leave is taken away again
        states[1] = dict(states[0])
        states[1]["x.lora_up.weight"] = -states[0]["x.lora_up.weight"]
        weights[1] = weights[0]
    base = saved(folder / "base.safetensors", {"x.weight": value})
    paths = [saved(folder / f"{n}.safetensors", state) for n, state in enumerate(states)]
    experts = dict(zip(paths, weights, strict=False))
    made = soup.create(folder / "soup", experts, Settings(method="bake", dtype=target), base=base)
    dtype = own if target == "same" else getattr(torch, target)
    total = sum(weights[: len(states)])
    parts = [
        (Fraction(alpha) / len(state["x.lora_down.weight"]) * weight / total, products(state, "x"))
        for state, weight in zip(states, weights, strict=False)
    ]
    found = load_file(Path(made.place) / FILE_NAME)["x.weight"]
    right = wanted(value, parts, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, right)
    assert not bool(torch.signbit(found[found == 0]).any())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The elements that fractions are asked for."""
    found: list[tuple[int, int]] = []
    element = bake.Layer.element

    def counted(self: bake.Layer, row: int, column: int) -> Fraction:
        found.append((row, column))
        return element(self, row, column)

    monkeypatch.setattr(bake.Layer, "element", counted)
    return found


def test_where_bounds_do_not_tell_fractions_do(tmp_path, monkeypatch, asked):
    """Midpoints of two neighbours, which no bound ever tells."""
    value = torch.ones(2, 4)
    up, down = torch.tensor([[2.0**-24], [3 * 2.0**-24]]), torch.tensor([[1.0, 1.0, -0.5, 0.5]])
    base = saved(tmp_path / "base.safetensors", {"x.weight": value})
    lora = saved(tmp_path / "a.safetensors", {"x.lora_A.weight": down, "x.lora_B.weight": up})
    monkeypatch.setattr(bake, "_AT_ONCE", 2)
    made = soup.create(tmp_path / "soup", {lora: 1}, BAKED, base=base)
    found = load_file(Path(made.place) / FILE_NAME)["x.weight"]
    step = 2.0**-23
    assert found.tolist() == [
        [1, 1, 1, 1],
        [1 + 2 * step, 1 + 2 * step, 1 - step, 1 + step],
    ]
    assert sorted(asked) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_pieces_of_any_size_are_the_same(make_expert, tmp_path, monkeypatch):
    base = make_expert("base", kind="base", shard=None, base_sha256=None)
    state = tensors(base)
    lora = saved(
        tmp_path / "a.safetensors",
        halves(LINEAR, state[f"{LINEAR}.weight"].shape, 4, 0)
        | halves(CONV, state[f"{CONV}.weight"].shape, 4, 1),
    )
    expected = sha256_folder(Path(soup.create(tmp_path / "s", {lora: 1}, BAKED, base=base).place))
    for pieces, at_once in ((28, 3), (4096, 1 << 18), (1 << 23, 5)):
        monkeypatch.setattr("atoll.merge.stream._PIECE_BYTES", pieces)
        monkeypatch.setattr(bake, "_AT_ONCE", at_once)
        assert sha256_folder(
            Path(soup.create(tmp_path / "s", {lora: 1}, BAKED, base=base).place)
        ) == expected  # fmt: skip


def test_what_was_never_trained_adds_nothing_and_costs_nothing(tmp_path, asked):
    """B = 0, as adapters start: ties of the base are no reason to ask fractions."""
    value = torch.randn(16, 8).half()
    up, down = torch.zeros(16, 2), torch.randn(2, 8)
    up[3], down[:, 5] = 1.0, 0.0
    base = saved(tmp_path / "base.safetensors", {"x.weight": value})
    lora = saved(tmp_path / "a.safetensors", {"x.lora_A.weight": down, "x.lora_B.weight": up})
    made = soup.create(
        tmp_path / "soup", {lora: 1}, Settings(method="bake", dtype="bfloat16"), base=base
    )
    found = load_file(Path(made.place) / FILE_NAME)["x.weight"]
    state = load_file(lora)
    right = wanted(value, [(Fraction(1), products(state, "x"))], torch.bfloat16)
    assert torch.equal(found, right)
    assert {row for row, _ in asked} <= {3}
    assert 5 not in {column for _, column in asked}


def test_a_variant_is_the_bases(make_pipeline, tmp_path):
    base = make_pipeline("base", torch.float16, variant="fp16")
    part = base / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
    stem = "transformer_blocks.0.attn1.to_q"
    shape = load_file(part)[f"{stem}.weight"].shape
    lora = saved(tmp_path / "a.safetensors", halves(f"transformer.{stem}", shape, 2, 0))
    asked = Settings(method="bake", variant="fp16")
    made = soup.create(tmp_path / "soup", {lora: 1}, asked, base=base)
    assert verify(made.place).holds


def test_order_and_history_do_not_show(make_expert, tmp_path):
    base = make_expert("base", kind="base", shard=None, base_sha256=None)
    shape = tensors(base)[f"{LINEAR}.weight"].shape
    paths = [
        saved(tmp_path / f"{n}.safetensors", halves(f"unet.{LINEAR}", shape, n + 1, n))
        for n in range(3)
    ]
    out = soup.create(tmp_path / "soup", dict.fromkeys(paths[:2], 1), BAKED, base=base).place
    before = sha256_folder(out)
    soup.add(out, {paths[2]: 3})  # to the base that is there
    assert sha256_folder(out) != before
    assert verify(out).holds
    soup.remove(out, "2")
    assert sha256_folder(out) == before
    again = soup.create(tmp_path / "again", dict.fromkeys(paths[1::-1], 1), BAKED, base=base)
    assert sha256_folder(again.place) == before
    with pytest.raises(Refused, match="without which bake is none"):
        soup.remove(out, "base")
    (out / "diffusion_pytorch_model.safetensors").write_bytes(
        (base / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert not verify(out).holds


def test_blocks_weigh_the_bases_tensors(make_expert, tmp_path):
    base = make_expert("base", kind="base", shard=None, base_sha256=None)
    state = tensors(base)
    paths = [
        saved(tmp_path / f"{name}.safetensors",
              halves(LINEAR, state[f"{LINEAR}.weight"].shape, 2, seed)
              | halves(CONV, state[f"{CONV}.weight"].shape, 2, seed))
        for seed, name in enumerate("ab")
    ]  # fmt: skip
    blocks = (Block(tensors="conv_in.*", weights={"a": 0, "b": 0}),
              Block(tensors="up_blocks.*", weights={"a": 0}))  # fmt: skip
    asked = Settings(method="bake", blocks=blocks)
    found = tensors(soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), asked, base=base).place)
    alone = tensors(soup.create(tmp_path / "b", {paths[1]: 1}, BAKED, base=base).place)
    assert torch.equal(found[f"{CONV}.weight"], state[f"{CONV}.weight"])
    assert torch.equal(found[f"{LINEAR}.weight"], alone[f"{LINEAR}.weight"])


@pytest.mark.parametrize("names", ["peft", "kohya"])
def test_a_pipeline_takes_adapters_of_its_components(make_pipeline, tmp_path, names):
    base = make_pipeline("base")
    part = "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(base / part)
    stem = "transformer_blocks.0.attn1.to_q"
    shape = state[f"{stem}.weight"].shape
    alpha = None if names == "peft" else 2.0
    called = f"lora_transformer_{stem.replace('.', '_')}" if alpha else f"transformer.{stem}"
    lora = saved(
        tmp_path / "a.safetensors",
        halves(called, shape, 2, 0, kohya=alpha),
    )
    made = soup.create(tmp_path / "soup", {lora: 1}, BAKED, base=base)
    found = load_file(Path(made.place) / part)
    right = wanted(
        state[f"{stem}.weight"],
        [(Fraction(1), products(load_file(lora), called))],
        state[f"{stem}.weight"].dtype,
    )
    assert torch.equal(found.pop(f"{stem}.weight"), right)
    assert all(torch.equal(value, state[name] + 0.0) for name, value in found.items())
    assert verify(made.place).holds
    assert (Path(made.place) / "tokenizer" / "vocab.json").is_file()
    index = Path(made.place) / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": [None, None]}))
    DiTPipeline.from_pretrained(made.place)


def test_an_adapter_is_the_same_by_all_its_names(make_expert, tmp_path):
    """As diffusers, kohya, and kohya for SDXL call the layers; an alpha of the rank is no scale."""
    base = make_expert("base", kind="base", shard=None, base_sha256=None)
    state, made = tensors(base), []
    for stems, alpha in (
        ((f"unet.{LINEAR}", f"unet.{CONV}"), None),
        (tuple(f"lora_unet_{stem.replace('.', '_')}" for stem in (LINEAR, CONV)), 2.0),
        (("lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q",
          "lora_unet_input_blocks_0_0"), 2.0),
    ):  # fmt: skip
        lora = {
            name: half
            for stem, called in zip((LINEAR, CONV), stems, strict=True)
            for name, half in halves(
                called, state[f"{stem}.weight"].shape, 2, 0, kohya=alpha
            ).items()
        }
        path = saved(tmp_path / f"{len(made)}.safetensors", lora)
        made.append(soup.create(tmp_path / f"soup-{len(made)}", {path: 1}, BAKED, base=base))
    one, *others = (tensors(each.place) for each in made)
    assert not torch.equal(one[f"{LINEAR}.weight"], state[f"{LINEAR}.weight"])
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def spoil(state: dict[str, Tensor]) -> None:
    state[f"{LINEAR}.weight"].fill_(torch.nan)


def test_what_cannot_be_baked(make_expert, tmp_path):
    base = make_expert("base", kind="base", shard=None, base_sha256=None)
    other = make_expert("a", base_sha256=sha256_folder(base))
    state = tensors(base)
    shape = state[f"{LINEAR}.weight"].shape
    good = halves(LINEAR, shape, 2, 0)
    lora = saved(tmp_path / "good.safetensors", good)

    def refused(state: dict[str, Tensor], what: str, *, settings: Settings = BAKED) -> None:
        path = saved(tmp_path / "bad.safetensors", state)
        with pytest.raises(Refused, match=what):
            soup.create(tmp_path / "soup", {path: 1, lora: 1}, settings, base=base)
        assert not (tmp_path / "soup").exists()

    refused(halves("text_encoder.to_q", shape, 2, 0), "text_encoder.to_q .*nowhere in 'base'")
    refused(halves(LINEAR, (shape[0] + 1, *shape[1:]), 2, 0), "does not fit")
    refused(halves(LINEAR, (*shape, 3, 3), 2, 0), "does not fit")
    wide = good | {f"{LINEAR}.lora_B.weight": torch.randn(shape[0], 2, 3, 3)}
    refused(wide, "does not fit")
    refused(good | {f"{LINEAR}.lora_A.weight": torch.full((2, shape[1]), torch.nan)}, "NaN")
    twice = good | halves(f"unet.{LINEAR}", shape, 1, 1)
    refused(twice, "are both")
    one = halves("lora_unet_a_b", (4, 4), 1, 0, kohya=1.0)
    for tensors_, what in (
        ({"a_b.weight": torch.ones(4, 4), "a.b.weight": torch.ones(4, 4)}, "may be a.*b or a.*b"),
        ({"a.b.weight": torch.ones(4, 4, dtype=torch.int8)}, "which is I8"),
        ({"a.b.weight": torch.ones(4)}, "does not fit"),
    ):
        at = saved(tmp_path / "own.safetensors", tensors_)
        path = saved(tmp_path / "one.safetensors", one)
        with pytest.raises(Refused, match=what):
            soup.create(tmp_path / "soup", {path: 1}, BAKED, base=at)
    far_off = good | {f"{LINEAR}.alpha": torch.tensor(1e30)}
    refused(far_off, "beyond all reason")
    path = saved(tmp_path / "told.safetensors", halves(f"unet.{LINEAR}", shape, 2, 0),
                 **{"unet.lora_alpha": 10**400})  # fmt: skip
    with pytest.raises(Refused, match="beyond all reason"):
        soup.create(tmp_path / "soup", {path: 1}, BAKED, base=base)
    flat = {f"{LINEAR}.lora_A.weight": torch.ones(2), f"{LINEAR}.lora_B.weight": torch.ones(2)}
    refused(flat, "do not fit")
    none = {
        f"{LINEAR}.lora_A.weight": torch.ones(0, 3),
        f"{LINEAR}.lora_B.weight": torch.ones(3, 0),
    }
    refused(none, "do not fit")
    refused(halves(f"base_model.model.{LINEAR}", shape, 2, 0), "as PEFT saves")
    path = saved(tmp_path / "told.safetensors", good, **{"unet.lora_alpha": float("inf")})
    with pytest.raises(Refused, match="damaged"):
        soup.create(tmp_path / "soup", {path: 1}, BAKED, base=base)
    huge = good | {f"{LINEAR}.lora_A.weight": torch.full((2, shape[1]), 1e30)}
    refused(huge, "does not fit into float16", settings=Settings(method="bake", dtype="float16"))
    create = lambda experts, settings=BAKED, at=base: soup.create(  # noqa: E731
        tmp_path / "soup", experts, settings, base=at
    )
    with pytest.raises(Refused, match="'a' is no LoRA adapter"):
        create({other: 1, lora: 1})
    with pytest.raises(Refused, match="'b' is a LoRA adapter"):
        create({lora: 1}, at=saved(tmp_path / "b.safetensors", good))
    with pytest.raises(Refused, match="--method bake"):
        soup.create(tmp_path / "soup", {other: 1, lora: 1}, base=base)
    with pytest.raises(UsageError, match="needs the base"):
        soup.create(tmp_path / "soup", {lora: 1}, BAKED)
    with pytest.raises(UsageError, match="which has no weight"):
        create({lora: 1, base: 1})
    with pytest.raises(UsageError, match="negative"):
        soup.create(tmp_path / "soup", {lora: -1}, BAKED, base=base, negative=True)
    for settings_, what in (
        (Settings(method="bake", rank=2), "no rank"),
        (Settings(method="bake", density=0.5), "no density"),
        (Settings(method="bake", state=True), "no running state"),
        (Settings(method="bake", scale=0.001), "scale is 0.001"),
    ):
        with pytest.raises(UsageError, match=what):
            create({lora: 1}, settings_)
    broken = make_expert("nan", kind="base", shard=None, base_sha256=None, change=spoil)
    with pytest.raises(Refused, match="'nan' holds NaN"):
        create({lora: 1}, at=broken)
