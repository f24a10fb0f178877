"""The format of compressed-tensors and llm-compressor: groups of modules by name, each with a layout of weights.

Activations are not quantised here, whatever the checkpoint says of them: products are closer to the original model's.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from deserve.errors import as_json
from deserve.model.keys import Keys
from deserve.model.packed import MX_BLOCK, Form, Packed, split
from deserve.model.safetensors_folder import FLOATS
from deserve.model.schemes.base import INTS, Quantisation, Stored, groups_of_inputs

FORMATS = {  # and the kinds of weights that each holds
    "pack-quantized": ("int4", "int8"),
    "int-quantized": ("int8",),
    "float-quantized": ("fp8",),
    "naive-quantized": ("int8", "fp8"),
    "mxfp4-pack-quantized": ("fp4",),
}
EVERY = ""  # matches any name
STRATEGIES = ("tensor", "channel", "group", "block")
HARMLESS = {"global_compression_ratio", "version", "quantization_status", "run_compressed"}


@dataclass(frozen=True)
class CompressedTensors:
    """kind: see Form. words: codes are packed into int32. block: outputs and inputs that share a scale, None: all.

    reordered: `weight_g_idx` says the group of each input (versions before 0.20, `actorder: group`).
    """

    kind: str
    words: bool
    block: tuple[int | None, int | None]
    zeros: bool = False
    reordered: bool = False
    spare: tuple[str, ...] = ("input_scale", "input_zero_point")

    @property
    def form(self) -> Form:
        return Form(self.kind, *self.block, self.zeros)

    @property
    def _codes(self) -> int:
        """How many codes lie in a word, if they do."""
        return 8 if self.kind == "int4" else 4

    def misfit(self, size: int, inputs: int) -> str | None:
        group = self.block[1] if self.block[0] == 1 else None
        if group and inputs % group:
            return f"config_groups: group_size ({group}) does not divide {inputs} inputs"
        if self.words and (inputs % self._codes or (self.zeros and size % self._codes)):
            return f"config_groups: codes are packed by {self._codes}, which does not divide a weight {[size, inputs]}"
        return None

    def stored(self, size: int, inputs: int) -> Stored:
        blocks = self.form.blocks(size, inputs)
        if self.kind == "fp4":
            return {"weight_packed": ((size, inputs // 2), ("U8",)), "weight_scale": (blocks, ("U8",))}
        scale = ((1,) if self.block == (None, None) else blocks, FLOATS)
        if not self.words:
            kinds = ("F8_E4M3",) if self.kind == "fp8" else ("I8",)
            found: Stored = {"weight": ((size, inputs), kinds), "weight_scale": scale}
            return found | ({"weight_zero_point": (scale[0], ("I8",))} if self.zeros else {})
        found = {
            "weight_packed": ((size, inputs // self._codes), INTS),
            "weight_scale": scale,
            "weight_shape": ((2,), ("I64", "I32")),
        }
        if self.reordered:
            found["weight_g_idx"] = ((inputs,), INTS)
        return found | ({"weight_zero_point": ((size // self._codes, blocks[1]), INTS)} if self.zeros else {})

    def pack(self, tensors: dict[str, Tensor]) -> Packed:
        scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
        if self.kind == "fp4":
            return Packed(self.form, tensors["weight_packed"], scale.view(torch.float8_e8m0fnu))
        scale = scale.float().view(-1, 1) if scale.dim() < 2 else scale.float()
        if not self.words:
            return Packed(self.form, tensors["weight"], scale, None if zero is None else zero.view(scale.shape))
        codes = tensors["weight_packed"].view(torch.uint8)
        if zero is not None:
            zero = split(zero.t(), 4 if self.kind == "int4" else 8).t().contiguous()
        if self.kind == "int8":
            codes, zero = (codes ^ 128).view(torch.int8), None if zero is None else zero ^ 128
        columns = None
        if self.reordered:
            columns = groups_of_inputs(tensors["weight_g_idx"], scale.shape[1], self.block[1])
        return Packed(self.form, codes, scale, None if zero is None else zero.view(torch.int8), columns)


def parse(keys: Keys) -> Quantisation:
    """Read a `quantization_config` of `quant_method: compressed-tensors`."""
    keys.one_of("quantization_status", ("compressed",), default="compressed")
    layout = keys.one_of("format", (*FORMATS, "mixed-precision"))
    keys.within("sparsity_config").one_of("format", ("dense",), default="dense")
    groups, rules = keys.within("config_groups"), []
    for name in groups.raw:
        group = groups.within(name)
        own = group.one_of("format", tuple(FORMATS), default=layout)
        scheme = _scheme(group.within("weights"), own)
        group.refuse_others({"targets", "weights", "format", "input_activations"})
        rules += [(_pattern(group, "targets", target), scheme) for target in group.texts("targets")]
    if not rules:
        raise keys.fail("config_groups", "names no modules")
    kept = tuple(_pattern(keys, "ignore", name) for name in keys.texts("ignore"))
    keys.refuse_others({"format", "config_groups", "ignore", "sparsity_config"} | HARMLESS)
    rules.sort(key=lambda rule: rule[0] == EVERY)  # a name goes before a class
    return Quantisation(tuple(rules), kept)


def _scheme(weights: Keys, layout: str) -> CompressedTensors:
    """A group's `weights`."""
    bits = weights.one_of("num_bits", (4, 8))
    kind = f"{'fp' if weights.one_of('type', ('int', 'float')) == 'float' else 'int'}{bits}"
    if kind not in FORMATS[layout]:
        raise weights.fail("type", f"and num_bits: {kind} is not supported in the format {layout}")
    strategy: str = weights.one_of("strategy", STRATEGIES)
    order = weights.one_of("actorder", ("weight", "static", "group", "dynamic", False), default=False)
    reordered = order in ("group", "dynamic")
    if reordered and (layout != "pack-quantized" or strategy != "group"):
        raise weights.fail("actorder", f"{as_json(order)} is not supported in the format {layout}, strategy {strategy}")
    weights.one_of("dynamic", (False,), default=False)
    zeros = not weights.flag("symmetric", default=True)
    weights.refuse_others(
        {"num_bits", "type", "strategy", "symmetric", "actorder", "dynamic", "group_size", "block_structure"}
        | {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
    )
    block: tuple[int | None, int | None] = {"tensor": (None, None), "channel": (1, None)}.get(strategy, (1, None))
    if strategy == "group":
        block = (1, weights.count("group_size"))
    elif strategy == "block":
        sizes = weights.sizes("block_structure")
        if sizes is None:
            raise weights.fail("block_structure", "is missing")
        block = sizes
    words = layout == "pack-quantized"
    if kind == "fp4" and (block != (1, MX_BLOCK) or zeros):
        raise weights.fail("group_size", f"must be {MX_BLOCK}, symmetric, for MXFP4")
    if words and strategy not in ("channel", "group"):
        raise weights.fail("strategy", f"{as_json(strategy)} is not supported in the format {layout}")
    if kind == "fp8" and zeros:
        raise weights.fail("symmetric", "must be true for fp8")
    return CompressedTensors(kind, words, block, zeros, reordered)


def _pattern(keys: Keys, key: str, name: str) -> str:
    """Of a module's name, a regular expression after `re:`, or the class of all that is linear."""
    if not name.startswith("re:"):
        return EVERY if name == "Linear" else f"{re.escape(name)}$"
    pattern = name.removeprefix("re:")
    try:
        re.compile(pattern)
    except re.error as error:
        raise keys.fail(key, f"has no regular expression in {as_json(name)}: {error}") from error
    return pattern
