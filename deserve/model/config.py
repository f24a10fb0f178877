"""The shape of a model, read from a Hugging Face `config.json`."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deserve.errors import UserError, as_json
from deserve.kvcache.spec import KVSpec
from deserve.model.keys import Keys
from deserve.model.schemes.base import Quantisation
from deserve.model.schemes.parse import parse_quantisation

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
LAYER_TYPES = ("full_attention", "sliding_attention")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # config.json's name, and the kernels'
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first `dim` elements of a head.

    `kind` and `parameters` are those of transformers' `rope_parameters`, whose functions they go to; `context` is
    `max_position_embeddings`.
    """

    dim: int
    context: int
    theta: float = 10000.0
    kind: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def switch(self) -> int:
        """Longrope: sequences of more tokens take the long factors. 0: all take the same."""
        original: int = self.parameters["original_max_position_embeddings"] if self.kind == "longrope" else 0
        return original if original < self.context else 0


@dataclass(frozen=True)
class LayerKind:
    """What tells the attention of some layers from that of others.

    A token attends to `window` tokens, itself included; None: to all before it.
    """

    rope: Rope
    window: int | None = None


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls the parts of a mixture of experts. `module`: within a layer; the rest: within that.

    `fused`: gpt-oss's way. All experts lie in two tensors, `gate_up_proj` with gates and ups in turns and `down_proj`,
    and these and the router have biases.
    """

    module: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: bool = False


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
    clamp: tuple[float, float] | None = None  # alpha and limit of a clamped SwiGLU; None: the usual one

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
    kinds: tuple[LayerKind, ...]
    layer_kinds: tuple[int, ...]  # of each layer, its index in `kinds`
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
    fused_projections: bool = False  # a checkpoint holds q, k, v as one tensor, and gate and up as another
    scale: float = 1.0  # of attention scores
    attention_cap: float | None = None  # c of the soft cap c * tanh(score / c)
    logit_cap: float | None = None  # the same for logits
    activation: str = "silu"  # or gelu_tanh
    norm_offset: bool = False  # norms multiply by 1 + weight
    norms_after: bool = False  # attention and MLP have a norm behind them too
    embedding_scale: float = 1.0
    attention_sinks: bool = False  # each head has a score that takes its share of the softmax and has no value
    multimodal: bool = False  # the checkpoint holds more than the text model

    @property
    def rope_switch(self) -> int:
        """Sequences whose prompt is longer are rotated in another way than shorter ones. 0: one way for all."""
        return max(kind.rope.switch for kind in self.kinds)

    @property
    def window(self) -> int:
        """Tokens that the layers with a window attend to, which is the same for all of these. 0: no layer has one."""
        return max(kind.window or 0 for kind in self.kinds)

    def sliding(self, first: int, last: int) -> list[int]:
        """Which of the layers `first` to `last` (exclusive) have a window, counted from `first`."""
        kinds = self.layer_kinds[first:last]
        return [layer for layer, kind in enumerate(kinds) if self.kinds[kind].window is not None]

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

    def repeated(self, layer: int, count: int) -> "ModelConfig":
        """A model of `count` layers that are all like `layer` of this one."""
        experts, quantisation = self.experts_of(layer), self.quantisation
        return replace(
            self,
            num_layers=count,
            layer_kinds=self.layer_kinds[layer : layer + 1] * count,
            experts=experts and replace(experts, dense_layers=()),
            quantisation=quantisation and replace(quantisation, layer=layer),
        )

    @property
    def activated_size(self) -> int:
        """Elements that a token takes between the products of an MLP, in the layer where they are most."""
        sizes = (self.experts_of(layer) for layer in range(self.num_layers))
        return max(each.active * each.intermediate_size if each else self.intermediate_size for each in sizes)

    def kv_spec(self, dtype: torch.dtype, fp8: bool = False) -> KVSpec:
        """What a layer keeps of a token, as `dtype` or in `fp8`."""
        return KVSpec(self.num_kv_heads, self.head_dim, torch.float8_e4m3fn if fp8 else dtype)


@dataclass(frozen=True)
class _Family:
    """What an architecture's code decides, beyond what its `config.json` says.

    `slides`: which layers have a window. "": none; "all"; "used": all, if `use_sliding_window`; "late": from
    `max_window_layers` on, if `use_sliding_window`; "most": all but each `sliding_window_pattern`-th. `layer_types`
    overrides the last two.
    """

    qkv_bias: bool = False  # always there
    attention_bias: bool = False  # `attention_bias` is read: it covers q, k, v and the output
    mlp_bias: bool = False  # `mlp_bias` is read
    qk_norm: bool = False
    wide_qk_norm: bool = False
    experts: ExpertNames | None = None
    dense_layers: bool = False  # some layers may have an MLP, and its size is not that of experts
    normalised: bool = False  # experts' weights add up to 1, whatever `norm_topk_prob` says
    slides: str = ""
    phi: bool = False  # fused projections, rotary embedding of a part of the head, longrope by its older names
    gemma: bool = False  # norms of 1 + weight, before and after attention and MLP; scaled embeddings
    attention_cap: bool = False  # `attn_logit_softcapping` is read
    attention_sinks: bool = False
    text_config: bool = False  # the decoder's keys stand in `text_config`
    defaults: dict[str, Any] = field(default_factory=dict)  # for absent keys; null is not absent


_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA2 = _GEMMA | {
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = _GEMMA | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
}
_LATE = {"max_window_layers": 28, "sliding_window": 4096}
_GPT_OSS = {
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "sliding_window_pattern": 2,
    "attention_bias": True,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}

FAMILIES = {
    "LlamaForCausalLM": _Family(attention_bias=True, mlp_bias=True),
    "MistralForCausalLM": _Family(slides="all", defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, slides="late", defaults=_LATE),
    "Qwen3ForCausalLM": _Family(attention_bias=True, qk_norm=True, slides="late", defaults=_LATE),
    "MixtralForCausalLM": _Family(
        slides="all",
        experts=ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2"),
        normalised=True,
        defaults={"rope_theta": 1e6},
    ),
    "Qwen3MoeForCausalLM": _Family(
        attention_bias=True,
        qk_norm=True,
        slides="used",
        experts=ExpertNames(),
        dense_layers=True,
        defaults={"sliding_window": 4096},
    ),
    "OlmoeForCausalLM": _Family(attention_bias=True, qk_norm=True, wide_qk_norm=True, experts=ExpertNames()),
    "GptOssForCausalLM": _Family(
        attention_bias=True,
        slides="most",
        attention_sinks=True,
        experts=ExpertNames(router="router", fused=True),
        normalised=True,
        defaults=_GPT_OSS,
    ),
    "Phi3ForCausalLM": _Family(
        slides="all", phi=True, defaults={"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    ),
    "Gemma2ForCausalLM": _Family(attention_bias=True, slides="most", gemma=True, attention_cap=True, defaults=_GEMMA2),
    "Gemma3ForCausalLM": _Family(attention_bias=True, qk_norm=True, slides="most", gemma=True, defaults=_GEMMA3),
    "Gemma3ForConditionalGeneration": _Family(
        attention_bias=True, qk_norm=True, slides="most", gemma=True, text_config=True, defaults=_GEMMA3
    ),
}

# What a family would need beside what is there.
MISSING = {
    "Qwen2MoeForCausalLM": "shared experts",
    "Glm4MoeForCausalLM": "shared experts, routing by sigmoids with a correction",
    "DeepseekV2ForCausalLM": "multi-head latent attention, shared experts",
    "DeepseekV3ForCausalLM": "multi-head latent attention, shared experts, routing by sigmoids in groups",
    "Qwen3NextForCausalLM": "gated delta layers with a state in place of keys and values, gated attention",
    "Llama4ForConditionalGeneration": "chunked attention, shared experts",
    "MiniMaxM2ForCausalLM": "routing by sigmoids with a correction",
}


def parse_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """Read the content of a `config.json`; `source` names it in errors (a file or an option).

    Raises UserError, naming the source and the key, for a missing or ill-typed key and for whatever this
    project would not compute as the model was trained: another architecture or activation, an unknown kind of
    rope, an unknown scheme of quantised weights.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{source}: must hold a JSON object, not {type(raw).__name__}")
    whole = Keys(raw, source)
    family = FAMILIES[_architecture(whole)]
    keys = whole.within("text_config") if family.text_config else whole
    keys = Keys(family.defaults | keys.raw, source, keys.prefix)
    heads = keys.count("num_attention_heads")
    kv_heads = keys.count("num_key_value_heads", default=heads)
    hidden = keys.count("hidden_size")
    head_dim = keys.count("head_dim", default=max(1, hidden // heads))
    if heads % kv_heads:
        raise keys.fail("num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})")
    if keys.raw.get("head_dim") is None and hidden % heads:
        raise keys.fail("hidden_size", f"({hidden}) must be a multiple of num_attention_heads ({heads})")
    if head_dim % 2:
        raise keys.fail("head_dim", f"({head_dim}) must be even")
    if keys.flag("use_bidirectional_attention"):
        raise keys.fail("use_bidirectional_attention", "is not supported; only causal attention is")
    types = _layer_types(keys, family)
    ropes = {each: _rope(keys, family, head_dim, each) for each in dict.fromkeys(types)}
    max_context = keys.count("max_position_embeddings")
    # A checkpoint stretched by hand, as Qwen's cards advise, still states the context before
    for rope in ropes.values():
        if rope.kind == "yarn":
            stretched = rope.parameters["original_max_position_embeddings"] * rope.parameters["factor"]
            max_context = max(max_context, int(stretched))
    by_layer = [LayerKind(ropes[each], _window(keys, each, max_context)) for each in types]
    kinds = [kind for index, kind in enumerate(by_layer) if kind not in by_layer[:index]]
    key, only = ("hidden_activation", "gelu_pytorch_tanh") if family.gemma else ("hidden_act", "silu")
    activation = keys.one_of(key, [only], only)
    attention_bias = family.attention_bias and keys.flag("attention_bias")
    inner = keys.count("intermediate_size")
    config = ModelConfig(
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=len(types),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=keys.number("rms_norm_eps"),
        max_context=max_context,
        kinds=tuple(kinds),
        layer_kinds=tuple(kinds.index(kind) for kind in by_layer),
        tied_embeddings=keys.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family.mlp_bias and keys.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        dtype=_dtype(keys if {"dtype", "torch_dtype"} & keys.raw.keys() else whole),
        experts=_experts(keys, family),
        wide_qk_norm=family.wide_qk_norm,
        clip_qkv=keys.number("clip_qkv") if keys.raw.get("clip_qkv") is not None else None,
        fused_projections=family.phi,
        scale=(keys.number("query_pre_attn_scalar") if family.gemma else head_dim) ** -0.5,
        attention_cap=_cap(keys, "attn_logit_softcapping") if family.attention_cap else None,
        logit_cap=_cap(keys, "final_logit_softcapping") if family.gemma else None,
        activation=ACTIVATIONS[activation],
        norm_offset=family.gemma,
        norms_after=family.gemma,
        embedding_scale=hidden**0.5 if family.gemma else 1.0,
        attention_sinks=family.attention_sinks,
        multimodal=family.text_config,
    )
    q, kv = config.q_size, config.kv_size
    inners = {each.intermediate_size if each else inner for each in map(config.experts_of, range(config.num_layers))}
    shapes = [(hidden, q), *((hidden, size) for size in sorted(inners))]
    if family.phi:
        shapes += [(q + 2 * kv, hidden), (2 * inner, hidden)]
    else:
        shapes += [(q, hidden), (kv, hidden), *((size, hidden) for size in sorted(inners))]
    return replace(config, quantisation=parse_quantisation(whole, shapes))


def _architecture(keys: Keys) -> str:
    names = keys.raw.get("architectures")
    if names is None:
        raise keys.fail("architectures", "is missing")
    if not (isinstance(names, list) and len(names) == 1 and names[0] in [*FAMILIES]):
        lacks = MISSING.get(str(names[0]), "") if isinstance(names, list) and names else ""
        needs = f" ({lacks} are missing)" if lacks else ""
        raise keys.fail("architectures", f"{as_json(names)} is not supported{needs}; supported: {', '.join(FAMILIES)}")
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
    clamp = (keys.number("swiglu_alpha"), keys.number("swiglu_limit")) if family.experts.fused else None
    return ExpertConfig(count, active, inner, normalised, tuple(sorted(dense)), family.experts, clamp)


def _dtype(keys: Keys) -> torch.dtype:
    key = "dtype" if keys.raw.get("dtype") is not None else "torch_dtype"  # transformers 5, and before
    name = keys.text(key, default="float32").removeprefix("torch.")
    if name not in DTYPES:
        raise keys.fail(key, f"{as_json(name)} is not supported; supported are {', '.join(DTYPES)}")
    return DTYPES[name]


def _cap(keys: Keys, key: str) -> float | None:
    return keys.number(key) if keys.raw.get(key) is not None else None


def _layer_types(keys: Keys, family: _Family) -> tuple[str, ...]:
    """Of each layer, `full_attention` or `sliding_attention`."""
    layers = keys.count("num_hidden_layers")
    full, sliding = LAYER_TYPES
    used = keys.raw.get("sliding_window") is not None
    if family.slides in ("used", "late"):
        used = used and keys.flag("use_sliding_window")
    if family.slides in ("late", "most") and keys.raw.get("layer_types") is not None:
        types = keys.texts("layer_types")
        if others := sorted({*types} - {*LAYER_TYPES}):
            raise keys.fail("layer_types", f"{', '.join(others)} is not supported; supported: {', '.join(LAYER_TYPES)}")
        if len(types) != layers:
            raise keys.fail("layer_types", f"has {len(types)} entries, but num_hidden_layers is {layers}")
        if sliding in types and not used:
            raise keys.fail("layer_types", f"{sliding} needs a sliding_window, and Qwen use_sliding_window")
        return types
    if family.slides == "most":
        pattern = keys.count("sliding_window_pattern")
        return tuple(sliding if (layer + 1) % pattern else full for layer in range(layers))
    if family.slides in ("all", "used"):
        return (sliding if used else full,) * layers
    first = keys.count("max_window_layers", least=0) if family.slides == "late" and used else layers
    return tuple(full if layer < first else sliding for layer in range(layers))


def _window(keys: Keys, layer_type: str, max_context: int) -> int | None:
    """Tokens that a token of such a layer attends to; None: all."""
    window = keys.count("sliding_window") if layer_type == LAYER_TYPES[1] else max_context
    return window if window < max_context else None


def _rope(keys: Keys, family: _Family, head_dim: int, layer_type: str) -> Rope:
    """The rotary embedding of such layers, from the keys of transformers 5 or before."""
    name = "rope_parameters" if keys.raw.get("rope_parameters") is not None else "rope_scaling"
    rope, theta_key = keys.within(name), "rope_theta"
    if layer_type in rope.raw:
        rope = rope.within(layer_type)
    elif "rope_local_base_freq" in family.defaults and layer_type == LAYER_TYPES[1]:
        rope, theta_key = Keys({}, keys.source), "rope_local_base_freq"
    theta = rope.number("rope_theta", default=keys.number(theta_key, default=10000.0))
    partial = rope.number("partial_rotary_factor", default=keys.number("partial_rotary_factor", default=1.0))
    dim = int(head_dim * partial)
    if partial != 1 and not family.phi:
        raise keys.fail("partial_rotary_factor", "is not supported; only 1, the whole head, is")
    if partial > 1 or dim % 2 or not dim:
        raise keys.fail(
            "partial_rotary_factor", f"({partial:g}) of {head_dim} must be an even number, at most {head_dim}"
        )
    kind_key = "rope_type" if rope.raw.get("rope_type") is not None else "type"
    kind = rope.text(kind_key, default="default")
    if family.phi and kind in ("su", "yarn"):  # its names for longrope, before that had one
        kind = "longrope"
    if kind not in ROPE_KINDS:
        raise rope.fail(kind_key, f"{as_json(kind)} is not supported; supported are {', '.join(ROPE_KINDS)}")
    context = keys.count("max_position_embeddings")
    parameters: dict[str, Any] = {}
    if kind in ("llama3", "yarn", "longrope"):
        # as transformers orders them: beside the rope keys, among them, or the whole context
        original = rope.count("original_max_position_embeddings", default=context)
        original = keys.count("original_max_position_embeddings", default=original)
        parameters["original_max_position_embeddings"] = original
    if kind in ("linear", "dynamic", "llama3"):
        parameters["factor"] = rope.number("factor")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.fail("high_freq_factor", f"({high}) must be more than low_freq_factor ({low})")
        parameters |= {"low_freq_factor": low, "high_freq_factor": high}
    if kind in ("yarn", "longrope"):
        parameters["factor"] = rope.number("factor", default=context / original)
        optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        parameters |= {key: rope.number(key) for key in optional if rope.raw.get(key)}
        parameters["truncate"] = rope.flag("truncate", default=True)
    if kind == "longrope":
        parameters |= {key: rope.numbers(key, dim // 2) for key in ("short_factor", "long_factor")}
    return Rope(dim, context, theta, kind, parameters)
