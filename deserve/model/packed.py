"""Quantised weights in memory, and the product with them.

Every scheme's weights are brought into one of these forms while loading, so that a kernel has few layouts to know.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from deserve.errors import UserError

CHUNK = 2**25  # weights unpacked at a time: 64 MB of bfloat16 beside the packed ones
SMALLEST_SCALE = 2.0**-126  # of a block of zeros
Operation = Callable[[Tensor, Tensor], Tensor]  # in place
MX_BLOCK = 32  # inputs that share a scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats 1.0, section 5.3.3
LARGEST = {"int4": -8.0, "int8": 127.0, "fp8": 448.0, "fp4": 6.0}


@dataclass(frozen=True)
class Form:
    """A layout of quantised weights.

    kind: `int4` (0..15), `int8` and `fp8` (e4m3), each with float32 scales, or `fp4` (e2m1, scales are powers of two).
    rows, columns: outputs and inputs that share a scale; None: all of them.
    zeros: each scale has a zero point; without, that of int4 is 8 and that of int8 is 0.
    """

    kind: str
    rows: int | None = 1
    columns: int | None = None
    zeros: bool = False

    def blocks(self, size: int, inputs: int) -> tuple[int, int]:
        """The shape of the scales of a weight [size, inputs]."""
        return -(-size // (self.rows or size)), -(-inputs // (self.columns or inputs))

    def bytes(self, size: int, inputs: int) -> int:
        """Bytes of a weight [size, inputs] in memory."""
        down, across = self.blocks(size, inputs)
        scale = 1 if self.kind == "fp4" else 4
        return size * inputs // (2 if self.kind in ("int4", "fp4") else 1) + down * across * (scale + self.zeros)

    def unpack_bytes(self, size: int, inputs: int, dtype: torch.dtype) -> int:
        """Bytes that `Packed.chunks` moves to bring a weight into `dtype`, once."""
        index = 4 if self.kind in ("int4", "fp4") else 0  # of each pair, an int32 written and read
        passes = 1 + 2 * (1 + self.zeros)  # values written, zero points and scales applied in place
        return self.bytes(size, inputs) + size * inputs * (index + passes * dtype.itemsize)

    def quantise(self, weight: Tensor) -> "Packed":
        """Round `weight` [out, in] to this form: symmetric, the largest of each block becomes the largest code.

        That of int4 is -8, and the scale has the sign that brings the largest there: with 7, one of 16 codes is unused.
        """
        size, inputs = weight.shape
        # In float32 the whole might not fit beside the other weights.
        step = max(1, CHUNK // inputs) if self.rows == 1 else size
        parts = [self._round(rows) for rows in weight.split(step)]
        codes, scale = torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts])
        zero = None
        if self.zeros:
            middle = 8 if self.kind == "int4" else 0
            zero = torch.full(scale.shape, middle, dtype=torch.int8, device=weight.device)
        return Packed(self, codes, scale, zero)

    def _round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of `weight` [out, in]."""
        size, inputs = weight.shape
        rows, width = self.rows or size, self.columns or inputs
        down, across = self.blocks(size, inputs)
        padded = F.pad(weight.float(), (0, across * width - inputs, 0, down * rows - size))
        block = padded.view(down, rows, across, width).transpose(1, 2).flatten(2)
        largest = block.gather(2, block.abs().argmax(2, keepdim=True)).squeeze(2)
        scale = largest / LARGEST[self.kind] if self.kind == "int4" else largest.abs() / LARGEST[self.kind]
        scale = scale.where(scale.abs() > SMALLEST_SCALE, SMALLEST_SCALE)
        if self.kind == "fp4":
            scale = scale.log2().ceil().exp2().to(torch.float8_e8m0fnu)
        values = (
            weight.float() / scale.float().repeat_interleave(rows, 0)[:size].repeat_interleave(width, 1)[:, :inputs]
        )
        if self.kind == "fp8":
            return values.to(torch.float8_e4m3fn), scale
        if self.kind == "fp4":
            return pair(_e2m1_codes(values)), scale
        whole = values.round().clamp_max(7 if self.kind == "int4" else 127).to(torch.int8)
        return (pair(whole + 8) if self.kind == "int4" else whole), scale


@dataclass
class Packed:
    """A weight [out, in] in the layout `form`.

    codes: [out, in], or [out, in / 2] of two to a byte, the first in the lower half.
    scale, zero: `form.blocks`; columns: the block [in] of each input, None: the inputs of a block are neighbours.
    A weight is (code - zero) * scale, rounded once to the dtype that is asked for.
    """

    form: Form
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    columns: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, inputs."""
        halves = 2 if self.codes.dtype == torch.uint8 else 1
        return self.codes.shape[0], self.codes.shape[1] * halves

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        found = (self.codes, self.scale, self.zero, self.columns)
        return tuple(tensor for tensor in found if tensor is not None)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight in `dtype`, some rows at a time, with the place of those rows."""
        size, inputs = self.shape
        unit = self.form.rows or 1
        step = max(1, CHUNK // (inputs * unit)) * unit
        for begin in range(0, size, step):
            rows = slice(begin, min(begin + step, size))
            yield rows, self._unpack(rows, dtype)

    def unpack(self, target: Tensor) -> None:
        """Write the weight into `target` [out, in]."""
        for rows, weight in self.chunks(target.dtype):
            target[rows] = weight

    def _unpack(self, rows: slice, dtype: torch.dtype) -> Tensor:
        codes = self.codes[rows]
        # Codes, and their differences to a zero point, are whole numbers below 256 or floats of 8 bits: exact in dtype.
        if codes.dtype == torch.uint8:
            weight = F.embedding(codes.int(), pairs(self.form.kind, self.zero is None, dtype, codes.device)).flatten(1)
        else:
            weight = codes.to(dtype)
        if self.zero is not None:
            self._apply(Tensor.sub_, weight, self.zero, rows)
        self._apply(Tensor.mul_, weight, self.scale.float(), rows)
        return weight

    def _apply(
        self, operation: Callable[[Tensor, Tensor], Tensor], weight: Tensor, blocks: Tensor, rows: slice
    ) -> None:
        """`operation` in place on `weight`, which is `rows` of the whole, with what `blocks` has for each of them."""
        unit, (_, inputs) = self.form.rows, self.shape
        if unit == 1:
            blocks = blocks[rows]
        elif unit is not None:
            blocks = blocks[rows.start // unit : -(-rows.stop // unit)].repeat_interleave(unit, 0)[: len(weight)]
        across = blocks.shape[1]
        width = self.form.columns or inputs
        if self.columns is not None:
            operation(weight, blocks[:, self.columns])
        elif across * width == inputs:
            operation(weight.unflatten(1, (across, width)), blocks.unsqueeze(2))
        else:
            operation(weight, blocks.repeat_interleave(width, 1)[:, :inputs])


class PackedLinear:
    """The product of x [T, in] with weights [out, in] stacked along `out`, quantised or not, plus a bias [out].

    Weights are unpacked for every product, some rows at a time: they take little memory, and products take longer.
    """

    def __init__(self, parts: list[Packed | Tensor], bias: Tensor | None = None):
        self.parts, self.bias = parts, bias
        self._size = sum(part.shape[0] for part in parts)

    def norms(self, gain: Tensor) -> Tensor:
        """The length of each output's weights, those of each input times `gain` [in]: [out], float32."""
        chunks = [chunk for part in self.parts for _, chunk in _chunks(part, torch.float32)]
        return torch.cat([torch.linalg.vector_norm(chunk * gain.float(), dim=1) for chunk in chunks])

    def scaled(self, factors: Sequence[tuple[int, float]], bias: bool = True) -> "PackedLinear":
        """The same product with its outputs, so many at a time, multiplied by `factors`; with or without the `bias`.

        Raises UserError where outputs of different factors share a scale.
        """
        each = torch.cat([torch.full((count,), factor) for count, factor in factors])
        sizes = [part.shape[0] for part in self.parts]
        parts = [_scaled(part, of_part) for part, of_part in zip(self.parts, each.split(sizes), strict=True)]
        return PackedLinear(parts, self.bias * each.to(self.bias) if bias and self.bias is not None else self.bias)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The product [T, out], in the memory of `out` if it is given."""
        if out is None:
            out = x.new_empty(len(x), self._size)
        begin = 0
        for part in self.parts:
            size = part.shape[0]
            for rows, weight in _chunks(part, x.dtype):
                out[:, begin + rows.start : begin + rows.stop] = F.linear(x, weight)
            begin += size
        return out if self.bias is None else out.add_(self.bias)


def _scaled(part: Packed | Tensor, factors: Tensor) -> Packed | Tensor:
    """A weight [out, in] whose rows are multiplied by `factors` [out], powers of two."""
    if not isinstance(part, Packed):
        return part * factors.unsqueeze(1).to(part)
    if part.form.rows != 1:
        if len(factors.unique()) > 1:
            raise UserError(
                "kvcache.dtype=fp8: in this checkpoint queries, keys and values share a scale: set model.packed=false"
            )
        factors = factors[:1]
    scale = part.scale.float() * factors.unsqueeze(1).to(part.scale.device)
    return replace(part, scale=scale.to(part.scale.dtype))


def _chunks(part: Packed | Tensor, dtype: torch.dtype) -> Iterable[tuple[slice, Tensor]]:
    """A weight in `dtype`, some rows at a time if it is packed, with the place of those rows."""
    return part.chunks(dtype) if isinstance(part, Packed) else [(slice(0, part.shape[0]), part.to(dtype))]


def pair(codes: Tensor) -> Tensor:
    """Codes [out, in] of 4 bits, two to a byte: [out, in / 2]."""
    low, high = codes.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return low | high << 4


def split(words: Tensor, bits: int) -> Tensor:
    """The codes [n, m * 32 / bits] of words [n, m] of int32 that hold 4 or 8 bits each, lowest first, as uint8."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(1)


@cache  # made while the first visit warms up: a CUDA graph could not capture the copy
def pairs(kind: str, centred: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each of the 256 bytes stands for: [256, 2]. `centred`: codes of int4 count from 8."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)]) if kind == "fp4" else torch.arange(16.0)
    if kind == "int4" and centred:
        values -= 8
    octets = torch.arange(256)
    return values[torch.stack((octets & 15, octets >> 4), 1)].to(device, dtype)


def _e2m1_codes(values: Tensor) -> Tensor:
    levels = torch.tensor(E2M1, device=values.device)
    return torch.bucketize(values.abs(), (levels[1:] + levels[:-1]) / 2) + 8 * (values < 0)
