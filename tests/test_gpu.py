"""The GPU kernels against plain PyTorch in float32: values, graphs, and that no visit makes the host wait."""

import json
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import forms, make_checkpoint
from launch import run_jobs
from safetensors.torch import load_file, save_file

from deserve.batch import Request, SamplingParams, VisitPlan, VisitResult
from deserve.kvcache.pages import KVLayer, KVPages
from deserve.layout import Layout, Shard
from deserve.model.admissions import encode_sampling
from deserve.model.backend.base import Backend, Rows
from deserve.model.backend.torch import TorchBackend
from deserve.model.checkpoint import Checkpoint
from deserve.model.config import ModelConfig, parse_config
from deserve.model.decoder import Decoder
from deserve.model.graphs import GraphedVisits, GraphPool
from deserve.model.packed import PackedLinear
from deserve.model.safetensors_folder import INDEX
from deserve.model.sampler import Sampler
from deserve.model.weights import ShardWeights, dummy_shard, load_shard, tensor_shapes
from deserve.scheduler.scheduler import Scheduler
from deserve.stage import load_stage
from deserve.staging import to_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = torch.device("cuda")
LAYERS = 4
MAX_LENGTH = 2048
MAX_ROWS = 64
WHOLE = Shard(0, LAYERS, embeds=True, outputs=True)


def model_config(heads: int, kv_heads: int, head_dim: int, hidden: int = 512, **options: Any) -> ModelConfig:
    return parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 1024,
            "hidden_size": hidden,
            "intermediate_size": 7 * hidden // 2,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": MAX_LENGTH,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
        }
        | options,
        "test",
    )


LLAMA_8B = model_config(32, 8, 128, hidden=4096)


def random_weights(config: ModelConfig, dtype: torch.dtype) -> ShardWeights:
    """Random weights under which variances neither grow nor vanish, as in a trained model: rounding is not amplified.

    The norms are not all 1.
    """
    weights = dummy_shard(config, WHOLE, DEVICE, dtype)
    assert weights.embedding is not None
    weights.embedding.mul_(50)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for layer in weights.layers:
        attention, mlp = layer.attention, layer.mlp
        for linear, gain in ((attention.qkv, 1.0), (mlp.gate_up, 1.0), (attention.output, 0.5), (mlp.down, 0.5)):
            linear.weight.mul_(50 * gain / linear.weight.shape[1] ** 0.5)
        norms = layer.input_norm, layer.post_norm, layer.attention_norm, layer.mlp_norm
        for norm in (*norms, attention.q_norm, attention.k_norm):
            if norm is not None:
                norm.normal_(0.0 if config.norm_offset else 1.0, 0.2, generator=generator)
    return weights


def in_float32(weights: ShardWeights) -> ShardWeights:
    def up(part: Any) -> Any:
        if part is None or isinstance(part, int):
            return part
        if isinstance(part, torch.Tensor):
            return part.float()
        if isinstance(part, list):
            return [up(each) for each in part]
        return type(part)(**{name: up(field) for name, field in vars(part).items()})

    whole: ShardWeights = up(weights)
    return whole


class Runner:
    """A model with pages dealt out at random."""

    def __init__(self, config: ModelConfig, weights: ShardWeights, backend: Backend, dtype: torch.dtype, page: int):
        self.page_size = page
        self.decoder = Decoder(config, weights, backend)
        self.width = 512 // page
        spec = config.kv_spec(dtype)
        pages = MAX_ROWS * self.width
        self.kv = KVPages(spec, len(weights.layers), page_size=page, main_pages=pages, device=DEVICE)
        self.kv.memory.fill_(100.0)  # what sequences before left in the pages must not be seen
        rng = np.random.default_rng(0)
        self.table = rng.permutation(pages).astype(np.int32).reshape(MAX_ROWS, self.width)
        self.context = np.zeros(MAX_ROWS, np.int32)

    def rows(self, sequences: list[int], new: list[int]) -> Rows:
        """The rows of a visit, which is counted as run."""
        context = self.context[sequences]
        self.context[sequences] += np.array(new, np.int32)
        width = -(-int(self.context[sequences].max()) // self.page_size)
        return Rows(np.array(new, np.int32), context, [self.table[sequences, :width]])

    @torch.inference_mode()
    def visit(self, sequences: list[int], new: list[int], tokens: torch.Tensor, graphs: Any = None) -> torch.Tensor:
        """Logits [T, vocab] of `tokens` [T], by `graphs` or without."""
        x = self.decoder.embed(to_device(tokens, DEVICE))
        return self.decoder.logits(self.through(self.rows(sequences, new), x, graphs))

    def through(self, rows: Rows, x: torch.Tensor, graphs: Any = None) -> torch.Tensor:
        """Hidden states x [T, hidden] through the layers, by `graphs` or without."""
        if graphs is not None:
            assert graphs.fits(rows)
            return graphs.replay(rows, x)
        self.decoder.backend.begin_visit(rows)
        return self.decoder.forward(x, self.kv)


def make_runner(
    config: ModelConfig,
    dtype: torch.dtype,
    page: int = 16,
    prefill: str = "auto",
    weights: ShardWeights | None = None,
) -> Runner:
    pytest.importorskip("flashinfer")
    from deserve.model.backend.flashinfer import FlashInferBackend

    backend = FlashInferBackend(config, dtype, DEVICE, MAX_LENGTH, page, 2048, MAX_ROWS * 512 // page + 2048, prefill)
    return Runner(config, weights or random_weights(config, dtype), backend, dtype, page)


def make_reference(config: ModelConfig, runner: Runner) -> Runner:
    backend = TorchBackend(config, torch.float32, DEVICE, MAX_LENGTH)
    return Runner(config, in_float32(runner.decoder.weights), backend, torch.float32, runner.page_size)


def tokens_of(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 1024, count))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


VISITS: list[tuple[str, list[int], list[int]]] = [
    ("prefill", [3, 0, 7, 5], [37, 200, 1, 129]),
    ("a chunk", [0], [100]),
    ("decode and prefill", [3, 7, 5, 1, 2], [1, 1, 1, 64, 17]),
    ("decode, two chunks", [3, 1, 0, 2], [1, 1, 31, 130]),
    ("speculated tokens", [3, 0, 1], [4, 2, 3]),
    ("decode", [0, 1, 2, 3, 5, 7], [1] * 6),
    ("fresh and one", [40], [1]),
    ("many", list(range(8, 48)), [1] * 32 + [1 + i for i in range(8)]),
]


def check(config: ModelConfig, dtype: torch.dtype, page: int, prefill: str = "auto") -> None:
    runner = make_runner(config, dtype, page, prefill)
    reference = make_reference(config, runner)
    for seed, (name, sequences, new) in enumerate(VISITS):
        tokens = tokens_of(sum(new), seed)
        error = relative_error(runner.visit(sequences, new, tokens), reference.visit(sequences, new, tokens))
        print(f"{name}: {error:.1e}")
        assert error < 1e-2, name


@pytest.mark.parametrize("prefill", ["fa2", "fa3"])
def test_llama_8b_layers_agree_with_float32(prefill):
    check(LLAMA_8B, torch.bfloat16, 16, prefill)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page", "dtype"),
    [
        (32, 8, 128, 1, torch.bfloat16),
        (64, 8, 128, 32, torch.bfloat16),  # group 8: Llama-3-70B
        (28, 4, 128, 16, torch.bfloat16),  # group 7: Qwen2.5-7B
        (40, 8, 128, 16, torch.bfloat16),  # group 5: Qwen2.5-14B
        (32, 8, 64, 16, torch.bfloat16),  # Llama-3.2-1B
        (9, 3, 64, 1, torch.bfloat16),  # SmolLM2-135M
        (32, 8, 128, 16, torch.float16),
        (64, 8, 64, 32, torch.float16),
    ],
)
def test_shapes_agree_with_float32(heads, kv_heads, head_dim, page, dtype):
    check(model_config(heads, kv_heads, head_dim), dtype, page)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("new", "context"),
    [
        ([1, 1, 1], [40, 0, 129]),
        ([1, 1, 70, 5], [15, 300, 30, 7]),
        ([1, 200, 1, 90], [16, 0, 60, 33]),
        ([64, 150], [0, 100]),
    ],
)
@torch.inference_mode()
def test_each_kernel_agrees_with_pytorch(new, context, dtype):
    """What the backend calls by position, on the strided parts of a fused product that a layer hands it."""
    pytest.importorskip("flashinfer")
    from deserve.model.backend.flashinfer import FlashInferBackend

    heads, kv_heads, head_dim, hidden = 32, 8, 128, 512
    config = model_config(heads, kv_heads, head_dim, hidden)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).add_(mean).to(dtype)

    def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.shape == expected.shape
        assert relative_error(found, expected) < 5e-3

    tokens, page, width = sum(new), 16, 32
    backend = FlashInferBackend(config, dtype, DEVICE, MAX_LENGTH, page, 512, MAX_ROWS * width)
    reference = TorchBackend(config, torch.float32, DEVICE, MAX_LENGTH)
    table = np.random.default_rng(0).permutation(len(new) * width).astype(np.int32).reshape(len(new), width)
    rows = Rows(np.array(new, np.int32), np.array(context, np.int32), [table])
    for each in (backend, reference):
        each.begin_visit(rows)
    pages = random(len(new) * width, 2, page, kv_heads, head_dim)
    for _ in range(2):  # a layer works in the memory of the one before
        x, residual, weight = random(tokens, hidden), random(tokens, hidden), random(hidden, mean=1.0)
        agree(backend.rms_norm(x, weight), reference.rms_norm(x.float(), weight.float()))
        summed = residual.float()
        expected = reference.add_rms_norm(x.float(), summed, weight.float())
        agree(backend.add_rms_norm(x, residual, weight), expected)
        agree(residual, summed)

        gate_up = random(tokens, 2 * config.intermediate_size)
        agree(backend.silu_and_mul(gate_up), reference.silu_and_mul(gate_up.float()))

        qkv = random(tokens, heads + 2 * kv_heads, head_dim)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        weight = random(head_dim, mean=1.0)
        agree(backend.rms_norm(q, weight), reference.rms_norm(q.float(), weight.float()))
        untouched = v.clone()
        expected_q, expected_k = reference.rotate(q.float(), k.float())
        q, k = backend.rotate(q, k)
        agree(q, expected_q)
        agree(k, expected_k)
        assert torch.equal(v, untouched)

        expected_pages = pages.float()
        reference.append(KVLayer(expected_pages, 0), k.float(), v.float())
        expected = reference.attend(KVLayer(expected_pages, 0), q.float())
        backend.append(KVLayer(pages, 0), k, v)
        agree(backend.attend(KVLayer(pages, 0), q), expected)
        assert torch.equal(pages.float(), expected_pages)


def test_norms_of_queries_and_keys_biases_and_scaled_rope():
    qwen3 = model_config(32, 8, 128, architectures=["Qwen3ForCausalLM"])
    check(qwen3, torch.bfloat16, 16)
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    check(model_config(32, 8, 128, rope_scaling=scaling, attention_bias=True), torch.bfloat16, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": 50},
        {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75, "sliding_window": 1000},
        {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 64, "query_pre_attn_scalar": 128},
        {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 33, "sliding_window_pattern": 2},
    ],
    ids=lambda options: options["architectures"][0],
)
def test_windows_soft_caps_and_two_ropes(options):
    check(model_config(32, 8, 128, **options), torch.bfloat16, 16)


def fill(runner: Runner, sequences: list[int]) -> None:
    """Prefill `sequences` with prompts of their own lengths, 5 to 130 tokens."""
    for sequence in sequences:
        count = 5 + 125 * sequence // MAX_ROWS
        runner.visit([sequence], [count], tokens_of(count, sequence))


@torch.inference_mode()
def generate(runner: Runner, sequences: list[int], steps: int, graphs: Any = None) -> torch.Tensor:
    """Greedy tokens [steps, n], by graphs or without."""
    token = torch.arange(len(sequences), device=DEVICE)
    taken = []
    for _ in range(steps):
        token = runner.visit(sequences, [1] * len(sequences), token, graphs).argmax(-1)
        taken.append(token)
    return torch.stack(taken)


@pytest.fixture(scope="module")
def graphed():
    runner = make_runner(LLAMA_8B, torch.bfloat16)
    pool = GraphPool(DEVICE)
    graphs = GraphedVisits(runner.decoder, runner.kv, [1, 2, 4, 8, 24, 32, 40, 64], pool, whole=True)
    print(f"8 graphs of {LAYERS} layers take {pool.taken() / 2**20:.0f} MB")
    assert not graphs.fits(Rows(np.array([1, 2], np.int32), np.zeros(2, np.int32), [np.zeros((2, 1), np.int32)]))
    return runner, graphs


@pytest.mark.parametrize("count", [1, 3, 8, 24, 33, 40, 64])
def test_graphs_generate_what_eager_visits_do(graphed, count):
    runner, graphs = graphed
    sequences = list(range(MAX_ROWS))[-count:]
    found = []
    for by in (graphs, None):
        runner.context[:] = 0
        fill(runner, sequences)
        found.append(generate(runner, sequences, 24, by))
    same = (found[0] == found[1]).all(dim=0)
    # Padding changes the shape of the matrix products and so their rounding, which may decide between equals.
    assert same.all() if count in (1, 8, 24, 40, 64) else same.float().mean() > 0.8, same


def test_graphs_agree_with_float32(graphed):
    runner, graphs = graphed
    reference = make_reference(LLAMA_8B, runner)
    for count in (3, 37):
        sequences = list(range(count))
        runner.context[:] = reference.context[:] = 0
        for each in (runner, reference):
            fill(each, sequences)
        for seed in range(3):
            tokens = tokens_of(count, seed)
            found = runner.visit(sequences, [1] * count, tokens, graphs)
            assert relative_error(found, reference.visit(sequences, [1] * count, tokens)) < 1e-2


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (LLAMA_8B, torch.bfloat16),
        (model_config(9, 3, 64), torch.float16),
        (model_config(32, 8, 128, architectures=["Qwen3ForCausalLM"]), torch.bfloat16),  # queries are normed
        (model_config(32, 8, 128, attention_bias=True), torch.bfloat16),
    ],
)
def test_graphs_between_attentions_agree_with_float32(config, dtype):
    runner = make_runner(config, dtype)
    reference = make_reference(config, runner)
    pool = GraphPool(DEVICE)
    counts = [8, 16, 64, 128, 256, 384, 640]
    graphs = GraphedVisits(runner.decoder, runner.kv, counts, pool, whole=False)
    print(f"{len(counts)} times {LAYERS + 1} graphs take {pool.taken() / 2**20:.0f} MB")
    for seed, (name, sequences, new) in enumerate(VISITS):
        tokens = tokens_of(sum(new), seed)
        error = relative_error(runner.visit(sequences, new, tokens, graphs), reference.visit(sequences, new, tokens))
        print(f"{name}: {error:.1e}")
        assert error < 1e-2, name


@pytest.mark.parametrize("by_graphs", [True, False])
def test_two_stages_agree_with_float32(by_graphs):
    """Two layers on either side of a link, as two ranks have them: prefill, chunks, decode, by graphs and without."""
    whole = random_weights(LLAMA_8B, torch.bfloat16)
    stages = [
        make_runner(
            LLAMA_8B, torch.bfloat16, weights=replace(whole, layers=whole.layers[:2], final_norm=None, head=None)
        ),
        make_runner(LLAMA_8B, torch.bfloat16, weights=replace(whole, layers=whole.layers[2:], embedding=None)),
    ]
    reference = make_reference(LLAMA_8B, make_runner(LLAMA_8B, torch.bfloat16, weights=whole))
    pool = GraphPool(DEVICE)
    others, decodes = (
        [GraphedVisits(stage.decoder, stage.kv, counts, pool, whole) for stage in stages if by_graphs]
        for counts, whole in (([16, 64, 256, 640], False), ([1, 8, 64], True))
    )
    for seed, (name, sequences, new) in enumerate(VISITS):
        tokens = tokens_of(sum(new), seed)
        with torch.inference_mode():
            x = stages[0].decoder.embed(to_device(tokens, DEVICE))
            for index, stage in enumerate(stages):
                rows = stage.rows(sequences, new)
                by = None
                if by_graphs:
                    by = decodes[index] if decodes[index].fits(rows) else others[index]
                x = stage.through(rows, x, by)
            logits = stages[1].decoder.logits(x)
        error = relative_error(logits, reference.visit(sequences, new, tokens))
        print(f"{name}: {error:.1e}")
        assert error < 1e-2, name


def test_the_host_may_run_ahead(graphed):
    """Twenty visits enqueued at once are what they are one by one: nothing is overwritten that is yet to be copied."""
    runner, graphs = graphed
    sequences = list(range(20))

    def run(wait: bool) -> list[torch.Tensor]:
        runner.context[:] = 0
        fill(runner, sequences)
        torch.cuda.synchronize()
        logits = []
        for seed in range(20):
            decoding = sequences[seed % 7 :]
            tokens = to_device(tokens_of(len(decoding), seed), DEVICE)
            if not wait:
                torch.cuda._sleep(20_000_000)  # about 10 ms
            logits.append(runner.visit(decoding, [1] * len(decoding), tokens, graphs if seed % 2 else None))
            if wait:
                torch.cuda.synchronize()
        return logits

    for one, other in zip(run(wait=True), run(wait=False), strict=True):
        assert torch.equal(one, other)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_no_visit_waits_for_the_device(graphed):
    runner, graphs = graphed
    runner.context[:] = 0
    fill(runner, [0, 1, 2])
    sampler = Sampler(MAX_ROWS, DEVICE)
    random = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=5)
    sampler.admit([encode_sampling(1, random), encode_sampling(0, SamplingParams())])
    slots, positions = np.array([0, 1], np.int32), np.array([9, 9], np.int32)
    mixed = tokens_of(2 + 50, 0)
    with pytest.raises(RuntimeError), no_waiting():
        mixed.to(DEVICE)
    for attempt in range(2):  # the first may allocate
        with no_waiting() if attempt else torch.inference_mode():
            logits = runner.visit([0, 1, 2], [1, 1, 50], mixed)
            rows = to_device(np.array([0, 1]), DEVICE)
            sampler.sample(logits.index_select(0, rows), slots, positions)
            logits = runner.visit([0, 1], [1, 1], mixed[:2], graphs)
            sampler.sample(logits, slots, positions)


def test_a_stage_decodes_by_graphs_without_waiting():
    """A whole stage, as a run loads it: the same greedy tokens with its graphs and without, and no wait."""
    pytest.importorskip("flashinfer")
    config = model_config(32, 8, 128)
    layout = Layout(
        partition=(0,),
        rounds=1,
        micro_batch_size=2,
        concurrency=2,
        max_batch_tokens=64,
        policy="prefill_first",
        page_size=16,
        main_pages=16,
        swap_pages=0,
        host_height=0,
    )
    pages = np.array([[slot, index, 8 * slot + index] for slot in range(2) for index in range(8)], np.int32)
    both, ones = np.arange(2, dtype=np.int32), np.ones(2, np.int32)
    found = []
    for graphed in (True, False):
        stage = load_stage(Checkpoint("test", None, config, ()), layout, WHOLE, torch.bfloat16, DEVICE)
        assert stage._graphs is not None
        if not graphed:
            stage._graphs = None
        # The prompts need no padding: it would change the shape of the products, and so their rounding.
        context, new = np.array([34, 30], np.int32), np.array([34, 30], np.int32)
        prefill = VisitPlan(0, slots=both, new_tokens=new, context=0 * new, samples=ones, page_writes=pages)
        prefill.admissions = [encode_sampling(slot, SamplingParams()) for slot in (0, 1)]
        taken = [stage.forward(prefill, tokens_of(64, 0))]
        for step in range(20):
            decode = VisitPlan(0, slots=both, new_tokens=ones, context=context + step, samples=ones)
            with no_waiting():
                taken.append(stage.forward(decode, taken[-1]))
        found.append(torch.stack(taken))
    assert torch.equal(*found)


class Prompts:
    """Random prompts of 1 to 90 tokens, and answers of 1 to 60."""

    def __init__(self, count: int):
        rng = np.random.default_rng(7)
        self._requests = [
            Request(
                f"{index}",
                rng.integers(0, 1024, rng.integers(1, 90)).astype(np.int32),
                SamplingParams(max_tokens=int(rng.integers(1, 60)), ignore_eos=True),
            )
            for index in range(count)
        ]

    def poll(self) -> Request | None:
        return self._requests.pop() if self._requests else None

    @property
    def exhausted(self) -> bool:
        return not self._requests


def moved(plan: VisitPlan, main: int, swap: int) -> VisitPlan:
    """`plan` for a stage without a slab, in whose main pages every round has its swap pages for itself."""

    def each(pages: np.ndarray) -> np.ndarray:
        return np.where(pages >= main, pages + plan.micro_batch * swap, pages).astype(np.int32)

    columns = {"page_writes": 2, "stash": 0, "restore": 1}
    changed = {}
    for name, column in columns.items():
        changed[name] = getattr(plan, name).copy()
        changed[name][:, column] = each(changed[name][:, column])
    return replace(plan, **changed)


@pytest.mark.parametrize("policy", ["prefill_first", "decode_first"])
@pytest.mark.parametrize("rounds", [2, 3])
def test_swapped_pages_hold_what_resident_ones_do(policy, rounds):
    """The same visits on a stage that swaps and on one that has room for all: the same tokens, without a wait."""
    pytest.importorskip("flashinfer")
    config = model_config(32, 8, 128)
    main, swap, size = 8, 20, 8
    layout = Layout((0,), rounds, size, 48, 64, policy, 16, main, swap, 8)
    ample = replace(layout, main_pages=main + rounds * swap, swap_pages=0)
    checkpoint = Checkpoint("test", None, config, ())
    swapping, resident = (load_stage(checkpoint, each, WHOLE, torch.bfloat16, DEVICE) for each in (layout, ample))
    weights = random_weights(config, torch.bfloat16)
    for stage in (swapping, resident):
        for layer, other in zip(stage._decoder.weights.layers, weights.layers, strict=True):
            for block, names in (("attention", ("qkv", "output")), ("mlp", ("gate_up", "down"))):
                for name in names:
                    mine, theirs = (getattr(getattr(each, block), name) for each in (layer, other))
                    mine.weight.copy_(theirs.weight)
        stage._decoder.weights.embedding.copy_(weights.embedding)
    scheduler = Scheduler(layout, Prompts(100))
    turn = deque((index, torch.zeros(0, dtype=torch.int32)) for index in range(rounds))
    steps: list[tuple[VisitPlan, torch.Tensor, torch.Tensor]] = []
    while turn:
        micro_batch, tokens = turn.popleft()
        scheduler.commit(micro_batch, VisitResult(tokens.cpu().numpy()))
        plan, ids = scheduler.plan(micro_batch)
        if plan.retires:
            swapping.end_visit(turn[0][0] if turn else None)
            continue
        with no_waiting():
            sampled = swapping.forward(plan, torch.from_numpy(ids))
            turn.append((micro_batch, sampled))
            swapping.end_visit(turn[0][0])
        steps.append((plan, torch.from_numpy(ids), sampled))
    assert scheduler.counters.suspensions and swapping.swapping.bytes_in
    for plan, ids, sampled in steps:
        assert torch.equal(resident.forward(moved(plan, main, swap), ids).cpu(), sampled.cpu())
    # The same visits again, but now the host is far ahead of the device.
    found = []
    for index, (plan, ids, _) in enumerate(steps):
        if index % 40 == 0:
            torch.cuda._sleep(50_000_000)
        found.append(swapping.forward(plan, ids))
        swapping.end_visit(steps[index + 1][0].micro_batch if index + 1 < len(steps) else None)
    for again, (_, _, sampled) in zip(found, steps, strict=True):
        assert torch.equal(again.cpu(), sampled.cpu())
    print(
        f"{len(steps)} visits, {scheduler.counters.suspensions} suspensions, waited {swapping.swapping.waited_s:.3f} s"
    )


def host_memory(kind: str) -> int:
    """Bytes of this process's host memory, mapped files among them: VmRSS, now, or VmHWM, the most since a reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def test_loading_a_sharded_checkpoint_takes_little_host_memory(tmp_path: Path) -> None:
    """Three layers as large as Llama-3-70B's, a file each: host memory never holds much more than one of them."""
    config = model_config(64, 8, 128, hidden=8192, num_hidden_layers=3)
    weight_map, sizes = {}, []
    for index in range(3):
        shapes = tensor_shapes(config, Shard(index, index + 1, embeds=index == 0, outputs=index == 2))
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / f"{index}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{index}.safetensors")
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    before = host_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    weights = load_shard(tmp_path, config, Shard(0, 3, embeds=True, outputs=True), DEVICE, torch.bfloat16)
    grown = host_memory("VmHWM") - before
    print(f"{sum(sizes) / 1e9:.1f} GB in files of {max(sizes) / 1e9:.1f} GB: {grown / 1e9:.2f} GB of host memory")
    assert grown < max(sizes) + 2e9 < sum(sizes)
    down = load_file(tmp_path / "2.safetensors", device="cuda")["model.layers.2.mlp.down_proj.weight"]
    assert torch.equal(weights.layers[2].mlp.down.weight, down)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL takes one rank a GPU; on CPUs test_pipeline.py has this"
)
def test_two_gpus_answer_as_one_does(tmp_path: Path) -> None:
    """Over NCCL and over Gloo, resident and swapping, with latency and without, one GPU planned ahead: in float32 every
    token is the same.

    In bfloat16, by the fast kernels, another batch rounds otherwise, and a link rounds once more: answers may part
    later on, but begin alike.
    """
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    make_checkpoint(tmp_path / "model", std=0.05, hidden_size=512, intermediate_size=1024, **heads)
    rng = np.random.default_rng(0)
    with (tmp_path / "in.jsonl").open("w") as file:
        for index in range(60):
            prompt = rng.integers(320, size=int(rng.integers(1, 200))).tolist()
            stops = list(range(20)) if index % 3 else []
            said = {"custom_id": str(index), "prompt": prompt, "ignore_eos": True, "stop_token_ids": stops}
            file.write(json.dumps(said) + "\n")
    common = ["model=tiny", "model.weights=auto", f"model.path={tmp_path / 'model'}", "device=cuda"]
    common += [f"workload.source={tmp_path / 'in.jsonl'}", "sampling.max_tokens=40"]
    common += ["pipeline.rounds=3", "pipeline.micro_batch_size=20", "pipeline.max_batch_tokens=256"]
    resident, swapping = (["kvcache.main_pages=1100", "kvcache.swap_pages=0"], ["kvcache.main_pages=20"])
    swapping += ["kvcache.swap_pages=340"]
    layouts = {
        "alone": (1, resident),
        "ahead": (1, [*resident, "pipeline.rounds=1", "speculation.tokens=0"]),
        "nccl": (2, resident),
        "gloo": (2, [*resident, "comm.backend=gloo"]),
        "latency": (2, [*resident, "network.latency_ms=3"]),
        "swapping": (2, swapping),
    }
    answers: dict[str, dict[str, dict[str, str]]] = {"float32": {}, "bfloat16": {}}
    for ranks in (1, 2):
        jobs = {
            (dtype, name): [f"model.dtype={dtype}", *overrides, f"output.dir={tmp_path / dtype / name}"]
            for dtype in answers
            for name, (count, overrides) in layouts.items()
            if count == ranks
        }
        run_jobs(ranks, [[*common, *overrides] for overrides in jobs.values()], tmp_path)
        for dtype, name in jobs:
            lines = map(json.loads, (tmp_path / dtype / name / "results.jsonl").read_text().splitlines())
            texts = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}
            answers[dtype][name] = texts
    for dtype, by_layout in answers.items():
        expected = by_layout.pop("alone")
        assert len(expected) == 60 and len(set(expected.values())) > 50
        for name, given in by_layout.items():
            same = sum(given[key] == expected[key] for key in expected)
            alike = sum(given[key].split()[:1] == expected[key].split()[:1] for key in expected)
            print(f"{dtype}, {name}: of 60 answers {same} are the same, {alike} have the same first token")
            assert same == 60 if dtype == "float32" else alike >= 55


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", forms(128))
@torch.inference_mode()
def test_fused_products_agree_with_float32(case: str, dtype: torch.dtype) -> None:
    """Of stacked weights, of whole tiles and not, by every kernel that token counts choose among; captured too."""
    pytest.importorskip("humming")
    from deserve.model.humming import TOKENS, HummingLinear, unfit

    form, generator = forms(128)[case], torch.Generator(DEVICE).manual_seed(0)
    for sizes, inputs in (((768, 128, 128), 512), ((200, 24, 40), 4 * (form.columns or 24))):
        parts = [form.quantise(torch.randn(size, inputs, device=DEVICE, generator=generator)) for size in sizes]
        for part in parts:
            if part.zero is not None:
                part.zero.add_(torch.randint(-7, 8, part.zero.shape, device=DEVICE, generator=generator))
        bias = torch.randn(sum(sizes), device=DEVICE, generator=generator).to(dtype)
        linear = PackedLinear(parts, bias)
        whole = torch.cat([weight for part in parts for _, weight in part.chunks(torch.float32)])
        if case == "fp4" and dtype == torch.float16:
            assert unfit(linear, dtype) is not None
            continue
        fused = HummingLinear(linear, dtype)
        for tokens in (1, *TOKENS, 3000):
            x = torch.randn(tokens, inputs, device=DEVICE, generator=generator).to(dtype)
            expected = torch.nn.functional.linear(x.float(), whole, bias.float())
            found = fused(x)
            error, unpacked = (relative_error(each, expected) for each in (found, linear(x)))
            print(f"{sum(sizes)} x {inputs}, {tokens} tokens: {error:.1e}, unpacked {unpacked:.1e}")
            assert error < 5e-3, tokens
            graph, out = torch.cuda.CUDAGraph(), torch.empty_like(found)
            with torch.cuda.graph(graph):
                fused(x, out)
            for _ in range(2):
                out.zero_()
                graph.replay()
                assert torch.equal(out, found)


@pytest.mark.parametrize("case", ["gptq", "awq", "fp8-blocks", "ct-w4a16", "ct-mxfp4"])
@torch.inference_mode()
def test_models_on_packed_weights_agree_with_float32(case: str, tmp_path: Path) -> None:
    """All visits with fused products, and decode visits in CUDA graphs beside the same without.

    Their greedy tokens part in three of the five cases (H100, 2026-11-28): whether by rounding, this tells.
    """
    pytest.importorskip("humming")
    pytest.importorskip("compressed_tensors")
    from quantised import make_quantised

    from deserve.model.humming import HummingLinear, fuse

    shape = {"hidden_size": 512, "intermediate_size": 1792, "head_dim": 128, "num_attention_heads": 4}
    folder = make_quantised(tmp_path / case, case, std=0.03, vocab_size=1024, max_position_embeddings=2048, **shape)
    config = parse_config(json.loads((folder / "config.json").read_text()), case)
    assert config.quantisation is not None
    packed = replace(config, quantisation=replace(config.quantisation, packed=True))
    weights = load_shard(folder, packed, WHOLE, DEVICE, torch.bfloat16)
    fuse(weights, torch.bfloat16, required=True)
    assert isinstance(weights.layers[0].mlp.down, HummingLinear)
    runner = make_runner(config, torch.bfloat16, weights=weights)
    plain = load_shard(folder, config, WHOLE, DEVICE, torch.float32)
    reference = Runner(config, plain, TorchBackend(config, torch.float32, DEVICE, MAX_LENGTH), torch.float32, 16)
    for seed, (name, sequences, new) in enumerate(VISITS):
        tokens = tokens_of(sum(new), seed)
        error = relative_error(runner.visit(sequences, new, tokens), reference.visit(sequences, new, tokens))
        print(f"{name}: {error:.1e}")
        assert error < 2e-2, name  # unpacked products in bfloat16: 1.5e-2 on a CPU
    graphs = GraphedVisits(runner.decoder, runner.kv, [8, 24], GraphPool(DEVICE), whole=True)
    sequences, context = [0, 1, 2, 3, 5, 7, 8, 40], runner.context.copy()
    token, new = torch.arange(len(sequences), device=DEVICE), [1] * len(sequences)
    for step in range(8):
        eager = runner.visit(sequences, new, token)
        runner.context[:] = context
        error = relative_error(runner.visit(sequences, new, token, graphs), eager)
        print(f"step {step}, graph beside eager: {error:.1e}")
        assert error < 2e-2, step
        token, context = eager.argmax(-1), runner.context.copy()
