"""Kernels from FlashInfer, for NVIDIA GPUs: paged attention, norms, rotary embedding and activation.

No call here makes the host wait for the device, except to keep it from running more than a few visits ahead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flashinfer
import numpy as np
import torch
from flashinfer.activation import get_act_and_mul_module
from flashinfer.norm import get_norm_module
from flashinfer.page import get_page_module
from flashinfer.prefill import get_batch_prefill_module
from flashinfer.rope import get_rope_module

from deserve.batch import IntArray
from deserve.kvcache.pages import KVLayer
from deserve.model.backend.base import Backend, Rows
from deserve.model.config import ModelConfig
from deserve.model.rope import rope_table
from deserve.staging import StagingRing

# The functions called below are not flashinfer's public ones, and the arguments of compiled ones have no names. 0.7.2
# fits but for one: `plan` of fa2 takes a further argument there, uniform_q_len.
FLASHINFER = "0.6.13"
if flashinfer.__version__.split("+")[0] != FLASHINFER:
    raise ImportError(
        f"flashinfer-python {flashinfer.__version__} is installed, but {FLASHINFER} is needed: "
        "pip install 'deserve[gpu]'"
    )

PLAN_BYTES = 4 << 20  # of the work lists of one attention call; 0.6 MB for 8,192 tokens of 256 rows and 64 heads
NO_MASK, CAUSAL = 0, 1  # flashinfer's mask modes
NHD = 0  # flashinfer's code for pages of [page_size, kv_heads, head_dim]
SHORT = 64  # tokens; fa3 gives every query head of a row a tile of 128 queries, which few tokens leave empty
LARGEST_TILE = 128  # queries times group of one thread block


@dataclass(frozen=True)
class _Call:
    """A planned attention call over some rows of a visit, complete but for what differs from layer to layer."""

    run: Callable[..., Any]  # lacks q, paged_k_cache, paged_v_cache and paged_kv_indices
    plan: Any  # launch parameters
    tokens: slice | None  # of those rows; None if they are the visit's only ones


@dataclass(frozen=True)
class _Visit:
    """Where the tokens of the current visit stand, and room for what its layers compute.

    Device arrays in memory that every visit and every layer uses again; the first two are int32.
    """

    rotations: torch.Tensor  # [T] rows of the table of angles
    row_of_token: torch.Tensor  # [T]
    views: dict[int | None, "_View"]  # by window
    attended: torch.Tensor  # [T, heads * head_dim]


@dataclass(frozen=True)
class _View:
    """What layers of one window see of a visit: each row begins with the first page that they read. Int32 arrays."""

    positions: torch.Tensor  # [T], from the row's first page
    pages: Sequence[torch.Tensor]  # those of all rows, by page table
    table: tuple[torch.Tensor, torch.Tensor]  # first of each row's pages, tokens in each row's last
    calls: list[_Call]


class _Attention:
    """An attention kernel over pages, and the memory it works in.

    flashinfer's own wrappers are passed over, for what their `plan` does on the host: copies from pageable memory,
    which wait for the device, one pinned buffer, which a host that runs ahead would overwrite while it is being
    copied, and a Python loop over the rows. `plan` and `call` below are what is left of them.
    """

    def __init__(
        self,
        variant: str,
        config: ModelConfig,
        dtype: torch.dtype,
        kept: torch.dtype,
        workspace: torch.Tensor,
        page_size: int,
        pdl: bool,
        window: int | None,
    ):
        """`kept`: the dtype of pages."""
        sizes, cap = (config.head_dim, config.head_dim), config.attention_cap
        self._module = get_batch_prefill_module(
            variant, dtype, kept, dtype, torch.int32, *sizes, 0, window is not None, cap is not None, False
        )
        self._window_left = -1 if window is None else window - 1  # tokens before the query's own
        self._split_options: tuple[Any, ...] = (-1, False, 0) if variant == "fa2" else ()  # contexts split as it likes
        self._config = config
        self._page_size = page_size
        self._workspace = workspace
        self._work = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=workspace.device)
        self._run = partial(
            self._module.paged_run,
            float_workspace_buffer=workspace,
            int_workspace_buffer=self._work,
            maybe_lse=None,
            layout=NHD,
            window_left=self._window_left,
            enable_pdl=pdl,
            maybe_custom_mask=None,
            maybe_mask_indptr=None,
            maybe_alibi_slopes=None,
            maybe_prefix_len_ptr=None,
            maybe_token_pos_in_items_ptr=None,
            maybe_max_item_len_ptr=None,
            logits_soft_cap=cap or 0.0,
            sm_scale=config.scale,
            scale_q=None,
            scale_k=None,
            scale_v=None,
            rope_scale=1.0,
            rope_theta=1.0,  # rotary embedding is done beforehand
            token_pos_in_items_len=0,
            workspace_size=workspace.numel(),
        )

    def plan(
        self, staging: torch.Tensor, queries: IntArray, indptr: IntArray, lengths: IntArray, causal: bool, fixed: bool
    ) -> Any:
        """Divide the rows among thread blocks, and enqueue the copy of the work lists. Returns the launch parameters.

        queries, indptr: [rows + 1] first token and first page of each row; lengths: [rows] tokens with their
        context. `fixed`: the parameters must depend on the number of rows alone, since they go into a CUDA graph.
        """
        config = self._config
        return self._module.plan(
            self._workspace,
            self._work,
            staging,
            torch.from_numpy(queries),
            torch.from_numpy(indptr),
            torch.from_numpy(lengths),
            int(queries[-1]),
            len(lengths),
            config.num_heads,
            config.num_kv_heads,
            self._page_size,
            fixed,
            config.head_dim,
            config.head_dim,
            causal,
            self._window_left,
            *self._split_options,
        )

    def call(
        self,
        plan: Any,
        queries: torch.Tensor,
        indptr: torch.Tensor,
        last_page: torch.Tensor,
        attended: torch.Tensor,
        tokens: slice | None,
        mask: int,
    ) -> _Call:
        """The call of `plan` for the visit's `tokens`, whose results go to `attended` [T, heads * head_dim].

        Device arrays: queries, indptr [rows + 1] first token and first page of each row; last_page [rows] tokens in
        the last page.
        """
        if tokens is not None:
            attended = attended[tokens]
        out = attended.view(len(attended), self._config.num_heads, -1)
        run = partial(
            self._run,
            plan_info_vec=plan,
            qo_indptr=queries,
            paged_kv_indptr=indptr,
            paged_kv_last_page_len=last_page,
            o=out,
            mask_mode=mask,
        )
        return _Call(run, plan, tokens)


class FlashInferBackend(Backend):
    """Decode rows and prefill rows of a visit are attended in one call each.

    Decode runs on the tensor cores too, where the queries that share a KV head make up a tile of 16: 128 sequences of
    1,024 tokens with 64/8 heads take an H200 141 us (3.8 TB/s), against 340 us on the CUDA cores. Page sizes from 8 to
    64 and the order of heads and tokens in a page make less than 2%, page size 1 costs 2% (bench/RESULTS.md).

    Of flashinfer's other kernels, too, the compiled functions are called and not the wrappers around them. In every
    call a wrapper makes views and conversions that change nothing here and asks again what never changes, and an eager
    visit of a small model takes the host longer than the device. The norms are then the compiled ones everywhere:
    the wrappers take another set, in CuTe, where nvidia-cutlass-dsl is installed.

    A visit may have `max_tokens` tokens, and as many rows; their contexts lie in `max_pages` pages.
    `prefill`, `fa2` or `fa3`, is the kernel for rows of many tokens; `auto` takes what was faster.
    `tables`: how many page tables a visit has. `fp8_pages`: keys and values are cast to e4m3, which fa2
    alone takes beside queries of another dtype.
    """

    captures = True

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int,
        page_size: int,
        max_tokens: int,
        max_pages: int,
        prefill: str = "auto",
        tables: int = 1,
        fp8_pages: bool = False,
    ):
        inners = {config.intermediate_size, config.experts.intermediate_size if config.experts else 0}
        if any(inner * dtype.itemsize % 16 for inner in inners):
            raise ValueError(f"the activation moves 16 bytes at a time: intermediate_size={max(inners)}")
        self._eps = config.norm_eps
        self._page_size = page_size
        # By kind of layer: cos | sin, [positions, rotated elements]
        self._tables = [torch.cat(rope_table(kind.rope, max_length, device), dim=-1) for kind in config.kinds]
        self._switch = config.rope_switch
        self._windows = [kind.window for kind in config.kinds]
        properties = torch.cuda.get_device_properties(device)
        blocks = 2 * properties.multi_processor_count
        # flashinfer splits contexts among thread blocks only if all of them can run at once, two per processor.
        self._most_split_rows = blocks // config.num_kv_heads
        partial = 4 * (config.head_dim + 1)  # bytes of one query's partial result
        workspace = torch.zeros(
            blocks * config.group * LARGEST_TILE * partial + (1 << 20), dtype=torch.uint8, device=device
        )
        self._pdl = pdl = properties.major >= 9  # programmatic dependent launch, as flashinfer's wrappers decide it
        if prefill == "auto":
            # 512 tokens on an H200: 26 us instead of fa2's 33 with 64/8 heads, 16 instead of 63 with 32/8. Measured in
            # bfloat16 with heads of 128; there is no fa3 but for Hopper.
            measured = dtype == torch.bfloat16 and config.head_dim == 128 and not fp8_pages
            prefill = "fa3" if properties.major == 9 and measured else "fa2"
        self._kept = torch.float8_e4m3fn if fp8_pages else dtype
        # By window: for decode rows, short prefill rows, and others
        self._attention = {
            window: [
                _Attention(variant, config, dtype, self._kept, workspace, page_size, pdl, window)
                for variant in ("fa2", "fa2", prefill)
            ]
            for window in self._windows
        }
        norms = get_norm_module()
        self._norm, self._add_norm = norms.rmsnorm, norms.fused_add_rmsnorm
        if config.norm_offset:
            self._norm, self._add_norm = norms.gemma_rmsnorm, norms.gemma_fused_add_rmsnorm
        name = config.activation
        self._activation = getattr(get_act_and_mul_module(name), f"{name}_and_mul")
        self._rotary = get_rope_module().apply_rope_pos_ids_cos_sin_cache
        self._append = get_page_module().append_paged_kv_cache

        self._attended = torch.empty(max_tokens, config.q_size, dtype=dtype, device=device)
        self._activated = torch.empty(max_tokens * config.activated_size, dtype=dtype, device=device)
        capacity = {"rotations": max_tokens, "row_of_token": max_tokens, "prefill_queries": max_tokens + 1}
        for window in self._attention:
            capacity |= {
                f"positions {window}": max_tokens,
                f"indptr {window}": max_tokens + 1,
                f"last_page {window}": max_tokens,
            }
        for window in self._attention:  # last, for only those in use are copied
            capacity |= {f"pages {window} {table}": max_pages for table in range(tables)}
        ends = np.cumsum(list(capacity.values())).tolist()
        self._offsets = dict(zip(capacity, [0, *ends], strict=False))
        self._words = torch.zeros(ends[-1], dtype=torch.int32, device=device)  # the arrays named in `capacity`
        self._count = np.arange(max_tokens + 1, dtype=np.int32)
        self._device_count = torch.arange(max_tokens + 1, dtype=torch.int32, device=device)
        self._ring = StagingRing((4 * ends[-1], *[PLAN_BYTES] * (2 * len(self._attention))))

    def begin_visit(self, rows: Rows) -> None:
        self._begin(rows, fixed=False)

    def begin_graph_visit(self, rows: Rows) -> list[int]:
        # Above that number of rows no context is split, and the grid follows from the number of rows anyway. Below it,
        # flashinfer fixes the grid for the price of a second kernel, which adds up the parts.
        self._begin(rows, fixed=len(rows.new_tokens) <= self._most_split_rows)
        return [word for view in self._visit.views.values() for call in view.calls for word in call.plan]

    def _begin(self, rows: Rows, fixed: bool) -> None:
        new, count = rows.new_tokens, len(rows.new_tokens)
        longer = np.flatnonzero(new != 1)
        decodes = int(longer[0]) if len(longer) else count
        queries = np.zeros(count - decodes + 1, np.int32)
        # Of each token: its row, and which of the row's new ones it is
        row_of_token: IntArray = self._count[:count]
        nth: IntArray | np.int32 = np.int32(0)
        if decodes < count:
            np.cumsum(new[decodes:], out=queries[1:])
            row_of_token = np.repeat(self._count[:count], new)
            nth = np.arange(len(row_of_token), dtype=np.int32) - (np.cumsum(new, dtype=np.int32) - new)[row_of_token]
        rotations = rows.context[row_of_token] + nth
        if rows.long is not None:
            rotations = rotations + np.int32(self._switch) * rows.long[row_of_token]
        values = {"rotations": rotations, "row_of_token": row_of_token, "prefill_queries": queries}
        lengths = {}
        for window in self._attention:
            seen = rows.within(window, self._page_size)
            lengths[window] = length = np.add(seen.context, new, dtype=np.int32)
            used = -(-length // self._page_size)
            indptr = np.zeros(count + 1, np.int32)
            np.cumsum(used, out=indptr[1:])
            values |= {
                f"positions {window}": seen.context[row_of_token] + nth,
                f"indptr {window}": indptr,
                f"last_page {window}": length - (used - 1) * self._page_size,
            }
            taken = np.flatnonzero(np.arange(seen.tables[0].shape[1]) < used[:, None])
            values |= {f"pages {window} {number}": table.take(taken) for number, table in enumerate(seen.tables)}

        words, *plan_staging = self._ring.next()
        host = words.view(torch.int32)
        host_words = host.numpy()
        fields = {}
        first_pages = next(name for name in self._offsets if name.startswith("pages"))
        for name, offset in self._offsets.items():
            end = offset + len(values[name])
            host_words[offset:end] = values[name]
            fields[name] = self._words[offset:end]
            if name.startswith("pages"):  # the first with all that stands before it
                begin = 0 if name == first_pages else offset
                self._words[begin:end].copy_(host[begin:end], non_blocking=True)
        tokens, views = len(row_of_token), {}
        attended = self._attended[:tokens]
        for number, (window, (decode, short, long)) in enumerate(self._attention.items()):
            staging, length, indptr = plan_staging[2 * number :], lengths[window], values[f"indptr {window}"]
            first_page, last_page = fields[f"indptr {window}"], fields[f"last_page {window}"]
            calls: list[_Call] = []
            # Both calls can share one list of pages: a row's pages are counted from the visit's first.
            if decodes:
                every = self._count[: decodes + 1]
                plan = decode.plan(staging[0], every, indptr[: decodes + 1], length[:decodes], False, fixed)
                where = (first_page[: decodes + 1], last_page[:decodes])
                part = slice(0, decodes) if decodes < count else None
                calls.append(decode.call(plan, self._device_count[: decodes + 1], *where, attended, part, NO_MASK))
            if decodes < count:
                attention = short if queries[-1] < SHORT * (count - decodes) else long
                plan = attention.plan(staging[1], queries, indptr[decodes:], length[decodes:], True, False)
                where = (first_page[decodes:], last_page[decodes:])
                part = slice(decodes, tokens) if decodes else None
                calls.append(attention.call(plan, fields["prefill_queries"], *where, attended, part, CAUSAL))
            pages = [fields[f"pages {window} {table}"] for table in range(len(rows.tables))]
            views[window] = _View(fields[f"positions {window}"], pages, (first_page, last_page), calls)
        self._ring.enqueued()
        self._visit = _Visit(fields["rotations"], fields["row_of_token"], views, attended)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # the norm by 1 + weight takes no heads
        out = torch.empty_like(rows)
        self._norm(out, rows, weight, self._eps, self._pdl)
        return out.view(x.shape)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self._add_norm(x, residual, weight, self._eps, self._pdl)
        return x

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        size = gate_up.shape[-1] // 2
        out = self._activated[: len(gate_up) * size].view(-1, size)
        self._activation(out, gate_up, self._pdl)
        return out

    def gelu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.silu_and_mul(gate_up)  # a model has one of both, and `_activation` is it

    def rotate(self, q: torch.Tensor, k: torch.Tensor, kind: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        # in place; halves, not interleaved pairs
        self._rotary(q, k, q, k, self._tables[kind], self._visit.rotations, False)
        return q, k

    def append(self, layer: KVLayer, k: torch.Tensor, v: torch.Tensor, kind: int = 0) -> None:
        row_of_token, view = self._visit.row_of_token, self._visit.views[self._windows[kind]]
        pages = view.pages[layer.table]
        k, v = k.to(self._kept), v.to(self._kept)
        self._append(k, v, row_of_token, view.positions, *layer.memory.unbind(1), pages, *view.table, NHD)

    def attend(self, layer: KVLayer, q: torch.Tensor, kind: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        assert sinks is None  # of a model that has them, PyTorch's backend takes care
        view = self._visit.views[self._windows[kind]]
        pages, (keys, values) = view.pages[layer.table], layer.memory.unbind(1)
        for call in view.calls:
            part = q if call.tokens is None else q[call.tokens]
            call.run(q=part, paged_k_cache=keys, paged_v_cache=values, paged_kv_indices=pages)
        return self._visit.attended
