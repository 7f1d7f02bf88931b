"""Invariants of `llmfp-fast bench`: every row is measured or skipped with the reason, answers are checked, nothing says
whose machine it is, a disk or a card that has no room is left alone, and two files compare.
"""

from __future__ import annotations

import csv
import io
import json
import platform
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmfp
from llmfp.__main__ import main
from llmfp.hardware import machine, measures, records, samples
from llmfp.hardware.records import Record
from llmfp.kernels import load

SIZE = 8 << 20


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """A whole run, small, with a device that is the CPU."""
    pytest.importorskip("torch")
    if reason := load("native_cpu").why_unavailable():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "gpus", lambda: ([("cpu", "Pretended", "none")], None))
        patch.setattr(measures, "SAMPLES", 1)
        patch.setattr(measures, "DTYPES", ("BF16", "F8_E4M3"))
        patch.setattr(measures, "_device_kernel", _small(measures._device_kernel))
        folder = tmp_path_factory.mktemp("bench")
        rows = measures.run(folder, lambda _: None, nbytes=SIZE, seconds=600)
        assert not list(folder.iterdir()), "what was written is gone again"
    return rows


def _small(measure: Any) -> Any:
    """The device's kernel row on one row of weights per dtype less: torch on the CPU is slow at 8-bit floats."""

    def only_bf16(bench: Any, backend: Any, room: Any, dtype: str, *more: Any) -> None:
        if dtype == "BF16":
            measure(bench, backend, room, dtype, *more)

    return only_bf16


def test_every_row_is_measured_or_says_why_not(found: list[Record]) -> None:
    tests = {(r.group, r.test): r for r in found}
    expected = [("memory", "read"), ("kernel", "BF16"), ("kernel", "BF16 weighted"), ("kernel", "F8_E4M3 weighted")]
    expected += [("page cache", "pread"), ("page cache", "mmap"), ("scan", "warm"), ("device", "device read")]
    expected += [("device", "host to device, pageable"), ("device", "kernel BF16")]
    for key in expected:
        r = tests[key]
        assert r.status == "ok", (key, r.reason)
        assert r.gbps == pytest.approx(r.bytes / r.median_ns)
        assert len(r.samples_ns) >= 1
        assert r.error is not None
        assert r.error <= 1e-6
    assert {r.status for r in found} <= {"ok", "skipped"}
    assert all(r.reason for r in found if r.status == "skipped")
    for group, test in (("kernel", "BF16"), ("scan", "warm"), ("device", "kernel BF16")):
        r = tests[group, test]
        ceiling = next(other for other in found if other.test == r.ceiling)
        assert r.ceiling_percent == pytest.approx(100 * r.gbps / ceiling.gbps)
    assert tests["device", "fused kernels"].status == "skipped"


def test_an_answer_that_is_wrong_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = measures._words
    monkeypatch.setattr(measures, "SAMPLES", 1)
    monkeypatch.setattr(measures, "DTYPES", ())
    monkeypatch.setattr(measures, "_words", lambda data, offset, n: words(data, offset, n) + (offset > 0))
    rows = measures.run(tmp_path, lambda _: None, nbytes=2 * SIZE, seconds=600)
    read = next(r for r in rows if r.test == "read")
    assert (read.status, read.reason) == ("skipped", "the bytes read are not those written")


def test_a_disk_without_room_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 4 * SIZE - 1))
    monkeypatch.setattr(samples, "write_checkpoint", pytest.fail)
    monkeypatch.setattr(measures, "DTYPES", ())
    rows = measures.run(tmp_path, lambda _: None, nbytes=SIZE, seconds=600)
    scan = next(r for r in rows if r.group == "scan")
    assert scan.reason == "8 MiB are more than a quarter of what is free on the disk"


def test_a_card_without_room_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 * SIZE - 1, 1 << 40))
    bench = measures._Run(lambda _: None, SIZE, 600)
    measures._device(bench, "cuda:0", {"device": "Small", "driver": "none"})
    assert [(r.status, r.reason) for r in bench.records] == [
        ("skipped", "16 MiB are more than half of what is free on it")
    ]


def test_what_time_does_not_allow_is_skipped(tmp_path: Path) -> None:
    rows = measures.run(tmp_path, lambda _: None, nbytes=SIZE, seconds=0)
    assert {r.status for r in rows} == {"skipped"}
    assert "out of time" in {r.reason for r in rows}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"])
def test_what_is_measured_on_is_normal_weights(dtype: str) -> None:
    block = samples.block(dtype)
    assert block.nbytes == samples.BLOCK_BYTES
    bits = np.unique(block[: 1 << 16])
    assert len(bits) > 50, "not all the same"


def test_the_sum_of_words_is_numpys() -> None:
    native = pytest.importorskip("llmfp._native")
    data = np.random.default_rng(0).integers(0, 1 << 63, 9001, np.uint64)
    for offset, count in ((0, 9001), (8, 8193), (16, 1), (0, 0)):
        expected = int(data[offset // 8 : offset // 8 + count].sum(dtype=np.uint64))
        assert native.sum_words(data.data.cast("B"), offset, 8 * count) == expected
    for offset, nbytes in ((0, data.nbytes + 1), (-1, 8), (data.nbytes, 1), (0, -1)):
        with pytest.raises(ValueError, match="range outside the buffer"):
            native.sum_words(data.data.cast("B"), offset, nbytes)


@pytest.fixture
def bench(found: list[Record], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command with what was found already."""
    monkeypatch.setattr(measures, "run", lambda path, say: found)  # noqa: ARG005

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["bench", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_four_forms_hold_the_same_rows(bench: Any, found: list[Record]) -> None:
    table = bench()[1]
    assert all(f"| {r.test} |" in table for r in found if r.status == "ok")
    assert all(f"skipped: {r.test} ({r.reason})" in table for r in found if r.status != "ok")
    assert "warm: " in table
    rows = json.loads(bench("-o", "json")[1])
    assert rows == json.loads(bench("--json")[1])
    assert rows == [json.loads(line) for line in bench("-o", "jsonl")[1].splitlines()]
    by_csv = list(csv.DictReader(io.StringIO(bench("-o", "csv")[1])))
    assert [row["test"] for row in by_csv] == [row["test"] for row in rows] == [r.test for r in found]
    assert json.loads(by_csv[0]["samples_ns"]) == rows[0]["samples_ns"]
    keys = {"cpu", "cores", "memory_bytes", "device", "driver", "versions", "samples_ns", "status", "reason"}
    assert all(row.keys() >= keys for row in rows)
    assert rows[0]["versions"]["llmfp"] == llmfp.__version__
    everything = bench("--submit-format")[1] + bench("-o", "json")[1]
    assert platform.node() not in everything or len(platform.node()) < 4


def test_two_machines_compare(bench: Any, tmp_path: Path) -> None:
    code, text, _ = bench("--submit-format")
    assert code == 0
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(text)
    other = json.loads(text)
    assert other["schema"] == records.SCHEMA
    for row in other["records"]:
        row["gbps"] = row["gbps"] and 2 * row["gbps"]
    other["machine"]["cpu"] = "Another \x1b[31m"
    b.write_text(json.dumps(other))
    rows = json.loads(bench("--compare", a, b, "--json")[1])
    assert {row["b_over_a"] for row in rows} == {2.0, None}
    table = bench("--compare", a, b)[1]
    assert "| memory | read |" in table
    assert "\x1b" not in table


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"schema": "llmfp.fingerprint/1"}',
        '{"schema": "llmfp.machine/1", "machine": {}, "records": []}',
        '{"schema": "llmfp.machine/1", "machine": {"cpu": "x"}, "records": [1]}',
        '{"schema": "llmfp.machine/1", "machine": {"cpu": "x"}, '
        '"records": [{"group": "", "test": "", "device": "", "gbps": "9"}]}',
        '{"schema": "llmfp.machine/1", "machine": {"cpu": "x"}, '
        '"records": [{"group": "", "test": "", "device": "", "gbps": true}]}',
    ],
)
def test_what_is_no_bench_is_refused_in_one_line(content: str, bench: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    code, out, err = bench("--compare", file, file)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {file}")
    assert "Traceback" not in err


def test_a_path_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "_memory", lambda _: None)
        patch.setattr(measures, "_kernels", lambda *_: None)
        assert main(["bench", str(tmp_path / "nowhere")]) == 2
    assert "no such file or directory" in capsys.readouterr().err


def test_the_gpu_script_runs_dry() -> None:
    pytest.importorskip("torch")
    root = Path(llmfp.__file__).parents[1]
    if not (root / "bench").is_dir():
        pytest.skip("bench/ is not installed")
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    rows = [f"{kind} torch_fallback, end to end" for kind in ("BF16", "F8_E4M3", "F8_E4M3, 128×128 scales")]
    for row in (*rows, "BF16 model: 4 matrices, torch_fallback", "BF16 streamed"):
        assert f"| {row} |" in done.stdout


def test_records_are_plain(found: list[Record]) -> None:
    for record in found:
        json.dumps(asdict(record), allow_nan=False)
