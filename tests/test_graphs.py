"""Visits cut at their attentions, as CUDA graphs are: on a CPU the parts run again instead of being replayed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deserve.model.backend.base import Rows
from deserve.model.backend.torch import TorchBackend
from deserve.model.config import ModelConfig, parse_config
from deserve.model.decoder import Decoder
from deserve.model.graphs import Captured, GraphedLayers, graph_batches, graph_tokens
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
    graphs = GraphedLayers(Captured(cut.decoder, cut.pages, SEQUENCES * WIDTH), graph_tokens(128), parts)
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


def test_steps():
    assert graph_batches(20) == [1, 2, 4, 8, 16, 20]
    assert graph_tokens(200) == [16, 32, 64, 128, 192, 200]
    assert graph_tokens(4096)[-3:] == [768, 896, 1024]
    assert max(graph_batches(4096)) == 256


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
