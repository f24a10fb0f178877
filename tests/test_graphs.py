"""Visits cut at their attentions, as CUDA graphs are: on a CPU the parts run again instead of being replayed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from deserve.batch import VisitPlan
from deserve.kvcache.pages import KVPages, PageTable
from deserve.model.backend.base import Rows
from deserve.model.backend.torch import TorchBackend
from deserve.model.config import ModelConfig, parse_config
from deserve.model.decoder import Decoder
from deserve.model.graphs import Captured, GraphedDecode, GraphedLayers, graph_batches, graph_tokens
from deserve.model.weights import Shard, dummy_shard

CPU = torch.device("cpu")
LAYERS, PAGE, WIDTH, SEQUENCES = 3, 16, 8, 24


class Parts:
    """Stands for GraphPool."""

    class Part:
        def __init__(self, work: Callable[[], torch.Tensor]):
            self.replay = work

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[Part, torch.Tensor]:
        return self.Part(work), work()


class FixedBackend(TorchBackend):
    """Leaves what attention gives in the same memory every time, as a backend that captures does."""

    captures = True
    _attended = torch.full((512, 512), torch.nan)

    def begin_graph_visit(self, rows: Rows) -> list[int]:
        self.begin_visit(rows)
        return []

    def attend(self, layer: int, pages: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        attended = super().attend(layer, pages, q)
        return self._attended.view(-1)[: attended.numel()].view(attended.shape).copy_(attended)


def model_config(**options: Any) -> ModelConfig:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    return parse_config(
        {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
        | sizes
        | heads
        | options,
        "test",
    )


class Sequences:
    """Pages dealt out at random to sequences that grow; one more is for padding."""

    def __init__(self, config: ModelConfig, backend: type[TorchBackend]):
        weights = dummy_shard(config, Shard(0, LAYERS, False, False), CPU, torch.float32)
        self.decoder = Decoder(config, weights, backend(config, torch.float32, CPU, 256))
        self.pages = torch.zeros(LAYERS, SEQUENCES * WIDTH + 1, 2, PAGE, config.num_kv_heads, config.head_dim)
        table = np.random.default_rng(0).permutation(SEQUENCES * WIDTH)
        self.table = table.astype(np.int32).reshape(SEQUENCES, WIDTH)
        self.context = np.zeros(SEQUENCES, np.int32)

    def rows(self, sequences: list[int], new: list[int]) -> Rows:
        context = self.context[sequences]
        self.context[sequences] += np.array(new, np.int32)
        width = -(-int(self.context[sequences].max()) // PAGE)
        return Rows(np.array(new, np.int32), context, self.table[sequences, :width])


VISITS = [
    ([3, 0, 7, 5], [37, 50, 1, 12]),  # prompts
    ([0], [40]),  # a chunk
    ([3, 7, 5, 1, 2], [1, 1, 1, 64, 17]),
    ([0, 1, 2, 3, 5, 7], [1] * 6),
    ([3, 0, 1], [4, 2, 3]),
    ([9], [1]),
    ([3, 9, 10, 11], [1, 1, 1, 125]),  # a whole step: no padding
    ([0], [1]),
]


@pytest.mark.parametrize(
    "options",
    [{}, {"attention_bias": True}, {"architectures": ["Qwen3ForCausalLM"]}],
    ids=["llama", "biases", "norms of queries and keys"],
)
@torch.inference_mode()
def test_visits_cut_at_their_attentions_are_the_same(options):
    config = model_config(**options)
    whole, cut = Sequences(config, TorchBackend), Sequences(config, FixedBackend)
    parts: Any = Parts()
    graphs = GraphedLayers(Captured(cut.decoder, cut.pages, SEQUENCES * WIDTH), graph_tokens(128, "H100"), parts)
    generator = torch.Generator().manual_seed(0)
    for sequences, new in VISITS:
        x = torch.randn(sum(new), config.hidden_size, generator=generator)
        rows = whole.rows(sequences, new)
        whole.decoder.backend.begin_visit(rows)
        expected = whole.decoder.forward(x.clone(), whole.pages)
        assert graphs.fits(cut.rows(sequences, new))
        found = graphs.replay(rows, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        # Nobody's page but that for padding was touched.
        torch.testing.assert_close(cut.pages[:, :-1], whole.pages[:, :-1], rtol=1e-4, atol=1e-5)
    assert not graphs.fits(Rows(np.array([100, 29], np.int32), np.zeros(2, np.int32), whole.table[:2]))


class Swapping:
    """A decoder with pages of which each of two rounds has its swap pages in host memory."""

    MAIN, SWAP, ROUNDS = 4, 12, 2

    def __init__(self, config: ModelConfig, backend: type[TorchBackend]):
        weights = dummy_shard(config, Shard(0, LAYERS, False, False), CPU, torch.float32)
        heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        memory = {"page_size": PAGE, **heads, "dtype": torch.float32, "device": CPU, "max_tokens": 128}
        self.kv = KVPages(LAYERS, self.MAIN, self.SWAP, self.ROUNDS, 0, **memory)
        self.decoder = Decoder(config, weights, backend(config, torch.float32, CPU, 256, self.kv.layout))
        self.table = PageTable(8)

    def begin(self, plan: VisitPlan) -> Rows:
        self.table.write(plan.page_writes)
        self.kv.begin_visit(plan, self.table)
        width = -(-int((plan.context + plan.new_tokens).max()) // PAGE)
        return Rows(plan.new_tokens, plan.context, self.kv.resident(self.table.rows(plan.slots, width)))

    def end(self, plan: VisitPlan) -> None:
        self.kv.end_visit(1 - plan.micro_batch)


def steps() -> Iterator[VisitPlan]:
    """Two rounds of two sequences each, in main and in swap pages: prompts, then decodes, between them a chunk."""
    pages = {0: [[0, 4, 5], [6, 7, 8]], 1: [[1, 4, 6], [5, 2, 8]]}
    context = np.zeros((2, 2), np.int32)
    for new in ([20, 33], [1, 1], [1, 1], [10, 1], [1, 1]):
        for round_ in range(2):
            slots = np.arange(2, dtype=np.int32) + 2 * round_
            writes = [
                [slot, at, page] for slot, row in zip(slots, pages[round_], strict=True) for at, page in enumerate(row)
            ]
            plan = VisitPlan(round_, slots=slots, new_tokens=np.array(new, np.int32), context=context[round_].copy())
            yield replace(plan, page_writes=np.array(writes, np.int32))
            context[round_] += np.array(new, np.int32)


@torch.inference_mode()
def test_visits_cut_up_bring_in_the_same_swap_pages():
    config = model_config()
    whole, cut = Swapping(config, TorchBackend), Swapping(config, FixedBackend)
    captured = Captured(cut.decoder, cut.kv.layers, cut.kv.scratch_page, cut.kv.slab)
    parts: Any = Parts()
    layers, decode = GraphedLayers(captured, graph_tokens(64, "H100"), parts), GraphedDecode(captured, [1, 4], parts)
    generator = torch.Generator().manual_seed(0)
    for plan in steps():
        x = torch.randn(plan.tokens, config.hidden_size, generator=generator)
        rows = whole.begin(plan)
        whole.decoder.backend.begin_visit(rows)
        expected = whole.decoder.forward(x.clone(), whole.kv.layers, whole.kv.slab)
        rows = cut.begin(plan)
        found = (decode if decode.fits(rows) else layers).replay(rows, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for each in (whole, cut):
            each.end(plan)
        for round_ in range(2):
            torch.testing.assert_close(cut.kv.slab.host(round_), whole.kv.slab.host(round_), rtol=1e-4, atol=1e-5)
    assert cut.kv.slab.bytes_in == whole.kv.slab.bytes_in > 0


def test_steps():
    assert graph_batches(20) == [1, 2, 4, 8, 16, 20]
    assert max(graph_batches(4096)) == 256


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "another"])
def test_token_counts_follow_from_the_gpu_s_name(gpu):
    """No stopwatch: equal plans round alike. 448 and 896 take longer than 512 and 1,024 on those measured."""
    counts = graph_tokens(4096, gpu)
    assert counts == sorted(set(counts)) and counts[-1] == 1024
    assert not {448, 896} & set(counts)
    assert (320 in counts) == ("H" in gpu)
    assert graph_tokens(200, gpu) == [16, 32, 64, 128, 192, 200]


class OtherPlans(FixedBackend):
    """Its launch parameters change from the third visit on, as those of a graph must not."""

    asked = 0

    def begin_graph_visit(self, rows: Rows) -> list[int]:
        self.begin_visit(rows)
        self.asked += 1
        return [self.asked > 2]


@torch.inference_mode()
def test_a_graph_of_another_plan_is_passed_over(capsys):
    """The visit runs without it, and that is said once."""
    config = model_config()
    whole, cut = Swapping(config, TorchBackend), Swapping(config, OtherPlans)
    parts: Any = Parts()
    decode = GraphedDecode(Captured(cut.decoder, cut.kv.layers, cut.kv.scratch_page, cut.kv.slab), [1, 4], parts)
    assert cut.decoder.backend.asked == 2
    generator = torch.Generator().manual_seed(0)
    for plan in steps():
        x = torch.randn(plan.tokens, config.hidden_size, generator=generator)
        rows = whole.begin(plan)
        whole.decoder.backend.begin_visit(rows)
        expected = whole.decoder.forward(x.clone(), whole.kv.layers, whole.kv.slab)
        rows = cut.begin(plan)
        if decode.fits(rows):
            found = decode.replay(rows, x)
        else:
            cut.decoder.backend.begin_visit(rows)
            found = cut.decoder.forward(x, cut.kv.layers, cut.kv.slab)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for each in (whole, cut):
            each.end(plan)
    assert cut.decoder.backend.asked > 4
    assert capsys.readouterr().out.count("run without it") == 1


def test_padding_lies_on_the_scratch_page():
    cut = Sequences(model_config(), FixedBackend)
    captured = Captured(cut.decoder, cut.pages, scratch_page=7)
    rows = Rows(np.array([1, 1], np.int32), np.array([5, 9], np.int32), np.array([[3], [4]], np.int32))
    ones = captured.padded(rows, 2)
    assert ones.new_tokens.tolist() == [1, 1, 1, 1] and ones.context.tolist() == [5, 9, 0, 0]
    assert ones.pages.tolist() == [[3], [4], [7], [7]]
    rows = Rows(np.array([1, 2], np.int32), np.array([5, 9], np.int32), np.array([[3], [4]], np.int32))
    one = captured.padded(rows, 17)
    assert one.new_tokens.tolist() == [1, 2, 17] and one.context.tolist() == [5, 9, 0]
    assert one.pages.tolist() == [[3, 7], [4, 7], [7, 7]]
    assert captured.padded(rows, 0) is rows
