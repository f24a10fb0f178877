"""The weights of one stage: read from safetensors, or random ones of the right shape.

One table, `layer_parts`, says what a layer is made of and how a checkpoint names it; reading, inventing and measuring a
shard all follow it.
"""

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deserve.errors import UserError
from deserve.layout import Shard
from deserve.model.config import ExpertConfig, ModelConfig
from deserve.model.layer import MLP, Attention, Experts, Layer
from deserve.model.linear import ExpertLinear, Linear, LinearSpec, Parts, Source, TensorSpec
from deserve.model.packed import Packed, PackedLinear
from deserve.model.safetensors_folder import SafetensorsFolder, Shape
from deserve.model.schemes.base import Quantisation, Scheme
from deserve.model.schemes.mxfp4 import MXFP4

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
DEVIATION = 0.02  # of random weights
OTHER_MODES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")  # of a model that reads images too


@dataclass
class ShardWeights:
    """The weights of a stage.

    embedding: `[vocab, hidden]`; final_norm: `[hidden]`; None: held by another stage. With tied embeddings on one
    stage, `head` multiplies with `embedding`.
    """

    layers: list[Layer]
    embedding: Tensor | None
    final_norm: Tensor | None
    head: Linear | PackedLinear | None


Spec = TensorSpec | LinearSpec


def layer_parts(config: ModelConfig, index: int) -> dict[str, Spec]:
    """What makes up layer `index`, as a checkpoint names it."""
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    layer = f"model.layers.{index}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    qkv: tuple[tuple[str, int], ...] = (
        (f"{attention}.q_proj", q),
        (f"{attention}.k_proj", kv),
        (f"{attention}.v_proj", kv),
    )
    gate_up: tuple[tuple[str, int], ...] = ((f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner))
    if config.fused_projections:
        qkv, gate_up = ((f"{attention}.qkv_proj", q + 2 * kv),), ((f"{mlp}.gate_up_proj", 2 * inner),)
    post_norm = "pre_feedforward" if config.norms_after else "post_attention"
    table: dict[str, Spec] = {
        "input_norm": TensorSpec(f"{layer}.input_layernorm.weight", (hidden,)),
        "qkv": LinearSpec(qkv, hidden, config.qkv_bias, config.quantisation),
        "output": LinearSpec(((f"{attention}.o_proj", hidden),), q, config.output_bias, config.quantisation),
        "post_norm": TensorSpec(f"{layer}.{post_norm}_layernorm.weight", (hidden,)),
    }
    if config.qk_norm:
        for name, size in (("q_norm", q), ("k_norm", kv)):
            shape = (size if config.wide_qk_norm else config.head_dim,)
            table[name] = TensorSpec(f"{attention}.{name}.weight", shape)
    if config.attention_sinks:
        table["sinks"] = TensorSpec(f"{attention}.sinks", (config.num_heads,))
    if config.norms_after:
        for name, stored in (("attention_norm", "post_attention"), ("mlp_norm", "post_feedforward")):
            table[name] = TensorSpec(f"{layer}.{stored}_layernorm.weight", (hidden,))
    experts = config.experts_of(index)
    if experts is not None:
        return table | expert_parts(config, experts, layer)
    table["gate_up"] = LinearSpec(gate_up, hidden, config.mlp_bias, config.quantisation)
    table["down"] = LinearSpec(((f"{mlp}.down_proj", hidden),), inner, config.mlp_bias, config.quantisation)
    return table


def expert_parts(config: ModelConfig, experts: ExpertConfig, layer: str) -> dict[str, Spec]:
    """What takes the place of an MLP in `layer`. Routers are not quantised, whatever a checkpoint says."""
    names, hidden, inner = experts.names, config.hidden_size, experts.intermediate_size
    block, count = f"{layer}.{names.module}", experts.count
    router = LinearSpec(((f"{block}.{names.router}", count),), hidden, names.fused)
    if names.fused:
        return {
            "router": router,
            **_fused_parts(config, f"{block}.experts", "gate_up", count, 2 * inner, hidden),
            **_fused_parts(config, f"{block}.experts", "down", count, hidden, inner),
        }
    each = [f"{block}.experts.{number}" for number in range(count)]
    gate_up = tuple((f"{expert}.{name}", inner) for expert in each for name in (names.gate, names.up))
    down = tuple((f"{expert}.{names.down}", hidden) for expert in each)
    return {
        "router": router,
        "gate_up": LinearSpec(gate_up, hidden, False, config.quantisation, count),
        "down": LinearSpec(down, inner, False, config.quantisation, count),
    }


def _fused_parts(config: ModelConfig, module: str, part: str, count: int, size: int, inputs: int) -> dict[str, Spec]:
    """The weights [count, size, inputs] of all experts of `module` and their biases."""
    name = f"{part}_proj"
    weight: Spec = TensorSpec(f"{module}.{name}", (count, inputs, size))  # as it is stored, unless it is quantised
    if config.quantisation is not None and config.quantisation.scheme(module) is not None:
        quantisation = Quantisation(((re.escape(module), MXFP4(name, count)),))
        weight = LinearSpec(((module, count * size),), inputs, False, quantisation, count)
    return {part: weight, f"{part}_bias": TensorSpec(f"{module}.{name}_bias", (count, size))}


def shard_parts(config: ModelConfig, shard: Shard) -> dict[str, Spec]:
    """The same for what is not a layer; a tied head beside its embedding needs nothing of its own."""
    table: dict[str, Spec] = {}
    if shard.embeds:
        table["embedding"] = TensorSpec(EMBEDDING, (config.vocab_size, config.hidden_size))
    if shard.outputs:
        table["final_norm"] = TensorSpec(FINAL_NORM, (config.hidden_size,))
        if not (shard.embeds and config.tied_embeddings):
            name = EMBEDDING if config.tied_embeddings else HEAD
            module = (name.removesuffix(".weight"), config.vocab_size)
            quantisation = None if config.tied_embeddings else config.quantisation
            table["head"] = LinearSpec((module,), config.hidden_size, quantisation=quantisation)
    return table


def _specs(config: ModelConfig, shard: Shard) -> list[Spec]:
    tables = [shard_parts(config, shard), *(layer_parts(config, index) for index in range(shard.first, shard.last))]
    return [spec for table in tables for spec in table.values()]


def _linears(config: ModelConfig, shard: Shard) -> list[LinearSpec]:
    return [spec for spec in _specs(config, shard) if isinstance(spec, LinearSpec)]


def tensor_shapes(config: ModelConfig, shard: Shard) -> dict[str, Shape]:
    """Every checkpoint tensor that a shard reads, once, with its shape."""
    return dict(part for spec in _specs(config, shard) for parts in spec.parts.values() for part in parts)


def parameter_bytes(config: ModelConfig, shard: Shard, dtype: torch.dtype) -> int:
    """Bytes of a shard's weights on its device."""
    return sum(spec.bytes(dtype) for spec in _specs(config, shard))


def unpack_bytes(config: ModelConfig, shard: Shard, dtype: torch.dtype) -> int:
    """Bytes that a visit moves to unpack a shard's quantised weights."""
    return sum(linear.unpack_bytes(dtype) for linear in _linears(config, shard))


def layer_kinds(config: ModelConfig, dtype: torch.dtype) -> tuple[int, ...]:
    """Of each layer, its kind, numbered in the order of the first of each.

    Layers of a kind have parts of equal bytes, and all of them have a window or none has.
    """
    kinds: dict[Any, int] = {}

    def kind(index: int) -> int:
        parts = [
            (part, spec.bytes(dtype), isinstance(spec, LinearSpec) and spec.unpack_bytes(dtype))
            for part, spec in layer_parts(config, index).items()
        ]
        return kinds.setdefault((bool(config.sliding(index, index + 1)), *parts), len(kinds))

    return tuple(map(kind, range(config.num_layers)))


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
    biases = {name for linear in _linears(config, shard) for name in linear.spare if name.endswith(".bias")}
    for name in sorted(biases & stored.weight_map.keys()):
        if stored.tensor(name, torch.device("cpu")).any():
            raise UserError(f"{stored.source}: {name} is not 0, and config.json calls for no bias")
    return _build(config, shard, _Stored(device, dtype, stored, names))


def dummy_shard(
    config: ModelConfig, shard: Shard, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> ShardWeights:
    """Random weights made on `device`; any partition of one (seed, dtype, device type) is the same model."""
    return _build(config, shard, _Random(device, dtype, seed, spread=config.experts is not None))


def fill_dummy(name: str, target: Tensor, seed: int) -> None:
    """Fill the checkpoint tensor `name`: 1 for the weight of a norm, otherwise normal with deviation 0.02."""
    if name.endswith("norm.weight"):
        target.fill_(1.0)
        return
    # A generator per tensor, seeded by its name: what it holds cannot depend on what else the rank holds.
    generator = torch.Generator(target.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    target.normal_(0.0, DEVIATION, generator=generator)


def stored_name(name: str, weight_map: Container[str], config: ModelConfig) -> str:
    """The name a tensor goes by in the checkpoint: a tied matrix may have been kept as the head's alone.

    The text model of a multimodal one has a prefix, another one since transformers 5. A scale of fp8 weights has two
    names: that of DeepSeek, and that of AutoFP8.
    """
    if config.multimodal:
        for prefixed in (f"language_model.{name}", name.replace("model.", "model.language_model.", 1)):
            if prefixed in weight_map:
                return prefixed
    scale = name.removesuffix("_inv")
    if name.endswith(".weight_scale_inv") and name not in weight_map and scale in weight_map:
        return scale
    only_head = config.tied_embeddings and name == EMBEDDING and name not in weight_map and HEAD in weight_map
    return HEAD if only_head else name


def _check(stored: SafetensorsFolder, config: ModelConfig, files: set[str]) -> None:
    everything = Shard(0, config.num_layers, True, True)
    whole = tensor_shapes(config, everything)
    expected = {stored_name(name, stored.weight_map, config): shape for name, shape in whole.items()}
    twice = config.tied_embeddings and {EMBEDDING, HEAD} <= stored.weight_map.keys()
    together = next((name for name in sorted(stored.weight_map) if name.endswith(".experts.gate_up_proj")), None)
    if together and config.experts and not config.experts.names.fused:
        raise UserError(
            f"{stored.source}: {together} holds all experts of a layer, which is read of gpt-oss alone: load the model "
            "with transformers and save_pretrained it with save_original_format=True"
        )
    kinds: dict[str, tuple[str, ...]] = {}
    spare = {HEAD} if twice else set()
    if config.multimodal:
        spare |= {name for name in stored.weight_map if OTHER_MODES.match(name)}
    for linear in _linears(config, everything):
        kinds |= {stored_name(name, stored.weight_map, config): types for name, types in linear.kinds.items()}
        spare |= linear.spare
    stored.check(expected, files, spare, kinds)
    # transformers reads such a head as one of its own.
    if twice and {stored.weight_map[EMBEDDING], stored.weight_map[HEAD]} <= files and not stored.equal(EMBEDDING, HEAD):
        raise UserError(
            f"{stored.source}: {HEAD} differs from {EMBEDDING}, though config.json ties them: set "
            "tie_word_embeddings=false there"
        )


@dataclass(frozen=True)
class _Source(ABC):
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def fill(self, name: str, target: Tensor) -> None:
        """Put the tensor of that name into `target`, and convert its type."""

    def empty(self, shape: Shape) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def stack(self, parts: Parts) -> Tensor:
        stacked = self.empty((sum(shape[0] for _, shape in parts), *parts[0][1][1:]))
        start = 0
        for name, shape in parts:
            self.fill(name, stacked[start : start + shape[0]])
            start += shape[0]
        return stacked


@dataclass(frozen=True)
class _Stored(_Source):
    """A checkpoint. `names`: the names there of the tensors that a shard reads."""

    folder: SafetensorsFolder
    names: dict[str, str]

    def fill(self, name: str, target: Tensor) -> None:
        self.folder.read(self.names[name], target)

    def packed(self, scheme: Scheme, module: str, size: int, inputs: int) -> Packed:
        stored = scheme.stored(size, inputs)
        tensors = {suffix: self.folder.tensor(self.names[f"{module}.{suffix}"], self.device) for suffix in stored}
        try:
            return scheme.pack(tensors)
        except ValueError as error:
            raise UserError(f"{self.folder.source}: {module}: {error}") from error


@dataclass(frozen=True)
class _Random(_Source):
    """spread: whether routers must pick evenly among experts."""

    seed: int
    spread: bool

    def fill(self, name: str, target: Tensor) -> None:
        fill_dummy(name, target, self.seed)
        if self.spread and name == EMBEDDING:
            # Tokens whose embeddings are small are soon all alike, as attention adds the same to each.
            target.div_(DEVIATION)

    def packed(self, scheme: Scheme, module: str, size: int, inputs: int) -> Packed:
        return scheme.form.quantise(self.stack(((f"{module}.weight", (size, inputs)),)))


def _build(config: ModelConfig, shard: Shard, source: Source) -> ShardWeights:
    def read(table: dict[str, Spec]) -> dict[str, Any]:
        return {name: spec.read(source) for name, spec in table.items()}

    rest = read(shard_parts(config, shard))
    layers = []
    for index in range(shard.first, shard.last):
        made = read(layer_parts(config, index))
        qk_norms = made.get("q_norm"), made.get("k_norm")
        kind, sinks = config.layer_kinds[index], made.get("sinks")
        attention = Attention(made["qkv"], made["output"], *qk_norms, kind, sinks)
        experts = config.experts_of(index)
        mlp: MLP | Experts
        if experts is None:
            mlp = MLP(made["gate_up"], made["down"], config.activation == "gelu_tanh")
        else:
            products = (_expert_linear(made[part], made.get(f"{part}_bias")) for part in ("gate_up", "down"))
            mlp = Experts(experts, made["router"], *products)
        after = made.get("attention_norm"), made.get("mlp_norm")
        layers.append(Layer(made["input_norm"], attention, made["post_norm"], mlp, *after))
    embedding, head = rest.get("embedding"), rest.get("head")
    if shard.outputs and embedding is not None and head is None:
        head = Linear(embedding)
    return ShardWeights(layers, embedding, rest.get("final_norm"), head)


def _expert_linear(weight: Tensor | ExpertLinear, bias: Tensor | None) -> ExpertLinear:
    """`weight`, or one [experts, in, out], with a bias [experts, out]."""
    stacked = weight.transpose(1, 2) if isinstance(weight, Tensor) else weight.weight
    return ExpertLinear(stacked, bias)
