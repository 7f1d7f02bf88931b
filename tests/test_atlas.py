"""The atlas tells declared and detected relations apart, tests what it calls detected, orders models by a tree that is
average linkage by definition, and stays quick in a real browser with 2,000 models.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import llmfp
from llmfp.__main__ import main
from llmfp.atlas import SCHEMA, UNKNOWN, Merge, average_linkage, described, leaves, similarity
from llmfp.report import page
from tests.browser import CONTRAST, Browser
from tests.checkpoints import Model, build

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")

EVIL = "<img src=x onerror=window.owned=1>"
MANY = 2000


def llama(seed: int) -> Model:
    return build("llama", layers=8, heads=4, kv_heads=2, head_dim=16, hidden=96, seed=seed)


def noisy(model: Model, seed: int) -> Model:
    rng = np.random.default_rng(seed)
    for name, tensor in model.tensors.items():
        assert isinstance(tensor, np.ndarray)
        weights: NDArray[Any] = tensor + 0.1 * tensor.std() * rng.standard_normal(tensor.shape)
        model.tensors[name] = weights.astype(tensor.dtype)
    return model


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, a child that declares it, one that does not, a stranger that claims to be its child, and a loner."""
    from llmfp.registry import Origin, Registry

    folder = tmp_path_factory.mktemp("atlas")
    made = {
        "org/parent": (llama(1), ()),
        "org/child": (noisy(llama(1), 5), ("org/parent",)),
        f"org/{EVIL}": (noisy(llama(1), 6), ()),
        "org/claims": (llama(2), ("ORG/Parent",)),
        "org/loner": (build("bert", layers=3, hidden=32), ("org/unknown",)),
    }
    kept = Registry.open(folder / "registry", create=True)
    added = []
    for n, (repo, (model, bases)) in enumerate(made.items()):
        fingerprint = llmfp.scan(model.write(folder / str(n)), deep=True)
        added.append((fingerprint, Origin(repo, f"{n:040x}", base_models=bases)))
    kept.add(added)
    return folder / "registry"


@pytest.fixture(scope="module")
def atlas(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    file = tmp_path_factory.mktemp("page") / "atlas.html"
    arguments = ["atlas", "--registry", str(registry), "--permutations", "5000", "--out", str(file)]
    assert main(arguments) == 0
    text = file.read_text("utf-8")
    found: dict[str, Any] = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    return file, found


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """2,000 models that never were: 40 families of 50, each around a curve of its own, the first its base."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(MANY):
        family = np.random.default_rng(n // 50)
        stds = {f"std_{role}": (1 + family.random(24) + 0.2 * rng.random(24)).tolist() for role in ("q", "k", "v", "o")}
        rows.append(
            {
                "repo": f"org-{n // 50:02}/model-{n:04}", "revision": f"{n:040x}", "architecture": "llama",
                "kind": "decoder", "layers": 24, "hidden_size": 1024, "heads": 16, "kv_heads": 4, "digest": f"{n:064x}",
                "base_models": [f"org-{n // 50:02}/model-{n - n % 50:04}"] if n % 50 else [],
                "base_model_relation": None, **stds,
            }
        )  # fmt: skip
    table = pa.Table.from_pylist(rows)
    edges = [
        {"a": n - n % 50, "b": n, "declared": "a" if n % 3 else None, "detected": n % 2 == 0 or n % 3 == 0,
         "same": False, "p_value": 1e-5, "reason": None}
        for n in range(MANY)
        if n % 50
    ]  # fmt: skip
    found = described(table, similarity(table), edges, alpha=1e-3, permutations=100_000, tested=len(edges))
    file = tmp_path_factory.mktemp("many") / "atlas.html"
    file.write_text(page.atlas(found), "utf-8")
    return file, found


def edge(found: dict[str, Any], one: str, other: str) -> dict[str, Any] | None:
    for each in found["edges"]:
        if {found["models"][each["a"]]["repo"], found["models"][each["b"]]["repo"]} == {one, other}:
            return dict(each)
    return None


def test_declared_and_detected_are_told_apart(atlas: tuple[Path, dict[str, Any]]) -> None:
    _, found = atlas
    assert found["schema"] == SCHEMA
    both = edge(found, "org/parent", "org/child")
    assert both is not None
    assert found["models"][both[both["declared"]]]["repo"] == "org/parent"
    assert both["detected"]
    assert both["p_value"] <= 1e-3
    claimed = edge(found, "org/parent", "org/claims")
    assert claimed is not None
    assert claimed["declared"] is not None
    assert not claimed["detected"]
    assert claimed["p_value"] > 1e-3
    silent = [each for each in found["edges"] if each["declared"] is None]
    assert silent
    assert all(each["detected"] for each in silent)
    assert {found["models"][each[side]]["repo"] for each in silent for side in "ab"} <= {
        "org/parent", "org/child", f"org/{EVIL}",
    }  # fmt: skip
    assert not [each for each in found["edges"] if "org/loner" in str(each)]


def test_scores_are_those_of_compare(atlas: tuple[Path, dict[str, Any]], registry: Path) -> None:
    from llmfp.evidence.profile import profile
    from llmfp.registry import Registry

    _, found = atlas
    n = len(found["models"])
    codes = np.frombuffer(base64.b64decode(found["similarity"]), np.uint8)
    assert len(codes) == n * (n - 1) // 2
    rows = Registry.open(registry).table(["repo", "revision", "entry"]).to_pylist()
    prints = [Registry.open(registry).load(row) for row in rows]
    for code, i, j in zip(codes, *np.triu_indices(n, 1), strict=True):
        score = profile(prints[i].std, prints[j].std).pearson["mean"]
        assert code == UNKNOWN if score is None else abs(code / 127 - 1 - score) <= 1 / 254 + 1e-9


def cophenetic(merges: list[Merge], n: int) -> NDArray[np.float64]:
    """At which height each pair comes together."""
    members = [[i] for i in range(n)]
    heights = np.zeros((n, n))
    for merge in merges:
        left, right = members[merge.left], members[merge.right]
        heights[np.ix_(left, right)] = merge.height
        heights[np.ix_(right, left)] = merge.height
        members.append(left + right)
    return heights


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17])
def test_the_tree_is_average_linkage(n: int) -> None:
    """Against the definition: join the two clusters whose members are nearest on average, again and again."""
    rng = np.random.default_rng(n)
    scores = rng.uniform(-1, 1, (n, n))
    scores = (scores + scores.T) / 2
    merges = average_linkage(scores)
    assert sorted(leaves(merges, n)) == list(range(n))
    expected = np.zeros((n, n))
    clusters = [[i] for i in range(n)]
    while len(clusters) > 1:
        best = min(
            ((1 - scores[np.ix_(a, b)]).mean(), i, j)
            for i, a in enumerate(clusters)
            for j, b in enumerate(clusters)
            if i < j
        )
        a, b = clusters[best[1]], clusters[best[2]]
        expected[np.ix_(a, b)] = best[0]
        expected[np.ix_(b, a)] = best[0]
        clusters = [c for c in clusters if c not in (a, b)] + [a + b]
    assert cophenetic(merges, n) == pytest.approx(expected)


def test_a_page_without_models_and_one_without_edges(browser: Browser, tmp_path: Path) -> None:
    from llmfp.registry import Registry

    Registry.open(tmp_path / "empty", create=True)
    file = tmp_path / "atlas.html"
    assert main(["atlas", "--registry", str(tmp_path / "empty"), "--out", str(file)]) == 0
    browser.open(file)
    assert browser.drain()[0] == []
    assert "no test detected one" in browser.js("return document.body.textContent")


def test_it_opens_in_silence_and_names_are_text(browser: Browser, atlas: tuple[Path, dict[str, Any]]) -> None:
    file, _ = atlas
    for width, dark in ((1100, True), (360, False)):
        browser.open(file, width=width, dark=dark)
        console, asked = browser.drain()
        assert console == []
        assert set(asked) <= {file.as_uri(), "data:,"}
        assert browser.js("return window.owned") is None
        assert EVIL in browser.js("return document.getElementById('models').textContent")
        assert browser.js("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.js("return innerWidth") == width
        assert browser.js(CONTRAST)[1] == []
        browser.keep(f"atlas-{width}")


def test_two_thousand_models_load_in_three_seconds(browser: Browser, many: tuple[Path, dict[str, Any]]) -> None:
    """Of the page's own processor time: a busy machine takes longer, and is no fault of the page."""
    file, _ = many
    browser.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.open(file)
    metrics = browser.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    browser.driver.execute_cdp_cmd("Performance.disable", {})
    busy = {each["name"]: each["value"] for each in metrics}["TaskDuration"]
    elapsed = browser.js("return performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    print(f"{file.stat().st_size:,} bytes, loaded in {elapsed:.2f} s, of which busy {busy:.2f} s")
    assert browser.js("return document.body.dataset.ready") == "yes"
    assert browser.drain()[0] == []
    assert 0 < busy < 3
    assert file.stat().st_size < 6_000_000
    browser.keep("atlas-2000")


def test_search_and_sort(browser: Browser, many: tuple[Path, dict[str, Any]]) -> None:
    browser.open(many[0])
    rows = "[...document.querySelectorAll('#models tbody tr')]"
    shown = f"return {rows}.filter((row) => !row.hidden).map((row) => row.cells[0].textContent)"
    assert len(browser.js(shown)) == MANY
    browser.driver.find_element("id", "search").send_keys("org-07/ model-0351")
    assert browser.js(shown) == ["org-07/model-0351"]
    assert browser.js("return document.getElementById('count').textContent") == "1 shown"
    browser.driver.find_element("id", "search").send_keys("\ue009a\ue000\ue017")  # select all, delete
    for direction in ("ascending", "descending"):
        browser.js("document.querySelectorAll('.sort')[9].click()")
        head = "return document.querySelectorAll('#models thead th')[9].getAttribute('aria-sort')"
        assert browser.js(head) == direction
        cells = "return [...document.querySelectorAll('#models tbody tr')].map((r) => Number(r.cells[9].textContent))"
        assert browser.js(cells) == sorted(browser.js(cells), reverse=direction == "descending")


def test_the_map_says_its_numbers_and_zooms(browser: Browser, many: tuple[Path, dict[str, Any]]) -> None:
    file, found = many
    browser.open(file)
    left, top, width, _ = browser.centred(browser.js("return document.getElementById('map')"))
    scale = width / 900
    place = (1234, 77)  # row, column among 2,000

    def hover() -> str:
        x = left + (180 + 720 * (place[1] + 0.5) / MANY) * scale
        return browser.hover(x, top + 720 * (place[0] + 0.5) / MANY * scale)

    said = hover()
    near = {found["models"][found["order"][place[0] + step]]["repo"] for step in (-2, -1, 0, 1, 2)}
    assert said.split(" with ")[0] in near
    one, other = said.rpartition(": ")[0].split(" with ")
    numbers = {model["repo"]: n for n, model in enumerate(found["models"])}
    i, j = sorted((numbers[one], numbers[other]))
    codes = np.frombuffer(base64.b64decode(found["similarity"]), np.uint8)
    code = codes[i * MANY - i * (i + 1) // 2 + j - i - 1]
    assert float(said.rpartition(": ")[2].replace("−", "-")) == pytest.approx(code / 127 - 1, abs=0.005)
    browser.js("document.querySelectorAll('.find')[700].click()")
    assert browser.js("return document.getElementById('map').dataset.span") == "40"
    canvas = browser.driver.find_element("id", "map")
    canvas.send_keys("+")
    assert browser.js("return document.getElementById('map').dataset.span") == "32"
    canvas.send_keys("0")
    assert browser.js("return document.getElementById('map').dataset.span") == str(MANY)


def test_a_batch_ends_with_the_atlas_where_one_is_asked_for(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page of `batch --report` is that of `atlas --out`, of the registry as the batch left it."""
    kept = tmp_path / "kept"
    shutil.copytree(registry, kept)
    (tmp_path / "list").write_text(f"{build('llama', layers=6).write(tmp_path / 'newcomer')}\n")
    page, same = tmp_path / "batch.html", tmp_path / "atlas.html"
    arguments = ["batch", "--registry", str(kept), "--list", str(tmp_path / "list"), "--report", str(page)]
    assert main(arguments) == 0, capsys.readouterr().err
    assert main(["atlas", "--registry", str(kept), "--out", str(same)]) == 0
    assert page.read_text() == same.read_text()
    assert "newcomer" in page.read_text()
    capsys.readouterr()
    assert main([*arguments[:-1], str(tmp_path / "nowhere" / "x.html")]) == 2
    assert "--report" in capsys.readouterr().err


def test_usage(registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["atlas", "--registry", str(registry)]) == 2
    assert "--out FILE.html, or --json" in capsys.readouterr().err
    assert main(["atlas", "--registry", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.html")]) == 2
    assert "no registry" in capsys.readouterr().err
