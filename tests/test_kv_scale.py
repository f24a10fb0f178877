"""Keys and values fit e4m3 pages by scales that are folded into the weights."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from test_families import FAMILIES, Whole

from deserve.errors import UserError
from deserve.layout import Shard
from deserve.model.config import ModelConfig, parse_config
from deserve.model.kv_scale import LARGEST, fold_scales
from deserve.model.packed import Form, PackedLinear
from deserve.model.schemes.rounded import rounded
from deserve.model.weights import ShardWeights, load_shard

CPU = torch.device("cpu")
NAMES = (
    "llama",
    "qwen2",
    "qwen2-tied-yarn",
    "qwen3",
    "olmoe",
    "olmoe-grouped",
    "phi3-longrope-window",
    "gemma2",
    "gemma3",
)
MODELS = {
    **{name: (*FAMILIES[name], None) for name in NAMES},
    "int4": ("llama", {"hidden_size": 256, "head_dim": 64}, "int4"),
    "fp8": ("phi3", {"tie_word_embeddings": True}, "fp8"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, ModelConfig]:
    """A checkpoint, and its config; of the last two, weights are packed in memory."""
    family, options, quantise = MODELS[request.param]
    folder = make_checkpoint(tmp_path, family, **{"eos_token_id": None, **options})
    config = parse_config(json.loads((folder / "config.json").read_text()), request.param)
    quantisation = None if quantise is None else replace(rounded(quantise), packed=True)
    return folder, replace(config, quantisation=quantisation)


def folded(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> tuple[ShardWeights, ShardWeights]:
    """All weights as they are, and with folded scales."""
    plain, scaled = (load_shard(folder, config, Shard(0, config.num_layers, True, True), CPU, dtype) for _ in range(2))
    for layer in scaled.layers:
        fold_scales(layer, config)
    return plain, scaled


def test_folding_changes_no_digit(model: tuple[Path, ModelConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = model
    ids = np.random.default_rng(1).integers(320, size=60).tolist()
    before = Whole(folder, config).logits(ids, len(ids))
    read = load_shard

    def read_and_fold(*arguments: object) -> ShardWeights:
        weights = read(*arguments)
        for layer in weights.layers:
            fold_scales(layer, config)
        return weights

    monkeypatch.setattr("test_families.load_shard", read_and_fold)
    assert torch.equal(Whole(folder, config).logits(ids, len(ids)), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_input_makes_keys_or_values_too_large(model: tuple[Path, ModelConfig], dtype: torch.dtype) -> None:
    """Not even the worst one: a normed hidden state along the weights of an output."""
    folder, config = model
    for layer in folded(folder, config, dtype)[1].layers:
        qkv = layer.attention.qkv
        weights = qkv(torch.eye(config.hidden_size, dtype=dtype)).T  # [out, in], and the bias
        bias = 0 if qkv.bias is None else qkv.bias.unsqueeze(1)
        gain = layer.input_norm.float() + int(config.norm_offset)
        along = (weights - bias).float() * gain
        worst = along * math.sqrt(config.hidden_size) / along.norm(dim=1, keepdim=True)
        worst = torch.cat([worst, -worst])
        out = qkv((worst * gain).to(dtype)).float()
        if config.clip_qkv is not None:
            out = out.clamp(-config.clip_qkv, config.clip_qkv)
        keys, values = out[:, config.q_size :].split(config.kv_size, 1)
        if layer.attention.k_norm is not None:
            width = config.kv_size if config.wide_qk_norm else config.head_dim
            heads = keys.unflatten(1, (-1, width))
            unit = heads * math.sqrt(width) / heads.norm(dim=-1, keepdim=True)
            keys = (unit * (layer.attention.k_norm.float() + int(config.norm_offset))).flatten(1)
        for part in (keys, values):
            largest = float(part.abs().max())
            as_they_are = config.norm_offset or config.clip_qkv is not None  # scales are not fitted to the largest
            assert LARGEST / 64 < largest < LARGEST * 1.03 or as_they_are  # beyond 464 lies NaN
            assert not part.to(torch.float8_e4m3fn).isnan().any()


def test_scales_that_cannot_be_told_apart_are_refused() -> None:
    weight = Form("fp8", None, None).quantise(torch.randn(6, 4))
    with pytest.raises(UserError, match=r"kvcache\.dtype=fp8: .* set model\.packed=false"):
        PackedLinear([weight]).scaled([(4, 2.0), (2, 0.5)])
    assert torch.equal(PackedLinear([weight]).scaled([(4, 2.0), (2, 2.0)]).parts[0].scale, 2 * weight.scale)


def test_a_layer_of_zeros_stays(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, std=0.0)
    config = parse_config(json.loads((folder / "config.json").read_text()), "zeros")
    plain, scaled = folded(folder, config)
    assert torch.equal(plain.layers[0].attention.qkv.weight, scaled.layers[0].attention.qkv.weight)
