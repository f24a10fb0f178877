"""Visits as CUDA graphs, so that launching their kernels does not keep the host busy.

Decode visits are one graph each. In other visits attention is launched in the usual way, since how it is divided among
thread blocks depends on the lengths, and what lies between one layer's attention and the next one's is a graph.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch

from deserve.batch import IntArray
from deserve.kvcache.slab import SwapSlab
from deserve.model.backend.base import Rows
from deserve.model.decoder import Decoder

T = TypeVar("T")

MOST_ROWS = 256  # of a graph of a whole visit; the launches of a larger one hide behind its kernels
MOST_TOKENS = 1024  # of graphs between attentions, likewise
# Token counts that layers are captured for, by GPU. A table, not a stopwatch: how many tokens a product has decides how
# it rounds, so two runs of one plan must pad alike. cuBLAS takes a slow kernel for 448 and 896 tokens: on an H100, a
# layer of Llama-3-70B takes 1.67 ms for 448 and 0.97 ms for 512, one of Llama-3-8B 0.43 and 0.27 ms.
HOPPER_TOKENS = (16, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768, MOST_TOKENS)
TOKENS_BY_GPU = {"H100": HOPPER_TOKENS, "H200": HOPPER_TOKENS}
# Elsewhere nothing was measured: powers of two and halfway between them, which whole tiles make up.
OTHER_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, MOST_TOKENS)


def graph_batches(max_rows: int) -> list[int]:
    """The numbers of rows for which decode visits are captured, where visits have up to `max_rows`.

    A visit is padded to the next of them. 35 graphs of 8 layers are captured in 0.2 s and take 60 MB with the shape of
    Llama-3-8B, 180 MB with that of Llama-3-70B.
    """
    return sorted({min(batch, max_rows) for batch in (1, 2, 4, *range(8, MOST_ROWS + 1, 8))})


def graph_tokens(max_tokens: int, gpu: str) -> list[int]:
    """The numbers of tokens for which layers are captured on a `gpu` of that name; visits have up to `max_tokens`."""
    counts = next((counts for name, counts in TOKENS_BY_GPU.items() if name in gpu), OTHER_TOKENS)
    return sorted({min(tokens, max_tokens) for tokens in counts})


class Replayable(Protocol):
    """Work that was recorded once."""

    def replay(self) -> None: ...


class GraphPool:
    """Captures CUDA graphs on `device`, all of them in one pool of memory."""

    def __init__(self, device: torch.device):
        self._device = device
        torch.cuda.empty_cache()
        self._free = torch.cuda.mem_get_info(device)[0]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], T]) -> tuple[Replayable, T]:
        """`work` as a graph, and the tensors to which a replay writes what it returns.

        It must have run before, as kernels cannot be loaded while capturing. Its other memory goes to the next graph.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = work()
        return graph, output

    def taken(self) -> int:
        """Bytes of device memory that went to the graphs, and to anything else since this was constructed."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return self._free - torch.cuda.mem_get_info(self._device)[0]


@dataclass(frozen=True)
class Captured:
    """What graphs are made of: a stage's `decoder` and its `layers`' memory for pages, as `Backend.append` takes it.

    Tokens that pad a visit go to `scratch_page` of them, which must be nobody else's. `slab` orders copies of swap
    pages beside the layers.
    """

    decoder: Decoder
    layers: Sequence[torch.Tensor]
    scratch_page: int
    slab: SwapSlab | None = None

    def padded(self, rows: Rows, padding: int) -> Rows:
        """`rows` and `padding` further tokens: rows of one where all others are, else one row."""
        if not padding:
            return rows
        ones = bool((rows.new_tokens == 1).all())
        new = np.ones(padding, np.int32) if ones else np.array([padding], np.int32)
        count, width = rows.pages.shape
        width = max(width, 1 if ones else -(-padding // self.layers[0].shape[2]))
        pages = np.full((count + len(new), width), self.scratch_page, np.int32)
        pages[:count, : rows.pages.shape[1]] = rows.pages
        return Rows(np.concatenate([rows.new_tokens, new]), np.concatenate([rows.context, 0 * new]), pages)


class GraphedDecode:
    """CUDA graphs for each number of decode rows in `batches`, through all layers of the stage.

    One each, or where there is a slab one for each of its spans.
    """

    @torch.inference_mode()
    def __init__(self, captured: Captured, batches: list[int], pool: GraphPool):
        self._captured, self._decoder = captured, captured.decoder
        self._batches = sorted(batches)
        self._told = False  # that a graph does not fit
        self._spans = self._decoder.spans(captured.slab)
        self._input = captured.layers[0].new_zeros(self._batches[-1], self._decoder.config.hidden_size)
        # Largest first: what it allocates serves all others.
        self._graphs = {batch: self._capture(batch, pool) for batch in reversed(self._batches)}

    def fits(self, rows: Rows) -> bool:
        """Whether `rows` are decode rows alone, and no more than the largest graph takes."""
        return len(rows.new_tokens) <= self._batches[-1] and bool((rows.new_tokens == 1).all())

    @torch.inference_mode()
    def replay(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        """The visit of `rows`, which fit. x: hidden states [n, hidden]; returns them after the last layer."""
        count = len(rows.new_tokens)
        batch = self._batches[bisect.bisect_left(self._batches, count)]
        graphs, output, plan = self._graphs[batch]
        # The graphs' launch parameters were fixed when they were captured: others would read past their arrays.
        if self._decoder.backend.begin_graph_visit(self._captured.padded(rows, batch - count)) != plan:
            return self._eager(batch, rows, x)
        self._input[:count].copy_(x, non_blocking=True)
        if count < batch:
            self._input[count:batch].zero_()  # a visit's output stands here, and would grow with every round
        self._follow([graph.replay for graph in graphs])
        return output[:count].clone()  # the next replay writes there again

    def _eager(self, batch: int, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        if not self._told:
            print(f"the CUDA graph of {batch} decode rows was captured with another plan: such visits run without it")
            self._told = True
        self._decoder.backend.begin_visit(rows)
        return self._decoder.forward(x, self._captured.layers, self._captured.slab)

    def _follow(self, parts: Sequence[Callable[[], object]]) -> None:
        """Run `parts`, a span each, and have the slab follow."""
        for span, part in zip(self._spans, parts, strict=True):
            part()
            if self._captured.slab is not None:
                self._captured.slab.follow(span)

    def _capture(self, batch: int, pool: GraphPool) -> tuple[list[Replayable], torch.Tensor, list[int]]:
        decoder, captured = self._decoder, self._captured
        plan = decoder.backend.begin_graph_visit(captured.padded(NOBODY, batch))
        x = self._input[:batch]
        branch: torch.Tensor | None = None

        def run(span: range) -> torch.Tensor:
            nonlocal branch  # what the next span goes on from, in memory that only other batches' graphs share
            branch = decoder.through(
                span, x, None if span is self._spans[0] else branch, captured.layers, captured.slab
            )
            return decoder.merge(x, branch) if span is self._spans[-1] else x

        parts = [partial(run, span) for span in self._spans]
        self._follow(parts)
        graphs, outputs = zip(*(pool.capture(part) for part in parts), strict=True)
        return list(graphs), outputs[-1], plan


class GraphedLayers:
    """The layers of a stage for any visit of up to `tokens[-1]` tokens, attention launched between CUDA graphs.

    For each number of tokens in `tokens`, a visit is padded to the next of them, there is a graph from the stage's
    input to the first layer's attention, from each layer's to the next one's, and from the last one's to the output.
    """

    @torch.inference_mode()
    def __init__(self, captured: Captured, tokens: list[int], pool: GraphPool):
        self._captured, self._decoder, self._layers = captured, captured.decoder, captured.layers
        self._tokens = sorted(tokens)
        # What passes from graph to graph, beside what attention gives.
        config, largest = self._decoder.config, self._tokens[-1]
        self._hidden = self._layers[0].new_zeros(largest, config.hidden_size)
        self._qkv = self._layers[0].new_zeros(largest, config.q_size + 2 * config.kv_size)
        self._graphs = {count: self._capture(count, pool) for count in reversed(self._tokens)}

    def fits(self, rows: Rows) -> bool:
        """Whether `rows` have no more tokens than the largest graphs take."""
        return int(rows.new_tokens.sum()) <= self._tokens[-1]

    @torch.inference_mode()
    def replay(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        """The visit of `rows`, which fit. x: hidden states [T, hidden]; returns them after the last layer."""
        count = len(x)
        tokens = self._tokens[bisect.bisect_left(self._tokens, count)]
        self._decoder.backend.begin_visit(self._captured.padded(rows, tokens - count))
        self._hidden[:count].copy_(x, non_blocking=True)
        if count < tokens:
            self._hidden[count:tokens].zero_()
        self._alternate(tokens, [graph.replay for graph in self._graphs[tokens]])
        return self._hidden[:count].clone()  # the next visit is computed there

    def _alternate(self, tokens: int, parts: Sequence[Callable[[], object]]) -> torch.Tensor:
        """Run `parts` with each layer's attention between two of them. Returns where attention leaves its results."""
        config, attended = self._decoder.config, self._hidden
        queries = self._qkv[:tokens].view(tokens, -1, config.head_dim)[:, : config.num_heads]
        parts[0]()
        for index, (pages, part) in enumerate(zip(self._layers, parts[1:], strict=True)):
            attended = self._decoder.backend.attend(index, pages, queries)
            part()
            if self._captured.slab is not None:
                self._captured.slab.follow(range(index, index + 1))
        return attended

    def _capture(self, tokens: int, pool: GraphPool) -> list[Replayable]:
        self._decoder.backend.begin_visit(self._captured.padded(NOBODY, tokens))
        attended = self._hidden.new_zeros(tokens, self._decoder.config.q_size)
        layers = range(len(self._layers) + 1)
        attended = self._alternate(tokens, [partial(self._part, index, tokens, attended) for index in layers])
        return [pool.capture(partial(self._part, index, tokens, attended))[0] for index in layers]

    def _part(self, index: int, tokens: int, attended: torch.Tensor) -> torch.Tensor:
        """From attention of the layer before `index`, which gave `attended` [T, q_size], to that of layer `index`."""
        decoder, slab, residual, branch = self._decoder, self._captured.slab, self._hidden[:tokens], None
        if index > 0:
            branch = decoder.after_attention(index - 1, residual, attended, slab)
        if index == len(self._layers):
            output = decoder.merge(residual, branch)
        else:
            qkv = self._qkv[:tokens]
            output = decoder.before_attention(index, residual, branch, self._layers[index], slab, out=qkv)
        if index > 0 and slab is not None:
            slab.join()  # a graph ends with all that it began
        return output


@dataclass(frozen=True)
class Graphs:
    """The graphs of a stage, and the bytes of device memory that they take."""

    decode: GraphedDecode
    layers: GraphedLayers
    bytes: int


def capture(captured: Captured, max_rows: int, max_tokens: int) -> Graphs:
    """The graphs of a stage whose visits have up to `max_rows` rows, and up to `max_tokens` tokens in all."""
    device = captured.layers[0].device
    batches = graph_batches(min(max_rows, max_tokens))
    tokens = graph_tokens(max_tokens, torch.cuda.get_device_name(device))
    pool = GraphPool(device)
    decode = GraphedDecode(captured, batches, pool)
    others = GraphedLayers(captured, tokens, pool)
    return Graphs(decode, others, pool.taken())


def _ints(*shape: int) -> IntArray:
    return np.zeros(shape, np.int32)


NOBODY = Rows(_ints(0), _ints(0), _ints(0, 0))
