"""What one layer keeps of one token."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVSpec:
    """Keys and values of `heads` heads of `head_dim` elements, kept as `dtype`, whatever the layers compute in."""

    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize

    def page_shape(self, page_size: int) -> tuple[int, ...]:
        """A page of `page_size` tokens: keys and values, tokens, heads, elements; flashinfer's NHD."""
        return (2, page_size, self.heads, self.head_dim)
