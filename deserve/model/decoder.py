"""A shard of a dense decoder (Llama and its relatives): the layers of one stage as a function."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from deserve.kvcache.slab import SwapSlab
from deserve.model.backend.base import Backend
from deserve.model.config import ModelConfig
from deserve.model.weights import ShardWeights


class Decoder:
    """Some of a model's layers, with the embedding if it is the first shard and the output layer if the last.

    T stands for the tokens of a visit, laid end to end; which sequence each belongs to is the backend's affair.
    """

    def __init__(self, config: ModelConfig, weights: ShardWeights, backend: Backend):
        self.config = config
        self.weights = weights
        self.backend = backend
        for layer in weights.layers:
            layer.qkv, layer.output = backend.pack(layer.qkv), backend.pack(layer.output)
            layer.gate_up, layer.down = backend.pack(layer.gate_up), backend.pack(layer.down)
        if weights.head is not None:
            weights.head = backend.pack(weights.head)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [T] to hidden states [T, hidden]."""
        assert self.weights.embedding is not None
        return F.embedding(tokens, self.weights.embedding)

    def forward(self, x: torch.Tensor, pages: Sequence[torch.Tensor], slab: SwapSlab | None = None) -> torch.Tensor:
        """Hidden states x [T, hidden] through the shard's layers, each with its `pages` as `Backend.append` takes them.

        Each layer waits for its pages of `slab`, and gives them up when it has attended. Works in x's memory.
        """
        branch = None
        for span in self.spans(slab):
            branch = self.through(span, x, branch, pages, slab)
            if slab is not None:
                slab.follow(span)
        return self.merge(x, branch)

    def spans(self, slab: SwapSlab | None) -> Sequence[range]:
        """The shard's layers, in the parts between which `slab` must be told how far a visit has come."""
        return [range(len(self.weights.layers))] if slab is None else slab.spans

    def through(
        self,
        span: range,
        residual: torch.Tensor,
        branch: torch.Tensor | None,
        pages: Sequence[torch.Tensor],
        slab: SwapSlab | None,
    ) -> torch.Tensor | None:
        """The layers of `span`, whose input is the sum of `residual` and `branch` [T, hidden]; the new branch.

        All that it does is on the device: it can be captured.
        """
        for index in span:
            q = self.before_attention(index, residual, branch, pages[index], slab)
            branch = self.after_attention(index, residual, self.backend.attend(index, pages[index], q), slab)
        if slab is not None:
            slab.join()
        return branch

    def before_attention(
        self,
        index: int,
        residual: torch.Tensor,
        branch: torch.Tensor | None,
        pages: torch.Tensor,
        slab: SwapSlab | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Layer `index` up to its attention: adds `branch` [T, hidden] to `residual`, appends to the layer's `pages`.

        Returns the queries [T, heads, head_dim]; they lie in `out` [T, qkv] if it is given, as the first heads of it.
        """
        config, layer = self.config, self.weights.layers[index]
        if branch is None:
            h = self.backend.rms_norm(residual, layer.input_norm)
        else:
            h = self.backend.add_rms_norm(branch, residual, layer.input_norm)
        if out is None:
            qkv = self.backend.linear(h, layer.qkv, layer.qkv_bias)
        else:
            qkv = self.backend.linear_into(out, h, layer.qkv, layer.qkv_bias)
        qkv = qkv.view(len(h), -1, config.head_dim)
        first, k, v = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        q = first
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self.backend.rms_norm(q, layer.q_norm), self.backend.rms_norm(k, layer.k_norm)
        q, k = self.backend.rotate(q, k)
        if slab is not None:
            slab.await_layer(index)
        self.backend.append(index, pages, k, v)
        return q if out is None or q.data_ptr() == first.data_ptr() else first.copy_(q)

    def after_attention(
        self, index: int, residual: torch.Tensor, attended: torch.Tensor, slab: SwapSlab | None
    ) -> torch.Tensor:
        """The rest of layer `index`, from `attended` [T, heads * head_dim] on; its output [T, hidden] is yet to be
        added to `residual`."""
        layer = self.weights.layers[index]
        if slab is not None:
            slab.leave_layer(index, len(attended))
        h = self.backend.linear(attended, layer.output, layer.output_bias)
        h = self.backend.add_rms_norm(h, residual, layer.post_norm)
        h = self.backend.silu_and_mul(self.backend.linear(h, layer.gate_up, layer.gate_up_bias))
        return self.backend.linear(h, layer.down, layer.down_bias)

    def merge(self, residual: torch.Tensor, branch: torch.Tensor | None) -> torch.Tensor:
        """The hidden states after the last layer, in the memory of `residual`."""
        return residual if branch is None else residual.add_(branch)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states x [n, hidden] after the last layer to logits [n, vocab]."""
        assert self.weights.final_norm is not None and self.weights.head is not None
        return self.backend.linear(self.backend.rms_norm(x, self.weights.final_norm), self.weights.head)
