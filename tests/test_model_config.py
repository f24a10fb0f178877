"""config.json in all its spellings, and rotary frequencies against transformers' own."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from omegaconf import OmegaConf

from deserve.config import config_dir
from deserve.errors import UserError
from deserve.model.config import ModelConfig, parse_config
from deserve.model.rope import rope_table

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
PHI = {"architectures": ["Phi3ForCausalLM"]}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 2}
LONGROPE = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}


def test_sizes_follow_from_the_heads():
    config = parse_config(RAW, "config.json")
    assert (config.head_dim, config.q_size, config.kv_size, config.group) == (16, 64, 32, 2)
    assert config.kv_spec(torch.bfloat16).token_bytes == 2 * 32 * 2
    assert config.dtype == torch.bfloat16
    assert config.kinds[0].rope.theta == 10000.0
    assert parse_config(RAW | {"head_dim": 32}, "config.json").q_size == 128
    assert parse_config(RAW | {"head_dim": None, "num_key_value_heads": None}, "config.json").kv_size == 64


@pytest.mark.parametrize(
    ("architecture", "option", "expected"),
    [
        ("Llama", {}, (False, False, False, False)),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        ("Mistral", {"attention_bias": True, "sliding_window": None}, (False, False, False, False)),
        ("Qwen2", {}, (True, False, False, False)),
        ("Qwen3", {}, (False, False, False, True)),
        ("Qwen3", {"attention_bias": True}, (True, True, False, True)),
        ("Mixtral", {"attention_bias": True, **EXPERTS}, (False, False, False, False)),
        ("Qwen3Moe", {"moe_intermediate_size": 24, **EXPERTS}, (False, False, False, True)),
        ("Olmoe", {"attention_bias": True, **EXPERTS}, (True, True, False, True)),
    ],
)
def test_an_architecture_decides_biases_and_norms(architecture, option, expected):
    config = parse_config(RAW | option | {"architectures": [f"{architecture}ForCausalLM"]}, "config.json")
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == expected


def test_which_layers_have_experts():
    raw = (
        RAW | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 8, "moe_intermediate_size": 24}
    )
    sparse = parse_config(raw | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 6]}, "config.json")
    assert [layer for layer in range(8) if sparse.experts_of(layer)] == [3, 5, 7]
    assert parse_config(raw, "config.json").activated_size == 2 * 24
    assert sparse.activated_size == 96
    # In Mixtral, every layer has, and no key says otherwise.
    others = raw | {"architectures": ["MixtralForCausalLM"], "mlp_only_layers": [0]}
    mixtral = parse_config(others, "config.json").experts
    assert mixtral is not None and mixtral.normalised
    assert (mixtral.dense_layers, mixtral.intermediate_size) == ((), 96)


def test_old_and_new_rope_keys_say_the_same():
    old = RAW | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}}
    new = RAW | {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000}}
    assert parse_config(old, "old") == parse_config(new, "new")
    (kind,) = parse_config(old, "old").kinds
    assert (kind.rope.kind, kind.rope.parameters) == ("llama3", LLAMA3)
    plain = parse_config(RAW | {"rope_theta": 5e5, "rope_scaling": None}, "plain")
    assert plain == parse_config(RAW | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "new")


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"type": "yarn", **YARN}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"type": "yarn", "factor": 2.0}, 4096),
        ({"type": "linear", "factor": 2.0}, 2048),
        ({"type": "llama3", **LLAMA3}, 2048),
    ],
)
def test_yarn_may_reach_beyond_the_stated_context(rope, context):
    assert parse_config(RAW | {"rope_scaling": rope}, "config.json").max_context == context


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, ["architectures", "GemmaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": None}, ["architectures", "missing"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "64"}, ["hidden_size", "whole number", '"64"']),
        ({"hidden_size": True}, ["hidden_size", "whole number"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "number"]),
        ({"hidden_size": 66}, ["hidden_size", "multiple"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "divide"]),
        ({"head_dim": 15}, ["head_dim", "even"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["torch_dtype", "float8_e4m3fn"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config.bits", "missing"]),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, ["rope_scaling.type", "proportional"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters.short_factor", "missing"]),
        (PHI | {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 7}}, ["rope_scaling.long_factor", "8 positive"]),
        (PHI | {"partial_rotary_factor": 0.2}, ["partial_rotary_factor", "(0.2) of 16", "at most 16"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor", "missing"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "missing"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "object"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"architectures": ["Glm4MoeForCausalLM"]}, ["Glm4MoeForCausalLM", "shared experts", "GptOssForCausalLM"]),
        ({"architectures": ["Qwen3NextForCausalLM"]}, ["Qwen3NextForCausalLM", "gated delta"]),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, ["DeepseekV3ForCausalLM", "latent attention"]),
        ({"architectures": ["OlmoeForCausalLM"]}, ["num_local_experts", "missing"]),
        (EXPERTS | {"architectures": ["OlmoeForCausalLM"], "num_experts": 1}, ["num_experts_per_tok", "(2)", "(1)"]),
        (
            EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 24, "mlp_only_layers": [3]},
            ["mlp_only_layers", "0 to 2"],
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, ["sliding_window", "at least 1"]),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "sliding_attention"] * 2},
            ["layer_types", "4 entries"],
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention"] * 3},
            ["layer_types", "use_sliding_window"],
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["chunked_attention"] * 3},
            ["layer_types", "chunked_attention"],
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            ["use_bidirectional_attention"],
        ),
        ({"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu"}, ["hidden_activation", "gelu"]),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": "64"}},
            ["text_config.hidden_size", "whole number"],
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(change, words):
    with pytest.raises(UserError) as caught:
        parse_config(RAW | change, "some/config.json")
    message = str(caught.value)
    assert all(word in message for word in ["some/config.json", *words]), message
    assert "\n" not in message


def windows(config: ModelConfig) -> list[int | None]:
    return [config.kinds[kind].window for kind in config.layer_kinds]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}, [4096] * 3),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, [None] * 3),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 2048}, [None] * 3),  # as wide as the context
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 2048}
            | {"rope_scaling": {"type": "yarn", "factor": 4.0}},  # as the context was before
            [2048] * 3,
        ),
        (QWEN, [None] * 3),
        (QWEN | {"use_sliding_window": True}, [None, None, 64]),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 3}, [None] * 3),
        (QWEN | {"use_sliding_window": True, "sliding_window": None}, [None] * 3),
        (
            QWEN | {"use_sliding_window": True, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
            [64, None, None],
        ),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 64}, [None] * 3),
        ({"architectures": ["Phi3ForCausalLM"]}, [None] * 3),
        ({"architectures": ["Phi3ForCausalLM"], "sliding_window": 2047}, [2047] * 3),
        ({"architectures": ["Gemma2ForCausalLM"], "sliding_window": 64}, [64, None, 64]),
        ({"architectures": ["Gemma3ForCausalLM"], "sliding_window": 64, "sliding_window_pattern": 3}, [64, 64, None]),
    ],
)
def test_which_layers_have_a_window(change, expected):
    assert windows(parse_config(RAW | change, "config.json")) == expected


def test_gemma_3_of_the_hub():
    """Its text_config leaves out what is as in transformers' class; the dtype stands outside."""
    text = {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32}
    text |= {"num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168, "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "torch_dtype": "bfloat16"}
    config = parse_config(raw, "config.json")
    assert windows(config) == [None if layer % 6 == 5 else 1024 for layer in range(62)]
    assert [(kind.rope.kind, kind.rope.theta) for kind in config.kinds] == [("default", 1e4), ("linear", 1e6)]
    assert (config.vocab_size, config.max_context, config.tied_embeddings) == (262208, 131072, True)
    assert (config.dtype, config.scale, config.attention_cap, config.logit_cap) == (
        torch.bfloat16,
        168**-0.5,
        None,
        None,
    )


def test_longrope_has_two_ways_where_the_context_was_stretched():
    phi = RAW | PHI | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 256}
    assert parse_config(phi, "config.json").rope_switch == 256
    for same in ({"original_max_position_embeddings": 2048}, {"rope_scaling": None}):
        assert parse_config(phi | same, "config.json").rope_switch == 0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "dynamic", "factor": 2.5},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "yarn", **YARN},
        {"rope_type": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {"rope_type": "yarn", **YARN, "attention_factor": 1.25},
        {"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 2.0},
    ],
    ids=lambda rope: "-".join(str(value) for value in rope.values()),
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_is_that_of_transformers(rope, theta):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = RAW | {"head_dim": 64, "rope_parameters": rope | {"rope_theta": theta}}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(raw))))
    cos, sin = theirs(torch.zeros(1, dtype=torch.float32), torch.arange(1500)[None])
    mine = rope_table(parse_config(raw, "config.json").kinds[0].rope, 1500, "cpu")
    assert mine[0].dtype == torch.float32 and mine[0].shape == (1500, 32)
    # their table is that of a whole head, its halves alike
    assert torch.equal(mine[0], cos[0, :, :32]) and torch.equal(mine[1], sin[0, :, :32])


@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.5}])
def test_longrope_is_that_of_transformers(more):
    """A table for sequences that stay within the original context, and one for others behind it."""
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    factors = {"short_factor": np.linspace(1, 2, 24).tolist(), "long_factor": np.linspace(1, 30, 24).tolist()}
    raw = RAW | PHI | {"hidden_size": 256, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 256}
    raw |= {"rope_scaling": {"type": "longrope", **factors, **more}, "pad_token_id": None}
    theirs = Phi3RotaryEmbedding(Phi3Config(**json.loads(json.dumps(raw))))
    (kind,) = parse_config(raw, "config.json").kinds
    mine = rope_table(kind.rope, 1000, "cpu")
    for begin, length in ((0, 256), (256, 1000)):
        both = theirs(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
        for ours, expected in zip(mine, both, strict=True):
            assert torch.equal(ours[begin : begin + length], expected[0, :, :24])


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_writes(tmp_path, family):
    folder = make_checkpoint(tmp_path / family, family)
    config = parse_config(json.loads((folder / "config.json").read_text()), "config.json")
    assert (config.num_layers, config.hidden_size, config.head_dim) == (4, 64, 16)
    assert config.dtype == torch.float32


@pytest.mark.parametrize("path", sorted((config_dir() / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_of_the_group_is_sound(path: Path):
    """Parameters, counted from the architecture, are about what the name says."""
    from deserve.layout import Shard
    from deserve.model.weights import parameter_bytes

    section = OmegaConf.to_container(OmegaConf.load(path))
    assert set(section) == {"name", "path", "weights", "dtype", "architecture"}
    assert section["name"] == path.stem
    if section["architecture"] is None or path.stem == "tiny":
        return
    config = parse_config(section["architecture"], path.name)
    billions = parameter_bytes(config, Shard(0, config.num_layers, True, True), torch.int8) / 1e9
    size = re.search(r"-(\d+(\.\d+)?)b", path.stem)
    others = {"mixtral-8x7b": 46.7, "phi-4": 14.7}  # experts share their attention; no size in the name
    stated = others[path.stem] if size is None else float(size[1])
    assert stated * 0.97 <= billions <= stated * 1.25
