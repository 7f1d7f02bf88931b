"""The fingerprint: what a scan leaves behind, and the small file it lives in.

The file is a safetensors file named *.fp.safetensors, so that anything in this ecosystem can open it: its metadata
holds `llmfp.schema` and, under `llmfp`, the JSON object that `scan --json` prints; its arrays, per tower and role:

    {tower}.{role}.count      int64[L]          {tower}.{role}.nonfinite  int64[L]
    {tower}.{role}.mean       float64[L]        {tower}.{role}.head_std   float64[L, heads]
    {tower}.{role}.std        float64[L]        {tower}.{role}.residual   float16[L, hidden]
    {tower}.{role}.abs_max    float64[L]        {tower}.{role}.interval   float64[L, 2]

(of a sample, whose digest begins with "sample-": interval, low and high, and neither head_std nor residual)
and, of a deep scan, per tower (llmfp.circuits says what they are):

    {tower}.qk_norm           float64[L, heads]         {tower}.ov_norm         float64[L, heads]
    {tower}.coherence         float16[L, entries]       {tower}.head_coherence  float16[L, heads, 256]
    {tower}.qk_spectrum       float16[L, heads, size]   {tower}.ov_spectrum     float16[L, heads, size]

A layer without that role has count 0 and NaN elsewhere; where heads or hidden size differ between layers, rows are
padded with NaN at the end.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

from llmfp.architecture.specs import ROLES, Rotary
from llmfp.checkpoint import strict_json
from llmfp.errors import CheckpointError, FingerprintError
from llmfp.statistics import Statistics

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from llmfp.circuits import Circuits

SCHEMA = "llmfp.fingerprint/1"
SUFFIX = ".fp.safetensors"
CIRCUIT_ARRAYS = {"qk_norm": "float64", "ov_norm": "float64", "coherence": "float16", "head_coherence": "float16"}
CIRCUIT_ARRAYS |= {"qk_spectrum": "float16", "ov_spectrum": "float16"}
"""What a deep scan keeps of every tower, and in which dtype."""
_PER_LAYER, _PER_HEAD = ("coherence",), ("qk_norm", "ov_norm")
"""Arrays of one row a layer, and of one number a head; the others have a row a head."""
_MAX_FILE_BYTES = 256 << 20
_LARGEST_STD = 1e300
"""Whose mean over layers can still be taken."""
_LARGEST_LOG = 1000.0
"""Of any float64 the natural logarithm is below 710."""
_SAVED: dict[type | UnionType, tuple[str, ...]] = {
    str: ("architecture", "digest"),
    dict: ("source", "towers", "run"),
    list: ("skipped", "caveats"),
}
_SAVED_RUN: dict[type | UnionType, tuple[str, ...]] = {
    str: ("backend", "simd", "reader"),
    int | float: ("seconds",),
    int: ("bytes_read", "bytes_total", "peak_rss_bytes", "threads"),
}


@dataclass(frozen=True, slots=True)
class TowerFingerprint:
    """One tower's statistics by role; sequences run over `layers`, None where a layer has none.

    std, mean      population std and mean of all elements
    rotary         how queries and keys are turned; None where they are not, or it is not known
    indexed_heads  heads differ by design, so that their order carries meaning
    circuits       what a deep scan keeps of every layer's heads; None from a plain one
    """

    layers: tuple[int, ...]
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden_size: int
    statistics: Mapping[str, tuple[Statistics | None, ...]]
    rotary: Rotary | None = None
    indexed_heads: bool = False
    circuits: tuple[Circuits | None, ...] | None = None

    @property
    def std(self) -> dict[str, list[float | None]]:
        return {role.value: self._column(role, "std") for role in ROLES}

    @property
    def mean(self) -> dict[str, list[float | None]]:
        return {role.value: self._column(role, "mean") for role in ROLES}

    @property
    def roles(self) -> dict[str, dict[str, list[float | None]]]:
        """std and mean of what is not Q, K, V, O: factors of latent attention, biases, gains of norms."""
        others = [role for role in self.statistics if role not in map(str, ROLES)]
        return {role: {key: self._column(role, key) for key in ("std", "mean")} for role in others}

    def _column(self, role: str, key: str) -> list[float | None]:
        return [None if s is None else _finite(getattr(s, key)) for s in self.statistics[role]]

    @property
    def interval(self) -> dict[str, list[list[float] | None]]:
        """By role, of a sample: [low, high], in which σ of all weights lies with 95 % confidence."""

        def around(s: Statistics | None) -> list[float] | None:
            return None if s is None or not math.isfinite(s.std) else list(s.interval or (s.std, s.std))

        return {role: [around(s) for s in column] for role, column in self.statistics.items()}

    def head_std(self, role: str) -> NDArray[np.float64]:
        """float64 [L, heads]: each head's population std; NaN where unknown."""
        import numpy as np

        rows = [None if s is None or s.head_std is None else np.frombuffer(s.head_std) for s in self.statistics[role]]
        return _stack(rows, np.float64)

    def residual(self, role: str) -> NDArray[np.float16]:
        """float16 [L, hidden]: log RMS of the effective weights along each residual coordinate; NaN where absent."""
        import numpy as np

        rows = [
            None if s is None or s.residual is None else np.frombuffer(s.residual, np.float16)
            for s in self.statistics[role]
        ]
        return _stack(rows, np.float16)

    def circuit(self, name: str) -> NDArray[Any] | None:
        """[L, …], an array of a deep scan by its name above, NaN where a layer has none; None where no layer has it."""
        import numpy as np

        rows: list[NDArray[Any] | None] = []
        for each in self.circuits or ():
            buffer = None if each is None else getattr(each, name)
            if each is None or buffer is None:
                rows.append(None)
            else:
                row = np.frombuffer(buffer, CIRCUIT_ARRAYS[name])
                rows.append(row if name in _PER_LAYER else row.reshape(len(each.qk_norm) // 8, -1))
        shapes = [row.shape for row in rows if row is not None]
        if not shapes:
            return None
        stacked: NDArray[Any] = np.full((len(rows), *np.max(shapes, axis=0)), np.nan, CIRCUIT_ARRAYS[name])
        for i, known in enumerate(rows):
            if known is not None:
                stacked[i][tuple(slice(size) for size in known.shape)] = known
        return stacked.squeeze(2) if name in _PER_HEAD else stacked


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A checkpoint's statistics and where they come from. Equal `digest`: bit-identical statistics.

    `source`, `run`, `skipped` and `caveats` are as in the JSON contract; `main` is the language decoder's tower, else
    the only encoder's. sample: the share of the weights that all of this rests on, and what it lacks for that; None
    where all were read.
    """

    architecture: str
    towers: Mapping[str, TowerFingerprint]
    source: Mapping[str, Any]
    run: Mapping[str, Any]
    skipped: tuple[Mapping[str, Any], ...]
    caveats: tuple[str, ...]
    digest: str
    sample: Mapping[str, Any] | None = None

    @property
    def main(self) -> TowerFingerprint:
        return self.towers[main_tower(self.towers)]

    @property
    def layers(self) -> tuple[int, ...]:
        return self.main.layers

    @property
    def std(self) -> dict[str, list[float | None]]:
        """Population std per role, "q", "k", "v", "o", over `layers`; None where there is none."""
        return self.main.std

    @property
    def mean(self) -> dict[str, list[float | None]]:
        return self.main.mean

    def to_json(self) -> dict[str, Any]:
        """The object that `scan --json` prints."""
        main = self.main
        return {
            "schema": SCHEMA,
            "source": dict(self.source),
            "architecture": self.architecture,
            "layers": list(main.layers),
            "heads": main.heads,
            "kv_heads": main.kv_heads,
            "head_dim": main.head_dim,
            "hidden_size": main.hidden_size,
            "std": main.std,
            "mean": main.mean,
            "roles": main.roles,
            "towers": {name: _tower_json(tower, self.sample is not None) for name, tower in self.towers.items()},
            "skipped": [dict(each) for each in self.skipped],
            "caveats": list(self.caveats),
            "run": dict(self.run),
            "digest": self.digest,
            "sample": None if self.sample is None else dict(self.sample),
        } | ({} if self.sample is None else {"interval": main.interval})

    def plot(self) -> Figure:
        """A Matplotlib figure of σ over layers. Raises LlmfpError where Matplotlib is not installed."""
        from llmfp.report import figures

        return figures.of_fingerprint(self.to_json())

    def to_pandas(self) -> pd.DataFrame:
        """A row per tower, role and layer (report.tables.statistics). Raises LlmfpError without pandas."""
        from llmfp.report import tables

        return tables.to_pandas(tables.statistics(self))

    def to_arrow(self) -> pa.Table:
        """The same rows for Arrow. Raises LlmfpError without pyarrow."""
        from llmfp.report import tables

        return tables.to_arrow(tables.statistics(self))

    def _repr_html_(self) -> str:
        from llmfp.report import page

        return page.fragment("notebook_fingerprint.html.jinja", self.to_json())

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        from safetensors.numpy import save

        metadata = {"llmfp.schema": SCHEMA, "llmfp": json.dumps(self.to_json(), allow_nan=False)}
        return save(_arrays(self.towers), metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the fingerprint, whole or not at all: to a temporary file beside `path`, then renamed over it."""
        write_whole(Path(path), self.to_bytes())


def write_whole(path: Path, content: bytes) -> None:
    """Replaces `path` by a file with this content, or leaves it untouched. Raises FingerprintError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise FingerprintError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_fingerprint(path: Path) -> bool:
    """Whether the name says that a file is a fingerprint."""
    return path.name.endswith(SUFFIX)


def load(path: str | os.PathLike[str]) -> Fingerprint:
    """A saved fingerprint. Raises FingerprintError for anything that is not one of this schema, whole."""
    from safetensors import SafetensorError, safe_open

    try:
        if not Path(path).is_file():  # opening a named pipe would wait for ever
            raise FingerprintError(f"{path}: {'not a regular file' if Path(path).exists() else 'no such file'}")
        size = Path(path).stat().st_size
        if size > _MAX_FILE_BYTES:
            raise FingerprintError(f"{path}: {size} bytes is too large for a fingerprint")
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            schema = metadata.get("llmfp.schema")
            if schema != SCHEMA:
                raise FingerprintError(
                    f"{path}: " + (f"schema {schema!r} is not known" if schema else "not a fingerprint"),
                    hint=f"this version reads {SCHEMA}; make one with llmfp-fast scan SOURCE --out FILE{SUFFIX}",
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _restored(strict_json.parse_object(metadata["llmfp"].encode(), "metadata"), arrays)
    except OSError as error:
        raise FingerprintError(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, CheckpointError, KeyError, TypeError, ValueError) as error:
        raise FingerprintError(f"{path}: not a whole fingerprint ({type(error).__name__}: {error})") from None


def _restored(saved: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Fingerprint:
    """What `to_json` and `_arrays` took apart. Raises ValueError or KeyError where something is amiss or missing."""
    for kind, keys in _SAVED.items():
        for key in keys:
            _expect(saved[key], kind, key)
    for kind, keys in _SAVED_RUN.items():
        for key in keys:
            _expect(saved["run"][key], kind, f"run.{key}")
    _expect(saved["source"]["name"], str, "source.name")
    for stored_as in _expect(saved["source"].get("stored_as", []), list, "source.stored_as"):
        _expect(stored_as, str, "source.stored_as")
    for caveat in saved["caveats"]:
        _expect(caveat, str, "caveats")
    for skipped in saved["skipped"]:
        _expect(skipped, dict, "skipped")
    if not saved["towers"]:
        raise ValueError("no towers")
    return Fingerprint(
        architecture=saved["architecture"],
        towers={name: _restored_tower(name, tower, arrays) for name, tower in saved["towers"].items()},
        source=saved["source"],
        run=saved["run"],
        skipped=tuple(saved["skipped"]),
        caveats=tuple(saved["caveats"]),
        digest=saved["digest"],
        sample=_expect(saved.get("sample"), dict | None, "sample"),
    )


def _restored_tower(name: str, saved: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> TowerFingerprint:
    layers = tuple(_expect(layer, int, "layers") for layer in saved["layers"])
    for key in ("heads", "kv_heads", "head_dim", "hidden_size"):
        if (size := _expect(saved[key], int | None, key)) is not None and size < 1:
            raise ValueError(f"{key} is {size}")

    def array(key: str, dtype: str) -> NDArray[Any]:
        found = arrays[key]
        if found.dtype != dtype or found.shape[:1] != (len(layers),):
            raise ValueError(f"{key} is {found.dtype} {list(found.shape)}")
        return found

    statistics = {}
    for role in (*map(str, ROLES), *_expect(saved.get("roles", {}), dict, "roles")):
        prefix = f"{name}.{role}"
        numbers = {key: array(f"{prefix}.{key}", "float64").tolist() for key in ("mean", "std", "abs_max")}
        numbers |= {key: array(f"{prefix}.{key}", "int64").tolist() for key in ("count", "nonfinite")}
        if any(value < 0 or _LARGEST_STD < value < math.inf for value in numbers["std"]):
            raise ValueError(f"{prefix}.std holds what is no standard deviation")
        residual = array(f"{prefix}.residual", "float16")
        around = array(f"{prefix}.interval", "float64") if f"{prefix}.interval" in arrays else None
        if around is not None and around.shape != (len(layers), 2):
            raise ValueError(f"{prefix}.interval is {list(around.shape)}")
        head_std = array(f"{prefix}.head_std", "float64") if f"{prefix}.head_std" in arrays else None
        column: list[Statistics | None] = []
        for i in range(len(layers)):
            whole = {key: values[i] for key, values in numbers.items()}
            heads = None if head_std is None else _unpadded(head_std[i], whole["nonfinite"])
            profile = _unpadded(residual[i], whole["nonfinite"])
            low, high = (math.nan, math.nan) if around is None else around[i].tolist()
            interval = None if math.isnan(low) else (low, high)
            known = Statistics(**whole, head_std=heads or None, residual=profile or None, interval=interval)
            column.append(known if whole["count"] else None)
        statistics[role] = tuple(column)
    hidden_size = _expect(saved["hidden_size"], int, "hidden_size")
    return TowerFingerprint(
        layers,
        saved["heads"],
        saved["kv_heads"],
        saved["head_dim"],
        hidden_size,
        statistics,
        rotary=_restored_rotary(saved["rotary"]),
        indexed_heads=saved["indexed_heads"] is True,
        circuits=_restored_circuits(name, len(layers), arrays) if saved["deep"] is True else None,
    )


def _restored_rotary(saved: Any) -> Rotary | None:
    if saved is None:
        return None
    pairs = _expect(_expect(saved, dict, "rotary")["pairs"], int, "rotary.pairs")
    return Rotary(pairs, saved["interleaved"] is True)


def _restored_circuits(tower: str, layers: int, arrays: Mapping[str, NDArray[Any]]) -> tuple[Circuits | None, ...]:
    import numpy as np

    from llmfp.circuits import Circuits

    if (norms := arrays.get(f"{tower}.qk_norm")) is None:
        return (None,) * layers
    kept: list[dict[str, Any]] = [{} for _ in range(layers)]
    heads = [int(np.count_nonzero(~np.isnan(row))) for row in norms]
    for name, dtype in CIRCUIT_ARRAYS.items():
        array = arrays.get(f"{tower}.{name}")
        rank = 3 - (name in _PER_LAYER) - (name in _PER_HEAD)
        if array is not None and (array.dtype != dtype or array.ndim != rank or len(array) != layers):
            raise ValueError(f"{tower}.{name} is {array.dtype} {list(array.shape)}")
        if array is not None and name in _PER_HEAD and (np.abs(array[np.isfinite(array)]) > _LARGEST_LOG).any():
            raise ValueError(f"{tower}.{name} holds what is no logarithm")
        for i in range(layers):
            row = None if array is None else array[i] if name in _PER_LAYER else array[i, : heads[i]]
            kept[i][name] = None if row is None else _known(row)
            if row is not None and name not in _PER_LAYER and (len(row) < heads[i] or _torn(row, name)):
                raise ValueError(f"{tower}.{name} does not hold the {heads[i]} heads of each layer")
    return tuple(Circuits(**each) if each["qk_norm"] is not None else None for each in kept)


def _torn(row: NDArray[Any], name: str) -> bool:
    """Whether of a layer's norms some are there and others are not."""
    import numpy as np

    missing = np.isnan(row)
    return name in _PER_HEAD and bool(missing.any() and not missing.all())


def _known(row: NDArray[Any]) -> bytes | None:
    """Without the NaN that layers of other sizes are filled up with; None where nothing is left."""
    import numpy as np

    missing = np.isnan(row)
    if missing.all():
        return None
    return row[..., ~missing.reshape(-1, row.shape[-1]).all(axis=0)].tobytes()


def _unpadded(row: NDArray[Any], nonfinite: int) -> bytes:
    """Without the NaN that `_stack` fills up with; among non-finite values a NaN may be the answer, so it stays."""
    import numpy as np

    known = np.flatnonzero(~np.isnan(row))
    return (row if nonfinite else row[: known[-1] + 1 if known.size else 0]).tobytes()


def _expect(value: Any, kind: type | UnionType, what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{what} is a {type(value).__name__}")
    return value


def main_tower(towers: Mapping[str, object]) -> str:
    """The language decoder, else the only encoder: the tower at the top level of the JSON."""
    return next((name for name in ("decoder", "encoder") if name in towers), next(iter(towers)))


def kind(fingerprint: Fingerprint, tower: str) -> str:
    """What sort of model a tower is of: its name, after "seq2seq " where it belongs to an encoder-decoder."""
    return f"seq2seq {tower}" if "cross" in fingerprint.towers and tower != "vision" else tower


def _tower_json(tower: TowerFingerprint, sampled: bool) -> dict[str, Any]:
    return {
        "layers": list(tower.layers),
        "heads": tower.heads,
        "kv_heads": tower.kv_heads,
        "head_dim": tower.head_dim,
        "hidden_size": tower.hidden_size,
        "std": tower.std,
        "mean": tower.mean,
        "roles": tower.roles,
        "rotary": None if (r := tower.rotary) is None else {"pairs": r.pairs, "interleaved": r.interleaved},
        "indexed_heads": tower.indexed_heads,
        "deep": tower.circuits is not None,
    } | ({"interval": tower.interval} if sampled else {})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _arrays(towers: Mapping[str, TowerFingerprint]) -> dict[str, NDArray[Any]]:
    import numpy as np

    arrays: dict[str, NDArray[Any]] = {}
    for name, tower in towers.items():
        for role, column in tower.statistics.items():
            prefix = f"{name}.{role}"
            for key in ("count", "nonfinite"):
                arrays[f"{prefix}.{key}"] = np.array([0 if s is None else getattr(s, key) for s in column], np.int64)
            for key in ("mean", "std", "abs_max"):
                values = [math.nan if s is None else getattr(s, key) for s in column]
                arrays[f"{prefix}.{key}"] = np.array(values, np.float64)
            arrays[f"{prefix}.residual"] = tower.residual(role)
            if any(s is not None and s.interval is not None for s in column):
                around = [(math.nan, math.nan) if s is None or s.interval is None else s.interval for s in column]
                arrays[f"{prefix}.interval"] = np.array(around, np.float64)
            if any(s is not None and s.head_std is not None for s in column):
                arrays[f"{prefix}.head_std"] = tower.head_std(role)
        for array in CIRCUIT_ARRAYS:
            if (stacked := tower.circuit(array)) is not None:
                arrays[f"{name}.{array}"] = stacked
    return arrays


def _stack(rows: list[NDArray[Any] | None], dtype: type) -> NDArray[Any]:
    import numpy as np

    width = max((len(row) for row in rows if row is not None), default=0)
    stacked: NDArray[Any] = np.full((len(rows), width), np.nan, dtype)
    for i, row in enumerate(rows):
        if row is not None:
            stacked[i, : len(row)] = row
    return stacked
