"""Experts under a memory budget are the very experts, in no more memory than they may have."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core import sampler, seeds
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Card, Denoiser
from atoll.core.digest import sha256_folder
from atoll.core.embedding import load_encoder
from atoll.core.errors import ConfigError, Refused
from atoll.core.flow import Prediction
from atoll.core.manifest import Manifest, Picture
from atoll.core.recipes import build, recipe_of
from atoll.core.storage import Storage
from atoll.router.assemble import assemble
from atoll.router.chooser import sample_settings, x_noise
from atoll.router.ensemble import mix
from atoll.router.model import EnsembleModel
from atoll.router.paging import PagedExperts

PICTURE = Picture(channels=1, height=8, width=8)
RECIPES = ("unet-tiny", "unet-tiny", "dit-tiny", "unet-tiny", "dit-tiny")
WIDTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three experts of one network and two of another, every weight moved."""
    made = []
    for number, name in enumerate(RECIPES):
        recipe = recipe_of(name)
        network = build(recipe, PICTURE, WIDTH, seed=number)
        with torch.no_grad():
            for word, weight in network.named_parameters():
                draw = seeds.generator(number, word)
                weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
        card = Card(
            name=f"e{number}",
            kind="expert",
            shard=f"shard-{number:02d}",
            base_sha256=None,
            family=recipe.family,
            prediction=(Prediction.VELOCITY, Prediction.X_DATA)[number % 2],
            latent_space="pixels",
            images_seen=1,
        )
        made.append(tmp_path_factory.mktemp("experts") / card.name)
        Denoiser(network, card).save(made[-1])
    return made


def bytes_of(folder: Path) -> int:
    network = Denoiser.load(folder).network
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def batch(count: int) -> tuple[Tensor, Tensor, Conditioning]:
    x_t = seeds.normal(0, "x", first=0, count=count, shape=PICTURE.shape)
    cond = Conditioning(
        seeds.normal(0, "tokens", first=0, count=count, shape=(4, WIDTH)),
        torch.ones(count, 4, dtype=torch.bool),
        seeds.normal(0, "pooled", first=0, count=count, shape=(WIDTH,)),
        torch.zeros(count, dtype=torch.bool),
    )
    return x_t, torch.full((count,), 0.7), cond


@given(
    steps=st.lists(
        st.lists(st.sampled_from(range(5)), min_size=1, max_size=5, unique=True),
        min_size=1,
        max_size=5,
    ),
    room=st.floats(1.0, 5.0),
)
@settings(max_examples=25)
def test_mixed_from_any_memory_the_bits_are_the_same(
    folders: list[Path], steps: list[list[int]], room: float
) -> None:
    """Whatever is asked for in whatever order, and whatever it is written over."""
    resident = [Denoiser.load(folder).velocity for folder in folders]
    largest = max(map(bytes_of, folders))
    paged = PagedExperts(folders, budget=int(room * largest))
    at = batch(4)
    for wanted in steps:
        weights = torch.zeros(4, 5)
        weights[:, wanted] = 1 / len(wanted)
        with torch.no_grad():
            assert torch.equal(mix(paged, weights, *at), mix(resident, weights, *at))
        assert sum(bytes_of(folders[k]) for k in paged.resident) <= room * largest
        assert len(set(paged.resident)) == len(paged.resident)


def test_those_that_are_there_are_run_first(folders: list[Path]) -> None:
    """A step of all experts brings as many as do not fit, not all of them."""
    same = [folders[k] for k in (0, 1, 3)]
    paged = PagedExperts(same, budget=2 * bytes_of(folders[0]))
    weights = torch.full((2, 3), 1 / 3)
    for step in range(4):
        with torch.no_grad():
            mix(paged, weights, *batch(2))
        assert paged.loads == 3 + step


def test_the_next_one_is_read_while_one_is_computed_with(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    bring = PagedExperts._bring

    def brought(self: PagedExperts, k: int) -> object:
        seen.append(("brought", k))
        return bring(self, k)

    monkeypatch.setattr(PagedExperts, "_read_ahead", lambda _, k: seen.append(("ahead", k)))
    monkeypatch.setattr(PagedExperts, "_bring", brought)
    paged = PagedExperts([folders[k] for k in (0, 1, 3)], budget=bytes_of(folders[0]))
    weights = torch.full((2, 3), 1 / 3)
    for steps in ([0, 1, 2], [0, 1], [0, 2]):
        with torch.no_grad():
            mix(paged, weights, *batch(2))
        assert seen == [(what, k) for k in steps for what in ("ahead", "brought")]
        seen.clear()


def test_what_is_in_memory_is_not_read_again(folders: list[Path]) -> None:
    paged = PagedExperts(folders, budget=sum(map(bytes_of, folders)))
    for _ in range(3):
        for k in range(5):
            assert paged.expert(k).card.name == f"e{k}"
    assert paged.loads == 5


def test_a_budget_below_the_largest_is_refused(folders: list[Path]) -> None:
    largest = max(map(bytes_of, folders))
    PagedExperts(folders, budget=largest)
    with pytest.raises(ConfigError, match="more than") as caught:
        PagedExperts(folders, budget=largest - 1)
    assert "16 bits" in (caught.value.cure or "")
    PagedExperts(folders, budget=largest - 1, dtype=torch.bfloat16)


def test_in_16_bits_they_are_what_a_resident_one_is(folders: list[Path]) -> None:
    paged = PagedExperts(folders, budget=bytes_of(folders[0]), dtype=torch.bfloat16)
    for k in (0, 1, 2, 0, 3):
        alone = Denoiser.load(folders[k])
        alone.network.to(torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(paged[k](*batch(2)), alone.velocity(*batch(2)))


def test_threads_that_ask_at_once_are_each_answered_by_their_own_expert(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one network there is one in memory, and whoever asks next gives it other weights."""
    expert = PagedExperts.expert

    def slowly(self: PagedExperts, *asked: Any) -> Denoiser:
        found = expert(self, *asked)
        time.sleep(0.005)  # time enough for others, were they let in
        return found

    monkeypatch.setattr(PagedExperts, "expert", slowly)
    same = [folders[k] for k in (0, 1, 3)]
    resident = [Denoiser.load(folder).velocity for folder in same]
    paged = PagedExperts(same, budget=bytes_of(folders[0]))

    def velocity(experts: Sequence[Any], number: int) -> Tensor:
        weights = torch.eye(3)[[number % 3, number // 3 % 3]]
        with torch.no_grad():
            return mix(experts, weights, *batch(2))

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(partial(velocity, paged), range(27)))
    for number, v in enumerate(made):
        assert torch.equal(v, velocity(resident, number))


def test_cast_they_are_read_again_within_the_budget(folders: list[Path]) -> None:
    room = bytes_of(folders[0])
    paged = PagedExperts(folders[:2], budget=room, dtype=torch.bfloat16)
    small = PagedExperts(folders[:2], budget=room // 2, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        paged.cast(dtype)
        alone = Denoiser.load(folders[1], dtype)
        with torch.no_grad():
            assert torch.equal(paged[1](*batch(2)), alone.velocity(*batch(2)))
        assert paged.expert(1).network.dtype == dtype
    with pytest.raises(ConfigError, match="more than"):
        small.cast(torch.float32)
    assert small.dtype == torch.bfloat16


def test_files_in_16_bits_take_what_they_take_in_memory(
    folders: list[Path], tmp_path: Path
) -> None:
    """An expert is float32 there where nothing else is asked for, as one that is loaded whole."""
    small = Denoiser.load(folders[0])
    small.network.to(torch.bfloat16)
    small.save(tmp_path / "small")
    with pytest.raises(ConfigError, match="more than"):
        PagedExperts([tmp_path / "small"], budget=bytes_of(folders[0]) - 1)
    paged = PagedExperts([tmp_path / "small", folders[1]], budget=bytes_of(folders[0]))
    for k in (0, 1, 0):  # each written over the other
        network = paged.expert(k).network
        taken = sum(value.nbytes for value in network.state_dict().values())
        assert taken == bytes_of(folders[0])
        assert len(paged.resident) == 1


@pytest.mark.parametrize("harm", ["cut", "gone", "foreign"])
def test_weights_that_were_harmed_are_refused_and_the_others_go_on(
    folders: list[Path], tmp_path: Path, harm: str
) -> None:
    here = [Path(shutil.copytree(folders[k], tmp_path / str(k))) for k in (0, 1, 2)]
    paged = PagedExperts(here[:2], budget=bytes_of(here[0]))
    paged.expert(0)
    name = "diffusion_pytorch_model.safetensors"
    match harm:
        case "cut":
            (here[1] / name).write_bytes((here[1] / name).read_bytes()[:-100])
        case "gone":
            (here[1] / name).unlink()
        case "foreign":
            shutil.copyfile(here[2] / name, here[1] / name)
    with pytest.raises(Refused, match=str(here[1])):
        paged.expert(1)
    alone = Denoiser.load(here[0])
    with torch.no_grad():
        assert torch.equal(paged[0](*batch(2)), alone.velocity(*batch(2)))


def test_a_paged_ensemble_makes_the_same_pictures_and_saves_the_same_folder(
    trained: Path, tmp_path: Path
) -> None:
    run = Storage(shutil.copytree(trained, tmp_path / "run"))
    assemble(run, Manifest.load(run))
    folder = tmp_path / "run/ensemble"
    resident, encoder = (
        EnsembleModel.from_pretrained(folder / "transformer"),
        load_encoder(folder / "text_encoder"),
    )
    room = max(map(bytes_of, (folder / "transformer/experts").iterdir()))
    paged = EnsembleModel.from_pretrained(folder / "transformer", expert_bytes=room)
    assert list(paged.networks.parameters()) == []
    cond, null = encoder.condition(["a bright dot"] * 4), encoder.condition([""])
    wishes = sample_settings(4, resident.shards, routing=["full", "once", "mass:0.9", "top-k:1"])
    noise, grid = x_noise(wishes, PICTURE.shape), sampler.times(4)
    made = [
        sampler.euler(model.trajectory(cond, null, wishes), noise, grid)
        for model in (resident, paged)
    ]
    assert torch.equal(*made)
    assert dict(paged.config) == dict(resident.config)
    assert paged.to(torch.bfloat16)._paged.dtype == torch.bfloat16
    assert paged.float()._paged.dtype == torch.float32
    paged.save_pretrained(tmp_path / "saved")
    paged.save_pretrained(tmp_path / "saved")  # over itself
    EnsembleModel.from_pretrained(tmp_path / "saved", expert_bytes=room).save_pretrained(
        tmp_path / "saved"  # and from there
    )
    assert sha256_folder(tmp_path / "saved") == sha256_folder(folder / "transformer")
    with pytest.raises(ConfigError, match="more than"):
        EnsembleModel.from_pretrained(folder / "transformer", expert_bytes=room - 1)
