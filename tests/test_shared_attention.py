"""Attention on CPUs: over pages that several rows share, and in place: the same results."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from deserve.config import load_config
from deserve.kvcache.pages import KVLayer
from deserve.model.backend import cpu
from deserve.model.backend import torch as backends
from deserve.model.backend.base import Rows
from deserve.model.backend.cpu import cpu_kernels
from deserve.model.checkpoint import resolve
from deserve.model.config import ModelConfig

PAGE = 4


def kernel_config(heads: int, kv_heads: int, head_dim: int) -> Any:
    """What the kernels need to know of a model."""
    return SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, group=heads // kv_heads)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=2)
    return resolve(load_config([f"model.path={folder}"]).model).config


def tables(rows: list[tuple[list[int], int, int]]) -> Rows:
    """Rows (choices of a branch, further context, new tokens): rows share the pages of the branches they both took,
    each of two pages."""
    named: dict[tuple[int, ...], int] = {}
    pages, context = [], []
    for path, further, _ in rows:
        branches = [named.setdefault(tuple(path[: depth + 1]), len(named)) for depth in range(len(path))]
        pages.append([2 * branch + half for branch in branches for half in range(2)])
        context.append(2 * PAGE * len(path) + further)
    free = 2 * len(named)
    width = max(-(-(begin + new) // PAGE) for begin, (_, _, new) in zip(context, rows, strict=True))
    table = np.zeros((len(rows), width), np.int32)
    for row, shared in enumerate(pages):
        own = np.arange(free, free + width - len(shared))
        table[row] = [*shared, *own]
        free += len(own)
    return Rows(np.array([new for *_, new in rows], np.int32), np.array(context, np.int32), [table])


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), max_size=4), st.integers(0, 9), st.integers(1, 6) | st.integers(31, 34)),
        min_size=1,
        max_size=12,
    )
)
def test_pages_read_once_give_what_each_row_alone_reads(config: ModelConfig, drawn: list[Any]) -> None:
    rows = tables(drawn)
    random = torch.Generator().manual_seed(0)
    memory = torch.randn(int(rows.tables[0].max()) + 1, 2, PAGE, config.num_kv_heads, config.head_dim, generator=random)
    tokens = int(rows.new_tokens.sum())
    q, k, v = (
        torch.randn(tokens, heads, config.head_dim, generator=random)
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    )
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        for least, in_place in ((1, True), (10**9, True), (1, False), (10**9, False)):
            patch.setattr(backends, "SHARED_PAGES", least)
            if not in_place:
                patch.setattr(backends, "cpu_kernels", lambda *_: None)
            backend = backends.TorchBackend(config, torch.float32, torch.device("cpu"), config.max_context)
            layer = KVLayer(memory.clone(), 0)
            backend.begin_visit(rows)
            backend.append(layer, k, v)
            outputs.append(backend.attend(layer, q))
    for output in outputs[:-1]:
        torch.testing.assert_close(output, outputs[-1], atol=2e-6, rtol=1e-5)


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 200) | st.integers(0, 20), st.sampled_from([1, 1, 2, 7, 64, 97, 200])),
        min_size=1,
        max_size=6,
    ),
    shape=st.sampled_from([(1, 1, 16), (3, 3, 64), (2, 8, 80)]),  # each is compiled
    page=st.sampled_from([1, 4, 16, 24]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 30.0]),
    threads=st.sampled_from([1, 3]),
    few=st.sampled_from([0, 4, 1000]),
)
def test_attention_in_place_is_attention(
    rows: list[tuple[int, int]],
    shape: tuple[int, int, int],
    page: int,
    dtype: torch.dtype,
    scale: float,
    threads: int,
    few: int,
) -> None:
    """Of rows (context, new tokens), one by one and in blocks, whatever lies behind a row's last token; NaN in a key
    stays with those that see it."""
    kv_heads, group, head_dim = shape
    random = torch.Generator().manual_seed(len(rows))
    kernels = cpu_kernels(kernel_config(kv_heads * group, kv_heads, head_dim), dtype)
    assert kernels is not None
    context, new = (np.array(each, np.int32) for each in zip(*rows, strict=True))
    pages = -(-(context + new) // page)
    memory = torch.full((int(pages.sum()), 2, page, kv_heads, head_dim), torch.nan, dtype=dtype)
    order = torch.randperm(len(memory), generator=random).to(torch.int32).numpy()
    table = np.zeros((len(rows), pages.max()), np.int32)
    tokens = int(new.sum())
    q = (scale * torch.randn(tokens, kv_heads * group, head_dim, generator=random)).to(dtype)
    expected, log_sums = [], []
    for row, queries in enumerate(q.float().split(new.tolist())):
        own = table[row, : pages[row]] = order[pages[:row].sum() :][: pages[row]]
        length = int(context[row] + new[row])
        kv = torch.randn(2, len(own) * page, kv_heads, head_dim, generator=random).to(dtype)
        kv[:, length:] = torch.nan
        if row == 1:
            kv[0, length // 2] = torch.nan
        memory[own] = kv.view(2, len(own), page, kv_heads, head_dim).transpose(0, 1)
        keys, values = kv[:, :length].float().repeat_interleave(group, 2)
        scores = torch.einsum("qhd,thd->qht", queries, keys) / head_dim**0.5
        unseen = torch.arange(length) > torch.arange(context[row], length)[:, None]
        scores.masked_fill_(unseen[:, None], -torch.inf)
        log_sums.append(scores.logsumexp(-1))
        expected.append(torch.einsum("qht,thd->qhd", scores.softmax(-1), values).flatten(1))
    found, found_sums = torch.empty(tokens, kv_heads * group * head_dim, dtype=dtype), torch.empty(q.shape[:2])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "FEW", few)
        for reads in backends.in_place(Rows(new, context, [table]), kernels.block):
            kernels.attend(KVLayer(memory, 0), reads, q, found, found_sums)
    torch.set_num_threads(before)
    close = {"equal_nan": True, "atol": 1e-5 * scale, "rtol": 1e-5}
    torch.testing.assert_close(found_sums, torch.cat(log_sums), **close)
    close |= {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found.float(), torch.cat(expected), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_activations_and_rotations_of_the_kernels(dtype: torch.dtype) -> None:
    """Against float64; in bfloat16 to one rounding. Infinity and NaN stay what they are."""
    kernels = cpu_kernels(kernel_config(3, 3, 64), dtype)
    assert kernels is not None
    close = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 1e-6}
    random = torch.Generator().manual_seed(0)
    for rows, n in ((1, 7), (5, 576), (0, 16)):
        x, residual, weight, up = (
            (3 * torch.randn(shape, generator=random)).to(dtype) for shape in ((rows, n), (rows, n), (n,), (rows, n))
        )
        summed = residual + x
        expected = F.rms_norm(summed.double(), (n,), weight.double(), 1e-5)
        normed = kernels.rms_norm(x, weight, 1e-5, residual)
        torch.testing.assert_close(normed.double(), expected, **close)
        assert torch.equal(residual, summed)
        gate = 10 * x
        gate.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -200.0])[: gate.numel()]
        found = kernels.silu_and_mul(torch.cat([gate, up], 1)).double()
        torch.testing.assert_close(found, F.silu(gate.double()) * up.double(), equal_nan=True, **close)
    parts = torch.randn(4, 9, 64, generator=random).to(dtype).split([6, 3], 1)[1]  # the keys of queries and keys
    weight = torch.randn(64, generator=random).to(dtype)
    found = kernels.rms_norm(parts, weight, 1e-6).double()
    torch.testing.assert_close(found, F.rms_norm(parts.double(), (64,), weight.double(), 1e-6), **close)
    for size in (64, 24):
        cos, sin = torch.randn(2, 4, 1, size, generator=random).to(dtype)
        expected = backends._rotated(parts.double(), cos.double(), sin.double())
        torch.testing.assert_close(kernels.rotate(parts, cos, sin).double(), expected, **close)


def test_without_a_compiler_pages_are_gathered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or with one that fails, or without a folder to compile in."""
    shape = kernel_config(2, 2, 32)

    def kernel() -> object:
        cpu._library.cache_clear()
        return cpu_kernels(shape, torch.float32)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel() is not None and len(list((tmp_path / "deserve").iterdir())) == 1
    assert cpu_kernels(shape, torch.float16) is None
    for name, value in (("CC", "false"), ("CC", "no-such-compiler"), ("XDG_CACHE_HOME", "/dev/null/cache")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert kernel() is None
    cpu._library.cache_clear()


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), max_size=4), st.integers(0, 9), st.integers(1, 9)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, None]),
    st.sampled_from([None, 2.0]),
    st.sampled_from([1, 100, backends.SCORES]),
)
def test_windows_and_soft_caps(
    config: ModelConfig, drawn: list[Any], window: int | None, cap: float | None, most: int
) -> None:
    """Against attention token by token; and no page is read that lies outside of all windows, as there is NaN.

    However few scores are computed at a time, down to one query's.
    """
    config = replace(config, kinds=(replace(config.kinds[0], window=window),), attention_cap=cap)
    rows = tables(drawn)
    (table,) = rows.tables
    random = torch.Generator().manual_seed(0)
    memory = torch.full((int(table.max()) + 1, 2, PAGE, config.num_kv_heads, config.head_dim), torch.nan)
    for row, context, new in zip(table, rows.context, rows.new_tokens, strict=True):
        reached = row[max(0, context - (window or 10**6) + 1) // PAGE : -(-(context + new) // PAGE)]
        memory[reached] = torch.randn(len(reached), *memory.shape[1:], generator=random)
    tokens = int(rows.new_tokens.sum())
    q, k, v = (
        torch.randn(tokens, heads, config.head_dim, generator=random)
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    )
    backend = backends.TorchBackend(config, torch.float32, torch.device("cpu"), config.max_context)
    backend.begin_visit(rows)
    backend.append(KVLayer(memory, 0), k, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "SCORES", most)
        given = backend.attend(KVLayer(memory, 0), q)
    token = 0
    for row, context, new in zip(table, rows.context.tolist(), rows.new_tokens.tolist(), strict=True):
        keys, values = memory[row].transpose(0, 1).flatten(1, 2)  # [positions, kv_heads, head_dim] each
        for position in range(context, context + new):
            seen = slice(max(0, position + 1 - (window or 10**6)), position + 1)
            key, value = (part[seen].repeat_interleave(config.group, 1) for part in (keys, values))
            scores = torch.einsum("hd,khd->hk", q[token], key) * config.head_dim**-0.5
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            expected = torch.einsum("hk,khd->hd", scores.softmax(-1), value).flatten()
            torch.testing.assert_close(given[token], expected, atol=2e-6, rtol=1e-5)
            token += 1


def test_groups_within_groups_save_most() -> None:
    """All rows share 4 pages; of the first six, three share 4 more; the last two share another 6."""
    table = np.full((8, 10), -1) - np.arange(80).reshape(8, 10)
    table[:, :4] = [1, 2, 3, 4]
    table[:3, 4:8] = [5, 6, 7, 8]
    table[6:, 4:10] = [9, 10, 11, 12, 13, 14]
    full = np.array([10] * 8)

    def found(rows: list[int]) -> list[tuple[list[int], int]]:
        return [(m.tolist(), width) for m, width in backends._shared_groups(table[rows], full[rows])]

    assert found([3, 4, 5]) == [([0, 1, 2], 4)]
    assert found([0, 1, 2, 6, 7]) == sorted([([0, 1, 2], 8), ([3, 4], 10)], key=lambda group: group[1])
    assert found(list(range(8))) == [(list(range(8)), 4)]  # saves 28 pages, the two groups 26
    assert found([0]) == []
