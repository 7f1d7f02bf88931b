"""llmfp-fast registry: what is kept, and what becomes of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from llmfp.cli.options import debug_option, json_option
from llmfp.cli.progress import ProgressBar

SOME_WRONG = 3
_LISTED = (
    "repo", "revision", "digest", "architecture", "tower", "model_type", "layers", "hidden_size", "heads", "kv_heads",
    "head_dim", "base_models", "base_model_relation", "bytes_total", "file",
)  # fmt: skip
registry_argument = click.argument("registry")


@click.group("registry", short_help="List, add, remove, check, compact or export kept fingerprints.")
def command() -> None:
    """A registry is a directory, or any URL that fsspec knows, of fingerprints that never change, and an index in
    Parquet. Any number of processes may write to it at once."""


@command.command("ls", short_help="List the fingerprints.")
@registry_argument
@click.argument("repo", required=False)
@json_option
@debug_option
def ls(registry: str, repo: str | None, as_json: bool) -> None:
    """Lists what REGISTRY keeps: all of it, or of REPO alone. REPO may be an organisation, or a name's beginning."""
    from llmfp.report.registry import registry_table

    table = _open(registry).table(_LISTED)
    if repo is not None:
        from llmfp.registry.index import arrow

        table = table.filter(arrow().compute.starts_with(table["repo"], repo))
    if as_json:
        click.echo(json.dumps({"registry": registry, "fingerprints": table.to_pylist()}))
    else:
        click.echo(registry_table(table))


@command.command("add", short_help="Keep fingerprints.")
@registry_argument
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--repo", help="The name to keep it by; default: the source's own.")
@click.option("--revision", help="Its commit; default: the source's own, else the digest of its weights.")
@json_option
@debug_option
def add(registry: str, sources: tuple[str, ...], repo: str | None, revision: str | None, as_json: bool) -> None:
    """Keeps each SOURCE in REGISTRY, which is made if it is not there: saved fingerprints, or checkpoints, which are
    scanned."""
    if len(sources) > 1 and (repo or revision):
        raise click.UsageError("--repo and --revision name one source")
    from dataclasses import replace

    from llmfp.sources import fingerprinted, known

    opened = _open(registry, create=True)
    rows = []
    for text in sources:
        with ProgressBar() as bar:
            fingerprint, origin = fingerprinted(known(text), {"deep": True}, bar)
        rows += opened.add(
            [(fingerprint, replace(origin, repo=repo or origin.repo, revision=revision or origin.revision))]
        )
    kept = [{name: row[name] for name in ("repo", "revision", "digest", "file")} for row in rows]
    if as_json:
        click.echo(json.dumps({"registry": registry, "added": kept}, indent=2))
    else:
        _say(f"{row['repo']}@{row['revision']}" for row in kept)


@command.command("rm", short_help="Remove fingerprints.")
@registry_argument
@click.argument("keys", nargs=-1, required=True, metavar="REPO[@REVISION]...")
@json_option
@debug_option
def rm(registry: str, keys: tuple[str, ...], as_json: bool) -> None:
    """Removes all fingerprints of each REPO, or those whose revision begins with REVISION."""
    from llmfp.registry import RegistryError

    opened = _open(registry)
    gone = []
    for key in keys:
        repo, _, revision = key.partition("@")
        found = opened.remove(repo, revision)
        if not found:
            raise RegistryError(f"{registry}: no fingerprint of {key}", hint=f"llmfp-fast registry ls {registry}")
        gone += found
    if as_json:
        removed = [{"repo": repo, "revision": revision} for repo, revision in gone]
        click.echo(json.dumps({"registry": registry, "removed": removed}, indent=2))
    else:
        _say(f"{repo}@{revision}" for repo, revision in gone)


@command.command("verify", short_help="Check every file against the index.")
@registry_argument
@json_option
@debug_option
def verify(registry: str, as_json: bool) -> int:
    """Reads every fingerprint in REGISTRY and says which are missing, altered, or not in the index. Exits with 3 if
    any are."""
    opened = _open(registry)
    problems = list(opened.verify())
    count, digest = opened.table(["repo"]).num_rows, opened.digest()
    if as_json:
        found = {"registry": registry, "fingerprints": count, "digest": digest, "problems": list(map(asdict, problems))}
        click.echo(json.dumps(found, indent=2))
    else:
        _say([*(f"{problem.file}: {problem.reason}" for problem in problems),
              f"{count:,} fingerprints, {len(problems)} problems, digest {digest}"])  # fmt: skip
    return SOME_WRONG if problems else 0


@command.command("compact", short_help="Put the index into one file.")
@registry_argument
@json_option
@debug_option
def compact(registry: str, as_json: bool) -> None:
    """Puts the rows of REGISTRY's index, which every writer adds in a file of its own, into one file."""
    done = _open(registry).compact()
    if as_json:
        click.echo(json.dumps({"registry": registry, **asdict(done)}))
    else:
        _say([f"{done.rows:,} rows, in {done.files:,} files before, now in one"])


@command.command("export", short_help="Write the index as one Parquet or JSON-lines file.")
@registry_argument
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@json_option
@debug_option
def export(registry: str, out: Path, as_json: bool) -> None:
    """Writes all rows, σ included, to OUT: .parquet, or .jsonl with one JSON object a line."""
    from llmfp.fingerprint import write_whole
    from llmfp.registry.index import parquet_bytes

    if out.suffix not in (".parquet", ".jsonl"):
        raise click.BadParameter(f"{out} ends neither in .parquet nor in .jsonl", param_hint="OUT")
    table = _open(registry).table()
    if out.suffix == ".parquet":
        content = parquet_bytes(table)
    else:
        content = "".join(json.dumps(row, default=str) + "\n" for row in table.to_pylist()).encode()
    write_whole(out, content)
    if as_json:
        click.echo(json.dumps({"registry": registry, "out": str(out), "rows": table.num_rows, "bytes": len(content)}))
    else:
        _say([f"{table.num_rows:,} rows in {out} ({len(content):,} bytes)"])


def _open(registry: str, *, create: bool = False) -> Any:
    from llmfp.registry import Registry

    return Registry.open(registry, create=create)


def _say(lines: Any) -> None:
    from llmfp.report import printable

    for line in lines:
        click.echo(printable(line))
