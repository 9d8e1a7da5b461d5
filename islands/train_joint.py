"""The `joint` gate: one classifier trained on the records of all shards, for who can centralise.

Decentralized Diffusion Models (arXiv 2501.05450, section 3.3): cross-entropy on the shard of a
noised record, records of all shards as often as there are. It descends from every shard: a removal
deletes it, and the ensemble goes back to the shards' own heads.
"""

from __future__ import annotations

import torch

from atoll.core import recipes
from atoll.core.cache import BlockCache
from atoll.core.errors import Refused
from atoll.core.ledger import Ledger
from atoll.core.manifest import Artefact, Manifest, Plan, check_artefact, require
from atoll.core.pack import join, open_pack
from atoll.core.storage import Storage
from atoll.core.trunk import TrunkConfig, first_stride
from atoll.islands.settings import BaseConfig, plan_beside
from atoll.islands.train_trunk import by_label, train_classifier

FOLDER = "joint-gate"
WORK = "joint-gate-training"


def train_joint(run: Storage, manifest: Manifest, config: BaseConfig) -> Artefact:
    """Train it where it is not there yet, as the trunk was by `config`; the same command resumes.

    As many images as all experts see, within the trunk's limit. `Refused` where a shard's records
    are not in the run.
    """
    if manifest.joint_gate is not None:
        check_artefact(run, manifest.joint_gate)
        return manifest.joint_gate
    require(manifest.trunk, "trunk of its gate", "train one with `atoll base RUN`")
    away = [name for name, shard in manifest.shards.items() if not run.exists(shard.path)]
    if away:
        raise Refused(
            f"A joint gate is trained on the records of all shards, and those of {', '.join(away)} "
            "are not in the run",
            cure="leave out --gate joint: the shards' own heads need no records",
        )
    cache = BlockCache(config.cache_gib)
    packs = [open_pack(run, shard, cache) for shard in manifest.shards.values()]
    every = join(packs)
    sizes = torch.tensor([pack.card.records for pack in packs])
    shard_of = torch.repeat_interleave(torch.arange(len(packs)), sizes)
    task = by_label(list(manifest.shards), shard_of, every)
    made = TrunkConfig(
        channels=manifest.picture.channels,
        pooled=every.pooled_width,
        width=config.trunk.width,
        stride=first_stride(manifest.picture),
        labels=task.counts,
    )
    plans = [shard.plan for shard in manifest.shards.values() if shard.plan is not None]
    experts = Plan(batch=1, images_seen=sum(plan.images_seen for plan in plans))
    recipe = recipes.recipe_of(str(manifest.recipe))
    cost = recipes.gate_cost(made, recipe, manifest.picture, every.null)
    classifier = train_classifier(
        run, WORK, made, every, task, config.trunk,
        plan_beside(config.trunk, experts, cost=cost),
        seed=manifest.seed, stream="joint-gate", threads=config.threads, device=config.device,
        bitwise_resume=config.bitwise_resume,
    )  # fmt: skip
    run.write_folder(FOLDER, classifier.save)
    sha256 = run.sha256(FOLDER)
    manifest.joint_gate = Artefact(path=FOLDER, sha256=sha256)
    ledger = Ledger(run)
    parents = [
        entry for name in manifest.shards if (entry := ledger.latest("shard", name)) is not None
    ]
    ledger.append("joint_gate", "joint_gate", sha256, parents=parents, shards=list(manifest.shards))
    manifest.save(run)
    return manifest.joint_gate
