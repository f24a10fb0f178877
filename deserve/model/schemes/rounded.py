"""Weights of an unquantised checkpoint, rounded while loading: `model.quantise`."""

from dataclasses import dataclass

from torch import Tensor

from deserve.model.packed import Form, Packed
from deserve.model.safetensors_folder import FLOATS
from deserve.model.schemes.base import Quantisation, Stored

FORMS = {"fp8": Form("fp8"), "int4": Form("int4", columns=128)}  # per channel; in groups


@dataclass(frozen=True)
class Rounded:
    """Weights stored as floats, in memory as `form`."""

    form: Form
    spare: tuple[str, ...] = ()

    def misfit(self, size: int, inputs: int) -> str | None:
        return None

    def stored(self, size: int, inputs: int) -> Stored:
        return {"weight": ((size, inputs), FLOATS)}

    def pack(self, tensors: dict[str, Tensor]) -> Packed:
        return self.form.quantise(tensors["weight"])


def rounded(name: str) -> Quantisation:
    """The layers of a model rounded to `FORMS[name]`; its embedding and its output head stay as they are."""
    return Quantisation(((r"model\.layers\.", Rounded(FORMS[name])),))
