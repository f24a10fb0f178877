"""The shape of a model, read from a Hugging Face `config.json`."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from deserve.errors import UserError
from deserve.kvcache.spec import KVSpec
from deserve.model.keys import Keys
from deserve.model.schemes.base import Quantisation
from deserve.model.schemes.parse import parse_quantisation

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context; only the fields of its `kind` count.

    `original_context` is the context in tokens before stretching. `attention_factor` multiplies cos and sin.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_context: int = 0  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole dimensions bound the ramp


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls the parts of a mixture of experts. `module`: within a layer; the rest: within that."""

    module: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class ExpertConfig:
    """A mixture of experts: `count` MLPs of `intermediate_size`, of which a router picks `active` for each token.

    The picked experts' weights are the router's softmax over all experts or, if `normalised`, over the picked ones.
    dense_layers: the layers that have one MLP instead, of ModelConfig.intermediate_size.
    """

    count: int
    active: int
    intermediate_size: int
    normalised: bool
    dense_layers: tuple[int, ...]
    names: ExpertNames

    def touched(self, tokens: float) -> float:
        """Experts that `tokens` tokens need among them, if their router picks evenly."""
        return self.count * (1 - (1 - self.active / self.count) ** tokens)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. Sizes are counts of elements, `max_context` is in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_context: int
    rope_theta: float
    rope_scaling: RopeScaling
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: torch.dtype
    quantisation: Quantisation | None = None
    experts: ExpertConfig | None = None
    wide_qk_norm: bool = False  # the norms of queries and keys span all heads
    clip_qkv: float | None = None  # queries, keys and values are clamped to -clip_qkv..clip_qkv

    @property
    def q_size(self) -> int:
        """Elements of one token's queries."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys, and of its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    def experts_of(self, layer: int) -> ExpertConfig | None:
        """The mixture of experts in `layer`; None: it has an MLP."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    @property
    def activated_size(self) -> int:
        """Elements that a token takes between the products of an MLP, in the layer where they are most."""
        sizes = (self.experts_of(layer) for layer in range(self.num_layers))
        return max(each.active * each.intermediate_size if each else self.intermediate_size for each in sizes)

    def kv_spec(self, dtype: torch.dtype) -> KVSpec:
        """What a layer keeps of a token, as `dtype`."""
        return KVSpec(self.num_kv_heads, self.head_dim, dtype)


@dataclass(frozen=True)
class _Family:
    """What an architecture's code decides, beyond what its `config.json` says."""

    qkv_bias: bool = False  # always there
    attention_bias: bool = False  # `attention_bias` is read: it covers q, k, v and the output
    mlp_bias: bool = False  # `mlp_bias` is read
    qk_norm: bool = False
    wide_qk_norm: bool = False
    experts: ExpertNames | None = None
    dense_layers: bool = False  # some layers may have an MLP, and its size is not that of experts
    normalised: bool = False  # experts' weights add up to 1, whatever `norm_topk_prob` says
    rope_theta: float = 10000.0  # where config.json has none


FAMILIES = {
    "LlamaForCausalLM": _Family(attention_bias=True, mlp_bias=True),
    "MistralForCausalLM": _Family(),
    "Qwen2ForCausalLM": _Family(qkv_bias=True),
    "Qwen3ForCausalLM": _Family(attention_bias=True, qk_norm=True),
    "MixtralForCausalLM": _Family(
        experts=ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2"), normalised=True, rope_theta=1e6
    ),
    "Qwen3MoeForCausalLM": _Family(attention_bias=True, qk_norm=True, experts=ExpertNames(), dense_layers=True),
    "OlmoeForCausalLM": _Family(attention_bias=True, qk_norm=True, wide_qk_norm=True, experts=ExpertNames()),
}


def parse_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """Read the content of a `config.json`; `source` names it in errors (a file or an option).

    Raises UserError, naming the source and the key, for a missing or ill-typed key and for whatever this
    project would not compute as the model was trained: another architecture or activation, an unknown kind of
    rope, quantised weights, a sliding window shorter than the context.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{source}: must hold a JSON object, not {type(raw).__name__}")
    keys = Keys(raw, source)
    architecture = _architecture(keys)
    family = FAMILIES[architecture]
    heads = keys.count("num_attention_heads")
    kv_heads = keys.count("num_key_value_heads", default=heads)
    hidden = keys.count("hidden_size")
    head_dim = keys.count("head_dim", default=max(1, hidden // heads))
    if heads % kv_heads:
        raise keys.fail("num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})")
    if raw.get("head_dim") is None and hidden % heads:
        raise keys.fail("hidden_size", f"({hidden}) must be a multiple of num_attention_heads ({heads})")
    if head_dim % 2:
        raise keys.fail("head_dim", f"({head_dim}) must be even")
    max_context = keys.count("max_position_embeddings")
    theta, scaling = _rope(keys, max_context, family.rope_theta)
    # A checkpoint stretched by hand, as Qwen's cards advise, still states the context before
    if scaling.kind == "yarn":
        max_context = max(max_context, int(scaling.original_context * scaling.factor))
    _refuse_unsupported(keys, architecture, max_context)
    attention_bias = family.attention_bias and keys.flag("attention_bias")
    inner = keys.count("intermediate_size")
    config = ModelConfig(
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=keys.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=keys.number("rms_norm_eps"),
        max_context=max_context,
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=keys.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family.mlp_bias and keys.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        dtype=_dtype(keys),
        experts=_experts(keys, family),
        wide_qk_norm=family.wide_qk_norm,
        clip_qkv=keys.number("clip_qkv") if keys.raw.get("clip_qkv") is not None else None,
    )
    q, kv = config.q_size, config.kv_size
    inners = {each.intermediate_size if each else inner for each in map(config.experts_of, range(config.num_layers))}
    products = [shape for size in sorted(inners) for shape in ((size, hidden), (hidden, size))]
    shapes = [(q, hidden), (kv, hidden), (hidden, q), *products]
    return replace(config, quantisation=parse_quantisation(keys, shapes))


def _architecture(keys: Keys) -> str:
    names = keys.raw.get("architectures")
    if names is None:
        raise keys.fail("architectures", "is missing")
    if not (isinstance(names, list) and len(names) == 1 and names[0] in [*FAMILIES]):
        raise keys.fail("architectures", f"{names!r} is not supported; supported are {', '.join(FAMILIES)}")
    return str(names[0])


def _experts(keys: Keys, family: _Family) -> ExpertConfig | None:
    """The mixture of experts, if the family has one."""
    if family.experts is None:
        return None
    key = "num_experts" if keys.raw.get("num_experts") is not None else "num_local_experts"
    count, active = keys.count(key), keys.count("num_experts_per_tok")
    if active > count:
        raise keys.fail("num_experts_per_tok", f"({active}) must not be more than {key} ({count})")
    inner, dense = keys.count("intermediate_size"), set[int]()
    if family.dense_layers:
        inner = keys.count("moe_intermediate_size")
        layers, step = keys.count("num_hidden_layers"), keys.count("decoder_sparse_step", default=1)
        dense = keys.indices("mlp_only_layers", layers) | {layer for layer in range(layers) if (layer + 1) % step}
    normalised = family.normalised or keys.flag("norm_topk_prob")
    return ExpertConfig(count, active, inner, normalised, tuple(sorted(dense)), family.experts)


def _dtype(keys: Keys) -> torch.dtype:
    key = "dtype" if keys.raw.get("dtype") is not None else "torch_dtype"  # transformers 5, and before
    name = keys.text(key, default="float32").removeprefix("torch.")
    if name not in DTYPES:
        raise keys.fail(key, f"{name!r} is not supported; supported are {', '.join(DTYPES)}")
    return DTYPES[name]


def _refuse_unsupported(keys: Keys, architecture: str, max_context: int) -> None:
    raw = keys.raw
    activation = keys.text("hidden_act", default="silu")
    if activation != "silu":
        raise keys.fail("hidden_act", f"{activation!r} is not supported; only silu is")
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        # Absent is not null: without the key, transformers' Mistral slides over 4,096 tokens; its Mixtral does not.
        full = raw.get("sliding_window", 0 if architecture == "MistralForCausalLM" else None) is None
        window = max_context if full else keys.count("sliding_window", default=4096)
        if window < max_context:
            raise keys.fail("sliding_window", f"({window}) is not supported; only null, full attention, is")
    elif architecture.startswith("Qwen") and keys.flag("use_sliding_window"):
        # As in transformers: the layers from max_window_layers on slide, unless layer_types says what each does.
        first = keys.count("max_window_layers", default=28, least=0) if architecture != "Qwen3MoeForCausalLM" else 0
        none = raw.get("layer_types") is not None or first >= keys.count("num_hidden_layers")
        full = "sliding_window" in raw and raw["sliding_window"] is None
        window = max_context if none or full else keys.count("sliding_window", default=4096)
        if window < max_context:
            raise keys.fail(
                "use_sliding_window",
                f"is not supported: layers from {first} on (max_window_layers) attend to {window} tokens only",
            )
    others = sorted({str(kind) for kind in raw.get("layer_types") or ()} - {"full_attention"})
    if others and architecture.startswith("Qwen"):
        raise keys.fail("layer_types", f"{', '.join(others)} is not supported; only full_attention is")


def _rope(keys: Keys, max_context: int, default_theta: float) -> tuple[float, RopeScaling]:
    """The base of the rotary frequencies and their scaling, from the keys of transformers 5 or before."""
    name = "rope_parameters" if keys.raw.get("rope_parameters") is not None else "rope_scaling"
    raw = keys.raw.get(name)
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise keys.fail(name, f"must be an object, not {raw!r}")
    rope = Keys(raw, keys.source, f"{name}.")
    theta = rope.number("rope_theta", default=keys.number("rope_theta", default=default_theta))
    for owner in (keys, rope):
        if owner.number("partial_rotary_factor", default=1.0) != 1.0:
            raise owner.fail("partial_rotary_factor", "is not supported; only 1, the whole head, is")
    kind_key = "rope_type" if raw.get("rope_type") is not None else "type"
    kind = rope.text(kind_key, default="default")
    if kind not in ROPE_KINDS:
        raise rope.fail(kind_key, f"{kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling(kind, rope.number("factor"))
    # as transformers orders them: beside the rope keys, among them, or the whole context
    original = rope.count("original_max_position_embeddings", default=max_context)
    original = keys.count("original_max_position_embeddings", default=original)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.fail("high_freq_factor", f"({high}) must be more than low_freq_factor ({low})")
        return theta, RopeScaling(kind, rope.number("factor"), low, high, original)
    factor = rope.number("factor", default=max_context / original)
    return theta, RopeScaling(
        kind,
        factor,
        original_context=original,
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        attention_factor=_yarn_attention_factor(rope, factor),
        truncate=rope.flag("truncate", default=True),
    )


def _yarn_attention_factor(rope: Keys, factor: float) -> float:
    """YaRN's sqrt(1/t) = 0.1 ln(s) + 1 (arXiv 2309.00071, section 3.4), or the checkpoint's word."""

    def temper(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    default = temper(1.0)
    if rope.raw.get("mscale") and rope.raw.get("mscale_all_dim"):
        default = temper(rope.number("mscale")) / temper(rope.number("mscale_all_dim"))
    return rope.number("attention_factor", default=default)
