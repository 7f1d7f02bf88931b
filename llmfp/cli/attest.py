"""llmfp-fast attest: what compliance asks for, as files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from llmfp import api, attestation
from llmfp.attestation import File
from llmfp.checkpoint import Checkpoint
from llmfp.checkpoint.adapter import is_adapter
from llmfp.cli.options import SOURCE, check_writable, debug_option, json_option, reading_options
from llmfp.cli.progress import ProgressBar
from llmfp.fingerprint import SUFFIX, Fingerprint, write_whole
from llmfp.report import printable

BOM, STATEMENT = "bom.cdx.json", "statement.intoto.json"


@click.command("attest", short_help="Write a CycloneDX ML-BOM and an in-toto statement, ready to sign.")
@click.argument("source", type=SOURCE)
@click.option(
    "--against",
    metavar="B",
    type=SOURCE,
    help="A model to compare SOURCE with; a relation that is detected becomes part of the pedigree.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR", help="Where files go."
)
@json_option
@reading_options
@debug_option
def command(
    source: str, against: str | None, out: Path, as_json: bool, tower: str | None, base: Path | None, **more: Any
) -> None:
    """Reads all weight files of SOURCE for their sha256 (of a model on the Hub, takes what the Hub states) and writes
    into DIR a bill of materials (bom.cdx.json, CycloneDX), an unsigned in-toto statement about the weights
    (statement.intoto.json), and the evidence they name.

    A detected relation is written down as a variant: nothing here shows which of two models came first.
    """
    if base is not None and not (is_adapter(Path(source)) or (against is not None and is_adapter(Path(against)))):
        raise click.BadParameter("neither SOURCE nor B is an adapter", param_hint="--base")
    attestation.ready()
    check_writable(out, "--out")
    deep = more["sample"] is None
    reading = {**more, "deep": deep, "tower": tower if tower == "vision" else None}
    fingerprint, files = _attested(source, base if is_adapter(Path(source)) else None, reading)
    comparison = None
    if against is not None:
        other, _ = _scanned(against, base if is_adapter(Path(against)) else None, reading)
        comparison = api.compare(fingerprint, other, tower=tower).to_json()
    out.mkdir(exist_ok=True)
    fingerprint.save(out / f"fingerprint{SUFFIX}")
    beside = [_described(out / f"fingerprint{SUFFIX}")]
    if comparison is not None:
        beside.append(_written(out / "comparison.json", json.dumps(comparison, indent=2, allow_nan=False)))
    bom = attestation.bill_of_materials(fingerprint.to_json(), files, beside, comparison)
    written = [*beside, _written(out / BOM, bom)]
    written.append(_written(out / STATEMENT, json.dumps(attestation.statement(files, bom), indent=2)))
    if as_json:
        found = {
            "schema": "llmfp.attestation/1",
            "subject": [_listed(file) for file in files],
            "written": [_listed(file) for file in written],
            "verdict": None if comparison is None else comparison["verdict"],
        }
        click.echo(json.dumps(found, indent=2))
        return
    for file in files:
        click.echo(f"{file.sha256}  {printable(file.name)}")
    if comparison is not None:
        click.echo(f"verdict with {printable(comparison['b']['name'])}: {comparison['verdict']}")
    click.echo(f"in {printable(str(out))}: {', '.join(file.name for file in written)}")


def _attested(source: str, base: Path | None, reading: dict[str, Any]) -> tuple[Fingerprint, tuple[File, ...]]:
    """The fingerprint, whose source now holds its files' digests, and the files."""
    fingerprint, checkpoint = _scanned(source, base, reading)
    if checkpoint is None:
        return fingerprint, attestation.known_files(fingerprint.source)
    with ProgressBar() as bar:
        files = attestation.weight_files(checkpoint, bar)
    listed = [_listed(file) for file in files]
    return replace(fingerprint, source={**fingerprint.source, "files": listed}), files


def _scanned(source: str, base: Path | None, reading: dict[str, Any]) -> tuple[Fingerprint, Checkpoint | None]:
    """The fingerprint, and the checkpoint it was read from; None where it was a saved one."""
    opened: list[Checkpoint] = []
    with ProgressBar() as bar:
        fingerprint = api.scan(
            source, base=base, planned=lambda plan: opened.append(plan.checkpoint), progress=bar, **reading
        )
    return fingerprint, opened[0] if opened else None


def _written(path: Path, content: str) -> File:
    write_whole(path, content.encode())
    return _described(path)


def _described(path: Path) -> File:
    content = path.read_bytes()
    return File(path.name, len(content), hashlib.sha256(content).hexdigest())


def _listed(file: File) -> dict[str, Any]:
    """As `source.files` in a fingerprint's JSON."""
    fields = asdict(file)
    return {"name": fields["name"], "bytes": fields["nbytes"], "sha256": fields["sha256"]}
