"""A layer of a decoder: attention, and an MLP or a mixture of experts, each with the norm before it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deserve.model.backend.base import Backend
from deserve.model.config import ExpertConfig, ModelConfig
from deserve.model.linear import ExpertLinear, Linear
from deserve.model.packed import PackedLinear

Product = Linear | PackedLinear


@dataclass
class Attention:
    """What attention multiplies with. `qkv`: rows q, k, v.

    q_norm, k_norm: [head_dim], or of all heads if the model's norms are wide; None: the model has none.
    """

    qkv: Product
    output: Product
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    kind: int = 0  # index in ModelConfig.kinds
    sinks: Tensor | None = None  # [heads], see Backend.attend

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
            if config.wide_qk_norm:
                q = backend.rms_norm(q.flatten(1), self.q_norm).view_as(q)
                k = backend.rms_norm(k.flatten(1), self.k_norm).view_as(k)
            else:
                q, k = backend.rms_norm(q, self.q_norm), backend.rms_norm(k, self.k_norm)
        if config.clip_qkv is not None:
            for part in (q, k, v):
                part.clamp_(-config.clip_qkv, config.clip_qkv)
        q, k = backend.rotate(q, k, self.kind)
        if out is not None and q.data_ptr() != first.data_ptr():
            q = first.copy_(q)
        return q, k, v


@dataclass
class MLP:
    """SwiGLU, or the same with GELU; `gate_up`: rows gate, up."""

    gate_up: Product
    down: Product
    gelu: bool = False

    def __call__(self, h: Tensor, backend: Backend) -> Tensor:
        """h [T, hidden] to [T, hidden]."""
        activate = backend.gelu_and_mul if self.gelu else backend.silu_and_mul
        return self.down(activate(self.gate_up(h)))


@dataclass
class Experts:
    """SwiGLU by the experts that a router picks for each token. gate_up: rows gate, up; by turns if it is clamped."""

    config: ExpertConfig
    router: Linear
    gate_up: ExpertLinear
    down: ExpertLinear

    def __call__(self, h: Tensor, backend: Backend) -> Tensor:
        """h [T, hidden] to [T, hidden]."""
        weights, picked = self.route(h)
        experts, order = picked.flatten().sort(stable=True)
        numbers = torch.arange(self.config.count, device=h.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        rows = self.gate_up(h[order // self.config.active], experts, ends)
        clamp = self.config.clamp
        rows = backend.silu_and_mul(rows) if clamp is None else clamped_swiglu(rows, *clamp)
        rows = self.down(rows, experts, ends)
        by_token = torch.empty_like(rows).index_copy_(0, order, rows).unflatten(0, picked.shape)
        # Atomic additions to the tokens would round differently from run to run.
        return by_token.mul_(weights.unsqueeze(-1)).sum(1)

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of each token's experts, [T, active] both."""
        logits = self.router(h).float()
        top, picked = logits.topk(self.config.active, dim=-1)
        whole = top if self.config.normalised else logits
        return (top - whole.logsumexp(-1, keepdim=True)).exp().to(h.dtype), picked


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss's activation of gate_up [n, 2 * m], in which gates and ups alternate: [n, m]."""
    gate, up = gate_up[:, ::2].clamp(max=limit), gate_up[:, 1::2].clamp(-limit, limit)
    return (up + 1).mul_(gate).mul_((gate * alpha).sigmoid_())


@dataclass
class Layer:
    """input_norm, post_norm: [hidden], before attention and before the MLP.

    attention_norm, mlp_norm: [hidden], behind them; None: the model has none.
    """

    input_norm: Tensor
    attention: Attention
    post_norm: Tensor
    mlp: MLP | Experts
    attention_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
