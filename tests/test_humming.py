"""Products on packed weights by fused kernels, with stand-ins for them: what they are given, and what is refused.

The stand-ins read weights as humming-kernels says it stores them (humming/schema/humming.py); tests/test_gpu.py has the
kernels themselves.
"""

import importlib
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import forms
from launch import ROOT
from quantised import make_quantised
from test_weights import CPU, WHOLE, config_of
from torch import Tensor

from deserve.config import ModelSection
from deserve.errors import UserError
from deserve.model.checkpoint import resolve
from deserve.model.packed import Form, Packed, PackedLinear
from deserve.model.weights import load_shard
from deserve.planner.times import stated_times
from deserve.stage import _fuse

BF16 = torch.bfloat16
BITS = {"uint4": 4, "uint8": 8, "float8e4m3": 8, "float4e2m1": 4}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FORMS = forms(64)
# MXFP4 in float16 is refused: test_what_kernels_do_not_take
PRODUCTS = [
    (case, dtype) for case in FORMS for dtype in (BF16, torch.float16) if (case, dtype) != ("fp4", torch.float16)
]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes [n, m * 32 / bits] of int32 words [n, m], lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    return (words.long().unsqueeze(2) >> shifts & 2**bits - 1).flatten(1)


def prepared(
    tensors: dict[str, Tensor], size: int, inputs: int, schema: Any, *, has_bias: bool, torch_dtype: Any, **_: Any
) -> tuple[Any, dict[str, Tensor]]:
    """What humming checks of the tensors of a layer, by its HummingWeightSchema.get_tensors_attrs."""
    bits, groups = BITS[schema.b_dtype], inputs // (schema.weight_scale_group_size or inputs)
    scale = torch.float8_e8m0fnu if schema.bs_dtype else torch_dtype
    shapes = {"weight": ((size, inputs * bits // 32), torch.int32), "weight_scale": ((size, groups), scale)}
    if schema.has_zero_point:
        shapes["zero_point"] = ((size * bits // 32, groups), torch.int32)
    if has_bias:
        shapes["bias"] = ((size,), torch_dtype)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == shapes
    return SimpleNamespace(schema=schema, to_str=lambda: schema.b_dtype), tensors


def launch(
    configs: Any, inputs: Tensor, outputs: Tensor, weight: Tensor, weight_scale: Tensor, locks: Tensor, **more: Tensor
) -> None:
    """The product that humming's kernel computes, with weights rounded to the dtype of `inputs`."""
    kind, tuning = configs
    assert sum(begin < len(inputs) <= end for begin, end, _ in tuning) == 1 and not locks.any()
    bits, columns = BITS[kind], inputs.shape[1] // weight_scale.shape[1]
    codes = unpacked(weight, bits)
    if kind == "float4e2m1":
        values = E2M1[codes & 7] * (1 - 2.0 * (codes >> 3))
    elif kind == "float8e4m3":
        values = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    else:
        zero = torch.tensor([[2 ** (bits - 1)]])
        if "zero_point" in more:
            zero = unpacked(more["zero_point"].t(), bits).t().repeat_interleave(columns, 1)
        values = (codes - zero).float()
    whole = (values * weight_scale.float().repeat_interleave(columns, 1)).to(inputs.dtype)
    outputs.copy_(torch.nn.functional.linear(inputs, whole, more.get("bias")))


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`deserve.model.humming` with stand-ins for the kernels."""
    parts: dict[str, dict[str, Any]] = {
        "": {},
        ".kernel": {},
        ".kernel.humming": {
            "HummingKernel": SimpleNamespace(prepare_kernels=lambda form, _, tuning, __: (form, json.loads(tuning)))
        },
        ".ops": {"launch_kernel": launch},
        ".schema": {"HummingWeightSchema": SimpleNamespace},
        ".transform": {"prepare_and_transform_humming_tensors": prepared},
        ".tune": {"get_heuristics_config": lambda config, shape_m, device: {"tokens": shape_m}},
    }
    for name, members in parts.items():
        module = ModuleType(f"humming{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"humming-kernels": "0.1.19"}[name])
    yield importlib.import_module("deserve.model.humming")
    del sys.modules["deserve.model.humming"]


def quantised(form: Form, sizes: tuple[int, ...] = (64, 128, 64), inputs: int = 128) -> list[Packed]:
    """Random weights; where there are zero points, most are not in the middle."""
    generator = torch.Generator().manual_seed(0)
    parts = [form.quantise(torch.randn(size, inputs, generator=generator) * (1 + size)) for size in sizes]
    for part in parts:
        if part.zero is not None:
            part.zero.add_(torch.randint(-7, 8, part.zero.shape, generator=generator))
    return parts


@pytest.mark.parametrize(("case", "dtype"), PRODUCTS)
def test_kernels_are_given_the_same_weights(case: str, dtype: torch.dtype, humming: Any) -> None:
    """Several weights stacked in one product, with and without a bias, for any number of tokens."""
    for bias in (None, torch.randn(256).to(dtype)):
        linear = PackedLinear(quantised(FORMS[case]), bias)
        assert humming.unfit(linear, dtype) is None
        fused = humming.HummingLinear(linear, dtype)
        for tokens in (1, 8, 9, 3000):
            x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            expected, out = linear(x).float(), torch.empty(tokens, 256, dtype=dtype)
            assert fused(x, out) is out
            error = (out.float() - expected).norm() / expected.norm()
            # A scale is rounded once more, and each weight.
            assert error < 2**-7 if dtype == BF16 else error < 2**-10
            assert torch.equal(fused(x), out)


def test_zero_points_in_the_middle_are_left_out(humming: Any) -> None:
    for case in ("int4-zeros", "int8-zeros"):
        part = FORMS[case].quantise(torch.randn(64, 128))
        assert "zero_point" not in humming.stored([part], BF16)
        assert "zero_point" in humming.stored(quantised(FORMS[case]), BF16)


def test_what_kernels_do_not_take(humming: Any) -> None:
    (part,) = quantised(FORMS["int4"], (64,))
    tiny = replace(part, scale=part.scale * 1e-8)
    cases = {
        "not torch.float32": (PackedLinear([part]), torch.float32),
        "in different ways": (PackedLinear([part, *quantised(FORMS["fp8-channel"], (64,))]), BF16),
        "different ways": (PackedLinear([part, torch.randn(64, 128)]), BF16),
        "groups of 48": (PackedLinear(quantised(Form("int4", columns=48), inputs=96)), BF16),
        "groups of 128 inputs of 192": (PackedLinear(quantised(Form("int4", columns=128), inputs=192)), BF16),
        "scattered": (PackedLinear([replace(part, columns=torch.zeros(128, dtype=torch.int32))]), BF16),
        "60 x 128": (PackedLinear(quantised(FORMS["int8"], (60,))), BF16),
        "MXFP4": (PackedLinear(quantised(FORMS["fp4"], (64,))), torch.float16),
        "scales down to .* do not fit torch.float16": (PackedLinear([tiny]), torch.float16),
    }
    for reason, (linear, dtype) in cases.items():
        found = humming.unfit(linear, dtype)
        assert found is not None and re.search(reason, found), (reason, found)
    assert humming.unfit(PackedLinear([tiny]), BF16) is None


def products(layers: list[Any]) -> list[Any]:
    owners = [owner for layer in layers for owner in (layer.attention, layer.mlp)]
    return [
        vars(owner)[name] for owner in owners for name in ("qkv", "output", "gate_up", "down") if hasattr(owner, name)
    ]


def test_products_of_a_model_change_places(
    tmp_path: Path, humming: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them; or, with inputs in the order of their activations, none, which is said once or refused."""
    for case, what in (("gptq", humming.HummingLinear), ("gptq-act-order", PackedLinear)):
        config = config_of(make_quantised(tmp_path / case, case))
        config = replace(config, quantisation=replace(config.quantisation, packed=True))
        weights = load_shard(tmp_path / case, config, WHOLE, CPU, BF16)
        before = products(weights.layers)
        x = [torch.randn(5, sum(part.shape[1] for part in product.parts[:1])).bfloat16() for product in before]
        humming.fuse(weights, BF16, required=False)
        after = products(weights.layers)
        assert len(after) == 16 and {type(product) for product in after} == {what}
        for old, new, some in zip(before, after, x, strict=True):
            torch.testing.assert_close(new(some), old(some), atol=0.03, rtol=0.03)
    said = capsys.readouterr().out.splitlines()
    assert (
        len(said) == 1 and said[0].startswith("16 products (layer 0 of this rank, qkv, ...)") and "desc_act" in said[0]
    )
    with pytest.raises(
        UserError, match=r"model\.gemm=humming: layer 0 of this rank, qkv: .*desc_act.* model\.gemm=auto"
    ):
        humming.fuse(weights, BF16, required=True)

    def failing(*_: Any, **__: Any) -> None:
        raise AssertionError("WGMMA requires SM90")

    monkeypatch.setattr(humming, "prepare_and_transform_humming_tensors", failing)
    weights = load_shard(tmp_path / "gptq", config_of(tmp_path / "gptq"), WHOLE, CPU, BF16)
    weights.layers[1].mlp.down = PackedLinear(quantised(FORMS["int4"]))
    with pytest.raises(UserError, match=r"layer 1 of this rank, down: humming-kernels fails with .*SM90"):
        humming.fuse(weights, BF16, required=True)


def test_where_there_are_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    weights = load_shard(make_quantised(tmp_path / "gptq", "gptq"), config_of(tmp_path / "gptq"), WHOLE, CPU, BF16)
    with pytest.raises(UserError, match=r"model\.gemm=humming is for GPUs, not device=cpu"):
        _fuse(weights, True, BF16, CPU)
    _fuse(weights, False, BF16, CPU)
    monkeypatch.setitem(sys.modules, "humming.kernel.humming", None)
    with pytest.raises(UserError, match=r"model\.gemm=humming: .*pip install 'deserve\[humming\]'"):
        _fuse(weights, True, BF16, torch.device("cuda"))
    assert capsys.readouterr().out == ""
    _fuse(weights, False, BF16, torch.device("cuda"))
    assert "humming-kernels is not usable" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"set model\.packed=true"):
        resolve(ModelSection("own", str(tmp_path / "gptq"), gemm="humming"))


def test_the_version_is_that_of_the_extra(humming: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["humming"] == [f"humming-kernels[cu13]=={humming.HUMMING}"]
    del sys.modules["deserve.model.humming"]
    monkeypatch.setattr("importlib.metadata.version", lambda _: "9.9")
    with pytest.raises(ImportError, match=r"9\.9 is installed, but 0\.1\.19 is needed"):
        importlib.import_module("deserve.model.humming")
    sys.modules["deserve.model.humming"] = humming


def test_a_plan_reads_packed_weights_once() -> None:
    """In int4 a row takes a quarter of the time of bfloat16, many as long."""
    section = ModelSection("llama-3-8b", weights="dummy", architecture=LLAMA, quantise="int4")
    costs = {}
    for name, options in {"dense": {}, "fused": {"packed": True, "gemm": "auto"}, "torch": {"packed": True}}.items():
        config = resolve(replace(section, **options)).config
        costs[name] = stated_times(config, BF16, 1e12, 1e14, None, 2048).layers[0].tokens
    assert 3.5 < costs["dense"](1) / costs["fused"](1) < 4
    assert costs["dense"](2048) == pytest.approx(costs["fused"](2048), rel=0.01)
    assert costs["torch"](1) > costs["dense"](1)
