"""Checkpoints whose projections are given as a quantiser stores them, and what must come out for their true values."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import llmfp
from llmfp.__main__ import main
from llmfp.architecture import match
from llmfp.checkpoint import open_checkpoint
from llmfp.errors import LlmfpError
from llmfp.kernels import codes
from llmfp.marginals import Chunk
from tests.checkpoints import Stored, write_model

DECODING = ("reference", "native_cpu")
"""Back ends that decode."""
ROLES = ("q", "k", "v", "o")
Fields = Mapping[str, NDArray[Any] | Stored]


def write_quantised(
    folder: Path, projections: Mapping[str, Fields], config: Mapping[str, Any] | None = None, *, heads: int
) -> Path:
    """One layer of llama; each role's tensors by what follows its module's name: {"q": {"qweight": …, "scales": …}}."""
    tensors: dict[str, NDArray[Any] | Stored] = {}
    for role, fields in projections.items():
        tensors |= {f"model.layers.0.self_attn.{role}_proj.{field}": tensor for field, tensor in fields.items()}
    stated = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": 1}
    return write_model(folder, tensors, {**stated, **(config or {})})


def check_statistics(folder: Path, weights: Mapping[str, NDArray[np.float64]], backend: str) -> None:
    """Mean, σ and every head's σ of each role's W [out, in] to 1e-6, and the profile along the residual stream.

    With as many heads as Q has outputs, heads are the rows of Q, K and V and the columns of O.
    """
    found = llmfp.scan(folder, backend=backend).main
    for role, dense in weights.items():
        np.testing.assert_allclose(found.std[role], [dense.std()], rtol=1e-6, err_msg=role)
        np.testing.assert_allclose(found.mean[role], [dense.mean()], rtol=1e-6, atol=1e-6 * dense.std(), err_msg=role)
        by_head = np.stack(np.split(dense, found.heads or 1, axis=1 if role == "o" else 0))
        np.testing.assert_allclose(found.head_std(role)[0], by_head.std(axis=(1, 2)), rtol=1e-6, err_msg=role)
        profile = 0.5 * np.log(np.square(dense).mean(axis=1 if role == "o" else 0))
        np.testing.assert_allclose(found.residual(role)[0], profile, rtol=2.0**-10, atol=2.0**-10, err_msg=role)


def decoded(folder: Path, role: str) -> NDArray[np.float64]:
    """A projection's W [out, in], as its coding defines it."""
    checkpoint = open_checkpoint(folder)
    spec = next(p.view.tensor for p in match(checkpoint).towers[0].projections if str(p.role) == role)
    encoding, (rows, cols) = spec.encoding, spec.shape
    assert encoding is not None
    content = checkpoint.shards[spec.shard].path.read_bytes()
    parts = {field: content[part.offset_bytes :][: part.nbytes] for field, part in encoding.parts}
    coding, dense = encoding.prepare(parts), np.empty((rows, cols))
    for first, count in encoding.runs(rows, 0, rows):
        start = spec.offset_bytes + encoding.extent(rows, first, count)[0]
        chunk = Chunk(content, "", count, cols, start, encoding.row_bytes, count, first_row=first)
        dense[first : first + count] = codes.decode(chunk, replace(coding, place=encoding.place(rows, first)))
    return dense.T if encoding.in_out else dense


def plan_of(folder: Path) -> dict[str, Any]:
    """What `plan --json` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["plan", str(folder), "--json"]) == 0
    plan: dict[str, Any] = json.loads(printed.getvalue())
    return plan


def error_of(folder: Path) -> str:
    """What a scan says that must be refused: one line, naming the file."""
    with pytest.raises(LlmfpError) as caught:
        llmfp.scan(folder, backend=DECODING[0])
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message
