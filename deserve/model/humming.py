"""Products on packed weights that are unpacked in registers: kernels of humming-kernels, for NVIDIA GPUs from SM75 on.

They are compiled at first use, some seconds a shape, and kept in `~/.humming` (HUMMING_CACHE_DIR).
Source: https://github.com/vllm-project/humming
"""

import json
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from humming.kernel.humming import HummingKernel
from humming.ops import launch_kernel
from humming.schema import HummingWeightSchema
from humming.transform import prepare_and_transform_humming_tensors
from humming.tune import get_heuristics_config
from torch import Tensor

from deserve.errors import UserError
from deserve.model.packed import Packed, PackedLinear, pair
from deserve.model.weights import ShardWeights

HUMMING = "0.1.19"
if version("humming-kernels") != HUMMING:
    raise ImportError(
        f"humming-kernels {version('humming-kernels')} is installed, but {HUMMING} is needed: "
        "pip install 'deserve[humming]'"
    )

# A kernel is chosen for up to so many tokens, the last for any more: humming would compile some 30 for each shape.
TOKENS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
TILE = 128  # outputs and inputs that kernels divide weights into; what is missing is padded
GROUPS = (32, 64, 128)  # inputs that may share a scale
LOCKS = 2048  # int32 by which a kernel's thread blocks wait for each other, as humming's own layer has them
KINDS = {"int4": "uint4", "int8": "uint8", "fp8": "float8e4m3", "fp4": "float4e2m1"}


def fuse(weights: ShardWeights, dtype: torch.dtype, required: bool) -> None:
    """Put a HummingLinear in the place of each PackedLinear, one after another: no more than a layer is held twice.

    Says once why products stay as they are, or raises UserError if all are `required` to change. What works on weights
    (`PackedLinear.scaled`) comes before.
    """
    kept: dict[str, list[str]] = {}
    for place, owner in _owners(weights):
        for name, product in list(vars(owner).items()):
            if not isinstance(product, PackedLinear):
                continue
            reason = unfit(product, dtype)
            if reason is None:
                try:
                    setattr(owner, name, HummingLinear(product, dtype))
                    continue
                except (AssertionError, LookupError, RuntimeError, ValueError) as error:
                    if "out of memory" in str(error):
                        raise
                    reason = f"humming-kernels fails with {error!r}"
            if required:
                raise UserError(f"model.gemm=humming: {place}{name}: {reason}; set model.gemm=auto or torch")
            kept.setdefault(reason, []).append(f"{place}{name}")
    for reason, places in kept.items():
        print(f"{len(places)} products ({places[0]}, ...) unpack their weights every time: {reason}")


def _owners(weights: ShardWeights) -> Iterator[tuple[str, object]]:
    """What holds products, and where that is."""
    yield "", weights
    for index, layer in enumerate(weights.layers):
        yield f"layer {index} of this rank, ", layer.attention
        yield f"layer {index} of this rank, ", layer.mlp


def unfit(linear: PackedLinear, dtype: torch.dtype) -> str | None:
    """Why no kernel takes `linear` for products in `dtype`."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"kernels multiply in bfloat16 or float16, not {dtype}"
    parts = [part for part in linear.parts if isinstance(part, Packed)]
    form = parts[0].form if parts else None
    if form is None or len(parts) < len(linear.parts) or any(part.form != form for part in parts):
        return "its parts are stored in different ways"
    size, inputs = sum(part.shape[0] for part in parts), parts[0].shape[1]
    if form.columns not in (None, *GROUPS) or inputs % (form.columns or 1):
        return f"groups of {form.columns} inputs of {inputs}; kernels take {GROUPS}, whole ones"
    if any(part.columns is not None for part in parts):
        return "inputs of a group are scattered (desc_act, actorder=group)"
    if size % 8 or inputs % 8:
        return f"a weight of {size} x {inputs}; kernels take multiples of 8"
    if form.kind == "fp4":
        return None if dtype == torch.bfloat16 else "MXFP4 is multiplied in bfloat16 alone"
    for part in parts:
        scale = part.scale.float()
        if not torch.allclose(scale.to(dtype).float(), scale, rtol=2**-8, atol=0.0):
            return f"scales down to {float(scale.abs().min()):.2g} do not fit {dtype}"
    return None


class HummingLinear:
    """The product of x [T, in] with packed weights [out, in] plus a bias [out], of what `unfit` has nothing against."""

    def __init__(self, linear: PackedLinear, dtype: torch.dtype):
        parts = [part for part in linear.parts if isinstance(part, Packed)]
        form, self._size = parts[0].form, sum(part.shape[0] for part in parts)
        device = parts[0].codes.device
        tensors = stored(parts, dtype)
        if linear.bias is not None:
            tensors["bias"] = linear.bias
        schema = HummingWeightSchema(
            b_dtype=KINDS[form.kind],
            bs_dtype="float8e8m0" if form.kind == "fp4" else None,
            weight_scale_group_size=form.columns or 0,
            has_zero_point="zero_point" in tensors,
        )
        config, tensors = prepare_and_transform_humming_tensors(
            tensors,
            self._size,
            parts[0].shape[1],
            schema,
            pad_n_to_multiple=TILE,
            pad_k_to_multiple=TILE,
            has_bias=linear.bias is not None,
            torch_dtype=dtype,
            device=device,
        )
        self._kernels = kernels(config, device)
        self._tensors = tensors | {"locks": torch.zeros(LOCKS, dtype=torch.int32, device=device)}

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The product [T, out], in the memory of `out` if it is given; T >= 1."""
        if out is None:
            out = x.new_empty(len(x), self._size)
        launch_kernel(configs=self._kernels, inputs=x, outputs=out, **self._tensors)
        return out


def kernels(config: Any, device: torch.device) -> Tensor:
    """The kernels for a shape and a form, compiled: from and to how many tokens, number, and multiprocessors."""
    tuning = [[*ends, get_heuristics_config(config, shape_m=ends[1], device=device)] for ends in pairwise((0, *TOKENS))]
    tuning[-1][1] = 2**30
    return HummingKernel.prepare_kernels(config.to_str(), None, json.dumps(tuning), device)


def stored(parts: list[Packed], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of one form, stacked along their outputs, as humming names and stores them before it reorders them.

    weight: [out, in * bits / 32] int32, lowest bits first; int8 counts from -128. weight_scale: [out, groups].
    zero_point: [out * bits / 32, groups] int32, packed along the outputs; none if all are in the middle.
    """
    form = parts[0].form
    flip = 128 if form.kind == "int8" else 0  # from signed to counting from the smallest
    tensors = {"weight": torch.cat([part.codes.view(torch.uint8) for part in parts])}
    if flip:
        tensors["weight"] ^= flip
    tensors["weight"] = tensors["weight"].view(torch.int32)
    scale = _by_row([(part, part.scale) for part in parts])
    tensors["weight_scale"] = scale if form.kind == "fp4" else scale.to(dtype)
    if form.zeros:
        zero = _by_row([(part, part.zero) for part in parts if part.zero is not None]).view(torch.uint8) ^ flip
        if (zero != (8 if form.kind == "int4" else 128)).any():
            across = zero.t().contiguous()
            words = pair(across) if form.kind == "int4" else across
            tensors["zero_point"] = words.view(torch.int32).t().contiguous()
    return tensors


def _by_row(blocks: list[tuple[Packed, Tensor]]) -> Tensor:
    """What blocks of outputs share, of each of the outputs: [out, groups]."""
    rows = [
        each if part.form.rows == 1 else each.repeat_interleave(part.form.rows or part.shape[0], 0)[: part.shape[0]]
        for part, each in blocks
    ]
    return torch.cat(rows)
