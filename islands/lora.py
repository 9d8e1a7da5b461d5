"""Low-rank adapters: an expert as a small change of the base instead of new weights throughout.

LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3): a chosen layer with frozen weight W puts out
W x + alpha / r B A x, with A of rank r seeded and B at 0, so that training begins as the base does,
bitwise. Gradients, optimiser state, averages and checkpoints are those of A and B alone. At the end
the product goes into the weight, and the expert is an ordinary component: a soup averages weights,
and a mean of products is not the product of means.

peft does the same and is what reads our files elsewhere. It is not used here because it loads
transformers in every process, and because diffusers lets only some of our families use it.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeGuard

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atoll.core import seeds
from atoll.core.errors import ConfigError
from atoll.islands.settings import LoraConfig

# What diffusers looks for in a folder, and where it looks for the settings.
FILE_NAME = "pytorch_lora_weights.safetensors"
_METADATA_KEY = "lora_adapter_metadata"
# The projections of attention, by the names that diffusers gives them; the last four are those of
# the text in SD3's blocks.
_ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip


Layer = nn.Linear | nn.Conv2d


class Adapters:
    """The adapters of one network, or of a copy of it, from `attach` until `merge`."""

    def __init__(self, network: nn.Module, config: LoraConfig, *, seed: int) -> None:
        assert config.rank is not None
        self._rank = config.rank
        self._alpha = config.alpha if config.alpha is not None else float(config.rank)
        self._scale = self._alpha / self._rank
        layers = _chosen(network, config.targets)
        network.requires_grad_(False)
        self._hooks = {name: self._adapt(name, layer, seed) for name, layer in layers.items()}

    def _adapt(self, name: str, layer: Layer, seed: int) -> RemovableHandle:
        scale = self._scale
        down, up = _halves(layer, self._rank)
        # As in the authors' code and peft: A uniform within 1 / sqrt(fan in). The same for every
        # shard, as all experts begin at one base.
        inputs = math.prod(down.weight.shape[1:])
        uniform = seeds.uniform(seed, "lora", name, first=0, count=self._rank, each=inputs)
        drawn = ((2 * uniform - 1) / math.sqrt(inputs)).view(down.weight.shape)
        down.weight = nn.Parameter(drawn.to(layer.weight))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape).to(layer.weight))
        layer.add_module("lora_A", down)
        layer.add_module("lora_B", up)

        # By the module it is called on: the hook of a copy uses the copy's adapters.
        def adapted(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            down, up = _both(module)
            added: Tensor = up(down(given[0]))
            return out + scale * added

        return layer.register_forward_hook(adapted)

    def file(self, network: nn.Module, family: str) -> bytes:
        """A and B as diffusers' `load_lora_weights` and `load_lora_adapter` read them."""
        part = "unet" if family == "unet" else "transformer"
        tensors = {
            f"{part}.{name}.{half}.weight": adapter.weight.detach().contiguous()
            for name in self._hooks
            for half, adapter in zip(
                ("lora_A", "lora_B"), _both(network.get_submodule(name)), strict=True
            )
        }
        settings = {"r": self._rank, "lora_alpha": self._alpha, "target_modules": [*self._hooks]}
        told = {f"{part}.{key}": value for key, value in settings.items()}
        return save(tensors, metadata={_METADATA_KEY: json.dumps(told)})

    @torch.no_grad()
    def merge(self, network: nn.Module) -> None:
        """Put each product into its weight, in float64 and rounded once; the network is plain."""
        for name, hook in self._hooks.items():
            layer = network.get_submodule(name)
            assert _can_be_adapted(layer)
            weight, down, up = layer.weight, *(half.weight.double() for half in _both(layer))
            product = (up.flatten(1) @ down.flatten(1)).view_as(weight)
            weight.copy_(weight.double() + self._scale * product)
            layer._forward_hooks.pop(hook.id)  # `hook.remove` would leave a copy's
            del layer.lora_A, layer.lora_B
        network.requires_grad_(True)


def attach(network: nn.Module, config: LoraConfig, *, seed: int) -> Adapters | None:
    """Freeze a network and adapt its chosen layers; None where all weights are to be trained.

    Raises `ConfigError` for targets that name no layer that can be adapted.
    """
    return None if config.rank is None else Adapters(network, config, seed=seed)


def _chosen(network: nn.Module, targets: tuple[str, ...] | None) -> dict[str, Layer]:
    """The layers whose names end in one of the targets."""
    able = {name: layer for name, layer in network.named_modules() if _can_be_adapted(layer)}
    found: dict[str, Layer] = {}
    for target in targets or _ATTENTION:
        ends = {name: able[name] for name in able if f".{name}".endswith(f".{target}")}
        if not ends and targets is not None:
            raise ConfigError(
                f"training.lora.targets has '{target}', and no linear layer or convolution of "
                "this network has a name that ends so",
                allowed="ends of names, such as "
                + ", ".join(sorted({_end(name) for name in able})),
            )
        found |= ends
    if not found:
        raise ConfigError(
            "This network has no attention to adapt",
            cure="name the layers with training.lora.targets",
        )
    return found


def _halves(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    """A and B for a layer, whose weights are still to be given."""
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            down = nn.Linear(layer.in_features, rank, bias=False)
            return down, nn.Linear(rank, layer.out_features, bias=False)
        window: dict[str, Any] = {
            key: getattr(layer, key) for key in ("kernel_size", "stride", "padding")
        }
        convolved = nn.Conv2d(layer.in_channels, rank, **window, bias=False)
        return convolved, nn.Conv2d(rank, layer.out_channels, 1, bias=False)


def _both(layer: nn.Module) -> tuple[Layer, Layer]:
    """A and B of an adapted layer."""
    down, up = layer.lora_A, layer.lora_B
    assert isinstance(down, Layer)
    assert isinstance(up, Layer)
    return down, up


def _can_be_adapted(layer: nn.Module) -> TypeGuard[Layer]:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def _end(name: str) -> str:
    """The last word of a layer's name, with a word before it where it is but a number."""
    *before, last = name.split(".")
    return f"{before[-1]}.{last}" if last.isdigit() and before else last
