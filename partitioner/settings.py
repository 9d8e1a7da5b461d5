"""What `atoll partition` can be told; saved with the result as `partition/atoll.config.json`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from atoll.core.config import Config
from atoll.core.embedding import FitConfig
from atoll.core.errors import UsageError
from atoll.core.manifest import CLUSTERS, parse_size


class Columns(Config):
    """Names of the corpus's columns; one that is not given is found by its usual names."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    owner: str | None = None


class ClusterConfig(Config):
    """Two-stage spherical k-means."""

    fine: int = Field(default=1024, ge=1)  # at most; a small commons is given fewer
    records_per_fine: int = Field(default=8, ge=1)
    iterations: int = Field(default=25, ge=1)
    tries: int = Field(default=5, ge=1)  # of the coarse stage, which is cheap; the best is kept


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) else value


def _as_buckets(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value:
        sizes = [parse_size(str(text)) for text in value]
        if len(set(sizes)) < len(sizes):
            raise ValueError("a shape is listed twice; leave it out once")
    elif value is not None and (type(value) is not int or value < 1):
        raise ValueError('allowed: how many shapes, or a list of them, ["HxW", ...]')
    return value


class PartitionConfig(Config):
    """Everything but the corpus and the run."""

    shards: int | None = Field(default=None, ge=1)
    encoder: str = "fit"
    vae: str | None = None  # an autoencoder, whose latents are trained on; None: pixels
    by: str = CLUSTERS  # or the column that says whose a record is
    # A fraction by hash of the record id, owners separated by commas, or the URI of a corpus.
    commons: Annotated[str, BeforeValidator(_as_text)] = "0.1"
    holdout: float = Field(default=0.05, ge=0, lt=1)
    fit_on: Literal["commons", "all"] = "commons"
    seed: int = 0
    # Taken from the commons when not given: a private record must not decide for the others.
    size: int | None = Field(default=None, ge=4, le=1024)
    # How many shapes pictures are fitted to, or which, "HxW"; None: the one square. Not saved where
    # there are none, so that such a partition is what it was before there were any.
    buckets: Annotated[int | tuple[str, ...] | None, BeforeValidator(_as_buckets)] = Field(
        default=None, exclude_if=lambda buckets: buckets is None
    )
    channels: Literal[1, 3] | None = None  # None: also the autoencoder's
    flips: bool = False  # training sees pictures mirrored too; not for text or digits
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    max_uncaptioned: float = Field(default=0.5, ge=0, le=1)
    columns: Columns = Columns()
    clusters: ClusterConfig = ClusterConfig()
    fit: FitConfig = FitConfig()
    records_per_file: int = Field(default=4096, ge=1)

    @property
    def by_owner(self) -> bool:
        """Whether shards are owners and not clusters."""
        return self.by != CLUSTERS


def commons_fraction(config: PartitionConfig) -> float | None:
    """The fraction that `--commons` gives, or None when it names owners or a corpus."""
    try:
        return float(config.commons)
    except ValueError:
        return None


def names_a_corpus(commons: str) -> bool:
    """Whether `--commons` reads like a path or URI, which no fraction and few owners do."""
    return "://" in commons or "/" in commons or commons.endswith((".parquet", ".jsonl", ".csv"))


def check_options(config: PartitionConfig) -> None:
    """Refuse options that contradict each other, before anything is read."""
    if config.commons.strip() == "":
        raise UsageError("--commons is empty", allowed="a fraction, owners, or the URI of a corpus")
    fraction = commons_fraction(config)
    if fraction is not None and not 0 < fraction < 1:
        raise UsageError(
            f"--commons {config.commons} is not a fraction",
            allowed="a number between 0 and 1, owners separated by commas, or a URI",
        )
    if isinstance(config.buckets, tuple) and config.size is not None:
        raise UsageError(
            f"The shapes of buckets are listed, so size={config.size} says nothing",
            cure="leave size out, or give buckets a number",
        )
    if config.by_owner and fraction is not None:
        raise UsageError(
            f"--by {config.by} makes every owner a shard, and --commons {config.commons} would "
            "take a slice of everybody's records into what all shards see",
            allowed="whole owners that agreed, or a second corpus",
            cure="give --commons OWNER,OWNER or --commons URI",
        )
    if config.by_owner and config.shards is not None:
        raise UsageError(
            f"--by {config.by} makes one shard per owner, so --shards {config.shards} says nothing",
            cure="leave --shards out",
        )
    if not config.by_owner and config.shards is None:
        raise UsageError("--shards is needed to partition by clusters", cure="give --shards K")
    if not config.by_owner and fraction is None and not names_a_corpus(config.commons):
        raise UsageError(
            f"--commons {config.commons} names owners, and this partition is by clusters",
            allowed="a number between 0 and 1, or the URI of a corpus",
            cure="give --by COLUMN too, or a fraction",
        )
