"""The contract of a kernel backend: everything of a forward pass that is not a matrix product."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from deserve.batch import IntArray, Ints
from deserve.kvcache.pages import KVLayer


@dataclass(frozen=True)
class Rows:
    """The sequences of a visit as attention sees them. Host arrays, one entry per row.

    `new_tokens` [rows] tokens of this visit, flattened in row order into the T tokens of the visit;
    `context` [rows] tokens before them; `tables` page tables [rows, width] wide enough for the longest row, by
    `KVLayer.table`. `long` [rows]: which sequences are rotated as long ones (`Rope.switch`); None: none.
    """

    new_tokens: IntArray
    context: IntArray
    tables: Sequence[IntArray]
    long: NDArray[np.bool_] | None = None

    def behind(self, pages: Ints, page_size: int) -> "Rows":
        """The same rows, but as if each began behind its first `pages` [rows] pages."""
        if not pages.any():
            return self
        last = self.tables[0].shape[1] - 1
        columns = np.minimum(np.arange(last + 1) + pages[:, None], last)
        tables = [np.take_along_axis(table, columns, 1) for table in self.tables]
        return replace(self, context=self.context - (pages * page_size).astype(np.int32), tables=tables)

    def within(self, window: int | None, page_size: int) -> "Rows":
        """The same rows, but as if each began with the first page that a layer of `window` tokens still reads."""
        if window is None:
            return self
        return self.behind(np.maximum(0, self.context - window + 1) // page_size, page_size)


class Backend(ABC):
    """Kernels over tokens of many sequences laid end to end, T tokens in all.

    `kind` is a layer's index in `ModelConfig.kinds`.
    """

    captures = False  # whether CUDA graphs can record its calls: all of a decode visit, of others all but `attend`

    @abstractmethod
    def begin_visit(self, rows: Rows) -> None:
        """Prepare positions, cache addresses and attention for a visit; the calls below refer to it."""

    def begin_graph_visit(self, rows: Rows) -> list[int]:
        """begin_visit for decode rows alone, whose kernels are recorded in or replayed from a CUDA graph.

        Returns the launch parameters, which must be the same in all visits that use one graph.
        """
        raise NotImplementedError("only a backend that `captures` is asked for this")

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last dimension of x [..., n]."""

    @abstractmethod
    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add x [T, hidden] to `residual` in place; returns the RMSNorm of the sum (maybe in x's memory)."""

    @abstractmethod
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate_up [m, 2 * n]: [m, n], maybe in memory that the next call overwrites."""

    @abstractmethod
    def gelu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The same with GELU in its tanh approximation."""

    @abstractmethod
    def rotate(self, q: torch.Tensor, k: torch.Tensor, kind: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding of q [T, heads, head_dim] and k [T, kv_heads, head_dim] at the visit's positions."""

    @abstractmethod
    def append(self, layer: KVLayer, k: torch.Tensor, v: torch.Tensor, kind: int = 0) -> None:
        """Write k and v [T, kv_heads, head_dim] to the pages of `layer`."""

    @abstractmethod
    def attend(self, layer: KVLayer, q: torch.Tensor, kind: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Causal attention of q [T, heads, head_dim] over the pages of `layer`, with the visit's tokens appended,
        of as many tokens as the kind's window holds.

        sinks: [heads], a score of each head that takes its share of the softmax and has no value.

        Returns [T, heads * head_dim], maybe in memory that the next call overwrites; where the backend `captures`, in
        the same memory every time.
        """
