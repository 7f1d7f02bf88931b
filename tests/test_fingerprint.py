"""A fingerprint file is small, opens everywhere, comes back equal, is replaced whole or not at all, and is believed
only whole: whatever else lies under its name is refused in one line.
"""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save

import llmfp
from llmfp.errors import FingerprintError
from llmfp.fingerprint import SCHEMA, Fingerprint, TowerFingerprint, write_whole
from llmfp.report.terminal import fingerprint_table
from llmfp.statistics import Statistics
from tests.checkpoints import BACKEND, build, safetensors_bytes

RUN = {
    "backend": "native_cpu", "simd": "avx2", "reader": "mmap", "seconds": 0.5, "bytes_read": 10, "bytes_total": 20,
    "second_read_bytes": 0, "peak_rss_bytes": 30, "threads": 2, "memory_budget_bytes": 40, "versions": {"llmfp": "0"},
}  # fmt: skip


def statistics(
    hidden: int, heads: int | None, seed: int = 0, *, nonfinite: int = 0, silent: bool = False
) -> Statistics:
    """One projection's numbers. silent: a coordinate without weight, whose log RMS is -inf."""
    rng = np.random.default_rng(seed)
    residual = rng.normal(-4, 1, hidden).astype(np.float16)
    residual[: 1 if silent else 0] = -np.inf
    mean, std = (np.nan, np.nan) if nonfinite else rng.uniform(0.01, 1, 2).tolist()
    if nonfinite:
        residual[-1] = np.nan
    head_std = None if heads is None else rng.uniform(0.01, 1, heads).tobytes()
    return Statistics(hidden * hidden, mean, std, 1.5, nonfinite, head_std, residual.tobytes())


def fingerprint_of(**towers: TowerFingerprint) -> Fingerprint:
    return Fingerprint(
        architecture="llama",
        towers=towers,
        source={"name": "model", "revision": None, "model_type": "llama", "files": []},
        run=RUN,
        skipped=({"pattern": "lm_head.weight", "count": 1, "bytes": 2, "reason": "not attention"},),
        caveats=("a caveat",),
        digest="0" * 64,
    )


def tower(layers: int, hidden: int, heads: int | None = 4, kv_heads: int | None = 2) -> TowerFingerprint:
    columns = {
        role: tuple(statistics(hidden, kv_heads if role in "kv" else heads, seed=7 * n) for n in range(layers))
        for role in "qkvo"
    }
    return TowerFingerprint(tuple(range(layers)), heads, kv_heads, 8, hidden, columns)


def saved(fingerprint: Fingerprint, folder: Path) -> Path:
    path = folder / "x.fp.safetensors"
    fingerprint.save(path)
    return path


# --- what is saved comes back ----------------------------------------------------------------------------------------


STATISTICS = st.one_of(
    st.none(),
    st.builds(
        statistics,
        st.integers(1, 6),
        st.none() | st.integers(1, 4),
        st.integers(0, 99),
        silent=st.booleans(),
    ),
)
TOWERS = st.integers(1, 3).flatmap(
    lambda layers: st.builds(
        TowerFingerprint,
        st.just(tuple(range(0, 2 * layers, 2))),
        st.none() | st.integers(1, 64),
        st.none() | st.integers(1, 64),
        st.none() | st.integers(1, 64),
        st.integers(1, 64),
        st.fixed_dictionaries({role: st.tuples(*[STATISTICS] * layers) for role in "qkvo"}),
    )
)


@given(towers=st.dictionaries(st.sampled_from(["decoder", "encoder", "cross"]), TOWERS, min_size=1))
@settings(max_examples=40, deadline=None)
def test_what_is_saved_comes_back_equal(
    towers: dict[str, TowerFingerprint], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Layers may lack a role, differ in width, heads and whether heads are known."""
    fingerprint = fingerprint_of(**towers)
    with mock.patch("os.fsync"):  # forty waits for the disk would prove nothing here
        assert llmfp.load(saved(fingerprint, tmp_path_factory.getbasetemp())) == fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mistral"])
def test_what_is_scanned_comes_back_equal(family: str, tmp_path: Path) -> None:
    fingerprint = llmfp.scan(build(family).write(tmp_path / "model"), backend=BACKEND)
    path = saved(fingerprint, tmp_path)
    assert llmfp.load(path) == fingerprint
    assert llmfp.scan(path) == fingerprint, "scanning a saved fingerprint loads it"


def test_values_that_are_not_finite_come_back_to_the_bit(tmp_path: Path) -> None:
    """NaN is unequal to itself, so the files' arrays are compared; std and mean read null."""
    column = (statistics(6, 4), statistics(6, 4, nonfinite=3), None)
    fingerprint = fingerprint_of(decoder=TowerFingerprint((0, 1, 5), 4, 4, 8, 6, dict.fromkeys("qkvo", column)))
    first = load_file(saved(fingerprint, tmp_path))
    loaded = llmfp.load(tmp_path / "x.fp.safetensors")
    second = load_file(saved(loaded, tmp_path))
    assert {name: each.tobytes() for name, each in second.items()} == {n: each.tobytes() for n, each in first.items()}
    assert loaded.std["q"] == [column[0].std, None, None]
    assert loaded.to_json() == fingerprint.to_json()
    json.dumps(loaded.to_json(), allow_nan=False)


def test_the_language_decoder_is_on_top_else_the_encoder(tmp_path: Path) -> None:
    decoder, encoder, cross = tower(1, 4), tower(2, 4), tower(3, 4)
    assert fingerprint_of(cross=cross, encoder=encoder, decoder=decoder).main is decoder
    assert fingerprint_of(cross=cross, encoder=encoder).main is encoder
    assert fingerprint_of(cross=cross).main is cross
    assert llmfp.load(saved(fingerprint_of(cross=cross, encoder=encoder), tmp_path)).layers == (0, 1)


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_fingerprint_of_a_large_model_stays_small(tmp_path: Path) -> None:
    """48 layers, hidden size 5120, 40 heads of 8 kv: under 2.5 MB, nearly all of it the profiles."""
    path = saved(fingerprint_of(decoder=tower(48, 5120, 40, 8)), tmp_path)
    assert 48 * 4 * 5120 * 2 < path.stat().st_size < 2_500_000


def test_the_safetensors_library_opens_it_as_documented(tmp_path: Path) -> None:
    fingerprint = fingerprint_of(decoder=tower(3, 16))
    path = saved(fingerprint, tmp_path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["llmfp.schema"] == SCHEMA
    assert json.loads(metadata["llmfp"]) == fingerprint.to_json()
    arrays = load_file(path)
    shapes = {"count": "int64", "nonfinite": "int64", "mean": "float64", "std": "float64", "abs_max": "float64"}
    expected = {f"decoder.{role}.{key}": ((3,), dtype) for role in "qkvo" for key, dtype in shapes.items()}
    expected |= {f"decoder.{role}.residual": ((3, 16), "float16") for role in "qkvo"}
    expected |= {f"decoder.{role}.head_std": ((3, 2 if role in "kv" else 4), "float64") for role in "qkvo"}
    assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} == expected
    assert arrays["decoder.q.std"].tolist() == fingerprint.std["q"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return saved(fingerprint_of(decoder=tower(2, 8), encoder=tower(1, 8)), tmp_path)


def refusal(path: Path) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(FingerprintError) as caught:
        llmfp.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def rewritten(path: Path, change: Callable[[dict[str, str], dict[str, NDArray[Any]]], object]) -> Path:
    """The file with its metadata and arrays changed, otherwise valid."""
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
    arrays = load_file(path)
    change(metadata, arrays)
    path.write_bytes(save(arrays, metadata))
    return path


def test_a_truncated_file_is_refused_wherever_it_ends(whole: Path) -> None:
    content = whole.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) - 1):
        whole.write_bytes(content[:length])
        refusal(whole)
    whole.write_bytes(content + b"\0")
    refusal(whole)


@pytest.mark.parametrize("schema", ["llmfp.fingerprint/0", "llmfp.fingerprint/2", "llmfp.comparison/1", ""])
def test_another_schema_is_refused_by_its_name(schema: str, whole: Path) -> None:
    message = refusal(rewritten(whole, lambda metadata, _: metadata.update({"llmfp.schema": schema})))
    assert (repr(schema) if schema else "not a fingerprint") in message


def test_a_weight_file_is_not_a_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "model.fp.safetensors"
    path.write_bytes(safetensors_bytes(build("llama").tensors))
    assert "not a fingerprint" in refusal(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.fp.safetensors")
    os.mkfifo(tmp_path / "pipe.fp.safetensors")
    assert "not a regular file" in refusal(tmp_path / "pipe.fp.safetensors")
    (tmp_path / "folder.fp.safetensors").mkdir()
    assert "not a regular file" in refusal(tmp_path / "folder.fp.safetensors")
    (tmp_path / "huge.fp.safetensors").touch()
    os.truncate(tmp_path / "huge.fp.safetensors", 1 << 32)
    assert "too large" in refusal(tmp_path / "huge.fp.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a":' * 100_000, '{"digest": NaN}', '{"a": 1, "a": 2}'])
def test_metadata_that_is_no_json_object_is_refused(text: str, whole: Path) -> None:
    refusal(rewritten(whole, lambda metadata, _: metadata.update({"llmfp": text})))


@pytest.mark.parametrize("key", ["count", "nonfinite", "mean", "std", "abs_max", "residual", "head_std"])
def test_an_array_missing_or_misshapen_is_refused(key: str, whole: Path) -> None:
    content, name = whole.read_bytes(), f"decoder.k.{key}"
    changes: list[Callable[[NDArray[Any]], NDArray[Any]]] = [
        lambda array: array[:1],
        lambda array: array[None],
        lambda array: array.astype(np.float32),
        lambda array: np.array(array.flat[0]),
    ]
    for change in changes:
        whole.write_bytes(content)
        refusal(rewritten(whole, lambda _, arrays, change=change: arrays.update({name: change(arrays[name])})))
    if key != "head_std":
        whole.write_bytes(content)
        assert name in refusal(rewritten(whole, lambda _, arrays: arrays.pop(name)))


def paths_in(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, outermost first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix] * bool(prefix) + [path for key, each in items for path in paths_in(each, (*prefix, key))]


def test_every_field_is_checked_before_it_is_believed(whole: Path) -> None:
    """Each field removed, or of another type: refused, or it can be shown and printed all the same."""
    arrays = load_file(whole)
    with safe_open(whole, framework="numpy") as file:
        good = json.loads(file.metadata()["llmfp"])
    refused = 0
    for path in paths_in(good):
        for value in ("absent", None, 7, -1.5, True, "\x1b[31m", [[]], {"\n": None}):
            changed = copy.deepcopy(good)
            *outer, last = path
            place = changed
            for key in outer:
                place = place[key]
            if value == "absent":
                del place[last]
            else:
                place[last] = value
            content = save(arrays, {"llmfp.schema": SCHEMA, "llmfp": json.dumps(changed)})
            with whole.open("r+b") as file:  # emptying a file first makes some file systems wait for the disk
                file.write(content)
                file.truncate()
            try:
                loaded = llmfp.load(whole)
            except FingerprintError:
                refused += 1
                continue
            assert fingerprint_table(loaded).replace("\n", "").isprintable(), path
            json.dumps(loaded.to_json(), allow_nan=False)
    assert refused > 100


# --- whole or not at all --------------------------------------------------------------------------------------------


def fail_in(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    target: Any = os if step == "fsync" else Path
    monkeypatch.setattr(target, step, fail)


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("before", [b"the one before", None])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(
    step: str, before: bytes | None, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.fp.safetensors"
    if before is not None:
        path.write_bytes(before)
    with monkeypatch.context() as patch:
        fail_in(patch, step, error)
        with pytest.raises(FingerprintError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            write_whole(path, b"new")
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path}: cannot be written: No space left on device"
    assert [each.name for each in tmp_path.iterdir()] == ([path.name] if before is not None else [])
    assert before is None or path.read_bytes() == before


def test_a_write_replaces_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "x.fp.safetensors"
    for content in (b"first, longer", b"second"):
        write_whole(path, content)
        assert path.read_bytes() == content
        assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["missing/x.fp.safetensors", "x" * 250 + ".fp.safetensors", "file/x.fp.safetensors"])
def test_a_place_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FingerprintError, match="cannot be written"):
        fingerprint_of(decoder=tower(1, 4)).save(tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
