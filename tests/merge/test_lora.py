"""Adapters are averaged as products, held against exact fractions and against diffusers."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core.digest import sha256_folder
from atoll.core.errors import AtollError, Refused
from atoll.merge import soup
from atoll.merge.lora import FILE_NAME
from atoll.merge.recipe import Block, Settings
from atoll.merge.verify import verify

LAYERS = {"unet.a.to_q": (5, 3), "unet.b.conv": (4, 2)}  # outputs, inputs
METADATA = "lora_adapter_metadata"


def adapter(
    seed: int, ranks: dict[str, int], names: str = "peft", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    halves = {"peft": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}[names]
    made = {}
    for layer, rank in ranks.items():
        outputs, inputs = LAYERS[layer]
        shapes: list[tuple[int, ...]] = [(rank, inputs), (outputs, rank)]
        if layer.endswith("conv"):
            shapes = [(rank, inputs, 3, 3), (outputs, rank, 1, 1)]
        for half, shape in zip(halves, shapes, strict=True):
            made[f"{layer}.{half}.weight"] = torch.randn(shape, generator=generator).to(dtype)
        if names == "kohya":
            made[f"{layer}.alpha"] = torch.tensor(rank / 2)
    return made


def file(path: Path, state: dict[str, Tensor], **told: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file(state, path, metadata={METADATA: json.dumps(told)} if told else None)
    return path


def product(state: dict[str, Tensor], layer: str, scale: float = 1.0) -> Tensor:
    """In float64, which holds products of float32 and, of so few, all but their last bits."""
    for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
        if f"{layer}.{down}.weight" in state:
            a, b = (state[f"{layer}.{half}.weight"].double() for half in (down, up))
            return scale * b.flatten(1) @ a.flatten(1)
    outputs, inputs = LAYERS[layer]
    return torch.zeros(outputs, inputs * (9 if layer.endswith("conv") else 1)).double()


@pytest.mark.parametrize("names", ["peft", "kohya"])
def test_the_mean_is_that_of_products(tmp_path, names):
    both = [*LAYERS]
    states = [
        adapter(0, {both[0]: 2, both[1]: 3}, names),
        adapter(1, {both[0]: 1, both[1]: 2}, names),
        adapter(2, {both[1]: 2}, names),  # leaves a layer alone
    ]
    paths = [file(tmp_path / f"{n}.safetensors", s) for n, s in zip("abc", states, strict=True)]
    made = soup.create(tmp_path / "soup", dict(zip(paths, (1, 2, 3), strict=True)))
    assert {f.name for f in made.place.iterdir()} == {FILE_NAME, "soup.json"}
    mean = load_file(made.place / FILE_NAME)
    own = 0.5 if names == "kohya" else 1.0  # alpha over rank
    for layer in LAYERS:
        wanted = sum(w * product(s, layer, own) for w, s in zip((1, 2, 3), states, strict=True)) / 6
        torch.testing.assert_close(product(mean, layer), wanted, rtol=1e-6, atol=1e-7)
    # One rank for all: the sum of those of the widest layer, the other filled up with zeros.
    first, second = ("lora_A", "lora_B") if names == "peft" else ("lora_down", "lora_up")
    assert {len(v) for k, v in mean.items() if f".{first}." in k} == {7}
    assert not mean[f"{both[0]}.{first}.weight"][3:].any()
    assert not mean[f"{both[0]}.{second}.weight"][:, 3:].any()
    assert [float(v) for k, v in mean.items() if k.endswith("alpha")] == [7.0] * (
        2 if names == "kohya" else 0
    )
    assert verify(made.place).holds


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_every_element_of_b_is_rounded_once(tmp_path_factory, weights, dtype, seed):
    folder = tmp_path_factory.mktemp("lora")
    states = [adapter(seed + n, {"unet.a.to_q": 2}, dtype=dtype) for n in range(len(weights))]
    paths = [file(folder / f"{n}.safetensors", state) for n, state in enumerate(states)]
    made = soup.create(folder / "soup", dict(zip(paths, weights, strict=True)))
    mean = load_file(made.place / FILE_NAME)
    downs = torch.cat([state["unet.a.to_q.lora_A.weight"] for state in states])
    assert torch.equal(mean["unet.a.to_q.lora_A.weight"], downs)
    ups = mean["unet.a.to_q.lora_B.weight"]
    assert ups.dtype == dtype
    for n, state in enumerate(states):
        exact = [
            Fraction(float(v)) * weights[n] / sum(weights)
            for v in state["unet.a.to_q.lora_B.weight"].reshape(-1)
        ]
        found = ups[:, 2 * n : 2 * n + 2].reshape(-1)
        for value, wanted in zip(found, exact, strict=True):
            gaps = [
                abs(Fraction(float(near)) - wanted)
                for near in (
                    torch.nextafter(value, torch.tensor(float("inf"), dtype=dtype)),
                    torch.nextafter(value, torch.tensor(-float("inf"), dtype=dtype)),
                )
            ]
            assert abs(Fraction(float(value)) - wanted) <= min(gaps)


def test_order_and_history_do_not_show(tmp_path):
    paths = [
        file(tmp_path / "in" / f"{name}.safetensors", adapter(n, dict.fromkeys(LAYERS, n + 1)))
        for n, name in enumerate("abc")
    ]
    out = soup.create(tmp_path / "soup", dict.fromkeys(paths[:2], 1)).place
    before = sha256_folder(out)
    soup.add(out, {paths[2]: 3})
    assert sha256_folder(out) != before
    soup.remove(out, "c")
    assert sha256_folder(out) == before
    again = soup.create(tmp_path / "again", dict.fromkeys(paths[1::-1], 1)).place
    assert sha256_folder(again) == before
    every = soup.leave_one_out(tmp_path / "loo", dict.fromkeys(paths, 1))
    never = soup.create(tmp_path / "loo" / "never", dict.fromkeys(paths[:2], 1)).place
    assert sha256_folder(every["c"].place) == sha256_folder(never)


def test_scales_come_from_the_header_of_the_file(tmp_path):
    state = adapter(0, {"unet.a.to_q": 2, "unet.b.conv": 2})
    told = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"conv": 1}}
    made = soup.create(tmp_path / "soup", {file(tmp_path / "a.safetensors", state, **told): 1})
    mean = load_file(made.place / FILE_NAME)
    for layer, scale in (("unet.a.to_q", 4.0), ("unet.b.conv", 0.5)):
        torch.testing.assert_close(product(mean, layer), product(state, layer, scale))
    with safe_open(made.place / FILE_NAME, framework="pt") as opened:
        assert METADATA not in opened.metadata()  # its scale is 1


def test_blocks_weights_and_dtypes_of_adapters(tmp_path):
    states = [adapter(n, dict.fromkeys(LAYERS, 2), dtype=torch.bfloat16) for n in range(2)]
    a, b = (file(tmp_path / f"{n}.safetensors", s) for n, s in zip("ab", states, strict=True))
    block = Block(tensors="unet.b.*", weights={"b": 0})
    made = soup.create(
        tmp_path / "soup", {a: 3, b: -1}, Settings(blocks=[block], dtype="float32"), negative=True
    )
    mean = load_file(made.place / FILE_NAME)
    assert {value.dtype for value in mean.values()} == {torch.float32}
    torch.testing.assert_close(product(mean, "unet.b.conv"), product(states[0], "unet.b.conv"))
    wanted = (3 * product(states[0], "unet.a.to_q") - product(states[1], "unet.a.to_q")) / 2
    torch.testing.assert_close(product(mean, "unet.a.to_q"), wanted, rtol=1e-6, atol=1e-6)


def test_a_layer_in_which_nobody_is_heard_is_zero(tmp_path):
    a = file(tmp_path / "a.safetensors", adapter(0, dict.fromkeys(LAYERS, 2)))
    b = file(tmp_path / "b.safetensors", adapter(1, {"unet.a.to_q": 2}))
    block = Block(tensors="unet.b.*", weights={"a": 0})
    mean = load_file(
        soup.create(tmp_path / "s", {a: 1, b: 1}, Settings(blocks=[block])).place / FILE_NAME
    )
    assert not product(mean, "unet.b.conv").any()


def without(state: dict[str, Tensor], end: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith(end)}


@pytest.mark.parametrize(
    ("change", "told", "words"),
    [
        (lambda s: without(s, "to_q.lora_B.weight"), {}, "no unet.a.to_q.lora_B.weight"),
        (lambda s: without(s, "to_q.lora_A.weight"), {}, "no half of an adapter"),
        (lambda s: s | {"unet.a.to_q.dora_scale": torch.ones(5)}, {}, "no half of an adapter"),
        (lambda s: s | {"unet.a.to_q.lora_A.weight": torch.ones(4, 3)}, {}, "do not fit"),
        (lambda s: s | {"unet.a.to_q.alpha": torch.ones(2)}, {}, "has 2 values"),
        (lambda s: s | {"unet.a.to_q.alpha": torch.tensor(float("nan"))}, {}, "a number"),
        (lambda s: s | {"unet.a.to_q.alpha": torch.tensor(0.01)}, {}, "would be scaled by"),
        (lambda s: {k: v.int() for k, v in s.items()}, {}, "is I32"),
        (lambda s: {k: v * float("inf") for k, v in s.items()}, {}, "NaN, infinity"),
        (lambda s: s, {"unet.use_rslora": True}, "use_rslora"),
        (lambda s: s, {"unet.lora_alpha": "much"}, "is damaged"),
        (lambda s: s, {"unet.alpha_pattern": {"(": 1}}, "is damaged"),
        (lambda s: s, {"unet.alpha_pattern": 3}, "is damaged"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(tmp_path, change, told, words):
    state = change(adapter(0, {"unet.a.to_q": 2}))
    path = file(tmp_path / "a.safetensors", state, **told)
    with pytest.raises(Refused) as caught:
        soup.create(tmp_path / "soup", {path: 1})
    assert words in str(caught.value)
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (adapter(1, {"unet.a.to_q": 2}, "kohya"), "names of one library"),
        ({"unet.a.to_q.lora_A.weight": torch.ones(2, 4),
          "unet.a.to_q.lora_B.weight": torch.ones(5, 2)}, "other widths"),
        ({"conv_in.bias": torch.ones(2)}, "cannot be averaged"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_one_another_are_refused(tmp_path, other, words):
    a = file(tmp_path / "a.safetensors", adapter(0, {"unet.a.to_q": 2}))
    b = file(tmp_path / "b.safetensors", other)
    with pytest.raises(AtollError, match=words):
        soup.create(tmp_path / "soup", {a: 1, b: 1})


def test_a_file_of_an_expert_keeps_its_shard(make_expert, tmp_path):
    expert = make_expert("a")
    path = file(expert / FILE_NAME, adapter(0, {"unet.a.to_q": 2}))
    made = soup.create(tmp_path / "soup", {path: 1})
    assert made.recipe.shards == ["shard-a"]
    assert made.recipe.base_sha256 == "b" * 64
    assert made.card is None
    assert verify(made.place).holds
