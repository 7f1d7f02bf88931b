"""A remote scan gives the digest of a local one or a clear error, never another number, whatever the servers do.

Every fault of the test Hub is tried on the same model; the server counts what was asked for and sent.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

import llmfp
from llmfp import api
from llmfp.__main__ import main
from llmfp.errors import HubError, LlmfpError
from llmfp.hub.client import STALL_SECONDS, Client, Clock
from llmfp.hub.listing import list_models
from llmfp.hub.repository import describe
from llmfp.hub.settings import Settings, is_local
from llmfp.hub.source import HubId, WeightUrl, looks_remote, parse_source
from llmfp.hub.throttle import MOST_AT_ONCE, Throttle
from llmfp.reader.fetches import MOST_GAP_BYTES, fetches
from tests.checkpoints import BACKEND, build, entry, framed
from tests.hub_server import FAULTS, HubServer
from tests.remote import TestClock, client, write_experts
from tests.test_engine import peak_of

SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("remote") / "experts")


@pytest.fixture(scope="module")
def local(folder: Path) -> llmfp.Fingerprint:
    return llmfp.scan(folder, backend=BACKEND)


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/experts", folder)
        yield server


def scan(hub: HubServer, source: str = "org/experts", clock: TestClock | None = None, **more: Any) -> llmfp.Fingerprint:
    with client(hub, clock, **more) as own:
        return llmfp.scan(source, client=own, backend=BACKEND)


def sha256_of(hub: HubServer, name: str) -> str:
    repo = hub.repos["org/experts"]
    return str(repo.commits[repo.refs["main"]][name].sha256)


# --- the same answer, for few bytes ----------------------------------------------------------------------------------


def test_a_remote_scan_is_the_local_one_for_the_bytes_of_attention_alone(
    hub: HubServer, folder: Path, local: llmfp.Fingerprint
) -> None:
    found = scan(hub, token="hf_right")
    assert found.digest == local.digest
    assert found.std == local.std
    shards = len(list(folder.glob("*.safetensors")))
    headers = [each for each in hub.asked("storage") if each.range == "bytes=0-99999"]
    attention = api.plan(folder, backend=BACKEND).attention_bytes
    assert len(headers) == shards
    assert hub.bytes_sent("storage") - sum(each.nbytes for each in headers) <= 1.02 * attention
    weights = [each for each in hub.asked("resolve") if each.path.endswith(".safetensors")]
    assert len(weights) == shards
    assert hub.count("api") == 1
    assert {each.authorized for each in hub.asked("api")} == {True}
    assert {each.authorized for each in hub.asked("storage")} == {False}
    assert found.run["bytes_read"] == hub.bytes_sent("storage")


def test_provenance_names_commit_and_hashes_and_no_signature(hub: HubServer) -> None:
    found = scan(hub, token="hf_right")
    repo = hub.repos["org/experts"]
    assert found.source["repo"] == found.source["name"] == "org/experts"
    assert found.source["revision"] == repo.refs["main"]
    assert [each["sha256"] for each in found.source["files"]] == [
        sha256_of(hub, each["name"]) for each in found.source["files"]
    ]
    text = json.dumps(found.to_json())
    assert "Signature" not in text
    assert "hf_right" not in text
    assert str(hub.storage) not in text


@pytest.mark.parametrize("memory_bytes", [32 << 20, 512 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_memory_change_a_bit(
    hub: HubServer, local: llmfp.Fingerprint, threads: int, memory_bytes: int
) -> None:
    with client(hub) as own:
        found = llmfp.scan("org/experts", client=own, backend=BACKEND, threads=threads, memory_bytes=memory_bytes)
    assert found.digest == local.digest


def test_a_plan_says_what_the_scan_will_ask_for(hub: HubServer) -> None:
    with client(hub) as own:
        plan = api.plan("org/experts", client=own, backend=BACKEND)
        planned = hub.bytes_sent("storage")
        hub.forget()
        llmfp.scan("org/experts", client=own, backend=BACKEND)
    ranges = [each for each in hub.asked("storage") if each.range != "bytes=0-99999"]
    assert len(ranges) == plan.requests < len(plan.steps)
    assert plan.header_bytes == planned
    assert plan.total_bytes == hub.bytes_sent("storage")


@pytest.mark.parametrize("case", ["gpt2", "bert", "gpt_neox", "deepseek", "falcon"])
def test_every_layout_arrives_as_it_is(case: str, tmp_path: Path) -> None:
    path = build(case, layers=2).write(tmp_path / "model", shards=2)
    with HubServer() as hub:
        hub.add("org/model", path)
        assert scan(hub, "org/model").digest == llmfp.scan(path, backend=BACKEND).digest


def test_gaps_are_fetched_along_only_where_they_are_small(folder: Path, tmp_path: Path) -> None:
    for path in (folder, build("llama", layers=3).write(tmp_path / "llama"), build("bert").write(tmp_path / "bert")):
        plan = api.plan(path, backend=BACKEND)
        found = fetches(plan)
        wanted = {want for fetch in found for want in fetch.wants}
        covered = sum(nbytes for fetch in found for _, _, nbytes in set(fetch.wants))
        assert sum(fetch.nbytes for fetch in found) <= 1.01 * covered
        assert all(
            fetch.offset_bytes <= offset and offset + nbytes <= fetch.offset_bytes + fetch.nbytes
            for fetch in found
            for _, offset, nbytes in fetch.wants
        )
        assert {(s.shard, s.offset_bytes, s.nbytes) for s in plan.steps} <= wanted
    assert MOST_GAP_BYTES == 1 << 20


def test_gguf_and_torch_files_are_read_by_range(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = build("llama", layers=2)
    path = model.write(tmp_path / "model")
    state = {name: torch.from_numpy(tensor.copy()) for name, tensor in model.tensors.items()}  # type: ignore[union-attr]
    (tmp_path / "torch").mkdir()
    torch.save(state, tmp_path / "torch" / "pytorch_model.bin")
    shutil.copy(path / "config.json", tmp_path / "torch")
    with HubServer() as hub:
        hub.add("org/torch", tmp_path / "torch")
        assert scan(hub, "org/torch").digest == llmfp.scan(path, backend=BACKEND).digest


def test_the_memory_budget_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 MiB of zeros through 48 MiB, beyond what a plan takes; 6 MiB of slack for the measurement."""
    layers, side = 4, 2048
    names = [f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in range(layers) for role in "qkvo"]
    nbytes = 4 * side * side
    header = {name: entry("F32", [side, side], i * nbytes, (i + 1) * nbytes) for i, name in enumerate(names)}
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(framed(header))
    os.truncate(path, path.stat().st_size + len(names) * nbytes)
    with HubServer(hash_files=False) as hub:
        hub.add("org/zeros", tmp_path / "model")
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        planned, scanned = (peak_of(command, "org/zeros", "--memory", "48MiB") for command in ("plan", "scan"))
    assert scanned - planned <= (48 + 6) << 20


# --- SOURCE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("hf://org/name", HubId("org/name")),
        ("hf://org/name@main/sub/model.gguf", HubId("org/name", "main", "sub/model.gguf")),
        ("https://hub.test/org/name/resolve/main/model.safetensors", HubId("org/name", "main", "model.safetensors")),
        ("https://hub.test/org/name/blob/main/model.safetensors", HubId("org/name", "main", "model.safetensors")),
        ("https://other.test/a/model.gguf?Signature=x", WeightUrl("https://other.test/a/model.gguf?Signature=x")),
    ],
)
def test_what_a_source_means(text: str, meant: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert looks_remote(text)
    assert parse_source(text, "https://hub.test") == meant
    assert "Signature" not in str(meant)


@pytest.mark.parametrize("text", ["./org/name", "/org/name", "name", "org/model.safetensors", "a/b/c", "../a", "a/..b"])
def test_what_is_a_path(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert not looks_remote(text)


def test_an_existing_path_wins(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build("llama", layers=2).write(tmp_path / "org" / "experts")
    monkeypatch.chdir(tmp_path)
    assert scan(hub).digest == llmfp.scan(path, backend=BACKEND).digest
    assert not hub.requests


@pytest.mark.parametrize(
    "text", ["hf://org", "hf://org/na me", "hf://org/../x", "https://", "https:///x", "http://a b/c"]
)
def test_what_is_no_source(text: str, hub: HubServer) -> None:
    with pytest.raises(HubError):
        scan(hub, text)


def test_one_file_of_a_model_and_an_address(hub: HubServer, tmp_path: Path) -> None:
    path = build("llama", layers=2).write(tmp_path / "model")
    hub.add("org/one", path)
    right = llmfp.scan(path / "model.safetensors", backend=BACKEND).digest
    assert scan(hub, "hf://org/one@main/model.safetensors").digest == right
    assert scan(hub, f"{hub.endpoint}/org/one/resolve/main/model.safetensors").digest == right
    found = scan(hub, f"{hub.storage}/public/org/one/model.safetensors?key=secret", token="hf_right")
    assert (found.digest, found.source["name"]) == (right, "model.safetensors")
    assert found.source["url"] == f"{hub.storage}/public/org/one/model.safetensors"
    assert found.source["model_type"] is None, "a signed address says nothing of its neighbours"
    beside = scan(hub, f"{hub.storage}/public/org/one/model.safetensors", token="hf_right")
    assert (beside.digest, beside.source["model_type"]) == (right, "qwen3")
    assert {each.authorized for each in hub.asked("storage")} == {False}
    with pytest.raises(LlmfpError, match="refuses with status 403"):
        scan(hub, f"{hub.storage}/public/org/one/other.safetensors")
    with pytest.raises(LlmfpError, match="not a weight file"):
        scan(hub, hub.sign(sha256_of(hub, SHARD)))


def test_a_revision_is_pinned_to_its_commit(hub: HubServer, tmp_path: Path) -> None:
    """A branch that moves during the scan moves nothing."""
    old = build("llama", layers=2, seed=1).write(tmp_path / "old")
    new = build("llama", layers=2, seed=2).write(tmp_path / "new")
    first = hub.add("org/moving", old, refs=("main", "v1"))
    hub.add("org/moving", new)
    by_tag, by_hash, by_branch = (scan(hub, f"org/moving@{each}") for each in ("v1", first, "main"))
    assert by_tag.digest == by_hash.digest == llmfp.scan(old, backend=BACKEND).digest
    assert by_tag.source["revision"] == first
    assert by_branch.digest == llmfp.scan(new, backend=BACKEND).digest
    assert {each.path.split("/")[4] for each in hub.asked("resolve")} == set(hub.repos["org/moving"].commits)


def test_a_copy_in_the_hubs_cache_is_used(hub: HubServer, local: llmfp.Fingerprint, tmp_path: Path) -> None:
    snapshot_download("org/experts", endpoint=hub.endpoint, cache_dir=tmp_path, token=False)
    hub.forget()
    found = scan(hub, cache=tmp_path)
    assert (found.digest, found.source["repo"]) == (local.digest, "org/experts")
    assert hub.bytes_sent("storage") == 0
    (next((tmp_path / "models--org--experts" / "snapshots").iterdir()) / SHARD).unlink()
    assert scan(hub, cache=tmp_path).digest == local.digest
    assert hub.bytes_sent("storage") > 0


def test_offline_asks_nobody(hub: HubServer, local: llmfp.Fingerprint, tmp_path: Path) -> None:
    offline = Settings(endpoint=hub.endpoint, offline=True, cache=tmp_path)
    with Client(offline) as own:
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            llmfp.scan("org/experts", client=own)
        assert not hub.requests
        snapshot_download("org/experts", endpoint=hub.endpoint, cache_dir=tmp_path, token=False)
        hub.forget()
        assert llmfp.scan("org/experts", client=own, backend=BACKEND).digest == local.digest
        assert not hub.requests


def test_the_environment_is_heeded(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hub.add("org/private", folder, private=True)
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.endpoint}/")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert main(["plan", "org/private", "--json", "--backend", BACKEND]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] > 0
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["plan", "org/private", "--backend", BACKEND]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: org/private: no such model on 127.0.0.1, or it is private")
    assert hint.startswith("hint: ")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example.com")
    assert main(["plan", "org/private", "--backend", BACKEND]) == 2
    assert "http shows the token" in capsys.readouterr().err


# --- faults ----------------------------------------------------------------------------------------------------------

HEALED = {
    "drop": {"after": 3000, "times": 3},
    "drip": {"after": 3000, "times": 1},
    "429": {"seconds": 7, "times": 5},
    "500": {"times": 4},
    "503": {"times": 4},
    "403": {"times": 2},
    "trickle": {"after": 100, "times": 1},
    "garbage": {"times": 3},
    "truncated": {"times": 2},
}
"""What passes, when it passes: the answer is right."""
FATAL: dict[str, tuple[dict[str, Any], str]] = {
    "416": ({}, "ends before byte"),
    "ignore_range": ({}, "ignores ranges"),
    "wrong_range": ({"after": 64}, "asked for bytes"),
    "wrong_bounds": ({"after": 64}, "asked for bytes"),
    "no_content_range": ({}, "without saying which"),
    "multipart": ({}, "without saying which"),
    "etag": ({}, "changed while it was read"),
    "no_etag": ({}, "changed while it was read"),
    "total": ({}, "by the storage"),
    "encoded": ({}, "encodes what it sends"),
    "huge": ({}, "without saying which"),
    "endless": ({}, "ignores ranges"),
    "html": ({}, "ignores ranges"),
    "location": ({"to": "http://elsewhere.example/x"}, "only https is followed"),
    "no_location": ({}, "redirects to no valid address"),
}
"""What does not pass: an error that names the file."""


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("kind", HEALED)
def test_what_passes_leaves_no_trace(kind: str, skip: int, hub: HubServer, local: llmfp.Fingerprint) -> None:
    """skip: whether it meets the header or the weights of the shard."""
    hub.fail(kind, sha256_of(hub, SHARD), host="storage", skip=skip, **HEALED[kind])
    clock = TestClock()
    assert scan(hub, clock=clock, stall_seconds=0.5 if kind == "drip" else 20.0).digest == local.digest
    assert hub.fault("storage", sha256_of(hub, SHARD), [kind]) is None
    if kind == "429":
        assert max(clock.waits) == 7


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("kind", FATAL)
def test_what_does_not_pass_is_an_error_that_names_the_file(kind: str, skip: int, hub: HubServer) -> None:
    more, message = FATAL[kind]
    hub.fail(kind, sha256_of(hub, SHARD), host="storage", skip=skip, **more)
    with pytest.raises(HubError, match=message) as caught:
        scan(hub)
    assert SHARD in str(caught.value)
    assert "Signature" not in str(caught.value)


@pytest.mark.parametrize("kind", ["drop", "500", "429", "truncated", "garbage", "drip"])
def test_what_never_passes_is_given_up(kind: str, hub: HubServer) -> None:
    hub.fail(kind, sha256_of(hub, SHARD), host="storage", times=1000, after=1 if kind != "drip" else 0)
    with pytest.raises(HubError, match="given up after 6 tries") as caught:
        scan(hub, stall_seconds=0.2 if kind == "drip" else 20.0)
    assert SHARD in str(caught.value)


def test_an_address_that_is_never_honoured_is_given_up(hub: HubServer) -> None:
    hub.fail("403", sha256_of(hub, SHARD), host="storage", times=1000)
    with pytest.raises(HubError, match="refuses with status 403"):
        scan(hub)
    assert hub.count("resolve", SHARD) <= 4


def test_a_dropped_connection_resumes_inside_the_range(hub: HubServer, local: llmfp.Fingerprint) -> None:
    blob = sha256_of(hub, SHARD)
    hub.fail("drop", blob, host="storage", skip=1, times=1, after=70_000)
    assert scan(hub).digest == local.digest
    first, again = [each.range for each in hub.asked("storage", blob)][1:3]
    start = int(str(first).removeprefix("bytes=").split("-")[0])
    assert str(again).startswith(f"bytes={start + 70_000}-") or len(hub.asked("storage", blob)) > 3


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("linked_size", {"after": 8}, "by the Hub's listing"),
        ("linked_etag", {}, "another content"),
        ("unlike_revision", {}, "comes from commit"),
        ("location", {"to": "ftp://elsewhere.example/x"}, "only https is followed"),
        ("location", {"to": "http://elsewhere.example/x"}, "only https is followed"),
        ("location", {"to": "https://[broken"}, "no valid address"),
        ("no_location", {}, "no valid address"),
    ],
)
def test_a_resolve_that_lies_is_an_error(kind: str, more: dict[str, Any], message: str, hub: HubServer) -> None:
    hub.fail(kind, SHARD, host="resolve", **more)
    with pytest.raises(HubError, match=message) as caught:
        scan(hub)
    assert SHARD in str(caught.value)


def test_a_redirect_without_end_is_an_error(hub: HubServer) -> None:
    hub.fail("location", SHARD, host="resolve", times=100, to=f"/org/experts/resolve/main/{SHARD}")
    with pytest.raises(HubError, match="redirected more than 5 times"):
        scan(hub)


def test_the_hub_saying_nothing_of_a_file_is_no_error_while_the_storage_does(
    hub: HubServer, local: llmfp.Fingerprint
) -> None:
    hub.fail("no_linked", SHARD, host="resolve")
    assert scan(hub).digest == local.digest


def test_a_listing_that_lies_about_sizes_is_an_error(hub: HubServer) -> None:
    hub.fail("linked_size", "/api/models", host="api", after=8)
    with pytest.raises(HubError, match="by the Hub's listing"):
        scan(hub)


def test_a_shorter_file_than_its_header_says_is_an_error(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    short = shutil.copytree(folder, tmp_path / "short")
    with (short / SHARD).open("r+b") as file:
        file.truncate((short / SHARD).stat().st_size - 4)
    hub.add("org/short", short)
    with pytest.raises(LlmfpError, match="ends at byte"):
        scan(hub, "org/short")


@pytest.mark.parametrize("kind", ["huge", "endless", "html", "garbage"])
@pytest.mark.parametrize("path", ["/api/models", "config.json", "index.json"])
def test_small_answers_are_bounded_and_checked(kind: str, path: str, hub: HubServer) -> None:
    hub.fail(kind, path, times=100)
    with pytest.raises(LlmfpError, match="org/experts"):
        scan(hub)
    assert hub.bytes_sent() < 200 << 20


def test_a_file_of_another_hash_than_listed_is_an_error(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(folder, tmp_path / "changed")
    hub.add("org/changed", changed)
    text = (changed / "config.json").read_text()
    (changed / "config.json").write_text(text.replace("256", "255"))
    with pytest.raises(HubError, match="does not match the hash"):
        scan(hub, "org/changed")


@pytest.mark.parametrize("name", ["../up.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "c:x.safetensors"])
def test_a_file_name_that_leaves_the_folder_is_no_file(name: str, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    index = bad / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(SHARD, json.dumps(name)[1:-1]))
    hub.add("org/bad", bad)
    with pytest.raises(LlmfpError, match="outside the directory"):
        scan(hub, "org/bad")


@pytest.mark.parametrize(
    ("about", "source", "message"),
    [
        ({"gated": "manual"}, "org/closed", "the model is gated"),
        ({"private": True}, "org/closed", "no such model"),
        ({}, "org/closed@nowhere", "no such revision"),
        ({}, "org/missing", "no such model"),
        ({}, "hf://org/closed@main/missing.safetensors", "no such file"),
    ],
)
def test_refusals_say_why(about: dict[str, Any], source: str, message: str, hub: HubServer, folder: Path) -> None:
    hub.add("org/closed", folder, **about)
    for token in (None, "hf_wrong"):
        with pytest.raises(LlmfpError, match=message) as caught:
            scan(hub, source, token=token)
        assert "\n" not in str(caught.value)
    if about:
        assert scan(hub, source, token="hf_right").source["repo"] == "org/closed"


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_spent_limit_is_waited_for(folder: Path, local: llmfp.Fingerprint) -> None:
    clock = TestClock()
    with HubServer(limits={"api": 100, "resolvers": 3}, clock=lambda: clock.time) as hub:
        hub.add("org/experts", folder)
        with client(hub, clock) as own:
            assert llmfp.scan("org/experts", client=own, backend=BACKEND).digest == local.digest
        refused = [each for each in hub.requests if each.status == 429]
    assert any(wait > 290 for wait in clock.waits)
    assert len(refused) <= 2, "what is left was known, and yet more was asked for"


def test_signed_addresses_are_replaced_before_they_expire(folder: Path, local: llmfp.Fingerprint) -> None:
    clock = TestClock(start=1_000_000.0, tick=1.0)
    with HubServer(lifetime=60, clock=lambda: clock.time) as hub:
        hub.add("org/experts", folder)
        with client(hub, clock) as own:
            assert llmfp.scan("org/experts", client=own, backend=BACKEND, threads=1).digest == local.digest
        assert hub.count("resolve", ".safetensors", "HEAD") > 4


def test_signed_addresses_that_expired_are_replaced(folder: Path, local: llmfp.Fingerprint) -> None:
    now = [1_000_000.0]
    with HubServer(lifetime=600, clock=lambda: now[0]) as hub:
        hub.add("org/experts", folder)
        with client(hub) as own:

            def later(_: object) -> None:
                now[0] += 601

            assert llmfp.scan("org/experts", client=own, backend=BACKEND, planned=later).digest == local.digest
        assert [each.status for each in hub.asked("storage")].count(403) >= 1
        assert hub.count("resolve", ".safetensors", "HEAD") <= 2 * 4


def test_a_server_slower_than_the_least_is_given_up(hub: HubServer) -> None:
    """A byte a second, by the client's clock."""

    class Drip:
        def into(self, view: memoryview) -> int:
            view[:1] = b"x"
            return 1

    with client(hub, TestClock(tick=1.0)) as own:
        done, problem = own._fill(Drip(), memoryview(bytearray(1 << 20)))  # type: ignore[arg-type]
    assert (60 < done < 100, problem) == (True, "slower than 50 kB/s")


def test_an_interrupt_ends_what_waits_for_a_server(folder: Path) -> None:
    """A server that stopped sending would otherwise be waited for: half a minute for bytes, longer to try again."""
    with HubServer() as hub:
        hub.add("org/experts", folder)
        hub.fail("drip", host="storage", skip=4, times=1000, after=10)

        def interrupt(_done: int, _total: int) -> None:
            raise KeyboardInterrupt

        start = time.monotonic()
        with Client(Settings(endpoint=hub.endpoint, cache=Path("/none"))) as own, pytest.raises(KeyboardInterrupt):
            llmfp.scan("org/experts", client=own, backend=BACKEND, progress=interrupt)
        assert time.monotonic() - start < STALL_SECONDS / 2


def test_an_error_does_not_wait_for_other_ranges(folder: Path) -> None:
    """The first shard's weights are refused while the server has stopped sending the others'."""
    first = SHARD.replace("00002", "00001")
    with HubServer() as hub:
        hub.add("org/experts", folder)
        hub.fail("416", sha256_of(hub, first), host="storage", skip=1, times=1000)
        hub.fail("drip", host="storage", skip=4, times=1000, after=10)
        start = time.monotonic()
        with Client(Settings(endpoint=hub.endpoint, cache=Path("/none"))) as own, pytest.raises(HubError, match=first):
            llmfp.scan("org/experts", client=own, backend=BACKEND)
        assert time.monotonic() - start < STALL_SECONDS / 2


def test_a_throttle_never_allows_more_than_is_left() -> None:
    clock = TestClock()
    throttle = Throttle(clock.now)
    assert all(throttle.enter("api") for _ in range(MOST_AT_ONCE))
    for _ in range(MOST_AT_ONCE):
        throttle.leave("api")
    throttle.heard("api", 200, {"ratelimit": '"api";r=2;t=60'})
    assert throttle.enter("api")
    assert throttle.enter("api")
    assert throttle.seconds_left("api") == 0
    throttle.heard("api", 200, {"ratelimit": '"api";r=0;t=60'})
    throttle.leave("api")
    throttle.leave("api")
    assert not throttle.enter("api")
    assert throttle.seconds_left("api") == 60
    clock.sleep(60)
    assert throttle.enter("api")
    throttle.heard("storage", 503, {})
    assert sum(throttle.enter("storage") for _ in range(MOST_AT_ONCE // 2)) == MOST_AT_ONCE // 2


# --- listing ---------------------------------------------------------------------------------------------------------


def test_lists_newest_first_over_pages(folder: Path) -> None:
    with HubServer(page=2) as hub:
        for number in range(5):
            hub.add(f"org/m{number}", folder, last_modified=f"2026-01-0{number + 1}T00:00:00.000Z", tags=("t",))
        hub.add("other/m", folder)
        with client(hub) as own:
            names = [each.repo for each in list_models(own, author="org")]
            assert names == [f"org/m{number}" for number in (4, 3, 2, 1, 0)]
            assert [each.repo for each in list_models(own, author="org", since="2026-01-04")] == ["org/m4", "org/m3"]
            assert [each.repo for each in list_models(own, author="org", limit=3)] == names[:3]
            assert [each.repo for each in list_models(own, filters=("t",), limit=1)] == ["org/m4"]
            assert next(list_models(own, author="org")).revision == hub.repos["org/m4"].refs["main"]


@pytest.mark.parametrize("kind", ["huge", "html", "garbage", "endless"])
def test_a_listing_that_is_none_is_an_error(kind: str, hub: HubServer) -> None:
    hub.fail(kind, "/api/models", times=100)
    with client(hub) as own, pytest.raises(HubError, match="models of org"):
        list(list_models(own, author="org"))


def test_what_a_card_declares_is_known(hub: HubServer, folder: Path) -> None:
    hub.add("org/child", folder, base_models=("org/parent",), relation="finetune")
    with client(hub) as own:
        info = describe(own, "org/child")
    assert (info.base_models, info.relation) == (("org/parent",), "finetune")
    assert info.weights_sha256([SHARD]) == (sha256_of(hub, SHARD),)
    assert info.weights_sha256([SHARD, "config.json"]) is None


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "local_"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("10.1.2.3", True), ("8.8.8.8", False), ("a.b", False)],
)
def test_which_hosts_are_local(host: str, local_: bool) -> None:
    assert is_local(host) is local_


def test_every_fault_of_the_test_hub_is_tried() -> None:
    elsewhere = {"linked_size", "linked_etag", "no_linked", "unlike_revision"}
    assert FAULTS.keys() == HEALED.keys() | FATAL.keys() | elsewhere


def test_a_scan_leaves_no_thread_and_a_clock_is_a_clock(hub: HubServer) -> None:
    import threading

    before = {each.name for each in threading.enumerate()}
    scan(hub)
    assert not [each for each in threading.enumerate() if each.name.startswith(("fetch", "header", "scan"))], before
    assert Clock(lambda: 0.0, lambda _: None, lambda: 1.0).jitter() == 1.0
