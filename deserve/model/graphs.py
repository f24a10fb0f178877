"""Visits as CUDA graphs, so that launching their kernels does not keep the host busy.

Decode visits are one graph each. In other visits attention is launched in the usual way, since how it is divided among
thread blocks depends on the lengths, and what lies between one layer's attention and the next one's is a graph.
"""

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from deserve.kvcache.pages import KVPages
from deserve.model.backend.base import Rows
from deserve.model.decoder import Attend, Decoder, Step

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

    @contextmanager
    def capture(self) -> Iterator[Replayable]:
        """A graph of the work launched inside the context.

        It must have run before, as kernels cannot be loaded while capturing. Memory that it frees goes to the next
        graph.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            yield graph

    def taken(self) -> int:
        """Bytes of device memory that went to the graphs, and to anything else since this was constructed."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return self._free - torch.cuda.mem_get_info(self._device)[0]


class GraphedVisits:
    """CUDA graphs of visits through all layers of a stage, for each of the token counts `counts`.

    A visit is padded to the next of them by tokens whose keys and values go to the scratch page. `whole`: visits of
    decode rows alone, attention included; the graph ends only where swap pages must follow. Otherwise visits of any
    rows, with a graph from each layer's attention to the next one's.
    """

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, kv: KVPages, counts: list[int], pool: GraphPool, whole: bool):
        self._decoder, self._kv, self._counts, self._whole = decoder, kv, sorted(counts), whole
        self._told = False  # that a graph does not fit
        config, largest = decoder.config, self._counts[-1]
        some = decoder.weights.layers[0].input_norm
        self._hidden = some.new_zeros(largest, config.hidden_size)
        # Attention that no graph holds is given the same queries every time.
        self._qkv = None if whole else some.new_zeros(largest, config.q_size + 2 * config.kv_size)
        # Largest first: what it allocates serves all others.
        self._graphs = {count: self._capture(count, pool) for count in reversed(self._counts)}

    def fits(self, rows: Rows) -> bool:
        """Whether `rows` have no more tokens than the largest graphs take, and are decode rows if they have to be."""
        if self._whole and (rows.new_tokens != 1).any():
            return False
        return int(rows.new_tokens.sum()) <= self._counts[-1]

    @torch.inference_mode()
    def replay(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        """The visit of `rows`, which fit. x: hidden states [T, hidden]; returns them after the last layer."""
        tokens = len(x)
        count = self._counts[bisect.bisect_left(self._counts, tokens)]
        graphs, plan = self._graphs[count]
        # The graphs' launch parameters were fixed when they were captured: others would read past their arrays.
        if self._begin(padded(rows, count - tokens, self._kv)) != plan:
            return self._eager(count, rows, x)
        self._hidden[:tokens].copy_(x, non_blocking=True)
        if tokens < count:
            self._hidden[tokens:count].zero_()  # a visit's output stands here, and would grow with every round
        for graph, steps in graphs:
            graph.replay()
            for step in steps:
                step()
        return self._hidden[:tokens].clone()  # the next visit is computed there

    def _eager(self, count: int, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        if not self._told:
            print(f"the CUDA graph of {count} decode rows was captured with another plan: such visits run without it")
            self._told = True
        self._decoder.backend.begin_visit(rows)
        return self._decoder.forward(x, self._kv)

    def _begin(self, rows: Rows) -> list[int]:
        if self._whole:
            return self._decoder.backend.begin_graph_visit(rows)
        self._decoder.backend.begin_visit(rows)
        return []

    def _capture(self, count: int, pool: GraphPool) -> tuple[list[tuple[Replayable, list[Step]]], list[int]]:
        """The graphs of a visit of `count` tokens, each with the steps behind it; and its launch parameters."""
        kv, nothing = self._kv, np.zeros(0, np.int32)
        nobody = Rows(nothing, nothing, [nothing.reshape(0, 0)] * len(kv.scratch))
        plan = self._begin(padded(nobody, count, kv))
        x, qkv = self._hidden[:count], None if self._qkv is None else self._qkv[:count]
        for step in self._decoder.steps(x, kv, qkv):
            step()
        graphs: list[tuple[Replayable, list[Step]]] = []
        steps = self._decoder.steps(x, kv, qkv)
        end: Step | None = None
        while not graphs or end is not None:
            with pool.capture() as graph:
                for end in steps:
                    if self._whole != isinstance(end, Attend):
                        break
                    if self._whole:
                        end()
                else:
                    end = None
                kv.join()  # a graph ends with all that it began
            behind = [] if end is None else [end]
            if not self._whole and graphs:  # in it the visit has left a layer
                behind.insert(0, partial(kv.follow, range(len(graphs) - 1, len(graphs))))
            graphs.append((graph, behind))
            for step in behind:
                step()
        return graphs, plan


def padded(rows: Rows, padding: int, kv: KVPages) -> Rows:
    """`rows` and `padding` further tokens: rows of one where all others are, else one row."""
    if not padding:
        return rows
    ones = bool((rows.new_tokens == 1).all())
    new = np.ones(padding, np.int32) if ones else np.array([padding], np.int32)
    tables = []
    for table, scratch in zip(rows.tables, kv.scratch, strict=True):
        count, width = table.shape
        wider = max(width, 1 if ones else -(-padding // kv.page_size))
        wide = np.full((count + len(new), wider), scratch, np.int32)
        wide[:count, :width] = table
        tables.append(wide)
    long = None if rows.long is None else np.concatenate([rows.long, new < 0])
    return Rows(np.concatenate([rows.new_tokens, new]), np.concatenate([rows.context, 0 * new]), tables, long)


@dataclass(frozen=True)
class Graphs:
    """The graphs of a stage, and the bytes of device memory that they take."""

    decode: GraphedVisits
    others: GraphedVisits
    bytes: int

    def fitting(self, rows: Rows) -> GraphedVisits | None:
        """Those for a visit of `rows`, if there are any."""
        return next((graphs for graphs in (self.decode, self.others) if graphs.fits(rows)), None)


def capture(decoder: Decoder, kv: KVPages, max_rows: int, max_tokens: int) -> Graphs:
    """The graphs of a stage whose visits have up to `max_rows` rows, and up to `max_tokens` tokens in all."""
    device = kv.memory.device
    batches = graph_batches(min(max_rows, max_tokens))
    tokens = graph_tokens(max_tokens, torch.cuda.get_device_name(device))
    pool = GraphPool(device)
    decode = GraphedVisits(decoder, kv, batches, pool, whole=True)
    others = GraphedVisits(decoder, kv, tokens, pool, whole=False)
    return Graphs(decode, others, pool.taken())
