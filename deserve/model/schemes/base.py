"""What a scheme of quantised weights has to say, and which layers of a checkpoint it covers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from deserve.model.packed import Form, Packed
from deserve.model.safetensors_folder import FLOATS, Shape

Stored = dict[str, tuple[Shape, tuple[str, ...]]]  # tensors of a module: shape, and types as safetensors names them
INTS = ("I32",)
SCALES = (*FLOATS, "F8_E8M0")


class Scheme(Protocol):
    """How a checkpoint stores the weight of a linear layer."""

    @property
    def spare(self) -> tuple[str, ...]:
        """Tensors that a module may have besides and that change nothing; a spare bias must be 0."""

    @property
    def form(self) -> Form:
        """How the weight lies in memory."""

    def misfit(self, size: int, inputs: int) -> str | None:
        """Why a weight [size, inputs] cannot be stored so: the key and what is wrong with it."""

    def stored(self, size: int, inputs: int) -> Stored:
        """The tensors of a weight [size, inputs]."""

    def pack(self, tensors: dict[str, Tensor]) -> Packed:
        """The weight from its tensors. Raises ValueError for values that no weight can have."""


def groups_of_inputs(g_idx: Tensor, groups: int, width: int | None) -> Tensor | None:
    """`Packed.columns` of `g_idx`, the group of each input; None where those of a group are neighbours.

    Raises ValueError unless all are below `groups`.
    """
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise ValueError(f"g_idx names groups from {g_idx.min()} to {g_idx.max()}, of {groups}")
    in_order = torch.arange(len(g_idx), device=g_idx.device) // (width or len(g_idx))
    return None if torch.equal(g_idx.int(), in_order.int()) else g_idx.int()


@dataclass(frozen=True)
class Quantisation:
    """Which linear layers of a model are quantised, and how.

    rules: a pattern of module names and the scheme of those; the first that matches holds.
    kept: patterns of modules that stay as they are.
    packed: weights stay packed in memory; otherwise they are dequantised while loading.
    gemm: what multiplies with packed weights: `model.gemm`.
    layer: every layer is stored as this one; None: each as its name says.
    """

    rules: tuple[tuple[str, Scheme], ...]
    kept: tuple[str, ...] = ()
    packed: bool = field(default=False, repr=False)  # answers do not depend on it
    gemm: str = field(default="torch", repr=False)
    layer: int | None = field(default=None, repr=False)

    @property
    def fused(self) -> bool:
        """Whether products on a GPU are to unpack weights within their kernels, not in memory."""
        return self.packed and self.gemm != "torch"

    @cached_property
    def _found(self) -> dict[str, Scheme | None]:
        """What `scheme` said before: asked anew of 36,000 modules, with 300 patterns, it takes 5 s."""
        return {}

    def scheme(self, module: str) -> Scheme | None:
        """How the weight of `module` is stored; None: as it is."""
        if module not in self._found:
            self._found[module] = self._find(module)
        return self._found[module]

    def _find(self, module: str) -> Scheme | None:
        if self.layer is not None:
            module = re.sub(r"^model\.layers\.\d+", f"model.layers.{self.layer}", module)
        if any(re.match(pattern, module) for pattern in self.kept):
            return None
        return next((scheme for pattern, scheme in self.rules if re.match(pattern, module)), None)

    def misfit(self, shapes: Sequence[tuple[int, int]]) -> str | None:
        """The first complaint that a scheme has of weights of these shapes."""
        found = (scheme.misfit(*shape) for _, scheme in self.rules for shape in shapes)
        return next((complaint for complaint in found if complaint), None)
