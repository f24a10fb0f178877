"""MXFP4 experts as gpt-oss stores them: e2m1 in blocks of 32 inputs, all experts of a layer in one tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deserve.model.keys import Keys
from deserve.model.packed import MX_BLOCK, Form, Packed
from deserve.model.schemes.base import Quantisation, Stored


@dataclass(frozen=True)
class MXFP4:
    """part: `gate_up_proj` or `down_proj` of that many `experts`, whose outputs follow each other."""

    part: str = ""
    experts: int = 1
    spare: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        return Form("fp4", columns=MX_BLOCK)

    def misfit(self, size: int, inputs: int) -> str | None:
        return f"blocks of {MX_BLOCK} do not divide {inputs} inputs" if inputs % MX_BLOCK else None

    def stored(self, size: int, inputs: int) -> Stored:
        blocks = (self.experts, size // self.experts, inputs // MX_BLOCK)
        octets = ("U8",)
        return {
            f"{self.part}_blocks": ((*blocks, MX_BLOCK // 2), octets),
            f"{self.part}_scales": (blocks, octets),
        }

    def pack(self, tensors: dict[str, Tensor]) -> Packed:
        codes, scale = tensors[f"{self.part}_blocks"], tensors[f"{self.part}_scales"]
        return Packed(self.form, codes.flatten(0, 1).flatten(1), scale.flatten(0, 1).view(torch.float8_e8m0fnu))


def parse(keys: Keys) -> Quantisation:
    """Read a `quantization_config` of `quant_method: mxfp4`."""
    keys.texts("modules_to_not_convert")  # all that are not experts
    keys.refuse_others({"modules_to_not_convert", "dequantize"})
    return Quantisation(((r"model\.layers\.\d+\.mlp\.experts$", MXFP4()),))
