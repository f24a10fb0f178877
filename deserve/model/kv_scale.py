"""Scales for keys and values in e4m3 pages, folded into the weights around them.

A layer's keys times 1/k with its queries times k give the same scores, and its values times 1/v with the weights of the
output times v the same output. So pages need no scales beside them, and no kernel knows of any. Both are powers of two,
which change no digit, and follow from the weights alone: they are the same in every run and for every layer split.
"""

import math

import torch
from torch import Tensor

from deserve.model.config import ModelConfig
from deserve.model.layer import Layer
from deserve.model.rope import inverse_frequencies

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def fold_scales(layer: Layer, config: ModelConfig) -> None:
    """Scale `layer` so that no key or value, whatever the input, is too large for e4m3, and the largest is near it.

    A norm's output is at most sqrt(hidden) long before its gain, and a product no larger than the lengths of its two
    factors. Keys and values of real texts are some 20 to 100 times smaller, and e4m3 is as precise over 2^14.
    """
    attention, kv = layer.attention, config.kv_size
    if config.clip_qkv is not None:  # they are small as they are
        return
    offset = int(config.norm_offset)
    reach = math.sqrt(config.hidden_size) * attention.qkv.norms(layer.input_norm.float() + offset)
    if attention.qkv.bias is not None:
        reach += attention.qkv.bias.float().abs()
    keys, values = reach[config.q_size :].split([kv, kv])
    normed = attention.q_norm is not None and attention.k_norm is not None
    if attention.k_norm is not None:
        keys = math.sqrt(kv if config.wide_qk_norm else config.head_dim) * (attention.k_norm.float() + offset).abs()
    rope = config.kinds[attention.kind].rope
    turned = max(inverse_frequencies(rope, length)[1] for length in (rope.switch or rope.context, rope.context))
    # Rope turns pairs of elements into each other.
    k, v = (_power_of_two(most) for most in (keys * turned * math.sqrt(2), values))
    if normed and offset:  # 1 + weight is not scaled without rounding: only where it must be
        k = max(k, 1.0)
    if attention.q_norm is not None and attention.k_norm is not None:
        attention.q_norm = (attention.q_norm + offset) * k - offset
        attention.k_norm = (attention.k_norm + offset) / k - offset
    factors = [(config.q_size, 1.0 if normed else k), (kv, 1.0 if normed else 1 / k), (kv, 1 / v)]
    attention.qkv = attention.qkv.scaled(factors)
    attention.output = attention.output.scaled([(config.hidden_size, v)], bias=False)


def _power_of_two(most: Tensor) -> float:
    """The smallest power of two by which the largest of `most` must be divided to fit e4m3."""
    largest = float(most.max())
    return 2.0 ** math.ceil(math.log2(largest / LARGEST)) if largest else 1.0
