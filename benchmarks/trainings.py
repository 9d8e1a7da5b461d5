"""The same training three ways: the island's loop, a bare loop, and the usual one on accelerate.

All learn the same model from the same records at the same precision. The peers draw noise and times
by torch.randn, hold no guard and write nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from atoll.core import recipes
from atoll.core.blocks import write_blocks
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Card, Denoiser
from atoll.core.digest import sha256_file
from atoll.core.flow import Prediction
from atoll.core.manifest import Picture, Plan
from atoll.core.pack import Pack, ShardCard, write_pack, write_shard_card
from atoll.core.storage import Storage
from atoll.islands.data import Batches, ahead
from atoll.islands.loop import Loop
from atoll.islands.settings import DenoiserTraining
from atoll.islands.step import Errors, flow_matching, prepare
from atoll.islands.train_denoiser import course_of
from benchmarks.turns import Peer, Settle

FOLDER = "bench"  # of the island's loop
CAPTIONS = 11  # the empty one among them


@dataclass(frozen=True)
class Case:
    """A model, its data, and where and how it is trained."""

    name: str  # the recipe's
    picture: Picture
    batch: int
    training: DenoiserTraining
    device: torch.device
    tokens: tuple[int, int] = (16, 64)  # text: how many, and how wide
    records: int = 2_048

    @property
    def recipe(self) -> recipes.Recipe:
        return recipes.recipe_of(self.name)

    @property
    def low(self) -> bool:
        """Whether the network computes in bfloat16."""
        return self.training.precision == "bfloat16"

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def deterministic(self, wanted: bool) -> None:
        """An island's kernels are, on a GPU; its peers are free to choose. Said at every turn."""
        torch.use_deterministic_algorithms(wanted and self.device.type == "cuda")

    def denoiser(self) -> Denoiser:
        """A new one, still on the CPU."""
        card = Card(
            name="bench", kind="base", shard=None, base_sha256=None, family=self.recipe.family,
            prediction=Prediction.VELOCITY, latent_space="pixels", images_seen=0,
        )  # fmt: skip
        network = _network(self.name, self.picture.shape, self.tokens[1])
        return Denoiser(copy.deepcopy(network), card)

    def batches(self, pack: Pack) -> Batches:
        """The island's, of all training rows."""
        return Batches(
            pack, self.training, rows=pack.train, seed=0, stream="bench", device=self.device
        )


@lru_cache(maxsize=1)  # a large one takes many seconds to draw
def _network(name: str, shape: tuple[int, int, int], text_width: int) -> nn.Module:
    channels, height, width = shape
    picture = Picture(channels=channels, height=height, width=width)
    return recipes.build(recipes.recipe_of(name), picture, text_width, seed=0).train()


def make_pack(folder: Path, case: Case) -> Pack:
    """Random pictures: speed does not depend on what is in them."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (case.records, *case.picture.shape), generator=draw, dtype=torch.uint8
    )
    length, width = case.tokens
    table = Conditioning(
        torch.randn(CAPTIONS, length, width, generator=draw),
        torch.ones(CAPTIONS, length, dtype=torch.bool),
        torch.randn(CAPTIONS, width, generator=draw),
        torch.arange(CAPTIONS) == 0,
    )
    caption = torch.randint(1, CAPTIONS, (case.records,), generator=draw)
    write_pack(folder / "pack-00000.safetensors", pixels, caption, table)
    write_blocks(folder, ["pack-00000.safetensors"])
    card = ShardCard(
        name="bench", records=case.records, held_out=0, picture=case.picture, encoder="none",
        packs={"pack-00000.safetensors": case.records},
        files={file.name: sha256_file(file) for file in folder.iterdir()},
    )  # fmt: skip
    write_shard_card(folder, card)
    return Pack(folder)


def ours(
    case: Case, pack: Pack, storage: Storage, steps: int, before: Callable[[Settle], None]
) -> None:
    """The island's loop, with all that it does besides its steps."""
    denoiser, config, batch = case.denoiser(), case.training, case.batch
    prepare(denoiser, config, case.device)
    course = course_of(config, Plan(batch=batch, images_seen=steps * batch), 1e-4)
    with ahead(case.batches(pack), case.device, stride=batch) as coming:
        loss = flow_matching(denoiser, coming, config)

        def timed(first: int, count: int) -> Errors:
            before(loop._background.settle)
            case.deterministic(True)
            return loss(first, count)

        loop = Loop(storage, FOLDER, denoiser.network, course, name="bench")
        loop.run(timed)


def bare(case: Case, pack: Pack) -> Peer:
    """What anybody would write who wants speed alone, compiled where ours is."""
    denoiser = case.denoiser()
    prepare(denoiser, case.training, case.device)
    network = denoiser.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    averaged = [p.detach().clone() for p in network.parameters()]
    while True:
        yield
        case.deterministic(False)
        rows = torch.randint(0, len(pack), (case.batch,))
        x_data = pack.x_data(rows).to(case.device, non_blocking=True)
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.low):
            loss = _plain_loss(denoiser, x_data, pack.cond(rows), pack.null)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, [p.detach() for p in network.parameters()], 0.005)


def usual(case: Case, pack: Pack) -> Peer:
    """As the training examples of diffusers write it, on accelerate.

    Mixed precision is accelerate's: "bf16" where ours computes in bfloat16, otherwise "no".
    """
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    from diffusers.training_utils import EMAModel

    # One process has one, and keeps the precision that was first asked for.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=case.device.type == "cpu", mixed_precision="bf16" if case.low else "no"
    )
    denoiser = case.denoiser()
    network = denoiser.network.to(case.device)
    loader = DataLoader(
        _Rows(len(pack), case.batch), batch_size=case.batch, shuffle=True, drop_last=True,
        collate_fn=lambda rows: (pack.x_data(torch.tensor(rows)), pack.cond(torch.tensor(rows))),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.01)
    average = EMAModel(network.parameters(), decay=0.995)
    network, optimizer = accelerator.prepare(network, optimizer)
    trained = Denoiser(network, denoiser.card)
    while True:
        for x_data, cond in loader:
            yield
            case.deterministic(False)
            with accelerator.accumulate(network):
                loss = _plain_loss(trained, x_data.to(case.device), cond, pack.null)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            average.step(network.parameters())
            loss.detach().item()  # for the progress bar


class _Rows(Dataset[int]):
    """Row numbers, over and over if a batch is more than there are."""

    def __init__(self, rows: int, batch: int) -> None:
        self._rows, self._length = rows, max(rows, batch)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index % self._rows


def _plain_loss(
    denoiser: Denoiser, x_data: Tensor, cond: Conditioning, null: Conditioning
) -> Tensor:
    """The same objective with torch's own random numbers, drawn where `x_data` is."""
    batch, device = len(x_data), x_data.device
    x_noise, t = torch.randn_like(x_data), torch.sigmoid(torch.randn(batch, device=device))
    x_t = (1 - t[:, None, None, None]) * x_data + t[:, None, None, None] * x_noise
    cond = cond.dropped(torch.rand(batch) < 0.1, null).to(x_t)
    return functional.mse_loss(denoiser.output(x_t, t, cond).float(), x_noise - x_data)
