"""Quantised checkpoints: what they hold, what the model computes with them, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, reference_model
from hypothesis import given
from hypothesis import strategies as st
from quantised import CASES, amend, make_mxfp4, make_quantised, twin
from safetensors.torch import load_file, save_file
from test_families import ATOL, RTOL, Whole
from test_weights import CPU, FLOAT, WHOLE, config_of, tensors_of

from deserve.config import ModelSection, load_config
from deserve.errors import UserError
from deserve.layout import Shard
from deserve.model.checkpoint import resolve
from deserve.model.config import ModelConfig, parse_config
from deserve.model.packed import Form, PackedLinear
from deserve.model.schemes.rounded import FORMS
from deserve.model.weights import check_weights, dummy_shard, load_shard, parameter_bytes
from deserve.plan import load_plan_config, plan
from deserve.planner.times import stated_times

GATE = "model.layers.1.mlp.gate_proj"


def packed(config: ModelConfig) -> ModelConfig:
    """The same model, its weights left packed in memory."""
    assert config.quantisation
    return replace(config, quantisation=replace(config.quantisation, packed=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """A checkpoint of a scheme, made once."""
    base = tmp_path_factory.mktemp("quantised")

    def folder(case: str) -> Path:
        return base / case if (base / case).is_dir() else make_quantised(base / case, case)

    return folder


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_dequantised_twin(case, folders):
    folder = folders(case)
    config = config_of(folder)
    check_weights(folder, config)
    mine = tensors_of(load_shard(folder, config, WHOLE, CPU, FLOAT))
    theirs = tensors_of(load_shard(twin(folder), config_of(twin(folder)), WHOLE, CPU, FLOAT))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_on_the_twin(case, folders):
    """Dequantised while loading, and from packed weights."""
    folder, ids = folders(case), np.random.default_rng(1).integers(320, size=60).tolist()
    with torch.inference_mode():
        theirs = reference_model(twin(folder))(torch.tensor([ids])).logits[0]
    assert theirs.std() > 0.5
    for config in (config_of(folder), packed(config_of(folder))):
        torch.testing.assert_close(Whole(folder, config).logits(ids, len(ids)), theirs, atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("case", ["ct-fp8-tensor", "ct-fp8-channel", "ct-fp8-block", "ct-w4a16", "ct-w4a16-channel"])
def test_transformers_reads_the_same_from_the_same_files(case, folders):
    """config.json included; transformers 5.23 cannot load the other layouts of compressed-tensors on a CPU."""
    folder, ids = folders(case), np.random.default_rng(2).integers(320, size=60).tolist()
    with torch.inference_mode():
        theirs = reference_model(folder)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(Whole(folder, config_of(folder)).logits(ids, len(ids)), theirs, atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["gptq-act-order", "gptq-8-bits", "awq", "fp8-blocks", "ct-w4a16", "ct-mxfp4"])
def test_packed_weights_unpack_to_the_same_numbers(case, dtype, folders, monkeypatch):
    """Bit by bit, in pieces of any size: what is rounded while loading and what is rounded at each product."""
    monkeypatch.setattr("deserve.model.packed.CHUNK", 64 * 20)
    folder, config = folders(case), config_of(folders(case))
    loaded = load_shard(folder, config, Shard(1, 2, False, False), CPU, torch.float32).layers[0]
    kept = load_shard(folder, packed(config), Shard(1, 2, False, False), CPU, dtype).layers[0]
    for whole, parts in ((loaded.attention.qkv, kept.attention.qkv), (loaded.mlp.down, kept.mlp.down)):
        assert isinstance(parts, PackedLinear)
        rows = [rows for part in parts.parts for _, rows in part.chunks(dtype)]
        assert len(rows) > len(parts.parts)
        assert torch.equal(torch.cat(rows), whole.weight.to(dtype))


@pytest.mark.parametrize("case", ["gptq", "ct-mxfp4", "fp8-blocks"])
def test_bytes_are_those_of_the_tensors_in_memory(case, folders):
    folder, config = folders(case), packed(config_of(folders(case)))
    for shard in (WHOLE, Shard(1, 3, False, False)):
        loaded = load_shard(folder, config, shard, CPU, FLOAT)
        held = sum(tensor.nbytes for tensor in tensors_of(loaded).values())
        products = [vars(layer.attention) | vars(layer.mlp) for layer in loaded.layers]
        linears = [part for parts in products for part in parts.values() if isinstance(part, PackedLinear)]
        held += sum(tensor.nbytes for linear in linears for part in linear.parts for tensor in part.tensors)
        assert held == parameter_bytes(config, shard, FLOAT)
    layer = Shard(1, 2, False, False)
    assert parameter_bytes(config, layer, torch.bfloat16) < 0.6 * parameter_bytes(
        config_of(folder), layer, torch.bfloat16
    )


def test_modules_that_gptq_leaves_as_they_are(tmp_path):
    """By GPTQModel's rules and by optimum's list."""
    down = {"dynamic": {r"-:.*\.down_proj": {}, r"+:.*\.mlp\.": {}}}
    names = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    names.append(["mlp.gate_proj", "mlp.up_proj"])
    for number, changes in enumerate((down, {"modules_in_block_to_quantize": names})):
        folder = tmp_path / f"{number}"
        make_quantised(folder, "gptq", keep=lambda name: name.endswith("down_proj"), num_hidden_layers=2)
        amend(folder, **changes)
        check_weights(folder, config_of(folder))
        mine, theirs = (
            load_shard(each, config_of(each), Shard(1, 2, False, False), CPU, FLOAT).layers[0].mlp
            for each in (folder, twin(folder))
        )
        for part in ("gate_up", "down"):
            both = getattr(mine, part).weight, getattr(theirs, part).weight
            torch.testing.assert_close(*both, atol=1e-7, rtol=1e-6)


def test_experts_that_share_a_tensor_are_refused_by_name(tmp_path):
    """As transformers writes them if it is asked to."""
    plain = make_checkpoint(tmp_path / "plain", "qwen3_moe", num_experts=4, num_experts_per_tok=2, num_hidden_layers=1)
    model = reference_model(plain)
    model.save_pretrained(tmp_path / "shared", save_original_format=False)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj holds all experts"):
        check_weights(tmp_path / "shared", config_of(tmp_path / "shared"))


@pytest.mark.parametrize("case", ["gptq-act-order", "awq", "fp8-blocks", "ct-w4a16", "ct-mxfp4"])
def test_experts_are_those_of_the_dequantised_twin(case, tmp_path):
    """All of a layer in one stacked weight; the router stays as it is."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    folder = make_quantised(tmp_path / case, case, "qwen3_moe", **sizes)
    check_weights(folder, config_of(folder))
    mine, theirs = (
        load_shard(each, config_of(each), Shard(0, 2, True, True), CPU, FLOAT) for each in (folder, twin(folder))
    )
    for layer, other in zip(mine.layers, theirs.layers, strict=True):
        assert layer.mlp.gate_up.weight.shape == (4, 64, 64)
        torch.testing.assert_close(layer.mlp.gate_up.weight, other.mlp.gate_up.weight, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(layer.mlp.down.weight, other.mlp.down.weight, atol=1e-7, rtol=1e-6)
        assert torch.equal(layer.mlp.router.weight, other.mlp.router.weight)


def test_experts_in_mxfp4_are_those_of_transformers(tmp_path):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12, "num_hidden_layers": 2}
    folder = make_mxfp4(tmp_path / "mxfp4", **sizes)
    check_weights(folder, config_of(folder))
    ids = np.random.default_rng(1).integers(320, size=60).tolist()
    for theirs in (twin(folder), folder):
        with torch.inference_mode():
            logits = reference_model(theirs).float()(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(Whole(folder, config_of(folder)).logits(ids), logits, atol=ATOL, rtol=RTOL)
    config = config_of(folder)
    half = [dummy_shard(config, Shard(first, 2, False, False), CPU, FLOAT).layers[-1].mlp for first in (0, 1)]
    assert torch.equal(half[0].down.weight, half[1].down.weight)
    assert len(half[0].down.weight.abs().unique()) < 100  # random weights that MXFP4 can hold
    with pytest.raises(UserError, match=r"model\.packed=true: experts"):
        resolve(ModelSection("own", str(folder), packed=True))


@pytest.mark.parametrize("in_memory", [False, True])
def test_modules_that_the_checkpoint_keeps_and_biases(tmp_path, in_memory):
    """Quantised and kept modules in one product, with biases."""
    kept = ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj")
    folder = make_quantised(tmp_path / "kept", "ct-w4a16", "qwen2", keep=lambda name: name in kept)
    amend(folder, ignore=["lm_head", kept[0], r"re:.*\.2\.mlp\.down"])
    config = packed(config_of(folder)) if in_memory else config_of(folder)
    ids = np.random.default_rng(1).integers(320, size=40).tolist()
    with torch.inference_mode():
        theirs = reference_model(twin(folder))(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(Whole(folder, config).logits(ids, len(ids)), theirs, atol=ATOL, rtol=RTOL)
    amend(folder, ignore=["lm_head"])
    with pytest.raises(UserError, match=r"no tensor model\.layers\.0\.self_attn\.k_proj\.weight_packed"):
        check_weights(folder, config_of(folder))


def test_fp8_names_that_are_not_converted(tmp_path):
    folder = make_quantised(tmp_path / "kept", "fp8-blocks", keep=lambda name: ".layers.3." in name)
    amend(folder, modules_to_not_convert=["lm_head", "model.layers.3"])
    check_weights(folder, config_of(folder))
    assert config_of(folder).quantisation.scheme("model.layers.3.mlp.up_proj") is None
    assert config_of(folder).quantisation.scheme("model.layers.30.mlp.up_proj") is not None


def test_blocks_that_do_not_divide_a_weight():
    weight, form = torch.randn(70, 90), Form("fp8", 32, 40)
    found = form.quantise(weight)
    assert found.scale.shape == form.blocks(70, 90) == (3, 3)
    scale = found.scale.numpy().repeat(32, 0)[:70].repeat(40, 1)[:, :90]
    unpacked = torch.empty(70, 90)
    found.unpack(unpacked)
    assert torch.equal(unpacked, found.codes.float() * torch.from_numpy(scale))
    torch.testing.assert_close(unpacked, weight, atol=0.01, rtol=2**-4)


@given(
    kind=st.sampled_from(["int4", "int8", "fp8", "fp4"]),
    size=st.integers(1, 40),
    pairs=st.integers(1, 40),
    width=st.integers(1, 70),
    rows=st.sampled_from([1, 1, 3, None]),
    chunk=st.integers(1, 4000),
    seed=st.integers(0, 2**20),
)
def test_rounding_errs_by_half_a_step(kind, size, pairs, width, rows, chunk, seed):
    """For every shape and split; what is rounded already stays as it is."""
    weight = torch.randn(size, 2 * pairs, generator=torch.Generator().manual_seed(seed))
    form, unpacked = Form(kind, rows, width), torch.empty(size, 2 * pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deserve.model.packed.CHUNK", chunk)
        found = form.quantise(weight)
        found.unpack(unpacked)
    assert found.shape == weight.shape and found.scale.shape == form.blocks(*weight.shape)
    assert sum(tensor.nbytes for tensor in found.tensors) == form.bytes(*weight.shape)
    # Of int4, the largest becomes -8, and what is as large of the other sign 7.
    step = {"int4": 1.0, "int8": 0.5, "fp8": 16.0, "fp4": 1.0}[kind]  # half the widest gap between codes
    spread = found.scale.float().abs().repeat_interleave(rows or size, 0)[:size].repeat_interleave(width, 1)
    assert ((unpacked - weight).abs() <= spread[:, : 2 * pairs] * step * 1.001).all()


@pytest.mark.parametrize("name", FORMS)
def test_a_checkpoint_is_rounded_while_loading(name, tmp_path):
    """Packed or not it is the same model: transformers' on the rounded weights; head and embedding are as they were."""
    folder = make_checkpoint(tmp_path / "plain", hidden_size=256, head_dim=64)
    section = ModelSection("own", str(folder), quantise=name)
    config = resolve(section).config
    model, form = reference_model(folder), FORMS[name]
    with torch.inference_mode():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                form.quantise(module.weight).unpack(module.weight)
        ids = np.random.default_rng(1).integers(320, size=40).tolist()
        theirs, exact = model(torch.tensor([ids])).logits[0], model.double()(torch.tensor([ids])).logits[0]
    rounding = 2 * (theirs - exact).abs().max().item()  # this model makes much of float32's
    packed = resolve(replace(section, packed=True)).config
    assert not config.quantisation.packed and packed.quantisation.packed
    for mine in (config, packed):
        torch.testing.assert_close(Whole(folder, mine).logits(ids, len(ids)).double(), exact, atol=rounding, rtol=RTOL)
    layer = Shard(0, 1, False, False)
    plain, small = (parameter_bytes(each, layer, torch.bfloat16) for each in (config, packed))
    assert small / plain == pytest.approx({"fp8": 0.51, "int4": 0.27}[name], abs=0.01)
    assert resolve(section).fingerprint() != resolve(replace(section, quantise=None)).fingerprint()


@pytest.mark.parametrize("case", ["gptq", "ct-fp8-channel", "ct-mxfp4"])
def test_random_weights_take_the_scheme_s_form(case, folders):
    """So the planner measures what will run; any partition is the same model."""
    config = packed(config_of(folders(case)))
    whole, half = (dummy_shard(config, Shard(first, 4, False, True), CPU, FLOAT) for first in (0, 2))
    mine, theirs = whole.layers[3].mlp.gate_up, half.layers[1].mlp.gate_up
    for part, other in zip(mine.parts, theirs.parts, strict=True):
        assert part.form == other.form == next(scheme.form for _, scheme in config.quantisation.rules)
        assert all(torch.equal(*pair) for pair in zip(part.tensors, other.tensors, strict=True))
    x = torch.randn(3, 64)
    assert mine(x).std() > 0.05
    assert torch.equal(mine(x, torch.zeros(3, 192)), mine(x))


def _change(folder: Path, **tensors: torch.Tensor | None) -> None:
    stored = load_file(folder / "model.safetensors")
    changed = stored | {f"{GATE}.{suffix}": tensor for suffix, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("case", "tensors", "words"),
    [
        ("gptq", {"scales": None}, ["no tensor", f"{GATE}.scales"]),
        ("gptq", {"scales": torch.zeros(4, 96)}, [f"{GATE}.scales", "[4, 96]", "[2, 96]"]),
        ("gptq", {"qweight": torch.zeros(8, 96)}, [f"{GATE}.qweight", "F32", "I32"]),
        ("gptq", {"g_idx": torch.full((64,), 2, dtype=torch.int32)}, [GATE, "g_idx", "2, of 2"]),
        ("gptq", {"bias": torch.ones(96)}, [f"{GATE}.bias", "not 0"]),
        ("fp8-blocks", {"weight_scale_inv": None}, ["no tensor", f"{GATE}.weight_scale_inv"]),
        ("fp8-blocks", {"weight": torch.zeros(96, 64)}, [f"{GATE}.weight", "F32", "F8_E4M3"]),
        ("fp8-blocks", {"weight_scale_inv": torch.ones(1, 1)}, ["[1, 1]", "[3, 2]"]),
        ("ct-w4a16-act-order", {"weight_g_idx": None}, ["no tensor", f"{GATE}.weight_g_idx"]),
        ("ct-w4a16", {"weight_zero_point": torch.zeros(12, 2, dtype=torch.int32)}, [f"{GATE}.weight_zero_point"]),
    ],
)
def test_bad_tensors_are_named(case, tensors, words, tmp_path):
    folder = make_quantised(tmp_path / "bad", case)
    _change(folder, **tensors)
    with pytest.raises(UserError) as caught:
        load_shard(folder, config_of(folder), WHOLE, CPU, FLOAT)
    assert all(word in str(caught.value) for word in [str(folder), *words]), caught.value
    assert "\n" not in str(caught.value)


def test_a_bias_of_zeros_is_harmless(tmp_path):
    """AutoGPTQ wrote one for every layer."""
    folder = make_quantised(tmp_path / "zeros", "gptq")
    _change(folder, bias=torch.zeros(96))
    check_weights(folder, config_of(folder))
    assert load_shard(folder, config_of(folder), WHOLE, CPU, FLOAT).layers[1].mlp.gate_up.bias is None


def _weights(**changes: Any) -> dict[str, Any]:
    group = CASES["ct-w4a16"][0]["config_groups"]["group_0"]
    return {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, ["quant_method", "bitsandbytes", "gptq, awq"]),
        ("gptq", {"quant_method": None}, ["quant_method", "missing"]),
        ("gptq", {"bits": 3}, ["bits", "3"]),
        ("gptq", {"group_size": 0}, ["group_size"]),
        ("gptq", {"checkpoint_format": "marlin"}, ["checkpoint_format", "marlin"]),
        ("gptq", {"dynamic": {r"+:.*\.down_proj": {"bits": 8}}}, ["dynamic", "down_proj"]),
        ("gptq", {"dynamic": {"-:(": {}}}, ["dynamic", "("]),
        ("gptq", {"modules_in_block_to_quantize": [[1]]}, ["modules_in_block_to_quantize"]),
        ("awq", {"version": "gemv"}, ["version", "gemv"]),
        ("awq", {"zero_point": False}, ["zero_point"]),
        ("awq", {"bits": 8}, ["bits"]),
        ("awq", {"group_size": 24}, ["group_size (24)", "64"]),
        ("fp8-blocks", {"fmt": "e5m2"}, ["fmt", "e5m2"]),
        ("fp8-blocks", {"weight_block_size": [128]}, ["weight_block_size"]),
        ("fp8-blocks", {"something": 1}, ["something"]),
        ("ct-w4a16", {"kv_cache_scheme": {"num_bits": 8}}, ["kv_cache_scheme"]),
        ("ct-w4a16", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity_config.format", "24"]),
        ("ct-w4a16", {"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config"]),
        ("ct-w4a16", {"format": "nvfp4-pack-quantized"}, ["format", "nvfp4"]),
        ("ct-w4a16", {"format": "float-quantized"}, ["config_groups.group_0.weights.type", "int4"]),
        ("ct-w4a16", {"quantization_status": "frozen"}, ["quantization_status", "frozen"]),
        ("ct-w4a16", {"config_groups": {}}, ["config_groups"]),
        ("ct-w4a16", {"ignore": ["re:("]}, ["ignore", "re:("]),
        ("ct-w4a16", _weights(num_bits=2), ["weights.num_bits"]),
        ("ct-w4a16", _weights(group_size=48), ["group_size (48)", "64"]),
        ("ct-w4a16", _weights(actorder="random"), ["weights.actorder", "random"]),
        ("ct-w4a16", _weights(strategy="tensor_group"), ["weights.strategy", "tensor_group"]),
        ("ct-mxfp4", {"format": "mxfp4-pack-quantized"} | _weights(type="float", group_size=16), ["group_size", "32"]),
    ],
)
def test_what_is_not_done_is_refused_by_name(case, changes, words, folders):
    folder = folders(case)
    raw = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError) as caught:
        parse_config(raw | {"quantization_config": CASES[case][0] | changes}, "config.json")
    message = str(caught.value)
    assert all(word in message for word in ["config.json: quantization_config", *words]), message
    assert "\n" not in message


@pytest.mark.parametrize("case", ["gptq", "awq", "fp8-blocks", "autofp8", "ct-fp8-channel", "ct-w4a16", "ct-mxfp4"])
def test_scales_that_lack_or_that_nobody_reads_are_named(case, folders, tmp_path):
    """Those of pages in fp8, `k_scale` and `v_scale`, are none that are read."""
    folder = tmp_path / "damaged"
    shutil.copytree(folders(case), folder)
    stored = load_file(folder / "model.safetensors")
    scale = next(name for name in sorted(stored) if "scale" in name and "input" not in name)
    save_file({name: tensor for name, tensor in stored.items() if name != scale}, folder / "model.safetensors")
    with pytest.raises(UserError, match=scale.replace(".", r"\.")):
        check_weights(folder, config_of(folder))
    for name in ("model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.v_proj.v_scale"):
        save_file(stored | {name: torch.ones(1)}, folder / "model.safetensors")
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            check_weights(folder, config_of(folder))


def test_keys_that_say_nothing_are_no_obstacle(folders):
    """As AutoGPTQ, AutoAWQ and llm-compressor write them."""
    for case, more in {
        "gptq": {"static_groups": False, "true_sequential": True, "model_name_or_path": None, "dynamic": {}},
        "awq": {"modules_to_not_convert": None, "version": "GEMM"},
        "ct-w4a16": {"sparsity_config": {}, "transform_config": {}, "version": "0.11.0", "global_compression_ratio": 1},
        "ct-w4a16-channel": {"sparsity_config": {"format": "dense", "ignore": []}},
    }.items():
        raw = json.loads((folders(case) / "config.json").read_text())
        assert parse_config(raw | {"quantization_config": CASES[case][0] | more}, "c").quantisation


def test_a_quantised_checkpoint_is_not_quantised_again(folders):
    with pytest.raises(UserError, match=r"model\.quantise=int4: .*already"):
        resolve(ModelSection("own", str(folders("awq")), quantise="int4"))


def test_a_plan_counts_packed_weights():
    """Four cards of 24 GB: too small for 70B in bfloat16, ample in int4; unpacking takes its time."""
    options = ["model=llama-3.3-70b", "ranks=4", "memory_gb=22", "workload.limit=64", "pipeline.policy=decode_first"]
    with pytest.raises(UserError, match="for the KV cache"):
        plan(load_plan_config(options))
    assert "predicted" in plan(load_plan_config([*options, "model.quantise=int4", "model.packed=true"]))
    section = load_config(["model=llama-3.3-70b", "model.weights=dummy", "model.quantise=int4"]).model
    dense, quantised = (resolve(replace(section, packed=packed)).config for packed in (False, True))
    slow, fast = (
        stated_times(config, torch.bfloat16, 1e12, 1e14, None, 512).layers[0].tokens(1) for config in (quantised, dense)
    )
    assert 4 < slow / fast < 10
