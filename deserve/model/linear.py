"""Linear layers: which tensors of a checkpoint they read, what those take, and the product."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deserve.model.packed import Packed, PackedLinear
from deserve.model.safetensors_folder import Shape
from deserve.model.schemes.base import Quantisation, Scheme

Parts = tuple[tuple[str, Shape], ...]  # checkpoint tensors and their shapes, stacked along dimension 0


class Source(Protocol):
    """Where weights come from: a checkpoint, or a generator of random ones."""

    def stack(self, parts: Parts) -> Tensor:
        """Tensors stacked along dimension 0, on the stage's device and in its dtype."""

    def packed(self, scheme: Scheme, module: str, size: int, inputs: int) -> Packed:
        """The quantised weight [size, inputs] of `module`, on the stage's device."""

    def empty(self, shape: Shape) -> Tensor:
        """Room for a tensor on the stage's device, in its dtype."""


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

    def read(self, source: Source) -> Tensor:
        return source.stack(self.parts["tensor"])


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer as a checkpoint holds it: `modules`, by name and output size, in one product over `inputs`.

    `quantisation` says which of the modules are quantised. `experts`: into how many experts the modules, in their
    order, are divided, without bias; None: all are one product.
    """

    modules: tuple[tuple[str, int], ...]
    inputs: int
    bias: bool = False
    quantisation: Quantisation | None = None
    experts: int | None = None

    @cached_property
    def schemes(self) -> list[Scheme | None]:
        """How the weight of each module is stored; None: as it is."""
        return [self.quantisation.scheme(name) if self.quantisation else None for name, _ in self.modules]

    @property
    def parts(self) -> dict[str, Parts]:
        """The checkpoint's tensors, by their names within a module."""
        parts: dict[str, Parts] = {}
        for (name, size), scheme in zip(self.modules, self.schemes, strict=True):
            stored = scheme.stored(size, self.inputs) if scheme else {"weight": ((size, self.inputs), ())}
            for suffix, (shape, _) in stored.items():
                parts[suffix] = (*parts.get(suffix, ()), (f"{name}.{suffix}", shape))
        if self.bias:
            parts["bias"] = tuple((f"{name}.bias", (size,)) for name, size in self.modules)
        return parts

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """The types, as safetensors names them, of the tensors that need not be floats."""
        return {
            f"{name}.{suffix}": kinds
            for (name, size), scheme in zip(self.modules, self.schemes, strict=True)
            if scheme
            for suffix, (_, kinds) in scheme.stored(size, self.inputs).items()
        }

    @property
    def spare(self) -> set[str]:
        """Tensors that a checkpoint may hold though the product does without."""
        pairs = zip(self.modules, self.schemes, strict=True)
        found = {f"{name}.{suffix}" for (name, _), scheme in pairs if scheme for suffix in scheme.spare}
        return found - {name for parts in self.parts.values() for name, _ in parts}

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes on the device."""
        total = self.bias * sum(size for _, size in self.modules) * dtype.itemsize
        for (_, size), scheme in zip(self.modules, self.schemes, strict=True):
            if scheme and self.quantisation and self.quantisation.packed:
                total += scheme.form.bytes(size, self.inputs)
            else:
                total += size * self.inputs * dtype.itemsize
        return total

    def unpack_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that a product moves to unpack its weights, beside what it reads then."""
        if self.quantisation is None or not self.quantisation.packed or self.quantisation.fused:
            return 0
        pairs = zip(self.modules, self.schemes, strict=True)
        return sum(scheme.form.unpack_bytes(size, self.inputs, dtype) for (_, size), scheme in pairs if scheme)

    def read(self, source: Source) -> "Linear | PackedLinear | ExpertLinear":
        bias = source.stack(self.parts["bias"]) if self.bias else None
        if self.experts is not None:
            return ExpertLinear(self._dequantised(source).unflatten(0, (self.experts, -1)))
        if any(self.schemes) and self.quantisation and self.quantisation.packed:
            return PackedLinear([self._weight(index, source) for index in range(len(self.modules))], bias)
        return Linear(self._dequantised(source), bias)

    def _dequantised(self, source: Source) -> Tensor:
        """All weights [out, in]."""
        if not any(self.schemes):
            return source.stack(self.parts["weight"])
        fused = source.empty((sum(size for _, size in self.modules), self.inputs))
        begin = 0
        for index, (_, size) in enumerate(self.modules):
            target, weight = fused[begin : begin + size], self._weight(index, source)
            if isinstance(weight, Packed):
                weight.unpack(target)
            else:
                target.copy_(weight)
            begin += size
        return fused

    def _weight(self, index: int, source: Source) -> Tensor | Packed:
        (name, size), scheme = self.modules[index], self.schemes[index]
        if scheme is None:
            return source.stack(((f"{name}.weight", (size, self.inputs)),))
        return source.packed(scheme, name, size, self.inputs)


class Linear:
    """The product of x [T, in] with a weight [out, in], plus a bias [out]: [T, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        if weight.device.type == "cpu" and _blocks(weight.dtype):
            # Given a plain matrix, oneDNN blocks it anew in every call: a third of the time of a visit's products.
            # For float32, which PyTorch gives to MKL, oneDNN is twice as fast on AMD's processors.
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._weight, self.bias = weight, bias

    @property
    def weight(self) -> Tensor:
        """[out, in], maybe a copy."""
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    def norms(self, gain: Tensor) -> Tensor:
        """The length of each output's weights, those of each input times `gain` [in]: [out], float32."""
        return torch.linalg.vector_norm(self.weight * gain, dim=1, dtype=torch.float32)

    def scaled(self, factors: Sequence[tuple[int, float]], bias: bool = True) -> "Linear":
        """The same product with its outputs, so many at a time, multiplied by `factors`; with or without the `bias`."""
        each = torch.cat([torch.full((count,), factor) for count, factor in factors]).to(self.weight)
        scaled = self.bias * each if bias and self.bias is not None else self.bias
        return Linear(self.weight * each.unsqueeze(1), scaled)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The product, in the memory of `out` if it is given."""
        if self._weight.is_mkldnn:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            return product if out is None else out.copy_(product)
        if out is None:
            return F.linear(x, self._weight, self.bias)
        if self.bias is None:
            return torch.mm(x, self._weight.t(), out=out)
        return torch.addmm(self.bias, x, self._weight.t(), out=out)


def _blocks(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies with weights of `dtype` in its own layout."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()


class ExpertLinear:
    """Products with one of several weights [experts, out, in], plus a bias [experts, out], by row."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        """x [n, in] to [n, out]. experts: [n] of each row, ascending; ends: [experts] int32, the first row after each.

        A host never learns how many rows an expert has, so that a CUDA graph can hold the product.
        """
        product = F.grouped_mm(x, self.weight.transpose(1, 2), offs=ends)
        return product if self.bias is None else product.add_(self.bias[experts])


def grouped_mm_waits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's `grouped_mm` reads on the host where groups end, as all but its fast kernels do.

    Source: pytorch, aten/src/ATen/native/cuda/GroupedBlas.cpp and GroupedMMUtils.h.
    """
    return dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] not in (9, 10)
