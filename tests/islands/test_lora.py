"""Low-rank adapters: the base at first, base + alpha / r B A at the end, and resumed bitwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from atoll.core import recipes, seeds
from atoll.core.checkpoint import Checkpoints
from atoll.core.denoiser import Denoiser
from atoll.core.errors import ConfigError, Refused
from atoll.core.families import FAMILIES
from atoll.core.manifest import Manifest, Plan
from atoll.core.pack import Pack
from atoll.core.storage import Storage
from atoll.islands.base import new_base, train_base
from atoll.islands.data import Batches
from atoll.islands.island import run_island
from atoll.islands.lora import FILE_NAME, attach
from atoll.islands.settings import BaseConfig, DenoiserTraining, LoraConfig
from atoll.islands.step import held_out_loss
from atoll.islands.train_denoiser import train_here
from tests.islands.conftest import TRAIN
from tests.islands.test_job import finish_here, kill_when, order, results, seen

CPU = torch.device("cpu")
LORA = LoraConfig(rank=3, alpha=6.0)


def something(made: Path, family: str) -> tuple[Denoiser, Pack]:
    """A tiny network that no adapter finds silent, as untrained ones are, and some records."""
    pack = Pack(made / "shards" / "shard-00")
    config = BaseConfig(recipe=f"{family}-tiny")
    denoiser = new_base(Manifest.load(Storage(made)), pack, config).denoiser
    with torch.no_grad():
        for name, parameter in denoiser.network.named_parameters():
            draw = seeds.normal(0, name, first=0, count=1, shape=tuple(parameter.shape))
            parameter += 0.1 * draw[0]
    return denoiser, pack


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def outputs(denoiser: Denoiser, pack: Pack) -> torch.Tensor:
    config = DenoiserTraining()
    batches = Batches(pack, config, rows=pack.train, seed=0, stream="x", device=CPU)
    batch = batches(0, 4)
    with torch.no_grad():
        return denoiser.output(batch.x_t, batch.t, batch.cond)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_base_to_base_plus_scaled_product(made: Path, tmp_path: Path, family: str) -> None:
    denoiser, pack = something(made, family)
    base, at_first = weights(denoiser.network), outputs(denoiser, pack)
    training = DenoiserTraining(ema_decays=(0.9,), checkpoints=1, lora=LORA)
    adapters = attach(denoiser.network, LORA, seed=0)
    assert adapters is not None
    assert torch.equal(outputs(denoiser, pack), at_first)

    others = Batches(pack, training, rows=pack.held_out, seed=0, stream="held-out", device=CPU)
    measured = held_out_loss(denoiser, others, training)
    before = measured()
    train_here(
        Storage(tmp_path), "x", denoiser, pack, training,
        learning_rate=2e-2, plan=Plan(batch=16, images_seen=16 * 30), seed=0, stream="x",
        threads=1, device="cpu",
    )  # fmt: skip
    assert measured() < 0.95 * before
    trained = weights(denoiser.network)
    assert all(torch.equal(trained[name], value) for name, value in base.items())
    # Nothing but the adapters is averaged, stepped or written down.
    latest = Checkpoints(Storage(tmp_path), "x").latest()
    assert latest is not None
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in latest.tensors)

    adapted = outputs(denoiser, pack)
    (tmp_path / FILE_NAME).write_bytes(adapters.file(denoiser.network, family))
    adapters.merge(denoiser.network)
    merged = weights(denoiser.network)
    assert merged.keys() == base.keys()
    with safe_open(tmp_path / FILE_NAME, "pt") as file:
        part = "unet" if family == "unet" else "transformer"
        saved = {n.removeprefix(f"{part}."): file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    layers = {name.partition(".lora_")[0] for name in saved}
    assert (told[f"{part}.r"], told[f"{part}.lora_alpha"]) == (3, 6.0)
    assert set(told[f"{part}.target_modules"]) == layers
    assert saved.keys() == {f"{name}.lora_{half}.weight" for name in layers for half in "AB"}
    changed = []
    for name, value in base.items():
        expected = value
        if (down := saved.get(name.replace(".weight", ".lora_A.weight"))) is not None:
            up = saved[name.replace(".weight", ".lora_B.weight")]
            product = torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double())
            expected = (value.double() + 6.0 / 3 * product).float()
            changed.append(not torch.equal(expected, value))
        torch.testing.assert_close(merged[name], expected, rtol=1e-7, atol=0)
    assert sum(changed) > len(changed) / 2 > 0  # SD3 leaves the text of its last block aside
    torch.testing.assert_close(outputs(denoiser, pack), adapted, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in denoiser.network.parameters())


def test_convolutions_are_adapted_too(made: Path) -> None:
    denoiser, pack = something(made, "unet")
    targets = ("conv1", "downsamplers.0.conv", "ff.net.2")
    adapters = attach(denoiser.network, LoraConfig(rank=2, targets=targets), seed=0)
    assert adapters is not None
    names = [name for name, p in denoiser.network.named_parameters() if p.requires_grad]
    assert all(any(f"{target}.lora_" in name for target in targets) for name in names)
    assert all(any(f"{target}.lora_" in name for name in names) for target in targets)
    with torch.no_grad():
        for name, parameter in denoiser.network.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    adapted = outputs(denoiser, pack)
    adapters.merge(denoiser.network)
    torch.testing.assert_close(outputs(denoiser, pack), adapted, rtol=1e-4, atol=1e-4)


def test_checkpointing_and_low_precision_adapt_as_well(made: Path) -> None:
    found = {}
    for kind in ({}, {"gradient_checkpointing": True}, {"precision": "bfloat16"}):
        denoiser, pack = something(made, "uvit")
        training = DenoiserTraining(checkpoints=1, lora=LORA, **kind)
        attach(denoiser.network, LORA, seed=0)
        train_here(
            Storage("memory://lora-kinds"), str(kind), denoiser, pack, training,
            learning_rate=1e-2, plan=Plan(batch=8, images_seen=24), seed=0, stream="x",
            threads=1, device="cpu",
        )  # fmt: skip
        found[str(kind)] = weights(denoiser.network)
    plain, checkpointed, low = found.values()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value)
        torch.testing.assert_close(low[name], value, rtol=0.1, atol=0.05)


def test_targets_that_name_nothing_are_refused(made: Path) -> None:
    denoiser, _ = something(made, "dit")
    with pytest.raises(ConfigError, match="'to_qq', and no linear layer") as caught:
        attach(denoiser.network, LoraConfig(rank=2, targets=("to_q", "to_qq")), seed=0)
    assert "to_out.0, to_q" in str(caught.value)
    assert attach(denoiser.network, LoraConfig(), seed=0) is None


def test_a_base_has_no_adapters(fresh) -> None:
    run, manifest = fresh()
    manifest.base = None
    with pytest.raises(ConfigError, match="nothing that adapters could stand on"):
        train_base(run, manifest, BaseConfig(training=DenoiserTraining(lora=LORA)))


def test_an_island_resumes_its_adapters_bitwise_after_kill_9(fresh) -> None:
    training = DenoiserTraining(passes=20, checkpoints=20, lora=LORA)
    config = TRAIN.model_copy(update={"training": training})
    straight, manifest = fresh("straight")
    shard = next(iter(manifest.shards))
    order(straight, manifest, shard, config)
    run_island(straight.uri, shard)
    here = f"islands/{shard}"
    expert = Denoiser.load(straight.local(f"{here}/expert"))  # strict: a component like any other
    base = weights(Denoiser.load(straight.local("base")).network)
    changed = [n for n, value in weights(expert.network).items() if not torch.equal(value, base[n])]
    assert changed
    assert all(".to_" in name for name in changed)
    assert straight.exists(f"{here}/expert/{FILE_NAME}")

    killed, manifest = fresh("killed")
    order(killed, manifest, shard, config)
    kill_when(killed, shard, lambda: seen(killed, here) > seen(straight, here) // 2)
    stopped = shutil.copytree(killed.local(""), Path(killed.uri).with_name("stopped"))
    assert finish_here(killed, shard) == results(straight, shard)

    other = TRAIN.model_copy(
        update={
            "training": training.model_copy(update={"lora": LoraConfig(rank=4)}),
            "bitwise_resume": False,
        }
    )
    run = Storage(stopped)
    order(run, Manifest.load(run), shard, other)
    with pytest.raises(Refused, match="was made otherwise"):
        run_island(run.uri, shard)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_we_write(made: Path, tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft", reason="no dependency: pip install peft to run this")
    denoiser, pack = something(made, family)
    bare = Denoiser(
        recipes.build(
            recipes.recipe_of(f"{family}-tiny"), pack.card.picture, pack.text_width, seed=0
        ),
        denoiser.card,
    )
    bare.network.load_state_dict(denoiser.network.state_dict())
    adapters = attach(denoiser.network, LORA, seed=0)
    assert adapters is not None
    with torch.no_grad():
        for name, parameter in denoiser.network.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    bare.save(tmp_path)  # as in an expert's folder: it is found beside the weights
    (tmp_path / FILE_NAME).write_bytes(adapters.file(denoiser.network, family))
    if family != "pixart":  # whose class in diffusers takes no adapters by itself
        prefix = "unet" if family == "unet" else "transformer"
        load = bare.network.load_lora_adapter
        load(tmp_path, prefix=prefix, use_safetensors=True)
    else:
        with safe_open(tmp_path / FILE_NAME, "pt") as file:
            told = json.loads(file.metadata()["lora_adapter_metadata"])
            tensors = {n.partition(".")[2]: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        config = peft.LoraConfig(**{key.partition(".")[2]: value for key, value in told.items()})
        peft.inject_adapter_in_model(config, bare.network)
        peft.set_peft_model_state_dict(bare.network, tensors)
    torch.testing.assert_close(outputs(bare, pack), outputs(denoiser, pack))
