"""Every kind of model that config.json can describe, against transformers: logits, and tokens of the whole program.

The checkpoints are small and random, their prompts token ids. All families on one number of ranks share one process
group, as in test_pipeline.py.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, reference_model
from launch import run_jobs
from quantised import make_quantised, twin
from test_pipeline import Truth, greedy, text, wrong_answers

from deserve.kvcache.pages import KVPages
from deserve.layout import Shard
from deserve.model.backend.base import Rows
from deserve.model.backend.torch import TorchBackend
from deserve.model.config import ModelConfig, parse_config
from deserve.model.decoder import Decoder
from deserve.model.safetensors_folder import INDEX
from deserve.model.weights import load_shard

# Contexts shorter than the prompts, so that every regime of a scaling is at work
ROPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 2.5},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 2.0},
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 48}
# Scales so that its clamp is at work
GPT_OSS = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 12, "swiglu_limit": 0.5}
GPT_OSS |= {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.5e5, "truncate": False, **ROPES["yarn"]}}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# Windows that every prompt of LENGTHS but the shortest passes several times over
GEMMA = {"sliding_window": 12, "query_pre_attn_scalar": 24, "head_dim": 32}
GEMMA3 = GEMMA | {"sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPE}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-wide-heads": ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    **{
        f"llama-rope-{kind}": ("llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **rope}})
        for kind, rope in ROPES.items()
    },
    "mistral": ("mistral", {}),
    "mistral-tied": ("mistral", {"tie_word_embeddings": True, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-yarn": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **ROPES["yarn"]}},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied-biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe-some-dense": ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "olmoe": ("olmoe", {**EXPERTS, "num_key_value_heads": 4, "clip_qkv": 1.5}),
    "olmoe-grouped": ("olmoe", {**EXPERTS, "norm_topk_prob": True}),
    "gpt-oss": ("gpt_oss", {**GPT_OSS, "num_hidden_layers": 4}),
    "mistral-window": ("mistral", {"sliding_window": 12}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "phi3": ("phi3", {"tie_word_embeddings": True}),
    "phi3-longrope-window": (
        "phi3",
        {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE, "sliding_window": 40},
    ),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3", GEMMA3),
    "gemma3-images": ("gemma3-images", GEMMA3),
}
# Those that run on one, two and three ranks; the first with little memory
WINDOWS = [name for name, (family, options) in FAMILIES.items() if "sliding_window" in options or family == "phi3"]
SOME = ("llama", "mixtral", "qwen3-moe-some-dense")
LITTLE_MEMORY = [f"kvcache.{key}" for key in ("page_size=8", "main_pages=14", "swap_pages=8", "buddy_height=6")]
# Schemes of quantised weights, each dequantised while loading or left packed.
QUANTISED = {"gptq-act-order": "false", "ct-w4a16": "true", "fp8-blocks": "true"}
# The same of experts
QUANTISED_EXPERTS = {f"experts-{scheme}": scheme for scheme in ("gptq", "awq", "fp8-blocks", "ct-w4a16")}
SHARDED = {"llama-tied", "llama-biases", "mistral", "qwen2-tied-yarn", "qwen3"}  # several files and an index
LENGTHS = (1, 3, 16, 50, 130)
MAX_TOKENS = 12
PAGE_SIZE = 16
ATOL = RTOL = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of every family."""
    base = tmp_path_factory.mktemp("families")
    for name, (family, options) in FAMILIES.items():
        size = "100KB" if name in SHARDED else "1GB"
        make_checkpoint(base / name, family, shard_size=size, **{"eos_token_id": None, **options})
        assert (base / name / INDEX).is_file() == (name in SHARDED)
    return {name: base / name for name in FAMILIES}


class Whole:
    """A model as two shards in one process, each with its own pages; a sequence's pages lie in no order."""

    def __init__(self, folder: Path, config: ModelConfig, pages: int = 12):
        cpu, half = torch.device("cpu"), config.num_layers // 2
        self._backend = TorchBackend(config, torch.float32, cpu, config.max_context)
        self._shards = []
        for shard in (Shard(0, half, True, False), Shard(half, config.num_layers, False, True)):
            weights = load_shard(folder, config, shard, cpu, torch.float32)
            spec = config.kv_spec(torch.float32)
            kv = KVPages(spec, half, page_size=PAGE_SIZE, main_pages=pages, device=cpu)
            kv.memory.fill_(100.0)
            self._shards.append((Decoder(config, weights, self._backend), kv))
        self._table = np.random.default_rng(0).permutation(pages).astype(np.int32)[None]
        self._context, self._switch = 0, config.rope_switch

    @torch.inference_mode()
    def logits(self, tokens: list[int], prompt: int = 0) -> torch.Tensor:
        """Logits [T, vocab] of the sequence's next T tokens; it has a `prompt` of so many."""
        context, new = np.array([self._context], np.int32), np.array([len(tokens)], np.int32)
        self._backend.begin_visit(Rows(new, context, [self._table], np.array([0 < self._switch < prompt])))
        self._context += len(tokens)
        (first, first_kv), (last, last_kv) = self._shards
        x = first.forward(first.embed(torch.tensor(tokens)), first_kv)
        return last.logits(last.forward(x, last_kv))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, folders: dict[str, Path]) -> None:
    """In one prefill, in chunks, and token by token."""
    config = parse_config(json.loads((folders[name] / "config.json").read_text()), name)
    ids = np.random.default_rng(1).integers(320, size=150).tolist()
    with torch.inference_mode():
        theirs = reference_model(folders[name])(torch.tensor([ids])).logits[0]
    assert theirs.std() > 0.5 and len(theirs.argmax(-1).unique()) > 20  # the outputs are no matter of course
    for chunks in ([150], [7, 50, 1, 64, 28], [40] + [1] * 20 + [90]):
        model, bounds = Whole(folders[name], config), np.cumsum([0, *chunks])
        mine = [model.logits(ids[begin:end], 150) for begin, end in itertools.pairwise(bounds)]
        torch.testing.assert_close(torch.cat(mine), theirs, atol=ATOL, rtol=RTOL)


@pytest.fixture(scope="module")
def truths(folders: dict[str, Path]) -> dict[str, Truth]:
    """Requests of every length to every family and scheme, and transformers' greedy answers."""
    found = {}
    random = np.random.default_rng(2)
    base = next(iter(folders.values())).parent
    quantised = {name: make_quantised(base / name, name, eos_token_id=None) for name in QUANTISED}
    sizes = EXPERTS | {"moe_intermediate_size": 64, "mlp_only_layers": [0], "eos_token_id": None}
    for name, scheme in QUANTISED_EXPERTS.items():
        quantised[name] = make_quantised(base / name, scheme, "qwen3_moe", **sizes)
    for name, folder in (folders | quantised).items():
        found[name] = truth = Truth(folder, base / f"{name}.jsonl")
        model = reference_model(twin(folder) if name in quantised else folder)
        prompts = {f"{name}-{length}": random.integers(320, size=length).tolist() for length in LENGTHS}
        if name in WINDOWS:  # most of whose pages lie outside the windows of its readers
            prompts[f"{name}-shared"] = [*prompts[f"{name}-130"][:100], 5, 6, 7]
        if name.startswith("phi3-longrope"):  # on both sides of 64 tokens, and across
            for length in (40, 64 - MAX_TOKENS + 1, 65):
                prompts[f"{name}-begins-{length}"] = prompts[f"{name}-130"][:length]
            for length in (64 - MAX_TOKENS + 2, 64):
                truth.add(f"{name}-across-{length}", [1] * length, ("context_length_exceeded", "error"))
        for custom_id, prompt in prompts.items():
            truth.add(custom_id, prompt, (text(greedy(model, prompt, MAX_TOKENS)), "length"))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_same_tokens_as_transformers(ranks: int, truths: dict[str, Truth], tmp_path: Path) -> None:
    """Through the whole program: prompts in chunks, micro-batches that swap pages, suspension, decoding together.

    Families that differ in their weights alone need not run on every number of ranks.
    """
    names = [*truths] if ranks == 2 else [*SOME, *QUANTISED, *WINDOWS]
    more = ["pipeline.rounds=3", "pipeline.max_batch_tokens=48", f"sampling.max_tokens={MAX_TOKENS}"]
    jobs = [truths[name].overrides(tmp_path / name) + more for name in names]
    for job, name in zip(jobs, names, strict=True):
        job.append(f"model.packed={QUANTISED.get(name, 'false')}")
        job += LITTLE_MEMORY if name in WINDOWS else ["kvcache.main_pages=6", "kvcache.swap_pages=4"]
    run_jobs(ranks, jobs, tmp_path)
    wrong = {name: wrong_answers(tmp_path / name, truths[name]) for name in names}
    assert not {name: answers for name, answers in wrong.items() if answers}


def test_ranks_of_layers_that_differ(tmp_path: Path) -> None:
    """Four layers with an MLP, then two with experts: both kinds are surveyed, and split by that."""
    folder = tmp_path / "model"
    make_checkpoint(
        folder, "qwen3_moe", **EXPERTS, num_hidden_layers=6, mlp_only_layers=[0, 1, 2, 3], eos_token_id=None
    )
    truth, model = Truth(folder, tmp_path / "in.jsonl"), reference_model(folder)
    for length in LENGTHS:
        prompt = np.random.default_rng(length).integers(320, size=length).tolist()
        truth.add(f"{length}", prompt, (text(greedy(model, prompt, MAX_TOKENS)), "length"))
    more = ["pipeline.max_batch_tokens=32", f"sampling.max_tokens={MAX_TOKENS}"]
    run_jobs(2, [truth.overrides(tmp_path / "out") + more], tmp_path)
    assert not wrong_answers(tmp_path / "out", truth)
    stages = json.loads((tmp_path / "out" / "survey.json").read_text())[0]["stages"]
    assert [len(times["layers"]) for times, _ in stages] == [2, 2]
