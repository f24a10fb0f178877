"""A shard of a dense decoder (Llama and its relatives): the layers of one stage as a function."""

import torch
import torch.nn.functional as F

from deserve.kvcache.slab import SwapSlab
from deserve.model.backend.base import Backend
from deserve.model.config import ModelConfig
from deserve.model.weights import LayerWeights, ShardWeights


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

    def forward(self, x: torch.Tensor, pages: torch.Tensor, slab: SwapSlab | None = None) -> torch.Tensor:
        """Hidden states x [T, hidden] through the shard's layers. pages: [layers, pages, 2, page_size, kv_heads, d].

        Each layer waits for its pages of `slab`, and gives them up when it has attended. Works in x's memory.
        """
        residual = x
        branch: torch.Tensor | None = None  # what the layer before has yet to add
        for index, layer in enumerate(self.weights.layers):
            h = self._norm(branch, residual, layer.input_norm)
            if slab is not None:
                slab.await_layer(index)
            h = self._attention(h, layer, pages[index])
            if slab is not None:
                slab.leave_layer(index, len(x))
            h = self.backend.add_rms_norm(h, residual, layer.post_norm)
            branch = self._mlp(h, layer)
        if slab is not None:
            slab.join()
        return residual if branch is None else residual.add_(branch)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states x [n, hidden] after the last layer to logits [n, vocab]."""
        assert self.weights.final_norm is not None and self.weights.head is not None
        return self.backend.linear(self.backend.rms_norm(x, self.weights.final_norm), self.weights.head)

    def _norm(self, branch: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if branch is None:
            return self.backend.rms_norm(residual, weight)
        return self.backend.add_rms_norm(branch, residual, weight)

    def _attention(self, h: torch.Tensor, layer: LayerWeights, pages: torch.Tensor) -> torch.Tensor:
        config = self.config
        qkv = self.backend.linear(h, layer.qkv, layer.qkv_bias).view(len(h), -1, config.head_dim)
        q, k, v = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self.backend.rms_norm(q, layer.q_norm), self.backend.rms_norm(k, layer.k_norm)
        q, k = self.backend.rotate(q, k)
        return self.backend.linear(self.backend.attend(pages, q, k, v), layer.output, layer.output_bias)

    def _mlp(self, h: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        h = self.backend.silu_and_mul(self.backend.linear(h, layer.gate_up, layer.gate_up_bias))
        return self.backend.linear(h, layer.down, layer.down_bias)
