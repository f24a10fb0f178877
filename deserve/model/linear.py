"""Linear layers of unquantised weights.

A scheme of quantised weights is a module of its own with the same two classes: which tensors of a checkpoint it reads
and what they take, and the product.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deserve.model.safetensors_folder import Shape

Parts = tuple[tuple[str, Shape], ...]  # checkpoint tensors and their shapes, stacked along dimension 0
Read = Callable[[Parts], Tensor]  # the stack of such tensors, on the stage's device and in its dtype


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a checkpoint that is used as it is: the weight of a norm, the embedding."""

    name: str
    shape: Shape

    @property
    def parts(self) -> dict[str, Parts]:
        return {"tensor": ((self.name, self.shape),)}

    def bytes(self, dtype: torch.dtype) -> int:
        return math.prod(self.shape) * dtype.itemsize

    def read(self, read: Read) -> Tensor:
        return read(self.parts["tensor"])


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer as a checkpoint holds it: `modules`, by name and output size, in one product over `inputs`."""

    modules: tuple[tuple[str, int], ...]
    inputs: int
    bias: bool = False

    @property
    def parts(self) -> dict[str, Parts]:
        """The checkpoint's tensors that are stacked into each argument of `Linear`."""
        parts: dict[str, Parts] = {
            "weight": tuple((f"{name}.weight", (size, self.inputs)) for name, size in self.modules)
        }
        if self.bias:
            parts["bias"] = tuple((f"{name}.bias", (size,)) for name, size in self.modules)
        return parts

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes on the device."""
        return sum(size for _, size in self.modules) * (self.inputs + self.bias) * dtype.itemsize

    def read(self, read: Read) -> "Linear":
        return Linear(**{name: read(parts) for name, parts in self.parts.items()})


class Linear:
    """The product of x [T, in] with a weight [out, in], plus a bias [out]: [T, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        if on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # Given a plain matrix, oneDNN blocks it anew in every call: a third of the time of a visit's products.
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The product, in the memory of `out` if it is given."""
        if self.weight.is_mkldnn:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return product if out is None else out.copy_(product)
        if out is None:
            return F.linear(x, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)
