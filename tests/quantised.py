"""Small quantised checkpoints, each beside a twin of its dequantised weights, as the formats' own definitions have it.

compressed-tensors packs its formats itself. AutoGPTQ and AutoAWQ do not install without a GPU's toolchain: their
packing loops are restated here, one code at a time, as they are defined.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import make_checkpoint
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from deserve.model.packed import Form

Tensors = dict[str, torch.Tensor]
Module = Callable[[np.random.Generator, torch.Tensor], tuple[Tensors, torch.Tensor]]  # a weight: as stored, dequantised
GROUP = 32


def pack_words(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes [n, m] packed along `axis` into int32; `order[i]` is which of the codes of a word lies at its place i."""
    codes = np.moveaxis(codes, axis, 0).astype(np.uint64)
    count = 32 // bits
    words = np.zeros((len(codes) // count, codes.shape[1]), np.uint64)
    for row in range(len(words)):
        for place in range(count):
            words[row] |= codes[row * count + (order[place] if order else place)] << np.uint64(place * bits)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, 0, axis)).astype(np.uint32).view(np.int32))


def affine(
    random: np.random.Generator, weight: torch.Tensor, bits: int, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor]:
    """Codes [in, out], zero points and fp16 scales [groups, out] with random zero points, and what they stand for."""
    w, count = weight.numpy().T, groups.max() + 1
    largest = np.stack([np.abs(w[groups == group]).max(0) for group in range(count)])
    scales = (largest / (2 ** (bits - 1) - 1)).astype(np.float16)
    middle = 2 ** (bits - 1)
    zeros = random.integers(middle - 2, middle + 2, size=scales.shape)
    zeros[0, 0] = 0
    codes = np.clip(np.rint(w / scales[groups]) + zeros[groups], 0, 2**bits - 1).astype(np.int64)
    plain = (codes - zeros[groups]).astype(np.float32) * scales.astype(np.float32)[groups]
    return codes, zeros, scales, torch.from_numpy(plain.T.copy())


def gptq(bits: int = 4, act_order: bool = False, version: int = 1) -> Module:
    """AutoGPTQ: rows of `qweight` hold 32 / bits inputs, lowest first; v1 stores zero points less 1."""

    def quantise(random: np.random.Generator, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = np.arange(weight.shape[1]) // GROUP
        if act_order:
            random.shuffle(groups)
        codes, zeros, scales, plain = affine(random, weight, bits, groups)
        stored = (zeros - (version == 1)) & (2**bits - 1)
        return {
            "qweight": pack_words(codes, bits, 0),
            "qzeros": pack_words(stored, bits, 1),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }, plain

    return quantise


def awq(random: np.random.Generator, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """AutoAWQ's gemm: `order_map = [0, 2, 4, 6, 1, 3, 5, 7]` along the outputs."""
    codes, zeros, scales, plain = affine(random, weight, 4, np.arange(weight.shape[1]) // GROUP)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": pack_words(codes, 4, 1, order),
        "qzeros": pack_words(zeros, 4, 1, order),
        "scales": torch.from_numpy(scales),
    }, plain


def fp8_blocks(random: np.random.Generator, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek's: e4m3 in blocks, dequantised by transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = (size // GROUP for size in weight.shape)
    scale = weight.view(rows, GROUP, columns, GROUP).abs().amax((1, 3)) / 448
    codes = (weight / scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)).to(torch.float8_e4m3fn)
    plain = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    return {"weight": codes, "weight_scale_inv": scale}, plain


def fp8_tensor(random: np.random.Generator, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """AutoFP8's: one scale, and one for activations that nothing here reads."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(3.0)}, codes.float() * scale


def weights_of(strategy: str, bits: int, kind: str = "int", symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """The `weights` of a group of compressed-tensors."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False} | more


def compressed(layout: str, weights: dict[str, Any]) -> Module:
    """A format of compressed-tensors, compressed and decompressed by its own package."""
    compressor = BaseCompressor.get_value_from_registry(layout)

    def quantise(random: np.random.Generator, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        size, inputs = weight.shape
        width = weights.get("group_size") or inputs
        blocked = weight.view(size, -1, width)
        largest = blocked.abs().amax(2)  # per channel or group
        if weights["strategy"] == "tensor":
            largest = largest.max().view(1)
        top = {"int4": 7, "int8": 127, "float8": 448, "float4": 6}[f"{weights['type']}{weights['num_bits']}"]
        scale, zero = largest / top, torch.zeros_like(largest, dtype=torch.int8)
        if weights["strategy"] == "block":
            scale = weight.view(size // GROUP, GROUP, -1, GROUP).abs().amax((1, 3)) / top
        if top == 6:
            scale = scale.log2().ceil().exp2()
        if not weights["symmetric"]:
            zero = torch.from_numpy(random.integers(-2, 3, size=scale.shape).astype(np.int8))
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        state = {"weight": weight, "weight_scale": scale}
        if not weights["symmetric"]:
            state["weight_zero_point"] = zero
        stored = compressor.compress(state, scheme)
        return stored, compressor.decompress(dict(stored), scheme)["weight"].float()

    return quantise


def _groups(layout: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **more,
    }


def compressed_in_order(random: np.random.Generator, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors before 0.20, `actorder: group`: inputs sorted by their group are those that its package packs.

    Its dequantisation sorts inputs by `g_idx`, multiplies groups of neighbours, and sorts back.
    """
    group = torch.from_numpy(random.permutation(np.arange(weight.shape[1]) // GROUP).astype(np.int32))
    order = torch.argsort(group, stable=True)
    back = torch.argsort(order)
    layout, weights = CT["w4a16-asymmetric"]
    stored, plain = compressed(layout, weights)(random, weight[:, order])
    codes = unpack_from_int32(stored["weight_packed"], 4, weight.shape)
    return stored | {"weight_packed": pack_to_int32(codes[:, back], 4), "weight_g_idx": group}, plain[:, back]


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
CT = {
    "fp8-tensor": ("float-quantized", weights_of("tensor", 8, "float")),
    "fp8-channel": ("float-quantized", weights_of("channel", 8, "float")),
    "fp8-block": ("float-quantized", weights_of("block", 8, "float", block_structure=[GROUP, GROUP])),
    "w8a8": ("int-quantized", weights_of("channel", 8)),
    "w8a16-asymmetric": ("pack-quantized", weights_of("group", 8, symmetric=False, group_size=GROUP)),
    "w4a16": ("pack-quantized", weights_of("group", 4, group_size=GROUP)),
    "w4a16-channel": ("pack-quantized", weights_of("channel", 4)),
    "w4a16-asymmetric": ("pack-quantized", weights_of("group", 4, symmetric=False, group_size=GROUP)),
    "mxfp4": ("mxfp4-pack-quantized", weights_of("group", 4, "float", group_size=32)),
}
CASES: dict[str, tuple[dict[str, Any], Module]] = {
    "gptq": (GPTQ, gptq()),
    "gptq-act-order": (GPTQ | {"desc_act": True}, gptq(act_order=True)),
    "gptq-8-bits": (GPTQ | {"bits": 8}, gptq(bits=8)),
    "gptq-v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(version=2)),
    "awq": (AWQ, awq),
    "fp8-blocks": (FP8 | {"weight_block_size": [GROUP, GROUP], "modules_to_not_convert": ["lm_head"]}, fp8_blocks),
    "autofp8": (FP8 | {"activation_scheme": "static", "ignored_layers": ["lm_head"]}, fp8_tensor),
    "ct-w4a16-act-order": (
        _groups("pack-quantized", CT["w4a16-asymmetric"][1] | {"actorder": "group"}),
        compressed_in_order,
    ),
    **{f"ct-{name}": (_groups(layout, weights), compressed(layout, weights)) for name, (layout, weights) in CT.items()},
}


def twin(folder: Path) -> Path:
    """The checkpoint of dequantised weights that belongs to a quantised one."""
    return folder.with_name(f"{folder.name}-plain")


def make_quantised(
    folder: Path, case: str, family: str = "llama", keep: Callable[[str], bool] = lambda name: False, **overrides: Any
) -> Path:
    """Write a checkpoint of the scheme `case` and its twin; modules that `keep` names stay as they are."""
    config, quantise = CASES[case]
    plain = make_checkpoint(twin(folder), family, **overrides)
    random = np.random.default_rng(0)
    stored, dequantised = {}, load_file(plain / "model.safetensors")
    for name, tensor in dequantised.items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or keep(module):
            stored[name] = tensor
            continue
        tensors, dequantised[name] = quantise(random, tensor)
        stored |= {f"{module}.{suffix}": part for suffix, part in tensors.items()}
    save_file(dequantised, plain / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors")
    raw = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return folder


def make_mxfp4(folder: Path, **overrides: Any) -> Path:
    """Write a gpt-oss whose experts are in MXFP4, and its twin, dequantised by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    plain = make_checkpoint(twin(folder), "gpt_oss", **overrides)
    stored = load_file(plain / "model.safetensors")
    dequantised = dict(stored)
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weight = stored.pop(name).transpose(1, 2).contiguous()  # [experts, out, in]
        packed = Form("fp4", columns=32).quantise(weight.flatten(0, 1))
        stored[f"{name}_blocks"] = packed.codes.view(*weight.shape[:2], -1, 16)
        stored[f"{name}_scales"] = packed.scale.view(torch.uint8).view(*weight.shape[:2], -1)
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        dequantised[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(dequantised, plain / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((plain / "config.json").read_text())
    config = {
        "quant_method": "mxfp4",
        "dequantize": True,
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return folder


def amend(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change the `quantization_config` in a folder and return the whole config.json."""
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(raw))
    return raw
