"""Rotary position embedding: the angles by which queries and keys are turned (arXiv 2104.09864).

The halves of a head are paired, element i with element i + head_dim/2, as Hugging Face checkpoints expect.
"""

import math

import torch
from torch import Tensor

from deserve.model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position `[head_dim // 2]`, float32 on the CPU, and the factor on cos and sin."""
    scaling = config.rope_scaling
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    base = 1.0 / (config.rope_theta**exponents)
    if scaling.kind == "linear":
        base = base / scaling.factor
    elif scaling.kind == "llama3":
        base = _llama3(base, scaling)
    elif scaling.kind == "yarn":
        base = _yarn(config.rope_theta**exponents, config, scaling)
    return base, scaling.attention_factor


def rope_table(config: ModelConfig, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0..length-1, each `[length, head_dim // 2]` float32, times attention factor.

    Made on the CPU, so that every rank turns by the same angles whatever its device.
    """
    frequencies, factor = inverse_frequencies(config)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def _llama3(base: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: short waves stay, long ones are stretched by `factor`, those between are blended.

    Source: apply_scaling in Meta's llama-models, models/llama3/model.py.
    """
    context, low, high = scaling.original_context, scaling.low_freq_factor, scaling.high_freq_factor
    waves = 2 * math.pi / base
    stretched = base / scaling.factor
    blend = (context / waves - low) / (high - low)
    between = (1 - blend) * stretched + blend * base
    return torch.where(waves > context / low, stretched, torch.where(waves < context / high, base, between))


def _yarn(periods: Tensor, config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """YaRN's "NTK-by-parts" (arXiv 2309.00071, section 3.2): a ramp over dimensions, base to stretched.

    periods: `[head_dim // 2]`, positions per radian.
    """
    dim = config.head_dim

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        turns = scaling.original_context / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return (1.0 / (scaling.factor * periods)) * (1 - keep) + (1.0 / periods) * keep
