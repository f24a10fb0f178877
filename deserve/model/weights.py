"""The weights of one stage: read from safetensors, or random ones of the right shape.

One table, `layer_parts`, says which tensors of a checkpoint make up which fused weight; reading, inventing
and measuring a shard all follow it.
"""

import math
import zlib
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deserve.errors import UserError
from deserve.model.config import ModelConfig
from deserve.model.safetensors_folder import SafetensorsFolder, Shape

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

Parts = tuple[tuple[str, Shape], ...]  # checkpoint tensors and their shapes, stacked along dimension 0
Fill = Callable[[str, Tensor], None]  # puts the checkpoint's tensor of that name into the given one


@dataclass(frozen=True)
class Shard:
    """What a stage holds: layers `first` to `last` (exclusive), the embedding, the output head."""

    first: int
    last: int
    embeds: bool
    outputs: bool


@dataclass
class LayerWeights:
    """One decoder layer; products are `x @ weight.T`.

    input_norm, post_norm: `[hidden]`; qkv: `[q_size + 2 * kv_size, hidden]`, rows q, k, v;
    output: `[hidden, q_size]`; gate_up: `[2 * intermediate, hidden]`, rows gate, up;
    down: `[hidden, intermediate]`. A bias is as long as its weight has rows; q_norm, k_norm: `[head_dim]`.
    None: the model has none.
    """

    input_norm: Tensor
    qkv: Tensor
    output: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass
class ShardWeights:
    """The weights of a stage.

    embedding and head: `[vocab, hidden]`; final_norm: `[hidden]`; None: held by another stage. With tied
    embeddings on one stage, `head` is the very tensor `embedding`.
    """

    layers: list[LayerWeights]
    embedding: Tensor | None
    final_norm: Tensor | None
    head: Tensor | None


def layer_parts(config: ModelConfig, index: int) -> dict[str, Parts]:
    """Which checkpoint tensors make up each field of layer `index`'s LayerWeights."""
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size

    def parts(suffix: str, *tensors: tuple[str, Shape]) -> Parts:
        return tuple((f"model.layers.{index}.{name}.{suffix}", shape) for name, shape in tensors)

    def linear(bias: bool, columns: int, *rows: tuple[str, int]) -> Parts:
        if bias:
            return parts("bias", *((name, (count,)) for name, count in rows))
        return parts("weight", *((name, (count, columns)) for name, count in rows))

    qkv = (("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv))
    output = ("self_attn.o_proj", hidden)
    gate_up = (("mlp.gate_proj", inner), ("mlp.up_proj", inner))
    down = ("mlp.down_proj", hidden)
    table = {
        "input_norm": parts("weight", ("input_layernorm", (hidden,))),
        "qkv": linear(False, hidden, *qkv),
        "output": linear(False, q, output),
        "post_norm": parts("weight", ("post_attention_layernorm", (hidden,))),
        "gate_up": linear(False, hidden, *gate_up),
        "down": linear(False, inner, down),
    }
    if config.qkv_bias:
        table["qkv_bias"] = linear(True, hidden, *qkv)
    if config.output_bias:
        table["output_bias"] = linear(True, q, output)
    if config.mlp_bias:
        table["gate_up_bias"] = linear(True, hidden, *gate_up)
        table["down_bias"] = linear(True, inner, down)
    if config.qk_norm:
        table["q_norm"] = parts("weight", ("self_attn.q_norm", (config.head_dim,)))
        table["k_norm"] = parts("weight", ("self_attn.k_norm", (config.head_dim,)))
    return table


def shard_parts(config: ModelConfig, shard: Shard) -> dict[str, Parts]:
    """The same for what is not a layer: the fields of ShardWeights that this shard holds."""
    table: dict[str, Parts] = {}
    matrix = (config.vocab_size, config.hidden_size)
    if shard.embeds:
        table["embedding"] = ((EMBEDDING, matrix),)
    if shard.outputs:
        table["final_norm"] = ((FINAL_NORM, (config.hidden_size,)),)
        table["head"] = ((EMBEDDING if config.tied_embeddings else HEAD, matrix),)
    return table


def tensor_shapes(config: ModelConfig, shard: Shard) -> dict[str, Shape]:
    """Every checkpoint tensor that a shard reads, once, with its shape."""
    tables = [shard_parts(config, shard)]
    tables += [layer_parts(config, index) for index in range(shard.first, shard.last)]
    return {name: shape for table in tables for parts in table.values() for name, shape in parts}


def parameter_bytes(config: ModelConfig, shard: Shard, dtype: torch.dtype) -> int:
    """Bytes of a shard's weights on its device."""
    return sum(math.prod(shape) for shape in tensor_shapes(config, shard).values()) * dtype.itemsize


def check_weights(folder: Path, config: ModelConfig, fetched: bool = True) -> None:
    """Check that a folder of safetensors holds the tensors of `config` and no others; reads headers alone.

    Unless all of them are `fetched`, files may be missing, and what they hold is checked by `load_shard`.
    Raises UserError, naming the file and the tensor, as `SafetensorsFolder.check` does, and for an output head that
    is said to be tied to the embedding but differs from it.
    """
    stored = SafetensorsFolder(folder)
    files = set(stored.weight_map.values())
    _check(stored, config, files if fetched else {file for file in files if (folder / file).is_file()})


def load_shard(
    folder: Path, config: ModelConfig, shard: Shard, device: torch.device, dtype: torch.dtype
) -> ShardWeights:
    """Read a shard's tensors, and no others, from a folder of safetensors into fused weights on `device`.

    Raises UserError as `check_weights` does, before reading any tensor, but only for the files that hold the shard's.
    """
    stored = SafetensorsFolder(folder)
    names = {name: stored_name(name, stored.weight_map, config) for name in tensor_shapes(config, shard)}
    _check(stored, config, {stored.weight_map[name] for name in names.values() if name in stored.weight_map})
    return _build(config, shard, device, dtype, lambda name, target: stored.read(names[name], target))


def dummy_shard(
    config: ModelConfig, shard: Shard, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> ShardWeights:
    """Random weights made on `device`; any partition of one (seed, dtype, device type) is the same model."""
    return _build(config, shard, device, dtype, lambda name, target: fill_dummy(name, target, seed))


def fill_dummy(name: str, target: Tensor, seed: int) -> None:
    """Fill the checkpoint tensor `name`: 1 for the weight of a norm, otherwise normal with deviation 0.02."""
    if name.endswith("norm.weight"):
        target.fill_(1.0)
        return
    # A generator per tensor, seeded by its name: what it holds cannot depend on what else the rank holds.
    generator = torch.Generator(target.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    target.normal_(0.0, 0.02, generator=generator)


def stored_name(name: str, weight_map: Container[str], config: ModelConfig) -> str:
    """The name a tensor goes by in the checkpoint: a tied matrix may have been kept as the head's alone."""
    only_head = config.tied_embeddings and name == EMBEDDING and name not in weight_map and HEAD in weight_map
    return HEAD if only_head else name


def _check(stored: SafetensorsFolder, config: ModelConfig, files: set[str]) -> None:
    whole = tensor_shapes(config, Shard(0, config.num_layers, True, True))
    expected = {stored_name(name, stored.weight_map, config): shape for name, shape in whole.items()}
    twice = config.tied_embeddings and {EMBEDDING, HEAD} <= stored.weight_map.keys()
    stored.check(expected, files, spare={HEAD} if twice else ())
    # transformers reads such a head as one of its own.
    if twice and {stored.weight_map[EMBEDDING], stored.weight_map[HEAD]} <= files and not stored.equal(EMBEDDING, HEAD):
        raise UserError(
            f"{stored.source}: {HEAD} differs from {EMBEDDING}, though config.json ties them: set "
            "tie_word_embeddings=false there"
        )


def _build(config: ModelConfig, shard: Shard, device: torch.device, dtype: torch.dtype, fill: Fill) -> ShardWeights:
    def fuse(parts: Parts) -> Tensor:
        rows = sum(shape[0] for _, shape in parts)
        fused = torch.empty((rows, *parts[0][1][1:]), dtype=dtype, device=device)
        start = 0
        for name, shape in parts:
            fill(name, fused[start : start + shape[0]])
            start += shape[0]
        return fused

    table = shard_parts(config, shard)
    embedding = fuse(table["embedding"]) if shard.embeds else None
    layers = [
        LayerWeights(**{field: fuse(parts) for field, parts in layer_parts(config, index).items()})
        for index in range(shard.first, shard.last)
    ]
    if not shard.outputs:
        return ShardWeights(layers, embedding, None, None)
    shared = embedding if config.tied_embeddings else None
    head = fuse(table["head"]) if shared is None else shared
    return ShardWeights(layers, embedding, fuse(table["final_norm"]), head)
