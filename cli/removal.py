"""`atoll unlearn` and `atoll verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from atoll.cli.output import Result, RunArgument, command


def register(app: typer.Typer) -> None:
    """Add the commands."""

    @command(app, "unlearn", example="atoll unlearn out/run shard-02")
    def unlearn(
        run: RunArgument,
        shard: Annotated[str, typer.Argument(metavar="SHARD", help="The shard to take out.")],
    ) -> Result:
        """Take a shard out of ensemble, gate, soups and storage; write certificate.json."""
        from atoll.cli.signature import signature_name
        from atoll.cli.unlearn import CERTIFICATE_NAME
        from atoll.cli.unlearn import unlearn as do_unlearn
        from atoll.core.errors import Refused
        from atoll.core.lock import exclusive
        from atoll.core.manifest import Manifest
        from atoll.core.storage import Storage

        storage = Storage(run)
        Manifest.load(storage)  # no lock in a folder that is no run
        with exclusive(storage):
            certificate = do_unlearn(storage, shard)
        unreached = [place for place in certificate.beyond_reach if place.startswith("the export")]
        if unreached:
            raise Refused(
                f"{shard} is out of the run; beyond reach: {'; '.join(unreached)}",
                cure=f"remove it there by hand; {run}/{CERTIFICATE_NAME} names it",
            )
        signed = storage.exists(signature_name(CERTIFICATE_NAME))
        told = f"{shard} is out of {run}; recheck: atoll verify {run}/{CERTIFICATE_NAME}"
        return {
            "run": run,
            "shard": shard,
            "certificate": f"{run}/{CERTIFICATE_NAME}",
            "signed": signed,
            "changed": sorted(certificate.before),
            "beyond_reach": certificate.beyond_reach,
            "text": told + (" (signed)" if signed else ""),
        }

    @command(app, "verify", example="atoll verify out/run/certificate.json")
    def verify(
        target: Annotated[str, typer.Argument(metavar="RUN|CERTIFICATE", help="What to recheck.")],
        signer: Annotated[
            str | None,
            typer.Option(
                metavar="FILE", help="The public key, in PEM, of whoever signed the certificate."
            ),
        ] = None,
    ) -> Result:
        """Recheck a run or a removal from its files alone; exit 7 when anything does not hold."""
        from atoll.cli.verify import findings_json
        from atoll.cli.verify import verify as do_verify
        from atoll.core.errors import Refused

        findings = do_verify(target, signer=signer)
        broken = [finding for finding in findings if not finding.holds]
        if broken:
            raise Refused(
                f"{len(broken)} of {len(findings)} checks failed: "
                + "; ".join(f"{finding.what}: {finding.detail}" for finding in broken),
                cure="the files were changed after they were recorded; fetch them again",
            )
        return {
            "target": target,
            "holds": True,
            "checks": findings_json(findings),
            "text": "\n".join(f"ok  {finding.what}" for finding in findings),
        }
