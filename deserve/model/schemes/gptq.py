"""GPTQ, as AutoGPTQ and GPTQModel write it: `qweight` packed along the inputs, `g_idx` the group of each input.

Source: AutoGPTQ, qlinear_cuda.py; GPTQModel, checkpoint formats `gptq` (zero points stored less 1) and `gptq_v2`.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from deserve.errors import as_json
from deserve.model.keys import Keys
from deserve.model.packed import Form, Packed, split
from deserve.model.safetensors_folder import FLOATS
from deserve.model.schemes.base import INTS, Quantisation, Stored, groups_of_inputs

# How the weights were found, or what other fields say as well
HARMLESS = {
    "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path",
    "model_file_base_name", "dataset", "tokenizer", "meta", "model_seqlen", "block_name_to_quantize", "batch_size",
    "use_cuda_fp16", "max_input_length", "use_exllama", "exllama_config", "backend", "cache_block_outputs",
    "is_marlin_format", "disable_exllama", "module_name_preceding_first_block", "pad_token_id", "act_group_aware",
    "version", "mse", "offload_to_disk", "hyb_act",
}  # fmt: skip


@dataclass(frozen=True)
class GPTQ:
    """bits: 4 or 8; group: inputs that share a scale, None: all; offset: what is missing from stored zero points."""

    bits: int
    group: int | None
    offset: int
    # AutoGPTQ wrote a bias of zeros for every layer.
    spare: tuple[str, ...] = ("bias",)

    @property
    def form(self) -> Form:
        return Form(f"int{self.bits}", columns=self.group, zeros=True)

    def misfit(self, size: int, inputs: int) -> str | None:
        codes = 32 // self.bits
        odd = next((count for count in (size, inputs) if count % codes), None)
        return None if odd is None else f"bits ({self.bits}) are packed by {codes}, which does not divide {odd}"

    def stored(self, size: int, inputs: int) -> Stored:
        codes = 32 // self.bits
        groups = self.form.blocks(size, inputs)[1]
        return {
            "qweight": ((inputs // codes, size), INTS),
            "qzeros": ((groups, size // codes), INTS),
            "scales": ((groups, size), FLOATS),
            "g_idx": ((inputs,), INTS),
        }

    def pack(self, tensors: dict[str, Tensor]) -> Packed:
        codes = tensors["qweight"].t().contiguous().view(torch.uint8)
        zero = (split(tensors["qzeros"], self.bits) + self.offset) & (2**self.bits - 1)
        if self.bits == 8:
            codes, zero = (codes ^ 128).view(torch.int8), zero ^ 128
        scale = tensors["scales"].t().float().contiguous()
        columns = groups_of_inputs(tensors["g_idx"], scale.shape[1], self.group)
        return Packed(self.form, codes, scale, zero.t().contiguous().view(torch.int8), columns)


def parse(keys: Keys) -> Quantisation:
    """Read a `quantization_config` of `quant_method: gptq`."""
    bits = keys.one_of("bits", (4, 8))
    version = keys.one_of("checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    keys.one_of("pack_dtype", ("int32",), default="int32")
    group = keys.count("group_size", least=-1)
    if group == 0:
        raise keys.fail("group_size", "must be at least 1, or -1 for one group")
    keys.flag("desc_act"), keys.flag("sym")  # g_idx and qzeros say it
    scheme = GPTQ(bits, None if group == -1 else group, 1 if version == "gptq" else 0)
    done = {"bits", "checkpoint_format", "format", "pack_dtype", "group_size", "desc_act", "sym", "lm_head"}
    done |= {"dynamic", "modules_in_block_to_quantize"}
    keys.one_of("format", ("gptq", "gptq_v2"), default=version)
    keys.refuse_others(done | HARMLESS)
    head = r"|lm_head$" if keys.flag("lm_head") else ""
    return Quantisation(((rf"model\.layers\.{_modules(keys)}{head}", scheme),), _kept(keys))


def _modules(keys: Keys) -> str:
    """Optimum's `modules_in_block_to_quantize`, lists of names within a layer: a pattern of them, empty for all."""
    listed = keys.raw.get("modules_in_block_to_quantize") or []
    names = [name for names in listed for name in (names if isinstance(names, list) else [names])]
    if not all(isinstance(name, str) for name in names):
        raise keys.fail("modules_in_block_to_quantize", f"must be lists of names, not {as_json(listed)}")
    return rf"\d+\.({'|'.join(map(re.escape, names))})$" if names else ""


def _kept(keys: Keys) -> tuple[str, ...]:
    """GPTQModel's `dynamic`: of its rules by pattern, those that leave modules as they are (`-:`)."""
    rules = keys.within("dynamic").raw
    for pattern, changes in rules.items():
        if changes and not pattern.startswith("-:"):
            raise keys.fail("dynamic", f"changes {as_json(pattern)}, which is not supported; only -: is")
    kept = tuple(pattern.removeprefix("-:") for pattern in rules if pattern.startswith("-:"))
    for pattern in kept:
        try:
            re.compile(pattern)
        except re.error as error:
            raise keys.fail("dynamic", f"has no regular expression in {as_json(pattern)}: {error}") from error
    return kept
