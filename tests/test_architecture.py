"""Names and shapes say which bytes are whose Q, K, V and O: every role's σ, every head's σ and the profile along the
residual stream equal a plain computation on the matrices the checkpoint was made from, in each family's true layout.

A family without a row in `tests.checkpoints.LAYOUTS` fails here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from numpy.typing import NDArray

import llmfp
from llmfp import fingerprint as fingerprints
from llmfp.architecture import AttentionMap, Tower, match
from llmfp.architecture.families import families
from llmfp.checkpoint import Checkpoint, Shard, TensorSpec, open_checkpoint
from llmfp.errors import ArchitectureError
from llmfp.kernels import Backend
from llmfp.report.terminal import fingerprint_table
from tests.checkpoints import BACKEND, LAYOUTS, VISION_LAYOUTS, Model, Stored, as_bf16, bf16, build, write_model
from tests.quantised import plan_of

PROFILE_TOLERANCE = 2.0**-8
"""Profiles are float16 logarithms of magnitude below 4: half a step is 2^-10, the sum of squares adds some."""
ROLES = ("q", "k", "v", "o")
SHOWN = (*ROLES, "q_a", "q_b", "kv_a", "kv_b", "kv", "o_a", "o_b")
CENTRED = {family for family, layouts in LAYOUTS.items() if layouts[0].norm == "layer"}


def scan(source: Path) -> llmfp.Fingerprint:
    return llmfp.scan(source, backend=BACKEND)


def main_of(attention: AttentionMap) -> Tower:
    """The tower that a fingerprint shows at its top level."""
    towers = {tower.name: tower for tower in attention.towers}
    return towers[fingerprints.main_tower(towers)]


def check_numbers(fingerprint: llmfp.Fingerprint, model: Model, *, heads: bool = True) -> None:
    """Every statistic of every projection, bias and gain against NumPy on the matrix that was drawn for it."""
    layers = {layer for _, layer, _ in model.weights}
    assert set(fingerprint.towers) == {tower for tower, _, _ in model.weights}
    for (tower, layer, role), weights in model.weights.items():
        found = fingerprint.towers[tower]
        where = f"{tower} {layer} {role}"
        assert found.layers == tuple(sorted(layers))
        numbers = {"std": found.std[role], "mean": found.mean[role]} if role in ROLES else found.roles[role]
        np.testing.assert_allclose(numbers["std"][layer], weights.std(), rtol=1e-6, err_msg=where)
        np.testing.assert_allclose(numbers["mean"][layer], weights.mean(), rtol=1e-5, err_msg=where)
        expected = model.profiles.get((tower, layer, role), np.empty(0))
        profile = found.residual(role)[layer]
        np.testing.assert_allclose(profile, expected, rtol=0, atol=PROFILE_TOLERANCE, err_msg=where)
        size = model.head_sizes.get((tower, layer, role))
        if heads and size is not None:
            rows = weights if role != "o" else weights.T
            by_head = rows.reshape(-1, size * rows.shape[1]).std(axis=1)
            np.testing.assert_allclose(found.head_std(role)[layer], by_head, rtol=1e-6, err_msg=where)
        else:
            assert found.head_std(role).size == 0
    for (tower, layer, role), vector in model.vectors.items():
        numbers = fingerprint.towers[tower].roles[role]
        np.testing.assert_allclose(numbers["std"][layer], vector.std(), rtol=1e-6, err_msg=f"{tower} {layer} {role}")
        np.testing.assert_allclose(numbers["mean"][layer], vector.mean(), rtol=1e-5, err_msg=f"{tower} {layer} {role}")
    for name, found in fingerprint.towers.items():
        roles = {role for tower, _, role in (*model.weights, *model.vectors) if tower == name}
        assert set(found.roles) == roles - set(ROLES)


# --- one golden checkpoint per family --------------------------------------------------------------------------------


def test_every_family_has_a_golden_layout() -> None:
    """GGUF's are in test_gguf.py."""
    golden = {layouts[0].family for layouts in (*LAYOUTS.values(), *VISION_LAYOUTS.values())}
    assert golden == {family for family in families() if not family.startswith("gguf")}


def test_no_two_families_claim_one_model_type() -> None:
    """Else the alphabet would decide how a model is read. A vision tower goes by its language model's name."""
    claimed = [("vision" in f.towers, model_type) for f in families().values() for model_type in f.model_types]
    assert len(claimed) == len(set(claimed))


@pytest.mark.parametrize("case", VISION_LAYOUTS)
def test_a_vision_tower_is_read_only_when_asked_for(case: str, tmp_path: Path) -> None:
    language, vision = build("llama"), build(case, VISION_LAYOUTS[case], layers=3, heads=4, head_dim=10, seed=1)
    config = {**(language.config or {}), "vision_config": vision.config}
    folder = write_model(tmp_path, {**language.tensors, **vision.tensors}, config)
    plain = scan(folder)
    assert set(plain.towers) == {"decoder"}
    check_numbers(plain, language, heads=True)
    read = llmfp.scan(folder, tower="vision", backend=BACKEND)
    assert read.architecture == VISION_LAYOUTS[case][0].family
    assert set(read.towers) == {"vision"}
    assert (read.main.heads, read.main.layers, read.main.hidden_size) == (4, (0, 1, 2), 40)
    check_numbers(read, vision, heads=True)


def test_one_tower_of_several_may_be_asked_for(tmp_path: Path) -> None:
    model = build("t5")
    folder = model.write(tmp_path)
    whole, alone = scan(folder), llmfp.scan(folder, tower="encoder", backend=BACKEND)
    assert set(whole.towers) == {"decoder", "encoder", "cross"}
    assert alone.towers == {"encoder": whole.towers["encoder"]}
    assert alone.run["bytes_read"] < whole.run["bytes_read"]


def test_a_tower_that_is_not_there_is_an_error_that_says_what_is(tmp_path: Path) -> None:
    folder = build("llama").write(tmp_path)
    with pytest.raises(ArchitectureError, match=r"no encoder tower recognised; it has: decoder"):
        llmfp.scan(folder, tower="encoder")
    with pytest.raises(ArchitectureError, match=r"no vision tower recognised$"):
        llmfp.scan(folder, tower="vision")


@pytest.mark.parametrize(
    ("listing", "block", "layers"),
    [
        ("medgemma-27b-it", "vision_tower.vision_model.encoder.layers.", 27),
        ("DeepSeek-OCR2-query-ablation", "model.sam_model.blocks.", 12),
    ],
)
def test_real_vision_towers_are_found(listing: str, block: str, layers: int, shared_data: Path) -> None:
    names = json.loads((shared_data / "tensor_names" / f"{listing}.json").read_text())["names"]
    shapes = {"attn.qkv.weight": (24, 8), "attn.qkv.bias": (24,)}
    (tower,) = match(checkpoint_of(names, shapes), "vision").towers
    assert tower.layers == tuple(range(layers))
    assert all(p.view.tensor.name.startswith(block) for p in tower.projections)


SHAPES = {
    "grouped": {"heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 24},
    "one kv head": {"heads": 6, "kv_heads": 1, "head_dim": 4, "hidden": 40},
    "as many kv heads": {"heads": 3, "kv_heads": 3, "head_dim": 16, "hidden": 36},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_family_is_read_as_it_is_laid_out(case: str, shape: str, tmp_path: Path) -> None:
    model = build(case, layers=3, **SHAPES[shape])
    fingerprint = scan(model.write(tmp_path))
    assert fingerprint.architecture == LAYOUTS[case][0].family
    main = fingerprint.main
    assert (main.layers, main.hidden_size) == ((0, 1, 2), model.hidden)
    if model.config is not None:
        assert (main.heads, main.kv_heads, main.head_dim) == (model.heads, model.kv_heads, model.head_dim)
    check_numbers(fingerprint, model, heads=model.config is not None)
    expected = []
    if LAYOUTS[case][0].factors:
        expected = ["latent attention in the decoder: no plain k or v exists, the factors are under roles"]
    if LAYOUTS[case][0].gated:
        expected = ["half of every decoder query tensor is a gate, which is not read"]
    assert model.config is None or list(fingerprint.caveats) == expected


@pytest.mark.parametrize("case", LAYOUTS)
def test_nothing_but_attention_and_what_is_next_to_it_is_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not read is said, with a reason; what is read and what is skipped make up the whole checkpoint. The
    bytes that are counted are those that the system handed over."""
    model = build(case)
    checkpoint = open_checkpoint(model.write(tmp_path))
    attention = match(checkpoint)
    views = [projection.view for tower in attention.towers for projection in tower.projections]
    vectors = {vector.view.tensor for tower in attention.towers for vector in tower.vectors}
    read = {view.tensor.name for view in views} | {tensor.name for tensor in vectors}
    assert set(attention.skipped) == set(checkpoint.tensors) - read
    assert all(attention.skipped.values())
    assert sum(view.nbytes for view in views) == 4 * sum(weights.size for weights in model.weights.values())
    assert sum(tensor.nbytes for tensor in vectors) == 4 * sum(vector.size for vector in model.vectors.values())
    got: list[int] = []
    preadv = os.preadv

    def counted(*arguments: Any) -> int:
        got.append(preadv(*arguments))
        return got[-1]

    monkeypatch.setattr(os, "preadv", counted)
    run = llmfp.scan(tmp_path, backend=BACKEND, reader="pread").run
    assert run["bytes_read"] == sum(got) + sum(shard.header_bytes for shard in checkpoint.shards)
    nbytes = sum(view.nbytes for view in views) + sum(tensor.nbytes for tensor in vectors)
    assert sum(got) == nbytes + run["second_read_bytes"]
    planned = plan_of(tmp_path)
    promised = [(read["tower"], read["layer"], role) for read in planned["reads"] for role in read["roles"]]
    assert sorted(promised) == sorted(model.weights)
    assert planned["bytes_read"] == run["bytes_read"]
    assert sum(each["count"] for each in planned["skipped"]) == len(attention.skipped)


INDISTINCT = {
    "gemma": "llama", "cohere": "llama", "olmo": "llama", "openai_gpt": "gpt2", "bart": "mbart", "falcon, 7B": "bloom",
    "opt, 350m": "opt", "molmo, norm behind attention": "molmo", "glm": "llama", "ernie4_5": "llama",
    "llama4": "llama", "nemotron": "starcoder2",
}  # fmt: skip
"""Cases that differ from that family in their norms or rotary pairs only, and no name shows it."""


@pytest.mark.parametrize("case", LAYOUTS)
def test_names_alone_tell_families_and_sizes_apart(case: str, tmp_path: Path) -> None:
    """Without config.json: the same family by its witnesses, the same σ; head counts are lost, and a caveat says so.
    Where heads are interleaved, no σ either: every head count would fit, and one is right."""
    model = build(case)
    folder = model.write(tmp_path, config=False)
    if LAYOUTS[case][0].interleaved:
        with pytest.raises(
            ArchitectureError, match=r"model\.safetensors: tensor '.*(config\.json is missing|not split)"
        ):
            scan(folder)
        return
    fingerprint = scan(folder)
    assert fingerprint.architecture == INDISTINCT.get(case, LAYOUTS[case][0].family)
    for (tower, layer, role), weights in model.weights.items():
        kept = fingerprint.towers[tower].statistics[role][layer]
        assert kept is not None
        np.testing.assert_allclose(kept.std, weights.std(), rtol=1e-6)
    assert any("config.json is missing" in caveat and "head" in caveat for caveat in fingerprint.caveats)
    latent = bool(LAYOUTS[case][0].factors)
    assert fingerprint.main.heads == (model.heads if latent else None)
    if case not in INDISTINCT:
        check_numbers(fingerprint, model, heads=latent)


@pytest.mark.parametrize("case", LAYOUTS)
def test_an_unknown_model_type_is_read_by_its_names_with_a_caveat(case: str, tmp_path: Path) -> None:
    model = build(case)
    folder = write_model(tmp_path, model.tensors, {"model_type": "brand_new", "num_attention_heads": model.heads})
    if case.startswith("gpt_bigcode"):  # GPT-2's names on transposed tensors
        with pytest.raises(ArchitectureError, match="does not split"):
            scan(folder)
        return
    fingerprint = scan(folder)
    assert any("'brand_new'" in caveat and fingerprint.architecture in caveat for caveat in fingerprint.caveats)
    assert fingerprint.main.heads == model.heads


# --- norms, towers, fused tensors: what the golden checkpoints are too small or too plain to show -------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "cohere", "gemma2"])
def test_profiles_hold_over_many_units_and_rounded_storage(family: str, tmp_path: Path) -> None:
    """Matrices of several units of reduction, in BF16: merging must not lose the LayerNorm's centring."""
    model = build(family, layers=1, heads=16, kv_heads=4, head_dim=72, hidden=1100)
    rounded = {name: as_bf16(bf16(tensor)) for name, tensor in model.tensors.items() if isinstance(tensor, np.ndarray)}
    main = scan(write_model(tmp_path, rounded, model.config)).main
    for role in "qkvo":
        key = main_tower(family), 0, role
        np.testing.assert_allclose(main.std[role][0], model.weights[key].std(), rtol=1e-2)
        np.testing.assert_allclose(main.residual(role)[0], model.profiles[key], rtol=0, atol=2e-2)


def main_tower(family: str) -> str:
    towers = [layout.tower for layout in LAYOUTS[family]]
    return "decoder" if "decoder" in towers else towers[0]


def test_t5_has_three_towers_and_the_decoder_on_top(tmp_path: Path) -> None:
    model = build("t5")
    fingerprint = scan(model.write(tmp_path))
    assert set(fingerprint.towers) == {"encoder", "decoder", "cross"}
    assert fingerprint.main is fingerprint.towers["decoder"]
    assert fingerprint.to_json()["std"] == fingerprint.to_json()["towers"]["decoder"]["std"]


def test_an_encoder_alone_is_the_top_level(tmp_path: Path) -> None:
    model = build("t5")
    tensors = {name: tensor for name, tensor in model.tensors.items() if not name.startswith("decoder")}
    fingerprint = scan(write_model(tmp_path, tensors, model.config))
    assert set(fingerprint.towers) == {"encoder"}
    assert fingerprint.main.std["q"][0] == pytest.approx(model.weights["encoder", 0, "q"].std(), rel=1e-6)


@pytest.mark.parametrize("family", sorted(CENTRED | {"llama", "gemma", "olmo2"}))
def test_layer_norm_flags_follow_the_norm(family: str, tmp_path: Path) -> None:
    """A LayerNorm hides the mean of the stream from what reads it; behind a post-norm only the write loses its mean."""
    layout = LAYOUTS[family][0]
    for projection in main_of(match(open_checkpoint(build(family).write(tmp_path)))).projections:
        reads = projection.role != "o"
        assert projection.centred == (layout.norm == "layer" and not (layout.post and reads))
        assert (projection.gain is not None) == bool(layout.before if reads else layout.after)
        assert projection.gain is None or projection.gain.offset == layout.offset


def test_a_fused_tensor_without_its_output_projection_is_refused(tmp_path: Path) -> None:
    """O tells how many rows are queries; thirds would be a guess, and wrong for grouped heads."""
    model = build("phi3")
    del model.tensors["model.layers.1.self_attn.o_proj.weight"]
    with pytest.raises(ArchitectureError, match=r"layers\.1\.self_attn\.qkv_proj.*output projection"):
        scan(model.write(tmp_path))


@pytest.mark.parametrize("outputs", [32, 33, 31, 8])
def test_a_fused_tensor_that_does_not_split_is_refused(outputs: int, tmp_path: Path) -> None:
    model = build("phi3")
    model.tensors["model.layers.0.self_attn.qkv_proj.weight"] = np.ones((outputs, 24), np.float32)
    with pytest.raises(ArchitectureError, match=r"layers\.0\.self_attn\.qkv_proj.*does not split"):
        scan(model.write(tmp_path))


def refused(case: str, tmp_path: Path, name: str, shape: tuple[int, ...] | None = None, **config: Any) -> str:
    """The one line with which a model is refused whose first layer's tensor has that shape, or that config.json."""
    model = build(case)
    assert model.config is not None
    full = next(each for each in model.tensors if each.endswith(name))
    if shape is not None:
        model.tensors[full] = np.ones(shape, np.float32)
    stated = {key: value for key, value in {**model.config, **config}.items() if value is not None}
    with pytest.raises(ArchitectureError) as caught:
        scan(write_model(tmp_path, model.tensors, stated))
    assert full in str(caught.value)
    return str(caught.value)


def test_interleaved_heads_are_never_split_by_a_guess(tmp_path: Path) -> None:
    """Any number of heads fits a tensor's shape: one that config.json does not state, or that cannot be, is refused."""
    fused = "query_key_value.weight"
    said = refused("gpt_neox", tmp_path / "0", fused, num_attention_heads=None)
    assert "config.json does not say how many heads" in said
    assert "5 that config.json states do not make up its 32 query outputs" in refused(
        "gpt_neox", tmp_path / "1", fused, num_attention_heads=5
    )
    assert "4 of 16 that config.json states" in refused("gpt_neox", tmp_path / "2", fused, head_dim=16)
    assert "4 query heads of 8" in refused("falcon", tmp_path / "3", fused, (32 + 2 * 12, 24))
    assert "4 query heads of 8" in refused("falcon", tmp_path / "4", fused, (32 + 2 * 24, 24))
    assert "4 equal shards" in refused("codegen", tmp_path / "5", "qkv_proj.weight", (32 + 2 * 30, 32))
    assert "5 that config.json states" in refused("qwen3_next", tmp_path / "6", "q_proj.weight", num_attention_heads=5,
        head_dim=None)  # fmt: skip


def test_kv_heads_that_config_denies_are_those_of_the_shapes(tmp_path: Path) -> None:
    """Falcon-7B's config.json counts 71 kv heads, where multi-query attention has one."""
    model = build("falcon, 7B")
    fingerprint = scan(write_model(tmp_path, model.tensors, {**(model.config or {}), "num_kv_heads": 4}))
    assert fingerprint.caveats == ("config.json says 4 kv heads, the shapes say 1; the shapes are used",)
    check_numbers(fingerprint, model)


def test_queries_without_a_gate_are_read_whole_whatever_the_family(tmp_path: Path) -> None:
    model, plain = build("qwen3_next"), build("llama")
    model.tensors |= {name: tensor for name, tensor in plain.tensors.items() if name.endswith("q_proj.weight")}
    fingerprint = scan(model.write(tmp_path))
    assert fingerprint.architecture == "qwen3_next"
    assert fingerprint.std["q"] == scan(plain.write(tmp_path / "plain")).std["q"]
    assert not [caveat for caveat in fingerprint.caveats if "gate" in caveat]


def test_latent_factors_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """Shapes alone tell the number of heads; factors for which they do not are of another layout."""
    assert "reads 11 inputs" in refused("deepseek", tmp_path / "0", "q_b_proj.weight", (48, 11))
    assert "does not fit" in refused("deepseek", tmp_path / "1", "kv_b_proj.weight", (51, 14))
    model = build("deepseek")
    assert model.config is not None
    fingerprint = scan(write_model(tmp_path / "2", model.tensors, {**model.config, "num_attention_heads": 7}))
    assert fingerprint.main.heads == 4
    assert any("says 7 heads, the shapes say 4" in caveat for caveat in fingerprint.caveats)


def test_output_projections_alone_are_no_attention(tmp_path: Path) -> None:
    """SantaCoder's first files had q_attn and kv_attn in place of c_attn: not known, so not half read."""
    model = build("gpt2")
    for layer in (0, 1):
        del model.tensors[f"transformer.h.{layer}.attn.c_attn.weight"]
    with pytest.raises(ArchitectureError, match=r"c_proj\.weight.*no layer's query projection"):
        scan(model.write(tmp_path))


def test_adapters_that_add_to_a_projection_are_said(tmp_path: Path) -> None:
    model = build("zamba")
    model.tensors["model.layers.1.shared_transformer.self_attn.linear_q_adapter_list.1.0.weight"] = np.ones((4, 48))
    assert "adapters add to q, k and v of 1 decoder layers; they are not read" in scan(model.write(tmp_path)).caveats


def test_layers_of_other_sizes_have_no_head_statistics_of_the_wrong_size(tmp_path: Path) -> None:
    """Gemma-4's full-attention layers have larger heads and no values of their own; some layers share keys too."""
    small, large = build("gemma4", layers=3), build("gemma4", layers=3, head_dim=16)
    block = "model.language_model.layers.1.self_attn"
    for role in ROLES:
        small.tensors[f"{block}.{role}_proj.weight"] = large.tensors[f"{block}.{role}_proj.weight"]
    del small.tensors[f"{block}.v_proj.weight"]
    for role in "kv":
        del small.tensors[f"model.language_model.layers.2.self_attn.{role}_proj.weight"]
    fingerprint = scan(small.write(tmp_path))
    assert np.isnan(fingerprint.main.head_std("q")[1]).all()
    assert not np.isnan(fingerprint.main.head_std("q")[[0, 2]]).any()
    assert fingerprint.std["k"][1] == pytest.approx(large.weights["decoder", 1, "k"].std(), rel=1e-6)
    assert [value is None for value in fingerprint.std["v"]] == [False, True, True]
    said = ("1 of 3 decoder layers have no k projection", "2 of 3 decoder layers have no v projection")
    assert fingerprint.caveats == said


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox"])
def test_a_bias_that_does_not_fit_or_is_not_finite_is_said(case: str, tmp_path: Path) -> None:
    model = build(case, layers=2)
    first, second = [name for name in model.tensors if name.endswith(("q_proj.bias", "attn.bias", "value.bias"))]
    model.tensors[first] = np.ones(7, np.float32)
    broken = np.array(model.tensors[second])
    broken[0] = np.nan
    model.tensors[second] = broken
    fingerprint = scan(model.write(tmp_path))
    assert fingerprint.main.roles["q_bias"]["std"] == [None, None]
    assert any(first in caveat and "does not fit" in caveat for caveat in fingerprint.caveats)
    assert "q_bias of layer 1 holds 1 non-finite values; its std is null" in fingerprint.caveats
    assert None not in fingerprint.std["q"]
    model.tensors[second] = np.where(np.arange(broken.size) % 2, 1e300, -1e300)
    fingerprint = scan(model.write(tmp_path))
    assert "q_bias of layer 1 holds too large values; its std is null" in fingerprint.caveats


@pytest.mark.parametrize("case", ["deepseek", "deepseek, V2-Lite", "deepseek_v4"])
def test_latent_factors_fit_the_terminal(case: str, tmp_path: Path) -> None:
    """Beside O, in place of K and V that do not exist."""
    table = fingerprint_table(scan(build(case).write(tmp_path))).splitlines()
    assert table[2].split()[2::2] == [role.upper() for role in SHOWN if role in LAYOUTS[case][0].factors]
    assert max(map(len, table[:5])) <= 80
    assert "None" not in table[0]


@pytest.mark.parametrize("case", ["llama", "deepseek", "deepseek_v4", "bloom", "mbart"])
def test_roles_survive_the_file(case: str, tmp_path: Path) -> None:
    fingerprint = scan(build(case).write(tmp_path / "model"))
    fingerprint.save(tmp_path / "kept.fp.safetensors")
    loaded = llmfp.load(tmp_path / "kept.fp.safetensors")
    assert loaded.to_json() == fingerprint.to_json()
    assert loaded.towers == fingerprint.towers
    assert loaded.to_json()["roles"]


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "t5"])
def test_a_query_fused_with_its_gate_is_no_query(family: str, tmp_path: Path) -> None:
    """Qwen3-Next stores [q; gate] per head under Llama's names: twice the outputs that O reads."""
    model = build(family)
    name = next(name for name in model.tensors if name.endswith((".q_proj.weight", "SelfAttention.q.weight")))
    query = model.tensors[name]
    assert isinstance(query, np.ndarray)
    model.tensors[name] = np.concatenate([query, query])
    with pytest.raises(ArchitectureError, match=name.replace(".", r"\.")):
        scan(model.write(tmp_path))


def test_values_may_be_smaller_than_keys(tmp_path: Path) -> None:
    """A value head of another size than a key head is a layout like any other."""
    rng = np.random.default_rng(0)
    shapes = {"q": (4 * 12, 24), "k": (2 * 12, 24), "v": (2 * 8, 24), "o": (24, 4 * 8)}
    drawn = {role: rng.normal(size=shape).astype(np.float32) for role, shape in shapes.items()}
    tensors = {f"model.layers.0.self_attn.{role}_proj.weight": weights for role, weights in drawn.items()}
    main = scan(write_model(tmp_path, tensors, {"model_type": "llama", "num_attention_heads": 4})).main
    assert main.std["v"][0] == pytest.approx(float(drawn["v"].astype(np.float64).std()), rel=1e-6)


# --- what config.json says, and what the shapes say ------------------------------------------------------------------


def caveats(config: Mapping[str, Any], tmp_path: Path, **shape: int) -> tuple[llmfp.Fingerprint, str]:
    model = build("llama", **shape)
    fingerprint = scan(write_model(tmp_path, model.tensors, {"model_type": "llama", **config}))
    for role in "qkvo":
        assert fingerprint.std[role][0] == pytest.approx(model.weights["decoder", 0, role].std(), rel=1e-6)
    return fingerprint, "\n".join(fingerprint.caveats)


def test_shapes_win_over_a_config_that_contradicts_them(tmp_path: Path) -> None:
    stated = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "num_hidden_layers": 1}
    fingerprint, said = caveats(stated, tmp_path)
    assert (fingerprint.main.heads, fingerprint.main.kv_heads, fingerprint.main.head_dim) == (4, 2, 8)
    assert fingerprint.layers == (0, 1)
    for words in ("says 4 kv heads, the shapes say 2", "says head_dim 16, the shapes say 8", "says 1 layers, 2 are"):
        assert words in said


def test_heads_that_do_not_divide_the_queries_are_not_believed(tmp_path: Path) -> None:
    fingerprint, said = caveats({"num_attention_heads": 5}, tmp_path)
    assert fingerprint.main.heads is None
    assert "says 5 heads, which do not divide the 32 query outputs" in said


def test_head_dim_alone_gives_the_heads(tmp_path: Path) -> None:
    fingerprint, said = caveats({"head_dim": 8}, tmp_path)
    assert (fingerprint.main.heads, fingerprint.main.kv_heads) == (4, 2)
    assert said == ""


@pytest.mark.parametrize("value", ["4", 4.0, None, [4], {"n": 4}, True, 0, -4])
def test_a_config_of_the_wrong_type_is_ignored(value: Any, tmp_path: Path) -> None:
    config = {"num_attention_heads": value, "num_key_value_heads": value, "head_dim": value, "num_hidden_layers": value}
    fingerprint, _ = caveats({**config, "text_config": value, "vision_config": value}, tmp_path)
    assert fingerprint.main.heads is None


def test_the_text_config_of_a_composite_model_is_used(tmp_path: Path) -> None:
    nested = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    fingerprint, said = caveats({"model_type": "llava", "text_config": nested, "num_attention_heads": 99}, tmp_path)
    assert fingerprint.main.heads == 4
    assert said == ""


def test_mistrals_own_params_serve_as_config(tmp_path: Path) -> None:
    model = build("mistral")
    folder = write_model(tmp_path, model.tensors)
    (folder / "params.json").write_text(json.dumps({"n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "dim": 24}))
    fingerprint = scan(folder)
    assert (fingerprint.main.heads, fingerprint.main.kv_heads) == (4, 2)
    assert fingerprint.caveats == ()


# --- which layers, which tower, which names -------------------------------------------------------------------------


def renamed(model: Model, old: str, new: str) -> dict[str, Any]:
    """The model's tensors with a part of their names replaced."""
    return {name.replace(old, new): tensor for name, tensor in model.tensors.items()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.", "module.model."),
        ("model.", "_orig_mod.model."),
        ("model.", "module._orig_mod.model."),
        ("model.layers.", "model._orig_mod.layers."),
        ("self_attn.", "_orig_mod.self_attn."),
        ("model.layers.", "layers."),
        ("model.layers.", "language_model.model.layers."),
        ("model.layers.", "model.language_model.layers."),
    ],
)
def test_wrappers_change_names_and_nothing_else(old: str, new: str, tmp_path: Path) -> None:
    model = build("llama")
    plain = scan(model.write(tmp_path / "plain"))
    wrapped = scan(write_model(tmp_path / "wrapped", renamed(model, old, new), model.config))
    assert (wrapped.digest, wrapped.caveats) == (plain.digest, plain.caveats)


@pytest.mark.parametrize(
    "prefix",
    [
        "vision_tower.vision_model.encoder.layers.{}",
        "visual.blocks.{}",
        "model.vision_model.layers.{}",
        "model.qwen2_model.model.model.layers.{}",
        "mtp.layers.{}",
        "model.mtp_layers.{}",
        "xmodel.layers.{}",
        "model.layers.{}.x",
        "model.layers.x{}",
        "model.layers.{}" + "9" * 5000,
        "model.layers.{}\u0664",
    ],
)
def test_what_only_ends_like_the_decoder_is_not_taken_for_it(prefix: str, tmp_path: Path) -> None:
    """Vision towers and prediction heads have self_attn.q_proj too: more layers of it, and larger."""
    model = build("llama")
    alone = scan(model.write(tmp_path / "alone"))
    others = {f"{prefix.format(n)}.self_attn.{r}_proj.weight": np.ones((64, 64)) for n in range(9) for r in "qkvo"}
    both = scan(write_model(tmp_path / "both", {**others, **model.tensors}, model.config))
    assert (both.digest, both.layers) == (alone.digest, alone.layers)


@pytest.mark.parametrize(("more", "fewer"), [("model", "language_model.model"), ("language_model.model", "model")])
def test_of_two_stacks_the_larger_is_the_decoder(more: str, fewer: str, tmp_path: Path) -> None:
    model, smaller = build("llama", layers=3), build("llama", seed=1)
    tensors = renamed(model, "model.", f"{more}.") | renamed(smaller, "model.", f"{fewer}.")
    fingerprint = scan(write_model(tmp_path, tensors, model.config))
    check_numbers(fingerprint, model)


@pytest.mark.parametrize("said_by", ["a tensor", "config.json"])
@pytest.mark.parametrize("case", ["llama", "deepseek"])
def test_a_prediction_layer_behind_the_decoder_is_left_out(case: str, said_by: str, tmp_path: Path) -> None:
    """GLM-4-MoE and DeepSeek-V3 store the multi-token prediction layer as number num_hidden_layers, with an eh_proj."""
    model, longer = build(case), build(case, layers=3)
    assert model.config is not None
    alone = scan(model.write(tmp_path / "alone"))
    config = dict(model.config)
    if said_by == "a tensor":
        longer.tensors["model.layers.2.eh_proj.weight"] = np.ones((24, 48), np.float32)
    else:
        config["num_nextn_predict_layers"] = 1
    both = scan(write_model(tmp_path / "both", longer.tensors, config))
    assert (both.digest, both.layers, both.caveats) == (alone.digest, (0, 1), alone.caveats)
    reasons = {
        str(each["pattern"]): str(each["reason"]) for each in both.skipped if "prediction" in str(each["reason"])
    }
    assert "model.layers.{n}.self_attn.o_proj.weight" in reasons


def test_linear_attention_under_attentions_names_is_left_out(tmp_path: Path) -> None:
    """Kimi-Linear's KDA layers have q, k, v and o_proj too, most of its layers are such; only siblings tell."""
    model = build("deepseek, V2-Lite", layers=1)
    alone = scan(model.write(tmp_path / "alone"))
    for layer in (1, 2, 3):
        block = f"model.layers.{layer}"
        for role in ROLES:
            model.tensors[f"{block}.self_attn.{role}_proj.weight"] = np.ones((24, 24), np.float32)
        model.tensors[f"{block}.input_layernorm.weight"] = np.ones(24, np.float32)
        model.tensors[f"{block}.self_attn.A_log"] = np.ones((1, 1, 4, 1), np.float32)
    for number, config in enumerate(({"model_type": "kimi_linear"}, None)):
        both = scan(write_model(tmp_path / str(number), model.tensors, config))
        assert (both.architecture, both.digest, both.layers) == ("deepseek", alone.digest, (0,))
        reasons = {str(each["pattern"]): str(each["reason"]) for each in both.skipped}
        assert reasons["model.layers.{n}.self_attn.k_proj.weight"] == "linear attention"


def test_linear_attention_under_its_own_names_is_skipped_as_such(tmp_path: Path) -> None:
    fingerprint = scan(build("qwen3_next").write(tmp_path))
    reasons = {str(each["pattern"]): str(each["reason"]) for each in fingerprint.skipped}
    assert reasons["model.layers.{n}.linear_attn.in_proj_qkvz.weight"] == "linear attention"
    assert fingerprint.layers == (0, 1)


def test_cross_attention_and_other_towers_are_not_the_decoders(tmp_path: Path) -> None:
    """Whisper's and BART's decoder layers hold self and cross attention side by side, under the same last names."""
    fingerprint = scan(build("mbart").write(tmp_path))
    names = projection_names(match(open_checkpoint(tmp_path)), "decoder")
    assert names == {
        f"model.decoder.layers.{layer}.self_attn.{role}_proj.weight"
        for layer in (0, 1)
        for role in ("q", "k", "v", "out")
    }
    assert set(fingerprint.towers) == {"encoder", "decoder", "cross"}


def test_experts_are_never_read(tmp_path: Path) -> None:
    model = build("llama")
    alone = scan(model.write(tmp_path / "alone"))
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": Stored("I8", (4, 4), bytes(16))
        for layer in range(2)
        for expert in range(8)
        for part in ("gate", "up", "down")
    }
    both = scan(write_model(tmp_path / "both", {**model.tensors, **experts}, model.config))
    assert both.digest == alone.digest
    grouped = {str(each["pattern"]): each for each in both.skipped if "experts" in str(each["pattern"])}
    assert len(grouped) == 3
    for each in grouped.values():
        assert (each["count"], each["bytes"], each["reason"]) == (16, 256, "expert weights, never read")


def test_hybrid_layers_without_attention_are_not_layers(tmp_path: Path) -> None:
    """Nemotron-H has attention in some layers only; the others have a norm of the same name."""
    model = build("nemotron_h", layers=4)
    for name in list(model.tensors):
        if name.startswith(("backbone.layers.0.mixer", "backbone.layers.2.mixer")):
            del model.tensors[name]
    fingerprint = scan(model.write(tmp_path))
    assert fingerprint.layers == (1, 3)
    assert fingerprint.std["q"][1] == pytest.approx(model.weights["decoder", 3, "q"].std(), rel=1e-6)
    assert fingerprint.caveats == ()


def test_a_layer_that_lacks_a_role_has_null_there_and_a_caveat(tmp_path: Path) -> None:
    model = build("llama", layers=3)
    del model.tensors["model.layers.1.self_attn.v_proj.weight"]
    fingerprint = scan(model.write(tmp_path))
    assert fingerprint.std["v"][1] is None
    assert None not in fingerprint.std["q"]
    assert "1 of 3 decoder layers have no v projection" in fingerprint.caveats


@pytest.mark.parametrize("twin", ["module.model.layers.1", "model.layers.01", "model.layers._orig_mod.1"])
def test_two_tensors_in_one_place_are_refused(twin: str, tmp_path: Path) -> None:
    """Which of the two the model would load cannot be known."""
    model = build("llama")
    model.tensors[f"{twin}.self_attn.k_proj.weight"] = model.tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ArchitectureError, match=r"model\.safetensors.*both the k of decoder layer 1"):
        scan(model.write(tmp_path))


def test_a_gain_that_does_not_fit_is_taken_as_one_with_a_caveat(tmp_path: Path) -> None:
    model = build("llama", layers=1)
    fitting = dict(model.tensors)
    model.tensors["model.layers.0.input_layernorm.weight"] = np.ones(7, np.float32)
    fingerprint = scan(model.write(tmp_path / "unfit"))
    assert any("input_layernorm" in caveat and "taken as 1" in caveat for caveat in fingerprint.caveats)
    fitting["model.layers.0.input_layernorm.weight"] = np.ones(24, np.float32)
    ones = scan(write_model(tmp_path / "ones", fitting, model.config))
    np.testing.assert_array_equal(fingerprint.main.residual("q"), ones.main.residual("q"))


def test_eight_bit_floats_without_scales_are_plain_numbers(tmp_path: Path) -> None:
    model = build("llama", layers=1)
    codes = np.tile(np.array([0x38, 0xB8, 0x40, 0x00], np.uint8), (32, 6))
    values = np.tile([1.0, -1.0, 2.0, 0.0], (32, 6))
    model.tensors["model.layers.0.self_attn.q_proj.weight"] = Stored("F8_E4M3", codes.shape, codes.tobytes())
    assert scan(model.write(tmp_path)).std["q"][0] == pytest.approx(values.std(), rel=1e-6)


# --- real tensor names and small trained models ---------------------------------------------------------------------


def checkpoint_of(
    names: list[str], shapes: Mapping[str, tuple[int, ...]] | None = None, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A checkpoint with these names; shapes by the last parts, else matrices for projections and vectors for the rest.
    There are no bytes behind it."""
    shapes = {"proj.weight": (8, 8), **(shapes or {})}
    tensors = {}
    for name in names:
        shape = next((shapes[end] for end in reversed(shapes) if name.endswith(end)), (8,))
        tensors[name] = TensorSpec(name, "BF16", shape, 0, 0, 2 * math.prod(shape))
    shard = Shard(Path("model.safetensors"), 0, 0, (0, 0, 0), None)
    return Checkpoint(Path("model"), (shard,), tensors, config or {}, None, ())


PER_HEAD = {"query_key_value.weight": (24, 8), "dense.weight": (8, 8), "query_key_value.bias": (24,)}
PER_GROUP = {"query_key_value.weight": (16, 8), "dense.weight": (8, 8)}
GATED = {"self_attn.q_proj.weight": (16, 8), "self_attn.k_proj.weight": (4, 8), "self_attn.v_proj.weight": (4, 8)}
SEPARATE = [f"self_attn.{role}_proj" for role in ROLES]
LISTINGS: dict[str, tuple[str, str, Any, list[str], Any, Any]] = {
    "mistralai-Devstral-Small-2507": ("llama", "model.layers.{}", range(40), SEPARATE, {}, {}),
    "WizardLM-2-8x22B": ("llama", "model.layers.{}", range(56), SEPARATE, {}, {}),
    "medgemma-27b-it": ("gemma2", "language_model.model.layers.{}", range(62), SEPARATE, {}, {}),
    "DeepSeek-OCR2-query-ablation": ("llama", "model.layers.{}", range(12), SEPARATE, {}, {}),
    "Qwen3.5-25B-REAP-A3B-Coding": (
        "qwen3_next", "model.language_model.layers.{}", range(3, 40, 4), SEPARATE, GATED, {"num_attention_heads": 2}
    ),
    "bloom": (
        "bloom", "h.{}.self_attention", range(70), ["query_key_value", "dense"], PER_HEAD,
        {"model_type": "bloom", "n_head": 2},
    ),
    "falcon-40b": (
        "falcon", "transformer.h.{}.self_attention", range(60), ["query_key_value", "dense"], PER_GROUP,
        {"model_type": "RefinedWeb", "n_head": 4, "n_head_kv": 2},
    ),
    "oasstpythia1.5brm": (
        "gpt_neox", "gpt_neox.layers.{}.attention", range(24), ["query_key_value", "dense"], PER_HEAD,
        {"model_type": "gpt_neox", "num_attention_heads": 2},
    ),
}  # fmt: skip
"""Family, block, layers with attention, names below the block, shapes of a smaller model, config.json's part in it."""


@pytest.mark.parametrize("listing", LISTINGS)
def test_real_names_are_matched_whole(listing: str, shared_data: Path) -> None:
    """All of the decoder's projections and none of the vision tower's, query encoder's, prediction layers' or
    experts'; where there is neither gain nor bias to be read, none is."""
    family, block, layers, ends, shapes, config = LISTINGS[listing]
    names = json.loads((shared_data / "tensor_names" / f"{listing}.json").read_text())["names"]
    attention = match(checkpoint_of(names, shapes, config))
    assert attention.family == family
    assert [tower.name for tower in attention.towers] == ["decoder"]
    assert main_of(attention).layers == tuple(layers)
    assert projection_names(attention) == {f"{block.format(n)}.{end}.weight" for n in layers for end in ends}
    for tensor in {vector.view.tensor.name for vector in main_of(attention).vectors}:
        assert tensor.startswith(block.split("{}")[0])
        assert tensor.endswith((".query_key_value.bias", "layernorm.weight", "ln_attn.weight"))
    assert not [name for name in attention.skipped if "expert" in name and "never" not in attention.skipped[name]]


def test_every_real_listing_is_tested(shared_data: Path) -> None:
    quantised = {"qwen3-mlx-Qwen3-14B-MLX-4bit"}
    assert {path.stem for path in (shared_data / "tensor_names").glob("*.json")} == {*LISTINGS, *quantised}


def test_real_names_of_a_quantised_checkpoint(shared_data: Path) -> None:
    path = shared_data / "tensor_names" / "qwen3-mlx-Qwen3-14B-MLX-4bit.json"
    names = json.loads(path.read_text())["names"]
    shapes = {"proj.weight": (64, 8), "proj.scales": (64, 1), "proj.biases": (64, 1), "layernorm.weight": (64,)}
    config = {"model_type": "qwen3", "quantization": {"bits": 4, "group_size": 64}}
    plain = checkpoint_of(names, shapes, config)
    words = {n: replace(s, dtype="U32") if n.endswith("proj.weight") else s for n, s in plain.tensors.items()}
    attention = match(replace(plain, tensors=words))
    assert projection_names(attention) == {f"model.layers.{n}.{end}.weight" for n in range(40) for end in SEPARATE}
    assert {p.view.tensor.shape for p in main_of(attention).projections} == {(64, 64)}
    assert not [name for name in attention.skipped if "self_attn" in name and "norm" not in name]


def projection_names(attention: AttentionMap, tower: str | None = None) -> set[str]:
    return {p.view.tensor.name for each in attention.towers for p in each.projections if tower in (None, each.name)}


def test_a_real_adapter_is_refused(shared_data: Path) -> None:
    with pytest.raises(ArchitectureError, match="LoRA adapter") as caught:
        scan(shared_data / "lora_distilbert.safetensors")
    assert "--base" in caught.value.hint


def test_small_trained_models_equal_a_two_pass_computation(shared_data: Path, backend: Backend) -> None:
    """../shared/data/zoo, read by the safetensors library and computed in float64: nine digits by the definition, and
    eight by back ends that add float32 products in lanes."""
    if backend.name == "triton_gpu" and "TRITON_INTERPRET" in os.environ:
        pytest.skip("a scan under the interpreter takes minutes; its kernels are tested by themselves")
    digits = 1e-9 if backend.name == "reference" else 1e-8
    folders = sorted(path for path in (shared_data / "zoo").iterdir() if path.is_dir())
    assert folders
    for folder in folders:
        tensors = dict(safetensors.deserialize((folder / "model.safetensors").read_bytes()))
        fingerprint = llmfp.scan(folder, backend=backend.name)
        for role in "qkvo":
            for layer in fingerprint.layers:
                weights = widened(tensors[f"model.layers.{layer}.self_attn.{role}_proj.weight"])
                assert fingerprint.std[role][layer] == pytest.approx(weights.std(), rel=digits), (folder, role, layer)


def widened(entry: Mapping[str, Any]) -> NDArray[np.float64]:
    """The library's bytes of a BF16 tensor as float64."""
    assert entry["dtype"] == "BF16"
    bits = np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16
    return bits.view(np.float32).astype(np.float64)
