"""The ensemble in the place of a stock pipeline's network: what a call says, and what it runs.

A stock pipeline hands over pictures, timesteps and token states. The gate, and experts of other
families, want times in [0, 1], the tokens' mask, the pooled vector and which captions are empty.
All of it is in the token states that `Encoder.condition` makes: behind the end of text they are 0,
and the pooled vector is the state at the end of text, projected. `text_projection.safetensors`
beside the experts has that projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from atoll.core.conditioning import Conditioning, is_empty
from atoll.core.errors import Refused, UsageError
from atoll.core.families import FAMILIES
from atoll.router.gate import GateWeights, InFloat32
from atoll.router.routing import (
    Routing,
    Rule,
    mean_of_draws,
    parse_routing,
    renormalise,
    support,
)

PROJECTION_NAME = "text_projection.safetensors"
# Of the schedulers' default, and what diffusers' networks embed.
_TIMESTEPS = 1000.0


# -- conditioning from token states ----------------------------------------------------------------


class TextProjection(InFloat32):
    """The encoder's pooled vector from its token states; stays in float32 in any ensemble."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("weight", tensors.get("weight"), persistent=False)
        self.register_buffer("bias", tensors.get("bias"), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors `(batch, dim)` float32 of tokens `(batch, length, width)` and their mask."""
        end = mask.sum(dim=1) - 1
        pooled = tokens[torch.arange(len(tokens), device=tokens.device), end].float()
        if self.weight is not None:
            pooled = pooled @ self.weight
        if self.bias is not None:
            pooled = pooled + self.bias
        return functional.normalize(pooled, dim=1)

    def save(self, folder: Path) -> None:
        """Write `text_projection.safetensors`, which `load` reads."""
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in self.named_buffers()},
            folder / PROJECTION_NAME,
        )

    @classmethod
    def load(cls, folder: Path, *, pooled: int) -> TextProjection | None:
        """Read what `save` wrote, for pooled vectors of a dimension; None where nothing is."""
        path = folder / PROJECTION_NAME
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise Refused(f"{path} is damaged ({error})", cure="assemble again") from error
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if any(shape[-1:] != [pooled] for shape in shapes.values()) or shapes.keys() - {
            "weight",
            "bias",
        }:
            raise Refused(
                f"{path} holds {shapes}",
                allowed=f"weight (width, {pooled}) and bias ({pooled},)",
                cure="assemble the ensemble again",
            )
        return cls(tensors)


# -- calls -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forward:
    """How a family's network is called besides `timestep` and `return_dict`, and what it returns.

    `ignored` are arguments that stock pipelines give and our networks have no use for.
    """

    picture: str
    output: type[Any]
    ignored: frozenset[str] = frozenset()


FORWARDS: dict[str, Forward] = {
    "unet": Forward("sample", UNet2DConditionOutput),
    # Sizes of the picture, which PixArt can be told; see `core/families.py`.
    "pixart": Forward("hidden_states", Transformer2DModelOutput, frozenset({"added_cond_kwargs"})),
    "uvit": Forward("hidden_states", Transformer2DModelOutput),
    "dit": Forward("hidden_states", Transformer2DModelOutput),
    "sd3": Forward("hidden_states", Transformer2DModelOutput),
}


@dataclass(frozen=True)
class Call:
    """A call in our terms: pictures in float32 at least, times `(batch,)` in [0, 1], captions."""

    x_t: Tensor
    t: Tensor
    cond: Conditioning
    output: Callable[[Tensor], Any]  # velocity -> what the caller is given


def read_call(
    family: str,
    families: Collection[str],
    projection: TextProjection | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Call:
    """What a call with the arguments of a family's own forward says; `UsageError` if it cannot be.

    A DiT is given no tokens, so that its callers say in `is_null` `(batch,)` which captions are
    empty. `families` are those of all experts that may be run.
    """
    row = FORWARDS[family]
    network = FAMILIES[family].network
    named = dict(kwargs)
    is_null = named.pop("is_null", None) if family == "dit" else None
    try:
        given = dict(inspect.signature(network.forward).bind(None, *args, **named).arguments)
    except TypeError as error:
        raise UsageError(
            f"This ensemble is called as {network.__name__} is, and was not: {error}",
            allowed=f"the arguments of {network.__name__}.forward",
            cure="load it with family=... for a pipeline of another of its families",
        ) from None
    given.pop("self")
    picture, timestep = given.pop(row.picture), given.pop("timestep", None)
    tokens = given.pop("encoder_hidden_states", None)
    mask = given.pop("encoder_attention_mask", None)
    pooled = given.pop("pooled_projections", None)
    as_dict = given.pop("return_dict", True)
    _refuse_more(given, row)
    if timestep is None:
        raise UsageError("There is no timestep", allowed="a number or a tensor, from 0 to 1000")
    x_t = picture.to(torch.promote_types(picture.dtype, torch.float32))
    t = torch.as_tensor(timestep, device=x_t.device).to(x_t.dtype) / _TIMESTEPS
    if tokens is None:
        _refuse_readers({family, *families})
        cond = _from_pooled(pooled, is_null)
    else:
        cond = _from_tokens(projection, tokens, mask, pooled)
    if len(cond) != len(x_t):
        raise UsageError(
            f"{len(x_t)} pictures are to be made of {len(cond)} captions",
            allowed="a caption a picture",
            cure="repeat the prompt's embeddings for num_images_per_prompt",
        )

    def output(velocity: Tensor) -> Any:
        velocity = velocity.to(picture.dtype)
        return row.output(sample=velocity) if as_dict else (velocity,)

    return Call(x_t, t.reshape(-1).expand(len(x_t)), cond.to(x_t), output)


def _refuse_more(given: Mapping[str, Any], row: Forward) -> None:
    """Refuse what would change a network's output and has no meaning for all experts at once."""
    more = [
        name
        for name, value in given.items()
        if name not in row.ignored and value is not None and value is not False and value != {}
    ]
    if more:
        raise UsageError(
            f"An ensemble has no use for {', '.join(more)}",
            allowed="pictures, timesteps and captions",
            cure="call the pipeline without ControlNet, adapters and skipped layers",
        )


def _refuse_readers(families: Collection[str]) -> None:
    """Refuse a call without tokens for experts that read them."""
    readers = sorted(name for name in families if FAMILIES[name].tokens is not None)
    if readers:
        raise UsageError(
            f"There are no token states, and experts of {', '.join(readers)} read them",
            allowed="encoder_hidden_states",
            cure="load the ensemble with family=... of one of those",
        )


def _from_pooled(pooled: Tensor | None, is_null: Tensor | None) -> Conditioning:
    """Captions for experts that read no tokens; there are none in it."""
    if pooled is None or is_null is None:
        raise UsageError(
            "Whether a caption is the empty one cannot be seen in its pooled vector",
            allowed="pooled_projections with is_null, True where a caption is empty",
            cure="use AtollPipeline, which knows",
        )
    nothing = pooled.new_zeros(len(pooled), 0, 0)
    mask = torch.zeros(len(pooled), 0, dtype=torch.bool, device=pooled.device)
    return Conditioning(nothing, mask, _unit(pooled), is_null.bool())


def _from_tokens(
    projection: TextProjection | None, tokens: Tensor, mask: Tensor | None, pooled: Tensor | None
) -> Conditioning:
    """Captions from their token states, and from mask and pooled vector where they are given."""
    mask = tokens.abs().amax(dim=2) > 0 if mask is None else mask.bool()
    if not bool(mask.any(dim=1).all()):
        raise UsageError(
            "A row of the prompt's token states is empty",
            allowed="tokens of the ensemble's own encoder; the empty caption has two",
            cure='take encoder.condition([""]).tokens for it',
        )
    pooled = _pooled(projection, tokens, mask) if pooled is None else _unit(pooled)
    return Conditioning(tokens, mask, pooled, is_empty(mask))


def _unit(pooled: Tensor) -> Tensor:
    """Of any length: stock SD3 wants entries of about 1, our encoder makes unit vectors."""
    return functional.normalize(pooled.float(), dim=1)


def _pooled(projection: TextProjection | None, tokens: Tensor, mask: Tensor) -> Tensor:
    if projection is None:
        raise UsageError(
            f"This ensemble has no {PROJECTION_NAME}, without which the gate cannot read captions",
            cure="assemble it again with `atoll assemble RUN`, or use AtollPipeline",
        )
    weight = projection.weight
    if weight is not None and len(weight) != tokens.shape[2]:
        raise UsageError(
            f"The prompt's token states are {tokens.shape[2]} wide",
            allowed=f"{len(weight)}, those of the ensemble's own encoder",
            cure="take encoder.condition([prompt]).tokens for prompt_embeds",
        )
    pooled: Tensor = projection(tokens, mask)
    return pooled


# -- routing without memory ------------------------------------------------------------------------


@dataclass(frozen=True)
class Stateless:
    """A routing that needs no memory of earlier calls."""

    routing: Routing
    experts: Tensor | None = None  # int64 `(pictures,)`, for `once`
    paired: bool = False

    def weights(
        self, gate: GateWeights, x_t: Tensor, t: Tensor, cond: Conditioning, shards: Sequence[str]
    ) -> Tensor:
        """With which weights experts are run, `(batch, shard)`, each row summing to 1."""
        if self.paired:
            _check_paired(x_t, t)
        bands = [self.routing.band(time) for time in t.tolist()]
        rules = {band: self.routing.rules[band] for band in sorted(set(bands))}
        p = x_t.new_zeros(len(x_t), len(shards))
        if any(rule.kind not in ("once", "oracle") for rule in rules.values()):
            p = gate(x_t, t, cond)
        weights = torch.zeros_like(p)
        for band, rule in rules.items():
            here = torch.tensor(bands, device=p.device)[:, None] == band
            weights = torch.where(here, self._under(rule, p, shards), weights)
        return weights

    def _under(self, rule: Rule, p: Tensor, shards: Sequence[str]) -> Tensor:
        if rule.kind == "oracle":
            sole = torch.full((len(p),), list(shards).index(str(rule.argument)))
            return mean_of_draws(sole[:, None], len(shards)).to(p)
        if rule.kind == "once":
            assert self.experts is not None
            return mean_of_draws(
                _for_rows(self.experts, len(p), self.paired)[:, None], len(shards)
            ).to(p)
        chosen = support(rule, p)
        if self.paired:
            null, conditional = chosen.chunk(2)
            chosen = (null | conditional).repeat(2, 1)
        return renormalise(p * chosen)


def stateless(
    text: str, shards: Sequence[str], *, experts: Tensor | Sequence[int] | None, paired: bool
) -> Stateless:
    """A routing for a forward without memory; `UsageError` with the reason where there is none."""
    routing = parse_routing(text, shards)
    kinds = {rule.kind for rule in routing.rules}
    if "sample" in kinds:
        raise UsageError(
            f"The routing '{routing}' draws at every step of a solver, and a forward does not know "
            "where one begins",
            allowed="full, top-k:K, mass:P, threshold:Q, oracle:SHARD, and once with experts",
            cure="use AtollPipeline",
        )
    if "once" not in kinds:
        if experts is not None:
            raise UsageError(f"The routing '{routing}' takes no experts", allowed="'once' does")
        return Stateless(routing, None, paired)
    if any(rule.kind == "once" for rule in routing.rules[1:]):
        raise UsageError(
            f"The routing '{routing}' draws from the posterior on the way, and a forward cannot "
            "remember",
            allowed="'once' from the start, with experts",
            cure="use AtollPipeline",
        )
    if experts is None:
        raise UsageError(
            f"The routing '{routing}' keeps what it drew, and a forward cannot remember",
            allowed="'once' with experts=..., one a picture",
            cure="give experts=model.draw(cond), or use AtollPipeline",
        )
    chosen = torch.as_tensor(experts)
    if (
        chosen.ndim != 1
        or len(chosen) == 0
        or chosen.dtype != torch.int64
        or int(chosen.min()) < 0
        or int(chosen.max()) >= len(shards)
    ):
        raise UsageError(
            f"The experts given are {chosen.tolist()}",
            allowed=f"whole numbers from 0 to {len(shards) - 1}, one a picture",
        )
    return Stateless(routing, chosen, paired)


def _for_rows(experts: Tensor, batch: int, paired: bool) -> Tensor:
    """One expert a row; with guidance a pipeline sends every picture twice."""
    times = 2 if paired else 1
    if batch != times * len(experts):
        raise UsageError(
            f"Experts were drawn for {len(experts)} pictures, and there are {batch} rows",
            allowed=f"{len(experts)}, or with guidance and paired=True {2 * len(experts)}",
            cure="call set_routing again with experts for this batch",
        )
    return experts.repeat(times)


def _check_paired(x_t: Tensor, t: Tensor) -> None:
    if len(x_t) % 2 or not all(torch.equal(*both.chunk(2)) for both in (x_t, t)):
        raise UsageError(
            "The two halves of this batch are not the two branches of guidance",
            allowed="[without the prompt, with it] for the same pictures",
            cure="set_routing with paired=False, or guide the pipeline",
        )
