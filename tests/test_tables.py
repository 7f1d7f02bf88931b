"""Results in a notebook and in a pipe are those of the JSON: tables for pandas, Arrow and tab-separated lines, figures,
and HTML in which a stranger's name is text.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import llmfp
from llmfp.__main__ import main
from llmfp.errors import LlmfpError
from llmfp.report import terminal
from tests.checkpoints import BACKEND, build

EVIL = "<img src=x onerror=window.owned=1>$x_"


@pytest.fixture(scope="module")
def fingerprint(tmp_path_factory: pytest.TempPathFactory) -> llmfp.Fingerprint:
    model = build("llama", layers=8, heads=4, kv_heads=2, head_dim=16, hidden=96)
    return llmfp.scan(model.write(tmp_path_factory.mktemp("tables") / EVIL), deep=True)


@pytest.fixture(scope="module")
def comparison(fingerprint: llmfp.Fingerprint, tmp_path_factory: pytest.TempPathFactory) -> llmfp.Comparison:
    model = build("llama", layers=8, heads=4, kv_heads=2, head_dim=16, hidden=96, seed=4)
    return llmfp.compare(fingerprint, model.write(tmp_path_factory.mktemp("tables") / "other"), permutations=500)


def test_a_fingerprints_table_has_a_row_for_every_tensor(fingerprint: llmfp.Fingerprint) -> None:
    pytest.importorskip("pandas")
    frame = fingerprint.to_pandas()
    assert list(frame.columns[:5]) == ["tower", "role", "layer", "std", "mean"]
    for role in "qkvo":
        column = frame[frame.role == role]
        assert column["std"].tolist() == fingerprint.std[role]
        assert column["mean"].tolist() == fingerprint.mean[role]
        assert column["layer"].tolist() == list(fingerprint.layers)
    assert set(frame["count"][frame.role == "q"]) == {64 * 96}


def test_arrow_holds_the_same_as_pandas(fingerprint: llmfp.Fingerprint, comparison: llmfp.Comparison) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    for result in (fingerprint, comparison):
        frame, table = result.to_pandas(), result.to_arrow()
        assert table.column_names == list(frame.columns)
        for name in table.column_names:
            ours, theirs = table[name].to_pylist(), frame[name].tolist()
            assert [a for a in ours if a is not None] == [b for b in theirs if b is not None and b == b]


def test_a_comparisons_table_has_a_row_for_every_test(comparison: llmfp.Comparison) -> None:
    pytest.importorskip("pyarrow")
    rows = {row["test"]: row for row in comparison.to_arrow().to_pylist()}
    found = comparison.to_json()
    assert list(rows) == ["residual", "heads", "coherence", "profile"]
    assert rows["residual"]["z"] == found["residual"]["z"]
    assert rows["residual"]["p_value"] == found["residual"]["p_value"]
    assert rows["profile"]["score"] == found["profile"]["pearson"]["mean"]
    assert {name for name, row in rows.items() if row["decided"]} == set(found["rests_on"])
    assert {name: row["reason"] for name, row in rows.items() if row["reason"]} == found["lost"]


@pytest.mark.parametrize("library", ["pandas", "pyarrow", "matplotlib"])
def test_a_library_that_is_missing_is_named(
    fingerprint: llmfp.Fingerprint, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    use = {"pandas": fingerprint.to_pandas, "pyarrow": fingerprint.to_arrow, "matplotlib": fingerprint.plot}[library]
    with pytest.raises(LlmfpError, match=f"{library} is not installed") as caught:
        use()
    assert caught.value.hint == "pip install 'llmfp[notebook]'"


def test_figures_show_the_numbers(fingerprint: llmfp.Fingerprint, comparison: llmfp.Comparison) -> None:
    pytest.importorskip("matplotlib")
    drawn = fingerprint.plot()
    for axes, role in zip(drawn.axes, "qkvo", strict=True):
        assert axes.lines[0].get_ydata() == pytest.approx(fingerprint.std[role])
    both = comparison.plot()
    found = comparison.to_json()
    assert both.axes[2].lines[1].get_ydata() == pytest.approx(found["b"]["std"]["v"])
    histogram = next(axes for axes in both.axes if axes.get_title() == "residual symmetry")
    assert [bar.get_height() for bar in histogram.patches] == list(found["residual"]["permuted"]["counts"])
    assert histogram.lines[0].get_xdata()[0] == found["residual"]["z"]
    heat = next(axes for axes in both.axes if axes.get_title() == "rotary coherence")
    assert np.allclose(heat.images[0].get_array(), found["coherence"]["matrix"])
    for figure in (drawn, both):
        target = io.BytesIO()
        figure.savefig(target, format="png")
        assert target.getvalue().startswith(b"\x89PNG")


def test_a_comparison_without_tests_is_drawn_with_their_reasons(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    a = build("bert", layers=3, hidden=32).write(tmp_path / "a")
    b = build("llama", layers=2, hidden=24).write(tmp_path / "b")
    found = llmfp.compare(a, b, permutations=10)
    figure = found.plot()
    figure.draw_without_rendering()
    texts = " ".join(text.get_text().replace("\n", " ") for axes in figure.axes for text in axes.texts)
    assert found.lost["residual"] in texts


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.tags.add(tag)


def test_a_notebook_shows_names_as_text(fingerprint: llmfp.Fingerprint, comparison: llmfp.Comparison) -> None:
    for result in (fingerprint, comparison):
        parsed = _Tags()
        text = result._repr_html_()
        parsed.feed(text)
        assert "table" in parsed.tags
        assert "img" not in parsed.tags
        assert "&lt;img src=x" in text


def test_plain_lines_are_the_numbers_in_full(
    fingerprint: llmfp.Fingerprint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.fp.safetensors"
    fingerprint.save(file)
    for command in (["show"], ["scan", "--backend", BACKEND]):
        assert main([command[0], str(file), *command[1:], "--plain"]) == 0
        head, *lines = capsys.readouterr().out.splitlines()
        rows = [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]
        stds = [float(row["std"]) for row in rows if row["role"] == "v"]
        assert stds == fingerprint.std["v"]
    assert main(["compare", str(file), str(file), "--permutations", "10", "--plain"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["residual", "heads", "coherence", "profile"]


def test_sparklines_fit_and_follow_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert terminal.sparkline([0.0, 1.0, None, 7.0], 60) == "▁▂.█"
    assert terminal.sparkline([2.0, 2.0], 60) == "▄▄"
    many = terminal.sparkline([float(i) for i in range(500)], 60)
    assert len(many) == 60
    assert (many[0], many[-1]) == ("▁", "█")
    assert list(many) == sorted(many)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert terminal.sparkline([0.0, 7.0], 60) == "18"


def test_a_comparison_fits_a_terminal(
    comparison: llmfp.Comparison, fingerprint: llmfp.Fingerprint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.fp.safetensors"
    fingerprint.save(file)
    assert main(["compare", str(file), str(file), "--permutations", "10"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert json.dumps(comparison.to_json(), allow_nan=False)


def test_nothing_of_this_is_imported_before_it_is_asked_for() -> None:
    """A scan starts as fast as without it."""
    import subprocess

    heavy = ("jinja2", "pandas", "pyarrow", "matplotlib", "vl_convert", "cyclonedx", "llmfp.report.tables", "shlex")
    code = (
        "import sys, llmfp, llmfp.api, llmfp.cli.scan, llmfp.fingerprint; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    root = Path(importlib.import_module("llmfp").__file__ or "").parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
