"""A shard of a dense decoder (Llama and its relatives): the layers of one stage as a function."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from deserve.kvcache.pages import KVLayer, KVPages
from deserve.model.backend.base import Backend
from deserve.model.config import ModelConfig
from deserve.model.weights import ShardWeights

Step = Callable[[], object]


class Attention:
    """A layer's attention over the rows of a visit. Called, it leaves its results in `output` [T, q_size]."""

    output: torch.Tensor

    def __init__(self, backend: Backend, layer: KVLayer, q: torch.Tensor):
        self._backend, self._layer, self._q = backend, layer, q

    def __call__(self) -> None:
        self.output = self._backend.attend(self._layer, self._q)


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

    def forward(self, x: torch.Tensor, kv: KVPages) -> torch.Tensor:
        """Hidden states x [T, hidden] through the shard's layers, in x's memory."""
        for step in self.steps(x, kv):
            step()
        return x

    def steps(self, x: torch.Tensor, kv: KVPages, qkv: torch.Tensor | None = None) -> Iterator[Step]:
        """The same, stopping wherever a CUDA graph may have to end: whoever iterates calls each step that it is given.

        Those are the layers' attentions, and `kv.follow`. Queries, keys and values are computed in `qkv`
        [T, q_size + 2 * kv_size], if it is given, so that each attention finds its queries in the same place.
        """
        config, backend = self.config, self.backend
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        branch: torch.Tensor | None = None  # what is yet to be added to x
        for index, layer in enumerate(self.weights.layers):
            if branch is None:
                h = backend.rms_norm(x, layer.input_norm)
            else:
                h = backend.add_rms_norm(branch, x, layer.input_norm)
            if qkv is None:
                fused = backend.linear(h, layer.qkv, layer.qkv_bias)
            else:
                fused = backend.linear_into(qkv, h, layer.qkv, layer.qkv_bias)
            first, k, v = fused.view(len(x), -1, config.head_dim).split(heads, dim=1)
            q = first
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = backend.rms_norm(q, layer.q_norm), backend.rms_norm(k, layer.k_norm)
            q, k = backend.rotate(q, k)
            with kv.layer(index, len(x)) as pages:
                backend.append(pages, k, v)
                if qkv is not None and q.data_ptr() != first.data_ptr():
                    q = first.copy_(q)
                attention = Attention(backend, pages, q)
                yield attention
            h = backend.linear(attention.output, layer.output, layer.output_bias)
            h = backend.add_rms_norm(h, x, layer.post_norm)
            h = backend.silu_and_mul(backend.linear(h, layer.gate_up, layer.gate_up_bias))
            branch = backend.linear(h, layer.down, layer.down_bias)
            if index + 1 == kv.turn:
                yield partial(kv.follow, range(kv.turn))
        if branch is not None:
            x.add_(branch)
        kv.join()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states x [n, hidden] after the last layer to logits [n, vocab]."""
        assert self.weights.final_norm is not None and self.weights.head is not None
        return self.backend.linear(self.backend.rms_norm(x, self.weights.final_norm), self.weights.head)
