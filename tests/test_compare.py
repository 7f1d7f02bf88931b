"""llmfp-fast compare and llmfp.compare: the JSON contract, exit codes, the page, and files that nobody should trust."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import llmfp
from llmfp.errors import LlmfpError
from llmfp.evidence import comparison
from llmfp.fingerprint import Fingerprint
from llmfp.report.comparison import comparison_page
from llmfp.report.words import ranges
from tests.lineage import config_of, initialised, trained, write

CONFIG = config_of()
FEW = ("--permutations", "9999")
ROLES_AND_MEAN = ["q", "k", "v", "o", "mean"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, its child and a stranger, as checkpoints and as fingerprints."""
    folder = tmp_path_factory.mktemp("compare")
    weights = initialised(CONFIG, 0)
    for name, each in (("parent", weights), ("child", trained(weights, 1)), ("stranger", initialised(CONFIG, 2))):
        write(each, CONFIG, folder / name)
        llmfp.scan(folder / name, deep=True).save(folder / f"{name}.fp.safetensors")
    return folder


# --- the contract ----------------------------------------------------------------------------------------------------


def test_json_has_the_keys_that_others_rely_on(models: Path, run_main: Any) -> None:
    code, stdout, stderr = run_main("compare", models / "parent", models / "child", "--json", *FEW)
    assert (code, stderr) == (0, "")
    found = json.loads(stdout, parse_constant=pytest.fail)
    assert found["schema"] == "llmfp.comparison/1"
    assert found["verdict"] == "related"
    assert found["basis"] == "exact"
    assert 0 < found["p_value"] <= 1e-3
    for score in ("pearson", "detrended", "wasserstein", "kl"):
        assert list(found["profile"][score]) == ROLES_AND_MEAN
    assert found["profile"]["null"].keys() >= {"n", "percentile", "p_value"}
    assert found["residual"].keys() >= {"z", "p_value", "permutations", "dims", "block"}
    assert (found["residual"]["permutations"], found["residual"]["dims"], found["residual"]["block"]) == (9999, 64, 32)
    assert found["heads"].keys() >= {"z", "p_value", "permutations"}
    assert found["coherence"].keys() >= {"score", "z", "p_value", "layer_map"}
    assert found["coherence"]["layer_map"] == [[n, n] for n in range(12)]
    assert all(isinstance(caveat, str) for caveat in found["caveats"])
    assert found["rests_on"]
    assert (found["a"]["name"], found["b"]["name"]) == ("parent", "child")
    assert str(models) not in stdout, "no path of this machine"


def test_what_is_missing_is_null_with_a_reason(models: Path, run_main: Any) -> None:
    code, stdout, _ = run_main("compare", models / "parent", models / "child", "--json", "--no-deep", *FEW)
    found = json.loads(stdout)
    assert code == 0
    assert (found["heads"], found["coherence"]) == (None, None)
    assert "plain scan" in found["lost"]["heads"]
    assert "plain scan" in found["lost"]["coherence"]
    assert found["rests_on"] == ["residual"]
    code, page, _ = run_main("compare", models / "parent", models / "child", "--no-deep", *FEW)
    words = " ".join(page.split())
    assert "head symmetry not made: the first fingerprint holds no circuits of heads: it comes from a plain" in words
    assert "rotary coherence not made: the first fingerprint holds no rotary coherence" in words


@pytest.mark.parametrize(
    ("other", "expected", "code"),
    [("child", "related", 0), ("child", "none", 1), ("stranger", "related", 1), ("stranger", "none", 0)],
)
def test_expect_decides_the_exit_code(other: str, expected: str, code: int, models: Path, run_main: Any) -> None:
    pair = models / "parent.fp.safetensors", models / f"{other}.fp.safetensors"
    found, stdout, stderr = run_main("compare", *pair, "--expect", expected, *FEW)
    assert found == code
    assert stdout, "the answer is printed all the same"
    assert bool(stderr) == bool(code)
    if code:
        word = {"related": "related", "none": "none_detected"}
        verdict = "related" if other == "child" else "none_detected"
        assert stderr == f"expected {word[expected]}, found {verdict}\n"
    assert run_main("compare", *pair, *FEW)[0] == 0, "whatever the verdict"


def test_what_cannot_be_shown_contradicts_both(models: Path, run_main: Any) -> None:
    pair = models / "parent.fp.safetensors", models / "child.fp.safetensors"
    for expected in ("related", "none"):
        code, _, stderr = run_main(
            "compare", *pair, "--expect", expected, "--permutations", 50, "--alpha", "1e-30", "--json"
        )
        assert code == 1
        assert stderr.endswith("found inconclusive\n")


def test_alpha_permutations_and_seed_arrive(models: Path, run_main: Any) -> None:
    pair = models / "parent.fp.safetensors", models / "stranger.fp.safetensors"

    def found(*options: object) -> dict[str, Any]:
        code, stdout, _ = run_main("compare", *pair, "--json", *options)
        assert code == 0
        parsed: dict[str, Any] = json.loads(stdout)
        return parsed

    first = found("--permutations", 500, "--seed", 3, "--alpha", 0.05)
    assert first == found("--permutations", 500, "--seed", 3, "--alpha", 0.05)
    assert first["residual"]["p_value"] != found("--permutations", 500, "--seed", 4)["residual"]["p_value"]
    assert (first["alpha"], first["residual"]["permutations"], first["heads"]["permutations"]) == (0.05, 500, 500)
    assert first["residual"]["smallest_p"] == 1 / 501
    assert found("--alpha", 0.001, "--permutations", 500)["verdict"] == "inconclusive"
    assert "residual" in found("--permutations", 500)["lost"]
    assert first["residual"] == found("--permutations", 500, "--seed", 3)["residual"], "alpha moves no p"
    default = found()
    assert (default["alpha"], default["residual"]["permutations"]) == (1e-3, 100_000)


def _timeless(printed: str) -> dict[str, Any]:
    """A comparison's JSON without what making the fingerprints took."""
    found: dict[str, Any] = json.loads(printed)
    return found | {side: {key: value for key, value in found[side].items() if key != "run"} for side in "ab"}


def test_the_library_says_what_the_command_line_says(models: Path, run_main: Any) -> None:
    stdout = run_main("compare", models / "parent", models / "child", "--json", *FEW)[1]
    a, b = models / "parent", models / "child"
    fingerprints = [llmfp.load(models / f"{name}.fp.safetensors") for name in ("parent", "child")]
    for pair in ((a, b), (str(a), models / "child.fp.safetensors"), fingerprints):
        found = llmfp.compare(*pair, permutations=9999)
        assert _timeless(json.dumps(found.to_json())) == _timeless(stdout)
    assert (found.verdict, found.basis) == ("related", "exact")
    assert found.p_value == found.decision.p_value


def test_null_adds_models(models: Path, run_main: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entries = [
        {
            "name": f"m{n}", "family": f"f{n}", "kind": "decoder", "decimals": None,
            "std": {role: rng.uniform(0.1, 0.2, 9).tolist() for role in "qkvo"},
        }
        for n in range(5)
    ]  # fmt: skip
    path = tmp_path / "null.json"
    path.write_text(json.dumps({"schema": "llmfp.null/1", "source": "", "models": entries}))
    pair = models / "parent", models / "child"
    plain, more = (
        json.loads(run_main("compare", *pair, "--json", *FEW, *options)[1])["profile"]["null"]
        for options in ((), ("--null", path))
    )
    assert more["n"] == plain["n"] + 5
    assert more["families"][-5:] == [f"f{n}" for n in range(5)]


# --- wrong usage and unreadable input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--alpha 0", "--alpha"), ("--alpha 1", "--alpha"), ("--alpha -0.5", "--alpha"), ("--alpha x", "--alpha"),
        ("--alpha nan", "alpha is nan"), ("--permutations 0", "--permutations"),
        ("--permutations 1e5", "--permutations"),
        ("--seed -1", "--seed"), ("--expect maybe", "--expect"), ("--base x", "neither A nor B is an adapter"),
        ("--null nowhere", "nowhere"), ("--tower vision", "no vision tower"), ("--tower encoder", "no encoder tower"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(options: str, words: str, models: Path, run_main: Any) -> None:
    pair = models / "parent.fp.safetensors", models / "child.fp.safetensors"
    code, stdout, stderr = run_main("compare", *pair, *options.split())
    assert (code, stdout) == (2, "")
    lines = stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert "bug in llmfp" not in stderr
    assert len(lines) <= 2


def test_one_side_missing(models: Path, run_main: Any) -> None:
    assert run_main("compare", models / "parent")[0] == 2
    code, stdout, stderr = run_main("compare", models / "parent", models / "nowhere")
    assert (code, stdout) == (2, "")
    assert "nowhere" in stderr.splitlines()[0]


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata())


def test_files_that_are_no_fingerprints(models: Path, run_main: Any, tmp_path: Path) -> None:
    good = models / "parent.fp.safetensors"
    content = good.read_bytes()
    bad = tmp_path / "bad.fp.safetensors"
    for cut in (0, 7, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:cut])
        code, stdout, stderr = run_main("compare", good, bad)
        assert (code, stdout) == (2, "")
        assert str(bad) in stderr
        assert "bug in llmfp" not in stderr
    arrays, metadata = load_file(good), metadata_of(good)
    save_file(arrays, bad, {**metadata, "llmfp.schema": "llmfp.fingerprint/0"})
    code, _, stderr = run_main("compare", bad, good)
    assert code == 2
    assert "schema 'llmfp.fingerprint/0' is not known" in stderr
    for missing in ("decoder.q.residual", "decoder.v.std"):
        save_file({name: array for name, array in arrays.items() if name != missing}, bad, metadata)
        assert run_main("compare", bad, good)[0] == 2
    for wrong, array in (
        ("decoder.coherence", arrays["decoder.coherence"][:3]),
        ("decoder.qk_norm", arrays["decoder.qk_norm"].astype(np.float32)),
        ("decoder.q.std", -arrays["decoder.q.std"]),
        ("decoder.ov_norm", np.full_like(arrays["decoder.ov_norm"], 1e200)),
    ):
        save_file({**arrays, wrong: np.ascontiguousarray(array)}, bad, metadata)
        code, _, stderr = run_main("compare", bad, good)
        assert code == 2, wrong
        assert "not a whole fingerprint" in stderr


def test_a_directory_without_fingerprints_is_no_null(models: Path, run_main: Any, tmp_path: Path) -> None:
    pair = models / "parent.fp.safetensors", models / "child.fp.safetensors"
    code, _, stderr = run_main("compare", *pair, "--null", tmp_path)
    assert code == 2
    assert "no fingerprints (*.fp.safetensors) in it" in stderr.splitlines()[0]
    (tmp_path / "null.json").write_text('{"schema": "llmfp.null/1"')
    code, _, stderr = run_main("compare", *pair, "--null", tmp_path / "null.json")
    assert code == 2
    assert "not valid JSON" in stderr.splitlines()[0]


def answer(path: Path, other: Fingerprint) -> Any:
    """What is compared, as JSON; None where the file is refused in a line."""
    try:
        found = llmfp.compare(llmfp.load(path), other, permutations=50)
    except LlmfpError as error:
        message = str(error)
        return pytest.fail(message) if "\n" in message else None
    text = json.dumps(found.to_json(), allow_nan=False)
    assert comparison_page(found)
    return json.loads(text)


HOSTILE = st.sampled_from([0.0, -0.0, -1.0, 1e-300, 1e30, 1e200, 1.7e308, np.inf, -np.inf, np.nan, 6e4, -6e4])


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_numbers_that_nobody_measured(
    data: st.DataObject, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any array of a fingerprint filled with anything: an answer with probabilities, or one line; no warning."""
    good = models / "parent.fp.safetensors"
    arrays, metadata = load_file(good), metadata_of(good)
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=4)):
        array = arrays[name]
        if array.dtype.kind != "f":
            continue
        with np.errstate(over="ignore"):
            value = np.array(data.draw(HOSTILE)).astype(array.dtype)
        layers = array[data.draw(st.sampled_from([slice(None), slice(0, 1), slice(3, 9)]))]
        layers[..., data.draw(st.sampled_from([slice(None), slice(0, 1)]))] = value
    path = tmp_path_factory.getbasetemp() / "hostile.fp.safetensors"
    save_file(arrays, path, metadata)
    found = answer(path, llmfp.load(models / "child.fp.safetensors"))
    if found is not None:
        for test in ("residual", "heads", "coherence"):
            if found[test] is not None:
                assert 0 <= found[test]["smallest_p"] <= found[test]["p_value"] <= 1
                assert math.isfinite(found[test]["z"])


def test_sizes_beyond_any_model_are_refused_before_they_cost_anything(
    models: Path, run_main: Any, tmp_path: Path
) -> None:
    """A megabyte can claim ten thousand layers, whose pairs would fill the memory."""
    good = models / "parent.fp.safetensors"
    arrays, metadata = load_file(good), metadata_of(good)
    count = 2000
    described = json.loads(metadata["llmfp"])
    described["towers"]["decoder"]["layers"] = list(range(count))
    many = {
        name: np.zeros((count, *(min(size, 4) for size in array.shape[1:])), array.dtype)
        for name, array in arrays.items()
    }
    for name in many:
        if name.endswith("count"):
            many[name][:] = 1
    bad = tmp_path / "deep.fp.safetensors"
    save_file(many, bad, {**metadata, "llmfp": json.dumps(described)})
    code, stdout, stderr = run_main("compare", bad, bad)
    assert (code, stdout) == (2, "")
    assert f"layers {count}, and no more than 512 are compared" in stderr


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [(), ("--no-deep",), ("--alpha", "0.4"), ("--permutations", "3")], ids=lambda o: " ".join(o) or "plain"
)
@pytest.mark.parametrize("other", ["parent", "child", "stranger"])
def test_the_page_fits_a_terminal(other: str, options: tuple[str, ...], models: Path, run_main: Any) -> None:
    code, stdout, stderr = run_main("compare", models / "parent", models / other, *FEW, *options)
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    assert lines[0].startswith(("related: ", "none detected: ", "inconclusive: "))


def test_the_page_says_what_the_json_says(models: Path, run_main: Any) -> None:
    pair = models / "parent.fp.safetensors", models / "stranger.fp.safetensors"
    found = json.loads(run_main("compare", *pair, "--json", *FEW)[1])
    page = run_main("compare", *pair, *FEW)[1]
    words = " ".join(page.split())
    assert "none detected: " in words
    assert "That does not show that there is none." in words
    assert f"z = {found['residual']['z']:+.1f}, p = {found['residual']['p_value']:.2g} by 9,999 permutations" in words
    assert f"r = {found['coherence']['score']:+.2f}" in words
    for caveat in (*found["caveats"], *found["missed"]):
        assert " ".join(caveat.split()) in words
    for score in ("pearson", "detrended", "wasserstein", "kl"):
        row = "".join(f"{found['profile'][score][role]:>9.3f}" for role in ROLES_AND_MEAN)
        assert row in page
    for verdict in ("independent model", "proof", "plagiar", "unrelated to"):
        assert verdict not in words.lower()


def test_layers_are_printed_as_runs() -> None:
    assert ranges([(n, n) for n in range(8)]) == "0-7 with 0-7"
    assert ranges([(0, 0), (1, 1), (3, 2), (4, 3), (9, 9)]) == "0-1 with 0-1, 3-4 with 2-3, 9 with 9"
    assert ranges([]) == ""


NAMES = ["\x1b[31mred\x1b[0m", "line\nbreak", "‮evil", "a" * 300, "tab\tand\rreturn", "字" * 60, "\x00", "</script>"]


@pytest.mark.parametrize("name", NAMES)
def test_names_from_strangers_drive_no_terminal(name: str, models: Path) -> None:
    a, b = (llmfp.load(models / f"{each}.fp.safetensors") for each in ("parent", "stranger"))
    hostile = replace(
        b, source={**b.source, "name": name}, architecture=name, caveats=(f"tensor {name} is odd",),
    )  # fmt: skip
    found = llmfp.compare(a, hostile, permutations=99)
    page = comparison_page(found)
    assert all(c.isprintable() or c == "\n" for c in page)
    assert max(map(len, page.splitlines())) <= 80
    assert json.loads(json.dumps(found.to_json()))["b"]["name"] == name
    plain = comparison_page(llmfp.compare(a, b, permutations=99))
    assert page.count("\n") >= plain.count("\n")
    assert len([line for line in page.splitlines() if re.match(r"(related|none detected|inconclusive):", line)]) == 1


def test_statistics_are_callable_by_themselves(models: Path) -> None:
    a, b = (llmfp.load(models / f"{each}.fp.safetensors").main for each in ("parent", "child"))
    whole = llmfp.compare(models / "parent.fp.safetensors", models / "child.fp.safetensors", permutations=999)
    assert comparison.profile(a.std, b.std) == whole.profile
    assert comparison.rotary_coherence(a, b) == whole.coherence
    assert comparison.residual_symmetry(a, b, permutations=999) == whole.residual
    assert comparison.head_symmetry(a, b, permutations=999) == whole.heads
