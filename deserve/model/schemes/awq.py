"""AWQ as AutoAWQ's `gemm` version writes it: `qweight` and `qzeros` packed along the outputs, in an order of its own.

Source: AutoAWQ, awq/modules/linear/gemm.py.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from deserve.errors import as_json
from deserve.model.keys import Keys
from deserve.model.packed import Form, Packed, pair, split
from deserve.model.safetensors_folder import FLOATS
from deserve.model.schemes.base import INTS, Quantisation, Stored

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of 8 neighbouring outputs in a word
HARMLESS = {"backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "desc_act", "sym", "meta"}


@dataclass(frozen=True)
class AWQ:
    """group: inputs that share a scale and a zero point, None: all."""

    group: int | None
    spare: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        return Form("int4", columns=self.group, zeros=True)

    def misfit(self, size: int, inputs: int) -> str | None:
        if self.group and inputs % self.group:
            return f"group_size ({self.group}) does not divide {inputs} inputs"
        return f"bits (4) are packed by 8, which does not divide {size}" if size % 8 else None

    def stored(self, size: int, inputs: int) -> Stored:
        groups = self.form.blocks(size, inputs)[1]
        return {
            "qweight": ((inputs, size // 8), INTS),
            "qzeros": ((groups, size // 8), INTS),
            "scales": ((groups, size), FLOATS),
        }

    def pack(self, tensors: dict[str, Tensor]) -> Packed:
        codes, zeros = (
            split(tensors[name], 4).unflatten(1, (-1, 8))[:, :, PLACES].flatten(1).t() for name in ("qweight", "qzeros")
        )
        scale = tensors["scales"].t().float().contiguous()
        return Packed(self.form, pair(codes.contiguous()), scale, zeros.contiguous().char())


def parse(keys: Keys) -> Quantisation:
    """Read a `quantization_config` of `quant_method: awq`."""
    keys.one_of("bits", (4,))
    keys.one_of("zero_point", (True,))
    for key in ("version", "format"):
        if keys.text(key, default="gemm").lower() != "gemm":
            raise keys.fail(key, f"{as_json(keys.raw[key])} is not supported; only gemm is")
    group = keys.count("group_size", least=-1)
    if group == 0:
        raise keys.fail("group_size", "must be at least 1, or -1 for one group")
    kept = tuple(f".*{re.escape(name)}" for name in keys.texts("modules_to_not_convert"))
    keys.refuse_others({"bits", "zero_point", "version", "format", "group_size", "modules_to_not_convert"} | HARMLESS)
    return Quantisation(((r"model\.layers\.", AWQ(None if group == -1 else group)),), kept)
