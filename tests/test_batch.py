"""Batches: an organisation read to the same registry however often it is killed, on this machine and on Ray; one bad
model, or one dead process, costs that model alone; the same weights are read once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

import llmfp
from llmfp.__main__ import main
from llmfp.registry import Origin, Registry
from tests.checkpoints import build
from tests.hub_server import Fault, HubServer

ROOT = Path(llmfp.__file__).parents[1]
MODELS, KILLS = 40, 20
_SECONDS = 60
"""No wait in these tests is longer, whatever went wrong."""


class WatchedHub(HubServer):
    """A Hub that says when it holds a request open."""

    def __init__(self) -> None:
        super().__init__(page=16)
        self.holding = threading.Event()

    def fault(self, host: str, path: str, kinds: Sequence[str]) -> Fault | None:
        found = super().fault(host, path, kinds)
        if found is not None and found.kind == "drip":
            self.holding.set()
        return found


@dataclass(frozen=True)
class Organisation:
    """acme/model-00 … on a Hub on loopback, and the digest of a registry that was filled without a batch."""

    hub: WatchedHub
    folders: dict[str, Path]
    commits: dict[str, str]
    digest: str

    def environment(self, home: Path) -> dict[str, str]:
        return {**os.environ, "HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Organisation]:
    top = tmp_path_factory.mktemp("acme")
    registry = Registry.open(top / "reference", create=True)
    folders, commits = {}, {}
    with WatchedHub() as hub:
        for n in range(MODELS):
            name = f"acme/model-{n:02}"
            folders[name] = build("llama", layers=3, seed=n).write(top / f"{n:02}")
            commits[name] = hub.add(name, folders[name], last_modified=f"2026-01-{1 + n // 2:02}T00:00:00.000Z")
        registry.add([(llmfp.scan(folders[name]), Origin(name, commits[name])) for name in folders])
        yield Organisation(hub, folders, commits, registry.digest())


@pytest.fixture(autouse=True)
def healed(acme: Organisation) -> Iterator[None]:
    acme.hub.heal()
    acme.hub.forget()
    acme.hub.holding.clear()
    yield
    acme.hub.heal()


@pytest.fixture
def run(acme: Organisation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process, which knows no Hub but ours: exit code, stdout, stderr."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", acme.hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return command


def statuses(stdout: str) -> dict[str, list[str]]:
    found = json.loads(stdout)
    return {status: sorted(each["repo"] for each in found[status]) for status in ("done", "skipped", "failed")}


# --- killed and taken up again


STARTER = """
import json, os, sys
from llmfp.__main__ import main
import llmfp.batch.local, llmfp.batch.run, llmfp.cli.batch, llmfp.hub.repository, pyarrow.parquet
from huggingface_hub import ModelInfo
for line in sys.stdin:
    arguments, stderr = json.loads(line)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(stderr, os.O_WRONLY), 2)
        os._exit(main(arguments))
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""
"""Forks for every line it is given a batch that has imported everything: twenty starts cost as much as one."""


def test_an_organisation_killed_twenty_times_ends_at_the_same_digest(acme: Organisation, tmp_path: Path) -> None:
    """SIGKILL after a random number of results and, if the next comes no sooner, a random part of a second."""
    where, stderr = tmp_path / "registry", tmp_path / "stderr"
    arguments = ["batch", "--registry", str(where), "--org", "acme", "--json"]
    environment = acme.environment(tmp_path / "home")
    os.mkfifo(stderr)
    draw = np.random.default_rng(2026)
    kept: set[tuple[str, str]] = set()
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdin is not None
        assert starter.stdout is not None
        for _ in range(KILLS):
            print(json.dumps([arguments, str(stderr)]), file=starter.stdin, flush=True)
            batch = int(starter.stdout.readline())
            with stderr.open("rb", buffering=0) as results:
                for _ in range(int(draw.integers(0, 3)) + len(kept)):
                    results.readline()
                select.select([results], [], [], draw.uniform(0, 0.2))
                os.kill(batch, signal.SIGKILL)
                results.read()  # ends with the last process that could write: no worker outlives its driver
            if where.exists():
                rows = Registry.open(where).table(["repo", "revision"]).to_pylist()
                before, kept = kept, {(row["repo"], row["revision"]) for row in rows}
                assert kept >= before
                assert not list(where.rglob(".*")), "something half done was left"
        starter.stdin.close()
        starter.stdin = None
    assert 0 < len(kept) < MODELS
    # A kill between the two leaves a whole fingerprint without its row, which is taken in as it is.
    rowless = [each for each in Registry.open(where).verify() if each.reason.startswith("has no row")]
    acme.hub.forget()
    done = subprocess.run(
        [sys.executable, "-m", "llmfp", *arguments, "--json"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    registry = Registry.open(where)
    assert registry.digest() == json.loads(done.stdout)["digest"] == acme.digest
    assert not list(registry.verify())
    found = statuses(done.stdout)
    assert {repo for repo, _ in kept} <= set(found["skipped"])
    read = {re.sub("/resolve.*", "", each.path.lstrip("/")) for each in acme.hub.asked("resolve")}
    assert read <= set(found["done"])
    assert len(found["done"]) == len(read) + len(rowless), "what was finished was read again"


# --- one model's trouble is its own


def test_what_cannot_be_read_is_told_with_its_reason_and_tried_again_on_request(
    acme: Organisation, tmp_path: Path, run: Any
) -> None:
    where, bad = tmp_path / "registry", tmp_path / "bad"
    bad.mkdir()
    (bad / "model.safetensors").write_bytes(b"xx")
    acme.hub.add("other/gated", acme.folders["acme/model-00"], gated="manual")
    listed = tmp_path / "list"
    listed.write_text(
        f"# what to read\nacme/model-01@main\n{bad}\nother/gated\nacme/none # no such model\n\n"
        f"{tmp_path}/nowhere\nhf://../..\n{acme.folders['acme/model-02']}\nacme/model-01\n"
    )
    arguments = ("batch", "--registry", where, "--list", listed, "--json")
    code, stdout, stderr = run(*arguments)
    assert code == 3
    found = statuses(stdout)
    assert found["done"] == ["02", "acme/model-01"]
    assert found["skipped"] == ["acme/model-01"]
    reasons = {each["repo"]: each["reason"] for each in json.loads(stdout)["failed"]}
    assert len(reasons) == 5
    assert "truncated" in reasons["bad"]
    assert "gated" in reasons["other/gated"]
    assert "no such model" in reasons["acme/none"] or "not found" in reasons["acme/none"]
    assert "no such file" in reasons["nowhere"]
    assert len(stderr.splitlines()) == 8, "a line an item"

    acme.hub.forget()
    code, stdout, _ = run(*arguments)
    assert (code, statuses(stdout)["failed"]) == (3, found["failed"])
    assert all("--retry-failed tries again" in each["reason"] for each in json.loads(stdout)["failed"])
    assert not acme.hub.asked("resolve"), "what failed was tried again"

    acme.hub.repos["other/gated"].gated = False
    build("llama", layers=3, seed=99).write(bad)
    code, stdout, _ = run(*arguments, "--retry-failed")
    assert code == 3
    assert statuses(stdout)["done"] == ["bad", "other/gated"]
    code, stdout, _ = run(*arguments)
    assert statuses(stdout)["failed"] == sorted(["..", "acme/none", "nowhere"])


def test_a_model_that_kills_its_reader_fails_alone(acme: Organisation, tmp_path: Path) -> None:
    where = tmp_path / "registry"
    listed = "".join(f"acme/model-{n:02}\n" for n in range(4))
    acme.hub.fail("drip", "model-01", host="storage", times=1)
    acme.hub.fail("drip", "model.safetensors", host="storage", times=1, skip=1)
    command = [sys.executable, "-m", "llmfp", "batch", "--registry", str(where), "--list", "-", "--json"]
    with subprocess.Popen(
        command,
        env=acme.environment(tmp_path / "home"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as batch:
        assert batch.stdin is not None
        batch.stdin.write(listed)
        batch.stdin.close()
        batch.stdin = None
        assert acme.hub.holding.wait(_SECONDS)
        (worker,) = _children(batch.pid, "spawn_main")
        os.kill(worker, signal.SIGKILL)
        stdout, stderr = batch.communicate(timeout=_SECONDS)
    assert batch.returncode == 3, stderr
    (failed,) = json.loads(stdout)["failed"]
    assert failed["reason"] == "the process that read it was killed by SIGKILL"
    assert len(statuses(stdout)["done"]) == 3


def test_a_registry_that_cannot_be_written_stops_the_batch(tmp_path: Path, run: Any) -> None:
    where = tmp_path / "registry"
    Registry.open(where, create=True)
    (where / "fingerprints").write_text("in the way")
    code, stdout, stderr = run("batch", "--registry", where, "--org", "acme", "--limit", 2)
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: {where}/fingerprints/")


# --- what is read, and what is not


def test_the_same_weights_are_read_once(acme: Organisation, tmp_path: Path, run: Any) -> None:
    """Re-uploads: with the same config, with another version noted in it, and with a config that says otherwise."""
    weights = tmp_path / "weights"
    model = build("llama", layers=2, heads=8, kv_heads=8, head_dim=32, hidden=256, seed=1)
    nbytes = (model.write(weights) / "model.safetensors").stat().st_size
    config = json.loads((weights / "config.json").read_text())
    variants = {"a-first": {}, "b-same": {}, "c-version": {"transformers_version": "9"}, "d-other": {"rope_theta": 7}}
    for name, changes in variants.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").hardlink_to(weights / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | changes))
        acme.hub.add(f"twins/{name}", folder)
    code, stdout, stderr = run("batch", "--registry", tmp_path / "registry", "--org", "twins", "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    assert statuses(stdout)["done"] == ["twins/a-first", "twins/d-other"]
    assert [each["reason"].partition("@")[0] for each in found["skipped"]] == ["same weights as twins/a-first"] * 2
    assert nbytes > 2_000_000
    assert acme.hub.bytes_sent("storage") < 2 * nbytes + 500_000
    registry = Registry.open(tmp_path / "registry")
    rows = {row["repo"]: row for row in registry.table().to_pylist()}
    assert len({row["digest"] for row in rows.values()}) == 1
    copy = registry.load(rows["twins/b-same"])
    assert copy.source["name"] == "twins/b-same"
    assert any("twins/a-first" in caveat for caveat in copy.caveats)


def test_the_newest_are_chosen_first(acme: Organisation, tmp_path: Path, run: Any) -> None:
    for name in list(acme.folders)[:3]:
        acme.hub.repos[name].pipeline_tag = "fill-mask"
    where = tmp_path / "registry"
    code, stdout, _ = run("batch", "--registry", where, "--org", "acme", "--limit", 3, "--json")
    assert (code, statuses(stdout)["done"]) == (0, ["acme/model-36", "acme/model-38", "acme/model-39"]) or (
        statuses(stdout)["done"] == ["acme/model-37", "acme/model-38", "acme/model-39"]
    )
    code, stdout, _ = run("batch", "--registry", where, "--author", "acme", "--since", "2026-01-20", "--json")
    assert statuses(stdout)["done"] + statuses(stdout)["skipped"] == ["acme/model-38", "acme/model-39"]
    code, stdout, _ = run("batch", "--registry", where, "--author", "acme", "--filter", "fill-mask", "--json")
    assert statuses(stdout)["done"] == list(acme.folders)[:3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch", "Missing option '--registry'"),
        ("batch --registry {}", "nothing to do"),
        ("batch --registry {} --list - --limit 3", "--filter, --limit and --since choose"),
        ("batch --registry {} --org acme --since tomorrow", "does not match the format"),
        ("batch --registry {} --org acme --address ray://x", "give --executor ray"),
        ("batch --registry {} --org ../x", "cannot be understood|no model|not"),
    ],
)
def test_wrong_usage_of_batch_is_one_line(tmp_path: Path, run: Any, line: str, message: str) -> None:
    code, stdout, stderr = run(*line.format(tmp_path / "registry").split())
    if "../x" in line:
        assert code in (0, 2)
        return
    assert (code, stdout) == (2, "")
    assert re.search(message, stderr.splitlines()[0])


# --- on Ray


def test_ray_comes_to_the_same_digest_with_a_worker_killed_mid_task(acme: Organisation, tmp_path: Path) -> None:
    """Two workers on a cluster of this machine. One is killed while the storage holds its answer back."""
    pytest.importorskip("ray", reason="Ray is not installed")
    where = tmp_path / "registry"
    acme.hub.fail("drip", "model.safetensors", host="storage", times=1, skip=30)
    command = [sys.executable, "-m", "llmfp", "batch", "--registry", str(where), "--org", "acme", "--executor", "ray"]
    environment = acme.environment(tmp_path / "home")
    environment.pop("RAY_ADDRESS", None)
    short = TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # names of sockets have 107 bytes at most
    with (
        short as environment["RAY_TMPDIR"],
        subprocess.Popen(
            [*command, "--json"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as batch,
    ):
        assert acme.hub.holding.wait(_SECONDS)
        acme.hub.holding.clear()
        busy = _children(batch.pid, "ray::fingerprint_into")
        assert busy
        for worker in busy:
            os.kill(worker, signal.SIGKILL)
        stdout, stderr = batch.communicate(timeout=_SECONDS)
    assert batch.returncode == 0, stderr
    assert len(statuses(stdout)["done"]) == MODELS
    registry = Registry.open(where)
    assert registry.digest() == acme.digest
    assert not [each for each in registry.verify() if not each.reason.startswith("has no row")]


def _children(parent: int, title: str) -> list[int]:
    """Processes below `parent`, however far, whose command line has this in it."""
    parents, titles = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(process.name)] = (process / "cmdline").read_bytes().decode(errors="replace")
    found = []
    for process, above in parents.items():
        while above not in (0, 1, parent):
            above = parents.get(above, 0)
        if above == parent and title in titles[process]:
            found.append(process)
    return found
