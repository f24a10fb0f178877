"""Decode visits as CUDA graphs: a whole stage's kernels in one launch."""

import bisect
from typing import Any

import numpy as np
import torch

from deserve.batch import IntArray
from deserve.kvcache.slab import SwapSlab
from deserve.model.backend.base import Rows
from deserve.model.decoder import Decoder

MOST_ROWS = 256  # of a graph; a visit of more takes longer on the device than its launches do on the host


def graph_batches(max_rows: int) -> list[int]:
    """The numbers of rows for which graphs are made, where visits have up to `max_rows`.

    A visit is padded to the next of them. 35 graphs of 8 layers are captured in 0.2 s and take 60 MB with the shape of
    Llama-3-8B, 180 MB with that of Llama-3-70B.
    """
    return sorted({min(batch, max_rows) for batch in (1, 2, 4, *range(8, MOST_ROWS + 1, 8))})


class GraphedDecode:
    """A CUDA graph for each number of decode rows in `batches`, from the stage's input to its output.

    Input are token ids [n] where the decoder embeds, else hidden states [n, hidden]; output are logits [n, vocab]
    where it has the output layer, else hidden states. `layers` are the pages of all layers; rows that pad a batch
    write into `scratch_page` of them, which must be nobody else's. `slab` orders copies of swap pages beside the
    layers. All graphs share one memory pool. `bytes` is the device memory that they take.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        layers: torch.Tensor,
        scratch_page: int,
        batches: list[int],
        slab: SwapSlab | None = None,
    ):
        self._decoder, self._layers, self._slab = decoder, layers, slab
        self._scratch_page = scratch_page
        self._batches = sorted(batches)
        largest = self._batches[-1]
        if decoder.weights.embedding is not None:
            self._input = torch.zeros(largest, dtype=torch.int32, device=layers.device)
        else:
            self._input = torch.zeros(largest, decoder.config.hidden_size, dtype=layers.dtype, device=layers.device)
        head = decoder.weights.head
        # One for all graphs: each would keep logits of its own.
        self._logits = None
        if head is not None:
            self._logits = torch.empty(largest, decoder.config.vocab_size, dtype=layers.dtype, device=layers.device)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(layers.device)[0]
        pool = torch.cuda.graph_pool_handle()
        # Largest first: what it allocates serves all others.
        self._graphs = {batch: self._capture(batch, pool) for batch in reversed(self._batches)}
        torch.cuda.synchronize(layers.device)
        torch.cuda.empty_cache()
        self.bytes = free - torch.cuda.mem_get_info(layers.device)[0]

    def fits(self, rows: Rows) -> bool:
        """Whether `rows` are decode rows alone, and no more than the largest graph takes."""
        return len(rows.new_tokens) <= self._batches[-1] and bool((rows.new_tokens == 1).all())

    @torch.inference_mode()
    def replay(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        """The visit of `rows`, n rows that fit. x: [n] or [n, hidden]; returns [n, vocab] or [n, hidden]."""
        count = len(rows.new_tokens)
        batch = self._batches[bisect.bisect_left(self._batches, count)]
        graph, output, plan = self._graphs[batch]
        # The graph's launch parameters were fixed when it was captured: others would read past their arrays.
        if self._decoder.backend.begin_graph_visit(self._padded(rows, batch)) != plan:
            raise RuntimeError(f"the plan of {batch} decode rows is not the one that their graph was captured with")
        self._input[:count].copy_(x, non_blocking=True)
        if count < batch:
            self._input[count:batch].zero_()  # a visit's output may stand here, and would grow with every round
        graph.replay()
        return output[:count].clone()  # the next replay writes there again

    def _run(self, batch: int) -> torch.Tensor:
        x = self._input[:batch]
        if self._decoder.weights.embedding is not None:
            x = self._decoder.embed(x)
        x = self._decoder.forward(x, self._layers, self._slab)
        return x if self._logits is None else self._logits[:batch].copy_(self._decoder.logits(x))

    def _capture(self, batch: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, list[int]]:
        nobody = Rows(_ints(0), _ints(0), _ints(0, 0))
        plan = self._decoder.backend.begin_graph_visit(self._padded(nobody, batch))
        self._run(batch)  # loads kernels, which cannot be done while capturing
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = self._run(batch)
        return graph, output, plan

    def _padded(self, rows: Rows, batch: int) -> Rows:
        """`rows` and as many rows of one token on the scratch page as make up `batch`."""
        padding = batch - len(rows.new_tokens)
        if not padding:
            return rows
        pages = np.full((batch, max(1, rows.pages.shape[1])), self._scratch_page, np.int32)
        pages[: len(rows.pages), : rows.pages.shape[1]] = rows.pages
        return Rows(
            np.concatenate([rows.new_tokens, np.ones(padding, np.int32)]),
            np.concatenate([rows.context, _ints(padding)]),
            pages,
        )


def _ints(*shape: int) -> IntArray:
    return np.zeros(shape, np.int32)
