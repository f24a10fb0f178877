"""Kernels from plain PyTorch, for CPUs and as the reference for others; some of C for CPUs."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deserve.batch import Ints
from deserve.kvcache.pages import KVLayer
from deserve.model.backend.base import Backend, Rows
from deserve.model.backend.cpu import Reads, cpu_kernels
from deserve.model.config import ModelConfig
from deserve.model.rope import rope_table


@dataclass
class Bucket:
    """Rows of like length that attend together, padded to the longest of them.

    `tokens` [n, q] indices of their tokens in the visit (a slice when they lie end to end without padding);
    `keys`, `values` [n, p] half-page indices, by page table;
    `mask` [n, 1, q * group, p * page_size] added to the scores;
    `real` [n * q] which of the padded tokens exist, None when all do.
    """

    tokens: torch.Tensor | slice
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    mask: torch.Tensor
    real: torch.Tensor | None
    rows: int
    queries: int
    blocks: list[slice]  # of rows that attend in one call
    past: list[torch.Tensor]  # of each block, the gathered positions in rows' last pages after their last tokens


@dataclass
class Shared:
    """Rows whose contexts begin with the same pages, which are read once for all of them.

    `tokens` [n] of the rows in the visit; `reads`: how they, numbered from 0 on, attend to the pages, a single row's.
    """

    tokens: torch.Tensor
    reads: Reads


@dataclass
class Attending:
    """How layers of one window attend in a visit: in place, or in buckets; and which pages several rows share."""

    in_place: list[Reads]
    buckets: list[Bucket]
    shared: list[Shared]


# Pages that must be saved where a visit's rows share some, for a call of its own: fewer cost less to read again.
SHARED_PAGES = 128
SHARED_TOKENS = 12  # new tokens of a row: with more, in place, to merge two results costs more than to read pages again
FEW = 4  # new tokens of a row: each reads the row's pages, the first from memory and the others from the cache
# Keys and values that are gathered at a time: the gathered copy should be read again before it leaves the cache.
GATHER_BYTES = 4 << 20
# Scores that are computed at a time where PyTorch has no kernel that keeps none: 256 MB of them.
SCORES = 1 << 26


class TorchBackend(Backend):
    """Attention as a batched gather of pages and one `scaled_dot_product_attention` for many rows.

    Rows are put into buckets by the powers of two of their query length and their whole length, so padding is at
    most twofold in each. The query heads that share a KV head become further queries of it: no key is copied for
    their sake. A large bucket is attended in blocks of rows that fit the cache.

    A layer with a window gathers only the pages that its rows' windows reach.

    On a CPU, pages with which the contexts of several rows begin are attended at once for all of these, and the
    rest of each row as if it began there, in layers without a window. The log-sum-exp of either's scores says how the
    two are to be merged.

    On a CPU that has a C compiler nothing is gathered: in layers without window and soft cap tokens read their rows'
    pages in place, unless these are in fp8. Those of a row with few new tokens do so one by one, others in blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int,
        fp8_pages: bool = False,
    ):
        self._config, self._dtype, self._device = config, dtype, device
        self._ropes = []  # by kind: cos and sin, [positions, dim]
        for kind in config.kinds:
            cos, sin = rope_table(kind.rope, max_length, device)
            self._ropes.append((torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)))
        self._kernels = cpu_kernels(config, dtype) if device.type == "cpu" else None
        plain = config.attention_cap is None and config.scale == config.head_dim**-0.5 and not fp8_pages
        self._in_place = self._kernels if plain else None  # what reads pages in place
        self._gathered = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]
        self._finite = device.type == "cpu"  # whether no NaN was ever written to a page, as far as the host can know
        self._e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(device, dtype)

    def begin_visit(self, rows: Rows) -> None:
        self._rows = rows
        first = np.cumsum(rows.new_tokens) - rows.new_tokens
        self._row_of_token = np.repeat(np.arange(len(rows.new_tokens)), rows.new_tokens)
        offsets = np.arange(len(self._row_of_token)) - first[self._row_of_token]
        self._positions = rows.context[self._row_of_token] + offsets
        positions = self._positions
        if rows.long is not None:
            positions = positions + self._config.rope_switch * rows.long[self._row_of_token]
        at = self._tensor(positions)
        self._angles = [(cos[at].unsqueeze(1), sin[at].unsqueeze(1)) for cos, sin in self._ropes]  # [T, 1, dim]
        self._first = first
        self._page_size = 0

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._config.norm_offset:
            return F.rms_norm(x.float(), weight.shape, 1 + weight.float(), self._config.norm_eps).to(x.dtype)
        if self._kernels is not None:
            return self._kernels.rms_norm(x, weight, self._config.norm_eps)
        return F.rms_norm(x, weight.shape, weight, self._config.norm_eps)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None and not self._config.norm_offset:
            return self._kernels.rms_norm(x, weight, self._config.norm_eps, residual)
        return self.rms_norm(residual.add_(x), weight)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None:
            return self._kernels.silu_and_mul(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def gelu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def rotate(self, q: torch.Tensor, k: torch.Tensor, kind: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        rotated = _rotated if self._kernels is None else self._kernels.rotate
        return rotated(q, *self._angles[kind]), rotated(k, *self._angles[kind])

    def append(self, layer: KVLayer, k: torch.Tensor, v: torch.Tensor, kind: int = 0) -> None:
        if not self._page_size:
            self._address(layer.memory.shape[2])
        slots = _raw(layer.memory).view(-1, *k.shape[1:])  # one row per (page, k or v, offset)
        for part, where in zip((k, v), self._slots[layer.table], strict=True):
            slots.index_copy_(0, where, _raw(part.to(layer.memory.dtype)))
        if self._finite:
            self._finite = math.isfinite(float(k.sum(dtype=torch.float32)) + float(v.sum(dtype=torch.float32)))

    def attend(self, layer: KVLayer, q: torch.Tensor, kind: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        pages = layer.memory
        tokens, heads, head_dim = q.shape
        kv_heads = pages.shape[3]
        halves = _raw(pages).view(pages.shape[0] * 2, -1)  # one row per (page, k or v)
        out = torch.empty(tokens, heads * head_dim, dtype=q.dtype, device=q.device)
        scale, cap = self._config.scale, self._config.attention_cap
        how = self._attending(self._config.kinds[kind].window)
        merges = bool(how.shared) or sinks is not None
        # log-sum-exp of each token's scores
        weight = torch.empty(tokens, kv_heads, heads // kv_heads if merges else 0, device=q.device)
        for reads in how.in_place:
            assert self._in_place is not None
            self._in_place.attend(layer, reads, q.contiguous(), out, weight if merges else None)
        for bucket in how.buckets:
            queries = q[bucket.tokens].view(bucket.rows, bucket.queries, kv_heads, heads // kv_heads, head_dim)
            queries = queries.transpose(1, 2).reshape(bucket.rows, kv_heads, -1, head_dim)
            attended = torch.empty_like(queries)
            scores = torch.empty(queries.shape[:3], device=q.device) if merges else None
            for block, past in zip(bucket.blocks, bucket.past, strict=True):
                keys = self._gather(0, halves, bucket.keys[layer.table][block], past, kv_heads)
                values = self._gather(1, halves, bucket.values[layer.table][block], past, kv_heads)
                mask = bucket.mask[block]
                if scores is None and cap is None:
                    attended[block] = F.scaled_dot_product_attention(
                        queries[block], keys, values, attn_mask=mask, scale=scale
                    )
                else:
                    attended[block], sums = _attend(queries[block], keys, values, mask, scale, cap)
                    if scores is not None:
                        scores[block] = sums
            attended = attended.view(bucket.rows, kv_heads, bucket.queries, -1, head_dim).transpose(1, 2)
            attended = attended.reshape(bucket.rows * bucket.queries, -1)
            into: torch.Tensor | slice = bucket.tokens
            real: torch.Tensor | slice = slice(None)
            if isinstance(into, torch.Tensor):
                real = slice(None) if bucket.real is None else bucket.real
                into = into.flatten()[real]
            out[into] = attended[real]
            if scores is not None:
                scores = scores.view(bucket.rows, kv_heads, bucket.queries, -1).transpose(1, 2)
                weight[into] = scores.reshape(bucket.rows * bucket.queries, kv_heads, -1)[real]
        for shared in how.shared:
            attended, scores = self._attend_shared(layer, shared, q[shared.tokens])
            share = torch.sigmoid(scores - weight[shared.tokens]).unsqueeze(-1)  # of the shared pages
            own = out[shared.tokens].view(*share.shape[:3], head_dim)
            merged = torch.lerp(own.float(), attended.reshape(own.shape).float(), share)
            out[shared.tokens] = merged.to(out.dtype).flatten(1)
            weight[shared.tokens] = torch.logaddexp(scores, weight[shared.tokens])
        if sinks is not None:
            share = torch.sigmoid(weight - sinks.float().view(kv_heads, -1)).unsqueeze(-1)  # of all but the sink
            out.view(*share.shape[:3], head_dim).mul_(share.to(out.dtype))
        return out

    def _attend_shared(self, layer: KVLayer, shared: Shared, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of q [n, heads, head_dim] over the shared pages, and the log-sum-exp of its scores [n, kv_heads,
        group], float32."""
        pages, n = layer.memory, len(q)
        kv_heads = pages.shape[3]
        if self._in_place is not None:
            attended, scores = torch.empty_like(q), torch.empty(n, kv_heads, q.shape[1] // kv_heads)
            self._in_place.attend(layer, shared.reads, q, attended, scores)
            return attended, scores
        halves, none = _raw(pages).view(pages.shape[0] * 2, -1), self._tensor(np.zeros(0, np.int64))
        queries = q.view(n, kv_heads, -1, q.shape[2]).transpose(0, 1)
        table = self._tensor(shared.reads.tables[layer.table].astype(np.int64))
        keys = self._gather(0, halves, 2 * table, none, kv_heads)
        values = self._gather(1, halves, 2 * table + 1, none, kv_heads)
        scale, cap = self._config.scale, self._config.attention_cap
        attended, scores = _attend(queries.reshape(1, kv_heads, -1, q.shape[2]), keys, values, None, scale, cap)
        return attended.view(queries.shape).transpose(0, 1), scores.view(queries.shape[:3]).transpose(0, 1)

    def _gather(
        self, buffer: int, halves: torch.Tensor, index: torch.Tensor, past: torch.Tensor, kv_heads: int
    ) -> torch.Tensor:
        """The half pages `index` [n, p], one after the other: [n, kv_heads, p * page_size, head_dim].

        Zeros at the positions `past`, counted over all n rows, if there may be NaN in a page.

        Always into the same memory: a fresh large tensor costs more in page faults than the copy itself.
        """
        n, width = index.shape
        size = n * width * halves.shape[1]
        if self._gathered[buffer].numel() < size:
            self._gathered[buffer] = torch.empty(size, dtype=self._dtype, device=halves.device)
        gathered = self._gathered[buffer][:size].view(n * width, -1)
        if halves.dtype == torch.uint8:  # a table widens four times as fast as a conversion
            codes = torch.index_select(halves, 0, index.reshape(-1)).view(-1).int()
            torch.index_select(self._e4m3, 0, codes, out=gathered.view(-1))
        else:
            torch.index_select(halves, 0, index.reshape(-1), out=gathered)
        if not self._finite:
            gathered.view(n * width * self._page_size, -1).index_fill_(0, past, 0)
        return gathered.view(n, width * self._page_size, kv_heads, -1).transpose(1, 2)

    def _address(self, page_size: int) -> None:
        """Where the visit's keys and values are written, by page table."""
        self._page_size = page_size
        self._how: dict[int | None, Attending] = {}  # by window
        rows = self._rows
        self._slots = []
        for table in rows.tables:
            page = table[self._row_of_token, self._positions // page_size].astype(np.int64)
            slot = 2 * page * page_size + self._positions % page_size
            self._slots.append((self._tensor(slot), self._tensor(slot + page_size)))

    def _attending(self, window: int | None) -> Attending:
        """How layers with that window attend in this visit."""
        if window in self._how:
            return self._how[window]
        page_size, rows, shared = self._page_size, self._rows.within(window, self._page_size), list[Shared]()
        if window is None:
            shared, skipped = self._share(rows, page_size)
            rows = rows.behind(skipped, page_size)
        if self._in_place is not None and window is None:
            how = Attending(in_place(rows, self._in_place.block), [], shared)
        else:
            alike = 64 * _bits(rows.new_tokens) + _bits(rows.context + rows.new_tokens)
            members = [np.flatnonzero(alike == each) for each in np.unique(alike)]
            how = Attending([], [self._bucket(rows, each, page_size, window) for each in members], shared)
        self._how[window] = how
        return how

    def _share(self, rows: Rows, page_size: int) -> tuple[list[Shared], np.ndarray]:
        """What several rows read at once, and how many pages of each row are in there: [rows]."""
        shares: list[Shared] = []
        skipped = np.zeros(len(rows.new_tokens), np.int64)
        if self._device.type != "cpu":
            return shares, skipped
        full = rows.context // page_size
        if self._in_place is not None:
            full = np.where(rows.new_tokens <= SHARED_TOKENS, full, 0)
        for members, width in _shared_groups(rows.tables[0], full):
            if (len(members) - 1) * width < SHARED_PAGES:
                continue
            skipped[members] = width
            tokens = np.flatnonzero(np.isin(self._row_of_token, members))
            first, nth = np.zeros(len(tokens), np.int64), np.arange(len(tokens))
            lengths = np.full(len(tokens), width * page_size, np.int32)
            pages = [np.ascontiguousarray(table[members[:1], :width], np.int32) for table in rows.tables]
            blocks = None if self._in_place is None else _blocks(first, nth, self._in_place.block)
            shares.append(Shared(self._tensor(tokens), Reads(nth, lengths, pages, blocks)))
        return shares, skipped

    def _bucket(self, rows: Rows, members: np.ndarray, page_size: int, window: int | None) -> Bucket:
        new, context = rows.new_tokens[members], rows.context[members]
        queries = int(new.max())
        width = int(-(-(context + new).max() // page_size))
        # What lies behind a row's tokens is masked, but if another sequence left NaN there, 0 times NaN is NaN. The
        # row's own first page stands in for the pages it lacks, and the rest of its last page is gathered as zeros.
        length = context + new
        held = -(-length // page_size)
        lacks = np.arange(width) >= held[:, None]
        pages = [table[members, :width].astype(np.int64) for table in rows.tables]
        pages = [np.where(lacks, table[:, :1], table) for table in pages]
        row_bytes = 2 * width * page_size * self._config.num_kv_heads * self._config.head_dim * self._dtype.itemsize
        block = max(1, GATHER_BYTES // row_bytes)
        starts = np.arange(0, len(members), block)
        row, past = np.nonzero(np.arange(page_size) >= (length - (held - 1) * page_size)[:, None])
        past += (row % block * width + held[row] - 1) * page_size
        step = np.arange(queries)
        tokens = self._first[members, None] + np.minimum(step, new[:, None] - 1)
        positions = context[:, None] + np.minimum(step, new[:, None] - 1)
        keys, queried = np.arange(width * page_size), positions[:, :, None]
        visible = keys <= queried  # [n, q, keys]
        if window is not None:
            visible &= keys > queried - window
        visible = np.repeat(visible, self._config.group, axis=1)
        mask = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None]
        whole = bool((new == queries).all())
        flat = tokens.reshape(-1)
        end_to_end = whole and bool((np.diff(flat) == 1).all())
        return Bucket(
            tokens=slice(int(flat[0]), int(flat[-1]) + 1) if end_to_end else self._tensor(tokens),
            keys=[self._tensor(2 * table) for table in pages],
            values=[self._tensor(2 * table + 1) for table in pages],
            mask=torch.from_numpy(mask).to(self._device, self._dtype),
            real=None if whole else self._tensor((step < new[:, None]).reshape(-1)),
            rows=len(members),
            queries=queries,
            blocks=[slice(at, at + block) for at in starts.tolist()],
            past=[self._tensor(part) for part in np.split(past, np.searchsorted(row, starts[1:]))],
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def in_place(rows: Rows, block: int) -> list[Reads]:
    """How a visit's tokens read their `rows`' pages: one by one, or `block` at most at a time."""
    row = np.repeat(np.arange(len(rows.new_tokens)), rows.new_tokens)
    nth = np.arange(len(row)) - (np.cumsum(rows.new_tokens) - rows.new_tokens)[row]
    lengths = (rows.context[row] + nth + 1).astype(np.int32)
    tables = [np.ascontiguousarray(table, np.int32) for table in rows.tables]
    few = rows.new_tokens[row] <= FEW
    single, many = np.flatnonzero(few), np.flatnonzero(~few)
    reads = []
    if len(single):
        reads.append(Reads(single, lengths[single], [table[row[single]] for table in tables]))
    if len(many):
        blocks = _blocks(row[many], nth[many], block)
        # The longest first, so that threads end at about the same time.
        blocks = blocks[np.argsort(-lengths[many[blocks[:, 2] - 1]])]
        reads.append(Reads(many, lengths[many], tables, blocks))
    return reads


def _blocks(row: Ints, nth: Ints, block: int) -> Ints:
    """The `blocks` of `Reads` for tokens that are the `nth` [n] new ones of rows `row` [n]."""
    begin = np.flatnonzero(nth % block == 0)
    return np.stack([row[begin], begin, np.append(begin[1:], len(row))], 1)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    dim = cos.shape[-1]
    part = x[..., :dim]
    # sin's first half is negated, so rolling by half the elements stands for HF's rotate_half.
    turned = torch.addcmul(part * cos, part.roll(dim // 2, -1), sin)
    return turned if dim == x.shape[-1] else torch.cat([turned, x[..., dim:]], -1)


def _raw(x: torch.Tensor) -> torch.Tensor:
    """`x`, as bytes if it is e4m3, for which many operations are not made."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [n, heads, q, head_dim], and the log-sum-exp of the scores [n, heads, q], float32.

    PyTorch's kernel that says both has no soft cap, and is for CPUs.
    """
    if cap is None and queries.device.type == "cpu":
        attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=mask, scale=scale
        )
        return attended, sums
    rows, heads, count, _ = queries.shape
    most = max(1, SCORES // (rows * heads * keys.shape[2]))
    if count > most:
        masks = [None] * -(-count // most) if mask is None else mask.split(most, 2)
        parts = [
            _attend(some, keys, values, part, scale, cap)
            for some, part in zip(queries.split(most, 2), masks, strict=True)
        ]
        attended, sums = (torch.cat(each, 2) for each in zip(*parts, strict=True))
        return attended, sums
    scores = (queries @ keys.transpose(-1, -2)).float().mul_(scale)
    if cap is not None:
        scores.div_(cap).tanh_().mul_(cap)
    if mask is not None:
        scores += mask
    return scores.softmax(-1).to(values.dtype) @ values, scores.logsumexp(-1)


def _shared_groups(table: np.ndarray, full: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Rows whose first pages in `table` [rows, width] are the same, and how many; `full` [rows] may count at most.

    Of groups within groups those are taken that save most.
    """

    def split(members: np.ndarray, depth: int) -> tuple[int, list[tuple[np.ndarray, int]]]:
        """Pages saved by the groups within `members`, which share their first `depth` pages."""
        best = (len(members) - 1) * depth, [(members, depth)] if depth else []
        members = members[full[members] > depth]
        if len(members) < 2:
            return best
        saved = 0
        groups: list[tuple[np.ndarray, int]] = []
        pages, counts = np.unique(table[members, depth], return_counts=True)
        for page in pages[counts > 1]:
            inside = members[table[members, depth] == page]
            width = int(full[inside].min())
            alike = (table[inside, :width] == table[inside[0], :width]).all(0)
            width = width if alike.all() else int(alike.argmin())
            more, found = split(inside, width)
            saved, groups = saved + more, groups + found
        return (saved, groups) if saved > best[0] else best

    return split(np.arange(len(full)), 0)[1]


def _bits(lengths: np.ndarray) -> np.ndarray:
    """The exponent of the smallest power of two that is at least each of `lengths`."""
    return np.ceil(np.log2(lengths)).astype(np.int64)
