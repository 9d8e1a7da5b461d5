"""What the layers of a UNet are called in the original layout of latent diffusion (`input_blocks`).

kohya saves adapters of SDXL so. The layers of all blocks are numbered through there; which
number one has is read off the names that diffusers gives them, whatever the network's depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_IN_BLOCK = re.compile(
    r"(down_blocks|up_blocks)\.(\d{1,4})\.(resnets|attentions|downsamplers|upsamplers)"
    r"\.(\d{1,4})\.(.+)"
)
_IN_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d{1,4})\.(.+)")
_AROUND = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LAST = 1 << 30  # the place of what halves the picture, after all layers of its block


def original_names(modules: Iterable[str]) -> dict[str, str]:
    """By the module of a `UNet2DConditionModel`; none for what other networks have."""
    modules = list(modules)
    inside = {name: match for name in modules if (match := _IN_BLOCK.fullmatch(name))}
    numbers = _numbers(inside.values())
    attended = {(match[1], match[2]) for match in inside.values() if match[3] == "attentions"}
    found = {name: _AROUND[name] for name in modules if name in _AROUND}
    for name, match in inside.items():
        side, block, kind, layer, rest = match.groups()
        place = (side, int(block), int(layer))
        within = ""
        if kind == "resnets" and rest in _IN_RESNET:
            within = f"0.{_IN_RESNET[rest]}"
        elif kind == "attentions":
            within = f"1.{rest}"
        elif kind == "downsamplers" and rest == "conv":
            place, within = (side, int(block), _LAST), "0.op"
        elif kind == "upsamplers" and rest == "conv":
            place = max((each for each in numbers if each[:2] == place[:2]), default=place)
            within = f"{2 if (side, block) in attended else 1}.conv"
        if within and place in numbers:
            stem = "input_blocks" if side == "down_blocks" else "output_blocks"
            found[name] = f"{stem}.{numbers[place]}.{within}"
    for name in modules:
        if match := _IN_MIDDLE.fullmatch(name):
            kind, layer, rest = match.groups()
            if kind == "attentions":
                found[name] = f"middle_block.{2 * int(layer) + 1}.{rest}"
            elif rest in _IN_RESNET:
                found[name] = f"middle_block.{2 * int(layer)}.{_IN_RESNET[rest]}"
    return found


def _numbers(inside: Iterable[re.Match[str]]) -> dict[tuple[str, int, int], int]:
    """The number of each layer of a block in all of its side."""
    places = set[tuple[str, int, int]]()
    for match in inside:
        if match[3] == "resnets":
            places.add((match[1], int(match[2]), int(match[4])))
        elif match[3] == "downsamplers":
            places.add((match[1], int(match[2]), _LAST))
    down = sorted(place for place in places if place[0] == "down_blocks")
    up = sorted(place for place in places if place[0] == "up_blocks")
    # The convolution at the beginning is the first there.
    return {place: n for n, place in enumerate(down, 1)} | {place: n for n, place in enumerate(up)}
