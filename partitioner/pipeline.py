"""The partition on one page: corpus -> commons, encoder, centroids, shards, report, manifest.

Whatever is made of more than one shard's records is made of the commons alone (unless `--fit-on
all` asks otherwise), and whatever is one shard's is made in an order that its records fix. So a
shard leaves no trace in the others' files, and `forget` has little to do. The manifest is written
last: a run without one is not a run yet, and the same command starts it anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from atoll.core.embedding import Encoder
from atoll.core.journal import log
from atoll.core.latents import Autoencoder, load_autoencoder
from atoll.core.ledger import Ledger
from atoll.core.manifest import Commons, Manifest, Partition, Picture, Shard, Vae
from atoll.core.manifest import Encoder as EncoderArtefact
from atoll.core.pictures import is_gray
from atoll.core.storage import Storage
from atoll.partitioner.assignments import COMMONS, listed, write_assignments, write_unreadable
from atoll.partitioner.buckets import sizes_of
from atoll.partitioner.cluster import Centroids
from atoll.partitioner.embed import Embedder, make_encoder
from atoll.partitioner.placement import (
    Placement,
    fitted_centroids,
    is_skewed,
    place_by_clusters,
    place_by_owner,
    training_only,
)
from atoll.partitioner.previous import FOLDER, corpora, finished, start_anew
from atoll.partitioner.records import Gathered, Record, Spool, gather, without_duplicates
from atoll.partitioner.report import write_report
from atoll.partitioner.settings import PartitionConfig, check_options
from atoll.partitioner.shards import ShardWriter

CENTROIDS_NAME = f"{FOLDER}/centroids.safetensors"
_LARGEST_OWN_SIZE = 32
_LARGEST_ENCODED = 256  # of pictures that an autoencoder makes smaller


def partition(corpus: str, run: Storage, config: PartitionConfig) -> Manifest:
    """Partition a corpus into a run, or hand back the manifest of the same partition made before.

    Raises `UsageError` and `DataError` before anything in `run` is touched, and `Refused` when
    `run` holds another partition or files of somebody else.
    """
    check_options(config)
    earlier = finished(corpus, run, config)
    if earlier is not None:
        return earlier
    with Spool() as spool:
        gathered = gather(corpus, spool, config)
        public = training_only(gathered.commons, config)
        autoencoder = None if config.vae is None else load_autoencoder(config.vae)
        pictures = _pictures(public, gathered.private, spool, config, autoencoder)
        fitting = public if config.fit_on == "commons" else _everybody(gathered, config)
        encoder = make_encoder(fitting, spool, config)
        embed = Embedder(encoder, spool, public)
        if config.by_owner:
            centroids = None
            placement = place_by_owner(gathered, embed, config)
        else:
            centroids = fitted_centroids(fitting, embed, config)
            placement = place_by_clusters(gathered, centroids, embed, config)
        sources = corpora(corpus, config)
        start_anew(run, config)
        buckets = [] if config.buckets is None else pictures
        writer = ShardWriter(run, spool, encoder, autoencoder, _main(pictures), buckets, config)
        return _write(writer, gathered, placement, centroids, sources)


def _everybody(gathered: Gathered, config: PartitionConfig) -> list[Record]:
    return training_only(without_duplicates(gathered.commons + gathered.private), config)


def _pictures(
    public: Sequence[Record],
    private: Sequence[Record],
    spool: Spool,
    config: PartitionConfig,
    autoencoder: Autoencoder | None,
) -> list[Picture]:
    """The shapes of pictures: as configured, else the square of the commons' training records.

    An autoencoder decides how many channels, and is worth its while with larger pictures.
    """
    size, largest = config.size, _LARGEST_OWN_SIZE
    channels: int | None = config.channels
    if autoencoder is not None:
        channels, largest = channels or autoencoder.channels, _LARGEST_ENCODED
    if size is None:
        sizes = {spool.picture(record).size for record in public}
        width, height = min(sizes)
        own = len(sizes) == 1 and width == height <= largest
        size = width if own else largest
    if channels is None:
        channels = 1 if all(is_gray(spool.picture(record)) for record in public) else 3
        coloured = channels == 1 and any(not is_gray(spool.picture(r)) for r in private)
        if coloured:
            log.warning("the commons is grey and private pictures are not: they are made grey, "
                        "unless you --set channels=3")  # fmt: skip
    factor = 1 if autoencoder is None else autoencoder.factor
    fitted = sizes_of(config.buckets, size, factor=factor)
    pictures = [Picture(channels=channels, height=high, width=wide) for high, wide in fitted]
    if autoencoder is not None:
        for picture in pictures:
            autoencoder.latents_of(picture)  # refused before anything is written
    return pictures


def _main(pictures: Sequence[Picture]) -> Picture:
    """The one that stands for all where one is asked for: the square, or the first."""
    return next((each for each in pictures if each.height == each.width), pictures[0])


# -- what is written -----------------------------------------------------------------------------


def _write(
    writer: ShardWriter,
    gathered: Gathered,
    placement: Placement,
    centroids: Centroids | None,
    sources: dict[str, str],
) -> Manifest:
    """All files, in the order in which they depend on each other, and the manifest."""
    run, config, ledger = writer.run, writer.config, Ledger(writer.run)
    seen = sorted(placement.shards) if config.fit_on == "all" else []

    encoder = _write_encoder(run, writer.encoder, seen)
    parents = [ledger.append("encoder", "encoder", encoder.sha256, shards=seen)]
    vae = None
    if writer.autoencoder is not None:
        vae = _write_vae(run, writer.autoencoder, writer.picture, str(config.vae))
        parents.append(ledger.append("vae", "vae", vae.sha256))
    card = writer.write(COMMONS, COMMONS, gathered.commons, labels=placement.contents)
    commons = Commons(
        path=COMMONS,
        sha256=run.sha256(COMMONS),
        declared=config.commons,
        records=card.records,
        held_out=card.held_out,
    )
    parents.append(ledger.append(COMMONS, COMMONS, commons.sha256, parents=parents))
    if centroids is not None:
        run.write_bytes(CENTROIDS_NAME, centroids.as_safetensors())
        digest = run.sha256(CENTROIDS_NAME)
        parents.append(ledger.append("centroids", CENTROIDS_NAME, digest, parents=parents))

    shards, entries = {}, []
    for name, records in placement.shards.items():
        card = writer.write(f"shards/{name}", name, records)
        path = f"shards/{name}"
        shards[name] = Shard(
            path=path, sha256=run.sha256(path), records=card.records, held_out=card.held_out
        )
        entries.append(
            ledger.append("shard", name, shards[name].sha256, parents=parents, shards=[name])
        )
    sizes = [shard.records + shard.held_out for shard in shards.values()]
    if is_skewed(sizes):
        log.warning("the shards are skewed: from %d to %d records", min(sizes), max(sizes))

    write_assignments(run, placement.rows)
    write_unreadable(run, listed(gathered.unreadable, by_owner=config.by_owner))
    write_report(run)
    manifest = Manifest(
        picture=writer.shape(writer.picture),
        buckets=[writer.shape(picture) for picture in writer.buckets] or None,
        encoder=encoder,
        vae=vae,
        partition=Partition(
            path=FOLDER,
            sha256=run.sha256(FOLDER),
            by=config.by,
            fitted_on=seen if centroids else [],
        ),
        commons=commons,
        shards=shards,
        seed=config.seed,
    )
    ledger.append(
        FOLDER, FOLDER, manifest.partition.sha256, parents=[*parents, *entries], note=sources
    )
    manifest.save(run)
    return manifest


def _write_vae(run: Storage, autoencoder: Autoencoder, picture: Picture, spec: str) -> Vae:
    with run.writing_folder("vae") as folder:
        autoencoder.save(folder)
    return Vae(
        path="vae",
        sha256=run.sha256("vae"),
        spec=spec,
        latent_space=autoencoder.latent_space,
        picture=picture,
    )


def _write_encoder(run: Storage, encoder: Encoder, seen: list[str]) -> EncoderArtefact:
    with run.writing_folder("encoder") as folder:
        encoder.save_pretrained(folder)
    return EncoderArtefact(
        path="encoder",
        sha256=run.sha256("encoder"),
        spec=str(encoder.config.spec),
        fitted_on=seen,
    )
