"""A stage: one rank's share of the layers and the KV cache that belongs to it."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from deserve.batch import ADMISSION_WORDS, PENDING, IntArray, VisitPlan
from deserve.errors import UserError
from deserve.kvcache.buddy import pool_pages
from deserve.kvcache.pages import KVPages
from deserve.kvcache.slab import SwapCounters
from deserve.layout import Layout, Shard
from deserve.memory import held_by_others
from deserve.model.backend.base import Backend, Rows
from deserve.model.backend.torch import TorchBackend
from deserve.model.checkpoint import Checkpoint, fetch_shard_files
from deserve.model.config import ModelConfig
from deserve.model.decoder import Decoder
from deserve.model.graphs import Graphs, capture
from deserve.model.kv_scale import fold_scales
from deserve.model.linear import grouped_mm_waits
from deserve.model.sampler import Sampler
from deserve.model.tokenizer import end_ids, load_tokenizer
from deserve.model.weights import ShardWeights, dummy_shard, load_shard, parameter_bytes
from deserve.staging import to_device
from deserve.timeline import UNTIMED, Timeline

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class Stage:
    """Runs visits: applies a plan to the KV cache and takes its tokens through the stage's layers."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVPages,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        graphs: Graphs | None = None,
        guide: "Callable[[], LLTokenizer] | None" = None,
    ):
        self.dtype = dtype  # of hidden states
        self.capture_s = 0.0  # that capturing CUDA graphs took
        self._decoder = decoder
        self._kv = kv
        self._device = device
        self._graphs = graphs
        self._sampler = Sampler(slots, device, guide)
        self._switch = decoder.config.rope_switch
        self._prompts = np.zeros(slots, np.int32)  # tokens of each sequence's prompt
        # Of a ring's only rank, by micro-batch: slots and tokens on the device that its last visit sampled.
        self._sampled: dict[int, tuple[IntArray, torch.Tensor]] = {}

    @property
    def swapping(self) -> SwapCounters:
        """What swapping has moved so far."""
        return self._kv.swapped

    @property
    def graph_bytes(self) -> int:
        """Bytes of device memory that the stage's CUDA graphs take."""
        return self._graphs.bytes if self._graphs is not None else 0

    def touch(self) -> None:
        """Make the KV memory real, as use would: until it is written to, all of it reads from one page of zeros."""
        self._kv.memory.zero_()

    def end_visit(self, next_micro_batch: int | None, timeline: Timeline = UNTIMED) -> None:
        """What `forward` gave has been passed on; the swap pages of the next visit may come in behind this one."""
        self._kv.end_visit(next_micro_batch, timeline)

    @torch.inference_mode()
    def forward(self, plan: VisitPlan, x: torch.Tensor, timeline: Timeline = UNTIMED) -> torch.Tensor:
        """One visit. x: token ids [T] on the first rank, hidden states [T, hidden] on the others.

        Ids may be PENDING if this is the only rank: what the micro-batch's last visit sampled for their sequences.

        Returns hidden states [T, hidden], or on the last rank the words of a VisitResult, int32 [words].
        """
        tables = self._kv.begin_visit(plan, timeline)
        self._sampler.admit(plan.admissions)
        self._sampler.sort(plan.sorts)
        if not plan.rows:
            return torch.empty(0, dtype=torch.int32)
        rows = Rows(plan.new_tokens, plan.context, tables, self._long(plan))
        if self._decoder.weights.embedding is not None:
            x = self._decoder.embed(self._known(plan, x))
        else:
            x = to_device(x, self._device)
        x = self._through_layers(rows, x)
        if self._decoder.weights.head is None:
            return x
        scores = self._score(plan, x, timeline)
        row, token, position = plan.sampled_positions()
        if not len(row):
            return scores
        if len(row) < plan.tokens:
            x = x.index_select(0, to_device(token, self._device))
        logits = self._decoder.logits(x)
        with timeline.on_device("sample", plan.micro_batch):
            words = self._sampler.sample(logits, plan.slots[row], position, plan.assumed())
        if self._decoder.weights.embedding is not None:
            self._sampled[plan.micro_batch] = plan.slots[row], words[: len(row)]
        return torch.cat([words, scores]) if len(scores) else words

    def _known(self, plan: VisitPlan, ids: torch.Tensor) -> torch.Tensor:
        """`ids` [T] on the device, with what the last visit sampled in place of those that are PENDING.

        These are of decode rows, which come first, a token each. Of a sequence that has ended any id will do.
        """
        pending = np.flatnonzero(ids.numpy() == PENDING)
        ids = to_device(ids, self._device)
        if not len(pending):
            return ids
        slots, tokens = self._sampled[plan.micro_batch]
        order = np.argsort(slots, kind="stable")
        place = order[np.searchsorted(slots, plan.slots[pending], sorter=order)]
        told = tokens.index_select(0, to_device(place, self._device)).clamp(min=0)
        return ids.index_copy(0, to_device(pending, self._device), told)

    def _score(self, plan: VisitPlan, x: torch.Tensor, timeline: Timeline) -> torch.Tensor:
        """The words of a VisitResult's `prompt_beside`, int32 [words], from hidden states x [T, hidden]."""
        if not plan.scored:
            return torch.empty(0, dtype=torch.int32)
        row, token, position = plan.scored_positions()
        with timeline.on_device("sample", plan.micro_batch):
            x = x.index_select(0, to_device(token, self._device))
            return self._sampler.score(x, self._decoder.logits, plan.slots[row], position).view(-1)

    def _long(self, plan: VisitPlan) -> NDArray[np.bool_] | None:
        """Which rows' sequences are rotated as long ones, if the model tells them apart."""
        if not self._switch:
            return None
        for admission in plan.admissions:
            self._prompts[admission[0]] = admission[ADMISSION_WORDS - 1]
        return self._prompts[plan.slots] > self._switch

    def _through_layers(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        """Hidden states x [T, hidden] through the layers, by graphs where there are some for such a visit."""
        graphs = self._graphs.fitting(rows) if self._graphs is not None else None
        if graphs is not None:
            return graphs.replay(rows, x)
        self._decoder.backend.begin_visit(rows)
        return self._decoder.forward(x, self._kv)


def load_stage(checkpoint: Checkpoint, layout: Layout, shard: Shard, dtype: torch.dtype, device: torch.device) -> Stage:
    """The stage of `shard`: its weights read or made, its pages set up.

    Raises UserError for an unusable checkpoint, and with the arithmetic where memory does not suffice.
    """
    try:
        return _load_stage(checkpoint, layout, shard, dtype, device)
    except (RuntimeError, MemoryError) as error:  # pinned memory and contexts have no class of their own
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        raise UserError(_needs(checkpoint.config, layout, shard, dtype, device)) from error


def _needs(config: ModelConfig, layout: Layout, shard: Shard, dtype: torch.dtype, device: torch.device) -> str:
    """What a stage takes of which memory, for who ran out of it."""
    layers = shard.last - shard.first
    sliding = len(config.sliding(shard.first, shard.last)) if layout.sliding_pages else 0
    page_bytes = layout.page_size * config.kv_spec(dtype, layout.fp8_pages).token_bytes
    host = layout.rounds * layout.swap_pages + pool_pages(layout.host_height)
    pages = layout.layer_pages(layers, sliding)
    weights_gb, pages_gb, host_gb = (
        nbytes / 1e9
        for nbytes in (
            parameter_bytes(config, shard, dtype),
            pages * page_bytes,
            host * (layers - sliding) * page_bytes,
        )
    )
    has = others = ""
    if device.type == "cuda":
        has = f" of the {torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB of the GPU"
        others = held_by_others(device)
    return (
        f"out of memory while loading {layers} layers: their weights take {weights_gb:.1f} GB and "
        f"{pages / layers:.0f} KV pages {pages_gb:.1f} GB{has}, and {host} pages in host memory {host_gb:.1f} GB. "
        f"Lower kvcache.gpu_memory_gb, kvcache.swap_pages or kvcache.buddy_height, or start more ranks{others}"
    )


def _load_stage(
    checkpoint: Checkpoint, layout: Layout, shard: Shard, dtype: torch.dtype, device: torch.device
) -> Stage:
    config = checkpoint.config
    if checkpoint.weights == "dummy" or checkpoint.folder is None:
        weights = dummy_shard(config, shard, device, dtype)
    else:
        fetch_shard_files(checkpoint, shard)
        weights = load_shard(checkpoint.folder, config, shard, device, dtype)
    if layout.fp8_pages:
        for layer in weights.layers:
            fold_scales(layer, config)
    if config.quantisation is not None and config.quantisation.fused:
        _fuse(weights, config.quantisation.gemm == "humming", dtype, device)
    kv = KVPages(
        config.kv_spec(dtype, layout.fp8_pages),
        shard.last - shard.first,
        page_size=layout.page_size,
        main_pages=layout.main_pages,
        device=device,
        swap_pages=layout.swap_pages,
        rounds=layout.rounds,
        host_pages=pool_pages(layout.host_height),
        max_tokens=layout.max_batch_tokens,
        sequences=layout.concurrency,
        sliding=config.sliding(shard.first, shard.last) if layout.sliding_pages else (),
        sliding_pages=layout.sliding_pages,
    )
    decoder = Decoder(config, weights, make_backend(config, layout, dtype, device, len(kv.scratch)))
    graphs = None
    begin = time.monotonic()
    if decoder.backend.captures and config.experts is not None and grouped_mm_waits(dtype, device):
        print("experts run without CUDA graphs and slowly here: fast are bfloat16 ones on Hopper and Blackwell")
    elif decoder.backend.captures:
        graphs = capture(decoder, kv, layout.micro_batch_size, layout.max_batch_tokens)
    capture_s = time.monotonic() - begin
    stage = Stage(decoder, kv, layout.concurrency, dtype, device, graphs, lambda: guide(checkpoint))
    stage.capture_s = capture_s
    return stage


def _fuse(weights: ShardWeights, required: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Let humming-kernels multiply with packed weights on a GPU. Raises UserError if that is `required` and fails."""
    if device.type != "cuda":
        if required:
            raise UserError(f"model.gemm=humming is for GPUs, not device={device.type}: set model.gemm=auto or torch")
        return
    try:
        from deserve.model.humming import fuse
    except ImportError as error:
        if required:
            raise UserError(f"model.gemm=humming: {error}; pip install 'deserve[humming]'") from error
        print(f"humming-kernels is not usable ({error}): packed weights are unpacked for every product")
    else:
        fuse(weights, dtype, required)


def guide(checkpoint: Checkpoint) -> "LLTokenizer":
    """What the last rank needs to know of tokens for grammars. Loads the tokenizer, which other ranks do without."""
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None  # rank 0 takes no grammar without one
    return tokenizer.guide(checkpoint.config.vocab_size, end_ids(checkpoint, tokenizer))


def make_backend(
    config: ModelConfig, layout: Layout, dtype: torch.dtype, device: torch.device, tables: int = 1
) -> Backend:
    """FlashInfer's kernels on a GPU, where it is installed and has them for this model; otherwise PyTorch's.

    `tables`: how many page tables a visit has.
    """
    done = config.head_dim in (64, 128, 256) and not config.attention_sinks
    if device.type == "cuda" and dtype != torch.float32 and done:
        try:
            from deserve.model.backend.flashinfer import FlashInferBackend
        except ImportError as error:
            print(f"FlashInfer is not usable ({error}): PyTorch's attention takes its place, slowly")
        else:
            return FlashInferBackend(
                config,
                dtype,
                device,
                config.max_context,
                page_size=layout.page_size,
                max_tokens=layout.max_batch_tokens,
                # A token that pads reads one at most.
                max_pages=layout.visit_pages + layout.max_batch_tokens,
                tables=tables,
                fp8_pages=layout.fp8_pages,
            )
    return TorchBackend(config, dtype, device, config.max_context, layout.fp8_pages)
