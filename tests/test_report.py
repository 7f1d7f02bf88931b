"""A report shows what the JSON says and nothing else: opened in a real browser from disk, with no network, no console
error, no overflow on a phone, readable in light, dark and print, by keyboard, and whatever names strangers gave.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import llmfp
from llmfp.__main__ import main
from llmfp.report import page, words
from tests.browser import CONTRAST, Browser
from tests.checkpoints import BACKEND, Model, build

pytest.importorskip("vl_convert", reason="vl-convert-python draws the charts")

EVIL = "<img src=x onerror=window.owned=1>"
EVIL_TEXT = "</script><script>window.owned=1</script>"
FORMULA = "=HYPERLINK(1)"


def noisy(model: Model, share: float, seed: int = 5) -> Model:
    """The model after noise on its weights: what training on leaves, for a test that only needs a relative."""
    rng = np.random.default_rng(seed)
    for name, tensor in model.tensors.items():
        assert isinstance(tensor, np.ndarray)
        weights: NDArray[Any] = tensor + share * tensor.std() * rng.standard_normal(tensor.shape)
        model.tensors[name] = weights.astype(tensor.dtype)
    return model


def llama(layers: int = 12, seed: int = 1) -> Model:
    return build("llama", layers=layers, heads=4, kv_heads=2, head_dim=16, hidden=96, seed=seed)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return llama().write(folder / "parent"), noisy(llama(), 0.2).write(folder / "child")


@pytest.fixture(scope="module")
def report(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page of two relatives as the command line writes it, and the JSON that the same command prints."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    a, b = models
    found = llmfp.compare(a, b, permutations=2000)
    arguments = ["compare", str(a), str(b), "--permutations", "2000", "--backend", BACKEND, "--report", str(file)]
    assert main(arguments) == 0
    return file, json.loads(json.dumps(found.to_json()))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every text that a stranger can choose is an attack."""
    folder = tmp_path_factory.mktemp("hostile")
    one, two = llama(7), llama(9, seed=3)
    for model in (one, two):
        model.config = {**(model.config or {}), "model_type": EVIL_TEXT}
        model.tensors[EVIL_TEXT] = np.ones((2, 2), np.float32)
    a, b = one.write(folder / EVIL), two.write(folder / FORMULA)
    stds = {role: [0.1, 0.2, 0.15, 0.3] for role in "qkvo"}
    null = {
        "schema": "llmfp.null/1",
        "source": EVIL_TEXT,
        "models": [
            {"name": EVIL, "family": name, "kind": "decoder", "decimals": None, "std": stds}
            for name in (EVIL_TEXT, f'"{EVIL}', FORMULA)
        ],
    }
    (folder / "null.json").write_text(json.dumps(null))
    found = json.loads(json.dumps(llmfp.compare(a, b, permutations=500, null=folder / "null.json").to_json()))
    found["caveats"].append(EVIL_TEXT)
    found["a"]["source"]["revision"] = EVIL
    found["a"]["source"]["files"][0]["name"] = EVIL_TEXT
    file = folder / "report.html"
    file.write_text(page.comparison(found))
    return file, found


# --- what needs no browser


def embedded(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def without_run(found: dict[str, Any]) -> dict[str, Any]:
    """What does not differ between two runs on the same models."""
    sides = {side: {key: value for key, value in found[side].items() if key != "run"} for side in ("a", "b")}
    return {**found, **sides}


def test_the_page_carries_the_json_that_the_command_prints(report: tuple[Path, dict[str, Any]]) -> None:
    file, found = report
    assert without_run(embedded(file.read_text())) == without_run(found)


def test_the_json_holds_what_a_report_needs(report: tuple[Path, dict[str, Any]], models: tuple[Path, Path]) -> None:
    _, found = report
    for side, model in zip(("a", "b"), models, strict=True):
        assert found[side]["std"] == llmfp.scan(model).std
        assert found[side]["layer_numbers"] == list(range(12))
        assert found[side]["source"]["files"][0]["name"] == "model.safetensors"
    for test in ("residual", "heads"):
        bars = found[test]["permuted"]
        assert sum(bars["counts"]) == found[test]["permutations"] == 2000
        top = bars["start"] + bars["width"] * len(bars["counts"])
        assert bars["start"] < 0 < top
        assert (top < found[test]["z"]) == (found[test]["p_value"] == 1 / 2001)
    null = found["profile"]["null"]
    own = [other for other in null["strangers"] if other["kind"] == null["kind"]]
    assert [other["family"] for other in own] == null["families"]
    assert all(-1 <= other[side] <= 1 for other in null["strangers"] for side in ("a", "b"))


def test_every_number_of_a_table_is_the_jsons(report: tuple[Path, dict[str, Any]]) -> None:
    file, found = report
    rows = csv_of(file, "curves")
    assert rows[0] == ["model", "role", "layer", "σ", "normalised"]
    for letter, side in (("A", "a"), ("B", "b")):
        for role in "qkvo":
            mine = [row for row in rows[1:] if row[:2] == [letter, role.upper()]]
            assert [float(row[3]) for row in mine] == found[side]["std"][role]
            assert np.mean([float(row[4]) for row in mine]) == pytest.approx(0, abs=1e-9)
            assert np.std([float(row[4]) for row in mine]) == pytest.approx(1)
    assert [int(row[2]) for row in csv_of(file, "residual")[1:]] == found["residual"]["permuted"]["counts"]
    cells = [[float(cell) for cell in row[1:]] for row in csv_of(file, "coherence")[1:]]
    assert cells == found["coherence"]["matrix"]


def csv_of(file: Path, figure: str) -> list[list[str]]:
    link = re.search(rf'download="{figure}.csv" href="data:text/csv;charset=utf-8;base64,([^"]*)"', file.read_text())
    assert link is not None
    return list(csv.reader(io.StringIO(base64.b64decode(link[1]).decode())))


def test_terminal_and_page_say_the_verdict_in_the_same_words(
    report: tuple[Path, dict[str, Any]], models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file, found = report
    said = words.verdict(found)
    assert main(["compare", *map(str, models), "--permutations", "2000"]) == 0
    assert " ".join(capsys.readouterr().out.split()).startswith(said)
    assert html.escape(said.partition(": ")[2][1:]) in file.read_text()


def test_the_command_on_the_page_gives_the_same_answer_again(
    report: tuple[Path, dict[str, Any]], models: tuple[Path, Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _, found = report
    command = words.compare_command(found).split()
    assert command[0] == "llmfp-fast"
    monkeypatch.chdir(models[0].parent)
    capsys.readouterr()
    assert main([*command[1:], "--json"]) == 0
    assert without_run(json.loads(capsys.readouterr().out)) == without_run(found)


class Elements(HTMLParser):
    """Every element's name and every attribute's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_no_style_and_no_script_is_allowed_but_the_pages_own(hostile: tuple[Path, dict[str, Any]]) -> None:
    text = hostile[0].read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    parsed = Elements()
    parsed.feed(text)
    assert parsed.names.count("script") == 2
    assert parsed.names.count("style") == 1
    assert not {name for name in parsed.attributes if name == "style" or name.startswith("on")}
    assert parsed.names.count("img") == parsed.names.count("iframe") == parsed.names.count("foreignobject") == 0


def test_a_formula_in_a_name_is_text_in_a_spreadsheet(hostile: tuple[Path, dict[str, Any]]) -> None:
    families = [row[0] for row in csv_of(hostile[0], "null")]
    assert f"'{FORMULA}" in families
    assert FORMULA not in families


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmfp.api, "scan", lambda *_, **__: pytest.fail("work was begun"))
    for command in (["compare", *map(str, models)], ["scan", str(models[0])]):
        assert main([*command, "--report", str(tmp_path / "nowhere" / "x.html")]) == 2
        error, hint = capsys.readouterr().err.splitlines()
        assert "nowhere is not a directory" in error
        assert hint.startswith("hint: ")


def test_without_the_library_that_draws_the_error_says_how_to_get_it(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda _: None)
    assert main(["scan", str(models[0]), "--report", str(tmp_path / "x.html")]) == 2
    assert capsys.readouterr().err.splitlines()[1] == "hint: pip install 'llmfp[report]'"


# --- what a browser shows


def test_it_opens_from_disk_in_silence_and_asks_for_nothing(
    browser: Browser, report: tuple[Path, dict[str, Any]], hostile: tuple[Path, dict[str, Any]]
) -> None:
    for file, _ in (report, hostile):
        browser.open(file)
        console, asked = browser.drain()
        assert console == []
        assert asked == [file.as_uri(), "data:,"] or asked == [file.as_uri()]


def test_hostile_names_are_text(browser: Browser, hostile: tuple[Path, dict[str, Any]]) -> None:
    file, _ = hostile
    browser.open(file)
    assert browser.js("return window.owned") is None
    assert browser.js("return document.querySelectorAll('img').length") == 0
    shown = browser.js("return document.body.textContent")
    assert EVIL in browser.js("return document.querySelector('h1').textContent")
    assert shown.count(EVIL_TEXT) >= 4  # model type, file, family, caveat
    assert browser.js("return document.title").startswith(EVIL)
    marks = "return [...document.querySelectorAll('#null-title ~ .panels [aria-label]')].map((m) => m.ariaLabel)"
    assert any(EVIL_TEXT in label for label in browser.js(marks))
    browser.keep("hostile")


def test_script_that_came_with_data_would_not_run(
    browser: Browser, report: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Were an escape forgotten, the policy would stop it."""
    broken = tmp_path / "broken.html"
    broken.write_text(report[0].read_text().replace("<footer>", f"{EVIL}<script>window.owned=1</script><footer>"))
    browser.open(broken)
    console, asked = browser.drain()
    assert browser.js("return window.owned") is None
    assert any("Content Security Policy" in line for line in console)
    assert asked[0] == broken.as_uri()


def test_hovering_says_layer_and_value(browser: Browser, report: tuple[Path, dict[str, Any]]) -> None:
    file, found = report
    browser.open(file)
    label = f"B, K, layer 7: σ = {page.number(found['b']['std']['k'][7])}"
    found_by = "return [...document.querySelectorAll('[aria-label]')].find((m) => m.ariaLabel === arguments[0])"
    mark = browser.js(found_by, label)
    left, top, width, height = browser.centred(mark)
    assert browser.hover(left + width / 2 + 2, top + height / 2 - 2) == label
    assert browser.hover(2, 2) == ""


def test_hovering_over_the_heat_map_says_its_number(browser: Browser, report: tuple[Path, dict[str, Any]]) -> None:
    file, found = report
    browser.open(file)
    area = browser.js("return document.querySelector('[data-matrix] .role-frame .background')")
    left, top, width, height = browser.centred(area)
    said = browser.hover(left + width * 3.5 / 12, top + height * 8.5 / 12)
    value = f"{found['coherence']['matrix'][8][3]:.2f}".replace("-", "−")
    assert said == f"layer 8 of A with layer 3 of B: r = {value}"


def test_arrow_keys_read_the_points_aloud(browser: Browser, report: tuple[Path, dict[str, Any]]) -> None:
    file, found = report
    browser.open(file)
    drawing = browser.js("return document.querySelector('.drawing')")
    browser.js("arguments[0].focus()", drawing)
    for _ in range(2):
        drawing.send_keys("\ue014")  # right
    said = browser.js("return document.getElementById('says').textContent")
    assert said == f"A, Q, layer 1: σ = {page.number(found['a']['std']['q'][1])}"
    assert browser.js("return document.querySelectorAll('.drawing:not([aria-label])').length") == 0


def test_raw_and_normalised_change_places(browser: Browser, report: tuple[Path, dict[str, Any]]) -> None:
    browser.open(report[0])
    seen = "return [...document.querySelectorAll('#curves-title ~ .panels .panel')].map((p) => p.offsetParent !== null)"
    assert browser.js(seen) == [True, False] * 4
    browser.driver.find_element("css selector", "label[for=curves-normalised]").click()
    assert browser.js(seen) == [False, True] * 4


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_has_contrast(browser: Browser, report: tuple[Path, dict[str, Any]], dark: bool) -> None:
    browser.open(report[0], dark=dark)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    seen, poor = browser.js(CONTRAST)
    assert seen > 500
    assert poor == []
    browser.open(report[0], dark=dark)
    browser.keep("comparison-dark" if dark else "comparison-light")


@pytest.mark.parametrize("which", ["report", "hostile"])
def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Browser, which: str, request: pytest.FixtureRequest
) -> None:
    browser.open(request.getfixturevalue(which)[0], width=360)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert browser.js("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    browser.keep(f"{which}-phone")


def test_print_shows_both_ways_of_looking_and_makes_a_document(
    browser: Browser, report: tuple[Path, dict[str, Any]]
) -> None:
    browser.open(report[0], dark=True, media="print")
    seen = "return [...document.querySelectorAll('#curves-title ~ .panels .panel')].map((p) => p.offsetParent !== null)"
    assert browser.js(seen) == [True] * 8
    seen, poor = browser.js(CONTRAST)
    assert poor == []
    printed = browser.pdf()
    assert printed.startswith(b"%PDF-")
    assert 2 <= printed.count(b"/Type /Page\n") <= 12


def test_the_json_can_be_saved(browser: Browser, report: tuple[Path, dict[str, Any]]) -> None:
    browser.open(report[0])
    saved = browser.js(
        "let kept; const make = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { kept = blob; return make(blob); };"
        "HTMLAnchorElement.prototype.click = function () { window.savedAs = this.download; };"
        "document.getElementById('save-json').click(); return kept.text()"
    )
    assert without_run(json.loads(saved)) == without_run(report[1])
    assert browser.js("return window.savedAs") == "llmfp.comparison-1.json"


def test_the_page_of_a_scan(browser: Browser, models: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "scan.html"
    assert main(["scan", str(models[0]), "--backend", BACKEND, "--report", str(file)]) == 0
    found = embedded(file.read_text())
    assert found["std"] == llmfp.scan(models[0]).std
    browser.open(file, width=360)
    assert browser.drain()[0] == []
    assert browser.js("return document.documentElement.scrollWidth") == 360
    assert browser.js(CONTRAST)[1] == []
    assert browser.js("return document.querySelectorAll('.panel').length") == 8
    browser.keep("scan-phone")
