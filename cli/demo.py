"""The demo: the whole loop on real pictures, from a corpus to a report, by the public functions.

    OUT/run          the run, as the commands would have made it
    OUT/control      a monolith of equal FLOPs, outside the run's lineage
    OUT/forgotten    a copy of the run, elsewhere, from which one shard was taken out
    OUT/report.html

Every stage is one that a command of its own would run, and is skipped where an interrupted demo has
finished it. A finished demo is left as it is.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from atoll.cli import evaluating
from atoll.cli.demo_report import Outcome, write_demo_report
from atoll.cli.demo_settings import DemoSettings, settings_for
from atoll.cli.digits import write_digits
from atoll.cli.output import Result
from atoll.cli.systems import load_model, one_expert, sample
from atoll.cli.training import base_within, experts_within
from atoll.cli.unlearn import unlearn
from atoll.cli.verify import verify
from atoll.core.config import CONFIG_NAME, load_config, save_config
from atoll.core.denoiser import Denoiser
from atoll.core.embedding import load_encoder
from atoll.core.errors import Refused
from atoll.core.journal import log
from atoll.core.ledger import Ledger
from atoll.core.lock import exclusive
from atoll.core.manifest import MANIFEST_NAME, Manifest, Plan
from atoll.core.pack import Pack, join
from atoll.core.recipes import recipe_of
from atoll.core.storage import Storage
from atoll.evaluate.evaluation import Evaluation, System, evaluate_systems
from atoll.evaluate.reference import TRAIN, load_records
from atoll.evaluate.views import read_curve
from atoll.islands.base import train_base
from atoll.islands.settings import TrainConfig
from atoll.islands.supervise import train
from atoll.islands.train_denoiser import train_here
from atoll.merge import soup as soups
from atoll.partitioner.pipeline import partition
from atoll.router.assemble import assemble
from atoll.router.calibrate import GateCalibration

CONTROL = "monolith"
SOUP = "soups/all"
MEASURED = ("base", CONTROL, "full", "once", "top-k:1", "soup")
_JOURNAL = "journal.jsonl"
_ROUTINGS = ("full", "once", "top-k:1", "mass:0.9", "threshold:0.1", "sample:2")


def run_demo(
    out: str, *, corpus: str | None, shards: int, minutes: float | None, smallest: bool
) -> Result:
    """Run every stage that is not done yet, and write the report."""
    settings = settings_for(corpus=corpus, shards=shards, minutes=minutes, smallest=smallest)
    place = Storage(out)
    with exclusive(place):
        if place.exists(CONFIG_NAME):
            earlier = load_config(DemoSettings, place.local(CONFIG_NAME))
            # Before its partition stands, as after a corpus that was refused, nothing is lost.
            if earlier != settings and place.exists(f"run/{MANIFEST_NAME}"):
                raise Refused(
                    f"{out} holds a demo with other options",
                    cure="give the same options, or another --out",
                )
        elif place.list():
            raise Refused(f"{out} is not empty and holds no demo", cure="give another --out")
        save_config(settings, place, "")
        if not place.exists("report.html"):
            _Demo(place, settings).run()
        else:
            log.info("this demo is done; remove %s to run it anew", out)
    return _result(out)


class _Demo:
    """One demo at one place."""

    def __init__(self, place: Storage, settings: DemoSettings) -> None:
        self.place = place
        self.settings = settings
        self.run_storage = Storage(place.local("") / "run")
        self.outcome = Outcome(settings)

    def run(self) -> None:
        """All stages in order."""
        torch.set_num_threads(self.settings.threads)
        corpus = self.settings.corpus or write_digits(self.place)
        with exclusive(self.run_storage):
            with self._timed("partition"):
                manifest = partition(corpus, self.run_storage, self.settings.partition)
            with self._timed("base"):
                self._base(manifest)
            with self._timed("islands"):
                config = self._islands(manifest)
            with self._timed("control"):
                control = self._control(manifest, config)
            with self._timed("assemble and soup"):
                assemble(self.run_storage, manifest)
                _make_soup(self.run_storage, manifest)
            with self._timed("evaluation"):
                systems = self._systems(self.run_storage, control)
                self._evaluate(manifest, systems)
        with self._timed("unlearn and verify"):
            self._forget(manifest)
        broken = [finding for finding in self.outcome.findings if not finding.holds]
        name = "failed.html" if broken else "report.html"
        self.outcome.seconds = _seconds(self.place)
        with self._timed("report"):
            write_demo_report(self.outcome, self.place, self.run_storage, manifest, name=name)
            self._list_exports(name)
        if broken:
            raise Refused(f"The removal does not verify: {broken[0].what}: {broken[0].detail}")

    def _list_exports(self, report: str) -> None:
        """The report and the control show and hold every shard: a removal is to name them."""
        with exclusive(self.run_storage):
            manifest = Manifest.load(self.run_storage)
            for left in (report, "control"):
                manifest.add_export(f"{self.place.uri}/{left}")
            manifest.save(self.run_storage)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Journal what a stage took, so that a demo in several sittings reports all of them."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.place.append_line(_JOURNAL, json.dumps({"stage": stage, "seconds": seconds}))
        log.info("%s took %.0f s", stage, seconds)

    def _base(self, manifest: Manifest) -> None:
        config, minutes = self.settings.base, self.settings.minutes
        if minutes is not None:
            config = base_within(self.run_storage, manifest, config, minutes * 0.2)
        train_base(self.run_storage, manifest, config)

    def _islands(self, manifest: Manifest) -> TrainConfig:
        config, minutes = self.settings.train, self.settings.minutes
        if minutes is not None:
            config = experts_within(self.run_storage, manifest, config, minutes * 0.3)
        train(self.run_storage, manifest, config)
        return config

    def _control(self, manifest: Manifest, config: TrainConfig) -> Denoiser:
        """What one cluster would have trained: the same base, all private records, equal FLOPs.

        As many steps as an island with all the islands' batches together, as DDM compares
        (arXiv 2501.05450, section 5). The gate heads' FLOPs come on top of the islands'.
        """
        control = Storage(self.place.local("") / "control")
        plans = [shard.plan for shard in manifest.shards.values() if shard.plan is not None]
        assert manifest.base is not None
        if not control.exists("expert"):
            run = self.run_storage
            denoiser = Denoiser.load(run.local(manifest.base.path))
            denoiser.card = denoiser.card.model_copy(
                update={"name": CONTROL, "kind": "expert", "base_sha256": manifest.base.sha256}
            )
            batch = sum(plan.batch for plan in plans)
            steps = round(sum(plan.images_seen for plan in plans) / batch)
            pack = join([Pack(run.local(shard.path)) for shard in manifest.shards.values()])
            trained = train_here(
                control,
                "training",
                denoiser,
                pack,
                config.training,
                learning_rate=recipe_of(str(manifest.recipe)).learning_rate,
                plan=Plan(batch=batch, images_seen=steps * batch),
                seed=manifest.seed,
                stream=CONTROL,
                threads=self.settings.threads,
                device=config.device,
            )
            with control.writing_folder("expert") as folder:
                trained.save(folder)
        return Denoiser.load(control.local("expert"))

    def _systems(self, run: Storage, control: Denoiser) -> dict[str, System]:
        """Everything that is sampled, by name, in the report's order."""
        steps = self.settings.steps
        manifest = Manifest.load(run)
        assert manifest.base is not None
        encoder = load_encoder(run.local(manifest.encoder.path))
        models = {"base": Denoiser.load(run.local(manifest.base.path)), CONTROL: control}
        models |= {
            name: Denoiser.load(run.local(expert.path)) for name, expert in manifest.experts.items()
        }
        models["soup"] = Denoiser.load(run.local(SOUP))
        systems = {
            name: evaluating.systems_of(
                one_expert(model, encoder), name, routings=["full"], steps=steps
            )[0]
            for name, model in models.items()
        }
        systems[CONTROL] = evaluating.as_control(systems[CONTROL])
        ensemble = load_model(str(run.local("ensemble")))
        found = evaluating.systems_of(ensemble, "ensemble", routings=_ROUTINGS, steps=steps)
        return systems | {system.name: system for system in found}

    def _evaluate(self, manifest: Manifest, systems: dict[str, System]) -> None:
        run, settings, outcome = self.run_storage, self.settings, self.outcome
        saved = run.exists("evaluation/metrics.json")
        outcome.evaluation = (
            Evaluation.load(run)
            if saved
            else evaluating.with_choice(
                evaluate_systems(
                    [systems[name] for name in MEASURED],
                    evaluating.reference_of(run, manifest),
                    load_encoder(run.local(manifest.encoder.path)),
                    seed=manifest.seed,
                    count=settings.pictures,
                    instrument=evaluating.instrument_of(run, manifest),
                    real=load_records(run, manifest, split=TRAIN),
                    control=CONTROL,
                ).model_copy(update={"gates": {"ensemble": self._gate(manifest)}}),
                manifest,
                "ensemble",
            )
        )
        evaluating.save_evaluation(outcome.evaluation, run, manifest)
        outcome.prompts = evaluating.prompts_of(run, manifest, settings.prompts)
        outcome.comparison = evaluating.comparison(
            list(systems.values()), outcome.prompts, manifest, seed=manifest.seed
        )
        outcome.traced = sample(
            load_model(str(run.local("ensemble"))),
            outcome.prompts,
            steps=settings.steps,
            seed=manifest.seed,
            trace=True,
        )
        outcome.curves = (
            *evaluating.training_curves(run, manifest),
            read_curve(
                Storage(self.place.local("") / "control"), CONTROL, "training/metrics.jsonl"
            ),
        )

    def _gate(self, manifest: Manifest) -> GateCalibration:
        ensemble = load_model(str(self.run_storage.local("ensemble")))
        return evaluating.gate_of(ensemble, self.run_storage, manifest)

    def _forget(self, manifest: Manifest) -> None:
        """Copy the run elsewhere, take a shard out of the copy, and recheck it from its files."""
        outcome, folder = self.outcome, self.place.local("") / "forgotten"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.run_storage.local(""), folder)
        copied = Storage(folder)
        # The shard whose captions the comparison shows first, so that the loss can be seen.
        outcome.removed = next(iter(manifest.shards))
        with exclusive(copied):
            outcome.certificate = unlearn(copied, outcome.removed)
        outcome.findings = verify(f"{folder}/certificate.json")
        control = Denoiser.load(self.place.local("control/expert"))
        after = self._systems(copied, control)
        outcome.after = evaluating.comparison(
            [after[name] for name in ("full", "soup")],
            outcome.prompts,
            manifest,
            seed=manifest.seed,
        )
        outcome.ledger = Ledger(copied).entries()


def _make_soup(run: Storage, manifest: Manifest) -> None:
    """All experts with weight 1, recorded as `atoll soup create` records it."""
    from atoll.cli.recording import remember

    folder = run.local(SOUP)
    experts: dict[Path | str, int] = {
        run.local(expert.path): 1 for expert in manifest.experts.values()
    }
    remember(soups.create(folder, experts), run, manifest)


def _seconds(place: Storage) -> dict[str, float]:
    """What each stage took, over all sittings; a line that a kill has torn is left out."""
    seconds: dict[str, float] = {}
    for line in place.read_lines(_JOURNAL):
        seconds[line["stage"]] = seconds.get(line["stage"], 0.0) + line["seconds"]
    return seconds


def _result(out: str) -> Result:
    evaluation = Evaluation.load(Storage(Path(out) / "run"))
    rows = {
        row.name: {
            "read_as_asked": None if row.reading is None else row.reading.accuracy.value,
            "kid": {name: quality.kid.value for name, quality in row.spaces.items()},
            "shares_distance": None if row.shares is None else row.shares.distance.value,
        }
        for row in evaluation.rows
    }
    return {"report": f"{out}/report.html", "run": f"{out}/run", "metrics": rows,
            "text": f"Look at {out}/report.html"}  # fmt: skip
