"""Which scheme a checkpoint's `quantization_config` names."""

from collections.abc import Callable, Sequence

from deserve.model.keys import Keys
from deserve.model.schemes import awq, compressed_tensors, fp8, gptq, mxfp4
from deserve.model.schemes.base import Quantisation

PARSERS: dict[str, Callable[[Keys], Quantisation]] = {
    "gptq": gptq.parse,
    "awq": awq.parse,
    "fp8": fp8.parse,
    "mxfp4": mxfp4.parse,
    "compressed-tensors": compressed_tensors.parse,
}


def parse_quantisation(keys: Keys, shapes: Sequence[tuple[int, int]]) -> Quantisation | None:
    """Read `quantization_config` of a config.json whose linear layers have `shapes`, outputs and inputs.

    Raises UserError, naming the key, for a method or an option that is not done.
    """
    if keys.raw.get("quantization_config") is None:
        return None
    section = Keys(dict(keys.within("quantization_config").raw), keys.source, "quantization_config.")
    method = section.one_of("quant_method", tuple(PARSERS))
    del section.raw["quant_method"]
    quantisation = PARSERS[method](section)
    complaint = quantisation.misfit(shapes)
    if complaint:
        raise keys.fail("quantization_config:", complaint)
    return quantisation
