"""fp8 (e4m3) checkpoints of `quant_method: fp8`: in blocks (DeepSeek, Qwen3-FP8), or one scale per matrix (AutoFP8)."""

import re
from dataclasses import dataclass

from torch import Tensor

from deserve.model.keys import Keys
from deserve.model.packed import Form, Packed
from deserve.model.schemes.base import SCALES, Quantisation, Stored

HARMLESS = {"dequantize", "scale_fmt", "use_deep_gemm"}  # e8m0 scales are known by their type


@dataclass(frozen=True)
class FP8:
    """block: outputs and inputs that share a scale; None: all."""

    block: tuple[int, int] | None
    spare: tuple[str, ...] = ("input_scale", "activation_scale")  # activations are not quantised

    @property
    def form(self) -> Form:
        return Form("fp8", *(self.block or (None, None)))

    def misfit(self, size: int, inputs: int) -> str | None:
        return None

    def stored(self, size: int, inputs: int) -> Stored:
        scales = self.form.blocks(size, inputs) if self.block else (1,)
        return {"weight": ((size, inputs), ("F8_E4M3",)), "weight_scale_inv": (scales, SCALES)}

    def pack(self, tensors: dict[str, Tensor]) -> Packed:
        scale = tensors["weight_scale_inv"].float()
        return Packed(self.form, tensors["weight"], scale if self.block else scale.view(1, 1))


def parse(keys: Keys) -> Quantisation:
    """Read a `quantization_config` of `quant_method: fp8`."""
    keys.one_of("activation_scheme", ("dynamic", "static"), default="dynamic")
    for key in ("fmt", "weight_format"):
        keys.one_of(key, ("e4m3", "float8_e4m3fn"), default="e4m3")
    block = keys.sizes("weight_block_size")
    names = (*keys.texts("modules_to_not_convert"), *keys.texts("ignored_layers"))
    done = {"activation_scheme", "fmt", "weight_format", "weight_block_size", "modules_to_not_convert"}
    keys.refuse_others(done | {"ignored_layers"} | HARMLESS)
    # A name stands for the modules of that name and all within, wherever it begins.
    kept = tuple(rf"(.*\.)?{re.escape(name)}(\.|$)" for name in names)
    return Quantisation(((r"model\.layers\.", FP8(block)),), kept)
