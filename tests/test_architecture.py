"""Names and shapes say which bytes are whose Q, K, V and O: every role's σ, every head's σ and the profile along the
residual stream equal a plain computation on the matrices the checkpoint was made from, in each family's true layout.

A family without a row in `tests.checkpoints.LAYOUTS` fails here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from numpy.typing import NDArray

import llmfp
from llmfp.architecture import AttentionMap, match
from llmfp.architecture.families import families
from llmfp.checkpoint import Checkpoint, Shard, TensorSpec, open_checkpoint
from llmfp.errors import ArchitectureError, EncodingError
from llmfp.kernels import Backend
from tests.checkpoints import BACKEND, LAYOUTS, Model, Stored, as_bf16, bf16, build, write_model

PROFILE_TOLERANCE = 2.0**-8
"""Profiles are float16 logarithms of magnitude below 4: half a step is 2^-10, the sum of squares adds some."""
ROLES = ("q", "k", "v", "o")
CENTRED = {family for family, layouts in LAYOUTS.items() if layouts[0].norm == "layer"}


def scan(source: Path) -> llmfp.Fingerprint:
    return llmfp.scan(source, backend=BACKEND)


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
    assert {layouts[0].family for layouts in LAYOUTS.values()} == set(families())


def test_no_two_families_claim_one_model_type() -> None:
    """Else the alphabet would decide how a model is read."""
    claimed = [model_type for family in families().values() for model_type in family.model_types]
    assert len(claimed) == len(set(claimed))


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


INDISTINCT = {
    "gemma": "llama", "cohere": "llama", "olmo": "llama", "openai_gpt": "gpt2", "bart": "mbart", "falcon, 7B": "bloom",
}  # fmt: skip
"""Families that differ from another in their norms only, and no name shows it."""


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
    for projection in match(open_checkpoint(build(family).write(tmp_path))).main.projections:
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


def test_a_prediction_layer_behind_the_decoder_is_left_out(tmp_path: Path) -> None:
    """GLM-4-MoE and DeepSeek-V3 store the multi-token prediction layer as number num_hidden_layers, with an eh_proj."""
    model, longer = build("llama"), build("llama", layers=3)
    alone = scan(model.write(tmp_path / "alone"))
    longer.tensors["model.layers.2.eh_proj.weight"] = np.ones((24, 48), np.float32)
    both = scan(write_model(tmp_path / "both", longer.tensors, model.config))
    assert (both.digest, both.layers, both.caveats) == (alone.digest, (0, 1), ())
    reasons = {
        str(each["pattern"]): str(each["reason"]) for each in both.skipped if "prediction" in str(each["reason"])
    }
    assert "model.layers.{n}.self_attn.q_proj.weight" in reasons


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


def checkpoint_of(names: list[str]) -> Checkpoint:
    """A checkpoint with these names, matrices for projections and vectors for the rest; no bytes behind it."""
    tensors = {
        name: TensorSpec(name, "BF16", (8, 8) if "proj" in name else (8,), 0, 0, 128 if "proj" in name else 16)
        for name in names
    }
    shard = Shard(Path("model.safetensors"), 0, 0, (0, 0, 0), None)
    return Checkpoint(Path("model"), (shard,), tensors, {}, None, ())


@pytest.mark.parametrize(
    ("listing", "family", "block", "layers"),
    [
        ("mistralai-Devstral-Small-2507", "llama", "model.layers", 40),
        ("WizardLM-2-8x22B", "llama", "model.layers", 56),
        ("medgemma-27b-it", "gemma2", "language_model.model.layers", 62),
        ("DeepSeek-OCR2-query-ablation", "llama", "model.layers", 12),
    ],
)
def test_real_names_are_matched_whole(listing: str, family: str, block: str, layers: int, shared_data: Path) -> None:
    """All of the decoder's projections and none of the vision tower's, query encoder's or experts'."""
    names = json.loads((shared_data / "tensor_names" / f"{listing}.json").read_text())["names"]
    attention = match(checkpoint_of(names))
    assert attention.family == family
    expected = {f"{block}.{n}.self_attn.{role}_proj.weight" for n in range(layers) for role in "qkvo"}
    assert projection_names(attention) == expected
    assert not [name for name in attention.skipped if "expert" in name and "never" not in attention.skipped[name]]


def test_real_names_of_a_quantised_checkpoint_are_refused(shared_data: Path) -> None:
    path = shared_data / "tensor_names" / "qwen3-mlx-Qwen3-14B-MLX-4bit.json"
    with pytest.raises(EncodingError, match=r"_proj\.weight.*quantised.*_proj\.scales"):
        match(checkpoint_of(json.loads(path.read_text())["names"]))


def projection_names(attention: AttentionMap) -> set[str]:
    return {projection.view.tensor.name for tower in attention.towers for projection in tower.projections}


def test_a_real_adapter_is_refused(shared_data: Path) -> None:
    with pytest.raises(ArchitectureError, match="LoRA adapter") as caught:
        scan(shared_data / "lora_distilbert.safetensors")
    assert "base model" in caught.value.hint


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
