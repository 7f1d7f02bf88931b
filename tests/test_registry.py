"""The registry: what was acknowledged is there, whoever was killed when and however many write at once; a fingerprint
never changes under its key; other tools read the index; and no stranger's name, row or file leads anywhere else.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmfp
from llmfp.__main__ import main
from llmfp.evidence import profile
from llmfp.fingerprint import Fingerprint
from llmfp.registry import Failure, Origin, Registry, RegistryError, nearest
from llmfp.registry.index import schema
from llmfp.registry.store import LocalStore, Store, open_store
from tests.checkpoints import build

ROOT = Path(llmfp.__file__).parents[1]
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def fingerprint(tmp_path_factory: pytest.TempPathFactory) -> Fingerprint:
    return llmfp.scan(build("llama", layers=6).write(tmp_path_factory.mktemp("registry") / "model"))


@pytest.fixture(params=["directory", "renaming", "memory"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new place on each kind of store: files without a name, files renamed, and fsspec."""
    if request.param == "memory":
        return f"memory://{tmp_path}"
    if request.param == "renaming":
        monkeypatch.delattr("os.O_TMPFILE")
    return str(tmp_path / "registry")


def other(fingerprint: Fingerprint, n: int) -> Fingerprint:
    """The same statistics by another digest."""
    return replace(fingerprint, digest=sha256(str(n).encode()).hexdigest())


def keys(registry: Registry) -> list[tuple[str, str]]:
    return [(row["repo"], row["revision"]) for row in registry.table(["repo", "revision"]).to_pylist()]


# --- what is kept


def test_what_is_added_is_there_in_order_and_comes_back_whole(where: str, fingerprint: Fingerprint) -> None:
    registry = Registry.open(where, create=True)
    for repo in ("org/b", "org/a"):
        registry.add([(fingerprint, Origin(repo, COMMIT, base_models=("org/base",)))])
    again = Registry.open(where)
    assert keys(again) == [("org/a", COMMIT), ("org/b", COMMIT)]
    row = again.table().to_pylist()[0]
    assert again.load(row) == fingerprint
    assert (row["std_q"], row["layers"], row["base_models"]) == (fingerprint.std["q"], 6, ["org/base"])
    assert row["digest"] == fingerprint.digest
    assert not list(again.verify())


def test_the_digest_is_of_what_is_kept_and_not_of_how(where: str, fingerprint: Fingerprint) -> None:
    one, two = Registry.open(where, create=True), Registry.open(f"{where}-2", create=True)
    added = [(other(fingerprint, n), Origin(f"org/{n}", COMMIT)) for n in range(5)]
    one.add(added)
    for each in reversed(added):
        two.add([each])
        two.add([each])
    two.compact()
    assert one.digest() == two.digest()
    two.remove("org/3")
    assert one.digest() != two.digest()


def test_a_key_keeps_its_numbers(where: str, fingerprint: Fingerprint) -> None:
    registry = Registry.open(where, create=True)
    first = registry.add([(fingerprint, Origin("org/a", COMMIT))])[0]
    assert registry.add([(fingerprint, Origin("org/a", COMMIT))])[0]["entry"] == first["entry"]
    with pytest.raises(RegistryError, match=r"org/a@a+ is kept with digest") as raised:
        registry.add([(other(fingerprint, 1), Origin("org/a", COMMIT))])
    assert "registry rm" in raised.value.hint
    assert len(keys(registry)) == 1


def test_what_is_added_again_is_known_by_the_later_row(where: str, fingerprint: Fingerprint) -> None:
    """A local model whose files were touched: the same numbers, and a new stamp to know them by."""
    registry = Registry.open(where, create=True)
    for stamp in "cadbfe":
        registry.add([(fingerprint, Origin("model", "digest:1", stamp=stamp))])
        assert registry.table(["stamp"]).to_pylist() == [{"stamp": stamp}]
    registry.compact()
    assert registry.table(["stamp"]).to_pylist() == [{"stamp": "e"}]


def test_a_sample_is_not_kept(where: str, fingerprint: Fingerprint) -> None:
    registry = Registry.open(where, create=True)
    with pytest.raises(RegistryError, match="org/a: rests on a sample"):
        registry.add([(replace(fingerprint, sample={"share": 0.1}), Origin("org/a", COMMIT))])
    assert keys(registry) == []


def test_removed_is_gone_and_may_come_back(where: str, fingerprint: Fingerprint) -> None:
    registry = Registry.open(where, create=True)
    for revision in ("aa", "ab", "b"):
        registry.add([(fingerprint, Origin("org/a", revision))])
    row = registry.table().to_pylist()[0]
    assert registry.remove("org/a", "a") == [("org/a", "aa"), ("org/a", "ab")]
    assert registry.remove("org/none") == []
    assert keys(registry) == [("org/a", "b")]
    with pytest.raises(llmfp.LlmfpError, match="no such file"):
        registry.load(row)
    registry.add([(other(fingerprint, 1), Origin("org/a", "aa"))])
    registry.compact()
    assert keys(registry) == [("org/a", "aa"), ("org/a", "b")]
    assert not list(registry.verify())


def test_two_writers_of_one_key_leave_one_row_and_one_file(
    where: str, fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked before either had written: as if each were alone."""
    registry = Registry.open(where, create=True)
    origin = Origin("org/a", COMMIT)

    with monkeypatch.context() as blind:
        blind.setattr(Registry, "_held", lambda *_: None)
        for _ in range(2):
            registry.add([(fingerprint, origin)])
    assert keys(registry) == [("org/a", COMMIT)]
    standing = registry.table(["entry"]).to_pylist()
    registry.compact()
    assert registry.table(["entry"]).to_pylist() == standing
    assert not list(registry.verify())
    assert len(open_store(where).names(f"fingerprints/{origin.key[:2]}")) == 1


def test_failures_are_noted_and_forgiven(where: str) -> None:
    registry = Registry.open(where, create=True)
    registry.fail(Failure("org/a", "main", "no such model"))
    registry.fail(Failure("../../b", "x/../y", "zürück"))
    assert sorted(registry.failures(), key=lambda each: each.repo)[0] == Failure("../../b", "x/../y", "zürück")
    registry.forgive("../../b", "x/../y")
    assert registry.failures() == [Failure("org/a", "main", "no such model")]


# --- whoever is killed when


class KilledError(BaseException):
    """The process is gone; nothing after it happens."""


class MortalStore:
    """A store whose process is killed before its n-th change."""

    def __init__(self, store: Store, changes: int) -> None:
        self._store, self._left, self.where = store, changes, store.where

    def _change(self) -> None:
        if not self._left:
            raise KilledError
        self._left -= 1

    def write(self, name: str, content: bytes) -> None:
        self._change()
        self._store.write(name, content)

    def delete(self, name: str) -> None:
        self._change()
        self._store.delete(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_killed_before_any_change_nothing_acknowledged_is_lost(tmp_path: Path, fingerprint: Fingerprint) -> None:
    """Adding, adding again, removing and compacting, killed before every single change that they make to the store."""
    for fatal in itertools.count():
        where = f"memory://{tmp_path}/{fatal}"
        acknowledged: set[str] = set()
        removed: set[str] = set()
        mortal = Registry(MortalStore(open_store(where), fatal))
        Registry.open(where, create=True)
        alive = False
        try:
            for n in range(3):
                mortal.add([(other(fingerprint, n), Origin(f"org/{n}", COMMIT))])
                acknowledged.add(f"org/{n}")
            removed.add("org/1")
            mortal.remove("org/1")
            mortal.add([(other(fingerprint, 2), Origin("org/2", COMMIT))])
            mortal.compact()
            mortal.add([(other(fingerprint, 3), Origin("org/3", COMMIT))])
            acknowledged.add("org/3")
            mortal.compact()
            alive = True
        except KilledError:
            pass
        after = Registry.open(where)
        found = {repo for repo, _ in keys(after)}
        assert found >= acknowledged - removed
        assert found <= {f"org/{n}" for n in range(4)}
        for n in range(4):  # taken up again: nothing is refused, nothing is there twice
            after.add([(other(fingerprint, n), Origin(f"org/{n}", COMMIT))])
        after.compact()
        assert keys(after) == [(f"org/{n}", COMMIT) for n in range(4)]
        assert {problem.reason for problem in after.verify()} <= {"was removed"}
        fsspec.filesystem("memory").rm(where, recursive=True)
        if alive:
            assert fatal > 15
            return


def test_a_fingerprint_without_a_row_is_taken_up(where: str, fingerprint: Fingerprint) -> None:
    Registry.open(where, create=True)
    with pytest.raises(KilledError):
        Registry(MortalStore(open_store(where), 1)).add([(fingerprint, Origin("org/a", COMMIT))])
    registry = Registry.open(where)
    assert [problem.reason.split(";")[0] for problem in registry.verify()] == ["has no row"]
    assert registry.adopt(Origin("org/b", COMMIT)) is None
    assert registry.adopt(Origin("org/a", COMMIT)) is not None
    assert keys(registry) == [("org/a", COMMIT)]
    assert not list(registry.verify())


def test_a_reader_finds_every_row_while_the_index_is_compacted(where: str, fingerprint: Fingerprint) -> None:
    """Between listing the index's files and reading them, another process compacts, adds, and compacts again."""
    registry = Registry.open(where, create=True)
    for n in range(3):
        registry.add([(other(fingerprint, n), Origin(f"org/{n}", COMMIT))])

    class Interrupted:
        def __init__(self, store: Store) -> None:
            self._store, self.where, self.reads = store, store.where, 0

        def path(self, name: str) -> AbstractContextManager[Path]:
            self.reads += 1
            if self.reads in (1, 2, 4):
                added = (other(fingerprint, 10 + self.reads), Origin(f"org/{10 + self.reads}", COMMIT))
                Registry.open(where).add([added])
                Registry.open(where).compact()
            return self._store.path(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

    store = Interrupted(open_store(where))
    found = {repo for repo, _ in keys(Registry(store))}
    assert store.reads > 4
    assert found >= {"org/0", "org/1", "org/2", "org/11", "org/12"}


WRITER = """
import sys
from dataclasses import replace
from hashlib import sha256
import llmfp
from llmfp.registry import Origin, Registry
where, saved, name, count, compacting = sys.argv[1:]
fingerprint, registry = llmfp.load(saved), Registry.open(where, create=True)
for n in range(int(count)):
    digest = sha256(f"{name}{n}".encode()).hexdigest()
    registry.add([(replace(fingerprint, digest=digest), Origin(f"{name}/{n}", "a" * 40))])
    print(f"{name}/{n}", flush=True)
    if compacting == "yes":
        registry.compact()
"""


def test_many_writers_at_once_some_killed(tmp_path: Path, fingerprint: Fingerprint) -> None:
    """Processes of their own: two add, two add and compact, of which one each is killed at a random acknowledgement."""
    where, saved, count = tmp_path / "registry", tmp_path / "a.fp.safetensors", 25
    fingerprint.save(saved)
    draw = np.random.default_rng(7)
    writers = {}
    for name, compacting in (("a", "no"), ("b", "no"), ("c", "yes"), ("d", "yes")):
        command = [sys.executable, "-c", WRITER, str(where), str(saved), name, str(count), compacting]
        writers[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    acknowledged: set[str] = set()
    for name in ("b", "d"):
        output = writers[name].stdout
        assert output is not None
        acknowledged |= {output.readline().strip() for _ in range(int(draw.integers(1, count)))}
        writers[name].kill()
    reader = None
    for writer in writers.values():
        rest, _ = writer.communicate(timeout=60)
        acknowledged |= set(rest.split())
        reader = reader or Registry.open(where)
        assert {repo for repo, _ in keys(reader)} >= acknowledged
    assert writers["b"].returncode == writers["d"].returncode == -signal.SIGKILL
    assert writers["a"].returncode == writers["c"].returncode == 0
    assert acknowledged >= {f"{name}/{n}" for name in "ac" for n in range(count)}
    assert reader is not None
    reader.compact()
    assert {repo for repo, _ in keys(reader)} >= acknowledged
    assert {problem.reason.split(";")[0] for problem in reader.verify()} <= {"has no row"}
    assert not list(where.rglob(".*")), "killed writers left something"


# --- hostile names, rows and files

NAMES = ("../../../etc/passwd", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "\udcff", "CON", "%2e%2e%2f", "ü" * 512, " ")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_never_leads_out_of_the_registry(tmp_path: Path, fingerprint: Fingerprint, name: str) -> None:
    registry = Registry.open(tmp_path / "registry", create=True)
    row = registry.add([(fingerprint, Origin(name, name, base_models=(name,), base_model_relation=name))])[0]
    registry.fail(Failure(row["repo"], row["revision"], "no"))
    assert registry.load(row) == fingerprint
    assert not list(registry.verify())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["registry"]
    assert registry.remove(row["repo"], row["revision"])


@pytest.mark.parametrize("name", ["", "x" * 513])
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, fingerprint: Fingerprint, name: str) -> None:
    registry = Registry.open(tmp_path / "registry", create=True)
    with pytest.raises(RegistryError, match="not 1 to 512"):
        registry.add([(fingerprint, Origin(name, COMMIT))])


def stranger_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {field.name: None for field in schema()}
    row |= dict.fromkeys(("repo", "revision", "file", "sha256", "digest", "architecture", "tower", "kind"), "x")
    row |= {"entry": "0" * 32, "layers": 1, "hidden_size": 1, "bytes_read": 0, "bytes_total": 0, "added": 0}
    row |= {f"std_{role}": [] for role in "qkvo"} | {"base_models": []}
    return row | changes


@pytest.mark.parametrize("entry", ["../../../../outside", "0" * 31, "0" * 33, "Z" * 32, ""])
def test_a_row_never_leads_out_of_the_registry(tmp_path: Path, entry: str) -> None:
    registry = Registry.open(tmp_path / "registry", create=True)
    (tmp_path / "outside").write_text("keep")
    pq.write_table(
        pa.Table.from_pylist([stranger_row(entry=entry, file="../outside")], schema=schema()),
        _made(tmp_path / "registry/index") / "add-1.parquet",
    )
    with pytest.raises(RegistryError, match="not 32 hex digits"):
        registry.load(registry.table().to_pylist()[0])
    assert [problem.file for problem in registry.verify()] == ["../outside"]
    with pytest.raises(RegistryError, match="not 32 hex digits"):
        registry.remove("x")
    assert (tmp_path / "outside").read_text() == "keep"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 1000, None])
def test_a_damaged_index_is_named_and_never_half_read(
    tmp_path: Path, fingerprint: Fingerprint, content: bytes | None
) -> None:
    registry = Registry.open(tmp_path / "registry", create=True)
    registry.add([(fingerprint, Origin("org/a", COMMIT))])
    file = next((tmp_path / "registry/index").iterdir())
    if content is None:
        pq.write_table(pa.table({"repo": ["x"], "entry": [1]}), file)
    else:
        file.write_bytes(content)
    with pytest.raises(RegistryError, match=rf"{file.name}: not a part of a registry's index"):
        registry.table()
    with pytest.raises(RegistryError, match=file.name):
        registry.compact()
    assert file.exists()


def test_verify_says_what_is_altered_missing_or_too_many(where: str, fingerprint: Fingerprint) -> None:
    registry = Registry.open(where, create=True)
    rows = [registry.add([(fingerprint, Origin(f"org/{n}", COMMIT))])[0] for n in range(3)]
    store = open_store(where)
    content = bytearray(store.read(rows[0]["file"], 1 << 20) or b"")
    content[-1] ^= 1
    store.write(rows[0]["file"], bytes(content))
    store.delete(rows[1]["file"])
    store.write("fingerprints/00/readme", b"")
    found = {problem.file: problem.reason for problem in registry.verify()}
    assert found == {
        rows[0]["file"]: "is not the file that was added: its sha256 is another",
        rows[1]["file"]: "is missing",
        "fingerprints/00/readme": "is no fingerprint of this registry",
    }


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- where no registry can be


def test_what_is_no_registry_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no registry"):
        Registry.open(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(RegistryError, match="not empty, and no registry"):
        Registry.open(tmp_path, create=True)
    (tmp_path / "registry.json").write_text('{"schema": "llmfp.registry/9"}')
    with pytest.raises(RegistryError, match=r"schema 'llmfp.registry/9' is not llmfp.registry/1"):
        Registry.open(tmp_path)
    (tmp_path / "registry.json").write_text("[")
    with pytest.raises(RegistryError, match=r"registry.json: not valid JSON"):
        Registry.open(tmp_path)
    with pytest.raises(RegistryError, match="nofs"):
        Registry.open("nofs://x")
    with pytest.raises(RegistryError, match="Not a directory"):
        Registry.open("/dev/null/registry", create=True)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow beyond 4 KiB: what a full disk says, but for the words.

    For as short as can be: pytest's own report may go to a file too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    if not unnamed:
        monkeypatch.delattr("os.O_TMPFILE")
    registry = Registry.open(tmp_path / "registry", create=True)
    with pytest.raises(RegistryError, match="File too large"), full_disk():
        registry.add([(fingerprint, Origin("org/a", COMMIT))])
    assert [path.name for path in (tmp_path / "registry").rglob("*") if path.is_file()] == ["registry.json"]


def test_a_registry_that_cannot_be_written_says_where(tmp_path: Path, fingerprint: Fingerprint) -> None:
    registry = Registry.open(tmp_path / "registry", create=True)
    (tmp_path / "registry/fingerprints").write_text("in the way")
    with pytest.raises(RegistryError, match=r"registry/fingerprints.*: (File exists|Not a directory)"):
        registry.add([(fingerprint, Origin("org/a", COMMIT))])
    assert keys(registry) == []


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
def test_a_file_has_no_name_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(LocalStore, "_rename")
    store = LocalStore(tmp_path)
    store.write("index/a", b"whole")
    assert store.read("index/a", 5) == b"whole"


def test_a_name_that_is_there_is_replaced(where: str) -> None:
    store = open_store(where)
    for content in (b"one", b"two"):
        store.write("index/a", content)
        assert store.read("index/a", 3) == content
    with pytest.raises(RegistryError, match="over the limit of 2"):
        store.read("index/a", 2)
    assert store.names("index") == ["index/a"]


def test_old_partial_files_are_swept_and_new_ones_left(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "index").mkdir()
    old, new = (tmp_path / f"index/.{name}.partial" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert store.sweep() == 1
    assert (old.exists(), new.exists()) == (False, True)
    assert store.names("index") == []


# --- the index


def test_other_tools_open_the_index(tmp_path: Path, fingerprint: Fingerprint) -> None:
    registry = Registry.open(tmp_path / "registry", create=True)
    for n in range(3):
        registry.add([(fingerprint, Origin(f"org/{n}", COMMIT))])
    registry.compact()
    registry.add([(fingerprint, Origin("org/3", COMMIT))])
    query = (
        f"SELECT repo, layers, std_v FROM '{tmp_path}/registry/index/*.parquet' WHERE hidden_size = 24 ORDER BY repo"
    )
    rows = duckdb.sql(query).fetchall()
    assert rows == [(f"org/{n}", 6, fingerprint.std["v"]) for n in range(4)]


def test_the_score_of_all_rows_at_once_is_that_of_each() -> None:
    draw = np.random.default_rng(3)
    lengths = [3, 4, 12, 12, 12, 31, 32, 33, 80]

    def curve(n: int) -> list[float | None]:
        kind = draw.integers(8)
        std = draw.uniform(0.01, 0.03, n) * [1, 1, 1, 1e-150, 1e-310, 1, 1, 1e150][kind]
        if kind == 1:
            std[:] = std[0]
        if kind == 2:
            std = std[0] * (1 + 1e-8 * draw.standard_normal(n))
        gaps = draw.random(n) < (0.3 if kind == 5 else 0) if kind != 6 else np.arange(n) % 4 != 3
        return [None if gap else float(each) for gap, each in zip(gaps, std, strict=True)]

    rows = []
    for n in range(180):
        length = lengths[n % len(lengths)]
        rows.append({f"std_{role}": curve(length) for role in "qkvo"})
    rows.append({f"std_{role}": [] for role in "qkvo"})
    fields = pa.schema([schema().field(f"std_{role}") for role in "qkvo"])
    table = pa.concat_tables(pa.Table.from_pylist(rows[i : i + 70], schema=fields) for i in range(0, len(rows), 70))
    subjects = [{role: curve(length) for role in "qkvo"} for length in (3, 12, 12, 32, 32, 80)]
    for subject in subjects:
        found = nearest.pearson(subject, table)
        for row, score in zip(rows, found.tolist(), strict=True):
            expected = profile.mean(_pearson(subject[role], row[f"std_{role}"]) for role in "qkvo")
            if expected is None:
                assert math.isnan(score)
            else:
                assert score == pytest.approx(expected, abs=1e-8)


def _pearson(a: list[float | None], b: list[float | None]) -> float | None:
    pair = profile.curve(a), profile.curve(b)
    return None if any(map(profile.unusable, pair)) else profile.pearson(*pair)


# --- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_commands_do_what_the_library_does(
    tmp_path: Path, fingerprint: Fingerprint, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "registry"
    model = build("llama", layers=3, seed=5).write(tmp_path / "tiny")
    fingerprint.save(tmp_path / "a.fp.safetensors")
    code, stdout, stderr = run(capsys, "registry", "add", where, model, tmp_path / "a.fp.safetensors")
    assert (code, stderr, len(stdout.splitlines())) == (0, "", 2)
    code, stdout, _ = run(capsys, "registry", "add", where, model, "--repo", "org/tiny", "--revision", COMMIT, "--json")
    assert json.loads(stdout)["added"][0]["repo"] == "org/tiny"
    scanned = llmfp.scan(model).digest
    code, stdout, stderr = run(capsys, "registry", "ls", where, "--json")
    listed = {row["repo"]: row for row in json.loads(stdout)["fingerprints"]}
    assert (code, stderr) == (0, "")
    assert {repo: row["revision"] for repo, row in listed.items()} == {
        "tiny": f"digest:{scanned}", "model": f"digest:{fingerprint.digest}", "org/tiny": COMMIT,
    }  # fmt: skip
    assert run(capsys, "registry", "ls", where, "org/")[1].splitlines()[1].split()[0] == f"org/tiny@{COMMIT[:12]}"
    code, stdout, _ = run(capsys, "registry", "verify", where, "--json")
    assert (code, json.loads(stdout)["problems"]) == (0, [])
    assert json.loads(run(capsys, "registry", "compact", where, "--json")[1])["files"] == 3
    for name in ("out.parquet", "out.jsonl"):
        code, stdout, _ = run(capsys, "registry", "export", where, tmp_path / name, "--json")
        assert json.loads(stdout)["rows"] == 3
    assert pq.read_table(tmp_path / "out.parquet").equals(Registry.open(where).table())
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["std_q"] == fingerprint.std["q"]
    code, stdout, _ = run(capsys, "registry", "rm", where, f"org/tiny@{COMMIT[:7]}", "--json")
    assert json.loads(stdout)["removed"] == [{"repo": "org/tiny", "revision": COMMIT}]
    file = where / listed["tiny"]["file"]
    file.write_bytes(b"")
    code, stdout, _ = run(capsys, "registry", "verify", where)
    assert code == 3
    assert stdout.startswith(f"{listed['tiny']['file']}: is not the file that was added")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ls {}/none", "no registry"),
        ("rm {}/registry org/none", "no fingerprint of org/none"),
        ("export {}/registry {}/x.csv", "ends neither in .parquet nor in .jsonl"),
        ("add {}/registry {}/none", "no such file or directory"),
        ("add {}/registry a b --repo x", "name one source"),
        ("nope", "No such command"),
    ],
)
def test_wrong_usage_of_the_registry_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    Registry.open(tmp_path / "registry", create=True)
    code, stdout, stderr = run(capsys, "registry", *line.replace("{}", str(tmp_path)).split())
    assert (code, stdout) == (2, "")
    error, hint = stderr.splitlines()
    assert message in error
    assert hint.startswith("hint: ")


def test_the_documentation_names_every_column_in_order() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "docs/registry.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == schema().names
    assert [" or null" in kind for _, kind in rows] == [field.nullable for field in schema()]
