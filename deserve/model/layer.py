"""A layer of a dense decoder: attention and MLP, each with the norm before it."""

from dataclasses import dataclass

from torch import Tensor

from deserve.model.backend.base import Backend
from deserve.model.config import ModelConfig
from deserve.model.linear import Linear
from deserve.model.packed import PackedLinear

Product = Linear | PackedLinear


@dataclass
class Attention:
    """What attention multiplies with. `qkv`: rows q, k, v; q_norm, k_norm: [head_dim], None: the model has none."""

    qkv: Product
    output: Product
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def heads(
        self, h: Tensor, config: ModelConfig, backend: Backend, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, heads, head_dim], keys and values [T, kv_heads, head_dim] of h [T, hidden], rotated.

        With `out` [T, q_size + 2 * kv_size] the queries lie in its first columns.
        """
        fused = self.qkv(h, out).view(len(h), -1, config.head_dim)
        first, k, v = fused.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        q = first
        if self.q_norm is not None and self.k_norm is not None:
            q, k = backend.rms_norm(q, self.q_norm), backend.rms_norm(k, self.k_norm)
        q, k = backend.rotate(q, k)
        if out is not None and q.data_ptr() != first.data_ptr():
            q = first.copy_(q)
        return q, k, v


@dataclass
class MLP:
    """SwiGLU; `gate_up`: rows gate, up."""

    gate_up: Product
    down: Product

    def __call__(self, h: Tensor, backend: Backend) -> Tensor:
        """h [T, hidden] to [T, hidden]."""
        return self.down(backend.silu_and_mul(self.gate_up(h)))


@dataclass
class Layer:
    """input_norm, post_norm: [hidden], before attention and before the MLP."""

    input_norm: Tensor
    attention: Attention
    post_norm: Tensor
    mlp: MLP
