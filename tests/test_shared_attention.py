"""PyTorch's attention over pages that several rows share: read once, the same results."""

from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deserve.config import load_config
from deserve.kvcache.pages import KVLayer
from deserve.model.backend import torch as backends
from deserve.model.backend.base import Rows
from deserve.model.checkpoint import resolve
from deserve.model.config import ModelConfig

PAGE = 4


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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), max_size=4), st.integers(0, 9), st.integers(1, 6)),
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
        for least in (1, 10**9):
            patch.setattr(backends, "SHARED_PAGES", least)
            backend = backends.TorchBackend(config, torch.float32, torch.device("cpu"), config.max_context)
            layer = KVLayer(memory.clone(), 0)
            backend.begin_visit(rows)
            backend.append(layer, k, v)
            outputs.append(backend.attend(layer, q))
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)


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
