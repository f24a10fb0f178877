"""The weights of one stage: read from safetensors, or random ones of the right shape.

One table, `layer_parts`, says which tensors of a checkpoint make up which fused weight; reading, inventing
and measuring a shard all follow it.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deserve.errors import UserError
from deserve.model.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # anything narrower is quantised and needs scales

Shape = tuple[int, ...]
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


def load_shard(
    folder: Path, config: ModelConfig, shard: Shard, device: torch.device, dtype: torch.dtype
) -> ShardWeights:
    """Read a shard's tensors, and no others, from a folder of safetensors into fused weights on `device`.

    Raises UserError, naming the file and the tensor, for a folder without safetensors, a tensor or file that
    is missing, a shape that config.json does not promise, and a truncated or corrupt file.
    """
    return _build(config, shard, device, dtype, _Reader(folder, config).fill)


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


def read_weight_map(folder: Path) -> dict[str, str]:
    """Which file of `folder` holds which tensor: the index's word, or the content of a single file.

    Raises UserError when the folder has no safetensors or they or their index cannot be read.
    """
    index = folder / INDEX
    if not index.is_file():
        single = _single_file(folder)
        with _opened(single) as opened:
            return dict.fromkeys(opened.keys(), single.name)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot read the weight_map: {error!r}") from error


def stored_name(name: str, weight_map: dict[str, str], config: ModelConfig) -> str:
    """The name a tensor goes by in the checkpoint: a tied matrix may have been kept as the head's alone.

    Raises KeyError(name) when the checkpoint lacks it.
    """
    if config.tied_embeddings and name == EMBEDDING and name not in weight_map:
        name = HEAD if HEAD in weight_map else name
    if name not in weight_map:
        raise KeyError(name)
    return name


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


class _Reader:
    """Copies single tensors out of a folder's safetensors files."""

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder, self.config = folder, config
        self.weight_map = read_weight_map(folder)

    def fill(self, name: str, target: Tensor) -> None:
        """Copy the checkpoint's tensor `name` into `target`, converting its dtype."""
        try:
            stored = stored_name(name, self.weight_map, self.config)
        except KeyError as error:
            index = self.folder / INDEX
            source = index if index.is_file() else _single_file(self.folder)
            raise UserError(f"{source}: no tensor {name}, which config.json calls for") from error
        path = self.folder / self.weight_map[stored]
        # Opened anew for each tensor: pages of the mapped file stay in memory only as long as it is open.
        with _opened(path, stored) as opened:
            if stored not in set(opened.keys()):
                raise UserError(f"{path}: no tensor {stored}, which {INDEX} says it holds")
            header = opened.get_slice(stored)
            found, expected = list(header.get_shape()), list(target.shape)
            if found != expected:
                raise UserError(f"{path}: {stored} has shape {found}, config.json calls for {expected}")
            if header.get_dtype() not in FLOATS:
                kinds = ", ".join(FLOATS)
                raise UserError(f"{path}: {stored} holds {header.get_dtype()}, expected one of {kinds}")
            target.copy_(opened.get_tensor(stored))


@contextmanager
def _opened(path: Path, tensor: str = "its header") -> Iterator[Any]:
    """A safetensors file; whatever goes wrong with it is a UserError naming the file and the tensor."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {INDEX} says that it holds {tensor}")
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        if _is_lfs_pointer(path):
            raise UserError(f"{path}: only a pointer to the weights; `git lfs pull` fetches them") from error
        raise UserError(f"{path}: cannot read {tensor} ({error}): truncated or corrupt") from error


def _is_lfs_pointer(path: Path) -> bool:
    """Whether git put a file's address in its place, as it does where its large file storage is not installed."""
    with path.open("rb") as file:
        return file.read(20) == b"version https://git-"


def _single_file(folder: Path) -> Path:
    """The only safetensors file of a folder without index."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1 or folder / SINGLE in files:
        return folder / SINGLE if folder / SINGLE in files else files[0]
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files, but no {INDEX} to say what they hold")
    if any(folder.glob("*.bin")):
        raise UserError(f"{folder}: only .bin files; save the model as safetensors (save_pretrained does)")
    raise UserError(f"{folder}: no {SINGLE} and no {INDEX}")
