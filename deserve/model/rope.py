"""Rotary position embedding: the angles by which queries and keys are turned (arXiv 2104.09864).

The halves of what is rotated are paired, element i with element i + dim/2, as Hugging Face checkpoints expect.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from deserve.model.config import Rope


def inverse_frequencies(rope: Rope, length: int | None = None) -> tuple[Tensor, float]:
    """Radians per position `[dim // 2]`, float32 on the CPU, and the factor on cos and sin; those of longrope for
    sequences of `length` tokens."""
    if rope.kind == "default":
        return 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # imported where needed: it takes half a second

    config = SimpleNamespace(
        rope_parameters=rope.parameters | {"rope_theta": rope.theta},
        max_position_embeddings=rope.context,
        head_dim=rope.dim,
        hidden_size=rope.dim,
        num_attention_heads=1,
        standardize_rope_params=lambda: None,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, seq_len=length)
    return frequencies, float(factor)


def rope_table(rope: Rope, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0..length-1, each `[length, dim // 2]` float32, times attention factor.

    If sequences of more than `rope.switch` tokens are rotated in another way, as many rows for the shorter ones come
    first: `[switch + length, dim // 2]`. Made on the CPU, so that every rank turns by the same angles whatever its
    device.
    """
    parts = []
    for positions in (rope.switch, length):
        frequencies, factor = inverse_frequencies(rope, positions)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        parts.append((angles.cos() * factor, angles.sin() * factor))
    cos, sin = (torch.cat(both).to(device) for both in zip(*parts, strict=True))
    return cos, sin
